//! Whom the link trusts and how it proves who it is.
//!
//! Read anew for every connection, so that rotated files need no restart. Every problem names the
//! key of the configuration and the file.

use std::path::Path;
use std::sync::Arc;

use rustls::pki_types::pem::{self, PemObject};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{ClientConfig, RootCertStore};

use crate::config::External;

/// The TLS settings of a connection to `broker`.
pub fn client_config(broker: &External) -> Result<Arc<ClientConfig>, String> {
    let roots = match &broker.ca_file {
        Some(file) => roots_from(file)?,
        None => system_roots()?,
    };
    // Named, because the process may hold more than one provider and then has no default.
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|e| format!("TLS can't be set up: {e}"))?
        .with_root_certificates(roots);
    let config = match &broker.client_cert {
        None => builder.with_no_client_auth(),
        Some((cert_file, key_file)) => {
            let chain = certificates("client_cert_file", cert_file)?;
            let key = private_key(key_file)?;
            builder.with_client_auth_cert(chain, key).map_err(|e| match e {
                rustls::Error::InconsistentKeys(_) => format!(
                    "client_key_file {} is not the key of client_cert_file {}: write the pair",
                    key_file.display(),
                    cert_file.display()
                ),
                e => format!("client_cert_file {} can't be used: {e}", cert_file.display()),
            })?
        }
    };
    Ok(Arc::new(config))
}

/// Only these roots: who names a CA does not want the public ones too.
fn roots_from(file: &Path) -> Result<RootCertStore, String> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates("ca_file", file)? {
        roots.add(certificate).map_err(|e| {
            format!("ca_file {} holds an unusable certificate: {e}", file.display())
        })?;
    }
    Ok(roots)
}

fn system_roots() -> Result<RootCertStore, String> {
    let mut roots = RootCertStore::empty();
    let found = rustls_native_certs::load_native_certs();
    // One odd certificate in the system's store is no reason to refuse the others.
    let (usable, _) = roots.add_parsable_certificates(found.certs);
    if usable == 0 {
        let why = found.errors.first().map(|e| format!(" ({e})")).unwrap_or_default();
        return Err(format!(
            "the system has no root certificates{why}: install ca-certificates, or name the \
             broker's CA in mqtt.ca_file"
        ));
    }
    Ok(roots)
}

/// The certificates of a PEM file; `key` of the configuration names it.
pub(crate) fn certificates(key: &str, file: &Path) -> Result<Vec<CertificateDer<'static>>, String> {
    let problem = |e| unreadable(key, file, "certificate", &e);
    let found: Vec<_> = CertificateDer::pem_file_iter(file)
        .map_err(problem)?
        .collect::<Result<_, _>>()
        .map_err(problem)?;
    if found.is_empty() {
        return Err(problem(pem::Error::NoItemsFound));
    }
    Ok(found)
}

fn private_key(file: &Path) -> Result<PrivateKeyDer<'static>, String> {
    PrivateKeyDer::from_pem_file(file)
        .map_err(|e| unreadable("client_key_file", file, "private key", &e))
}

fn unreadable(key: &str, file: &Path, what: &str, error: &pem::Error) -> String {
    let file = file.display();
    match error {
        pem::Error::Io(e) => format!("{key} {file} can't be read: {e}"),
        pem::Error::NoItemsFound => {
            format!("{key} {file} holds no {what}: it must be PEM, -----BEGIN ...-----")
        }
        e => format!("{key} {file} is damaged: {e:?}"),
    }
}
