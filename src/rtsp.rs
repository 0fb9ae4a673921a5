//! An RTSP server on loopback: the cameras of `noblink demo` and of the tests.
//!
//! It is GStreamer's own server with its own GLib main context on the thread `rtsp`, which the
//! [`RtspServer`] owns and joins. A clip is demuxed once, at the mount, and sent in a loop without
//! being encoded again: its timestamps run on, so that a client sees one endless stream.

use std::path::Path;
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;

use anyhow::{Context as _, bail};
use gst::glib;
use gst::prelude::*;
use gst_rtsp_server::prelude::*;
use gst_rtsp_server::{RTSPAuth, RTSPFilterResult, RTSPMediaFactory, RTSPServer, RTSPToken, gio};

/// How the server is reached.
#[derive(Debug, Clone, Default)]
pub struct Settings {
    /// TCP port on 127.0.0.1; 0 takes a free one.
    pub port: u16,
    /// User name and password that every client must know (Basic).
    pub login: Option<(String, String)>,
    /// Certificate and private key, PEM in one text: the server speaks `rtsps` then.
    pub tls_pem: Option<String>,
}

/// A running server.
pub struct RtspServer {
    server: RTSPServer,
    context: glib::MainContext,
    main_loop: glib::MainLoop,
    thread: Option<JoinHandle<()>>,
    guarded: bool,
    scheme: &'static str,
    port: u16,
}

/// Who a client is when no login is asked for.
const ANYONE: &str = "anyone";

impl RtspServer {
    /// Binds the port and serves until `stop`.
    pub fn start(settings: &Settings) -> anyhow::Result<Self> {
        gst::init().context("GStreamer does not start")?;
        let server = RTSPServer::new();
        server.set_address("127.0.0.1");
        server.set_service(&settings.port.to_string());
        // Clients live in the server's own thread: closing them from another one races with their
        // reading, which then spins on a closed connection for ever (seen in 1 of 3 test runs).
        if let Some(pool) = server.thread_pool() {
            pool.set_max_threads(0);
        }
        if settings.login.is_some() || settings.tls_pem.is_some() {
            server.set_auth(Some(&auth(settings)?));
        }
        let context = glib::MainContext::new();
        let main_loop = glib::MainLoop::new(Some(&context), false);
        let (bound, bound_port) = mpsc::channel();
        let thread = std::thread::Builder::new().name("rtsp".into()).spawn({
            let (server, context, main_loop) = (server.clone(), context.clone(), main_loop.clone());
            move || {
                let served = context.with_thread_default(|| {
                    let source = server.attach(Some(&context));
                    let _ = bound.send(source.as_ref().map(|_| server.bound_port()).ok());
                    let Ok(source) = source else { return };
                    main_loop.run();
                    if let Some(listener) = context.find_source_by_id(&source) {
                        listener.destroy();
                    }
                });
                served.expect("nobody else runs this context");
            }
        })?;
        let port = bound_port.recv().ok().flatten().and_then(|p| u16::try_from(p).ok());
        let Some(port) = port.filter(|p| *p > 0) else {
            let _ = thread.join();
            bail!("127.0.0.1:{} can't be bound for RTSP", settings.port);
        };
        Ok(Self {
            server,
            context,
            main_loop,
            thread: Some(thread),
            guarded: settings.login.is_some() || settings.tls_pem.is_some(),
            scheme: if settings.tls_pem.is_some() { "rtsps" } else { "rtsp" },
            port,
        })
    }

    /// The port that was bound.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// The address of a mount, without a login.
    pub fn url(&self, path: &str) -> String {
        format!("{}://127.0.0.1:{}{path}", self.scheme, self.port)
    }

    /// Serves a launch text, of which the payloader is named `pay0`, under `/path`. All clients
    /// share one pipeline, as they share a camera. Replaces what was mounted there for the clients
    /// to come.
    pub fn mount_launch(&self, path: &str, launch: &str) -> anyhow::Result<()> {
        // The server itself would only fail to answer, 20 s long, when a client comes.
        gst::parse::launch_full(launch, None, gst::ParseFlags::FATAL_ERRORS)
            .with_context(|| format!("the launch text of {path}"))?;
        let factory = RTSPMediaFactory::new();
        factory.set_launch(&format!("( {launch} )"));
        self.mount(path, factory)
    }

    /// Serves an H.264 mp4 file under `/path`, endlessly or once. It is kept in memory (10 s of
    /// 720p are some 2 MB) and sent as it is, at its own pace.
    pub fn mount_clip(&self, path: &str, file: &Path, repeat: bool) -> anyhow::Result<()> {
        let clip = Arc::new(Clip::read(file)?);
        // clocksync paces what appsrc would hand out at once; two access units wait before it.
        let launch = "appsrc name=source is-live=true format=time max-buffers=2 max-bytes=0 \
                      ! h264parse config-interval=-1 ! clocksync \
                      ! rtph264pay name=pay0 pt=96 config-interval=-1";
        self.mount_source(path, launch, move |source| {
            source.set_caps(Some(&clip.caps));
            source.set_callbacks(clip.play(repeat));
        })
    }

