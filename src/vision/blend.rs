//! Sideways: pixels of a row blended with their neighbours, as OpenCV's `HResizeLinear` does.
//!
//! Which two source pixels make a target pixel follows from the sizes alone. So four target pixels
//! at a time are a load of 16 source pixels, a shuffle and a multiplication with weights, all but
//! the load known when the plan is made. Of a picture that shrinks so far that four targets reach
//! over more than 16 pixels (4K to 640) the pairs are picked out first.

use super::resample::{Axis, WEIGHT_BITS};

/// Fractional bits of a blended pixel: those of a weight less the four that OpenCV drops before it
/// blends downwards.
pub(super) const SUM_BITS: u32 = WEIGHT_BITS - 4;

/// By how much a picture may shrink for four targets to be made of one load.
pub(super) const SHRINK_MAX: usize = 4;
/// Source pixels of a load.
const REACH: usize = 16;
/// Target pixels made of one.
const GROUP: usize = 4;

/// What the machine offers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Level {
    /// Whatever the compiler may take for granted.
    Portable,
    /// 32 bytes at once.
    #[cfg(target_arch = "x86_64")]
    Avx2,
    /// 16 bytes at once, on every 64-bit ARM.
    #[cfg(target_arch = "aarch64")]
    Neon,
}

impl Level {
    pub(super) fn detect() -> Self {
        #[cfg(target_arch = "x86_64")]
        if is_x86_feature_detected!("avx2") {
            return Self::Avx2;
        }
        #[cfg(target_arch = "aarch64")]
        return Self::Neon;
        #[cfg(not(target_arch = "aarch64"))]
        Self::Portable
    }
}

/// Two groups of target pixels from one row.
pub(super) trait Sideways {
    /// Whether [`two`](Self::two) is there to be used.
    const WIDE: bool;
    /// Blends `2 * GROUP` pixels. The implementation's level must be the machine's.
    unsafe fn two(row: &[u8], groups: &[Group; 2], out: &mut [i16; 2 * GROUP]);
}

/// The sources of four target pixels.
#[derive(Debug, Clone, Copy)]
pub(super) struct Group {
    /// First byte of the load.
    start: u32,
    /// For each target pixel: the byte of its lower source, nothing, of its upper one, nothing.
    shuffle: [u8; REACH],
    /// For each target pixel: the weights of the two.
    weights: [i16; 2 * GROUP],
}

/// One row's tables.
#[derive(Debug)]
pub(super) struct Blend {
    axis: Axis,
    source: usize,
    /// Of the target's first pixels, in pairs of groups; the rest goes pixel by pixel.
    groups: Vec<[Group; 2]>,
}

impl Blend {
    pub(super) fn new(axis: Axis, source: usize) -> Self {
        let targets = (0..axis.low.len()).step_by(GROUP);
        let groups: Vec<_> = targets.map_while(|at| group(&axis, source, at)).collect();
        let groups = groups.chunks_exact(2).map(|pair| [pair[0], pair[1]]).collect();
        Self { axis, source, groups }
    }

    /// Blends the three planes of a row.
    #[inline(always)]
    pub(super) fn rows<S: Sideways>(&self, rgb: &[u8], sums: &mut [i16]) {
        let width = self.axis.low.len();
        for (row, sums) in rgb.chunks_exact(self.source).zip(sums.chunks_exact_mut(width)) {
            let done = if S::WIDE { self.groups.len() * 2 * GROUP } else { 0 };
            let (wide, rest) = sums.split_at_mut(done);
            for (out, groups) in wide.as_chunks_mut().0.iter_mut().zip(&self.groups) {
                // SAFETY: `S` is of the machine's level: see `Plan::write`.
                unsafe { S::two(row, groups, out) };
            }
            let Axis { low, high, weight } = &self.axis;
            let taps = low[done..].iter().zip(&high[done..]).zip(&weight[done..]);
            for (to, ((low, high), weight)) in rest.iter_mut().zip(taps) {
                let (a, b) = (i32::from(row[*low as usize]), i32::from(row[*high as usize]));
                let sum = a * i32::from(weight.0) + b * i32::from(weight.1);
                *to = (sum >> 4) as i16;
            }
        }
    }
}

