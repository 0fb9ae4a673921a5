//! What cameras do in their worst week, each beside one that has no trouble.
#![allow(dead_code)] // not each test binary uses all of it

use std::path::Path;
use std::time::{Duration, Instant};

use noblink::camera::{CameraStatus, State};
use noblink::config;
use noblink::rtsp::{RtspServer, Settings};

use super::camera::{Rig, config, h265, write_clip};
use super::rtsp_relay::{Relay, Trouble};
use super::{reach, secs};

/// How long troubles last.
#[derive(Clone, Copy)]
pub(crate) struct Form {
    /// Frozen, black-holed, full of noise, losing packets.
    pub(crate) trouble: Duration,
    /// Refusing sessions.
    pub(crate) refusing: Duration,
    /// Closing its connections.
    pub(crate) closing: Duration,
}

/// A line of the table.
struct Row {
    case: &'static str,
    seen: String,
    recovered: Option<Duration>,
}

fn row(case: &'static str, seen: impl Into<String>, recovered: Duration) -> Row {
    Row { case, seen: seen.into(), recovered: Some(recovered) }
}

/// A camera's server, which can lose its power and come back with other settings.
struct Power {
    settings: Settings,
    server: Option<RtspServer>,
}

impl Power {
    fn start(settings: Settings, mount: impl FnOnce(&RtspServer)) -> Self {
        let server = RtspServer::start(&settings).expect("a server on a free port");
        mount(&server);
        let settings = Settings { port: server.port(), ..settings };
        Self { settings, server: Some(server) }
    }

    fn url(&self, login: &str) -> String {
        format!("rtsp://{login}127.0.0.1:{}/clip", self.settings.port)
    }

    fn off(&mut self) {
        self.server.take().expect("it is on").stop();
    }

    fn on(&mut self, mount: impl FnOnce(&RtspServer)) {
        *self = Self::start(self.settings.clone(), mount);
    }
}

/// One camera of the rig, as a case sees it.
struct Patient<'r> {
    rig: &'r Rig,
    index: usize,
}

impl Patient<'_> {
    fn frames(&self) -> usize {
        self.rig.notes(self.index).len()
    }

    fn streams(&self) {
        self.rig.until_more(self.index, 5, secs(30));
    }

    fn status(&self) -> CameraStatus {
        self.rig.cameras[self.index].status()
    }

    /// Waits for a state with a reason that holds this text.
    fn becomes(&self, state: State, reason: &str, within: Duration) -> String {
        let said = |s: &CameraStatus| s.reason.as_deref().is_some_and(|r| r.contains(reason));
        let status = self.rig.reach(self.index, within, |s| s.state == state && said(s));
        format!("{}: {}", state.name(), status.reason.unwrap_or_default())
    }

    /// From now to five frames more. At the worst the longest back-off is just beginning.
    fn recovers(&self) -> Duration {
        let began = Instant::now();
        self.rig.until_more(self.index, 5, secs(45));
        self.rig.reach(self.index, secs(5), |s| s.state == State::Streaming);
        began.elapsed()
    }
}

