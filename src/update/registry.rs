//! `registry.db`: models, jobs, the slot, quarantine, breakers, tunings. Its transaction is the commit point.
//!
//! SQLite with `synchronous=FULL` in WAL mode: a commit is one append and one fsync (a rollback
//! journal takes three), and it is durable when it returns; in DELETE mode the removal of the
//! journal is not, so that a power cut could undo a commit. `locking_mode=EXCLUSIVE` needs no
//! shared memory file and keeps a second process out. What stands in the columns is what is
//! searched; the rest of a row is JSON, so that a newer version can add to it.

use std::fs;
use std::path::{Path, PathBuf};

use rusqlite::{Connection, ErrorCode, OpenFlags, OptionalExtension, Transaction, params};
use serde::{Deserialize, Serialize};

use super::digest::Digest;
use super::event::Change;
use super::failpoint;
use super::job::{ENDED_MAX, Ended, Job, JobState, Millis, Reason, Slot, State, Way};
use super::store::{StoreError, sync_dir};
use super::tune::Tuning;

/// `PRAGMA user_version`
const FORMAT: i64 = 1;

const TABLES: &str = "
CREATE TABLE models (
  sha256 TEXT PRIMARY KEY, added INTEGER NOT NULL, pinned INTEGER NOT NULL, doc TEXT NOT NULL);
CREATE TABLE jobs (
  serial INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, state TEXT NOT NULL, doc TEXT NOT NULL);
CREATE TABLE changes (
  serial INTEGER NOT NULL, at INTEGER NOT NULL, state TEXT NOT NULL, phase TEXT);
CREATE INDEX changes_by_job ON changes (serial);
CREATE TABLE quarantine (
  sha256 TEXT PRIMARY KEY, at INTEGER NOT NULL, doc TEXT NOT NULL);
CREATE TABLE breakers (way TEXT PRIMARY KEY, doc TEXT NOT NULL);
CREATE TABLE facts (name TEXT PRIMARY KEY, doc TEXT NOT NULL);
";

/// What was measured on this box. Made where it is missing, without another format: a version that
/// does not know it needs none, and what is lost is measured again.
const TUNINGS: &str = "
CREATE TABLE IF NOT EXISTS tunings (
  model TEXT NOT NULL, place TEXT NOT NULL, at INTEGER NOT NULL, doc TEXT NOT NULL,
  PRIMARY KEY (model, place));
";
/// Results that are kept: the newest.
const TUNINGS_MAX: usize = 200;

/// A model that the store holds, or held.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Model {
    /// Digest of its bytes.
    pub sha256: Digest,
    /// Its id.
    pub id: String,
    /// Its version.
    pub version: String,
    /// Its bytes.
    pub size: u64,
    /// When it came in.
    pub added: Millis,
    /// By which way; none = found in the store when the registry was made anew, or from the
    /// factory file.
    pub way: Option<Way>,
    /// Who sent it.
    pub from: String,
    /// The exact bytes of its manifest, as base64.
    pub manifest: Option<String>,
    /// Parent, dataset, metrics and free-form metadata, from the manifest or the file.
    pub lineage: serde_json::Value,
    /// Kept by garbage collection.
    pub pinned: bool,
}

/// One change of a job.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct JobChange {
    /// When.
    pub at: Millis,
    /// To which state.
    pub state: String,
    /// In which phase.
    pub phase: Option<String>,
}

/// The open database.
#[derive(Debug)]
pub struct Registry {
    path: PathBuf,
    db: Connection,
}

impl Registry {
    /// Opens, or makes, `registry.db` in `state_dir`.
    ///
    /// A damaged one is moved aside and a new one made: its path is returned too.
    pub fn open(state_dir: &Path) -> Result<(Self, Option<PathBuf>), StoreError> {
        let path = state_dir.join("registry.db");
        match Self::at(&path) {
            Ok(registry) => Ok((registry, None)),
            Err(e) if is_damage(&e) => {
                let aside = move_aside(&path)?;
                Self::at(&path).map(|registry| (registry, Some(aside))).map_err(failed(&path))
            }
            Err(Opening::Sqlite(e)) => Err(database(&path)(e)),
            Err(Opening::Newer(found)) => Err(StoreError::Newer { path, found, known: FORMAT }),
            Err(Opening::Content(_)) => unreachable!("content that can't be read is damage"),
        }
    }

