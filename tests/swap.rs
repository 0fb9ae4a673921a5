//! A new model without a blink, by the real program: inbox, MQTT, command line; the gates' word;
//! rollback; the report that proves that no frame was lost.

use std::collections::BTreeMap;
use std::path::Path;

use gst::prelude::*;
use noblink::rtsp::{self, RtspServer};
use serde_json::{Value, json};

use crate::harness::mosquitto::{Mosquitto, Subscriber, publish};
use crate::harness::onnx::{Detector, Fault, Output};
use crate::harness::schema::{assert_valid, validator};
use crate::harness::service::{Service, config, noblink_output, shipped};
use crate::harness::until;

/// A service with one camera of the demo's line, plates 1 as its factory model.
struct Line {
    service: Service,
    subscriber: Subscriber,
    broker: Mosquitto,
    _server: RtspServer,
}

impl Line {
    fn start(models: &str) -> Self {
        let broker = Mosquitto::start("");
        let subscriber = Subscriber::new("5", broker.port, "noblink/v1/test/#");
        let server = RtspServer::start(&rtsp::Settings::default()).unwrap();
        server.mount_clip("/a", &shipped("models/clips/line-a.mp4"), true).unwrap();
        let url = server.url("/a");
        let models = format!(
            "[models]\nfactory = \"{}\"\n{models}\n",
            shipped("models/plates-v1.onnx").display()
        );
        let mqtt = format!("url = \"mqtt://127.0.0.1:{}\"", broker.port);
        // Room for the hiccups of a busy machine: what is tested is the swap.
        let cameras = [("line", url.as_str(), "publish = \"all\"\nmax_fps = 10\nqueue = 32")];
        let service = Service::start(&config(&mqtt, &cameras, &models));
        let line = Self { service, subscriber, broker, _server: server };
        line.until_record("a record", 30, |r| r["model"]["version"] == "1");
        line
    }

    fn messages(&self, end: &str) -> Vec<Value> {
        let messages = self.subscriber.messages();
        let of = messages.iter().filter(|m| m.topic.contains(end));
        of.filter_map(|m| serde_json::from_str(&m.payload).ok()).collect()
    }

    fn until_record(&self, what: &str, seconds: u64, test: impl Fn(&Value) -> bool) {
        until(what, seconds, || self.messages("/detections").last().is_some_and(&test));
    }

    /// The job's last word.
    fn ended(&self, id: &str) -> Value {
        let mut last = Value::Null;
        until(&format!("the end of job {id}"), 60, || {
            let jobs = self.messages(&format!("/models/jobs/{id}"));
            last = jobs.last().cloned().unwrap_or_default();
            let state = last["state"].as_str().unwrap_or("QUEUED");
            !matches!(state, "QUEUED" | "IN_PROGRESS")
        });
        last
    }

    /// The job that a file in the inbox became.
    fn job_of(&self, file: &str) -> String {
        let mut id = String::new();
        until(&format!("a job for {file}"), 30, || {
            let jobs = self.messages("/models/jobs/");
            id = jobs
                .iter()
                .find(|j| j["from"] == file)
                .map_or_else(String::new, |j| j["id"].as_str().unwrap().to_owned());
            !id.is_empty()
        });
        id
    }

    fn put_in(&self, name: &str, bytes: &[u8]) {
        std::fs::write(self.inbox().join(name), bytes).unwrap();
    }

    fn inbox(&self) -> std::path::PathBuf {
        self.service.dir.path().join("state/inbox")
    }

    fn command(&self, verb: &str, body: &Value) {
        let topic = format!("noblink/v1/test/cmd/models/{verb}");
        publish(self.broker.port, &["-t", &topic, "-m", &body.to_string()]);
    }

    fn cli(&self, args: &[&str]) -> (Option<i32>, String) {
        let file = self.service.dir.path().join("noblink.toml");
        let args: Vec<&str> =
            args.iter().copied().chain(["--config", file.to_str().unwrap()]).collect();
        let output = noblink_output(&args);
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        (output.status.code(), said + &String::from_utf8_lossy(&output.stderr))
    }

