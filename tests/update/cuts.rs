//! Power cuts, as far as a process can play them: `SIGKILL` at each failpoint that an install
//! from the inbox passes, and at random moments; then the invariants of an update.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, ExitStatus, Stdio};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use noblink::update::digest::Digest;
use noblink::update::event::{Effect, Event, Step, Stopped};
use noblink::update::failpoint::{NAMES, VARIABLE};
use noblink::update::inbox::{Inbox, InboxEvent, Options};
use noblink::update::job::{Command as Install, JobState, Reason, Source, Way};
use noblink::update::keeper::{Keeper, kernel_boot};
use noblink::update::registry::Model;
use noblink::update::start_order;

use super::command;
use crate::harness::store::{self, copy_dir, open};

const DIR: &str = "NOBLINK_TEST_DIR";
/// Models fail on probation.
const FAIL: &str = "NOBLINK_TEST_FAIL";
/// The service gets a command to roll back, again with each start as from a retrying sender.
const BACK: &str = "NOBLINK_TEST_BACK";

/// Runs one of the ignored tests in a process of its own.
pub(crate) fn in_a_process(test: &str, env: &[(&str, &str)]) {
    let status = run(test, env);
    assert!(status.success(), "{test}: {status}");
}

fn spawn(test: &str, env: &[(&str, &str)]) -> std::process::Child {
    let mut child = Command::new(std::env::current_exe().unwrap());
    child.args(["--exact", test, "--ignored", "--nocapture", "--test-threads=1"]);
    child.envs(env.iter().copied()).stdout(Stdio::null()).stderr(Stdio::piped());
    child.spawn().unwrap()
}

fn run(test: &str, env: &[(&str, &str)]) -> ExitStatus {
    let output = spawn(test, env).wait_with_output().unwrap();
    let killed = output.status.signal() == Some(9);
    if !output.status.success() && !killed {
        eprintln!("{}", String::from_utf8_lossy(&output.stderr));
    }
    output.status
}

fn now() -> i64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_millis() as i64
}

/// What a subscriber sees: the epochs of events, and their models.
fn live(dir: &Path, model: Option<Digest>, epoch: u64) {
    use std::io::Write;
    let path = dir.join("events");
    let mut file = fs::OpenOptions::new().create(true).append(true).open(path).unwrap();
    let model = model.map_or("none".to_owned(), |d| d.to_string());
    file.write_all(format!("{epoch} {model}\n").as_bytes()).unwrap();
}

/// A service without cameras: every step goes well, and each swap is noted as its worker's events
/// would show it.
struct Service<'a> {
    dir: &'a Path,
    keeper: Keeper,
    inbox: Inbox,
}

