//! `noblink status`: what the running service does, in a few lines or as JSON.

use std::path::PathBuf;

use serde_json::Value;

use super::registry::Service;
use super::{Outcome, print_json};
use crate::control::client::Client;

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(flatten)]
    service: Service,
    /// For machines
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: Args) -> Outcome {
    let socket: PathBuf = args.service.socket()?;
    let report = Client::new(&socket).get("/api/v1/status")?;
    if args.json {
        return print_json(&report);
    }
    let status = &report["status"];
    say!(
        "{} runs noblink {} since {}",
        text(&status["device"]),
        text(&status["version"]),
        text(&status["started"])
    );
    say!("model   {}", model(&status["model"]));
    say!("job     {}", job(&report["models"]["job"]));
    say!("link    {}", link(&report["link"]));
    for (id, camera) in report["cameras"].as_object().into_iter().flatten() {
        say!("camera  {id}: {}", self::camera(camera));
    }
    for advice in report["advice"].as_array().into_iter().flatten() {
        say!("next    {}", text(advice));
    }
    Ok(())
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or("?")
}

fn model(model: &Value) -> String {
    if model.is_null() {
        return "none".into();
    }
    let (id, version, sha) = (text(&model["id"]), text(&model["version"]), text(&model["sha256"]));
    let (width, height) = (&model["input"][0], &model["input"][1]);
    let (provider, threads) = (text(&model["provider"]), &model["threads"]);
    let digest = sha.get(..8).unwrap_or(sha);
    let (s, spins) = match (threads.as_u64(), &model["spinning"]) {
        (Some(1), _) => ("", ""),
        (_, Value::Bool(true)) => ("s", ", spinning"),
        _ => ("s", ""),
    };
    let bf16 = if model["bf16"] == true { " in bf16" } else { "" };
    let mut text = format!(
        "{id} {version} ({digest}), {width}x{height}, {provider}{bf16}, {threads} thread{s}{spins}"
    );
    if let Some(how) = model["tuning"]["text"].as_str() {
        text += &format!("\n        {}: {how}", self::text(&model["tuning"]["state"]));
    }
    text
}

fn job(job: &Value) -> String {
    match (job.is_null(), job["phase"].as_str()) {
        (true, _) => "none".into(),
        (false, Some(phase)) => format!("{} {}, {phase}", text(&job["id"]), text(&job["state"])),
        (false, None) => format!("{} {}", text(&job["id"]), text(&job["state"])),
    }
}

fn link(link: &Value) -> String {
    let state = text(&link["state"]);
    let acked = format!("{state}, {}: {} acknowledged", text(&link["broker"]), link["acked"]);
    match link["last_error"].as_str() {
        Some(error) if state != "connected" => format!("{acked}; {error}"),
        _ => acked,
    }
}

fn camera(camera: &Value) -> String {
    let state = text(&camera["state"]);
    let stream = &camera["stream"];
    match (camera["reason"].as_str(), stream.is_object()) {
        (Some(reason), _) => format!("{state}, {reason}"),
        (None, true) => {
            let codec = stream["codec"].as_str().unwrap_or("raw");
            format!("{state}, {codec} {}x{}", stream["width"], stream["height"])
        }
        (None, false) => state.to_owned(),
    }
}
