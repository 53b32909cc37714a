//! Why a server could not start or go on.

use std::{error::Error, io, path::PathBuf};

use super::listen::Address;

/// The server could not start or go on.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// An address does not parse.
    #[error("{setting}: {message}")]
    Address {
        /// Which setting it is of.
        setting: &'static str,
        /// What is wrong.
        message: String,
    },
    /// Credentials would cross a network in the clear.
    #[error(
        "listening on {0} is beyond loopback, where credentials would cross the network in the clear; give tls.certificate and \
         tls.key, listen on loopback or unix:PATH, or say --insecure-listen where the network is trusted"
    )]
    Exposed(Address),
    /// Everybody on a network could call.
    #[error(
        "listening on {0} with TLS would take calls from everybody; give tls.client_ca or callers.token_file, or say \
         --allow-anonymous"
    )]
    Anonymous(Address),
    /// The socket could not be had.
    #[error("could not listen on {address}")]
    Listen {
        /// What was asked for.
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
        /// What is wrong; never what it holds.
        message: String,
    },
    /// Reflection could not be built from the descriptors.
    #[error("reflection could not be set up")]
    Reflection(#[from] tonic_reflection::server::Error),
    /// Work in the background ended, which it never should.
    #[error("the background task `{0}` ended; the server drained and left")]
    TaskEnded(&'static str),
}

/// What is to be said of settings before a server is started with them.
#[derive(Debug, Default)]
pub struct Review {
    /// What would keep it from starting.
    pub faults: Vec<ServerError>,
    /// Certificates that are near their end, or past it: the setting, and what to say of it.
    pub near_ends: Vec<(&'static str, String)>,
}

/// A fault with all its causes, in one line.
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
