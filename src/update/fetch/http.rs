//! `http://` and `https://`, resumed by Range.
//!
//! ```text
//!  attempt ── 200 ───────────────► from the first byte on ──┐
//!     ▲ ├──── 206, as asked for ─► from where it stopped ───┼─► whole ─► digest ─► done
//!     │ ├──── 206 otherwise, 416 ► begin again (twice)      │               │ differs, and some
//!     │ ├──── 3xx ───────────────► next URL, if allowed     │               ▼ of it was resumed
//!     │ └──── 4xx, TLS, size ────► the end                  │          begin again
//!     └────── pause ◄── 5xx, silence, reset, cut short ◄────┘
//! ```
//!
//! What is there is gone on with only while the server vouches that the file is the same (If-Range
//! by strong ETag or date), or the digest at the end will: then any server will do.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::{Deserialize, Serialize};
use tracing::debug;
use ureq::http::{Response, header};
use ureq::tls::{Certificate, RootCerts, TlsConfig};
use ureq::{Agent, Body};
use url::Url;

use super::allow::{AllowedHost, admit};
use super::part::PartFile;
use super::{
    Code, FetchError, Fetched, Pace, Progress, Transfer, beside, digest_file, open_own, remove,
    reserve, rest,
};
use crate::camera::source::mask;
use crate::mqtt::tls;
use crate::update::digest::Digest;

/// How often a file that does not fit is begun again from its first byte.
const RESTARTS_MAX: u32 = 2;
const REDIRECTS_MAX: u32 = 5;
const CANCEL_EVERY: Duration = Duration::from_millis(100);

/// Where a model may come from, and whom to trust on the way.
#[derive(Debug, Clone, Default)]
pub struct Rules {
    /// `models.allowed_hosts`
    pub allowed_hosts: Vec<AllowedHost>,
    /// `models.ca_file`; none = the system's roots.
    pub ca_file: Option<PathBuf>,
}

/// Fetches `url` into the transfer's `.part` file.
///
/// # Errors
/// See [`Code`]. What is there is kept, unless it is proven useless.
pub fn http(url: &str, rules: &Rules, transfer: Transfer<'_>) -> Result<Fetched, FetchError> {
    let url = admit(url, &rules.allowed_hosts)?;
    transfer.wanted.admit()?;
    let agent = agent(rules, &transfer)?;
    let file = open_own(transfer.part)?;
    let cancel = transfer.cancel;
    std::thread::scope(|scope| {
        // A read may be silent for long: who cancels does not wait for it.
        let (done, ended) = crossbeam_channel::bounded::<()>(0);
        let interrupt = agent.clone();
        scope.spawn(move || {
            while let Err(crossbeam_channel::RecvTimeoutError::Timeout) =
                ended.recv_timeout(CANCEL_EVERY)
            {
                if cancel.load(Ordering::Relaxed) {
                    return interrupt.shutdown();
                }
            }
        });
        let mut download = Download {
            shown: mask(url.as_str()),
            url,
            rules,
            agent,
            file,
            pace: Pace::new(Instant::now()),
            transfer,
            resumed: false,
        };
        let fetched = download.run();
        drop(done);
        fetched
    })
}

fn agent(rules: &Rules, transfer: &Transfer<'_>) -> Result<Agent, FetchError> {
    let certificates = match &rules.ca_file {
        Some(file) => tls::certificates("models.ca_file", file)
            .map_err(|why| FetchError::new(Code::Tls, why))?,
        // Where the system has none, every certificate is from an unknown CA, which is said then.
        None => rustls_native_certs::load_native_certs().certs,
    };
    let roots: Vec<_> = certificates.iter().map(|c| Certificate::from_der(c).to_owned()).collect();
    let tls = TlsConfig::builder()
        .root_certs(RootCerts::new_with_certs(&roots))
        .unversioned_rustls_crypto_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .build();
    let limits = transfer.limits;
    let agent = Agent::config_builder()
        .tls_config(tls)
        .http_status_as_error(false)
        // By hand: each target is held against the list.
        .max_redirects(0)
        .max_redirects_will_error(false)
        // The bytes as they are.
        .accept_encoding("identity")
        .user_agent(concat!("noblink/", env!("CARGO_PKG_VERSION")))
        .timeout_resolve(Some(limits.connect))
        .timeout_connect(Some(limits.connect))
        .timeout_recv_response(Some(limits.silence))
        .timeout_per_read(Some(limits.silence))
        .timeout_global(Some(limits.deadline))
        .max_idle_connections(0)
        .build()
        .new_agent();
    Ok(agent)
}

