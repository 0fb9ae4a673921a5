//! What a source sends: `noblink probe URL`.
//!
//! Plays the source by the template that a camera would use, looks at what comes for a few seconds
//! and takes it down again. It waits for the sender's first report, which RTSP servers send every
//! 5 s or so, since it decides whether capture times are the camera's.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError, bounded};
use gst_video::VideoInfo;
use serde::Serialize;

use super::frame::Clock;
use super::jpeg;
use super::keeper::{DISMANTLE_WITHIN, Keeper};
use super::pipeline::{Event, Outlet, Pipeline, Settings, Watch};
use super::reason::{self, Reason};
use super::source::Source;
use super::status::{self, Stream, Transport};
use super::templates::Templates;
use crate::queue::Arrival;

/// How long frames are looked at where there is no sender's report to wait for.
const LOOK_FOR: Duration = Duration::from_secs(3);

/// What was found.
#[derive(Debug, Clone, Serialize)]
pub struct ProbeReport {
    /// The address, its login masked.
    pub source: String,
    /// The template that was used.
    pub pipeline: String,
    /// As people call it: `H.264`; missing where nothing was decoded.
    pub codec: Option<String>,
    /// Pixels.
    pub width: u32,
    /// Pixels.
    pub height: u32,
    /// As the path gets it: `I420`, `NV12` or `RGB`.
    pub format: String,
    /// Frames a second that the stream declares.
    pub fps_declared: Option<f64>,
    /// Frames a second by their timestamps.
    pub fps_measured: Option<f64>,
    /// For RTSP.
    pub transport: Option<Transport>,
    /// Whether RTCP sender reports came in the time of the probe.
    pub sender_reports: bool,
    /// Whose clock the last frame's capture time was.
    pub clock: Clock,
    /// The camera's clock minus the time of arrival.
    pub clock_offset_ms: Option<i64>,
    /// From the start to the first frame.
    pub first_frame_ms: u64,
    /// Frames that were seen.
    pub frames: u64,
    /// Frames that were damaged, or came before the first key frame.
    pub corrupt: u64,
    /// Median CPU time of decoding one frame; missing for hardware, which works elsewhere.
    pub decode_ms: Option<f64>,
    /// The last frame; missing when the encoder is not installed.
    #[serde(skip)]
    pub jpeg: Option<Vec<u8>>,
    /// A `[[camera]]` section to paste. Holds the login as it was given.
    pub config: String,
}

/// What the frames of a probe left behind.
#[derive(Default)]
struct Looked {
    first_at: Option<Instant>,
    last: Option<(gst::Buffer, Arc<VideoInfo>)>,
    pts_ns: Vec<u64>,
}

impl Looked {
    fn look(&mut self, frame: Arrival) {
        self.first_at.get_or_insert(frame.arrived);
        self.pts_ns.extend(frame.pts_ns);
        self.last = Some((frame.buffer, frame.info));
    }

    /// By the median distance of two frames: rtspsrc squeezes the first ones together until it
    /// knows the sender's clock, which made a mean 5 % too high after 3 s.
    fn fps(&self) -> Option<f64> {
        let mut steps: Vec<_> = self.pts_ns.windows(2).map(|p| p[1].saturating_sub(p[0])).collect();
        steps.sort_unstable();
        status::rate(2, Duration::from_nanos(*steps.get(steps.len() / 2)?))
    }
}

