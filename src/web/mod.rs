//! The page and its API: `/`, `/api/v1/…`, `/metrics`, `/healthz`, `/readyz`. Runs on the network's
//! thread; nothing here may block.

mod auth;
pub mod feed;
mod files;
pub mod metrics;
pub mod page;

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::Context;
use axum::Json;
use axum::body::{Body, Bytes};
use axum::extract::rejection::{JsonRejection, QueryRejection};
use axum::extract::{Query, State};
use axum::http::header::{CACHE_CONTROL, CONTENT_TYPE, SET_COOKIE};
use axum::http::{HeaderValue, StatusCode};
use axum::middleware;
use axum::response::sse::{self, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use serde::Deserialize;
use serde_json::json;
use tokio_stream::wrappers::ReceiverStream;

use crate::control::{self, refuse, unreadable};
use crate::preview::Previews;
use auth::Guard;
use feed::{Event, Feed};

/// Cameras in one stream of pictures.
const CAMERAS_MAX: usize = 64;

/// What the page is made from.
#[derive(Clone)]
pub struct Shared {
    /// What it is told.
    pub feed: Arc<Feed>,
    /// Live pictures.
    pub previews: Arc<Previews>,
    /// `/metrics`, as of the last second.
    pub metrics: Arc<metrics::Page>,
    /// For `/readyz`: a model runs and the broker was tried.
    pub ready: Arc<AtomicBool>,
    /// Status, models and jobs, as over the control socket.
    pub control: control::Shared,
}

/// Binds the port; the future serves it.
///
/// # Errors
/// The address can't be bound.
pub fn serve(
    listen: SocketAddr,
    token: Option<String>,
    shared: Shared,
) -> anyhow::Result<(SocketAddr, impl Future<Output = ()> + Send + use<>)> {
    let listener = std::net::TcpListener::bind(listen)
        .with_context(|| format!("web.listen = \"{listen}\" can't be bound"))?;
    listener.set_nonblocking(true)?;
    let address = listener.local_addr()?;
    let router = router(Guard::new(token), shared);
    Ok((address, async move {
        let served =
            async { axum::serve(tokio::net::TcpListener::from_std(listener)?, router).await };
        if let Err(e) = served.await {
            tracing::error!("the page's server ended: {e}");
        }
    }))
}

fn router(guard: Guard, shared: Shared) -> axum::Router {
    let guarded = axum::Router::new()
        .route("/api/v1/events", get(events))
        .route("/api/v1/live", get(live))
        .route("/metrics", get(metrics))
        .with_state(shared.clone())
        .merge(control::router(shared.control.clone()))
        .layer(middleware::from_fn_with_state(guard.clone(), auth::check));
    let open = axum::Router::new()
        .route("/healthz", get(|| async { "ok\n" }))
        .route("/readyz", get(ready))
        .with_state(shared);
    let login = axum::Router::new().route("/api/v1/login", post(login)).with_state(guard);
    open.merge(guarded)
        .merge(login)
        .fallback(get(files::serve))
        .layer(middleware::map_response(harden))
}

/// What a browser may do with this page, on every answer.
async fn harden(mut response: Response) -> Response {
    let headers = response.headers_mut();
    for (name, value) in [
        (
            "content-security-policy",
            "default-src 'self'; img-src 'self' blob: data:; style-src 'self' 'unsafe-inline'; \
             frame-ancestors 'none'; base-uri 'none'; form-action 'self'",
        ),
        ("x-content-type-options", "nosniff"),
        ("referrer-policy", "no-referrer"),
    ] {
        headers.insert(name, HeaderValue::from_static(value));
    }
    headers.entry(CACHE_CONTROL).or_insert(HeaderValue::from_static("no-store"));
    response
}

async fn ready(State(shared): State<Shared>) -> Response {
    match shared.ready.load(Ordering::Relaxed) {
        true => "ready\n".into_response(),
        false => (StatusCode::SERVICE_UNAVAILABLE, "not ready\n").into_response(),
    }
}

#[derive(Deserialize)]
struct Login {
    token: String,
}

async fn login(State(guard): State<Guard>, login: Result<Json<Login>, JsonRejection>) -> Response {
    let login = match login {
        Ok(Json(login)) => login,
        Err(e) => return unreadable(e.status(), e.body_text()),
    };
    if !guard.is_token(&login.token) {
        // Guessing is made slow, not impossible: the token is as long as whoever chose it wanted.
        tokio::time::sleep(Duration::from_secs(1)).await;
        return refuse(StatusCode::UNAUTHORIZED, "token", "this is not the token".into());
    }
    let cookie = format!(
        "{}={}; Path=/; HttpOnly; SameSite=Strict; Max-Age=2592000",
        auth::COOKIE_NAME,
        login.token
    );
    match HeaderValue::from_str(&cookie) {
        Ok(cookie) => ([(SET_COOKIE, cookie)], Json(json!({ "ok": true }))).into_response(),
        Err(_) => refuse(StatusCode::UNAUTHORIZED, "token", "no cookie can hold this token".into()),
    }
}

async fn metrics(State(shared): State<Shared>) -> Response {
    let kind = HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8");
    ([(CONTENT_TYPE, kind)], shared.metrics.text()).into_response()
}

/// Server-sent events: what there is to know, `ready`, then all that comes.
async fn events(State(shared): State<Shared>) -> Response {
    let (known, mut live) = shared.feed.watch();
    let (sender, receiver) = tokio::sync::mpsc::channel(64);
    tokio::spawn(async move {
        for event in known {
            if sender.send(Ok::<_, Infallible>(told(&event))).await.is_err() {
                return;
            }
        }
        let mut next = Some(sse::Event::default().event("ready").data("{}"));
        while let Some(event) = next {
            if sender.send(Ok(event)).await.is_err() {
                return;
            }
            // A viewer that lags behind is let go: the browser comes again and starts anew.
            next = tokio::select! {
                event = live.recv() => event.ok().as_ref().map(told),
                () = sender.closed() => None,
            };
        }
    });
    let stream = ReceiverStream::new(receiver);
    Sse::new(stream).keep_alive(KeepAlive::new().interval(Duration::from_secs(15))).into_response()
}

/// An event's name is its topic; those that hold an id are called `camera`, `counts` and `job`.
fn told(event: &Event) -> sse::Event {
    let name = match &*event.topic {
        topic if topic.starts_with("cameras/") && topic.ends_with("/counts") => "counts",
        topic if topic.starts_with("cameras/") => "camera",
        topic if topic.starts_with("models/jobs/") => "job",
        topic => topic,
    };
    // Our JSON is one line.
    sse::Event::default().event(name).data(String::from_utf8_lossy(&event.payload))
}

#[derive(Deserialize)]
struct Wanted {
    /// Ids, joined by commas.
    cameras: String,
}

/// Pictures of some cameras with what was found on them, as long as the request stands: each is its
/// length (4 bytes, big end first) and a [`crate::preview::Picture`]. One request for all: browsers
/// open six connections to a server at most.
async fn live(
    State(shared): State<Shared>,
    wanted: Result<Query<Wanted>, QueryRejection>,
) -> Response {
    let wanted = match wanted {
        Ok(Query(wanted)) => wanted,
        Err(e) => return unreadable(e.status(), e.body_text()),
    };
    let (sender, receiver) = tokio::sync::mpsc::channel(2);
    for id in wanted.cameras.split(',').take(CAMERAS_MAX) {
        let Some(tap) = shared.previews.known(id) else {
            let text = format!("there is no camera {id:?}");
            return refuse(StatusCode::NOT_FOUND, "unknown_camera", text);
        };
        let (mut viewer, sender) = (tap.look(), sender.clone());
        tokio::spawn(async move {
            while let Some(picture) = tokio::select! {
                picture = viewer.next() => picture,
                () = sender.closed() => None,
            } {
                let length = (picture.len() as u32).to_be_bytes();
                let bytes: Bytes = [&length[..], &picture].concat().into();
                if sender.send(Ok::<_, Infallible>(bytes)).await.is_err() {
                    return;
                }
            }
        });
    }
    let kind = HeaderValue::from_static("application/octet-stream");
    let pictures = Body::from_stream(ReceiverStream::new(receiver));
    ([(CONTENT_TYPE, kind)], pictures).into_response()
}
