//! The cameras of the service, which come, change and go while the others run.
//!
//! For each: its supervisor, its lane in the intake, its switch. Owned by the main thread, which
//! applies configurations and commands and looks once a second whether a supervisor is stuck.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tracing::{error, warn};

use crate::app::now_us;
use crate::camera::templates::Templates;
use crate::camera::{Camera, CameraStatus, LEAVE_WITHIN, State};
use crate::config;
use crate::meter::Meter;
use crate::preview::Previews;
use crate::queue::{Inlet, Intake};
use crate::snapshot::CameraSnapshot;
use crate::switches::Switches;

/// How often it is looked whether the supervisors' hearts beat: not more often, so that a process
/// that was stopped for a while does not find all of them still.
const LOOK_EVERY: Duration = Duration::from_millis(900);
/// Threads that hang, each with what it holds, that the process lives with.
const LEAKED_MAX: u64 = 8;
/// After so many looks without a beat a supervisor is stuck; the slowest beats within 3 s.
const STUCK_AFTER: u32 = 10;

/// See the module.
pub struct Fleet {
    intake: Arc<Intake>,
    meter: Arc<Meter>,
    templates: Arc<Templates>,
    switches: Switches,
    previews: Arc<Previews>,
    /// In the order of the configuration.
    members: Vec<Member>,
    /// Those that the configuration has no more.
    leaving: Vec<Member>,
    looked: Instant,
}

struct Member {
    settings: Arc<config::Camera>,
    inlet: Inlet,
    camera: Camera,
    /// Its supervisor's heartbeat, and how often it was found still.
    heart: (u64, u32),
    /// The last word, once it was told to end.
    last: Option<CameraStatus>,
}

/// What a new configuration did, by camera id.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Changes {
    /// New ones.
    pub added: Vec<String>,
    /// With other settings than before.
    pub changed: Vec<String>,
    /// Those that are no more.
    pub removed: Vec<String>,
    /// Those that were there in an earlier life of the process only.
    pub gone: Vec<String>,
    /// What did not work.
    pub failed: Vec<String>,
}

/// Why a camera was not switched.
#[derive(Debug, thiserror::Error)]
pub enum SwitchError {
    /// There is none with this id.
    #[error("there is no camera \"{id}\"; there {known}")]
    Unknown {
        /// As it was asked for.
        id: String,
        /// What there is.
        known: String,
    },
    /// It is switched, but that will not outlive a restart.
    #[error("camera {id} is switched until the next start only: {error}")]
    Forgetful {
        /// The camera.
        id: String,
        /// Why.
        error: io::Error,
    },
}

impl SwitchError {
    /// The error, for programs.
    pub fn code(&self) -> &'static str {
        match self {
            Self::Unknown { .. } => "unknown_camera",
            Self::Forgetful { .. } => "not_saved",
        }
    }
}

impl Fleet {
    /// A fleet without cameras.
    pub fn new(
        intake: Arc<Intake>,
        meter: Arc<Meter>,
        templates: Templates,
        state_dir: &Path,
        previews: Arc<Previews>,
    ) -> Self {
        let (templates, switches) = (Arc::new(templates), Switches::open(state_dir));
        let (members, leaving, looked) = (Vec::new(), Vec::new(), Instant::now());
        Self { intake, meter, templates, switches, previews, members, leaving, looked }
    }

    /// Makes the cameras those of a configuration. The ones that it leaves as they are notice
    /// nothing; one whose stream stays the same keeps its connection.
    pub fn apply(&mut self, cameras: &[config::Camera]) -> Changes {
        let mut changes = Changes::default();
        let mut before = std::mem::take(&mut self.members);
        for settings in cameras {
            let (id, settings) = (settings.id.clone(), Arc::new(settings.clone()));
            let known = before.iter().position(|m| m.settings.id == id);
            let member = match known.map(|at| before.remove(at)) {
                Some(member) if member.settings == settings => Ok(member),
                Some(mut member) => {
                    if let Err(e) = self.change(&mut member, settings) {
                        changes.failed.push(format!("camera {id}: {e}"));
                    }
                    changes.changed.push(id.clone());
                    Ok(member)
                }
                None => {
                    changes.added.push(id.clone());
                    self.add(settings)
                }
            };
            match member {
                Ok(member) => self.members.push(member),
                Err(e) => changes.failed.push(format!("camera {id}: {e}")),
            }
        }
        for mut member in before {
            changes.removed.push(member.settings.id.clone());
            member.end(Some(State::Removed));
            self.intake.remove(&member.inlet);
            self.leaving.push(member);
        }
        let ids: Vec<_> = cameras.iter().map(|c| c.id.as_str()).collect();
        changes.gone = self.switches.keep(&ids);
        changes.gone.retain(|id| !changes.removed.contains(id));
        changes
    }

