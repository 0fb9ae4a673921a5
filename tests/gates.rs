//! The gates: what bad models do, each by its own code, and what a good one passes with.
//!
//! What each bad model is refused for is seen over the running service (`faults::rejections`);
//! here the gates are asked alone, about what a service can't be brought to.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, gettid};
use noblink::config::{Calibration, Inference, Models};
use noblink::model::contract::Overrides;
use noblink::model::file::ModelFile;
use noblink::update::digest::Digest;
use noblink::update::event::Stopped;
use noblink::update::gates::{
    self, Content, End, FrameDump, Limits, Outcome, Request, Rules, Subject, proving,
};
use noblink::update::job::{Gate, Verdict};
use noblink::update::live::LiveFrames;
use serde_json::Value;

use crate::harness::onnx::{
    Attr, Detector, Fault, Graph, bytes_field, external, model, number_field,
};
use crate::harness::service::{config, noblink_output, shipped};
use crate::harness::site::{Site, good, picture, scene};
use crate::harness::{secs, until};

/// Proves a candidate against the site's active model and its pictures.
fn asked(site: &Site, candidate: &Detector) -> Request {
    let file = candidate.write(site.dir.path(), "candidate.onnx");
    let mut request = request(&file, &site.active);
    request.calibration = Some(Calibration::of(site.dir.path().to_owned()));
    request
}

fn request(candidate: &Path, active: &Path) -> Request {
    let (candidate, active) = (Subject::file(candidate), Subject::file(active));
    Request::of(&Inference::default(), &Models::default(), 2, candidate, Some(active))
}

fn limits() -> Limits {
    let program = env!("CARGO_BIN_EXE_noblink").into();
    Limits { program, cpu_s: 2, memory_bytes: 1 << 30, wall: secs(120), ..Limits::default() }
}

fn prove(request: &Request) -> Outcome {
    proving::run(request, None, &limits(), &AtomicBool::new(false))
}

fn gate<'a>(gates: &'a [Gate], name: &str) -> &'a Gate {
    gates.iter().find(|g| g.gate == name).unwrap_or_else(|| panic!("no {name} in {gates:#?}"))
}

/// Code, state and quarantine of a refusal; prints its line of the table.
fn refusal(what: &str, outcome: &Outcome) -> (String, Stopped, bool) {
    let End::Refused { how, reason, quarantine } = &outcome.end else {
        panic!("{what}: {:#?}", outcome);
    };
    let at = outcome.gates.iter().find(|g| g.verdict == Verdict::Failed).expect("a gate says it");
    assert_eq!(at.numbers["code"], reason.code.as_ref(), "{what}: {at:?}");
    let ms = outcome.phases_ms["total"];
    println!("{what:<28} {:<12} {:<22} {ms:>7.0} ms  {}", at.gate, reason.code, reason.message);
    (reason.code.to_string(), *how, *quarantine)
}

#[test]
fn a_slower_model_is_taken_when_that_is_allowed() {
    let site = Site::new();
    let mut slow = good();
    slow.work = 24;
    let mut request = asked(&site, &slow);
    let outcome = prove(&request);
    let message = &gate(&outcome.gates, "latency").message;
    for part in
        ["times slower", "1.5 is allowed", "each of 2 cameras", "--accept-slower", "[models]"]
    {
        assert!(message.contains(part), "{part:?} in {message}");
    }
    let ratio = gate(&outcome.gates, "latency").numbers["ratio"].as_f64().expect("a number");
    request.latency.accept_slower = Some(ratio * 3.0);
    let allowed = prove(&request);
    assert_eq!(gate(&allowed.gates, "latency").numbers["allowed_by"], "accept_slower");
    request.latency.accept_slower = None;
    request.latency.budget_ms = Some(5000.0);
    let allowed = prove(&request);
    assert_eq!(gate(&allowed.gates, "latency").numbers["allowed_by"], "latency_budget_ms");
    assert_eq!(allowed.end, End::Accepted { ask: None });
}

