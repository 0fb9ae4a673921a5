//! `noblink demo`: the real service on this machine, with two cameras and a broker of its own,
//! watched by a subscriber like any other.

pub mod view;

use std::path::{Path, PathBuf};

use anyhow::Context;

use crate::config::Config;
use crate::rtsp::{self, RtspServer};
use crate::{app::App, assets};

/// The demo's cameras: id and clip.
const CAMERAS: [(&str, &str); 2] = [("line-a", "line-a.mp4"), ("line-b", "line-b.mp4")];

/// The port that MQTT clients try by themselves.
const MQTT_PORT: u16 = 1883;

/// The running demo. Fields are dropped in this order.
pub struct Demo {
    /// The service.
    pub app: App,
    /// Address of one of the cameras, for those who want to look at it themselves.
    pub camera_url: String,
    _cameras: RtspServer,
}

/// The demo's configuration, as a user would write it.
pub fn config_text(urls: &[(String, String)], port: u16, model: &Path) -> String {
    let mut text = format!(
        "[device]\nid = \"demo\"\n\n[mqtt]\nembedded = true\nembedded_port = {port}\n\n\
         [models]\nfactory = {model:?}\n"
    );
    for (id, url) in urls {
        text += &format!("\n[[camera]]\nid = {id:?}\nurl = {url:?}\npublish = \"all\"\n");
    }
    text
}

/// Starts cameras, broker, model and service.
pub fn start() -> anyhow::Result<Demo> {
    gst::init().context("GStreamer can't be initialised")?;
    let model = find("models/plates-v1.onnx")?;
    let server = RtspServer::start(&rtsp::Settings::default())
        .context("the demo's cameras can't be started")?;
    let mut urls = Vec::new();
    for (id, clip) in CAMERAS {
        let clip = find(&format!("models/clips/{clip}"))?;
        server.mount_clip(&format!("/{id}"), &clip, true)?;
        urls.push((id.to_owned(), server.url(&format!("/{id}"))));
    }
    let config = Config::parse(&config_text(&urls, free_port()?, &model), Path::new("."))
        .map_err(|problems| anyhow::anyhow!("the demo's configuration: {problems:?}"))?;
    let app = App::start(config)?;
    Ok(Demo { app, camera_url: server.url(&format!("/{}", CAMERAS[0].0)), _cameras: server })
}

fn find(relative: &str) -> anyhow::Result<PathBuf> {
    assets::find(relative).map_err(|e| anyhow::anyhow!("{e}; run the demo from a checkout"))
}

/// The usual port when nobody listens there, else a free one.
fn free_port() -> anyhow::Result<u16> {
    let probe = |port| std::net::TcpListener::bind(("127.0.0.1", port));
    let listener = probe(MQTT_PORT).or_else(|_| probe(0)).context("no TCP port is free")?;
    Ok(listener.local_addr()?.port())
}
