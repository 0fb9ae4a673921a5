//! A block of tiles, by AVX2 and FMA.
//!
//! Eight numbers at once: of eight tiles side by side while the inputs are taken to the other basis,
//! of eight filters from there on.

use std::arch::x86_64::{
    __m256, __m256i, _mm_storeu_ps, _mm256_add_epi32, _mm256_add_ps, _mm256_andnot_si256,
    _mm256_blend_ps, _mm256_broadcastss_ps, _mm256_castps_si256, _mm256_castps256_ps128,
    _mm256_castsi256_ps, _mm256_cmpgt_epi32, _mm256_div_ps, _mm256_extractf128_ps, _mm256_fmadd_ps,
    _mm256_loadu_ps, _mm256_maskload_ps, _mm256_max_ps, _mm256_mul_ps, _mm256_permute_ps,
    _mm256_permute2f128_ps, _mm256_permutevar8x32_ps, _mm256_set1_epi32, _mm256_set1_ps,
    _mm256_setr_epi32, _mm256_setzero_ps, _mm256_setzero_si256, _mm256_shuffle_ps,
    _mm256_slli_epi32, _mm256_storeu_ps, _mm256_sub_ps, _mm256_unpackhi_ps, _mm256_unpacklo_ps,
};
use std::cell::RefCell;
use std::f32::consts::{FRAC_1_SQRT_2 as NEAR, LOG2_E, SQRT_2 as FAR};
use std::ops::Range;

use super::filters::{Filters, Line, ZEROS};
use super::tiles::{Grid, PATCH, TILE, TOGETHER};
use super::{Activation, GROUP, POINTS};

/// Numbers of a register.
const LANES: usize = 8;

thread_local! {
    /// Of a thread's largest block; what all sessions compute goes through it.
    static SCRATCH: RefCell<Vec<Line>> = const { RefCell::new(Vec::new()) };
}

/// Where the outputs go, of which each thread writes other ones.
#[derive(Clone, Copy)]
pub(super) struct Output(*mut f32);

// SAFETY: `block` says who may write what.
unsafe impl Sync for Output {}

impl Output {
    pub(super) fn at(start: *mut f32) -> Self {
        Self(start)
    }

    /// # Safety
    /// So many numbers are behind it.
    pub(super) unsafe fn after(self, numbers: usize) -> Self {
        // SAFETY: as the caller's.
        Self(unsafe { self.0.add(numbers) })
    }
}

/// Computes some tiles of all filters.
///
/// # Safety
/// The machine has AVX2 and FMA. `output` points to `filters.count` x `grid.area()` numbers, of which
/// nobody else reads or writes those of these tiles meanwhile.
#[target_feature(enable = "avx2,fma")]
pub(super) unsafe fn block(
    filters: &Filters,
    input: &[f32],
    grid: Grid,
    tiles: Range<usize>,
    output: Output,
) {
    assert_eq!(input.len(), filters.channels * grid.area(), "the input's size");
    assert!(tiles.end <= grid.tiles(), "the picture's tiles");
    // A register may reach beyond the last tile. A line more for each point, or the points would fall
    // into the same sets of the cache.
    let stride = (tiles.len() + LANES - 1).next_multiple_of(LANES);
    let point = filters.channels * stride + GROUP;
    let sums = tiles.len() + 1;
    let parts = [grid.width.div_ceil(GROUP), POINTS * point / GROUP, POINTS * sums];
    SCRATCH.with_borrow_mut(|scratch| {
        let lines = parts.iter().sum();
        if scratch.len() < lines {
            scratch.resize(lines, ZEROS);
        }
        let (outside, rest) = scratch.split_at_mut(parts[0]);
        let (values, products) = rest.split_at_mut(parts[1]);
        outside.fill(ZEROS);
        let (outside, values) = (&*numbers(outside), numbers(values));
        let mut block =
            Block { filters, grid, tiles, outside, values, stride, point, products, sums };
        for channel in 0..filters.channels {
            let plane = &input[channel * grid.area()..][..grid.area()];
            block.enter(channel, plane);
        }
        for group in 0..filters.biases.len() {
            block.multiply(group);
            // SAFETY: as the caller's.
            unsafe { block.leave(group, output) };
        }
    });
}

