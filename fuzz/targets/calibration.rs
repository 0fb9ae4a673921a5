//! The texts of a calibration folder: `data.yaml`, a zero byte, the labels of a picture. The first
//! is read as a model's `names` as well.

use noblink::model::labels;
use noblink::update::gates::folder::{boxes, names};

pub fn check(data: &[u8]) {
    let mut parts = data.splitn(2, |b| *b == 0);
    let mut text = || parts.next().and_then(|text| std::str::from_utf8(text).ok());
    let Some(yaml) = text() else { return };
    if let Ok(found) = labels::parse(yaml) {
        assert!(found.len() <= 10_000 && found.iter().all(|label| label.len() <= 256));
        let json = serde_json::to_string(&found).expect("texts become JSON");
        assert_eq!(labels::parse(&json).as_ref(), Ok(&found));
        assert_eq!(labels::parse(&python(&found)).as_ref(), Ok(&found));
        if !found.is_empty() {
            assert_eq!(names(&format!("names: {json}\n")).as_ref(), Ok(&found));
        }
    }
    let classes = match names(yaml) {
        Ok(found) => {
            assert!(!found.is_empty(), "no names are no list of names");
            found.len()
        }
        Err(_) => 3,
    };
    let Some(labels) = text() else { return };
    if let Ok(found) = boxes(labels, classes) {
        assert!(found.len() <= labels.lines().count());
        for truth in found {
            let [x1, y1, x2, y2] = truth.corners;
            assert!(truth.class < classes);
            assert!(0.0 <= x1 && x1 <= x2 && x2 <= 1.0, "{truth:?}");
            assert!(0.0 <= y1 && y1 <= y2 && y2 <= 1.0, "{truth:?}");
        }
    }
}

/// As `str()` of a Python dict, in which Ultralytics writes names.
fn python(labels: &[String]) -> String {
    let quoted = |label: &String| label.replace('\\', r"\\").replace('\'', r"\'");
    let entries = labels.iter().enumerate().map(|(n, label)| format!("{n}: '{}'", quoted(label)));
    format!("{{{}}}", entries.collect::<Vec<_>>().join(", "))
}
