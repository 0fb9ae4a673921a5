//! Records on disk: what outlives an outage, a stop and a kill, and what a bad disk does not stop.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use noblink::mqtt::outbox::{Bounds, Cargo, Gap, Outbox, Reason, Record, Stats};
use noblink::mqtt::spooler::{Durability, Settings, Spooler};
use rusqlite::Connection;

use crate::harness::link::{BOOT, ROOMY, Running, plain, spooler};
use crate::harness::mosquitto::{Mosquitto, Subscriber};
use crate::harness::outage::outages;
use crate::harness::schema::{assert_valid, validator};
use crate::harness::service::{Service, config, plates};
use crate::harness::{free_port, until};

fn push(outbox: &Outbox, boot: &str, camera: &str, seq: u64, bytes: usize) {
    let topic = format!("noblink/v1/edge-1/cameras/{camera}/detections").into();
    let mut payload = format!("{boot} {seq} ").into_bytes();
    payload.resize(payload.len().max(bytes), b'.');
    outbox.push(Record { camera: camera.into(), boot: boot.into(), seq, topic, payload });
}

fn start(dir: &Path) -> (Arc<Outbox>, Spooler) {
    let outbox = Arc::new(Outbox::new(ROOMY));
    let spooler = spooler(&outbox, dir);
    (outbox, spooler)
}

/// By camera and life.
type Seqs = BTreeMap<(String, String), Vec<u64>>;

/// Takes and acknowledges until nothing is left: the `seq` of each camera and life, in order, and
/// the gaps.
fn drain(outbox: &Outbox, seconds: u64) -> (Seqs, Vec<Gap>) {
    let (mut seqs, mut gaps) = (Seqs::new(), Vec::new());
    until("everything is taken", seconds, || {
        while let Some(loan) = outbox.take() {
            match loan.cargo {
                Cargo::Gap(gap) => gaps.push(gap),
                Cargo::Record(r) => {
                    let key = (r.camera.to_string(), r.boot.to_string());
                    let begin = format!("{} {} ", r.boot, r.seq);
                    assert!(r.payload.starts_with(begin.as_bytes()), "another record's payload");
                    seqs.entry(key).or_insert_with(Vec::new).push(r.seq);
                }
            }
            outbox.acked(loan.ticket);
        }
        outbox.is_empty()
    });
    (seqs, gaps)
}

fn exact(outbox: &Outbox) -> Stats {
    let stats = outbox.stats();
    assert!(stats.is_exact(), "{stats:?}");
    stats
}

/// Waits until no more than so many are in memory alone: no camera is as fast as these tests.
fn pace(outbox: &Outbox, records: u64) {
    until("the disk keeps up", 10, || {
        let stats = exact(outbox);
        stats.queued + stats.in_flight - stats.spooled <= records
    });
}

/// Rows of the file, when no spooler has it.
fn rows(dir: &Path) -> i64 {
    let db = Connection::open(dir.join("outbox.db")).unwrap();
    db.query_row("SELECT count(*) FROM records", [], |r| r.get(0)).unwrap()
}

/// The short form of `make soak`.
#[test]
fn a_broker_that_is_killed_loses_nothing_that_it_did_not_acknowledge() {
    outages(&[1, 4], false, 3);
}

