//! Traces: a caller's is continued to the provider, no secret is in one, and nothing waits for a collector.

use std::collections::BTreeMap;

use byok_gate::grpc::convert::pb::{BatchDecideRequest, DecideRequest, DecideResponse};
use opentelemetry_proto::tonic::trace::v1::span::SpanKind;
use serde_json::Value;
use tokio::{io::AsyncReadExt, net::TcpListener};
use tonic::{Request, transport::Channel};

use crate::{
    secrets::is_not_in,
    support::{
        binary::{self, Ended, Serving},
        case,
        collector::{Collector, Seen},
        edge::{Authority, decide},
        gate::Files,
        vendor::{Behave, Row, Vendor},
    },
};

type Client = byok_gate::grpc::convert::pb::policy_decision_service_client::PolicyDecisionServiceClient<Channel>;

const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
const OTHER: &str = "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa";
const PARENT: &str = "00f067aa0ba902b7";
/// Lets a gate of these tests send made-up keys, which makes a request more for each endpoint.
const CALIBRATES: (&str, &str) = ("BYOK_GATE__PROBE__CALIBRATE", "true");
const SERVICE: &str = "byokgate.v1.PolicyDecisionService";

/// A gate with these `tracing` settings before a vendor with these rows.
struct Setup {
    serving: Serving,
    client: Client,
    vendor: Vendor,
    _files: Files,
}

async fn setup(rows: Vec<Row>, tracing: &str, log: &str, environment: &[(&str, &str)]) -> Setup {
    let vendor = Vendor::start(rows).await;
    let (registry, catalogue) = case::documents(vendor.address.port());
    let config = format!(
        "server: {{worker_threads: 1}}\nshutdown: {{notice: 0s}}\nnew_keys: {{per_organization: 9999}}\nprobe: {{calibrate: false}}\ntracing: {{{tracing}}}\n"
    );
    let files = Files::new(&registry, &catalogue, Some(&config));
    let flags = files.flags();
    let arguments: Vec<&str> = ["--log", log].into_iter().chain(flags.iter().map(String::as_str)).collect();
    let serving = Serving::start_in(&arguments, environment).await;
    let client = serving.client().await;
    Setup { serving, client, vendor, _files: files }
}

fn to(collector: &Collector, more: &str) -> String {
    format!("otlp_endpoint: \"http://{}\", export_interval: 20ms, {more}", collector.address)
}

fn models(status: u16) -> Row {
    let body = if status == 200 { r#"{"data": []}"# } else { r#"{"error": {"code": "invalid_api_key"}}"# };
    Row { status: Some(status), body: body.into(), ..Row::default() }
}

fn traced(message: DecideRequest, traceparent: &str) -> Request<DecideRequest> {
    let mut request = Request::new(message);
    request.metadata_mut().insert("traceparent", traceparent.parse().unwrap());
    request.metadata_mut().insert("tracestate", "congo=t61rcWkgMzE,rojo=00f067aa0ba902b7".parse().unwrap());
    request
}

fn sampled(message: DecideRequest) -> Request<DecideRequest> {
    traced(message, &format!("00-{TRACE}-{PARENT}-01"))
}

impl Setup {
    async fn ask(&mut self, request: Request<DecideRequest>) -> DecideResponse {
        self.client.decide(request).await.unwrap().into_inner()
    }

    async fn end(self) -> Ended {
        drop(self.client);
        self.serving.terminate().await;
        let ended = self.serving.ended().await;
        assert!(ended.status.success(), "{ended:?}");
        ended
    }
}

fn named<'s>(spans: &'s [Seen], name: &str) -> Vec<&'s Seen> {
    spans.iter().filter(|span| span.name == name).collect()
}

fn pairs<const N: usize>(list: [(&str, &str); N]) -> BTreeMap<String, String> {
    list.map(|(key, value)| (key.to_owned(), value.to_owned())).into()
}

/// The log's events of this name.
fn events(ended: &Ended, name: &str) -> Vec<Value> {
    let lines = ended.stdout.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    lines.filter(|line| line["event"] == name).collect()
}

