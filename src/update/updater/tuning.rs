//! `provider = "auto"` in service.
//!
//! ```text
//! resting ── nothing else goes on ──► measuring ──► building ──► trying ──► resting (proven)
//!    ▲                                    │             │           │
//!    └─────── a job comes: it goes first ─┴─────────────┘           └─ a run fails: back, for good
//! ```
//!
//! The move is a swap of the session, not of the model: same digest, same epoch. While it is tried
//! the session before is its fallback, so the frame on which it fails is looked at again. Nothing
//! here is in the way of a job, of the first frame, or of the worker.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, unbounded};
use serde_json::{Value, json};
use tracing::{info, warn};

use super::super::digest::Digest;
use super::super::failpoint;
use super::super::gates::{Engine, Limits, pictures};
use super::super::job::Reason;
use super::super::keeper::Keeper;
use super::super::live::LiveFrames;
use super::super::steps::{self, Running, StepEnd};
use super::super::tune::{self, Libraries, Order, State, Stopped, Table, Tuning};
use super::{Parts, Thread, now_ms};
use crate::host;
use crate::meter::Outcome;
use crate::model::engine::Model;
use crate::model::options::Setting;
use crate::model::slot::Live;

/// A model must have run so long with nothing else going on before it is measured.
const QUIET: Duration = Duration::from_secs(5);
/// How long a new session is tried with the one before beside it.
const TRIED_FOR: Duration = Duration::from_secs(10);
/// By how much its runs may take longer than those before, neighbours being what they are.
const SLOWER_MAX: f64 = 1.05;
/// Results that it must have given by then.
const TRIED_FRAMES: usize = 10;
/// So often a box that is too busy is given twice the time.
const TRIES: u32 = 4;
/// Pictures that the settings must agree on.
const PICTURES: usize = 8;

pub(super) struct Tuner {
    libraries: Libraries,
    /// Where results hold.
    place: String,
    phase: Phase,
    /// Since when this model has run undisturbed.
    quiet: Option<(Digest, Instant)>,
    /// The model of which all is known, and what is known.
    known: Option<(Digest, Value)>,
    /// Models that could not be measured, in this life.
    given_up: BTreeSet<Digest>,
    /// How often the model was measured in vain.
    tries: u32,
    /// Counts the steps: ends of abandoned ones are dropped.
    serial: u64,
    ends: Sender<(u64, End)>,
    ended: Receiver<(u64, End)>,
    /// Sessions that the worker may still hold: it must not be the one that drops them.
    leaving: Vec<Arc<Model>>,
}

enum Phase {
    Resting,
    Measuring(Running),
    Building(Running),
    Trying { digest: Digest, epoch: u64, since: Instant, before: Arc<Model> },
}

enum End {
    Measured(Result<Table, Stopped>),
    Built(Result<Arc<Model>, Reason>),
}

impl Tuner {
    /// `None`: the provider is configured.
    pub(super) fn new(parts: &Parts) -> Option<Self> {
        let inference = &parts.config.inference;
        if inference.provider.is_some() {
            return None;
        }
        let libraries = Libraries::of(inference.library.as_deref(), parts.runtime.library());
        let (ends, ended) = unbounded();
        LiveFrames::clear(&pictures_dir(parts));
        Some(Self {
            place: libraries.place(inference.threads),
            libraries,
            phase: Phase::Resting,
            quiet: None,
            known: None,
            given_up: BTreeSet::new(),
            tries: 0,
            serial: 0,
            ends,
            ended,
            leaving: Vec::new(),
        })
    }

    /// A try that the process did not outlive: it is not made again.
    pub(super) fn note_death(&self, keeper: &mut Keeper) {
        let Some(active) = keeper.state().slot.active else { return };
        let found = keeper.registry().tuning(&active, &self.place);
        if let Some(tuning) = found.filter(|t| t.state == State::Trying) {
            let why = "the service ended while it ran for the first time".to_owned();
            warn!("{} is not tried again: {why}", tuning.table.here.setting);
            note(keeper, Tuning { state: State::Failed(why), ..tuning });
        }
    }
}

