//! MQTT 5 packets out of a stream, as the client reads them and acts upon them.

use rumqttc::v5::mqttbytes::QoS;
use rumqttc::v5::mqttbytes::v5::{Packet, Publish};
use rumqttc::v5::{MqttState, Request};

/// What the link tells a broker to keep to.
const PACKET_MAX: u32 = 128 * 1024;
/// Messages out at once.
const WINDOW: u16 = 64;

pub fn check(data: &[u8]) {
    let mut state = MqttState::new(WINDOW, false);
    let mut stream = filled(data);
    loop {
        // Acknowledgements want something to acknowledge.
        let publish = Publish::new("noblink/v1/edge-1/status", QoS::AtLeastOnce, "x", None);
        let _ = state.handle_outgoing_packet(Request::Publish(publish));
        let Ok(packet) = Packet::read(&mut stream, Some(PACKET_MAX)) else { return };
        if state.handle_incoming_packet(packet).is_err() {
            return;
        }
        state.events.clear();
    }
}

/// The buffer that the reader wants, whichever crate it is of.
fn filled<T: Default + for<'a> Extend<&'a u8>>(data: &[u8]) -> T {
    let mut buffer = T::default();
    buffer.extend(data);
    buffer
}
