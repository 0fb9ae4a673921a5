//! What the child does to itself before it touches a model: limits, no network, last in line.
//!
//! It is our own program until the model's bytes reach ONNX Runtime, so it can be trusted to lock
//! itself in; the parent needs no code between `fork` and `exec` for it. The parent watches what
//! can't be locked: memory and the clock on the wall.

use std::fs;
use std::io;
use std::time::Duration;

use nix::libc;
use nix::sched::{CloneFlags, unshare};
use nix::sys::prctl;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::Signal;
use nix::time::{ClockId, clock_gettime};
use serde_json::{Value, json};

use super::wire::Ticket;
use crate::{affinity, host};

/// Locks this process in. Must come before any thread is started. Returns what was reached, for the
/// report: a box that does not allow a lock shows so.
pub(super) fn confine(ticket: &Ticket) -> Result<(Value, Allowance), String> {
    setrlimit(Resource::RLIMIT_CORE, 0, 0).map_err(|e| format!("core files: {e}"))?;
    // Writing fails instead of killing: a provider may try to keep a cache.
    ignore_file_size_signal()?;
    setrlimit(Resource::RLIMIT_FSIZE, 0, 0).map_err(|e| format!("no files: {e}"))?;
    let allowance = Allowance::new(ticket)?;
    // The kernel takes this process before any other when memory runs out.
    let oom = fs::write("/proc/self/oom_score_adj", "1000");
    let niced = host::lower_priority(ticket.nice);
    if let Some(cores) = &ticket.cores {
        affinity::pin(cores)?;
    }
    let namespace = leave_network();
    let filter = filter_system_calls();
    // After the namespace, which clears it.
    prctl::set_pdeathsig(Signal::SIGKILL).map_err(|e| format!("parent's death: {e}"))?;
    if nix::unistd::getppid().as_raw() != ticket.parent {
        return Err("the parent is gone".into());
    }
    // One of the two is enough; without both the report says so in words.
    let offline = namespace.is_ok() || filter.is_ok();
    let outcome = |result: Result<&str, String>| match result {
        Ok(how) => how.to_owned(),
        Err(why) => format!("not possible: {why}"),
    };
    let reached = json!({
        "offline": offline,
        "network_namespace": outcome(namespace),
        "system_call_filter": outcome(filter.map(|()| "on").map_err(|e| e.to_string())),
        "oom_score_adj": outcome(oom.map(|()| "1000").map_err(|e| e.to_string())),
        "nice": outcome(niced.map(|()| "on").map_err(|e| e.to_string())),
    });
    Ok((reached, allowance))
}

/// CPU time, a step at a time: what is spent in one is given back for the next, so that a folder of
/// many pictures takes its time while a model that never returns does not.
#[derive(Debug)]
pub(in crate::update) struct Allowance {
    step_s: u64,
    hard_s: u64,
}

impl Allowance {
    fn new(ticket: &Ticket) -> Result<Self, String> {
        let failed = |e: nix::Error| format!("CPU time: {e}");
        let (_, hard) = getrlimit(Resource::RLIMIT_CPU).map_err(failed)?;
        let allowance = Self { step_s: ticket.cpu_s, hard_s: hard.min(ticket.cpu_total_s) };
        allowance.renew().map_err(failed)?;
        Ok(allowance)
    }

    /// From now on a step's time may be spent.
    pub(in crate::update) fn renew(&self) -> nix::Result<()> {
        // The kernel compares whole seconds: one more, so that a step never has less than it may.
        let used = process_cpu().as_secs() + 1;
        let soft = (used + self.step_s).min(self.hard_s);
        setrlimit(Resource::RLIMIT_CPU, soft, self.hard_s)
    }
}

/// CPU time of all threads of this process.
pub(in crate::update) fn process_cpu() -> Duration {
    clock_gettime(ClockId::CLOCK_PROCESS_CPUTIME_ID).map(Duration::from).unwrap_or_default()
}

