//! The numbers of `ultralytics` for the same ONNX files: `goldens/make.py` made them.
//!
//! `cargo test --test it parity -- --nocapture` prints the table.

use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use gst::prelude::*;
use noblink::camera::frame::{Clock, Frame};
use noblink::model::contract::Overrides;
use noblink::model::engine::{Detection, EngineOptions, Model, Thresholds};
use noblink::model::runtime::Runtime;
use noblink::vision::picture::{Color, Matrix, Picture, Pixels, Plane, Range};

/// What OpenCV's FFmpeg capture makes of every stream.
const CV2: Color = Color { matrix: Matrix::Bt601, range: Range::Limited };
/// Boxes below are too near to the threshold of 0.25 to be compared.
const COMPARED_FROM: f32 = 0.3;

#[derive(serde::Deserialize)]
struct Goldens {
    cases: Vec<Case>,
}

#[derive(serde::Deserialize)]
struct Case {
    model: String,
    picture: Option<[usize; 3]>,
    clip: Option<String>,
    #[serde(default)]
    frame: usize,
    /// class, score, x1, y1, x2, y2 in pixels
    boxes: Vec<[f32; 6]>,
}

#[derive(Clone, Copy)]
struct Wanted {
    iou: f32,
    score: f32,
    matched: f32,
}

const RGB: Wanted = Wanted { iou: 0.99, score: 0.005, matched: 0.99 };
/// Ultralytics keeps a float16 output in float16 down to the boxes, whose corners then fall on every
/// second pixel; noblink widens it first.
const HALF: Wanted = Wanted { iou: 0.95, score: 0.005, matched: 0.98 };
const DECODED: Wanted = Wanted { iou: 0.95, score: 0.03, matched: 0.98 };

#[derive(Default)]
struct Tally {
    boxes: usize,
    matched: usize,
    worst_score: f32,
    worst_iou: f32,
}

impl Tally {
    fn share(&self) -> f32 {
        self.matched as f32 / self.boxes as f32
    }
}

#[test]
fn rgb_pictures_give_the_boxes_of_ultralytics() {
    let goldens = goldens();
    let mut table = Table::new("RGB pictures", RGB);
    for model in models(&goldens, |case| case.picture.is_some()) {
        let open = open(&model);
        for case in goldens.cases.iter().filter(|c| c.model == model) {
            let Some([width, height, seed]) = case.picture else { continue };
            let rgb = draw(width, height, seed as u64);
            let plane = Plane { data: &rgb, stride: 3 * width };
            let picture = Picture { width, height, color: CV2, pixels: Pixels::Rgb(plane) };
            let found = detect(&open, &picture);
            table.add(&format!("{model} {width}x{height}"), case, &found, (width, height));
        }
    }
    table.finish();
}

#[test]
fn decoded_frames_give_the_boxes_of_ultralytics() {
    let goldens = goldens();
    let mut table = Table::new("decoded H.264", DECODED);
    let clips: Vec<_> = ["clip-1080p", "clip-720p"].map(|c| (c, decode(c))).into();
    for model in models(&goldens, |case| case.clip.is_some()) {
        let open = open(&model);
        for (clip, frames) in &clips {
            for case in goldens.cases.iter().filter(|c| c.model == model) {
                if case.clip.as_deref() == Some(clip) {
                    let frame = &frames[case.frame];
                    let size = (frame.info.width() as usize, frame.info.height() as usize);
                    let found = frame
                        .with_picture(|picture| detect(&open, picture))
                        .expect("the frame is I420");
                    table.add(&format!("{model} {clip} #{}", case.frame), case, &found, size);
                }
            }
        }
    }
    table.finish();
}

struct Table {
    title: &'static str,
    wanted: Wanted,
    rows: Vec<(String, Wanted, Tally)>,
}

impl Table {
    fn new(title: &'static str, wanted: Wanted) -> Self {
        Self { title, wanted, rows: Vec::new() }
    }

    /// Compares both ways: what they found and we miss counts like what only we found.
    fn add(&mut self, name: &str, case: &Case, found: &[Detection], size: (usize, usize)) {
        let target = if case.model.ends_with("-half") { HALF } else { self.wanted };
        let (w, h) = (size.0 as f32, size.1 as f32);
        let ours: Vec<[f32; 6]> = found
            .iter()
            .map(|d| [d.class_id as f32, d.score, d.x1 * w, d.y1 * h, d.x2 * w, d.y2 * h])
            .collect();
        let mut tally = Tally { worst_iou: 1.0, ..Tally::default() };
        for (from, to) in [(&case.boxes, &ours), (&ours, &case.boxes)] {
            for wanted in from.iter().filter(|b| b[1] >= COMPARED_FROM) {
                tally.boxes += 1;
                let same = to
                    .iter()
                    .filter(|b| b[0] == wanted[0])
                    .map(|b| (overlap(wanted, b), (b[1] - wanted[1]).abs()))
                    .filter(|(iou, _)| *iou >= target.iou)
                    .min_by(|a, b| a.1.total_cmp(&b.1));
                if let Some((iou, score)) = same {
                    tally.worst_score = tally.worst_score.max(score);
                    tally.worst_iou = tally.worst_iou.min(iou);
                    tally.matched += usize::from(score <= target.score);
                }
            }
        }
        self.rows.push((name.to_owned(), target, tally));
    }

