//! What moves the machine, and what it wants done.

use super::digest::Digest;
use super::job::{Breaker, Command, Gate, Job, JobState, Life, Millis, Phase, Reason, Slot, Way};

/// Something happened. Time is a field: the machine has no clock.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// The process started; nothing is loaded yet. Comes first, once.
    Boot {
        /// When.
        now: Millis,
        /// `/proc/sys/kernel/random/boot_id`
        kernel_boot: String,
    },
    /// The start is over. Comes second, once: jobs that a restart interrupted begin again here.
    Running {
        /// When.
        now: Millis,
        /// What runs.
        model: Option<Digest>,
        /// It came from the configured factory file.
        from_factory: bool,
        /// If it isn't the slot's active model: why not.
        why: Option<Reason>,
        /// That model is at fault, not its copy or the machine.
        quarantine: bool,
    },
    /// The process is about to stop in good order.
    Stop {
        /// When.
        now: Millis,
    },
    /// A command to install came in.
    Install {
        /// When.
        now: Millis,
        /// The command.
        command: Box<Command>,
        /// What `manifest::admit` said. A refused one becomes a job that is REJECTED at once and
        /// disturbs nothing: what can't be installed must not supersede what can.
        admission: Result<(), Reason>,
    },
    /// A command to go back came in.
    Rollback {
        /// When.
        now: Millis,
        /// The command's id.
        id: String,
        /// The way in.
        way: Way,
        /// Who.
        from: String,
        /// The wanted model; none = the previous one.
        to: Option<Digest>,
        /// The session of [`rollback_target`](super::job::State::rollback_target) is warm.
        warm: bool,
        /// The store holds it.
        in_store: bool,
    },
    /// A command to cancel came in.
    Cancel {
        /// When.
        now: Millis,
        /// The command's id.
        id: String,
        /// The job; none = the one in progress, else the waiting one.
        job: Option<String>,
    },
    /// A person says yes.
    Confirm {
        /// When.
        now: Millis,
        /// The command's id.
        id: String,
        /// The job; none = the one that waits for it.
        job: Option<String>,
    },
    /// A person closes the breaker of a way in.
    CloseBreaker {
        /// When.
        now: Millis,
        /// The command's id.
        id: String,
        /// The way.
        way: Way,
    },
    /// A person takes a model out of quarantine.
    Release {
        /// When.
        now: Millis,
        /// The command's id.
        id: String,
        /// The model.
        digest: Digest,
    },
    /// A step of a job is done.
    Done {
        /// When.
        now: Millis,
        /// The job.
        serial: u64,
        /// The step.
        step: Step,
        /// Results of the gates that ran in it.
        gates: Vec<Gate>,
    },
    /// A step of a job ended it, before the slot was touched.
    Ended {
        /// When.
        now: Millis,
        /// The job.
        serial: u64,
        /// As what.
        how: Stopped,
        /// Why.
        reason: Reason,
        /// Results of the gates that ran.
        gates: Vec<Gate>,
        /// The model is at fault (crash, hang, memory): it is not tried again.
        quarantine: bool,
    },
    /// The model on probation failed. The worker may have gone back already.
    ProbationFailed {
        /// When.
        now: Millis,
        /// The job.
        serial: u64,
        /// Why.
        reason: Reason,
        /// Its report.
        gates: Vec<Gate>,
    },
    /// The commit before a swap could not be written; the swap was not made.
    StorageFailed {
        /// When.
        now: Millis,
        /// The job.
        serial: u64,
        /// Why.
        reason: Reason,
    },
}

/// A step that went well.
#[derive(Debug, Clone, PartialEq)]
pub enum Step {
    /// The bytes are in the store.
    Received {
        /// Their digest.
        digest: Digest,
    },
    /// Identity, structure and contract hold.
    Verified,
    /// The child process has proven it.
    Proved {
        /// A gate leaves the word to a person.
        ask: Option<Reason>,
    },
    /// The session is built and warm.
    Loaded,
    /// The worker has reported a frame under the new epoch.
    Switched,
    /// Probation is over, well.
    Passed,
}

/// How a job ends before it touched the slot, other than by a command.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stopped {
    /// A gate said no.
    Rejected,
    /// It could not be done.
    Failed,
    /// A step took too long.
    TimedOut,
}

impl From<Stopped> for JobState {
    fn from(how: Stopped) -> Self {
        match how {
            Stopped::Rejected => Self::Rejected,
            Stopped::Failed => Self::Failed,
            Stopped::TimedOut => Self::TimedOut,
        }
    }
}

/// Something to do, in order.
#[derive(Debug, Clone, PartialEq)]
pub enum Effect {
    /// One transaction. What follows it may rely on it; if it fails, nothing after it is done.
    Commit(Vec<Change>),
    /// Say what became of the job (`models/jobs/<job>`, `models/state`).
    Report(Box<Job>),
    /// Answer a command.
    Answer {
        /// The command's id.
        id: String,
        /// The answer.
        answer: Answer,
    },
    /// Get the bytes into the store; ends as [`Step::Received`].
    Fetch {
        /// The job.
        serial: u64,
    },
    /// Check identity, structure and contract; for a rollback identity only.
    Verify {
        /// The job.
        serial: u64,
    },
    /// Run the child process.
    Prove {
        /// The job.
        serial: u64,
    },
    /// Build and warm the session.
    Load {
        /// The job.
        serial: u64,
    },
    /// Give the worker this model for its next frame; ends as [`Step::Switched`].
    Swap {
        /// The job.
        serial: u64,
        /// The model; none = no model at all.
        to: Option<Digest>,
        /// The epoch of its events.
        epoch: u64,
    },
    /// Watch the model on probation, the previous one kept warm.
    Watch {
        /// The job.
        serial: u64,
    },
    /// Stop what is under way for a job: transfer, child, loaded candidate.
    Abandon {
        /// The job.
        serial: u64,
    },
    /// Sessions other than the active one are no longer needed warm.
    Retire,
    /// Blobs and staged files that nothing needs may go.
    Collect,
}

/// The answer to a command.
#[derive(Debug, Clone, PartialEq)]
pub enum Answer {
    /// It is a new job.
    Accepted {
        /// The job.
        serial: u64,
    },
    /// It is the job that is under way, or waiting.
    Same {
        /// The job.
        serial: u64,
        /// Its state.
        state: JobState,
        /// Its phase.
        phase: Option<Phase>,
    },
    /// It is a job that ended.
    Ended {
        /// The job.
        serial: u64,
        /// How.
        state: JobState,
        /// Why.
        reason: Option<Reason>,
    },
    /// Done at once.
    Done,
    /// Not done.
    Refused(Reason),
}

/// A change of what is kept. Each holds the whole new value, so that repeating one is harmless.
#[derive(Debug, Clone, PartialEq)]
pub enum Change {
    /// A job, new or changed.
    Job(Box<Job>),
    /// The slot.
    Slot(Slot),
    /// The highest sequence.
    Sequence {
        /// Of checked manifests, or of others.
        signed: bool,
        /// The new highest.
        highest: u64,
    },
    /// A model failed.
    Quarantine {
        /// The model.
        digest: Digest,
        /// Why.
        reason: Reason,
        /// When.
        now: Millis,
    },
    /// A model may be tried again.
    Release {
        /// The model.
        digest: Digest,
    },
    /// A breaker counted, opened or was closed.
    Breaker {
        /// Of this way in.
        way: Way,
        /// As it is now.
        breaker: Breaker,
    },
    /// The process started or is about to stop.
    Life(Life),
}
