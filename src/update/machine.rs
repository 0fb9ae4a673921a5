//! The state machine of an update: pure, `(state, event) → (state, effects)`.
//!
//! ```text
//!  Install ──admission refused──────────────────────────────────────────────► REJECTED
//!     │
//!     ├─ slot held, or a rollback under way ─► QUEUED (mailbox: one deep, newest wins)
//!     ▼                                          │ that job ended
//!  IN_PROGRESS                                   ▼
//!   receiving ─► verifying ─► proving ─► loading ─┬──────────────────► switching ─► probation
//!       │            │           │          │     │                       ▲  │          │
//!       │            │           │          │     └► awaiting_confirm ────┘  │          ├─ passed:
//!       │            │           │          │              │     confirm     │          │  SUCCEEDED
//!       ▼            ▼           ▼          ▼              ▼                 ▼          │  (committed)
//!   gate says no: REJECTED · can't: FAILED · too long: TIMED_OUT       failed, or rolled back by hand:
//!   cancel, newer install, rollback: CANCELED                          FAILED (rolled_back)
//!
//!  Rollback ─► verifying ─► loading ─► switching ─► SUCCEEDED (committed)
//!      └─ session still warm ────────────►┘
//! ```
//!
//! `commands` holds what a command does, `start` what a start of the process does.
//!
//! * Left of `switching` the running model is untouched, and a restart begins again at
//!   `receiving` (what was fetched is in the store). A service that dies twice over one job there
//!   fails it.
//! * Entering `switching` commits the slot first and gives the pointer second. The way back gives
//!   the pointer first: the previous model is warm, and a death in between is a death on
//!   probation, for which `Boot` leaves a gap in the epochs.
//! * A death on probation costs one of [`TRIES`], counted before the next load; a stop in good
//!   order none; a power cut none either, but the second in a row ends the probation.
//! * Only a person brings a failed model back: its digest is in quarantine.

use super::commands::Asked;
use super::digest::Digest;
use super::event::{Answer, Change, Effect, Event, Step, Stopped};
use super::job::{
    ENDED_MAX, Ended, Gate, Job, JobState, Millis, Phase, Probation, Reason, State, TRIES, Task,
    Way,
};

/// Gate results that a job keeps: more than there are gates, so that a bug can't grow a job.
const GATES_MAX: usize = 32;

/// Moves the machine by one event.
///
/// The effects are to be done in order. At most one of them is a [`Effect::Commit`]; everything
/// but a swap back from probation comes after it.
pub fn step(state: State, event: Event) -> (State, Vec<Effect>) {
    let mut turn = Turn { state, before: Vec::new(), changes: Vec::new(), after: Vec::new() };
    match event {
        Event::Boot { now, kernel_boot } => turn.boot(now, kernel_boot),
        Event::Running { now, model, from_factory, why, quarantine } => {
            turn.running(now, model, from_factory, why, quarantine);
        }
        Event::Stop { .. } => {
            turn.state.life.clean = true;
            turn.changes.push(Change::Life(turn.state.life.clone()));
        }
        Event::Install { now, command, admission } => turn.install(now, *command, admission),
        Event::Rollback { now, id, way, from, to, warm, in_store } => {
            turn.rollback(now, Asked { id, way, from, to }, warm, in_store);
        }
        Event::Cancel { now, id, job } => turn.cancel(now, id, job.as_deref()),
        Event::Confirm { now, id, job } => turn.confirm(now, id, job.as_deref()),
        Event::CloseBreaker { now, id, way } => turn.close(now, id, way),
        Event::Release { id, digest, .. } => {
            if turn.state.quarantine.remove(&digest).is_some() {
                turn.changes.push(Change::Release { digest });
            }
            turn.answer(id, Answer::Done);
        }
        Event::Done { now, serial, step, gates } => {
            if let Some(job) = turn.take(serial, |_| true) {
                turn.done(now, job, step, gates);
            }
        }
        Event::Ended { now, serial, how, reason, gates, quarantine } => {
            if let Some(mut job) = turn.take(serial, |j| !j.holds_slot()) {
                add_gates(&mut job, gates);
                turn.stop(now, job, how, reason, quarantine);
            }
        }
        Event::ProbationFailed { now, serial, reason, gates } => {
            if let Some(mut job) = turn.take(serial, |j| j.holds_slot() && j.command().is_some()) {
                add_gates(&mut job, gates);
                turn.back_by_itself(now, job, reason);
            }
        }
        Event::StorageFailed { now, serial, reason } => {
            if let Some(job) = turn.take(serial, |j| !j.holds_slot()) {
                turn.stop(now, job, Stopped::Failed, reason, false);
            }
        }
    }
    turn.finish()
}

pub(super) struct Turn {
    pub(super) state: State,
    pub(super) before: Vec<Effect>,
    pub(super) changes: Vec<Change>,
    pub(super) after: Vec<Effect>,
}

impl Turn {
    pub(super) fn finish(self) -> (State, Vec<Effect>) {
        let mut effects = self.before;
        if !self.changes.is_empty() {
            effects.push(Effect::Commit(self.changes));
        }
        effects.extend(self.after);
        (self.state, effects)
    }

