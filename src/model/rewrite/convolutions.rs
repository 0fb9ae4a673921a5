//! Convolutions of 3x3 that are computed by [`winograd`], with what is done to each of their sums.

use super::super::winograd::{self, Activation};
use super::{Changes, FLOAT, Graph, Node, int_attribute, put_node_of};

/// Below so many channels or filters the ways to the other basis and back take what is won.
const CHANNELS_MIN: u64 = 24;
const FILTERS_MIN: u64 = 24;

/// What their filters take in the other basis, four times as much as in the file. Of a large network
/// the smallest are taken: they see the largest pictures.
const BYTES_MAX: u64 = 64 << 20;

/// Says whether there are such now.
pub(super) fn take_over(graph: &Graph<'_>, threads: usize, changes: &mut Changes) -> bool {
    if graph.is_nested {
        return false;
    }
    let mut found = steps(graph);
    let is_free = |step: &Step<'_>| step.gone.iter().all(|number| !changes.contains_key(number));
    found.retain(|step| is_free(step) && !changes.contains_key(&step.at));
    found.sort_by_key(|step| step.bytes);
    let fit = found.iter().scan(0u64, |bytes, step| {
        *bytes = bytes.saturating_add(step.bytes);
        Some(*bytes <= BYTES_MAX)
    });
    found.truncate(fit.take_while(|fits| *fits).count());
    for step in &found {
        changes.extend(step.gone.iter().map(|number| (*number, Vec::new())));
        changes.insert(step.at, step.node(threads));
    }
    !found.is_empty()
}

/// A convolution, and what alone reads it.
struct Step<'a> {
    convolution: &'a Node<'a>,
    activation: Activation,
    output: &'a [u8],
    /// Number of its last node, in whose place it stands, and of the others.
    at: usize,
    gone: Vec<usize>,
    /// What its filters take.
    bytes: u64,
}

fn steps<'a>(graph: &'a Graph<'a>) -> Vec<Step<'a>> {
    let mut steps = Vec::new();
    let mut taken = vec![false; graph.nodes.len()];
    let mut add = |convolution_at: usize, activation, at: usize, gone: Vec<usize>| {
        let convolution = &graph.nodes[convolution_at];
        let [output] = graph.nodes[at].outputs[..] else { return };
        if let Some(bytes) = bytes(graph, convolution)
            && !std::mem::replace(&mut taken[convolution_at], true)
        {
            steps.push(Step { convolution, activation, output, at, gone, bytes });
        }
    };
    for (at, node) in graph.nodes.iter().enumerate() {
        if let Some(silu) = graph.silu(at) {
            add(silu.convolution, Activation::Silu, at, vec![silu.convolution, silu.sigmoid]);
        } else if let ([input], b"Relu") = (&node.inputs[..], node.op)
            && let Some((convolution, _)) = graph.maker(input, b"Conv")
            && graph.reads(input) == 1
        {
            add(convolution, Activation::Relu, at, vec![convolution]);
        }
    }
    for at in 0..graph.nodes.len() {
        add(at, Activation::None, at, Vec::new());
    }
    steps
}

/// Bytes that a node's filters take, if it is a convolution that can be taken over.
fn bytes(graph: &Graph<'_>, node: &Node<'_>) -> Option<u64> {
    let [_, weights @ ..] = &node.inputs[..] else { return None };
    let weights: Option<Vec<_>> = weights.iter().map(|name| graph.weights(name)).collect();
    let weights = weights?;
    let &[filters, channels, 3, 3] = &weights.first()?.dims[..] else { return None };
    let is_large = channels >= CHANNELS_MIN && filters >= FILTERS_MIN;
    let is_float = weights.iter().all(|weights| weights.kind == FLOAT);
    let is_biased = weights.get(1).is_none_or(|bias| bias.dims == [filters]);
    let is_plain = node.attributes.iter().all(|attribute| match attribute.name {
        b"group" => attribute.int == Some(1),
        b"strides" | b"dilations" => attribute.ints == [1, 1],
        b"pads" => attribute.ints == [1; 4],
        b"kernel_shape" => attribute.ints == [3, 3],
        b"auto_pad" => attribute.text == b"NOTSET",
        _ => false,
    });
    let is_padded = node.attributes.iter().any(|attribute| attribute.name == b"pads");
    (node.is_divisible() && is_large && is_float && is_biased && is_plain && is_padded)
        .then(|| winograd::bytes(channels, filters))
}

