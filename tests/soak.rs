//! `make soak`: RTSP cameras and an overloaded model, for long; a service that is killed over and
//! over. Not part of `make test`, which holds short forms of it. `SOAK_SECONDS` and `SOAK_KILLS`
//! change the length. Prints what each camera got, and how many kills were survived.
#![allow(missing_docs, unreachable_pub, dead_code)]

mod harness;

use harness::kills::{at_failpoints, at_random};
use harness::overload::{Codec, ONE_FAST_FIVE_SLOW, Run, Sender};

const fn sender(id: &'static str, width: u32, height: u32, fps: u32, codec: Codec) -> Sender {
    Sender { id, width, height, fps, codec }
}

const FOUR: [Sender; 4] = [
    sender("hd", 1920, 1080, 30, Codec::H264),
    sender("mid", 1280, 720, 15, Codec::H264),
    sender("small", 640, 360, 5, Codec::H264),
    sender("hevc", 640, 360, 5, Codec::H265),
];

fn seconds() -> u64 {
    std::env::var("SOAK_SECONDS").map_or(600, |s| s.parse().expect("a number of seconds"))
}

#[test]
fn four_cameras_and_an_overloaded_model() {
    let run = Run::of(&FOUR, seconds());
    run.assert_fair();
    run.assert_flat();
}

#[test]
fn a_camera_of_60_fps_beside_five_of_5_fps() {
    let run = Run::of(&ONE_FAST_FIVE_SLOW, seconds().min(90));
    run.assert_fair();
}

#[test]
fn a_service_that_is_killed_at_random_moments() {
    let kills = std::env::var("SOAK_KILLS").map_or(200, |n| n.parse().expect("a number of kills"));
    at_random(kills, 0x9e37_79b9_7f4a_7c15);
}

#[test]
fn a_service_that_is_killed_at_every_failpoint_of_an_install() {
    assert!(at_failpoints(1) > 30, "an install passes more");
}
