//! Models on their way in: commands, jobs, the store and its registry, the inbox.
//!
//! ```text
//! inbox ─┐   manifest, signature, policy          keeper
//! MQTT  ─┼─► (may it come in?) ─► Event ─► machine ─► Commit ─► registry
//! CLI   ─┘                          ▲                └─► other effects ─► the update thread
//!                                   └── what became of them ◄─────────────────┘
//! ```
//!
//! All of it is owned by the update thread and knows no ONNX Runtime, MQTT or GStreamer. The
//! machine decides and has no clock; the keeper commits what it decides; the store holds bytes;
//! what fetches, proves, loads and swaps is elsewhere and reports back as events.

mod commands;
pub mod digest;
pub mod entry;
pub mod event;
pub mod failpoint;
pub mod fetch;
pub mod gates;
pub mod inbox;
pub mod job;
mod json;
pub mod keeper;
pub mod live;
pub mod machine;
pub mod manifest;
pub mod orders;
pub mod policy;
pub mod push;
pub mod registry;
pub mod rejected;
pub mod report;
pub mod signature;
mod start;
pub mod steps;
pub mod store;
pub mod tune;
pub mod updater;
pub mod watch;

pub use start::{Origin, start_order};
