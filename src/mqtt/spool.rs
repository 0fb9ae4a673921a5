//! `outbox.db`: records on disk until their PUBACK.
//!
//! SQLite in WAL mode, one writer, `locking_mode=EXCLUSIVE`: a commit is one append. With
//! `durability = "memory"` it is `synchronous=NORMAL`, which syncs at checkpoints only: a process
//! that dies loses nothing, a power cut what the kernel had not written out yet. `"always"` syncs
//! each commit.
//!
//! A row's number is the record's ticket, the order in which records came. This file knows rows and
//! pages; when something is written, read or given up is decided by `spooler`.

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rusqlite::{Connection, ErrorCode, Row, params};

use super::gaps::{Gap, Reason};
use super::outbox::Record;

const FILE: &str = "outbox.db";
/// `PRAGMA user_version`
const FORMAT: i64 = 1;
const PAGE: u64 = 4096;
/// The journal beside the database, which counts against the limit too.
const JOURNAL: u64 = 8 << 20;
/// Free pages that stay: the next outage takes them.
const SPARE_PAGES: i64 = 256;
/// Pages given back to the file system at once, when rows are gone.
const SHRINK_PAGES: u64 = 4096;

const TABLES: &str = "
CREATE TABLE records (
  n INTEGER PRIMARY KEY, camera TEXT NOT NULL, boot TEXT NOT NULL, seq INTEGER NOT NULL,
  topic TEXT NOT NULL, payload BLOB NOT NULL);
CREATE TABLE gaps (
  camera TEXT NOT NULL, boot TEXT NOT NULL, seq_from INTEGER NOT NULL, seq_to INTEGER NOT NULL,
  count INTEGER NOT NULL, reason TEXT NOT NULL, time_us INTEGER NOT NULL);
";

/// How much a record that was pushed outlives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Durability {
    /// A power cut loses what waits in memory: the last seconds.
    Memory,
    /// Each record is on disk before it is sent.
    Always,
}

/// Why the disk did not do as it was told.
#[derive(Debug)]
pub(super) enum Trouble {
    /// The file is no spool of ours, or not any more.
    Damaged(String),
    /// It may work another time.
    Failed(String),
}

impl fmt::Display for Trouble {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Damaged(why) => write!(f, "is damaged: {why}"),
            Self::Failed(why) => f.write_str(why),
        }
    }
}

impl From<rusqlite::Error> for Trouble {
    fn from(e: rusqlite::Error) -> Self {
        match e.sqlite_error_code() {
            Some(ErrorCode::DiskFull) => Self::Failed("can't be written: no space is left".into()),
            Some(ErrorCode::ReadOnly) => Self::Failed("can't be written: it is read-only".into()),
            Some(ErrorCode::CannotOpen) => Self::Failed(
                "can't be opened: name a folder in device.state_dir that this user may write to"
                    .into(),
            ),
            Some(ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked) => {
                Self::Failed("is in use by another process".into())
            }
            Some(ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase | ErrorCode::Unknown)
            | None => Self::Damaged(e.to_string()),
            Some(_) => Self::Failed(format!("can't be used: {e}")),
        }
    }
}

/// Rows of one camera and one life of the process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Held {
    pub(super) camera: Arc<str>,
    pub(super) boot: Arc<str>,
    pub(super) seq_from: u64,
    pub(super) seq_to: u64,
    pub(super) count: u64,
}

/// A row without its payload.
#[derive(Debug)]
pub(super) struct Key {
    pub(super) ticket: i64,
    pub(super) camera: Arc<str>,
    pub(super) boot: Arc<str>,
    pub(super) seq: u64,
}

/// The open database.
pub(super) struct Spool {
    db: Connection,
    max_bytes: u64,
}

