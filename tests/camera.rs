//! Cameras against a real RTSP server on loopback, and against its failures.

use std::net::TcpListener;
use std::os::unix::fs::OpenOptionsExt as _;
use std::time::{Duration, Instant};

use noblink::camera::frame::Clock;
use noblink::camera::probe::probe;
use noblink::camera::source::Source;
use noblink::camera::templates::Templates;
use noblink::camera::{Reason, State, Transport};
use noblink::rtsp::{RtspServer, Settings};

use crate::harness::camera::{Rig, clip, config, file_url, h264, h265, produce, write_clip};
use crate::harness::camera_faults::{self, Form};
use crate::harness::rtsp_relay::{Relay, Trouble};
use crate::harness::secs;

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

/// x264 without latency cuts pictures into slices, and the payloader repeats the parameter sets in
/// front of each slice of a key frame.
#[test]
fn a_picture_in_slices_is_one_picture() {
    let server = server();
    let launch =
        h264(640, 360, 10).replace("! h264parse", "").replace("x264enc", "x264enc threads=4");
    server.mount_launch("/slices", &launch).unwrap();
    let rig = Rig::start(vec![config("a", &server.url("/slices"))]);
    let notes = rig.until_frames(0, 30, secs(15));
    let times: Vec<_> = notes.iter().map(|n| n.pts_ns.expect("RTP has timestamps")).collect();
    assert!(times.is_sorted_by(|a, b| a < b), "each of its own time: {times:?}");
}

