//! The records on their way to the broker, oldest first.
//!
//! The worker pushes, the link takes; a record leaves only when the broker has acknowledged or
//! refused it. Whatever is out when a connection ends is put back in front, in its old order:
//! delivery is at least once, and consumers tell a repeat by (device, camera, boot, seq). At every
//! instant
//!
//! ```text
//! pushed + restored = acked + rejected + dropped + queued + in_flight
//! ```
//!
//! What waits is one line, in three parts:
//!
//! ```text
//!   out ◄─ link ─ front ◄──────── on disk alone ◄──────── back ◄─ push
//!               (memory,        (outbox.db; a former    (memory alone)
//!              perhaps on        life's come first)
//!              disk as well)
//! ```
//!
//! While the broker takes what comes, the middle is empty, `back` is where the link takes from, and
//! nothing is written. The `spooler` writes what has waited for a second, reads the middle back into
//! `front`, and erases what was settled. It owns the file; this file does no I/O, and whoever holds
//! its lock moves pointers. Records that were on disk go at `DRAIN_PER_S` beside what comes in.
//!
//! Full, it gives up the oldest record that is not out, counts it by camera and remembers the range
//! of `seq`; the link announces that range before anything else.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use serde::Serialize;
use tokio::sync::Notify;

use super::gaps::Gaps;
pub use super::gaps::{Gap, Reason};
use super::line::{Entry, Unread};
use super::spool::{Held, Key};

/// Records from disk that go out a second beside as many as come in: an hour of 60 a second has
/// gone out after some 7 minutes, and neither broker nor network is flooded.
const DRAIN_PER_S: f64 = 500.0;
/// A disk that says nothing for so long is gone.
pub(super) const STUCK: Duration = Duration::from_secs(30);

/// One message that must arrive.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// The camera's id; empty for what belongs to none, whose loss is counted and not announced.
    pub camera: Arc<str>,
    /// The life of the process that numbered it.
    pub boot: Arc<str>,
    /// Its position in what this camera published in that life.
    pub seq: u64,
    /// Where it goes.
    pub topic: Arc<str>,
    /// What goes there.
    pub payload: Vec<u8>,
}

/// What the outbox may hold in memory, records that are out included.
#[derive(Debug, Clone, Copy)]
pub struct Bounds {
    /// Records.
    pub records: usize,
    /// Bytes of payload.
    pub bytes: usize,
}

/// What the link carries next. It must be settled by its ticket.
#[derive(Debug, Clone)]
pub struct Loan {
    /// Names it in [`Outbox::acked`], [`Outbox::rejected`] and [`Outbox::give_back`].
    pub ticket: i64,
    /// The message.
    pub cargo: Cargo,
}

/// A record, or the announcement of lost ones.
#[derive(Debug, Clone)]
pub enum Cargo {
    /// A record.
    Record(Arc<Record>),
    /// Lost records to announce.
    Gap(Gap),
}

/// The outbox at one instant.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Stats {
    /// Records that came.
    pub pushed: u64,
    /// Records of a former life that were found on disk.
    pub restored: u64,
    /// Acknowledged by the broker.
    pub acked: u64,
    /// Refused by the broker for good, or too large for it.
    pub rejected: u64,
    /// Given up because the outbox was full, or its disk failed.
    pub dropped: u64,
    /// Waiting, in memory or on disk.
    pub queued: u64,
    /// Out, not acknowledged.
    pub in_flight: u64,
    /// Payload bytes of those that wait in memory or are out.
    pub bytes: u64,
    /// Ranges of lost records not announced yet.
    pub gaps: u64,
    /// `dropped`, by camera.
    pub dropped_by_camera: BTreeMap<String, u64>,
    /// Of those that wait or are out, on disk.
    pub spooled: u64,
    /// Bytes of the spool's file that are in use.
    pub spool_bytes: u64,
    /// Why nothing can be written to disk just now.
    pub disk_error: Option<String>,
}

impl Stats {
    /// Whether every record is accounted for.
    pub fn is_exact(&self) -> bool {
        let settled = self.acked + self.rejected + self.dropped;
        self.pushed + self.restored == settled + self.queued + self.in_flight
            && self.dropped == self.dropped_by_camera.values().sum::<u64>()
    }
}

/// What is known of the disk.
struct Disk {
    /// Whether a record may be sent only once it is written.
    always: bool,
    /// When the spooler last finished a turn.
    beat: Instant,
    /// What is in the file and not in memory was given up: it must be read through anew.
    forsaken: bool,
    error: Option<String>,
    bytes: u64,
}

