//! The sender's end of a model over MQTT: says what is desired, serves the chunks that the device
//! asks for, and hears what becomes of the job.
//!
//! ```text
//!  connected ─► cmd/models/desired (retained) ─► wants ─► chunks ─► … ─► the job's end
//!      ▲                                                                    (models/jobs/<id>,
//!      └───────────────── a lost connection begins here again ◄──────────    models/state, reply/<id>)
//! ```
//!
//! `desired` is idempotent: after a reconnect it is said again, so an end that was missed is
//! answered on `reply/<id>`. The device sets the pace: only the last wish is served.

use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, anyhow, ensure};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use crossbeam_channel::RecvTimeoutError;
use serde::Deserialize;
use serde_json::{Value, json};

use super::digest::Digest;
use super::fetch::{Want, chunk_payload};
use super::job::{Install, JobState, Phase, Reason};
use crate::config::External;
use crate::model::file::Identity;
use crate::mqtt::backoff::Class;
use crate::mqtt::failure::Failure;
use crate::mqtt::link::Inbound;
use crate::mqtt::listener::{Notice, Peer};
use crate::mqtt::topics::Topics;

/// A chunk that a broker could not deliver for so long was asked for again.
const CHUNK_EXPIRY_S: u32 = 60;

/// How often a full socket is tried again.
const RETRY: Duration = Duration::from_millis(10);

/// A manifest that is longer is none.
const MANIFEST_BYTES_MAX: u64 = 96 * 1024;

/// A model that is offered to a device.
#[derive(Debug)]
pub struct Offer {
    /// The command's id.
    pub id: String,
    /// Of the file.
    pub digest: Digest,
    /// Read once: what was announced is what is served.
    bytes: Vec<u8>,
    desired: Vec<u8>,
}

impl Offer {
    /// Reads the model and, when they are there, `best.manifest.json` and its `.minisig` beside
    /// `best.onnx`. Without an `id` one is made that no earlier command had.
    ///
    /// # Errors
    /// A file can't be read, or the manifest is for another one.
    pub fn read(file: &Path, id: Option<String>, install: Install) -> anyhow::Result<Self> {
        let shown = file.display();
        let bytes = std::fs::read(file).with_context(|| format!("{shown} can't be read"))?;
        ensure!(!bytes.is_empty(), "{shown} is empty");
        let digest = Digest::of(&bytes);
        let id = id.unwrap_or_else(|| {
            let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
            format!("push-{}-{now}", digest.short())
        });
        let mut desired = json!({
            "schema": "noblink.desired/1",
            "id": id,
            "source": "mqtt",
            "install": install,
        });
        let path = file.with_extension("manifest.json");
        let manifest = read_if_there(&path)?;
        let signature = read_if_there(&sibling(&path, ".minisig"))?;
        desired["manifest"] = match (&manifest, &signature) {
            // What is signed are these very bytes.
            (Some(manifest), Some(_)) => STANDARD.encode(manifest).into(),
            (Some(manifest), None) => complete(manifest, &digest, bytes.len())
                .map_err(|why| anyhow!("{}: {why}", path.display()))?,
            (None, _) => {
                let name = file.file_name().unwrap_or_default().to_string_lossy();
                let Identity { id, version, sha256 } = Identity::guess(&bytes, &name);
                json!({"model": id, "version": version, "sha256": sha256, "size": bytes.len()})
            }
        };
        if let (Some(_), Some(signature)) = (&manifest, signature) {
            desired["signature"] = String::from_utf8(signature)
                .map_err(|_| anyhow!("{}.minisig is no minisign text", path.display()))?
                .into();
        }
        let desired = desired.to_string().into_bytes();
        Ok(Self { id, digest, bytes, desired })
    }

    /// In bytes.
    pub fn size(&self) -> u64 {
        self.bytes.len() as u64
    }

    /// The payload of `cmd/models/desired`.
    pub fn desired(&self) -> &[u8] {
        &self.desired
    }
}

/// `x` → `x.minisig`.
fn sibling(path: &Path, extension: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(extension);
    name.into()
}

fn read_if_there(path: &Path) -> anyhow::Result<Option<Vec<u8>>> {
    match std::fs::metadata(path) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Ok(m) if m.len() > MANIFEST_BYTES_MAX => {
            return Err(anyhow!(
                "{} has {} bytes, {MANIFEST_BYTES_MAX} are allowed",
                path.display(),
                m.len()
            ));
        }
        _ => {}
    }
    std::fs::read(path).map(Some).with_context(|| format!("{} can't be read", path.display()))
}

/// A manifest that nobody signed, with digest and size, which a device needs to pull.
fn complete(manifest: &[u8], digest: &Digest, size: usize) -> Result<Value, String> {
    let mut manifest: Value =
        serde_json::from_slice(manifest).map_err(|e| format!("is no JSON: {e}"))?;
    let fields = manifest.as_object_mut().ok_or("is no JSON object")?;
    for (key, value) in [("sha256", json!(digest)), ("size", json!(size))] {
        let said = fields.entry(key).or_insert_with(|| value.clone());
        if *said != value {
            return Err(format!("{key} is {said}, the model has {value}"));
        }
    }
    Ok(manifest)
}

