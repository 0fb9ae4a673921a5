//! Whatever is wrong with a model, its job ends with the reason's own code, the running model is
//! not touched, and no frame is lost to it.

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use noblink::update::digest::Digest;
use noblink::update::gates::GATES;
use serde_json::{Value, json};

use crate::harness::http::Shelf;
use crate::harness::line::{Line, manifest};
use crate::harness::onnx::{Detector, Fault, Graph, model};
use crate::harness::service::{noblink_output, shipped};
use crate::harness::site::{Site, good};
use crate::harness::until;
use crate::model::{fixed, names, output, shell};

/// By what a bad model comes.
enum Way {
    Inbox,
    /// The control socket, as `noblink model push` uses it.
    Push,
    /// `cmd/models/desired` with this in its manifest, fetched by HTTP.
    Desired(Value),
}

use Way::{Desired, Inbox, Push};

/// A bad model: what it is, its bytes, the way it comes, the code of its refusal.
type Row = (&'static str, Vec<u8>, Way, &'static str);

/// The good one with a change, and a version of its own.
fn changed(name: &str, change: impl Fn(&mut Detector)) -> Vec<u8> {
    let mut detector = good().with_metadata("noblink.version", &name.replace(' ', "-"));
    change(&mut detector);
    detector.bytes()
}

/// The good one with something more in its graph.
fn grown(change: impl Fn(&mut Graph)) -> Vec<u8> {
    let mut graph = good().graph();
    change(&mut graph);
    model(&graph, &good().metadata())
}

/// Refused for their bytes alone, or for what their command says.
fn unfit() -> Vec<Row> {
    let whole = good().bytes();
    let n80 = names(80);
    let labelled: &[(&str, &str)] = &[("names", &n80)];
    let external = |location: &'static str| grown(|g| g.external("w", &[4], location));
    let next = |name: &str| changed(name, |_| {});
    // As long as the one that is named, and another.
    let other = |name: &str| next(&name.replace('a', "b"));
    vec![
        ("truncated", whole[..whole.len() / 2].to_vec(), Inbox, "not_onnx"),
        ("a web page", b"<!DOCTYPE html><html>login</html>".to_vec(), Inbox, "not_onnx"),
        ("external data, plain", external("weights.bin"), Inbox, "external_data"),
        ("external data, ..", external("../../etc/passwd"), Push, "external_data"),
        ("external data, a link", external("link.bin"), Inbox, "external_data"),
        (
            "custom op",
            grown(|g| drop(g.node("evil/Op", &["images"], &[]))),
            Push,
            "custom_operators",
        ),
        (
            "EPContext",
            grown(|g| drop(g.node("com.microsoft/EPContext", &["images"], &[]))),
            Inbox,
            "compiled_blob",
        ),
        (
            "wrong rank",
            shell(&fixed(&[1, 512]), &[("output0", &fixed(&[1, 84, 8400]))], labelled),
            Push,
            "input_shape",
        ),
        ("unknown layout", output(&[1, 77, 99], labelled), Inbox, "unknown_layout"),
        (
            "no labels",
            changed("no labels", |d| d.metadata.push(("names", String::new()))),
            Push,
            "labels_missing",
        ),
        ("a label removed", changed("removed", |d| d.labels.truncate(2)), Inbox, "label_removed"),
        (
            "wrong hash",
            other("wrong hash"),
            Desired(manifest(&next("wrong hash"), &json!({ "sequence": 12 }))),
            "digest_mismatch",
        ),
        (
            "wrong size",
            next("wrong size"),
            Desired(manifest(
                &next("wrong size"),
                &json!({ "size": next("wrong size").len() + 9 }),
            )),
            "size_mismatch",
        ),
        (
            "stale sequence",
            next("stale"),
            Desired(manifest(&next("stale"), &json!({ "sequence": 11 }))),
            "stale_sequence",
        ),
        (
            "expired",
            next("expired"),
            Desired(manifest(&next("expired"), &json!({ "expires": "2026-03-01T00:00:00Z" }))),
            "expired",
        ),
        (
            "stage test",
            next("stage"),
            Desired(manifest(&next("stage"), &json!({ "stage": "test" }))),
            "stage_not_accepted",
        ),
        (
            "another device",
            next("device"),
            Desired(manifest(&next("device"), &json!({ "devices": ["edge-*"] }))),
            "wrong_device",
        ),
    ]
}