impl Step<'_> {
    fn node(&self, threads: usize) -> Vec<u8> {
        let activation = int_attribute(winograd::ACTIVATION.as_bytes(), self.activation as u64);
        let threads = int_attribute(winograd::THREADS.as_bytes(), threads.max(1) as u64);
        let (domain, op) = (winograd::DOMAIN.as_bytes(), winograd::OPERATOR.as_bytes());
        let mut graph = Vec::new();
        let attributes = [&activation[..], &threads];
        put_node_of(&mut graph, domain, op, &self.convolution.inputs, &[self.output], &attributes);
        graph
    }
}

#[cfg(test)]
mod tests {
    use super::super::super::wire::{number, put};
    use super::super::tests::{model, operators_of, put_tensor};
    use super::super::{ATTRIBUTE_NAME, ATTRIBUTE_TEXT, ATTRIBUTE_TYPE, ints_attribute, put_node};
    use super::*;

    const DOUBLE: u64 = 11;

    /// One of zeros.
    fn initializer(graph: &mut Vec<u8>, name: &[u8], dims: &[u64], kind: u64) {
        let bytes = if kind == DOUBLE { 8 } else { 4 };
        let count = dims.iter().product::<u64>() as usize;
        put_tensor(graph, name, dims, kind, &vec![0; bytes * count]);
    }

    fn text(name: &[u8], value: &[u8]) -> Vec<u8> {
        let mut attribute = Vec::new();
        put(&mut attribute, ATTRIBUTE_NAME, name);
        put(&mut attribute, ATTRIBUTE_TEXT, value);
        number(&mut attribute, ATTRIBUTE_TYPE, 3);
        attribute
    }

    /// What becomes of a convolution of 32 filters on 24 channels, and of what is behind it.
    fn after(
        weights: (&[u64], u64),
        attributes: &[Vec<u8>],
        more: impl FnOnce(&mut Vec<u8>),
    ) -> Option<Vec<String>> {
        let mut graph = Vec::new();
        initializer(&mut graph, b"w", weights.0, weights.1);
        initializer(&mut graph, b"b", &weights.0[..1], FLOAT);
        let attributes: Vec<_> = attributes.iter().map(Vec::as_slice).collect();
        put_node(&mut graph, b"Conv", &[b"images", b"w", b"b"], &[b"x"], &attributes);
        more(&mut graph);
        operators_of(&model(&graph, 17), true)
    }

    const SQUARE: (&[u64], u64) = (&[32, 24, 3, 3], FLOAT);

    fn padded() -> Vec<u8> {
        ints_attribute(b"pads", &[1; 4])
    }

    /// Ours have no name among ONNX's own.
    fn names(names: &[&str]) -> Option<Vec<String>> {
        Some(names.iter().map(|name| name.to_string()).collect())
    }