    pub(super) fn answer(&mut self, id: String, answer: Answer) {
        self.after.push(Effect::Answer { id, answer });
    }

    pub(super) fn refuse(&mut self, id: String, code: &'static str, message: impl Into<String>) {
        self.answer(id, Answer::Refused(Reason::new(code, message)));
    }

    /// Takes the job in progress if a report is about it and `fits`.
    pub(super) fn take(&mut self, serial: u64, fits: impl Fn(&Job) -> bool) -> Option<Job> {
        self.state.job.take_if(|j| j.serial == serial && fits(j))
    }

    /// Writes the job down, reports it, and keeps it as the one in progress.
    pub(super) fn keep(&mut self, now: Millis, mut job: Job) {
        job.changed = now;
        self.note(&job);
        self.state.job = Some(job);
    }

    pub(super) fn note(&mut self, job: &Job) {
        self.changes.push(Change::Job(Box::new(job.clone())));
        self.after.push(Effect::Report(Box::new(job.clone())));
    }

    /// Ends a job that is no longer in the state.
    pub(super) fn end(
        &mut self,
        now: Millis,
        mut job: Job,
        state: JobState,
        reason: Option<Reason>,
    ) {
        job.state = state;
        job.reason = reason;
        job.changed = now;
        let ended = Ended {
            serial: job.serial,
            fingerprint: job.fingerprint,
            state,
            reason: job.reason.clone(),
        };
        self.state.ended.insert(job.id.clone(), ended);
        if self.state.ended.len() > ENDED_MAX {
            let oldest = self.state.ended.iter().min_by_key(|(_, e)| e.serial);
            let oldest = oldest.map(|(id, _)| id.clone());
            self.state.ended.remove(&oldest.expect("there are more than ENDED_MAX"));
        }
        self.note(&job);
    }

    /// After the job in progress ended: room is made, and the waiting one begins.
    pub(super) fn next(&mut self, now: Millis) {
        self.after.push(Effect::Collect);
        if let Some(job) = self.state.waiting.take() {
            self.begin(now, job);
        }
    }

    pub(super) fn count(&mut self, now: Millis, way: Way) {
        let breaker = self.state.breakers.entry(way).or_default();
        breaker.count(now);
        self.changes.push(Change::Breaker { way, breaker: breaker.clone() });
    }

    pub(super) fn quarantine(&mut self, now: Millis, digest: Digest, reason: &Reason) {
        self.state.quarantine.insert(digest, reason.clone());
        self.changes.push(Change::Quarantine { digest, reason: reason.clone(), now });
    }

    pub(super) fn begin(&mut self, now: Millis, mut job: Job) {
        job.state = JobState::InProgress;
        job.gates.clear();
        job.ask = None;
        job.entered.clear();
        let serial = job.serial;
        let (phase, effect) = match job.task {
            Task::Install(_) => (Phase::Receiving, Effect::Fetch { serial }),
            Task::Rollback { .. } => (Phase::Verifying, Effect::Verify { serial }),
        };
        self.enter(now, job, phase);
        self.after.push(effect);
    }

    pub(super) fn enter(&mut self, now: Millis, mut job: Job, phase: Phase) {
        job.phase = Some(phase);
        job.entered.push((phase, now));
        self.keep(now, job);
    }

    pub(super) fn done(&mut self, now: Millis, mut job: Job, step: Step, gates: Vec<Gate>) {
        let serial = job.serial;
        let install = job.command().is_some();
        let phase = job.phase.expect("a job in progress has a phase");
        let fits = matches!(
            (phase, &step),
            (Phase::Receiving, Step::Received { .. })
                | (Phase::Verifying, Step::Verified)
                | (Phase::Proving, Step::Proved { .. })
                | (Phase::Loading, Step::Loaded)
                | (Phase::Switching, Step::Switched)
                | (Phase::Probation, Step::Passed)
        );
        if !fits {
            self.state.job = Some(job);
            return;
        }
        add_gates(&mut job, gates);
        match step {
            Step::Received { digest } => {
                job.digest = Some(digest);
                if let Some(why) = self.state.quarantine.get(&digest).cloned() {
                    let reason = quarantined(&digest, &why);
                    self.stop(now, job, Stopped::Rejected, reason, false);
                } else if self.state.slot.active == Some(digest) {
                    self.already_active(now, job);
                    self.next(now);
                } else {
                    self.enter(now, job, Phase::Verifying);
                    self.after.push(Effect::Verify { serial });
                }
            }
            Step::Verified if install => {
                self.enter(now, job, Phase::Proving);
                self.after.push(Effect::Prove { serial });
            }
            Step::Verified => {
                self.enter(now, job, Phase::Loading);
                self.after.push(Effect::Load { serial });
            }
            Step::Proved { ask } => {
                job.ask = ask;
                self.enter(now, job, Phase::Loading);
                self.after.push(Effect::Load { serial });
            }
            Step::Loaded => match self.asks(&job) {
                Some(ask) => {
                    job.ask = Some(ask);
                    self.enter(now, job, Phase::AwaitingConfirm);
                }
                None => self.switch(now, job),
            },
            Step::Switched if install => {
                self.enter(now, job, Phase::Probation);
                self.after.push(Effect::Watch { serial });
            }
            Step::Switched | Step::Passed => self.commit(now, job),
        }
    }

