//! The model: its file, its contract, its refusals, its runs.

use std::sync::Arc;

use noblink::config::Provider;
use noblink::model::contract::Overrides;
use noblink::model::engine::{Detection, EngineOptions, Model, OpenError, RunError, Thresholds};
use noblink::model::file::ModelFile;
use noblink::model::layout::Layout;
use noblink::model::refusal::{Code, Refusal};
use noblink::model::runtime::Runtime;
use noblink::model::slot::{Live, Slot};
use noblink::model::{labels, onnx};
use noblink::vision::letterbox::Fit;
use noblink::vision::picture::{Color, Matrix, Picture, Pixels, Plane, Range};
use noblink::vision::preprocess::{Order, Scale};

use proptest::prelude::*;

use crate::harness::onnx::{
    self as factory, Attr, Detector, FLOAT, FLOAT16, Fault, Graph, INT64, Output, Size, UINT8,
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

fn derive(bytes: Vec<u8>) -> Result<ModelFile, Refusal> {
    ModelFile::parse(bytes, "best.onnx", &Overrides::default(), &[])
}

/// One input, one output; nothing that runs.
fn shell(input: &[Size], outputs: &[(&str, &[Size])], metadata: &[(&str, &str)]) -> Vec<u8> {
    let mut graph = Graph::default();
    graph.input("images", FLOAT, input);
    for (name, dims) in outputs {
        graph.output(name, FLOAT, dims);
    }
    finish(&graph, metadata)
}

fn finish(graph: &Graph, metadata: &[(&str, &str)]) -> Vec<u8> {
    let metadata: Vec<_> =
        metadata.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
    factory::model(graph, &metadata)
}

fn fixed(dims: &[usize]) -> Vec<Size> {
    dims.iter().map(|n| Size::Fixed(*n)).collect()
}

fn output(dims: &[usize], metadata: &[(&str, &str)]) -> Vec<u8> {
    shell(&fixed(&[1, 3, 640, 640]), &[("output0", &fixed(dims))], metadata)
}

fn names(n: usize) -> String {
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

/// Every refusal with its exact words: they are what a user acts upon.
#[test]
fn refusals_say_what_was_found_and_what_to_do() {
    let n80 = names(80);
    let labelled: &[(&str, &str)] = &[("names", &n80)];
    let good = || fixed(&[1, 84, 8400]);
    let input = |dims: &[usize]| shell(&fixed(dims), &[("output0", &good())], labelled);
    let task = |task| output(&[1, 116, 8400], &[("names", &n80), ("task", task)]);
    let mut external = Graph::default();
    external.input("images", FLOAT, &fixed(&[1, 3, 640, 640]));
    external.output("output0", FLOAT, &good());
    external.external("model.0.weight", &[16, 3, 3, 3], "best.onnx.data");
    let node = |op: &str| {
        let mut graph = Graph::default();
        graph.input("images", FLOAT, &fixed(&[1, 3, 640, 640]));
        graph.output("output0", FLOAT, &good());
        graph.node_to(op, &["images"], "output0", &[]);
        finish(&graph, labelled)
    };
    let mut bytes_in = Graph::default();
    bytes_in.input("images", UINT8, &fixed(&[1, 3, 640, 640]));
    bytes_in.output("output0", FLOAT, &good());
    let mut longs_out = Graph::default();
    longs_out.input("images", FLOAT, &fixed(&[1, 3, 640, 640]));
    longs_out.output("output0", INT64, &good());
    let mut two_in = Graph::default();
    two_in.input("images", FLOAT, &fixed(&[1, 3, 640, 640]));
    two_in.input("orig_target_sizes", INT64, &fixed(&[1, 2]));
    two_in.output("boxes", FLOAT, &good());
    let mut garbage = output(&[1, 84, 8400], labelled);
    let whole = garbage.len();
    garbage.extend([0; 16]);
    let cut = output(&[1, 84, 8400], labelled)[..60].to_vec();
    let dynamic = [Size::Fixed(1), Size::Fixed(3), Size::Named("height"), Size::Named("width")];

    for (bytes, code, message) in [
        (vec![], Code::NotOnnx, "is empty: copy it again"),
        (
            b"PK\x03\x04........best/data.pkl".to_vec(),
            Code::NotOnnx,
            "is a PyTorch model, not ONNX: run `yolo export model=best.onnx format=onnx`",
        ),
        (
            b"PK\x03\x04........best/best.onnx".to_vec(),
            Code::NotOnnx,
            "is a zip archive, not ONNX: unpack it and use the .onnx file in it",
        ),
        (
            b"\n<!DOCTYPE html><html><title>Sign in".to_vec(),
            Code::NotOnnx,
            "is a web page, not ONNX: the server probably sent a login or error page; open it in \
             a browser to see",
        ),
        (
            b"version https://git-lfs.github.com/spec/v1".to_vec(),
            Code::NotOnnx,
            "is a Git LFS pointer, not the file itself: run `git lfs pull`",
        ),
        (
            b"\x1c\0\0\0TFL3............".to_vec(),
            Code::NotOnnx,
            "is a TensorFlow Lite model, not ONNX: run `yolo export model=best.pt format=onnx`",
        ),
        (
            b"\x10\x02\0\0{\"description\": \"Ultralytics".to_vec(),
            Code::NotOnnx,
            "is a TensorRT engine, bound to one GPU, not ONNX: run `yolo export model=best.pt \
             format=onnx` and set provider = \"tensorrt\"",
        ),
        (
            cut,
            Code::NotOnnx,
            "ends in the middle of a field: the file was cut short, or is no ONNX model",
        ),
        (
            factory::number_field(1, 8),
            Code::NotOnnx,
            "has no graph: the file was cut short, or is no ONNX model",
        ),
        (
            garbage,
            Code::NotOnnx,
            &format!("goes on after the model's end (byte {whole}) with bytes that are not ONNX"),
        ),
        (
            finish(&external, labelled),
            Code::ExternalData,
            "tensor \"model.0.weight\" has its data in another file; a model is one file here: \
             save it whole with onnx.save(model, path, save_as_external_data=False)",
        ),
        (
            node("com.microsoft/EPContext"),
            Code::CompiledBlob,
            "holds a part compiled for one device (EPContext): use the ONNX file that it was \
             compiled from",
        ),
        (
            node("acme.ops/Magic"),
            Code::CustomOperators,
            "uses operators of the domain \"acme.ops\", which is not allowed: export without \
             custom operators, or add it to models.custom_op_domains",
        ),
        (
            task("segment"),
            Code::TaskUnsupported,
            "is a segmentation model; only detection models are supported: export one trained \
             with task=detect",
        ),
        (
            task("pose"),
            Code::TaskUnsupported,
            "is a pose model; only detection models are supported: export one trained with \
             task=detect",
        ),
        (
            task("obb"),
            Code::TaskUnsupported,
            "is a model of oriented boxes (OBB); only detection models are supported: export one \
             trained with task=detect",
        ),
        (
            output(&[1, 1000], labelled),
            Code::TaskUnsupported,
            "is a classification model; only detection models are supported: export one trained \
             with task=detect",
        ),
        (
            shell(
                &fixed(&[1, 3, 640, 640]),
                &[("output0", &fixed(&[1, 116, 8400])), ("output1", &fixed(&[1, 32, 160, 160]))],
                labelled,
            ),
            Code::TaskUnsupported,
            "is a segmentation model; only detection models are supported: export one trained \
             with task=detect",
        ),
        (
            finish(&two_in, labelled),
            Code::InputCount,
            "has 2 inputs (\"images\" [1, 3, 640, 640], \"orig_target_sizes\" [1, 2]); a detector \
             takes one picture: export it without further inputs",
        ),
        (
            input(&[1, 640, 640, 3]),
            Code::InputShape,
            "input \"images\" [1, 640, 640, 3] has its channels last: export it as \
             [1, 3, height, width]",
        ),
        (
            input(&[4, 3, 640, 640]),
            Code::InputShape,
            "input \"images\" [4, 3, 640, 640] takes several pictures at once: export it as \
             [1, 3, height, width]",
        ),
        (
            input(&[1, 1, 640, 640]),
            Code::InputShape,
            "input \"images\" [1, 1, 640, 640] has 1 channels, not 3: export it as \
             [1, 3, height, width]",
        ),
        (
            input(&[1, 512]),
            Code::InputShape,
            "input \"images\" [1, 512] is no picture: export it as [1, 3, height, width]",
        ),
        (
            input(&[1, 3, 20000, 640]),
            Code::InputShape,
            "input \"images\" is 640x20000 pixels; sides from 32 to 8192 are supported",
        ),
        (
            finish(&bytes_in, labelled),
            Code::InputType,
            "input \"images\" [1, 3, 640, 640] is of type uint8; float and float16 are supported: \
             quantised models keep float at both ends (QDQ)",
        ),
        (
            shell(&dynamic, &[("output0", &good())], labelled),
            Code::DynamicShape,
            "input \"images\" [1, 3, height, width] leaves its size open and no `imgsz` in the \
             metadata says it: export with a fixed size (`yolo export … dynamic=False imgsz=640`)",
        ),
        (
            finish(&longs_out, labelled),
            Code::OutputType,
            "output \"output0\" [1, 84, 8400] is of type int64; float and float16 are supported: \
             quantised models keep float at both ends (QDQ)",
        ),
        (
            shell(
                &fixed(&[1, 3, 640, 640]),
                &[("logits", &fixed(&[1, 300, 80])), ("boxes", &fixed(&[1, 300, 4]))],
                labelled,
            ),
            Code::UnknownLayout,
            "has the outputs \"logits\" [1, 300, 80], \"boxes\" [1, 300, 4]; known are one \
             [1, 4+classes, anchors] (YOLOv8 and later), [1, anchors, 5+classes] (YOLOv5, YOLOX), \
             [1, boxes, 6] (end-to-end) or [1, boxes, 4+classes] (RT-DETR)",
        ),
        (
            output(&[1, 77, 99], labelled),
            Code::UnknownLayout,
            "output [1, 77, 99] with an input of 640x640 and 80 labels is no known layout: known \
             are [1, 4+classes, anchors] (yolo8), [1, anchors, 5+classes] (yolo5, yolox), \
             [1, boxes, 6] (end2end), [1, boxes, 4+classes] (rtdetr); say `layout` in the manifest \
             if it is one",
        ),
        (
            output(&[1, 300, 6], &[("names", &names(2))]),
            Code::AmbiguousLayout,
            "output [1, 300, 6] can be read as end2end or as rtdetr: say which in the manifest \
             (\"layout\": \"end2end\")",
        ),
        (
            output(&[1, 84, 8400], &[]),
            Code::LabelsMissing,
            "names no classes (yolo8, [1, 84, 8400]): write `names` into its metadata as the \
             exporters of Ultralytics do, or `labels` into its manifest",
        ),
        (
            output(&[1, 84, 8400], &[("names", "{0: 'a', 2: 'b'}")]),
            Code::LabelsInvalid,
            "`names` in its metadata does not name class 1: write {0: 'person', …} there, or \
             `labels` in its manifest",
        ),
        (
            output(&[1, 84, 8400], &[("names", "['a', 'b']")]),
            Code::LabelsCount,
            "output \"output0\" has 80 classes (yolo8, [1, 84, 8400]), but the model names 2: \
             correct `names` in its metadata, or `labels` in its manifest",
        ),
    ] {
        let refusal = derive(bytes).expect_err(message);
        assert_eq!((refusal.code, refusal.message), (code, format!("best.onnx: {message}")));
    }
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
fn a_layout_that_cannot_be_is_refused() {
    let overrides = Overrides { layout: Some(Layout::End2end), ..Overrides::default() };
    let bytes = output(&[1, 84, 8400], &[("names", &names(80))]);
    let refusal = ModelFile::parse(bytes, "best.onnx", &overrides, &[]).expect_err("84 rows");
    assert_eq!(refusal.code, Code::LayoutMismatch);
    let wanted = "best.onnx: the manifest says layout \"end2end\", but the output [1, 84, 8400] \
                  can't be read so";
    assert_eq!(refusal.message, wanted);
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
fn labels_of_python_and_json() {
    for (text, wanted) in [
        ("{0: 'person', 1: \"it's\"}", &["person", "it's"][..]),
        ("{1: 'b', 0: 'a'}", &["a", "b"]),
        ("{'0': 'a', '1': 'b'}", &["a", "b"]),
        ("{\"0\": \"stra\\u00dfe\", \"1\": \"\\ud83d\\ude97\"}", &["straße", "🚗"]),
        ("{0: 'a\\'b', 1: '\\x41\\U0001f697\\\\'}", &["a'b", "A🚗\\"]),
        ("['a', 'b',]", &["a", "b"]),
        ("(\"Fußgänger\", 'car')", &["Fußgänger", "car"]),
        ("{}", &[]),
    ] {
        assert_eq!(labels::parse(text).expect(text), wanted, "{text}");
    }
    for (text, wanted) in [
        ("", "is neither a dict nor a list"),
        ("person", "is neither a dict nor a list"),
        ("{0: 'a'", "has something unexpected at character 7"),
        ("{0: 'a", "ends within a label"),
        ("{0: 'a', 0: 'b'}", "names class 0 twice"),
        ("{x: 'a'}", "has a class \"\", no number"),
        ("{99999: 'a'}", "has a class above 10000"),
        ("['a'] b", "goes on after its end"),
        ("['\\uZZZZ']", "has an escape without its digits"),
    ] {
        assert_eq!(labels::parse(text), Err(wanted.to_owned()), "{text}");
    }
}

#[test]
fn a_model_cut_anywhere_is_refused_or_whole() {
    let whole = Detector::new(Output::Yolo8, 64, 64).bytes();
    for len in 0..whole.len() {
        let _ = derive(whole[..len].to_vec());
        // The graph is all but the last few hundred bytes: without it nothing is accepted.
        if len < whole.len() - 400 {
            onnx::scan(&whole[..len]).expect_err("the graph is cut");
        }
    }
    onnx::scan(&whole).expect("the whole is fine");
}

#[test]
fn graphs_within_graphs_have_a_limit() {
    let mut graph = Graph::default();
    for _ in 0..40 {
        let mut outer = Graph::default();
        outer.node("If", &["x"], &[("then_branch", Attr::Graph(graph))]);
        graph = outer;
    }
    let refusal = onnx::scan(&finish(&graph, &[])).expect_err("40 deep");
    assert_eq!(refusal.to_string(), "has more than 16 graphs within graphs");
}

proptest! {
    #[test]
    fn no_bytes_make_the_scan_panic(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
        let _ = derive(bytes);
    }

    #[test]
    fn no_damage_makes_the_scan_panic(at in 0usize..4000, byte: u8, tail in 0usize..3) {
        let mut bytes = Detector::new(Output::End2end, 64, 64).bytes();
        let at = at % bytes.len();
        bytes[at] = byte;
        bytes.truncate(bytes.len() - tail);
        let _ = derive(bytes);
    }

    #[test]
    fn no_text_makes_the_labels_panic(text in "[\\[\\]{}()'\"\\\\0-9a-zux:, é]{0,60}") {
        let _ = labels::parse(&text);
    }
}

#[test]
fn the_slot_hands_out_what_was_put_in_last() {
    let slot = Slot::default();
    assert!(slot.load().is_none());
    let model = Arc::new(build(&Detector::new(Output::Yolo8, 64, 64)).expect("it works"));
    let first = Arc::new(Live { model: Arc::clone(&model), epoch: 1 });
    assert!(slot.swap(Some(first)).is_none());
    let held = slot.load().expect("it was put in");
    let retired = slot.swap(Some(Arc::new(Live { model, epoch: 2 }))).expect("the first");
    assert_eq!((held.epoch, retired.epoch), (1, 1));
    assert_eq!(slot.load().map(|l| l.epoch), Some(2));
}

#[test]
fn a_provider_that_the_library_lacks_is_an_error_not_a_fallback() {
    let detector = Detector::new(Output::Yolo8, 64, 64);
    let file = derive(detector.bytes()).expect("a detector");
    let options = EngineOptions { provider: Provider::TensorRt, ..EngineOptions::default() };
    let error = Model::build(&runtime(), &file, &options).expect_err("no GPU here").to_string();
    assert!(error.starts_with("provider tensorrt can't be used with /"), "{error}");
}

#[test]
fn the_library_is_found_and_says_its_version() {
    let runtime = runtime();
    assert!(runtime.version().starts_with("1."), "{}", runtime.version());
    assert!(runtime.library().is_absolute());
}
