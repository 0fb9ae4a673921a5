//! The store, the registry and the keeper on a real file system.

use std::fs;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use noblink::update::digest::Digest;
use noblink::update::event::{Answer, Effect, Event, Step};
use noblink::update::job::{JobState, Way};
use noblink::update::keeper::Keeper;
use noblink::update::manifest::Manifest;
use noblink::update::registry::{Model, Registry};
use noblink::update::store::{Store, StoreError};

use super::{command, digest};
use crate::harness::store::open;

fn put(store: &Store, bytes: &[u8]) -> Digest {
    let mut part = store.stage(bytes.len() as u64, 1 << 20).unwrap();
    part.write(bytes).unwrap();
    let digest = part.finish(None).unwrap().digest;
    store.settle(&digest);
    digest
}

fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<_> =
        fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// All that is to be done, in one list.
fn handle(keeper: &mut Keeper, event: Event) -> Vec<Effect> {
    let mut effects = Vec::new();
    let rest = keeper.handle(event, &mut |first| effects.push(first));
    effects.extend(rest);
    effects
}

fn start(keeper: &mut Keeper) {
    handle(keeper, Event::Boot { now: 1_000, kernel_boot: "k".to_owned() });
    let model = keeper.state().slot.active;
    handle(
        keeper,
        Event::Running { now: 1_000, model, from_factory: false, why: None, quarantine: false },
    );
}

/// Runs a command for the model `name`, whose blob is made, to its end.
fn install(keeper: &mut Keeper, id: &str, name: &str) {
    let blob = put(keeper.store(), name.as_bytes());
    assert_eq!(blob, digest(name));
    let command = command(id, name);
    handle(keeper, Event::Install { now: 2_000, command, admission: Ok(()) });
    for step in [
        Step::Received { digest: blob },
        Step::Verified,
        Step::Proved { ask: None },
        Step::Loaded,
        Step::Switched,
        Step::Passed,
    ] {
        let serial = keeper.state().job.as_ref().unwrap().serial;
        handle(keeper, Event::Done { now: 3_000, serial, step, gates: vec![] });
    }
    keeper.collect().unwrap();
    assert_eq!(keeper.state().slot.active, Some(blob));
}

#[test]
fn a_blob_is_read_only_and_named_by_its_digest() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path(), 0).unwrap();
    let blob = put(&store, b"abc");
    assert_eq!(blob, Digest::of(b"abc"));
    let path = dir.path().join(format!("blobs/sha256-{blob}"));
    assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o444);
    assert_eq!(store.load(&blob).unwrap(), b"abc");
    assert_eq!(names(&dir.path().join("staging")), [""; 0]);
    // Bit rot is seen, and repaired by sending the model again.
    fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
    fs::write(&path, b"abd").unwrap();
    let e = store.load(&blob).unwrap_err();
    assert_eq!(e.code(), "blob_corrupt", "{e}");
    put(&store, b"abc");
    assert_eq!(store.load(&blob).unwrap(), b"abc");
}

#[test]
fn a_transfer_goes_on_where_it_was_and_never_ends_as_something_else() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path(), 0).unwrap();
    let wanted = Digest::of(b"abcdef");
    let mut part = store.resume(&wanted, 6).unwrap();
    part.write(b"abc").unwrap();
    drop(part);
    let mut part = store.resume(&wanted, 6).unwrap();
    assert_eq!(part.len(), 3);
    assert!(matches!(part.write(b"defg"), Err(StoreError::TooLarge { max: 6 })));
    part.write(b"def").unwrap();
    assert_eq!(part.finish(Some(&wanted)).unwrap().size, 6);

    // A torn tail shows at the end, and the next attempt starts anew.
    let wanted = Digest::of(b"uvwxyz");
    let mut part = store.resume(&wanted, 6).unwrap();
    part.write(b"uv?").unwrap();
    drop(part);
    let mut part = store.resume(&wanted, 6).unwrap();
    part.write(b"xyz").unwrap();
    assert_eq!(part.finish(Some(&wanted)).unwrap_err().code(), "digest_mismatch");
    assert!(store.resume(&wanted, 6).unwrap().is_empty());
    // Complete, and the power went before it got its name.
    let whole = Digest::of(b"whole");
    let path = dir.path().join(format!("staging/sha256-{whole}.part"));
    fs::write(&path, b"whole").unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o444)).unwrap();
    let part = store.resume(&whole, 5).unwrap();
    assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    assert_eq!(part.finish(Some(&whole)).unwrap().size, 5);
    // More than announced is on the disk.
    drop(store.resume(&wanted, 6).unwrap());
    let path = dir.path().join(format!("staging/sha256-{wanted}.part"));
    fs::OpenOptions::new().append(true).open(&path).unwrap().write_all(b"1234567").unwrap();
    assert!(store.resume(&wanted, 6).unwrap().is_empty());
}