/// Looks at a source for `timeout` at most (and up to [`DISMANTLE_WITHIN`] more to take it down).
pub fn probe(
    source: &Source,
    pipeline: &str,
    templates: &Templates,
    timeout: Duration,
) -> Result<ProbeReport, Reason> {
    let began = Instant::now();
    let deadline = began + timeout;
    let text = templates.find(pipeline).map_err(|e| Reason::Pipeline(e.to_string()))?;
    let looked = Arc::new(Mutex::new(Looked::default()));
    let corrupt = Arc::new(AtomicU64::new(0));
    let outlet = {
        let (looked, corrupt) = (Arc::clone(&looked), Arc::clone(&corrupt));
        Outlet {
            frame: Box::new(move |arrival: Arrival, _| {
                looked.lock().expect("nothing panics while it holds this").look(arrival);
                true
            }),
            corrupt: Box::new(move || {
                corrupt.fetch_add(1, Ordering::Relaxed);
            }),
        }
    };
    let settings = Settings { paced: source.is_file(), matrix: None };
    let (events, told) = bounded(8);
    let watch = Watch::start(true);
    let build = {
        let (source, watch, events) = (source.clone(), Arc::clone(&watch), events.clone());
        move || Pipeline::build(&text, &source, settings, &watch, outlet, events)
    };
    let keeper = Keeper::start("probe", &Arc::default(), events, build)
        .map_err(|e| Reason::Other(format!("no thread for the pipeline: {e}")))?;
    let looked_well = look(source, &watch, &told, deadline, timeout);
    watch.silence();
    keeper.wait(Instant::now() + DISMANTLE_WITHIN);
    looked_well?;

    let looked = std::mem::take(&mut *looked.lock().expect("nothing panics while it holds this"));
    let fps_measured = looked.fps();
    let (Some(first_at), Some((buffer, info))) = (looked.first_at, looked.last) else {
        return Err(Reason::Silence(timeout));
    };
    let seen = watch.seen();
    let stream = Stream::of(source, &watch, &seen, None);
    let clock_offset_ms = seen.capture.and_then(|c| c.offset_us).map(|us| us / 1000);
    Ok(ProbeReport {
        source: source.to_string(),
        pipeline: pipeline.to_owned(),
        codec: watch.decoder.codec().map(str::to_owned),
        width: info.width(),
        height: info.height(),
        format: info.format().to_str().to_string(),
        fps_declared: status::declared_fps(&info),
        fps_measured,
        transport: stream.and_then(|s| s.transport),
        sender_reports: clock_offset_ms.is_some(),
        clock: seen.capture.map_or(Clock::Arrival, |c| c.clock),
        clock_offset_ms,
        first_frame_ms: first_at.duration_since(began).as_millis() as u64,
        frames: watch.frames(),
        corrupt: corrupt.load(Ordering::Relaxed),
        decode_ms: watch.decoder.cost().map(|cost| cost.as_micros() as f64 / 1000.0),
        jpeg: jpeg::encode(&buffer, &info).ok(),
        config: section(source, pipeline),
    })
}

/// Waits until enough was seen.
fn look(
    source: &Source,
    watch: &Watch,
    told: &Receiver<Event>,
    deadline: Instant,
    timeout: Duration,
) -> Result<(), Reason> {
    let mut first_at = None;
    loop {
        let now = Instant::now();
        let enough = first_at.is_some_and(|at: Instant| now.duration_since(at) >= LOOK_FOR);
        let reported = watch.seen().capture.is_some_and(|c| c.offset_us.is_some());
        if enough && (reported || !matches!(source, Source::Rtsp(_))) {
            return Ok(());
        }
        if now >= deadline {
            return match (first_at, source) {
                (Some(_), _) => Ok(()),
                (None, Source::Rtsp(url)) if watch.decoder.codec().is_none() => {
                    Err(reason::ask(url, None, now + DISMANTLE_WITHIN))
                }
                (None, _) => Err(Reason::Silence(timeout)),
            };
        }
        let wait = (deadline - now).min(Duration::from_millis(100));
        match told.recv_timeout(wait) {
            Ok(Event::Streaming) => first_at = Some(Instant::now()),
            Ok(Event::Ended) if watch.frames() > 0 => return Ok(()),
            Ok(Event::Ended) => return Err(Reason::NoVideo),
            Ok(Event::Failed(failure)) => {
                return Err(match (failure.reason(source), source) {
                    (Some(reason), _) => reason,
                    (None, Source::Rtsp(url)) => {
                        reason::ask(url, Some(&failure), now + DISMANTLE_WITHIN)
                    }
                    (None, _) => Reason::Ended,
                });
            }
            Ok(Event::Unusable(why)) => return Err(Reason::Pipeline(why)),
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return Err(Reason::Ended),
        }
    }
}

fn section(source: &Source, pipeline: &str) -> String {
    let quoted = |text: &str| toml::Value::String(text.to_owned()).to_string();
    let mut lines = vec![
        "[[camera]]".to_owned(),
        "id = \"camera-1\"".to_owned(),
        format!("url = {}", quoted(&source.reveal())),
    ];
    if pipeline != source.default_pipeline() {
        lines.push(format!("pipeline = {}", quoted(pipeline)));
    }
    lines.join("\n") + "\n"
}
