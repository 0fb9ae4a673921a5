//! The model: its file, its contract, its runs; `refusals` has what is not taken.

use std::sync::Arc;

use noblink::config::Provider;
use noblink::model::contract::Overrides;
use noblink::model::engine::{Detection, EngineOptions, Model, OpenError, RunError, Thresholds};
use noblink::model::file::ModelFile;
use noblink::model::layout::Layout;
use noblink::model::options::Setting;
use noblink::model::refusal::{Code, Refusal};
use noblink::model::runtime::Runtime;
use noblink::model::slot::{Live, Slot};
use noblink::vision::letterbox::Fit;
use noblink::vision::picture::{Color, Matrix, Picture, Pixels, Plane, Range};
use noblink::vision::preprocess::{Order, Scale};

use crate::harness::onnx::{
    self as factory, Attr, Detector, FLOAT, FLOAT16, Fault, Graph, Output, Size,
};

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

/// A model of one class with these scores as its output, `[1, 5, 84]`.
fn detector(mut g: Graph, scores: &str, opset: u64) -> Vec<u8> {
    g.node_to("Identity", &[scores], "output0", &[]);
    g.output("output0", FLOAT, &[1, 5, 84].map(Size::Fixed));
    let names = ("names".to_owned(), "{0: 'thing'}".to_owned());
    factory::model_of_opset(&g, &[names], opset)
}

/// A model of 64x64 whose output is a Softmax over its five rows: as it is exported, or with the rows
/// turned into the last axis and back.
fn softmax(opset: u64, turned: bool) -> Vec<u8> {
    let mut g = Graph::default();
    g.input("images", FLOAT, &[1, 3, 64, 64].map(Size::Fixed));
    let weights = |n: usize| (0..n).map(|i| ((i * 37 % 101) as f32 - 50.0) / 20.0).collect();
    let (pixels, rows): (Vec<f32>, Vec<f32>) = (weights(64 * 64 * 84), weights(5 * 3));
    g.ints("flat", &[3], &[1, 3, 64 * 64]);
    g.floats("pixels", &[64 * 64, 84], &pixels);
    g.floats("rows", &[5, 3], &rows);
    let colours = g.node("Reshape", &["images", "flat"], &[]);
    let anchors = g.node("MatMul", &[&colours, "pixels"], &[]);
    let logits = g.node("MatMul", &["rows", &anchors], &[]);
    let turn = ("perm", Attr::Ints(vec![0, 2, 1]));
    let scores = if turned {
        let across = g.node("Transpose", &[&logits], std::slice::from_ref(&turn));
        let scores = g.node("Softmax", &[&across], &[("axis", Attr::Int(-1))]);
        g.node("Transpose", &[&scores], &[turn])
    } else {
        g.node("Softmax", &[&logits], &[("axis", Attr::Int(1))])
    };
    detector(g, &scores, opset)
}

/// The output for a scene.
fn raw(bytes: Vec<u8>) -> Vec<f32> {
    let scene = Scene::new(64, 64, 90).square(8, 16, 24, [10, 200, 60]);
    let file = ModelFile::parse(bytes, "rewritten.onnx", &Overrides::default(), &[]);
    let file = file.expect("a detector");
    let model = Model::build(&runtime(), &file, &EngineOptions::default()).expect("it loads");
    let mut runner = model.runner();
    runner.preprocess(&scene.picture()).expect("a picture");
    runner.run().expect("it runs");
    runner.raw().expect("an output").to_vec()
}

#[test]
fn a_softmax_over_the_channels_is_the_same_as_one_over_the_last_axis() {
    for opset in [13, 17, 18] {
        let (own, turned) = (raw(softmax(opset, false)), raw(softmax(opset, true)));
        assert!(own.iter().any(|p| (0.01..0.99).contains(p)), "opset {opset}: no extremes only");
        for (n, (a, b)) in own.iter().zip(&turned).enumerate() {
            assert!((a - b).abs() < 1e-6, "opset {opset}, value {n}: {a} and {b}");
        }
    }
}

fn weights(count: usize) -> Vec<f32> {
    (0..count).map(|i| ((i * 37 % 101) as f32 - 50.0) / 40.0).collect()
}

