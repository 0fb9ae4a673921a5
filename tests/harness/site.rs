//! A site with pictures of its own: a calibration folder, and the model that made its labels.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use noblink::model::contract::Overrides;
use noblink::model::engine::{EngineOptions, Model, Thresholds};
use noblink::model::runtime::Runtime;
use noblink::vision::picture::{Color, Matrix, Picture, Pixels, Plane, Range};

use super::onnx::{Detector, Output};

const WIDTH: usize = 640;
const HEIGHT: usize = 384;
const COLOR: Color = Color { matrix: Matrix::Bt601, range: Range::Full };

/// The detector that all bad ones are compared with.
pub fn good() -> Detector {
    Detector::new(Output::Yolo8, 320, 192)
}

/// Grey, with three squares in pure colours.
pub fn scene(n: usize) -> Vec<u8> {
    let mut rgb = vec![40; 3 * WIDTH * HEIGHT];
    for (colour, (x, y)) in [(0, (64, 64)), (1, (320, 192)), (2, (512, 64))].into_iter() {
        let (x, y) = (x + 16 * (n % 4), y + 16 * (n / 4));
        for row in y..y + 64 {
            for column in x..x + 64 {
                let at = 3 * (row * WIDTH + column);
                rgb[at..at + 3].copy_from_slice(&[0; 3]);
                rgb[at + colour] = 255;
            }
        }
    }
    rgb
}

pub fn picture(rgb: &[u8]) -> Picture<'_> {
    let plane = Plane { data: rgb, stride: 3 * WIDTH };
    Picture { width: WIDTH, height: HEIGHT, color: COLOR, pixels: Pixels::Rgb(plane) }
}

fn png(file: &Path, rgb: &[u8]) {
    let file = std::fs::File::create(file).expect("the folder is ours");
    let mut encoder = png::Encoder::new(file, WIDTH as u32, HEIGHT as u32);
    encoder.set_color(png::ColorType::Rgb);
    let mut writer = encoder.write_header().expect("a picture");
    writer.write_image_data(rgb).expect("a picture");
}

/// A folder with models and pictures; the labels are what [`good`] finds.
pub struct Site {
    pub dir: tempfile::TempDir,
    pub active: PathBuf,
}

impl Site {
    /// A program in the proving child's place.
    pub fn impostor(&self, script: &str) -> PathBuf {
        let [draft, program] = ["draft", "impostor"].map(|name| self.dir.path().join(name));
        // Written elsewhere and renamed: a program that another thread's child still holds open for
        // writing can't be started.
        std::fs::write(&draft, script).expect("ours");
        std::fs::set_permissions(&draft, PermissionsExt::from_mode(0o700)).expect("ours");
        std::fs::rename(&draft, &program).expect("ours");
        program
    }

    pub fn new() -> Self {
        let dir = tempfile::tempdir().expect("a folder");
        let active = good().write(dir.path(), "good.onnx");
        let runtime = Runtime::load(None).expect("the library");
        let overrides = Overrides::default();
        let model = Model::open(&runtime, &active, &EngineOptions::default(), &overrides)
            .expect("the good one opens");
        for part in ["images", "labels"] {
            std::fs::create_dir(dir.path().join(part)).expect("the folder is ours");
        }
        let thresholds = Thresholds { confidence: 0.25, iou: 0.7 };
        let mut found = Vec::new();
        for n in 0..8 {
            let rgb = scene(n);
            let mut runner = model.runner();
            runner.preprocess(&picture(&rgb)).expect("a picture");
            runner.run().expect("a run");
            runner.postprocess(&thresholds, &mut found).expect("an output");
            let lines: String = found
                .iter()
                .map(|d| {
                    let (w, h) = (d.x2 - d.x1, d.y2 - d.y1);
                    let (x, y) = (d.x1 + w / 2.0, d.y1 + h / 2.0);
                    format!("{} {x} {y} {w} {h}\n", d.class_id)
                })
                .collect();
            png(&dir.path().join(format!("images/{n}.png")), &rgb);
            std::fs::write(dir.path().join(format!("labels/{n}.txt")), lines).expect("ours");
        }
        std::fs::write(dir.path().join("data.yaml"), "names: [red, green, blue]\n").expect("ours");
        Self { dir, active }
    }
}
