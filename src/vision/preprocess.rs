//! A decoded frame to the model's input tensor, in one pass: resize, colour, scale, planes.
//!
//! A [`Plan`] holds what depends only on the sizes (tables, scratch rows), so that a frame costs no
//! allocation. It is made once per size of picture and reused.
//!
//! Each row of the target is made of the source rows that it needs, and of their columns if whole
//! pixels are taken (a scale of 3: 1080p into 640): fetched, converted to RGB, blended sideways,
//! then downwards, in the integers of OpenCV. For 8-bit RGB the result equals `cv2.resize` bit by
//! bit; for YUV it equals what `cv2.VideoCapture` and `cv2.resize` make of it (see `color`).
//!
//! The loops are plain ones that the compiler turns into vector instructions, once for every
//! machine and once for those with AVX2. Only those of which it makes nothing fast are written out
//! (`kernels`).

use half::f16;
use half::slice::HalfFloatSliceExt;

use super::blend::{Blend, SHRINK_MAX, SUM_BITS};
use super::color::{ToRgb, high};
use super::kernels::{self, Kernels, Level, thirds, thirds_mut};
use super::letterbox::{Geometry, PAD};
use super::picture::{Picture, Pixels, Plane};
use super::resample::Axis;

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
    /// Those of the source that are fetched; `None`: all.
    columns: Option<Vec<u32>>,
    blend: Blend,
    y: Axis,
    kind: Kind,
    level: Level,
    scratch: Scratch,
}

/// How rows are made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// Exactly half the size: OpenCV averages blocks of 2×2.
    Halved,
    /// Every column of the target is one of the source.
    Sampled,
    /// Columns are blended.
    Blended,
}

/// Rows of three planes, red, green and blue one behind the other.
#[derive(Debug, Default)]
struct Scratch {
    yuv: Yuv,
    /// Source rows in RGB.
    rgb: [Vec<u8>; 2],
    /// Source rows blended sideways, [`SUM_BITS`] fractional bits, and which rows they are of.
    sums: [Vec<i16>; 2],
    sums_of: [Option<usize>; 2],
    /// A row of the target.
    bytes: Vec<u8>,
    /// The same, for the conversion to 16-bit floats.
    floats: Vec<f32>,
}

/// A row on its way to RGB.
#[derive(Debug, Default)]
struct Yuv {
    /// The columns that were picked.
    picked: [Vec<u8>; 3],
    /// What a row of chroma adds to each colour, and which row that is: two rows of luma share it.
    chroma: Vec<i16>,
    chroma_of: Option<usize>,
}

impl Plan {
    /// Plans for pictures placed by `geometry`.
    pub fn new(geometry: Geometry, order: Order, scale: Scale) -> Self {
        let (source, resized) = (geometry.source, geometry.resized);
        let x = Axis::columns(source.0, resized.0);
        let y = Axis::rows(source.1, resized.1);
        let kind = if source == (2 * resized.0, 2 * resized.1) {
            Kind::Halved
        } else if x.weight.iter().all(|w| w.1 == 0) {
            Kind::Sampled
        } else {
            Kind::Blended
        };
        let same = source.0 == resized.0;
        let (columns, x) = match kind {
            Kind::Sampled if !same => (Some(x.low.clone()), x),
            Kind::Blended if source.0 > SHRINK_MAX * resized.0 => {
                let (pixels, x) = x.pairs();
                (Some(pixels), x)
            }
            _ => (None, x),
        };
        let width = columns.as_ref().map_or(source.0, Vec::len);
        let scratch = Scratch {
            yuv: Yuv {
                picked: std::array::from_fn(|_| vec![0; width]),
                chroma: vec![0; 3 * width.div_ceil(2)],
                chroma_of: None,
            },
            rgb: [vec![0; 3 * width], vec![0; 3 * width]],
            sums: [vec![0; 3 * resized.0], vec![0; 3 * resized.0]],
            sums_of: [None; 2],
            bytes: vec![0; 3 * resized.0],
            floats: vec![0.0; 3 * resized.0],
        };
        let blend = Blend::new(x, width);
        Self { geometry, order, scale, columns, blend, y, kind, level: Level::detect(), scratch }
    }

