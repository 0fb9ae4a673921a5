//! The store: immutable blobs by digest, and files on their way to become one.
//!
//! ```text
//! state_dir/blobs/sha256-<hex>      0444, complete and synced, or not there
//! state_dir/staging/*.part          on their way; those that no open job needs go at Collect
//! ```
//!
//! A blob comes to be by one `rename` after `fsync`, and the directory is synced after it. Bytes
//! are hashed as they are written, and again when they are loaded: what runs is what was judged.

use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};

use sha2::{Digest as _, Sha256};

use super::digest::Digest;
use super::failpoint;

/// Space that is left free beyond what a model needs, so that the registry can still be written.
pub const RESERVE_BYTES: u64 = 64 << 20;

/// Why the store or its registry can't be used.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The disk, a quota or the reserve.
    #[error("no space at {path}: {needed} bytes are needed beyond the reserve, {free} are free")]
    NoSpace {
        /// The directory.
        path: PathBuf,
        /// Bytes that are wanted.
        needed: u64,
        /// Bytes that are free.
        free: u64,
    },
    /// The file system can't be written.
    #[error("{path} can't be written: the file system is read-only")]
    ReadOnly {
        /// What was written to.
        path: PathBuf,
    },
    /// Another process has it open.
    #[error("{path} is in use by another noblink: stop that first")]
    InUse {
        /// The database.
        path: PathBuf,
    },
    /// A newer noblink wrote it.
    #[error("{path} has format {found}, this version knows {known}: update noblink")]
    Newer {
        /// The database.
        path: PathBuf,
        /// Its format.
        found: i64,
        /// Ours.
        known: i64,
    },
    /// The bytes are not what their name says.
    #[error("{path} is damaged: its bytes have digest {found}")]
    Damaged {
        /// The blob.
        path: PathBuf,
        /// What its bytes have.
        found: Digest,
    },
    /// More bytes than announced or allowed.
    #[error("more than {max} bytes")]
    TooLarge {
        /// The bound.
        max: u64,
    },
    /// Fewer bytes than announced.
    #[error("{found} of {wanted} bytes arrived: send it again")]
    Incomplete {
        /// What was announced.
        wanted: u64,
        /// What came.
        found: u64,
    },
    /// The bytes that were received are not those that were announced.
    #[error("the bytes received have digest {found}, {wanted} was announced")]
    Mismatch {
        /// What was announced.
        wanted: Digest,
        /// What came.
        found: Digest,
    },
    /// Anything else of the operating system.
    #[error("{path}: {source}")]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// What it said.
        source: io::Error,
    },
    /// Anything else of SQLite.
    #[error("{path}: {source}")]
    Database {
        /// The database.
        path: PathBuf,
        /// What it said.
        source: rusqlite::Error,
    },
}

impl StoreError {
    /// The code of a job that ends by it.
    pub fn code(&self) -> &'static str {
        match self {
            Self::NoSpace { .. } => "no_space",
            Self::ReadOnly { .. } => "read_only",
            Self::InUse { .. } => "in_use",
            Self::Newer { .. } => "newer_format",
            Self::Damaged { .. } => "blob_corrupt",
            Self::TooLarge { .. } => "too_large",
            Self::Incomplete { .. } => "incomplete",
            Self::Mismatch { .. } => "digest_mismatch",
            Self::Io { .. } | Self::Database { .. } => "storage_failed",
        }
    }

    pub(super) fn io(path: &Path) -> impl FnOnce(io::Error) -> Self + '_ {
        move |source| match source.raw_os_error() {
            Some(nix::libc::ENOSPC | nix::libc::EDQUOT) => {
                let dir = path.parent().unwrap_or(path);
                Self::NoSpace { path: dir.to_owned(), needed: 0, free: free_bytes(dir) }
            }
            Some(nix::libc::EROFS) => Self::ReadOnly { path: path.to_owned() },
            _ => Self::Io { path: path.to_owned(), source },
        }
    }
}

fn free_bytes(dir: &Path) -> u64 {
    nix::sys::statvfs::statvfs(dir).map_or(0, |s| s.blocks_available() * s.fragment_size())
}

/// Syncs a directory, so that names in it survive a power cut.
pub(super) fn sync_dir(dir: &Path) -> Result<(), StoreError> {
    File::open(dir).and_then(|d| d.sync_all()).map_err(StoreError::io(dir))
}

/// The blobs under one `state_dir`.
#[derive(Debug, Clone)]
pub struct Store {
    blobs: PathBuf,
    staging: PathBuf,
    reserve: u64,
    unnamed: Arc<Mutex<Unnamed>>,
}

/// What no job names yet, and is not collected all the same.
#[derive(Debug, Default)]
struct Unnamed {
    /// Whoever put them in is about to make a job: until [`Store::settle`].
    blobs: BTreeSet<Digest>,
    /// Somebody in this process writes them. Those of a process that died are nobody's.
    parts: BTreeSet<PathBuf>,
}

