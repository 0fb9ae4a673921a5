//! What is told: jobs, swaps, `models/state`.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Instant;

use serde_json::{Value, json};
use tracing::{info, warn};

use super::super::digest::Digest;
use super::super::job::{Gate, Job, JobState, Phase, Task, Verdict, Way};
use super::super::report::{self, SwapReport};
use super::super::watch::Swapped;
use super::Thread;
use crate::app::now_us;
use crate::homeassistant::update;
use crate::meter::Outcome;
use crate::model::file::Identity;
use crate::mqtt::outbox::Record;
use crate::records::{rfc3339, rounded};
use crate::worker::Origin;

impl Thread {
    pub(super) fn report_job(&mut self, job: &Job) {
        let reason = job.reason.as_ref().or(job.ask.as_ref());
        let phase = job.phase.map(|p| json!(p).as_str().unwrap_or_default().to_owned());
        let what = format!(
            "job {} ({} by {}): {}{}{}",
            job.id,
            job.from,
            job.way.name(),
            json!(job.state).as_str().unwrap_or_default(),
            phase.map_or(String::new(), |p| format!(" {p}")),
            reason.map_or(String::new(), |r| format!(", {r}")),
        );
        match job.state {
            JobState::Rejected | JobState::Failed | JobState::TimedOut => warn!("{what}"),
            _ => info!("{what}"),
        }
        self.publish_job(job);
        if job.state.is_terminal() {
            let mut view = self.view.lock().expect("nothing panics with the view");
            *view.ended.entry(job.state).or_default() += 1;
        }
        if job.way == Way::Inbox
            && job.state.is_terminal()
            && job.state != JobState::Succeeded
            && job.phase != Some(Phase::RolledBack)
        {
            self.give_back(job);
        }
    }

    fn publish_job(&self, job: &Job) {
        let record = job_record(&self.parts.origin, job);
        let topic = self.parts.topics.models_job(&job.id);
        self.tell(topic, &record);
    }

    /// The last life may have died between the end of a job and the word of it: the job that ended
    /// last is told once more.
    pub(super) fn repeat_last_end(&self) {
        let newest = self.keeper.registry().jobs(3).unwrap_or_default();
        if let Some(job) = newest.iter().find(|j| j.state.is_terminal()) {
            self.publish_job(job);
        }
    }

    /// A file from the inbox that was refused goes back there, with the reason beside it.
    pub(super) fn give_back(&mut self, job: &Job) {
        let (Some(inbox), Some(digest), Some(reason)) = (&self.inbox, job.digest, &job.reason)
        else {
            return;
        };
        let bytes = self.keeper.store().load(&digest);
        let given =
            bytes.and_then(|bytes| inbox.give_back(&job.from, &mut bytes.as_slice(), reason));
        if let Err(e) = given {
            warn!("inbox: {} can't be put into rejected/: {e}", job.from);
        }
    }

    pub(super) fn report_swap(&mut self, swap: &Swapped, results: &[Vec<Outcome>], now: Instant) {
        let snapshot = self.parts.intake.snapshot();
        let begin = swap.at.checked_sub(report::MARGIN).unwrap_or(swap.at);
        let drops_at = |at: Instant| {
            let sample = self.drops.iter().rev().find(|(t, _)| *t <= at);
            sample.or(self.drops.front()).map_or((now, 0), |s| *s)
        };
        let (window_from, dropped_from) = drops_at(begin);
        let (oldest, dropped_oldest) =
            self.drops.front().copied().unwrap_or((window_from, dropped_from));
        let dropped_window = self.dropped() - dropped_from;
        let before_s = (window_from - oldest).as_secs_f64();
        let rate = match before_s > 0.0 {
            true => (dropped_from - dropped_oldest) as f64 / before_s,
            false => 0.0,
        };
        let expected = rate * (now - window_from).as_secs_f64();
        let unaccounted: u64 = snapshot.iter().map(|l| l.ledger.unaccounted()).sum();
        let beyond = (dropped_window as f64 - expected).max(0.0).floor() as u64;
        let mut cameras = BTreeMap::new();
        for (lane, results) in snapshot.iter().zip(results) {
            if let Some(camera) = report::camera_swap(results, swap.epoch, swap.at) {
                cameras.insert(lane.camera.to_string(), camera);
            }
        }
        let first = results.iter().flatten().filter(|r| r.epoch >= swap.epoch).map(|r| r.at).min();
        let waited_ms = (swap.at_ms - swap.commanded).max(0) as f64;
        let command_to_result_ms = first.map(|first| {
            rounded(waited_ms + first.saturating_duration_since(swap.at).as_secs_f64() * 1e3, 1)
        });
        let jobs = self.keeper.registry().jobs(16).unwrap_or_default();
        let phases_ms =
            jobs.iter().find(|j| j.serial == swap.serial).map(phases).unwrap_or_default();
        let report = SwapReport {
            schema: "noblink.swap/1",
            device: self.parts.origin.device.clone(),
            boot: self.parts.origin.boot.clone(),
            time: rfc3339(now_us()),
            job: swap.job.clone(),
            epoch: swap.epoch,
            from: swap.from.clone(),
            to: swap.to.clone(),
            reason: swap.reason.clone(),
            frames_lost: unaccounted + beyond,
            dropped_window,
            dropped_expected: rounded(expected, 1),
            overloaded: snapshot.iter().any(|l| l.overloaded),
            command_to_result_ms,
            phases_ms,
            cameras,
        };
        let name = |id: &Option<Identity>| {
            id.as_ref().map_or("none".into(), |i| format!("{} {}", i.id, i.version))
        };
        info!(
            "swap to epoch {}: {} → {}, {} frames lost",
            swap.epoch,
            name(&swap.from),
            name(&swap.to),
            report.frames_lost
        );
        self.tell(self.parts.topics.swaps(), &json!(report));
        let is_rollback = |j: &Job| j.serial == swap.serial && j.command().is_none();
        let back = swap.reason.is_some() || jobs.iter().any(is_rollback);
        let mut view = self.view.lock().expect("nothing panics with the view");
        view.swap_totals.swaps += 1;
        view.swap_totals.rollbacks += u64::from(back);
        view.swap_totals.frames_lost += report.frames_lost;
        view.last_swap = Some(report);
    }

