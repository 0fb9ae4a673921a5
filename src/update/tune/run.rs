//! The parent's part: a child for each library, a duel of their best, and what becomes of those that die.

use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use super::{Ask, Pick, Row, Table, finalists, judge, quartile};
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

    /// Where a result holds: machine, threads, versions of the libraries and of this program, which
    /// computes some of a model itself.
    pub fn place(&self, threads: usize) -> String {
        let mut versions: Vec<_> = self.0.iter().map(|library| version_of(library)).collect();
        versions.sort();
        let (machine, own, versions) =
            (host::machine(), env!("CARGO_PKG_VERSION"), versions.join(" and "));
        format!("{machine}; {threads} threads; noblink {own}, ONNX Runtime {versions}")
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
    let confidence = order.engine.confidence;
    // The last share is the duel's.
    let share = limits.wall / (order.libraries.0.len() + 1).min(3) as u32;
    let mut measured: Vec<(PathBuf, Vec<Row>)> = Vec::new();
    for library in order.libraries.0.iter().take(2) {
        let rows = match child(order, library, None, limits, (share, end), cancel) {
            Err(Stopped::Failed(why)) if !measured.is_empty() => {
                vec![Row { late: true, ..Row::failed(order.engine.setting, why) }]
            }
            rows => rows?,
        };
        measured.push((library.clone(), rows));
    }
    if let Some(picks) = finalists(&measured, confidence) {
        settle(&mut measured, &picks, &duel(order, &picks, limits, end, cancel)?);
    }
    judge(&measured, confidence).map_err(Stopped::Failed)
}

/// The rows of two settings of two libraries, which were measured in turns with each other; none of a
/// child that failed.
fn duel(
    order: &Order,
    picks: &[Pick; 2],
    limits: &Limits,
    end: Instant,
    cancel: &AtomicBool,
) -> Result<[Option<Row>; 2], Stopped> {
    let fight = |pick: &Pick| {
        let time = (end.saturating_duration_since(Instant::now()), end);
        match child(order, &pick.library, Some(pick.setting), limits, time, cancel) {
            Ok(rows) => Ok(rows.into_iter().next()),
            // What was measured before has to do.
            Err(Stopped::Failed(_)) => Ok(None),
            Err(Stopped::Canceled) => Err(Stopped::Canceled),
        }
    };
    let [here, other] = std::thread::scope(|threads| {
        let there = threads.spawn(|| fight(&picks[1]));
        [fight(&picks[0]), there.join().expect("it does not panic")]
    });
    Ok([here?, other?])
}

/// Sets the times of the other library by those of a duel. What failed in it is out.
fn settle(measured: &mut [(PathBuf, Vec<Row>)], picks: &[Pick; 2], fought: &[Option<Row>; 2]) {
    let mut factor = 1.0;
    for ((pick, fought), (_, rows)) in picks.iter().zip(fought).zip(&mut *measured) {
        let row = rows.iter_mut().find(|row| row.setting == pick.setting);
        let (Some(row), Some(fought)) = (row, fought) else { return };
        if !fought.late {
            row.error = fought.error.clone();
        }
        let (Some(alone), Some(fought)) = (quartile(&row.wall_ms), quartile(&fought.wall_ms))
        else {
            return;
        };
        factor = fought / alone / factor;
    }
    let others = measured.iter_mut().skip(1).flat_map(|(_, rows)| rows);
    others.flat_map(|row| &mut row.wall_ms).for_each(|ms| *ms *= factor);
}

/// One library's rows. A setting that ends the child is left out, and the rest is measured anew.
fn child(
    order: &Order,
    library: &Path,
    duel: Option<Setting>,
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
            duel,
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Provider;

    const HERE: Setting =
        Setting { provider: Provider::Cpu, threads: 2, spinning: false, bf16: false };
    const THERE: Setting = Setting { provider: Provider::OpenVino, ..HERE };
    const ALSO: Setting = Setting { threads: 1, ..THERE };

    fn row(setting: Setting, ms: f64) -> Row {
        Row { wall_ms: vec![ms; 3], ..Row::new(setting) }
    }

    fn settled(fought: [Option<Row>; 2]) -> Vec<Row> {
        let [here, there] = ["/a.so", "/b.so"].map(PathBuf::from);
        let picks = [(&here, HERE), (&there, THERE)];
        let picks = picks.map(|(library, setting)| Pick { library: library.clone(), setting });
        let rows = vec![row(THERE, 8.0), row(ALSO, 12.0)];
        let mut measured = [(here, vec![row(HERE, 10.0)]), (there, rows)];
        settle(&mut measured, &picks, &fought);
        measured.into_iter().flat_map(|(_, rows)| rows).collect()
    }

    #[test]
    fn a_duel_sets_the_times_of_the_other_library() {
        let times = |fought| settled(fought).iter().map(|row| row.wall_ms[0]).collect::<Vec<_>>();
        // The box has grown busy for both; in turns with the first one the second is no faster.
        let fought = || [Some(row(HERE, 20.0)), Some(row(THERE, 20.0))];
        assert_eq!(times(fought()), [10.0, 10.0, 15.0]);
        let [one, other] = fought();
        assert_eq!(times([None, other]), [10.0, 8.0, 12.0], "one had nobody to fight");
        assert_eq!(times([one, None]), [10.0, 8.0, 12.0], "one had nobody to fight");
        let late = Row { late: true, ..Row::failed(THERE, "no time".into()) };
        let rows = settled([Some(row(HERE, 20.0)), Some(late)]);
        assert_eq!((rows[1].wall_ms[0], &rows[1].error), (8.0, &None));
    }

    #[test]
    fn who_fails_in_a_duel_is_out() {
        let rows = settled([Some(row(HERE, 9.0)), Some(Row::failed(THERE, "it died".into()))]);
        let errors: Vec<_> = rows.iter().map(|row| row.error.as_deref()).collect();
        assert_eq!(errors, [None, Some("it died"), None]);
    }
}
