//! Envelopes, manifests and the policy that they are held against.

use base64::Engine as _;
use proptest::prelude::*;
use serde_json::{Value, json};

use noblink::update::job::{Install, Reason, Source, State};
use noblink::update::manifest::{Desired, Malformed, Manifest, identity, is_id, slug};
use noblink::update::policy::{Policy, Signed, admit};
use noblink::update::signature::{PublicKey, SignatureError, generate, sign};

use super::digest;

const NOW: i64 = 1_791_000_000_000; // 2026-10-03

fn manifest() -> Value {
    json!({"model": "plates", "version": "2", "sha256": digest("m").to_string(), "size": 3912064,
        "sequence": 17, "expires": "2026-10-12T00:00:00Z", "stage": "production",
        "devices": ["*"], "lineage": {"parent": "plates 1", "metrics": {"AP50": 0.94}}})
}

fn envelope(manifest: Value) -> Value {
    json!({"schema": "noblink.desired/1", "id": "2026-10-05-r17",
        "source": "https://models.example/plates-2.onnx", "install": "auto",
        "manifest": manifest})
}

fn changed(change: impl FnOnce(&mut Value)) -> Result<Manifest, Malformed> {
    let mut value = manifest();
    change(&mut value);
    Manifest::parse(value.to_string().as_bytes())
}

#[test]
fn the_contracts_example_is_read() {
    let text = envelope(manifest()).to_string();
    let desired = Desired::parse(text.as_bytes()).unwrap();
    assert_eq!(desired.id, "2026-10-05-r17");
    assert_eq!(desired.install, Install::Auto);
    assert_eq!(desired.source, Source::Url("https://models.example/plates-2.onnx".to_owned()));
    assert!(!desired.exact && desired.unknown.is_empty());
    let m = Manifest::parse(&desired.manifest).unwrap();
    assert_eq!((m.model.as_deref(), m.version.as_deref()), (Some("plates"), Some("2")));
    assert_eq!((m.sequence, m.size, m.sha256), (Some(17), Some(3912064), Some(digest("m"))));
    assert_eq!(m.lineage["metrics"]["AP50"], 0.94);
    assert!(m.unknown.is_empty());
}

#[test]
fn a_signed_manifest_is_its_exact_bytes() {
    let bytes = format!("  {}\n", manifest());
    let (key, secret) = generate(None).unwrap();
    let mut message = envelope(json!(base64::engine::general_purpose::STANDARD.encode(&bytes)));
    message["signature"] = json!(sign(&secret, None, bytes.as_bytes(), "t").unwrap());
    let desired = Desired::parse(message.to_string().as_bytes()).unwrap();
    assert!(desired.exact);
    assert_eq!(desired.manifest, bytes.as_bytes());
    let keys = [key];
    let signed = Signed::check(&keys, desired.signature.as_deref(), &desired.manifest);
    assert_eq!(signed, Signed::By(keys[0].id()));
    assert_eq!(Signed::check(&[], desired.signature.as_deref(), b"x"), Signed::Unchecked);
}

#[test]
fn overrides_are_read_and_unknown_fields_are_listed() {
    let m = changed(|v| {
        v["layout"] = json!("yolox");
        v["input"] = json!({"order": "bgr", "scale": "byte", "fit": "stretch", "mean": 3});
        v["labels"] = json!({"1": "car", "0": "person"});
        v["allow_removed_labels"] = json!(true);
        v["accept_slower"] = json!(2.5);
        v["requires"] = json!(["canary"]);
        v["rollout"] = json!({"percent": 5});
        v["note"] = json!(1);
        v["stage"] = Value::Null;
    })
    .unwrap();
    assert_eq!(m.labels, Some(vec!["person".to_owned(), "car".to_owned()]));
    assert_eq!(m.order.as_deref(), Some("bgr"));
    assert_eq!(m.accept_slower.unwrap().factor(), 2.5);
    assert_eq!(m.unknown, ["input.mean", "note", "rollout"]);
    assert_eq!(m.stage, None);
    assert!(m.allow_removed_labels && m.requires == ["canary"]);
}