#[test]
fn floors_count_on_their_own() {
    let site = Site::new();
    let mut request = asked(&site, &good());
    let rules = |request: &mut Request, change: fn(&mut Calibration)| {
        change(request.calibration.as_mut().expect("a folder is set"));
        prove(request)
    };
    let outcome = rules(&mut request, |c| c.min_objects = Some(300));
    assert_eq!(outcome.end, End::Accepted { ask: None }, "no more than is labelled");
    std::fs::remove_file(site.dir.path().join("labels/3.txt")).expect("it was made");
    let outcome = rules(&mut request, |c| c.min_objects = Some(300));
    assert_eq!(refusal("few objects", &outcome).0, "min_objects");
    // An object that is not there.
    let label = site.dir.path().join("labels/4.txt");
    let lines = std::fs::read_to_string(&label).expect("it was made");
    std::fs::write(&label, lines + "0 0.5 0.9 0.1 0.1\n").expect("ours");
    let outcome = rules(&mut request, |c| (c.min_objects, c.min_recall) = (None, Some(1.0)));
    assert_eq!(refusal("recall below the floor", &outcome).0, "recall_below_floor");
    std::fs::write(&label, "").expect("ours");
    let outcome = rules(&mut request, |c| (c.min_recall, c.min_precision) = (None, Some(1.0)));
    assert_eq!(refusal("precision below the floor", &outcome).0, "precision_below_floor");
    std::fs::write(&label, "7 0.5 0.5 0.1 0.1\n").expect("ours");
    let outcome = prove(&request);
    let (code, how, _) = refusal("a broken folder", &outcome);
    assert_eq!((code.as_str(), how), ("calibration_unusable", Stopped::Failed));
}

#[test]
fn plates_2_passes_against_plates_1_and_plates_3_does_not_against_2() {
    let shipped = |name: &str| shipped(&format!("models/plates-{name}.onnx"));
    let calibration = Some(Calibration::of(crate::harness::service::shipped("models/calibration")));
    let mut better = request(&shipped("v2"), &shipped("v1"));
    better.calibration.clone_from(&calibration);
    let outcome = prove(&better);
    assert_eq!(outcome.end, End::Accepted { ask: None }, "{:#?}", outcome.gates);
    for gate in &outcome.gates {
        println!("{:?} {:<12} {}", gate.verdict, gate.gate, gate.message);
    }
    let classes = &gate(&outcome.gates, "calibration").numbers["candidate"]["classes"];
    for name in ["plate", "dent", "hole", "scratch"] {
        assert!(classes[name]["recall"].as_f64().expect("a number") > 0.8, "{classes}");
    }
    assert!(gate(&outcome.gates, "shift").numbers["shift_px"]["left"].as_f64().is_some());
    assert_eq!(gate(&outcome.gates, "agreement").verdict, Verdict::Skipped);
    let confinement = &gate(&outcome.gates, "proving").numbers["confinement"];
    assert_eq!(confinement["system_call_filter"], "on", "{confinement}");
    assert_eq!(confinement["offline"], true, "{confinement}");

    let mut worse = request(&shipped("v3"), &shipped("v2"));
    worse.calibration = calibration;
    let outcome = prove(&worse);
    assert_eq!(refusal("plates 3", &outcome).0, "recall_below_active");
    assert!(gate(&outcome.gates, "calibration").message.contains("\"scratch\""));
}