    fn at(path: &Path) -> Result<Self, Opening> {
        let mut db = Connection::open(path)?;
        db.busy_timeout(std::time::Duration::ZERO)?;
        db.pragma_update(None, "locking_mode", "EXCLUSIVE")?;
        db.pragma_update(None, "journal_mode", "WAL")?;
        db.pragma_update(None, "synchronous", "FULL")?;
        let turn = db.transaction()?;
        match turn.pragma_query_value(None, "user_version", |r| r.get(0))? {
            0 => {
                turn.execute_batch(TABLES)?;
                turn.pragma_update(None, "user_version", FORMAT)?;
            }
            FORMAT => {}
            newer => return Err(Opening::Newer(newer)),
        }
        turn.execute_batch(TUNINGS)?;
        turn.commit()?;
        let check: String = db.pragma_query_value(None, "quick_check", |r| r.get(0))?;
        if check != "ok" {
            return Err(Opening::Content(check));
        }
        let registry = Self { path: path.to_owned(), db };
        registry.read_state()?;
        Ok(registry)
    }

    /// The machine's state as it was committed last.
    pub fn state(&self) -> Result<State, StoreError> {
        self.read_state().map_err(failed(&self.path))
    }

    fn read_state(&self) -> Result<State, Opening> {
        let mut state = State {
            slot: self.fact("slot")?.unwrap_or_default(),
            life: self.fact("life")?.unwrap_or_default(),
            highest_signed: self.fact("highest_signed")?,
            highest_unsigned: self.fact("highest_unsigned")?,
            ..State::default()
        };
        let mut rows = self.db.prepare("SELECT doc FROM jobs ORDER BY serial")?;
        for doc in rows.query_map([], |r| r.get::<_, String>(0))? {
            let job: Job = parse(&doc?)?;
            state.last_serial = job.serial;
            match job.state {
                JobState::InProgress => state.job = Some(job),
                JobState::Queued => state.waiting = Some(job),
                _ => {
                    let Job { serial, fingerprint, state: how, reason, .. } = job;
                    let ended = Ended { serial, fingerprint, state: how, reason };
                    state.ended.insert(job.id, ended);
                }
            }
        }
        let mut rows = self.db.prepare("SELECT sha256, doc FROM quarantine")?;
        let pair = |r: &rusqlite::Row<'_>| Ok((r.get::<_, String>(0)?, r.get::<_, String>(1)?));
        for row in rows.query_map([], pair)? {
            let (digest, doc) = row?;
            let digest = digest.parse().map_err(|_| Opening::Content(digest))?;
            state.quarantine.insert(digest, parse::<Reason>(&doc)?);
        }
        let mut rows = self.db.prepare("SELECT way, doc FROM breakers")?;
        for row in rows.query_map([], pair)? {
            let (way, doc) = row?;
            state.breakers.insert(parse(&way)?, parse(&doc)?);
        }
        Ok(state)
    }

    fn fact<T: for<'de> Deserialize<'de>>(&self, name: &str) -> Result<Option<T>, Opening> {
        let sql = "SELECT doc FROM facts WHERE name = ?1";
        let doc: Option<String> = self.db.query_row(sql, [name], |r| r.get(0)).optional()?;
        doc.map(|doc| parse(&doc)).transpose()
    }

    /// Writes changes down, all or none. When it returns they outlast a power cut.
    pub fn apply(&mut self, changes: &[Change]) -> Result<(), StoreError> {
        failpoint::hit("registry.before_commit");
        let write = |db: &mut Connection| {
            let turn = db.transaction()?;
            changes.iter().try_for_each(|change| write(&turn, change))?;
            turn.commit()
        };
        write(&mut self.db).map_err(database(&self.path))?;
        failpoint::hit("registry.after_commit");
        Ok(())
    }

    /// Writes a model down, or what became known of it.
    pub fn put_model(&mut self, model: &Model) -> Result<(), StoreError> {
        failpoint::hit("registry.model");
        let sql = "INSERT OR REPLACE INTO models VALUES (?1, ?2, ?3, ?4)";
        let row = params![model.sha256.to_string(), model.added, model.pinned, text(model)];
        self.db.execute(sql, row).map_err(database(&self.path))?;
        Ok(())
    }