fn numbers(lines: &mut [Line]) -> &mut [f32] {
    // SAFETY: a line is its numbers, without padding.
    unsafe { std::slice::from_raw_parts_mut(lines.as_mut_ptr().cast(), lines.len() * GROUP) }
}

struct Block<'a> {
    filters: &'a Filters,
    grid: Grid,
    tiles: Range<usize>,
    /// A line of zeros, as there is above and below the picture.
    outside: &'a [f32],
    /// Inputs in the other basis, by point, channel and tile.
    values: &'a mut [f32],
    /// From a channel to the next, and from a point to the next.
    stride: usize,
    point: usize,
    /// Sums of the products of a group's filters, by point and tile.
    products: &'a mut [Line],
    /// From a point to the next.
    sums: usize,
}

impl Block<'_> {
    /// Takes a channel's inputs to the other basis.
    #[target_feature(enable = "avx2,fma")]
    fn enter(&mut self, channel: usize, plane: &[f32]) {
        let (columns, width) = (self.grid.columns(), self.grid.width);
        // By row, 40 columns of it.
        let mut rows = [[zero(); TILE + 1]; PATCH];
        let mut tile = self.tiles.start;
        while tile < self.tiles.end {
            let (row, first) = (tile / columns, tile % columns);
            let count = (self.tiles.end - tile).min(columns - first).min(LANES);
            let lines: [&[f32]; PATCH] = std::array::from_fn(|n| {
                let y = TILE * row + n;
                let is_inside = (1..=self.grid.height).contains(&y);
                if is_inside { &plane[(y - 1) * width..][..width] } else { &self.outside[..width] }
            });
            for part in 0..=TILE {
                let numbers = to_points(columns_of(lines, TILE * first + LANES * part));
                for (row, lanes) in rows.iter_mut().zip(&numbers) {
                    row[part] = *lanes;
                }
            }
            let to = channel * self.stride + tile - self.tiles.start;
            for (n, [a, b, c, d, next]) in rows.iter().enumerate() {
                let [first, second, third, fourth] = apart([*a, *b, *c, *d]);
                let fifth = shifted(first, *next);
                let sixth = shifted(second, _mm256_permute_ps::<0x55>(*next));
                let numbers = to_points([first, second, third, fourth, fifth, sixth]);
                for (column, lanes) in numbers.iter().enumerate() {
                    let at = (PATCH * n + column) * self.point + to;
                    store(&mut self.values[at..], *lanes);
                }
            }
            tile += count;
        }
    }

    /// Multiplies with a group's filters, and sums over the channels.
    #[target_feature(enable = "avx2,fma")]
    fn multiply(&mut self, group: usize) {
        let (channels, count) = (self.filters.channels, self.tiles.len());
        for point in 0..POINTS {
            let lines = &self.filters.lines[(group * POINTS + point) * channels..][..channels];
            let values = &self.values[point * self.point..][..channels * self.stride];
            let sums = &mut self.products[point * self.sums..][..count];
            for (n, sums) in sums.chunks_mut(TOGETHER).enumerate() {
                let values = &values[n * TOGETHER..];
                match sums.len() {
                    1 => sum::<1>(lines, values, self.stride, sums),
                    2 => sum::<2>(lines, values, self.stride, sums),
                    3 => sum::<3>(lines, values, self.stride, sums),
                    4 => sum::<4>(lines, values, self.stride, sums),
                    5 => sum::<5>(lines, values, self.stride, sums),
                    _ => sum::<TOGETHER>(lines, values, self.stride, sums),
                }
            }
        }
    }

    /// Takes a group's sums back, and writes the outputs.
    ///
    /// # Safety
    /// As that of [`block`].
    #[target_feature(enable = "avx2,fma")]
    unsafe fn leave(&self, group: usize, output: Output) {
        let (columns, area) = (self.grid.columns(), self.grid.area());
        let mut rows = [[zero(); PATCH]; TILE];
        for half in 0..GROUP / LANES {
            let filter = group * GROUP + half * LANES;
            if filter >= self.filters.count {
                break;
            }
            let filters = LANES.min(self.filters.count - filter);
            let bias = load(&self.filters.biases[group].0[half * LANES..]);
            for (n, tile) in self.tiles.clone().enumerate() {
                for column in 0..PATCH {
                    let numbers = from_points([
                        self.product(column, n, half),
                        self.product(column + PATCH, n, half),
                        self.product(column + 2 * PATCH, n, half),
                        self.product(column + 3 * PATCH, n, half),
                        self.product(column + 4 * PATCH, n, half),
                        self.product(column + 5 * PATCH, n, half),
                    ]);
                    for (row, lanes) in rows.iter_mut().zip(&numbers) {
                        row[column] = *lanes;
                    }
                }
                let (top, left) = (tile / columns * TILE, tile % columns * TILE);
                let height = TILE.min(self.grid.height - top);
                let width = TILE.min(self.grid.width - left);
                for (row, sums) in rows.iter().enumerate().take(height) {
                    let [a, b, c, d] = from_points(*sums);
                    let numbers = [
                        self.output(a, bias),
                        self.output(b, bias),
                        self.output(c, bias),
                        self.output(d, bias),
                    ];
                    let at = filter * area + (top + row) * self.grid.width + left;
                    // SAFETY: `filters` filters from this one on, and `width` numbers from there on in
                    // each one's plane, are the output's and this tile's.
                    unsafe { spread(numbers, output.after(at).0, area, filters, width) };
                }
            }
        }
    }

    /// The sums of a half of a group at a point.
    #[inline]
    #[target_feature(enable = "avx2,fma")]
    fn product(&self, point: usize, tile: usize, half: usize) -> __m256 {
        load(&self.products[point * self.sums + tile].0[half * LANES..])
    }

    #[inline]
    #[target_feature(enable = "avx2,fma")]
    fn output(&self, sum: __m256, bias: __m256) -> __m256 {
        let x = _mm256_add_ps(sum, bias);
        match self.filters.activation {
            Activation::None => x,
            Activation::Relu => _mm256_max_ps(x, zero()),
            Activation::Silu => silu(x),
        }
    }
}

