//! Home Assistant finds the box and its cameras by itself: MQTT discovery, on where
//! `[homeassistant] discovery_prefix` is set.
//!
//! `discovery` describes the entities, `update` the state of the one that installs models; both are
//! pure. Here stands when they are told: retained, so with each connection, and once more when Home
//! Assistant says that it has started.

mod discovery;
pub mod update;

use std::collections::BTreeMap;
use std::sync::Arc;

use tracing::info;

use crate::app::to_json;
use crate::config::{self, Config};
use crate::model::slot::Live;
use crate::mqtt::board::Board;
use crate::mqtt::link::Inbound;
use crate::mqtt::topics::Topics;
use discovery::{Components, Home};

/// Where Home Assistant says that it has started, under its prefix.
pub fn birth_topic(discovery_prefix: &str) -> String {
    format!("{discovery_prefix}/status")
}

/// What Home Assistant was told. Owned by the main thread.
pub struct HomeAssistant {
    prefix: String,
    home: Home,
    /// What the descriptions were made from: the epoch of the model, the cameras.
    made_from: Option<(Option<u64>, Vec<config::Camera>)>,
    /// By camera id.
    told: BTreeMap<String, Components>,
}

impl HomeAssistant {
    /// `None` = it is not wanted.
    pub fn new(config: &Config, topics: &Topics) -> Option<Self> {
        let prefix = config.homeassistant.discovery_prefix.clone()?;
        let home = Home { device: config.device.id.clone(), topics: topics.clone() };
        Some(Self { prefix, home, made_from: None, told: BTreeMap::new() })
    }

    /// Describes the box and its cameras, if something has changed.
    pub fn tell<'c>(
        &mut self,
        cameras: impl Iterator<Item = &'c config::Camera>,
        live: Option<&Live>,
        board: &Board,
    ) {
        let made_from = (live.map(|live| live.epoch), cameras.cloned().collect::<Vec<_>>());
        if self.made_from.as_ref() == Some(&made_from) {
            return;
        }
        board.set(&self.topic(None), to_json(&self.home.describe_box()));
        for camera in &made_from.1 {
            let labels = live.map_or(&[][..], |live| &live.model.contract().labels);
            let now = self.home.components(camera, labels);
            // A component that is only left out would stay.
            let before = self.told.get(&camera.id);
            let gone = before.into_iter().flatten().filter(|(key, _)| !now.contains_key(*key));
            let gone: Components =
                gone.map(|(key, what)| (key.clone(), discovery::removed(what))).collect();
            let described = self.home.describe_camera(camera, now.iter().chain(&gone));
            board.set(&self.topic(Some(&camera.id)), to_json(&described));
            self.told.insert(camera.id.clone(), now.into_iter().chain(gone).collect());
        }
        self.made_from = Some(made_from);
    }

    /// The camera is no more: Home Assistant removes it as well.
    pub fn forget(&mut self, camera: &str, board: &Board) {
        self.told.remove(camera);
        self.made_from = None;
        board.set(&self.topic(Some(camera)), Vec::new());
    }

    /// Whether the message is Home Assistant's; tells it all once more if it has just started.
    pub fn hears(&self, message: &Inbound, board: &Board) -> bool {
        if message.topic != birth_topic(&self.prefix) {
            return false;
        }
        if message.payload == b"online" {
            info!("Home Assistant has started: it is told of the cameras");
            board.repeat(&format!("{}/device/", self.prefix));
        }
        true
    }

    /// Of the box, or of one of its cameras.
    fn topic(&self, camera: Option<&str>) -> Arc<str> {
        let node = format!("{}/device/noblink_{}", self.prefix, self.home.device);
        match camera {
            Some(camera) => format!("{node}/{camera}/config").into(),
            None => format!("{node}/config").into(),
        }
    }
}
