//! What a model promises: how its input is made and its output read.
//!
//! Derived from what the file says (`onnx`), with the overrides of a manifest. Where a shape fits
//! two layouts, the number of anchors that the input's size and the strides imply decides, then the
//! metadata, then the manifest; what is still open is refused with both names, never guessed.

use crate::text::{brief, first};
use crate::vision::letterbox::Fit;
use crate::vision::preprocess::{Order, Scale};

use super::labels;
use super::layout::{self, Evidence, Layout};
use super::onnx::{Dim, Scan, Value};
use super::refusal::{Code, Refusal};

/// Input sides in pixels that make sense.
const SIDE: std::ops::RangeInclusive<u64> = 32..=8192;
/// Operator domains that every build of ONNX Runtime brings along.
const DOMAINS: [&str; 4] = ["com.microsoft", "com.microsoft.nchwc", "ai.onnx.ml", "ai.onnx"];

/// Element type of a tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Dtype {
    /// 32-bit float.
    F32,
    /// 16-bit float.
    F16,
}

/// What a manifest may say about a model instead of its file.
#[derive(Debug, Clone, Default, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Overrides {
    /// Id of the model.
    pub model: Option<String>,
    /// Version of the model.
    pub version: Option<String>,
    /// Layout of the output.
    pub layout: Option<Layout>,
    /// About the input.
    #[serde(default)]
    pub input: InputOverrides,
    /// Names of the classes.
    pub labels: Option<Vec<String>>,
}

/// `input` of a manifest.
#[derive(Debug, Clone, Default, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct InputOverrides {
    /// Order of the colour planes.
    pub order: Option<Order>,
    /// Range of the values.
    pub scale: Option<Scale>,
    /// How a picture is brought into shape.
    pub fit: Option<Fit>,
}

/// The model's one input, `[1, 3, height, width]`.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct Input {
    /// As the session knows it.
    pub name: String,
    /// Pixels.
    pub width: usize,
    /// Pixels.
    pub height: usize,
    /// Type of its elements.
    pub dtype: Dtype,
    /// Order of the colour planes.
    pub order: Order,
    /// Range of the values.
    pub scale: Scale,
    /// How a picture is brought into shape.
    pub fit: Fit,
}

/// The one output that is read, `[1, rows, columns]`.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct Output {
    /// As the session knows it.
    pub name: String,
    /// Type of its elements.
    pub dtype: Dtype,
    /// Second and third dimension; `None` = known at the first run.
    pub shape: [Option<usize>; 2],
}

/// How a model is used.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct Contract {
    /// How the output is read.
    pub layout: Layout,
    /// RT-DETR only: score and class stand in the output instead of a score per class.
    pub ranked: bool,
    /// The input.
    pub input: Input,
    /// The output.
    pub output: Output,
    /// Names of the classes, by number.
    pub labels: Vec<String>,
    /// Greatest stride, when the file says it.
    pub stride: Option<u32>,
    /// Free dimensions by name and the sizes that they get.
    pub fixed: Vec<(String, usize)>,
}

/// Refuses what must not reach ONNX Runtime, whatever the contract: files that need other files,
/// blobs for one device, operators of unknown domains. `allowed` are further domains.
pub fn structure(scan: &Scan, allowed: &[String]) -> Result<(), Refusal> {
    if let Some(tensor) = &scan.external_data {
        return Err(Refusal::new(
            Code::ExternalData,
            format!(
                "tensor {tensor:?} has its data in another file; a model is one file here: \
                 save it whole with onnx.save(model, path, save_as_external_data=False)"
            ),
        ));
    }
    if scan.ep_context {
        return Err(Refusal::new(
            Code::CompiledBlob,
            "holds a part compiled for one device (EPContext): use the ONNX file that it was \
             compiled from",
        ));
    }
    let foreign = |d: &&String| !DOMAINS.contains(&d.as_str()) && !allowed.contains(d);
    if let Some(domain) = scan.op_domains.iter().find(foreign) {
        return Err(Refusal::new(
            Code::CustomOperators,
            format!(
                "uses operators of the domain {:?}, which is not allowed: export without \
                 custom operators, or add it to models.custom_op_domains",
                brief(domain, 60)
            ),
        ));
    }
    Ok(())
}

