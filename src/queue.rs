//! From the cameras to the worker: a bounded queue per camera, and the ledger that proves that no
//! frame is lost on the way.
//!
//! A camera's counters and its queue move together under one mutex, held for pointer moves only
//! (buffers are freed after it is released), so that in every snapshot
//!
//! ```text
//! decoded = rate_limited + corrupt + offered
//! offered = inferred + failed + dropped + queued + in_flight
//! ```
//!
//! A full queue gives up its oldest frame. A camera whose queue the worker has not found empty for
//! [`OVERLOADED_AFTER`] is *overloaded*: its newest frame is taken and the older ones go, until the
//! queue is found empty again. So a hiccup loses nothing, and overload does not age the frames.
//!
//! Among the cameras with a waiting frame the one served least recently is next: a max-min fair
//! share for each, whatever the others send.
//!
//! Cameras come, change and go while others run. A camera's place, its *lane*, is its own for the
//! life of the process: one that is removed leaves its lane shut, and finds it again, with its
//! counters, when it comes back. So an index never means another camera, and frame ids never start
//! over. The settings travel with each frame: the worker asks nobody for them.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, bounded};
use serde::Serialize;

use crate::camera::frame::{Clock, Frame};
use crate::config;
use crate::vision::picture::Color;

/// How long a queue may be found non-empty before its camera counts as overloaded.
pub const OVERLOADED_AFTER: Duration = Duration::from_secs(1);

/// What became of a camera's frames since the process started.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Ledger {
    /// Frames that the decoder delivered.
    pub decoded: u64,
    /// Left out by `max_fps`.
    pub rate_limited: u64,
    /// Damaged: not inferred.
    pub corrupt: u64,
    /// Offered to the worker; `frame.id` counts these.
    pub offered: u64,
    /// Inferred.
    pub inferred: u64,
    /// Inference failed.
    pub failed: u64,
    /// Not inferred, by reason.
    pub dropped: Dropped,
    /// Waiting.
    pub queued: u64,
    /// With the worker.
    pub in_flight: u64,
}

/// Why frames were dropped.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Dropped {
    /// Older than the newest of an overloaded camera.
    pub overload: u64,
    /// The queue was full.
    pub full: u64,
    /// The camera was disabled, or removed.
    pub disabled: u64,
    /// There was no model to run.
    pub no_model: u64,
    /// The service stopped.
    pub stopped: u64,
}

impl Dropped {
    /// All of them.
    pub fn total(&self) -> u64 {
        self.overload + self.full + self.disabled + self.no_model + self.stopped
    }

    fn by(&mut self, why: Drop) -> &mut u64 {
        match why {
            Drop::NoModel => &mut self.no_model,
            Drop::Stopped => &mut self.stopped,
            Drop::Disabled => &mut self.disabled,
        }
    }
}

impl Ledger {
    /// Whether both equations hold.
    pub fn is_exact(&self) -> bool {
        self.decoded == self.rate_limited + self.corrupt + self.offered && self.unaccounted() == 0
    }

    /// Offered frames that nothing accounts for: 0, or the promise is broken.
    pub fn unaccounted(&self) -> u64 {
        let done = self.inferred + self.failed + self.dropped.total();
        self.offered.abs_diff(done + self.queued + self.in_flight)
    }
}

/// What the pipeline knows of a frame when it arrives.
pub struct Arrival {
    /// Presentation time in the stream, nanoseconds.
    pub pts_ns: Option<u64>,
    /// Capture time, microseconds since 1970.
    pub time_us: i64,
    /// Where `time_us` comes from.
    pub clock: Clock,
    /// Now.
    pub arrived: Instant,
    /// The decoder's buffer.
    pub buffer: gst::Buffer,
    /// Its format.
    pub info: Arc<gst_video::VideoInfo>,
    /// Its colours.
    pub color: Color,
}

/// Why a frame that left the queue was not inferred.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Drop {
    /// There is no model.
    NoModel,
    /// The service stops.
    Stopped,
    /// The camera is disabled, or removed.
    Disabled,
}

