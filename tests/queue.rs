//! The ledger stays exact and the shares stay fair, whatever the cameras send.

use std::sync::Arc;
use std::time::{Duration, Instant};

use noblink::camera::frame::Clock;
use noblink::queue::{Arrival, Drop, Inlet, Intake};
use noblink::vision::picture::{Color, Matrix, Range};
use proptest::prelude::*;

use crate::harness::camera::config;

fn arrival(arrived: Instant) -> Arrival {
    gst::init().unwrap();
    let info = gst_video::VideoInfo::builder(gst_video::VideoFormat::I420, 2, 2).build().unwrap();
    Arrival {
        pts_ns: None,
        time_us: 0,
        clock: Clock::Arrival,
        arrived,
        buffer: gst::Buffer::new(),
        info: Arc::new(info),
        color: Color { matrix: Matrix::Bt601, range: Range::Limited },
    }
}

fn camera(id: &str, queue: usize, max_fps: Option<f64>) -> Arc<noblink::config::Camera> {
    Arc::new(noblink::config::Camera { queue, max_fps, ..config(id, "test://") })
}

fn one(queue: usize, max_fps: Option<f64>) -> (Arc<Intake>, Inlet) {
    let intake = Arc::new(Intake::default());
    let inlet = intake.open(&camera("a", queue, max_fps));
    (intake, inlet)
}

#[derive(Debug, Clone)]
enum Step {
    Offer(usize),
    Corrupt(usize),
    Take,
    Inferred,
    Failed,
    Dropped,
    Wait(u64),
    Disable(usize),
    Remove(usize),
    /// Open again, with room for so many frames.
    Open(usize, usize),
    Close,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        6 => (0..3usize).prop_map(Step::Offer),
        1 => (0..3usize).prop_map(Step::Corrupt),
        4 => Just(Step::Take),
        3 => Just(Step::Inferred),
        1 => Just(Step::Failed),
        1 => Just(Step::Dropped),
        1 => (1..900u64).prop_map(Step::Wait),
        1 => (0..3usize).prop_map(Step::Disable),
        1 => (0..3usize).prop_map(Step::Remove),
        2 => (0..3usize, 1..5usize).prop_map(|(camera, queue)| Step::Open(camera, queue)),
    ];
    (prop::collection::vec(step, 0..200), any::<bool>()).prop_map(|(mut steps, close)| {
        if close {
            steps.insert(steps.len() * 3 / 4, Step::Close);
        }
        steps
    })
}

proptest! {
    /// After every step both equations hold for every camera, and the ids of the frames that a
    /// camera hands out only grow.
    #[test]
    fn the_ledger_is_exact_after_every_step(steps in steps()) {
        let ids = ["a", "b", "c"];
        let settings = [(1, None), (4, None), (3, Some(10.0))];
        let intake = Intake::default();
        let inlets: Vec<_> = ids.iter().zip(settings)
            .map(|(id, (queue, max_fps))| intake.open(&camera(id, queue, max_fps)))
            .collect();
        let mut now = Instant::now();
        let mut taken = Vec::new();
        let mut last_id = [None; 3];
        for step in steps {
            match step {
                Step::Offer(camera) => inlets[camera].offer(arrival(now)),
                Step::Corrupt(camera) => inlets[camera].corrupt(),
                Step::Take => if let Some(t) = intake.try_take(now) {
                    prop_assert!(last_id[t.camera] < Some(t.frame.id));
                    last_id[t.camera] = Some(t.frame.id);
                    taken.push(t);
                },
                Step::Inferred => if let Some(t) = taken.pop() { t.inferred() },
                Step::Failed => drop(taken.pop()),
                Step::Dropped => if let Some(t) = taken.pop() { t.dropped(Drop::NoModel) },
                Step::Wait(ms) => now += Duration::from_millis(ms),
                Step::Disable(camera) => intake.disable(&inlets[camera]),
                Step::Remove(camera) => intake.remove(&inlets[camera]),
                Step::Open(lane, queue) => {
                    let again = intake.open(&camera(ids[lane], queue, None));
                    prop_assert_eq!(again.index(), lane, "a camera's lane is its own");
                }
                Step::Close => intake.close(),
            }
            for lane in intake.snapshot() {
                prop_assert!(lane.ledger.is_exact(), "{:?}", lane.ledger);
            }
        }
    }
}

