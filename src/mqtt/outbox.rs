//! The records on their way to the broker, oldest first.
//!
//! The worker pushes, the link takes; a record leaves only when the broker has acknowledged or
//! refused it. Whatever is out when a connection ends is put back in front, in its old order:
//! delivery is at least once, and consumers tell a repeat by (device, camera, boot, seq). At every
//! instant
//!
//! ```text
//! pushed = acked + rejected + dropped + queued + in_flight
//! ```
//!
//! Full, it gives up the oldest record that is not out, counts it by camera and remembers the range
//! of `seq`; the link announces that range before anything else.
//!
//! All of it is memory: a stop or a power cut loses what waits. What outlives them belongs behind
//! this same interface: a spool would take over `queued` from its old end and nothing outside this
//! file would notice. `push` must stay what it is, a short lock and no I/O.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard};

use serde::Serialize;
use tokio::sync::Notify;

/// Announcements that wait at most; beyond it ranges of the same camera are joined.
const GAPS_MAX: usize = 256;

/// One message that must arrive.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// The camera's id; empty for what belongs to none, whose loss is counted and not announced.
    pub camera: Arc<str>,
    /// Its position in what this camera published since the process started.
    pub seq: u64,
    /// Where it goes.
    pub topic: Arc<str>,
    /// What goes there.
    pub payload: Vec<u8>,
}

/// What the outbox may hold, records that are out included.
#[derive(Debug, Clone, Copy)]
pub struct Bounds {
    /// Records.
    pub records: usize,
    /// Bytes of payload.
    pub bytes: usize,
}

/// Why records were lost.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Reason {
    /// The outbox was full.
    OutboxFull,
    /// The broker takes no packet of that size.
    TooLarge,
}

/// Records of one camera that were lost: `count` of those from `seq_from` to `seq_to`, which is all
/// of them unless more ranges waited than are kept apart.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Gap {
    /// The camera's id.
    pub camera: Arc<str>,
    /// First lost.
    pub seq_from: u64,
    /// Last lost.
    pub seq_to: u64,
    /// How many.
    pub count: u64,
    /// Why.
    pub reason: Reason,
    /// When the first of them was lost, microseconds since 1970.
    pub time_us: i64,
}

impl Gap {
    /// The announcement, `noblink.gaps/1`.
    pub fn to_json(&self, device: &str, boot: &str) -> Vec<u8> {
        #[derive(Serialize)]
        struct Announcement<'a> {
            schema: &'static str,
            device: &'a str,
            camera: &'a str,
            boot: &'a str,
            time: String,
            time_us: i64,
            seq_from: u64,
            seq_to: u64,
            count: u64,
            reason: Reason,
        }
        let time = jiff::Timestamp::from_microsecond(self.time_us).unwrap_or_default();
        let announcement = Announcement {
            schema: "noblink.gaps/1",
            device,
            camera: &self.camera,
            boot,
            time: format!("{time:.6}"),
            time_us: self.time_us,
            seq_from: self.seq_from,
            seq_to: self.seq_to,
            count: self.count,
            reason: self.reason,
        };
        serde_json::to_vec(&announcement).expect("numbers and strings become JSON")
    }
}

/// What the link carries next. It must be settled by its ticket.
#[derive(Debug, Clone)]
pub struct Loan {
    /// Names it in [`Outbox::acked`], [`Outbox::rejected`] and [`Outbox::give_back`].
    pub ticket: u64,
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
    /// Acknowledged by the broker.
    pub acked: u64,
    /// Refused by the broker for good, or too large for it.
    pub rejected: u64,
    /// Given up because the outbox was full.
    pub dropped: u64,
    /// Waiting.
    pub queued: u64,
    /// Out, not acknowledged.
    pub in_flight: u64,
    /// Payload bytes of those that wait or are out.
    pub bytes: u64,
    /// Ranges of lost records not announced yet.
    pub gaps: u64,
    /// `dropped`, by camera.
    pub dropped_by_camera: BTreeMap<String, u64>,
}

impl Stats {
    /// Whether every record is accounted for.
    pub fn is_exact(&self) -> bool {
        self.pushed == self.acked + self.rejected + self.dropped + self.queued + self.in_flight
            && self.dropped == self.dropped_by_camera.values().sum::<u64>()
    }
}

#[derive(Default)]
struct State {
    /// By ticket, which is the order in which they came.
    queued: VecDeque<(u64, Arc<Record>)>,
    gaps: VecDeque<Gap>,
    out: BTreeMap<u64, Cargo>,
    out_records: usize,
    bytes: usize,
    next_ticket: u64,
    pushed: u64,
    acked: u64,
    rejected: u64,
    dropped: BTreeMap<Arc<str>, u64>,
}

