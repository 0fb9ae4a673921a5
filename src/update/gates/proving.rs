//! Runs the proving child and judges how it ended.
//!
//! ```text
//! ticket ──► stdin ┌────────────┐ stdout ──► steps, gates, report
//!                  │  noblink   │ stderr ──► the last words
//!   SIGKILL ─────► │   prove    │ /proc/<pid>/status ──► memory
//!                  └────────────┘
//! ```
//!
//! A report counts only with the ticket's nonce and a clean exit. Any other end is judged by what
//! killed the child and by what it was doing: a signal while the candidate ran is the candidate's
//! doing, and such a model is not tried again.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crossbeam_channel::{RecvTimeoutError, Sender, bounded};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use serde_json::json;

use super::super::event::Stopped;
use super::super::job::{Gate, Reason};
use super::super::live::LiveSource;
use super::super::tune::Measured;
use super::request::Request;
use super::wire::{self, Fault, Line, Report, Step, Task, Ticket, Who};
use super::{GATES, failed, skipped};
use crate::config::Models;
use crate::host;
use crate::model::options::Setting;
use crate::records::rounded;
use crate::worker::Pulse;

/// How often the child's memory is looked at. It can grow by 30 MB in between.
const TICK: Duration = Duration::from_millis(10);
/// Most that is read of the child's output, and kept of its last words.
const OUTPUT_BYTES_MAX: u64 = 8 << 20;
const LAST_WORDS_BYTES_MAX: usize = 2000;
/// All of the environment that the child gets: where a vendor's libraries and devices are.
const ENVIRONMENT: [&str; 2] = ["LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES"];

/// What a child may take.
#[derive(Debug, Clone)]
pub struct Limits {
    /// The program that is started with the argument `prove`.
    pub program: PathBuf,
    /// Resident memory. Address space is no measure: runtimes map far more than they touch.
    pub memory_bytes: u64,
    /// CPU seconds for each step: a load, a frame.
    pub cpu_s: u64,
    /// From start to end.
    pub wall: Duration,
    /// Its niceness, unless the service's is higher.
    pub nice: i32,
    /// For whose frames it stands still.
    pub beside: Option<Arc<Pulse>>,
}

impl Default for Limits {
    /// This program, 2 GiB or 60 % of the machine's memory, a minute of CPU time a step, 15 min.
    fn default() -> Self {
        let memory = field("/proc/meminfo", "MemTotal:").unwrap_or(u64::MAX / 2);
        Self {
            // Still there when a newer version was installed over the running one.
            program: "/proc/self/exe".into(),
            memory_bytes: (memory / 10 * 6).min(2 << 30),
            cpu_s: 60,
            wall: Duration::from_secs(15 * 60),
            nice: host::NICE,
            beside: None,
        }
    }
}

impl Limits {
    /// The defaults with what `[models]` says.
    pub fn of(models: &Models) -> Self {
        Self { cpu_s: models.proving_cpu_s, ..Self::default() }
    }
}

/// How a proving ended.
#[derive(Debug, Clone)]
pub struct Outcome {
    /// `proving` and those after it, in order; all of them, unless it was cancelled.
    pub gates: Vec<Gate>,
    /// The judgement.
    pub end: End,
    /// Wall time of the child's phases, and `total`.
    pub phases_ms: BTreeMap<String, f64>,
    /// Most memory that the child held.
    pub memory_peak_bytes: u64,
}

/// The judgement.
#[derive(Debug, Clone, PartialEq)]
pub enum End {
    /// No gate refuses.
    Accepted {
        /// A gate leaves the word to a person.
        ask: Option<Reason>,
    },
    /// It must not run.
    Refused {
        /// As what the job ends.
        how: Stopped,
        /// Why.
        reason: Reason,
        /// The model crashed, hung or ate memory: it is not tried again.
        quarantine: bool,
    },
    /// `cancel` was set.
    Canceled,
}

impl End {
    fn refused(how: Stopped, code: &'static str, message: String, quarantine: bool) -> Self {
        Self::Refused { how, reason: Reason::new(code, message), quarantine }
    }
}

