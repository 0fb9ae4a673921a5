//! Builds, runs and stops the service. Every thread is started and joined here or by what is
//! started here.
//!
//! Start: spooler → network (broker, link) → updater with the first model → worker → cameras, so
//! that whoever produces finds whoever consumes. Stop: the reverse. A start that fails half-way
//! stops what it started.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, anyhow};
use tracing::{error, info, warn};

use crate::camera::{Camera, CameraStatus, State};
use crate::config::{self, Config, External};
use crate::control;
use crate::meter::Meter;
use crate::model::engine::Model;
use crate::model::runtime::Runtime;
use crate::model::slot::Slot;
use crate::mqtt::board::Board;
use crate::mqtt::outbox::{Bounds, Outbox};
use crate::mqtt::spooler::{self, Spooler};
use crate::mqtt::topics::Topics;
use crate::net::Net;
use crate::notify::Notifier;
use crate::queue::{self, Intake, LaneSettings};
use crate::records::{CameraRecord, Limits, ModelStatus, Status, rfc3339};
use crate::sampler::Sampler;
use crate::signals::Signals;
use crate::snapshot::{CameraSnapshot, Snapshot, Telemeter};
use crate::update::updater::{self, Desk, Updater};
use crate::vision::nms;
use crate::worker::{Origin, Pulse, RECORD_INTERVAL, Worker};
use crate::{affinity, assets};

/// What may wait for the broker in memory; more waits on disk.
pub const OUTBOX: Bounds = Bounds { records: 20_000, bytes: 32 << 20 };

/// Longest time that the cameras may take to stop, together.
const CAMERAS_STOP: Duration = Duration::from_secs(3);

/// The running service.
pub struct App {
    config: Config,
    origin: Origin,
    started_us: i64,
    cores: Vec<usize>,
    runtime: Option<Arc<Runtime>>,
    /// Why ONNX Runtime is missing, and with it models and the updater.
    no_runtime: Option<String>,
    slot: Arc<Slot>,
    topics: Topics,
    intake: Arc<Intake>,
    meter: Arc<Meter>,
    outbox: Arc<Outbox>,
    board: Arc<Board>,
    pulse: Arc<Pulse>,
    cameras: Vec<Camera>,
    worker: Option<JoinHandle<()>>,
    updater: Option<Updater>,
    net: Net,
    spooler: Spooler,
    telemeter: Telemeter,
    notifier: Notifier,
    said: Said,
}

/// What was published or logged last, so that only changes are.
#[derive(Default)]
struct Said {
    status: Option<Status>,
    cameras: Vec<Option<CameraStatus>>,
}

