//! Cameras for a bench, in a process of their own: what they cost is not the service's doing.

use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context, bail};
use gst::prelude::*;

use crate::demo;
use crate::rtsp::{self, RtspServer};

#[derive(Debug, clap::Args)]
pub(in crate::cli) struct Args {
    /// H.264 mp4 files, a camera each
    #[arg(required = true)]
    clips: Vec<PathBuf>,
}

/// Serves until standard input ends, as it does with the parent.
pub(super) fn serve(args: &Args) -> anyhow::Result<()> {
    let server = RtspServer::start(&rtsp::Settings::default())?;
    for (n, clip) in args.clips.iter().enumerate() {
        let path = format!("/{n}");
        server.mount_clip(&path, clip, true)?;
        say!("{}", server.url(&path));
    }
    std::io::stdin().read_to_end(&mut Vec::new())?;
    server.stop();
    Ok(())
}

/// The process. It ends when this is dropped.
pub(super) struct Cameras {
    process: Child,
    pub(super) urls: Vec<String>,
}

impl Cameras {
    /// A camera for each clip, or the demo's two.
    pub(super) fn of(clips: &[PathBuf]) -> anyhow::Result<Self> {
        if !clips.is_empty() {
            return Self::start(clips);
        }
        Self::start(&demo::clips()?.map(|(_, clip)| clip))
    }

    pub(super) fn start(clips: &[PathBuf]) -> anyhow::Result<Self> {
        let mut process = Command::new(std::env::current_exe()?)
            .args(["bench", "cameras"])
            .args(clips)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("the cameras' process can't be started")?;
        let lines = BufReader::new(process.stdout.take().context("it was asked for")?).lines();
        let urls = lines.take(clips.len()).collect::<Result<Vec<_>, _>>()?;
        let cameras = Self { process, urls };
        if cameras.urls.len() < clips.len() {
            bail!("the cameras' process has ended: see above");
        }
        Ok(cameras)
    }
}

impl Drop for Cameras {
    fn drop(&mut self) {
        drop(self.process.stdin.take());
        let _ = self.process.wait();
    }
}

/// Writes `clip` anew with another size and rate.
pub(super) fn transcode(
    clip: &Path,
    (width, height): (u32, u32),
    fps: u32,
    to: &Path,
) -> anyhow::Result<()> {
    let launch = format!(
        "filesrc name=from ! qtdemux ! h264parse ! avdec_h264 ! videoconvertscale ! videorate \
         ! video/x-raw,format=I420,width={width},height={height},framerate={fps}/1 \
         ! x264enc speed-preset=veryfast bframes=0 key-int-max={} ! h264parse ! mp4mux \
         ! filesink name=to",
        2 * fps
    );
    let pipeline = gst::parse::launch(&launch).context("a clip can't be made: run make setup")?;
    let pipeline = pipeline.downcast::<gst::Pipeline>().expect("several elements are a pipeline");
    for (name, path) in [("from", clip), ("to", to)] {
        let path = path.to_str().with_context(|| format!("{} is not UTF-8", path.display()))?;
        pipeline.by_name(name).expect("it is in the text").set_property("location", path);
    }
    let bus = pipeline.bus().expect("a pipeline has one");
    pipeline.set_state(gst::State::Playing).with_context(|| clip.display().to_string())?;
    let wanted = [gst::MessageType::Eos, gst::MessageType::Error];
    let end = bus.timed_pop_filtered(gst::ClockTime::from_seconds(120), &wanted);
    let _ = pipeline.set_state(gst::State::Null);
    match end.as_ref().map(|message| message.view()) {
        Some(gst::MessageView::Eos(_)) => Ok(()),
        Some(gst::MessageView::Error(e)) => bail!("{}: {}", clip.display(), e.error()),
        _ => bail!("{}: no clip within two minutes", clip.display()),
    }
}
