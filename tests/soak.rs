//! `make soak`, for long: an overloaded model, swaps, cameras that fail, restarts of everything. Not
//! part of `make test`, which holds short forms of it. `SOAK_SECONDS` changes the length. Prints what
//! was seen.
#![allow(missing_docs, unreachable_pub, dead_code)]

mod harness;

use harness::camera::write_clip;
use harness::faults::{self, Form};
use harness::onnx::{Detector, Output};
use harness::overload::{Codec, ONE_FAST_FIVE_SLOW, Run, Sender};
use harness::secs;
use harness::service::noblink_output;
use harness::week;
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

/// A bad week in fast motion, half an hour.
#[test]
fn eight_cameras_through_restarts_and_swaps() {
    week::run(seconds(1800));
}

/// The fault table in full.
#[test]
fn camera_faults() {
    faults::all(Form { trouble: secs(10), refusing: secs(30), closing: secs(60) });
}
