//! Distributed traces: a caller's trace is continued, and what became of it goes to a collector over OTLP.
//!
//! Whether a call is traced is decided before any span is built: a caller that has decided already is followed, a call without a
//! trace of its own is taken by chance. A call that is not traced builds nothing, and work below it asks for its parent first, so
//! that no part of it springs up as a trace of its own.
//!
//! Nothing here waits for the collector. Spans go into a bounded queue; one thread of its own, with a runtime of its own, sends
//! them. What does not fit or does not arrive is lost, counted, and told of rarely.
//!
//! Names of spans and attributes stand here and nowhere else; they are OpenTelemetry's where it has one. None of them holds a
//! URL's path or query, a header or a body.

use std::{
    env,
    future::{Future, ready},
    io,
    path::PathBuf,
    sync::{
        Arc, Mutex, OnceLock, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use http::{HeaderMap, HeaderName};
pub use opentelemetry::trace::TraceId;
use opentelemetry::{
    Context, InstrumentationScope, KeyValue,
    propagation::{Extractor, TextMapPropagator},
    trace::{SpanContext, TraceContextExt, TracerProvider},
};
use opentelemetry_otlp::{SpanExporter as OtlpExporter, WithExportConfig, WithTonicConfig};
use opentelemetry_sdk::{
    Resource,
    error::{OTelSdkError, OTelSdkResult},
    propagation::TraceContextPropagator,
    resource::{EnvResourceDetector, TelemetryResourceDetector},
    trace::{
        BatchConfigBuilder, BatchSpanProcessor, Sampler, SdkTracerProvider, Span as SdkSpan, SpanData, SpanExporter,
        SpanProcessor,
    },
};
use serde::{Deserialize, Serialize};
use tonic::transport::{Certificate, ClientTlsConfig, Endpoint};
use tracing::{Metadata, Span, Subscriber, field::Empty, level_filters::LevelFilter};
use tracing_opentelemetry::{OpenTelemetryLayer, OpenTelemetrySpanExt};
use tracing_subscriber::{Layer, filter::filter_fn, registry::LookupSpan};
use url::Url;
use uuid::Uuid;

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
    domain::{duration, problem::Review},
    telemetry::metrics::{Counter, Measured, Page},
};

/// What spans of ours are told by. Nobody else's become part of a trace: neither the HTTP library's, nor the exporter's own.
const TARGET: &str = "byok_gate::span";
/// Keeps spans of ours alive under whatever log filter is set: it rules the log, and traces have a switch of their own.
pub(super) const DIRECTIVE: &str = "byok_gate::span=info";
/// What is sent at once: a few hundred KiB, far below what a collector takes for one message.
const BATCH_SPANS: usize = 512;
/// Lost spans are told of no more often than this.
const TELL_EVERY: Duration = Duration::from_secs(60);
/// Read once here, and not for every call.
static TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");

/// Where spans go, and how many.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct TracingSettings {
    /// The OTLP collector over gRPC, `http://HOST:PORT` or `https://HOST:PORT`; no traces without it.
    pub otlp_endpoint: Option<String>,
    /// Whom to trust for `https`, in place of the system's authorities.
    pub ca_file: Option<PathBuf>,
    /// The part of the calls without a trace of their own that is traced, 0 to 1.
    pub sample_ratio: f64,
    /// The longest that one batch may take, tries again included.
    #[serde(with = "duration")]
    pub export_timeout: Duration,
    /// The longest that a span waits to be sent.
    #[serde(with = "duration")]
    pub export_interval: Duration,
    /// How many spans are held at a time, those on their way included.
    pub queue_spans: usize,
}

impl Default for TracingSettings {
    fn default() -> Self {
        Self {
            otlp_endpoint: None,
            ca_file: None,
            sample_ratio: 0.01,
            export_timeout: Duration::from_secs(10),
            export_interval: Duration::from_secs(5),
            queue_spans: 2048,
        }
    }
}

impl TracingSettings {
    /// What is wrong with them.
    pub fn review(&self, review: &mut Review<'_>) {
        let least = Duration::from_millis(10);
        review.length("export_timeout", self.export_timeout, least, duration::MAX);
        review.length("export_interval", self.export_interval, least, duration::MAX);
        review.number("queue_spans", self.queue_spans, 1, 1 << 24);
        review.number("sample_ratio", self.sample_ratio, 0.0, 1.0);
        if let Some(endpoint) = &self.otlp_endpoint
            && !is_collector(endpoint)
        {
            // What was given is not repeated: it may hold a password.
            review.error("otlp_endpoint", "is not the address of a collector: http://HOST:PORT or https://HOST:PORT");
        }
    }
}

