//! `noblink bench swap`: the demo's two cameras, and the model replaced over and over: full updates
//! with the proving child, then rollbacks back and forth. What a swap does to the results is held
//! against what goes on anyway, in sham windows of the same run.

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, bail};
use serde::Serialize;

use super::cameras::Cameras;
use super::service::{Seen, Service};
use super::{SETTLED, quantiles};
use crate::host::Host;
use crate::records::{Quantiles, rounded};
use crate::update::job::Ratio;
use crate::{assets, demo};

#[derive(Debug, clap::Args)]
pub(in crate::cli) struct Args {
    /// Swaps by rollback jobs
    #[arg(long, default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    swaps: u32,
    /// Full updates with the proving child before them
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..=1000))]
    updates: u32,
    /// Two models to go back and forth between, instead of plates 1 and 2
    #[arg(long = "model", value_name = "FILE", num_args = 1)]
    models: Vec<PathBuf>,
    /// H.264 mp4 files, a camera each, instead of the demo's two
    #[arg(long = "clip", value_name = "FILE", num_args = 1)]
    clips: Vec<PathBuf>,
    /// Allow a candidate that is slower by this factor
    #[arg(long, value_name = "RATIO")]
    accept_slower: Option<f64>,
    /// Print JSON
    #[arg(long)]
    pub(super) json: bool,
}

/// Half a window: results are looked at that long before and after the change.
const MARGIN: Duration = Duration::from_millis(500);
/// From the first result after a swap to the next swap: its window, a sham window, some room.
const SPACING: Duration = Duration::from_millis(2300);

/// What was measured. A window is [`MARGIN`] before and after a moment: a swap, or one without.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    swaps: usize,
    full_updates: u32,
    /// From the command of a full update to the first result by the new model.
    update_ms: Quantiles,
    frames: usize,
    /// Frames of which there is no result: dropped by an overloaded box, or lost.
    frames_missing: u64,
    frames_doubled: u64,
    /// Frames that ended neither inferred nor dropped for a reason.
    frames_unaccounted: u64,
    epochs_back: u64,
    /// The model's own time, of all runs.
    inference_ms: Quantiles,
    swap: Windows,
    sham: Windows,
    p99_ratio: f64,
    rss_mb_early: f64,
    rss_mb_end: f64,
}

/// What the windows of one kind saw.
#[derive(Debug, Serialize)]
struct Windows {
    /// Longest gap between two results of a camera.
    gap_ms: Quantiles,
    /// Longest gap between two results of any cameras.
    pause_ms: Quantiles,
    /// Frames of a camera without a result, mean.
    missing: f64,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { swaps, full_updates, frames, .. } = self;
        writeln!(f, "{swaps} swaps, {full_updates} of them full updates; {frames} frames")?;
        writeln!(
            f,
            "frames without a result {}, unaccounted for {}, doubled {}; epochs that went back {}\n",
            self.frames_missing, self.frames_unaccounted, self.frames_doubled, self.epochs_back
        )?;
        let mut row = |name: &str, s: &Quantiles| {
            writeln!(f, "{name:<46}{:>9.2}{:>9.2}{:>9.2}", s.p50, s.p99, s.max)
        };
        let (swap, sham) = (&self.swap, &self.sham);
        row("a model's run, ms", &self.inference_ms)?;
        row("full update, command to first result, ms", &self.update_ms)?;
        row("a camera's longest gap around a swap, ms", &swap.gap_ms)?;
        row("  without one", &sham.gap_ms)?;
        row("longest pause of all around a swap, ms", &swap.pause_ms)?;
        row("  without one", &sham.pause_ms)?;
        writeln!(f, "{:<46}{:>18.3}", "p99 of a camera's gap, ratio", self.p99_ratio)?;
        writeln!(f, "{:<46}{:>18.3}", "frames missing a camera and swap", swap.missing)?;
        writeln!(f, "{:<46}{:>18.3}", "  without one", sham.missing)?;
        write!(
            f,
            "\nRSS {:.1} MB in the second tenth of the swaps, {:.1} MB in the last",
            self.rss_mb_early, self.rss_mb_end
        )
    }
}

