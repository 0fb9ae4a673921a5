//! What the outbox's line is made of: records in memory, and what is known of those on disk alone.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::outbox::Record;
use super::spool::Held;

/// A record that waits in memory.
pub(super) struct Entry {
    pub(super) ticket: i64,
    pub(super) record: Arc<Record>,
    /// On disk as well.
    pub(super) stored: bool,
}

/// Records that are on disk alone, by camera and life of the process: counted, so that they can be
/// announced even if the disk can't be read any more.
#[derive(Default)]
pub(super) struct Unread {
    held: BTreeMap<(Arc<str>, Arc<str>), Held>,
    count: u64,
    /// All rows after this ticket, and none before it.
    after: i64,
}

impl Unread {
    /// Everything that was found on disk.
    pub(super) fn of(held: Vec<Held>) -> Self {
        let count = held.iter().map(|h| h.count).sum();
        let key = |h: Held| ((Arc::clone(&h.camera), Arc::clone(&h.boot)), h);
        Self { held: held.into_iter().map(key).collect(), count, after: i64::MIN }
    }

    pub(super) fn count(&self) -> u64 {
        self.count
    }

    pub(super) fn after(&self) -> i64 {
        self.after
    }

    /// One more, after all others.
    pub(super) fn add(&mut self, entry: &Entry) {
        if self.count == 0 {
            self.after = entry.ticket - 1;
        }
        self.count += 1;
        let Record { camera, boot, seq, .. } = &*entry.record;
        let key = (Arc::clone(camera), Arc::clone(boot));
        let held = self.held.entry(key).or_insert_with(|| Held {
            camera: Arc::clone(camera),
            boot: Arc::clone(boot),
            seq_from: *seq,
            seq_to: *seq,
            count: 0,
        });
        held.seq_to = *seq;
        held.count += 1;
    }

    /// The oldest is not on disk alone any more.
    pub(super) fn remove(&mut self, camera: &Arc<str>, boot: &Arc<str>, seq: u64, ticket: i64) {
        self.after = ticket;
        let key = (Arc::clone(camera), Arc::clone(boot));
        let Some(held) = self.held.get_mut(&key) else { return };
        self.count -= 1;
        held.count -= 1;
        held.seq_from = seq + 1;
        if held.count == 0 {
            self.held.remove(&key);
        }
    }

    /// Forgets all of them.
    pub(super) fn clear(&mut self) -> Vec<Held> {
        self.count = 0;
        std::mem::take(&mut self.held).into_values().collect()
    }
}
