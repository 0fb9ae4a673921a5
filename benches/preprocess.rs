//! `cargo bench --bench preprocess`: what a decoded frame costs on its way into the tensor, against
//! two well-kept crates and against GStreamer's own converter, all on one thread.
//!
//! The crates convert the frame, resize it and spread it over planes of floats, which is what a
//! program without a kernel of its own would do. Their numbers differ in the last bits; noblink's
//! are those of OpenCV and FFmpeg (`tests/parity.rs`). Rounds are interleaved; medians, and the
//! ratios of paired rounds.

use std::time::Instant;

use fast_image_resize as fir;
use gst_video::prelude::*;
use noblink::vision::letterbox::{Fit, Geometry};
use noblink::vision::picture::{Color, Matrix, Picture, Pixels, Plane, Range};
use noblink::vision::preprocess::{Order, Plan, Scale, Target};

const INPUT: (usize, usize) = (640, 640);
const ROUNDS: usize = 200;
const COLOR: Color = Color { matrix: Matrix::Bt709, range: Range::Limited };

/// From a frame to the tensor.
type Way<'f> = Box<dyn FnMut(&mut [f32]) + 'f>;

/// A frame as a decoder hands it out.
struct Frame {
    size: (usize, usize),
    /// I420, rows without padding but those that GStreamer wants.
    buffer: gst::Buffer,
    info: gst_video::VideoInfo,
}

impl Frame {
    fn new((width, height): (usize, usize)) -> Self {
        let info = gst_video::VideoInfo::builder(
            gst_video::VideoFormat::I420,
            width as u32,
            height as u32,
        )
        .colorimetry(&gst_video::VideoColorimetry::new(
            gst_video::VideoColorRange::Range16_235,
            gst_video::VideoColorMatrix::Bt709,
            gst_video::VideoTransferFunction::Bt709,
            gst_video::VideoColorPrimaries::Bt709,
        ))
        .build()
        .expect("a size that exists");
        let mut state = 1u32;
        let pixels: Vec<u8> = (0..info.size())
            .map(|at| {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                ((at / 7 % 200) as u8).wrapping_add((state >> 28) as u8).clamp(16, 235)
            })
            .collect();
        Self { size: (width, height), buffer: gst::Buffer::from_mut_slice(pixels), info }
    }

    fn planes(&self) -> gst_video::VideoFrameRef<&gst::BufferRef> {
        gst_video::VideoFrameRef::from_buffer_ref_readable(self.buffer.as_ref(), &self.info)
            .expect("the buffer is of the info's size")
    }
}

fn plane<'a>(mapped: &'a gst_video::VideoFrameRef<&gst::BufferRef>, n: u32) -> Plane<'a> {
    let stride = mapped.plane_stride()[n as usize] as usize;
    Plane { data: mapped.plane_data(n).expect("I420 has three"), stride }
}

/// Packed bytes to planes of floats.
fn normalise(rgb: &[u8], geometry: &Geometry, tensor: &mut [f32]) {
    let (width, area) = (geometry.resized.0, INPUT.0 * INPUT.1);
    let (r, gb) = tensor.split_at_mut(area);
    let (g, b) = gb.split_at_mut(area);
    for (row, line) in rgb.chunks_exact(3 * width).enumerate() {
        let at = (geometry.top + row) * INPUT.0 + geometry.left;
        let out = r[at..][..width].iter_mut().zip(&mut g[at..][..width]).zip(&mut b[at..][..width]);
        for (((r, g), b), pixel) in out.zip(line.chunks_exact(3)) {
            *r = f32::from(pixel[0]) / 255.0;
            *g = f32::from(pixel[1]) / 255.0;
            *b = f32::from(pixel[2]) / 255.0;
        }
    }
}

fn crates(frame: &Frame, geometry: &Geometry) -> impl FnMut(&mut [f32]) {
    let ((width, height), geometry) = (frame.size, *geometry);
    let mut full = fir::images::Image::new(width as u32, height as u32, fir::PixelType::U8x3);
    let (w, h) = geometry.resized;
    let mut small = fir::images::Image::new(w as u32, h as u32, fir::PixelType::U8x3);
    let bilinear = fir::ResizeAlg::Interpolation(fir::FilterType::Bilinear);
    let options = fir::ResizeOptions::new().resize_alg(bilinear);
    let mut resizer = fir::Resizer::new();
    move |tensor| {
        let mapped = frame.planes();
        let (y, u, v) = (plane(&mapped, 0), plane(&mapped, 1), plane(&mapped, 2));
        let image = yuv::YuvPlanarImage {
            y_plane: y.data,
            y_stride: y.stride as u32,
            u_plane: u.data,
            u_stride: u.stride as u32,
            v_plane: v.data,
            v_stride: v.stride as u32,
            width: width as u32,
            height: height as u32,
        };
        let (range, matrix) = (yuv::YuvRange::Limited, yuv::YuvStandardMatrix::Bt709);
        yuv::yuv420_to_rgb(&image, full.buffer_mut(), 3 * width as u32, range, matrix)
            .expect("planes and target are of one size");
        resizer.resize(&full, &mut small, &options).expect("both are of the same pixels");
        normalise(small.buffer(), &geometry, tensor);
    }
}

