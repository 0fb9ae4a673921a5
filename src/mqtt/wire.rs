//! The wire: one connection by rumqttc. Only this file and `listener` name it.
//!
//! One connection is one fresh event loop, and its options are built anew: rumqttc loses what it
//! holds when the broker lost the session, keeps a collision across reconnects, and lets the server
//! overwrite its options. So nothing is left to it but this connection.
//!
//! Nothing here waits for room in rumqttc's channel: its reader is the task that would wait. The
//! channel has room for the window by construction.

use std::time::Duration;

use rumqttc::v5::mqttbytes::v5::{
    ConnAck, ConnectReturnCode, DisconnectReasonCode, Filter, LastWill, LastWillProperties, Packet,
    PubAckReason, Publish, PublishProperties, SubscribeReasonCode,
};
use rumqttc::v5::mqttbytes::{Error as CodecError, QoS, valid_filter, valid_topic};
use rumqttc::v5::{AsyncClient, ConnectionError, Event, EventLoop, MqttOptions, StateError};
use rumqttc::{NetworkOptions, Outgoing, TlsConfiguration, TlsError, Transport};

use super::failure::{self, Failure, Refusal};
use super::link::Inbound;
use super::tls;
use crate::config::External;

pub(super) const KEEP_ALIVE: Duration = Duration::from_secs(15);
/// QoS 1 messages out at once, whatever the broker allows: it bounds what is sent again.
const WINDOW_MAX: u16 = 64;
/// QoS 0 messages that wait for the socket; more are thrown away.
pub(super) const UNSENT_MAX: usize = 8;
/// Room for the window, the unsent, the subscriptions and DISCONNECT.
const CHANNEL: usize = WINDOW_MAX as usize + UNSENT_MAX + 8;
/// TCP, TLS and CONNACK together.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
const SESSION_EXPIRY_S: u32 = 3600;
/// Short blips do not show as `offline`.
const WILL_DELAY_S: u32 = 5;
/// Incoming packets; told to the broker, which then must not send more.
const PACKET_IN_MAX: u32 = 128 * 1024;
/// Outgoing packets, where the broker allows more: a larger one blocks all behind it.
const PACKET_OUT_MAX: usize = 1024 * 1024;

/// What a connection begins with.
pub(super) struct Hello<'a> {
    pub(super) broker: &'a External,
    pub(super) client_id: &'a str,
    /// The topic of the will.
    pub(super) availability: &'a str,
}

/// What the broker allows.
pub(super) struct Welcome {
    pub(super) session_present: bool,
    /// QoS 1 messages between the oldest and the newest that are out.
    pub(super) window: u16,
    pub(super) packet_max: usize,
    pub(super) keep_alive: Duration,
}

/// What the broker says to a QoS 1 message.
pub(super) enum Verdict {
    Taken,
    /// The broker's own trouble: the same message may be welcome later.
    Later(String),
    Never(String),
}

/// What happened on the wire.
pub(super) enum Happening {
    Welcome(Welcome),
    /// The oldest submitted QoS 1 message without a packet id got this one and went out.
    Named(u16),
    /// A QoS 0 message went out.
    Told,
    /// The oldest SUBSCRIBE without a packet id got this one and went out.
    Subscribing(u16),
    /// The broker's answer to a SUBSCRIBE: what is wrong, filter by filter.
    Subscribed(u16, Vec<Option<String>>),
    Settled(u16, Verdict),
    Message(Inbound),
    /// DISCONNECT went out.
    Left,
    Nothing,
}

/// Why a message was not handed over.
pub(super) enum Unsent {
    /// Its packet would have that size.
    TooLarge(usize),
    NoTopic,
    /// The channel is full, which is not by what is in the window.
    NoRoom,
}

/// The end that is written to.
pub(super) struct Wire {
    client: AsyncClient,
}

/// The end that is read from. It reconnects never: an error is the end.
pub(super) struct Happenings {
    events: EventLoop,
    broker: External,
    client_id: String,
    up: bool,
}

/// A connection that begins when the first happening is awaited. Reads the password and the
/// certificates; fails in words when they can't be.
pub(super) fn open(hello: &Hello<'_>) -> Result<(Wire, Happenings), String> {
    let (client, events) = AsyncClient::new(options(hello)?, CHANNEL);
    let happenings = Happenings {
        events,
        broker: hello.broker.clone(),
        client_id: hello.client_id.to_owned(),
        up: false,
    };
    Ok((Wire { client }, happenings))
}

