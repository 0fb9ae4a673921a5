//! Over HTTP: right in the end, or refused by its name, whatever the server does.

use std::io::{Read, Write};
use std::net::TcpListener;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use noblink::update::digest::Digest;
use noblink::update::fetch::{AllowedHost, Code, FetchError, Fetched, Rules, Wanted, http};

use super::{Desk, noise, wanted};
use crate::harness::http::{Reply, Server, Then};
use crate::harness::pki::certificates;
use crate::harness::until;

const TAG: &str = "\"v1\"";

fn rules(hosts: &[&str]) -> Rules {
    let allowed_hosts = hosts.iter().map(|h| h.parse().unwrap()).collect();
    Rules { allowed_hosts, ca_file: None }
}

fn local(server: &Server) -> Rules {
    rules(&[&format!("127.0.0.1:{}", server.port)])
}

fn fetch(desk: &mut Desk, server: &Server, wanted: Wanted) -> Result<Fetched, FetchError> {
    desk.transfer(wanted, |t| http(&server.url("/best.onnx"), &local(server), t))
}

/// The transfer ends so, and says so.
fn refused(got: Result<Fetched, FetchError>, code: Code, words: &[&str]) -> String {
    let error = got.expect_err("it is refused");
    assert_eq!(error.code, code, "{error}");
    for word in words {
        assert!(error.message.contains(word), "no {word:?} in: {error}");
    }
    error.message
}

#[test]
fn a_file_comes_whole() {
    let file = noise(1, 300_000);
    let served = file.clone();
    let server = Server::start(move |_, r| Reply::file(r, TAG, &served));
    let mut desk = Desk::new();
    let got = fetch(&mut desk, &server, wanted(&file)).unwrap();
    assert_eq!((got.digest, got.size), (Digest::of(&file), 300_000));
    assert_eq!(desk.bytes(), file);
    assert_eq!(desk.files(), ["x.part"]);
    let last = *desk.progress.last().unwrap();
    assert_eq!((last.received, last.size), (300_000, Some(300_000)));
    assert!(desk.progress.is_sorted_by_key(|p| p.received));

    // It is there already: no server is asked.
    fetch(&mut desk, &server, wanted(&file)).unwrap();
    assert_eq!(server.requests().len(), 1);

    // Nothing is known of it but the most bytes it may have.
    let mut desk = Desk::new();
    let unknown = Wanted { digest: None, size: None, size_max: 300_000 };
    assert_eq!(fetch(&mut desk, &server, unknown).unwrap().digest, Digest::of(&file));
}

#[test]
fn what_was_cut_short_is_gone_on_with() {
    let file = noise(2, 400_000);
    let served = file.clone();
    let server = Server::start(move |n, r| {
        let reply = Reply::file(r, TAG, &served);
        match n {
            0 => reply.cut(150_000, Then::Close),
            1 => reply.cut(100_000, Then::Stall),
            2 => Reply::status("503 Service Unavailable"),
            _ => reply,
        }
    });
    let mut desk = Desk::new();
    fetch(&mut desk, &server, wanted(&file)).unwrap();
    assert_eq!(desk.bytes(), file);
    let ranges: Vec<_> = server.requests().iter().map(|r| r.range()).collect();
    assert_eq!(ranges, [None, Some(150_000), Some(250_000), Some(250_000)]);
    assert!(server.requests()[1..].iter().all(|r| r.header("if-range") == TAG));
}

#[test]
fn a_cancel_is_seen_at_once_and_the_next_life_goes_on() {
    let file = noise(3, 500_000);
    let served = file.clone();
    let server = Server::start(move |n, r| {
        let reply = Reply::file(r, TAG, &served);
        if n == 0 { reply.cut(200_000, Then::Stall) } else { reply }
    });
    let mut desk = Desk::new();
    desk.limits.silence = Duration::from_secs(60);
    let (cancel, part) = (desk.cancel.clone(), desk.part());
    let canceler = std::thread::spawn(move || {
        let there = || std::fs::metadata(&part).is_ok_and(|m| m.len() == 200_000);
        until("the first bytes are there", 10, there);
        cancel.store(true, Ordering::Relaxed);
        Instant::now()
    });
    refused(fetch(&mut desk, &server, wanted(&file)), Code::Canceled, &[]);
    let took = canceler.join().unwrap().elapsed();
    assert!(took < Duration::from_secs(2), "a cancel took {took:?}");
    assert_eq!(desk.bytes().len(), 200_000);

    desk.cancel.store(false, Ordering::Relaxed);
    fetch(&mut desk, &server, wanted(&file)).unwrap();
    assert_eq!(desk.bytes(), file);
    assert_eq!(server.requests()[1].range(), Some(200_000));
    assert_eq!(desk.files(), ["x.part"]);
}

