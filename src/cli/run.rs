//! `noblink run`: the service. SIGHUP has it read its configuration again.

use std::path::PathBuf;

use super::Outcome;
use crate::app::App;
use crate::config::{Config, NO_CAMERA};
use crate::signals::{Asked, Signals};

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The configuration
    #[arg(long, value_name = "FILE", default_value = "/etc/noblink/noblink.toml")]
    config: PathBuf,
}

pub(super) fn run(args: Args) -> Outcome {
    let config = Config::load(&args.config).map_err(anyhow::Error::from)?;
    if config.cameras.is_empty() {
        tracing::warn!("{NO_CAMERA}");
    }
    let signals = Signals::with_reload()?;
    let mut app = App::start(config)?;
    let end = loop {
        match app.run(&signals) {
            Ok(Asked::Reload) => app.reload(Config::load(&args.config)),
            end => break end,
        }
    };
    app.stop();
    end?;
    Ok(())
}
