//! What a desired model says: the envelope `noblink.desired/1` and the manifest in it.
//!
//! The manifest is what is signed: its exact bytes, as they came. It is parsed once, after the
//! signature was checked over the same bytes. `policy` decides whether it may come in.

use std::collections::BTreeMap;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use jiff::Timestamp;
use serde_json::{Map, Value};

/// Ids on the wire follow the one rule for a level of a topic: `[a-z0-9][a-z0-9_-]{0,31}`.
pub use crate::config::is_slug as is_id;

use super::digest::Digest;
use super::job::{Install, Ratio, Source};
use super::json::{self, Fields};

/// What [`is_id`] asks for; reads on from "must be".
pub const ID: &str = "1 to 32 of a-z, 0-9, _ and -, the first a letter or digit";

/// Bytes of an envelope or a manifest: an MQTT packet's limit.
pub const BYTES_MAX: usize = 128 * 1024;

/// Sequences beyond this do not survive a reader whose numbers are doubles.
pub const SEQUENCE_MAX: u64 = (1 << 53) - 1;

/// Labels of one model.
const LABELS_MAX: usize = 10_000;

/// An envelope or a manifest that can't be understood.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Malformed(pub String);

/// `noblink.desired/1`: the message on `cmd/models/desired`.
#[derive(Debug, Clone, PartialEq)]
pub struct Desired {
    /// The command's id.
    pub id: String,
    /// Where to get the model.
    pub source: Source,
    /// Automatic or by confirmation.
    pub install: Install,
    /// The exact bytes of the manifest. Of an object: its own text, which nobody can have signed.
    pub manifest: Vec<u8>,
    /// The manifest came as bytes, the form that can be signed.
    pub exact: bool,
    /// The minisign text over them.
    pub signature: Option<String>,
    /// Fields that mean nothing here.
    pub unknown: Vec<String>,
}

/// The manifest: what is known of a model beside its bytes.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Manifest {
    /// The model's id.
    pub model: Option<String>,
    /// Its version.
    pub version: Option<String>,
    /// Digest of its bytes.
    pub sha256: Option<Digest>,
    /// Number of its bytes.
    pub size: Option<u64>,
    /// Must exceed the highest seen.
    pub sequence: Option<u64>,
    /// Not accepted afterwards.
    pub expires: Option<Timestamp>,
    /// `production`, `test`, …
    pub stage: Option<String>,
    /// Device ids; `*` at the end stands for anything.
    pub devices: Option<Vec<String>>,
    /// What a device must be able to do.
    pub requires: Vec<String>,
    /// `parent`, `dataset`, `metrics` and whatever else its maker notes.
    pub lineage: Map<String, Value>,
    /// `yolo8`, `yolo5`, `yolox`, `end2end`, `rtdetr`.
    pub layout: Option<String>,
    /// `input.order`: `rgb` or `bgr`.
    pub order: Option<String>,
    /// `input.scale`: `unit` or `byte`.
    pub scale: Option<String>,
    /// `input.fit`: `letterbox` or `stretch`.
    pub fit: Option<String>,
    /// Names by class index.
    pub labels: Option<Vec<String>>,
    /// The active model's labels need not all be there.
    pub allow_removed_labels: bool,
    /// Ratio of latencies that is accepted.
    pub accept_slower: Option<Ratio>,
    /// Fields that mean nothing here, `rollout` (reserved) among them.
    pub unknown: Vec<String>,
}

/// The id of a model without one: its file's stem, lower case, other characters as `-`.
pub fn slug(stem: &str) -> String {
    let mut id: String = stem
        .chars()
        .flat_map(char::to_lowercase)
        .map(|c| if c.is_ascii_alphanumeric() || c == '_' || c == '-' { c } else { '-' })
        .skip_while(|c| !c.is_ascii_alphanumeric())
        .take(32)
        .collect();
    id.truncate(id.trim_end_matches(['-', '_']).len());
    if id.is_empty() { "model".to_owned() } else { id }
}

/// Id and version of a model: the manifest's, else the metadata's (`noblink.model`,
/// `noblink.version`), else the stem's slug and the first 8 digits of the digest.
pub fn identity(
    stem: &str,
    digest: &Digest,
    metadata: (Option<&str>, Option<&str>),
    manifest: Option<&Manifest>,
) -> (String, String) {
    let id = manifest.and_then(|m| m.model.clone());
    let id = id.or_else(|| metadata.0.filter(|id| is_id(id)).map(str::to_owned));
    let version = manifest.and_then(|m| m.version.clone());
    let usable = |v: &&str| json::text(&Value::from(*v), 64).is_some();
    let version = version.or_else(|| metadata.1.filter(usable).map(str::to_owned));
    (id.unwrap_or_else(|| slug(stem)), version.unwrap_or_else(|| digest.short()))
}

