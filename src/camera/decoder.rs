//! The parts of a pipeline that appear while it starts: settings that templates need not repeat,
//! and what passes through the decoder.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::thread::{self, ThreadId};
use std::time::{Duration, Instant};

use gst::prelude::*;
use nix::time::{ClockId, clock_gettime};

use super::pipeline::{Outlet, Watch};

/// How long delta frames are left out after a loss. Streams with intra refresh have no key frames,
/// and "smart" codecs one in 10 s or more: after this a flaw is better than blindness.
const KEY_FRAME_WITHIN: Duration = Duration::from_secs(10);

/// What is known of the stream before and in its decoder.
#[derive(Default)]
pub(super) struct Decoder {
    codec: OnceLock<String>,
    udp: AtomicBool,
    loss: Mutex<Loss>,
    cost: Option<Mutex<Cost>>,
}

/// What decoding costs. A decoder that works in the thread that feeds it, as libav's with one
/// thread, is measured from a unit's entry to its frame's arrival.
#[derive(Debug, Default)]
struct Cost {
    entered: Option<(ThreadId, Duration)>,
    frames: Vec<Duration>,
}

/// CPU time of the calling thread. Not getrusage, which counts in ticks of up to 10 ms.
fn thread_cpu() -> Option<Duration> {
    clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).ok().map(Duration::from)
}

/// Whether frames are useless because one that they build on is missing.
#[derive(Debug, Default)]
struct Loss {
    begun: bool,
    waiting_since: Option<Instant>,
}

impl Loss {
    /// Whether to leave a unit out; `discont`: something is missing before it.
    fn skips(&mut self, discont: bool, key: bool, now: Instant) -> bool {
        if key {
            self.waiting_since = None;
        } else if discont || !self.begun {
            self.waiting_since.get_or_insert(now);
        }
        self.begun = true;
        self.waiting_since.is_some_and(|since| now.duration_since(since) < KEY_FRAME_WITHIN)
    }
}

impl Decoder {
    /// `measured`: note what every frame costs.
    pub(super) fn new(measured: bool) -> Self {
        Self { cost: measured.then(Mutex::default), ..Self::default() }
    }
    /// The stream's codec, as people call it.
    pub(super) fn codec(&self) -> Option<&str> {
        self.codec.get().map(String::as_str)
    }

    /// Whether RTP comes over UDP.
    pub(super) fn is_udp(&self) -> bool {
        self.udp.load(Ordering::Relaxed)
    }

    /// Median CPU time of a frame, where it was measured and could be.
    pub(super) fn cost(&self) -> Option<Duration> {
        let cost = self.cost.as_ref()?.lock().expect("nothing panics while it holds this");
        let mut frames = cost.frames.clone();
        frames.sort_unstable();
        frames.get(frames.len() / 2).copied()
    }

    fn entered(&self) {
        if let Some(cost) = &self.cost {
            let mut cost = cost.lock().expect("nothing panics while it holds this");
            cost.entered = thread_cpu().map(|cpu| (thread::current().id(), cpu));
        }
    }

    /// A frame came out, in the calling thread.
    pub(super) fn delivered(&self) {
        let Some(cost) = &self.cost else { return };
        let mut cost = cost.lock().expect("nothing panics while it holds this");
        let entered = cost.entered.take().filter(|(thread, _)| *thread == thread::current().id());
        if let (Some((_, before)), Some(now)) = (entered, thread_cpu()) {
            cost.frames.push(now.saturating_sub(before));
        }
    }
}

/// Ranks libav's decoders above the others, hardware too: a template that wants hardware names it.
/// Otherwise the choice would change with the plugins that happen to be installed.
pub(super) fn prefer_software() {
    let registry = gst::Registry::get();
    for name in ["avdec_h264", "avdec_h265", "avdec_mjpeg", "avdec_mpeg4", "avdec_mpeg2video"] {
        if let Some(feature) = registry.lookup_feature(name) {
            feature.set_rank(gst::Rank::PRIMARY + 100);
        }
    }
}

