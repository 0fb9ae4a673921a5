//! The latency gate: the candidate and the active model in turns, in one process, by CPU time.
//!
//! A time measured at another moment, or by the clock on the wall of a busy box, says nothing; the
//! ratio of two models that take turns does.

use std::time::Duration;

use serde_json::json;

use super::super::job::{Gate, Reason, Verdict};
use super::request::Latency;
use super::shift::median;
use super::wire::Who;
use super::{failed, gate};
use crate::records::rounded;

/// Quartets (one model, twice the other, the one again) after which it may be clear already: 16
/// pairs. Of a model that is as slow as the limit seven of the eight would have to be off by
/// [`CLOSE`], all in the same direction.
const QUARTETS_MIN: usize = 8;
/// Those where it is not: 30 pairs. The first quartet, with everything cold, is but one of those whose
/// median is taken.
const QUARTETS: usize = 15;
/// Those at most: on a busy box the ratio of 30 pairs is off by a quarter now and then, so as long as
/// it is within that of the limit, more are measured.
const QUARTETS_MAX: usize = 4 * QUARTETS;
const CLOSE: f64 = 1.3;

/// One frame.
#[derive(Debug, Clone, Copy)]
pub(super) struct Run {
    /// Of all threads.
    pub(super) cpu: Duration,
    pub(super) wall: Duration,
}

/// Times of one model, in milliseconds a frame: the mean of both runs of a quartet each.
#[derive(Debug, Clone, Default)]
struct Times {
    cpu_ms: Vec<f64>,
    wall_ms: Vec<f64>,
}

/// Takes the times of both models: the candidate, twice the active model, the candidate again, over
/// and over. There and back, since whoever comes first finds colder caches, and a run that follows one
/// of its own model differs from one that does not.
#[derive(Debug, Default)]
pub(super) struct Stopwatch {
    /// Of the quartet that is not yet whole.
    runs: Vec<Run>,
    candidate: Times,
    active: Times,
}

impl Stopwatch {
    /// Whose turn it is.
    pub(super) fn next(&self) -> Who {
        if matches!(self.runs.len(), 0 | 3) { Who::Candidate } else { Who::Active }
    }

    /// Notes a run of the model whose turn it is.
    pub(super) fn note(&mut self, who: Who, run: Run) {
        assert_eq!(who, self.next(), "the models take turns");
        self.runs.push(run);
        let &[first, second, third, fourth] = &self.runs[..] else { return };
        self.runs.clear();
        self.candidate.add(first, fourth);
        self.active.add(second, third);
    }

    /// Whether to measure on.
    pub(super) fn wants_more(&self, rules: &Latency) -> bool {
        let quartets = self.candidate.cpu_ms.len();
        if quartets < QUARTETS_MIN {
            return true;
        }
        if self.is_clear(rules) {
            return false;
        }
        let is_close = (1.0 / CLOSE..CLOSE).contains(&(self.ratio() / limit(rules)));
        quartets < QUARTETS || (quartets < QUARTETS_MAX && is_close)
    }

    /// All quartets but one at most are within the limit, or all beyond it, and far from it.
    fn is_clear(&self, rules: &Latency) -> bool {
        let limit = limit(rules);
        let within = self.ratios().filter(|ratio| CLOSE * ratio < limit).count();
        let beyond = self.ratios().filter(|ratio| *ratio > CLOSE * limit).count();
        // A budget is held against the medians of as many runs as there can be.
        let clear = if rules.budget_ms.is_some() { within } else { within.max(beyond) };
        clear + 1 >= self.candidate.cpu_ms.len()
    }

    fn ratios(&self) -> impl Iterator<Item = f64> {
        let quartets = self.candidate.cpu_ms.iter().zip(&self.active.cpu_ms);
        quartets.map(|(new, old)| new / old.max(1e-6))
    }

    /// The median of the quartets' own ratios. Not the ratio of the medians: when the box grows busy
    /// half way, one model's median is from before and the other's from after.
    fn ratio(&self) -> f64 {
        median(self.ratios().collect()).unwrap_or(0.0)
    }

    /// Judges; `cores` is how many of them a run can use.
    pub(super) fn judge(self, rules: &Latency, cores: usize) -> (Gate, Option<Reason>) {
        let (pairs, ratio) = (2 * self.candidate.cpu_ms.len(), self.ratio());
        let (cpu, wall) = self.candidate.medians();
        let (active_cpu, active_wall) = self.active.medians();
        // As if the cores had nothing else to do, and so at most.
        let per_camera =
            |cpu_ms: f64| 1000.0 * cores as f64 / cpu_ms.max(1e-6) / rules.cameras.max(1) as f64;
        let mut numbers = json!({
            "pairs": pairs,
            "ratio": rounded(ratio, 3),
            "ratio_max": rules.ratio_max,
            "budget_ms": rules.budget_ms,
            "accept_slower": rules.accept_slower,
            "candidate_cpu_ms": rounded(cpu, 3),
            "active_cpu_ms": rounded(active_cpu, 3),
            "candidate_wall_ms": rounded(wall, 3),
            "active_wall_ms": rounded(active_wall, 3),
            "frames_per_s_per_camera": rounded(per_camera(cpu), 1),
        });
        let times = format!("{cpu:.1} ms of CPU a frame, the active model {active_cpu:.1}");
        let allowed = if ratio <= rules.ratio_max {
            Some(format!("{ratio:.2} times the active model's time: {times}"))
        } else if let Some(budget) = rules.budget_ms.filter(|budget| wall <= *budget) {
            numbers["allowed_by"] = json!("latency_budget_ms");
            Some(format!(
                "{ratio:.2} times slower, but {wall:.1} ms are within {budget} ms: {times}"
            ))
        } else if let Some(accepted) = rules.accept_slower.filter(|accepted| ratio <= *accepted) {
            numbers["allowed_by"] = json!("accept_slower");
            Some(format!("{ratio:.2} times slower, {accepted} is accepted for it: {times}"))
        } else {
            None
        };
        match allowed {
            Some(message) => (gate("latency", Verdict::Passed, message, numbers), None),
            None => {
                let reason =
                    Reason::new("too_slow", refusal(rules, ratio, &times, per_camera(cpu)));
                (failed("latency", &reason, numbers), Some(reason))
            }
        }
    }
}

