//! `provider = "auto"`: what is chosen, that it is kept, and that nobody notices the move.

use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use noblink::config::{Inference, Models, Provider};
use noblink::model::options::Setting;
use noblink::model::runtime::{Runtime, installed, library_for, version_of};
use noblink::update::digest::Digest;
use noblink::update::gates::{self, Engine, Limits, Subject};
use noblink::update::registry::Registry;
use noblink::update::tune::{
    self, Found, GAIN_MIN, Libraries, Order, Row, State, Stopped, Table, Tuning,
};
use serde_json::Value;

use crate::harness::line::Line;
use crate::harness::mosquitto::Mosquitto;
use crate::harness::onnx::Fault;
use crate::harness::schema::{assert_valid, validator};
use crate::harness::service::{noblink_output, shipped};
use crate::harness::site::{Site, good};
use crate::harness::until;
use noblink::rtsp::{self, RtspServer};

const CPU2: Setting = Setting { provider: Provider::Cpu, threads: 2, spinning: false, bf16: false };
/// Moves whatever is faster on this machine, and stays.
const WHATEVER: [(&str, &str); 1] = [("NOBLINK_FAILPOINT", "tune.reference")];

const CPU1: Setting = Setting { threads: 1, ..CPU2 };
const OPENVINO: Setting = Setting { provider: Provider::OpenVino, ..CPU2 };

/// Intel's build of the library, where the setup has brought it.
fn openvino() -> Option<PathBuf> {
    let found = installed(None).into_iter().find(|p| p.to_string_lossy().contains("openvino"));
    if found.is_none() {
        eprintln!(
            "NOT TESTED: OpenVINO, whose library is not installed (scripts/setup --openvino)"
        );
    }
    found
}

fn object(score: f32, left: f32) -> Found {
    Found { class: 1, score, corners: [left, 0.2, left + 0.2, 0.5] }
}

fn row(setting: Setting, ms: f64, found: &[Found]) -> Row {
    let (wall_ms, cpu_ms) = (vec![ms; 5], vec![2.0 * ms; 5]);
    Row {
        setting,
        load_ms: 30.0,
        wall_ms,
        cpu_ms,
        found: vec![found.to_vec()],
        error: None,
        late: false,
    }
}

fn judged(rows: &[&[Row]]) -> Table {
    let libraries = ["/a/libonnxruntime.so.1.32.0", "/b/libonnxruntime.so.1.24.1"];
    let rows = rows.iter().map(|rows| rows.to_vec());
    let measured: Vec<_> = libraries.iter().map(PathBuf::from).zip(rows).collect();
    tune::judge(&measured, 0.25).expect("the reference was measured")
}

#[test]
fn the_fastest_that_agrees_is_chosen_if_it_is_worth_it() {
    let seen = [object(0.9, 0.1), object(0.6, 0.5), object(0.26, 0.7)];
    let base = row(CPU2, 10.0, &seen);
    let chosen = |ms: f64, found: &[Found]| {
        let table = judged(&[&[base.clone(), row(OPENVINO, ms, found)]]);
        (table.chosen.setting, table.candidates[1].clone())
    };
    assert_eq!(chosen(9.0, &seen).0, OPENVINO);
    assert_eq!(chosen(10.0 / GAIN_MIN - 0.001, &seen).0, OPENVINO);
    assert_eq!(chosen(10.0 / GAIN_MIN + 0.001, &seen).0, CPU2, "not worth it");
    assert_eq!(chosen(20.0, &seen).0, CPU2);

    // Rounding, and a finding at the threshold that falls on the other side: that is agreement.
    let near = [object(0.88, 0.101), object(0.61, 0.5)];
    let (setting, candidate) = chosen(5.0, &near);
    assert_eq!((setting, candidate.agreement, candidate.out), (OPENVINO, Some(1.0), None));
    let wrong: [(&str, Vec<Found>); 5] = [
        ("missed", vec![object(0.9, 0.1)]),
        ("invented", [&seen[..], &[object(0.5, 0.3)]].concat()),
        ("moved", vec![object(0.9, 0.15), object(0.6, 0.5)]),
        ("unsure", vec![object(0.7, 0.1), object(0.6, 0.5)]),
        ("mistaken", vec![Found { class: 0, ..seen[0] }, seen[1]]),
    ];
    for (what, found) in wrong {
        let (setting, candidate) = chosen(1.0, &found);
        assert_eq!(setting, CPU2, "{what}");
        assert!(candidate.agreement.unwrap() < 0.95, "{what}: {candidate:?}");
        assert!(candidate.out.unwrap().contains("findings are the reference's"), "{what}");
    }
}

