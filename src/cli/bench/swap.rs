//! `noblink bench swap`: the demo's two cameras, and the model replaced over and over: full updates
//! with the proving child, then rollbacks back and forth. What a swap does to the results is held
//! against what goes on anyway, in sham windows of the same run.

use std::fmt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow, bail, ensure};
use crossbeam_channel::bounded;
use serde::Serialize;
use serde_json::Value;

use crate::demo::{self, Demo};
use crate::host::Host;
use crate::meter::Outcome;
use crate::records::rounded;
use crate::update::job::{Install, JobState, Ratio, Way};
use crate::update::orders::Order;
use crate::update::updater::Ask;

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
/// Longest time for one job.
const PATIENCE: Duration = Duration::from_secs(120);

/// What was measured. A window is [`MARGIN`] before and after a moment: a swap, or one without.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    swaps: usize,
    full_updates: u32,
    /// From the command of a full update to the first result by the new model.
    update_ms: Spread,
    frames: usize,
    /// Frames of which there is no result: dropped by an overloaded box, or lost.
    frames_missing: u64,
    frames_doubled: u64,
    /// Frames that ended neither inferred nor dropped for a reason.
    frames_unaccounted: u64,
    epochs_back: u64,
    /// The model's own time, of all runs.
    inference_ms: Spread,
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
    gap_ms: Spread,
    /// Longest gap between two results of any cameras.
    pause_ms: Spread,
    /// Frames of a camera without a result, mean.
    missing: f64,
}

#[derive(Debug, Serialize)]
struct Spread {
    p50: f64,
    p99: f64,
    max: f64,
}

impl Spread {
    fn of(mut ms: Vec<f64>) -> anyhow::Result<Self> {
        ensure!(!ms.is_empty(), "no window holds two results: do the cameras stream?");
        ms.sort_by(f64::total_cmp);
        let at = |q: f64| rounded(ms[((ms.len() - 1) as f64 * q).round() as usize], 2);
        Ok(Self { p50: at(0.5), p99: at(0.99), max: at(1.0) })
    }
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
        let mut row = |name: &str, s: &Spread| {
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
            "\nRSS {:.1} MB at a tenth of the swaps, {:.1} MB at the end",
            self.rss_mb_early, self.rss_mb_end
        )
    }
}

/// Everything that the worker said, and the service that it came from.
struct Bench {
    demo: Demo,
    slower: Option<Ratio>,
    results: Vec<Vec<Outcome>>,
    /// How long each full update took, milliseconds.
    updates: Vec<f64>,
    ticked: Instant,
}

pub(super) fn run(args: &Args) -> anyhow::Result<Report> {
    let models: [PathBuf; 2] = match args.models.as_slice() {
        [] => [shipped(1)?, shipped(2)?],
        [first, second] => [first.clone(), second.clone()],
        other => bail!("--model is given {} times: name two models, or none", other.len()),
    };
    let slower = match args.accept_slower {
        Some(r) => Some(Ratio::of(r).with_context(|| format!("--accept-slower {r}: 1 to 1000"))?),
        None => None,
    };
    let factory = args.models.first().cloned();
    let demo = demo::start(&demo::Options {
        probation_s: 0,
        story: false,
        model: factory,
        clips: args.clips.clone(),
    })?;
    let cameras = demo.app.snapshot().cameras.len();
    let (results, updates) = (vec![Vec::new(); cameras], Vec::new());
    let mut bench = Bench { demo, slower, results, updates, ticked: Instant::now() };
    bench.run_for(Duration::from_secs(8));
    // The burst with which a camera starts is not what is measured.
    bench.results.iter_mut().for_each(|r| drop(r.drain(..r.len().saturating_sub(1))));
    for update in 0..args.updates {
        let model = &models[if update % 2 == 0 { 1 } else { 0 }];
        bench.install(&format!("update-{update}"), model)?;
        bench.run_for(SPACING);
    }
    let mut early = Host::read(0.0, 1.0).rss_mb;
    for swap in 0..args.swaps {
        bench.roll_back(&format!("swap-{swap}"))?;
        bench.run_for(SPACING);
        if swap == args.swaps / 10 {
            early = Host::read(0.0, 1.0).rss_mb;
        }
    }
    let end = Host::read(0.0, 1.0).rss_mb;
    let results = std::mem::take(&mut bench.results);
    let last = bench.demo.stop();
    let unaccounted = last.cameras.iter().map(|c| c.lane.ledger.unaccounted()).sum();
    report(bench.updates, &results, unaccounted, (early, end))
}

fn shipped(version: u32) -> anyhow::Result<PathBuf> {
    crate::assets::find(&format!("models/plates-v{version}.onnx")).map_err(|e| anyhow!(e))
}

impl Bench {
    /// Keeps the service's clockwork going, and what the worker says.
    fn step(&mut self) {
        std::thread::sleep(Duration::from_millis(20));
        if self.ticked.elapsed() >= Duration::from_secs(1) {
            self.demo.app.tick();
            self.ticked = Instant::now();
        }
        let since = self.results.iter().filter_map(|r| r.last()).map(|r| r.at).min();
        let since = since.unwrap_or_else(|| self.ticked - Duration::from_secs(1));
        for (known, new) in self.results.iter_mut().zip(self.demo.app.meter().results(since)) {
            let last = known.last().map(|r| r.at);
            known.extend(new.into_iter().filter(|r| last.is_none_or(|last| r.at > last)));
        }
    }

