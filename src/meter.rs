//! What the worker measures: counters since the start, and a window of latencies that whoever
//! reports takes and empties.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;

use crate::model::engine::Detection;
use crate::records::{Quantiles, Stages, rounded};

/// Latencies are kept in microseconds, up to a minute, to two digits: some 20 KB a camera.
const LONGEST_US: u64 = 60_000_000;
/// Results that are kept for looking back: a minute at 60 frames a second.
const RESULTS_MAX: usize = 3600;
/// Epochs whose tallies are kept: the running model's and those before it.
const TALLIES_MAX: usize = 4;

/// How long one frame was in each stage.
#[derive(Debug, Clone, Copy, Default)]
pub struct Timing {
    /// From the decoder to the worker.
    pub queue: Duration,
    /// Pixels to tensor.
    pub preprocess: Duration,
    /// The model's run.
    pub inference: Duration,
    /// Raw output to objects.
    pub postprocess: Duration,
}

/// Written by the worker, read by the snapshot. Its lock is held for a few additions. Cameras are
/// named by the indices of their lanes.
pub struct Meter {
    state: Mutex<State>,
}

impl Default for Meter {
    fn default() -> Self {
        let state = State {
            cameras: Vec::new(),
            stages: Timing::default(),
            frames: 0,
            since: Instant::now(),
            last_failure: None,
            stages_since_start: Default::default(),
            tallies: VecDeque::with_capacity(TALLIES_MAX + 1),
        };
        Self { state: Mutex::new(state) }
    }
}

struct State {
    cameras: Vec<CameraState>,
    stages: Timing,
    frames: u64,
    since: Instant,
    last_failure: Option<String>,
    stages_since_start: [Buckets; 4],
    /// By epoch, the newest at the end.
    tallies: VecDeque<(u64, Tally)>,
}

struct CameraState {
    records: u64,
    objects: u64,
    total_us: Histogram<u32>,
    total: Buckets,
    results: VecDeque<Outcome>,
    sight: Sight,
}

/// By class id, the most objects on one frame since someone asked.
#[derive(Default)]
struct Sight {
    /// Of the model that saw them; `None` = no frame.
    epoch: Option<u64>,
    most: Vec<u64>,
    /// On the frame in work.
    now: Vec<u64>,
}

impl Sight {
    fn add(&mut self, epoch: u64, found: &[Detection]) {
        if self.epoch != Some(epoch) {
            // Another model's ids mean other things.
            self.epoch = Some(epoch);
            self.most.clear();
        }
        self.now.clear();
        for class in found.iter().map(|d| d.class_id as usize) {
            if self.now.len() <= class {
                self.now.resize(class + 1, 0);
            }
            self.now[class] += 1;
        }
        if self.most.len() < self.now.len() {
            self.most.resize(self.now.len(), 0);
        }
        for (most, now) in self.most.iter_mut().zip(&self.now) {
            *most = (*most).max(*now);
        }
    }
}

/// A frame that was inferred, as the swap report looks back on it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Outcome {
    /// When its result was there.
    pub at: Instant,
    /// The frame.
    pub frame: u64,
    /// The model.
    pub epoch: u64,
    /// How long the model ran.
    pub inference: Duration,
    /// From the frame's arrival to its turn.
    pub queue: Duration,
    /// From the frame's arrival to its record.
    pub total: Duration,
}

/// A histogram since the start, for whoever computes rates from it.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Buckets {
    /// Durations up to each of the bounds and above the one before; the last are longer than all.
    pub counts: [u64; Self::BOUNDS_S.len() + 1],
    /// Their sum, seconds.
    pub sum_s: f64,
}

impl Buckets {
    /// Upper bounds, seconds.
    pub const BOUNDS_S: [f64; 11] =
        [0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 5.0];

    fn add(&mut self, duration: Duration) {
        let seconds = duration.as_secs_f64();
        self.counts[Self::BOUNDS_S.partition_point(|bound| *bound < seconds)] += 1;
        self.sum_s += seconds;
    }
}

/// Histograms since the start.
#[derive(Debug, Clone)]
pub struct Totals {
    /// By the stage's name.
    pub stages: [(&'static str, Buckets); 4],
    /// From the decoder to the record, in the order of the cameras.
    pub cameras: Vec<Buckets>,
}

/// What a model saw since it went live.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Tally {
    /// Frames.
    pub frames: u64,
    /// By class id: objects and the sum of their scores.
    pub classes: Vec<(u64, f64)>,
}

/// One window.
#[derive(Debug, Clone)]
pub struct Window {
    /// Its length.
    pub length: Duration,
    /// By lane.
    pub cameras: Vec<CameraWindow>,
    /// Share of the window in which the worker worked.
    pub busy: f64,
    /// Means; `None` = no frame.
    pub stages: Option<Stages>,
    /// Of any time, in words.
    pub last_failure: Option<String>,
}

/// One camera's share of a window.
#[derive(Debug, Clone)]
pub struct CameraWindow {
    /// Since the start.
    pub records: u64,
    /// Since the start.
    pub objects: u64,
    /// Frames inferred in the window.
    pub frames: u64,
    /// From decoder to record.
    pub latency: Option<Quantiles>,
}

impl Tally {
    fn add(&mut self, found: &[Detection]) {
        self.frames += 1;
        for detection in found {
            let class = detection.class_id as usize;
            if self.classes.len() <= class {
                self.classes.resize(class + 1, (0, 0.0));
            }
            self.classes[class].0 += 1;
            self.classes[class].1 += f64::from(detection.score);
        }
    }
}

impl Meter {
    /// Makes room for the lane of this index, before its first frame.
    pub fn seat(&self, index: usize) {
        let camera = || CameraState {
            records: 0,
            objects: 0,
            total_us: Histogram::new_with_max(LONGEST_US, 2).expect("the bounds are valid"),
            total: Buckets::default(),
            results: VecDeque::with_capacity(RESULTS_MAX),
            sight: Sight::default(),
        };
        let mut state = self.state();
        let seats = state.cameras.len().max(index + 1);
        state.cameras.resize_with(seats, camera);
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("nothing panics while it holds the meter")
    }