/// The group from target pixel `at` on; `None` if there is none, or one load does not reach.
fn group(axis: &Axis, source: usize, at: usize) -> Option<Group> {
    let low = axis.low.get(at..at + GROUP)?;
    let high = &axis.high[at..at + GROUP];
    // A load must not run over the row's end.
    let start = low[0].min(source.checked_sub(REACH)? as u32);
    let mut group = Group { start, shuffle: [0x80; REACH], weights: [0; 2 * GROUP] };
    for n in 0..GROUP {
        let place = |x: u32| u8::try_from(x - start).ok().filter(|p| usize::from(*p) < REACH);
        group.shuffle[4 * n] = place(low[n])?;
        group.shuffle[4 * n + 2] = place(high[n])?;
        let (wa, wb) = axis.weight[at + n];
        (group.weights[2 * n], group.weights[2 * n + 1]) = (wa as i16, wb as i16);
    }
    Some(group)
}

/// The 16 source pixels of a group.
#[inline(always)]
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
fn reach<'r>(row: &'r [u8], group: &Group) -> &'r [u8; REACH] {
    row[group.start as usize..].first_chunk().expect("a group's load ends within the row")
}

/// Pixel by pixel.
pub(super) struct Portable;

impl Sideways for Portable {
    const WIDE: bool = false;
    unsafe fn two(_: &[u8], _: &[Group; 2], _: &mut [i16; 2 * GROUP]) {}
}

#[cfg(target_arch = "x86_64")]
pub(super) struct Avx2;

#[cfg(target_arch = "x86_64")]
impl Sideways for Avx2 {
    const WIDE: bool = true;

    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn two(row: &[u8], groups: &[Group; 2], out: &mut [i16; 2 * GROUP]) {
        use std::arch::x86_64::{
            _mm_loadu_si128, _mm_madd_epi16, _mm_packs_epi32, _mm_shuffle_epi8, _mm_srai_epi32,
            _mm_storeu_si128,
        };
        let sums = groups.each_ref().map(|group| {
            // SAFETY: each points to 16 bytes.
            let (pixels, shuffle, weights) = unsafe {
                (
                    _mm_loadu_si128(reach(row, group).as_ptr().cast()),
                    _mm_loadu_si128(group.shuffle.as_ptr().cast()),
                    _mm_loadu_si128(group.weights.as_ptr().cast()),
                )
            };
            let pairs = _mm_shuffle_epi8(pixels, shuffle);
            _mm_srai_epi32::<4>(_mm_madd_epi16(pairs, weights))
        });
        // SAFETY: `out` holds 16 bytes.
        unsafe { _mm_storeu_si128(out.as_mut_ptr().cast(), _mm_packs_epi32(sums[0], sums[1])) };
    }
}

#[cfg(target_arch = "aarch64")]
pub(super) struct Neon;

#[cfg(target_arch = "aarch64")]
impl Sideways for Neon {
    const WIDE: bool = true;

    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn two(row: &[u8], groups: &[Group; 2], out: &mut [i16; 2 * GROUP]) {
        use std::arch::aarch64::{
            vcombine_s16, vget_low_s16, vld1q_s16, vld1q_u8, vmull_high_s16, vmull_s16, vpaddq_s32,
            vqtbl1q_u8, vreinterpretq_s16_u8, vshrn_n_s32, vst1q_s16,
        };
        let sums = groups.each_ref().map(|group| {
            // SAFETY: each points to 16 bytes.
            let (pixels, shuffle, weights) = unsafe {
                (
                    vld1q_u8(reach(row, group).as_ptr()),
                    vld1q_u8(group.shuffle.as_ptr()),
                    vld1q_s16(group.weights.as_ptr()),
                )
            };
            // An index beyond the table gives 0, as 0x80 is to.
            let pairs = vreinterpretq_s16_u8(vqtbl1q_u8(pixels, shuffle));
            let low = vmull_s16(vget_low_s16(pairs), vget_low_s16(weights));
            vshrn_n_s32::<4>(vpaddq_s32(low, vmull_high_s16(pairs, weights)))
        });
        // SAFETY: `out` holds 16 bytes.
        unsafe { vst1q_s16(out.as_mut_ptr(), vcombine_s16(sums[0], sums[1])) };
    }
}
