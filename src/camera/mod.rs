//! Cameras: one supervisor and one GStreamer pipeline each.

pub mod frame;
pub mod source;
