//! Each metric moves with its event, is absent before it, and no caller's name makes a series.

use std::{collections::BTreeSet, fs, sync::Arc, time::Duration};

use byok_gate::{
    core::{
        credential::LivenessQuery,
        engine::{Boxed, Engine, LivenessSource, Observed},
    },
    domain::{request::Checkpoint, verdict::Verdict},
    grpc::convert::{
        self,
        pb::{self, policy_decision_service_client::PolicyDecisionServiceClient},
    },
    liveness::{
        cache::{Cache, CacheSettings},
        new_keys::NewKeyLimits,
        provider_limits::{ProviderLimiter, ProviderLimits},
    },
    server::{Address, Bound},
    telemetry::{log_writer::LogWriter, metrics::decisions::Decisions},
};
use futures_util::StreamExt;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::{Instant, advance, timeout},
};
use tonic::Code;

use crate::{
    isolation::{partly, raw_connection},
    secrets::is_not_in,
    support::{
        binary::{PATIENCE, Serving},
        case,
        edge::{Authority, Edge, Held, decide, grpc, is_allow, raw, settings},
        gate::Files,
        page::{Scraped, Shown, say, scrape, scrape_until},
        prober::Scripted,
        tier::{Replica, Way},
        vendor::{Row, Vendor},
    },
};

const CANARY: &str = "made-up-canary-51d0";
/// Series of a page after any number of tenants: what one provider of the tests' registry can have, and what there is in all.
const BUDGET: usize = 200;

fn files(port: u16, config: Option<&str>) -> Files {
    let (registry, catalogue) = case::documents(port);
    Files::new(&registry, &catalogue, config)
}