/// What the server said of the bytes that are there; kept beside them.
#[derive(Debug, Serialize, Deserialize)]
struct Validator {
    /// Digest of the URL: the URL itself may hold a password.
    url: Digest,
    /// For If-Range.
    value: String,
}

/// How an attempt ended before the file was whole.
enum Stop {
    Final(FetchError),
    /// It may pass by itself.
    Again(FetchError),
    /// What is there does not fit what the server has.
    Over(FetchError),
}

struct Download<'a, 'r> {
    url: Url,
    shown: String,
    rules: &'r Rules,
    agent: Agent,
    file: File,
    pace: Pace,
    transfer: Transfer<'a>,
    /// What is there comes from more than one answer, or from an earlier life.
    resumed: bool,
}

impl Download<'_, '_> {
    fn run(&mut self) -> Result<Fetched, FetchError> {
        self.adopt()?;
        let (mut failures, mut restarts) = (0, 0);
        loop {
            let shown = self.shown.clone();
            self.pace
                .check(Instant::now(), &self.transfer, || format!("{shown} brings nothing"))?;
            let before = self.length()?;
            let ended = self.attempt().and_then(|()| self.prove());
            match ended {
                Ok(fetched) => {
                    remove(&self.validator_path());
                    return Ok(fetched);
                }
                Err(Stop::Final(error)) => return Err(self.give_up(error)),
                Err(Stop::Over(error)) if restarts == RESTARTS_MAX => {
                    return Err(self.give_up(error));
                }
                Err(Stop::Over(error)) => {
                    debug!("{error}: begun again");
                    restarts += 1;
                    self.empty()?;
                }
                Err(Stop::Again(error)) => {
                    let gained = self.length()? > before;
                    failures = if gained { 1 } else { failures + 1 };
                    if failures > self.transfer.limits.failures_max {
                        return Err(self.give_up(error));
                    }
                    debug!("{error}: tried again");
                    rest(self.transfer.limits.pause_after(failures), self.transfer.cancel);
                }
            }
        }
    }

    /// Takes over what another way, or an earlier life, has left.
    fn adopt(&mut self) -> Result<(), FetchError> {
        let wanted = self.transfer.wanted;
        if let (Some(digest), Some(size)) = (wanted.digest, wanted.size) {
            let whole = PartFile::whole_prefix(self.transfer.part, &digest, size)?;
            if let Some(whole) = whole {
                self.set_length(whole)?;
            }
        }
        if self.length()? > wanted.bound() {
            self.empty()?;
        }
        self.resumed = self.length()? > 0;
        reserve(&self.file, self.transfer.part, wanted.size.unwrap_or(0))
    }

    /// One answer of the server, as far as it goes.
    fn attempt(&mut self) -> Result<(), Stop> {
        let wanted = self.transfer.wanted;
        let mut have = self.length().map_err(Stop::Final)?;
        if wanted.size == Some(have) {
            return Ok(());
        }
        let validator = self.validator();
        if have > 0 && validator.is_none() && wanted.digest.is_none() {
            self.empty().map_err(Stop::Final)?;
            have = 0;
        }
        let response = self.ask(have, validator.as_ref())?;
        match response.status().as_u16() {
            200 => {
                if have > 0 {
                    debug!("{}: no Range there, or another file: from the start", self.shown);
                    self.empty().map_err(Stop::Final)?;
                    have = 0;
                }
                self.keep_validator(&response).map_err(Stop::Final)?;
            }
            206 if have > 0 => {
                self.check_range(&response, have, validator.as_ref())?;
                self.resumed = true;
            }
            416 if have > 0 => {
                let text = "the file there is shorter than what came of it before";
                return Err(Stop::Over(self.error(Code::SizeMismatch, text)));
            }
            status => return Err(self.refusal(status)),
        }
        self.take(response, have)
    }

