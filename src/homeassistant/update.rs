//! The state of Home Assistant's update entity for the model, made from `models/state`. Pure.
//!
//! Home Assistant discards a state with a key that it does not know, or with a null where a text
//! belongs.

use serde_json::{Value, json};

use crate::text::brief;

/// What Home Assistant keeps of a summary.
const SUMMARY_MAX: usize = 250;
/// Gates whose words help to decide.
const TELLING: [&str; 4] = ["calibration", "shift", "agreement", "latency"];

/// The entity's state. `state` is `models/state`; `candidate` names the model of its job, if that is
/// known already. While a model waits for `confirm` it is available; it counts as installed once it
/// has stood its probation.
pub fn entity(state: &Value, candidate: Option<String>) -> Value {
    let job = Some(&state["job"]).filter(|job| job["task"] == "install");
    let runs = &state["active"];
    // On probation the way back is open.
    let is_live =
        job.is_some_and(|job| !job["sha256"].is_null() && job["sha256"] == runs["sha256"]);
    let installed = version(if is_live { &state["previous"] } else { runs });
    let latest = match job {
        None => installed.clone(),
        Some(_) if is_live => version(runs),
        Some(job) => candidate.unwrap_or_else(|| version(&job["sha256"])),
    };
    let phase = job.and_then(|job| job["phase"].as_str());
    json!({
        "installed_version": installed,
        "latest_version": latest,
        // Left out, the last one would stay.
        "release_summary": brief(&job.map(summary).unwrap_or_default(), SUMMARY_MAX),
        "in_progress": job.is_some() && phase != Some("awaiting_confirm"),
        "update_percentage": phase.and_then(percentage),
    })
}

/// A model by its name. Not by its version alone: two models may share one, and Home Assistant would
/// ask which of two numbers is the higher, but a model that is wanted may have any.
pub fn version(model: &Value) -> String {
    let text = |v: &Value| v.as_str().unwrap_or_default().to_owned();
    let short = |v: &Value| text(v).chars().take(8).collect::<String>();
    match model {
        Value::Null => "none".to_owned(),
        Value::String(_) => short(model),
        model => {
            format!(
                "{} {} ({})",
                text(&model["id"]),
                text(&model["version"]),
                short(&model["sha256"])
            )
        }
    }
}

/// How far a job has come, by its phase.
fn percentage(phase: &str) -> Option<u8> {
    match phase {
        "receiving" => Some(5),
        "verifying" => Some(20),
        "proving" => Some(40),
        "loading" => Some(60),
        "switching" => Some(80),
        "probation" => Some(90),
        _ => None,
    }
}

/// What is asked, unless it was asked for, and what the gates have found.
fn summary(job: &Value) -> String {
    let gates = job["gates"].as_array().into_iter().flatten();
    let telling = gates
        .filter(|g| g["verdict"] != "SKIPPED" && TELLING.iter().any(|name| g["gate"] == *name));
    let words = telling.map(|g| &g["message"]);
    let ask = Some(&job["ask"]).filter(|ask| ask["code"] != "manual");
    let ask = ask.map_or(&Value::Null, |ask| &ask["message"]);
    let all = [ask].into_iter().chain(words).filter_map(Value::as_str);
    all.collect::<Vec<_>>().join("; ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state(active: &str, previous: &str, job: Value) -> Value {
        let model = |id: &str| match id {
            "" => Value::Null,
            id => json!({ "id": "plates", "version": id, "sha256": format!("{id:0>64}") }),
        };
        json!({ "active": model(active), "previous": model(previous), "job": job })
    }

    fn of(state: &Value, candidate: Option<&str>) -> (String, String, bool, Option<u64>) {
        let entity = entity(state, candidate.map(str::to_owned));
        let text = |key: &str| entity[key].as_str().unwrap().to_owned();
        (
            text("installed_version"),
            text("latest_version"),
            entity["in_progress"].as_bool().unwrap(),
            entity["update_percentage"].as_u64(),
        )
    }

    #[test]
    fn a_model_is_installed_once_it_has_stood_its_probation() {
        let one = "plates 1 (00000000)".to_owned();
        let two = "plates 2 (00000000)".to_owned();
        let none = state("1", "", Value::Null);
        assert_eq!(of(&none, None), (one.clone(), one.clone(), false, None));
        let job = |phase: &str| {
            json!({ "task": "install", "state": "IN_PROGRESS", "phase": phase,
                "sha256": format!("{:0>64}", 2) })
        };
        let proving = state("1", "", job("proving"));
        assert_eq!(of(&proving, Some(&two)), (one.clone(), two.clone(), true, Some(40)));
        assert_eq!(of(&proving, None).1, "00000000", "by its digest while it has no name");
        let waits = state("1", "", job("awaiting_confirm"));
        assert_eq!(of(&waits, Some(&two)), (one.clone(), two.clone(), false, None));
        let probation = state("2", "1", job("probation"));
        assert_eq!(of(&probation, Some(&two)), (one.clone(), two.clone(), true, Some(90)));
        let done = state("2", "1", Value::Null);
        assert_eq!(of(&done, None), (two.clone(), two, false, None));
        let back = json!({ "task": "rollback", "phase": "switching" });
        assert_eq!(of(&state("1", "", back), None), (one.clone(), one, false, None));
        let first = state("", "", job("awaiting_confirm"));
        assert_eq!(of(&first, Some("x")), ("none".into(), "x".into(), false, None));
    }
}