/// Where the pictures lie that settings must agree on.
fn pictures_dir(parts: &Parts) -> PathBuf {
    parts.config.device.state_dir.join("tune")
}

fn note(keeper: &mut Keeper, tuning: Tuning) {
    if let Err(e) = keeper.put_tuning(&tuning) {
        warn!("what was measured is not kept: {e}");
    }
}

impl Thread {
    /// What a new session of this model is built with: what has proved itself for it, else what the
    /// active model runs with, so that the two are compared like with like, else the reference.
    pub(super) fn setting_for(&self, digest: &Digest) -> Setting {
        let reference = self.bench.options.setting;
        let Some(tuner) = &self.tuner else { return reference };
        if self.bench.is_plain(digest) {
            return reference;
        }
        match self.keeper.registry().tuning(digest, &tuner.place) {
            Some(tuning) => tuning.proven(self.parts.runtime.library()).unwrap_or(reference),
            None => self.active_model().map_or(reference, |active| active.setting()),
        }
    }

    pub(super) fn tune(&mut self, now: Instant) {
        let Some(mut tuner) = self.tuner.take() else { return };
        self.tune_on(&mut tuner, now);
        let before = tuner.leaving.len();
        tuner.leaving.retain(|model| Arc::strong_count(model) > 1);
        if tuner.leaving.len() < before {
            host::give_memory_back();
        }
        let told = tuner.describe(self.keeper.state().slot.active);
        self.view.lock().expect("nothing panics with the view").tuning = told;
        self.tuner = Some(tuner);
    }

    fn tune_on(&mut self, tuner: &mut Tuner, now: Instant) {
        if let Phase::Trying { .. } = tuner.phase {
            return self.watch_trial(tuner, now);
        }
        let state = self.keeper.state();
        let busy = state.job.is_some()
            || state.waiting.is_some()
            || self.probation.is_some()
            || self.running.is_some()
            || !self.swaps.is_empty();
        let active = state.slot.active.filter(|digest| !busy && self.warm.contains_key(digest));
        let Some(digest) = active else {
            tuner.rest();
            tuner.quiet = None;
            return;
        };
        if tuner.quiet.is_none_or(|(of, _)| of != digest) {
            tuner.rest();
            tuner.tries = 0;
            tuner.quiet = Some((digest, now));
        }
        while let Ok((serial, end)) = tuner.ended.try_recv() {
            if serial == tuner.serial {
                self.tune_ended(tuner, digest, end, now);
            }
        }
        let quiet = tuner.quiet.is_some_and(|(_, since)| now - since >= QUIET);
        let known = tuner.known.as_ref().is_some_and(|(of, _)| *of == digest);
        if matches!(tuner.phase, Phase::Resting) && quiet && !known {
            self.tune_next(tuner, digest);
        }
    }

    /// The next step for the active model: to measure it, to build what won, or none.
    fn tune_next(&mut self, tuner: &mut Tuner, digest: Digest) {
        let Some(live) = self.parts.slot.load() else { return };
        if tuner.given_up.contains(&digest) {
            return;
        }
        let Some(tuning) = self.keeper.registry().tuning(&digest, &tuner.place) else {
            return self.measure(tuner, digest);
        };
        let pick = tuning.pick(self.parts.runtime.library()).map(|pick| pick.setting);
        match pick.filter(|setting| *setting != live.model.setting()) {
            Some(setting) => self.build_tuned(tuner, digest, setting),
            None => {
                if tuning.state == State::Measured {
                    note(&mut self.keeper, Tuning { state: State::Proven, ..tuning.clone() });
                }
                tuner.known = Some((digest, outcome(&tuning, self.parts.runtime.library())));
            }
        }
    }

