//! What the process costs its machine, out of `/proc/self`.

use std::io;

use nix::libc;
use serde::Serialize;

/// The process and its machine.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct Host {
    /// Share of one core that the process used over the window, percent.
    pub cpu_pct: f64,
    /// Resident memory, megabytes (10⁶ bytes).
    pub rss_mb: f64,
    /// Threads.
    pub threads: u64,
    /// Open file descriptors.
    pub fds: u64,
}

impl Host {
    /// Reads the figures now. `before` and `window_s` give the window for `cpu_pct`.
    pub fn read(before_cpu_s: f64, window_s: f64) -> Self {
        let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
        let field = |name: &str| -> f64 {
            let line = status.lines().find_map(|l| l.strip_prefix(name));
            let number = line.and_then(|l| l.split_whitespace().next());
            number.and_then(|n| n.parse().ok()).unwrap_or(0.0)
        };
        let used = (cpu_seconds() - before_cpu_s).max(0.0);
        Self {
            cpu_pct: crate::records::rounded(100.0 * used / window_s.max(1e-3), 1),
            rss_mb: crate::records::rounded(field("VmRSS:") * 1024.0 / 1e6, 1),
            threads: field("Threads:") as u64,
            fds: std::fs::read_dir("/proc/self/fd").map_or(0, |d| d.count() as u64),
        }
    }
}

/// Arenas of the allocator. By itself glibc makes one for nearly each thread, up to eight a core, and
/// every update's step is a new thread: what a session leaves behind in one arena is of no use to the
/// next, which is built in another.
const ARENAS: i32 = 2;

/// Keeps the allocator to few arenas. To be called before there are threads.
pub fn bound_arenas() {
    #[cfg(target_env = "gnu")]
    // SAFETY: it takes numbers, and no other thread is there yet.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, ARENAS);
    }
}

/// Hands memory that was freed back to the system: glibc keeps it otherwise, and each retired
/// session would leave its share behind.
pub fn give_memory_back() {
    // SAFETY: it takes no pointer and may be called by any thread at any time.
    unsafe { libc::malloc_trim(0) };
}

/// The niceness of what can wait: it gets a tenth of what a thread of the path gets.
pub const NICE: i32 = 10;

/// Lets this thread, and those that it starts, yield to all others. One that is nicer already stays
/// so.
///
/// # Errors
/// The system's; the priority stays as it is.
pub fn lower_priority(niceness: i32) -> io::Result<()> {
    // SAFETY: both calls take and return numbers; `errno` is cleared since -1 is a priority as well.
    unsafe {
        *libc::__errno_location() = 0;
        let now = libc::getpriority(libc::PRIO_PROCESS, 0);
        if now == -1 && *libc::__errno_location() != 0 {
            return Err(io::Error::last_os_error());
        }
        match libc::setpriority(libc::PRIO_PROCESS, 0, now.max(niceness)) {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

/// CPU time of all threads of the process so far, seconds.
pub fn cpu_seconds() -> f64 {
    let usage = nix::sys::resource::getrusage(nix::sys::resource::UsageWho::RUSAGE_SELF);
    let Ok(usage) = usage else { return 0.0 };
    let seconds = |t: nix::sys::time::TimeVal| t.tv_sec() as f64 + t.tv_usec() as f64 / 1e6;
    seconds(usage.user_time()) + seconds(usage.system_time())
}

/// The machine as far as the speed of a model depends on it: its processor and its cores.
pub fn machine() -> String {
    let processor = processor("model name").unwrap_or_else(|| std::env::consts::ARCH.into());
    format!("{processor}, {} cores", cores())
}

/// Cores of the machine, whatever this thread is pinned to.
pub fn cores() -> usize {
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    text.lines().filter(|line| line.starts_with("processor")).count().max(1)
}

/// Whether the processor multiplies 16-bit floats (bfloat16): elsewhere they only cost accuracy.
pub fn has_bf16() -> bool {
    #[cfg(target_arch = "x86_64")]
    return is_x86_feature_detected!("avx512bf16");
    #[cfg(not(target_arch = "x86_64"))]
    false
}

/// Whether this is one of Intel's x86 processors.
pub fn is_intel() -> bool {
    processor("vendor_id").is_some_and(|vendor| vendor == "GenuineIntel")
}

/// What the kernel says of the first processor.
fn processor(field: &str) -> Option<String> {
    let text = std::fs::read_to_string("/proc/cpuinfo").ok()?;
    let (_, value) =
        text.lines().find_map(|l| l.split_once(':').filter(|(n, _)| n.trim() == field))?;
    Some(value.trim().to_owned())
}
