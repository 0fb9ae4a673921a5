//! What goes out over MQTT, as the JSON that `schemas/` describes. Pure: no clock, no I/O.
//!
//! Consumers parse these: fields are added, never renamed or removed, within a schema's number.

use std::collections::BTreeMap;

use serde::Serialize;

use crate::camera::CameraStatus;
use crate::camera::frame::Clock;
use crate::host::Host;
use crate::model::file::Identity;
use crate::mqtt::outbox;
use crate::mqtt::status::LinkStatus;
use crate::queue::Ledger;

/// RFC 3339 in UTC with microseconds.
pub fn rfc3339(time_us: i64) -> String {
    match jiff::Timestamp::from_microsecond(time_us) {
        Ok(time) => format!("{time:.6}"),
        // Beyond the year 9999: no clock says that, but a sum of bad numbers might.
        Err(_) => format!("{:.6}", jiff::Timestamp::UNIX_EPOCH),
    }
}

/// `cameras/<id>/detections`: one inferred frame.
#[derive(Debug, Serialize)]
pub struct Detections<'a> {
    /// `noblink.detections/1`
    pub schema: &'static str,
    /// Device id.
    pub device: &'a str,
    /// Camera id.
    pub camera: &'a str,
    /// Changes with each start of the process.
    pub boot: &'a str,
    /// Counts this camera's records from 0 within `boot`: a hole is a loss, a repeat a duplicate.
    pub seq: u64,
    /// Capture time.
    pub time: String,
    /// The same instant, microseconds since 1970: exact in a JavaScript number.
    pub time_us: i64,
    /// Whose clock `time` is.
    pub clock: Clock,
    /// The frame.
    pub frame: FrameInfo,
    /// The model that ran.
    pub model: ModelRef<'a>,
    /// How long the frame was where.
    pub latency_ms: Latency,
    /// What became of the frames since this camera's previous record.
    pub since: Since,
    /// What was found, best score first.
    pub objects: Vec<Object<'a>>,
}

/// The name of the schema of [`Detections`].
pub const DETECTIONS: &str = "noblink.detections/1";

/// The frame that a record is about.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct FrameInfo {
    /// Counts offered frames from 0.
    pub id: u64,
    /// Presentation time in the stream.
    pub pts_ns: Option<u64>,
    /// Pixels.
    pub width: usize,
    /// Pixels.
    pub height: usize,
}

/// The model that ran on a frame.
#[derive(Debug, Serialize)]
pub struct ModelRef<'a> {
    /// Its id, version and digest.
    #[serde(flatten)]
    pub identity: &'a Identity,
    /// Swaps since the store was made.
    pub epoch: u64,
}

/// Milliseconds, with three decimals.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Latency {
    /// From the decoder to the worker.
    pub queue: f64,
    /// Pixels to tensor.
    pub preprocess: f64,
    /// The model's run.
    pub inference: f64,
    /// Raw output to objects.
    pub postprocess: f64,
    /// From the decoder to this record.
    pub total: f64,
}

/// Every frame id between this record and the camera's previous one, accounted for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Since {
    /// Inferred and not published.
    pub empty: u64,
    /// Inference failed.
    pub failed: u64,
    /// Not inferred.
    pub dropped: u64,
}

/// One detected object.
#[derive(Debug, Serialize)]
pub struct Object<'a> {
    /// Index into the model's labels.
    pub class_id: u32,
    /// The label.
    pub label: &'a str,
    /// 0 to 1.
    pub score: f64,
    /// Normalised to the frame, clamped to 0 to 1, origin at the top left.
    #[serde(rename = "box")]
    pub bounds: Bounds,
}

/// Corners, as shares of the frame's width and height.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Bounds {
    /// Left.
    pub x1: f64,
    /// Top.
    pub y1: f64,
    /// Right.
    pub x2: f64,
    /// Bottom.
    pub y2: f64,
}

/// Shortens a number for the wire: 0.9130000472 says no more than 0.913.
pub fn rounded(value: f64, decimals: i32) -> f64 {
    let scale = 10f64.powi(decimals);
    (value * scale).round() / scale
}

/// `status`: what changes rarely.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Status {
    /// `noblink.status/1`
    pub schema: &'static str,
    /// Device id.
    pub device: String,
    /// Changes with each start of the process.
    pub boot: String,
    /// noblink's version.
    pub version: &'static str,
    /// When the process started.
    pub started: String,
    /// The model that runs; null = none, see `advice`.
    pub model: Option<ModelStatus>,
    /// What to do next, when something is to be done.
    pub advice: Option<String>,
    /// Camera id → state.
    pub cameras: BTreeMap<String, &'static str>,
    /// What bounds the records.
    pub limits: Limits,
}

