//! `noblink prove`: the process in which a model meets ONNX Runtime for the first time.
//!
//! Reads a ticket from standard input, locks itself in, and says on standard output, line by line,
//! what it does and what came of it. Live frames are named to it, line by line, while it works. It may
//! die at any point; the parent makes of that what it must.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::io::{BufRead, Read};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, TryRecvError, bounded};
use serde_json::{Value, json};

use super::super::job::{Gate, Reason, Verdict};
use super::super::tune;
use super::agreement::Agreement;
use super::bench::{Bench, out_of_memory};
use super::calibration::{self, Marks};
use super::confine::{self, Allowance, process_cpu};
use super::content;
use super::examine;
use super::folder::Folder;
use super::frame::FrameDump;
use super::latency::{Run, Stopwatch};
use super::request::{Request, Subject};
use super::score::{self, Finding, Tally};
use super::wire::{self, Fault, Line, Report, Step, Task, Ticket, Who, Work};
use super::{GATES, failed, gate, shift, skipped};
use crate::model::engine::{EngineOptions, Model, OpenError, Thresholds};
use crate::model::file::ModelFile;
use crate::model::runtime::Runtime;
use crate::records::rounded;
use crate::vision::letterbox::Geometry;

/// Largest ticket.
const TICKET_BYTES_MAX: u64 = 16 << 20;
/// Real pictures that are looked at beside black, white and noise.
const REAL_FRAMES: usize = 4;
/// Live frames that are looked at.
pub const LIVE_FRAMES_MAX: usize = 32;
/// AP50 wants the doubtful findings as well.
const DOUBTFUL: f32 = 0.001;

/// Runs the child to its end; 0 only if the report was said.
pub fn main() -> ExitCode {
    let mut text = String::new();
    let read = std::io::stdin().lock().take(TICKET_BYTES_MAX).read_line(&mut text);
    let ticket = read
        .map_err(|e| e.to_string())
        .and_then(|_| serde_json::from_str::<Ticket>(&text).map_err(|e| format!("no ticket: {e}")));
    let confined = ticket.and_then(|ticket| {
        let (confinement, allowance) = confine::confine(&ticket)?;
        Ok((ticket, confinement, allowance))
    });
    match confined {
        Ok((ticket, confinement, allowance)) => {
            let nonce = ticket.nonce;
            match ticket.task {
                Task::Prove(request) => {
                    let proof = Proof::new(&request, allowance, frames());
                    let report = proof.run(nonce, confinement);
                    say(&Line::Report(Box::new(report)));
                }
                Task::Tune(ask) => {
                    let measured = tune::measure(&ask, &allowance);
                    say(&Line::Measured { nonce, measured });
                }
            }
            ExitCode::SUCCESS
        }
        Err(why) => {
            eprintln!("noblink prove: {why}");
            ExitCode::FAILURE
        }
    }
}

/// The live frames that the parent names, as they come.
fn frames() -> Receiver<PathBuf> {
    let (named, live) = bounded(LIVE_FRAMES_MAX);
    std::thread::spawn(move || {
        let lines = std::io::stdin().lines().map_while(Result::ok);
        // Nobody listens = the proof is over.
        lines.filter_map(|line| wire::read_frame(&line)).try_for_each(|file| named.send(file))
    });
    live
}

pub(in crate::update) fn say(line: &Line) {
    println!("{}", serde_json::to_string(line).expect("lines are plain data"));
}

/// Why the proving ends before its end.
type Halt = (Fault, Reason);

struct Proof<'a> {
    request: &'a Request,
    allowance: Allowance,
    /// Dumps of live frames; closed when no more will come.
    live: Receiver<PathBuf>,
    gates: Vec<Gate>,
    refused: Option<Halt>,
    ask: Option<Reason>,
    phases_ms: BTreeMap<String, f64>,
    /// Why the active model can't be compared with.
    no_active: String,
}

impl<'a> Proof<'a> {
    fn new(request: &'a Request, allowance: Allowance, live: Receiver<PathBuf>) -> Self {
        Self {
            request,
            allowance,
            live,
            gates: Vec::new(),
            refused: None,
            ask: None,
            phases_ms: BTreeMap::new(),
            no_active: "there is no active model".into(),
        }
    }

