//! The two loops of which the compiler makes nothing fast, written out for machines that have the
//! instructions. They give what the plain code gives, to the bit.

use super::blend::Sixteen;
use super::color::Luma;

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

/// A row's red, green and blue, or what a row's chroma adds to them.
pub(super) type Three<'r, T> = [&'r [T]; 3];
pub(super) type ThreeMut<'r, T> = [&'r mut [T]; 3];

/// The three planes of a row, one behind the other.
#[inline(always)]
pub(super) fn thirds<T>(row: &[T]) -> Three<'_, T> {
    let (first, rest) = row.split_at(row.len() / 3);
    let (second, third) = rest.split_at(first.len());
    [first, second, third]
}

#[inline(always)]
pub(super) fn thirds_mut<T>(row: &mut [T]) -> ThreeMut<'_, T> {
    let (first, rest) = row.split_at_mut(row.len() / 3);
    let (second, third) = rest.split_at_mut(first.len());
    [first, second, third]
}

/// Each does the first pixels of a row, as many as make whole pieces, and says how many those were;
/// plain code does the rest. To be called on a machine of that level only.
pub(super) trait Kernels {
    /// Blends pixels sideways. The rows have the length that the table was made for.
    unsafe fn blend(rows: Three<'_, u8>, table: &[Sixteen], sums: ThreeMut<'_, i16>) -> usize;

    /// Makes colours of luma and of what chroma adds to them, each of its samples to two pixels.
    unsafe fn colour(
        luma: &[u8],
        weight: Luma,
        chroma: Three<'_, i16>,
        rgb: ThreeMut<'_, u8>,
    ) -> usize;
}

/// Leaves all to the plain code.
pub(super) struct Portable;

impl Kernels for Portable {
    unsafe fn blend(_: Three<'_, u8>, _: &[Sixteen], _: ThreeMut<'_, i16>) -> usize {
        0
    }

    unsafe fn colour(_: &[u8], _: Luma, _: Three<'_, i16>, _: ThreeMut<'_, u8>) -> usize {
        0
    }
}

#[cfg(target_arch = "x86_64")]
pub(super) struct Avx2;

