//! How a session is built: what may differ from box to box ([`Setting`]), and the rest.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::refusal::Refusal;
use crate::config::{Inference, Models, Provider};

/// What the fastest way to run a model is looked for among.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Setting {
    /// Execution provider.
    pub provider: Provider,
    /// Threads of one run, the caller's own among them; at least 1.
    pub threads: usize,
    /// Whether idle threads of the pool wait actively for long: faster to wake, but a core is taken.
    #[serde(default)]
    pub spinning: bool,
    /// Whether it computes with 16-bit floats (bfloat16) inside: OpenVINO only, on processors that
    /// multiply them.
    #[serde(default)]
    pub bf16: bool,
}

impl Default for Setting {
    fn default() -> Self {
        Self { provider: Provider::Cpu, threads: 2, spinning: false, bf16: false }
    }
}

impl fmt::Display for Setting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let s = if self.threads == 1 { "" } else { "s" };
        write!(f, "{}, {} thread{s}", self.provider.name(), self.threads)?;
        let spinning = if self.spinning { ", spinning" } else { "" };
        let bf16 = if self.bf16 { ", bf16" } else { "" };
        write!(f, "{spinning}{bf16}")
    }
}

impl Setting {
    /// As `[inference]` says; with `auto` the reference, which every library has.
    pub fn of(inference: &Inference) -> Self {
        let provider = inference.provider.unwrap_or(Provider::Cpu);
        Self { provider, threads: inference.threads, ..Self::default() }
    }
}

/// How sessions are built.
#[derive(Debug, Clone)]
pub struct EngineOptions {
    /// By what, with how many threads.
    pub setting: Setting,
    /// A run before the model counts as open: the first takes some 4 % longer, those after it don't.
    /// Without it one is made all the same where only a run tells what the first frame needs.
    pub warm_up: bool,
    /// Operator domains allowed beyond the common ones.
    pub custom_op_domains: Vec<String>,
}

impl Default for EngineOptions {
    fn default() -> Self {
        Self { setting: Setting::default(), warm_up: true, custom_op_domains: Vec::new() }
    }
}

impl EngineOptions {
    /// As `[inference]` and `[models]` say.
    pub fn of(inference: &Inference, models: &Models) -> Self {
        Self {
            setting: Setting::of(inference),
            custom_op_domains: models.custom_op_domains.clone(),
            ..Self::default()
        }
    }
}

/// Why a model did not open.
#[derive(Debug, Clone, thiserror::Error)]
pub enum OpenError {
    /// The model's fault.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// The machine's: the provider is not in the library, or its hardware is missing.
    #[error("provider {} can't be used with {library}: {reason}", .provider.name())]
    Provider {
        /// The one asked for.
        provider: Provider,
        /// ONNX Runtime's library.
        library: String,
        /// ONNX Runtime's words.
        reason: String,
    },
}
