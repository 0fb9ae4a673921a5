//! The state of the link, as it stands in the device's status and on the page.

use std::sync::{Mutex, MutexGuard};
use std::time::Instant;

use serde::Serialize;

/// What the link does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum LinkState {
    /// Waits for the broker's answer.
    Connecting,
    /// The broker has answered.
    Connected,
    /// Waits before the next attempt.
    Backoff,
    /// Ended.
    Stopped,
}

/// A message that was not sent because the broker would not take a packet of its size.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Oversize {
    /// Where it should have gone.
    pub topic: String,
    /// Size of its packet.
    pub size_bytes: usize,
    /// Largest packet that the broker or noblink allows.
    pub limit_bytes: usize,
}

/// The link at one instant. Counters run since the process started.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct LinkStatus {
    /// What it does.
    pub state: LinkState,
    /// Since when, microseconds since 1970.
    pub since_us: i64,
    /// The broker, without secrets.
    pub broker: String,
    /// The name it uses there.
    pub client_id: String,
    /// Connections that came up.
    pub connects: u64,
    /// Failures in a row.
    pub attempt: u32,
    /// Seconds to the next attempt.
    pub retry_in_s: Option<f64>,
    /// What last went wrong, and what helps.
    pub last_error: Option<String>,
    /// Whether the broker still knew the last session.
    pub session_present: bool,
    /// QoS 1 messages that may be out at once.
    pub window: u16,
    /// Largest packet that may be sent.
    pub max_packet_bytes: usize,
    /// QoS 1 messages handed to the connection.
    pub published: u64,
    /// Acknowledged.
    pub acked: u64,
    /// Refused by the broker, or too large for it.
    pub rejected: u64,
    /// Out, not acknowledged.
    pub inflight: u64,
    /// The last message that was too large.
    pub oversize: Option<Oversize>,
    /// Filters that the broker refused, each with its reason.
    pub refused_filters: Vec<String>,
    /// Messages that came in.
    pub inbound: u64,
    /// Of those, thrown away because nobody took them in time.
    pub inbound_dropped: u64,
}

/// The status that the link writes and everyone reads.
pub struct StatusCell {
    inner: Mutex<(LinkStatus, Option<Instant>)>,
}

impl StatusCell {
    /// A link that has not started.
    pub fn new(broker: String, client_id: String) -> Self {
        let status = LinkStatus {
            state: LinkState::Connecting,
            since_us: now_us(),
            broker,
            client_id,
            connects: 0,
            attempt: 0,
            retry_in_s: None,
            last_error: None,
            session_present: false,
            window: 0,
            max_packet_bytes: 0,
            published: 0,
            acked: 0,
            rejected: 0,
            inflight: 0,
            oversize: None,
            refused_filters: Vec::new(),
            inbound: 0,
            inbound_dropped: 0,
        };
        Self { inner: Mutex::new((status, None)) }
    }

    /// A copy of this instant.
    pub fn read(&self) -> LinkStatus {
        let inner = self.lock();
        let mut status = inner.0.clone();
        status.retry_in_s =
            inner.1.map(|at| at.saturating_duration_since(Instant::now()).as_secs_f64());
        status
    }

    /// Changes it in place.
    pub fn update(&self, change: impl FnOnce(&mut LinkStatus)) {
        change(&mut self.lock().0);
    }

    /// Enters a state; `retry_at` goes with a back-off.
    pub fn enter(&self, state: LinkState, retry_at: Option<Instant>) {
        let mut inner = self.lock();
        inner.0.state = state;
        inner.0.since_us = now_us();
        inner.1 = retry_at;
    }

    fn lock(&self) -> MutexGuard<'_, (LinkStatus, Option<Instant>)> {
        self.inner.lock().expect("nothing panics while it holds the status")
    }
}

fn now_us() -> i64 {
    jiff::Timestamp::now().as_microsecond()
}
