//! The thread `cam-<id>`: keeps one source streaming, whatever it does.
//!
//! ```text
//!               first frame            no frame for stall_timeout
//!  connecting ──────────────► streaming ─────────────────────────► stalled
//!   ▲   │                         │ error, end of a camera's stream   │ taken down
//!   │   └── error, no frame ──────┴───────────────► backoff ◄─────────┘
//!   └───────────── 1 s … 30 s, doubled each time ──────┘
//!
//!  streaming ── end of a file ──► ended      (`loop`: the next pipeline, still streaming)
//!  any ── set_enabled(false) ──► disabled ── set_enabled(true) ──► connecting
//!  any ── the configuration has it no more ──► removed
//! ```
//!
//! Every attempt has a pipeline of its own, since a reused rtspsrc does not always recover. The
//! supervisor never touches its state: a [`Keeper`] does.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, bounded, select};

use super::clock::unix_us;
use super::keeper::{DISMANTLE_WITHIN, Keeper};
use super::pipeline::{Event, Outlet, Pipeline, Settings, Watch};
use super::reason::{self, Failure, Reason};
use super::source::Source;
use super::status::{CameraStatus, State, Stream, rate};
use super::templates::Templates;
use crate::config;
use crate::queue::Inlet;

/// How long a source may take to its first frame: resolving, connecting, a login that is refused
/// first, and up to 5 s to the next key frame.
const CONNECT_WITHIN: Duration = Duration::from_secs(15);

/// Streaming this long makes the failures before it history: a camera that closes every connection
/// after 3 s is better taken for these than left alone for half a minute each time.
const HEALTHY_AFTER: Duration = Duration::from_secs(1);

/// How long frames are counted where the stream does not declare its rate.
const MEASURE_FOR: Duration = Duration::from_secs(3);

/// The status is never older than this while a stream runs; also the heart's slowest beat.
const TICK: Duration = Duration::from_millis(500);

/// What the supervisor shares with its handle.
pub(super) struct Shared {
    pub(super) enabled: AtomicBool,
    pub(super) stopping: AtomicBool,
    pub(super) heartbeat: AtomicU64,
    /// Pipelines given up, by this supervisor and those before it.
    leaked: Arc<AtomicU64>,
    status: Mutex<Noted>,
}

/// The status, with instants where the wire has durations.
struct Noted {
    status: CameraStatus,
    retry_at: Option<Instant>,
}

impl Shared {
    pub(super) fn new(enabled: bool) -> Self {
        let status = CameraStatus {
            state: if enabled { State::Connecting } else { State::Disabled },
            since_us: unix_us(),
            reason: None,
            attempt: 0,
            retry_in_s: None,
            stream: None,
            clock: None,
            clock_offset_ms: None,
            connects: 0,
            leaked_pipelines: 0,
            leaked_supervisors: 0,
        };
        Self {
            enabled: AtomicBool::new(enabled),
            stopping: AtomicBool::new(false),
            heartbeat: AtomicU64::new(0),
            leaked: Arc::default(),
            status: Mutex::new(Noted { status, retry_at: None }),
        }
    }

    /// Of the supervisor that takes this one's place: the counters run on.
    pub(super) fn next(&self) -> Self {
        let next = Self::new(self.enabled.load(Ordering::Acquire));
        let before = self.status();
        next.note(|s| {
            s.connects = before.connects;
            s.leaked_supervisors = before.leaked_supervisors;
        });
        Self { leaked: Arc::clone(&self.leaked), ..next }
    }

    /// The supervisor before this one did not end.
    pub(super) fn left_behind(&self) {
        self.note(|s| s.leaked_supervisors += 1);
    }

