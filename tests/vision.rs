//! Geometry, resampling, colour, decode, suppression.
