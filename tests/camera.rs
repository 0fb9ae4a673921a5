//! Cameras against a real RTSP server on loopback, and against its failures.

use std::net::TcpListener;
use std::time::{Duration, Instant};

use noblink::camera::frame::Clock;
use noblink::camera::source::Source;
use noblink::camera::templates::Templates;
use noblink::camera::{State, Transport};
use noblink::rtsp::{RtspServer, Settings};

use crate::harness::camera::{Rig, clip, config, file_url, h264, h265, write_clip};
use crate::harness::secs;
use crate::harness::wire::Wire;

fn server() -> RtspServer {
    RtspServer::start(&Settings::default()).expect("a server on a free port")
}

fn consecutive(notes: &[crate::harness::camera::Note]) {
    for (n, note) in notes.iter().enumerate() {
        assert_eq!(note.id, n as u64, "ids run on from 0 without a hole");
    }
}

#[test]
fn h264_and_h265_stream_over_tcp_by_one_template() {
    let server = server();
    server.mount_launch("/h264", &h264(1280, 720, 20)).unwrap();
    server.mount_launch("/h265", &h265(640, 360, 10)).unwrap();
    let rig =
        Rig::start(vec![config("a", &server.url("/h264")), config("b", &server.url("/h265"))]);
    for (camera, codec, size, fps) in
        [(0, "H.264", (1280, 720), 20.0), (1, "H.265", (640, 360), 10.0)]
    {
        let notes = rig.until_frames(camera, 20, secs(15));
        assert!(notes.iter().all(|n| n.size == size && n.luma > 1.0), "{notes:?}");
        let status = rig.until_streaming(camera, secs(1));
        let stream = status.stream.clone().expect("it streams");
        assert_eq!(stream.codec.as_deref(), Some(codec));
        assert_eq!((stream.width as usize, stream.height as usize), size);
        assert_eq!(stream.fps, Some(fps));
        assert_eq!(stream.transport, Some(Transport::Tcp));
        assert_eq!((status.connects, status.reason), (1, None));
    }
    rig.ledger(0);
    assert!(rig.stop() < secs(3));
}

#[test]
fn a_camera_streams_over_udp() {
    let server = server();
    server.mount_launch("/udp", &h264(640, 360, 20)).unwrap();
    let mut camera = config("a", &server.url("/udp"));
    camera.pipeline = "rtsp-udp".into();
    let rig = Rig::start(vec![camera]);
    rig.until_frames(0, 20, secs(15));
    let stream = rig.cameras[0].status().stream.expect("it streams");
    assert_eq!(stream.transport, Some(Transport::Udp));
}

#[test]
fn a_clip_loops_without_a_seam() {
    let server = server();
    server.mount_clip("/clip", &clip(), true).unwrap();
    let rig = Rig::start(vec![config("a", &server.url("/clip"))]);
    // Two and a half turns of 2 s.
    let notes = rig.until_frames(0, 100, secs(18));
    consecutive(&notes);
    let pts: Vec<_> = notes.iter().map(|n| n.pts_ns.expect("RTP has timestamps")).collect();
    for pair in pts.windows(2) {
        let step_ms = (pair[1] - pair[0]) as f64 / 1e6;
        assert!((5.0..150.0).contains(&step_ms), "{step_ms} ms between two frames at 20 a second");
    }
    // At its own pace: the first 0.2 s may come in one go.
    let took = notes[99].arrived.duration_since(notes[0].arrived);
    assert!((4.0..6.5).contains(&took.as_secs_f64()), "100 frames at 20 a second took {took:?}");
}

#[test]
fn the_capture_time_is_the_senders_from_its_first_report_on() {
    let server = server();
    server.mount_clip("/clip", &clip(), true).unwrap();
    let rig = Rig::start(vec![config("a", &server.url("/clip"))]);
    rig.reach(0, secs(15), |s| s.clock == Some(Clock::Rtcp));
    let notes = rig.until_more(0, 20, secs(10));
    let first = notes.iter().position(|n| n.clock == Clock::Rtcp).expect("as the status says");
    for note in &notes[first..] {
        assert_eq!(note.clock, Clock::Rtcp);
    }
    for pair in notes[first..].windows(2) {
        let step_ms = (pair[1].time_us - pair[0].time_us) as f64 / 1e3;
        assert!((40.0..60.0).contains(&step_ms), "{step_ms} ms between two captures");
    }
    // Both ends are this machine: what is left is the jitter buffer and the way.
    let offset_ms = rig.cameras[0].status().clock_offset_ms.expect("known from the report");
    assert!((-2000..=50).contains(&offset_ms), "{offset_ms} ms");
}
