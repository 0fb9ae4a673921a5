//! Models on their way in: commands, jobs, gates, the store and its registry, the inbox.

mod commands;
pub mod digest;
pub mod event;
pub mod job;
mod json;
pub mod machine;
pub mod manifest;
pub mod policy;
pub mod signature;
mod start;

pub use start::{Origin, start_order};
