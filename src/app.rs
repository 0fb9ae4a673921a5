//! Builds, runs and stops the service. Every thread is started and joined here or by what is
//! started here.
//!
//! Start: spooler → network (broker, link) → updater with the first model → worker → cameras, so
//! that whoever produces finds whoever consumes. Stop: the reverse. A start that fails half-way
//! stops what it started.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, anyhow, bail};
use crossbeam_channel::{Receiver, Select};
use tracing::{error, info, warn};

use crate::camera::{CameraStatus, State};
use crate::config::{self, Config, External, Invalid};
use crate::control;
use crate::counts::Counts;
use crate::fleet::{self, Changes, Fleet};
use crate::guest::Guest;
use crate::homeassistant::HomeAssistant;
use crate::meter::Meter;
use crate::model::engine::Model;
use crate::model::runtime::Runtime;
use crate::model::slot::Slot;
use crate::mqtt::board::{Board, Picture};
use crate::mqtt::link::Inbound;
use crate::mqtt::outbox::{Bounds, Outbox};
use crate::mqtt::spooler::{self, Spooler};
use crate::mqtt::topics::Topics;
use crate::net::Net;
use crate::notify::Notifier;
use crate::preview::Previews;
use crate::queue::Intake;
use crate::records::{CameraRecord, Limits, ModelStatus, Status, rfc3339};
use crate::sampler::Sampler;
use crate::signals::{Asked, Signals};
use crate::snapshot::{Snapshot, Telemeter};
use crate::switches;
use crate::update::event::Answer;
use crate::update::job::{Reason, Way};
use crate::update::orders;
use crate::update::tune;
use crate::update::updater::{self, Desk, Updater};
use crate::vision::nms;
use crate::web::feed::Feed;
use crate::web::page::Page;
use crate::worker::{Origin, Pulse, RECORD_INTERVAL, Worker};
use crate::{affinity, assets};

/// What may wait for the broker in memory; more waits on disk.
pub const OUTBOX: Bounds = Bounds { records: 20_000, bytes: 32 << 20 };

/// The running service.
pub struct App {
    config: Config,
    origin: Origin,
    started_us: i64,
    cores: Vec<usize>,
    /// Why ONNX Runtime is missing, and with it models and the updater.
    no_runtime: Option<String>,
    slot: Arc<Slot>,
    topics: Topics,
    intake: Arc<Intake>,
    meter: Arc<Meter>,
    outbox: Arc<Outbox>,
    board: Arc<Board>,
    pulse: Arc<Pulse>,
    fleet: Fleet,
    /// `cmd/cameras/…`, and Home Assistant's.
    commands: Receiver<Inbound>,
    worker: Option<JoinHandle<()>>,
    updater: Option<Updater>,
    net: Net,
    spooler: Spooler,
    page: Page,
    telemeter: Telemeter,
    notifier: Notifier,
    said: Said,
    counts: Counts,
    homeassistant: Option<HomeAssistant>,
}

/// What was published or logged last, so that only changes are.
#[derive(Default)]
struct Said {
    status: Option<Status>,
    cameras: BTreeMap<String, CameraStatus>,
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
        let library = tune::library(&config.inference, &config.device.state_dir);
        let (runtime, no_runtime) = match Runtime::load(library.as_deref()) {
            Ok(runtime) => (Some(runtime), None),
            Err(e) => {
                error!("no model yet: {e}");
                (None, Some(e.to_string()))
            }
        };

        let topics = Topics::new(&config.mqtt.prefix, &config.device.id);
        let outbox = Arc::new(Outbox::new(OUTBOX));
        let feed = Arc::new(Feed::default());
        let board = Arc::new(Board::with_feed(Arc::clone(&feed), topics.root()));
        let (shown, shown_at) = (Arc::clone(&board), topics.clone());
        let previews = Arc::new(Previews::start(move |camera, event, jpeg| {
            shown.show(&shown_at.snapshot(camera), Picture { jpeg, event });
        })?);
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

