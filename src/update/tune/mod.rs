//! `provider = "auto"`: the fastest way to run a model on this box that finds what the reference
//! finds.
//!
//! ```text
//! parent (`run`)   ask ──► child, one per library (`measure`): loads, times in turns, looks
//!      ▲                         │ rows: times, findings
//!      └──── judge (here, pure) ◄┘
//! ```
//!
//! The reference is the CPU provider of the library that runs, with the configured threads. Who
//! disagrees with it is out; who is not [`GAIN_MIN`] times faster does not replace it. The result is
//! kept in the registry by model, machine and libraries; a row that is lost is measured again.

mod measure;
mod run;

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::digest::Digest;
use super::failpoint;
use super::gates::Subject;
use super::gates::score::overlap;
use super::gates::shift::median;
use super::job::Millis;
use super::registry::Registry;
use crate::config::{Inference, Provider};
use crate::model::options::Setting;
use crate::model::runtime::{installed, library_for, named, version_of};
use crate::records::rounded;

pub(super) use measure::measure;
pub use run::{LASTS, Libraries, Order, Stopped, run};

/// Times that a setting must be faster to replace another: less is noise, and another library or
/// provider is another risk.
pub const GAIN_MIN: f64 = 1.05;
/// Share of the findings that must be the reference's.
pub const AGREEMENT_MIN: f64 = 0.95;
/// A finding counts from so far above the threshold on: one at the threshold may fall on either side.
const SURE: f32 = 0.05;
/// What makes two findings the same: overlap of the boxes, difference of the scores.
const SAME_OVERLAP: f32 = 0.8;
const SAME_SCORE: f32 = 0.1;

/// What a child is asked to measure.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Ask {
    /// The model.
    pub model: Subject,
    /// ONNX Runtime's library: a process has one.
    pub library: PathBuf,
    /// With what the others are compared; its threads are the most that are tried.
    pub reference: Setting,
    /// The machine has more cores than the worker: threads may wait actively.
    pub spinning: bool,
    /// Settings that ended a child before.
    pub left_out: Vec<Setting>,
    /// Operator domains allowed beyond the common ones.
    pub custom_op_domains: Vec<String>,
    /// Pictures to agree on: dumps of frames, JPEG or PNG files.
    pub pictures: Vec<PathBuf>,
    /// Overlap from which the weaker of two boxes of a class goes.
    pub iou: f32,
    /// How long it may take, loading included.
    pub budget_ms: u64,
}

/// What a child measured.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Measured {
    /// One for each setting that the library has.
    pub rows: Vec<Row>,
}

/// A setting.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Row {
    /// It.
    pub setting: Setting,
    /// Session and first run.
    pub load_ms: f64,
    /// A run, once for each turn.
    pub wall_ms: Vec<f64>,
    /// The same in CPU time of all threads.
    pub cpu_ms: Vec<f64>,
    /// What was found, by picture, best first.
    pub found: Vec<Vec<Found>>,
    /// Why it can't be used.
    pub error: Option<String>,
    /// That is for lack of time only.
    #[serde(default)]
    pub late: bool,
}

/// A finding.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Found {
    /// Index of the label.
    pub class: u32,
    /// Its score.
    pub score: f32,
    /// Fractions of the picture.
    pub corners: [f32; 4],
}

/// A library and a setting.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Pick {
    /// ONNX Runtime's library.
    pub library: PathBuf,
    /// Its setting.
    pub setting: Setting,
}

impl Pick {
    /// The library's version.
    pub fn version(&self) -> String {
        version_of(&self.library)
    }
}

/// A candidate as it is shown.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Candidate {
    /// What it is.
    #[serde(flatten)]
    pub pick: Pick,
    /// The library's version.
    pub runtime: String,
    /// Session and first run.
    pub load_ms: f64,
    /// A run: the lower quartile of the turns.
    pub wall_ms: Option<f64>,
    /// Median of its CPU time.
    pub cpu_ms: Option<f64>,
    /// Runs in a second, with nothing else to do.
    pub frames_per_s: Option<f64>,
    /// Share of the findings that are the reference's.
    pub agreement: Option<f64>,
    /// Why it is out.
    pub out: Option<String>,
    /// For lack of time only: more of it may tell.
    #[serde(default)]
    pub late: bool,
}