    pub(super) fn beat(&self) {
        self.heartbeat.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn status(&self) -> CameraStatus {
        let noted = self.status.lock().expect("nothing panics while it holds this");
        let mut status = noted.status.clone();
        let wait = noted.retry_at.map(|at| at.saturating_duration_since(Instant::now()));
        status.retry_in_s = wait.map(|w| w.as_millis() as f64 / 1000.0);
        status.leaked_pipelines = self.leaked.load(Ordering::Acquire);
        status
    }

    fn note(&self, change: impl FnOnce(&mut CameraStatus)) {
        change(&mut self.status.lock().expect("nothing panics while it holds this").status);
    }

    fn enter(&self, state: State, reason: Option<String>, retry_at: Option<Instant>) {
        let mut noted = self.status.lock().expect("nothing panics while it holds this");
        noted.retry_at = retry_at;
        let status = &mut noted.status;
        if status.state != state {
            status.state = state;
            status.since_us = unix_us();
        }
        status.reason = reason;
    }
}

/// How an attempt came to its end.
enum End {
    /// A file was played.
    Over,
    /// Stop or disable was called.
    Called,
    /// It did not work, or not any more.
    Failed {
        reason: Reason,
        /// Streamed for [`HEALTHY_AFTER`] before.
        healthy: bool,
    },
}

/// What the watch over a running pipeline ends with.
enum Seen {
    Over,
    Called,
    Failed(Reason),
    /// The pipeline does not know why; the network may.
    Unreachable(Option<Failure>),
}

pub(super) struct Supervisor {
    pub(super) camera: Arc<config::Camera>,
    pub(super) inlet: Inlet,
    pub(super) templates: Arc<Templates>,
    pub(super) shared: Arc<Shared>,
    /// Rung when `enabled` or `stopping` changes.
    pub(super) bell: Receiver<()>,
}

impl Supervisor {
    pub(super) fn run(self) {
        let mut failures = 0;
        // A file that starts over goes on streaming.
        let mut looping = false;
        while !self.stopping() {
            if !self.enabled() {
                self.shared.enter(State::Disabled, None, None);
                tracing::debug!(camera = self.camera.id, "disabled");
                self.rest_while(|| !self.enabled());
                continue;
            }
            match self.attempt(failures, std::mem::take(&mut looping)) {
                End::Called => failures = 0,
                End::Over if self.camera.repeat => (failures, looping) = (0, true),
                End::Over => {
                    failures = 0;
                    self.shared.enter(State::Ended, None, None);
                    tracing::debug!(camera = self.camera.id, "played to its end");
                    self.rest_while(|| self.enabled());
                }
                End::Failed { reason, healthy } => {
                    failures = if healthy { 1 } else { failures + 1 };
                    self.back_off(failures, &reason);
                }
            }
        }
    }

    /// One pipeline, from its building to its end.
    fn attempt(&self, failures: u32, looping: bool) -> End {
        if !looping {
            self.shared.enter(State::Connecting, None, None);
        }
        self.shared.note(|s| s.attempt = failures);
        let (events, told) = bounded(8);
        let watch = Watch::start(false);
        let build = self.builder(&watch, events.clone());
        let started = Keeper::start(&self.camera.id, &self.shared.leaked, events, build);
        let mut keeper = match started {
            Ok(keeper) => keeper,
            Err(e) => {
                let reason = Reason::Other(format!("no thread for the pipeline: {e}"));
                return End::Failed { reason, healthy: false };
            }
        };
        let mut streaming_since = None;
        let seen = self.oversee(&watch, &told, looping, &mut streaming_since);
        if let (Some(_), Seen::Failed(reason @ Reason::Silence(_))) = (streaming_since, &seen) {
            self.shared.enter(State::Stalled, Some(reason.to_string()), None);
        }
        watch.silence();
        keeper.let_go();
        let give_up_at = Instant::now() + DISMANTLE_WITHIN;
        let end = match seen {
            Seen::Over => End::Over,
            Seen::Called => End::Called,
            Seen::Failed(reason) => self.failed(reason, streaming_since),
            Seen::Unreachable(failure) => {
                let reason = self.ask(failure.as_ref(), give_up_at, streaming_since.is_some());
                self.failed(reason, streaming_since)
            }
        };
        self.beat();
        keeper.wait(give_up_at);
        end
    }

