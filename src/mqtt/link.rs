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

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::Receiver;
use tokio::sync::watch;
use tokio::time::{MissedTickBehavior, interval, sleep, timeout};
use tracing::{debug, info, warn};

use super::backoff::{Backoff, Class, chance};
use super::board::Board;
use super::failure::{self, Failure};
pub use super::inbound::Inbound;
use super::inbound::Sorter;
use super::outbox::{Cargo, Outbox, Reason};
use super::status::{LinkState, LinkStatus, Oversize, StatusCell};
use super::topics::Topics;
use super::wire::{self, Happening, Hello, KEEP_ALIVE, UNSENT_MAX, Unsent, Verdict, Welcome, Wire};
use crate::config::External;

/// AWS IoT Core takes no more in one SUBSCRIBE.
const FILTERS_PER_SUBSCRIBE: usize = 8;
/// Keep-alives in which nothing happens, or an answer does not come, before the peer is given up. In
/// one of them a ping goes out, in the next its answer would have come.
const KEEP_ALIVES: u32 = 2;
/// A broker with a short keep-alive may still be a slow one.
const ANSWER_MIN: Duration = Duration::from_secs(10);
const DRAIN_TIMEOUT: Duration = Duration::from_secs(3);
const FAREWELL_TIMEOUT: Duration = Duration::from_secs(2);
/// First pause after the broker could not take a record just now; doubled up to a minute.
const RETRY_AFTER: Duration = Duration::from_secs(2);
const RETRY_AFTER_MAX: Duration = Duration::from_secs(60);
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

    /// Those on `cmd/cameras/…`.
    pub fn for_cameras(&self) -> Receiver<Inbound> {
        self.for_cameras.clone()
    }
}

/// The link itself, to be run on a Tokio runtime.
pub struct Link {
    settings: Settings,
    client_id: String,
    outbox: Arc<Outbox>,
    board: Arc<Board>,
    status: Arc<StatusCell>,
    stop: watch::Receiver<bool>,
    sorter: Sorter,
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

/// How a connection ended.
enum End {
    Stopped,
    Failed(Failure),
}

/// What a QoS 1 message was for.
enum Token {
    /// A loan of the outbox.
    Loan(i64),
    /// A retained message of the board.
    Board(Arc<str>),
    /// `online` or `offline`.
    Availability,
}

struct Out {
    token: Token,
    at: Instant,
}

/// Where a connection stands, and since or until when.
enum Phase {
    /// No CONNACK yet.
    Connecting,
    /// Since CONNACK, until every SUBSCRIBE is answered: they share the ring of packet ids.
    Subscribing(Instant),
    Live,
    /// Until everything is out and acknowledged.
    Draining(Instant),
    /// Until `offline` is acknowledged.
    Farewell(Instant),
    /// Until DISCONNECT went out.
    Leaving(Instant),
}

/// One connection.
struct Session<'a> {
    link: &'a Link,
    wire: Wire,
    phase: Phase,
    up_since: Option<Instant>,
    /// How long nothing may happen on the wire.
    patience: Duration,
    /// How long an acknowledgement, or the answer to SUBSCRIBE, may take.
    answer: Duration,
    window: u64,
    packet_max: usize,
    /// QoS 1 messages submitted on this connection: the number of the next one.
    next: u64,
    /// Submitted, without a packet id yet; the ids come in this order.
    unnamed: VecDeque<u64>,
    by_packet_id: HashMap<u16, u64>,
    out: BTreeMap<u64, Out>,
    /// QoS 0 messages that did not go out yet.
    unsent: usize,
    /// SUBSCRIBEs without a packet id yet, in order.
    subscribes: VecDeque<Vec<String>>,
    subscribing: HashMap<u16, Vec<String>>,
    paused_until: Option<Instant>,
    pause: Duration,
}

impl<'a> Session<'a> {
    fn new(link: &'a Link, wire: Wire) -> Self {
        Self {
            link,
            wire,
            phase: Phase::Connecting,
            up_since: None,
            patience: KEEP_ALIVES * KEEP_ALIVE,
            answer: KEEP_ALIVES * KEEP_ALIVE,
            window: 0,
            packet_max: 0,
            next: 0,
            unnamed: VecDeque::new(),
            by_packet_id: HashMap::new(),
            out: BTreeMap::new(),
            unsent: 0,
            subscribes: VecDeque::new(),
            subscribing: HashMap::new(),
            paused_until: None,
            pause: RETRY_AFTER,
        }
    }

    fn broker(&self) -> &External {
        &self.link.settings.broker
    }

    fn is_stopping(&self) -> bool {
        matches!(self.phase, Phase::Draining(_) | Phase::Farewell(_) | Phase::Leaving(_))
    }

    fn stop(&mut self) {
        let now = Instant::now();
        self.phase = match self.phase {
            Phase::Live => Phase::Draining(now + DRAIN_TIMEOUT),
            // Nothing is out, and `online` was never said.
            _ => Phase::Leaving(now),
        };
    }

