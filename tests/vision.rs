//! Geometry, resampling, colour, decode, suppression: by hand-computed values.

use half::f16;
use noblink::vision::color::ToRgb;
use noblink::vision::decode::{self, Candidate, DecodeError};
use noblink::vision::letterbox::{Fit, Geometry};
use noblink::vision::nms;
use noblink::vision::picture::{Color, Matrix, Picture, Pixels, Plane, Range};
use noblink::vision::preprocess::{Order, Plan, PreprocessError, Scale, Target};
use proptest::prelude::*;

const LIMITED: Color = Color { matrix: Matrix::Bt601, range: Range::Limited };

/// Python: `LetterBox(new_shape).get_params({"img": …})`, ultralytics 8.4.190.
#[test]
fn letterbox_rounds_like_ultralytics() {
    for (source, input, resized, left, top) in [
        ((1920, 1080), (640, 640), (640, 360), 0, 140),
        ((1280, 720), (640, 384), (640, 360), 0, 12),
        // 768 * 640 / 1366 = 359.8; the odd bar's smaller half goes first.
        ((1366, 768), (640, 640), (640, 360), 0, 140),
        ((480, 854), (640, 640), (360, 640), 140, 0),
        // 333 * 320 / 500 = 213.12; (320 - 213) / 2 - 0.1 = 53.4
        ((500, 333), (320, 320), (320, 213), 0, 53),
        // 5 * 0.5 = 2.5 rounds to the even 2, not to 3.
        ((64, 5), (32, 32), (32, 2), 0, 15),
        // Thin pictures keep a pixel.
        ((4000, 1), (640, 640), (640, 1), 0, 319),
    ] {
        let g = Geometry::new(Fit::Letterbox, source, input);
        assert_eq!((g.resized, g.left, g.top), (resized, left, top), "{source:?} in {input:?}");
    }
}

#[test]
fn corner_and_stretch_leave_no_bar_in_front() {
    let corner = Geometry::new(Fit::Corner, (1366, 768), (640, 640));
    assert_eq!((corner.resized, corner.left, corner.top), ((640, 359), 0, 0));
    let stretch = Geometry::new(Fit::Stretch, (1366, 768), (640, 640));
    assert_eq!((stretch.resized, stretch.left, stretch.top), ((640, 640), 0, 0));
}

#[test]
fn boxes_come_back_to_the_source_and_are_clipped() {
    let g = Geometry::new(Fit::Letterbox, (1920, 1080), (640, 640));
    let back = g.to_source([160.0, 140.0 + 90.0, 320.0, 140.0 + 180.0]);
    assert_eq!(back, [0.25, 0.25, 0.5, 0.5]);
    assert_eq!(g.to_source([-9.0, 0.0, 700.0, 640.0]), [0.0, 0.0, 1.0, 1.0]);
}