    fn run(mut self, nonce: String, confinement: Value) -> Report {
        if let Err(halt) = self.prove(confinement) {
            self.refused = Some(halt);
        }
        if let Some(last) = self.gates.last().filter(|_| self.refused.is_some()) {
            let why = format!("not run: {} has failed", last.gate);
            for name in GATES.iter().skip(2) {
                if !self.gates.iter().any(|g| g.gate == *name) {
                    self.gates.push(skipped(name, &why));
                }
            }
        }
        let Self { gates, refused, ask, phases_ms, .. } = self;
        Report { nonce, gates, refused, ask, phases_ms }
    }

    /// The gates in order; the first that refuses ends it.
    fn prove(&mut self, confinement: Value) -> Result<(), Halt> {
        let runtime = Runtime::load(self.request.engine.library.as_deref());
        let runtime = runtime.map_err(|e| self.machine("proving", "runtime", e.to_string()))?;
        let folder = self.folder()?;
        let (mut candidate, real) = self.examine(&runtime, folder.as_ref(), confinement)?;
        let mut active = self.active(&runtime);
        self.calibrate(folder.as_ref(), &mut candidate, &mut active)?;
        let mut watch = Stopwatch::default();
        self.agree(folder.is_some(), &real, &mut candidate, &mut active, &mut watch)?;
        self.time(real.first(), candidate, active, watch)
    }

    /// Begins a phase's next piece of work, with a step's CPU time before it.
    fn step(&self, what: Work, who: Who) {
        say(&Line::Step(Step { what, who }));
        // The hard limit stands in any case.
        let _ = self.allowance.renew();
    }

    fn phase(&mut self, name: &str, since: Instant) {
        let spent = self.phases_ms.entry(name.to_owned()).or_default();
        *spent = rounded(*spent + since.elapsed().as_secs_f64() * 1e3, 1);
    }

    fn push(&mut self, gate: Gate) {
        say(&Line::Gate(gate.clone()));
        self.gates.push(gate);
    }

    /// Notes a gate and ends there if it refuses.
    fn judged(&mut self, (gate, refused): (Gate, Option<Reason>)) -> Result<(), Halt> {
        self.push(gate);
        refused.map_or(Ok(()), |reason| Err((Fault::Model, reason)))
    }

    /// The gate could not be run through no fault of the model's, and was asked for.
    fn machine(&mut self, gate: &'static str, code: &'static str, message: String) -> Halt {
        let reason = Reason::new(code, message);
        self.push(failed(gate, &reason, json!({})));
        (Fault::Machine, reason)
    }

    fn folder(&mut self) -> Result<Option<Folder>, Halt> {
        let Some(rules) = &self.request.calibration else { return Ok(None) };
        Folder::read(&rules.dir).map(Some).map_err(|why| {
            let message = format!("the calibration folder {} {why}", rules.dir.display());
            self.machine("calibration", "calibration_unusable", message)
        })
    }

    /// A few real pictures: of the folder, else live ones.
    fn real(&mut self, folder: Option<&Folder>) -> Result<Vec<FrameDump>, Halt> {
        let Some(folder) = folder else {
            // One is waited for; the others only if they are there.
            let files = self.live.recv().into_iter().chain(self.live.try_iter()).take(REAL_FRAMES);
            let frames: Result<_, _> = files.map(|file| FrameDump::read(&file)).collect();
            return frames.map_err(|e| self.machine("agreement", "frames_unusable", e.to_string()));
        };
        let samples = folder.samples.iter().take(REAL_FRAMES);
        let decoded: Result<_, _> = samples.map(|s| FrameDump::decode(&s.image)).collect();
        decoded.map_err(|e| self.machine("calibration", "calibration_unusable", e.to_string()))
    }

