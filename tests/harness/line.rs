//! The whole service with one camera, a real broker and a subscriber; and ways to send it models.

use std::collections::BTreeMap;
use std::path::Path;

use noblink::control::client::Client;
use noblink::rtsp::{self, RtspServer};
use noblink::update::digest::Digest;
use serde_json::{Value, json};

use super::mosquitto::{Mosquitto, Subscriber, publish};
use super::overload::assert_exact;
use super::schema::{assert_valid, validator};
use super::service::{Service, config, noblink_output, shipped};
use super::until;

/// A proving child is nice: on a machine at work it gets a small share of it.
pub const PROVED_S: u64 = 240;

pub struct Line {
    pub service: Service,
    pub subscriber: Subscriber,
    pub broker: Mosquitto,
    /// What the service was started with.
    pub config: String,
    _server: Option<RtspServer>,
    _files: Option<tempfile::TempDir>,
}

impl Line {
    /// A camera of the demo's line, plates 1 as its factory model.
    pub fn start(models: &str) -> Self {
        let server = RtspServer::start(&rtsp::Settings::default()).unwrap();
        server.mount_clip("/a", &shipped("models/clips/line-a.mp4"), true).unwrap();
        let (url, factory) = (server.url("/a"), shipped("models/plates-v1.onnx"));
        let mut line = Self::with(&url, "max_fps = 10", &factory, models);
        line._server = Some(server);
        line
    }

    /// Any camera, with more lines of its configuration, any factory model, and more of `[models]`.
    pub fn with(url: &str, camera: &str, factory: &Path, models: &str) -> Self {
        let broker = Mosquitto::start("");
        let port = broker.port;
        Self::through(broker, port, &[], url, camera, factory, models)
    }

    /// The same, to a broker by way of this port, and with an environment for the first life.
    pub fn through(
        broker: Mosquitto,
        port: u16,
        env: &[(&str, &str)],
        url: &str,
        camera: &str,
        factory: &Path,
        models: &str,
    ) -> Self {
        let subscriber = Subscriber::new("5", broker.port, "noblink/v1/test/#");
        let mqtt = format!("url = \"mqtt://127.0.0.1:{port}\"");
        let models = format!("[models]\nfactory = \"{}\"\n{models}\n", factory.display());
        // Room for the hiccups of a busy machine: what is tested is the swap.
        let camera = format!("publish = \"all\"\nqueue = 32\n{camera}");
        let config = config(&mqtt, &[("line", url, &camera)], &models);
        let service = Service::start_in(tempfile::tempdir().unwrap(), &config, env);
        let line = Self { service, subscriber, broker, config, _server: None, _files: None };
        line.until_record("a record", 30, |_| true);
        line
    }

    /// Keeps a folder for as long as the service lives.
    pub fn keep(&mut self, files: tempfile::TempDir) {
        self._files = Some(files);
    }

    /// What came on topics that contain this.
    pub fn messages(&self, part: &str) -> Vec<Value> {
        let messages = self.subscriber.messages();
        let of = messages.iter().filter(|m| m.topic.contains(part));
        of.filter_map(|m| serde_json::from_str(&m.payload).ok()).collect()
    }

    pub fn until_record(&self, what: &str, seconds: u64, test: impl Fn(&Value) -> bool) {
        until(what, seconds, || {
            let last = self.subscriber.last("/detections");
            last.is_some_and(|m| test(&serde_json::from_str(&m.payload).unwrap()))
        });
    }

    /// The job's last word.
    pub fn ended(&self, id: &str) -> Value {
        let mut last = Value::Null;
        until(&format!("the end of job {id}"), PROVED_S, || {
            let jobs = self.messages(&format!("/models/jobs/{id}"));
            last = jobs.last().cloned().unwrap_or_default();
            is_over(&last)
        });
        last
    }

