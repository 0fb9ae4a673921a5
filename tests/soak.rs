//! `make soak`, for long: an overloaded model; swaps over and over; a service that is killed over and
//! over; brokers that are killed and links that hang; a spool at its limit; cameras that fail; restarts
//! of everything. Not part of `make test`, which holds a short form of each. `SOAK_SECONDS` and
//! `SOAK_KILLS` change the length. Prints what each camera got, how many kills were survived, what
//! was lost.
#![allow(missing_docs, unreachable_pub, dead_code)]

mod harness;

use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use harness::camera::write_clip;
use harness::camera_faults::{self, Form};
use harness::glass;
use harness::kills::{at_failpoints, at_random};
use harness::link::{BOOT, ROOMY, Running, plain};
use harness::mosquitto::Mosquitto;
use harness::onnx::{Detector, Output};
use harness::outage::outages;
use harness::overload::{Codec, ONE_FAST_FIVE_SLOW, Run, Sender};
use harness::restarts;
use harness::secs;
use harness::service::noblink_output;
use harness::until;
use harness::week;
use harness::wire::Wire;
use noblink::mqtt::outbox::{Bounds, Cargo, Outbox, Record, Stats};
use noblink::mqtt::spooler::{Durability, Settings, Spooler};
use noblink::mqtt::status::LinkState;
use serde_json::Value;

const fn sender(id: &'static str, width: u32, height: u32, fps: u32, codec: Codec) -> Sender {
    Sender { id, width, height, fps, codec }
}

const FOUR: [Sender; 4] = [
    sender("hd", 1920, 1080, 30, Codec::H264),
    sender("mid", 1280, 720, 15, Codec::H264),
    sender("small", 640, 360, 5, Codec::H264),
    sender("hevc", 640, 360, 5, Codec::H265),
];

fn seconds(usually: u64) -> u64 {
    std::env::var("SOAK_SECONDS").map_or(usually, |s| s.parse().expect("a number of seconds"))
}

#[test]
fn four_cameras_and_an_overloaded_model() {
    let run = Run::of(&FOUR, seconds(600));
    run.assert_fair();
    run.assert_flat();
}

/// The camera's jitter buffer of 200 ms, 2.2 times the model, and no more.
#[test]
fn from_the_picture_to_the_subscriber() {
    let (p50, p99, model) = glass::measure(seconds(60).min(60), 60);
    let bound = 200.0 + 2.2 * model;
    println!("jitter buffer and 2.2 times the model: {bound:.0} ms");
    // What it is on a busy machine is not the program's doing: only a clock misread is.
    assert!(p50 as f64 > model && (p99 as f64) < 10.0 * bound);
}

#[test]
fn a_camera_of_60_fps_beside_five_of_5_fps() {
    let run = Run::of(&ONE_FAST_FIVE_SLOW, seconds(90).min(90));
    run.assert_fair();
}

/// `noblink bench swap` between two models, with two cameras of 640x360 at 30/s.
fn bench_swap(models: [&Detector; 2], args: &[&str]) -> Value {
    gst::init().unwrap();
    let dir = tempfile::tempdir().unwrap();
    let clip = dir.path().join("clip.mp4");
    write_clip(&clip, (640, 360), 30, 300);
    let files = ["a.onnx", "b.onnx"].map(|name| dir.path().join(name));
    for (model, file) in models.iter().zip(&files) {
        std::fs::write(file, model.bytes()).unwrap();
    }
    let [a, b, clip] = [&files[0], &files[1], &clip].map(|p| p.to_str().unwrap());
    let fixed =
        ["bench", "swap", "--json", "--clip", clip, "--clip", clip, "--model", a, "--model", b];
    let output = noblink_output(&[&fixed, args].concat());
    let said = String::from_utf8_lossy(&output.stderr);
    let report: Value = serde_json::from_slice(&output.stdout).unwrap_or_else(|e| {
        panic!("{e}: {said}");
    });
    println!("{report:#}");
    for none in ["frames_unaccounted", "frames_doubled", "epochs_back"] {
        assert_eq!(report[none], 0);
    }
    report
}

/// A box that drops most of its frames all the time drops no more around a swap.
#[test]
fn a_hundred_swaps_on_an_overloaded_box() {
    let slow = |output, width, work| Detector { work, ..Detector::new(output, width, 512) };
    let (a, b) = (slow(Output::Yolo8, 640, 100), slow(Output::Yolo8, 576, 110));
    let report = bench_swap([&a, &b], &["--swaps", "100", "--updates", "2"]);
    let number = |path: &str| report.pointer(path).unwrap().as_f64().unwrap();
    assert!(number("/sham/missing") > 1.0, "it is overloaded");
    assert!(number("/swap/missing") - number("/sham/missing") <= 1.0);
}