/// Runs all cases at once and prints the table. Every camera's frame ids run on, every ledger is
/// exact, and the other camera notices nothing; or it panics.
pub(crate) fn all(form: Form) {
    gst::init().expect("GStreamer");
    let dir = tempfile::tempdir().expect("a folder");
    let clip = dir.path().join("clip.mp4");
    write_clip(&clip, (320, 240), 10, 40);
    let looped = |server: &RtspServer| server.mount_clip("/clip", &clip, true).expect("a clip");
    let plain = || Power::start(Settings::default(), looped);
    let login = |password: &str| Settings {
        login: Some(("admin".into(), password.into())),
        ..Settings::default()
    };
    let mut killed = plain();
    let mut codec = plain();
    let mut locked = Power::start(login("new"), looped);
    let mut missing = plain();
    missing.off();
    // Payloaders' packets, one in twenty lost on the way.
    let lossy = format!(
        "filesrc location={} ! qtdemux ! h264parse config-interval=-1 ! clocksync \
         ! rtph264pay config-interval=-1 mtu=400 ! identity name=pay0 drop-probability=0.05",
        long_clip(dir.path()).display()
    );
    let launched = |launch: &str| {
        Power::start(Settings::default(), |s| s.mount_launch("/clip", launch).expect("it can work"))
    };
    let lossy = launched(&lossy);
    let sizes = launched(
        "videotestsrc num-buffers=30 ! video/x-raw,format=I420,width=320,height=240,\
         framerate=10/1 ! c. videotestsrc ! video/x-raw,format=I420,width=640,height=360,\
         framerate=10/1 ! c. concat name=c ! clocksync ! x264enc tune=zerolatency \
         speed-preset=ultrafast key-int-max=10 ! h264parse \
         ! rtph264pay name=pay0 config-interval=-1",
    );
    let behind: Vec<_> = (0..7).map(|_| plain()).collect();
    let mut relays: Vec<_> = behind.iter().map(|b| Relay::to(b.settings.port)).collect();
    let other = plain();

    let patient = |id: &str, url: String| config::Camera {
        stall_timeout_s: 1.0,
        queue: 64,
        ..config(id, &url)
    };
    let names = ["frozen", "hole", "garbled", "noise", "shift", "refuse", "close"];
    let mut cameras = vec![
        patient("other", other.url("")),
        patient("killed", killed.url("")),
        patient("codec", codec.url("")),
        patient("locked", locked.url("admin:old@")),
        patient("missing", missing.url("")),
        config::Camera { pipeline: "rtsp-udp".into(), ..patient("lossy", lossy.url("")) },
        patient("sizes", sizes.url("")),
    ];
    let first_relay = cameras.len();
    cameras.extend(names.iter().zip(&relays).map(|(name, relay)| patient(name, relay.url())));
    let rig = Rig::start(cameras);
    let at = |index| Patient { rig: &rig, index };
    let [frozen, hole, garbled, noise, shift, refuse, close] =
        relays.get_disjoint_mut([0, 1, 2, 3, 4, 5, 6]).expect("seven relays");
    let relayed = |n: usize| at(first_relay + n);
    let trouble = form.trouble;

    let rows = std::thread::scope(|scope| {
        let cases = [
            scope.spawn(|| {
                let camera = at(1);
                camera.streams();
                killed.off();
                let seen = camera.becomes(State::Backoff, "connection refused", secs(40));
                killed.on(looped);
                row("killed", seen, camera.recovers())
            }),
            scope.spawn(|| {
                let camera = relayed(0);
                camera.streams();
                frozen.set(Trouble::Frozen);
                camera.becomes(State::Backoff, "no frame for 1.0 s", secs(40));
                std::thread::sleep(trouble);
                let seen = camera.rig.reach(camera.index, secs(30), |s| s.state == State::Backoff);
                frozen.set(Trouble::None);
                let seen = format!("backoff: {}", seen.reason.expect("one stands with each"));
                row("frozen without closing", seen, camera.recovers())
            }),
            scope.spawn(|| {
                let camera = relayed(1);
                camera.streams();
                hole.set(Trouble::BlackHole);
                let seen = camera.becomes(State::Backoff, "no answer from", secs(40));
                hole.set(Trouble::None);
                row("black-holed", seen, camera.recovers())
            }),
            scope.spawn(|| {
                let camera = at(6);
                camera.streams();
                let of = |size| move |n: &super::camera::Note| n.size == size;
                let wanted = [(320, 240), (640, 360)];
                reach(secs(30), "frames of both sizes", || {
                    let notes = rig.notes(6);
                    let both = wanted.iter().all(|s| notes.iter().any(of(*s)));
                    if both { Ok(()) } else { Err(format!("{:?}", camera.status())) }
                });
                assert_eq!(camera.status().connects, 1, "{:?}", camera.status());
                let notes = rig.notes(6);
                let change = notes.iter().position(of(wanted[1])).expect("it was seen above");
                let gap = notes[change].arrived - notes[change - 1].arrived;
                row("changes resolution in mid-stream", "streaming: 320x240, then 640x360", gap)
            }),
            scope.spawn(|| {
                let camera = at(2);
                camera.streams();
                codec.off();
                let seen = camera.becomes(State::Backoff, "", secs(40));
                codec.on(|s| s.mount_launch("/clip", &h265(320, 240, 10)).expect("it can work"));
                let took = camera.recovers();
                let stream = camera.status().stream.expect("it streams");
                assert_eq!(stream.codec.as_deref(), Some("H.265"));
                row("changes codec", format!("{seen}; then H.265"), took)
            }),
            scope.spawn(|| {
                let camera = relayed(2);
                camera.streams();
                garbled.set(Trouble::Garbled);
                let state = camera.rig.reach(camera.index, secs(40), |s| {
                    matches!(s.state, State::Stalled | State::Backoff)
                });
                let seen = format!("{}: {}", state.state.name(), state.reason.unwrap_or_default());
                std::thread::sleep(trouble);
                garbled.set(Trouble::None);
                row("sends garbled pictures", seen, camera.recovers())
            }),
            scope.spawn(|| {
                let camera = relayed(3);
                camera.streams();
                noise.set(Trouble::Noise);
                let seen = camera.becomes(State::Backoff, "", secs(40));
                std::thread::sleep(trouble);
                noise.set(Trouble::None);
                row("sends noise", seen, camera.recovers())
            }),
            scope.spawn(|| {
                let camera = at(3);
                let seen = camera.becomes(State::Backoff, "wrong user name or password", secs(40));
                locked.off();
                locked.settings = Settings { port: locked.settings.port, ..login("old") };
                locked.on(looped);
                row("wrong password", seen, camera.recovers())
            }),
            scope.spawn(|| {
                let camera = at(5);
                camera.streams();
                let before = (camera.frames(), rig.ledger(5).corrupt);
                std::thread::sleep(trouble.max(secs(8)));
                let (frames, corrupt) =
                    (camera.frames() - before.0, rig.ledger(5).corrupt - before.1);
                let status = camera.status();
                assert_eq!((status.state, status.connects), (State::Streaming, 1), "{status:?}");
                assert!(frames > 10 && corrupt > 0, "{frames} frames, {corrupt} corrupt");
                let seen = format!("streaming: {frames} frames, {corrupt} corrupt and left out");
                Row { case: "loses 5 % of UDP packets", seen, recovered: None }
            }),
            scope.spawn(|| {
                let camera = relayed(4);
                camera.streams();
                let mut took = Duration::ZERO;
                // An hour ahead; back; then an hour behind.
                for ticks in [324_000_000, 0, 324_000_000_u32.wrapping_neg()] {
                    shift.set(Trouble::Shift(ticks));
                    took = took.max(camera.recovers());
                    std::thread::sleep(secs(1));
                }
                let status = camera.status();
                let seen = format!("{}: {} connection(s)", status.state.name(), status.connects);
                row("jumps in time by an hour, thrice", seen, took)
            }),
            scope.spawn(|| {
                let camera = relayed(5);
                camera.streams();
                refuse.set(Trouble::Refuse);
                refuse.cut();
                let until = Instant::now() + form.refusing;
                let seen = camera.becomes(
                    State::Backoff,
                    "takes no other session now (RTSP 453",
                    secs(40),
                );
                std::thread::sleep(until.saturating_duration_since(Instant::now()));
                refuse.set(Trouble::None);
                row("refuses a second session", seen, camera.recovers())
            }),
            scope.spawn(|| {
                let camera = relayed(6);
                camera.streams();
                let before = camera.status().connects;
                close.set(Trouble::CloseAfter(secs(3)));
                std::thread::sleep(form.closing);
                let connects = camera.status().connects - before;
                let least = form.closing.as_secs() / 8;
                assert!(connects >= least, "{connects} connections in {:?}", form.closing);
                close.set(Trouble::None);
                let seen = format!("backoff: {connects} connections in {:?}", form.closing);
                row("closes every 3 s", seen, camera.recovers())
            }),
            scope.spawn(|| {
                let camera = at(4);
                let seen = camera.becomes(State::Backoff, "connection refused", secs(40));
                missing.on(looped);
                row("missing at start", seen, camera.recovers())
            }),
        ];
        cases.map(|case| case.join().unwrap_or_else(|e| std::panic::resume_unwind(e)))
    });

    println!("\n{:<34} {:>12}  state seen", "case", "recovered in");
    for Row { case, seen, recovered } in rows {
        let recovered = recovered.map_or("-".into(), |d| format!("{:.2} s", d.as_secs_f64()));
        println!("{case:<34} {recovered:>12}  {seen}");
    }
    for index in 0..rig.cameras.len() {
        rig.ledger(index);
        for (n, note) in rig.notes(index).iter().enumerate() {
            assert_eq!(note.id, n as u64, "camera {index}: ids run on from 0 without a hole");
        }
    }
    let notes = rig.notes(0);
    let gap = notes.windows(2).map(|p| p[1].pts_ns.unwrap() - p[0].pts_ns.unwrap()).max().unwrap();
    let (ledger, status) = (rig.ledger(0), rig.cameras[0].status());
    println!(
        "the other camera: {} frames, {} dropped, {} connection, longest step {} ms",
        notes.len(),
        ledger.dropped.total(),
        status.connects,
        gap / 1_000_000
    );
    assert_eq!((ledger.dropped.total(), status.connects), (0, 1));
    assert!(gap < 150_000_000, "frames are 100 ms apart, and once {gap} ns");
}

/// Long enough for any form.
fn long_clip(dir: &Path) -> std::path::PathBuf {
    let file = dir.join("long.mp4");
    write_clip(&file, (320, 240), 20, 20 * 120);
    file
}
