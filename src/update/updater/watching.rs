//! What is looked at after a swap: that the worker took it, that the model stands its probation.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tracing::{error, info, warn};

use super::super::event::{Event, Step};
use super::super::failpoint;
use super::super::gates::{self, Seen};
use super::super::job::{Gate, Reason};
use super::super::report;
use super::super::steps;
use super::super::watch::{self, Probation};
use super::{BEFORE, Thread, now_ms};
use crate::host;
use crate::meter::Outcome;
use crate::model::engine::Model;
use crate::queue::LaneSnapshot;

impl Thread {
    pub(super) fn watch(&mut self, serial: u64) {
        let Some(job) = self.job(serial) else { return };
        let Some(digest) = job.digest else { return };
        let command = job.command();
        let manifest = steps::manifest_of(command.and_then(|c| c.manifest.as_deref()));
        let models = &self.parts.config.models;
        let keys = !self.keys.is_empty();
        let accepted = command.and_then(|c| steps::accepted_ratio(c, manifest.as_ref(), keys));
        let ratio = accepted.unwrap_or(0.0).max(models.latency_ratio_max);
        let budget = models.latency_budget_ms.map(|ms| Duration::from_secs_f64(ms / 1e3));
        let epoch = self.keeper.state().slot.epoch;
        let before = self.results(BEFORE);
        let before: Vec<Outcome> =
            before.into_iter().flatten().filter(|r| r.epoch < epoch).collect();
        self.probation = Some(Probation {
            serial,
            digest,
            epoch,
            since: Instant::now(),
            lasts: Duration::from_secs(models.probation_s),
            budget: Probation::budget(&before, ratio, budget),
        });
    }

    pub(super) fn results(&self, back: Duration) -> Vec<Vec<Outcome>> {
        let now = Instant::now();
        self.parts.meter.results(now.checked_sub(back).unwrap_or(now))
    }

    pub(super) fn tick(&mut self) {
        let now = Instant::now();
        if self.drops.back().is_none_or(|(at, _)| now - *at >= Duration::from_secs(1)) {
            self.drops.push_back((now, self.dropped()));
            while self
                .drops
                .front()
                .is_some_and(|(at, _)| now - *at > BEFORE + Duration::from_secs(10))
            {
                self.drops.pop_front();
            }
        }
        self.watch_hang(now);
        if self.probation.is_some() {
            self.watch_probation(now);
        }
        if !self.swaps.is_empty() {
            self.watch_swaps(now);
        }
        if self.retired && self.swaps.iter().all(|s| s.taken) {
            self.retire();
        }
        self.tune(now);
    }

    /// Frames dropped because of us, all cameras together.
    pub(super) fn dropped(&self) -> u64 {
        let of = |l: &LaneSnapshot| {
            let d = l.ledger.dropped;
            d.full + d.overload + d.no_model
        };
        self.parts.intake.snapshot().iter().map(of).sum()
    }

    /// A run that hangs is asked to end. On probation that is the model's end; a committed one loses
    /// the frame and goes on with the next. What does not end takes the process with it.
    pub(super) fn watch_hang(&mut self, now: Instant) {
        let busy = self.parts.pulse.busy().filter(|(busy, _)| *busy >= watch::HANG_MIN);
        let hangs = busy.filter(|(busy, _)| *busy >= watch::hangs_after(&self.results(BEFORE)));
        let Some((busy, epoch)) = hangs else {
            if self.terminated.take().is_some()
                && let Some(live) = self.parts.slot.load()
            {
                live.model.resume();
            }
            return;
        };
        let busy_s = busy.as_secs_f64();
        let Some(asked) = self.terminated else {
            warn!("a run hangs for {busy_s:.1} s: it is asked to end");
            if !failpoint::leaves_out(failpoint::DEAF) {
                self.terminate(epoch);
            }
            self.terminated = Some(now);
            return;
        };
        if now - asked < watch::HANG_GRACE {
            return;
        }
        let text = format!("a run hung for {busy_s:.1} s and did not end");
        match self.probation.as_ref().filter(|p| p.epoch == epoch) {
            Some(probation) => {
                error!("{text}: the service ends and starts with the model before");
                let (serial, reason) = (probation.serial, Reason::new("hang", text));
                // Committed before the end; the swap that follows it is for nobody.
                let gates = vec![self.probation_gate(probation, Some(&reason))];
                let failed = Event::ProbationFailed { now: now_ms(), serial, reason, gates };
                drop(self.keeper.handle(failed, &mut |_| ()));
            }
            None => error!("{text}: the service ends, to be started again"),
        }
        std::process::exit(1);
    }

