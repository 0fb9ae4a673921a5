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
    // Many services at once: the usual port is one.
    let web = if rest.contains("[web]") { "" } else { "\n[web]\nlisten = \"off\"\n" };
    // What `auto` measures is a test of its own.
    let fixed = "\n[inference]\nprovider = \"cpu\"\n";
    let inference = if rest.contains("[inference]") { "" } else { fixed };
    text + rest + inference + web
}

/// `[models]` with the demo's model.
pub fn plates() -> String {
    format!("[models]\nfactory = \"{}\"\n", shipped("models/plates-v1.onnx").display())
}

/// What the log of each life has before its boot id.
const BOOT: &str = ", boot ";

/// One life in this folder; its log goes on where the last one's ended.
fn run(mut command: Command, dir: &Path, env: &[(&str, &str)]) -> Child {
    let log = std::fs::OpenOptions::new().create(true).append(true).open(dir.join("log"));
    command
        .args(["run", "--config"])
        .arg(dir.join("noblink.toml"))
        .envs(env.iter().copied())
        .stdout(Stdio::null())
        .stderr(log.expect("the folder is ours"))
        .spawn()
        .expect("the program was built")
}

/// `noblink run`, ended with this value.
pub struct Service {
    pub dir: tempfile::TempDir,
    child: Child,
    /// Lives that had said who they are before this one began.
    told: usize,
}

impl Service {
    pub fn start(config: &str) -> Self {
        Self::start_in(tempfile::tempdir().expect("a folder"), config, &[])
    }

    /// In a folder that may hold what another life left.
    pub fn start_in(dir: tempfile::TempDir, config: &str, env: &[(&str, &str)]) -> Self {
        std::fs::write(dir.path().join("noblink.toml"), config).expect("the folder is ours");
        let child = run(noblink(&[]), dir.path(), env);
        Self { dir, child, told: 0 }
    }

    /// The next life, after the end of the last one.
    pub fn again(&mut self, env: &[(&str, &str)]) {
        assert!(self.ended().is_some(), "the last life goes on");
        self.told = self.log().matches(BOOT).count();
        self.child = run(noblink(&[]), self.dir.path(), env);
    }

    /// What tells the records of this life from those of others.
    pub fn boot(&mut self) -> String {
        let mut boot = String::new();
        until("the service says who it is", 20, || {
            let log = self.log();
            let said = log.split(BOOT).skip(1 + self.told).last();
            // Its line may be written in part.
            boot = said.and_then(|rest| rest.get(..16)).unwrap_or_default().to_owned();
            assert!(self.ended().is_none(), "it ended:\n{log}");
            !boot.is_empty()
        });
        boot
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Whether it has ended, and how.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().expect("our child")
    }

    /// Where it keeps models.
    pub fn state_dir(&self) -> PathBuf {
        self.dir.path().join("state")
    }

    /// By a shell that prepares the ground: `setup` stands before `exec`.
    pub fn start_after(setup: &str, config: &str) -> Self {
        let dir = tempfile::tempdir().expect("a folder");
        std::fs::write(dir.path().join("noblink.toml"), config).expect("the folder is ours");
        let mut shell = Command::new("sh");
        shell.args(["-c", &format!("{setup}; exec \"$0\" \"$@\"")]);
        shell.arg(env!("CARGO_BIN_EXE_noblink"));
        let child = run(shell, dir.path(), &[]);
        Self { dir, child, told: 0 }
    }

    /// Another configuration, and SIGHUP.
    pub fn reload(&self, config: &str) {
        std::fs::write(self.dir.path().join("noblink.toml"), config).expect("the folder is ours");
        kill(Pid::from_raw(self.pid() as i32), Signal::SIGHUP).expect("our child runs");
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
            status = self.ended();
            status.is_some()
        });
        status.expect("waited for")
    }
}

/// `noblink run`, its log appended to the file `log`.
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
