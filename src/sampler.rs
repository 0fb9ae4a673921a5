//! A few live frames for whoever asks. The worker lends references and copies nothing; whoever
//! asked copies on a thread of its own.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crossbeam_channel::{Sender, bounded};

use crate::camera::frame::Frame;

/// Decoder buffers that are held at a time; frames beyond are passed over.
const HELD_MAX: usize = 2;

/// A frame, and which camera's it is.
pub struct Sample {
    /// Its id.
    pub camera: Arc<str>,
    /// The frame. Holding it holds the decoder's buffer: keep it short.
    pub frame: Frame,
}

/// Between the worker and one asker at a time.
#[derive(Default)]
pub struct Sampler {
    asked: AtomicBool,
    to: Mutex<Option<Sender<Sample>>>,
}

impl Sampler {
    /// The worker has a frame. Costs an atomic load while nobody asks.
    pub fn offer(&self, camera: &Arc<str>, frame: &Frame) {
        if !self.asked.load(Ordering::Relaxed) {
            return;
        }
        if let Ok(to) = self.to.try_lock()
            && let Some(to) = &*to
            && !to.is_full()
        {
            let _ = to.try_send(Sample { camera: Arc::clone(camera), frame: frame.clone() });
        }
    }

    /// Gives the frames that come to `keep` until it has enough (returns false), `patience` is over
    /// or `cancel` is set. A second asker takes the first one's place.
    pub fn take(
        &self,
        patience: Duration,
        cancel: &AtomicBool,
        mut keep: impl FnMut(Sample) -> bool,
    ) {
        let (to, from) = bounded(HELD_MAX);
        let end = Instant::now() + patience;
        self.lend(Some(to));
        while !cancel.load(Ordering::Relaxed)
            && let Ok(sample) = from.recv_deadline(end)
            && keep(sample)
        {}
        self.lend(None);
    }

    fn lend(&self, to: Option<Sender<Sample>>) {
        self.asked.store(to.is_some(), Ordering::Relaxed);
        *self.to.lock().expect("nothing panics while it holds the sender") = to;
    }
}
