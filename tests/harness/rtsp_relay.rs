//! A TCP relay before an RTSP server, for the trouble that no real server makes on request.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

/// What is wrong with the way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Trouble {
    /// Nothing.
    None,
    /// Bytes stop; connections stay, and new ones are accepted.
    Frozen,
    /// Nothing comes through, and new connections are not answered.
    BlackHole,
    /// Pictures are noise, in RTP packets that are well-formed.
    Garbled,
    /// All that the camera sends is noise.
    Noise,
    /// RTP timestamps are so much later, in ticks of 90 kHz.
    Shift(u32),
    /// New sessions are refused.
    Refuse,
    /// Connections are closed after this time.
    CloseAfter(Duration),
}

pub(crate) struct Relay {
    pub(crate) port: u16,
    gate: Arc<Gate>,
    listener: Arc<TcpListener>,
    /// Connections that fill the queue before a black hole.
    fillers: Vec<TcpStream>,
}

struct Gate {
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    trouble: Trouble,
    /// Connections of earlier generations are closed.
    generation: u64,
    over: bool,
}

impl Relay {
    /// Forwards every connection to a port on loopback.
    pub(crate) fn to(port: u16) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        listener.set_nonblocking(true).expect("a socket of ours");
        let own = listener.local_addr().expect("bound above").port();
        let state = State { trouble: Trouble::None, generation: 0, over: false };
        let gate = Arc::new(Gate { state: Mutex::new(state), changed: Condvar::new() });
        let listener = Arc::new(listener);
        std::thread::spawn({
            let (gate, listener) = (Arc::clone(&gate), Arc::clone(&listener));
            move || accept(&listener, port, &gate)
        });
        Self { port: own, gate, listener, fillers: Vec::new() }
    }

    pub(crate) fn url(&self) -> String {
        format!("rtsp://127.0.0.1:{}/clip", self.port)
    }

    pub(crate) fn set(&mut self, trouble: Trouble) {
        self.gate.change(|s| s.trouble = trouble);
        let hole = trouble == Trouble::BlackHole;
        // SAFETY: a listening socket of ours; to listen again changes the length of its queue only.
        unsafe { nix::libc::listen(self.listener.as_raw_fd(), if hole { 0 } else { 128 }) };
        self.fillers.clear();
        if hole {
            let address = ([127, 0, 0, 1], self.port).into();
            let fill = || TcpStream::connect_timeout(&address, Duration::from_millis(200)).ok();
            // Full: the kernel drops what else knocks.
            self.fillers = std::iter::from_fn(fill).collect();
        }
    }

    /// Closes all connections.
    pub(crate) fn cut(&self) {
        self.gate.change(|s| s.generation += 1);
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.gate.change(|s| s.over = true);
    }
}

impl Gate {
    fn change(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.state.lock().expect("no panic above"));
        self.changed.notify_all();
    }

    fn now(&self) -> (Trouble, u64, bool) {
        let state = self.state.lock().expect("no panic above");
        (state.trouble, state.generation, state.over)
    }

    /// Waits while nothing gets through; returns the trouble, or none when the connection is over.
    fn pass(&self, generation: u64, born: Instant) -> Option<Trouble> {
        let held = |s: &mut State| {
            let held = matches!(s.trouble, Trouble::Frozen | Trouble::BlackHole);
            held && !s.over && s.generation == generation
        };
        let state = self.state.lock().expect("no panic above");
        let state = self.changed.wait_while(state, held).expect("no panic above");
        let late = matches!(state.trouble, Trouble::CloseAfter(t) if born.elapsed() >= t);
        (!state.over && !late && state.generation == generation).then_some(state.trouble)
    }
}

