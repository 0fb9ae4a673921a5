//! Which source pixels make which target pixel: the tables of a bilinear resize along one axis.
//!
//! They are those of OpenCV's `resize` with `INTER_LINEAR` on 8-bit pictures
//! (`modules/imgproc/src/resize.cpp`): the source position is `(d + 0.5) * scale - 0.5`, computed
//! in double and kept as float, weights are 11-bit integers, and the border repeats. There is no
//! averaging over the area: at a scale of 3 each target pixel is one source pixel, as it was when
//! the published accuracy of these models was measured.

/// Bits of a weight: `1 << WEIGHT_BITS` is a weight of one.
pub const WEIGHT_BITS: u32 = 11;

/// One axis of a resize: target pixel `d` is made of `low[d]` and `high[d]`.
#[derive(Debug, Clone)]
pub struct Axis {
    /// Source pixel below the position.
    pub low: Vec<u32>,
    /// Source pixel above it, within the picture.
    pub high: Vec<u32>,
    /// Weights of `low` and of `high`, summing to `1 << WEIGHT_BITS`.
    pub weight: Vec<(u16, u16)>,
}

impl Axis {
    /// The columns from `source` to `target` pixels, both at least 1. A position beyond the first
    /// or last column is that column.
    pub fn columns(source: usize, target: usize) -> Self {
        Self::new(source, target, true)
    }

    /// The rows. Beyond the first or last row the weights stay as they are and both sources are
    /// that row: the same but for the last bit, which OpenCV rounds twice then.
    pub fn rows(source: usize, target: usize) -> Self {
        Self::new(source, target, false)
    }

    /// The source pixels that are needed, two for each target pixel, and the axis over those.
    pub fn pairs(self) -> (Vec<u32>, Self) {
        let pixels =
            self.low.iter().zip(&self.high).flat_map(|(low, high)| [*low, *high]).collect();
        let count = self.low.len() as u32;
        let low = (0..count).map(|d| 2 * d).collect();
        let high = (0..count).map(|d| 2 * d + 1).collect();
        (pixels, Self { low, high, weight: self.weight })
    }

    fn new(source: usize, target: usize, snap: bool) -> Self {
        let scale = 1.0 / (target as f64 / source as f64);
        let one = f32::from(1u16 << WEIGHT_BITS);
        let last = source as i64 - 1;
        let mut axis = Self {
            low: Vec::with_capacity(target),
            high: Vec::with_capacity(target),
            weight: Vec::with_capacity(target),
        };
        for d in 0..target {
            let position = ((d as f64 + 0.5) * scale - 0.5) as f32;
            let floor = position.floor();
            let fraction = position - floor;
            let (low, high) = (floor as i64, floor as i64 + 1);
            let outside = low < 0 || low >= last;
            let fraction = if snap && outside { 0.0 } else { fraction };
            let weight = (
                ((1.0 - fraction) * one).round_ties_even() as u16,
                (fraction * one).round_ties_even() as u16,
            );
            axis.low.push(low.clamp(0, last) as u32);
            axis.high.push(high.clamp(0, last) as u32);
            axis.weight.push(weight);
        }
        axis
    }
}
