//! The gates of an update: what a model must show before it may run.
//!
//! ```text
//! identity ─ structure ─ contract ─┬─ proving ─ calibration ─ shift ─ agreement ─ latency
//! (store)    (`content`: pure)     │  (a child process: `proving` runs it, `child` is what it does)
//!                                  └─ probation (live, after the swap; its report is pure)
//! ```
//!
//! Every gate has a [`Gate`] in the report, with its numbers. One that could not run is SKIPPED and
//! says why; it never counts as passed. A model meets ONNX Runtime in the child first: what crashes,
//! hangs or eats memory there has touched nothing. The child judges by pure functions over what it
//! measured: `examine`, `calibration`, `shift`, `agreement`, `latency`.

mod agreement;
mod bench;
mod calibration;
mod child;
pub(super) mod confine;
mod content;
pub(super) mod examine;
pub mod folder;
mod frame;
mod latency;
mod probation;
pub mod proving;
mod request;
pub(super) mod score;
pub(super) mod shift;
pub mod wire;

use serde_json::{Value, json};

pub(super) use child::say;
pub use child::{LIVE_FRAMES_MAX, main as prove};
pub use content::{Content, Rules, examine as content};
pub use frame::{DumpError, FrameDump};
pub use probation::{Seen, probation};
pub use proving::{End, Limits, Outcome};
pub use request::{Engine, Latency, Request, Subject};

use super::job::{Gate, Reason, Verdict};

/// Gates between identity and probation, in the order of the report.
pub const GATES: [&str; 7] =
    ["structure", "contract", "proving", "calibration", "shift", "agreement", "latency"];

/// The first pictures of a calibration folder; one that can't be read has none.
pub fn pictures(dir: &std::path::Path, most: usize) -> Vec<std::path::PathBuf> {
    let folder = folder::Folder::read(dir).unwrap_or_default();
    folder.samples.into_iter().take(most).map(|sample| sample.image).collect()
}

fn gate(gate: &'static str, verdict: Verdict, message: impl Into<String>, numbers: Value) -> Gate {
    Gate { gate: gate.into(), verdict, message: message.into(), numbers }
}

/// A gate that refuses: its numbers carry the code as well.
fn failed(name: &'static str, reason: &Reason, mut numbers: Value) -> Gate {
    if let Value::Object(numbers) = &mut numbers {
        numbers.insert("code".into(), json!(reason.code));
    }
    gate(name, Verdict::Failed, reason.message.clone(), numbers)
}

fn skipped(name: &'static str, why: impl Into<String>) -> Gate {
    gate(name, Verdict::Skipped, why, json!({}))
}
