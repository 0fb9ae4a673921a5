//! How long to wait before the next connection.
//!
//! Full jitter, so that a site full of devices does not come back in step after its broker did.

use std::time::Duration;

/// A connection that held this long was a good one: the next failure starts over. One that was
/// accepted and closed sooner may be a contest for the client id.
const GOOD_AFTER: Duration = Duration::from_secs(30);
/// Someone else with our client id is forgotten only after this long.
const FORGIVEN_AFTER: Duration = Duration::from_secs(600);
/// Takeovers in a row, announced or guessed from short connections, that make it one.
const TAKEOVERS_MAX: u32 = 2;
const SHORT_MAX: u32 = 3;
const STEADY_MAX_S: f64 = 60.0;

/// What kind of failure ended a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Class {
    /// May pass by itself: the network, a restart.
    Passing,
    /// Passes when someone changes something: 60 to 300 s.
    Refused,
    /// The broker closed, without a word, what it had accepted. Mosquitto 2.0 does so when another
    /// client takes over the session, and a DISCONNECT without properties can't be read here.
    Closed,
    /// Another client took over the session, as the broker says.
    TakenOver,
}

/// The failures in a row, and what they cost.
#[derive(Debug, Default)]
pub struct Backoff {
    attempts: u32,
    takeovers: u32,
    short: u32,
}

impl Backoff {
    /// Failures since the last good connection.
    pub fn attempts(&self) -> u32 {
        self.attempts
    }

    /// Whether it looks as if another client used our client id: then 60 to 120 s, or both would
    /// throw each other out for ever.
    pub fn is_contested(&self) -> bool {
        self.takeovers >= TAKEOVERS_MAX || self.short >= SHORT_MAX
    }

    /// The pause after a connection that was up for `up` (zero: it never came up). `chance` is
    /// uniform in 0..1.
    pub fn next(&mut self, class: Class, up: Duration, chance: f64) -> Duration {
        if up >= GOOD_AFTER {
            self.attempts = 0;
            self.short = 0;
        }
        if up >= FORGIVEN_AFTER {
            self.takeovers = 0;
        }
        self.attempts = self.attempts.saturating_add(1);
        match class {
            Class::TakenOver => self.takeovers = self.takeovers.saturating_add(1),
            Class::Closed if up < GOOD_AFTER => self.short = self.short.saturating_add(1),
            // The broker itself was away: it, and nobody else, had closed.
            Class::Passing if up.is_zero() => self.short = 0,
            _ => {}
        }
        let (least, most) = match class {
            Class::Refused => (60.0, 300.0),
            Class::TakenOver | Class::Closed if self.is_contested() => (60.0, 120.0),
            _ => (1.0, STEADY_MAX_S.min(2_f64.powi(self.attempts.min(10) as i32))),
        };
        Duration::from_secs_f64(least + (most - least) * chance.clamp(0.0, 1.0))
    }
}

/// A number in 0..1 that differs from device to device.
pub fn chance() -> f64 {
    getrandom::u64().unwrap_or(u64::MAX / 2) as f64 / u64::MAX as f64
}
