//! Random histories of the machine, held against what must never happen.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;

use noblink::update::digest::Digest;
use noblink::update::event::{Change, Effect, Event, Step, Stopped};
use noblink::update::job::{Ended, Install, Job, JobState, Phase, Reason, State, Way};
use noblink::update::machine::step;
use noblink::update::start_order;

use super::{command, digest};

/// What may happen; indexes pick ids and models from small sets, so that they meet again.
#[derive(Debug, Clone)]
enum Move {
    Install {
        id: u8,
        model: u8,
        manual: bool,
        refused: bool,
        sequence: Option<u8>,
        way: u8,
    },
    Rollback {
        id: u8,
        to: Option<u8>,
        warm: bool,
    },
    Cancel {
        job: Option<u8>,
    },
    Confirm {
        job: Option<u8>,
    },
    CloseBreaker {
        way: u8,
    },
    Release {
        model: u8,
    },
    /// The step that fits, or one that does not, for the job in progress or an older one.
    Good {
        age: u8,
    },
    Odd {
        step: u8,
        age: u8,
    },
    Stopped {
        how: u8,
        quarantine: bool,
        age: u8,
    },
    ProbationFailed {
        age: u8,
    },
    StorageFailed,
    Die {
        power: bool,
        clean: bool,
        unloadable: bool,
    },
    Wait {
        hours: u8,
    },
}

fn moves() -> impl Strategy<Value = Move> {
    let id = 0..6u8;
    let model = 0..5u8;
    let age = prop_oneof![6 => Just(0u8), 1 => 1..3u8];
    prop_oneof![
        6 => (id.clone(), model.clone(), any::<bool>(), prop::bool::weighted(0.2),
              proptest::option::of(0..20u8), 0..4u8)
            .prop_map(|(id, model, manual, refused, sequence, way)| {
                Move::Install { id, model, manual, refused, sequence, way }
            }),
        2 => (id.clone(), proptest::option::of(model.clone()), any::<bool>())
            .prop_map(|(id, to, warm)| Move::Rollback { id, to, warm }),
        1 => proptest::option::of(id.clone()).prop_map(|job| Move::Cancel { job }),
        2 => proptest::option::of(id).prop_map(|job| Move::Confirm { job }),
        1 => (0..4u8).prop_map(|way| Move::CloseBreaker { way }),
        1 => model.prop_map(|model| Move::Release { model }),
        16 => age.clone().prop_map(|age| Move::Good { age }),
        2 => (0..6u8, age.clone()).prop_map(|(step, age)| Move::Odd { step, age }),
        2 => (0..3u8, any::<bool>(), age.clone())
            .prop_map(|(how, quarantine, age)| Move::Stopped { how, quarantine, age }),
        2 => age.prop_map(|age| Move::ProbationFailed { age }),
        1 => Just(Move::StorageFailed),
        2 => (any::<bool>(), any::<bool>(), prop::bool::weighted(0.2))
            .prop_map(|(power, clean, unloadable)| Move::Die { power, clean, unloadable }),
        1 => (0..30u8).prop_map(|hours| Move::Wait { hours }),
    ]
}

/// What a database holds after the commits: a restart must find the machine in it.
#[derive(Default)]
struct Rows {
    jobs: BTreeMap<u64, Job>,
    rest: State,
}

impl Rows {
    fn apply(&mut self, change: &Change) {
        let state = &mut self.rest;
        match change.clone() {
            Change::Job(job) => {
                let before = self.jobs.insert(job.serial, *job.clone());
                if let Some(before) = before {
                    assert!(!before.state.is_terminal(), "{before:?} became {job:?}");
                }
            }
            Change::Slot(slot) => {
                assert!(slot.epoch >= state.slot.epoch, "the epoch went back");
                state.slot = slot;
            }
            Change::Sequence { signed, highest } => {
                let kept =
                    if signed { &mut state.highest_signed } else { &mut state.highest_unsigned };
                assert!(Some(highest) >= *kept, "the sequence went back");
                *kept = Some(highest);
            }
            Change::Quarantine { digest, reason, .. } => {
                state.quarantine.insert(digest, reason);
            }
            Change::Release { digest } => {
                state.quarantine.remove(&digest);
            }
            Change::Breaker { way, breaker } => {
                state.breakers.remove(&way);
                if breaker != Default::default() {
                    state.breakers.insert(way, breaker);
                }
            }
            Change::Life(life) => state.life = life,
        }
    }

    fn state(&self) -> State {
        let mut state = self.rest.clone();
        for job in self.jobs.values() {
            state.last_serial = job.serial;
            match job.state {
                JobState::InProgress => assert_eq!(state.job.replace(job.clone()), None),
                JobState::Queued => assert_eq!(state.waiting.replace(job.clone()), None),
                _ => {
                    let ended = Ended {
                        serial: job.serial,
                        fingerprint: job.fingerprint,
                        state: job.state,
                        reason: job.reason.clone(),
                    };
                    assert_eq!(state.ended.insert(job.id.clone(), ended), None, "one job per id");
                }
            }
        }
        state
    }
}

