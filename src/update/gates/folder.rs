//! A calibration folder: `images/`, `labels/` (YOLO text) and the class names of `data.yaml`.
//!
//! The layout is that of Ultralytics' datasets, so that a site's validation set can be used as it
//! is. Of YAML only the `names` are read, in the three forms in which they are written; a full
//! parser would be a dependency for one key.

use std::path::{Path, PathBuf};

use crate::model::labels;

/// Most pictures that are used; of more, every n-th.
pub(super) const PICTURES_MAX: usize = 500;

/// An object of a picture, by a person's word.
#[derive(Debug, Clone, PartialEq)]
pub struct Truth {
    /// Index into the names of `data.yaml`.
    pub class: usize,
    /// `x1, y1, x2, y2` as fractions of the picture.
    pub corners: [f32; 4],
}

/// A picture of the folder.
#[derive(Debug, Clone)]
pub(in crate::update) struct Sample {
    pub(in crate::update) image: PathBuf,
    /// `None` = nobody labelled it; empty = nothing is in it.
    pub(super) truth: Option<Vec<Truth>>,
}

/// A folder, read and checked; its pictures are not decoded yet.
#[derive(Debug, Clone, Default)]
pub(in crate::update) struct Folder {
    pub(super) names: Vec<String>,
    pub(in crate::update) samples: Vec<Sample>,
    /// Pictures beyond [`PICTURES_MAX`].
    pub(super) left_out: usize,
}

impl Folder {
    /// Reads a folder; the error completes "the calibration folder DIR …".
    pub(in crate::update) fn read(dir: &Path) -> Result<Self, String> {
        let images = dir.join("images");
        let entries =
            std::fs::read_dir(&images).map_err(|e| format!("has no readable images/: {e}"))?;
        let mut files: Vec<PathBuf> = entries
            .filter_map(|entry| Some(entry.ok()?.path()))
            .filter(|path| {
                let extension = path.extension().unwrap_or_default().to_ascii_lowercase();
                ["jpg", "jpeg", "png"].iter().any(|known| extension == *known)
            })
            .collect();
        if files.is_empty() {
            return Err("has no .jpg or .png in images/".into());
        }
        files.sort_unstable();
        let step = files.len().div_ceil(PICTURES_MAX);
        let all = files.len();
        let files: Vec<_> = files.into_iter().step_by(step).collect();
        let left_out = all - files.len();

        let names = match std::fs::read_to_string(dir.join("data.yaml")) {
            Ok(text) => names(&text).map_err(|why| format!("has a data.yaml that {why}"))?,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Vec::new(),
            Err(e) => return Err(format!("has no readable data.yaml: {e}")),
        };
        let mut samples = Vec::with_capacity(files.len());
        for image in files {
            let stem = image.file_stem().unwrap_or_default().to_string_lossy().into_owned();
            let file = dir.join("labels").join(format!("{stem}.txt"));
            let truth = match std::fs::read_to_string(&file) {
                Ok(text) => Some(
                    boxes(&text, names.len()).map_err(|why| format!("labels/{stem}.txt {why}"))?,
                ),
                Err(e) if e.kind() == std::io::ErrorKind::NotFound => None,
                Err(e) => return Err(format!("labels/{stem}.txt can't be read: {e}")),
            };
            samples.push(Sample { image, truth });
        }
        Ok(Self { names, samples, left_out })
    }

    /// Objects that are labelled.
    pub(super) fn objects(&self) -> usize {
        self.samples.iter().filter_map(|s| s.truth.as_ref()).map(Vec::len).sum()
    }
}

/// `class x y w h` in each line, centre and size as fractions; or `class x1 y1 x2 y2 x3 y3 …`, an
/// outline, whose bounds are taken as Ultralytics does. The error completes "labels/x.txt …".
///
/// # Errors
/// A line is neither, or its class is none of `classes`.
pub fn boxes(text: &str, classes: usize) -> Result<Vec<Truth>, String> {
    let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
    lines
        .map(|(n, line)| {
            let wrong = |why: &str| format!("line {}: {why}", n + 1);
            let mut fields = line.split_whitespace();
            let class = fields.next().unwrap_or_default();
            let class: usize = class
                .parse()
                .map_err(|_| wrong(&format!("class {class:?} is no whole number from 0")))?;
            if class >= classes {
                return Err(wrong(&format!(
                    "class {class} has no name: data.yaml names {classes} classes"
                )));
            }
            let numbers: Vec<f32> = fields
                .map(|f| f.parse().ok().filter(|v: &f32| (-0.01..=1.01).contains(v)))
                .collect::<Option<_>>()
                .ok_or_else(|| wrong("holds something else than fractions from 0 to 1"))?;
            let corners = match numbers[..] {
                [x, y, w, h] => {
                    // Rounding may leave a side a little below 0, as it may a corner.
                    let (half_w, half_h) = (w.max(0.0) / 2.0, h.max(0.0) / 2.0);
                    [x - half_w, y - half_h, x + half_w, y + half_h]
                }
                _ if numbers.len() >= 6 && numbers.len().is_multiple_of(2) => bounds(&numbers),
                _ => return Err(wrong("is not `class x y w h`")),
            };
            Ok(Truth { class, corners: corners.map(|v| v.clamp(0.0, 1.0)) })
        })
        .collect()
}