/// A model whose output is made of the last value, `[1, channels, 8, 8]`.
fn read_out(mut g: Graph, last: &str, channels: usize, opset: u64) -> Vec<u8> {
    g.ints("flat", &[3], &[1, channels as i64, 64]);
    g.floats("pixels", &[64, 84], &weights(64 * 84));
    g.floats("rows", &[5, channels], &weights(5 * channels));
    let flat = g.node("Reshape", &[last, "flat"], &[]);
    let anchors = g.node("MatMul", &[&flat, "pixels"], &[]);
    let scores = g.node("MatMul", &["rows", &anchors], &[]);
    detector(g, &scores, opset)
}

/// The input, and a convolution of it to 8x8 with SiLU.
fn stem(count: usize) -> (Graph, String) {
    let mut g = Graph::default();
    g.input("images", FLOAT, &[1, 3, 64, 64].map(Size::Fixed));
    g.floats("filters", &[count, 3, 8, 8], &weights(count * 3 * 64));
    g.floats("bias", &[count], &weights(count));
    let stride = ("strides", Attr::Ints(vec![8, 8]));
    let found = g.node("Conv", &["images", "filters", "bias"], &[stride]);
    let gate = g.node("Sigmoid", &[&found], &[]);
    let silu = g.node("Mul", &[&found, &gate], &[]);
    (g, silu)
}

/// A model with a C2f's beginning: a convolution of 48 channels, SiLU and a Split into 16 and 32;
/// `apart`: with something between the last two.
fn c2f(opset: u64, apart: bool) -> Vec<u8> {
    let (mut g, mut both) = stem(48);
    g.floats("more filters", &[32, 16, 1, 1], &weights(32 * 16));
    g.ints("sizes", &[2], &[16, 32]);
    if apart {
        both = g.node("Identity", &[&both], &[]);
    }
    g.node_to("Split", &[&both, "sizes"], "few\0many", &[("axis", Attr::Int(1))]);
    let few = g.node("Conv", &["few", "more filters"], &[]);
    let sum = g.node("Add", &[&few, "many"], &[]);
    read_out(g, &sum, 32, opset)
}

#[test]
fn filters_that_are_split_find_what_split_channels_would() {
    for opset in [13, 18] {
        let (own, apart) = (raw(c2f(opset, false)), raw(c2f(opset, true)));
        assert!(own.iter().any(|p| *p > 1.0), "opset {opset}: not nothing but zeros");
        assert_eq!(own, apart, "opset {opset}");
    }
}

/// A model with a convolution of 80 filters of 3x3; `apart`: they are computed, in a way that changes
/// nothing.
fn eighty(apart: bool) -> Vec<u8> {
    let (mut g, input) = stem(16);
    g.floats("eighty", &[80, 16, 3, 3], &weights(80 * 16 * 9));
    let filters = if apart { g.node("Identity", &["eighty"], &[]) } else { "eighty".to_owned() };
    let pads = ("pads", Attr::Ints(vec![1, 1, 1, 1]));
    let found = g.node("Conv", &[&input, &filters], &[pads]);
    let gate = g.node("Sigmoid", &[&found], &[]);
    let silu = g.node("Mul", &[&found, &gate], &[]);
    read_out(g, &silu, 80, 17)
}

