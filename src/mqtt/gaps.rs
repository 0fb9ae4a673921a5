//! Lost records, remembered as ranges until the broker knows of them.

use std::collections::VecDeque;
use std::sync::Arc;

use serde::Serialize;

use super::outbox::Record;

/// Announcements that wait at most; beyond it ranges of the same camera and life are joined.
const WAITING_MAX: usize = 256;

/// Why records were lost.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reason {
    /// The outbox was full, in memory or on disk.
    OutboxFull,
    /// The broker takes no packet of that size.
    TooLarge,
    /// They were on a disk that can't be read any more.
    DiskFailed,
}

/// Records of one camera and one life of the process that were lost: `count` of those from
/// `seq_from` to `seq_to`, which is all of them unless more ranges waited than are kept apart.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Gap {
    /// The camera's id.
    pub camera: Arc<str>,
    /// The life of the process that numbered them.
    pub boot: Arc<str>,
    /// First lost.
    pub seq_from: u64,
    /// Last lost.
    pub seq_to: u64,
    /// How many.
    pub count: u64,
    /// Why.
    pub reason: Reason,
    /// When the first of them was lost, microseconds since 1970.
    pub time_us: i64,
}

impl Reason {
    const NAMES: [(&'static str, Self); 3] = [
        ("outbox_full", Self::OutboxFull),
        ("too_large", Self::TooLarge),
        ("disk_failed", Self::DiskFailed),
    ];

    /// As it stands on the wire and on disk.
    pub fn name(self) -> &'static str {
        Self::NAMES.iter().find(|(_, r)| *r == self).expect("every reason has a name").0
    }

    /// Looks a name up.
    pub fn parse(name: &str) -> Option<Self> {
        Self::NAMES.iter().find(|(n, _)| *n == name).map(|(_, r)| *r)
    }
}

impl Gap {
    /// The announcement, `noblink.gaps/1`.
    pub fn to_json(&self, device: &str) -> Vec<u8> {
        #[derive(Serialize)]
        struct Announcement<'a> {
            schema: &'static str,
            device: &'a str,
            camera: &'a str,
            boot: &'a str,
            time: String,
            time_us: i64,
            seq_from: u64,
            seq_to: u64,
            count: u64,
            reason: &'static str,
        }
        let time = jiff::Timestamp::from_microsecond(self.time_us).unwrap_or_default();
        let announcement = Announcement {
            schema: "noblink.gaps/1",
            device,
            camera: &self.camera,
            boot: &self.boot,
            time: format!("{time:.6}"),
            time_us: self.time_us,
            seq_from: self.seq_from,
            seq_to: self.seq_to,
            count: self.count,
            reason: self.reason.name(),
        };
        serde_json::to_vec(&announcement).expect("numbers and strings become JSON")
    }
}

/// Those that wait to be announced, in order.
#[derive(Debug, Default)]
pub(super) struct Gaps(pub(super) VecDeque<Gap>);

impl Gaps {
    /// A record was lost. What belongs to no camera is counted and not announced.
    pub(super) fn note(&mut self, record: &Record, reason: Reason) {
        self.note_range(&record.camera, &record.boot, record.seq, record.seq, 1, reason);
    }

    /// `count` of the records from `seq_from` to `seq_to` were lost.
    pub(super) fn note_range(
        &mut self,
        camera: &Arc<str>,
        boot: &Arc<str>,
        seq_from: u64,
        seq_to: u64,
        count: u64,
        reason: Reason,
    ) {
        if camera.is_empty() {
            return;
        }
        let crowded = self.0.len() >= WAITING_MAX;
        let known = self.0.iter_mut().rev().find(|g| {
            (&g.camera, &g.boot, g.reason) == (camera, boot, reason)
                && (crowded || g.seq_to.checked_add(1) == Some(seq_from))
        });
        if let Some(gap) = known {
            gap.seq_from = gap.seq_from.min(seq_from);
            gap.seq_to = gap.seq_to.max(seq_to);
            gap.count += count;
            return;
        }
        let (camera, boot) = (Arc::clone(camera), Arc::clone(boot));
        let time_us = jiff::Timestamp::now().as_microsecond();
        self.0.push_back(Gap { camera, boot, seq_from, seq_to, count, reason, time_us });
    }
}