/// What was measured, and what follows from it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Table {
    /// The first one is the reference.
    pub candidates: Vec<Candidate>,
    /// The fastest that agrees.
    pub chosen: Pick,
    /// The same within the library that runs: it needs no restart.
    pub here: Pick,
    /// How many times faster than the reference the chosen one is.
    pub gain: f64,
}

/// How far a result has proved itself in service.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// It was measured.
    Measured,
    /// It runs for the first time, the reference's session warm beside it.
    Trying,
    /// It did.
    Proven,
    /// It failed: the reference stays, and this is not tried again.
    Failed(String),
}

/// A result, as the registry keeps it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Tuning {
    /// The model.
    pub model: Digest,
    /// Machine and libraries: see [`Libraries::place`].
    pub place: String,
    /// When it was measured.
    pub at: Millis,
    /// How far it is.
    pub state: State,
    /// The result.
    pub table: Table,
}

impl Table {
    /// Whether there was time for all.
    pub fn is_complete(&self) -> bool {
        self.candidates.iter().all(|candidate| !candidate.late)
    }
}

impl Tuning {
    /// The setting for this library, unless it failed.
    pub fn pick(&self, library: &Path) -> Option<&Pick> {
        let picks = [&self.table.chosen, &self.table.here];
        let failed = matches!(self.state, State::Failed(_));
        picks.into_iter().find(|pick| !failed && pick.library == library)
    }

    /// The same, seen from the library that runs: what waited for it is here now.
    pub fn at_home(mut self, library: &Path) -> Self {
        if self.table.chosen.library == library {
            self.table.here = self.table.chosen.clone();
        }
        self
    }

    /// The setting that a start may begin with: what has run here before.
    pub fn proven(&self, library: &Path) -> Option<Setting> {
        let pick = self.pick(library).filter(|_| self.state == State::Proven)?;
        // What waited for another library has not run yet; its CPU provider needs no proof.
        let known = *pick == self.table.here || pick.setting.provider == Provider::Cpu;
        known.then_some(pick.setting)
    }
}

/// The library to load at a start: with `auto` the one that was found to be the fastest for the
/// active model, else as [`library_for`] says.
pub fn library(inference: &Inference, state_dir: &Path) -> Option<PathBuf> {
    let usual = library_for(inference);
    if inference.provider.is_some() || named(inference.library.as_deref()).is_some() {
        return usual;
    }
    let all = installed(None);
    let first = usual.clone().or_else(|| all.first().cloned())?;
    let place = Libraries::of(None, &first).place(inference.threads);
    let tuning = Registry::peek(state_dir, &place).and_then(|(_, tuning)| tuning);
    let fit = tuning.filter(|tuning| !matches!(tuning.state, State::Failed(_) | State::Trying));
    fit.map(|tuning| tuning.table.chosen.library).filter(|library| all.contains(library)).or(usual)
}