#[test]
fn a_file_that_changed_between_is_never_mixed() {
    let (old, new) = (noise(4, 300_000), noise(5, 300_000));
    // With If-Range; without; and one that answers 206 whatever If-Range says.
    for kind in ["keeps to If-Range", "has no tag", "ignores If-Range", "no Range at all"] {
        let (first, second) = (old.clone(), new.clone());
        let server = Server::start(move |n, r| {
            let mut r = r.clone();
            let (file, tag) = if n == 0 { (&first, "\"old\"") } else { (&second, "\"new\"") };
            let tag = if kind == "has no tag" { "" } else { tag };
            if kind == "ignores If-Range" {
                r.headers.remove("if-range");
            }
            if kind == "no Range at all" {
                r.headers.remove("range");
            }
            let reply = Reply::file(&r, tag, file);
            if n == 0 { reply.cut(100_000, Then::Close) } else { reply }
        });
        let mut desk = Desk::new();
        fetch(&mut desk, &server, wanted(&new)).unwrap_or_else(|e| panic!("{kind}: {e}"));
        assert_eq!(desk.bytes(), new, "{kind}");

        // Where no digest is announced, only the server's word counts.
        let mut desk = Desk::new();
        let unknown = Wanted { digest: None, size: None, size_max: 1 << 20 };
        let url = server.url("/again");
        std::fs::write(desk.part(), &old[..100_000]).unwrap();
        desk.transfer(unknown, |t| http(&url, &local(&server), t)).unwrap();
        assert_eq!(desk.bytes(), new, "{kind}, unknown");
    }
}

#[test]
fn wrong_sizes_are_refused_before_they_fill_the_disk() {
    let file = noise(6, 100_000);
    let bigger = noise(6, 100_001);
    let server = Server::start(move |_, r| match r.path.as_str() {
        "/announced" => Reply::file(r, TAG, &bigger),
        "/endless" => Reply::new("200 OK", "", &bigger).cut(50_000, Then::Endless),
        "/smaller" => Reply::file(r, TAG, &bigger[..99_999]),
        "/page" => {
            let page = b"<html>login</html>";
            Reply::new("200 OK", "Content-Type: text/html\r\n", page)
        }
        "/packed" => Reply::new("200 OK", "Content-Encoding: gzip\r\n", b"xx"),
        _ => Reply::status("404 Not Found"),
    });
    let rows = [
        ("/announced", Code::TooLarge, "100001 bytes, more than the 100000"),
        ("/endless", Code::TooLarge, "sends more than the 100000"),
        ("/smaller", Code::SizeMismatch, "has 99999 bytes, 100000 are announced"),
        ("/page", Code::SizeMismatch, "web page: is a login in the way?"),
        ("/packed", Code::ServerRefuses, "serve the file as it is"),
        ("/gone", Code::NotFound, "check the path"),
    ];
    for (path, code, words) in rows {
        let mut desk = Desk::new();
        let url = server.url(path);
        let got = desk.transfer(wanted(&file), |t| http(&url, &local(&server), t));
        refused(got, code, &[words, path]);
        assert!(desk.progress.iter().all(|p| p.received <= 100_000), "{path}");
        assert!(desk.bytes().is_empty(), "{path}: {:?}", desk.files());
    }
    let mut desk = Desk::new();
    let endless = Wanted { digest: None, size: None, size_max: 70_000 };
    let got = desk.transfer(endless, |t| http(&server.url("/endless"), &local(&server), t));
    refused(got, Code::TooLarge, &["models.max_size_mb"]);

    // A size beyond what is allowed, or beyond the disk: nobody is asked.
    let asked = server.requests().len();
    let huge = Wanted { digest: None, size: Some(200_000), size_max: 100_000 };
    refused(fetch(&mut desk, &server, huge), Code::TooLarge, &["200000", "models.max_size_mb"]);
    let full = Wanted { digest: None, size: Some(1 << 60), size_max: u64::MAX };
    refused(fetch(&mut desk, &server, full), Code::NoSpace, &["device.state_dir"]);
    assert_eq!(server.requests().len(), asked);
}

#[test]
fn wrong_bytes_are_refused_and_not_kept() {
    let (file, other) = (noise(7, 90_000), noise(8, 90_000));
    let server = Server::start(move |_, r| Reply::file(r, TAG, &other));
    let mut desk = Desk::new();
    let announced = Digest::of(&file).to_string();
    refused(fetch(&mut desk, &server, wanted(&file)), Code::DigestMismatch, &[&announced]);
    assert!(desk.files().is_empty(), "{:?}", desk.files());
    assert_eq!(server.requests().len(), 1, "asking again changes nothing");
}

