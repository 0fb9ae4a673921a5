//! A model's bytes from elsewhere into a `.part` file: over HTTP, or in chunks over MQTT.
//!
//! Both ways keep to one [`Transfer`]: a bound that is enforced before a byte is written beyond it,
//! a least rate, a deadline, a flag that ends it, and resumption from what is there, also after the
//! process died. Nothing on the way is trusted: at the end the whole file is read again and its
//! digest compared. Beside `x.part` stands `x.part.http` or `x.part.map` while it is not whole.
//!
//! Runs on the thread that calls it, for as long as it takes; never on the worker or the network's.

mod allow;
mod chunks;
mod http;
mod part;
mod pull;

use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use nix::fcntl::{FallocateFlags, fallocate};
use sha2::{Digest as _, Sha256};

pub(crate) use allow::ALLOWED as ALLOWED_HOSTS;
pub use allow::{AllowedHost, admit};
pub use chunks::{
    Accepted, CHUNK_SIZE, ChunkTransfer, Dropped, Tally, WANT_COUNT_MAX, Want, chunk_payload,
};
pub use http::{Rules, content_range, http, percent_decoded};
pub use pull::mqtt;

use super::digest::Digest;
use super::job::Reason;
use crate::mqtt::backoff::chance;

/// What ended a fetch. The names stand in job results: they stay.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Code {
    /// No `http://` or `https://` URL.
    BadUrl,
    /// Not in `models.allowed_hosts`.
    HostNotAllowed,
    /// 404 or 410.
    NotFound,
    /// Another answer that asking again does not change: 401, 403, …
    ServerRefuses,
    /// More bytes than announced or allowed.
    TooLarge,
    /// Fewer bytes than announced.
    SizeMismatch,
    /// Other bytes than announced.
    DigestMismatch,
    /// The certificate, or TLS itself.
    Tls,
    /// The server, the broker or the sender can't be reached, or does not answer.
    Unreachable,
    /// Below the least rate, or past the deadline.
    SlowRetrieval,
    /// The flag was set.
    Canceled,
    /// The disk is full.
    NoSpace,
    /// The disk fails in another way.
    StorageFailed,
}

impl Code {
    /// The word on the wire.
    pub fn name(self) -> &'static str {
        match self {
            Self::BadUrl => "bad_url",
            Self::HostNotAllowed => "host_not_allowed",
            Self::NotFound => "not_found",
            Self::ServerRefuses => "server_refuses",
            Self::TooLarge => "too_large",
            Self::SizeMismatch => "size_mismatch",
            Self::DigestMismatch => "digest_mismatch",
            Self::Tls => "tls",
            Self::Unreachable => "unreachable",
            Self::SlowRetrieval => "slow_retrieval",
            Self::Canceled => "canceled",
            Self::NoSpace => "no_space",
            Self::StorageFailed => "storage_failed",
        }
    }
}

/// Why there are no bytes.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct FetchError {
    /// For machines.
    pub code: Code,
    /// For people; holds no credentials.
    pub message: String,
}

impl FetchError {
    fn new(code: Code, message: impl Into<String>) -> Self {
        Self { code, message: message.into() }
    }

    /// The operating system's word on a file.
    fn storage(path: &Path, error: &io::Error) -> Self {
        let code = match error.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Code::NoSpace,
            _ => Code::StorageFailed,
        };
        let remedy = if code == Code::NoSpace { ": make room under device.state_dir" } else { "" };
        Self::new(code, format!("{}: {error}{remedy}", path.display()))
    }
}

impl From<FetchError> for Reason {
    fn from(error: FetchError) -> Self {
        Self::new(error.code.name(), error.message)
    }
}

/// What is to be fetched.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Wanted {
    /// Its digest, where it is announced.
    pub digest: Option<Digest>,
    /// Its size in bytes, where it is announced.
    pub size: Option<u64>,
    /// The most bytes that are taken, whoever announces what: `models.max_size_mb`.
    pub size_max: u64,
}

impl Wanted {
    /// Bytes beyond which nothing is written.
    fn bound(&self) -> u64 {
        self.size.unwrap_or(self.size_max)
    }

    /// Whether the announced size is allowed at all.
    fn admit(&self) -> Result<(), FetchError> {
        match self.size {
            Some(size) if size > self.size_max => Err(FetchError::new(
                Code::TooLarge,
                format!(
                    "the model has {size} bytes, {} are allowed: raise models.max_size_mb if it \
                     is meant",
                    self.size_max
                ),
            )),
            _ => Ok(()),
        }
    }
}

/// The patience of a transfer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limits {
    /// All of it together.
    pub deadline: Duration,
    /// Bytes a second that each `window` must bring.
    pub rate_min: u64,
    /// See `rate_min`.
    pub window: Duration,
    /// To connect; DNS has the same again.
    pub connect: Duration,
    /// A connection that brings nothing for so long is given up, and the transfer resumed.
    pub silence: Duration,
    /// Failures in a row, with not one new byte between, that end it.
    pub failures_max: u32,
    /// First pause after a failure, and first wait for a chunk; doubled each time.
    pub pause: Duration,
    /// Longest pause, and longest wait for a chunk.
    pub pause_max: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            deadline: Duration::from_secs(2 * 3600),
            rate_min: 1024,
            window: Duration::from_secs(300),
            connect: Duration::from_secs(10),
            silence: Duration::from_secs(30),
            failures_max: 8,
            pause: Duration::from_secs(3),
            pause_max: Duration::from_secs(60),
        }
    }
}

