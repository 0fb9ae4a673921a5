//! Convolutions of 3x3, by a quarter of the multiplications.
//!
//! Two thirds of what YOLOv8n multiplies is in convolutions of 3x3 at stride 1, and neither ONNX
//! Runtime's CPU provider nor OpenVINO's does with fewer multiplications than the definition has. By
//! Winograd's minimal filtering (Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks",
//! 2015) a tile of 4x4 outputs takes 36 of them for each channel and filter, not 144: the 6x6 inputs
//! around it are taken to another basis, multiplied with filters that were taken there when the session
//! was built, summed over the channels, and taken back. The points of the basis are 0, ±√½, ±√2 and
//! infinity. What is found differs from the definition's sums by a few millionths of the largest, and
//! is no number where inputs are beyond 1e37.
//!
//! The graph's nodes are put there by [`rewrite`](super::rewrite), and computed by
//! [`operator`](self::operator) with instructions of AVX2. On other machines there are none.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod filters;
#[cfg(target_arch = "x86_64")]
pub(super) mod operator;
#[cfg(target_arch = "x86_64")]
mod tiles;

/// Numbers of a tile in the other basis.
const POINTS: usize = 36;
/// Filters that are computed together: a cache line of them.
const GROUP: usize = 16;

/// The domain and the name of the graph's nodes, and the version of the domain.
pub(super) const DOMAIN: &str = "noblink";
pub(super) const OPERATOR: &str = "WinogradConv";
pub(super) const VERSION: u64 = 1;
/// Their attributes: an [`Activation`], and how many threads share the work.
pub(super) const ACTIVATION: &str = "activation";
pub(super) const THREADS: &str = "threads";

/// What is done to each sum, as the attribute says it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Activation {
    None = 0,
    Relu = 1,
    /// `x * sigmoid(x)`.
    Silu = 2,
}

/// Whether this machine has the instructions.
#[cfg(target_arch = "x86_64")]
fn is_possible() -> bool {
    is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma")
}

/// Whether it is quicker than ONNX Runtime on this machine. With AVX-512, of which ONNX Runtime makes
/// use and this does not, it was not measured.
pub(super) fn is_quick() -> bool {
    #[cfg(target_arch = "x86_64")]
    return is_possible() && !is_x86_feature_detected!("avx512f");
    #[cfg(not(target_arch = "x86_64"))]
    false
}

/// Bytes that the filters take in the other basis.
pub(super) fn bytes(channels: u64, filters: u64) -> u64 {
    let numbers = filters.div_ceil(GROUP as u64).saturating_mul((GROUP * POINTS) as u64);
    numbers.saturating_mul(channels).saturating_mul(size_of::<f32>() as u64)
}

#[cfg(all(test, target_arch = "x86_64"))]
mod tests {
    use super::avx2::{self, Output};
    use super::filters::Filters;
    use super::tiles::{Grid, block_size};
    use super::*;

    /// Numbers from -1 to 1, as good as random.
    fn noise(count: usize, seed: u32) -> Vec<f32> {
        let mut state = seed;
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 23) as f32 - 1.0
        };
        (0..count).map(|_| next()).collect()
    }

    /// By the definition; `weights` of as many channels as the input.
    fn defined(input: &[f32], grid: Grid, weights: &[f32], biases: &[f32]) -> Vec<f64> {
        let (height, width) = (grid.height, grid.width);
        let channels = input.len() / grid.area();
        let mut outputs = Vec::new();
        for (filter, bias) in weights.chunks(9 * channels).zip(biases) {
            for (y, x) in (0..height).flat_map(|y| (0..width).map(move |x| (y, x))) {
                let mut sum = f64::from(*bias);
                for (n, weight) in filter.iter().enumerate() {
                    let (channel, row, column) = (n / 9, y + n % 9 / 3, x + n % 3);
                    if (1..=height).contains(&row) && (1..=width).contains(&column) {
                        let at = channel * grid.area() + (row - 1) * width + column - 1;
                        sum += f64::from(*weight) * f64::from(input[at]);
                    }
                }
                outputs.push(sum);
            }
        }
        outputs
    }

    fn activated(activation: Activation, x: f64) -> f64 {
        match activation {
            Activation::None => x,
            Activation::Relu => x.max(0.0),
            Activation::Silu => x / (1.0 + (-x).exp()),
        }
    }

    #[test]
    fn every_output_is_the_definitions() {
        if !is_possible() {
            // Such a machine never computes this way.
            return;
        }
        let activations = [Activation::None, Activation::Relu, Activation::Silu];
        // Edges of all kinds: of a tile, of a register, of a group, of a block.
        let shapes = [(1, 1, 1, 1), (3, 5, 4, 4), (2, 16, 5, 3), (8, 17, 33, 31), (24, 40, 20, 80)];
        for (n, (channels, count, height, width)) in shapes.into_iter().enumerate() {
            let grid = Grid { height, width };
            let input = noise(channels * grid.area(), 1);
            let weights = noise(9 * channels * count, 2);
            let biases = noise(count, 3);
            let sums = defined(&input, grid, &weights, &biases);
            let largest = sums.iter().fold(1.0f64, |most, sum| most.max(sum.abs()));
            for (activation, threads) in activations.into_iter().zip([1, 2, 5]) {
                let filters = Filters::new(&weights, &biases, channels, activation);
                // What is not written is seen, and what is written behind it.
                let mut outputs = vec![f32::NAN; sums.len() + 64];
                let size = block_size(grid, channels, threads);
                for from in (0..grid.tiles()).step_by(size) {
                    let tiles = from..grid.tiles().min(from + size);
                    let output = Output::at(outputs.as_mut_ptr());
                    // SAFETY: the instructions are there; there is room, and one thread.
                    unsafe { avx2::block(&filters, &input, grid, tiles, output) };
                }
                let (outputs, behind) = outputs.split_at(sums.len());
                assert!(behind.iter().all(|number| number.is_nan()), "shape {n}, {activation:?}");
                for (at, (output, sum)) in outputs.iter().zip(&sums).enumerate() {
                    let wanted = activated(activation, *sum);
                    let off = (f64::from(*output) - wanted).abs();
                    let what = format!("shape {n}, {activation:?}, output {at}");
                    assert!(off < 5e-6 * largest, "{what}: {output}, not {wanted}");
                }
            }
        }
    }

    #[test]
    fn silu_is_right_where_the_power_is_large_or_small() {
        if !is_possible() {
            return;
        }
        let grid = Grid { height: 1, width: 1 };
        // One weight, in the middle.
        let weights = [0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0];
        let filters = Filters::new(&weights, &[], 1, Activation::Silu);
        for x in [-1e30, -200.0, -88.0, -20.0, -1.0, -1e-6, 0.0, 1e-6, 0.5, 3.0, 90.0, 1e30f32] {
            let mut output = f32::NAN;
            // SAFETY: the instructions are there; there is room for one number, and one thread.
            unsafe { avx2::block(&filters, &[x], grid, 0..1, Output::at(&raw mut output)) };
            let wanted = activated(Activation::Silu, f64::from(x));
            let off = (f64::from(output) - wanted).abs();
            assert!(off <= 2e-6 * wanted.abs().max(1e-6), "{x}: {output}, not {wanted}");
        }
    }
}
