//! Small JPEG pictures of what the worker sees, with what it found: for people who look at them, and
//! of events, for whoever subscribes.
//!
//! Costs an atomic load a frame while nobody looks. While someone does, the worker lends up to six
//! frames a second and copies what it found in them; scaling and encoding happen on a thread of low
//! priority, once for all who look.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow};
use crossbeam_channel::{Receiver, Sender, bounded};
use gst::prelude::*;
use serde::Serialize;
use tokio::sync::broadcast;
use tracing::warn;

use crate::camera::frame::Frame;
use crate::host;
use crate::records::{Bounds, rounded};

/// Shortest time between two pictures of a camera.
const INTERVAL: Duration = Duration::from_millis(160);
/// Longer side of a picture, pixels.
const SIDE_MAX: u32 = 640;
/// A picture should not take more: six a second are 270 kB.
const BYTES_WANTED: usize = 45_000;
/// Frames that wait for the encoder; those beyond are passed over.
const WAITING_MAX: usize = 4;
/// How long the encoder may take for one picture.
const ENCODE_WITHIN: gst::ClockTime = gst::ClockTime::from_seconds(2);
/// Qualities of JPEG between which the size is kept.
const QUALITY: std::ops::RangeInclusive<i32> = 30..=80;

/// A picture as it goes to viewers: the length of the head (4 bytes, big end first), the head
/// ([`Head`] as JSON), the JPEG file.
pub type Picture = Arc<[u8]>;

/// What was found on a picture.
#[derive(Debug, Clone, Serialize)]
pub struct Head {
    /// The camera.
    pub camera: String,
    /// The frame.
    pub frame: u64,
    /// Capture time, microseconds since 1970.
    pub time_us: i64,
    /// Size of the frame, pixels.
    pub width: u32,
    /// Size of the frame, pixels.
    pub height: u32,
    /// The model's id and version; null = no model runs.
    pub model: Option<(String, String)>,
    /// Swaps since the store was made.
    pub epoch: u64,
    /// What was found.
    pub objects: Vec<Found>,
}

/// One object.
#[derive(Debug, Clone, Serialize)]
pub struct Found {
    /// Its label.
    pub label: String,
    /// 0 to 1.
    pub score: f64,
    /// Shares of width and height.
    #[serde(rename = "box")]
    pub bounds: Bounds,
}

struct Shot {
    tap: Arc<Tap>,
    frame: Frame,
    head: Head,
    /// The event that it shows, if one was asked for.
    event: Option<String>,
}

/// Where a camera's pictures are taken, and where they go.
pub struct Tap {
    viewers: AtomicUsize,
    /// Microseconds since `born` from which on the next picture may be taken.
    due_us: AtomicU64,
    born: Instant,
    shots: Sender<Shot>,
    out: broadcast::Sender<Picture>,
}

impl Tap {
    /// The worker has a frame, and maybe an `event` that wants a picture. `head` is asked for only
    /// when one is taken. Returns whether it was.
    pub fn offer(
        self: &Arc<Self>,
        frame: &Frame,
        event: Option<String>,
        head: impl FnOnce() -> Head,
    ) -> bool {
        let is_watched = self.viewers.load(Ordering::Relaxed) > 0;
        if !(is_watched || event.is_some()) || self.shots.is_full() {
            return false;
        }
        let now_us = self.born.elapsed().as_micros() as u64;
        if event.is_none() && now_us < self.due_us.load(Ordering::Relaxed) {
            return false;
        }
        self.due_us.store(now_us + INTERVAL.as_micros() as u64, Ordering::Relaxed);
        let shot = Shot { tap: Arc::clone(self), frame: frame.clone(), head: head(), event };
        self.shots.try_send(shot).is_ok()
    }

    /// Someone looks, until the value is dropped.
    pub fn look(self: &Arc<Self>) -> Viewer {
        self.viewers.fetch_add(1, Ordering::Relaxed);
        Viewer { tap: Arc::clone(self), pictures: self.out.subscribe() }
    }
}

/// Someone who looks at a camera.
pub struct Viewer {
    tap: Arc<Tap>,
    pictures: broadcast::Receiver<Picture>,
}

impl Viewer {
    /// The next picture; a viewer that is slow misses some. `None` at the end.
    pub async fn next(&mut self) -> Option<Picture> {
        loop {
            match self.pictures.recv().await {
                Ok(picture) => return Some(picture),
                Err(broadcast::error::RecvError::Lagged(_)) => {}
                Err(broadcast::error::RecvError::Closed) => return None,
            }
        }
    }
}

impl Drop for Viewer {
    fn drop(&mut self) {
        self.tap.viewers.fetch_sub(1, Ordering::Relaxed);
    }
}

/// The taps of all cameras. Its thread `preview` ends when it and the last tap are dropped.
pub struct Previews {
    taps: Mutex<BTreeMap<String, Arc<Tap>>>,
    shots: Sender<Shot>,
}

impl Previews {
    /// Starts the thread that encodes. `show` gets the pictures of events: camera, event, JPEG.
    ///
    /// # Errors
    /// The system has no thread for it.
    pub fn start(show: impl Fn(&str, String, Vec<u8>) + Send + 'static) -> anyhow::Result<Self> {
        let (shots, taken) = bounded(WAITING_MAX);
        std::thread::Builder::new()
            .name("preview".into())
            .spawn(move || encode_all(&taken, &show))
            .context("the preview's thread can't be started")?;
        Ok(Self { taps: Mutex::default(), shots })
    }

