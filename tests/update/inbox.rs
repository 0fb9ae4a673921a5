//! The inbox on a real file system, with real inotify.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::Write;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use noblink::update::inbox::{Candidate, Inbox, InboxEvent, Options};
use noblink::update::job::Reason;
use noblink::update::store::Store;

use super::digest;

struct Bench {
    dir: tempfile::TempDir,
    store: Store,
    inbox: Inbox,
}

fn options() -> Options {
    Options {
        settle: Duration::from_millis(120),
        settle_short: Duration::from_millis(40),
        settle_blind: Duration::from_millis(300),
        sidecars: Duration::from_millis(600),
        ..Options::new(1 << 20, false)
    }
}

impl Bench {
    fn new(options: Options) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path(), 0).unwrap();
        let inbox = Inbox::open(&dir.path().join("inbox"), options).unwrap();
        let mut this = Self { dir, store, inbox };
        assert!(this.quiet(), "a new inbox is empty");
        this
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join("inbox").join(name)
    }

    fn write(&self, name: &str, content: &str) {
        fs::write(self.path(name), content).unwrap();
    }

    /// Events until there are `count`.
    fn events(&mut self, count: usize) -> Vec<InboxEvent> {
        let deadline = Instant::now() + Duration::from_secs(20);
        let mut events = Vec::new();
        while events.len() < count {
            assert!(Instant::now() < deadline, "{events:?}");
            events.extend(self.inbox.poll(&self.store, Duration::from_millis(200)));
        }
        events
    }

    fn candidate(&mut self) -> Candidate {
        match self.events(1).pop().unwrap() {
            InboxEvent::Candidate(candidate) => *candidate,
            other => panic!("{other:?}"),
        }
    }

    fn refused(&mut self) -> (String, String) {
        match self.events(1).pop().unwrap() {
            InboxEvent::Refused { name, reason } => (name, reason.code.into_owned()),
            other => panic!("{other:?}"),
        }
    }

    /// Nothing comes for longer than any settling takes.
    fn quiet(&mut self) -> bool {
        self.inbox.poll(&self.store, Duration::from_millis(700)).is_empty()
    }

    fn rejected(&self) -> Vec<String> {
        let entries = fs::read_dir(self.path("rejected")).unwrap();
        let mut names: Vec<_> =
            entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    fn reason(&self, name: &str) -> serde_json::Value {
        let path = self.path("rejected").join(format!("{name}.reason.json"));
        serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
    }
}

fn move_in(b: &Bench, name: &str, content: &str) {
    let outside = b.dir.path().join("outside");
    fs::write(&outside, content).unwrap();
    fs::rename(outside, b.path(name)).unwrap();
}

#[test]
fn a_file_that_is_copied_or_moved_in_is_one_candidate_and_goes_when_accepted() {
    let mut b = Bench::new(options());
    b.write("Best.onnx", "one");
    let c = b.candidate();
    assert_eq!((c.name.as_str(), c.stem(), c.blob.digest), ("Best.onnx", "Best", digest("one")));
    assert_eq!(b.store.load(&c.blob.digest).unwrap(), b"one");
    assert!(b.quiet(), "said once");
    assert!(b.path("Best.onnx").exists(), "it stays until its job is written down");
    b.inbox.accepted(&c);
    assert!(!b.path("Best.onnx").exists());
    move_in(&b, "Best.onnx", "one");
    let again = b.candidate();
    assert_ne!(again.job_id(), c.job_id(), "put in again is another job");
    assert!(again.job_id().len() <= 32);
}

#[test]
fn a_file_that_lay_there_before_the_start_is_found_as_the_same_job() {
    let mut b = Bench::new(options());
    b.write("m.onnx", "one");
    let before = b.candidate();
    // The process dies between the store and the removal.
    b.inbox = Inbox::open(&b.path(""), options()).unwrap();
    assert_eq!(b.candidate().job_id(), before.job_id());
}

#[test]
fn a_slow_copy_is_taken_when_it_is_whole() {
    let mut b = Bench::new(options());
    let mut file = File::create(b.path("slow.onnx")).unwrap();
    for part in ["a", "b", "c"] {
        file.write_all(part.as_bytes()).unwrap();
        assert!(b.quiet(), "half of it was taken after {part}");
    }
    drop(file);
    assert_eq!(b.candidate().blob.digest, digest("abc"));
    // Written in pieces, closed in between, and faster than it settles.
    for part in ["x", "y", "z"] {
        let mut file =
            File::options().create(true).append(true).open(b.path("pieces.onnx")).unwrap();
        file.write_all(part.as_bytes()).unwrap();
        drop(file);
        assert!(b.inbox.poll(&b.store, Duration::from_millis(30)).is_empty(), "{part}");
    }
    assert_eq!(b.candidate().blob.digest, digest("xyz"));
}