    /// The job that a file in the inbox became.
    pub fn job_of(&self, file: &str) -> String {
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

    pub fn put_in(&self, name: &str, bytes: &[u8]) {
        std::fs::write(self.inbox().join(name), bytes).unwrap();
    }

    pub fn inbox(&self) -> std::path::PathBuf {
        self.service.state_dir().join("inbox")
    }

    pub fn command(&self, verb: &str, body: &Value) {
        let topic = format!("noblink/v1/test/cmd/models/{verb}");
        publish(self.broker.port, &["-t", &topic, "-m", &body.to_string()]);
    }

    /// `cmd/models/desired` for a model that is to be fetched.
    pub fn desire(&self, id: &str, source: &str, manifest: &Value) {
        let desired = json!({ "schema": "noblink.desired/1", "id": id, "source": source,
            "manifest": manifest });
        self.command("desired", &desired);
    }

    pub fn cli(&self, args: &[&str]) -> (Option<i32>, String) {
        let file = self.service.dir.path().join("noblink.toml");
        let args: Vec<&str> =
            args.iter().copied().chain(["--config", file.to_str().unwrap()]).collect();
        let output = noblink_output(&args);
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        (output.status.code(), said + &String::from_utf8_lossy(&output.stderr))
    }

    /// Something of the control socket, whatever the broker does.
    pub fn ask(&self, path: &str) -> Value {
        let socket = self.service.state_dir().join("control.sock");
        Client::new(&socket).get(&format!("/api/v1/{path}")).expect("the service answers")
    }

    /// A command by the control socket; its answer.
    pub fn order(&self, verb: &str, body: &Value) -> Value {
        let socket = self.service.state_dir().join("control.sock");
        Client::new(&socket).post(&format!("/api/v1/models/{verb}"), body).expect("an answer")
    }

    /// A model by the control socket, as `noblink model push` sends it; the answer.
    pub fn push(&self, id: &str, bytes: &[u8]) -> Value {
        let socket = self.service.state_dir().join("control.sock");
        let size = bytes.len();
        let path = format!("/api/v1/models/push?id={id}&name={id}.onnx&size={size}&manual=false");
        let mut body = bytes;
        Client::new(&socket).request("POST", &path, &[], size as u64, &mut body).expect("an answer")
    }

    /// `models/state` as the control socket has it.
    pub fn state(&self) -> Value {
        self.ask("models")["state"].clone()
    }

    /// A job as the control socket has it; null while there is none.
    pub fn job(&self, id: &str) -> Value {
        let job = self.ask(&format!("jobs/{id}"));
        if job["id"] == id { job } else { Value::Null }
    }

    /// Waits for the end of a job, by the control socket.
    pub fn over(&self, id: &str) -> Value {
        let mut job = Value::Null;
        until(&format!("the end of job {id}"), PROVED_S, || {
            job = self.job(id);
            is_over(&job)
        });
        job
    }

    /// Waits until a job has come to this phase.
    pub fn reached(&self, id: &str, phase: &str) {
        until(&format!("job {id} in {phase}"), PROVED_S, || {
            let job = self.job(id);
            let mut entered = job["entered"].as_array().into_iter().flatten();
            let there = entered.any(|e| e[0] == phase);
            assert!(there || !is_over(&job), "it ended before {phase}: {job:#}");
            there
        });
    }

    /// Stops the service in good order: this life's boot id and its last ledger, which is exact and
    /// holds no failed frame.
    pub fn last_word(&mut self, seconds: u64) -> (Value, Value) {
        assert_eq!(self.service.stop().code(), Some(0), "{}", self.service.log());
        let boot = self.messages("/detections").last().expect("records came")["boot"].clone();
        let mut ledger = Value::Null;
        until("the last telemetry", seconds, || {
            let last = self.messages("/telemetry").pop().filter(|t| t["boot"] == boot);
            ledger = last.map_or(Value::Null, |t| t["cameras"]["line"]["ledger"].clone());
            ledger["queued"] == 0 && ledger["in_flight"] == 0
        });
        assert_exact("line", &ledger);
        assert_eq!(ledger["failed"], 0, "{ledger}");
        (boot, ledger)
    }

    /// Stops the service in good order. Its own last word: every frame was inferred.
    pub fn stop(&mut self) {
        let (_, ledger) = self.last_word(10);
        for (why, count) in ledger["dropped"].as_object().unwrap() {
            assert!(why == "stopped" || count == 0, "{ledger}");
        }
    }

    /// Everything that was said of models is as the schemas describe it.
    pub fn assert_described(&self) {
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

    /// Every frame of each life exactly once, epochs never going back. Returns how many there are.
    pub fn assert_nothing_lost(&self) -> usize {
        until("enough records", 20, || self.messages("/detections").len() > 20);
        let records = self.messages("/detections");
        let mut next = BTreeMap::<String, (u64, u64)>::new();
        let mut newest = (0, Value::Null);
        for record in &records {
            let boot = record["boot"].as_str().unwrap().to_owned();
            let n = |v: &Value| v.as_u64().unwrap();
            let (seq, frame, epoch) =
                (n(&record["seq"]), n(&record["frame"]["id"]), n(&record["model"]["epoch"]));
            if let Some((last_seq, last_frame)) = next.get(&boot) {
                assert_eq!(seq, last_seq + 1);
                assert_eq!(frame, last_frame + 1, "frames are contiguous over every swap");
            }
            let model = &record["model"]["sha256"];
            let (last_epoch, last_model) = &newest;
            assert!(epoch >= *last_epoch, "the epoch goes back from {last_epoch} to {epoch}");
            assert!(epoch > *last_epoch || newest.1.is_null() || model == last_model, "{record}");
            assert_eq!(record["since"], json!({ "empty": 0, "failed": 0, "dropped": 0 }));
            newest = (epoch, model.clone());
            next.insert(boot, (seq, frame));
        }
        records.len()
    }
}

/// What a manifest says of these bytes, with more in it or something else.
pub fn manifest(bytes: &[u8], more: &Value) -> Value {
    let mut manifest = json!({ "sha256": Digest::of(bytes), "size": bytes.len() });
    manifest.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    manifest
}

/// Whether a job, as it goes over the wire, is in a terminal state.
pub fn is_over(job: &Value) -> bool {
    !matches!(job["state"].as_str().unwrap_or("QUEUED"), "QUEUED" | "IN_PROGRESS")
}