/// Others can only make a run slower: a box that is busy in most turns is none.
#[test]
fn who_was_disturbed_more_often_is_not_slower() {
    let seen = [object(0.9, 0.1)];
    let busy = Row { wall_ms: vec![30.0, 5.0, 28.0, 5.1, 31.0, 29.0], ..row(OPENVINO, 5.0, &seen) };
    let table = judged(&[&[row(CPU2, 10.0, &seen), busy]]);
    assert_eq!((table.chosen.setting, table.candidates[1].wall_ms), (OPENVINO, Some(5.1)));
}

/// An empty scene has doubtful findings only: they must not let anything pass.
#[test]
fn where_nothing_is_sure_the_doubtful_decide() {
    let doubtful = [object(0.04, 0.1), object(0.03, 0.5), object(0.001, 0.7)];
    let of = |found: &[Found]| judged(&[&[row(CPU2, 10.0, &doubtful), row(OPENVINO, 5.0, found)]]);
    assert_eq!(of(&doubtful).chosen.setting, OPENVINO);
    assert_eq!(of(&doubtful[..2]).chosen.setting, OPENVINO, "the weakest is noise");
    assert_eq!(of(&[]).chosen.setting, CPU2);
    assert_eq!(of(&[object(0.04, 0.4), object(0.03, 0.8)]).chosen.setting, CPU2);
}

#[test]
fn another_library_must_beat_the_best_of_the_one_that_runs() {
    let seen = [object(0.9, 0.1)];
    let here = [row(CPU2, 10.0, &seen), row(CPU1, 8.0, &seen)];
    let with = |ms: f64| judged(&[&here, &[row(OPENVINO, ms, &seen)]]);
    let table = with(7.7);
    assert_eq!((table.chosen.setting, table.gain), (CPU1, 1.25), "4 % are no reason to move");
    let table = with(5.0);
    assert_eq!((table.chosen.setting, table.here.setting, table.gain), (OPENVINO, CPU1, 2.0));
    assert_eq!(table.chosen.version(), "1.24.1");

    let failed = Row { error: Some("no such device".into()), ..row(OPENVINO, 1.0, &seen) };
    let untimed = Row { wall_ms: vec![], cpu_ms: vec![], ..row(CPU1, 1.0, &seen) };
    let table = judged(&[&[here[0].clone(), failed.clone(), untimed]]);
    assert_eq!(table.chosen.setting, CPU2);
    let out: Vec<_> = table.candidates.iter().map(|c| c.out.as_deref().unwrap_or("")).collect();
    assert_eq!(out, ["", "no such device", "there was no time left for it"]);
    let library = PathBuf::from("/a/libonnxruntime.so");
    let error = tune::judge(&[(library, vec![failed])], 0.25).unwrap_err();
    assert_eq!(error, "the reference (openvino, 2 threads) could not be measured: no such device");
}

/// An order for the good detector of a site, on its own pictures.
fn order(site: &Site, model: &Path, library: &Path) -> Order {
    let (inference, models) = (Inference::default(), Models::default());
    Order {
        model: Subject::file(model),
        engine: Engine::of(&inference, &models),
        libraries: Libraries::of(Some(library), library),
        pictures: gates::pictures(site.dir.path(), 8),
    }
}

fn limits(program: &Path) -> Limits {
    // A child is nice: beside other tests it gets a small share of the machine.
    let wall = Duration::from_secs(300);
    Limits { program: program.to_owned(), wall, ..Limits::default() }
}

