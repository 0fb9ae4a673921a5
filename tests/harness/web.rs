//! Where a service's page is, and who asks it.

use std::time::Duration;

use ureq::Agent;

use super::line::Line;

pub const LOOPBACK: &str = "[web]\nlisten = \"127.0.0.1:0\"";

/// Where the page of this service is.
pub fn page(line: &Line) -> String {
    let log = line.service.log();
    let (_, rest) = log.split_once("the page is at ").expect("it says where");
    rest.lines().next().unwrap().trim().to_owned()
}

/// Every answer is one, whatever its status.
pub fn agent() -> Agent {
    let config = Agent::config_builder().http_status_as_error(false);
    Agent::new_with_config(config.timeout_global(Some(Duration::from_secs(60))).build())
}
