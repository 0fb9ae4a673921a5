//! What is watched after a swap: that the worker took it, that the model stands its probation,
//! that no frame was lost. Pure rules over what the worker noted.

use std::time::{Duration, Instant};

use super::digest::Digest;
use super::job::{Millis, Reason};
use super::report::inference_quantile;
use crate::meter::Outcome;
use crate::model::file::Identity;

/// Without a frame for so long the pointer counts as taken: the worker loads it for the next one.
pub const IDLE_TAKES: Duration = Duration::from_secs(1);
/// How long the report waits for a camera's first result by the new model.
pub const REPORT_WAITS: Duration = Duration::from_secs(5);
/// Frames that probation wants to see at least.
pub const PROBATION_FRAMES: usize = 30;
/// So many runs over the budget at least tell a slow model from a hiccup of the machine: of a few
/// frames the 99th percentile is the longest.
pub const PROBATION_LATE: usize = 5;
/// A run that takes longer than so many medians, and than [`HANG_MIN`], hangs.
pub const HANG_RATIO: u32 = 10;
/// See [`HANG_RATIO`].
pub const HANG_MIN: Duration = Duration::from_secs(1);
/// After the run was asked to end; then nothing but the end of the process helps.
pub const HANG_GRACE: Duration = Duration::from_millis(500);
/// Beyond the accepted ratio of latencies: live frames share the cores with decoders.
const LIVE_MARGIN: f64 = 2.0;

/// A swap whose report is not made yet.
#[derive(Debug)]
pub struct Swapped {
    /// The job.
    pub serial: u64,
    /// The job's id.
    pub job: String,
    /// The epoch that began.
    pub epoch: u64,
    /// When the pointer was changed.
    pub at: Instant,
    /// When the job came in, by the wall clock.
    pub commanded: Millis,
    /// The wall clock at `at`.
    pub at_ms: Millis,
    /// The model before.
    pub from: Option<Identity>,
    /// The new one.
    pub to: Option<Identity>,
    /// Why, for a model that came back.
    pub reason: Option<Reason>,
    /// The machine was told that the worker took it.
    pub taken: bool,
}

impl Swapped {
    /// Whether the worker has taken the pointer: a result by the new epoch, or nothing to do.
    pub fn is_taken(&self, results: &[Vec<Outcome>], now: Instant) -> bool {
        let seen = results.iter().flatten().any(|r| r.epoch >= self.epoch);
        // The frame that was in work at the change ends after it, by the model before.
        let last = results.iter().flatten().map(|r| r.at).max().unwrap_or(self.at);
        seen || now.saturating_duration_since(last.max(self.at)) >= IDLE_TAKES
    }

    /// Whether every camera that gives results has given one by the new epoch, and the margin
    /// behind it is over.
    pub fn is_complete(&self, results: &[Vec<Outcome>], now: Instant) -> bool {
        let settled = |camera: &Vec<Outcome>| {
            let first = camera.iter().find(|r| r.epoch >= self.epoch);
            camera.is_empty() || first.is_some_and(|r| now - r.at > super::report::MARGIN)
        };
        now - self.at >= REPORT_WAITS || (self.taken && results.iter().all(settled))
    }
}

/// A model on probation.
#[derive(Debug)]
pub struct Probation {
    /// The job.
    pub serial: u64,
    /// The model.
    pub digest: Digest,
    /// Its epoch.
    pub epoch: u64,
    /// When it began.
    pub since: Instant,
    /// How long it lasts.
    pub lasts: Duration,
    /// What a run may take at the 99th percentile; `None` = nothing to compare with.
    pub budget: Option<Duration>,
}

impl Probation {
    /// What a run may take, from the runs of the model before.
    pub fn budget(
        before: &[Outcome],
        ratio_accepted: f64,
        configured: Option<Duration>,
    ) -> Option<Duration> {
        let p99 = inference_quantile(before.iter(), 0.99)?;
        let budget = p99.mul_f64(ratio_accepted * LIVE_MARGIN);
        Some(configured.map_or(budget, |c| c.max(budget)))
    }

    /// How it goes: `None` = not decided yet.
    pub fn verdict(&self, results: &[Vec<Outcome>], now: Instant) -> Option<Result<(), String>> {
        let of_epoch = || results.iter().flatten().filter(|r| r.epoch == self.epoch);
        let frames = of_epoch().count();
        let late = |budget: &Duration| of_epoch().filter(|r| r.inference > *budget).count();
        if frames >= PROBATION_FRAMES
            && let Some(budget) = self.budget.filter(|budget| late(budget) >= PROBATION_LATE)
            && let Some(p99) = inference_quantile(of_epoch(), 0.99)
            && p99 > budget
        {
            return Some(Err(format!(
                "its runs take {:.1} ms at the 99th percentile over {frames} frames, {:.1} ms are \
                 allowed",
                p99.as_secs_f64() * 1e3,
                budget.as_secs_f64() * 1e3
            )));
        }
        let enough = if self.lasts.is_zero() { 1 } else { PROBATION_FRAMES };
        (now - self.since >= self.lasts && frames >= enough).then_some(Ok(()))
    }
}