#[test]
fn a_copy_over_an_existing_name_is_another_candidate_and_is_not_removed() {
    let mut b = Bench::new(options());
    b.write("m.onnx", "one");
    let first = b.candidate();
    b.write("m.onnx", "two");
    b.inbox.accepted(&first);
    assert_eq!(fs::read_to_string(b.path("m.onnx")).unwrap(), "two");
    let second = b.candidate();
    assert_eq!(second.blob.digest, digest("two"));
    b.inbox.accepted(&second);
    // One that is being written when it is to be removed stays too.
    b.write("m.onnx", "three");
    let third = b.candidate();
    let writer = File::options().append(true).open(b.path("m.onnx")).unwrap();
    b.inbox.accepted(&third);
    assert!(b.path("m.onnx").exists());
    drop(writer);
}

#[test]
fn of_many_files_at_once_the_newest_is_taken_and_each_has_one_result() {
    let mut b = Bench::new(options());
    for i in 0..200 {
        b.write(&format!("m{i:03}.onnx"), &format!("model {i}"));
    }
    let events = b.events(200);
    assert_eq!(events.len(), 200);
    let mut names = std::collections::BTreeSet::new();
    let mut taken = Vec::new();
    for event in events {
        match event {
            InboxEvent::Candidate(c) => {
                assert!(names.insert(c.name.clone()));
                b.inbox.accepted(&c);
                taken.push(c.name);
            }
            InboxEvent::Refused { name, reason } => {
                assert_eq!(reason.code, "superseded");
                assert!(names.insert(name));
            }
            InboxEvent::Failed { error, .. } => panic!("{error}"),
        }
    }
    assert_eq!(taken.last().map(String::as_str), Some("m199.onnx"));
    assert!(taken.len() < 20, "{} were copied", taken.len());
    assert!(b.quiet());
    assert_eq!(fs::read_dir(b.path("")).unwrap().count(), 1, "only rejected/ is left");
}

#[test]
fn what_is_no_plain_file_is_moved_away_unopened() {
    let mut b = Bench::new(options());
    let secret = b.dir.path().join("secret");
    fs::write(&secret, "secret").unwrap();
    std::os::unix::fs::symlink(&secret, b.path("link.onnx")).unwrap();
    assert_eq!(b.refused(), ("link.onnx".to_owned(), "not_a_file".to_owned()));
    assert!(b.path("rejected/link.onnx").is_symlink());
    std::os::unix::fs::symlink("nowhere", b.path("dangling.onnx")).unwrap();
    assert_eq!(b.refused().1, "not_a_file");
    fs::hard_link(&secret, b.path("hard.onnx")).unwrap();
    assert_eq!(b.refused(), ("hard.onnx".to_owned(), "hard_link".to_owned()));
    nix::unistd::mkfifo(&b.path("fifo.onnx"), nix::sys::stat::Mode::S_IRWXU).unwrap();
    assert_eq!(b.refused(), ("fifo.onnx".to_owned(), "not_a_file".to_owned()));
    fs::create_dir(b.path("dir.onnx")).unwrap();
    assert_eq!(b.refused(), ("dir.onnx".to_owned(), "not_a_file".to_owned()));
    let socket = std::os::unix::net::UnixListener::bind(b.path("socket.onnx")).unwrap();
    assert_eq!(b.refused().1, "not_a_file");
    drop(socket);
    b.write("empty.onnx", "");
    assert_eq!(b.refused(), ("empty.onnx".to_owned(), "empty".to_owned()));
    b.write("large.onnx", &"x".repeat((1 << 20) + 1));
    assert_eq!(b.refused(), ("large.onnx".to_owned(), "too_large".to_owned()));
    assert_eq!(fs::read_to_string(&secret).unwrap(), "secret");
    assert_eq!(b.reason("fifo.onnx")["code"], "not_a_file");
    assert!(b.reason("fifo.onnx")["message"].as_str().unwrap().contains("FIFO"));
    assert_eq!(b.rejected().len(), 16);
    assert!(b.store.list().unwrap().is_empty() && b.quiet());
}

