//! Distributed traces: a caller's trace is continued, and what became of it goes to a collector over OTLP.

mod export;
mod spans;

pub(super) use export::{DIRECTIVE, layer};
pub use export::{Exported, TraceSetupError, TracingSettings, finish, start};
pub(crate) use spans::{Part, cache, calibrate, calibrated, found, is_traced, observed, probe, replied, request};
pub use spans::{TraceId, Traced};