    /// Asks, and follows redirects; each target is held against the list.
    fn ask(&self, have: u64, validator: Option<&Validator>) -> Result<Response<Body>, Stop> {
        let mut url = self.url.clone();
        for _ in 0..=REDIRECTS_MAX {
            let mut bare = url.clone();
            // Neither can fail on http:// and https://.
            let _ = (bare.set_username(""), bare.set_password(None));
            let mut request = self.agent.get(bare.as_str());
            if bare != url {
                let login = format!(
                    "{}:{}",
                    percent_decoded(url.username()),
                    percent_decoded(url.password().unwrap_or_default())
                );
                let login = format!("Basic {}", STANDARD.encode(login));
                request = request.header(header::AUTHORIZATION, login);
            }
            if have > 0 {
                request = request.header(header::RANGE, format!("bytes={have}-"));
                if let Some(validator) = validator {
                    request = request.header(header::IF_RANGE, &validator.value);
                }
            }
            let response = request.call().map_err(|e| self.diagnose(e))?;
            if !matches!(response.status().as_u16(), 301 | 302 | 303 | 307 | 308) {
                return Ok(response);
            }
            let location = text(&response, header::LOCATION).unwrap_or_default();
            let next = url.join(location).map_err(|_| {
                Stop::Final(self.error(Code::ServerRefuses, "a redirect to what is no URL"))
            })?;
            if url.scheme() == "https" && next.scheme() != "https" {
                let why = format!("a redirect from https:// to {}", mask(next.as_str()));
                return Err(Stop::Final(self.error(Code::HostNotAllowed, &why)));
            }
            url = admit(next.as_str(), &self.rules.allowed_hosts).map_err(|e| {
                let message = format!("{} redirects: {}", self.shown, e.message);
                Stop::Final(FetchError::new(e.code, message))
            })?;
        }
        let why = format!("more than {REDIRECTS_MAX} redirects");
        Err(Stop::Final(self.error(Code::ServerRefuses, &why)))
    }

    /// A 206 must go on where we stopped, in the same file.
    fn check_range(
        &self,
        response: &Response<Body>,
        have: u64,
        validator: Option<&Validator>,
    ) -> Result<(), Stop> {
        let over = |why: &str| Err(Stop::Over(self.error(Code::SizeMismatch, why)));
        let Some((first, total)) = text(response, header::CONTENT_RANGE).and_then(content_range)
        else {
            return over("206 without a Content-Range");
        };
        if first != have {
            return over("206 with another range than was asked for");
        }
        if let (Some(total), Some(size)) = (total, self.transfer.wanted.size)
            && total != size
        {
            return over("the file there has another size than announced");
        }
        // Some servers answer so although the file is another one.
        if let (Some(theirs), Some(ours)) = (strong_etag(response), validator)
            && ours.value.starts_with('"')
            && theirs != ours.value
        {
            return over("the file there has changed");
        }
        Ok(())
    }

    /// Writes the body behind what is there.
    fn take(&mut self, response: Response<Body>, have: u64) -> Result<(), Stop> {
        let wanted = self.transfer.wanted;
        let announced = text(&response, header::CONTENT_LENGTH).and_then(|l| l.parse().ok());
        let announced: Option<u64> = announced.map(|l: u64| l.saturating_add(have));
        let page = text(&response, header::CONTENT_TYPE)
            .is_some_and(|t| t.trim_start().to_ascii_lowercase().starts_with("text/html"));
        if let Some(encoding) = text(&response, header::CONTENT_ENCODING)
            && !encoding.eq_ignore_ascii_case("identity")
        {
            let why = format!("the server sends it as {encoding}: serve the file as it is");
            return Err(Stop::Final(self.error(Code::ServerRefuses, &why)));
        }
        if let Some(announced) = announced {
            self.compare(announced, page).map_err(Stop::Final)?;
        }
        let mut body = response.into_body().into_reader();
        let mut buffer = vec![0; 1 << 16];
        let mut at = have;
        loop {
            let shown = self.shown.clone();
            self.pace
                .check(Instant::now(), &self.transfer, || format!("{shown} brings nothing"))
                .map_err(Stop::Final)?;
            let n = match body.read(&mut buffer) {
                Ok(0) => break,
                Ok(n) => n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(e) => return Err(self.diagnose(e.into())),
            };
            if at + n as u64 > wanted.bound() {
                return Err(Stop::Final(self.too_large(None)));
            }
            self.file
                .write_all_at(&buffer[..n], at)
                .map_err(|e| Stop::Final(FetchError::storage(self.transfer.part, &e)))?;
            at += n as u64;
            self.pace.gained(n);
            let size = wanted.size.or(announced);
            (self.transfer.progress)(Progress { received: at, size });
        }
        match (wanted.size, page) {
            (Some(size), true) if at < size => self.compare(at, page).map_err(Stop::Final),
            // Without a length, its end can't be told from the connection's.
            (Some(size), false) if at < size => {
                let why = format!("ends after {at} bytes, {size} are announced");
                Err(Stop::Again(self.error(Code::SizeMismatch, &why)))
            }
            _ => Ok(()),
        }
    }

