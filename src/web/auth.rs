//! Who may look and who may change something.
//!
//! On loopback everyone on this machine may, through a page of this server: requests that another
//! page of the browser makes are refused by their `Host` and `Origin`. Elsewhere a token is wanted,
//! as a bearer or as the cookie that the login sets.

use std::sync::Arc;

use axum::extract::{Request, State};
use axum::http::header::{AUTHORIZATION, COOKIE, HOST, ORIGIN};
use axum::http::{HeaderMap, Method, StatusCode};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use axum::{Json, http};
use serde_json::json;
use sha2::{Digest as _, Sha256};

use crate::update::job::Reason;

/// The cookie that holds the token.
pub(super) const COOKIE_NAME: &str = "noblink_token";

/// What is asked of a request.
#[derive(Debug, Clone)]
pub(super) struct Guard {
    token: Option<Arc<str>>,
}

impl Guard {
    /// With a token, or for loopback without one.
    pub(super) fn new(token: Option<String>) -> Self {
        Self { token: token.map(Into::into) }
    }

    /// Whether this is the token.
    pub(super) fn is_token(&self, given: &str) -> bool {
        // Of digests: how long it takes says nothing about how much was right.
        let digest = |s: &str| Sha256::digest(s.as_bytes());
        self.token.as_ref().is_some_and(|token| digest(token) == digest(given))
    }

    fn is_known(&self, headers: &HeaderMap) -> bool {
        if self.token.is_none() {
            return true;
        }
        let text = |name| headers.get(name).and_then(|v: &http::HeaderValue| v.to_str().ok());
        let bearer = text(AUTHORIZATION).and_then(|v| v.strip_prefix("Bearer "));
        let cookies = text(COOKIE).unwrap_or_default().split(';');
        let cookie = cookies
            .filter_map(|c| c.trim().split_once('='))
            .find_map(|(name, value)| (name == COOKIE_NAME).then_some(value));
        bearer.into_iter().chain(cookie).any(|given| self.is_token(given))
    }

    /// Why the request is refused, if it is.
    fn refusal(&self, method: &Method, headers: &HeaderMap) -> Option<(StatusCode, Reason)> {
        let text = |name| headers.get(name).and_then(|v: &http::HeaderValue| v.to_str().ok());
        let host = text(HOST).unwrap_or_default();
        if self.token.is_none() && !is_loopback(host) {
            let text = format!(
                "this page is for this machine, as http://localhost:…; it was called {host:?}"
            );
            return Some((StatusCode::FORBIDDEN, Reason::new("wrong_host", text)));
        }
        let origin = text(ORIGIN).map(|o| o.split_once("://").map_or(o, |(_, host)| host));
        if !method.is_safe() && origin.is_some_and(|origin| origin != host) {
            let text = "a page of another server may not change anything here".to_owned();
            return Some((StatusCode::FORBIDDEN, Reason::new("wrong_origin", text)));
        }
        if !self.is_known(headers) {
            let text = "this server wants its token: log in, or send it as a bearer".to_owned();
            return Some((StatusCode::UNAUTHORIZED, Reason::new("token", text)));
        }
        None
    }
}

fn is_loopback(host: &str) -> bool {
    let name = match host.strip_prefix('[') {
        Some(v6) => v6.split(']').next().unwrap_or_default(),
        None => host.split(':').next().unwrap_or_default(),
    };
    name == "localhost" || name.parse().is_ok_and(|ip: std::net::IpAddr| ip.is_loopback())
}

/// Lets a request through, or answers it.
pub(super) async fn check(State(guard): State<Guard>, request: Request, next: Next) -> Response {
    match guard.refusal(request.method(), request.headers()) {
        None => next.run(request).await,
        Some((status, reason)) => {
            (status, Json(json!({ "ok": false, "reason": reason }))).into_response()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(guard: &Guard, method: Method, headers: &[(http::HeaderName, &str)]) -> String {
        let headers = headers.iter().map(|(n, v)| (n.clone(), v.parse().unwrap())).collect();
        guard.refusal(&method, &headers).map_or(String::new(), |(_, r)| r.code.into_owned())
    }

    #[test]
    fn on_loopback_only_pages_of_this_server_may_ask() {
        let guard = Guard::new(None);
        let ask = |method, headers: &[_]| refused(&guard, method, headers);
        for host in ["localhost:8080", "127.0.0.1", "[::1]:8080"] {
            assert_eq!(ask(Method::GET, &[(HOST, host)]), "");
        }
        // A name that somebody else's DNS server points at 127.0.0.1.
        assert_eq!(ask(Method::GET, &[(HOST, "evil.example:8080")]), "wrong_host");
        let own = [(HOST, "localhost:8080"), (ORIGIN, "http://localhost:8080")];
        assert_eq!(ask(Method::POST, &own), "");
        let other = [(HOST, "localhost:8080"), (ORIGIN, "https://evil.example")];
        assert_eq!(ask(Method::POST, &other), "wrong_origin");
    }

    #[test]
    fn elsewhere_the_token_is_wanted_as_bearer_or_cookie() {
        let guard = Guard::new(Some("s3cret".into()));
        let ask = |headers: &[_]| refused(&guard, Method::GET, headers);
        assert_eq!(ask(&[(HOST, "box.local")]), "token");
        assert_eq!(ask(&[(HOST, "box.local"), (AUTHORIZATION, "Bearer s3cret")]), "");
        assert_eq!(ask(&[(HOST, "box.local"), (AUTHORIZATION, "Bearer s3cre")]), "token");
        assert_eq!(ask(&[(HOST, "box.local"), (COOKIE, "a=b; noblink_token=s3cret")]), "");
        assert_eq!(ask(&[(HOST, "box.local"), (COOKIE, "xnoblink_token=s3cret")]), "token");
    }
}
