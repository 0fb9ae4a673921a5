//! What the page and Prometheus are given once a second, and where they are served.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, ensure};
use serde_json::json;
use tracing::{info, warn};

use super::feed::Feed;
use super::metrics::{self, Seen};
use crate::config::{self, Config};
use crate::meter::Meter;
use crate::net::Net;
use crate::preview::Previews;
use crate::snapshot::{CameraSnapshot, Snapshot};
use crate::update::updater::Desk;
use crate::{control, log, notify};

/// Shorter tokens are refused: they can be guessed.
const TOKEN_MIN: usize = 16;

/// The service's end of the page.
pub struct Page {
    feed: Arc<Feed>,
    metrics: Arc<metrics::Page>,
    ready: Arc<AtomicBool>,
    desk: Option<Arc<Desk>>,
    outbox_max_bytes: u64,
    address: Option<SocketAddr>,
}

impl Page {
    /// Serves it, or says why not: a service without its page is one all the same.
    pub fn serve(
        config: &Config,
        net: &Net,
        feed: Arc<Feed>,
        previews: Arc<Previews>,
        control: control::Shared,
    ) -> Self {
        let (metrics, ready) = (Arc::default(), Arc::default());
        let (desk, outbox_max_bytes) = (control.desk.clone().ok(), config.outbox.max_bytes);
        let mut page = Self { feed, metrics, ready, desk, outbox_max_bytes, address: None };
        let shared = super::Shared {
            feed: Arc::clone(&page.feed),
            previews,
            metrics: Arc::clone(&page.metrics),
            ready: Arc::clone(&page.ready),
            control,
        };
        let Some(listen) = config.web.listen else { return page };
        match token(&config.web).and_then(|token| net.web(listen, token, shared)) {
            Ok(address) => {
                info!("the page is at http://{address}");
                page.address = Some(address);
            }
            Err(e) => warn!("the page is not served: {e:#}"),
        }
        page
    }

    /// Where it is, if it is served.
    pub fn address(&self) -> Option<SocketAddr> {
        self.address
    }

    /// How it goes, once a second.
    pub fn tell(&self, snapshot: &Snapshot, meter: &Meter, started_us: i64) {
        for line in log::take() {
            self.feed.put("log", line.to_string().into_bytes());
        }
        if self.feed.is_watched() {
            self.feed.put("tick", tick(snapshot).to_string().into_bytes());
        }
        let is_ready = snapshot.live.is_some() && notify::was_tried(&snapshot.link);
        self.ready.store(is_ready, Ordering::Relaxed);
        self.metrics.put(Seen {
            snapshot: snapshot.clone(),
            totals: meter.totals(),
            view: self.desk.as_ref().map(|desk| desk.view()).unwrap_or_default(),
            outbox_max_bytes: self.outbox_max_bytes,
            started_s: started_us as f64 / 1e6,
        });
    }
}

fn tick(snapshot: &Snapshot) -> serde_json::Value {
    let camera = |c: &CameraSnapshot| {
        let CameraSnapshot { id, status, lane, .. } = c;
        let (state, overloaded) = (status.state.name(), lane.overloaded);
        (id.clone(), json!({ "state": state, "ledger": lane.ledger, "overloaded": overloaded }))
    };
    let cameras: BTreeMap<_, _> = snapshot.cameras.iter().map(camera).collect();
    json!({
        "time_us": snapshot.time_us,
        "cameras": cameras,
        "link": snapshot.link,
        "outbox": snapshot.outbox,
    })
}

fn token(web: &config::Web) -> anyhow::Result<Option<String>> {
    let Some(file) = &web.token_file else { return Ok(None) };
    let named = || format!("web.token_file = {file:?}");
    let token = std::fs::read_to_string(file).with_context(named)?.trim().to_owned();
    ensure!(token.len() >= TOKEN_MIN, "{} holds fewer than {TOKEN_MIN} characters", named());
    Ok(Some(token))
}
