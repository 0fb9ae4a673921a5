//! The start: tries are counted before anything is loaded, then what there is, best first.

use std::collections::{BTreeMap, VecDeque};
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use anyhow::{Context, anyhow};
use crossbeam_channel::{bounded, unbounded};
use serde_json::json;
use tracing::{error, info, warn};

use super::super::digest::Digest;
use super::super::event::Event;
use super::super::fetch;
use super::super::inbox::{Inbox, Options};
use super::super::job::Reason;
use super::super::keeper::{Keeper, kernel_boot};
use super::super::live::LiveFrames;
use super::super::registry;
use super::super::signature::PublicKey;
use super::super::start::{Origin, start_order};
use super::super::steps::{self, Bench, Fetching, StepEnd};
use super::super::store::RESERVE_BYTES;
use super::tuning::Tuner;
use super::{CHUNKS_MAX, Parts, Thread, View, frames_dir, now_ms};
use crate::affinity;
use crate::model::contract::Overrides;
use crate::model::engine::{EngineOptions, Model};
use crate::model::file::ModelFile;
use crate::model::slot::Live;

impl Thread {
    pub(super) fn open(parts: Parts, view: Arc<Mutex<View>>) -> anyhow::Result<Self> {
        affinity::pin(&parts.cores).map_err(|e| anyhow!(e))?;
        let state_dir = &parts.config.device.state_dir;
        let (mut keeper, notices) = Keeper::open(state_dir, RESERVE_BYTES, now_ms()).with_context(|| {
            format!(
                "device.state_dir = \"{}\" can't be used: name a folder that this user may write to",
                state_dir.display()
            )
        })?;
        for notice in notices {
            warn!("{notice}");
        }
        let models = &parts.config.models;
        let bench = Bench {
            runtime: Arc::clone(&parts.runtime),
            options: EngineOptions::of(&parts.config.inference, models),
            cores: parts.cores.clone(),
            store: keeper.store().clone(),
            plain: Arc::default(),
        };
        let keys = models
            .public_keys
            .iter()
            .map(|k| PublicKey::parse(k))
            .collect::<Result<Vec<_>, _>>()
            .context("models.public_keys")?;
        let options = Options::new(models.max_size, !keys.is_empty());
        let inbox_path = models.inbox.clone().unwrap_or_else(|| state_dir.join("inbox"));
        let inbox = match Inbox::open(&inbox_path, options) {
            Ok(inbox) => Some(inbox),
            Err(e) => {
                warn!("the inbox is not watched: {e}");
                None
            }
        };
        LiveFrames::clear(&frames_dir(&parts));
        let (ends, ended) = unbounded();
        let (chunks, chunks_in) = bounded(CHUNKS_MAX);
        let fetching = Fetching {
            rules: fetch::Rules {
                allowed_hosts: models.allowed_hosts.clone(),
                ca_file: models.ca_file.clone(),
            },
            size_max: models.max_size,
            board: Arc::clone(&parts.board),
            topics: parts.topics.clone(),
            chunks: chunks_in,
        };
        let tuner = Tuner::new(&parts);
        if let Some(tuner) = &tuner {
            tuner.note_death(&mut keeper);
        }
        let mut thread = Self {
            fetching,
            chunks,
            parts,
            keys,
            keeper,
            bench,
            inbox,
            ends,
            ended,
            running: None,
            warm: BTreeMap::new(),
            replies: BTreeMap::new(),
            probation: None,
            swaps: VecDeque::new(),
            terminated: None,
            drops: VecDeque::new(),
            retired: false,
            tuner,
            view,
        };
        thread.boot()?;
        thread.tune(Instant::now());
        Ok(thread)
    }