#[derive(Default)]
pub(super) struct State {
    /// By ticket, which is the order in which they came.
    pub(super) front: VecDeque<Entry>,
    pub(super) unread: Unread,
    pub(super) back: VecDeque<Entry>,
    pub(super) gaps: Gaps,
    pub(super) out: BTreeMap<i64, (Cargo, bool)>,
    out_records: usize,
    bytes: usize,
    /// The last ticket that was given.
    pub(super) last_ticket: i64,
    /// The last one of a second ago: what still waits of those has waited for long.
    pub(super) mark: i64,
    /// Tickets of rows that are settled.
    pub(super) erase: Vec<i64>,
    disk: Option<Disk>,
    budget: f64,
    budget_at: Option<Instant>,
    pushed: u64,
    restored: u64,
    acked: u64,
    rejected: u64,
    dropped: BTreeMap<Arc<str>, u64>,
}

/// The bounded queue between the worker and the link. Shared by both, owned by neither.
pub struct Outbox {
    pub(super) bounds: Bounds,
    state: Mutex<State>,
    bell: Notify,
}

impl Outbox {
    /// An empty outbox.
    pub fn new(bounds: Bounds) -> Self {
        Self { bounds, state: Mutex::default(), bell: Notify::new() }
    }

    /// Takes a record, never waiting: when it would be too much, the oldest that waits go.
    pub fn push(&self, record: Record) {
        // Freed after the lock is released.
        let mut given_up = Vec::new();
        let mut state = self.state();
        state.pushed += 1;
        state.budget += 1.0;
        let record = Arc::new(record);
        if record.payload.len() > self.bounds.bytes {
            // It could not be kept even alone: the others need not go for it.
            state.lose(&record, Reason::OutboxFull);
            given_up.push(record);
        } else {
            let ticket = state.ticket();
            state.bytes += record.payload.len();
            state.back.push_back(Entry { ticket, record, stored: false });
            while state.in_memory() > self.bounds.records || state.bytes > self.bounds.bytes {
                let Some(oldest) = state.oldest() else { break };
                state.lose(&oldest.record, Reason::OutboxFull);
                given_up.push(oldest.record);
            }
        }
        drop(state);
        self.bell.notify_one();
    }

    /// The next message in order, announcements first.
    pub fn take(&self) -> Option<Loan> {
        let mut state = self.state();
        let loan = if let Some(gap) = state.gaps.0.pop_front() {
            let loan = Loan { ticket: state.ticket(), cargo: Cargo::Gap(gap) };
            state.out.insert(loan.ticket, (loan.cargo.clone(), false));
            loan
        } else {
            let Entry { ticket, record, stored } = state.next()?;
            state.out_records += 1;
            let loan = Loan { ticket, cargo: Cargo::Record(record) };
            state.out.insert(ticket, (loan.cargo.clone(), stored));
            loan
        };
        Some(loan)
    }

    /// The broker has it.
    pub fn acked(&self, ticket: i64) {
        let mut state = self.state();
        let settled = state.settle(ticket);
        state.acked += u64::from(settled.is_some());
        drop(state);
    }

    /// The broker does not want it, now or later. With a reason, the loss is announced.
    pub fn rejected(&self, ticket: i64, announce: Option<Reason>) {
        let mut state = self.state();
        let settled = state.settle(ticket);
        state.rejected += u64::from(settled.is_some());
        if let (Some(record), Some(reason)) = (&settled, announce) {
            state.gaps.note(record, reason);
        }
        drop(state);
        drop(settled);
    }

    /// The broker does not want it now: it waits again, in its old place.
    pub fn give_back(&self, ticket: i64) {
        let mut state = self.state();
        if let Some((cargo, stored)) = state.out.remove(&ticket) {
            state.put_back(ticket, cargo, stored);
        }
    }

    /// The connection is gone: everything that is out waits again, in its old order.
    pub fn rewind(&self) {
        let mut state = self.state();
        // From the newest, because each goes to the front.
        while let Some((ticket, (cargo, stored))) = state.out.pop_last() {
            state.put_back(ticket, cargo, stored);
        }
    }

    /// Whether nothing waits and nothing is out.
    pub fn is_empty(&self) -> bool {
        let state = self.state();
        state.waiting() == 0 && state.gaps.0.is_empty() && state.out.is_empty()
    }