fn accept(listener: &TcpListener, port: u16, gate: &Arc<Gate>) {
    loop {
        let (trouble, generation, over) = gate.now();
        if over {
            return;
        }
        let accepted = (trouble != Trouble::BlackHole).then(|| listener.accept().ok()).flatten();
        let Some((client, _)) = accepted else {
            std::thread::sleep(Duration::from_millis(10));
            continue;
        };
        client.set_nonblocking(false).expect("a socket of ours");
        let Ok(server) = TcpStream::connect(("127.0.0.1", port)) else { continue };
        let clone = |s: &TcpStream| s.try_clone().expect("a handle");
        let (from_client, to_server, gate_up) = (clone(&client), clone(&server), Arc::clone(gate));
        std::thread::spawn(move || requests(from_client, to_server, generation, &gate_up));
        let gate_down = Arc::clone(gate);
        std::thread::spawn(move || answers(server, client, generation, &gate_down));
    }
}

fn close(a: &TcpStream, b: &TcpStream) {
    let _ = a.shutdown(std::net::Shutdown::Both);
    let _ = b.shutdown(std::net::Shutdown::Both);
}

/// From the client. It waits for each answer, so a read is a request.
fn requests(mut client: TcpStream, mut server: TcpStream, generation: u64, gate: &Gate) {
    let born = Instant::now();
    let mut bytes = [0; 65536];
    while let Ok(n) = client.read(&mut bytes)
        && n > 0
        && let Some(trouble) = gate.pass(generation, born)
    {
        let text = String::from_utf8_lossy(&bytes[..n]);
        let done = if trouble == Trouble::Refuse && text.starts_with("SETUP") {
            let number = text.lines().find_map(|l| l.strip_prefix("CSeq: ")).unwrap_or("0");
            let refusal = format!("RTSP/1.0 453 Not Enough Bandwidth\r\nCSeq: {number}\r\n\r\n");
            client.write_all(refusal.as_bytes())
        } else {
            server.write_all(&bytes[..n])
        };
        if done.is_err() {
            break;
        }
    }
    close(&client, &server);
}

/// From the server: answers, and RTP packets between them (RFC 2326, section 10.12).
fn answers(mut server: TcpStream, mut client: TcpStream, generation: u64, gate: &Gate) {
    let born = Instant::now();
    let (mut buffer, mut bytes, mut noise) = (Vec::new(), [0; 65536], 1_u32);
    'read: while let Ok(n) = server.read(&mut bytes)
        && n > 0
    {
        buffer.extend_from_slice(&bytes[..n]);
        while let Some(length) = first_message(&buffer) {
            let Some(trouble) = gate.pass(generation, born) else { break 'read };
            let mut message: Vec<u8> = buffer.drain(..length).collect();
            spoil(&mut message, trouble, &mut noise);
            if client.write_all(&message).is_err() {
                break 'read;
            }
        }
    }
    close(&client, &server);
}

/// The length of the first message, if it is there as a whole.
fn first_message(buffer: &[u8]) -> Option<usize> {
    let length = if buffer.first()? == &b'$' {
        4 + usize::from(u16::from_be_bytes([*buffer.get(2)?, *buffer.get(3)?]))
    } else {
        let head = buffer.windows(4).position(|w| w == b"\r\n\r\n")? + 4;
        let text = String::from_utf8_lossy(&buffer[..head]).to_lowercase();
        let body = text.lines().find_map(|l| l.strip_prefix("content-length:"));
        head + body.map_or(0, |n| n.trim().parse().expect("a server's length"))
    };
    (buffer.len() >= length).then_some(length)
}

fn spoil(message: &mut [u8], trouble: Trouble, noise: &mut u32) {
    const RTP_HEADER: usize = 12;
    let mut random = || {
        *noise ^= *noise << 13;
        *noise ^= *noise >> 17;
        *noise ^= *noise << 5;
        *noise as u8
    };
    let is_rtp =
        message[0] == b'$' && message[1].is_multiple_of(2) && message.len() > 4 + RTP_HEADER;
    match trouble {
        Trouble::Garbled if is_rtp => {
            message[4 + RTP_HEADER..].iter_mut().for_each(|b| *b = random());
        }
        Trouble::Noise => message.iter_mut().for_each(|b| *b = random()),
        Trouble::Shift(ticks) if is_rtp => {
            let at = 8..12;
            let time = u32::from_be_bytes(message[at.clone()].try_into().expect("four bytes"));
            message[at].copy_from_slice(&time.wrapping_add(ticks).to_be_bytes());
        }
        _ => {}
    }
}
