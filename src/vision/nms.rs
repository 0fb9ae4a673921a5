//! Non-maximum suppression: of boxes that show the same object, the best one stays.

use super::decode::Candidate;

/// Most boxes that suppression looks at; the best by score (Ultralytics' `max_nms`).
pub const CANDIDATES_MAX: usize = 30_000;
/// Most boxes of a frame (Ultralytics' `max_det`).
pub const DETECTIONS_MAX: usize = 300;
/// Distance between the classes' planes, pixels (Ultralytics' `max_wh`).
const CLASS_OFFSET: f32 = 7680.0;

/// Sorts by score, best first and earlier anchors first among equals, and keeps a box unless it
/// overlaps a kept one of its class by more than `iou`. At most [`DETECTIONS_MAX`] stay.
///
/// Classes are kept apart as `torchvision.ops.nms` is used by Ultralytics: by moving each class's
/// boxes `class * 7680` pixels away, in f32. For high classes this rounds the corners to a 16th of
/// a pixel, and a box at the threshold falls as it does there.
pub fn suppress(candidates: &mut Vec<Candidate>, iou: f32) {
    // Unstable: a stable sort allocates.
    candidates.sort_unstable_by(|a, b| b.score.total_cmp(&a.score).then(a.order.cmp(&b.order)));
    candidates.truncate(CANDIDATES_MAX);
    let mut kept = 0;
    for i in 0..candidates.len() {
        if kept == DETECTIONS_MAX {
            break;
        }
        let shifted = shifted(&candidates[i]);
        if candidates[..kept].iter().all(|k| overlap(&self::shifted(k), &shifted) <= iou) {
            candidates[kept] = candidates[i];
            kept += 1;
        }
    }
    candidates.truncate(kept);
}

fn shifted(candidate: &Candidate) -> [f32; 4] {
    let offset = candidate.class as f32 * CLASS_OFFSET;
    candidate.corners.map(|v| v + offset)
}

/// Intersection over union; 0 for two boxes without area.
fn overlap(a: &[f32; 4], b: &[f32; 4]) -> f32 {
    let area = |r: &[f32; 4]| (r[2] - r[0]) * (r[3] - r[1]);
    let width = (a[2].min(b[2]) - a[0].max(b[0])).max(0.0);
    let height = (a[3].min(b[3]) - a[1].max(b[1])).max(0.0);
    let inner = width * height;
    if inner > 0.0 { inner / (area(a) + area(b) - inner) } else { 0.0 }
}