/// What `models/quantize.py` made of plates 2: other nodes, the same contract, the same findings.
#[test]
fn plates_2_in_int8_is_an_update_of_plates_2() {
    let path = |name: &str| shipped(&format!("models/{name}.onnx"));
    let read = |name: &str| {
        ModelFile::read(&path(name), &Overrides::default(), &[]).expect("noblink can run it")
    };
    let (float, int8) = (read("plates-v2"), read("plates-v2-int8"));
    assert_eq!(int8.scan.metadata("noblink.parent"), Some(&*float.identity.sha256), "made anew?");
    assert_eq!(int8.identity.id, float.identity.id);
    assert_ne!(int8.identity.version, float.identity.version);
    assert_eq!(int8.contract, float.contract);
    let Content { gates, file } = content(int8.bytes, Some(&float.contract.labels), false);
    file.expect("QuantizeLinear and DequantizeLinear are ordinary operators");
    assert!(gates.iter().all(|g| g.verdict == Verdict::Passed), "{gates:#?}");

    let mut request = request(&path("plates-v2-int8"), &path("plates-v2"));
    request.calibration = Some(Calibration::of(shipped("models/calibration")));
    let outcome = prove(&request);
    assert_eq!(outcome.end, End::Accepted { ask: None }, "{:#?}", outcome.gates);
    let numbers = &gate(&outcome.gates, "calibration").numbers;
    let ap50 = |who: &str| numbers[who]["ap50"].as_f64().expect("a number");
    assert!(ap50("candidate") > ap50("active") - 0.01, "{numbers}");
    println!("{}", gate(&outcome.gates, "latency").message);
}

#[test]
fn live_frames_are_compared_and_a_blind_model_asks() {
    let site = Site::new();
    let frames: Vec<PathBuf> = (0..4)
        .map(|n| {
            let file = site.dir.path().join(format!("{n}.frame"));
            let dump = FrameDump::of(&picture(&scene(n)), format!("gate {n}"));
            dump.write(&file).expect("the folder is ours");
            assert_eq!(FrameDump::read(&file).expect("a dump"), dump);
            file
        })
        .collect();
    let mut blind = good();
    blind.bias = -20.0;
    for (detector, verdict) in [(good(), Verdict::Passed), (blind, Verdict::Ask)] {
        let mut request = asked(&site, &detector);
        request.calibration = None;
        let live = |_: &AtomicBool, tell: &mut dyn FnMut(&Path) -> bool| {
            assert!(frames.iter().all(|file| tell(file)), "the child listens");
            LiveFrames::default()
        };
        let outcome = proving::run(&request, Some(&live), &limits(), &AtomicBool::new(false));
        let agreement = gate(&outcome.gates, "agreement");
        assert_eq!(agreement.verdict, verdict, "{agreement:?}");
        let End::Accepted { ask } = outcome.end else { panic!("{:#?}", outcome) };
        assert_eq!(ask.is_some(), verdict == Verdict::Ask);
        assert_eq!(gate(&outcome.gates, "calibration").verdict, Verdict::Skipped);
    }
    std::fs::write(&frames[0], b"{}").expect("ours");
    FrameDump::read(&frames[0]).expect_err("no dump");
}

#[test]
fn nothing_is_compared_without_an_active_model_or_with_a_broken_one() {
    let site = Site::new();
    let mut request = asked(&site, &good());
    request.active = None;
    let outcome = prove(&request);
    assert_eq!(outcome.end, End::Accepted { ask: None });
    let skipped = |outcome: &Outcome| -> Vec<String> {
        let skipped = outcome.gates.iter().filter(|g| g.verdict == Verdict::Skipped);
        skipped.map(|g| g.gate.to_string()).collect()
    };
    assert_eq!(skipped(&outcome), ["shift", "agreement", "latency"]);
    let mut broken = good();
    broken.fault = Fault::Error;
    let mut active = Subject::file(&broken.write(site.dir.path(), "broken.onnx"));
    active.name = "broken.onnx".into();
    active.sha256 = Some("0".repeat(64).parse().expect("a digest"));
    request.active = Some(active);
    let outcome = prove(&request);
    assert_eq!(outcome.end, End::Accepted { ask: None });
    assert!(gate(&outcome.gates, "latency").message.contains("is not what was verified"));
}

/// A program in the child's place.
fn impostor(site: &Site, script: &str) -> Outcome {
    let text = format!(
        "#!/bin/sh\nticket=$(cat)\n\
         nonce=$(echo \"$ticket\" | sed 's/.*\"nonce\":\"\\([0-9a-f]*\\)\".*/\\1/')\n\
         step() {{ echo '{{\"step\":{{\"what\":\"examine\",\"who\":\"candidate\"}}}}'; }}\n\
         accept() {{ echo \"{{\\\"report\\\":{{\\\"nonce\\\":\\\"$1\\\",\\\"gates\\\":[],\
         \\\"refused\\\":null,\\\"ask\\\":null,\\\"phases_ms\\\":{{}}}}}}\"; }}\n{script}\n"
    );
    let shell = Limits { program: site.impostor(&text), ..limits() };
    proving::run(&asked(site, &good()), None, &shell, &AtomicBool::new(false))
}