    /// Asks the model of this epoch to end its run: the one in the slot, or one that has left it.
    fn terminate(&self, epoch: u64) {
        let live = self.parts.slot.load();
        let is_live =
            |model: &Arc<Model>| live.as_ref().is_some_and(|live| Arc::ptr_eq(&live.model, model));
        let in_slot = live.as_ref().is_some_and(|live| live.epoch == epoch);
        self.warm.values().filter(|m| is_live(m) == in_slot).for_each(|m| m.terminate());
    }

    pub(super) fn watch_probation(&mut self, now: Instant) {
        let Some(probation) = &self.probation else { return };
        let (serial, epoch) = (probation.serial, probation.epoch);
        let failed = self.parts.slot.failure(epoch);
        let verdict = match failed {
            Some(why) => Some(Err(Reason::new("run_failed", why))),
            None => probation
                .verdict(&self.results(probation.lasts + BEFORE), now)
                .map(|v| v.map_err(|why| Reason::new("latency", why))),
        };
        match verdict {
            None => {}
            Some(Ok(())) => {
                let gate = self.probation_gate(probation, None);
                info!("probation: {}", gate.message);
                self.probation = None;
                let (step, gates) = (Step::Passed, vec![gate]);
                self.handle(Event::Done { now: now_ms(), serial, step, gates });
            }
            Some(Err(reason)) => {
                warn!("the new model failed its probation: {reason}");
                let gates = vec![self.probation_gate(probation, Some(&reason))];
                self.probation = None;
                self.handle(Event::ProbationFailed { now: now_ms(), serial, reason, gates });
            }
        }
    }

    /// What the model on probation did, beside the one before; `failed` = why it goes.
    fn probation_gate(&self, probation: &Probation, failed: Option<&Reason>) -> Gate {
        let (epoch, meter) = (probation.epoch, &self.parts.meter);
        let previous = self.keeper.state().slot.previous;
        let labels = |digest| Some(&self.warm.get(&digest)?.contract().labels[..]);
        let (old, new) = (meter.tally_before(epoch), meter.tally(epoch));
        let seen = |tally, digest| Some(Seen { tally, labels: labels(digest)? });
        let before = old.as_ref().zip(previous).and_then(|(tally, digest)| seen(tally, digest));
        let after = new.as_ref().and_then(|tally| seen(tally, probation.digest));
        let results = self.results(probation.lasts + BEFORE);
        let runs = results.iter().flatten().filter(|r| r.epoch == epoch);
        let p99 = report::inference_quantile(runs, 0.99);
        gates::probation(failed, before, after, p99, probation.budget)
    }

    pub(super) fn watch_swaps(&mut self, now: Instant) {
        let results = self.results(BEFORE + Duration::from_secs(10));
        let mut taken = Vec::new();
        for swap in &mut self.swaps {
            if !swap.taken && swap.is_taken(&results, now) {
                swap.taken = true;
                taken.push(swap.serial);
            }
        }
        for serial in taken {
            let step = Step::Switched;
            self.handle(Event::Done { now: now_ms(), serial, step, gates: Vec::new() });
        }
        while let Some(swap) = self.swaps.pop_front() {
            if !swap.is_complete(&results, now) {
                self.swaps.push_front(swap);
                break;
            }
            self.report_swap(&swap, &results, now);
        }
    }

    pub(super) fn retire(&mut self) {
        self.retired = false;
        let state = self.keeper.state();
        let candidate = state.job.as_ref().and_then(|j| j.digest);
        let keep =
            [state.slot.active, state.slot.probation.as_ref().and(state.slot.previous), candidate];
        let before = self.warm.len();
        self.warm.retain(|digest, _| keep.contains(&Some(*digest)));
        if self.warm.len() < before {
            host::give_memory_back();
        }
    }
}