/// An address for OTLP over gRPC, which has neither path nor user.
fn is_collector(endpoint: &str) -> bool {
    let Ok(url) = Url::parse(endpoint) else { return false };
    let is_bare = url.username().is_empty() && url.password().is_none() && url.query().is_none() && url.fragment().is_none();
    matches!(url.scheme(), "http" | "https") && url.has_host() && is_bare && url.path() == "/"
}

/// Traces could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum TraceSetupError {
    /// The collector's address or certificates do not stand.
    #[error("tracing.otlp_endpoint `{endpoint}` or its tracing.ca_file is invalid")]
    Endpoint {
        /// The address.
        endpoint: String,
        /// The fault.
        #[source]
        source: tonic::transport::Error,
    },
    /// The exporter takes some of its settings from the environment, and those do not stand.
    #[error("the exporter's own OTEL_EXPORTER_OTLP_ variables: {0}")]
    Exporter(String),
    /// No thread or timer could be had.
    #[error("the exporter's runtime could not be started")]
    Runtime(#[from] io::Error),
}

/// One process has one subscriber, and it is there before the settings are read.
static EXPORT: OnceLock<Export> = OnceLock::new();

/// What takes finished spans.
#[derive(Debug)]
struct Export {
    processor: BatchSpanProcessor,
    held: Arc<Held>,
    sample_ratio: f64,
}

/// What became of the spans: numbers for the page.
#[derive(Debug)]
pub struct Exported;

/// The spans that are waiting or on their way, and those that are lost.
#[derive(Debug, Default)]
struct Held {
    spans: AtomicUsize,
    limit: usize,
    lost: Counter,
    /// The last batch did not arrive.
    failing: AtomicBool,
    told: Mutex<Told>,
}

#[derive(Debug, Default)]
struct Told {
    lost: u64,
    at: Option<Instant>,
}

/// Gives finished spans to what [`start`] made.
#[derive(Debug)]
struct Outlet;

/// Sends batches, on the thread that calls it and on no other: its runtime runs only while it sends.
#[derive(Debug)]
struct Sender {
    inner: OtlpExporter,
    runtime: tokio::runtime::Runtime,
    timeout: Duration,
    held: Arc<Held>,
}

/// The part that a call had in a flight.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Part {
    /// It launched it.
    Fill,
    /// Another call had.
    Wait,
}

/// One call's place in a trace; by default in none.
#[derive(Debug)]
pub struct Traced {
    span: Span,
    trace_id: Option<TraceId>,
}

// === setting up ===

/// The subscriber's layer: spans of ours, and no events, since the log has them.
pub(super) fn layer<S: Subscriber + for<'s> LookupSpan<'s>>() -> impl Layer<S> {
    // Sampled is what is built at all; the SDK would read the environment for another answer.
    let provider = SdkTracerProvider::builder().with_sampler(Sampler::AlwaysOn).with_span_processor(Outlet).build();
    let scope = InstrumentationScope::builder(env!("CARGO_PKG_NAME")).with_version(env!("CARGO_PKG_VERSION")).build();
    let ours = |metadata: &Metadata<'_>| metadata.is_span() && metadata.target() == TARGET;
    OpenTelemetryLayer::new(provider.tracer_with_scope(scope))
        .with_location(false)
        .with_threads(false)
        .with_target(false)
        .with_tracked_inactivity(false)
        .with_context_activation(false)
        .with_filter(filter_fn(ours).with_max_level_hint(LevelFilter::INFO))
}

