//! Names, pauses, and what the types promise.

use std::time::Duration;

use noblink::mqtt::backoff::{Backoff, Class};
use noblink::mqtt::board::Board;
use noblink::mqtt::link::{Link, Settings};
use noblink::mqtt::outbox::Outbox;
use noblink::mqtt::topics::Topics;

use crate::harness::link::{ROOMY, plain};

#[test]
fn the_tree() {
    let topics = Topics::new("noblink", "edge-1");
    assert_eq!(topics.root(), "noblink/v1/edge-1");
    for (topic, rest) in [
        (topics.availability(), "availability"),
        (topics.status(), "status"),
        (topics.telemetry(), "telemetry"),
        (topics.camera_status("gate"), "cameras/gate/status"),
        (topics.detections("gate"), "cameras/gate/detections"),
        (topics.gaps("gate"), "cameras/gate/gaps"),
    ] {
        assert_eq!(*topic, format!("noblink/v1/edge-1/{rest}"));
    }
}

fn pauses(class: Class, up_s: u64, n: usize) -> Vec<(f64, f64)> {
    let (mut least, mut most) = (Backoff::default(), Backoff::default());
    let up = Duration::from_secs(up_s);
    let pause = |b: &mut Backoff, chance| b.next(class, up, chance).as_secs_f64();
    (0..n).map(|_| (pause(&mut least, 0.0), pause(&mut most, 1.0))).collect()
}

#[test]
fn pauses_double_up_to_a_minute_and_start_over_after_half_of_one() {
    let grown = pauses(Class::Passing, 0, 8);
    assert_eq!(grown[..3], [(1.0, 2.0), (1.0, 4.0), (1.0, 8.0)]);
    assert_eq!(grown[7], (1.0, 60.0));
    assert!(pauses(Class::Passing, 30, 8).iter().all(|p| *p == (1.0, 2.0)));
    assert!(pauses(Class::Refused, 0, 3).iter().all(|p| *p == (60.0, 300.0)));
}

#[test]
fn a_contest_for_the_client_id_is_left_to_the_other() {
    assert_eq!(pauses(Class::TakenOver, 5, 2)[1], (60.0, 120.0));
    // Up for more than a minute and thrown out again: the other is still there.
    assert_eq!(pauses(Class::TakenOver, 90, 2)[1], (60.0, 120.0));
    assert_eq!(pauses(Class::TakenOver, 700, 2)[1], (1.0, 2.0));
    assert_eq!(pauses(Class::Closed, 5, 3)[1..], [(1.0, 4.0), (60.0, 120.0)]);
    assert!(pauses(Class::Closed, 31, 9).iter().all(|p| p.0 == 1.0));
}

#[test]
fn a_broker_that_restarts_over_and_over_is_no_contest() {
    let mut backoff = Backoff::default();
    for _ in 0..9 {
        for (class, up_s) in [(Class::Closed, 10), (Class::Passing, 0)] {
            backoff.next(class, Duration::from_secs(up_s), 0.0);
            assert!(!backoff.is_contested());
        }
    }
}

#[test]
fn a_link_may_run_on_any_runtime_and_its_status_is_json() {
    fn assert_send<T: Send>(_: &T) {}
    let settings = Settings {
        device: "edge-1".into(),
        topics: Topics::new("noblink", "edge-1"),
        broker: plain(1883),
        filters: Vec::new(),
    };
    let (outbox, board) = (Outbox::new(ROOMY), Board::new());
    let (link, handle) = Link::new(settings, outbox.into(), board.into());
    assert_send(&handle);
    assert_send(&link.run());
    let status = serde_json::to_value(handle.status()).expect("numbers and strings");
    assert_eq!(status["state"], "connecting");
    assert_eq!(status["broker"], "mqtt://127.0.0.1:1883");
    assert_eq!(status["client_id"], "noblink-edge-1");
}
