//! A new model without a blink, by the real program: inbox, MQTT, command line; the gates' word;
//! rollback; the report that proves that no frame was lost.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::{Value, json};

use crate::harness::line::Line;
use crate::harness::onnx::{Detector, Output};
use crate::harness::service::shipped;
use crate::harness::until;

fn plates(version: u32) -> Vec<u8> {
    std::fs::read(shipped(&format!("models/plates-v{version}.onnx"))).unwrap()
}

/// One whole story: in by the inbox, refused by the gates, back by hand, all without a gap.
#[test]
fn a_model_from_the_inbox_goes_live_between_two_frames_and_back() {
    let calibration = format!(
        "probation_s = 2\n[models.calibration]\ndir = \"{}\"",
        shipped("models/calibration").display()
    );
    let mut line = Line::start(&calibration);
    line.put_in("plates-v2.onnx", &plates(2));
    let id = line.job_of("plates-v2.onnx");
    let job = line.ended(&id);
    assert_eq!(job["state"], "SUCCEEDED", "{job}\n{}", line.service.log());
    let verdicts: BTreeMap<&str, &str> = job["gates"]
        .as_array()
        .unwrap()
        .iter()
        .map(|g| (g["gate"].as_str().unwrap(), g["verdict"].as_str().unwrap()))
        .collect();
    for gate in ["identity", "structure", "contract", "proving", "calibration", "shift", "latency"]
    {
        assert_eq!(verdicts.get(gate), Some(&"PASSED"), "{verdicts:?}");
    }
    line.until_record("records by plates 2", 10, |r| r["model"]["version"] == "2");
    until("the swap report", 15, || line.messages("/models/swaps").len() == 1);
    let report = line.messages("/models/swaps").remove(0);
    assert_eq!(report["frames_lost"], 0, "{report}");
    assert_eq!((&report["from"]["version"], &report["to"]["version"]), (&json!("1"), &json!("2")));
    let camera = &report["cameras"]["line"];
    let (old, new) = (camera["last_old"].as_u64().unwrap(), camera["first_new"].as_u64().unwrap());
    assert_eq!(new, old + 1, "{report}");

    // Bad on purpose: sound in structure, blind on the calibration pictures.
    line.put_in("plates-v3.onnx", &plates(3));
    let refused = line.ended(&line.job_of("plates-v3.onnx"));
    assert_eq!(refused["state"], "REJECTED", "{refused}");
    assert_eq!(refused["reason"]["code"], "recall_below_active", "{refused}");
    let reason = line.inbox().join("rejected/plates-v3.onnx.reason.json");
    until("the reason beside the file", 5, || reason.exists());
    assert!(Path::new(&line.inbox().join("rejected/plates-v3.onnx")).exists());

    line.command("rollback", &json!({ "id": "back-1" }));
    assert_eq!(line.ended("back-1")["state"], "SUCCEEDED");
    line.until_record("records by plates 1", 10, |r| r["model"]["version"] == "1");
    let state = line.messages("/models/state").pop().unwrap();
    assert_eq!(state["active"]["version"], "1");
    assert!(line.subscriber.messages().iter().any(|m| {
        m.topic == "noblink/v1/test/reply/back-1" && m.payload.contains("\"ok\":true")
    }));
    assert_eq!(line.service.stop().code(), Some(0));
    line.assert_nothing_lost();
    line.assert_described();
}

