//! What parent and child say to each other: a ticket in, lines of JSON out.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::super::job::{Gate, Reason};
use super::request::Request;

/// On the child's standard input.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Ticket {
    /// Random; the report must repeat it.
    pub(super) nonce: String,
    /// Whose child it must still be when it starts.
    pub(super) parent: i32,
    /// CPU seconds for each step.
    pub(super) cpu_s: u64,
    /// CPU seconds for all of them, which nothing raises.
    pub(super) cpu_total_s: u64,
    /// Added to the parent's.
    pub(super) nice: i32,
    /// The work.
    pub(super) request: Request,
}

/// A line of the child's standard output.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Line {
    /// What it does from here on: whose fault it is if it dies.
    Step(Step),
    /// A gate's result. Counts only as part of the report, but tells how far a dead child came.
    Gate(Gate),
    /// The end.
    Report(Box<Report>),
}

/// A piece of work, and for which model it is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Step {
    pub(super) what: Work,
    pub(super) who: Who,
}

/// What is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Work {
    Load,
    Examine,
    Calibration,
    Agreement,
    Latency,
}

impl Work {
    /// The gate that it belongs to.
    pub(super) fn gate(self) -> &'static str {
        match self {
            Self::Load | Self::Examine => "proving",
            Self::Calibration => "calibration",
            Self::Agreement => "agreement",
            Self::Latency => "latency",
        }
    }

    pub(super) fn words(self) -> &'static str {
        match self {
            Self::Load => "while it was loaded",
            Self::Examine => "on black, white and noise frames",
            Self::Calibration => "on the calibration pictures",
            Self::Agreement => "on live frames",
            Self::Latency => "while its time was measured",
        }
    }
}

/// Whose model is at work.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Who {
    Candidate,
    Active,
}

/// Whose fault a refusal is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Fault {
    /// The model's.
    Model,
    /// The machine's or the configuration's: nothing was found out about the model.
    Machine,
}

/// The child's verdict.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Report {
    pub(super) nonce: String,
    pub(super) gates: Vec<Gate>,
    pub(super) refused: Option<(Fault, Reason)>,
    pub(super) ask: Option<Reason>,
    pub(super) phases_ms: BTreeMap<String, f64>,
}
