//! `noblink model push|list|show|rollback|confirm|cancel`: what the running service is told and
//! asked, over its control socket.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};

use super::{Failure, Outcome, print_json};
use crate::config::Config;
use crate::control::client::Client;
use crate::control::socket_path;

/// Where the package keeps the configuration, and its service the socket.
const INSTALLED_CONFIG: &str = "/etc/noblink/noblink.toml";
const INSTALLED_RUNTIME: &str = "/run/noblink";

/// Which service.
#[derive(Debug, clap::Args)]
pub(super) struct Service {
    /// The configuration of the running service [default: /etc/noblink/noblink.toml]
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Its control socket; from the configuration when left out
    #[arg(long, value_name = "PATH")]
    socket: Option<PathBuf>,
}

/// What may be said with a model.
pub(super) struct Wish {
    pub(super) id: Option<String>,
    pub(super) manual: bool,
    pub(super) accept_slower: Option<f64>,
}

impl Service {
    pub(super) fn of(config: Option<PathBuf>, socket: Option<PathBuf>) -> Self {
        Self { config, socket }
    }

    pub(super) fn socket(&self) -> anyhow::Result<PathBuf> {
        match (&self.socket, &self.config) {
            (Some(socket), _) => Ok(socket.clone()),
            (None, Some(config)) if config != Path::new(INSTALLED_CONFIG) => {
                Ok(socket_path(&Config::load(config)?.device.state_dir))
            }
            // The service's runtime directory is rarely in the environment of who asks.
            _ => Ok(socket_path(Path::new(INSTALLED_RUNTIME))),
        }
    }
}

/// How long a pushed model's job is followed.
const FOLLOW: Duration = Duration::from_secs(3600);

/// Sends a file and follows its job.
pub(super) fn push(service: &Service, file: &Path, wish: &Wish) -> Outcome {
    let socket = service.socket()?;
    let client = Client::new(&socket);
    let name = file.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let mut model =
        std::fs::File::open(file).with_context(|| format!("{} can't be read", file.display()))?;
    let size = model.metadata().map_err(anyhow::Error::from)?.len();
    let id = wish.id.clone().map_or_else(new_id, Ok)?;
    let mut query = url::form_urlencoded::Serializer::new(String::new());
    query.append_pair("id", &id).append_pair("name", &name);
    query.append_pair("size", &size.to_string());
    query.append_pair("manual", &wish.manual.to_string());
    if let Some(ratio) = wish.accept_slower {
        query.append_pair("accept_slower", &ratio.to_string());
    }
    let stem = file.with_extension("");
    let beside = |end: &str| std::fs::read(format!("{}{end}", stem.display())).ok();
    let mut headers = Vec::new();
    if let Some(manifest) = beside(".manifest.json") {
        headers.push(("x-noblink-manifest", STANDARD.encode(manifest)));
    }
    if let Some(signature) = beside(".manifest.json.minisig") {
        headers.push(("x-noblink-signature", STANDARD.encode(signature)));
    }
    let path = format!("/api/v1/models/push?{}", query.finish());
    let answer = client.request("POST", &path, &headers, size, &mut model)?;
    accepted(&answer)?;
    follow(&client, &id)
}

/// Has the service fetch a URL and follows the job.
pub(super) fn push_url(service: &Service, url: &str, manifest: &Path, wish: &Wish) -> Outcome {
    let socket = service.socket()?;
    let client = Client::new(&socket);
    let text = std::fs::read(manifest)
        .with_context(|| format!("the manifest {} can't be read", manifest.display()))?;
    let signature = std::fs::read_to_string(format!("{}.minisig", manifest.display())).ok();
    let id = wish.id.clone().map_or_else(new_id, Ok)?;
    let install = if wish.manual { "manual" } else { "auto" };
    let mut desired = json!({
        "schema": "noblink.desired/1", "id": id, "source": url, "install": install,
        "manifest": STANDARD.encode(text),
    });
    if let Some(signature) = signature {
        desired["signature"] = signature.into();
    }
    accepted(&client.post("/api/v1/models/desired", &desired)?)?;
    follow(&client, &id)
}

fn accepted(answer: &Value) -> Outcome {
    if answer["ok"] == true {
        return Ok(());
    }
    Err(anyhow!("refused: {}", reason(&answer["reason"])).into())
}

fn reason(reason: &Value) -> String {
    let part = |key: &str| reason[key].as_str().unwrap_or("?").to_owned();
    format!("{} ({})", part("message"), part("code"))
}

