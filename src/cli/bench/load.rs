//! `noblink bench load`: as many cameras as are asked for, over real RTSP, and the whole service:
//! frames a second, from arrival to event, who gets how much, what a frame costs. With `--update`
//! also what an update does to all that, from its command to the end of its job: its proving child is
//! made to stand still every other [`TURN`], and the frames of both are compared. What a shared machine
//! gives moves by more, within a job, than an update takes.

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context;
use serde::Serialize;

use super::cameras::{self, Cameras};
use super::service::{Seen, Service};
use super::{SETTLED, quantiles};
use crate::guest::Guest;
use crate::records::{Quantiles, rounded};
use crate::update::job::Ratio;
use crate::{assets, demo, host};

/// For how long the proving child goes on, and then stands still.
const TURN: Duration = Duration::from_secs(2);
/// Left out where one becomes the other: frames that belong to both.
const CHANGE: Duration = Duration::from_millis(250);

#[derive(Debug, clap::Args)]
pub(in crate::cli) struct Args {
    /// How many cameras
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=64))]
    cameras: u32,
    /// What they send, an H.264 mp4 file; a demo clip when left out
    #[arg(long, value_name = "FILE")]
    clip: Option<PathBuf>,
    /// Their frames a second
    #[arg(long, default_value_t = 15, value_parser = clap::value_parser!(u32).range(1..=120))]
    fps: u32,
    /// Their size
    #[arg(long, default_value = "1280x720", value_parser = size)]
    size: (u32, u32),
    /// The ONNX file; the demo's model when left out
    #[arg(long, value_name = "FILE")]
    model: Option<PathBuf>,
    /// Seconds to measure
    #[arg(long, default_value_t = 30, value_parser = clap::value_parser!(u32).range(5..=3600))]
    seconds: u32,
    /// Update to this model and back, twice at least, for as long again
    #[arg(long, value_name = "FILE", requires = "model")]
    update: Option<PathBuf>,
    /// Lines of TOML under `[inference]`
    #[arg(long, value_name = "TOML", default_value = SETTLED)]
    inference: String,
    /// Print JSON
    #[arg(long)]
    pub(super) json: bool,
}

fn size(text: &str) -> Result<(u32, u32), String> {
    let parsed = text.split_once('x').and_then(|(w, h)| Some((w.parse().ok()?, h.parse().ok()?)));
    parsed.filter(|(w, h)| *w >= 16 && *h >= 16).ok_or_else(|| "such as 1280x720".to_owned())
}

/// What was measured. The cameras are a process of their own and cost nothing here.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    model: String,
    cameras: u32,
    size: String,
    fps: u32,
    /// From the service's start (its broker among it) to the first result.
    first_result_ms: f64,
    steady: Phase,
    /// Jain's index of the cameras' results: 1 = all alike.
    fairness: f64,
    cpu_ms_per_decoded: f64,
    cpu_ms_per_inferred: f64,
    frames_unaccounted: u64,
    update: Option<Update>,
}

#[derive(Debug, Serialize)]
struct Phase {
    seconds: f64,
    frames_per_s: f64,
    /// Of the model alone.
    inference_ms: Quantiles,
    /// From a frame's arrival to its event.
    latency_ms: Quantiles,
}

#[derive(Debug, Serialize)]
struct Update {
    updates: u32,
    /// From the commands to the end of the jobs, but for what follows.
    during: Phase,
    /// While the proving child stood still.
    still: Phase,
    frames_per_s_ratio: f64,
    p99_ratio: f64,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { model, cameras, size, fps, .. } = self;
        writeln!(f, "{model}, {cameras} cameras of {size} at {fps} frames a second\n")?;
        writeln!(f, "first result after {:.0} ms\n", self.first_result_ms)?;
        let mut phases = vec![("steady", &self.steady)];
        if let Some(update) = &self.update {
            phases.extend([
                ("child stands still", &update.still),
                ("during updates", &update.during),
            ]);
        }
        writeln!(
            f,
            "{:<20}{:>9}{:>12}{:>12}{:>13}{:>9}{:>9}",
            "", "seconds", "frames/s", "model, ms", "latency p50", "p99", "max"
        )?;
        for (name, p) in phases {
            writeln!(
                f,
                "{name:<20}{:>9.1}{:>12.2}{:>12.2}{:>13.2}{:>9.2}{:>9.2}",
                p.seconds,
                p.frames_per_s,
                p.inference_ms.p50,
                p.latency_ms.p50,
                p.latency_ms.p99,
                p.latency_ms.max
            )?;
        }
        if let Some(u) = &self.update {
            writeln!(
                f,
                "\n{} updates: {:.3} of the frames, {:.2} times the p99 latency",
                u.updates, u.frames_per_s_ratio, u.p99_ratio
            )?;
        }
        writeln!(
            f,
            "\nCPU a frame {:.2} ms decoded, {:.2} ms inferred; fairness {:.4}",
            self.cpu_ms_per_decoded, self.cpu_ms_per_inferred, self.fairness
        )?;
        write!(f, "frames unaccounted for {}", self.frames_unaccounted)
    }
}

