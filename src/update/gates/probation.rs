//! The last gate, live: what the model did while the one before stood ready to take over again,
//! beside what that one did. Pure.

use std::collections::BTreeMap;
use std::time::Duration;

use serde_json::{Value, json};

use super::super::job::{Gate, Reason, Verdict};
use super::gate;
use crate::meter::Tally;
use crate::records::rounded;

/// Frames of the new model from which on a label can be missed.
const FRAMES_MIN: u64 = 50;
/// A label is frequent that the model before found once in so many frames.
const FREQUENT: u64 = 20;

/// What one of the two models saw, with the names of its classes.
#[derive(Debug, Clone, Copy)]
pub struct Seen<'a> {
    /// Frames, objects, scores.
    pub tally: &'a Tally,
    /// Names by class id.
    pub labels: &'a [String],
}

impl<'a> Seen<'a> {
    /// By label: objects and the sum of their scores, of those that were seen.
    fn by_label(self) -> BTreeMap<&'a str, (u64, f64)> {
        let named = self.labels.iter().map(String::as_str).zip(self.tally.classes.iter().copied());
        named.filter(|(_, (count, _))| *count > 0).collect()
    }

    fn per_frame(self, objects: u64) -> f64 {
        rounded(objects as f64 / self.tally.frames.max(1) as f64, 4)
    }

    fn one(self, label: &str) -> Value {
        match self.by_label().get(label) {
            Some((count, scores)) => json!({
                "objects_per_frame": self.per_frame(*count),
                "mean_score": rounded(scores / *count as f64, 4),
            }),
            None => json!({ "objects_per_frame": 0.0, "mean_score": null }),
        }
    }

    fn objects_per_frame(self) -> f64 {
        self.per_frame(self.tally.classes.iter().map(|(count, _)| count).sum())
    }
}

/// How a probation ended: `failed` = why. `p99` and `budget` are of the model's runs.
pub fn probation(
    failed: Option<&Reason>,
    before: Option<Seen<'_>>,
    after: Option<Seen<'_>>,
    p99: Option<Duration>,
    budget: Option<Duration>,
) -> Gate {
    let vanished = before.zip(after).map(|(b, a)| vanished(b, a)).unwrap_or_default();
    let ms = |d: Option<Duration>| d.map(|d| rounded(d.as_secs_f64() * 1e3, 1));
    let frames = after.map_or(0, |a| a.tally.frames);
    let names = [before, after].into_iter().flatten().flat_map(|s| s.by_label().into_keys());
    let of = |seen: Option<Seen<'_>>, label: &str| seen.map(|s| s.one(label));
    let labels: BTreeMap<&str, Value> = names
        .map(|label| (label, json!({ "before": of(before, label), "after": of(after, label) })))
        .collect();
    let numbers = json!({
        "frames": frames,
        "p99_ms": ms(p99),
        "budget_ms": ms(budget),
        "objects_per_frame": {
            "before": before.map(|s| s.objects_per_frame()),
            "after": after.map(|s| s.objects_per_frame()),
        },
        "labels": labels,
        "label_vanished": vanished,
    });
    if let Some(reason) = failed {
        return super::failed("probation", reason, numbers);
    }
    let mut message = format!("{frames} frames live");
    if let (Some(before), Some(after)) = (before, after) {
        let (old, new) = (before.objects_per_frame(), after.objects_per_frame());
        message += &format!(", {new:.2} objects a frame, {old:.2} by the model before");
    }
    if !vanished.is_empty() {
        message += &format!(
            "; label_vanished: {} was frequent before the swap and was not seen since",
            vanished.join(", ")
        );
    }
    gate("probation", Verdict::Passed, message, numbers)
}

/// Frequent labels of the model before that the new one, which knows them, never found.
fn vanished(before: Seen<'_>, after: Seen<'_>) -> Vec<String> {
    if after.tally.frames < FRAMES_MIN {
        return Vec::new();
    }
    let found = after.by_label();
    let gone = |label: &&str| {
        after.labels.iter().any(|known| known == label) && !found.contains_key(*label)
    };
    let frequent = before.by_label().into_iter();
    let frequent = frequent.filter(|(_, (count, _))| count * FREQUENT >= before.tally.frames);
    frequent.map(|(label, _)| label).filter(gone).map(str::to_owned).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_frequent_label_that_vanished_is_named() {
        let labels = ["plate".to_owned(), "dent".to_owned()];
        let before = Tally { frames: 100, classes: vec![(200, 150.0), (4, 2.0)] };
        let after = Tally { frames: 60, classes: vec![] };
        let seen = |tally| Some(Seen { tally, labels: &labels });
        let gate = probation(None, seen(&before), seen(&after), None, None);
        assert_eq!(gate.verdict, Verdict::Passed, "it warns");
        assert_eq!(gate.numbers["label_vanished"], json!(["plate"]));
        assert!(gate.message.contains("label_vanished: plate was"), "{}", gate.message);
        assert_eq!(
            gate.numbers["labels"]["plate"],
            json!({
                "before": { "objects_per_frame": 2.0, "mean_score": 0.75 },
                "after": { "objects_per_frame": 0.0, "mean_score": null },
            })
        );
        let few = Tally { frames: 10, classes: vec![] };
        let gate = probation(None, seen(&before), seen(&few), None, None);
        assert_eq!(gate.numbers["label_vanished"], json!([]));
    }

    #[test]
    fn a_label_that_the_new_model_does_not_know_is_no_surprise() {
        let (old, new) = (["plate".to_owned()], ["scratch".to_owned()]);
        let before = Tally { frames: 100, classes: vec![(100, 90.0)] };
        let after = Tally { frames: 100, classes: vec![(50, 40.0)] };
        let before = Seen { tally: &before, labels: &old };
        let after = Seen { tally: &after, labels: &new };
        assert!(vanished(before, after).is_empty());
    }

    #[test]
    fn a_failure_has_its_reason_and_the_numbers() {
        let reason = Reason::new("latency", "too slow");
        let ms = |ms| Some(Duration::from_millis(ms));
        let gate = probation(Some(&reason), None, None, ms(50), ms(30));
        assert_eq!((gate.verdict, &*gate.message), (Verdict::Failed, "too slow"));
        assert_eq!(gate.numbers["code"], "latency");
        assert_eq!(
            (&gate.numbers["p99_ms"], &gate.numbers["budget_ms"]),
            (&json!(50.0), &json!(30.0))
        );
    }
}
