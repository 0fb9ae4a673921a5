//! What is wrong is said, in words that help, and nothing stops for it.

use std::io::Read;
use std::net::TcpListener;
use std::process::{Command, Stdio};

use crate::harness::link::{ROOMY, Running, plain};
use crate::harness::mosquitto::{Mosquitto, Subscriber};
use crate::harness::pki::certificates;
use crate::harness::{free_port, until};
use noblink::config::External;
use noblink::mqtt::status::LinkState;

#[track_caller]
fn says(link: &Running, parts: &[&str]) {
    let error = link.error();
    for part in parts {
        assert!(error.contains(part), "\"{part}\" is not in: {error}");
    }
    // Someone reads this: no debug output, no secrets.
    assert!(!error.contains("Some(") && !error.contains("hunter2"), "{error}");
}

#[test]
fn nobody_listens() {
    let port = free_port();
    let link = Running::start(plain(port));
    says(&link, &["nothing listens", &format!("127.0.0.1:{port}"), "is the broker running"]);
    until("back-off", 2, || link.status().state == LinkState::Backoff);
    let retry = link.status().retry_in_s.expect("it says when");
    assert!(retry <= 2.0, "{retry}");
}

#[test]
fn a_name_that_does_not_exist() {
    let broker = External { host: "broker.invalid".into(), ..plain(1883) };
    says(&Running::start(broker), &["broker.invalid", "can't be resolved", "mqtt.url"]);
}

#[test]
fn a_peer_that_accepts_and_says_nothing() {
    let listener = TcpListener::bind("127.0.0.1:0").expect("loopback has a free port");
    let port = listener.local_addr().expect("it is bound").port();
    let link = Running::start(plain(port));
    let (mut socket, _) = listener.accept().expect("the link connects");
    says(&link, &["does not answer"]);
    // And it has let go.
    let mut rest = Vec::new();
    socket.read_to_end(&mut rest).expect("the link closes its end");
    assert!(!rest.is_empty(), "CONNECT came");
}

#[test]
fn a_peer_that_is_no_broker() {
    let listener = TcpListener::bind("127.0.0.1:0").expect("loopback has a free port");
    let port = listener.local_addr().expect("it is bound").port();
    let server = std::thread::spawn(move || {
        use std::io::Write;
        let (mut socket, _) = listener.accept().expect("the link connects");
        let _ = socket.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n");
    });
    says(&Running::start(plain(port)), &[&port.to_string()]);
    server.join().expect("it served");
}

#[test]
fn a_wrong_password() {
    let broker = Mosquitto::with(|dir| {
        let file = dir.join("passwords");
        let made = Command::new("mosquitto_passwd")
            .args(["-c", "-b"])
            .args([&file.display().to_string(), "edge-1", "right"])
            .stderr(Stdio::null())
            .status()
            .expect("mosquitto is installed");
        assert!(made.success());
        std::fs::write(dir.join("secret"), "hunter2\n").expect("the folder is ours");
        format!("password_file {}", file.display())
    });
    let secret = broker.dir().join("secret");
    let settings = External {
        username: Some("edge-1".into()),
        password_file: Some(secret.clone()),
        ..plain(broker.port)
    };
    let link = Running::start(settings.clone());
    says(&link, &["password", "edge-1", &secret.display().to_string()]);
    until("back-off", 2, || link.status().state == LinkState::Backoff);
    assert!(link.status().retry_in_s.expect("it says when") > 55.0, "no hammering");
    drop(link);

    std::fs::write(&secret, "right\n").expect("the folder is ours");
    Running::start(settings.clone()).connected();
    std::fs::remove_file(&secret).expect("it was there");
    says(&Running::start(settings), &["password_file", "can't be read"]);
}

#[test]
fn a_record_that_is_too_large_is_rejected_and_the_rest_flows() {
    let broker = Mosquitto::start("max_packet_size 2000");
    let seen = Subscriber::new("5", broker.port, "noblink/#");
    let link = Running::start(plain(broker.port));
    let detections = link.topics.detections("gate");
    for seq in 0..10 {
        let length = if seq == 4 { 3000 } else { 10 };
        link.push("gate", seq, &detections, &format!("{seq:>length$}"));
    }
    link.drained();
    let stats = link.outbox.stats();
    assert!(stats.is_exact(), "{stats:?}");
    assert_eq!((stats.acked, stats.rejected), (9, 1));
    let over = link.status().oversize.expect("it is named");
    assert_eq!((&*over.topic, over.limit_bytes), (&*detections, 2000));
    assert!(over.size_bytes > 3000 && over.size_bytes < 3100, "{over:?}");
    assert_eq!(link.status().connects, 1);
    let gap = |payload: &str| payload.contains("\"seq_from\":4,\"seq_to\":4,\"count\":1");
    until("the announcement", 5, || {
        seen.messages().iter().any(|m| m.topic == *link.topics.gaps("gate") && gap(&m.payload))
    });
    assert!(seen.messages().iter().any(|m| m.payload.contains("\"reason\":\"too_large\"")));
}

