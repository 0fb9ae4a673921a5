//! The connection to the broker. The only file that names rumqttc.
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
//! One connection is one fresh event loop, and its options are built anew: rumqttc loses what it
//! holds when the broker lost the session, keeps a collision across reconnects, and lets the server
//! overwrite its options. So nothing is left to it. Everything out stays with the outbox until its
//! PUBACK, and comes again after a loss. Packet ids run in a ring as long as the broker's receive
//! maximum; the window is counted from the oldest message that is out, so an id is never reused
//! while it is out, whatever order the broker acknowledges in.
//!
//! `poll()` is never cancelled but to end the connection (it may lose a packet then), and nothing
//! here waits for room in rumqttc's channel: it has room for the window by construction.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, TrySendError, bounded};
use rumqttc::v5::mqttbytes::v5::{
    ConnAck, ConnectReturnCode, DisconnectReasonCode, Filter, LastWill, LastWillProperties, Packet,
    PubAck, PubAckReason, Publish, SubAck, SubscribeReasonCode,
};
use rumqttc::v5::mqttbytes::{Error as CodecError, QoS, valid_filter, valid_topic};
use rumqttc::v5::{AsyncClient, ConnectionError, Event, EventLoop, MqttOptions, StateError};
use rumqttc::{NetworkOptions, Outgoing, TlsConfiguration, TlsError, Transport};
use tokio::sync::watch;
use tokio::time::{MissedTickBehavior, interval, sleep, timeout};
use tracing::{debug, info, warn};

use super::backoff::{Backoff, Class, chance};
use super::board::Board;
use super::failure::{self, Failure, Refusal};
use super::outbox::{Cargo, Outbox, Reason};
use super::status::{LinkState, LinkStatus, Oversize, StatusCell};
use super::tls;
use super::topics::Topics;
use crate::config::External;

const KEEP_ALIVE: Duration = Duration::from_secs(15);
/// TCP, TLS and CONNACK together.
const CONNECT_TIMEOUT_S: u64 = 5;
const SESSION_EXPIRY_S: u32 = 3600;
/// Short blips do not show as `offline`.
const WILL_DELAY_S: u32 = 5;
/// QoS 1 messages out at once, whatever the broker allows: it bounds what is sent again.
const WINDOW_MAX: u16 = 64;
/// QoS 0 messages that wait for the socket; more are thrown away.
const UNSENT_MAX: usize = 8;
/// Room for the window, the subscriptions, the unsent and DISCONNECT.
const CHANNEL: usize = WINDOW_MAX as usize + UNSENT_MAX + 8;
/// Incoming packets; told to the broker, which then must not send more.
const PACKET_IN_MAX: u32 = 128 * 1024;
/// Outgoing packets, where the broker allows more: a larger one blocks all behind it.
const PACKET_OUT_MAX: usize = 1024 * 1024;
/// AWS IoT Core takes no more in one SUBSCRIBE.
const FILTERS_PER_SUBSCRIBE: usize = 8;
const INBOUND_MAX: usize = 256;
/// An acknowledgement, or the answer to SUBSCRIBE, that takes longer will not come.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);
const DRAIN_TIMEOUT: Duration = Duration::from_secs(3);
const FAREWELL_TIMEOUT: Duration = Duration::from_secs(2);
/// First pause after the broker could not take a record just now; doubled up to a minute.
const RETRY_AFTER: Duration = Duration::from_secs(2);
const TICK: Duration = Duration::from_millis(500);

/// What a link needs to know.
#[derive(Debug, Clone)]
pub struct Settings {
    /// The device's id.
    pub device: String,
    /// This life of the process, for announcements of lost records.
    pub boot: Arc<str>,
    /// Where things go.
    pub topics: Topics,
    /// The broker.
    pub broker: External,
    /// What to subscribe to.
    pub filters: Vec<String>,
}

/// A message that came in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Inbound {
    /// Its topic.
    pub topic: String,
    /// Its payload.
    pub payload: Vec<u8>,
    /// Whether the broker had kept it.
    pub retained: bool,
    /// Where the sender wants its answer.
    pub response_topic: Option<String>,
    /// What the sender wants to find in its answer.
    pub correlation: Option<Vec<u8>>,
}