    /// Writes down what was measured for a model.
    pub fn put_tuning(&mut self, tuning: &Tuning) -> Result<(), StoreError> {
        let put = || -> rusqlite::Result<()> {
            let sql = "INSERT OR REPLACE INTO tunings VALUES (?1, ?2, ?3, ?4)";
            let model = tuning.model.to_string();
            self.db.execute(sql, params![model, tuning.place, tuning.at, text(tuning)])?;
            let sql = "DELETE FROM tunings WHERE rowid NOT IN \
                       (SELECT rowid FROM tunings ORDER BY at DESC LIMIT ?1)";
            self.db.execute(sql, [TUNINGS_MAX as i64]).map(drop)
        };
        put().map_err(database(&self.path))
    }

    /// What was measured for a model here; one that can't be read is none.
    pub fn tuning(&self, model: &Digest, place: &str) -> Option<Tuning> {
        tuning(&self.db, model, place)
    }

    /// The active model and what was measured for it, of a registry that is not open. Nothing is
    /// made or repaired.
    pub fn peek(state_dir: &Path, place: &str) -> Option<(Digest, Option<Tuning>)> {
        let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
        let db = Connection::open_with_flags(state_dir.join("registry.db"), flags).ok()?;
        let sql = "SELECT doc FROM facts WHERE name = 'slot'";
        let slot: String = db.query_row(sql, [], |r| r.get(0)).ok()?;
        let model = serde_json::from_str::<Slot>(&slot).ok()?.active?;
        Some((model, tuning(&db, &model, place)))
    }

    /// A model by its digest.
    pub fn model(&self, digest: &Digest) -> Result<Option<Model>, StoreError> {
        let sql = "SELECT doc FROM models WHERE sha256 = ?1";
        let row = self.db.query_row(sql, [digest.to_string()], |r| r.get::<_, String>(0));
        let doc = row.optional().map_err(database(&self.path))?;
        doc.map(|doc| parse(&doc)).transpose().map_err(failed(&self.path))
    }

    /// All models, newest first; also those whose blob is gone.
    pub fn models(&self) -> Result<Vec<Model>, StoreError> {
        self.docs("SELECT doc FROM models ORDER BY added DESC, sha256", usize::MAX)
    }

    /// The last `count` jobs, newest first.
    pub fn jobs(&self, count: usize) -> Result<Vec<Job>, StoreError> {
        self.docs("SELECT doc FROM jobs ORDER BY serial DESC", count)
    }

    fn docs<T: for<'de> Deserialize<'de>>(
        &self,
        sql: &str,
        count: usize,
    ) -> Result<Vec<T>, StoreError> {
        let read = || -> Result<Vec<T>, Opening> {
            let mut rows = self.db.prepare(sql)?;
            let docs = rows.query_map([], |r| r.get::<_, String>(0))?;
            docs.take(count).map(|doc| parse(&doc?)).collect()
        };
        read().map_err(failed(&self.path))
    }

    /// Every change of a job, in order.
    pub fn changes(&self, serial: u64) -> Result<Vec<JobChange>, StoreError> {
        let read = || -> rusqlite::Result<Vec<JobChange>> {
            let sql = "SELECT at, state, phase FROM changes WHERE serial = ?1 ORDER BY rowid";
            let mut rows = self.db.prepare(sql)?;
            let change = |r: &rusqlite::Row<'_>| {
                Ok(JobChange { at: r.get(0)?, state: r.get(1)?, phase: r.get(2)? })
            };
            rows.query_map([serial as i64], change)?.collect()
        };
        read().map_err(database(&self.path))
    }
}

fn tuning(db: &Connection, model: &Digest, place: &str) -> Option<Tuning> {
    let sql = "SELECT doc FROM tunings WHERE model = ?1 AND place = ?2";
    let doc = db.query_row(sql, [&model.to_string(), place], |r| r.get::<_, String>(0)).ok()?;
    serde_json::from_str(&doc).ok()
}