#[test]
fn a_verdict_counts_only_with_its_nonce_and_a_clean_exit() {
    let site = Site::new();
    let rows = [
        ("wrong nonce", "step; accept 00", "no_verdict", Stopped::Rejected),
        ("exit without a verdict", "step", "no_verdict", Stopped::Rejected),
        ("verdict, then exit 3", "step; accept $nonce; exit 3", "no_verdict", Stopped::Rejected),
        (
            "verdict, then SIGSEGV",
            "step; accept $nonce; kill -SEGV $$",
            "runtime_crash",
            Stopped::Rejected,
        ),
        ("SIGABRT", "step; kill -ABRT $$", "runtime_crash", Stopped::Rejected),
        ("SIGKILL by nobody", "step; kill -KILL $$", "runtime_crash", Stopped::Rejected),
        ("nothing at all", "echo died >&2; exit 1", "proving_failed", Stopped::Failed),
    ];
    for (what, script, code, how) in rows {
        let outcome = impostor(&site, script);
        let found = refusal(what, &outcome);
        assert_eq!((found.0.as_str(), found.1), (code, how), "{what}");
        assert_eq!(found.2, how == Stopped::Rejected, "{what}");
    }
    // The same words from a clean child count: the rows above did not fail for their form.
    assert_eq!(impostor(&site, "step; accept $nonce").end, End::Accepted { ask: None });
}

/// Starts a proving that hangs, and does something to its child.
fn hanging(act: impl FnOnce(Pid, &AtomicBool)) -> (Outcome, Pid) {
    let site = Site::new();
    let mut detector = good();
    detector.fault = Fault::Hang;
    let request = asked(&site, &detector);
    let cancel = Arc::new(AtomicBool::new(false));
    let (tell, told) = std::sync::mpsc::channel();
    std::thread::scope(|threads| {
        let flag = Arc::clone(&cancel);
        let run = threads.spawn(move || {
            tell.send(gettid()).expect("the test waits");
            let patient = Limits { cpu_s: 600, ..limits() };
            proving::run(&request, None, &patient, &flag)
        });
        let thread = told.recv().expect("the thread runs");
        let mut child = None;
        until("the child works on the loop", 30, || {
            let list = format!("/proc/self/task/{thread}/children");
            let list = std::fs::read_to_string(list).unwrap_or_default();
            child = list.split_whitespace().next().and_then(|pid| pid.parse().ok());
            let busy = |pid: i32| {
                let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
                // User time in hundredths of a second.
                let time = stat.rsplit(')').next().and_then(|s| s.split_whitespace().nth(11));
                time.and_then(|t| t.parse::<u32>().ok()).is_some_and(|t| t > 100)
            };
            child.is_some_and(busy)
        });
        let child = Pid::from_raw(child.expect("it was found"));
        act(child, &cancel);
        (run.join().expect("no panic"), child)
    })
}

#[test]
fn a_child_that_is_killed_by_a_signal_is_the_models_fault() {
    // Not SIGSEGV: Rust's handler for stack overflows lets the first one pass that no fault caused.
    let (outcome, _) = hanging(|child, _| kill(child, Signal::SIGABRT).expect("our child"));
    let found = refusal("killed from outside", &outcome);
    assert_eq!(found, ("runtime_crash".into(), Stopped::Rejected, true));
    assert!(gate(&outcome.gates, "proving").message.contains("SIGABRT"));
}

#[test]
fn cancelling_ends_the_child_at_once() {
    let mut at = Instant::now();
    let (outcome, child) = hanging(|_, cancel| {
        at = Instant::now();
        cancel.store(true, Ordering::Relaxed);
    });
    assert_eq!(outcome.end, End::Canceled);
    assert!(at.elapsed() < Duration::from_secs(2), "{:?}", at.elapsed());
    assert!(!Path::new(&format!("/proc/{child}")).exists(), "the child is gone");
}

