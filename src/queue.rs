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

use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, TryRecvError, bounded};
use serde::Serialize;

use crate::camera::frame::{Clock, Frame};
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
    /// The camera was disabled.
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
    /// The camera is disabled.
    Disabled,
}

struct Books {
    ledger: Ledger,
    /// Earliest time that `max_fps` lets the next frame through.
    next_due: Option<Instant>,
    /// Since when the worker has not found the queue empty.
    busy_since: Option<Instant>,
    overloaded: bool,
    /// The source waits for room: its queue is full all the time, and that is no overload.
    patient: bool,
    closed: bool,
}

struct Lane {
    sender: Sender<Frame>,
    receiver: Receiver<Frame>,
    interval: Option<Duration>,
    books: Mutex<Books>,
    /// Rung when a frame leaves, for sources that wait for room.
    room: Condvar,
}

impl Lane {
    fn books(&self) -> MutexGuard<'_, Books> {
        self.books.lock().expect("nothing panics while it holds a camera's books")
    }
}

/// A camera's end: what its pipeline calls.
#[derive(Clone)]
pub struct Inlet {
    lane: Arc<Lane>,
    bell: Sender<()>,
}

impl Inlet {
    /// Takes a decoded frame, never waiting: when the queue is full, its oldest frame goes.
    pub fn offer(&self, arrival: Arrival) {
        let mut evicted = None;
        let mut books = self.lane.books();
        if admit(&mut books, &self.lane, arrival.arrived) {
            if books.closed {
                books.ledger.offered += 1;
                books.ledger.dropped.stopped += 1;
            } else {
                if self.lane.sender.is_full() {
                    evicted = self.lane.receiver.try_recv().ok();
                    books.ledger.queued -= 1;
                    books.ledger.dropped.full += 1;
                }
                self.enqueue(&mut books, arrival);
            }
        }
        drop(books);
        drop(evicted);
    }

    /// Takes a decoded frame and waits for room; nothing is dropped. Returns whether it was taken:
    /// `false` once `close` was called or `keep_waiting` says no (asked every 50 ms at least).
    pub fn offer_waiting(&self, arrival: Arrival, keep_waiting: impl Fn() -> bool) -> bool {
        let mut books = self.lane.books();
        books.patient = true;
        while self.lane.sender.is_full() && !books.closed && keep_waiting() {
            let wait = self.lane.room.wait_timeout(books, Duration::from_millis(50));
            books = wait.expect("nothing panics while it holds a camera's books").0;
        }
        if self.lane.sender.is_full() || books.closed {
            return false;
        }
        if admit(&mut books, &self.lane, arrival.arrived) {
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
        self.lane.sender.try_send(frame).expect("room was made under the same lock");
        // Full = the worker has been called already.
        let _ = self.bell.try_send(());
    }
}

/// Counts the frame as decoded and says whether `max_fps` lets it through.
fn admit(books: &mut Books, lane: &Lane, now: Instant) -> bool {
    books.ledger.decoded += 1;
    let Some(interval) = lane.interval else { return true };
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
    /// Position of its camera.
    pub camera: usize,
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
        self.settle(|l| match why {
            Drop::NoModel => l.dropped.no_model += 1,
            Drop::Stopped => l.dropped.stopped += 1,
            Drop::Disabled => l.dropped.disabled += 1,
        });
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
    lanes: Vec<Arc<Lane>>,
    bell: Receiver<()>,
    /// Cameras in the order in which they were served, least recently first.
    order: Mutex<Vec<usize>>,
}

/// One camera's queue: how many frames may wait, and how many a second are offered at most.
#[derive(Debug, Clone, Copy)]
pub struct LaneSettings {
    /// Frames that may wait.
    pub queue: usize,
    /// Frames offered a second at most.
    pub max_fps: Option<f64>,
}

/// A camera's counters at one instant.
#[derive(Debug, Clone, Copy)]
pub struct LaneSnapshot {
    /// The ledger, exact.
    pub ledger: Ledger,
    /// Whether only the newest frame is taken.
    pub overloaded: bool,
}

/// Builds the queues: the worker's end and one inlet per camera.
pub fn build(cameras: &[LaneSettings]) -> (Arc<Intake>, Vec<Inlet>) {
    let (ring, bell) = bounded(1);
    let lane = |s: &LaneSettings| {
        let (sender, receiver) = bounded(s.queue);
        Arc::new(Lane {
            sender,
            receiver,
            interval: s.max_fps.map(|fps| Duration::from_secs_f64(1.0 / fps)),
            books: Mutex::new(Books {
                ledger: Ledger::default(),
                next_due: None,
                busy_since: None,
                overloaded: false,
                patient: false,
                closed: false,
            }),
            room: Condvar::new(),
        })
    };
    let lanes: Vec<_> = cameras.iter().map(lane).collect();
    let inlets = lanes.iter().map(|l| Inlet { lane: Arc::clone(l), bell: ring.clone() }).collect();
    let order = Mutex::new((0..lanes.len()).collect());
    (Arc::new(Intake { lanes, bell, order }), inlets)
}

impl Intake {
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
        let mut order = self.order.lock().expect("only the worker takes");
        let mut found = None;
        for (position, &camera) in order.iter().enumerate() {
            let mut books = self.lanes[camera].books();
            if books.ledger.queued == 0 {
                books.busy_since = None;
                books.overloaded = false;
            } else {
                let since = *books.busy_since.get_or_insert(now);
                let overloaded = now.duration_since(since) >= OVERLOADED_AFTER;
                books.overloaded |= overloaded && !books.patient;
                found = found.or(Some((position, camera)));
            }
        }
        let (position, camera) = found?;
        order.remove(position);
        order.push(camera);
        drop(order);
        self.take_from(camera)
    }

    fn take_from(&self, camera: usize) -> Option<Taken> {
        let lane = &self.lanes[camera];
        let mut outdated = Vec::new();
        let mut books = lane.books();
        let mut frame = receive(lane, &mut books)?;
        if books.overloaded {
            while let Some(newer) = receive(lane, &mut books) {
                outdated.push(std::mem::replace(&mut frame, newer));
            }
            books.ledger.dropped.overload += outdated.len() as u64;
        }
        books.ledger.in_flight += 1;
        drop(books);
        lane.room.notify_all();
        Some(Taken { camera, frame, lane: Arc::clone(lane), settled: false })
    }

    /// The counters of every camera, each exact.
    pub fn snapshot(&self) -> Vec<LaneSnapshot> {
        let one = |lane: &Arc<Lane>| {
            let books = lane.books();
            LaneSnapshot { ledger: books.ledger, overloaded: books.overloaded }
        };
        self.lanes.iter().map(one).collect()
    }

    /// Lets nothing in any more and drops what waits.
    pub fn close(&self) {
        for lane in &self.lanes {
            let mut waiting = Vec::new();
            let mut books = lane.books();
            books.closed = true;
            while let Some(frame) = receive(lane, &mut books) {
                waiting.push(frame);
            }
            books.ledger.dropped.stopped += waiting.len() as u64;
            drop(books);
            lane.room.notify_all();
        }
    }
}

fn receive(lane: &Lane, books: &mut Books) -> Option<Frame> {
    match lane.receiver.try_recv() {
        Ok(frame) => {
            books.ledger.queued -= 1;
            Some(frame)
        }
        Err(TryRecvError::Empty | TryRecvError::Disconnected) => None,
    }
}
