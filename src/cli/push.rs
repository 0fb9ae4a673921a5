//! `noblink model push`: sends a model to a device and shows what becomes of it.

use std::io::IsTerminal;
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::anyhow;

use super::registry::{self, Service, Wish};
use super::{Failure, Outcome};
use crate::config::{Broker, Config, External, PREFIX_ALLOWED, is_prefix, is_slug};
use crate::mqtt::failure::shown;
use crate::mqtt::topics::Topics;
use crate::update::job::{Install, JobState, Phase};
use crate::update::push::{JobNews, News, Offer, serve};

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The ONNX file; best.manifest.json and its .minisig beside best.onnx go with it. Or a URL
    /// that the service fetches, with --manifest
    file: String,
    /// Over MQTT, in chunks that the device asks for, instead of the control socket
    #[arg(long)]
    mqtt: bool,
    /// The manifest of a URL's model
    #[arg(long, value_name = "FILE", conflicts_with = "mqtt")]
    manifest: Option<PathBuf>,
    /// Allow a model that is so many times slower than the active one
    #[arg(long, value_name = "RATIO", conflicts_with = "mqtt")]
    accept_slower: Option<f64>,
    /// The control socket, when it is not the configuration's
    #[arg(long, value_name = "PATH", conflicts_with = "mqtt")]
    socket: Option<PathBuf>,
    #[command(flatten)]
    over: OverMqtt,
    /// The command's id; one id is one job (default: made from the digest and the time)
    #[arg(long, value_parser = slug)]
    id: Option<String>,
    /// Stop at a proven, loaded candidate, and wait for `confirm`
    #[arg(long)]
    manual: bool,
}

#[derive(Debug, clap::Args)]
struct OverMqtt {
    /// The broker: mqtt://host:1883 or mqtts://host:8883
    #[arg(long, value_name = "URL", requires = "mqtt")]
    broker: Option<String>,
    /// The device's id
    #[arg(long, value_parser = slug, requires = "mqtt")]
    device: Option<String>,
    /// The service's configuration: its control socket, or its broker, login and device
    #[arg(long, value_name = "FILE", conflicts_with = "broker")]
    config: Option<PathBuf>,
    /// User name at the broker
    #[arg(long, requires = "broker")]
    username: Option<String>,
    /// File that holds the password
    #[arg(long, value_name = "FILE", requires = "username")]
    password_file: Option<PathBuf>,
    /// PEM file with the broker's CA, instead of the system's roots
    #[arg(long, value_name = "FILE", requires = "broker")]
    ca_file: Option<PathBuf>,
    /// First level of the topics (default: noblink)
    #[arg(long, requires = "broker", value_parser = prefix)]
    prefix: Option<String>,
}

fn slug(text: &str) -> Result<String, String> {
    let why = "must be 1 to 32 of a-z, 0-9, _ and -, starting with a letter or digit";
    if is_slug(text) { Ok(text.to_owned()) } else { Err(why.to_owned()) }
}

fn prefix(text: &str) -> Result<String, String> {
    if is_prefix(text) { Ok(text.to_owned()) } else { Err(format!("must be {PREFIX_ALLOWED}")) }
}

/// To the service on this machine.
fn over_socket(args: &Args) -> Outcome {
    let config = args.over.config.clone();
    let service = Service::of(config, args.socket.clone());
    let wish = Wish { id: args.id.clone(), manual: args.manual, accept_slower: args.accept_slower };
    match (args.file.contains("://"), &args.manifest) {
        (false, _) => registry::push(&service, Path::new(&args.file), &wish),
        (true, Some(manifest)) => registry::push_url(&service, &args.file, manifest, &wish),
        (true, None) => {
            let text = "a model from a URL needs --manifest FILE, which names its sha256 and size";
            Err(anyhow!(text).into())
        }
    }
}

