//! The calibration gate: findings on the site's own pictures, against the labels and against the
//! active model.

use serde_json::{Map, Value, json};

use super::super::job::{Gate, Reason, Verdict};
use super::folder::Folder;
use super::score::Tally;
use super::{failed, gate};
use crate::config::Calibration;
use crate::records::rounded;

/// Objects or findings that must make the difference beside the margin: one more or less in a class
/// of ten is 0.1, and chance.
const DIFFERENCE_MIN: usize = 2;
/// Objects of a class from which its AP50 is compared: below it one box moves it by a margin.
const AP50_OBJECTS_MIN: usize = 10;

/// One model's result on the folder, by the folder's classes.
#[derive(Debug, Clone, Default)]
pub(super) struct Marks {
    pub(super) tallies: Vec<Tally>,
    /// Which of the folder's classes the model knows.
    pub(super) known: Vec<bool>,
    /// Objects found above the threshold, by picture; labelled or not.
    pub(super) found: Vec<usize>,
    /// By picture and object: the box that found it.
    pub(super) boxes: Vec<Vec<Option<[f32; 4]>>>,
}

/// Judges; `active` is missing when there is none, or when it could not be measured.
pub(super) fn judge(
    folder: &Folder,
    rules: &Calibration,
    candidate: &Marks,
    active: Option<&Marks>,
) -> (Gate, Option<Reason>) {
    let numbers = numbers(folder, rules, candidate, active);
    let refused = no_names(folder, candidate)
        .or_else(|| nothing(folder, candidate))
        .or_else(|| too_few_objects(folder, rules, candidate))
        .or_else(|| below_floor(folder, rules, candidate))
        .or_else(|| below_active(folder, rules, candidate, active?));
    if let Some(reason) = refused {
        return (failed("calibration", &reason, numbers), Some(reason));
    }
    let sum = Tally::sum(of_known(candidate));
    let share = |v: Option<f64>| v.map_or("-".into(), |v| format!("{v:.3}"));
    let message = if sum.objects == 0 {
        let total: usize = candidate.found.iter().sum();
        format!("{} pictures without labels, {total} objects found", folder.samples.len())
    } else {
        format!(
            "{} pictures: recall {}, precision {}, AP50 {}",
            folder.samples.len(),
            share(sum.recall()),
            share(sum.precision()),
            share(mean_ap50(candidate, |_| true)),
        )
    };
    (gate("calibration", Verdict::Passed, message, numbers), None)
}

fn of_known(marks: &Marks) -> impl Iterator<Item = &Tally> {
    marks.tallies.iter().zip(&marks.known).filter(|(_, known)| **known).map(|(tally, _)| tally)
}

/// Over the classes that the model knows and the folder shows.
fn mean_ap50(marks: &Marks, wanted: impl Fn(usize) -> bool) -> Option<f64> {
    let known = marks.tallies.iter().enumerate().filter(|(n, _)| marks.known[*n] && wanted(*n));
    let all: Vec<f64> = known.filter_map(|(_, tally)| tally.ap50()).collect();
    (!all.is_empty()).then(|| all.iter().sum::<f64>() / all.len() as f64)
}

/// The folder has labels, and none of their names is the model's.
fn no_names(folder: &Folder, candidate: &Marks) -> Option<Reason> {
    let blind = folder.objects() > 0 && !candidate.known.iter().any(|known| *known);
    blind.then(|| {
        let names = folder.names.join(", ");
        Reason::new(
            "calibration_names",
            format!("the calibration folder labels {names}; the model knows none of these names"),
        )
    })
}

fn nothing(folder: &Folder, candidate: &Marks) -> Option<Reason> {
    let sum = Tally::sum(of_known(candidate));
    (sum.objects > 0 && sum.right == 0).then(|| {
        Reason::new(
            "no_detections",
            format!(
                "finds none of the {} objects in the {} pictures of the calibration folder",
                sum.objects,
                folder.samples.len()
            ),
        )
    })
}

/// A picture that is labelled asks for no more than its labels, so an empty belt may stay empty.
fn too_few_objects(folder: &Folder, rules: &Calibration, candidate: &Marks) -> Option<Reason> {
    let least = rules.min_objects?;
    folder.samples.iter().zip(&candidate.found).find_map(|(sample, found)| {
        let mine = |class: usize| candidate.known[class];
        let there = sample.truth.as_ref().map(|t| t.iter().filter(|o| mine(o.class)).count());
        let wanted = there.unwrap_or(least).min(least);
        (*found < wanted).then(|| {
            let name = sample.image.file_name().unwrap_or_default().to_string_lossy();
            Reason::new(
                "min_objects",
                format!("finds {found} objects in {name}, where min_objects asks for {wanted}"),
            )
        })
    })
}

