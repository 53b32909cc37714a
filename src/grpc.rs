//! The RPCs: convert, authorize, decide, convert, record once.

pub(crate) mod admission;
pub mod authorize;
mod batch;
pub(crate) mod call_record;
mod codec;
pub mod convert;
pub(crate) mod deadline;
mod decide;
pub(crate) mod errors;
pub mod limits;
mod queries;
pub(crate) mod service;

/// The service's name on the wire, as health checks name it.
pub const NAME: &str = "byokgate.v1.PolicyDecisionService";