/// When a run counts as hanging, from the runs so far.
pub fn hangs_after(results: &[Vec<Outcome>]) -> Duration {
    let median = inference_quantile(results.iter().flatten(), 0.5).unwrap_or_default();
    (median * HANG_RATIO).max(HANG_MIN)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn results(start: Instant, epoch: u64, inference_ms: u64, count: u64) -> Vec<Vec<Outcome>> {
        let one = |i| Outcome {
            at: start + Duration::from_millis(10 * i),
            frame: i,
            epoch,
            inference: Duration::from_millis(inference_ms),
            queue: Duration::ZERO,
            total: Duration::ZERO,
        };
        vec![(0..count).map(one).collect()]
    }

    fn probation(since: Instant, lasts_s: u64) -> Probation {
        Probation {
            serial: 1,
            digest: Digest([0; 32]),
            epoch: 2,
            since,
            lasts: Duration::from_secs(lasts_s),
            budget: Some(Duration::from_millis(30)),
        }
    }

    #[test]
    fn a_frame_that_ends_after_the_swap_does_not_keep_it_open() {
        let start = Instant::now();
        let after = |ms| start + Duration::from_millis(ms);
        let swapped = Swapped {
            serial: 1,
            job: String::new(),
            epoch: 2,
            at: after(45),
            commanded: 0,
            at_ms: 0,
            from: None,
            to: None,
            reason: None,
            taken: false,
        };
        // The sixth result, 50 ms after the start, is by the model before; then none comes.
        let late = results(start, 1, 10, 6);
        assert!(!swapped.is_taken(&late, after(1040)));
        assert!(swapped.is_taken(&late, after(1050)), "or its hang is never seen");
        assert!(swapped.is_taken(&results(start, 2, 10, 6), after(50)));
        assert!(!swapped.is_taken(&[], after(1040)));
    }

    #[test]
    fn probation_wants_time_and_frames() {
        let start = Instant::now();
        let after = |s| start + Duration::from_secs(s);
        let probation = probation(start, 10);
        assert_eq!(probation.verdict(&results(start, 2, 10, 100), after(9)), None);
        assert_eq!(probation.verdict(&results(start, 2, 10, 29), after(60)), None);
        assert_eq!(
            probation.verdict(&results(start, 1, 10, 100), after(60)),
            None,
            "the old model's"
        );
        assert_eq!(probation.verdict(&results(start, 2, 10, 30), after(10)), Some(Ok(())));
    }

    #[test]
    fn a_model_over_its_budget_does_not_wait_for_the_end() {
        let start = Instant::now();
        let verdict = probation(start, 60).verdict(&results(start, 2, 50, 30), start);
        assert!(verdict.unwrap().unwrap_err().contains("50.0 ms"));
    }

    #[test]
    fn a_few_late_runs_of_thirty_are_the_machine_s() {
        let start = Instant::now();
        let after = start + Duration::from_secs(60);
        let mut results = results(start, 2, 10, 30);
        for (late, verdict) in [(PROBATION_LATE - 1, true), (PROBATION_LATE, false)] {
            results[0].iter_mut().take(late).for_each(|r| r.inference = Duration::from_secs(1));
            let found = probation(start, 60).verdict(&results, after).expect("time is over");
            assert_eq!(found.is_ok(), verdict, "{late} late runs: {found:?}");
        }
    }

    #[test]
    fn probation_of_no_time_ends_with_the_first_result() {
        let start = Instant::now();
        assert_eq!(probation(start, 0).verdict(&results(start, 2, 10, 1), start), Some(Ok(())));
    }

    #[test]
    fn the_budget_follows_the_model_before_and_what_was_accepted() {
        let before = &results(Instant::now(), 1, 10, 100)[0];
        let ms = Duration::from_millis;
        assert_eq!(Probation::budget(before, 1.5, None), Some(ms(30)));
        assert_eq!(Probation::budget(before, 3.0, None), Some(ms(60)));
        assert_eq!(Probation::budget(before, 1.5, Some(ms(100))), Some(ms(100)));
        assert_eq!(Probation::budget(&[], 1.5, None), None);
    }

    #[test]
    fn a_hang_is_ten_medians_and_a_second_at_least() {
        let start = Instant::now();
        assert_eq!(hangs_after(&results(start, 1, 20, 50)), Duration::from_secs(1));
        assert_eq!(hangs_after(&results(start, 1, 300, 50)), Duration::from_secs(3));
    }
}