/// Sums of a group's filters for so many tiles.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn sum<const TILES: usize>(lines: &[Line], values: &[f32], stride: usize, out: &mut [Line]) {
    let mut sums = [[zero(); GROUP / LANES]; TOGETHER];
    assert!(TILES <= stride && values.len() + stride >= lines.len() * stride + TILES, "the values");
    for (channel, line) in lines.iter().enumerate() {
        let (lower, upper) = (load(&line.0[..LANES]), load(&line.0[LANES..]));
        // SAFETY: so many values are there from a channel's first on.
        let values = unsafe { &*values.as_ptr().add(channel * stride).cast::<[f32; TILES]>() };
        // Written out, so that they are registers in builds that unroll no loops, too.
        macro_rules! add {
            ($($tile:literal)*) => {$(
                if $tile < TILES {
                    let value = splat(values[$tile]);
                    sums[$tile][0] = _mm256_fmadd_ps(lower, value, sums[$tile][0]);
                    sums[$tile][1] = _mm256_fmadd_ps(upper, value, sums[$tile][1]);
                }
            )*};
        }
        add!(0 1 2 3 4 5);
    }
    for (line, [lower, upper]) in out.iter_mut().zip(sums) {
        store(&mut line.0[..LANES], lower);
        store(&mut line.0[LANES..], upper);
    }
}

/// Six numbers in the other basis: a polynomial's values, times the weights that are in the filters.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn to_points([a, b, c, d, e, f]: [__m256; PATCH]) -> [__m256; PATCH] {
    let (near, near_odd) = (scaled(-2.0, c, e), scaled(-2.0, b, d));
    let (far, far_odd) = (scaled(-0.5, c, e), scaled(-0.5, b, d));
    [
        scaled(-2.5, c, _mm256_add_ps(a, e)),
        scaled(NEAR, near_odd, near),
        scaled(-NEAR, near_odd, near),
        scaled(FAR, far_odd, far),
        scaled(-FAR, far_odd, far),
        scaled(-2.5, d, _mm256_add_ps(b, f)),
    ]
}