impl Contract {
    /// Derives the contract.
    ///
    /// # Errors
    /// The model is no detector that we know how to use; the refusal says what was found.
    pub fn derive(scan: &Scan, overrides: &Overrides) -> Result<Self, Refusal> {
        if let Some(task) = scan.metadata("task").filter(|t| *t != "detect") {
            return Err(task_unsupported(task));
        }
        let (value, [batch, height, width]) = picture_input(scan)?;
        let mut fixed = Vec::new();
        let mut fix = |dim: &Dim, size: u64| match dim {
            Dim::Named(name) if !fixed.iter().any(|(n, _)| n == name) => {
                fixed.push((name.clone(), size as usize));
            }
            _ => {}
        };
        let (height, width) = sides(scan, value, [height, width])?;
        fix(batch, 1);
        let dims = value.dims.as_deref().unwrap_or_default();
        fix(&dims[2], height);
        fix(&dims[3], width);

        let labels = read_labels(scan, overrides)?;
        let output = detection_output(scan)?;
        let shape = output_shape(output);
        let evidence = Evidence {
            shape,
            input: (width as usize, height as usize),
            labels: labels.as_ref().map(Vec::len),
            stride: scan.metadata("stride").and_then(|s| s.trim().parse().ok()),
            end2end: end2end(scan),
            rtdetr: rtdetr(scan),
            head: scan.metadata("head").is_some(),
            task: scan.metadata("task").is_some(),
        };
        let layout = match overrides.layout {
            Some(layout) => layout::check(layout, &evidence)?,
            None => layout::recognise(&evidence)?,
        };
        let labels = match labels {
            Some(labels) if !labels.is_empty() => labels,
            _ => return Err(labels_missing(layout, shape)),
        };
        let ranked = layout::ranked(layout, &evidence);
        if let Some(classes) = layout::classes(layout, ranked, shape)
            && classes != labels.len()
        {
            return Err(Refusal::new(
                Code::LabelsCount,
                format!(
                    "output {:?} has {classes} classes ({}), but the model names {}: \
                     correct `names` in its metadata, or `labels` in its manifest",
                    brief(&output.name, 60),
                    layout::describe(layout, shape),
                    labels.len()
                ),
            ));
        }
        let (order, scale, fit) = layout.input();
        Ok(Self {
            layout,
            ranked,
            input: Input {
                name: value.name.clone(),
                width: width as usize,
                height: height as usize,
                dtype: dtype(value, Code::InputType, "input")?,
                order: overrides.input.order.unwrap_or(order),
                scale: overrides.input.scale.unwrap_or(scale),
                fit: overrides.input.fit.unwrap_or(fit),
            },
            output: Output {
                name: output.name.clone(),
                dtype: dtype(output, Code::OutputType, "output")?,
                shape,
            },
            labels,
            stride: evidence.stride,
            fixed,
        })
    }

    /// Compares the output of a run, `[1, found[0], found[1]]`, with what was derived: a shape that
    /// the file left open is known only then.
    pub(super) fn check_run(&self, found: [usize; 2]) -> Result<(), String> {
        let differs = |n: usize| self.output.shape[n].is_some_and(|told| told != found[n]);
        let shape = found.map(Some);
        let classes = layout::classes(self.layout, self.ranked, shape);
        let labels = self.labels.len();
        let input = (self.input.width, self.input.height);
        let readable = layout::readable(self.layout, self.ranked, shape, input);
        if differs(0) || differs(1) || !readable || classes.is_some_and(|n| n != labels) {
            return Err(format!(
                "its output is {}, which does not fit {labels} labels and what the file says",
                layout::describe(self.layout, shape)
            ));
        }
        Ok(())
    }
}

