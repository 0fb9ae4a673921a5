//! The report on a swap: the proof that no frame was lost to it. Pure: made from what the worker
//! noted of each result.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use serde::Serialize;

use super::job::Reason;
use crate::meter::Outcome;
use crate::model::file::Identity;
use crate::records::rounded;

/// How far before and after the change results are looked at for the longest gap.
pub const MARGIN: Duration = Duration::from_secs(1);

/// `models/swaps`
#[derive(Debug, Clone, Serialize)]
pub struct SwapReport {
    /// `noblink.swap/1`
    pub schema: &'static str,
    /// Device id.
    pub device: String,
    /// Changes with each start of the process.
    pub boot: String,
    /// When the report was made.
    pub time: String,
    /// The job.
    pub job: String,
    /// The epoch that began with it.
    pub epoch: u64,
    /// The model before; null = none.
    pub from: Option<Identity>,
    /// The model from then on; null = none.
    pub to: Option<Identity>,
    /// Why, for a model that came back.
    pub reason: Option<Reason>,
    /// Offered frames that ended neither inferred nor dropped for a reason, plus drops in the
    /// window beyond what the time before predicts.
    pub frames_lost: u64,
    /// Frames dropped in the window.
    pub dropped_window: u64,
    /// Frames that the time before lets expect to be dropped in a window as long.
    pub dropped_expected: f64,
    /// A camera was overloaded.
    pub overloaded: bool,
    /// From the command to the first result by the new model; null = no frame came.
    pub command_to_result_ms: Option<f64>,
    /// By phase.
    pub phases_ms: BTreeMap<String, f64>,
    /// By camera; those without a result on either side are left out.
    pub cameras: BTreeMap<String, CameraSwap>,
}

/// One camera around a swap.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct CameraSwap {
    /// Last frame by the model before.
    pub last_old: Option<u64>,
    /// First frame by the new one.
    pub first_new: Option<u64>,
    /// Longest time between two results around the swap.
    pub longest_gap_ms: f64,
    /// Longest time between two results in the time before.
    pub expected_gap_ms: f64,
    /// When the results around the swap were there, by the model before and by the new one,
    /// milliseconds from the moment at which the pointer was changed.
    pub old_ms: Vec<f64>,
    /// See `old_ms`.
    pub new_ms: Vec<f64>,
}

/// Looks at one camera's results, oldest first: those of `before` are by epochs below `epoch`.
pub fn camera_swap(results: &[Outcome], epoch: u64, swapped: Instant) -> Option<CameraSwap> {
    let change = results.partition_point(|r| r.epoch < epoch);
    let (old, new) = results.split_at(change);
    if old.is_empty() && new.is_empty() {
        return None;
    }
    let begin = swapped.checked_sub(MARGIN).unwrap_or(swapped);
    let end = new.first().map_or(swapped, |r| r.at) + MARGIN;
    let longest = |within: &dyn Fn(Instant) -> bool| {
        let gaps = results.windows(2).filter(|pair| within(pair[1].at));
        let longest = gaps.map(|pair| pair[1].at - pair[0].at).max().unwrap_or_default();
        rounded(longest.as_secs_f64() * 1e3, 2)
    };
    let around = |results: &[Outcome]| {
        let ms = |at: Instant| match at.checked_duration_since(swapped) {
            Some(after) => after.as_secs_f64() * 1e3,
            None => -(swapped - at).as_secs_f64() * 1e3,
        };
        let near = results.iter().filter(|r| r.at >= begin && r.at <= end);
        near.map(|r| rounded(ms(r.at), 1)).collect()
    };
    Some(CameraSwap {
        old_ms: around(old),
        new_ms: around(new),
        last_old: old.last().map(|r| r.frame),
        first_new: new.first().map(|r| r.frame),
        longest_gap_ms: longest(&|at| at >= begin && at <= end),
        expected_gap_ms: longest(&|at| at < begin),
    })
}

/// The `q` quantile of the model's own run time over these results; `None` = no result.
pub fn inference_quantile<'a>(
    results: impl Iterator<Item = &'a Outcome>,
    q: f64,
) -> Option<Duration> {
    let mut times: Vec<_> = results.map(|r| r.inference).collect();
    times.sort_unstable();
    let last = times.len().checked_sub(1)?;
    times.get((last as f64 * q).round() as usize).copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn results(start: Instant, times_ms: &[u64], epoch_from: usize) -> Vec<Outcome> {
        let one = |(i, ms): (usize, &u64)| Outcome {
            at: start + Duration::from_millis(*ms),
            frame: i as u64,
            epoch: if i < epoch_from { 1 } else { 2 },
            inference: Duration::from_millis(i as u64),
            queue: Duration::ZERO,
            total: Duration::ZERO,
        };
        times_ms.iter().enumerate().map(one).collect()
    }

    #[test]
    fn the_gap_over_the_change_is_told_apart_from_those_before() {
        let start = Instant::now();
        let times = [0, 100, 250, 350, 450, 2000, 2100, 2220, 2300];
        let results = results(start, &times, 7);
        let report = camera_swap(&results, 2, start + Duration::from_millis(2150)).unwrap();
        assert_eq!((report.last_old, report.first_new), (Some(6), Some(7)));
        assert_eq!(report.longest_gap_ms, 1550.0, "the margin begins at 1150 ms");
        assert_eq!(report.expected_gap_ms, 150.0);
        assert_eq!(report.old_ms, [-150.0, -50.0]);
        assert_eq!(report.new_ms, [70.0, 150.0]);
    }

    #[test]
    fn a_camera_without_results_is_left_out() {
        assert_eq!(camera_swap(&[], 2, Instant::now()), None);
    }

    #[test]
    fn quantiles_of_few_results() {
        let results = results(Instant::now(), &[0, 1, 2], 0);
        assert_eq!(inference_quantile(results.iter(), 0.5), Some(Duration::from_millis(1)));
        assert_eq!(inference_quantile(results.iter(), 0.99), Some(Duration::from_millis(2)));
        assert_eq!(inference_quantile([].iter(), 0.5), None);
    }
}
