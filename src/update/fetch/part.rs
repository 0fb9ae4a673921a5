//! The `.part` file of a chunked transfer and, beside it, the map of what is in it.
//!
//! ```text
//! x.part.map:  "noblink map 1\n" │ digest (32) │ size (8, big-endian) │ per chunk its hash (32), 0 = missing
//! ```
//!
//! The map is a claim that is checked: after a restart a chunk counts only if it still has the hash
//! that the map says. So neither file needs syncing while chunks come, and whatever order a power
//! cut leaves them in, at worst a chunk is asked for again.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use super::chunks::{Accepted, CHUNK_SIZE};
use super::{FetchError, beside, open_own, remove, reserve};
use crate::update::digest::Digest;

const MAGIC: &[u8] = b"noblink map 1\n";
const HASH: usize = 32;
const HEAD: usize = MAGIC.len() + HASH + 8;

/// An open `.part` file with its map.
pub(super) struct PartFile {
    path: PathBuf,
    file: File,
    map_path: PathBuf,
    map: File,
}

impl PartFile {
    /// Opens both, or makes them. Returns which chunks are there, and whether there is a map to
    /// vouch for them: bytes that came over HTTP have none, only their digest in the end.
    pub(super) fn open(
        path: &Path,
        digest: &Digest,
        size: u64,
    ) -> Result<(Self, Vec<bool>, bool), FetchError> {
        let map_path = beside(path, "map");
        let file = open_own(path)?;
        let length = file.metadata().map_err(|e| FetchError::storage(path, &e))?.len();
        let held = mapped(&file, &map_path, digest, size);
        let map = open_own(&map_path)?;
        let part = Self { path: path.to_owned(), file, map_path, map };
        let mapped = held.is_some();
        let mut hashes = held.unwrap_or_default();
        if !mapped && length <= size {
            // A file on its way by HTTP is whole up to its length.
            hashes = hashes_of(&part.file, length.min(size), size);
        }
        let kept = if hashes.is_empty() { 0 } else { length.min(size) };
        part.file.set_len(kept).map_err(|e| FetchError::storage(path, &e))?;
        part.begin_map(digest, size, &hashes)?;
        reserve(&part.file, path, size)?;
        let held: Vec<bool> = hashes.iter().map(Option::is_some).collect();
        let vouched = mapped || !held.contains(&true);
        Ok((part, held, vouched))
    }

    /// Bytes from the start that the map vouches for, if there is one; it is spent by this.
    pub(super) fn whole_prefix(
        path: &Path,
        digest: &Digest,
        size: u64,
    ) -> Result<Option<u64>, FetchError> {
        let map_path = beside(path, "map");
        let file = open_own(path)?;
        let Some(hashes) = mapped(&file, &map_path, digest, size) else { return Ok(None) };
        remove(&map_path);
        let chunks = hashes.iter().take_while(|h| h.is_some()).count() as u64;
        Ok(Some((chunks * CHUNK_SIZE as u64).min(size)))
    }

    fn begin_map(
        &self,
        digest: &Digest,
        size: u64,
        hashes: &[Option<[u8; HASH]>],
    ) -> Result<(), FetchError> {
        let mut bytes = [MAGIC, &digest.0, &size.to_be_bytes()].concat();
        bytes.extend(hashes.iter().flat_map(|h| h.unwrap_or([0; HASH])));
        let written = self.map.set_len(0).and_then(|()| self.map.write_all_at(&bytes, 0));
        written.map_err(|e| FetchError::storage(&self.map_path, &e))
    }

    /// Writes a chunk, then its entry.
    pub(super) fn put(&self, chunk: &Accepted<'_>) -> Result<(), FetchError> {
        self.file
            .write_all_at(chunk.data, chunk.offset)
            .map_err(|e| FetchError::storage(&self.path, &e))?;
        let entry = HEAD as u64 + u64::from(chunk.index) * HASH as u64;
        self.map
            .write_all_at(&chunk.hash, entry)
            .map_err(|e| FetchError::storage(&self.map_path, &e))
    }

    /// Syncs the bytes.
    pub(super) fn sync(&self) -> Result<(), FetchError> {
        self.file.sync_data().map_err(|e| FetchError::storage(&self.path, &e))
    }

    /// The map is no longer needed.
    pub(super) fn forget_map(&self) {
        remove(&self.map_path);
    }

    /// Nothing is left of either.
    pub(super) fn discard(&self) {
        remove(&self.map_path);
        remove(&self.path);
    }
}

/// What the map says of this very file and is true; none without such a map.
fn mapped(
    file: &File,
    map_path: &Path,
    digest: &Digest,
    size: u64,
) -> Option<Vec<Option<[u8; HASH]>>> {
    let entries = usize::try_from(size.div_ceil(CHUNK_SIZE as u64)).ok()?;
    let mut map = Vec::new();
    let bound = (HEAD + entries * HASH) as u64;
    File::open(map_path).ok()?.take(bound).read_to_end(&mut map).ok()?;
    let rest = map.strip_prefix(MAGIC)?.strip_prefix(&digest.0)?;
    let rest = rest.strip_prefix(&size.to_be_bytes())?;
    let mut claims = rest.chunks_exact(HASH);
    let mut buffer = vec![0; CHUNK_SIZE];
    let hashes = (0..entries).map(|index| {
        let claim: [u8; HASH] = claims.next()?.try_into().ok()?;
        if claim == [0; HASH] {
            return None;
        }
        let hash = hash_of(file, index, size, &mut buffer).ok()?;
        (hash == claim).then_some(hash)
    });
    Some(hashes.collect())
}

/// The hashes of the chunks that lie within the first `length` bytes.
fn hashes_of(file: &File, length: u64, size: u64) -> Vec<Option<[u8; HASH]>> {
    let whole =
        if length == size { size.div_ceil(CHUNK_SIZE as u64) } else { length / CHUNK_SIZE as u64 };
    let mut buffer = vec![0; CHUNK_SIZE];
    (0..whole as usize).map(|index| hash_of(file, index, size, &mut buffer).ok()).collect()
}

fn hash_of(file: &File, index: usize, size: u64, buffer: &mut [u8]) -> io::Result<[u8; HASH]> {
    let offset = index as u64 * CHUNK_SIZE as u64;
    let length = (size - offset).min(CHUNK_SIZE as u64) as usize;
    file.read_exact_at(&mut buffer[..length], offset)?;
    Ok(Digest::of(&buffer[..length]).0)
}
