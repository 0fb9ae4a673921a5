//! The connection to the broker, kept for as long as the service runs.
//!
//! ```text
//!             ┌──────────────► connecting ──refused, silent──► backoff ──┐
//!             │                    │ CONNACK                     ▲       │
//!             │                subscribing ── SUBACK, or none ───┤       │
//!             │                    │                             │       │
//!             │                   live ──── any failure ─────────┘       │
//!             └──────────────────────────────────────────────────────────┘
//!  stop(): live ─► draining (3 s) ─► farewell: `offline` and its PUBACK ─► DISCONNECT ─► stopped
//! ```
//!
//! Everything that is out stays with the outbox until its PUBACK, and goes again after a loss.
//! Packet ids run in a ring as long as the broker's receive maximum; the window is counted from the
//! oldest message that is out, so an id is never used again while it is out, whatever order the
//! broker acknowledges in. SUBSCRIBE shares the ring: nothing is published before its answer.

use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::Receiver;
use tokio::sync::watch;
use tokio::time::{MissedTickBehavior, interval, sleep, timeout};
use tracing::{debug, warn};

use super::backoff::{Backoff, Class, chance};
use super::board::Board;
use super::failure::{self, Failure};
pub use super::inbound::Inbound;
use super::inbound::Sorter;
use super::outbox::Outbox;
use super::session::{End, Session};
use super::status::{LinkState, LinkStatus, StatusCell};
use super::topics::Topics;
use super::wire::{self, Hello};
use crate::config::External;

const TICK: Duration = Duration::from_millis(500);

/// What a link needs to know.
#[derive(Debug, Clone)]
pub struct Settings {
    /// The device's id.
    pub device: String,
    /// Where things go.
    pub topics: Topics,
    /// The broker.
    pub broker: External,
    /// What to subscribe to.
    pub filters: Vec<String>,
}

/// Everyone else's end of a link. Clones are the same link.
#[derive(Clone)]
pub struct LinkHandle {
    status: Arc<StatusCell>,
    stop: Arc<watch::Sender<bool>>,
    inbound: Receiver<Inbound>,
    for_cameras: Receiver<Inbound>,
}

impl LinkHandle {
    /// Asks for a clean stop; [`Link::run`] returns within some 6 s.
    pub fn stop(&self) {
        self.stop.send_replace(true);
    }

    /// The link at this instant.
    pub fn status(&self) -> LinkStatus {
        self.status.read()
    }

    /// The messages that came in, but those for cameras. Clones share them: each goes to one
    /// receiver.
    pub fn inbound(&self) -> Receiver<Inbound> {
        self.inbound.clone()
    }

    /// Those on `cmd/cameras/…`, and on topics that are not this device's.
    pub fn for_cameras(&self) -> Receiver<Inbound> {
        self.for_cameras.clone()
    }
}

/// The link itself, to be run on a Tokio runtime.
pub struct Link {
    pub(super) settings: Settings,
    client_id: String,
    pub(super) outbox: Arc<Outbox>,
    pub(super) board: Arc<Board>,
    pub(super) status: Arc<StatusCell>,
    stop: watch::Receiver<bool>,
    pub(super) sorter: Sorter,
}

impl Link {
    /// A link that connects when it is run.
    pub fn new(settings: Settings, outbox: Arc<Outbox>, board: Arc<Board>) -> (Self, LinkHandle) {
        let client_id = format!("noblink-{}", settings.device);
        let shown = failure::shown(&settings.broker);
        let status = Arc::new(StatusCell::new(shown, client_id.clone()));
        let (sorter, inbound, for_cameras) = Sorter::new(&settings.topics);
        let (stop, stopped) = watch::channel(false);
        let stop = Arc::new(stop);
        let handle = LinkHandle { status: Arc::clone(&status), stop, inbound, for_cameras };
        let link = Self { settings, client_id, outbox, board, status, stop: stopped, sorter };
        (link, handle)
    }

    /// Keeps a connection until it is stopped. Dropped instead, the broker publishes the will.
    pub async fn run(mut self) {
        let mut backoff = Backoff::default();
        let mut last_text = String::new();
        // What a link before this one left out.
        self.outbox.rewind();
        loop {
            self.status.enter(LinkState::Connecting, None);
            let (end, up_for) = self.connect().await;
            // Whatever was out is to go again.
            self.outbox.rewind();
            self.board.offline();
            self.status.update(|s| s.inflight = 0);
            let End::Failed(mut failure) = end else { break };

            let pause = backoff.next(failure.class, up_for, chance());
            if failure.class == Class::Closed && backoff.is_contested() {
                failure.text = failure::contested(&self.settings.broker, &self.client_id);
            }
            self.status.update(|s| {
                s.attempt = backoff.attempts();
                s.last_error = Some(failure.text.clone());
            });
            // The same failure again is no news, unless it worked in between.
            if failure.text == last_text && up_for.is_zero() {
                debug!(attempt = backoff.attempts(), "mqtt: {}", failure.text);
            } else {
                warn!("mqtt: {}; trying again in {:.0} s", failure.text, pause.as_secs_f64());
            }
            last_text = failure.text;
            self.status.enter(LinkState::Backoff, Some(Instant::now() + pause));
            tokio::select! {
                () = sleep(pause) => {}
                () = asked(&mut self.stop) => break,
            }
        }
        self.status.enter(LinkState::Stopped, None);
    }

    /// One connection, from the first packet to the last. Returns how long it was up, too.
    async fn connect(&mut self) -> (End, Duration) {
        let availability = self.settings.topics.availability();
        let hello = Hello {
            broker: &self.settings.broker,
            client_id: &self.client_id,
            availability: &availability,
        };
        let (wire, mut happenings) = match wire::open(&hello) {
            Ok(ends) => ends,
            Err(text) => return (End::Failed(Failure::refused(text)), Duration::ZERO),
        };
        let mut stop = self.stop.clone();
        let mut session = Session::new(self, wire);
        let mut tick = interval(TICK);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let end = loop {
            let next = {
                // Awaited to its end, whatever else wakes this task.
                let mut next = pin!(timeout(session.patience, happenings.next()));
                loop {
                    tokio::select! {
                        next = &mut next => break Ok(next),
                        () = self.outbox.rung() => {}
                        () = self.board.rung() => {}
                        _ = tick.tick() => {}
                        () = asked(&mut stop), if !session.is_stopping() => session.stop(),
                    }
                    if let Some(end) = session.advance() {
                        break Err(end);
                    }
                }
            };
            let end = match next {
                Ok(Ok(Ok(happening))) => session.handle(happening).or_else(|| session.advance()),
                // A stop that was under way needs no connection any more.
                Ok(_) if session.is_stopping() => Some(End::Stopped),
                Ok(Ok(Err(failure))) => Some(End::Failed(failure)),
                Ok(Err(_)) => Some(End::Failed(happenings.silent())),
                Err(end) => Some(end),
            };
            if let Some(end) = end {
                break end;
            }
        };
        (end, session.up_since.map_or(Duration::ZERO, |up| up.elapsed()))
    }
}

/// Resolves once a stop is asked for.
async fn asked(stop: &mut watch::Receiver<bool>) {
    if stop.wait_for(|asked| *asked).await.is_err() {
        // No handle is left that could ask.
        std::future::pending::<()>().await;
    }
}
