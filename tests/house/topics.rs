//! `counts` and `snapshot`.

use std::process::{Command, Stdio};

use noblink::rtsp::{self, RtspServer};
use serde_json::Value;

use crate::harness::line::Line;
use crate::harness::mosquitto::{Mosquitto, Subscriber, publish};
use crate::harness::schema::{assert_valid, validator};
use crate::harness::service::{Service, config, plates, shipped};
use crate::harness::until;

const COUNTS: &str = "noblink/v1/test/cameras/line/counts";

fn counts(subscriber: &Subscriber) -> Vec<Value> {
    let schema = validator("counts");
    let messages = subscriber.messages();
    let of = messages.iter().filter(|m| m.topic == COUNTS && !m.payload.is_empty());
    of.map(|m| assert_valid(&schema, m)).collect()
}

/// Objects of a label in a record.
fn seen(record: &Value, label: &str) -> u64 {
    let objects = record["objects"].as_array().unwrap();
    objects.iter().filter(|o| o["label"] == label).count() as u64
}

#[test]
fn counts_are_what_the_records_say_once_a_second_and_go_with_the_camera() {
    let line = Line::start("");
    until("counts that change", 40, || {
        counts(&line.subscriber).iter().filter(|c| c["total"].as_u64() > Some(0)).count() >= 5
    });
    let (told, records) = (counts(&line.subscriber), line.messages("/detections"));
    assert_eq!((&told[0]["objects"], &told[0]["total"]), (&Value::Null, &Value::Null), "at first");
    for pair in told.windows(2) {
        let apart_us = pair[1]["time_us"].as_i64().unwrap() - pair[0]["time_us"].as_i64().unwrap();
        assert!(apart_us > 900_000, "{pair:?}");
        assert_ne!(pair[0]["objects"], pair[1]["objects"], "told without a change");
    }
    for count in told.iter().filter(|c| !c["objects"].is_null()) {
        let (at_us, objects) = (count["time_us"].as_i64().unwrap(), &count["objects"]);
        let sum: u64 = objects.as_object().unwrap().values().map(|n| n.as_u64().unwrap()).sum();
        assert_eq!(count["total"], sum);
        let near = |r: &&Value| (at_us - r["time_us"].as_i64().unwrap()).abs() < 3_000_000;
        let near: Vec<_> = records.iter().filter(near).collect();
        for (label, count) in objects.as_object().unwrap() {
            let is_seen = near.iter().any(|r| seen(r, label) == *count);
            assert!(is_seen, "{count} {label:?} at {at_us} stand in no record");
        }
    }
    // Who comes later hears the latest.
    let late = Subscriber::new("5", line.broker.port, COUNTS);
    until("the retained counts", 10, || late.messages().iter().any(|m| m.retained));

    let switch = "noblink/v1/test/cmd/cameras/line/enabled";
    publish(line.broker.port, &["-t", switch, "-m", "OFF"]);
    until("nobody looks", 10, || {
        counts(&late).last().is_some_and(|c| c["objects"].is_null() && c["total"].is_null())
    });
    publish(line.broker.port, &["-t", switch, "-m", "ON"]);
    until("counts again", 30, || counts(&late).last().is_some_and(|c| !c["objects"].is_null()));

    let without = line.config.split("[[camera]]").next().unwrap().to_owned();
    let rest = line.config.split_once("[models]").unwrap().1;
    line.service.reload(&format!("{without}[models]{rest}"));
    until("the counts are cleared", 20, || {
        late.messages().last().is_some_and(|m| m.topic == COUNTS && m.payload.is_empty())
    });
    assert!(line.subscriber.last("/snapshot").is_none(), "off by default");
}

/// A picture as `mosquitto_sub` tells it: its user property, then its bytes in hexadecimal.
fn picture(line: &str) -> (String, Vec<u8>) {
    let (event, hex) = line.rsplit_once(' ').unwrap();
    let byte = |at: usize| u8::from_str_radix(&hex[at..at + 2], 16).unwrap();
    let event = event.strip_prefix("event:").expect("the user property").to_owned();
    (event, (0..hex.len()).step_by(2).map(byte).collect())
}

#[test]
fn a_snapshot_is_a_jpeg_of_the_record_that_it_names() {
    let broker = Mosquitto::start("");
    let server = RtspServer::start(&rtsp::Settings::default()).unwrap();
    server.mount_clip("/a", &shipped("models/clips/line-a.mp4"), true).unwrap();
    let records = Subscriber::new("5", broker.port, "noblink/v1/test/cameras/line/detections");
    let pictures = Command::new("mosquitto_sub")
        .args(["-V", "5", "-h", "127.0.0.1", "-p", &broker.port.to_string(), "-q", "1"])
        .args(["-t", "noblink/v1/test/cameras/line/snapshot", "-C", "3", "-W", "60"])
        .args(["-F", "%P %x"])
        .stdout(Stdio::piped())
        .spawn()
        .expect("mosquitto-clients is installed");
    let mqtt = format!("url = \"mqtt://127.0.0.1:{}\"", broker.port);
    let cameras = [("line", &*server.url("/a"), "snapshot_interval_s = 2\nqueue = 32")];
    let mut service = Service::start(&config(&mqtt, &cameras, &plates()));
    let told = pictures.wait_with_output().unwrap();
    assert!(told.status.success(), "three pictures within a minute:\n{}", service.log());
    assert_eq!(service.stop().code(), Some(0), "{}", service.log());

    let messages = records.messages();
    let records: Vec<Value> =
        messages.iter().map(|m| serde_json::from_str(&m.payload).unwrap()).collect();
    let mut times = Vec::new();
    for line in String::from_utf8(told.stdout).unwrap().lines() {
        let (event, jpeg) = picture(line);
        let name = |r: &&Value| {
            format!("{}-{}", r["boot"].as_str().unwrap(), r["seq"].as_u64().unwrap()) == event
        };
        let record = records.iter().find(name).unwrap_or_else(|| panic!("no record {event}"));
        assert!(!record["objects"].as_array().unwrap().is_empty(), "{record}");
        times.push(record["time_us"].as_i64().unwrap());
        assert!(jpeg.starts_with(&[0xff, 0xd8]) && jpeg.ends_with(&[0xff, 0xd9]), "{event}");
        // The frame header: height and width, big end first.
        let header = jpeg.windows(2).position(|w| w == [0xff, 0xc0]).expect("a baseline JPEG");
        assert_eq!(jpeg[header + 5..header + 9], [360_u16, 640].map(u16::to_be_bytes).concat());
        assert!((2_000..100_000).contains(&jpeg.len()), "{} bytes", jpeg.len());
    }
    assert!(times.windows(2).all(|t| t[1] - t[0] > 1_500_000), "every two seconds: {times:?}");
}
