//! The machine with its memory: store, registry and state under one `state_dir`, owned by the
//! update thread. Every event goes through [`Keeper::handle`], which commits and returns the rest.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;

use super::digest::Digest;
use super::event::{Answer, Change, Effect, Event};
use super::job::{Millis, Phase, Reason, State};
use super::machine::step;
use super::manifest::Manifest;
use super::registry::{Model, Registry};
use super::store::{Store, StoreError};
use super::tune::Tuning;

/// Changes that wait for a disk that can't be written.
const UNSAVED_MAX: usize = 1024;

/// See the module.
#[derive(Debug)]
pub struct Keeper {
    state: State,
    registry: Registry,
    store: Store,
    /// What could not be written: it goes with the next commit. Whole values, newest last.
    unsaved: Vec<Change>,
}

/// The kernel's boot id, for [`Event::Boot`].
pub fn kernel_boot() -> Result<String, StoreError> {
    let path = Path::new("/proc/sys/kernel/random/boot_id");
    let id = fs::read_to_string(path).map_err(StoreError::io(path))?;
    Ok(id.trim().to_owned())
}

impl Keeper {
    /// Opens, or makes, what `state_dir` holds. `reserve` bytes of its disk are left free.
    ///
    /// The notices are for the log and the page: a damaged registry was moved aside and which
    /// blobs were found again. Which of them was active is not known then; nothing runs but the
    /// factory model until someone installs or names one.
    pub fn open(
        state_dir: &Path,
        reserve: u64,
        now: Millis,
    ) -> Result<(Self, Vec<Reason>), StoreError> {
        let mut made = fs::DirBuilder::new();
        made.recursive(true).create(state_dir).map_err(StoreError::io(state_dir))?;
        let store = Store::open(state_dir, reserve)?;
        let (registry, damaged) = Registry::open(state_dir)?;
        let state = registry.state()?;
        let mut keeper = Self { state, registry, store, unsaved: Vec::new() };
        let mut notices = Vec::new();
        if let Some(aside) = damaged {
            let text = format!(
                "the registry was damaged and is now {}; a new one was begun. History, highest \
                 sequence and quarantine are lost, and which model was active is not known: \
                 `noblink model list` shows what the store holds, `noblink model rollback` runs it",
                aside.display()
            );
            notices.push(Reason::new("registry_damaged", text));
            keeper.find_again(now, &mut notices)?;
        }
        Ok((keeper, notices))
    }

    fn find_again(&mut self, now: Millis, notices: &mut Vec<Reason>) -> Result<(), StoreError> {
        for digest in self.store.list()? {
            let size = match self.store.load(&digest) {
                Ok(bytes) => bytes.len() as u64,
                Err(e) => {
                    notices.push(Reason::new(e.code(), e.to_string()));
                    continue;
                }
            };
            let model = Model {
                sha256: digest,
                id: "found".to_owned(),
                version: digest.short(),
                size,
                added: now,
                way: None,
                from: "store".to_owned(),
                manifest: None,
                lineage: serde_json::Value::Null,
                // Nothing refers to it: without the pin the next collection would take it.
                pinned: true,
            };
            self.registry.put_model(&model)?;
            notices.push(Reason::new("blob_found", format!("{digest} is in the store")));
        }
        Ok(())
    }

    /// The machine's state.
    pub fn state(&self) -> &State {
        &self.state
    }

    /// The blobs.
    pub fn store(&self) -> &Store {
        &self.store
    }

    /// History.
    pub fn registry(&self) -> &Registry {
        &self.registry
    }

    /// Writes a model down, or what became known of it.
    pub fn put_model(&mut self, model: &Model) -> Result<(), StoreError> {
        self.registry.put_model(model)
    }

    /// Writes down what was measured for a model.
    pub fn put_tuning(&mut self, tuning: &Tuning) -> Result<(), StoreError> {
        self.registry.put_tuning(tuning)
    }

