//! Prometheus itself: it takes our metrics, our rules and what the Grafana board asks. Wants its
//! programs in `lib/prometheus`, where `make test-monitoring` puts them.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use serde_json::{Value, json};

use crate::harness::line::Line;
use crate::harness::service::shipped;
use crate::harness::{free_port, until};

fn program(name: &str) -> PathBuf {
    let path = shipped("lib/prometheus/usr/bin").join(name);
    assert!(path.exists(), "{} is missing: make test-monitoring fetches it", path.display());
    path
}

/// Runs `promtool` to its end; it must have nothing to say against its input.
fn promtool(args: &[&str], input: &str) -> String {
    let mut child = Command::new(program("promtool"))
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "promtool {args:?}: {said}");
    said.into_owned()
}

fn file(relative: &str) -> String {
    shipped(relative).to_str().unwrap().to_owned()
}

/// A Prometheus that scrapes one box, ended with this value.
struct Prometheus {
    child: Child,
    api: String,
    _dir: tempfile::TempDir,
}

impl Prometheus {
    fn start(target: &str) -> Self {
        let (dir, port) = (tempfile::tempdir().unwrap(), free_port());
        // The shipped example but for pace and address.
        let example = std::fs::read_to_string(shipped("deploy/prometheus/prometheus.yml")).unwrap();
        let text = example
            .replace("scrape_interval: 15s", "scrape_interval: 1s\n  evaluation_interval: 1s")
            .replace("127.0.0.1:8080", target)
            .replace("noblink.rules.yml", &file("deploy/prometheus/noblink.rules.yml"));
        assert!(text.contains("interval: 1s") && text.contains(target), "{text}");
        let config = dir.path().join("prometheus.yml");
        std::fs::write(&config, text).unwrap();
        let child = Command::new(program("prometheus"))
            .arg(format!("--config.file={}", config.display()))
            .arg(format!("--storage.tsdb.path={}", dir.path().join("data").display()))
            .arg(format!("--web.listen-address=127.0.0.1:{port}"))
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        Self { child, api: format!("http://127.0.0.1:{port}/api/v1"), _dir: dir }
    }

    fn get(&self, path: &str, query: &[(&str, &str)]) -> Option<Value> {
        let request = ureq::get(&format!("{}/{path}", self.api));
        let request = query.iter().fold(request, |r, (name, value)| r.query(*name, *value));
        let text = request.call().ok()?.body_mut().read_to_string().ok()?;
        Some(serde_json::from_str::<Value>(&text).ok()?["data"].clone())
    }

    fn answers(&self, expression: &str) -> usize {
        let data = self.get("query", &[("query", expression)]).unwrap_or_default();
        data["result"].as_array().map_or(0, Vec::len)
    }
}

impl Drop for Prometheus {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Title and expression of everything that the board asks, as Grafana would ask it for all boxes.
fn asked(board: &Path) -> Vec<(String, String)> {
    let board: Value = serde_json::from_str(&std::fs::read_to_string(board).unwrap()).unwrap();
    let mut asked = Vec::new();
    for panel in board["panels"].as_array().unwrap().iter().filter(|p| p["type"] != "row") {
        let targets = panel["targets"].as_array().unwrap();
        assert!(!targets.is_empty(), "{}", panel["title"]);
        for target in targets {
            let expression = target["expr"].as_str().unwrap();
            let expression = ["$instance", "$camera"]
                .iter()
                .fold(expression.to_owned(), |e, v| e.replace(v, ".*"));
            let expression = expression.replace("$__rate_interval", "15s");
            assert!(!expression.contains('$'), "{expression}");
            asked.push((panel["title"].as_str().unwrap().to_owned(), expression));
        }
    }
    asked
}

#[test]
#[ignore = "wants Prometheus: make test-monitoring"]
fn prometheus_takes_the_metrics_and_the_rules_and_answers_each_panel_of_the_board() {
    let models = "probation_s = 1\nlatency_budget_ms = 5000\n[web]\nlisten = \"127.0.0.1:0\"";
    let line = Line::start(models);
    let log = line.service.log();
    let page = log.split_once("the page is at http://").unwrap().1.lines().next().unwrap().trim();
    let prometheus = Prometheus::start(page);
    line.push("two", &std::fs::read(shipped("models/plates-v2.onnx")).unwrap());
    assert_eq!(line.over("two")["state"], "SUCCEEDED");
    line.command("rollback", &json!({ "id": "back" }));
    assert_eq!(line.over("back")["state"], "SUCCEEDED");

    let metrics = || {
        let mut answer = ureq::get(&format!("http://{page}/metrics")).call().unwrap();
        answer.body_mut().read_to_string().unwrap()
    };
    until("both swaps in the metrics", 20, || metrics().contains("noblink_swaps_total 2"));
    let text = metrics();
    assert!(text.contains("noblink_jobs_total{state=\"succeeded\"} 2"), "{text}");
    assert_eq!(promtool(&["check", "metrics"], &text).trim(), "");
    promtool(&["check", "rules", &file("deploy/prometheus/noblink.rules.yml")], "");
    promtool(&["check", "config", &file("deploy/prometheus/prometheus.yml")], "");
    promtool(&["test", "rules", &file("deploy/prometheus/noblink.rules.test.yml")], "");

    let asked = asked(&shipped("deploy/grafana/noblink.json"));
    assert!(asked.len() >= 30, "{}", asked.len());
    for (title, expression) in &asked {
        let what = format!("an answer for \"{title}\": {expression}");
        until(&what, 60, || prometheus.answers(expression) > 0);
    }
    println!("{} queries of the board have an answer", asked.len());
    // Each metric that rules and board name is one of ours.
    let rules = std::fs::read_to_string(shipped("deploy/prometheus/noblink.rules.yml")).unwrap();
    let exposed: Vec<&str> =
        text.lines().filter_map(|l| l.strip_prefix("# TYPE ")?.split(' ').next()).collect();
    let all = asked.iter().map(|(_, e)| e.as_str()).chain([rules.as_str()]).collect::<String>();
    let names = all.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
    for name in names.filter(|n| n.starts_with("noblink_")) {
        let family = ["_bucket", "_sum", "_count"].iter().find_map(|s| name.strip_suffix(s));
        assert!(exposed.contains(&family.unwrap_or(name)), "{name} is no metric");
    }

    let groups = prometheus.get("rules", &[]).unwrap();
    let rules = groups["groups"][0]["rules"].as_array().unwrap().clone();
    assert!(rules.iter().all(|r| r["health"] != "err"), "{rules:?}");
    // What has just happened, and nothing else. (A busy machine drops frames beside a swap.)
    let expected = ["NoblinkRollback", "NoblinkSwapLostFrames"];
    for rule in rules.iter().filter(|r| r["state"] == "firing") {
        assert!(expected.iter().any(|name| rule["name"] == *name), "{rule}");
    }
}
