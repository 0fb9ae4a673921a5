//! `noblink bench pipeline`: the service's own camera, queue and worker on a clip, as fast as it
//! is inferred. Beside it, bare decoding, and bare runs of the model with a frame decoded for each
//! of them, so that what the rest costs can be told: a model that shares caches and cores with a
//! decoder takes more CPU time than one alone, which is not the rest's doing.
//!
//! With `--lap` it goes on until nobody reads what it prints, so that a script can let several
//! programs take turns, all but one of them standing still (`benches/peers/compare.py`).

use std::fmt;
use std::io::Write;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow, bail};
use serde::Serialize;

use super::super::tune;
use super::quantiles;
use crate::app::{OUTBOX, now_us};
use crate::camera::source::Source;
use crate::camera::{Camera, State};
use crate::config::{self, Inference, Models, Provider, Publish};
use crate::host::Host;
use crate::meter::{Meter, Outcome};
use crate::model::contract::Overrides;
use crate::model::engine::{EngineOptions, Model};
use crate::model::options::Setting;
use crate::model::runtime::{Runtime, library_for};
use crate::model::slot::{Live, Slot};
use crate::mqtt::outbox::Outbox;
use crate::mqtt::topics::Topics;
use crate::preview::Previews;
use crate::queue::{self, Drop, Intake};
use crate::records::{Quantiles, Stages, rounded};
use crate::update::digest::Digest;
use crate::update::tune::LASTS;
use crate::worker::{Origin, Pulse, Worker};
use crate::{affinity, assets, host};

#[derive(Debug, clap::Args)]
pub(in crate::cli) struct Args {
    /// The ONNX file; the demo's model when left out
    #[arg(long, value_name = "FILE")]
    model: Option<PathBuf>,
    /// A clip (file:///…); a demo clip when left out
    #[arg(long, value_name = "URL")]
    source: Option<String>,
    /// cpu, openvino, cuda, tensorrt, or auto: what `noblink tune` finds the fastest
    #[arg(long, default_value = "cpu")]
    provider: String,
    /// Threads of one run
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u8).range(1..=64))]
    threads: u8,
    /// Frames to measure, after some to warm up
    #[arg(long, default_value_t = 200, value_parser = clap::value_parser!(u32).range(1..))]
    frames: u32,
    /// Print JSON
    #[arg(long)]
    pub(super) json: bool,
    /// Go on and on, and print a line of JSON for each so many seconds
    #[arg(
        long,
        value_name = "SECONDS",
        conflicts_with_all = ["json", "frames"],
        value_parser = clap::value_parser!(u16).range(1..=60)
    )]
    pub(super) lap: Option<u16>,
}

/// What was measured. The JSON's names are fixed: scripts read them.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    model: String,
    source: String,
    #[serde(flatten)]
    engine: Engine,
    frames: u32,
    frames_per_s: f64,
    cpu_ms_per_frame: f64,
    /// CPU time of a frame that is neither decoding nor a run of the model.
    overhead_cpu_ms: f64,
    decode_cpu_ms: f64,
    /// Beside decoding.
    run_cpu_ms: f64,
    stages_ms: BenchStages,
    /// From a frame's turn to its record. How long it waited is left out: the clip is played as
    /// fast as it goes, so the queue is always full. Of the last 3600 frames.
    latency_ms: Quantiles,
    rss_mb: f64,
}

/// By what the model ran.
#[derive(Debug, Serialize)]
struct Engine {
    provider: &'static str,
    bf16: bool,
    runtime: String,
    threads: usize,
    cores: Vec<usize>,
}

/// A stretch of frames, from the result of one to that of another.
#[derive(Debug, Serialize)]
struct Lap {
    /// Seconds since 1970: a lap in which the process stood still can be told by it.
    began: f64,
    seconds: f64,
    cpu_s: f64,
    /// Of each frame, as in the report.
    latency_ms: Vec<f64>,
    rss_mb: f64,
}