impl Service<'_> {
    fn new(dir: &Path) -> Service<'_> {
        let (keeper, notices) = Keeper::open(dir, 0, now()).unwrap();
        assert!(notices.is_empty(), "{notices:?}");
        let options = Options {
            settle: Duration::from_millis(20),
            settle_short: Duration::from_millis(10),
            ..Options::new(1 << 20, false)
        };
        let inbox = Inbox::open(&dir.join("inbox"), options).unwrap();
        let mut service = Service { dir, keeper, inbox };
        service.handle(Event::Boot { now: now(), kernel_boot: kernel_boot().unwrap() });
        let model = start_order(service.keeper.state(), None).first().map(|(d, _)| *d);
        if let Some(digest) = model {
            service.keeper.store().load(&digest).expect("what the slot names can be loaded");
        }
        live(dir, model, service.keeper.state().slot.epoch);
        service.handle(Event::Running {
            now: now(),
            model,
            from_factory: false,
            why: None,
            quarantine: false,
        });
        service
    }

    fn handle(&mut self, event: Event) {
        let mut first = |effect| match effect {
            Effect::Swap { to, epoch, .. } => live(self.dir, to, epoch),
            other => panic!("{other:?} could wait for the disk"),
        };
        for effect in self.keeper.handle(event, &mut first) {
            self.act(effect);
        }
    }

    fn act(&mut self, effect: Effect) {
        let (serial, step) = match effect {
            Effect::Fetch { serial } => {
                let digest = self.keeper.state().job.as_ref().unwrap().digest.unwrap();
                if !self.keeper.store().contains(&digest) {
                    let reason = Reason::new("not_found", "the sender has it no more");
                    let how = Stopped::Failed;
                    let (gates, quarantine) = (vec![], false);
                    let now = now();
                    let event = Event::Ended { now, serial, how, reason, gates, quarantine };
                    return self.handle(event);
                }
                (serial, Step::Received { digest })
            }
            Effect::Verify { serial } => (serial, Step::Verified),
            Effect::Prove { serial } => (serial, Step::Proved { ask: None }),
            Effect::Load { serial } => (serial, Step::Loaded),
            Effect::Swap { serial, to, epoch } => {
                live(self.dir, to, epoch);
                (serial, Step::Switched)
            }
            Effect::Watch { serial } if std::env::var_os(FAIL).is_some() => {
                let reason = Reason::new("nan_output", "for the test");
                return self.handle(Event::ProbationFailed {
                    now: now(),
                    serial,
                    reason,
                    gates: Vec::new(),
                });
            }
            Effect::Watch { serial } => (serial, Step::Passed),
            Effect::Collect => {
                self.keeper.collect().unwrap();
                return;
            }
            _ => return,
        };
        self.handle(Event::Done { now: now(), serial, step, gates: vec![] });
    }

    /// Takes what the inbox holds until it holds nothing more.
    fn serve(&mut self) {
        let deadline = Instant::now() + Duration::from_secs(30);
        let files = |dir: &Path| {
            let entries = fs::read_dir(dir.join("inbox")).unwrap();
            entries.filter(|e| e.as_ref().unwrap().file_name() != "rejected").count()
        };
        while files(self.dir) > 0 {
            assert!(Instant::now() < deadline, "the inbox is not emptied");
            for event in self.inbox.poll(self.keeper.store(), Duration::from_millis(100)) {
                let candidate = match event {
                    InboxEvent::Candidate(candidate) => candidate,
                    // A file of the life before lay there still, beside a newer one.
                    InboxEvent::Refused { reason, .. } if reason.code == "superseded" => continue,
                    other => panic!("{other:?}"),
                };
                let blob = candidate.blob;
                let model = Model {
                    sha256: blob.digest,
                    id: candidate.stem().to_owned(),
                    version: blob.digest.short(),
                    size: blob.size,
                    added: now(),
                    way: Some(Way::Inbox),
                    from: candidate.name.clone(),
                    manifest: None,
                    lineage: serde_json::Value::Null,
                    pinned: false,
                };
                self.keeper.put_model(&model).unwrap();
                let install = Install {
                    id: candidate.job_id(),
                    way: Way::Inbox,
                    fingerprint: blob.digest,
                    source: Source::Store,
                    digest: Some(blob.digest),
                    sequence: Some((blob.size, true)),
                    ..*command("x", "x")
                };
                let command = Box::new(install);
                self.handle(Event::Install { now: now(), command, admission: Ok(()) });
                self.inbox.accepted(&candidate);
            }
        }
    }
}

#[test]
#[ignore = "started by the tests below, which kill it"]
fn service() {
    let Some(dir) = std::env::var_os(DIR) else { return };
    let dir = Path::new(&dir);
    let mut service = Service::new(dir);
    if std::env::var_os(BACK).is_some() {
        let (id, from) = ("back".to_owned(), "test".to_owned());
        let (way, to, warm, in_store) = (Way::Cli, None, false, true);
        service.handle(Event::Rollback { now: now(), id, way, from, to, warm, in_store });
    }
    service.serve();
    service.handle(Event::Stop { now: now() });
}

/// Models one after the other until someone kills it.
#[test]
#[ignore = "started by the tests below, which kill it"]
fn busy_service() {
    let Some(dir) = std::env::var_os(DIR) else { return };
    let dir = Path::new(&dir);
    let mut service = Service::new(dir);
    let deadline = Instant::now() + Duration::from_secs(30);
    while Instant::now() < deadline {
        let name = now();
        drop_model(dir, &format!("model {name}"));
        service.serve();
    }
}

fn drop_model(dir: &Path, content: &str) -> Digest {
    let inbox = dir.join("inbox");
    fs::create_dir_all(&inbox).unwrap();
    let file = content.replace(' ', "-");
    fs::write(dir.join("outside"), content).unwrap();
    fs::rename(dir.join("outside"), inbox.join(format!("{file}.onnx"))).unwrap();
    Digest::of(content.as_bytes())
}

