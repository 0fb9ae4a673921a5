//! The gates that only read the file: structure and contract.

use serde_json::json;

use super::super::digest::Digest;
use super::super::job::{Gate, Reason, Verdict};
use super::{failed, gate};
use crate::model::contract::{Contract, Overrides};
use crate::model::file::ModelFile;
use crate::model::onnx::Scan;
use crate::model::refusal::Refusal;
use crate::text::{brief, first};

/// Labels, operator domains, that a report names.
const REPORTED_MAX: usize = 100;

/// What a file is held against.
#[derive(Debug, Clone, Copy)]
pub struct Rules<'a> {
    /// What the manifest says instead of the file.
    pub overrides: &'a Overrides,
    /// Operator domains allowed beyond the common ones.
    pub domains: &'a [String],
    /// Labels of the active model.
    pub active: Option<&'a [String]>,
    /// Labels may be missing that the active model has.
    pub allow_removed_labels: bool,
}

/// What reading told.
#[derive(Debug)]
pub struct Content {
    /// `structure`, and `contract` if it came to that.
    pub gates: Vec<Gate>,
    /// The model, or why not.
    pub file: Result<ModelFile, Reason>,
}

/// Judges a file by its bytes, whose digest is known; `name` is the one that it came with.
pub fn examine(bytes: Vec<u8>, digest: &Digest, name: &str, rules: &Rules<'_>) -> Content {
    let size = bytes.len();
    let scan = match ModelFile::look(&bytes, name, rules.domains) {
        Ok(scan) => scan,
        Err(refusal) => {
            let reason = reason(refusal);
            let gates = vec![failed("structure", &reason, json!({ "bytes": size }))];
            return Content { gates, file: Err(reason) };
        }
    };
    let mut gates = vec![structure(&scan, size)];
    let file = ModelFile::settle(bytes, digest.to_string(), scan, name, rules.overrides);
    let file = file.map_err(reason);
    let file = match file {
        Ok(file) => {
            let (gate, refused) = contract(&file.contract, rules);
            gates.push(gate);
            refused.map_or(Ok(file), Err)
        }
        Err(reason) => {
            gates.push(failed("contract", &reason, json!({})));
            Err(reason)
        }
    };
    Content { gates, file }
}

pub(super) fn reason(refusal: Refusal) -> Reason {
    Reason::new(refusal.code.name(), refusal.message)
}

fn structure(scan: &Scan, size: usize) -> Gate {
    let message = format!(
        "one file of {:.2} MB, {} nodes, nothing outside of it",
        size as f64 / 1e6,
        scan.nodes
    );
    let opsets = scan.opsets.iter().map(|(domain, version)| (brief(domain, 60), version));
    let numbers = json!({
        "bytes": size,
        "nodes": scan.nodes,
        "initializer_bytes": scan.initializer_bytes,
        "ir_version": scan.ir_version,
        "opsets": opsets.collect::<Vec<_>>(),
        "op_domains": reported(&scan.op_domains),
        "producer": brief(format!("{} {}", scan.producer, scan.producer_version).trim(), 60),
    });
    gate("structure", Verdict::Passed, message, numbers)
}

fn contract(contract: &Contract, rules: &Rules<'_>) -> (Gate, Option<Reason>) {
    let labels = &contract.labels;
    let missing = |from: &[String], among: &[String]| -> Vec<String> {
        from.iter().filter(|label| !among.contains(label)).cloned().collect()
    };
    let removed = rules.active.map(|active| missing(active, labels)).unwrap_or_default();
    let added = rules.active.map(|active| missing(labels, active)).unwrap_or_default();
    let input = &contract.input;
    let numbers = json!({
        "layout": contract.layout,
        "input": [1, 3, input.height, input.width],
        "dtype": input.dtype,
        "output": contract.output.shape,
        "labels": labels.len(),
        "labels_added": reported(&added),
        "labels_removed": reported(&removed),
    });
    if !removed.is_empty() && !rules.allow_removed_labels {
        let reason = Reason::new(
            "label_removed",
            format!(
                "the active model knows {}, this one does not: allow it with \
                 allow_removed_labels (--allow-removed-labels) if that is meant",
                quoted(&removed)
            ),
        );
        return (failed("contract", &reason, numbers), Some(reason));
    }
    let mut message = format!(
        "{} with {}x{} input and {} labels",
        contract.layout.name(),
        input.width,
        input.height,
        labels.len()
    );
    if !added.is_empty() {
        message += &format!(", new: {}", quoted(&added));
    }
    if !removed.is_empty() {
        message += &format!(", removed as allowed: {}", quoted(&removed));
    }
    (gate("contract", Verdict::Passed, message, numbers), None)
}

/// The first of a list of labels, in quotes.
fn quoted(labels: &[String]) -> String {
    let quoted: Vec<_> = labels.iter().map(|label| format!("{:?}", brief(label, 60))).collect();
    first(&quoted, 5)
}

/// What a report names of a list: with all else it must fit into an MQTT packet.
fn reported(texts: &[String]) -> Vec<String> {
    texts.iter().take(REPORTED_MAX).map(|text| brief(text, 60)).collect()
}
