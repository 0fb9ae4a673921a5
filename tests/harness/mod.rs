//! What the tests share: makers of real peers and real files.

pub mod onnx;
