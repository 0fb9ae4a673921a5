//! The child's part: load what the library has, time it in turns, look at the pictures.

use std::fs::File;
use std::io;
use std::path::Path;
use std::time::{Duration, Instant};

use super::{Ask, Found, Measured, Row};
use crate::config::Provider;
use crate::host;
use crate::model::engine::{EngineOptions, Model, Thresholds};
use crate::model::file::ModelFile;
use crate::model::options::Setting;
use crate::model::runtime::Runtime;
use crate::records::rounded;
use crate::text::brief;
use crate::update::gates::confine::{self, Allowance, process_cpu};
use crate::update::gates::wire::Line;
use crate::update::gates::{FrameDump, examine, say};

/// Runs of a turn. The fastest counts: others of the machine can only make it slower.
const RUNS: usize = 3;
/// Turns of each setting at most, and those that are made even if time is short.
const TURNS_MAX: usize = 30;
const TURNS_MIN: usize = 3;
/// Share of the time in which settings are still loaded.
const LOADING: f64 = 0.5;
/// Findings of a picture that are compared.
const FOUND_MAX: usize = 60;
/// Doubtful findings as well: an empty scene has no others.
const DOUBTFUL: f32 = 0.001;
/// Between two turns: threads of the pool that are just falling asleep would disturb the next, and
/// those that spin do so for a while.
const SETTLE: Duration = Duration::from_millis(1);
const SETTLE_SPINNING: Duration = Duration::from_millis(20);

/// The way to the box for two children in a duel: who holds the lock of the model's file has it.
struct Door(Option<File>);

impl Door {
    /// Fails where files can't be locked.
    fn of(ask: &Ask) -> io::Result<Self> {
        let door = Self(ask.duel.map(|_| File::open(&ask.model.file)).transpose()?);
        door.0.as_ref().map_or(Ok(()), File::lock)?;
        drop(Turn(&door));
        Ok(door)
    }

    /// Waits for the box. It has been locked before: no error is left but an interruption.
    fn enter(&self) -> Turn<'_> {
        let _ = self.0.as_ref().map(File::lock);
        Turn(self)
    }
}

/// Gives way at its end.
struct Turn<'d>(&'d Door);

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        if let Some(file) = &self.0.0 {
            let _ = file.unlock();
            // The other one is awake by then.
            std::thread::sleep(SETTLE);
        }
    }
}

/// A setting that is up.
struct Entry {
    row: Row,
    model: Option<Model>,
}

/// Measures; a setting that fails says so in its row, one that ends the process was said before.
pub(in crate::update) fn measure(ask: &Ask, allowance: &Allowance) -> Measured {
    let end = Instant::now() + Duration::from_millis(ask.budget_ms);
    let prepared =
        Runtime::load(Some(&ask.library)).map_err(|e| e.to_string()).and_then(|runtime| {
            let bytes =
                std::fs::read(&ask.model.file).map_err(|e| format!("can't be read: {e}"))?;
            let Ask { model, custom_op_domains, .. } = ask;
            let file = ModelFile::parse(bytes, &model.name, &model.overrides, custom_op_domains);
            let file = file.map_err(|refusal| refusal.message)?;
            if ask.model.sha256.is_some_and(|wanted| wanted.to_string() != file.identity.sha256) {
                return Err("the file is not what was asked for".into());
            }
            let door = Door::of(ask).map_err(|e| format!("can't be locked: {e}"))?;
            Ok((runtime, file, door))
        });
    let (runtime, file, door) = match prepared {
        Ok(prepared) => prepared,
        // No duel, as where files can't be locked, says nothing of a setting that was measured before.
        Err(_) if ask.duel.is_some() => return Measured { rows: Vec::new() },
        Err(why) => return Measured { rows: vec![Row::failed(ask.reference, why)] },
    };
    let input = &file.contract.input;
    let pictures = pictures(&ask.pictures, input.width, input.height);

    let until = end - Duration::from_millis(ask.budget_ms).mul_f64(1.0 - LOADING);
    let mut entries = Vec::new();
    for setting in settings(ask, &runtime.providers()) {
        if Instant::now() > until && !entries.is_empty() {
            let row = Row::failed(setting, "there was no time left for it".to_owned());
            entries.push(Entry { row: Row { late: true, ..row }, model: None });
            continue;
        }
        say(&Line::Trying(setting));
        // The hard limit stands in any case.
        let _ = allowance.renew();
        let options = EngineOptions {
            setting,
            custom_op_domains: ask.custom_op_domains.clone(),
            ..EngineOptions::default()
        };
        let _turn = door.enter();
        let began = Instant::now();
        let opened =
            Model::build(&runtime, &file, &options).map_err(|e| words(setting, &e.to_string()));
        let mut entry = match opened {
            Ok(model) => Entry { row: Row::new(setting), model: Some(model) },
            Err(why) => Entry { row: Row::failed(setting, why), model: None },
        };
        entry.row.load_ms = rounded(began.elapsed().as_secs_f64() * 1e3, 1);
        entry.look(&pictures, ask.iou);
        entries.push(entry);
    }
    for turn in 0..TURNS_MAX {
        if Instant::now() > end && turn >= TURNS_MIN {
            break;
        }
        let _ = allowance.renew();
        // There and back: whoever follows a hungry one finds colder caches.
        match turn % 2 {
            0 => entries.iter_mut().for_each(|entry| entry.turn(&door)),
            _ => entries.iter_mut().rev().for_each(|entry| entry.turn(&door)),
        }
    }
    Measured { rows: entries.into_iter().map(|entry| entry.row).collect() }
}