    /// Everything that was said of models is as the schemas describe it.
    fn assert_described(&self) {
        for (part, schema) in [
            ("/models/state", "models"),
            ("/models/jobs/", "job"),
            ("/models/swaps", "swap"),
            ("/reply/", "reply"),
        ] {
            let schema = validator(schema);
            let messages = self.subscriber.messages();
            messages.iter().filter(|m| m.topic.contains(part)).for_each(|m| {
                assert_valid(&schema, m);
            });
        }
    }

    /// Every frame exactly once, epochs never going back.
    fn assert_nothing_lost(&self) {
        until("enough records", 20, || self.messages("/detections").len() > 20);
        let records = self.messages("/detections");
        let mut next = BTreeMap::<String, (u64, u64, u64)>::new();
        for record in &records {
            let camera = record["camera"].as_str().unwrap().to_owned();
            let n = |v: &Value| v.as_u64().unwrap();
            let (seq, frame, epoch) =
                (n(&record["seq"]), n(&record["frame"]["id"]), n(&record["model"]["epoch"]));
            if let Some((last_seq, last_frame, last_epoch)) = next.get(&camera) {
                assert_eq!(seq, last_seq + 1);
                assert_eq!(frame, last_frame + 1, "frames are contiguous over every swap");
                assert!(epoch >= *last_epoch);
            }
            assert_eq!(record["since"], json!({ "empty": 0, "failed": 0, "dropped": 0 }));
            next.insert(camera, (seq, frame, epoch));
        }
    }
}

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

/// A clip that is black for 6 s and blue for 1 s, over and over.
fn black_and_blue(dir: &Path) -> std::path::PathBuf {
    gst::init().unwrap();
    let path = dir.join("clip.mp4");
    let part = |name: &str, pattern: &str, frames: u32| {
        format!(
            "videotestsrc pattern={pattern} num-buffers={frames} ! \
             video/x-raw,format=I420,width=320,height=320,framerate=10/1 ! {name}. "
        )
    };
    let launch = format!(
        "concat name=all ! x264enc speed-preset=ultrafast bframes=0 key-int-max=10 ! h264parse ! \
         mp4mux ! filesink location={} {}{}",
        path.display(),
        part("all", "black", 60),
        part("all", "blue", 10)
    );
    let pipeline = gst::parse::launch(&launch).unwrap();
    pipeline.set_state(gst::State::Playing).unwrap();
    let ends = [gst::MessageType::Eos, gst::MessageType::Error];
    let end = pipeline.bus().unwrap().timed_pop_filtered(gst::ClockTime::from_seconds(30), &ends);
    pipeline.set_state(gst::State::Null).unwrap();
    assert!(matches!(end.unwrap().view(), gst::MessageView::Eos(_)));
    path
}

/// A service whose camera turns blue for a second every seven, and a next model that can't bear
/// that. It comes when the picture has just turned black again, so that no gate shows a blue one.
fn fails_live(fault: Fault) -> (Line, Value) {
    let dir = tempfile::tempdir().unwrap();
    let good = Detector::new(Output::Yolo8, 320, 320).with_metadata("noblink.version", "1");
    let factory = good.write(dir.path(), "blobs.onnx");
    let clip = black_and_blue(dir.path());
    let broker = Mosquitto::start("");
    let subscriber = Subscriber::new("5", broker.port, "noblink/v1/test/#");
    let mqtt = format!("url = \"mqtt://127.0.0.1:{}\"", broker.port);
    let models = format!("[models]\nfactory = \"{}\"\nprobation_s = 30\n", factory.display());
    let url = format!("file://{}", clip.display());
    let cameras = [("blink", url.as_str(), "publish = \"all\"\nloop = true\nqueue = 32")];
    let service = Service::start(&config(&mqtt, &cameras, &models));
    let server = RtspServer::start(&rtsp::Settings::default()).unwrap();
    let line = Line { service, subscriber, broker, _server: server };
    line.until_record("a record", 30, |r| r["model"]["version"] == "1");
    let mut bad = Detector::new(Output::Yolo8, 320, 320).with_metadata("noblink.version", "2");
    (bad.fault, bad.strikes_blue) = (fault, true);
    let blue = |r: &Value| !r["objects"].as_array().unwrap().is_empty();
    line.until_record("a blue picture", 15, blue);
    line.until_record("a black picture", 15, |r| !blue(r));
    line.put_in("next.onnx", &bad.bytes());
    let job = line.ended(&line.job_of("next.onnx"));
    (line, job)
}

