//! Exit codes, output formats, and printing.

use std::{
    io::{self, Write},
    process::{ExitCode, Termination},
    time::Duration,
};

use clap::ValueEnum;

use crate::{config::ConfigError, server::ServerError};

/// How long writing the last lines of the log may take.
pub(super) const LOG_FLUSH_LIMIT: Duration = Duration::from_secs(1);

/// How a command ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    /// Allowed, or done.
    Ok,
    /// A fault: nothing was decided.
    Fault,
    /// The command line is wrong.
    Usage,
    /// Configuration, registry or catalogue are invalid.
    Invalid,
    /// Denied.
    Denied,
    /// Denied, but a retry without any change may succeed.
    DeniedRetryable,
    /// A vendor does not answer as the catalogue says.
    Drift,
}

/// The output format.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum Format {
    /// For people.
    Text,
    /// For programs.
    Json,
}

/// The command line is wrong in a way that clap does not check.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(super) struct UsageError(pub(super) String);

pub(super) fn exit_of(fault: &anyhow::Error) -> Exit {
    if fault.is::<UsageError>() {
        Exit::Usage
    } else if fault.is::<ConfigError>() {
        Exit::Invalid
    } else {
        match fault.downcast_ref::<ServerError>() {
            Some(ServerError::Address { .. } | ServerError::Exposed(_) | ServerError::Anonymous(_)) => Exit::Usage,
            Some(ServerError::File { .. } | ServerError::Content { .. } | ServerError::Lines(_)) => Exit::Invalid,
            Some(ServerError::Listen { .. } | ServerError::Reflection(_) | ServerError::TaskEnded(_)) | None => Exit::Fault,
        }
    }
}

impl Termination for Exit {
    fn report(self) -> ExitCode {
        ExitCode::from(match self {
            Self::Ok => 0,
            Self::Fault => 1,
            Self::Usage => 2,
            Self::Invalid => 3,
            Self::Denied => 10,
            Self::DeniedRetryable => 11,
            Self::Drift => 12,
        })
    }
}

/// Writes to standard output. A closed pipe is not an error.
pub(super) fn print(text: &str) -> anyhow::Result<()> {
    match io::stdout().write_all(text.as_bytes()).and_then(|()| io::stdout().flush()) {
        Err(fault) if fault.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        ended => Ok(ended?),
    }
}
