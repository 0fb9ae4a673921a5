//! A small HTTP server that does what a test tells it, faults included.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpListener;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{ServerConfig, ServerConnection, StreamOwned};

/// A request as it came; names of headers in lower case.
#[derive(Debug, Clone)]
pub struct Request {
    pub path: String,
    pub headers: BTreeMap<String, String>,
}

impl Request {
    pub fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", String::as_str)
    }

    /// The first byte of `Range: bytes=N-`.
    pub fn range(&self) -> Option<usize> {
        self.header("range").strip_prefix("bytes=")?.strip_suffix('-')?.parse().ok()
    }
}

/// How an answer ends after its bytes.
#[derive(Debug, Clone, Copy)]
pub enum Then {
    Close,
    /// The connection stays, silent, until the client leaves.
    Stall,
    /// The body's last byte again and again.
    Endless,
    /// The rest comes in pieces of so many bytes, so many milliseconds apart.
    Drip(usize, u64),
}

/// An answer: the head as it is written, the body, and what comes then.
#[derive(Debug, Clone)]
pub struct Reply {
    pub head: String,
    pub body: Vec<u8>,
    pub then: Then,
}

impl Reply {
    pub fn new(status: &str, headers: &str, body: &[u8]) -> Self {
        let head = format!("HTTP/1.1 {status}\r\nConnection: close\r\n{headers}\r\n");
        Self { head, body: body.to_vec(), then: Then::Close }
    }

    pub fn status(status: &str) -> Self {
        Self::new(status, "Content-Length: 0\r\n", b"")
    }

    pub fn redirect(to: &str) -> Self {
        Self::new("302 Found", &format!("Location: {to}\r\nContent-Length: 0\r\n"), b"")
    }

    /// As a good server does it: Range, If-Range, ETag.
    pub fn file(request: &Request, etag: &str, file: &[u8]) -> Self {
        let same =
            matches!(request.header("if-range"), "" | "*") || request.header("if-range") == etag;
        let tag = if etag.is_empty() { String::new() } else { format!("ETag: {etag}\r\n") };
        match request.range().filter(|_| same) {
            Some(from) if from >= file.len() => Self::new(
                "416 Range Not Satisfiable",
                &format!("Content-Range: bytes */{}\r\nContent-Length: 0\r\n", file.len()),
                b"",
            ),
            Some(from) => Self::new(
                "206 Partial Content",
                &format!(
                    "{tag}Content-Range: bytes {from}-{}/{}\r\nContent-Length: {}\r\n",
                    file.len() - 1,
                    file.len(),
                    file.len() - from
                ),
                &file[from..],
            ),
            None => Self::new("200 OK", &format!("{tag}Content-Length: {}\r\n", file.len()), file),
        }
    }

    /// Only so many bytes of the body, then `then`.
    pub fn cut(mut self, at: usize, then: Then) -> Self {
        if !matches!(then, Then::Drip(..)) {
            self.body.truncate(at);
        }
        self.then = then;
        self
    }
}

/// A listener on loopback; each request gets what the closure says.
pub struct Server {
    pub port: u16,
    requests: Arc<Mutex<Vec<Request>>>,
}

impl Server {
    /// `answer` gets the number of the request, from 0.
    pub fn start(answer: impl Fn(usize, &Request) -> Reply + Send + Sync + 'static) -> Self {
        Self::listen(None, answer)
    }

    /// With the certificate `server.pem` of a folder.
    pub fn tls(
        dir: &Path,
        answer: impl Fn(usize, &Request) -> Reply + Send + Sync + 'static,
    ) -> Self {
        let chain = CertificateDer::pem_file_iter(dir.join("server.pem")).unwrap();
        let chain = chain.map(Result::unwrap).collect();
        let key = PrivateKeyDer::from_pem_file(dir.join("server.key")).unwrap();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(chain, key)
            .unwrap();
        Self::listen(Some(Arc::new(config)), answer)
    }

