//! Pixels in, boxes out: pure functions that know no I/O, no clock and no lock.
//!
//! `letterbox` says where a picture lies in the model's input, `resample` which source pixels make
//! which input pixel, `color` and `blend` what of them, with `kernels` for machines that have the
//! instructions; `preprocess` makes the tensor; `decode` reads the model's output, `nms` thins it
//! out. The numbers are those of `ultralytics` for the same ONNX file (`tests/parity.rs`).

mod blend;
pub mod color;
pub mod decode;
mod kernels;
pub mod letterbox;
pub mod nms;
pub mod picture;
pub mod preprocess;
pub mod resample;