/// Proves a model. Blocks until the child is gone; `cancel` ends it within [`TICK`]. The calling
/// thread must outlive the call, which it does: the kernel kills the child with the thread that
/// started it. Frames of `live` are given to the child while it is at work.
pub fn run(
    request: &Request,
    live: Option<&LiveSource<'_>>,
    limits: &Limits,
    cancel: &AtomicBool,
) -> Outcome {
    let began = Instant::now();
    let mut seen = Seen::default();
    let task = Task::Prove(Box::new(request.clone()));
    let cores = request.engine.cores.clone();
    let end = match watch(task, cores, live, limits, cancel, began, &mut seen) {
        Ok((status, killed)) => judge(&mut seen, limits, status, killed),
        Err(why) => {
            End::refused(Stopped::Failed, "proving_failed", format!("no child: {why}"), false)
        }
    };
    seen.finish(&end);
    seen.phases_ms.insert("total".into(), rounded(began.elapsed().as_secs_f64() * 1e3, 1));
    Outcome {
        gates: seen.gates,
        end,
        phases_ms: seen.phases_ms,
        memory_peak_bytes: seen.memory_peak,
    }
}

/// Why the parent killed the child.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::update) enum Killed {
    Memory,
    Wall,
    Canceled,
}

/// What was seen of a child.
#[derive(Debug, Default)]
pub(in crate::update) struct Seen {
    nonce: String,
    step: Option<Step>,
    gates: Vec<Gate>,
    report: Option<Report>,
    /// What a tuning tried last, and what it measured.
    pub(in crate::update) trying: Option<Setting>,
    pub(in crate::update) measured: Option<Measured>,
    /// A report came with another nonce.
    forged: bool,
    memory_peak: u64,
    /// The kernel's count of processes killed for memory went up.
    out_of_memory: bool,
    pub(in crate::update) last_words: String,
    phases_ms: BTreeMap<String, f64>,
}

/// Starts the child and stays with it to its end.
pub(in crate::update) fn watch(
    task: Task,
    cores: Option<Vec<usize>>,
    live: Option<&LiveSource<'_>>,
    limits: &Limits,
    cancel: &AtomicBool,
    began: Instant,
    seen: &mut Seen,
) -> std::io::Result<(ExitStatus, Option<Killed>)> {
    let mut random = [0u8; 16];
    getrandom::fill(&mut random).map_err(|e| std::io::Error::other(e.to_string()))?;
    seen.nonce = random.iter().map(|b| format!("{b:02x}")).collect();
    let most = std::thread::available_parallelism().map_or(1, |n| n.get() as u64);
    let mut ticket = serde_json::to_vec(&Ticket {
        nonce: seen.nonce.clone(),
        parent: std::process::id() as i32,
        cpu_s: limits.cpu_s,
        cpu_total_s: limits.cpu_s + 1 + limits.wall.as_secs() * most,
        nice: limits.nice,
        cores,
        task,
    })?;
    ticket.push(b'\n');
    let kept = ENVIRONMENT.iter().filter_map(|name| Some((name, std::env::var_os(name)?)));
    let killed_before = field("/proc/vmstat", "oom_kill ");
    let mut child = Command::new(&limits.program)
        // In the list of processes, instead of the link's name.
        .arg0("noblink")
        .arg("prove")
        .env_clear()
        .envs(kept)
        .current_dir("/")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0)
        .spawn()?;
    let (stdin, stdout, stderr) = (child.stdin.take(), child.stdout.take(), child.stderr.take());
    let stay = limits.beside.as_ref().map(|pulse| pulse.guest.host(&child)).transpose();
    if let Err(why) = &stay {
        tracing::warn!("the child does not stand still for frames: {why}");
    }
    let gone = AtomicBool::new(false);
    let ended = std::thread::scope(|threads| {
        // A child that does not read must not hold up its own killing.
        let frames = threads.spawn(|| {
            // The end of its input tells it that there are no more.
            let mut stdin = stdin?;
            stdin.write_all(&ticket).ok()?;
            Some(live?(&gone, &mut |file| stdin.write_all(&wire::frame(file)).is_ok()))
        });
        let (lines, said) = bounded(64);
        threads.spawn(move || stdout.map(|out| listen(out, &lines)));
        let words = threads.spawn(move || stderr.map(last_words).unwrap_or_default());
        let ended = loop {
            match said.recv_timeout(TICK) {
                Ok(line) => seen.note(line),
                // It has nothing more to say and is about to be gone.
                Err(RecvTimeoutError::Disconnected) => std::thread::sleep(TICK),
                Err(RecvTimeoutError::Timeout) => {}
            }
            seen.memory_peak = seen.memory_peak.max(memory(&child).unwrap_or(0));
            match child.try_wait() {
                Ok(None) => {}
                Ok(Some(status)) => break Ok((status, None)),
                Err(e) => break Err(e),
            }
            let killed = if cancel.load(Ordering::Relaxed) {
                Killed::Canceled
            } else if seen.memory_peak > limits.memory_bytes {
                Killed::Memory
            } else if began.elapsed() > limits.wall {
                Killed::Wall
            } else {
                continue;
            };
            kill(&mut child);
            break child.wait().map(|status| (status, Some(killed)));
        };
        if ended.is_err() {
            kill(&mut child);
        }
        gone.store(true, Ordering::Relaxed);
        // Its pipes are closed: the rest ends by itself.
        said.iter().for_each(|line| seen.note(line));
        seen.last_words = words.join().unwrap_or_default();
        // Not before: it reads them when it comes to them.
        drop(frames.join());
        ended
    });
    seen.out_of_memory = field("/proc/vmstat", "oom_kill ") > killed_before;
    ended
}