/// Whether a broker could accept it.
pub(super) fn is_filter(filter: &str) -> bool {
    valid_filter(filter)
}

impl Wire {
    /// Hands a QoS 1 message over, unless no broker would take it: a packet that is too large is
    /// stored in rumqttc, fails, ends the connection, and fails again on the next.
    pub(super) fn publish(
        &self,
        topic: &str,
        payload: Vec<u8>,
        retain: bool,
        packet_max: usize,
    ) -> Result<(), Unsent> {
        self.offer(topic, QoS::AtLeastOnce, payload, retain, packet_max, None)
    }

    /// Hands a picture over, at QoS 1, with the event that it shows as a user property.
    pub(super) fn show(
        &self,
        topic: &str,
        jpeg: Vec<u8>,
        event: &str,
        packet_max: usize,
    ) -> Result<(), Unsent> {
        let properties = PublishProperties {
            content_type: Some("image/jpeg".to_owned()),
            user_properties: vec![("event".to_owned(), event.to_owned())],
            ..Default::default()
        };
        self.offer(topic, QoS::AtLeastOnce, jpeg, false, packet_max, Some(properties))
    }

    /// Hands a QoS 0 message over.
    pub(super) fn tell(
        &self,
        topic: &str,
        payload: Vec<u8>,
        packet_max: usize,
    ) -> Result<(), Unsent> {
        self.offer(topic, QoS::AtMostOnce, payload, false, packet_max, None)
    }

    fn offer(
        &self,
        topic: &str,
        qos: QoS,
        payload: Vec<u8>,
        retain: bool,
        packet_max: usize,
        properties: Option<PublishProperties>,
    ) -> Result<(), Unsent> {
        if topic.is_empty() || topic.len() > usize::from(u16::MAX) || !valid_topic(topic) {
            return Err(Unsent::NoTopic);
        }
        let publish = Publish::new(topic, qos, payload, properties);
        // The packet id counts as soon as there is one.
        let size = publish.size() + 2;
        if size > packet_max {
            return Err(Unsent::TooLarge(size));
        }
        let payload = publish.payload;
        let handed = match publish.properties {
            None => self.client.try_publish(topic, qos, retain, payload),
            Some(more) => {
                self.client.try_publish_with_properties(topic, qos, retain, payload, more)
            }
        };
        handed.map_err(|_| Unsent::NoRoom)
    }

    /// One SUBSCRIBE, at QoS 1; `false` when there is no room for it.
    pub(super) fn subscribe(&self, filters: &[String]) -> bool {
        let filters = filters.iter().map(|f| Filter::new(f, QoS::AtLeastOnce));
        self.client.try_subscribe_many(filters).is_ok()
    }

    /// DISCONNECT, behind all that was handed over before it.
    pub(super) fn leave(&self) -> bool {
        self.client.try_disconnect().is_ok()
    }
}

impl Happenings {
    /// The next. Not to be cancelled but to end the connection: a packet may be lost with it.
    pub(super) async fn next(&mut self) -> Result<Happening, Failure> {
        match self.events.poll().await {
            Ok(event) => self.translate(event),
            Err(error) => Err(diagnose(&error, &self.broker, &self.client_id, self.up)),
        }
    }

    /// Nothing came for too long.
    pub(super) fn silent(&self) -> Failure {
        failure::silent(&self.broker, self.up)
    }

    fn translate(&mut self, event: Event) -> Result<Happening, Failure> {
        Ok(match event {
            Event::Incoming(Packet::ConnAck(connack)) => {
                Happening::Welcome(self.welcome(&connack)?)
            }
            Event::Incoming(Packet::SubAck(suback)) => {
                let wrong = |code: &SubscribeReasonCode| match code {
                    SubscribeReasonCode::Success(_) => None,
                    code => Some(format!("{code:?}")),
                };
                Happening::Subscribed(suback.pkid, suback.return_codes.iter().map(wrong).collect())
            }
            Event::Incoming(Packet::PubAck(puback)) => {
                Happening::Settled(puback.pkid, verdict(puback.reason))
            }
            Event::Incoming(Packet::Publish(publish)) => {
                inbound(publish).map_or(Happening::Nothing, Happening::Message)
            }
            Event::Outgoing(Outgoing::Publish(0)) => Happening::Told,
            Event::Outgoing(Outgoing::Publish(id)) => Happening::Named(id),
            Event::Outgoing(Outgoing::Subscribe(id)) => Happening::Subscribing(id),
            Event::Outgoing(Outgoing::Disconnect) => Happening::Left,
            _ => Happening::Nothing,
        })
    }

