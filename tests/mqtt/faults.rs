//! Peers that hang, send what they must not, or end a connection in ways that rumqttc can't read.
//! Each is noticed, named, and over with the next connection.

use std::io::{Read, Write};
use std::net::TcpListener;
use std::time::{Duration, Instant};

use crate::harness::link::{ROOMY, Running, plain};
use crate::harness::mosquitto::{Mosquitto, publish};
use crate::harness::peer::{CONNECT, PUBLISH, Peer, SUBSCRIBE, kind, read};
use crate::harness::pki::certificates;
use crate::harness::until;
use noblink::config::External;

/// Server Keep Alive of 5 s: so that a test need not wait for 30.
const KEEP_ALIVE_5_S: &[u8] = &[0x13, 0, 5];
/// Two of these, a pause of 2 s at most before the next connection, and a busy machine.
const NOTICED_S: u64 = 10 + 2 + 5;

/// Holds the link against a peer that hangs on its first connection.
fn survives_a_hang(port: u16, payload: &str) {
    let link = Running::start(plain(port));
    link.connected();
    let detections = link.topics.detections("gate");
    for seq in 0..200 {
        link.push("gate", seq, &detections, payload);
    }
    let hung = Instant::now();
    until("the link has given up", NOTICED_S, || link.status().connects == 2);
    println!("noticed, and connected again, after {:.1} s", hung.elapsed().as_secs_f64());
    let stats = link.outbox.stats();
    assert!(stats.in_flight <= u64::from(link.status().window), "{stats:?}");
    link.drained();
    let stats = link.outbox.stats();
    assert!(stats.is_exact() && stats.acked == 200, "{stats:?}");
    let error = link.error();
    assert!(error.contains("silent") || error.contains("has not acknowledged"), "{error}");
}

#[test]
fn a_peer_that_falls_silent_is_noticed_within_two_keep_alives() {
    let peer = Peer::start(|connection, packet| {
        let silent = connection == 0 && packet.kind != CONNECT;
        Some(if silent { Vec::new() } else { kind(packet, KEEP_ALIVE_5_S) })
    });
    survives_a_hang(peer.port, "x");
}

/// Its window of 60 large records fills every buffer on the way.
#[test]
fn a_peer_that_reads_a_byte_a_second_is_noticed_within_two_keep_alives() {
    let listener = TcpListener::bind("127.0.0.1:0").expect("loopback has a free port");
    let port = listener.local_addr().expect("it is bound").port();
    std::thread::spawn(move || {
        for (number, mut socket) in listener.incoming().map_while(Result::ok).enumerate() {
            // Of its own: what lies in its buffer takes the slow one for ever.
            std::thread::spawn(move || {
                let mut byte = [0];
                while let Some(packet) = read(&mut socket) {
                    let _ = socket.write_all(&kind(&packet, KEEP_ALIVE_5_S));
                    while number == 0 && socket.read_exact(&mut byte).is_ok() {
                        std::thread::sleep(Duration::from_secs(1));
                    }
                }
            });
        }
    });
    survives_a_hang(port, &"x".repeat(200_000));
}

/// Told the limit, a broker keeps a larger message to itself.
#[test]
fn a_command_that_is_too_large_does_not_reach_the_link_and_the_next_does() {
    let broker = Mosquitto::start("");
    let link = Running::with(plain(broker.port), "edge-1", ROOMY, &["noblink/v1/edge-1/cmd/#"]);
    until("the subscription stands", 10, || link.status().acked >= 1);
    let large = broker.dir().join("large");
    std::fs::write(&large, vec![b'x'; 200_000]).expect("the folder is ours");
    let topic = "noblink/v1/edge-1/cmd/x";
    publish(broker.port, &["-t", topic, "-f", &large.display().to_string()]);
    publish(broker.port, &["-t", topic, "-m", "small"]);
    let message = link.handle.inbound().recv_timeout(Duration::from_secs(5)).expect("the second");
    assert_eq!(message.payload, b"small");
    assert_eq!((link.status().connects, link.status().inbound), (1, 1));
}