proptest! {
    #[test]
    fn any_geometry_lies_within_the_input(
        source in (1usize..5000, 1usize..5000),
        input in (1usize..100, 1usize..100).prop_map(|(w, h)| (w * 32, h * 32)),
        fit in prop_oneof![Just(Fit::Letterbox), Just(Fit::Corner), Just(Fit::Stretch)],
    ) {
        let g = Geometry::new(fit, source, input);
        prop_assert!(g.resized.0 >= 1 && g.left + g.resized.0 <= input.0);
        prop_assert!(g.resized.1 >= 1 && g.top + g.resized.1 <= input.1);
    }

    /// A picture of one colour is that colour in the tensor, whatever the sizes and strides.
    #[test]
    fn one_colour_stays_one_colour(
        (w, h) in (1usize..90, 1usize..90),
        pad in 0usize..5,
        kind in 0..3,
    ) {
        let (w2, h2) = (w.div_ceil(2), h.div_ceil(2));
        let rgb = vec![77u8; (3 * w + pad) * h];
        let (y, uv) = (vec![100u8; (w + pad) * h], vec![128u8; (2 * w2 + pad) * h2]);
        let luma = Plane { data: &y, stride: w + pad };
        let chroma = Plane { data: &uv, stride: w2 + pad };
        let (pixels, value) = match kind {
            0 => (Pixels::Rgb(Plane { data: &rgb, stride: 3 * w + pad }), 77.0),
            // (100 - 16) * 255 / 219 = 97.8, cut.
            1 => (Pixels::I420 { y: luma, u: chroma, v: chroma }, 97.0),
            _ => (Pixels::Nv12 { y: luma, uv: Plane { data: &uv, stride: 2 * w2 + pad } }, 97.0),
        };
        let picture = Picture { width: w, height: h, color: LIMITED, pixels };
        let mut tensor = vec![-1.0; 3 * 64 * 32];
        let place = Geometry::new(Fit::Letterbox, (w, h), (64, 32));
        let mut plan = Plan::new(place, Order::Rgb, Scale::Byte);
        let mut target = Target::F32(&mut tensor);
        plan.write_bars(&mut target);
        plan.write(&picture, &mut target).expect("planes are whole");
        for (i, v) in tensor.iter().enumerate() {
            let (x, y) = (i % 64, i / 64 % 32);
            let inside = (place.left..place.left + place.resized.0).contains(&x)
                && (place.top..place.top + place.resized.1).contains(&y);
            prop_assert_eq!(*v, if inside { value } else { 114.0 }, "at {} {}", x, y);
        }
    }

    /// The vector instructions of this machine give what plain code gives.
    #[test]
    fn every_machine_makes_the_same_tensor(
        (w, h) in (1usize..400, 1usize..40),
        input in prop_oneof![Just((32, 32)), Just((96, 64)), Just((320, 64)), Just((352, 352))],
        fit in prop_oneof![Just(Fit::Letterbox), Just(Fit::Stretch)],
        kind in 0..3,
        seed in any::<u32>(),
    ) {
        let mut state = seed;
        let mut noise = |bytes: usize| -> Vec<u8> {
            let next = |_| {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                (state >> 24) as u8
            };
            (0..bytes).map(next).collect()
        };
        let (w2, h2) = (w.div_ceil(2), h.div_ceil(2));
        let (first, uv) = (noise(3 * w * h), noise(2 * w2 * h2));
        let luma = Plane { data: &first, stride: w };
        let (u, v) = uv.split_at(w2 * h2);
        let half = |data| Plane { data, stride: w2 };
        let pixels = match kind {
            0 => Pixels::Rgb(Plane { data: &first, stride: 3 * w }),
            1 => Pixels::I420 { y: luma, u: half(u), v: half(v) },
            _ => Pixels::Nv12 { y: luma, uv: Plane { data: &uv, stride: 2 * w2 } },
        };
        let picture = Picture { width: w, height: h, color: LIMITED, pixels };
        let plan = || Plan::new(Geometry::new(fit, (w, h), input), Order::Rgb, Scale::Byte);
        let written = |mut plan: Plan| {
            let mut tensor = vec![0.0; 3 * input.0 * input.1];
            plan.write(&picture, &mut Target::F32(&mut tensor)).expect("the plane is whole");
            tensor
        };
        prop_assert_eq!(written(plan()), written(plan().portable()));
    }

    #[test]
    fn planes_that_are_too_short_are_refused(cut in 1usize..200) {
        let y = vec![0u8; 16 * 16];
        let data = &y[..y.len() - cut];
        let luma = Plane { data, stride: 16 };
        let chroma = Plane { data: &y[..64], stride: 8 };
        let pixels = Pixels::I420 { y: luma, u: chroma, v: chroma };
        let picture = Picture { width: 16, height: 16, color: LIMITED, pixels };
        let place = Geometry::new(Fit::Stretch, (16, 16), (32, 32));
        let mut tensor = vec![0.0; 3 * 32 * 32];
        let result = Plan::new(place, Order::Rgb, Scale::Unit)
            .write(&picture, &mut Target::F32(&mut tensor));
        prop_assert_eq!(
            result,
            Err(PreprocessError::ShortPlane { found: 256 - cut, needed: 256 })
        );
    }
}

/// Four columns to two, by hand: an exact half is the mean of 2×2, rounded half up.
#[test]
fn a_half_is_the_mean_of_four() {
    let gray = |rows: [[u8; 4]; 4]| -> Vec<u8> {
        rows.iter().flatten().flat_map(|v| [*v, *v, *v]).collect()
    };
    let rgb = gray([[0, 1, 10, 10], [1, 0, 10, 13], [255, 255, 0, 0], [255, 254, 0, 1]]);
    assert_eq!(resized(&rgb, (4, 4), (2, 2)), [1, 11, 255, 0]);
}

/// `cv2.resize(np.array([[0, 100, 200, 50, 25]], np.uint8), (3, 1))` and upwards `(4, 1)` of
/// `[[0, 90]]`, OpenCV 5.0.0.
#[test]
fn other_ratios_are_opencvs() {
    let gray = |row: &[u8]| -> Vec<u8> { row.iter().flat_map(|v| [*v, *v, *v]).collect() };
    assert_eq!(resized(&gray(&[0, 100, 200, 50, 25]), (5, 1), (3, 1)), [33, 200, 33]);
    assert_eq!(resized(&gray(&[0, 90]), (2, 1), (4, 1)), [0, 23, 68, 90]);
}

