//! The RPCs. A call is authorized, converted to domain types, decided, converted back and recorded once.

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

/// The service's name on the wire and in health checks.
pub const NAME: &str = "byokgate.v1.PolicyDecisionService";
