//! The short forms of what `make soak` does two hundred times and at every failpoint.

use crate::harness::kills::{at_failpoints, at_random};
use crate::harness::restarts;

#[test]
fn kills_at_random_moments_leave_a_service_that_infers_and_takes_the_next_model() {
    at_random(8, 0x2545_f491_4f6c_dd1d);
}

#[test]
fn kills_at_failpoints_of_a_whole_service_leave_the_old_model_or_the_new_one() {
    assert!(at_failpoints(8) > 3, "an install passes more");
}

#[test]
fn a_service_under_load_detects_again_after_each_kill() {
    restarts::under_load(4, 0x5851_f42d_4c95_7f2d);
}