/// A complete blob.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Blob {
    /// Its digest.
    pub digest: Digest,
    /// Its size in bytes.
    pub size: u64,
}

impl Store {
    /// Opens, or makes, the store in `state_dir`; `reserve` bytes of its file system stay free.
    pub fn open(state_dir: &Path, reserve: u64) -> Result<Self, StoreError> {
        let store = Self {
            blobs: state_dir.join("blobs"),
            staging: state_dir.join("staging"),
            reserve,
            unnamed: Arc::default(),
        };
        for dir in [&store.blobs, &store.staging] {
            let mut builder = fs::DirBuilder::new();
            builder.recursive(true).mode(0o750);
            builder.create(dir).map_err(StoreError::io(dir))?;
        }
        sync_dir(state_dir)?;
        Ok(store)
    }

    /// Where the blob lies, or would lie.
    pub fn path(&self, digest: &Digest) -> PathBuf {
        self.blobs.join(format!("sha256-{digest}"))
    }

    /// A job names the blob now, or never will: from now on the state alone says what is kept.
    pub fn settle(&self, digest: &Digest) {
        self.unnamed().blobs.remove(digest);
    }

    fn unnamed(&self) -> MutexGuard<'_, Unnamed> {
        self.unnamed.lock().expect("nothing panics while it holds the unnamed")
    }

    /// Whether the blob is there.
    pub fn contains(&self, digest: &Digest) -> bool {
        self.path(digest).is_file()
    }

    /// The bytes of a blob, which have its digest: they are hashed as they are read.
    pub fn load(&self, digest: &Digest) -> Result<Vec<u8>, StoreError> {
        let path = self.path(digest);
        let bytes = fs::read(&path).map_err(StoreError::io(&path))?;
        match Digest::of(&bytes) {
            found if found == *digest => Ok(bytes),
            found => Err(StoreError::Damaged { path, found }),
        }
    }

    /// The blobs that are there.
    pub fn list(&self) -> Result<Vec<Digest>, StoreError> {
        let entries = fs::read_dir(&self.blobs).map_err(StoreError::io(&self.blobs))?;
        let name = |e: fs::DirEntry| e.file_name().to_str()?.strip_prefix("sha256-")?.parse().ok();
        let mut list: Vec<Digest> = entries.flatten().filter_map(name).collect();
        list.sort();
        Ok(list)
    }

    /// A new file on its way, of a digest that is not known yet; at most `max` bytes.
    pub fn stage(&self, expected: u64, max: u64) -> Result<Part, StoreError> {
        self.room(expected)?;
        let random = getrandom::u64().map_err(|e| io::Error::other(e.to_string()));
        let random = random.map_err(StoreError::io(&self.staging))?;
        let path = self.staging.join(format!("new-{random:016x}.part"));
        self.unnamed().parts.insert(path.clone());
        let file = part_options().create_new(true).open(&path).map_err(|e| {
            self.unnamed().parts.remove(&path);
            StoreError::io(&path)(e)
        })?;
        failpoint::hit("store.part_created");
        Ok(Part { store: self.clone(), path, file, hash: Sha256::new(), len: 0, max, keep: false })
    }

    /// The file on its way for a known digest: begun, or gone on with after an interruption. What
    /// is there is hashed again, so a torn tail shows at the end as a mismatch.
    ///
    /// Named by the digest, so that a transfer goes on by another job and another way.
    pub fn resume(&self, digest: &Digest, size: u64) -> Result<Part, StoreError> {
        let path = self.staging.join(format!("sha256-{digest}.part"));
        // One that was complete when the power went is read-only already.
        if path.symlink_metadata().is_ok_and(|m| m.is_file() && m.permissions().readonly()) {
            let writable = fs::Permissions::from_mode(0o600);
            fs::set_permissions(&path, writable).map_err(StoreError::io(&path))?;
        }
        let mut file = part_options().create(true).open(&path).map_err(StoreError::io(&path))?;
        let mut hash = Sha256::new();
        let mut len =
            io::copy(&mut file, &mut HashWriter(&mut hash)).map_err(StoreError::io(&path))?;
        if len > size {
            file.set_len(0).map_err(StoreError::io(&path))?;
            (hash, len) = (Sha256::new(), 0);
        }
        self.room(size - len)?;
        failpoint::hit("store.part_created");
        Ok(Part { store: self.clone(), path, file, hash, len, max: size, keep: true })
    }

    /// Where the file on its way lies for a known digest, if there is room for it.
    pub fn part_path(&self, digest: &Digest, size: u64) -> Result<PathBuf, StoreError> {
        let path = self.staging.join(format!("sha256-{digest}.part"));
        let there = path.symlink_metadata().map_or(0, |m| m.len());
        self.room(size.saturating_sub(there))?;
        Ok(path)
    }

    fn room(&self, needed: u64) -> Result<(), StoreError> {
        let free = free_bytes(&self.staging);
        if free < needed.saturating_add(self.reserve) {
            return Err(StoreError::NoSpace { path: self.staging.clone(), needed, free });
        }
        Ok(())
    }

    /// Removes blobs that are not to be kept, and staged files that nobody goes on with. Returns how
    /// many files went.
    pub fn collect(&self, keep: &BTreeSet<Digest>) -> Result<usize, StoreError> {
        let mut removed = 0;
        failpoint::hit("store.before_collect");
        // Held meanwhile: none of them comes to be between the look and the removal.
        let unnamed = self.unnamed();
        let wanted = |d: &&Digest| keep.contains(*d) || unnamed.blobs.contains(*d);
        for digest in self.list()?.iter().filter(|d| !wanted(d)) {
            let path = self.path(digest);
            fs::remove_file(&path).map_err(StoreError::io(&path))?;
            removed += 1;
        }
        let staged = fs::read_dir(&self.staging).map_err(StoreError::io(&self.staging))?;
        for path in staged.flatten().map(|e| e.path()) {
            let name = path.file_name().and_then(|n| n.to_str()).unwrap_or_default();
            let digest = name.strip_prefix("sha256-").and_then(|n| n.strip_suffix(".part"));
            let wanted = match digest.and_then(|d| d.parse().ok()) {
                Some(digest) => keep.contains(&digest) && !self.contains(&digest),
                None => unnamed.parts.contains(&path),
            };
            if !wanted {
                fs::remove_file(&path).map_err(StoreError::io(&path))?;
                removed += 1;
            }
        }
        failpoint::hit("store.collected");
        Ok(removed)
    }
}

