//! Models on their way in: commands, jobs, gates, the store and its registry, the inbox.

mod commands;
pub mod digest;
mod entry;
pub mod event;
pub mod failpoint;
pub mod inbox;
pub mod job;
mod json;
pub mod keeper;
pub mod machine;
pub mod manifest;
pub mod policy;
pub mod registry;
mod rejected;
pub mod signature;
mod start;
pub mod store;

pub use start::{Origin, start_order};
