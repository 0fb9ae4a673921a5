//! Places where a test ends the process, as a power cut or `kill -9` would, or leaves a step out.
//!
//! Always compiled in: the binary that is tested is the one that ships, and nothing here is on the
//! frame's path. Without the variable a failpoint costs one atomic load.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};

/// `NOBLINK_FAILPOINT=store.rename` dies there; `NOBLINK_FAILPOINT=#7` at the seventh failpoint
/// that is passed, whichever it is: a test counts up until nothing dies any more.
pub const VARIABLE: &str = "NOBLINK_FAILPOINT";

/// Every failpoint, in the order of an install from the inbox.
pub const NAMES: [&str; 14] = [
    "inbox.opened",
    "store.part_created",
    "store.part_written",
    "store.part_synced",
    "store.renamed",
    "store.blob_synced",
    "inbox.staged",
    "registry.model",
    "registry.before_commit",
    "registry.after_commit",
    "inbox.before_remove",
    "inbox.removed",
    "store.before_collect",
    "store.collected",
];

/// Leaves out asking a hanging run to end: a kernel that hangs does not hear of it either.
pub const DEAF: &str = "watch.terminate";

/// Leaves the reference out of the choice of a setting: another one takes over, and stays, however
/// little it is faster, so that a test sees the move on every machine.
pub const REFERENCE: &str = "tune.reference";

/// Takes the first run of a new setting for failed.
pub const TRIAL: &str = "tune.trial";

enum Armed {
    Name(String),
    Nth(usize),
}

static ARMED: OnceLock<Option<Armed>> = OnceLock::new();
static PASSED: AtomicUsize = AtomicUsize::new(0);

fn armed() -> &'static Option<Armed> {
    ARMED.get_or_init(|| {
        let value = std::env::var(VARIABLE).ok()?;
        Some(match value.strip_prefix('#').and_then(|n| n.parse().ok()) {
            Some(nth) => Armed::Nth(nth),
            None => Armed::Name(value),
        })
    })
}

/// Whether the environment says to leave this step out.
pub(super) fn leaves_out(name: &'static str) -> bool {
    matches!(armed(), Some(Armed::Name(wanted)) if wanted == name)
}

/// Ends the process here if the environment says so.
pub(super) fn hit(name: &'static str) {
    debug_assert!(NAMES.contains(&name), "{name} is not listed");
    let here = match armed() {
        None => return,
        Some(Armed::Name(wanted)) => wanted == name,
        Some(Armed::Nth(nth)) => PASSED.fetch_add(1, Ordering::Relaxed) + 1 == *nth,
    };
    if here {
        eprintln!("failpoint {name}: the process ends here");
        // SIGKILL and not abort: no handler, no core, no buffer flushed, as when the power goes.
        let _ = nix::sys::signal::kill(nix::unistd::getpid(), nix::sys::signal::Signal::SIGKILL);
    }
}
