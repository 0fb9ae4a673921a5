//! One attempt at a source: a GStreamer pipeline from the template's text to the appsink.
//!
//! It is built, played and dismantled by its owner (the supervisor, or a probe). Everything in
//! between happens on GStreamer's threads: frames go to [`Outlet::frame`], the end or an error
//! comes as an [`Event`], and [`Watch`] holds what may be seen from outside. Nothing here ever
//! changes a state from one of those threads, which deadlocks.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant};

use crossbeam_channel::Sender;
use gst::prelude::*;
use gst_app::{AppSink, AppSinkCallbacks};
use gst_video::{VideoInfo, VideoMeta};

use super::clock::{self, Capture};
use super::decoder::{self, Decoder};
use super::depay;
use super::frame::color_of;
use super::reason::Failure;
use super::source::Source;
use crate::queue::Arrival;
use crate::vision::picture::{Color, Matrix};

/// What an attempt tells its owner.
#[derive(Debug)]
pub(super) enum Event {
    /// The first frame is there.
    Streaming,
    /// The stream is over.
    Ended,
    /// It broke.
    Failed(Failure),
    /// The template can't be used.
    Unusable(String),
}

/// Takes a frame; `false` stops the stream.
pub(super) type Taker = dyn Fn(Arrival, &Watch) -> bool + Send + Sync;

/// Where an attempt's frames go.
pub(super) struct Outlet {
    /// Takes the frames.
    pub(super) frame: Box<Taker>,
    /// A frame was damaged, or useless because one before it was lost.
    pub(super) corrupt: Box<dyn Fn() + Send + Sync>,
}

/// What an attempt shows of itself, written by GStreamer's threads.
pub(super) struct Watch {
    started: Instant,
    /// Cleared before the pipeline is dismantled: from then on nothing is delivered.
    alive: AtomicBool,
    frames: AtomicU64,
    /// Last sign of life, in nanoseconds since `started`.
    active_ns: AtomicU64,
    pub(super) decoder: Decoder,
    seen: Mutex<Seen>,
}

/// What the latest frame looked like.
#[derive(Debug, Clone, Default)]
pub(super) struct Seen {
    pub(super) info: Option<Arc<VideoInfo>>,
    pub(super) capture: Option<Capture>,
}

impl Watch {
    /// Of an attempt that starts now; `measured`: note what decoding costs.
    pub(super) fn start(measured: bool) -> Arc<Self> {
        Arc::new(Self {
            started: Instant::now(),
            alive: AtomicBool::new(true),
            frames: AtomicU64::new(0),
            active_ns: AtomicU64::new(0),
            decoder: Decoder::new(measured),
            seen: Mutex::default(),
        })
    }

    /// Frames that the decoder delivered undamaged.
    pub(super) fn frames(&self) -> u64 {
        self.frames.load(Ordering::Relaxed)
    }

    /// Lets nothing more out.
    pub(super) fn silence(&self) {
        self.alive.store(false, Ordering::Release);
    }

    /// Whether the attempt still goes on.
    pub(super) fn is_alive(&self) -> bool {
        self.alive.load(Ordering::Acquire)
    }

    /// Notes a sign of life: a frame, a damaged one, or a file that waits for the worker.
    pub(super) fn touch(&self) {
        let elapsed = self.started.elapsed().as_nanos() as u64;
        self.active_ns.fetch_max(elapsed, Ordering::Relaxed);
    }

    /// When the last sign of life was; the start when there was none.
    pub(super) fn active_at(&self) -> Instant {
        self.started + Duration::from_nanos(self.active_ns.load(Ordering::Relaxed))
    }

    /// What the latest frame looked like.
    pub(super) fn seen(&self) -> Seen {
        self.seen.lock().expect("nothing panics while it holds this").clone()
    }
}

/// A pipeline. Dropped only after `dismantle`.
pub(super) struct Pipeline {
    pipeline: gst::Pipeline,
}

/// Starts GStreamer and settles which decoders are taken where a template leaves it open. Cameras
/// do it by themselves; the first time on a machine it takes some seconds, to look at all plugins.
pub fn init() -> Result<(), gst::glib::Error> {
    static RESULT: OnceLock<Result<(), gst::glib::Error>> = OnceLock::new();
    RESULT
        .get_or_init(|| {
            gst::init()?;
            decoder::prefer_software();
            depay::register().map_err(|e| gst::glib::Error::new(gst::CoreError::Failed, &e.message))
        })
        .clone()
}

