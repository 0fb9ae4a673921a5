//! What the house's other software lives on: counts, pictures, Home Assistant, Prometheus. By the
//! real program, over a real broker.

mod homeassistant;
mod prometheus;
mod topics;