#[test]
fn a_wall_that_is_reached_is_a_time_out_without_quarantine() {
    let site = Site::new();
    let mut detector = good();
    detector.fault = Fault::Hang;
    let hasty = Limits { wall: secs(1), ..limits() };
    let outcome = proving::run(&asked(&site, &detector), None, &hasty, &AtomicBool::new(false));
    assert_eq!(refusal("wall", &outcome), ("timeout".into(), Stopped::TimedOut, false));
}

fn content(bytes: Vec<u8>, active: Option<&[String]>, allow_removed_labels: bool) -> Content {
    let overrides = Overrides::default();
    let rules = Rules { overrides: &overrides, domains: &[], active, allow_removed_labels };
    let digest = Digest::of(&bytes);
    gates::content(bytes, &digest, "best.onnx", &rules)
}

#[test]
fn removed_labels_are_refused_unless_allowed() {
    let active: Vec<String> = ["red", "green", "blue", "white"].map(String::from).into();
    let Content { gates, file } = content(good().bytes(), Some(&active), false);
    let reason = file.expect_err("white is gone");
    assert_eq!(reason.code, "label_removed");
    assert!(reason.message.contains("\"white\""), "{reason}");
    assert_eq!(gates[1].numbers["labels_removed"], serde_json::json!(["white"]));
    let Content { gates, file } = content(good().bytes(), Some(&active), true);
    file.expect("it is allowed");
    assert!(gates[1].message.contains("removed as allowed"), "{}", gates[1].message);
}

#[test]
fn what_must_not_reach_onnx_runtime_is_refused_by_the_scan() {
    let base = good();
    let with = |change: &dyn Fn(&mut Graph)| {
        let mut graph = base.graph();
        change(&mut graph);
        model(&graph, &base.metadata())
    };
    let appended = |number: u64, message: &[u8]| {
        let mut bytes = base.bytes();
        bytes.extend(bytes_field(number, message));
        bytes
    };
    let outside = |location: &str| external("weights", &[4], location);
    let node = |attribute: u64, value: &[u8]| {
        let attribute = [bytes_field(1, b"value"), bytes_field(attribute, value)].concat();
        [bytes_field(4, b"Constant"), bytes_field(5, &attribute)].concat()
    };
    let inner = {
        let mut graph = Graph::default();
        graph.external("weights", &[4], "weights.bin");
        graph
    };
    let sparse = bytes_field(1, &outside("weights.bin"));
    let huge = [
        number_field(1, 1 << 40),
        number_field(1, 1 << 40),
        number_field(2, 1),
        bytes_field(8, b"huge"),
    ]
    .concat();
    let claims = [number_field(1, 1 << 20), number_field(2, 1), bytes_field(9, &[0; 16])].concat();
    let vast = [bytes_field(1, &[]), number_field(3, 1 << 40)].concat();
    let rows: Vec<(&str, Vec<u8>, &str)> = vec![
        ("external, plain", with(&|g| g.external("w", &[4], "weights.bin")), "external_data"),
        ("external, ..", with(&|g| g.external("w", &[4], "../../etc/passwd")), "external_data"),
        ("external, absolute", with(&|g| g.external("w", &[4], "/etc/passwd")), "external_data"),
        (
            "external, address marker",
            with(&|g| g.external("w", &[4], "*/_ORT_MEM_ADDR_/*")),
            "external_data",
        ),
        ("external, sparse", with(&|g| g.field(15, &sparse)), "external_data"),
        (
            "external, in a constant",
            with(&|g| g.field(1, &node(5, &outside("w.bin")))),
            "external_data",
        ),
        ("external, sparse constant", with(&|g| g.field(1, &node(22, &sparse))), "external_data"),
        (
            "external, in a subgraph",
            with(&|g| drop(g.node("If", &["x"], &[("then_branch", Attr::Graph(inner.clone()))]))),
            "external_data",
        ),
        (
            "external, in a function",
            appended(25, &bytes_field(7, &node(5, &outside("w.bin")))),
            "external_data",
        ),
        (
            "external, in training",
            appended(20, &bytes_field(2, &inner.bytes("training"))),
            "external_data",
        ),
        (
            "custom operator",
            with(&|g| drop(g.node("evil/Op", &["images"], &[]))),
            "custom_operators",
        ),
        (
            "EPContext",
            with(&|g| drop(g.node("com.microsoft/EPContext", &["images"], &[]))),
            "compiled_blob",
        ),
        ("overflowing size", with(&|g| g.field(5, &huge)), "not_onnx"),
        ("more than its data", with(&|g| g.field(5, &claims)), "not_onnx"),
        ("vast and sparse", with(&|g| g.field(15, &vast)), "not_onnx"),
        ("trailing bytes", [base.bytes(), b"PK\x03\x04".to_vec()].concat(), "not_onnx"),
        ("cut short", base.bytes()[..2000].to_vec(), "not_onnx"),
        ("a web page", b"<!DOCTYPE html><html>login</html>".to_vec(), "not_onnx"),
    ];
    for (what, bytes, code) in rows {
        let Content { gates, file } = content(bytes, None, false);
        let reason = file.expect_err(what);
        println!("{what:<28} structure    {:<22} {}", reason.code, reason.message);
        assert_eq!((reason.code.as_ref(), gates.len()), (code, 1), "{what}: {reason}");
        assert_eq!((gates[0].verdict, &gates[0].numbers["code"]), (Verdict::Failed, &code.into()));
    }
    ModelFile::parse(base.bytes(), "best.onnx", &Overrides::default(), &[]).expect("the good one");
}

