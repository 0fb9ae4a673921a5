//! The chunked transfer over MQTT, without MQTT, files and clock: what to ask for, what to take.
//!
//! ```text
//!   device                                             sender
//!     │ xfer/<digest8>/want {sha256, chunk_size, from, count ≤ 16} │
//!     │ ────────────────────────────────────────────────────────► │
//!     │ ◄──────────────────────────────────────────────────────── │
//!     │    xfer/<digest8>/chunk/<n>   32 bytes SHA-256 │ data      │
//! ```
//!
//! The device pulls: nothing piles up in a broker, and a flood is not asked for. Its hash only says
//! that a chunk arrived as it was sent; trust comes from the digest of the whole at the end. A wish
//! that is not met in time is made again with half the count and twice the patience: a link that is
//! slow must not be filled with chunks that were asked for twice.

use std::fmt;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::Limits;
use crate::update::digest::Digest;

/// Bytes of a chunk; the last one may have fewer.
pub const CHUNK_SIZE: usize = 64 * 1024;

/// Chunks that one wish may ask for: they are what can be under way.
pub const WANT_COUNT_MAX: u32 = 16;

/// Bytes before the data.
const HASH_BYTES: usize = 32;

/// Bytes of a wish's payload: it has 130 or so.
const WANT_BYTES_MAX: usize = 1024;

/// The payload of `xfer/<digest8>/want`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Want {
    /// Which file.
    pub sha256: Digest,
    /// [`CHUNK_SIZE`]
    pub chunk_size: usize,
    /// The first chunk.
    pub from: u32,
    /// How many from there on, 1 to [`WANT_COUNT_MAX`].
    pub count: u32,
}

impl Want {
    /// Reads a wish; none if it is not one that could be met.
    pub fn parse(payload: &[u8]) -> Option<Self> {
        let payload = Some(payload).filter(|p| p.len() <= WANT_BYTES_MAX)?;
        let want: Self = serde_json::from_slice(payload).ok()?;
        let fits = want.chunk_size == CHUNK_SIZE && (1..=WANT_COUNT_MAX).contains(&want.count);
        fits.then_some(want)
    }

    /// As it is published.
    pub fn payload(&self) -> Vec<u8> {
        serde_json::to_vec(self).expect("numbers and a string always become JSON")
    }

    /// The chunks that it asks for in a file of `size` bytes.
    pub fn indices(&self, size: u64) -> std::ops::Range<u32> {
        let end = self.from.saturating_add(self.count).min(chunk_count(size));
        self.from.min(end)..end
    }
}

/// The payload of `xfer/<digest8>/chunk/<index>`; none beyond the file's end.
pub fn chunk_payload(file: &[u8], index: u32) -> Option<Vec<u8>> {
    let data = file.chunks(CHUNK_SIZE).nth(index as usize)?;
    Some([&Digest::of(data).0[..], data].concat())
}

fn chunk_count(size: u64) -> u32 {
    u32::try_from(size.div_ceil(CHUNK_SIZE as u64)).unwrap_or(u32::MAX)
}

/// A chunk that is taken: where it goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Accepted<'p> {
    /// Its number.
    pub index: u32,
    /// Of its first byte in the file.
    pub offset: u64,
    /// What is written there.
    pub data: &'p [u8],
    /// SHA-256 of it.
    pub hash: [u8; 32],
}

/// Why a chunk is not taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dropped {
    /// The file has no such chunk.
    Index,
    /// It was never asked for.
    Unasked,
    /// It is there.
    Duplicate,
    /// It has more or fewer bytes than that chunk has.
    Length,
    /// Its data is not what its hash says.
    Hash,
}

/// What was dropped, and how often a wish was made again.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Tally {
    /// See [`Dropped::Index`].
    pub index: u64,
    /// See [`Dropped::Unasked`].
    pub unasked: u64,
    /// See [`Dropped::Duplicate`].
    pub duplicate: u64,
    /// See [`Dropped::Length`].
    pub length: u64,
    /// See [`Dropped::Hash`].
    pub hash: u64,
    /// Of another transfer.
    pub foreign: u64,
    /// Wishes that were not met in time.
    pub late: u64,
}

/// `none dropped`, or `dropped: 2 repeated, 1 damaged; asked again 3 times`.
impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let dropped: Vec<_> = [
            (self.duplicate, "repeated"),
            (self.hash, "damaged"),
            (self.length, "of the wrong length"),
            (self.index, "beyond the end"),
            (self.unasked, "not asked for"),
            (self.foreign, "of another transfer"),
        ]
        .into_iter()
        .filter(|(count, _)| *count > 0)
        .map(|(count, what)| format!("{count} {what}"))
        .collect();
        match dropped.is_empty() {
            true => f.write_str("none dropped")?,
            false => write!(f, "dropped: {}", dropped.join(", "))?,
        }
        match self.late {
            0 => Ok(()),
            late => write!(f, "; asked again {late} times"),
        }
    }
}