    /// Counts tries before anything is loaded, then loads what there is, best first.
    pub(super) fn boot(&mut self) -> anyhow::Result<()> {
        let kernel_boot = kernel_boot()?;
        self.repeat_last_end();
        self.handle(Event::Boot { now: now_ms(), kernel_boot });
        let factory = self.factory();
        let digest = factory.as_ref().ok().and_then(|f| f.as_ref()).map(|(d, _)| *d);
        let mut why = match &factory {
            Err(reason) => Some(reason.clone()),
            Ok(_) => None,
        };
        let mut running = None;
        for (digest, origin) in start_order(self.keeper.state(), digest) {
            let known = self.keeper.registry().model(&digest).ok().flatten();
            match self.load_now(&digest, known.as_ref()) {
                Ok(model) => {
                    running = Some((digest, origin));
                    self.warm.insert(digest, model);
                    break;
                }
                Err(reason) => {
                    error!("{} does not start: {reason}", steps::name_of(&digest, known.as_ref()));
                    why.get_or_insert(reason);
                }
            }
        }
        let model = running.map(|(digest, _)| digest);
        let from_factory = running.is_some_and(|(_, origin)| origin == Origin::Factory);
        let quarantine = why.as_ref().is_some_and(|r| r.code == "unloadable");
        if model.is_none() {
            let advice = self.advice(why.as_ref());
            error!("no model yet: {advice}");
            self.view.lock().expect("nothing panics with the view").advice = Some(advice);
        }
        self.handle(Event::Running { now: now_ms(), model, from_factory, why, quarantine });
        let slot = self.keeper.state().slot.clone();
        if let Some(model) = model.and_then(|d| self.warm.get(&d)) {
            let model = Arc::clone(model);
            let id = model.identity();
            info!("model {} version {}, epoch {}", id.id, id.version, slot.epoch);
            let fallback = slot.probation.as_ref().and(slot.previous).and_then(|previous| {
                let known = self.keeper.registry().model(&previous).ok().flatten();
                let model = self.load_now(&previous, known.as_ref()).ok()?;
                self.warm.insert(previous, Arc::clone(&model));
                Some(Live::new(model, slot.epoch + 1, None))
            });
            self.parts.slot.swap(Some(Live::new(model, slot.epoch, fallback)));
        }
        self.publish();
        Ok(())
    }

    pub(super) fn load_now(
        &self,
        digest: &Digest,
        known: Option<&registry::Model>,
    ) -> Result<Arc<Model>, Reason> {
        let overrides = steps::described(known);
        match self.bench.file(digest, &steps::name_of(digest, known), &overrides) {
            Ok(file) => self.bench.build(&file, self.setting_for(digest)),
            Err(StepEnd::Ended { reason, .. }) => Err(reason),
            Err(StepEnd::Done { .. }) => unreachable!("an error is an end"),
        }
    }

    /// The configured factory file, taken into the store: what runs can be gone back to.
    pub(super) fn factory(&mut self) -> Result<Option<(Digest, PathBuf)>, Reason> {
        let Some(path) = self.parts.config.models.factory.clone() else { return Ok(None) };
        let domains = &self.bench.options.custom_op_domains;
        let refused = |text: String| Reason::new("factory_refused", text);
        let file = ModelFile::read(&path, &Overrides::default(), domains)
            .map_err(|r| refused(r.message))?;
        let digest = Digest::of(&file.bytes);
        let size = file.bytes.len() as u64;
        if !self.keeper.store().contains(&digest) {
            let stored = self.keeper.store().stage(size, size).and_then(|mut part| {
                part.write(&file.bytes)?;
                part.finish(Some(&digest))
            });
            stored.map_err(|e| Reason::new(e.code(), e.to_string()))?;
        }
        let known = registry::Model {
            sha256: digest,
            id: file.identity.id,
            version: file.identity.version,
            size,
            added: now_ms(),
            way: None,
            from: path.display().to_string(),
            manifest: None,
            lineage: json!({}),
            pinned: false,
        };
        if self.keeper.registry().model(&digest).ok().flatten().is_none() {
            self.keeper.put_model(&known).map_err(|e| Reason::new(e.code(), e.to_string()))?;
        }
        Ok(Some((digest, path)))
    }

    pub(super) fn advice(&self, why: Option<&Reason>) -> String {
        let models = &self.parts.config.models;
        let inbox = models.inbox.clone();
        let inbox = inbox.unwrap_or_else(|| self.parts.config.device.state_dir.join("inbox"));
        let next =
            format!("put an ONNX file into {} or run `noblink model push FILE`", inbox.display());
        match why {
            Some(reason) => format!("{}; {next}", reason.message),
            None => next,
        }
    }
}
