//! The page's server, without a browser: what it tells, what it takes, whom it refuses.

use std::io::{BufRead, BufReader, Read};

use serde_json::Value;

use crate::harness::line::Line;
use crate::harness::schema::{assert_valid_payload, validator};
use crate::harness::service::shipped;
use crate::harness::until;
use crate::harness::web::{LOOPBACK, agent, page};

fn get(url: &str, headers: &[(&str, &str)]) -> (u16, String) {
    let request = headers.iter().fold(agent().get(url), |r, (n, v)| r.header(*n, *v));
    let mut answer = request.call().unwrap();
    (answer.status().as_u16(), answer.body_mut().read_to_string().unwrap())
}

fn post(url: &str, body: &str, headers: &[(&str, &str)]) -> (u16, String) {
    let request = agent().post(url).header("content-type", "application/json");
    let request = headers.iter().fold(request, |r, (n, v)| r.header(*n, *v));
    let mut answer = request.send(body).unwrap();
    (answer.status().as_u16(), answer.body_mut().read_to_string().unwrap())
}

/// Server-sent events until one is called so: their names and payloads.
fn events(page: &str, until: &str) -> Vec<(String, Value)> {
    let mut answer = agent().get(format!("{page}/api/v1/events")).call().unwrap();
    let (mut name, mut events) = (String::new(), Vec::new());
    for line in BufReader::new(answer.body_mut().as_reader()).lines() {
        let line = line.unwrap();
        if let Some(event) = line.strip_prefix("event: ") {
            name = event.to_owned();
        } else if let Some(data) = line.strip_prefix("data: ") {
            events.push((name.clone(), serde_json::from_str(data).unwrap()));
            if name == until {
                break;
            }
        }
    }
    events
}