    #[test]
    fn only_what_is_computed_the_same_is_taken_over() {
        let one = |attribute: Vec<u8>| [padded(), attribute];
        let none = |_: &mut Vec<u8>| ();
        let same = [
            one(ints_attribute(b"strides", &[1, 1])),
            one(ints_attribute(b"dilations", &[1, 1])),
            one(ints_attribute(b"kernel_shape", &[3, 3])),
            one(int_attribute(b"group", 1)),
            one(text(b"auto_pad", b"NOTSET")),
        ];
        for (n, attributes) in same.iter().enumerate() {
            assert_eq!(after(SQUARE, attributes, none), names(&[""]), "attribute {n}");
        }
        let others = [
            one(ints_attribute(b"strides", &[2, 2])),
            one(ints_attribute(b"dilations", &[2, 2])),
            one(int_attribute(b"group", 2)),
            one(text(b"auto_pad", b"SAME_UPPER")),
            one(int_attribute(b"unknown", 1)),
            [ints_attribute(b"pads", &[0; 4]), ints_attribute(b"strides", &[1, 1])],
            [ints_attribute(b"strides", &[1, 1]), ints_attribute(b"dilations", &[1, 1])],
        ];
        for (n, attributes) in others.iter().enumerate() {
            assert_eq!(after(SQUARE, attributes, none), None, "attribute {n}");
        }
        let others: [(&[u64], u64); 5] = [
            (&[32, 24, 1, 1], FLOAT),
            (&[32, 24, 3], FLOAT),
            (&[32, 16, 3, 3], FLOAT),
            (&[16, 24, 3, 3], FLOAT),
            (&[32, 24, 3, 3], DOUBLE),
        ];
        for weights in others {
            assert_eq!(after(weights, &[padded()], none), None, "{weights:?}");
        }
        assert_eq!(after(SQUARE, &[padded()], none), names(&[""]));
        let mut graph = Vec::new();
        initializer(&mut graph, b"w", SQUARE.0, FLOAT);
        initializer(&mut graph, b"b", &[31], FLOAT);
        put_node(&mut graph, b"Conv", &[b"images", b"w", b"b"], &[b"x"], &[&padded()]);
        assert_eq!(operators_of(&model(&graph, 17), true), None, "a bias too short");
    }

    #[test]
    fn what_alone_reads_it_goes_with_it() {
        let silu = |graph: &mut Vec<u8>| {
            put_node(graph, b"Sigmoid", &[b"x"], &[b"s"], &[]);
            put_node(graph, b"Mul", &[b"x", b"s"], &[b"y"], &[]);
        };
        let relu = |graph: &mut Vec<u8>| put_node(graph, b"Relu", &[b"x"], &[b"y"], &[]);
        assert_eq!(after(SQUARE, &[padded()], silu), names(&[""]));
        assert_eq!(after(SQUARE, &[padded()], relu), names(&[""]));
        let read = |graph: &mut Vec<u8>| put_node(graph, b"Neg", &[b"x"], &[b"z"], &[]);
        let read_too = after(SQUARE, &[padded()], |graph| (silu(graph), read(graph)).1);
        assert_eq!(read_too, names(&["", "Sigmoid", "Mul", "Neg"]));
        let read_too = after(SQUARE, &[padded()], |graph| (relu(graph), read(graph)).1);
        assert_eq!(read_too, names(&["", "Relu", "Neg"]));
    }

    #[test]
    fn of_more_than_memory_holds_the_smallest_are_taken() {
        let mut graph = Vec::new();
        for (n, filters) in [512u64, 32, 640].into_iter().enumerate() {
            let [from, to, weights] = [b'a', b'b', b'w'].map(|name| [name + n as u8]);
            initializer(&mut graph, &weights, &[filters, filters, 3, 3], FLOAT);
            put_node(&mut graph, b"Conv", &[&from, &weights], &[&to], &[&padded()]);
        }
        // 36 MB of filters, nearly none, and 56 MB.
        assert_eq!(operators_of(&model(&graph, 17), true), names(&["", "", "Conv"]));
    }

    #[test]
    fn a_machine_that_is_no_quicker_keeps_it() {
        let mut graph = Vec::new();
        initializer(&mut graph, b"w", SQUARE.0, FLOAT);
        put_node(&mut graph, b"Conv", &[b"images", b"w"], &[b"x"], &[&padded()]);
        assert_eq!(operators_of(&model(&graph, 17), false), None);
    }
}
