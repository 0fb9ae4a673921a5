//! A whole service that is killed while models come and go, and what must hold in its next life.
#![allow(dead_code)] // each of `it` and `soak` uses its own part

use std::collections::BTreeSet;
use std::path::Path;
use std::time::Duration;

use noblink::update::digest::Digest;
use noblink::update::failpoint::VARIABLE;
use noblink::update::job::{JobState, State};
use serde_json::{Value, json};

use super::line::{Line, PROVED_S};
use super::onnx::{Detector, Fault, Output};
use super::service::Service;
use super::store::{check, copy_dir, open};
use super::until;

/// Small, so that a life is short.
fn model(version: &str) -> Detector {
    Detector::new(Output::Yolo8, 64, 64).with_metadata("noblink.version", version)
}

fn start(models: &str) -> Line {
    let dir = tempfile::tempdir().unwrap();
    let factory = model("first").write(dir.path(), "blobs.onnx");
    let mut line = Line::with("test://?width=160&height=120&fps=10", "", &factory, models);
    line.keep(dir);
    line
}

/// A model with a manifest beside it, complete from one instant to the next.
fn drop_into(inbox: &Path, name: &str, bytes: &[u8], sequence: u64) {
    let outside = inbox.with_file_name(name);
    let manifest = json!({ "sequence": sequence }).to_string();
    for (end, content) in [("manifest.json", manifest.as_bytes()), ("onnx", bytes)] {
        std::fs::write(&outside, content).unwrap();
        std::fs::rename(&outside, inbox.join(format!("{name}.{end}"))).unwrap();
    }
}

/// The first record of the present life.
fn first_record(line: &mut Line) -> Value {
    let boot = line.service.boot();
    let mut first = None;
    until("the service infers", 30, || {
        first = line.subscriber.first_with("/detections", &boot);
        first.is_some()
    });
    serde_json::from_str(&first.unwrap().payload).unwrap()
}

pub struct Dice(pub u64);

impl Dice {
    pub fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) % n
    }
}

/// So many kills at random moments of lives in which models come, fail and go back.
pub fn at_random(kills: usize, seed: u64) {
    println!("{kills} kills, seed {seed:#x}");
    let mut line = start("probation_s = 1");
    let mut dice = Dice(seed);
    let mut sent = BTreeSet::from([Digest::of(&model("first").bytes())]);
    let (mut early, mut before) = (0, None::<State>);
    for n in 1..=kills {
        let wait_ms = if n > 1 && dice.below(4) == 0 {
            early += 1;
            dice.below(900)
        } else {
            let first = first_record(&mut line);
            assert_starts_as(&first, before.as_ref());
            act(&line, n, &mut dice, &mut sent);
            dice.below(2500)
        };
        std::thread::sleep(Duration::from_millis(wait_ms));
        line.service.kill();
        let state = check(&line.service.state_dir());
        let active = state.slot.active.expect("never neither");
        assert!(sent.contains(&active), "kill {n}: {active} was never sent");
        if let Some(before) = &before {
            assert!(state.slot.epoch >= before.slot.epoch, "kill {n}: the epoch went back");
            assert!(state.highest_unsigned >= before.highest_unsigned, "kill {n}: I5");
        }
        before = Some(state);
        line.service.again(&[]);
    }
    // I8: whatever the last kill left, the next good one goes live.
    first_record(&mut line);
    until("nothing is left to do", PROVED_S, || line.state()["job"].is_null());
    close_breaker(&line);
    let last = model("last").bytes();
    drop_into(&line.inbox(), "last", &last, 1 << 40);
    let job = line.over(&line.job_of("last.onnx"));
    assert_eq!(job["state"], "SUCCEEDED", "{job:#}");
    line.stop();
    let state = check(&line.service.state_dir());
    assert_eq!(state.slot.active, Some(Digest::of(&last)));
    assert_tidy(&line, 2);
    let records = line.assert_nothing_lost();
    let jobs = open(&line.service.state_dir()).registry().jobs(usize::MAX).unwrap();
    let ended = |state| jobs.iter().filter(|j| j.state == state).count();
    println!(
        "{kills} kills, {early} of them while the service started; {} swaps, {} jobs: {} \
         succeeded, {} failed, {} rejected, {} cancelled; {records} records",
        state.slot.epoch,
        jobs.len(),
        ended(JobState::Succeeded),
        ended(JobState::Failed),
        ended(JobState::Rejected),
        ended(JobState::Canceled)
    );
}

/// What runs is what the store named, or the one before it.
fn assert_starts_as(first: &Value, before: Option<&State>) {
    let Some(State { slot, .. }) = before else { return };
    let runs: Digest = first["model"]["sha256"].as_str().unwrap().parse().unwrap();
    assert!([slot.active, slot.previous].contains(&Some(runs)), "{runs} instead of {slot:?}");
    assert!(first["model"]["epoch"].as_u64() >= Some(slot.epoch), "{first} after {slot:?}");
}

