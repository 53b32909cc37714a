//! The spans of a call and of its work. Whether a call is traced is decided before any span is built: the caller's own decision is followed, and
//! a call without a trace is sampled at random. A call that is not traced builds no spans. Work within a call first checks that there is a parent
//! span, so that no part of a call becomes a trace of its own.
//!
//! All names of spans and attributes are in this file. They are OpenTelemetry's where it defines one. No attribute holds a URL's path or query, a
//! header or a body.

use http::{HeaderMap, HeaderName};
pub use opentelemetry::trace::TraceId;
use opentelemetry::{
    Context,
    propagation::{Extractor, TextMapPropagator},
    trace::{SpanContext, TraceContextExt},
};
use opentelemetry_sdk::propagation::TraceContextPropagator;
use tracing::{Span, field::Empty};
use tracing_opentelemetry::OpenTelemetrySpanExt;

use super::export::{TARGET, sample_ratio};
use crate::{
    core::{
        classify::{Calibration, Finding},
        endpoint::{self, Call, Target},
        engine::{Decided, Observed},
    },
    domain::{
        decision::Outcome,
        verdict::{ServedFrom, Unreached},
    },
};

/// Parsed once, and not for every call.
static TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");

/// The role of a call in a flight.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum FlightRole {
    /// It started the flight.
    Fill,
    /// It waited for a flight that another call had started.
    Wait,
}

/// A call's span and trace. By default the call is not traced.
#[derive(Debug)]
pub struct Traced {
    span: Span,
    trace_id: Option<TraceId>,
}

// === one call ===

/// A span with the fields that [`Traced::decided`] and [`Traced::answered`] record. A field must be declared here, or its value is lost.
macro_rules! span_of_a_decision {
    ($parent:expr, $name:literal, $($own:tt)*) => {
        tracing::info_span!(
            target: TARGET,
            parent: $parent,
            $name,
            $($own)*
            otel.status_code = Empty,
            rpc.grpc.status_code = Empty,
            byokgate.decision_id = Empty,
            byokgate.checkpoint = Empty,
            byokgate.outcome = Empty,
            byokgate.code = Empty,
            byokgate.provider = Empty,
            byokgate.verdict = Empty,
        )
    };
}

impl Default for Traced {
    fn default() -> Self {
        Self { span: Span::none(), trace_id: None }
    }
}

impl Traced {
    /// Begins the span of a call of this service and method.
    pub fn begin(headers: &HeaderMap, service: &'static str, method: &'static str) -> Self {
        let parent = parent_of(headers);
        let trace_id = parent.as_ref().map(SpanContext::trace_id);
        let Some(sample_ratio) = sample_ratio() else { return Self { span: Span::none(), trace_id } };
        let sampled = parent.as_ref().map_or_else(|| rand::random::<f64>() < sample_ratio, SpanContext::is_sampled);
        if !sampled {
            return Self { span: Span::none(), trace_id };
        }
        let span = span_of_a_decision!(
            None,
            "rpc",
            otel.name = format!("{service}/{method}"),
            otel.kind = "server",
            rpc.system = "grpc",
            rpc.service = service,
            rpc.method = method,
        );
        if let Some(parent) = parent {
            // This fails only without the tracing layer; then there is no trace to continue.
            drop(span.set_parent(Context::new().with_remote_span_context(parent)));
        }
        let context = span.context();
        let trace_id = trace_id.or_else(|| Some(context.span().span_context().trace_id())).filter(|id| *id != TraceId::INVALID);
        Self { span, trace_id }
    }

    /// The span of one item of a batch.
    pub fn item(&self, index: u32) -> Self {
        let span = child_of(&self.span, |parent| span_of_a_decision!(parent, "decide", byokgate.batch.index = i64::from(index),));
        Self { span, trace_id: self.trace_id }
    }

    /// The call's span; a disabled one if it is not traced.
    pub fn span(&self) -> Span {
        self.span.clone()
    }

    /// The call's trace id: the caller's, even if this service does not trace the call, or one of its own.
    pub fn trace_id(&self) -> Option<TraceId> {
        self.trace_id
    }

    /// Records a decision.
    pub fn decided(&self, checkpoint: &'static str, decided: &Decided) {
        if self.span.is_none() {
            return;
        }
        let (outcome, code) = match &decided.decision.outcome {
            Outcome::Allow(_) => ("ALLOW", None),
            Outcome::Deny(deny) => ("DENY", Some(deny.refusal.code().as_str())),
        };
        self.span.record("byokgate.decision_id", decided.id.to_string());
        self.span.record("byokgate.checkpoint", checkpoint);
        self.span.record("byokgate.outcome", outcome);
        self.span.record("byokgate.code", code);
        self.span.record("byokgate.provider", &decided.decision.resolution.provider);
        self.span.record("byokgate.verdict", decided.decision.liveness.as_ref().map(|liveness| liveness.verdict.as_str()));
    }