pub(super) fn run(args: &Args) -> anyhow::Result<Report> {
    gst::init().context("GStreamer can't be initialised")?;
    let clip = match &args.clip {
        Some(clip) => clip.clone(),
        None => assets::find("models/clips/line-a.mp4")?,
    };
    let made = std::env::temp_dir().join(format!("noblink-load-{}.mp4", std::process::id()));
    cameras::transcode(&clip, args.size, args.fps, &made)?;
    let cameras = Cameras::start(&vec![made.clone(); args.cameras as usize]);
    let _ = std::fs::remove_file(&made);
    let cameras = cameras?;
    let mut service = Service::start(&demo::Options {
        model: args.model.clone(),
        urls: cameras.urls.clone(),
        inference: args.inference.clone(),
        ..demo::Options::default()
    })?;
    let first = service.settle()?;
    let decoded = |service: &Service| -> u64 {
        service.demo.app.snapshot().cameras.iter().map(|c| c.lane.ledger.decoded).sum()
    };
    let (cpu_s, decoded_before, from) = (host::cpu_seconds(), decoded(&service), service.now());
    service.run_for(Duration::from_secs(args.seconds.into()));
    let (cpu_s, decoded) = (host::cpu_seconds() - cpu_s, decoded(&service) - decoded_before);
    let steady = Span { from, to: service.now() };
    let shares: Vec<_> =
        service.results.iter().map(|camera| steady.of(camera).count() as f64).collect();
    let inferred: f64 = shares.iter().sum();

    let (mut updates, mut turns) = (0, Turns::default());
    if let (Some(model), Some(update)) = (&args.model, &args.update) {
        let end = service.now() + Duration::from_secs(args.seconds.into());
        let slower = Ratio::of(1000.0);
        while service.now() < end || updates < 2 {
            let to = [update, model][updates % 2];
            turns.begin(service.now());
            service.install(&format!("update-{updates}"), to, slower, |service| {
                turns.step(service.now(), service.demo.app.guest());
            })?;
            turns.end(service.now());
            updates += 1;
            service.run_for(Duration::from_secs(1));
        }
    }
    let identity = service.demo.app.snapshot().live.map(|live| live.model.identity().clone());
    let identity = identity.context("no model runs")?;
    let (results, last) = service.stop();
    let update = (updates > 0)
        .then(|| {
            let (during, still) = (phase(&turns.going, &results)?, phase(&turns.stood, &results)?);
            anyhow::Ok(Update {
                updates: updates as u32,
                frames_per_s_ratio: rounded(during.frames_per_s / still.frames_per_s, 3),
                p99_ratio: rounded(during.latency_ms.p99 / still.latency_ms.p99, 3),
                during,
                still,
            })
        })
        .transpose()?;
    let squares: f64 = shares.iter().map(|n| n * n).sum();
    Ok(Report {
        model: format!("{} {}", identity.id, identity.version),
        cameras: args.cameras,
        size: format!("{}x{}", args.size.0, args.size.1),
        fps: args.fps,
        first_result_ms: rounded(first.as_secs_f64() * 1e3, 1),
        steady: phase(&[steady], &results)?,
        fairness: rounded(inferred * inferred / (shares.len() as f64 * squares), 4),
        cpu_ms_per_decoded: rounded(cpu_s * 1e3 / decoded as f64, 3),
        cpu_ms_per_inferred: rounded(cpu_s * 1e3 / inferred, 3),
        frames_unaccounted: last.cameras.iter().map(|c| c.lane.ledger.unaccounted()).sum(),
        update,
    })
}

/// A time of the run.
struct Span {
    from: Duration,
    to: Duration,
}

impl Span {
    fn of<'r>(&self, results: &'r [Seen]) -> impl Iterator<Item = &'r Seen> + use<'r> {
        let from = results.partition_point(|r| r.at < self.from);
        let to = results.partition_point(|r| r.at < self.to);
        results[from..to].iter()
    }
}

/// The time of jobs, by whether the proving child stood still.
#[derive(Default)]
struct Turns {
    still: bool,
    since: Duration,
    going: Vec<Span>,
    stood: Vec<Span>,
}

impl Turns {
    fn step(&mut self, now: Duration, guest: &Guest) {
        let turn = now.as_secs() / TURN.as_secs();
        let still = guest.hold(turn % 2 == 1);
        if still != self.still {
            self.end(now);
            self.begin(now);
            self.still = still;
        }
    }

    fn begin(&mut self, now: Duration) {
        (self.still, self.since) = (false, now);
    }

    fn end(&mut self, now: Duration) {
        let spans = if self.still { &mut self.stood } else { &mut self.going };
        let from = self.since + CHANGE;
        if from < now {
            spans.push(Span { from, to: now });
        }
    }
}

fn phase(spans: &[Span], results: &[Vec<Seen>]) -> anyhow::Result<Phase> {
    let seconds: f64 = spans.iter().map(|s| (s.to - s.from).as_secs_f64()).sum();
    let seen: Vec<_> =
        spans.iter().flat_map(|s| results.iter().flat_map(|camera| s.of(camera))).collect();
    let of = |ms: fn(&Seen) -> f32| quantiles(seen.iter().map(|r| ms(r).into()).collect());
    Ok(Phase {
        seconds: rounded(seconds, 1),
        frames_per_s: rounded(seen.len() as f64 / seconds, 2),
        inference_ms: of(|r| r.inference_ms)?,
        latency_ms: of(|r| r.total_ms)?,
    })
}
