//! What each camera sees now, by label: `cameras/<id>/counts`, retained, on change and at most once
//! a second.
//!
//! Counted is the most that one frame of the last second held: what is seen for a moment is told,
//! and a detector that misses it on every other frame is no lamp that flickers.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use crate::app::to_json;
use crate::camera::State;
use crate::meter::Meter;
use crate::model::slot::Live;
use crate::mqtt::board::Board;
use crate::mqtt::topics::Topics;
use crate::records::{self, rfc3339};
use crate::snapshot::Snapshot;
use crate::worker::Origin;

const INTERVAL: Duration = Duration::from_secs(1);

/// Objects by label; `None` = nobody looks.
type Objects = Option<BTreeMap<String, u64>>;

/// What was told last, so that only changes are. Owned by the main thread.
#[derive(Default)]
pub struct Counts {
    told: Option<Instant>,
    /// By camera id.
    said: BTreeMap<String, Objects>,
}

impl Counts {
    /// Tells what has changed, unless it did so less than a second ago.
    pub fn tell(
        &mut self,
        snapshot: &Snapshot,
        meter: &Meter,
        origin: &Origin,
        topics: &Topics,
        board: &Board,
    ) {
        if self.told.is_some_and(|told| told.elapsed() < INTERVAL) {
            return;
        }
        self.told = Some(Instant::now());
        for camera in snapshot.cameras.iter().filter(|c| c.status.state != State::Removed) {
            let sight = meter.take_sight(camera.lane.index);
            let live = snapshot.live.as_deref();
            let objects = match (camera.status.state, live, sight) {
                (State::Streaming, Some(live), Some((epoch, most))) if epoch == live.epoch => {
                    Some(by_label(live, &most))
                }
                // No frame within this second, or one of a model that was just replaced.
                (State::Streaming, Some(_), _) => continue,
                _ => None,
            };
            if self.said.get(&camera.id) == Some(&objects) {
                continue;
            }
            let record = records::Counts {
                schema: "noblink.counts/1",
                device: &origin.device,
                camera: &camera.id,
                boot: &origin.boot,
                time: rfc3339(snapshot.time_us),
                time_us: snapshot.time_us,
                objects: objects.as_ref(),
                total: objects.as_ref().map(|o| o.values().sum()),
            };
            board.set(&topics.counts(&camera.id), to_json(&record));
            self.said.insert(camera.id.clone(), objects);
        }
    }

    /// The camera is no more.
    pub fn forget(&mut self, camera: &str) {
        self.said.remove(camera);
    }
}

fn by_label(live: &Live, most: &[u64]) -> BTreeMap<String, u64> {
    let mut objects = BTreeMap::new();
    for (label, count) in live.model.contract().labels.iter().zip(most).filter(|(_, n)| **n > 0) {
        // Two classes may have one name.
        *objects.entry(label.clone()).or_default() += count;
    }
    objects
}
