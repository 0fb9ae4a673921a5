//! `make soak`: four RTSP cameras, an overloaded model, ten minutes. Not part of `make test`, which
//! holds a short form of it. `SOAK_SECONDS` changes the length.
//!
//! Prints a table: per camera what was sent, its max-min fair share, what was inferred; then memory.
#![allow(missing_docs, unreachable_pub, dead_code)]

mod harness;

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use gst::prelude::*;
use harness::mosquitto::{Mosquitto, Subscriber};
use harness::onnx::{Detector, Output};
use harness::service::{Service, config};
use harness::until;
use noblink::rtsp::{self, RtspServer};
use serde_json::Value;

/// Id, size, frames a second.
const CAMERAS: [(&str, u32, u32, u32); 4] =
    [("hd", 1920, 1080, 30), ("mid", 1280, 720, 15), ("small", 640, 360, 5), ("hevc", 640, 360, 5)];

/// The last one is H.265, encoded as it is sent: the server loops H.264 clips only.
const HEVC: &str = "videotestsrc is-live=true pattern=ball ! \
    video/x-raw,format=I420,width=640,height=360,framerate=5/1 ! \
    x265enc speed-preset=ultrafast tune=zerolatency key-int-max=5 ! rtph265pay name=pay0";

/// Ten seconds of a moving ball, encoded once: a live encoder would take the cores.
fn clip(dir: &Path, camera: &(&str, u32, u32, u32)) -> PathBuf {
    let (id, width, height, fps) = camera;
    let path = dir.join(format!("{id}.mp4"));
    let launch = format!(
        "videotestsrc pattern=ball num-buffers={} ! \
         video/x-raw,format=I420,width={width},height={height},framerate={fps}/1 ! \
         x264enc speed-preset=ultrafast bframes=0 key-int-max={fps} ! h264parse ! mp4mux ! filesink location={}",
        fps * 10,
        path.display()
    );
    let pipeline = gst::parse::launch(&launch).expect("the encoders are installed");
    pipeline.set_state(gst::State::Playing).unwrap();
    let bus = pipeline.bus().unwrap();
    let done = bus.timed_pop_filtered(
        gst::ClockTime::from_seconds(120),
        &[gst::MessageType::Eos, gst::MessageType::Error],
    );
    pipeline.set_state(gst::State::Null).unwrap();
    assert!(matches!(done.unwrap().view(), gst::MessageView::Eos(_)), "{id} can't be encoded");
    path
}

/// Each camera's max-min fair share of what was inferred in all.
fn fair_shares(offered: &[f64]) -> impl Fn(f64) -> Vec<f64> {
    let offered = offered.to_vec();
    move |capacity| {
        let mut order: Vec<usize> = (0..offered.len()).collect();
        order.sort_by(|a, b| offered[*a].total_cmp(&offered[*b]));
        let (mut left, mut shares) = (capacity, vec![0.0; offered.len()]);
        for (done, camera) in order.into_iter().enumerate() {
            shares[camera] = f64::min(offered[camera], left / (offered.len() - done) as f64);
            left -= shares[camera];
        }
        shares
    }
}

#[test]
fn four_cameras_and_an_overloaded_model() {
    let seconds: u64 = std::env::var("SOAK_SECONDS").map_or(600, |s| s.parse().unwrap());
    gst::init().unwrap();
    let dir = tempfile::tempdir().unwrap();
    let server = RtspServer::start(&rtsp::Settings::default()).unwrap();
    let mut cameras = Vec::new();
    for camera in &CAMERAS {
        let path = format!("/{}", camera.0);
        match camera.0 {
            "hevc" => server.mount_launch(&path, HEVC).unwrap(),
            _ => server.mount_clip(&path, &clip(dir.path(), camera), true).unwrap(),
        }
        cameras.push((camera.0, server.url(&path), "publish = \"all\""));
    }
    let cameras: Vec<_> =
        cameras.iter().map(|(id, url, more)| (*id, url.as_str(), *more)).collect();
    // Some 50 ms a run: 60 frames a second come, about 20 can be inferred.
    let model = Detector { work: 60, ..Detector::new(Output::Yolo8, 640, 640) };
    let model = model.write(dir.path(), "heavy.onnx");
    let broker = Mosquitto::start("");
    let subscriber = Subscriber::new("5", broker.port, "noblink/v1/test/telemetry");
    let rest = format!("[models]\nfactory = \"{}\"\n", model.display());
    let url = format!("url = \"mqtt://127.0.0.1:{}\"", broker.port);
    let mut service = Service::start(&config(&url, &cameras, &rest));

    let end = Instant::now() + Duration::from_secs(seconds);
    let mut telemetry = Vec::<Value>::new();
    while Instant::now() < end {
        let seen = telemetry.len();
        until("telemetry", 20, || subscriber.messages().len() > seen);
        let record: Value = serde_json::from_str(&subscriber.messages()[seen].payload).unwrap();
        for (id, ..) in &CAMERAS {
            assert_exact(id, &record["cameras"][id]["ledger"]);
        }
        telemetry.push(record);
    }
    assert_eq!(service.stop().code(), Some(0), "{}", service.log());

    // The first window holds the cameras' start; shares are those of the rest.
    let (first, last) = (&telemetry[0], telemetry.last().unwrap());
    let delta = |id: &str, count: &str| {
        let of = |t: &Value| t["cameras"][id]["ledger"][count].as_f64().unwrap();
        of(last) - of(first)
    };
    let offered: Vec<f64> = CAMERAS.iter().map(|c| delta(c.0, "offered")).collect();
    let inferred: Vec<f64> = CAMERAS.iter().map(|c| delta(c.0, "inferred")).collect();
    let shares = fair_shares(&offered)(inferred.iter().sum());
    println!("\ncamera     offered  inferred  fair share   ratio   p99 ms");
    for (i, (id, ..)) in CAMERAS.iter().enumerate() {
        let p99 = &last["cameras"][id]["latency_ms"]["p99"];
        let ratio = inferred[i] / shares[i];
        println!(
            "{id:<8} {:>9} {:>9} {:>11.0} {ratio:>7.3} {p99:>8}",
            offered[i], inferred[i], shares[i]
        );
        assert!(ratio >= 0.9, "{id} got {ratio:.2} of its fair share");
    }
    let rss = |t: &Value| t["host"]["rss_mb"].as_f64().unwrap();
    let early = &telemetry[telemetry.len().min(6) - 1];
    let rates: f64 = inferred.iter().sum::<f64>() / (10.0 * (telemetry.len() - 1) as f64);
    println!(
        "\n{rates:.1} frames/s inferred; RSS {:.1} MB after 1 min, {:.1} MB at the end, ratio {:.3}",
        rss(early),
        rss(last),
        rss(last) / rss(early)
    );
    assert!(rss(last) <= 1.1 * rss(early), "memory grows");
}

fn assert_exact(id: &str, ledger: &Value) {
    let n = |key: &str| ledger[key].as_u64().unwrap();
    let dropped: u64 =
        ledger["dropped"].as_object().unwrap().values().map(|v| v.as_u64().unwrap()).sum();
    assert_eq!(n("decoded"), n("rate_limited") + n("corrupt") + n("offered"), "{id}: {ledger}");
    let done = n("inferred") + n("failed") + dropped + n("queued") + n("in_flight");
    assert_eq!(n("offered"), done, "{id}: {ledger}");
}