    /// All counters, of one instant.
    pub fn stats(&self) -> Stats {
        let state = self.state();
        let disk = state.disk.as_ref();
        Stats {
            pushed: state.pushed,
            restored: state.restored,
            acked: state.acked,
            rejected: state.rejected,
            dropped: state.dropped.values().sum(),
            queued: state.waiting(),
            in_flight: state.out_records as u64,
            bytes: state.bytes as u64,
            gaps: (state.gaps.0.len() + state.out.len() - state.out_records) as u64,
            dropped_by_camera: state.dropped.iter().map(|(c, n)| (c.to_string(), *n)).collect(),
            spooled: state.stored(),
            spool_bytes: disk.map_or(0, |d| d.bytes),
            disk_error: disk.and_then(Disk::trouble),
        }
    }

    /// Resolves when something came since it last did. For the link alone.
    pub async fn rung(&self) {
        self.bell.notified().await;
    }

    pub(super) fn ring(&self) {
        self.bell.notify_one();
    }

    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("nothing panics while it holds the outbox")
    }
}

impl Disk {
    fn is_stuck(&self) -> bool {
        self.beat.elapsed() > STUCK
    }

    fn trouble(&self) -> Option<String> {
        let stuck = || format!("does not answer for {} s", self.beat.elapsed().as_secs());
        if self.is_stuck() { Some(stuck()) } else { self.error.clone() }
    }
}

impl State {
    fn ticket(&mut self) -> i64 {
        self.last_ticket += 1;
        self.last_ticket
    }

    fn waiting(&self) -> u64 {
        (self.front.len() + self.back.len()) as u64 + self.unread.count()
    }

    /// Records on disk that wait or are out.
    pub(super) fn stored(&self) -> u64 {
        let front = self.front.iter().filter(|e| e.stored).count();
        let out = self.out.values().filter(|(_, stored)| *stored).count();
        self.unread.count() + (front + out) as u64
    }

    /// Records in memory, those that are out included.
    pub(super) fn in_memory(&self) -> usize {
        self.front.len() + self.back.len() + self.out_records
    }

    /// Payload bytes of these.
    pub(super) fn bytes_in_memory(&self) -> usize {
        self.bytes
    }

    /// The next to go: what waits on disk alone goes before `back`, as soon as it was read.
    fn next(&mut self) -> Option<Entry> {
        if self.front.is_empty() && self.unread.count() > 0 {
            if !self.disk.as_ref().is_none_or(Disk::is_stuck) {
                return None;
            }
            self.forsake();
        }
        let line = if self.front.is_empty() { &mut self.back } else { &mut self.front };
        let entry = line.front()?;
        let unsafe_yet = self.disk.as_ref().is_some_and(|d| d.always && d.trouble().is_none());
        if !entry.stored && unsafe_yet {
            return None;
        }
        if entry.stored {
            let now = Instant::now();
            let since = self.budget_at.replace(now).map_or(0.0, |at| (now - at).as_secs_f64());
            self.budget = (self.budget + since * DRAIN_PER_S).min(DRAIN_PER_S);
            if self.budget < 1.0 {
                return None;
            }
            self.budget -= 1.0;
        }
        line.pop_front()
    }

    /// Ends a loan and returns the record, if it was one.
    fn settle(&mut self, ticket: i64) -> Option<Arc<Record>> {
        match self.out.remove(&ticket)? {
            (Cargo::Gap(_), _) => None,
            (Cargo::Record(record), stored) => {
                self.out_records -= 1;
                self.bytes -= record.payload.len();
                if stored {
                    self.erase.push(ticket);
                }
                Some(record)
            }
        }
    }

    fn put_back(&mut self, ticket: i64, cargo: Cargo, stored: bool) {
        match cargo {
            Cargo::Gap(gap) => self.gaps.0.push_front(gap),
            Cargo::Record(record) => {
                self.out_records -= 1;
                let place = self.front.partition_point(|e| e.ticket < ticket);
                self.front.insert(place, Entry { ticket, record, stored });
            }
        }
    }

    /// Takes the oldest that waits in memory out of the line.
    fn oldest(&mut self) -> Option<Entry> {
        let entry = self.front.pop_front().or_else(|| self.back.pop_front())?;
        self.bytes -= entry.record.payload.len();
        if entry.stored {
            self.erase.push(entry.ticket);
        }
        Some(entry)
    }

