//! The whole: cameras in, records out, by the real program, real RTSP and a real broker.

use std::collections::BTreeMap;
use std::io::Write;
use std::os::unix::net::UnixDatagram;
use std::process::{Command, Stdio};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use noblink::rtsp::{self, RtspServer};
use serde_json::Value;

use crate::harness::mosquitto::{Message, Mosquitto, Subscriber};
use crate::harness::overload::{ONE_FAST_FIVE_SLOW, Run};
use crate::harness::schema::{assert_valid, validator};
use crate::harness::service::{Service, config, noblink, plates, shipped};
use crate::harness::{free_port, until};

/// The demo's two cameras.
fn cameras() -> (RtspServer, [String; 2]) {
    let server = RtspServer::start(&rtsp::Settings::default()).unwrap();
    let url = |name: &str| {
        let clip = shipped(&format!("models/clips/{name}.mp4"));
        server.mount_clip(&format!("/{name}"), &clip, true).unwrap();
        server.url(&format!("/{name}"))
    };
    let urls = [url("line-a"), url("line-b")];
    (server, urls)
}

fn broker_of(broker: &Mosquitto) -> String {
    format!("url = \"mqtt://127.0.0.1:{}\"", broker.port)
}

fn on<'a>(messages: &'a [Message], end: &'a str) -> impl Iterator<Item = &'a Message> {
    messages.iter().filter(move |m| m.topic.ends_with(end))
}

fn records(subscriber: &Subscriber, camera: &str) -> Vec<Message> {
    let topic = format!("noblink/v1/test/cameras/{camera}/detections");
    subscriber.messages().into_iter().filter(|m| m.topic == topic).collect()
}

/// What `examples/ledger.py` makes of the records, by camera.
fn rebuilt(messages: &[Message]) -> BTreeMap<String, Value> {
    let mut script = Command::new("python3")
        .arg(shipped("examples/ledger.py"))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("python3 is installed");
    let mut input = script.stdin.take().unwrap();
    for message in on(messages, "/detections") {
        writeln!(input, "{}", message.payload).unwrap();
    }
    drop(input);
    let output = script.wait_with_output().unwrap();
    assert!(output.status.success());
    let lines = String::from_utf8(output.stdout).unwrap();
    let parse = |line: &str| serde_json::from_str::<Value>(line).unwrap();
    let key = |book: Value| (book["camera"].as_str().unwrap().to_owned(), book);
    lines.lines().map(parse).map(key).collect()
}

#[test]
fn two_cameras_reach_a_subscriber_and_every_record_is_as_described() {
    let broker = Mosquitto::start("");
    let (_server, [a, b]) = cameras();
    let subscribers = ["311", "5"].map(|v| Subscriber::new(v, broker.port, "noblink/v1/test/#"));
    // One camera with every frame, one with objects only, thinned out so that frames go untold.
    let cameras = [
        ("all", a.as_str(), "publish = \"all\""),
        ("some", b.as_str(), "publish_max_hz = 3\nlabels = [\"plate\"]\nmax_fps = 8"),
    ];
    let mut service = Service::start(&config(&broker_of(&broker), &cameras, &plates()));
    until("telemetry and records of both cameras", 40, || {
        subscribers.iter().all(|s| {
            let enough = |camera| records(s, camera).len() >= 20;
            enough("all") && enough("some") && on(&s.messages(), "/telemetry").count() > 0
        })
    });
    assert_eq!(service.stop().code(), Some(0), "{}", service.log());
    until("offline", 5, || {
        subscribers.iter().all(|s| s.has("noblink/v1/test/availability", "offline"))
    });

    for subscriber in &subscribers {
        let messages = subscriber.messages();
        let schema = validator("detections");
        let mut labels = BTreeMap::<String, usize>::new();
        for message in on(&messages, "/detections") {
            let record = assert_valid(&schema, message);
            for object in record["objects"].as_array().unwrap() {
                let key = format!("{} {}", record["camera"], object["label"]).replace('"', "");
                *labels.entry(key).or_default() += 1;
            }
        }
        assert!(labels["all plate"] > 20 && labels.contains_key("all dent"), "{labels:?}");
        assert!(!labels.contains_key("some dent"), "labels = [\"plate\"]: {labels:?}");
        for (end, name) in [("/status", "status"), ("/telemetry", "telemetry")] {
            let schema = validator(name);
            let of_device = on(&messages, end).filter(|m| !m.topic.contains("/cameras/"));
            let valid: Vec<_> = of_device.map(|m| assert_valid(&schema, m)).collect();
            assert!(!valid.is_empty(), "no {name}");
        }
        let schema = validator("camera");
        let mut states: Vec<_> = on(&messages, "/status")
            .filter(|m| m.topic.contains("/cameras/all/"))
            .map(|m| assert_valid(&schema, m)["state"].as_str().unwrap().to_owned())
            .collect();
        states.dedup();
        assert_eq!(states, ["connecting", "streaming"]);

        let books = rebuilt(&messages);
        for (camera, book) in &books {
            assert_eq!((&book["frames_lost"], &book["missing_records"]), (&0.into(), &0.into()));
            assert_eq!(book["first_frame"], 0, "{camera}");
        }
        assert!(books["some"]["inferred"].as_u64() > books["some"]["records"].as_u64());
        // The service's own ledger, from its last telemetry, agrees.
        let telemetry = on(&messages, "/telemetry").last().unwrap();
        let telemetry: Value = serde_json::from_str(&telemetry.payload).unwrap();
        let ledger = &telemetry["cameras"]["all"]["ledger"];
        assert_eq!(ledger["inferred"], books["all"]["inferred"], "{ledger} {}", books["all"]);
        assert!(telemetry["cameras"]["some"]["ledger"]["rate_limited"].as_u64() > Some(0));
    }
}