struct Books {
    settings: Arc<config::Camera>,
    ledger: Ledger,
    /// As many as `ledger.queued`.
    waiting: VecDeque<Frame>,
    /// Shortest time between two offered frames.
    interval: Option<Duration>,
    /// Earliest time that `max_fps` lets the next frame through.
    next_due: Option<Instant>,
    /// Since when the worker has not found the queue empty.
    busy_since: Option<Instant>,
    overloaded: bool,
    /// The source waits for room: its queue is full all the time, and that is no overload.
    patient: bool,
    /// Nothing is let in, and why.
    shut: Option<Drop>,
    /// The configuration has this camera.
    present: bool,
}

impl Books {
    fn new(settings: &Arc<config::Camera>) -> Self {
        Self {
            settings: Arc::clone(settings),
            ledger: Ledger::default(),
            waiting: VecDeque::with_capacity(settings.queue),
            interval: interval(settings),
            next_due: None,
            busy_since: None,
            overloaded: false,
            patient: false,
            shut: None,
            present: true,
        }
    }

    fn is_full(&self) -> bool {
        self.waiting.len() >= self.settings.queue
    }

    fn receive(&mut self) -> Option<Frame> {
        let frame = self.waiting.pop_front()?;
        self.ledger.queued -= 1;
        Some(frame)
    }

    /// Lets nothing in any more; returns what waited, counted, to be dropped without the lock.
    fn shut(&mut self, why: Drop) -> VecDeque<Frame> {
        self.shut = Some(why);
        let waiting = std::mem::take(&mut self.waiting);
        self.ledger.queued = 0;
        *self.ledger.dropped.by(why) += waiting.len() as u64;
        waiting
    }

    /// Lets frames in, by these settings; returns what has no room any more.
    fn open(&mut self, settings: &Arc<config::Camera>) -> Vec<Frame> {
        (self.shut, self.present, self.patient) = (None, true, false);
        self.interval = interval(settings);
        self.next_due = None;
        self.settings = Arc::clone(settings);
        self.waiting.reserve(settings.queue.saturating_sub(self.waiting.len()));
        let surplus = self.waiting.len().saturating_sub(settings.queue);
        self.ledger.dropped.full += surplus as u64;
        (0..surplus).filter_map(|_| self.receive()).collect()
    }
}

fn interval(settings: &config::Camera) -> Option<Duration> {
    settings.max_fps.map(|fps| Duration::from_secs_f64(1.0 / fps))
}

struct Lane {
    index: usize,
    camera: Arc<str>,
    books: Mutex<Books>,
    /// Rung when a frame leaves, for sources that wait for room.
    room: Condvar,
}

impl Lane {
    fn books(&self) -> MutexGuard<'_, Books> {
        self.books.lock().expect("nothing panics while it holds a camera's books")
    }

    fn shut(&self, why: Drop) {
        let waiting = self.books().shut(why);
        self.room.notify_all();
        drop(waiting);
    }
}

/// A camera's end: what its pipeline calls.
#[derive(Clone)]
pub struct Inlet {
    lane: Arc<Lane>,
    bell: Sender<()>,
}

impl Inlet {
    /// The lane's index.
    pub fn index(&self) -> usize {
        self.lane.index
    }

    /// Takes a decoded frame, never waiting: when the queue is full, its oldest frame goes.
    pub fn offer(&self, arrival: Arrival) {
        let mut evicted = None;
        let mut books = self.lane.books();
        if admit(&mut books, arrival.arrived) {
            if let Some(why) = books.shut {
                books.ledger.offered += 1;
                *books.ledger.dropped.by(why) += 1;
            } else {
                if books.is_full() {
                    evicted = books.receive();
                    books.ledger.dropped.full += 1;
                }
                self.enqueue(&mut books, arrival);
            }
        }
        drop(books);
        drop(evicted);
    }