    /// The tap of a camera, made when it is new.
    pub fn tap(&self, camera: &str) -> Arc<Tap> {
        let mut taps = self.taps.lock().expect("nothing panics while it holds the taps");
        let new = || {
            Arc::new(Tap {
                viewers: AtomicUsize::new(0),
                due_us: AtomicU64::new(0),
                born: Instant::now(),
                shots: self.shots.clone(),
                out: broadcast::Sender::new(2),
            })
        };
        Arc::clone(taps.entry(camera.to_owned()).or_insert_with(new))
    }

    /// The tap of a camera that has one.
    pub fn known(&self, camera: &str) -> Option<Arc<Tap>> {
        self.taps.lock().expect("nothing panics while it holds the taps").get(camera).cloned()
    }
}

fn encode_all(taken: &Receiver<Shot>, show: &impl Fn(&str, String, Vec<u8>)) {
    // What can't be lowered stays as it is.
    let _ = host::lower_priority(host::NICE);
    let mut encoders: BTreeMap<(String, u32, u32), Encoder> = BTreeMap::new();
    for mut shot in taken {
        let info = &shot.frame.info;
        let key = (info.format().to_string(), info.width(), info.height());
        // A camera that keeps changing its size must not leave encoders behind for ever.
        if encoders.len() > 32 {
            encoders.clear();
        }
        let picture = match encoders.entry(key.clone()) {
            std::collections::btree_map::Entry::Occupied(known) => known.into_mut().encode(&shot),
            std::collections::btree_map::Entry::Vacant(free) => {
                Encoder::new(info).and_then(|e| free.insert(e).encode(&shot))
            }
        };
        let told = picture.and_then(|jpeg| {
            if shot.tap.viewers.load(Ordering::Relaxed) > 0 {
                let _ = shot.tap.out.send(framed(&shot.head, &jpeg)?);
            }
            if let Some(event) = shot.event.take() {
                show(&shot.head.camera, event, jpeg);
            }
            Ok(())
        });
        match told {
            Ok(()) => {}
            Err(e) => {
                warn!("a preview can't be made: {e:#}");
                encoders.remove(&key);
                std::thread::sleep(Duration::from_secs(1));
            }
        }
    }
}

fn framed(head: &Head, jpeg: &[u8]) -> anyhow::Result<Picture> {
    let head = serde_json::to_vec(head)?;
    let length = u32::try_from(head.len())?.to_be_bytes();
    Ok([&length[..], &head, jpeg].concat().into())
}

/// Scales and encodes frames of one format and size.
struct Encoder {
    pipeline: gst::Pipeline,
    from: gst_app::AppSrc,
    to: gst_app::AppSink,
    jpeg: gst::Element,
    quality: i32,
}

impl Encoder {
    fn new(info: &gst_video::VideoInfo) -> anyhow::Result<Self> {
        let (width, height) = (info.width(), info.height());
        let scale = f64::from(SIDE_MAX) / f64::from(width.max(height));
        let small = |side: u32| match scale < 1.0 {
            true => ((f64::from(side) * scale / 2.0).round() as u32 * 2).max(2),
            false => side,
        };
        let launch = format!(
            "appsrc name=from format=time ! videoconvertscale \
             ! video/x-raw,format=I420,width={},height={} ! jpegenc name=jpeg \
             ! appsink name=to sync=false",
            small(width),
            small(height)
        );
        let pipeline = gst::parse::launch(&launch)?;
        let pipeline = pipeline.downcast::<gst::Pipeline>().map_err(|_| anyhow!("no pipeline"))?;
        let by_name = |n: &str| pipeline.by_name(n).expect("named in the text above");
        let from = by_name("from").downcast::<gst_app::AppSrc>().expect("an appsrc");
        let to = by_name("to").downcast::<gst_app::AppSink>().expect("an appsink");
        let jpeg = by_name("jpeg");
        from.set_caps(Some(&info.to_caps()?));
        pipeline.set_state(gst::State::Playing)?;
        Ok(Self { pipeline, from, to, jpeg, quality: 70 })
    }

    fn encode(&mut self, shot: &Shot) -> anyhow::Result<Vec<u8>> {
        self.jpeg.set_property("quality", self.quality);
        self.from.push_buffer(shot.frame.buffer.clone())?;
        let sample = self.to.try_pull_sample(ENCODE_WITHIN).context("the encoder gives nothing")?;
        let buffer = sample.buffer().context("the encoder gives no picture")?;
        let jpeg = buffer.map_readable()?;
        let step = if jpeg.len() > BYTES_WANTED {
            -5
        } else {
            i32::from(jpeg.len() * 5 < BYTES_WANTED * 4)
        };
        self.quality = (self.quality + step).clamp(*QUALITY.start(), *QUALITY.end());
        Ok(jpeg.to_vec())
    }
}

impl Drop for Encoder {
    fn drop(&mut self) {
        let _ = self.pipeline.set_state(gst::State::Null);
    }
}

impl Found {
    /// A detection under its label.
    pub fn of(d: &crate::model::engine::Detection, label: &str) -> Self {
        let share = |v: f32| rounded(f64::from(v), 4);
        Self {
            label: label.to_owned(),
            score: rounded(f64::from(d.score), 3),
            bounds: Bounds { x1: share(d.x1), y1: share(d.y1), x2: share(d.x2), y2: share(d.y2) },
        }
    }
}
