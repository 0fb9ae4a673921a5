//! The demo's service under measurement: what the worker says is kept, models are put in.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow, ensure};
use crossbeam_channel::bounded;
use serde_json::Value;

use crate::demo::{self, Demo};
use crate::snapshot::Snapshot;
use crate::update::job::{Install, JobState, Ratio, Way};
use crate::update::orders::Order;
use crate::update::updater::Ask;

/// Longest time for one job.
const PATIENCE: Duration = Duration::from_secs(300);
/// The burst with which a camera starts is not what is measured.
const SETTLING: Duration = Duration::from_secs(8);

/// A result. Small, since a run has 50 000 of them and its memory is measured as well.
#[derive(Debug, Clone, Copy)]
pub(super) struct Seen {
    /// When, since the service was started.
    pub(super) at: Duration,
    pub(super) frame: u64,
    pub(super) epoch: u32,
    pub(super) inference_ms: f32,
    /// From the frame's arrival.
    pub(super) total_ms: f32,
}

/// The service, and everything that its worker said.
pub(super) struct Service {
    pub(super) demo: Demo,
    /// By camera, oldest first.
    pub(super) results: Vec<Vec<Seen>>,
    began: Instant,
    ticked: Instant,
}

impl Service {
    pub(super) fn start(options: &demo::Options) -> anyhow::Result<Self> {
        let began = Instant::now();
        let demo = demo::start(options)?;
        let results = vec![Vec::new(); demo.app.snapshot().cameras.len()];
        Ok(Self { demo, results, began, ticked: Instant::now() })
    }

    /// Until the cameras run evenly; what was seen until then is forgotten, but for the first.
    pub(super) fn settle(&mut self) -> anyhow::Result<Duration> {
        let deadline = Instant::now() + PATIENCE;
        while self.results.iter().all(Vec::is_empty) {
            self.step();
            ensure!(Instant::now() < deadline, "no result: do the cameras stream?");
        }
        let first = self.results.iter().filter_map(|r| r.first()).map(|r| r.at).min();
        self.run_for(SETTLING);
        self.results.iter_mut().for_each(|r| drop(r.drain(..r.len().saturating_sub(1))));
        first.context("a result was seen")
    }

    /// Keeps the service's clockwork going, and what the worker says.
    fn step(&mut self) {
        std::thread::sleep(Duration::from_millis(20));
        if self.ticked.elapsed() >= Duration::from_secs(1) {
            self.demo.app.tick();
            self.ticked = Instant::now();
        }
        let since = self.results.iter().filter_map(|r| r.last()).map(|r| r.at).min();
        let since = self.began + since.unwrap_or_default();
        for (known, new) in self.results.iter_mut().zip(self.demo.app.meter().results(since)) {
            let last = known.last().map(|r| r.at);
            let ms = |d: Duration| d.as_secs_f32() * 1e3;
            let seen = new.into_iter().map(|r| Seen {
                at: r.at - self.began,
                frame: r.frame,
                epoch: r.epoch as u32,
                inference_ms: ms(r.inference),
                total_ms: ms(r.total),
            });
            known.extend(seen.filter(|r| last.is_none_or(|last| r.at > last)));
        }
    }

    pub(super) fn run_for(&mut self, time: Duration) {
        let end = Instant::now() + time;
        while Instant::now() < end {
            self.step();
        }
    }

    /// Since the service was started.
    pub(super) fn now(&self) -> Duration {
        self.began.elapsed()
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

    /// Until the job is over and every camera has a result by the new epoch; `meanwhile` is called
    /// over and over.
    fn until_done(
        &mut self,
        id: &str,
        epoch: u32,
        mut meanwhile: impl FnMut(&Self),
    ) -> anyhow::Result<()> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            self.step();
            meanwhile(self);
            let desk = self.demo.app.desk().context("ONNX Runtime is missing")?;
            let job = desk.view().jobs.into_iter().find(|j| j.id == id);
            let over = job.as_ref().is_some_and(|j| j.state.is_terminal());
            let seen = |r: &Vec<Seen>| r.last().is_some_and(|r| r.epoch > epoch);
            if over && self.results.iter().all(seen) {
                return Ok(());
            }
            let state = job.as_ref().map(|j| j.state);
            if let Some(job) = job.filter(|j| over && j.state != JobState::Succeeded) {
                return Err(anyhow!("job {id} ended {:?}: {:?}", job.state, job.reason));
            }
            let late = Instant::now() > deadline;
            ensure!(!late, "job {id} is not over after {PATIENCE:?}, it is {state:?}");
        }
    }

    fn epoch(&self) -> u32 {
        self.results.iter().filter_map(|r| r.last()).map(|r| r.epoch).max().unwrap_or(0)
    }

    /// Puts a model in as a full update; from the command to the first result by it, milliseconds.
    pub(super) fn install(
        &mut self,
        id: &str,
        model: &Path,
        accept_slower: Option<Ratio>,
        meanwhile: impl FnMut(&Self),
    ) -> anyhow::Result<Option<f64>> {
        let bytes = std::fs::read(model).with_context(|| model.display().to_string())?;
        let desk = self.demo.app.desk().context("ONNX Runtime is missing")?;
        let mut part = desk.store().stage(bytes.len() as u64, bytes.len() as u64)?;
        part.write(&bytes)?;
        let blob = part.finish(None)?;
        let (epoch, commanded) = (self.epoch(), self.now());
        self.ask(Order::Stored {
            id: id.into(),
            name: model.file_name().unwrap_or_default().to_string_lossy().into_owned(),
            blob,
            install: Install::Auto,
            manifest: Some(br#"{"allow_removed_labels":true}"#.to_vec()),
            signature: None,
            accept_slower,
        })?;
        self.until_done(id, epoch, meanwhile)?;
        let new = |r: &&Seen| r.epoch > epoch;
        let first = self.results.iter().filter_map(|c| c.iter().find(new)).map(|r| r.at).min();
        Ok(first.map(|at| (at - commanded).as_secs_f64() * 1e3))
    }

    pub(super) fn roll_back(&mut self, id: &str) -> anyhow::Result<()> {
        let epoch = self.epoch();
        self.ask(Order::Rollback { id: id.into(), to: None })?;
        self.until_done(id, epoch, |_| {})
    }

    pub(super) fn stop(self) -> (Vec<Vec<Seen>>, Snapshot) {
        (self.results, self.demo.stop())
    }
}
