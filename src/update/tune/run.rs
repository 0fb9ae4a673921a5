//! The parent's part: a child for each library, in turns, and what becomes of those that die.

use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use super::{Ask, Row, Table, judge};
use crate::host;
use crate::model::options::Setting;
use crate::model::runtime::{installed, version_of};
use crate::update::gates::proving::{self, Killed, Limits, Seen};
use crate::update::gates::wire::Task;
use crate::update::gates::{Engine, Subject};

/// All of it, from the first child's start to the last one's end, unless more is allowed.
pub const LASTS: Duration = Duration::from_secs(30);
/// Share of a child's time in which it should be done by itself.
const BY_ITSELF: f64 = 0.8;

/// The libraries that models may run in here, that which runs first.
#[derive(Debug, Clone)]
pub struct Libraries(Vec<PathBuf>);

impl Libraries {
    /// The one that runs, and unless one was named the others that are installed.
    pub fn of(named: Option<&Path>, running: &Path) -> Self {
        let others = installed(named).into_iter().filter(|library| library != running);
        Self([running.to_owned()].into_iter().chain(others).collect())
    }

    /// Where a result holds: machine, threads, the libraries' versions.
    pub fn place(&self, threads: usize) -> String {
        let mut versions: Vec<_> = self.0.iter().map(|library| version_of(library)).collect();
        versions.sort();
        format!("{}; {threads} threads; ONNX Runtime {}", host::machine(), versions.join(" and "))
    }
}

/// What to measure.
#[derive(Debug, Clone)]
pub struct Order {
    /// The model.
    pub model: Subject,
    /// How models run here: its setting is the reference.
    pub engine: Engine,
    /// In what.
    pub libraries: Libraries,
    /// Pictures to agree on: dumps of frames, JPEG or PNG files.
    pub pictures: Vec<PathBuf>,
}

/// Why there is no result.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Stopped {
    /// `cancel` was set.
    Canceled,
    /// In words.
    Failed(String),
}

/// Measures and judges. Blocks for `limits.wall` at most; `cancel` ends it at once.
///
/// # Errors
/// It was cancelled, or the reference could not be measured.
pub fn run(order: &Order, limits: &Limits, cancel: &AtomicBool) -> Result<Table, Stopped> {
    let end = Instant::now() + limits.wall;
    // The first library before and after the other: a box that grows busy slows both down.
    let passes: &[usize] = if order.libraries.0.len() > 1 { &[0, 1, 0] } else { &[0] };
    let share = limits.wall / passes.len().max(2) as u32;
    let mut measured: Vec<(PathBuf, Vec<Row>)> =
        order.libraries.0.iter().take(2).map(|library| (library.clone(), Vec::new())).collect();
    for &pass in passes {
        let (library, rows) = &mut measured[pass];
        match child(order, library, limits, (share, end), cancel) {
            Ok(added) => merge(rows, added),
            Err(Stopped::Failed(why)) if rows.is_empty() && pass > 0 => {
                rows.push(Row { late: true, ..Row::failed(order.engine.setting, why) });
            }
            // Measured once is enough where there is no time for more.
            Err(Stopped::Failed(_)) if !rows.is_empty() => {}
            Err(stopped) => return Err(stopped),
        }
    }
    judge(measured, order.engine.confidence).map_err(Stopped::Failed)
}

/// One library's rows. A setting that ends the child is left out, and the rest is measured anew.
fn child(
    order: &Order,
    library: &Path,
    limits: &Limits,
    (share, end): (Duration, Instant),
    cancel: &AtomicBool,
) -> Result<Vec<Row>, Stopped> {
    let engine = &order.engine;
    let mut lost: Vec<Row> = Vec::new();
    loop {
        let wall = share.min(end.saturating_duration_since(Instant::now()));
        let ask = Ask {
            model: order.model.clone(),
            library: library.to_owned(),
            reference: engine.setting,
            spinning: host::cores() > engine.setting.threads,
            left_out: lost.iter().map(|row| row.setting).collect(),
            custom_op_domains: engine.custom_op_domains.clone(),
            pictures: order.pictures.clone(),
            iou: engine.iou,
            budget_ms: wall.mul_f64(BY_ITSELF).as_millis() as u64,
        };
        let limits = Limits { wall, ..limits.clone() };
        let (mut seen, cores) = (Seen::default(), engine.cores.clone());
        let task = Task::Tune(Box::new(ask));
        let ended = proving::watch(task, cores, None, &limits, cancel, Instant::now(), &mut seen);
        let (status, killed) = ended.map_err(|e| Stopped::Failed(format!("no child: {e}")))?;
        if killed == Some(Killed::Canceled) {
            return Err(Stopped::Canceled);
        }
        if let (Some(measured), true) = (seen.measured.take(), status.success()) {
            return Ok(measured.rows.into_iter().chain(lost).collect());
        }
        let (.., what, _) = proving::cause(&seen, &limits, status, killed);
        let words = seen.last_words.lines().last().unwrap_or_default().to_owned();
        let guilty = seen.trying.filter(|setting| is_new(*setting, engine.setting, &lost));
        let Some(setting) = guilty else {
            return Err(Stopped::Failed(format!("the child {what} {words}").trim_end().to_owned()));
        };
        let late = killed == Some(Killed::Wall);
        lost.push(Row { late, ..Row::failed(setting, what) });
    }
}

/// Whether the rest can be measured without it: the reference is needed.
fn is_new(setting: Setting, reference: Setting, lost: &[Row]) -> bool {
    setting != reference && lost.iter().all(|row| row.setting != setting)
}

/// Another pass over a library. What failed in either is out.
fn merge(rows: &mut Vec<Row>, added: Vec<Row>) {
    if rows.is_empty() {
        *rows = added;
        return;
    }
    for row in rows {
        let Some(again) = added.iter().find(|again| again.setting == row.setting) else { continue };
        if row.late && again.error.is_none() {
            // What had no time in one pass may have had some in the other.
            *row = again.clone();
        } else if !again.late {
            row.wall_ms.extend(&again.wall_ms);
            row.cpu_ms.extend(&again.cpu_ms);
            row.error = row.error.take().or_else(|| again.error.clone());
        }
    }
}