/// Refused for what they do, by the proving child.
fn misbehaving() -> Vec<Row> {
    let hang = || changed("hang", |d| d.fault = Fault::Hang);
    vec![
        ("NaN output", changed("nan", |d| d.fault = Fault::Nan), Inbox, "nan_output"),
        ("an error", changed("error", |d| d.fault = Fault::Error), Push, "run"),
        (
            "constant output",
            changed("constant", |d| d.fault = Fault::Constant),
            Inbox,
            "constant_output",
        ),
        ("blind", changed("blind", |d| d.bias = -20.0), Push, "no_detections"),
        ("recall below", changed("recall", |d| d.blind_to = Some(2)), Inbox, "recall_below_active"),
        ("2 pixels off", changed("shift", |d| d.shift = 2.0), Push, "box_shift"),
        ("3 times slower", changed("slow", |d| d.work = 24), Inbox, "too_slow"),
        ("endless loop", hang(), Push, "timeout"),
        ("in quarantine", hang(), Inbox, "quarantined"),
        ("10 GB", changed("memory", |d| d.fault = Fault::Memory), Push, "memory_budget"),
    ]
}

/// A service with a camera and calibration pictures, and a server for what it is to fetch.
struct Bench {
    line: Line,
    shelf: Shelf,
    rows: usize,
    _site: Site,
}

impl Bench {
    fn start() -> Self {
        let site = Site::new();
        let shelf = Shelf::start();
        let models = format!(
            "accept_stages = [\"production\"]\nproving_cpu_s = 5\n\
             {}[models.calibration]\ndir = \"{}\"\n",
            shelf.allowed(),
            site.dir.path().display()
        );
        let url = "test://?width=320&height=240&fps=10";
        let line = Line::with(url, "", &site.active, &models);
        // Where ONNX Runtime would look for the data of a model in the store.
        let link = line.service.state_dir().join("blobs/link.bin");
        std::os::unix::fs::symlink("/etc/passwd", link).unwrap();
        Self { line, shelf, rows: 0, _site: site }
    }

    /// Sends a model and returns its job's id.
    fn send(&mut self, bytes: Vec<u8>, way: &Way) -> String {
        self.rows += 1;
        let id = format!("row-{}", self.rows);
        match way {
            Inbox => {
                let file = format!("{id}.onnx");
                self.line.put_in(&file, &bytes);
                return self.line.job_of(&file);
            }
            Push => drop(self.line.push(&id, &bytes)),
            Desired(manifest) => {
                let source = self.shelf.put(&format!("/{id}.onnx"), bytes);
                self.line.desire(&id, &source, manifest);
                until("the command came in", 10, || !self.line.job(&id).is_null());
            }
        }
        id
    }

    /// Its job ends REJECTED with this code, and what runs is what ran.
    fn refused(&mut self, (name, bytes, way, code): Row) -> Value {
        let before = self.line.state()["active"].clone();
        let id = self.send(bytes, &way);
        self.judged(&id, name, code, &before)
    }

    fn judged(&self, id: &str, name: &str, code: &str, before: &Value) -> Value {
        let job = self.line.over(id);
        assert_eq!(job["state"], "REJECTED", "{name}: {job:#}");
        assert_eq!(job["reason"]["code"], code, "{name}: {job:#}");
        assert_eq!(self.line.state()["active"], *before, "{name}");
        let took = job["changed"].as_i64().unwrap() - job["created"].as_i64().unwrap();
        println!("{name:<22} {code:<20} {took:>6} ms  {}", job["reason"]["message"]);
        job
    }

