//! The names of the topics: everything under `{prefix}/v1/{device}`.
//!
//! Pure. Prefix and ids were checked with the configuration, so that no level here holds a
//! wildcard, and the deepest topic keeps within the seven slashes that AWS IoT Core allows.

use std::sync::Arc;

use crate::config::is_slug;

/// Builds the topics of one device.
#[derive(Debug, Clone)]
pub struct Topics {
    root: Arc<str>,
}

impl Topics {
    /// The topics of `device` under `prefix`.
    pub fn new(prefix: &str, device: &str) -> Self {
        Self { root: format!("{prefix}/v1/{device}").into() }
    }

    /// What all of them start with, without a trailing slash.
    pub fn root(&self) -> &str {
        &self.root
    }

    /// `online` or `offline`, retained; the will of the connection.
    pub fn availability(&self) -> Arc<str> {
        self.under("availability")
    }

    /// The device, retained.
    pub fn status(&self) -> Arc<str> {
        self.under("status")
    }

    /// Counters and latencies, every ten seconds.
    pub fn telemetry(&self) -> Arc<str> {
        self.under("telemetry")
    }

    /// A camera's state, retained.
    pub fn camera_status(&self, camera: &str) -> Arc<str> {
        self.under(&format!("cameras/{camera}/status"))
    }

    /// A camera's detections, by way of the outbox.
    pub fn detections(&self, camera: &str) -> Arc<str> {
        self.under(&format!("cameras/{camera}/detections"))
    }

    /// What a camera sees now, by label, retained.
    pub fn counts(&self, camera: &str) -> Arc<str> {
        self.under(&format!("cameras/{camera}/counts"))
    }

    /// Pictures of a camera's events.
    pub fn snapshot(&self, camera: &str) -> Arc<str> {
        self.under(&format!("cameras/{camera}/snapshot"))
    }

    /// Ranges of a camera's `seq` that were lost on the way.
    pub fn gaps(&self, camera: &str) -> Arc<str> {
        self.under(&format!("cameras/{camera}/gaps"))
    }

    /// The desired model, retained; to the device.
    pub fn desired(&self) -> Arc<str> {
        self.under("cmd/models/desired")
    }

    /// What runs, what ran before and the job in progress, retained.
    pub fn models_state(&self) -> Arc<str> {
        self.under("models/state")
    }

    /// Each change of a job.
    pub fn models_job(&self, job: &str) -> Arc<str> {
        self.under(&format!("models/jobs/{job}"))
    }

    /// Reports on swaps.
    pub fn swaps(&self) -> Arc<str> {
        self.under("models/swaps")
    }

    /// The state of Home Assistant's update entity, retained.
    pub fn models_homeassistant(&self) -> Arc<str> {
        self.under("models/homeassistant")
    }

    /// A command about models; to the device.
    pub fn models_command(&self, verb: &str) -> Arc<str> {
        self.under(&format!("cmd/models/{verb}"))
    }

    /// A command about a camera; to the device.
    pub fn camera_command(&self, camera: &str, verb: &str) -> Arc<str> {
        self.under(&format!("cmd/cameras/{camera}/{verb}"))
    }

    /// All commands.
    pub fn commands(&self) -> Arc<str> {
        self.under("cmd/#")
    }

    /// Camera and verb of a command's topic, `cmd/cameras/<id>/<verb>`; none for other topics.
    pub fn parse_camera_command<'t>(&self, topic: &'t str) -> Option<(&'t str, &'t str)> {
        let rest = topic.strip_prefix(&*self.root)?.strip_prefix("/cmd/cameras/")?;
        Some(rest.split_once('/').unwrap_or((rest, "")))
    }

    /// The command's id in a topic for answers, `reply/<id>`; none for other topics.
    pub fn parse_reply<'t>(&self, topic: &'t str) -> Option<&'t str> {
        let id = topic.strip_prefix(&*self.root)?.strip_prefix("/reply/")?;
        is_slug(id).then_some(id)
    }

    /// The answer to a command.
    pub fn reply(&self, command: &str) -> Arc<str> {
        self.under(&format!("reply/{command}"))
    }

    /// Where the device asks for chunks of a model; `digest8` are the first 8 digits of its digest.
    pub fn xfer_want(&self, digest8: &str) -> Arc<str> {
        self.under(&format!("xfer/{digest8}/want"))
    }

    /// Where it gets one.
    pub fn xfer_chunk(&self, digest8: &str, index: u32) -> Arc<str> {
        self.under(&format!("xfer/{digest8}/chunk/{index}"))
    }

    /// The filter of all chunks.
    pub fn xfer_filter(&self) -> Arc<str> {
        self.under("xfer/+/chunk/+")
    }

    /// The first digits of the digest and the index of a chunk's topic; none for other topics.
    pub fn parse_chunk<'t>(&self, topic: &'t str) -> Option<(&'t str, u32)> {
        let rest = topic.strip_prefix(&*self.root)?.strip_prefix("/xfer/")?;
        let (digest8, index) = rest.split_once("/chunk/")?;
        let digits = |s: &str| !s.is_empty() && s.bytes().all(|b| b.is_ascii_digit());
        let is_digest = digest8.len() == 8 && digest8.bytes().all(|b| b.is_ascii_hexdigit());
        // `parse` alone would take "+7".
        (is_digest && digits(index)).then(|| Some((digest8, index.parse().ok()?)))?
    }

    fn under(&self, rest: &str) -> Arc<str> {
        format!("{}/{rest}", self.root).into()
    }
}