#[test]
fn a_decoders_frames_are_not_copied() {
    let server = server();
    server.mount_launch("/h264", &h264(1280, 720, 20)).unwrap();
    server.mount_launch("/h265", &h265(1280, 720, 20)).unwrap();
    let rig =
        Rig::start(vec![config("a", &server.url("/h264")), config("b", &server.url("/h265"))]);
    for camera in [0, 1] {
        for note in rig.until_frames(camera, 10, secs(15)) {
            // libav decodes into rows of padding; a copy would have the packed layout of the caps,
            // with the second plane 1280 x 720 bytes after the first.
            let second_plane = note.layout.expect("the decoder's own layout")[1];
            assert!(second_plane > 1280 * 720, "{second_plane}");
        }
    }
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

#[test]
fn a_camera_that_was_killed_comes_back_and_the_others_do_not_notice() {
    let first = server();
    first.mount_clip("/clip", &clip(), true).unwrap();
    let second = server();
    second.mount_clip("/clip", &clip(), true).unwrap();
    let port = first.port();
    let rig = Rig::start(vec![config("a", &first.url("/clip")), config("b", &second.url("/clip"))]);
    rig.until_more(0, 10, secs(15));
    rig.until_more(1, 10, secs(15));

    first.stop();
    let status = rig.reach(0, secs(5), |s| s.state == State::Backoff);
    let reason = status.reason.clone().expect("a reason stands with every back-off");
    assert!(reason.contains("refused") || reason.contains("ended"), "{reason}");
    assert!(status.retry_in_s.is_some_and(|s| s <= 1.5), "{status:?}");
    rig.reach(0, secs(5), |s| s.attempt >= 2 && s.state == State::Backoff);
    let reason = rig.cameras[0].status().reason.expect("a reason");
    assert!(reason.starts_with(&format!("connection refused by 127.0.0.1:{port}")), "{reason}");

    let back = RtspServer::start(&Settings { port, ..Settings::default() }).unwrap();
    back.mount_clip("/clip", &clip(), true).unwrap();
    let wait = rig.cameras[0].status().retry_in_s.unwrap_or(0.0);
    let within = Duration::from_secs_f64(wait) + secs(5);
    let status = rig.until_streaming(0, within);
    assert_eq!((status.connects, status.reason, status.leaked_pipelines), (2, None, 0));
    consecutive(&rig.until_more(0, 10, secs(5)));

    let others = rig.notes(1);
    consecutive(&others);
    let gap = others.windows(2).map(|p| p[1].pts_ns.unwrap() - p[0].pts_ns.unwrap()).max();
    assert!(gap.unwrap() < 150_000_000, "the other camera has a gap of {gap:?} ns");
    assert_eq!(rig.ledger(1).dropped.total(), 0);
}

#[test]
fn a_camera_that_is_down_at_the_start_streams_once_it_is_up() {
    let free = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = free.local_addr().unwrap().port();
    drop(free);
    let rig = Rig::start(vec![config("a", &format!("rtsp://127.0.0.1:{port}/clip"))]);
    let status = rig.reach(0, secs(10), |s| s.state == State::Backoff);
    assert!(status.reason.is_some_and(|r| r.starts_with("connection refused")));
    let server = RtspServer::start(&Settings { port, ..Settings::default() }).unwrap();
    server.mount_clip("/clip", &clip(), true).unwrap();
    rig.until_frames(0, 5, secs(12));
}

#[test]
fn refusals_are_named_and_hold_no_password() {
    let login = Some(("admin".to_owned(), "p@ss/word".to_owned()));
    let server = RtspServer::start(&Settings { login, ..Settings::default() }).unwrap();
    server.mount_clip("/clip", &clip(), true).unwrap();
    let port = server.port();
    let at = |login: &str, path: &str| format!("rtsp://{login}127.0.0.1:{port}{path}");
    let rig = Rig::start(vec![
        config("right", &at("admin:p%40ss%2Fword@", "/clip")),
        config("wrong", &at("admin:secret@", "/clip")),
        config("none", &at("", "/clip")),
        config("path", &at("admin:p%40ss%2Fword@", "/other?token=secret")),
        config("host", "rtsp://admin:secret@no-such-camera.invalid/clip"),
    ]);
    for (camera, start) in [
        (1, "wrong user name or password (RTSP 401)"),
        (2, "the camera wants a login (RTSP 401): write rtsp://user:password@host/path"),
        (3, "no such path on the camera: /other (RTSP 404)"),
        (4, "the host name no-such-camera.invalid does not resolve"),
    ] {
        let status = rig.reach(camera, secs(15), |s| s.state == State::Backoff);
        let reason = status.reason.expect("a reason stands with every back-off");
        assert!(reason.starts_with(start), "{reason}");
        assert!(!reason.contains("secret") && !reason.contains("p@ss"), "{reason}");
    }
    rig.until_frames(0, 5, secs(10));
}

const SELF_SIGNED: &str = include_str!("data/self-signed.pem");

#[test]
fn rtsps_checks_the_certificate_unless_told_otherwise() {
    let tls_pem = Some(SELF_SIGNED.to_owned());
    let server = RtspServer::start(&Settings { tls_pem, ..Settings::default() }).unwrap();
    server.mount_clip("/clip", &clip(), true).unwrap();
    let strict = config("strict", &server.url("/clip"));
    let mut lax = config("lax", &server.url("/clip"));
    lax.pipeline = "rtsp-selfsigned".into();
    let rig = Rig::start(vec![strict, lax]);
    rig.until_frames(1, 10, secs(15));
    let stream = rig.cameras[1].status().stream.expect("it streams");
    assert_eq!(stream.transport, Some(Transport::Tls));
    let status = rig.reach(0, secs(15), |s| s.state == State::Backoff);
    let reason = status.reason.expect("a reason stands with every back-off");
    assert!(reason.starts_with("TLS: ") && reason.contains("rtsp-selfsigned"), "{reason}");
    assert_eq!(rig.notes(0).len(), 0);
}

#[test]
fn a_server_that_says_nothing_is_given_up_and_holds_nobody_up() {
    let deaf = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = deaf.local_addr().unwrap().port();
    let url = format!("rtsp://127.0.0.1:{port}/clip");
    let rig = Rig::start((0..4).map(|n| config(&format!("c{n}"), &url)).collect());
    // While it is still trying, and a second time after it gave up once.
    rig.reach(0, secs(3), |s| s.state == State::Connecting);
    let status = rig.reach(0, secs(17), |s| s.state == State::Backoff);
    let reason = status.reason.expect("a reason stands with every back-off");
    assert!(reason.contains("does not answer RTSP"), "{reason}");
    rig.reach(0, secs(3), |s| s.state == State::Connecting);
    let before = rig.cameras[0].heartbeat();
    let took = rig.stop();
    assert!(took <= secs(3) && before > 0, "{took:?}");
}

#[test]
fn silence_on_an_open_connection_is_a_stall() {
    let server = server();
    server.mount_clip("/clip", &clip(), true).unwrap();
    let mut relay = Relay::to(server.port());
    let mut camera = config("a", &relay.url());
    camera.stall_timeout_s = 1.0;
    let rig = Rig::start(vec![camera]);
    rig.until_more(0, 10, secs(15));
    relay.set(Trouble::Frozen);
    let frozen = Instant::now();
    let reason = "no frame for 1.0 s";
    let status = rig.reach(0, secs(6), |s| s.reason.as_deref() == Some(reason));
    assert!(matches!(status.state, State::Stalled | State::Backoff), "{status:?}");
    let noticed = frozen.elapsed();
    assert!((0.8..3.0).contains(&noticed.as_secs_f64()), "{noticed:?}");
    rig.reach(0, secs(5), |s| s.state == State::Backoff);
    relay.set(Trouble::None);
    rig.until_streaming(0, secs(10));
    consecutive(&rig.until_more(0, 10, secs(5)));
}

/// The short form of `make soak`'s.
#[test]
fn each_fault_is_named_and_overcome_and_the_other_camera_does_not_notice() {
    camera_faults::all(Form { trouble: secs(1), refusing: secs(3), closing: secs(9) });
}

#[test]
fn a_camera_that_ends_its_stream_is_asked_again() {
    let server = server();
    server.mount_clip("/once", &clip(), false).unwrap();
    let rig = Rig::start(vec![config("a", &server.url("/once"))]);
    rig.until_more(0, 10, secs(15));
    let status = rig.reach(0, secs(10), |s| s.state == State::Backoff);
    assert!(status.reason.is_some(), "{status:?}");
    consecutive(&rig.until_more(0, 10, secs(10)));
    assert_eq!(rig.cameras[0].status().connects, 2);
}

#[test]
fn a_camera_is_switched_off_and_on() {
    let rig = Rig::start(vec![config("a", "test://?width=320&height=240&fps=20")]);
    rig.until_frames(0, 5, secs(10));
    rig.cameras[0].set_enabled(false);
    rig.reach(0, secs(3), |s| s.state == State::Disabled);
    let count = rig.ledger(0).offered;
    rig.cameras[0].set_enabled(true);
    rig.until_streaming(0, secs(5));
    assert!(rig.cameras[0].status().connects == 2 && rig.ledger(0).offered > count);
    consecutive(&rig.until_more(0, 5, secs(5)));
}

#[test]
fn a_file_is_played_at_its_pace_to_its_end() {
    let rig = Rig::start(vec![config("a", &file_url(&clip()))]);
    let status = rig.reach(0, secs(15), |s| s.state == State::Ended);
    assert_eq!((status.connects, status.reason), (1, None));
    let notes = rig.until_frames(0, 40, secs(1));
    consecutive(&notes);
    assert_eq!(notes.len(), 40);
    assert_eq!(notes[0].pts_ns, Some(0));
    let took = notes[39].arrived.duration_since(notes[0].arrived).as_secs_f64();
    assert!((1.7..3.0).contains(&took), "40 frames at 20 a second took {took} s");
    let status = rig.cameras[0].status();
    assert_eq!(status.clock, Some(Clock::Arrival));
    assert_eq!(status.stream.and_then(|s| s.transport), None);
}

#[test]
fn a_looped_file_runs_on() {
    let mut camera = config("a", &file_url(&clip()));
    (camera.realtime, camera.repeat) = (false, true);
    let rig = Rig::start(vec![camera]);
    let notes = rig.until_frames(0, 100, secs(15));
    consecutive(&notes);
    assert_eq!(notes.iter().filter(|n| n.pts_ns == Some(0)).count(), notes.len().div_ceil(40));
    let status = rig.cameras[0].status();
    assert_eq!((status.state, status.connects), (State::Streaming, 1));
}

#[test]
fn a_file_without_realtime_waits_for_a_slow_consumer() {
    let mut camera = config("a", &file_url(&clip()));
    (camera.realtime, camera.stall_timeout_s) = (false, 1.0);
    // 40 frames take 4 s, four times the stall timeout; the queue holds 4.
    let rig = Rig::start_with(vec![camera], Templates::default(), Duration::from_millis(100));
    rig.reach(0, secs(15), |s| s.state == State::Ended);
    let notes = rig.until_frames(0, 40, secs(5));
    assert_eq!(notes.len(), 40);
    consecutive(&notes);
    assert_eq!(rig.ledger(0).dropped.total(), 0);
}

#[test]
fn a_file_that_waits_for_room_stops_at_once() {
    let mut camera = config("a", &file_url(&clip()));
    (camera.realtime, camera.queue) = (false, 1);
    let rig = Rig::start_with(vec![camera], Templates::default(), secs(2));
    rig.reach(0, secs(10), |_| rig.ledger(0).queued == 1);
    let took = rig.stop();
    assert!(took < secs(1), "{took:?}");
}

#[test]
fn the_resolution_may_change_in_mid_stream() {
    let dir = tempfile::tempdir().unwrap();
    // Quotes and launch syntax in a name are a name.
    let joined = dir.path().join("a \"b\" ! fakesink c.h264");
    let mut bytes = Vec::new();
    for size in [(640, 360), (320, 240), (1280, 720)] {
        let part = dir.path().join(format!("{}.h264", size.0));
        write_clip(&part, size, 20, 10);
        bytes.extend(std::fs::read(part).unwrap());
    }
    std::fs::write(&joined, bytes).unwrap();
    let mut camera = config("a", &file_url(&joined));
    camera.realtime = false;
    let rig = Rig::start(vec![camera]);
    rig.reach(0, secs(15), |s| s.state == State::Ended);
    let notes = rig.until_frames(0, 30, secs(2));
    let sizes: Vec<_> = notes.iter().map(|n| n.size).collect();
    assert_eq!(sizes[..10], [(640, 360); 10]);
    assert_eq!(sizes[10..20], [(320, 240); 10]);
    assert_eq!(sizes[20..], [(1280, 720); 10]);
}

#[test]
fn what_no_file_holds_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let text = dir.path().join("text.mp4");
    std::fs::write(&text, "no video at all\n".repeat(100)).unwrap();
    let mut strange = config("c", &file_url(&clip()));
    strange.pipeline = "my-camera".into();
    let templates = Templates { dirs: vec![dir.path().to_owned()] };
    let rig = Rig::start_with(
        vec![config("a", "file:///no/such/clip.mp4"), config("b", &file_url(&text)), strange],
        templates,
        Duration::ZERO,
    );
    for (camera, part) in [
        (0, "file:///no/such/clip.mp4 does not exist"),
        (1, ""),
        (2, "looked for my-camera.launch in"),
    ] {
        let status = rig.reach(camera, secs(10), |s| s.state == State::Backoff);
        let reason = status.reason.expect("a reason stands with every back-off");
        println!("{reason}");
        assert!(reason.contains(part), "{reason}");
    }
    // The template appears: the next attempt takes it.
    std::fs::write(
        dir.path().join("my-camera.launch"),
        "# mine\nfilesrc name=source ! qtdemux ! h264parse\n! avdec_h264",
    )
    .unwrap();
    rig.until_frames(2, 5, secs(10));
}