    fn finish(self) {
        println!(
            "{:<34}{:>7}{:>10}{:>13}{:>11}",
            self.title, "boxes", "matched", "worst score", "worst IoU"
        );
        for (name, _, tally) in &self.rows {
            println!(
                "{name:<34}{:>7}{:>9.2}%{:>13.4}{:>11.4}",
                tally.boxes,
                100.0 * tally.share(),
                tally.worst_score,
                tally.worst_iou
            );
        }
        let boxes: usize = self.rows.iter().map(|r| r.2.boxes).sum();
        let matched: usize = self.rows.iter().map(|r| r.2.matched).sum();
        println!("{:<34}{boxes:>7}{:>9.2}%", "all", 100.0 * matched as f32 / boxes as f32);
        for (name, wanted, tally) in &self.rows {
            assert!(tally.boxes > 20, "{name} compares next to nothing");
            assert!(tally.share() >= wanted.matched, "{name} differs");
        }
    }
}

fn overlap(a: &[f32; 6], b: &[f32; 6]) -> f32 {
    let area = |r: &[f32; 6]| (r[4] - r[2]) * (r[5] - r[3]);
    let width = (a[4].min(b[4]) - a[2].max(b[2])).max(0.0);
    let height = (a[5].min(b[5]) - a[3].max(b[3])).max(0.0);
    let inner = width * height;
    inner / (area(a) + area(b) - inner)
}

fn folder() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/goldens")
}

fn goldens() -> Goldens {
    let text = std::fs::read_to_string(folder().join("parity.json")).expect("it is committed");
    serde_json::from_str(&text).expect("make.py wrote it")
}

fn models(goldens: &Goldens, used: impl Fn(&Case) -> bool) -> Vec<String> {
    let mut models: Vec<_> =
        goldens.cases.iter().filter(|c| used(c)).map(|c| c.model.clone()).collect();
    models.dedup();
    models
}

fn open(name: &str) -> Model {
    let runtime = Runtime::load(None).expect("lib/onnxruntime holds the library");
    let path = folder().join(format!("{name}.onnx"));
    Model::open(&runtime, &path, &EngineOptions::default(), &Overrides::default())
        .unwrap_or_else(|e| panic!("{e}"))
}

fn detect(model: &Model, picture: &Picture<'_>) -> Vec<Detection> {
    let mut found = Vec::new();
    let mut runner = model.runner();
    runner.preprocess(picture).expect("the picture is whole");
    runner.run().expect("the model runs");
    runner
        .postprocess(&Thresholds { confidence: 0.25, iou: 0.7 }, &mut found)
        .expect("the output is finite");
    found
}

/// `picture` of make.py.
fn draw(width: usize, height: usize, seed: u64) -> Vec<u8> {
    let mut state = seed;
    let mut below = |n: usize| {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((state >> 33) % n as u64) as i64
    };
    let (w, h) = (width as i64, height as i64);
    let discs: Vec<_> = (0..60)
        .map(|n| {
            let (cx, cy) = (below(width), below(height));
            let radius = w.min(h) * (3 + below(14)) / 100 + 1;
            (n % 2 == 1, cx, cy, radius * radius, [below(256), below(256), below(256)])
        })
        .collect();
    let mut rgb = Vec::with_capacity(3 * width * height);
    for y in 0..h {
        for x in 0..w {
            let mut pixel = [x * 160 / w, y * 160 / h, (x + y) * 160 / (w + h)];
            for (round, cx, cy, radius, colour) in &discs {
                let (dx, dy) = ((x - cx).abs(), (y - cy).abs());
                let far = if *round { dx * dx + dy * dy } else { dx.max(dy).pow(2) };
                if far <= *radius {
                    pixel = colour.map(|c| c - c * far / (2 * radius));
                }
            }
            let hash = (x * 73_856_093) ^ (y * 19_349_663) ^ (seed as i64 * 83_492_791);
            let hash = (hash as u32).wrapping_mul(2_654_435_761);
            for (c, v) in pixel.into_iter().enumerate() {
                let noise = i64::from((hash >> (8 * c + 6)) & 15);
                rgb.push((v + noise).clamp(0, 255) as u8);
            }
        }
    }
    rgb
}

/// The frames as the camera path would hand them on, with OpenCV's colours.
fn decode(clip: &str) -> Vec<Frame> {
    gst::init().expect("GStreamer is installed");
    let path = folder().join(format!("{clip}.h264"));
    let launch = format!(
        "filesrc location=\"{}\" ! h264parse ! avdec_h264 ! video/x-raw,format=I420 ! \
         appsink name=sink sync=false",
        path.display()
    );
    let pipeline = gst::parse::launch(&launch).expect("the elements are installed");
    let pipeline = pipeline.downcast::<gst::Pipeline>().expect("a launch line is a pipeline");
    let sink = pipeline.by_name("sink").expect("named above");
    let sink = sink.downcast::<gst_app::AppSink>().expect("an appsink");
    pipeline.set_state(gst::State::Playing).expect("it starts");
    let frames = Mutex::new(Vec::new());
    while let Ok(sample) = sink.pull_sample() {
        let info = gst_video::VideoInfo::from_caps(sample.caps().expect("raw video has caps"));
        let mut frames = frames.lock().expect("no panic");
        let id = frames.len() as u64;
        frames.push(Frame {
            id,
            pts_ns: None,
            time_us: 0,
            clock: Clock::Arrival,
            arrived: std::time::Instant::now(),
            buffer: sample.buffer_owned().expect("a sample holds a buffer"),
            info: Arc::new(info.expect("raw video")),
            color: CV2,
        });
    }
    pipeline.set_state(gst::State::Null).expect("it stops");
    frames.into_inner().expect("no panic")
}