#[test]
fn what_was_not_delivered_is_delivered_by_the_next_life_under_its_old_name() {
    let dir = tempfile::tempdir().unwrap();
    let (outbox, spooler) = start(dir.path());
    for seq in 0..200 {
        ["a", "b", "c"].iter().for_each(|camera| push(&outbox, "one", camera, seq, 0));
    }
    let unnumbered = |topic: &str| Record {
        camera: "".into(),
        boot: "".into(),
        seq: 0,
        topic: topic.into(),
        payload: b" 0 {}".to_vec(),
    };
    outbox.push(unnumbered("models/jobs/x"));
    outbox.push(unnumbered("models/swaps"));
    spooler.stop();
    exact(&outbox);

    let (outbox, spooler) = start(dir.path());
    until("they are found", 5, || outbox.stats().restored == 602);
    (0..50).for_each(|seq| push(&outbox, "two", "a", seq, 0));
    let (seqs, gaps) = drain(&outbox, 15);
    assert!(gaps.is_empty());
    for camera in ["a", "b", "c"] {
        let key = (camera.to_owned(), "one".to_owned());
        assert_eq!(seqs[&key], (0..200).collect::<Vec<_>>(), "camera {camera}");
    }
    assert_eq!(seqs[&("a".into(), "two".into())], (0..50).collect::<Vec<_>>());
    assert_eq!(seqs[&(String::new(), String::new())].len(), 2);
    let stats = exact(&outbox);
    assert_eq!((stats.restored, stats.pushed, stats.acked), (602, 50, 652));
    spooler.stop();
    assert_eq!(rows(dir.path()), 0, "what was acknowledged is erased");
}

/// Whatever is taken, acknowledged, given back and forgotten, over several lives: nothing is lost,
/// and a camera's records come in order.
#[test]
fn chance_loses_nothing_over_five_lives() {
    let dir = tempfile::tempdir().unwrap();
    let mut dice = 0x5eed_u64;
    let mut roll = move |sides: u64| {
        // Xorshift: the same on each run.
        dice ^= dice << 13;
        dice ^= dice >> 7;
        dice ^= dice << 17;
        dice % sides
    };
    let (mut pushed, mut acked) = (BTreeMap::<String, u64>::new(), BTreeMap::new());
    for life in 0..5 {
        // So small that it is crowded nearly always, and big enough for what may be out.
        let bounds = Bounds { records: 400, bytes: 1 << 20 };
        let outbox = Arc::new(Outbox::new(bounds));
        let spooler = spooler(&outbox, dir.path());
        // What was there before is taken over while nothing is out.
        until("the file was read", 5, || {
            let stats = outbox.stats();
            if life == 0 { stats.spool_bytes > 0 } else { stats.restored > 0 }
        });
        let mut out = Vec::new();
        for _ in 0..40 {
            for _ in 0..roll(40) {
                let camera = ["a", "b", "c"][roll(3) as usize];
                let next = pushed.entry(format!("{camera} {life}")).or_default();
                push(&outbox, &life.to_string(), camera, *next, roll(300) as usize);
                *next += 1;
            }
            match roll(10) {
                0 => {
                    outbox.rewind();
                    out.clear();
                }
                1 if !out.is_empty() => {
                    let (ticket, _): (i64, Cargo) =
                        out.swap_remove(roll(out.len() as u64) as usize);
                    outbox.give_back(ticket);
                }
                2..=6 => {
                    let loans = (0..roll(30)).map_while(|_| outbox.take());
                    out.extend(loans.map(|loan| (loan.ticket, loan.cargo)));
                }
                _ => {
                    for (ticket, cargo) in out.drain(..) {
                        outbox.acked(ticket);
                        if let Cargo::Record(r) = cargo {
                            acked
                                .entry(format!("{} {}", r.camera, r.boot))
                                .or_insert_with(Vec::new)
                                .push(r.seq);
                        }
                    }
                }
            }
            pace(&outbox, 250);
            std::thread::sleep(Duration::from_millis(roll(30)));
        }
        outbox.rewind();
        spooler.stop();
        assert_eq!(exact(&outbox).dropped, 0, "the disk is roomy");
    }
    let (outbox, _spooler) = start(dir.path());
    until("they are found", 5, || outbox.stats().restored > 0);
    let (rest, gaps) = drain(&outbox, 20);
    assert!(gaps.is_empty(), "{gaps:?}");
    for ((camera, boot), seqs) in rest {
        assert!(seqs.is_sorted(), "camera {camera} of life {boot}: {seqs:?}");
        acked.entry(format!("{camera} {boot}")).or_default().extend(seqs);
    }
    for (name, count) in pushed {
        let seqs = acked.get_mut(&name).unwrap_or_else(|| panic!("nothing of {name}"));
        seqs.sort_unstable();
        seqs.dedup();
        assert_eq!(*seqs, (0..count).collect::<Vec<_>>(), "{name}");
    }
}

