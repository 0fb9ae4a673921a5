//! A decoded frame on its way to the worker: the decoder's own buffer, by reference.

use std::sync::Arc;
use std::time::Instant;

use gst_video::prelude::*;
use gst_video::{VideoColorMatrix, VideoColorRange, VideoFormat, VideoFrameRef, VideoInfo};

use crate::vision::picture::{Color, Matrix, Picture, Pixels, Plane, Range};

/// Where a capture time comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Clock {
    /// The camera's own clock, by its RTCP sender reports.
    Rtcp,
    /// This machine's clock when the frame arrived.
    Arrival,
}

/// A frame as it leaves the appsink. Holding it, or a clone, holds the decoder's buffer: keep it
/// short.
#[derive(Clone)]
pub struct Frame {
    /// Counts the camera's offered frames from 0, running on over reconnects.
    pub id: u64,
    /// Presentation time in the stream, nanoseconds.
    pub pts_ns: Option<u64>,
    /// Capture time, microseconds since 1970.
    pub time_us: i64,
    /// Where `time_us` comes from.
    pub clock: Clock,
    /// When the appsink delivered it.
    pub arrived: Instant,
    /// The pixels.
    pub buffer: gst::Buffer,
    /// Format, size, strides.
    pub info: Arc<VideoInfo>,
    /// How to read the colours, from the caps or forced by the configuration.
    pub color: Color,
}

/// Why a buffer can't be read as a picture.
#[derive(Debug, thiserror::Error)]
pub enum PictureError {
    /// The buffer can't be mapped into memory for reading.
    #[error("the frame's buffer can't be mapped for reading")]
    Map,
    /// The decoder delivers a format that the path does not take.
    #[error("pixel format {0:?} is not one of I420, NV12, RGB")]
    Format(VideoFormat),
}

impl Frame {
    /// Maps the buffer and lends it as a picture to `f`. No pixel is copied.
    pub fn with_picture<T>(&self, f: impl FnOnce(&Picture<'_>) -> T) -> Result<T, PictureError> {
        let mapped = VideoFrameRef::from_buffer_ref_readable(self.buffer.as_ref(), &self.info)
            .map_err(|_| PictureError::Map)?;
        let plane = |n: u32| -> Result<Plane<'_>, PictureError> {
            Ok(Plane {
                data: mapped.plane_data(n).map_err(|_| PictureError::Map)?,
                stride: mapped.plane_stride()[n as usize] as usize,
            })
        };
        let pixels = match mapped.format() {
            VideoFormat::I420 => Pixels::I420 { y: plane(0)?, u: plane(1)?, v: plane(2)? },
            VideoFormat::Nv12 => Pixels::Nv12 { y: plane(0)?, uv: plane(1)? },
            VideoFormat::Rgb => Pixels::Rgb(plane(0)?),
            other => return Err(PictureError::Format(other)),
        };
        Ok(f(&Picture {
            width: mapped.width() as usize,
            height: mapped.height() as usize,
            color: self.color,
            pixels,
        }))
    }
}

/// Reads matrix and range from the caps. Unspecified: BT.709 from 720 lines on, limited range.
pub fn color_of(info: &VideoInfo) -> Color {
    let colorimetry = info.colorimetry();
    let matrix = match colorimetry.matrix() {
        VideoColorMatrix::Bt709 => Matrix::Bt709,
        VideoColorMatrix::Bt601 => Matrix::Bt601,
        _ if info.height() >= 720 => Matrix::Bt709,
        _ => Matrix::Bt601,
    };
    let range = match colorimetry.range() {
        VideoColorRange::Range0_255 => Range::Full,
        _ => Range::Limited,
    };
    Color { matrix, range }
}
