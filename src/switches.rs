//! Switching cameras off and on: what an order says, and what is remembered of it.
//!
//! The memory is `cameras.json` in the state directory, so that it outlives a restart. It names every
//! camera that this box has told of, so that the retained status of one that is gone can be cleared.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use tracing::warn;

use crate::mqtt::link::Inbound;
use crate::mqtt::topics::Topics;
use crate::update::job::Reason;

/// Reads a message on `cmd/cameras/…`: which camera, and whether to switch it on.
pub fn order(topics: &Topics, message: &Inbound) -> Result<(String, bool), Reason> {
    let bad = |text: &str| Err(Reason::new("bad_command", text.to_owned()));
    match topics.parse_camera_command(&message.topic) {
        Some((_, "enabled")) if message.retained => Err(Reason::new(
            "retained",
            "a retained command is ignored: it would come again with every connection; publish it \
             without retain",
        )),
        Some((id, "enabled")) => match &message.payload[..] {
            b"ON" => Ok((id.to_owned(), true)),
            b"OFF" => Ok((id.to_owned(), false)),
            other => {
                let shown: String = String::from_utf8_lossy(other).chars().take(32).collect();
                bad(&format!("payload {shown:?}: must be ON or OFF"))
            }
        },
        _ => bad("is no command: write cmd/cameras/<id>/enabled"),
    }
}

/// The file, as it is read and written.
#[derive(Debug, Default, PartialEq, Serialize, Deserialize)]
struct Known {
    /// Camera id → whether it is on.
    cameras: BTreeMap<String, bool>,
}

/// The switches of all cameras.
#[derive(Debug)]
pub struct Switches {
    file: PathBuf,
    known: Known,
}

impl Switches {
    /// Reads the file. Without one, and with one that can't be read, every camera is on.
    pub fn open(state_dir: &Path) -> Self {
        let file = state_dir.join("cameras.json");
        let read = || match fs::read(&file) {
            Ok(bytes) => serde_json::from_slice(&bytes).map_err(io::Error::from),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(Known::default()),
            Err(e) => Err(e),
        };
        let known = read().unwrap_or_else(|e| {
            warn!("{} can't be read: {e}; every camera is on", file.display());
            Known::default()
        });
        Self { file, known }
    }

    /// Whether a camera is on.
    pub fn is_on(&self, camera: &str) -> bool {
        self.known.cameras.get(camera).copied().unwrap_or(true)
    }

    /// Switches a camera. What can't be written holds until the end of the process.
    pub fn set(&mut self, camera: &str, on: bool) -> io::Result<()> {
        self.known.cameras.insert(camera.to_owned(), on);
        self.write()
    }

    /// These are all the cameras that there are; returns those that there were beside them.
    pub fn keep(&mut self, cameras: &[&str]) -> Vec<String> {
        let known = cameras.iter().map(|c| ((*c).to_owned(), self.is_on(c))).collect();
        let before = std::mem::replace(&mut self.known, Known { cameras: known });
        if before != self.known
            && let Err(e) = self.write()
        {
            warn!("{e}");
        }
        let gone = before.cameras.into_keys().filter(|c| !cameras.contains(&c.as_str()));
        gone.collect()
    }

    /// A reader finds the old file or the new one, whenever the power goes.
    fn write(&self) -> io::Result<()> {
        let write = || {
            let dir = self.file.parent().unwrap_or(Path::new("."));
            fs::create_dir_all(dir)?;
            let part = self.file.with_extension("json.part");
            let mut file = File::create(&part)?;
            file.write_all(&serde_json::to_vec(&self.known)?)?;
            file.sync_all()?;
            fs::rename(&part, &self.file)?;
            File::open(dir)?.sync_all()
        };
        write().map_err(|e| {
            io::Error::new(e.kind(), format!("{} can't be written: {e}", self.file.display()))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_switch_outlives_a_restart_and_goes_with_its_camera() {
        let dir = tempfile::tempdir().unwrap();
        let state = dir.path().join("state");
        let mut switches = Switches::open(&state);
        assert!(switches.keep(&["a", "b"]).is_empty() && switches.is_on("a"));
        switches.set("a", false).unwrap();
        let mut again = Switches::open(&state);
        assert!(!again.is_on("a") && again.is_on("b"));
        assert_eq!(again.keep(&["b"]), ["a"]);
        assert!(Switches::open(&state).is_on("a"), "it is another camera now");
        fs::write(state.join("cameras.json"), "{").unwrap();
        assert!(Switches::open(&state).is_on("a"));
    }

    #[test]
    fn what_can_not_be_written_is_said_and_holds_all_the_same() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("state"), "a file").unwrap();
        let mut switches = Switches::open(&dir.path().join("state"));
        let error = switches.set("a", false).unwrap_err().to_string();
        assert!(error.contains("state/cameras.json can't be written"), "{error}");
        assert!(!switches.is_on("a"));
    }
}
