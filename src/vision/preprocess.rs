//! A decoded frame to the model's input tensor, in one pass: resize, colour, scale, planes.
//!
//! A [`Plan`] holds what depends only on the sizes (tables, scratch rows), so that a frame costs no
//! allocation. It is made once per size of picture and reused.
//!
//! * RGB pixels are resized exactly as OpenCV does it for 8-bit pictures, bit by bit: horizontally
//!   to 32-bit sums, then vertically, or by averaging 2×2 blocks at a scale of exactly 2.
//! * YUV planes are resampled each for itself at the target's size and converted there. The result
//!   is that of converting the full frame first, because conversion is linear (but for clipping):
//!   for 1080p into 640×360 it is a ninth of the work. Chroma is repeated, not interpolated, over
//!   its 2×2 pixels, as FFmpeg's converter does it.

use half::f16;
use half::slice::HalfFloatSliceExt;

use super::letterbox::{Geometry, PAD};
use super::picture::{Color, Matrix, Picture, Pixels, Plane, Range};
use super::resample::{Axis, WEIGHT_BITS};

/// Order of the colour planes in the tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Order {
    /// Red first (YOLO by Ultralytics, RT-DETR).
    Rgb,
    /// Blue first (YOLOX).
    Bgr,
}

/// Range of the tensor's values.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Scale {
    /// 0.0..=1.0
    Unit,
    /// 0.0..=255.0
    Byte,
}

impl Scale {
    fn top(self) -> f32 {
        match self {
            Self::Unit => 1.0,
            Self::Byte => 255.0,
        }
    }
}

/// Where the tensor lies: `[3, height, width]` of the model's input.
#[derive(Debug)]
pub enum Target<'a> {
    /// 32-bit floats.
    F32(&'a mut [f32]),
    /// 16-bit floats.
    F16(&'a mut [f16]),
}

/// Why a picture can't be turned into a tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum PreprocessError {
    /// A plane ends before its last row does.
    #[error("a plane of the picture holds {found} bytes, its size and stride need {needed}")]
    ShortPlane {
        /// Bytes of the plane.
        found: usize,
        /// Bytes that size and stride imply.
        needed: usize,
    },
    /// The picture is not of the size that the plan was made for.
    #[error("the picture is {found:?}, the plan was made for {wanted:?}")]
    Size {
        /// Width and height of the picture.
        found: (usize, usize),
        /// Width and height of the plan.
        wanted: (usize, usize),
    },
}

/// Everything about one size of picture that can be known before the first frame.
#[derive(Debug)]
pub struct Plan {
    geometry: Geometry,
    order: Order,
    scale: Scale,
    x: Axis,
    y: Axis,
    luma_x: Taps,
    /// `luma_x` in pixels of a chroma plane.
    chroma_x: Taps,
    /// The tensor's value of each byte.
    bytes: Vec<f32>,
    scratch: Scratch,
}

/// A horizontal resampling for the YUV path; `weight` is `high`'s, in 256ths.
#[derive(Debug)]
struct Taps {
    low: Vec<u32>,
    high: Vec<u32>,
    weight: Vec<u32>,
    exact: bool,
}

#[derive(Debug, Default)]
struct Scratch {
    /// Three rows of the target.
    rows: Vec<f32>,
    /// One blended row of the source, 8 fractional bits.
    blended: Vec<u16>,
    /// Resampled luma, blue and red difference of one row.
    yuv: [Vec<f32>; 3],
    /// Two horizontally resampled RGB rows and the source rows that they are of.
    sums: [Vec<i32>; 2],
    sums_of: [Option<usize>; 2],
    /// One finished RGB row.
    rgb: Vec<u8>,
}

impl Plan {
    /// Plans for pictures placed by `geometry`.
    pub fn new(geometry: Geometry, order: Order, scale: Scale) -> Self {
        let (width, _) = geometry.resized;
        let x = Axis::new(geometry.source.0, geometry.resized.0);
        let y = Axis::new(geometry.source.1, geometry.resized.1);
        let luma_x = Taps::new(&x, |pixel| pixel);
        let chroma_x = Taps::new(&x, |pixel| pixel / 2);
        let bytes = (0..=255u8).map(|v| f32::from(v) / 255.0 * scale.top()).collect();
        let scratch = Scratch {
            rows: vec![0.0; 3 * width],
            blended: vec![0; geometry.source.0 + 1],
            yuv: [vec![0.0; width], vec![0.0; width], vec![0.0; width]],
            sums: [vec![0; 3 * width], vec![0; 3 * width]],
            sums_of: [None; 2],
            rgb: vec![0; 3 * width],
        };
        Self { geometry, order, scale, x, y, chroma_x, luma_x, bytes, scratch }
    }