/// The invariants that hold at any instant, after any kill. Returns the active model.
fn check(dir: &Path) -> Option<Digest> {
    let state = store::check(dir);
    // I2: no epoch is shown by two models, and none goes back.
    let events = fs::read_to_string(dir.join("events")).unwrap_or_default();
    let mut last = (0, "none".to_owned());
    for line in events.lines() {
        let (epoch, model) = line.split_once(' ').unwrap();
        let epoch: u64 = epoch.parse().unwrap();
        assert!(epoch > last.0 || (epoch == last.0 && model == last.1), "{events}");
        last = (epoch, model.to_owned());
    }
    state.slot.active
}

fn serve(dir: &Path, env: &[(&str, &str)]) -> ExitStatus {
    let dir = dir.to_str().unwrap();
    run("update::cuts::service", &[&[(DIR, dir)], env].concat())
}

/// Kills the service at each failpoint that it passes, in a copy of `base` each, and hands over
/// what is left. Returns the number of cuts.
fn each_cut(
    base: &Path,
    env: &[(&str, &str)],
    prepare: impl Fn(&Path),
    recovered: impl Fn(&Path, usize),
) -> usize {
    for cut in 1.. {
        let dir = tempfile::tempdir().unwrap();
        copy_dir(base, dir.path());
        prepare(dir.path());
        let nth = format!("#{cut}");
        let status = serve(dir.path(), &[env, &[(VARIABLE, &nth)]].concat());
        check(dir.path());
        if !status.success() {
            assert_eq!(status.signal(), Some(9), "cut {cut}: {status}");
        }
        recovered(dir.path(), cut);
        // I8: and it takes the next one.
        let next = drop_model(dir.path(), "next");
        assert!(serve(dir.path(), &[]).success(), "cut {cut}");
        assert_eq!(check(dir.path()), Some(next), "cut {cut}");
        assert_eq!(fs::read_dir(dir.path().join("staging")).unwrap().count(), 0, "I6");
        if status.success() {
            return cut - 1;
        }
    }
    unreachable!("an install ends")
}

/// A service that has run `first`, and then `second`.
fn base(models: &[&str]) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for model in models {
        let digest = drop_model(dir.path(), model);
        assert!(serve(dir.path(), &[]).success());
        assert_eq!(check(dir.path()), Some(digest));
    }
    dir
}

/// How the jobs of a model ended.
fn ends(dir: &Path, model: Digest) -> Vec<JobState> {
    let jobs = open(dir).registry().jobs(usize::MAX).unwrap();
    jobs.into_iter().filter(|j| j.digest == Some(model)).map(|j| j.state).collect()
}

#[test]
fn a_kill_at_any_step_of_an_install_leaves_the_old_model_or_the_new_one() {
    let [a, b] = ["first", "second"].map(|m| Digest::of(m.as_bytes()));
    let prepare = |dir: &Path| {
        drop_model(dir, "second");
    };
    let cuts = each_cut(base(&["first"]).path(), &[], prepare, |dir, cut| {
        let keeper = open(dir);
        let active = keeper.state().slot.active;
        assert!(active == Some(a) || active == Some(b), "cut {cut}: {active:?}");
        let highest = keeper.state().highest_signed;
        drop(keeper);
        // The next start finishes what was begun, once.
        assert!(serve(dir, &[]).success(), "cut {cut}");
        assert_eq!(check(dir), Some(b), "cut {cut}");
        assert_eq!(ends(dir, b), [JobState::Succeeded], "cut {cut}");
        let keeper = open(dir);
        assert!(keeper.state().highest_signed >= highest, "I5");
        let blobs: BTreeSet<_> = keeper.store().list().unwrap().into_iter().collect();
        assert_eq!(blobs, BTreeSet::from([a, b]), "cut {cut}");
    });
    println!("install: {cuts} cut points recovered");
    assert!(cuts > 25, "an install passes more failpoints than {cuts}");
}

