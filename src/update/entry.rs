//! One entry of the inbox: what it is, what lies beside it, who writes to it.

use std::ffi::{CString, OsStr};
use std::fs::File;
use std::io::Read;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::ffi::OsStrExt;

use nix::errno::Errno;
use nix::fcntl::{OFlag, openat};
use nix::libc;
use nix::sys::stat::{FileStat, Mode, SFlag, fstat};

use super::job::Reason;

/// Bytes of a file's name: what is refused must fit beside its reason.
const NAME_MAX: usize = 128;

/// What must not change while a file is waited for and copied.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Stamp {
    pub(super) inode: (u64, u64),
    pub(super) size: i64,
    pub(super) mtime: (i64, i64),
    pub(super) ctime: (i64, i64),
}

impl Stamp {
    pub(super) fn of(s: &FileStat) -> Self {
        Self {
            inode: (s.st_dev, s.st_ino),
            size: s.st_size,
            mtime: (s.st_mtime, s.st_mtime_nsec),
            ctime: (s.st_ctime, s.st_ctime_nsec),
        }
    }
}

/// Whether a process has a file open for writing.
pub(super) enum Writers {
    No,
    Yes,
    Unknown,
}

/// What is wrong with an entry as such.
pub(super) fn form(name: &OsStr, stat: &FileStat, size_max: u64) -> Option<Reason> {
    let kind = SFlag::from_bits_truncate(stat.st_mode & SFlag::S_IFMT.bits());
    let kind = match kind {
        SFlag::S_IFREG => None,
        SFlag::S_IFLNK => Some("a symbolic link"),
        SFlag::S_IFIFO => Some("a FIFO"),
        SFlag::S_IFDIR => Some("a directory"),
        SFlag::S_IFSOCK => Some("a socket"),
        _ => Some("a device"),
    };
    if let Some(kind) = kind {
        let text = format!("is {kind}: put the model's file itself here");
        return Some(Reason::new("not_a_file", text));
    }
    let odd = |text: &str| text.len() > NAME_MAX || text.chars().any(char::is_control);
    if name.to_str().is_none_or(odd) {
        let text = format!(
            "has a name of more than {NAME_MAX} bytes, or one that is no plain Unicode text: \
             rename it"
        );
        return Some(Reason::new("odd_name", text));
    }
    if stat.st_nlink != 1 {
        let text = "has another hard link, by which it could change unseen: copy it here";
        return Some(Reason::new("hard_link", text));
    }
    match stat.st_size as u64 {
        0 => Some(Reason::new("empty", "is empty: copy it again")),
        size if size > size_max => {
            let text = format!("has {size} bytes: {size_max} are allowed");
            Some(Reason::new("too_large", text))
        }
        _ => None,
    }
}

/// Whether a name is left alone: hidden, half-written, a backup, or the folder of what was refused.
pub fn is_ignored(name: &[u8]) -> bool {
    let ends = |end: &[u8]| name.ends_with(end);
    name.starts_with(b".") || name == b"rejected" || ends(b".part") || ends(b".tmp") || ends(b"~")
}

/// A name without its last extension.
pub fn stem(name: &str) -> &str {
    name.rsplit_once('.').map_or(name, |(stem, _)| stem)
}

/// The names of a model's manifest and of the signature over it.
pub fn sidecars(name: &str) -> [String; 2] {
    let manifest = format!("{}.manifest.json", stem(name));
    let signature = format!("{manifest}.minisig");
    [manifest, signature]
}

/// Whether a name is a manifest's or a signature's.
pub fn is_sidecar(name: &str) -> bool {
    name.ends_with(".manifest.json") || name.ends_with(".manifest.json.minisig")
}

/// Opens a regular file: no link is followed, and a FIFO does not block.
pub(super) fn open_in(dir: BorrowedFd<'_>, name: &OsStr) -> nix::Result<File> {
    let flags = OFlag::O_RDONLY | OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
    let name = CString::new(name.as_bytes()).map_err(|_| Errno::EINVAL)?;
    let file = openat(dir, name.as_c_str(), flags, Mode::empty())?;
    let stat = fstat(&file)?;
    match stat.st_mode & SFlag::S_IFMT.bits() == SFlag::S_IFREG.bits() && stat.st_nlink == 1 {
        true => Ok(File::from(file)),
        false => Err(Errno::EINVAL),
    }
}

/// At most `max` bytes and one more, which its reader will refuse.
pub(super) fn read_small(dir: BorrowedFd<'_>, name: &str, max: usize) -> Option<Vec<u8>> {
    let file = open_in(dir, OsStr::new(name)).ok()?;
    let mut bytes = Vec::new();
    file.take(max as u64 + 1).read_to_end(&mut bytes).ok()?;
    Some(bytes)
}

/// Asks for a read lease, which the kernel grants only while nobody has the file open for
/// writing, and gives it back at once.
pub(super) fn writers(file: &File) -> Writers {
    /// `asm-generic/fcntl.h`; missing in the libc crate for glibc.
    const F_SETSIG: libc::c_int = 10;
    let fcntl = |command: libc::c_int, argument: libc::c_int| {
        // SAFETY: the descriptor is open for the whole call, and these commands take an integer.
        Errno::result(unsafe { libc::fcntl(file.as_raw_fd(), command, argument) })
    };
    // Who opens the file for writing in between breaks the lease. The signal for that is SIGIO,
    // which ends a process; SIGURG is ignored unless someone handles it.
    if fcntl(F_SETSIG, libc::SIGURG).is_err() {
        return Writers::Unknown;
    }
    match fcntl(libc::F_SETLEASE, libc::F_RDLCK) {
        Ok(_) => match fcntl(libc::F_SETLEASE, libc::F_UNLCK) {
            Ok(_) => Writers::No,
            Err(_) => Writers::Unknown,
        },
        Err(Errno::EAGAIN) => Writers::Yes,
        // Another owner without CAP_LEASE, or a file system without leases.
        Err(_) => Writers::Unknown,
    }
}