#[test]
fn a_model_that_fails_on_probation_goes_back_and_its_frame_is_not_lost() {
    let (mut line, job) = fails_live(Fault::Nan);
    assert_eq!((&job["state"], &job["phase"]), (&json!("FAILED"), &json!("rolled_back")), "{job}");
    assert_eq!(job["reason"]["code"], "run_failed");
    line.until_record("records by the model before", 10, |r| r["model"]["version"] == "1");
    until("two reports", 15, || line.messages("/models/swaps").len() == 2);
    let versions: Vec<_> = line
        .messages("/detections")
        .iter()
        .map(|r| (r["model"]["version"].as_str().unwrap().to_owned(), r["model"]["epoch"].clone()))
        .collect();
    assert!(versions.iter().any(|(v, _)| v == "2"), "it was live for a while");
    // Once more by hand: it is not tried again.
    let file = shipped("models/plates-v1.onnx");
    let (code, _) = line.cli(&["model", "push", file.to_str().unwrap()]);
    assert_eq!(code, Some(1), "plates has other labels than the blobs");
    assert_eq!(line.service.stop().code(), Some(0));
    line.assert_nothing_lost();
}

#[test]
fn a_run_that_hangs_is_ended_and_the_cameras_are_served_again() {
    let (mut line, job) = fails_live(Fault::Hang);
    assert_eq!((&job["state"], &job["phase"]), (&json!("FAILED"), &json!("rolled_back")), "{job}");
    assert!(job["reason"]["message"].as_str().unwrap().contains("watchdog"), "{job}");
    line.until_record("records by the model before", 10, |r| r["model"]["version"] == "1");
    assert_eq!(line.service.stop().code(), Some(0));
    // A hang of a second is overload: what is dropped then is counted, and it is not much.
    let dropped = |r: &Value| r["since"]["dropped"].as_u64().unwrap();
    let lost: u64 = line.messages("/detections").iter().map(dropped).sum();
    assert!(lost <= 25, "{lost} frames of 10 a second were dropped");
}

/// Once a key is configured, a bare file is refused by every way, and a signed one goes in.
#[test]
fn with_a_key_only_signed_models_come_in() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let output = noblink_output(&["model", "keygen", &path("line.key")]);
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert_eq!(output.status.code(), Some(0), "{said}");
    let keys = said.lines().find(|l| l.starts_with("public_keys")).unwrap();
    let line = Line::start(&format!("probation_s = 0\n{keys}"));

    std::fs::write(path("plates-v2.onnx"), plates(2)).unwrap();
    let (code, said) = line.cli(&["model", "push", &path("plates-v2.onnx")]);
    assert_eq!(code, Some(1), "{said}");
    assert!(said.contains("(unsigned)"), "{said}");

    let sign = |sequence: &str| {
        let (model, key) = (path("plates-v2.onnx"), path("line.key"));
        let args = ["model", "sign", &model, "--key", &key, "--sequence", sequence];
        let output = noblink_output(&args);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    };
    sign("17");
    let (code, said) = line.cli(&["model", "push", &path("plates-v2.onnx")]);
    assert_eq!(code, Some(0), "{said}");
    line.until_record("records by plates 2", 10, |r| r["model"]["version"] == "2");

    // Somebody sends the same signed message again after a rollback: its sequence was seen.
    assert_eq!(line.cli(&["model", "rollback"]).0, Some(0));
    let (code, said) = line.cli(&["model", "push", &path("plates-v2.onnx")]);
    assert_eq!(code, Some(1), "{said}");
    assert!(said.contains("(stale_sequence)"), "{said}");
    line.assert_nothing_lost();
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
