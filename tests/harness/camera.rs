//! Cameras with a consumer that keeps what it was given, and sources for them.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use gst::prelude::*;
use noblink::camera::frame::{Clock, Frame};
use noblink::camera::source::Source;
use noblink::camera::templates::Templates;
use noblink::camera::{Camera, CameraStatus, State};
use noblink::config;
use noblink::queue::{Intake, Ledger};

use super::reach;

/// The configuration's defaults for a URL.
pub(crate) fn config(id: &str, url: &str) -> config::Camera {
    let source = Source::parse(url).expect("the test's URL");
    config::Camera {
        id: id.into(),
        pipeline: source.default_pipeline().into(),
        source,
        max_fps: None,
        publish: config::Publish::Objects,
        labels: None,
        confidence: None,
        publish_max_hz: None,
        snapshot_interval_s: None,
        queue: 4,
        stall_timeout_s: 5.0,
        color: None,
        realtime: true,
        repeat: false,
    }
}

/// What the consumer notes of a frame.
#[derive(Debug, Clone)]
pub(crate) struct Note {
    pub(crate) id: u64,
    pub(crate) pts_ns: Option<u64>,
    pub(crate) time_us: i64,
    pub(crate) clock: Clock,
    pub(crate) size: (usize, usize),
    pub(crate) arrived: Instant,
    /// Mean luma, to see that there is a picture.
    pub(crate) luma: f64,
    /// Where the planes start in the buffer, if it says so itself.
    pub(crate) layout: Option<Vec<usize>>,
}

fn note(frame: &Frame) -> Note {
    use noblink::vision::picture::Pixels;
    let (size, luma) = frame
        .with_picture(|p| {
            let (rows, width) = match p.pixels {
                Pixels::I420 { y, .. } | Pixels::Nv12 { y, .. } => (y, p.width),
                Pixels::Rgb(rgb) => (rgb, p.width * 3),
            };
            let row = &rows.data[rows.stride * (p.height / 2)..][..width];
            let sum: u64 = row.iter().map(|b| u64::from(*b)).sum();
            ((p.width, p.height), sum as f64 / width as f64)
        })
        .expect("a picture");
    Note {
        id: frame.id,
        pts_ns: frame.pts_ns,
        time_us: frame.time_us,
        clock: frame.clock,
        size,
        arrived: frame.arrived,
        luma,
        layout: frame.buffer.meta::<gst_video::VideoMeta>().map(|m| m.offset().to_vec()),
    }
}

/// Cameras that run, and the consumer in the worker's place.
pub(crate) struct Rig {
    pub(crate) cameras: Vec<Camera>,
    intake: Arc<Intake>,
    notes: Arc<Mutex<Vec<Vec<Note>>>>,
    over: Arc<AtomicBool>,
    consumer: Option<JoinHandle<()>>,
}

impl Rig {
    pub(crate) fn start(cameras: Vec<config::Camera>) -> Self {
        Self::start_with(cameras, Templates::default(), Duration::ZERO)
    }

    /// `pause`: what the consumer takes for a frame.
    pub(crate) fn start_with(
        cameras: Vec<config::Camera>,
        templates: Templates,
        pause: Duration,
    ) -> Self {
        let cameras: Vec<_> = cameras.into_iter().map(Arc::new).collect();
        let intake = Arc::new(Intake::default());
        let inlets: Vec<_> = cameras.iter().map(|c| intake.open(c)).collect();
        let notes = Arc::new(Mutex::new(vec![Vec::new(); cameras.len()]));
        let over = Arc::new(AtomicBool::new(false));
        let consumer = std::thread::spawn({
            let (intake, notes, over) =
                (Arc::clone(&intake), Arc::clone(&notes), Arc::clone(&over));
            move || {
                while !over.load(Ordering::Acquire) {
                    let Some(taken) = intake.take(Duration::from_millis(20)) else { continue };
                    let seen = note(&taken.frame);
                    notes.lock().expect("no panic above")[taken.camera].push(seen);
                    if !pause.is_zero() {
                        std::thread::sleep(pause);
                    }
                    taken.inferred();
                }
            }
        });
        let templates = Arc::new(templates);
        let cameras = cameras
            .into_iter()
            .zip(inlets)
            .map(|(camera, inlet)| {
                let templates = Arc::clone(&templates);
                Camera::start(camera, inlet, templates, true).expect("a thread")
            })
            .collect();
        Self { cameras, intake, notes, over, consumer: Some(consumer) }
    }

    pub(crate) fn notes(&self, camera: usize) -> Vec<Note> {
        self.notes.lock().expect("no panic above")[camera].clone()
    }

    pub(crate) fn ledger(&self, camera: usize) -> Ledger {
        let ledger = self.intake.snapshot()[camera].ledger;
        assert!(ledger.is_exact(), "{ledger:?}");
        ledger
    }

