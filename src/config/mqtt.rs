//! `[mqtt]`

use std::path::PathBuf;

use super::reader::Section;

/// `[mqtt]`: the broker.
#[derive(Debug, Clone)]
pub struct Mqtt {
    /// The broker elsewhere, or the one inside.
    pub broker: Broker,
    /// First level of every topic.
    pub prefix: String,
}

/// Which broker the link connects to.
#[derive(Debug, Clone)]
pub enum Broker {
    /// The broker inside, on loopback.
    Embedded {
        /// TCP port; 0 takes a free one.
        port: u16,
    },
    /// A broker elsewhere.
    External(External),
}

/// How to reach a broker elsewhere. Files are read again for every connection, so that rotated
/// passwords and certificates need no restart.
#[derive(Debug, Clone)]
pub struct External {
    /// Host name or IPv4 address.
    pub host: String,
    /// TCP port.
    pub port: u16,
    /// `mqtts://`.
    pub tls: bool,
    /// User name.
    pub username: Option<String>,
    /// File that holds the password.
    pub password_file: Option<PathBuf>,
    /// PEM file with the roots to trust instead of the system's.
    pub ca_file: Option<PathBuf>,
    /// Client certificate chain and key, PEM.
    pub client_cert: Option<(PathBuf, PathBuf)>,
}

impl External {
    /// The broker at `mqtt://host:port` or `mqtts://host:port`.
    ///
    /// # Errors
    /// What is wrong with the URL; holds no credentials.
    pub fn at(url: &str) -> Result<Self, String> {
        let (host, port, tls) = broker_address(url)?;
        Ok(Self {
            host,
            port,
            tls,
            username: None,
            password_file: None,
            ca_file: None,
            client_cert: None,
        })
    }
}

pub(super) fn read(mut s: Section<'_, '_>) -> Option<Mqtt> {
    let url = s.string("url", "a broker: mqtt://host:1883 or mqtts://host:8883");
    let embedded = s.flag("embedded", false);
    let port = s.integer("embedded_port", 0..=65535, Some(1883));
    let username = s.string("username", "the broker's user name");
    let password_file = s.secret("password_file");
    let ca_file = s.path("ca_file", None);
    let cert = s.secret("client_cert_file");
    let key = s.secret("client_key_file");
    let prefix = s.matching("prefix", "noblink", PREFIX_ALLOWED, is_prefix);
    let broker = match (&url, embedded) {
        (_, None) => None,
        (Some(_), Some(true)) => {
            s.problem("embedded", "= true and url are both set: keep one of them");
            None
        }
        (None, Some(false)) => {
            if !s.has("url") {
                s.problem(
                    "url",
                    "is missing: write url = \"mqtt://host:1883\" for a broker of yours, \
                     or embedded = true for the broker inside (loopback only)",
                );
            }
            None
        }
        (None, Some(true)) => {
            for key in
                ["username", "password_file", "ca_file", "client_cert_file", "client_key_file"]
            {
                if s.has(key) {
                    s.problem(key, "goes with url, not with embedded = true: remove one of them");
                }
            }
            Some(Broker::Embedded { port: port? as u16 })
        }
        (Some(url), Some(false)) => {
            if s.has("embedded_port") {
                s.problem("embedded_port", "goes with embedded = true: remove it");
            }
            let client_cert = match (cert, key) {
                (Some(cert), Some(key)) => Some((cert, key)),
                (None, None) => None,
                (Some(_), None) => {
                    s.problem("client_key_file", "is missing: it goes with client_cert_file");
                    None
                }
                (None, Some(_)) => {
                    s.problem("client_cert_file", "is missing: it goes with client_key_file");
                    None
                }
            };
            if password_file.is_some() && username.is_none() {
                s.problem("username", "is missing: it goes with password_file");
            }
            let address = broker_address(url);
            if let Err(why) = &address {
                s.problem("url", why);
            }
            let (host, port, tls) = address.ok().unwrap_or_default();
            for (key, set) in
                [("ca_file", ca_file.is_some()), ("client_cert_file", client_cert.is_some())]
            {
                if set && !tls && !host.is_empty() {
                    s.problem(key, "needs TLS: write the url as mqtts://host:8883");
                }
            }
            Some(Broker::External(External {
                host,
                port,
                tls,
                username,
                password_file,
                ca_file,
                client_cert,
            }))
        }
    };
    s.finish();
    Some(Mqtt { broker: broker?, prefix: prefix? })
}

/// What the first level of the topics may be.
pub const PREFIX_ALLOWED: &str = "1 to 64 of a-z, A-Z, 0-9, _ and -";

/// Whether it is [`PREFIX_ALLOWED`].
pub fn is_prefix(p: &str) -> bool {
    (1..=64).contains(&p.len())
        && p.bytes().all(|b| b.is_ascii_alphanumeric() || b"_-".contains(&b))
}

/// Host, port and whether TLS, or what is wrong with the URL. The password never stands in it.
fn broker_address(url: &str) -> Result<(String, u16, bool), String> {
    let parsed = url::Url::parse(url);
    let masked = crate::camera::source::mask(url);
    let wrong = |why: &str| format!("= \"{masked}\": {why}");
    let parsed = parsed.map_err(|e| wrong(&format!("is no URL ({e}); write mqtt://host:1883")))?;
    let tls = match parsed.scheme() {
        "mqtt" => false,
        "mqtts" => true,
        other => return Err(wrong(&format!("scheme {other}:// is not mqtt:// or mqtts://"))),
    };
    if !parsed.username().is_empty() || parsed.password().is_some() {
        return Err(wrong("holds credentials: use username and password_file"));
    }
    if !matches!(parsed.path(), "" | "/") || parsed.query().is_some() {
        return Err(wrong("a path or query means nothing here: remove it"));
    }
    match parsed.host_str() {
        // rumqttc joins host and port by a colon, which an IPv6 literal does not survive.
        Some(h) if h.starts_with('[') => {
            Err(wrong("IPv6 literals are not supported: use a host name that resolves to it"))
        }
        Some(h) if !h.is_empty() => {
            Ok((h.to_owned(), parsed.port().unwrap_or(if tls { 8883 } else { 1883 }), tls))
        }
        _ => Err(wrong("has no host")),
    }
}
