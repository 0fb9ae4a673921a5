//! The outbox alone: nothing is lost without being counted, and order holds.

use std::collections::HashMap;

use noblink::mqtt::outbox::{Bounds, Cargo, Loan, Outbox, Reason, Record};
use proptest::prelude::*;

fn record(camera: &str, seq: u64, bytes: usize) -> Record {
    Record {
        camera: camera.into(),
        boot: "b".into(),
        seq,
        topic: format!("t/{camera}").into(),
        payload: vec![0; bytes],
    }
}

fn take_seq(outbox: &Outbox) -> Option<(i64, u64)> {
    match outbox.take()? {
        Loan { ticket, cargo: Cargo::Record(r) } => Some((ticket, r.seq)),
        loan => panic!("a record was expected, not {loan:?}"),
    }
}

#[test]
fn the_oldest_that_waits_goes_and_what_is_out_stays() {
    let outbox = Outbox::new(Bounds { records: 3, bytes: 1000 });
    for seq in 0..3 {
        outbox.push(record("a", seq, 1));
    }
    let (first, 0) = take_seq(&outbox).expect("one waits") else { panic!("not in order") };
    outbox.push(record("a", 3, 1));
    let Some(Loan { ticket, cargo: Cargo::Gap(gap) }) = outbox.take() else {
        panic!("an announcement was expected")
    };
    assert_eq!((gap.seq_from, gap.seq_to, gap.count), (1, 1, 1));
    outbox.rewind();
    assert!(matches!(outbox.take(), Some(Loan { cargo: Cargo::Gap(g), .. }) if g == gap));
    assert_eq!(take_seq(&outbox).map(|(_, seq)| seq), Some(0));
    assert_eq!(take_seq(&outbox).map(|(_, seq)| seq), Some(2));
    // A ticket of before the rewind still names the same record, a settled one nothing.
    outbox.acked(first);
    outbox.acked(first);
    outbox.acked(ticket);
    let stats = outbox.stats();
    assert!(stats.is_exact(), "{stats:?}");
    assert_eq!((stats.acked, stats.dropped, stats.in_flight, stats.queued), (1, 1, 1, 1));
}

#[test]
fn one_that_could_never_fit_does_not_drive_out_the_others() {
    let outbox = Outbox::new(Bounds { records: 10, bytes: 100 });
    outbox.push(record("a", 0, 50));
    outbox.push(record("a", 1, 101));
    outbox.push(record("a", 2, 50));
    let stats = outbox.stats();
    assert_eq!((stats.queued, stats.dropped, stats.bytes), (2, 1, 100));
}

#[test]
fn ranges_of_one_camera_grow_and_those_of_two_stay_apart() {
    let outbox = Outbox::new(Bounds { records: 2, bytes: 1000 });
    for seq in 0..5 {
        outbox.push(record("a", seq, 1));
        outbox.push(record("b", seq, 1));
    }
    let gaps: Vec<_> = std::iter::from_fn(|| match outbox.take()?.cargo {
        Cargo::Gap(gap) => Some((gap.camera.to_string(), gap.seq_from, gap.seq_to, gap.count)),
        Cargo::Record(_) => None,
    })
    .collect();
    assert_eq!(gaps, [("a".into(), 0, 3, 4), ("b".into(), 0, 3, 4)]);
}

#[derive(Debug, Clone)]
enum Step {
    Push { camera: usize, bytes: usize },
    Take,
    Ack(usize),
    Reject(usize, bool),
    GiveBack(usize),
    Rewind,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => (0..3usize, 0..40usize).prop_map(|(camera, bytes)| Step::Push { camera, bytes }),
        6 => Just(Step::Take),
        3 => any::<usize>().prop_map(Step::Ack),
        1 => (any::<usize>(), any::<bool>()).prop_map(|(n, announce)| Step::Reject(n, announce)),
        1 => any::<usize>().prop_map(Step::GiveBack),
        1 => Just(Step::Rewind),
    ]
}

proptest! {
    #[test]
    fn the_equation_and_the_order_hold_whatever_happens(
        steps in prop::collection::vec(step(), 0..300),
        records in 1..12usize,
        bytes in 1..200usize,
    ) {
        let outbox = Outbox::new(Bounds { records, bytes });
        let mut next = [0_u64; 3];
        let mut out: Vec<Loan> = Vec::new();
        // Greatest seq taken, by camera, since something was last put back.
        let mut last: HashMap<String, u64> = HashMap::new();
        let mut announced = 0;
        let mut silent = 0;
        let mut settled_records = 0;
        let mut spoken_rejects = 0;
        for step in steps {
            match step {
                Step::Push { camera, bytes } => {
                    outbox.push(record(["a", "b", "c"][camera], next[camera], bytes));
                    next[camera] += 1;
                }
                Step::Take => if let Some(loan) = outbox.take() {
                    if let Cargo::Record(r) = &loan.cargo {
                        let before = last.insert(r.camera.to_string(), r.seq);
                        prop_assert!(before.is_none_or(|b| b < r.seq), "{before:?} then {}", r.seq);
                    }
                    out.push(loan);
                },
                Step::Ack(n) if !out.is_empty() => {
                    let loan = out.remove(n % out.len());
                    match &loan.cargo {
                        Cargo::Gap(gap) => announced += gap.count,
                        Cargo::Record(_) => settled_records += 1,
                    }
                    outbox.acked(loan.ticket);
                }
                Step::Reject(n, announce) if !out.is_empty() => {
                    let loan = out.remove(n % out.len());
                    match &loan.cargo {
                        Cargo::Gap(gap) => silent += gap.count,
                        Cargo::Record(_) => {
                            settled_records += 1;
                            spoken_rejects += u64::from(announce);
                        }
                    }
                    outbox.rejected(loan.ticket, announce.then_some(Reason::TooLarge));
                }
                Step::GiveBack(n) if !out.is_empty() => {
                    outbox.give_back(out.remove(n % out.len()).ticket);
                    last.clear();
                }
                Step::Rewind => {
                    outbox.rewind();
                    out.clear();
                    last.clear();
                }
                _ => {}
            }
            let stats = outbox.stats();
            prop_assert!(stats.is_exact(), "{stats:?}");
            prop_assert!(stats.queued + stats.in_flight <= records as u64, "{stats:?}");
            prop_assert!(stats.bytes <= bytes as u64, "{stats:?}");
            prop_assert_eq!(stats.acked + stats.rejected, settled_records);
        }
        // What was lost is announced, to the last record.
        outbox.rewind();
        let stats = outbox.stats();
        let mut waiting = 0;
        while let Some(loan) = outbox.take() {
            if let Cargo::Gap(gap) = loan.cargo {
                waiting += gap.count;
            }
        }
        prop_assert_eq!(stats.dropped + spoken_rejects, announced + silent + waiting);
    }
}
