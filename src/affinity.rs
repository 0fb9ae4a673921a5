//! Which cores the worker runs on. A session's pool threads inherit them from the thread that
//! builds the session, so that one is pinned as well.

use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;

/// The cores that this thread may run on, lowest first.
pub fn allowed() -> Vec<usize> {
    let this_thread = Pid::from_raw(0);
    let Ok(set) = sched_getaffinity(this_thread) else { return Vec::new() };
    (0..CpuSet::count()).filter(|&core| set.is_set(core).unwrap_or(false)).collect()
}

/// As many cores as a run has threads, from the upper end: the lower ones serve most interrupts,
/// and the decoders go where there is room. A box with no more cores than threads gives all.
pub fn choose(threads: usize) -> Vec<usize> {
    let allowed = allowed();
    let first = allowed.len().saturating_sub(threads);
    allowed[first..].to_vec()
}

/// Pins this thread, and the threads that it will start.
pub fn pin(cores: &[usize]) -> Result<(), String> {
    let possible = allowed();
    if let Some(core) = cores.iter().find(|c| !possible.contains(c)) {
        return Err(format!(
            "inference.cores = {cores:?}: core {core} is not one that this process may use ({possible:?})"
        ));
    }
    let mut set = CpuSet::new();
    for &core in cores {
        set.set(core).map_err(|e| format!("core {core}: {e}"))?;
    }
    sched_setaffinity(Pid::from_raw(0), &set)
        .map_err(|e| format!("this thread can't be pinned to cores {cores:?}: {e}"))
}
