//! What a dead service left in its `state_dir`, and the invariants that hold there at any instant.

use std::path::Path;

use noblink::update::job::State;
use noblink::update::keeper::Keeper;

/// Opens what is there, which must not be damaged.
pub fn open(dir: &Path) -> Keeper {
    let (keeper, notices) = Keeper::open(dir, 0, 1_000).unwrap();
    assert!(notices.is_empty(), "{notices:?}");
    keeper
}

/// The invariants of an update that can be seen in the store, after any kill.
pub fn check(dir: &Path) -> State {
    let keeper = open(dir);
    let state = keeper.state();
    // I1, I3: what the slot names is there, whole.
    for digest in [state.slot.active, state.slot.previous].into_iter().flatten() {
        keeper.store().load(&digest).expect("active and previous are whole");
        assert!(!state.quarantine.contains_key(&digest), "a failed model is in the slot");
    }
    for digest in keeper.store().list().unwrap() {
        keeper.store().load(&digest).expect("a blob is whole or not there");
    }
    // I4: at most one terminal state each.
    for job in keeper.registry().jobs(usize::MAX).unwrap() {
        let changes = keeper.registry().changes(job.serial).unwrap();
        let terminal = |s: &str| !matches!(s, "QUEUED" | "IN_PROGRESS");
        let ends = changes.iter().filter(|c| terminal(&c.state)).count();
        assert_eq!(ends, usize::from(job.state.is_terminal()), "{job:?}: {changes:?}");
    }
    state.clone()
}

/// A copy of a whole folder.
pub fn copy_dir(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        let kind = entry.file_type().unwrap();
        if kind.is_dir() {
            copy_dir(&entry.path(), &target);
        } else if kind.is_file() {
            std::fs::copy(entry.path(), &target).unwrap();
        }
    }
}
