//! Commands that come twice, late, out of order, from last week, or too fast.

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::broker::{long, model};
use crate::harness::http::Shelf;
use crate::harness::line::{Line, is_over, manifest};
use crate::harness::mosquitto::publish;
use crate::harness::onnx::{Detector, Fault};
use crate::harness::until;

struct Bench {
    line: Line,
    shelf: Shelf,
    _dir: tempfile::TempDir,
}

impl Bench {
    fn start(models: &str) -> Self {
        let (dir, shelf) = (tempfile::tempdir().unwrap(), Shelf::start());
        let factory = model("first").write(dir.path(), "blobs.onnx");
        let models = format!("{models}\n{}", shelf.allowed());
        let line = Line::with("test://?width=160&height=120&fps=10", "", &factory, &models);
        Self { line, shelf, _dir: dir }
    }

    /// Wants a model: fetched at once, or over two seconds.
    fn desire(&self, id: &str, detector: &Detector, slowly: bool, more: &Value) {
        let bytes = detector.bytes();
        let manifest = manifest(&bytes, more);
        let path = format!("/{}{id}.onnx", if slowly { "slow/" } else { "" });
        self.line.desire(id, &self.shelf.put(&path, bytes), &manifest);
    }

    /// How often a command with this id became a job.
    fn jobs(&self, id: &str) -> usize {
        let all = self.line.ask("models");
        all["jobs"].as_array().unwrap().iter().filter(|j| j["id"] == id).count()
    }

    /// Waits for one more answer to this id.
    fn answer(&self, id: &str, ask: impl FnOnce()) -> Value {
        let topic = format!("/reply/{id}");
        let before = self.line.messages(&topic).len();
        ask();
        until("an answer", 10, || self.line.messages(&topic).len() > before);
        self.line.messages(&topic).pop().unwrap()
    }

    fn again(&mut self) {
        self.line.stop();
        self.line.service.again(&[]);
        let boot = self.line.service.boot();
        self.line.until_record("the next life", 30, |r| r["boot"] == *boot);
    }

    fn active(&self) -> Value {
        self.line.state()["active"].clone()
    }
}

fn reason(job: &Value) -> (&str, &str) {
    (job["state"].as_str().unwrap(), job["reason"]["code"].as_str().unwrap_or(""))
}

/// F67 to F70.
#[test]
fn the_same_command_again_and_those_of_last_week_change_nothing() {
    let mut bench = Bench::start("probation_s = 0");
    let wanted = model("wanted");
    let first =
        bench.answer("d1", || bench.desire("d1", &wanted, true, &json!({ "sequence": 10 })));
    assert_eq!(first["result"], "accepted", "{first}");
    let same = bench.answer("d1", || bench.desire("d1", &wanted, true, &json!({ "sequence": 10 })));
    assert_eq!(same["result"], "same", "{same}");
    assert_eq!(bench.line.over("d1")["state"], "SUCCEEDED");
    let active = bench.active();
    assert_eq!(active["version"], "wanted");
    let again = || bench.desire("d1", &wanted, true, &json!({ "sequence": 10 }));
    let ended = bench.answer("d1", again);
    assert_eq!((&ended["result"], &ended["state"]), (&json!("ended"), &json!("SUCCEEDED")));

    // Retained: a verb that would go back with every start, and what was wanted last week.
    let port = bench.line.broker.port;
    let retain = |verb: &str, body: &Value| {
        let topic = format!("noblink/v1/test/cmd/models/{verb}");
        publish(port, &["-r", "-t", &topic, "-m", &body.to_string()]);
    };
    retain("rollback", &json!({ "id": "every-time" }));
    let old = manifest(&model("old").bytes(), &json!({ "expires": "2026-11-01T00:00:00Z" }));
    let desired = |id: &str, manifest: &Value| json!({ "schema": "noblink.desired/1", "id": id, "source": "mqtt", "manifest": manifest });
    retain("desired", &desired("last-week", &old));
    assert_eq!(reason(&bench.line.over("last-week")), ("REJECTED", "expired"));
    // The verb did go back once, as it came in live.
    assert_eq!(bench.line.over("every-time")["state"], "SUCCEEDED");
    bench.line.order("rollback", &json!({ "id": "forth", "to": active["sha256"] }));
    assert_eq!(bench.line.over("forth")["state"], "SUCCEEDED");
    let active = bench.active();
    assert_eq!(active["version"], "wanted");
    for life in 2..4 {
        bench.again();
        bench.line.service.says("cmd/models/rollback: a retained command is ignored", 10);
        let told = bench.line.messages("/models/jobs/forth").pop().unwrap();
        assert_eq!(told["state"], "SUCCEEDED", "life {life} tells how the last job ended");
        let ended = bench.answer("last-week", || {
            retain("desired", &desired("last-week", &old));
        });
        assert_eq!(ended["state"], "REJECTED", "{ended}");
        let ended = bench.answer("d1", || {
            bench.desire("d1", &wanted, true, &json!({ "sequence": 10 }));
        });
        assert_eq!((&ended["result"], &ended["state"]), (&json!("ended"), &json!("SUCCEEDED")));
        assert_eq!(bench.active(), active, "life {life}");
        for id in ["d1", "last-week", "every-time", "forth"] {
            assert_eq!(bench.jobs(id), 1, "{id} in life {life}");
        }
    }
    // Its id forgotten, and its hour not over: the sequence tells.
    let stale = manifest(&model("old").bytes(), &json!({ "sequence": 9 }));
    retain("desired", &desired("older", &stale));
    until("it came in", 10, || !bench.line.job("older").is_null());
    assert_eq!(reason(&bench.line.over("older")), ("REJECTED", "stale_sequence"));

    // Three refusals have opened the breaker, whatever they were for.
    let closed = bench.line.order("close-breaker", &json!({ "id": "close", "way": "mqtt" }));
    assert_eq!(closed["ok"], true, "{closed}");

    // Out of order.
    bench.desire("n12", &model("twelve"), true, &json!({ "sequence": 12 }));
    bench.line.reached("n12", "receiving");
    let eleven = bench.answer("n11", || {
        bench.desire("n11", &model("eleven"), false, &json!({ "sequence": 11 }));
    });
    assert_eq!(eleven["reason"]["code"], "stale_sequence", "{eleven}");
    bench.desire("n13", &model("thirteen"), false, &json!({ "sequence": 13 }));
    until("13 came in", 10, || !bench.line.job("n13").is_null());
    assert_eq!(bench.line.over("n13")["state"], "SUCCEEDED");
    assert_eq!(reason(&bench.line.over("n12")), ("CANCELED", "superseded"));
    assert_eq!(bench.active()["version"], "thirteen");
    bench.line.stop();
    bench.line.assert_nothing_lost();
    bench.line.assert_described();
}

