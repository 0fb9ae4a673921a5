//! Where a picture lies in the model's input, and the way back.

/// How a picture of another shape is brought into the model's input.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Fit {
    /// Scaled evenly, centred, grey bars around it (YOLO).
    Letterbox,
    /// Scaled evenly, in the upper left corner, grey bars right and below (YOLOX's own demo).
    Corner,
    /// Scaled to fill, the aspect ratio lost (RT-DETR).
    Stretch,
}

/// The grey of the bars, as a byte.
pub const PAD: u8 = 114;

/// A picture's place in the input. Sizes are (width, height) in pixels.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Geometry {
    /// Size of the picture.
    pub source: (usize, usize),
    /// Size of the model's input.
    pub input: (usize, usize),
    /// Size of the picture within the input.
    pub resized: (usize, usize),
    /// Left edge of the picture within the input.
    pub left: usize,
    /// Upper edge of the picture within the input.
    pub top: usize,
    gain: (f32, f32),
}

impl Geometry {
    /// Places a picture of `source` pixels into an input of `input` pixels; all four at least 1.
    ///
    /// The rounding is that of Ultralytics' `LetterBox`: Python's `round`, half to even, and
    /// `±0.1` before the split of an odd bar. `Corner` truncates, as YOLOX's `preproc` does.
    pub fn new(fit: Fit, source: (usize, usize), input: (usize, usize)) -> Self {
        let (sw, sh) = (source.0 as f64, source.1 as f64);
        let (iw, ih) = (input.0 as f64, input.1 as f64);
        let ratio = (ih / sh).min(iw / sw);
        let even = |side: f64| (side * ratio).round_ties_even().max(1.0) as usize;
        let resized = match fit {
            Fit::Letterbox => (even(sw), even(sh)),
            Fit::Corner => (((sw * ratio) as usize).max(1), ((sh * ratio) as usize).max(1)),
            Fit::Stretch => input,
        };
        let resized = (resized.0.min(input.0), resized.1.min(input.1));
        let before = |total: usize, part: usize| {
            (((total - part) as f64) / 2.0 - 0.1).round_ties_even().max(0.0) as usize
        };
        let (left, top) = match fit {
            Fit::Letterbox => (before(input.0, resized.0), before(input.1, resized.1)),
            Fit::Corner | Fit::Stretch => (0, 0),
        };
        let gain = match fit {
            Fit::Corner => (ratio as f32, ratio as f32),
            _ => ((resized.0 as f64 / sw) as f32, (resized.1 as f64 / sh) as f32),
        };
        Self { source, input, resized, left, top, gain }
    }

    /// Takes a box `[x1, y1, x2, y2]` from input pixels to fractions of the picture, clipped to it
    /// (Ultralytics' `scale_boxes`: one gain per axis, then `clip_boxes`).
    pub fn to_source(&self, corners: [f32; 4]) -> [f32; 4] {
        let x = |v: f32| {
            ((v - self.left as f32) / self.gain.0).clamp(0.0, self.source.0 as f32)
                / self.source.0 as f32
        };
        let y = |v: f32| {
            ((v - self.top as f32) / self.gain.1).clamp(0.0, self.source.1 as f32)
                / self.source.1 as f32
        };
        [x(corners[0]), y(corners[1]), x(corners[2]), y(corners[3])]
    }
}
