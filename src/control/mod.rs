//! The control socket: HTTP `/api/v1` over a Unix socket, for the command line on the same machine.
//! Who may open the socket may change models: it is 0660.
//!
//! `serve` runs on the network's thread; what touches the disk is handed to a blocking task.

pub mod client;
pub mod pushed;
pub mod status;

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, ensure};
use axum::Json;
use axum::body::{Body, Bytes};
use axum::extract::rejection::BytesRejection;
use axum::extract::{DefaultBodyLimit, Path as UrlPath, RawQuery, State};
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use pushed::Pushed;
use serde_json::{Value, json};
use status::Reporter;
use tokio::net::UnixListener;
use tokio::sync::oneshot;
use tokio_stream::StreamExt;

use crate::text::brief;
use crate::update::job::{Reason, Way};
use crate::update::orders::{self, Order};
use crate::update::store::{Blob, Store, StoreError};
use crate::update::updater::{Ask, Desk};

/// Commands are small; models have their own bound.
const COMMAND_BYTES_MAX: usize = 128 * 1024;
/// Pieces of a body that wait for the disk.
const PIECES_MAX: usize = 16;

/// The socket of a service: in systemd's runtime directory, or beside its state.
pub fn socket_path(state_dir: &Path) -> PathBuf {
    let runtime = std::env::var_os("RUNTIME_DIRECTORY").map(PathBuf::from);
    runtime.unwrap_or_else(|| state_dir.to_owned()).join("control.sock")
}

/// What the handlers share.
#[derive(Clone)]
pub struct Shared {
    /// Where orders go, or why nothing takes any: ONNX Runtime is missing.
    pub desk: Result<Arc<Desk>, Arc<str>>,
    /// `noblink status`
    pub reporter: Reporter,
    /// Largest model that is taken, bytes.
    pub size_max: u64,
    /// By which way the orders come.
    pub way: Way,
}

impl Shared {
    fn desk(&self) -> Result<&Arc<Desk>, NoRuntime> {
        self.desk.as_ref().map_err(|why| NoRuntime(Arc::clone(why)))
    }
}

/// ONNX Runtime is missing, and why.
struct NoRuntime(Arc<str>);

impl IntoResponse for NoRuntime {
    fn into_response(self) -> Response {
        let text = format!("no model runs: {}", self.0);
        refuse(StatusCode::SERVICE_UNAVAILABLE, "no_runtime", text)
    }
}

/// Binds the socket, and makes its folder, if need be; the future serves it.
///
/// # Errors
/// The path can't be bound.
pub fn serve(
    path: &Path,
    shared: Shared,
) -> anyhow::Result<impl Future<Output = ()> + Send + use<>> {
    let lives = std::os::unix::net::UnixStream::connect(path).is_ok();
    ensure!(!lives, "another noblink answers at the control socket {}", path.display());
    // Else it is one that a dead process left behind.
    let _ = std::fs::remove_file(path);
    let listener = path
        .parent()
        .map_or(Ok(()), std::fs::create_dir_all)
        .and_then(|()| std::os::unix::net::UnixListener::bind(path))
        .with_context(|| format!("the control socket {} can't be bound", path.display()))?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o660))?;
    listener.set_nonblocking(true)?;
    let router = router(shared);
    Ok(async move {
        let served = async { axum::serve(UnixListener::from_std(listener)?, router).await };
        if let Err(e) = served.await {
            tracing::error!("the control socket ended: {e}");
        }
    })
}

/// Status, models and jobs, for the socket and for the page.
pub fn router(shared: Shared) -> axum::Router {
    axum::Router::new()
        .route("/api/v1/status", get(status))
        .route("/api/v1/models", get(models))
        .route("/api/v1/jobs/{id}", get(job))
        .route("/api/v1/models/push", post(push).layer(DefaultBodyLimit::disable()))
        .route("/api/v1/models/desired", post(desired))
        .route("/api/v1/models/{verb}", post(verb))
        .layer(DefaultBodyLimit::max(COMMAND_BYTES_MAX))
        .with_state(shared)
}

async fn status(State(shared): State<Shared>) -> Json<Value> {
    Json(shared.reporter.report())
}

async fn models(State(shared): State<Shared>) -> Result<Json<Value>, NoRuntime> {
    let view = shared.desk()?.view();
    Ok(Json(json!({ "state": view.state, "models": view.models, "jobs": view.jobs })))
}

