//! `[models]` and `[models.calibration]`: how a model comes in, and what it must show before it runs.

use std::path::PathBuf;

use super::reader::Section;
use crate::update::fetch::{self, AllowedHost};
use crate::update::signature::PublicKey;

/// `[models]`
#[derive(Debug, Clone)]
pub struct Models {
    /// The model to start with when the store has none.
    pub factory: Option<PathBuf>,
    /// The directory that is watched; `None` = `inbox` in `state_dir`.
    pub inbox: Option<PathBuf>,
    /// Minisign keys; once there is one, every install needs a signature.
    pub public_keys: Vec<String>,
    /// Stages of manifests that are accepted; `None` = any.
    pub accept_stages: Option<Vec<String>>,
    /// How long a new model is watched before it is committed, seconds.
    pub probation_s: u64,
    /// How much slower than the active model a new one may be.
    pub latency_ratio_max: f64,
    /// Milliseconds per frame up to which a slower model is taken all the same.
    pub latency_budget_ms: Option<f64>,
    /// Operator domains that models may use beyond the common ones.
    pub custom_op_domains: Vec<String>,
    /// CPU seconds that a model may take for one step of its proving.
    pub proving_cpu_s: u64,
    /// Hosts that a model may be fetched from; empty = no URL is taken.
    pub allowed_hosts: Vec<AllowedHost>,
    /// PEM file with the roots to trust when a model is fetched, instead of the system's.
    pub ca_file: Option<PathBuf>,
    /// The most bytes of a model that are taken, by every way in.
    pub max_size: u64,
    /// `[models.calibration]`; `None` = no folder.
    pub calibration: Option<Calibration>,
}

impl Default for Models {
    fn default() -> Self {
        Self {
            factory: None,
            inbox: None,
            public_keys: Vec::new(),
            accept_stages: None,
            probation_s: 60,
            latency_ratio_max: 1.5,
            latency_budget_ms: None,
            custom_op_domains: Vec::new(),
            proving_cpu_s: 60,
            allowed_hosts: Vec::new(),
            ca_file: None,
            max_size: 512_000_000,
            calibration: None,
        }
    }
}

/// `[models.calibration]`: what a new model must find on the site's own pictures.
#[derive(Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Calibration {
    /// With `images/`, `labels/` and `data.yaml`.
    pub dir: PathBuf,
    /// Least share of the objects that must be found, of every class.
    pub min_recall: Option<f64>,
    /// Least share of the findings that must be right, of every class.
    pub min_precision: Option<f64>,
    /// How far recall, precision and AP50 may fall below the active model's.
    pub margin: f64,
    /// Objects to find in every picture that has as many.
    pub min_objects: Option<usize>,
}

impl Calibration {
    /// A folder with the rules that stand when nothing is configured.
    pub fn of(dir: PathBuf) -> Self {
        Self { dir, min_recall: None, min_precision: None, margin: 0.05, min_objects: None }
    }
}

pub(super) fn read(mut s: Section<'_, '_>) -> Option<Models> {
    let default = Models::default();
    let factory = s.path("factory", None);
    let inbox = s.path("inbox", None);
    let public_keys = s.strings("public_keys", "a list of minisign public keys (RWQ…)");
    for key in public_keys.iter().flatten() {
        if let Err(e) = PublicKey::parse(key) {
            s.problem("public_keys", &format!("holds \"{key}\": {e}"));
        }
    }
    let accept_stages = s.strings("accept_stages", "a list of stages, such as [\"production\"]");
    let probation_s = s.integer("probation_s", 0..=86_400, Some(default.probation_s as i64));
    let latency_ratio_max =
        s.number("latency_ratio_max", 1.0..=100.0, Some(default.latency_ratio_max));
    let latency_budget_ms = s.number("latency_budget_ms", 0.1..=60000.0, None);
    let custom_op_domains = s.strings("custom_op_domains", "a list of operator domains");
    let proving_cpu_s = s.integer("proving_cpu_s", 1..=3600, Some(default.proving_cpu_s as i64));
    let allowed_hosts = s.parsed("allowed_hosts", fetch::ALLOWED_HOSTS, |h| h.parse().ok());
    let ca_file = s.path("ca_file", None);
    let max_size_mb = s.integer("max_size_mb", 1..=2000, Some(512));
    let calibration = calibration(s.table_or_empty("calibration"));
    s.finish();
    Some(Models {
        factory,
        inbox,
        public_keys: public_keys.unwrap_or_default(),
        accept_stages,
        probation_s: probation_s? as u64,
        latency_ratio_max: latency_ratio_max?,
        latency_budget_ms,
        custom_op_domains: custom_op_domains.unwrap_or_default(),
        proving_cpu_s: proving_cpu_s? as u64,
        allowed_hosts: allowed_hosts.unwrap_or_default(),
        ca_file,
        max_size: max_size_mb? as u64 * 1_000_000,
        calibration,
    })
}

fn calibration(mut s: Section<'_, '_>) -> Option<Calibration> {
    let dir = s.path("dir", None);
    let min_recall = s.number("min_recall", 0.0..=1.0, None);
    let min_precision = s.number("min_precision", 0.0..=1.0, None);
    let margin = s.number("margin", 0.0..=1.0, Some(0.05));
    let min_objects = s.integer("min_objects", 1..=300, None);
    if !s.has("dir") {
        for key in ["min_recall", "min_precision", "margin", "min_objects"] {
            if s.has(key) {
                s.problem("dir", &format!("is missing: {key} says what to ask of its pictures"));
                break;
            }
        }
    }
    s.finish();
    Some(Calibration {
        dir: dir?,
        min_recall,
        min_precision,
        margin: margin?,
        min_objects: min_objects.map(|n| n as usize),
    })
}