#[test]
fn eighty_filters_find_as_sixty_four_and_sixteen_what_they_would() {
    let (own, apart) = (raw(eighty(false)), raw(eighty(true)));
    assert!(own.iter().any(|p| *p > 1.0), "not nothing but zeros");
    assert_eq!(own, apart);
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

pub fn derive(bytes: Vec<u8>) -> Result<ModelFile, Refusal> {
    ModelFile::parse(bytes, "best.onnx", &Overrides::default(), &[])
}

/// One input, one output; nothing that runs.
pub fn shell(input: &[Size], outputs: &[(&str, &[Size])], metadata: &[(&str, &str)]) -> Vec<u8> {
    let mut graph = Graph::default();
    graph.input("images", FLOAT, input);
    for (name, dims) in outputs {
        graph.output(name, FLOAT, dims);
    }
    finish(&graph, metadata)
}

pub fn finish(graph: &Graph, metadata: &[(&str, &str)]) -> Vec<u8> {
    let metadata: Vec<_> =
        metadata.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
    factory::model(graph, &metadata)
}

pub fn fixed(dims: &[usize]) -> Vec<Size> {
    dims.iter().map(|n| Size::Fixed(*n)).collect()
}

pub fn output(dims: &[usize], metadata: &[(&str, &str)]) -> Vec<u8> {
    shell(&fixed(&[1, 3, 640, 640]), &[("output0", &fixed(dims))], metadata)
}

pub fn names(n: usize) -> String {
    let names: Vec<_> = (0..n).map(|n| format!("{n}: 'c{n}'")).collect();
    format!("{{{}}}", names.join(", "))
}

#[test]
fn layouts_are_told_by_shape_then_metadata() {
    let n1 = names(1);
    let n2 = names(2);
    let n80 = names(80);
    let end2end: &[(&str, &str)] = &[("end2end", "True")];
    let nms: &[(&str, &str)] = &[("args", "{'batch': 1, 'nms': True}"), ("end2end", "False")];
    let head: &[(&str, &str)] = &[("head", "RTDETRDecoder"), ("end2end", "False")];
    let described: &[(&str, &str)] = &[("description", "Ultralytics rtdetr-l model")];
    for (dims, labels, extra, layout, ranked) in [
        ([1, 84, 8400], &n80, &[][..], Layout::Yolo8, false),
        // Three strides and a fourth, finer one.
        ([1, 84, 34000], &n80, &[], Layout::Yolo8, false),
        ([1, 25200, 85], &n80, &[], Layout::Yolo5, false),
        ([1, 25200, 6], &n1, &[], Layout::Yolo5, false),
        ([1, 8400, 85], &n80, &[], Layout::Yolox, false),
        ([1, 300, 6], &n80, &[], Layout::End2end, false),
        ([1, 300, 6], &n2, end2end, Layout::End2end, false),
        ([1, 300, 6], &n2, nms, Layout::End2end, false),
        ([1, 300, 6], &n80, head, Layout::Rtdetr, true),
        ([1, 300, 6], &n2, head, Layout::Rtdetr, true),
        ([1, 300, 6], &n2, described, Layout::Rtdetr, false),
        ([1, 300, 84], &n80, &[], Layout::Rtdetr, false),
        // Anchors of no known strides, but as many rows as labels and box.
        ([1, 84, 777], &n80, &[("end2end", "False")], Layout::Yolo8, false),
    ] {
        let metadata = [&[("names", labels.as_str())], extra].concat();
        let file = derive(output(&dims, &metadata)).unwrap_or_else(|e| panic!("{dims:?}: {e}"));
        assert_eq!((file.contract.layout, file.contract.ranked), (layout, ranked), "{dims:?}");
    }
}

/// `yolo export dynamic=True` leaves every size of the output open.
#[test]
fn an_output_without_sizes_is_told_by_its_exporter() {
    let open = [Size::Named("batch"), Size::Named("dim_1"), Size::Named("anchors")];
    let n80 = names(80);
    for (extra, layout, ranked) in [
        (("end2end", "False"), Layout::Yolo8, false),
        (("end2end", "True"), Layout::End2end, false),
        (("head", "RTDETRDecoder"), Layout::Rtdetr, true),
    ] {
        let metadata = [("names", n80.as_str()), ("task", "detect"), extra];
        let bytes = shell(&fixed(&[1, 3, 640, 640]), &[("output0", &open)], &metadata);
        let contract = derive(bytes).expect("the exporter says it").contract;
        assert_eq!((contract.layout, contract.ranked), (layout, ranked), "{extra:?}");
    }
}

#[test]
fn a_manifest_decides_what_is_open() {
    let bytes = output(&[1, 300, 6], &[("names", &names(2))]);
    let text = r#"{"model": "Gate 7", "version": "2", "layout": "rtdetr",
        "input": {"order": "bgr", "scale": "byte", "fit": "letterbox"}, "labels": ["a", "b"]}"#;
    let overrides: Overrides = serde_json::from_str(text).expect("a manifest");
    let file = ModelFile::parse(bytes, "best.onnx", &overrides, &[]).expect("it is said");
    assert_eq!(file.contract.layout, Layout::Rtdetr);
    let input = &file.contract.input;
    assert_eq!((input.order, input.scale, input.fit), (Order::Bgr, Scale::Byte, Fit::Letterbox));
    assert_eq!(file.contract.labels, ["a", "b"]);
    assert_eq!((file.identity.id.as_str(), file.identity.version.as_str()), ("gate-7", "2"));
}

#[test]
fn yolox_and_rtdetr_bring_their_own_input() {
    let yolox = derive(output(&[1, 8400, 6], &[("names", &names(1))])).expect("yolox");
    let input = yolox.contract.input;
    assert_eq!((input.order, input.scale, input.fit), (Order::Bgr, Scale::Byte, Fit::Corner));
    let rtdetr = derive(output(&[1, 300, 9], &[("names", &names(5))])).expect("rtdetr");
    assert_eq!(rtdetr.contract.input.fit, Fit::Stretch);
}