/// The child's group first: it was started as the leader of its own.
fn kill(child: &mut Child) {
    let _ = killpg(Pid::from_raw(child.id() as i32), Signal::SIGKILL);
    let _ = child.kill();
}

fn listen(out: impl Read, lines: &Sender<Line>) {
    for text in BufReader::new(out.take(OUTPUT_BYTES_MAX)).split(b'\n') {
        let Ok(text) = text else { return };
        if let Some(line) = Line::read(&text)
            && lines.send(line).is_err()
        {
            return;
        }
    }
}

fn last_words(mut from: impl Read) -> String {
    let (mut kept, mut buffer) = (Vec::new(), [0; 4096]);
    while let Ok(n @ 1..) = from.read(&mut buffer) {
        kept.extend_from_slice(&buffer[..n]);
        let excess = kept.len().saturating_sub(LAST_WORDS_BYTES_MAX);
        kept.drain(..excess);
    }
    String::from_utf8_lossy(&kept).trim().to_owned()
}

/// Resident now or at most, whichever the kernel still tells: both are gone with a zombie.
fn memory(child: &Child) -> Option<u64> {
    field(&format!("/proc/{}/status", child.id()), "VmHWM:")
}

/// A number out of `/proc`; kB are made bytes.
fn field(file: &str, name: &str) -> Option<u64> {
    let text = std::fs::read_to_string(file).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    let mut words = line.split_whitespace();
    let number: u64 = words.next()?.parse().ok()?;
    Some(if words.next() == Some("kB") { number * 1024 } else { number })
}

impl Seen {
    fn note(&mut self, line: Line) {
        match line {
            Line::Step(step) => self.step = Some(step),
            Line::Gate(gate) => self.gates.push(gate),
            Line::Report(report) if report.nonce == self.nonce => self.report = Some(*report),
            Line::Report(_) => self.forged = true,
            Line::Trying(setting) => self.trying = Some(setting),
            Line::Measured { nonce, measured } if nonce == self.nonce => {
                self.measured = Some(measured);
            }
            Line::Measured { .. } => self.forged = true,
        }
    }

