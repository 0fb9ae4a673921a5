//! The inbox: a directory; what is put into it becomes an update.
//!
//! inotify only says *when* to look (a file closed after writing, moved in, made; the directory
//! itself moved or removed). What there is to do is read from the directory each time, so that an
//! event that was lost (queue overflow, NFS, a directory made anew) costs at most the 30 s to the
//! next look.
//!
//! A file is picked up when nothing about it (inode, size, mtime, ctime) has changed for
//! `settle` and no process has it open for writing (a lease says so; where leases don't work the
//! wait is `settle_blind`). For that long a manifest may still arrive beside it; once it and, if
//! keys are configured, its signature are there, `settle_short` is enough. With keys configured a
//! file waits `sidecars` for both. Of several files that are ready the newest is taken and the
//! others are refused as superseded.
//!
//! Files are opened once, without following links and without waiting for a FIFO's writer, and
//! copied from that descriptor while they are hashed. Nothing is ever loaded from here.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use inotify::{Inotify, WatchDescriptor, WatchMask};
use nix::dir::Dir;
use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::stat::{FileStat, Mode, fstat, fstatat};
use nix::unistd::{UnlinkatFlags, unlinkat};

use super::digest::Digest;
use super::entry::{
    Stamp, Writers, form, is_ignored, is_sidecar, open_in, read_small, sidecars, stem, writers,
};
use super::failpoint;
use super::job::Reason;
use super::manifest;
use super::rejected::Rejected;
use super::signature;
use super::store::{Blob, Store, StoreError};

/// Entries that one look considers.
const ENTRIES_MAX: usize = 10_000;

/// A manifest whose model did not come.
const ORPHAN: Duration = Duration::from_secs(600);

/// Until a file is looked at again for which the store had no room.
const RETRY: Duration = Duration::from_secs(30);

/// How long is waited for what.
#[derive(Debug, Clone)]
pub struct Options {
    /// The largest model that is taken, in bytes.
    pub size_max: u64,
    /// Keys are configured: every model needs a manifest and its signature.
    pub signed: bool,
    /// Unchanged for this long, without writers.
    pub settle: Duration,
    /// The same when nothing more is expected beside it.
    pub settle_short: Duration,
    /// Unchanged for this long where writers can't be seen.
    pub settle_blind: Duration,
    /// With keys: the wait for manifest and signature.
    pub sidecars: Duration,
    /// A look without any event.
    pub rescan: Duration,
}

impl Options {
    /// 1 s, 0.25 s and 3 s; 10 s for what must come beside a file; a look every 30 s.
    pub fn new(size_max: u64, signed: bool) -> Self {
        Self {
            size_max,
            signed,
            settle: Duration::from_secs(1),
            settle_short: Duration::from_millis(250),
            settle_blind: Duration::from_secs(3),
            sidecars: Duration::from_secs(10),
            rescan: Duration::from_secs(30),
        }
    }
}

/// What a look found.
#[derive(Debug)]
pub enum InboxEvent {
    /// A model, in the store. Call [`Inbox::accepted`] once its job is written down.
    Candidate(Box<Candidate>),
    /// A file was moved to `rejected/`, or could not be moved and is left alone.
    Refused {
        /// Its name; what is not Unicode in it replaced.
        name: String,
        /// Why.
        reason: Reason,
    },
    /// A file could not be taken into the store; it is tried again after 30 s.
    Failed {
        /// Its name.
        name: String,
        /// Why.
        error: StoreError,
    },
}

/// A model from the inbox.
#[derive(Debug, Clone)]
pub struct Candidate {
    /// The file's name.
    pub name: String,
    /// Its bytes, in the store.
    pub blob: Blob,
    /// The exact bytes of the manifest beside it.
    pub manifest: Option<Vec<u8>>,
    /// The minisign text beside that.
    pub signature: Option<String>,
    stamp: Stamp,
}

impl Candidate {
    /// The name without its last extension: where the model's id may come from.
    pub fn stem(&self) -> &str {
        stem(&self.name)
    }

    /// The id of its job: the same for the same file, also after a restart between the store and
    /// the removal; another one when a file is put in again.
    pub fn job_id(&self) -> String {
        let Stamp { inode, mtime, ctime, .. } = self.stamp;
        let text = format!("{} {} {inode:?} {mtime:?} {ctime:?}", self.name, self.blob.digest);
        format!("inbox-{}", &Digest::of(text.as_bytes()).to_string()[..16])
    }
}

/// An entry that waits.
#[derive(Debug, Clone, Copy)]
struct Seen {
    stamp: Stamp,
    /// Unchanged since.
    since: Instant,
    /// Not looked at before: the store had no room, or it waits for what it belongs to.
    not_before: Option<Instant>,
    /// A candidate or left alone: nothing to do until it changes.
    settled: bool,
}