    /// To the broker by way of the outbox, and to the page.
    fn tell(&self, topic: Arc<str>, value: &Value) {
        let record = unnumbered(topic, value);
        self.parts.board.mention(&record.topic, &record.payload);
        self.parts.outbox.push(record);
    }

    /// `models/state`, and what the control socket shows.
    pub(super) fn publish(&mut self) {
        let state = self.keeper.state();
        let live = self.parts.slot.load();
        let registry = self.keeper.registry();
        let named = |digest: Option<Digest>| {
            let model = registry.model(&digest?).ok().flatten()?;
            Some(json!({ "id": model.id, "version": model.version, "sha256": model.sha256 }))
        };
        let mut active = named(state.slot.active);
        if let Some(Value::Object(active)) = &mut active {
            active.insert("epoch".into(), json!(state.slot.epoch));
        }
        let skipped: Vec<String> = state
            .job
            .iter()
            .flat_map(|j| &j.gates)
            .chain(self.last_gates().iter())
            .filter(|g| g.verdict == Verdict::Skipped)
            .map(|g| g.gate.to_string())
            .collect::<BTreeSet<_>>()
            .into_iter()
            .collect();
        let job = state.job.as_ref().or(state.waiting.as_ref());
        let breaker: BTreeMap<&str, bool> = Way::ALL
            .iter()
            .map(|w| (w.name(), state.breakers.get(w).is_some_and(|b| b.open)))
            .collect();
        let value = json!({
            "schema": "noblink.models/1",
            "device": self.parts.origin.device,
            "boot": self.parts.origin.boot,
            "active": active,
            "previous": named(state.slot.previous),
            "job": job.map(|j| job_record(&self.parts.origin, j)),
            "breaker": breaker,
            "gates_skipped": skipped,
        });
        if self.parts.config.homeassistant.discovery_prefix.is_some() {
            let candidate = job.and_then(|j| named(j.digest)).map(|m| update::version(&m));
            let entity = update::entity(&value, candidate);
            let payload = serde_json::to_vec(&entity).expect("JSON becomes JSON");
            self.parts.board.set(&self.parts.topics.models_homeassistant(), payload);
        }
        let mut view = self.view.lock().expect("nothing panics with the view");
        if live.is_some() {
            view.advice = None;
        }
        view.models = registry.models().unwrap_or_default();
        view.jobs = registry.jobs(50).unwrap_or_default();
        if view.state != value {
            view.state = value.clone();
            drop(view);
            let payload = serde_json::to_vec(&value).expect("JSON becomes JSON");
            self.parts.board.set(&self.parts.topics.models_state(), payload);
        }
    }

    /// The gates of the last job that ended.
    pub(super) fn last_gates(&self) -> Vec<Gate> {
        let jobs = self.keeper.registry().jobs(1).unwrap_or_default();
        jobs.into_iter().next().map(|j| j.gates).unwrap_or_default()
    }
}

/// Durations by phase, from the times at which each was entered.
fn phases(job: &Job) -> BTreeMap<String, f64> {
    let ends = job.entered.iter().skip(1).map(|(_, at)| *at).chain([job.changed]);
    let name = |phase: &Phase| json!(phase).as_str().unwrap_or_default().to_owned();
    job.entered
        .iter()
        .zip(ends)
        .map(|((phase, at), end)| (name(phase), (end - at) as f64))
        .collect()
}

/// A job as it goes over the wire, `noblink.job/1`.
pub(super) fn job_record(origin: &Origin, job: &Job) -> Value {
    let task = match &job.task {
        Task::Install(_) => "install",
        Task::Rollback { .. } => "rollback",
    };
    json!({
        "schema": "noblink.job/1",
        "device": origin.device,
        "boot": origin.boot,
        "serial": job.serial,
        "id": job.id,
        "task": task,
        "way": job.way,
        "from": job.from,
        "state": job.state,
        "phase": job.phase,
        "sha256": job.digest,
        "reason": job.reason,
        "ask": job.ask,
        "gates": job.gates,
        "created": rfc3339(job.created * 1000),
        "changed": rfc3339(job.changed * 1000),
        "phases_ms": phases(job),
    })
}

/// A record that belongs to no camera: it has no number and no gap is announced for it.
pub(crate) fn unnumbered(topic: Arc<str>, value: &Value) -> Record {
    let payload = serde_json::to_vec(value).expect("JSON becomes JSON");
    Record { camera: "".into(), boot: "".into(), seq: 0, topic, payload }
}