/// Whether memory that was written may be executed: `MemoryDenyWriteExecute=yes` of the unit forbids it.
pub(in crate::update) fn may_make_code() -> bool {
    let (size, write) = (4096, libc::PROT_READ | libc::PROT_WRITE);
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    // SAFETY: a page of its own, which nobody else knows and which goes again at once.
    unsafe {
        let page = libc::mmap(std::ptr::null_mut(), size, write, flags, -1, 0);
        if page == libc::MAP_FAILED {
            return false;
        }
        let may = libc::mprotect(page, size, write | libc::PROT_EXEC) == 0;
        libc::munmap(page, size);
        may
    }
}

fn ignore_file_size_signal() -> Result<(), String> {
    // SAFETY: no handler is installed, the signal is ignored.
    unsafe { nix::sys::signal::signal(Signal::SIGXFSZ, nix::sys::signal::SigHandler::SigIgn) }
        .map(drop)
        .map_err(|e| format!("SIGXFSZ: {e}"))
}

/// An own network with nothing in it. Root may have one, others together with an own user
/// namespace; containers and systemd's `RestrictNamespaces` allow neither.
fn leave_network() -> Result<&'static str, String> {
    match unshare(CloneFlags::CLONE_NEWNET) {
        Ok(()) => Ok("own"),
        Err(_) => unshare(CloneFlags::CLONE_NEWUSER | CloneFlags::CLONE_NEWNET)
            .map(|()| "own, with an own user namespace")
            .map_err(|e| e.to_string()),
    }
}

/// The architecture that the numbers of system calls below are of (`linux/audit.h`).
#[cfg(target_arch = "x86_64")]
const ARCHITECTURE: u32 = 0xc000_003e;
#[cfg(target_arch = "aarch64")]
const ARCHITECTURE: u32 = 0xc000_00b7;

/// What a model has no business with: talking to anyone, starting programs, other processes.
const DENIED: [libc::c_long; 9] = [
    libc::SYS_socket,
    libc::SYS_socketpair,
    libc::SYS_io_uring_setup,
    libc::SYS_execve,
    libc::SYS_execveat,
    libc::SYS_ptrace,
    libc::SYS_process_vm_writev,
    libc::SYS_process_vm_readv,
    libc::SYS_kill,
];

/// Numbers of x86-64 from here on are those of its 32-bit dialect.
const X32: u32 = 0x4000_0000;

/// Refuses [`DENIED`] for good; needs no privilege, so it holds where namespaces are not allowed.
fn filter_system_calls() -> io::Result<()> {
    let statement = |code: u32, k: u32| libc::sock_filter { code: code as u16, jt: 0, jf: 0, k };
    let jump =
        |code: u32, k: u32, jt: u8, jf: u8| libc::sock_filter { code: code as u16, jt, jf, k };
    let load = libc::BPF_LD | libc::BPF_W | libc::BPF_ABS;
    let equal = libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K;
    let at_least = libc::BPF_JMP | libc::BPF_JGE | libc::BPF_K;
    let end = libc::BPF_RET | libc::BPF_K;
    // `struct seccomp_data`: the number at 0, the architecture at 4.
    let denied = DENIED.len() as u8;
    let mut program = vec![
        statement(load, 4),
        jump(equal, ARCHITECTURE, 0, denied + 3),
        statement(load, 0),
        jump(at_least, X32, denied + 1, 0),
    ];
    for (n, call) in (0..denied).zip(DENIED) {
        program.push(jump(equal, call as u32, denied - n, 0));
    }
    program.push(statement(end, libc::SECCOMP_RET_ALLOW));
    program.push(statement(end, libc::SECCOMP_RET_ERRNO | libc::EACCES as u32));
    prctl::set_no_new_privs()?;
    let program = libc::sock_fprog { len: program.len() as u16, filter: program.as_mut_ptr() };
    // SAFETY: the program and its length belong together and live until the call returns; the kernel
    // copies it.
    let done = unsafe { libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &program) };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
