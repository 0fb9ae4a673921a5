//! The words of an update: commands, jobs, gates, the slot, and what an ended job is answered with.
//!
//! Job states are AWS IoT Jobs' words. Everything here is data; what may follow what stands in
//! `machine`, and `registry` writes it down. Times are Unix milliseconds.

use std::borrow::Cow;
use std::collections::{BTreeMap, VecDeque};
use std::fmt;

use serde::{Deserialize, Serialize};

use super::digest::Digest;

/// Unix time in milliseconds.
pub type Millis = i64;

/// The way by which a command came in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Way {
    /// A file in the inbox directory.
    Inbox,
    /// `cmd/models/…`
    Mqtt,
    /// The command line, over the control socket.
    Cli,
    /// The page.
    Page,
}

impl Way {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Inbox, Self::Mqtt, Self::Cli, Self::Page];

    /// The word on the wire.
    pub fn name(self) -> &'static str {
        match self {
            Self::Inbox => "inbox",
            Self::Mqtt => "mqtt",
            Self::Cli => "cli",
            Self::Page => "page",
        }
    }
}

/// Why something ended as it did: a word for machines, a sentence for people.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reason {
    /// `stale_sequence`; stable, on the wire.
    pub code: Cow<'static, str>,
    /// Names the thing, the value and the remedy.
    pub message: String,
}

impl Reason {
    /// Both parts.
    pub fn new(code: &'static str, message: impl Into<String>) -> Self {
        Self { code: Cow::Borrowed(code), message: message.into() }
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.code, self.message)
    }
}

/// `install` of a desired model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Install {
    /// Goes live when the gates have passed.
    Auto,
    /// Waits for `confirm` as a proven, loaded candidate.
    Manual,
}

/// Where the bytes of a model are.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Source {
    /// In the store already (inbox, a local file).
    Store,
    /// `http://` or `https://`.
    Url(String),
    /// Pulled in chunks over MQTT.
    Mqtt,
}

/// A wish to install a model, as it is kept until its end: a restart resumes from this alone.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Command {
    /// The sender's id; one id, one job. `[a-z0-9][a-z0-9_-]{0,31}`.
    pub id: String,
    /// The way in.
    pub way: Way,
    /// Who, as far as that way knows: a file's name, a user id, a client.
    pub from: String,
    /// Digest of what was commanded (manifest, source, install), without the id: a second command
    /// with the same id must have the same one.
    pub fingerprint: Digest,
    /// Where the bytes are.
    pub source: Source,
    /// The model's digest, when the command names it.
    pub digest: Option<Digest>,
    /// The model's size in bytes, when the command names it.
    pub size: Option<u64>,
    /// Automatic or by confirmation.
    pub install: Install,
    /// The manifest's sequence and whether a signature that was checked covers it.
    pub sequence: Option<(u64, bool)>,
    /// Base64 of the exact bytes of the manifest.
    pub manifest: Option<String>,
    /// The minisign text over them.
    pub signature: Option<String>,
    /// Ratio of latencies that the local operator allows (`--accept-slower`).
    pub accept_slower: Option<Ratio>,
}

impl Command {
    /// The fingerprint of a command: what it asks for, not who asks or by which id.
    pub fn fingerprint(
        source: &Source,
        install: Install,
        digest: Option<&Digest>,
        manifest: Option<&[u8]>,
    ) -> Digest {
        let manifest = manifest.map(Digest::of);
        let parts = (source, install, digest, manifest);
        Digest::of(&serde_json::to_vec(&parts).expect("plain values have a JSON form"))
    }

    /// Whether a person is asked in any case.
    pub fn is_manual(&self) -> bool {
        self.install == Install::Manual
    }
}

/// A ratio, in thousandths: exact, so that commands can be compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Ratio(pub u32);

impl Ratio {
    /// A factor as `--accept-slower` and `accept_slower` have it: 1 to 1000.
    pub fn of(factor: f64) -> Option<Self> {
        (1.0..=1000.0).contains(&factor).then(|| Self((factor * 1000.0).round() as u32))
    }

    /// As a factor.
    pub fn factor(self) -> f64 {
        f64::from(self.0) / 1000.0
    }
}

