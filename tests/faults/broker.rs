//! The broker goes away and comes back in each phase of an update: the job ends as it would have,
//! and its end is told when somebody listens again.

use serde_json::json;

use crate::harness::http::Shelf;
use crate::harness::line::{Line, manifest};
use crate::harness::mosquitto::{Mosquitto, Subscriber};
use crate::harness::onnx::{Detector, Fault, Output};
use crate::harness::until;
use crate::harness::wire::Wire;

pub(super) fn model(version: &str) -> Detector {
    Detector::new(Output::Yolo8, 64, 64).with_metadata("noblink.version", version)
}

/// Forty megabytes: verified and loaded slowly enough to be met at it.
pub(super) fn long(version: &str) -> Detector {
    Detector { ballast: 10_000_000, ..model(version) }
}

/// Milliseconds since 1970.
fn now_ms() -> i64 {
    noblink::app::now_us() / 1000
}

struct Away {
    line: Line,
    wire: Wire,
    shelf: Shelf,
}

impl Away {
    /// The broker goes in this phase of a model's job and comes back when that has ended as it
    /// should. False: the job was faster than we.
    fn during(&mut self, id: &str, phase: &str, path: &str, bytes: Vec<u8>, end: &str) -> bool {
        let line = &mut self.line;
        let manifest = manifest(&bytes, &json!({}));
        line.desire(id, &self.shelf.put(path, bytes), &manifest);
        line.reached(id, phase);
        line.broker.kill();
        let gone = now_ms();
        let job = line.over(id);
        assert_eq!(job["state"], end, "{job:#}");
        let entered = job["entered"].as_array().unwrap();
        let at = entered.iter().position(|e| e[0] == phase).expect("it was there");
        let left = entered.get(at + 1).map_or(&job["changed"], |e| &e[1]);
        let met = left.as_i64().unwrap() >= gone;

        // Nobody is served before the subscriber is.
        self.wire.freeze(true);
        line.broker.restart();
        line.subscriber = Subscriber::new("5", line.broker.port, "noblink/v1/test/#");
        self.wire.freeze(false);
        let told = line.ended(id);
        for part in ["serial", "state", "reason", "gates"] {
            assert_eq!(told[part], job[part], "{part}");
        }
        until("models/state is told again", 10, || {
            let state = line.messages("/models/state").pop();
            state.is_some_and(|s| s["job"].is_null() && s["active"] == line.state()["active"])
        });
        line.assert_nothing_lost();
        // The link takes a broker that closes three times in a minute for a contest over its id.
        line.stop();
        line.service.again(&[]);
        let boot = line.service.boot();
        line.until_record("the next life", 30, |r| r["boot"] == *boot);
        println!("away while {phase}: {end}, {}", if met { "told later" } else { "too late" });
        met
    }
}

#[test]
fn a_broker_that_is_away_in_any_phase_delays_only_the_news() {
    let (broker, shelf) = (Mosquitto::start(""), Shelf::start());
    let wire = Wire::to(broker.port);
    let dir = tempfile::tempdir().unwrap();
    let factory = model("first").write(dir.path(), "blobs.onnx");
    let url = "test://?width=160&height=120&fps=30";
    let models = format!("probation_s = 1\n{}", shelf.allowed());
    let line = Line::through(broker, wire.port, &[], url, "", &factory, &models);
    let mut away = Away { line, wire, shelf };

    let slow = model("received").bytes();
    assert!(away.during("receiving", "receiving", "/slow/received.onnx", slow, "SUCCEEDED"));
    let quick = model("proved").bytes();
    assert!(away.during("proving", "proving", "/proved.onnx", quick, "SUCCEEDED"));
    let bad = Detector { fault: Fault::Nan, ..model("refused") }.bytes();
    assert!(away.during("refused", "receiving", "/slow/refused.onnx", bad, "REJECTED"));
    let live = model("live").bytes();
    assert!(away.during("probation", "probation", "/live.onnx", live, "SUCCEEDED"));
    for phase in ["verifying", "loading"] {
        let met = (0..4).any(|n| {
            let (id, path) = (format!("{phase}-{n}"), format!("/{phase}-{n}.onnx"));
            away.during(&id, phase, &path, long(&id).bytes(), "SUCCEEDED")
        });
        assert!(met, "no job was met while {phase}");
    }
}
