//! How well findings fit the truth: pure counting.
//!
//! A finding is right if it overlaps an object of its class, not taken by a better one, by at least
//! half (intersection over union). AP50 is the area under the envelope of precision over recall,
//! all points. Computed as `models/plates/evaluate.py` does.

use serde_json::{Value, json};

use super::folder::Truth;
use crate::records::rounded;

/// Overlap from which a box counts as an object's.
pub(super) const OVERLAP_MIN: f32 = 0.5;

/// A finding of a class that the folder names.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Finding {
    /// Index into the folder's names.
    pub(super) class: usize,
    pub(super) score: f32,
    /// Fractions of the picture.
    pub(super) corners: [f32; 4],
}

/// One class's counts over all pictures.
#[derive(Debug, Clone, Default)]
pub(super) struct Tally {
    pub(super) objects: usize,
    /// Findings above the threshold.
    pub(super) found: usize,
    /// Those of them that are right.
    pub(super) right: usize,
    /// All findings: score, and whether right.
    scores: Vec<(f32, bool)>,
    /// The picture with the most objects missed, and how many.
    pub(super) worst: Option<(String, usize)>,
}

impl Tally {
    /// Share of the objects that were found; `None` without objects.
    pub(super) fn recall(&self) -> Option<f64> {
        (self.objects > 0).then(|| self.right as f64 / self.objects as f64)
    }

    /// Share of the findings that are right; `None` without findings.
    pub(super) fn precision(&self) -> Option<f64> {
        (self.found > 0).then(|| self.right as f64 / self.found as f64)
    }

    pub(super) fn ap50(&self) -> Option<f64> {
        if self.objects == 0 {
            return None;
        }
        let mut scores = self.scores.clone();
        scores.sort_by(|a, b| b.0.total_cmp(&a.0));
        let mut right = 0;
        let mut points: Vec<(f64, f64)> = Vec::with_capacity(scores.len());
        for (n, (_, hit)) in scores.iter().enumerate() {
            right += usize::from(*hit);
            points.push((right as f64 / self.objects as f64, right as f64 / (n + 1) as f64));
        }
        let mut best = 0.0f64;
        for point in points.iter_mut().rev() {
            best = best.max(point.1);
            point.1 = best;
        }
        let mut area = 0.0;
        let mut before = 0.0;
        for (recall, precision) in points {
            area += (recall - before) * precision;
            before = recall;
        }
        Some(area)
    }

    pub(super) fn numbers(&self) -> Value {
        let share = |v: Option<f64>| v.map(|v| rounded(v, 4));
        json!({
            "objects": self.objects,
            "found": self.found,
            "right": self.right,
            "recall": share(self.recall()),
            "precision": share(self.precision()),
            "ap50": share(self.ap50()),
        })
    }

    /// Several classes' counts as one.
    pub(super) fn sum<'a>(all: impl Iterator<Item = &'a Self>) -> Self {
        all.fold(Self::default(), |mut sum, one| {
            sum.objects += one.objects;
            sum.found += one.found;
            sum.right += one.right;
            sum
        })
    }
}

/// Counts one picture. `findings` best first; those above `confidence` make recall and precision,
/// all of them AP50. Returns for every object the box above the threshold that found it.
pub(super) fn count(
    picture: &str,
    findings: &[Finding],
    truth: &[Truth],
    confidence: f32,
    tallies: &mut [Tally],
) -> Vec<Option<[f32; 4]>> {
    let mut taken = vec![false; truth.len()];
    let mut boxes = vec![None; truth.len()];
    for finding in findings {
        let best = truth
            .iter()
            .enumerate()
            .filter(|(n, object)| object.class == finding.class && !taken[*n])
            .map(|(n, object)| (n, overlap(&object.corners, &finding.corners)))
            .filter(|(_, overlap)| *overlap >= OVERLAP_MIN)
            .max_by(|a, b| a.1.total_cmp(&b.1));
        let tally = &mut tallies[finding.class];
        tally.scores.push((finding.score, best.is_some()));
        let sure = finding.score > confidence;
        tally.found += usize::from(sure);
        if let Some((n, _)) = best {
            taken[n] = true;
            if sure {
                tally.right += 1;
                boxes[n] = Some(finding.corners);
            }
        }
    }
    for (class, tally) in tallies.iter_mut().enumerate() {
        let mine = || truth.iter().zip(&boxes).filter(|(object, _)| object.class == class);
        tally.objects += mine().count();
        let missed = mine().filter(|(_, found)| found.is_none()).count();
        if missed > tally.worst.as_ref().map_or(0, |(_, most)| *most) {
            tally.worst = Some((picture.to_owned(), missed));
        }
    }
    boxes
}

/// Intersection over union.
pub(in crate::update) fn overlap(a: &[f32; 4], b: &[f32; 4]) -> f32 {
    let area = |r: &[f32; 4]| (r[2] - r[0]).max(0.0) * (r[3] - r[1]).max(0.0);
    let width = (a[2].min(b[2]) - a[0].max(b[0])).max(0.0);
    let height = (a[3].min(b[3]) - a[1].max(b[1])).max(0.0);
    let inner = width * height;
    if inner > 0.0 { inner / (area(a) + area(b) - inner) } else { 0.0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn average_precision_is_the_area_under_the_envelope() {
        let truth: Vec<Truth> = (0..4)
            .map(|n| Truth { class: 0, corners: [0.2 * n as f32, 0.0, 0.2 * n as f32 + 0.1, 0.1] })
            .collect();
        let at = |n: usize, score| Finding { class: 0, score, corners: truth[n].corners };
        let wrong = |score| Finding { class: 0, score, corners: [0.9, 0.9, 1.0, 1.0] };
        // Right, wrong, right, (right, but below the threshold); one object is never found.
        let findings = [at(0, 0.9), wrong(0.8), at(1, 0.7), at(2, 0.1)];
        let mut tallies = [Tally::default()];
        let boxes = count("a", &findings, &truth, 0.25, &mut tallies);
        let tally = &tallies[0];
        assert_eq!((tally.objects, tally.found, tally.right), (4, 3, 2));
        assert_eq!(boxes.iter().filter(|b| b.is_some()).count(), 2);
        assert_eq!(tally.worst, Some(("a".into(), 2)));
        // 1/4 at precision 1, then 1/4 and 1/4 at 3/4.
        assert!((tally.ap50().unwrap() - (0.25 + 0.5 * 0.75)).abs() < 1e-9);
    }

    #[test]
    fn an_object_is_found_once_and_only_by_its_class() {
        let truth = [Truth { class: 0, corners: [0.0, 0.0, 0.5, 0.5] }];
        let finding = |class, score| Finding { class, score, corners: [0.0, 0.0, 0.5, 0.5] };
        let mut tallies = [Tally::default(), Tally::default()];
        count(
            "a",
            &[finding(0, 0.9), finding(0, 0.8), finding(1, 0.7)],
            &truth,
            0.25,
            &mut tallies,
        );
        assert_eq!((tallies[0].found, tallies[0].right), (2, 1));
        assert_eq!((tallies[1].found, tallies[1].right, tallies[1].objects), (1, 0, 0));
        assert_eq!(tallies[1].recall(), None);
    }
}