    /// A frame was inferred.
    pub fn frame(
        &self,
        camera: usize,
        frame: u64,
        epoch: u64,
        timing: &Timing,
        total: Duration,
        found: &[Detection],
    ) {
        let mut state = self.state();
        state.stages.queue += timing.queue;
        state.stages.preprocess += timing.preprocess;
        state.stages.inference += timing.inference;
        state.stages.postprocess += timing.postprocess;
        state.frames += 1;
        let stages = [timing.queue, timing.preprocess, timing.inference, timing.postprocess];
        for (buckets, duration) in state.stages_since_start.iter_mut().zip(stages) {
            buckets.add(duration);
        }
        if state.tallies.back().is_none_or(|(e, _)| *e != epoch) {
            if state.tallies.len() == TALLIES_MAX {
                state.tallies.pop_front();
            }
            state.tallies.push_back((epoch, Tally::default()));
        }
        if let Some((_, tally)) = state.tallies.back_mut() {
            tally.add(found);
        }
        let camera = &mut state.cameras[camera];
        camera.total_us.saturating_record(total.as_micros() as u64);
        camera.total.add(total);
        camera.sight.add(epoch, found);
        if camera.results.len() == RESULTS_MAX {
            camera.results.pop_front();
        }
        let at = Instant::now();
        let (queue, inference) = (timing.queue, timing.inference);
        camera.results.push_back(Outcome { at, frame, epoch, inference, queue, total });
    }

    /// Histograms since the start.
    pub fn totals(&self) -> Totals {
        let state = self.state();
        let [queue, preprocess, inference, postprocess] = state.stages_since_start.clone();
        Totals {
            stages: [
                ("queue", queue),
                ("preprocess", preprocess),
                ("inference", inference),
                ("postprocess", postprocess),
            ],
            cameras: state.cameras.iter().map(|c| c.total.clone()).collect(),
        }
    }

    /// The most objects that one frame of the lane held since this was asked last, by class id, with
    /// the epoch of the model; `None` = there was no frame.
    pub fn take_sight(&self, index: usize) -> Option<(u64, Vec<u64>)> {
        let sight = &mut self.state().cameras[index].sight;
        let epoch = sight.epoch.take()?;
        Some((epoch, std::mem::take(&mut sight.most)))
    }

    /// The results of every lane from `since` on, oldest first.
    pub fn results(&self, since: Instant) -> Vec<Vec<Outcome>> {
        let state = self.state();
        let of = |camera: &CameraState| {
            let from = camera.results.partition_point(|r| r.at < since);
            camera.results.range(from..).copied().collect()
        };
        state.cameras.iter().map(of).collect()
    }

    /// What the model of this epoch saw.
    pub fn tally(&self, epoch: u64) -> Option<Tally> {
        let state = self.state();
        state.tallies.iter().rev().find(|(e, _)| *e == epoch).map(|(_, t)| t.clone())
    }

    /// A record was written.
    pub fn record(&self, camera: usize, objects: usize) {
        let mut state = self.state();
        state.cameras[camera].records += 1;
        state.cameras[camera].objects += objects as u64;
    }

    /// A frame failed.
    pub fn failure(&self, camera: &str, why: &str) {
        self.state().last_failure = Some(format!("camera {camera}: {why}"));
    }

    /// What the model before this epoch saw.
    pub fn tally_before(&self, epoch: u64) -> Option<Tally> {
        let state = self.state();
        state.tallies.iter().rev().find(|(e, _)| *e < epoch).map(|(_, t)| t.clone())
    }

    /// Ends the window, begins the next and returns what was in it.
    pub fn take_window(&self) -> Window {
        let mut state = self.state();
        let now = Instant::now();
        let length = now - std::mem::replace(&mut state.since, now);
        let frames = std::mem::take(&mut state.frames);
        let stages = std::mem::take(&mut state.stages);
        let worked = stages.preprocess + stages.inference + stages.postprocess;
        let mean = |d: Duration| rounded(d.as_secs_f64() * 1e3 / frames as f64, 3);
        let cameras = state.cameras.iter_mut().map(|camera| {
            let window = CameraWindow {
                records: camera.records,
                objects: camera.objects,
                frames: camera.total_us.len(),
                latency: quantiles(&camera.total_us),
            };
            camera.total_us.reset();
            window
        });
        Window {
            length,
            cameras: cameras.collect(),
            busy: rounded(worked.as_secs_f64() / length.as_secs_f64().max(1e-6), 3),
            stages: (frames > 0).then(|| Stages {
                queue: mean(stages.queue),
                preprocess: mean(stages.preprocess),
                inference: mean(stages.inference),
                postprocess: mean(stages.postprocess),
            }),
            last_failure: state.last_failure.clone(),
        }
    }
}

fn quantiles(histogram: &Histogram<u32>) -> Option<Quantiles> {
    if histogram.is_empty() {
        return None;
    }
    let ms = |us: u64| rounded(us as f64 / 1e3, 2);
    let at = |q: f64| ms(histogram.value_at_quantile(q));
    Some(Quantiles { p50: at(0.5), p95: at(0.95), p99: at(0.99), max: ms(histogram.max()) })
}
