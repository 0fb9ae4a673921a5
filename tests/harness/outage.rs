//! A broker that is killed under load: what was lost, and how long it took to recover.
//!
//! noblink reaches the broker through a door that opens only after the recorder has subscribed
//! again: what the broker acknowledges then, the recorder gets, or the broker died with it.
#![allow(dead_code)] // what only `tests/soak.rs` uses

use std::collections::{BTreeMap, HashSet};
use std::time::{Duration, Instant};

use serde_json::Value;

use super::mosquitto::{Mosquitto, Subscriber};
use super::onnx::{Detector, Output};
use super::relay::{Key, Relay, key};
use super::service::{Service, config};
use super::until;

const CAMERAS: [&str; 3] = ["a", "b", "c"];
const FPS: u64 = 20;
/// QoS 1 messages that may be out at once, by Mosquitto's default.
const RECEIVE_MAX: usize = 20;

/// One kill.
struct Case {
    down_s: u64,
    /// Records that the recorder had when the broker died, and once all was well again.
    from: usize,
    to: usize,
    recovered: Duration,
}

/// Three cameras of 20 records a second over a broker that is killed with -9 for so many seconds,
/// once for each. Prints a table and panics if a record is missing that no broker acknowledged.
pub fn outages(down_s: &[u64], broker_remembers: bool, calm_s: u64) {
    let mut broker = if broker_remembers { Mosquitto::remembering() } else { Mosquitto::start("") };
    let relay = Relay::to(broker.port);
    let dir = tempfile::tempdir().unwrap();
    let model = Detector::new(Output::Yolo8, 64, 64).write(dir.path(), "small.onnx");
    let url = format!("test://?fps={FPS}&width=160&height=128");
    let cameras = CAMERAS.map(|id| (id, url.as_str(), "publish = \"all\""));
    let mqtt = format!("url = \"mqtt://127.0.0.1:{}\"", relay.port);
    let models = format!("[models]\nfactory = \"{}\"\n", model.display());
    let mut recorder = Recorder::new(broker.port);
    let mut service = Service::start(&config(&mqtt, &cameras, &models));

    recorder.until_live(40);
    let (calm_from, written) = (recorder.records().len(), bytes_written(service.pid()));
    sleep(calm_s);
    let calm = recorder.rate(calm_from, recorder.records().len());
    let per_day = (bytes_written(service.pid()) - written) as f64 / calm_s as f64 * 86_400.0 / 1e6;
    println!("\nwritten to disk with the broker up: {per_day:.1} MB a day, by {calm_s} s of it");
    assert!(per_day <= 200.0, "{per_day} MB a day");
    let mut cases = Vec::new();
    for down_s in down_s {
        let from = recorder.records().len();
        broker.kill();
        relay.open(false);
        sleep(*down_s);
        broker.restart();
        recorder.again(broker.port);
        relay.open(true);
        let opened = Instant::now();
        // The longest pause between two attempts is a minute.
        recorder.until_live(90);
        let (recovered, to) = (opened.elapsed(), recorder.records().len());
        cases.push(Case { down_s: *down_s, from, to, recovered });
        sleep(2);
    }
    assert_eq!(service.stop().code(), Some(0), "{}", service.log());
    recorder.until_offline();
    report(&recorder, &relay.acked(), &cases, calm, broker_remembers);
}

/// What a process made the kernel write to disks.
fn bytes_written(process: u32) -> u64 {
    let io = std::fs::read_to_string(format!("/proc/{process}/io")).unwrap();
    io.lines().find_map(|l| l.strip_prefix("write_bytes: ")).unwrap().parse().unwrap()
}

fn sleep(seconds: u64) {
    std::thread::sleep(Duration::from_secs(seconds));
}

/// What the subscribers of all lives of the broker got, in order.
struct Recorder {
    before: Vec<Value>,
    now: Subscriber,
}

impl Recorder {
    fn new(broker: u16) -> Self {
        Self { before: Vec::new(), now: Subscriber::new("5", broker, "noblink/v1/test/#") }
    }

    fn again(&mut self, broker: u16) {
        self.before = self.messages();
        self.now = Subscriber::new("5", broker, "noblink/v1/test/#");
    }

