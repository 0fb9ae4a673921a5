//! URLs: of models, cameras and brokers; the allowed hosts (first line); what an HTTP head says.

use noblink::camera::source::{Source, mask};
use noblink::config::External;
use noblink::update::fetch::{AllowedHost, admit, content_range, percent_decoded};
use ureq::http::Uri;
use url::Url;

use super::{SECRET, first_line, holds_secret, sentence};

pub fn check(data: &[u8]) {
    let Some((list, rest)) = first_line(data) else { return };
    let Ok(text) = std::str::from_utf8(rest) else { return };
    let allowed: Vec<AllowedHost> = list.split(',').filter_map(|h| h.parse().ok()).collect();
    for host in &allowed {
        assert_eq!(host.to_string().parse().as_ref(), Ok(host), "{host}");
    }
    let admitted = admit(text, &allowed);
    if let Ok(url) = &admitted {
        only_there(url, &allowed);
    }
    let source = Source::parse(text);
    let broker = External::at(text);
    if let Ok(broker) = &broker {
        assert!(!broker.host.is_empty() && !broker.host.contains(['@', '/', '[']));
    }
    // Whatever is said of an address leaves out its login.
    let secret = holds_secret(text)
        && Url::parse(text).is_ok_and(|url| url.password().is_some_and(|p| p.contains(SECRET)));
    let said = [
        Some(mask(text)),
        admitted.err().map(|e| e.message),
        source.map_or_else(|e| Some(e.to_string()), |s| Some(format!("{s} {s:?}"))),
        broker.err(),
    ];
    for said in said.into_iter().flatten() {
        assert!(!secret || !said.contains(SECRET), "{text:?} leaks: {said:?}");
    }
    if let Some((first, total)) = content_range(text) {
        let made = format!("bytes {first}-{first}/{}", total.map_or("*".into(), |t| t.to_string()));
        assert_eq!(content_range(&made), Some((first, total)));
    }
    assert!(percent_decoded(text).len() <= 3 * text.len());
    if !text.contains('%') {
        assert_eq!(percent_decoded(text), text);
    }
}

/// What connects reads the URL anew: it must come to the same host and port.
fn only_there(url: &Url, allowed: &[AllowedHost]) {
    assert!(matches!(url.scheme(), "http" | "https"));
    let (host, port) = (url.host_str().expect("a host"), url.port_or_known_default());
    let port = port.expect("a port");
    let entry = |text: String| text.parse::<AllowedHost>().expect("it is host or host:port");
    let usual = matches!(port, 80 | 443) && allowed.contains(&entry(host.to_owned()));
    assert!(usual || allowed.contains(&entry(format!("{host}:{port}"))), "{url} is admitted");
    let mut bare = url.clone();
    let _ = (bare.set_username(""), bare.set_password(None));
    let Ok(uri) = bare.as_str().parse::<Uri>() else { return };
    assert_eq!(uri.host(), Some(host), "{url}");
    assert_eq!(uri.port_u16(), url.port(), "{url}");
    assert_eq!(uri.scheme_str(), Some(url.scheme()));
    sentence(url.as_str());
}
