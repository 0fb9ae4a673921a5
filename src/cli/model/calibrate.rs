//! `noblink model calibrate`: a calibration folder out of a camera's frames.

use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, anyhow, bail};

use super::super::probe::PATIENCE;
use super::Outcome;
use crate::assets;
use crate::camera::grab;
use crate::config::Config;
use crate::model::contract::Overrides;
use crate::model::engine::{Detection, EngineOptions, Model, Thresholds};
use crate::model::runtime::{Runtime, library_for};

#[derive(Debug, clap::Args)]
pub(in crate::cli) struct Args {
    /// Id of the camera in the configuration
    #[arg(long, value_name = "ID")]
    camera: String,
    /// Pictures to take
    #[arg(long, value_name = "N", default_value_t = 20,
          value_parser = clap::value_parser!(u16).range(1..=500))]
    count: u16,
    /// Seconds from one picture to the next
    #[arg(long, value_name = "SECONDS", default_value_t = 1.0)]
    every: f64,
    /// The configuration
    #[arg(long, value_name = "FILE", default_value = "/etc/noblink/noblink.toml")]
    config: PathBuf,
    /// The model whose findings become the labels; else models.factory of the configuration
    #[arg(long, value_name = "FILE")]
    active: Option<PathBuf>,
    /// The folder to make, or to add to
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
}

pub(super) fn run(args: Args) -> Outcome {
    let config = Config::load(&args.config).map_err(anyhow::Error::from)?;
    Ok(calibrate(&args, &config)?)
}

fn calibrate(args: &Args, config: &Config) -> anyhow::Result<()> {
    let camera = config.cameras.iter().find(|c| c.id == args.camera).ok_or_else(|| {
        let known: Vec<_> = config.cameras.iter().map(|c| c.id.as_str()).collect();
        anyhow!("no camera {:?} is configured; known are {}", args.camera, known.join(", "))
    })?;
    let every = Duration::try_from_secs_f64(args.every)
        .map_err(|_| anyhow!("--every {}: must be a number of seconds", args.every))?;
    let path = args.active.as_ref().or(config.models.factory.as_ref()).context(
        "no model makes the first labels: name one with --active FILE, or models.factory in the \
         configuration",
    )?;
    let runtime = Runtime::load(library_for(&config.inference).as_deref())?;
    let options = EngineOptions::of(&config.inference, &config.models);
    let model = Model::open(&runtime, path, &options, &Overrides::default())?;
    prepare(&args.out, &model.contract().labels)?;

    let templates = assets::templates(args.config.parent());
    let count = usize::from(args.count);
    let frames = grab::grab(camera, &templates, count, every, PATIENCE)
        .map_err(|e| anyhow!("{}: {e}", camera.source))?;
    let thresholds = Thresholds {
        confidence: camera.confidence.unwrap_or(config.inference.confidence),
        iou: config.inference.iou,
    };
    let began = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    let (mut found, mut objects) = (Vec::new(), 0);
    for (n, frame) in frames.iter().enumerate() {
        let mut runner = model.runner();
        frame.with_picture(|picture| runner.preprocess(picture))??;
        runner.run()?;
        runner.postprocess(&thresholds, &mut found)?;
        objects += found.len();
        let stem = format!("{}-{began}-{n:03}", camera.id);
        let jpeg = frame.jpeg().context("the picture can't be encoded as JPEG")?;
        let write = |relative: String, bytes: &[u8]| {
            let file = args.out.join(relative);
            std::fs::write(&file, bytes).with_context(|| format!("{}", file.display()))
        };
        write(format!("images/{stem}.jpg"), &jpeg)?;
        write(format!("labels/{stem}.txt"), lines(&found).as_bytes())?;
    }
    let (out, taken) = (args.out.display(), frames.len());
    say!("{out}: {taken} pictures with {objects} labels by {}", model.identity().id);
    if taken < count {
        say!("the source ended before {count} pictures were taken");
    }
    say!(
        "\nCorrect labels/ with a tool that knows YOLO's text format, then name the folder:\n\n\
         [models.calibration]\ndir = {:?}",
        std::path::absolute(&args.out).unwrap_or_else(|_| args.out.clone())
    );
    Ok(())
}

/// Makes the folders and `data.yaml`, whose classes are the model's.
fn prepare(out: &Path, labels: &[String]) -> anyhow::Result<()> {
    for part in ["images", "labels"] {
        let dir = out.join(part);
        std::fs::create_dir_all(&dir).with_context(|| format!("{}", dir.display()))?;
    }
    let mut text = String::from("path: .\ntrain: images\nval: images\nnames:\n");
    for (class, label) in labels.iter().enumerate() {
        let _ = writeln!(text, "  {class}: {}", serde_json::to_string(label)?);
    }
    let file = out.join("data.yaml");
    match std::fs::read_to_string(&file) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            std::fs::write(&file, text).with_context(|| format!("{}", file.display()))?;
        }
        Err(e) => return Err(e).with_context(|| format!("{}", file.display())),
        // Numbers of another list of names would make nonsense of the labels that are there.
        Ok(there) if there != text => bail!(
            "{} is there already and names other classes: choose another --out",
            file.display()
        ),
        Ok(_) => {}
    }
    Ok(())
}

fn lines(found: &[Detection]) -> String {
    let mut text = String::new();
    for d in found {
        let (x, y) = ((d.x1 + d.x2) / 2.0, (d.y1 + d.y2) / 2.0);
        let (w, h) = (d.x2 - d.x1, d.y2 - d.y1);
        let _ = writeln!(text, "{} {x:.6} {y:.6} {w:.6} {h:.6}", d.class_id);
    }
    text
}