fn below_floor(folder: &Folder, rules: &Calibration, candidate: &Marks) -> Option<Reason> {
    let known = folder.names.iter().zip(&candidate.tallies).zip(&candidate.known);
    let known = known.filter(|(_, known)| **known).map(|(class, _)| class);
    for (name, tally) in known {
        if let (Some(recall), Some(floor)) = (tally.recall(), rules.min_recall)
            && recall < floor
        {
            return Some(Reason::new(
                "recall_below_floor",
                format!(
                    "finds {} of {} {name:?}: recall {recall:.3}, at least {floor} is asked \
                     (min_recall){}",
                    tally.right,
                    tally.objects,
                    worst(tally)
                ),
            ));
        }
        if let (Some(precision), Some(floor)) = (tally.precision(), rules.min_precision)
            && precision < floor
        {
            return Some(Reason::new(
                "precision_below_floor",
                format!(
                    "{} of its {} findings of {name:?} are right: precision {precision:.3}, at \
                     least {floor} is asked (min_precision)",
                    tally.right, tally.found
                ),
            ));
        }
    }
    None
}

/// Of all that is worse than before, the worst: objects missed before false alarms before AP50.
fn below_active(
    folder: &Folder,
    rules: &Calibration,
    candidate: &Marks,
    active: &Marks,
) -> Option<Reason> {
    let margin = rules.margin;
    let shared = |n: usize| candidate.known[n] && active.known[n];
    let classes: Vec<_> = (0..folder.names.len())
        .filter(|n| shared(*n))
        .map(|n| (&folder.names[n], &candidate.tallies[n], &active.tallies[n]))
        .collect();
    let wrong = |tally: &Tally| tally.found - tally.right;
    let recall = classes.iter().filter_map(|(name, new, old)| {
        let (recall, before) = (new.recall()?, old.recall()?);
        let less = recall < before - margin && old.right >= new.right + DIFFERENCE_MIN;
        let message = || {
            format!(
                "finds {} of {} {name:?}, the active model {}: recall {recall:.3} after \
                 {before:.3}, {margin} less is allowed{}",
                new.right,
                new.objects,
                old.right,
                worst(new)
            )
        };
        less.then(|| (before - recall, Reason::new("recall_below_active", message())))
    });
    let precision = classes.iter().filter_map(|(name, new, old)| {
        let (precision, before) = (new.precision()?, old.precision()?);
        let less = precision < before - margin && wrong(new) >= wrong(old) + DIFFERENCE_MIN;
        let message = || {
            format!(
                "{} of its {} findings of {name:?} are wrong, of the active model's {} {}: \
                 precision {precision:.3} after {before:.3}, {margin} less is allowed",
                wrong(new),
                new.found,
                old.found,
                wrong(old)
            )
        };
        less.then(|| (before - precision, Reason::new("precision_below_active", message())))
    });
    let ap50 = classes.iter().filter_map(|(name, new, old)| {
        let (ap50, before) = (new.ap50()?, old.ap50()?);
        let less = ap50 < before - margin && new.objects >= AP50_OBJECTS_MIN;
        less.then(|| (before - ap50, ap50_below(&format!("of {name:?}"), ap50, before, margin)))
    });
    let overall = || {
        let (ap50, before) = (mean_ap50(candidate, shared)?, mean_ap50(active, shared)?);
        (ap50 < before - margin).then(|| ap50_below("over all classes", ap50, before, margin))
    };
    let most = |of: &mut dyn Iterator<Item = (f64, Reason)>| {
        of.max_by(|a, b| a.0.total_cmp(&b.0)).map(|(_, reason)| reason)
    };
    most(&mut { recall })
        .or_else(|| most(&mut { precision }))
        .or_else(|| most(&mut { ap50 }))
        .or_else(overall)
}

fn ap50_below(what: &str, ap50: f64, before: f64, margin: f64) -> Reason {
    Reason::new(
        "ap50_below_active",
        format!("AP50 {what} is {ap50:.3} after {before:.3}, {margin} less is allowed"),
    )
}

fn worst(tally: &Tally) -> String {
    let told = |(picture, missed): &(String, usize)| format!("; {missed} missed in {picture}");
    tally.worst.as_ref().map(told).unwrap_or_default()
}

fn numbers(
    folder: &Folder,
    rules: &Calibration,
    candidate: &Marks,
    active: Option<&Marks>,
) -> Value {
    let model = |marks: &Marks| -> Value {
        let mut classes = Map::new();
        for ((name, tally), known) in folder.names.iter().zip(&marks.tallies).zip(&marks.known) {
            if *known {
                classes.insert(name.clone(), tally.numbers());
            }
        }
        let sum = Tally::sum(of_known(marks));
        let share = |v: Option<f64>| v.map(|v| rounded(v, 4));
        json!({
            "recall": share(sum.recall()),
            "precision": share(sum.precision()),
            "ap50": share(mean_ap50(marks, |_| true)),
            "classes": classes,
        })
    };
    let unknown = folder.names.iter().zip(&candidate.known).filter(|(_, known)| !**known);
    let mut numbers = json!({
        "pictures": folder.samples.len(),
        "pictures_left_out": folder.left_out,
        "objects": folder.objects(),
        "names_unknown": unknown.map(|(name, _)| name).collect::<Vec<_>>(),
        "min_recall": rules.min_recall,
        "min_precision": rules.min_precision,
        "min_objects": rules.min_objects,
        "margin": rules.margin,
        "candidate": model(candidate),
    });
    if let Some(active) = active {
        numbers["active"] = model(active);
    }
    numbers
}