pub(super) fn run(args: Args) -> Outcome {
    if !args.mqtt {
        return over_socket(&args);
    }
    let install = if args.manual { Install::Manual } else { Install::Auto };
    let offer = Offer::read(Path::new(&args.file), args.id, install)?;
    let (broker, topics, device) = args.over.resolve()?;
    say!(
        "{}: {} bytes, sha256 {}, job {}, to {device} by {}",
        args.file,
        offer.size(),
        offer.digest,
        offer.id,
        shown(&broker)
    );
    let mut view = View { device, size: offer.size(), percent: None, last: String::new() };
    let end = serve(&offer, &broker, &topics, &mut |news| view.show(news))?;
    if end.state == JobState::Succeeded { Ok(()) } else { Err(Failure::Said) }
}

impl OverMqtt {
    fn resolve(self) -> Result<(External, Topics, String), Failure> {
        let Some(file) = self.config else {
            let (Some(url), Some(device)) = (self.broker, self.device) else {
                let text = "--mqtt needs --broker URL and --device ID, or --config FILE\n";
                clap::Error::raw(clap::error::ErrorKind::MissingRequiredArgument, text).exit()
            };
            let mut broker = External::at(&url).unwrap_or_else(|why| {
                // Not a parser of clap's: it would print the URL, which may hold a password.
                let text = format!("--broker {why}\n");
                clap::Error::raw(clap::error::ErrorKind::ValueValidation, text).exit()
            });
            broker.username = self.username;
            broker.password_file = self.password_file;
            broker.ca_file = self.ca_file;
            let prefix = self.prefix.as_deref().unwrap_or("noblink");
            return Ok((broker, Topics::new(prefix, &device), device));
        };
        let config = Config::load(&file).map_err(Failure::Config)?;
        let device = self.device.unwrap_or(config.device.id);
        let broker = match config.mqtt.broker {
            Broker::External(external) => external,
            Broker::Embedded { port } => External::at(&format!("mqtt://127.0.0.1:{port}"))
                .map_err(|why| anyhow!("the broker inside {why}"))?,
        };
        Ok((broker, Topics::new(&config.mqtt.prefix, &device), device))
    }
}

/// What was shown last, so that only changes are.
struct View {
    device: String,
    size: u64,
    percent: Option<u64>,
    last: String,
}

impl View {
    fn show(&mut self, news: News) {
        let line = match news {
            News::Connected => "desired is published; serving chunks until the job ends".to_owned(),
            News::Lost(why) => format!("{why}; trying again"),
            News::Device { online: true } => format!("{} is online", self.device),
            News::Device { online: false } => {
                format!("{} is offline: it will take the model when it is back", self.device)
            }
            News::Asked(bytes) => return self.ask(bytes),
            News::Job(job) => self.job(&job),
        };
        if self.last != line {
            say!("{line}");
            self.last = line;
        }
    }

    /// Every tenth, and on a terminal every hundredth on one line.
    fn ask(&mut self, bytes: u64) {
        let percent = bytes * 100 / self.size.max(1);
        if std::io::stdout().is_terminal() {
            // Only looks are lost where it can't be written.
            let mut out = std::io::stdout();
            let end = if percent == 100 { "\n" } else { "" };
            let _ = write!(out, "\r{percent} % asked for{end}").and_then(|()| out.flush());
        } else if self.percent.is_none_or(|p| percent / 10 != p / 10) {
            say!("{percent} % asked for");
        }
        self.percent = Some(percent);
    }

    fn job(&self, job: &JobNews) -> String {
        let reason = job.reason.as_ref().map(|r| format!(": {r}")).unwrap_or_default();
        let phase = match job.phase.map(serde_json::to_value) {
            Some(Ok(phase)) => phase.as_str().unwrap_or_default().to_owned(),
            _ => "waiting".to_owned(),
        };
        match job.state {
            JobState::Queued => format!("queued behind another job{reason}"),
            JobState::InProgress if job.phase == Some(Phase::AwaitingConfirm) => {
                format!("{phase}{reason}: publish {{\"id\": …}} to cmd/models/confirm")
            }
            JobState::InProgress => format!("{phase}{reason}"),
            ended => {
                let state = serde_json::to_value(ended).unwrap_or_default();
                format!("{}{reason}", state.as_str().unwrap_or_default())
            }
        }
    }
}