    /// Takes a decoded frame and waits for room; nothing is dropped. Returns whether it was taken:
    /// `false` once the lane is shut or `keep_waiting` says no (asked every 50 ms at least).
    pub fn offer_waiting(&self, arrival: Arrival, keep_waiting: impl Fn() -> bool) -> bool {
        let mut books = self.lane.books();
        books.patient = true;
        while books.is_full() && books.shut.is_none() && keep_waiting() {
            let wait = self.lane.room.wait_timeout(books, Duration::from_millis(50));
            books = wait.expect("nothing panics while it holds a camera's books").0;
        }
        if books.is_full() || books.shut.is_some() {
            return false;
        }
        if admit(&mut books, arrival.arrived) {
            self.enqueue(&mut books, arrival);
        }
        true
    }

    /// Counts a decoded frame that is damaged.
    pub fn corrupt(&self) {
        let mut books = self.lane.books();
        books.ledger.decoded += 1;
        books.ledger.corrupt += 1;
    }

    fn enqueue(&self, books: &mut Books, a: Arrival) {
        let frame = Frame {
            id: books.ledger.offered,
            pts_ns: a.pts_ns,
            time_us: a.time_us,
            clock: a.clock,
            arrived: a.arrived,
            buffer: a.buffer,
            info: a.info,
            color: a.color,
        };
        books.ledger.offered += 1;
        books.ledger.queued += 1;
        books.waiting.push_back(frame);
        // Full = the worker has been called already.
        let _ = self.bell.try_send(());
    }
}

/// Counts the frame as decoded and says whether `max_fps` lets it through.
fn admit(books: &mut Books, now: Instant) -> bool {
    books.ledger.decoded += 1;
    let Some(interval) = books.interval else { return true };
    // Half an interval of grace: a 30 fps camera with jitter keeps its 15 fps.
    match books.next_due {
        Some(due) if now + interval / 2 < due => {
            books.ledger.rate_limited += 1;
            false
        }
        Some(due) => {
            // Without catching up after a pause.
            books.next_due = Some((due + interval).max(now + interval / 2));
            true
        }
        None => {
            books.next_due = Some(now + interval);
            true
        }
    }
}

/// A frame on loan to the worker. It must be settled; unsettled, it counts as failed.
pub struct Taken {
    /// The index of its camera's lane.
    pub camera: usize,
    /// How its camera is set.
    pub settings: Arc<config::Camera>,
    /// The frame.
    pub frame: Frame,
    lane: Arc<Lane>,
    settled: bool,
}

impl Taken {
    /// The frame was inferred.
    pub fn inferred(mut self) {
        self.settle(|l| l.inferred += 1);
    }

    /// The frame was dropped.
    pub fn dropped(mut self, why: Drop) {
        self.settle(|l| *l.dropped.by(why) += 1);
    }

    fn settle(&mut self, count: impl FnOnce(&mut Ledger)) {
        let mut books = self.lane.books();
        books.ledger.in_flight -= 1;
        count(&mut books.ledger);
        self.settled = true;
    }
}

impl std::ops::Drop for Taken {
    fn drop(&mut self) {
        if !self.settled {
            self.settle(|l| l.failed += 1);
        }
    }
}

/// The worker's end of all cameras' queues.
pub struct Intake {
    /// Held for a look at every lane; with a lane's books it is always taken first.
    lanes: Mutex<Lanes>,
    ring: Sender<()>,
    bell: Receiver<()>,
}

#[derive(Default)]
struct Lanes {
    /// All that there ever were.
    all: Vec<Arc<Lane>>,
    /// Those that the configuration has, in the order in which they were served, least recently
    /// first.
    order: Vec<usize>,
    closed: bool,
}

/// A camera's counters at one instant.
#[derive(Debug, Clone)]
pub struct LaneSnapshot {
    /// The lane's index.
    pub index: usize,
    /// The camera's id.
    pub camera: Arc<str>,
    /// Whether the configuration has the camera.
    pub present: bool,
    /// The ledger, exact.
    pub ledger: Ledger,
    /// Whether only the newest frame is taken.
    pub overloaded: bool,
}

impl Default for Intake {
    fn default() -> Self {
        let (ring, bell) = bounded(1);
        Self { lanes: Mutex::default(), ring, bell }
    }
}

