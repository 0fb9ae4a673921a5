//! Signatures in minisign's format: what `noblink model keygen|sign` makes the `minisign` tool
//! verifies, and the other way round.
//!
//! Both forms are verified: prehashed (`ED`, the tool's default) and legacy (`Ed`, `minisign -l`).
//! What is signed here is prehashed. The trusted comment is covered by the signature and checked.

use std::io::Cursor;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use minisign::{KeyPair, SecretKey, SecretKeyBox, SignatureBox};

/// Signature and key files are a few hundred bytes; more is refused unread.
pub const TEXT_MAX: usize = 4096;

/// Bytes of an algorithm id, a key id and a signature.
const SIGNATURE_BYTES: usize = 2 + 8 + 64;

/// A public key to trust.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PublicKey(minisign::PublicKey);

/// Why a signature does not hold.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SignatureError {
    /// Not minisign's format.
    #[error("is no minisign signature: {0}")]
    Malformed(String),
    /// None of the trusted keys made it.
    #[error("was made by key {0:016X}, which is not among the public keys configured")]
    WrongKey(u64),
    /// A trusted key is named, but the signature does not fit the bytes.
    #[error("does not fit the bytes that it came with (key {0:016X})")]
    Bad(u64),
}

/// Why a key can't be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum KeyError {
    /// Not a key in minisign's format.
    #[error("is no minisign key: {0}")]
    Malformed(String),
    /// The secret key is encrypted.
    #[error("is encrypted: a password is needed")]
    NeedsPassword,
    /// The password is not the key's.
    #[error("can't be decrypted: wrong password")]
    WrongPassword,
    /// Key generation or signing failed.
    #[error("{0}")]
    Failed(String),
}

impl PublicKey {
    /// Reads a key as `[models] public_keys` holds it (`RWQ…`), or the text of a key file.
    pub fn parse(text: &str) -> Result<Self, KeyError> {
        let text = text.trim();
        if text.len() > TEXT_MAX {
            return Err(KeyError::Malformed("it is too long".to_owned()));
        }
        let line = text.lines().last().unwrap_or_default().trim();
        let key = minisign::PublicKey::from_base64(line)
            .map_err(|_| KeyError::Malformed("56 characters that begin with RW".to_owned()))?;
        // The format writes `Ed` into every public key, whichever form its signatures have.
        if !key.to_bytes().starts_with(b"Ed") {
            return Err(KeyError::Malformed("its algorithm is not Ed25519".to_owned()));
        }
        Ok(Self(key))
    }

    /// The key's id, as the tool prints it in hexadecimal.
    pub fn id(&self) -> u64 {
        key_id(self.0.keynum())
    }

    /// One line of base64, for the configuration.
    pub fn to_base64(&self) -> String {
        self.0.to_base64()
    }

    /// The text of a key file.
    pub fn to_file(&self) -> String {
        format!("untrusted comment: minisign public key {:016X}\n{}\n", self.id(), self.to_base64())
    }
}

fn key_id(bytes: &[u8]) -> u64 {
    u64::from_le_bytes(bytes.try_into().expect("a key id has 8 bytes"))
}

/// Verifies a minisign text over bytes, by any of the keys. Returns the id of the key that fits.
pub fn verify(keys: &[PublicKey], text: &str, bytes: &[u8]) -> Result<u64, SignatureError> {
    let malformed = |why: &str| SignatureError::Malformed(why.to_owned());
    if text.len() > TEXT_MAX {
        return Err(malformed("it is too long"));
    }
    let lines: Vec<&str> = text.lines().collect();
    let &[_, signature, _, global] = lines.as_slice() else {
        return Err(malformed("it must have four lines"));
    };
    // The crate slices both without a look at their length.
    let length = |line: &str| STANDARD.decode(line.trim()).map(|b| b.len());
    if length(signature) != Ok(SIGNATURE_BYTES) || length(global) != Ok(64) {
        return Err(malformed("its second and fourth line must hold 74 and 64 bytes of base64"));
    }
    let parsed =
        SignatureBox::from_string(text).map_err(|e| SignatureError::Malformed(e.to_string()))?;
    let id = key_id(parsed.keynum());
    let mut named = keys.iter().filter(|k| k.id() == id).peekable();
    if named.peek().is_none() {
        return Err(SignatureError::WrongKey(id));
    }
    // Ids are 8 random bytes that a key's maker chooses: more than one key may claim one.
    let fits = |key: &PublicKey| {
        minisign::verify(&key.0, &parsed, Cursor::new(bytes), true, false, true).is_ok()
    };
    if named.any(fits) { Ok(id) } else { Err(SignatureError::Bad(id)) }
}