    fn measure(&mut self, tuner: &mut Tuner, digest: Digest) {
        let known = self.keeper.registry().model(&digest).ok().flatten();
        let name = steps::name_of(&digest, known.as_ref());
        let model = steps::subject(&self.bench, &digest, name, steps::described(known.as_ref()));
        let config = &self.parts.config;
        let mut engine = Engine::of(&config.inference, &config.models);
        engine.cores = Some(self.parts.cores.clone());
        let calibration = config.models.calibration.clone();
        let libraries = tuner.libraries.clone();
        let mut order = Order { model, engine, libraries, pictures: Vec::new() };
        let wall = tune::LASTS * 2u32.pow(tuner.tries);
        let limits = Limits { wall, ..Limits::of(&config.models) };
        let (sampler, dir) = (Arc::clone(&self.parts.sampler), pictures_dir(&self.parts));
        let running = tuner.step(&self.bench, move |_, cancel| {
            // They lie there until the child has seen them.
            let live = LiveFrames::collect(&dir, &sampler, cancel, &mut |_| true);
            order.pictures = live.files().iter().take(PICTURES).cloned().collect();
            if let (true, Some(calibration)) = (order.pictures.is_empty(), calibration) {
                order.pictures = pictures(&calibration.dir, PICTURES);
            }
            End::Measured(tune::run(&order, &limits, cancel))
        });
        if let Some(running) = running {
            info!("measuring how the active model runs fastest here");
            tuner.phase = Phase::Measuring(running);
        }
    }

    fn build_tuned(&mut self, tuner: &mut Tuner, digest: Digest, setting: Setting) {
        let known = self.keeper.registry().model(&digest).ok().flatten();
        let running = tuner.step(&self.bench, move |bench, _| {
            let name = steps::name_of(&digest, known.as_ref());
            End::Built(match bench.file(&digest, &name, &steps::described(known.as_ref())) {
                Ok(file) => bench.build_as(&file, setting),
                Err(StepEnd::Ended { reason, .. }) => Err(reason),
                Err(StepEnd::Done { .. }) => unreachable!("an error is an end"),
            })
        });
        if let Some(running) = running {
            tuner.phase = Phase::Building(running);
        }
    }

    fn tune_ended(&mut self, tuner: &mut Tuner, digest: Digest, end: End, now: Instant) {
        tuner.phase = Phase::Resting;
        let last = tuner.tries + 1 == TRIES;
        match end {
            // It is nice, and takes only what the others leave it.
            End::Measured(Ok(table)) if !table.is_complete() && !last => {
                tuner.again(digest, "there was not enough time for all settings", now);
            }
            End::Measured(Err(Stopped::Failed(why))) if !last => tuner.again(digest, &why, now),
            End::Measured(Ok(table)) => {
                for candidate in &table.candidates {
                    if let Some(out) = &candidate.out {
                        let (setting, runtime) = (candidate.pick.setting, &candidate.runtime);
                        warn!("{setting} (ONNX Runtime {runtime}) is out: {out}");
                    }
                }
                let place = tuner.place.clone();
                let state = State::Measured;
                let tuning = Tuning { model: digest, place, at: now_ms(), state, table };
                let told = outcome(&tuning, self.parts.runtime.library());
                info!("measured: {}", told["text"].as_str().unwrap_or_default());
                if let Err(e) = self.keeper.put_tuning(&tuning) {
                    tuner.give_up(digest, &format!("what was measured can't be kept: {e}"));
                }
            }
            End::Measured(Err(Stopped::Failed(why))) => tuner.give_up(digest, &why),
            End::Measured(Err(Stopped::Canceled)) => {}
            End::Built(Ok(model)) => self.try_out(tuner, digest, model, now),
            End::Built(Err(reason)) => self.tuning_failed(tuner, digest, reason.message),
        }
    }