/// The settings to measure, the reference first, then those that are likeliest to win.
fn settings(ask: &Ask, providers: &[Provider]) -> Vec<Setting> {
    let most = ask.reference.threads.max(1);
    let mut threads = vec![most, most.div_ceil(2), 1];
    threads.dedup();
    let mut all = vec![ask.reference];
    for provider in providers.iter().rev() {
        match provider {
            // Their threads are the device's.
            Provider::Cuda | Provider::TensorRt => {
                all.push(Setting { provider: *provider, ..ask.reference });
            }
            Provider::Cpu | Provider::OpenVino => {
                let plain = Setting { provider: *provider, ..Setting::default() };
                if *provider == Provider::OpenVino && host::has_bf16() {
                    all.push(Setting { threads: most, bf16: true, ..plain });
                }
                all.extend(threads.iter().map(|&threads| Setting { threads, ..plain }));
            }
        }
    }
    if ask.spinning && most > 1 {
        all.push(Setting { spinning: true, ..ask.reference });
    }
    if let Some(setting) = ask.duel {
        all = vec![setting];
    }
    let mut seen = Vec::new();
    all.retain(|setting| {
        let fresh = !seen.contains(setting) && !ask.left_out.contains(setting);
        seen.push(*setting);
        fresh
    });
    all
}

/// What there is to look at: real pictures, and noise that is the same every time.
fn pictures(files: &[std::path::PathBuf], width: usize, height: usize) -> Vec<FrameDump> {
    let read = |file: &Path| match file.extension().is_some_and(|e| e == "frame") {
        true => FrameDump::read(file).ok(),
        false => FrameDump::decode(file).ok(),
    };
    files.iter().filter_map(|file| read(file)).chain(examine::frames(width, height)).collect()
}

/// Why a session can't be had, with the remedy where it is known.
fn words(setting: Setting, error: &str) -> String {
    if setting.provider == Provider::OpenVino && !confine::may_make_code() {
        return "it makes code at run time, which the service may not \
                (MemoryDenyWriteExecute=yes in its unit)"
            .to_owned();
    }
    brief(error, 300)
}

impl Row {
    pub(super) fn new(setting: Setting) -> Self {
        let (wall_ms, cpu_ms, found) = (Vec::new(), Vec::new(), Vec::new());
        Self { setting, load_ms: 0.0, wall_ms, cpu_ms, found, error: None, late: false }
    }

    pub(super) fn failed(setting: Setting, why: String) -> Self {
        Self { error: Some(why), ..Self::new(setting) }
    }
}

impl Entry {
    fn fail(&mut self, why: String) {
        self.row.error = Some(why);
        self.model = None;
    }

    /// What it finds in the pictures. The last one stays in the input tensor for the turns.
    fn look(&mut self, pictures: &[FrameDump], iou: f32) {
        let Some(model) = &self.model else { return };
        let mut runner = model.runner();
        let mut found = Vec::new();
        let thresholds = Thresholds { confidence: DOUBTFUL, iou };
        // The real pictures are in front: the last one to be looked at is a real one.
        for picture in pictures.iter().rev() {
            let seen = runner
                .preprocess(&picture.picture())
                .and_then(|()| runner.run())
                .and_then(|()| runner.postprocess(&thresholds, &mut found));
            if let Err(e) = seen {
                drop(runner);
                return self.fail(format!("{}: {e}", picture.name()));
            }
            let of = |d: &crate::model::engine::Detection| Found {
                class: d.class_id,
                score: d.score,
                corners: [d.x1, d.y1, d.x2, d.y2],
            };
            self.row.found.push(found.iter().take(FOUND_MAX).map(of).collect());
        }
    }

    fn turn(&mut self, door: &Door) {
        let Some(model) = &self.model else { return };
        let _turn = door.enter();
        let mut runner = model.runner();
        let (mut wall, cpu) = (Duration::MAX, process_cpu());
        for _ in 0..RUNS {
            let began = Instant::now();
            if let Err(e) = runner.run() {
                drop(runner);
                return self.fail(e.to_string());
            }
            wall = wall.min(began.elapsed());
        }
        std::thread::sleep(if self.row.setting.spinning { SETTLE_SPINNING } else { SETTLE });
        let cpu = process_cpu().saturating_sub(cpu) / RUNS as u32;
        self.row.wall_ms.push(rounded(wall.as_secs_f64() * 1e3, 4));
        self.row.cpu_ms.push(rounded(cpu.as_secs_f64() * 1e3, 4));
    }
}
