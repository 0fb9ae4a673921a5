//! A few frames of a camera, as the worker would see them: `noblink model calibrate`.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crossbeam_channel::bounded;

use super::frame::{Frame, PictureError};
use super::jpeg;
use super::keeper::{DISMANTLE_WITHIN, Keeper};
use super::pipeline::{Event, Outlet, Pipeline, Settings, Watch};
use super::reason::{self, Reason};
use super::source::Source;
use super::templates::Templates;
use crate::config;
use crate::queue::Arrival;
use crate::vision::picture::Picture;

/// A frame that was kept. Holds the decoder's buffer: decoders have few, so take few.
pub struct Grabbed(Frame);

impl Grabbed {
    /// See [`Frame::with_picture`].
    ///
    /// # Errors
    /// As there.
    pub fn with_picture<T>(&self, f: impl FnOnce(&Picture<'_>) -> T) -> Result<T, PictureError> {
        self.0.with_picture(f)
    }

    /// The frame as a JPEG.
    ///
    /// # Errors
    /// The encoder is not installed.
    pub fn jpeg(&self) -> Result<Vec<u8>, gst::glib::Error> {
        jpeg::encode(&self.0.buffer, &self.0.info)
    }
}

/// Takes `count` frames of a camera, `every` so often at most; fewer when a file ends before.
/// `patience` is how long it may be silent.
///
/// # Errors
/// The camera sends nothing, or breaks before the last frame.
pub fn grab(
    camera: &config::Camera,
    templates: &Templates,
    count: usize,
    every: Duration,
    patience: Duration,
) -> Result<Vec<Grabbed>, Reason> {
    let source = &camera.source;
    let text = templates.find(&camera.pipeline).map_err(|e| Reason::Pipeline(e.to_string()))?;
    let taken: Arc<Mutex<Vec<Grabbed>>> = Arc::default();
    let outlet = {
        let taken = Arc::clone(&taken);
        let next = Mutex::new(Instant::now());
        Outlet {
            frame: Box::new(move |arrival: Arrival, _| {
                let mut next = next.lock().expect("nothing panics while it holds this");
                let mut taken = taken.lock().expect("nothing panics while it holds this");
                if arrival.arrived >= *next && taken.len() < count {
                    *next = arrival.arrived + every;
                    let id = taken.len() as u64;
                    // A copy: the decoder's own buffers would run out.
                    let buffer = arrival.buffer.copy_deep().unwrap_or(arrival.buffer);
                    taken.push(Grabbed(Frame {
                        id,
                        pts_ns: arrival.pts_ns,
                        time_us: arrival.time_us,
                        clock: arrival.clock,
                        arrived: arrival.arrived,
                        buffer,
                        info: arrival.info,
                        color: arrival.color,
                    }));
                }
                taken.len() < count
            }),
            corrupt: Box::new(|| {}),
        }
    };
    let settings = Settings { paced: source.is_file(), matrix: camera.color };
    let (events, told) = bounded(8);
    let watch = Watch::start(false);
    let build = {
        let (source, watch, events) = (source.clone(), Arc::clone(&watch), events.clone());
        move || Pipeline::build(&text, &source, settings, &watch, outlet, events)
    };
    let keeper = Keeper::start("grab", &Arc::default(), events, build)
        .map_err(|e| Reason::Other(format!("no thread for the pipeline: {e}")))?;
    let enough = || taken.lock().expect("nothing panics while it holds this").len() >= count;
    let ended = loop {
        if enough() {
            break Ok(());
        }
        let event = told.recv_timeout(Duration::from_millis(50));
        match event {
            // The last frame taken stops the stream, which is no failure.
            _ if enough() => break Ok(()),
            Ok(Event::Ended) if watch.frames() > 0 => break Ok(()),
            Ok(Event::Ended) => break Err(Reason::NoVideo),
            Ok(Event::Failed(failure)) => {
                break Err(match (failure.reason(source), source) {
                    (Some(reason), _) => reason,
                    (None, Source::Rtsp(url)) => {
                        reason::ask(url, Some(&failure), Instant::now() + DISMANTLE_WITHIN)
                    }
                    (None, _) => Reason::Ended,
                });
            }
            _ if watch.active_at().elapsed() > patience.max(every) => {
                break Err(Reason::Silence(patience));
            }
            _ => {}
        }
    };
    watch.silence();
    keeper.wait(Instant::now() + DISMANTLE_WITHIN);
    ended?;
    Ok(std::mem::take(&mut *taken.lock().expect("nothing panics while it holds this")))
}
