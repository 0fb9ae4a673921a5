//! Against a real Mosquitto that comes and goes.

use crate::harness::link::{BOOT, ROOMY, Running, plain};
use crate::harness::mosquitto::{Message, Mosquitto, Subscriber, publish};
use crate::harness::until;
use noblink::mqtt::outbox::{Bounds, Record};
use noblink::mqtt::status::LinkState;

const ROOT: &str = "noblink/v1/edge-1";

#[test]
fn a_client_that_is_lost_is_offline_by_its_will() {
    let broker = Mosquitto::start("");
    let seen = Subscriber::new("5", broker.port, &format!("{ROOT}/availability"));
    let mut link = Running::start(plain(broker.port));
    until("online", 10, || seen.has(&format!("{ROOT}/availability"), "online"));
    link.vanish();
    until("offline", 10, || seen.has(&format!("{ROOT}/availability"), "offline"));
}

#[test]
fn a_clean_stop_delivers_what_waits_and_says_offline_itself() {
    let broker = Mosquitto::start("");
    let seen = Subscriber::new("5", broker.port, &format!("{ROOT}/#"));
    let mut link = Running::start(plain(broker.port));
    link.connected();
    for seq in 0..500 {
        link.push("gate", seq, &link.topics.detections("gate"), &seq.to_string());
    }
    link.stop();
    assert_eq!(link.status().state, LinkState::Stopped);
    let stats = link.outbox.stats();
    assert_eq!((stats.acked, stats.queued, stats.in_flight), (500, 0, 0));
    // The will would come 5 s later.
    until("offline", 2, || seen.has(&format!("{ROOT}/availability"), "offline"));
    let detections = link.topics.detections("gate");
    let seqs: Vec<_> =
        seen.messages().into_iter().filter(|m| m.topic == *detections).map(|m| m.payload).collect();
    assert_eq!(seqs, (0..500).map(|n| n.to_string()).collect::<Vec<_>>());
    let log = broker.log();
    assert!(log.contains("Received DISCONNECT from noblink-edge-1"), "{log}");
}

#[test]
fn a_stop_without_a_broker_is_at_once() {
    let mut link = Running::start(plain(crate::harness::free_port()));
    link.error();
    let before = std::time::Instant::now();
    link.stop();
    assert!(before.elapsed().as_millis() < 500);
    assert_eq!(link.status().state, LinkState::Stopped);
}

#[test]
fn retained_state_returns_to_a_broker_that_forgot_it() {
    let mut broker = Mosquitto::start("");
    let link = Running::start(plain(broker.port));
    link.board.set(&link.topics.status(), b"first".to_vec());
    link.board.set(&link.topics.camera_status("gate"), b"streaming".to_vec());
    link.connected();
    link.board.set(&link.topics.status(), b"second".to_vec());
    until("all is acknowledged", 5, || {
        let s = link.status();
        s.acked >= 3 && s.inflight == 0 && link.board.is_settled()
    });
    broker.restart();
    until("a second connection", 10, || link.status().connects == 2);
    until("all is acknowledged", 5, || link.status().inflight == 0 && link.board.is_settled());
    let seen = Subscriber::new("5", broker.port, "noblink/#");
    until("three retained messages", 5, || seen.messages().len() == 3);
    assert!(seen.messages().iter().all(|m| m.retained));
    assert!(seen.has(&link.topics.status(), "second"));
    assert!(seen.has(&link.topics.camera_status("gate"), "streaming"));
    assert!(seen.has(&link.topics.availability(), "online"));
}

#[test]
fn telemetry_goes_out_once_and_is_worth_nothing_late() {
    let broker = Mosquitto::start("");
    let seen = Subscriber::new("5", broker.port, "noblink/#");
    let link = Running::start(plain(broker.port));
    let telemetry = link.topics.telemetry();
    link.board.tell(&telemetry, b"offline".to_vec());
    until("online", 10, || seen.has(&link.topics.availability(), "online"));
    link.board.tell(&telemetry, b"live".to_vec());
    until("telemetry", 5, || seen.has(&telemetry, "live"));
    assert!(!seen.has(&telemetry, "offline"));
}

/// The broker's log is the witness, because a subscriber would lose what comes before it is back:
/// each record has a topic of its own here.
#[test]
fn every_record_arrives_in_order_over_kill_9_and_a_lost_session() {
    for receive_maximum in [1_u16, 3, 10] {
        let mut broker = Mosquitto::start(&format!("max_inflight_messages {receive_maximum}"));
        let link = Running::start(plain(broker.port));
        link.connected();
        assert!(link.status().window <= receive_maximum, "{:?}", link.status());
        let total = 3000;
        for seq in 0..total {
            link.push("gate", seq, &format!("{ROOT}/n/{seq}"), "x");
        }
        until("some are acknowledged", 10, || link.outbox.stats().acked > 300);
        broker.kill();
        let lives = received(&broker.log());
        broker.restart();
        link.drained();
        let stats = link.outbox.stats();
        assert!(stats.is_exact() && stats.acked == total, "{stats:?}");

        let all = received(&broker.log());
        let (first, second) = all.split_at(lives.len());
        assert!(!second.is_empty(), "killed too late to show anything");
        assert_eq!(first, (0..first.len() as u64).collect::<Vec<_>>(), "the first life");
        assert_eq!(second, (second[0]..total).collect::<Vec<_>>(), "the second life");
        let again = first.len() as u64 - second[0].min(first.len() as u64);
        assert!(second[0] <= first.len() as u64, "{} lost", second[0] - first.len() as u64);
        assert!(again <= u64::from(receive_maximum), "{again} repeated");
    }
}