#[test]
fn the_page_hears_what_goes_over_mqtt_and_sends_models() {
    let mut line = Line::start(&format!("probation_s = 0\n{LOOPBACK}"));
    let page = page(&line);
    until("it is ready", 20, || get(&format!("{page}/readyz"), &[]).0 == 200);
    assert_eq!(get(&format!("{page}/healthz"), &[]), (200, "ok\n".into()));

    // What there was before this viewer came, as the schemas have it, and the pulse.
    let heard = events(&page, "tick");
    for (name, schema) in [("status", "status"), ("camera", "camera"), ("models/state", "models")] {
        let (_, payload) = heard.iter().find(|(n, _)| n == name).expect(name);
        assert_valid_payload(&validator(schema), payload);
    }
    assert!(heard.iter().any(|(name, line)| name == "log" && line["text"].is_string()));
    let tick = &heard.last().unwrap().1;
    assert!(tick["cameras"]["line"]["ledger"]["inferred"].as_u64().unwrap() > 0, "{tick}");

    // A picture of the camera with what is on it.
    let answer = agent().get(format!("{page}/api/v1/live?cameras=line")).call().unwrap();
    let mut stream = answer.into_body().into_reader();
    let mut number = || {
        let mut bytes = [0; 4];
        stream.read_exact(&mut bytes).unwrap();
        u32::from_be_bytes(bytes) as usize
    };
    let (length, head_length) = (number(), number());
    let mut picture = vec![0; length - 4];
    stream.read_exact(&mut picture).unwrap();
    let (head, jpeg) = picture.split_at(head_length);
    let head: Value = serde_json::from_slice(head).unwrap();
    assert_eq!((&head["camera"], &head["width"]), (&"line".into(), &1280.into()), "{head}");
    assert!(jpeg.starts_with(b"\xff\xd8") && jpeg.len() < 100_000, "{} bytes", jpeg.len());
    assert_eq!(get(&format!("{page}/api/v1/live?cameras=x"), &[]).0, 404);

    // A model, and back, by the page.
    let model = std::fs::read(shipped("models/plates-v2.onnx")).unwrap();
    let push = format!(
        "{page}/api/v1/models/push?id=page-1&name=plates-v2.onnx&manual=false&size={}",
        model.len()
    );
    let mut answer = agent().post(&push).send(&model[..]).unwrap();
    assert_eq!(answer.status().as_u16(), 200, "{:?}", answer.body_mut().read_to_string());
    let job = line.ended("page-1");
    assert_eq!((&job["state"], &job["way"]), (&"SUCCEEDED".into(), &"page".into()), "{job}");
    let (status, said) = post(&format!("{page}/api/v1/models/rollback"), r#"{"id":"back"}"#, &[]);
    assert_eq!(status, 200, "{said}");
    assert_eq!(line.ended("back")["state"], "SUCCEEDED");
    until("the report on both swaps", 15, || line.messages("/models/swaps").len() == 2);
    let heard = events(&page, "ready");
    let swaps: Vec<_> = heard.iter().filter(|(name, _)| name == "models/swaps").collect();
    assert_eq!(swaps.len(), 2, "who comes later hears of both");
    let around = &swaps[0].1["cameras"]["line"];
    assert!(!around["old_ms"].as_array().unwrap().is_empty(), "{around}");
    assert!(!around["new_ms"].as_array().unwrap().is_empty(), "{around}");

    let mut metrics = String::new();
    until("metrics that know of both swaps", 10, || {
        metrics = get(&format!("{page}/metrics"), &[]).1;
        metrics.contains("noblink_swaps_total 2")
    });
    for sample in [
        "noblink_camera_state{camera=\"line\",state=\"streaming\"} 1",
        "noblink_model_info{model=\"plates\",version=\"1\",sha256=",
        "noblink_rollbacks_total 1",
        "noblink_swap_frames_lost_total 0",
        "noblink_mqtt_connected 1",
        "noblink_stage_duration_seconds_bucket{stage=\"inference\",le=\"+Inf\"}",
    ] {
        assert!(metrics.contains(sample), "{sample} is not in\n{metrics}");
    }
    line.stop();
    line.assert_nothing_lost();
}

#[test]
fn on_loopback_other_pages_of_the_browser_are_refused() {
    let line = Line::start(LOOPBACK);
    let page = page(&line);
    let own = page.strip_prefix("http://").unwrap();
    let rollback = format!("{page}/api/v1/models/rollback");
    let body = r#"{"id":"x"}"#;
    let (status, said) = post(&rollback, body, &[("origin", "https://evil.example")]);
    assert!(status == 403 && said.contains("wrong_origin"), "{status} {said}");
    let (status, said) = get(&format!("{page}/api/v1/models"), &[("host", "evil.example")]);
    assert!(status == 403 && said.contains("wrong_host"), "{status} {said}");
    // Its own is heard: there is nothing to go back to, and it is told so.
    let (status, said) = post(&rollback, body, &[("origin", &format!("http://{own}"))]);
    assert!(status == 409 && said.contains("no_previous"), "{status} {said}");

    let (status, html) = get(&page, &[]);
    assert!(status == 200 && html.contains("<title>noblink</title>"));
    for file in html.split(['"', '\'']).filter(|part| part.starts_with('/') && part.contains('.')) {
        assert_eq!(get(&format!("{page}{file}"), &[]).0, 200, "{file}");
    }
    assert!(!html.contains("http://") && !html.contains("https://"), "no request leaves the box");
    assert_eq!(get(&format!("{page}/../etc/passwd"), &[]).0, 404);
}

#[test]
fn elsewhere_the_page_wants_its_token() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("token");
    std::fs::write(&file, "0123456789abcdef\n").unwrap();
    let web = format!("[web]\nlisten = \"0.0.0.0:0\"\ntoken_file = {file:?}");
    let line = Line::start(&web);
    let page = page(&line).replace("0.0.0.0", "127.0.0.1");
    for path in ["api/v1/models", "api/v1/events", "api/v1/live?cameras=line", "metrics"] {
        assert_eq!(get(&format!("{page}/{path}"), &[]).0, 401, "{path}");
    }
    assert_eq!(get(&page, &[]).0, 200, "the login is a page");
    let bearer = |token: &str| format!("Bearer {token}");
    let models = format!("{page}/api/v1/models");
    assert_eq!(get(&models, &[("authorization", &bearer("0123456789abcdef"))]).0, 200);
    assert_eq!(get(&models, &[("authorization", &bearer("0123456789abcdeX"))]).0, 401);
    let login = format!("{page}/api/v1/login");
    assert_eq!(post(&login, r#"{"token":"wrong"}"#, &[]).0, 401);
    let request = agent().post(&login).header("content-type", "application/json");
    let answer = request.send(r#"{"token":"0123456789abcdef"}"#).unwrap();
    let cookie = answer.headers()["set-cookie"].to_str().unwrap().to_owned();
    assert!(cookie.contains("HttpOnly") && cookie.contains("SameSite=Strict"), "{cookie}");
    let cookie = cookie.split(';').next().unwrap();
    assert_eq!(get(&models, &[("cookie", cookie)]).0, 200);
}

/// All of them described, and no other.
#[test]
fn every_metric_is_in_the_documentation() {
    let line = Line::start(LOOPBACK);
    let page = page(&line);
    let mut text = String::new();
    until("metrics", 10, || {
        text = get(&format!("{page}/metrics"), &[]).1;
        !text.is_empty()
    });
    let docs = std::fs::read_to_string(shipped("docs/metrics.md")).unwrap();
    let types = text.lines().filter_map(|l| l.strip_prefix("# TYPE "));
    let exposed: Vec<&str> = types.map(|l| l.split(' ').next().unwrap()).collect();
    let rows = docs.lines().filter_map(|l| l.strip_prefix("| `"));
    let described: Vec<&str> = rows.map(|l| l.split(['`', '{']).next().unwrap()).collect();
    assert_eq!(described, exposed);
}
