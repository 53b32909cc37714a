//! Why a server could not start or go on.

use std::{error::Error, io, path::PathBuf};

use super::listen::Address;
use crate::domain::problem::Problems;

/// The server could not start or go on.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// An address is invalid.
    #[error("{setting}: {message}")]
    Address {
        /// The setting that holds it.
        setting: &'static str,
        /// What is wrong.
        message: String,
    },
    /// Without TLS, credentials would cross a network unencrypted.
    #[error(
        "listening on {0} is beyond loopback, where credentials would cross the network in the clear; give tls.certificate and \
         tls.key, listen on loopback or unix:PATH, or say --insecure-listen where the network is trusted"
    )]
    Exposed(Address),
    /// Without client authentication, everybody on the network could call.
    #[error(
        "listening on {0} with TLS would take calls from everybody; give tls.client_ca or callers.token_file, or say \
         --allow-anonymous"
    )]
    Anonymous(Address),
    /// The socket could not be opened.
    #[error("could not listen on {address} ({setting})")]
    Listen {
        /// Which setting it is of.
        setting: &'static str,
        /// The address.
        address: Address,
        /// The fault.
        #[source]
        source: io::Error,
    },
    /// A configured file could not be read.
    #[error("{}: could not be read: {source}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// The fault.
        source: io::Error,
    },
    /// A configured file is invalid.
    #[error("{}: {message}", path.display())]
    Content {
        /// The file.
        path: PathBuf,
        /// What is wrong. It never quotes the content.
        message: String,
    },
    /// Lines of a configured file are invalid: all of them, and never what they hold.
    #[error("{}", lines_of(.0))]
    Lines(Problems),
    /// Reflection could not be built from the descriptors.
    #[error("reflection could not be set up")]
    Reflection(#[from] tonic_reflection::server::Error),
    /// A background task ended, which must not happen.
    #[error("the background task `{0}` ended; the server drained and left")]
    TaskEnded(&'static str),
}

/// The result of checking settings without starting a server.
#[derive(Debug, Default)]
pub struct Review {
    /// Faults that would keep the server from starting.
    pub faults: Vec<ServerError>,
    /// Warnings about certificates that expire soon or have expired: the setting, and the text.
    pub near_ends: Vec<(&'static str, String)>,
    /// Addresses that cannot be bound now, for instance because this service itself runs there: the setting, and the text.
    pub in_use: Vec<(&'static str, String)>,
}

/// The maximum number of bad lines in one message. A file that is no list of tokens has many.
const MAX_SHOWN_LINES: usize = 5;

fn lines_of(Problems { document, list }: &Problems) -> String {
    let shown = list.iter().take(MAX_SHOWN_LINES).map(ToString::to_string).collect::<Vec<_>>().join("; ");
    let more = list.len().saturating_sub(MAX_SHOWN_LINES);
    let more = if more > 0 { format!("; and {more} more") } else { String::new() };
    format!("{document}: {shown}{more}")
}

/// An error with all its causes, in one line.
pub(super) fn chain(fault: &dyn Error) -> String {
    let mut out = fault.to_string();
    let mut cause = fault.source();
    while let Some(fault) = cause {
        let said = fault.to_string();
        if !out.contains(&said) {
            out.push_str(": ");
            out.push_str(&said);
        }
        cause = fault.source();
    }
    out
}