/// The red plane of a stretch, as bytes.
fn resized(rgb: &[u8], source: (usize, usize), target: (usize, usize)) -> Vec<u8> {
    let plane = Plane { data: rgb, stride: 3 * source.0 };
    let picture =
        Picture { width: source.0, height: source.1, color: LIMITED, pixels: Pixels::Rgb(plane) };
    let mut tensor = vec![0.0; 3 * target.0 * target.1];
    Plan::new(Geometry::new(Fit::Stretch, source, target), Order::Rgb, Scale::Byte)
        .write(&picture, &mut Target::F32(&mut tensor))
        .expect("the plane is whole");
    tensor[..target.0 * target.1].iter().map(|v| *v as u8).collect()
}

#[test]
fn bgr_and_unit_scale_and_half_floats() {
    let rgb = [51u8, 102, 204];
    let picture = Picture {
        width: 1,
        height: 1,
        color: LIMITED,
        pixels: Pixels::Rgb(Plane { data: &rgb, stride: 3 }),
    };
    let place = Geometry::new(Fit::Stretch, (1, 1), (1, 1));
    let mut tensor = [f16::ZERO; 3];
    Plan::new(place, Order::Bgr, Scale::Unit)
        .write(&picture, &mut Target::F16(&mut tensor))
        .expect("the plane is whole");
    assert_eq!(tensor, [0.8, 0.4, 0.2].map(f16::from_f32));
}

/// Colour bars at 75 %, limited range (ITU-R BT.601 and BT.709, 8 bits), within FFmpeg's cuts.
#[test]
fn colours_follow_matrix_and_range() {
    let full = Range::Full;
    for (matrix, range, yuv, rgb) in [
        (Matrix::Bt601, Range::Limited, [65u8, 100, 212], [191i16, 0, 0]),
        (Matrix::Bt709, Range::Limited, [51, 109, 212], [191, 0, 0]),
        (Matrix::Bt601, Range::Limited, [235, 128, 128], [255, 255, 255]),
        (Matrix::Bt709, Range::Limited, [16, 128, 128], [0, 0, 0]),
        (Matrix::Bt601, full, [255, 128, 128], [255, 255, 255]),
        (Matrix::Bt601, full, [29, 255, 107], [0, 0, 255]),
    ] {
        let (mut r, mut g, mut b) = ([0u8], [0u8], [0u8]);
        let [y, u, v] = yuv.map(|v| [v]);
        ToRgb::new(Color { matrix, range }).planes([&y, &u, &v], [&mut r, &mut g, &mut b]);
        for (got, wanted) in [r[0], g[0], b[0]].into_iter().zip(rgb) {
            let off = (i16::from(got) - wanted).abs();
            assert!(off <= 3, "{matrix:?} {range:?} {yuv:?}: {r:?} {g:?} {b:?}, not {rgb:?}");
        }
    }
}

fn plain(found: &[Candidate]) -> Vec<([f32; 4], f32, u32)> {
    found.iter().map(|c| (c.corners, c.score, c.class)).collect()
}

#[test]
fn yolo8_takes_the_first_best_class_strictly_above() {
    // Rows: cx, cy, w, h, two classes; three anchors.
    #[rustfmt::skip]
    let data = [
        10.0, 50.0, 5.0,
        20.0, 60.0, 5.0,
        4.0, 10.0, 2.0,
        6.0, 10.0, 2.0,
        0.5, 0.2, 0.25,
        0.5, 0.9, 0.1,
    ];
    let mut found = Vec::new();
    decode::yolo8(&data, 3, 0.25, &mut found).expect("finite");
    let wanted = vec![([8.0, 17.0, 12.0, 23.0], 0.5, 0), ([45.0, 55.0, 55.0, 65.0], 0.9, 1)];
    assert_eq!(plain(&found), wanted);
}

#[test]
fn yolo8_sees_odd_numbers_anywhere() {
    for odd in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        for at in [0, 3 * 700, 4 * 700 + 3, 6 * 700 - 1] {
            let mut data = vec![0.1; 6 * 700];
            data[at] = odd;
            let result = decode::yolo8(&data, 700, 0.25, &mut Vec::new());
            assert_eq!(result, Err(DecodeError::NotFinite), "{odd} at {at}");
        }
    }
}

#[test]
fn yolo5_multiplies_objectness_and_class() {
    #[rustfmt::skip]
    let data = [
        10.0, 20.0, 4.0, 6.0, 0.8, 0.5, 0.25,
        10.0, 20.0, 4.0, 6.0, 0.5, 0.5, 0.25,
    ];
    let mut found = Vec::new();
    decode::yolo5(&data, 7, 0.25, &mut found).expect("finite");
    // The second is 0.25, which is not above 0.25.
    assert_eq!(plain(&found), [([8.0, 17.0, 12.0, 23.0], 0.4, 0)]);
}

