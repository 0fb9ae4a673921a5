//! YUV to RGB in the integers of FFmpeg's converter.
//!
//! `cv2.VideoCapture` hands out what FFmpeg's `libswscale` makes on x86
//! (`libswscale/x86/yuv_2_rgb.asm`): 13-bit coefficients, and every product cut to its integer part
//! on its own, which darkens red and blue by one level and green by one and a half on the average.
//! Doing the same makes an offline evaluation by Ultralytics hold to the bit: `tests/parity.rs`. It
//! knows BT.601 only; other matrices and full range are computed alike from their definitions.

use super::kernels::{Kernels, Three, ThreeMut};
use super::picture::{Color, Matrix, Range};

/// The coefficients of one kind of YUV.
#[derive(Debug, Clone, Copy)]
pub struct ToRgb {
    luma: Luma,
    red_by_red: i16,
    green_by_red: i16,
    green_by_blue: i16,
    blue_by_blue: i16,
}

/// How luma goes into all three colours.
#[derive(Debug, Clone, Copy)]
pub(super) struct Luma {
    /// Eight times the level of black.
    pub(super) black: i16,
    pub(super) factor: i16,
}

impl Luma {
    #[inline(always)]
    fn of(self, y: u8) -> i16 {
        high(i16::from(y) * 8 - self.black, self.factor)
    }
}

impl ToRgb {
    /// The coefficients, from the red and blue shares of luma (ITU-R BT.601 and BT.709).
    pub fn new(color: Color) -> Self {
        let (kr, kb) = match color.matrix {
            Matrix::Bt601 => (0.299, 0.114),
            Matrix::Bt709 => (0.2126, 0.0722),
        };
        let kg = 1.0 - kr - kb;
        let (black, luma, chroma) = match color.range {
            Range::Limited => (16, 255.0 / 219.0, 255.0 / 224.0),
            Range::Full => (0, 1.0, 1.0),
        };
        let fixed = |v: f64| (v * 8192.0).round() as i16;
        Self {
            luma: Luma { black: 8 * black, factor: fixed(luma) },
            red_by_red: fixed(2.0 * (1.0 - kr) * chroma),
            green_by_red: fixed(-2.0 * kr * (1.0 - kr) / kg * chroma),
            green_by_blue: fixed(-2.0 * kb * (1.0 - kb) / kg * chroma),
            blue_by_blue: fixed(2.0 * (1.0 - kb) * chroma),
        }
    }

    /// What chroma adds to red, green and blue.
    #[inline(always)]
    pub(super) fn adds(&self, u: u8, v: u8) -> [i16; 3] {
        let (u, v) = (i16::from(u) * 8 - 1024, i16::from(v) * 8 - 1024);
        [
            high(v, self.red_by_red),
            high(u, self.green_by_blue) + high(v, self.green_by_red),
            high(u, self.blue_by_blue),
        ]
    }

    /// Converts samples of one per pixel: luma, blue and red difference.
    ///
    /// # Panics
    /// If the slices are not of one length.
    #[inline(always)]
    pub fn planes(&self, yuv: [&[u8]; 3], rgb: [&mut [u8]; 3]) {
        let n = yuv[0].len();
        // Equal lengths, said once, spare the loop its bounds checks.
        let [y, u, v] = yuv.map(|plane| &plane[..n]);
        let [r, g, b] = rgb.map(|plane| &mut plane[..n]);
        for i in 0..n {
            let (y, [red, green, blue]) = (self.luma.of(y[i]), self.adds(u[i], v[i]));
            (r[i], g[i], b[i]) = (byte(y + red), byte(y + green), byte(y + blue));
        }
    }

    /// Converts a row whose chroma, as [`adds`](Self::adds) made it, has a sample for two pixels.
    #[inline(always)]
    pub(super) fn pairs<K: Kernels>(
        &self,
        luma: &[u8],
        chroma: Three<'_, i16>,
        mut rgb: ThreeMut<'_, u8>,
    ) {
        // SAFETY: `K` is of the machine's level: see `Plan::write`.
        let done = unsafe { K::colour(luma, self.luma, chroma, rgb.each_mut().map(|c| &mut **c)) };
        let (luma, last) = luma[done..].as_chunks::<2>();
        let [red, green, blue] = chroma.map(|adds| &adds[done / 2..]);
        let [r, g, b] = rgb.map(|bytes| bytes[done..].as_chunks_mut::<2>());
        let adds = red.iter().zip(green).zip(blue);
        let outs = r.0.iter_mut().zip(g.0).zip(b.0);
        for ((y, ((red, green), blue)), ((r, g), b)) in luma.iter().zip(adds).zip(outs) {
            let y = y.map(|y| self.luma.of(y));
            *r = y.map(|y| byte(y + red));
            *g = y.map(|y| byte(y + green));
            *b = y.map(|y| byte(y + blue));
        }
        if let ([y], [r], [g], [b]) = (last, r.1, g.1, b.1) {
            let y = self.luma.of(*y);
            let at = luma.len();
            (*r, *g, *b) = (byte(y + red[at]), byte(y + green[at]), byte(y + blue[at]));
        }
    }
}

/// The upper half of a product: one instruction for eight pixels and more.
#[inline(always)]
pub(super) fn high(a: i16, b: i16) -> i16 {
    ((i32::from(a) * i32::from(b)) >> 16) as i16
}

#[inline(always)]
fn byte(v: i16) -> u8 {
    v.clamp(0, 255) as u8
}