/// Means: CPU time for `decode`, which goes on beside the rest, wall time for the others.
#[derive(Debug, Serialize)]
struct BenchStages {
    decode: f64,
    #[serde(flatten)]
    worker: Stages,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "model      {}, {} frames of {}", self.model, self.frames, self.source)?;
        let Engine { provider, bf16, runtime, threads, cores } = &self.engine;
        let bf16 = if *bf16 { " in bf16" } else { "" };
        writeln!(
            f,
            "engine     ONNX Runtime {runtime}, {provider}{bf16}, {threads} threads on cores {cores:?}\n",
        )?;
        let s = &self.stages_ms;
        for (stage, ms) in [
            ("decode", s.decode),
            ("queue", s.worker.queue),
            ("preprocess", s.worker.preprocess),
            ("inference", s.worker.inference),
            ("postprocess", s.worker.postprocess),
        ] {
            writeln!(f, "{stage:<12}{ms:>9.3} ms")?;
        }
        let Quantiles { p50, p99, .. } = self.latency_ms;
        writeln!(f, "\nlatency     {p50:>9.2} ms, {p99:.2} ms at the 99th percentile; no waiting")?;
        writeln!(f, "frames/s    {:>9.2}", self.frames_per_s)?;
        writeln!(f, "CPU a frame {:>9.3} ms", self.cpu_ms_per_frame)?;
        write!(
            f,
            "  of these  {:>9.3} ms decoding, {:.3} ms the model; {:.3} ms the rest",
            self.decode_cpu_ms, self.run_cpu_ms, self.overhead_cpu_ms
        )
    }
}

/// Frames that go by before the clock starts.
const WARM_UP: u64 = 20;
/// Between two looks at the ledger.
const NAP: Duration = Duration::from_millis(2);
/// Runs of the model with nothing but decoding beside them, twice.
const BARE_RUNS: u32 = 30;
/// No frame for so long: the clip does not play.
const PATIENCE: Duration = Duration::from_secs(15);

/// What was asked for.
struct Choice {
    file: PathBuf,
    /// The library to load.
    library: Option<PathBuf>,
    /// How sessions are built.
    setting: Setting,
    cores: Vec<usize>,
}

impl Choice {
    fn of(args: &Args) -> anyhow::Result<Self> {
        let file = args.model.clone().map_or_else(|| assets::find("models/plates-v1.onnx"), Ok)?;
        let (provider, threads) = (args.provider.as_str(), usize::from(args.threads));
        let auto = provider == "auto";
        let named = Provider::parse(provider).filter(|_| !auto);
        if named.is_none() && !auto {
            bail!("--provider {provider}: cpu, openvino, cuda, tensorrt or auto");
        }
        let inference = Inference { provider: named, threads, ..Inference::default() };
        let (library, setting) = if auto {
            let bytes = std::fs::read(&file).with_context(|| file.display().to_string())?;
            let digest = Digest::of(&bytes);
            let table = tune::measured(&file, digest, &inference, &Models::default(), LASTS)?;
            (Some(table.chosen.library), table.chosen.setting)
        } else {
            (library_for(&inference), Setting::of(&inference))
        };
        Ok(Self { file, library, setting, cores: affinity::choose(threads) })
    }
}

/// What is measured.
struct Subject {
    name: String,
    model: Arc<Model>,
    engine: Engine,
}

impl Subject {
    fn open(Choice { file, library, setting, cores }: Choice) -> anyhow::Result<Self> {
        affinity::pin(&cores).map_err(|e| anyhow!(e))?;
        let runtime = Runtime::load(library.as_deref())?;
        let options = EngineOptions { setting, ..EngineOptions::default() };
        let model = Model::open(&runtime, &file, &options, &Overrides::default())?;
        Ok(Self {
            name: format!("{} version {}", model.identity().id, model.identity().version),
            model: Arc::new(model),
            engine: Engine {
                provider: setting.provider.name(),
                bf16: setting.bf16,
                runtime: runtime.version().to_owned(),
                threads: setting.threads,
                cores,
            },
        })
    }
}

fn source(args: &Args) -> anyhow::Result<Source> {
    gst::init().context("GStreamer can't be initialised")?;
    let url = match &args.source {
        Some(url) => url.clone(),
        None => format!("file://{}", assets::find("models/clips/line-a.mp4")?.display()),
    };
    Source::parse(&url).map_err(|e| anyhow!("--source {e}"))
}

