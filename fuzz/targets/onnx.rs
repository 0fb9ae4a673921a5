//! A model's file: foreign formats, the scan, structure, contract, labels.

use std::borrow::Cow;

use noblink::model::contract::{Contract, Overrides};
use noblink::model::file::Identity;
use noblink::model::layout::Layout;
use noblink::model::onnx::{Dim, Scan, scan};
use noblink::model::{foreign, labels, rewrite};
use noblink::update::digest::Digest;
use noblink::update::gates::{Content, Rules, content};
use noblink::update::manifest::is_id;

use super::sentence;

const LAYOUTS: [Layout; 5] =
    [Layout::Yolo8, Layout::Yolo5, Layout::Yolox, Layout::End2end, Layout::Rtdetr];

pub fn check(data: &[u8]) {
    if let Some(what) = foreign::recognise(data, "best.onnx") {
        sentence(&what);
    }
    match scan(data) {
        Ok(found) => scanned(data, &found),
        Err(why) => sentence(&why.to_string()),
    }
    let mut overrides = Overrides::default();
    let free = judged(data, &overrides);
    for layout in LAYOUTS {
        overrides.layout = Some(layout);
        let told = judged(data, &overrides);
        if let Some(told) = &told {
            assert_eq!(told.layout, layout);
        }
        // To say what was recognised changes nothing.
        if let Some(free) = free.as_ref().filter(|free| free.layout == layout) {
            assert_eq!(told.as_ref(), Some(free));
        }
    }
}

fn scanned(data: &[u8], found: &Scan) {
    // What is kept is no more than what was sent, names and all.
    let texts = found.metadata.iter().flat_map(|(k, v)| [k, v]);
    let texts = texts.chain(found.opsets.iter().map(|(domain, _)| domain));
    let texts = texts.chain(&found.op_domains).chain([&found.producer, &found.producer_version]);
    let values = found.inputs.iter().chain(&found.outputs);
    let dims = values.clone().flat_map(|v| v.dims.iter().flatten()).map(|d| match d {
        Dim::Named(name) => name.len(),
        _ => 0,
    });
    let kept: usize = texts.map(String::len).chain(values.map(|v| v.name.len())).chain(dims).sum();
    assert!(kept <= data.len(), "{kept} bytes of names out of {}", data.len());
    assert!(found.nodes <= data.len() / 2);
    // An unpacked number of two bytes may stand for eight.
    assert!(found.initializer_bytes <= 4 * data.len() as u64);
    // Bytes behind a model's end are refused, whatever the model.
    assert!(scan(&[data, &[0; 2]].concat()).is_err());
    // What is written anew for the CPU provider has the same inputs and outputs.
    if let Cow::Owned(anew) = rewrite::for_cpu(data, found, 2) {
        let anew = scan(&anew).expect("still a model");
        assert_eq!((anew.inputs, anew.outputs), (found.inputs.clone(), found.outputs.clone()));
    }
    // What comes out of its metadata does so from our own text as well.
    if let Some(Ok(names)) = found.metadata("names").map(labels::parse) {
        let json = serde_json::to_string(&names).expect("texts become JSON");
        assert_eq!(labels::parse(&json).as_ref(), Ok(&names));
    }
    let identity = Identity::guess(data, "Best Model.onnx");
    assert!(is_id(&identity.id), "{identity:?}");
    assert!(identity.version.chars().count() <= 64);
}

fn judged(data: &[u8], overrides: &Overrides) -> Option<Contract> {
    let active = ["person".to_owned()];
    let rules =
        Rules { overrides, domains: &[], active: Some(&active), allow_removed_labels: true };
    let Content { gates, file } = content(data.to_vec(), &Digest::of(data), "best.onnx", &rules);
    for gate in &gates {
        sentence(&gate.message);
    }
    // With the other gates it must fit into one MQTT packet.
    let told = serde_json::to_string(&gates).expect("gates become JSON").len();
    assert!(told <= 128 * 1024, "{told} bytes of report");
    let contract = match file {
        Ok(file) => file.contract,
        Err(reason) => {
            sentence(&reason.message);
            return None;
        }
    };
    let input = &contract.input;
    let sides = 32..=8192;
    assert!(sides.contains(&input.width) && sides.contains(&input.height), "{input:?}");
    assert!((1..=10_000).contains(&contract.labels.len()));
    assert!(contract.labels.iter().all(|label| label.len() <= 256));
    for (n, (name, size)) in contract.fixed.iter().enumerate() {
        assert!(*size > 0 && contract.fixed[..n].iter().all(|(other, _)| other != name));
    }
    Some(contract)
}