fn bounds(outline: &[f32]) -> [f32; 4] {
    let mut around = [f32::MAX, f32::MAX, f32::MIN, f32::MIN];
    for point in outline.chunks_exact(2) {
        for axis in 0..2 {
            around[axis] = around[axis].min(point[axis]);
            around[axis + 2] = around[axis + 2].max(point[axis]);
        }
    }
    around
}

/// The list under `names`: in one line as JSON or Python would write it, or one name a line, as
/// `- person` or `0: person`. The error completes "data.yaml …".
///
/// # Errors
/// There is no such list, or it leaves classes without a name.
pub fn names(text: &str) -> Result<Vec<String>, String> {
    let mut lines = text.lines().map(without_comment).skip_while(|l| !l.starts_with("names:"));
    let Some(first) = lines.next() else { return Err("has no `names`".into()) };
    let inline = first["names:".len()..].trim();
    if !inline.is_empty() {
        return inline_names(inline);
    }
    let mut found: Vec<Option<String>> = Vec::new();
    for line in lines {
        let item = line.trim();
        if item.is_empty() {
            continue;
        }
        let listed = item.strip_prefix("- ");
        // A list may stand at the left edge; anything else there is the next key.
        if listed.is_none() && !line.starts_with([' ', '\t']) {
            break;
        }
        let (class, name) = match (listed, item.split_once(':')) {
            (Some(name), _) => (found.len(), name),
            (None, Some((class, name))) => {
                let class = plain(class);
                let number = class.parse().ok().filter(|n| *n < 10_000_usize);
                (number.ok_or(format!("has a class {class:?} that is no number"))?, name)
            }
            (None, None) => return Err(format!("has {item:?} among its `names`")),
        };
        if found.len() <= class {
            found.resize(class + 1, None);
        }
        found[class] = Some(plain(name));
    }
    let complete: Option<Vec<String>> = found.into_iter().collect();
    complete.filter(|names| !names.is_empty()).ok_or("leaves classes without a name".into())
}

/// `[a, b]`, `{0: a, 1: b}`, quoted or not.
fn inline_names(text: &str) -> Result<Vec<String>, String> {
    let names = if text.contains(['"', '\'']) {
        labels::parse(text).map_err(|why| format!("has `names` that {why}"))?
    } else {
        bare_names(text)?
    };
    if names.is_empty() { Err("has `names` without a name".into()) } else { Ok(names) }
}

/// `[a, b]`, `{0: a, 1: b}`.
fn bare_names(text: &str) -> Result<Vec<String>, String> {
    let inside = text
        .strip_prefix('[')
        .and_then(|t| t.strip_suffix(']'))
        .or_else(|| text.strip_prefix('{').and_then(|t| t.strip_suffix('}')))
        .ok_or("has `names` that are no list in one line")?;
    let items = inside.split(',').filter(|item| !item.trim().is_empty()).enumerate();
    items
        .map(|(n, item)| match item.split_once(':') {
            Some((class, name)) if plain(class).parse() == Ok(n) => Ok(plain(name)),
            Some(_) => Err("has `names` whose classes are not 0, 1, 2, …".into()),
            None => Ok(plain(item)),
        })
        .collect()
}

fn without_comment(line: &str) -> &str {
    let quoted = line.contains(['"', '\'']);
    match line.find(" #") {
        Some(at) if !quoted => line[..at].trim_end(),
        _ if line.starts_with('#') => "",
        _ => line.trim_end(),
    }
}

/// A scalar without its quotes.
fn plain(text: &str) -> String {
    let text = text.trim();
    let inside = |quote: char| text.strip_prefix(quote).and_then(|t| t.strip_suffix(quote));
    inside('"').or_else(|| inside('\'')).unwrap_or(text).to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_in_the_forms_that_people_write() {
        for text in [
            "names:\n  0: plate\n  1: dent\n",
            "# drawn\npath: .\nnames:   # two\n  - plate\n  - 'dent' \nnc: 2\n",
            "names:\n- plate\n- dent\nnc: 2\n",
            "nc: 2\nnames: [plate, dent]\n",
            "names: ['plate', \"dent\"]\n",
            "names: {0: plate, 1: dent}\n",
            "names:\n  1: dent\n  0: \"plate\"\n\ntrain: images\n",
        ] {
            assert_eq!(names(text).as_deref(), Ok(&["plate".into(), "dent".into()][..]), "{text}");
        }
        for text in [
            "path: .\n",
            "names:\n",
            "names:\n  1: dent\n",
            "names: plate\n",
            "names: []\n",
            "names: {}\n",
        ] {
            assert!(names(text).is_err(), "{text}");
        }
    }

    #[test]
    fn labels_are_boxes_or_outlines() {
        let read = |text: &str| boxes(text, 2);
        let found = read("1 0.5 0.5 0.2 0.4\n\n0 0.1 0.1 0.3 0.1 0.2 0.5\n").unwrap();
        assert_eq!((found[0].class, found[1].corners), (1, [0.1, 0.1, 0.3, 0.5]));
        assert!((found[0].corners[3] - 0.7).abs() < 1e-6);
        for (text, why) in [
            ("2 0.5 0.5 0.1 0.1", "line 1: class 2 has no name: data.yaml names 2 classes"),
            ("0 320 200 10 10", "line 1: holds something else than fractions from 0 to 1"),
            ("0 0.5 0.5", "line 1: is not `class x y w h`"),
            ("x 0.5 0.5 0.1 0.1", "line 1: class \"x\" is no whole number from 0"),
        ] {
            assert_eq!(read(text).unwrap_err(), why);
        }
    }
}
