//! Messages that come in, each to whoever serves it: the cameras' commands, and what is not said to
//! this device alone, to the main thread; all else to the update thread. Each has a channel of its own, so that one that is slow takes nothing
//! from the other.

use crossbeam_channel::{Receiver, Sender, bounded};

use super::topics::Topics;

/// Messages that wait for the update thread.
const INBOUND_MAX: usize = 256;
/// Commands that wait for the main thread.
const FOR_CAMERAS_MAX: usize = 64;

/// A message that came in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Inbound {
    /// Its topic.
    pub topic: String,
    /// Its payload.
    pub payload: Vec<u8>,
    /// Whether the broker had kept it.
    pub retained: bool,
    /// Where the sender wants its answer.
    pub response_topic: Option<String>,
    /// What the sender wants to find in its answer.
    pub correlation: Option<Vec<u8>>,
}

/// Where the link puts what comes in.
pub(super) struct Sorter {
    topics: Topics,
    inbound: Sender<Inbound>,
    for_cameras: Sender<Inbound>,
}

impl Sorter {
    /// With the ends for the update thread and for the cameras.
    pub(super) fn new(topics: &Topics) -> (Self, Receiver<Inbound>, Receiver<Inbound>) {
        let (inbound, to_updates) = bounded(INBOUND_MAX);
        let (for_cameras, to_cameras) = bounded(FOR_CAMERAS_MAX);
        (Self { topics: topics.clone(), inbound, for_cameras }, to_updates, to_cameras)
    }

    /// Whether there was room for it.
    pub(super) fn sort(&self, message: Inbound) -> bool {
        let is_ours = message.topic.starts_with(self.topics.root());
        let to = match self.topics.parse_camera_command(&message.topic) {
            None if is_ours => &self.inbound,
            _ => &self.for_cameras,
        };
        to.try_send(message).is_ok()
    }
}