/// Judges what was measured: rows by library, that of the library that runs first, and its first
/// row the reference. `confidence` is the service's threshold.
///
/// # Errors
/// The reference itself could not be measured.
pub fn judge(measured: Vec<(PathBuf, Vec<Row>)>, confidence: f32) -> Result<Table, String> {
    let mut rows = measured.into_iter().flat_map(|(library, rows)| {
        rows.into_iter()
            .map(move |row| (Pick { library: library.clone(), setting: row.setting }, row))
    });
    let (reference, base) = rows.next().ok_or("nothing was measured")?;
    if let Some(error) = &base.error {
        return Err(format!("the reference ({}) could not be measured: {error}", base.setting));
    }
    let base_ms = quartile(&base.wall_ms).ok_or("there was no time for the reference")?;
    let mut candidates = vec![Candidate::of(reference.clone(), &base)];
    candidates[0].agreement = Some(1.0);
    for (pick, row) in rows {
        let mut candidate = Candidate::of(pick, &row);
        if candidate.out.is_none() {
            let agreement = agreement(&base.found, &row.found, confidence);
            candidate.agreement = Some(rounded(agreement, 4));
            candidate.out = (agreement < AGREEMENT_MIN).then(|| {
                let share = 100.0 * agreement;
                format!("only {share:.1} % of its findings are the reference's")
            });
        }
        candidates.push(candidate);
    }
    let fastest = |here: bool| {
        let fit = |c: &&Candidate| c.out.is_none() && (c.pick.library == reference.library) == here;
        let timed = candidates.iter().filter(fit).filter_map(|c| Some((c.wall_ms?, &c.pick)));
        timed
            .filter(|(_, pick)| **pick != reference)
            .min_by(|a, b| a.0.total_cmp(&b.0))
            .map(|(ms, pick)| (ms, pick.clone()))
    };
    let faster = |best: (f64, Pick), other: Option<(f64, Pick)>, gain: f64| match other {
        Some(other) if best.0 / other.0 >= gain => other,
        _ => best,
    };
    let gain = if failpoint::leaves_out(failpoint::REFERENCE) { 0.0 } else { GAIN_MIN };
    let here = faster((base_ms, reference.clone()), fastest(true), gain);
    let chosen = faster(here.clone(), fastest(false), GAIN_MIN);
    let gain = rounded(base_ms / chosen.0, 3);
    Ok(Table { candidates, chosen: chosen.1, here: here.1, gain })
}

impl Candidate {
    fn of(pick: Pick, row: &Row) -> Self {
        let wall_ms = quartile(&row.wall_ms).map(|ms| rounded(ms, 3));
        let untimed = || wall_ms.is_none().then(|| "there was no time left for it".to_owned());
        Self {
            runtime: pick.version(),
            pick,
            load_ms: row.load_ms,
            wall_ms,
            cpu_ms: median(row.cpu_ms.clone()).map(|ms| rounded(ms, 3)),
            frames_per_s: wall_ms.map(|ms| rounded(1e3 / ms.max(1e-6), 1)),
            agreement: None,
            out: row.error.clone().or_else(untimed),
            late: row.late || row.error.is_none() && wall_ms.is_none(),
        }
    }
}

/// The lower quartile. Whoever else is at work can only make a run slower, and is at work in most
/// turns on a busy box: a median would compare the neighbours.
pub(super) fn quartile(values: &[f64]) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted.get(sorted.len() / 4).copied()
}

/// Share of the sure findings of both sides that the other side has as well. Where the reference is
/// sure of nothing, its stronger half counts: an empty scene must not let anything pass.
fn agreement(reference: &[Vec<Found>], other: &[Vec<Found>], confidence: f32) -> f64 {
    let strongest = reference.iter().flatten().map(|f| f.score).fold(0.0, f32::max);
    let sure = if strongest >= confidence + SURE { confidence + SURE } else { strongest / 2.0 };
    let (mut all, mut same) = (0, 0);
    for (n, theirs) in reference.iter().enumerate() {
        let mine = other.get(n).map_or(&[][..], Vec::as_slice);
        for (some, counterpart) in [(&theirs[..], mine), (mine, &theirs[..])] {
            let count = some.iter().filter(|f| f.score >= sure);
            all += count.clone().count();
            same += count.filter(|f| counterpart.iter().any(|c| is_same(f, c))).count();
        }
    }
    if all == 0 { 1.0 } else { same as f64 / all as f64 }
}

fn is_same(a: &Found, b: &Found) -> bool {
    a.class == b.class
        && (a.score - b.score).abs() <= SAME_SCORE
        && overlap(&a.corners, &b.corners) >= SAME_OVERLAP
}