    /// The move: the worker's next frame runs in the new session, with the old one behind it.
    fn try_out(&mut self, tuner: &mut Tuner, digest: Digest, model: Arc<Model>, now: Instant) {
        let found = self.keeper.registry().tuning(&digest, &tuner.place);
        let (Some(live), Some(tuning)) = (self.parts.slot.load(), found) else { return };
        // Known before it runs: a death is taken for its doing.
        if let Err(e) = self.keeper.put_tuning(&Tuning { state: State::Trying, ..tuning }) {
            return tuner.give_up(digest, &format!("the move can't be written down: {e}"));
        }
        info!("moving from {} to {}", live.model.setting(), model.setting());
        let before = Arc::clone(&live.model);
        let fallback = Live::new(Arc::clone(&before), live.epoch, None);
        self.warm.insert(digest, Arc::clone(&model));
        let next = Live::new(model, live.epoch, Some(fallback));
        if failpoint::leaves_out(failpoint::TRIAL) {
            next.fail("the failpoint wants it so".to_owned());
        }
        drop(self.parts.slot.swap(Some(next)));
        tuner.phase = Phase::Trying { digest, epoch: live.epoch, since: now, before };
    }

    fn watch_trial(&mut self, tuner: &mut Tuner, now: Instant) {
        let Phase::Trying { digest, epoch, since, before } = &tuner.phase else { return };
        let (digest, epoch, since, before) = (*digest, *epoch, *since, Arc::clone(before));
        let slot = &self.parts.slot;
        if slot.load().is_none_or(|live| live.epoch != epoch) {
            // Another model has taken over: nothing is known of this one but that it was faster.
            tuner.leaving.push(before);
            self.settle(tuner, digest, State::Measured);
        } else if let Some(why) = slot.failure(epoch) {
            self.go_back(tuner, digest, epoch, &before, why);
        } else {
            let results = || self.results(now - since + TRIED_FOR).into_iter().flatten();
            if now - since < TRIED_FOR || results().filter(|r| r.at > since).count() < TRIED_FRAMES
            {
                return;
            }
            let (after, earlier): (Vec<_>, Vec<_>) = results().partition(|r| r.at > since);
            if let Some(why) = slower(&earlier, &after) {
                self.go_back(tuner, digest, epoch, &before, why);
            } else {
                if let Some(model) = self.warm.get(&digest).cloned() {
                    info!("{} has proved itself", model.setting());
                    drop(self.parts.slot.swap(Some(Live::new(model, epoch, None))));
                }
                tuner.leaving.push(before);
                self.settle(tuner, digest, State::Proven);
            }
        }
        tuner.phase = Phase::Resting;
    }

    /// The worker's next frame runs in the session before again.
    fn go_back(
        &mut self,
        tuner: &mut Tuner,
        digest: Digest,
        epoch: u64,
        before: &Arc<Model>,
        why: String,
    ) {
        drop(self.parts.slot.swap(Some(Live::new(Arc::clone(before), epoch, None))));
        tuner.leaving.extend(self.warm.insert(digest, Arc::clone(before)));
        self.tuning_failed(tuner, digest, why);
    }

    fn tuning_failed(&mut self, tuner: &mut Tuner, digest: Digest, why: String) {
        warn!("the faster setting failed and is not tried again: {why}");
        self.settle(tuner, digest, State::Failed(why));
    }

    fn settle(&mut self, tuner: &mut Tuner, digest: Digest, state: State) {
        tuner.known = None;
        match self.keeper.registry().tuning(&digest, &tuner.place) {
            Some(tuning) => {
                let tuning = tuning.at_home(self.parts.runtime.library());
                note(&mut self.keeper, Tuning { state, ..tuning });
            }
            None => tuner.give_up(digest, "its result is gone"),
        }
    }

    /// A stop in good order is no failure of what was tried.
    pub(super) fn stop_tuning(&mut self) {
        let Some(mut tuner) = self.tuner.take() else { return };
        tuner.rest();
        if let Phase::Trying { digest, .. } = tuner.phase {
            self.settle(&mut tuner, digest, State::Measured);
        }
    }
}

