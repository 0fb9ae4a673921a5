//! The configuration: one TOML file, read and checked whole before anything is started.
//!
//! `reader` walks the tables and collects every problem; this file says what the keys are, what
//! they may hold and what they are when left out. The annotated sample in `systemd/noblink.toml`
//! equals these defaults (a test says so).

mod models;
mod mqtt;
mod reader;

use std::collections::BTreeSet;
use std::fmt;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

pub use models::{Calibration, Models};
pub use mqtt::{Broker, External, Mqtt, PREFIX_ALLOWED, is_prefix};
pub use reader::{Key, Problem, is_slug};
use reader::{Reader, Section};

use crate::camera::source::Source;
use crate::mqtt::spooler::Durability;
use crate::vision::picture::Matrix;

/// What to do about a configuration without cameras, such as the one that the package installs.
pub const NO_CAMERA: &str = "no camera yet: `noblink probe URL` prints a [[camera]] section to add \
     to the configuration; then `systemctl reload noblink`";

/// Everything that the file says.
#[derive(Debug, Clone)]
pub struct Config {
    /// `[device]`
    pub device: Device,
    /// `[mqtt]`
    pub mqtt: Mqtt,
    /// `[[camera]]`; a service without one runs and says [`NO_CAMERA`].
    pub cameras: Vec<Camera>,
    /// `[inference]`
    pub inference: Inference,
    /// `[models]`
    pub models: Models,
    /// The text of all that but the cameras.
    rest: toml::Table,
    /// `[outbox]`
    pub outbox: Outbox,
    /// `[web]`
    pub web: Web,
    /// `[homeassistant]`
    pub homeassistant: HomeAssistant,
}

/// `[homeassistant]`: MQTT discovery.
#[derive(Debug, Clone)]
pub struct HomeAssistant {
    /// First level of its topics; `None` = it is told nothing.
    pub discovery_prefix: Option<String>,
}

/// `[web]`: the page.
#[derive(Debug, Clone)]
pub struct Web {
    /// Where it listens; `None` = nowhere.
    pub listen: Option<SocketAddr>,
    /// File that holds the token, read at the start.
    pub token_file: Option<PathBuf>,
}

/// `[device]`: who this box is and where it keeps what must outlive a restart.
#[derive(Debug, Clone)]
pub struct Device {
    /// One level of every topic.
    pub id: String,
    /// Created when missing.
    pub state_dir: PathBuf,
}

/// `[[camera]]`
#[derive(Debug, Clone, PartialEq)]
pub struct Camera {
    /// One level of its topics.
    pub id: String,
    /// Where the pictures come from.
    pub source: Source,
    /// Name of the template in `pipelines/`.
    pub pipeline: String,
    /// Frames a second offered to the worker at most.
    pub max_fps: Option<f64>,
    /// Which inferred frames become records.
    pub publish: Publish,
    /// Labels that are published; `None` = all.
    pub labels: Option<Vec<String>>,
    /// Least score, strictly exceeded; `None` = `[inference]`.
    pub confidence: Option<f32>,
    /// Records with objects a second at most.
    pub publish_max_hz: Option<f64>,
    /// Least time between two pictures of its events, seconds; `None` = none is sent.
    pub snapshot_interval_s: Option<f64>,
    /// Frames that may wait for the worker.
    pub queue: usize,
    /// Silence that counts as a stall, seconds.
    pub stall_timeout_s: f64,
    /// Colour matrix, forced; `None` = from the stream.
    pub color: Option<Matrix>,
    /// Files: paced by their timestamps; `false` = as fast as they are inferred.
    pub realtime: bool,
    /// Files: start again at the end.
    pub repeat: bool,
}

impl Camera {
    /// Whether frames come in the same way: what else differs needs no new connection.
    pub fn streams_like(&self, other: &Self) -> bool {
        let stream = |c: &Self| (c.source.clone(), c.pipeline.clone(), c.color);
        let pace = |c: &Self| (c.stall_timeout_s, c.realtime, c.repeat);
        stream(self) == stream(other) && pace(self) == pace(other)
    }
}

/// `publish`
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Publish {
    /// Inferred frames with objects.
    Objects,
    /// Every inferred frame.
    All,
}