impl Spool {
    /// Opens, or makes, the database in `dir`, and reads it through.
    pub(super) fn open(
        dir: &Path,
        max_bytes: u64,
        durability: Durability,
    ) -> Result<Self, Trouble> {
        fs::create_dir_all(dir).map_err(|e| Trouble::Failed(format!("can't be made: {e}")))?;
        let mut db = Connection::open(path(dir))?;
        db.busy_timeout(std::time::Duration::ZERO)?;
        db.pragma_update(None, "page_size", PAGE as i64)?;
        // Before the first table, or never: freed pages can go back to the file system.
        db.pragma_update(None, "auto_vacuum", "INCREMENTAL")?;
        db.pragma_update(None, "locking_mode", "EXCLUSIVE")?;
        db.pragma_update(None, "journal_mode", "WAL")?;
        db.pragma_update(None, "journal_size_limit", JOURNAL as i64)?;
        db.pragma_update(
            None,
            "synchronous",
            match durability {
                Durability::Memory => "NORMAL",
                Durability::Always => "FULL",
            },
        )?;
        let turn = db.transaction()?;
        match turn.pragma_query_value(None, "user_version", |r| r.get::<_, i64>(0))? {
            0 => {
                turn.execute_batch(TABLES)?;
                turn.pragma_update(None, "user_version", FORMAT)?;
            }
            FORMAT => {}
            other => return Err(Trouble::Damaged(format!("its format is {other}, not {FORMAT}"))),
        }
        turn.commit()?;
        let check: String = db.query_row("PRAGMA quick_check(1)", [], |r| r.get(0))?;
        if check != "ok" {
            return Err(Trouble::Damaged(check));
        }
        Ok(Self { db, max_bytes: max_bytes.saturating_sub(JOURNAL) })
    }

    /// Where the database is.
    pub(super) fn path(dir: &Path) -> PathBuf {
        path(dir)
    }

    /// Moves a damaged database out of the way; the one before it goes, so that a disk is not
    /// filled by a box that keeps failing.
    pub(super) fn move_aside(dir: &Path) -> std::io::Result<PathBuf> {
        for entry in fs::read_dir(dir)?.flatten() {
            let name = entry.file_name();
            if name.to_str().is_some_and(|n| n.starts_with("outbox.db.corrupt-")) {
                fs::remove_file(entry.path())?;
            }
        }
        let now = jiff::Timestamp::now().as_second();
        let aside = dir.join(format!("{FILE}.corrupt-{now}"));
        fs::rename(path(dir), &aside)?;
        for suffix in ["-wal", "-shm"] {
            // Of a database that is gone: worth nothing.
            let _ = fs::remove_file(dir.join(format!("{FILE}{suffix}")));
        }
        Ok(aside)
    }

    /// Removes a closed database.
    pub(super) fn remove(dir: &Path) -> Result<(), Trouble> {
        let failed = |e| Trouble::Failed(format!("can't be removed: {e}"));
        for suffix in ["-wal", "-shm", ""] {
            match fs::remove_file(dir.join(format!("{FILE}{suffix}"))) {
                Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(failed(e)),
                _ => {}
            }
        }
        Ok(())
    }

