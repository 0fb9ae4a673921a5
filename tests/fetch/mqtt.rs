//! Over MQTT: the pull against a sender in the same thread, and `noblink model push` against a
//! device through a real Mosquitto, restarted in the middle, each of the three.

use std::cell::RefCell;
use std::io::Read;
use std::process::{Child, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crossbeam_channel::bounded;
use noblink::mqtt::link::Inbound;
use noblink::mqtt::topics::Topics;
use noblink::update::digest::Digest;
use noblink::update::fetch::{
    self, AllowedHost, CHUNK_SIZE, Code, FetchError, Fetched, Progress, Rules, Transfer, Want,
    Wanted, chunk_payload, digest_file,
};
use serde_json::Value;

use super::{Desk, limits, noise, wanted};
use crate::harness::http::{Reply, Server, Then};
use crate::harness::link::{ROOMY, Running, plain};
use crate::harness::mosquitto::{Message, Mosquitto, Subscriber, publish};
use crate::harness::service::{noblink, noblink_output};
use crate::harness::until;

fn topics() -> Topics {
    Topics::new("noblink", "edge-1")
}

fn inbound(topic: &str, payload: Vec<u8>) -> Inbound {
    let topic = topic.to_owned();
    Inbound { topic, payload, retained: false, response_topic: None, correlation: None }
}

/// A pull whose wishes `answer` gets; returns the wishes, too.
fn pull(
    desk: &mut Desk,
    wanted: Wanted,
    mut answer: impl FnMut(&Want) -> Vec<Inbound>,
) -> (Result<Fetched, FetchError>, Vec<Want>) {
    let (sender, receiver) = bounded(64);
    let mut wishes = Vec::new();
    let mut ask = |topic: &Arc<str>, payload: Vec<u8>| {
        let want = Want::parse(&payload).expect("a wish");
        assert_eq!(*topic, topics().xfer_want(&want.sha256.short()));
        wishes.push(want);
        // What does not fit is lost, as with the link.
        answer(&want).into_iter().for_each(|m| drop(sender.try_send(m)));
    };
    let got = desk.transfer(wanted, |t| fetch::mqtt(&topics(), &mut ask, &receiver, t));
    (got, wishes)
}

/// What a good sender answers.
fn serve(file: &[u8], want: &Want) -> Vec<Inbound> {
    let short = want.sha256.short();
    let one = |i| inbound(&topics().xfer_chunk(&short, i), chunk_payload(file, i).unwrap());
    want.indices(file.len() as u64).map(one).collect()
}

#[test]
fn a_file_is_pulled_and_strangers_are_not_heard() {
    let file = noise(21, 40 * CHUNK_SIZE + 5);
    let mut desk = Desk::new();
    let (got, wishes) = pull(&mut desk, wanted(&file), |want| {
        let other = topics().xfer_chunk("00000000", 0);
        let mut all = vec![inbound(&other, vec![0; 10]), inbound("noblink/v1/edge-1/x", vec![])];
        all.extend(serve(&file, want));
        all
    });
    assert_eq!(got.unwrap().digest, Digest::of(&file));
    assert_eq!(desk.bytes(), file);
    assert_eq!(desk.files(), ["x.part"]);
    let counts: Vec<_> = wishes.iter().map(|w| (w.from, w.count)).collect();
    assert_eq!(counts, [(0, 16), (16, 16), (32, 9)]);
    assert_eq!(desk.progress.last().unwrap().received, file.len() as u64);

    let (got, wishes) = pull(&mut desk, wanted(&file), |_| panic!("it is there"));
    assert!(got.is_ok() && wishes.is_empty());
}

#[test]
fn after_a_restart_only_what_is_missing_or_damaged_is_asked_for() {
    let file = noise(22, 20 * CHUNK_SIZE);
    let mut desk = Desk::new();
    let cancel = Arc::clone(&desk.cancel);
    // Every other chunk of the first wish, then the end of this life.
    let (got, _) = pull(&mut desk, wanted(&file), |want| {
        if want.from > 0 {
            cancel.store(true, Ordering::Relaxed);
            return Vec::new();
        }
        serve(&file, want).into_iter().step_by(2).collect()
    });
    assert_eq!(got.unwrap_err().code, Code::Canceled);
    assert_eq!(desk.files(), ["x.part", "x.part.map"]);

    // The disk has lost a chunk that the map knows.
    let mut bytes = desk.bytes();
    bytes[4 * CHUNK_SIZE + 9] ^= 1;
    std::fs::write(desk.part(), bytes).unwrap();
    desk.cancel.store(false, Ordering::Relaxed);
    let (got, wishes) = pull(&mut desk, wanted(&file), |want| serve(&file, want));
    got.unwrap();
    assert_eq!(desk.bytes(), file);
    let asked: Vec<u32> = wishes.iter().flat_map(|w| w.from..w.from + w.count).collect();
    let missing: Vec<u32> = (0..20).filter(|i| i % 2 == 1 || *i == 4 || *i >= 16).collect();
    assert_eq!(asked, missing);

    // The map of another file is none.
    let other = noise(23, 20 * CHUNK_SIZE);
    let (got, wishes) = pull(&mut desk, wanted(&other), |want| serve(&other, want));
    assert_eq!(got.unwrap().digest, Digest::of(&other));
    assert_eq!(wishes[0].from, 0);
}

#[test]
fn a_map_that_lies_costs_time_and_nothing_else() {
    let file = noise(24, 3 * CHUNK_SIZE);
    for damage in 0..4 {
        let mut desk = Desk::new();
        let cancel = Arc::clone(&desk.cancel);
        let (got, _) = pull(&mut desk, wanted(&file), |want| {
            cancel.store(true, Ordering::Relaxed);
            serve(&file, want)
        });
        assert_eq!(got.unwrap_err().code, Code::Canceled);
        desk.cancel.store(false, Ordering::Relaxed);
        let map = desk.part().with_extension("part.map");
        let bytes = std::fs::read(&map).unwrap();
        match damage {
            0 => std::fs::write(&map, &bytes[..60]).unwrap(),
            1 => std::fs::write(&map, vec![7; 5000]).unwrap(),
            2 => std::fs::write(&map, [&bytes[..54], &[9; 400]].concat()).unwrap(),
            _ => std::fs::write(desk.part(), b"short").unwrap(),
        }
        let (got, _) = pull(&mut desk, wanted(&file), |want| serve(&file, want));
        assert_eq!(got.unwrap().digest, Digest::of(&file), "damage {damage}");
        assert_eq!(desk.bytes(), file);
    }
}

#[test]
fn one_way_goes_on_where_the_other_stopped() {
    let file = noise(25, 10 * CHUNK_SIZE + 100);
    // HTTP, then MQTT.
    let served = file.clone();
    let server = Server::start(move |_, r| Reply::file(r, "", &served).cut(200_000, Then::Close));
    let allowed: AllowedHost = format!("127.0.0.1:{}", server.port).parse().unwrap();
    let rules = Rules { allowed_hosts: vec![allowed], ca_file: None };
    let mut desk = Desk::new();
    desk.limits.failures_max = 0;
    let url = server.url("/x");
    let got = desk.transfer(wanted(&file), |t| fetch::http(&url, &rules, t));
    assert_eq!(got.unwrap_err().code, Code::Unreachable);
    assert_eq!(desk.bytes().len(), 200_000);
    let (got, wishes) = pull(&mut desk, wanted(&file), |want| serve(&file, want));
    assert_eq!(got.unwrap().digest, Digest::of(&file));
    assert_eq!(wishes[0].from, 3, "three whole chunks lie within 200000 bytes");

    // The same, but what came before was of another file.
    let mut desk = Desk::new();
    std::fs::write(desk.part(), noise(26, 200_000)).unwrap();
    let (got, wishes) = pull(&mut desk, wanted(&file), |want| serve(&file, want));
    assert_eq!(got.unwrap().digest, Digest::of(&file));
    assert_eq!((wishes[0].from, wishes[1].from), (3, 0));

    // MQTT, then HTTP.
    let mut desk = Desk::new();
    let cancel = Arc::clone(&desk.cancel);
    let (got, _) = pull(&mut desk, wanted(&file), |want| {
        if want.from == 5 {
            cancel.store(true, Ordering::Relaxed);
        }
        serve(&file, want).into_iter().filter(|m| !m.topic.ends_with("/5")).collect()
    });
    assert_eq!(got.unwrap_err().code, Code::Canceled);
    desk.cancel.store(false, Ordering::Relaxed);
    let served = file.clone();
    let server = Server::start(move |_, r| Reply::file(r, "\"v\"", &served));
    let allowed: AllowedHost = format!("127.0.0.1:{}", server.port).parse().unwrap();
    let rules = Rules { allowed_hosts: vec![allowed], ca_file: None };
    let url = server.url("/x");
    desk.transfer(wanted(&file), |t| fetch::http(&url, &rules, t)).unwrap();
    assert_eq!(desk.bytes(), file);
    assert_eq!(server.requests()[0].range(), Some(5 * CHUNK_SIZE));
    assert_eq!(desk.files(), ["x.part"]);
}

#[test]
fn a_sender_with_another_file_is_found_out() {
    let (file, other) = (noise(27, 2 * CHUNK_SIZE), noise(28, 2 * CHUNK_SIZE));
    let mut desk = Desk::new();
    let (got, _) = pull(&mut desk, wanted(&file), |want| serve(&other, want));
    let error = got.unwrap_err();
    assert_eq!(error.code, Code::DigestMismatch, "{error}");
    assert!(error.message.contains("the sender has another file"), "{error}");
    assert!(desk.files().is_empty(), "{:?}", desk.files());
}

#[test]
fn a_sender_that_is_not_there_is_said_so() {
    let file = noise(29, 2 * CHUNK_SIZE);
    let mut desk = Desk::new();
    desk.limits.window = Duration::from_millis(300);
    let (got, wishes) = pull(&mut desk, wanted(&file), |_| Vec::new());
    let error = got.unwrap_err();
    assert_eq!(error.code, Code::Unreachable);
    assert!(error.message.contains("noblink model push --mqtt"), "{error}");
    assert!((2..20).contains(&wishes.len()), "{} wishes", wishes.len());

    let size = |size, size_max| Wanted { digest: wanted(&file).digest, size, size_max };
    let (got, _) = pull(&mut desk, size(None, 10), |_| Vec::new());
    assert!(got.unwrap_err().message.contains("sha256 and size"));
    let (got, _) = pull(&mut desk, size(Some(11), 10), |_| Vec::new());
    assert_eq!(got.unwrap_err().code, Code::TooLarge);
    let (got, _) = pull(&mut desk, size(Some(1 << 60), u64::MAX), |_| Vec::new());
    assert_eq!(got.unwrap_err().code, Code::NoSpace);
}

/// `noblink model push`, ended with this value.
struct Pusher(Child);

impl Pusher {
    fn start(port: u16, file: &str, more: &[&str]) -> Self {
        let broker = format!("mqtt://127.0.0.1:{port}");
        let args = [
            "model", "push", "--mqtt", file, "--broker", &broker, "--device", "edge-1", "--id",
            "job-1",
        ];
        let child = noblink(&[&args, more].concat()).stdout(Stdio::piped()).spawn();
        Self(child.expect("the program was built"))
    }

    fn ended(&mut self) -> bool {
        self.0.try_wait().expect("our child").is_some()
    }

    /// What it said, and its exit code.
    fn result(mut self) -> (String, Option<i32>) {
        let mut said = String::new();
        self.0.stdout.take().expect("piped").read_to_string(&mut said).expect("text");
        (said, self.0.wait().expect("our child").code())
    }
}

impl Drop for Pusher {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The device's end, on a link as the service has it.
fn device(
    port: u16,
    desk: &Desk,
    wanted: Wanted,
    cancel: &AtomicBool,
    progress: &mut dyn FnMut(Progress),
) -> Result<Fetched, FetchError> {
    let filter = topics().xfer_filter();
    let link = Running::with(plain(port), "edge-1", ROOMY, &[&filter]);
    link.connected();
    let limits = fetch::Limits { pause: Duration::from_millis(300), ..limits() };
    let part = desk.part();
    let mut ask = |topic: &Arc<str>, payload| link.board.tell(topic, payload);
    let transfer = Transfer { wanted, part: &part, limits: &limits, cancel, progress };
    fetch::mqtt(&link.topics, &mut ask, &link.handle.inbound(), transfer)
}

/// Says how the job ended, until the sender has heard it.
fn report(port: u16, pusher: &mut Pusher, payload: &str) {
    let topic = topics().models_job("job-1");
    until("the sender hears of the end", 15, || {
        publish(port, &["-t", &topic, "-m", payload]);
        pusher.ended()
    });
}

#[test]
fn a_model_reaches_a_device_through_mosquitto_whoever_restarts() {
    let file = noise(30, 3_000_000);
    let desk = Desk::new();
    let path = desk.part().with_file_name("Best Model.onnx");
    std::fs::write(&path, &file).unwrap();
    let path = path.to_str().unwrap();
    let broker = RefCell::new(Mosquitto::start(""));
    let port = broker.borrow().port;
    let pusher = RefCell::new(Pusher::start(port, path, &[]));

    // The device dies after a third.
    let cancel = AtomicBool::new(false);
    let mut kill = |p: Progress| cancel.store(p.received > 1_000_000, Ordering::Relaxed);
    let got = device(port, &desk, wanted(&file), &cancel, &mut kill);
    assert_eq!(got.unwrap_err().code, Code::Canceled);

    // It comes back; then the sender dies, then the broker.
    cancel.store(false, Ordering::Relaxed);
    let (mut first, mut sender, mut away) = (None, false, false);
    let mut restart = |p: Progress| {
        first.get_or_insert(p.received);
        if p.received > 1_800_000 && !sender {
            sender = true;
            pusher.replace(Pusher::start(port, path, &[]));
        }
        if p.received > 2_500_000 && !away {
            away = true;
            broker.borrow_mut().restart();
        }
    };
    let fetched = device(port, &desk, wanted(&file), &cancel, &mut restart).unwrap();
    assert_eq!(fetched, digest_file(std::path::Path::new(path)).unwrap());
    assert_eq!(desk.bytes(), file);
    assert!(first.unwrap() > 1_000_000, "it began again: {first:?}");
    assert!(sender && away);

    // The broker has forgotten everything; what is desired is said again.
    let seen = Subscriber::new("5", port, &topics().desired());
    until("desired is published again", 15, || !seen.messages().is_empty());
    let Message { payload, .. } = seen.messages().remove(0);
    let desired: Value = serde_json::from_str(&payload).unwrap();
    assert_eq!(desired["schema"], "noblink.desired/1");
    assert_eq!((&desired["id"], &desired["source"]), (&"job-1".into(), &"mqtt".into()));
    assert_eq!(desired["install"], "auto");
    let manifest = &desired["manifest"];
    assert_eq!(manifest["sha256"], Digest::of(&file).to_string());
    assert_eq!((&manifest["size"], &manifest["model"]), (&3_000_000.into(), &"best-model".into()));

    let mut pusher = pusher.into_inner();
    let phase = r#"{"id":"job-1","state":"IN_PROGRESS","phase":"proving"}"#;
    publish(port, &["-t", &topics().models_job("job-1"), "-m", phase]);
    report(port, &mut pusher, r#"{"id":"job-1","state":"SUCCEEDED","phase":"committed"}"#);
    let (said, code) = pusher.result();
    assert_eq!(code, Some(0), "{said}");
    for words in ["% asked for", "proving\n", "trying again", "SUCCEEDED\n"] {
        assert!(said.contains(words), "no {words:?} in:\n{said}");
    }
}

#[test]
fn a_sender_tells_a_refusal_from_a_success() {
    let desk = Desk::new();
    let path = desk.part().with_file_name("m.onnx");
    std::fs::write(&path, b"no model").unwrap();
    let file = path.to_str().unwrap();
    let broker = Mosquitto::start("");
    let end = |topic: &str, payload: &str| {
        let mut pusher = Pusher::start(broker.port, file, &["--manual"]);
        until("the sender has heard", 15, || {
            publish(broker.port, &["-t", topic, "-m", payload]);
            pusher.ended()
        });
        pusher.result()
    };
    let rejected = r#"{"state":"REJECTED","reason":{"code":"not_onnx","message":"it is text"}}"#;
    let (said, code) = end(&topics().models_job("job-1"), rejected);
    assert_eq!(code, Some(1));
    assert!(said.contains("REJECTED: not_onnx: it is text"), "{said}");

    // An end that was missed is in the answer to the command said again, or in the state.
    let state = r#"{"active":null,"job":{"id":"job-1","state":"CANCELED","reason":null}}"#;
    let (said, code) = end(&topics().models_state(), state);
    assert!(code == Some(1) && said.contains("CANCELED\n"), "{said}");
    let (said, code) = end(&topics().reply("job-1"), r#"{"id":"job-1","state":"SUCCEEDED"}"#);
    assert!(code == Some(0) && said.contains("SUCCEEDED\n"), "{said}");
    let (_, code) = end(&topics().reply("job-1"), r#"{"reason":{"code":"c","message":"m"}}"#);
    assert_eq!(code, Some(1));
}

#[test]
fn a_signed_manifest_goes_as_its_exact_bytes() {
    let desk = Desk::new();
    let at = |name: &str, bytes: &[u8]| {
        let path = desk.part().with_file_name(name);
        std::fs::write(&path, bytes).unwrap();
        path
    };
    let file = at("plates.v2.onnx", b"bytes");
    let offer =
        || noblink::update::push::Offer::read(&file, None, noblink::update::job::Install::Auto);
    let said = || -> Value { serde_json::from_slice(offer().unwrap().desired()).unwrap() };
    assert!(offer().unwrap().id.starts_with(&format!("push-{}-", Digest::of(b"bytes").short())));

    let beside = "plates.v2.manifest.json";
    at(beside, br#"{"model":"plates","lineage":{"parent":"plates 1"}}"#);
    let manifest = &said()["manifest"];
    assert_eq!((&manifest["model"], &manifest["size"]), (&"plates".into(), &5.into()));
    assert_eq!(manifest["sha256"], Digest::of(b"bytes").to_string());
    at(beside, br#"{"size":6}"#);
    assert!(offer().unwrap_err().to_string().contains("size is 6, the model has 5"));
    at(beside, b"{");
    assert!(offer().unwrap_err().to_string().contains("is no JSON"));

    at(beside, br#"{"model": "plates" }"#);
    at("plates.v2.manifest.json.minisig", b"untrusted comment: x\nRW\n");
    let desired = said();
    assert_eq!(desired["manifest"], "eyJtb2RlbCI6ICJwbGF0ZXMiIH0=");
    assert_eq!(desired["signature"], "untrusted comment: x\nRW\n");
}

#[test]
fn a_broker_that_refuses_ends_the_push() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("m.onnx");
    std::fs::write(&file, b"x").unwrap();
    let file = file.to_str().unwrap();
    let closed = Mosquitto::with(|dir| {
        std::fs::write(dir.join("passwords"), "").unwrap();
        format!("allow_anonymous false\npassword_file {}/passwords", dir.display())
    });
    let url = format!("mqtt://127.0.0.1:{}", closed.port);
    let run = |more: &[&str]| {
        let output = noblink_output(&[&["model", "push", file, "--mqtt"], more].concat());
        (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
    };
    let (code, said) = run(&["--broker", &url, "--device", "edge-1"]);
    assert!(code == Some(1) && said.contains("does not authorise"), "{said}");
    let (code, said) = run(&["--broker", "http://x", "--device", "edge-1"]);
    assert!(code == Some(2) && said.contains("--broker = \"http://x\": scheme http://"), "{said}");
    assert_eq!(run(&["--broker", &url, "--device", "Edge 1"]).0, Some(2));
    assert_eq!(run(&["--broker", &url]).0, Some(2));
    assert_eq!(run(&["--broker", &url, "--device", "edge-1", "--prefix", "a/#"]).0, Some(2));
    let (_, said) = run(&["--broker", "mqtt://u:secret@x", "--device", "edge-1"]);
    assert!(said.contains("holds credentials") && !said.contains("secret"), "{said}");
    assert_eq!(run(&["--config", "/nowhere.toml"]).0, Some(78));
}
