//! The worker allocates nothing per frame: counted, by the allocator itself. `ort` does, twice: it
//! hands out the model's output as a value of its own after every run.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use noblink::camera::frame::Clock;
use noblink::config::{Camera, Inference, Publish};
use noblink::meter::Meter;
use noblink::model::contract::Overrides;
use noblink::model::engine::{EngineOptions, Model};
use noblink::model::runtime::Runtime;
use noblink::model::slot::{Live, Slot};
use noblink::mqtt::outbox::Outbox;
use noblink::mqtt::topics::Topics;
use noblink::preview::Previews;
use noblink::queue::{Arrival, Intake};
use noblink::vision::picture::{Color, Matrix, Range};
use noblink::worker::{Origin, Pulse, Worker};

use crate::harness::camera::config;
use crate::harness::service::shipped;
use crate::harness::until;

/// The system's allocator, which counts what one thread asks of it.
struct Counting;

thread_local! {
    static COUNTED: Cell<bool> = const { Cell::new(false) };
}
static COUNT: AtomicU64 = AtomicU64::new(0);

fn count() {
    if COUNTED.try_with(Cell::get).unwrap_or(false) {
        COUNT.fetch_add(1, Ordering::Relaxed);
    }
}

// SAFETY: everything is passed on to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: the caller's promise.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, memory: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count();
        // SAFETY: the caller's promise.
        unsafe { System.realloc(memory, layout, size) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(memory, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// A grey frame of 1280x720, without a plate.
fn frame() -> Arrival {
    let info =
        gst_video::VideoInfo::builder(gst_video::VideoFormat::I420, 1280, 720).build().unwrap();
    Arrival {
        pts_ns: Some(0),
        time_us: 1_790_000_000_000_000,
        clock: Clock::Arrival,
        arrived: Instant::now(),
        buffer: gst::Buffer::from_slice(vec![128u8; info.size()]),
        info: Arc::new(info),
        color: Color { matrix: Matrix::Bt709, range: Range::Limited },
    }
}

/// Allocations of the worker over so many frames, after some to warm up.
fn over(frames: u64, publish: Publish) -> u64 {
    gst::init().unwrap();
    let settings = Arc::new(Camera { publish, ..config("gate", "test://") });
    let (intake, meter) = (Arc::new(Intake::default()), Arc::new(Meter::default()));
    let inlet = intake.open(&settings);
    meter.seat(inlet.index());
    let (pulse, slot) = (Arc::new(Pulse::default()), Arc::new(Slot::default()));
    let runtime = Runtime::load(None).unwrap();
    let model = Model::open(
        &runtime,
        &shipped("models/plates-v1.onnx"),
        &EngineOptions::default(),
        &Overrides::default(),
    );
    slot.swap(Some(Live::new(Arc::new(model.unwrap()), 0, None)));
    let worker = Worker::new(
        Arc::clone(&intake),
        slot,
        Arc::new(Outbox::new(noblink::app::OUTBOX)),
        meter,
        Arc::clone(&pulse),
        Arc::default(),
        Arc::new(Previews::start(|_, _, _| ()).unwrap()),
        Origin { device: "test".into(), boot: "7f3k9q2m4x8w1b5d".into() },
        &Topics::new("noblink/v1", "test"),
        &Inference::default(),
    );
    let thread = std::thread::spawn(|| {
        COUNTED.set(true);
        worker.run();
    });
    let work_off = |frames: u64| {
        let inferred = || intake.snapshot()[0].ledger.inferred;
        let goal = inferred() + frames;
        for n in 1..=frames {
            assert!(inlet.offer_waiting(frame(), || true));
            until("the frame is inferred", 30, || inferred() >= goal - (frames - n));
        }
    };
    work_off(5);
    let before = COUNT.load(Ordering::Relaxed);
    work_off(frames);
    let allocations = COUNT.load(Ordering::Relaxed) - before;
    pulse.stop.store(true, Ordering::Relaxed);
    thread.join().unwrap();
    allocations
}

/// What `ort` makes of an output: the value, and the memory that it says it lies in.
const BY_ORT: u64 = 2;

#[test]
fn a_frame_costs_no_allocation_and_a_record_only_its_own() {
    assert_eq!(over(20, Publish::Objects), 20 * BY_ORT, "20 frames without a record");
    // The payload, which grows a few times while it is written, and its time.
    let records = over(20, Publish::All) - 20 * BY_ORT;
    println!("20 records cost {records} allocations");
    assert!((20..=20 * 8).contains(&records), "{records}");
}
