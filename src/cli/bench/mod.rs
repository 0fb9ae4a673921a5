//! `noblink bench …`: measures the real path on a recorded input.

mod cameras;
mod load;
mod page;
mod pipeline;
mod service;
mod swap;

use std::fmt;

use anyhow::Context;
use serde::Serialize;

use super::{Outcome, print_json};
use crate::records::{Quantiles, rounded};

/// Under `[inference]`: `auto` would measure, and move the model, in the midst of it.
const SETTLED: &str = "provider = \"cpu\"";

#[derive(Debug, clap::Subcommand)]
pub(super) enum Command {
    /// Serve what this box can: cameras, frames a second, latency, fairness, cost of a frame
    Load(load::Args),
    /// The cameras of `load`, in a process of their own
    #[command(hide = true)]
    Cameras(cameras::Args),
    /// Time each stage of the path, from the decoder to the record
    Pipeline(pipeline::Args),
    /// Replace the model over and over, and see what that does to the results
    Swap(swap::Args),
    /// See what people who look at the page cost the worker
    Page(page::Args),
    /// The people: started by `bench page` itself
    #[command(hide = true)]
    Viewers(page::Viewers),
}

pub(super) fn run(command: Command) -> Outcome {
    match command {
        Command::Load(args) => show(args.json, &load::run(&args)?),
        Command::Cameras(args) => Ok(cameras::serve(&args)?),
        Command::Pipeline(args) => match args.lap {
            Some(seconds) => Ok(pipeline::laps(&args, seconds)?),
            None => show(args.json, &pipeline::run(&args)?),
        },
        Command::Swap(args) => show(args.json, &swap::run(&args)?),
        Command::Page(args) => show(args.json, &page::run(&args)?),
        Command::Viewers(args) => Ok(page::viewers(&args)?),
    }
}

/// Of what was measured.
fn quantiles(mut measured: Vec<f64>) -> anyhow::Result<Quantiles> {
    measured.sort_by(f64::total_cmp);
    let last =
        measured.len().checked_sub(1).context("no result in the window: do the cameras stream?")?;
    let at = |q: f64| rounded(measured[(last as f64 * q).round() as usize], 2);
    Ok(Quantiles { p50: at(0.5), p95: at(0.95), p99: at(0.99), max: at(1.0) })
}

fn show<R: fmt::Display + Serialize>(json: bool, report: &R) -> Outcome {
    if json {
        return print_json(report);
    }
    say!("{report}");
    Ok(())
}
