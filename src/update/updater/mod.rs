//! The update thread: owns store, registry and inbox, moves the machine, does what it wants done.
//!
//! It never works on a frame and the worker never waits for it. What takes time runs as a step on
//! a thread of its own (`steps`), so that a rollback or a cancel is heard at once. Sessions are
//! dropped here, when the worker has reported a later epoch.
//!
//! `boot` starts the first model, `incoming` turns wishes into events, `doing` does the machine's
//! effects, `watching` looks after swaps and probations, `telling` reports, `tuning` finds the fastest way to
//! run the active model.

mod boot;
mod doing;
mod incoming;
mod telling;
mod tuning;
mod watching;

use std::collections::{BTreeMap, VecDeque};
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::Context;
use crossbeam_channel::{Receiver, Sender, bounded, select};
use serde_json::Value;
use tracing::error;

use super::digest::Digest;
use super::event::{Answer, Event};
use super::inbox::Inbox;
use super::job::{Job, JobState, Millis, Reason, Way};
use super::keeper::Keeper;
use super::orders::{self, Order};
use super::registry;
use super::report::SwapReport;
use super::signature::PublicKey;
use super::steps::{Bench, Fetching, Running, StepEnd};
use super::store::Store;
use super::watch::{Probation, Swapped};
use crate::app::now_us;
use crate::config::Config;
use crate::meter::Meter;
use crate::model::engine::Model;
use crate::model::runtime::Runtime;
use crate::model::slot::Slot;
use crate::mqtt::board::Board;
use crate::mqtt::link::Inbound;
use crate::mqtt::outbox::Outbox;
use crate::mqtt::topics::Topics;
use crate::queue::Intake;
use crate::sampler::Sampler;
use crate::worker::{Origin, Pulse};
pub(crate) use telling::unnumbered;
use tuning::Tuner;
/// How often probation, hangs and swaps are looked at.
const TICK: Duration = Duration::from_millis(100);
/// What the time before a swap is: the expected gap and the expected drops come from it.
const BEFORE: Duration = Duration::from_secs(60);
/// Commands that wait for this thread.
const ORDERS_MAX: usize = 64;
/// Chunks of a model that wait for its step: those beyond are asked for again.
const CHUNKS_MAX: usize = 64;
/// No clock is right that says less: 2026-01-01.
const BUILT_MS: Millis = 1_767_225_600_000;

/// What the updater works with: everything is shared with the rest of the service.
pub struct Parts {
    /// The configuration.
    pub config: Config,
    /// Who we are.
    pub origin: Origin,
    /// ONNX Runtime.
    pub runtime: Arc<Runtime>,
    /// The worker's cores.
    pub cores: Vec<usize>,
    /// Where the running model is found.
    pub slot: Arc<Slot>,
    /// What the worker measures.
    pub meter: Arc<Meter>,
    /// The ledgers.
    pub intake: Arc<Intake>,
    /// The worker's pulse.
    pub pulse: Arc<Pulse>,
    /// Where live frames come from.
    pub sampler: Arc<Sampler>,
    /// For job changes and swap reports.
    pub outbox: Arc<Outbox>,
    /// For `models/state`.
    pub board: Arc<Board>,
    /// Where they go.
    pub topics: Topics,
    /// Messages on `cmd/…`.
    pub inbound: Receiver<Inbound>,
}

/// Where an answer goes.
pub type Reply = Box<dyn FnOnce(Value) + Send>;

/// An order with its way in.
pub struct Ask {
    /// What is wanted.
    pub order: Order,
    /// How it came.
    pub way: Way,
    /// Who, as far as that way knows.
    pub from: String,
    /// Where the answer goes.
    pub reply: Reply,
}

/// Where orders are handed in and the state is looked at; shared with the control socket.
pub struct Desk {
    asks: Sender<Ask>,
    view: Arc<Mutex<View>>,
    store: Store,
}

/// The update thread, as its owner sees it.
pub struct Updater {
    desk: Arc<Desk>,
    stop: Sender<()>,
    thread: JoinHandle<()>,
}

/// What others may look at: as of the last change.
#[derive(Debug, Clone, Default)]
pub struct View {
    /// `models/state`
    pub state: Value,
    /// The models of the registry, newest first.
    pub models: Vec<registry::Model>,
    /// The last jobs, newest first.
    pub jobs: Vec<Job>,
    /// What to do next, when no model runs.
    pub advice: Option<String>,
    /// The report on the last swap.
    pub last_swap: Option<SwapReport>,
    /// With `provider = "auto"`: how far it is, for `status`.
    pub tuning: Option<Value>,
    /// Of all swaps since the process started.
    pub swap_totals: SwapTotals,
    /// Jobs that ended since then, by their end.
    pub ended: BTreeMap<JobState, u64>,
}