fn program() -> PathBuf {
    env!("CARGO_BIN_EXE_noblink").into()
}

#[test]
fn what_the_box_has_is_measured_in_a_child() {
    let site = Site::new();
    let plain = Runtime::load(None).expect("the library");
    let libraries: Vec<_> = [plain.library().to_owned()].into_iter().chain(openvino()).collect();
    for library in libraries {
        let order = order(&site, &site.active, &library);
        assert_eq!(order.pictures.len(), 8);
        let table = tune::run(&order, &limits(&program()), &AtomicBool::new(false)).unwrap();
        let reference = &table.candidates[0];
        assert_eq!((reference.pick.setting, reference.agreement), (CPU2, Some(1.0)));
        let mut settings: Vec<_> = table.candidates.iter().map(|c| c.pick.setting).collect();
        settings.retain(|s| !s.spinning && !s.bf16);
        let has_openvino = library.to_string_lossy().contains("openvino");
        let one = Setting { threads: 1, ..OPENVINO };
        let all = if has_openvino { vec![CPU2, OPENVINO, one, CPU1] } else { vec![CPU2, CPU1] };
        assert_eq!(settings, all);
        for candidate in &table.candidates {
            assert_eq!(candidate.out, None, "{candidate:?}");
            assert!(candidate.agreement.unwrap() >= 0.95, "{candidate:?}");
            assert!(candidate.wall_ms.unwrap() > 0.0 && candidate.cpu_ms.unwrap() > 0.0);
            assert_eq!(candidate.pick.library, library);
        }
    }
}

/// A child that hangs is ended in time; what it leaves is an error in words.
#[test]
fn a_child_that_dies_or_hangs_is_no_result() {
    let site = Site::new();
    let library = Runtime::load(None).expect("the library").library().to_owned();
    let mut detector = good();
    detector.fault = Fault::Hang;
    let hangs = detector.write(site.dir.path(), "hangs.onnx");
    let began = Instant::now();
    let limited = Limits { wall: Duration::from_secs(10), ..limits(&program()) };
    let ended = tune::run(&order(&site, &hangs, &library), &limited, &AtomicBool::new(false));
    let Err(Stopped::Failed(why)) = ended else { panic!("{ended:?}") };
    assert!(why.contains("was not done after"), "{why}");
    assert!(began.elapsed() < Duration::from_secs(60), "{:?}", began.elapsed());

    let sound = order(&site, &site.active, &library);
    let ended = tune::run(&sound, &limits(Path::new("/bin/false")), &AtomicBool::new(false));
    let Err(Stopped::Failed(why)) = ended else { panic!("{ended:?}") };
    assert!(why.starts_with("the child ended (exit status: 1)"), "{why}");
    let cancelled = tune::run(&sound, &limits(&program()), &AtomicBool::new(true));
    assert_eq!(cancelled, Err(Stopped::Canceled));
}

/// A setting that crashes is left out, and the others are measured without it.
#[test]
fn a_setting_that_ends_the_child_is_left_out() {
    let site = Site::new();
    let library = Runtime::load(None).expect("the library").library().to_owned();
    // Lives until it is about to try one thread, unless that is left out already.
    let script = format!(
        "#!/bin/sh\nticket=$(cat)\ncase \"$ticket\" in *'\"left_out\":[]'*) \
         echo '{{\"trying\":{{\"provider\":\"cpu\",\"threads\":1}}}}'; kill -SEGV $$ ;; esac\n\
         # The parent is asked about: it must stay the same.\n\
         printf %s \"$ticket\" > ticket.json\nexec {} prove < ticket.json\n",
        program().display()
    );
    let ticket = site.dir.path().join("t").display().to_string();
    let impostor = site.impostor(&script.replace("ticket.json", &ticket));
    let sound = order(&site, &site.active, &library);
    let table = tune::run(&sound, &limits(&impostor), &AtomicBool::new(false)).unwrap();
    let one = table.candidates.iter().find(|c| c.pick.setting == CPU1).expect("it is told");
    assert_eq!(one.out.as_deref(), Some("crashed ONNX Runtime (SIGSEGV)"));
    assert_eq!(table.candidates[0].out, None);
    assert_ne!(table.chosen.setting, CPU1);
}

