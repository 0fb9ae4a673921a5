//! What Home Assistant is told. `tests/peers/ask_homeassistant.py` asks Home Assistant itself.

use std::collections::BTreeSet;

use serde_json::{Value, json};

use crate::harness::http::Shelf;
use crate::harness::line::{Line, PROVED_S, manifest};
use crate::harness::mosquitto::{Message, Subscriber, publish};
use crate::harness::service::shipped;
use crate::harness::until;

const ON: &str = "[homeassistant]\ndiscovery_prefix = \"homeassistant\"";
/// Runs may take long: on a busy machine the probation would end for its latency.
const BUSY: &str = "probation_s = 3\nlatency_budget_ms = 5000\n";
const BOX: &str = "homeassistant/device/noblink_test/config";
const CAMERA: &str = "homeassistant/device/noblink_test/line/config";
const V1: &str = "plates 1 (03a0a3cf)";
const V2: &str = "plates 2 (6d38f97d)";

/// A service that can fetch plates 2, and what it tells Home Assistant.
struct House {
    line: Line,
    told: Subscriber,
    shelf: Shelf,
}

impl House {
    fn start() -> Self {
        let shelf = Shelf::start();
        let line = Line::start(&format!("{BUSY}{}\n{ON}", shelf.allowed()));
        let told = Subscriber::new("5", line.broker.port, "homeassistant/device/#");
        Self { line, told, shelf }
    }

    /// What was said last on a topic of Home Assistant's.
    fn described(&self, topic: &str) -> Value {
        let mut last = None;
        until(topic, 20, || {
            last = last_on(&self.told, topic).filter(|m| !m.payload.is_empty());
            last.is_some()
        });
        serde_json::from_str(&last.expect("waited for").payload).unwrap()
    }

    fn desire(&self, id: &str, install: &str) {
        let bytes = std::fs::read(shipped("models/plates-v2.onnx")).unwrap();
        let manifest = manifest(&bytes, &json!({}));
        let source = self.shelf.put("/plates-2.onnx", bytes);
        self.line.command(
            "desired",
            &json!({ "schema": "noblink.desired/1", "id": id, "source": source,
                "install": install, "manifest": manifest }),
        );
    }

    /// Does what Home Assistant does when someone presses this.
    fn press(&self, component: &Value, payload: &str) {
        let topic = component["command_topic"].as_str().unwrap();
        publish(self.line.broker.port, &["-t", topic, "-m", payload]);
    }
}

fn last_on(subscriber: &Subscriber, topic: &str) -> Option<Message> {
    subscriber.messages().into_iter().rfind(|m| m.topic == topic)
}

/// Held against what Home Assistant accepts; in words.
fn stage(state: &Value) -> String {
    for (key, value) in state.as_object().unwrap() {
        let fits = match key.as_str() {
            "installed_version" | "latest_version" => value.is_string(),
            "release_summary" => value.as_str().is_some_and(|s| s.chars().count() <= 255),
            "in_progress" => value.is_boolean(),
            "update_percentage" => value.is_null() || value.as_u64().is_some_and(|n| n <= 100),
            _ => false,
        };
        assert!(fits, "Home Assistant discards a state with {key} = {value}");
    }
    let text = |key: &str| state[key].as_str().unwrap();
    let (installed, latest) = (text("installed_version"), text("latest_version"));
    match state["in_progress"].as_bool().unwrap() {
        true => format!("{installed}, in progress"),
        false if installed == latest => format!("{installed} installed"),
        false => format!("{installed}, available: {latest}"),
    }
}

#[test]
fn the_update_entity_lives_from_available_over_in_progress_to_installed_and_back() {
    let house = House::start();
    let described = house.described(BOX);
    let (model, rollback) =
        (&described["components"]["model"], &described["components"]["rollback"]);
    let topic = model["state_topic"].as_str().unwrap();
    let states = || house.line.messages(topic);
    let stages = || {
        let mut stages: Vec<_> = states().iter().map(stage).collect();
        stages.dedup();
        // Before the first model is up, if the link was quicker.
        stages.retain(|s| s != "none installed");
        stages
    };
    let reach = |end: &str| {
        let what = format!("\"{end}\", after {:?}", stages());
        until(&what, PROVED_S, || stages().last().is_some_and(|s| s == end));
    };
    reach(&format!("{V1} installed"));
    house.desire("r17", "manual");
    reach(&format!("{V1}, available: {V2}"));
    let summary = states().last().unwrap()["release_summary"].clone();
    assert!(summary.as_str().unwrap().contains("times the active model's time"), "{summary}");
    house.press(model, model["payload_install"].as_str().unwrap());
    reach(&format!("{V2} installed"));
    // What Home Assistant makes of the template.
    assert!(rollback["command_template"].as_str().unwrap().contains("{\"id\":\"homeassistant-{{"));
    house.press(rollback, "{\"id\":\"homeassistant-1795375278123\"}");
    reach(&format!("{V1} installed"));
    assert_eq!(
        stages(),
        [
            format!("{V1} installed"),
            format!("{V1}, in progress"),
            format!("{V1}, available: {V2}"),
            format!("{V1}, in progress"),
            format!("{V2} installed"),
            format!("{V1} installed"),
        ]
    );
    let states = states();
    let on_the_way: Vec<_> = states.iter().filter(|s| s["in_progress"] == true).collect();
    let percentages: Vec<_> =
        on_the_way.iter().filter_map(|s| s["update_percentage"].as_u64()).collect();
    assert!(percentages.is_sorted() && percentages.last() == Some(&90), "{percentages:?}");
    let named = |s: &&&Value| s["latest_version"] == V2;
    assert!(on_the_way.iter().filter(named).count() >= 2, "by its name as soon as it is known");
}

