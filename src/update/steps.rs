//! The steps of a job that take time, each on a thread of its own with the worker's cores: fetch,
//! verify, prove, load. They touch nothing that runs and can be abandoned.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use crossbeam_channel::{Receiver, Sender};
use serde_json::{Value, json};

use super::digest::Digest;
use super::event::{Step, Stopped};
use super::fetch::{self, Transfer, Wanted};
use super::gates::{self, End, Limits, Request, Rules, Subject};
use super::job::{Command, Gate, Ratio, Reason, Source, Verdict};
use super::live::LiveSource;
use super::manifest::{self, Manifest};
use super::registry;
use super::store::{Store, StoreError};
use crate::model::contract::Overrides;
use crate::model::engine::{EngineOptions, Model};
use crate::model::file::ModelFile;
use crate::model::options::Setting;
use crate::model::runtime::Runtime;
use crate::mqtt::board::Board;
use crate::mqtt::link::Inbound;
use crate::mqtt::topics::Topics;
use crate::{affinity, host};

/// How a step ended.
pub enum StepEnd {
    /// Well.
    Done {
        /// What was done.
        step: Step,
        /// Gates that ran.
        gates: Vec<Gate>,
        /// A session that was built.
        model: Option<Arc<Model>>,
        /// What became known of the model.
        known: Option<Box<registry::Model>>,
    },
    /// It ends the job.
    Ended {
        /// As what.
        how: Stopped,
        /// Why.
        reason: Reason,
        /// Gates that ran.
        gates: Vec<Gate>,
        /// The model is at fault.
        quarantine: bool,
    },
}

impl StepEnd {
    pub(super) fn done(step: Step, gates: Vec<Gate>) -> Self {
        Self::Done { step, gates, model: None, known: None }
    }

    fn failed(reason: Reason) -> Self {
        Self::Ended { how: Stopped::Failed, reason, gates: Vec::new(), quarantine: false }
    }

    fn rejected(reason: Reason, gates: Vec<Gate>) -> Self {
        Self::Ended { how: Stopped::Rejected, reason, gates, quarantine: false }
    }
}

impl From<StoreError> for StepEnd {
    fn from(e: StoreError) -> Self {
        Self::failed(Reason::new(e.code(), e.to_string()))
    }
}

/// A step under way.
pub struct Running {
    /// The job.
    pub serial: u64,
    cancel: Arc<AtomicBool>,
    _thread: JoinHandle<()>,
}

impl Running {
    /// Asks it to end; what it reports afterwards is about a job that is over.
    pub fn abandon(&self) {
        self.cancel.store(true, Ordering::Release);
    }
}

/// What steps work with.
#[derive(Clone)]
pub struct Bench {
    /// ONNX Runtime.
    pub runtime: Arc<Runtime>,
    /// How sessions are built; its setting is the reference.
    pub options: EngineOptions,
    /// The worker's cores.
    pub cores: Vec<usize>,
    /// The blobs.
    pub store: Store,
    /// Models that were proved with the reference, as the active model's setting failed them.
    pub plain: Arc<Mutex<BTreeSet<Digest>>>,
}

impl Bench {
    /// Runs `step` on a thread; its end goes to `ends`.
    pub fn run<End: Send + 'static>(
        &self,
        serial: u64,
        ends: &Sender<(u64, End)>,
        step: impl FnOnce(&Self, &Arc<AtomicBool>) -> End + Send + 'static,
    ) -> std::io::Result<Running> {
        let cancel = Arc::new(AtomicBool::new(false));
        let (bench, ends, flag) = (self.clone(), ends.clone(), Arc::clone(&cancel));
        let thread = std::thread::Builder::new().name("step".into()).spawn(move || {
            if let Err(why) = affinity::pin(&bench.cores) {
                tracing::warn!("a step is not pinned: {why}");
            }
            // The cameras come first: what a step does can wait, and takes what they leave.
            if let Err(why) = host::lower_priority(host::NICE) {
                tracing::warn!("a step keeps its priority: {why}");
            }
            let end = step(&bench, &flag);
            // The update thread is gone = the process ends.
            let _ = ends.send((serial, end));
        })?;
        Ok(Running { serial, cancel, _thread: thread })
    }

    /// A blob with the description that the registry or its manifest gives.
    pub fn file(
        &self,
        digest: &Digest,
        name: &str,
        overrides: &Overrides,
    ) -> Result<ModelFile, StepEnd> {
        let bytes = self.store.load(digest)?;
        let domains = &self.options.custom_op_domains;
        let file = ModelFile::parse_digested(bytes, digest.to_string(), name, overrides, domains);
        file.map_err(|refusal| {
            let code = serde_json::to_value(refusal.code).ok();
            let code = code.and_then(|c| c.as_str().map(str::to_owned)).unwrap_or_default();
            let reason = Reason { code: code.into(), message: refusal.message };
            StepEnd::rejected(reason, Vec::new())
        })
    }

    /// Builds and warms a session; with the reference where this setting can't be had.
    pub fn build(&self, file: &ModelFile, setting: Setting) -> Result<Arc<Model>, Reason> {
        let reference = self.options.setting;
        let built = self.build_as(file, setting);
        if let (Err(why), true) = (&built, setting != reference) {
            tracing::warn!("{}: {setting} can't be used: {why}", file.identity.id);
            return self.build_as(file, reference);
        }
        built
    }

    /// The same, or nothing.
    pub fn build_as(&self, file: &ModelFile, setting: Setting) -> Result<Arc<Model>, Reason> {
        let options = EngineOptions { setting, ..self.options.clone() };
        Model::build(&self.runtime, file, &options)
            .map(Arc::new)
            .map_err(|e| Reason::new("unloadable", e.to_string()))
    }

    /// Whether only the reference was found good for this model when it was proved.
    pub fn is_plain(&self, digest: &Digest) -> bool {
        self.plain.lock().expect("nothing panics while it holds them").contains(digest)
    }
}

