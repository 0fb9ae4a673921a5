//! The model: what its file says (`onnx`, `wire`, `foreign`), what we make of it (`contract`,
//! `labels`), how it runs (`options`, `engine`, `runtime`, `rewrite`, `winograd`) and where the
//! running one is found (`slot`).

pub mod contract;
pub mod engine;
pub mod file;
pub mod foreign;
pub mod inspect;
pub mod labels;
pub mod layout;
pub mod onnx;
pub mod options;
pub mod refusal;
pub mod rewrite;
pub mod runtime;
pub mod slot;
mod winograd;
pub mod wire;
