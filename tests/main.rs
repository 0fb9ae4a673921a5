//! The integration tests: one binary, one module per capability.
#![allow(missing_docs, unreachable_pub)]

mod api;
mod camera;
mod cli;
mod config;
mod faults;
mod fetch;
mod fleet;
mod fuzz;
mod gates;
mod harness;
mod model;
mod mqtt;
mod package;
mod parity;
mod queue;
mod refusals;
mod rules;
mod security;
mod service;
mod swap;
mod update;
mod vision;
mod web;
