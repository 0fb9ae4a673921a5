//! What the page is told, and what it must know that comes later: the messages that go out over
//! MQTT, under their topics without the device's root, as they are described in `schemas/`. Beside
//! them `tick`, once a second while someone looks, and `log`.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard};

use tokio::sync::broadcast;

/// Messages that a slow viewer may lag behind; beyond, it starts anew.
const LAG_MAX: usize = 512;

/// A message and what it is about.
#[derive(Debug, Clone)]
pub struct Event {
    /// `cameras/gate/status`, `models/swaps`, `tick`, …
    pub topic: Arc<str>,
    /// JSON.
    pub payload: Arc<[u8]>,
}

/// The latest of what is retained, the last of what is not.
pub struct Feed {
    state: Mutex<State>,
    live: broadcast::Sender<Event>,
}

#[derive(Default)]
struct State {
    retained: BTreeMap<Arc<str>, Arc<[u8]>>,
    recent: BTreeMap<&'static str, VecDeque<Event>>,
}

/// How a topic's messages are kept.
enum Keep {
    /// The latest.
    Latest,
    /// So many, together with others of this name.
    Last(&'static str, usize),
    /// Nobody needs it later.
    Nothing,
}

impl Keep {
    fn of(topic: &str) -> Self {
        match topic {
            // An hour.
            "telemetry" => Self::Last("telemetry", 360),
            "models/swaps" => Self::Last("swaps", 50),
            "log" => Self::Last("log", 300),
            "tick" => Self::Nothing,
            job if job.starts_with("models/jobs/") => Self::Nothing,
            wish if wish.starts_with("xfer/") => Self::Nothing,
            _ => Self::Latest,
        }
    }
}

impl Default for Feed {
    fn default() -> Self {
        Self { state: Mutex::default(), live: broadcast::Sender::new(LAG_MAX) }
    }
}

impl Feed {
    /// Tells whoever looks, and remembers. An empty payload takes what was retained away.
    pub fn put(&self, topic: impl Into<Arc<str>>, payload: impl Into<Arc<[u8]>>) {
        let event = Event { topic: topic.into(), payload: payload.into() };
        let mut state = self.state();
        match Keep::of(&event.topic) {
            Keep::Latest if event.payload.is_empty() => drop(state.retained.remove(&event.topic)),
            Keep::Latest => {
                state.retained.insert(Arc::clone(&event.topic), Arc::clone(&event.payload));
            }
            Keep::Last(name, most) => {
                let recent = state.recent.entry(name).or_default();
                if recent.len() == most {
                    recent.pop_front();
                }
                recent.push_back(event.clone());
            }
            Keep::Nothing => {}
        }
        // Under the lock, so that nobody who joins misses it or hears it twice.
        let _ = self.live.send(event);
    }

    /// Whether anyone looks.
    pub fn is_watched(&self) -> bool {
        self.live.receiver_count() > 0
    }

    /// What there is to know so far, and all that comes.
    pub fn watch(&self) -> (Vec<Event>, broadcast::Receiver<Event>) {
        let state = self.state();
        let latest = state.retained.iter().map(|(topic, payload)| Event {
            topic: Arc::clone(topic),
            payload: Arc::clone(payload),
        });
        let known = latest.chain(state.recent.values().flatten().cloned()).collect();
        (known, self.live.subscribe())
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("nothing panics while it holds the feed")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(events: &[Event]) -> Vec<(&str, &str)> {
        let text =
            |e: &'_ Event| std::str::from_utf8(&e.payload).unwrap().to_owned().leak() as &str;
        events.iter().map(|e| (&*e.topic, text(e))).collect()
    }

    #[test]
    fn who_comes_later_hears_the_latest_state_and_the_last_reports() {
        let feed = Feed::default();
        let put = |topic: &str, payload: &str| feed.put(topic, payload.as_bytes().to_vec());
        put("status", "1");
        put("status", "2");
        put("models/swaps", "a");
        put("models/swaps", "b");
        put("tick", "gone");
        put("cameras/gate/status", "up");
        put("cameras/gate/status", "");
        assert!(!feed.is_watched());
        let (known, mut live) = feed.watch();
        assert_eq!(told(&known), [("status", "2"), ("models/swaps", "a"), ("models/swaps", "b")]);
        put("tick", "3");
        assert_eq!(&*live.try_recv().unwrap().payload, b"3");
        assert!(feed.is_watched());
    }
}
