//! What the tests need of the world: real peers, and waiting with a deadline.

pub mod link;
pub mod mosquitto;
pub mod peer;

use std::time::{Duration, Instant};

/// Waits until `condition` holds; says what was waited for when it does not within `seconds`.
pub fn until(what: &str, seconds: u64, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(seconds);
    while !condition() {
        assert!(Instant::now() < deadline, "{what}: not within {seconds} s");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// A TCP port on loopback that was free a moment ago.
pub fn free_port() -> u16 {
    let socket = std::net::TcpListener::bind("127.0.0.1:0").expect("loopback has a free port");
    socket.local_addr().expect("a bound socket has an address").port()
}
