//! A service under load that is killed over and over, and how soon it detects again.
#![allow(dead_code)] // for `tests/soak.rs` and a short form in `it`

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use noblink::rtsp::{RtspServer, Settings};
use serde_json::Value;

use super::kills::Dice;
use super::mosquitto::{Mosquitto, Subscriber};
use super::service::{Service, config, shipped};
use super::store::check;
use super::until;

/// So many lives with three cameras of the demo's line and plates 1, each ended by SIGKILL at a
/// random moment of the three seconds after its first detection. Prints how long each took to it.
pub fn under_load(restarts: usize, seed: u64) {
    gst::init().unwrap();
    let server = RtspServer::start(&Settings::default()).unwrap();
    server.mount_clip("/a", &shipped("models/clips/line-a.mp4"), true).unwrap();
    let url = server.url("/a");
    let cameras = ["a", "b", "c"].map(|id| (id, url.as_str(), "publish = \"all\""));
    let models =
        format!("[models]\nfactory = \"{}\"\n", shipped("models/plates-v1.onnx").display());
    let broker = Mosquitto::start("");
    let subscriber = Subscriber::new("5", broker.port, "noblink/v1/test/cameras/+/detections");
    let mqtt = format!("url = \"mqtt://127.0.0.1:{}\"", broker.port);
    let mut dice = Dice(seed);
    let mut started = Instant::now();
    let mut service = Service::start(&config(&mqtt, &cameras, &models));
    let (mut times, mut heard) = (Vec::new(), 0);
    let mut records = BTreeMap::<(String, String, u64), String>::new();
    let mut doubled = 0;
    for life in 0..=restarts {
        let boot = service.boot();
        until("a detection", 60, || subscriber.first_with("/detections", &boot).is_some());
        times.push(started.elapsed());
        std::thread::sleep(Duration::from_millis(dice.below(3000)));
        let messages = subscriber.messages();
        for message in &messages[heard..] {
            let record: Value = serde_json::from_str(&message.payload).unwrap();
            let text = |key: &str| record[key].as_str().unwrap().to_owned();
            let key = (text("camera"), text("boot"), record["seq"].as_u64().unwrap());
            if let Some(before) = records.insert(key, message.payload.clone()) {
                assert_eq!(before, message.payload, "doubled with another content");
                doubled += 1;
            }
        }
        heard = messages.len();
        if life < restarts {
            service.kill();
            let state = check(&service.state_dir());
            assert!(state.slot.active.is_some(), "life {life}: the registry names a model");
            started = Instant::now();
            service.again(&[]);
        }
    }
    assert_eq!(service.stop().code(), Some(0), "{}", service.log());
    // The first life made its state folder and is not a restart.
    let mut again = times.split_off(1);
    again.sort_unstable();
    println!(
        "{restarts} kills, seed {seed:#x}: from start to the first detection heard, median {:.2} s, \
         slowest {:.2} s; {} records, {doubled} of them twice and alike",
        again[again.len() / 2].as_secs_f64(),
        again[again.len() - 1].as_secs_f64(),
        records.len()
    );
}