    fn add(&mut self, settings: Arc<config::Camera>) -> io::Result<Member> {
        let inlet = self.open(&settings);
        let (on, templates) = (self.switches.is_on(&settings.id), Arc::clone(&self.templates));
        // One that was removed a moment ago may still be leaving.
        let left = self.leaving.iter().position(|m| m.settings.id == settings.id);
        let camera = match left.map(|at| self.leaving.swap_remove(at).camera) {
            Some(mut camera) => {
                camera.set_enabled(on);
                camera.succeed(Arc::clone(&settings), inlet.clone(), templates)?;
                camera
            }
            None => Camera::start(Arc::clone(&settings), inlet.clone(), templates, on)?,
        };
        Ok(Member { settings, inlet, camera, heart: (0, 0), last: None })
    }

    fn change(&self, member: &mut Member, settings: Arc<config::Camera>) -> io::Result<()> {
        self.open(&settings);
        let before = std::mem::replace(&mut member.settings, settings);
        match before.streams_like(&member.settings) {
            true => Ok(()),
            false => member.renew(&self.templates),
        }
    }

    /// The camera's lane, open if it is on.
    fn open(&self, settings: &Arc<config::Camera>) -> Inlet {
        let inlet = self.intake.open(settings);
        if !self.switches.is_on(&settings.id) {
            self.intake.disable(&inlet);
        }
        self.meter.seat(inlet.index());
        // People may look at a camera that has not sent anything yet.
        self.previews.tap(&settings.id);
        inlet
    }

    /// Switches a camera off or on again, to outlive a restart.
    pub fn switch(&mut self, id: &str, on: bool) -> Result<(), SwitchError> {
        let Some(member) = self.members.iter().find(|m| m.settings.id == id) else {
            let ids: Vec<_> = self.members.iter().map(|m| &*m.settings.id).collect();
            let known = match &ids[..] {
                [] => "is none at all".to_owned(),
                ids => format!("are: {}", ids.join(", ")),
            };
            return Err(SwitchError::Unknown { id: id.to_owned(), known });
        };
        if on {
            self.intake.open(&member.settings);
        } else {
            self.intake.disable(&member.inlet);
        }
        member.camera.set_enabled(on);
        let saved = self.switches.set(id, on);
        saved.map_err(|error| SwitchError::Forgetful { id: id.to_owned(), error })
    }

    /// The cameras of the configuration.
    pub fn settings(&self) -> impl Iterator<Item = &config::Camera> {
        self.members.iter().map(|m| &*m.settings)
    }

    /// Every camera now.
    pub fn snapshot(&self) -> Vec<CameraSnapshot> {
        let lanes = self.intake.snapshot();
        let one = |member: &Member| CameraSnapshot {
            id: member.settings.id.clone(),
            source: member.settings.source.to_string(),
            status: member.last.clone().unwrap_or_else(|| member.camera.status()),
            lane: lanes[member.inlet.index()].clone(),
        };
        self.members.iter().chain(&self.leaving).map(one).collect()
    }

    /// The end of the removed ones was told: they are forgotten.
    pub fn forget_removed(&mut self) {
        self.leaving.clear();
    }

