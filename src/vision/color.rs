//! YUV to RGB in the integers of FFmpeg's converter.
//!
//! `cv2.VideoCapture` hands out what FFmpeg's `libswscale` makes on x86
//! (`libswscale/x86/yuv_2_rgb.asm`): 13-bit coefficients, and every product cut to its integer part
//! on its own, which darkens red and blue by one level and green by one and a half on the average.
//! Doing the same makes an offline evaluation by Ultralytics hold to the bit: `tests/parity.rs`. It
//! knows BT.601 only; other matrices and full range are computed alike from their definitions.

use super::picture::{Color, Matrix, Range};

/// The coefficients of one kind of YUV.
#[derive(Debug, Clone, Copy)]
pub struct ToRgb {
    /// Eight times the level of black.
    black: i16,
    luma: i16,
    red_by_red: i16,
    green_by_red: i16,
    green_by_blue: i16,
    blue_by_blue: i16,
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
            black: 8 * black,
            luma: fixed(luma),
            red_by_red: fixed(2.0 * (1.0 - kr) * chroma),
            green_by_red: fixed(-2.0 * kr * (1.0 - kr) / kg * chroma),
            green_by_blue: fixed(-2.0 * kb * (1.0 - kb) / kg * chroma),
            blue_by_blue: fixed(2.0 * (1.0 - kb) * chroma),
        }
    }

    /// Converts samples of one per pixel: luma, blue and red difference.
    ///
    /// # Panics
    /// If the slices are not of one length.
    #[inline(always)]
    pub fn planes(&self, yuv: [&[u8]; 3], (r, g, b): (&mut [u8], &mut [u8], &mut [u8])) {
        let n = yuv[0].len();
        // Equal lengths, said once, spare the loop its bounds checks.
        let (y, u, v) = (&yuv[0][..n], &yuv[1][..n], &yuv[2][..n]);
        let (r, g, b) = (&mut r[..n], &mut g[..n], &mut b[..n]);
        for i in 0..n {
            let y = high(i16::from(y[i]) * 8 - self.black, self.luma);
            let (u, v) = (i16::from(u[i]) * 8 - 1024, i16::from(v[i]) * 8 - 1024);
            r[i] = byte(y + high(v, self.red_by_red));
            g[i] = byte(y + high(u, self.green_by_blue) + high(v, self.green_by_red));
            b[i] = byte(y + high(u, self.blue_by_blue));
        }
    }
}

/// The upper half of a product: one instruction for eight pixels and more.
#[inline(always)]
fn high(a: i16, b: i16) -> i16 {
    ((i32::from(a) * i32::from(b)) >> 16) as i16
}

#[inline(always)]
fn byte(v: i16) -> u8 {
    v.clamp(0, 255) as u8
}