#[test]
fn a_peer_that_sends_too_much_costs_a_connection_and_no_record() {
    let peer = Peer::start(|connection, packet| {
        let mut answer = kind(packet, &[]);
        if connection == 0 && packet.kind == SUBSCRIBE {
            // PUBLISH of 200 kB to the topic "x", without properties.
            let body = [&[0, 1, b'x', 0][..], &vec![b'.'; 200_000]].concat();
            let length = body.len();
            answer.extend([0x30, length as u8 | 0x80, (length >> 7) as u8 | 0x80]);
            answer.push((length >> 14) as u8);
            answer.extend(body);
        }
        Some(answer)
    });
    let link = Running::with(plain(peer.port), "edge-1", ROOMY, &["x"]);
    until("a second connection", 10, || link.status().connects == 2);
    assert!(link.error().contains("200004 bytes"), "{}", link.error());
    (0..100).for_each(|seq| link.push("gate", seq, &link.topics.detections("gate"), "x"));
    link.drained();
    assert_eq!((link.outbox.stats().acked, link.status().inbound), (100, 0));
}

/// MQTT 5 lets a DISCONNECT end after its reason, or before it: rumqttc 0.25 fails at the one and
/// waits for the rest of the other, until the peer closes.
#[test]
fn a_disconnect_without_properties_is_a_closed_connection() {
    for packet in [&[0xe0, 0][..], &[0xe0, 1, 0x8b]] {
        let mut over = false;
        let peer = Peer::start(move |connection, received| {
            let mut answer = kind(received, &[]);
            if connection == 0 && received.kind == PUBLISH {
                if std::mem::replace(&mut over, true) {
                    return None;
                }
                answer.extend(packet);
            }
            Some(answer)
        });
        let link = Running::start(plain(peer.port));
        let detections = link.topics.detections("gate");
        (0..3).for_each(|seq| link.push("gate", seq, &detections, "x"));
        until("a second connection", 10, || link.status().connects == 2);
        let error = link.error();
        assert!(error.contains("DISCONNECT") || error.contains("closed"), "{error}");
        link.drained();
        assert_eq!(link.outbox.stats().acked, 3);
    }
}

/// New CA, new server and client certificates under the same names: used by the next connection.
#[test]
fn rotated_certificates_are_used_by_the_next_connection() {
    let mut broker = Mosquitto::with(|dir| {
        certificates(dir);
        let dir = dir.display();
        format!(
            "allow_anonymous true\nrequire_certificate true\ncafile {dir}/ca.pem\n\
             certfile {dir}/server.pem\nkeyfile {dir}/server.key"
        )
    });
    let dir = broker.dir();
    let link = Running::start(External {
        host: "localhost".into(),
        tls: true,
        ca_file: Some(dir.join("ca.pem")),
        client_cert: Some((dir.join("client.pem"), dir.join("client.key"))),
        ..plain(broker.port)
    });
    link.connected();
    let before = std::fs::read(dir.join("ca.pem")).expect("it was made");
    certificates(&dir);
    assert_ne!(before, std::fs::read(dir.join("ca.pem")).expect("made anew"));
    // With the old ones the broker's certificate would not be trusted, nor ours by it.
    broker.restart();
    until("a connection with the new ones", 15, || link.status().connects == 2);
    link.push("gate", 0, &link.topics.detections("gate"), "x");
    link.drained();
}

/// So many that they fill the channel to the broker many times over.
#[test]
fn a_burst_of_commands_does_not_starve_what_goes_out() {
    let peer = Peer::start(|_, packet| {
        let mut answer = kind(packet, &[]);
        if packet.kind == PUBLISH {
            // Twenty for each that comes.
            (0..20).for_each(|_| answer.extend([0x30, 5, 0, 1, b'x', 0, b'!']));
        }
        Some(answer)
    });
    let link = Running::with(plain(peer.port), "edge-1", ROOMY, &["x"]);
    (0..2000).for_each(|seq| link.push("gate", seq, &link.topics.detections("gate"), "x"));
    link.drained();
    assert_eq!(link.status().connects, 1);
    until("all came in", 5, || link.status().inbound >= 40_000);
}