#[cfg(target_arch = "x86_64")]
impl Kernels for Avx2 {
    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn blend(rows: Three<'_, u8>, table: &[Sixteen], sums: ThreeMut<'_, i16>) -> usize {
        use std::arch::x86_64::{
            _mm_loadu_si128, _mm256_castsi128_si256, _mm256_inserti128_si256 as with_upper,
            _mm256_loadu_si256, _mm256_madd_epi16, _mm256_packs_epi32, _mm256_shuffle_epi8,
            _mm256_srai_epi32, _mm256_storeu_si256,
        };
        let mut planes = sums.map(|sums| sums.as_chunks_mut::<16>().0);
        for (at, part) in table.iter().enumerate() {
            // SAFETY: shuffles and weights are of 32 bytes each; a load of 16 bytes from a start
            // on ends within a row of the table's length; a chunk holds 32 bytes.
            unsafe {
                let wide = |bytes: *const u8| _mm256_loadu_si256(bytes.cast());
                let [first, second] = &part.shuffles;
                let shuffles = [wide(first.as_ptr()), wide(second.as_ptr())];
                let [first, second] = &part.weights;
                let weights = [wide(first.as_ptr().cast()), wide(second.as_ptr().cast())];
                for (row, sums) in rows.iter().zip(&mut planes) {
                    let load =
                        |start: u32| _mm_loadu_si128(row.as_ptr().add(start as usize).cast());
                    let half = |n: usize| {
                        let lower = _mm256_castsi128_si256(load(part.starts[n]));
                        let pixels = with_upper::<1>(lower, load(part.starts[n + 2]));
                        let pairs = _mm256_shuffle_epi8(pixels, shuffles[n]);
                        _mm256_srai_epi32::<4>(_mm256_madd_epi16(pairs, weights[n]))
                    };
                    let packed = _mm256_packs_epi32(half(0), half(1));
                    _mm256_storeu_si256(sums[at].as_mut_ptr().cast(), packed);
                }
            }
        }
        16 * table.len()
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn colour(
        luma: &[u8],
        weight: Luma,
        chroma: Three<'_, i16>,
        rgb: ThreeMut<'_, u8>,
    ) -> usize {
        use std::arch::x86_64::{
            _mm256_adds_epi16, _mm256_loadu_si256, _mm256_mulhi_epi16, _mm256_packus_epi16,
            _mm256_set1_epi16, _mm256_setzero_si256, _mm256_slli_epi16, _mm256_storeu_si256,
            _mm256_sub_epi16, _mm256_unpackhi_epi8, _mm256_unpackhi_epi16, _mm256_unpacklo_epi8,
            _mm256_unpacklo_epi16,
        };
        let parts = luma.as_chunks::<32>().0;
        let [red, green, blue] = chroma.map(|adds| adds.as_chunks::<16>().0);
        let [r, g, b] = rgb.map(|bytes| bytes.as_chunks_mut::<32>().0);
        let adds = red.iter().zip(green).zip(blue);
        let outs = r.iter_mut().zip(g).zip(b);
        let (black, factor) = (_mm256_set1_epi16(weight.black), _mm256_set1_epi16(weight.factor));
        for ((part, ((red, green), blue)), ((r, g), b)) in parts.iter().zip(adds).zip(outs) {
            // SAFETY: each load and each store is of the 32 bytes of a chunk.
            unsafe {
                let bytes = _mm256_loadu_si256(part.as_ptr().cast());
                let zero = _mm256_setzero_si256();
                let weighed = |luma| {
                    let above = _mm256_sub_epi16(_mm256_slli_epi16::<3>(luma), black);
                    _mm256_mulhi_epi16(above, factor)
                };
                // In halves of 16-byte lanes, which the packing puts together again.
                let low = weighed(_mm256_unpacklo_epi8(bytes, zero));
                let high = weighed(_mm256_unpackhi_epi8(bytes, zero));
                for (adds, out) in [(red, r), (green, g), (blue, b)] {
                    let adds = _mm256_loadu_si256(adds.as_ptr().cast());
                    let low = _mm256_adds_epi16(low, _mm256_unpacklo_epi16(adds, adds));
                    let high = _mm256_adds_epi16(high, _mm256_unpackhi_epi16(adds, adds));
                    _mm256_storeu_si256(out.as_mut_ptr().cast(), _mm256_packus_epi16(low, high));
                }
            }
        }
        32 * parts.len().min(red.len())
    }
}

#[cfg(target_arch = "aarch64")]
pub(super) struct Neon;

#[cfg(target_arch = "aarch64")]
impl Kernels for Neon {
    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn blend(rows: Three<'_, u8>, table: &[Sixteen], sums: ThreeMut<'_, i16>) -> usize {
        use std::arch::aarch64::{
            vcombine_s16, vget_low_s16, vld1q_s16, vld1q_u8, vmull_high_s16, vmull_s16, vpaddq_s32,
            vqtbl1q_u8, vreinterpretq_s16_u8, vshrn_n_s32, vst1q_s16,
        };
        for (row, sums) in rows.into_iter().zip(sums) {
            for (part, sums) in table.iter().zip(sums.as_chunks_mut::<16>().0) {
                // SAFETY: shuffles and weights are of 32 bytes each; a load of 16 bytes from a
                // start on ends within a row of the table's length; a chunk holds 16 sums.
                unsafe {
                    let four = |n: usize| {
                        let (which, half) = (n % 2, n / 2);
                        let pixels = vld1q_u8(row.as_ptr().add(part.starts[n] as usize));
                        let shuffle = vld1q_u8(part.shuffles[which].as_ptr().add(16 * half));
                        let weights = vld1q_s16(part.weights[which].as_ptr().add(8 * half));
                        // An index beyond the table gives 0, as 0x80 is to.
                        let pairs = vreinterpretq_s16_u8(vqtbl1q_u8(pixels, shuffle));
                        let low = vmull_s16(vget_low_s16(pairs), vget_low_s16(weights));
                        vshrn_n_s32::<4>(vpaddq_s32(low, vmull_high_s16(pairs, weights)))
                    };
                    let out = sums.as_mut_ptr();
                    vst1q_s16(out, vcombine_s16(four(0), four(1)));
                    vst1q_s16(out.add(8), vcombine_s16(four(2), four(3)));
                }
            }
        }
        16 * table.len()
    }

    /// The compiler's own is good: the machine loads and stores pairs.
    unsafe fn colour(_: &[u8], _: Luma, _: Three<'_, i16>, _: ThreeMut<'_, u8>) -> usize {
        0
    }
}