/// From a quick model to one of another layout that takes thrice as long, which is allowed by name.
#[test]
fn swaps_to_a_slower_model_and_another_layout() {
    let quick = Detector { work: 2, ..Detector::new(Output::Yolo8, 320, 320) };
    let slow = Detector { work: 20, ..Detector::new(Output::End2end, 416, 320) };
    let report =
        bench_swap([&quick, &slow], &["--swaps", "20", "--updates", "4", "--accept-slower", "20"]);
    assert_eq!(report["swaps"], 24);
}

#[test]
fn a_service_that_is_killed_at_random_moments() {
    let kills = std::env::var("SOAK_KILLS").map_or(200, |n| n.parse().expect("a number of kills"));
    at_random(kills, 0x9e37_79b9_7f4a_7c15);
}

#[test]
fn a_hundred_restarts_under_load() {
    restarts::under_load(100, 0x5851_f42d_4c95_7f2d);
}

#[test]
fn a_service_that_is_killed_at_every_failpoint_of_an_install() {
    assert!(at_failpoints(1) > 30, "an install passes more");
}

#[test]
fn a_broker_that_is_killed_and_forgets_its_sessions() {
    outages(&[1, 10, 60], false, seconds(60).min(60));
}

#[test]
fn a_broker_that_is_killed_and_keeps_its_sessions() {
    outages(&[1, 10, 60], true, seconds(60).min(60));
}

/// With the keep-alive of the service, 15 s: bytes stop, the connection stays.
#[test]
fn a_link_that_hangs_is_noticed_within_two_keep_alives() {
    let broker = Mosquitto::start("");
    let wire = Wire::to(broker.port);
    let link = Running::start(plain(wire.port));
    let detections = link.topics.detections("gate");
    let mut seq = 0;
    println!("\nblack hole    noticed in   connected again in   lost");
    for sends in [true, false] {
        until("the link connects", 90, || link.status().state == LinkState::Connected);
        link.drained();
        wire.freeze(true);
        let frozen = Instant::now();
        until("the link notices", 60, || {
            if sends {
                link.push("gate", seq, &detections, "x");
                seq += 1;
            }
            std::thread::sleep(Duration::from_millis(10));
            link.status().state != LinkState::Connected
        });
        let noticed = frozen.elapsed();
        wire.freeze(false);
        let opened = Instant::now();
        until("the link connects", 90, || link.status().state == LinkState::Connected);
        let again = opened.elapsed();
        until("everything is acknowledged", 30, || link.outbox.is_empty());
        let stats = link.outbox.stats();
        let what = if sends { "sending" } else { "idle" };
        println!(
            "{what:<10} {:>10.1} s {:>18.1} s {:>6}",
            noticed.as_secs_f64(),
            again.as_secs_f64(),
            stats.pushed - stats.acked
        );
        // Two keep-alives of 15 s, and a second for a busy machine.
        assert!(noticed < Duration::from_secs(31), "{noticed:?}");
        assert!(stats.is_exact() && stats.acked == stats.pushed, "{stats:?}");
    }
}

/// The service's bounds.
const BOUNDS: Bounds = noblink::app::OUTBOX;

/// Pushes records of 1 kB of three cameras, no faster than the disk takes them. Returns the longest
/// time that one push took.
fn fill(outbox: &Outbox, records: u64) -> Duration {
    let mut longest = Duration::ZERO;
    for n in 0..records {
        let camera = ["a", "b", "c"][(n % 3) as usize];
        let topic = format!("noblink/v1/edge-1/cameras/{camera}/detections").into();
        let (seq, payload) = (n / 3, vec![b'.'; 1000]);
        let record = Record { camera: camera.into(), boot: BOOT.into(), seq, topic, payload };
        let before = Instant::now();
        outbox.push(record);
        longest = longest.max(before.elapsed());
        if n % 1000 == 0 {
            until("the disk keeps up", 30, || {
                let Stats { queued, in_flight, spooled, .. } = outbox.stats();
                queued + in_flight - spooled <= 12_000
            });
        }
    }
    longest
}

fn size(dir: &Path) -> u64 {
    let size = |f| std::fs::metadata(dir.join(f)).map_or(0, |m| m.len());
    size("outbox.db") + size("outbox.db-wal")
}