/// The numbers of the records that Mosquitto logged as received.
fn received(log: &str) -> Vec<u64> {
    let prefix = format!("'{ROOT}/n/");
    log.lines()
        .filter(|line| line.contains("Received PUBLISH from"))
        .filter_map(|line| line.split_once(&prefix)?.1.split_once('\'')?.0.parse().ok())
        .collect()
}

#[test]
fn a_full_outbox_announces_exactly_what_it_lost() {
    let broker = Mosquitto::start("");
    let seen = Subscriber::new("5", broker.port, &format!("{ROOT}/cameras/#"));
    let bounds = Bounds { records: 100, bytes: 1 << 20 };
    let link = Running::filled(plain(broker.port), bounds, |outbox, topics| {
        for seq in 0..150 {
            for camera in ["gate", "yard"] {
                outbox.push(Record {
                    camera: camera.into(),
                    boot: BOOT.into(),
                    seq,
                    topic: topics.detections(camera),
                    payload: seq.to_string().into(),
                });
            }
        }
        let stats = outbox.stats();
        assert_eq!((stats.pushed, stats.dropped, stats.queued), (300, 200, 100));
        assert_eq!(stats.dropped_by_camera["gate"], 100);
        assert_eq!(stats.gaps, 2);
    });
    link.drained();
    let stats = link.outbox.stats();
    assert!(stats.is_exact() && stats.acked == 100, "{stats:?}");
    until("two gaps and 100 records", 5, || seen.messages().len() == 102);
    for camera in ["gate", "yard"] {
        accounted_for(&seen.messages(), &link.topics.gaps(camera), camera);
    }
}

/// Every `seq` of a camera was either seen or announced as lost, and the announcement came first.
fn accounted_for(messages: &[Message], gaps: &str, camera: &str) {
    let of_camera = format!("/{camera}/");
    let messages: Vec<_> = messages.iter().filter(|m| m.topic.contains(&of_camera)).collect();
    assert_eq!(messages[0].topic, gaps);
    // Every seq was either seen or announced, none both.
    let mut accounted = Vec::new();
    for message in messages {
        if message.topic == gaps {
            let gap: serde_json::Value = serde_json::from_str(&message.payload).expect("JSON");
            assert_eq!(gap["schema"], "noblink.gaps/1");
            assert_eq!(gap["device"], "edge-1");
            assert_eq!(gap["camera"], camera);
            assert_eq!(gap["boot"], BOOT);
            assert_eq!(gap["reason"], "outbox_full");
            let (from, to) = (gap["seq_from"].as_u64().unwrap(), gap["seq_to"].as_u64().unwrap());
            assert_eq!(gap["count"].as_u64().unwrap(), to - from + 1);
            let time: jiff::Timestamp = gap["time"].as_str().unwrap().parse().expect("RFC 3339");
            assert_eq!(time.as_microsecond(), gap["time_us"].as_i64().unwrap());
            accounted.extend(from..=to);
        } else {
            accounted.push(message.payload.parse().expect("a seq"));
        }
    }
    assert_eq!(accounted, (0..150).collect::<Vec<_>>());
}

#[test]
fn commands_come_in_with_what_an_answer_needs() {
    let broker = Mosquitto::start("");
    let filter = format!("{ROOT}/cmd/#");
    let link = Running::with(plain(broker.port), "edge-1", ROOMY, &[&filter, "not/#/valid"]);
    link.connected();
    until("the subscription stands", 5, || link.status().acked >= 1);
    let topic = format!("{ROOT}/cmd/models/rollback");
    let answer = format!("{ROOT}/reply/7");
    let properties = ["-V", "5", "-D", "publish", "response-topic", &answer];
    publish(
        broker.port,
        &[&properties[..], &["-D", "publish", "correlation-data", "c7", "-t", &topic, "-m", "{}"]]
            .concat(),
    );
    let message = link
        .handle
        .inbound()
        .recv_timeout(std::time::Duration::from_secs(5))
        .expect("the command comes in");
    assert_eq!((&*message.topic, &*message.payload), (&*topic, &b"{}"[..]));
    assert!(!message.retained);
    assert_eq!(message.response_topic, Some(answer));
    assert_eq!(message.correlation, Some(b"c7".to_vec()));
    assert_eq!(link.status().refused_filters, ["not/#/valid is no topic filter"]);
}

#[test]
fn commands_that_nobody_takes_are_counted_and_hurt_nothing() {
    let broker = Mosquitto::start("");
    let filter = format!("{ROOT}/cmd/#");
    let link = Running::with(plain(broker.port), "edge-1", ROOMY, &[&filter]);
    until("the subscription stands", 10, || link.status().acked >= 1);
    let topic = format!("{ROOT}/cmd/x");
    let lines = "x\n".repeat(400);
    let file = broker.dir().join("lines");
    std::fs::write(&file, lines).expect("the folder is ours");
    let command = format!(
        "mosquitto_pub -h 127.0.0.1 -p {} -q 1 -t {topic} -l < {}",
        broker.port,
        file.display()
    );
    let status = std::process::Command::new("sh").args(["-c", &command]).status().expect("a shell");
    assert!(status.success());
    until("all came in", 5, || link.status().inbound == 400);
    assert_eq!(link.status().inbound_dropped, 144);
    assert_eq!(link.handle.inbound().len(), 256);
    link.push("gate", 0, &link.topics.detections("gate"), "x");
    link.drained();
}
