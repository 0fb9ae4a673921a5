//! `noblink tune`: what `provider = "auto"` measures, as a table.

use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use anyhow::{Context, anyhow, bail};
use serde::Serialize;

use super::{Failure, Outcome, print_json};
use crate::affinity;
use crate::app::now_us;
use crate::assets;
use crate::config::{Config, Inference, Models};
use crate::model::contract::Overrides;
use crate::model::file::{Identity, ModelFile};
use crate::model::options::Setting;
use crate::model::runtime::{RuntimeError, installed, library_for};
use crate::update::digest::Digest;
use crate::update::gates::{self, Engine, Limits, Subject};
use crate::update::registry::Registry;
use crate::update::store::StoreError;
use crate::update::tune::{self, LASTS, Libraries, Order, State, Stopped, Table, Tuning};

/// Pictures that the settings must agree on.
const PICTURES: usize = 8;

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The ONNX file; without one models.factory of the configuration, else the demo's
    #[arg(long, value_name = "FILE")]
    model: Option<PathBuf>,
    /// The configuration: what is measured is kept in its state_dir, for the service's next start
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// How long it may take, in seconds: a busy box needs more
    #[arg(long, default_value_t = LASTS.as_secs() as u16, value_parser = clap::value_parser!(u16).range(5..=3600))]
    seconds: u16,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// What is printed.
#[derive(Debug, Serialize)]
struct Report {
    model: Identity,
    place: String,
    cores: Vec<usize>,
    #[serde(flatten)]
    table: Table,
    kept: bool,
    /// Why it is not kept.
    note: Option<String>,
}

pub(super) fn run(args: Args) -> Outcome {
    let config = args.config.as_deref().map(Config::load).transpose();
    let config = config.map_err(Failure::Config)?;
    let report = report(&args, config.as_ref())?;
    if args.json {
        return print_json(&report);
    }
    print(&report);
    Ok(())
}

fn report(args: &Args, config: Option<&Config>) -> anyhow::Result<Report> {
    let (inference, models) = match config {
        Some(config) => (config.inference.clone(), config.models.clone()),
        // The candidates are those of `auto`, whatever is configured.
        None => (Inference::default(), Models::default()),
    };
    let inference = Inference { provider: None, ..inference };
    let shipped = || assets::find("models/plates-v1.onnx");
    let file = args.model.clone().or(models.factory.clone()).map_or_else(shipped, Ok)?;
    let model = ModelFile::read(&file, &Overrides::default(), &models.custom_op_domains)
        .map_err(|refusal| anyhow!(refusal.message))?;
    let digest = Digest::of(&model.bytes);

    let place = libraries(&inference)?.place(inference.threads);
    let cores = cores(&inference);
    let wall = Duration::from_secs(args.seconds.into());
    let table = measured(&file, digest, &inference, &models, wall)?;
    let note = match config {
        Some(config) => keep(config, digest, &place, &table)?,
        None => Some("not kept: no configuration is named (--config)".to_owned()),
    };
    Ok(Report { model: model.identity, place, cores, table, kept: note.is_none(), note })
}

fn cores(inference: &Inference) -> Vec<usize> {
    inference.cores.clone().unwrap_or_else(|| affinity::choose(inference.threads))
}

/// Measures what this box has for a file.
pub(super) fn measured(
    file: &Path,
    digest: Digest,
    inference: &Inference,
    models: &Models,
    wall: Duration,
) -> anyhow::Result<Table> {
    let mut engine = Engine::of(inference, models);
    engine.setting = Setting::of(inference);
    engine.cores = Some(cores(inference));
    let order = Order {
        model: Subject { sha256: Some(digest), ..Subject::file(file) },
        engine,
        libraries: libraries(inference)?,
        pictures: pictures(models),
    };
    let limits = Limits { wall, ..Limits::of(models) };
    match tune::run(&order, &limits, &AtomicBool::new(false)) {
        Ok(table) => Ok(table),
        Err(Stopped::Failed(why)) => bail!("{}: {why}", file.display()),
        Err(Stopped::Canceled) => unreachable!("nobody cancels"),
    }
}

/// As the service has them, that which it loads first in front.
fn libraries(inference: &Inference) -> anyhow::Result<Libraries> {
    let named = inference.library.as_deref();
    let first = library_for(inference).or_else(|| installed(named).into_iter().next());
    match first.filter(|library| library.exists()) {
        Some(first) => Ok(Libraries::of(named, &first)),
        None => Err(RuntimeError::missing(named).into()),
    }
}

/// The site's pictures, else those of the demo's line where they are.
fn pictures(models: &Models) -> Vec<PathBuf> {
    let calibration = models.calibration.as_ref().map(|rules| rules.dir.clone());
    let dir = calibration.or_else(|| assets::find("models/calibration").ok());
    dir.map(|dir| gates::pictures(&dir, PICTURES)).unwrap_or_default()
}

/// Writes the result down; returns why not.
fn keep(
    config: &Config,
    model: Digest,
    place: &str,
    table: &Table,
) -> anyhow::Result<Option<String>> {
    let state_dir = &config.device.state_dir;
    std::fs::create_dir_all(state_dir)
        .with_context(|| format!("device.state_dir = \"{}\"", state_dir.display()))?;
    let mut registry = match Registry::open(state_dir) {
        Ok((registry, _)) => registry,
        Err(StoreError::InUse { .. }) => {
            let text =
                "not kept: the service runs, and measures by itself when nothing else goes on";
            return Ok(Some(text.to_owned()));
        }
        Err(e) => return Err(e.into()),
    };
    let (at, table) = (now_us() / 1000, table.clone());
    registry.put_tuning(&Tuning {
        model,
        place: place.into(),
        at,
        state: State::Measured,
        table,
    })?;
    Ok(None)
}

fn print(report: &Report) {
    let Report { model, place, table, .. } = report;
    say!("{} {} on {place}, cores {:?}\n", model.id, model.version, report.cores);
    say!(
        "{:<28}{:<14}{:>9}{:>9}{:>10}{:>8}",
        "setting",
        "ONNX Runtime",
        "ms",
        "CPU ms",
        "frames/s",
        "agrees"
    );
    for candidate in &table.candidates {
        let setting = candidate.pick.setting.to_string();
        let number = |value: Option<f64>, digits: usize| {
            value.map_or_else(|| "-".to_owned(), |value| format!("{value:.digits$}"))
        };
        let mut line = format!(
            "{setting:<28}{:<14}{:>9}{:>9}{:>10}{:>8}",
            candidate.runtime,
            number(candidate.wall_ms, 2),
            number(candidate.cpu_ms, 2),
            number(candidate.frames_per_s, 1),
            candidate.agreement.map_or("-".into(), |share| format!("{:.1} %", 100.0 * share)),
        );
        if let Some(out) = &candidate.out {
            line += &format!("  out: {out}");
        } else if candidate.pick == table.chosen {
            line += "  chosen";
        }
        say!("{line}");
    }
    say!("\nThe first one is the reference; the chosen one is {:.2} times as fast.", table.gain);
    match &report.note {
        Some(note) => say!("The result is {note}."),
        None => say!("The result is kept for the next start."),
    }
}