/// From the caller's span over ours to the provider, with the names that OpenTelemetry has for things; and decision, trace and
/// log line find each other.
#[tokio::test]
async fn a_callers_trace_is_continued_to_the_provider() {
    // A log of nothing but warnings, and where it listens, silences no trace.
    let log = "warn,byok_gate::cli::serve=info";
    let mut collector = Collector::start().await;
    let mut setup = setup(vec![models(401)], &to(&collector, "sample_ratio: 0"), log, &[]).await;
    let response = setup.ask(sampled(decide("made-up-key"))).await;
    let again = setup.ask(sampled(decide("made-up-key"))).await;
    let spans = collector.until(|spans| spans.len() >= 6).await;
    for span in &spans {
        assert_eq!((span.trace.as_str(), span.events), (TRACE, 0), "{span:#?}");
        assert_eq!(span.state, "congo=t61rcWkgMzE,rojo=00f067aa0ba902b7", "{span:#?}");
    }
    let calls = named(&spans, &format!("{SERVICE}/Decide"));
    let [first, second] = calls[..] else { panic!("{spans:#?}") };
    let (first, second) =
        if first.get("byokgate.decision_id") == response.decision_id { (first, second) } else { (second, first) };
    for (span, response) in [(first, &response), (second, &again)] {
        assert_eq!((span.parent.as_str(), span.kind, span.failed), (PARENT, SpanKind::Server, false));
        let expect = [
            ("rpc.system", "grpc"),
            ("rpc.service", SERVICE),
            ("rpc.method", "Decide"),
            ("rpc.grpc.status_code", "0"),
            ("byokgate.decision_id", &response.decision_id),
            ("byokgate.checkpoint", "CREATE"),
            ("byokgate.outcome", "DENY"),
            ("byokgate.code", "INVALID_BYOK_CREDENTIAL"),
            ("byokgate.provider", "acme"),
            ("byokgate.verdict", "INVALID"),
        ];
        assert_eq!(span.attributes, pairs(expect), "{span:#?}");
    }
    let caches = named(&spans, "cache");
    let of = |call: &Seen| *caches.iter().find(|cache| cache.parent == call.id).unwrap();
    assert_eq!((of(first).get("byokgate.cache.result"), of(first).get("byokgate.verdict")), ("fill", "INVALID"));
    assert_eq!((of(second).get("byokgate.cache.result"), of(second).get("byokgate.verdict")), ("hit", "INVALID"));
    let [probe] = named(&spans, "probe")[..] else { panic!("{spans:#?}") };
    assert_eq!((probe.parent.as_str(), probe.kind), (of(first).id.as_str(), SpanKind::Internal));
    assert_eq!((probe.get("byokgate.provider"), probe.get("byokgate.verdict")), ("acme", "INVALID"));
    let [get] = named(&spans, "GET")[..] else { panic!("{spans:#?}") };
    assert_eq!((get.parent.as_str(), get.kind, get.failed), (probe.id.as_str(), SpanKind::Client, true));
    let port = setup.vendor.address.port().to_string();
    let expect = [
        ("http.request.method", "GET"),
        ("url.scheme", "http"),
        ("server.address", "127.0.0.1"),
        ("server.port", &port),
        ("byokgate.probe", "models"),
        ("byokgate.header", "bearer"),
        ("http.response.status_code", "401"),
        ("error.type", "401"),
    ];
    assert_eq!(get.attributes, pairs(expect), "{get:#?}");
    assert_eq!(spans.len(), 6, "{spans:#?}");
    assert_eq!(collector.resource["service.name"], "byok-gate");
    assert_eq!(collector.resource["service.version"], env!("CARGO_PKG_VERSION"));
    let lines = events(&setup.end().await, "decision");
    let found: Vec<_> =
        lines.iter().map(|line| (line["decision_id"].as_str().unwrap(), line["trace_id"].as_str().unwrap())).collect();
    assert_eq!(found, [(response.decision_id.as_str(), TRACE), (again.decision_id.as_str(), TRACE)]);
}