/// The model that runs, as `status` tells it.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ModelStatus {
    /// Its id, version and digest.
    #[serde(flatten)]
    pub identity: Identity,
    /// Swaps since the store was made.
    pub epoch: u64,
    /// In the model's order.
    pub labels: Vec<String>,
    /// Width and height of its input, pixels.
    pub input: [usize; 2],
    /// How its output is laid out.
    pub layout: &'static str,
    /// The execution provider that is really in use.
    pub provider: &'static str,
    /// ONNX Runtime's version.
    pub runtime: String,
    /// Threads of one run.
    pub threads: usize,
    /// Whether its idle threads wait actively.
    pub spinning: bool,
    /// Whether the provider computes with 16-bit floats (bfloat16) inside.
    pub bf16: bool,
    /// Cores that the worker and its session are pinned to.
    pub cores: Vec<usize>,
    /// With `provider = "auto"`: what was measured, and what became of it.
    pub tuning: Option<serde_json::Value>,
}

/// What bounds the records.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Limits {
    /// Objects in a record at most.
    pub objects: usize,
    /// Seconds after which a record comes even without objects.
    pub record_interval_s: u64,
    /// Records that wait for the broker in memory at most; more wait on disk.
    pub outbox_records: usize,
}

/// `telemetry`: what changes all the time.
#[derive(Debug, Clone, Serialize)]
pub struct Telemetry {
    /// `noblink.telemetry/1`
    pub schema: &'static str,
    /// Device id.
    pub device: String,
    /// Changes with each start of the process.
    pub boot: String,
    /// When it was taken.
    pub time: String,
    /// The same instant, microseconds since 1970.
    pub time_us: i64,
    /// Length of the window that rates and quantiles describe.
    pub interval_s: f64,
    /// By camera id.
    pub cameras: BTreeMap<String, CameraTelemetry>,
    /// The worker.
    pub worker: WorkerTelemetry,
    /// The link to the broker.
    pub mqtt: LinkStatus,
    /// Records on their way.
    pub outbox: outbox::Stats,
    /// The process and its machine.
    pub host: Host,
}

/// One camera in `telemetry`.
#[derive(Debug, Clone, Serialize)]
pub struct CameraTelemetry {
    /// `streaming`, `backoff`, …
    pub state: &'static str,
    /// Since the process started.
    pub ledger: Ledger,
    /// Whether only its newest frames are inferred.
    pub overloaded: bool,
    /// Frames offered a second, over the window.
    pub offered_fps: f64,
    /// Frames inferred a second, over the window.
    pub inferred_fps: f64,
    /// Records written since the process started.
    pub records: u64,
    /// Objects in them.
    pub objects: u64,
    /// From the decoder to the record, over the window; null = no frame was inferred.
    pub latency_ms: Option<Quantiles>,
}

/// Quantiles of a latency, milliseconds.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Quantiles {
    /// Median.
    pub p50: f64,
    /// 95 %.
    pub p95: f64,
    /// 99 %.
    pub p99: f64,
    /// The longest.
    pub max: f64,
}

/// The worker in `telemetry`.
#[derive(Debug, Clone, Serialize)]
pub struct WorkerTelemetry {
    /// Share of the window in which it worked, 0 to 1.
    pub busy: f64,
    /// Mean of each stage over the window; null = no frame was inferred.
    pub stages_ms: Option<Stages>,
    /// The last failure of a run, in words.
    pub last_failure: Option<String>,
}

/// Means, milliseconds.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Stages {
    /// From the decoder to the worker.
    pub queue: f64,
    /// Pixels to tensor.
    pub preprocess: f64,
    /// The model's run.
    pub inference: f64,
    /// Raw output to objects.
    pub postprocess: f64,
}

/// `cameras/<id>/counts`: what the camera sees.
#[derive(Debug, Serialize)]
pub struct Counts<'a> {
    /// `noblink.counts/1`
    pub schema: &'static str,
    /// Device id.
    pub device: &'a str,
    /// Camera id.
    pub camera: &'a str,
    /// Changes with each start of the process.
    pub boot: &'a str,
    /// Since when it is so.
    pub time: String,
    /// The same instant, microseconds since 1970.
    pub time_us: i64,
    /// By label, the most on one frame of the last second, those of which there are none left out;
    /// null = nobody looks: the camera does not stream, or no model runs.
    pub objects: Option<&'a BTreeMap<String, u64>>,
    /// Their sum.
    pub total: Option<u64>,
}

/// `cameras/<id>/status`
#[derive(Debug, Clone, Serialize)]
pub struct CameraRecord<'a> {
    /// `noblink.camera/1`
    pub schema: &'static str,
    /// Device id.
    pub device: &'a str,
    /// Camera id.
    pub camera: &'a str,
    /// Changes with each start of the process.
    pub boot: &'a str,
    /// Where its pictures come from, credentials masked.
    pub source: String,
    /// The state, since when, why.
    #[serde(flatten)]
    pub status: &'a CameraStatus,
}
