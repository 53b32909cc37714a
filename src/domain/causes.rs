//! The chain of causes of an error.

use std::{error::Error, io, iter::successors};

/// The error, then its cause, and so on.
pub fn causes<'f>(fault: &'f (dyn Error + 'static)) -> impl Iterator<Item = &'f (dyn Error + 'static)> {
    successors(Some(fault), |error| cause(*error))
}

/// An I/O error that wraps another one skips it in its own `source`.
fn cause<'f>(error: &'f (dyn Error + 'static)) -> Option<&'f (dyn Error + 'static)> {
    match error.downcast_ref::<io::Error>().and_then(io::Error::get_ref) {
        Some(wrapped) => Some(wrapped),
        None => error.source(),
    }
}
