//! `inbox/rejected/`: refused files, each with `<name>.reason.json` beside it. Bounded: the oldest
//! go when there are too many.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use nix::dir::Dir;
use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, RenameFlags, openat, renameat2};
use nix::sys::stat::{Mode, fstatat, mkdirat};
use nix::unistd::{UnlinkatFlags, unlinkat};

use super::job::Reason;
use super::store::StoreError;

/// Files and their reasons.
const ENTRIES_MAX: usize = 512;

/// Their bytes.
const BYTES_MAX: u64 = 1 << 30;

/// Characters of a name that are kept: `-999` and `.reason.json` must fit behind.
const NAME_MAX: usize = 128;

/// The open directory.
pub(super) struct Rejected {
    dir: OwnedFd,
    path: PathBuf,
}

impl Rejected {
    /// Opens, or makes, `rejected` in the inbox. A link of that name is not followed.
    pub(super) fn open(inbox: BorrowedFd<'_>, path: &Path) -> Result<Self, StoreError> {
        let path = path.join("rejected");
        let failed = |e: Errno| StoreError::io(&path)(e.into());
        match mkdirat(inbox, "rejected", Mode::from_bits_truncate(0o750)) {
            Ok(()) | Err(Errno::EEXIST) => {}
            Err(e) => return Err(failed(e)),
        }
        let flags = OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let dir = openat(inbox, "rejected", flags, Mode::empty()).map_err(failed)?;
        Ok(Self { dir, path })
    }

    /// Moves an entry of the inbox here, whatever it is.
    pub(super) fn take(
        &self,
        inbox: BorrowedFd<'_>,
        name: &OsStr,
        reason: &Reason,
    ) -> Result<(), StoreError> {
        let moved = self.free_name(name, |target| {
            let flags = RenameFlags::RENAME_NOREPLACE;
            renameat2(inbox, name.as_bytes(), &self.dir, target, flags)
        })?;
        self.explain(&moved, &name.to_string_lossy(), reason)
    }

    /// Writes bytes here.
    pub(super) fn put(
        &self,
        name: &str,
        bytes: &mut impl Read,
        reason: &Reason,
    ) -> Result<(), StoreError> {
        let mut made = None;
        let target = self.free_name(OsStr::new(name), |target| {
            made = Some(self.create(target)?);
            Ok(())
        })?;
        let copied = io::copy(bytes, made.as_mut().expect("it was made for this name"));
        copied.map_err(StoreError::io(&self.path))?;
        self.explain(&target, name, reason)
    }

    fn create(&self, name: &str) -> nix::Result<File> {
        let flags =
            OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        openat(&self.dir, name, flags, Mode::from_bits_truncate(0o640)).map(File::from)
    }

    /// Tries `make` with names that can be written and read by anyone until one is free.
    fn free_name(
        &self,
        name: &OsStr,
        mut make: impl FnMut(&str) -> nix::Result<()>,
    ) -> Result<String, StoreError> {
        let base = plain_name(name);
        for n in 0..1000 {
            let target = if n == 0 { base.clone() } else { format!("{base}-{n}") };
            match make(&target) {
                Ok(()) => return Ok(target),
                Err(Errno::EEXIST) => {}
                Err(e) => return Err(StoreError::io(&self.path)(e.into())),
            }
        }
        Err(StoreError::io(&self.path)(io::ErrorKind::AlreadyExists.into()))
    }

    fn explain(&self, target: &str, name: &str, reason: &Reason) -> Result<(), StoreError> {
        let reason_name = format!("{target}.reason.json");
        let text = serde_json::json!({
            "name": name, "code": reason.code, "message": reason.message,
        });
        // One that is left from a file that somebody took away belongs to that.
        let _ = unlinkat(&self.dir, reason_name.as_str(), UnlinkatFlags::NoRemoveDir);
        let mut file =
            self.create(&reason_name).map_err(|e| StoreError::io(&self.path)(e.into()))?;
        writeln!(file, "{text:#}").map_err(StoreError::io(&self.path))?;
        self.prune();
        Ok(())
    }

    fn prune(&self) {
        let flags = OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let Ok(mut listing) = Dir::openat(&self.dir, ".", flags, Mode::empty()) else { return };
        let names = listing.iter().flatten().map(|e| e.file_name().to_owned());
        let names = names.filter(|n| !matches!(n.to_bytes(), b"." | b".."));
        let stat = |name: std::ffi::CString| {
            let stat = fstatat(self.dir.as_fd(), name.as_c_str(), AtFlags::AT_SYMLINK_NOFOLLOW);
            stat.ok().map(|s| ((s.st_ctime, s.st_ctime_nsec), s.st_size.unsigned_abs(), name))
        };
        let mut entries: Vec<_> = names.filter_map(stat).collect();
        entries.sort();
        let mut bytes: u64 = entries.iter().map(|e| e.1).sum();
        let mut count = entries.len();
        for (_, size, name) in &entries {
            if count <= ENTRIES_MAX && bytes <= BYTES_MAX {
                break;
            }
            // A directory stays: nothing is ever removed recursively.
            let _ = unlinkat(&self.dir, name.as_c_str(), UnlinkatFlags::NoRemoveDir);
            bytes -= size;
            count -= 1;
        }
    }
}

/// A name as any tool can write and read it: `_` for what is not a plain character, cut.
pub fn plain_name(name: &OsStr) -> String {
    let plain = |c: char| if c.is_ascii_alphanumeric() || "._-".contains(c) { c } else { '_' };
    name.to_string_lossy().chars().map(plain).take(NAME_MAX).collect()
}
