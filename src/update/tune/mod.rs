//! `provider = "auto"`: the fastest way to run a model on this box that finds what the reference
//! finds.
//!
//! ```text
//! parent (`run`)   ask ──► child, one per library (`measure`): loads, times in turns, looks
//!      ▲                         │ rows: times, findings
//!      │               ask ──► two children, one per library's best: the same, in turns with each other
//!      └──── judge (here, pure) ◄┘
//! ```
//!
//! A process has one library, and a box may grow busy from one child to the next: what the two best
//! do in turns with each other sets the times of one library against those of the other.
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
    /// This setting only, in turns with a child of another library.
    pub duel: Option<Setting>,
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
pub fn judge(measured: &[(PathBuf, Vec<Row>)], confidence: f32) -> Result<Table, String> {
    let candidates = candidates(measured, confidence)?;
    let here = best_here(&candidates).ok_or("there was no time for the reference")?;
    let chosen = faster(here, fastest(&candidates, false), GAIN_MIN);
    let ms = |c: &Candidate| c.wall_ms.unwrap_or(f64::MAX);
    let gain = rounded(ms(&candidates[0]) / ms(chosen), 3);
    Ok(Table { chosen: chosen.pick.clone(), here: here.pick.clone(), gain, candidates })
}

/// The best of the library that runs and of the other one, if both have one.
fn finalists(measured: &[(PathBuf, Vec<Row>)], confidence: f32) -> Option<[Pick; 2]> {
    let candidates = candidates(measured, confidence).ok()?;
    let (here, other) = (best_here(&candidates)?, fastest(&candidates, false)?);
    Some([here.pick.clone(), other.pick.clone()])
}

/// The reference first.
fn candidates(measured: &[(PathBuf, Vec<Row>)], confidence: f32) -> Result<Vec<Candidate>, String> {
    let mut rows = measured.iter().flat_map(|(library, rows)| {
        rows.iter().map(move |row| (Pick { library: library.clone(), setting: row.setting }, row))
    });
    let (reference, base) = rows.next().ok_or("nothing was measured")?;
    if let Some(error) = &base.error {
        return Err(format!("the reference ({}) could not be measured: {error}", base.setting));
    }
    let mut candidates = vec![Candidate::of(reference, base)];
    candidates[0].agreement = Some(1.0);
    for (pick, row) in rows {
        let mut candidate = Candidate::of(pick, row);
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
    Ok(candidates)
}

/// Of the library that runs: the reference, or who is worth more.
fn best_here(candidates: &[Candidate]) -> Option<&Candidate> {
    let reference = candidates.first().filter(|c| c.wall_ms.is_some())?;
    let gain = if failpoint::leaves_out(failpoint::REFERENCE) { 0.0 } else { GAIN_MIN };
    Some(faster(reference, fastest(candidates, true), gain))
}

/// The fastest that agrees, the reference aside, of the library that runs or of the other one.
fn fastest(candidates: &[Candidate], here: bool) -> Option<&Candidate> {
    let (reference, others) = candidates.split_first()?;
    let is_fit =
        |c: &&Candidate| c.out.is_none() && (c.pick.library == reference.pick.library) == here;
    let timed = others.iter().filter(is_fit).filter_map(|c| Some((c.wall_ms?, c)));
    timed.min_by(|a, b| a.0.total_cmp(&b.0)).map(|(_, candidate)| candidate)
}

/// The other one if it is so many times faster.
fn faster<'a>(best: &'a Candidate, other: Option<&'a Candidate>, gain: f64) -> &'a Candidate {
    let is_worth = |other: &&Candidate| match (best.wall_ms, other.wall_ms) {
        (Some(best), Some(other)) => best / other >= gain,
        _ => false,
    };
    other.filter(is_worth).unwrap_or(best)
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
