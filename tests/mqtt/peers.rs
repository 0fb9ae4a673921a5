//! Against peers that do what a real broker does only on a bad day.

use std::time::{Duration, Instant};

use crate::harness::link::{ROOMY, Running, plain};
use crate::harness::peer::{CONNECT, DISCONNECT, PINGREQ, PUBLISH, Peer, SUBSCRIBE, kind, puback};
use crate::harness::until;
use noblink::mqtt::status::LinkState;

#[test]
fn a_server_keep_alive_of_zero_is_no_storm_of_pings() {
    // Server Keep Alive, 0x13.
    let peer = Peer::start(|_, packet| Some(kind(packet, &[0x13, 0, 0])));
    let link = Running::start(plain(peer.port));
    link.connected();
    for seq in 0..100 {
        link.push("gate", seq, &link.topics.detections("gate"), "x");
    }
    link.drained();
    assert!(peer.count(PINGREQ) <= 1, "{} pings", peer.count(PINGREQ));
    assert_eq!(peer.count(CONNECT), 1);
}

#[test]
fn acknowledgements_in_any_order_close_no_window() {
    // Receive Maximum, 0x21, of 8; each four PUBLISHes are answered from the last to the first.
    let mut held: Vec<Vec<u8>> = Vec::new();
    let peer = Peer::start(move |_, packet| {
        if packet.kind != PUBLISH || !packet.body.ends_with(b"x") {
            return Some(kind(packet, &[0x21, 0, 8]));
        }
        held.push(kind(packet, &[]));
        if held.len() < 4 {
            return Some(Vec::new());
        }
        held.reverse();
        Some(held.drain(..).flatten().collect())
    });
    let link = Running::start(plain(peer.port));
    for seq in 0..400 {
        link.push("gate", seq, &link.topics.detections("gate"), "x");
    }
    link.drained();
    assert_eq!(link.outbox.stats().acked, 400);
    assert_eq!((peer.count(CONNECT), peer.count(PUBLISH)), (1, 401));
}

#[test]
fn what_the_broker_can_not_take_now_is_sent_again() {
    let mut refused = false;
    let peer = Peer::start(move |_, packet| {
        if packet.kind == PUBLISH && packet.body.ends_with(b"x3") && !refused {
            refused = true;
            // Quota exceeded.
            return Some(puback(packet, 0x97));
        }
        Some(kind(packet, &[]))
    });
    let link = Running::start(plain(peer.port));
    for seq in 0..6 {
        link.push("gate", seq, &link.topics.detections("gate"), &format!("x{seq}"));
    }
    link.drained();
    assert_eq!((peer.published("x3"), peer.published("x4")), (2, 1));
    assert_eq!((link.outbox.stats().acked, link.outbox.stats().rejected), (6, 0));
    let error = link.error();
    assert!(error.contains("QuotaExceeded") && error.contains("sent again"), "{error}");
}

#[test]
fn a_refused_subscription_is_named_and_the_rest_works() {
    let peer = Peer::start(|_, packet| {
        if packet.kind != SUBSCRIBE {
            return Some(kind(packet, &[]));
        }
        let [high, low] = packet.id();
        // Granted QoS 1; not authorised.
        Some(vec![0x90, 5, high, low, 0, 1, 0x87])
    });
    let link = Running::with(plain(peer.port), "edge-1", ROOMY, &["yours/#", "theirs/#"]);
    link.connected();
    link.push("gate", 0, &link.topics.detections("gate"), "x");
    link.drained();
    assert_eq!(link.status().refused_filters, ["theirs/# is refused by the broker: NotAuthorized"]);
}

#[test]
fn a_broker_that_can_not_do_what_is_needed_is_named() {
    // Maximum QoS 0x24, Retain Available 0x25, Receive Maximum 0x21.
    for (properties, what) in [
        (&[0x24, 0][..], "QoS 1"),
        (&[0x25, 0], "retained messages"),
        (&[0x21, 0, 0], "receive maximum"),
    ] {
        let peer = Peer::start(move |_, packet| Some(kind(packet, properties)));
        let link = Running::start(plain(peer.port));
        let error = link.error();
        assert!(error.contains(what) && error.contains("does not support"), "{error}");
        until("back-off", 2, || link.status().state == LinkState::Backoff);
        assert!(link.status().retry_in_s.is_some_and(|s| s > 55.0));
    }
}

#[test]
fn a_session_that_is_taken_over_twice_is_left_alone() {
    // DISCONNECT, session taken over.
    let peer = Peer::start(|_, packet| {
        let mut answer = kind(packet, &[]);
        if packet.kind == PUBLISH {
            answer.extend([0xe0, 2, 0x8e, 0]);
        }
        Some(answer)
    });
    let link = Running::start(plain(peer.port));
    until("a long back-off", 10, || link.status().retry_in_s.is_some_and(|s| s > 55.0));
    let error = link.error();
    assert!(error.contains("took over") && error.contains("device.id"), "{error}");
    assert_eq!(link.status().connects, 2);
}

#[test]
fn a_stop_while_nothing_is_acknowledged_ends_without_a_disconnect() {
    let peer = Peer::start(|_, packet| {
        if packet.kind == PUBLISH { Some(Vec::new()) } else { Some(kind(packet, &[])) }
    });
    let mut link = Running::start(plain(peer.port));
    link.connected();
    link.push("gate", 0, &link.topics.detections("gate"), "x");
    until("it is out", 5, || peer.count(PUBLISH) == 2);
    let before = Instant::now();
    link.stop();
    assert!(before.elapsed() < Duration::from_secs(7), "{:?}", before.elapsed());
    // So that the broker publishes the will.
    assert_eq!(peer.count(DISCONNECT), 0);
    let stats = link.outbox.stats();
    assert!(stats.is_exact() && stats.queued == 1 && stats.in_flight == 0, "{stats:?}");
}