#[test]
fn validate_and_calibrate_work_from_the_command_line() {
    let dir = tempfile::tempdir().expect("a folder");
    let text = |name: &str| shipped(name).display().to_string();
    let (v1, v2, v3) = (
        text("models/plates-v1.onnx"),
        text("models/plates-v2.onnx"),
        text("models/plates-v3.onnx"),
    );
    let calibration = text("models/calibration");
    let validate = |file: &str, active: &str| {
        let args = [
            "model",
            "validate",
            file,
            "--active",
            active,
            "--calibration",
            &calibration,
            "--json",
        ];
        let output = noblink_output(&args);
        let judged: Value = serde_json::from_slice(&output.stdout).expect("JSON");
        (output.status.code(), judged)
    };
    let (code, judged) = validate(&v2, &v1);
    assert_eq!((code, &judged["accepted"]), (Some(0), &true.into()), "{judged:#}");
    let (code, judged) = validate(&v3, &v2);
    assert_eq!((code, &judged["reason"]["code"]), (Some(1), &"recall_below_active".into()));
    let (code, judged) = validate(&v1, &v2);
    assert_eq!((code, &judged["reason"]["code"]), (Some(1), &"label_removed".into()));

    let file = dir.path().join("noblink.toml");
    let camera = ("gate", &format!("file://{}", text("models/clips/line-a.mp4"))[..], "");
    let rest = format!("[models]\nfactory = {v1:?}\n[models.calibration]\ndir = \"site\"\n");
    std::fs::write(&file, config("embedded = true", &[camera], &rest)).expect("ours");
    let (file, site) = (file.display().to_string(), dir.path().join("site"));
    let out = site.display().to_string();
    let args = ["model", "calibrate", "--camera", "gate", "--count", "6", "--every", "0.2"];
    let output = noblink_output(&[&args[..], &["--config", &file, "--out", &out]].concat());
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{said}{}", String::from_utf8_lossy(&output.stderr));
    assert!(said.contains("6 pictures with"), "{said}");
    assert_eq!(std::fs::read_dir(site.join("images")).expect("made").count(), 6);
    // The model that made the labels agrees with them.
    let output = noblink_output(&["model", "validate", &v1, "--config", &file]);
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success() && said.contains("passed   calibration"), "{said}");
    println!("{said}");
}
