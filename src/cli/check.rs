//! `noblink check`: everything about a configuration that can be known without starting.

use std::path::PathBuf;

use anyhow::Context;

use super::probe::{PATIENCE, summary};
use super::{Failure, Outcome};
use crate::assets;
use crate::camera::probe;
use crate::camera::templates::Templates;
use crate::config::{Broker, Config, External, NO_CAMERA};
use crate::model::contract::Overrides;
use crate::model::engine::{EngineOptions, Model};
use crate::model::runtime::{Runtime, library_for};

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The configuration
    #[arg(long, value_name = "FILE", default_value = "/etc/noblink/noblink.toml")]
    config: PathBuf,
    /// Also look at the cameras, the broker's port and the model
    #[arg(long)]
    live: bool,
}

pub(super) fn run(args: Args) -> Outcome {
    let config = Config::load(&args.config).map_err(anyhow::Error::from)?;
    let templates = assets::templates(args.config.parent());
    let mut sound = Findings::default();
    if config.cameras.is_empty() {
        say!("-        {NO_CAMERA}");
    }
    if args.live {
        live(&config, &templates, &mut sound)?;
    } else {
        for camera in &config.cameras {
            let what = format!("camera {}", camera.id);
            sound.note(&what, templates.find(&camera.pipeline).map(|_| camera.source.to_string()));
        }
    }
    if sound.problems > 0 {
        eprintln!("{} is well-formed, with {} problem(s)", args.config.display(), sound.problems);
        return Err(Failure::Said);
    }
    say!("{} is fine", args.config.display());
    Ok(())
}

/// What was looked at, printed as it is found.
#[derive(Default)]
struct Findings {
    problems: usize,
}

impl Findings {
    fn note<E: std::fmt::Display>(&mut self, what: &str, found: Result<String, E>) {
        match found {
            Ok(text) => say!("ok       {what}: {text}"),
            Err(why) => {
                self.problems += 1;
                say!("PROBLEM  {what}: {why:#}");
            }
        }
    }
}

fn live(config: &Config, templates: &Templates, sound: &mut Findings) -> anyhow::Result<()> {
    gst::init().context("GStreamer can't be initialised")?;
    for camera in &config.cameras {
        let report = probe::probe(&camera.source, &camera.pipeline, templates, PATIENCE);
        sound.note(&format!("camera {}", camera.id), report.map(|r| summary(&r)));
    }
    sound.note("broker", broker(&config.mqtt.broker));
    let runtime = Runtime::load(library_for(&config.inference).as_deref());
    match (&config.models.factory, runtime) {
        (_, Err(e)) => sound.note::<anyhow::Error>("ONNX Runtime", Err(e.into())),
        (None, Ok(_)) => say!("-        model: none is configured (models.factory)"),
        (Some(path), Ok(runtime)) => {
            let options = EngineOptions::of(&config.inference, &config.models);
            let model = Model::open(&runtime, path, &options, &Overrides::default());
            let described =
                model.map(|m| format!("{} version {}", m.identity().id, m.identity().version));
            sound.note(&format!("model {}", path.display()), described);
        }
    }
    Ok(())
}

fn broker(broker: &Broker) -> anyhow::Result<String> {
    match broker {
        Broker::Embedded { port } => {
            let address = std::net::SocketAddr::from(([127, 0, 0, 1], *port));
            std::net::TcpListener::bind(address)
                .with_context(|| format!("port {port} is taken; set mqtt.embedded_port"))?;
            Ok(format!("the broker inside, on {address}"))
        }
        Broker::External(External { host, port, .. }) => {
            use std::net::ToSocketAddrs;
            let mut addresses = (host.as_str(), *port)
                .to_socket_addrs()
                .with_context(|| format!("{host} can't be resolved"))?;
            let address = addresses.next().with_context(|| format!("{host} has no address"))?;
            std::net::TcpStream::connect_timeout(&address, std::time::Duration::from_secs(5))
                .with_context(|| {
                    format!("{host}:{port} can't be reached; is the broker running?")
                })?;
            Ok(format!("{host}:{port} answers"))
        }
    }
}