#[test]
fn space_is_asked_for_before_a_byte_is_written() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path(), 1 << 60).unwrap();
    let e = store.stage(1, 10).unwrap_err();
    assert_eq!(e.code(), "no_space");
    assert_eq!(store.resume(&digest("x"), 10).unwrap_err().code(), "no_space");
    let full = StoreError::Io {
        path: dir.path().to_owned(),
        source: std::io::Error::from_raw_os_error(5),
    };
    assert_eq!(full.code(), "storage_failed");
}

/// A file that was just sent, whose job is made in a moment, while another job ends.
#[test]
fn collection_keeps_what_came_in_until_a_job_names_it() {
    let dir = tempfile::tempdir().unwrap();
    let mut keeper = open(dir.path());
    start(&mut keeper);
    let staging = dir.path().join("staging");
    fs::write(staging.join("new-0123456789abcdef.part"), "of a process that died").unwrap();
    let mut part = keeper.store().stage(3, 1 << 20).unwrap();
    part.write(b"ne").unwrap();
    keeper.collect().unwrap();
    assert_eq!(names(&staging).len(), 1, "the one on its way");
    part.write(b"w").unwrap();
    let blob = part.finish(None).unwrap();
    keeper.collect().unwrap();
    assert!(keeper.store().contains(&blob.digest));
    keeper.store().settle(&blob.digest);
    keeper.collect().unwrap();
    assert!(!keeper.store().contains(&blob.digest), "no job wanted it");
}

#[test]
fn collection_keeps_what_runs_what_ran_and_what_is_pinned() {
    let dir = tempfile::tempdir().unwrap();
    let mut keeper = open(dir.path());
    start(&mut keeper);
    let pinned = put(keeper.store(), b"pinned");
    keeper
        .put_model(&Model {
            sha256: pinned,
            id: "p".to_owned(),
            version: "1".to_owned(),
            size: 6,
            added: 1,
            way: Some(Way::Cli),
            from: "test".to_owned(),
            manifest: None,
            lineage: serde_json::json!({"parent": "o"}),
            pinned: true,
        })
        .unwrap();
    for name in ["a", "b", "c"] {
        install(&mut keeper, name, name);
    }
    let mut expected = vec![pinned, digest("b"), digest("c")];
    expected.sort();
    assert_eq!(keeper.store().list().unwrap(), expected);
    // A candidate and its unfinished transfer stay as long as its job is open.
    let mut wanted = *command("d", "d");
    wanted.digest = Some(digest("d"));
    let event = |c| Event::Install { now: 4_000, command: Box::new(c), admission: Ok(()) };
    handle(&mut keeper, event(wanted));
    drop(keeper.store().resume(&digest("d"), 8).unwrap());
    drop(keeper.store().resume(&digest("e"), 8).unwrap());
    keeper.collect().unwrap();
    let staging = dir.path().join("staging");
    assert_eq!(names(&staging), [format!("sha256-{}.part", digest("d"))]);
    let job = Some("d".to_owned());
    handle(&mut keeper, Event::Cancel { now: 5_000, id: "c".to_owned(), job });
    keeper.collect().unwrap();
    assert_eq!(names(&staging), [""; 0]);
    assert_eq!(keeper.registry().models().unwrap().len(), 1);
}