/// The directory that is watched.
#[derive(Debug)]
struct Watched {
    dir: OwnedFd,
    inode: (u64, u64),
    watch: WatchDescriptor,
}

/// See the module. Owned by one thread; nothing runs between calls.
#[derive(Debug)]
pub struct Inbox {
    path: PathBuf,
    options: Options,
    inotify: Inotify,
    watched: Option<Watched>,
    seen: BTreeMap<OsString, Seen>,
}

impl Inbox {
    /// Watches a directory, which is made if it isn't there. Later it is never made again: an
    /// inbox that vanished may be a disk that is not mounted.
    pub fn open(path: &Path, options: Options) -> Result<Self, StoreError> {
        std::fs::create_dir_all(path).map_err(StoreError::io(path))?;
        let inotify = Inotify::init().map_err(StoreError::io(path))?;
        let seen = BTreeMap::new();
        Ok(Self { path: path.to_owned(), options, inotify, watched: None, seen })
    }

    /// Waits at most `timeout` for something to say. Returns at once after the first look that
    /// found anything.
    pub fn poll(&mut self, store: &Store, timeout: Duration) -> Vec<InboxEvent> {
        let deadline = Instant::now() + timeout;
        loop {
            let events = self.look(store);
            let now = Instant::now();
            if !events.is_empty() || now >= deadline {
                return events;
            }
            let wait = self.pause().min(deadline - now);
            let mut fds = [PollFd::new(self.inotify.as_fd(), PollFlags::POLLIN)];
            let wait = PollTimeout::try_from(wait.as_millis().max(1)).unwrap_or(PollTimeout::MAX);
            // Interrupted or not: what there is to do is read from the directory.
            let _ = poll(&mut fds, wait);
        }
    }

    /// How long the next look may wait when no event comes.
    pub fn pause(&self) -> Duration {
        let now = Instant::now();
        let due = |s: &Seen| !s.settled && s.not_before.is_none_or(|t| t <= now);
        let waiting = self.seen.values().any(due);
        if waiting {
            (self.options.settle_short / 2).max(Duration::from_millis(10))
        } else if self.watched.is_none() {
            Duration::from_secs(1).min(self.options.rescan)
        } else {
            self.options.rescan
        }
    }

    /// Removes a candidate's files, after its job was written down. A file that was replaced or
    /// is being written again stays: it is another candidate.
    pub fn accepted(&mut self, candidate: &Candidate) {
        failpoint::hit("inbox.before_remove");
        if let Some(Watched { dir, .. }) = &self.watched {
            let unchanged = open_in(dir.as_fd(), OsStr::new(&candidate.name)).is_ok_and(|f| {
                let stamp = fstat(&f).map(|s| Stamp::of(&s));
                stamp == Ok(candidate.stamp) && !matches!(writers(&f), Writers::Yes)
            });
            if unchanged {
                // The sidecars last: without its model a manifest is refused after 10 minutes.
                let [manifest, signature] = sidecars(&candidate.name);
                for name in [candidate.name.as_str(), &manifest, &signature] {
                    let _ = unlinkat(dir, name, UnlinkatFlags::NoRemoveDir);
                }
                self.seen.remove(OsStr::new(&candidate.name));
            } else if let Some(seen) = self.seen.get_mut(OsStr::new(&candidate.name)) {
                seen.settled = false;
            }
        }
        failpoint::hit("inbox.removed");
    }

    /// Looks at a candidate again in 30 s: its job could not be written down.
    pub fn later(&mut self, candidate: &Candidate) {
        self.put_off(OsStr::new(&candidate.name), RETRY);
    }

    /// Puts a model that a gate refused into `rejected/`, with the reason beside it.
    pub fn give_back(
        &self,
        name: &str,
        bytes: &mut impl Read,
        reason: &Reason,
    ) -> Result<(), StoreError> {
        let Some(watched) = &self.watched else { return Ok(()) };
        Rejected::open(watched.dir.as_fd(), &self.path)?.put(name, bytes, reason)
    }

