//! One connection, from CONNECT to its end: the phases and the window of [`super::link`].
//!
//! Pure but for the wire that it writes to: the link awaits what happens and hands it over.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use tracing::{info, warn};

use super::failure::{self, Failure};
use super::link::Link;
use super::outbox::{Cargo, Reason};
use super::status::{LinkState, Oversize};
use super::wire::{self, Happening, KEEP_ALIVE, UNSENT_MAX, Unsent, Verdict, Welcome, Wire};
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

/// How a connection ended.
pub(super) enum End {
    Stopped,
    Failed(Failure),
}

/// What a QoS 1 message was for.
enum Token {
    /// A loan of the outbox.
    Loan(i64),
    /// A retained message of the board.
    Board(Arc<str>),
    /// A picture: not sent again.
    Picture,
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
pub(super) struct Session<'a> {
    link: &'a Link,
    wire: Wire,
    phase: Phase,
    pub(super) up_since: Option<Instant>,
    /// How long nothing may happen on the wire.
    pub(super) patience: Duration,
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
    pub(super) fn new(link: &'a Link, wire: Wire) -> Self {
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

    pub(super) fn is_stopping(&self) -> bool {
        matches!(self.phase, Phase::Draining(_) | Phase::Farewell(_) | Phase::Leaving(_))
    }

    pub(super) fn stop(&mut self) {
        let now = Instant::now();
        self.phase = match self.phase {
            Phase::Live => Phase::Draining(now + DRAIN_TIMEOUT),
            // Nothing is out, and `online` was never said.
            _ => Phase::Leaving(now),
        };
    }

    /// Does what can be done without waiting, after each event and twice a second.
    pub(super) fn advance(&mut self) -> Option<End> {
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

    /// Submits what the window has room for: state first, it is rare; then records; then
    /// pictures and telemetry.
    fn pump(&mut self, now: Instant) {
        while self.has_room()
            && let Some((topic, payload)) = self.link.board.next_retained()
        {
            let sent = self.wire.publish(&topic, payload.to_vec(), true, self.packet_max);
            match self.submit(&topic, sent, Token::Board(Arc::clone(&topic))) {
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
                let sent = self.wire.publish(&topic, payload, false, self.packet_max);
                let announce = match self.submit(&topic, sent, Token::Loan(loan.ticket)) {
                    Ok(()) => continue,
                    Err(Unsent::NoRoom) => return self.link.outbox.give_back(loan.ticket),
                    Err(Unsent::TooLarge(_)) => Some(Reason::TooLarge),
                    Err(Unsent::NoTopic) => None,
                };
                self.link.outbox.rejected(loan.ticket, announce);
                self.link.status.update(|s| s.rejected += 1);
            }
        }
        while self.has_room()
            && let Some((topic, picture)) = self.link.board.next_picture()
        {
            let sent = self.wire.show(&topic, picture.jpeg, &picture.event, self.packet_max);
            if self.submit(&topic, sent, Token::Picture).is_err() {
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
        let sent = self.wire.publish(&topic, availability.into(), true, self.packet_max);
        let _ = self.submit(&topic, sent, Token::Availability);
    }

    /// Waits for the acknowledgement of a QoS 1 message from now on, if it was handed over.
    fn submit(
        &mut self,
        topic: &str,
        sent: Result<(), Unsent>,
        token: Token,
    ) -> Result<(), Unsent> {
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

    pub(super) fn handle(&mut self, happening: Happening) -> Option<End> {
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
            (Token::Board(_) | Token::Picture | Token::Availability, _) => {}
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
