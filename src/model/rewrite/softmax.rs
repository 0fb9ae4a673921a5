//! Softmax over the channels, taken apart.
//!
//! The provider knows Softmax over the last axis only: for another it turns the tensor, takes rows
//! of a few numbers each, and turns it back. YOLOv8 and its successors read each edge of a box out
//! of 16 channels so, and for YOLOv8n of 640x640 that one node takes a twelfth of the run. Maximum,
//! difference, power, sum and quotient over the same axis are the same in a tenth of its time.

use super::super::wire::put;
use super::{
    CHANNELS, Changes, GRAPH_INITIALIZER, Graph, Node, beside, ints_attribute, ints_tensor,
    put_node,
};

/// From it on, ReduceMax takes its axes as an input.
const AXES_AS_INPUT: u64 = 18;

pub(super) fn take_apart(graph: &Graph<'_>, opset: u64, changes: &mut Changes) {
    for (at, node) in graph.nodes.iter().enumerate() {
        if node.op == b"Softmax" && node.is_along_channels() {
            changes.extend(parts(node, opset).map(|parts| (at, parts)));
        }
    }
}

fn parts(softmax: &Node<'_>, opset: u64) -> Option<Vec<u8>> {
    let (&[input], &[output]) = (&softmax.inputs[..], &softmax.outputs[..]) else { return None };
    let [axes, highest, less, power, sum] =
        ["axes", "max", "less", "exp", "sum"].map(|part| beside(output, part.as_bytes()));
    let mut graph = Vec::new();
    put(&mut graph, GRAPH_INITIALIZER, &ints_tensor(&axes, &[CHANNELS]));
    if opset >= AXES_AS_INPUT {
        put_node(&mut graph, b"ReduceMax", &[input, &axes], &[&highest], &[]);
    } else {
        let axes = ints_attribute(b"axes", &[CHANNELS]);
        put_node(&mut graph, b"ReduceMax", &[input], &[&highest], &[&axes]);
    }
    put_node(&mut graph, b"Sub", &[input, &highest], &[&less], &[]);
    put_node(&mut graph, b"Exp", &[&less], &[&power], &[]);
    put_node(&mut graph, b"ReduceSum", &[&power, &axes], &[&sum], &[]);
    put_node(&mut graph, b"Div", &[&power, &sum], &[output], &[]);
    Some(graph)
}

#[cfg(test)]
mod tests {
    use super::super::int_attribute;
    use super::super::tests::{model, operators};
    use super::*;

    fn model_over(axis: u64, opset: u64) -> Vec<u8> {
        let mut graph = Vec::new();
        let axis = int_attribute(b"axis", axis);
        put_node(&mut graph, b"Identity", &[b"images"], &[b"x"], &[]);
        put_node(&mut graph, b"Softmax", &[b"x"], &[b"y"], &[&axis]);
        put_node(&mut graph, b"Identity", &[b"y"], &[b"output0"], &[]);
        model(&graph, opset)
    }

    #[test]
    fn only_the_softmax_over_the_channels_is_taken_apart() {
        let apart = ["Identity", "ReduceMax", "Sub", "Exp", "ReduceSum", "Div", "Identity"];
        for opset in [13, 17, 18, 22] {
            let after = operators(&model_over(CHANNELS, opset)).expect("it is changed");
            assert_eq!(after, apart, "opset {opset}");
        }
        for (axis, opset) in [(u64::MAX, 18), (3, 18), (0, 18), (CHANNELS, 12)] {
            assert_eq!(operators(&model_over(axis, opset)), None, "axis {axis}, opset {opset}");
        }
    }
}