fn write(turn: &Transaction<'_>, change: &Change) -> rusqlite::Result<()> {
    let fact = |name: &str, doc: String| {
        turn.execute("INSERT OR REPLACE INTO facts VALUES (?1, ?2)", [name, &doc]).map(drop)
    };
    match change {
        Change::Job(job) => {
            let serial = job.serial as i64;
            let (state, phase) = (word(&job.state), job.phase.as_ref().map(word));
            turn.execute(
                "INSERT OR REPLACE INTO jobs VALUES (?1, ?2, ?3, ?4)",
                params![serial, job.id, state, text(job)],
            )?;
            turn.execute(
                "INSERT INTO changes VALUES (?1, ?2, ?3, ?4)",
                params![serial, job.changed, state, phase],
            )?;
            let old = serial - ENDED_MAX as i64;
            let ended = "state NOT IN ('QUEUED', 'IN_PROGRESS')";
            turn.execute(&format!("DELETE FROM jobs WHERE serial <= ?1 AND {ended}"), [old])?;
            turn.execute("DELETE FROM changes WHERE serial <= ?1", [old]).map(drop)
        }
        Change::Slot(slot) => fact("slot", text(slot)),
        Change::Life(life) => fact("life", text(life)),
        Change::Sequence { signed, highest } => {
            fact(if *signed { "highest_signed" } else { "highest_unsigned" }, text(highest))
        }
        Change::Quarantine { digest, reason, now } => turn
            .execute(
                "INSERT OR REPLACE INTO quarantine VALUES (?1, ?2, ?3)",
                params![digest.to_string(), now, text(reason)],
            )
            .map(drop),
        Change::Release { digest } => {
            turn.execute("DELETE FROM quarantine WHERE sha256 = ?1", [digest.to_string()]).map(drop)
        }
        Change::Breaker { way, breaker } if *breaker == Default::default() => {
            turn.execute("DELETE FROM breakers WHERE way = ?1", [text(way)]).map(drop)
        }
        Change::Breaker { way, breaker } => turn
            .execute("INSERT OR REPLACE INTO breakers VALUES (?1, ?2)", [text(way), text(breaker)])
            .map(drop),
    }
}

fn text(value: &impl Serialize) -> String {
    serde_json::to_string(value).expect("what is kept has text keys")
}

/// A word of an enumeration, without JSON's quotes.
fn word(value: &impl Serialize) -> String {
    text(value).trim_matches('"').to_owned()
}

fn parse<T: for<'de> Deserialize<'de>>(doc: &str) -> Result<T, Opening> {
    serde_json::from_str(doc).map_err(|e| Opening::Content(e.to_string()))
}

/// Why a database can't be read.
enum Opening {
    Sqlite(rusqlite::Error),
    Newer(i64),
    Content(String),
}

impl From<rusqlite::Error> for Opening {
    fn from(e: rusqlite::Error) -> Self {
        Self::Sqlite(e)
    }
}

fn is_damage(e: &Opening) -> bool {
    match e {
        Opening::Content(_) => true,
        Opening::Newer(_) => false,
        Opening::Sqlite(e) => match e.sqlite_error_code() {
            Some(ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase) => true,
            // "no such table", a column of the wrong type: another program's file.
            Some(ErrorCode::Unknown) => true,
            Some(_) => false,
            None => true,
        },
    }
}

fn failed(path: &Path) -> impl FnOnce(Opening) -> StoreError + '_ {
    move |e| match e {
        Opening::Sqlite(e) => database(path)(e),
        Opening::Newer(found) => StoreError::Newer { path: path.to_owned(), found, known: FORMAT },
        Opening::Content(text) => {
            let source = std::io::Error::new(std::io::ErrorKind::InvalidData, text);
            StoreError::Io { path: path.to_owned(), source }
        }
    }
}

fn database(path: &Path) -> impl FnOnce(rusqlite::Error) -> StoreError + '_ {
    move |source| {
        let path = path.to_owned();
        match source.sqlite_error_code() {
            Some(ErrorCode::DiskFull) => StoreError::NoSpace { path, needed: 0, free: 0 },
            Some(ErrorCode::ReadOnly) => StoreError::ReadOnly { path },
            Some(ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked) => StoreError::InUse { path },
            _ => StoreError::Database { path, source },
        }
    }
}

/// Moves the database and its log out of the way; returns where the database went.
fn move_aside(path: &Path) -> Result<PathBuf, StoreError> {
    let free = |n: &u32| !path.with_extension(format!("db.damaged-{n}")).exists();
    // Bounded: the tenth overwrites itself, and a disk is not filled by a box that keeps failing.
    let n = (1..10).find(free).unwrap_or(10);
    let aside = path.with_extension(format!("db.damaged-{n}"));
    fs::rename(path, &aside).map_err(StoreError::io(path))?;
    for suffix in ["-wal", "-shm"] {
        let name = |p: &Path| PathBuf::from(format!("{}{suffix}", p.display()));
        let _ = fs::rename(name(path), name(&aside));
    }
    sync_dir(path.parent().unwrap_or(Path::new(".")))?;
    Ok(aside)
}