    fn look(&mut self, store: &Store) -> Vec<InboxEvent> {
        let mut buffer = [0; 16 * 1024];
        while self.inotify.read_events(&mut buffer).is_ok_and(|mut e| e.next().is_some()) {}
        if !self.watch() {
            self.seen.clear();
            return Vec::new();
        }
        let Some(entries) = self.entries() else { return Vec::new() };
        let now = Instant::now();
        self.seen.retain(|name, _| entries.contains_key(name));
        let mut events = Vec::new();
        let mut ready = Vec::new();
        for (name, stat) in &entries {
            let stamp = Stamp::of(stat);
            let fresh = Seen { stamp, since: now, not_before: None, settled: false };
            let seen = self.seen.entry(name.clone()).or_insert(fresh);
            if seen.stamp != stamp {
                *seen = fresh;
            }
            let seen = *seen;
            if seen.settled || seen.not_before.is_some_and(|t| now < t) {
                continue;
            }
            match self.judge(name, stat, seen.since.elapsed(), &entries) {
                Judged::Wait => {}
                Judged::Later(wait) => self.put_off(name, wait),
                Judged::Refuse(reason) => events.push(self.refuse(name, reason)),
                Judged::Ready(file) => ready.push((stamp.ctime, name.clone(), file, stamp)),
            }
        }
        ready.sort_by(|a, b| (a.0, &a.1).cmp(&(b.0, &b.1)));
        if let Some((_, name, file, stamp)) = ready.pop() {
            let newest = name.to_string_lossy().into_owned();
            events.extend(self.take(store, &newest, file, stamp));
            for (_, name, ..) in ready {
                let text = format!("{newest} came in later");
                events.push(self.refuse(&name, Reason::new("superseded", text)));
            }
        }
        events
    }

    fn put_off(&mut self, name: &OsStr, wait: Duration) {
        if let Some(seen) = self.seen.get_mut(name) {
            seen.not_before = Some(Instant::now() + wait);
            seen.settled = false;
        }
    }

    fn settle(&mut self, name: &OsStr) {
        if let Some(seen) = self.seen.get_mut(name) {
            seen.settled = true;
        }
    }

    /// Sees to it that the directory of this name is watched, whichever it is by now.
    fn watch(&mut self) -> bool {
        let flags = OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let opened = nix::fcntl::open(&self.path, flags, Mode::empty());
        let found = opened.and_then(|dir| Ok((fstat(&dir)?, dir)));
        let inode = found.as_ref().ok().map(|(s, _)| (s.st_dev, s.st_ino));
        if inode.is_some() && self.watched.as_ref().map(|w| w.inode) == inode {
            return true;
        }
        if let Some(old) = self.watched.take() {
            // Gone with the directory already, or it would report a place that is no longer ours.
            let _ = self.inotify.watches().remove(old.watch);
            self.seen.clear();
        }
        let Ok((stat, dir)) = found else { return false };
        let mask = WatchMask::CLOSE_WRITE
            | WatchMask::MOVED_TO
            | WatchMask::CREATE
            | WatchMask::DELETE_SELF
            | WatchMask::MOVE_SELF
            | WatchMask::ONLYDIR;
        // By descriptor, so that it is this directory. Without a watch (their number is limited)
        // the look every 30 s is what is left.
        let place = format!("/proc/self/fd/{}", dir.as_raw_fd());
        let Ok(watch) = self.inotify.watches().add(place, mask) else { return false };
        self.watched = Some(Watched { dir, inode: (stat.st_dev, stat.st_ino), watch });
        true
    }

    fn entries(&self) -> Option<BTreeMap<OsString, FileStat>> {
        let dir = &self.watched.as_ref()?.dir;
        let flags = OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let mut listing = Dir::openat(dir, ".", flags, Mode::empty()).ok()?;
        let names = listing.iter().flatten().map(|e| e.file_name().to_bytes().to_vec());
        let names = names.filter(|name| !is_ignored(name)).take(ENTRIES_MAX);
        let stat = |name: Vec<u8>| {
            let stat = fstatat(dir, name.as_slice(), AtFlags::AT_SYMLINK_NOFOLLOW).ok()?;
            Some((OsString::from_vec(name), stat))
        };
        Some(names.filter_map(stat).collect())
    }

    fn judge(
        &self,
        name: &OsStr,
        stat: &FileStat,
        quiet: Duration,
        entries: &BTreeMap<OsString, FileStat>,
    ) -> Judged {
        let o = &self.options;
        if quiet < o.settle_short {
            return Judged::Wait;
        }
        let refused = form(name, stat, o.size_max);
        let Some(text) = name.to_str().filter(|_| refused.is_none()) else {
            let reason = refused.unwrap_or_else(|| Reason::new("odd_name", "is no Unicode"));
            // A hard link may be half of a move, an empty file the beginning of a copy.
            let patient = matches!(&*reason.code, "hard_link" | "empty" | "too_large");
            let wait = if patient { o.settle_blind } else { o.settle };
            return if quiet < wait { Judged::Wait } else { Judged::Refuse(reason) };
        };
        if is_sidecar(text) {
            let text = "a manifest without its model: put the .onnx file of the same name here too";
            return match ORPHAN.checked_sub(quiet) {
                Some(wait) => Judged::Later(wait),
                None => Judged::Refuse(Reason::new("no_model", text)),
            };
        }
        let [manifest, signature] = sidecars(text).map(|s| self.sidecar(&s, entries));
        let complete = manifest.is_ready() && (!o.signed || signature.is_ready());
        let growing = manifest.is_growing() || signature.is_growing();
        let wait = match (complete, o.signed) {
            (true, _) => o.settle_short,
            (false, false) => o.settle,
            (false, true) => o.sidecars,
        };
        if growing || quiet < wait {
            return Judged::Wait;
        }
        let dir = &self.watched.as_ref().expect("entries come from it").dir;
        let file = match open_in(dir.as_fd(), name) {
            Ok(file) => file,
            Err(Errno::EACCES | Errno::EPERM) => {
                let text = "can't be read: give the service's user the right to";
                return Judged::Refuse(Reason::new("unreadable", text));
            }
            // Replaced or removed since it was listed.
            Err(_) => return Judged::Wait,
        };
        match writers(&file) {
            Writers::No => Judged::Ready(file),
            Writers::Unknown if quiet >= o.settle_blind => Judged::Ready(file),
            Writers::Yes | Writers::Unknown => Judged::Wait,
        }
    }