impl Pipeline {
    /// Builds what the template says for this source. `text` comes from `Templates::find`. May
    /// block: decodebin3 opens a file as soon as it is linked.
    pub(super) fn build(
        text: &str,
        source: &Source,
        settings: Settings,
        watch: &Arc<Watch>,
        outlet: Outlet,
        events: Sender<Event>,
    ) -> Result<Self, String> {
        init().map_err(|e| format!("GStreamer does not start: {e}"))?;
        let text = fill(text, source);
        // Costs nothing while the decoder's own format is one of the three: it passes buffers and
        // allocation queries through then. It converts 10 bit, 4:2:2 and the like.
        let text = format!(
            "{text} ! videoconvert name={CONVERT} n-threads=1 qos=false ! appsink name={SINK}"
        );
        let flags = gst::ParseFlags::FATAL_ERRORS;
        let parsed = gst::parse::launch_full(&text, None, flags).map_err(|e| e.to_string())?;
        let Ok(pipeline) = parsed.downcast::<gst::Pipeline>() else {
            return Err("the template is not a chain of elements".into());
        };
        let outlet = Arc::new(outlet);
        let adopt = {
            let (watch, outlet) = (Arc::clone(watch), Arc::clone(&outlet));
            move |element: &gst::Element| decoder::adopt(element, &watch, &outlet)
        };
        for element in pipeline.iterate_recurse().into_iter().flatten() {
            adopt(&element);
        }
        pipeline.connect_deep_element_added(move |_, _, element| adopt(element));
        aim(&pipeline, source)?;
        let sink = pipeline.by_name(SINK).and_then(|e| e.downcast::<AppSink>().ok());
        let sink = sink.ok_or(format!("the template names an element of its own {SINK}"))?;
        prepare(&sink, settings, Arc::clone(watch), outlet, events.clone());
        let bus = pipeline.bus().expect("a pipeline has a bus");
        bus.set_sync_handler(move |_, message| {
            let event = match message.view() {
                gst::MessageView::Eos(_) => Some(Event::Ended),
                gst::MessageView::Error(e) => Some(Event::Failed(Failure::of(e))),
                _ => None,
            };
            if let Some(event) = event {
                // The first one counts; the owner may not be listening any more.
                let _ = events.try_send(event);
            }
            gst::BusSyncReply::Drop
        });
        Ok(Self { pipeline })
    }

    /// Starts it; what goes wrong comes as an event.
    pub(super) fn play(&self) {
        // The bus has the reason for a refusal.
        let _ = self.pipeline.set_state(gst::State::Playing);
    }

    /// Ends it. May take long: rtspsrc waits for its server, sometimes some 20 s.
    pub(super) fn dismantle(self) {
        let _ = self.pipeline.set_state(gst::State::Null);
    }
}

/// What the configuration adds to the template.
#[derive(Debug, Clone, Copy)]
pub(super) struct Settings {
    /// Paced by the timestamps.
    pub(super) paced: bool,
    /// Forced instead of what the stream says.
    pub(super) matrix: Option<Matrix>,
}

const SINK: &str = "noblink_frames";
const CONVERT: &str = "noblink_convert";

fn fill(text: &str, source: &Source) -> String {
    match source {
        Source::Test { width, height, fps } => text
            .replace("{width}", &width.to_string())
            .replace("{height}", &height.to_string())
            .replace("{fps}", &fps.to_string()),
        Source::Rtsp(_) | Source::File(_) | Source::V4l2(_) => text.to_owned(),
    }
}

/// Points the template's `source` at the configured address.
fn aim(pipeline: &gst::Pipeline, source: &Source) -> Result<(), String> {
    if let Source::Test { .. } = source {
        return Ok(());
    }
    let element = pipeline.by_name("source");
    let element = element.ok_or("the template has no element with name=source")?;
    let set =
        |property: &str, value: &str| match element.find_property(property).map(|p| p.value_type())
        {
            Some(gst::glib::Type::STRING) => {
                element.set_property(property, value);
                Ok(())
            }
            _ => Err(format!(
                "the template's source has no text property {property}, which {source} needs"
            )),
        };
    match source {
        Source::Rtsp(url) => {
            // The login goes in by itself: no error message of rtspsrc's can hold it then.
            let mut bare = url.clone();
            let _ = bare.set_username("");
            let _ = bare.set_password(None);
            set("location", bare.as_str())?;
            if !url.username().is_empty() {
                set("user-id", &unescape(url.username()))?;
            }
            url.password().map_or(Ok(()), |password| set("user-pw", &unescape(password)))
        }
        Source::File(path) => {
            set("location", &path.to_string_lossy())?;
            relink(&element).map_err(|e| e.to_string())
        }
        Source::V4l2(path) => set("device", &path.to_string_lossy()),
        Source::Test { .. } => Ok(()),
    }
}

/// Links the source to its successor again: decodebin3 asks at that moment, and only then, whether
/// it can seek, which a filesrc without a location can't.
fn relink(source: &gst::Element) -> Result<(), gst::glib::BoolError> {
    for pad in source.src_pads() {
        if let Some(peer) = pad.peer() {
            pad.unlink(&peer)?;
            pad.link(&peer).map_err(|e| gst::glib::bool_error!("{e}"))?;
        }
    }
    Ok(())
}

