#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| noblink_fuzz::signature::check(data));
