//! What the machine wants done.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Instant;

use tracing::{error, warn};

use super::super::digest::Digest;
use super::super::event::{Effect, Event, Step, Stopped};
use super::super::gates::{Limits, Request};
use super::super::job::{Job, Reason};
use super::super::live::{LiveFrames, LiveSource};
use super::super::orders;
use super::super::steps::{self, Bench, StepEnd};
use super::super::watch::Swapped;
use super::{Thread, frames_dir, now_ms};
use crate::model::engine::Model;
use crate::model::file::Identity;
use crate::model::slot::{Live, Slot};

impl Thread {
    /// Moves the machine, commits, does what follows. The pointer back from a model that failed its
    /// probation is given before the disk is asked.
    pub(super) fn handle(&mut self, event: Event) {
        let mut back = None;
        let (slot, warm) = (&self.parts.slot, &self.warm);
        let effects = self.keeper.handle(event, &mut |effect| {
            if let Effect::Swap { serial, to, epoch } = effect {
                back = Some((serial, epoch, point(slot, warm, to, epoch, false)));
            }
        });
        if let Some((serial, epoch, pointed)) = back {
            self.note_swap(serial, epoch, pointed);
        }
        for effect in effects {
            self.act(effect);
        }
        self.publish();
    }

    pub(super) fn act(&mut self, effect: Effect) {
        match effect {
            Effect::Commit(_) => unreachable!("the keeper has committed"),
            Effect::Report(job) => self.report_job(&job),
            Effect::Answer { id, answer } => {
                // Whoever reads the answer may look at once.
                self.publish();
                if let Some(reply) = self.replies.remove(&id) {
                    reply(orders::reply(&id, &answer));
                }
            }
            Effect::Fetch { serial } => self.fetch(serial),
            Effect::Verify { serial } => self.verify(serial),
            Effect::Prove { serial } => self.prove(serial),
            Effect::Load { serial } => self.load(serial),
            Effect::Swap { serial, to, epoch } => self.swap(serial, to, epoch),
            Effect::Watch { serial } => self.watch(serial),
            Effect::Abandon { serial } => {
                if let Some(running) = self.running.take_if(|r| r.serial == serial) {
                    running.abandon();
                }
                self.retired = true;
            }
            Effect::Retire => {
                self.probation = None;
                self.retired = true;
            }
            Effect::Collect => {
                if let Err(e) = self.keeper.collect() {
                    warn!("blobs that nothing needs stay: {e}");
                }
            }
        }
    }

    pub(super) fn job(&self, serial: u64) -> Option<&Job> {
        self.keeper.state().job.as_ref().filter(|j| j.serial == serial)
    }

    pub(super) fn start_step(
        &mut self,
        serial: u64,
        step: impl FnOnce(&Bench, &Arc<AtomicBool>) -> StepEnd + Send + 'static,
    ) {
        match self.bench.run(serial, &self.ends, step) {
            Ok(running) => self.running = Some(running),
            Err(e) => {
                let reason = Reason::new("no_thread", format!("the system has no thread: {e}"));
                let end = StepEnd::Ended {
                    how: Stopped::Failed,
                    reason,
                    gates: Vec::new(),
                    quarantine: false,
                };
                let _ = self.ends.send((serial, end));
            }
        }
    }

    pub(super) fn fetch(&mut self, serial: u64) {
        let Some(command) = self.job(serial).and_then(Job::command).cloned() else { return };
        if let Some(end) = steps::received(&command) {
            let _ = self.ends.send((serial, end));
            return;
        }
        let way = self.fetching.clone();
        self.start_step(serial, move |bench, cancel| steps::fetch(bench, &command, &way, cancel));
    }

    pub(super) fn verify(&mut self, serial: u64) {
        let Some(job) = self.job(serial).cloned() else { return };
        let Some(digest) = job.digest else { return };
        let labels = self.active_model().map(|m| m.contract().labels.clone());
        self.start_step(serial, move |bench, _| match job.command() {
            Some(command) => steps::verify(bench, &digest, command, labels),
            // A rollback: it was judged when it came, and is hashed when it is loaded.
            None => StepEnd::done(Step::Verified, Vec::new()),
        });
    }

