//! What systemd is told (`sd_notify`): that the service is ready, how it goes, that it is alive.
//! Where nobody listens it is told to nobody.
//!
//! The watchdog is fed while the worker waits for frames or gets on with them. A dead camera, a
//! broker that is away, a teardown that hangs are healed elsewhere and never stop it.

use std::time::{Duration, Instant};

use sd_notify::NotifyState;
use tracing::{error, warn};

use crate::camera::State;
use crate::mqtt::status::{LinkState, LinkStatus};
use crate::snapshot::Snapshot;

/// A worker that has not finished a frame, nor waited for one in vain, for so long is stuck: it
/// looks up five times a second. Runs that hang are ended sooner by the update thread.
const STUCK_AFTER: Duration = Duration::from_secs(20);

/// What was told so far.
#[derive(Default)]
pub struct Notifier {
    ready: bool,
    status: String,
    worker: Progress,
    /// The socket failed; said once.
    failed: bool,
}

impl Notifier {
    /// Called once a second; `beats` is the worker's pulse.
    pub fn tell(&mut self, snapshot: &Snapshot, beats: u64) {
        let mut news = Vec::new();
        if !self.ready && was_tried(&snapshot.link) {
            self.ready = true;
            news.push(NotifyState::Ready);
        }
        let status = status(snapshot);
        if status != self.status {
            news.push(NotifyState::Status(&status));
        }
        if self.worker.is_alive(beats, Instant::now()) {
            news.push(NotifyState::Watchdog);
        }
        self.send(&news);
        self.status = status;
    }

    /// The service begins to stop.
    pub fn stopping(&mut self) {
        self.send(&[NotifyState::Stopping]);
    }

    fn send(&mut self, news: &[NotifyState<'_>]) {
        if let Err(e) = sd_notify::notify(news)
            && !std::mem::replace(&mut self.failed, true)
        {
            warn!("systemd can't be told how it goes: {e}");
        }
    }
}

/// When the worker last did something.
struct Progress {
    beats: u64,
    at: Instant,
    stuck: bool,
}

impl Default for Progress {
    fn default() -> Self {
        Self { beats: 0, at: Instant::now(), stuck: false }
    }
}

impl Progress {
    fn is_alive(&mut self, beats: u64, now: Instant) -> bool {
        if beats != self.beats {
            (self.beats, self.at) = (beats, now);
        }
        let stuck = now - self.at >= STUCK_AFTER;
        if stuck && !std::mem::replace(&mut self.stuck, stuck) {
            error!(
                "the worker has not moved for {} s: systemd's watchdog is not fed any more",
                STUCK_AFTER.as_secs()
            );
        }
        self.stuck = stuck;
        !stuck
    }
}

/// A broker that is away does not keep the service from being ready; one that was never tried does.
pub fn was_tried(link: &LinkStatus) -> bool {
    link.connects > 0 || link.attempt > 0 || link.state != LinkState::Connecting
}

/// The line under `systemctl status`.
fn status(snapshot: &Snapshot) -> String {
    let model = match &snapshot.live {
        Some(live) => {
            let id = live.model.identity();
            format!("{} {} (epoch {})", id.id, id.version, live.epoch)
        }
        None => "no model yet".into(),
    };
    let streaming = snapshot.cameras.iter().filter(|c| c.status.state == State::Streaming).count();
    let cameras = snapshot.cameras.len();
    let link = match snapshot.link.state {
        LinkState::Connected => "broker connected",
        _ => "broker away",
    };
    format!("{model}, {streaming} of {cameras} cameras streaming, {link}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_worker_is_alive_while_its_pulse_moves() {
        let mut worker = Progress::default();
        let start = worker.at;
        let after = |s| start + Duration::from_secs(s);
        assert!(worker.is_alive(1, after(1)));
        assert!(worker.is_alive(1, after(20)));
        assert!(!worker.is_alive(1, after(21)), "20 s without a beat");
        assert!(worker.is_alive(2, after(22)), "it came back");
    }
}
