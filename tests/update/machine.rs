//! The machine's rules, one test each.

use noblink::update::event::{Answer, Effect, Event, Step, Stopped};
use noblink::update::job::{Ended, Install, JobState, Phase, Reason, Way};
use noblink::update::{Origin, start_order};

use super::{Bench, command, digest};

const HOUR: i64 = 3_600_000;

fn fresh() -> Bench {
    let mut bench = Bench { state: Default::default(), now: 1_700_000_000_000, effects: vec![] };
    bench.boot("kernel-1");
    bench.running(None);
    bench
}

/// A service that runs `a`, with `z` before it.
fn with_two() -> Bench {
    let mut bench = fresh();
    bench.install_whole("first", "z");
    bench.install_whole("second", "a");
    bench.effects.clear();
    bench
}

impl Bench {
    fn boot(&mut self, kernel: &str) {
        self.now += 1000;
        self.event(Event::Boot { now: self.now, kernel_boot: kernel.to_owned() });
    }

    fn running(&mut self, name: Option<&str>) {
        self.event(Event::Running {
            now: self.now,
            model: name.map(digest),
            from_factory: false,
            why: None,
            quarantine: false,
        });
    }

    fn restart(&mut self, kernel: &str) {
        self.boot(kernel);
        let first = start_order(&self.state, None).first().map(|(d, _)| *d);
        self.event(Event::Running {
            now: self.now,
            model: first,
            from_factory: false,
            why: None,
            quarantine: false,
        });
    }

    fn send(&mut self, command: Box<noblink::update::job::Command>) -> Answer {
        self.now += 10;
        let id = command.id.clone();
        let effects = self.event(Event::Install { now: self.now, command, admission: Ok(()) });
        answer_in(&effects, &id)
    }

    fn roll_back(&mut self, id: &str, to: Option<&str>) -> Answer {
        let event = Event::Rollback {
            now: self.now,
            id: id.to_owned(),
            way: Way::Cli,
            from: "test".to_owned(),
            to: to.map(digest),
            warm: true,
            in_store: true,
        };
        let effects = self.event(event);
        answer_in(&effects, id)
    }

    fn cancel(&mut self, job: Option<&str>) -> Answer {
        let event =
            Event::Cancel { now: self.now, id: "c".to_owned(), job: job.map(str::to_owned) };
        let effects = self.event(event);
        answer_in(&effects, "c")
    }

    fn confirm(&mut self, job: Option<&str>) -> Answer {
        let event =
            Event::Confirm { now: self.now, id: "y".to_owned(), job: job.map(str::to_owned) };
        let effects = self.event(event);
        answer_in(&effects, "y")
    }

    fn done(&mut self, step: Step) -> Vec<Effect> {
        self.now += 10;
        let serial = self.serial();
        self.event(Event::Done { now: self.now, serial, step, gates: vec![] })
    }

    fn serial(&self) -> u64 {
        self.state.job.as_ref().expect("a job is in progress").serial
    }

    fn phase(&self) -> Option<Phase> {
        self.state.job.as_ref().and_then(|j| j.phase)
    }

    /// Reports good steps until the job is in `phase`.
    fn until(&mut self, phase: Phase) {
        while self.phase() != Some(phase) {
            let job = self.state.job.as_ref().expect("a job is in progress");
            let step = match job.phase.unwrap() {
                Phase::Receiving => Step::Received { digest: job.digest.unwrap() },
                Phase::Verifying => Step::Verified,
                Phase::Proving => Step::Proved { ask: None },
                Phase::Loading => Step::Loaded,
                Phase::Switching => Step::Switched,
                other => panic!("{other:?} does not lead to {phase:?}"),
            };
            self.done(step);
        }
    }

    fn install_whole(&mut self, id: &str, name: &str) {
        self.send(command(id, name));
        self.until(Phase::Probation);
        self.done(Step::Passed);
        assert_eq!(self.state.slot.active, Some(digest(name)));
    }

