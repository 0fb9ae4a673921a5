//! When a frame was captured.
//!
//! A camera says so in its RTCP sender reports, which tie RTP timestamps to its wall clock.
//! rtspsrc turns them into a `timestamp/x-ntp` meta on every buffer from the first report on.
//! A camera's clock is believed only while it is within [`PLAUSIBLE`] of ours: many stand at 1970
//! until someone sets them. Until then, and for every other source, it is the time of arrival.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use super::frame::Clock;

/// How far a camera's clock may be from ours.
pub const PLAUSIBLE: Duration = Duration::from_secs(10);

/// Seconds from 1900, where NTP starts, to 1970 (RFC 868).
const NTP_TO_UNIX_S: i64 = 2_208_988_800;

/// Now, in microseconds since 1970.
pub(super) fn unix_us() -> i64 {
    match SystemTime::now().duration_since(UNIX_EPOCH) {
        Ok(d) => d.as_micros() as i64,
        Err(e) => -(e.duration().as_micros() as i64),
    }
}

/// A capture time and how it was found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Capture {
    /// Microseconds since 1970.
    pub(super) time_us: i64,
    /// Whose clock that is.
    pub(super) clock: Clock,
    /// The camera's clock minus the time of arrival, where the camera's is known.
    pub(super) offset_us: Option<i64>,
}

/// Chooses between the camera's clock and the time of arrival.
pub(super) fn capture(ntp_us: Option<i64>, arrived_us: i64) -> Capture {
    let offset_us = ntp_us.map(|t| t - arrived_us);
    match (ntp_us, offset_us) {
        (Some(time_us), Some(offset)) if offset.unsigned_abs() <= PLAUSIBLE.as_micros() as u64 => {
            Capture { time_us, clock: Clock::Rtcp, offset_us }
        }
        _ => Capture { time_us: arrived_us, clock: Clock::Arrival, offset_us },
    }
}

/// The sender's clock on a buffer, in microseconds since 1970. It survives depayloader, parser and
/// libav's decoders in GStreamer 1.22, but rtph264depay adds the previous picture's before the
/// picture's own: the last one counts.
pub(super) fn ntp_us(buffer: &gst::BufferRef) -> Option<i64> {
    let of_sender = |meta: &gst::MetaRef<'_, gst::ReferenceTimestampMeta>| {
        meta.reference().structure(0).is_some_and(|s| s.name() == "timestamp/x-ntp")
    };
    let meta = buffer.iter_meta::<gst::ReferenceTimestampMeta>().filter(of_sender).last()?;
    Some((meta.timestamp().nseconds() / 1000) as i64 - NTP_TO_UNIX_S * 1_000_000)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_report_on_a_buffer_is_its_own() {
        gst::init().unwrap();
        let mut buffer = gst::Buffer::new();
        let ntp = gst::Caps::new_empty_simple("timestamp/x-ntp");
        let unix = gst::Caps::new_empty_simple("timestamp/x-unix");
        for (caps, unix_s) in [(&ntp, 1), (&ntp, 2), (&unix, 3)] {
            let time = gst::ClockTime::from_seconds(NTP_TO_UNIX_S as u64 + unix_s);
            let buffer = buffer.get_mut().expect("the only owner");
            gst::ReferenceTimestampMeta::add(buffer, caps, time, None);
        }
        assert_eq!(ntp_us(&buffer), Some(2_000_000));
    }

    #[test]
    fn a_camera_is_believed_within_ten_seconds() {
        let now = 1_791_191_564_000_000;
        let at = |ntp| capture(ntp, now);
        assert_eq!(at(None), Capture { time_us: now, clock: Clock::Arrival, offset_us: None });
        for (offset, clock) in [
            (-200_000, Clock::Rtcp),
            (10_000_000, Clock::Rtcp),
            (-10_000_001, Clock::Arrival),
            (3_600_000_000, Clock::Arrival),
            (-now, Clock::Arrival),
        ] {
            let c = at(Some(now + offset));
            assert_eq!((c.clock, c.offset_us), (clock, Some(offset)), "{offset}");
            let time_us = if clock == Clock::Rtcp { now + offset } else { now };
            assert_eq!(c.time_us, time_us, "{offset}");
        }
    }
}