pub(super) fn run(args: &Args) -> anyhow::Result<Report> {
    let (source, choice) = (source(args)?, Choice::of(args)?);
    let frames = u64::from(args.frames);
    // Before this thread, and with it the decoder's, is pinned.
    let decode_cpu_ms = bare_decode(&source, frames)?;
    let Subject { name, model, engine } = Subject::open(choice)?;
    let bare_before_ms = bare_runs(&source, &model)?;

    let bench = Bench::start(&source, Some(Arc::clone(&model)))?;
    bench.wait_until(|l| l.inferred, WARM_UP)?;
    bench.meter.take_window();
    let (wall, cpu_s) = (Instant::now(), host::cpu_seconds());
    let before = bench.intake.snapshot()[0].ledger.inferred;
    bench.wait_until(|l| l.inferred, before + frames)?;
    let (wall_s, cpu_s) = (wall.elapsed().as_secs_f64(), host::cpu_seconds() - cpu_s);
    let done = bench.intake.snapshot()[0].ledger.inferred - before;
    let window = bench.meter.take_window();
    let work = work_ms(&bench.meter.results(wall).concat());
    let rss_mb = Host::read(cpu_s, wall_s).rss_mb;
    bench.stop();
    // Before and after: a neighbour that comes or goes would be taken for what the rest costs.
    let bare_cpu_ms = (bare_before_ms + bare_runs(&source, &model)?) / 2.0;

    let cpu_ms = cpu_s * 1e3 / done as f64;
    Ok(Report {
        model: name,
        source: source.to_string(),
        engine,
        frames: args.frames,
        frames_per_s: rounded(done as f64 / wall_s, 2),
        cpu_ms_per_frame: rounded(cpu_ms, 3),
        overhead_cpu_ms: rounded(cpu_ms - bare_cpu_ms, 3),
        decode_cpu_ms: rounded(decode_cpu_ms, 3),
        run_cpu_ms: rounded(bare_cpu_ms - decode_cpu_ms, 3),
        stages_ms: BenchStages {
            decode: rounded(decode_cpu_ms, 3),
            worker: window.stages.context("no frame was inferred in the window")?,
        },
        latency_ms: quantiles(work)?,
        rss_mb,
    })
}

/// From a frame's turn to its record.
fn work_ms(results: &[Outcome]) -> Vec<f64> {
    let work = |r: &Outcome| r.total.saturating_sub(r.queue).as_secs_f64() * 1e3;
    results.iter().map(|r| rounded(work(r), 3)).collect()
}

/// By what the model runs, then lap after lap, a line each, until nobody reads them.
pub(super) fn laps(args: &Args, seconds: u16) -> anyhow::Result<()> {
    let source = source(args)?;
    let Subject { model, engine, .. } = Subject::open(Choice::of(args)?)?;
    let mut out = std::io::stdout();
    writeln!(out, "{}", serde_json::to_string(&engine)?)?;
    let bench = Bench::start(&source, Some(model))?;
    bench.wait_until(|l| l.inferred, WARM_UP)?;
    let now = || (now_us() as f64 / 1e6, Instant::now(), host::cpu_seconds());
    let mut next = now();
    loop {
        let (began, from, cpu_s) = next;
        std::thread::sleep(Duration::from_secs(seconds.into()));
        let done = bench.intake.snapshot()[0].ledger.inferred;
        bench.wait_until(|l| l.inferred, done + 1)?;
        // Who hears of this lap and stops the process stops it in the next one, never before: a lap
        // that began with a frame half done would count all of it.
        next = now();
        let (used, seconds) = (next.2 - cpu_s, (next.1 - from).as_secs_f64());
        let lap = Lap {
            began,
            seconds,
            cpu_s: used,
            latency_ms: work_ms(&bench.meter.results(from).concat()),
            rss_mb: Host::read(cpu_s, seconds).rss_mb,
        };
        if writeln!(out, "{}", serde_json::to_string(&lap)?).is_err() {
            break;
        }
    }
    bench.stop();
    Ok(())
}

/// CPU time of decoding one frame, with nothing else going on: there is no model, so the worker
/// drops each frame at once.
fn bare_decode(source: &Source, frames: u64) -> anyhow::Result<f64> {
    let bench = Bench::start(source, None)?;
    let dropped = |l: &queue::Ledger| l.dropped.no_model;
    bench.wait_until(dropped, WARM_UP)?;
    let (cpu_s, before) = (host::cpu_seconds(), dropped(&bench.intake.snapshot()[0].ledger));
    bench.wait_until(dropped, before + frames)?;
    let cpu_ms = (host::cpu_seconds() - cpu_s) * 1e3;
    let done = dropped(&bench.intake.snapshot()[0].ledger) - before;
    bench.stop();
    Ok(cpu_ms / done as f64)
}

