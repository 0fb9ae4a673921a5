//! The page's files, in the binary.

use axum::http::header::{CACHE_CONTROL, CONTENT_TYPE, ETAG, IF_NONE_MATCH};
use axum::http::{HeaderMap, HeaderValue, StatusCode, Uri};
use axum::response::{IntoResponse, Response};

const SCRIPT: &str = "text/javascript; charset=utf-8";

/// Path, type, bytes.
const FILES: [(&str, &str, &[u8]); 10] = [
    ("/", "text/html; charset=utf-8", include_bytes!("../../web/index.html")),
    ("/style.css", "text/css; charset=utf-8", include_bytes!("../../web/style.css")),
    ("/app.js", SCRIPT, include_bytes!("../../web/app.js")),
    ("/dom.js", SCRIPT, include_bytes!("../../web/dom.js")),
    ("/live.js", SCRIPT, include_bytes!("../../web/live.js")),
    ("/models.js", SCRIPT, include_bytes!("../../web/models.js")),
    ("/plots.js", SCRIPT, include_bytes!("../../web/plots.js")),
    ("/icon.svg", "image/svg+xml", include_bytes!("../../web/icon.svg")),
    ("/uPlot.js", SCRIPT, include_bytes!("../../web/lib/uPlot.iife.min.js")),
    ("/uPlot.css", "text/css; charset=utf-8", include_bytes!("../../web/lib/uPlot.min.css")),
];

/// One of them. They hold no secret: a login needs them.
pub(super) async fn serve(uri: Uri, headers: HeaderMap) -> Response {
    let Some((_, kind, bytes)) = FILES.iter().find(|(path, ..)| *path == uri.path()) else {
        return (StatusCode::NOT_FOUND, "there is nothing here\n").into_response();
    };
    // A new version of the program brings new files.
    let tag = HeaderValue::from_static(concat!("\"", env!("CARGO_PKG_VERSION"), "\""));
    let fixed = [
        (CONTENT_TYPE, HeaderValue::from_static(kind)),
        (CACHE_CONTROL, HeaderValue::from_static("no-cache")),
        (ETAG, tag.clone()),
    ];
    if headers.get(IF_NONE_MATCH) == Some(&tag) && !cfg!(debug_assertions) {
        return (StatusCode::NOT_MODIFIED, fixed).into_response();
    }
    (fixed, *bytes).into_response()
}
