//! The `outbox` thread: moves records between the outbox and its file.
//!
//! ```text
//! each 100 ms   read back what the link will need next
//! each second   write what has waited for a second; erase what was settled
//! ```
//!
//! More than half of what memory may hold is written at once; with `durability = "always"`
//! everything is, each 100 ms. With the broker up nothing waits for a second, and nothing is
//! written. A file that is too large gives up its oldest records.
//!
//! Whatever the disk does, only this thread waits for it. What can't be written stays in memory and
//! is tried again; a damaged file is moved aside and a new one begun; a disk that can't be read for
//! ten seconds, or says nothing for thirty, is given up until it can be read through anew, and the
//! records on it are announced as lost (they may come late).

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded};
use tracing::{error, info, warn};

use super::gaps::{Gap, Reason};
use super::outbox::{Bounds, Cargo, Outbox, Record, STUCK, State};
pub use super::spool::Durability;
use super::spool::{Spool, Trouble};

const TICK: Duration = Duration::from_millis(100);
const TICKS_A_SECOND: u64 = 10;
const RETRY: Duration = Duration::from_secs(5);
const UNREADABLE: Duration = Duration::from_secs(10);
/// How long a stop waits for a sign of the disk, and how long in all: systemd waits 20 s for the
/// whole service.
const STOP: Duration = Duration::from_secs(5);
const STOP_MAX: Duration = Duration::from_secs(12);
/// One transaction, one read.
const BATCH_RECORDS: usize = 1000;
const BATCH_BYTES: usize = 2 << 20;
/// Share of what memory may hold below which `front` is filled again from disk: some seconds of
/// draining, by the bounds of the service.
const FRONT_LOW: usize = 8;
/// Share up to which what was written stays in memory as well: a short outage is not read back.
const FRONT_MAX: usize = 4;
/// What a row takes beside its payload, about.
const ROW_BYTES: usize = 160;

/// Where and how records are kept on disk.
#[derive(Debug, Clone)]
pub struct Settings {
    /// `outbox.db` is made there.
    pub dir: PathBuf,
    /// Its greatest size, journal included.
    pub max_bytes: u64,
    /// What a power cut may cost.
    pub durability: Durability,
}

/// The running thread.
pub struct Spooler {
    outbox: Arc<Outbox>,
    thread: JoinHandle<()>,
    stop: Sender<()>,
}

impl Spooler {
    /// Starts it. A disk that does not work is no reason to fail: it is reported and tried again.
    pub fn start(outbox: Arc<Outbox>, settings: Settings) -> io::Result<Self> {
        outbox.state().attach(settings.durability == Durability::Always);
        let (stop, stopped) = bounded(0);
        let clerk = Clerk::new(Arc::clone(&outbox), settings);
        let thread = std::thread::Builder::new().name("outbox".into());
        Ok(Self { outbox, thread: thread.spawn(move || clerk.run(&stopped))?, stop })
    }

    /// Writes what still waits. To be called when the link has ended.
    pub fn stop(self) {
        drop(self.stop);
        let asked = Instant::now();
        while !self.thread.is_finished() {
            let silent = self.outbox.state().silent().min(asked.elapsed());
            if silent > STOP || asked.elapsed() > STOP_MAX {
                warn!("outbox: the disk does not answer; what it did not take is lost");
                return;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        if self.thread.join().is_err() {
            error!("outbox: its thread ended in a panic");
        }
    }
}

/// When a turn is taken.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Turn {
    Tick,
    Second,
    Last,
}

/// What is to be written.
#[derive(Default)]
struct Batch {
    erase: Vec<i64>,
    records: Vec<(i64, Arc<Record>)>,
    gaps: Option<Vec<Gap>>,
}

impl Batch {
    fn is_empty(&self) -> bool {
        self.erase.is_empty() && self.records.is_empty() && self.gaps.is_none()
    }
}

struct Clerk {
    outbox: Arc<Outbox>,
    settings: Settings,
    spool: Option<Spool>,
    /// Whether the outbox knows what is in the file.
    adopted: bool,
    /// The announcements in the file; none = not read yet.
    gaps: Option<Vec<Gap>>,
    error: Option<String>,
    retry_at: Option<Instant>,
    unreadable: Option<Instant>,
}

impl Clerk {
    fn new(outbox: Arc<Outbox>, settings: Settings) -> Self {
        Self {
            outbox,
            settings,
            spool: None,
            adopted: false,
            gaps: None,
            error: None,
            retry_at: None,
            unreadable: None,
        }
    }