#[test]
fn the_command_line_pushes_shows_and_rolls_back() {
    let line = Line::start("probation_s = 0");
    let file = shipped("models/plates-v2.onnx");
    let (code, said) = line.cli(&["model", "push", file.to_str().unwrap()]);
    assert_eq!(code, Some(0), "{said}\n{}", line.service.log());
    for part in ["receiving", "PASSED", "latency", "switching", "SUCCEEDED"] {
        assert!(said.contains(part), "{part:?} is not in:\n{said}");
    }
    // No folder of calibration pictures: said, not passed over; live frames are looked at instead.
    assert!(said.contains("SKIPPED  calibration"), "{said}");
    let agreement = said.lines().find(|l| l.contains(" agreement ")).unwrap();
    assert!(agreement.contains("PASSED") && agreement.contains("live frames"), "{said}");
    let (_, listed) = line.cli(&["model", "list"]);
    assert!(listed.contains("active     plates           2"), "{listed}");
    assert!(listed.contains("previous   plates           1"), "{listed}");
    let (code, said) = line.cli(&["model", "rollback"]);
    assert_eq!(code, Some(0), "{said}");
    line.until_record("records by plates 1", 10, |r| r["model"]["version"] == "1");
    line.assert_nothing_lost();
}

/// The gate that is left without a calibration folder: both models look at the last live frames.
#[test]
fn a_model_that_sees_nothing_live_waits_for_a_person_and_what_vanished_is_told() {
    let mut line = Line::start("probation_s = 7");
    let mut blind = Detector::new(Output::Yolo8, 320, 320);
    (blind.labels, blind.bias) = (vec!["plate", "dent", "hole"], -14.0);
    line.put_in("blind.onnx", &blind.bytes());
    let id = line.job_of("blind.onnx");
    let job = || line.messages(&format!("/models/jobs/{id}")).pop().unwrap();
    until("the question", 30, || job()["phase"] == "awaiting_confirm");
    let asked = job();
    assert_eq!(asked["ask"]["code"], "finds_nothing", "{asked}");
    let gate = |job: &Value, name: &str| {
        let gates = job["gates"].as_array().unwrap();
        gates.iter().find(|g| g["gate"] == name).cloned().unwrap_or_default()
    };
    let agreement = gate(&asked, "agreement");
    assert_eq!(agreement["verdict"], "ASK", "{agreement}");
    assert!(agreement["numbers"]["active_objects"].as_u64().unwrap() > 0, "{agreement}");
    assert_eq!(agreement["numbers"]["candidate_objects"], 0, "{agreement}");
    let frames = line.service.dir.path().join("state/frames");
    assert!(!frames.exists(), "the dumps are gone with the child");

    line.command("confirm", &json!({ "id": "yes-1" }));
    let ended = line.ended(&id);
    assert_eq!(ended["state"], "SUCCEEDED", "{ended}");
    let probation = gate(&ended, "probation");
    assert_eq!(probation["verdict"], "PASSED", "{probation}");
    let vanished = probation["numbers"]["label_vanished"].as_array().unwrap();
    assert!(!vanished.is_empty(), "{probation}");
    for label in vanished {
        let numbers = &probation["numbers"]["labels"][label.as_str().unwrap()];
        assert!(numbers["before"]["objects_per_frame"].as_f64().unwrap() >= 0.05, "{probation}");
        assert_eq!(numbers["after"]["objects_per_frame"], 0.0, "{probation}");
    }
    assert_eq!(line.service.stop().code(), Some(0));
    line.assert_nothing_lost();
    line.assert_described();
}

#[test]
fn messages_that_are_wrong_are_answered_and_change_nothing() {
    let line = Line::start("");
    line.command("rollback", &json!({ "id": "none" }));
    line.command(
        "desired",
        &json!({ "schema": "noblink.desired/1", "id": "x1", "source": "http://127.0.0.1:9/m.onnx",
        "manifest": { "sha256": "0".repeat(64), "size": 10 } }),
    );
    let reply = |id: &str| {
        let topic = format!("noblink/v1/test/reply/{id}");
        let messages = line.subscriber.messages();
        let found = messages.into_iter().find(|m| m.topic == topic)?;
        serde_json::from_str::<Value>(&found.payload).ok()
    };
    until("answers", 10, || reply("none").is_some() && reply("x1").is_some());
    assert_eq!(reply("none").unwrap()["reason"]["code"], "no_previous");
    assert_eq!(reply("x1").unwrap()["reason"]["code"], "host_not_allowed");
    line.until_record("plates 1 goes on", 5, |r| r["model"]["version"] == "1");
    line.assert_described();
}