/// Sets an element up that has just been put into the pipeline.
pub(super) fn adopt(element: &gst::Element, watch: &Arc<Watch>, outlet: &Arc<Outlet>) {
    let Some(factory) = element.factory() else { return };
    match &*factory.name() {
        // Everything but the first video stays at the camera. The handler gets a stream's number
        // and caps, also for a second try, and answers whether to set it up.
        "rtspsrc" => {
            let first = OnceLock::new();
            element.connect("select-stream", false, move |values| {
                let number = values.get(1).and_then(|v| v.get::<u32>().ok());
                let caps = values.get(2).and_then(|v| v.get::<gst::Caps>().ok());
                let media = caps.and_then(|c| c.structure(0)?.get::<String>("media").ok());
                let wanted =
                    media.as_deref() == Some("video") && *first.get_or_init(|| number) == number;
                Some(wanted.to_value())
            });
        }
        // It gets the collection and one of its streams, and answers 1 to decode that, else 0.
        "decodebin3" => {
            element.connect("select-stream", false, |values| {
                let all = values.get(1).and_then(|v| v.get::<gst::StreamCollection>().ok());
                let stream = values.get(2).and_then(|v| v.get::<gst::Stream>().ok());
                let is_video = |s: &gst::Stream| s.stream_type().contains(gst::StreamType::VIDEO);
                let first = all.and_then(|all| all.iter().find(is_video));
                let id = |s: Option<gst::Stream>| s.and_then(|s| s.stream_id());
                let wanted = first.is_some() && id(first) == id(stream);
                Some(i32::from(wanted).to_value())
            });
        }
        "udpsrc" => watch.decoder.udp.store(true, Ordering::Relaxed),
        _ => {}
    }
    let class = factory.metadata("klass").unwrap_or_default();
    if class.contains("Decoder") && (class.contains("Video") || class.contains("Image")) {
        set_up_decoder(element, watch, outlet);
    }
}

fn set_up_decoder(element: &gst::Element, watch: &Arc<Watch>, outlet: &Arc<Outlet>) {
    // Live, libav has threads for slices only, and cameras send one slice. For files they would
    // take the cores that inference needs. What a template sets stays.
    if let Some(spec) = element.find_property("max-threads")
        && spec.value_type() == gst::glib::Type::I32
        && element.property::<i32>("max-threads") == 0
    {
        element.set_property("max-threads", 1);
    }
    // The appsink does not throttle: nothing is to be skipped for being late.
    if element.find_property("qos").is_some() {
        element.set_property("qos", false);
    }
    let Some(pad) = element.static_pad("sink") else { return };
    let (watch, outlet) = (Arc::clone(watch), Arc::clone(outlet));
    let kinds = gst::PadProbeType::BUFFER | gst::PadProbeType::EVENT_DOWNSTREAM;
    pad.add_probe(kinds, move |_, info| {
        if let Some(event) = info.event() {
            if let gst::EventView::Caps(caps) = event.view() {
                let _ = watch.decoder.codec.set(codec_name(caps.caps()));
            }
            return gst::PadProbeReturn::Ok;
        }
        let Some(unit) = info.buffer() else { return gst::PadProbeReturn::Ok };
        let discont = unit.flags().contains(gst::BufferFlags::DISCONT);
        let key = !unit.flags().contains(gst::BufferFlags::DELTA_UNIT);
        let mut loss = watch.decoder.loss.lock().expect("nothing panics while it holds this");
        if loss.skips(discont, key, Instant::now()) {
            watch.touch();
            (outlet.corrupt)();
            // Taken here. (`Drop` of bindings and library together unrefs a null pointer.)
            return gst::PadProbeReturn::Handled;
        }
        watch.decoder.entered();
        gst::PadProbeReturn::Ok
    });
}

fn codec_name(caps: &gst::CapsRef) -> String {
    let Some(structure) = caps.structure(0) else { return String::new() };
    match &**structure.name() {
        "video/x-h264" => "H.264".to_owned(),
        "video/x-h265" => "H.265".to_owned(),
        "image/jpeg" => "MJPEG".to_owned(),
        "video/x-av1" => "AV1".to_owned(),
        "video/x-vp8" => "VP8".to_owned(),
        "video/x-vp9" => "VP9".to_owned(),
        "video/mpeg" => {
            let version = structure.get::<i32>("mpegversion").unwrap_or_default();
            format!("MPEG-{version}")
        }
        other => other.trim_start_matches("video/x-").to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn after_a_loss_nothing_passes_until_the_next_key_frame() {
        let mut loss = Loss::default();
        let now = Instant::now();
        // discont, key, skipped
        for (n, (discont, key, skipped)) in [
            (true, false, true), // joined in the middle of a group
            (false, false, true),
            (true, true, false),
            (false, false, false),
            (true, false, true),
            (false, false, true),
            (false, true, false),
            (false, false, false),
        ]
        .into_iter()
        .enumerate()
        {
            assert_eq!(loss.skips(discont, key, now), skipped, "unit {n}");
        }
    }

    #[test]
    fn a_stream_without_key_frames_is_not_given_up() {
        let mut loss = Loss::default();
        let start = Instant::now();
        assert!(loss.skips(true, false, start));
        assert!(loss.skips(false, false, start + Duration::from_millis(9_900)));
        assert!(!loss.skips(false, false, start + Duration::from_secs(10)));
    }
}