/// What a manifest says instead of the file.
pub fn overrides(manifest: Option<&Manifest>) -> Overrides {
    let Some(m) = manifest else { return Overrides::default() };
    let value = json!({
        "model": m.model, "version": m.version, "layout": m.layout, "labels": m.labels,
        "input": { "order": m.order, "scale": m.scale, "fit": m.fit },
    });
    // The manifest's parser has let nothing else through.
    serde_json::from_value(value).unwrap_or_default()
}

/// The manifest that a command or the registry holds as base64.
pub fn manifest_of(base64: Option<&str>) -> Option<Manifest> {
    let bytes = STANDARD.decode(base64?).ok()?;
    Manifest::parse(&bytes).ok()
}

/// Gate *identity* is the store's: bytes that are there have their digest.
fn identity_gate(digest: &Digest, size: u64, command: &Command) -> Gate {
    let signed = command.sequence.is_some_and(|(_, signed)| signed);
    Gate {
        gate: "identity".into(),
        verdict: Verdict::Passed,
        message: format!("{size} bytes with the digest {}", digest.short()),
        numbers: json!({ "sha256": digest, "size": size, "signed": signed }),
    }
}

/// Identity, structure and contract of a command's model.
pub fn verify(
    bench: &Bench,
    digest: &Digest,
    command: &Command,
    active_labels: Option<Vec<String>>,
) -> StepEnd {
    let manifest = manifest_of(command.manifest.as_deref());
    let bytes = match bench.store.load(digest) {
        Ok(bytes) => bytes,
        Err(e) => return e.into(),
    };
    let size = bytes.len() as u64;
    let rules = Rules {
        overrides: &overrides(manifest.as_ref()),
        domains: &bench.options.custom_op_domains,
        active: active_labels.as_deref(),
        allow_removed_labels: manifest.as_ref().is_some_and(|m| m.allow_removed_labels),
    };
    let content = gates::content(bytes, digest, &command.from, &rules);
    let mut gates = vec![identity_gate(digest, size, command)];
    gates.extend(content.gates);
    let file = match content.file {
        Ok(file) => file,
        Err(reason) => return StepEnd::rejected(reason, gates),
    };
    let metadata: serde_json::Map<String, Value> =
        file.scan.metadata.iter().map(|(k, v)| (k.clone(), v.as_str().into())).collect();
    let lineage = manifest.as_ref().map(|m| &m.lineage);
    let lineage = json!({ "manifest": lineage, "metadata": metadata });
    let stem = command.from.rsplit_once('.').map_or(command.from.as_str(), |(stem, _)| stem);
    let metadata = (file.scan.metadata("noblink.model"), file.scan.metadata("noblink.version"));
    let (id, version) = manifest::identity(stem, digest, metadata, manifest.as_ref());
    let known = registry::Model {
        sha256: *digest,
        id,
        version,
        size,
        added: crate::app::now_us() / 1000,
        way: Some(command.way),
        from: command.from.clone(),
        manifest: command.manifest.clone(),
        lineage,
        pinned: false,
    };
    StepEnd::Done { step: Step::Verified, gates, model: None, known: Some(Box::new(known)) }
}

/// The child process. Where no calibration folder is configured it gets live frames to look at, while
/// they come.
pub fn prove(
    bench: &Bench,
    mut request: Request,
    limits: &Limits,
    live: &LiveSource<'_>,
    cancel: &AtomicBool,
) -> StepEnd {
    let live = (request.active.is_some() && request.calibration.is_none()).then_some(live);
    let mut outcome = gates::proving::run(&request, live, limits, cancel);
    let reference = bench.options.setting;
    if let (End::Refused { reason, .. }, true) = (&outcome.end, request.engine.setting != reference)
    {
        // Perhaps not the model's doing: the verdict that counts is the reference's.
        let setting = std::mem::replace(&mut request.engine.setting, reference);
        tracing::warn!("refused with {setting}, is proved again with {reference}: {reason}");
        outcome = gates::proving::run(&request, live, limits, cancel);
        if let (End::Accepted { .. }, Some(digest)) = (&outcome.end, request.candidate.sha256) {
            bench.plain.lock().expect("nothing panics while it holds them").insert(digest);
        }
    }
    match outcome.end {
        End::Accepted { ask } => StepEnd::done(Step::Proved { ask }, outcome.gates),
        End::Refused { how, reason, quarantine } => {
            StepEnd::Ended { how, reason, gates: outcome.gates, quarantine }
        }
        // Whoever set the flag has ended the job already.
        End::Canceled => StepEnd::failed(Reason::new("canceled", "the job was abandoned")),
    }
}