/// What a job does.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Task {
    /// Brings a model in.
    Install(Box<Command>),
    /// Goes back to a model that the store holds.
    Rollback {
        /// The model that is wanted back.
        to: Digest,
    },
}

/// AWS IoT Jobs' words.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum JobState {
    /// Waits for the end of the job before.
    Queued,
    /// See its phase.
    InProgress,
    /// The wanted model is live and committed.
    Succeeded,
    /// Could not be done, or was rolled back.
    Failed,
    /// A gate said no; the running model was never touched.
    Rejected,
    /// A step took too long; the running model was never touched.
    TimedOut,
    /// By a command, or by a newer job; the running model was never touched.
    Canceled,
}

impl JobState {
    /// How a job may end.
    pub const ENDS: [Self; 5] =
        [Self::Succeeded, Self::Failed, Self::Rejected, Self::TimedOut, Self::Canceled];

    /// Nothing follows it.
    pub fn is_terminal(self) -> bool {
        !matches!(self, Self::Queued | Self::InProgress)
    }
}

/// Where a job in progress is, and how one that reached the slot ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// The bytes are fetched.
    Receiving,
    /// Digest, structure, contract.
    Verifying,
    /// In the child process.
    Proving,
    /// Session built and warmed in the service.
    Loading,
    /// Proven and loaded; a person has the word.
    AwaitingConfirm,
    /// The slot is committed; the worker takes the pointer between two frames.
    Switching,
    /// Live, with the previous model kept warm.
    Probation,
    /// Live for good.
    Committed,
    /// The previous model is back.
    RolledBack,
}

/// How a gate judged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum Verdict {
    /// Ran, and found nothing.
    Passed,
    /// Ran, and refuses.
    Failed,
    /// Could not run; never the same as passed.
    Skipped,
    /// Ran, and leaves the word to a person.
    Ask,
}

/// One gate's result, with its numbers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Gate {
    /// `identity`, `structure`, `contract`, …
    pub gate: Cow<'static, str>,
    /// Its judgement.
    pub verdict: Verdict,
    /// One sentence.
    pub message: String,
    /// What was measured, and against what.
    pub numbers: serde_json::Value,
}

/// One job, whole: what the registry keeps and the reports show.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Job {
    /// Counts jobs since the store was made. Steps report by it, so that a late report of a job
    /// that was superseded can't be taken for its successor's.
    pub serial: u64,
    /// The command's id.
    pub id: String,
    /// The way in.
    pub way: Way,
    /// Who.
    pub from: String,
    /// What it does.
    pub task: Task,
    /// Digest of the command; see [`Command::fingerprint`].
    pub fingerprint: Digest,
    /// State.
    pub state: JobState,
    /// None while queued.
    pub phase: Option<Phase>,
    /// The model, from when it is known.
    pub digest: Option<Digest>,
    /// Why it ended so, or what a person is asked.
    pub reason: Option<Reason>,
    /// A person must confirm, and why.
    pub ask: Option<Reason>,
    /// Results of the gates so far.
    pub gates: Vec<Gate>,
    /// Deaths of the service that this job has outlived before it reached the slot.
    pub deaths: u8,
    /// When it came in.
    pub created: Millis,
    /// When each phase was entered, in order.
    pub entered: Vec<(Phase, Millis)>,
    /// When it last changed.
    pub changed: Millis,
}

impl Job {
    /// The command of an install.
    pub fn command(&self) -> Option<&Command> {
        match &self.task {
            Task::Install(command) => Some(command),
            Task::Rollback { .. } => None,
        }
    }

    /// Whether the slot holds this job's model already: from here on it can't be cancelled.
    pub fn holds_slot(&self) -> bool {
        self.state == JobState::InProgress
            && matches!(self.phase, Some(Phase::Switching | Phase::Probation))
    }
}

/// Tries that a model on probation has: a death of the process costs one.
pub const TRIES: u8 = 2;

/// What is known of a probation, across restarts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Probation {
    /// The job that brought the model.
    pub serial: u64,
    /// Loads that are left; counted down before each.
    pub tries_left: u8,
    /// Power cuts in a row.
    pub power_cuts: u8,
    /// What was `previous` before: back there after a rollback.
    pub displaced: Option<Digest>,
}