    fn run(mut self, stopped: &Receiver<()>) {
        for tick in 1_u64.. {
            let second = tick.is_multiple_of(TICKS_A_SECOND);
            self.turn(if second { Turn::Second } else { Turn::Tick });
            if stopped.recv_timeout(TICK) != Err(RecvTimeoutError::Timeout) {
                return self.turn(Turn::Last);
            }
        }
    }

    fn turn(&mut self, turn: Turn) {
        let began = Instant::now();
        let resting = turn != Turn::Last && self.retry_at.is_some_and(|at| Instant::now() < at);
        // Reading goes on while there is no room to write.
        let done = if resting { self.read() } else { self.work(turn) };
        match done {
            Ok(()) if resting => {}
            Ok(()) => {
                self.retry_at = None;
                if self.error.take().is_some() {
                    info!("outbox: {} works again", Spool::path(&self.settings.dir).display());
                }
            }
            Err(Trouble::Failed(why)) => self.failed(why),
            Err(Trouble::Damaged(why)) => self.replace(&why),
        }
        if began.elapsed() > STUCK {
            let (path, s) = (Spool::path(&self.settings.dir), began.elapsed().as_secs());
            warn!("outbox: {}: the disk did not answer for {s} s", path.display());
        }
        let bytes = match (&self.spool, turn) {
            (Some(spool), Turn::Second | Turn::Last) => spool.bytes().ok(),
            _ => None,
        };
        let mut state = self.outbox.state();
        state.beat(bytes, self.error.as_deref());
        let left = unwritten(&state).count();
        if turn == Turn::Last && left > 0 {
            warn!("outbox: {left} records are lost: they were neither delivered nor written");
        }
        self.adopted &= !state.is_forsaken();
        drop(state);
        // The budget for records from disk has grown, too.
        self.outbox.ring();
    }

    fn work(&mut self, turn: Turn) -> Result<(), Trouble> {
        if self.error.is_some() && self.is_worthless() {
            // A full disk does not even let rows be erased.
            self.spool = None;
            Spool::remove(&self.settings.dir)?;
            self.outbox.state().erase.clear();
            (self.adopted, self.gaps) = (false, Some(Vec::new()));
        }
        match &self.spool {
            // There may be nothing to write that would show whether it works again.
            Some(spool) if self.error.is_some() => spool.probe()?,
            Some(_) => {}
            None => {
                let Settings { dir, max_bytes, durability } = &self.settings;
                self.spool = Some(Spool::open(dir, *max_bytes, *durability)?);
            }
        }
        if !self.adopted && !self.adopt()? {
            return Ok(());
        }
        self.read()?;
        self.write(turn)
    }

    /// Whether nothing that is in the file is still to be sent.
    fn is_worthless(&self) -> bool {
        let state = self.outbox.state();
        self.adopted && !state.is_forsaken() && state.stored() == 0
    }

    /// Tells the outbox what is in the file. `false`: not now.
    fn adopt(&mut self) -> Result<bool, Trouble> {
        let Some(spool) = &mut self.spool else { return Ok(false) };
        let settled = self.outbox.state().erase.clone();
        spool.write(&settled, &[], None)?;
        self.outbox.state().erase.drain(..settled.len());
        let (held, last) = spool.held()?;
        let found: u64 = held.iter().map(|h| h.count).sum();
        // Later, the outbox knows them itself.
        let gaps = if self.gaps.is_none() { spool.gaps()? } else { Vec::new() };
        self.adopted = self.outbox.state().adopt(held, last, gaps.clone());
        if self.adopted {
            self.gaps.get_or_insert(gaps);
            if found > 0 {
                info!("outbox: {found} records that were not delivered wait on disk");
            }
        }
        Ok(self.adopted)
    }