    /// Gate `proving`: load, extreme frames, a few real ones, which are handed out.
    fn examine(
        &mut self,
        runtime: &Arc<Runtime>,
        folder: Option<&Folder>,
        confinement: Value,
    ) -> Result<(Bench, Vec<FrameDump>), Halt> {
        let began = Instant::now();
        self.step(Work::Load, Who::Candidate);
        let opened = self.open(runtime, &self.request.candidate, Who::Candidate);
        self.phase("load", began);
        let refuse = |this: &mut Self, (fault, reason): Halt, numbers: Value| {
            this.push(failed("proving", &reason, numbers));
            (fault, reason)
        };
        let mut bench =
            opened.map_err(|halt| refuse(self, halt, json!({ "confinement": confinement })))?;

        let input = bench.model.contract().input.clone();
        let synthetic = examine::frames(input.width, input.height);
        let mut watch = examine::Watch::default();
        let mut look = |this: &Self, frames: &[FrameDump]| {
            frames.iter().try_for_each(|frame| {
                this.step(Work::Examine, Who::Candidate);
                bench.look(frame, this.thresholds(), &mut watch)
            })
        };
        let began = Instant::now();
        let looked = look(self, &synthetic);
        self.phase("examine", began);
        let real = if looked.is_ok() { self.real(folder)? } else { Vec::new() };
        let began = Instant::now();
        let looked = looked.and_then(|()| look(self, &real));
        let layout = bench.model.contract().layout;
        let looked = looked.and_then(|()| watch.end(layout, !real.is_empty()));
        self.phase("examine", began);
        let online = confinement["offline"] != true;
        let numbers = json!({
            "provider": bench.model.setting().provider,
            "all_nodes_there": bench.model.whole(),
            "threads": self.request.engine.setting.threads,
            "runtime": runtime.version(),
            "frames": watch.frames,
            "output_varies": watch.varied,
            "load_ms": self.phases_ms["load"],
            "cpu_s": rounded(process_cpu().as_secs_f64(), 2),
            "confinement": confinement,
        });
        if let Err(reason) = looked {
            return Err(refuse(self, (Fault::Model, reason), numbers));
        }
        let mut message = format!(
            "loaded in {:.0} ms, {} frames of black, white, noise and life survived",
            self.phases_ms["load"], watch.frames
        );
        if online {
            message += "; this machine did not let its network be cut off";
        }
        self.push(gate("proving", Verdict::Passed, message, numbers));
        Ok((bench, real))
    }

    /// The active model; a broken one must not keep its replacement out.
    fn active(&mut self, runtime: &Arc<Runtime>) -> Option<Bench> {
        let subject = self.request.active.as_ref()?;
        let began = Instant::now();
        self.step(Work::Load, Who::Active);
        let opened = self.open(runtime, subject, Who::Active);
        self.phase("active", began);
        opened
            .map_err(|(_, reason)| {
                self.no_active = format!("the active model can't be compared with: {reason}");
            })
            .ok()
    }

    fn open(&self, runtime: &Arc<Runtime>, subject: &Subject, who: Who) -> Result<Bench, Halt> {
        let engine = &self.request.engine;
        let machine = |code, message| (Fault::Machine, Reason::new(code, message));
        let bytes = std::fs::read(&subject.file).map_err(|e| {
            machine("unreadable", format!("{} can't be read: {e}", subject.file.display()))
        })?;
        let domains = &engine.custom_op_domains;
        let file = ModelFile::parse(bytes, &subject.name, &subject.overrides, domains)
            .map_err(|refusal| (Fault::Model, content::reason(refusal)))?;
        if subject.sha256.is_some_and(|wanted| wanted.to_string() != file.identity.sha256) {
            let message = format!("{} is not what was verified", subject.file.display());
            return Err(machine("digest_mismatch", message));
        }
        let options = EngineOptions {
            setting: engine.setting,
            custom_op_domains: domains.clone(),
            ..EngineOptions::default()
        };
        let model = Model::build(runtime, &file, &options).map_err(|e| match e {
            OpenError::Refused(refusal) => (Fault::Model, out_of_memory(content::reason(refusal))),
            OpenError::Provider { .. } => machine("provider", e.to_string()),
        })?;
        Ok(Bench { model, who, found: Vec::new() })
    }

    fn thresholds(&self) -> Thresholds {
        let engine = &self.request.engine;
        Thresholds { confidence: engine.confidence, iou: engine.iou }
    }