fn task_unsupported(task: &str) -> Refusal {
    let what = match task {
        "segment" => "a segmentation model".to_owned(),
        "pose" => "a pose model".to_owned(),
        "obb" => "a model of oriented boxes (OBB)".to_owned(),
        "classify" => "a classification model".to_owned(),
        other => format!("a model for the task {:?}", brief(other, 60)),
    };
    Refusal::new(
        Code::TaskUnsupported,
        format!(
            "is {what}; only detection models are supported: export one trained with task=detect"
        ),
    )
}

/// The input and its batch, height and width.
fn picture_input(scan: &Scan) -> Result<(&Value, [&Dim; 3]), Refusal> {
    let [value] = scan.inputs.as_slice() else {
        let names: Vec<_> = scan.inputs.iter().map(describe).collect();
        return Err(Refusal::new(
            Code::InputCount,
            format!(
                "has {} inputs ({}); a detector takes one picture: export it without \
                 further inputs",
                names.len(),
                first(&names, 4)
            ),
        ));
    };
    dtype(value, Code::InputType, "input")?;
    let wrong = |why: &str| {
        Err(Refusal::new(
            Code::InputShape,
            format!("input {} {why}: export it as [1, 3, height, width]", describe(value)),
        ))
    };
    match value.dims.as_deref() {
        Some([batch, Dim::Fixed(3), height, width]) => match batch {
            Dim::Fixed(n) if *n != 1 => wrong("takes several pictures at once"),
            _ => Ok((value, [batch, height, width])),
        },
        Some([_, _, _, Dim::Fixed(3)]) => wrong("has its channels last"),
        Some([_, Dim::Fixed(n), _, _]) => wrong(&format!("has {n} channels, not 3")),
        Some([_, _, _, _]) => wrong("leaves the number of channels open"),
        _ => wrong("is no picture"),
    }
}

/// Height and width, from the shape or, where that leaves them open, from the metadata.
fn sides(scan: &Scan, value: &Value, dims: [&Dim; 2]) -> Result<(u64, u64), Refusal> {
    let told = scan.metadata("imgsz").and_then(|text| {
        let sides: Vec<u64> = text
            .trim_matches(|c: char| "[]() ".contains(c))
            .split(',')
            .map(|n| n.trim().parse())
            .collect::<Result<_, _>>()
            .ok()?;
        match sides[..] {
            [side] => Some([side, side]),
            [height, width] => Some([height, width]),
            _ => None,
        }
    });
    let side = |n: usize| match dims[n] {
        Dim::Fixed(size) => Some(*size),
        _ => told.map(|t| t[n]),
    };
    let (Some(height), Some(width)) = (side(0), side(1)) else {
        return Err(Refusal::new(
            Code::DynamicShape,
            format!(
                "input {} leaves its size open and no `imgsz` in the metadata says it: \
                 export with a fixed size (`yolo export … dynamic=False imgsz=640`)",
                describe(value)
            ),
        ));
    };
    let same_name = matches!((dims[0], dims[1]), (Dim::Named(a), Dim::Named(b)) if a == b);
    if same_name && height != width {
        return Err(Refusal::new(
            Code::DynamicShape,
            format!(
                "input {} calls height and width by one name, but `imgsz` says {height} and \
                 {width}: export with a fixed size",
                describe(value)
            ),
        ));
    }
    if !SIDE.contains(&height) || !SIDE.contains(&width) {
        return Err(Refusal::new(
            Code::InputShape,
            format!(
                "input {:?} is {width}x{height} pixels; sides from {} to {} are supported",
                brief(&value.name, 60),
                SIDE.start(),
                SIDE.end()
            ),
        ));
    }
    Ok((height, width))
}

fn read_labels(scan: &Scan, overrides: &Overrides) -> Result<Option<Vec<String>>, Refusal> {
    if let Some(labels) = &overrides.labels {
        return Ok(Some(labels.clone()));
    }
    let Some(names) = scan.metadata("names") else { return Ok(None) };
    labels::parse(names).map(Some).map_err(|why| {
        Refusal::new(
            Code::LabelsInvalid,
            format!(
                "`names` in its metadata {why}: write {{0: 'person', …}} there, or `labels` in \
                 its manifest"
            ),
        )
    })
}