/// A caller's unsampled flag is obeyed, a call without a trace is sampled at random; either way the log has the trace id.
#[tokio::test]
async fn the_caller_decides_and_where_there_is_none_the_ratio() {
    for (ratio, roots) in [("1", 3), ("0", 0)] {
        let mut collector = Collector::start().await;
        let settings = to(&collector, &format!("sample_ratio: {ratio}"));
        let mut setup = setup(vec![models(401)], &settings, "info", &[]).await;
        let unsampled = format!("00-{OTHER}-{PARENT}-00");
        // The first one fills the memory: nothing of that becomes a trace of its own either.
        setup.ask(traced(decide("made-up-key"), &unsampled)).await;
        for broken in [format!("00-{OTHER}-{PARENT}"), format!("ff-{OTHER}-{PARENT}-01"), "nonsense".to_owned()] {
            setup.ask(traced(decide("made-up-key"), &broken)).await;
        }
        setup.ask(sampled(decide("made-up-key"))).await;
        let lines = events(&setup.end().await, "decision");
        let spans = collector.all();
        let calls = named(&spans, &format!("{SERVICE}/Decide"));
        let own: Vec<_> = calls.iter().filter(|span| span.trace != TRACE).collect();
        assert_eq!((calls.len(), own.len()), (roots + 1, roots), "{spans:#?}");
        assert!(own.iter().all(|span| span.parent.is_empty() && span.state.is_empty()), "{own:#?}");
        // A call and its look into the memory, and nothing without a call.
        assert_eq!(spans.len(), 2 * (roots + 1), "{spans:#?}");
        let known: BTreeMap<&str, &str> =
            calls.iter().map(|span| (span.get("byokgate.decision_id"), span.trace.as_str())).collect();
        let told: Vec<Option<&str>> = lines.iter().map(|line| line["trace_id"].as_str()).collect();
        assert_eq!((told.len(), told[0], told[4]), (5, Some(OTHER), Some(TRACE)));
        for line in &lines[1..4] {
            let decision = line["decision_id"].as_str().unwrap();
            assert_eq!(line["trace_id"].as_str(), known.get(decision).copied(), "{line}");
        }
    }
}

/// Two callers with one credential: the second one's trace shows that it waited, and the probe is the first one's.
#[tokio::test]
async fn a_waiter_is_told_from_the_one_that_fills() {
    let mut collector = Collector::start().await;
    let row = Row { delay_ms: 300, ..models(200) };
    let setup = setup(vec![row], &to(&collector, ""), "info", &[]).await;
    let (mut one, mut other) = (setup.client.clone(), setup.client.clone());
    let first = tokio::spawn(async move { one.decide(sampled(decide("made-up-key"))).await.unwrap() });
    while setup.vendor.asked().is_empty() {
        tokio::task::yield_now().await;
    }
    other.decide(traced(decide("made-up-key"), &format!("00-{OTHER}-{PARENT}-01"))).await.unwrap();
    first.await.unwrap();
    drop(other);
    setup.end().await;
    let spans = collector.all();
    let results = |trace: &str| {
        let mut found: Vec<_> = spans.iter().filter(|span| span.trace == trace).map(|span| span.name.as_str()).collect();
        found.sort_unstable();
        let cache = spans.iter().find(|span| span.trace == trace && span.name == "cache").unwrap();
        (found, cache.get("byokgate.cache.result").to_owned())
    };
    let call = format!("{SERVICE}/Decide");
    assert_eq!(results(TRACE), (vec!["GET", call.as_str(), "cache", "probe"], "fill".to_owned()));
    assert_eq!(results(OTHER), (vec![call.as_str(), "cache"], "wait".to_owned()));
}

/// A caller that leaves during the probe: its span ends then, and the probe's continues below it.
#[tokio::test]
async fn a_probe_that_outlives_its_caller_stays_in_the_trace() {
    let mut collector = Collector::start().await;
    let row = Row { delay_ms: 850, ..models(200) };
    let mut setup = setup(vec![row], &to(&collector, ""), "info", &[]).await;
    let mut request = sampled(decide("made-up-key"));
    // A tenth of it is left to bring the answer, on a busy machine too; the row's budget is a second.
    request.set_timeout(std::time::Duration::from_millis(700));
    setup.ask(request).await;
    let spans = collector.until(|spans| spans.len() == 4).await;
    let [cache] = named(&spans, "cache")[..] else { panic!("{spans:#?}") };
    let [probe] = named(&spans, "probe")[..] else { panic!("{spans:#?}") };
    assert_eq!(probe.parent, cache.id);
    assert!(cache.took < probe.took, "{spans:#?}");
    assert_eq!((cache.get("byokgate.verdict"), probe.get("byokgate.verdict")), ("TIMEOUT", "VALID"));
    setup.end().await;
}