    /// Holds the size that the server names against what is announced and allowed.
    fn compare(&self, size: u64, page: bool) -> Result<(), FetchError> {
        let wanted = &self.transfer.wanted;
        if size > wanted.bound() {
            return Err(self.too_large(Some(size)));
        }
        match wanted.size {
            Some(announced) if announced != size => {
                let hint = if page { "; it is a web page: is a login in the way?" } else { "" };
                let why = format!("has {size} bytes, {announced} are announced{hint}");
                Err(self.error(Code::SizeMismatch, &why))
            }
            _ => Ok(()),
        }
    }

    fn too_large(&self, size: Option<u64>) -> FetchError {
        let wanted = &self.transfer.wanted;
        let bound = wanted.bound();
        let has = size.map_or("sends more".to_owned(), |s| format!("has {s} bytes, more"));
        let why = match wanted.size {
            Some(_) => format!("{has} than the {bound} that are announced"),
            None => format!("{has} than the {bound} that models.max_size_mb allows"),
        };
        self.error(Code::TooLarge, &why)
    }

    /// Reads the whole file back.
    fn prove(&mut self) -> Result<Fetched, Stop> {
        let part = self.transfer.part;
        let storage = |e| Stop::Final(FetchError::storage(part, &e));
        self.file.sync_data().map_err(storage)?;
        let fetched = digest_file(part).map_err(storage)?;
        match self.transfer.wanted.digest {
            Some(wanted) if wanted != fetched.digest => {
                let why = format!("has digest {}, {wanted} is announced", fetched.digest);
                let error = self.error(Code::DigestMismatch, &why);
                // A piece of another file may be in it: the file there has its chance alone.
                Err(if self.resumed { Stop::Over(error) } else { Stop::Final(error) })
            }
            _ => Ok(fetched),
        }
    }

    /// Nothing is left of what can't be gone on with.
    fn give_up(&mut self, error: FetchError) -> FetchError {
        if matches!(error.code, Code::TooLarge | Code::SizeMismatch | Code::DigestMismatch) {
            remove(self.transfer.part);
            remove(&self.validator_path());
        }
        error
    }

    fn refusal(&self, status: u16) -> Stop {
        let again = matches!(status, 408 | 425 | 429 | 500..=599);
        let (code, why) = match status {
            404 | 410 => (Code::NotFound, "is not there: check the path in the URL".to_owned()),
            401 | 403 | 407 => {
                (Code::ServerRefuses, format!("wants a login that it accepts (HTTP {status})"))
            }
            _ if again => (Code::Unreachable, format!("answers HTTP {status}")),
            _ => (Code::ServerRefuses, format!("answers HTTP {status}")),
        };
        let error = self.error(code, &why);
        if again { Stop::Again(error) } else { Stop::Final(error) }
    }

    fn diagnose(&self, error: ureq::Error) -> Stop {
        if self.transfer.cancel.load(Ordering::Relaxed) {
            return Stop::Final(FetchError::new(Code::Canceled, "the transfer was canceled"));
        }
        let again = |why: &str| Stop::Again(self.error(Code::Unreachable, why));
        match &error {
            ureq::Error::Rustls(e) => self.handshake(e),
            ureq::Error::Tls(why) => Stop::Final(self.error(Code::Tls, why)),
            ureq::Error::Io(e) => match e.get_ref().and_then(|e| e.downcast_ref()) {
                Some(e) => self.handshake(e),
                None => again(&network(e)),
            },
            ureq::Error::Timeout(ureq::Timeout::Global) => Stop::Final(self.error(
                Code::SlowRetrieval,
                &format!("not whole within {} s", self.transfer.limits.deadline.as_secs()),
            )),
            ureq::Error::Timeout(_) => again("has gone silent, or does not answer: is it up?"),
            ureq::Error::HostNotFound => again("the name can't be resolved: check DNS"),
            // Not all of ureq's words are free of URLs.
            e => again(&mask(&format!("does not answer as an HTTP server: {e}"))),
        }
    }

