//! The broker inside, for a first run and for a box without another. The only file that names
//! mqtt5.
//!
//! Loopback only, MQTT 3.1.1 and 5 on one port, all in memory and all of it bounded: mqtt5's own
//! defaults listen on every address, keep sessions for ever and write to the working directory. It
//! lives on the runtime on which it was started.

use std::fmt;
use std::io;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::time::Duration;

use mqtt5::broker::config::{AuthConfig, StorageBackend, StorageConfig};
use mqtt5::broker::{BrokerConfig, BrokerShutdownHandle, MqttBroker};
use tokio::task::JoinHandle;
use tracing::error;

use crate::config::External;

const CLIENTS_MAX: usize = 64;
const SUBSCRIPTIONS_MAX: usize = 100;
const PACKET_MAX: usize = 1024 * 1024;
const RETAINED_MAX: usize = 2000;
const RETAINED_BYTES_MAX: usize = 256 * 1024;
const QUEUED_MAX: usize = 10_000;
const QUEUED_BYTES_MAX: usize = 16 * 1024 * 1024;
const RECEIVE_MAX: u16 = 100;
const SESSION_EXPIRY: Duration = Duration::from_secs(3600);
/// Expired sessions and retained messages are looked for this often.
const SWEEP: Duration = Duration::from_secs(300);
const STOP_TIMEOUT: Duration = Duration::from_secs(2);

/// Why the broker inside does not run.
#[derive(Debug)]
pub enum StartError {
    /// Something listens there already.
    PortBusy(u16),
    /// The port can't be used.
    Port(u16, io::Error),
    /// Anything else.
    Other(String),
}

impl fmt::Display for StartError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::PortBusy(port) => write!(
                f,
                "port {port} on 127.0.0.1 is in use, probably by another MQTT broker: use that one \
                 (mqtt.url = \"mqtt://127.0.0.1:{port}\" instead of mqtt.embedded = true), or give \
                 the broker inside another port (mqtt.embedded_port)"
            ),
            Self::Port(port, e) => write!(
                f,
                "the broker inside can't listen on 127.0.0.1:{port}: {e}; set mqtt.embedded_port"
            ),
            Self::Other(e) => write!(f, "the broker inside does not start: {e}"),
        }
    }
}

impl std::error::Error for StartError {}

/// A running broker. Dropped, it stops without waiting for its clients.
pub struct EmbeddedBroker {
    shutdown: BrokerShutdownHandle,
    task: JoinHandle<()>,
}

impl EmbeddedBroker {
    /// Starts it on 127.0.0.1; port 0 takes a free one. The address is bound when this returns.
    pub async fn start(port: u16) -> Result<(Self, SocketAddr), StartError> {
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        // mqtt5 reports a port that is in use as text among other text.
        drop(TcpListener::bind(address).map_err(|e| match e.kind() {
            io::ErrorKind::AddrInUse => StartError::PortBusy(port),
            _ => StartError::Port(port, e),
        })?);
        let mut broker = MqttBroker::with_config(config(address))
            .await
            .map_err(|e| StartError::Other(e.to_string()))?;
        let bound =
            broker.local_addr().ok_or_else(|| StartError::Other("it has no address".into()))?;
        let shutdown = broker.shutdown_handle();
        let task = tokio::spawn(async move {
            if let Err(e) = broker.run().await {
                error!("the broker inside ended: {e}");
            }
        });
        Ok((Self { shutdown, task }, bound))
    }

    /// How a link reaches the broker at `address`.
    pub fn reached_at(address: SocketAddr) -> External {
        External {
            host: address.ip().to_string(),
            port: address.port(),
            tls: false,
            username: None,
            password_file: None,
            ca_file: None,
            client_cert: None,
        }
    }

    /// Stops it and waits for its listener to close, 2 s at most.
    pub async fn stop(mut self) {
        self.shutdown.shutdown();
        // Its connections end with the runtime.
        let _ = tokio::time::timeout(STOP_TIMEOUT, &mut self.task).await;
    }
}

impl Drop for EmbeddedBroker {
    fn drop(&mut self) {
        self.shutdown.shutdown();
        self.task.abort();
    }
}

/// Every default of mqtt5 that is open, closed or bounded.
fn config(address: SocketAddr) -> BrokerConfig {
    let storage = StorageConfig::new()
        .with_backend(StorageBackend::Memory)
        .with_cleanup_interval(SWEEP)
        .with_max_queued_messages_per_client(QUEUED_MAX)
        .with_max_queued_bytes_per_client(QUEUED_BYTES_MAX);
    BrokerConfig::default()
        .with_bind_address(address)
        .with_max_clients(CLIENTS_MAX)
        .with_session_expiry(SESSION_EXPIRY)
        .with_max_packet_size(PACKET_MAX)
        .with_max_subscriptions_per_client(SUBSCRIPTIONS_MAX)
        .with_max_retained_messages(RETAINED_MAX)
        .with_max_retained_message_size(RETAINED_BYTES_MAX)
        .with_client_channel_capacity(QUEUED_MAX)
        .with_server_receive_maximum(RECEIVE_MAX)
        .with_sys_topics_enabled(false)
        .with_storage(storage)
        // Whoever reaches loopback is on this box already.
        .with_auth(AuthConfig::new().with_allow_anonymous(true))
}