    /// The same, for the plainest of machines.
    pub fn portable(self) -> Self {
        Self { level: Level::Portable, ..self }
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
        let grey = f32::from(PAD) * self.unit();
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
        match self.level {
            Level::Portable => self.write_rows::<kernels::Portable>(picture, target),
            #[cfg(target_arch = "x86_64")]
            // SAFETY: the level was detected.
            Level::Avx2 => unsafe { self.write_avx2(picture, target) },
            #[cfg(target_arch = "aarch64")]
            Level::Neon => self.write_rows::<kernels::Neon>(picture, target),
        }
        Ok(())
    }

    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2")]
    fn write_avx2(&mut self, picture: &Picture<'_>, target: &mut Target<'_>) {
        self.write_rows::<kernels::Avx2>(picture, target);
    }

    #[inline(always)]
    fn write_rows<K: Kernels>(&mut self, picture: &Picture<'_>, target: &mut Target<'_>) {
        let (width, height) = self.geometry.resized;
        let area = self.geometry.input.0 * self.geometry.input.1;
        let planes = match self.order {
            Order::Rgb => [0, area, 2 * area],
            Order::Bgr => [2 * area, area, 0],
        };
        let unit = self.unit();
        let to_rgb = ToRgb::new(picture.color);
        let mut scratch = std::mem::take(&mut self.scratch);
        (scratch.sums_of, scratch.yuv.chroma_of) = ([None; 2], None);
        for row in 0..height {
            self.row::<K>(picture, &to_rgb, row, &mut scratch);
            let at = (self.geometry.top + row) * self.geometry.input.0 + self.geometry.left;
            for (bytes, plane) in scratch.bytes.chunks_exact(width).zip(planes) {
                match target {
                    Target::F32(t) => to_floats(bytes, unit, &mut t[plane + at..][..width]),
                    Target::F16(t) => {
                        let floats = &mut scratch.floats[..width];
                        to_floats(bytes, unit, floats);
                        t[plane + at..][..width].convert_from_f32_slice(floats);
                    }
                }
            }
        }
        self.scratch = scratch;
    }

