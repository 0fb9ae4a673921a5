//! The command line's end of the control socket: one HTTP/1.1 request a connection.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, bail};
use serde_json::Value;

/// Longest silence of the service.
const PATIENCE: Duration = Duration::from_secs(30);

/// A connection to the service's socket.
pub struct Client<'a> {
    socket: &'a Path,
}

impl<'a> Client<'a> {
    /// Of the service with this socket.
    pub fn new(socket: &'a Path) -> Self {
        Self { socket }
    }

    /// `GET`; the JSON that comes back.
    ///
    /// # Errors
    /// There is no service, or it answers otherwise than with JSON.
    pub fn get(&self, path: &str) -> anyhow::Result<Value> {
        self.request("GET", path, &[], 0, &mut std::io::empty())
    }

    /// `POST` of JSON.
    ///
    /// # Errors
    /// As [`get`](Self::get).
    pub fn post(&self, path: &str, body: &Value) -> anyhow::Result<Value> {
        let body = body.to_string();
        let headers = [("content-type", "application/json".to_owned())];
        self.request("POST", path, &headers, body.len() as u64, &mut body.as_bytes())
    }

    /// Any request with a body of so many bytes.
    ///
    /// # Errors
    /// As [`get`](Self::get).
    pub fn request(
        &self,
        method: &str,
        path: &str,
        headers: &[(&str, String)],
        length: u64,
        body: &mut impl Read,
    ) -> anyhow::Result<Value> {
        let mut stream = UnixStream::connect(self.socket).with_context(|| {
            format!(
                "no noblink answers at {}: is the service running? Name its configuration with \
                 --config FILE",
                self.socket.display()
            )
        })?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        let mut head = format!(
            "{method} {path} HTTP/1.1\r\nhost: noblink\r\nconnection: close\r\ncontent-length: {length}\r\n"
        );
        for (name, value) in headers {
            head += &format!("{name}: {value}\r\n");
        }
        stream.write_all((head + "\r\n").as_bytes())?;
        // A service that refuses early closes its end: its answer says why.
        let _ = std::io::copy(body, &mut stream);
        let mut answer = Vec::new();
        let read = stream.read_to_end(&mut answer);
        // With bytes of ours unread it resets the connection behind its answer.
        if answer.is_empty() {
            read.context("the service does not answer")?;
        }
        parse(&answer)
    }
}

/// The JSON of an answer; its status stands in `ok` as well.
fn parse(answer: &[u8]) -> anyhow::Result<Value> {
    let end = answer.windows(4).position(|w| w == b"\r\n\r\n").context("no HTTP answer")?;
    let head = String::from_utf8_lossy(&answer[..end]).to_lowercase();
    let body = &answer[end + 4..];
    let whole;
    let body = match head.contains("transfer-encoding: chunked") {
        true => {
            whole = unchunk(body);
            &whole[..]
        }
        false => body,
    };
    match serde_json::from_slice(body) {
        Ok(value) => Ok(value),
        Err(_) => bail!(
            "the service answers {}: {}",
            head.lines().next().unwrap_or_default(),
            String::from_utf8_lossy(body)
        ),
    }
}

fn unchunk(mut body: &[u8]) -> Vec<u8> {
    let mut whole = Vec::new();
    while let Some(end) = body.windows(2).position(|w| w == b"\r\n") {
        let size = usize::from_str_radix(String::from_utf8_lossy(&body[..end]).trim(), 16);
        let (Ok(size), start) = (size, end + 2) else { break };
        if size == 0 || start + size > body.len() {
            break;
        }
        whole.extend_from_slice(&body[start..start + size]);
        body = body.get(start + size + 2..).unwrap_or_default();
    }
    whole
}
