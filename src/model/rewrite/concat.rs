//! A pointwise convolution of what a Concat puts side by side, made a sum of one for each part.
//!
//! A Concat copies all that it is given, on one thread of the provider, and the others wait. Most of those
//! in YOLOv8 and its successors are read by a pointwise convolution alone, at the end of each C2f and where
//! two sizes meet. What such a convolution finds is the sum of what its filters' shares find in the
//! parts, and the provider lets a convolution add to what another one has found. For YOLOv8n of 640x640
//! 13 of 17 go, and 4 % of a run's time; what is found differs by what the order of a sum makes.

use std::collections::HashMap;

use super::super::wire::put;
use super::{
    CHANNELS, Changes, FLOAT, GRAPH_INITIALIZER, Graph, Node, beside, int_attribute, ints_tensor,
    put_node,
};

/// At most so many numbers may the sums read and write, for each that the Concat would copy.
const SUMMED_MAX: u64 = 2;
/// Most parts of a Concat: the largest YOLOv8's have eight.
const PARTS_MAX: usize = 16;
/// Most convolutions that a graph may get, and most bytes of the attributes that each gets a copy of.
const CONVOLUTIONS_MAX: usize = 1024;
const ATTRIBUTES_MAX: usize = 1024;

/// The inputs of each Concat whose output only pointwise convolutions read, by that output.
#[derive(Default)]
pub(super) struct Parts<'a>(HashMap<&'a [u8], Vec<Part<'a>>>);

struct Part<'a> {
    value: &'a [u8],
    channels: u64,
}

impl<'a> Parts<'a> {
    /// `block`: how many channels the provider's convolutions take together.
    pub(super) fn of(graph: &Graph<'a>, block: u64) -> Self {
        if graph.is_nested {
            return Self::default();
        }
        let channels = channels(graph);
        let mut readers: HashMap<_, Vec<_>> = HashMap::new();
        for node in graph.nodes.iter().filter(|node| node.is_divisible()) {
            readers.entry(node.inputs[0]).or_default().push(node);
        }
        let (mut all, mut left) = (HashMap::new(), CONVOLUTIONS_MAX);
        for (at, concat) in graph.nodes.iter().enumerate() {
            let &[output] = &concat.outputs[..] else { continue };
            let is_one = concat.op == b"Concat" && concat.is_along_channels();
            if !is_one || graph.makers.get(output) != Some(&at) {
                continue;
            }
            let part = |value: &&'a [u8]| Some(Part { value, channels: *channels.get(value)? });
            let parts: Option<Vec<_>> = concat.inputs.iter().map(part).collect();
            let (Some(parts), Some(readers)) = (parts, readers.get(output)) else { continue };
            let convolutions = parts.len().saturating_mul(readers.len());
            if readers.len() == graph.reads(output)
                && convolutions <= left
                && is_worthwhile(graph, readers, &parts, block)
            {
                left -= convolutions;
                all.insert(output, parts);
            }
        }
        Self(all)
    }

    /// Changes those convolutions that nothing else has changed, and takes the Concats away.
    pub(super) fn sum_up(&self, graph: &Graph<'_>, changes: &mut Changes) {
        let is_apart =
            |value: Option<&&[u8]>| value.is_some_and(|value| self.0.contains_key(value));
        for (at, node) in graph.nodes.iter().enumerate() {
            if node.op == b"Concat" && is_apart(node.outputs.first()) {
                changes.insert(at, Vec::new());
            } else if node.op == b"Conv"
                && is_apart(node.inputs.first())
                && let &[output] = &node.outputs[..]
                && !changes.contains_key(&at)
            {
                let mut fields = Vec::new();
                let attributes = node.attribute_bytes();
                self.put_convolution(&mut fields, &node.inputs, output, &attributes);
                changes.insert(at, fields);
            }
        }
    }

    /// Puts a convolution into a graph, in steps if its input is in parts.
    pub(super) fn put_convolution(
        &self,
        graph: &mut Vec<u8>,
        inputs: &[&[u8]],
        output: &[u8],
        attributes: &[&[u8]],
    ) {
        let Some(parts) = self.0.get(inputs[0]) else {
            return put_node(graph, b"Conv", inputs, &[output], attributes);
        };
        let sizes = beside(output, b"parts");
        let channels: Vec<_> = parts.iter().map(|part| part.channels).collect();
        put(graph, GRAPH_INITIALIZER, &ints_tensor(&sizes, &channels));
        let name = |what: &str, n: usize| beside(output, format!("{what}{n}").as_bytes());
        let shares: Vec<_> = (0..parts.len()).map(|n| name("weights", n)).collect();
        let shares: Vec<_> = shares.iter().map(Vec::as_slice).collect();
        let axis = int_attribute(b"axis", CHANNELS);
        put_node(graph, b"Split", &[inputs[1], &sizes], &shares, &[&axis]);
        let mut sum = Vec::new();
        for (n, (part, weights)) in parts.iter().zip(shares).enumerate() {
            let found = name("part", n);
            // It is added once, with the first part.
            let bias = if n == 0 { &inputs[2..] } else { &[] };
            let inputs = [&[part.value, weights], bias].concat();
            put_node(graph, b"Conv", &inputs, &[&found], attributes);
            if n == 0 {
                sum = found;
                continue;
            }
            let next = if n + 1 == parts.len() { output.to_vec() } else { name("sum", n) };
            put_node(graph, b"Add", &[&found, &sum], &[&next], &[]);
            sum = next;
        }
    }
}

