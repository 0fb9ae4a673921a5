//! `noblink model …`

mod calibrate;
mod validate;

use std::path::PathBuf;

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
}

pub(super) fn run(command: Command) -> Outcome {
    match command {
        Command::Inspect { file, json } => inspect(&file, json),
        Command::Validate(args) => validate::run(args),
        Command::Calibrate(args) => calibrate::run(args),
        Command::Push(args) => push::run(args),
    }
}

fn inspect(file: &std::path::Path, json: bool) -> Outcome {
    let inspection = Inspection::of(file, &Overrides::default());
    if json {
        print_json(&inspection)?;
    } else {
        println!("{inspection}");
    }
    if inspection.runnable() { Ok(()) } else { Err(Failure::Said) }
}