    /// Records the call's status code. Codes that are the server's fault mark the span as an error.
    pub fn answered(&self, code: tonic::Code) {
        use tonic::Code;
        if self.span.is_none() {
            return;
        }
        self.span.record("rpc.grpc.status_code", code as i64);
        if let Code::Unknown
        | Code::DeadlineExceeded
        | Code::Unimplemented
        | Code::Internal
        | Code::Unavailable
        | Code::DataLoss = code
        {
            self.span.record("otel.status_code", "error");
        }
    }
}

/// Lets the SDK's propagator read a call's headers.
struct Headers<'h>(&'h HeaderMap);

impl Extractor for Headers<'_> {
    fn get(&self, key: &str) -> Option<&str> {
        self.0.get(key)?.to_str().ok()
    }

    fn keys(&self) -> Vec<&str> {
        self.0.keys().map(HeaderName::as_str).collect()
    }
}

/// The caller's span, from W3C's `traceparent` and `tracestate`. A `tracestate` that cannot be read is dropped, and the trace goes on.
fn parent_of(headers: &HeaderMap) -> Option<SpanContext> {
    // Most calls have none. Checking that first avoids the propagator's work.
    headers.get(&TRACEPARENT)?;
    let context = TraceContextPropagator::new().extract_with_context(&Context::new(), &Headers(headers));
    let parent = context.span().span_context().clone();
    parent.is_valid().then_some(parent)
}

// === the work of a call ===

/// Builds a child of this span, if it is one of this service's spans. Otherwise returns a disabled span.
fn child_of(parent: &Span, build: impl FnOnce(&Span) -> Span) -> Span {
    if parent.metadata().is_some_and(|metadata| metadata.target() == TARGET) { build(parent) } else { Span::none() }
}

/// Builds a child of the current span in the same way.
fn child_of_current(build: impl FnOnce(&Span) -> Span) -> Span {
    // Without an exporter there are no spans, and the subscriber need not be asked.
    if sample_ratio().is_none() { Span::none() } else { child_of(&Span::current(), build) }
}

/// Whether the current work is traced.
pub(crate) fn is_traced() -> bool {
    sample_ratio().is_some() && !Span::current().is_none()
}

/// The span of a cache lookup, including the wait for a probe.
pub(crate) fn cache_span() -> Span {
    child_of_current(|parent| {
        tracing::info_span!(
            target: TARGET,
            parent: parent,
            "cache",
            byokgate.cache.result = Empty,
            byokgate.verdict = Empty,
        )
    })
}

/// Records the result of a cache lookup.
pub(crate) fn record_observation(span: &Span, observed: &Observed, role: Option<FlightRole>) {
    if span.is_none() {
        return;
    }
    let result = match (role, observed.served_from) {
        (Some(FlightRole::Fill), _) => "fill",
        (Some(FlightRole::Wait), _) => "wait",
        (None, ServedFrom::Cache | ServedFrom::Stale) => "hit",
        (None, ServedFrom::Breaker) => "breaker",
        (None, ServedFrom::Probe) => "withheld",
    };
    span.record("byokgate.cache.result", result);
    span.record("byokgate.verdict", observed.finding.verdict.as_str());
}

/// The span of a probe, including its wait in the queue.
pub(crate) fn probe_span(endpoint: &endpoint::Endpoint) -> Span {
    child_of_current(|parent| {
        tracing::info_span!(
            target: TARGET,
            parent: parent,
            "probe",
            byokgate.provider = endpoint.provider,
            byokgate.verdict = Empty,
        )
    })
}

/// Records the finding of the current probe.
pub(crate) fn record_finding(finding: &Finding) {
    if sample_ratio().is_some() {
        Span::current().record("byokgate.verdict", finding.verdict.as_str());
    }
}

/// The span of a calibration: a request with a made-up key.
pub(crate) fn calibration_span(target: &Target) -> Span {
    child_of_current(|parent| {
        tracing::info_span!(
            target: TARGET,
            parent: parent,
            "calibrate",
            byokgate.provider = target.endpoint.provider,
            byokgate.calibration = Empty,
        )
    })
}

