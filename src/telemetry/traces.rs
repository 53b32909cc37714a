//! Distributed traces. A caller's trace is continued, and its spans are sent to a collector over OTLP.

mod export;
mod spans;

pub(super) use export::{DIRECTIVE, layer};
pub use export::{ExportMetrics, TraceSetupError, TracingSettings, finish, start};
pub(crate) use spans::{
    FlightRole, cache_span, calibration_span, is_traced, probe_span, record_calibration, record_finding, record_observation,
    record_reply, request_span,
};
pub use spans::{TraceId, Traced};
