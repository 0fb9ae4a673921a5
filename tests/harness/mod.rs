//! What the tests need of the world: real peers, ways to make them fail, waiting with a deadline.

pub mod camera;
pub mod camera_faults;
pub mod glass;
pub mod http;
pub mod kills;
pub mod line;
pub mod link;
pub mod mosquitto;
pub mod onnx;
pub mod outage;
pub mod overload;
pub mod peer;
pub mod pki;
pub mod relay;
pub mod restarts;
pub mod rtsp_relay;
pub mod schema;
pub mod service;
pub mod site;
pub mod store;
pub mod web;
pub mod week;
pub mod wire;

use std::net::TcpListener;
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::{Duration, Instant};

/// Waits until `condition` holds; says what was waited for when it does not within `seconds`.
pub fn until(what: &str, seconds: u64, mut condition: impl FnMut() -> bool) {
    let held = || if condition() { Ok(()) } else { Err(String::from("not yet")) };
    reach(secs(seconds), what, held);
}

/// Waits until the condition gives a value; panics with what it says when it does not in time.
pub fn reach<T>(
    within: Duration,
    what: &str,
    mut condition: impl FnMut() -> Result<T, String>,
) -> T {
    let deadline = Instant::now() + within;
    loop {
        match condition() {
            Ok(value) => return value,
            Err(state) if Instant::now() > deadline => {
                panic!("not within {within:?}: {what}; it is: {state}")
            }
            Err(_) => std::thread::sleep(Duration::from_millis(5)),
        }
    }
}

/// Shorter to read in a table of times.
pub const fn secs(n: u64) -> Duration {
    Duration::from_secs(n)
}

/// A TCP port on loopback that is free and that no other test gets. Not one of those that the
/// kernel gives to outgoing connections (from 32768), which would take it between two uses.
pub fn free_port() -> u16 {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    let offset = (std::process::id() % 10_000) as u16;
    loop {
        let port = 20_000 + (offset + NEXT.fetch_add(1, Ordering::Relaxed)) % 12_000;
        if TcpListener::bind(("127.0.0.1", port)).is_ok() {
            return port;
        }
    }
}
