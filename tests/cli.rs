//! The commands: what they print and how they exit.

use std::io::{BufRead, BufReader};

use noblink::rtsp::{self, RtspServer};
use serde_json::Value;

use crate::harness::free_port;
use crate::harness::service::{Service, config, noblink, noblink_output, plates, shipped};

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn with_config(config: &str, args: &[&str]) -> (Option<i32>, String) {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("noblink.toml");
    std::fs::write(&file, config).unwrap();
    let args: Vec<&str> =
        args.iter().copied().chain(["--config", file.to_str().unwrap()]).collect();
    let output = noblink_output(&args);
    let said = text(&output.stdout) + &text(&output.stderr);
    (output.status.code(), said.replace(file.to_str().unwrap(), "FILE"))
}

#[test]
fn exit_codes_tell_usage_from_configuration_from_failure() {
    assert_eq!(noblink_output(&["--version"]).status.code(), Some(0));
    assert_eq!(noblink_output(&["jump"]).status.code(), Some(2));
    assert_eq!(noblink_output(&["run", "--config", "/nowhere.toml"]).status.code(), Some(78));
    assert_eq!(noblink_output(&["probe", "rtsp://127.0.0.1:9/x"]).status.code(), Some(1));
}

#[test]
fn check_says_fine_or_everything_that_is_wrong() {
    let fine = config("embedded = true", &[("gate", "test://", "")], "");
    assert_eq!(
        with_config(&fine, &["check"]),
        (
            Some(0),
            "ok       camera gate: test://?width=640&height=360&fps=10\nFILE is fine\n".into()
        )
    );
    let (code, said) = with_config(&config("embedded = true", &[], ""), &["check"]);
    assert_eq!(code, Some(0));
    assert!(said.starts_with("-        no camera") && said.ends_with("FILE is fine\n"), "{said}");
    let wrong =
        config("embedded = true", &[("gate", "rtsp://u:secret@", "queue = 0\nfps = 3")], "");
    let (code, said) = with_config(&wrong, &["check"]);
    assert_eq!(code, Some(78));
    assert!(
        said.contains("3 problems") && said.contains("camera[0].fps is not a known key"),
        "{said}"
    );
    assert!(!said.contains("secret"), "{said}");
    let pipeline = config("embedded = true", &[("gate", "test://", "pipeline = \"none\"")], "");
    let (code, said) = with_config(&pipeline, &["check"]);
    assert_eq!(code, Some(1));
    assert!(said.contains("PROBLEM  camera gate: no pipeline \"none\""), "{said}");
}

#[test]
fn check_live_looks_at_cameras_broker_and_model() {
    let server = RtspServer::start(&rtsp::Settings::default()).unwrap();
    server.mount_clip("/b", &shipped("models/clips/line-b.mp4"), true).unwrap();
    let cameras = [("b", server.url("/b")), ("gone", "rtsp://127.0.0.1:9/x".to_owned())];
    let cameras = [("b", cameras[0].1.as_str(), ""), ("gone", cameras[1].1.as_str(), "")];
    let text = config("url = \"mqtt://127.0.0.1:9\"", &cameras, &plates());
    let (code, said) = with_config(&text, &["check", "--live"]);
    assert_eq!(code, Some(1), "{said}");
    for line in [
        "ok       camera b: H.264 640x360 at 10",
        "PROBLEM  camera gone: ",
        "PROBLEM  broker: 127.0.0.1:9 can't be reached",
        "plates-v1.onnx: plates version 1",
        "2 problem(s)",
    ] {
        assert!(said.contains(line), "{line:?} is not in:\n{said}");
    }
}

#[test]
fn probe_prints_a_block_that_can_be_pasted_and_writes_a_picture() {
    let server = RtspServer::start(&rtsp::Settings {
        login: Some(("user".into(), "pass".into())),
        ..Default::default()
    })
    .unwrap();
    server.mount_clip("/a", &shipped("models/clips/line-a.mp4"), true).unwrap();
    let url = server.url("/a").replace("rtsp://", "rtsp://user:pass@");
    let dir = tempfile::tempdir().unwrap();
    let picture = dir.path().join("p.jpg");
    let output = noblink_output(&["probe", &url, "--picture", picture.to_str().unwrap()]);
    let said = text(&output.stdout);
    assert_eq!(output.status.code(), Some(0), "{said}{}", text(&output.stderr));
    for part in ["H.264", "1280x720", "TCP", "sender reports", "ms of a core per frame"] {
        assert!(said.contains(part), "{part:?} is not in:\n{said}");
    }
    let (shown, block) = said.split_once("[[camera]]").expect("a block to paste");
    assert!(!shown.contains("pass"), "{shown}");
    let pasted = format!("[device]\nid = \"t\"\n[mqtt]\nembedded = true\n[[camera]]{block}");
    assert_eq!(with_config(&pasted, &["check"]).0, Some(0), "{pasted}");
    assert!(std::fs::read(picture).unwrap().starts_with(&[0xff, 0xd8]));
}

#[test]
fn inspect_describes_a_detector_and_refuses_the_rest() {
    let file = shipped("models/plates-v2.onnx");
    let output = noblink_output(&["model", "inspect", file.to_str().unwrap()]);
    let said = text(&output.stdout);
    assert_eq!(output.status.code(), Some(0));
    assert!(
        said.contains("plates version 2") && said.contains("plate, dent, hole, scratch"),
        "{said}"
    );
    let output = noblink_output(&["model", "inspect", "--json", file.to_str().unwrap()]);
    let json: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(json["detector"]["layout"], "yolo8", "{json}");

    let output =
        noblink_output(&["model", "inspect", "--json", shipped("README.md").to_str().unwrap()]);
    let json: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert_eq!(json["refused"]["code"], "not_onnx", "{json}");
}

