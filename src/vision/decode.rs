//! The model's raw output, layout by layout, to boxes in input pixels.
//!
//! Every function appends the boxes whose score is strictly greater than `confidence` to `out` and
//! fails if the output holds a NaN or an infinity: such a model must not go on unnoticed.

/// A box of the model's, in pixels of its input.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Candidate {
    /// `x1, y1, x2, y2`.
    pub corners: [f32; 4],
    /// 0..=1.
    pub score: f32,
    /// Index of the label.
    pub class: u32,
    /// Position among the candidates of its frame: who is first among equals.
    pub order: u32,
}

/// What makes an output unusable.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// A NaN or an infinity.
    #[error("the model's output holds NaN or infinity")]
    NotFinite,
    /// A class that no label belongs to.
    #[error("the model's output names class {class}, but the model has {labels} labels")]
    UnknownClass {
        /// As found in the output.
        class: u32,
        /// How many the model has.
        labels: usize,
    },
}

/// Anchors that are looked at together: five arrays of this length stay in the first-level cache.
const TILE: usize = 512;

/// `[4 + classes, anchors]` (YOLOv8, v9, 11, 12): rows `cx, cy, w, h`, then one row per class.
///
/// The rows are walked as they lie, with a running maximum per anchor: transposing first would
/// cost more than all the rest.
pub fn yolo8(
    data: &[f32],
    anchors: usize,
    confidence: f32,
    out: &mut Vec<Candidate>,
) -> Result<(), DecodeError> {
    let classes = data.len() / anchors - 4;
    let row = |n: usize, from: usize, len: usize| &data[n * anchors + from..][..len];
    let mut best = [0f32; TILE];
    let mut class = [0u32; TILE];
    let mut odd = [0f32; TILE];
    for from in (0..anchors).step_by(TILE) {
        let len = TILE.min(anchors - from);
        let (best, class, odd) = (&mut best[..len], &mut class[..len], &mut odd[..len]);
        odd.fill(0.0);
        for n in 0..4 {
            for (odd, v) in odd.iter_mut().zip(row(n, from, len)) {
                *odd += v * 0.0;
            }
        }
        best.copy_from_slice(row(4, from, len));
        class.fill(0);
        for (odd, v) in odd.iter_mut().zip(best.iter()) {
            *odd += v * 0.0;
        }
        for c in 1..classes {
            let scores = row(4 + c, from, len);
            for i in 0..len {
                let score = scores[i];
                let better = score > best[i];
                best[i] = if better { score } else { best[i] };
                class[i] = if better { c as u32 } else { class[i] };
                // 0 for a number, NaN for NaN and infinity; stays NaN once it is.
                odd[i] += score * 0.0;
            }
        }
        if odd.iter().any(|v| v.is_nan()) {
            return Err(DecodeError::NotFinite);
        }
        for i in 0..len {
            if best[i] > confidence {
                let at = |n: usize| data[n * anchors + from + i];
                push(out, corners(at(0), at(1), at(2), at(3)), best[i], class[i]);
            }
        }
    }
    Ok(())
}

/// `[anchors, 5 + classes]` (YOLOv5, v7): `cx, cy, w, h, objectness, classes…`; the score is the
/// product of objectness and the best class.
pub fn yolo5(
    data: &[f32],
    columns: usize,
    confidence: f32,
    out: &mut Vec<Candidate>,
) -> Result<(), DecodeError> {
    finite(data)?;
    for row in data.chunks_exact(columns) {
        push_product(row, confidence, corners(row[0], row[1], row[2], row[3]), out)?;
    }
    Ok(())
}

/// Strides of YOLOX's three levels, in the order of its rows.
pub const YOLOX_STRIDES: [usize; 3] = [8, 16, 32];

/// `[anchors, 5 + classes]` of YOLOX: boxes relative to their cell. `input` is (width, height).
///
/// `centre = (raw + cell) * stride`, `size = exp(raw) * stride` (YOLOX's `demo_postprocess`).
pub fn yolox(
    data: &[f32],
    columns: usize,
    input: (usize, usize),
    confidence: f32,
    out: &mut Vec<Candidate>,
) -> Result<(), DecodeError> {
    finite(data)?;
    let mut rows = data.chunks_exact(columns);
    for stride in YOLOX_STRIDES {
        for y in 0..input.1 / stride {
            for (x, row) in (0..input.0 / stride).zip(&mut rows) {
                if row[4] > confidence {
                    let s = stride as f32;
                    let (cx, cy) = ((row[0] + x as f32) * s, (row[1] + y as f32) * s);
                    let (w, h) = (row[2].exp() * s, row[3].exp() * s);
                    push_product(row, confidence, corners(cx, cy, w, h), out)?;
                }
            }
        }
    }
    Ok(())
}