    fn refuse(&mut self, code: &'static str) {
        self.now += 10;
        let event = Event::Ended {
            now: self.now,
            serial: self.serial(),
            how: Stopped::Rejected,
            reason: Reason::new(code, "for the test"),
            gates: vec![],
            quarantine: false,
        };
        self.event(event);
    }

    fn fail_probation(&mut self) -> Vec<Effect> {
        let reason = Reason::new("nan_output", "frame 51");
        self.event(Event::ProbationFailed {
            now: self.now,
            serial: self.serial(),
            reason,
            gates: Vec::new(),
        })
    }

    fn ended(&self, id: &str) -> (JobState, &str) {
        let Ended { state, reason, .. } = &self.state.ended[id];
        (*state, reason.as_ref().map_or("", |r| &r.code))
    }

    fn active(&self, name: &str) -> bool {
        self.state.slot.active == Some(digest(name))
    }
}

fn answer_in(effects: &[Effect], command: &str) -> Answer {
    let mut answers = effects.iter().filter_map(|e| match e {
        Effect::Answer { id, answer } if id == command => Some(answer.clone()),
        _ => None,
    });
    let answer = answers.next().expect("every command is answered");
    assert_eq!(answers.next(), None, "answered once");
    answer
}

fn code(answer: &Answer) -> &str {
    match answer {
        Answer::Refused(reason) => &reason.code,
        other => panic!("{other:?} is no refusal"),
    }
}

#[test]
fn an_install_goes_through_every_phase_once() {
    let mut b = fresh();
    b.send(command("one", "a"));
    b.until(Phase::Probation);
    let epoch = b.state.slot.epoch;
    b.done(Step::Passed);
    let reports: Vec<_> = b
        .effects
        .iter()
        .filter_map(|e| match e {
            Effect::Report(job) => job.phase,
            _ => None,
        })
        .collect();
    use Phase::*;
    assert_eq!(reports, [Receiving, Verifying, Proving, Loading, Switching, Probation, Committed]);
    assert_eq!(b.ended("one"), (JobState::Succeeded, ""));
    assert_eq!(b.state.slot.epoch, epoch);
    assert!(b.state.slot.probation.is_none() && b.state.job.is_none());
}

#[test]
fn the_same_command_twice_is_one_job_before_and_after_its_end() {
    let mut b = fresh();
    assert!(matches!(b.send(command("one", "a")), Answer::Accepted { serial: 1 }));
    assert!(matches!(b.send(command("one", "a")), Answer::Same { serial: 1, .. }));
    assert_eq!(code(&b.send(command("one", "b"))), "id_conflict");
    b.until(Phase::Probation);
    assert!(matches!(b.send(command("one", "a")), Answer::Same { serial: 1, .. }));
    b.done(Step::Passed);
    assert!(matches!(b.roll_back("back", None), Answer::Refused(_)), "there is nothing before it");
    b.install_whole("two", "b");
    b.roll_back("back", None);
    b.done(Step::Switched);
    assert!(b.active("a"));
    // A retained desired model comes again with every connection: it does not undo the rollback.
    let again = b.send(command("two", "b"));
    assert!(matches!(again, Answer::Ended { state: JobState::Succeeded, .. }), "{again:?}");
    assert!(b.active("a") && b.state.job.is_none());
}

#[test]
fn a_newer_install_supersedes_before_switching_and_waits_after() {
    for phase in [Phase::Receiving, Phase::Verifying, Phase::Proving, Phase::Loading] {
        let mut b = with_two();
        b.send(command("old", "b"));
        b.until(phase);
        b.send(command("new", "c"));
        assert_eq!(b.ended("old"), (JobState::Canceled, "superseded"), "{phase:?}");
        assert!(b.effects.contains(&Effect::Abandon { serial: 3 }));
        b.until(Phase::Probation);
        assert!(b.active("c"));
    }
    let mut b = with_two();
    b.send(command("old", "b"));
    b.until(Phase::Probation);
    b.send(command("new", "c"));
    b.send(command("newer", "d"));
    assert_eq!(b.ended("new"), (JobState::Canceled, "superseded"), "the mailbox is one deep");
    assert_eq!(b.state.waiting.as_ref().unwrap().state, JobState::Queued);
    assert!(b.active("b"));
    b.done(Step::Passed);
    assert_eq!(b.phase(), Some(Phase::Receiving));
    b.until(Phase::Probation);
    assert!(b.active("d"));
}