/// And the link's order: 30 s of records of a former life, live ones behind them.
#[test]
fn a_backlog_is_drained_in_order_while_live_records_go_on() {
    let dir = tempfile::tempdir().unwrap();
    let port = free_port();
    let mut link = Running::spooled(plain(port), ROOMY, dir.path());
    for seq in 0..1800 {
        link.push("gate", seq, &link.topics.detections("gate"), &seq.to_string());
    }
    link.stop();
    drop(link);
    assert_eq!(rows(dir.path()), 1800);

    let broker = Mosquitto::start("");
    let seen = Subscriber::new("5", broker.port, "noblink/#");
    let link = Running::spooled(plain(broker.port), ROOMY, dir.path());
    until("they are found", 5, || link.outbox.stats().restored == 1800);
    let mut live = 1800;
    until("the backlog and the live ones have arrived", 30, || {
        if live < 2000 {
            link.push("gate", live, &link.topics.detections("gate"), &live.to_string());
            live += 1;
        }
        live == 2000 && link.outbox.is_empty()
    });
    let detections = link.topics.detections("gate");
    let seqs = || -> Vec<u64> {
        let messages = seen.messages().into_iter().filter(|m| m.topic == *detections);
        messages.map(|m| m.payload.parse().unwrap()).collect()
    };
    until("all arrived", 10, || seqs().len() >= 2000);
    assert_eq!(seqs(), (0..2000).collect::<Vec<_>>());
    exact(&link.outbox);
}

#[test]
fn nothing_is_written_while_the_broker_takes_what_comes() {
    let dir = tempfile::tempdir().unwrap();
    let broker = Mosquitto::start("");
    let link = Running::spooled(plain(broker.port), ROOMY, dir.path());
    link.connected();
    until("the file is there", 5, || link.outbox.stats().spool_bytes > 0);
    let sizes = || {
        ["outbox.db", "outbox.db-wal"].map(|f| {
            let meta = std::fs::metadata(dir.path().join(f)).unwrap();
            (meta.len(), meta.modified().unwrap())
        })
    };
    let before = sizes();
    for seq in 0..300 {
        link.push("gate", seq, &link.topics.detections("gate"), "x");
        std::thread::sleep(Duration::from_millis(10));
    }
    link.drained();
    assert_eq!(link.outbox.stats().acked, 300);
    assert_eq!(sizes(), before);
}

