//! The model: its file, its contract, its runs.

use std::sync::Arc;

use noblink::model::contract::Overrides;
use noblink::model::engine::{Detection, EngineOptions, Model, OpenError, RunError, Thresholds};
use noblink::model::file::ModelFile;
use noblink::model::runtime::Runtime;
use noblink::vision::picture::{Color, Matrix, Picture, Pixels, Plane, Range};

use crate::harness::onnx::{Detector, Fault, Output};

const LIMITED: Color = Color { matrix: Matrix::Bt601, range: Range::Limited };
const THRESHOLDS: Thresholds = Thresholds { confidence: 0.25, iou: 0.7 };

fn runtime() -> Arc<Runtime> {
    Runtime::load(None).expect("lib/onnxruntime holds the library")
}

fn build(detector: &Detector) -> Result<Model, OpenError> {
    let file = ModelFile::parse(detector.bytes(), "blob.onnx", &Overrides::default(), &[])?;
    Model::build(&runtime(), &file, &EngineOptions::default())
}

/// Grey, with one square in pure colour.
struct Scene {
    width: usize,
    height: usize,
    rgb: Vec<u8>,
}

impl Scene {
    fn new(width: usize, height: usize, grey: u8) -> Self {
        Self { width, height, rgb: vec![grey; 3 * width * height] }
    }

    fn square(mut self, x: usize, y: usize, side: usize, colour: [u8; 3]) -> Self {
        for row in y..y + side {
            for column in x..x + side {
                let at = 3 * (row * self.width + column);
                self.rgb[at..at + 3].copy_from_slice(&colour);
            }
        }
        self
    }

    fn picture(&self) -> Picture<'_> {
        let plane = Plane { data: &self.rgb, stride: 3 * self.width };
        let (width, height) = (self.width, self.height);
        Picture { width, height, color: LIMITED, pixels: Pixels::Rgb(plane) }
    }
}

fn detect(model: &Model, scene: &Scene) -> Result<Vec<Detection>, RunError> {
    let mut found = Vec::new();
    let mut runner = model.runner();
    runner.preprocess(&scene.picture())?;
    runner.run()?;
    runner.postprocess(&THRESHOLDS, &mut found)?;
    Ok(found)
}

/// The centre of the best box, in pixels of the scene.
fn centre(scene: &Scene, found: &Detection) -> (f32, f32) {
    let (w, h) = (scene.width as f32, scene.height as f32);
    ((found.x1 + found.x2) / 2.0 * w, (found.y1 + found.y2) / 2.0 * h)
}

#[test]
fn every_layout_finds_the_blob_where_it_is() {
    for output in [Output::Yolo8, Output::Yolo5, Output::Yolox, Output::End2end, Output::Rtdetr] {
        for half in [false, true] {
            let mut detector = Detector::new(output, 320, 192);
            detector.half = half;
            if output == Output::End2end {
                detector = detector.with_metadata("end2end", "True");
            }
            if output == Output::Rtdetr {
                detector = detector.with_metadata("description", "Ultralytics rtdetr-l model");
            }
            let model = build(&detector).unwrap_or_else(|e| panic!("{output:?}: {e}"));
            let scene = Scene::new(640, 384, 40).square(320, 128, 64, [0, 255, 0]);
            let found = detect(&model, &scene).unwrap_or_else(|e| panic!("{output:?}: {e}"));
            assert_eq!(found[0].class_id, 1, "{output:?} half={half}: {found:?}");
            assert!(found[0].score > 0.9, "{output:?}: {found:?}");
            let (x, y) = centre(&scene, &found[0]);
            assert!((320.0..384.0).contains(&x), "{output:?}: {x}");
            assert!((128.0..192.0).contains(&y), "{output:?}: {y}");
        }
    }
}

#[test]
fn faults_are_reported_and_pass() {
    let bright = Scene::new(320, 320, 255);
    let dark = Scene::new(320, 320, 40);
    for (fault, wanted) in [(Fault::Nan, "NaN"), (Fault::Error, "inference failed")] {
        let mut detector = Detector::new(Output::Yolo8, 320, 320);
        detector.fault = fault;
        let model = build(&detector).expect("it works on black");
        let failed = detect(&model, &bright).expect_err("a bright picture fails").to_string();
        assert!(failed.contains(wanted), "{fault:?}: {failed}");
        detect(&model, &dark).expect("the next frame is fine");
    }
}

#[test]
fn a_hanging_run_is_terminated_from_another_thread() {
    let mut detector = Detector::new(Output::Yolo8, 320, 320);
    detector.fault = Fault::Hang;
    let model = build(&detector).expect("it works on black");
    let bright = Scene::new(320, 320, 255);
    std::thread::scope(|threads| {
        let run = threads.spawn(|| detect(&model, &bright));
        std::thread::sleep(std::time::Duration::from_millis(300));
        assert!(!run.is_finished(), "the run hangs");
        model.terminate();
        let failed = run.join().expect("no panic").expect_err("the run was stopped");
        assert_eq!(failed, RunError::Terminated);
    });
}