        let intake = Arc::new(Intake::default());
        let meter = Arc::new(Meter::default());
        let pulse = Arc::new(Pulse::default());
        let sampler = Arc::new(Sampler::default());
        let parts = runtime.map(|runtime| updater::Parts {
            config: config.clone(),
            origin: origin.clone(),
            runtime,
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
        let desk = updater.as_ref().map(|u| Arc::clone(u.desk()));
        let control = |way| control::Shared {
            desk: desk.clone().ok_or_else(|| no_runtime.as_deref().unwrap_or_default().into()),
            reporter: net.reporter().clone(),
            size_max: config.models.max_size,
            way,
        };
        let socket = control::socket_path(&config.device.state_dir);
        if let Err(e) = net.control(&socket, control(Way::Cli)) {
            warn!("{e:#}: the command line can't reach this service");
        }
        let page = Page::serve(&config, &net, feed, Arc::clone(&previews), control(Way::Page));
        let worker = Worker::new(
            Arc::clone(&intake),
            Arc::clone(&slot),
            Arc::clone(&outbox),
            Arc::clone(&meter),
            Arc::clone(&pulse),
            sampler,
            Arc::clone(&previews),
            origin.clone(),
            &topics,
            &config.inference,
        );
        let fleet = Fleet::new(
            Arc::clone(&intake),
            Arc::clone(&meter),
            assets::templates(None),
            &config.device.state_dir,
            previews,
        );
        let mut app = Self {
            started_us: now_us(),
            page,
            telemeter: Telemeter::default(),
            notifier: Notifier::default(),
            said: Said::default(),
            counts: Counts::default(),
            homeassistant: HomeAssistant::new(&config, &topics),
            config,
            origin,
            cores,
            no_runtime,
            slot,
            topics,
            intake,
            meter,
            outbox,
            board,
            pulse,
            fleet,
            commands: net.for_cameras(),
            worker: None,
            updater,
            net,
            spooler,
        };
        if let Err(e) = app.start_threads(worker) {
            app.stop();
            return Err(e);
        }
        app.tick();
        Ok(app)
    }

    fn start_threads(&mut self, worker: Worker) -> anyhow::Result<()> {
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
        let cameras = std::mem::take(&mut self.config.cameras);
        let started = self.fleet.apply(&cameras);
        self.forget(&started.gone);
        match started.failed.first() {
            Some(why) => Err(anyhow!("{why}")),
            None => Ok(()),
        }
    }

    /// Ticks once a second, and when there is something to do, until a signal asks for something.
    ///
    /// # Errors
    /// Only a new process helps.
    pub fn run(&mut self, signals: &Signals) -> anyhow::Result<Asked> {
        loop {
            let mut wake = Select::new();
            wake.recv(signals.bell());
            wake.recv(&self.commands);
            let _ = wake.ready_timeout(Duration::from_secs(1));
            if let Some(asked) = signals.asked() {
                return Ok(asked);
            }
            if let Some(why) = fleet::beyond_repair(&self.tick().cameras) {
                bail!(why);
            }
        }
    }

    /// Applies the cameras of the configuration as it stands now. One with problems changes nothing.
    pub fn reload(&mut self, config: Result<Config, Invalid>) {
        let config = match config {
            Ok(config) => config,
            Err(problems) => {
                return error!("the configuration is not reloaded, nothing changes: {problems}");
            }
        };
        let Changes { added, changed, removed, gone, failed } = self.fleet.apply(&config.cameras);
        let list = |ids: Vec<String>| if ids.is_empty() { "none".into() } else { ids.join(", ") };
        info!(
            "reloaded; cameras added: {}; changed: {}; removed: {}",
            list(added),
            list(changed),
            list(removed)
        );
        failed.iter().for_each(|why| error!("{why}"));
        self.forget(&gone);
        let others = self.config.differs_beside_cameras(&config);
        if !others.is_empty() {
            warn!("takes effect at the next start: {}", others.join(", "));
        }
        if let Some(live) = self.slot.load() {
            warn_of_unknown_labels(&self.fleet, &live.model);
        }
        self.tick();
    }

    /// Does what a message on `cmd/cameras/…` says, and answers where an answer is wanted.
    fn obey(&mut self, message: &Inbound) {
        let homeassistant = self.homeassistant.as_ref();
        if homeassistant.is_some_and(|h| h.hears(message, &self.board)) {
            return;
        }
        let done = switches::order(&self.topics, message).and_then(|(id, on)| {
            let switched = self.fleet.switch(&id, on);
            switched.map_err(|e| Reason::new(e.code(), e.to_string()))?;
            info!("camera {id}: switched {} over MQTT", if on { "on" } else { "off" });
            Ok(())
        });
        let answer = match done {
            Ok(()) => Answer::Done,
            Err(reason) => {
                warn!("{}: {reason}", message.topic);
                Answer::Refused(reason)
            }
        };
        let Some(to) = &message.response_topic else { return };
        match self.topics.parse_reply(to) {
            Some(id) => {
                let reply = updater::unnumbered(to.as_str().into(), &orders::reply(id, &answer));
                self.outbox.push(reply);
            }
            None => warn!(
                "{}: no answer to {to:?}: a response topic must be {}",
                message.topic,
                self.topics.reply("<id>")
            ),
        }
    }

    /// A broker keeps what was retained until an empty message takes its place.
    fn forget(&mut self, cameras: &[String]) {
        for id in cameras {
            self.board.set(&self.topics.camera_status(id), Vec::new());
            self.board.set(&self.topics.counts(id), Vec::new());
            self.counts.forget(id);
            if let Some(homeassistant) = &mut self.homeassistant {
                homeassistant.forget(id, &self.board);
            }
        }
    }

    /// Takes a snapshot and publishes what follows from it.
    pub fn tick(&mut self) -> Snapshot {
        while let Ok(message) = self.commands.try_recv() {
            self.obey(&message);
        }
        self.fleet.heal(Instant::now());
        let snapshot = self.snapshot();
        self.publish_status(&snapshot);
        self.publish_cameras(&snapshot);
        self.counts.tell(&snapshot, &self.meter, &self.origin, &self.topics, &self.board);
        if let Some(homeassistant) = &mut self.homeassistant {
            homeassistant.tell(self.fleet.settings(), snapshot.live.as_deref(), &self.board);
        }
        if self.telemeter.is_due() {
            self.publish_telemetry(&snapshot);
            self.fleet.forget_removed();
        }
        self.page.tell(&snapshot, &self.meter, self.started_us);
        self.notifier.tell(&snapshot, self.pulse.beats.load(Ordering::Relaxed));
        snapshot
    }

    /// Where the page is, if it is served.
    pub fn page(&self) -> Option<SocketAddr> {
        self.page.address()
    }

    /// The whole, now.
    pub fn snapshot(&self) -> Snapshot {
        Snapshot {
            time_us: now_us(),
            cameras: self.fleet.snapshot(),
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

    /// The place beside the worker.
    pub fn guest(&self) -> &Guest {
        &self.pulse.guest
    }

    /// The topics of this device.
    pub fn topics(&self) -> &Topics {
        &self.topics
    }

    fn publish_status(&mut self, snapshot: &Snapshot) {
        let model = snapshot.live.as_ref().map(|live| {
            let (contract, setting) = (live.model.contract(), live.model.setting());
            ModelStatus {
                identity: live.model.identity().clone(),
                epoch: live.epoch,
                labels: contract.labels.clone(),
                input: [contract.input.width, contract.input.height],
                layout: contract.layout.name(),
                provider: setting.provider.name(),
                runtime: live.model.library().to_owned(),
                threads: setting.threads,
                spinning: setting.spinning,
                bf16: setting.bf16,
                cores: self.cores.clone(),
                tuning: self.updater.as_ref().and_then(|u| u.desk().tuning()),
            }
        });
        let present = snapshot.cameras.iter().filter(|c| c.status.state != State::Removed);
        let states = present.map(|c| (c.id.clone(), c.status.state.name()));
        let status = Status {
            schema: "noblink.status/1",
            device: self.origin.device.clone(),
            boot: self.origin.boot.clone(),
            version: env!("CARGO_PKG_VERSION"),
            started: rfc3339(self.started_us),
            advice: self.advice(model.is_some()),
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
                warn_of_unknown_labels(&self.fleet, &live.model);
            }
            self.board.set(&self.topics.status(), to_json(&status));
            self.said.status = Some(status);
        }
    }

    /// What to do next, a line each: about the model, about the cameras.
    fn advice(&self, has_model: bool) -> Option<String> {
        let of_updater = || self.updater.as_ref()?.desk().view().advice;
        let model = if has_model { None } else { self.no_runtime.clone().or_else(of_updater) };
        let model = model.map(|next| format!("no model yet: {next}"));
        let camera = self.fleet.settings().next().is_none().then(|| config::NO_CAMERA.to_owned());
        let all: Vec<_> = model.into_iter().chain(camera).collect();
        (!all.is_empty()).then(|| all.join("\n"))
    }

    fn publish_cameras(&mut self, snapshot: &Snapshot) {
        let told = |id: &String| snapshot.cameras.iter().any(|c| c.id == *id);
        let gone: Vec<_> = self.said.cameras.keys().filter(|id| !told(id)).cloned().collect();
        self.forget(&gone);
        self.said.cameras.retain(|id, _| !gone.contains(id));
        for camera in &snapshot.cameras {
            let said = self.said.cameras.get(&camera.id);
            if said.is_some_and(|s| s.says_the_same(&camera.status)) {
                continue;
            }
            let reason = camera.status.reason.as_deref();
            let source = &camera.source;
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
                source: source.clone(),
                status: &camera.status,
            };
            self.board.set(&self.topics.camera_status(&camera.id), to_json(&record));
            self.said.cameras.insert(camera.id.clone(), camera.status.clone());
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
        self.fleet.stop();
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
        let mut last = self.snapshot();
        self.publish_telemetry(&last);
        last.link = self.net.stop();
        self.spooler.stop();
        last.outbox = self.outbox.stats();
        info!("stopped");
        last
    }
}

fn warn_of_unknown_labels(fleet: &Fleet, model: &Model) {
    for camera in fleet.settings() {
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

/// What goes onto the wire.
pub(crate) fn to_json(value: &impl serde::Serialize) -> Vec<u8> {
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