    fn handshake(&self, error: &rustls::Error) -> Stop {
        use rustls::CertificateError as C;
        let why = match error {
            rustls::Error::InvalidCertificate(C::UnknownIssuer) => match &self.rules.ca_file {
                Some(file) => format!(
                    "its certificate is from an unknown CA, not one in models.ca_file {}",
                    file.display()
                ),
                None => "its certificate is from an unknown CA: name that CA's file in \
                         models.ca_file"
                    .to_owned(),
            },
            rustls::Error::InvalidCertificate(
                C::Expired
                | C::ExpiredContext { .. }
                | C::NotValidYet
                | C::NotValidYetContext { .. },
            ) => "its certificate is not valid now: renew it, or check this machine's clock".into(),
            rustls::Error::InvalidMessage(_) => {
                "does not speak TLS on this port: write http://, or its TLS port".into()
            }
            e => format!("TLS failed: {e}"),
        };
        Stop::Final(self.error(Code::Tls, &why))
    }

    fn error(&self, code: Code, why: &str) -> FetchError {
        FetchError::new(code, format!("{}: {why}", self.shown))
    }

    fn length(&self) -> Result<u64, FetchError> {
        let length = self.file.metadata().map(|m| m.len());
        length.map_err(|e| FetchError::storage(self.transfer.part, &e))
    }

    fn set_length(&self, length: u64) -> Result<(), FetchError> {
        self.file.set_len(length).map_err(|e| FetchError::storage(self.transfer.part, &e))
    }

    fn empty(&mut self) -> Result<(), FetchError> {
        self.resumed = false;
        remove(&self.validator_path());
        self.set_length(0)
    }

    fn validator_path(&self) -> PathBuf {
        beside(self.transfer.part, "http")
    }

    fn validator(&self) -> Option<Validator> {
        let bytes = read_small(&self.validator_path())?;
        let validator: Validator = serde_json::from_slice(&bytes).ok()?;
        (validator.url == Digest::of(self.url.as_str().as_bytes())).then_some(validator)
    }

    fn keep_validator(&self, response: &Response<Body>) -> Result<(), FetchError> {
        let path = self.validator_path();
        let date = || text(response, header::LAST_MODIFIED).map(str::to_owned);
        let Some(value) = strong_etag(response).map(str::to_owned).or_else(date) else {
            remove(&path);
            return Ok(());
        };
        let validator = Validator { url: Digest::of(self.url.as_str().as_bytes()), value };
        let bytes = serde_json::to_vec(&validator).expect("two strings always become JSON");
        std::fs::write(&path, bytes).map_err(|e| FetchError::storage(&path, &e))
    }
}

/// A file of ours that is small, or none of ours.
fn read_small(path: &Path) -> Option<Vec<u8>> {
    let mut bytes = Vec::new();
    File::open(path).ok()?.take(4096).read_to_end(&mut bytes).ok()?;
    Some(bytes)
}

fn text(response: &Response<Body>, name: header::HeaderName) -> Option<&str> {
    response.headers().get(name)?.to_str().ok()
}

/// If-Range takes no weak ones.
fn strong_etag(response: &Response<Body>) -> Option<&str> {
    text(response, header::ETAG).filter(|tag| tag.starts_with('"') && tag.len() <= 1024)
}

/// First byte and total of `bytes 100-199/200`, the value of Content-Range.
pub fn content_range(text: &str) -> Option<(u64, Option<u64>)> {
    let (range, total) = text.trim().strip_prefix("bytes")?.trim_start().split_once('/')?;
    let (first, _) = range.split_once('-')?;
    Some((first.parse().ok()?, total.parse().ok()))
}

/// What a URL writes as `%40` is an `@` in the header.
pub fn percent_decoded(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let [first, tail @ ..] = rest {
        let hex = tail.get(..2).and_then(|h| std::str::from_utf8(h).ok());
        match hex.and_then(|h| u8::from_str_radix(h, 16).ok()) {
            Some(byte) if *first == b'%' => {
                bytes.push(byte);
                rest = &tail[2..];
            }
            _ => {
                bytes.push(*first);
                rest = tail;
            }
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

fn network(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::ConnectionRefused => "nothing listens there: is the server up?".to_owned(),
        io::ErrorKind::TimedOut => {
            "does not answer: check address, firewall and network".to_owned()
        }
        io::ErrorKind::HostUnreachable | io::ErrorKind::NetworkUnreachable => {
            "no route to it: check the network and the address".to_owned()
        }
        io::ErrorKind::ConnectionReset
        | io::ErrorKind::ConnectionAborted
        | io::ErrorKind::BrokenPipe
        | io::ErrorKind::UnexpectedEof => "closed the connection before the end".to_owned(),
        _ => error.to_string(),
    }
}