/// Counts since the process started.
#[derive(Debug, Clone, Copy, Default)]
pub struct SwapTotals {
    /// Swaps.
    pub swaps: u64,
    /// Those back to a model that ran before, by hand or by themselves.
    pub rollbacks: u64,
    /// Frames that they cost.
    pub frames_lost: u64,
}

impl Updater {
    /// Opens the store, starts the first model, then serves commands on its thread. Returns when
    /// the first model is up, or it is known that there is none.
    pub fn start(parts: Parts) -> anyhow::Result<Self> {
        let (asks, asked) = bounded(ORDERS_MAX);
        let (stop, stopped) = bounded(1);
        let (ready, up) = bounded(1);
        let view = Arc::new(Mutex::new(View::default()));
        let shared = Arc::clone(&view);
        let thread = std::thread::Builder::new()
            .name("update".into())
            .spawn(move || match Thread::open(parts, shared) {
                Ok(mut thread) => {
                    let _ = ready.send(Ok(thread.keeper.store().clone()));
                    thread.run(&asked, &stopped);
                }
                Err(e) => {
                    let _ = ready.send(Err(e));
                }
            })
            .context("the update thread can't be started")?;
        let store = up.recv().context("the update thread ended")??;
        Ok(Self { desk: Arc::new(Desk { asks, view, store }), stop, thread })
    }

    /// Where orders are handed in.
    pub fn desk(&self) -> &Arc<Desk> {
        &self.desk
    }

    /// Ends the thread, in good order.
    pub fn stop(self) {
        let _ = self.stop.send(());
        if self.thread.join().is_err() {
            error!("the update thread ended in a panic");
        }
    }
}

impl Desk {
    /// Hands over an order. An answer comes in any case.
    pub fn ask(&self, ask: Ask) {
        if let Err(e) = self.asks.try_send(ask) {
            let ask = e.into_inner();
            let reason = Reason::new("busy", "too many commands wait: try again");
            (ask.reply)(orders::reply("", &Answer::Refused(reason)));
        }
    }

    /// As of the last change.
    pub fn view(&self) -> View {
        self.view.lock().expect("nothing panics while it holds the view").clone()
    }

    /// With `provider = "auto"`: how far it is.
    pub fn tuning(&self) -> Option<Value> {
        self.view.lock().expect("nothing panics while it holds the view").tuning.clone()
    }

    /// The blobs, to put files into.
    pub fn store(&self) -> &Store {
        &self.store
    }
}

/// A step's end, with its job.
type End = (u64, StepEnd);

struct Thread {
    parts: Parts,
    keys: Vec<PublicKey>,
    keeper: Keeper,
    bench: Bench,
    inbox: Option<Inbox>,
    fetching: Fetching,
    /// Into `fetching`.
    chunks: Sender<Inbound>,
    /// Where steps report their ends.
    ends: Sender<End>,
    ended: Receiver<End>,
    running: Option<Running>,
    /// Sessions that are up: the active one, the one before while it may be needed, a candidate.
    warm: BTreeMap<Digest, Arc<Model>>,
    replies: BTreeMap<String, Reply>,
    probation: Option<Probation>,
    swaps: VecDeque<Swapped>,
    /// When the hanging run was asked to end.
    terminated: Option<Instant>,
    /// Frames dropped by all cameras, once a second, for a minute.
    drops: VecDeque<(Instant, u64)>,
    /// Sessions to drop once the worker has left them.
    retired: bool,
    /// With `provider = "auto"`.
    tuner: Option<Tuner>,
    view: Arc<Mutex<View>>,
}

impl Thread {
    fn run(&mut self, asked: &Receiver<Ask>, stopped: &Receiver<()>) {
        let inbound = self.parts.inbound.clone();
        let ended = self.ended.clone();
        loop {
            select! {
                recv(asked) -> ask => if let Ok(ask) = ask { self.ask(ask) },
                recv(inbound) -> message => match message {
                    Ok(message) => self.message(message),
                    // The network is gone, which ends before us only when the service stops.
                    Err(_) => std::thread::sleep(TICK),
                },
                recv(ended) -> end => if let Ok((serial, end)) = end { self.step_ended(serial, end) },
                recv(stopped) -> _ => break,
                default(TICK) => {}
            }
            self.look_into_inbox();
            self.tick();
        }
        if let Some(running) = self.running.take() {
            running.abandon();
        }
        self.stop_tuning();
        self.handle(Event::Stop { now: now_ms() });
    }
}

fn now_ms() -> Millis {
    now_us() / 1000
}

/// Where live frames lie while a model is proved on them.
fn frames_dir(parts: &Parts) -> PathBuf {
    parts.config.device.state_dir.join("frames")
}
