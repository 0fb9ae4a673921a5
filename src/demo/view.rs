//! What the demo shows: lines made of nothing but the records that arrive over MQTT.
//!
//! The view is a consumer like any other, so it can rebuild the ledger from the records: every
//! frame id is accounted for, or the view says how many are not.

use std::collections::BTreeMap;
use std::fmt::Write;

use serde_json::Value;

/// What was learnt of one camera.
#[derive(Debug, Default, Clone, PartialEq)]
pub struct CameraView {
    /// Frames accounted for: one per record, plus what `since` says.
    pub accounted: u64,
    /// Frames dropped, by the records.
    pub dropped: u64,
    /// Frames that failed, by the records.
    pub failed: u64,
    /// Records that never came.
    pub missing: u64,
    /// Records that came.
    pub records: u64,
    /// Frame ids that the records don't account for.
    pub lost: u64,
    next_seq: u64,
    recent: Recent,
}

/// Since the last line.
#[derive(Debug, Default, Clone, PartialEq)]
struct Recent {
    records: u64,
    total_ms: Vec<f64>,
    size: (u64, u64),
    model: String,
    /// Most objects of a label in one frame.
    objects: BTreeMap<String, u64>,
}

/// All cameras, by id.
#[derive(Debug, Default)]
pub struct View {
    /// By id.
    pub cameras: BTreeMap<String, CameraView>,
}

impl View {
    /// Takes a payload from a `detections` topic.
    pub fn detections(&mut self, payload: &[u8]) {
        let Ok(record) = serde_json::from_slice::<Value>(payload) else { return };
        let Some(camera) = record["camera"].as_str() else { return };
        self.cameras.entry(camera.to_owned()).or_default().take(&record);
    }

    /// One line per camera on what came since the last call, `seconds` ago.
    pub fn lines(&mut self, seconds: f64) -> Vec<String> {
        self.cameras.iter_mut().map(|(id, camera)| camera.line(id, seconds)).collect()
    }
}

impl CameraView {
    fn take(&mut self, record: &Value) {
        let number = |v: &Value| v.as_u64().unwrap_or(0);
        let seq = number(&record["seq"]);
        if seq < self.next_seq {
            return; // delivered again, as QoS 1 may
        }
        self.missing += seq - self.next_seq;
        self.next_seq = seq + 1;
        self.records += 1;
        let since = &record["since"];
        self.dropped += number(&since["dropped"]);
        self.failed += number(&since["failed"]);
        let between = ["empty", "failed", "dropped"].map(|k| number(&since[k])).iter().sum::<u64>();
        self.accounted += 1 + between;
        self.lost = (number(&record["frame"]["id"]) + 1).saturating_sub(self.accounted);

        let recent = &mut self.recent;
        recent.records += 1;
        recent.total_ms.push(record["latency_ms"]["total"].as_f64().unwrap_or(0.0));
        recent.size = (number(&record["frame"]["width"]), number(&record["frame"]["height"]));
        let model = &record["model"];
        let text = |key: &str| model[key].as_str().unwrap_or("?").to_owned();
        recent.model = format!("{} {}", text("id"), text("version"));
        let mut counts = BTreeMap::<&str, u64>::new();
        for object in record["objects"].as_array().into_iter().flatten() {
            *counts.entry(object["label"].as_str().unwrap_or("?")).or_default() += 1;
        }
        for (label, count) in counts {
            let most = recent.objects.entry(label.to_owned()).or_default();
            *most = (*most).max(count);
        }
    }

    fn line(&mut self, id: &str, seconds: f64) -> String {
        let mut recent = std::mem::take(&mut self.recent);
        let mut line = format!("{id:<8}");
        if recent.records == 0 {
            line += "  no records";
            return line;
        }
        recent.total_ms.sort_by(f64::total_cmp);
        let median = recent.total_ms[recent.total_ms.len() / 2];
        let rate = recent.records as f64 / seconds.max(1e-3);
        let (width, height) = recent.size;
        let size = format!("{width}x{height}");
        let _ = write!(
            line,
            "{size:>10} {rate:>5.1}/s {median:>6.1} ms  {:<10} frame {:>6}  lost {}  ",
            recent.model,
            self.accounted.saturating_sub(1),
            self.lost,
        );
        let objects: Vec<_> = recent.objects.iter().map(|(l, n)| format!("{l} {n}")).collect();
        line += if objects.is_empty() { "nothing" } else { "" };
        line + &objects.join(", ")
    }
}
