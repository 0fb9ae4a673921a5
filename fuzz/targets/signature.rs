//! minisign texts: a signature over bytes (text, a zero byte, the bytes), a public or secret key.

use noblink::update::signature::{KeyError, PublicKey, is_encrypted, sign, verify};

use super::sentence;

/// The key whose secret half is not here: what it signed is all that it will ever have signed.
const KEY: &str = include_str!("../../tests/fixtures/minisign/key.pub");
const SIGNED: &[u8] = include_bytes!("../../tests/fixtures/minisign/manifest.json");

pub fn check(data: &[u8]) {
    let mut parts = data.splitn(2, |b| *b == 0);
    let text = parts.next().map(String::from_utf8_lossy).unwrap_or_default();
    let key = PublicKey::parse(KEY).expect("the fixture is a key");
    if let Some(bytes) = parts.next() {
        match verify(std::slice::from_ref(&key), &text, bytes) {
            Ok(id) => assert!(id == key.id() && bytes == SIGNED, "a forgery holds: {text}"),
            Err(why) => sentence(&why.to_string()),
        }
        return;
    }
    match PublicKey::parse(&text) {
        Ok(key) => {
            assert_eq!(PublicKey::parse(&key.to_base64()).as_ref(), Ok(&key));
            assert_eq!(PublicKey::parse(&key.to_file()).as_ref(), Ok(&key));
        }
        Err(why) => sentence(&why.to_string()),
    }
    let encrypted = is_encrypted(&text);
    match sign(&text, None, b"bytes", "comment") {
        Ok(signature) => {
            assert_eq!(encrypted, Ok(false));
            assert_eq!(signature.lines().count(), 4);
        }
        Err(KeyError::NeedsPassword) => assert_eq!(encrypted, Ok(true)),
        Err(why) => sentence(&why.to_string()),
    }
}