/// Times of two libraries, measured one after the other, are not held against each other: their best
/// take turns.
#[test]
fn the_best_of_two_libraries_meet_in_a_duel() {
    let site = Site::new();
    let plain = Runtime::load(None).expect("the library").library().to_owned();
    let copy = site.dir.path().join(plain.file_name().unwrap());
    std::os::unix::fs::symlink(&plain, &copy).unwrap();
    let tickets = site.dir.path().join("tickets");
    std::fs::create_dir(&tickets).unwrap();
    let script = format!(
        "#!/bin/sh\ncat > {0}/$$\nexec {1} prove < {0}/$$\n",
        tickets.display(),
        program().display()
    );
    let scribe = site.impostor(&script);
    // Beside the one that runs, what is installed: the first of that is the other.
    let mut both = order(&site, &site.active, &copy);
    both.libraries = Libraries::of(None, &copy);
    let table = tune::run(&both, &limits(&scribe), &AtomicBool::new(false)).unwrap();
    let asks = std::fs::read_dir(&tickets).unwrap().map(|ticket| {
        let ticket = std::fs::read(ticket.unwrap().path()).unwrap();
        serde_json::from_slice::<Value>(&ticket).unwrap()["task"]["tune"].clone()
    });
    let (all, duel): (Vec<_>, Vec<_>) = asks.partition(|ask| ask["duel"].is_null());
    let of = |asks: &[Value]| {
        let mut libraries: Vec<_> =
            asks.iter().map(|ask| PathBuf::from(ask["library"].as_str().unwrap())).collect();
        libraries.sort_by_key(|library| *library == plain);
        libraries
    };
    assert_eq!((of(&all), of(&duel)), (vec![copy.clone(), plain.clone()], vec![copy, plain]));
    assert!(table.is_complete());
    for candidate in &table.candidates {
        assert_eq!(candidate.out, None, "{candidate:?}");
        assert!(candidate.wall_ms.unwrap() > 0.0, "{candidate:?}");
    }
}

/// Stops the service in good order: every frame of this life was inferred, and told once, or was
/// dropped for being too many on a machine that others use; none failed.
fn stop(line: &mut Line) {
    let (boot, ledger) = line.last_word(20);
    let records = || {
        let all = line.messages("/detections").into_iter();
        all.filter(|record| record["boot"] == boot).collect::<Vec<_>>()
    };
    until("all records", 20, || ledger["inferred"] == records().len());
    let mut next = (0, 0);
    for record in records() {
        let n = |v: &Value| v.as_u64().unwrap();
        let (since, frame) = (&record["since"], n(&record["frame"]["id"]));
        assert_eq!((n(&record["seq"]), frame), (next.0, next.1 + n(&since["dropped"])), "{record}");
        assert_eq!((n(&since["failed"]), n(&since["empty"])), (0, 0), "{record}");
        next = (next.0 + 1, frame + 1);
    }
}

const AUTO: &str = "[inference]\nprovider = \"auto\"";

/// The demo's line in a service.
fn line(env: &[(&str, &str)], inference: &str, models: &str) -> (Line, RtspServer) {
    let server = RtspServer::start(&rtsp::Settings::default()).unwrap();
    server.mount_clip("/a", &shipped("models/clips/line-a.mp4"), true).unwrap();
    let (url, factory) = (server.url("/a"), shipped("models/plates-v1.onnx"));
    let broker = Mosquitto::start("");
    let (port, more) = (broker.port, format!("{models}\n{inference}"));
    (Line::through(broker, port, env, &url, "max_fps = 5", &factory, &more), server)
}

fn status(line: &Line) -> Value {
    line.messages("/status").into_iter().rfind(|s| s["schema"] == "noblink.status/1").unwrap()
}