fn gstreamer(frame: &Frame, geometry: &Geometry) -> impl FnMut(&mut [f32]) {
    let geometry = *geometry;
    let (w, h) = geometry.resized;
    let info =
        gst_video::VideoInfo::builder(gst_video::VideoFormat::Rgb, w as u32, h as u32).build();
    let info = info.expect("a size that exists");
    let converter = gst_video::VideoConverter::new(&frame.info, &info, None);
    let converter = converter.expect("I420 becomes RGB");
    let mut out = Some(gst::Buffer::with_size(info.size()).expect("there is memory"));
    let mut packed = vec![0; 3 * w * h];
    move |tensor| {
        let buffer = out.take().expect("it is put back");
        let mut rgb = gst_video::VideoFrame::from_buffer_writable(buffer, &info)
            .expect("the buffer is of the info's size");
        let source = frame.planes();
        converter.frame_ref(&source, &mut rgb.as_mut_video_frame_ref());
        let stride = rgb.plane_stride()[0] as usize;
        let lines = rgb.plane_data(0).expect("RGB has one").chunks(stride);
        for (to, from) in packed.chunks_exact_mut(3 * w).zip(lines) {
            to.copy_from_slice(&from[..3 * w]);
        }
        normalise(&packed, &geometry, tensor);
        out = Some(rgb.into_buffer());
    }
}

fn ours(frame: &Frame, mut plan: Plan) -> impl FnMut(&mut [f32]) {
    move |tensor| {
        let mapped = frame.planes();
        let pixels =
            Pixels::I420 { y: plane(&mapped, 0), u: plane(&mapped, 1), v: plane(&mapped, 2) };
        let (width, height) = frame.size;
        let picture = Picture { width, height, color: COLOR, pixels };
        plan.write(&picture, &mut Target::F32(tensor)).expect("the plan is of this size");
    }
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<_> = values.collect();
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn main() {
    gst::init().expect("GStreamer is installed");
    println!("into {INPUT:?}, f32, one thread, medians of {ROUNDS} interleaved rounds, ms\n");
    println!(
        "{:<11}{:>9}{:>10}{:>17}{:>11}{:>12}{:>12}",
        "frame", "noblink", "portable", "yuv+fast_resize", "GStreamer", "crates/own", "GStr./own"
    );
    for size in [(1920, 1080), (1280, 720), (1366, 768), (2560, 1440), (3840, 2160), (640, 480)] {
        let frame = Frame::new(size);
        let geometry = Geometry::new(Fit::Letterbox, size, INPUT);
        let plan = || Plan::new(geometry, Order::Rgb, Scale::Unit);
        let mut ways: Vec<Way<'_>> = vec![
            Box::new(ours(&frame, plan())),
            Box::new(ours(&frame, plan().portable())),
            Box::new(crates(&frame, &geometry)),
            Box::new(gstreamer(&frame, &geometry)),
        ];
        let mut tensor = vec![0f32; 3 * INPUT.0 * INPUT.1];
        let mut times = vec![Vec::new(); ways.len()];
        for round in 0..ROUNDS + 5 {
            for (way, times) in ways.iter_mut().zip(&mut times) {
                let start = Instant::now();
                way(&mut tensor);
                if round >= 5 {
                    times.push(start.elapsed().as_secs_f64() * 1e3);
                }
            }
        }
        let ms: Vec<_> = times.iter().map(|t| median(t.iter().copied())).collect();
        let ratio = |n: usize| median(times[n].iter().zip(&times[0]).map(|(a, b)| a / b));
        println!(
            "{:<11}{:>9.2}{:>10.2}{:>17.2}{:>11.2}{:>12.1}{:>12.1}",
            format!("{}x{}", size.0, size.1),
            ms[0],
            ms[1],
            ms[2],
            ms[3],
            ratio(2),
            ratio(3)
        );
    }
}