#[test]
fn a_restart_finds_the_machine_as_it_was() {
    let dir = tempfile::tempdir().unwrap();
    let mut keeper = open(dir.path());
    start(&mut keeper);
    install(&mut keeper, "one", "a");
    let mut c = *command("two", "b");
    c.sequence = Some((7, true));
    handle(&mut keeper, Event::Install { now: 4_000, command: Box::new(c), admission: Ok(()) });
    let refusal = noblink::update::job::Reason::new("unsigned", "for the test");
    let bad = command("bad", "x");
    handle(&mut keeper, Event::Install { now: 4_000, command: bad, admission: Err(refusal) });
    let before = keeper.state().clone();
    assert_eq!(before.breakers.len(), 1);
    let words: Vec<_> = keeper
        .registry()
        .changes(1)
        .unwrap()
        .into_iter()
        .map(|c| c.phase.unwrap_or(c.state))
        .collect();
    let phases =
        ["receiving", "verifying", "proving", "loading", "switching", "probation", "committed"];
    assert_eq!(words, phases);
    assert_eq!(keeper.registry().jobs(2).unwrap()[0].id, "bad");
    drop(keeper);
    assert_eq!(*open(dir.path()).state(), before);
}

#[test]
fn a_second_process_is_kept_out() {
    let dir = tempfile::tempdir().unwrap();
    let _first = open(dir.path());
    let e = Keeper::open(dir.path(), 0, 1_000).unwrap_err();
    assert_eq!(e.code(), "in_use", "{e}");
}

#[test]
fn a_damaged_registry_is_moved_aside_and_its_blobs_are_found_again() {
    for damage in ["garbage", "truncated", "content", "other", "zero"] {
        let dir = tempfile::tempdir().unwrap();
        let mut keeper = open(dir.path());
        start(&mut keeper);
        install(&mut keeper, "one", "a");
        drop(keeper);
        let path = dir.path().join("registry.db");
        match damage {
            "garbage" => fs::write(&path, vec![0x5a; 20_000]).unwrap(),
            "truncated" => {
                let bytes = fs::read(&path).unwrap();
                fs::write(&path, &bytes[..bytes.len() / 2 + 100]).unwrap();
            }
            "content" => {
                let db = rusqlite::Connection::open(&path).unwrap();
                db.execute("UPDATE facts SET doc = 'x' WHERE name = 'slot'", []).unwrap();
            }
            "other" => {
                fs::remove_file(&path).unwrap();
                let db = rusqlite::Connection::open(&path).unwrap();
                db.execute_batch("CREATE TABLE t (a); PRAGMA user_version = 1;").unwrap();
            }
            _ => {
                let bytes = fs::read(&path).unwrap();
                fs::write(&path, vec![0; bytes.len()]).unwrap();
            }
        }
        let (mut keeper, notices) = Keeper::open(dir.path(), 0, 1_000).unwrap();
        let codes: Vec<_> = notices.iter().map(|n| n.code.to_string()).collect();
        assert_eq!(codes, ["registry_damaged", "blob_found"], "{damage}");
        assert!(dir.path().join("registry.db.damaged-1").exists());
        start(&mut keeper);
        keeper.collect().unwrap();
        assert_eq!(keeper.store().list().unwrap(), [digest("a")], "it is kept");
        install(&mut keeper, "next", "b");
    }
    // Nothing is lost by an empty file: that is how SQLite begins.
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("registry.db"), b"").unwrap();
    drop(open(dir.path()));
}

#[test]
fn a_newer_format_is_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    drop(Registry::open(dir.path()).unwrap());
    let db = rusqlite::Connection::open(dir.path().join("registry.db")).unwrap();
    db.pragma_update(None, "user_version", 99).unwrap();
    drop(db);
    let e = Registry::open(dir.path()).unwrap_err();
    assert_eq!(e.code(), "newer_format", "{e}");
}