/// What a sender hears.
#[derive(Debug, Clone, PartialEq)]
pub enum News {
    /// The broker is there, and knows what is desired.
    Connected,
    /// The broker is away; it is tried again.
    Lost(String),
    /// What the device's `availability` says.
    Device {
        /// `online`
        online: bool,
    },
    /// So many bytes of the model were asked for.
    Asked(u64),
    /// The job changed.
    Job(JobNews),
}

/// What a device says of the job, in `models/jobs/<id>`, `models/state` and `reply/<id>`.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct JobNews {
    /// Its state.
    pub state: JobState,
    /// None while queued, and in an answer about one that ended.
    #[serde(default)]
    pub phase: Option<Phase>,
    /// Why it ended so, or what a person is asked.
    #[serde(default)]
    pub reason: Option<Reason>,
}

/// Serves the offer until its job has ended; returns how.
///
/// # Errors
/// The broker refuses us for good, or the device refuses the command.
pub fn serve(
    offer: &Offer,
    broker: &External,
    topics: &Topics,
    news: &mut dyn FnMut(News),
) -> anyhow::Result<JobNews> {
    let suffix = getrandom::u64().unwrap_or_default();
    let filters = [
        topics.xfer_want(&offer.digest.short()),
        topics.models_job(&offer.id),
        topics.models_state(),
        topics.reply(&offer.id),
        topics.availability(),
    ];
    let filters = filters.map(|f| f.to_string()).to_vec();
    let peer = Peer::connect(broker, &format!("noblink-push-{suffix:016x}"), filters)
        .map_err(|why| anyhow!(why))?;
    let mut sender = Sender { offer, topics, wanted: VecDeque::new(), said: None };
    loop {
        sender.send(&peer);
        let wait = if sender.wanted.is_empty() { Duration::from_secs(60) } else { RETRY };
        let notice = match peer.notices.recv_timeout(wait) {
            Ok(notice) => notice,
            Err(RecvTimeoutError::Timeout) => continue,
            Err(RecvTimeoutError::Disconnected) => return Err(anyhow!("the MQTT client ended")),
        };
        match notice {
            Notice::Up => {
                sender.wanted.clear();
                if peer.publish(&topics.desired(), offer.desired.clone(), true, 0) {
                    news(News::Connected);
                }
            }
            Notice::Down(Failure { text, class: Class::Refused }) => return Err(anyhow!(text)),
            Notice::Down(Failure { text, .. }) => news(News::Lost(text)),
            Notice::Message(message) => {
                if let Some(end) = sender.hear(&message, news)? {
                    return Ok(end);
                }
            }
        }
    }
}

struct Sender<'a> {
    offer: &'a Offer,
    topics: &'a Topics,
    /// Chunks of the last wish that did not go out yet: [`WANT_COUNT_MAX`] at most.
    ///
    /// [`WANT_COUNT_MAX`]: super::fetch::WANT_COUNT_MAX
    wanted: VecDeque<u32>,
    said: Option<JobNews>,
}

impl Sender<'_> {
    /// Hands over what there is room for.
    fn send(&mut self, peer: &Peer) {
        let short = self.offer.digest.short();
        while let Some(index) = self.wanted.front() {
            let topic = self.topics.xfer_chunk(&short, *index);
            let chunk = chunk_payload(&self.offer.bytes, *index);
            let chunk = chunk.expect("a wish was cut to the file's chunks");
            if !peer.publish(&topic, chunk, false, CHUNK_EXPIRY_S) {
                break;
            }
            self.wanted.pop_front();
        }
    }

    /// Returns the job's end.
    fn hear(
        &mut self,
        message: &Inbound,
        news: &mut dyn FnMut(News),
    ) -> anyhow::Result<Option<JobNews>> {
        let topic = message.topic.as_str();
        let is = |known: &str| topic == known;
        if is(&self.topics.xfer_want(&self.offer.digest.short())) {
            self.ask(&message.payload, news);
            return Ok(None);
        }
        if is(&self.topics.availability()) {
            news(News::Device { online: message.payload == b"online" });
            return Ok(None);
        }
        let Ok(mut said) = serde_json::from_slice::<Value>(&message.payload) else {
            return Ok(None);
        };
        if is(&self.topics.models_state()) {
            said = said["job"].take();
            if said["id"] != self.offer.id.as_str() {
                return Ok(None);
            }
        }
        let refused = is(&self.topics.reply(&self.offer.id)) && said["state"].is_null();
        let Ok(job) = serde_json::from_value::<JobNews>(said.clone()) else {
            return match serde_json::from_value::<Reason>(said["reason"].take()) {
                Ok(reason) if refused => Err(anyhow!("the device refuses it: {reason}")),
                _ => Ok(None),
            };
        };
        if self.said.as_ref() != Some(&job) {
            news(News::Job(job.clone()));
            self.said = Some(job.clone());
        }
        Ok(job.state.is_terminal().then_some(job))
    }

    fn ask(&mut self, payload: &[u8], news: &mut dyn FnMut(News)) {
        let Some(want) = Want::parse(payload).filter(|w| w.sha256 == self.offer.digest) else {
            return;
        };
        let indices = want.indices(self.offer.size());
        news(News::Asked((u64::from(indices.end) * want.chunk_size as u64).min(self.offer.size())));
        self.wanted = indices.collect();
    }
}