/// Waits until the active model's tuning has come to one of these states; returns its status.
fn until_tuned(line: &Line, states: &[&str]) -> Value {
    let mut model = Value::Null;
    until(&format!("tuning to be one of {states:?}"), 500, || {
        model = status(line)["model"].clone();
        states.iter().any(|state| model["tuning"]["state"] == *state)
    });
    model
}

fn setting(model: &Value) -> (String, u64) {
    (model["provider"].as_str().unwrap().to_owned(), model["threads"].as_u64().unwrap())
}

/// Measured, moved over to between two frames of the same epoch, kept, and used by the next start
/// without measuring again.
#[test]
fn the_move_loses_no_frame_and_the_next_start_knows() {
    let env = WHATEVER;
    let library = Runtime::load(None).expect("the library").library().to_owned();
    let inference = format!("{AUTO}\nlibrary = \"{}\"", library.display());
    let (mut line, _server) = line(&env, &inference, "");
    let first = status(&line)["model"].clone();
    assert_eq!(setting(&first), ("cpu".into(), 2), "the first frames are the reference's");
    assert_eq!(first["tuning"]["state"], "pending");
    let tuned = until_tuned(&line, &["chosen"]);
    let log = line.service.log();
    assert_ne!(setting(&tuned), setting(&first), "{log}");
    assert!(log.contains("moving from cpu, 2 threads to "), "{log}");
    assert!(log.contains(" has proved itself"), "{log}");
    assert!(tuned["tuning"]["gain"].as_f64().is_some(), "{tuned}");
    assert_eq!((&tuned["epoch"], &tuned["sha256"]), (&first["epoch"], &first["sha256"]));
    stop(&mut line);
    assert!(line.messages("/models/swaps").is_empty(), "the model was not swapped");
    let schema = validator("status");
    for message in line.subscriber.messages().iter().filter(|m| m.topic == "noblink/v1/test/status")
    {
        assert_valid(&schema, message);
    }

    // A busy machine needs more than one.
    let tries = line.service.log().matches("measuring how").count();
    next_life(&mut line, &[]);
    assert_eq!(setting(&status(&line)["model"]), setting(&tuned), "{}", line.service.log());
    until_tuned(&line, &["chosen"]);
    stop(&mut line);
    assert_eq!(line.service.log().matches("measuring how").count(), tries, "it is known");
}

/// A row as the registry has it after a measuring of these libraries, the one that runs first.
fn remember(line: &Line, measured: Vec<(PathBuf, Vec<Row>)>, named: Option<&Path>, state: State) {
    let model = Digest::of(&std::fs::read(shipped("models/plates-v1.onnx")).unwrap());
    let place = Libraries::of(named, &measured[0].0).place(2);
    let table = tune::judge(&measured, 0.25).unwrap();
    let (mut registry, _) = Registry::open(&line.service.state_dir()).unwrap();
    registry.put_tuning(&Tuning { model, place, at: 1, state, table }).unwrap();
}

/// Starts the service once more, and waits for its status and a record.
fn next_life(line: &mut Line, env: &[(&str, &str)]) -> String {
    line.service.again(env);
    let boot = line.service.boot();
    until("the next life's status", 60, || {
        let status = status(line);
        status["boot"] == boot.as_str() && status["model"].is_object()
    });
    line.until_record("a record of the next life", 60, |r| r["boot"] == boot.as_str());
    boot
}

/// In a service that runs on this library, with this remembered: it starts, and this becomes of it.
fn remembered(
    library: &Path,
    setting: Setting,
    state: State,
    env: &[(&str, &str)],
) -> (Line, RtspServer) {
    let inference = format!("{AUTO}\nlibrary = \"{}\"", library.display());
    let (mut line, server) = line(&[], &inference, "");
    stop(&mut line);
    let seen = [object(0.9, 0.1)];
    let rows = vec![row(CPU2, 10.0, &seen), row(setting, 5.0, &seen)];
    remember(&line, vec![(library.to_owned(), rows)], Some(library), state);
    next_life(&mut line, env);
    (line, server)
}

