//! One frame as a JPEG, for people. Not for the path: it takes some 10 ms at 1080p.

use gst_video::VideoInfo;

/// How long the encoder may take; a 4K frame takes some 40 ms.
const WITHIN: gst::ClockTime = gst::ClockTime::from_seconds(5);

/// Encodes a decoder's buffer, in the quality that `jpegenc` has by itself (85 of 100). Fails when
/// the encoder is not installed.
pub fn encode(buffer: &gst::Buffer, info: &VideoInfo) -> Result<Vec<u8>, gst::glib::Error> {
    let failed = |why: &str| gst::glib::Error::new(gst::CoreError::Failed, why);
    let caps = info.to_caps().map_err(|e| failed(&e.to_string()))?;
    let sample = gst::Sample::builder().buffer(buffer).caps(&caps).build();
    let jpeg = gst::Caps::new_empty_simple("image/jpeg");
    let encoded = gst_video::convert_sample(&sample, &jpeg, Some(WITHIN))?;
    let bytes = encoded.buffer().ok_or_else(|| failed("the encoder gave nothing"))?;
    let bytes = bytes.map_readable().map_err(|e| failed(&e.to_string()))?;
    Ok(bytes.to_vec())
}