/// From now on calls are traced. A collector that is not there is no fault: it may come.
/// `roots` is what the CA file holds.
pub fn start(settings: &TracingSettings, roots: Option<&[u8]>) -> Result<(), TraceSetupError> {
    let TracingSettings {
        otlp_endpoint,
        ca_file: _,
        sample_ratio,
        export_timeout: timeout,
        export_interval: interval,
        queue_spans: queue,
    } = settings;
    let Some(endpoint) = otlp_endpoint else { return Ok(()) };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let collector = collector(endpoint, *timeout, roots)
        .map_err(|source| TraceSetupError::Endpoint { endpoint: endpoint.clone(), source })?;
    let channel = {
        let _context = runtime.enter();
        collector.connect_lazy()
    };
    let inner = OtlpExporter::builder()
        .with_tonic()
        .with_channel(channel)
        .with_timeout(*timeout)
        .build()
        .map_err(|fault| TraceSetupError::Exporter(fault.to_string()))?;
    let held = Arc::new(Held { limit: *queue, ..Held::default() });
    let config = BatchConfigBuilder::default()
        .with_max_queue_size(*queue)
        .with_max_export_batch_size(BATCH_SPANS.min(*queue))
        .with_scheduled_delay(*interval)
        .build();
    let sender = Sender { inner, runtime, timeout: *timeout, held: Arc::clone(&held) };
    let mut processor = BatchSpanProcessor::new(sender, config);
    processor.set_resource(&resource());
    // A second start would be a second server in one process, which there is not.
    drop(EXPORT.set(Export { processor, held, sample_ratio: *sample_ratio }));
    Ok(())
}

/// Sends what is left, for this long at most, and not at all to a collector that did not take the last batch: it changes no
/// exit. Blocks its thread: for the end of a process.
pub fn finish(within: Duration) {
    let Some(Export { processor, held, .. }) = EXPORT.get() else { return };
    let within = if held.failing.load(Ordering::Relaxed) { Duration::ZERO } else { within };
    let sent = processor.shutdown_with_timeout(within);
    if sent.is_err() {
        held.lose(held.spans.load(Ordering::Relaxed));
    }
    held.tell("the collector did not take them before the end", Duration::ZERO);
}

fn collector(endpoint: &str, timeout: Duration, roots: Option<&[u8]>) -> Result<Endpoint, tonic::transport::Error> {
    let endpoint = Endpoint::from_shared(endpoint.to_owned())?
        .user_agent(concat!("byok-gate/", env!("CARGO_PKG_VERSION")))?
        .connect_timeout(timeout)
        // A connection that went dead is found out within one batch, not by every batch until TCP gives up.
        .http2_keep_alive_interval(timeout / 4)
        .keep_alive_timeout(timeout / 4);
    if endpoint.uri().scheme() != Some(&http::uri::Scheme::HTTPS) {
        return Ok(endpoint);
    }
    let tls = match roots {
        Some(pem) => ClientTlsConfig::new().ca_certificate(Certificate::from_pem(pem)),
        None => ClientTlsConfig::new().with_native_roots(),
    };
    endpoint.tls_config(tls)
}

/// Who sends. What `OTEL_RESOURCE_ATTRIBUTES` and `OTEL_SERVICE_NAME` say wins: that is where platforms put a pod's name.
fn resource() -> Resource {
    let named = Resource::builder_empty()
        .with_service_name(env!("CARGO_PKG_NAME"))
        .with_attributes([
            KeyValue::new("service.version", env!("CARGO_PKG_VERSION")),
            KeyValue::new("service.instance.id", Uuid::now_v7().to_string()),
        ])
        .with_detectors(&[Box::new(TelemetryResourceDetector), Box::new(EnvResourceDetector::new())]);
    match env::var("OTEL_SERVICE_NAME") {
        Ok(name) if !name.trim().is_empty() => named.with_service_name(name),
        Ok(_) | Err(_) => named,
    }
    .build()
}

// === the way out ===

impl SpanProcessor for Outlet {
    fn on_start(&self, _span: &mut SdkSpan, _context: &Context) {}

    fn on_end(&self, span: SpanData) {
        let Some(Export { processor, held, .. }) = EXPORT.get() else { return };
        if held.take_one() {
            processor.on_end(span);
        } else {
            held.lose(1);
        }
    }

    fn force_flush(&self) -> OTelSdkResult {
        Ok(())
    }

    fn shutdown_with_timeout(&self, _timeout: Duration) -> OTelSdkResult {
        Ok(())
    }
}

