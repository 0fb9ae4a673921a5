#![no_main]

use libfuzzer_sys::{fuzz_mutator, fuzz_target, fuzzer_mutate};
use noblink_fuzz::{onnx, protobuf};

fuzz_target!(|data: &[u8]| onnx::check(data));

fuzz_mutator!(|data: &mut [u8], size: usize, max_size: usize, seed: u32| {
    let mut leaf = |bytes: &mut Vec<u8>| {
        let size = bytes.len();
        bytes.resize(size + 16, 0);
        let changed = fuzzer_mutate(bytes, size, size + 16);
        bytes.truncate(changed);
    };
    // Now and then without regard to what it is.
    let mutated =
        if seed % 8 == 0 { None } else { protobuf::mutate(&data[..size], seed, &mut leaf) };
    match mutated.filter(|bytes| bytes.len() <= max_size) {
        Some(bytes) => {
            data[..bytes.len()].copy_from_slice(&bytes);
            bytes.len()
        }
        None => fuzzer_mutate(data, size, max_size),
    }
});