/// `[inference]`
#[derive(Debug, Clone)]
pub struct Inference {
    /// ONNX Runtime's execution provider; `None` = `auto`: the fastest that agrees, measured here.
    pub provider: Option<Provider>,
    /// Threads of one run, the worker's own among them; with `auto` at most.
    pub threads: usize,
    /// Cores of the worker and of its session's threads; `None` = chosen from the machine.
    pub cores: Option<Vec<usize>>,
    /// Least score, strictly exceeded.
    pub confidence: f32,
    /// Overlap from which the weaker of two boxes of a class goes.
    pub iou: f32,
    /// ONNX Runtime's library; `None` = looked for beside the program.
    pub library: Option<PathBuf>,
}

impl Default for Inference {
    fn default() -> Self {
        Self { provider: None, threads: 2, cores: None, confidence: 0.25, iou: 0.7, library: None }
    }
}

/// `[outbox]`: records that wait for the broker on disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Outbox {
    /// Greatest size of the file.
    pub max_bytes: u64,
    /// What a power cut may cost.
    pub durability: Durability,
}

impl Default for Outbox {
    fn default() -> Self {
        Self { max_bytes: 512_000_000, durability: Durability::Memory }
    }
}

/// ONNX Runtime's execution providers that noblink knows how to register.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Provider {
    /// The library's own CPU kernels.
    Cpu,
    /// Intel's OpenVINO.
    OpenVino,
    /// NVIDIA's CUDA.
    Cuda,
    /// NVIDIA's TensorRT.
    TensorRt,
}

impl Provider {
    pub(crate) const NAMES: [(&str, Self); 4] = [
        ("cpu", Self::Cpu),
        ("openvino", Self::OpenVino),
        ("cuda", Self::Cuda),
        ("tensorrt", Self::TensorRt),
    ];

    /// The name in the configuration.
    pub fn name(self) -> &'static str {
        Self::NAMES.iter().find(|(_, p)| *p == self).expect("every provider has a name").0
    }

    /// Looks a name up.
    pub fn parse(name: &str) -> Option<Self> {
        Self::NAMES.iter().find(|(n, _)| *n == name).map(|(_, p)| *p)
    }
}

/// What is wrong with a configuration: all of it.
#[derive(Debug)]
pub struct Invalid {
    /// The file as it was named.
    pub file: String,
    /// At least one.
    pub problems: Vec<Problem>,
}

impl fmt::Display for Invalid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let n = self.problems.len();
        write!(f, "{}: {n} problem{}", self.file, if n == 1 { "" } else { "s" })?;
        self.problems.iter().try_for_each(|p| write!(f, "\n  {p}"))
    }
}

impl std::error::Error for Invalid {}

impl Config {
    /// Reads and checks a file. Relative paths in it are taken from its folder.
    pub fn load(path: &Path) -> Result<Self, Invalid> {
        let file = path.display().to_string();
        let one = |message: String| Invalid {
            file: file.clone(),
            problems: vec![Problem { path: String::new(), message }],
        };
        let text = std::fs::read_to_string(path)
            .map_err(|e| one(format!("can't be read: {e}; name it with --config FILE")))?;
        // Absolute: the proving child works in a folder of its own.
        let absolute = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
        let base = absolute.parent().unwrap_or(Path::new("/"));
        Self::parse(&text, base).map_err(|problems| Invalid { file: file.clone(), problems })
    }

    /// Checks the text of a configuration; `base` is where its relative paths start.
    pub fn parse(text: &str, base: &Path) -> Result<Self, Vec<Problem>> {
        let table: toml::Table = text.parse().map_err(|e: toml::de::Error| {
            // Not by the error's own words: they quote the line, which may hold a camera's login.
            let before = &text[..e.span().map_or(0, |span| span.start.min(text.len()))];
            let (line, column) = (before.matches('\n').count() + 1, before.lines().last());
            let column = column.filter(|_| !before.ends_with('\n')).unwrap_or_default();
            let column = column.chars().count() + 1;
            let message = format!("is not TOML: line {line}, column {column}: {}", e.message());
            vec![Problem { path: String::new(), message }]
        })?;
        let reader = Reader::new(base);
        let config = read(&reader, &table);
        reader.finish().map(|()| config.expect("a configuration without problems is complete"))
    }