    /// Gates `calibration` and `shift`, from one look at the pictures.
    fn calibrate(
        &mut self,
        folder: Option<&Folder>,
        candidate: &mut Bench,
        active: &mut Option<Bench>,
    ) -> Result<(), Halt> {
        let (Some(folder), Some(rules)) = (folder, &self.request.calibration) else {
            let why = "no calibration folder is configured (models.calibration.dir)";
            self.push(skipped("calibration", why));
            self.push(skipped("shift", why));
            return Ok(());
        };
        let began = Instant::now();
        let mut mine = Marks::of(&candidate.model, folder);
        let mut theirs = active.as_ref().map(|active| Marks::of(&active.model, folder));
        let mut scale = Vec::with_capacity(folder.samples.len());
        let input = candidate.model.contract().input.clone();
        for n in 0..folder.samples.len() {
            let picture = FrameDump::decode(&folder.samples[n].image)
                .map_err(|e| self.machine("calibration", "calibration_unusable", e.to_string()))?;
            let (width, height) = picture.size();
            let place = Geometry::new(input.fit, (width, height), (input.width, input.height));
            scale.push((place.resized.0 as f64, place.resized.1 as f64));
            if let Err(reason) = self.mark(folder, n, &picture, candidate, &mut mine) {
                self.push(failed("calibration", &reason, json!({ "picture": picture.name() })));
                return Err((Fault::Model, reason));
            }
            if let (Some(bench), Some(marks)) = (active.as_mut(), theirs.as_mut())
                && let Err(reason) = self.mark(folder, n, &picture, bench, marks)
            {
                self.no_active = format!("the active model can't be compared with: {reason}");
                (*active, theirs) = (None, None);
            }
        }
        self.phase("calibration", began);
        self.judged(calibration::judge(folder, rules, &mine, theirs.as_ref()))?;
        if folder.objects() == 0 {
            self.push(skipped("shift", "the calibration folder has no labels"));
            return Ok(());
        }
        self.judged(shift::judge(folder, &scale, &mine, theirs.as_ref()))
    }

    fn mark(
        &self,
        folder: &Folder,
        n: usize,
        picture: &FrameDump,
        bench: &mut Bench,
        marks: &mut Marks,
    ) -> Result<(), Reason> {
        let engine = &self.request.engine;
        self.step(Work::Calibration, bench.who);
        let confidence = DOUBTFUL.min(engine.confidence);
        bench.detect(picture, Thresholds { confidence, iou: engine.iou })?;
        let sure = bench.found.iter().filter(|d| d.score > engine.confidence).count();
        marks.found.push(sure);
        let Some(truth) = &folder.samples[n].truth else {
            marks.boxes.push(Vec::new());
            return Ok(());
        };
        let labels = &bench.model.contract().labels;
        let findings: Vec<Finding> = bench
            .found
            .iter()
            .filter_map(|d| {
                let label = labels.get(d.class_id as usize)?;
                let class = folder.names.iter().position(|name| name == label)?;
                Some(Finding { class, score: d.score, corners: [d.x1, d.y1, d.x2, d.y2] })
            })
            .collect();
        let name = picture.name();
        marks.boxes.push(score::count(
            name,
            &findings,
            truth,
            engine.confidence,
            &mut marks.tallies,
        ));
        Ok(())
    }

    /// Gate `agreement`: reports, or asks. It refuses only a model that fails on a live frame.
    fn agree(
        &mut self,
        calibrated: bool,
        real: &[FrameDump],
        candidate: &mut Bench,
        active: &mut Option<Bench>,
        watch: &mut Stopwatch,
    ) -> Result<(), Halt> {
        let began = Instant::now();
        let Some(active) = active.as_mut() else {
            self.push(skipped("agreement", self.no_active.clone()));
            return Ok(());
        };
        if calibrated {
            self.push(skipped("agreement", "the calibration folder has judged"));
            return Ok(());
        }
        match self.compare(real, candidate, active, watch)? {
            Ok(agreement) => {
                self.phase("agreement", began);
                let (gate, ask) = agreement.judge();
                self.push(gate);
                self.ask = ask;
            }
            Err(why) => self.push(skipped("agreement", why)),
        }
        Ok(())
    }