#[test]
fn odd_names_are_refused_under_names_that_anyone_can_read() {
    let mut b = Bench::new(options());
    let long = format!("{}.onnx", "x".repeat(250));
    for (name, kept) in [
        (OsStr::new("new\nline.onnx"), "new_line.onnx"),
        (OsStr::from_bytes(b"bad\xff.onnx"), "bad_.onnx"),
        (OsStr::new("esc\x1b[2J.onnx"), "esc__2J.onnx"),
        (OsStr::new(&long), &"x".repeat(128)),
    ] {
        let path = b.path("").join(name);
        fs::write(&path, "bytes").unwrap();
        assert_eq!(b.refused().1, "odd_name");
        assert_eq!(b.reason(kept)["code"], "odd_name");
        assert!(!path.exists());
    }
    b.write("Halle 3 – größer (2).onnx", "fine");
    assert_eq!(b.candidate().stem(), "Halle 3 – größer (2)");
}

#[test]
fn unfinished_and_hidden_files_are_nobodys_business() {
    let mut b = Bench::new(options());
    for name in [".m.onnx", "m.onnx.part", "m.onnx.tmp", "m.onnx~", ".m.onnx.Xy12"] {
        b.write(name, "bytes");
    }
    assert!(b.quiet());
    fs::rename(b.path("m.onnx.part"), b.path("m.onnx")).unwrap();
    assert_eq!(b.candidate().name, "m.onnx");
}

#[test]
fn a_manifest_beside_a_file_is_taken_with_it() {
    let mut b = Bench::new(options());
    b.write("m.onnx", "one");
    b.write("m.manifest.json", "{}");
    let c = b.candidate();
    assert_eq!(c.manifest.as_deref(), Some(b"{}".as_slice()));
    assert_eq!(c.signature, None);
    b.inbox.accepted(&c);
    assert!(!b.path("m.manifest.json").exists());
    b.write("bare.onnx", "two");
    assert_eq!(b.candidate().manifest, None);
}

#[test]
fn with_keys_a_file_waits_for_manifest_and_signature() {
    let mut b = Bench::new(Options { signed: true, ..options() });
    b.write("m.onnx", "one");
    assert!(b.inbox.poll(&b.store, Duration::from_millis(200)).is_empty());
    b.write("m.manifest.json", "{}");
    assert!(b.inbox.poll(&b.store, Duration::from_millis(200)).is_empty());
    b.write("m.manifest.json.minisig", "signature");
    let c = b.candidate();
    assert_eq!(c.signature.as_deref(), Some("signature"));
    b.inbox.accepted(&c);
    assert_eq!(fs::read_dir(b.path("")).unwrap().count(), 0);
    // And in the end goes without: admission says "unsigned".
    b.write("m.onnx", "two");
    assert_eq!(b.candidate().signature, None);
}

#[test]
fn a_refused_file_takes_its_manifest_along_and_a_gate_gives_the_file_back() {
    let mut b = Bench::new(options());
    b.write("m.manifest.json", "{}");
    fs::create_dir(b.path("m.onnx")).unwrap();
    b.refused();
    assert_eq!(b.rejected().len(), 4, "{:?}", b.rejected());
    let reason = Reason::new("low_recall", "0.2 against 0.9");
    b.inbox.give_back("best.onnx", &mut b"bytes".as_slice(), &reason).unwrap();
    b.inbox.give_back("best.onnx", &mut b"other".as_slice(), &reason).unwrap();
    assert_eq!(fs::read(b.path("rejected/best.onnx")).unwrap(), b"bytes");
    assert_eq!(fs::read(b.path("rejected/best.onnx-1")).unwrap(), b"other");
    assert_eq!(b.reason("best.onnx-1")["name"], "best.onnx");
    assert!(b.quiet());
}

#[test]
fn rejected_files_are_bounded() {
    let b = Bench::new(options());
    let reason = Reason::new("x", "y");
    for i in 0..600 {
        b.inbox.give_back(&format!("m{i}"), &mut b"bytes".as_slice(), &reason).unwrap();
    }
    let names = b.rejected();
    assert!(names.len() <= 512, "{}", names.len());
    assert!(names.contains(&"m599".to_owned()) && !names.contains(&"m0".to_owned()));
}

#[test]
fn a_rejected_directory_that_is_a_link_is_not_followed() {
    let mut b = Bench::new(options());
    let elsewhere = b.dir.path().join("elsewhere");
    fs::create_dir(&elsewhere).unwrap();
    std::os::unix::fs::symlink(&elsewhere, b.path("rejected")).unwrap();
    fs::create_dir(b.path("dir.onnx")).unwrap();
    assert_eq!(b.refused().1, "not_a_file");
    assert!(b.quiet(), "what can't be moved is said once");
    assert_eq!(fs::read_dir(elsewhere).unwrap().count(), 0);
    b.write("good.onnx", "one");
    assert_eq!(b.candidate().blob.digest, digest("one"));
}

