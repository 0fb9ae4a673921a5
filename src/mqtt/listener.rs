//! A plain subscriber on a thread of its own: how the demo watches noblink from outside. Unlike the
//! link it publishes nothing, keeps no session and has nothing to lose.

use std::io;
use std::time::Duration;

use crossbeam_channel::{Receiver, bounded};
use rumqttc::v5::mqttbytes::QoS;
use rumqttc::v5::mqttbytes::v5::Packet;
use rumqttc::v5::{Client, Event, MqttOptions};

use super::link::Inbound;
use crate::config::External;

/// Messages that wait for whoever listens; beyond it the broker waits.
const WAITING_MAX: usize = 4096;

/// Subscribes to `filter` on a broker without TLS, again after every reconnect. The thread ends
/// with the receiver.
///
/// # Errors
/// The system has no thread for it.
pub fn listen(broker: &External, client_id: &str, filter: &str) -> io::Result<Receiver<Inbound>> {
    let mut options = MqttOptions::new(client_id, &broker.host, broker.port);
    options.set_keep_alive(Duration::from_secs(15)).set_clean_start(true);
    options.set_max_packet_size(Some(1 << 20));
    let (client, mut connection) = Client::new(options, 16);
    let (sender, receiver) = bounded(WAITING_MAX);
    let filter = filter.to_owned();
    std::thread::Builder::new().name("listener".into()).spawn(move || {
        for event in connection.iter() {
            match event {
                Ok(Event::Incoming(Packet::ConnAck(_))) => {
                    // Full = the connection is about to end anyway.
                    let _ = client.try_subscribe(&filter, QoS::AtLeastOnce);
                }
                Ok(Event::Incoming(Packet::Publish(publish))) => {
                    let properties = publish.properties.unwrap_or_default();
                    let message = Inbound {
                        topic: String::from_utf8_lossy(&publish.topic).into_owned(),
                        payload: publish.payload.to_vec(),
                        retained: publish.retain,
                        response_topic: properties.response_topic,
                        correlation: properties.correlation_data.map(|c| c.to_vec()),
                    };
                    if sender.send(message).is_err() {
                        return;
                    }
                }
                Ok(_) => {}
                Err(_) => std::thread::sleep(Duration::from_millis(200)),
            }
        }
    })?;
    Ok(receiver)
}
