//! The one picture of the whole that everything which reports is made from: telemetry, status,
//! camera status, the log's lines. Taken once a second by the main thread.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::camera::CameraStatus;
use crate::host::{self, Host};
use crate::meter::{CameraWindow, Meter, Window};
use crate::model::slot::Live;
use crate::mqtt::outbox;
use crate::mqtt::status::LinkStatus;
use crate::queue::LaneSnapshot;
use crate::records::{CameraTelemetry, Telemetry, WorkerTelemetry, rfc3339, rounded};
use crate::worker::Origin;

/// The whole at one instant. Each camera's ledger is exact.
#[derive(Clone)]
pub struct Snapshot {
    /// Microseconds since 1970.
    pub time_us: i64,
    /// In the order of the configuration; then those that it has no more, until a telemetry record
    /// has held their end.
    pub cameras: Vec<CameraSnapshot>,
    /// The model that runs.
    pub live: Option<Arc<Live>>,
    /// The link to the broker.
    pub link: LinkStatus,
    /// Records on their way.
    pub outbox: outbox::Stats,
}

/// One camera at that instant.
#[derive(Clone)]
pub struct CameraSnapshot {
    /// Its id.
    pub id: String,
    /// Where its pictures come from, credentials masked.
    pub source: String,
    /// State, stream, reason.
    pub status: CameraStatus,
    /// Its counters.
    pub lane: LaneSnapshot,
}

/// Turns snapshots into telemetry: keeps what the window began with.
pub struct Telemeter {
    began: Instant,
    cpu_s: f64,
    /// By lane.
    offered: Vec<u64>,
}

/// How often telemetry goes out.
pub const TELEMETRY_INTERVAL: Duration = Duration::from_secs(10);

impl Default for Telemeter {
    fn default() -> Self {
        Self { began: Instant::now(), cpu_s: host::cpu_seconds(), offered: Vec::new() }
    }
}

impl Telemeter {
    /// Whether the window is long enough.
    pub fn is_due(&self) -> bool {
        self.began.elapsed() >= TELEMETRY_INTERVAL
    }

    /// Ends the window with this snapshot.
    pub fn take(&mut self, origin: &Origin, snapshot: &Snapshot, meter: &Meter) -> Telemetry {
        let window_s = self.began.elapsed().as_secs_f64();
        let window = meter.take_window();
        let host = Host::read(self.cpu_s, window_s);
        let mut cameras = BTreeMap::new();
        self.offered.resize(window.cameras.len(), 0);
        for camera in &snapshot.cameras {
            let (ledger, index) = (camera.lane.ledger, camera.lane.index);
            let (measured, before) = (&window.cameras[index], &mut self.offered[index]);
            let offered = ledger.offered - std::mem::replace(before, ledger.offered);
            cameras.insert(camera.id.clone(), telemetry_of(camera, measured, offered, window_s));
        }
        self.began = Instant::now();
        self.cpu_s = host::cpu_seconds();
        let Window { busy, stages, last_failure, .. } = window;
        Telemetry {
            schema: "noblink.telemetry/1",
            device: origin.device.clone(),
            boot: origin.boot.clone(),
            time: rfc3339(snapshot.time_us),
            time_us: snapshot.time_us,
            interval_s: rounded(window_s, 3),
            cameras,
            worker: WorkerTelemetry { busy, stages_ms: stages, last_failure },
            mqtt: snapshot.link.clone(),
            outbox: snapshot.outbox.clone(),
            host,
        }
    }
}

fn telemetry_of(
    camera: &CameraSnapshot,
    measured: &CameraWindow,
    offered: u64,
    window_s: f64,
) -> CameraTelemetry {
    CameraTelemetry {
        state: camera.status.state.name(),
        ledger: camera.lane.ledger,
        overloaded: camera.lane.overloaded,
        offered_fps: rounded(offered as f64 / window_s, 2),
        inferred_fps: rounded(measured.frames as f64 / window_s, 2),
        records: measured.records,
        objects: measured.objects,
        latency_ms: measured.latency,
    }
}
