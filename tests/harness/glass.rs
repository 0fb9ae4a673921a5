//! From the picture to the subscriber: a clock is drawn into a camera's frames, a model reads it, and
//! the subscriber knows how old what it hears is.
#![allow(dead_code)] // for `tests/soak.rs` alone

use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use noblink::rtsp::{RtspServer, Settings};
use serde_json::Value;

use super::mosquitto::Mosquitto;
use super::onnx::{Detector, Output};
use super::service::{Service, config};

const WIDTH: usize = 640;
const HEIGHT: usize = 384;
const FPS: u64 = 15;
/// Side of a bit. The detector's cells have 32 pixels at most.
const BIT: usize = 64;
/// Of the clock, in milliseconds: a minute. With the least overlap a bit keeps 16 boxes, and a record
/// holds 300.
const BITS: usize = 16;

fn now_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970").as_millis() as u64
}

/// The left upper corner of a bit.
fn place(bit: usize) -> (usize, usize) {
    let columns = WIDTH / (2 * BIT);
    (bit % columns * 2 * BIT, bit / columns * (BIT + 32))
}

/// An I420 picture, black, with a red square for each bit that is set.
fn draw(clock: u64) -> gst::Buffer {
    let (luma, chroma) = (WIDTH * HEIGHT, WIDTH * HEIGHT / 4);
    let mut picture = vec![16u8; luma + 2 * chroma];
    picture[luma..].fill(128);
    for bit in (0..BITS).filter(|bit| clock >> bit & 1 == 1) {
        let (x, y) = place(bit);
        for row in y..y + BIT {
            picture[row * WIDTH + x..][..BIT].fill(81);
        }
        for row in y / 2..(y + BIT) / 2 {
            picture[luma + row * WIDTH / 2 + x / 2..][..BIT / 2].fill(90);
            picture[luma + chroma + row * WIDTH / 2 + x / 2..][..BIT / 2].fill(240);
        }
    }
    gst::Buffer::from_slice(picture)
}

/// What the boxes say, modulo the clock's length.
fn read(record: &Value) -> u64 {
    let mut clock = 0;
    for object in record["objects"].as_array().expect("a list") {
        let middle = |a: &str, b: &str, side: usize| {
            let of = |k: &str| object["box"][k].as_f64().expect("a number");
            (of(a) + of(b)) / 2.0 * side as f64
        };
        let (x, y) = (middle("x1", "x2", WIDTH), middle("y1", "y2", HEIGHT));
        for bit in 0..BITS {
            let (left, top) = place(bit);
            let inside = |v: f64, from: usize| v > from as f64 && v < (from + BIT) as f64;
            if inside(x, left) && inside(y, top) {
                clock |= 1 << bit;
            }
        }
    }
    clock
}

/// Runs for so many seconds and prints the quantiles. Returns those of the age of what is heard and
/// the median of the model's own time, milliseconds.
pub fn measure(seconds: u64, work: usize) -> (u64, u64, f64) {
    gst::init().expect("GStreamer");
    let dir = tempfile::tempdir().expect("a folder");
    let server = RtspServer::start(&Settings::default()).expect("a port is free");
    let launch = format!(
        "appsrc name=source is-live=true format=time do-timestamp=true max-buffers=1 max-bytes=0 \
         caps=video/x-raw,format=I420,width={WIDTH},height={HEIGHT},framerate={FPS}/1,colorimetry=bt601 \
         ! x264enc tune=zerolatency speed-preset=ultrafast quantizer=18 pass=quant key-int-max={FPS} \
         ! rtph264pay name=pay0 pt=96 config-interval=-1"
    );
    let configure = |source: &gst_app::AppSrc| {
        let mut next = Instant::now();
        let need = move |source: &gst_app::AppSrc, _: u32| {
            std::thread::sleep(next.saturating_duration_since(Instant::now()));
            next += Duration::from_micros(1_000_000 / FPS);
            let _ = source.push_buffer(draw(now_ms()));
        };
        source.set_callbacks(gst_app::AppSrcCallbacks::builder().need_data(need).build());
    };
    server.mount_source("/clock", &launch, configure).expect("a mount");
    let model =
        Detector { work, labels: vec!["red"], ..Detector::new(Output::Yolo8, WIDTH, HEIGHT) };
    let model = model.write(dir.path(), "clock.onnx");
    let broker = Mosquitto::start("");
    let mut listener = Command::new("stdbuf")
        .args(["-oL", "mosquitto_sub", "-V", "5", "-h", "127.0.0.1", "-q", "1", "-p"])
        .arg(broker.port.to_string())
        .args(["-t", "noblink/v1/test/cameras/+/detections", "-F", "%U %p"])
        .args(["-W", &(seconds + 15).to_string()])
        .stdout(Stdio::piped())
        .spawn()
        .expect("mosquitto-clients is installed");
    let lines = BufReader::new(listener.stdout.take().expect("piped")).lines();
    let url = server.url("/clock");
    let rest = format!(
        "[inference]\nprovider = \"cpu\"\niou = 0.05\n[models]\nfactory = \"{}\"\n",
        model.display()
    );
    let mqtt = format!("url = \"mqtt://127.0.0.1:{}\"", broker.port);
    let mut service =
        Service::start(&config(&mqtt, &[("clock", &url, "publish = \"all\"")], &rest));
    let heard: Vec<_> = lines.map_while(Result::ok).collect();
    let _ = listener.wait();
    assert_eq!(service.stop().code(), Some(0), "{}", service.log());

    let mut ages = Vec::new();
    let mut model_ms = Vec::new();
    for line in &heard {
        let (at, payload) = line.split_once(' ').expect("time and payload");
        let record: Value = serde_json::from_str(payload).expect("JSON");
        // The first seconds are the camera's start.
        if record["seq"].as_u64() < Some(5 * FPS) {
            continue;
        }
        let at_ms = (at.parse::<f64>().expect("seconds") * 1e3) as u64;
        let age = at_ms.wrapping_sub(read(&record)) % (1 << BITS);
        ages.push(age);
        model_ms.push(record["latency_ms"]["inference"].as_f64().expect("a number"));
    }
    assert!(ages.len() as u64 > seconds * FPS / 2, "{} records", ages.len());
    ages.sort_unstable();
    model_ms.sort_by(f64::total_cmp);
    let at = |q: f64| ages[((ages.len() - 1) as f64 * q) as usize];
    let (p50, p99, model) = (at(0.5), at(0.99), model_ms[model_ms.len() / 2]);
    println!(
        "from the picture to the subscriber, {} records: p50 {p50} ms, p99 {p99} ms, longest {} ms; the \
         model takes {model:.1} ms",
        ages.len(),
        at(1.0)
    );
    (p50, p99, model)
}
