//! The pinned inference worker: frame → tensor → raw output → detections → record, as one
//! function ([`Worker::infer`]) read from top to bottom.
//!
//! The worker owns nothing slow: it builds no session and drops none, does no I/O and logs nothing
//! per frame. What it measures goes into the [`Meter`], which others empty once in a while.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crate::camera::frame::Frame;
use crate::config::{self, Publish};
use crate::guest::Guest;
use crate::meter::{Meter, Timing};
use crate::model::engine::{Detection, Model, RunError, Thresholds};
use crate::model::slot::{Live, Slot};
use crate::mqtt::outbox::{Outbox, Record};
use crate::mqtt::topics::Topics;
use crate::preview::{Found, Head, Previews, Tap};
use crate::queue::{Drop, Intake, Taken};
use crate::records::{
    self, Bounds, Detections, FrameInfo, Latency, ModelRef, Object, Since, rounded,
};
use crate::sampler::Sampler;

/// A record comes at least this often while frames are inferred, with or without objects.
pub const RECORD_INTERVAL: Duration = Duration::from_secs(10);

/// How long the worker waits for a frame before it looks whether it should stop.
const PATIENCE: Duration = Duration::from_millis(200);

/// Who this box is, in this life of the process.
#[derive(Debug, Clone)]
pub struct Origin {
    /// Device id.
    pub device: String,
    /// 80 random bits for this life of the process, as 16 characters.
    pub boot: String,
}

/// What the worker shares with those who start, watch and stop it.
#[derive(Debug)]
pub struct Pulse {
    /// Goes up with every frame and every idle wait.
    pub beats: AtomicU64,
    /// Set to stop.
    pub stop: AtomicBool,
    /// Who stands still while a frame is worked on.
    pub guest: Guest,
    born: Instant,
    /// Microseconds from `born` to the start of the frame in work; 0 = none.
    busy_since_us: AtomicU64,
    /// Epoch of the model that works on it.
    busy_epoch: AtomicU64,
}

impl Default for Pulse {
    fn default() -> Self {
        Self {
            beats: AtomicU64::new(0),
            stop: AtomicBool::new(false),
            guest: Guest::default(),
            born: Instant::now(),
            busy_since_us: AtomicU64::new(0),
            busy_epoch: AtomicU64::new(0),
        }
    }
}

impl Pulse {
    fn begin(&self, epoch: u64) {
        self.guest.hush();
        self.busy_epoch.store(epoch, Ordering::Relaxed);
        let now_us = self.born.elapsed().as_micros() as u64;
        self.busy_since_us.store(now_us.max(1), Ordering::Release);
    }

    fn end(&self) {
        self.busy_since_us.store(0, Ordering::Release);
    }

    /// For how long the frame in work has been worked on, and by the model of which epoch.
    pub fn busy(&self) -> Option<(Duration, u64)> {
        let since_us = self.busy_since_us.load(Ordering::Acquire);
        let epoch = self.busy_epoch.load(Ordering::Relaxed);
        let since = Duration::from_micros(since_us);
        (since_us > 0).then(|| (self.born.elapsed().saturating_sub(since), epoch))
    }
}

/// The worker and all that it holds between two frames.
pub struct Worker {
    intake: Arc<Intake>,
    slot: Arc<Slot>,
    outbox: Arc<Outbox>,
    meter: Arc<Meter>,
    pulse: Arc<Pulse>,
    sampler: Arc<Sampler>,
    previews: Arc<Previews>,
    origin: Origin,
    /// The origin's, for the records.
    boot: Arc<str>,
    topics: Topics,
    confidence: f32,
    iou: f32,
    /// By lane, from its first frame on.
    lenses: Vec<Option<Lens>>,
    found: Vec<Detection>,
}

