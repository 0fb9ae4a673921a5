//! Cameras that are switched off and on, and those that come, change and go with the configuration:
//! by the real program, over a real broker.

use serde_json::Value;

use crate::harness::mosquitto::{Mosquitto, Subscriber, publish};
use crate::harness::schema::{assert_valid, validator};
use crate::harness::service::{Service, config, plates};
use crate::harness::until;

const SMALL: &str = "test://?fps=10&width=320&height=240";
const ALL: &str = "publish = \"all\"\nqueue = 64";

struct Site {
    service: Service,
    subscriber: Subscriber,
    broker: Mosquitto,
}

impl Site {
    fn start(cameras: &[(&str, &str, &str)]) -> Self {
        let broker = Mosquitto::start("");
        let subscriber = Subscriber::new("5", broker.port, "noblink/v1/test/#");
        let service = Service::start(&text(&broker, cameras, ""));
        Self { service, subscriber, broker }
    }

    fn on(&self, topic: &str) -> Vec<Value> {
        let topic = format!("noblink/v1/test/{topic}");
        let messages = self.subscriber.messages();
        let of = messages.iter().filter(|m| m.topic == topic);
        of.map(|m| serde_json::from_str(&m.payload).unwrap_or_default()).collect()
    }

    fn records(&self, camera: &str) -> Vec<Value> {
        self.on(&format!("cameras/{camera}/detections"))
    }

    /// So many records more than there are now.
    fn until_more(&self, camera: &str, count: usize) {
        let before = self.records(camera).len();
        until(&format!("records of {camera}"), 30, || self.records(camera).len() >= before + count);
    }

    fn until_state(&self, camera: &str, state: &str) {
        until(&format!("{camera} is {state}"), 30, || {
            let last = self.on(&format!("cameras/{camera}/status"));
            last.last().is_some_and(|s| s["state"] == state)
        });
    }

    /// Publishes a switch with a response topic and returns the answer.
    fn switch(&self, camera: &str, args: &[&str], id: &str) -> Value {
        let topic = format!("noblink/v1/test/cmd/cameras/{camera}/enabled");
        let answer = format!("noblink/v1/test/reply/{id}");
        let fixed = ["-V", "5", "-D", "publish", "response-topic", &answer, "-t", &topic];
        publish(self.broker.port, &[&fixed, args].concat());
        until(&format!("the answer {id}"), 10, || !self.on(&format!("reply/{id}")).is_empty());
        self.on(&format!("reply/{id}")).remove(0)
    }

    /// Every frame of this camera in this life is told of, once, in order.
    fn assert_contiguous(&self, camera: &str) {
        let records = self.records(camera);
        for pair in records.windows(2).filter(|p| p[0]["boot"] == p[1]["boot"]) {
            let [before, after] = [&pair[0], &pair[1]];
            let n = |v: &Value| v.as_u64().expect("a count");
            assert_eq!(n(&after["seq"]), n(&before["seq"]) + 1, "{camera}");
            let since: u64 = after["since"].as_object().unwrap().values().map(n).sum();
            let next = n(&before["frame"]["id"]) + 1 + since;
            assert_eq!(n(&after["frame"]["id"]), next, "{camera}");
        }
    }

    /// Beyond that: it never lost its connection, and no frame was dropped.
    fn assert_untouched(&self, camera: &str) {
        self.assert_contiguous(camera);
        let records = self.records(camera);
        let missed: Vec<_> = records.iter().filter(|r| r["since"]["dropped"] != 0).collect();
        assert!(missed.is_empty(), "{camera}: frames were dropped before {missed:?}");
        let status = self.on(&format!("cameras/{camera}/status"));
        assert!(status.iter().all(|s| s["connects"].as_u64() <= Some(1)), "{status:?}");
    }