#[test]
fn what_admission_refuses_disturbs_nothing() {
    let mut b = with_two();
    b.send(command("good", "b"));
    b.until(Phase::Proving);
    let refusal = Reason::new("unsigned", "for the test");
    let event =
        Event::Install { now: b.now, command: command("bad", "x"), admission: Err(refusal) };
    let effects = b.event(event);
    assert!(matches!(answer_in(&effects, "bad"), Answer::Ended { state: JobState::Rejected, .. }));
    assert_eq!(b.phase(), Some(Phase::Proving));
    assert_eq!(b.ended("bad"), (JobState::Rejected, "unsigned"));
}

#[test]
fn cancel_acts_at_once_and_is_too_late_after_switching() {
    for phase in [Phase::Receiving, Phase::Verifying, Phase::Proving, Phase::Loading] {
        let mut b = with_two();
        b.send(command("one", "b"));
        b.until(phase);
        assert_eq!(b.cancel(Some("one")), Answer::Done);
        assert_eq!(b.ended("one"), (JobState::Canceled, "cancel_requested"));
        assert!(matches!(b.cancel(Some("one")), Answer::Ended { .. }), "cancel twice");
        assert!(b.active("a"));
    }
    let mut b = with_two();
    b.send(command("one", "b"));
    for phase in [Phase::Switching, Phase::Probation] {
        b.until(phase);
        assert_eq!(code(&b.cancel(None)), "too_late");
    }
    b.send(command("two", "c"));
    assert_eq!(b.cancel(Some("two")), Answer::Done, "the waiting one can be cancelled");
    assert_eq!(code(&b.cancel(Some("never"))), "unknown_job");
    b.done(Step::Passed);
    assert_eq!(code(&b.cancel(None)), "no_job");
}

#[test]
fn a_rollback_by_hand_takes_effect_at_once_and_quarantines_nothing() {
    for phase in [Phase::Receiving, Phase::Loading, Phase::Switching, Phase::Probation] {
        let mut b = with_two();
        b.send(command("one", "b"));
        b.until(phase);
        b.send(command("later", "c"));
        let live = matches!(phase, Phase::Switching | Phase::Probation);
        let epoch = b.state.slot.epoch;
        b.roll_back("back", None);
        let expected = if live { "a" } else { "z" };
        assert!(b.active(expected), "{phase:?}");
        assert_eq!(b.phase(), Some(Phase::Switching));
        assert_eq!(b.state.slot.epoch, epoch + 1);
        let swap = Effect::Swap {
            serial: b.serial(),
            to: Some(digest(expected)),
            epoch: b.state.slot.epoch,
        };
        assert!(b.effects.contains(&swap));
        if live {
            assert_eq!(b.ended("one"), (JobState::Failed, "rollback_requested"));
        }
        assert_eq!(b.ended("later"), (JobState::Canceled, "rollback_requested"));
        assert!(matches!(b.roll_back("again", None), Answer::Same { .. }), "pressed twice");
        b.done(Step::Switched);
        assert_eq!(b.ended("back"), (JobState::Succeeded, ""));
        assert!(b.state.quarantine.is_empty() && b.state.breakers.is_empty());
    }
    let mut b = with_two();
    b.roll_back("back", None);
    b.done(Step::Switched);
    b.roll_back("forth", None);
    b.done(Step::Switched);
    assert!(b.active("a"), "back and forth");
    assert!(matches!(b.roll_back("gone", Some("a")), Answer::Accepted { .. }));
    assert_eq!(b.ended("gone"), (JobState::Succeeded, "already_active"));
}

