//! `noblink model keygen` and `noblink model sign`: minisign keys, and the manifest that is signed.

use std::fs::OpenOptions;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, anyhow};
use serde_json::json;

use super::Outcome;
use crate::model::file::Identity;
use crate::update::digest::Digest;
use crate::update::manifest::Manifest;
use crate::update::signature::{self, is_encrypted};

#[derive(Debug, clap::Args)]
pub(in crate::cli) struct KeygenArgs {
    /// Where the secret key goes; the public one beside it, as FILE.pub
    #[arg(default_value = "noblink.key")]
    file: PathBuf,
    /// File that holds a password for the secret key; without one it is stored in the clear
    #[arg(long, value_name = "FILE")]
    password_file: Option<PathBuf>,
}

#[derive(Debug, clap::Args)]
pub(in crate::cli) struct SignArgs {
    /// The ONNX file; best.manifest.json and best.manifest.json.minisig come beside best.onnx
    model: PathBuf,
    /// The secret key, of `noblink model keygen` or of the minisign tool
    #[arg(long, value_name = "FILE", default_value = "noblink.key")]
    key: PathBuf,
    /// File that holds its password
    #[arg(long, value_name = "FILE")]
    password_file: Option<PathBuf>,
    /// Must be above every one that the devices have seen
    #[arg(long)]
    sequence: u64,
    /// Days for which it may be installed
    #[arg(long, default_value_t = 30, value_parser = clap::value_parser!(u32).range(1..=3650))]
    days: u32,
    /// production, test, …
    #[arg(long, default_value = "production")]
    stage: String,
    /// Devices that may install it; `*` at the end stands for anything
    #[arg(long, value_delimiter = ',', default_value = "*")]
    devices: Vec<String>,
}

/// A file's text without its line end.
fn password(file: Option<&Path>) -> anyhow::Result<Option<String>> {
    let Some(file) = file else { return Ok(None) };
    let text = std::fs::read_to_string(file)
        .with_context(|| format!("the password file {} can't be read", file.display()))?;
    Ok(Some(text.trim_end_matches(['\r', '\n']).to_owned()))
}

fn beside(file: &Path, end: &str) -> PathBuf {
    let mut name = file.as_os_str().to_owned();
    name.push(end);
    name.into()
}

pub(super) fn keygen(args: &KeygenArgs) -> Outcome {
    let password = password(args.password_file.as_deref())?;
    let (public, secret) = signature::generate(password.as_deref()).map_err(anyhow::Error::from)?;
    // Never over a key that is there: what it signed could not be signed again.
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&args.file)
        .with_context(|| format!("{} can't be made", args.file.display()))?;
    file.write_all(secret.as_bytes()).context("the secret key can't be written")?;
    let public_file = beside(&args.file, ".pub");
    std::fs::write(&public_file, public.to_file())
        .with_context(|| format!("{} can't be written", public_file.display()))?;
    say!(
        "{}: the secret key; keep it off the devices\n{}: the public key\n\nFor the devices:\n\n\
         [models]\npublic_keys = [\"{}\"]",
        args.file.display(),
        public_file.display(),
        public.to_base64()
    );
    Ok(())
}

pub(super) fn sign(args: &SignArgs) -> Outcome {
    let shown = args.model.display();
    let bytes = std::fs::read(&args.model).with_context(|| format!("{shown} can't be read"))?;
    let secret = std::fs::read_to_string(&args.key)
        .with_context(|| format!("the key {} can't be read", args.key.display()))?;
    let password = password(args.password_file.as_deref())?;
    if is_encrypted(&secret).map_err(anyhow::Error::from)? && password.is_none() {
        let text = format!("{} wants a password: --password-file", args.key.display());
        return Err(anyhow!(text).into());
    }
    let name = args.model.file_name().unwrap_or_default().to_string_lossy();
    let Identity { id, version, .. } = Identity::guess(&bytes, &name);
    let hours = i64::from(args.days) * 24;
    let expires = jiff::Timestamp::now()
        .checked_add(jiff::SignedDuration::from_hours(hours))
        .map_err(anyhow::Error::from)?
        .strftime("%Y-%m-%dT%H:%M:%SZ")
        .to_string();
    let manifest = json!({
        "model": id, "version": version, "sha256": Digest::of(&bytes), "size": bytes.len(),
        "sequence": args.sequence, "expires": expires, "stage": args.stage,
        "devices": args.devices,
    });
    let manifest = format!("{manifest:#}\n");
    Manifest::parse(manifest.as_bytes()).map_err(anyhow::Error::from)?;
    let comment = format!("{id} {version} sequence {}", args.sequence);
    let signed = signature::sign(&secret, password.as_deref(), manifest.as_bytes(), &comment)
        .map_err(anyhow::Error::from)?;
    let manifest_file = args.model.with_extension("manifest.json");
    let signature_file = beside(&manifest_file, ".minisig");
    for (file, text) in [(&manifest_file, manifest), (&signature_file, signed)] {
        std::fs::write(file, text)
            .with_context(|| format!("{} can't be written", file.display()))?;
        say!("{}", file.display());
    }
    Ok(())
}