#[test]
fn a_hiccup_shorter_than_the_queue_loses_nothing_and_keeps_the_order() {
    let (intake, inlet) = one(4, None);
    let now = Instant::now();
    (0..4).for_each(|_| inlet.offer(arrival(now)));
    let ids: Vec<u64> = std::iter::from_fn(|| {
        let taken = intake.try_take(now)?;
        let id = taken.frame.id;
        taken.inferred();
        Some(id)
    })
    .collect();
    assert_eq!(ids, [0, 1, 2, 3]);
    assert_eq!(intake.snapshot()[0].ledger.inferred, 4);
}

#[test]
fn a_full_queue_gives_up_its_oldest_frame() {
    let (intake, inlet) = one(2, None);
    let now = Instant::now();
    (0..5).for_each(|_| inlet.offer(arrival(now)));
    let ledger = intake.snapshot()[0].ledger;
    assert_eq!((ledger.offered, ledger.dropped.full, ledger.queued), (5, 3, 2));
    assert_eq!(intake.try_take(now).unwrap().frame.id, 3);
}

#[test]
fn an_overloaded_camera_gives_its_newest_frame_until_it_is_found_empty() {
    let (intake, inlet) = one(4, None);
    let start = Instant::now();
    let at = |ms| start + Duration::from_millis(ms);
    let offer = |n| (0..n).for_each(|_| inlet.offer(arrival(start)));
    offer(3);
    assert_eq!(intake.try_take(at(0)).unwrap().frame.id, 0, "in order at first");
    offer(1);
    assert_eq!(intake.try_take(at(999)).unwrap().frame.id, 1, "in order for a second");
    assert_eq!(intake.try_take(at(1001)).unwrap().frame.id, 3, "then the newest");
    assert_eq!(intake.snapshot()[0].ledger.dropped.overload, 1);
    assert!(intake.snapshot()[0].overloaded);
    assert!(intake.try_take(at(1100)).is_none());
    assert!(!intake.snapshot()[0].overloaded);
    offer(2);
    assert_eq!(intake.try_take(at(1200)).unwrap().frame.id, 4, "in order again");
}

#[test]
fn max_fps_leaves_out_frames_evenly_and_counts_them() {
    let (intake, inlet) = one(64, Some(10.0));
    let start = Instant::now();
    // Ten seconds of a 30 fps camera whose frames come up to 8 ms late.
    for n in 0..300u64 {
        let jitter = (n * 7919) % 8;
        inlet.offer(arrival(start + Duration::from_millis(n * 1000 / 30 + jitter)));
        while let Some(taken) = intake.try_take(start) {
            taken.inferred();
        }
    }
    let ledger = intake.snapshot()[0].ledger;
    assert!((98..=102).contains(&ledger.offered), "{ledger:?}");
    assert_eq!(ledger.decoded, ledger.rate_limited + ledger.offered);
}

#[test]
fn a_source_that_waits_for_room_drops_nothing_and_ends_at_close() {
    let (intake, inlet) = one(2, None);
    let producer = std::thread::spawn(move || {
        (0..).take_while(|_| inlet.offer_waiting(arrival(Instant::now()), || true)).count()
    });
    for id in 0..500 {
        let taken = intake.take(Duration::from_secs(5)).expect("the producer goes on");
        assert_eq!(taken.frame.id, id);
        taken.inferred();
    }
    intake.close();
    let offered = producer.join().unwrap() as u64;
    let ledger = intake.snapshot()[0].ledger;
    assert_eq!((ledger.inferred, ledger.offered), (500, offered));
    assert_eq!(ledger.dropped.total(), ledger.dropped.stopped);
}

