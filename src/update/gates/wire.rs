//! What parent and child say to each other: a ticket and names of live frames in, lines of JSON out.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::super::job::{Gate, Reason};
use super::super::tune::{Ask, Measured};
use super::request::Request;
use crate::model::options::Setting;

/// The first line of the child's standard input.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Ticket {
    /// Random; the report must repeat it.
    pub nonce: String,
    /// Whose child it must still be when it starts.
    pub parent: i32,
    /// CPU seconds for each step.
    pub cpu_s: u64,
    /// CPU seconds for all of them, which nothing raises.
    pub cpu_total_s: u64,
    /// Added to the parent's.
    pub nice: i32,
    /// Cores to stay on; `None` = as the parent.
    pub cores: Option<Vec<usize>>,
    /// The work.
    pub task: Task,
}

/// A further line of it: a dump of a live frame ([`FrameDump`](super::FrameDump)).
pub fn frame(file: &Path) -> Vec<u8> {
    // A path that is no text is an empty line, which is no frame.
    let mut line = serde_json::to_vec(file).unwrap_or_default();
    line.push(b'\n');
    line
}

/// Reads such a line.
pub fn read_frame(line: &str) -> Option<PathBuf> {
    serde_json::from_str(line).ok()
}

/// What a child is for.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Task {
    /// To find out whether a model may run.
    Prove(Box<Request>),
    /// To find out how it runs fastest.
    Tune(Box<Ask>),
}

/// A line of the child's standard output.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Line {
    /// What it does from here on: whose fault it is if it dies.
    Step(Step),
    /// A gate's result. Counts only as part of the report, but tells how far a dead child came.
    Gate(Gate),
    /// The end.
    Report(Box<Report>),
    /// A setting is about to be loaded and run: whose fault it is if the child dies.
    Trying(Setting),
    /// The end of a tuning.
    Measured {
        /// The ticket's.
        nonce: String,
        /// What was measured.
        measured: Measured,
    },
}

impl Line {
    /// Reads a line; none for what a library printed, which is none of ours.
    pub fn read(text: &[u8]) -> Option<Self> {
        serde_json::from_slice(text).ok()
    }
}

/// A piece of work, and for which model it is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Step {
    /// The work.
    pub what: Work,
    /// The model.
    pub who: Who,
}

/// What is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Work {
    /// The session is built.
    Load,
    /// Black, white, noise, life.
    Examine,
    /// The site's pictures.
    Calibration,
    /// Live frames.
    Agreement,
    /// Times.
    Latency,
}

impl Work {
    /// The gate that it belongs to.
    pub fn gate(self) -> &'static str {
        match self {
            Self::Load | Self::Examine => "proving",
            Self::Calibration => "calibration",
            Self::Agreement => "agreement",
            Self::Latency => "latency",
        }
    }

    /// Reads on from what happened.
    pub fn words(self) -> &'static str {
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
pub enum Who {
    /// The one that is proven.
    Candidate,
    /// The one that runs.
    Active,
}

/// Whose fault a refusal is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Fault {
    /// The model's.
    Model,
    /// The machine's or the configuration's: nothing was found out about the model.
    Machine,
}

/// The child's verdict.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Report {
    /// The ticket's.
    pub nonce: String,
    /// Each gate's result.
    pub gates: Vec<Gate>,
    /// Why the model may not run, and whose fault that is.
    pub refused: Option<(Fault, Reason)>,
    /// What a person should be asked.
    pub ask: Option<Reason>,
    /// How long what took.
    pub phases_ms: BTreeMap<String, f64>,
}