impl SpanExporter for Sender {
    fn export(&self, batch: Vec<SpanData>) -> impl Future<Output = OTelSdkResult> + Send {
        let count = batch.len();
        let sent = self.runtime.block_on(async {
            let sending = tokio::time::timeout(self.timeout, self.inner.export(batch));
            sending.await.unwrap_or(Err(OTelSdkError::Timeout(self.timeout)))
        });
        self.held.failing.store(sent.is_err(), Ordering::Relaxed);
        self.held.spans.fetch_sub(count, Ordering::Relaxed);
        let why = match &sent {
            Ok(()) => "more came than could be sent".to_owned(),
            Err(fault) => {
                self.held.lose(count);
                fault.to_string()
            }
        };
        self.held.tell(&why, TELL_EVERY);
        ready(sent)
    }

    fn set_resource(&mut self, resource: &Resource) {
        self.inner.set_resource(resource);
    }
}

impl Measured for Exported {
    fn tell(&self, page: &mut Page) {
        let lost = EXPORT.get().map_or(0, |export| export.held.lost.get());
        page.counter("byokgate_spans_dropped", "Trace spans that no collector took").add(&[], lost);
    }
}

// === impl Held ===

impl Held {
    fn take_one(&self) -> bool {
        let taken = self.spans.fetch_add(1, Ordering::Relaxed) < self.limit;
        if !taken {
            self.spans.fetch_sub(1, Ordering::Relaxed);
        }
        taken
    }

    fn lose(&self, spans: usize) {
        self.lost.many(spans as u64);
    }

    /// Tells of what was lost since it was told of last, if that is long enough ago.
    fn tell(&self, why: &str, every: Duration) {
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        let total = self.lost.get();
        if total > told.lost && told.at.is_none_or(|at| at.elapsed() >= every) {
            tracing::warn!(event = "spans_lost", lost = total - told.lost, total, why);
            *told = Told { lost: total, at: Some(Instant::now()) };
        }
    }
}

// === one call ===

/// A span with what is told of it by [`Traced::decided`] and [`Traced::answered`]: what it does not name from the start is lost.
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
    /// A call that begins now, of this method of this service.
    pub fn begin(headers: &HeaderMap, service: &'static str, method: &'static str) -> Self {
        let parent = parent_of(headers);
        let trace_id = parent.as_ref().map(SpanContext::trace_id);
        let Some(export) = EXPORT.get() else { return Self { span: Span::none(), trace_id } };
        let sampled = parent.as_ref().map_or_else(|| rand::random::<f64>() < export.sample_ratio, SpanContext::is_sampled);
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
            // Fails only where there is no layer of ours, and so nothing to continue.
            drop(span.set_parent(Context::new().with_remote_span_context(parent)));
        }
        let context = span.context();
        let trace_id = trace_id.or_else(|| Some(context.span().span_context().trace_id())).filter(|id| *id != TraceId::INVALID);
        Self { span, trace_id }
    }

    /// One item of a batch.
    pub fn item(&self, index: u32) -> Self {
        let span = below(&self.span, |parent| span_of_a_decision!(parent, "decide", byokgate.batch.index = i64::from(index),));
        Self { span, trace_id: self.trace_id }
    }

    /// The span of the work that the call is; none if it is not traced.
    pub fn span(&self) -> Span {
        self.span.clone()
    }

    /// The trace that the call belongs to: its caller's, traced here or not, or one of our own.
    pub fn trace_id(&self) -> Option<TraceId> {
        self.trace_id
    }

    /// A decision was made.
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

    /// The call is answered. Those codes that are a server's fault mark the span.
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

/// A call's headers, as the SDK's propagator reads them.
struct Headers<'h>(&'h HeaderMap);

impl Extractor for Headers<'_> {
    fn get(&self, key: &str) -> Option<&str> {
        self.0.get(key)?.to_str().ok()
    }

    fn keys(&self) -> Vec<&str> {
        self.0.keys().map(HeaderName::as_str).collect()
    }
}

/// The caller's place in its trace, by W3C's `traceparent` and `tracestate`. A `tracestate` that cannot be read is dropped, and the trace
/// goes on.
fn parent_of(headers: &HeaderMap) -> Option<SpanContext> {
    // Nearly every call has none, which is seen without reading anything.
    headers.get(&TRACEPARENT)?;
    let context = TraceContextPropagator::new().extract_with_context(&Context::new(), &Headers(headers));
    let parent = context.span().span_context().clone();
    parent.is_valid().then_some(parent)
}

// === what a call does ===

