//! What comes in from outside and what is answered, whatever the way: MQTT, the control socket.

use serde_json::{Value, json};

use super::event::Answer;
use super::job::{Install, Ratio, Way};
use super::store::Blob;
use crate::mqtt::topics::Topics;

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
            "{topic}: a retained command is ignored: it would come again with every \
                            connection; publish it without retain"
        );
        return Some(Err(text));
    }
    Some(verb_order(verb, payload).map_err(|why| format!("{topic}: {why}")))
}

fn verb_order(verb: &str, payload: &[u8]) -> Result<Order, String> {
    let message: Value = serde_json::from_slice(payload).map_err(|e| format!("is no JSON: {e}"))?;
    let text = |key: &str| message[key].as_str().map(str::to_owned);
    let id = text("id")
        .filter(|id| super::manifest::is_id(id))
        .ok_or_else(|| format!("id = {}: must be 1 to 32 of a-z, 0-9, _ and -", message["id"]))?;
    match verb {
        "rollback" => Ok(Order::Rollback { id, to: text("sha256") }),
        "cancel" => Ok(Order::Cancel { id, job: text("job") }),
        "confirm" => Ok(Order::Confirm { id, job: text("job") }),
        _ => Err(format!("{verb} is not desired, rollback, cancel or confirm")),
    }
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
