//! noblink: cameras in, detection events out, and a model that is replaced without a blink.
//!
//! The path of a frame is `camera` (GStreamer) → `queue` (bounded, with the ledger) → `worker`
//! (preprocess, inference, postprocess) → `mqtt` (outbox and link). `app` builds, starts and stops
//! all of it. ARCHITECTURE.md shows the house.

pub mod affinity;
pub mod app;
pub mod assets;
pub mod camera;
pub mod cli;
pub mod config;
pub mod control;
pub mod counts;
pub mod demo;
pub mod fleet;
pub mod guest;
pub mod homeassistant;
pub mod host;
pub mod log;
pub mod meter;
pub mod model;
pub mod mqtt;
pub mod net;
pub mod notify;
pub mod preview;
pub mod queue;
pub mod records;
pub mod rtsp;
pub mod sampler;
pub mod signals;
pub mod snapshot;
pub mod switches;
pub mod text;
pub mod update;
pub mod vision;
pub mod web;
pub mod worker;
