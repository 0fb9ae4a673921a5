//! A model's file before there is a session: read, digested, scanned, its contract derived.

use std::io::Read;
use std::path::Path;

use super::contract::{self, Contract, Overrides};
use super::foreign;
use super::onnx::{self, FILE_BYTES_MAX, Scan};
use super::refusal::{Code, Refusal};
use crate::update::digest::Digest;

/// Longest id, as a level of a topic.
const ID_CHARS_MAX: usize = 32;
/// Longest version.
const VERSION_CHARS_MAX: usize = 64;

/// Which model it is; stands in every event.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Identity {
    /// `[a-z0-9][a-z0-9_-]{0,31}`
    pub id: String,
    /// Anything printable.
    pub version: String,
    /// Of the whole file, lower-case hex.
    pub sha256: String,
}

/// A file that is a detector as far as can be told without running it.
#[derive(Debug)]
pub struct ModelFile {
    /// The file's bytes: what was digested is what the session is built of.
    pub bytes: Vec<u8>,
    /// What it says about itself.
    pub scan: Scan,
    /// How it is used.
    pub contract: Contract,
    /// Which model it is.
    pub identity: Identity,
}

impl ModelFile {
    /// Reads and checks a file. `domains` are operator domains allowed beyond the common ones.
    ///
    /// # Errors
    /// It can't be read, is not ONNX, or no detector that we know how to use. The message names
    /// the file.
    pub fn read(path: &Path, overrides: &Overrides, domains: &[String]) -> Result<Self, Refusal> {
        let unreadable = |e: std::io::Error| {
            Refusal::new(Code::Unreadable, format!("{}: can't be read: {e}", path.display()))
        };
        let file = std::fs::File::open(path).map_err(unreadable)?;
        let mut bytes = Vec::new();
        file.take(FILE_BYTES_MAX + 1).read_to_end(&mut bytes).map_err(unreadable)?;
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        Self::parse(bytes, &name, overrides, domains)
    }

    /// Checks bytes; `name` is the file name that they came with (`best.onnx`).
    ///
    /// # Errors
    /// As [`read`](Self::read).
    pub fn parse(
        bytes: Vec<u8>,
        name: &str,
        overrides: &Overrides,
        domains: &[String],
    ) -> Result<Self, Refusal> {
        let sha256 = sha256(&bytes);
        Self::parse_digested(bytes, sha256, name, overrides, domains)
    }

    /// [`parse`](Self::parse) for bytes whose SHA-256 is known, in lower-case hex.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    pub fn parse_digested(
        bytes: Vec<u8>,
        sha256: String,
        name: &str,
        overrides: &Overrides,
        domains: &[String],
    ) -> Result<Self, Refusal> {
        let scan = Self::look(&bytes, name, domains)?;
        Self::settle(bytes, sha256, scan, name, overrides)
    }

    /// The first half of [`parse`](Self::parse): is it an ONNX file that may be given to ONNX
    /// Runtime?
    ///
    /// # Errors
    /// It is another kind of file, a damaged one, or holds what is not allowed.
    pub fn look(bytes: &[u8], name: &str, domains: &[String]) -> Result<Scan, Refusal> {
        let named = |r: Refusal| Refusal::new(r.code, format!("{name}: {}", r.message));
        let scan = onnx::scan(bytes).map_err(|e| {
            let what = foreign::recognise(bytes, name).unwrap_or_else(|| e.to_string());
            named(Refusal::new(Code::NotOnnx, what))
        })?;
        contract::structure(&scan, domains).map_err(named)?;
        Ok(scan)
    }

    /// The second half: is it a detector that we know how to use? `sha256` and `scan` are of `bytes`.
    ///
    /// # Errors
    /// It is not.
    pub fn settle(
        bytes: Vec<u8>,
        sha256: String,
        scan: Scan,
        name: &str,
        overrides: &Overrides,
    ) -> Result<Self, Refusal> {
        let named = |r: Refusal| Refusal::new(r.code, format!("{name}: {}", r.message));
        let contract = Contract::derive(&scan, overrides).map_err(named)?;
        let identity = identity(&scan, overrides, name, sha256);
        Ok(Self { bytes, scan, contract, identity })
    }
}

impl Identity {
    /// What a file is called when nothing but itself says so, be it a detector or not.
    pub fn guess(bytes: &[u8], name: &str) -> Self {
        let scan = onnx::scan(bytes).unwrap_or_default();
        identity(&scan, &Overrides::default(), name, sha256(bytes))
    }
}

fn sha256(bytes: &[u8]) -> String {
    Digest::of(bytes).to_string()
}

/// Manifest, then metadata, then file name and digest.
fn identity(scan: &Scan, overrides: &Overrides, name: &str, sha256: String) -> Identity {
    let stem = name.rsplit_once('.').map_or(name, |(stem, _)| stem);
    let id = overrides.model.as_deref().or(scan.metadata("noblink.model")).unwrap_or(stem);
    let version = overrides.version.as_deref().or(scan.metadata("noblink.version"));
    let version = version.map_or_else(
        || sha256[..8].to_owned(),
        |v| v.chars().filter(|c| !c.is_control()).take(VERSION_CHARS_MAX).collect(),
    );
    Identity { id: slug(id), version, sha256 }
}

/// Lower case, everything else a `-`, none of them in front.
fn slug(name: &str) -> String {
    let slug: String = name
        .chars()
        .map(|c| c.to_ascii_lowercase())
        .map(|c| if c.is_ascii_alphanumeric() || c == '_' { c } else { '-' })
        .skip_while(|c| !c.is_ascii_alphanumeric())
        .take(ID_CHARS_MAX)
        .collect();
    if slug.is_empty() { "model".into() } else { slug }
}