#[test]
fn an_inbox_that_is_removed_replaced_or_made_again_is_found() {
    let mut b = Bench::new(options());
    fs::remove_dir(b.path("")).unwrap();
    assert!(b.quiet());
    fs::create_dir(b.path("")).unwrap();
    b.write("again.onnx", "one");
    let c = b.candidate();
    b.inbox.accepted(&c);
    // Replaced by another directory that holds a file already.
    let other = b.dir.path().join("other");
    fs::create_dir(&other).unwrap();
    fs::write(other.join("moved.onnx"), "two").unwrap();
    fs::rename(b.path(""), b.dir.path().join("old")).unwrap();
    fs::rename(&other, b.path("")).unwrap();
    assert_eq!(b.candidate().blob.digest, digest("two"));
    fs::write(b.dir.path().join("old/stray.onnx"), "three").unwrap();
    b.write("here.onnx", "four");
    assert_eq!(b.candidate().blob.digest, digest("four"));
}

#[test]
fn a_queue_that_overflowed_loses_nothing() {
    let mut b = Bench::new(options());
    let max = fs::read_to_string("/proc/sys/fs/inotify/max_queued_events").unwrap();
    let max: usize = max.trim().parse().unwrap();
    // Names by turns, so that no two equal events in a row are merged.
    for i in 0..max + max / 8 {
        let path = b.path(if i % 2 == 0 { ".even" } else { ".odd" });
        drop(File::create(path).unwrap());
    }
    b.write("after.onnx", "one");
    assert_eq!(b.candidate().blob.digest, digest("one"));
    let next = b.candidate_after(|b| b.write("next.onnx", "two"));
    assert_eq!(next.blob.digest, digest("two"), "events come again");
}

impl Bench {
    fn candidate_after(&mut self, act: impl FnOnce(&Self)) -> Candidate {
        act(self);
        self.candidate()
    }
}

#[test]
fn a_full_store_leaves_the_file_where_it_is() {
    let mut b = Bench::new(options());
    b.store = Store::open(b.dir.path(), 1 << 60).unwrap();
    b.write("m.onnx", "one");
    match b.events(1).pop().unwrap() {
        InboxEvent::Failed { name, error } => {
            assert_eq!((name.as_str(), error.code()), ("m.onnx", "no_space"));
        }
        other => panic!("{other:?}"),
    }
    assert!(b.quiet() && b.path("m.onnx").exists());
}

#[test]
fn what_is_taken_is_what_was_hashed_however_the_file_is_replaced() {
    let mut b = Bench::new(Options {
        settle: Duration::from_millis(2),
        settle_short: Duration::from_millis(1),
        ..options()
    });
    let stop = std::sync::atomic::AtomicBool::new(false);
    let path = b.path("m.onnx");
    let outside = b.dir.path().join("outside");
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut i = 0;
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                i += 1;
                let content = format!("{i} ").repeat(20_000);
                if i % 2 == 0 {
                    fs::write(&path, &content).unwrap();
                } else {
                    fs::write(&outside, &content).unwrap();
                    fs::rename(&outside, &path).unwrap();
                }
                std::thread::sleep(Duration::from_millis(4));
            }
        });
        let deadline = Instant::now() + Duration::from_secs(2);
        let mut taken = 0;
        while Instant::now() < deadline {
            for event in b.inbox.poll(&b.store, Duration::from_millis(50)) {
                let InboxEvent::Candidate(c) = event else { panic!("{event:?}") };
                let bytes = b.store.load(&c.blob.digest).unwrap();
                check_whole(&bytes, &c.name);
                b.inbox.accepted(&c);
                taken += 1;
            }
        }
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
        assert!(taken > 0, "nothing was ever quiet");
    });
}

fn check_whole(bytes: &[u8], name: &str) {
    let text = std::str::from_utf8(bytes).unwrap();
    let mut words = text.split_whitespace();
    let first = words.next().unwrap();
    assert!(words.all(|w| w == first), "a mix was taken of {name}");
    assert_eq!(text.split_whitespace().count(), 20_000, "half of {name} was taken");
}

#[test]
fn the_descriptor_says_when_to_look() {
    use nix::poll::{PollFd, PollFlags, poll};
    use std::os::fd::AsFd;
    let b = Bench::new(options());
    assert_eq!(b.inbox.pause(), Duration::from_secs(30), "nothing waits");
    b.write("m.onnx", "one");
    let mut fds = [PollFd::new(b.inbox.as_fd(), PollFlags::POLLIN)];
    assert_eq!(poll(&mut fds, 5000_u16), Ok(1));
    assert!(Path::new(&b.path("m.onnx")).exists());
}