async fn job(
    State(shared): State<Shared>,
    UrlPath(id): UrlPath<String>,
) -> Result<Response, NoRuntime> {
    Ok(match shared.desk()?.view().jobs.into_iter().find(|j| j.id == id) {
        Some(job) => Json(json!(job)).into_response(),
        None => refuse(
            StatusCode::NOT_FOUND,
            "unknown_job",
            format!("there is no job {}", brief(&id, 60)),
        ),
    })
}

/// A request that could not be read, in the words of what tried.
pub fn unreadable(status: StatusCode, why: String) -> Response {
    refuse(status, "bad_request", why)
}

/// An answer that says why not.
pub fn refuse(status: StatusCode, code: &'static str, message: String) -> Response {
    (status, Json(json!({ "ok": false, "reason": Reason::new(code, message) }))).into_response()
}

/// Hands an order over and waits for the answer.
async fn ask(shared: &Shared, order: Order) -> Response {
    let desk = match shared.desk() {
        Ok(desk) => desk,
        Err(missing) => return missing.into_response(),
    };
    let (sender, answer) = oneshot::channel();
    desk.ask(Ask {
        order,
        way: shared.way,
        from: shared.way.name().into(),
        reply: Box::new(move |value| drop(sender.send(value))),
    });
    match answer.await {
        Ok(answer) if answer["ok"] == false => (StatusCode::CONFLICT, Json(answer)).into_response(),
        Ok(answer) => Json(answer).into_response(),
        Err(_) => {
            let text = "the service stops".to_owned();
            refuse(StatusCode::SERVICE_UNAVAILABLE, "stopping", text)
        }
    }
}

async fn desired(State(shared): State<Shared>, body: Result<Bytes, BytesRejection>) -> Response {
    match body {
        Ok(body) => ask(&shared, Order::Desired(body.to_vec())).await,
        Err(e) => unreadable(e.status(), e.body_text()),
    }
}

async fn verb(
    State(shared): State<Shared>,
    UrlPath(verb): UrlPath<String>,
    body: Result<Bytes, BytesRejection>,
) -> Response {
    let body = match body {
        Ok(body) => body,
        Err(e) => return unreadable(e.status(), e.body_text()),
    };
    match orders::local(&verb, &body) {
        Ok(order) => ask(&shared, order).await,
        Err(why) => {
            refuse(StatusCode::BAD_REQUEST, "bad_command", format!("{}: {why}", brief(&verb, 60)))
        }
    }
}

async fn push(
    State(shared): State<Shared>,
    RawQuery(query): RawQuery,
    headers: HeaderMap,
    body: Body,
) -> Response {
    let header = |name: &str| headers.get(name).map(|v| v.as_bytes());
    let pushed = match Pushed::read(query.as_deref().unwrap_or_default(), header) {
        Ok(pushed) => pushed,
        Err(why) => return refuse(StatusCode::BAD_REQUEST, "bad_command", format!("push: {why}")),
    };
    let desk = match shared.desk() {
        Ok(desk) => desk,
        Err(missing) => return missing.into_response(),
    };
    let blob = match store(desk.store(), pushed.size, shared.size_max, body).await {
        Ok(blob) => blob,
        Err(e) => {
            let status = match e {
                StoreError::TooLarge { .. } => StatusCode::PAYLOAD_TOO_LARGE,
                StoreError::Incomplete { .. } => StatusCode::BAD_REQUEST,
                _ => StatusCode::INSUFFICIENT_STORAGE,
            };
            return refuse(status, e.code(), e.to_string());
        }
    };
    ask(&shared, pushed.order(blob)).await
}

/// Writes a body into the store, bounded, off this thread.
async fn store(store: &Store, size: u64, size_max: u64, body: Body) -> Result<Blob, StoreError> {
    let (pieces, mut written) = tokio::sync::mpsc::channel::<Bytes>(PIECES_MAX);
    let store = store.clone();
    let writer = tokio::task::spawn_blocking(move || {
        if size > size_max {
            return Err(StoreError::TooLarge { max: size_max });
        }
        let mut part = store.stage(size, size)?;
        while let Some(piece) = written.blocking_recv() {
            part.write(&piece)?;
        }
        match part.len() {
            found if found < size => Err(StoreError::Incomplete { wanted: size, found }),
            _ => part.finish(None),
        }
    });
    let mut stream = body.into_data_stream();
    while let Some(Ok(piece)) = stream.next().await {
        if pieces.send(piece).await.is_err() {
            break;
        }
    }
    drop(pieces);
    writer.await.expect("writing a blob does not panic")
}
