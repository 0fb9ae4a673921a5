//! `noblink bench …`: measures the real path on a recorded input.

mod pipeline;

use super::{Outcome, print_json};

#[derive(Debug, clap::Subcommand)]
pub(super) enum Command {
    /// Time each stage of the path, from the decoder to the record
    Pipeline(pipeline::Args),
}

pub(super) fn run(command: Command) -> Outcome {
    match command {
        Command::Pipeline(args) => {
            let json = args.json;
            let report = pipeline::run(args)?;
            if json {
                return print_json(&report);
            }
            println!("{report}");
            Ok(())
        }
    }
}