impl Limits {
    /// The pause after so many failures in a row: doubled each time, and between half and all of
    /// that, so that a site full of devices does not come back in step.
    fn pause_after(&self, failures: u32) -> Duration {
        let doubled = self.pause * 2_u32.saturating_pow(failures.saturating_sub(1).min(16));
        doubled.min(self.pause_max).mul_f64(0.5 + chance() / 2.0)
    }
}

/// How far a transfer is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    /// Bytes that are there, of an earlier life too.
    pub received: u64,
    /// Bytes in all, when known.
    pub size: Option<u64>,
}

/// One transfer: what, whereto, and on which terms.
pub struct Transfer<'a> {
    /// What is to be fetched.
    pub wanted: Wanted,
    /// Filled, and gone on with when it is there. Named by the caller, never by the wire.
    pub part: &'a Path,
    /// Patience.
    pub limits: &'a Limits,
    /// Set by anyone; looked at every 100 ms and between any two reads. Only the look-up of a name
    /// and a connect are not interrupted: they have [`Limits::connect`] each.
    pub cancel: &'a AtomicBool,
    /// Told after each write, some 64 KiB apart.
    pub progress: &'a mut dyn FnMut(Progress),
}

/// The `.part` file is whole and holds this. Synced; its name is the caller's to sync.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fetched {
    /// Of the whole file, as it was read back.
    pub digest: Digest,
    /// In bytes.
    pub size: u64,
}

/// SHA-256 and size of a file, read in pieces.
///
/// # Errors
/// It can't be read.
pub fn digest_file(path: &Path) -> io::Result<Fetched> {
    let mut file = File::open(path)?;
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 1 << 18];
    let mut size = 0;
    loop {
        match file.read(&mut buffer) {
            Ok(0) => break,
            Ok(n) => {
                hash.update(&buffer[..n]);
                size += n as u64;
            }
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(Fetched { digest: Digest(hash.finalize().into()), size })
}

/// The time and the rate of one transfer.
struct Pace {
    began: Instant,
    window_began: Instant,
    in_window: u64,
    heard: bool,
}

impl Pace {
    fn new(now: Instant) -> Self {
        Self { began: now, window_began: now, in_window: 0, heard: false }
    }

    fn gained(&mut self, bytes: usize) {
        self.in_window += bytes as u64;
        self.heard = true;
    }

    /// Canceled, too slow or too late? `silent` says what to do when not a byte ever came.
    fn check(
        &mut self,
        now: Instant,
        transfer: &Transfer<'_>,
        silent: impl FnOnce() -> String,
    ) -> Result<(), FetchError> {
        let limits = transfer.limits;
        if transfer.cancel.load(Ordering::Relaxed) {
            return Err(FetchError::new(Code::Canceled, "the transfer was canceled"));
        }
        if now.duration_since(self.began) >= limits.deadline {
            let text = format!("not whole within {} s", limits.deadline.as_secs());
            return Err(FetchError::new(Code::SlowRetrieval, text));
        }
        let window = now.duration_since(self.window_began);
        if window < limits.window {
            return Ok(());
        }
        let least = (limits.rate_min as f64 * window.as_secs_f64()) as u64;
        if self.in_window < least {
            if !self.heard {
                return Err(FetchError::new(Code::Unreachable, silent()));
            }
            let text = format!(
                "{} bytes came in {} s, {least} are the least: check the network, then send it \
                 again; what is there is kept",
                self.in_window,
                window.as_secs()
            );
            return Err(FetchError::new(Code::SlowRetrieval, text));
        }
        (self.window_began, self.in_window) = (now, 0);
        Ok(())
    }
}

/// Waits, but not longer than until the flag is set.
fn rest(pause: Duration, cancel: &AtomicBool) {
    let until = Instant::now() + pause;
    while !cancel.load(Ordering::Relaxed) {
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            break;
        }
        std::thread::sleep(left.min(Duration::from_millis(100)));
    }
}

/// `x.part` → `x.part.<extension>`.
fn beside(part: &Path, extension: &str) -> PathBuf {
    let mut name = part.as_os_str().to_owned();
    name.push(".");
    name.push(extension);
    name.into()
}

/// Opens a file of ours to read and write, made when it is missing; never through a link.
fn open_own(path: &Path) -> Result<File, FetchError> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .custom_flags(nix::libc::O_NOFOLLOW)
        .open(path)
        .map_err(|e| FetchError::storage(path, &e))
}

/// Has the file system set `size` bytes aside, so that a full disk is known before the first of
/// them is fetched. The length stays: it says how much is there.
fn reserve(file: &File, path: &Path, size: u64) -> Result<(), FetchError> {
    let length = i64::try_from(size).unwrap_or(i64::MAX);
    if length == 0 {
        return Ok(());
    }
    match fallocate(file, FallocateFlags::FALLOC_FL_KEEP_SIZE, 0, length) {
        Err(nix::Error::ENOSPC | nix::Error::EDQUOT | nix::Error::EFBIG) => {
            let text = format!(
                "{}: the disk has no room for {size} bytes: make room under device.state_dir",
                path.display()
            );
            Err(FetchError::new(Code::NoSpace, text))
        }
        // A file system that can't do it says so by itself when it is full.
        _ => Ok(()),
    }
}

/// Removes a file that may not be there.
fn remove(path: &Path) {
    // What is left behind is removed by the store's collection.
    let _ = std::fs::remove_file(path);
}
