//! The log: events on standard error, as text or as one JSON object a line.

use crate::config::Log;
use std::io::{self, IsTerminal};
use tracing::Dispatch;
use tracing_subscriber::{
    EnvFilter,
    fmt::{self, MakeWriter},
    layer::SubscriberExt,
    util::SubscriberInitExt,
};

/// Why the log cannot be set up.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// `log.filter` is not understood.
    #[error("log.filter is not understood")]
    Filter(#[from] tracing_subscriber::filter::ParseError),
    /// The process has a log already.
    #[error("the log cannot be set up twice")]
    Twice(#[from] tracing_subscriber::util::TryInitError),
}

/// Sets up the process's log. For `main`: a library call or a test that starts a gateway leaves the log alone.
pub fn init(config: &Log) -> Result<(), LogError> {
    Ok(dispatch(config, io::stderr, io::stderr().is_terminal())?.try_init()?)
}

/// A log to `writer`, with colours where somebody looks at it.
pub(crate) fn dispatch<W>(config: &Log, writer: W, ansi: bool) -> Result<Dispatch, LogError>
where
    W: for<'a> MakeWriter<'a> + Send + Sync + 'static,
{
    let registry = tracing_subscriber::registry().with(config.filter.parse::<EnvFilter>()?);
    Ok(match config.format.as_str() {
        "json" => {
            let layer = fmt::layer().json().flatten_event(true).with_current_span(true).with_span_list(false);
            registry.with(layer.with_writer(writer)).into()
        }
        _ => registry.with(fmt::layer().with_ansi(ansi).with_writer(writer)).into(),
    })
}
