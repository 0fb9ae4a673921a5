//! From the worker to the broker.
//!
//! `outbox` holds the records that must arrive (`line` and `gaps` are what it is made of), `board`
//! what is merely current; both are filled by any thread and never block it. `spooler` is the thread
//! that keeps what waits for long on disk, in the file of `spool`. `link` keeps a connection to a
//! broker and empties them; `session` is one connection and `wire` its bytes, which with `listener`,
//! a plain client for commands, is all that names rumqttc. `inbound` hands on what comes in. `tls`,
//! `failure`, `backoff` and `status` are the link's trust, its words, its patience and its state.
//! `broker` is the broker inside, for a box without another. Nothing here may ever make the worker
//! wait.

pub mod backoff;
pub mod board;
pub mod broker;
pub mod failure;
pub mod gaps;
mod inbound;
mod line;
pub mod link;
pub mod listener;
pub mod outbox;
mod session;
mod spool;
pub mod spooler;
pub mod status;
pub mod tls;
pub mod topics;
mod wire;
