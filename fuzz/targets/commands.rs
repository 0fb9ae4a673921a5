//! Commands: what comes on `cmd/models/…`, and over the control socket. The first line says which.
//!
//! `desired`, `rollback`, … a payload · `local VERB` a body · `push QUERY` two headers, one a line ·
//! `manifest` a manifest.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use noblink::control::pushed::Pushed;
use noblink::mqtt::topics::Topics;
use noblink::update::job::{Source, State};
use noblink::update::manifest::{Desired, Manifest, SEQUENCE_MAX, is_id};
use noblink::update::orders::{self, Order};
use noblink::update::policy::{Policy, Signed, admit};
use serde_json::{Map, Value, json};

use super::{first_line, one_line, sentence};

pub fn check(data: &[u8]) {
    let Some((head, body)) = first_line(data) else { return };
    match head.split_once(' ') {
        None if head == "manifest" => manifest(body),
        Some(("local", verb)) => match orders::local(verb, body) {
            Ok(order) => ordered(&order),
            Err(why) => sentence(&why),
        },
        Some(("push", query)) => pushed(query, body),
        _ => remote(head, body),
    }
}

fn remote(verb: &str, payload: &[u8]) {
    let topics = Topics::new("noblink", "edge-1");
    let topic = format!("{}/cmd/models/{verb}", topics.root());
    for retained in [false, true] {
        match orders::read(&topics, &topic, payload, retained) {
            Some(Ok(order)) => {
                assert!(!retained || verb == "desired", "a retained {verb} is obeyed");
                ordered(&order);
            }
            Some(Err(why)) => sentence(&why),
            None => assert!(verb == "desired" && payload.is_empty()),
        }
    }
}

fn ordered(order: &Order) {
    match order {
        Order::Desired(payload) => desired(payload),
        Order::Rollback { id, to: named }
        | Order::Cancel { id, job: named }
        | Order::Confirm { id, job: named } => {
            assert!(is_id(id));
            assert!(named.as_ref().is_none_or(|n| (1..=64).contains(&n.len())));
        }
        Order::CloseBreaker { id, .. } | Order::Release { id, .. } => assert!(is_id(id)),
        Order::Stored { .. } => unreachable!("no body is a stored file"),
    }
}

fn desired(payload: &[u8]) {
    let wish = match Desired::parse(payload) {
        Ok(wish) => wish,
        Err(why) => return sentence(&why.to_string()),
    };
    assert!(is_id(&wish.id));
    assert!(wish.unknown.len() <= 32, "{} lines in the log", wish.unknown.len());
    wish.unknown.iter().for_each(|field| one_line(field));
    let source = match &wish.source {
        Source::Url(url) => {
            let parsed = url::Url::parse(url).expect("it was a URL");
            assert!(matches!(parsed.scheme(), "http" | "https") && parsed.host_str().is_some());
            url
        }
        Source::Mqtt => "mqtt",
        Source::Store => unreachable!("the store is no source from outside"),
    };
    let mut printed = json!({
        "schema": "noblink.desired/1", "id": wish.id, "source": source, "install": wish.install,
        "manifest": STANDARD.encode(&wish.manifest), "signature": wish.signature,
    });
    let again = Desired::parse(printed.to_string().as_bytes());
    let same = Desired { exact: true, unknown: Vec::new(), ..wish.clone() };
    // What came as an object may be longer as base64.
    if printed.to_string().len() <= noblink::update::manifest::BYTES_MAX {
        assert_eq!(again.as_ref(), Ok(&same));
    }
    // Two readers may see two things in a key that stands twice.
    let text = printed.to_string();
    printed["id"] = Value::Null;
    assert!(Desired::parse(text.replacen('{', r#"{"id":null,"#, 1).as_bytes()).is_err());
    manifest(&wish.manifest);
}

fn manifest(bytes: &[u8]) {
    let read = Manifest::parse(bytes);
    let policy = Policy {
        keys: &[],
        accept_stages: Some(&["production".to_owned()]),
        device: "edge-1",
        built: 0,
        size_max: 1 << 30,
    };
    let admitted =
        admit(&policy, read.as_ref().map(Some), &Signed::No, None, &State::default(), 1 << 40);
    if let Err(reason) = &admitted {
        sentence(&reason.message);
    }
    let m = match read {
        Ok(m) => m,
        Err(why) => return sentence(&why.to_string()),
    };
    if admitted.is_ok() {
        assert!(m.sha256.is_some() && m.size.is_some_and(|s| s <= policy.size_max));
        assert!(m.requires.is_empty(), "what this version can't do is refused");
    }
    assert!(m.model.as_deref().is_none_or(is_id));
    assert!(m.sequence.is_none_or(|s| s <= SEQUENCE_MAX));
    assert!(m.labels.as_ref().is_none_or(|l| !l.is_empty()));
    assert!(m.unknown.len() <= 32);
    m.unknown.iter().for_each(|field| one_line(field));
    let again = Manifest::parse(&printed(&m));
    assert_eq!(again, Ok(Manifest { unknown: Vec::new(), ..m }));
}

/// The manifest as its maker would have written it.
fn printed(m: &Manifest) -> Vec<u8> {
    let fields = [
        ("model", json!(m.model)),
        ("version", json!(m.version)),
        ("sha256", json!(m.sha256)),
        ("size", json!(m.size)),
        ("sequence", json!(m.sequence)),
        ("expires", json!(m.expires.map(|t| t.to_string()))),
        ("stage", json!(m.stage)),
        ("devices", json!(m.devices)),
        ("requires", json!(m.requires)),
        ("lineage", json!(m.lineage)),
        ("layout", json!(m.layout)),
        ("input", json!({ "order": m.order, "scale": m.scale, "fit": m.fit })),
        ("labels", json!(m.labels)),
        ("allow_removed_labels", json!(m.allow_removed_labels)),
        ("accept_slower", json!(m.accept_slower.map(|r| r.factor()))),
    ];
    let fields: Map<_, _> =
        fields.into_iter().filter(|(_, v)| !v.is_null()).map(|(k, v)| (k.to_owned(), v)).collect();
    serde_json::to_vec(&fields).expect("a map becomes JSON")
}

fn pushed(query: &str, headers: &[u8]) {
    let mut lines = headers.split(|b| *b == b'\n');
    let (manifest, signature) = (lines.next(), lines.next());
    let header = |name: &str| if name.ends_with("manifest") { manifest } else { signature };
    match Pushed::read(query, header) {
        Err(why) => sentence(&why),
        Ok(pushed) => {
            assert!(is_id(&pushed.id));
            sentence(&pushed.name);
            assert!(pushed.accept_slower.is_none_or(|r| (1.0..=1000.0).contains(&r.factor())));
        }
    }
}