#[test]
fn a_killed_service_is_offline_within_ten_seconds() {
    let broker = Mosquitto::start("");
    let subscriber = Subscriber::new("5", broker.port, "noblink/v1/test/availability");
    let cameras = [("gate", "test://?fps=5", "")];
    let mut service = Service::start(&config(&broker_of(&broker), &cameras, &plates()));
    until("online", 20, || subscriber.has("noblink/v1/test/availability", "online"));
    service.kill();
    until("offline", 10, || subscriber.has("noblink/v1/test/availability", "offline"));
}

#[test]
fn the_broker_inside_serves_both_versions() {
    let port = free_port();
    let mqtt = format!("embedded = true\nembedded_port = {port}");
    let cameras = [("gate", "test://?fps=10&width=320&height=240", "publish = \"all\"")];
    let mut service = Service::start(&config(&mqtt, &cameras, &plates()));
    service.says("streaming", 20);
    let schema = validator("detections");
    for version in ["311", "5"] {
        let subscriber = Subscriber::new(version, port, "noblink/v1/test/#");
        until("records", 20, || records(&subscriber, "gate").len() >= 10);
        records(&subscriber, "gate").iter().for_each(|m| drop(assert_valid(&schema, m)));
        let retained = subscriber.messages().into_iter().filter(|m| m.retained);
        let topics: Vec<_> = retained.map(|m| m.topic.replace("noblink/v1/test/", "")).collect();
        for topic in ["availability", "status", "cameras/gate/status"] {
            assert!(topics.iter().any(|t| t == topic), "{topic} is not retained: {topics:?}");
        }
    }
    assert_eq!(service.stop().code(), Some(0));
}

#[test]
fn without_a_model_it_runs_and_says_what_to_do() {
    let broker = Mosquitto::start("");
    let subscriber = Subscriber::new("5", broker.port, "noblink/v1/test/#");
    let cameras = [("gate", "test://?fps=10", "")];
    let mut service = Service::start(&config(&broker_of(&broker), &cameras, ""));
    service.says("no model yet: put an ONNX file into", 20);
    let mut status = None;
    until("the camera streams", 20, || {
        let messages = subscriber.messages();
        let last = on(&messages, "test/status").last().cloned();
        status = last.map(|m| assert_valid(&validator("status"), &m));
        status.as_ref().is_some_and(|s| s["cameras"]["gate"] == "streaming")
    });
    let status = status.unwrap();
    assert!(status["model"].is_null());
    assert!(status["advice"].as_str().unwrap().contains("noblink model push"), "{status}");
    assert_eq!(service.stop().code(), Some(0));
    let messages = subscriber.messages();
    let telemetry: Value =
        serde_json::from_str(&on(&messages, "/telemetry").last().unwrap().payload).unwrap();
    let ledger = &telemetry["cameras"]["gate"]["ledger"];
    assert!(ledger["dropped"]["no_model"].as_u64() > Some(0), "{ledger}");
    assert_eq!(ledger["inferred"], 0);
}

