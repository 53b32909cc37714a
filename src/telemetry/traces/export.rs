//! Exports spans. They go into a bounded queue, and a separate thread with its own runtime sends them over OTLP. Spans that do not fit or do not
//! arrive are lost; they are counted, and reported rarely. Nothing else waits for the collector.

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

use opentelemetry::{Context, InstrumentationScope, KeyValue, trace::TracerProvider};
use opentelemetry_otlp::{SpanExporter as OtlpExporter, WithExportConfig, WithTonicConfig};
use opentelemetry_sdk::{
    Resource,
    error::{OTelSdkError, OTelSdkResult},
    resource::{EnvResourceDetector, TelemetryResourceDetector},
    trace::{
        BatchConfigBuilder, BatchSpanProcessor, Sampler, SdkTracerProvider, Span as SdkSpan, SpanData, SpanExporter,
        SpanProcessor,
    },
};
use serde::{Deserialize, Serialize};
use tonic::transport::{Certificate, ClientTlsConfig, Endpoint};
use tracing::{Metadata, Subscriber, level_filters::LevelFilter};
use tracing_opentelemetry::OpenTelemetryLayer;
use tracing_subscriber::{Layer, filter::filter_fn, registry::LookupSpan};
use url::Url;
use uuid::Uuid;

use crate::{
    domain::{duration, problem::Review},
    telemetry::metrics::{Collect, Counter, Page},
};

/// The target of this service's own spans. Spans of libraries, such as HTTP or the exporter, are not traced.
pub(super) const TARGET: &str = "byok_gate::span";
/// Keeps these spans enabled under every log filter. The filter is for the log only, and traces have their own switch.
pub(crate) const DIRECTIVE: &str = "byok_gate::span=info";
/// How many spans one message holds: a few hundred KiB, far below a collector's limit.
const BATCH_SPANS: usize = 512;
/// The minimum time between two reports of lost spans.
const REPORT_EVERY: Duration = Duration::from_secs(60);

/// The settings of traces.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct TracingSettings {
    /// The OTLP collector over gRPC: `http://HOST:PORT` or `https://HOST:PORT`. Without it there are no traces.
    pub otlp_endpoint: Option<String>,
    /// The authorities to trust for `https`, instead of the system's.
    pub ca_file: Option<PathBuf>,
    /// The share of calls without a trace of their own that are traced, from 0 to 1.
    pub sample_ratio: f64,
    /// The maximum time for one batch, including retries.
    #[serde(with = "duration")]
    pub export_timeout: Duration,
    /// The maximum time that a span waits to be sent.
    #[serde(with = "duration")]
    pub export_interval: Duration,
    /// How many spans are held at a time, including those being sent.
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
    /// Reports every problem of these settings.
    pub fn review(&self, review: &mut Review<'_>) {
        let least = Duration::from_millis(10);
        review.length("export_timeout", self.export_timeout, least, duration::MAX);
        review.length("export_interval", self.export_interval, least, duration::MAX);
        review.number("queue_spans", self.queue_spans, 1, 1 << 24);
        review.number("sample_ratio", self.sample_ratio, 0.0, 1.0);
        if let Some(endpoint) = &self.otlp_endpoint
            && !is_collector(endpoint)
        {
            // The value is not quoted, since it may hold a password.
            review.error("otlp_endpoint", "is not the address of a collector: http://HOST:PORT or https://HOST:PORT");
        }
    }
}

/// Whether this is an address for OTLP over gRPC, which has no path and no user.
fn is_collector(endpoint: &str) -> bool {
    let Ok(url) = Url::parse(endpoint) else { return false };
    let is_bare = url.username().is_empty() && url.password().is_none() && url.query().is_none() && url.fragment().is_none();
    matches!(url.scheme(), "http" | "https") && url.has_host() && is_bare && url.path() == "/"
}

/// Traces could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum TraceSetupError {
    /// The collector's address or certificates are invalid.
    #[error("tracing.otlp_endpoint `{endpoint}` or its tracing.ca_file is invalid")]
    Endpoint {
        /// The address.
        endpoint: String,
        /// The fault.
        #[source]
        source: tonic::transport::Error,
    },
    /// The exporter reads some settings from the environment, and those are invalid.
    #[error("the exporter's own OTEL_EXPORTER_OTLP_ variables: {0}")]
    Exporter(String),
    /// Its thread or timer could not be started.
    #[error("the exporter's runtime could not be started")]
    Runtime(#[from] io::Error),
}

/// A process has one subscriber, which is set up before the settings are read. So the exporter is set later, here.
static EXPORT: OnceLock<Export> = OnceLock::new();

/// Takes finished spans.
#[derive(Debug)]
struct Export {
    processor: BatchSpanProcessor,
    budget: Arc<SpanBudget>,
    sample_ratio: f64,
}

/// Metrics of the export.
#[derive(Debug)]
pub struct ExportMetrics;

/// Counts the spans that wait or are being sent, and those that are lost.
#[derive(Debug, Default)]
struct SpanBudget {
    spans: AtomicUsize,
    limit: usize,
    lost: Counter,
    /// Whether the last batch failed.
    failing: AtomicBool,
    reported: Mutex<LastReport>,
}

#[derive(Debug, Default)]
struct LastReport {
    lost: u64,
    at: Option<Instant>,
}

/// Passes finished spans to the exporter that [`start`] made.
#[derive(Debug)]
struct ExportProcessor;

/// Sends batches on the calling thread. Its runtime runs only while it sends.
#[derive(Debug)]
struct Sender {
    inner: OtlpExporter,
    runtime: tokio::runtime::Runtime,
    timeout: Duration,
    budget: Arc<SpanBudget>,
}

