//! The thread `pipe-<name>`: owns a pipeline from its building to its end.
//!
//! Each step of it may block: on a dead server for some 20 s, on a device or a network folder for
//! ever. So whoever started the keeper waits [`DISMANTLE_WITHIN`] for it and then goes on without
//! it; it counts as leaked until it is gone after all.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, bounded};

use super::pipeline::{Event, Pipeline};

/// How long a pipeline may take to be taken down before it is given up.
pub const DISMANTLE_WITHIN: Duration = Duration::from_secs(2);

/// The handle of such a thread. Dropping it lets go of the pipeline without waiting.
pub(super) struct Keeper {
    /// Dropped to have the pipeline taken down.
    wanted: Option<Sender<()>>,
    gone: Receiver<()>,
    /// Set by whoever is first: the thread when it is done, the owner when it gives up.
    settled: Arc<AtomicBool>,
    leaked: Arc<AtomicU64>,
}

impl Keeper {
    /// Builds the pipeline and plays it until `let_go`; what `build` says instead becomes an event.
    pub(super) fn start(
        name: &str,
        leaked: &Arc<AtomicU64>,
        events: Sender<Event>,
        build: impl FnOnce() -> Result<Pipeline, String> + Send + 'static,
    ) -> std::io::Result<Self> {
        let (wanted, unwanted) = bounded::<()>(0);
        let (done, gone) = bounded(1);
        let settled = Arc::new(AtomicBool::new(false));
        let keeper = Self {
            wanted: Some(wanted),
            gone,
            settled: Arc::clone(&settled),
            leaked: Arc::clone(leaked),
        };
        let leaked = Arc::clone(leaked);
        std::thread::Builder::new().name(format!("pipe-{name}")).spawn(move || {
            match build() {
                Ok(pipeline) => {
                    pipeline.play();
                    // Disconnected = let go.
                    let _ = unwanted.recv();
                    pipeline.dismantle();
                }
                Err(why) => drop(events.try_send(Event::Unusable(why))),
            }
            if settled.swap(true, Ordering::AcqRel) {
                leaked.fetch_sub(1, Ordering::AcqRel);
            }
            let _ = done.try_send(());
        })?;
        Ok(keeper)
    }

    /// Has the pipeline taken down.
    pub(super) fn let_go(&mut self) {
        self.wanted = None;
    }

    /// Waits for it, but not longer.
    pub(super) fn wait(mut self, give_up_at: Instant) {
        self.let_go();
        if self.gone.recv_deadline(give_up_at).is_ok() {
            return;
        }
        // Counted first: the thread may be done, and count back, in between.
        self.leaked.fetch_add(1, Ordering::AcqRel);
        if self.settled.swap(true, Ordering::AcqRel) {
            self.leaked.fetch_sub(1, Ordering::AcqRel);
        }
    }
}
