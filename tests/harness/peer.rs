//! A peer that speaks just enough MQTT 5 to behave as no real broker would on request.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};

/// What a packet is, by the high half of its first byte.
pub const CONNECT: u8 = 1;
pub const PUBLISH: u8 = 3;
pub const PUBACK: u8 = 4;
pub const SUBSCRIBE: u8 = 8;
pub const PINGREQ: u8 = 12;
pub const DISCONNECT: u8 = 14;

/// A packet as it came.
#[derive(Debug, Clone)]
pub struct Packet {
    pub kind: u8,
    pub body: Vec<u8>,
    /// All of it.
    pub bytes: Vec<u8>,
}

impl Packet {
    /// The packet id of a QoS 1 PUBLISH, its PUBACK or a SUBSCRIBE.
    pub fn id(&self) -> [u8; 2] {
        let at = if self.kind == PUBLISH { self.topic_end() } else { 0 };
        [self.body[at], self.body[at + 1]]
    }

    /// The topic of a PUBLISH.
    pub fn topic(&self) -> String {
        String::from_utf8_lossy(&self.body[2..self.topic_end()]).into_owned()
    }

    /// The payload of a QoS 1 PUBLISH whose properties are shorter than 128 bytes.
    pub fn payload(&self) -> &[u8] {
        let properties = self.topic_end() + 2;
        &self.body[properties + 1 + usize::from(self.body[properties])..]
    }

    fn topic_end(&self) -> usize {
        2 + usize::from(u16::from_be_bytes([self.body[0], self.body[1]]))
    }

    fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }
}

/// A listener whose connections all behave in the same way.
pub struct Peer {
    pub port: u16,
    packets: Arc<Mutex<Vec<Packet>>>,
}

impl Peer {
    /// `answer` gets the number of the connection, from 0, and each packet; what it returns is
    /// sent. Returning `None` ends the connection.
    pub fn start(
        mut answer: impl FnMut(usize, &Packet) -> Option<Vec<u8>> + Send + 'static,
    ) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("loopback has a free port");
        let port = listener.local_addr().expect("it is bound").port();
        let packets = Arc::new(Mutex::new(Vec::new()));
        let seen = Arc::clone(&packets);
        // Ends with the test process: a listener can't be told to stop.
        std::thread::spawn(move || {
            for (number, socket) in listener.incoming().map_while(Result::ok).enumerate() {
                serve(socket, &seen, |packet| answer(number, packet));
            }
        });
        Self { port, packets }
    }

    pub fn count(&self, kind: u8) -> usize {
        self.packets
            .lock()
            .expect("the server does not panic")
            .iter()
            .filter(|p| p.kind == kind)
            .count()
    }

    /// How often a PUBLISH came that contains `text`.
    pub fn published(&self, text: &str) -> usize {
        let packets = self.packets.lock().expect("the server does not panic");
        packets.iter().filter(|p| p.kind == PUBLISH && p.text().contains(text)).count()
    }
}

fn serve(
    mut socket: TcpStream,
    seen: &Mutex<Vec<Packet>>,
    mut answer: impl FnMut(&Packet) -> Option<Vec<u8>>,
) {
    while let Some(packet) = read(&mut socket) {
        seen.lock().expect("the test does not panic with it").push(packet.clone());
        match answer(&packet) {
            Some(bytes) if socket.write_all(&bytes).is_ok() => {}
            _ => return,
        }
    }
}

/// The next packet, if there is one.
pub fn read(socket: &mut TcpStream) -> Option<Packet> {
    let mut byte = [0];
    socket.read_exact(&mut byte).ok()?;
    let kind = byte[0] >> 4;
    let mut bytes = byte.to_vec();
    let (mut length, mut shift) = (0_usize, 0);
    loop {
        socket.read_exact(&mut byte).ok()?;
        bytes.extend(byte);
        length |= usize::from(byte[0] & 0x7f) << shift;
        shift += 7;
        if byte[0] & 0x80 == 0 {
            break;
        }
    }
    let mut body = vec![0; length];
    socket.read_exact(&mut body).ok()?;
    bytes.extend(&body);
    Some(Packet { kind, body, bytes })
}

/// What a kind broker answers; `connack` are the properties of its CONNACK.
pub fn kind(packet: &Packet, connack: &[u8]) -> Vec<u8> {
    let [high, low] = if matches!(packet.kind, PUBLISH | SUBSCRIBE) { packet.id() } else { [0, 0] };
    match packet.kind {
        CONNECT => {
            let properties = connack.len() as u8;
            [&[0x20, 3 + properties, 0, 0, properties], connack].concat()
        }
        PUBLISH => vec![0x40, 2, high, low],
        SUBSCRIBE => vec![0x90, 4, high, low, 0, 1],
        PINGREQ => vec![0xd0, 0],
        _ => Vec::new(),
    }
}

/// PUBACK with a reason.
pub fn puback(packet: &Packet, reason: u8) -> Vec<u8> {
    let [high, low] = packet.id();
    vec![0x40, 3, high, low, reason]
}
