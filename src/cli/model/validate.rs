//! `noblink model validate`: the verdict of an update without one, and without a running service.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use anyhow::{Context, anyhow};
use serde::Serialize;

use super::{Failure, Outcome, print_json};
use crate::config::{Calibration, Config, Inference, Models};
use crate::model::contract::Overrides;
use crate::model::file::{Identity, ModelFile};
use crate::update::digest::Digest;
use crate::update::gates::{self, End, Limits, Request, Rules, Subject, proving};
use crate::update::job::{Gate, Reason, Verdict};

/// Where the packages put it.
const CONFIG: &str = "/etc/noblink/noblink.toml";

#[derive(Debug, clap::Args)]
pub(in crate::cli) struct Args {
    /// The ONNX file
    file: PathBuf,
    /// The configuration; /etc/noblink/noblink.toml if there is one, else the defaults
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// A folder with images/, labels/ and data.yaml instead of the configured one
    #[arg(long, value_name = "DIR")]
    calibration: Option<PathBuf>,
    /// The model to compare with; else models.factory of the configuration
    #[arg(long, value_name = "FILE")]
    active: Option<PathBuf>,
    /// Accept a model that is slower by this factor
    #[arg(long, value_name = "RATIO")]
    accept_slower: Option<f64>,
    /// Accept a model that lacks labels of the active one
    #[arg(long)]
    allow_removed_labels: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// What is printed.
#[derive(Debug, Serialize)]
struct Judged {
    file: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    model: Option<Identity>,
    accepted: bool,
    reason: Option<Reason>,
    ask: Option<Reason>,
    gates: Vec<Gate>,
    phases_ms: BTreeMap<String, f64>,
    memory_peak_bytes: u64,
}

pub(super) fn run(args: Args) -> Outcome {
    let (inference, mut models, cameras) = settings(args.config.as_deref())?;
    if let Some(dir) = &args.calibration {
        let dir = std::path::absolute(dir).map_err(anyhow::Error::from)?;
        models.calibration = Some(match models.calibration.take() {
            Some(rules) => Calibration { dir, ..rules },
            None => Calibration::of(dir),
        });
    }
    let judged = judge(&args, &inference, &models, cameras)?;
    if args.json {
        print_json(&judged)?;
    } else {
        print(&judged);
    }
    if judged.accepted { Ok(()) } else { Err(Failure::Said) }
}

/// `[inference]`, `[models]`, and how many cameras there are.
fn settings(named: Option<&Path>) -> anyhow::Result<(Inference, Models, usize)> {
    let usual = Path::new(CONFIG);
    let Some(file) = named.or_else(|| usual.exists().then_some(usual)) else {
        return Ok((Inference::default(), Models::default(), 1));
    };
    let config = Config::load(file)?;
    Ok((config.inference, config.models, config.cameras.len()))
}

fn judge(
    args: &Args,
    inference: &Inference,
    models: &Models,
    cameras: usize,
) -> anyhow::Result<Judged> {
    let domains = &models.custom_op_domains;
    let active = args.active.as_ref().or(models.factory.as_ref());
    let known = active.map(|file| ModelFile::read(file, &Overrides::default(), domains));
    let known = known.transpose().map_err(|e| anyhow!("the model to compare with: {e}"))?;
    let subject = Subject::file(&args.file);
    let shown = args.file.display().to_string();
    let unreadable = || format!("{shown} can't be read");
    let size = std::fs::metadata(&args.file).with_context(unreadable)?.len();
    let mut judged = Judged {
        file: shown.clone(),
        model: None,
        accepted: false,
        reason: None,
        ask: None,
        gates: Vec::new(),
        phases_ms: BTreeMap::new(),
        memory_peak_bytes: 0,
    };
    if size > models.max_size {
        let most = models.max_size / 1_000_000;
        let text = format!("the model has {size} bytes: models.max_size_mb allows {most} MB");
        judged.reason = Some(Reason::new("too_large", text));
        return Ok(judged);
    }
    let bytes = std::fs::read(&args.file).with_context(unreadable)?;
    let rules = Rules {
        overrides: &Overrides::default(),
        domains,
        active: known.as_ref().map(|known| &known.contract.labels[..]),
        allow_removed_labels: args.allow_removed_labels,
    };
    let digest = Digest::of(&bytes);
    let content = gates::content(bytes, &digest, &subject.name, &rules);
    judged.gates = content.gates;
    let file = match content.file {
        Ok(file) => file,
        Err(reason) => {
            judged.reason = Some(reason);
            return Ok(judged);
        }
    };
    let candidate = Subject { sha256: Some(digest), ..subject };
    judged.model = Some(file.identity);
    let active = active.map(|file| Subject::file(file));
    let mut request = Request::of(inference, models, cameras, candidate, active);
    request.latency.accept_slower = args.accept_slower;
    let outcome = proving::run(&request, None, &Limits::of(models), &AtomicBool::new(false));
    judged.gates.extend(outcome.gates);
    judged.phases_ms = outcome.phases_ms;
    judged.memory_peak_bytes = outcome.memory_peak_bytes;
    match outcome.end {
        End::Accepted { ask } => (judged.accepted, judged.ask) = (true, ask),
        End::Refused { reason, .. } => judged.reason = Some(reason),
        End::Canceled => {}
    }
    Ok(judged)
}

fn print(judged: &Judged) {
    let (file, model) = (&judged.file, &judged.model);
    let model = model.as_ref().map_or(String::new(), |m| format!(" ({} {})", m.id, m.version));
    match &judged.reason {
        None => say!("{file}{model}: accepted\n"),
        // A gate says the sentence; what came before the gates has none.
        Some(reason) if judged.gates.is_empty() => say!("{file}: rejected, {reason}"),
        Some(reason) => say!("{file}{model}: rejected, {}\n", reason.code),
    }
    for gate in &judged.gates {
        let verdict = match gate.verdict {
            Verdict::Passed => "passed",
            Verdict::Failed => "FAILED",
            Verdict::Skipped => "skipped",
            Verdict::Ask => "ASKS",
        };
        say!("  {verdict:<8} {:<12} {}", gate.gate, gate.message);
    }
    if let Some(total) = judged.phases_ms.get("total") {
        let phases: Vec<_> = judged
            .phases_ms
            .iter()
            .filter(|(name, _)| *name != "total")
            .map(|(name, ms)| format!("{name} {ms:.0} ms"))
            .collect();
        let mb = judged.memory_peak_bytes as f64 / 1e6;
        say!("\n  proven in {total:.0} ms ({}), {mb:.0} MB at most", phases.join(", "));
    }
    if let Some(ask) = &judged.ask {
        say!("  as an update it would wait for a person's word: {}", ask.message);
    }
}
