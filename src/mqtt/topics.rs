//! The names of the topics: everything under `{prefix}/v1/{device}`.
//!
//! Pure. Prefix and ids were checked with the configuration, so that no level here holds a
//! wildcard, and the deepest topic keeps within the seven slashes that AWS IoT Core allows.

use std::sync::Arc;

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

    /// Ranges of a camera's `seq` that were lost on the way.
    pub fn gaps(&self, camera: &str) -> Arc<str> {
        self.under(&format!("cameras/{camera}/gaps"))
    }

    fn under(&self, rest: &str) -> Arc<str> {
        format!("{}/{rest}", self.root).into()
    }
}
