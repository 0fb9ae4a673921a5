//! The launch templates in `pipelines/`: one small text per kind of source, ending where the
//! appsink begins.
//!
//! A template is looked up by name in the folders of [`Templates`], then among the copies built
//! into the program. Lines that start with `#` are comments. Nothing from the configuration is
//! pasted into the text except the whole numbers `{width}`, `{height}` and `{fps}` of `test://`:
//! addresses and logins are set as properties of the element named `source`.

use std::io;
use std::path::PathBuf;

/// The templates that came with the program.
const BUILT_IN: [(&str, &str); 9] = [
    ("file", include_str!("../../pipelines/file.launch")),
    ("rtsp", include_str!("../../pipelines/rtsp.launch")),
    ("rtsp-nvidia", include_str!("../../pipelines/rtsp-nvidia.launch")),
    ("rtsp-selfsigned", include_str!("../../pipelines/rtsp-selfsigned.launch")),
    ("rtsp-udp", include_str!("../../pipelines/rtsp-udp.launch")),
    ("rtsp-v4l2", include_str!("../../pipelines/rtsp-v4l2.launch")),
    ("rtsp-va", include_str!("../../pipelines/rtsp-va.launch")),
    ("test", include_str!("../../pipelines/test.launch")),
    ("v4l2", include_str!("../../pipelines/v4l2.launch")),
];

/// Where templates are looked for.
#[derive(Debug, Clone, Default)]
pub struct Templates {
    /// Folders with `<name>.launch` files, searched in order before the built-in ones.
    pub dirs: Vec<PathBuf>,
}

/// Why there is no template.
#[derive(Debug, thiserror::Error)]
pub enum TemplateError {
    /// No folder has it, nor the program.
    #[error(
        "no pipeline \"{name}\": looked for {name}.launch in {looked}; built in are {built_in}"
    )]
    Missing {
        /// As it was asked for.
        name: String,
        /// The folders.
        looked: String,
        /// The names of the built-in ones.
        built_in: String,
    },
    /// The file is there, but can't be read.
    #[error("{}: {error}", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// Why.
        error: io::Error,
    },
    /// Nothing but comments.
    #[error("pipeline \"{0}\" holds nothing but comments")]
    Empty(String),
}

impl Templates {
    /// The text of a template without its comments. Read afresh every time, so that an edit counts
    /// from the camera's next attempt on.
    pub fn find(&self, name: &str) -> Result<String, TemplateError> {
        for dir in &self.dirs {
            let path = dir.join(format!("{name}.launch"));
            match std::fs::read_to_string(&path) {
                Ok(text) => return strip(name, &text),
                Err(e) if e.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(TemplateError::Unreadable { path, error }),
            }
        }
        match BUILT_IN.iter().find(|(n, _)| *n == name) {
            Some((_, text)) => strip(name, text),
            None => Err(TemplateError::Missing {
                name: name.to_owned(),
                looked: match &self.dirs[..] {
                    [] => "no folder".to_owned(),
                    dirs => join(dirs.iter().map(|d| d.display().to_string())),
                },
                built_in: join(BUILT_IN.iter().map(|(n, _)| (*n).to_owned())),
            }),
        }
    }
}

fn join(names: impl Iterator<Item = String>) -> String {
    names.collect::<Vec<_>>().join(", ")
}

fn strip(name: &str, text: &str) -> Result<String, TemplateError> {
    let lines = text.lines().map(str::trim).filter(|l| !l.is_empty() && !l.starts_with('#'));
    let text = lines.collect::<Vec<_>>().join(" ");
    if text.is_empty() { Err(TemplateError::Empty(name.to_owned())) } else { Ok(text) }
}
