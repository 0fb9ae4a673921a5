//! A door in front of a broker that can be shut, and that notes which records the broker has
//! acknowledged through it.

use std::collections::{HashMap, HashSet};
use std::io::Write;
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use serde_json::Value;

use super::peer::{PUBACK, PUBLISH, Packet, read};

/// A record, as consumers tell it from others.
pub type Key = (String, String, u64);

/// The key of a record's payload.
pub fn key(record: &Value) -> Key {
    let text = |name: &str| record[name].as_str().expect("a name").to_owned();
    (text("camera"), text("boot"), record["seq"].as_u64().expect("a number"))
}

#[derive(Default)]
struct Shared {
    open: AtomicBool,
    acked: Mutex<HashSet<Key>>,
    sockets: Mutex<Vec<TcpStream>>,
}

pub struct Relay {
    pub port: u16,
    shared: Arc<Shared>,
}

impl Relay {
    /// Open. Ends with the test process.
    pub fn to(broker: u16) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("loopback has a free port");
        let port = listener.local_addr().expect("it is bound").port();
        let shared = Arc::new(Shared::default());
        shared.open.store(true, Ordering::Release);
        let own = Arc::clone(&shared);
        std::thread::spawn(move || {
            for client in listener.incoming().map_while(Result::ok) {
                if !own.open.load(Ordering::Acquire) {
                    continue;
                }
                let Ok(server) = TcpStream::connect(("127.0.0.1", broker)) else { continue };
                join(client, server, &own);
            }
        });
        Self { port, shared }
    }

    /// Shut, it ends every connection and accepts none.
    pub fn open(&self, open: bool) {
        self.shared.open.store(open, Ordering::Release);
        if !open {
            let mut sockets = self.shared.sockets.lock().expect("no panic above");
            sockets.drain(..).for_each(|s| drop(s.shutdown(Shutdown::Both)));
        }
    }

    /// The records whose PUBACK went through.
    pub fn acked(&self) -> HashSet<Key> {
        self.shared.acked.lock().expect("no panic above").clone()
    }
}

fn join(client: TcpStream, server: TcpStream, shared: &Arc<Shared>) {
    let copy = |socket: &TcpStream| socket.try_clone().expect("a handle");
    shared.sockets.lock().expect("no panic above").extend([copy(&client), copy(&server)]);
    // By packet id: what is out on this connection.
    let out: Arc<Mutex<HashMap<[u8; 2], Key>>> = Arc::default();
    let (there, back) = (Arc::clone(&out), Arc::clone(shared));
    let (to_server, to_client) = (copy(&server), copy(&client));
    forward(client, to_server, move |packet| {
        if packet.kind == PUBLISH && packet.topic().ends_with("/detections") {
            let record = serde_json::from_slice(packet.payload()).expect("a record is JSON");
            there.lock().expect("no panic above").insert(packet.id(), key(&record));
        }
    });
    forward(server, to_client, move |packet| {
        if packet.kind == PUBACK {
            let key = out.lock().expect("no panic above").remove(&packet.id());
            back.acked.lock().expect("no panic above").extend(key);
        }
    });
}

fn forward(mut from: TcpStream, mut to: TcpStream, note: impl Fn(&Packet) + Send + 'static) {
    std::thread::spawn(move || {
        while let Some(packet) = read(&mut from) {
            note(&packet);
            if to.write_all(&packet.bytes).is_err() {
                break;
            }
        }
        let _ = from.shutdown(Shutdown::Both);
        let _ = to.shutdown(Shutdown::Both);
    });
}
