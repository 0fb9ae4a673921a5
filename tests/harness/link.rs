//! A link on a thread of its own, as the service runs it.

use std::path::Path;
use std::sync::Arc;
use std::thread::JoinHandle;

use noblink::config::External;
use noblink::mqtt::board::Board;
use noblink::mqtt::link::{self, Link, LinkHandle};
use noblink::mqtt::outbox::{Bounds, Outbox, Record};
use noblink::mqtt::spooler::{Durability, Settings, Spooler};
use noblink::mqtt::status::{LinkState, LinkStatus};
use noblink::mqtt::topics::Topics;
use tokio::sync::oneshot;

use super::until;

/// Room for every test that does not fill it.
pub const ROOMY: Bounds = Bounds { records: 100_000, bytes: 64 << 20 };

/// The life of the process that the tests' records are of.
pub const BOOT: &str = "7f3k9q2m4x8w1b5d";

/// A link that runs.
pub struct Running {
    pub handle: LinkHandle,
    pub outbox: Arc<Outbox>,
    pub board: Arc<Board>,
    pub topics: Topics,
    spooler: Option<Spooler>,
    abort: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Running {
    pub fn start(broker: External) -> Self {
        Self::with(broker, "edge-1", ROOMY, &[])
    }

    pub fn with(broker: External, device: &str, bounds: Bounds, filters: &[&str]) -> Self {
        Self::built(broker, device, bounds, filters, |_, _| None)
    }

    /// With something in its outbox before it starts.
    pub fn filled(broker: External, bounds: Bounds, fill: impl FnOnce(&Outbox, &Topics)) -> Self {
        Self::built(broker, "edge-1", bounds, &[], |outbox, topics| {
            fill(outbox, topics);
            None
        })
    }

    /// With a spool in a folder.
    pub fn spooled(broker: External, bounds: Bounds, dir: &Path) -> Self {
        Self::built(broker, "edge-1", bounds, &[], |outbox, _| Some(spooler(outbox, dir)))
    }

    fn built(
        broker: External,
        device: &str,
        bounds: Bounds,
        filters: &[&str],
        fill: impl FnOnce(&Arc<Outbox>, &Topics) -> Option<Spooler>,
    ) -> Self {
        let topics = Topics::new("noblink", device);
        let outbox = Arc::new(Outbox::new(bounds));
        let spooler = fill(&outbox, &topics);
        let board = Arc::new(Board::new());
        let settings = link::Settings {
            device: device.to_owned(),
            topics: topics.clone(),
            broker,
            filters: filters.iter().map(|f| (*f).to_owned()).collect(),
        };
        let (link, handle) = Link::new(settings, Arc::clone(&outbox), Arc::clone(&board));
        let (abort, aborted) = oneshot::channel();
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            runtime.expect("a runtime").block_on(async {
                tokio::select! {
                    () = link.run() => {}
                    _ = aborted => {}
                }
            });
        });
        let (abort, thread) = (Some(abort), Some(thread));
        Self { handle, outbox, board, topics, spooler, abort, thread }
    }

    pub fn status(&self) -> LinkStatus {
        self.handle.status()
    }

    pub fn connected(&self) {
        until("the link connects", 15, || self.status().state == LinkState::Connected);
    }

    /// Waits for an error and returns it.
    pub fn error(&self) -> String {
        until("the link reports an error", 15, || self.status().last_error.is_some());
        self.status().last_error.expect("waited for")
    }

    /// Waits until nothing is left to send.
    pub fn drained(&self) {
        until("everything is acknowledged", 15, || self.outbox.is_empty());
    }

    pub fn push(&self, camera: &str, seq: u64, topic: &str, payload: &str) {
        self.outbox.push(Record {
            camera: camera.into(),
            boot: BOOT.into(),
            seq,
            topic: topic.into(),
            payload: payload.into(),
        });
    }

    /// A clean stop.
    pub fn stop(&mut self) {
        self.handle.stop();
        self.thread.take().expect("stopped once").join().expect("the link does not panic");
        if let Some(spooler) = self.spooler.take() {
            spooler.stop();
        }
    }

    /// Gone without a word.
    pub fn vanish(&mut self) {
        self.abort.take();
        self.thread.take().expect("stopped once").join().expect("the link does not panic");
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.abort.take();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
        if let Some(spooler) = self.spooler.take() {
            spooler.stop();
        }
    }
}

/// The spool in a folder, with its usual settings.
pub fn spooler(outbox: &Arc<Outbox>, dir: &Path) -> Spooler {
    let (max_bytes, durability) = (64_000_000, Durability::Memory);
    let settings = Settings { dir: dir.to_owned(), max_bytes, durability };
    Spooler::start(Arc::clone(outbox), settings).expect("a thread")
}

/// A broker on loopback without TLS.
pub fn plain(port: u16) -> External {
    External {
        host: "127.0.0.1".into(),
        port,
        tls: false,
        username: None,
        password_file: None,
        ca_file: None,
        client_cert: None,
    }
}