#[test]
fn a_cold_rollback_is_loaded_first_and_waits_for_nothing_else() {
    let mut b = with_two();
    let event = |b: &Bench, id: &str, in_store| Event::Rollback {
        now: b.now,
        id: id.to_owned(),
        way: Way::Cli,
        from: String::new(),
        to: Some(digest("old")),
        warm: false,
        in_store,
    };
    let refused = event(&b, "gone", false);
    assert_eq!(code(&answer_in(&b.event(refused), "gone")), "unknown_model");
    b.send(command("one", "b"));
    b.until(Phase::Probation);
    let cold = event(&b, "back", true);
    b.event(cold);
    assert!(b.active("a"), "the failed one is gone at once");
    assert_eq!(b.phase(), Some(Phase::Verifying));
    b.send(command("later", "c"));
    assert!(b.state.waiting.is_some(), "a rollback is not superseded by an install");
    b.done(Step::Verified);
    assert_eq!(b.phase(), Some(Phase::Loading), "nothing is proven again");
    b.until(Phase::Switching);
    assert!(b.active("old") && b.state.slot.probation.is_none());
    b.done(Step::Switched);
    assert_eq!(b.ended("back").0, JobState::Succeeded);
    assert_eq!(b.phase(), Some(Phase::Receiving), "and now the install");
}

#[test]
fn a_model_that_fails_on_probation_goes_back_before_the_disk_is_asked() {
    let mut b = with_two();
    b.send(command("one", "b"));
    b.until(Phase::Probation);
    let effects = b.fail_probation();
    let epoch = b.state.slot.epoch;
    let swap = Effect::Swap { serial: 3, to: Some(digest("a")), epoch };
    assert_eq!(effects[0], swap);
    assert!(matches!(effects[1], Effect::Commit(_)));
    assert_eq!(b.ended("one"), (JobState::Failed, "nan_output"));
    assert_eq!(b.state.slot.previous, Some(digest("z")), "previous is what it was");
    b.send(command("two", "b"));
    b.done(Step::Received { digest: digest("b") });
    assert_eq!(b.ended("two"), (JobState::Rejected, "quarantined"));
    assert_eq!(code(&b.roll_back("back", Some("b"))), "quarantined");
    let id = "r".to_owned();
    b.event(Event::Release { now: b.now, id, digest: digest("b") });
    b.install_whole("three", "b");
}

#[test]
fn a_failed_model_does_not_come_back_as_the_previous_one() {
    let mut b = with_two();
    b.install_whole("b", "b");
    b.roll_back("back", None);
    b.done(Step::Switched);
    assert_eq!(b.state.slot.previous, Some(digest("b")));
    b.send(command("again", "b"));
    b.until(Phase::Probation);
    b.fail_probation();
    assert!(b.active("a"));
    assert_eq!(b.state.slot.previous, None);
}

#[test]
fn manual_waits_for_a_person_also_after_a_restart() {
    let mut b = with_two();
    b.send(Box::new(noblink::update::job::Command {
        install: Install::Manual,
        ..*command("one", "b")
    }));
    assert_eq!(code(&b.confirm(None)), "not_waiting");
    b.until(Phase::AwaitingConfirm);
    assert_eq!(b.state.job.as_ref().unwrap().ask.as_ref().unwrap().code, "manual");
    b.restart("kernel-1");
    assert_eq!(b.phase(), Some(Phase::Receiving), "proved again");
    b.until(Phase::AwaitingConfirm);
    assert_eq!(b.confirm(None), Answer::Done);
    b.until(Phase::Probation);
    assert!(b.active("b"));
    b.done(Step::Passed);
    assert!(matches!(b.confirm(Some("one")), Answer::Ended { .. }), "confirmed twice");

    b.send(Box::new(noblink::update::job::Command {
        install: Install::Manual,
        ..*command("two", "c")
    }));
    b.until(Phase::AwaitingConfirm);
    b.send(command("three", "d"));
    assert_eq!(b.ended("two"), (JobState::Canceled, "superseded"));
}

#[test]
fn a_gate_may_leave_the_word_to_a_person() {
    let mut b = with_two();
    b.send(command("one", "b"));
    b.until(Phase::Proving);
    b.done(Step::Proved { ask: Some(Reason::new("finds_nothing", "0 objects against 12")) });
    b.until(Phase::AwaitingConfirm);
    assert_eq!(b.state.job.as_ref().unwrap().ask.as_ref().unwrap().code, "finds_nothing");
}