#[test]
fn a_field_of_the_wrong_kind_is_named_with_its_value() {
    for (key, value) in [
        ("model", json!("Plates")),
        ("model", json!("../plates")),
        ("version", json!("")),
        ("version", json!("a\nb")),
        ("sha256", json!("abc")),
        ("size", json!(0)),
        ("size", json!(-1)),
        ("sequence", json!(9_007_199_254_740_992_u64)),
        ("sequence", json!(1.5)),
        ("expires", json!("tomorrow")),
        ("devices", json!("edge-1")),
        ("layout", json!("yolo9")),
        ("input", json!({"order": "grb"})),
        ("labels", json!([])),
        ("labels", json!({"0": "a", "2": "b"})),
        ("labels", json!({"0": "a", "00": "b"})),
        ("allow_removed_labels", json!("yes")),
        ("accept_slower", json!(0.5)),
        ("lineage", json!([])),
    ] {
        let e = changed(|v| v[key] = value.clone()).unwrap_err().to_string();
        assert!(e.contains(key) && e.contains("must be"), "{key}: {e}");
    }
    for (key, value) in [
        ("schema", json!("noblink.desired/2")),
        ("id", json!("A")),
        ("source", json!("ftp://x/y")),
        ("source", json!("file:///etc/passwd")),
        ("install", json!("now")),
        ("manifest", json!("not base64!")),
        ("manifest", json!([1])),
        ("signature", json!(1)),
    ] {
        let mut message = envelope(manifest());
        message[key] = value;
        let e = Desired::parse(message.to_string().as_bytes()).unwrap_err().to_string();
        assert!(e.contains(key), "{key}: {e}");
        message.as_object_mut().unwrap().remove(key);
        let missing = Desired::parse(message.to_string().as_bytes());
        let optional = ["install", "signature"].contains(&key);
        assert_eq!(missing.is_ok(), optional, "{key}: {missing:?}");
    }
}

