//! A model on the child's bench: runs a picture, and says what was wrong with it.

use super::super::job::Reason;
use super::agreement::Labelled;
use super::examine;
use super::frame::FrameDump;
use super::wire::Who;
use crate::model::engine::{Detection, Model, RunError, Thresholds};
use crate::vision::decode::DecodeError;

/// A model and what is needed to run it.
pub(super) struct Bench {
    pub(super) model: Model,
    pub(super) who: Who,
    pub(super) found: Vec<Detection>,
}

impl Bench {
    /// Runs a frame; what was found is in `found`.
    pub(super) fn detect(
        &mut self,
        frame: &FrameDump,
        thresholds: Thresholds,
    ) -> Result<(), Reason> {
        let mut runner = self.model.runner();
        let failed = |e: RunError| failure(frame.name(), &e);
        runner.preprocess(&frame.picture()).map_err(failed)?;
        runner.run().map_err(failed)?;
        runner.postprocess(&thresholds, &mut self.found).map_err(failed)
    }

    /// The same, with a look at the raw output before boxes are made of it.
    pub(super) fn look(
        &mut self,
        frame: &FrameDump,
        thresholds: Thresholds,
        watch: &mut examine::Watch,
    ) -> Result<(), Reason> {
        let mut runner = self.model.runner();
        let failed = |e: RunError| failure(frame.name(), &e);
        runner.preprocess(&frame.picture()).map_err(failed)?;
        runner.run().map_err(failed)?;
        watch.look(frame.name(), runner.raw().map_err(failed)?)?;
        runner.postprocess(&thresholds, &mut self.found).map_err(failed)
    }

    pub(super) fn labelled(&self) -> Vec<Labelled> {
        let labels = &self.model.contract().labels;
        let label = |d: &Detection| labels.get(d.class_id as usize).cloned().unwrap_or_default();
        let found = self.found.iter();
        found.map(|d| Labelled { label: label(d), corners: [d.x1, d.y1, d.x2, d.y2] }).collect()
    }
}

fn failure(frame: &str, error: &RunError) -> Reason {
    let code = match error {
        RunError::Output(DecodeError::NotFinite) => "nan_output",
        RunError::Output(_) => "bad_output",
        RunError::Picture(_) => "picture",
        RunError::Session(_) | RunError::Terminated => "run",
    };
    out_of_memory(Reason::new(code, format!("{frame}: {error}")))
}

/// ONNX Runtime says in words only that memory was not to be had.
pub(super) fn out_of_memory(mut reason: Reason) -> Reason {
    let said = reason.message.to_lowercase();
    if ["bad_alloc", "failed to allocate", "out of memory"].iter().any(|words| said.contains(words))
    {
        reason.code = "memory_budget".into();
    }
    reason
}
