//! Logs: where lines go, and the event that every decision leaves. Traces.

pub mod cause;
pub mod events;
pub mod lately;
pub mod log_writer;
pub mod metrics;
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

/// Where and how logs are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogTo {
    /// JSON lines on standard output: a server's.
    StdoutJson,
    /// Text on standard error: a command's, whose standard output is its answer.
    StderrText,
}

/// Logging could not be started.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// The filter does not parse.
    #[error("log filter `{filter}`: {fault}")]
    Filter {
        /// What was given.
        filter: String,
        /// What is wrong with it.
        fault: String,
    },
    /// Its stream or its thread could not be had.
    #[error("the log could not be opened")]
    Open(#[from] io::Error),
}

/// What is wrong with a filter. The library takes a misspelt level for the name of a module, and then nothing at all is logged.
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

/// Starts logging. The filter is the first layer, so that spans and events below it are never built.
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
            // No line shows a span, but each field that a span is told would be written down for it, and read again for the next.
            let events = filter_fn(|metadata: &Metadata<'_>| metadata.is_event());
            registry.with(layer.with_filter(events)).with(traces::layer()).try_init()
        }
        LogTo::StderrText => registry.with(layer.with_ansi(false)).try_init(),
    }
    .map_err(|fault| failed(fault.to_string()))?;
    Ok(lines)
}

/// The stream without the standard library's lock and buffer, which a writer that is stuck would hold.
fn own(stream: BorrowedFd<'_>) -> io::Result<File> {
    Ok(File::from(stream.try_clone_to_owned()?))
}
