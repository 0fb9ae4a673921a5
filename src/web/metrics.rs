//! `/metrics` for Prometheus, in its text format. Names and units are described by their HELP lines
//! and in `docs/metrics.md` (a test compares them). Labels are bounded by the configuration.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::sync::Mutex;

use crate::camera::State;
use crate::host::{self, Host};
use crate::meter::{Buckets, Totals};
use crate::mqtt::status::LinkState;
use crate::snapshot::Snapshot;
use crate::update::job::{JobState, Verdict, Way};
use crate::update::updater::View;

/// What the metrics are made from: as of the last second.
pub struct Seen {
    /// Cameras, link, outbox, model.
    pub snapshot: Snapshot,
    /// Histograms since the start.
    pub totals: Totals,
    /// Jobs; empty without ONNX Runtime.
    pub view: View,
    /// What the outbox may take of the disk.
    pub outbox_max_bytes: u64,
    /// When the process started, seconds since 1970.
    pub started_s: f64,
}

/// The latest of them.
#[derive(Default)]
pub struct Page(Mutex<Option<Seen>>);

impl Page {
    /// Replaces what was seen before.
    pub fn put(&self, seen: Seen) {
        *self.0.lock().expect("nothing panics while it holds the metrics") = Some(seen);
    }

    /// The text; empty in the first second.
    pub fn text(&self) -> String {
        let seen = self.0.lock().expect("nothing panics while it holds the metrics");
        seen.as_ref().map(text).unwrap_or_default()
    }
}

/// Writes families one after the other.
#[derive(Default)]
struct Writer(String);

impl Writer {
    fn family(&mut self, name: &str, kind: &str, help: &str) -> Family<'_> {
        let _ = writeln!(self.0, "# HELP {name} {help}\n# TYPE {name} {kind}");
        Family { text: &mut self.0, name: name.to_owned() }
    }

    /// A family of one sample without labels.
    fn single(&mut self, name: &str, kind: &str, help: &str, value: f64) {
        self.family(name, kind, help).add(&[], value);
    }
}

struct Family<'a> {
    text: &'a mut String,
    name: String,
}

impl Family<'_> {
    fn add(&mut self, labels: &[(&str, &str)], value: f64) {
        self.sample("", labels, value);
    }

    fn sample(&mut self, suffix: &str, labels: &[(&str, &str)], value: f64) {
        let escaped = |v: &str| v.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n");
        let pairs: Vec<_> = labels.iter().map(|(n, v)| format!("{n}=\"{}\"", escaped(v))).collect();
        let labels =
            if pairs.is_empty() { String::new() } else { format!("{{{}}}", pairs.join(",")) };
        let _ = writeln!(self.text, "{}{suffix}{labels} {value}", self.name);
    }

    fn histogram(&mut self, labels: &[(&str, &str)], buckets: &Buckets) {
        let mut sum = 0;
        for (bound, count) in Buckets::BOUNDS_S.iter().zip(&buckets.counts) {
            sum += count;
            let bound = bound.to_string();
            self.sample("_bucket", &[labels, &[("le", &bound)]].concat(), sum as f64);
        }
        let all: u64 = buckets.counts.iter().sum();
        self.sample("_bucket", &[labels, &[("le", "+Inf")]].concat(), all as f64);
        self.sample("_sum", labels, buckets.sum_s);
        self.sample("_count", labels, all as f64);
    }
}

fn text(seen: &Seen) -> String {
    let mut w = Writer::default();
    let number = |yes: bool| f64::from(u8::from(yes));
    w.family("noblink_build_info", "gauge", "The version that runs.")
        .add(&[("version", env!("CARGO_PKG_VERSION"))], 1.0);
    cameras(&mut w, seen);
    stages(&mut w, &seen.totals);
    models(&mut w, seen);
    swaps(&mut w, &seen.view);

    let (link, outbox) = (&seen.snapshot.link, &seen.snapshot.outbox);
    let connected = number(link.state == LinkState::Connected);
    w.single("noblink_mqtt_connected", "gauge", "Whether the broker is connected.", connected);
    let connects = link.connects as f64;
    w.single("noblink_mqtt_connects_total", "counter", "Connections that came up.", connects);
    let mut waiting =
        w.family("noblink_outbox_records", "gauge", "Records on their way, by place.");
    waiting.add(&[("place", "queued")], outbox.queued as f64);
    waiting.add(&[("place", "in_flight")], outbox.in_flight as f64);
    let help = "Payload bytes of the records on their way.";
    w.single("noblink_outbox_bytes", "gauge", help, outbox.bytes as f64);
    let help = "Bytes of the outbox on disk.";
    w.single("noblink_outbox_disk_bytes", "gauge", help, outbox.spool_bytes as f64);
    let help = "What they may become, bytes: then the oldest records go.";
    w.single("noblink_outbox_disk_limit_bytes", "gauge", help, seen.outbox_max_bytes as f64);
    let help = "Whether the outbox can't be written to disk just now.";
    let failing = number(outbox.disk_error.is_some());
    w.single("noblink_outbox_disk_failing", "gauge", help, failing);
    let mut ended = w.family("noblink_outbox_records_total", "counter", "Records by their end.");
    ended.add(&[("end", "acknowledged")], outbox.acked as f64);
    ended.add(&[("end", "rejected")], outbox.rejected as f64);
    ended.add(&[("end", "dropped")], outbox.dropped as f64);

    let host = Host::read(0.0, 1.0);
    let help = "CPU time of the process, seconds.";
    w.single("process_cpu_seconds_total", "counter", help, host::cpu_seconds());
    let help = "Resident memory of the process, bytes.";
    w.single("process_resident_memory_bytes", "gauge", help, host.rss_mb * 1e6);
    w.single("process_open_fds", "gauge", "Open file descriptors.", host.fds as f64);
    w.single("process_threads", "gauge", "Threads.", host.threads as f64);
    let help = "When the process started, seconds since 1970.";
    w.single("process_start_time_seconds", "gauge", help, seen.started_s);
    w.0
}