#[test]
fn frames_after_a_loss_are_counted_and_left_out_until_the_next_key_frame() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(
        dir.path().join("lossy.launch"),
        "filesrc name=source ! qtdemux ! h264parse ! identity drop-probability=0.08 ! avdec_h264",
    )
    .unwrap();
    let mut camera = config("a", &file_url(&clip()));
    (camera.realtime, camera.pipeline) = (false, "lossy".into());
    camera.repeat = true;
    let templates = Templates { dirs: vec![dir.path().to_owned()] };
    let rig = Rig::start_with(vec![camera], templates, Duration::ZERO);
    rig.reach(0, secs(15), |_| rig.ledger(0).corrupt > 20);
    consecutive(&rig.notes(0));
}

#[test]
fn credentials_stand_nowhere() {
    let source = Source::parse("rtsp://admin:secret@10.0.0.7/stream?token=secret").unwrap();
    assert!(!format!("{source} {source:?}").contains("secret"));
    assert!(!format!("{:?}", config("a", "rtsp://admin:secret@10.0.0.7/x")).contains("secret"));
}

#[test]
fn a_probe_says_what_a_camera_sends() {
    let server = server();
    server.mount_launch("/h264", &h264(1280, 720, 20)).unwrap();
    let url = server.url("/h264");
    let source = Source::parse(&url).unwrap();
    let began = Instant::now();
    let report = probe(&source, "rtsp", &Templates::default(), secs(10)).unwrap();
    assert!(began.elapsed() < secs(12));
    println!("{}", serde_json::to_string_pretty(&report).unwrap());
    assert_eq!(report.codec.as_deref(), Some("H.264"));
    assert_eq!((report.width, report.height, &*report.format), (1280, 720, "I420"));
    assert_eq!(report.fps_declared, Some(20.0));
    assert!(report.fps_measured.is_some_and(|fps| (18.0..22.0).contains(&fps)));
    assert_eq!((report.transport, report.sender_reports), (Some(Transport::Tcp), true));
    assert!(report.decode_ms.is_some_and(|ms| ms > 0.0 && ms < 100.0));
    let jpeg = report.jpeg.expect("jpegenc is installed");
    assert!(jpeg.starts_with(&[0xff, 0xd8]) && jpeg.ends_with(&[0xff, 0xd9]), "{}", jpeg.len());
    let config = format!("[device]\nid=\"x\"\n[mqtt]\nembedded=true\n{}", report.config);
    let config = noblink::config::Config::parse(&config, std::path::Path::new("/")).unwrap();
    assert_eq!((&config.cameras[0].source, &*config.cameras[0].pipeline), (&source, "rtsp"));
}