#[test]
fn the_largest_packet_that_the_broker_takes_is_sent() {
    let broker = Mosquitto::start("max_packet_size 2000");
    let link = Running::start(plain(broker.port));
    let detections = link.topics.detections("gate");
    // Fixed header 3, topic length 2, packet id 2, properties 1.
    let fits = 2000 - 8 - detections.len();
    link.push("gate", 0, &detections, &"x".repeat(fits));
    link.push("gate", 1, &detections, &"x".repeat(fits + 1));
    link.drained();
    assert_eq!((link.outbox.stats().acked, link.outbox.stats().rejected), (1, 1));
    assert_eq!(link.status().oversize.expect("the second").size_bytes, 2001);
    assert_eq!(link.status().connects, 1);
}

#[test]
fn a_topic_that_the_broker_forbids_is_rejected_and_the_rest_flows() {
    let broker = Mosquitto::with(|dir| {
        let file = dir.join("acl");
        let rules = "topic write noblink/v1/edge-1/availability\n\
                     topic write noblink/v1/edge-1/cameras/gate/#\n";
        std::fs::write(&file, rules).expect("the folder is ours");
        format!("allow_anonymous true\nacl_file {}", file.display())
    });
    let link = Running::start(plain(broker.port));
    for seq in 0..20 {
        link.push("gate", seq, &link.topics.detections("gate"), "x");
        link.push("yard", seq, &link.topics.detections("yard"), "x");
    }
    link.drained();
    let stats = link.outbox.stats();
    assert!(stats.is_exact(), "{stats:?}");
    assert_eq!((stats.acked, stats.rejected), (20, 20));
    says(&link, &["NotAuthorized", "access list"]);
    assert_eq!(link.status().connects, 1);
}

#[test]
fn two_devices_with_one_id_notice_it_and_stop_fighting() {
    let broker = Mosquitto::start("");
    let one = Running::with(plain(broker.port), "edge-1", ROOMY, &[]);
    one.connected();
    let two = Running::with(plain(broker.port), "edge-1", ROOMY, &[]);
    let resigned = |link: &&Running| link.status().retry_in_s.is_some_and(|s| s > 30.0);
    let links = [&one, &two];
    until("one of them backs off for long", 15, || links.iter().any(resigned));
    let loser = links.into_iter().find(|l| resigned(l)).expect("waited for");
    says(loser, &["\"noblink-edge-1\"", "another client", "device.id"]);
}

fn tls_broker(server: &str, options: &str) -> (Mosquitto, External) {
    let broker = Mosquitto::with(|dir| {
        certificates(dir);
        let dir = dir.display();
        format!(
            "allow_anonymous true\ncafile {dir}/ca.pem\ncertfile {dir}/{server}.pem\n\
             keyfile {dir}/{server}.key\n{options}"
        )
    });
    let settings = External {
        host: "localhost".into(),
        tls: true,
        ca_file: Some(broker.dir().join("ca.pem")),
        ..plain(broker.port)
    };
    (broker, settings)
}

#[test]
fn tls_with_our_own_ca_and_a_client_certificate() {
    let (broker, settings) = tls_broker("server", "require_certificate true");
    let dir = broker.dir();
    let pair = |cert: &str, key: &str| Some((dir.join(cert), dir.join(key)));
    let ours = External { client_cert: pair("client.pem", "client.key"), ..settings.clone() };
    let link = Running::start(ours.clone());
    link.connected();
    assert_eq!(link.status().broker, format!("mqtts://localhost:{}", broker.port));
    link.push("gate", 0, &link.topics.detections("gate"), "x");
    link.drained();
    drop(link);

    says(&Running::start(settings.clone()), &["refuses TLS", "mqtt.client_cert_file"]);
    let wrong_key = External { client_cert: pair("client.pem", "server.key"), ..settings.clone() };
    says(&Running::start(wrong_key), &["server.key", "not the key of", "client.pem"]);
    let no_key = External { client_cert: pair("client.pem", "client.pem"), ..settings.clone() };
    says(&Running::start(no_key), &["client_key_file", "holds no private key"]);
    let no_file = External { client_cert: pair("none.pem", "client.key"), ..settings };
    says(&Running::start(no_file), &["client_cert_file", "none.pem", "can't be read"]);
}

#[test]
fn tls_that_must_not_be_trusted() {
    let (broker, settings) = tls_broker("server", "");
    let dir = broker.dir();
    let stranger = External { ca_file: Some(dir.join("stranger.pem")), ..settings.clone() };
    says(&Running::start(stranger), &["unknown CA", "stranger.pem"]);
    let system = External { ca_file: None, ..settings.clone() };
    says(&Running::start(system), &["mqtt.ca_file"]);
    let elsewhere = External { host: "127.0.0.1".into(), ..settings.clone() };
    says(&Running::start(elsewhere), &["not for the name 127.0.0.1", "localhost"]);
    let no_ca = External { ca_file: Some(dir.join("client.key")), ..settings.clone() };
    says(&Running::start(no_ca), &["ca_file", "holds no certificate"]);
    let in_clear = External { tls: false, ca_file: None, ..settings };
    says(&Running::start(in_clear), &["mqtts://"]);
    let open = Mosquitto::start("");
    let ca_file = Some(dir.join("ca.pem"));
    let too_much = External { host: "localhost".into(), tls: true, ca_file, ..plain(open.port) };
    says(&Running::start(too_much), &["TLS", "mqtt://"]);
}

#[test]
fn tls_with_an_expired_certificate() {
    let (_broker, settings) = tls_broker("expired", "");
    says(&Running::start(settings), &["has expired", "clock"]);
}