#[test]
fn a_run_that_fails_brings_the_reference_back_for_good() {
    let library = Runtime::load(None).expect("the library").library().to_owned();
    let env = [("NOBLINK_FAILPOINT", "tune.trial")];
    let (mut line, _server) = remembered(&library, CPU1, State::Measured, &env);
    let model = until_tuned(&line, &["failed"]);
    assert_eq!(setting(&model), ("cpu".into(), 2));
    assert!(model["tuning"]["text"].as_str().unwrap().contains("the failpoint wants it so"));
    stop(&mut line);
    next_life(&mut line, &[]);
    let model = until_tuned(&line, &["failed"]);
    assert_eq!(setting(&model), ("cpu".into(), 2), "it is not tried again");
    stop(&mut line);
}

/// The service died with the new setting: the next start is the reference's.
#[test]
fn a_try_that_the_service_did_not_outlive_is_not_made_again() {
    let library = Runtime::load(None).expect("the library").library().to_owned();
    let (mut line, _server) = remembered(&library, CPU1, State::Trying, &[]);
    let model = until_tuned(&line, &["failed"]);
    assert_eq!(setting(&model), ("cpu".into(), 2));
    let text = model["tuning"]["text"].as_str().unwrap();
    assert!(text.contains("the service ended while it ran for the first time"), "{text}");
    stop(&mut line);
}

/// The real thing: from the CPU provider to OpenVINO, live.
#[test]
fn a_service_moves_to_openvino_and_sees_the_same() {
    let Some(library) = openvino() else { return };
    let (mut line, _server) = remembered(&library, OPENVINO, State::Measured, &WHATEVER);
    assert_eq!(setting(&status(&line)["model"]), ("cpu".into(), 2));
    let model = until_tuned(&line, &["chosen"]);
    assert_eq!(setting(&model), ("openvino".into(), 2));
    line.until_record("objects", 20, |r| !r["objects"].as_array().unwrap().is_empty());
    stop(&mut line);
    // The next life begins with it.
    let boot = next_life(&mut line, &[]);
    line.until_record("objects", 30, |r| {
        r["boot"] == boot.as_str() && !r["objects"].as_array().unwrap().is_empty()
    });
    until("its status", 10, || setting(&status(&line)["model"]) == ("openvino".into(), 2));
    assert!(!line.service.log().contains("measuring how"), "{}", line.service.log());
    stop(&mut line);
}

/// What is faster in another library waits for the next start, which loads that one.
#[test]
fn another_library_is_loaded_by_the_next_start() {
    let Some(openvino) = openvino() else { return };
    let all = installed(None);
    let first = library_for(&Inference::default()).unwrap_or(all[0].clone());
    let other = all.into_iter().find(|library| *library != first).unwrap();
    let faster = if other == openvino { OPENVINO } else { CPU1 };
    let (mut line, _server) = line(&[], AUTO, "");
    let runtime = |line: &Line| status(line)["model"]["runtime"].as_str().unwrap().to_owned();
    assert_eq!(runtime(&line), version_of(&first));
    stop(&mut line);
    let seen = [object(0.9, 0.1)];
    let measured = vec![
        (first, vec![row(CPU2, 10.0, &seen)]),
        (other.clone(), vec![row(CPU2, 10.0, &seen), row(faster, 5.0, &seen)]),
    ];
    remember(&line, measured, None, State::Proven);
    for life in 1..=2 {
        next_life(&mut line, &WHATEVER);
        assert_eq!(runtime(&line), version_of(&other), "life {life}");
        // It has not run yet: the first time with the reference beside it, then at once.
        if life == 2 {
            assert_eq!(status(&line)["model"]["provider"], faster.provider.name());
        }
        let model = until_tuned(&line, &["chosen"]);
        assert_eq!(setting(&model), (faster.provider.name().into(), faster.threads as u64));
        stop(&mut line);
    }
    assert!(!line.service.log().contains("measuring how"), "{}", line.service.log());
}

