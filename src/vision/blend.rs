//! Sideways: pixels of a row blended with their neighbours, as OpenCV's `HResizeLinear` does.
//!
//! Which two source pixels make a target pixel follows from the sizes alone. So four target pixels
//! at a time are a load of 16 source pixels, a shuffle and a multiplication with weights, all but
//! the load known when the plan is made (`kernels`). Of a picture that shrinks so far that four
//! targets reach over more than 16 pixels (4K to 640) the pairs are picked out first.

use super::kernels::{Kernels, thirds, thirds_mut};
use super::resample::{Axis, WEIGHT_BITS};

/// Fractional bits of a blended pixel: those of a weight less the four that OpenCV drops before it
/// blends downwards.
pub(super) const SUM_BITS: u32 = WEIGHT_BITS - 4;

/// By how much a picture may shrink for four targets to be made of one load.
pub(super) const SHRINK_MAX: usize = 4;
/// Source pixels of a load.
const REACH: usize = 16;
/// Target pixels made of one.
const FOUR: usize = 4;

/// The sources of sixteen target pixels: of four times four, the first and the third four in one
/// register of 32 bytes, the second and the fourth in another, as packing wants them.
#[derive(Debug, Clone, Copy)]
pub(super) struct Sixteen {
    /// Of each four, the first byte of the load.
    pub(super) starts: [u32; 4],
    /// For each target pixel: the byte of its lower source, nothing, of its upper one, nothing.
    pub(super) shuffles: [[u8; 2 * REACH]; 2],
    /// For each target pixel: the weights of the two.
    pub(super) weights: [[i16; 4 * FOUR]; 2],
}

/// One row's tables.
#[derive(Debug)]
pub(super) struct Blend {
    axis: Axis,
    source: usize,
    /// Of the target's first pixels; the rest goes pixel by pixel.
    table: Vec<Sixteen>,
}

impl Blend {
    pub(super) fn new(axis: Axis, source: usize) -> Self {
        let targets = (0..axis.low.len()).step_by(4 * FOUR);
        let table = targets.map_while(|at| sixteen(&axis, source, at)).collect();
        Self { axis, source, table }
    }

    /// Blends the three planes of a row.
    #[inline(always)]
    pub(super) fn rows<K: Kernels>(&self, rgb: &[u8], sums: &mut [i16]) {
        let Axis { low, high, weight } = &self.axis;
        let (rows, mut sums) = (thirds(rgb), thirds_mut(sums));
        assert!(rows[0].len() == self.source && sums[0].len() == low.len(), "rows of the table's");
        // SAFETY: `K` is of the machine's level: see `Plan::write`.
        let done = unsafe { K::blend(rows, &self.table, sums.each_mut().map(|s| &mut **s)) };
        for (row, sums) in rows.into_iter().zip(sums) {
            let taps = low[done..].iter().zip(&high[done..]).zip(&weight[done..]);
            for (to, ((low, high), weight)) in sums[done..].iter_mut().zip(taps) {
                let (a, b) = (i32::from(row[*low as usize]), i32::from(row[*high as usize]));
                let sum = a * i32::from(weight.0) + b * i32::from(weight.1);
                *to = (sum >> 4) as i16;
            }
        }
    }
}

/// The sixteen from target pixel `at` on; `None` if there are fewer, or a load does not reach.
fn sixteen(axis: &Axis, source: usize, at: usize) -> Option<Sixteen> {
    let mut all =
        Sixteen { starts: [0; 4], shuffles: [[0x80; 2 * REACH]; 2], weights: [[0; 4 * FOUR]; 2] };
    for four in 0..4 {
        let at = at + FOUR * four;
        let low = axis.low.get(at..at + FOUR)?;
        let high = &axis.high[at..at + FOUR];
        // A load must not run over the row's end.
        let start = low[0].min(source.checked_sub(REACH)? as u32);
        all.starts[four] = start;
        let (register, lane) = (four % 2, four / 2);
        let shuffle = &mut all.shuffles[register][REACH * lane..][..REACH];
        let weights = &mut all.weights[register][2 * FOUR * lane..][..2 * FOUR];
        let place = |x: u32| u8::try_from(x - start).ok().filter(|p| usize::from(*p) < REACH);
        for n in 0..FOUR {
            (shuffle[4 * n], shuffle[4 * n + 2]) = (place(low[n])?, place(high[n])?);
            let (wa, wb) = axis.weight[at + n];
            (weights[2 * n], weights[2 * n + 1]) = (wa as i16, wb as i16);
        }
    }
    Some(all)
}