    /// The place of the pictures.
    pub fn geometry(&self) -> &Geometry {
        &self.geometry
    }

    /// Writes the grey bars. Needed only when the tensor was last written with another geometry.
    ///
    /// # Panics
    /// If `target` is not of `3 * height * width` elements.
    pub fn write_bars(&self, target: &mut Target<'_>) {
        let grey = self.bytes[usize::from(PAD)];
        match target {
            Target::F32(t) => self.each_bar(t.len(), |range| t[range].fill(grey)),
            Target::F16(t) => {
                let grey = f16::from_f32(grey);
                self.each_bar(t.len(), |range| t[range].fill(grey));
            }
        }
    }

    /// Writes the picture into its place in the tensor.
    ///
    /// # Errors
    /// The picture is of another size, or one of its planes is too short.
    ///
    /// # Panics
    /// If `target` is not of `3 * height * width` elements.
    pub fn write(
        &mut self,
        picture: &Picture<'_>,
        target: &mut Target<'_>,
    ) -> Result<(), PreprocessError> {
        self.check(picture)?;
        let (width, height) = self.geometry.resized;
        let area = self.geometry.input.0 * self.geometry.input.1;
        let planes = match self.order {
            Order::Rgb => [0, area, 2 * area],
            Order::Bgr => [2 * area, area, 0],
        };
        let mut scratch = std::mem::take(&mut self.scratch);
        scratch.sums_of = [None; 2];
        for row in 0..height {
            let at = (self.geometry.top + row) * self.geometry.input.0 + self.geometry.left;
            let mut rows = std::mem::take(&mut scratch.rows);
            let (r, gb) = rows.split_at_mut(width);
            let (g, b) = gb.split_at_mut(width);
            match picture.pixels {
                Pixels::Rgb(plane) => self.rgb_row(plane, row, &mut scratch, [r, g, b]),
                _ => self.yuv_row(picture, row, &mut scratch, [r, g, b]),
            }
            for (colour, plane) in planes.into_iter().enumerate() {
                let from = &rows[colour * width..][..width];
                match target {
                    Target::F32(t) => t[plane + at..][..width].copy_from_slice(from),
                    Target::F16(t) => t[plane + at..][..width].convert_from_f32_slice(from),
                }
            }
            scratch.rows = rows;
        }
        self.scratch = scratch;
        Ok(())
    }