/// CPU time of one run of the model and of decoding one frame, with nothing else going on: a frame
/// is taken for each run, and dropped.
fn bare_runs(source: &Source, model: &Model) -> anyhow::Result<f64> {
    let (intake, settings) = (Intake::default(), Arc::new(settings(source)));
    let inlet = intake.open(&settings);
    let camera = Camera::start(settings, inlet, Arc::new(assets::templates(None)), true)?;
    let mut runner = model.runner();
    let mut decode_and_run = || {
        let frame = intake.take(PATIENCE).with_context(|| silent(&camera))?;
        runner.run()?;
        frame.dropped(Drop::NoModel);
        anyhow::Ok(())
    };
    for _ in 0..WARM_UP {
        decode_and_run()?;
    }
    let cpu_s = host::cpu_seconds();
    for _ in 0..BARE_RUNS {
        decode_and_run()?;
    }
    let cpu_ms = (host::cpu_seconds() - cpu_s) * 1e3 / f64::from(BARE_RUNS);
    stop(camera, &intake);
    Ok(cpu_ms)
}

/// The clip as a camera: played again and again, as fast as its frames are taken.
fn settings(source: &Source) -> config::Camera {
    config::Camera {
        id: "bench".into(),
        source: source.clone(),
        pipeline: source.default_pipeline().into(),
        max_fps: None,
        publish: Publish::All,
        labels: None,
        confidence: None,
        publish_max_hz: None,
        snapshot_interval_s: None,
        queue: 4,
        // `PATIENCE` is over earlier, and between the turns of `--lap` nothing moves.
        stall_timeout_s: 3600.0,
        color: None,
        realtime: false,
        repeat: true,
    }
}

fn silent(camera: &Camera) -> String {
    let silence = || format!("no frame for {} s", PATIENCE.as_secs());
    camera.status().reason.unwrap_or_else(silence)
}

fn stop(mut camera: Camera, intake: &Intake) {
    camera.request_stop();
    intake.close();
    camera.join(Instant::now() + Duration::from_secs(3));
}

/// The service's camera, queue and worker; nobody takes the records.
struct Bench {
    camera: Camera,
    intake: Arc<Intake>,
    meter: Arc<Meter>,
    pulse: Arc<Pulse>,
    worker: JoinHandle<()>,
}

impl Bench {
    fn start(source: &Source, model: Option<Arc<Model>>) -> anyhow::Result<Self> {
        let settings = Arc::new(settings(source));
        let (intake, meter) = (Arc::new(Intake::default()), Arc::new(Meter::default()));
        let inlet = intake.open(&settings);
        meter.seat(inlet.index());
        let pulse = Arc::new(Pulse::default());
        let slot = Arc::new(Slot::default());
        let worker = Worker::new(
            Arc::clone(&intake),
            Arc::clone(&slot),
            Arc::new(Outbox::new(OUTBOX)),
            Arc::clone(&meter),
            Arc::clone(&pulse),
            Arc::default(),
            Arc::new(Previews::start(|_, _, _| {})?),
            Origin { device: "bench".into(), boot: "bench".into() },
            &Topics::new("noblink", "bench"),
            &Inference::default(),
        );
        if let Some(model) = model {
            slot.swap(Some(Live::new(model, 0, None)));
        }
        let worker = std::thread::Builder::new().name("infer".into()).spawn(|| worker.run())?;
        let camera = Camera::start(settings, inlet, Arc::new(assets::templates(None)), true)?;
        Ok(Self { camera, intake, meter, pulse, worker })
    }

    /// Waits until a count of the ledger has come this far.
    fn wait_until(&self, count: impl Fn(&queue::Ledger) -> u64, goal: u64) -> anyhow::Result<()> {
        // Counted in naps: no time passes while the process stands still.
        let (mut last, mut waited) = (0, Duration::ZERO);
        loop {
            let now = count(&self.intake.snapshot()[0].ledger);
            if now >= goal {
                return Ok(());
            }
            if now > last {
                (last, waited) = (now, Duration::ZERO);
            } else if waited > PATIENCE || self.camera.status().state == State::Backoff {
                bail!(silent(&self.camera));
            }
            std::thread::sleep(NAP);
            waited += NAP;
        }
    }

    fn stop(self) {
        stop(self.camera, &self.intake);
        self.pulse.stop.store(true, Ordering::Relaxed);
        self.worker.join().expect("the worker does not panic");
    }
}