fn cameras(w: &mut Writer, seen: &Seen) {
    let cameras = &seen.snapshot.cameras;
    let mut states =
        w.family("noblink_camera_state", "gauge", "1 for the state that the camera is in.");
    for camera in cameras {
        for state in State::ALL {
            let value = f64::from(u8::from(camera.status.state == state));
            states.add(&[("camera", &camera.id), ("state", state.name())], value);
        }
    }
    let mut connects = w.family(
        "noblink_camera_connects_total",
        "counter",
        "Times that the source began to stream.",
    );
    for camera in cameras {
        connects.add(&[("camera", &camera.id)], camera.status.connects as f64);
    }
    let help = "Pipelines of the camera that could not be taken down yet.";
    let mut stuck = w.family("noblink_camera_stuck_pipelines", "gauge", help);
    for camera in cameras {
        stuck.add(&[("camera", &camera.id)], camera.status.leaked_pipelines as f64);
    }
    let help = "Supervisors of the camera that were stuck, or broke, and were replaced.";
    let mut replaced = w.family("noblink_camera_supervisors_replaced_total", "counter", help);
    for camera in cameras {
        replaced.add(&[("camera", &camera.id)], camera.status.leaked_supervisors as f64);
    }
    let mut decoded =
        w.family("noblink_frames_decoded_total", "counter", "Frames that the decoder delivered.");
    for camera in cameras {
        decoded.add(&[("camera", &camera.id)], camera.lane.ledger.decoded as f64);
    }
    let help =
        "Decoded frames by their end; they and noblink_frames_waiting add up to the decoded.";
    let mut ends = w.family("noblink_frames_total", "counter", help);
    for camera in cameras {
        let ledger = &camera.lane.ledger;
        let dropped = &ledger.dropped;
        for (end, count) in [
            ("inferred", ledger.inferred),
            ("failed", ledger.failed),
            ("rate_limited", ledger.rate_limited),
            ("corrupt", ledger.corrupt),
            ("dropped_overload", dropped.overload),
            ("dropped_full", dropped.full),
            ("dropped_disabled", dropped.disabled),
            ("dropped_no_model", dropped.no_model),
            ("dropped_stopped", dropped.stopped),
        ] {
            ends.add(&[("camera", &camera.id), ("end", end)], count as f64);
        }
    }
    let mut waiting =
        w.family("noblink_frames_waiting", "gauge", "Frames in the queue or with the worker.");
    for camera in cameras {
        let ledger = &camera.lane.ledger;
        waiting.add(&[("camera", &camera.id)], (ledger.queued + ledger.in_flight) as f64);
    }
    let help = "Whether only the newest frames of the camera are taken.";
    let mut overloaded = w.family("noblink_camera_overloaded", "gauge", help);
    for camera in cameras {
        overloaded.add(&[("camera", &camera.id)], f64::from(u8::from(camera.lane.overloaded)));
    }
    let help = "From the decoder to the event, seconds.";
    let mut latency = w.family("noblink_frame_latency_seconds", "histogram", help);
    for camera in cameras {
        let Some(total) = seen.totals.cameras.get(camera.lane.index) else { continue };
        latency.histogram(&[("camera", &camera.id)], total);
    }
}

fn stages(w: &mut Writer, totals: &Totals) {
    let help = "How long a frame is in each stage, seconds.";
    let mut stages = w.family("noblink_stage_duration_seconds", "histogram", help);
    for (stage, buckets) in &totals.stages {
        stages.histogram(&[("stage", stage)], buckets);
    }
}