pub(super) fn run(args: &Args) -> anyhow::Result<Report> {
    let models: [PathBuf; 2] = match args.models.as_slice() {
        [] => [assets::find("models/plates-v1.onnx")?, assets::find("models/plates-v2.onnx")?],
        [first, second] => [first.clone(), second.clone()],
        other => bail!("--model is given {} times: name two models, or none", other.len()),
    };
    let slower = match args.accept_slower {
        Some(r) => Some(Ratio::of(r).with_context(|| format!("--accept-slower {r}: 1 to 1000"))?),
        None => None,
    };
    let cameras = Cameras::of(&args.clips)?;
    let mut bench = Service::start(&demo::Options {
        model: args.models.first().cloned(),
        urls: cameras.urls.clone(),
        inference: SETTLED.into(),
        ..demo::Options::default()
    })?;
    bench.settle()?;
    let mut updates = Vec::new();
    for update in 0..args.updates {
        let model = &models[if update % 2 == 0 { 1 } else { 0 }];
        updates.extend(bench.install(&format!("update-{update}"), model, slower, |_| {})?);
        bench.run_for(SPACING);
    }
    let mut rss_mb = Vec::new();
    for swap in 0..args.swaps {
        bench.roll_back(&format!("swap-{swap}"))?;
        bench.run_for(SPACING);
        rss_mb.push(Host::read(0.0, 1.0).rss_mb);
    }
    // It goes up and down with the session that was just dropped: the median over a tenth of the swaps,
    // the second and the last.
    let (swaps, tenth) = (rss_mb.len(), rss_mb.len().div_ceil(10));
    let early = quantiles(rss_mb[tenth.min(swaps - 1)..(2 * tenth).min(swaps)].to_vec())?.p50;
    let end = quantiles(rss_mb[swaps - tenth..].to_vec())?.p50;
    let (results, last) = bench.stop();
    let unaccounted = last.cameras.iter().map(|c| c.lane.ledger.unaccounted()).sum();
    report(updates, &results, unaccounted, (early, end))
}

fn report(
    updates: Vec<f64>,
    results: &[Vec<Seen>],
    unaccounted: u64,
    (early, end): (f64, f64),
) -> anyhow::Result<Report> {
    let (mut missing, mut doubled, mut back) = (0, 0, 0);
    let (mut swap, mut sham) = (Looks::default(), Looks::default());
    let mut all: Vec<Duration> = results.iter().flatten().map(|r| r.at).collect();
    all.sort_unstable();
    for camera in results {
        for pair in camera.windows(2) {
            let (a, b) = (pair[0], pair[1]);
            missing += missing_between(&a, &b);
            doubled += u64::from(b.frame <= a.frame);
            back += u64::from(b.epoch < a.epoch);
            if b.epoch > a.epoch {
                swap.look(camera, &all, b.at);
                // Between this window's end and the next swap, at a moment that nobody chose.
                let jitter = Duration::from_millis(u64::from(b.at.subsec_nanos() % 300));
                sham.look(camera, &all, b.at + MARGIN * 3 - jitter);
            }
        }
    }
    let inference = results.iter().flatten().map(|r| f64::from(r.inference_ms));
    let changes = swap.gaps.len() / results.len();
    let (swap, sham) = (swap.sum_up()?, sham.sum_up()?);
    Ok(Report {
        swaps: changes,
        full_updates: updates.len() as u32,
        update_ms: quantiles(updates)?,
        frames: results.iter().map(Vec::len).sum(),
        frames_missing: missing,
        frames_doubled: doubled,
        frames_unaccounted: unaccounted,
        epochs_back: back,
        inference_ms: quantiles(inference.collect())?,
        p99_ratio: rounded(swap.gap_ms.p99 / sham.gap_ms.p99, 3),
        swap,
        sham,
        rss_mb_early: early,
        rss_mb_end: end,
    })
}

fn missing_between(a: &Seen, b: &Seen) -> u64 {
    b.frame.saturating_sub(a.frame + 1)
}

/// The windows of one kind, as they are looked at.
#[derive(Default)]
struct Looks {
    gaps: Vec<f64>,
    pauses: Vec<f64>,
    missing: u64,
}

impl Looks {
    /// Pairs of results whose second lies within [`MARGIN`] of `at`; `all` = of all cameras.
    fn look(&mut self, camera: &[Seen], all: &[Duration], at: Duration) {
        let inside = |t: Duration| t + MARGIN >= at && t <= at + MARGIN;
        let ms = |a: Duration, b: Duration| b.saturating_sub(a).as_secs_f64() * 1e3;
        let pairs: Vec<_> = camera.windows(2).filter(|pair| inside(pair[1].at)).collect();
        let gaps = pairs.iter().map(|pair| ms(pair[0].at, pair[1].at));
        self.gaps.extend(gaps.max_by(f64::total_cmp));
        self.missing += pairs.iter().map(|pair| missing_between(&pair[0], &pair[1])).sum::<u64>();
        let from = all.partition_point(|t| *t + MARGIN < at).saturating_sub(1);
        let pauses = all[from..].windows(2).take_while(|pair| pair[1] <= at + MARGIN);
        self.pauses.extend(pauses.map(|pair| ms(pair[0], pair[1])).max_by(f64::total_cmp));
    }

    fn sum_up(self) -> anyhow::Result<Windows> {
        let missing = rounded(self.missing as f64 / self.gaps.len().max(1) as f64, 3);
        Ok(Windows { gap_ms: quantiles(self.gaps)?, pause_ms: quantiles(self.pauses)?, missing })
    }
}
