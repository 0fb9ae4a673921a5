//! Which hosts a model may be fetched from.
//!
//! Whoever may publish to `cmd/models/desired` chooses the URL: without this list such a message
//! would make the box ask any address in its own network.

use std::fmt;
use std::str::FromStr;

use url::Url;

use super::{Code, FetchError};
use crate::camera::source::mask;

/// One entry of `models.allowed_hosts`: `models.example` stands for the usual ports, 80 and 443;
/// `10.0.0.5:8000` for that port alone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AllowedHost {
    host: String,
    port: Option<u16>,
}

/// What an entry must be; reads on from "must be".
pub(crate) const ALLOWED: &str = "a list of hosts, each host or host:port, without a scheme";

/// Not `host` or `host:port`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("is no host or host:port")]
pub struct NoHost;

impl FromStr for AllowedHost {
    type Err = NoHost;

    fn from_str(text: &str) -> Result<Self, NoHost> {
        let (host, port) = match text.rsplit_once(':') {
            // The last colon of an IPv6 literal stands inside its brackets.
            Some((host, port)) if !port.ends_with(']') => {
                (host, Some(port.parse().ok().filter(|p| *p != 0).ok_or(NoHost)?))
            }
            _ => (text, None),
        };
        // As it is written in a URL: lower case, punycode.
        let url = Url::parse(&format!("http://{host}/")).map_err(|_| NoHost)?;
        let plain = url.username().is_empty()
            && url.password().is_none()
            && url.port().is_none()
            && url.path() == "/"
            && url.query().is_none()
            && url.fragment().is_none()
            && !host.contains(['/', '@', '\\', ':'])
            || host.starts_with('[');
        match url.host_str() {
            Some(host) if plain => Ok(Self { host: host.to_owned(), port }),
            _ => Err(NoHost),
        }
    }
}

impl fmt::Display for AllowedHost {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.host)?;
        self.port.map_or(Ok(()), |port| write!(f, ":{port}"))
    }
}

impl AllowedHost {
    fn covers(&self, host: &str, port: u16) -> bool {
        self.host == host && self.port.map_or(matches!(port, 80 | 443), |p| p == port)
    }
}

/// The URL, if a model may be fetched from there.
pub(super) fn admit(text: &str, allowed: &[AllowedHost]) -> Result<Url, FetchError> {
    let shown = mask(text);
    let bad = |why: String| FetchError::new(Code::BadUrl, format!("{shown}: {why}"));
    let url = Url::parse(text).map_err(|e| bad(format!("is no URL ({e}); write https://…")))?;
    if !matches!(url.scheme(), "http" | "https") {
        return Err(bad(format!("scheme {}:// is not https:// or http://", url.scheme())));
    }
    let (Some(host), Some(port)) = (url.host_str(), url.port_or_known_default()) else {
        return Err(bad("has no host".to_owned()));
    };
    if allowed.iter().any(|a| a.covers(host, port)) {
        return Ok(url);
    }
    let entry = if url.port().is_none() { host.to_owned() } else { format!("{host}:{port}") };
    let message = if allowed.is_empty() {
        format!(
            "{shown}: models are fetched from no host yet: to allow this one, write \
             allowed_hosts = [\"{entry}\"] under [models]"
        )
    } else {
        let list: Vec<_> = allowed.iter().map(ToString::to_string).collect();
        format!(
            "{shown}: {entry} is not in models.allowed_hosts ({}): add \"{entry}\" if it is meant",
            list.join(", ")
        )
    };
    Err(FetchError::new(Code::HostNotAllowed, message))
}
