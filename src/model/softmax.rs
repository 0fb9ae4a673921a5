//! Softmax over the channels, taken apart into what ONNX Runtime's CPU provider is quick at.
//!
//! That provider knows Softmax over the last axis only: for another it turns the tensor, takes rows
//! of a few numbers each, and turns it back. YOLOv8 and its successors read each edge of a box out
//! of 16 channels so, and for YOLOv8n of 640x640 that one node takes a twelfth of the run. Maximum,
//! difference, power, sum and quotient over the same axis are the same in a tenth of its time.
//!
//! Only copies of bytes that [`scan`](super::onnx::scan) has let through come here. What this can't
//! read is left as it is: ONNX Runtime judges it.

use std::borrow::Cow;

use super::onnx::Scan;
use super::wire::{Message, WireError, number, put};

/// The axis of channels.
const CHANNELS: u64 = 1;
/// Below it, Softmax means another thing.
const OPSET_MIN: u64 = 13;
/// From it on, ReduceMax takes its axes as an input.
const AXES_AS_INPUT: u64 = 18;

/// Fields of `ModelProto`, `GraphProto`, `NodeProto`, `AttributeProto` and `TensorProto`.
const MODEL_GRAPH: u32 = 7;
const GRAPH_NODE: u32 = 1;
const GRAPH_INITIALIZER: u32 = 5;
const NODE_INPUT: u32 = 1;
const NODE_OUTPUT: u32 = 2;
const NODE_NAME: u32 = 3;
const NODE_OP: u32 = 4;
const NODE_ATTRIBUTE: u32 = 5;
const NODE_DOMAIN: u32 = 7;
const ATTRIBUTE_NAME: u32 = 1;
const ATTRIBUTE_INT: u32 = 3;
const ATTRIBUTE_INTS: u32 = 8;
const ATTRIBUTE_TYPE: u32 = 20;
const TENSOR_DIMS: u32 = 1;
const TENSOR_TYPE: u32 = 2;
const TENSOR_NAME: u32 = 8;
const TENSOR_RAW: u32 = 9;

/// A copy of a model without such nodes; the model itself where it has none.
pub(super) fn unfold<'a>(model: &'a [u8], scan: &Scan) -> Cow<'a, [u8]> {
    let own = scan.opsets.iter().find(|(domain, _)| matches!(domain.as_str(), "" | "ai.onnx"));
    match own {
        Some((_, opset)) if *opset >= OPSET_MIN => {
            rewrite(model, *opset).ok().flatten().map_or(Cow::Borrowed(model), Cow::Owned)
        }
        _ => Cow::Borrowed(model),
    }
}

fn rewrite(model: &[u8], opset: u64) -> Result<Option<Vec<u8>>, WireError> {
    let mut out = Vec::with_capacity(model.len() + 1024);
    let mut found = false;
    copy(model, &mut out, |number, payload, out| {
        let graph = match (number, payload) {
            (MODEL_GRAPH, Some(graph)) => graph_of(graph, opset)?,
            _ => None,
        };
        let Some(graph) = graph else { return Ok(false) };
        found = true;
        put(out, MODEL_GRAPH, &graph);
        Ok(true)
    })?;
    Ok(found.then_some(out))
}

fn graph_of(graph: &[u8], opset: u64) -> Result<Option<Vec<u8>>, WireError> {
    let mut out = Vec::with_capacity(graph.len() + 1024);
    let mut found = false;
    copy(graph, &mut out, |number, payload, out| {
        let softmax = match (number, payload) {
            (GRAPH_NODE, Some(node)) => Softmax::read(node)?,
            _ => None,
        };
        let Some(softmax) = softmax else { return Ok(false) };
        found = true;
        softmax.write(opset, out);
        Ok(true)
    })?;
    Ok(found.then_some(out))
}

/// Copies a message field by field. `replace` gets a field's number and, if it has any, its bytes,
/// and returns whether it has written something in its place.
fn copy(
    message: &[u8],
    out: &mut Vec<u8>,
    mut replace: impl FnMut(u32, Option<&[u8]>, &mut Vec<u8>) -> Result<bool, WireError>,
) -> Result<(), WireError> {
    let mut fields = Message::new(message);
    let mut from = 0;
    while let Some(field) = fields.next() {
        let field = field?;
        let to = fields.position();
        if !replace(field.number, field.bytes().ok(), out)? {
            out.extend_from_slice(&message[from..to]);
        }
        from = to;
    }
    Ok(())
}

/// A node of the kind that is taken apart.
struct Softmax<'a> {
    input: &'a [u8],
    output: &'a [u8],
}

