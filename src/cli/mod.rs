//! The commands, one file each, and what they share: exit codes, logging, signals.

/// `println!`, but whoever reads may leave, as in `noblink model list | head`: the command goes on to
/// its end, and its exit code says how that was.
macro_rules! say {
    () => { $crate::cli::line(format_args!("")) };
    ($($text:tt)*) => { $crate::cli::line(format_args!($($text)*)) };
}

mod bench;
mod check;
mod demo;
mod model;
mod probe;
mod push;
mod registry;
mod run;
mod status;
mod tune;

use std::fmt;
use std::io::{self, Write as _};
use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::config;
use crate::host;
use crate::update::gates;

/// Edge video detection that does not blink when its model is replaced.
#[derive(Debug, Parser)]
#[command(name = "noblink", version, max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
// Parsed once: a variant more or less costs nothing.
#[allow(clippy::large_enum_variant)]
enum Command {
    /// Run the service
    Run(run::Args),
    /// Show noblink at work: two built-in cameras, a broker, a model, all on this machine
    Demo(demo::Args),
    /// Check a configuration without starting anything
    Check(check::Args),
    /// Show what the running service does: cameras, model, job, link. Exits with 1 when none answers
    Status(status::Args),
    /// Measure how a model runs fastest on this box, as `provider = "auto"` does
    Tune(tune::Args),
    /// Look at a camera and print a [[camera]] block for it
    Probe(probe::Args),
    /// Look at models and send them
    #[command(subcommand)]
    Model(model::Command),
    /// Measure
    #[command(subcommand)]
    Bench(bench::Command),
    /// Prove a model: started by noblink itself, with the work on standard input
    #[command(hide = true)]
    Prove,
}

/// Why a command ended badly, with its exit code.
pub(crate) enum Failure {
    /// 1: something failed while it ran. The chain is printed.
    Runtime(anyhow::Error),
    /// 1: the command has said itself what is wrong.
    Said,
    /// 78 (`EX_CONFIG`): all problems of the configuration.
    Config(config::Invalid),
}

impl From<anyhow::Error> for Failure {
    fn from(error: anyhow::Error) -> Self {
        // A configuration stays one whatever path it came by.
        match error.downcast::<config::Invalid>() {
            Ok(invalid) => Self::Config(invalid),
            Err(error) => Self::Runtime(error),
        }
    }
}

type Outcome = Result<(), Failure>;

/// Parses the command line, runs the command, says what went wrong. Usage errors exit with 2.
pub fn main() -> ExitCode {
    host::bound_arenas();
    let cli = Cli::parse();
    crate::log::start(matches!(cli.command, Command::Run(_)));
    let outcome = match cli.command {
        Command::Run(args) => run::run(args),
        Command::Demo(args) => demo::run(args),
        Command::Check(args) => check::run(args),
        Command::Status(args) => status::run(args),
        Command::Tune(args) => tune::run(args),
        Command::Probe(args) => probe::run(args),
        Command::Model(command) => model::run(command),
        Command::Bench(command) => bench::run(command),
        Command::Prove => return gates::prove(),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(Failure::Said) => ExitCode::FAILURE,
        Err(Failure::Runtime(error)) => {
            eprintln!("noblink: {error:#}");
            ExitCode::FAILURE
        }
        Err(Failure::Config(invalid)) => {
            eprintln!("noblink: {invalid}");
            ExitCode::from(78)
        }
    }
}

/// A line of what a command has to say.
fn line(text: fmt::Arguments<'_>) {
    match writeln!(io::stdout(), "{text}") {
        Err(e) if e.kind() != io::ErrorKind::BrokenPipe => {
            eprintln!("noblink: standard output can't be written to: {e}");
            std::process::exit(1);
        }
        _ => {}
    }
}

/// Prints a value as JSON, for machines.
fn print_json(value: &impl serde::Serialize) -> Outcome {
    let text = serde_json::to_string_pretty(value).map_err(anyhow::Error::from)?;
    say!("{text}");
    Ok(())
}