fn part_options() -> OpenOptions {
    let mut options = OpenOptions::new();
    options.read(true).append(true).mode(0o600).custom_flags(nix::libc::O_NOFOLLOW);
    options
}

struct HashWriter<'a>(&'a mut Sha256);

impl Write for HashWriter<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.update(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A file on its way. Dropped unfinished it stays if its digest is known, and goes otherwise.
#[derive(Debug)]
pub struct Part {
    store: Store,
    path: PathBuf,
    file: File,
    hash: Sha256,
    len: u64,
    max: u64,
    keep: bool,
}

impl Part {
    /// Bytes that are there: where a transfer goes on.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Nothing is there yet.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Appends bytes.
    pub fn write(&mut self, bytes: &[u8]) -> Result<(), StoreError> {
        if self.len + bytes.len() as u64 > self.max {
            return Err(StoreError::TooLarge { max: self.max });
        }
        if let Err(e) = self.file.write_all(bytes) {
            // How much of it arrived is not known: what was hashed is made true again.
            let _ = self.file.set_len(self.len);
            return Err(StoreError::io(&self.path)(e));
        }
        self.hash.update(bytes);
        self.len += bytes.len() as u64;
        Ok(())
    }

    /// Appends all that a reader gives.
    pub fn copy(&mut self, reader: &mut impl Read) -> Result<(), StoreError> {
        let mut buffer = vec![0; 1 << 18];
        loop {
            match reader.read(&mut buffer) {
                Ok(0) => return Ok(()),
                Ok(n) => self.write(&buffer[..n])?,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(StoreError::io(&self.path)(e)),
            }
        }
    }

    /// Makes it a blob. With `wanted`, only if it has that digest; else it is removed.
    ///
    /// After an error nothing of it is left: a failed `fsync` must not be tried again, because the
    /// kernel has forgotten which pages were lost.
    pub fn finish(mut self, wanted: Option<&Digest>) -> Result<Blob, StoreError> {
        self.keep = false;
        let found = Digest(std::mem::take(&mut self.hash).finalize().into());
        if let Some(wanted) = wanted.filter(|w| **w != found) {
            return Err(StoreError::Mismatch { wanted: *wanted, found });
        }
        failpoint::hit("store.part_written");
        let blob = Blob { digest: found, size: self.len };
        let target = self.store.path(&found);
        let read_only = fs::Permissions::from_mode(0o444);
        self.file.set_permissions(read_only).map_err(StoreError::io(&self.path))?;
        self.file.sync_all().map_err(StoreError::io(&self.path))?;
        failpoint::hit("store.part_synced");
        if wanted.is_none() {
            self.store.unnamed().blobs.insert(found);
        }
        // Over an existing blob too: a damaged one is repaired by sending it again.
        fs::rename(&self.path, &target).map_err(StoreError::io(&target))?;
        failpoint::hit("store.renamed");
        self.keep = true;
        sync_dir(&self.store.blobs)?;
        sync_dir(&self.store.staging)?;
        failpoint::hit("store.blob_synced");
        Ok(blob)
    }

    /// Gives it up: nothing is left of it.
    pub fn discard(mut self) {
        self.keep = false;
    }
}

impl Drop for Part {
    fn drop(&mut self) {
        if !self.keep {
            let _ = fs::remove_file(&self.path);
        }
        self.store.unnamed().parts.remove(&self.path);
    }
}