/// Builds a span below this one, if this one is of ours; else none.
fn below(parent: &Span, build: impl FnOnce(&Span) -> Span) -> Span {
    if parent.metadata().is_some_and(|metadata| metadata.target() == TARGET) { build(parent) } else { Span::none() }
}

/// The same below the current one.
fn here(build: impl FnOnce(&Span) -> Span) -> Span {
    // Without an exporter there are none, and the subscriber need not be asked.
    if EXPORT.get().is_none() { Span::none() } else { below(&Span::current(), build) }
}

/// Whether what is done here is shown in a trace.
pub(crate) fn is_traced() -> bool {
    EXPORT.get().is_some() && !Span::current().is_none()
}

/// A look into the memory of observations, and what waiting comes of it.
pub(crate) fn cache() -> Span {
    here(|parent| {
        tracing::info_span!(
            target: TARGET,
            parent: parent,
            "cache",
            byokgate.cache.result = Empty,
            byokgate.verdict = Empty,
        )
    })
}

/// What came of it.
pub(crate) fn observed(span: &Span, observed: &Observed, part: Option<Part>) {
    if span.is_none() {
        return;
    }
    let result = match (part, observed.served_from) {
        (Some(Part::Fill), _) => "fill",
        (Some(Part::Wait), _) => "wait",
        (None, ServedFrom::Cache | ServedFrom::Stale) => "hit",
        (None, ServedFrom::Breaker) => "breaker",
        (None, ServedFrom::Probe) => "withheld",
    };
    span.record("byokgate.cache.result", result);
    span.record("byokgate.verdict", observed.finding.verdict.as_str());
}

/// One walk up a provider's ladder, with the wait for its turn.
pub(crate) fn probe(endpoint: &endpoint::Endpoint) -> Span {
    here(|parent| {
        tracing::info_span!(
            target: TARGET,
            parent: parent,
            "probe",
            byokgate.provider = endpoint.provider,
            byokgate.verdict = Empty,
        )
    })
}

/// What came of the walk whose work this is.
pub(crate) fn found(finding: &Finding) {
    if EXPORT.get().is_some() {
        Span::current().record("byokgate.verdict", finding.verdict.as_str());
    }
}

/// Whether an endpoint refuses a made-up key.
pub(crate) fn calibrate(target: &Target) -> Span {
    here(|parent| {
        tracing::info_span!(
            target: TARGET,
            parent: parent,
            "calibrate",
            byokgate.provider = target.endpoint.provider,
            byokgate.calibration = Empty,
        )
    })
}

/// What came of the calibration whose work this is.
pub(crate) fn calibrated(calibration: &Calibration) {
    if EXPORT.get().is_some() {
        let word = match calibration {
            Calibration::Refuses { .. } => "refuses",
            Calibration::AcceptsAnyone => "accepts anyone",
            Calibration::Untold(_) | Calibration::NotAsked => "untold",
        };
        Span::current().record("byokgate.calibration", word);
    }
}

/// One request. Its path is left out: it may hold what an operator wrote into a base URL.
pub(crate) fn request(call: &Call, header: &str) -> Span {
    here(|parent| {
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

/// A request's answer: its status, or why there is none; without a reason its time was over.
pub(crate) fn replied(span: &Span, reply: Result<u16, Option<Unreached>>) {
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
                Some(Unreached::Tls) => "tls",
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
            // Flags that nobody has defined yet change nothing.
            (format!("00-{TRACE}-{SPAN}-03"), parsed(true)),
            (format!("00-{TRACE}-{SPAN}-fe"), parsed(false)),
            (format!(" 00-{TRACE}-{SPAN}-01\t"), parsed(true)),
            // A later version, with what it has more.
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

    #[test]
    fn what_is_held_is_bounded_and_what_is_lost_is_told_of_rarely() {
        let held = Held { limit: 2, ..Held::default() };
        assert_eq!([held.take_one(), held.take_one(), held.take_one()], [true, true, false]);
        held.spans.fetch_sub(1, Ordering::Relaxed);
        assert_eq!([held.take_one(), held.take_one()], [true, false]);
        let told = |every| {
            held.tell("made to", every);
            held.told.lock().unwrap().lost
        };
        held.lose(3);
        assert_eq!(told(TELL_EVERY), 3);
        held.lose(4);
        assert_eq!(told(TELL_EVERY), 3);
        assert_eq!(told(Duration::ZERO), 7);
    }
}
