//! `noblink bench page`: what the worker loses to people who look at the page. Windows without and
//! with viewers alternate in one run. The viewers are a child process of low priority: on a real
//! site they are other machines, and only the page's own work is the box's.

use std::fmt;
use std::io::{self, BufRead, BufReader, Read};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow};
use serde::Serialize;

use super::SETTLED;
use super::cameras::Cameras;
use crate::demo::{self, Demo};
use crate::host;
use crate::records::rounded;

#[derive(Debug, clap::Args)]
pub(in crate::cli) struct Args {
    /// People who look
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=100))]
    viewers: u32,
    /// Windows without viewers, and as many with
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=1000))]
    windows: u32,
    /// Another model than plates 1
    #[arg(long, value_name = "FILE")]
    model: Option<PathBuf>,
    /// H.264 mp4 files, a camera each, instead of the demo's two; many saturate the worker
    #[arg(long = "clip", value_name = "FILE", num_args = 1)]
    clips: Vec<PathBuf>,
    /// Print JSON
    #[arg(long)]
    pub(super) json: bool,
}

/// The viewers, as a process of their own.
#[derive(Debug, clap::Args)]
pub(in crate::cli) struct Viewers {
    /// The page
    page: SocketAddr,
    #[arg(long)]
    viewers: u32,
    /// Ids, joined by commas
    #[arg(long)]
    cameras: String,
}

/// Time after a change that is not counted.
const SETTLE: Duration = Duration::from_secs(2);
/// What is counted.
const WINDOW: Duration = Duration::from_secs(5);

/// What was measured.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    viewers: u32,
    cameras: usize,
    without: Side,
    with: Side,
    /// Worker rate with viewers to that without.
    rate_ratio: f64,
    /// What reached the viewers, all of them together.
    pictures_per_s: f64,
    kb_per_s: f64,
}

/// The windows of one kind.
#[derive(Debug, Default, Serialize)]
struct Side {
    /// Seconds that were counted.
    seconds: f64,
    /// Frames that the worker finished, a second.
    frames_per_s: f64,
    /// Frames dropped, a second: 0, unless the worker is saturated.
    dropped_per_s: f64,
    /// CPU time of the service, of one core.
    cpu: f64,
    #[serde(skip)]
    sums: (u64, u64, f64),
}

impl Side {
    fn add(&mut self, (inferred, dropped, cpu_s): (u64, u64, f64), seconds: f64) {
        self.sums.0 += inferred;
        self.sums.1 += dropped;
        self.sums.2 += cpu_s;
        self.seconds += seconds;
        self.frames_per_s = rounded(self.sums.0 as f64 / self.seconds, 2);
        self.dropped_per_s = rounded(self.sums.1 as f64 / self.seconds, 2);
        self.cpu = rounded(self.sums.2 / self.seconds, 3);
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { viewers, cameras, without, with, .. } = self;
        writeln!(f, "{cameras} cameras; {:<22}{:>12}{:>14}", "", "no viewer", "with viewers")?;
        let mut row = |name: &str, a: f64, b: f64| writeln!(f, "{name:<33}{a:>12.2}{b:>14.2}");
        row("worker, frames/s", without.frames_per_s, with.frames_per_s)?;
        row("dropped, frames/s", without.dropped_per_s, with.dropped_per_s)?;
        row("CPU of the service, cores", without.cpu, with.cpu)?;
        writeln!(f, "\nworker rate, ratio {:.4}", self.rate_ratio)?;
        write!(
            f,
            "{viewers} viewers together got {:.1} pictures/s, {:.0} kB/s",
            self.pictures_per_s, self.kb_per_s
        )
    }
}

