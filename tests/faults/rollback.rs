//! A live model that fails is taken back by itself, and the frame on which it fails has a result.

use std::path::{Path, PathBuf};
use std::time::Instant;

use gst::prelude::*;
use noblink::update::digest::Digest;
use noblink::update::failpoint::{DEAF, VARIABLE};
use serde_json::{Value, json};

use crate::harness::line::{Line, PROVED_S};
use crate::harness::mosquitto::Mosquitto;
use crate::harness::onnx::{Detector, Fault, Output};
use crate::harness::service::shipped;
use crate::harness::until;

/// A clip: so many frames of each pattern, and frames a second.
type Clip<'a> = (&'a [(&'a str, u32)], u32);

const BLACK_AND_BLUE: Clip<'_> = (&[("black", 60), ("blue", 10)], 10);

fn clip(dir: &Path, (parts, fps): Clip<'_>) -> PathBuf {
    gst::init().unwrap();
    let path = dir.join("clip.mp4");
    let mut launch = format!(
        "concat name=all ! x264enc speed-preset=ultrafast bframes=0 key-int-max=10 ! h264parse ! \
         mp4mux ! filesink location={} ",
        path.display()
    );
    for (pattern, frames) in parts {
        launch += &format!(
            "videotestsrc pattern={pattern} num-buffers={frames} ! \
             video/x-raw,format=I420,width=320,height=320,framerate={fps}/1 ! all. "
        );
    }
    let pipeline = gst::parse::launch(&launch).unwrap();
    pipeline.set_state(gst::State::Playing).unwrap();
    let ends = [gst::MessageType::Eos, gst::MessageType::Error];
    let end = pipeline.bus().unwrap().timed_pop_filtered(gst::ClockTime::from_seconds(30), &ends);
    pipeline.set_state(gst::State::Null).unwrap();
    assert!(matches!(end.unwrap().view(), gst::MessageView::Eos(_)));
    path
}

/// A model for these clips, which strikes when they turn blue: no gate shows a blue picture.
fn blobs(version: &str, work: usize, fault: Fault) -> Detector {
    let mut model =
        Detector::new(Output::Yolo8, 320, 320).with_metadata("noblink.version", version);
    (model.work, model.fault, model.strikes_blue) = (work, fault, true);
    model
}

/// A service whose camera shows the clip over and over.
fn watching(shown: Clip<'_>, work: usize, models: &str, env: &[(&str, &str)]) -> Line {
    let dir = tempfile::tempdir().unwrap();
    let factory = blobs("1", work, Fault::None).write(dir.path(), "blobs.onnx");
    let url = format!("file://{}", clip(dir.path(), shown).display());
    let broker = Mosquitto::start("");
    let port = broker.port;
    let mut line = Line::through(broker, port, env, &url, "loop = true", &factory, models);
    line.keep(dir);
    line
}

/// The camera has just turned black again: for some seconds no gate can see a blue frame live.
fn until_black(line: &Line) {
    let blue = |r: &Value| !r["objects"].as_array().unwrap().is_empty();
    line.until_record("a blue picture", 20, blue);
    line.until_record("a black picture", 20, |r| !blue(r));
}

/// The camera turns blue once in a while; the next model can't bear that.
fn fails_live(shown: Clip<'_>, fault: Fault, work: usize) -> (Line, Value) {
    let line = watching(shown, work, "probation_s = 30", &[]);
    until_black(&line);
    line.put_in("next.onnx", &blobs("2", work, fault).bytes());
    let job = line.ended(&line.job_of("next.onnx"));
    assert_eq!((&job["state"], &job["phase"]), (&json!("FAILED"), &json!("rolled_back")), "{job}");
    until("the state follows", 5, || line.state()["active"]["version"] == "1");
    line.until_record("records by the model before", 10, |r| r["model"]["version"] == "1");
    let records = line.messages("/detections");
    assert!(records.iter().any(|r| r["model"]["version"] == "2"), "it was live for a while");
    println!("{}", job["reason"]);
    (line, job)
}

/// Its digest is in quarantine.
fn assert_not_tried_again(line: &Line, bytes: &[u8]) {
    line.push("again", bytes);
    let job = line.over("again");
    assert_eq!(
        (&job["state"], &job["reason"]["code"]),
        (&json!("REJECTED"), &json!("quarantined"))
    );
}

#[test]
fn a_model_that_turns_nan_goes_back_and_its_frame_is_not_lost() {
    let (mut line, job) = fails_live(BLACK_AND_BLUE, Fault::Nan, 0);
    assert_eq!(job["reason"]["code"], "run_failed");
    // "frame 71 of line: …": that very frame has a result, by the model before.
    let message = job["reason"]["message"].as_str().unwrap();
    let frame: u64 = message.split(' ').nth(1).unwrap().parse().expect(message);
    let records = line.messages("/detections");
    let failed = records.iter().find(|r| r["frame"]["id"] == frame).expect("its record");
    assert_eq!(failed["model"]["version"], "1", "{failed}");
    until("two reports", 15, || line.messages("/models/swaps").len() == 2);
    assert_not_tried_again(&line, &blobs("2", 0, Fault::Nan).bytes());
    // A refusal of another kind: plates has other labels than the blobs.
    let file = shipped("models/plates-v1.onnx");
    assert_eq!(line.cli(&["model", "push", file.to_str().unwrap()]).0, Some(1));
    line.stop();
    line.assert_nothing_lost();
}

/// It was as fast as the one before on all that the gates showed it.
#[test]
fn a_model_that_turns_slow_goes_back_and_no_frame_is_lost() {
    // Few frames: even the slow ones are no overload, so that none may be dropped.
    let shown = (&[("black", 20), ("blue", 10)][..], 5);
    let (mut line, job) = fails_live(shown, Fault::Slow, 16);
    assert_eq!(job["reason"]["code"], "latency", "{job}");
    let times = |version: &str| {
        let records = line.messages("/detections");
        let of = records.iter().filter(|r| r["model"]["version"] == version);
        let mut times: Vec<_> =
            of.map(|r| r["latency_ms"]["inference"].as_f64().unwrap()).collect();
        times.sort_unstable_by(f64::total_cmp);
        (times[times.len() / 2], times[times.len() - 1])
    };
    let (before, (usual, slow)) = (times("1").0, times("2"));
    println!(
        "{before:.1} ms a run by the model before, {usual:.1} and up to {slow:.1} by the other"
    );
    assert!(slow > 5.0 * before, "it turned 5 times slower at least");
    line.stop();
    line.assert_nothing_lost();
}

/// The longest time between two results, seconds.
fn longest_gap_s(records: &[Value]) -> f64 {
    let at = |r: &Value| {
        r["time_us"].as_f64().unwrap() / 1e6 + r["latency_ms"]["total"].as_f64().unwrap() / 1e3
    };
    records.windows(2).map(|pair| at(&pair[1]) - at(&pair[0])).fold(0.0, f64::max)
}

/// What is dropped while a run hangs is counted, and it is not much: ten frames a second.
fn assert_few_dropped(line: &Line) {
    let gap = longest_gap_s(&line.messages("/detections"));
    println!("{gap:.2} s between two results while a run hung");
    assert!(gap < 4.0, "2 s are promised, of a box that has the time");
    let dropped = |r: &Value| r["since"]["dropped"].as_u64().unwrap();
    let lost: u64 = line.messages("/detections").iter().map(dropped).sum();
    assert!(lost <= 25, "{lost} frames of 10 a second were dropped");
}

#[test]
fn a_run_that_hangs_is_ended_and_the_cameras_are_served_again() {
    let (mut line, job) = fails_live(BLACK_AND_BLUE, Fault::Hang, 0);
    assert!(job["reason"]["message"].as_str().unwrap().contains("watchdog"), "{job}");
    assert_eq!(line.service.stop().code(), Some(0));
    assert_few_dropped(&line);
}

/// On a box that is always at work a frame of the model before ends after the change, and nothing
/// of the new one ever does.
#[test]
fn a_model_that_hangs_on_its_first_frame_is_ended_as_well() {
    // The gates see it black live, and take so long that it is blue when the model goes live.
    let shown = (&[("black", 40), ("blue", 600)][..], 10);
    let line = watching(shown, 400, "probation_s = 30\nlatency_budget_ms = 5000", &[]);
    line.put_in("next.onnx", &blobs("2", 60, Fault::Hang).bytes());
    let job = line.over(&line.job_of("next.onnx"));
    assert_eq!((&job["state"], &job["phase"]), (&json!("FAILED"), &json!("rolled_back")), "{job}");
    assert!(job["reason"]["message"].as_str().unwrap().contains("watchdog"), "{job}");
    let last = line.messages("/detections").len();
    until("records by the model before", 20, || line.messages("/detections").len() > last + 2);
    let records = line.messages("/detections");
    assert!(records.iter().all(|r| r["model"]["version"] == "1"), "it never gave a result");
}

/// No flag is looked at within a kernel: only the end of the process helps, and the next life
/// starts with the model before.
#[test]
fn a_hang_within_a_kernel_ends_the_process_and_the_model_before_starts() {
    let hard = [(VARIABLE, DEAF)];
    // Black for long: the new model must be live, and told of, before the blue comes.
    let shown = (&[("blue", 10), ("black", 250)][..], 10);
    let mut line = watching(shown, 0, "probation_s = 30", &hard);
    let bad = blobs("2", 0, Fault::Hang).bytes();
    until_black(&line);
    line.put_in("next.onnx", &bad);
    let id = line.job_of("next.onnx");
    let mut status = None;
    until("the process ends itself", PROVED_S, || {
        status = line.service.ended();
        status.is_some()
    });
    let (ended, before) = (Instant::now(), line.messages("/detections"));
    assert_eq!(status.unwrap().code(), Some(1), "{}", line.service.log());
    assert!(before.iter().any(|r| r["model"]["version"] == "2"), "it was live for a while");

    // As systemd does it.
    line.service.again(&[]);
    let boot = &before.last().unwrap()["boot"];
    line.until_record("a record of the next life", 30, |r| r["boot"] != *boot);
    println!("the first result came {:.1} s after the end", ended.elapsed().as_secs_f64());
    let first = line.messages("/detections").pop().unwrap();
    assert_eq!(first["model"]["version"], "1");
    let silent = longest_gap_s(&[before.last().unwrap().clone(), first.clone()]);
    println!("{silent:.1} s between the two results, hang, end and start included");
    assert!(first["model"]["epoch"].as_u64() > before.last().unwrap()["model"]["epoch"].as_u64());
    // The life that failed could not tell.
    let job = line.ended(&id);
    assert_eq!(
        (&job["state"], &job["reason"]["code"]),
        (&json!("FAILED"), &json!("hang")),
        "{job}"
    );
    assert_not_tried_again(&line, &bad);
    line.stop();
}

/// It was committed long ago, and there may be none before it: the frame fails, the next are served.
#[test]
fn a_committed_model_that_hangs_loses_the_frame_and_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    let factory = blobs("1", 0, Fault::Hang).write(dir.path(), "blobs.onnx");
    let shown = (&[("black", 20), ("blue", 1)][..], 10);
    let url = format!("file://{}", clip(dir.path(), shown).display());
    let mut line = Line::with(&url, "loop = true", &factory, "");
    let failed = || {
        let records = line.messages("/detections");
        records.iter().map(|r| r["since"]["failed"].as_u64().unwrap()).sum::<u64>()
    };
    until("two blue frames have failed, and others came after them", 40, || failed() >= 2);
    assert!(longest_gap_s(&line.messages("/detections")) < 4.0);
    let log = line.service.log();
    assert!(log.contains("a run hangs for 1."), "{log}");
    assert_eq!(line.service.stop().code(), Some(0));
}

/// On probation the model before is warm: the command takes effect between two frames.
#[test]
fn a_rollback_by_hand_takes_effect_at_the_next_frame() {
    let dir = tempfile::tempdir().unwrap();
    let factory = blobs("1", 0, Fault::None).write(dir.path(), "blobs.onnx");
    let url = "test://?width=320&height=320&fps=5";
    let mut line = Line::with(url, "", &factory, "probation_s = 60");
    line.push("new", &blobs("2", 0, Fault::None).bytes());
    line.reached("new", "probation");
    line.command("rollback", &json!({ "id": "back" }));
    let job = line.over("back");
    assert_eq!(job["state"], "SUCCEEDED", "{job}");
    let entered = job["entered"].as_array().unwrap();
    let phases: Vec<_> = entered.iter().map(|e| e[0].as_str().unwrap()).collect();
    assert_eq!(phases, ["switching", "committed"], "no session was built");
    until("both reports", 15, || line.messages("/models/swaps").len() == 2);
    let swap = line.messages("/models/swaps").pop().unwrap();
    let camera = &swap["cameras"]["line"];
    let (old, new) = (camera["last_old"].as_u64().unwrap(), camera["first_new"].as_u64().unwrap());
    assert_eq!(new, old + 1, "{swap}");
    let decided_us = entered[0][1].as_i64().unwrap() * 1000;
    let late = line
        .messages("/detections")
        .into_iter()
        .filter(|r| r["model"]["version"] == "2" && r["time_us"].as_i64().unwrap() > decided_us);
    let late = late.count();
    println!("{late} frames by the model that was rolled back came in after the command");
    assert!(late <= 1);
    // Nothing is in quarantine: it may come again.
    line.push("again", &blobs("2", 0, Fault::None).bytes());
    line.reached("again", "probation");
    line.until_record("records enough", 20, |r| r["frame"]["id"].as_u64() > Some(25));
    line.stop();
    line.assert_nothing_lost();
}

/// A model that is no longer in memory is read from the disk again, and only what was judged runs.
#[test]
fn a_rollback_to_a_blob_that_was_damaged_since_changes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let factory = blobs("1", 0, Fault::None).write(dir.path(), "blobs.onnx");
    let url = "test://?width=320&height=320&fps=5";
    let mut line = Line::with(url, "", &factory, "probation_s = 0");
    line.push("new", &blobs("2", 0, Fault::None).bytes());
    assert_eq!(line.over("new")["state"], "SUCCEEDED");
    let digest = Digest::of(&std::fs::read(&factory).unwrap());
    let blob = line.service.state_dir().join(format!("blobs/sha256-{digest}"));
    let mut bytes = std::fs::read(&blob).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    std::fs::remove_file(&blob).unwrap();
    std::fs::write(&blob, bytes).unwrap();
    line.command("rollback", &json!({ "id": "back" }));
    let job = line.over("back");
    assert_eq!(
        (&job["state"], &job["reason"]["code"]),
        (&json!("FAILED"), &json!("blob_corrupt")),
        "{job}"
    );
    line.until_record("goes on", 20, |r| r["frame"]["id"].as_u64() > Some(25));
    assert_eq!(line.messages("/detections").pop().unwrap()["model"]["version"], "2");
    line.stop();
    line.assert_nothing_lost();
}
