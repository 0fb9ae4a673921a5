//! `noblink demo`: the real service on this machine, with two cameras and a broker of its own,
//! watched by a subscriber like any other.

pub mod story;
pub mod view;

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context;

use crate::config::Config;
use crate::rtsp::{self, RtspServer};
use crate::snapshot::Snapshot;
use crate::update::job::Install;
use crate::update::push::{self, Offer};
use crate::{app::App, assets};

/// The demo's cameras: id and clip.
const CAMERAS: [(&str, &str); 2] = [("line-a", "line-a.mp4"), ("line-b", "line-b.mp4")];

/// The port that MQTT clients try by themselves.
const MQTT_PORT: u16 = 1883;
/// The page's.
const WEB_PORT: u16 = 8080;

/// What is published after how long, and what it is.
const UPDATES: [(Duration, &str, &str); 2] = [
    (
        Duration::from_secs(8),
        "plates-v2.onnx",
        "Now the ML team publishes plates 2 over MQTT: it knows scratches as well, and has another \
         input size.",
    ),
    (
        Duration::from_secs(26),
        "plates-v3.onnx",
        "Somebody publishes plates 3, which was trained badly. It is sound in form: only trying it \
         out can tell.",
    ),
];

/// How the demo runs.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// `models.probation_s`
    pub probation_s: u64,
    /// Publishes models by itself.
    pub story: bool,
    /// Another model than plates 1, without plates' calibration pictures.
    pub model: Option<PathBuf>,
    /// Cameras that are there already, instead of the demo's.
    pub urls: Vec<String>,
    /// Lines under `[inference]`.
    pub inference: String,
}

/// The running demo. Fields are dropped in this order.
pub struct Demo {
    /// The service.
    pub app: App,
    /// Address of one of the cameras, for those who want to look at it themselves.
    pub camera_url: String,
    _cameras: Option<RtspServer>,
    /// Models that are still to be published.
    updates: std::vec::IntoIter<(Duration, PathBuf, &'static str)>,
    state: PathBuf,
}

impl Demo {
    /// The model whose time has come, published over MQTT as anyone would; what to say about it.
    pub fn publish_due(&mut self, running_for: Duration) -> anyhow::Result<Option<&'static str>> {
        let Some((at, ..)) = self.updates.as_slice().first() else { return Ok(None) };
        if running_for < *at {
            return Ok(None);
        }
        let (_, file, text) = self.updates.next().expect("it was looked at above");
        let offer = Offer::read(&file, None, Install::Auto)?;
        let (broker, topics) = (self.app.broker().clone(), self.app.topics().clone());
        // Serves the chunks until the job has ended; the demo's end ends it, too.
        std::thread::Builder::new()
            .name("push".into())
            .spawn(move || push::serve(&offer, &broker, &topics, &mut |_| ()))
            .context("the demo's sender can't be started")?;
        Ok(Some(text))
    }

    /// Stops the service and leaves nothing behind.
    pub fn stop(self) -> Snapshot {
        let last = self.app.stop();
        let _ = std::fs::remove_dir_all(&self.state);
        last
    }
}

/// The demo's configuration, as a user would write it.
fn config_text(
    urls: &[(String, String)],
    (mqtt, web): (u16, u16),
    options: &Options,
    state: &Path,
    model: &Path,
    calibration: Option<&Path>,
) -> String {
    let Options { probation_s, inference, .. } = options;
    let mut text = format!(
        "[device]\nid = \"demo\"\nstate_dir = {state:?}\n\n\
         [mqtt]\nembedded = true\nembedded_port = {mqtt}\n\n\
         [web]\nlisten = \"127.0.0.1:{web}\"\n\n\
         [inference]\n{inference}\n\n\
         [models]\nfactory = {model:?}\nprobation_s = {probation_s}\n"
    );
    if let Some(dir) = calibration {
        text += &format!("\n[models.calibration]\ndir = {dir:?}\n");
    }
    for (id, url) in urls {
        text += &format!("\n[[camera]]\nid = {id:?}\nurl = {url:?}\npublish = \"all\"\n");
    }
    text
}

/// Starts cameras, broker, model and service.
pub fn start(options: &Options) -> anyhow::Result<Demo> {
    gst::init().context("GStreamer can't be initialised")?;
    let (model, calibration) = match &options.model {
        Some(model) => (std::path::absolute(model)?, None),
        None => (find("models/plates-v1.onnx")?, Some(find("models/calibration")?)),
    };
    let (server, urls) = match options.urls.as_slice() {
        [] => cameras().map(|(server, urls)| (Some(server), urls))?,
        urls => {
            (None, urls.iter().zip(1..).map(|(u, n)| (format!("camera-{n}"), u.clone())).collect())
        }
    };
    let mut updates = Vec::new();
    for (at, file, text) in UPDATES.into_iter().filter(|_| options.story) {
        updates.push((at, find(&format!("models/{file}"))?, text));
    }
    let state = std::env::temp_dir().join(format!("noblink-demo-{}", std::process::id()));
    let (ports, calibration) = ((port(MQTT_PORT)?, port(WEB_PORT)?), calibration.as_deref());
    let text = config_text(&urls, ports, options, &state, &model, calibration);
    let config = Config::parse(&text, Path::new("."))
        .map_err(|problems| anyhow::anyhow!("the demo's configuration: {problems:?}"))?;
    let app = App::start(config)?;
    let camera_url = urls[0].1.clone();
    let updates = updates.into_iter();
    Ok(Demo { app, camera_url, _cameras: server, updates, state })
}

/// The demo's two cameras; ids and addresses.
fn cameras() -> anyhow::Result<(RtspServer, Vec<(String, String)>)> {
    let server = RtspServer::start(&rtsp::Settings::default())
        .context("the demo's cameras can't be started")?;
    let mut urls = Vec::new();
    for (id, clip) in clips()? {
        let path = format!("/{id}");
        server.mount_clip(&path, &clip, true)?;
        urls.push((id.to_owned(), server.url(&path)));
    }
    Ok((server, urls))
}

/// What the demo's two cameras send, by their ids.
pub fn clips() -> anyhow::Result<[(&'static str, PathBuf); 2]> {
    let [a, b] = CAMERAS;
    let clip = |(id, file)| anyhow::Ok((id, find(&format!("models/clips/{file}"))?));
    Ok([clip(a)?, clip(b)?])
}

fn find(relative: &str) -> anyhow::Result<PathBuf> {
    assets::find(relative).map_err(|e| anyhow::anyhow!("{e}; run the demo from a checkout"))
}

/// The usual port when nobody listens there, else a free one.
fn port(usual: u16) -> anyhow::Result<u16> {
    let probe = |port| std::net::TcpListener::bind(("127.0.0.1", port));
    let listener = probe(usual).or_else(|_| probe(0)).context("no TCP port is free")?;
    Ok(listener.local_addr()?.port())
}
