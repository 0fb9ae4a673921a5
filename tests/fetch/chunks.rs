//! Chunks lost, doubled, reordered and corrupted: it converges, and never takes wrong bytes.

use std::time::{Duration, Instant};

use noblink::mqtt::topics::Topics;
use noblink::update::digest::Digest;
use noblink::update::fetch::{
    CHUNK_SIZE, ChunkTransfer, Dropped, Limits, WANT_COUNT_MAX, Want, chunk_payload,
};
use proptest::prelude::*;

use super::noise;

const SECOND: Duration = Duration::from_secs(1);

fn transfer(file: &[u8], held: &[bool]) -> ChunkTransfer {
    ChunkTransfer::new(Digest::of(file), file.len() as u64, held, &Limits::default())
}

#[test]
fn a_wish_is_made_and_read_as_the_contract_says() {
    let file = noise(1, 3 * CHUNK_SIZE + 1);
    let want = transfer(&file, &[]).want(Instant::now(), 0.0).unwrap();
    let text = format!(r#"{{"sha256":"{}","chunk_size":65536,"from":0,"count":4}}"#, want.sha256);
    assert_eq!(String::from_utf8(want.payload()).unwrap(), text);
    assert_eq!(Want::parse(text.as_bytes()), Some(want));
    for (from, to) in [
        ("\"count\":4", "\"count\":17"),
        ("\"count\":4", "\"count\":0"),
        ("65536", "1"),
        ("\"from\":0", "\"from\":-1"),
        ("\"from\":0", "\"from\":5000000000"),
        ("sha256\":\"", "sha256\":\"z"),
        ("{", "["),
    ] {
        assert_eq!(Want::parse(text.replacen(from, to, 1).as_bytes()), None, "{to}");
    }
    assert_eq!(Want::parse(&vec![b' '; 100_000]), None);
    let beyond = Want { from: u32::MAX, count: WANT_COUNT_MAX, ..want };
    assert!(beyond.indices(file.len() as u64).is_empty());
    assert_eq!(Want { from: 2, ..want }.indices(file.len() as u64), 2..4);
}

#[test]
fn a_chunk_is_its_hash_and_its_data() {
    let file = noise(2, CHUNK_SIZE + 10);
    let last = chunk_payload(&file, 1).unwrap();
    assert_eq!(last[..32], Digest::of(&file[CHUNK_SIZE..]).0);
    assert_eq!(last[32..], file[CHUNK_SIZE..]);
    assert_eq!(chunk_payload(&file, 2), None);
}

#[test]
fn only_what_was_asked_for_is_taken() {
    let file = noise(3, 40 * CHUNK_SIZE + 7);
    let chunk = |i| chunk_payload(&file, i).unwrap();
    let now = Instant::now();
    let mut state = transfer(&file, &[]);
    // A flood before anything was asked for.
    for i in 0..41 {
        assert_eq!(state.on_chunk(now, i, &chunk(i)), Err(Dropped::Unasked));
    }
    let want = state.want(now, 0.0).unwrap();
    assert_eq!((want.from, want.count), (0, 16));
    assert_eq!(state.want(now, 0.0), None, "one wish is out");
    let taken = chunk(3);
    let taken = state.on_chunk(now, 3, &taken).unwrap();
    assert_eq!((taken.offset, taken.data), (3 * 65536, &file[3 * 65536..4 * 65536]));

    let mut bad = chunk(4);
    bad[40] ^= 1;
    assert_eq!(state.on_chunk(now, 4, &bad), Err(Dropped::Hash));
    bad = chunk(4);
    bad[0] ^= 1;
    assert_eq!(state.on_chunk(now, 4, &bad), Err(Dropped::Hash));
    assert_eq!(state.on_chunk(now, 4, &chunk(4)[..100]), Err(Dropped::Length));
    assert_eq!(state.on_chunk(now, 4, &[]), Err(Dropped::Length));
    assert_eq!(state.on_chunk(now, 5, &[chunk(5), vec![0]].concat()), Err(Dropped::Length));
    assert_eq!(state.on_chunk(now, 5, &chunk(40)), Err(Dropped::Length));
    assert_eq!(state.on_chunk(now, 3, &chunk(3)), Err(Dropped::Duplicate));
    assert_eq!(state.on_chunk(now, 16, &chunk(16)), Err(Dropped::Unasked));
    assert_eq!(state.on_chunk(now, 41, &chunk(0)), Err(Dropped::Index));
    let t = state.tally;
    assert_eq!((t.unasked, t.hash, t.length, t.duplicate, t.index), (42, 2, 4, 1, 1));
}

#[test]
fn a_wish_that_is_late_is_made_again_smaller_and_with_more_patience() {
    let file = noise(4, 40 * CHUNK_SIZE);
    let mut state = transfer(&file, &[]);
    let mut now = Instant::now();
    let mut seen = Vec::new();
    for _ in 0..7 {
        let want = state.want(now, 0.0).unwrap();
        let due = state.due().unwrap();
        seen.push((want.count, (due - now).as_secs()));
        now = due;
    }
    assert_eq!(seen, [(16, 3), (8, 6), (4, 12), (2, 24), (1, 48), (1, 60), (1, 60)]);
    assert_eq!(state.tally.late, 6);
    // What comes late after all is taken, and the pace picks up again.
    for i in 0..16 {
        state.on_chunk(now, i, &chunk_payload(&file, i).unwrap()).unwrap();
    }
    let want = state.want(now, 0.0).unwrap();
    assert_eq!((want.from, want.count), (16, 2));
    assert_eq!(state.due().unwrap() - now, 30 * SECOND);
}

#[test]
fn what_is_there_is_not_asked_for() {
    let file = noise(5, 6 * CHUNK_SIZE);
    let mut state = transfer(&file, &[true, false, false, true, true]);
    assert_eq!(state.received(), 3 * 65536);
    let now = Instant::now();
    let want = state.want(now, 0.0).unwrap();
    assert_eq!((want.from, want.count), (1, 2), "a run of missing ones");
    assert!(transfer(&file, &[true; 6]).is_whole());
    assert_eq!(transfer(&file, &[true; 6]).want(now, 0.0), None);
    assert!(transfer(b"", &[]).is_whole());
}

#[test]
fn topics_of_chunks_are_read_strictly() {
    let topics = Topics::new("noblink", "edge-1");
    assert_eq!(&*topics.xfer_want("2c26b46b"), "noblink/v1/edge-1/xfer/2c26b46b/want");
    let chunk = topics.xfer_chunk("2c26b46b", 7);
    assert_eq!(&*chunk, "noblink/v1/edge-1/xfer/2c26b46b/chunk/7");
    assert_eq!(topics.parse_chunk(&chunk), Some(("2c26b46b", 7)));
    for wrong in [
        "noblink/v1/edge-2/xfer/2c26b46b/chunk/7",
        "noblink/v1/edge-1/xfer/2c26b46b/want",
        "noblink/v1/edge-1/xfer/2c26b46b/chunk/+7",
        "noblink/v1/edge-1/xfer/2c26b46b/chunk/7/8",
        "noblink/v1/edge-1/xfer/2c26b46b/chunk/4294967296",
        "noblink/v1/edge-1/xfer/2c26b46/chunk/7",
        "noblink/v1/edge-1/xfer/../../xx/chunk/7",
        "noblink/v1/edge-1/xfer/2c26b46b/chunk/",
    ] {
        assert_eq!(topics.parse_chunk(wrong), None, "{wrong}");
    }
}

/// What the network does to one chunk.
#[derive(Debug, Clone, Copy)]
enum Fate {
    Arrives,
    Lost,
    Twice,
    Late,
    BitFlipped(usize),
    Cut(usize),
    WrongIndex(u32),
}

fn fate() -> impl Strategy<Value = Fate> {
    prop_oneof![
        4 => Just(Fate::Arrives),
        1 => Just(Fate::Lost),
        1 => Just(Fate::Twice),
        1 => Just(Fate::Late),
        1 => (0..CHUNK_SIZE).prop_map(Fate::BitFlipped),
        1 => (0..CHUNK_SIZE).prop_map(Fate::Cut),
        1 => (0..60_u32).prop_map(Fate::WrongIndex),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn whatever_the_network_does_the_bytes_are_right(
        length in 1..(40 * CHUNK_SIZE),
        fates in prop::collection::vec(fate(), 1..200),
        held in prop::collection::vec(any::<bool>(), 0..40),
    ) {
        let file = noise(length as u64, length);
        let count = length.div_ceil(CHUNK_SIZE);
        let held: Vec<bool> = held.into_iter().take(count).collect();
        let mut state = transfer(&file, &held);
        let mut copy = vec![0; length];
        for (i, there) in held.iter().enumerate() {
            let range = i * CHUNK_SIZE..((i + 1) * CHUNK_SIZE).min(length);
            if *there {
                copy[range.clone()].copy_from_slice(&file[range]);
            }
        }
        let mut now = Instant::now();
        let mut late: Vec<(u32, Vec<u8>)> = Vec::new();
        // After the bad luck is used up, the network is a good one: then it must converge.
        let mut fates = fates.into_iter();
        let (mut wishes, mut misdirected) = (0, false);
        while !state.is_whole() {
            prop_assert!(wishes < 400, "it does not converge: {:?}", state.tally);
            let Some(want) = state.want(now, 0.5) else {
                now = state.due().unwrap();
                continue;
            };
            wishes += 1;
            prop_assert!(want.count <= WANT_COUNT_MAX && (1..=count).contains(&want.indices(length as u64).len()));
            let mut air = std::mem::take(&mut late);
            for index in want.indices(length as u64) {
                let chunk = chunk_payload(&file, index).unwrap();
                match fates.next().unwrap_or(Fate::Arrives) {
                    Fate::Arrives => air.push((index, chunk)),
                    Fate::Lost => {}
                    Fate::Twice => air.extend([(index, chunk.clone()), (index, chunk)]),
                    Fate::Late => late.push((index, chunk)),
                    Fate::BitFlipped(at) => {
                        let mut chunk = chunk;
                        let at = at % chunk.len();
                        chunk[at] ^= 1;
                        air.push((index, chunk));
                    }
                    Fate::Cut(at) => air.push((index, chunk[..at % chunk.len()].to_vec())),
                    Fate::WrongIndex(other) => air.push((other, chunk)),
                }
            }
            air.reverse();
            for (index, payload) in air {
                if let Ok(taken) = state.on_chunk(now, index, &payload) {
                    let at = taken.offset as usize;
                    prop_assert!(at + taken.data.len() <= length);
                    misdirected |= taken.data != &file[at..at + taken.data.len()];
                    copy[at..at + taken.data.len()].copy_from_slice(taken.data);
                }
            }
        }
        // A chunk that someone sends under the index of another one has a right hash: nothing but
        // the digest of the whole can tell, and it does.
        prop_assert_eq!(Digest::of(&copy) == Digest::of(&file), !misdirected);
        prop_assert_eq!(state.received(), length as u64);
    }
}