#[test]
fn a_probe_names_what_is_wrong() {
    let login = Some(("admin".to_owned(), "secret".to_owned()));
    let server = RtspServer::start(&Settings { login, ..Settings::default() }).unwrap();
    server.mount_clip("/clip", &clip(), true).unwrap();
    let audio = "audiotestsrc is-live=true ! alawenc ! rtppcmapay name=pay0";
    server.mount_launch("/audio", audio).unwrap();
    let tls_pem = Some(SELF_SIGNED.to_owned());
    let tls = RtspServer::start(&Settings { tls_pem, ..Settings::default() }).unwrap();
    let port = server.port();
    let closed = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    for (url, wanted) in [
        (format!("rtsp://a:b@127.0.0.1:{port}/clip"), Reason::WrongLogin),
        (format!("rtsp://127.0.0.1:{port}/clip"), Reason::NoLogin),
        (format!("rtsp://admin:secret@127.0.0.1:{port}/x"), Reason::NoSuchPath("/x".into())),
        (format!("rtsp://{closed}/x"), Reason::Refused(closed.to_string())),
        (format!("rtsp://admin:secret@127.0.0.1:{port}/audio"), Reason::NoVideo),
        (
            format!("rtsp://127.0.0.1:{}/x", tls.port()),
            Reason::HungUp(format!("127.0.0.1:{}", tls.port())),
        ),
        (format!("rtsps://127.0.0.1:{port}/x"), Reason::Tls(format!("127.0.0.1:{port}"))),
        ("rtsp://no-such.invalid/x".into(), Reason::Unresolved("no-such.invalid".into())),
        ("file:///no/such.mp4".into(), Reason::NoSuchFile("file:///no/such.mp4".into())),
    ] {
        let source = Source::parse(&url).unwrap();
        let found = probe(&source, source.default_pipeline(), &Templates::default(), secs(8));
        assert_eq!(found.map(|_| ()), Err(wanted), "{url}");
    }
}