// === setup ===

/// The subscriber's layer for this service's spans. Events are left out, since the log has them.
pub(crate) fn layer<S: Subscriber + for<'s> LookupSpan<'s>>() -> impl Layer<S> {
    // Sampling is decided before a span is built, so every built span is exported. By default the SDK would read a sampler from the environment.
    let provider = SdkTracerProvider::builder().with_sampler(Sampler::AlwaysOn).with_span_processor(ExportProcessor).build();
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

/// Starts tracing calls. It is not a fault if the collector cannot be reached yet. `roots` is the content of the CA file.
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
    let budget = Arc::new(SpanBudget { limit: *queue, ..SpanBudget::default() });
    let config = BatchConfigBuilder::default()
        .with_max_queue_size(*queue)
        .with_max_export_batch_size(BATCH_SPANS.min(*queue))
        .with_scheduled_delay(*interval)
        .build();
    let sender = Sender { inner, runtime, timeout: *timeout, budget: Arc::clone(&budget) };
    let mut processor = BatchSpanProcessor::new(sender, config);
    processor.set_resource(&resource());
    // A process runs one server, so this is set only once.
    drop(EXPORT.set(Export { processor, budget, sample_ratio: *sample_ratio }));
    Ok(())
}

/// Sends the remaining spans within this time. If the last batch failed, it does not try. It blocks the thread, for the end of a process, and
/// never changes the exit code.
pub fn finish(within: Duration) {
    let Some(Export { processor, budget, .. }) = EXPORT.get() else { return };
    let within = if budget.failing.load(Ordering::Relaxed) { Duration::ZERO } else { within };
    let sent = processor.shutdown_with_timeout(within);
    if sent.is_err() {
        budget.count_lost(budget.spans.load(Ordering::Relaxed));
    }
    budget.report("the collector did not take them before the end", Duration::ZERO);
}

fn collector(endpoint: &str, timeout: Duration, roots: Option<&[u8]>) -> Result<Endpoint, tonic::transport::Error> {
    let endpoint = Endpoint::from_shared(endpoint.to_owned())?
        .user_agent(concat!("byok-gate/", env!("CARGO_PKG_VERSION")))?
        .connect_timeout(timeout)
        // Keepalive detects a dead connection within one batch. Otherwise every batch would fail until TCP gives up.
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

/// The resource attributes. `OTEL_RESOURCE_ATTRIBUTES` and `OTEL_SERVICE_NAME` win, since platforms put a pod's name there.
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

// === export ===

impl SpanProcessor for ExportProcessor {
    fn on_start(&self, _span: &mut SdkSpan, _context: &Context) {}

    fn on_end(&self, span: SpanData) {
        let Some(Export { processor, budget, .. }) = EXPORT.get() else { return };
        if budget.try_reserve() {
            processor.on_end(span);
        } else {
            budget.count_lost(1);
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
        self.budget.failing.store(sent.is_err(), Ordering::Relaxed);
        self.budget.spans.fetch_sub(count, Ordering::Relaxed);
        let why = match &sent {
            Ok(()) => "more came than could be sent".to_owned(),
            Err(fault) => {
                self.budget.count_lost(count);
                fault.to_string()
            }
        };
        self.budget.report(&why, REPORT_EVERY);
        ready(sent)
    }

    fn set_resource(&mut self, resource: &Resource) {
        self.inner.set_resource(resource);
    }
}

impl Collect for ExportMetrics {
    fn collect(&self, page: &mut Page) {
        let lost = EXPORT.get().map_or(0, |export| export.budget.lost.get());
        page.counter("byokgate_spans_dropped", "Trace spans that did not reach a collector").add(&[], lost);
    }
}

// === impl SpanBudget ===

impl SpanBudget {
    fn try_reserve(&self) -> bool {
        let taken = self.spans.fetch_add(1, Ordering::Relaxed) < self.limit;
        if !taken {
            self.spans.fetch_sub(1, Ordering::Relaxed);
        }
        taken
    }

    fn count_lost(&self, spans: usize) {
        self.lost.inc_by(spans as u64);
    }

    /// Logs the spans that were lost since the last report, if that was long enough ago.
    fn report(&self, why: &str, every: Duration) {
        let mut reported = self.reported.lock().unwrap_or_else(PoisonError::into_inner);
        let total = self.lost.get();
        if total > reported.lost && reported.at.is_none_or(|at| at.elapsed() >= every) {
            tracing::warn!(event = "spans_lost", lost = total - reported.lost, total, why);
            *reported = LastReport { lost: total, at: Some(Instant::now()) };
        }
    }
}

/// The share of calls without a trace of their own that are traced. `None` if nothing is exported.
pub(super) fn sample_ratio() -> Option<f64> {
    EXPORT.get().map(|export| export.sample_ratio)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn held_spans_are_bounded_and_lost_ones_are_reported_rarely() {
        let budget = SpanBudget { limit: 2, ..SpanBudget::default() };
        assert_eq!([budget.try_reserve(), budget.try_reserve(), budget.try_reserve()], [true, true, false]);
        budget.spans.fetch_sub(1, Ordering::Relaxed);
        assert_eq!([budget.try_reserve(), budget.try_reserve()], [true, false]);
        let reported = |every| {
            budget.report("made to", every);
            budget.reported.lock().unwrap().lost
        };
        budget.count_lost(3);
        assert_eq!(reported(REPORT_EVERY), 3);
        budget.count_lost(4);
        assert_eq!(reported(REPORT_EVERY), 3);
        assert_eq!(reported(Duration::ZERO), 7);
    }
}