    fn check(&self, picture: &Picture<'_>) -> Result<(), PreprocessError> {
        let (width, height) = self.geometry.source;
        if (picture.width, picture.height) != (width, height) {
            let found = (picture.width, picture.height);
            return Err(PreprocessError::Size { found, wanted: self.geometry.source });
        }
        let plane = |plane: Plane<'_>, bytes: usize, rows: usize| {
            let needed = plane.stride * (rows - 1) + bytes;
            let found = plane.data.len();
            if found < needed || plane.stride < bytes {
                Err(PreprocessError::ShortPlane { found, needed })
            } else {
                Ok(())
            }
        };
        let (half_w, half_h) = (width.div_ceil(2), height.div_ceil(2));
        match picture.pixels {
            Pixels::I420 { y, u, v } => {
                plane(y, width, height)?;
                plane(u, half_w, half_h)?;
                plane(v, half_w, half_h)
            }
            Pixels::Nv12 { y, uv } => {
                plane(y, width, height)?;
                plane(uv, 2 * half_w, half_h)
            }
            Pixels::Rgb(rgb) => plane(rgb, 3 * width, height),
        }
    }

    fn each_bar(&self, len: usize, mut fill: impl FnMut(std::ops::Range<usize>)) {
        let Geometry { input: (w, h), resized, left, top, .. } = self.geometry;
        assert_eq!(len, 3 * w * h, "the tensor is not of the plan's size");
        for plane in 0..3 {
            let base = plane * w * h;
            fill(base..base + top * w);
            for row in top..top + resized.1 {
                fill(base + row * w..base + row * w + left);
                fill(base + row * w + left + resized.0..base + (row + 1) * w);
            }
            fill(base + (top + resized.1) * w..base + w * h);
        }
    }

    /// One row of an RGB picture, as OpenCV's `HResizeLinear` and `VResizeLinear` make it.
    fn rgb_row(&self, plane: Plane<'_>, row: usize, scratch: &mut Scratch, out: [&mut [f32]; 3]) {
        let (sw, sh) = self.geometry.source;
        let (width, height) = self.geometry.resized;
        let line = |y: usize| &plane.data[y * plane.stride..][..3 * sw];
        if (sw, sh) == (2 * width, 2 * height) {
            let (upper, lower) = (line(2 * row), line(2 * row + 1));
            for (i, to) in scratch.rgb.iter_mut().enumerate() {
                let at = i / 3 * 6 + i % 3;
                let four = [upper[at], upper[at + 3], lower[at], lower[at + 3]];
                *to = ((four.map(u32::from).iter().sum::<u32>() + 2) >> 2) as u8;
            }
        } else {
            let wanted = [self.y.low[row] as usize, self.y.high[row] as usize];
            // Upscaling, the next row's sources are often this row's: one of them swapped.
            if scratch.sums_of[1] == Some(wanted[0]) {
                scratch.sums.swap(0, 1);
                scratch.sums_of.swap(0, 1);
            }
            for (n, y) in wanted.into_iter().enumerate() {
                if scratch.sums_of[n] != Some(y) {
                    self.sum_row(line(y), &mut scratch.sums[n]);
                    scratch.sums_of[n] = Some(y);
                }
            }
            let (low, high) = self.y.weight[row];
            let (low, high) = (i32::from(low), i32::from(high));
            let [upper, lower] = &scratch.sums;
            for ((to, a), b) in scratch.rgb.iter_mut().zip(upper).zip(lower) {
                *to = ((((low * (a >> 4)) >> 16) + ((high * (b >> 4)) >> 16) + 2) >> 2) as u8;
            }
        }
        for (colour, out) in out.into_iter().enumerate() {
            for (to, rgb) in out.iter_mut().zip(scratch.rgb.chunks_exact(3)) {
                *to = self.bytes[usize::from(rgb[colour])];
            }
        }
    }

    fn sum_row(&self, line: &[u8], sums: &mut [i32]) {
        let taps = self.x.low.iter().zip(&self.x.high).zip(&self.x.weight);
        for (to, ((low, high), weight)) in sums.chunks_exact_mut(3).zip(taps) {
            let a = &line[3 * *low as usize..][..3];
            let b = &line[3 * *high as usize..][..3];
            let (wa, wb) = (i32::from(weight.0), i32::from(weight.1));
            for colour in 0..3 {
                to[colour] = i32::from(a[colour]) * wa + i32::from(b[colour]) * wb;
            }
        }
    }

    fn yuv_row(
        &self,
        picture: &Picture<'_>,
        row: usize,
        scratch: &mut Scratch,
        out: [&mut [f32]; 3],
    ) {
        let width = self.geometry.source.0;
        let half = width.div_ceil(2);
        let rows = Rows {
            low: self.y.low[row] as usize,
            high: self.y.high[row] as usize,
            weight: eight_bits(self.y.weight[row].1),
        };
        let Scratch { blended, yuv: [luma, blue, red], .. } = scratch;
        match picture.pixels {
            Pixels::I420 { y, u, v } => {
                self.luma_x.gather::<1>(rows.of(y, width, blended), 0, luma);
                self.chroma_x.gather::<1>(rows.halved().of(u, half, blended), 0, blue);
                self.chroma_x.gather::<1>(rows.halved().of(v, half, blended), 0, red);
            }
            Pixels::Nv12 { y, uv } => {
                self.luma_x.gather::<1>(rows.of(y, width, blended), 0, luma);
                let line = rows.halved().of(uv, 2 * half, blended);
                self.chroma_x.gather::<2>(line, 0, blue);
                self.chroma_x.gather::<2>(line, 1, red);
            }
            Pixels::Rgb(_) => unreachable!("RGB pictures take the other path"),
        }
        ToRgb::new(picture.color, self.scale.top()).row([luma, blue, red], out);
    }
}

fn eight_bits(weight: u16) -> u16 {
    let shift = WEIGHT_BITS - 8;
    (weight + (1 << (shift - 1))) >> shift
}

/// Two rows of a plane that make one of the target; `weight` is the second's, in 256ths.
#[derive(Clone, Copy)]
struct Rows {
    low: usize,
    high: usize,
    weight: u16,
}

