//! What is published but not queued: the current state, and telemetry.
//!
//! A retained message stands here by its topic, the latest only; it is published when it changes,
//! and with all the others after each connection, because a broker may have lost them. Telemetry
//! and pictures go out once, or not at all: they are worth nothing late.
//!
//! Filled by any thread, emptied by the link. Its size is the number of topics its callers use.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard};

use tokio::sync::Notify;

use crate::web::feed::Feed;

/// A topic and what goes there.
pub type Notice = (Arc<str>, Arc<[u8]>);

/// A JPEG file, and the event that it shows.
pub struct Picture {
    /// The file.
    pub jpeg: Vec<u8>,
    /// `<boot>-<seq>` of the record.
    pub event: String,
}

#[derive(Default)]
struct State {
    retained: BTreeMap<Arc<str>, Arc<[u8]>>,
    /// Topics whose latest payload this connection has not carried.
    changed: BTreeSet<Arc<str>>,
    telemetry: BTreeMap<Arc<str>, Arc<[u8]>>,
    pictures: BTreeMap<Arc<str>, Picture>,
    online: bool,
}

/// The retained state and the telemetry of this device.
#[derive(Default)]
pub struct Board {
    state: Mutex<State>,
    bell: Notify,
    /// The page hears the same.
    feed: Option<(Arc<Feed>, String)>,
}

impl Board {
    /// An empty board.
    pub fn new() -> Self {
        Self::default()
    }

    /// One whose messages below `root` go to `feed` as well, under their topics without it.
    pub fn with_feed(feed: Arc<Feed>, root: &str) -> Self {
        Self { feed: Some((feed, format!("{root}/"))), ..Self::default() }
    }

    /// Tells the page alone of something that goes to the broker another way.
    pub fn mention(&self, topic: &str, payload: &[u8]) {
        if let Some((feed, root)) = &self.feed
            && let Some(topic) = topic.strip_prefix(root)
        {
            feed.put(topic, payload);
        }
    }

    /// States what is retained at `topic`. The same again is not published again.
    pub fn set(&self, topic: &Arc<str>, payload: Vec<u8>) {
        let mut state = self.state();
        if state.retained.get(topic).is_some_and(|old| **old == *payload) {
            return;
        }
        self.mention(topic, &payload);
        state.retained.insert(Arc::clone(topic), payload.into());
        if state.online {
            state.changed.insert(Arc::clone(topic));
            drop(state);
            self.bell.notify_one();
        }
    }

    /// Says something once, at QoS 0; without a connection it is forgotten.
    pub fn tell(&self, topic: &Arc<str>, payload: Vec<u8>) {
        self.mention(topic, &payload);
        let mut state = self.state();
        if state.online {
            state.telemetry.insert(Arc::clone(topic), payload.into());
            drop(state);
            self.bell.notify_one();
        }
    }

    /// Shows a picture once, at QoS 1; without a connection it is forgotten. The latest of a topic.
    pub fn show(&self, topic: &Arc<str>, picture: Picture) {
        let mut state = self.state();
        if state.online {
            state.pictures.insert(Arc::clone(topic), picture);
            drop(state);
            self.bell.notify_one();
        }
    }

    /// A connection stands: everything retained is to be published on it.
    pub fn online(&self) {
        let mut state = self.state();
        state.online = true;
        state.changed = state.retained.keys().cloned().collect();
    }

    /// The connection is gone.
    pub fn offline(&self) {
        let mut state = self.state();
        state.online = false;
        state.changed.clear();
        state.telemetry.clear();
        state.pictures.clear();
    }

    /// Publishes `topic` once more: the broker could not take it just now.
    pub fn again(&self, topic: &Arc<str>) {
        let mut state = self.state();
        if state.online && state.retained.contains_key(topic) {
            state.changed.insert(Arc::clone(topic));
        }
    }

    /// Publishes all topics that start so once more.
    pub fn repeat(&self, start: &str) {
        let mut state = self.state();
        if state.online {
            let topics = state.retained.keys().filter(|topic| topic.starts_with(start));
            let topics: Vec<_> = topics.cloned().collect();
            state.changed.extend(topics);
            drop(state);
            self.bell.notify_one();
        }
    }

    /// What is retained at `topic`.
    pub fn retained(&self, topic: &str) -> Option<Arc<[u8]>> {
        self.state().retained.get(topic).cloned()
    }

    /// The next retained message to publish.
    pub fn next_retained(&self) -> Option<Notice> {
        let mut state = self.state();
        let topic = state.changed.pop_first()?;
        let payload = Arc::clone(state.retained.get(&topic)?);
        Some((topic, payload))
    }

    /// The next telemetry to publish.
    pub fn next_telemetry(&self) -> Option<Notice> {
        self.state().telemetry.pop_first()
    }

    /// The next picture to publish.
    pub fn next_picture(&self) -> Option<(Arc<str>, Picture)> {
        self.state().pictures.pop_first()
    }

    /// Whether this connection has carried all that is retained.
    pub fn is_settled(&self) -> bool {
        self.state().changed.is_empty()
    }

    /// Resolves when something came since it last did. For the link alone.
    pub async fn rung(&self) {
        self.bell.notified().await;
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("nothing panics while it holds the board")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_hears_of_this_device_alone() {
        let feed = Arc::new(Feed::default());
        let board = Board::with_feed(Arc::clone(&feed), "noblink/v1/edge-1");
        board.set(&"noblink/v1/edge-1/status".into(), b"1".to_vec());
        board.set(&"homeassistant/device/noblink_edge-1/config".into(), b"2".to_vec());
        let topics: Vec<_> = feed.watch().0.iter().map(|e| e.topic.to_string()).collect();
        assert_eq!(topics, ["status"]);
    }
}
