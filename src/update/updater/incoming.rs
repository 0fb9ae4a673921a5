//! What comes in: messages, files, orders; each becomes an event of the machine.

use std::sync::Arc;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::Value;
use tracing::warn;

use super::super::digest::Digest;
use super::super::event::{Answer, Event};
use super::super::fetch;
use super::super::inbox::{Candidate, InboxEvent};
use super::super::job::{Command, Install, Ratio, Reason, Source, Way};
use super::super::manifest::{Desired, Malformed, Manifest};
use super::super::orders::{self, Order};
use super::super::policy::{Policy, Signed, admit};
use super::super::store::Blob;
use super::telling::unnumbered;
use super::{Ask, Reply, Thread, now_ms};
use crate::mqtt::link::Inbound;

impl Thread {
    pub(super) fn message(&mut self, message: Inbound) {
        if self.parts.topics.parse_chunk(&message.topic).is_some() {
            // Full: it is asked for again.
            let _ = self.chunks.try_send(message);
            return;
        }
        let Inbound { topic, payload, retained, .. } = message;
        let order = match orders::read(&self.parts.topics, &topic, &payload, retained) {
            None => return,
            Some(Err(why)) => return warn!("{why}"),
            Some(Ok(order)) => order,
        };
        let outbox = Arc::clone(&self.parts.outbox);
        let topics = self.parts.topics.clone();
        let reply: Reply = Box::new(move |value: Value| {
            let id = value["id"].as_str().unwrap_or_default().to_owned();
            outbox.push(unnumbered(topics.reply(&id), &value));
        });
        self.ask(Ask { order, way: Way::Mqtt, from: "mqtt".into(), reply });
    }

    pub(super) fn ask(&mut self, ask: Ask) {
        let Ask { order, way, from, reply } = ask;
        let now = now_ms();
        let refuse = |reply: Reply, id: &str, reason: Reason| {
            reply(orders::reply(id, &Answer::Refused(reason)));
        };
        match order {
            Order::Desired(payload) => match Desired::parse(&payload) {
                Err(e) => {
                    let reason = Reason::new("bad_command", format!("cmd/models/desired: {e}"));
                    warn!("{reason}");
                    refuse(reply, "", reason);
                }
                Ok(desired) => {
                    for unknown in &desired.unknown {
                        warn!("command {}: field \"{unknown}\" means nothing here", desired.id);
                    }
                    let wish = Wish {
                        id: desired.id,
                        way,
                        from: match &desired.source {
                            Source::Url(url) => {
                                url.rsplit('/').next().unwrap_or("model.onnx").to_owned()
                            }
                            _ => from,
                        },
                        source: desired.source,
                        blob: None,
                        install: desired.install,
                        manifest: Some(desired.manifest),
                        signature: desired.signature,
                        accept_slower: None,
                    };
                    self.replies.insert(wish.id.clone(), reply);
                    self.install(wish);
                }
            },
            Order::Stored { id, name, blob, install, manifest, signature, accept_slower } => {
                self.replies.insert(id.clone(), reply);
                self.install(Wish {
                    id,
                    way,
                    from: name,
                    source: Source::Store,
                    blob: Some(blob),
                    install,
                    manifest,
                    signature,
                    accept_slower,
                });
            }
            Order::Rollback { id, to } => {
                let target = match to.as_deref().map(|to| self.find(to)).transpose() {
                    Ok(target) => target,
                    Err(reason) => return refuse(reply, &id, reason),
                };
                self.replies.insert(id.clone(), reply);
                let target_digest = self.keeper.state().rollback_target(target);
                let warm = target_digest.is_some_and(|d| self.warm.contains_key(&d));
                let in_store = target_digest.is_some_and(|d| self.keeper.store().contains(&d));
                self.handle(Event::Rollback { now, id, way, from, to: target, warm, in_store });
            }
            Order::Cancel { id, job } => {
                self.replies.insert(id.clone(), reply);
                self.handle(Event::Cancel { now, id, job });
            }
            Order::Confirm { id, job } => {
                self.replies.insert(id.clone(), reply);
                self.handle(Event::Confirm { now, id, job });
            }
            Order::CloseBreaker { id, way } => {
                self.replies.insert(id.clone(), reply);
                self.handle(Event::CloseBreaker { now, id, way });
            }
            Order::Release { id, model } => match self.find(&model) {
                Ok(digest) => {
                    self.replies.insert(id.clone(), reply);
                    self.handle(Event::Release { now, id, digest });
                }
                Err(reason) => refuse(reply, &id, reason),
            },
        }
    }

