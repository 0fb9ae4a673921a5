//! What went wrong with a connection, in words that name the remedy.
//!
//! Pure: the link says what it saw, this file says what that means to whoever reads the log.

use std::io;

use rustls::CertificateError;

use super::backoff::Class;
use crate::config::External;

/// Why a connection ended, or never began.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    /// For the log and the status.
    pub text: String,
    /// For the back-off.
    pub class: Class,
}

impl Failure {
    /// One that may pass by itself.
    pub fn passing(text: impl Into<String>) -> Self {
        Self { text: text.into(), class: Class::Passing }
    }

    /// One that someone has to remedy.
    pub fn refused(text: impl Into<String>) -> Self {
        Self { text: text.into(), class: Class::Refused }
    }
}

/// `mqtt://host:port`, as it may be shown.
pub fn shown(broker: &External) -> String {
    let scheme = if broker.tls { "mqtts" } else { "mqtt" };
    format!("{scheme}://{}:{}", broker.host, broker.port)
}

/// A refusal in the broker's answer to CONNECT.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// Not authorised: Mosquitto also says so when the password is wrong.
    NotAuthorized,
    /// Bad user name or password.
    BadCredentials,
    /// Banned.
    Banned,
    /// The client id is not valid there.
    ClientId,
    /// MQTT 5 is not spoken there.
    Version,
    /// Busy, unavailable, rate or quota exceeded.
    Busy,
    /// Retained messages or QoS 1 are not supported.
    Unsupported(&'static str),
    /// Anything else, by its name.
    Other(&'static str),
}

/// The broker answered CONNECT with a refusal.
pub fn connack(refusal: Refusal, broker: &External, client_id: &str) -> Failure {
    let at = shown(broker);
    let credentials = match (&broker.username, &broker.password_file) {
        (Some(user), Some(file)) => {
            format!("check mqtt.username \"{user}\" and the password in {}", file.display())
        }
        (Some(user), None) => {
            format!("check mqtt.username \"{user}\", and set mqtt.password_file")
        }
        (None, _) => "set mqtt.username and mqtt.password_file".to_owned(),
    };
    match refusal {
        Refusal::BadCredentials => {
            Failure::refused(format!("{at} refuses user name or password: {credentials}"))
        }
        Refusal::NotAuthorized => Failure::refused(format!(
            "{at} does not authorise client \"{client_id}\" (user name, password or its access \
             list): {credentials}"
        )),
        Refusal::Banned => {
            Failure::refused(format!("{at} has banned client \"{client_id}\": ask who runs it"))
        }
        Refusal::ClientId => Failure::refused(format!(
            "{at} does not accept the client id \"{client_id}\", which is made of device.id"
        )),
        Refusal::Version => Failure::refused(format!(
            "{at} does not speak MQTT 5: noblink needs a broker that does (Mosquitto from 1.6)"
        )),
        Refusal::Unsupported(what) => Failure::refused(format!(
            "{at} does not support {what}, which noblink needs: use another broker or listener"
        )),
        Refusal::Busy => Failure::passing(format!("{at} is busy or over its limits")),
        Refusal::Other(name) => Failure::passing(format!("{at} refuses the connection: {name}")),
    }
}

/// The network failed, or TLS inside of it.
pub fn network(error: &io::Error, broker: &External, up: bool) -> Failure {
    if let Some(tls) = error.get_ref().and_then(|e| e.downcast_ref::<rustls::Error>()) {
        return handshake(tls, broker);
    }
    let at = shown(broker);
    let text = match error.kind() {
        io::ErrorKind::ConnectionRefused => format!(
            "nothing listens at {at}: is the broker running at {}:{}?",
            broker.host, broker.port
        ),
        io::ErrorKind::TimedOut => {
            format!("{at} does not answer: check address, firewall and network")
        }
        io::ErrorKind::HostUnreachable | io::ErrorKind::NetworkUnreachable => {
            format!("no route to {at}: check the network and the address")
        }
        io::ErrorKind::ConnectionReset
        | io::ErrorKind::ConnectionAborted
        | io::ErrorKind::BrokenPipe
        | io::ErrorKind::UnexpectedEof => return closed(broker, up),
        _ if error.to_string().contains("lookup address")
            || error.to_string().contains("could not resolve") =>
        {
            format!("the name {} can't be resolved: check mqtt.url and DNS ({error})", broker.host)
        }
        _ => format!("{at}: {error}"),
    };
    Failure::passing(text)
}

/// The peer closed the connection; `up`: after it had accepted it.
pub fn closed(broker: &External, up: bool) -> Failure {
    let at = shown(broker);
    if up {
        return Failure { text: format!("{at} closed the connection"), class: Class::Closed };
    }
    let (expects, scheme) = if broker.tls { ("no TLS", "mqtt") } else { ("TLS", "mqtts") };
    Failure::passing(format!(
        "{at} closed the connection without an answer: if this port expects {expects}, write \
         {scheme}:// in mqtt.url; a broker that does not speak MQTT 5 may do so too"
    ))
}

/// The broker sent more than it was told that it may.
pub fn too_large(broker: &External, bytes: usize, bytes_max: u32) -> Failure {
    Failure::passing(format!(
        "{} sent a packet of {bytes} bytes, {bytes_max} are allowed: who publishes to this device's \
         cmd topics must send less, or model chunks of 64 KiB",
        shown(broker)
    ))
}

/// The broker sent what this client can't read. rumqttc 0.25 can't read a DISCONNECT without
/// properties, which ends a connection as closing it does.
pub fn unreadable(broker: &External, why: &str) -> Failure {
    let at = shown(broker);
    let text = format!(
        "{at} sent a packet that can't be read ({why}), perhaps a DISCONNECT without properties"
    );
    Failure { text, class: Class::Closed }
}

/// Nothing came back in time.
pub fn silent(broker: &External, up: bool) -> Failure {
    let at = shown(broker);
    Failure::passing(if up {
        format!("{at} has gone silent")
    } else {
        format!(
            "{at} does not answer: check address and firewall, and that an MQTT broker is there"
        )
    })
}

/// TLS failed, at the handshake or when the peer judged our certificate.
pub fn handshake(error: &rustls::Error, broker: &External) -> Failure {
    let at = shown(broker);
    let certificate = |why: String| Failure::refused(format!("{at}: its certificate {why}"));
    match error {
        rustls::Error::InvalidCertificate(e) => match e {
            CertificateError::UnknownIssuer => certificate(match &broker.ca_file {
                Some(file) => format!(
                    "is from an unknown CA, not one in mqtt.ca_file {}: put its CA there",
                    file.display()
                ),
                None => "is from an unknown CA: name that CA's file in mqtt.ca_file".to_owned(),
            }),
            CertificateError::Expired | CertificateError::ExpiredContext { .. } => {
                certificate("has expired: renew it, or check this machine's clock".to_owned())
            }
            CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => {
                certificate("is not valid yet: check this machine's clock".to_owned())
            }
            CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. } => {
                let names = match e {
                    CertificateError::NotValidForNameContext { presented, .. }
                        if !presented.is_empty() =>
                    {
                        format!(" (it is for {})", presented.join(", "))
                    }
                    _ => String::new(),
                };
                certificate(format!(
                    "is not for the name {}{names}: write the name that is in the certificate as \
                     host of mqtt.url",
                    broker.host
                ))
            }
            e => certificate(format!("is not accepted: {e:?}")),
        },
        rustls::Error::InvalidMessage(_) => Failure::refused(format!(
            "{at} does not speak TLS on this port: write mqtt:// or its TLS port in mqtt.url"
        )),
        rustls::Error::AlertReceived(alert) => Failure::refused(match &broker.client_cert {
            Some((file, _)) => format!(
                "{at} refuses TLS ({alert:?}): check that it accepts the certificate in \
                 mqtt.client_cert_file {}",
                file.display()
            ),
            None => format!(
                "{at} refuses TLS ({alert:?}): if it asks for a client certificate, set \
                 mqtt.client_cert_file and mqtt.client_key_file"
            ),
        }),
        e => Failure::passing(format!("{at}: TLS failed: {e}")),
    }
}

/// The broker closes what it accepts, again and again, and says no reason.
pub fn contested(broker: &External, client_id: &str) -> String {
    format!(
        "{} keeps closing the connection: another client may use the id \"{client_id}\" too; give \
         each device its own device.id",
        shown(broker)
    )
}

/// Someone else connected with our client id, as the broker says.
pub fn taken_over(broker: &External, client_id: &str) -> Failure {
    Failure {
        text: format!(
            "{}: another client connected as \"{client_id}\" and took over the session: give each \
             device its own device.id",
            shown(broker)
        ),
        class: Class::TakenOver,
    }
}
