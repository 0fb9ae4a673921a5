//! The layouts of detectors' outputs, and how one is told from another.

use crate::vision::decode::YOLOX_STRIDES;
use crate::vision::letterbox::Fit;
use crate::vision::preprocess::{Order, Scale};

use super::refusal::{Code, Refusal};

/// How boxes lie in the output `[1, a, b]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Layout {
    /// `[1, 4 + classes, anchors]`: YOLOv8, v9, 11, 12.
    Yolo8,
    /// `[1, anchors, 5 + classes]`: YOLOv5, v7.
    Yolo5,
    /// `[1, anchors, 5 + classes]`, relative to the grid: YOLOX.
    Yolox,
    /// `[1, boxes, 6]`: YOLOv10, 26, suppression in the graph.
    End2end,
    /// `[1, boxes, 4 + classes]`, or `[1, boxes, 6]` with score and class: RT-DETR.
    Rtdetr,
}

impl Layout {
    /// The name in manifests and messages.
    pub fn name(self) -> &'static str {
        match self {
            Self::Yolo8 => "yolo8",
            Self::Yolo5 => "yolo5",
            Self::Yolox => "yolox",
            Self::End2end => "end2end",
            Self::Rtdetr => "rtdetr",
        }
    }

    /// What the inputs of such models are like.
    pub(super) fn input(self) -> (Order, Scale, Fit) {
        match self {
            Self::Yolox => (Order::Bgr, Scale::Byte, Fit::Corner),
            Self::Rtdetr => (Order::Rgb, Scale::Unit, Fit::Stretch),
            _ => (Order::Rgb, Scale::Unit, Fit::Letterbox),
        }
    }
}

/// All that bears on the layout.
pub(super) struct Evidence {
    /// Second and third dimension of the output.
    pub(super) shape: [Option<usize>; 2],
    /// Width and height of the input.
    pub(super) input: (usize, usize),
    pub(super) labels: Option<usize>,
    pub(super) stride: Option<u32>,
    /// The metadata says that boxes need no suppression, or that they do.
    pub(super) end2end: Option<bool>,
    /// The metadata names RT-DETR.
    pub(super) rtdetr: bool,
    /// The metadata says `task`: the exporter is Ultralytics', and the task is detection.
    pub(super) task: bool,
    /// The metadata names the head, as the exporter does whose RT-DETR ranks its boxes.
    pub(super) head: bool,
}

/// Numbers of cells that neighbouring strides make together, at least `strides` of them: from the
/// greatest (8 to 64 when the file does not say) down to 4.
fn cell_counts(evidence: &Evidence, strides: usize) -> Vec<usize> {
    let (w, h) = evidence.input;
    let cells = |stride: usize| w.div_ceil(stride) * h.div_ceil(stride);
    let greatest = evidence.stride.map_or_else(|| vec![8, 16, 32, 64], |s| vec![s as usize]);
    let mut counts = Vec::new();
    for greatest in greatest.into_iter().filter(|s| s.is_power_of_two() && *s <= 128) {
        let run = std::iter::successors(Some(greatest), |s| Some(s / 2)).take_while(|s| *s >= 4);
        let sums = run.scan(0, |sum, stride| {
            *sum += cells(stride);
            Some(*sum)
        });
        counts.extend(sums.skip(strides - 1));
    }
    counts
}

/// Finds the one layout that everything agrees with.
pub(super) fn recognise(evidence: &Evidence) -> Result<Layout, Refusal> {
    let counted = by_anchors(evidence);
    let mut fits = told(evidence, counted.clone());
    if fits.is_empty() {
        fits = told(evidence, by_columns(evidence));
    }
    let layout = match (&fits[..], &counted[..]) {
        ([layout], _) => *layout,
        // The shape is plain; what contradicts it is the number of labels, said elsewhere.
        ([], [layout]) => *layout,
        ([], _) => return Err(unknown(evidence)),
        _ => return Err(ambiguous(evidence, &fits)),
    };
    if readable(layout, ranked(layout, evidence), evidence.shape, evidence.input) {
        return Ok(layout);
    }
    let (width, height) = evidence.input;
    Err(Refusal::new(
        Code::LayoutMismatch,
        format!(
            "output {} is of layout {}, but can't be read so with an input of {width}x{height}: \
             export with sides that are multiples of 32",
            shape(evidence.shape),
            layout.name()
        ),
    ))
}

/// The layouts whose number of anchors is the one that the input's size and the strides imply.
fn by_anchors(evidence: &Evidence) -> Vec<Layout> {
    let [a, b] = evidence.shape;
    let one = cell_counts(evidence, 1);
    // Of a single stride no YOLOv5 or YOLOX is made, but [1, 300, 6] at 320x320 would look so.
    let several = cell_counts(evidence, 2);
    let mut fits = Vec::new();
    if b.is_some_and(|b| one.contains(&b)) && a.is_none_or(|a| a > 4) {
        fits.push(Layout::Yolo8);
    }
    if b.is_none_or(|b| b > 5) {
        if a.is_some_and(|a| a % 3 == 0 && several.contains(&(a / 3))) {
            fits.push(Layout::Yolo5);
        }
        if a.is_some_and(|a| several.contains(&a)) {
            fits.push(Layout::Yolox);
        }
    }
    fits
}

