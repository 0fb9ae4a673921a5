//! `noblink bench swap`: the demo's two cameras, and the model replaced over and over: full updates
//! with the proving child, then rollbacks back and forth. What a swap does to the results is held
//! against what goes on anyway, in sham windows of the same run.

use std::fmt;
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow, ensure};
use crossbeam_channel::bounded;
use serde::Serialize;
use serde_json::Value;

use crate::demo::{self, Demo};
use crate::host::Host;
use crate::meter::Outcome;
use crate::records::rounded;
use crate::update::job::{Install, JobState, Way};
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

/// What was measured.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    swaps: usize,
    full_updates: u32,
    frames: usize,
    frames_missing: u64,
    frames_doubled: u64,
    epochs_back: u64,
    /// Longest gap between two results of a camera around a swap, milliseconds.
    swap_gap_ms: Spread,
    /// The same around moments without one.
    sham_gap_ms: Spread,
    p99_ratio: f64,
    rss_mb_early: f64,
    rss_mb_end: f64,
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
            "frames missing {}, doubled {}, epochs that went back {}\n",
            self.frames_missing, self.frames_doubled, self.epochs_back
        )?;
        writeln!(f, "longest gap between results, ms     p50      p99      max")?;
        for (name, s) in [("around a swap", &self.swap_gap_ms), ("without one", &self.sham_gap_ms)]
        {
            writeln!(f, "  {name:<28}{:>9.2}{:>9.2}{:>9.2}", s.p50, s.p99, s.max)?;
        }
        writeln!(f, "  p99, ratio                           {:>9.3}", self.p99_ratio)?;
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
    results: Vec<Vec<Outcome>>,
    ticked: Instant,
}

pub(super) fn run(args: &Args) -> anyhow::Result<Report> {
    let demo = demo::start(&demo::Options { probation_s: 0, story: false })?;
    let mut bench = Bench { demo, results: vec![Vec::new(); 2], ticked: Instant::now() };
    bench.run_for(Duration::from_secs(8));
    // The burst with which a camera starts is not what is measured.
    bench.results.iter_mut().for_each(|r| drop(r.drain(..r.len().saturating_sub(1))));
    for update in 0..args.updates {
        let version = if update % 2 == 0 { 2 } else { 1 };
        bench.install(&format!("update-{update}"), version)?;
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
    bench.demo.stop();
    report(args, &results, early, end)
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

    fn install(&mut self, id: &str, version: u32) -> anyhow::Result<()> {
        let name = format!("plates-v{version}.onnx");
        let path = crate::assets::find(&format!("models/{name}")).map_err(|e| anyhow!(e))?;
        let bytes = std::fs::read(path)?;
        let desk = self.demo.app.desk().context("ONNX Runtime is missing")?;
        let mut part = desk.store().stage(bytes.len() as u64, bytes.len() as u64)?;
        part.write(&bytes)?;
        let blob = part.finish(None)?;
        let epoch = self.epoch();
        self.ask(Order::Stored {
            id: id.into(),
            name,
            blob,
            install: Install::Auto,
            manifest: Some(br#"{"allow_removed_labels":true}"#.to_vec()),
            signature: None,
            accept_slower: None,
        })?;
        self.until_done(id, epoch)
    }

    fn roll_back(&mut self, id: &str) -> anyhow::Result<()> {
        let epoch = self.epoch();
        self.ask(Order::Rollback { id: id.into(), to: None })?;
        self.until_done(id, epoch)
    }
}

fn report(args: &Args, results: &[Vec<Outcome>], early: f64, end: f64) -> anyhow::Result<Report> {
    let (mut missing, mut doubled, mut back) = (0, 0, 0);
    let (mut swaps, mut shams, mut changes) = (Vec::new(), Vec::new(), 0);
    for camera in results {
        for pair in camera.windows(2) {
            let (a, b) = (pair[0], pair[1]);
            missing += b.frame.saturating_sub(a.frame + 1);
            doubled += u64::from(b.frame <= a.frame);
            back += u64::from(b.epoch < a.epoch);
            if b.epoch > a.epoch {
                changes += 1;
                swaps.extend(longest_gap(camera, b.at));
                // Between this window's end and the next swap, at a moment that nobody chose.
                let jitter = Duration::from_millis(u64::from(b.at.elapsed().subsec_nanos() % 300));
                shams.extend(longest_gap(camera, b.at + MARGIN * 3 - jitter));
            }
        }
    }
    let (swap_gap_ms, sham_gap_ms) = (Spread::of(swaps)?, Spread::of(shams)?);
    Ok(Report {
        swaps: changes / results.len(),
        full_updates: args.updates,
        frames: results.iter().map(Vec::len).sum(),
        frames_missing: missing,
        frames_doubled: doubled,
        epochs_back: back,
        p99_ratio: rounded(swap_gap_ms.p99 / sham_gap_ms.p99, 3),
        swap_gap_ms,
        sham_gap_ms,
        rss_mb_early: early,
        rss_mb_end: end,
    })
}

/// The longest gap between two results whose second lies within [`MARGIN`] of `at`, milliseconds.
fn longest_gap(results: &[Outcome], at: Instant) -> Option<f64> {
    let inside = |t: Instant| t + MARGIN >= at && t <= at + MARGIN;
    let gaps = results.windows(2).filter(|pair| inside(pair[1].at));
    gaps.map(|pair| (pair[1].at - pair[0].at).as_secs_f64() * 1e3).max_by(f64::total_cmp)
}