fn models(w: &mut Writer, seen: &Seen) {
    let mut info = w.family("noblink_model_info", "gauge", "The model that runs.");
    if let Some(live) = &seen.snapshot.live {
        let id = live.model.identity();
        let sha256 = id.sha256.to_string();
        info.add(&[("model", &id.id), ("version", &id.version), ("sha256", &sha256)], 1.0);
    }
    let help = "What runs the model.";
    let mut provider = w.family("noblink_inference_provider_info", "gauge", help);
    if let Some(live) = &seen.snapshot.live {
        let setting = live.model.setting();
        let (name, library) = (setting.provider.name(), live.model.library());
        let threads = setting.threads.to_string();
        provider.add(&[("provider", name), ("library", library), ("threads", &threads)], 1.0);
    }
    let epoch = seen.snapshot.live.as_ref().map_or(0, |live| live.epoch);
    w.single("noblink_model_epoch", "gauge", "Swaps since the store was made.", epoch as f64);
    let mut ended = BTreeMap::<String, u64>::new();
    for job in seen.view.jobs.iter().filter(|j| j.state.is_terminal()) {
        *ended.entry(word(&job.state)).or_default() += 1;
    }
    let help = "Jobs among the last 50, by their end.";
    let mut jobs = w.family("noblink_jobs", "gauge", help);
    for (state, count) in ended {
        jobs.add(&[("state", &state)], count as f64);
    }
    let help = "Jobs since the process started, by their end.";
    let mut jobs = w.family("noblink_jobs_total", "counter", help);
    for state in JobState::ENDS {
        let count = seen.view.ended.get(&state).copied().unwrap_or_default();
        jobs.add(&[("state", &word(&state))], count as f64);
    }
    let help = "Whether models that come this way wait for a person, after three that failed.";
    let mut breakers = w.family("noblink_breaker_open", "gauge", help);
    for way in Way::ALL {
        let is_open = seen.view.state["breaker"][way.name()] == true;
        breakers.add(&[("way", way.name())], f64::from(u8::from(is_open)));
    }
    let open = seen.view.jobs.iter().any(|j| !j.state.is_terminal());
    let open = f64::from(u8::from(open));
    w.single("noblink_job_in_progress", "gauge", "Whether a job is under way or waits.", open);
    // A rollback meets none.
    let judged = seen.view.jobs.iter().find(|j| !j.gates.is_empty());
    let gates_of = || judged.into_iter().flat_map(|j| &j.gates);
    let help = "Gates of the last job that met any: 1 passed, 0 failed, -1 not run, 2 asks.";
    let mut gates = w.family("noblink_gate_verdict", "gauge", help);
    for gate in gates_of() {
        let value = match gate.verdict {
            Verdict::Passed => 1.0,
            Verdict::Failed => 0.0,
            Verdict::Skipped => -1.0,
            Verdict::Ask => 2.0,
        };
        gates.add(&[("gate", &gate.gate)], value);
    }
    let help = "Numbers that they measured.";
    let mut values = w.family("noblink_gate_value", "gauge", help);
    for gate in gates_of() {
        for (name, value) in gate.numbers.as_object().into_iter().flatten() {
            if let Some(value) = value.as_f64() {
                values.add(&[("gate", &gate.gate), ("number", name)], value);
            }
        }
    }
}

fn swaps(w: &mut Writer, view: &View) {
    let last = view.last_swap.as_ref();
    let help = "Longest gap between two results of the camera around the last swap, seconds.";
    let mut gaps = w.family("noblink_swap_gap_seconds", "gauge", help);
    for (camera, swap) in last.into_iter().flat_map(|s| &s.cameras) {
        gaps.add(&[("camera", camera)], swap.longest_gap_ms / 1e3);
    }
    let help = "Longest gap between two results of the camera in the minute before, seconds.";
    let mut expected = w.family("noblink_swap_expected_gap_seconds", "gauge", help);
    for (camera, swap) in last.into_iter().flat_map(|s| &s.cameras) {
        expected.add(&[("camera", camera)], swap.expected_gap_ms / 1e3);
    }
    let lost = view.swap_totals.frames_lost as f64;
    w.single("noblink_swap_frames_lost_total", "counter", "Frames lost to swaps.", lost);
    let swaps = view.swap_totals.swaps as f64;
    w.single("noblink_swaps_total", "counter", "Swaps since the process started.", swaps);
    let back = view.swap_totals.rollbacks as f64;
    let help = "Swaps back to a model that ran before, by hand or by themselves.";
    w.single("noblink_rollbacks_total", "counter", help, back);
}

fn word(state: &JobState) -> String {
    serde_json::json!(state).as_str().unwrap_or_default().to_lowercase()
}
