//! A TCP connection that can be frozen: bytes stop, the connection stays. No real server does that
//! on request.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex};

pub(crate) struct Wire {
    pub(crate) port: u16,
    gate: Arc<Gate>,
}

#[derive(Default)]
struct Gate {
    frozen: Mutex<bool>,
    changed: Condvar,
    over: AtomicBool,
}

impl Wire {
    /// Forwards every connection to a port on loopback.
    pub(crate) fn to(port: u16) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let own = listener.local_addr().expect("bound above").port();
        let gate = Arc::new(Gate::default());
        let shared = Arc::clone(&gate);
        std::thread::spawn(move || {
            for client in listener.incoming().map_while(Result::ok) {
                if shared.over.load(Ordering::Acquire) {
                    return;
                }
                let Ok(server) = TcpStream::connect(("127.0.0.1", port)) else { continue };
                let pairs = [(client.try_clone(), server.try_clone()), (Ok(server), Ok(client))];
                for (from, to) in pairs {
                    let (from, to) = (from.expect("a handle"), to.expect("a handle"));
                    let gate = Arc::clone(&shared);
                    std::thread::spawn(move || forward(from, to, &gate));
                }
            }
        });
        Self { port: own, gate }
    }

    pub(crate) fn freeze(&self, frozen: bool) {
        *self.gate.frozen.lock().expect("no panic above") = frozen;
        self.gate.changed.notify_all();
    }
}

impl Drop for Wire {
    fn drop(&mut self) {
        self.gate.over.store(true, Ordering::Release);
        self.freeze(false);
        let _ = TcpStream::connect(("127.0.0.1", self.port));
    }
}

fn forward(mut from: TcpStream, mut to: TcpStream, gate: &Gate) {
    let mut bytes = [0; 65536];
    while let Ok(n) = from.read(&mut bytes)
        && n > 0
    {
        let frozen = gate.frozen.lock().expect("no panic above");
        drop(gate.changed.wait_while(frozen, |frozen| *frozen).expect("no panic above"));
        if to.write_all(&bytes[..n]).is_err() {
            break;
        }
    }
    let _ = from.shutdown(std::net::Shutdown::Both);
    let _ = to.shutdown(std::net::Shutdown::Both);
}