#[test]
fn odd_formats_are_converted_and_the_usual_are_not() {
    let server = server();
    let raw = |format: &str| {
        format!(
            "videotestsrc is-live=true ! video/x-raw,format={format},width=640,height=360,\
             framerate=10/1"
        )
    };
    let ten_bit = format!(
        "{} ! x265enc tune=zerolatency speed-preset=ultrafast key-int-max=10 ! h265parse \
         ! rtph265pay name=pay0 config-interval=-1",
        raw("I420_10LE")
    );
    let four_two_two = format!(
        "{} ! x264enc tune=zerolatency speed-preset=ultrafast key-int-max=10 ! h264parse \
         ! rtph264pay name=pay0 config-interval=-1",
        raw("Y42B")
    );
    let jpeg = format!("{} ! jpegenc ! rtpjpegpay name=pay0", raw("I420"));
    server.mount_launch("/ten-bit", &ten_bit).unwrap();
    server.mount_launch("/422", &four_two_two).unwrap();
    server.mount_launch("/jpeg", &jpeg).unwrap();
    let rig = Rig::start(vec![
        config("a", &server.url("/ten-bit")),
        config("b", &server.url("/422")),
        config("c", &server.url("/jpeg")),
    ]);
    for (camera, codec) in [(0, "H.265"), (1, "H.264"), (2, "MJPEG")] {
        let notes = rig.until_frames(camera, 5, secs(18));
        assert!(notes.iter().all(|n| n.size == (640, 360) && n.luma > 1.0), "{notes:?}");
        let stream = rig.cameras[camera].status().stream.expect("it streams");
        assert_eq!(stream.codec.as_deref(), Some(codec));
    }
}