#[test]
fn identity_is_metadata_then_name_and_digest() {
    let bytes = Detector::new(Output::Yolo8, 64, 64).bytes();
    let file = ModelFile::parse(bytes, "My Plates (v2).onnx", &Overrides::default(), &[])
        .expect("a detector");
    assert_eq!(file.identity.id, "my-plates--v2-");
    assert_eq!(file.identity.version, file.identity.sha256[..8]);
    let named = Detector::new(Output::Yolo8, 64, 64)
        .with_metadata("noblink.model", "plates")
        .with_metadata("noblink.version", "2026.10");
    let file = derive(named.bytes()).expect("a detector");
    assert_eq!((file.identity.id.as_str(), file.identity.version.as_str()), ("plates", "2026.10"));
}

#[test]
fn a_dynamic_model_runs_at_the_size_in_its_metadata() {
    let mut detector = Detector::new(Output::Yolo8, 320, 192);
    detector.dynamic = true;
    let model = build(&detector).expect("imgsz says 192, 320");
    let sizes: Vec<_> = model.contract().fixed.iter().map(|(n, s)| (n.as_str(), *s)).collect();
    assert_eq!(sizes, [("batch", 1), ("height", 192), ("width", 320)]);
    let scene = Scene::new(640, 384, 40).square(0, 0, 64, [255, 0, 0]);
    assert_eq!(detect(&model, &scene).expect("it runs")[0].class_id, 0);
}

#[test]
fn what_onnx_runtime_does_not_take_is_refused_with_its_words() {
    let mut graph = Graph::default();
    graph.input("images", FLOAT16, &fixed(&[1, 3, 640, 640]));
    graph.output("output0", FLOAT, &fixed(&[1, 84, 8400]));
    graph.halves("weight", &[1], &[1.0]);
    graph.node_to("NoSuchOperator", &["images"], "output0", &[("axis", Attr::Int(1))]);
    let file = derive(finish(&graph, &[("names", &names(80))])).expect("the contract is fine");
    let error = Model::build(&runtime(), &file, &EngineOptions::default()).expect_err("no such op");
    let OpenError::Refused(refusal) = error else { panic!("{error}") };
    assert_eq!(refusal.code, Code::Session);
    assert!(refusal.message.starts_with("best: ONNX Runtime does not load it: "), "{refusal}");
    assert!(refusal.message.contains("NoSuchOperator"), "{refusal}");
}

#[test]
fn a_missing_file_is_refused_by_name() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("best.onnx");
    let refusal = ModelFile::read(&path, &Overrides::default(), &[]).expect_err("no file");
    assert_eq!(refusal.code, Code::Unreadable);
    assert!(refusal.message.contains("can't be read"), "{refusal}");
    let path = Detector::new(Output::Yolo8, 64, 64).write(folder.path(), "blob.onnx");
    let model = Model::open(&runtime(), &path, &EngineOptions::default(), &Overrides::default());
    assert_eq!(model.expect("it is there").identity().id, "blob");
}

#[test]
fn the_slot_hands_out_what_was_put_in_last() {
    let slot = Slot::default();
    assert!(slot.load().is_none());
    let model = Arc::new(build(&Detector::new(Output::Yolo8, 64, 64)).expect("it works"));
    let first = Live::new(Arc::clone(&model), 1, None);
    assert!(slot.swap(Some(first)).is_none());
    let held = slot.load().expect("it was put in");
    let retired = slot.swap(Some(Live::new(model, 2, None))).expect("the first");
    assert_eq!((held.epoch, retired.epoch), (1, 1));
    assert_eq!(slot.load().map(|l| l.epoch), Some(2));
}

#[test]
fn a_provider_that_the_library_lacks_is_an_error_not_a_fallback() {
    let detector = Detector::new(Output::Yolo8, 64, 64);
    let file = derive(detector.bytes()).expect("a detector");
    let options = {
        let setting = Setting { provider: Provider::TensorRt, ..Setting::default() };
        EngineOptions { setting, ..EngineOptions::default() }
    };
    let error = Model::build(&runtime(), &file, &options).expect_err("no GPU here").to_string();
    assert!(error.starts_with("provider tensorrt can't be used with /"), "{error}");
}

#[test]
fn the_library_is_found_and_says_its_version() {
    let runtime = runtime();
    assert!(runtime.version().starts_with("1."), "{}", runtime.version());
    assert!(runtime.library().is_absolute());
}
