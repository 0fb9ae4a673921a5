//! Filters in the other basis.

use std::f32::consts::{FRAC_1_SQRT_2 as NEAR, SQRT_2 as FAR};

use super::tiles::PATCH;
use super::{Activation, GROUP, POINTS};

/// One number of each of a group's filters.
#[derive(Debug, Clone, Copy)]
#[repr(align(64))]
pub(super) struct Line(pub(super) [f32; GROUP]);

pub(super) const ZEROS: Line = Line([0.0; GROUP]);

/// Filters, and what comes after the sums.
#[derive(Debug)]
pub(super) struct Filters {
    pub(super) channels: usize,
    pub(super) count: usize,
    pub(super) activation: Activation,
    /// By group, point and channel.
    pub(super) lines: Vec<Line>,
    /// By group.
    pub(super) biases: Vec<Line>,
}

impl Filters {
    /// Of `count` x `channels` x 3 x 3 weights, and a bias for each filter or none.
    pub(super) fn new(
        weights: &[f32],
        biases: &[f32],
        channels: usize,
        activation: Activation,
    ) -> Self {
        let (weights, _) = weights.as_chunks::<9>();
        let count = weights.len() / channels;
        let groups = count.div_ceil(GROUP);
        let mut lines = vec![ZEROS; groups * POINTS * channels];
        for (group, lines) in lines.chunks_exact_mut(POINTS * channels).enumerate() {
            for channel in 0..channels {
                let mut squares = [[ZEROS; 3]; 3];
                for filter in 0..GROUP.min(count - group * GROUP) {
                    let square = &weights[(group * GROUP + filter) * channels + channel];
                    for (n, weight) in square.iter().enumerate() {
                        squares[n / 3][n % 3].0[filter] = *weight;
                    }
                }
                let rows = squares.map(at_points);
                for column in 0..PATCH {
                    let points = at_points(rows.map(|row| row[column]));
                    for (row, line) in points.into_iter().enumerate() {
                        lines[(PATCH * row + column) * channels + channel] = line;
                    }
                }
            }
        }
        let mut lined = vec![ZEROS; groups];
        for (n, bias) in biases.iter().enumerate() {
            lined[n / GROUP].0[n % GROUP] = *bias;
        }
        Self { channels, count, activation, lines, biases: lined }
    }
}

/// Polynomials of three coefficients at the six points, over the product of each point's distances to
/// the others.
fn at_points([x, y, z]: [Line; 3]) -> [Line; PATCH] {
    let at = |point: f32, factor: f32| {
        let mut values = ZEROS;
        for (n, value) in values.0.iter_mut().enumerate() {
            *value = (x.0[n] + point * (y.0[n] + point * z.0[n])) * factor;
        }
        values
    };
    let (near, far) = (-2.0 / 3.0, 1.0 / 6.0);
    [x, at(NEAR, near), at(-NEAR, near), at(FAR, far), at(-FAR, far), z]
}