    fn messages(&self) -> Vec<Value> {
        let parse = |m: super::mosquitto::Message| serde_json::from_str(&m.payload).ok();
        self.before
            .iter()
            .cloned()
            .chain(self.now.messages().into_iter().filter_map(parse))
            .collect()
    }

    fn of(&self, schema: &str) -> Vec<Value> {
        self.messages().into_iter().filter(|m| m["schema"] == schema).collect()
    }

    fn records(&self) -> Vec<Value> {
        self.of("noblink.detections/1")
    }

    /// Waits for a record of each camera that is younger than a second.
    fn until_live(&self, seconds: u64) {
        until("live records of all cameras", seconds, || {
            // Reading them all takes a core from whom it measures.
            std::thread::sleep(Duration::from_millis(200));
            let records = self.records();
            let second_ago = jiff::Timestamp::now().as_microsecond() - 1_000_000;
            CAMERAS.iter().all(|c| {
                let last = records.iter().rev().find(|r| r["camera"] == **c);
                last.is_some_and(|r| r["time_us"].as_i64().unwrap() > second_ago)
            })
        });
    }

    fn until_offline(&self) {
        until("offline", 10, || self.now.has("noblink/v1/test/availability", "offline"));
    }

    /// Frames inferred a second, by the capture times of some of the records.
    fn rate(&self, from: usize, to: usize) -> f64 {
        let records = self.records();
        let keys: HashSet<Key> = records[from..to].iter().map(key).collect();
        let times = || records[from..to].iter().map(|r| r["time_us"].as_i64().unwrap());
        keys.len() as f64 * 1e6 / (times().max().unwrap() - times().min().unwrap()) as f64
    }
}

fn report(recorder: &Recorder, acked: &HashSet<Key>, cases: &[Case], calm: f64, remembers: bool) {
    let store = if remembers { "kept" } else { "lost" };
    println!("\nbroker killed with -9, its sessions {store}; {calm:.1} frames/s inferred before");
    println!("down for   records   recovered in   frames/s inferred   of undisturbed");
    let mut worst = f64::MAX;
    for case in cases {
        let rate = recorder.rate(case.from, case.to);
        worst = worst.min(rate / calm);
        println!(
            "{:>6} s {:>10} {:>12.1} s {rate:>19.1} {:>16.3}",
            case.down_s,
            case.to - case.from,
            case.recovered.as_secs_f64(),
            rate / calm
        );
    }
    let records = recorder.records();
    let mut first: BTreeMap<(String, String), Vec<u64>> = BTreeMap::new();
    let mut seen: HashSet<Key> = HashSet::new();
    for record in &records {
        let (camera, boot, seq) = key(record);
        if seen.insert((camera.clone(), boot.clone(), seq)) {
            first.entry((camera, boot)).or_default().push(seq);
        }
    }
    let telemetry = recorder.of("noblink.telemetry/1");
    let last = telemetry.last().expect("the last word of the service");
    let (mut lost, mut died_with, mut tried) = (Vec::new(), Vec::new(), 0);
    for ((camera, boot), seqs) in &first {
        assert!(seqs.is_sorted(), "camera {camera}: not in order");
        let written = last["cameras"][camera]["records"].as_u64().unwrap();
        tried += written;
        let key = |seq| (camera.clone(), boot.clone(), seq);
        let missing = (0..written).map(key).filter(|k| !seen.contains(k));
        let (with, without): (Vec<_>, Vec<_>) = missing.partition(|k| acked.contains(k));
        died_with.extend(with);
        lost.extend(without);
    }
    println!(
        "{tried} records written, {} received, {} of them twice; not acknowledged and missing: {}; \
         acknowledged by a broker that then died: {} {died_with:?}",
        records.len(),
        records.len() - seen.len(),
        lost.len(),
        died_with.len(),
    );
    assert_eq!(first.len(), CAMERAS.len(), "one life, three cameras");
    assert!(lost.is_empty(), "not acknowledged and missing: {lost:?}");
    assert!(died_with.len() <= RECEIVE_MAX * cases.len(), "{died_with:?}");
    assert!(worst > 0.5, "the worker waits for the broker: {worst:.3} of the rate before");
}