    /// The keys outside of `[[camera]]` that differ.
    pub fn differs_beside_cameras(&self, other: &Self) -> Vec<String> {
        let mut found = Vec::new();
        differences(&self.rest, &other.rest, "", &mut found);
        found
    }

    /// Every key that a configuration may hold, in the file's order.
    pub fn keys() -> Vec<Key> {
        let reader = Reader::new(Path::new("/"));
        let all = "[device]\n[mqtt]\n[[camera]]\n[inference]\n[models]\n[outbox]\n[web]\n[homeassistant]\n";
        // The values are missing: only the reader's record of what it asked for is wanted.
        let _ = read(&reader, &all.parse().expect("the empty sections are TOML"));
        reader.into_keys()
    }
}

fn read(reader: &Reader<'_>, table: &toml::Table) -> Option<Config> {
    let mut root = reader.root(table);
    let device = root.table("device").map(device);
    let mqtt = root.table("mqtt").map(mqtt::read);
    let cameras: Vec<_> = root.tables("camera").into_iter().map(camera).collect();
    let inference = inference(root.table_or_empty("inference"));
    let models = models::read(root.table_or_empty("models"));
    let outbox = outbox(root.table_or_empty("outbox"));
    let web = web(root.table_or_empty("web"));
    let homeassistant = homeassistant(root.table_or_empty("homeassistant"));
    // By the text: a camera that is refused for something else has its id all the same.
    let sections = table.get("camera").and_then(toml::Value::as_array).into_iter().flatten();
    let ids: Vec<_> = sections.map(|c| c.get("id").and_then(toml::Value::as_str)).collect();
    for (i, id) in ids.iter().enumerate() {
        if let Some(id) = id.filter(|_| ids[..i].contains(id)) {
            root.problem(
                &format!("camera[{i}].id"),
                &format!("= \"{id}\": another camera has this id"),
            );
        }
    }
    root.finish();
    Some(Config {
        device: device??,
        mqtt: mqtt??,
        cameras: cameras.into_iter().collect::<Option<_>>()?,
        inference: inference?,
        models: models?,
        rest: table.clone().into_iter().filter(|(key, _)| key != "camera").collect(),
        outbox: outbox?,
        web: web?,
        homeassistant,
    })
}

/// The paths of the keys that differ.
fn differences(a: &toml::Table, b: &toml::Table, at: &str, found: &mut Vec<String>) {
    let keys: BTreeSet<_> = a.keys().chain(b.keys()).collect();
    for key in keys {
        let (path, empty) = (format!("{at}{key}"), toml::Table::new());
        let inner =
            |t: Option<&toml::Value>| t.map_or(Some(empty.clone()), |v| v.as_table().cloned());
        match (a.get(key), b.get(key)) {
            (a, b) if a == b => {}
            (a, b) => match (inner(a), inner(b)) {
                (Some(a), Some(b)) => differences(&a, &b, &format!("{path}."), found),
                _ => found.push(path),
            },
        }
    }
}

fn device(mut s: Section<'_, '_>) -> Option<Device> {
    let id = s.slug("id");
    let state_dir = s.path("state_dir", Some("/var/lib/noblink"));
    s.finish();
    Some(Device { id: id?, state_dir: state_dir? })
}

fn web(mut s: Section<'_, '_>) -> Option<Web> {
    let allowed = "an IP address and a port, or \"off\"";
    let parse = |text: &str| text.parse::<SocketAddr>().ok();
    let listen =
        s.matching("listen", "127.0.0.1:8080", allowed, |l| l == "off" || parse(l).is_some());
    let listen = listen.map(|l| parse(&l));
    let token_file = s.path("token_file", None);
    let is_open = listen.flatten().is_some_and(|address| !address.ip().is_loopback());
    if is_open && token_file.is_none() {
        s.problem(
            "token_file",
            "is missing: a page that others can reach wants a token; name a file that holds one",
        );
    }
    s.finish();
    Some(Web { listen: listen?, token_file })
}

