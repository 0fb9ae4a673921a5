//! The integration tests: one binary, one module per capability.
#![allow(missing_docs, unreachable_pub)]

mod harness;
mod model;
mod parity;
mod queue;
mod refusals;
mod vision;
