//! What docs/security.md promises: secrets stay inside, credentials of systemd are found, no name
//! from outside becomes a path.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

use noblink::control::client::Client;
use noblink::rtsp::{self, RtspServer};
use serde_json::json;

use crate::harness::mosquitto::{Mosquitto, Subscriber, publish};
use crate::harness::service::{Service, config, noblink_output, plates, shipped};
use crate::harness::until;

/// A broker that lets anyone in, but who gives a name must know its password.
fn guarded_broker(user: &str, password: &str) -> Mosquitto {
    Mosquitto::with(|dir| {
        let file = dir.join("passwords").display().to_string();
        let made = Command::new("mosquitto_passwd")
            .args(["-c", "-b", &file, user, password])
            .output()
            .expect("mosquitto is installed");
        assert!(made.status.success());
        format!("allow_anonymous true\npassword_file {file}")
    })
}

fn broker_of(broker: &Mosquitto) -> String {
    format!(
        "url = \"mqtt://127.0.0.1:{}\"\nusername = \"edge-1\"\npassword_file = \"mqtt-password\"",
        broker.port
    )
}

const CAMERA_SECRET: &str = "korrekt-horse-1";
const OTHER_SECRET: &str = "korrekt-horse-2";
const BROKER_SECRET: &str = "korrekt-horse-3";

/// Each of the secrets is used: the camera and the broker let nobody in without. Then everything
/// that the service says, in its most talkative state, is searched for them.
#[test]
fn no_secret_is_said_by_any_way_out() {
    let broker = guarded_broker("edge-1", BROKER_SECRET);
    let login = Some(("user".into(), CAMERA_SECRET.into()));
    let server = RtspServer::start(&rtsp::Settings { login, ..Default::default() }).unwrap();
    server.mount_clip("/a", &shipped("models/clips/line-b.mp4"), true).unwrap();
    let known = server.url("/a").replace("rtsp://", &format!("rtsp://user:{CAMERA_SECRET}@"));
    let wrong = server.url("/a").replace("rtsp://", &format!("rtsp://user:{OTHER_SECRET}@"));
    let query = format!("rtsp://127.0.0.1:9/x?password={OTHER_SECRET}");
    let cameras = [
        ("known", known.as_str(), "publish = \"all\""),
        ("wrong", wrong.as_str(), ""),
        ("query", query.as_str(), ""),
    ];
    let subscriber = Subscriber::new("5", broker.port, "#");
    let text = config(&broker_of(&broker), &cameras, &plates());
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("mqtt-password"), BROKER_SECRET).unwrap();
    let mut service = Service::start_in(dir, &text, &[("NOBLINK_LOG", "trace")]);
    service.says("camera known: streaming", 40);
    service.says("camera wrong: backoff", 40);
    service.says("camera query: backoff", 40);
    let records = |end: &str| {
        let messages = subscriber.messages();
        messages.iter().filter(|m| m.topic.ends_with(end)).count()
    };
    until("records and telemetry", 40, || {
        records("/known/detections") > 5 && records("/telemetry") > 0 && records("/state") > 0
    });
    let file = service.dir.path().join("noblink.toml").display().to_string();
    let mut said = String::new();
    for command in [&["status"][..], &["status", "--json"], &["model", "list", "--json"]] {
        let output = noblink_output(&[command, &["--config", &file]].concat());
        assert_eq!(output.status.code(), Some(0), "{command:?}");
        said += &String::from_utf8_lossy(&output.stdout);
    }
    for command in [&["check"][..], &["check", "--live"]] {
        let output = noblink_output(&[command, &["--config", &file]].concat());
        said += &String::from_utf8_lossy(&[output.stdout, output.stderr].concat());
    }
    assert_eq!(service.stop().code(), Some(0));
    said += &service.log();
    for message in subscriber.messages() {
        said += &format!("{} {}\n", message.topic, message.payload);
    }
    // It was looked where the secrets could be.
    assert!(said.matches("rtsp://***@127.0.0.1").count() > 5 && said.len() > 10_000, "{said}");
    for secret in [CAMERA_SECRET, OTHER_SECRET, BROKER_SECRET] {
        let line = said.lines().find(|line| line.contains(secret));
        assert_eq!(line, None, "a secret is said");
    }
}

