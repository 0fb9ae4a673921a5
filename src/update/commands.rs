//! What commands do to the machine: install, rollback, cancel, confirm.

use super::digest::Digest;
use super::event::{Answer, Change, Effect};
use super::job::{Breaker, Command, Job, JobState, Millis, Phase, Reason, Task, Way};
use super::machine::Turn;

/// A rollback as it was commanded.
pub(super) struct Asked {
    pub(super) id: String,
    pub(super) way: Way,
    pub(super) from: String,
    pub(super) to: Option<Digest>,
}

impl Turn {
    /// Answers a command whose id is known already.
    pub(super) fn known(&mut self, id: &str, fingerprint: &Digest) -> bool {
        let open = [&self.state.job, &self.state.waiting];
        let open = open.into_iter().flatten().find(|j| j.id == id).map(|job| {
            let same = Answer::Same { serial: job.serial, state: job.state, phase: job.phase };
            (job.fingerprint, same)
        });
        let known = open.or_else(|| {
            let ended = self.state.ended.get(id)?;
            let (serial, state) = (ended.serial, ended.state);
            Some((ended.fingerprint, Answer::Ended { serial, state, reason: ended.reason.clone() }))
        });
        let Some((known, answer)) = known else { return false };
        if known == *fingerprint {
            self.answer(id.to_owned(), answer);
        } else {
            let text = format!("\"{id}\" is the id of another command: send it with a new id");
            self.refuse(id.to_owned(), "id_conflict", text);
        }
        true
    }

    pub(super) fn new_job(
        &mut self,
        now: Millis,
        asked: Asked,
        task: Task,
        fingerprint: Digest,
    ) -> Job {
        self.state.last_serial += 1;
        Job {
            serial: self.state.last_serial,
            id: asked.id,
            way: asked.way,
            from: asked.from,
            task,
            fingerprint,
            state: JobState::Queued,
            phase: None,
            digest: asked.to,
            reason: None,
            ask: None,
            gates: Vec::new(),
            deaths: 0,
            created: now,
            entered: Vec::new(),
            changed: now,
        }
    }

    pub(super) fn install(&mut self, now: Millis, command: Command, admission: Result<(), Reason>) {
        if self.known(&command.id, &command.fingerprint) {
            return;
        }
        let (id, way, from) = (command.id.clone(), command.way, command.from.clone());
        let asked = Asked { id: id.clone(), way, from, to: command.digest };
        let (fingerprint, sequence) = (command.fingerprint, command.sequence);
        let job = self.new_job(now, asked, Task::Install(Box::new(command)), fingerprint);
        let serial = job.serial;
        if let Err(reason) = admission {
            self.count(now, way);
            self.end(now, job, JobState::Rejected, Some(reason.clone()));
            self.after.push(Effect::Collect);
            let state = JobState::Rejected;
            return self.answer(id, Answer::Ended { serial, state, reason: Some(reason) });
        }
        if let Some((sequence, signed)) = sequence {
            let highest = match signed {
                true => &mut self.state.highest_signed,
                false => &mut self.state.highest_unsigned,
            };
            *highest = (*highest).max(Some(sequence));
            let highest = highest.expect("it was set in the line above");
            self.changes.push(Change::Sequence { signed, highest });
        }
        let text = format!("job {id} came in later");
        let busy = self.state.job.as_ref().is_some_and(|j| j.holds_slot() || j.command().is_none());
        if busy {
            self.drop_waiting(now, Reason::new("superseded", text));
            self.note(&job);
            self.state.waiting = Some(job);
        } else {
            self.drop_job(now, Reason::new("superseded", text));
            self.begin(now, job);
        }
        self.answer(id, Answer::Accepted { serial });
    }

    pub(super) fn drop_waiting(&mut self, now: Millis, reason: Reason) {
        if let Some(old) = self.state.waiting.take() {
            self.end(now, old, JobState::Canceled, Some(reason));
        }
    }

    /// Cancels the job in progress, which must not hold the slot.
    pub(super) fn drop_job(&mut self, now: Millis, reason: Reason) {
        if let Some(old) = self.state.job.take() {
            self.after.push(Effect::Abandon { serial: old.serial });
            self.end(now, old, JobState::Canceled, Some(reason));
        }
    }

