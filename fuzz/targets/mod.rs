//! What must hold of each parser that reads what comes from outside, whatever it reads.
//!
//! A target is a function of bytes that panics when something does not hold. libFuzzer calls it
//! (`make fuzz`, `fuzz_targets/`), and so does `tests/fuzz.rs` with the seeds and with a few
//! thousand mutations of them: both include these very files.

pub mod address;
pub mod calibration;
pub mod child;
pub mod chunks;
pub mod commands;
pub mod config;
pub mod names;
pub mod onnx;
pub mod packets;
pub mod protobuf;
pub mod signature;

/// What a target does with bytes.
pub type Check = fn(&[u8]);

/// All of them, by the names of their seeds' folders.
pub const ALL: [(&str, Check); 10] = [
    ("address", address::check),
    ("calibration", calibration::check),
    ("child", child::check),
    ("chunks", chunks::check),
    ("commands", commands::check),
    ("config", config::check),
    ("names", names::check),
    ("onnx", onnx::check),
    ("packets", packets::check),
    ("signature", signature::check),
];

/// Goes into a log line, a report and a reply: short, and without what would break a line.
fn sentence(text: &str) {
    assert!(!text.is_empty(), "a refusal without words");
    one_line(text);
}

fn one_line(text: &str) {
    assert!(text.len() <= 4096, "{} bytes in one message: {text:.200}", text.len());
    assert!(!text.chars().any(char::is_control), "control characters: {text:?}");
}

/// The first line, as text, and what follows.
fn first_line(data: &[u8]) -> Option<(&str, &[u8])> {
    let end = data.iter().position(|b| *b == b'\n')?;
    Some((std::str::from_utf8(&data[..end]).ok()?, &data[end + 1..]))
}

/// Stands for a secret in seeds and dictionaries.
const SECRET: &str = "PASSWORD";

/// Whether a text holds the secret where it can be told from anything else in it.
fn holds_secret(text: &str) -> bool {
    text.matches(SECRET).count() == 1
}