    /// What is in it, and the greatest ticket.
    pub(super) fn held(&self) -> Result<(Vec<Held>, i64), Trouble> {
        let sql = "SELECT camera, boot, min(seq), max(seq), count(*) FROM records \
                   GROUP BY camera, boot";
        let mut rows = self.db.prepare(sql)?;
        let held = |r: &Row<'_>| {
            Ok(Held {
                camera: text(r, 0)?,
                boot: text(r, 1)?,
                seq_from: number(r, 2)?,
                seq_to: number(r, 3)?,
                count: number(r, 4)?,
            })
        };
        let all = rows.query_map([], held)?.collect::<Result<_, _>>()?;
        let last = "SELECT coalesce(max(n), 0) FROM records";
        Ok((all, self.db.query_row(last, [], |r| r.get(0))?))
    }

    /// The announcements that wait.
    pub(super) fn gaps(&self) -> Result<Vec<Gap>, Trouble> {
        let sql = "SELECT camera, boot, seq_from, seq_to, count, reason, time_us FROM gaps \
                   ORDER BY rowid";
        let mut rows = self.db.prepare(sql)?;
        let gap = |r: &Row<'_>| {
            let reason = r.get_ref(5)?.as_str().ok().and_then(Reason::parse);
            Ok(Gap {
                camera: text(r, 0)?,
                boot: text(r, 1)?,
                seq_from: number(r, 2)?,
                seq_to: number(r, 3)?,
                count: number(r, 4)?,
                // Of a newer version.
                reason: reason.unwrap_or(Reason::OutboxFull),
                time_us: r.get(6)?,
            })
        };
        Ok(rows.query_map([], gap)?.collect::<Result<_, _>>()?)
    }

    /// Erases, writes and replaces the announcements, all or nothing.
    pub(super) fn write(
        &mut self,
        erase: &[i64],
        records: &[(i64, Arc<Record>)],
        gaps: Option<&[Gap]>,
    ) -> Result<(), Trouble> {
        let turn = self.db.transaction()?;
        {
            let mut gone = turn.prepare("DELETE FROM records WHERE n = ?1")?;
            erase.iter().try_for_each(|n| gone.execute([n]).map(drop))?;
            let sql = "INSERT OR REPLACE INTO records VALUES (?1, ?2, ?3, ?4, ?5, ?6)";
            let mut new = turn.prepare(sql)?;
            for (n, r) in records {
                let (camera, boot, topic) = (&*r.camera, &*r.boot, &*r.topic);
                new.execute(params![n, camera, boot, r.seq as i64, topic, r.payload])?;
            }
            if let Some(gaps) = gaps {
                turn.execute("DELETE FROM gaps", [])?;
                let sql = "INSERT INTO gaps VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7)";
                let mut new = turn.prepare(sql)?;
                for g in gaps {
                    let (from, to, count) = (g.seq_from as i64, g.seq_to as i64, g.count as i64);
                    let (camera, boot) = (&*g.camera, &*g.boot);
                    let reason = g.reason.name();
                    new.execute(params![camera, boot, from, to, count, reason, g.time_us])?;
                }
            }
        }
        Ok(turn.commit()?)
    }

    /// Writes a page, to see whether that works.
    pub(super) fn probe(&self) -> Result<(), Trouble> {
        Ok(self.db.pragma_update(None, "user_version", FORMAT)?)
    }

    /// The oldest records after a ticket: so many, or so many bytes.
    pub(super) fn read(
        &self,
        after: i64,
        records: usize,
        bytes: usize,
    ) -> Result<Vec<(i64, Record)>, Trouble> {
        let sql = "SELECT n, camera, boot, seq, topic, payload FROM records WHERE n > ?1 \
                   ORDER BY n LIMIT ?2";
        let mut rows = self.db.prepare(sql)?;
        let mut rows = rows.query(params![after, records as i64])?;
        let (mut found, mut size) = (Vec::new(), 0);
        while size < bytes
            && let Some(r) = rows.next()?
        {
            let record = Record {
                camera: text(r, 1)?,
                boot: text(r, 2)?,
                seq: number(r, 3)?,
                topic: text(r, 4)?,
                payload: r.get(5)?,
            };
            size += record.payload.len();
            found.push((r.get(0)?, record));
        }
        Ok(found)
    }

    /// The oldest rows after a ticket that hold so many bytes together.
    pub(super) fn oldest(&self, after: i64, bytes: u64) -> Result<Vec<Key>, Trouble> {
        let sql = "SELECT n, camera, boot, seq, length(payload) FROM records WHERE n > ?1 \
                   ORDER BY n";
        let mut rows = self.db.prepare(sql)?;
        let mut rows = rows.query([after])?;
        let (mut found, mut size) = (Vec::new(), 0);
        while size < bytes
            && let Some(r) = rows.next()?
        {
            size += number(r, 4)?;
            let (camera, boot) = (text(r, 1)?, text(r, 2)?);
            found.push(Key { ticket: r.get(0)?, camera, boot, seq: number(r, 3)? });
        }
        Ok(found)
    }

    /// Bytes of the pages that are in use.
    pub(super) fn bytes(&self) -> Result<u64, Trouble> {
        let pages = |name| self.db.pragma_query_value(None, name, |r| r.get::<_, i64>(0));
        Ok((pages("page_count")? - pages("freelist_count")?).max(0) as u64 * PAGE)
    }

    /// By how many bytes it would be too large with so many more.
    pub(super) fn excess(&self, more: u64) -> Result<u64, Trouble> {
        // A quarter for topics, keys and pages that are not quite full.
        Ok((self.bytes()? + more + more / 4).saturating_sub(self.max_bytes))
    }

    /// Gives some of the pages that are free back to the file system, if there are many of them.
    pub(super) fn shrink(&self) -> Result<(), Trouble> {
        let free: i64 = self.db.pragma_query_value(None, "freelist_count", |r| r.get(0))?;
        if free > SPARE_PAGES {
            // One page a step.
            let mut step =
                self.db.prepare(&format!("PRAGMA incremental_vacuum({SHRINK_PAGES})"))?;
            let mut rows = step.query([])?;
            while rows.next()?.is_some() {}
            drop(rows);
            // The file gets shorter with what is in its journal, which goes too.
            self.db.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |_| Ok(()))?;
        }
        Ok(())
    }
}

fn path(dir: &Path) -> PathBuf {
    dir.join(FILE)
}

fn text(r: &Row<'_>, at: usize) -> rusqlite::Result<Arc<str>> {
    Ok(r.get_ref(at)?.as_str()?.into())
}

fn number(r: &Row<'_>, at: usize) -> rusqlite::Result<u64> {
    Ok(r.get::<_, i64>(at)? as u64)
}