impl Worker {
    /// A worker at rest.
    #[allow(clippy::too_many_arguments)]
    pub fn new(
        intake: Arc<Intake>,
        slot: Arc<Slot>,
        outbox: Arc<Outbox>,
        meter: Arc<Meter>,
        pulse: Arc<Pulse>,
        sampler: Arc<Sampler>,
        previews: Arc<Previews>,
        origin: Origin,
        topics: &Topics,
        inference: &config::Inference,
    ) -> Self {
        let (topics, boot) = (topics.clone(), origin.boot.as_str().into());
        let (confidence, iou) = (inference.confidence, inference.iou);
        let (lenses, found) = (Vec::new(), Vec::new());
        Self {
            intake,
            slot,
            outbox,
            meter,
            pulse,
            sampler,
            previews,
            origin,
            boot,
            topics,
            confidence,
            iou,
            lenses,
            found,
        }
    }

    /// Serves frames until `pulse.stop` is set.
    pub fn run(mut self) {
        while !self.pulse.stop.load(Ordering::Relaxed) {
            let taken = self.intake.try_take(Instant::now()).or_else(|| {
                self.pulse.guest.resume();
                self.intake.take(PATIENCE)
            });
            if let Some(taken) = taken {
                self.infer(taken);
            }
            self.pulse.beats.fetch_add(1, Ordering::Relaxed);
        }
        self.pulse.guest.resume();
    }

    /// The path of a frame. The model is loaded once; a frame on which a model on probation fails
    /// is looked at again by the model before, so that not even that one is lost.
    fn infer(&mut self, taken: Taken) {
        let started = Instant::now();
        let Some(mut live) = self.slot.load() else {
            let lens = lens(&mut self.lenses, &taken, &self.boot, &self.topics, &self.previews);
            lens.lend(&taken.frame, None, &[], None);
            return taken.dropped(Drop::NoModel);
        };
        self.pulse.begin(live.epoch);
        let frame = &taken.frame;
        let confidence = taken.settings.confidence.unwrap_or(self.confidence);
        let thresholds = Thresholds { confidence, iou: self.iou };

        let mut seen = look(&live.model, frame, &thresholds, &mut self.found);
        if let (Err(why), Some(fallback)) = (&seen, &live.fallback) {
            live.fail(format!("frame {} of {}: {why}", frame.id, taken.settings.id));
            live = Arc::clone(fallback);
            seen = look(&live.model, frame, &thresholds, &mut self.found);
        }
        self.pulse.end();
        let lens = lens(&mut self.lenses, &taken, &self.boot, &self.topics, &self.previews);
        let (size, mut timing) = match seen {
            Ok(seen) => seen,
            Err(why) => return self.meter.failure(lens.fail(), &why.to_string()),
        };
        timing.queue = started - frame.arrived;
        lens.keep_wanted(&live, &mut self.found);

        let done = Instant::now();
        let objects = self.found.len();
        let mut event = None;
        if lens.is_due(objects, done) {
            let head =
                FrameInfo { id: frame.id, pts_ns: frame.pts_ns, width: size.0, height: size.1 };
            let since = lens.account(frame.id, done);
            event = lens.event_to_show(objects, done);
            let latency = Latency::from(&timing, frame.arrived.elapsed());
            let record = lens.record(&self.origin, &live, frame, head, since, latency, &self.found);
            self.outbox.push(record);
            self.meter.record(taken.camera, objects);
        } else {
            lens.empty += 1;
        }
        let total = frame.arrived.elapsed();
        self.meter.frame(taken.camera, frame.id, live.epoch, &timing, total, &self.found);
        self.sampler.offer(&lens.id, frame);
        lens.lend(frame, Some(&live), &self.found, event);
        taken.inferred();
    }
}

/// How this frame's camera is looked at, by the settings that came with the frame.
fn lens<'l>(
    lenses: &'l mut Vec<Option<Lens>>,
    taken: &Taken,
    boot: &Arc<str>,
    topics: &Topics,
    previews: &Previews,
) -> &'l mut Lens {
    if lenses.len() <= taken.camera {
        lenses.resize_with(taken.camera + 1, || None);
    }
    let new = || Lens::new(&taken.settings, boot, topics, previews);
    let lens = lenses[taken.camera].get_or_insert_with(new);
    lens.follow(&taken.settings);
    lens
}