    /// Statuses, telemetry and answers are as described, and each ledger adds up.
    fn assert_described(&self) {
        for (topic, schema) in [("/telemetry", "telemetry"), ("/reply/", "reply")] {
            let schema = validator(schema);
            let messages = self.subscriber.messages();
            for message in messages.iter().filter(|m| m.topic.contains(topic)) {
                assert_valid(&schema, message);
            }
        }
        let schema = validator("camera");
        let messages = self.subscriber.messages();
        let of_cameras = |m: &&crate::harness::mosquitto::Message| {
            m.topic.contains("/cameras/") && m.topic.ends_with("/status") && !m.payload.is_empty()
        };
        messages.iter().filter(of_cameras).for_each(|m| drop(assert_valid(&schema, m)));
        let telemetry = self.on("telemetry");
        let cameras = telemetry.iter().flat_map(|t| t["cameras"].as_object().unwrap());
        cameras.for_each(|(id, c)| crate::harness::overload::assert_exact(id, &c["ledger"]));
    }
}

fn text(broker: &Mosquitto, cameras: &[(&str, &str, &str)], rest: &str) -> String {
    let url = format!("url = \"mqtt://127.0.0.1:{}\"", broker.port);
    config(&url, cameras, &(plates() + rest))
}

#[test]
fn a_camera_is_switched_over_mqtt_and_stays_off_over_a_kill() {
    let mut site = Site::start(&[("gate", SMALL, ALL), ("yard", SMALL, ALL)]);
    site.until_more("gate", 5);
    site.until_more("yard", 5);

    let answer = site.switch("gate", &["-m", "OFF"], "off-1");
    assert_eq!((&answer["ok"], &answer["result"]), (&true.into(), &"done".into()));
    site.until_state("gate", "disabled");
    let told = site.records("gate").len();
    site.until_more("yard", 20);
    // The frame that was with the worker may come yet, none that is younger than the switch.
    let off = site.on("cameras/gate/status").pop().unwrap();
    let after = site.records("gate").split_off(told);
    assert!(after.len() <= 1, "nothing comes from a camera that is off: {after:?}");
    let us = |v: &Value| v.as_i64().expect("microseconds");
    let of_before = |r: &Value| us(&r["time_us"]) <= us(&off["since_us"]);
    assert!(after.iter().all(of_before), "{off}: {after:?}");

    for (camera, args, id, code) in [
        ("gate", &["-m", "on"][..], "wrong", "bad_command"),
        ("gate", &["-n"], "empty", "bad_command"),
        ("gtae", &["-m", "ON"], "unknown", "unknown_camera"),
    ] {
        let answer = site.switch(camera, args, id);
        assert_eq!((&answer["ok"], &answer["reason"]["code"]), (&false.into(), &code.into()));
    }
    let unknown = site.on("reply/unknown").remove(0);
    let message = unknown["reason"]["message"].as_str().unwrap().to_owned();
    assert_eq!(message, "there is no camera \"gtae\"; there are: gate, yard");
    // A retained one comes as such when the service subscribes; here it is not off by it.
    let topic = "noblink/v1/test/cmd/cameras/yard/enabled";
    publish(site.broker.port, &["-t", topic, "-m", "OFF", "-r"]);
    site.until_state("yard", "disabled");
    site.service.kill();
    site.service.again(&[]);
    site.service.says("a retained command is ignored", 30);
    let switched = site.switch("yard", &["-m", "ON"], "yard-on");
    assert_eq!(switched["ok"], true);

    let boot = |site: &Site| site.on("status").last().map(|s| s["boot"].clone());
    site.until_more("yard", 10);
    let (now, gate) = (boot(&site), site.records("gate"));
    assert!(gate.iter().all(|r| Some(&r["boot"]) != now.as_ref()), "it is off, kill or not");
    site.until_state("gate", "disabled");
    site.switch("gate", &["-m", "ON"], "on-1");
    site.until_more("gate", 5);
    assert_eq!(site.service.stop().code(), Some(0), "{}", site.service.log());
    until("the last telemetry", 5, || {
        site.subscriber.has("noblink/v1/test/availability", "offline")
    });
    ["gate", "yard"].iter().for_each(|camera| site.assert_contiguous(camera));
    site.assert_described();

    // Taken out while it was not looking: its status is cleared at the next start.
    let one = text(&site.broker, &[("yard", SMALL, ALL)], "");
    std::fs::write(site.service.dir.path().join("noblink.toml"), one).unwrap();
    site.service.again(&[]);
    until("the gate's status is cleared", 30, || {
        let topic = "noblink/v1/test/cameras/gate/status";
        site.subscriber.messages().iter().any(|m| m.topic == topic && m.payload.is_empty())
    });
    assert_eq!(site.service.stop().code(), Some(0));
}

