//! `noblink model …`

mod calibrate;
mod sign;
mod validate;

use std::path::PathBuf;

use serde_json::json;

use super::registry::{self, Service};
use super::{Failure, Outcome, print_json, push};
use crate::model::contract::Overrides;
use crate::model::inspect::Inspection;

#[derive(Debug, clap::Subcommand)]
pub(super) enum Command {
    /// Say what a model file is, and whether noblink can run it
    Inspect {
        /// The ONNX file
        file: PathBuf,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Judge a model file as an update would be, without installing it
    Validate(validate::Args),
    /// Save frames of a camera with the model's findings as labels to correct
    Calibrate(calibrate::Args),
    /// Send a model to a device, and follow it to its end
    Push(push::Args),
    /// Make a key pair to sign models with
    Keygen(sign::KeygenArgs),
    /// Write a model's manifest and sign it
    Sign(sign::SignArgs),
    /// Say what runs, what is in the store, how the last jobs ended
    List {
        #[command(flatten)]
        service: Service,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Say everything of a job (by its id) or a model (by its digest or the beginning of it)
    Show {
        /// Which
        what: String,
        #[command(flatten)]
        service: Service,
    },
    /// Go back, at the next frame: to the previous model, or the one named
    Rollback {
        /// The model's digest, or the beginning of it
        #[arg(long, value_name = "DIGEST")]
        to: Option<String>,
        #[command(flatten)]
        service: Service,
    },
    /// Let a job that waits go on
    Confirm {
        /// The job; the waiting one when left out
        job: Option<String>,
        #[command(flatten)]
        service: Service,
    },
    /// Stop a job that has not touched the running model
    Cancel {
        /// The job; the one in progress when left out
        job: Option<String>,
        #[command(flatten)]
        service: Service,
    },
    /// Let a way in install by itself again
    CloseBreaker {
        /// inbox, mqtt or cli
        way: String,
        #[command(flatten)]
        service: Service,
    },
    /// Let a model that failed be tried again
    Release {
        /// The model's digest, or the beginning of it
        model: String,
        #[command(flatten)]
        service: Service,
    },
}

pub(super) fn run(command: Command) -> Outcome {
    match command {
        Command::Inspect { file, json } => inspect(&file, json),
        Command::Validate(args) => validate::run(args),
        Command::Calibrate(args) => calibrate::run(args),
        Command::Push(args) => push::run(args),
        Command::Keygen(args) => sign::keygen(&args),
        Command::Sign(args) => sign::sign(&args),
        Command::List { service, json } => registry::list(&service, json),
        Command::Show { what, service } => registry::show(&service, &what),
        Command::Rollback { to, service } => {
            registry::command(&service, "rollback", json!({ "to": to }))
        }
        Command::Confirm { job, service } => {
            registry::command(&service, "confirm", json!({ "job": job }))
        }
        Command::Cancel { job, service } => {
            registry::command(&service, "cancel", json!({ "job": job }))
        }
        Command::CloseBreaker { way, service } => {
            registry::command(&service, "close-breaker", json!({ "way": way }))
        }
        Command::Release { model, service } => {
            registry::command(&service, "release", json!({ "model": model }))
        }
    }
}

fn inspect(file: &std::path::Path, json: bool) -> Outcome {
    let inspection = Inspection::of(file, &Overrides::default());
    if json {
        print_json(&inspection)?;
    } else {
        say!("{inspection}");
    }
    if inspection.runnable() { Ok(()) } else { Err(Failure::Said) }
}
