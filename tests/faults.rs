//! The update path of a whole running service under faults: bad models by every way in, models that
//! fail when they are live, a broker that goes away, a process that is killed.

mod broker;
mod commands;
mod kills;
mod rejections;
mod rollback;
