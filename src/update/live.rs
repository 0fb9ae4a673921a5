//! Live frames for the proving child: dumps in a folder of their own, gone with it.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use tracing::warn;

use super::gates::{FrameDump, LIVE_FRAMES_MAX};
use crate::sampler::Sampler;

/// How long frames are waited for. Two cameras of 10 frames a second fill the 32 in 1.6 s.
const PATIENCE: Duration = Duration::from_secs(2);
/// What the dumps may take on the disk: 32 frames of 1920x1080 are 100 MB.
const BYTES_MAX: u64 = 128 << 20;

/// Where live frames come from while a child waits for them: [`LiveFrames::collect`] of a place.
pub type LiveSource<'a> =
    dyn Fn(&AtomicBool, &mut dyn FnMut(&Path) -> bool) -> LiveFrames + Sync + 'a;

/// The dumps. Dropping it removes them.
#[derive(Debug, Default)]
pub struct LiveFrames {
    dir: Option<PathBuf>,
    files: Vec<PathBuf>,
}

impl LiveFrames {
    /// Removes what a life that was cut short has left behind.
    pub fn clear(dir: &Path) {
        match fs::remove_dir_all(dir) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => {
                warn!("{}: old frames stay: {e}", dir.display());
            }
            _ => {}
        }
    }

    /// Writes the next frames that the worker infers into `dir`, and tells of each, until it hears
    /// false. Those that can't be written are missing: the gate says how many it had.
    pub fn collect(
        dir: &Path,
        sampler: &Sampler,
        cancel: &AtomicBool,
        tell: &mut dyn FnMut(&Path) -> bool,
    ) -> Self {
        Self::clear(dir);
        if let Err(e) = fs::create_dir_all(dir) {
            warn!("{}: no live frames for the gates: {e}", dir.display());
            return Self::default();
        }
        let mut frames = Self { dir: Some(dir.to_owned()), files: Vec::new() };
        let mut bytes = 0;
        sampler.take(PATIENCE, cancel, |sample| {
            let file = dir.join(format!("{:02}.frame", frames.files.len()));
            let name = format!("frame {} of {}", sample.frame.id, sample.camera);
            let dump = sample.frame.with_picture(|picture| FrameDump::of(picture, name));
            drop(sample);
            let written = dump.map_err(io::Error::other).and_then(|dump| dump.write(&file));
            if let Err(e) = written {
                warn!("{}: a live frame is left out: {e}", file.display());
                return false;
            }
            bytes += fs::metadata(&file).map_or(0, |m| m.len());
            let wanted = tell(&file);
            frames.files.push(file);
            wanted && frames.files.len() < LIVE_FRAMES_MAX && bytes < BYTES_MAX
        });
        frames
    }

    /// The files.
    pub fn files(&self) -> &[PathBuf] {
        &self.files
    }
}

impl Drop for LiveFrames {
    fn drop(&mut self) {
        if let Some(dir) = &self.dir {
            Self::clear(dir);
        }
    }
}
