//! The device's end of a chunked transfer: wishes go out by the link, chunks come in by it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError};
use tracing::info;

use super::chunks::ChunkTransfer;
use super::part::PartFile;
use super::{Code, FetchError, Fetched, Pace, Progress, Transfer, digest_file};
use crate::mqtt::backoff::chance;
use crate::mqtt::link::Inbound;
use crate::mqtt::topics::Topics;
use crate::update::digest::Digest;

/// How soon a flag is seen.
const TICK: Duration = Duration::from_millis(100);

/// Pulls a model into the transfer's `.part` file.
///
/// `ask` publishes once and may forget it, as `Board::tell` does: what is not answered is asked
/// again. `chunks` brings what arrives on [`Topics::xfer_filter`]; other messages are dropped and
/// counted. It must be bounded and filled without waiting: what does not fit is asked again too.
///
/// # Errors
/// See [`Code`]. What is there is kept, unless it is proven useless.
pub fn mqtt(
    topics: &Topics,
    ask: &mut dyn FnMut(&Arc<str>, Vec<u8>),
    chunks: &Receiver<Inbound>,
    mut transfer: Transfer<'_>,
) -> Result<Fetched, FetchError> {
    let (Some(digest), Some(size)) = (transfer.wanted.digest, transfer.wanted.size) else {
        let text = "a model over MQTT needs sha256 and size in its manifest";
        return Err(FetchError::new(Code::SizeMismatch, text));
    };
    transfer.wanted.admit()?;
    let mut pull = Pull { topics, digest, size, pace: Pace::new(Instant::now()) };
    loop {
        let (part, held, vouched) = PartFile::open(transfer.part, &digest, size)?;
        pull.fill(ask, chunks, &mut transfer, &part, &held)?;
        part.sync()?;
        let fetched =
            digest_file(transfer.part).map_err(|e| FetchError::storage(transfer.part, &e))?;
        if fetched.digest == digest {
            part.forget_map();
            return Ok(fetched);
        }
        part.discard();
        if vouched {
            let text = format!(
                "the chunks that came make up {}, {digest} was announced: the sender has another \
                 file, or someone else sends into this transfer",
                fetched.digest
            );
            return Err(FetchError::new(Code::DigestMismatch, text));
        }
        info!("{}: what came over HTTP before does not fit: from the start", digest.short());
    }
}

struct Pull<'a> {
    topics: &'a Topics,
    digest: Digest,
    size: u64,
    pace: Pace,
}

impl Pull<'_> {
    /// Until every chunk is there.
    fn fill(
        &mut self,
        ask: &mut dyn FnMut(&Arc<str>, Vec<u8>),
        chunks: &Receiver<Inbound>,
        transfer: &mut Transfer<'_>,
        part: &PartFile,
        held: &[bool],
    ) -> Result<(), FetchError> {
        let short = self.digest.short();
        let topic = self.topics.xfer_want(&short);
        let mut state = ChunkTransfer::new(self.digest, self.size, held, transfer.limits);
        let mut received = state.received();
        while !state.is_whole() {
            let now = Instant::now();
            self.pace.check(now, transfer, || {
                format!(
                    "nobody sends {short}: run `noblink model push --mqtt FILE` until the job ends"
                )
            })?;
            if let Some(want) = state.want(now, chance()) {
                ask(&topic, want.payload());
            }
            let left = state.due().map_or(TICK, |due| due.saturating_duration_since(now));
            let message = match chunks.recv_timeout(left.min(TICK)) {
                Ok(message) => message,
                Err(RecvTimeoutError::Timeout) => continue,
                Err(RecvTimeoutError::Disconnected) => {
                    let text = "the MQTT link has ended: send the model again";
                    return Err(FetchError::new(Code::Unreachable, text));
                }
            };
            let Some((_, index)) =
                self.topics.parse_chunk(&message.topic).filter(|(d, _)| *d == short)
            else {
                state.tally.foreign += 1;
                continue;
            };
            if let Ok(chunk) = state.on_chunk(Instant::now(), index, &message.payload) {
                part.put(&chunk)?;
                self.pace.gained(chunk.data.len());
                received += chunk.data.len() as u64;
                (transfer.progress)(Progress { received, size: Some(self.size) });
            }
        }
        info!("{short}: {} bytes in chunks over MQTT, {}", self.size, state.tally);
        Ok(())
    }
}