    fn failed(&self, reason: Reason, streaming_since: Option<Instant>) -> End {
        let healthy = streaming_since.is_some_and(|since| since.elapsed() >= HEALTHY_AFTER);
        End::Failed { reason, healthy }
    }

    /// What builds the pipeline, elsewhere: reading a template may block, too.
    fn builder(
        &self,
        watch: &Arc<Watch>,
        events: Sender<Event>,
    ) -> impl FnOnce() -> Result<Pipeline, String> + Send + 'static {
        let source = self.camera.source.clone();
        let name = self.camera.pipeline.clone();
        let templates = Arc::clone(&self.templates);
        let watch = Arc::clone(watch);
        let waits = source.is_file() && !self.camera.realtime;
        let (frames, damaged) = (self.inlet.clone(), self.inlet.clone());
        let shared = Arc::clone(&self.shared);
        let outlet = Outlet {
            frame: Box::new(move |arrival, watch| {
                // Another supervisor may have taken over from one that is stuck.
                if shared.stopping.load(Ordering::Acquire) {
                    return false;
                }
                if !waits {
                    frames.offer(arrival);
                    return true;
                }
                frames.offer_waiting(arrival, || {
                    // A file that waits for the worker is not silent.
                    watch.touch();
                    watch.is_alive()
                })
            }),
            corrupt: Box::new(move || damaged.corrupt()),
        };
        let settings = Settings { paced: source.is_file() && !waits, matrix: self.camera.color };
        move || {
            let text = templates.find(&name).map_err(|e| e.to_string())?;
            Pipeline::build(&text, &source, settings, &watch, outlet, events)
        }
    }

    /// Waits for the end of the stream, keeping the status fresh.
    fn oversee(
        &self,
        watch: &Watch,
        told: &Receiver<Event>,
        looping: bool,
        streaming_since: &mut Option<Instant>,
    ) -> Seen {
        let source = &self.camera.source;
        let stall_timeout = Duration::from_secs_f64(self.camera.stall_timeout_s);
        loop {
            self.beat();
            if self.stopping() || !self.enabled() {
                return Seen::Called;
            }
            let patience = match streaming_since {
                Some(_) => stall_timeout,
                None => stall_timeout.max(CONNECT_WITHIN),
            };
            let silent = watch.active_at().elapsed();
            if silent >= patience {
                return match (source, watch.decoder.codec()) {
                    // Not even set up: rtspsrc has not noticed what is wrong.
                    (Source::Rtsp(_), None) => Seen::Unreachable(None),
                    _ => Seen::Failed(Reason::Silence(patience)),
                };
            }
            let event = select! {
                recv(told) -> event => match event {
                    Ok(event) => Some(event),
                    // Its thread is gone without a word.
                    Err(_) => return Seen::Failed(Reason::Ended),
                },
                recv(self.bell) -> _ => None,
                default(TICK.min(patience - silent)) => None,
            };
            match event {
                Some(Event::Streaming) => {
                    *streaming_since = Some(Instant::now());
                    self.observe(watch, streaming_since);
                    self.shared.enter(State::Streaming, None, None);
                    if !looping {
                        self.shared.note(|s| s.connects += 1);
                        let stream = self.shared.status().stream;
                        tracing::debug!(camera = self.camera.id, ?stream, "streaming");
                    }
                }
                Some(Event::Ended) if watch.frames() == 0 => return Seen::Failed(Reason::NoVideo),
                Some(Event::Ended) if source.is_file() => return Seen::Over,
                Some(Event::Ended) => return Seen::Failed(Reason::Ended),
                Some(Event::Failed(failure)) => {
                    return match failure.reason(source) {
                        Some(reason) => Seen::Failed(reason),
                        None => Seen::Unreachable(Some(failure)),
                    };
                }
                Some(Event::Unusable(why)) => return Seen::Failed(Reason::Pipeline(why)),
                None => {}
            }
            self.observe(watch, streaming_since);
        }
    }