/// Four outputs of sums at the six points.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn from_points(
    [at_zero, near, minus_near, far, minus_far, last]: [__m256; PATCH],
) -> [__m256; TILE] {
    let (near, near_odd) = (_mm256_add_ps(near, minus_near), _mm256_sub_ps(near, minus_near));
    let (far, far_odd) = (_mm256_add_ps(far, minus_far), _mm256_sub_ps(far, minus_far));
    [
        _mm256_add_ps(at_zero, _mm256_add_ps(near, far)),
        scaled(NEAR, near_odd, _mm256_mul_ps(splat(FAR), far_odd)),
        scaled(0.5, near, _mm256_add_ps(far, far)),
        scaled(0.5 * NEAR, near_odd, scaled(2.0 * FAR, far_odd, last)),
    ]
}

/// `x / (1 + e^-x)`, but for some 1e-6 of it: the power by its integer and by a polynomial for the rest.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn silu(x: __m256) -> __m256 {
    /// Added to a number, it leaves its integer in the lowest bits.
    const SHIFT: f32 = 12_582_912.0;
    /// ln 2, in two parts, of which the first times an integer is exact.
    const LN_2: [f32; 2] = [355.0 / 512.0, -2.121_944_4e-4];
    /// The series of `(e^r - 1 - r) / r^2`; for r up to half of ln 2 the rest adds less than 6e-9 to e^r.
    const SERIES: [f32; 6] = [1.0 / 5040.0, 1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5];
    // Below, it is zero to all digits; and of two operands a maximum is the second where one is no number.
    let x = _mm256_max_ps(splat(-87.0), x);
    let power = _mm256_max_ps(_mm256_sub_ps(zero(), x), splat(-87.0));
    let shifted = scaled(LOG2_E, power, splat(SHIFT));
    let whole = _mm256_sub_ps(shifted, splat(SHIFT));
    let rest = scaled(-LN_2[1], whole, scaled(-LN_2[0], whole, power));
    let mut value = splat(SERIES[0]);
    for coefficient in &SERIES[1..] {
        value = _mm256_fmadd_ps(value, rest, splat(*coefficient));
    }
    let one = splat(1.0);
    let value = _mm256_fmadd_ps(value, _mm256_mul_ps(rest, rest), _mm256_add_ps(rest, one));
    let exponent = _mm256_slli_epi32::<23>(_mm256_castps_si256(shifted));
    let value = _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(value), exponent));
    _mm256_div_ps(x, _mm256_add_ps(one, value))
}

/// Eight numbers of each line, from the column before `column` on; zeros where they have none.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn columns_of([a, b, c, d, e, f]: [&[f32]; PATCH], column: usize) -> [__m256; PATCH] {
    if column > 0 && column - 1 + LANES <= a.len() {
        let at = column - 1;
        return [
            load(&a[at..]),
            load(&b[at..]),
            load(&c[at..]),
            load(&d[at..]),
            load(&e[at..]),
            load(&f[at..]),
        ];
    }
    let columns = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    let columns = _mm256_add_epi32(columns, _mm256_set1_epi32(column as i32 - 1));
    let before = _mm256_cmpgt_epi32(_mm256_setzero_si256(), columns);
    let width = _mm256_set1_epi32(a.len() as i32);
    let inside = _mm256_andnot_si256(before, _mm256_cmpgt_epi32(width, columns));
    // SAFETY: all lines are as long, and in none a number is asked for that is not there.
    unsafe {
        [
            some(a, column, inside),
            some(b, column, inside),
            some(c, column, inside),
            some(d, column, inside),
            some(e, column, inside),
            some(f, column, inside),
        ]
    }
}

/// Those of eight numbers, from the column before `column` on, whose place in `which` is set; zeros for
/// the others.
///
/// # Safety
/// The line has them.
#[inline]
#[target_feature(enable = "avx2,fma")]
unsafe fn some(line: &[f32], column: usize, which: __m256i) -> __m256 {
    let from = line.as_ptr().wrapping_add(column).wrapping_sub(1);
    // SAFETY: the others are not read.
    unsafe { _mm256_maskload_ps(from, which) }
}

