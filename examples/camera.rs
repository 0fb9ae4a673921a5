//! A camera on loopback: sends a clip over and over, until it is killed.
//!
//!     cargo run --example camera -- 8554 models/clips/line-a.mp4
//!
//! serves `rtsp://127.0.0.1:8554/clip`. The page's tests pull its plug and put it back.

use std::path::Path;

use noblink::rtsp::{RtspServer, Settings};

fn main() -> anyhow::Result<()> {
    let args: Vec<String> = std::env::args().collect();
    let [_, port, clip] = &args[..] else { anyhow::bail!("usage: camera PORT CLIP.mp4") };
    let server = RtspServer::start(&Settings { port: port.parse()?, ..Settings::default() })?;
    server.mount_clip("/clip", Path::new(clip), true)?;
    println!("{}", server.url("/clip"));
    loop {
        std::thread::park();
    }
}
