use super::super::onnx::scan;
use super::*;

/// Puts an initializer of these numbers into a graph.
pub(super) fn put_tensor(
    graph: &mut Vec<u8>,
    name: &[u8],
    dims: &[u64],
    kind: u64,
    numbers: &[u8],
) {
    let mut tensor = Vec::new();
    dims.iter().for_each(|dim| number(&mut tensor, TENSOR_DIMS, *dim));
    number(&mut tensor, TENSOR_TYPE, kind);
    put(&mut tensor, TENSOR_NAME, name);
    put(&mut tensor, TENSOR_RAW, numbers);
    put(graph, GRAPH_INITIALIZER, &tensor);
}

/// A convolution of 3x3 at stride 1 on `[1, 24, height, width]`, halved before it, and halved and
/// doubled behind it.
pub(in super::super) fn open_model() -> Vec<u8> {
    let square =
        |stride| [ints_attribute(b"pads", &[1; 4]), ints_attribute(b"strides", &[stride; 2])];
    let bytes = |numbers: &[f32]| -> Vec<u8> {
        numbers.iter().flat_map(|number| number.to_le_bytes()).collect()
    };
    let weights: Vec<_> = (0..24 * 24 * 9).map(|n| (n % 17) as f32 / 170.0 - 0.05).collect();
    let mut graph = Vec::new();
    put_tensor(&mut graph, b"w", &[24, 24, 3, 3], FLOAT, &bytes(&weights));
    put_tensor(&mut graph, b"scales", &[4], FLOAT, &bytes(&[1.0, 1.0, 2.0, 2.0]));
    for (input, output, stride) in [(b"x", b"a", 2), (b"a", b"b", 1), (b"b", b"c", 2)] {
        let [pads, strides] = square(stride);
        put_node(&mut graph, b"Conv", &[input, b"w"], &[output], &[&pads, &strides]);
    }
    put_node(&mut graph, b"Resize", &[b"c", b"", b"scales"], &[b"d"], &[]);
    let axis = int_attribute(b"axis", 1);
    put_node(&mut graph, b"Concat", &[b"b", b"d"], &[b"y"], &[&axis]);
    let mut shape = Vec::new();
    let dims: [&[u8]; 4] = [&[8, 1], &[8, 24], b"\x12\x06height", b"\x12\x05width"];
    dims.iter().for_each(|dim| put(&mut shape, 1, dim));
    put_value(&mut graph, GRAPH_INPUT, b"x", Some(&shape));
    put_value(&mut graph, GRAPH_OUTPUT, b"y", None);
    model(&graph, 17)
}

/// Puts a `ValueInfoProto` of a tensor of floats into a graph.
pub(super) fn put_value(graph: &mut Vec<u8>, field: u32, name: &[u8], shape: Option<&[u8]>) {
    let (mut tensor, mut kind, mut value) = (Vec::new(), Vec::new(), Vec::new());
    number(&mut tensor, 1, FLOAT);
    shape.into_iter().for_each(|shape| put(&mut tensor, 2, shape));
    put(&mut kind, 1, &tensor);
    put(&mut value, VALUE_NAME, name);
    put(&mut value, 2, &kind);
    put(graph, field, &value);
}

/// A model of these nodes.
pub(super) fn model(graph: &[u8], opset: u64) -> Vec<u8> {
    let mut set = Vec::new();
    number(&mut set, 2, opset);
    let mut model = Vec::new();
    number(&mut model, 1, 8);
    put(&mut model, MODEL_GRAPH, graph);
    put(&mut model, 8, &set);
    model
}

fn softmax(output: &[u8], more: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
    let mut graph = Vec::new();
    let axis = int_attribute(b"axis", 1);
    put_node(&mut graph, b"Softmax", &[b"images"], &[output], &[&axis]);
    more(&mut graph);
    model(&graph, 17)
}

#[test]
fn a_graph_with_names_that_would_clash_is_left_alone() {
    assert!(operators(&softmax(b"y", |_| ())).is_some());
    let taken = |graph: &mut Vec<u8>| put_node(graph, b"Relu", &[b"y"], &[b"y:max"], &[]);
    assert_eq!(operators(&softmax(b"y", taken)), None, "another value");
    let taken = |graph: &mut Vec<u8>| put(graph, GRAPH_INITIALIZER, &ints_tensor(b"y:axes", &[3]));
    assert_eq!(operators(&softmax(b"y", taken)), None, "an initializer");
    let long = [b'y'; NAME_BYTES_MAX + 1];
    assert_eq!(operators(&softmax(&long, |_| ())), None, "longer than anybody's");
}

#[test]
fn a_graph_that_is_half_in_half_precision_is_left_alone() {
    let half = |graph: &mut Vec<u8>| {
        let mut tensor = Vec::new();
        number(&mut tensor, TENSOR_TYPE, 10);
        put(&mut tensor, TENSOR_NAME, b"w");
        put(graph, GRAPH_INITIALIZER, &tensor);
    };
    assert_eq!(operators(&softmax(b"y", half)), None);
}

/// The operators of what becomes of a model, in order; `None` if it is left alone.
pub(super) fn operators(model: &[u8]) -> Option<Vec<String>> {
    operators_of(model, false)
}

/// The same, of a machine where convolutions are computed by our own.
pub(super) fn operators_of(model: &[u8], winograd: bool) -> Option<Vec<String>> {
    let before = scan(model).expect("a model");
    let (_, opset) = before.opsets[0];
    let after = changed(model, opset, 2, winograd)?;
    scan(&after).expect("still a model");
    let graph = field(&after, MODEL_GRAPH).expect("fields").expect("a graph");
    let nodes = Graph::read(graph).expect("a graph").nodes;
    Some(nodes.iter().map(|n| String::from_utf8_lossy(n.op).into_owned()).collect())
}