#[test]
fn three_refusals_of_one_way_within_a_day_stop_its_automatic_installs() {
    let mut b = with_two();
    for (id, name) in [("1", "b"), ("2", "c"), ("3", "d")] {
        b.send(command(id, name));
        b.until(Phase::Proving);
        b.refuse("low_recall");
    }
    assert!(b.state.breakers[&Way::Mqtt].open);
    b.send(command("4", "e"));
    b.until(Phase::AwaitingConfirm);
    assert_eq!(b.state.job.as_ref().unwrap().ask.as_ref().unwrap().code, "breaker_open");
    let id = "close".to_owned();
    b.event(Event::CloseBreaker { now: b.now, id, way: Way::Mqtt });
    assert_eq!(b.phase(), Some(Phase::Switching), "closing it lets the held one go on");
    b.until(Phase::Probation);
    b.fail_probation();
    assert!(!b.state.breakers[&Way::Mqtt].open, "counted from one again");
    b.now += 25 * HOUR;
    for (id, name) in [("5", "f"), ("6", "g")] {
        b.send(command(id, name));
        b.refuse("structure");
    }
    b.install_whole("7", "h");
    let mut other = *command("8", "i");
    other.way = Way::Cli;
    b.send(command("9", "j"));
    b.refuse("structure");
    assert!(b.state.breakers[&Way::Mqtt].open);
    b.send(Box::new(other));
    b.until(Phase::Probation);
}

#[test]
fn a_process_that_dies_twice_on_probation_goes_back_and_stays_back() {
    let mut b = with_two();
    b.send(command("one", "b"));
    b.until(Phase::Switching);
    b.restart("kernel-1");
    assert!(b.active("b"));
    assert_eq!(b.phase(), Some(Phase::Probation), "probation starts again");
    assert_eq!(b.state.slot.probation.as_ref().unwrap().tries_left, 1);
    b.restart("kernel-1");
    assert!(b.active("a"));
    assert_eq!(b.ended("one"), (JobState::Failed, "killed_service"));
    assert!(b.state.quarantine.contains_key(&digest("b")));
}

#[test]
fn a_stop_in_good_order_costs_no_try() {
    let mut b = with_two();
    b.send(command("one", "b"));
    b.until(Phase::Probation);
    for kernel in ["kernel-1", "kernel-1", "kernel-2", "kernel-3"] {
        b.event(Event::Stop { now: b.now });
        b.restart(kernel);
        assert_eq!(b.state.slot.probation.as_ref().unwrap().tries_left, 2);
    }
    b.done(Step::Passed);
    assert!(b.active("b"));
}

#[test]
fn the_second_power_cut_in_a_row_goes_back_without_quarantine() {
    let mut b = with_two();
    b.send(command("one", "b"));
    b.until(Phase::Probation);
    b.restart("kernel-2");
    assert!(b.active("b"));
    b.event(Event::Stop { now: b.now });
    b.restart("kernel-2");
    b.restart("kernel-3");
    assert!(b.active("b"), "not in a row");
    b.restart("kernel-4");
    assert!(b.active("a"));
    assert_eq!(b.ended("one"), (JobState::Failed, "power_cut"));
    assert!(b.state.quarantine.is_empty());
}

#[test]
fn deaths_and_power_cuts_by_turns_come_to_an_end() {
    let mut b = with_two();
    b.send(command("one", "b"));
    b.until(Phase::Probation);
    let mut restarts = 0;
    while b.active("b") {
        restarts += 1;
        b.restart(if restarts % 2 == 0 { "kernel-1" } else { "kernel-2" });
        assert!(restarts < 4);
    }
}