/// The layouts that are possible when the number of anchors says nothing.
fn by_columns(evidence: &Evidence) -> Vec<Layout> {
    let [a, b] = evidence.shape;
    let mut fits = Vec::new();
    if let Some(labels) = evidence.labels {
        if a == Some(4 + labels) {
            fits.push(Layout::Yolo8);
        }
        if b == Some(5 + labels) && b != Some(6) {
            fits.extend([Layout::Yolo5, Layout::Yolox]);
        }
    }
    if (a, b) == (None, None) && evidence.task {
        // A dynamic export of Ultralytics says no size of its output; the first run tells whether
        // the labels fit.
        fits.push(Layout::Yolo8);
        fits.push(Layout::End2end);
        if evidence.rtdetr {
            fits.push(Layout::Rtdetr);
        }
    }
    if b == Some(6) {
        fits.push(Layout::End2end);
    }
    if b.is_some_and(|b| b > 4) {
        fits.push(Layout::Rtdetr);
    }
    fits
}

/// Keeps what the metadata does not contradict: what the exporter wrote, the number of labels.
fn told(evidence: &Evidence, mut fits: Vec<Layout>) -> Vec<Layout> {
    fits.retain(|f| match f {
        // The one exporter that ranks RT-DETR's boxes says that it is RT-DETR.
        Layout::Rtdetr if ranked(*f, evidence) => evidence.rtdetr,
        Layout::Rtdetr => evidence.end2end != Some(true) || evidence.rtdetr,
        Layout::End2end => evidence.end2end != Some(false) && !evidence.rtdetr,
        _ => evidence.end2end != Some(true) && !evidence.rtdetr,
    });
    if let Some(labels) = evidence.labels {
        fits.retain(|f| {
            classes(*f, ranked(*f, evidence), evidence.shape).is_none_or(|n| n == labels)
        });
    }
    fits
}

/// Whether a layout can be read out of a shape, as far as that is known.
pub(super) fn readable(
    layout: Layout,
    ranked: bool,
    [a, b]: [Option<usize>; 2],
    (width, height): (usize, usize),
) -> bool {
    match layout {
        Layout::Yolo8 => a.is_none_or(|a| a > 4),
        Layout::Yolo5 => b.is_none_or(|b| b > 5),
        // The grid must be walked: rows that do not fill it belong to something else.
        Layout::Yolox => {
            let cells: usize = YOLOX_STRIDES.iter().map(|s| (width / s) * (height / s)).sum();
            a.is_none_or(|a| a == cells) && b.is_none_or(|b| b > 5)
        }
        Layout::Rtdetr if !ranked => b.is_none_or(|b| b > 4),
        Layout::End2end | Layout::Rtdetr => b.is_none_or(|b| b == 6),
    }
}

/// Accepts a layout that a manifest asks for, if the shape can be read so.
pub(super) fn check(layout: Layout, evidence: &Evidence) -> Result<Layout, Refusal> {
    if readable(layout, ranked(layout, evidence), evidence.shape, evidence.input) {
        return Ok(layout);
    }
    Err(Refusal::new(
        Code::LayoutMismatch,
        format!(
            "the manifest says layout {:?}, but the output {} can't be read so",
            layout.name(),
            shape(evidence.shape)
        ),
    ))
}

/// Whether an RT-DETR output holds score and class instead of a score per class. With six columns
/// and two labels both are possible; the exporter that ranks also writes `head`.
pub(super) fn ranked(layout: Layout, evidence: &Evidence) -> bool {
    layout == Layout::Rtdetr
        && matches!(evidence.shape[1], None | Some(6))
        && (evidence.head || evidence.labels != Some(2))
}

/// Number of classes that a shape implies; `None` where the output does not say.
pub(super) fn classes(layout: Layout, ranked: bool, [a, b]: [Option<usize>; 2]) -> Option<usize> {
    match layout {
        Layout::Yolo8 => a.map(|a| a.saturating_sub(4)),
        Layout::Yolo5 | Layout::Yolox => b.map(|b| b.saturating_sub(5)),
        Layout::Rtdetr if !ranked => b.map(|b| b.saturating_sub(4)),
        Layout::End2end | Layout::Rtdetr => None,
    }
}

/// `yolo8, [1, 84, 8400]`
pub(super) fn describe(layout: Layout, dims: [Option<usize>; 2]) -> String {
    format!("{}, {}", layout.name(), shape(dims))
}

fn shape(dims: [Option<usize>; 2]) -> String {
    let size = |n: Option<usize>| n.map_or("?".to_owned(), |n| n.to_string());
    format!("[1, {}, {}]", size(dims[0]), size(dims[1]))
}

fn unknown(evidence: &Evidence) -> Refusal {
    let labels = evidence.labels.map_or("no labels".to_owned(), |n| format!("{n} labels"));
    Refusal::new(
        Code::UnknownLayout,
        format!(
            "output {} with an input of {}x{} and {labels} is no known layout: known are \
             [1, 4+classes, anchors] (yolo8), [1, anchors, 5+classes] (yolo5, yolox), [1, boxes, 6] \
             (end2end), [1, boxes, 4+classes] (rtdetr); say `layout` in the manifest if it is one",
            shape(evidence.shape),
            evidence.input.0,
            evidence.input.1,
        ),
    )
}

fn ambiguous(evidence: &Evidence, fits: &[Layout]) -> Refusal {
    let names: Vec<_> = fits.iter().map(|f| f.name()).collect();
    Refusal::new(
        Code::AmbiguousLayout,
        format!(
            "output {} can be read as {}: say which in the manifest (\"layout\": \"{}\")",
            shape(evidence.shape),
            names.join(" or as "),
            names[0]
        ),
    )
}