/// `LoadCredential=` of the unit: the credential comes before a file of the same name.
#[test]
fn a_credential_of_systemd_is_the_password() {
    let broker = guarded_broker("edge-1", BROKER_SECRET);
    let subscriber = Subscriber::new("5", broker.port, "noblink/#");
    let credentials = tempfile::tempdir().unwrap();
    std::fs::write(credentials.path().join("mqtt-password"), BROKER_SECRET).unwrap();
    let text = config(&broker_of(&broker), &[("bars", "test://", "")], "");
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("mqtt-password"), "an old one").unwrap();
    let path = credentials.path().to_str().unwrap();
    let mut service = Service::start_in(dir, &text, &[("CREDENTIALS_DIRECTORY", path)]);
    until("online", 20, || subscriber.has("noblink/v1/test/availability", "online"));
    assert_eq!(service.stop().code(), Some(0));
}

fn files(dir: &Path) -> BTreeSet<PathBuf> {
    let mut found = BTreeSet::new();
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(files(&path));
        }
        found.insert(path);
    }
    found
}

/// Names with which someone tries to leave the store, by every way in. One of them brings a sound
/// model, which runs, under a name that was made harmless.
#[test]
fn no_name_from_outside_becomes_a_path() {
    let broker = Mosquitto::start("");
    let url = format!("url = \"mqtt://127.0.0.1:{}\"", broker.port);
    let rest = "[models]\nprobation_s = 0\n";
    let mut service = Service::start(&config(&url, &[("bars", "test://", "")], rest));
    service.says("mqtt: connected", 20);
    service.says("camera bars: streaming", 20);
    let root = service.dir.path().to_owned();
    let socket = root.join("state/control.sock");
    let model = std::fs::read(shipped("models/plates-v1.onnx")).unwrap();
    let name = "..%2F..%2F..%2Fevil.onnx";
    let path =
        format!("/api/v1/models/push?id=sound&name={name}&size={}&manual=false", model.len());
    let length = model.len() as u64;
    let answer = Client::new(&socket).request("POST", &path, &[], length, &mut &*model).unwrap();
    assert_eq!(answer["ok"], true, "{answer}");

    service.says("job sound (../../../evil.onnx by cli): SUCCEEDED", 60);

    let evil = "../../evil";
    let digest = "../../../../../evil";
    let tell = |topic: &str, message: serde_json::Value| {
        let topic = format!("noblink/v1/test/cmd/models/{topic}");
        publish(broker.port, &["-t", &topic, "-m", &message.to_string()]);
    };
    let desired = |id: &str, manifest: serde_json::Value| {
        let schema = "noblink.desired/1";
        json!({"schema": schema, "id": id, "source": "mqtt", "manifest": manifest})
    };
    tell("desired", desired(evil, json!({"sha256": "0".repeat(64), "size": 9})));
    tell("desired", desired("digest", json!({"sha256": digest, "size": 9})));
    tell("desired", desired("model", json!({"model": evil, "sha256": "0".repeat(64), "size": 9})));
    for verb in ["rollback", "cancel", "confirm"] {
        tell(verb, json!({"id": evil}));
        tell(verb, json!({"id": "verb", "sha256": digest, "job": evil}));
    }
    std::fs::write(root.join("state/inbox/..evil.onnx"), "no model").unwrap();
    std::fs::write(root.join("state/inbox/evil\n..\\evil.onnx"), "no model").unwrap();
    let rejected = root.join("state/inbox/rejected");
    until("the last command and the files of the inbox are judged", 20, || {
        service.log().contains("cmd/models/confirm: id = \"../../evil\"")
            && rejected.is_dir()
            && files(&rejected).len() >= 2
    });
    assert_eq!(service.stop().code(), Some(0));
    // Only the inbox keeps a name, and only of what lay in it.
    let named = |path: &PathBuf| path.to_string_lossy().contains("evil");
    let strange: Vec<_> = files(&root)
        .into_iter()
        .filter(|path| named(path) && !path.starts_with(root.join("state/inbox")))
        .collect();
    assert_eq!(strange, Vec::<PathBuf>::new());
    for above in root.ancestors().skip(1).filter(|above| above.is_dir()) {
        let escaped: Vec<_> = std::fs::read_dir(above)
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .filter(|path| {
                path.file_name().is_some_and(|n| n.to_string_lossy().starts_with("evil"))
            })
            .collect();
        assert_eq!(escaped, Vec::<PathBuf>::new());
    }
}