    /// Copies into the status what the pipeline shows of itself.
    fn observe(&self, watch: &Watch, streaming_since: &Option<Instant>) {
        let Some(since) = streaming_since else { return };
        if since.elapsed() >= HEALTHY_AFTER {
            self.shared.note(|s| s.attempt = 0);
        }
        let seen = watch.seen();
        self.shared.note(|s| {
            // Measured once: a figure that moves with every look would be published every time.
            let known = s.stream.as_ref().and_then(|s| s.fps);
            let over = Some(since.elapsed()).filter(|over| *over >= MEASURE_FOR);
            let measured = known.or_else(|| rate(watch.frames(), over?));
            s.stream = Stream::of(&self.camera.source, watch, &seen, measured);
            s.clock = seen.capture.map(|c| c.clock);
            s.clock_offset_ms = seen.capture.and_then(|c| c.offset_us).map(|us| us / 1000);
        });
    }

    fn ask(&self, failure: Option<&Failure>, give_up_at: Instant, streamed: bool) -> Reason {
        let Source::Rtsp(url) = &self.camera.source else { return Reason::Ended };
        match reason::ask(url, failure, give_up_at) {
            // The connection broke, but the camera is there.
            Reason::Mute(_) | Reason::HungUp(_) | Reason::Tls(_) if streamed => Reason::Ended,
            reason => reason,
        }
    }

    fn back_off(&self, failures: u32, reason: &Reason) {
        let wait = back_off(failures, getrandom::u32().unwrap_or_default());
        let until = Instant::now() + wait;
        let reason = reason.to_string();
        tracing::debug!(camera = self.camera.id, reason, retry_in_s = wait.as_secs_f32(), "down");
        self.shared.note(|s| s.attempt = failures);
        self.shared.enter(State::Backoff, Some(reason), Some(until));
        self.rest_while(|| self.enabled() && Instant::now() < until);
    }

    fn rest_while(&self, resting: impl Fn() -> bool) {
        while resting() && !self.stopping() {
            self.beat();
            let noted = self.shared.status.lock().expect("nothing panics while it holds this");
            let rest = noted.retry_at.map(|at| at.saturating_duration_since(Instant::now()));
            drop(noted);
            let _ = self.bell.recv_timeout(rest.map_or(TICK, |r| r.min(TICK)));
        }
    }

    fn beat(&self) {
        self.shared.beat();
    }

    fn stopping(&self) -> bool {
        self.shared.stopping.load(Ordering::Acquire)
    }

    fn enabled(&self) -> bool {
        self.shared.enabled.load(Ordering::Acquire)
    }
}

/// 1 s, doubled with every failure, and up to half as much again, so that cameras behind one switch
/// do not all come at once; 30 s at most.
fn back_off(failures: u32, random: u32) -> Duration {
    let seconds = f64::from(1_u32 << (failures.clamp(1, 6) - 1)).min(20.0);
    Duration::from_secs_f64(seconds * (1.0 + 0.5 * f64::from(random) / f64::from(u32::MAX)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_back_off_doubles_from_1_s_to_30_s() {
        for (failures, least, most) in [
            (1, 1.0, 1.5),
            (2, 2.0, 3.0),
            (3, 4.0, 6.0),
            (5, 16.0, 24.0),
            (6, 20.0, 30.0),
            (99, 20.0, 30.0),
        ] {
            assert_eq!(back_off(failures, 0).as_secs_f64(), least, "{failures}");
            assert_eq!(back_off(failures, u32::MAX).as_secs_f64(), most, "{failures}");
        }
    }
}
