//! `noblink demo`: starts the demo, shows what arrives over MQTT, sums up.

use std::time::{Duration, Instant};

use super::{Failure, Outcome};
use crate::demo::story::Story;
use crate::demo::view::View;
use crate::demo::{self, Demo};
use crate::mqtt::listener;
use crate::signals::Signals;
use crate::snapshot::Snapshot;

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Stop by itself after so many seconds
    #[arg(long, value_name = "N")]
    seconds: Option<u64>,
}

pub(super) fn run(args: Args) -> Outcome {
    let signals = Signals::install()?;
    let options = demo::Options { probation_s: 5, story: true, ..Default::default() };
    let mut demo = demo::start(&options)?;
    let filter = format!("{}/#", demo.app.topics().root());
    let inbound = listener::listen(demo.app.broker(), "noblink-demo-view", &filter)
        .map_err(anyhow::Error::from)?;
    introduce(&demo, demo.app.broker().port);

    let (mut view, mut story) = (View::default(), Story::default());
    let began = Instant::now();
    let end = args.seconds.map(|s| Instant::now() + Duration::from_secs(s));
    let mut shown = Instant::now();
    loop {
        let left = end.map_or(Duration::MAX, |e| e.saturating_duration_since(Instant::now()));
        if left.is_zero() || signals.wait(left.min(Duration::from_secs(1))) {
            break;
        }
        for message in inbound.try_iter() {
            if message.topic.ends_with("/detections") {
                view.detections(&message.payload);
            }
            for line in story.lines(&message.topic, &message.payload) {
                say!("{line}");
            }
        }
        if let Some(text) = demo.publish_due(began.elapsed())? {
            say!("\n{text}");
        }
        for line in view.lines(shown.elapsed().as_secs_f64()) {
            say!("{line}");
        }
        shown = Instant::now();
        demo.app.tick();
    }
    let last = demo.stop();
    sum_up(&last, &view)
}

fn introduce(demo: &Demo, port: u16) {
    let root = demo.app.topics().root();
    if let Some(page) = demo.app.page() {
        say!("\nLook at it in a browser: http://{page}");
    }
    say!(
        "\nTwo RTSP cameras, a model and an MQTT broker run on this machine.\n\
         What follows is made of the records that arrive over MQTT. See them in another terminal:\n\n    \
         mosquitto_sub -h 127.0.0.1 -p {port} -t '{root}/cameras/+/detections'\n    \
         mosquitto_sub -h 127.0.0.1 -p {port} -t '{root}/status' -C 1\n\n\
         In 8 s a better model is published while they run, then a bad one. Meanwhile, or later, look\n\
         at one of these cameras, then at one of yours. Ctrl-C ends this.\n\n    \
         target/release/noblink probe {}\n",
        demo.camera_url
    );
}

fn sum_up(last: &Snapshot, view: &View) -> Outcome {
    say!();
    let mut exact = true;
    for camera in &last.cameras {
        let ledger = &camera.lane.ledger;
        let seen = view.cameras.get(&camera.id).cloned().unwrap_or_default();
        exact &= ledger.is_exact() && seen.missing == 0 && seen.lost == 0;
        say!(
            "{:<8} {} frames offered = {} inferred + {} failed + {} dropped; \
             {} records received, {} missing, {} frames unaccounted for",
            camera.id,
            ledger.offered,
            ledger.inferred,
            ledger.failed,
            ledger.dropped.total(),
            seen.records,
            seen.missing,
            seen.lost,
        );
    }
    if exact {
        say!("The ledger is exact.");
        Ok(())
    } else {
        eprintln!("The ledger is NOT exact: this is a defect, please report it.");
        Err(Failure::Said)
    }
}