#[test]
fn every_template_is_there_and_says_whether_it_was_run() {
    let templates = Templates::default();
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("pipelines");
    let mut names = 0;
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_stem().and_then(|n| n.to_str()).unwrap();
        let built_in = templates.find(name).unwrap_or_else(|e| panic!("{e}"));
        let text = std::fs::read_to_string(&path).unwrap();
        assert!(!built_in.contains('#') && !built_in.contains('\n'), "{built_in}");
        let not_run = text.lines().next().unwrap().contains("Not run on such hardware");
        let hardware = ["rtsp-nvidia", "rtsp-v4l2", "rtsp-va", "v4l2"].contains(&name);
        assert_eq!(not_run, hardware, "{name}");
        names += 1;
    }
    assert_eq!(names, 9);
}

#[test]
fn of_several_streams_the_first_video_is_taken() {
    let server = server();
    let video = h264(640, 360, 10);
    let both = format!("audiotestsrc is-live=true ! alawenc ! rtppcmapay name=pay1 {video}");
    server.mount_launch("/both", &both).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("two.mkv");
    let picture = |width: u32, height: u32| {
        format!(
            "videotestsrc num-buffers=20 ! video/x-raw,width={width},height={height} \
             ! x264enc speed-preset=ultrafast ! m."
        )
    };
    produce(&format!(
        "matroskamux name=m ! filesink location={} audiotestsrc num-buffers=40 ! vorbisenc ! m. \
         {} {}",
        file.display(),
        picture(320, 240),
        picture(640, 480)
    ));
    let mut played = config("b", &file_url(&file));
    played.realtime = false;
    let rig = Rig::start(vec![config("a", &server.url("/both")), played]);
    let notes = rig.until_frames(0, 5, secs(15));
    assert_eq!(notes[0].size, (640, 360));
    rig.reach(1, secs(10), |s| s.state == State::Ended);
    let notes = rig.until_frames(1, 20, secs(1));
    assert!(notes.len() == 20 && notes.iter().all(|n| n.size == notes[0].size), "{notes:?}");
}

#[test]
fn a_launch_text_that_can_not_work_is_refused_at_the_mount() {
    let error = server().mount_launch("/x", "nosuchelement ! rtph264pay name=pay0").unwrap_err();
    assert!(format!("{error:#}").contains("nosuchelement"), "{error:#}");
}

#[test]
fn the_status_has_its_names_on_the_wire() {
    let rig = Rig::start(vec![config("a", "test://?width=320&height=240&fps=20")]);
    rig.until_frames(0, 5, secs(10));
    let status = serde_json::to_value(rig.until_streaming(0, secs(1))).unwrap();
    assert_eq!(status["state"], "streaming");
    assert_eq!(status["clock"], "arrival");
    assert_eq!(status["stream"]["fps"], 20.0);
    let keys: Vec<_> = status.as_object().unwrap().keys().map(String::as_str).collect();
    let wanted = "attempt clock clock_offset_ms connects leaked_pipelines leaked_supervisors reason \
                  retry_in_s since_us state stream";
    assert_eq!(keys.join(" "), wanted);
}

#[test]
fn a_pipeline_that_hangs_is_given_up_and_counted() {
    let dir = tempfile::tempdir().unwrap();
    let fifo = dir.path().join("clip.mp4");
    nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
    // Opening a pipe for reading blocks until someone writes, as a dead network folder does.
    let rig = Rig::start(vec![
        config("hung", &file_url(&fifo)),
        config("other", "test://?width=320&height=240&fps=20"),
    ]);
    rig.until_frames(1, 5, secs(10));
    rig.cameras[0].set_enabled(false);
    rig.reach(0, secs(3), |s| s.state == State::Disabled && s.leaked_pipelines == 1);
    rig.cameras[0].set_enabled(true);
    rig.reach(0, secs(1), |s| s.state == State::Connecting && s.leaked_pipelines == 1);
    rig.until_more(1, 5, secs(2));
    // It is opened more than once: a writer comes for each.
    rig.reach(0, secs(3), |s| {
        let flags = nix::libc::O_NONBLOCK;
        let _ = std::fs::OpenOptions::new().write(true).custom_flags(flags).open(&fifo);
        s.leaked_pipelines == 0
    });
    assert!(rig.stop() < secs(3));
}