    fn listen(
        tls: Option<Arc<ServerConfig>>,
        answer: impl Fn(usize, &Request) -> Reply + Send + Sync + 'static,
    ) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("loopback has a free port");
        let port = listener.local_addr().expect("it is bound").port();
        let requests = Arc::new(Mutex::new(Vec::new()));
        let (seen, answer) = (Arc::clone(&requests), Arc::new(answer));
        // Ends with the test process: a listener can't be told to stop.
        std::thread::spawn(move || {
            for socket in listener.incoming().map_while(Result::ok) {
                let (seen, answer, tls) = (Arc::clone(&seen), Arc::clone(&answer), tls.clone());
                std::thread::spawn(move || match tls {
                    None => serve(socket, &seen, &*answer),
                    Some(config) => {
                        let connection = ServerConnection::new(config).expect("a good config");
                        serve(StreamOwned::new(connection, socket), &seen, &*answer);
                    }
                });
            }
        });
        Self { port, requests }
    }

    pub fn url(&self, path: &str) -> String {
        format!("http://127.0.0.1:{}{path}", self.port)
    }

    pub fn requests(&self) -> Vec<Request> {
        self.requests.lock().expect("the server does not panic").clone()
    }
}

/// Files by their paths; those under `/slow/` take two seconds.
pub struct Shelf {
    pub server: Server,
    files: Arc<Mutex<BTreeMap<String, Vec<u8>>>>,
}

impl Shelf {
    pub fn start() -> Self {
        let files = Arc::new(Mutex::new(BTreeMap::<String, Vec<u8>>::new()));
        let shelf = Arc::clone(&files);
        let server = Server::start(move |_, request| {
            let files = shelf.lock().expect("the test does not panic with it");
            let Some(file) = files.get(&request.path) else {
                return Reply::status("404 Not Found");
            };
            let reply = Reply::file(request, "", file);
            let piece = reply.body.len() / 40 + 1;
            match request.path.starts_with("/slow/") {
                true => reply.cut(0, Then::Drip(piece, 50)),
                false => reply,
            }
        });
        Self { server, files }
    }

    /// Puts a file there; its URL.
    pub fn put(&self, path: &str, bytes: Vec<u8>) -> String {
        self.files.lock().expect("the server does not panic").insert(path.to_owned(), bytes);
        self.server.url(path)
    }

    /// The line of `[models]` that lets a service fetch from here.
    pub fn allowed(&self) -> String {
        format!("allowed_hosts = [\"127.0.0.1:{}\"]\n", self.server.port)
    }
}

fn serve(
    stream: impl Read + Write,
    seen: &Mutex<Vec<Request>>,
    answer: &dyn Fn(usize, &Request) -> Reply,
) {
    let mut stream = BufReader::new(stream);
    let Some(request) = read(&mut stream) else { return };
    let number = {
        let mut seen = seen.lock().expect("the test does not panic with it");
        seen.push(request.clone());
        seen.len() - 1
    };
    // Whatever fails: the client has left.
    let _ = write(&answer(number, &request), &mut stream);
}

fn write(reply: &Reply, stream: &mut BufReader<impl Read + Write>) -> std::io::Result<()> {
    let out = stream.get_mut();
    out.write_all(reply.head.as_bytes())?;
    match reply.then {
        Then::Close => out.write_all(&reply.body)?,
        Then::Stall => {
            out.write_all(&reply.body)?;
            out.flush()?;
            // The client sends nothing more: this ends when it goes.
            let _ = stream.read(&mut [0]);
            return Ok(());
        }
        Then::Endless => {
            out.write_all(&reply.body)?;
            let more = vec![*reply.body.last().unwrap_or(&0); 1 << 16];
            loop {
                out.write_all(&more)?;
            }
        }
        Then::Drip(bytes, ms) => {
            for piece in reply.body.chunks(bytes) {
                out.write_all(piece)?;
                out.flush()?;
                std::thread::sleep(Duration::from_millis(ms));
            }
        }
    }
    out.flush()
}

fn read(stream: &mut BufReader<impl Read + Write>) -> Option<Request> {
    let mut line = String::new();
    stream.read_line(&mut line).ok()?;
    let path = line.split(' ').nth(1)?.to_owned();
    let mut headers = BTreeMap::new();
    loop {
        let mut line = String::new();
        stream.read_line(&mut line).ok()?;
        let Some((name, value)) = line.split_once(':') else { break };
        headers.insert(name.to_ascii_lowercase(), value.trim().to_owned());
    }
    Some(Request { path, headers })
}
