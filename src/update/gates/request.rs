//! What the child is asked, as JSON on its standard input.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::super::digest::Digest;
use crate::config::{Calibration, Inference, Models};
use crate::model::contract::Overrides;
use crate::model::options::Setting;
use crate::model::runtime::library_for;

/// A model's file.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Subject {
    /// Where it lies.
    pub file: PathBuf,
    /// The name that messages use for it (`best.onnx`): a blob's is its digest.
    pub name: String,
    /// What must be in it; what is proven is what will be loaded.
    pub sha256: Option<Digest>,
    /// What its manifest says instead of the file.
    #[serde(default)]
    pub overrides: Overrides,
}

impl Subject {
    /// A file under its own name, without a manifest.
    pub fn file(file: &std::path::Path) -> Self {
        let name = file.file_name().unwrap_or_default().to_string_lossy().into_owned();
        // The child works elsewhere.
        let file = std::path::absolute(file).unwrap_or_else(|_| file.to_owned());
        Self { file, name, sha256: None, overrides: Overrides::default() }
    }
}

/// How the service runs models: proven is what will run.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Engine {
    /// By what, with how many threads.
    pub setting: Setting,
    /// ONNX Runtime's library; the child's environment is empty, so it must be told.
    pub library: Option<PathBuf>,
    /// Operator domains allowed beyond the common ones.
    pub custom_op_domains: Vec<String>,
    /// Cores to stay on; `None` = as the parent.
    pub cores: Option<Vec<usize>>,
    /// A score must exceed it.
    pub confidence: f32,
    /// Overlap from which the weaker of two boxes of a class goes.
    pub iou: f32,
}

impl Engine {
    /// As `[inference]` and `[models]` say.
    pub fn of(inference: &Inference, models: &Models) -> Self {
        Self {
            setting: Setting::of(inference),
            library: library_for(inference),
            custom_op_domains: models.custom_op_domains.clone(),
            cores: inference.cores.clone(),
            confidence: inference.confidence,
            iou: inference.iou,
        }
    }
}

/// What the latency gate allows.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Latency {
    /// `models.latency_ratio_max`
    pub ratio_max: f64,
    /// `models.latency_budget_ms`
    pub budget_ms: Option<f64>,
    /// Allowed for this model by the manifest or the operator (`--accept-slower`).
    pub accept_slower: Option<f64>,
    /// Cameras that share the model; at least 1.
    pub cameras: usize,
}

/// One model to prove, and against what.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Request {
    /// The model to prove.
    pub candidate: Subject,
    /// What runs now.
    pub active: Option<Subject>,
    /// How models run here.
    pub engine: Engine,
    /// The site's pictures.
    pub calibration: Option<Calibration>,
    /// What the latency gate allows.
    pub latency: Latency,
}

impl Request {
    /// A request as the configuration has it.
    pub fn of(
        inference: &Inference,
        models: &Models,
        cameras: usize,
        candidate: Subject,
        active: Option<Subject>,
    ) -> Self {
        Self {
            candidate,
            active,
            engine: Engine::of(inference, models),
            calibration: models.calibration.clone(),
            latency: Latency {
                ratio_max: models.latency_ratio_max,
                budget_ms: models.latency_budget_ms,
                accept_slower: None,
                cameras: cameras.max(1),
            },
        }
    }
}
