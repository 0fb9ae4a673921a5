//! A decoded frame as borrowed planes, in the pixel formats that decoders hand out.

/// One plane of pixels; rows start `stride` bytes apart, which may be more than the row's width.
#[derive(Debug, Clone, Copy)]
pub struct Plane<'a> {
    /// The bytes, at least `stride * (rows - 1) + row_bytes` of them.
    pub data: &'a [u8],
    /// Distance between the starts of two rows, in bytes.
    pub stride: usize,
}

/// The planes of a picture. Chroma of `I420` and `Nv12` is subsampled 2×2, rounded up.
#[derive(Debug, Clone, Copy)]
pub enum Pixels<'a> {
    /// Planar YUV 4:2:0.
    I420 {
        /// Luma.
        y: Plane<'a>,
        /// Blue difference.
        u: Plane<'a>,
        /// Red difference.
        v: Plane<'a>,
    },
    /// Luma, then interleaved U and V.
    Nv12 {
        /// Luma.
        y: Plane<'a>,
        /// `U V U V …`
        uv: Plane<'a>,
    },
    /// Packed `R G B R G B …`, three bytes a pixel.
    Rgb(Plane<'a>),
}

/// The YUV matrix of a stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Matrix {
    /// ITU-R BT.601.
    Bt601,
    /// ITU-R BT.709.
    Bt709,
}

/// Whether luma spans 16..=235 or 0..=255.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Range {
    /// 16..=235 for luma, 16..=240 for chroma.
    Limited,
    /// 0..=255.
    Full,
}

/// How YUV turns into RGB. Ignored for RGB pixels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Color {
    /// The matrix.
    pub matrix: Matrix,
    /// The range.
    pub range: Range,
}

/// A decoded frame, borrowed.
#[derive(Debug, Clone, Copy)]
pub struct Picture<'a> {
    /// Width in pixels, at least 1.
    pub width: usize,
    /// Height in pixels, at least 1.
    pub height: usize,
    /// How to read the colours.
    pub color: Color,
    /// The planes.
    pub pixels: Pixels<'a>,
}