#[test]
fn json_that_two_readers_may_understand_differently_is_refused() {
    let deep = format!("{{\"lineage\":{}{}}}", "[".repeat(40), "]".repeat(40));
    let long = format!("{{\"model\":\"{}\"}}", "x".repeat(200_000));
    let twice = r#"{"lineage":{"a":{"sha256":1,"sha256":2}}}"#;
    for (bytes, word) in [
        (twice.as_bytes(), "twice"),
        (br#"{"model":"a","model":"b"}"#, "twice"),
        (deep.as_bytes(), "deep"),
        (long.as_bytes(), "allowed"),
        (br#"{"model":"a"} x"#, "JSON"),
        (b"{\"model\":\"\xff\"}", "JSON"),
        (b"[]", "object"),
        (b"", "JSON"),
    ] {
        let e = Manifest::parse(bytes).unwrap_err().to_string();
        assert!(e.contains(word), "{e}");
    }
}

#[test]
fn identity_prefers_the_manifest_then_the_metadata_then_the_file() {
    let d = digest("m");
    let m = changed(|_| {}).unwrap();
    let of = |metadata, manifest| identity("Best (3)", &d, metadata, manifest);
    let short = d.short();
    assert_eq!(of((None, None), None), ("best--3".to_owned(), short.clone()));
    assert_eq!(of((Some("gate"), Some("7")), None), ("gate".to_owned(), "7".to_owned()));
    assert_eq!(of((Some("No Id"), Some("a\nb")), None), ("best--3".to_owned(), short));
    assert_eq!(of((Some("gate"), Some("7")), Some(&m)), ("plates".to_owned(), "2".to_owned()));
    for (stem, id) in [
        ("yolov8n", "yolov8n"),
        ("YOLO11s_640", "yolo11s_640"),
        ("--x--", "x"),
        ("Größe", "gr--e"),
        ("日本", "model"),
        ("", "model"),
        ("abcdefghijklmnopqrstuvwxyz0123456789", "abcdefghijklmnopqrstuvwxyz012345"),
    ] {
        assert_eq!(slug(stem), id);
        assert!(is_id(id));
    }
}

struct Case {
    keys: Vec<PublicKey>,
    stages: Option<Vec<String>>,
    signed: Signed,
    state: State,
    now: i64,
}

impl Case {
    fn open() -> Self {
        let state = State::default();
        Self { keys: vec![], stages: None, signed: Signed::No, state, now: NOW }
    }

    fn closed() -> Self {
        let (key, _) = generate(None).unwrap();
        let signed = Signed::By(key.id());
        Self { keys: vec![key], signed, ..Self::open() }
    }

    fn judge(&self, manifest: Option<&Manifest>) -> Result<(), Reason> {
        let policy = Policy {
            keys: &self.keys,
            accept_stages: self.stages.as_deref(),
            device: "edge-1",
            built: NOW - 1,
            size_max: 1 << 30,
        };
        admit(&policy, Ok(manifest), &self.signed, None, &self.state, self.now)
    }

    fn code(&self, change: impl FnOnce(&mut Value)) -> String {
        let m = changed(change).unwrap();
        self.judge(Some(&m)).map_or_else(|r| r.code.into_owned(), |()| "ok".to_owned())
    }
}

#[test]
fn each_refusal_has_its_code() {
    let none = |_: &mut Value| {};
    assert_eq!(Case::open().code(none), "ok");
    assert_eq!(Case::open().judge(None), Ok(()));
    assert_eq!(Case::closed().code(none), "ok");

    let mut c = Case::closed();
    c.signed = Signed::No;
    assert_eq!(c.code(none), "unsigned");
    assert_eq!(c.judge(None).unwrap_err().code, "unsigned");
    c.signed = Signed::Broken(SignatureError::WrongKey(7));
    assert_eq!(c.code(none), "wrong_key");
    c.signed = Signed::Broken(SignatureError::Bad(7));
    assert_eq!(c.code(none), "bad_signature");

    let c = Case::closed();
    for key in ["sha256", "size", "sequence", "expires", "devices", "stage"] {
        let code = c.code(|v| drop(v.as_object_mut().unwrap().remove(key)));
        assert_eq!(code, "incomplete_manifest", "{key}");
    }
    assert_eq!(c.code(|v| v["devices"] = json!(["edge-2", "gate-*"])), "wrong_device");
    assert_eq!(c.code(|v| v["devices"] = json!(["edge-2", "edge-*"])), "ok");
    assert_eq!(c.code(|v| v["devices"] = json!([])), "wrong_device");
    assert_eq!(c.code(|v| v["requires"] = json!(["canary"])), "requires_unknown");
    assert_eq!(c.code(|v| v["expires"] = json!("2026-10-01T00:00:00Z")), "expired");
    assert_eq!(c.code(|v| v["size"] = json!(1_u64 << 31)), "too_large");

    let mut c = Case::closed();
    c.now = 0;
    assert_eq!(c.code(none), "clock_unset");
    c.now = NOW + 20 * 86_400_000;
    assert_eq!(c.code(none), "expired");

    let mut c = Case::closed();
    c.stages = Some(vec!["production".to_owned()]);
    assert_eq!(c.code(none), "ok");
    assert_eq!(c.code(|v| v["stage"] = json!("test")), "stage_not_accepted");

    let mut c = Case::closed();
    c.state.highest_signed = Some(17);
    assert_eq!(c.code(none), "stale_sequence");
    c.state.highest_signed = Some(16);
    c.state.highest_unsigned = Some(900);
    assert_eq!(c.code(none), "ok", "an unsigned manifest used up no number");
    c.state.quarantine.insert(digest("m"), Reason::new("crash", "SIGSEGV"));
    assert_eq!(c.code(none), "quarantined");

    let mut c = Case::open();
    c.state.highest_signed = Some(17);
    assert_eq!(c.code(none), "stale_sequence", "also after the keys are gone");
    assert_eq!(c.code(|v| drop(v.as_object_mut().unwrap().remove("expires"))), "stale_sequence");
}

#[test]
fn a_message_names_the_thing_the_value_and_the_remedy() {
    let mut c = Case::closed();
    c.state.highest_signed = Some(21);
    let m = changed(|_| {}).unwrap();
    let text = c.judge(Some(&m)).unwrap_err().to_string();
    assert!(text.contains("17") && text.contains("21") && text.contains("publish"), "{text}");
    let policy =
        Policy { keys: &[], accept_stages: None, device: "edge-1", built: 0, size_max: 1 << 30 };
    let other = digest("other");
    let state = State::default();
    let e = admit(&policy, Ok(Some(&m)), &Signed::No, Some(&other), &state, NOW).unwrap_err();
    assert_eq!(e.code, "digest_mismatch");
    let wrong = Malformed("is nothing".to_owned());
    let e = admit(&policy, Err(&wrong), &Signed::No, None, &state, NOW).unwrap_err();
    assert_eq!(e.code, "bad_manifest");
}

proptest! {
    #[test]
    fn no_bytes_make_the_readers_panic(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
        let _ = Manifest::parse(&bytes);
        let _ = Desired::parse(&bytes);
    }

    #[test]
    fn no_json_makes_the_readers_panic(key in 0..20usize, text in "\\PC{0,40}", n in any::<i64>()) {
        let keys = ["schema", "id", "source", "install", "manifest", "signature", "model",
            "version", "sha256", "size", "sequence", "expires", "stage", "devices", "requires",
            "lineage", "layout", "input", "labels", "accept_slower"];
        for value in [json!(text), json!(n), json!([text, n]), json!({&text: n})] {
            let mut m = manifest();
            m[keys[key]] = value.clone();
            let _ = Manifest::parse(m.to_string().as_bytes());
            let mut e = envelope(m);
            e[keys[key]] = value;
            let _ = Desired::parse(e.to_string().as_bytes());
        }
    }

    #[test]
    fn every_stem_becomes_an_id(stem in "\\PC{0,60}") {
        prop_assert!(is_id(&slug(&stem)), "{stem:?} became {:?}", slug(&stem));
    }
}