/// Pixels to objects: preprocess, run, postprocess. Returns the picture's size and how long each
/// step took.
fn look(
    model: &Model,
    frame: &Frame,
    thresholds: &Thresholds,
    found: &mut Vec<Detection>,
) -> anyhow::Result<((usize, usize), Timing)> {
    let started = Instant::now();
    let mut runner = model.runner();
    let size = frame.with_picture(|picture| {
        runner.preprocess(picture)?;
        Ok::<_, RunError>((picture.width, picture.height))
    })??;
    let preprocessed = Instant::now();
    runner.run()?;
    let inferred = Instant::now();
    runner.postprocess(thresholds, found)?;
    let timing = Timing {
        queue: Duration::ZERO,
        preprocess: preprocessed - started,
        inference: inferred - preprocessed,
        postprocess: inferred.elapsed(),
    };
    Ok((size, timing))
}

impl Latency {
    fn from(timing: &Timing, total: Duration) -> Self {
        let ms = |d: Duration| rounded(d.as_secs_f64() * 1e3, 3);
        Self {
            queue: ms(timing.queue),
            preprocess: ms(timing.preprocess),
            inference: ms(timing.inference),
            postprocess: ms(timing.postprocess),
            total: ms(total),
        }
    }
}

fn interval(camera: &config::Camera) -> Option<Duration> {
    camera.publish_max_hz.map(|hz| Duration::from_secs_f64(1.0 / hz))
}

/// How one camera's frames are looked at and told: its settings, and what was told so far.
struct Lens {
    settings: Arc<config::Camera>,
    id: Arc<str>,
    tap: Arc<Tap>,
    boot: Arc<str>,
    topic: Arc<str>,
    /// Class ids of `labels` in the model of this epoch.
    wanted: Option<(u64, Vec<u32>)>,
    /// Shortest time between two records with objects.
    interval: Option<Duration>,
    seq: u64,
    /// Frame id that the next record's `since` starts from.
    next_frame: u64,
    empty: u64,
    failed: u64,
    last_record: Option<Instant>,
    last_picture: Option<Instant>,
}

impl Lens {
    fn new(
        camera: &Arc<config::Camera>,
        boot: &Arc<str>,
        topics: &Topics,
        previews: &Previews,
    ) -> Self {
        Self {
            settings: Arc::clone(camera),
            id: camera.id.as_str().into(),
            tap: previews.tap(&camera.id),
            boot: Arc::clone(boot),
            topic: topics.detections(&camera.id),
            wanted: None,
            interval: interval(camera),
            seq: 0,
            next_frame: 0,
            empty: 0,
            failed: 0,
            last_record: None,
            last_picture: None,
        }
    }

    /// Takes other settings over; what was told so far stays.
    fn follow(&mut self, settings: &Arc<config::Camera>) {
        if !Arc::ptr_eq(&self.settings, settings) {
            self.settings = Arc::clone(settings);
            self.interval = interval(settings);
            self.wanted = None;
        }
    }

    /// Lends the frame to those who look at the camera, or want a picture of this event.
    fn lend(
        &mut self,
        frame: &Frame,
        live: Option<&Arc<Live>>,
        found: &[Detection],
        event: Option<String>,
    ) {
        let is_event = event.is_some();
        let taken = self.tap.offer(frame, event, || {
            let labels = live.map_or(&[][..], |live| &live.model.contract().labels);
            let label = |d: &Detection| labels.get(d.class_id as usize).map_or("", String::as_str);
            let identity = live.map(|live| live.model.identity());
            Head {
                camera: self.id.to_string(),
                frame: frame.id,
                time_us: frame.time_us,
                width: frame.info.width(),
                height: frame.info.height(),
                model: identity.map(|i| (i.id.clone(), i.version.clone())),
                epoch: live.map_or(0, |live| live.epoch),
                objects: found.iter().map(|d| Found::of(d, label(d))).collect(),
            }
        });
        if is_event && !taken {
            // The encoder is busy: the next event's turn.
            self.last_picture = None;
        }
    }

