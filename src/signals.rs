//! SIGINT and SIGTERM: the first asks for a stop, the second ends the process at once. SIGHUP asks
//! whoever wants to know for a reload of the configuration.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::Context;
use crossbeam_channel::{Receiver, bounded};
use nix::sys::signal::{SigHandler, Signal, signal};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};

/// Tells what was asked for.
pub struct Signals {
    stop: Arc<AtomicBool>,
    reload: Arc<AtomicBool>,
    wake: Receiver<()>,
}

/// What a signal asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Asked {
    /// A stop.
    Stop,
    /// To read the configuration again.
    Reload,
}

impl Signals {
    /// Takes SIGINT and SIGTERM over from their default, for the process.
    pub fn install() -> anyhow::Result<Self> {
        Self::take_over(&[SIGINT, SIGTERM])
    }

    /// SIGHUP, too.
    pub fn with_reload() -> anyhow::Result<Self> {
        Self::take_over(&[SIGINT, SIGTERM, SIGHUP])
    }

    fn take_over(numbers: &[i32]) -> anyhow::Result<Self> {
        // A file that may not grow is an error of its write, no reason to die.
        // SAFETY: ignoring a signal runs no code of ours in a handler.
        unsafe { signal(Signal::SIGXFSZ, SigHandler::SigIgn) }
            .context("SIGXFSZ can't be ignored")?;
        let (stop, reload) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
        let mut signals = signal_hook::iterator::Signals::new(numbers)
            .context("the signal handlers can't be installed")?;
        let (ring, wake) = bounded(1);
        let flags = (Arc::clone(&stop), Arc::clone(&reload));
        std::thread::Builder::new()
            .name("signals".into())
            .spawn(move || {
                for signal in signals.forever() {
                    if signal == SIGHUP {
                        flags.1.store(true, Ordering::SeqCst);
                    } else if flags.0.swap(true, Ordering::SeqCst) {
                        // Whoever signals twice does not want to wait for anything.
                        std::process::exit(128 + signal);
                    }
                    let _ = ring.try_send(());
                }
            })
            .context("the signals thread can't be started")?;
        Ok(Self { stop, reload, wake })
    }

    /// Waits, at most so long; returns whether a stop was asked for.
    pub fn wait(&self, at_most: Duration) -> bool {
        if !self.stop.load(Ordering::SeqCst) {
            let _ = self.wake.recv_timeout(at_most);
        }
        self.stop.load(Ordering::SeqCst)
    }

    /// Has something when a signal came, for whoever waits for other things as well.
    pub fn bell(&self) -> &Receiver<()> {
        &self.wake
    }

    /// What was asked for since the last call; a stop stays asked for.
    pub fn asked(&self) -> Option<Asked> {
        let _ = self.wake.try_recv();
        if self.stop.load(Ordering::SeqCst) {
            return Some(Asked::Stop);
        }
        self.reload.swap(false, Ordering::SeqCst).then_some(Asked::Reload)
    }
}
