//! The configuration's text.

use std::path::Path;

use noblink::camera::source::Source;
use noblink::config::{Broker, Config, Problem, is_prefix, is_slug};

use super::{SECRET, holds_secret};

pub fn check(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let base = Path::new("/etc/noblink");
    // What is said of a camera's address, or of the file as a whole, holds no login.
    let said: String = match Config::parse(text, base) {
        Ok(config) => {
            assert_eq!(format!("{config:?}"), format!("{:?}", Config::parse(text, base).unwrap()));
            sound(&config);
            config.cameras.iter().map(|camera| format!("{:?}", camera.source)).collect()
        }
        Err(problems) => {
            assert!(!problems.is_empty());
            assert!(problems.iter().all(|p| !p.message.is_empty()));
            let of_url = |p: &&Problem| p.path.is_empty() || p.path.ends_with("].url");
            problems.iter().filter(of_url).map(|p| format!("{p}\n")).collect()
        }
    };
    if holds_secret(text) && text.contains(&format!("rtsp://user:{SECRET}@")) {
        assert!(!said.contains(SECRET), "{said}");
    }
}

fn sound(config: &Config) {
    assert!(is_slug(&config.device.id) && is_prefix(&config.mqtt.prefix));
    if let Broker::External(broker) = &config.mqtt.broker {
        assert!(!broker.host.is_empty());
        assert!(broker.tls || broker.client_cert.is_none());
    }
    assert!(!config.cameras.is_empty());
    for (n, camera) in config.cameras.iter().enumerate() {
        assert!(is_slug(&camera.id));
        assert!(config.cameras[..n].iter().all(|other| other.id != camera.id));
        assert!(!camera.pipeline.is_empty() && !camera.pipeline.contains(['/', '.', '\0']));
        assert!((1..=64).contains(&camera.queue));
        assert!(camera.max_fps.is_none_or(|fps| (0.01..=240.0).contains(&fps)));
        let timeout = camera.stall_timeout_s;
        assert!((1.0..=300.0).contains(&timeout));
        assert!(matches!(camera.source, Source::File(_)) || (camera.realtime && !camera.repeat));
    }
    let inference = &config.inference;
    assert!((1..=64).contains(&inference.threads));
    assert!([inference.confidence, inference.iou].iter().all(|v| (0.0..1.0).contains(v)));
    let models = &config.models;
    assert!((1_000_000..=2_000_000_000).contains(&models.max_size));
    assert!((1.0..=100.0).contains(&models.latency_ratio_max));
}
