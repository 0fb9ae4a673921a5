//! A plain client on a thread of its own: how the demo watches noblink from outside, and how
//! `noblink model push` sends a model. Unlike the link it keeps no session and has nothing to lose.

use std::io;
use std::time::Duration;

use crossbeam_channel::{Receiver, bounded};
use rumqttc::Outgoing;
use rumqttc::v5::mqttbytes::QoS;
use rumqttc::v5::mqttbytes::v5::{Filter, Packet, PublishProperties};
use rumqttc::v5::{Client, Connection, Event, MqttOptions};

use super::failure::Failure;
use super::link::Inbound;
use super::wire;
use crate::config::External;

/// Messages that wait for whoever listens; beyond it the broker waits.
const WAITING_MAX: usize = 4096;

/// Messages that wait for the socket.
const UNSENT_MAX: usize = 32;

/// Incoming packets.
const PACKET_IN_MAX: u32 = 1 << 20;

const RECONNECT: Duration = Duration::from_millis(200);

/// What a peer hears.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Notice {
    /// A connection stands, and its subscriptions are on their way.
    Up,
    /// It is gone, or did not come to be. The next is tried by itself.
    Down(Failure),
    /// Something arrived.
    Message(Inbound),
}

/// A client that speaks, too. Its thread ends with it.
pub struct Peer {
    client: Client,
    /// What it hears.
    pub notices: Receiver<Notice>,
}

impl Peer {
    /// Subscribes to `filters`, again after every reconnect.
    ///
    /// # Errors
    /// Password or certificates can't be read, or the system has no thread for it.
    pub fn connect(
        broker: &External,
        client_id: &str,
        filters: Vec<String>,
    ) -> Result<Self, String> {
        let (sender, notices) = bounded(WAITING_MAX);
        let tell = move |notice| sender.send(notice).is_ok();
        let client = start(broker, client_id, filters, tell)?;
        Ok(Self { client, notices })
    }

    /// Hands a QoS 1 message over; `false` when there is no room for it just now. One that is not
    /// retained is forgotten by the broker after `expiry_s`.
    pub fn publish(&self, topic: &str, payload: Vec<u8>, retain: bool, expiry_s: u32) -> bool {
        let expiry = (!retain).then_some(expiry_s);
        let properties =
            PublishProperties { message_expiry_interval: expiry, ..PublishProperties::default() };
        let qos = QoS::AtLeastOnce;
        self.client.try_publish_with_properties(topic, qos, retain, payload, properties).is_ok()
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        // Full = the thread finds nobody who listens, and ends.
        let _ = self.client.try_disconnect();
    }
}

/// Subscribes to `filter`, again after every reconnect. The thread ends with the receiver.
///
/// # Errors
/// As [`Peer::connect`].
pub fn listen(broker: &External, client_id: &str, filter: &str) -> io::Result<Receiver<Inbound>> {
    let (sender, receiver) = bounded(WAITING_MAX);
    let tell = move |notice| match notice {
        Notice::Message(message) => sender.send(message).is_ok(),
        Notice::Up | Notice::Down(_) => true,
    };
    start(broker, client_id, vec![filter.to_owned()], tell).map_err(io::Error::other)?;
    Ok(receiver)
}

fn start(
    broker: &External,
    client_id: &str,
    filters: Vec<String>,
    mut tell: impl FnMut(Notice) -> bool + Send + 'static,
) -> Result<Client, String> {
    let mut options = MqttOptions::new(client_id, &broker.host, broker.port);
    options.set_keep_alive(wire::KEEP_ALIVE).set_clean_start(true);
    options.set_max_packet_size(Some(PACKET_IN_MAX));
    wire::access(&mut options, broker)?;
    let (client, connection) = Client::new(options, UNSENT_MAX);
    let (own, broker, client_id) = (client.clone(), broker.clone(), client_id.to_owned());
    let body = move || {
        let subscribe = || {
            let filters = filters.iter().map(|f| Filter::new(f, QoS::AtLeastOnce));
            // Full = the connection is about to end anyway.
            let _ = own.try_subscribe_many(filters);
        };
        hear(connection, &broker, &client_id, subscribe, &mut tell);
    };
    let thread = std::thread::Builder::new().name("listener".into());
    thread.spawn(body).map_err(|e| format!("no thread for the MQTT client: {e}"))?;
    Ok(client)
}

/// Until nobody listens, or the client is dropped.
fn hear(
    mut connection: Connection,
    broker: &External,
    client_id: &str,
    subscribe: impl Fn(),
    tell: &mut impl FnMut(Notice) -> bool,
) {
    let mut up = false;
    for event in connection.iter() {
        let goes_on = match event {
            Ok(Event::Incoming(Packet::ConnAck(_))) => {
                up = true;
                subscribe();
                tell(Notice::Up)
            }
            Ok(Event::Incoming(Packet::Publish(publish))) => {
                wire::inbound(publish).is_none_or(|message| tell(Notice::Message(message)))
            }
            Ok(Event::Outgoing(Outgoing::Disconnect)) => false,
            Ok(_) => true,
            Err(error) => {
                let failure = wire::diagnose(&error, broker, client_id, up);
                up = false;
                let goes_on = tell(Notice::Down(failure));
                std::thread::sleep(RECONNECT);
                goes_on
            }
        };
        if !goes_on {
            return;
        }
    }
}
