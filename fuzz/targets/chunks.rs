//! A transfer in chunks: wishes, topics, and a whole transfer as a script of what may happen to it.

use std::sync::LazyLock;
use std::time::{Duration, Instant};

use noblink::mqtt::topics::Topics;
use noblink::update::digest::Digest;
use noblink::update::fetch::{
    CHUNK_SIZE, ChunkTransfer, Dropped, Limits, WANT_COUNT_MAX, Want, chunk_payload,
};

/// The longest file; shorter ones are its beginning.
static FILE: LazyLock<Vec<u8>> =
    LazyLock::new(|| (0..20 * CHUNK_SIZE).map(|n| (n / CHUNK_SIZE + n) as u8).collect());
/// Its chunks: hashing them is what takes time.
static WHOLE: LazyLock<Vec<Vec<u8>>> =
    LazyLock::new(|| (0..20).filter_map(|n| chunk_payload(&FILE, n)).collect());

pub fn check(data: &[u8]) {
    if let Some(want) = Want::parse(data) {
        assert_eq!(Want::parse(&want.payload()), Some(want));
        for size in [0, 1, CHUNK_SIZE as u64, 1 << 20, u64::MAX] {
            let indices = want.indices(size);
            assert!(indices.len() <= WANT_COUNT_MAX as usize);
            assert!(u64::from(indices.end) <= size.div_ceil(CHUNK_SIZE as u64));
        }
    }
    if let Ok(topic) = std::str::from_utf8(data) {
        let topics = Topics::new("noblink", "edge-1");
        for topic in [topic.to_owned(), format!("{}/xfer/{topic}", topics.root())] {
            if let Some((digest8, index)) = topics.parse_chunk(&topic) {
                let made = topics.xfer_chunk(digest8, index);
                assert_eq!(topics.parse_chunk(&made), Some((digest8, index)));
                assert!(made.len() <= topic.len() && digest8.len() == 8);
            }
        }
    }
    transfer(data);
}

/// The file's size, what is there of it, then steps of two bytes: what happens, and to which chunk.
fn transfer(data: &[u8]) {
    let [size, rest, there, steps @ ..] = data else { return };
    let size = usize::from(size % 20) * CHUNK_SIZE + usize::from(*rest);
    if size == 0 {
        return;
    }
    let file = &FILE[..size];
    let count = size.div_ceil(CHUNK_SIZE);
    let mut held: Vec<bool> = (0..count).map(|n| n < 8 && there >> n & 1 == 1).collect();
    let mut now = Instant::now();
    let limits = Limits::default();
    let mut transfer = ChunkTransfer::new(Digest::of(b"x"), size as u64, &held, &limits);
    let (mut asked, mut dropped) = (0, 0);
    for step in steps.chunks_exact(2).take(64) {
        let (what, index) = (step[0] % 6, u32::from(step[1]) % (count as u32 + 2));
        match what {
            0 => now += Duration::from_millis(10 << (step[1] % 16)),
            1 => {
                let due = transfer.due();
                let Some(want) = transfer.want(now, f64::from(step[1]) / 255.0) else {
                    assert!(transfer.is_whole() || due.is_some_and(|due| due > now));
                    continue;
                };
                let indices = want.indices(size as u64);
                assert_eq!(indices.len(), want.count as usize, "asked beyond the end");
                assert!((1..=WANT_COUNT_MAX).contains(&want.count));
                assert!(indices.clone().all(|n| !held[n as usize]), "asked again");
                assert!(transfer.due().is_some_and(|due| due > now));
                asked = asked.max(indices.end);
            }
            _ => {
                let whole = (index as usize + 1) * CHUNK_SIZE <= size;
                let mut payload = match WHOLE.get(index as usize).filter(|_| whole) {
                    Some(payload) => payload.clone(),
                    None => chunk_payload(file, index).unwrap_or_default(),
                };
                match what {
                    3 => payload.truncate(payload.len().saturating_sub(1)),
                    4 => payload.extend([0]),
                    5 => payload.iter_mut().for_each(|b| *b ^= 1),
                    _ => {}
                }
                match transfer.on_chunk(now, index, &payload) {
                    Ok(taken) => {
                        assert!(what == 2 && index < asked, "{taken:?}");
                        assert!(!std::mem::replace(&mut held[index as usize], true));
                        let at = taken.offset as usize;
                        assert_eq!(taken.data, &file[at..][..taken.data.len()]);
                        assert_eq!(taken.hash, payload[..32]);
                    }
                    Err(why) => {
                        dropped += 1;
                        let there = held.get(index as usize).copied();
                        assert_eq!(why == Dropped::Index, there.is_none());
                        assert_eq!(why == Dropped::Duplicate, there == Some(true));
                    }
                }
            }
        }
    }
    let tally = transfer.tally;
    let counted = [tally.index, tally.unasked, tally.duplicate, tally.length, tally.hash];
    assert_eq!(counted.into_iter().sum::<u64>(), dropped);
    let of = |n: usize| CHUNK_SIZE.min(size - n * CHUNK_SIZE);
    let received: usize = (0..count).filter(|n| held[*n]).map(of).sum();
    assert_eq!(transfer.received(), received as u64);
    assert_eq!(transfer.is_whole(), held.iter().all(|held| *held));
}