/// Children of a process.
fn children(pid: u32) -> Vec<i32> {
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let lists = tasks.filter_map(|t| std::fs::read_to_string(t.path().join("children")).ok());
    lists
        .flat_map(|l| l.split_whitespace().map(|n| n.parse().unwrap()).collect::<Vec<_>>())
        .collect()
}

#[test]
fn a_child_that_is_killed_leaves_the_service_as_it_is() {
    let (mut line, _server) = line(&[], AUTO, "");
    let pid = line.service.pid();
    until("the children to be given up", 300, || {
        for child in children(pid) {
            let _ = kill(Pid::from_raw(child), Signal::SIGKILL);
        }
        status(&line)["model"]["tuning"]["state"] == "failed"
    });
    let model = status(&line)["model"].clone();
    assert_eq!(setting(&model), ("cpu".into(), 2));
    assert!(model["tuning"]["text"].as_str().unwrap().contains("SIGKILL"), "{model}");
    stop(&mut line);
}

/// A job does not wait for a measuring; the model that it brought is measured afterwards.
#[test]
fn an_update_goes_first() {
    let (mut line, _server) = line(&[], AUTO, "probation_s = 1");
    until_tuned(&line, &["measuring"]);
    line.put_in("plates-v2.onnx", &std::fs::read(shipped("models/plates-v2.onnx")).unwrap());
    let job = line.ended(&line.job_of("plates-v2.onnx"));
    assert_eq!(job["state"], "SUCCEEDED", "{job}\n{}", line.service.log());
    let mut model = Value::Null;
    until("the new model to be measured", 500, || {
        model = status(&line)["model"].clone();
        let state = model["tuning"]["state"].as_str().unwrap();
        model["version"] == "2" && ["chosen", "reference", "next_start"].contains(&state)
    });
    stop(&mut line);
    line.assert_described();
}

#[test]
fn the_command_prints_a_table_and_keeps_the_result() {
    let dir = tempfile::tempdir().unwrap();
    let config = dir.path().join("noblink.toml");
    let factory = shipped("models/plates-v1.onnx");
    let text = format!(
        "[device]\nid = \"test\"\nstate_dir = \"state\"\n[mqtt]\nembedded = true\n\
         [models]\nfactory = \"{}\"\n",
        factory.display()
    );
    std::fs::write(&config, text).unwrap();
    let config = config.to_str().unwrap();
    let output = noblink_output(&["tune", "--json", "--seconds", "300", "--config", config]);
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{said}{}", String::from_utf8_lossy(&output.stderr));
    let report: Value = serde_json::from_str(&said).unwrap();
    assert_eq!((&report["id"], &report["kept"]), (&Value::Null, &Value::Bool(true)), "{report}");
    assert_eq!(report["model"]["id"], "plates");
    let candidates = report["candidates"].as_array().unwrap();
    assert_eq!(candidates[0]["agreement"], 1.0);
    for candidate in candidates {
        assert_eq!(candidate["out"], Value::Null, "{candidate}");
        assert!(candidate["frames_per_s"].as_f64().unwrap() > 0.0, "{candidate}");
    }
    let has = |provider: &str| candidates.iter().any(|c| c["setting"]["provider"] == provider);
    assert!(has("cpu"));
    assert_eq!(has("openvino"), openvino().is_some());
    let chosen = &report["chosen"];
    assert!(candidates.iter().any(|c| c["setting"] == chosen["setting"]), "{report}");
    let (registry, _) = Registry::open(&dir.path().join("state")).unwrap();
    let model = Digest::of(&std::fs::read(&factory).unwrap());
    let kept = registry.tuning(&model, report["place"].as_str().unwrap()).expect("it is kept");
    assert_eq!(kept.state, State::Measured);

    let output =
        noblink_output(&["tune", "--seconds", "300", "--model", factory.to_str().unwrap()]);
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{said}");
    assert!(said.contains("cpu, 2 threads"), "{said}");
    assert!(said.contains("not kept: no configuration is named (--config)"), "{said}");
}
