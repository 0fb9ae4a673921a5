//! The demo's story of a model update, told by the messages on `models/…` alone.

use std::collections::BTreeMap;

use serde_json::Value;

/// What was told of each job.
#[derive(Debug, Default)]
pub struct Story {
    jobs: BTreeMap<String, Told>,
}

#[derive(Debug, Default)]
struct Told {
    gates: usize,
    phase: Option<String>,
}

impl Story {
    /// Lines for a message; none where it says nothing new.
    pub fn lines(&mut self, topic: &str, payload: &[u8]) -> Vec<String> {
        let Ok(message) = serde_json::from_slice::<Value>(payload) else { return Vec::new() };
        match message["schema"].as_str() {
            Some("noblink.job/1") if topic.contains("/models/jobs/") => self.job(&message),
            Some("noblink.swap/1") => swap(&message),
            _ => Vec::new(),
        }
    }

    fn job(&mut self, job: &Value) -> Vec<String> {
        let text = |v: &Value, key: &str| v[key].as_str().unwrap_or("?").to_owned();
        let told = self.jobs.entry(text(job, "id")).or_default();
        let mut lines = Vec::new();
        if told.phase.is_none() {
            lines.push(String::new());
            lines.push(format!("── job {}, by {} ──", text(job, "id"), text(job, "way")));
        }
        let gates = job["gates"].as_array().map_or(&[][..], Vec::as_slice);
        for gate in gates.iter().skip(told.gates) {
            lines.push(format!(
                "     {:<8} {:<12} {}",
                text(gate, "verdict"),
                text(gate, "gate"),
                text(gate, "message")
            ));
        }
        told.gates = gates.len();
        let phase = job["phase"].as_str().unwrap_or("queued").to_owned();
        if told.phase.as_ref() != Some(&phase) {
            lines.push(format!("   {phase}"));
            told.phase = Some(phase);
        }
        match job["state"].as_str() {
            Some("QUEUED" | "IN_PROGRESS") | None => {}
            Some(state) => {
                let why = job["reason"]["message"].as_str();
                lines
                    .push(format!("   {state}{}", why.map_or(String::new(), |w| format!(": {w}"))));
                lines.push(String::new());
            }
        }
        lines
    }
}

/// A swap report, camera by camera.
fn swap(report: &Value) -> Vec<String> {
    let name = |model: &Value| match model.is_null() {
        true => "no model".to_owned(),
        false => format!(
            "{} {}",
            model["id"].as_str().unwrap_or("?"),
            model["version"].as_str().unwrap_or("?")
        ),
    };
    let mut lines = vec![format!(
        "   ★ swapped {} → {} between two frames, {} frames lost; first result {} ms after the command",
        name(&report["from"]),
        name(&report["to"]),
        report["frames_lost"],
        report["command_to_result_ms"],
    )];
    for (camera, swap) in report["cameras"].as_object().into_iter().flatten() {
        lines.push(format!(
            "     {camera}: frame {} by the old model, frame {} by the new one; longest gap between \
             results {} ms, {} ms before",
            swap["last_old"], swap["first_new"], swap["longest_gap_ms"], swap["expected_gap_ms"]
        ));
    }
    lines
}
