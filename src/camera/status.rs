//! What a camera says of itself.

use std::fmt;
use std::time::Duration;

use serde::Serialize;

use super::frame::Clock;
use super::pipeline::{Seen, Watch};
use super::source::Source;
use crate::records::rounded;

/// Where the supervisor is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// A pipeline was started and has not delivered a frame.
    Connecting,
    /// Frames come.
    Streaming,
    /// Frames stopped coming; the pipeline is being taken down.
    Stalled,
    /// Waiting before the next attempt.
    Backoff,
    /// A file was played to its end.
    Ended,
    /// Switched off.
    Disabled,
    /// Not in the configuration any more; the last word on it.
    Removed,
}

impl State {
    /// All of them.
    pub const ALL: [Self; 6] = [
        Self::Connecting,
        Self::Streaming,
        Self::Stalled,
        Self::Backoff,
        Self::Ended,
        Self::Disabled,
    ];

    /// As it stands on the wire.
    pub fn name(self) -> &'static str {
        match self {
            Self::Connecting => "connecting",
            Self::Streaming => "streaming",
            Self::Stalled => "stalled",
            Self::Backoff => "backoff",
            Self::Ended => "ended",
            Self::Disabled => "disabled",
            Self::Removed => "removed",
        }
    }
}

/// How RTP reaches us.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Transport {
    /// Inside the RTSP connection.
    Tcp,
    /// Inside the RTSP connection, encrypted.
    Tls,
    /// Beside it.
    Udp,
}

/// What the source sends.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Stream {
    /// As people call it: `H.264`; missing where nothing was decoded.
    pub codec: Option<String>,
    /// Pixels.
    pub width: u32,
    /// Pixels.
    pub height: u32,
    /// Declared by the stream, else measured; missing in the first seconds of one that does not
    /// say.
    pub fps: Option<f64>,
    /// For RTSP.
    pub transport: Option<Transport>,
}

/// A camera's status.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct CameraStatus {
    /// Where the supervisor is.
    pub state: State,
    /// Since when, microseconds since 1970.
    pub since_us: i64,
    /// Why it does not stream.
    pub reason: Option<String>,
    /// Attempts that failed in a row; 0 after 1 s of streaming.
    pub attempt: u32,
    /// Time to the next attempt, in `backoff`.
    pub retry_in_s: Option<f64>,
    /// What the source sends or sent last.
    pub stream: Option<Stream>,
    /// Whose clock the latest frame carries.
    pub clock: Option<Clock>,
    /// The camera's clock minus the time of arrival, where the camera sends its clock. Negative by
    /// the way's delay when both clocks are right.
    pub clock_offset_ms: Option<i64>,
    /// Times that the source began to stream.
    pub connects: u64,
    /// Pipelines that were given up because they could not be taken down in time, and still are.
    pub leaked_pipelines: u64,
    /// Supervisors that were stuck, or broke, and were replaced.
    pub leaked_supervisors: u64,
}

impl CameraStatus {
    /// Whether there is nothing in `newer` that is worth a message of its own: offsets and
    /// measured rates move all the time.
    pub fn says_the_same(&self, newer: &Self) -> bool {
        let picture =
            |s: &Self| s.stream.as_ref().map(|s| (s.codec.clone(), s.width, s.height, s.transport));
        let news = |s: &Self| (s.state, s.reason.clone(), s.clock, s.connects, picture(s));
        news(self) == news(newer)
    }
}

impl fmt::Display for Stream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}x{}", self.codec.as_deref().unwrap_or("raw"), self.width, self.height)?;
        if let Some(fps) = self.fps {
            write!(f, " at {fps} fps")?;
        }
        match self.transport {
            Some(Transport::Tcp) => f.write_str(" over TCP"),
            Some(Transport::Tls) => f.write_str(" over TLS"),
            Some(Transport::Udp) => f.write_str(" over UDP"),
            None => Ok(()),
        }
    }
}

impl Stream {
    /// Reads off a running attempt; `measured`: frames a second so far.
    pub(super) fn of(
        source: &Source,
        watch: &Watch,
        seen: &Seen,
        measured: Option<f64>,
    ) -> Option<Self> {
        let info = seen.info.as_ref()?;
        let declared = declared_fps(info);
        let transport = match source {
            Source::Rtsp(_) if watch.decoder.is_udp() => Some(Transport::Udp),
            Source::Rtsp(url) if url.scheme() == "rtsps" => Some(Transport::Tls),
            Source::Rtsp(_) => Some(Transport::Tcp),
            Source::File(_) | Source::V4l2(_) | Source::Test { .. } => None,
        };
        Some(Self {
            codec: watch.decoder.codec().map(str::to_owned),
            width: info.width(),
            height: info.height(),
            fps: declared.or(measured),
            transport,
        })
    }
}

/// Frames a second as the stream declares them; 0 = it does not.
pub(super) fn declared_fps(info: &gst_video::VideoInfo) -> Option<f64> {
    let fps = info.fps();
    let declared = f64::from(fps.numer()) / f64::from(fps.denom().max(1));
    // Nobody means the 90 kHz that some cameras write into the VUI.
    (declared > 0.0 && declared <= 240.0).then(|| rounded(declared, 2))
}

/// Frames a second from a count, the first of them at the start of the time.
pub(super) fn rate(frames: u64, over: Duration) -> Option<f64> {
    let enough = frames > 1 && !over.is_zero();
    enough.then(|| rounded((frames - 1) as f64 / over.as_secs_f64(), 2))
}