    /// Both models on the live frames, those that were looked at already first; the inner error is why
    /// they can't be compared. The times of their runs are kept, and while a frame is waited for, more
    /// are taken on the one before.
    fn compare(
        &mut self,
        real: &[FrameDump],
        candidate: &mut Bench,
        active: &mut Bench,
        watch: &mut Stopwatch,
    ) -> Result<Result<Agreement, String>, Halt> {
        let mut agreement = Agreement::default();
        let mut frames = real.iter().map(Cow::Borrowed);
        let mut last: Option<Cow<'_, FrameDump>> = None;
        while agreement.frames() < LIVE_FRAMES_MAX {
            let spare = last.take().filter(|_| watch.wants_more(&self.request.latency));
            let (frame, is_new) = match (frames.next(), spare) {
                (Some(frame), _) => (frame, true),
                (None, spare) => match (self.live.try_recv(), spare) {
                    (Err(TryRecvError::Empty), Some(spare)) => (spare, false),
                    (received, _) => {
                        let Ok(file) = received.or_else(|_| self.live.recv()) else { break };
                        match FrameDump::read(&file) {
                            Ok(frame) => (Cow::Owned(frame), true),
                            Err(e) => return Ok(Err(e.to_string())),
                        }
                    }
                },
            };
            let mut benches = [&mut *candidate, &mut *active];
            if watch.next() == Who::Active {
                benches.reverse();
            }
            for bench in benches {
                match self.run_timed(Work::Agreement, bench, &frame) {
                    Ok(run) => watch.note(bench.who, run),
                    Err(reason) if bench.who == Who::Candidate => {
                        self.push(failed("agreement", &reason, json!({ "frame": frame.name() })));
                        return Err((Fault::Model, reason));
                    }
                    Err(e) => return Ok(Err(format!("the active model: {}: {e}", frame.name()))),
                }
            }
            if is_new {
                let (old, new) = (active.model.contract(), candidate.model.contract());
                let shared =
                    |label: &str| [old, new].iter().all(|c| c.labels.iter().any(|l| l == label));
                agreement.add(&active.labelled(), &candidate.labelled(), shared);
            }
            last = Some(frame);
        }
        Ok(if agreement.frames() == 0 {
            Err("there are no live frames".into())
        } else {
            Ok(agreement)
        })
    }

    /// One frame's CPU and wall time.
    fn run_timed(&self, what: Work, bench: &mut Bench, frame: &FrameDump) -> Result<Run, Reason> {
        self.step(what, bench.who);
        let (cpu, wall) = (process_cpu(), Instant::now());
        let ran = bench.detect(frame, self.thresholds());
        let wall = wall.elapsed();
        std::thread::sleep(SETTLE);
        let cpu = process_cpu().saturating_sub(cpu);
        ran.map(|()| Run { cpu, wall })
    }

    /// Gate `latency`: by the runs on the live frames, and as many more as it takes.
    fn time(
        &mut self,
        real: Option<&FrameDump>,
        mut candidate: Bench,
        active: Option<Bench>,
        mut watch: Stopwatch,
    ) -> Result<(), Halt> {
        let Some(mut active) = active else {
            let why = self.no_active.clone();
            self.push(skipped("latency", why));
            return Ok(());
        };
        let began = Instant::now();
        let grey = FrameDump::rgb("grey", 1280, 720, vec![114; 3 * 1280 * 720]);
        let frame = real.unwrap_or(&grey);
        let rules = &self.request.latency;
        while watch.wants_more(rules) {
            let bench = match watch.next() {
                Who::Candidate => &mut candidate,
                Who::Active => &mut active,
            };
            let ran = self.run_timed(Work::Latency, bench, frame).map_err(|reason| {
                self.push(failed("latency", &reason, json!({})));
                (if bench.who == Who::Candidate { Fault::Model } else { Fault::Machine }, reason)
            })?;
            watch.note(bench.who, ran);
        }
        self.phase("latency", began);
        let engine = &self.request.engine;
        let allowed = crate::affinity::allowed().len().max(1);
        let cores =
            engine.cores.as_ref().map_or(allowed, Vec::len).min(engine.setting.threads).max(1);
        self.judged(watch.judge(rules, cores))
    }
}

/// Before the clock is read: threads of the pool that are just falling asleep would be counted for
/// the next run.
const SETTLE: Duration = Duration::from_millis(1);

impl Marks {
    fn of(model: &Model, folder: &Folder) -> Self {
        let labels = &model.contract().labels;
        Self {
            tallies: vec![Tally::default(); folder.names.len()],
            known: folder.names.iter().map(|name| labels.contains(name)).collect(),
            ..Self::default()
        }
    }
}