impl<'a> Softmax<'a> {
    fn read(node: &'a [u8]) -> Result<Option<Self>, WireError> {
        let (mut input, mut output, mut op, mut domain) = (&b""[..], &b""[..], &b""[..], &b""[..]);
        let mut axis = None;
        for field in Message::new(node) {
            let field = field?;
            match field.number {
                NODE_INPUT => input = field.bytes()?,
                NODE_OUTPUT => output = field.bytes()?,
                NODE_OP => op = field.bytes()?,
                NODE_DOMAIN => domain = field.bytes()?,
                NODE_ATTRIBUTE => {
                    for field in Message::new(field.bytes()?) {
                        let field = field?;
                        // It has but this one.
                        if field.number == ATTRIBUTE_INT {
                            axis = Some(field.varint()?);
                        }
                    }
                }
                _ => {}
            }
        }
        let own = matches!(domain, b"" | b"ai.onnx") && op == b"Softmax";
        Ok((own && axis == Some(CHANNELS)).then_some(Self { input, output }))
    }

    fn write(&self, opset: u64, graph: &mut Vec<u8>) {
        let name = |part: &str| [self.output, b":", part.as_bytes()].concat();
        let axes = name("axes");
        put(graph, GRAPH_INITIALIZER, &axes_tensor(&axes));
        let (highest, less, power, sum) = (name("max"), name("less"), name("exp"), name("sum"));
        if opset >= AXES_AS_INPUT {
            put(graph, GRAPH_NODE, &node("ReduceMax", &[self.input, &axes], &highest, &[]));
        } else {
            let over = axes_attribute();
            put(graph, GRAPH_NODE, &node("ReduceMax", &[self.input], &highest, &over));
        }
        put(graph, GRAPH_NODE, &node("Sub", &[self.input, &highest], &less, &[]));
        put(graph, GRAPH_NODE, &node("Exp", &[&less], &power, &[]));
        put(graph, GRAPH_NODE, &node("ReduceSum", &[&power, &axes], &sum, &[]));
        put(graph, GRAPH_NODE, &node("Div", &[&power, &sum], self.output, &[]));
    }
}

/// A `NodeProto`, named as its output.
fn node(op: &str, inputs: &[&[u8]], output: &[u8], attribute: &[u8]) -> Vec<u8> {
    let mut node = Vec::new();
    inputs.iter().for_each(|input| put(&mut node, NODE_INPUT, input));
    put(&mut node, NODE_OUTPUT, output);
    put(&mut node, NODE_NAME, output);
    put(&mut node, NODE_OP, op.as_bytes());
    if !attribute.is_empty() {
        put(&mut node, NODE_ATTRIBUTE, attribute);
    }
    node
}

/// `axes = [1]`; `keepdims` is 1 by default.
fn axes_attribute() -> Vec<u8> {
    const INTS: u64 = 7;
    let mut attribute = Vec::new();
    put(&mut attribute, ATTRIBUTE_NAME, b"axes");
    number(&mut attribute, ATTRIBUTE_INTS, CHANNELS);
    number(&mut attribute, ATTRIBUTE_TYPE, INTS);
    attribute
}

/// The same as a `TensorProto` of one int64.
fn axes_tensor(name: &[u8]) -> Vec<u8> {
    const INT64: u64 = 7;
    let mut tensor = Vec::new();
    number(&mut tensor, TENSOR_DIMS, 1);
    number(&mut tensor, TENSOR_TYPE, INT64);
    put(&mut tensor, TENSOR_NAME, name);
    put(&mut tensor, TENSOR_RAW, &CHANNELS.to_le_bytes());
    tensor
}

#[cfg(test)]
mod tests {
    use super::super::onnx::scan;
    use super::*;

    /// A model of one node, over this axis.
    fn model(axis: u64, opset: u64) -> Vec<u8> {
        let mut attribute = Vec::new();
        put(&mut attribute, ATTRIBUTE_NAME, b"axis");
        number(&mut attribute, ATTRIBUTE_INT, axis);
        number(&mut attribute, ATTRIBUTE_TYPE, 2);
        let mut graph = Vec::new();
        put(&mut graph, GRAPH_NODE, &node("Identity", &[b"images"], b"x", &[]));
        put(&mut graph, GRAPH_NODE, &node("Softmax", &[b"x"], b"y", &attribute));
        put(&mut graph, GRAPH_NODE, &node("Identity", &[b"y"], b"output0", &[]));
        let mut set = Vec::new();
        number(&mut set, 2, opset);
        let mut model = Vec::new();
        number(&mut model, 1, 8);
        put(&mut model, MODEL_GRAPH, &graph);
        put(&mut model, 8, &set);
        model
    }

    fn unfolded(model: &[u8]) -> Cow<'_, [u8]> {
        unfold(model, &scan(model).expect("a model"))
    }

    #[test]
    fn only_the_softmax_over_the_channels_is_taken_apart() {
        for opset in [13, 17, 18, 22] {
            let before = model(CHANNELS, opset);
            let after = unfolded(&before);
            let scanned = scan(&after).expect("still a model");
            assert_eq!(scanned.nodes, 2 + 5, "opset {opset}");
            assert_eq!(scanned.initializer_bytes, 8);
            assert!(!after.windows(7).any(|w| w == b"Softmax"));
        }
        for (axis, opset) in [(u64::MAX, 18), (3, 18), (0, 18), (CHANNELS, 12)] {
            let before = model(axis, opset);
            assert_eq!(*unfolded(&before), *before, "axis {axis}, opset {opset}");
        }
    }
}
