//! Why a camera does not stream, in words that say what to do. No credentials stand in them.

use std::io;
use std::net::{TcpStream, ToSocketAddrs};
use std::time::{Duration, Instant};

use crossbeam_channel::bounded;
use gst::prelude::*;
use gst::{CoreError, ResourceError, StreamError};
use url::Url;

use super::source::{Source, mask};

/// Why there are no frames.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Reason {
    /// The camera refused the login in the URL.
    #[error("wrong user name or password (RTSP 401)")]
    WrongLogin,
    /// The camera wants a login and the URL has none.
    #[error("the camera wants a login (RTSP 401): write rtsp://user:password@host/path")]
    NoLogin,
    /// The camera is there, the path is not.
    #[error("no such path on the camera: {0} (RTSP 404)")]
    NoSuchPath(String),
    /// The file or device is not there.
    #[error("{0} does not exist")]
    NoSuchFile(String),
    /// The host's name is not known.
    #[error("the host name {0} does not resolve: check the name and this machine's DNS")]
    Unresolved(String),
    /// Nothing listens on the port.
    #[error("connection refused by {0}: check the port, and that RTSP is switched on there")]
    Refused(String),
    /// The network does not lead there.
    #[error("no route to {0}: check the address and the network")]
    NoRoute(String),
    /// Nobody answers at the address.
    #[error("no answer from {0}: check the address, the camera's power and firewalls")]
    NoAnswer(String),
    /// Something accepts connections, but says nothing.
    #[error(
        "{0} accepts connections, but does not answer RTSP: check the port, restart the camera"
    )]
    Mute(String),
    /// Something accepts connections, but speaks no RTSP.
    #[error("{0} closed the connection: check the port, and whether it wants rtsps://")]
    HungUp(String),
    /// No secure connection came about.
    #[error(
        "TLS: no secure connection with {0}; if the camera signed its certificate itself, \
         write pipeline = \"rtsp-selfsigned\""
    )]
    Tls(String),
    /// RTSP works, RTP over UDP does not.
    #[error("no UDP packets arrive: check firewalls, or write pipeline = \"rtsp\" for TCP")]
    NoUdp,
    /// The camera serves no more clients, or none now.
    #[error("the camera takes no other session now (RTSP {0}): close other viewers, or wait")]
    Busy(String),
    /// Another answer than 200, 401 and 404.
    #[error("the camera answered RTSP {0}")]
    Refusal(String),
    /// There is no decoder.
    #[error("no decoder for this stream: {0}")]
    Codec(String),
    /// The source holds no pictures.
    #[error("the source has no video, or not over this transport")]
    NoVideo,
    /// Nothing came for this long.
    #[error("no frame for {:.1} s", .0.as_secs_f64())]
    Silence(Duration),
    /// The camera ended the stream, or its connection broke.
    #[error("the camera ended the stream")]
    Ended,
    /// The launch template can't be used.
    #[error("pipeline: {0}")]
    Pipeline(String),
    /// Anything else, in GStreamer's words.
    #[error("{0}")]
    Other(String),
}

/// An error message of a pipeline, taken apart.
#[derive(Debug, Clone)]
pub(super) struct Failure {
    kind: Kind,
    /// The words for people.
    message: String,
    /// The words for developers, without the place in the code.
    details: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Login,
    Missing,
    Codec,
    /// No stream could be set up.
    Nothing,
    /// Reading, writing or connecting did not work.
    Transport,
    Other,
}

impl Failure {
    pub(super) fn of(error: &gst::message::Error) -> Self {
        let cause = error.error();
        let kind = if let Some(resource) = cause.kind::<ResourceError>() {
            match resource {
                ResourceError::NotAuthorized => Kind::Login,
                ResourceError::NotFound => Kind::Missing,
                _ => Kind::Transport,
            }
        } else if let Some(stream) = cause.kind::<StreamError>() {
            let source = error.src().and_then(|s| s.downcast_ref::<gst::Element>()?.factory());
            match stream {
                // rtspsrc says so when the camera offers no video, or not over TCP or UDP.
                StreamError::CodecNotFound if source.is_some_and(|f| f.name() == "rtspsrc") => {
                    Kind::Nothing
                }
                StreamError::CodecNotFound => Kind::Codec,
                _ => Kind::Other,
            }
        } else {
            match cause.kind::<CoreError>() {
                Some(CoreError::MissingPlugin) => Kind::Codec,
                _ => Kind::Other,
            }
        };
        // First line: file, line, function and element.
        let debug = error.debug().map(|d| d.to_string()).unwrap_or_default();
        let details = debug.split_once('\n').map_or("", |(_, rest)| rest).trim().replace('\n', " ");
        Self { kind, message: cause.message().trim_end_matches('.').to_owned(), details }
    }

