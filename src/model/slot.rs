//! Where the running model is found. The only file that names `arc_swap`.
//!
//! The worker loads the slot once per frame; everything that it needs of the model for that frame
//! comes from that one `Arc`. The update thread swaps. Neither ever waits for the other.

use std::sync::{Arc, OnceLock};

use arc_swap::ArcSwapOption;

use super::engine::Model;

/// A model in its slot.
#[derive(Debug)]
pub struct Live {
    /// What runs.
    pub model: Arc<Model>,
    /// Counts the swaps since the store was made; stands in every event.
    pub epoch: u64,
    /// On probation: the model before, still warm. It takes over at the very frame on which this
    /// one fails.
    pub fallback: Option<Arc<Live>>,
    failure: OnceLock<String>,
}

impl Live {
    /// A model that is about to run.
    pub fn new(model: Arc<Model>, epoch: u64, fallback: Option<Arc<Live>>) -> Arc<Self> {
        Arc::new(Self { model, epoch, fallback, failure: OnceLock::new() })
    }

    /// Ends the probation: from now on the fallback is what runs. The first reason stays.
    pub fn fail(&self, why: String) {
        let _ = self.failure.set(why);
    }

    /// Why it failed its probation, if it did.
    pub fn failure(&self) -> Option<&str> {
        self.failure.get().map(String::as_str)
    }
}

/// One place for one running model.
#[derive(Debug, Default)]
pub struct Slot(ArcSwapOption<Live>);

impl Slot {
    /// The model of the next frame; `None` while there is none. A model that failed its probation
    /// is passed over at once, before the update thread has taken it out.
    pub fn load(&self) -> Option<Arc<Live>> {
        let live = self.0.load_full()?;
        match &live.fallback {
            Some(fallback) if live.failure().is_some() => Some(Arc::clone(fallback)),
            _ => Some(live),
        }
    }

    /// Puts `live` in and returns what was there. The caller keeps that until the worker has
    /// reported the new epoch: whoever drops the last `Arc` pays for tearing the session down.
    pub fn swap(&self, live: Option<Arc<Live>>) -> Option<Arc<Live>> {
        self.0.swap(live)
    }
}