    /// Completes the gates: the one in which the child died, and those that it did not come to.
    fn finish(&mut self, end: &End) {
        if let (None, End::Refused { reason, .. }) = (&self.report, end) {
            let name = self.step.map_or("proving", |step| step.what.gate());
            let numbers = json!({
                "memory_peak_bytes": self.memory_peak,
                "last_words": self.last_words,
            });
            self.gates.retain(|gate| gate.gate != name);
            self.gates.push(failed(name, reason, numbers));
            for left in GATES.iter().skip(2) {
                if !self.gates.iter().any(|gate| gate.gate == *left) {
                    self.gates.push(skipped(left, format!("not run: {name} has failed")));
                }
            }
        }
        self.gates.sort_by_key(|gate| GATES.iter().position(|name| gate.gate == *name));
        if let Some(proving) = self.gates.iter_mut().find(|gate| gate.gate == "proving")
            && proving.numbers.is_object()
        {
            proving.numbers["memory_peak_bytes"] = json!(self.memory_peak);
        }
    }
}

/// Makes a judgement of how the child ended.
fn judge(seen: &mut Seen, limits: &Limits, status: ExitStatus, killed: Option<Killed>) -> End {
    if killed == Some(Killed::Canceled) {
        return End::Canceled;
    }
    if killed.is_none()
        && status.success()
        && let Some(report) = &seen.report
    {
        seen.gates.clone_from(&report.gates);
        seen.phases_ms.clone_from(&report.phases_ms);
        return match report.refused.clone() {
            None => End::Accepted { ask: report.ask.clone() },
            Some((Fault::Machine, reason)) => {
                End::Refused { how: Stopped::Failed, reason, quarantine: false }
            }
            Some((Fault::Model, reason)) => {
                let quarantine = reason.code == "memory_budget";
                End::Refused { how: Stopped::Rejected, reason, quarantine }
            }
        };
    }
    seen.report = None;
    let Some(step) = seen.step else {
        let message = format!("the child ended ({status}) before it came to the model: ");
        return End::refused(
            Stopped::Failed,
            "proving_failed",
            message + seen.last_words.lines().last().unwrap_or("it said nothing"),
            false,
        );
    };
    let (how, code, what, quarantine) = cause(seen, limits, status, killed);
    if step.who == Who::Active {
        let message =
            format!("{what} while the active model ran beside it: nothing is known of it");
        return End::refused(Stopped::Failed, "active_failed", message, false);
    }
    End::refused(how, code, format!("{what} {}", step.what.words()), quarantine)
}

/// How the job ends, the code, what happened, and whether to try the model again.
pub(in crate::update) fn cause(
    seen: &Seen,
    limits: &Limits,
    status: ExitStatus,
    killed: Option<Killed>,
) -> (Stopped, &'static str, String, bool) {
    let mb = |bytes: u64| bytes / 1_000_000;
    match (killed, status.signal().map(Signal::try_from)) {
        (Some(Killed::Memory), _) => {
            let what = format!(
                "took {} MB of memory, {} MB are allowed,",
                mb(seen.memory_peak),
                mb(limits.memory_bytes)
            );
            (Stopped::Rejected, "memory_budget", what, true)
        }
        (Some(Killed::Wall), _) => {
            // A starved machine does this to any model: it may be tried again.
            let what = format!("was not done after {} s", limits.wall.as_secs());
            (Stopped::TimedOut, "timeout", what, false)
        }
        (_, Some(Ok(Signal::SIGXCPU))) => {
            let what = format!("did not come back within {} s of CPU time", limits.cpu_s);
            (Stopped::Rejected, "timeout", what, true)
        }
        (_, Some(Ok(Signal::SIGKILL))) if seen.out_of_memory => {
            let what =
                format!("was at {} MB when the machine ran out of memory", mb(seen.memory_peak));
            (Stopped::Rejected, "memory_budget", what, false)
        }
        (_, Some(signal)) => {
            let name = signal.map_or("an unknown signal", Signal::as_str);
            let what = format!("crashed ONNX Runtime ({name})");
            (Stopped::Rejected, "runtime_crash", what, true)
        }
        (_, None) => {
            let what = if seen.forged { "gave a verdict that is not the child's" } else { "ended" };
            let what = format!("{what} ({status}), without a verdict that counts,");
            (Stopped::Rejected, "no_verdict", what, true)
        }
    }
}