#[test]
fn other_answers_are_told_apart() {
    let file = noise(9, 1000);
    for (status, code, requests) in [
        ("403 Forbidden", Code::ServerRefuses, 1),
        ("401 Unauthorized", Code::ServerRefuses, 1),
        ("410 Gone", Code::NotFound, 1),
        ("418 I'm a teapot", Code::ServerRefuses, 1),
        ("500 Internal Server Error", Code::Unreachable, 4),
        ("429 Too Many Requests", Code::Unreachable, 4),
    ] {
        let server = Server::start(move |_, _| Reply::status(status));
        refused(fetch(&mut Desk::new(), &server, wanted(&file)), code, &[]);
        assert_eq!(server.requests().len(), requests, "{status}");
    }
}

#[test]
fn only_allowed_hosts_are_asked_also_behind_a_redirect() {
    let file = noise(10, 1000);
    let served = file.clone();
    let inner = Server::start(|_, _| Reply::status("200 OK"));
    let elsewhere = inner.url("/admin");
    let server = Server::start(move |_, r| match r.path.as_str() {
        "/best.onnx" => Reply::redirect(&elsewhere),
        "/twice" => Reply::redirect("once"),
        "/once" => Reply::redirect("/file"),
        "/loop" => Reply::redirect("/loop"),
        "/local" => Reply::redirect("file:///etc/passwd"),
        _ => Reply::file(r, TAG, &served),
    });
    let mut desk = Desk::new();
    let entry = format!("127.0.0.1:{}", inner.port);
    let words = ["redirects", "models.allowed_hosts", &entry];
    refused(fetch(&mut desk, &server, wanted(&file)), Code::HostNotAllowed, &words);
    assert!(inner.requests().is_empty(), "a host that is not allowed was asked");

    let mut at = |path: &str, rules: &Rules| {
        desk.transfer(wanted(&file), |t| http(&server.url(path), rules, t))
    };
    refused(at("/loop", &local(&server)), Code::ServerRefuses, &["more than 5 redirects"]);
    refused(at("/local", &local(&server)), Code::BadUrl, &["scheme file://"]);
    let words = ["no host yet", "allowed_hosts = [\"127.0.0.1:", "[models]"];
    refused(at("/twice", &rules(&[])), Code::HostNotAllowed, &words);
    refused(at("/twice", &rules(&["127.0.0.1"])), Code::HostNotAllowed, &["(127.0.0.1)", "add"]);
    assert_eq!(server.requests().len(), 8);
    at("/twice", &local(&server)).unwrap();
}

#[test]
fn hosts_are_allowed_by_name_and_port() {
    let one = |entry: &str, url: &str| {
        let got = Desk::new().transfer(wanted(b"x"), |mut t| {
            // Refused for its host, or for its size, which is looked at next.
            t.wanted.size_max = 0;
            http(url, &rules(&[entry]), t)
        });
        got.expect_err("neither goes further").code == Code::TooLarge
    };
    for (entry, url) in [
        ("models.example", "https://models.example/x"),
        ("models.example", "http://models.example/x"),
        ("MODELS.example", "https://models.EXAMPLE:443/x"),
        ("models.example:8443", "https://models.example:8443/x"),
        ("models.example:80", "http://models.example/x"),
        ("10.0.0.5:8000", "http://10.0.0.5:8000/x"),
        ("[::1]:8000", "http://[::1]:8000/x"),
        ("[::1]", "http://[::1]/x"),
    ] {
        assert!(one(entry, url), "{entry} must allow {url}");
    }
    for (entry, url) in [
        ("models.example", "https://models.example:8443/x"),
        ("models.example", "https://models.example.evil/x"),
        ("models.example", "https://evil/models.example"),
        ("models.example", "https://models.example@evil/x"),
        ("models.example", "https://sub.models.example/x"),
        ("models.example:8443", "https://models.example/x"),
        ("127.0.0.1", "http://[::1]/x"),
        ("models.example", "ftp://models.example/x"),
    ] {
        assert!(!one(entry, url), "{entry} must not allow {url}");
    }
    for wrong in ["", "https://x", "x/y", "x:0", "x:70000", "x:", "u@x", "x y", "a:b:c", "::1"] {
        assert!(wrong.parse::<AllowedHost>().is_err(), "{wrong:?} is no entry");
    }
}