    /// Does what can be done without waiting, after each event and twice a second.
    fn advance(&mut self) -> Option<End> {
        let now = Instant::now();
        match self.phase {
            Phase::Connecting => {}
            Phase::Subscribing(since) => {
                if self.subscribes.is_empty() && self.subscribing.is_empty() {
                    self.phase = Phase::Live;
                    self.say("online");
                    self.link.board.online();
                    self.pump(now);
                } else if now > since + self.answer {
                    return Some(End::Failed(Failure::passing(format!(
                        "{} does not answer SUBSCRIBE",
                        failure::shown(self.broker())
                    ))));
                }
            }
            Phase::Live => {
                self.pump(now);
                let late = self
                    .out
                    .first_key_value()
                    .is_some_and(|(_, o)| now.duration_since(o.at) > self.answer);
                if late {
                    return Some(End::Failed(Failure::passing(format!(
                        "{} has not acknowledged a message for {} s: is it overloaded, or does it \
                         throttle this client?",
                        failure::shown(self.broker()),
                        self.answer.as_secs()
                    ))));
                }
            }
            Phase::Draining(until) => {
                self.pump(now);
                let drained = self.out.is_empty()
                    && self.link.outbox.is_empty()
                    && self.link.board.is_settled();
                if drained || now >= until {
                    self.say("offline");
                    self.phase = Phase::Farewell(now + FAREWELL_TIMEOUT);
                }
            }
            Phase::Farewell(until) => {
                let said = !self.out.values().any(|o| matches!(o.token, Token::Availability));
                if said && self.wire.leave() {
                    self.phase = Phase::Leaving(now + FAREWELL_TIMEOUT);
                } else if now >= until {
                    // Without DISCONNECT the broker says it for us.
                    return Some(End::Stopped);
                }
            }
            Phase::Leaving(until) if now >= until => return Some(End::Stopped),
            Phase::Leaving(_) => {}
        }
        None
    }

    /// Submits what the window has room for: state first, it is rare; then records; then telemetry.
    fn pump(&mut self, now: Instant) {
        while self.has_room()
            && let Some((topic, payload)) = self.link.board.next_retained()
        {
            match self.submit(&topic, payload.to_vec(), true, Token::Board(Arc::clone(&topic))) {
                Ok(()) => {}
                Err(Unsent::NoRoom) => return self.link.board.again(&topic),
                Err(_) => self.link.status.update(|s| s.rejected += 1),
            }
        }
        if self.paused_until.is_none_or(|until| now >= until) {
            self.paused_until = None;
            while self.has_room()
                && let Some(loan) = self.link.outbox.take()
            {
                let (topic, payload) = match &loan.cargo {
                    Cargo::Record(r) => (Arc::clone(&r.topic), r.payload.clone()),
                    Cargo::Gap(gap) => {
                        let s = &self.link.settings;
                        (s.topics.gaps(&gap.camera), gap.to_json(&s.device))
                    }
                };
                let announce = match self.submit(&topic, payload, false, Token::Loan(loan.ticket)) {
                    Ok(()) => continue,
                    Err(Unsent::NoRoom) => return self.link.outbox.give_back(loan.ticket),
                    Err(Unsent::TooLarge(_)) => Some(Reason::TooLarge),
                    Err(Unsent::NoTopic) => None,
                };
                self.link.outbox.rejected(loan.ticket, announce);
                self.link.status.update(|s| s.rejected += 1);
            }
        }
        while self.unsent < UNSENT_MAX
            && let Some((topic, payload)) = self.link.board.next_telemetry()
        {
            let sent = self.wire.tell(&topic, payload.to_vec(), self.packet_max);
            self.note(&topic, &sent);
            self.unsent += usize::from(sent.is_ok());
        }
    }

    /// Whether one more message keeps the packet ids that are out apart.
    fn has_room(&self) -> bool {
        let oldest = self.out.first_key_value().map_or(self.next, |(n, _)| *n);
        self.next - oldest < self.window
    }

    fn say(&mut self, availability: &str) {
        let topic = self.link.settings.topics.availability();
        // Small, and the channel has room to spare for it.
        let _ = self.submit(&topic, availability.into(), true, Token::Availability);
    }

    /// Hands a QoS 1 message over and waits for its acknowledgement from now on.
    fn submit(
        &mut self,
        topic: &str,
        payload: Vec<u8>,
        retain: bool,
        token: Token,
    ) -> Result<(), Unsent> {
        let sent = self.wire.publish(topic, payload, retain, self.packet_max);
        self.note(topic, &sent);
        sent?;
        self.out.insert(self.next, Out { token, at: Instant::now() });
        self.unnamed.push_back(self.next);
        self.next += 1;
        let inflight = self.out.len() as u64;
        self.link.status.update(|s| {
            s.published += 1;
            s.inflight = inflight;
        });
        Ok(())
    }