#[test]
fn an_edit_of_the_configuration_touches_only_the_cameras_that_it_names() {
    let faster = "test://?fps=20&width=320&height=240";
    let mut site = Site::start(&[
        ("same", SMALL, ALL),
        ("told", SMALL, ALL),
        ("moved", SMALL, ALL),
        ("gone", SMALL, ALL),
    ]);
    let reload = |site: &Site, cameras: &[(&str, &str, &str)], rest: &str| {
        site.service.reload(&text(&site.broker, cameras, rest));
    };
    ["same", "told", "moved", "gone"].iter().for_each(|camera| site.until_more(camera, 5));

    reload(&site, &[("same", "rtsp://u:secret@", "queue = 0")], "");
    site.service.says("the configuration is not reloaded, nothing changes", 10);
    site.service.says("camera[0].queue = 0: must be a whole number from 1 to 64", 1);
    assert!(!site.service.log().contains("secret"));
    ["same", "gone"].iter().for_each(|camera| site.until_more(camera, 5));

    let thinned = "publish = \"all\"\nqueue = 64\npublish_max_hz = 2";
    let cameras = [
        ("new", SMALL, ALL),
        ("moved", faster, ALL),
        ("same", SMALL, ALL),
        ("told", SMALL, thinned),
    ];
    reload(&site, &cameras, "[inference]\nprovider = \"cpu\"\niou = 0.6\n");
    site.service.says("reloaded; cameras added: new; changed: moved, told; removed: gone", 10);
    site.service.says("takes effect at the next start: inference.iou", 1);
    ["new", "same", "moved"].iter().for_each(|camera| site.until_more(camera, 20));
    site.until_more("told", 3);
    let moved = site.on("cameras/moved/status");
    assert_eq!(moved.last().unwrap()["connects"], 2);
    // The last word on a camera, its ledger, and then nothing that a broker would keep.
    site.until_state("gone", "removed");
    until("a last telemetry record of the camera that is gone", 15, || {
        site.on("telemetry").iter().any(|t| t["cameras"]["gone"]["state"] == "removed")
    });
    let kept =
        |site: &Site| Subscriber::new("5", site.broker.port, "noblink/v1/test/cameras/+/status");
    until("its status is cleared", 15, || {
        let topic = "noblink/v1/test/cameras/gone/status";
        site.subscriber.messages().iter().any(|m| m.topic == topic && m.payload.is_empty())
    });
    let fresh = kept(&site);
    until("the others' statuses", 5, || fresh.messages().len() >= 4);
    assert!(fresh.messages().iter().all(|m| !m.topic.contains("/gone/")));

    // Back again, its numbers run on; then none at all.
    reload(&site, &[("same", SMALL, ALL), ("gone", SMALL, ALL)], "");
    site.until_more("gone", 5);
    site.until_more("same", 5);
    reload(&site, &[], "");
    site.service.says("removed: same, gone", 10);
    until("advice", 10, || {
        let status = site.on("status").pop().unwrap_or_default();
        status["advice"].as_str().is_some_and(|a| a.contains("noblink probe"))
    });
    site.service.kill();
    assert!(!site.service.log().contains("does not add up"));
    ["new", "moved", "told", "gone"].iter().for_each(|camera| site.assert_contiguous(camera));
    site.assert_untouched("same");
    assert!(site.records("told").iter().all(|r| r["since"]["dropped"] == 0));
    let told = site.on("cameras/told/status");
    let streamed = told.iter().filter(|s| s["state"] != "removed");
    assert!(streamed.clone().all(|s| s["connects"].as_u64() <= Some(1)), "{told:?}");
    site.assert_described();
}