impl App {
    /// Starts everything. Cameras that are down, a broker that is away and a model that can't run
    /// are no reasons to fail: they are reported, and waited for.
    pub fn start(config: Config) -> anyhow::Result<Self> {
        gst::init().context("GStreamer can't be initialised")?;
        let origin = Origin { device: config.device.id.clone(), boot: new_boot()? };
        info!("noblink {} on {}, boot {}", env!("CARGO_PKG_VERSION"), origin.device, origin.boot);
        let cores = match &config.inference.cores {
            Some(cores) => cores.clone(),
            None => affinity::choose(config.inference.threads),
        };
        if let Some(core) = cores.iter().find(|c| !affinity::allowed().contains(c)) {
            let message = format!("= {cores:?}: core {core} is not one that this process may use");
            let problem = config::Problem { path: "inference.cores".into(), message };
            let file = "the configuration".into();
            return Err(config::Invalid { file, problems: vec![problem] }.into());
        }
        let slot = Arc::new(Slot::default());
        let (runtime, no_runtime) = match Runtime::load(config.inference.library.as_deref()) {
            Ok(runtime) => (Some(runtime), None),
            Err(e) => {
                error!("no model yet: {e}");
                (None, Some(e.to_string()))
            }
        };

        let topics = Topics::new(&config.mqtt.prefix, &config.device.id);
        let outbox = Arc::new(Outbox::new(OUTBOX));
        let board = Arc::new(Board::new());
        let spool = spooler::Settings {
            dir: config.device.state_dir.clone(),
            max_bytes: config.outbox.max_bytes,
            durability: config.outbox.durability,
        };
        let spooler = Spooler::start(Arc::clone(&outbox), spool)
            .context("the outbox's thread can't be started")?;
        let started =
            Net::start(&config, &origin, &topics, Arc::clone(&outbox), Arc::clone(&board));
        let net = match started {
            Ok(net) => net,
            Err(e) => {
                spooler.stop();
                return Err(e);
            }
        };

        let settings: Vec<LaneSettings> = config
            .cameras
            .iter()
            .map(|c| LaneSettings { queue: c.queue, max_fps: c.max_fps })
            .collect();
        let (intake, inlets) = queue::build(&settings);
        let meter = Arc::new(Meter::new(config.cameras.len()));
        let pulse = Arc::new(Pulse::default());
        let sampler = Arc::new(Sampler::default());
        let parts = runtime.as_ref().map(|runtime| updater::Parts {
            config: config.clone(),
            origin: origin.clone(),
            runtime: Arc::clone(runtime),
            cores: cores.clone(),
            slot: Arc::clone(&slot),
            meter: Arc::clone(&meter),
            intake: Arc::clone(&intake),
            pulse: Arc::clone(&pulse),
            sampler: Arc::clone(&sampler),
            outbox: Arc::clone(&outbox),
            board: Arc::clone(&board),
            topics: topics.clone(),
            inbound: net.inbound(),
        });
        let updater = match parts.map(Updater::start).transpose() {
            Ok(updater) => updater,
            Err(e) => {
                net.stop();
                spooler.stop();
                return Err(e);
            }
        };
        if let Some(updater) = &updater {
            let socket = control::socket_path(&config.device.state_dir);
            let desk = Arc::clone(updater.desk());
            match net.control(&socket, desk, config.models.max_size) {
                Ok(()) => {}
                Err(e) => warn!("{e:#}: the command line can't reach this service"),
            }
        }
        let worker = Worker::new(
            Arc::clone(&intake),
            Arc::clone(&slot),
            Arc::clone(&outbox),
            Arc::clone(&meter),
            Arc::clone(&pulse),
            sampler,
            origin.clone(),
            &topics,
            &config.cameras,
            &config.inference,
        );
        let mut app = Self {
            started_us: now_us(),
            telemeter: Telemeter::new(config.cameras.len()),
            notifier: Notifier::default(),
            said: Said { cameras: vec![None; config.cameras.len()], ..Said::default() },
            config,
            origin,
            cores,
            runtime,
            no_runtime,
            slot,
            topics,
            intake,
            meter,
            outbox,
            board,
            pulse,
            cameras: Vec::new(),
            worker: None,
            updater,
            net,
            spooler,
        };
        if let Err(e) = app.start_threads(worker, inlets) {
            app.stop();
            return Err(e);
        }
        app.tick();
        Ok(app)
    }

    fn start_threads(&mut self, worker: Worker, inlets: Vec<queue::Inlet>) -> anyhow::Result<()> {
        let cores = self.cores.clone();
        let infer = std::thread::Builder::new().name("infer".into());
        self.worker = Some(
            infer
                .spawn(move || {
                    if let Err(why) = affinity::pin(&cores) {
                        warn!("the worker is not pinned: {why}");
                    }
                    worker.run();
                })
                .context("the worker's thread can't be started")?,
        );
        let templates = Arc::new(assets::templates(None));
        for (camera, inlet) in self.config.cameras.iter().zip(inlets) {
            let started = Camera::start(camera.clone(), inlet, Arc::clone(&templates));
            let context = || format!("camera {} can't be started", camera.id);
            self.cameras.push(started.with_context(context)?);
        }
        Ok(())
    }

    /// Ticks once a second until a signal comes, or `at_most` is over.
    pub fn run(&mut self, signals: &Signals, at_most: Option<Duration>) {
        let end = at_most.map(|d| Instant::now() + d);
        let second = Duration::from_secs(1);
        loop {
            let left = end.map_or(second, |end| end.saturating_duration_since(Instant::now()));
            if left.is_zero() || signals.wait(left.min(second)) {
                return;
            }
            self.tick();
        }
    }