    /// Says what will never be sent.
    fn note(&self, topic: &str, sent: &Result<(), Unsent>) {
        match *sent {
            Err(Unsent::TooLarge(size_bytes)) => {
                let limit_bytes = self.packet_max;
                warn!("mqtt: {topic}: a packet of {size_bytes} bytes, the limit is {limit_bytes}");
                let over = Oversize { topic: topic.to_owned(), size_bytes, limit_bytes };
                self.link.status.update(|s| s.oversize = Some(over));
            }
            Err(Unsent::NoTopic) => warn!("mqtt: \"{topic}\" is no topic to publish to"),
            Ok(()) | Err(Unsent::NoRoom) => {}
        }
    }

    fn handle(&mut self, happening: Happening) -> Option<End> {
        match happening {
            Happening::Welcome(welcome) => self.welcomed(&welcome),
            Happening::Named(id) => {
                if let Some(number) = self.unnamed.pop_front() {
                    self.by_packet_id.insert(id, number);
                }
            }
            Happening::Settled(id, verdict) => self.settled(id, verdict),
            Happening::Told => self.unsent = self.unsent.saturating_sub(1),
            Happening::Subscribing(id) => {
                if let Some(filters) = self.subscribes.pop_front() {
                    self.subscribing.insert(id, filters);
                }
            }
            Happening::Subscribed(id, answers) => {
                let filters = self.subscribing.remove(&id).unwrap_or_default();
                for (filter, answer) in filters.iter().zip(answers) {
                    if let Some(wrong) = answer {
                        self.refuse(filter, &format!("is refused by the broker: {wrong}"));
                    }
                }
            }
            Happening::Message(message) => {
                let lost = u64::from(!self.link.sorter.sort(message));
                self.link.status.update(|s| {
                    s.inbound += 1;
                    s.inbound_dropped += lost;
                });
            }
            Happening::Left => return Some(End::Stopped),
            Happening::Nothing => {}
        }
        None
    }

    fn welcomed(&mut self, welcome: &Welcome) {
        self.window = welcome.window.into();
        self.packet_max = welcome.packet_max;
        self.patience = KEEP_ALIVES * welcome.keep_alive;
        self.answer = self.patience.clamp(ANSWER_MIN, KEEP_ALIVES * KEEP_ALIVE);
        let now = Instant::now();
        self.up_since = Some(now);
        self.phase = Phase::Subscribing(now);
        self.link.status.enter(LinkState::Connected, None);
        self.link.status.update(|s| {
            s.connects += 1;
            s.session_present = welcome.session_present;
            s.window = welcome.window;
            s.max_packet_bytes = welcome.packet_max;
            s.refused_filters.clear();
        });
        info!(
            window = welcome.window,
            packet_max = welcome.packet_max,
            session_present = welcome.session_present,
            "mqtt: connected to {}",
            failure::shown(self.broker())
        );
        self.subscribe();
    }

    fn subscribe(&mut self) {
        let (valid, invalid): (Vec<_>, Vec<_>) =
            self.link.settings.filters.iter().cloned().partition(|f| wire::is_filter(f));
        for filter in invalid {
            self.refuse(&filter, "is no topic filter");
        }
        for filters in valid.chunks(FILTERS_PER_SUBSCRIBE) {
            if self.wire.subscribe(filters) {
                self.subscribes.push_back(filters.to_vec());
            } else {
                filters.iter().for_each(|f| self.refuse(f, "was not sent: too many filters"));
            }
        }
    }

    fn refuse(&self, filter: &str, why: &str) {
        let text = format!("{filter} {why}");
        warn!("mqtt: subscription {text}");
        self.link.status.update(|s| s.refused_filters.push(text));
    }

    fn settled(&mut self, id: u16, verdict: Verdict) {
        let number = self.by_packet_id.remove(&id);
        let Some(out) = number.and_then(|n| self.out.remove(&n)) else { return };
        let outbox = &self.link.outbox;
        match (&out.token, &verdict) {
            (Token::Loan(ticket), Verdict::Taken) => {
                outbox.acked(*ticket);
                self.pause = RETRY_AFTER;
            }
            (Token::Loan(ticket), Verdict::Later(_)) => {
                outbox.give_back(*ticket);
                if self.paused_until.is_none() {
                    self.paused_until = Some(Instant::now() + self.pause);
                    self.pause = (self.pause * 2).min(RETRY_AFTER_MAX);
                }
            }
            (Token::Loan(ticket), Verdict::Never(_)) => outbox.rejected(*ticket, None),
            (Token::Board(topic), Verdict::Later(_)) => self.link.board.again(topic),
            (Token::Board(_) | Token::Availability, _) => {}
        }
        let inflight = self.out.len() as u64;
        self.link.status.update(|s| {
            s.inflight = inflight;
            match verdict {
                Verdict::Taken => s.acked += 1,
                Verdict::Later(why) => {
                    s.last_error = Some(format!(
                        "the broker can't take a message now: {why}; it will be sent again"
                    ));
                }
                Verdict::Never(why) => {
                    s.rejected += 1;
                    s.last_error = Some(format!("the broker refuses a message: {why}"));
                }
            }
        });
    }
}