impl Tuner {
    fn step(
        &mut self,
        bench: &steps::Bench,
        step: impl FnOnce(&steps::Bench, &Arc<std::sync::atomic::AtomicBool>) -> End + Send + 'static,
    ) -> Option<Running> {
        self.serial += 1;
        let running = bench.run(self.serial, &self.ends, step);
        running.inspect_err(|e| warn!("the system has no thread to measure on: {e}")).ok()
    }

    /// Abandons a step under way; a trial goes on.
    fn rest(&mut self) {
        if let Phase::Measuring(running) | Phase::Building(running) = &self.phase {
            running.abandon();
            self.serial += 1;
            self.phase = Phase::Resting;
        }
    }

    /// Measures again after a rest, with more time.
    fn again(&mut self, digest: Digest, why: &str, now: Instant) {
        info!("how the model runs fastest is not known yet: {why}");
        self.tries += 1;
        self.quiet = Some((digest, now));
    }

    fn give_up(&mut self, digest: Digest, why: &str) {
        warn!("how the model runs fastest is not known: {why}");
        self.given_up.insert(digest);
        self.known = Some((digest, json!({ "state": "failed", "text": why })));
    }

    fn describe(&self, active: Option<Digest>) -> Option<Value> {
        let active = active?;
        let told = |state: &str, text: &str| Some(json!({ "state": state, "text": text }));
        match (&self.phase, &self.known) {
            (Phase::Measuring(_), _) => told("measuring", "which setting is the fastest"),
            (Phase::Building(_) | Phase::Trying { .. }, _) => {
                told("trying", "the fastest setting, with the one before beside it")
            }
            (Phase::Resting, Some((of, known))) if *of == active => Some(known.clone()),
            (Phase::Resting, _) => told("pending", "is measured when nothing else goes on"),
        }
    }
}

/// Why live frames say otherwise than the measurement did, which had the neighbours of its moment.
fn slower(before: &[Outcome], after: &[Outcome]) -> Option<String> {
    let of = |results: &[Outcome]| {
        let ms: Vec<_> = results.iter().map(|r| r.inference.as_secs_f64() * 1e3).collect();
        tune::quartile(&ms)
    };
    let (before, after) = (of(before)?, of(after)?);
    let forced = failpoint::leaves_out(failpoint::REFERENCE);
    (after > SLOWER_MAX * before && !forced)
        .then(|| format!("live frames take it {after:.1} ms, {before:.1} ms before"))
}

/// What is told of a result.
fn outcome(tuning: &Tuning, running: &Path) -> Value {
    let Table { candidates, chosen, here, gain } = &tuning.table;
    let reference = candidates.first().map_or(here, |c| &c.pick);
    let (setting, runtime) = (chosen.setting, chosen.version());
    let faster = format!("{gain} times as fast as {}", reference.setting);
    let (state, text) = match &tuning.state {
        State::Failed(why) => ("failed", format!("{setting} was {faster}, but failed: {why}")),
        _ if chosen == reference => {
            ("reference", format!("nothing that agrees is 5 % faster than {}", reference.setting))
        }
        _ if chosen.library != running => {
            let text =
                format!("{setting} of ONNX Runtime {runtime} is {faster}: from the next start on");
            ("next_start", text)
        }
        _ => ("chosen", format!("{setting} of ONNX Runtime {runtime} is {faster}")),
    };
    json!({ "state": state, "text": text, "gain": gain })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_live_frames_take_longer_in_is_not_faster() {
        let results = |inference_ms: u64| -> Vec<Outcome> {
            let one = |n: u64| Outcome {
                at: Instant::now(),
                frame: n,
                epoch: 0,
                // Every other run met a neighbour.
                inference: Duration::from_millis(inference_ms * (1 + n % 2)),
                queue: Duration::ZERO,
                total: Duration::ZERO,
            };
            (0..40).map(one).collect()
        };
        assert_eq!(slower(&results(100), &results(105)), None);
        let why = slower(&results(100), &results(106)).expect("it is slower");
        assert_eq!(why, "live frames take it 106.0 ms, 100.0 ms before");
        assert_eq!(slower(&[], &results(500)), None, "nothing to hold it against");
    }
}
