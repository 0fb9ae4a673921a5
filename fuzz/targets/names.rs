//! Names: of files in the inbox, and what ids are made of them.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;

use noblink::config::is_slug;
use noblink::update::digest::Digest;
use noblink::update::entry::{is_ignored, is_sidecar, sidecars, stem};
use noblink::update::manifest::{identity, slug};
use noblink::update::rejected::plain_name;

pub fn check(data: &[u8]) {
    // As a directory may hold it.
    let cut = data.iter().position(|b| matches!(b, 0 | b'/')).unwrap_or(data.len());
    let file = &data[..cut.min(255)];
    let moved = plain_name(OsStr::from_bytes(file));
    assert!(moved.len() <= 128);
    assert!(moved.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b)));
    if !file.is_empty() && !is_ignored(file) {
        assert!(!moved.is_empty() && !moved.starts_with('.'), "{moved:?}");
    }
    let Ok(name) = std::str::from_utf8(file) else { return };
    let [manifest, signature] = sidecars(name);
    assert!(is_sidecar(&manifest) && is_sidecar(&signature));
    assert_eq!(stem(&signature), manifest);
    assert_eq!(is_ignored(manifest.as_bytes()), manifest.starts_with('.'));
    assert_eq!(slug(&slug(stem(name))), slug(stem(name)));
    let text = String::from_utf8_lossy(data);
    let digest: Digest = text.parse().unwrap_or(Digest::of(data));
    assert_eq!(digest.to_string().parse(), Ok(digest));
    for told in [None, Some(&*text)] {
        let (id, version) = identity(stem(name), &digest, (told, told), None);
        assert!(is_slug(&id), "{id:?}");
        assert!((1..=64).contains(&version.len()) && !version.chars().any(char::is_control));
    }
}