    /// Why a person must say yes to this job, if so.
    pub(super) fn asks(&self, job: &Job) -> Option<Reason> {
        let command = job.command()?;
        let open = self.state.breakers.get(&job.way).is_some_and(|b| b.open);
        if command.is_manual() {
            Some(Reason::new("manual", "install is \"manual\": confirm or cancel it"))
        } else if job.ask.is_some() {
            job.ask.clone()
        } else if open {
            let text = format!(
                "several jobs by way of {} were refused within 24 h: confirm or cancel it",
                job.way.name()
            );
            Some(Reason::new("breaker_open", text))
        } else {
            None
        }
    }

    /// Commits the slot to the job's model, then gives the worker the pointer.
    pub(super) fn switch(&mut self, now: Millis, job: Job) {
        let slot = &mut self.state.slot;
        if job.command().is_some() {
            slot.probation = Some(Probation {
                serial: job.serial,
                tries_left: TRIES,
                power_cuts: 0,
                displaced: slot.previous,
            });
        }
        slot.previous = slot.active;
        slot.active = job.digest;
        slot.from_factory = false;
        slot.epoch += 1;
        let swap = Effect::Swap { serial: job.serial, to: slot.active, epoch: slot.epoch };
        self.changes.push(Change::Slot(slot.clone()));
        self.after.push(swap);
        self.enter(now, job, Phase::Switching);
    }

    pub(super) fn commit(&mut self, now: Millis, mut job: Job) {
        if self.state.slot.probation.take().is_some() {
            self.changes.push(Change::Slot(self.state.slot.clone()));
        }
        job.phase = Some(Phase::Committed);
        job.entered.push((Phase::Committed, now));
        self.end(now, job, JobState::Succeeded, None);
        self.after.push(Effect::Retire);
        self.next(now);
    }

    /// Puts the slot back to the model before the one on probation. `failed` must not become the
    /// previous one, which it is where a model was installed a second time.
    pub(super) fn slot_back(&mut self, serial: u64, failed: Option<Digest>) -> Effect {
        let slot = &mut self.state.slot;
        let displaced = slot.probation.take().and_then(|p| p.displaced);
        let displaced = displaced.filter(|d| Some(*d) != failed);
        slot.active = slot.previous.take();
        slot.previous = displaced;
        slot.epoch += 1;
        self.changes.push(Change::Slot(slot.clone()));
        Effect::Swap { serial, to: slot.active, epoch: slot.epoch }
    }

    pub(super) fn rolled_back(&mut self, now: Millis, mut job: Job, reason: Reason) {
        job.phase = Some(Phase::RolledBack);
        job.entered.push((Phase::RolledBack, now));
        self.end(now, job, JobState::Failed, Some(reason));
    }

    /// Ends an install whose model failed on probation.
    pub(super) fn fail_back(
        &mut self,
        now: Millis,
        job: Job,
        reason: Reason,
        quarantine: bool,
    ) -> Effect {
        let digest = job.digest.expect("a model that went live has a digest");
        let swap = self.slot_back(job.serial, quarantine.then_some(digest));
        if quarantine {
            self.quarantine(now, digest, &reason);
        }
        self.count(now, job.way);
        self.rolled_back(now, job, reason);
        swap
    }

    pub(super) fn back_by_itself(&mut self, now: Millis, job: Job, reason: Reason) {
        let swap = self.fail_back(now, job, reason, true);
        self.before.push(swap);
        self.after.push(Effect::Retire);
        self.next(now);
    }

    /// Ends a job that never touched the slot.
    pub(super) fn stop(
        &mut self,
        now: Millis,
        job: Job,
        how: Stopped,
        reason: Reason,
        quarantine: bool,
    ) {
        if job.command().is_some() {
            // While it is received, the digest is what the command claims: it convicts nobody.
            let seen = quarantine && job.phase > Some(Phase::Receiving);
            if let Some(digest) = job.digest.filter(|_| seen) {
                self.quarantine(now, digest, &reason);
            }
            if how == Stopped::Rejected {
                self.count(now, job.way);
            }
        }
        self.after.push(Effect::Abandon { serial: job.serial });
        self.end(now, job, how.into(), Some(reason));
        self.next(now);
    }
}

fn add_gates(job: &mut Job, gates: Vec<Gate>) {
    job.gates.extend(gates);
    job.gates.truncate(GATES_MAX);
}

/// The refusal of a model that failed before.
pub(super) fn quarantined(digest: &Digest, why: &Reason) -> Reason {
    let text = format!(
        "{} failed before ({why}) and is not tried again by itself: release it by hand",
        digest.short()
    );
    Reason::new("quarantined", text)
}
