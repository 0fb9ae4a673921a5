//! A real Mosquitto as a child, and its clients.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};

use super::{free_port, until};

/// A broker on a free port of loopback, ended with this value.
pub struct Mosquitto {
    pub port: u16,
    dir: tempfile::TempDir,
    child: Option<Child>,
}

impl Mosquitto {
    /// Open to everyone, and it keeps its sessions over a `kill -9`, as far as it wrote them down.
    pub fn remembering() -> Self {
        Self::with(|dir| {
            format!(
                "allow_anonymous true\npersistence true\npersistence_location {}/\n\
                 autosave_interval 1",
                dir.display()
            )
        })
    }

    /// Open to everyone.
    pub fn start(options: &str) -> Self {
        Self::with(|_| format!("allow_anonymous true\n{options}"))
    }

    /// With options that name files in the broker's folder, which `options` may fill.
    pub fn with(options: impl Fn(&Path) -> String) -> Self {
        let dir = tempfile::tempdir().expect("a folder");
        let options = options(dir.path());
        let port = free_port();
        // Unless it is to remember: it does not take the key twice.
        let forgetful = if options.contains("persistence ") { "" } else { "persistence false\n" };
        let config = format!(
            "user root\n{forgetful}log_dest stderr\nlog_type all\n\
             listener {port} 127.0.0.1\n{options}\n"
        );
        std::fs::write(dir.path().join("mosquitto.conf"), config).expect("the folder is ours");
        let mut broker = Self { port, dir, child: None };
        broker.run();
        broker
    }

    /// Until it listens. A bind may fail for an instant: each child that some test forks holds the
    /// sockets of this process until it has become another program.
    fn run(&mut self) {
        let lives = self.log().matches(" running\n").count();
        until("mosquitto listens", 10, || {
            let running = self.log().matches(" running\n").count() > lives;
            let ended = |c: &mut Child| c.try_wait().expect("our child").is_some();
            if !running && self.child.as_mut().is_none_or(ended) {
                self.child = Some(spawn(self.dir.path()));
            }
            running
        });
    }

    /// `kill -9`.
    pub fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    /// The same broker again: same port, nothing remembered unless it was told to.
    pub fn restart(&mut self) {
        self.kill();
        self.run();
    }

    /// Its log, over all its lives.
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.dir.path().join("log")).unwrap_or_default()
    }

    pub fn dir(&self) -> PathBuf {
        self.dir.path().to_owned()
    }
}

impl Drop for Mosquitto {
    fn drop(&mut self) {
        self.kill();
    }
}

fn spawn(dir: &Path) -> Child {
    let log = std::fs::OpenOptions::new()
        .create(true)
        .append(true)
        .open(dir.join("log"))
        .expect("the folder is ours");
    Command::new("mosquitto")
        .arg("-c")
        .arg(dir.join("mosquitto.conf"))
        .stderr(log)
        .stdout(Stdio::null())
        .spawn()
        .expect("mosquitto is installed")
}

/// A message as a subscriber saw it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Message {
    pub retained: bool,
    pub topic: String,
    pub payload: String,
}

/// A `mosquitto_sub`, ended with this value.
pub struct Subscriber {
    child: Child,
    lines: Arc<Mutex<Vec<String>>>,
}

impl Subscriber {
    /// Returns when the broker has confirmed the subscription. `version`: 311 or 5.
    pub fn new(version: &str, port: u16, filter: &str) -> Self {
        let mut child = Command::new("stdbuf")
            .args(["-oL", "mosquitto_sub", "-d", "-V", version, "-h", "127.0.0.1"])
            .args(["-p", &port.to_string(), "-q", "1", "-t", filter, "-F", "> %r %t %p"])
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .expect("mosquitto-clients is installed");
        let lines = Arc::new(Mutex::new(Vec::new()));
        let (writer, out) = (Arc::clone(&lines), child.stdout.take().expect("piped"));
        std::thread::spawn(move || {
            for line in BufReader::new(out).lines().map_while(Result::ok) {
                writer.lock().expect("no reader panics with it").push(line);
            }
        });
        let subscriber = Self { child, lines };
        until("SUBACK", 10, || subscriber.any(|line| line.contains("received SUBACK")));
        subscriber
    }

    pub fn messages(&self) -> Vec<Message> {
        let lines = self.lines.lock().expect("the writer does not panic");
        lines.iter().filter_map(|line| parse(line)).collect()
    }

    /// The last message on a topic that ends so.
    pub fn last(&self, end: &str) -> Option<Message> {
        let lines = self.lines.lock().expect("the writer does not panic");
        lines.iter().rev().filter_map(|line| parse(line)).find(|m| m.topic.ends_with(end))
    }

    /// The first message on a topic that ends so, with this in its payload.
    pub fn first_with(&self, end: &str, text: &str) -> Option<Message> {
        let lines = self.lines.lock().expect("the writer does not panic");
        let of = lines.iter().filter(|line| line.contains(text));
        of.filter_map(|line| parse(line)).find(|m| m.topic.ends_with(end))
    }

    pub fn has(&self, topic: &str, payload: &str) -> bool {
        self.messages().iter().any(|m| m.topic == topic && m.payload == payload)
    }

    fn any(&self, test: impl Fn(&str) -> bool) -> bool {
        self.lines.lock().expect("the writer does not panic").iter().any(|line| test(line))
    }
}

impl Drop for Subscriber {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn parse(line: &str) -> Option<Message> {
    let mut parts = line.strip_prefix("> ")?.splitn(3, ' ');
    Some(Message {
        retained: parts.next()? == "1",
        topic: parts.next()?.to_owned(),
        payload: parts.next()?.to_owned(),
    })
}

/// `mosquitto_pub`, waited for.
pub fn publish(port: u16, args: &[&str]) {
    let status = Command::new("mosquitto_pub")
        .args(["-h", "127.0.0.1", "-p", &port.to_string(), "-q", "1"])
        .args(args)
        .status()
        .expect("mosquitto-clients is installed");
    assert!(status.success(), "mosquitto_pub {args:?}");
}