/// The oldest go, by camera and life, and each is announced.
#[test]
fn a_full_spool_gives_up_the_oldest_and_says_which() {
    let dir = tempfile::tempdir().unwrap();
    let settings = Settings {
        dir: dir.path().to_owned(),
        max_bytes: 16_000_000,
        durability: Durability::Memory,
    };
    // 15 MB in two lives, where half of 16 MB is for rows.
    let bounds = Bounds { records: 2000, bytes: 4 << 20 };
    let mut pushed = 0;
    for life in ["one", "two"] {
        let outbox = Arc::new(Outbox::new(bounds));
        let spooler = Spooler::start(Arc::clone(&outbox), settings.clone()).unwrap();
        until("the file was read", 5, || life == "one" || outbox.stats().restored > 0);
        for seq in 0..7500 {
            push(&outbox, life, "gate", seq, 1000);
            pushed += 1;
            match seq {
                ..6000 if seq % 100 == 0 => pace(&outbox, 1200),
                6000 => pace(&outbox, 400),
                // The last turn has more than one batch to write, and gives up older ones for each.
                _ => {}
            }
        }
        spooler.stop();
        let size = |f: &str| std::fs::metadata(dir.path().join(f)).map_or(0, |m| m.len());
        let size = size("outbox.db") + size("outbox.db-wal");
        assert!(size <= settings.max_bytes, "{size} bytes");
    }
    let outbox = Arc::new(Outbox::new(ROOMY));
    let _spooler = Spooler::start(Arc::clone(&outbox), settings).unwrap();
    until("the file was read", 5, || outbox.stats().restored > 0);
    let (seqs, gaps) = drain(&outbox, 40);
    let lost: u64 = gaps.iter().map(|g| g.count).sum();
    let kept: usize = seqs.values().map(Vec::len).sum();
    assert!(kept > 5000, "{kept} kept of {pushed}");
    assert_eq!(kept as u64 + lost, pushed);
    // The oldest: all of the first life's losses come before what was kept of it, and so on.
    for boot in ["one", "two"] {
        let kept = seqs.get(&("gate".into(), boot.into())).cloned().unwrap_or_default();
        let of_boot = gaps.iter().filter(|g| *g.boot == *boot);
        let mut lost: Vec<u64> = of_boot.flat_map(|g| g.seq_from..=g.seq_to).collect();
        lost.sort_unstable();
        assert!(lost.last() < kept.first().or(Some(&7500)), "{boot}: kept {:?}", kept.first());
        lost.extend(kept);
        assert_eq!(lost, (0..7500).collect::<Vec<_>>(), "{boot}");
    }
    assert!(gaps.iter().all(|g| g.reason == Reason::OutboxFull), "{gaps:?}");
    exact(&outbox);
    // What is delivered takes no room.
    let size = || std::fs::metadata(dir.path().join("outbox.db")).unwrap().len();
    until("the file is small", 10, || size() < 2_000_000);
}

#[test]
fn a_damaged_file_at_the_start_is_moved_aside_and_a_new_one_begun() {
    let garbage: Vec<u8> = (0..100_000_u32).map(|n| (n * 7) as u8).collect();
    let other = tempfile::tempdir().unwrap();
    let foreign = other.path().join("foreign.db");
    Connection::open(&foreign)
        .unwrap()
        .execute_batch("CREATE TABLE records (x); PRAGMA user_version = 1;")
        .unwrap();
    for (what, bytes) in [
        ("garbage", garbage),
        ("another program's", std::fs::read(&foreign).unwrap()),
        ("cut off", vec![0x53; 10]),
    ] {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("outbox.db"), bytes).unwrap();
        let (outbox, spooler) = start(dir.path());
        until("a new file", 5, || outbox.stats().spool_bytes > 0);
        let aside = std::fs::read_dir(dir.path())
            .unwrap()
            .flatten()
            .filter(|e| e.file_name().to_string_lossy().starts_with("outbox.db.corrupt-"));
        assert_eq!(aside.count(), 1, "{what}");
        (0..100).for_each(|seq| push(&outbox, "one", "gate", seq, 0));
        spooler.stop();
        assert_eq!(rows(dir.path()), 100, "{what}");
    }
}

/// A disk that loses its mind under a running service: what was on it is announced, the rest flows.
#[test]
fn a_file_that_is_damaged_while_it_is_used_is_replaced_and_its_records_announced() {
    let dir = tempfile::tempdir().unwrap();
    let bounds = Bounds { records: 20_000, bytes: 1 << 20 };
    let outbox = Arc::new(Outbox::new(bounds));
    let spooler = spooler(&outbox, dir.path());
    for seq in 0..10_000 {
        push(&outbox, "one", "gate", seq, 1000);
        if seq % 100 == 0 {
            pace(&outbox, 600);
        }
    }
    pace(&outbox, 600);
    // All but the first page of database and journal, beyond what SQLite holds of it.
    use std::os::unix::fs::FileExt;
    for file in ["outbox.db", "outbox.db-wal"] {
        let file = std::fs::OpenOptions::new().write(true).open(dir.path().join(file)).unwrap();
        let pages = file.metadata().unwrap().len() / 4096;
        (1..pages).for_each(|n| file.write_all_at(&[0xa5; 4096], n * 4096).unwrap());
    }
    let (seqs, gaps) = drain(&outbox, 30);
    let kept = &seqs[&("gate".into(), "one".into())];
    let lost: u64 = gaps.iter().map(|g| g.count).sum();
    assert!(kept.is_sorted());
    assert!(gaps.iter().any(|g| g.reason == Reason::DiskFailed), "{gaps:?}");
    assert_eq!(kept.len() as u64 + lost, 10_000);
    let stats = exact(&outbox);
    assert_eq!(stats.dropped, lost);
    // And the new file works.
    (0..100).for_each(|seq| push(&outbox, "two", "gate", seq, 0));
    spooler.stop();
    assert_eq!(rows(dir.path()), 100);
}

