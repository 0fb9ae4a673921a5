//! Records arrive, whatever the broker does; and what is wrong with a broker is said.

mod delivery;
mod embedded;
mod faults;
mod outbox;
mod peers;
mod pure;
mod spool;
mod trouble;