/// A vendor that takes one key, and refuses every other.
fn good(key: &str) -> Vec<Row> {
    let models = |key: Option<&str>, status, body: &str| Row {
        path: Some("/acme/v1/models".into()),
        key: key.map(str::to_owned),
        status: Some(status),
        body: body.into(),
        ..Row::default()
    };
    vec![models(Some(key), 200, r#"{"data": []}"#), models(None, 401, r#"{"error": {"code": "invalid_api_key"}}"#)]
}

fn client(channel: tonic::transport::Channel) -> PolicyDecisionServiceClient<tonic::transport::Channel> {
    PolicyDecisionServiceClient::new(channel)
}

/// All names that the pages of all scenarios have, with their types, are those of the documentation: so each is exported, and each
/// is explained. Each scenario checks its own metrics.
#[tokio::test]
async fn every_number_moves_and_is_documented() {
    let mut seen = BTreeSet::new();
    for page in [
        a_decision_and_its_repetition().await,
        a_base_url_that_leads_nowhere().await,
        an_outage().await,
        what_waits_is_seen_waiting().await,
        calls_that_fail().await,
        a_certificate_and_its_end().await,
        a_provider_on_report().await,
        a_panic_of_ours().await,
        files_read_again().await,
        a_task_that_ends().await,
        too_many_connections_and_new_keys().await,
        a_tier_that_is_away().await,
    ] {
        seen.extend(page.families());
    }
    let text = fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/docs/metrics.md")).unwrap();
    let rows = text.lines().filter(|line| line.starts_with("| `")).map(|line| {
        let cells: Vec<&str> = line.split('|').map(str::trim).collect();
        assert_eq!(cells.len(), 7, "{line}");
        assert!(cells[5].len() > 10, "{line}: no meaning");
        let (name, kind) = (cells[1].trim_matches('`'), cells[2]);
        assert_eq!(name.ends_with("_total"), kind == "counter", "{line}");
        (name.trim_end_matches("_total").to_owned(), kind.to_owned())
    });
    assert_eq!(rows.collect::<BTreeSet<_>>(), seen);
}

async fn a_decision_and_its_repetition() -> Scraped {
    let vendor = Vendor::start(good("made-up-key")).await;
    let shown = Shown::start(settings(), &files(vendor.address.port(), None)).await;
    let fresh = shown.scrape().await;
    for absent in [
        "byokgate_decisions",
        "byokgate_verdicts",
        "byokgate_unverified_allows",
        "byokgate_calls_failed",
        "byokgate_breaker_state",
        "byokgate_breaker_open_for_organizations",
        "byokgate_calibration_state",
        "byokgate_calibration_requests",
        "byokgate_no_api_at_base_url",
        "byokgate_decide_duration_seconds",
        "byokgate_probe_duration_seconds",
        "byokgate_probes_in_flight",
        "byokgate_probes_queued",
        "byokgate_provider_not_enforced",
        "byokgate_background_tasks_ended",
    ] {
        assert!(!fresh.has(absent), "{absent} was never measured: {}", fresh.text);
    }
    fresh.is(r#"byokgate_cache_lookups_total{result="hit"}"#, 0.0);
    let mut client = client(shown.edge.plain().await);
    assert!(is_allow(&client.decide(decide("made-up-key")).await.unwrap().into_inner()));
    assert!(is_allow(&client.decide(decide("made-up-key")).await.unwrap().into_inner()));
    assert!(!is_allow(&client.decide(decide("made-up-other")).await.unwrap().into_inner()));
    assert!(!is_allow(&client.decide(decide("")).await.unwrap().into_inner()));
    let mut nowhere = decide("");
    nowhere.workspace_spec.as_mut().unwrap().model = "no-such-model".into();
    assert!(!is_allow(&client.decide(nowhere).await.unwrap().into_inner()));
    // A check of a running workspace, and report-only answers, are counted separately.
    let audit = pb::DecideRequest { checkpoint: pb::Checkpoint::Audit as i32, ..decide("") };
    assert!(!is_allow(&client.decide(audit).await.unwrap().into_inner()));
    for key in ["made-up-key", ""] {
        let reported = pb::DecideRequest { report_only: true, ..decide(key) };
        assert_eq!(is_allow(&client.decide(reported).await.unwrap().into_inner()), !key.is_empty());
    }
    // It is checked in the background that the endpoint refuses made-up keys.
    let page = shown.scrape_until(|page| page.has("byokgate_calibration_state")).await;
    let decisions = |outcome: &str, code: &str, provider: &str| {
        format!(r#"byokgate_decisions_total{{checkpoint="CREATE",outcome="{outcome}",code="{code}",provider="{provider}"}}"#)
    };
    page.is(&decisions("ALLOW", "", "acme"), 2.0);
    page.is(&decisions("DENY", "INVALID_BYOK_CREDENTIAL", "acme"), 1.0);
    page.is(&decisions("DENY", "MISSING_BYOK_CREDENTIAL", "acme"), 1.0);
    page.is(&decisions("DENY", "UNREGISTERED_MODEL_FOR_RUNTIME", ""), 1.0);
    let at = |checkpoint: &str, series: String| series.replace("CREATE", checkpoint);
    page.is(&at("AUDIT", decisions("DENY", "MISSING_BYOK_CREDENTIAL", "acme")), 1.0);
    let reported = |series: String| series.replace("byokgate_decisions", "byokgate_report_only_decisions");
    page.is(&reported(decisions("ALLOW", "", "acme")), 1.0);
    page.is(&reported(decisions("DENY", "MISSING_BYOK_CREDENTIAL", "acme")), 1.0);
    page.is(r#"byokgate_verdicts_total{provider="acme",verdict="VALID",served_from="PROBE"}"#, 1.0);
    page.is(r#"byokgate_verdicts_total{provider="acme",verdict="VALID",served_from="CACHE"}"#, 2.0);
    page.is(r#"byokgate_verdicts_total{provider="acme",verdict="INVALID",served_from="PROBE"}"#, 1.0);
    page.is(r#"byokgate_cache_lookups_total{result="hit"}"#, 2.0);
    page.is(r#"byokgate_cache_lookups_total{result="fill"}"#, 2.0);
    page.is("byokgate_cache_entries", 2.0);
    page.is("byokgate_cache_evictions_total", 0.0);
    page.is(r#"byokgate_decide_duration_seconds_count{provider="acme"}"#, 7.0);
    page.is(r#"byokgate_decide_duration_seconds_count{provider=""}"#, 1.0);
    page.is(r#"byokgate_probe_duration_seconds_count{provider="acme"}"#, 2.0);
    page.is(r#"byokgate_probe_duration_seconds_bucket{le="+Inf",provider="acme"}"#, 2.0);
    page.is(r#"byokgate_probes_in_flight{provider="acme"}"#, 0.0);
    page.is(r#"byokgate_breaker_state{provider="acme"}"#, 0.0);
    let host = vendor.address;
    page.is(&format!(r#"byokgate_calibration_state{{provider="acme",host="{host}",probe="models",header="bearer"}}"#), 0.0);
    page.is(r#"byokgate_calibration_requests_total{provider="acme",header="bearer",result="refused"}"#, 1.0);
    page.is("byokgate_decisions_in_flight", 0.0);
    page.is("byokgate_connections_open", 1.0);
    page.is("byokgate_connections_total", 1.0);
    let snapshot = page.text.lines().filter(|line| line.starts_with("byokgate_documents_info{")).count();
    assert_eq!(snapshot, 1);
    assert!(page.get(r#"byokgate_document_age_seconds{document="registry"}"#).unwrap() > 0.0);
    assert!(page.text.contains(concat!("byokgate_build_info{version=\"", env!("CARGO_PKG_VERSION"), "\"")), "{}", page.text);
    for own in ["start_time_seconds", "resident_memory_bytes", "open_fds", "max_fds", "cpu_seconds_total"] {
        assert!(page.get(&format!("process_{own}")).unwrap() > 0.0, "{own}");
    }
    page
}

/// Every path of a vendor is a page: reported as long as it lasts.
async fn a_base_url_that_leads_nowhere() -> Scraped {
    let page =
        Row { headers: [("content-type".into(), "text/html".into())].into(), body: "<html>app</html>".into(), ..Row::default() };
    let vendor = Vendor::start(vec![page]).await;
    let shown = Shown::start(settings(), &files(vendor.address.port(), None)).await;
    let mut request = decide("made-up-key");
    let spec = request.workspace_spec.as_mut().unwrap();
    spec.model = "loose/m".into();
    spec.credentials[0].env_name = "LOOSE_API_KEY".into();
    assert!(is_allow(&client(shown.edge.plain().await).decide(request).await.unwrap().into_inner()));
    let page = shown.scrape().await;
    page.is(&format!(r#"byokgate_no_api_at_base_url{{provider="loose",host="{}"}}"#, vendor.address), 1.0);
    page.is(r#"byokgate_calibration_requests_total{provider="loose",header="bearer",result="refused_oddly"}"#, 2.0);
    let at = |probe: &str| {
        format!(r#"byokgate_calibration_state{{provider="loose",host="{}",probe="{probe}",header="bearer"}}"#, vendor.address)
    };
    page.is(&at("models"), 3.0);
    page.is(&at("completion"), 3.0);
    page
}

/// Nothing listens at `gone`: five keys open its breaker, and the sixth is told at once. At UPDATE that is allowed, unverified.
async fn an_outage() -> Scraped {
    let shown = Shown::start(settings(), &files(1, None)).await;
    let mut client = client(shown.edge.plain().await);
    for index in 0..6 {
        let mut request = decide("");
        request.checkpoint = pb::Checkpoint::Update as i32;
        let spec = request.workspace_spec.as_mut().unwrap();
        spec.model = "gone/1".into();
        spec.credentials[0].env_name = "GONE_API_KEY".into();
        spec.credentials[0].value = format!("made-up-{index}");
        assert!(is_allow(&client.decide(request).await.unwrap().into_inner()));
    }
    // A subscription is not probed.
    let mut request = decide("made-up-token");
    let spec = request.workspace_spec.as_mut().unwrap();
    spec.model = "sub-1".into();
    spec.credentials[0].env_name = "SUBSCRIPTION_TOKEN".into();
    assert!(is_allow(&client.decide(request).await.unwrap().into_inner()));
    let page = shown.scrape().await;
    page.is(r#"byokgate_verdicts_total{provider="subscription",verdict="NO_SERVER_SURFACE",served_from=""}"#, 1.0);
    page.is(r#"byokgate_unverified_allows_total{provider="subscription",verdict="NO_SERVER_SURFACE"}"#, 1.0);
    page.is(r#"byokgate_breaker_state{provider="gone"}"#, 2.0);
    page.is(r#"byokgate_cache_lookups_total{result="breaker"}"#, 1.0);
    page.is(r#"byokgate_verdicts_total{provider="gone",verdict="UNREACHABLE",served_from="BREAKER"}"#, 1.0);
    page.is(r#"byokgate_unverified_allows_total{provider="gone",verdict="UNREACHABLE"}"#, 6.0);
    assert_eq!(page.get(r#"byokgate_breaker_state{provider="acme"}"#), None, "never touched");
    page
}

/// Nothing listens where the shared tier should be: its faults are counted, and after five it is left alone.
async fn a_tier_that_is_away() -> Scraped {
    let port = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap().port();
    let replica = Replica::new(&Way::to(port), &Scripted::new(Verdict::Valid));
    replica.page().is("byokgate_tier_in_use", 1.0);
    assert!(!replica.page().has("byokgate_tier_duration_seconds"), "nothing was asked");
    for index in 0..6 {
        replica.ask(&format!("made-up-{index}")).await;
    }
    let page = replica.page();
    page.is("byokgate_tier_in_use", 0.0);
    page.is("byokgate_tier_faults_total", 5.0);
    page.is(r#"byokgate_tier_lookups_total{result="fault"}"#, 5.0);
    page.is(r#"byokgate_tier_lookups_total{result="left_alone"}"#, 1.0);
    for none in ["tier_leases_lost", "tier_damaged"] {
        page.is(&format!("byokgate_{none}_total"), 0.0);
    }
    page
}

/// One probe at a time, whose vendor does not answer yet: the first probes, the second waits for it, the third for a turn. Then the
/// third hangs up.
async fn what_waits_is_seen_waiting() -> Scraped {
    let held = Held::new(false);
    let mut settings = settings();
    settings.provider_limits.in_flight = 1;
    let shown = Shown::over(settings, &files(1, None), held.clone(), vec![]).await;
    let channel = shown.edge.plain().await;
    let calls: Vec<_> = ["made-up-1", "made-up-1", "made-up-2"]
        .map(|key| {
            let mut client = client(channel.clone());
            tokio::spawn(async move { client.decide(decide(key)).await })
        })
        .into();
    let page = shown
        .scrape_until(|page| {
            page.get("byokgate_decisions_in_flight") == Some(3.0)
                && page.get(r#"byokgate_probes_queued{provider="acme"}"#) == Some(1.0)
                && page.get(r#"byokgate_cache_lookups_total{result="wait"}"#) == Some(1.0)
        })
        .await;
    page.is(r#"byokgate_probes_in_flight{provider="acme"}"#, 1.0);
    let [first, second, third] = <[_; 3]>::try_from(calls).unwrap();
    third.abort();
    let cancelled = r#"byokgate_calls_failed_total{method="Decide",grpc_code="CANCELLED"}"#;
    shown.scrape_until(|page| page.get(cancelled) == Some(1.0)).await;
    held.open();
    assert!(is_allow(&first.await.unwrap().unwrap().into_inner()) && is_allow(&second.await.unwrap().unwrap().into_inner()));
    shown
        .scrape_until(|page| {
            page.get("byokgate_decisions_in_flight") == Some(0.0)
                && page.get(r#"byokgate_probes_in_flight{provider="acme"}"#) == Some(0.0)
                && page.get(r#"byokgate_probes_queued{provider="acme"}"#) == Some(0.0)
        })
        .await;
    page
}

async fn calls_that_fail() -> Scraped {
    let mut settings = settings();
    settings.limits.batch_items = 2;
    // And a log whose reader has gone.
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let log = LogWriter::to(writer).unwrap();
    let shown = Shown::over(settings, &files(1, None), Held::new(true), vec![Arc::new(log.clone())]).await;
    shown.scrape().await.is("byokgate_log_lines_dropped_total", 0.0);
    log.push(b"a line\n");
    assert!(log.flush(PATIENCE));
    let mut client = client(shown.edge.plain().await);
    let bad = || pb::DecideRequest { checkpoint: 77, ..decide("made-up-key") };
    assert_eq!(client.decide(bad()).await.unwrap_err().code(), Code::InvalidArgument);
    // One item fails, and the batch does not.
    let batch = pb::BatchDecideRequest { requests: vec![bad(), decide("made-up-key")] };
    assert_eq!(client.batch_decide(batch).await.unwrap().into_inner().collect::<Vec<_>>().await.len(), 2);
    // Report-only calls are counted separately, like report-only decisions.
    let only_asked = || pb::DecideRequest { report_only: true, ..bad() };
    assert_eq!(client.decide(only_asked()).await.unwrap_err().code(), Code::InvalidArgument);
    let batch = pb::BatchDecideRequest { requests: vec![only_asked()] };
    assert_eq!(client.batch_decide(batch).await.unwrap().into_inner().collect::<Vec<_>>().await.len(), 1);
    assert!(client.resolve_provider(pb::ResolveProviderRequest { runtime: "r\n".into(), ..Default::default() }).await.is_err());
    let status = client.list_models(pb::ListModelsRequest { runtime: "none".into(), details: false }).await.unwrap_err();
    assert_eq!(status.code(), Code::NotFound);
    let mut sender = raw(shown.edge.tcp()).await;
    for path in [format!("/{CANARY}/Decide"), format!("/byokgate.v1.PolicyDecisionService/{CANARY}")] {
        let code = crate::support::edge::code_of(&mut sender, grpc(&path, &[], b"")).await;
        assert_eq!(code, Code::Unimplemented);
    }
    let page = shown.scrape().await;
    let failed = |method: &str, code: &str| format!(r#"byokgate_calls_failed_total{{method="{method}",grpc_code="{code}"}}"#);
    page.is(&failed("Decide", "INVALID_ARGUMENT"), 1.0);
    page.is(&failed("BatchDecide", "INVALID_ARGUMENT"), 1.0);
    page.is(&failed("ResolveProvider", "INVALID_ARGUMENT"), 1.0);
    page.is(&failed("ListModels", "NOT_FOUND"), 1.0);
    page.is(&failed("other", "UNIMPLEMENTED"), 2.0);
    for method in ["Decide", "BatchDecide"] {
        page.is(&failed(method, "INVALID_ARGUMENT").replace("_calls_failed", "_report_only_calls_failed"), 1.0);
    }
    page.is("byokgate_log_lines_dropped_total", 1.0);
    // A client that leaves while it sends its message is gone; that is not a fault of the service.
    let (mut leaving, socket) = raw_connection(&shown.edge).await;
    let mut answer = std::pin::pin!(leaving.send_request(partly("/byokgate.v1.PolicyDecisionService/Decide", &[], 1000)));
    assert!(futures_util::poll!(&mut answer).is_pending());
    // Answered in order: the first has come too.
    leaving.send_request(partly("/byokgate.v1.PolicyDecisionService/Nothing", &[], 1)).await.unwrap();
    socket.shutdown(std::net::Shutdown::Both).unwrap();
    let page = shown.scrape_until(|page| page.get(&failed("Decide", "CANCELLED")) == Some(1.0)).await;
    assert_eq!(page.get(&failed("Decide", "INTERNAL")), None);
    // A port check, and a client of another protocol.
    drop(TcpStream::connect(shown.edge.tcp()).await.unwrap());
    let mut stranger = TcpStream::connect(shown.edge.tcp()).await.unwrap();
    stranger.write_all(b"GET /metrics HTTP/1.1\r\nhost: gate\r\n\r\n").await.unwrap();
    drop(stranger.read_to_end(&mut Vec::new()).await);
    shown.scrape_until(|page| page.get("byokgate_connections_open") == Some(2.0)).await;
    let page = shown.scrape().await;
    page.is(r#"byokgate_connections_refused_total{reason="handshake"}"#, 1.0);
    page.is(r#"byokgate_handshakes_refused_total{fault="NO_HTTP2"}"#, 1.0);
    page
}

async fn a_certificate_and_its_end() -> Scraped {
    let folder = tempfile::tempdir().unwrap();
    let authority = Authority::new();
    let mut settings = settings();
    settings.admin.listen = Some("127.0.0.1:0".into());
    let put = |name: &str, text: &str| {
        fs::write(folder.path().join(name), text).unwrap();
        Some(folder.path().join(name))
    };
    let server = authority.sign_until("localhost", 2060);
    settings.tls.certificate = put("server.pem", &server.certificate);
    settings.tls.key = put("server.key", &server.key);
    settings.tls.client_ca = put("ca.pem", &authority.pem());
    let bound = Bound::open(settings.edge()).await.unwrap();
    let Some(Address::Tcp(admin)) = bound.admin_address() else { panic!("it shows nothing") };
    let _edge = Edge::run(bound, Held::new(true).engine());
    let page = scrape(admin).await;
    let ends = page.get(r#"byokgate_tls_certificate_expires_seconds{setting="tls.certificate"}"#).unwrap();
    let expect = 2_840_140_800.0 - std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs_f64();
    assert!((ends - expect).abs() < 60.0, "{ends} instead of {expect}");
    assert!(page.get(r#"byokgate_tls_certificate_expires_seconds{setting="tls.client_ca"}"#).unwrap() > 0.0);
    page
}

async fn a_provider_on_report() -> Scraped {
    let config = "providers: {acme: {probe: report, until: 2999-01-01}, beta: {probe: off, until: 2020-01-01}}\n";
    let shown = Shown::over(settings(), &files(1, Some(config)), Held::new(true), vec![]).await;
    let page = shown.scrape().await;
    page.is(r#"byokgate_provider_not_enforced{provider="acme",mode="report"}"#, 1.0);
    let left = page.get(r#"byokgate_provider_not_enforced_remaining_seconds{provider="acme",mode="report"}"#).unwrap();
    assert!(left > 9e9, "{left}");
    assert!(!page.text.contains("beta"), "its date has passed");
    page
}

/// Panics instead of answering.
struct Panics;

impl LivenessSource for Panics {
    fn observe<'a>(&'a self, _: LivenessQuery<'a>, _: Option<Duration>, _: Instant) -> Boxed<'a, Observed> {
        Box::pin(async { panic!("made to panic") })
    }
}

async fn a_panic_of_ours() -> Scraped {
    let scripted = Scripted::new(Verdict::Valid);
    scripted.set(|script| script.panics = true);
    let shown = Shown::over(settings(), &files(1, None), scripted, vec![]).await;
    assert!(!is_allow(&client(shown.edge.plain().await).decide(decide("made-up-key")).await.unwrap().into_inner()));
    let page = shown.scrape().await;
    page.is("byokgate_probes_panicked_total", 1.0);
    page.is("byokgate_decisions_panicked_total", 0.0);
    // And in the decision itself.
    let mut settings = settings();
    settings.admin.listen = Some("127.0.0.1:0".into());
    let bound = Bound::open(settings.edge()).await.unwrap();
    let Some(Address::Tcp(admin)) = bound.admin_address() else { panic!("it shows nothing") };
    let edge = Edge::run(bound, files(1, None).engine_over(Arc::new(Panics)));
    assert_eq!(client(edge.plain().await).decide(decide("made-up-key")).await.unwrap_err().code(), Code::Internal);
    scrape(admin).await.is("byokgate_decisions_panicked_total", 1.0);
    page
}

/// The process itself, with reloads: a registry and a list of tokens become invalid, and are corrected. And its traces reach no
/// collector.
async fn files_read_again() -> Scraped {
    let traced = "tracing: {otlp_endpoint: 'http://127.0.0.1:1', sample_ratio: 1, export_interval: 100ms}\n";
    let config = |overrides: &str| format!("server: {{reload_interval: 100ms}}\n{traced}operator_overrides: {overrides}\n");
    let files = files(1, Some(&config("refuse")));
    let tokens = files.folder().join("tokens");
    fs::write(&tokens, "made-up-token-0001 operator\n").unwrap();
    let flags = files.flags();
    let mut arguments = vec!["--admin-listen", "127.0.0.1:0", "--token-file", tokens.to_str().unwrap()];
    arguments.extend(flags.iter().map(String::as_str));
    let serving = Serving::start(&arguments).await;
    let admin = serving.event("admin_listening")["address"].as_str().unwrap().parse().unwrap();
    let of = |what: &str, result: &str| format!(r#"byokgate_reloads_total{{what="{what}",result="{result}"}}"#);
    let failing = |what: &str| format!(r#"byokgate_reload_failing{{what="{what}"}}"#);
    let until = async |fits: &dyn Fn(&Scraped) -> bool| scrape_until(admin, fits).await;
    let page = scrape(admin).await;
    page.is(&failing("documents"), 0.0);
    page.is(&failing("tokens"), 0.0);
    let registry = files.folder().join("registry.yaml");
    let stands = fs::read_to_string(&registry).unwrap();
    fs::write(&registry, "- no\n").unwrap();
    fs::write(&tokens, "made-up\n").unwrap();
    let page = until(&|page| page.get(&failing("documents")) == Some(1.0) && page.get(&failing("tokens")) == Some(1.0)).await;
    page.is(&of("documents", "failed"), 1.0);
    assert!(page.get(&of("tokens", "failed")).unwrap() >= 1.0);
    let taken = page.get(&of("documents", "taken")).unwrap();
    fs::write(&registry, stands).unwrap();
    fs::write(&tokens, "made-up-token-0002\n").unwrap();
    let page = until(&|page| page.get(&failing("documents")) == Some(0.0) && page.get(&failing("tokens")) == Some(0.0)).await;
    page.is(&of("documents", "taken"), taken + 1.0);
    page.is(&of("tokens", "taken"), 1.0);
    page.is("byokgate_spans_dropped_total", 0.0);
    let mut call = tonic::Request::new(decide("made-up-key"));
    call.metadata_mut().insert("authorization", "Bearer made-up-token-0002".parse().unwrap());
    serving.client().await.decide(call).await.unwrap();
    until(&|page| page.get("byokgate_spans_dropped_total").is_some_and(|lost| lost > 0.0)).await;
    // The other token.
    page.is("byokgate_configuration_loosened_total", 1.0);
    fs::write(files.folder().join("config.yaml"), config("honour")).unwrap();
    until(&|page| page.get("byokgate_configuration_loosened_total") == Some(2.0)).await
}

async fn a_task_that_ends() -> Scraped {
    let mut settings = settings();
    settings.admin.listen = Some("127.0.0.1:0".into());
    // While it still serves metrics.
    settings.shutdown.notice = Duration::from_secs(3600);
    let mut bound = Bound::open(settings.edge()).await.unwrap();
    let Some(Address::Tcp(admin)) = bound.admin_address() else { panic!("it shows nothing") };
    bound.supervise("test", async {});
    let edge = Edge::run(bound, Held::new(true).engine());
    let page = scrape_until(admin, |page| page.get(r#"byokgate_background_tasks_ended_total{task="test"}"#) == Some(1.0)).await;
    drop(edge);
    page
}

async fn too_many_connections_and_new_keys() -> Scraped {
    let mut settings = settings();
    settings.limits.connections = 1;
    settings.new_keys.per_organization = 1.try_into().unwrap();
    let shown = Shown::over(settings, &files(1, None), Held::new(true), vec![]).await;
    // It has sent nothing yet, and leaves.
    let _idle = TcpStream::connect(shown.edge.tcp()).await.unwrap();
    let mut client = client(shown.edge.plain().await);
    for index in 0..3 {
        let mut request = decide(&format!("made-up-{index}"));
        request.workspace_spec.as_mut().unwrap().organization_id = "org-1".into();
        client.decide(request).await.unwrap();
    }
    let mut second = TcpStream::connect(shown.edge.tcp()).await.unwrap();
    drop(second.read_to_end(&mut Vec::new()).await);
    let page = shown.scrape().await;
    page.is(r#"byokgate_new_key_refusals_total{limit="organization"}"#, 2.0);
    page.is(r#"byokgate_new_key_refusals_total{limit="caller"}"#, 0.0);
    page.is(r#"byokgate_cache_lookups_total{result="new_keys"}"#, 2.0);
    page.is(r#"byokgate_connections_refused_total{reason="limit"}"#, 1.0);
    page.is(r#"byokgate_connections_refused_total{reason="handshake"}"#, 0.0);
    page.is("byokgate_connections_made_room_total", 1.0);
    page.is("byokgate_connections_total", 2.0);
    page
}

// === in this process, with time that is moved ===

fn request(workspace: &str, organization: &str, runtime: &str, model: &str, key: &str) -> byok_gate::domain::request::Request {
    let mut message = decide(key);
    let spec = message.workspace_spec.as_mut().unwrap();
    spec.workspace_id = workspace.into();
    spec.organization_id = organization.into();
    spec.runtime = runtime.into();
    spec.model = model.into();
    convert::request(message).unwrap()
}

async fn made(engine: &Engine, decisions: &Decisions, request: &byok_gate::domain::request::Request) {
    let began = Instant::now();
    let decided = engine.decide(request, began + Duration::from_secs(5)).await;
    decisions.made(request, &decided.decision, began.elapsed());
}

/// A silent vendor at PROVISION, and a breaker's trial.
#[tokio::test(start_paused = true)]
async fn an_earlier_valid_and_a_trial_are_seen() {
    let scripted = Scripted::new(Verdict::Valid);
    let cache = Arc::new(Cache::new(scripted.clone(), CacheSettings::default()));
    let engine = files(1, None).engine_over(cache.clone());
    let decisions = Decisions::default();
    let requests: Vec<_> = ["org-1", "org-2", "org-3"]
        .map(|organization| {
            let mut request = request("ws", organization, "agent", "acme-large", organization);
            request.checkpoint = Checkpoint::Provision;
            request
        })
        .into();
    for request in &requests {
        made(&engine, &decisions, request).await;
    }
    scripted.verdict(Verdict::Timeout);
    for request in requests.iter().cycle().take(5) {
        advance(Duration::from_secs(31)).await;
        made(&engine, &decisions, request).await;
    }
    let request = &requests[0];
    let page = Scraped::in_process(&engine, &[&decisions, &*cache]);
    page.is(r#"byokgate_verdicts_total{provider="acme",verdict="VALID",served_from="STALE"}"#, 5.0);
    page.is(r#"byokgate_unverified_allows_total{provider="acme",verdict="TIMEOUT"}"#, 5.0);
    page.is(r#"byokgate_breaker_state{provider="acme"}"#, 2.0);
    // A trial that takes its time.
    advance(Duration::from_secs(31)).await;
    Scraped::in_process(&engine, &[&*cache]).is(r#"byokgate_breaker_state{provider="acme"}"#, 1.0);
    scripted.set(|script| script.takes = Duration::from_secs(3));
    let trial = made(&engine, &decisions, request);
    tokio::pin!(trial);
    tokio::select! {
        biased;
        () = &mut trial => panic!("it takes 3 s"),
        () = tokio::task::yield_now() => {}
    }
    Scraped::in_process(&engine, &[&*cache]).is(r#"byokgate_breaker_state{provider="acme"}"#, 1.0);
    scripted.verdict(Verdict::Valid);
    trial.await;
    advance(Duration::from_secs(61)).await;
    made(&engine, &decisions, request).await;
    Scraped::in_process(&engine, &[&*cache]).is(r#"byokgate_breaker_state{provider="acme"}"#, 0.0);
}

/// 100,000 workspaces, as many organizations, models and runtimes, and providers' names that a registry no longer has.
#[tokio::test(start_paused = true)]
async fn series_do_not_grow_with_tenants() {
    let many = 1_000_000.try_into().unwrap();
    let limited =
        Arc::new(ProviderLimiter::new(Scripted::new(Verdict::Valid), ProviderLimits { per_second: many, ..Default::default() }));
    let new_keys = NewKeyLimits { per_organization: many, per_caller: many, per_platform: many };
    let cache = Arc::new(Cache::new(limited.clone(), CacheSettings { new_keys, ..CacheSettings::default() }));
    let engine = files(1, None).engine_over(cache.clone());
    let decisions = Decisions::default();
    let page = || Scraped::in_process(&engine, &[&decisions, &*cache, &*limited]);
    for index in 0..100_000_u32 {
        let (workspace, organization) = (format!("ws-{index}"), format!("org-{index}"));
        let request = match index % 4 {
            0 => request(&workspace, &organization, &format!("runtime-{index}"), "acme-large", "made-up-key"),
            1 => request(&workspace, &organization, "agent", &format!("model-{index}"), "made-up-key"),
            2 => request(&workspace, &organization, "agent", &format!("acme:{index}"), "made-up-key"),
            _ => request(&workspace, &organization, "agent", "acme-large", &format!("made-up-{}", index % 1_000)),
        };
        made(&engine, &decisions, &request).await;
    }
    let full = page();
    let all: f64 = full
        .text
        .lines()
        .filter(|line| line.starts_with("byokgate_decisions_total"))
        .filter_map(|line| full.get(line.rsplit_once(' ')?.0))
        .sum();
    assert_eq!(all, 100_000.0);
    assert!(full.len() <= BUDGET, "{} series: {}", full.len(), full.text);
    for name in ["ws-", "org-", "runtime-", "model-", "acme:"] {
        assert!(!full.text.contains(name), "{name}");
    }
    // A registry without that provider.
    let (registry, catalogue) = case::documents(1);
    let renamed = Files::new(&registry.replace("acme", "acne"), &catalogue, None).engine().snapshot();
    engine.swap((*renamed).clone());
    assert!(!page().text.contains("acme"), "{}", page().text);
}

// === over HTTP ===

/// Credentials, and names that look like one, in every field that a caller fills.
#[tokio::test]
async fn no_callers_word_is_on_the_page() {
    let vendor = Vendor::start(good(CANARY)).await;
    let shown = Shown::start(settings(), &files(vendor.address.port(), None)).await;
    let mut client = client(shown.edge.plain().await);
    type Change = fn(&mut pb::WorkspaceSpec);
    let changes: [Change; 8] = [
        |_| {},
        |spec| spec.workspace_id = CANARY.into(),
        |spec| spec.organization_id = CANARY.into(),
        |spec| spec.runtime = CANARY.into(),
        |spec| spec.model = CANARY.into(),
        |spec| spec.model = format!("acme:{CANARY}"),
        |spec| spec.credentials[0].value = format!("{CANARY}-wrong"),
        |spec| spec.tenant_base_url_env = vec![CANARY.replace('-', "_")],
    ];
    for change in changes {
        let mut request = decide(CANARY);
        change(request.workspace_spec.as_mut().unwrap());
        client.decide(request).await.unwrap();
    }
    assert!(vendor.asked_with(CANARY) > 0);
    let page = shown.scrape_until(|page| page.has("byokgate_calibration_state")).await;
    for word in [CANARY, &CANARY.replace('-', "_")] {
        is_not_in(&page.text, word, "the page");
    }
}

#[tokio::test]
async fn few_paths_two_methods_and_no_body() {
    let shown = Shown::over(settings(), &files(1, None), Held::new(true), vec![]).await;
    let say = |words: &'static str| say(shown.admin, words);
    let page = say("GET /metrics HTTP/1.1\r\nhost: gate\r\n\r\n").await;
    assert_eq!(page.status, 200);
    assert!(page.head.contains("content-type: application/openmetrics-text; version=1.0.0; charset=utf-8"), "{}", page.head);
    assert!(page.head.contains("connection: close"), "{}", page.head);
    let with_query = say("GET /metrics?x=1 HTTP/1.0\r\n\r\n").await;
    assert_eq!(with_query.status, 200);
    let head = say("HEAD /metrics HTTP/1.1\r\nhost: gate\r\n\r\n").await;
    assert_eq!((head.status, head.body.as_str()), (200, ""));
    for (words, status, said) in [
        ("GET / HTTP/1.1\r\nhost: gate\r\n\r\n", 302, "see /status"),
        ("GET /nothing HTTP/1.1\r\nhost: gate\r\n\r\n", 404, "here are /status"),
        ("GET /healthz HTTP/1.1\r\nhost: gate\r\n\r\n", 404, "health is gRPC's own service"),
        ("POST /metrics HTTP/1.1\r\nhost: gate\r\ncontent-length: 0\r\n\r\n", 405, "only GET and HEAD"),
        ("DELETE /metrics HTTP/1.1\r\nhost: gate\r\n\r\n", 405, "only GET and HEAD"),
        ("GET /metrics HTTP/1.1\r\nhost: gate\r\ncontent-length: 5\r\n\r\nhello", 413, "no body"),
        ("GET /metrics HTTP/1.1\r\nhost: gate\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n", 413, "no body"),
    ] {
        let answer = say(words).await;
        assert_eq!(answer.status, status, "{words:?}: {answer:?}");
        assert!(answer.body.contains(said), "{answer:?}");
    }
    let long: &'static str = format!("GET /metrics HTTP/1.1\r\nx: {}\r\n\r\n", "y".repeat(20_000)).leak();
    assert_eq!(say(long).await.status, 431);
}

/// Scrapers that hang, many more than the limit: each of them gives way to the next, and one that asks is answered; decisions go on.
#[tokio::test]
async fn scrapers_that_hang_keep_nobody_from_a_decision_or_a_page() {
    let shown = Shown::over(settings(), &files(1, None), Held::new(true), vec![]).await;
    let mut hanging = Vec::new();
    for _ in 0..40 {
        let mut stream = TcpStream::connect(shown.admin).await.unwrap();
        // One that gave way already cannot be written to.
        drop(stream.write_all(b"GET /metrics HT").await);
        hanging.push(stream);
    }
    shown.scrape().await;
    assert!(is_allow(&client(shown.edge.plain().await).decide(decide("made-up-key")).await.unwrap().into_inner()));
    // The first ones were closed, and the last ones are open: the scrape took the place of one of eight.
    let mut last = hanging.split_off(33);
    for mut stream in hanging {
        let closed = timeout(PATIENCE, stream.read(&mut [0])).await.unwrap();
        assert!(matches!(closed, Ok(0) | Err(_)), "{closed:?}");
    }
    for stream in &mut last {
        stream.write_all(b"TP/1.1\r\nhost: gate\r\n\r\n").await.unwrap();
        let mut said = String::new();
        stream.read_to_string(&mut said).await.unwrap();
        assert!(said.starts_with("HTTP/1.1 200"), "{said}");
    }
}

/// The real process: scraped over TCP and over a socket file, and an address that cannot be is told by its setting's name.
#[tokio::test]
async fn a_process_shows_its_numbers_where_it_is_told_to() {
    let vendor = Vendor::start(good("made-up-key")).await;
    let files = files(vendor.address.port(), None);
    let flags = files.flags();
    let socket = files.folder().join("admin.sock");
    for address in ["127.0.0.1:0".to_owned(), format!("unix:{}", socket.display())] {
        let mut arguments = vec!["--admin-listen", &address];
        arguments.extend(flags.iter().map(String::as_str));
        let serving = Serving::start(&arguments).await;
        assert!(is_allow(&serving.client().await.decide(decide("made-up-key")).await.unwrap().into_inner()));
        let listening = serving.event("admin_listening")["address"].as_str().unwrap().to_owned();
        let page = match listening.strip_prefix("unix:") {
            None => scrape(listening.parse().unwrap()).await,
            Some(path) => {
                let mut stream = tokio::net::UnixStream::connect(path).await.unwrap();
                stream.write_all(b"GET /metrics HTTP/1.1\r\nhost: gate\r\n\r\n").await.unwrap();
                let mut said = String::new();
                stream.read_to_string(&mut said).await.unwrap();
                Scraped::of(said.split_once("\r\n\r\n").unwrap().1)
            }
        };
        page.is(r#"byokgate_decisions_total{checkpoint="CREATE",outcome="ALLOW",code="",provider="acme"}"#, 1.0);
        assert!(page.has("byokgate_probe_duration_seconds") && page.has("byokgate_breaker_state"), "{}", page.text);
        serving.terminate().await;
        assert!(serving.ended().await.status.success());
    }
    let ended = crate::support::binary::run(&["serve", "--listen", "127.0.0.1:0", "--admin-listen", "localhost"], &[]).await;
    assert_eq!(ended.status.code(), Some(2), "{ended:?}");
    assert!(ended.stderr.contains("admin.listen: `localhost`"), "{ended:?}");
}