    /// Waits until the status is as wanted.
    pub(crate) fn reach(
        &self,
        camera: usize,
        within: Duration,
        wanted: impl Fn(&CameraStatus) -> bool,
    ) -> CameraStatus {
        reach(within, "the camera's status", || {
            let status = self.cameras[camera].status();
            if wanted(&status) { Ok(status) } else { Err(format!("{status:?}")) }
        })
    }

    pub(crate) fn until_streaming(&self, camera: usize, within: Duration) -> CameraStatus {
        self.reach(camera, within, |s| s.state == State::Streaming)
    }

    /// Waits for so many frames in all.
    pub(crate) fn until_frames(&self, camera: usize, count: usize, within: Duration) -> Vec<Note> {
        reach(within, "frames", || {
            let notes = self.notes(camera);
            let state = || format!("{} frames, {:?}", notes.len(), self.cameras[camera].status());
            if notes.len() >= count { Ok(notes.clone()) } else { Err(state()) }
        })
    }

    /// Waits for so many frames more than there are now.
    pub(crate) fn until_more(&self, camera: usize, count: usize, within: Duration) -> Vec<Note> {
        self.until_frames(camera, self.notes(camera).len() + count, within)
    }

    /// Stops all cameras and returns how long it took.
    pub(crate) fn stop(mut self) -> Duration {
        let began = Instant::now();
        self.cameras.iter().for_each(Camera::request_stop);
        for mut camera in std::mem::take(&mut self.cameras) {
            assert!(camera.join(began + Duration::from_secs(3)), "a camera does not stop");
        }
        began.elapsed()
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Release);
        if let Some(consumer) = self.consumer.take() {
            let _ = consumer.join();
        }
    }
}

/// A launch text for a live H.264 source.
pub(crate) fn h264(width: u32, height: u32, fps: u32) -> String {
    format!(
        "videotestsrc is-live=true pattern=ball ! video/x-raw,format=I420,width={width},\
         height={height},framerate={fps}/1 ! x264enc tune=zerolatency speed-preset=ultrafast \
         key-int-max={fps} ! h264parse ! rtph264pay name=pay0 config-interval=-1"
    )
}

/// A launch text for a live H.265 source.
pub(crate) fn h265(width: u32, height: u32, fps: u32) -> String {
    format!(
        "videotestsrc is-live=true pattern=ball ! video/x-raw,format=I420,width={width},\
         height={height},framerate={fps}/1 ! x265enc tune=zerolatency speed-preset=ultrafast \
         key-int-max={fps} ! h265parse ! rtph265pay name=pay0 config-interval=-1"
    )
}

/// Runs a launch text to its end.
pub(crate) fn produce(launch: &str) {
    gst::init().expect("GStreamer");
    let pipeline = gst::parse::launch(launch).expect("the test's launch text");
    pipeline.set_state(gst::State::Playing).expect("it plays");
    let bus = pipeline.bus().expect("a pipeline has a bus");
    let kinds = [gst::MessageType::Eos, gst::MessageType::Error];
    let end = bus.timed_pop_filtered(gst::ClockTime::from_seconds(60), &kinds);
    let _ = pipeline.set_state(gst::State::Null);
    assert!(matches!(end.as_ref().map(|m| m.type_()), Some(gst::MessageType::Eos)), "{end:?}");
}

/// Writes an H.264 file: mp4 by its ending, else a bare byte stream.
pub(crate) fn write_clip(file: &Path, (width, height): (u32, u32), fps: u32, frames: u32) {
    let to_file = match file.extension().and_then(|e| e.to_str()) {
        Some("mp4") => "h264parse ! mp4mux",
        _ => "h264parse ! video/x-h264,stream-format=byte-stream",
    };
    produce(&format!(
        "videotestsrc pattern=ball num-buffers={frames} ! video/x-raw,format=I420,width={width},\
         height={height},framerate={fps}/1 ! x264enc speed-preset=ultrafast bframes=0 \
         key-int-max={fps} ! {to_file} ! filesink location=\"{}\"",
        file.display()
    ));
}

/// An mp4 file of 40 frames, 640x360 at 20 a second.
pub(crate) fn clip() -> PathBuf {
    // Not a temporary folder: a static is never dropped, and would leave one behind.
    static CLIP: OnceLock<PathBuf> = OnceLock::new();
    let write = || {
        let file = Path::new(env!("CARGO_TARGET_TMPDIR")).join("clip.mp4");
        write_clip(&file, (640, 360), 20, 40);
        file
    };
    CLIP.get_or_init(write).clone()
}

pub(crate) fn file_url(path: &Path) -> String {
    url::Url::from_file_path(path).expect("an absolute path").into()
}
