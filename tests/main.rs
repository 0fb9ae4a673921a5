//! The integration tests: one binary, one module per capability.
#![allow(missing_docs)]

mod config;
mod queue;
mod update;