    fn close_breakers(&self) {
        for way in ["inbox", "cli", "mqtt"] {
            let closed = self.line.order("close-breaker", &json!({ "id": "close", "way": way }));
            assert_eq!(closed["ok"], true, "{closed}");
        }
    }

    /// The child in which the model works on its endless loop.
    fn child(&self) -> Pid {
        let service = self.line.service.pid();
        let mut child = None;
        until("a child works", 30, || {
            let tasks = std::fs::read_dir(format!("/proc/{service}/task")).unwrap();
            let children = tasks
                .flatten()
                .filter_map(|task| std::fs::read_to_string(task.path().join("children")).ok());
            let children: String = children.collect();
            child = children.split_whitespace().next().and_then(|pid| pid.parse().ok());
            child.is_some_and(|pid: i32| {
                let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
                // User time in hundredths of a second: more than a load takes.
                let time = stat.rsplit(')').next().and_then(|s| s.split_whitespace().nth(11));
                time.and_then(|t| t.parse::<u32>().ok()).is_some_and(|t| t > 100)
            })
        });
        Pid::from_raw(child.expect("it was found"))
    }
}

#[test]
fn every_bad_model_is_refused_for_its_own_reason_and_nothing_else_happens() {
    let mut bench = Bench::start();
    for row in unfit() {
        bench.refused(row);
        bench.close_breakers();
    }
    for row in misbehaving() {
        let (name, proved) = (row.0, row.3 != "quarantined");
        let job = bench.refused(row);
        let gates = job["gates"].as_array().unwrap();
        let said: Vec<_> = gates.iter().map(|g| g["gate"].as_str().unwrap()).collect();
        let all: Vec<_> = ["identity"].into_iter().chain(GATES).collect();
        assert!(!proved || said == all, "{name}: {said:?}");
        bench.close_breakers();
    }

    // ONNX Runtime crashes. Rust's handler for stack overflows lets the first SIGSEGV pass that no
    // fault caused; a second one ends the child.
    let before = bench.line.state()["active"].clone();
    let id = bench.send(changed("crash", |d| d.fault = Fault::Hang), &Push);
    let child = bench.child();
    until("the child is gone", 10, || {
        // A zombie has no memory, and a pid that is taken again is not this service's child.
        let alive = std::fs::read_to_string(format!("/proc/{child}/statm"));
        let alive = alive.is_ok_and(|pages| !pages.starts_with('0'));
        !alive || kill(child, Signal::SIGSEGV).is_err()
    });
    let job = bench.judged(&id, "segfault", "runtime_crash", &before);
    assert!(job["reason"]["message"].as_str().unwrap().contains("SIGSEGV"), "{job:#}");
    bench.close_breakers();

    // The breaker: the fourth bad one in a row is refused for its own reason, and a good one behind
    // it no longer goes live by itself.
    for row in ["one", "two", "three", "four"] {
        let open = bench.line.state()["breaker"]["cli"].clone();
        assert_eq!(open, row == "four", "before number {row}");
        bench.refused((row, format!("<html>{row}</html>").into_bytes(), Push, "not_onnx"));
    }
    let id = bench.send(changed("the fifth", |_| {}), &Push);
    bench.line.reached(&id, "awaiting_confirm");
    assert_eq!(bench.line.job(&id)["ask"]["code"], "breaker_open");
    assert_eq!(bench.line.state()["active"], before);
    let canceled = bench.line.order("cancel", &json!({ "id": "no", "job": id }));
    assert_eq!(canceled["ok"], true, "{canceled}");
    assert_eq!(bench.line.over(&id)["state"], "CANCELED");
    bench.close_breakers();

    // I6 to I8: nothing is left of all that, and the next good one goes live.
    let id = bench.send(changed("good", |_| {}), &Inbox);
    bench.line.reached(&id, "probation");
    let state = bench.line.state();
    assert_eq!(state["previous"]["sha256"], before["sha256"], "{state}");
    bench.line.until_record("records by it", 10, |r| r["model"]["version"] == "good");
    let left = |part: &str| {
        let entries = std::fs::read_dir(bench.line.service.state_dir().join(part)).unwrap();
        let names = entries.map(|e| e.unwrap().file_name().into_string().unwrap());
        names.filter(|name| name != "link.bin").collect::<Vec<_>>()
    };
    assert!(left("staging").is_empty(), "{:?}", left("staging"));
    assert_eq!(left("blobs").len(), 2, "{:?} in {state}", left("blobs"));
    bench.line.stop();
    let frames = bench.line.assert_nothing_lost();
    bench.line.assert_described();
    println!("{} commands, {frames} frames, none lost", bench.rows);
}

