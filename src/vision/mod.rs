//! Pixels in, boxes out: pure functions that know no I/O, no clock and no lock.

pub mod picture;
