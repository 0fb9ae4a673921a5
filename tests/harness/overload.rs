//! Several RTSP cameras and a model that can't keep up: what each camera gets of it.
#![allow(dead_code)] // what only `tests/soak.rs` uses

use std::time::{Duration, Instant};

use noblink::rtsp::{self, RtspServer};
use serde_json::Value;

use super::camera::{h265, write_clip};
use super::mosquitto::{Mosquitto, Subscriber};
use super::onnx::{Detector, Output};
use super::service::{Service, config};
use super::until;

/// A camera: its id, size and frames a second.
#[derive(Clone, Copy)]
pub struct Sender {
    pub id: &'static str,
    pub width: u32,
    pub height: u32,
    pub fps: u32,
    pub codec: Codec,
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Codec {
    /// Ten seconds of a moving ball, encoded once: live encoders would take the cores.
    H264,
    /// Encoded as it is sent: the server loops H.264 clips only.
    H265,
}

const fn slow(id: &'static str) -> Sender {
    Sender { id, width: 640, height: 360, fps: 5, codec: Codec::H264 }
}

/// Served by the age of frames, the slow ones would get nothing at all.
pub const ONE_FAST_FIVE_SLOW: [Sender; 6] = [
    Sender { id: "fast", width: 640, height: 360, fps: 60, codec: Codec::H264 },
    slow("slow-1"),
    slow("slow-2"),
    slow("slow-3"),
    slow("slow-4"),
    slow("slow-5"),
];

/// The telemetry of a run, one record every 10 s, and one from the service's end.
pub struct Run {
    senders: Vec<Sender>,
    telemetry: Vec<Value>,
}

impl Run {
    /// Starts everything, and stops it after so many seconds. Every ledger of every record is
    /// exact, or it panics.
    pub fn of(senders: &[Sender], seconds: u64) -> Self {
        gst::init().unwrap();
        let dir = tempfile::tempdir().unwrap();
        let server = RtspServer::start(&rtsp::Settings::default()).unwrap();
        for sender in senders {
            let path = format!("/{}", sender.id);
            let Sender { width, height, fps, .. } = *sender;
            match sender.codec {
                Codec::H264 => {
                    let file = dir.path().join(format!("{}.mp4", sender.id));
                    write_clip(&file, (width, height), fps, fps * 10);
                    server.mount_clip(&path, &file, true).unwrap();
                }
                Codec::H265 => server.mount_launch(&path, &h265(width, height, fps)).unwrap(),
            }
        }
        // Some 50 ms a run on a server's two cores: a fourth of what the cameras send.
        let model = Detector { work: 60, ..Detector::new(Output::Yolo8, 640, 640) };
        let model = model.write(dir.path(), "heavy.onnx");
        let urls: Vec<_> = senders.iter().map(|s| server.url(&format!("/{}", s.id))).collect();
        let cameras: Vec<_> = senders
            .iter()
            .zip(&urls)
            .map(|(s, u)| (s.id, u.as_str(), "publish = \"all\""))
            .collect();
        let rest = format!("[models]\nfactory = \"{}\"\n", model.display());
        let broker = Mosquitto::start("");
        let subscriber = Subscriber::new("5", broker.port, "noblink/v1/test/#");
        let url = format!("url = \"mqtt://127.0.0.1:{}\"", broker.port);
        let mut service = Service::start(&config(&url, &cameras, &rest));

        let records = || -> Vec<Value> {
            let messages = subscriber.messages();
            let telemetry = messages.iter().filter(|m| m.topic.ends_with("/telemetry"));
            telemetry.map(|m| serde_json::from_str(&m.payload).unwrap()).collect()
        };
        let end = Instant::now() + Duration::from_secs(seconds);
        until("the time is over", seconds + 20, || Instant::now() >= end);
        assert_eq!(service.stop().code(), Some(0), "{}", service.log());
        until("offline", 10, || subscriber.has("noblink/v1/test/availability", "offline"));
        let run = Self { senders: senders.to_vec(), telemetry: records() };
        assert!(run.telemetry.len() as u64 > seconds / 11, "{} records", run.telemetry.len());
        for record in &run.telemetry {
            senders.iter().for_each(|s| assert_exact(s.id, &record["cameras"][s.id]["ledger"]));
        }
        run
    }

