//! The log: to standard error as people or the journal read it, and its last lines to the page.

use std::collections::VecDeque;
use std::fmt::{self, Write};
use std::io::IsTerminal;
use std::sync::Mutex;

use serde_json::{Value, json};
use tracing::field::{Field, Visit};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields};
use tracing_subscriber::layer::{Context, Layer, SubscriberExt};
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::util::SubscriberInitExt;

use crate::app::now_us;
use crate::records::rfc3339;

/// Lines that wait for the page.
const TAIL_MAX: usize = 300;

static TAIL: Mutex<VecDeque<Value>> = Mutex::new(VecDeque::new());

/// The service logs at `info`, one-shot commands at `error`; `NOBLINK_LOG` overrides. Under systemd
/// each line starts with its level as the journal reads it, and without a time, which it adds.
pub fn start(service: bool) {
    let default = if service { "warn,noblink=info" } else { "error" };
    let filter = EnvFilter::try_from_env("NOBLINK_LOG").unwrap_or_else(|_| EnvFilter::new(default));
    let lines = tracing_subscriber::fmt::layer()
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .with_target(false);
    let lines = match std::env::var_os("JOURNAL_STREAM") {
        Some(_) => lines.with_ansi(false).event_format(Journal).boxed(),
        None => lines.boxed(),
    };
    let tail = Tail.with_filter(EnvFilter::new("warn,noblink=info"));
    tracing_subscriber::registry().with(lines.with_filter(filter)).with(tail).init();
}

/// The lines since the last call, oldest first: `{"time", "level", "text"}`.
pub fn take() -> Vec<Value> {
    TAIL.lock().map(|mut tail| tail.drain(..).collect()).unwrap_or_default()
}

struct Tail;

impl<S: Subscriber> Layer<S> for Tail {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        let mut text = Text::default();
        event.record(&mut text);
        let line = json!({
            "time": rfc3339(now_us()),
            "level": event.metadata().level().as_str().to_lowercase(),
            "text": text.message + &text.fields,
        });
        if let Ok(mut tail) = TAIL.lock() {
            if tail.len() == TAIL_MAX {
                tail.pop_front();
            }
            tail.push_back(line);
        }
    }
}

#[derive(Default)]
struct Text {
    message: String,
    fields: String,
}

impl Visit for Text {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        let _ = match field.name() {
            "message" => write!(self.message, "{value:?}"),
            name => write!(self.fields, " {name}={value:?}"),
        };
    }
}

/// Lines for the journal: `<6>text`.
struct Journal;

impl<S, N> FormatEvent<S, N> for Journal
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(
        &self,
        context: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        // sd-daemon(3): the priorities of syslog.
        let priority = match *event.metadata().level() {
            Level::ERROR => 3,
            Level::WARN => 4,
            Level::INFO => 6,
            Level::DEBUG | Level::TRACE => 7,
        };
        write!(writer, "<{priority}>")?;
        context.field_format().format_fields(writer.by_ref(), event)?;
        writeln!(writer)
    }
}