pub(super) fn run(args: &Args) -> anyhow::Result<Report> {
    let cameras = Cameras::of(&args.clips)?;
    let mut demo = demo::start(&demo::Options {
        model: args.model.clone(),
        urls: cameras.urls.clone(),
        inference: SETTLED.into(),
        ..Default::default()
    })?;
    let page = demo.app.page().context("the page is not served")?;
    let ids: Vec<_> = demo.app.snapshot().cameras.iter().map(|c| c.id.clone()).collect();
    // The burst with which cameras start.
    run_for(&mut demo, Duration::from_secs(8));
    let (mut without, mut with, mut seen) = (Side::default(), Side::default(), (0, 0));
    for _ in 0..args.windows {
        measure(&mut demo, &mut without);
        let mut looking = look(page, args.viewers, &ids)?;
        measure(&mut demo, &mut with);
        let (pictures, bytes) = leave(&mut looking)?;
        seen = (seen.0 + pictures, seen.1 + bytes);
    }
    demo.stop();
    let looked = f64::from(args.windows) * (SETTLE + WINDOW).as_secs_f64();
    Ok(Report {
        viewers: args.viewers,
        cameras: ids.len(),
        rate_ratio: rounded(with.frames_per_s / without.frames_per_s, 4),
        without,
        with,
        pictures_per_s: rounded(seen.0 as f64 / looked, 1),
        kb_per_s: rounded(seen.1 as f64 / looked / 1e3, 0),
    })
}

/// Keeps the service's clockwork going.
fn run_for(demo: &mut Demo, time: Duration) {
    let end = Instant::now() + time;
    while let Some(left) = end.checked_duration_since(Instant::now()) {
        std::thread::sleep(left.min(Duration::from_secs(1)));
        demo.app.tick();
    }
}

fn measure(demo: &mut Demo, side: &mut Side) {
    run_for(demo, SETTLE);
    let count = |demo: &Demo| {
        let snapshot = demo.app.snapshot();
        let ledgers = || snapshot.cameras.iter().map(|c| &c.lane.ledger);
        let inferred: u64 = ledgers().map(|l| l.inferred).sum();
        let dropped: u64 = ledgers().map(|l| l.dropped.total()).sum();
        (inferred, dropped, host::cpu_seconds())
    };
    let (before, began) = (count(demo), Instant::now());
    run_for(demo, WINDOW);
    let after = count(demo);
    let grown = (after.0 - before.0, after.1 - before.1, after.2 - before.2);
    side.add(grown, began.elapsed().as_secs_f64());
}

fn look(page: SocketAddr, viewers: u32, cameras: &[String]) -> anyhow::Result<Child> {
    Command::new("nice")
        .args(["-n", "19"])
        .arg(std::env::current_exe()?)
        .args(["bench", "viewers", &page.to_string(), "--viewers", &viewers.to_string()])
        .args(["--cameras", &cameras.join(",")])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .context("the viewers can't be started")
}

/// Ends the viewers: the pictures and bytes that they got.
fn leave(looking: &mut Child) -> anyhow::Result<(u64, u64)> {
    drop(looking.stdin.take());
    let mut said = String::new();
    let out = looking.stdout.as_mut().context("it was piped")?;
    out.read_to_string(&mut said)?;
    looking.wait()?;
    let mut numbers = said.split_whitespace().map_while(|n| n.parse().ok());
    let got = numbers.next().zip(numbers.next());
    got.ok_or_else(|| anyhow!("the viewers failed: {said:?}"))
}

/// Looks at the page until standard input ends, then says how many pictures and bytes came.
pub(super) fn viewers(args: &Viewers) -> anyhow::Result<()> {
    let got = Arc::new((AtomicU64::new(0), AtomicU64::new(0)));
    for _ in 0..args.viewers {
        let page = format!("http://{}/api/v1", args.page);
        let live = format!("{page}/live?cameras={}", args.cameras);
        let mine = Arc::clone(&got);
        std::thread::spawn(move || pictures(&live, &mine));
        std::thread::spawn(move || events(&format!("{page}/events")));
    }
    io::copy(&mut io::stdin(), &mut io::sink())?;
    say!("{} {}", got.0.load(Ordering::Relaxed), got.1.load(Ordering::Relaxed));
    Ok(())
}

fn pictures(url: &str, got: &(AtomicU64, AtomicU64)) -> anyhow::Result<()> {
    let mut stream = ureq::get(url).call()?.into_body().into_reader();
    loop {
        let mut length = [0; 4];
        stream.read_exact(&mut length)?;
        let length = u64::from(u32::from_be_bytes(length));
        io::copy(&mut stream.by_ref().take(length), &mut io::sink())?;
        got.0.fetch_add(1, Ordering::Relaxed);
        got.1.fetch_add(length, Ordering::Relaxed);
    }
}

fn events(url: &str) -> anyhow::Result<()> {
    let stream = ureq::get(url).call()?.into_body().into_reader();
    BufReader::new(stream).lines().try_for_each(|line| line.map(drop))?;
    Ok(())
}
