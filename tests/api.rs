//! `docs/openapi.json` held against the running service: all that there is is described, and what is
//! described is so. `make test-api` has schemathesis ask whatever the description allows, and more.

use std::collections::BTreeSet;

use serde_json::{Value, json};
use ureq::Agent;

use crate::harness::line::Line;
use crate::harness::service::shipped;
use crate::harness::until;
use crate::harness::web::{self, LOOPBACK};

fn described() -> Value {
    serde_json::from_slice(&std::fs::read(shipped("docs/openapi.json")).unwrap()).unwrap()
}

/// `get /api/v1/models`, …
fn operations(api: &Value) -> BTreeSet<String> {
    let paths = api["paths"].as_object().unwrap().iter();
    let of = |(path, methods): (&String, &Value)| {
        let methods = methods.as_object().unwrap().keys();
        methods.map(|method| format!("{method} {path}")).collect::<Vec<_>>()
    };
    paths.flat_map(of).collect()
}

#[test]
fn every_route_is_described_and_no_other() {
    let mut routes = BTreeSet::new();
    for file in ["src/web/mod.rs", "src/control/mod.rs"] {
        let text = std::fs::read_to_string(shipped(file)).unwrap();
        for route in text.split(".route(\"").skip(1) {
            let (path, handler) = route.split_once("\", ").unwrap();
            routes.insert(format!("{} {path}", handler.split('(').next().unwrap()));
        }
    }
    assert_eq!(operations(&described()), routes);
}

/// What was asked, and that the answer is one that the description has.
struct Asker {
    api: Value,
    page: String,
    agent: Agent,
    asked: BTreeSet<(String, u16)>,
}

impl Asker {
    fn ask(&mut self, method: &str, path: &str, at: &str, body: &[u8], kind: &str) -> Value {
        let url = format!("{}{at}", self.page);
        let answer = match method {
            "get" => self.agent.get(&url).call(),
            _ => self.agent.post(&url).header("content-type", kind).send(body),
        };
        let mut answer = answer.unwrap();
        let status = answer.status().as_u16();
        let what = format!("{method} {at}: {status}");
        let mut told = &self.api["paths"][path][method]["responses"][status.to_string()];
        if let Some(name) = told["$ref"].as_str() {
            told = &self.api["components"]["responses"][name.rsplit('/').next().unwrap()];
        }
        let kind = answer.headers()["content-type"].to_str().unwrap().to_owned();
        let kind = kind.split(';').next().unwrap();
        let schema = &told["content"][kind]["schema"];
        assert!(schema.is_object(), "{what} of {kind} is not described");
        self.asked.insert((format!("{method} {path}"), status));
        // Streams have no end.
        if ["text/event-stream", "application/octet-stream"].contains(&kind) {
            return Value::Null;
        }
        let text = answer.body_mut().read_to_string().unwrap();
        let value = match kind {
            "application/json" => serde_json::from_str(&text).unwrap(),
            _ => Value::String(text),
        };
        let whole = json!({ "allOf": [schema], "components": self.api["components"] });
        let validator = jsonschema::validator_for(&whole).unwrap();
        let problems: Vec<_> = validator.iter_errors(&value).map(|e| e.to_string()).collect();
        assert!(problems.is_empty(), "{what}: {problems:?}\n{value:#}");
        value
    }

    fn get(&mut self, path: &str, at: &str) -> Value {
        self.ask("get", path, at, b"", "")
    }

    fn post(&mut self, path: &str, at: &str, body: &Value) -> Value {
        self.ask("post", path, at, body.to_string().as_bytes(), "application/json")
    }
}

#[test]
fn answers_are_as_described() {
    let line = Line::start(&format!("probation_s = 0\n{LOOPBACK}"));
    let page = web::page(&line);
    let mut asker =
        Asker { api: described(), page, agent: web::agent(), asked: BTreeSet::default() };
    asker.get("/healthz", "/healthz");
    until("it is ready", 20, || asker.get("/readyz", "/readyz") == "ready\n");
    asker.get("/metrics", "/metrics");
    asker.get("/api/v1/status", "/api/v1/status");
    asker.get("/api/v1/events", "/api/v1/events");
    for query in ["?cameras=line", "?cameras=x", ""] {
        asker.get("/api/v1/live", &format!("/api/v1/live{query}"));
    }
    let (login, token) = ("/api/v1/login", json!({ "token": "none" }));
    asker.post(login, login, &token);
    asker.post(login, login, &json!({ "token": 3 }));
    asker.ask("post", login, login, b"{", "application/json");
    asker.ask("post", login, login, b"token", "text/plain");

    let (push, job) = ("/api/v1/models/push", "/api/v1/jobs/{id}");
    let model = std::fs::read(shipped("models/plates-v2.onnx")).unwrap();
    let kind = "application/octet-stream";
    let at = |size: usize| format!("{push}?id=api-1&name=plates-v2.onnx&size={size}");
    for (size, body) in [(4, &b"123"[..]), (2, b"123"), (usize::MAX, b"")] {
        asker.ask("post", push, &at(size), body, kind);
    }
    asker.ask("post", push, push, b"", kind);
    asker.ask("post", push, &at(model.len()), &model, kind);
    assert_eq!(line.over("api-1")["state"], "SUCCEEDED");
    asker.get(job, "/api/v1/jobs/api-1");
    asker.get(job, "/api/v1/jobs/none");
    asker.get(job, "/api/v1/jobs/%ff");

    let (command, desired) = ("/api/v1/models/{verb}", "/api/v1/models/desired");
    let mut order = |verb: &str, body: Value| {
        asker.post(command, &format!("/api/v1/models/{verb}"), &body)["ok"].clone()
    };
    assert_eq!(order("rollback", json!({ "id": "back" })), true);
    assert_eq!(line.over("back")["state"], "SUCCEEDED");
    assert_eq!(order("rollback", json!({ "id": "on", "to": "ffff" })), false);
    assert_eq!(order("confirm", json!({ "id": "c" })), false);
    assert_eq!(order("cancel", json!({ "id": "c" })), false);
    assert_eq!(order("close-breaker", json!({ "id": "c", "way": "page" })), true);
    assert_eq!(order("release", json!({ "id": "c", "model": "ffff" })), false);
    assert_eq!(order("jump", json!({ "id": "c" })), false);
    let too_long = vec![b' '; 128 * 1024 + 1];
    asker.ask("post", command, "/api/v1/models/rollback", &too_long, kind);
    asker.ask("post", desired, desired, &too_long, kind);
    asker.post(desired, desired, &json!({}));
    asker.get("/api/v1/models", "/api/v1/models");

    let asked: BTreeSet<_> = asker.asked.iter().map(|(what, _)| what.clone()).collect();
    assert_eq!(asked, operations(&asker.api), "each operation was asked");
    let fine = |s: &u16| *s < 300;
    let fine: Vec<_> = asker.asked.iter().filter(|(_, s)| fine(s)).map(|(w, _)| w).collect();
    // A desired model has to be fetched from somewhere; who needs no token has none to log in with.
    let rest = operations(&asker.api).len() - fine.len();
    assert_eq!(rest, 2, "{fine:?}");
}