/// A row to resample horizontally.
#[derive(Clone, Copy)]
enum Line<'a> {
    /// As it is in the picture.
    Bytes(&'a [u8]),
    /// Two rows blended, 8 fractional bits.
    Blended(&'a [u16]),
}

impl Rows {
    fn halved(self) -> Self {
        Self { low: self.low / 2, high: self.high / 2, weight: self.weight }
    }

    fn of<'a>(self, plane: Plane<'a>, bytes: usize, blended: &'a mut [u16]) -> Line<'a> {
        let line = |y: usize| &plane.data[y * plane.stride..][..bytes];
        if self.weight == 0 || self.low == self.high {
            return Line::Bytes(line(self.low));
        }
        let blended = &mut blended[..bytes];
        for ((to, a), b) in blended.iter_mut().zip(line(self.low)).zip(line(self.high)) {
            *to = u16::from(*a) * (256 - self.weight) + u16::from(*b) * self.weight;
        }
        Line::Blended(blended)
    }
}

impl Taps {
    fn new(axis: &Axis, pixel: impl Fn(u32) -> u32) -> Self {
        let low: Vec<_> = axis.low.iter().map(|p| pixel(*p)).collect();
        let high: Vec<_> = axis.high.iter().map(|p| pixel(*p)).collect();
        let weight: Vec<_> = axis.weight.iter().map(|w| u32::from(eight_bits(w.1))).collect();
        let exact = low.iter().zip(&high).zip(&weight).all(|((l, h), w)| *w == 0 || l == h);
        Self { low, high, weight, exact }
    }

    /// Resamples every `STEP`th element of `line`, from `offset` on, into `out`, as 0.0..=255.0.
    fn gather<const STEP: usize>(&self, line: Line<'_>, offset: usize, out: &mut [f32]) {
        match line {
            Line::Bytes(line) => self.gather_of::<STEP, _>(line, offset, 1.0, out),
            Line::Blended(line) => self.gather_of::<STEP, _>(line, offset, 1.0 / 256.0, out),
        }
    }

    fn gather_of<const STEP: usize, T: Copy + Into<u32>>(
        &self,
        line: &[T],
        offset: usize,
        unit: f32,
        out: &mut [f32],
    ) {
        let at = |pixel: u32| -> u32 { line[pixel as usize * STEP + offset].into() };
        if self.exact {
            for (to, low) in out.iter_mut().zip(&self.low) {
                *to = at(*low) as f32 * unit;
            }
        } else {
            let unit = unit / 256.0;
            let taps = self.low.iter().zip(&self.high).zip(&self.weight);
            for (to, ((low, high), weight)) in out.iter_mut().zip(taps) {
                *to = (at(*low) * (256 - weight) + at(*high) * weight) as i32 as f32 * unit;
            }
        }
    }
}

/// YUV bytes to RGB in 0..=`top`.
struct ToRgb {
    luma: f32,
    black: f32,
    red_by_red: f32,
    green_by_red: f32,
    green_by_blue: f32,
    blue_by_blue: f32,
    top: f32,
}

impl ToRgb {
    /// The constants of ITU-R BT.601 and BT.709, from their red and blue luma shares.
    fn new(color: Color, top: f32) -> Self {
        let (kr, kb) = match color.matrix {
            Matrix::Bt601 => (0.299, 0.114),
            Matrix::Bt709 => (0.2126, 0.0722),
        };
        let kg = 1.0 - kr - kb;
        let (black, luma, chroma) = match color.range {
            Range::Limited => (16.0, 255.0 / 219.0, 255.0 / 224.0),
            Range::Full => (0.0, 1.0, 1.0),
        };
        let unit = top / 255.0;
        Self {
            luma: luma * unit,
            black: black * luma * unit,
            red_by_red: 2.0 * (1.0 - kr) * chroma * unit,
            green_by_red: 2.0 * kr * (1.0 - kr) / kg * chroma * unit,
            green_by_blue: 2.0 * kb * (1.0 - kb) / kg * chroma * unit,
            blue_by_blue: 2.0 * (1.0 - kb) * chroma * unit,
            top,
        }
    }

    fn row(&self, [luma, blue, red]: [&[f32]; 3], [r, g, b]: [&mut [f32]; 3]) {
        let n = luma.len();
        // Equal lengths, said once, spare the loop its bounds checks.
        let (blue, red) = (&blue[..n], &red[..n]);
        let (r, g, b) = (&mut r[..n], &mut g[..n], &mut b[..n]);
        for i in 0..n {
            let y = luma[i] * self.luma - self.black;
            let (u, v) = (blue[i] - 128.0, red[i] - 128.0);
            r[i] = (y + v * self.red_by_red).max(0.0).min(self.top);
            g[i] = (y - v * self.green_by_red - u * self.green_by_blue).max(0.0).min(self.top);
            b[i] = (y + u * self.blue_by_blue).max(0.0).min(self.top);
        }
    }
}
