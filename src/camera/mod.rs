//! Cameras: one supervisor and one GStreamer pipeline each.
//!
//! [`Camera`] is the handle of a supervisor's thread, which the owner starts, watches and joins.
//! Frames go from GStreamer's threads straight into the camera's [`Inlet`]; the supervisor sees
//! none of them. One camera's trouble reaches no other: they share nothing but the templates.

mod clock;
mod decoder;
mod depay;
pub mod frame;
pub mod grab;
pub mod jpeg;
mod keeper;
mod pipeline;
pub mod probe;
mod reason;
pub mod source;
mod status;
mod supervisor;
pub mod templates;

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, bounded};

pub use clock::PLAUSIBLE;
pub use keeper::DISMANTLE_WITHIN;
pub use pipeline::init;
pub use reason::Reason;
pub use status::{CameraStatus, State, Stream, Transport};
use supervisor::{Shared, Supervisor};
use templates::Templates;

use crate::config;
use crate::queue::Inlet;

/// How long a supervisor may take to end: what its pipeline may take, and a little more.
pub const LEAVE_WITHIN: Duration = Duration::from_secs(3);

/// A camera that is kept streaming until `request_stop`. Dropping it requests that too, without
/// waiting.
pub struct Camera {
    shared: Arc<Shared>,
    bell: Sender<()>,
    /// Disconnected when the thread is at its end.
    over: Receiver<()>,
    thread: Option<JoinHandle<()>>,
}

impl Camera {
    /// Starts the thread `cam-<id>`. Whatever is wrong with the source comes in the status; an
    /// error here is the system's, which has no thread for us.
    pub fn start(
        camera: Arc<config::Camera>,
        inlet: Inlet,
        templates: Arc<Templates>,
        enabled: bool,
    ) -> io::Result<Self> {
        Self::launch(camera, inlet, templates, Shared::new(enabled), None)
    }

    /// Puts another supervisor in this one's place, with other settings or because this one is
    /// stuck. It begins when this one has ended: many cameras serve one session only. One that does
    /// not end within [`LEAVE_WITHIN`] is left behind and counted.
    pub fn succeed(
        &mut self,
        camera: Arc<config::Camera>,
        inlet: Inlet,
        templates: Arc<Templates>,
    ) -> io::Result<()> {
        self.request_stop();
        let shared = self.shared.next();
        let before = Self {
            shared: Arc::clone(&self.shared),
            bell: self.bell.clone(),
            over: self.over.clone(),
            thread: self.thread.take(),
        };
        *self = Self::launch(camera, inlet, templates, shared, Some(before))?;
        Ok(())
    }

    fn launch(
        camera: Arc<config::Camera>,
        inlet: Inlet,
        templates: Arc<Templates>,
        shared: Shared,
        before: Option<Self>,
    ) -> io::Result<Self> {
        let shared = Arc::new(shared);
        let (bell, rung) = bounded(1);
        let (running, over) = bounded(0);
        let name = format!("cam-{}", camera.id);
        let supervisor =
            Supervisor { camera, inlet, templates, shared: Arc::clone(&shared), bell: rung };
        let thread = std::thread::Builder::new().name(name).spawn(move || {
            let _running: Sender<()> = running;
            if let Some(mut before) = before
                && !before.join(Instant::now() + LEAVE_WITHIN)
            {
                supervisor.shared.left_behind();
            }
            supervisor.run();
        })?;
        Ok(Self { shared, bell, over, thread: Some(thread) })
    }

    /// As many more threads that were left behind.
    #[cfg(test)]
    pub(crate) fn leak(&self, threads: u64) {
        (0..threads).for_each(|_| self.shared.left_behind());
    }

    /// A camera whose supervisor does nothing until it is asked to end, and not even then.
    #[cfg(test)]
    pub(crate) fn stuck() -> Self {
        let (bell, _) = bounded(1);
        let (running, over) = bounded(0);
        let stuck = move || {
            let _running: Sender<()> = running;
            std::thread::sleep(Duration::from_secs(60));
        };
        let thread = Some(std::thread::spawn(stuck));
        Self { shared: Arc::new(Shared::new(true)), bell, over, thread }
    }

    /// What the camera says of itself now.
    pub fn status(&self) -> CameraStatus {
        self.shared.status()
    }

    /// Grows while the supervisor lives: every 0.5 s, and never slower than every
    /// [`DISMANTLE_WITHIN`].
    pub fn heartbeat(&self) -> u64 {
        self.shared.heartbeat.load(Ordering::Relaxed)
    }

    /// Switches the camera off or on again. Off, nothing is connected; a file that is switched on
    /// again starts from its beginning.
    pub fn set_enabled(&self, enabled: bool) {
        self.shared.enabled.store(enabled, Ordering::Release);
        self.ring();
    }

    /// Asks the supervisor to end, and returns at once.
    pub fn request_stop(&self) {
        self.shared.stopping.store(true, Ordering::Release);
        self.ring();
    }

    /// Whether the supervisor has ended.
    pub fn has_ended(&self) -> bool {
        matches!(self.over.try_recv(), Err(crossbeam_channel::TryRecvError::Disconnected))
    }

    /// Waits for the supervisor's end; `false` when it is not reached in time, and the thread is
    /// left to itself. It takes [`DISMANTLE_WITHIN`] at most after `request_stop`.
    pub fn join(&mut self, deadline: Instant) -> bool {
        let running = self.over.recv_deadline(deadline);
        let over = matches!(running, Err(crossbeam_channel::RecvTimeoutError::Disconnected));
        match self.thread.take() {
            Some(thread) if over => thread.join().is_ok(),
            _ => false,
        }
    }

    fn ring(&self) {
        // Full = it has been rung already.
        let _ = self.bell.try_send(());
    }
}

impl Drop for Camera {
    fn drop(&mut self) {
        self.request_stop();
    }
}