    /// A model by its digest or the beginning of it.
    pub(super) fn find(&self, named: &str) -> Result<Digest, Reason> {
        let known = self.keeper.registry().models().unwrap_or_default();
        let fits = |d: &Digest| named.len() >= 4 && d.to_string().starts_with(named);
        let quarantined = self.keeper.state().quarantine.keys().copied();
        let mut found: Vec<_> =
            known.iter().map(|m| m.sha256).chain(quarantined).filter(fits).collect();
        found.sort_unstable();
        found.dedup();
        match found[..] {
            [digest] => Ok(digest),
            [] => Err(Reason::new(
                "unknown_model",
                format!("\"{named}\" is no model here: `noblink model list` shows what is"),
            )),
            _ => Err(Reason::new("ambiguous", format!("\"{named}\" fits {} models", found.len()))),
        }
    }

    pub(super) fn look_into_inbox(&mut self) {
        let Some(inbox) = &mut self.inbox else { return };
        for event in inbox.poll(self.keeper.store(), Duration::ZERO) {
            match event {
                InboxEvent::Candidate(candidate) => self.candidate(*candidate),
                InboxEvent::Refused { name, reason } => warn!("inbox: {name} refused: {reason}"),
                InboxEvent::Failed { name, error } => warn!("inbox: {name}: {error}; tried again"),
            }
        }
    }

    pub(super) fn candidate(&mut self, candidate: Candidate) {
        let id = candidate.job_id();
        let wish = Wish {
            id: id.clone(),
            way: Way::Inbox,
            from: candidate.name.clone(),
            source: Source::Store,
            blob: Some(candidate.blob),
            install: Install::Auto,
            manifest: candidate.manifest.clone(),
            signature: candidate.signature.clone(),
            accept_slower: None,
        };
        self.replies.insert(id.clone(), Box::new(|_| ()));
        self.install(wish);
        let Some(inbox) = &mut self.inbox else { return };
        match self.keeper.registry().jobs(64).unwrap_or_default().iter().any(|j| j.id == id) {
            true => inbox.accepted(&candidate),
            false => inbox.later(&candidate),
        }
    }

    pub(super) fn install(&mut self, wish: Wish) {
        let now = now_ms();
        let parsed = wish.manifest.as_deref().map(Manifest::parse).transpose();
        let signed = match &wish.manifest {
            Some(bytes) => Signed::check(&self.keys, wish.signature.as_deref(), bytes),
            None => Signed::No,
        };
        let models = &self.parts.config.models;
        let policy = Policy {
            keys: &self.keys,
            accept_stages: models.accept_stages.as_deref(),
            device: &self.parts.origin.device,
            built: super::BUILT_MS,
            size_max: models.max_size,
        };
        let manifest: Result<Option<&Manifest>, &Malformed> = parsed.as_ref().map(Option::as_ref);
        let digest = wish.blob.map(|b| b.digest);
        let mut admission =
            admit(&policy, manifest, &signed, digest.as_ref(), self.keeper.state(), now);
        let manifest = parsed.as_ref().ok().and_then(Option::as_ref);
        let named = digest.or(manifest.and_then(|m| m.sha256));
        if let (Ok(()), Some(digest), Some(manifest)) = (&admission, named, manifest)
            && let Some(reason) = self.keeper.other_manifest(&digest, manifest)
        {
            admission = Err(reason);
        }
        if let (Ok(()), Source::Url(url)) = (&admission, &wish.source) {
            admission = fetch::admit(url, &models.allowed_hosts).map(drop).map_err(Reason::from);
        }
        let fingerprint = Command::fingerprint(
            &wish.source,
            wish.install,
            digest.as_ref(),
            wish.manifest.as_deref(),
        );
        let command = Command {
            id: wish.id,
            way: wish.way,
            from: wish.from,
            fingerprint,
            source: wish.source,
            digest: named,
            size: wish.blob.map(|b| b.size).or(manifest.and_then(|m| m.size)),
            install: wish.install,
            sequence: manifest.and_then(|m| m.sequence).map(|s| (s, signed.is_trusted())),
            manifest: wish.manifest.map(|bytes| STANDARD.encode(bytes)),
            signature: wish.signature,
            accept_slower: wish.accept_slower,
        };
        self.handle(Event::Install { now, command: Box::new(command), admission });
        if let Some(digest) = digest {
            self.keeper.store().settle(&digest);
        }
    }
}

/// A wish to install before it is a command.
pub(super) struct Wish {
    id: String,
    way: Way,
    from: String,
    source: Source,
    blob: Option<Blob>,
    install: Install,
    manifest: Option<Vec<u8>>,
    signature: Option<String>,
    accept_slower: Option<Ratio>,
}