#[test]
fn a_job_that_kills_the_service_before_the_slot_is_given_up() {
    for (phase, quarantined) in [(Phase::Proving, false), (Phase::Loading, true)] {
        let mut b = with_two();
        b.send(command("one", "b"));
        b.until(phase);
        b.send(command("two", "b"));
        b.until(phase);
        b.restart("kernel-1");
        b.until(phase);
        b.restart("kernel-1");
        assert_eq!(b.ended("two"), (JobState::Failed, "killed_service"));
        assert_eq!(b.state.quarantine.contains_key(&digest("b")), quarantined);
        assert!(b.active("a"));
    }
}

#[test]
fn sequences_never_go_back_and_unsigned_ones_use_nothing_up() {
    let mut b = with_two();
    for (id, sequence) in [("12", (12, true)), ("13", (13, true)), ("u", (99, false))] {
        let mut c = *command(id, id);
        c.sequence = Some(sequence);
        b.send(Box::new(c));
    }
    assert_eq!(b.state.highest(true), Some(13));
    assert_eq!(b.state.highest(false), Some(99));
    b.refuse("structure");
    assert_eq!(b.state.highest(true), Some(13));
}

#[test]
fn late_and_foreign_reports_change_nothing() {
    let mut b = with_two();
    b.send(command("old", "b"));
    b.until(Phase::Loading);
    let old = b.serial();
    b.send(command("new", "c"));
    let before = b.state.clone();
    for step in [
        Step::Received { digest: digest("b") },
        Step::Verified,
        Step::Proved { ask: None },
        Step::Loaded,
        Step::Switched,
        Step::Passed,
    ] {
        b.event(Event::Done { now: b.now, serial: old, step: step.clone(), gates: vec![] });
        if !matches!(step, Step::Received { .. }) {
            b.done(step);
        }
        assert_eq!(b.state, before);
    }
    b.until(Phase::Probation);
    let before = b.state.clone();
    b.refuse("a_gate_that_comes_late");
    assert_eq!(b.state, before);
}

#[test]
fn a_commit_that_fails_before_the_swap_fails_the_job_only() {
    let mut b = with_two();
    b.send(command("one", "b"));
    b.until(Phase::Loading);
    let reason = Reason::new("no_space", "for the test");
    b.event(Event::StorageFailed { now: b.now, serial: b.serial(), reason });
    assert_eq!(b.ended("one"), (JobState::Failed, "no_space"));
    assert!(b.active("a") && b.state.quarantine.is_empty());
}

#[test]
fn a_model_that_does_not_load_at_the_start_leaves_the_slot_to_what_runs() {
    let mut b = with_two();
    b.send(command("one", "b"));
    b.until(Phase::Probation);
    b.boot("kernel-1");
    b.event(Event::Running {
        now: b.now,
        model: Some(digest("a")),
        from_factory: false,
        why: Some(Reason::new("blob_corrupt", "for the test")),
        quarantine: false,
    });
    assert!(b.active("a"));
    assert_eq!(b.ended("one"), (JobState::Failed, "blob_corrupt"));
    assert!(b.state.quarantine.is_empty() && b.state.slot.probation.is_none());
    assert_eq!(b.state.slot.previous, Some(digest("z")));

    let mut b = with_two();
    b.boot("kernel-1");
    b.running(None);
    assert_eq!(b.state.slot.active, None);
    b.install_whole("one", "b");
}

#[test]
fn the_start_order_skips_what_failed_and_prefers_a_new_factory_file() {
    let mut b = with_two();
    let factory = Some(digest("factory"));
    let order = |b: &Bench, f| -> Vec<Origin> {
        start_order(&b.state, f).into_iter().map(|(_, origin)| origin).collect()
    };
    assert_eq!(order(&b, factory), [Origin::Active, Origin::Previous, Origin::Factory]);
    assert_eq!(order(&b, Some(digest("a"))), [Origin::Active, Origin::Previous]);
    b.state.quarantine.insert(digest("z"), Reason::new("x", "y"));
    assert_eq!(order(&b, None), [Origin::Active]);
    b.state.slot.from_factory = true;
    assert_eq!(order(&b, factory), [Origin::Factory, Origin::Active]);
    assert!(start_order(&fresh().state, None).is_empty());
}