    /// Takes the oldest that waits in memory out of the line, if it is on disk.
    pub(super) fn oldest_stored(&mut self) -> Option<Entry> {
        self.front.front().filter(|e| e.stored)?;
        self.oldest()
    }

    /// Counts and announces a record that is given up.
    pub(super) fn lose(&mut self, record: &Record, reason: Reason) {
        *self.dropped.entry(Arc::clone(&record.camera)).or_default() += 1;
        self.gaps.note(record, reason);
    }

    /// The oldest record that is on disk alone is given up.
    pub(super) fn lose_unread(&mut self, key: Key) {
        let Key { ticket, camera, boot, seq } = key;
        self.unread.remove(&camera, &boot, seq, ticket);
        self.erase.push(ticket);
        let (seq_from, seq_to, count) = (seq, seq, 1);
        self.lose_held(&Held { camera, boot, seq_from, seq_to, count }, Reason::OutboxFull);
    }

    fn lose_held(&mut self, held: &Held, reason: Reason) {
        *self.dropped.entry(Arc::clone(&held.camera)).or_default() += held.count;
        let Held { camera, boot, seq_from, seq_to, count } = held;
        self.gaps.note_range(camera, boot, *seq_from, *seq_to, *count, reason);
    }

    /// Gives up what is on disk alone, and counts on the disk for nothing until it was read anew.
    pub(super) fn forsake(&mut self) {
        for held in self.unread.clear() {
            self.lose_held(&held, Reason::DiskFailed);
        }
        let waiting = self.front.iter_mut().map(|e| (e.ticket, &mut e.stored));
        let out = self.out.iter_mut().map(|(ticket, (_, stored))| (*ticket, stored));
        let stored = waiting.chain(out).filter(|(_, stored)| **stored);
        self.erase.extend(stored.map(|(ticket, stored)| {
            *stored = false;
            ticket
        }));
        if let Some(disk) = &mut self.disk {
            disk.forsaken = true;
        }
    }

    /// Takes over what was found on disk, in front of all that waits. `false`: not while something
    /// is out that came after it.
    pub(super) fn adopt(&mut self, held: Vec<Held>, last: i64, gaps: Vec<Gap>) -> bool {
        if !held.is_empty() && self.out_records > 0 {
            return false;
        }
        self.last_ticket = self.last_ticket.max(last);
        if !held.is_empty() {
            let mut waiting = std::mem::take(&mut self.front);
            waiting.append(&mut self.back);
            for entry in &mut waiting {
                entry.ticket = self.ticket();
            }
            self.back = waiting;
        }
        self.restored += held.iter().map(|h| h.count).sum::<u64>();
        self.unread = Unread::of(held);
        for gap in gaps.into_iter().rev() {
            self.gaps.0.push_front(gap);
        }
        self.mark = 0;
        if let Some(disk) = &mut self.disk {
            disk.forsaken = false;
        }
        true
    }

    /// A record was read back from disk.
    pub(super) fn refill(&mut self, ticket: i64, record: Record) {
        self.unread.remove(&record.camera, &record.boot, record.seq, ticket);
        self.bytes += record.payload.len();
        self.front.push_back(Entry { ticket, record: Arc::new(record), stored: true });
    }

    /// Lets go of a record that is on disk, taken from the end of `back` that is next.
    pub(super) fn leave_on_disk(&mut self, entry: Entry) {
        self.bytes -= entry.record.payload.len();
        self.unread.add(&entry);
    }

    /// There is a spooler from now on.
    pub(super) fn attach(&mut self, always: bool) {
        let (beat, error) = (Instant::now(), None);
        self.disk = Some(Disk { always, beat, forsaken: false, error, bytes: 0 });
    }

    /// The spooler's word after each turn.
    pub(super) fn beat(&mut self, bytes: Option<u64>, error: Option<&str>) {
        let Some(disk) = &mut self.disk else { return };
        disk.beat = Instant::now();
        disk.bytes = bytes.unwrap_or(disk.bytes);
        disk.error = error.map(str::to_owned);
    }

    /// For how long the disk has given no sign.
    pub(super) fn silent(&self) -> Duration {
        self.disk.as_ref().map_or(Duration::ZERO, |disk| disk.beat.elapsed())
    }

    /// Whether the file must be read through anew.
    pub(super) fn is_forsaken(&self) -> bool {
        self.disk.as_ref().is_some_and(|d| d.forsaken)
    }
}