    fn run_for(&mut self, time: Duration) {
        let end = Instant::now() + time;
        while Instant::now() < end {
            self.step();
        }
    }

    fn ask(&self, order: Order) -> anyhow::Result<Value> {
        let (reply, answer) = bounded(1);
        let desk = self.demo.app.desk().context("ONNX Runtime is missing")?;
        desk.ask(Ask {
            order,
            way: Way::Cli,
            from: "bench".into(),
            reply: Box::new(move |value| drop(reply.send(value))),
        });
        let answer = answer.recv_timeout(PATIENCE).context("no answer")?;
        ensure!(answer["ok"] == true, "refused: {answer}");
        Ok(answer)
    }

    /// Until the job is over and every camera has a result by the new epoch.
    fn until_done(&mut self, id: &str, epoch: u64) -> anyhow::Result<()> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            self.step();
            let desk = self.demo.app.desk().context("ONNX Runtime is missing")?;
            let job = desk.view().jobs.into_iter().find(|j| j.id == id);
            let over = job.as_ref().is_some_and(|j| j.state.is_terminal());
            let seen = |r: &Vec<Outcome>| r.last().is_some_and(|r| r.epoch > epoch);
            if over && self.results.iter().all(seen) {
                return Ok(());
            }
            if let Some(job) = job.filter(|j| over && j.state != JobState::Succeeded) {
                return Err(anyhow!("job {id} ended {:?}: {:?}", job.state, job.reason));
            }
            ensure!(Instant::now() < deadline, "job {id} does not end");
        }
    }

    fn epoch(&self) -> u64 {
        self.results.iter().filter_map(|r| r.last()).map(|r| r.epoch).max().unwrap_or(0)
    }

    fn install(&mut self, id: &str, model: &Path) -> anyhow::Result<()> {
        let bytes = std::fs::read(model).with_context(|| model.display().to_string())?;
        let desk = self.demo.app.desk().context("ONNX Runtime is missing")?;
        let mut part = desk.store().stage(bytes.len() as u64, bytes.len() as u64)?;
        part.write(&bytes)?;
        let blob = part.finish(None)?;
        let (epoch, commanded) = (self.epoch(), Instant::now());
        self.ask(Order::Stored {
            id: id.into(),
            name: model.file_name().unwrap_or_default().to_string_lossy().into_owned(),
            blob,
            install: Install::Auto,
            manifest: Some(br#"{"allow_removed_labels":true}"#.to_vec()),
            signature: None,
            accept_slower: self.slower,
        })?;
        self.until_done(id, epoch)?;
        let new = |r: &&Outcome| r.epoch > epoch;
        let first = self.results.iter().filter_map(|c| c.iter().find(new)).map(|r| r.at).min();
        self.updates.extend(first.map(|at| (at - commanded).as_secs_f64() * 1e3));
        Ok(())
    }

    fn roll_back(&mut self, id: &str) -> anyhow::Result<()> {
        let epoch = self.epoch();
        self.ask(Order::Rollback { id: id.into(), to: None })?;
        self.until_done(id, epoch)
    }
}

fn report(
    updates: Vec<f64>,
    results: &[Vec<Outcome>],
    unaccounted: u64,
    (early, end): (f64, f64),
) -> anyhow::Result<Report> {
    let (mut missing, mut doubled, mut back) = (0, 0, 0);
    let (mut swap, mut sham) = (Looks::default(), Looks::default());
    let mut all: Vec<Instant> = results.iter().flatten().map(|r| r.at).collect();
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
                let jitter = Duration::from_millis(u64::from(b.at.elapsed().subsec_nanos() % 300));
                sham.look(camera, &all, b.at + MARGIN * 3 - jitter);
            }
        }
    }
    let inference = results.iter().flatten().map(|r| r.inference.as_secs_f64() * 1e3);
    let changes = swap.gaps.len() / results.len();
    let (swap, sham) = (swap.sum_up()?, sham.sum_up()?);
    Ok(Report {
        swaps: changes,
        full_updates: updates.len() as u32,
        update_ms: Spread::of(updates)?,
        frames: results.iter().map(Vec::len).sum(),
        frames_missing: missing,
        frames_doubled: doubled,
        frames_unaccounted: unaccounted,
        epochs_back: back,
        inference_ms: Spread::of(inference.collect())?,
        p99_ratio: rounded(swap.gap_ms.p99 / sham.gap_ms.p99, 3),
        swap,
        sham,
        rss_mb_early: early,
        rss_mb_end: end,
    })
}

fn missing_between(a: &Outcome, b: &Outcome) -> u64 {
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
    fn look(&mut self, camera: &[Outcome], all: &[Instant], at: Instant) {
        let inside = |t: Instant| t + MARGIN >= at && t <= at + MARGIN;
        let ms = |a: Instant, b: Instant| (b - a).as_secs_f64() * 1e3;
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
        Ok(Windows { gap_ms: Spread::of(self.gaps)?, pause_ms: Spread::of(self.pauses)?, missing })
    }
}
