//! The integration tests: one binary, one module per capability.
#![allow(missing_docs)]

mod camera;
mod harness;
mod queue;
