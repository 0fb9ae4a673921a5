//! The `net` thread: one current-thread Tokio runtime that runs the link and, where no broker is
//! configured, the broker inside. Nothing on it may block.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::thread::JoinHandle;

use anyhow::{Context, anyhow};
use crossbeam_channel::{Receiver, bounded};
use tokio::runtime::Handle;
use tracing::error;

use crate::config::{Broker, Config, External};
use crate::control::{self, status::Reporter};
use crate::homeassistant::birth_topic;
use crate::mqtt::board::Board;
use crate::mqtt::broker::EmbeddedBroker;
use crate::mqtt::link::{Inbound, Link, LinkHandle, Settings};
use crate::mqtt::outbox::Outbox;
use crate::mqtt::status::LinkStatus;
use crate::mqtt::topics::Topics;
use crate::web;
use crate::worker::Origin;

/// The running network.
pub struct Net {
    thread: JoinHandle<()>,
    runtime: Handle,
    link: LinkHandle,
    broker: External,
    reporter: Reporter,
}

impl Net {
    /// Starts the thread; returns once the broker inside listens, if there is one.
    pub fn start(
        config: &Config,
        origin: &Origin,
        topics: &Topics,
        outbox: Arc<Outbox>,
        board: Arc<Board>,
    ) -> anyhow::Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .context("the network's runtime can't be built")?;
        let handle = runtime.handle().clone();
        let told = (Arc::clone(&board), topics.clone());
        let (origin, topics) = (origin.clone(), topics.clone());
        let mut filters = vec![topics.commands().to_string(), topics.xfer_filter().to_string()];
        filters.extend(config.homeassistant.discovery_prefix.as_deref().map(birth_topic));
        let broker = config.mqtt.broker.clone();
        let (up, started) = bounded(1);
        let life = async move {
            let (inside, broker) = match broker {
                Broker::External(external) => (None, external),
                Broker::Embedded { port } => match EmbeddedBroker::start(port).await {
                    Ok((inside, address)) => (Some(inside), EmbeddedBroker::reached_at(address)),
                    Err(e) => {
                        let _ = up.send(Err(anyhow!(e)));
                        return;
                    }
                },
            };
            let settings =
                Settings { device: origin.device, topics, broker: broker.clone(), filters };
            let (link, handle) = Link::new(settings, outbox, board);
            let _ = up.send(Ok((handle, broker)));
            link.run().await;
            if let Some(inside) = inside {
                inside.stop().await;
            }
        };
        let thread = std::thread::Builder::new()
            .name("net".into())
            .spawn(move || runtime.block_on(life))
            .context("the network's thread can't be started")?;
        let (link, broker) = started.recv().context("the network's thread ended")??;
        let reporter = Reporter::new(told.0, told.1, link.clone());
        Ok(Self { thread, runtime: handle, link, broker, reporter })
    }

    /// The broker that the link uses.
    pub fn broker(&self) -> &External {
        &self.broker
    }

    /// Serves the control socket on this thread, to the network's end.
    pub fn control(&self, path: &Path, shared: control::Shared) -> anyhow::Result<()> {
        let _runtime = self.runtime.enter();
        self.runtime.spawn(control::serve(path, shared)?);
        Ok(())
    }

    /// What tells how it goes.
    pub fn reporter(&self) -> &Reporter {
        &self.reporter
    }

    /// Serves the page on this thread, to the network's end. Returns where.
    pub fn web(
        &self,
        listen: SocketAddr,
        token: Option<String>,
        shared: web::Shared,
    ) -> anyhow::Result<SocketAddr> {
        let _runtime = self.runtime.enter();
        let (address, serving) = web::serve(listen, token, shared)?;
        self.runtime.spawn(serving);
        Ok(address)
    }

    /// Messages on `cmd/cameras/…`, and Home Assistant's, for whoever serves them.
    pub fn for_cameras(&self) -> Receiver<Inbound> {
        self.link.for_cameras()
    }

    /// Messages on the rest of `cmd/…`, and chunks.
    pub fn inbound(&self) -> Receiver<Inbound> {
        self.link.inbound()
    }

    /// The link, now.
    pub fn link_status(&self) -> LinkStatus {
        self.link.status()
    }

    /// Delivers what can be delivered within seconds, says goodbye, ends.
    pub fn stop(self) -> LinkStatus {
        self.link.stop();
        if self.thread.join().is_err() {
            error!("the network ended in a panic");
        }
        self.link.status()
    }
}
