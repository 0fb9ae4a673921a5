//! The broker inside, read by clients that are not ours.

use std::net::SocketAddr;
use std::sync::mpsc;
use std::thread::JoinHandle;

use crate::harness::link::Running;
use crate::harness::mosquitto::{Subscriber, publish};
use crate::harness::{free_port, until};
use noblink::mqtt::broker::{EmbeddedBroker, StartError};
use tokio::sync::oneshot;

/// The broker on a runtime of its own.
struct Inside {
    address: SocketAddr,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Inside {
    fn start() -> Self {
        Self::on(0).expect("it starts")
    }

    fn on(port: u16) -> Result<Self, StartError> {
        let (stop, stopped) = oneshot::channel();
        let (tell, told) = mpsc::channel();
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            runtime.expect("a runtime").block_on(async {
                let started = EmbeddedBroker::start(port).await;
                let started = started.map(|(broker, address)| {
                    tell.send(Ok(address)).expect("the test waits");
                    broker
                });
                match started {
                    Ok(broker) => {
                        let _ = stopped.await;
                        broker.stop().await;
                    }
                    Err(e) => tell.send(Err(e)).expect("the test waits"),
                }
            });
        });
        let address = told.recv().expect("an answer")?;
        Ok(Self { address, stop: Some(stop), thread: Some(thread) })
    }

    fn stop(&mut self) {
        self.stop.take();
        if let Some(thread) = self.thread.take() {
            thread.join().expect("it stops");
        }
    }
}

impl Drop for Inside {
    fn drop(&mut self) {
        self.stop();
    }
}

#[test]
fn both_protocol_versions_read_retained_and_live_on_one_port() {
    let inside = Inside::start();
    let port = inside.address.port();
    assert!(inside.address.ip().is_loopback());
    let mut link = Running::start(EmbeddedBroker::reached_at(inside.address));
    link.board.set(&link.topics.status(), b"here".to_vec());
    until("the state is there", 10, || link.status().acked >= 2);
    let readers = [Subscriber::new("311", port, "noblink/#"), Subscriber::new("5", port, "#")];
    link.push("gate", 0, &link.topics.detections("gate"), "seen");
    for reader in &readers {
        until("the detection", 5, || reader.has(&link.topics.detections("gate"), "seen"));
        until("the state", 5, || reader.has(&link.topics.status(), "here"));
        let messages = reader.messages();
        let retained = |topic: &str| messages.iter().find(|m| m.topic == topic).map(|m| m.retained);
        assert_eq!(retained(&link.topics.status()), Some(true));
        assert_eq!(retained(&link.topics.detections("gate")), Some(false));
        assert!(!messages.iter().any(|m| m.topic.starts_with("$SYS")));
    }
    link.stop();
    until("offline", 5, || readers[0].has(&link.topics.availability(), "offline"));
}

#[test]
fn a_lost_link_is_offline_by_its_will_here_too() {
    let inside = Inside::start();
    let reader = Subscriber::new("5", inside.address.port(), "noblink/#");
    let mut link = Running::start(EmbeddedBroker::reached_at(inside.address));
    until("online", 10, || reader.has(&link.topics.availability(), "online"));
    link.vanish();
    until("offline", 10, || reader.has(&link.topics.availability(), "offline"));
}

#[test]
fn large_and_many_messages_go_through() {
    let inside = Inside::start();
    let reader = Subscriber::new("5", inside.address.port(), "noblink/#");
    let link = Running::start(EmbeddedBroker::reached_at(inside.address));
    let large = "x".repeat(400_000);
    let snapshot = format!("{}/cameras/gate/snapshot", link.topics.root());
    link.push("gate", 0, &snapshot, &large);
    let detections = link.topics.detections("gate");
    for seq in 1..=5000 {
        link.push("gate", seq, &detections, &seq.to_string());
    }
    link.drained();
    assert_eq!(link.outbox.stats().acked, 5001);
    until("the large one", 5, || reader.has(&snapshot, &large));
    until("all of the others", 10, || reader.has(&detections, "5000"));
    let seqs: Vec<_> = reader
        .messages()
        .into_iter()
        .filter(|m| m.topic == *detections)
        .map(|m| m.payload)
        .collect();
    assert_eq!(seqs, (1..=5000).map(|n| n.to_string()).collect::<Vec<_>>());
    // And in the other direction.
    publish(inside.address.port(), &["-V", "311", "-t", "noblink/other", "-m", "hello"]);
    until("the other way", 5, || reader.has("noblink/other", "hello"));
}

#[test]
fn a_busy_port_is_named_with_both_ways_out() {
    let other = std::net::TcpListener::bind("127.0.0.1:0").expect("loopback has a free port");
    let port = other.local_addr().expect("it is bound").port();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let error = runtime
        .expect("a runtime")
        .block_on(EmbeddedBroker::start(port))
        .map(|_| ())
        .expect_err("the port is taken")
        .to_string();
    for part in
        [&format!("port {port} "), "mqtt.embedded_port", &format!("mqtt://127.0.0.1:{port}")]
    {
        assert!(error.contains(part), "{error}");
    }
}

#[test]
fn it_stops_and_its_port_is_free_again() {
    let mut inside = Inside::on(free_port()).expect("it starts");
    let port = inside.address.port();
    let link = Running::start(EmbeddedBroker::reached_at(inside.address));
    link.connected();
    inside.stop();
    let mut again = None;
    // Children that other tests fork hold its socket until they have become another program.
    until("the port is free", 5, || {
        again = Inside::on(port).ok();
        again.is_some()
    });
    until("the link comes back", 15, || link.status().connects == 2);
}