/// The greatest ratio that is allowed.
fn limit(rules: &Latency) -> f64 {
    rules.accept_slower.map_or(rules.ratio_max, |accepted| accepted.max(rules.ratio_max))
}

impl Times {
    /// Adds a quartet.
    fn add(&mut self, first: Run, second: Run) {
        let mean = |a: Duration, b: Duration| (a + b).as_secs_f64() * 1e3 / 2.0;
        self.cpu_ms.push(mean(first.cpu, second.cpu));
        self.wall_ms.push(mean(first.wall, second.wall));
    }

    fn medians(self) -> (f64, f64) {
        (median(self.cpu_ms).unwrap_or(0.0), median(self.wall_ms).unwrap_or(0.0))
    }
}

fn refusal(rules: &Latency, ratio: f64, times: &str, per_camera: f64) -> String {
    let cameras = match rules.cameras {
        0 | 1 => "the camera".to_owned(),
        n => format!("each of {n} cameras"),
    };
    let accept = (ratio * 10.0).ceil() / 10.0;
    let limit = limit(rules);
    format!(
        "is {ratio:.2} times slower than the active model, {limit} is allowed ({times}); \
         {per_camera:.1} frames/s at most would be left for {cameras}. To allow it: \
         --accept-slower {accept} for this model, latency_ratio_max or latency_budget_ms in [models]"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    const RULES: Latency =
        Latency { ratio_max: 1.5, budget_ms: None, accept_slower: None, cameras: 1 };

    /// A quartet of these times.
    fn quartet(watch: &mut Stopwatch, new: f64, old: f64) {
        for _ in 0..4 {
            let who = watch.next();
            let ms = if who == Who::Candidate { new } else { old };
            let time = Duration::from_secs_f64(ms / 1e3);
            watch.note(who, Run { cpu: time, wall: time });
        }
    }

    /// How many pairs it takes with these ratios over and over.
    fn pairs(rules: &Latency, ratios: &[f64]) -> usize {
        let mut watch = Stopwatch::default();
        for ratio in ratios.iter().cycle() {
            if !watch.wants_more(rules) {
                break;
            }
            quartet(&mut watch, *ratio, 1.0);
        }
        2 * watch.candidate.cpu_ms.len()
    }

    #[test]
    fn it_takes_as_many_pairs_as_the_judgement_needs() {
        assert_eq!(pairs(&RULES, &[1.0]), 16, "far below the limit");
        assert_eq!(pairs(&RULES, &[3.0]), 16, "far above");
        let once = [1.0, 1.0, 1.6, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0];
        assert_eq!(pairs(&RULES, &once), 16, "one that something hit");
        assert_eq!(pairs(&RULES, &[1.0, 1.0, 1.6, 1.0, 3.0, 1.0, 1.0, 1.0]), 30, "two");
        assert_eq!(pairs(&RULES, &[1.4]), 120, "close");
        let rules = Latency { accept_slower: Some(3.0), ..RULES };
        assert_eq!(pairs(&rules, &[2.8]), 120, "close to what is accepted");
        assert_eq!(pairs(&rules, &[1.5]), 16, "far below what is accepted");
        assert_eq!(pairs(&Latency { accept_slower: Some(1.1), ..RULES }, &[1.1]), 16);
        let rules = Latency { budget_ms: Some(5.0), ..RULES };
        assert_eq!(pairs(&rules, &[3.0]), 30, "far above, but there is a budget");
        assert_eq!(pairs(&rules, &[1.0]), 16, "far below, with a budget");
    }

    #[test]
    fn quartets_that_nobody_asked_for_begin_no_round() {
        let mut watch = Stopwatch::default();
        for n in 0..16 {
            quartet(&mut watch, if n % 5 == 0 { 1.3 } else { 1.0 }, 1.0);
        }
        assert!(!watch.is_clear(&RULES) && !watch.wants_more(&RULES));
        for _ in 16..=QUARTETS_MAX {
            quartet(&mut watch, 1.4, 1.0);
        }
        assert!(!watch.wants_more(&RULES), "the most is the most");
    }

    #[test]
    fn a_box_that_grows_busy_half_way_does_not_change_the_ratio() {
        let mut watch = Stopwatch::default();
        // Seven quartets idle, seven busy, one in between that hits the candidate only.
        for n in 0..QUARTETS {
            let (new, old) = match n {
                0..7 => (1.1, 1.0),
                7 => (2.0, 1.0),
                _ => (2.2, 2.0),
            };
            quartet(&mut watch, new, old);
        }
        let medians = (watch.candidate.clone().medians().0, watch.active.clone().medians().0);
        assert!(medians.0 / medians.1 > 1.5, "as it was: {medians:?}");
        assert!(!watch.wants_more(&RULES));
        let (gate, refused) = watch.judge(&RULES, 2);
        assert_eq!((gate.verdict, refused), (Verdict::Passed, None), "{gate:?}");
        assert_eq!(gate.numbers["ratio"], 1.1);
    }
}