    /// What it means for this source; `None`: the network has to be asked.
    pub(super) fn reason(&self, source: &Source) -> Option<Reason> {
        match (self.kind, source) {
            (Kind::Login, Source::Rtsp(url)) if url.username().is_empty() => Some(Reason::NoLogin),
            (Kind::Login, _) => Some(Reason::WrongLogin),
            (Kind::Missing, Source::Rtsp(url)) => Some(Reason::NoSuchPath(url.path().to_owned())),
            (Kind::Missing, other) => Some(Reason::NoSuchFile(other.to_string())),
            (Kind::Nothing, _) => Some(Reason::NoVideo),
            (Kind::Codec, _) => Some(Reason::Codec(self.said())),
            (Kind::Transport, Source::Rtsp(_)) if self.details.contains("any UDP packets") => {
                Some(Reason::NoUdp)
            }
            (Kind::Transport, Source::Rtsp(_)) => {
                let status = status_in(&self.details)?;
                Some(match status.starts_with("453") || status.starts_with("503") {
                    true => Reason::Busy(status),
                    false => Reason::Refusal(status),
                })
            }
            _ => Some(Reason::Other(self.said())),
        }
    }

    fn said(&self) -> String {
        match &self.details[..] {
            "" => mask(&self.message),
            details => mask(&format!("{}: {details}", self.message)),
        }
    }
}

/// The camera's answer in rtspsrc's words: `… response: 503 Service Unavailable.` or
/// `Error (453): Not Enough Bandwidth`.
fn status_in(details: &str) -> Option<String> {
    if let Some((_, status)) = details.split_once("response: ") {
        return Some(status.trim_end_matches('.').to_owned());
    }
    let (number, words) = details.split_once("Error (")?.1.split_once("): ")?;
    Some(format!("{number} {words}"))
}

/// How long a connection may take to be accepted.
const CONNECT_WITHIN: Duration = Duration::from_millis(1_500);

/// Finds out why an RTSP source does not work where rtspsrc does not tell (`failure`: what it
/// said, if anything), on a thread of its own: resolving a name may take longer than anyone waits.
pub(super) fn ask(url: &Url, failure: Option<&Failure>, give_up_at: Instant) -> Reason {
    let (answer, answered) = bounded(1);
    let (asked, failure) = (url.clone(), failure.cloned());
    // Nobody joins it: it ends by itself when the resolver gives up.
    let asking = std::thread::Builder::new()
        .name("ask".into())
        .spawn(move || answer.try_send(diagnose(&asked, failure.as_ref())));
    let found = asking.ok().and_then(|_| answered.recv_deadline(give_up_at).ok());
    found.unwrap_or_else(|| Reason::Unresolved(url.host_str().unwrap_or_default().to_owned()))
}

/// Connects once.
fn diagnose(url: &Url, failure: Option<&Failure>) -> Reason {
    let host = url.host_str().unwrap_or_default();
    let secure = url.scheme() == "rtsps";
    let port = url.port().unwrap_or(if secure { 322 } else { 554 });
    let name = format!("{host}:{port}");
    let Some(address) = name.to_socket_addrs().ok().and_then(|mut found| found.next()) else {
        return Reason::Unresolved(host.to_owned());
    };
    match TcpStream::connect_timeout(&address, CONNECT_WITHIN) {
        Ok(_) if secure => Reason::Tls(name),
        // rtspsrc 1.22: "Could not receive message. (Timeout while waiting for server response)"
        Ok(_) => match failure {
            Some(f) if f.details.contains("(Timeout") => Reason::Mute(name),
            Some(f) if f.details.contains("Could not") => Reason::HungUp(name),
            Some(f) => Reason::Other(f.said()),
            None => Reason::Mute(name),
        },
        Err(e) => match e.kind() {
            io::ErrorKind::ConnectionRefused => Reason::Refused(name),
            io::ErrorKind::HostUnreachable | io::ErrorKind::NetworkUnreachable => {
                Reason::NoRoute(name)
            }
            io::ErrorKind::TimedOut => Reason::NoAnswer(name),
            _ => Reason::Other(format!("{name}: {e}")),
        },
    }
}
