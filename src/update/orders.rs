//! What comes in from outside and what is answered, whatever the way: MQTT, the control socket.

use serde_json::{Value, json};

use super::event::Answer;
use super::job::{Install, Ratio, Way};
use super::json::{self, Fields};
use super::manifest::BYTES_MAX;
use super::store::Blob;
use crate::mqtt::topics::Topics;
use crate::text::brief;

/// Characters of a topic in a message.
const TOPIC_SHOWN: usize = 160;

/// A wish of somebody.
#[derive(Debug, Clone, PartialEq)]
pub enum Order {
    /// A desired model: the payload of `cmd/models/desired`.
    Desired(Vec<u8>),
    /// A file that is in the store already.
    Stored {
        /// The command's id.
        id: String,
        /// The file's name.
        name: String,
        /// Its bytes.
        blob: Blob,
        /// Automatic or by confirmation.
        install: Install,
        /// The bytes of its manifest.
        manifest: Option<Vec<u8>>,
        /// The minisign text over them.
        signature: Option<String>,
        /// `--accept-slower`
        accept_slower: Option<Ratio>,
    },
    /// Go back; to the previous model when none is named.
    Rollback {
        /// The command's id.
        id: String,
        /// A digest, or its beginning.
        to: Option<String>,
    },
    /// Stop a job that has not touched the slot.
    Cancel {
        /// The command's id.
        id: String,
        /// The job.
        job: Option<String>,
    },
    /// Let a job that waits go on.
    Confirm {
        /// The command's id.
        id: String,
        /// The job.
        job: Option<String>,
    },
    /// Let a way in install by itself again.
    CloseBreaker {
        /// The command's id.
        id: String,
        /// The way.
        way: Way,
    },
    /// Take a model out of quarantine.
    Release {
        /// The command's id.
        id: String,
        /// A digest, or its beginning.
        model: String,
    },
}

/// Reads a message on `cmd/models/…`. `None`: the topic is none of ours. `Err`: it is, and what is
/// wrong with the message.
pub fn read(
    topics: &Topics,
    topic: &str,
    payload: &[u8],
    retained: bool,
) -> Option<Result<Order, String>> {
    let verb = topic.strip_prefix(topics.root())?.strip_prefix("/cmd/models/")?;
    if verb == "desired" {
        // An empty one clears a retained wish: no opinion.
        return (!payload.is_empty()).then(|| Ok(Order::Desired(payload.to_vec())));
    }
    if retained {
        let text = format!(
            "{}: a retained command is ignored: it would come again with every connection; \
             publish it without retain",
            brief(topic, TOPIC_SHOWN)
        );
        return Some(Err(text));
    }
    Some(verb_order(verb, payload).map_err(|why| format!("{}: {why}", brief(topic, TOPIC_SHOWN))))
}

fn verb_order(verb: &str, payload: &[u8]) -> Result<Order, String> {
    let map = json::object(payload, BYTES_MAX)?;
    let mut f = Fields::new(&map);
    let Some(order) = common(verb, "sha256", &mut f) else {
        let verb = brief(verb, 60);
        return Err(format!("{verb} is not desired, rollback, cancel or confirm"));
    };
    f.wrong.map_or(Ok(order), Err)
}

/// Reads a command of the control socket, which knows some more. `Err`: what is wrong with it.
///
/// # Errors
/// There is no such command, or it lacks what it needs.
pub fn local(verb: &str, body: &[u8]) -> Result<Order, String> {
    let map = json::object(body, BYTES_MAX)?;
    let mut f = Fields::new(&map);
    let order = match verb {
        "close-breaker" => {
            let id = id(&mut f);
            let named = |v: &Value| Way::ALL.into_iter().find(|w| v.as_str() == Some(w.name()));
            let way = f.get("way", "inbox, mqtt, cli or page", named);
            let way = way.or_else(|| f.lacks("way"));
            way.map(|way| Order::CloseBreaker { id, way })
        }
        "release" => {
            let id = id(&mut f);
            let model = f.text("model", 64).or_else(|| f.lacks("model"));
            model.map(|model| Order::Release { id, model })
        }
        _ => common(verb, "to", &mut f),
    };
    match (f.wrong, order) {
        (None, Some(order)) => Ok(order),
        (Some(wrong), _) => Err(wrong),
        (None, None) => {
            let verb = brief(verb, 60);
            Err(format!("{verb} is not rollback, cancel, confirm, close-breaker or release"))
        }
    }
}

/// The commands that every way knows; `to` is the field in which a rollback names its target.
fn common(verb: &str, to: &'static str, f: &mut Fields<'_>) -> Option<Order> {
    match verb {
        "rollback" => Some(Order::Rollback { id: id(f), to: f.text(to, 64) }),
        "cancel" => Some(Order::Cancel { id: id(f), job: f.id("job") }),
        "confirm" => Some(Order::Confirm { id: id(f), job: f.id("job") }),
        _ => None,
    }
}

/// The command's id; empty when there is none, which is noted as wrong.
fn id(f: &mut Fields<'_>) -> String {
    f.id("id").or_else(|| f.lacks("id")).unwrap_or_default()
}

/// An answer as it goes over the wire, `noblink.reply/1`.
pub fn reply(id: &str, answer: &Answer) -> Value {
    let (ok, result) = match answer {
        Answer::Accepted { serial } => (true, json!({ "result": "accepted", "serial": serial })),
        Answer::Same { serial, state, phase } => {
            (true, json!({ "result": "same", "serial": serial, "state": state, "phase": phase }))
        }
        Answer::Ended { serial, state, reason } => (
            reason.is_none(),
            json!({ "result": "ended", "serial": serial, "state": state, "reason": reason }),
        ),
        Answer::Done => (true, json!({ "result": "done" })),
        Answer::Refused(reason) => (false, json!({ "result": "refused", "reason": reason })),
    };
    let mut reply = json!({ "schema": "noblink.reply/1", "id": id, "ok": ok });
    let fields = result.as_object().cloned().unwrap_or_default();
    reply.as_object_mut().expect("it was made as one").extend(fields);
    reply
}