/// Deaths on probation roll back, and three of those open it.
fn close_breaker(line: &Line) {
    let closed = line.order("close-breaker", &json!({ "id": "close", "way": "inbox" }));
    assert_eq!(closed["ok"], true, "{closed}");
}

/// One or two models come, a bad one, or a command to go back.
fn act(line: &Line, n: usize, dice: &mut Dice, sent: &mut BTreeSet<Digest>) {
    close_breaker(line);
    let mut send = |name: String, fault: Fault| {
        let mut model = model(&name);
        model.fault = fault;
        let bytes = model.bytes();
        sent.insert(Digest::of(&bytes));
        let sequence = n as u64 * 2 + u64::from(name.starts_with("next"));
        drop_into(&line.inbox(), &name, &bytes, sequence);
    };
    match dice.below(10) {
        0..=4 => send(format!("model-{n}"), Fault::None),
        5 => {
            send(format!("model-{n}"), Fault::None);
            send(format!("next-{n}"), Fault::None);
        }
        6 => send(format!("bad-{n}"), Fault::Nan),
        _ => line.command("rollback", &json!({ "id": format!("back-{n}") })),
    }
}

/// I6, I7: nothing is left but the models that may be needed.
fn assert_tidy(line: &Line, blobs: usize) {
    let left = |part: &str| std::fs::read_dir(line.service.state_dir().join(part)).unwrap().count();
    assert_eq!(left("staging"), 0, "I6");
    assert!(left("blobs") <= blobs, "I7: {} blobs", left("blobs"));
    let files = std::fs::read_dir(line.inbox()).unwrap().flatten();
    let left: Vec<_> = files.map(|f| f.file_name()).filter(|f| f != "rejected").collect();
    assert!(left.is_empty(), "{left:?}");
}

/// Kills at the failpoints that a service passes from its start over an install to its stop: at
/// every `stride`th of them, each in a copy of the same store. Returns how many were tried.
pub fn at_failpoints(stride: usize) -> usize {
    let mut line = start("probation_s = 0");
    line.stop();
    let base = line.service.dir.path().join("base");
    copy_dir(&line.service.state_dir(), &base);
    let [old, new] = [model("first"), model("second")].map(|m| Digest::of(&m.bytes()));
    // The folder of the base must outlive the copies.
    let (config, home) = (line.config.clone(), tempfile::tempdir().unwrap());
    let whole = home.path().join("base");
    copy_dir(&base, &whole);
    for (tried, cut) in (1..).step_by(stride).enumerate() {
        let dir = tempfile::tempdir().unwrap();
        let inbox = dir.path().join("state/inbox");
        copy_dir(&whole, &dir.path().join("state"));
        drop_into(&inbox, "second", &model("second").bytes(), 1);
        let nth = format!("#{cut}");
        line.service = Service::start_in(dir, &config, &[(VARIABLE, &nth)]);
        let survived = run_and_stop(&mut line);
        let state = check(&line.service.state_dir());
        let active = state.slot.active;
        assert!(active == Some(old) || active == Some(new), "cut {cut}: {active:?}");

        line.service.again(&[]);
        let first = first_record(&mut line);
        assert_starts_as(&first, Some(&state));
        let wanted = json!(new.to_string());
        let done = |line: &Line| {
            let state = line.state();
            state["job"].is_null() && state["active"]["sha256"] == wanted
        };
        until("the next life finishes what was begun", PROVED_S, || done(&line));
        line.until_record("a record by it", 20, |r| r["model"]["sha256"] == wanted);
        assert_eq!(line.service.stop().code(), Some(0), "cut {cut}");
        let state = check(&line.service.state_dir());
        assert_eq!((state.slot.active, state.slot.previous), (Some(new), Some(old)), "cut {cut}");
        let jobs = open(&line.service.state_dir()).registry().jobs(usize::MAX).unwrap();
        let ends: Vec<_> = jobs.iter().map(|j| j.state).collect();
        assert_eq!(ends, [JobState::Succeeded], "cut {cut}: one job, done once");
        assert_tidy(&line, 2);
        if survived {
            println!("{tried} cut points, every {stride} of fewer than {cut}, all recovered");
            return tried;
        }
    }
    unreachable!("an install ends")
}

/// A life that is to install what lies in its inbox and then stop; whether it lived to its end.
fn run_and_stop(line: &mut Line) -> bool {
    let mut ended = None;
    until("it has installed the model, or is dead", PROVED_S, || {
        ended = line.service.ended();
        ended.is_some() || line.service.log().contains("SUCCEEDED committed")
    });
    let ended = ended.unwrap_or_else(|| line.service.stop());
    assert!(ended.success() || line.service.log().contains("failpoint "), "{ended}");
    ended.success()
}