    fn welcome(&mut self, connack: &ConnAck) -> Result<Welcome, Failure> {
        let properties = connack.properties.as_ref();
        let receive_max = properties.and_then(|p| p.receive_max).unwrap_or(u16::MAX);
        let lacks = [
            (receive_max == 0, "a receive maximum above 0"),
            (properties.and_then(|p| p.max_qos) == Some(0), "QoS 1"),
            (properties.and_then(|p| p.retain_available) == Some(0), "retained messages"),
        ];
        if let Some((_, what)) = lacks.into_iter().find(|(lacks, _)| *lacks) {
            let refusal = Refusal::Unsupported(what);
            return Err(failure::connack(refusal, &self.broker, &self.client_id));
        }
        let keep_alive = match properties.and_then(|p| p.server_keep_alive) {
            // Off: rumqttc would ping without a pause, and a client may ping all the same.
            Some(0) => {
                self.events.options.set_keep_alive(KEEP_ALIVE);
                KEEP_ALIVE
            }
            Some(seconds) => Duration::from_secs(seconds.into()),
            None => KEEP_ALIVE,
        };
        self.up = true;
        // Packet ids run in a ring of this length; four of slack, where it has them.
        let ring = receive_max.min(WINDOW_MAX);
        let packet_max = properties.and_then(|p| p.max_packet_size).unwrap_or(u32::MAX) as usize;
        Ok(Welcome {
            session_present: connack.session_present,
            window: ring.saturating_sub(4).max(ring.min(4)),
            packet_max: packet_max.min(PACKET_OUT_MAX),
            keep_alive,
        })
    }
}

fn verdict(reason: PubAckReason) -> Verdict {
    use PubAckReason as R;
    match reason {
        R::Success | R::NoMatchingSubscribers => Verdict::Taken,
        R::UnspecifiedError
        | R::ImplementationSpecificError
        | R::QuotaExceeded
        | R::PacketIdentifierInUse => Verdict::Later(format!("{reason:?}")),
        R::NotAuthorized => Verdict::Never(
            "NotAuthorized; let this client write below its root in the broker's access list"
                .to_owned(),
        ),
        R::TopicNameInvalid | R::PayloadFormatInvalid => Verdict::Never(format!("{reason:?}")),
    }
}

pub(super) fn inbound(publish: Publish) -> Option<Inbound> {
    let properties = publish.properties.unwrap_or_default();
    Some(Inbound {
        topic: String::from_utf8(publish.topic.to_vec()).ok()?,
        payload: publish.payload.to_vec(),
        retained: publish.retain,
        response_topic: properties.response_topic,
        correlation: properties.correlation_data.map(|c| c.to_vec()),
    })
}

/// Everything that CONNECT says, with password and certificates as they are now. No topic aliases,
/// no QoS 2 and no manual acknowledgements: rumqttc keeps the first over connections, leaks the
/// second, and queues the third behind what is published. The limit of messages that are out is also
/// the length of a table that it makes for each connection: 14 MB by default.
fn options(hello: &Hello<'_>) -> Result<MqttOptions, String> {
    let broker = hello.broker;
    let mut options = MqttOptions::new(hello.client_id, &broker.host, broker.port);
    options
        .set_keep_alive(KEEP_ALIVE)
        .set_clean_start(false)
        .set_session_expiry_interval(Some(SESSION_EXPIRY_S))
        .set_max_packet_size(Some(PACKET_IN_MAX))
        .set_connection_timeout(CONNECT_TIMEOUT.as_secs())
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
    options.set_last_will(LastWill::new(
        hello.availability,
        "offline",
        QoS::AtLeastOnce,
        true,
        Some(delayed),
    ));
    access(&mut options, broker)?;
    Ok(options)
}

/// Login and TLS, as the files say now.
pub(super) fn access(options: &mut MqttOptions, broker: &External) -> Result<(), String> {
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
    Ok(())
}

/// What a failed connection means; `up`: after it had stood.
pub(super) fn diagnose(
    error: &ConnectionError,
    broker: &External,
    client_id: &str,
    up: bool,
) -> Failure {
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
        ConnectionError::MqttState(StateError::Deserialization(
            CodecError::PayloadSizeLimitExceeded { pkt_size, max },
        )) => failure::too_large(broker, *pkt_size, *max),
        ConnectionError::MqttState(StateError::Deserialization(e)) if up => {
            failure::unreadable(broker, &e.to_string())
        }
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