#[test]
fn one_digest_has_one_description_while_it_is_in_the_slot() {
    use base64::Engine as _;
    let dir = tempfile::tempdir().unwrap();
    let mut keeper = open(dir.path());
    start(&mut keeper);
    install(&mut keeper, "one", "a");
    let text = br#"{"model":"a","labels":["x"]}"#;
    keeper
        .put_model(&Model {
            sha256: digest("a"),
            id: "a".to_owned(),
            version: "1".to_owned(),
            size: 1,
            added: 1,
            way: None,
            from: String::new(),
            manifest: Some(base64::engine::general_purpose::STANDARD.encode(text)),
            lineage: serde_json::Value::Null,
            pinned: false,
        })
        .unwrap();
    let same = Manifest::parse(br#"{"model":"a","labels":["x"],"sequence":9}"#).unwrap();
    assert_eq!(keeper.other_manifest(&digest("a"), &same), None);
    let other = Manifest::parse(br#"{"model":"a","labels":["y"]}"#).unwrap();
    assert_eq!(keeper.other_manifest(&digest("a"), &other).unwrap().code, "other_manifest");
    assert_eq!(keeper.other_manifest(&digest("b"), &other), None);
}

#[test]
fn a_disk_that_cannot_be_written_stops_installs_and_not_rollbacks() {
    super::cuts::in_a_process("update::store::on_a_full_disk", &[]);
}

/// Alone in its process: the limit on file sizes stands for a full disk.
#[test]
#[ignore = "started by a_disk_that_cannot_be_written_stops_installs_and_not_rollbacks"]
fn on_a_full_disk() {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    use nix::sys::signal::{SigHandler, Signal, signal};
    let dir = tempfile::tempdir().unwrap();
    let mut keeper = open(dir.path());
    start(&mut keeper);
    install(&mut keeper, "one", "a");
    install(&mut keeper, "two", "b");
    install(&mut keeper, "three", "c");
    let blob = put(keeper.store(), b"d");
    handle(
        &mut keeper,
        Event::Install { now: 1, command: command("four", "d"), admission: Ok(()) },
    );
    let serial = keeper.state().job.as_ref().unwrap().serial;
    for step in [Step::Received { digest: blob }, Step::Verified, Step::Proved { ask: None }] {
        handle(&mut keeper, Event::Done { now: 2, serial, step, gates: vec![] });
    }
    let (_, hard) = getrlimit(Resource::RLIMIT_FSIZE).unwrap();
    // SAFETY: ignoring a signal installs no handler.
    unsafe { signal(Signal::SIGXFSZ, SigHandler::SigIgn) }.unwrap();
    setrlimit(Resource::RLIMIT_FSIZE, 4096, hard).unwrap();

    let command_5 = command("five", "e");
    let effects =
        handle(&mut keeper, Event::Install { now: 3, command: command_5, admission: Ok(()) });
    let refused = |e: &Effect| matches!(e, Effect::Answer { answer: Answer::Refused(_), .. });
    assert!(matches!(effects.as_slice(), [answer] if refused(answer)), "{effects:?}");
    assert_eq!(keeper.state().job.as_ref().unwrap().serial, serial, "nothing is superseded");

    let done = Event::Done { now: 4, serial, step: Step::Loaded, gates: vec![] };
    let effects = handle(&mut keeper, done);
    assert!(!effects.iter().any(|e| matches!(e, Effect::Swap { .. })), "{effects:?}");
    assert_eq!(keeper.state().ended["four"].state, JobState::Failed);
    assert_eq!(keeper.state().slot.active, Some(digest("c")));

    let effects = handle(
        &mut keeper,
        Event::Rollback {
            now: 5,
            id: "back".to_owned(),
            way: Way::Cli,
            from: String::new(),
            to: None,
            warm: true,
            in_store: true,
        },
    );
    assert!(effects.iter().any(|e| matches!(e, Effect::Swap { .. })), "{effects:?}");
    assert_eq!(keeper.state().slot.active, Some(digest("b")));
    let serial = keeper.state().job.as_ref().unwrap().serial;
    handle(&mut keeper, Event::Done { now: 6, serial, step: Step::Switched, gates: vec![] });

    setrlimit(Resource::RLIMIT_FSIZE, hard, hard).unwrap();
    install(&mut keeper, "six", "f");
    let before = keeper.state().clone();
    drop(keeper);
    assert_eq!(*open(dir.path()).state(), before, "what waited was written down");
}