/// Records the result of the current calibration.
pub(crate) fn record_calibration(calibration: &Calibration) {
    if sample_ratio().is_some() {
        let word = match calibration {
            Calibration::Refuses { .. } => "refuses",
            Calibration::AcceptsAnyone => "accepts anyone",
            Calibration::Inconclusive(_)
            | Calibration::SameForEveryKey(_)
            | Calibration::NotWaitedFor
            | Calibration::NotAsked => "untold",
        };
        Span::current().record("byokgate.calibration", word);
    }
}

/// The span of one HTTP request. Its path is left out, since it may hold what an operator wrote into a base URL.
pub(crate) fn request_span(call: &Call, header: &str) -> Span {
    child_of_current(|parent| {
        let method = call.probe.method.as_str();
        tracing::info_span!(
            target: TARGET,
            parent: parent,
            "http",
            otel.name = method,
            otel.kind = "client",
            otel.status_code = Empty,
            http.request.method = method,
            url.scheme = call.url.scheme(),
            server.address = call.url.host_str(),
            server.port = call.url.port_or_known_default().map(i64::from),
            byokgate.probe = call.probe.name,
            byokgate.header = header,
            http.response.status_code = Empty,
            error.type = Empty,
        )
    })
}

/// Records the answer to a request: its status, or why there is none. `Err(None)` is a timeout.
pub(crate) fn record_reply(span: &Span, reply: Result<u16, Option<Unreached>>) {
    if span.is_none() {
        return;
    }
    let error = match reply {
        Ok(status) => {
            span.record("http.response.status_code", i64::from(status));
            (status >= 400).then(|| status.to_string())
        }
        Err(why) => {
            let word = match why {
                None => "timeout",
                Some(Unreached::Dns) => "dns",
                Some(Unreached::Address) => "address_refused",
                Some(Unreached::Connect) => "connect",
                Some(Unreached::ConnectTimeout) => "connect_timeout",
                Some(Unreached::Tls) => "tls",
                Some(Unreached::TlsExpired) => "tls_expired",
                Some(Unreached::TlsName) => "tls_name",
                Some(Unreached::TlsIssuer) => "tls_issuer",
                Some(Unreached::Closed) => "closed",
                Some(Unreached::Protocol) => "protocol",
                Some(Unreached::Proxy) => "proxy",
            };
            Some(word.to_owned())
        }
    };
    if let Some(error) = error {
        span.record("otel.status_code", "error");
        span.record("error.type", error);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
    const SPAN: &str = "00f067aa0ba902b7";

    #[test]
    fn a_traceparent_is_taken_whole_or_not_at_all() {
        let parsed = |sampled| Some((TRACE.to_owned(), SPAN.to_owned(), sampled));
        let zero = "0".repeat(32);
        for (text, expect) in [
            (format!("00-{TRACE}-{SPAN}-01"), parsed(true)),
            (format!("00-{TRACE}-{SPAN}-00"), parsed(false)),
            // Unknown flags change nothing.
            (format!("00-{TRACE}-{SPAN}-03"), parsed(true)),
            (format!("00-{TRACE}-{SPAN}-fe"), parsed(false)),
            (format!(" 00-{TRACE}-{SPAN}-01\t"), parsed(true)),
            // A later version, with additional fields.
            (format!("cc-{TRACE}-{SPAN}-01"), parsed(true)),
            (format!("cc-{TRACE}-{SPAN}-01-what-comes"), parsed(true)),
            (format!("cc-{TRACE}-{SPAN}-01.what-comes"), None),
            (format!("00-{TRACE}-{SPAN}-01-what-comes"), None),
            (format!("ff-{TRACE}-{SPAN}-01"), None),
            (format!("00-{zero}-{SPAN}-01"), None),
            (format!("00-{TRACE}-0000000000000000-01"), None),
            (format!("00-{}-{SPAN}-01", TRACE.to_uppercase()), None),
            (format!("00-{TRACE}-{SPAN}"), None),
            (format!("00-{TRACE}{SPAN}--01"), None),
            (format!("00_{TRACE}_{SPAN}_01"), None),
            (format!("é0-{TRACE}-{SPAN}-01"), None),
            ("-".repeat(55), None),
            (String::new(), None),
        ] {
            let Ok(value) = text.parse() else { continue };
            let found = parent_of(&HeaderMap::from_iter([(TRACEPARENT.clone(), value)]));
            let found = found.map(|parent| (parent.trace_id().to_string(), parent.span_id().to_string(), parent.is_sampled()));
            assert_eq!(found, expect, "{text:?}");
        }
    }
}