    pub(super) fn prove(&mut self, serial: u64) {
        let Some(job) = self.job(serial).cloned() else { return };
        let (Some(digest), Some(command)) = (job.digest, job.command().cloned()) else { return };
        let known = self.keeper.registry().model(&digest).ok().flatten();
        let overrides = steps::described(known.as_ref());
        let candidate = steps::subject(&self.bench, &digest, command.from.clone(), overrides);
        let active = self.keeper.state().slot.active.map(|digest| {
            let known = self.keeper.registry().model(&digest).ok().flatten();
            let name = steps::name_of(&digest, known.as_ref());
            steps::subject(&self.bench, &digest, name, steps::described(known.as_ref()))
        });
        let mut request = {
            let config = &self.parts.config;
            let lanes = self.parts.intake.snapshot();
            let cameras = lanes.iter().filter(|lane| lane.present).count();
            Request::of(&config.inference, &config.models, cameras, candidate, active)
        };
        request.engine.library = Some(self.parts.runtime.library().to_owned());
        request.engine.cores = Some(self.parts.cores.clone());
        request.engine.setting = self.setting_for(&digest);
        let manifest = steps::manifest_of(command.manifest.as_deref());
        request.latency.accept_slower =
            steps::accepted_ratio(&command, manifest.as_ref(), !self.keys.is_empty());
        let pulse = Some(Arc::clone(&self.parts.pulse));
        let limits = Limits { beside: pulse, ..Limits::of(&self.parts.config.models) };
        let (sampler, dir) = (Arc::clone(&self.parts.sampler), frames_dir(&self.parts));
        self.start_step(serial, move |bench, cancel| {
            let live: &LiveSource =
                &|cancel, tell| LiveFrames::collect(&dir, &sampler, cancel, tell);
            steps::prove(bench, request, &limits, live, cancel)
        });
    }

    pub(super) fn load(&mut self, serial: u64) {
        let Some(digest) = self.job(serial).and_then(|j| j.digest) else { return };
        let known = self.keeper.registry().model(&digest).ok().flatten();
        let setting = self.setting_for(&digest);
        self.start_step(serial, move |bench, _| {
            steps::load(bench, &digest, known.as_ref(), setting)
        });
    }

    pub(super) fn step_ended(&mut self, serial: u64, end: StepEnd) {
        self.running.take_if(|r| r.serial == serial);
        let now = now_ms();
        match end {
            StepEnd::Done { step, gates, model, known } => {
                let Some(job) = self.job(serial).cloned() else { return };
                if let Some(known) = known
                    && let Err(e) = self.keeper.put_model(&known)
                {
                    let how = Stopped::Failed;
                    let reason = Reason::new(e.code(), e.to_string());
                    return self.handle(Event::Ended {
                        now,
                        serial,
                        how,
                        reason,
                        gates,
                        quarantine: false,
                    });
                }
                if let (Some(model), Some(digest)) = (model, job.digest) {
                    self.warm.insert(digest, model);
                }
                self.handle(Event::Done { now, serial, step, gates });
            }
            StepEnd::Ended { how, reason, gates, quarantine } => {
                self.handle(Event::Ended { now, serial, how, reason, gates, quarantine });
            }
        }
    }

    pub(super) fn active_model(&self) -> Option<&Arc<Model>> {
        self.keeper.state().slot.active.and_then(|d| self.warm.get(&d))
    }

    /// Gives the worker the pointer.
    pub(super) fn swap(&mut self, serial: u64, to: Option<Digest>, epoch: u64) {
        let on_probation = self.keeper.state().slot.probation.is_some();
        let pointed = point(&self.parts.slot, &self.warm, to, epoch, on_probation);
        self.note_swap(serial, epoch, pointed);
    }

    fn note_swap(&mut self, serial: u64, epoch: u64, pointed: Option<Pointed>) {
        let Some(Pointed { at, from, to: new }) = pointed else {
            error!("job {serial}: the session to swap to is gone; the running model stays");
            return;
        };
        self.terminated = None;
        let job = self.keeper.state().job.as_ref().filter(|j| j.serial == serial);
        let ended = self.keeper.registry().jobs(16).unwrap_or_default();
        let job = job.cloned().or_else(|| ended.into_iter().find(|j| j.serial == serial));
        self.swaps.push_back(Swapped {
            serial,
            job: job.as_ref().map_or_else(String::new, |j| j.id.clone()),
            epoch,
            at,
            commanded: job.as_ref().map_or_else(now_ms, |j| j.created),
            at_ms: now_ms(),
            from,
            to: new,
            reason: job.and_then(|j| j.reason),
            taken: false,
        });
    }
}

/// A pointer that was changed.
struct Pointed {
    at: Instant,
    from: Option<Identity>,
    to: Option<Identity>,
}

/// Gives the worker another model for its next frame. `None`: its session is not up.
fn point(
    slot: &Slot,
    warm: &BTreeMap<Digest, Arc<Model>>,
    to: Option<Digest>,
    epoch: u64,
    on_probation: bool,
) -> Option<Pointed> {
    let before = slot.load();
    let model = to.map(|digest| warm.get(&digest).cloned());
    if model.as_ref().is_some_and(Option::is_none) {
        return None;
    }
    let live = model.flatten().map(|model| {
        let fallback = before.as_ref().filter(|_| on_probation);
        let fallback = fallback.map(|b| Live::new(Arc::clone(&b.model), epoch + 1, None));
        Live::new(model, epoch, fallback)
    });
    let identity = |live: &Arc<Live>| live.model.identity().clone();
    let (from, to) = (before.as_ref().map(identity), live.as_ref().map(identity));
    let at = Instant::now();
    // The session of the model before is in `warm` as well: it is not dropped here.
    drop(slot.swap(live));
    Some(Pointed { at, from, to })
}
