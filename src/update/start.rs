//! What a start of the process does to the machine: tries are counted before anything is loaded.

use super::digest::Digest;
use super::event::{Change, Effect, Stopped};
use super::job::{JobState, Life, Millis, Phase, Reason, Slot, State, TRIES};
use super::machine::Turn;

/// Where a model to start with comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    /// The slot's active model.
    Active,
    /// The slot's previous one.
    Previous,
    /// The configured factory file.
    Factory,
}

/// The models to start with, best first, after [`Event::Boot`](super::event::Event::Boot) was
/// worked off. None left = no model.
///
/// A factory file that was replaced goes before an active model that came from the old one. A
/// model in quarantine never starts by itself.
pub fn start_order(state: &State, factory: Option<Digest>) -> Vec<(Digest, Origin)> {
    let Slot { active, previous, from_factory, .. } = state.slot;
    let factory = factory.map(|d| (d, Origin::Factory));
    let mut order: Vec<(Digest, Origin)> = Vec::new();
    let replaced = factory.filter(|(d, _)| from_factory && Some(*d) != active);
    let stored = [active.map(|d| (d, Origin::Active)), previous.map(|d| (d, Origin::Previous))];
    for (digest, origin) in [replaced].into_iter().chain(stored).chain([factory]).flatten() {
        let known = order.iter().any(|(d, _)| *d == digest);
        if !known && !state.quarantine.contains_key(&digest) {
            order.push((digest, origin));
        }
    }
    order
}

impl Turn {
    pub(super) fn boot(&mut self, now: Millis, kernel_boot: String) {
        let before = std::mem::replace(&mut self.state.life, Life { kernel_boot, clean: false });
        self.changes.push(Change::Life(self.state.life.clone()));
        if before.clean {
            if let Some(probation) = &mut self.state.slot.probation {
                probation.power_cuts = 0;
                self.changes.push(Change::Slot(self.state.slot.clone()));
            }
            return;
        }
        let power_cut = before.kernel_boot != self.state.life.kernel_boot;
        if let Some(probation) = &mut self.state.slot.probation {
            match power_cut {
                true => probation.power_cuts += 1,
                false => probation.tries_left = probation.tries_left.saturating_sub(1),
            }
            let (tries_left, power_cuts) = (probation.tries_left, probation.power_cuts);
            let serial = probation.serial;
            // The rollback that the dead process may have begun used the epoch in between.
            self.state.slot.epoch += 2;
            self.changes.push(Change::Slot(self.state.slot.clone()));
            let reason = if tries_left == 0 {
                let text = format!("the service died {TRIES} times with this model on probation");
                Reason::new("killed_service", text)
            } else if power_cuts >= 2 {
                Reason::new("power_cut", "the power went twice with this model on probation")
            } else {
                return;
            };
            match self.take(serial, |_| true) {
                Some(job) => drop(self.fail_back(now, job, reason, tries_left == 0)),
                None => drop(self.slot_back(serial, None)),
            }
        } else if let Some(mut job) = self.state.job.take() {
            let own = job.phase != Some(Phase::AwaitingConfirm);
            job.deaths += u8::from(own && !power_cut && !job.holds_slot());
            if job.deaths >= TRIES {
                let text = format!("the service died {TRIES} times over this job");
                let quarantine = job.phase == Some(Phase::Loading);
                let reason = Reason::new("killed_service", text);
                let waiting = self.state.waiting.take();
                self.stop(now, job, Stopped::Failed, reason, quarantine);
                self.state.waiting = waiting;
            } else {
                self.changes.push(Change::Job(Box::new(job.clone())));
                self.state.job = Some(job);
            }
        }
    }

    pub(super) fn running(
        &mut self,
        now: Millis,
        model: Option<Digest>,
        from_factory: bool,
        why: Option<Reason>,
        quarantine: bool,
    ) {
        if model != self.state.slot.active {
            let reason =
                why.unwrap_or_else(|| Reason::new("unloadable", "the model can't be loaded"));
            let job = self.state.job.take_if(|j| j.holds_slot());
            match job {
                Some(job) if job.command().is_some() => {
                    drop(self.fail_back(now, job, reason, quarantine));
                }
                Some(job) => self.end(now, job, JobState::Failed, Some(reason)),
                None => {}
            }
            let slot = &mut self.state.slot;
            slot.probation = None;
            slot.active = model;
            slot.previous = slot.previous.filter(|p| Some(*p) != model);
            slot.from_factory = from_factory;
            slot.epoch += 1;
            self.changes.push(Change::Slot(slot.clone()));
        } else if from_factory && model.is_some() && !self.state.slot.from_factory {
            self.state.slot.from_factory = true;
            self.changes.push(Change::Slot(self.state.slot.clone()));
        }
        match self.state.job.take() {
            Some(job) if job.holds_slot() && job.command().is_some() => {
                let serial = job.serial;
                self.enter(now, job, Phase::Probation);
                self.after.push(Effect::Watch { serial });
            }
            // The slot was committed to it, and it is what runs.
            Some(job) if job.holds_slot() => self.commit(now, job),
            Some(job) => self.begin(now, job),
            None => self.next(now),
        }
    }
}