    /// Moves the machine and commits; returns what is left to do, in order.
    ///
    /// If the commit fails, an install that just came in is refused and a swap that was to follow
    /// is not made, its job FAILED. Everything else goes on from memory (a rollback must work on a
    /// full disk) and is written with the next commit that succeeds; a process that dies before
    /// finds the older state, which is a state that was.
    ///
    /// `first` is called, before the disk is asked, with what must not wait for it: the swap back
    /// from a model that failed on probation.
    pub fn handle(&mut self, event: Event, first: &mut dyn FnMut(Effect)) -> Vec<Effect> {
        let incoming = match &event {
            Event::Install { command, .. } => Some(command.id.clone()),
            _ => None,
        };
        let now = event.now();
        let (next, mut effects) = step(self.state.clone(), event);
        let commit = effects.iter().position(|e| matches!(e, Effect::Commit(_)));
        let Some(at) = commit else {
            self.state = next;
            return effects;
        };
        let rest = effects.split_off(at + 1);
        let Some(Effect::Commit(changes)) = effects.pop() else {
            unreachable!("a commit was found there");
        };
        effects.into_iter().for_each(&mut *first);
        let effects = rest;
        let Err(e) = self.commit(changes.clone()) else {
            self.state = next;
            return effects;
        };
        let reason = Reason::new(e.code(), format!("the registry can't be written: {e}"));
        if let Some(id) = incoming {
            return vec![Effect::Answer { id, answer: Answer::Refused(reason) }];
        }
        let held = |s: &State| s.job.as_ref().is_some_and(|j| j.holds_slot());
        let forward = next.job.as_ref().filter(|j| j.command().is_some() && !held(&self.state));
        if let Some(job) = forward.filter(|j| j.phase == Some(Phase::Switching)) {
            return self.handle(Event::StorageFailed { now, serial: job.serial, reason }, first);
        }
        self.unsaved.extend(changes);
        let excess = self.unsaved.len().saturating_sub(UNSAVED_MAX);
        self.unsaved.drain(..excess);
        self.state = next;
        effects
    }

    fn commit(&mut self, mut changes: Vec<Change>) -> Result<(), StoreError> {
        changes.splice(0..0, self.unsaved.iter().cloned());
        self.registry.apply(&changes)?;
        self.unsaved.clear();
        Ok(())
    }

    /// Does [`Effect::Collect`]. Returns how many files went.
    pub fn collect(&self) -> Result<usize, StoreError> {
        let pinned = self.registry.models()?.into_iter().filter(|m| m.pinned).map(|m| m.sha256);
        let keep: BTreeSet<Digest> = self.state.in_use().chain(pinned).collect();
        self.store.collect(&keep)
    }

    /// Refuses a manifest that describes the running model's bytes in another way.
    ///
    /// The store knows one description per digest, and a rollback could not tell the two apart.
    pub fn other_manifest(&self, digest: &Digest, manifest: &Manifest) -> Option<Reason> {
        let in_slot = [self.state.slot.active, self.state.slot.previous].contains(&Some(*digest));
        let model = self.registry.model(digest).ok().flatten().filter(|_| in_slot)?;
        let bytes = STANDARD.decode(model.manifest.unwrap_or_default()).ok()?;
        let known = Manifest::parse(&bytes).unwrap_or_default();
        (!known.same_model(manifest)).then(|| {
            let text = format!(
                "{} is in the slot already, described differently: write the change into the \
                 file's own metadata, so that it becomes another model",
                digest.short()
            );
            Reason::new("other_manifest", text)
        })
    }
}

impl Event {
    /// When it happened.
    pub fn now(&self) -> Millis {
        match self {
            Self::Boot { now, .. }
            | Self::Running { now, .. }
            | Self::Stop { now }
            | Self::Install { now, .. }
            | Self::Rollback { now, .. }
            | Self::Cancel { now, .. }
            | Self::Confirm { now, .. }
            | Self::CloseBreaker { now, .. }
            | Self::Release { now, .. }
            | Self::Done { now, .. }
            | Self::Ended { now, .. }
            | Self::ProbationFailed { now, .. }
            | Self::StorageFailed { now, .. } => *now,
        }
    }
}
