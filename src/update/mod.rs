//! Models on their way in: commands, jobs, gates, the store and its registry, the inbox.

mod commands;
pub mod digest;
pub mod event;
pub mod fetch;
pub mod job;
pub mod machine;
pub mod push;
mod start;

pub use start::{Origin, start_order};