    /// Reads back what the link will need next.
    fn read(&mut self) -> Result<(), Trouble> {
        let Some(spool) = self.spool.as_ref().filter(|_| self.adopted) else { return Ok(()) };
        let Bounds { records, bytes } = self.outbox.bounds;
        let low = Bounds { records: records / FRONT_LOW, bytes: bytes / FRONT_LOW };
        let after = {
            let state = self.outbox.state();
            let enough = state.front.len() >= low.records || state.bytes_in_memory() >= low.bytes;
            if state.unread.count() == 0 || !state.front.is_empty() && enough {
                return Ok(());
            }
            state.unread.after()
        };
        let (records, bytes) = (BATCH_RECORDS.min(low.records), BATCH_BYTES.min(low.bytes));
        match spool.read(after, records.max(1), bytes.max(1)) {
            Ok(rows) if rows.is_empty() => Err(Trouble::Damaged("records are missing".into())),
            Ok(rows) => {
                self.unreadable = None;
                let mut state = self.outbox.state();
                if !state.is_forsaken() {
                    rows.into_iter().for_each(|(ticket, record)| state.refill(ticket, record));
                }
                Ok(())
            }
            Err(Trouble::Failed(why)) => {
                let since = *self.unreadable.get_or_insert_with(Instant::now);
                if since.elapsed() > UNREADABLE {
                    self.unreadable = None;
                    self.spool = None;
                    self.outbox.state().forsake();
                }
                Err(Trouble::Failed(why))
            }
            Err(damaged) => Err(damaged),
        }
    }

    fn write(&mut self, turn: Turn) -> Result<(), Trouble> {
        let mut more = self.is_due(turn);
        loop {
            let Some(spool) = &mut self.spool else { return Ok(()) };
            let on_disk = self.gaps.as_deref().unwrap_or_default();
            let mut batch = due(&mut self.outbox.state(), on_disk, more, turn);
            if batch.is_empty() {
                break;
            }
            let size: usize = batch.records.iter().map(|(_, r)| r.payload.len() + ROW_BYTES).sum();
            let written = match spool.excess(size as u64) {
                Ok(0) => spool.write(&batch.erase, &batch.records, batch.gaps.as_deref()),
                Ok(excess) => shed(spool, &self.outbox, excess.max(self.settings.max_bytes / 50))
                    .and_then(|gaps| {
                        // On disk already; the batch's know nothing of what was given up just now.
                        batch.gaps = Some(gaps);
                        spool.write(&batch.erase, &batch.records, None)
                    }),
                Err(e) => Err(e),
            };
            if let Err(e) = written {
                self.outbox.state().erase.extend(batch.erase);
                return Err(e);
            }
            more &= batch.records.len() == BATCH_RECORDS || size > BATCH_BYTES;
            let mut state = self.outbox.state();
            settle(&mut state, self.outbox.bounds, &batch.records);
            state.beat(None, self.error.as_deref());
            drop(state);
            if let Some(gaps) = batch.gaps {
                self.gaps = Some(gaps);
            }
            if !more {
                break;
            }
        }
        let state = self.outbox.state();
        let idle = state.unread.count() == 0 && state.erase.is_empty();
        drop(state);
        match &self.spool {
            Some(spool) if idle && turn == Turn::Second => spool.shrink(),
            _ => Ok(()),
        }
    }

    /// Whether records are to be written now.
    fn is_due(&self, turn: Turn) -> bool {
        let mut state = self.outbox.state();
        let bounds = self.outbox.bounds;
        let crowded =
            state.in_memory() > bounds.records / 2 || state.bytes_in_memory() > bounds.bytes / 2;
        let oldest = unwritten(&state).next().map(|(ticket, _)| ticket);
        let late = turn == Turn::Second && oldest.is_some_and(|ticket| ticket <= state.mark);
        if turn == Turn::Second {
            state.mark = state.last_ticket;
        }
        let always = self.settings.durability == Durability::Always;
        crowded || late || always || turn == Turn::Last
    }

    fn failed(&mut self, why: String) {
        self.retry_at = Some(Instant::now() + RETRY);
        if self.error.as_ref() != Some(&why) {
            let path = Spool::path(&self.settings.dir);
            let most = self.outbox.bounds.records;
            warn!("outbox: {} {why}; records wait in memory, {most} at most", path.display());
            self.error = Some(why);
        }
    }

