//! The shift gate: does the model draw its boxes where the active one does?
//!
//! An exporter's change once moved every box by 2 pixels. Overlaps of more than a half don't see
//! that; the median distance of the boxes' edges from the labels' does. Labels are drawn by people,
//! each with a habit, so what counts is the difference to the active model on the same objects.

use serde_json::json;

use super::super::job::{Gate, Reason, Verdict};
use super::calibration::Marks;
use super::folder::Folder;
use super::{failed, gate};
use crate::records::rounded;

/// Most that the median edge may lie off the active model's, in pixels of the model's input.
const PIXELS_MAX: f64 = 1.0;
/// Objects that both must have found.
const OBJECTS_MIN: usize = 10;

const EDGES: [&str; 4] = ["left", "top", "right", "bottom"];

/// Judges. `scale` takes fractions of each picture to pixels of the candidate's input.
pub(super) fn judge(
    folder: &Folder,
    scale: &[(f64, f64)],
    candidate: &Marks,
    active: Option<&Marks>,
) -> (Gate, Option<Reason>) {
    let mut offsets = Offsets::default();
    for (picture, sample) in folder.samples.iter().enumerate() {
        let truth = sample.truth.as_deref().unwrap_or_default();
        let mine = candidate.boxes.get(picture).map(Vec::as_slice).unwrap_or_default();
        for (object, (truth, found)) in truth.iter().zip(mine).enumerate() {
            let theirs = active.map(|a| a.boxes[picture][object]);
            // Without an active model every object counts that the candidate found.
            if let (Some(found), Some(theirs)) = (found, theirs.map_or(Some(None), |t| t.map(Some)))
            {
                offsets.add(&truth.corners, found, theirs.as_ref(), scale[picture]);
            }
        }
    }
    offsets.judge(active.is_some())
}

/// Signed distances from the labels' edges, right and down being positive, by edge.
#[derive(Default)]
struct Offsets {
    candidate: [Vec<f64>; 4],
    active: [Vec<f64>; 4],
}

impl Offsets {
    fn add(
        &mut self,
        truth: &[f32; 4],
        candidate: &[f32; 4],
        active: Option<&[f32; 4]>,
        scale: (f64, f64),
    ) {
        for edge in 0..4 {
            // At the picture's border everything is cut off alike, which would hide a shift.
            if truth[edge] <= 0.002 || truth[edge] >= 0.998 {
                continue;
            }
            let scale = if edge % 2 == 0 { scale.0 } else { scale.1 };
            let off = |corners: &[f32; 4]| f64::from(corners[edge] - truth[edge]) * scale;
            self.candidate[edge].push(off(candidate));
            self.active[edge].extend(active.map(off));
        }
    }

    fn judge(self, compared: bool) -> (Gate, Option<Reason>) {
        let objects = self.candidate.iter().map(Vec::len).min().unwrap_or(0);
        let mine = self.candidate.map(median);
        let rows = |medians: [Option<f64>; 4]| {
            let pairs = EDGES.into_iter().zip(medians.map(|m| m.map(|m| rounded(m, 3))));
            pairs.collect::<std::collections::BTreeMap<_, _>>()
        };
        let mut numbers = json!({
            "objects": objects,
            "limit_px": PIXELS_MAX,
            "candidate_px": rows(mine),
        });
        let skipped = |why: String, numbers| (gate("shift", Verdict::Skipped, why, numbers), None);
        if !compared {
            return skipped("there is no active model to compare with".into(), numbers);
        }
        if objects < OBJECTS_MIN {
            let why = format!("both models found {objects} objects; {OBJECTS_MIN} are needed");
            return skipped(why, numbers);
        }
        let theirs = self.active.map(median);
        let shift: [f64; 4] =
            std::array::from_fn(|n| mine[n].unwrap_or(0.0) - theirs[n].unwrap_or(0.0));
        numbers["active_px"] = json!(rows(theirs));
        numbers["shift_px"] = json!(rows(shift.map(Some)));
        let (edge, most) = (0..4)
            .map(|n| (EDGES[n], shift[n]))
            .max_by(|a, b| a.1.abs().total_cmp(&b.1.abs()))
            .expect("a box has four edges");
        if most.abs() > PIXELS_MAX {
            let reason = Reason::new(
                "box_shift",
                format!(
                    "the {edge} edges of its boxes lie {most:+.2} pixels off the active model's \
                     (median of {objects} objects), {PIXELS_MAX} is allowed: was it exported with \
                     other preprocessing?"
                ),
            );
            return (failed("shift", &reason, numbers), Some(reason));
        }
        let message = format!("edges within {:.2} pixels of the active model's", most.abs());
        (gate("shift", Verdict::Passed, message, numbers), None)
    }
}

pub(in crate::update) fn median(mut values: Vec<f64>) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match values.len() {
        0 => None,
        n if n % 2 == 0 => Some((values[middle - 1] + values[middle]) / 2.0),
        _ => Some(values[middle]),
    }
}