struct World {
    state: State,
    rows: Rows,
    now: i64,
    kernel: u32,
    /// Epoch of the last swap: what the worker writes into events.
    live_epoch: u64,
    live: Option<Digest>,
}

impl World {
    fn event(&mut self, event: Event) {
        let before = self.state.clone();
        let (state, effects) = step(before.clone(), event.clone());
        self.check(&before, &state, &event, &effects);
        self.state = state;
    }

    fn check(&mut self, before: &State, state: &State, event: &Event, effects: &[Effect]) {
        let commit = effects.iter().position(|e| matches!(e, Effect::Commit(_)));
        let commits = effects.iter().filter(|e| matches!(e, Effect::Commit(_))).count();
        assert!(commits <= 1);
        for (i, effect) in effects.iter().enumerate() {
            let early = commit.is_some_and(|c| i < c);
            match effect {
                Effect::Commit(changes) => {
                    for change in changes {
                        self.rows.apply(change);
                        if let Change::Job(job) = change {
                            check_job(job);
                        }
                    }
                }
                Effect::Swap { to, epoch, .. } => {
                    assert!(*epoch > self.live_epoch, "the worker's epoch went back");
                    assert!(!early || *to == before.slot.previous, "only the way back is early");
                    assert_eq!((*to, *epoch), (state.slot.active, state.slot.epoch));
                    (self.live, self.live_epoch) = (*to, *epoch);
                }
                other => assert!(!early, "{other:?} before the commit"),
            }
        }
        if commit.is_none() {
            assert_eq!(state, before, "{event:?} changed what is not written down");
        }
        let starts = |e: &&Effect| {
            matches!(
                e,
                Effect::Fetch { .. }
                    | Effect::Verify { .. }
                    | Effect::Prove { .. }
                    | Effect::Load { .. }
                    | Effect::Watch { .. }
            )
        };
        assert!(effects.iter().filter(starts).count() <= 1, "one thing at a time");
        assert!(state.job.as_ref().is_none_or(|j| j.state == JobState::InProgress));
        assert!(state.waiting.as_ref().is_none_or(|j| j.state == JobState::Queued));
        assert!(state.waiting.is_none() || state.job.is_some() || is_boot(event));
        let active = state.slot.active;
        assert!(active.is_none_or(|d| !state.quarantine.contains_key(&d)), "a failed one runs");
        assert_eq!(self.rows.state(), *state, "a restart would find something else");
    }

    fn serial(&self, age: u8) -> u64 {
        let newest = self.state.job.as_ref().map_or(self.state.last_serial, |j| j.serial);
        newest.saturating_sub(u64::from(age))
    }

    fn fitting(&self) -> Option<Step> {
        let job = self.state.job.as_ref()?;
        Some(match job.phase? {
            Phase::Receiving => Step::Received { digest: job.digest.unwrap_or(digest("m0")) },
            Phase::Verifying => Step::Verified,
            Phase::Proving => Step::Proved { ask: None },
            Phase::Loading => Step::Loaded,
            Phase::Switching => Step::Switched,
            Phase::Probation => Step::Passed,
            _ => return None,
        })
    }

    fn good(&mut self, age: u8) {
        if let Some(step) = self.fitting() {
            let (now, serial) = (self.now, self.serial(age));
            self.event(Event::Done { now, serial, step, gates: vec![] });
        }
    }

    fn start(&mut self, unloadable: bool) {
        let (now, kernel_boot) = (self.now, format!("kernel-{}", self.kernel));
        self.event(Event::Boot { now, kernel_boot });
        let order = start_order(&self.state, None);
        let model = order.get(usize::from(unloadable)).map(|(d, _)| *d);
        let why = unloadable.then(|| Reason::new("unloadable", "for the test"));
        self.event(Event::Running { now, model, from_factory: false, why, quarantine: unloadable });
        // The new process loads the model and takes the slot's epoch.
        assert!(self.state.slot.epoch >= self.live_epoch);
        assert!(
            self.state.slot.epoch > self.live_epoch || self.live == self.state.slot.active,
            "two models under one epoch"
        );
        (self.live, self.live_epoch) = (self.state.slot.active, self.state.slot.epoch);
    }