#[test]
fn a_disabled_camera_drops_what_waits_and_what_comes_for_that_reason() {
    let (intake, inlet) = one(4, None);
    let now = Instant::now();
    (0..3).for_each(|_| inlet.offer(arrival(now)));
    intake.try_take(now).unwrap().inferred();
    intake.disable(&inlet);
    inlet.offer(arrival(now));
    assert!(intake.try_take(now).is_none());
    let ledger = intake.snapshot()[0].ledger;
    assert_eq!((ledger.inferred, ledger.dropped.disabled, ledger.offered), (1, 3, 4));
    intake.open(&camera("a", 4, None));
    inlet.offer(arrival(now));
    assert_eq!(intake.try_take(now).unwrap().frame.id, 4, "ids run on");
}

#[test]
fn a_lane_takes_new_settings_with_its_frames_and_waits_for_its_camera() {
    let (intake, inlet) = one(4, None);
    let now = Instant::now();
    (0..4).for_each(|_| inlet.offer(arrival(now)));
    intake.open(&camera("a", 2, None));
    let taken = intake.try_take(now).unwrap();
    assert_eq!((taken.frame.id, taken.settings.queue), (2, 2));
    assert_eq!(intake.snapshot()[0].ledger.dropped.full, 2);
    taken.inferred();
    intake.remove(&inlet);
    let other = intake.open(&camera("b", 4, None));
    assert_eq!((other.index(), intake.snapshot()[0].present), (1, false));
    let back = intake.open(&camera("a", 4, None));
    back.offer(arrival(now));
    assert_eq!((back.index(), intake.try_take(now).unwrap().frame.id), (0, 4));
}

/// Each camera's max-min fair share of `capacity`, for what each sends.
fn fair_shares(rates: &[f64], capacity: f64) -> Vec<f64> {
    let mut order: Vec<usize> = (0..rates.len()).collect();
    order.sort_by(|a, b| rates[*a].total_cmp(&rates[*b]));
    let (mut left, mut shares) = (capacity, vec![0.0; rates.len()]);
    for (done, camera) in order.into_iter().enumerate() {
        shares[camera] = f64::min(rates[camera], left / (rates.len() - done) as f64);
        left -= shares[camera];
    }
    shares
}

/// Simulates a minute of cameras and a worker that takes `1 / capacity` seconds a frame.
fn simulate(rates: &[f64], capacity: f64) -> Vec<f64> {
    let intake = Intake::default();
    let open = |n: usize| intake.open(&camera(&format!("c{n}"), 4, None));
    let inlets: Vec<_> = (0..rates.len()).map(open).collect();
    let start = Instant::now();
    let seconds = 60.0;
    let mut sent = vec![0u64; rates.len()];
    let mut now = 0.0;
    while now < seconds {
        for (camera, rate) in rates.iter().enumerate() {
            while (sent[camera] as f64) / rate <= now {
                inlets[camera].offer(arrival(start + Duration::from_secs_f64(now)));
                sent[camera] += 1;
            }
        }
        match intake.try_take(start + Duration::from_secs_f64(now)) {
            Some(taken) => {
                taken.inferred();
                now += 1.0 / capacity;
            }
            None => now += 0.001,
        }
    }
    intake.snapshot().iter().map(|l| l.ledger.inferred as f64 / seconds).collect()
}

#[test]
fn every_camera_gets_its_max_min_fair_share() {
    let cases: [&[f64]; 4] = [
        &[60.0, 5.0, 5.0, 5.0, 5.0, 5.0],
        &[30.0, 30.0],
        &[1.0, 30.0, 15.0],
        &[30.0, 15.0, 5.0, 12.0],
    ];
    for rates in cases {
        let served = simulate(rates, 12.0);
        for (camera, share) in fair_shares(rates, 12.0).into_iter().enumerate() {
            let got = served[camera];
            assert!(got >= 0.9 * share, "{rates:?}: camera {camera} got {got}/s of {share}/s");
        }
    }
}
