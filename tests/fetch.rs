//! Models from elsewhere: over HTTP with every fault a server may have, over MQTT in chunks.

mod chunks;
mod http;
mod mqtt;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use noblink::update::digest::Digest;
use noblink::update::fetch::{Limits, Progress, Transfer, Wanted};

/// Bytes that compress badly and differ from chunk to chunk, the same ones for a seed.
pub(crate) fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(2).wrapping_add(1);
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 32) as u8
    };
    (0..length).map(|_| next()).collect()
}

/// What is wanted of a file that is known.
pub(crate) fn wanted(file: &[u8]) -> Wanted {
    let size = file.len() as u64;
    Wanted { digest: Some(Digest::of(file)), size: Some(size), size_max: 1 << 30 }
}

/// Impatient enough for a test.
pub(crate) fn limits() -> Limits {
    Limits {
        pause: Duration::from_millis(20),
        pause_max: Duration::from_millis(200),
        silence: Duration::from_millis(400),
        failures_max: 3,
        ..Limits::default()
    }
}

/// A folder with a `.part` file to be, and what a transfer needs beside it.
pub(crate) struct Desk {
    dir: tempfile::TempDir,
    pub(crate) limits: Limits,
    pub(crate) cancel: Arc<AtomicBool>,
    pub(crate) progress: Vec<Progress>,
}

impl Desk {
    pub(crate) fn new() -> Self {
        let dir = tempfile::tempdir().expect("a folder");
        Self { dir, limits: limits(), cancel: Arc::default(), progress: Vec::new() }
    }

    pub(crate) fn part(&self) -> PathBuf {
        self.dir.path().join("x.part")
    }

    pub(crate) fn bytes(&self) -> Vec<u8> {
        std::fs::read(self.part()).unwrap_or_default()
    }

    /// The files that are there.
    pub(crate) fn files(&self) -> Vec<String> {
        let entries = std::fs::read_dir(self.dir.path()).expect("our folder");
        let mut names: Vec<_> =
            entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    /// Runs a transfer with what lies on this desk.
    pub(crate) fn transfer<T>(&mut self, wanted: Wanted, run: impl FnOnce(Transfer<'_>) -> T) -> T {
        let part = self.part();
        let (limits, cancel) = (self.limits.clone(), Arc::clone(&self.cancel));
        let seen = &mut self.progress;
        let mut progress = |p| seen.push(p);
        run(Transfer {
            wanted,
            part: Path::new(&part),
            limits: &limits,
            cancel: &cancel,
            progress: &mut progress,
        })
    }
}