/// Makes a key pair: the public key, and the text of the secret key's file. Without a password the
/// secret key is stored in the clear, as `minisign -G -W` does.
pub fn generate(password: Option<&str>) -> Result<(PublicKey, String), KeyError> {
    let failed = |e: minisign::PError| KeyError::Failed(e.to_string());
    let KeyPair { pk, sk } = match password {
        Some(password) => KeyPair::generate_encrypted_keypair(Some(password.to_owned())),
        None => KeyPair::generate_unencrypted_keypair(),
    }
    .map_err(failed)?;
    let comment = format!("noblink secret key {:016X}", key_id(pk.keynum()));
    Ok((PublicKey(pk), sk.to_box(Some(&comment)).map_err(failed)?.into_string()))
}

/// Signs bytes with the text of a secret key's file; returns the text of the signature's file.
///
/// `comment` becomes the trusted comment, one line.
pub fn sign(
    secret_key: &str,
    password: Option<&str>,
    bytes: &[u8],
    comment: &str,
) -> Result<String, KeyError> {
    if secret_key.len() > TEXT_MAX || secret_key.lines().count() < 2 {
        return Err(KeyError::Malformed("it must have two lines".to_owned()));
    }
    let comment = comment.replace(['\n', '\r'], " ");
    let malformed = |e: minisign::PError| KeyError::Malformed(e.to_string());
    // Never asks on the terminal, as the crate does without a password: only the caller knows
    // whether there is one.
    let secret = match (is_encrypted(secret_key)?, password) {
        // Not by the crate's reader: minisign 0.11 leaves the checksum of such keys zero (-G -W).
        (false, _) => SecretKey::from_bytes(&key_bytes(secret_key)?).map_err(malformed)?,
        (true, None) => return Err(KeyError::NeedsPassword),
        (true, Some(password)) => {
            let key = SecretKeyBox::from_string(secret_key).map_err(malformed)?;
            key.into_secret_key(Some(password.to_owned())).map_err(|e| match e.kind() {
                minisign::ErrorKind::Verify => KeyError::WrongPassword,
                _ => malformed(e),
            })?
        }
    };
    // With the public half the crate verifies what it signed: a corrupt key is found out here.
    let public = minisign::PublicKey::from_secret_key(&secret).map_err(malformed)?;
    let signed = minisign::sign(
        Some(&public),
        &secret,
        Cursor::new(bytes),
        Some(comment.trim()),
        Some("signature by noblink model sign"),
    );
    signed.map(|s| s.into_string()).map_err(|e| KeyError::Failed(e.to_string()))
}

fn key_bytes(secret_key: &str) -> Result<Vec<u8>, KeyError> {
    let line = secret_key.lines().nth(1).unwrap_or_default().trim();
    STANDARD.decode(line).map_err(|e| KeyError::Malformed(e.to_string()))
}

/// Whether a secret key's file wants a password: its third and fourth byte name the derivation.
pub fn is_encrypted(secret_key: &str) -> Result<bool, KeyError> {
    match key_bytes(secret_key)?.get(..4) {
        Some(b"EdSc") => Ok(true),
        Some(b"Ed\0\0") => Ok(false),
        _ => Err(KeyError::Malformed("its algorithm is not Ed25519".to_owned())),
    }
}