/// The slot: which model runs.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Slot {
    /// What runs, and what the next start loads first.
    pub active: Option<Digest>,
    /// What a rollback goes back to.
    pub previous: Option<Digest>,
    /// The active model came from the configured factory file, by no job.
    pub from_factory: bool,
    /// The active model is on probation.
    pub probation: Option<Probation>,
    /// Swaps since the store was made. Never goes back, and jumps by two where a process died on
    /// probation: events of the rollback that it may have begun used the one between.
    pub epoch: u64,
}

/// Rejected and rolled-back jobs of one way within 24 h that stop its automatic installs.
pub const BREAKER_JOBS: usize = 3;

/// The window of the breaker.
pub const BREAKER_WINDOW: Millis = 24 * 3600 * 1000;

/// The breaker of one way in.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Breaker {
    /// When the last jobs were refused, [`BREAKER_JOBS`] at most.
    pub refused: VecDeque<Millis>,
    /// Automatic installs wait for a person until one confirms or closes it.
    pub open: bool,
}

impl Breaker {
    pub(super) fn count(&mut self, now: Millis) {
        self.refused.push_back(now);
        while self.refused.len() > BREAKER_JOBS {
            self.refused.pop_front();
        }
        // By distance: after a step of the clock an entry from the future ages out as well.
        let within = |t: &&Millis| now.abs_diff(**t) <= BREAKER_WINDOW.unsigned_abs();
        self.open |= self.refused.iter().filter(within).count() >= BREAKER_JOBS;
    }
}

/// What an ended job is answered with when its command comes again.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ended {
    /// The job.
    pub serial: u64,
    /// Of its command.
    pub fingerprint: Digest,
    /// A terminal state.
    pub state: JobState,
    /// Why.
    pub reason: Option<Reason>,
}

/// Jobs that are remembered by id.
pub const ENDED_MAX: usize = 2048;

/// The last life of the process: tells a death from a power cut and from a stop in good order.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Life {
    /// `/proc/sys/kernel/random/boot_id`
    pub kernel_boot: String,
    /// It stopped in good order.
    pub clean: bool,
}

/// Everything that the machine knows. The registry holds the same.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct State {
    /// The one job in progress.
    pub job: Option<Job>,
    /// The mailbox: one deep, newest wins.
    pub waiting: Option<Job>,
    /// Answered ids, [`ENDED_MAX`] at most.
    pub ended: BTreeMap<String, Ended>,
    /// Which model runs.
    pub slot: Slot,
    /// Models that failed, and why.
    pub quarantine: BTreeMap<Digest, Reason>,
    /// The highest sequence of manifests whose signature was checked.
    pub highest_signed: Option<u64>,
    /// The highest sequence of other manifests. Kept apart, so that an unsigned one can't use up
    /// the numbers before keys are configured.
    pub highest_unsigned: Option<u64>,
    /// The life before this one until `Boot`, then this one.
    pub life: Life,
    /// By way in.
    pub breakers: BTreeMap<Way, Breaker>,
    /// The serial of the newest job.
    pub last_serial: u64,
}

impl State {
    /// What a rollback goes back to: the model it names, else the previous one.
    pub fn rollback_target(&self, named: Option<Digest>) -> Option<Digest> {
        named.or(self.slot.previous)
    }

    /// The highest sequence that a manifest must exceed.
    pub fn highest(&self, signed: bool) -> Option<u64> {
        if signed {
            self.highest_signed
        } else {
            // Where keys were configured once, what they signed still counts.
            self.highest_signed.max(self.highest_unsigned)
        }
    }

    /// Digests that must stay in the store: active, previous, and candidates of open jobs.
    pub fn in_use(&self) -> impl Iterator<Item = Digest> + '_ {
        let displaced = self.slot.probation.as_ref().and_then(|p| p.displaced);
        let jobs = [&self.job, &self.waiting].into_iter().flatten().flat_map(|j| {
            let to = match &j.task {
                Task::Rollback { to } => Some(*to),
                Task::Install(command) => command.digest,
            };
            [j.digest, to]
        });
        [self.slot.active, self.slot.previous, displaced].into_iter().chain(jobs).flatten()
    }
}
