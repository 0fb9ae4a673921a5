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
        let dir = tempfile::tempdir().expect("a folder");
        std::fs::write(dir.path().join("noblink.toml"), config).expect("the folder is ours");
        let child = spawn(noblink(&[]), dir.path());
        Self { dir, child }
    }

    /// Once more, in the same folder, after it has ended.
    pub fn start_again(&mut self) {
        self.child = spawn(noblink(&[]), self.dir.path());
    }

    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Another configuration, and SIGHUP.
    pub fn reload(&self, config: &str) {
        std::fs::write(self.dir.path().join("noblink.toml"), config).expect("the folder is ours");
        kill(Pid::from_raw(self.id() as i32), Signal::SIGHUP).expect("our child runs");
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

/// `noblink run`, its log appended to the file `log`.
fn spawn(mut command: Command, dir: &Path) -> Child {
    let log = std::fs::OpenOptions::new().create(true).append(true).open(dir.join("log"));
    command
        .args(["run", "--config"])
        .arg(dir.join("noblink.toml"))
        .stdout(Stdio::null())
        .stderr(log.expect("the folder is ours"))
        .spawn()
        .expect("the program was built")
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