/// The bounded queue between the worker and the link. Shared by both, owned by neither.
pub struct Outbox {
    bounds: Bounds,
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
        if record.payload.len() > self.bounds.bytes {
            // It could not be kept even alone: the others need not go for it.
            state.drop_full(&record);
            given_up.push(Arc::new(record));
        } else {
            let ticket = state.ticket();
            state.bytes += record.payload.len();
            state.queued.push_back((ticket, Arc::new(record)));
            while state.queued.len() + state.out_records > self.bounds.records
                || state.bytes > self.bounds.bytes
            {
                let Some((_, oldest)) = state.queued.pop_front() else { break };
                state.bytes -= oldest.payload.len();
                state.drop_full(&oldest);
                given_up.push(oldest);
            }
        }
        drop(state);
        self.bell.notify_one();
    }

    /// The next message in order, announcements first.
    pub fn take(&self) -> Option<Loan> {
        let mut state = self.state();
        let loan = if let Some(gap) = state.gaps.pop_front() {
            Loan { ticket: state.ticket(), cargo: Cargo::Gap(gap) }
        } else {
            let (ticket, record) = state.queued.pop_front()?;
            state.out_records += 1;
            Loan { ticket, cargo: Cargo::Record(record) }
        };
        state.out.insert(loan.ticket, loan.cargo.clone());
        Some(loan)
    }

    /// The broker has it.
    pub fn acked(&self, ticket: u64) {
        let mut state = self.state();
        let settled = state.settle(ticket);
        state.acked += u64::from(settled.is_some());
        drop(state);
    }

    /// The broker does not want it, now or later. With a reason, the loss is announced.
    pub fn rejected(&self, ticket: u64, announce: Option<Reason>) {
        let mut state = self.state();
        let settled = state.settle(ticket);
        state.rejected += u64::from(settled.is_some());
        if let (Some(record), Some(reason)) = (&settled, announce) {
            state.remember(record, reason);
        }
        drop(state);
        drop(settled);
    }

    /// The broker does not want it now: it waits again, in its old place.
    pub fn give_back(&self, ticket: u64) {
        let mut state = self.state();
        if let Some(cargo) = state.out.remove(&ticket) {
            state.put_back(ticket, cargo);
        }
    }

    /// The connection is gone: everything that is out waits again, in its old order.
    pub fn rewind(&self) {
        let mut state = self.state();
        // From the newest, because each goes to the front.
        while let Some((ticket, cargo)) = state.out.pop_last() {
            state.put_back(ticket, cargo);
        }
    }

    /// Whether nothing waits and nothing is out.
    pub fn is_empty(&self) -> bool {
        let state = self.state();
        state.queued.is_empty() && state.gaps.is_empty() && state.out.is_empty()
    }

    /// All counters, of one instant.
    pub fn stats(&self) -> Stats {
        let state = self.state();
        Stats {
            pushed: state.pushed,
            acked: state.acked,
            rejected: state.rejected,
            dropped: state.dropped.values().sum(),
            queued: state.queued.len() as u64,
            in_flight: state.out_records as u64,
            bytes: state.bytes as u64,
            gaps: (state.gaps.len() + state.out.len() - state.out_records) as u64,
            dropped_by_camera: state.dropped.iter().map(|(c, n)| (c.to_string(), *n)).collect(),
        }
    }

    /// Resolves when something came since it last did. For the link alone.
    pub async fn rung(&self) {
        self.bell.notified().await;
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("nothing panics while it holds the outbox")
    }
}

impl State {
    fn ticket(&mut self) -> u64 {
        self.next_ticket += 1;
        self.next_ticket
    }

    /// Ends a loan and returns the record, if it was one.
    fn settle(&mut self, ticket: u64) -> Option<Arc<Record>> {
        match self.out.remove(&ticket)? {
            Cargo::Gap(_) => None,
            Cargo::Record(record) => {
                self.out_records -= 1;
                self.bytes -= record.payload.len();
                Some(record)
            }
        }
    }

    fn put_back(&mut self, ticket: u64, cargo: Cargo) {
        match cargo {
            Cargo::Gap(gap) => self.gaps.push_front(gap),
            Cargo::Record(record) => {
                self.out_records -= 1;
                let place = self.queued.partition_point(|(t, _)| *t < ticket);
                self.queued.insert(place, (ticket, record));
            }
        }
    }

    fn drop_full(&mut self, record: &Record) {
        *self.dropped.entry(Arc::clone(&record.camera)).or_default() += 1;
        self.remember(record, Reason::OutboxFull);
    }

    fn remember(&mut self, record: &Record, reason: Reason) {
        if record.camera.is_empty() {
            return;
        }
        let crowded = self.gaps.len() >= GAPS_MAX;
        let known = self.gaps.iter_mut().rev().find(|g| {
            g.camera == record.camera
                && g.reason == reason
                && (crowded || g.seq_to.checked_add(1) == Some(record.seq))
        });
        if let Some(gap) = known {
            gap.seq_from = gap.seq_from.min(record.seq);
            gap.seq_to = gap.seq_to.max(record.seq);
            gap.count += 1;
            return;
        }
        self.gaps.push_back(Gap {
            camera: Arc::clone(&record.camera),
            seq_from: record.seq,
            seq_to: record.seq,
            count: 1,
            reason,
            time_us: jiff::Timestamp::now().as_microsecond(),
        });
    }
}
