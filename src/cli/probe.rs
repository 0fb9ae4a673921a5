//! `noblink probe URL`: what a camera sends, and the block of configuration that fits it.

use std::fmt::Write;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, anyhow};

use super::{Failure, Outcome, print_json};
use crate::assets;
use crate::camera::Reason;
use crate::camera::probe::{self, ProbeReport};
use crate::camera::source::{Source, mask};

/// With taking the pipeline down it makes 10 s.
pub(super) const PATIENCE: Duration = Duration::from_secs(8);

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// rtsp://, rtsps://, file://, v4l2:// or test://
    url: String,
    /// The template in pipelines/; by the URL's kind when left out
    #[arg(long, value_name = "NAME")]
    pipeline: Option<String>,
    /// Where to write one picture
    #[arg(long, value_name = "FILE", default_value = "probe.jpg")]
    picture: PathBuf,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: Args) -> Outcome {
    let source = Source::parse(&args.url).map_err(|e| anyhow!("{} {e}", mask(&args.url)))?;
    gst::init().context("GStreamer can't be initialised")?;
    let pipeline = args.pipeline.as_deref().unwrap_or_else(|| source.default_pipeline());
    let report = match probe::probe(&source, pipeline, &assets::templates(None), PATIENCE) {
        Ok(report) => report,
        Err(e) if args.json => {
            print_json(
                &serde_json::json!({ "source": source.to_string(), "error": e.to_string() }),
            )?;
            return Err(Failure::Said);
        }
        Err(e @ Reason::Tls(_)) => {
            return Err(anyhow!("{source}: {e} (here: --pipeline rtsp-selfsigned)").into());
        }
        Err(e) => return Err(anyhow!("{source}: {e}").into()),
    };
    let picture = match &report.jpeg {
        Some(jpeg) => {
            let context = || format!("the picture can't be written to {}", args.picture.display());
            std::fs::write(&args.picture, jpeg).with_context(context)?;
            args.picture.display().to_string()
        }
        None => "none: GStreamer's jpegenc is not installed".into(),
    };
    if args.json {
        return print_json(&report);
    }
    say!("{source}\n");
    for (name, value) in facts(&report).into_iter().chain([("picture", picture)]) {
        say!("  {name:<15}{value}");
    }
    say!("\n{}", report.config);
    Ok(())
}

/// What was found, in a line.
pub(super) fn summary(report: &ProbeReport) -> String {
    let mut line =
        format!("{} {}x{}", report.codec.as_deref().unwrap_or("raw"), report.width, report.height);
    if let Some(fps) = report.fps_measured {
        let _ = write!(line, " at {fps} fps");
    }
    line
}

fn facts(report: &ProbeReport) -> Vec<(&'static str, String)> {
    let fps = |fps: Option<f64>| fps.map_or("not known".into(), |fps| format!("{fps}/s"));
    let mut facts = vec![
        ("codec", report.codec.clone().unwrap_or_else(|| "raw".into())),
        ("size", format!("{}x{}, as {}", report.width, report.height, report.format)),
        ("rate", format!("{} (declared: {})", fps(report.fps_measured), fps(report.fps_declared))),
        ("first frame", format!("after {} ms", report.first_frame_ms)),
        (
            "frames",
            match report.corrupt {
                0 => report.frames.to_string(),
                n => format!("{}, and {n} damaged or before the first key frame", report.frames),
            },
        ),
    ];
    if let Some(transport) = report.transport {
        facts.push(("transport", format!("{transport:?}").to_uppercase()));
        let clock = match report.clock_offset_ms {
            Some(ms) => format!("yes; its clock is {ms} ms off ours, delay included"),
            None => "none seen: capture times are those of arrival".into(),
        };
        facts.push(("sender reports", clock));
    }
    if let Some(ms) = report.decode_ms {
        facts.push(("decoding", format!("{ms} ms of a core per frame")));
    }
    facts
}
