//! What the tests share: real peers, and ways to make them fail.

pub(crate) mod camera;
pub(crate) mod wire;

use std::time::{Duration, Instant};

/// Waits until the condition holds; panics with what it says when it does not in time.
pub(crate) fn until<T>(
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

pub(crate) const fn secs(n: u64) -> Duration {
    Duration::from_secs(n)
}
