//! What the house's other software lives on: counts, pictures, Home Assistant. By the real program,
//! over a real broker.

mod topics;
