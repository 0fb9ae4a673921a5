//! A convolution of an odd number of blocks of filters, made two of them.
//!
//! The provider works on blocks of 16 filters, four of them at once. Where a single one is left over it
//! takes as long as two: 80 filters of 3x3 as long as 96. YOLOv8's branch for 80 classes is made of
//! such. As 64 and 16, with a Concat behind them, they take a seventh less time, and YOLOv8n of
//! 640x640 a twentieth. What they find is the same to the bit.
//!
//! Seen with AVX-512; on ARM a convolution may be done in another way, which would do part of the
//! work twice.

use super::super::wire::put;
use super::{Changes, GRAPH_INITIALIZER, Graph, beside, int_attribute, ints_tensor, put_node};

/// Filters of a block, and those that are worked on at once.
const BLOCK: u64 = 16;
const AT_ONCE: u64 = 4 * BLOCK;

pub(super) fn even_out(graph: &Graph<'_>, changes: &mut Changes) {
    if !cfg!(target_arch = "x86_64") {
        return;
    }
    for (at, convolution) in graph.nodes.iter().enumerate() {
        if !convolution.is_divisible() || changes.contains_key(&at) {
            continue;
        }
        let dims = graph.initializers.get(convolution.inputs[1]);
        let Some(&[count, _, height, width]) = dims.map(Vec::as_slice) else { continue };
        let odd = count > AT_ONCE && count % (2 * BLOCK) == BLOCK;
        // Behind a pointwise one the Concat takes what is won.
        if !odd || (height, width) == (1, 1) {
            continue;
        }
        let &[output] = &convolution.outputs[..] else { continue };
        let shares = ["even", "odd"].map(|share| beside(output, share.as_bytes()));
        let sizes = beside(output, b"sizes");
        let mut fields = Vec::new();
        put(&mut fields, GRAPH_INITIALIZER, &ints_tensor(&sizes, &[count - BLOCK, BLOCK]));
        convolution.divide(&mut fields, &shares, &[&sizes], &[]);
        let axis = int_attribute(b"axis", 1);
        put_node(&mut fields, b"Concat", &[&shares[0], &shares[1]], &[output], &[&axis]);
        changes.insert(at, fields);
    }
}

#[cfg(all(test, target_arch = "x86_64"))]
mod tests {
    use super::super::super::wire::number;
    use super::super::tests::{model, operators};
    use super::super::{TENSOR_DIMS, TENSOR_NAME, TENSOR_RAW, TENSOR_TYPE};
    use super::*;

    fn model_of(dims: &[u64], groups: u64, op: &[u8]) -> Vec<u8> {
        let mut graph = Vec::new();
        let mut filters = Vec::new();
        dims.iter().for_each(|dim| number(&mut filters, TENSOR_DIMS, *dim));
        number(&mut filters, TENSOR_TYPE, 1);
        put(&mut filters, TENSOR_NAME, b"w");
        put(&mut filters, TENSOR_RAW, &vec![0; 4 * dims.iter().product::<u64>() as usize]);
        put(&mut graph, GRAPH_INITIALIZER, &filters);
        let groups = int_attribute(b"group", groups);
        put_node(&mut graph, op, &[b"images", b"w"], &[b"x"], &[&groups]);
        put_node(&mut graph, b"Relu", &[b"x"], &[b"output0"], &[]);
        model(&graph, 17)
    }

    #[test]
    fn only_an_odd_block_of_many_is_set_apart() {
        for count in [80, 112, 336] {
            let apart = operators(&model_of(&[count, 3, 3, 3], 1, b"Conv")).expect("it is changed");
            assert_eq!(apart, ["Split", "Conv", "Conv", "Concat", "Relu"], "{count} filters");
        }
        for count in [16, 48, 64, 72, 96, 128] {
            assert_eq!(
                operators(&model_of(&[count, 3, 3, 3], 1, b"Conv")),
                None,
                "{count} filters"
            );
        }
        assert_eq!(operators(&model_of(&[80, 3, 1, 1], 1, b"Conv")), None, "pointwise");
        assert_eq!(operators(&model_of(&[80, 3, 3], 1, b"Conv")), None, "of one dimension");
        assert_eq!(operators(&model_of(&[80, 3, 3, 3], 2, b"Conv")), None, "in groups");
        assert_eq!(operators(&model_of(&[80, 3, 3, 3], 1, b"ConvTranspose")), None, "another one");
    }
}
