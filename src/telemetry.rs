//! Telemetry: the log and the event of every decision, metrics, traces, and the status of the service.

pub mod cause;
pub mod events;
pub mod log_writer;
pub mod metrics;
pub mod recent_changes;
pub mod recent_decisions;
pub mod status;
pub mod traces;

use std::{
    fs::File,
    io,
    os::fd::{AsFd, BorrowedFd},
};

use tracing::Metadata;
use tracing_subscriber::{
    EnvFilter, Layer,
    filter::{LevelFilter, ParseError, filter_fn},
    layer::SubscriberExt,
    util::SubscriberInitExt,
};

use self::log_writer::LogWriter;

/// Longer texts are cut where they are kept, such as whole lists. Names of models and runtimes are under a hundred characters.
const MAX_CHARS: usize = 200;

/// The text, cut where it is long.
fn cut(text: &str) -> String {
    if text.len() <= MAX_CHARS {
        return text.to_owned();
    }
    let mut left = text.chars();
    let mut cut: String = left.by_ref().take(MAX_CHARS).collect();
    if left.next().is_some() {
        cut.push('…');
    }
    cut
}

/// Where and how logs are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogTo {
    /// JSON lines on standard output, for a server.
    StdoutJson,
    /// Text on standard error, for a command, whose standard output is its answer.
    StderrText,
}

/// Logging could not be started.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// The filter does not parse.
    #[error("log filter `{filter}`: {fault}")]
    Filter {
        /// The filter.
        filter: String,
        /// What is wrong with it.
        fault: String,
    },
    /// Its stream or its thread could not be opened.
    #[error("the log could not be opened")]
    Open(#[from] io::Error),
}

/// Checks a filter. The library takes a misspelt level for a module's name, and then logs nothing at all.
pub fn check_filter(filter: &str) -> Result<(), LogError> {
    let failed = |fault: String| LogError::Filter { filter: filter.to_owned(), fault };
    if EnvFilter::try_new(filter).is_err() {
        let bad = filter.split(',').find(|part| EnvFilter::try_new(part).is_err()).unwrap_or(filter);
        return Err(failed(format!("`{}` is no directive: write LEVEL or MODULE=LEVEL, as in info,byok_gate=debug", bad.trim())));
    }
    let words = filter.split(',').map(str::trim).filter(|part| !part.is_empty() && !part.contains(['=', '[']));
    for word in words {
        if word.parse::<LevelFilter>().is_err() {
            let levels = "off, error, warn, info, debug, trace";
            return Err(failed(format!(
                "`{word}` is no level: write one of {levels}; a module has one too, as in byok_gate=debug"
            )));
        }
    }
    Ok(())
}

/// Starts logging. The filter is the first layer, so that spans and events below its level are never built.
pub fn init(filter: &str, to: LogTo) -> Result<LogWriter, LogError> {
    let failed = |fault: String| LogError::Filter { filter: filter.to_owned(), fault };
    check_filter(filter)?;
    let spans = traces::DIRECTIVE.parse().map_err(|fault: ParseError| failed(fault.to_string()))?;
    let filter = EnvFilter::try_new(filter).map_err(|fault| failed(fault.to_string()))?.add_directive(spans);
    let registry = tracing_subscriber::registry().with(filter);
    let lines = match to {
        LogTo::StdoutJson => LogWriter::to(own(io::stdout().as_fd())?)?,
        LogTo::StderrText => LogWriter::to(own(io::stderr().as_fd())?)?,
    };
    let layer = tracing_subscriber::fmt::layer().with_writer(lines.clone());
    match to {
        LogTo::StdoutJson => {
            let layer = layer.json().flatten_event(true).with_current_span(false).with_span_list(false);
            // Log lines show no spans. Without this filter the layer would still format every field that a span records.
            let events = filter_fn(|metadata: &Metadata<'_>| metadata.is_event());
            registry.with(layer.with_filter(events)).with(traces::layer()).try_init()
        }
        LogTo::StderrText => registry.with(layer.with_ansi(false)).try_init(),
    }
    .map_err(|fault| failed(fault.to_string()))?;
    Ok(lines)
}

/// The stream without the standard library's lock and buffer, since a blocked writer would hold that lock.
fn own(stream: BorrowedFd<'_>) -> io::Result<File> {
    Ok(File::from(stream.try_clone_to_owned()?))
}
