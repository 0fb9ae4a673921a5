//! A bad week in fast motion: cameras, broker and models that come and go, every minute.
#![allow(dead_code)] // for `tests/soak.rs` alone

use std::cell::RefCell;
use std::time::{Duration, Instant};

use noblink::rtsp::{RtspServer, Settings};
use serde_json::Value;

use super::camera::write_clip;
use super::mosquitto::{Message, Mosquitto, Subscriber};
use super::onnx::{Detector, Output};
use super::overload::assert_exact;
use super::service::{Service, config, noblink_output};
use super::{secs, until};

const CAMERAS: usize = 8;
const MINUTE: Duration = secs(60);
/// What a minute may add for good: a connection that is just being closed, a thread that ends.
const SLACK: f64 = 8.0;

/// What the service holds at a minute's end, out of its telemetry.
struct Minute {
    rss_mb: f64,
    fds: f64,
    threads: f64,
}

/// Runs for so many seconds: each minute a swap, then the broker dies and comes back, then half of
/// the cameras do. Every ledger of every telemetry record is exact, and what the service holds does
/// not grow; or it panics.
pub fn run(seconds: u64) {
    gst::init().expect("GStreamer");
    let dir = tempfile::tempdir().expect("a folder");
    let clip = dir.path().join("clip.mp4");
    write_clip(&clip, (320, 240), 5, 50);
    let site = |port: u16| {
        let server = RtspServer::start(&Settings { port, ..Settings::default() });
        let server = server.expect("its port is free");
        server.mount_clip("/clip", &clip, true).expect("a clip");
        server
    };
    let mut sites = [Some(site(0)), Some(site(0))];
    let ports = sites.each_ref().map(|s| s.as_ref().expect("on").port());
    let names: Vec<_> = (0..CAMERAS).map(|n| format!("c{n}")).collect();
    let urls = ports.map(|port| format!("rtsp://127.0.0.1:{port}/clip"));
    let cameras: Vec<_> = names
        .iter()
        .enumerate()
        .map(|(n, name)| (name.as_str(), urls[n % 2].as_str(), "publish = \"all\"\nqueue = 32"))
        .collect();
    let [first, second] = [(320, "first.onnx"), (288, "second.onnx")].map(|(width, name)| {
        let model = Detector { work: 2, ..Detector::new(Output::Yolo8, width, 320) };
        model.write(dir.path(), name)
    });
    let mut broker = Mosquitto::start("");
    // One for each life of the broker: a client may take half a minute to come back by itself.
    let subscribe = |port: u16| Subscriber::new("5", port, "noblink/v1/test/#");
    let heard = RefCell::new((Vec::new(), subscribe(broker.port)));
    let messages = || {
        let (before, subscriber) = &*heard.borrow();
        [before.clone(), subscriber.messages()].concat()
    };
    let models = format!("[models]\nfactory = \"{}\"\nprobation_s = 5\n", first.display());
    let url = format!("url = \"mqtt://127.0.0.1:{}\"", broker.port);
    let mut service = Service::start(&config(&url, &cameras, &models));
    let on = |end: &str| -> Vec<Value> {
        let messages = messages();
        let of = messages.iter().filter(|m| m.topic.ends_with(end));
        of.map(|m| serde_json::from_str(&m.payload).expect("JSON")).collect()
    };
    let file = service.dir.path().join("noblink.toml");
    let command = |args: &[&str]| {
        let config = ["--config", file.to_str().expect("a plain path")];
        let output = noblink_output(&[&["model"], args, &config[..]].concat());
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{args:?}: {said}");
    };
    until("all cameras stream", 60, || {
        let status = on("test/status").pop().unwrap_or_default();
        let cameras = status["cameras"].as_object();
        cameras.is_some_and(|c| c.values().filter(|s| *s == "streaming").count() == CAMERAS)
    });
    command(&["push", second.to_str().expect("a plain path")]);

    println!("\nminute  rss MB   fds  threads  connects  epoch  records");
    let (began, mut minutes) = (Instant::now(), Vec::new());
    while began.elapsed() < secs(seconds) {
        let minute = began + MINUTE * minutes.len() as u32;
        let at = |second: u64| {
            std::thread::sleep((minute + secs(second)).saturating_duration_since(Instant::now()));
        };
        command(&["rollback"]);
        at(20);
        broker.kill();
        at(22);
        broker.restart();
        let before = messages();
        heard.replace((before, subscribe(broker.port)));
        at(35);
        let half = minutes.len() % 2;
        sites[half].take().expect("on").stop();
        at(40);
        sites[half] = Some(site(ports[half]));
        at(59);
        let telemetry = on("/telemetry").pop().expect("one each 10 s");
        let number =
            |path: &str| telemetry.pointer(path).and_then(Value::as_f64).expect("a number");
        let connects = number("/mqtt/connects");
        let [rss_mb, fds, threads] =
            ["rss_mb", "fds", "threads"].map(|k| number(&format!("/host/{k}")));
        let epoch = on("models/state").pop().expect("retained")["active"]["epoch"].clone();
        let records: u64 = telemetry["cameras"]
            .as_object()
            .expect("by id")
            .values()
            .map(|c| c["records"].as_u64().expect("a count"))
            .sum();
        println!(
            "{:>6} {rss_mb:>7.1} {fds:>5} {threads:>8} {connects:>9} {epoch:>6} {records:>8}",
            minutes.len() + 1
        );
        minutes.push(Minute { rss_mb, fds, threads });
        at(60);
    }
    assert_eq!(service.stop().code(), Some(0), "{}", service.log());
    let offline = |m: &Message| m.topic.ends_with("/availability") && m.payload == "offline";
    until("offline", 10, || messages().iter().any(offline));

    let telemetry = on("/telemetry");
    for record in &telemetry {
        names.iter().for_each(|id| assert_exact(id, &record["cameras"][id]["ledger"]));
    }
    let swaps = on("models/swaps");
    let lost: u64 = swaps.iter().map(|s| s["frames_lost"].as_u64().expect("a count")).sum();
    let last = telemetry.last().expect("one at the end");
    println!(
        "{} telemetry records with exact ledgers; {} swaps, {lost} frames lost to them",
        telemetry.len(),
        swaps.len()
    );
    for id in &names {
        let ledger = &last["cameras"][id]["ledger"];
        println!("{id}: {ledger}");
        assert!(ledger["inferred"].as_u64() > Some(seconds), "at 5 frames a second: {ledger}");
    }
    assert!(swaps.len() > minutes.len(), "{} swaps", swaps.len());
    // Warm-up: the first third.
    let (early, late) = (&minutes[minutes.len() / 3], minutes.last().expect("a minute or more"));
    assert!(late.fds <= early.fds + SLACK && late.threads <= early.threads + SLACK, "they grow");
    assert!(late.rss_mb <= 1.1 * early.rss_mb, "{} MB, then {} MB", early.rss_mb, late.rss_mb);
}
