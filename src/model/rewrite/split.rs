//! A convolution whose channels are split afterwards, made one of each share's filters.
//!
//! The provider's convolutions work on blocks of channels, and so do sums and concatenations
//! between them; a Split does not. It turns the tensor back into planes, and all that comes of it up
//! to the next convolution is done in planes too. Each C2f of YOLOv8 and its successors begins with
//! one, behind the activation. The channels of a convolution don't know of each other, so the filters
//! can be split as well, which is done once, when the session is built. For YOLOv8n of 640x640 that
//! takes 18 turns into planes and 18 back out of the graph, and 4 % off the run; the numbers that
//! come out are the same to the bit, unless the convolution reads a Concat that is [summed
//! up](super::concat).

use super::concat::Parts;
use super::{Changes, Graph, Node, beside, put_node};

pub(super) fn before_convolutions(graph: &Graph<'_>, parts: &Parts<'_>, changes: &mut Changes) {
    if graph.is_nested {
        return;
    }
    for (at, split) in graph.nodes.iter().enumerate() {
        let Some(before) = Before::of(graph, split) else { continue };
        changes.extend(before.numbers.map(|number| (number, Vec::new())));
        changes.insert(at, before.shares(split, parts));
    }
}

/// What stands before a Split, and is read by nothing else: a convolution and the SiLU of it.
struct Before<'a> {
    convolution: &'a Node<'a>,
    /// Of the convolution, the sigmoid of it and their product.
    numbers: [usize; 3],
}

impl<'a> Before<'a> {
    fn of(graph: &'a Graph<'a>, split: &Node<'_>) -> Option<Self> {
        let (&values, sizes) = split.inputs.split_first()?;
        if split.op != b"Split" || !split.is_along_channels() {
            return None;
        }
        let (product, _) = graph.maker(values, b"Mul")?;
        let silu = graph.silu(product)?;
        let convolution = &graph.nodes[silu.convolution];
        let named = split.outputs.iter().all(|name| !name.is_empty());
        // Or the filters would be split anew for each frame.
        let settled = convolution.inputs.get(1).into_iter().chain(sizes);
        let settled = settled.copied().all(|value| graph.is_constant(value));
        (split.outputs.len() == 2
            && convolution.is_divisible()
            && graph.reads(values) == 1
            && named
            && settled)
            .then_some(Self { convolution, numbers: [silu.convolution, silu.sigmoid, product] })
    }

    /// A convolution and SiLU for each output of the split.
    fn shares(&self, split: &Node<'_>, parts: &Parts<'_>) -> Vec<u8> {
        let mut graph = Vec::new();
        // Over the filters, which is the axis by default; else as the channels were.
        let attributes = split.attributes.iter().filter(|a| a.name != b"axis").map(|a| a.bytes);
        let attributes: Vec<_> = attributes.collect();
        let outputs = [split.outputs[0], split.outputs[1]];
        let shares = outputs.map(|output| beside(output, b"conv"));
        self.convolution.divide(&mut graph, &shares, &split.inputs[1..], &attributes, parts);
        for (share, output) in shares.iter().zip(outputs) {
            let gate = beside(output, b"sigmoid");
            put_node(&mut graph, b"Sigmoid", &[share], &[&gate], &[]);
            put_node(&mut graph, b"Mul", &[share, &gate], &[output], &[]);
        }
        graph
    }
}

#[cfg(test)]
mod tests {
    use super::super::super::wire::put;
    use super::super::tests::{model, operators};
    use super::super::{GRAPH_INITIALIZER, GRAPH_OUTPUT, TENSOR_NAME, VALUE_NAME, int_attribute};

    /// What may stand in the way.
    #[derive(Debug, Clone, Copy, PartialEq)]
    enum Case {
        Plain,
        Groups,
        OtherAxis,
        OtherGate,
        ComputedWeights,
        NoBias,
        Three,
        OutputBefore,
        Reader,
    }

    fn split_model(case: Case) -> Vec<u8> {
        let mut graph = Vec::new();
        let mut named = |field, number, name: &[u8]| {
            let mut message = Vec::new();
            put(&mut message, number, name);
            put(&mut graph, field, &message);
        };
        named(GRAPH_INITIALIZER, TENSOR_NAME, b"w");
        named(GRAPH_INITIALIZER, TENSOR_NAME, b"sizes");
        named(GRAPH_OUTPUT, VALUE_NAME, b"output0");
        if case == Case::OutputBefore {
            named(GRAPH_OUTPUT, VALUE_NAME, b"x");
        }
        let when = |this, then: &'static [u8], other: &'static [u8]| match case == this {
            true => then,
            false => other,
        };
        let groups = int_attribute(b"group", 1 + u64::from(case == Case::Groups));
        let axis = int_attribute(b"axis", 1 + u64::from(case == Case::OtherAxis));
        super::put_node(&mut graph, b"Identity", &[b"w"], &[b"w2"], &[]);
        let weights = when(Case::ComputedWeights, b"w2", b"w");
        let bias = when(Case::NoBias, b"", b"b");
        super::put_node(&mut graph, b"Conv", &[b"images", weights, bias], &[b"x"], &[&groups]);
        let gated = when(Case::OtherGate, b"images", b"x");
        super::put_node(&mut graph, b"Sigmoid", &[gated], &[b"s"], &[]);
        super::put_node(&mut graph, b"Mul", &[b"s", b"x"], &[b"y"], &[]);
        let shares: &[&[u8]] =
            if case == Case::Three { &[b"l", b"r", b"more"] } else { &[b"l", b"r"] };
        super::put_node(&mut graph, b"Split", &[b"y", b"sizes"], shares, &[&axis]);
        let right = when(Case::Reader, b"y", b"r");
        super::put_node(&mut graph, b"Concat", &[b"l", right], &[b"output0"], &[]);
        model(&graph, 18)
    }

    #[test]
    fn only_a_convolution_that_the_split_alone_reads_is_split_itself() {
        use Case::*;
        let silu = ["Sigmoid", "Mul"];
        let wanted = ["Identity", "Split", "Split", "Conv", "Conv"];
        let wanted = [&wanted[..], &silu, &silu, &["Concat"]].concat();
        assert_eq!(operators(&split_model(Plain)).expect("it is changed"), wanted);
        let others =
            [Groups, OtherAxis, OtherGate, ComputedWeights, NoBias, Three, OutputBefore, Reader];
        for case in others {
            assert_eq!(operators(&split_model(case)), None, "{case:?}");
        }
    }
}
