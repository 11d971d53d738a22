//! The log: structured, one line an event, as text or JSON on stderr. SPDK's lines come in as events of target `spdk`.
//!
//! Not here: metrics, and anything per I/O.

use tracing_subscriber::EnvFilter;

use crate::config::{LogFormat, LogLevel};

/// Starts the log for the process. `PENSTOCK_LOG` overrides the level, per target if wished (`spdk=warn,penstock_node=debug`).
pub fn start(level: LogLevel, format: LogFormat) {
    let filter = EnvFilter::try_from_env("PENSTOCK_LOG").unwrap_or_else(|_| EnvFilter::new(level.word()));
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_ansi(false);
    // A second start in one process (tests) keeps the first.
    let _ = match format {
        LogFormat::Text => builder.with_target(true).try_init(),
        LogFormat::Json => builder.json().flatten_event(true).with_current_span(false).try_init(),
    };
}