/// An hour of 60 records a second, where a third of it fits.
#[test]
fn an_hour_of_records_over_a_spool_at_its_limit() {
    const HOUR: u64 = 60 * 3600;
    let dir = tempfile::tempdir().unwrap();
    let (max_bytes, durability) = (80_000_000, Durability::Memory);
    let settings = Settings { dir: dir.path().to_owned(), max_bytes, durability };
    let outbox = Arc::new(Outbox::new(BOUNDS));
    let spooler = Spooler::start(Arc::clone(&outbox), settings.clone()).unwrap();
    let began = Instant::now();
    let longest = fill(&outbox, HOUR);
    let filled = began.elapsed();
    spooler.stop();
    let stats = outbox.stats();
    assert!(stats.is_exact(), "{stats:?}");
    let bytes = size(dir.path());
    drop(outbox);

    let outbox = Arc::new(Outbox::new(ROOMY));
    let began = Instant::now();
    let spooler = Spooler::start(Arc::clone(&outbox), settings).unwrap();
    until("it is read through", 60, || outbox.stats().restored > 0);
    let read = began.elapsed();
    let (mut kept, mut announced) = (0, 0);
    let mut last = std::collections::BTreeMap::new();
    until("a tenth of it is drained", 60, || {
        while let Some(loan) = outbox.take() {
            match loan.cargo {
                Cargo::Gap(gap) => announced += gap.count,
                Cargo::Record(r) => {
                    assert!(last.insert(Arc::clone(&r.camera), r.seq) < Some(r.seq), "in order");
                    kept += 1;
                }
            }
            outbox.acked(loan.ticket);
        }
        kept > 6000
    });
    println!(
        "\n{HOUR} records of 1 kB, {:.0} MB allowed: {:.1} MB on disk, {} kept, {} given up and {announced} \
         announced; filled in {:.1} s, longest push {:.2} ms; read through in {:.2} s",
        max_bytes as f64 / 1e6,
        bytes as f64 / 1e6,
        stats.queued,
        stats.dropped,
        filled.as_secs_f64(),
        longest.as_secs_f64() * 1e3,
        read.as_secs_f64(),
    );
    assert!(bytes <= max_bytes);
    assert_eq!((stats.queued + stats.dropped, announced), (HOUR, stats.dropped));
    spooler.stop();
}

/// A file system of 12 MB, which needs the rights to mount one.
#[test]
fn a_full_disk_is_named_and_memory_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    let mount = ["-t", "tmpfs", "-o", "size=12m", "tmpfs"];
    let mounted = Command::new("mount").args(mount).arg(dir.path()).status().unwrap().success();
    if !mounted {
        println!(
            "\nNOT RUN: a full disk (mounting needs root); `make test` limits file sizes instead"
        );
        return;
    }
    let max_bytes = 512_000_000;
    let settings =
        Settings { dir: dir.path().to_owned(), max_bytes, durability: Durability::Memory };
    let outbox = Arc::new(Outbox::new(BOUNDS));
    let spooler = Spooler::start(Arc::clone(&outbox), settings).unwrap();
    let mut n = 0;
    until("the disk is full", 60, || {
        for _ in 0..100 {
            let (topic, payload) = ("t".into(), vec![b'.'; 1000]);
            let record = Record { camera: "a".into(), boot: BOOT.into(), seq: n, topic, payload };
            outbox.push(record);
            n += 1;
        }
        std::thread::sleep(Duration::from_millis(10));
        outbox.stats().disk_error.is_some()
    });
    let full = outbox.stats();
    let mut last = None;
    until("everything is drained", 120, || {
        while let Some(loan) = outbox.take() {
            if let Cargo::Record(r) = &loan.cargo {
                assert!(last < Some(r.seq), "in order");
                last = Some(r.seq);
            }
            outbox.acked(loan.ticket);
        }
        outbox.is_empty()
    });
    until("there is room again", 30, || outbox.stats().disk_error.is_none());
    let stats = outbox.stats();
    spooler.stop();
    let unmounted = Command::new("umount").arg(dir.path()).status().unwrap().success();
    println!(
        "\na disk of 12 MB is full after {} records: \"{}\"; of {n} none was lost: {} acknowledged",
        full.spooled,
        full.disk_error.unwrap(),
        stats.acked
    );
    assert!(stats.is_exact() && stats.acked == n && unmounted, "{stats:?}");
}

/// A bad week in fast motion, half an hour.
#[test]
fn eight_cameras_through_restarts_and_swaps() {
    week::run(seconds(1800));
}

/// The fault table in full.
#[test]
fn camera_faults() {
    camera_faults::all(Form { trouble: secs(10), refusing: secs(30), closing: secs(60) });
}