/// Whether these are pointwise convolutions whose sums take no more than [`SUMMED_MAX`] allows, and which
/// the provider computes in blocks: others it does not sum on the way.
fn is_worthwhile(graph: &Graph<'_>, readers: &[&Node<'_>], parts: &[Part<'_>], block: u64) -> bool {
    if !(2..=PARTS_MAX).contains(&parts.len()) {
        return false;
    }
    let in_blocks = |number: u64| number > 0 && number.is_multiple_of(block);
    let channels = parts.iter().map(|part| part.channels).fold(0, u64::saturating_add);
    let mut summed = 0u64;
    let all_can = readers.iter().all(|reader| {
        let attributes: usize = reader.attributes.iter().map(|a| a.bytes.len()).sum();
        let Some(weights) = graph.weights(reader.inputs[1]) else { return false };
        let &[count, all, 1, 1] = &weights.dims[..] else { return false };
        summed = summed.saturating_add(count.saturating_mul(parts.len() as u64 - 1));
        weights.kind == FLOAT && all == channels && in_blocks(count) && attributes <= ATTRIBUTES_MAX
    });
    all_can
        && parts.iter().all(|part| in_blocks(part.channels))
        && summed <= channels.saturating_mul(SUMMED_MAX)
}

/// Channels of those values of which the nodes say it.
fn channels<'a>(graph: &Graph<'a>) -> HashMap<&'a [u8], u64> {
    let mut channels = HashMap::new();
    for node in &graph.nodes {
        let known = |value: &&[u8]| channels.get(value).copied();
        let found = match node.op {
            b"Conv" if node.inputs.len() > 1 => {
                graph.weights(node.inputs[1]).and_then(|filters| filters.dims.first().copied())
            }
            b"Concat" if node.is_along_channels() => {
                let mut parts = node.inputs.iter().map(known);
                parts.try_fold(0u64, |all, part| all.checked_add(part?))
            }
            b"Split" if node.is_along_channels() => {
                let sizes = node.inputs.get(1).and_then(|sizes| graph.initializers.get(sizes));
                let sizes = sizes.map_or(&[][..], |sizes| &sizes.ints);
                channels.extend(node.outputs.iter().copied().zip(sizes.iter().copied()));
                None
            }
            // One of two may be the same for all channels.
            b"Mul" | b"Add" => node.inputs.iter().filter_map(known).max(),
            b"Sigmoid" | b"Relu" | b"LeakyRelu" | b"HardSwish" | b"MaxPool" | b"Resize" => {
                node.inputs.first().and_then(known)
            }
            _ => None,
        };
        if let (Some(found), [output]) = (found, &node.outputs[..]) {
            channels.insert(*output, found);
        }
    }
    channels
}

#[cfg(test)]
mod tests {
    use super::super::super::wire::{number, put};
    use super::super::tests::{model, operators, put_tensor, put_value};
    use super::super::{
        ATTRIBUTE_NAME, ATTRIBUTE_TENSOR, ATTRIBUTE_TYPE, FLOAT, GRAPH_INPUT, GRAPH_OUTPUT, block,
        ints_attribute,
    };
    use super::*;

    /// What may stand in the way.
    #[derive(Debug, Clone, Copy, PartialEq)]
    enum Case {
        Plain,
        /// With a SiLU and a Split behind the convolution.
        Split,
        OtherAxis,
        OtherReader,
        Output,
        Square,
        NoBlocks,
        ManyFilters,
        UnknownChannels,
        OnePart,
        ManyParts,
    }

