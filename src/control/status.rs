//! What the service tells about itself over the control socket: the state that it publishes, which
//! follows the snapshots, and the link of this instant.

use std::sync::Arc;

use serde_json::{Map, Value, json};

use crate::mqtt::board::Board;
use crate::mqtt::link::LinkHandle;
use crate::mqtt::topics::Topics;

/// Where it is looked up.
#[derive(Clone)]
pub struct Reporter {
    board: Arc<Board>,
    topics: Topics,
    link: LinkHandle,
}

impl Reporter {
    /// Of the service that publishes on this board, under these topics, over this link.
    pub fn new(board: Arc<Board>, topics: Topics, link: LinkHandle) -> Self {
        Self { board, topics, link }
    }

    /// `status`, `models` and `cameras` as on the topics of these names, `link`, and under `advice`
    /// what to do next.
    pub fn report(&self) -> Value {
        let told = |topic: &str| {
            let payload = self.board.retained(topic)?;
            serde_json::from_slice::<Value>(&payload).ok()
        };
        let status = told(&self.topics.status()).unwrap_or_default();
        let none = Map::new();
        let ids = status["cameras"].as_object().unwrap_or(&none).keys();
        let cameras: Map<String, Value> = ids
            .map(|id| (id.clone(), told(&self.topics.camera_status(id)).unwrap_or_default()))
            .collect();
        let advice: Vec<&str> = status["advice"].as_str().unwrap_or_default().lines().collect();
        json!({
            "status": status,
            "cameras": cameras,
            "models": told(&self.topics.models_state()),
            "link": self.link.status(),
            "advice": advice,
        })
    }
}