#[test]
fn a_second_kill_in_the_next_life_leaves_one_of_both_as_well() {
    let [a, b] = ["first", "second"].map(|m| Digest::of(m.as_bytes()));
    let prepare = |dir: &Path| {
        drop_model(dir, "second");
    };
    let cuts = each_cut(base(&["first"]).path(), &[], prepare, |dir, cut| {
        let nth = format!("#{}", 1 + cut * 5 % 13);
        serve(dir, &[(VARIABLE, &nth)]);
        let active = check(dir);
        assert!(active == Some(a) || active == Some(b), "cut {cut}: {active:?}");
        assert!(serve(dir, &[]).success(), "cut {cut}");
        let active = check(dir);
        // Two deaths with it on probation, or over its job, are its end.
        let [how] = ends(dir, b)[..] else { panic!("cut {cut}: {:?}", ends(dir, b)) };
        let expected = if how == JobState::Succeeded { b } else { a };
        assert_eq!(active, Some(expected), "cut {cut}: {how:?}");
    });
    println!("two kills: {cuts} pairs of cut points recovered");
}

#[test]
fn a_kill_while_a_model_fails_on_probation_brings_the_old_one_back() {
    let [a, b] = ["first", "second"].map(|m| Digest::of(m.as_bytes()));
    let prepare = |dir: &Path| {
        drop_model(dir, "second");
    };
    let fail: &[(&str, &str)] = &[(FAIL, "1")];
    let cuts = each_cut(base(&["first"]).path(), fail, prepare, |dir, cut| {
        assert!(serve(dir, fail).success(), "cut {cut}");
        assert_eq!(check(dir), Some(a), "cut {cut}");
        assert_eq!(ends(dir, b), [JobState::Failed], "cut {cut}");
        assert!(open(dir).state().quarantine.contains_key(&b), "cut {cut}");
    });
    println!("failing model: {cuts} cut points recovered");
}

#[test]
fn a_kill_during_a_rollback_by_hand_finishes_it_once() {
    let [a, b] = ["first", "second"].map(|m| Digest::of(m.as_bytes()));
    let back: &[(&str, &str)] = &[(BACK, "1")];
    let cuts = each_cut(
        base(&["first", "second"]).path(),
        back,
        |_| {},
        |dir, cut| {
            let active = open(dir).state().slot.active;
            assert!(active == Some(a) || active == Some(b), "cut {cut}: {active:?}");
            assert!(serve(dir, back).success(), "cut {cut}");
            assert_eq!(check(dir), Some(a), "cut {cut}");
            let state = open(dir).state().clone();
            assert_eq!(state.ended["back"].state, JobState::Succeeded);
            assert!(state.quarantine.is_empty() && state.slot.previous == Some(b), "cut {cut}");
        },
    );
    println!("rollback: {cuts} cut points recovered");
}

#[test]
fn each_named_failpoint_lies_on_the_way_of_an_install() {
    for name in NAMES {
        let dir = tempfile::tempdir().unwrap();
        drop_model(dir.path(), "first");
        let status = serve(dir.path(), &[(VARIABLE, name)]);
        assert_eq!(status.signal(), Some(9), "{name} is never passed");
        check(dir.path());
    }
}

#[test]
fn kills_at_random_moments_leave_the_invariants() {
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir_all(dir.path().join("inbox")).unwrap();
    let path = dir.path().to_str().unwrap();
    let mut wait = 0x2545_f491_4f6c_dd1d_u64;
    let kills = 100;
    for _ in 0..kills {
        let mut child = spawn("update::cuts::busy_service", &[(DIR, path)]);
        wait ^= wait << 13;
        wait ^= wait >> 7;
        wait ^= wait << 17;
        std::thread::sleep(Duration::from_micros(wait % 160_000));
        child.kill().unwrap();
        let output = child.wait_with_output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.signal(), Some(9), "{said}");
        check(dir.path());
    }
    // The machine goes on from wherever the last kill left it. Deaths on probation roll back, and
    // three of those open the breaker, which a person closes.
    let close = Event::CloseBreaker { now: now(), id: "close".to_owned(), way: Way::Inbox };
    drop(open(dir.path()).handle(close, &mut |_| ()));
    assert!(serve(dir.path(), &[]).success());
    let last = drop_model(dir.path(), "the last one");
    assert!(serve(dir.path(), &[]).success());
    let newest = open(dir.path()).registry().jobs(3).unwrap();
    assert_eq!(check(dir.path()), Some(last), "{newest:#?}");
    let jobs = open(dir.path()).registry().jobs(usize::MAX).unwrap().len();
    println!("{kills} kills, {jobs} jobs");
}