/// Prints each phase and gate as it comes; ends with the job.
fn follow(client: &Client<'_>, id: &str) -> Outcome {
    let began = Instant::now();
    let (mut phases, mut gates, mut asked) = (0, 0, false);
    while began.elapsed() < FOLLOW {
        let job = client.get(&format!("/api/v1/jobs/{id}"))?;
        for gate in job["gates"].as_array().into_iter().flatten().skip(gates) {
            print_gate(gate);
            gates += 1;
        }
        for entered in job["entered"].as_array().into_iter().flatten().skip(phases) {
            say!("{}", entered[0].as_str().unwrap_or("?"));
            phases += 1;
        }
        if !asked && job["ask"].is_object() && job["phase"] == "awaiting_confirm" {
            say!("  {}: `noblink model confirm`", reason(&job["ask"]));
            asked = true;
        }
        match job["state"].as_str() {
            Some("SUCCEEDED") => {
                say!("SUCCEEDED");
                return Ok(());
            }
            Some("QUEUED" | "IN_PROGRESS") => {}
            state => {
                say!("{}: {}", state.unwrap_or("?"), reason(&job["reason"]));
                return Err(Failure::Said);
            }
        }
        std::thread::sleep(Duration::from_millis(200));
    }
    Err(anyhow!("the job goes on: `noblink model show {id}`").into())
}

fn print_gate(gate: &Value) {
    let text = |key: &str| gate[key].as_str().unwrap_or("?").to_owned();
    say!("  {:<8} {:<12} {}", text("verdict"), text("gate"), text("message"));
}

/// What runs, what is in the store, the last jobs.
pub(super) fn list(service: &Service, as_json: bool) -> Outcome {
    let socket = service.socket()?;
    let all = Client::new(&socket).get("/api/v1/models")?;
    if as_json {
        return print_json(&all);
    }
    let sha = |model: &Value| model["sha256"].as_str().unwrap_or_default().to_owned();
    let (active, previous) = (sha(&all["state"]["active"]), sha(&all["state"]["previous"]));
    say!("{:<10} {:<16} {:<12} {:<10} {:>10}  from", "", "model", "version", "sha256", "bytes");
    for model in all["models"].as_array().into_iter().flatten() {
        let digest = sha(model);
        let mark = match () {
            () if digest == active => "active",
            () if digest == previous => "previous",
            () => "",
        };
        let text = |key: &str| model[key].as_str().unwrap_or("").to_owned();
        say!(
            "{mark:<10} {:<16} {:<12} {:<10} {:>10}  {}",
            text("id"),
            text("version"),
            digest.get(..8).unwrap_or_default(),
            model["size"],
            text("from")
        );
    }
    say!("\n{:<24} {:<12} {:<7} {:<22} reason", "job", "state", "way", "from");
    for job in all["jobs"].as_array().into_iter().flatten() {
        let text = |key: &str| job[key].as_str().unwrap_or("").to_owned();
        let why = job["reason"]["code"].as_str().unwrap_or("");
        say!(
            "{:<24} {:<12} {:<7} {:<22} {why}",
            text("id"),
            text("state"),
            text("way"),
            text("from")
        );
    }
    Ok(())
}

/// A job by its id, or a model by its digest or the beginning of it: everything that is known.
pub(super) fn show(service: &Service, what: &str) -> Outcome {
    let socket = service.socket()?;
    let all = Client::new(&socket).get("/api/v1/models")?;
    let job = all["jobs"].as_array().into_iter().flatten().find(|j| j["id"] == what);
    let model =
        all["models"].as_array().into_iter().flatten().find(|m| {
            what.len() >= 4 && m["sha256"].as_str().is_some_and(|sha| sha.starts_with(what))
        });
    match job.or(model) {
        Some(found) => print_json(found),
        None => {
            Err(anyhow!("{what} is no job and no model: `noblink model list` shows both").into())
        }
    }
}

/// One of the verbs that take effect at once.
pub(super) fn command(service: &Service, verb: &str, mut body: Value) -> Outcome {
    let socket = service.socket()?;
    let client = Client::new(&socket);
    let id = new_id()?;
    body["id"] = id.clone().into();
    let answer = client.post(&format!("/api/v1/models/{verb}"), &body)?;
    accepted(&answer)?;
    if verb == "rollback" {
        return follow(&client, &id);
    }
    say!("done");
    Ok(())
}

/// An id that nobody used: 48 random bits.
fn new_id() -> anyhow::Result<String> {
    let mut random = [0u8; 6];
    getrandom::fill(&mut random).map_err(|e| anyhow!("no random numbers: {e}"))?;
    let hex: String = random.iter().map(|b| format!("{b:02x}")).collect();
    Ok(format!("cli-{hex}"))
}