    /// Takes a snapshot and publishes what follows from it.
    pub fn tick(&mut self) -> Snapshot {
        let snapshot = self.snapshot();
        self.publish_status(&snapshot);
        self.publish_cameras(&snapshot);
        if self.telemeter.is_due() {
            self.publish_telemetry(&snapshot);
        }
        self.notifier.tell(&snapshot, self.pulse.beats.load(Ordering::Relaxed));
        snapshot
    }

    /// The whole, now.
    pub fn snapshot(&self) -> Snapshot {
        self.snapshot_with(self.cameras.iter().map(Camera::status))
    }

    fn snapshot_with(&self, statuses: impl Iterator<Item = CameraStatus>) -> Snapshot {
        let lanes = self.intake.snapshot();
        let camera = |((config, lane), status): ((&config::Camera, _), _)| CameraSnapshot {
            id: config.id.clone(),
            status,
            lane,
        };
        Snapshot {
            time_us: now_us(),
            cameras: self.config.cameras.iter().zip(lanes).zip(statuses).map(camera).collect(),
            live: self.slot.load(),
            link: self.net.link_status(),
            outbox: self.outbox.stats(),
        }
    }

    /// The broker that the link uses.
    pub fn broker(&self) -> &External {
        self.net.broker()
    }

    /// Where the update thread takes orders; `None` without ONNX Runtime.
    pub fn desk(&self) -> Option<&Arc<Desk>> {
        self.updater.as_ref().map(Updater::desk)
    }

    /// What the worker measures.
    pub fn meter(&self) -> &Meter {
        &self.meter
    }

    /// The topics of this device.
    pub fn topics(&self) -> &Topics {
        &self.topics
    }

    fn publish_status(&mut self, snapshot: &Snapshot) {
        let model = snapshot.live.as_ref().map(|live| {
            let contract = live.model.contract();
            ModelStatus {
                identity: live.model.identity().clone(),
                epoch: live.epoch,
                labels: contract.labels.clone(),
                input: [contract.input.width, contract.input.height],
                layout: contract.layout.name(),
                provider: live.model.provider().name(),
                runtime: self.runtime.as_ref().map_or(String::new(), |r| r.version().to_owned()),
                threads: self.config.inference.threads,
                cores: self.cores.clone(),
            }
        });
        let states = snapshot.cameras.iter().map(|c| (c.id.clone(), c.status.state.name()));
        let status = Status {
            schema: "noblink.status/1",
            device: self.origin.device.clone(),
            boot: self.origin.boot.clone(),
            version: env!("CARGO_PKG_VERSION"),
            started: rfc3339(self.started_us),
            advice: model.is_none().then(|| self.advice()).flatten(),
            model,
            cameras: states.collect(),
            limits: Limits {
                objects: nms::DETECTIONS_MAX,
                record_interval_s: RECORD_INTERVAL.as_secs(),
                outbox_records: OUTBOX.records,
            },
        };
        if self.said.status.as_ref() != Some(&status) {
            if let Some(live) = &snapshot.live {
                warn_of_unknown_labels(&self.config, &live.model);
            }
            self.board.set(&self.topics.status(), to_json(&status));
            self.said.status = Some(status);
        }
    }

    fn advice(&self) -> Option<String> {
        self.no_runtime.clone().or_else(|| self.updater.as_ref()?.desk().view().advice)
    }

