//! The agreement gate: both models on the last live frames.
//!
//! Without labels nobody knows who is right, so it reports. Only where it is the one look at real
//! pictures (no calibration folder), and the active model finds objects where the candidate finds
//! none at all, it leaves the word to a person.

use serde_json::json;

use super::super::job::{Gate, Reason, Verdict};
use super::gate;
use super::score::{OVERLAP_MIN, overlap};
use crate::records::rounded;

/// A finding, by its label.
#[derive(Debug, Clone)]
pub(super) struct Labelled {
    pub(super) label: String,
    pub(super) corners: [f32; 4],
}

/// Counts over all frames.
#[derive(Debug, Clone, Default)]
pub(super) struct Agreement {
    frames: usize,
    active: usize,
    candidate: usize,
    /// Findings of labels that the other model doesn't know.
    candidate_only: usize,
    matched: usize,
}

impl Agreement {
    /// Counts a frame; `shared` says whether both models know a label.
    pub(super) fn add(
        &mut self,
        active: &[Labelled],
        candidate: &[Labelled],
        shared: impl Fn(&str) -> bool,
    ) {
        self.frames += 1;
        let mut free: Vec<_> = active.iter().filter(|f| shared(&f.label)).collect();
        self.active += free.len();
        for found in candidate {
            if !shared(&found.label) {
                self.candidate_only += 1;
                continue;
            }
            self.candidate += 1;
            let best = free
                .iter()
                .enumerate()
                .filter(|(_, other)| other.label == found.label)
                .map(|(n, other)| (n, overlap(&other.corners, &found.corners)))
                .filter(|(_, overlap)| *overlap >= OVERLAP_MIN)
                .max_by(|a, b| a.1.total_cmp(&b.1));
            if let Some((n, _)) = best {
                free.swap_remove(n);
                self.matched += 1;
            }
        }
    }

    /// How many were compared.
    pub(super) fn frames(&self) -> usize {
        self.frames
    }

    /// Judges.
    pub(super) fn judge(&self) -> (Gate, Option<Reason>) {
        let both = self.active + self.candidate;
        let share = (both > 0).then(|| 2.0 * self.matched as f64 / both as f64);
        let numbers = json!({
            "frames": self.frames,
            "active_objects": self.active,
            "candidate_objects": self.candidate,
            "candidate_new_labels": self.candidate_only,
            "matched": self.matched,
            "agreement": share.map(|s| rounded(s, 4)),
        });
        if self.active > 0 && self.candidate + self.candidate_only == 0 {
            let reason = Reason::new(
                "finds_nothing",
                format!(
                    "in the last {} live frames the active model finds {} objects, this one none: \
                     confirm it if that is meant",
                    self.frames, self.active
                ),
            );
            let gate = gate("agreement", Verdict::Ask, reason.message.clone(), numbers);
            return (gate, Some(reason));
        }
        let message = match share {
            Some(share) => format!(
                "{:.0} % of {} and {} objects in {} live frames agree",
                100.0 * share,
                self.active,
                self.candidate,
                self.frames
            ),
            None => format!("neither finds an object in {} live frames", self.frames),
        };
        (gate("agreement", Verdict::Passed, message, numbers), None)
    }
}