/// A caller that hangs up: its span says so, and ends.
#[tokio::test]
async fn a_call_that_its_caller_left_is_cancelled() {
    let mut collector = Collector::start().await;
    let row = Row { behave: Some(Behave::Silent), ..Row::default() };
    let setup = setup(vec![row], &to(&collector, ""), "info", &[]).await;
    let mut client = setup.client.clone();
    let call = tokio::spawn(async move { client.decide(sampled(decide("made-up-key"))).await });
    while setup.vendor.asked().is_empty() {
        tokio::task::yield_now().await;
    }
    call.abort();
    let spans = collector.until(|spans| spans.len() == 4).await;
    let [call] = named(&spans, &format!("{SERVICE}/Decide"))[..] else { panic!("{spans:#?}") };
    assert_eq!((call.get("rpc.grpc.status_code"), call.get("byokgate.decision_id")), ("1", ""));
    let [get] = named(&spans, "GET")[..] else { panic!("{spans:#?}") };
    assert_eq!((get.get("error.type"), get.failed, get.get("http.response.status_code")), ("timeout", true, ""));
    setup.end().await;
}

#[tokio::test]
async fn a_batch_has_a_span_for_each_item() {
    let mut collector = Collector::start().await;
    let mut setup = setup(vec![models(401)], &to(&collector, ""), "info", &[]).await;
    let mut bad = decide("made-up-key");
    bad.checkpoint = 77;
    let mut request = Request::new(BatchDecideRequest { requests: vec![decide("made-up-key"), bad] });
    request.metadata_mut().insert("traceparent", format!("00-{TRACE}-{PARENT}-01").parse().unwrap());
    let mut stream = setup.client.batch_decide(request).await.unwrap().into_inner();
    while stream.message().await.unwrap().is_some() {}
    let ended = setup.end().await;
    let spans = collector.all();
    let [batch] = named(&spans, &format!("{SERVICE}/BatchDecide"))[..] else { panic!("{spans:#?}") };
    assert_eq!((batch.parent.as_str(), batch.get("rpc.grpc.status_code")), (PARENT, "0"));
    let mut items = named(&spans, "decide");
    items.sort_by_key(|item| item.get("byokgate.batch.index").to_owned());
    let [good, bad] = items[..] else { panic!("{spans:#?}") };
    assert!(good.parent == batch.id && bad.parent == batch.id, "{spans:#?}");
    assert_eq!((good.get("rpc.grpc.status_code"), good.get("byokgate.code")), ("0", "INVALID_BYOK_CREDENTIAL"));
    assert_eq!((bad.get("rpc.grpc.status_code"), bad.get("byokgate.code")), ("3", ""));
    assert_eq!(named(&spans, "cache")[0].parent, good.id);
    let [line] = &events(&ended, "decision")[..] else { panic!("{ended:?}") };
    assert_eq!((line["trace_id"].as_str(), line["decision_id"].as_str()), (Some(TRACE), Some(good.get("byokgate.decision_id"))));
}

/// An endpoint that is not known to refuse made-up keys: the one sent to find out is part of the trace.
#[tokio::test]
async fn a_calibration_is_part_of_the_trace_that_began_it() {
    let mut collector = Collector::start().await;
    let good = Row { key: Some("made-up-key".into()), ..models(200) };
    let mut setup = setup(vec![good, models(401)], &to(&collector, ""), "info", &[CALIBRATES]).await;
    let mut request = decide("made-up-key");
    let spec = request.workspace_spec.as_mut().unwrap();
    spec.model = "loose/any".into();
    spec.credentials[0].env_name = "LOOSE_API_KEY".into();
    setup.ask(sampled(request)).await;
    setup.end().await;
    let spans = collector.all();
    let calibrations = named(&spans, "calibrate");
    let [probe] = named(&spans, "probe")[..] else { panic!("{spans:#?}") };
    assert!(!calibrations.is_empty(), "{spans:#?}");
    for calibration in calibrations {
        assert_eq!((calibration.parent.as_str(), calibration.get("byokgate.calibration")), (probe.id.as_str(), "refuses"));
        let below: Vec<_> = spans.iter().filter(|span| span.parent == calibration.id).collect();
        let [get] = below[..] else { panic!("{spans:#?}") };
        assert_eq!((get.name.as_str(), get.get("http.response.status_code")), ("GET", "401"));
    }
}