#[test]
fn a_model_that_is_refused_stands_in_the_status_with_its_reason() {
    let broker = Mosquitto::start("");
    let subscriber = Subscriber::new("5", broker.port, "noblink/v1/test/status");
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("best.onnx");
    std::fs::write(&file, "<!DOCTYPE html><title>404</title>").unwrap();
    let models = format!("[models]\nfactory = \"{}\"\n", file.display());
    let cameras = [("gate", "test://", "")];
    let mut service = Service::start(&config(&broker_of(&broker), &cameras, &models));
    service.says("no model yet", 20);
    until("the reason", 10, || {
        subscriber.messages().iter().any(|m| m.payload.contains("is a web page, not ONNX"))
    });
    assert_eq!(service.stop().code(), Some(0));
}

#[test]
fn it_starts_with_every_camera_down_and_takes_them_as_they_come() {
    let broker = Mosquitto::start("");
    let subscriber = Subscriber::new("5", broker.port, "noblink/v1/test/#");
    let port = free_port();
    let url = format!("rtsp://127.0.0.1:{port}/line-b");
    let cameras = [("late", url.as_str(), ""), ("never", "rtsp://127.0.0.1:9/x", "")];
    let mut service = Service::start(&config(&broker_of(&broker), &cameras, &plates()));
    service.says("camera late: backoff", 20);
    let server = RtspServer::start(&rtsp::Settings { port, ..Default::default() }).unwrap();
    server.mount_clip("/line-b", &shipped("models/clips/line-b.mp4"), true).unwrap();
    until("records of the late camera", 40, || records(&subscriber, "late").len() >= 5);
    assert_eq!(service.stop().code(), Some(0), "{}", service.log());
}

/// The short form of `make soak`.
#[test]
fn a_camera_of_60_fps_leaves_five_of_5_fps_their_fair_share() {
    Run::of(&ONE_FAST_FIVE_SLOW, 21).assert_fair();
}

#[test]
fn a_port_that_is_taken_is_named() {
    let broker = Mosquitto::start("");
    let mqtt = format!("embedded = true\nembedded_port = {}", broker.port);
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("noblink.toml");
    std::fs::write(&file, config(&mqtt, &[("gate", "test://", "")], "")).unwrap();
    let output =
        crate::harness::service::noblink_output(&["run", "--config", file.to_str().unwrap()]);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains(&format!("port {} on 127.0.0.1 is in use", broker.port)), "{said}");
}

/// What systemd's socket hears: ready only when the broker was tried, a useful line, the watchdog.
#[test]
fn systemd_is_told_when_it_is_ready_how_it_goes_and_that_it_is_alive() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("notify");
    let socket = UnixDatagram::bind(&path).unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
    let mqtt = format!("url = \"mqtt://127.0.0.1:{}\"", free_port());
    let cameras = [("bars", "test://", "")];
    let file = dir.path().join("noblink.toml");
    std::fs::write(&file, config(&mqtt, &cameras, &plates())).unwrap();
    let mut child = noblink(&["run", "--config", file.to_str().unwrap()])
        .env("NOTIFY_SOCKET", &path)
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut heard = String::new();
    let mut until_heard = |what: &str| {
        while !heard.contains(what) {
            let mut datagram = [0; 4096];
            let length = socket.recv(&mut datagram).unwrap_or_else(|e| panic!("{e}:\n{heard}"));
            heard += std::str::from_utf8(&datagram[..length]).unwrap();
            heard += "\n";
        }
        heard.clone()
    };
    until_heard("READY=1");
    until_heard("STATUS=plates 1 (epoch 1), 1 of 1 cameras streaming, broker away");
    until_heard("WATCHDOG=1");
    kill(Pid::from_raw(child.id() as i32), Signal::SIGTERM).unwrap();
    until_heard("STOPPING=1");
    assert_eq!(child.wait().unwrap().code(), Some(0));
}
