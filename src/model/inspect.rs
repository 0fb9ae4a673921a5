//! What a model file is, in words: `noblink model inspect`.

use std::fmt;
use std::path::Path;

use serde::Serialize;

use super::contract::{Contract, Overrides};
use super::file::{Identity, ModelFile};
use super::refusal::Refusal;

/// A file that was looked at, without running it.
#[derive(Debug, Serialize)]
pub struct Inspection {
    file: String,
    #[serde(flatten)]
    verdict: Verdict,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "snake_case")]
enum Verdict {
    Detector(Box<Detector>),
    Refused(Refusal),
}

#[derive(Debug, Serialize)]
struct Detector {
    #[serde(flatten)]
    identity: Identity,
    size_bytes: usize,
    #[serde(flatten)]
    contract: Contract,
}

impl Inspection {
    /// Looks at a file.
    pub fn of(path: &Path, overrides: &Overrides) -> Self {
        let verdict = match ModelFile::read(path, overrides, &[]) {
            Ok(file) => Verdict::Detector(Box::new(Detector {
                identity: file.identity,
                size_bytes: file.bytes.len(),
                contract: file.contract,
            })),
            Err(refusal) => Verdict::Refused(refusal),
        };
        Self { file: path.display().to_string(), verdict }
    }

    /// Whether it is a detector that noblink can run.
    pub fn runnable(&self) -> bool {
        matches!(self.verdict, Verdict::Detector(_))
    }
}

impl fmt::Display for Inspection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let detector = match &self.verdict {
            Verdict::Refused(refusal) => {
                return write!(f, "refused: {}", refusal.message);
            }
            Verdict::Detector(detector) => detector,
        };
        let Detector { identity, size_bytes, contract } = &**detector;
        let input = &contract.input;
        let dtype = format!("{:?}", input.dtype).to_lowercase();
        writeln!(f, "{}: noblink can run it", self.file)?;
        writeln!(f, "  model   {} version {}", identity.id, identity.version)?;
        writeln!(f, "  sha256  {}", identity.sha256)?;
        writeln!(f, "  size    {:.2} MB", *size_bytes as f64 / 1e6)?;
        writeln!(f, "  input   {} {}x{}, {dtype}", input.name, input.width, input.height)?;
        writeln!(f, "  layout  {}", contract.layout.name())?;
        write!(f, "  labels  {}: {}", contract.labels.len(), contract.labels.join(", "))
    }
}