    /// Serves a launch text whose `appsrc`, named `source`, is set up by `configure`, anew for every
    /// pipeline.
    pub fn mount_source(
        &self,
        path: &str,
        launch: &str,
        configure: impl Fn(&gst_app::AppSrc) + Send + Sync + 'static,
    ) -> anyhow::Result<()> {
        let factory = RTSPMediaFactory::new();
        factory.set_launch(&format!("( {launch} )"));
        factory.connect_media_configure(move |_, media| {
            let source = media.element().downcast::<gst::Bin>().ok();
            let source = source.and_then(|bin| bin.by_name("source"));
            let source = source.and_then(|e| e.downcast::<gst_app::AppSrc>().ok());
            if let Some(source) = source {
                configure(&source);
            }
        });
        self.mount(path, factory)
    }

    fn mount(&self, path: &str, factory: RTSPMediaFactory) -> anyhow::Result<()> {
        factory.set_shared(true);
        if self.guarded {
            factory.add_role_from_structure(
                &gst::Structure::builder(ANYONE)
                    .field("media.factory.access", true)
                    .field("media.factory.construct", true)
                    .build(),
            );
        }
        let mounts = self.server.mount_points().context("the server has no mount points")?;
        mounts.add_factory(path, factory);
        Ok(())
    }

    /// Closes the port and every client's connection, as a camera does that loses its power.
    pub fn stop(mut self) {
        self.close();
    }

    fn close(&mut self) {
        let Some(thread) = self.thread.take() else { return };
        let server = self.server.clone();
        let main_loop = self.main_loop.clone();
        self.context.invoke(move || {
            server.client_filter(Some(&mut |_, _| RTSPFilterResult::Remove));
            // A session would keep its shared media playing until it times out after 60 s.
            if let Some(pool) = server.session_pool() {
                pool.filter(Some(&mut |_, _| RTSPFilterResult::Remove));
            }
            main_loop.quit();
        });
        let _ = thread.join();
    }
}

impl Drop for RtspServer {
    fn drop(&mut self) {
        self.close();
    }
}

fn auth(settings: &Settings) -> anyhow::Result<RTSPAuth> {
    let auth = RTSPAuth::new();
    if let Some(pem) = &settings.tls_pem {
        let certificate = gio::TlsCertificate::from_pem(pem).context("the TLS certificate")?;
        auth.set_tls_certificate(Some(&certificate));
    }
    let token = RTSPToken::builder().field("media.factory.role", ANYONE).build();
    match &settings.login {
        Some((user, password)) => {
            auth.add_basic(&RTSPAuth::make_basic(user, password), &token);
        }
        None => auth.set_default_token(Some(&mut token.clone())),
    }
    Ok(auth)
}

/// A clip's access units, byte-stream, each with its time from the start.
struct Clip {
    caps: gst::Caps,
    units: Vec<gst::Buffer>,
    /// What one turn adds to the timestamps.
    turn: gst::ClockTime,
}

impl Clip {
    fn read(file: &Path) -> anyhow::Result<Self> {
        let name = file.display();
        let pipeline = gst::parse::launch(
            "filesrc name=file ! qtdemux ! h264parse \
             ! video/x-h264,stream-format=byte-stream,alignment=au ! appsink name=units sync=false",
        )?;
        let pipeline = pipeline.downcast::<gst::Pipeline>().expect("several elements");
        let by_name = |n: &str| pipeline.by_name(n).expect("named in the text above");
        by_name("file").set_property("location", file);
        let sink = by_name("units").downcast::<gst_app::AppSink>().expect("an appsink");
        let playing = pipeline.set_state(gst::State::Playing);
        let mut caps = None;
        let mut units: Vec<gst::Buffer> = Vec::new();
        while playing.is_ok()
            && let Some(sample) = sink.try_pull_sample(gst::ClockTime::from_seconds(10))
        {
            caps = caps.or_else(|| sample.caps_owned());
            units.extend(sample.buffer_owned());
        }
        let _ = pipeline.set_state(gst::State::Null);
        let start = units.iter().filter_map(|u| u.pts()).min();
        let (Some(caps), Some(start)) = (caps, start) else {
            bail!("{name}: can't be read as an mp4 file with H.264 video");
        };
        // Decoding starts before the first presentation when there are B frames.
        let offset = units[0].dts().map_or(start, |dts| dts.min(start));
        let mut end = gst::ClockTime::ZERO;
        for unit in &mut units {
            let unit = unit.make_mut();
            unit.set_pts(unit.pts().map(|t| t.saturating_sub(offset)));
            unit.set_dts(unit.dts().map(|t| t.saturating_sub(offset)));
            end = end.max(unit.pts().unwrap_or(end) + unit.duration().unwrap_or_default());
        }
        Ok(Self { caps, units, turn: end.saturating_sub(start.saturating_sub(offset)) })
    }

    /// Hands out one access unit whenever the source has room for it.
    fn play(self: &Arc<Self>, repeat: bool) -> gst_app::AppSrcCallbacks {
        let clip = Arc::clone(self);
        let mut next = 0;
        let mut shift = gst::ClockTime::ZERO;
        let need_data = move |source: &gst_app::AppSrc, _: u32| {
            if next == clip.units.len() {
                if !repeat {
                    let _ = source.end_of_stream();
                    return;
                }
                next = 0;
                shift += clip.turn;
            }
            // The bytes are shared, only the timestamps are new.
            let mut unit = clip.units[next].copy();
            let times = unit.make_mut();
            times.set_pts(times.pts().map(|t| t + shift));
            times.set_dts(times.dts().map(|t| t + shift));
            next += 1;
            // A refusal means that the source is being stopped.
            let _ = source.push_buffer(unit);
        };
        gst_app::AppSrcCallbacks::builder().need_data(need_data).build()
    }
}
