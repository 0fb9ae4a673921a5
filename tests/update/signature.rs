//! Signatures: fixtures of the `minisign` tool, the tool itself, and what is tampered with.

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use base64::Engine as _;
use noblink::update::signature::{
    KeyError, PublicKey, SignatureError, generate, is_encrypted, sign, verify,
};

/// Runs the tool, which `scripts/setup --tests` installs.
fn minisign(args: &[&str], dir: &Path) -> Output {
    let run = Command::new("minisign").args(args).current_dir(dir).output();
    run.expect("the minisign tool is installed (scripts/setup --tests)")
}

fn fixture(name: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/minisign").join(name);
    fs::read_to_string(path).unwrap()
}

fn fixture_key() -> PublicKey {
    PublicKey::parse(&fixture("key.pub")).unwrap()
}

#[test]
fn both_forms_of_the_tool_are_verified() {
    let message = fixture("manifest.json");
    for form in ["legacy.minisig", "prehashed.minisig"] {
        let key = fixture_key();
        let id = verify(std::slice::from_ref(&key), &fixture(form), message.as_bytes());
        assert_eq!(id, Ok(key.id()), "{form}");
    }
}

#[test]
fn every_changed_byte_of_a_signature_is_noticed() {
    let message = fixture("manifest.json");
    for form in ["legacy.minisig", "prehashed.minisig"] {
        let text = fixture(form);
        let untrusted = text.find('\n').unwrap();
        for i in untrusted + 1..text.len() - 1 {
            let mut bytes = text.clone().into_bytes();
            bytes[i] = if bytes[i] == b'A' { b'B' } else { b'A' };
            let Ok(changed) = String::from_utf8(bytes) else { continue };
            if changed == text {
                continue;
            }
            let result = verify(&[fixture_key()], &changed, message.as_bytes());
            assert!(result.is_err(), "{form}, byte {i}:\n{changed}");
        }
    }
    let other = message.replace('2', "3");
    let result = verify(&[fixture_key()], &fixture("prehashed.minisig"), other.as_bytes());
    assert_eq!(result, Err(SignatureError::Bad(fixture_key().id())));
}

#[test]
fn what_is_no_signature_is_refused_without_a_panic() {
    let text = fixture("prehashed.minisig");
    let lines: Vec<&str> = text.lines().collect();
    let short_global = format!("{}\n{}\n{}\nAAAA\n", lines[0], lines[1], lines[2]);
    let short_signature = format!("{}\nRUQf\n{}\n{}\n", lines[0], lines[2], lines[3]);
    let long = format!("{text}{}", "x".repeat(5000));
    for bad in ["", "\n\n\n\n", "<html>", &short_global, &short_signature, &long, lines[0]] {
        let result = verify(&[fixture_key()], bad, b"");
        assert!(matches!(result, Err(SignatureError::Malformed(_))), "{bad:?}: {result:?}");
    }
    for bad in ["", "RWQ", "untrusted comment: x", &"A".repeat(56), &"x".repeat(5000)] {
        assert!(matches!(PublicKey::parse(bad), Err(KeyError::Malformed(_))), "{bad:?}");
    }
}

#[test]
fn any_of_several_keys_will_do_and_others_will_not() {
    let (mine, secret) = generate(None).unwrap();
    let text = sign(&secret, None, b"bytes", "line 1\nline 2").unwrap();
    assert_eq!(verify(&[fixture_key(), mine.clone()], &text, b"bytes"), Ok(mine.id()));
    let result = verify(&[fixture_key()], &text, b"bytes");
    assert_eq!(result, Err(SignatureError::WrongKey(mine.id())));
    assert_eq!(PublicKey::parse(&mine.to_base64()).unwrap(), mine);
    assert_eq!(PublicKey::parse(&mine.to_file()).unwrap(), mine);
}

#[test]
fn the_tool_verifies_what_is_signed_here_with_a_key_made_here() {
    let dir = tempfile::tempdir().unwrap();
    let (public, secret) = generate(None).unwrap();
    fs::write(dir.path().join("m"), "bytes").unwrap();
    fs::write(dir.path().join("m.minisig"), sign(&secret, None, b"bytes", "t").unwrap()).unwrap();
    fs::write(dir.path().join("key.pub"), public.to_file()).unwrap();
    fs::write(dir.path().join("key"), &secret).unwrap();
    let by_file = minisign(&["-V", "-p", "key.pub", "-m", "m"], dir.path());
    assert!(by_file.status.success(), "{by_file:?}");
    let by_text = minisign(&["-V", "-P", &public.to_base64(), "-m", "m"], dir.path());
    assert!(by_text.status.success(), "{by_text:?}");
    // And it signs with our secret key.
    let signed = minisign(&["-S", "-W", "-s", "key", "-m", "m"], dir.path());
    assert!(signed.status.success(), "{signed:?}");
    let text = fs::read_to_string(dir.path().join("m.minisig")).unwrap();
    assert_eq!(verify(std::slice::from_ref(&public), &text, b"bytes"), Ok(public.id()));
}

#[test]
fn keys_of_the_tool_sign_here_and_its_signatures_are_verified() {
    let dir = tempfile::tempdir().unwrap();
    let made = minisign(&["-G", "-W", "-p", "key.pub", "-s", "key"], dir.path());
    assert!(made.status.success(), "{made:?}");
    fs::write(dir.path().join("m"), "bytes").unwrap();
    let read = |name: &str| fs::read_to_string(dir.path().join(name)).unwrap();
    let public = PublicKey::parse(&read("key.pub")).unwrap();
    assert!(!is_encrypted(&read("key")).unwrap());
    for form in ["-l", "-H"] {
        let signed = minisign(&["-S", "-W", form, "-s", "key", "-m", "m"], dir.path());
        assert!(signed.status.success(), "{signed:?}");
        assert!(verify(std::slice::from_ref(&public), &read("m.minisig"), b"bytes").is_ok());
    }
    fs::write(dir.path().join("m.minisig"), sign(&read("key"), None, b"bytes", "t").unwrap())
        .unwrap();
    let verified = minisign(&["-V", "-p", "key.pub", "-m", "m"], dir.path());
    assert!(verified.status.success(), "{verified:?}");
}

#[test]
fn an_encrypted_key_wants_its_password() {
    let (public, secret) = generate(Some("pass")).unwrap();
    assert!(is_encrypted(&secret).unwrap());
    assert_eq!(sign(&secret, None, b"x", "t"), Err(KeyError::NeedsPassword));
    assert_eq!(sign(&secret, Some("wrong"), b"x", "t"), Err(KeyError::WrongPassword));
    let text = sign(&secret, Some("pass"), b"x", "t").unwrap();
    assert_eq!(verify(std::slice::from_ref(&public), &text, b"x"), Ok(public.id()));
    let (_, open) = generate(None).unwrap();
    let mut bytes =
        base64::engine::general_purpose::STANDARD.decode(open.lines().nth(1).unwrap()).unwrap();
    bytes[70] ^= 1;
    let corrupt = base64::engine::general_purpose::STANDARD.encode(bytes);
    let result = sign(&format!("comment\n{corrupt}\n"), None, b"x", "t");
    assert!(matches!(result, Err(KeyError::Failed(_))), "{result:?}");
    for bad in ["", "one line", "comment\n!!", "comment\nAAAA"] {
        assert!(matches!(sign(bad, None, b"x", "t"), Err(KeyError::Malformed(_))), "{bad:?}");
    }
}