    pub(super) fn rollback(&mut self, now: Millis, asked: Asked, warm: bool, in_store: bool) {
        let named = asked.to.map_or_else(|| "previous".to_owned(), |d| d.to_string());
        let fingerprint = Digest::of(format!("rollback {named}").as_bytes());
        let id = asked.id.clone();
        if self.known(&id, &fingerprint) {
            return;
        }
        // One press of a button is one rollback, also when two commands come of it.
        if let Some(job) = &self.state.job
            && let Task::Rollback { to } = job.task
            && asked.to.is_none_or(|named| named == to)
        {
            let same = Answer::Same { serial: job.serial, state: job.state, phase: job.phase };
            return self.answer(id, same);
        }
        let Some(to) = self.state.rollback_target(asked.to) else {
            let text = "there is no previous model: name one of `noblink model list`";
            return self.refuse(id, "no_previous", text);
        };
        if let Some(why) = self.state.quarantine.get(&to) {
            let text = format!("{to} is in quarantine ({why}): release it first");
            return self.refuse(id, "quarantined", text);
        }
        if !in_store && self.state.slot.active != Some(to) {
            let text = format!("{to} is not in the store: `noblink model list` shows what is");
            return self.refuse(id, "unknown_model", text);
        }
        let job =
            self.new_job(now, Asked { to: Some(to), ..asked }, Task::Rollback { to }, fingerprint);
        let serial = job.serial;
        let reason = Reason::new("rollback_requested", format!("job {id} rolls back to {to}"));
        self.answer(id, Answer::Accepted { serial });
        match self.state.job.take_if(|j| j.holds_slot()) {
            // A rollback whose swap is on its way: one frame, then it is this one's turn.
            Some(running) if running.command().is_none() => {
                self.state.job = Some(running);
                self.drop_waiting(now, reason);
                self.note(&job);
                self.state.waiting = Some(job);
            }
            Some(running) if self.state.slot.active != Some(to) => {
                self.drop_waiting(now, reason.clone());
                let to_previous = self.state.slot.previous == Some(to);
                let swap = self.slot_back(serial, None);
                self.rolled_back(now, running, reason);
                self.after.push(swap);
                if to_previous {
                    let job = Job { state: JobState::InProgress, ..job };
                    self.enter(now, job, Phase::Switching);
                } else {
                    self.begin(now, job);
                }
            }
            running => {
                let candidate = running.is_some();
                self.state.job = running.or(self.state.job.take());
                if !candidate {
                    self.drop_waiting(now, reason.clone());
                    self.drop_job(now, reason);
                }
                if self.state.slot.active == Some(to) {
                    self.already_active(now, job);
                } else if warm {
                    self.switch(now, Job { state: JobState::InProgress, ..job });
                } else {
                    self.begin(now, job);
                }
            }
        }
    }

    pub(super) fn already_active(&mut self, now: Millis, mut job: Job) {
        job.phase = Some(Phase::Committed);
        let reason = Reason::new("already_active", "this model runs already: nothing was done");
        self.end(now, job, JobState::Succeeded, Some(reason));
        self.after.push(Effect::Collect);
    }

    /// The index of the open job that a verb means, or an answer why there is none.
    pub(super) fn meant(&mut self, id: &str, job: Option<&str>) -> Option<bool> {
        let is = |j: &Option<Job>| j.as_ref().is_some_and(|j| job.is_none_or(|id| j.id == id));
        if is(&self.state.job) {
            return Some(true);
        }
        if is(&self.state.waiting) {
            return Some(false);
        }
        let answer = match job.map(|job| (job, self.state.ended.get(job))) {
            Some((_, Some(e))) => {
                Answer::Ended { serial: e.serial, state: e.state, reason: e.reason.clone() }
            }
            Some((job, None)) => Answer::Refused(Reason::new(
                "unknown_job",
                format!("there is no job \"{job}\": `noblink model list` shows the last ones"),
            )),
            None => Answer::Refused(Reason::new("no_job", "no job is in progress")),
        };
        self.answer(id.to_owned(), answer);
        None
    }

    pub(super) fn cancel(&mut self, now: Millis, id: String, job: Option<&str>) {
        let reason = Reason::new("cancel_requested", format!("command {id}"));
        match self.meant(&id, job) {
            Some(true) if self.state.job.as_ref().is_some_and(Job::holds_slot) => {
                let text = "the model is live already: roll back instead";
                self.refuse(id, "too_late", text);
            }
            Some(true) => {
                self.drop_job(now, reason);
                self.answer(id, Answer::Done);
                self.next(now);
            }
            Some(false) => {
                self.drop_waiting(now, reason);
                self.after.push(Effect::Collect);
                self.answer(id, Answer::Done);
            }
            None => {}
        }
    }

    pub(super) fn confirm(&mut self, now: Millis, id: String, job: Option<&str>) {
        let waits = |j: &mut Job| j.phase == Some(Phase::AwaitingConfirm);
        match self.meant(&id, job) {
            Some(true) => match self.state.job.take_if(waits) {
                Some(job) => {
                    self.reset_breaker(job.way);
                    self.answer(id, Answer::Done);
                    self.switch(now, job);
                }
                None => {
                    let text = "the job is not awaiting confirmation: see models/state";
                    self.refuse(id, "not_waiting", text);
                }
            },
            Some(false) => self.refuse(id, "not_waiting", "the job has not begun yet"),
            None => {}
        }
    }

    pub(super) fn reset_breaker(&mut self, way: Way) {
        if self.state.breakers.remove(&way).is_some() {
            self.changes.push(Change::Breaker { way, breaker: Breaker::default() });
        }
    }

    pub(super) fn close(&mut self, now: Millis, id: String, way: Way) {
        self.reset_breaker(way);
        self.answer(id, Answer::Done);
        let held = |j: &mut Job| {
            j.way == way
                && j.phase == Some(Phase::AwaitingConfirm)
                && j.ask.as_ref().is_some_and(|r| r.code == "breaker_open")
        };
        if let Some(job) = self.state.job.take_if(held) {
            self.switch(now, job);
        }
    }
}