/// Builds the session.
pub fn load(
    bench: &Bench,
    digest: &Digest,
    known: Option<&registry::Model>,
    setting: Setting,
) -> StepEnd {
    let file = match bench.file(digest, &name_of(digest, known), &described(known)) {
        Ok(file) => file,
        Err(end) => return end,
    };
    // It has run in the child: one more run here would take the cores from the frames.
    let options = EngineOptions { warm_up: false, ..bench.options.clone() };
    let bench = Bench { options, ..bench.clone() };
    match bench.build(&file, setting) {
        Ok(model) => {
            StepEnd::Done { step: Step::Loaded, gates: Vec::new(), model: Some(model), known: None }
        }
        Err(reason) => StepEnd::failed(reason),
    }
}

/// A name for messages.
pub fn name_of(digest: &Digest, known: Option<&registry::Model>) -> String {
    known.map_or_else(|| digest.short(), |m| format!("{} {}", m.id, m.version))
}

/// How the registry describes a model.
pub fn described(known: Option<&registry::Model>) -> Overrides {
    let manifest = manifest_of(known.and_then(|m| m.manifest.as_deref()));
    let mut overrides = overrides(manifest.as_ref());
    if let Some(known) = known {
        overrides.model = Some(known.id.clone());
        overrides.version = Some(known.version.clone());
    }
    overrides
}

/// A blob as the child reads it.
pub fn subject(bench: &Bench, digest: &Digest, name: String, overrides: Overrides) -> Subject {
    let file: PathBuf = bench.store.path(digest);
    Subject { file, name, sha256: Some(*digest), overrides }
}

/// The ratio of latencies that a command allows: the operator's, else that of a manifest that is
/// trusted.
pub fn accepted_ratio(command: &Command, manifest: Option<&Manifest>, keys: bool) -> Option<f64> {
    let signed = command.sequence.is_some_and(|(_, signed)| signed);
    let by_manifest = manifest.and_then(|m| m.accept_slower).filter(|_| signed || !keys);
    command.accept_slower.or(by_manifest).map(Ratio::factor)
}

/// Fetches what the command's source has, into the store. `chunks` brings messages on
/// `xfer/+/chunk/+`.
pub fn fetch(bench: &Bench, command: &Command, way: &Fetching, cancel: &AtomicBool) -> StepEnd {
    let (Some(digest), Some(size)) = (command.digest, command.size) else {
        let text = "the manifest of a model that is fetched must name its sha256 and size";
        return StepEnd::rejected(Reason::new("incomplete_manifest", text), Vec::new());
    };
    let done = || StepEnd::done(Step::Received { digest }, Vec::new());
    if bench.store.contains(&digest) {
        return done();
    }
    // Refused here when there is no room for it.
    let part = match bench.store.part_path(&digest, size) {
        Ok(part) => part,
        Err(e) => return e.into(),
    };
    let transfer = Transfer {
        wanted: Wanted { digest: Some(digest), size: Some(size), size_max: way.size_max },
        part: &part,
        limits: &fetch::Limits::default(),
        cancel,
        progress: &mut |_| (),
    };
    let fetched = match &command.source {
        Source::Url(url) => fetch::http(url, &way.rules, transfer),
        Source::Mqtt => {
            let mut ask = |topic: &Arc<str>, payload| way.board.tell(topic, payload);
            fetch::mqtt(&way.topics, &mut ask, &way.chunks, transfer)
        }
        Source::Store => {
            let text = "the file that was put into the store is gone: send it again";
            return StepEnd::failed(Reason::new("blob_missing", text));
        }
    };
    if let Err(e) = fetched {
        let by_the_bytes =
            matches!(e.code.name(), "digest_mismatch" | "size_mismatch" | "too_large");
        let reason = Reason::from(e);
        return match by_the_bytes {
            true => StepEnd::rejected(reason, Vec::new()),
            false => StepEnd::failed(reason),
        };
    }
    match bench.store.resume(&digest, size).and_then(|part| part.finish(Some(&digest))) {
        Ok(_) => done(),
        Err(e) => e.into(),
    }
}

/// By what and from where models are fetched.
#[derive(Clone)]
pub struct Fetching {
    /// Allow-list and roots.
    pub rules: fetch::Rules,
    /// `models.max_size_mb`, in bytes.
    pub size_max: u64,
    /// Where wishes for chunks are published.
    pub board: Arc<Board>,
    /// Their topics.
    pub topics: Topics,
    /// The chunks.
    pub chunks: Receiver<Inbound>,
}

/// The bytes of a command whose model is in the store already; others are fetched.
pub fn received(command: &Command) -> Option<StepEnd> {
    match (&command.source, command.digest) {
        (Source::Store, Some(digest)) => Some(StepEnd::done(Step::Received { digest }, Vec::new())),
        _ => None,
    }
}
