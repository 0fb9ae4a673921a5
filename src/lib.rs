//! noblink: cameras in, detection events out, and a model that is replaced without a blink.
//!
//! The path of a frame is `camera` (GStreamer) → `queue` (bounded, with the ledger) → `worker`
//! (preprocess, inference, postprocess) → `mqtt` (outbox and link). `app` builds, starts and stops
//! all of it. ARCHITECTURE.md shows the house.

pub mod camera;
pub mod config;
pub mod model;
pub mod mqtt;
pub mod queue;
pub mod update;
pub mod vision;