/// All numbers but the first, and behind them the first of `next`.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn shifted(numbers: __m256, next: __m256) -> __m256 {
    let places = _mm256_setr_epi32(1, 2, 3, 4, 5, 6, 7, 0);
    let next = _mm256_broadcastss_ps(_mm256_castps256_ps128(next));
    _mm256_blend_ps::<0x80>(_mm256_permutevar8x32_ps(numbers, places), next)
}

/// Of 32 numbers each fourth, beginning with the first, second, third and fourth.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn apart([a, b, c, d]: [__m256; TILE]) -> [__m256; TILE] {
    transposed([
        _mm256_permute2f128_ps::<0x20>(a, c),
        _mm256_permute2f128_ps::<0x31>(a, c),
        _mm256_permute2f128_ps::<0x20>(b, d),
        _mm256_permute2f128_ps::<0x31>(b, d),
    ])
}

/// Two matrices of 4x4, one in the lower halves and one in the upper, each transposed.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn transposed([a, b, c, d]: [__m256; 4]) -> [__m256; 4] {
    let (ab, cd) = (_mm256_unpacklo_ps(a, b), _mm256_unpacklo_ps(c, d));
    let (ab_high, cd_high) = (_mm256_unpackhi_ps(a, b), _mm256_unpackhi_ps(c, d));
    [
        _mm256_shuffle_ps::<0x44>(ab, cd),
        _mm256_shuffle_ps::<0xee>(ab, cd),
        _mm256_shuffle_ps::<0x44>(ab_high, cd_high),
        _mm256_shuffle_ps::<0xee>(ab_high, cd_high),
    ]
}

/// Writes four numbers side by side of each of eight filters, `area` apart, or as many as there are.
///
/// # Safety
/// So many numbers can be written to each of so many filters' places.
#[inline]
#[target_feature(enable = "avx2,fma")]
unsafe fn spread(numbers: [__m256; TILE], to: *mut f32, area: usize, filters: usize, width: usize) {
    let quarters = transposed(numbers);
    if (filters, width) == (LANES, TILE) {
        for (n, lanes) in quarters.iter().enumerate() {
            // SAFETY: as the caller's.
            unsafe {
                _mm_storeu_ps(to.add(n * area), _mm256_castps256_ps128(*lanes));
                _mm_storeu_ps(to.add((n + TILE) * area), _mm256_extractf128_ps::<1>(*lanes));
            }
        }
        return;
    }
    let mut copy = [[0.0; LANES]; TILE];
    for (copy, lanes) in copy.iter_mut().zip(quarters) {
        store(copy, lanes);
    }
    for filter in 0..filters {
        let numbers = &copy[filter % TILE][filter / TILE * TILE..][..width];
        // SAFETY: as the caller's.
        unsafe { to.add(filter * area).copy_from_nonoverlapping(numbers.as_ptr(), width) };
    }
}

#[inline]
#[target_feature(enable = "avx2,fma")]
fn zero() -> __m256 {
    _mm256_setzero_ps()
}

#[inline]
#[target_feature(enable = "avx2,fma")]
fn splat(number: f32) -> __m256 {
    _mm256_set1_ps(number)
}

/// `factor * x + y`.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn scaled(factor: f32, x: __m256, y: __m256) -> __m256 {
    _mm256_fmadd_ps(splat(factor), x, y)
}

#[inline]
#[target_feature(enable = "avx2,fma")]
fn load(numbers: &[f32]) -> __m256 {
    let numbers: &[f32; LANES] = numbers.first_chunk().expect("a register's numbers");
    // SAFETY: they are as many as are loaded.
    unsafe { _mm256_loadu_ps(numbers.as_ptr()) }
}

#[inline]
#[target_feature(enable = "avx2,fma")]
fn store(numbers: &mut [f32], lanes: __m256) {
    let numbers: &mut [f32; LANES] = numbers.first_chunk_mut().expect("room for a register");
    // SAFETY: they are as many as are stored.
    unsafe { _mm256_storeu_ps(numbers.as_mut_ptr(), lanes) }
}
