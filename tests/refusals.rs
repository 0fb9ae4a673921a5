//! What is refused, in which words; and that nothing makes the readers of outside bytes panic.

use noblink::model::contract::Overrides;
use noblink::model::file::ModelFile;
use noblink::model::layout::Layout;
use noblink::model::refusal::Code;
use noblink::model::{labels, onnx};
use proptest::prelude::*;

use crate::harness::onnx::{
    self as factory, Attr, Detector, FLOAT, Graph, INT64, Output, Size, UINT8,
};
use crate::model::{derive, finish, fixed, names, output, shell};

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