/// F81.
#[test]
fn a_cancel_is_heard_in_each_phase_before_the_swap_and_too_late_behind_it() {
    let bench = Bench::start("probation_s = 3");
    let line = &bench.line;
    let before = bench.active();
    let cancel = |job: &str| line.order("cancel", &json!({ "id": "c", "job": job }));
    let canceled = |id: &str, phase: &str| {
        line.reached(id, phase);
        let answer = cancel(id);
        let job = line.over(id);
        assert_eq!(answer["ok"], true, "{answer}\n{job:#}");
        assert_eq!(reason(&job), ("CANCELED", "cancel_requested"), "{job:#}");
        assert_eq!(bench.active(), before);
        let again = cancel(id);
        assert_eq!((&again["result"], &again["state"]), (&json!("ended"), &json!("CANCELED")));
        println!("cancelled while {}", job["phase"]);
        job["phase"] == phase
    };
    bench.desire("slow", &model("slow"), true, &json!({}));
    assert!(canceled("slow", "receiving"));
    let hang = Detector { fault: Fault::Hang, ..model("hang") };
    bench.desire("hang", &hang, false, &json!({}));
    assert!(canceled("hang", "proving"));
    let waits = model("waits").bytes();
    let wish = json!({ "schema": "noblink.desired/1", "id": "waits", "install": "manual",
        "source": bench.shelf.put("/waits.onnx", waits.clone()),
        "manifest": manifest(&waits, &json!({})) });
    line.command("desired", &wish);
    assert!(canceled("waits", "awaiting_confirm"));
    for phase in ["verifying", "loading"] {
        let met = (0..4).any(|n| {
            let id = format!("{phase}-{n}");
            bench.desire(&id, &long(&id), false, &json!({}));
            canceled(&id, phase)
        });
        assert!(met, "no job was met while {phase}");
    }
    bench.desire("live", &model("live"), false, &json!({}));
    line.reached("live", "probation");
    assert_eq!(cancel("live")["reason"]["code"], "too_late");
    assert_eq!(line.over("live")["state"], "SUCCEEDED");
    let after = cancel("live");
    assert_eq!((&after["result"], &after["state"]), (&json!("ended"), &json!("SUCCEEDED")));
    assert_eq!(cancel("never")["reason"]["code"], "unknown_job");
    let left = std::fs::read_dir(line.service.state_dir().join("staging")).unwrap();
    assert_eq!(left.count(), 0);
}

/// F82, then F71: two senders who want different models all the time.
#[test]
fn a_rollback_ends_a_download_and_desires_that_flap_wear_nothing_out() {
    let mut bench = Bench::start("probation_s = 2");
    let line = &bench.line;
    bench.desire("a", &model("a"), false, &json!({}));
    until("it came in", 10, || !line.job("a").is_null());
    assert_eq!(line.over("a")["state"], "SUCCEEDED");
    bench.desire("b", &model("b"), true, &json!({}));
    line.reached("b", "receiving");
    for verb in 0..2 {
        let answer = bench.answer("back", || line.command("rollback", &json!({ "id": "back" })));
        assert!(answer["reason"].is_null(), "the verb, time {verb}: {answer}");
    }
    assert_eq!(line.over("back")["state"], "SUCCEEDED");
    assert_eq!(reason(&line.over("b")), ("CANCELED", "rollback_requested"));
    assert_eq!((bench.jobs("back"), &bench.active()["version"]), (1, &json!("first")));

    let epoch = || bench.active()["epoch"].as_u64().unwrap();
    let (began, first) = (Instant::now(), epoch());
    let mut last = String::new();
    let mut blobs = 0;
    for n in 0..16 {
        last = format!("flap-{n}");
        let name = if n % 2 == 0 { "b" } else { "a" };
        bench.desire(&last, &model(name), false, &json!({}));
        std::thread::sleep(Duration::from_millis(400));
        let files = std::fs::read_dir(line.service.state_dir().join("blobs")).unwrap();
        blobs = blobs.max(files.count());
    }
    until("the last one came in", 10, || !line.job(&last).is_null());
    assert_eq!(line.over(&last)["state"], "SUCCEEDED");
    let (swaps, took) = (epoch() - first, began.elapsed().as_secs_f64());
    println!("16 desires in {took:.1} s, {swaps} swaps, {blobs} blobs at most");
    assert!(swaps as f64 <= took / 2.0 + 1.0, "one a probation: {swaps} in {took} s");
    assert!(blobs <= 4, "{blobs} blobs");
    assert_eq!(bench.active()["version"], "a", "the newest wins");
    assert!((0..16).all(|n| is_over(&line.job(&format!("flap-{n}")))));
    bench.line.stop();
    bench.line.assert_nothing_lost();
}