/// Everything that a collector gets, with a canary for each secret, at the most verbose log level: no secret, and no span of a library,
/// including the exporter.
#[tokio::test]
async fn no_span_holds_a_secret_and_all_are_ours() {
    const CANARY: &str = "made-up-canary-7f3a";
    let mut collector = Collector::start().await;
    let environment = [CALIBRATES, ("OTEL_EXPORTER_OTLP_HEADERS", "authorization=Bearer made-up-collector-token")];
    for (status, body) in
        [(200, "{\"data\": [], \"key\": \"KEY\"}"), (401, "{\"error\": {\"code\": \"KEY\"}}"), (500, "KEY"), (302, "")]
    {
        let row = Row {
            status: Some(status),
            headers: BTreeMap::from([("location".into(), format!("/{CANARY}")), ("x-echo".into(), CANARY.into())]),
            body: body.replace("KEY", CANARY),
            ..Row::default()
        };
        let mut setup = setup(vec![row], &to(&collector, ""), "trace", &environment).await;
        let mut request = decide(CANARY);
        request.explain = true;
        setup.ask(sampled(request)).await;
        let mut request = decide(CANARY);
        let spec = request.workspace_spec.as_mut().unwrap();
        spec.model = "loose/any".into();
        spec.credentials[0].env_name = "LOOSE_API_KEY".into();
        setup.ask(sampled(request)).await;
        setup.client.decide(sampled(decide(&format!("{CANARY}\n")))).await.unwrap();
        assert!(setup.vendor.asked_with(CANARY) > 0);
        let ended = setup.end().await;
        for told in [&ended.stdout, &ended.stderr] {
            is_not_in(told, "made-up-collector-token", "the log");
            is_not_in(told, CANARY, "the log");
        }
    }
    let spans = collector.all();
    let ours = [format!("{SERVICE}/Decide").as_str(), "cache", "probe", "calibrate", "GET", "POST"].map(str::to_owned);
    assert!(spans.iter().all(|span| ours.contains(&span.name) && span.trace == TRACE && span.events == 0), "{spans:#?}");
    assert!(spans.len() > 40, "{spans:#?}");
    let page = include_str!("../../docs/traces.md");
    for key in spans.iter().flat_map(|span| span.attributes.keys()) {
        assert!(page.contains(&format!("`{key}`")), "docs/traces.md does not say what {key} is");
    }
    assert!(collector.raw.contains("made-up-collector-token"), "the collector did not get its own token");
    is_not_in(&collector.raw, CANARY, "what was sent to the collector");
}

/// A collector that accepts connections and never answers, and an absent one, with a single worker thread: every decision is made,
/// the process ends, and a line or two report the lost spans.
#[tokio::test]
async fn no_decision_and_no_end_waits_for_a_collector() {
    let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let hanging = silent.local_addr().unwrap();
    let took = tokio::spawn(async move {
        let mut open = Vec::new();
        loop {
            let (mut stream, _) = silent.accept().await.unwrap();
            let mut preface = [0; 24];
            stream.read_exact(&mut preface).await.unwrap();
            open.push(stream);
        }
    });
    let absent = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    for (collector, interval, timeout) in [(hanging, "10ms", "1h"), (hanging, "10ms", "50ms"), (absent, "10ms", "10s")] {
        let settings = format!(
            "otlp_endpoint: \"http://{collector}\", sample_ratio: 1, queue_spans: 16, export_interval: {interval}, \
             export_timeout: {timeout}"
        );
        let mut setup = setup(vec![models(401)], &settings, "info", &[]).await;
        for call in 0..200 {
            let response = setup.ask(Request::new(decide(&format!("made-up-{}", call % 20)))).await;
            assert!(!response.decision_id.is_empty());
        }
        let asked = setup.vendor.asked().len();
        assert!(asked >= 20, "{asked}");
        let ended = setup.end().await;
        assert_eq!(events(&ended, "decision").len(), 200);
        // One a minute, and one at the end.
        let lost = events(&ended, "spans_lost");
        assert!(!lost.is_empty() && lost.len() < 20, "{lost:#?}");
        // A call and its cache lookup each, a probe and its request for each question: all lost, each of them counted once.
        assert_eq!(lost.last().unwrap()["total"], 400 + 2 * asked, "{lost:#?}");
    }
    took.abort();
}