impl Intake {
    /// Opens a camera's lane, or changes its settings: those of the next frame on. A camera that
    /// was here before finds its lane as it left it.
    pub fn open(&self, settings: &Arc<config::Camera>) -> Inlet {
        let mut lanes = self.lanes();
        let known = lanes.all.iter().find(|lane| *lane.camera == *settings.id).cloned();
        let lane = known.unwrap_or_else(|| {
            let (index, camera) = (lanes.all.len(), settings.id.as_str().into());
            let (books, room) = (Mutex::new(Books::new(settings)), Condvar::new());
            let lane = Arc::new(Lane { index, camera, books, room });
            lanes.all.push(Arc::clone(&lane));
            lane
        });
        if !lanes.order.contains(&lane.index) {
            lanes.order.push(lane.index);
        }
        let mut books = lane.books();
        let surplus = books.open(settings);
        books.shut = lanes.closed.then_some(Drop::Stopped);
        drop((books, lanes, surplus));
        lane.room.notify_all();
        Inlet { lane, bell: self.ring.clone() }
    }

    /// Lets nothing of a camera in until its lane is opened again, and drops what waits.
    pub fn disable(&self, inlet: &Inlet) {
        inlet.lane.shut(Drop::Disabled);
    }

    /// The configuration has this camera no more.
    pub fn remove(&self, inlet: &Inlet) {
        let mut lanes = self.lanes();
        lanes.order.retain(|index| *index != inlet.lane.index);
        inlet.lane.books().present = false;
        drop(lanes);
        self.disable(inlet);
    }

    fn lanes(&self) -> MutexGuard<'_, Lanes> {
        self.lanes.lock().expect("nothing panics while it holds the lanes")
    }

    /// The next frame, or `None` when none came within `patience`.
    pub fn take(&self, patience: Duration) -> Option<Taken> {
        let deadline = Instant::now() + patience;
        loop {
            if let Some(taken) = self.try_take(Instant::now()) {
                return Some(taken);
            }
            if self.bell.recv_deadline(deadline).is_err() {
                return self.try_take(Instant::now());
            }
        }
    }

    /// The next frame, if one waits. Looks at every queue once, so that each learns whether it was
    /// found empty at `now`.
    pub fn try_take(&self, now: Instant) -> Option<Taken> {
        let mut lanes = self.lanes();
        let mut found = None;
        for (position, &index) in lanes.order.iter().enumerate() {
            let mut books = lanes.all[index].books();
            if books.ledger.queued == 0 {
                books.busy_since = None;
                books.overloaded = false;
            } else {
                let since = *books.busy_since.get_or_insert(now);
                let overloaded = now.duration_since(since) >= OVERLOADED_AFTER;
                books.overloaded |= overloaded && !books.patient;
                found = found.or(Some((position, index)));
            }
        }
        let (position, index) = found?;
        lanes.order.remove(position);
        lanes.order.push(index);
        let lane = Arc::clone(&lanes.all[index]);
        drop(lanes);
        take_from(lane)
    }

    /// The counters of every lane by its index, each exact.
    pub fn snapshot(&self) -> Vec<LaneSnapshot> {
        let one = |lane: &Arc<Lane>| {
            let books = lane.books();
            LaneSnapshot {
                index: lane.index,
                camera: Arc::clone(&lane.camera),
                present: books.present,
                ledger: books.ledger,
                overloaded: books.overloaded,
            }
        };
        self.lanes().all.iter().map(one).collect()
    }

    /// Lets nothing in any more and drops what waits.
    pub fn close(&self) {
        let mut lanes = self.lanes();
        lanes.closed = true;
        lanes.all.iter().for_each(|lane| lane.shut(Drop::Stopped));
    }
}

fn take_from(lane: Arc<Lane>) -> Option<Taken> {
    let mut outdated = Vec::new();
    let mut books = lane.books();
    let mut frame = books.receive()?;
    if books.overloaded {
        while let Some(newer) = books.receive() {
            outdated.push(std::mem::replace(&mut frame, newer));
        }
        books.ledger.dropped.overload += outdated.len() as u64;
    }
    books.ledger.in_flight += 1;
    let settings = Arc::clone(&books.settings);
    drop(books);
    lane.room.notify_all();
    Some(Taken { camera: lane.index, settings, frame, lane, settled: false })
}