    fn play(&mut self, one: Move) {
        self.now += 100;
        let now = self.now;
        let name = |m: u8| format!("m{m}");
        let job_id = |j: u8| format!("job-{j}");
        match one {
            Move::Install { id, model, manual, refused, sequence, way } => {
                let mut c = *command(&job_id(id), &name(model));
                c.install = if manual { Install::Manual } else { Install::Auto };
                c.way = Way::ALL[usize::from(way)];
                c.sequence = sequence.map(|s| (u64::from(s), s % 2 == 0));
                let admission =
                    if refused { Err(Reason::new("unsigned", "for the test")) } else { Ok(()) };
                self.event(Event::Install { now, command: Box::new(c), admission });
            }
            Move::Rollback { id, to, warm } => self.event(Event::Rollback {
                now,
                id: job_id(id),
                way: Way::Cli,
                from: String::new(),
                to: to.map(|m| digest(&name(m))),
                warm,
                in_store: true,
            }),
            Move::Cancel { job } => {
                self.event(Event::Cancel { now, id: "c".into(), job: job.map(job_id) });
            }
            Move::Confirm { job } => {
                self.event(Event::Confirm { now, id: "y".into(), job: job.map(job_id) });
            }
            Move::CloseBreaker { way } => {
                let way = Way::ALL[usize::from(way)];
                self.event(Event::CloseBreaker { now, id: "b".into(), way });
            }
            Move::Release { model } => {
                let digest = digest(&name(model));
                self.event(Event::Release { now, id: "r".into(), digest });
            }
            Move::Good { age } => self.good(age),
            Move::Odd { step, age } => {
                let step = match step {
                    0 => Step::Received { digest: digest("m1") },
                    1 => Step::Verified,
                    2 => Step::Proved { ask: Some(Reason::new("ask", "for the test")) },
                    3 => Step::Loaded,
                    4 => Step::Switched,
                    _ => Step::Passed,
                };
                let serial = self.serial(age);
                self.event(Event::Done { now, serial, step, gates: vec![] });
            }
            Move::Stopped { how, quarantine, age } => {
                let how = [Stopped::Rejected, Stopped::Failed, Stopped::TimedOut][usize::from(how)];
                let reason = Reason::new("gate", "for the test");
                let serial = self.serial(age);
                self.event(Event::Ended { now, serial, how, reason, gates: vec![], quarantine });
            }
            Move::ProbationFailed { age } => {
                let reason = Reason::new("nan_output", "for the test");
                let serial = self.serial(age);
                self.event(Event::ProbationFailed { now, serial, reason, gates: Vec::new() });
            }
            Move::StorageFailed => {
                let reason = Reason::new("no_space", "for the test");
                let serial = self.serial(0);
                self.event(Event::StorageFailed { now, serial, reason });
            }
            Move::Die { power, clean, unloadable } => {
                if clean {
                    self.event(Event::Stop { now });
                }
                self.kernel += u32::from(power);
                self.start(unloadable);
            }
            Move::Wait { hours } => self.now += i64::from(hours) * 3_600_000,
        }
    }
}

fn is_boot(event: &Event) -> bool {
    matches!(event, Event::Boot { .. })
}

fn check_job(job: &Job) {
    let live = job.entered.iter().any(|(p, _)| *p >= Phase::Switching);
    match job.state {
        JobState::Rejected | JobState::TimedOut | JobState::Canceled => {
            assert!(!live, "{job:?} had touched the slot");
        }
        JobState::Succeeded => assert_eq!(job.phase, Some(Phase::Committed)),
        JobState::Queued => assert_eq!(job.phase, None),
        _ => {}
    }
    if job.state.is_terminal() && job.state != JobState::Succeeded {
        assert!(job.reason.is_some(), "{job:?} does not say why");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { max_shrink_iters: 20_000, ..ProptestConfig::with_cases(1500) })]

    #[test]
    fn no_history_breaks_the_machine(history in prop::collection::vec(moves(), 1..80)) {
        let mut w = World {
            state: State::default(),
            rows: Rows::default(),
            now: 1_700_000_000_000,
            kernel: 0,
            live_epoch: 0,
            live: None,
        };
        w.start(false);
        for one in history {
            w.play(one);
        }
        // I8: whatever happened, a person's next good model goes in.
        let fresh = digest("good");
        let c = noblink::update::job::Command {
            digest: Some(fresh), ..*command("the-next", "good")
        };
        let now = w.now;
        w.event(Event::Install { now, command: Box::new(c), admission: Ok(()) });
        let mut turns = 0;
        while w.state.slot.active != Some(fresh) || w.state.job.is_some() {
            turns += 1;
            prop_assert!(turns < 40, "stuck in {:?}", w.state.job);
            w.event(Event::Confirm { now, id: "y".into(), job: None });
            w.good(0);
        }
        let ids: BTreeSet<_> = w.rows.jobs.values().map(|j| &j.id).collect();
        prop_assert_eq!(ids.len(), w.rows.jobs.len(), "one job per id");
    }
}