#[test]
fn a_file_that_another_process_holds_is_named_and_tried_again() {
    let dir = tempfile::tempdir().unwrap();
    let other = Connection::open(dir.path().join("outbox.db")).unwrap();
    other
        .execute_batch("PRAGMA locking_mode=EXCLUSIVE; BEGIN EXCLUSIVE; CREATE TABLE x (y)")
        .unwrap();
    let (outbox, spooler) = start(dir.path());
    (0..100).for_each(|seq| push(&outbox, "one", "gate", seq, 0));
    until("it is named", 5, || {
        exact(&outbox).disk_error.is_some_and(|e| e.contains("in use by another process"))
    });
    // Memory goes on.
    let (ticket, _) = (outbox.take().expect("the first").ticket, ());
    outbox.acked(ticket);
    drop(other);
    until("it works again", 10, || exact(&outbox).disk_error.is_none());
    spooler.stop();
    assert_eq!(rows(dir.path()), 99);
}

/// `durability = "always"`: what may be sent is on disk.
#[test]
fn always_means_on_disk_before_it_is_sent() {
    let dir = tempfile::tempdir().unwrap();
    let outbox = Arc::new(Outbox::new(ROOMY));
    let settings = Settings {
        dir: dir.path().to_owned(),
        max_bytes: 64_000_000,
        durability: Durability::Always,
    };
    let spooler = Spooler::start(Arc::clone(&outbox), settings).unwrap();
    let mut taken = 0;
    for seq in 0..300 {
        push(&outbox, "one", "gate", seq, 0);
        while let Some(loan) = outbox.take() {
            let stats = exact(&outbox);
            // Of what waits or is out, only what came since the last turn is not on disk.
            assert!(stats.spooled >= stats.in_flight, "{stats:?}");
            taken += 1;
            if taken % 2 == 0 {
                outbox.acked(loan.ticket);
            }
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    assert!(taken > 100, "{taken}");
    outbox.rewind();
    spooler.stop();
    let stats = exact(&outbox);
    assert_eq!(rows(dir.path()) as u64, stats.queued);
}

/// A service that is killed while the broker is away: the next one delivers what was on disk.
#[test]
fn a_killed_service_leaves_its_records_to_the_next() {
    let mut broker = Mosquitto::start("");
    let mqtt = format!("url = \"mqtt://127.0.0.1:{}\"", broker.port);
    let cameras = [("gate", "test://?fps=20&width=160&height=128", "publish = \"all\"")];
    broker.kill();
    let mut service = Service::start(&config(&mqtt, &cameras, &plates()));
    let file = service.dir.path().join("state/outbox.db-wal");
    service.says("streaming", 20);
    // Some batches of a second each.
    let size = || std::fs::metadata(&file).map_or(0, |m| m.len());
    let before = size();
    until("records are on disk", 20, || size() > before + 100_000);
    service.kill();
    broker.restart();
    let seen = Subscriber::new("5", broker.port, "noblink/v1/test/#");
    service.again(&[]);
    let records = || -> BTreeMap<String, Vec<u64>> {
        let mut by_boot = BTreeMap::<String, Vec<u64>>::new();
        for message in seen.messages().iter().filter(|m| m.topic.ends_with("/detections")) {
            let record: serde_json::Value = serde_json::from_str(&message.payload).unwrap();
            let boot = record["boot"].as_str().unwrap().to_owned();
            by_boot.entry(boot).or_default().push(record["seq"].as_u64().unwrap());
        }
        by_boot
    };
    until("records of both lives", 30, || {
        let records = records();
        records.len() == 2 && records.values().all(|seqs| seqs.len() >= 20)
    });
    assert_eq!(service.stop().code(), Some(0), "{}", service.log());
    for (boot, seqs) in records() {
        assert_eq!(seqs, (0..seqs.len() as u64).collect::<Vec<_>>(), "{boot}");
    }
    assert_ne!(records().keys().next().unwrap(), BOOT);
}

/// No byte more goes into its files: it goes on in memory, and says so. (A limit on file sizes,
/// since a full disk of our own needs the rights to mount one; SQLite meets both as a failed write.)
#[test]
fn a_disk_without_room_is_named_and_memory_goes_on() {
    let mut broker = Mosquitto::start("");
    let mqtt = format!("url = \"mqtt://127.0.0.1:{}\"", broker.port);
    let cameras = [("gate", "test://?fps=60&width=160&height=128", "publish = \"all\"")];
    let dir = tempfile::tempdir().unwrap();
    let model = crate::harness::onnx::Detector::new(crate::harness::onnx::Output::Yolo8, 64, 64);
    let model = model.write(dir.path(), "small.onnx");
    let models = format!("[models]\nfactory = \"{}\"\n", model.display());
    broker.kill();
    // 200 kB a file.
    let setup = "trap '' XFSZ; ulimit -f 400";
    let mut service = Service::start_after(setup, &config(&mqtt, &cameras, &models));
    service.says("outbox.db can't be", 30);
    std::thread::sleep(Duration::from_secs(3));
    broker.restart();
    let seen = Subscriber::new("5", broker.port, "noblink/v1/test/#");
    let records = || seen.messages().iter().filter(|m| m.topic.ends_with("/detections")).count();
    until("more than the file holds", 30, || records() > 400);
    assert_eq!(service.stop().code(), Some(0), "{}", service.log());
    let mut seqs: Vec<u64> = seen
        .messages()
        .iter()
        .filter(|m| m.topic.ends_with("/detections"))
        .map(|m| {
            serde_json::from_str::<serde_json::Value>(&m.payload).unwrap()["seq"].as_u64().unwrap()
        })
        .collect();
    seqs.dedup();
    assert_eq!(seqs, (0..seqs.len() as u64).collect::<Vec<_>>());
}

#[test]
fn a_file_that_can_not_be_made_is_said_once_and_in_telemetry() {
    let broker = Mosquitto::start("");
    let seen = Subscriber::new("5", broker.port, "noblink/v1/test/#");
    let mqtt = format!("url = \"mqtt://127.0.0.1:{}\"", broker.port);
    let cameras = [("gate", "test://?fps=5&width=160&height=128", "publish = \"all\"")];
    // A folder stands where the file should.
    let mut service = Service::start_after(
        "mkdir -p \"$(dirname \"$3\")/state/outbox.db\"",
        &config(&mqtt, &cameras, &plates()),
    );
    let schema = validator("telemetry");
    until("telemetry says so", 30, || {
        let messages = seen.messages();
        let telemetry = messages.iter().find(|m| m.topic.ends_with("/telemetry"));
        telemetry.is_some_and(|m| {
            let outbox = &assert_valid(&schema, m)["outbox"];
            outbox["disk_error"].as_str().is_some_and(|e| e.contains("can't be opened"))
        })
    });
    assert!(seen.messages().iter().any(|m| m.topic.ends_with("/detections")));
    assert_eq!(service.stop().code(), Some(0), "{}", service.log());
    assert_eq!(service.log().matches("records wait in memory").count(), 1, "{}", service.log());
}
