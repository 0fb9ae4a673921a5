//! SIGINT and SIGTERM: the first asks for a stop, the second ends the process at once.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::Context;
use crossbeam_channel::{Receiver, bounded};
use nix::sys::signal::{SigHandler, Signal, signal};
use signal_hook::consts::{SIGINT, SIGTERM};

/// Tells when a stop was asked for.
pub struct Signals {
    asked: Arc<AtomicBool>,
    wake: Receiver<()>,
}

impl Signals {
    /// Takes the signals over from their default, for the process.
    pub fn install() -> anyhow::Result<Self> {
        // A file that may not grow is an error of its write, no reason to die.
        // SAFETY: ignoring a signal runs no code of ours in a handler.
        unsafe { signal(Signal::SIGXFSZ, SigHandler::SigIgn) }
            .context("SIGXFSZ can't be ignored")?;
        let asked = Arc::new(AtomicBool::new(false));
        let mut signals = signal_hook::iterator::Signals::new([SIGINT, SIGTERM])
            .context("the signal handlers can't be installed")?;
        let (ring, wake) = bounded(1);
        let flag = Arc::clone(&asked);
        std::thread::Builder::new()
            .name("signals".into())
            .spawn(move || {
                for signal in signals.forever() {
                    if flag.swap(true, Ordering::SeqCst) {
                        // Whoever signals twice does not want to wait for anything.
                        std::process::exit(128 + signal);
                    }
                    let _ = ring.try_send(());
                }
            })
            .context("the signals thread can't be started")?;
        Ok(Self { asked, wake })
    }

    /// Waits, at most so long; returns whether a stop was asked for.
    pub fn wait(&self, at_most: Duration) -> bool {
        if !self.asked.load(Ordering::SeqCst) {
            let _ = self.wake.recv_timeout(at_most);
        }
        self.asked.load(Ordering::SeqCst)
    }
}
