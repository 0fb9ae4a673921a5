//! Where a camera's pictures come from, read out of its URL.

use std::fmt;
use std::path::PathBuf;

use url::Url;

/// A checked source. `Display` and `Debug` mask credentials.
#[derive(Clone, PartialEq, Eq)]
pub enum Source {
    /// `rtsp://` or `rtsps://`
    Rtsp(Url),
    /// `file:///clip.mp4`
    File(PathBuf),
    /// `v4l2:///dev/video0`
    V4l2(PathBuf),
    /// `test://?width=640&height=360&fps=10`: GStreamer's test picture.
    Test {
        /// Pixels.
        width: u32,
        /// Pixels.
        height: u32,
        /// Frames a second.
        fps: u32,
    },
}

/// Why a URL is refused; reads on from the URL.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct SourceError(String);

const SCHEMES: &str = "rtsp://, rtsps://, file://, v4l2:// or test://";

impl Source {
    /// Reads a URL.
    pub fn parse(text: &str) -> Result<Self, SourceError> {
        let refuse = |why: String| Err(SourceError(why));
        let url = match Url::parse(text) {
            Ok(url) => url,
            Err(e) => return refuse(format!("is no URL ({e}); write {SCHEMES}")),
        };
        match url.scheme() {
            "rtsp" | "rtsps" => match url.host_str() {
                Some(host) if !host.is_empty() => Ok(Self::Rtsp(url)),
                _ => refuse("has no host; write rtsp://user:password@host/path".into()),
            },
            "file" => match url.to_file_path() {
                Ok(path) if path.file_name().is_some() => Ok(Self::File(path)),
                _ => refuse("is no absolute path; write file:///folder/clip.mp4".into()),
            },
            "v4l2" => {
                let path = url.path();
                if path.starts_with("/dev/") && url.host_str().is_none_or(str::is_empty) {
                    Ok(Self::V4l2(path.into()))
                } else {
                    refuse("is no device; write v4l2:///dev/video0".into())
                }
            }
            "test" => test_source(&url),
            other => refuse(format!("scheme {other}:// is not known; write {SCHEMES}")),
        }
    }

    /// The URL with its login, for the configuration.
    pub(crate) fn reveal(&self) -> String {
        match self {
            Self::Rtsp(url) => url.to_string(),
            Self::File(path) => match Url::from_file_path(path) {
                Ok(url) => url.to_string(),
                Err(()) => self.to_string(),
            },
            Self::V4l2(_) | Self::Test { .. } => self.to_string(),
        }
    }

    /// The template in `pipelines/` that fits when none is named.
    pub fn default_pipeline(&self) -> &'static str {
        match self {
            Self::Rtsp(_) => "rtsp",
            Self::File(_) => "file",
            Self::V4l2(_) => "v4l2",
            Self::Test { .. } => "test",
        }
    }

    /// A file ends; a camera does not.
    pub fn is_file(&self) -> bool {
        matches!(self, Self::File(_))
    }
}

fn test_source(url: &Url) -> Result<Source, SourceError> {
    let (mut width, mut height, mut fps) = (640, 360, 10);
    for (key, value) in url.query_pairs() {
        let (slot, range) = match &*key {
            "width" => (&mut width, 16..=7680),
            "height" => (&mut height, 16..=4320),
            "fps" => (&mut fps, 1..=240),
            other => {
                let other = mask(other);
                return Err(SourceError(format!("parameter {other} is not width, height or fps")));
            }
        };
        match value.parse() {
            Ok(n) if range.contains(&n) => *slot = n,
            _ => {
                return Err(SourceError(format!(
                    "{key}={}: must be a whole number from {} to {}",
                    mask(&value),
                    range.start(),
                    range.end()
                )));
            }
        }
    }
    Ok(Source::Test { width, height, fps })
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Rtsp(url) => f.write_str(&mask(url.as_str())),
            Self::File(path) => write!(f, "file://{}", path.display()),
            Self::V4l2(path) => write!(f, "v4l2://{}", path.display()),
            Self::Test { width, height, fps } => {
                write!(f, "test://?width={width}&height={height}&fps={fps}")
            }
        }
    }
}

impl fmt::Debug for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

/// Masks what may hold a secret in any text that looks like a URL, well-formed or not: what stands
/// between `://` and the last `@`, and the query. `rtsp://***@host/path?***`.
pub fn mask(text: &str) -> String {
    // `https:user:pass@host` and `http:/\\user:pass@host` are URLs too, to whoever opens them.
    if let Ok(url) = Url::parse(text)
        && (url.password().is_some() || !url.username().is_empty())
        && !begins(text, &format!("{}://", url.scheme()))
    {
        return mask(url.as_str());
    }
    let Some((scheme, rest)) = text.split_once("://") else { return text.to_owned() };
    // A password may hold an unescaped slash or question mark: hide up to the last '@' of all.
    let (hidden, rest) = match rest.rfind('@') {
        Some(at) => ("***", &rest[at..]),
        None => ("", rest),
    };
    match rest.split_once('?') {
        Some((path, _)) => format!("{scheme}://{hidden}{path}?***"),
        None => format!("{scheme}://{hidden}{rest}"),
    }
}

fn begins(text: &str, with: &str) -> bool {
    text.get(..with.len()).is_some_and(|start| start.eq_ignore_ascii_case(with))
}
