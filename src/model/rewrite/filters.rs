//! A block of filters that is left over, made a convolution of its own.
//!
//! Where the machine has AVX-512 the provider works on blocks of 16 filters, and deals them out to the
//! threads four at a time. With an odd number of more than four, one thread waits for the other: on two
//! threads 80 filters of 3x3 take as long as 96, and 112 as long as 128; from 144 on it evens out.
//! YOLOv8's branch for 80 classes is made of such. As 64 and 16, with a Concat behind them, they take
//! an eighth less time, and a run of YOLOv8n of 640x640 4 % less. What they find is the same to the bit.

use super::super::wire::put;
use super::concat::Parts;
use super::{
    CHANNELS, Changes, GRAPH_INITIALIZER, Graph, beside, int_attribute, ints_tensor, put_node,
};

/// Filters of a block.
pub(super) const BLOCK: u64 = 16;

pub(super) fn set_apart(graph: &Graph<'_>, changes: &mut Changes) {
    for (at, convolution) in graph.nodes.iter().enumerate() {
        if !convolution.is_divisible() || changes.contains_key(&at) {
            continue;
        }
        let dims = graph.initializers.get(convolution.inputs[1]);
        let Some(&[count, _, height, width]) = dims.map(|weights| &weights.dims[..]) else {
            continue;
        };
        let &[output] = &convolution.outputs[..] else { continue };
        let left_over = matches!(count / BLOCK, 5 | 7) && count % BLOCK == 0;
        // Behind a pointwise one the Concat takes what is won.
        let is_pointwise = (height, width) == (1, 1);
        // With what alone reads it (Relu) the provider makes it one step; with SiLU, which reads it
        // twice, it does not.
        if !left_over || is_pointwise || graph.reads(output) < 2 {
            continue;
        }
        let shares = ["most", "rest"].map(|share| beside(output, share.as_bytes()));
        let sizes = beside(output, b"sizes");
        let mut fields = Vec::new();
        put(&mut fields, GRAPH_INITIALIZER, &ints_tensor(&sizes, &[count - BLOCK, BLOCK]));
        convolution.divide(&mut fields, &shares, &[&sizes], &[], &Parts::default());
        let axis = int_attribute(b"axis", CHANNELS);
        put_node(&mut fields, b"Concat", &[&shares[0], &shares[1]], &[output], &[&axis]);
        changes.insert(at, fields);
    }
}

#[cfg(test)]
mod tests {
    use super::super::super::wire::number;
    use super::super::{TENSOR_DIMS, TENSOR_NAME};
    use super::*;

    /// Whether a convolution of such filters is changed; `reads`: how often it is read.
    fn is_changed(dims: &[u64], groups: u64, reads: usize) -> bool {
        let mut bytes = Vec::new();
        let mut filters = Vec::new();
        dims.iter().for_each(|dim| number(&mut filters, TENSOR_DIMS, *dim));
        put(&mut filters, TENSOR_NAME, b"w");
        put(&mut bytes, GRAPH_INITIALIZER, &filters);
        let groups = int_attribute(b"group", groups);
        put_node(&mut bytes, b"Conv", &[b"images", b"w"], &[b"x"], &[&groups]);
        for n in 0..reads {
            put_node(&mut bytes, b"Relu", &[b"x"], &[&[b'a' + n as u8]], &[]);
        }
        let mut changes = Changes::new();
        set_apart(&Graph::read(&bytes).expect("a graph"), &mut changes);
        changes.contains_key(&0)
    }

    #[test]
    fn only_a_block_that_is_left_over_is_set_apart() {
        for count in [80, 112] {
            assert!(is_changed(&[count, 3, 3, 3], 1, 2), "{count} filters");
        }
        for count in [16, 48, 64, 72, 88, 96, 128, 144] {
            assert!(!is_changed(&[count, 3, 3, 3], 1, 2), "{count} filters");
        }
        assert!(!is_changed(&[80, 3, 1, 1], 1, 2), "pointwise");
        assert!(!is_changed(&[80, 3, 3], 1, 2), "of one dimension");
        assert!(!is_changed(&[80, 3, 3, 3], 2, 2), "in groups");
        assert!(!is_changed(&[80, 3, 3, 3], 1, 1), "one step with its reader");
    }
}