    /// A convolution of what two ways give.
    fn concat_model(case: Case) -> Vec<u8> {
        let bytes = |count: u64, seed: u64| -> Vec<u8> {
            let numbers = (0..count).map(|n| ((n * seed + 5) % 23) as f32 / 115.0 - 0.1);
            numbers.flat_map(f32::to_le_bytes).collect()
        };
        let mut graph = Vec::new();
        let mut tensor = |name: &[u8], dims: &[u64], seed| {
            let numbers = bytes(dims.iter().product(), seed);
            put_tensor(&mut graph, name, dims, FLOAT, &numbers);
        };
        let own = if case == Case::NoBlocks { 20 } else { 16 };
        let count = if case == Case::ManyFilters { 80 } else { 32 };
        let parts = match case {
            Case::OnePart => 1,
            Case::ManyParts => 17,
            _ => 3,
        };
        let edge = if case == Case::Square { 3 } else { 1 };
        tensor(b"v", &[own, 16, 1, 1], 7);
        tensor(b"w", &[count, parts * own, edge, edge], 11);
        tensor(b"b", &[count], 3);
        tensor(b"u", &[32, 32, 1, 1], 5);
        let shape: Vec<_> = [1, 16, 12, 10].into_iter().flat_map(|n| [10, 2, 8, n]).collect();
        put_value(&mut graph, GRAPH_INPUT, b"images", Some(&shape));
        let output: &[u8] = if case == Case::Output { b"c" } else { b"y" };
        put_value(&mut graph, GRAPH_OUTPUT, output, None);
        put_node(&mut graph, b"Conv", &[b"images", b"v"], &[b"x"], &[]);
        put_node(&mut graph, b"Relu", &[b"x"], &[b"r"], &[]);
        let axis = |n| int_attribute(b"axis", n);
        let of = if case == Case::OtherAxis { axis(2) } else { axis(1) };
        let other: &[u8] = if case == Case::UnknownChannels { b"images" } else { b"r" };
        let mut values = vec![other; parts as usize];
        values[0] = b"x";
        put_node(&mut graph, b"Concat", &values, &[b"c"], &[&of]);
        if case == Case::OtherReader {
            put_node(&mut graph, b"Relu", &[b"c"], &[b"z"], &[]);
        }
        if case != Case::Split {
            let (strides, pads) =
                (ints_attribute(b"strides", &[2; 2]), ints_attribute(b"pads", &[1; 4]));
            put_node(&mut graph, b"Conv", &[b"c", b"w", b"b"], &[b"y"], &[&strides, &pads]);
            return model(&graph, 17);
        }
        let mut value = Vec::new();
        put(&mut value, ATTRIBUTE_NAME, b"value");
        put(&mut value, ATTRIBUTE_TENSOR, &ints_tensor(b"", &[16, 16]));
        number(&mut value, ATTRIBUTE_TYPE, 4);
        put_node(&mut graph, b"Constant", &[], &[b"sizes"], &[&value]);
        put_node(&mut graph, b"Conv", &[b"c", b"w", b"b"], &[b"d"], &[]);
        put_node(&mut graph, b"Sigmoid", &[b"d"], &[b"s"], &[]);
        put_node(&mut graph, b"Mul", &[b"d", b"s"], &[b"m"], &[]);
        put_node(&mut graph, b"Split", &[b"m", b"sizes"], &[b"left", b"right"], &[&axis(1)]);
        put_node(&mut graph, b"Concat", &[b"right", b"left"], &[b"e"], &[&axis(1)]);
        put_node(&mut graph, b"Conv", &[b"e", b"u"], &[b"y"], &[]);
        model(&graph, 17)
    }

    #[test]
    fn only_what_pointwise_convolutions_alone_read_is_summed() {
        use Case::*;
        if block().is_none() {
            // The provider has nothing to sum with there.
            return;
        }
        let (before, of_two) = (["Conv", "Relu"], ["Split", "Conv", "Conv", "Add"]);
        let summed = [&of_two[..], &["Conv", "Add"]].concat();
        let wanted = [&before[..], &summed].concat();
        assert_eq!(operators(&concat_model(Plain)).expect("it is changed"), wanted);
        let silu = ["Sigmoid", "Mul"];
        let (dealt, gated) = (["Split", "Split"], [silu, silu].concat());
        let before = [&before[..], &["Constant"]].concat();
        let wanted = [&before[..], &dealt, &summed, &summed, &gated, &of_two].concat();
        assert_eq!(operators(&concat_model(Split)).expect("it is changed"), wanted);
        let others = [
            OtherAxis,
            OtherReader,
            Output,
            Square,
            NoBlocks,
            ManyFilters,
            UnknownChannels,
            OnePart,
            ManyParts,
        ];
        for case in others {
            assert_eq!(operators(&concat_model(case)), None, "{case:?}");
        }
    }

    #[cfg(target_arch = "x86_64")]
    #[test]
    fn a_sum_is_what_the_convolution_of_all_was() {
        use super::super::super::winograd::operator::tests::{assert_alike, run};
        use super::super::changed;
        if block().is_none() {
            return;
        }
        let pictures: Vec<_> = (0..16 * 12 * 10).map(|n| (n % 29) as f32 / 29.0).collect();
        for case in [Case::Plain, Case::Split] {
            let plain = concat_model(case);
            let changed = changed(&plain, 17, 2, false).expect("it is changed");
            assert_alike(&run(&plain, None, &pictures), &run(&changed, None, &pictures));
        }
    }
}