impl Desired {
    /// Reads the envelope. The manifest in it is left to [`Manifest::parse`], after its signature
    /// was checked.
    pub fn parse(bytes: &[u8]) -> Result<Self, Malformed> {
        let map = json::object(bytes, BYTES_MAX).map_err(Malformed)?;
        let mut f = Fields::new(&map);
        let schema = f.text("schema", 64);
        if schema.as_deref() != Some("noblink.desired/1") {
            let got = schema.map_or("missing".to_owned(), |s| format!("\"{s}\""));
            f.problem(format!("schema is {got}: must be \"noblink.desired/1\""));
        }
        let id = f.id("id");
        let source = f.get("source", "an http:// or https:// URL, or \"mqtt\"", source);
        let install = f.get("install", "\"auto\" or \"manual\"", |v| match v.as_str()? {
            "auto" => Some(Install::Auto),
            "manual" => Some(Install::Manual),
            _ => None,
        });
        let wanted = "an object, or the base64 of the bytes that are signed";
        let manifest = f.get("manifest", wanted, |v| match v {
            Value::String(text) => STANDARD.decode(text).ok().map(|bytes| (bytes, true)),
            Value::Object(_) => Some((v.to_string().into_bytes(), false)),
            _ => None,
        });
        let signature = f.get("signature", "the text of a minisign signature", |v| {
            v.as_str().map(str::to_owned)
        });
        for (key, missing) in
            [("id", id.is_none()), ("source", source.is_none()), ("manifest", manifest.is_none())]
        {
            if missing {
                f.problem(format!("{key} is missing"));
            }
        }
        let unknown = f.unknown();
        match (f.wrong, id, source, manifest) {
            (None, Some(id), Some(source), Some((manifest, exact))) => Ok(Self {
                id,
                source,
                install: install.unwrap_or(Install::Auto),
                manifest,
                exact,
                signature,
                unknown,
            }),
            (wrong, ..) => Err(Malformed(wrong.expect("what is missing is a problem"))),
        }
    }
}

fn source(value: &Value) -> Option<Source> {
    let text = json::text(value, 2048)?;
    if text == "mqtt" {
        return Some(Source::Mqtt);
    }
    let url = url::Url::parse(&text).ok()?;
    let fits = matches!(url.scheme(), "http" | "https") && url.host_str().is_some();
    fits.then_some(Source::Url(text))
}

impl Manifest {
    /// Reads a manifest's bytes.
    pub fn parse(bytes: &[u8]) -> Result<Self, Malformed> {
        let map = json::object(bytes, BYTES_MAX).map_err(Malformed)?;
        let mut f = Fields::new(&map);
        let mut manifest = Self {
            model: f.id("model"),
            version: f.text("version", 64),
            sha256: f.get("sha256", "64 hexadecimal digits", |v| v.as_str()?.parse().ok()),
            size: f.get("size", "a number of bytes above 0", |v| v.as_u64().filter(|s| *s > 0)),
            sequence: f.get("sequence", "a whole number from 0 to 2^53-1", |v| {
                v.as_u64().filter(|s| *s <= SEQUENCE_MAX)
            }),
            expires: f.get("expires", "a time such as \"2026-10-12T00:00:00Z\"", |v| {
                v.as_str()?.parse().ok()
            }),
            stage: f.text("stage", 32),
            devices: f.texts("devices", 1000),
            requires: f.texts("requires", 32).unwrap_or_default(),
            lineage: f.get("lineage", "an object", Value::as_object).cloned().unwrap_or_default(),
            layout: f.get("layout", "yolo8, yolo5, yolox, end2end or rtdetr", |v| {
                word(v, &["yolo8", "yolo5", "yolox", "end2end", "rtdetr"])
            }),
            labels: f.get("labels", "a list of texts, or an object of texts by index", labels),
            allow_removed_labels: f.flag("allow_removed_labels"),
            accept_slower: f.get("accept_slower", "a ratio from 1 to 1000", ratio),
            ..Self::default()
        };
        if let Some(input) = f.get("input", "an object", Value::as_object) {
            let mut i = Fields::new(input);
            manifest.order = i.get("order", "rgb or bgr", |v| word(v, &["rgb", "bgr"]));
            manifest.scale = i.get("scale", "unit or byte", |v| word(v, &["unit", "byte"]));
            manifest.fit =
                i.get("fit", "letterbox or stretch", |v| word(v, &["letterbox", "stretch"]));
            manifest.unknown = i.unknown().into_iter().map(|k| format!("input.{k}")).collect();
            if let Some(wrong) = i.wrong {
                f.problem(format!("input.{wrong}"));
            }
        }
        manifest.unknown.extend(f.unknown());
        manifest.unknown.sort();
        match f.wrong {
            None => Ok(manifest),
            Some(wrong) => Err(Malformed(wrong)),
        }
    }

    /// Whether both describe the same bytes in the same way: what a session and its events are
    /// made from is equal.
    pub fn same_model(&self, other: &Self) -> bool {
        let of = |m: &Self| {
            let words = [&m.model, &m.version, &m.layout, &m.order, &m.scale, &m.fit];
            (words.map(Clone::clone), m.labels.clone())
        };
        of(self) == of(other)
    }
}

fn word(value: &Value, allowed: &[&str]) -> Option<String> {
    value.as_str().filter(|w| allowed.contains(w)).map(str::to_owned)
}

fn ratio(value: &Value) -> Option<Ratio> {
    value.as_f64().and_then(Ratio::of)
}

/// A list, or an object by index as Ultralytics writes it; every index from 0 exactly once.
fn labels(value: &Value) -> Option<Vec<String>> {
    let list: Vec<String> = match value {
        Value::Array(list) => list.iter().map(|v| json::text(v, 128)).collect::<Option<_>>()?,
        Value::Object(map) => {
            let entry =
                |(k, v): (&String, &Value)| Some((k.parse::<usize>().ok()?, json::text(v, 128)?));
            let by_index: BTreeMap<usize, String> = map.iter().map(entry).collect::<Option<_>>()?;
            let whole = by_index.keys().enumerate().all(|(i, k)| i == *k);
            if !whole || by_index.len() != map.len() {
                return None;
            }
            by_index.into_values().collect()
        }
        _ => return None,
    };
    (1..=LABELS_MAX).contains(&list.len()).then_some(list)
}