    /// Prints a table of what each camera got from the first record, which holds the start, to the
    /// last, and holds it to 0.9 of its max-min fair share.
    pub fn assert_fair(&self) {
        let (first, last) = (&self.telemetry[0], self.telemetry.last().unwrap());
        let delta = |s: &Sender, count: &str| {
            let of = |t: &Value| t["cameras"][s.id]["ledger"][count].as_f64().unwrap();
            of(last) - of(first)
        };
        let offered: Vec<_> = self.senders.iter().map(|s| delta(s, "offered")).collect();
        let inferred: Vec<_> = self.senders.iter().map(|s| delta(s, "inferred")).collect();
        let shares = fair_shares(&offered, inferred.iter().sum());
        println!("\ncamera     offered  inferred  fair share   ratio   p99 ms");
        for (i, s) in self.senders.iter().enumerate() {
            let ratio = inferred[i] / shares[i];
            println!(
                "{:<8} {:>9} {:>9} {:>11.0} {ratio:>7.3} {:>8}",
                s.id,
                offered[i],
                inferred[i],
                shares[i],
                last["cameras"][s.id]["latency_ms"]["p99"]
            );
        }
        let us = |t: &Value| t["time_us"].as_f64().unwrap();
        let seconds = (us(last) - us(first)) / 1e6;
        let rate = |counts: &[f64]| counts.iter().sum::<f64>() / seconds;
        println!(
            "{:.1} frames/s offered, {:.1} inferred, over {seconds:.0} s",
            rate(&offered),
            rate(&inferred)
        );
        for (i, s) in self.senders.iter().enumerate() {
            let ratio = inferred[i] / shares[i];
            assert!(ratio >= 0.9, "{} got {ratio:.3} of its fair share", s.id);
        }
    }

    /// Prints memory after a minute and at the end, and allows 10 % between the two.
    pub fn assert_flat(&self) {
        let rss = |t: &Value| t["host"]["rss_mb"].as_f64().unwrap();
        let early = rss(&self.telemetry[self.telemetry.len().min(6) - 1]);
        let late = rss(self.telemetry.last().unwrap());
        println!(
            "RSS {early:.1} MB after 1 min, {late:.1} MB at the end, ratio {:.3}",
            late / early
        );
        assert!(late <= 1.1 * early, "memory grows");
    }
}

/// Each camera's max-min fair share of what was inferred in all.
fn fair_shares(offered: &[f64], inferred: f64) -> Vec<f64> {
    let mut order: Vec<usize> = (0..offered.len()).collect();
    order.sort_by(|a, b| offered[*a].total_cmp(&offered[*b]));
    let (mut left, mut shares) = (inferred, vec![0.0; offered.len()]);
    for (done, camera) in order.into_iter().enumerate() {
        shares[camera] = f64::min(offered[camera], left / (offered.len() - done) as f64);
        left -= shares[camera];
    }
    shares
}

/// Both equations hold.
pub fn assert_exact(id: &str, ledger: &Value) {
    let n = |key: &str| ledger[key].as_u64().unwrap();
    let dropped: u64 =
        ledger["dropped"].as_object().unwrap().values().map(|v| v.as_u64().unwrap()).sum();
    assert_eq!(n("decoded"), n("rate_limited") + n("corrupt") + n("offered"), "{id}: {ledger}");
    let done = n("inferred") + n("failed") + dropped + n("queued") + n("in_flight");
    assert_eq!(n("offered"), done, "{id}: {ledger}");
}