    /// Begins a new file.
    fn replace(&mut self, why: &str) {
        let path = Spool::path(&self.settings.dir);
        let mut state = self.outbox.state();
        let lost = state.unread.count();
        state.forsake();
        drop(state);
        self.spool = None;
        self.adopted = false;
        match Spool::move_aside(&self.settings.dir) {
            Ok(aside) => {
                // Its rows and announcements are gone with it.
                self.outbox.state().erase.clear();
                self.gaps = Some(Vec::new());
                let (path, aside) = (path.display(), aside.display());
                warn!(
                    "outbox: {path} is damaged ({why}): moved to {aside}, a new one is begun; \
                     {lost} records were lost with it that this life knows of"
                );
            }
            Err(e) => self.failed(format!("is damaged ({why}) and can't be moved aside: {e}")),
        }
    }
}

/// Waiting records that are not on disk, oldest first.
fn unwritten(state: &State) -> impl Iterator<Item = (i64, &Arc<Record>)> {
    let line = state.front.iter().chain(&state.back);
    line.filter(|e| !e.stored).map(|e| (e.ticket, &e.record))
}

/// Takes together what is to be written now; `on_disk` are the announcements that are.
fn due(state: &mut State, on_disk: &[Gap], records: bool, turn: Turn) -> Batch {
    let mut batch = Batch::default();
    if records {
        let mut bytes = 0;
        let within = |(_, record): &(i64, &Arc<Record>)| {
            bytes += record.payload.len();
            bytes <= BATCH_BYTES + record.payload.len()
        };
        let due = unwritten(state).take(BATCH_RECORDS).take_while(within);
        batch.records = due.map(|(ticket, record)| (ticket, Arc::clone(record))).collect();
    }
    if turn == Turn::Tick && batch.records.is_empty() {
        return batch;
    }
    batch.erase = std::mem::take(&mut state.erase);
    let gaps = waiting_gaps(state);
    // Like a record: only what has waited for a second.
    let second_ago = jiff::Timestamp::now().as_microsecond() - 1_000_000;
    let young = on_disk.is_empty() && gaps.iter().all(|g| g.time_us > second_ago);
    if gaps != on_disk && (turn == Turn::Last || !young) {
        batch.gaps = Some(gaps);
    }
    batch
}

fn waiting_gaps(state: &State) -> Vec<Gap> {
    let out = state.out.values().filter_map(|(cargo, _)| match cargo {
        Cargo::Gap(gap) => Some(gap),
        Cargo::Record(_) => None,
    });
    out.chain(&state.gaps.0).cloned().collect()
}

/// Gives up the oldest records on disk until so many bytes are free; returns the announcements that
/// are on disk then.
fn shed(spool: &mut Spool, outbox: &Outbox, bytes: u64) -> Result<Vec<Gap>, Trouble> {
    let mut freed = 0;
    let mut state = outbox.state();
    while freed < bytes
        && let Some(entry) = state.oldest_stored()
    {
        state.lose(&entry.record, Reason::OutboxFull);
        freed += (entry.record.payload.len() + ROW_BYTES) as u64;
    }
    let after = (state.unread.count() > 0).then(|| state.unread.after());
    drop(state);
    if let Some(after) = after.filter(|_| freed < bytes) {
        let keys = spool.oldest(after, bytes - freed)?;
        let mut state = outbox.state();
        if !state.is_forsaken() {
            keys.into_iter().for_each(|key| state.lose_unread(key));
        }
    }
    let mut state = outbox.state();
    let (erase, gaps) = (std::mem::take(&mut state.erase), waiting_gaps(&state));
    drop(state);
    spool.write(&erase, &[], Some(&gaps)).inspect_err(|_| outbox.state().erase.extend(erase))?;
    Ok(gaps)
}

/// These records are on disk now: marks those that are still wanted, and lets go of what memory
/// need not hold as well.
fn settle(state: &mut State, bounds: Bounds, written: &[(i64, Arc<Record>)]) {
    if state.is_forsaken() {
        return state.erase.extend(written.iter().map(|(ticket, _)| *ticket));
    }
    for (ticket, _) in written {
        if let Some((_, stored)) = state.out.get_mut(ticket) {
            *stored = true;
        } else if let Ok(at) = state.front.binary_search_by_key(ticket, |e| e.ticket) {
            state.front[at].stored = true;
        } else if state.back.front().is_none_or(|e| e.ticket > *ticket) {
            // Settled, or given up, while it was written.
            state.erase.push(*ticket);
        }
    }
    let Some((last, _)) = written.last() else { return };
    while state.back.front().is_some_and(|e| e.ticket <= *last)
        && let Some(mut entry) = state.back.pop_front()
    {
        entry.stored = true;
        let room = state.front.len() < bounds.records / FRONT_MAX
            && state.bytes_in_memory() < bounds.bytes / FRONT_MAX;
        if room && state.unread.count() == 0 {
            state.front.push_back(entry);
        } else {
            state.leave_on_disk(entry);
        }
    }
}
