//! Where the running model is found. The only file that names `arc_swap`.
//!
//! The worker loads the slot once per frame; everything that it needs of the model for that frame
//! comes from that one `Arc`. The update thread swaps. Neither ever waits for the other.

use std::sync::Arc;

use arc_swap::ArcSwapOption;

use super::engine::Model;

/// A model in its slot.
#[derive(Debug)]
pub struct Live {
    /// What runs.
    pub model: Arc<Model>,
    /// Counts the swaps since the store was made; stands in every event.
    pub epoch: u64,
}

/// One place for one running model.
#[derive(Debug, Default)]
pub struct Slot(ArcSwapOption<Live>);

impl Slot {
    /// The model of the next frame; `None` while there is none.
    pub fn load(&self) -> Option<Arc<Live>> {
        self.0.load_full()
    }

    /// Puts `live` in and returns what was there. The caller keeps that until the worker has
    /// reported the new epoch: whoever drops the last `Arc` pays for tearing the session down.
    pub fn swap(&self, live: Option<Arc<Live>>) -> Option<Arc<Live>> {
        self.0.swap(live)
    }
}
