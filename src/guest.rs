//! A process beside the worker that stands still while frames are worked on.
//!
//! A model is proved in a child process, on the cores of the worker. Its niceness does not keep it
//! off them: in a run's hundreds of nodes the worker's threads wait for each other for moments in
//! which the kernel lets the child in, and each time the caches are the child's afterwards. So the
//! worker stops it when a frame has come, and lets it go on when none is left.
//!
//! On a box that never comes to the end of its frames it would stand still for ever. After
//! [`SPELL_MAX`] without a pause it goes on, at its low priority, until there is one.
//!
//! What that costs the frames shows when it is made to stand still in between ([`Guest::hold`]).

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::process::Child;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};

use nix::libc;

/// For how long frames without a pause between them hold it up.
const SPELL_MAX: Duration = Duration::from_millis(250);

/// The place beside the worker; one process at a time has it, the one that came last.
#[derive(Debug, Default)]
pub struct Guest {
    /// The worker looks at the seat only if somebody has it.
    taken: AtomicBool,
    /// Locked by others only to come and to go: the worker never waits for it.
    seat: Mutex<Option<Seat>>,
}

#[derive(Debug)]
struct Seat {
    /// Its number, to know it by.
    id: u32,
    /// What signals go to: not the number, which another process may have once this one is gone.
    process: OwnedFd,
    /// Since when the worker has had frames without a pause.
    spell: Option<Instant>,
    /// Frames or not.
    held: bool,
    still: bool,
}

/// As long as this lives, the process stands still for frames.
#[derive(Debug)]
pub struct Stay<'g> {
    guest: &'g Guest,
    id: u32,
}

impl Guest {
    /// Takes a child in. End it, or know it ended, before the stay is dropped.
    ///
    /// # Errors
    /// The kernel gives no handle of the process; it is left to its priority then.
    pub fn host(&self, child: &Child) -> io::Result<Stay<'_>> {
        // SAFETY: takes two numbers, returns a new descriptor or -1.
        let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, child.id() as libc::pid_t, 0) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: it was opened just now, and nobody else knows it.
        let process = unsafe { OwnedFd::from_raw_fd(fd as i32) };
        let id = child.id();
        *self.lock() = Some(Seat { id, process, spell: None, held: false, still: false });
        self.taken.store(true, Ordering::Relaxed);
        Ok(Stay { guest: self, id })
    }

    fn lock(&self) -> MutexGuard<'_, Option<Seat>> {
        self.seat.lock().expect("nothing panics while it holds the seat")
    }

    /// The worker has a frame.
    pub fn hush(&self) {
        self.tell(|seat| {
            let spell = *seat.spell.get_or_insert_with(Instant::now);
            spell.elapsed() < SPELL_MAX
        });
    }

    /// The worker has none.
    pub fn resume(&self) {
        self.tell(|seat| {
            seat.spell = None;
            false
        });
    }

    /// `still` says whether it is to stand still from here on.
    fn tell(&self, still: impl FnOnce(&mut Seat) -> bool) {
        if !self.taken.load(Ordering::Relaxed) {
            return;
        }
        if let Ok(mut seat) = self.seat.try_lock()
            && let Some(seat) = &mut *seat
        {
            let still = still(seat);
            seat.stand(still || seat.held);
        }
    }

    /// Makes it stand still, frames or not, until it is let go. Whether somebody stands still by that.
    pub fn hold(&self, held: bool) -> bool {
        let mut seat = self.lock();
        let Some(seat) = &mut *seat else { return false };
        if held != seat.held {
            seat.held = held;
            seat.stand(held);
        }
        held
    }
}

impl Seat {
    fn stand(&mut self, still: bool) {
        if still != self.still {
            self.signal(if still { libc::SIGSTOP } else { libc::SIGCONT });
            self.still = still;
        }
    }

    fn signal(&self, signal: libc::c_int) {
        let nothing = std::ptr::null::<libc::siginfo_t>();
        let fd = self.process.as_raw_fd();
        // SAFETY: the descriptor is open, and no information goes with the signal. It fails only when
        // the process is gone.
        unsafe { libc::syscall(libc::SYS_pidfd_send_signal, fd, signal, nothing, 0) };
    }
}

impl Drop for Stay<'_> {
    fn drop(&mut self) {
        let mut seat = self.guest.lock();
        // Another may have come while this one was ended.
        if seat.as_ref().is_some_and(|seat| seat.id == self.id) {
            *seat = None;
            self.guest.taken.store(false, Ordering::Relaxed);
        }
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        if self.still {
            self.signal(libc::SIGCONT);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `T` stopped, anything else not.
    fn stopped(child: &Child) -> bool {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", child.id())).expect("it lives");
        stat.rsplit(')').next().is_some_and(|rest| rest.trim_start().starts_with('T'))
    }

    fn becomes(child: &Child, wanted: bool) {
        let end = Instant::now() + Duration::from_secs(10);
        while stopped(child) != wanted {
            assert!(Instant::now() < end, "stopped: {wanted} is waited for");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    #[test]
    fn it_stands_still_for_frames_but_not_for_ever() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().expect("a process");
        let guest = Guest::default();
        guest.hush();
        let stay = guest.host(&child).expect("a handle");
        assert!(!stopped(&child), "nobody had it when the frame came");
        guest.hush();
        becomes(&child, true);
        guest.resume();
        becomes(&child, false);
        guest.hush();
        becomes(&child, true);
        // One frame after the other.
        std::thread::sleep(SPELL_MAX);
        guest.hush();
        becomes(&child, false);
        guest.hush();
        assert!(!stopped(&child), "until there is a pause");
        guest.resume();
        assert!(guest.hold(true));
        becomes(&child, true);
        guest.hush();
        guest.resume();
        assert!(stopped(&child), "it is held");
        assert!(!guest.hold(false));
        becomes(&child, false);
        guest.hush();
        becomes(&child, true);
        drop(stay);
        becomes(&child, false);
        guest.hush();
        assert!(!stopped(&child) && !guest.hold(true), "it has left");
        child.kill().expect("it is ours");
        child.wait().expect("it was killed");
    }
}
