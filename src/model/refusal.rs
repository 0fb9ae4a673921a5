//! Why a model is not taken: a code for machines, a sentence for people.

use std::fmt;

/// What is wrong with a model. The names stand in job results and are documented: they stay.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Code {
    /// The file can't be read.
    Unreadable,
    /// Another kind of file, or a damaged one.
    NotOnnx,
    /// Weights lie in a second file.
    ExternalData,
    /// Compiled for one device (`EPContext`).
    CompiledBlob,
    /// Operators of a domain that is not allowed.
    CustomOperators,
    /// Segmentation, pose, …: not boxes.
    TaskUnsupported,
    /// More or fewer inputs than one picture.
    InputCount,
    /// Not `[1, 3, height, width]`.
    InputShape,
    /// Neither float nor float16.
    InputType,
    /// Free dimensions that nothing fixes.
    DynamicShape,
    /// Neither float nor float16.
    OutputType,
    /// No known layout has this shape.
    UnknownLayout,
    /// Two layouts have this shape.
    AmbiguousLayout,
    /// The layout that was asked for does not have this shape.
    LayoutMismatch,
    /// Nothing names the classes.
    LabelsMissing,
    /// The names can't be read.
    LabelsInvalid,
    /// As many names as classes it is not.
    LabelsCount,
    /// ONNX Runtime does not take it.
    Session,
    /// The first runs fail.
    Run,
}

impl Code {
    /// The word on the wire.
    pub fn name(self) -> &'static str {
        match self {
            Self::Unreadable => "unreadable",
            Self::NotOnnx => "not_onnx",
            Self::ExternalData => "external_data",
            Self::CompiledBlob => "compiled_blob",
            Self::CustomOperators => "custom_operators",
            Self::TaskUnsupported => "task_unsupported",
            Self::InputCount => "input_count",
            Self::InputShape => "input_shape",
            Self::InputType => "input_type",
            Self::DynamicShape => "dynamic_shape",
            Self::OutputType => "output_type",
            Self::UnknownLayout => "unknown_layout",
            Self::AmbiguousLayout => "ambiguous_layout",
            Self::LayoutMismatch => "layout_mismatch",
            Self::LabelsMissing => "labels_missing",
            Self::LabelsInvalid => "labels_invalid",
            Self::LabelsCount => "labels_count",
            Self::Session => "session",
            Self::Run => "run",
        }
    }
}

/// A model that is not taken, and why.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, thiserror::Error)]
pub struct Refusal {
    /// For machines.
    pub code: Code,
    /// For people: what was found and what to do about it.
    pub message: String,
}

impl Refusal {
    /// Makes one.
    pub fn new(code: Code, message: impl Into<String>) -> Self {
        Self { code, message: message.into() }
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}