    /// The tensor's value of byte 1. Off by a 16-millionth from a division by 255.
    fn unit(&self) -> f32 {
        self.scale.top() / 255.0
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

    /// Makes one row of the target in `scratch.bytes`.
    #[inline(always)]
    fn row<K: Kernels>(
        &self,
        picture: &Picture<'_>,
        to_rgb: &ToRgb,
        row: usize,
        scratch: &mut Scratch,
    ) {
        let Scratch { yuv, rgb, sums, sums_of, bytes, .. } = scratch;
        let columns = self.columns.as_deref();
        let (low, high) = (self.y.low[row] as usize, self.y.high[row] as usize);
        let weight = self.y.weight[row];
        match self.kind {
            Kind::Halved => {
                let [upper, lower] = rgb;
                fetch::<K>(picture, 2 * row, None, to_rgb, yuv, upper);
                fetch::<K>(picture, 2 * row + 1, None, to_rgb, yuv, lower);
                average(upper, lower, bytes);
            }
            Kind::Sampled if weight.1 == 0 => {
                fetch::<K>(picture, low, columns, to_rgb, yuv, bytes);
            }
            Kind::Sampled | Kind::Blended => {
                // Upscaling, the next row's upper source is often this row's lower one.
                if sums_of[1] == Some(low) {
                    sums.swap(0, 1);
                    sums_of.swap(0, 1);
                }
                for (n, y) in [low, high].into_iter().enumerate() {
                    if sums_of[n] == Some(y) {
                        continue;
                    }
                    fetch::<K>(picture, y, columns, to_rgb, yuv, &mut rgb[0]);
                    match self.kind {
                        Kind::Sampled => weigh(&rgb[0], &mut sums[n]),
                        _ => self.blend.rows::<K>(&rgb[0], &mut sums[n]),
                    }
                    sums_of[n] = Some(y);
                }
                let [upper, lower] = sums;
                combine(upper, lower, weight, bytes);
            }
        }
    }
}

/// Downwards: OpenCV's `VResizeLinear`.
#[inline(always)]
fn combine(upper: &[i16], lower: &[i16], weight: (u16, u16), out: &mut [u8]) {
    // At most `1 << WEIGHT_BITS`. Of 16 bits each, the upper half of a product is one instruction.
    let (wa, wb) = (weight.0 as i16, weight.1 as i16);
    for ((to, a), b) in out.iter_mut().zip(upper).zip(lower) {
        *to = ((high(wa, *a) + high(wb, *b) + 2) >> 2) as u8;
    }
}

#[inline(always)]
fn weigh(rgb: &[u8], sums: &mut [i16]) {
    for (to, v) in sums.iter_mut().zip(rgb) {
        *to = i16::from(*v) << SUM_BITS;
    }
}

#[inline(always)]
fn average(upper: &[u8], lower: &[u8], out: &mut [u8]) {
    // The source may end in the third plane's last pair: its length is twice the target's.
    let pairs = upper.chunks_exact(2).zip(lower.chunks_exact(2));
    for (to, (a, b)) in out.iter_mut().zip(pairs) {
        let sum = u16::from(a[0]) + u16::from(a[1]) + u16::from(b[0]) + u16::from(b[1]);
        *to = ((sum + 2) >> 2) as u8;
    }
}

#[inline(always)]
fn to_floats(bytes: &[u8], unit: f32, out: &mut [f32]) {
    for (to, v) in out.iter_mut().zip(bytes) {
        *to = f32::from(*v) * unit;
    }
}

/// Fetches row `y` of a picture, or of that row the given columns, as planes of RGB.
#[inline(always)]
fn fetch<K: Kernels>(
    picture: &Picture<'_>,
    y: usize,
    columns: Option<&[u32]>,
    to_rgb: &ToRgb,
    yuv: &mut Yuv,
    rgb: &mut [u8],
) {
    let width = picture.width;
    let [luma, blue, red] = &mut yuv.picked;
    match (picture.pixels, columns) {
        (Pixels::Rgb(plane), None) => {
            let [r, g, b] = thirds_mut(rgb);
            let line = &line(plane, y)[..3 * width];
            for (((r, g), b), pixel) in r.iter_mut().zip(g).zip(b).zip(line.chunks_exact(3)) {
                (*r, *g, *b) = (pixel[0], pixel[1], pixel[2]);
            }
        }
        (Pixels::Rgb(plane), Some(columns)) => {
            let line = &line(plane, y)[..3 * width];
            for (n, out) in rgb.chunks_exact_mut(columns.len()).enumerate() {
                pick(line, columns, |x| 3 * x + n, out);
            }
        }
        (Pixels::I420 { y: luma, u, v }, None) => {
            let (u, v) = (line(u, y / 2), line(v, y / 2));
            yuv.chroma_row(y / 2, to_rgb, u.iter().zip(v).map(|(u, v)| [*u, *v]));
            to_rgb.pairs::<K>(&line(luma, y)[..width], thirds(&yuv.chroma), thirds_mut(rgb));
        }
        (Pixels::Nv12 { y: luma, uv }, None) => {
            yuv.chroma_row(y / 2, to_rgb, line(uv, y / 2).as_chunks().0.iter().copied());
            to_rgb.pairs::<K>(&line(luma, y)[..width], thirds(&yuv.chroma), thirds_mut(rgb));
        }
        (Pixels::I420 { y: luma_plane, u, v }, Some(columns)) => {
            pick(line(luma_plane, y), columns, |x| x, luma);
            pick(line(u, y / 2), columns, |x| x / 2, blue);
            pick(line(v, y / 2), columns, |x| x / 2, red);
            to_rgb.planes([luma, blue, red], thirds_mut(rgb));
        }
        (Pixels::Nv12 { y: luma_plane, uv }, Some(columns)) => {
            pick(line(luma_plane, y), columns, |x| x, luma);
            pick(line(uv, y / 2), columns, |x| x & !1, blue);
            pick(line(uv, y / 2), columns, |x| x | 1, red);
            to_rgb.planes([luma, blue, red], thirds_mut(rgb));
        }
    }
}

impl Yuv {
    /// Makes `chroma` that of a row, whose samples are blue and red difference.
    #[inline(always)]
    fn chroma_row(&mut self, row: usize, to_rgb: &ToRgb, samples: impl Iterator<Item = [u8; 2]>) {
        if self.chroma_of.replace(row) == Some(row) {
            return;
        }
        let [red, green, blue] = thirds_mut(&mut self.chroma);
        let outs = red.iter_mut().zip(green).zip(blue);
        for (((red, green), blue), [u, v]) in outs.zip(samples) {
            [*red, *green, *blue] = to_rgb.adds(u, v);
        }
    }
}

#[inline(always)]
fn line(plane: Plane<'_>, y: usize) -> &[u8] {
    &plane.data[y * plane.stride..]
}

#[inline(always)]
fn pick(line: &[u8], columns: &[u32], at: impl Fn(usize) -> usize, out: &mut [u8]) {
    for (to, x) in out.iter_mut().zip(columns) {
        *to = line[at(*x as usize)];
    }
}