    /// Replaces supervisors that are stuck, or ended in a panic.
    pub fn heal(&mut self, now: Instant) {
        if now.duration_since(self.looked) < LOOK_EVERY {
            return;
        }
        self.looked = now;
        for member in &mut self.members {
            let beats = member.camera.heartbeat();
            match &mut member.heart {
                (before, still) if *before == beats => *still += 1,
                heart => *heart = (beats, 0),
            }
            if member.heart.1 >= STUCK_AFTER {
                let id = &member.settings.id;
                error!("camera {id}: its supervisor is stuck, another takes its place");
                if let Err(e) = member.renew(&self.templates) {
                    error!("camera {}: {e}", member.settings.id);
                }
            }
        }
    }

    /// Ends all supervisors; what they said last stays in the snapshot.
    pub fn stop(&mut self) {
        self.members.iter_mut().for_each(|m| m.end(None));
        let deadline = Instant::now() + LEAVE_WITHIN;
        for member in self.members.iter_mut().chain(&mut self.leaving) {
            if !member.camera.join(deadline) {
                let id = &member.settings.id;
                warn!("camera {id}: its thread does not end; it is left behind");
            }
        }
    }
}

impl Member {
    /// Another supervisor, by the settings that it has now.
    fn renew(&mut self, templates: &Arc<Templates>) -> io::Result<()> {
        self.heart = (0, 0);
        let (settings, inlet) = (Arc::clone(&self.settings), self.inlet.clone());
        self.camera.succeed(settings, inlet, Arc::clone(templates))
    }

    /// Asks the supervisor to end; `state` is its last.
    fn end(&mut self, state: Option<State>) {
        let mut last = self.camera.status();
        if let Some(state) = state {
            (last.state, last.since_us) = (state, now_us());
            (last.reason, last.retry_in_s) = (None, None);
        }
        self.last = Some(last);
        self.camera.request_stop();
    }
}

/// Why only a new process helps: more threads than that hang for good.
pub fn beyond_repair(cameras: &[CameraSnapshot]) -> Option<String> {
    let leaked = |c: &CameraSnapshot| c.status.leaked_pipelines + c.status.leaked_supervisors;
    let total: u64 = cameras.iter().map(leaked).sum();
    let by_camera = cameras.iter().filter(|c| leaked(c) > 0);
    let by_camera: Vec<_> = by_camera.map(|c| format!("{} {}", c.id, leaked(c))).collect();
    (total > LEAKED_MAX).then(|| {
        format!(
            "{total} threads hang and were left behind, more than {LEAKED_MAX} (by camera: {}): \
             the process ends, to be started again",
            by_camera.join(", ")
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;

    #[test]
    fn a_stuck_supervisor_is_replaced_and_counted() {
        let dir = tempfile::tempdir().unwrap();
        let text = "[device]\nid = \"x\"\n[mqtt]\nembedded = true\n[[camera]]\nid = \"gate\"\n\
                    url = \"test://?width=320&height=240&fps=20\"\n";
        let config = Config::parse(text, dir.path()).unwrap();
        let intake = Arc::new(Intake::default());
        let mut fleet = Fleet::new(
            Arc::clone(&intake),
            Arc::default(),
            Templates::default(),
            dir.path(),
            Arc::new(Previews::start(|_, _, _| ()).unwrap()),
        );
        assert_eq!(fleet.apply(&config.cameras).added, ["gate"]);
        fleet.members[0].camera = Camera::stuck();
        while let Some(taken) = intake.take(Duration::from_secs(1)) {
            taken.inferred();
        }
        let start = Instant::now();
        (1..=STUCK_AFTER).for_each(|s| fleet.heal(start + Duration::from_secs(s.into())));
        intake.take(Duration::from_secs(15)).expect("the new supervisor's first frame").inferred();
        let gate = &fleet.snapshot()[0];
        assert_eq!(gate.status.leaked_supervisors, 1);
        assert!(gate.lane.ledger.is_exact());
        assert_eq!(beyond_repair(&fleet.snapshot()), None);
        fleet.members[0].camera.leak(LEAKED_MAX);
        let why = beyond_repair(&fleet.snapshot()).expect("nine are too many");
        assert!(why.starts_with("9 threads") && why.contains("gate 9"), "{why}");
        fleet.stop();
    }
}