    /// Counts a failed frame; returns the camera's id for the message.
    fn fail(&mut self) -> &Arc<str> {
        self.failed += 1;
        &self.id
    }

    /// Applies `labels`, whose class ids are looked up once per model.
    fn keep_wanted(&mut self, live: &Live, found: &mut Vec<Detection>) {
        let Some(labels) = &self.settings.labels else { return };
        let known = &live.model.contract().labels;
        if self.wanted.as_ref().is_none_or(|(epoch, _)| *epoch != live.epoch) {
            let ids = (0u32..).zip(known).filter(|(_, name)| labels.contains(name));
            self.wanted = Some((live.epoch, ids.map(|(id, _)| id).collect()));
        }
        if let Some((_, ids)) = &self.wanted {
            found.retain(|d| ids.contains(&d.class_id));
        }
    }

    /// Whether this frame becomes a record.
    fn is_due(&self, objects: usize, now: Instant) -> bool {
        let Some(last) = self.last_record else { return true };
        let quiet = now - last;
        if quiet >= RECORD_INTERVAL {
            return true;
        }
        (objects > 0 || self.settings.publish == Publish::All)
            && self.interval.is_none_or(|i| quiet >= i)
    }

    /// Accounts for every frame id since the previous record. Frames are inferred in the order of
    /// their ids, so those below this one that were neither inferred nor failed were dropped.
    fn account(&mut self, frame: u64, now: Instant) -> Since {
        let skipped = frame - self.next_frame;
        let (empty, failed) = (std::mem::take(&mut self.empty), std::mem::take(&mut self.failed));
        self.next_frame = frame + 1;
        self.last_record = Some(now);
        Since { empty, failed, dropped: skipped - empty - failed }
    }

    /// The name of the record that is about to be made, if it is to come with a picture.
    fn event_to_show(&mut self, objects: usize, now: Instant) -> Option<String> {
        let interval = Duration::from_secs_f64(self.settings.snapshot_interval_s?);
        let is_due = self.last_picture.is_none_or(|last| now - last >= interval);
        if objects == 0 || !is_due {
            return None;
        }
        self.last_picture = Some(now);
        Some(format!("{}-{}", self.boot, self.seq))
    }

    #[allow(clippy::too_many_arguments)]
    fn record(
        &mut self,
        origin: &Origin,
        live: &Live,
        frame: &Frame,
        head: FrameInfo,
        since: Since,
        latency_ms: Latency,
        found: &[Detection],
    ) -> Record {
        let seq = self.seq;
        self.seq += 1;
        let labels = &live.model.contract().labels;
        let objects = found.iter().map(|d| Object {
            class_id: d.class_id,
            label: labels.get(d.class_id as usize).map_or("", String::as_str),
            score: rounded(f64::from(d.score), 4),
            bounds: Bounds {
                x1: rounded(f64::from(d.x1), 5),
                y1: rounded(f64::from(d.y1), 5),
                x2: rounded(f64::from(d.x2), 5),
                y2: rounded(f64::from(d.y2), 5),
            },
        });
        let payload = serde_json::to_vec(&Detections {
            schema: records::DETECTIONS,
            device: &origin.device,
            camera: &self.id,
            boot: &origin.boot,
            seq,
            time: records::rfc3339(frame.time_us),
            time_us: frame.time_us,
            clock: frame.clock,
            frame: head,
            model: ModelRef { identity: live.model.identity(), epoch: live.epoch },
            latency_ms,
            since,
            objects: objects.collect(),
        })
        .expect("numbers, strings and lists always become JSON");
        let (camera, boot) = (Arc::clone(&self.id), Arc::clone(&self.boot));
        Record { camera, boot, seq, topic: Arc::clone(&self.topic), payload }
    }
}