/// A short form of what `make bench-swap` measures. Frames that a busy machine drops are counted by
/// reason and are not what is tested.
#[test]
fn bench_swap_loses_and_doubles_nothing() {
    let output = noblink_output(&["bench", "swap", "--swaps", "2", "--updates", "1", "--json"]);
    let report: Value = serde_json::from_slice(&output.stdout)
        .unwrap_or_else(|e| panic!("{e}: {}", String::from_utf8_lossy(&output.stderr)));
    assert_eq!(report["swaps"], 3, "{report}");
    for none in ["frames_unaccounted", "frames_doubled", "epochs_back"] {
        assert_eq!(report[none], 0, "{report}");
    }
    for windows in ["swap", "sham"] {
        assert!(report[windows]["gap_ms"]["p50"].as_f64().unwrap() > 0.0, "{report}");
    }
}

#[test]
fn bench_pipeline_measures_every_stage() {
    let output = noblink_output(&["bench", "pipeline", "--frames", "40", "--json"]);
    let json: Value = serde_json::from_slice(&output.stdout)
        .unwrap_or_else(|e| panic!("{e}: {}", text(&output.stderr)));
    for key in ["decode", "queue", "preprocess", "inference", "postprocess"] {
        assert!(json["stages_ms"][key].as_f64() > Some(0.0), "{key}: {json}");
    }
    assert!(json["frames_per_s"].as_f64() > Some(0.0) && json["cpu_ms_per_frame"].is_number());
    let latency = |quantile: &str| json["latency_ms"][quantile].as_f64();
    assert!(latency("p50") > Some(0.0) && latency("p50") <= latency("p99"), "{json}");
    assert!(json["rss_mb"].as_f64() > Some(10.0), "{json}");
}

#[test]
fn bench_pipeline_goes_round_until_nobody_reads() {
    let mut child = noblink(&["bench", "pipeline", "--lap", "1"])
        .stdout(std::process::Stdio::piped())
        .spawn()
        .expect("it starts");
    let mut lines = BufReader::new(child.stdout.take().expect("piped")).lines();
    let mut next = || -> Value {
        let line = lines.next().expect("a line").expect("read");
        serde_json::from_str(&line).unwrap_or_else(|e| panic!("{e}: {line}"))
    };
    assert_eq!(next()["provider"], "cpu");
    let laps = [next(), next()];
    for lap in &laps {
        assert!(lap["seconds"].as_f64() >= Some(1.0) && lap["cpu_s"].as_f64() > Some(0.0), "{lap}");
        let latencies = lap["latency_ms"].as_array().expect("a list");
        assert!(
            latencies.iter().all(|ms| ms.as_f64() > Some(0.0)) && !latencies.is_empty(),
            "{lap}"
        );
    }
    assert!(laps[0]["began"].as_f64() < laps[1]["began"].as_f64(), "{laps:?}");
    drop(lines);
    assert!(child.wait().expect("it ends").success());
}

#[test]
fn the_demo_tells_the_story_of_an_update_and_ends_with_an_exact_ledger() {
    let output = noblink_output(&["demo", "--seconds", "40"]);
    let said = text(&output.stdout);
    assert_eq!(output.status.code(), Some(0), "{said}{}", text(&output.stderr));
    for part in ["mosquitto_sub -h 127.0.0.1", "line-a", "line-b", "plate", "The ledger is exact."]
    {
        assert!(said.contains(part), "{part:?} is not in:\n{said}");
    }
}

/// As in `noblink model list | head`.
#[test]
fn a_reader_that_leaves_is_no_failure() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("noblink.toml");
    std::fs::write(&file, config("embedded = true", &[("gate", "test://", "")], "")).unwrap();
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let mut check = noblink(&["check", "--config", file.to_str().unwrap()]);
    let output = check.stdout(writer).output().unwrap();
    assert_eq!((output.status.code(), text(&output.stderr)), (Some(0), String::new()));
}

#[test]
fn without_onnx_runtime_status_says_so() {
    let missing = "[inference]\nlibrary = \"/nowhere/libonnxruntime.so\"\n";
    // The demo of another test may have the usual port.
    let mqtt = format!("embedded = true\nembedded_port = {}", free_port());
    let text = config(&mqtt, &[("gate", "test://", "")], missing);
    let dir = tempfile::tempdir().unwrap();
    // Nothing else makes this folder before the control socket needs it.
    let run = dir.path().join("run").to_str().unwrap().to_owned();
    let mut service = Service::start_in(dir, &text, &[("RUNTIME_DIRECTORY", &run)]);
    service.says("camera gate: streaming", 20);
    let file = service.dir.path().join("noblink.toml");
    let ask = |args: &[&str]| {
        let args = [args, &["--config", file.to_str().unwrap()]].concat();
        let output = noblink(&args).env("RUNTIME_DIRECTORY", &run).output().unwrap();
        let said = [output.stdout, output.stderr].map(|bytes| self::text(&bytes)).concat();
        (output.status.code(), said)
    };
    let (code, said) = ask(&["status"]);
    assert_eq!(code, Some(0), "{said}");
    assert!(said.contains("model   none") && said.contains("camera  gate: streaming"), "{said}");
    assert!(said.contains("next    no model yet: ") && said.contains("/nowhere/"), "{said}");
    let model = shipped("models/plates-v1.onnx");
    let (code, said) = ask(&["model", "push", model.to_str().unwrap()]);
    assert!(code == Some(1) && said.contains("no_runtime") && said.contains("/nowhere/"), "{said}");
    assert_eq!(service.stop().code(), Some(0), "{}", service.log());
}