/// Everyone else's end of a link. Clones are the same link.
#[derive(Clone)]
pub struct LinkHandle {
    status: Arc<StatusCell>,
    stop: Arc<watch::Sender<bool>>,
    inbound: Receiver<Inbound>,
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

    /// The messages that came in. Clones share them: each goes to one receiver.
    pub fn inbound(&self) -> Receiver<Inbound> {
        self.inbound.clone()
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
    inbound: Sender<Inbound>,
}

impl Link {
    /// A link that connects when it is run.
    pub fn new(settings: Settings, outbox: Arc<Outbox>, board: Arc<Board>) -> (Self, LinkHandle) {
        let client_id = format!("noblink-{}", settings.device);
        let shown = failure::shown(&settings.broker);
        let status = Arc::new(StatusCell::new(shown, client_id.clone()));
        let (sender, receiver) = bounded(INBOUND_MAX);
        let (stop, stopped) = watch::channel(false);
        let stop = Arc::new(stop);
        let handle = LinkHandle { status: Arc::clone(&status), stop, inbound: receiver };
        let link =
            Self { settings, client_id, outbox, board, status, stop: stopped, inbound: sender };
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
            // The same failure again is no news.
            if failure.text == last_text {
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
        let options = match self.options() {
            Ok(options) => options,
            Err(text) => return (End::Failed(Failure::refused(text)), Duration::ZERO),
        };
        let (client, mut events) = AsyncClient::new(options, CHANNEL);
        let mut stop = self.stop.clone();
        let mut session = Session::new(self, client);
        let mut tick = interval(TICK);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let end = loop {
            let event = {
                let mut poll = pin!(timeout(session.patience, events.poll()));
                loop {
                    tokio::select! {
                        event = &mut poll => break Ok(event),
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
            let event = match event {
                Ok(Ok(Ok(event))) => event,
                Ok(Ok(Err(error))) => break session.lost(&error),
                Ok(Err(_)) => break End::Failed(session.silent()),
                Err(end) => break end,
            };
            if let Some(end) = session.handle(event, &mut events).or_else(|| session.advance()) {
                break end;
            }
        };
        (end, session.up_since.map_or(Duration::ZERO, |up| up.elapsed()))
    }

    /// Everything that CONNECT says, with password and certificates as they are now.
    fn options(&self) -> Result<MqttOptions, String> {
        let broker = &self.settings.broker;
        let mut options = MqttOptions::new(&self.client_id, &broker.host, broker.port);
        options
            .set_keep_alive(KEEP_ALIVE)
            .set_clean_start(false)
            .set_session_expiry_interval(Some(SESSION_EXPIRY_S))
            .set_max_packet_size(Some(PACKET_IN_MAX))
            .set_connection_timeout(CONNECT_TIMEOUT_S)
            .set_outgoing_inflight_upper_limit(WINDOW_MAX);
        let mut network = NetworkOptions::new();
        network.set_tcp_nodelay(true);
        options.set_network_options(network);
        let delayed = LastWillProperties {
            delay_interval: Some(WILL_DELAY_S),
            payload_format_indicator: None,
            message_expiry_interval: None,
            content_type: None,
            response_topic: None,
            correlation_data: None,
            user_properties: Vec::new(),
        };
        let availability = self.settings.topics.availability();
        options.set_last_will(LastWill::new(
            &*availability,
            "offline",
            QoS::AtLeastOnce,
            true,
            Some(delayed),
        ));
        if let Some(username) = &broker.username {
            let password = match &broker.password_file {
                None => String::new(),
                Some(file) => std::fs::read_to_string(file)
                    .map_err(|e| format!("password_file {} can't be read: {e}", file.display()))?,
            };
            options.set_credentials(username, password.trim_end_matches(['\r', '\n']));
        }
        if broker.tls {
            let config = tls::client_config(broker)?;
            options.set_transport(Transport::Tls(TlsConfiguration::Rustls(config)));
        }
        Ok(options)
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
    Loan(u64),
    /// A retained message of the board.
    Board(Arc<str>),
    /// `online` or `offline`.
    Availability,
}

struct Out {
    token: Token,
    at: Instant,
}

/// Why a message was not handed over.
enum Unsent {
    TooLarge,
    NoTopic,
    /// rumqttc's channel is full: not by what is in the window.
    NoRoom,
}

enum Phase {
    /// No CONNACK yet.
    Connecting,
    /// Until the answer to every SUBSCRIBE: they share the ring of packet ids.
    Subscribing {
        since: Instant,
    },
    Live,
    Draining {
        until: Instant,
    },
    /// `offline` is out.
    Farewell {
        until: Instant,
    },
    /// DISCONNECT is on its way.
    Leaving {
        until: Instant,
    },
}

/// One connection.
struct Session<'a> {
    link: &'a Link,
    client: AsyncClient,
    phase: Phase,
    up_since: Option<Instant>,
    /// How long `poll()` may be silent: two keep-alives, during which it pings.
    patience: Duration,
    window: u64,
    packet_max: usize,
    /// QoS 1 messages submitted on this connection: the number of the next one.
    next: u64,
    /// Submitted, without a packet id yet. rumqttc gives ids in this order.
    unnamed: VecDeque<u64>,
    by_packet_id: HashMap<u16, u64>,
    out: BTreeMap<u64, Out>,
    /// QoS 0 messages in rumqttc's channel.
    unsent: usize,
    /// SUBSCRIBEs without a packet id yet, in order.
    subscribes: VecDeque<Vec<String>>,
    subscribing: HashMap<u16, Vec<String>>,
    paused_until: Option<Instant>,
    pause: Duration,
}

impl<'a> Session<'a> {
    fn new(link: &'a Link, client: AsyncClient) -> Self {
        Self {
            link,
            client,
            phase: Phase::Connecting,
            up_since: None,
            patience: 2 * KEEP_ALIVE + Duration::from_secs(CONNECT_TIMEOUT_S),
            window: 0,
            packet_max: PACKET_OUT_MAX,
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
        matches!(
            self.phase,
            Phase::Draining { .. } | Phase::Farewell { .. } | Phase::Leaving { .. }
        )
    }

    fn stop(&mut self) {
        let now = Instant::now();
        self.phase = match self.phase {
            Phase::Live => Phase::Draining { until: now + DRAIN_TIMEOUT },
            // Nothing is out, and `online` was never said.
            _ => Phase::Leaving { until: now },
        };
    }

    /// Does what can be done without waiting, after each event and twice a second.
    fn advance(&mut self) -> Option<End> {
        let now = Instant::now();
        match self.phase {
            Phase::Connecting => {}
            Phase::Subscribing { since } => {
                if self.subscribes.is_empty() && self.subscribing.is_empty() {
                    self.phase = Phase::Live;
                    self.say("online");
                    self.link.board.online();
                    self.pump(now);
                } else if now > since + ANSWER_TIMEOUT {
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
                    .is_some_and(|(_, o)| now.duration_since(o.at) > ANSWER_TIMEOUT);
                if late {
                    return Some(End::Failed(Failure::passing(format!(
                        "{} has not acknowledged a message for {} s: is it overloaded, or does it \
                         throttle this client?",
                        failure::shown(self.broker()),
                        ANSWER_TIMEOUT.as_secs()
                    ))));
                }
            }
            Phase::Draining { until } => {
                self.pump(now);
                let drained = self.out.is_empty()
                    && self.link.outbox.is_empty()
                    && self.link.board.is_settled();
                if drained || now >= until {
                    self.say("offline");
                    self.phase = Phase::Farewell { until: now + FAREWELL_TIMEOUT };
                }
            }
            Phase::Farewell { until } => {
                let said = !self.out.values().any(|o| matches!(o.token, Token::Availability));
                if said && self.client.try_disconnect().is_ok() {
                    self.phase = Phase::Leaving { until: now + FAREWELL_TIMEOUT };
                } else if now >= until {
                    // Without DISCONNECT the broker says it for us.
                    return Some(End::Stopped);
                }
            }
            Phase::Leaving { until } if now >= until => return Some(End::Stopped),
            Phase::Leaving { .. } => {}
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
                        (s.topics.gaps(&gap.camera), gap.to_json(&s.device, &s.boot))
                    }
                };
                let announce = match self.submit(&topic, payload, false, Token::Loan(loan.ticket)) {
                    Ok(()) => continue,
                    Err(Unsent::NoRoom) => return self.link.outbox.give_back(loan.ticket),
                    Err(Unsent::TooLarge) => Some(Reason::TooLarge),
                    Err(Unsent::NoTopic) => None,
                };
                self.link.outbox.rejected(loan.ticket, announce);
                self.link.status.update(|s| s.rejected += 1);
            }
        }
        while self.unsent < UNSENT_MAX
            && let Some((topic, payload)) = self.link.board.next_telemetry()
        {
            let sent = self.offer(&topic, QoS::AtMostOnce, payload.to_vec(), false);
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

    /// Hands a QoS 1 message to rumqttc and waits for its acknowledgement from now on.
    fn submit(
        &mut self,
        topic: &str,
        payload: Vec<u8>,
        retain: bool,
        token: Token,
    ) -> Result<(), Unsent> {
        self.offer(topic, QoS::AtLeastOnce, payload, retain)?;
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

    /// Into rumqttc's channel, unless no broker would take it: a packet that is too large is
    /// stored there, fails, ends the connection, and fails again on the next.
    fn offer(&self, topic: &str, qos: QoS, payload: Vec<u8>, retain: bool) -> Result<(), Unsent> {
        if topic.is_empty() || topic.len() > usize::from(u16::MAX) || !valid_topic(topic) {
            warn!("mqtt: \"{topic}\" is no topic to publish to");
            return Err(Unsent::NoTopic);
        }
        let publish = Publish::new(topic, qos, payload, None);
        // The packet id counts as soon as there is one.
        let size = publish.size() + 2;
        let limit = self.packet_max;
        if size > limit {
            warn!("mqtt: {topic}: a packet of {size} bytes, the limit is {limit}");
            let over = Oversize { topic: topic.into(), size_bytes: size, limit_bytes: limit };
            self.link.status.update(|s| s.oversize = Some(over));
            return Err(Unsent::TooLarge);
        }
        self.client.try_publish(topic, qos, retain, publish.payload).map_err(|_| Unsent::NoRoom)
    }

    fn handle(&mut self, event: Event, events: &mut EventLoop) -> Option<End> {
        match event {
            Event::Incoming(Packet::ConnAck(connack)) => return self.connected(&connack, events),
            Event::Incoming(Packet::SubAck(suback)) => self.subscribed(&suback),
            Event::Incoming(Packet::PubAck(puback)) => self.acknowledged(&puback),
            Event::Incoming(Packet::Publish(publish)) => self.received(publish),
            Event::Outgoing(Outgoing::Publish(0)) => self.unsent = self.unsent.saturating_sub(1),
            Event::Outgoing(Outgoing::Publish(id)) => {
                if let Some(number) = self.unnamed.pop_front() {
                    self.by_packet_id.insert(id, number);
                }
            }
            Event::Outgoing(Outgoing::Subscribe(id)) => {
                if let Some(filters) = self.subscribes.pop_front() {
                    self.subscribing.insert(id, filters);
                }
            }
            Event::Outgoing(Outgoing::Disconnect) => return Some(End::Stopped),
            _ => {}
        }
        None
    }

    fn connected(&mut self, connack: &ConnAck, events: &mut EventLoop) -> Option<End> {
        let refuse = |what| {
            let id = &self.link.client_id;
            Some(End::Failed(failure::connack(Refusal::Unsupported(what), self.broker(), id)))
        };
        let properties = connack.properties.as_ref();
        let receive_max = properties.and_then(|p| p.receive_max).unwrap_or(u16::MAX);
        if receive_max == 0 {
            return refuse("a receive maximum above 0");
        }
        if properties.and_then(|p| p.max_qos) == Some(0) {
            return refuse("QoS 1");
        }
        if properties.and_then(|p| p.retain_available) == Some(0) {
            return refuse("retained messages");
        }
        match properties.and_then(|p| p.server_keep_alive) {
            // rumqttc would ping without a pause; and a client may always ping.
            Some(0) => {
                events.options.set_keep_alive(KEEP_ALIVE);
            }
            Some(s) => {
                let keep_alive = Duration::from_secs(s.into()).max(KEEP_ALIVE);
                self.patience = 2 * keep_alive + Duration::from_secs(CONNECT_TIMEOUT_S);
            }
            None => {}
        }
        let ring = receive_max.min(WINDOW_MAX);
        // Four ids of slack, where the ring has them.
        let window = ring.saturating_sub(4).max(ring.min(4));
        self.window = window.into();
        let limit =
            properties.and_then(|p| p.max_packet_size).map_or(PACKET_OUT_MAX, |m| m as usize);
        self.packet_max = limit.min(PACKET_OUT_MAX);
        self.up_since = Some(Instant::now());
        self.phase = Phase::Subscribing { since: Instant::now() };
        self.link.status.enter(LinkState::Connected, None);
        self.link.status.update(|s| {
            s.connects += 1;
            s.session_present = connack.session_present;
            s.window = window;
            s.max_packet_bytes = self.packet_max;
            s.refused_filters.clear();
        });
        info!(
            window,
            packet_max = self.packet_max,
            session_present = connack.session_present,
            "mqtt: connected to {}",
            failure::shown(self.broker())
        );
        self.subscribe();
        None
    }

    fn subscribe(&mut self) {
        let (valid, invalid): (Vec<_>, Vec<_>) =
            self.link.settings.filters.iter().cloned().partition(|f| valid_filter(f));
        for filter in invalid {
            self.refuse(&filter, "is no topic filter");
        }
        for filters in valid.chunks(FILTERS_PER_SUBSCRIBE) {
            let request = filters.iter().map(|f| Filter::new(f, QoS::AtLeastOnce));
            if self.client.try_subscribe_many(request).is_ok() {
                self.subscribes.push_back(filters.to_vec());
            } else {
                filters.iter().for_each(|f| self.refuse(f, "was not sent: too many filters"));
            }
        }
    }

    fn subscribed(&mut self, suback: &SubAck) {
        let filters = self.subscribing.remove(&suback.pkid).unwrap_or_default();
        for (filter, code) in filters.iter().zip(&suback.return_codes) {
            if !matches!(code, SubscribeReasonCode::Success(_)) {
                self.refuse(filter, &format!("is refused by the broker: {code:?}"));
            }
        }
    }

    fn refuse(&self, filter: &str, why: &str) {
        let text = format!("{filter} {why}");
        warn!("mqtt: subscription {text}");
        self.link.status.update(|s| s.refused_filters.push(text));
    }

    fn acknowledged(&mut self, puback: &PubAck) {
        let number = self.by_packet_id.remove(&puback.pkid);
        let Some(out) = number.and_then(|n| self.out.remove(&n)) else { return };
        let outbox = &self.link.outbox;
        let accepted =
            matches!(puback.reason, PubAckReason::Success | PubAckReason::NoMatchingSubscribers);
        // The broker's own trouble: the same message may be welcome later.
        let later = matches!(
            puback.reason,
            PubAckReason::UnspecifiedError
                | PubAckReason::ImplementationSpecificError
                | PubAckReason::QuotaExceeded
                | PubAckReason::PacketIdentifierInUse
        );
        match (&out.token, accepted, later) {
            (Token::Loan(ticket), true, _) => {
                outbox.acked(*ticket);
                self.pause = RETRY_AFTER;
            }
            (Token::Loan(ticket), _, true) => {
                outbox.give_back(*ticket);
                if self.paused_until.is_none() {
                    self.paused_until = Some(Instant::now() + self.pause);
                    self.pause = (self.pause * 2).min(Duration::from_secs(60));
                }
            }
            (Token::Loan(ticket), ..) => outbox.rejected(*ticket, None),
            (Token::Board(topic), false, true) => self.link.board.again(topic),
            (Token::Board(_) | Token::Availability, ..) => {}
        }
        let inflight = self.out.len() as u64;
        self.link.status.update(|s| {
            s.inflight = inflight;
            s.acked += u64::from(accepted);
            s.rejected += u64::from(!accepted && !later);
            if !accepted {
                s.last_error = Some(format!(
                    "the broker refuses a message: {:?}{}",
                    puback.reason,
                    match puback.reason {
                        PubAckReason::NotAuthorized =>
                            "; let this client write below its root in the broker's access list",
                        _ if later => "; it will be sent again",
                        _ => "",
                    }
                ));
            }
        });
    }

    fn received(&mut self, publish: Publish) {
        let Ok(topic) = String::from_utf8(publish.topic.to_vec()) else { return };
        let properties = publish.properties.unwrap_or_default();
        let message = Inbound {
            topic,
            payload: publish.payload.to_vec(),
            retained: publish.retain,
            response_topic: properties.response_topic,
            correlation: properties.correlation_data.map(|c| c.to_vec()),
        };
        let lost = match self.link.inbound.try_send(message) {
            Ok(()) => 0,
            Err(TrySendError::Full(_) | TrySendError::Disconnected(_)) => 1,
        };
        self.link.status.update(|s| {
            s.inbound += 1;
            s.inbound_dropped += lost;
        });
    }

    /// The connection failed, or the broker ended it.
    fn lost(&self, error: &ConnectionError) -> End {
        if self.is_stopping() {
            return End::Stopped;
        }
        End::Failed(diagnose(error, self.broker(), &self.link.client_id, self.up_since.is_some()))
    }

    fn silent(&self) -> Failure {
        failure::silent(self.broker(), self.up_since.is_some())
    }
}

fn diagnose(error: &ConnectionError, broker: &External, client_id: &str, up: bool) -> Failure {
    match error {
        ConnectionError::Io(e)
        | ConnectionError::Tls(TlsError::Io(e))
        | ConnectionError::MqttState(StateError::Io(e))
        | ConnectionError::MqttState(StateError::Deserialization(CodecError::Io(e))) => {
            failure::network(e, broker, up)
        }
        ConnectionError::Tls(TlsError::TLS(e)) => failure::handshake(e, broker),
        ConnectionError::Tls(e) => {
            Failure::refused(format!("{}: TLS failed: {e}", failure::shown(broker)))
        }
        ConnectionError::Timeout(_)
        | ConnectionError::MqttState(StateError::AwaitPingResp | StateError::CollisionTimeout) => {
            failure::silent(broker, up)
        }
        ConnectionError::MqttState(StateError::ConnectionAborted) => failure::closed(broker, up),
        ConnectionError::MqttState(StateError::ServerDisconnect { reason_code, reason_string }) => {
            if *reason_code == DisconnectReasonCode::SessionTakenOver {
                return failure::taken_over(broker, client_id);
            }
            let why = reason_string.as_deref().map(|s| format!(" ({s})")).unwrap_or_default();
            let text =
                format!("{} ended the connection: {reason_code:?}{why}", failure::shown(broker));
            Failure::passing(text)
        }
        ConnectionError::ConnectionRefused(code) => {
            failure::connack(refusal(*code), broker, client_id)
        }
        ConnectionError::NotConnAck(_) => Failure::refused(format!(
            "{} does not answer as an MQTT broker",
            failure::shown(broker)
        )),
        e => Failure::passing(format!("{}: {e}", failure::shown(broker))),
    }
}

fn refusal(code: ConnectReturnCode) -> Refusal {
    use ConnectReturnCode as Code;
    match code {
        Code::NotAuthorized => Refusal::NotAuthorized,
        Code::BadUserNamePassword | Code::BadAuthenticationMethod => Refusal::BadCredentials,
        Code::Banned => Refusal::Banned,
        Code::BadClientId | Code::ClientIdentifierNotValid => Refusal::ClientId,
        Code::RefusedProtocolVersion | Code::UnsupportedProtocolVersion => Refusal::Version,
        Code::ServiceUnavailable
        | Code::ServerUnavailable
        | Code::ServerBusy
        | Code::QuotaExceeded
        | Code::ConnectionRateExceeded => Refusal::Busy,
        Code::RetainNotSupported => Refusal::Unsupported("retained messages"),
        Code::QoSNotSupported => Refusal::Unsupported("QoS 1"),
        Code::Success | Code::UnspecifiedError => Refusal::Other("unspecified"),
        Code::MalformedPacket => Refusal::Other("malformed packet"),
        Code::ProtocolError => Refusal::Other("protocol error"),
        Code::ImplementationSpecificError => Refusal::Other("implementation specific error"),
        Code::TopicNameInvalid => Refusal::Other("topic name invalid"),
        Code::PacketTooLarge => Refusal::Other("packet too large"),
        Code::PayloadFormatInvalid => Refusal::Other("payload format invalid"),
        Code::UseAnotherServer => Refusal::Other("use another server"),
        Code::ServerMoved => Refusal::Other("server moved"),
    }
}