#[test]
fn slow_is_not_the_same_as_silent() {
    let file = noise(11, 100_000);
    let served = file.clone();
    let server = Server::start(move |_, r| Reply::file(r, TAG, &served).cut(0, Then::Drip(10, 20)));
    let mut desk = Desk::new();
    desk.limits.rate_min = 100_000;
    desk.limits.window = Duration::from_millis(500);
    let words = ["are the least", "what is there is kept"];
    refused(fetch(&mut desk, &server, wanted(&file)), Code::SlowRetrieval, &words);
    assert!(!desk.bytes().is_empty());

    let mut desk = Desk::new();
    desk.limits.deadline = Duration::from_millis(700);
    refused(fetch(&mut desk, &server, wanted(&file)), Code::SlowRetrieval, &["not whole within"]);

    let silent = Server::start(|_, _| Reply::new("", "", b"").cut(0, Then::Stall));
    refused(fetch(&mut Desk::new(), &silent, wanted(&file)), Code::Unreachable, &[]);
    let rules = rules(&["127.0.0.1:9"]);
    let nobody = Desk::new().transfer(wanted(&file), |t| http("http://127.0.0.1:9/x", &rules, t));
    refused(nobody, Code::Unreachable, &["nothing listens there"]);
}

#[test]
fn tls_is_trusted_by_the_configured_ca_alone() {
    let dir = tempfile::tempdir().unwrap();
    certificates(dir.path());
    let file = noise(12, 200_000);
    let served = file.clone();
    let server = Server::tls(dir.path(), move |n, r| {
        let reply = Reply::file(r, TAG, &served);
        if n == 0 { reply.cut(90_000, Then::Close) } else { reply }
    });
    let url = format!("https://localhost:{}/best.onnx", server.port);
    let named = |ca: Option<&str>| Rules {
        ca_file: ca.map(|ca| dir.path().join(ca)),
        ..rules(&[&format!("localhost:{}", server.port), &format!("127.0.0.1:{}", server.port)])
    };
    let mut desk = Desk::new();
    let mut at = |url: &str, ca| desk.transfer(wanted(&file), |t| http(url, &named(ca), t));
    refused(at(&url, None), Code::Tls, &["unknown CA", "models.ca_file"]);
    refused(at(&url, Some("stranger.pem")), Code::Tls, &["unknown CA", "stranger.pem"]);
    refused(at(&url, Some("none.pem")), Code::Tls, &["models.ca_file", "none.pem"]);
    refused(at(&url.replace("localhost", "127.0.0.1"), Some("ca.pem")), Code::Tls, &[]);
    assert!(server.requests().is_empty(), "a request went to a server that is not trusted");
    at(&url, Some("ca.pem")).unwrap();
    assert_eq!(server.requests()[1].range(), Some(90_000));
    assert_eq!(desk.bytes(), file);

    // A server without TLS answers a handshake in its own words.
    let plain = TcpListener::bind("127.0.0.1:0").unwrap();
    let entry = plain.local_addr().unwrap().to_string();
    std::thread::spawn(move || {
        for mut socket in plain.incoming().map_while(Result::ok) {
            let _ = socket.read(&mut [0; 4096]);
            let _ = socket.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n");
        }
    });
    let url = format!("https://{entry}/x");
    let got = Desk::new().transfer(wanted(&file), |t| http(&url, &rules(&[&entry]), t));
    refused(got, Code::Tls, &["does not speak TLS on this port"]);
}

#[test]
fn a_login_is_sent_and_never_said() {
    let file = noise(13, 1000);
    let served = file.clone();
    let server = Server::start(move |_, r| match r.path.split('?').next() {
        Some("/file") => Reply::file(r, TAG, &served),
        Some("/moved") => Reply::redirect("http://u2:hush2@other.example/?token=hush3"),
        Some("/cut") => Reply::file(r, TAG, &served).cut(10, Then::Close),
        _ => Reply::status("404 Not Found"),
    });
    let at = |path: &str, rules: &Rules| {
        let url = format!("http://user:hu%40sh@127.0.0.1:{}{path}?token=hush", server.port);
        let mut desk = Desk::new();
        desk.limits.failures_max = 0;
        desk.transfer(wanted(&file), |t| http(&url, rules, t))
    };
    at("/file", &local(&server)).unwrap();
    // user:hu@sh
    assert_eq!(server.requests()[0].header("authorization"), "Basic dXNlcjpodUBzaA==");
    assert_eq!(server.requests()[0].path, "/file?token=hush");
    for (path, rules) in [
        ("/gone", local(&server)),
        ("/moved", local(&server)),
        ("/x", rules(&[])),
        ("/cut", local(&server)),
    ] {
        let message = at(path, &rules).expect_err("refused").message;
        assert!(!message.contains("hu") && message.contains("***"), "{message}");
    }
}