/// The output that holds the boxes; others are left alone.
fn detection_output(scan: &Scan) -> Result<&Value, Refusal> {
    let rank = |n: usize| {
        scan.outputs.iter().filter(move |v| v.dims.as_ref().is_some_and(|d| d.len() == n))
    };
    let prototypes = rank(4).any(|v| matches!(v.dims.as_deref(), Some([_, Dim::Fixed(32), ..])));
    if prototypes && rank(3).count() > 0 {
        return Err(task_unsupported("segment"));
    }
    let boxes: Vec<_> = rank(3).collect();
    if let [output] = boxes[..] {
        return Ok(output);
    }
    if boxes.is_empty() && scan.outputs.len() == 1 && rank(2).count() == 1 {
        return Err(task_unsupported("classify"));
    }
    let found: Vec<_> = scan.outputs.iter().map(describe).collect();
    Err(Refusal::new(
        Code::UnknownLayout,
        format!(
            "has the outputs {}; known are one [1, 4+classes, anchors] (YOLOv8 and later), \
             [1, anchors, 5+classes] (YOLOv5, YOLOX), [1, boxes, 6] (end-to-end) or \
             [1, boxes, 4+classes] (RT-DETR)",
            first(&found, 4)
        ),
    ))
}

fn output_shape(output: &Value) -> [Option<usize>; 2] {
    let size = |n: usize| match output.dims.as_deref().unwrap_or_default()[n] {
        Dim::Fixed(size) => usize::try_from(size).ok(),
        _ => None,
    };
    [size(1), size(2)]
}

fn labels_missing(layout: Layout, shape: [Option<usize>; 2]) -> Refusal {
    Refusal::new(
        Code::LabelsMissing,
        format!(
            "names no classes ({}): write `names` into its metadata as the exporters of \
             Ultralytics do, or `labels` into its manifest",
            layout::describe(layout, shape)
        ),
    )
}

fn dtype(value: &Value, code: Code, what: &str) -> Result<Dtype, Refusal> {
    match value.data_type {
        1 => Ok(Dtype::F32),
        10 => Ok(Dtype::F16),
        other => Err(Refusal::new(
            code,
            format!(
                "{what} {} is of type {}; float and float16 are supported: quantised models keep \
                 float at both ends (QDQ)",
                describe(value),
                type_name(other)
            ),
        )),
    }
}

fn type_name(data_type: i32) -> String {
    const NAMES: [&str; 14] = [
        "none", "float", "uint8", "int8", "uint16", "int16", "int32", "int64", "string", "bool",
        "float16", "double", "uint32", "uint64",
    ];
    let known = usize::try_from(data_type).ok().and_then(|n| NAMES.get(n));
    known.map_or_else(|| format!("number {data_type}"), |n| (*n).to_owned())
}

/// `"images" [1, 3, height, width]`
fn describe(value: &Value) -> String {
    let dims = value.dims.as_ref().map_or("of unknown shape".to_owned(), |dims| {
        let dims: Vec<_> = dims
            .iter()
            .map(|d| match d {
                Dim::Fixed(n) => n.to_string(),
                Dim::Named(n) => brief(n, 30),
                Dim::Unknown => "?".to_owned(),
            })
            .collect();
        format!("[{}]", dims.join(", "))
    });
    format!("{:?} {dims}", brief(&value.name, 60))
}

/// What the metadata says about boxes that need no suppression; Ultralytics writes the key since
/// v10's head, `nms` among its arguments when suppression is in the graph.
fn end2end(scan: &Scan) -> Option<bool> {
    let args = scan.metadata("args").unwrap_or_default();
    let nms = args.contains("'nms': True") || args.contains("\"nms\": true");
    let told = scan.metadata("end2end").map(|v| v.eq_ignore_ascii_case("true"));
    if nms { Some(true) } else { told }
}

/// What the metadata says about RT-DETR.
fn rtdetr(scan: &Scan) -> bool {
    scan.metadata("head") == Some("RTDETRDecoder")
        || scan.metadata("description").is_some_and(|d| d.to_lowercase().contains("rtdetr"))
}