/// Once a key is configured, an install needs a signature that holds, by every way in.
#[test]
fn with_a_key_only_signed_models_come_in() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let run = |args: &[&str]| {
        let output = noblink_output(args);
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(output.status.success(), "{said}{}", String::from_utf8_lossy(&output.stderr));
        said
    };
    let said = run(&["model", "keygen", &path("line.key")]);
    let keys = said.lines().find(|l| l.starts_with("public_keys")).unwrap();
    run(&["model", "keygen", &path("other.key")]);
    let line = Line::start(&format!("probation_s = 0\n{keys}"));
    let (model, beside) = (path("plates-v2.onnx"), path("plates-v2.manifest.json"));
    std::fs::copy(shipped("models/plates-v2.onnx"), &model).unwrap();
    let sign = |key: &str, sequence: &str| {
        run(&["model", "sign", &model, "--key", &path(key), "--sequence", sequence]);
    };
    let edit = |file: &str, from: &str, to: &str| {
        let text = std::fs::read_to_string(file).unwrap();
        assert!(text.contains(from), "{from} in {text}");
        std::fs::write(file, text.replacen(from, to, 1)).unwrap();
    };
    let before = line.state()["active"].clone();
    let refused = |what: &str, code: &str| {
        let (exit, said) = line.cli(&["model", "push", &model]);
        assert_eq!(exit, Some(1), "{what}: {said}");
        assert!(said.contains(&format!("({code})")), "{what}: {said}");
        assert_eq!(line.state()["active"], before, "{what}");
        println!("{what:<22} {said}");
    };
    refused("unsigned", "unsigned");
    sign("other.key", "17");
    refused("wrong key", "wrong_key");
    sign("line.key", "17");
    edit(&beside, "\"sequence\": 17", "\"sequence\": 18");
    refused("tampered manifest", "bad_signature");
    sign("line.key", "17");
    let signature = std::fs::read_to_string(format!("{beside}.minisig")).unwrap();
    // A character in the middle of the signature's own line.
    let drawn = signature.lines().nth(1).unwrap()[40..44].to_owned();
    let other = if drawn.starts_with('A') { "BBBB" } else { "AAAA" };
    edit(&format!("{beside}.minisig"), &drawn, other);
    refused("tampered signature", "bad_signature");
    let bare = json!({ "sha256": Digest::of(&std::fs::read(&model).unwrap()), "size": 9 });
    line.command(
        "desired",
        &json!({ "schema": "noblink.desired/1", "id": "bare", "source": "mqtt", "manifest": bare }),
    );
    assert_eq!(line.over("bare")["reason"]["code"], "unsigned");
    assert_eq!(line.state()["active"], before);

    let closed = line.order("close-breaker", &json!({ "id": "close", "way": "cli" }));
    assert_eq!(closed["ok"], true, "{closed}");
    sign("line.key", "17");
    let (code, said) = line.cli(&["model", "push", &model]);
    assert_eq!(code, Some(0), "{said}");
    line.until_record("records by plates 2", 10, |r| r["model"]["version"] == "2");

    // Somebody sends the same signed message again after a rollback: its sequence was seen.
    assert_eq!(line.cli(&["model", "rollback"]).0, Some(0));
    let (code, said) = line.cli(&["model", "push", &model]);
    assert_eq!(code, Some(1), "{said}");
    assert!(said.contains("(stale_sequence)"), "{said}");
    line.assert_nothing_lost();
}