/// Everything that a component reads or writes is one of our topics.
fn assert_topics_are_ours(component: &Value, key: &str) {
    let topics = ["state_topic", "command_topic", "image_topic", "json_attributes_topic"];
    let of = topics.iter().filter_map(|t| component[*t].as_str());
    let availability = component["availability"].as_array().into_iter().flatten();
    let all = of.chain(availability.map(|a| a["topic"].as_str().unwrap()));
    for topic in all {
        assert!(topic.starts_with("noblink/v1/test/"), "{key}: {topic}");
    }
}

#[test]
fn the_box_and_its_cameras_are_described_and_follow_model_configuration_and_home_assistant() {
    let mut house = House::start();
    let (described, camera) = (house.described(BOX), house.described(CAMERA));
    assert_eq!(camera["device"]["via_device"], described["device"]["identifiers"][0]);
    let mut ids = BTreeSet::new();
    for one in [&described, &camera] {
        assert!(one["origin"]["name"].is_string(), "{one}");
        for (key, component) in one["components"].as_object().unwrap() {
            assert!(component["platform"].is_string() && component["name"].is_string(), "{key}");
            let id = component["unique_id"].as_str().unwrap();
            assert!(ids.insert(id.to_owned()), "{id} twice");
            assert_topics_are_ours(component, key);
        }
    }
    let keys = |camera: &Value| -> Vec<String> {
        camera["components"].as_object().unwrap().keys().cloned().collect()
    };
    assert_eq!(
        keys(&camera),
        [
            "count_dent",
            "count_hole",
            "count_plate",
            "enabled",
            "objects",
            "occupancy_dent",
            "occupancy_hole",
            "occupancy_plate",
            "rate",
            "streaming"
        ]
    );

    // Another model, other labels; a component that is gone has only its platform left.
    house.desire("r18", "auto");
    let has = |key: &str| house.described(CAMERA)["components"][key].clone();
    until("scratches", PROVED_S, || has("occupancy_scratch")["device_class"] == "occupancy");
    house.line.ended("r18");
    house.line.command("rollback", &json!({ "id": "back" }));
    until("no scratches", 20, || {
        has("occupancy_scratch") == json!({ "platform": "binary_sensor" })
    });
    assert_eq!(has("count_scratch"), json!({ "platform": "sensor" }));
    assert!(has("occupancy_plate")["unique_id"].is_string());

    // Home Assistant starts: all comes again; what it says at its end brings nothing.
    let count = |topic: &str| house.told.messages().iter().filter(|m| m.topic == topic).count();
    let before = (count(BOX), count(CAMERA));
    let port = house.line.broker.port;
    publish(port, &["-t", "homeassistant/status", "-m", "offline"]);
    publish(port, &["-t", "homeassistant/status", "-m", "online"]);
    until("the descriptions again", 10, || (count(BOX), count(CAMERA)) > before);
    until("both", 10, || count(CAMERA) > before.1);
    assert_eq!((count(BOX), count(CAMERA)), (before.0 + 1, before.1 + 1));

    // A broker that forgot everything is told everything.
    house.line.broker.restart();
    house.told = Subscriber::new("5", port, "homeassistant/device/#");
    house.described(BOX);
    house.described(CAMERA);

    // A camera that the configuration has no more.
    let without = house.line.config.split("[[camera]]").next().unwrap().to_owned();
    let rest = house.line.config.split_once("[models]").unwrap().1;
    house.line.service.reload(&format!("{without}[models]{rest}"));
    until("the camera's description is removed", 30, || {
        last_on(&house.told, CAMERA).is_some_and(|m| m.payload.is_empty())
    });
    assert!(!last_on(&house.told, BOX).unwrap().payload.is_empty());
}

#[test]
fn nothing_is_told_unless_it_is_wanted() {
    let line = Line::start("");
    let all = Subscriber::new("5", line.broker.port, "#");
    until("the retained state", 10, || all.last("/models/state").is_some());
    assert!(all.messages().iter().all(|m| m.topic.starts_with("noblink/v1/test/")));
    assert!(all.last("/models/homeassistant").is_none());
}