/// `[boxes, 6]` (YOLOv10, 26, in-graph suppression): `x1, y1, x2, y2, score, class`, in input
/// pixels. The first [`DETECTIONS_MAX`](super::nms::DETECTIONS_MAX) that pass are kept, in the
/// model's order; nothing is suppressed.
pub fn end2end(
    data: &[f32],
    labels: usize,
    confidence: f32,
    out: &mut Vec<Candidate>,
) -> Result<(), DecodeError> {
    finite(data)?;
    ranked(data, labels, confidence, out, |row| [row[0], row[1], row[2], row[3]])
}

/// `[boxes, 4 + classes]` (RT-DETR): `cx, cy, w, h` as fractions of the input, then scores.
/// Nothing is suppressed. `input` is (width, height).
pub fn rtdetr(
    data: &[f32],
    columns: usize,
    input: (usize, usize),
    confidence: f32,
    out: &mut Vec<Candidate>,
) -> Result<(), DecodeError> {
    finite(data)?;
    for row in data.chunks_exact(columns) {
        let (class, score) = best(&row[4..]);
        if score > confidence && out.len() < super::nms::DETECTIONS_MAX {
            push(out, fractions(row, input), score, class);
        }
    }
    Ok(())
}

/// `[boxes, 6]` of RT-DETR as Ultralytics exports it since its decoder ranks the boxes in the
/// graph: `cx, cy, w, h` as fractions of the input, score, class.
pub fn rtdetr_ranked(
    data: &[f32],
    labels: usize,
    input: (usize, usize),
    confidence: f32,
    out: &mut Vec<Candidate>,
) -> Result<(), DecodeError> {
    finite(data)?;
    ranked(data, labels, confidence, out, |row| fractions(row, input))
}

fn ranked(
    data: &[f32],
    labels: usize,
    confidence: f32,
    out: &mut Vec<Candidate>,
    corners: impl Fn(&[f32]) -> [f32; 4],
) -> Result<(), DecodeError> {
    for row in data.chunks_exact(6).filter(|row| row[4] > confidence) {
        if out.len() == super::nms::DETECTIONS_MAX {
            break;
        }
        let class = row[5] as u32;
        if class as usize >= labels {
            return Err(DecodeError::UnknownClass { class, labels });
        }
        push(out, corners(row), row[4], class);
    }
    Ok(())
}

fn push_product(
    row: &[f32],
    confidence: f32,
    corners: [f32; 4],
    out: &mut Vec<Candidate>,
) -> Result<(), DecodeError> {
    if row[4] > confidence {
        let (class, score) = row[5..].iter().enumerate().fold((0, f32::MIN), |best, (c, v)| {
            let score = v * row[4];
            if score > best.1 { (c as u32, score) } else { best }
        });
        if score > confidence {
            // `exp` of a large number is infinite although the output was not.
            finite(&corners)?;
            push(out, corners, score, class);
        }
    }
    Ok(())
}

fn push(out: &mut Vec<Candidate>, corners: [f32; 4], score: f32, class: u32) {
    let order = out.len() as u32;
    out.push(Candidate { corners, score, class, order });
}

/// The first of the greatest.
fn best(scores: &[f32]) -> (u32, f32) {
    scores.iter().enumerate().fold(
        (0, f32::MIN),
        |best, (c, &v)| {
            if v > best.1 { (c as u32, v) } else { best }
        },
    )
}

fn fractions(row: &[f32], input: (usize, usize)) -> [f32; 4] {
    let [x1, y1, x2, y2] = corners(row[0], row[1], row[2], row[3]);
    let (w, h) = (input.0 as f32, input.1 as f32);
    [x1 * w, y1 * h, x2 * w, y2 * h]
}

fn corners(cx: f32, cy: f32, w: f32, h: f32) -> [f32; 4] {
    let (half_w, half_h) = (w / 2.0, h / 2.0);
    [cx - half_w, cy - half_h, cx + half_w, cy + half_h]
}

fn finite(data: &[f32]) -> Result<(), DecodeError> {
    // Lanes instead of one sum: float addition may not be reordered, lanes may run side by side.
    let mut odd = [0f32; 32];
    let chunks = data.chunks_exact(32);
    let rest = chunks.remainder().iter().any(|v| !v.is_finite());
    for chunk in chunks {
        for (odd, v) in odd.iter_mut().zip(chunk) {
            *odd += v * 0.0;
        }
    }
    if rest || odd.iter().any(|v| v.is_nan()) { Err(DecodeError::NotFinite) } else { Ok(()) }
}