    fn publish_cameras(&mut self, snapshot: &Snapshot) {
        for (i, camera) in snapshot.cameras.iter().enumerate() {
            let said = &mut self.said.cameras[i];
            if said.as_ref().is_some_and(|s| s.says_the_same(&camera.status)) {
                continue;
            }
            let reason = camera.status.reason.as_deref();
            let source = &self.config.cameras[i].source;
            match (camera.status.state, reason) {
                // Only its clock is new, with the first sender report.
                (State::Streaming, _)
                    if said.as_ref().is_some_and(|s| {
                        s.state == State::Streaming && s.connects == camera.status.connects
                    }) => {}
                (State::Streaming, _) => {
                    let stream = camera.status.stream.as_ref().map(ToString::to_string);
                    info!("camera {}: streaming, {}", camera.id, stream.unwrap_or_default());
                }
                (State::Connecting, _) if said.is_none() => {
                    info!("camera {}: connecting to {source}", camera.id);
                }
                (State::Connecting, _) => {}
                (state, Some(reason)) => {
                    warn!("camera {}: {}, {reason}", camera.id, state.name());
                }
                (state, None) => info!("camera {}: {}", camera.id, state.name()),
            }
            let record = CameraRecord {
                schema: "noblink.camera/1",
                device: &self.origin.device,
                camera: &camera.id,
                boot: &self.origin.boot,
                source: source.to_string(),
                status: &camera.status,
            };
            self.board.set(&self.topics.camera_status(&camera.id), to_json(&record));
            *said = Some(camera.status.clone());
        }
    }

    fn publish_telemetry(&mut self, snapshot: &Snapshot) {
        for camera in &snapshot.cameras {
            if !camera.lane.ledger.is_exact() {
                // The promise itself: if this is ever seen, it is a defect to report.
                error!(
                    "camera {}: the ledger does not add up: {:?}",
                    camera.id, camera.lane.ledger
                );
            }
        }
        let telemetry = self.telemeter.take(&self.origin, snapshot, &self.meter);
        if let Some(why) = &telemetry.worker.last_failure {
            let failed: u64 = snapshot.cameras.iter().map(|c| c.lane.ledger.failed).sum();
            warn!("{failed} frames failed so far, the last one: {why}");
        }
        self.board.tell(&self.topics.telemetry(), to_json(&telemetry));
    }

    /// Stops everything, in the reverse order of the start, and returns the last snapshot.
    pub fn stop(mut self) -> Snapshot {
        info!("stopping");
        self.notifier.stopping();
        self.cameras.iter().for_each(Camera::request_stop);
        let deadline = Instant::now() + CAMERAS_STOP;
        let statuses: Vec<_> = self.cameras.iter().map(Camera::status).collect();
        for (camera, config) in self.cameras.drain(..).zip(&self.config.cameras) {
            if !camera.join(deadline) {
                warn!("camera {}: its thread does not end; it is left behind", config.id);
            }
        }
        self.intake.close();
        self.pulse.stop.store(true, Ordering::Relaxed);
        if let Some(worker) = self.worker.take()
            && worker.join().is_err()
        {
            error!("the worker ended in a panic");
        }
        if let Some(updater) = self.updater.take() {
            updater.stop();
        }
        let mut last = self.snapshot_with(statuses.into_iter());
        self.publish_telemetry(&last);
        last.link = self.net.stop();
        self.spooler.stop();
        last.outbox = self.outbox.stats();
        info!("stopped");
        last
    }
}

fn warn_of_unknown_labels(config: &Config, model: &Model) {
    for camera in &config.cameras {
        let known = &model.contract().labels;
        for label in camera.labels.iter().flatten().filter(|l| !known.contains(l)) {
            warn!(
                "camera {}: label {label:?} is none of the model's: {}",
                camera.id,
                known.join(", ")
            );
        }
    }
}

fn to_json(value: &impl serde::Serialize) -> Vec<u8> {
    serde_json::to_vec(value).expect("numbers, strings and lists always become JSON")
}

/// Microseconds since 1970 by this machine's clock.
pub fn now_us() -> i64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_micros() as i64)
}

/// 80 random bits as 16 characters of 5.
fn new_boot() -> anyhow::Result<String> {
    const ALPHABET: &[u8; 32] = b"0123456789abcdefghjkmnpqrstvwxyz";
    let mut random = [0u8; 16];
    getrandom::fill(&mut random).map_err(|e| anyhow!("no random numbers: {e}"))?;
    Ok(random.iter().map(|b| char::from(ALPHABET[usize::from(b & 31)])).collect())
}