/// Spans that are held at the end are sent before it, over TLS too, with the platform's resource attributes.
#[tokio::test]
async fn the_last_spans_are_sent_at_the_end_over_tls() {
    let authority = Authority::new();
    let folder = tempfile::tempdir().unwrap();
    let roots = folder.path().join("ca.pem");
    std::fs::write(&roots, authority.pem()).unwrap();
    for trusted in [true, false] {
        let mut collector = Collector::start_with(&authority.sign(if trusted { "localhost" } else { "other.example" })).await;
        let settings = format!(
            "otlp_endpoint: \"https://localhost:{}\", ca_file: {}, sample_ratio: 1, export_interval: 1h, export_timeout: 500ms",
            collector.address.port(),
            roots.display()
        );
        let names = [("OTEL_SERVICE_NAME", "gate-blue"), ("OTEL_RESOURCE_ATTRIBUTES", "k8s.pod.name=gate-0")];
        let mut setup = setup(vec![models(200)], &settings, "info", &names).await;
        setup.ask(Request::new(decide("made-up-key"))).await;
        let ended = setup.end().await;
        let spans = collector.all();
        assert_eq!((spans.len(), events(&ended, "spans_lost").len()), if trusted { (4, 0) } else { (0, 1) }, "{ended:?}");
        if trusted {
            assert_eq!(collector.resource["service.name"], "gate-blue");
            assert_eq!(collector.resource["k8s.pod.name"], "gate-0");
        }
    }
}

/// An invalid setting ends the start and names the setting, but not the value, which may hold a password.
#[tokio::test]
async fn settings_that_do_not_stand_end_the_start() {
    for (key, value, said) in [
        ("OTLP_ENDPOINT", "collector:4317", "tracing.otlp_endpoint: is not the address of a collector"),
        ("OTLP_ENDPOINT", "grpc://collector:4317", "tracing.otlp_endpoint: is not the address of a collector"),
        ("OTLP_ENDPOINT", "http://collector:4318/v1/traces", "tracing.otlp_endpoint: is not the address of a collector"),
        (
            "OTLP_ENDPOINT",
            "http://user:made-up-canary@collector:4317",
            "tracing.otlp_endpoint: is not the address of a collector",
        ),
        ("SAMPLE_RATIO", "1.5", "tracing.sample_ratio: is 1.5; it must be 0 to 1"),
        ("SAMPLE_RATIO", "-0.1", "tracing.sample_ratio: is -0.1; it must be 0 to 1"),
        ("SAMPLE_RATIO", ".nan", "tracing.sample_ratio"),
        ("EXPORT_TIMEOUT", "0s", "tracing.export_timeout: is 0s; it must be 10ms to"),
        ("EXPORT_INTERVAL", "0s", "tracing.export_interval: is 0s; it must be 10ms to"),
        ("QUEUE_SPANS", "0", "tracing.queue_spans: is 0; it must be 1 to"),
    ] {
        let ended = binary::run(&["serve", "--listen", "127.0.0.1:0"], &[(&format!("BYOK_GATE__TRACING__{key}"), value)]).await;
        assert_eq!(ended.status.code(), Some(3), "{key}={value}: {ended:?}");
        assert!(ended.stderr.contains(said) && !ended.stderr.contains("canary"), "{key}={value}: {}", ended.stderr);
    }
}
