//! The real program as a child, in a folder of its own.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::until;

/// `noblink`, ready to be given arguments.
pub fn noblink(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_noblink"));
    command.args(args);
    command
}

/// Runs a command of `noblink` to its end.
pub fn noblink_output(args: &[&str]) -> Output {
    noblink(args).output().expect("the program was built")
}

/// A file of the checkout.
pub fn shipped(relative: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(relative)
}

/// A configuration for one broker and some cameras, with more lines for each.
pub fn config(mqtt: &str, cameras: &[(&str, &str, &str)], rest: &str) -> String {
    let mut text = format!("[device]\nid = \"test\"\nstate_dir = \"state\"\n[mqtt]\n{mqtt}\n");
    for (id, url, more) in cameras {
        text += &format!("[[camera]]\nid = \"{id}\"\nurl = \"{url}\"\n{more}\n");
    }
    text + rest
}

/// `[models]` with the demo's model.
pub fn plates() -> String {
    format!("[models]\nfactory = \"{}\"\n", shipped("models/plates-v1.onnx").display())
}

/// `noblink run`, ended with this value.
pub struct Service {
    pub dir: tempfile::TempDir,
    child: Child,
}

impl Service {
    pub fn start(config: &str) -> Self {
        Self::with(config, |_, _| {})
    }

    /// With files put into its folder and an environment of its own.
    pub fn with(config: &str, prepare: impl FnOnce(&Path, &mut Command)) -> Self {
        let dir = tempfile::tempdir().expect("a folder");
        let file = dir.path().join("noblink.toml");
        std::fs::write(&file, config).expect("the folder is ours");
        let log = std::fs::File::create(dir.path().join("log")).expect("the folder is ours");
        let mut command = noblink(&["run", "--config"]);
        command.arg(&file).stdout(Stdio::null()).stderr(log);
        prepare(dir.path(), &mut command);
        let child = command.spawn().expect("the program was built");
        Self { dir, child }
    }

    pub fn log(&self) -> String {
        let mut text = String::new();
        let file = std::fs::File::open(self.dir.path().join("log"));
        file.and_then(|mut f| f.read_to_string(&mut text)).expect("the log was made");
        text
    }

    /// Waits until the log holds this.
    pub fn says(&mut self, text: &str, seconds: u64) {
        let what = format!("the log says {text:?}");
        let (child, path) = (&mut self.child, self.dir.path().join("log"));
        until(&what, seconds, || {
            let log = std::fs::read_to_string(&path).expect("the log was made");
            let ended = child.try_wait().expect("our child");
            assert!(ended.is_none() || log.contains(text), "it ended ({ended:?}):\n{log}");
            log.contains(text)
        });
    }

    /// `kill -9`.
    pub fn kill(&mut self) {
        self.child.kill().expect("our child");
        self.child.wait().expect("our child");
    }

    /// SIGTERM; waits for the end.
    pub fn stop(&mut self) -> ExitStatus {
        kill(Pid::from_raw(self.child.id() as i32), Signal::SIGTERM).expect("our child runs");
        let mut status = None;
        until("the service ends", 15, || {
            status = self.child.try_wait().expect("our child");
            status.is_some()
        });
        status.expect("waited for")
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        if let Ok(None) = self.child.try_wait() {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
        if std::thread::panicking() {
            eprintln!("--- the service's log\n{}", self.log());
        }
    }
}