/// Undoes percent-encoding; what is no valid escape stays as it is.
fn unescape(text: &str) -> String {
    let bytes = text.as_bytes();
    let mut out = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while at < bytes.len() {
        let escaped = (bytes[at] == b'%').then(|| text.get(at + 1..at + 3)).flatten();
        match escaped.and_then(|hex| u8::from_str_radix(hex, 16).ok()) {
            Some(byte) => {
                out.push(byte);
                at += 3;
            }
            None => {
                out.push(bytes[at]);
                at += 1;
            }
        }
    }
    String::from_utf8_lossy(&out).into_owned()
}

fn prepare(
    sink: &AppSink,
    settings: Settings,
    watch: Arc<Watch>,
    outlet: Arc<Outlet>,
    events: Sender<Event>,
) {
    let formats = gst::List::new(["I420", "NV12", "RGB"]);
    sink.set_caps(Some(&gst::Caps::builder("video/x-raw").field("format", formats).build()));
    sink.set_property("sync", settings.paced);
    // A file waits for its first frame before its clock starts; a camera is under way already.
    sink.set_property("async", settings.paced);
    sink.set_property("qos", false);
    sink.set_property("enable-last-sample", false);
    sink.set_max_buffers(2);
    sink.set_drop(false);
    let pad = sink.static_pad("sink").expect("a sink has a sink pad");
    // Without this answer libav copies every frame, 3.1 MB at 1080p, out of its padded buffers.
    pad.add_probe(gst::PadProbeType::QUERY_DOWNSTREAM, |_, probe| {
        match probe.query_mut().map(|q| q.view_mut()) {
            Some(gst::QueryViewMut::Allocation(query)) => {
                query.add_allocation_meta::<VideoMeta>(None);
                gst::PadProbeReturn::Handled
            }
            _ => gst::PadProbeReturn::Ok,
        }
    });
    let mut format = Format { caps: None, matrix: settings.matrix };
    let new_sample = move |sink: &AppSink| {
        let arrived = Instant::now();
        let arrived_us = clock::unix_us();
        let sample = sink.pull_sample().map_err(|_| gst::FlowError::Eos)?;
        if !watch.is_alive() {
            return Err(gst::FlowError::Flushing);
        }
        watch.touch();
        let (info, color) = format.of(&sample).ok_or(gst::FlowError::NotNegotiated)?;
        let buffer = sample.buffer_owned().ok_or(gst::FlowError::Error)?;
        drop(sample);
        let pts_ns = buffer.pts().map(|t| t.nseconds());
        watch.decoder.delivered();
        if buffer.flags().intersects(gst::BufferFlags::CORRUPTED | gst::BufferFlags::DECODE_ONLY) {
            (outlet.corrupt)();
            return Ok(gst::FlowSuccess::Ok);
        }
        let capture = clock::capture(clock::ntp_us(&buffer), arrived_us);
        {
            let mut seen = watch.seen.lock().expect("nothing panics while it holds this");
            seen.info = Some(Arc::clone(&info));
            seen.capture = Some(capture);
        }
        if watch.frames.fetch_add(1, Ordering::Relaxed) == 0 {
            let _ = events.try_send(Event::Streaming);
        }
        let arrival = Arrival {
            pts_ns,
            time_us: capture.time_us,
            clock: capture.clock,
            arrived,
            buffer,
            info,
            color,
        };
        match (outlet.frame)(arrival, &watch) {
            true => Ok(gst::FlowSuccess::Ok),
            false => Err(gst::FlowError::Flushing),
        }
    };
    sink.set_callbacks(AppSinkCallbacks::builder().new_sample(new_sample).build());
}

/// The format of the stream, read again when its caps change.
struct Format {
    caps: Option<(gst::Caps, Arc<VideoInfo>, Color)>,
    matrix: Option<Matrix>,
}

impl Format {
    fn of(&mut self, sample: &gst::Sample) -> Option<(Arc<VideoInfo>, Color)> {
        let caps = sample.caps()?;
        if let Some((known, info, color)) = &self.caps
            && known.as_ptr() == caps.as_ptr()
        {
            return Some((Arc::clone(info), *color));
        }
        let info = Arc::new(VideoInfo::from_caps(caps).ok()?);
        let stream = color_of(&info);
        let color = Color { matrix: self.matrix.unwrap_or(stream.matrix), ..stream };
        self.caps = Some((caps.to_owned(), Arc::clone(&info), color));
        Some((info, color))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn passwords_are_unescaped() {
        for (escaped, plain) in [
            ("p%40ss", "p@ss"),
            ("100%", "100%"),
            ("%zz%2", "%zz%2"),
            ("a+b", "a+b"),
            ("%C3%A4", "ä"),
        ] {
            assert_eq!(unescape(escaped), plain);
        }
    }
}