impl Tally {
    fn count(&mut self, why: Dropped) -> Dropped {
        *match why {
            Dropped::Index => &mut self.index,
            Dropped::Unasked => &mut self.unasked,
            Dropped::Duplicate => &mut self.duplicate,
            Dropped::Length => &mut self.length,
            Dropped::Hash => &mut self.hash,
        } += 1;
        why
    }
}

/// The device's side of one transfer. Its size is fixed when it is made.
#[derive(Debug)]
pub struct ChunkTransfer {
    digest: Digest,
    size: u64,
    held: Vec<bool>,
    missing: u32,
    /// All below are held.
    low: u32,
    /// All below were asked for at some time.
    asked: u32,
    pending: Option<Pending>,
    count_max: u32,
    patience: Duration,
    patience_least: Duration,
    patience_most: Duration,
    /// What was dropped so far.
    pub tally: Tally,
}

/// The wish that is out.
#[derive(Debug)]
struct Pending {
    end: u32,
    due: Instant,
}

impl ChunkTransfer {
    /// The transfer of a file of `size` bytes, of which `held` are there; shorter than the file
    /// has chunks, the rest is missing.
    pub fn new(digest: Digest, size: u64, held: &[bool], limits: &Limits) -> Self {
        let count = chunk_count(size);
        let mut held = held.to_vec();
        held.resize(count as usize, false);
        let missing = held.iter().filter(|h| !**h).count() as u32;
        Self {
            digest,
            size,
            held,
            missing,
            low: 0,
            asked: 0,
            pending: None,
            count_max: WANT_COUNT_MAX,
            patience: limits.pause,
            patience_least: limits.pause,
            patience_most: limits.pause_max.max(limits.pause),
            tally: Tally::default(),
        }
    }

    /// Every chunk is there.
    pub fn is_whole(&self) -> bool {
        self.missing == 0
    }

    /// Bytes that are there.
    pub fn received(&self) -> u64 {
        let of = |i: usize| self.length_of(i as u32) as u64;
        self.held.iter().enumerate().filter(|(_, h)| **h).map(|(i, _)| of(i)).sum()
    }

    /// When [`want`](Self::want) will have something to say; none = at once, or never again.
    pub fn due(&self) -> Option<Instant> {
        self.pending.as_ref().map(|p| p.due)
    }

    /// What to ask for now: when nothing is out, or what is out is late. `chance` is uniform in
    /// 0..1 and stretches the patience by up to a half.
    pub fn want(&mut self, now: Instant, chance: f64) -> Option<Want> {
        match &self.pending {
            _ if self.is_whole() => return None,
            Some(pending) if now < pending.due => return None,
            Some(_) => {
                self.tally.late += 1;
                self.count_max = (self.count_max / 2).max(1);
                self.patience = (self.patience * 2).min(self.patience_most);
            }
            None => {}
        }
        while self.held[self.low as usize] {
            self.low += 1;
        }
        let run = self.held[self.low as usize..].iter().take(self.count_max as usize);
        let count = run.take_while(|held| !**held).count() as u32;
        let due = now + self.patience.mul_f64(1.0 + chance.clamp(0.0, 1.0) / 2.0);
        self.pending = Some(Pending { end: self.low + count, due });
        self.asked = self.asked.max(self.low + count);
        Some(Want { sha256: self.digest, chunk_size: CHUNK_SIZE, from: self.low, count })
    }

    /// A chunk came: it is held from now on, so what is accepted must be written.
    ///
    /// # Errors
    /// Why it was dropped, which is counted.
    pub fn on_chunk<'p>(
        &mut self,
        now: Instant,
        index: u32,
        payload: &'p [u8],
    ) -> Result<Accepted<'p>, Dropped> {
        let taken = self.judge(index, payload).map_err(|why| self.tally.count(why))?;
        self.held[index as usize] = true;
        self.missing -= 1;
        if let Some(pending) = &mut self.pending {
            // Patience is for silence: as long as chunks come, the wish is being met.
            pending.due = pending.due.max(now + self.patience);
            if self.held[self.low as usize..pending.end as usize].iter().all(|held| *held) {
                self.pending = None;
                self.count_max = (self.count_max * 2).min(WANT_COUNT_MAX);
                self.patience = (self.patience / 2).max(self.patience_least);
            }
        }
        Ok(taken)
    }

    fn judge<'p>(&self, index: u32, payload: &'p [u8]) -> Result<Accepted<'p>, Dropped> {
        match self.held.get(index as usize) {
            None => return Err(Dropped::Index),
            Some(true) => return Err(Dropped::Duplicate),
            Some(false) if index >= self.asked => return Err(Dropped::Unasked),
            Some(false) => {}
        }
        let (hash, data) = payload.split_first_chunk::<HASH_BYTES>().ok_or(Dropped::Length)?;
        if data.len() != self.length_of(index) {
            return Err(Dropped::Length);
        }
        if Digest::of(data).0 != *hash {
            return Err(Dropped::Hash);
        }
        let offset = u64::from(index) * CHUNK_SIZE as u64;
        Ok(Accepted { index, offset, data, hash: *hash })
    }

    fn length_of(&self, index: u32) -> usize {
        let left = self.size - u64::from(index) * CHUNK_SIZE as u64;
        left.min(CHUNK_SIZE as u64) as usize
    }
}