fn homeassistant(mut s: Section<'_, '_>) -> HomeAssistant {
    let discovery_prefix = s.string("discovery_prefix", PREFIX_ALLOWED);
    if let Some(prefix) = discovery_prefix.as_ref().filter(|p| !is_prefix(p)) {
        s.problem("discovery_prefix", &format!("= {prefix:?}: must be {PREFIX_ALLOWED}"));
    }
    s.finish();
    HomeAssistant { discovery_prefix }
}

fn camera(mut s: Section<'_, '_>) -> Option<Camera> {
    let id = s.slug("id");
    let url = s.required_string("url", "rtsp://, rtsps://, file://, v4l2:// or test://");
    let source = url.and_then(|url| match Source::parse(&url) {
        Ok(source) => Some(source),
        Err(e) => {
            s.problem("url", &format!("= \"{}\": {e}", crate::camera::source::mask(&url)));
            None
        }
    });
    let default_pipeline = source.as_ref().map_or("rtsp", Source::default_pipeline);
    let pipeline = s.matching(
        "pipeline",
        default_pipeline,
        "the name of a template in pipelines/: a-z, 0-9, -",
        |p| {
            !p.is_empty()
                && p.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
        },
    );
    let max_fps = s.number("max_fps", 0.01..=240.0, None);
    let publish = s.choice(
        "publish",
        &[("objects", Publish::Objects), ("all", Publish::All)],
        Publish::Objects,
    );
    let labels = s.strings("labels", "a list of labels of the model");
    let confidence = s.number("confidence", 0.01..=0.99, None);
    let publish_max_hz = s.number("publish_max_hz", 0.01..=240.0, None);
    let snapshot_interval_s = s.number("snapshot_interval_s", 1.0..=3600.0, None);
    let queue = s.integer("queue", 1..=64, Some(4));
    let stall_timeout_s = s.number("stall_timeout_s", 1.0..=300.0, Some(5.0));
    let color = s.optional_choice("color", &[("bt601", Matrix::Bt601), ("bt709", Matrix::Bt709)]);
    let realtime = s.flag("realtime", true);
    let repeat = s.flag("loop", false);
    if let Some(source) = &source
        && !source.is_file()
    {
        for key in ["realtime", "loop"] {
            if s.has(key) {
                s.problem(key, "goes with a file:// url: remove it");
            }
        }
    }
    s.finish();
    Some(Camera {
        id: id?,
        source: source?,
        pipeline: pipeline?,
        max_fps,
        publish: publish?,
        labels,
        confidence: confidence.map(|c| c as f32),
        publish_max_hz,
        snapshot_interval_s,
        queue: queue? as usize,
        stall_timeout_s: stall_timeout_s?,
        color,
        realtime: realtime?,
        repeat: repeat?,
    })
}

fn outbox(mut s: Section<'_, '_>) -> Option<Outbox> {
    let default = Outbox::default();
    let max_mb = s.integer("max_mb", 16..=1_000_000, Some((default.max_bytes / 1_000_000) as i64));
    let choices = [("memory", Durability::Memory), ("always", Durability::Always)];
    let durability = s.choice("durability", &choices, default.durability);
    s.finish();
    Some(Outbox { max_bytes: max_mb? as u64 * 1_000_000, durability: durability? })
}

fn inference(mut s: Section<'_, '_>) -> Option<Inference> {
    let default = Inference::default();
    let mut providers = vec![("auto", None)];
    providers.extend(Provider::NAMES.map(|(name, provider)| (name, Some(provider))));
    let provider = s.choice("provider", &providers, default.provider);
    let threads = s.integer("threads", 1..=64, Some(default.threads as i64));
    let cores = s.integers("cores", 0..=1023);
    let confidence = s.number("confidence", 0.01..=0.99, Some(0.25));
    let iou = s.number("iou", 0.05..=0.99, Some(0.7));
    let library = s.path("library", None);
    s.finish();
    Some(Inference {
        provider: provider?,
        threads: threads? as usize,
        cores: cores.map(|c| c.into_iter().map(|n| n as usize).collect()),
        confidence: confidence? as f32,
        iou: iou? as f32,
        library,
    })
}