#[test]
fn yolox_walks_its_grid() {
    // 64x32 has 8x4 cells of 8, 4x2 of 16, 2x1 of 32.
    let mut data = vec![0.0; (32 + 8 + 2) * 6];
    let mut set = |row: usize, values: [f32; 6]| data[row * 6..][..6].copy_from_slice(&values);
    // Cell (3, 1) of stride 8: centre (3.5, 1.25) * 8, size e^0 * 8 by 2 * 8.
    set(8 + 3, [0.5, 0.25, 0.0, 2f32.ln(), 0.9, 0.5]);
    // Cell (1, 0) of stride 32.
    set(32 + 8 + 1, [0.5, 0.5, 0.0, 0.0, 0.5, 0.8]);
    let mut found = Vec::new();
    decode::yolox(&data, 6, (64, 32), 0.25, &mut found).expect("finite");
    let wanted = vec![([24.0, 2.0, 32.0, 18.0], 0.45, 0), ([32.0, 0.0, 64.0, 32.0], 0.4, 0)];
    assert_eq!(plain(&found), wanted);
    data[8 * 6 + 3 * 6 + 2] = 200.0;
    let result = decode::yolox(&data, 6, (64, 32), 0.25, &mut Vec::new());
    assert_eq!(result, Err(DecodeError::NotFinite), "e^200 is infinite");
}

#[test]
fn end_to_end_boxes_are_taken_as_they_are() {
    #[rustfmt::skip]
    let data = [
        1.0, 2.0, 3.0, 4.0, 0.9, 1.0,
        1.0, 2.0, 3.0, 4.0, 0.8, 1.0,
        9.0, 9.0, 9.0, 9.0, 0.0, 0.0,
    ];
    let mut found = Vec::new();
    decode::end2end(&data, 2, 0.25, &mut found).expect("finite");
    let corners = [1.0, 2.0, 3.0, 4.0];
    assert_eq!(plain(&found), [(corners, 0.9, 1), (corners, 0.8, 1)]);
    let unknown = decode::end2end(&data, 1, 0.25, &mut Vec::new());
    assert_eq!(unknown, Err(DecodeError::UnknownClass { class: 1, labels: 1 }));
}

#[test]
fn rtdetr_is_in_fractions_with_and_without_ranking() {
    let corners = [160.0, 80.0, 480.0, 240.0];
    let mut found = Vec::new();
    let scores = [0.5, 0.5, 0.5, 0.5, 0.1, 0.7, 0.2];
    decode::rtdetr(&scores, 7, (640, 320), 0.25, &mut found).expect("finite");
    assert_eq!(plain(&found), [(corners, 0.7, 1)]);
    found.clear();
    let ranked = [0.5, 0.5, 0.5, 0.5, 0.7, 1.0];
    decode::rtdetr_ranked(&ranked, 2, (640, 320), 0.25, &mut found).expect("finite");
    assert_eq!(plain(&found), [(corners, 0.7, 1)]);
}

fn candidate(corners: [f32; 4], score: f32, class: u32, order: u32) -> Candidate {
    Candidate { corners, score, class, order }
}

#[test]
fn suppression_is_per_class_and_strictly_above() {
    let square = [0.0, 0.0, 10.0, 10.0];
    // Two thirds of it: IoU is exactly 0.5 with the half, above with itself.
    let half = [0.0, 0.0, 10.0, 5.0];
    let mut found = vec![
        candidate(half, 0.6, 0, 0),
        candidate(square, 0.9, 0, 1),
        candidate(square, 0.9, 0, 2),
        candidate(square, 0.8, 79, 3),
    ];
    nms::suppress(&mut found, 0.5);
    let kept: Vec<_> = found.iter().map(|c| c.order).collect();
    assert_eq!(kept, [1, 3, 0], "equal scores: the earlier one; 0.5 does not exceed 0.5");
}

#[test]
fn three_hundred_boxes_are_enough() {
    let apart = |n: u32| [n as f32 * 20.0, 0.0, n as f32 * 20.0 + 10.0, 10.0];
    let mut found: Vec<_> =
        (0..1000).map(|n| candidate(apart(n % 350), 0.001 * n as f32, 0, n)).collect();
    nms::suppress(&mut found, 0.7);
    assert_eq!(found.len(), nms::DETECTIONS_MAX);
    assert!(found.is_sorted_by(|a, b| a.score >= b.score));
}