    fn sidecar(&self, name: &str, entries: &BTreeMap<OsString, FileStat>) -> Sidecar {
        let name = OsStr::new(name);
        let Some(stat) = entries.get(name) else { return Sidecar::Missing };
        // What can't be a manifest is refused in its own turn; until then nothing is taken. One
        // that is too long is for the manifest's reader to refuse.
        let quiet = self.seen.get(name).map_or(Duration::ZERO, |s| s.since.elapsed());
        if form(name, stat, u64::MAX).is_some() || quiet < self.options.settle_short {
            Sidecar::Growing
        } else {
            Sidecar::Ready
        }
    }

    /// Copies a file into the store while it is hashed.
    fn take(
        &mut self,
        store: &Store,
        name: &str,
        mut file: File,
        stamp: Stamp,
    ) -> Option<InboxEvent> {
        failpoint::hit("inbox.opened");
        let dir = self.watched.as_ref()?.dir.try_clone().ok()?;
        let copy = |file: &mut File| {
            let mut part = store.stage(stamp.size as u64, self.options.size_max)?;
            part.copy(file)?;
            let same = fstat(&*file).is_ok_and(|s| Stamp::of(&s) == stamp);
            if !same || matches!(writers(file), Writers::Yes) {
                part.discard();
                return Ok(None);
            }
            part.finish(None).map(Some)
        };
        let blob = match copy(&mut file) {
            Ok(Some(blob)) => blob,
            // Written to while it was read: it is waited for again.
            Ok(None) => {
                self.seen.remove(OsStr::new(name));
                return None;
            }
            Err(error) => {
                self.put_off(OsStr::new(name), RETRY);
                return Some(InboxEvent::Failed { name: name.to_owned(), error });
            }
        };
        let [manifest, signature] = sidecars(name);
        let manifest = read_small(dir.as_fd(), &manifest, manifest::BYTES_MAX);
        let signature = read_small(dir.as_fd(), &signature, signature::TEXT_MAX);
        let signature = signature.map(|b| String::from_utf8_lossy(&b).into_owned());
        self.settle(OsStr::new(name));
        failpoint::hit("inbox.staged");
        let name = name.to_owned();
        let candidate = Candidate { name, blob, manifest, signature, stamp };
        Some(InboxEvent::Candidate(Box::new(candidate)))
    }

    /// Moves an entry, and what lies beside it, to `rejected/`.
    fn refuse(&mut self, name: &OsStr, reason: Reason) -> InboxEvent {
        let shown = name.to_string_lossy().into_owned();
        let moved = self.watched.as_ref().ok_or(()).and_then(|w| {
            let rejected = Rejected::open(w.dir.as_fd(), &self.path).map_err(|_| ())?;
            rejected.take(w.dir.as_fd(), name, &reason).map_err(|_| ())?;
            for beside in name.to_str().map(sidecars).into_iter().flatten() {
                // Most have nothing beside them.
                let _ = rejected.take(w.dir.as_fd(), OsStr::new(&beside), &reason);
            }
            Ok(())
        });
        match moved {
            Ok(()) => drop(self.seen.remove(name)),
            // A mount point, a directory that isn't ours: left alone, and said once.
            Err(()) => self.settle(name),
        }
        InboxEvent::Refused { name: shown, reason }
    }
}

impl AsFd for Inbox {
    /// Readable when a look is worth while; [`Inbox::pause`] says when one is due anyway.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.inotify.as_fd()
    }
}

enum Judged {
    Wait,
    Later(Duration),
    Refuse(Reason),
    Ready(File),
}

#[derive(Clone, Copy, PartialEq)]
enum Sidecar {
    Missing,
    Growing,
    Ready,
}

impl Sidecar {
    fn is_ready(self) -> bool {
        self == Self::Ready
    }

    fn is_growing(self) -> bool {
        self == Self::Growing
    }
}
