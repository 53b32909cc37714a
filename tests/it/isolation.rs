//! One caller must not affect another: each attack here once did.

use std::{collections::BTreeMap, fs, num::NonZeroU32, process::Command, sync::Arc, time::Duration};

use byok_gate::{
    config::settings::Settings,
    core::{
        classify::Finding,
        engine::{Boxed, Engine, ProbeRequest, Prober},
    },
    domain::verdict::Verdict,
    grpc::convert::{
        self,
        pb::{self, policy_decision_service_client::PolicyDecisionServiceClient},
    },
    liveness::{
        cache::{Cache, CacheSettings},
        new_keys::NewKeyLimits,
        provider_limits::{ProviderLimiter, ProviderLimits},
    },
    server::{
        Bound,
        settings::{CallerList, RoleWord, UnixCaller},
    },
};
use futures_util::StreamExt;
use hyper_util::rt::{TokioExecutor, TokioIo};
use prost::Message;
use tempfile::TempDir;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    task::JoinSet,
    time::{Instant, advance, sleep, timeout},
};
use tonic::{Code, Request, Status, transport::Channel};
use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};
use tonic_types::StatusExt;

use crate::support::{
    binary::{PATIENCE, Serving, run},
    case::{self, Spec},
    edge::{Authority, Edge, Held, code_of, decide, grpc, is_allow, raw, settings, tls_channel, tls_client},
    gate::Files,
    page::Shown,
    prober::Scripted,
    vendor::{Row, Vendor},
};

const DECIDE: &str = "/byokgate.v1.PolicyDecisionService/Decide";
const BATCH: &str = "/byokgate.v1.PolicyDecisionService/BatchDecide";
const CHECK: &str = "/grpc.health.v1.Health/Check";
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";

fn client(channel: Channel) -> PolicyDecisionServiceClient<Channel> {
    PolicyDecisionServiceClient::new(channel)
}

/// Which limit was reached.
fn limit(status: &Status) -> String {
    assert_eq!(status.code(), Code::ResourceExhausted, "{status:?}");
    let details = status.get_error_details();
    assert!(details.retry_info().unwrap().retry_delay.unwrap() > Duration::ZERO);
    details.quota_failure().unwrap().violations[0].subject.clone()
}

/// A request for this model, with a key of its vendor.
fn about(model: &str, env_name: &str, key: &str) -> pb::DecideRequest {
    let workspace = BTreeMap::from([(env_name.to_owned(), Some(key.to_owned()))]);
    let spec = Spec { model: model.into(), workspace, ..Spec::default() };
    pb::DecideRequest { workspace_spec: Some(spec.message()), checkpoint: pb::Checkpoint::Create as i32, ..Default::default() }
}

async fn until(what: &str, mut fits: impl FnMut() -> bool) {
    let waiting = timeout(PATIENCE, async {
        while !fits() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    });
    waiting.await.unwrap_or_else(|_| panic!("{what}"));
}

// === places ===

/// A hanging vendor takes only its share of the slots; calls for other vendors, and calls without a probe, go on.
#[tokio::test]
async fn a_vendor_that_hangs_takes_no_more_than_its_share() {
    let held = Held::new(false);
    let mut settings = settings();
    settings.limits.decisions = 16;
    settings.limits.decisions_per_provider = 4;
    settings.limits.decisions_waiting = 2;
    // The four that are held have to outlast the rest, however slow the machine is.
    settings.deadlines.decide = Duration::from_secs(600);
    let edge = Edge::start(settings, held.engine()).await;
    let client = client(edge.plain().await);
    let mut calls = JoinSet::new();
    for index in 0..1400 {
        let mut client = client.clone();
        calls.spawn(async move { client.decide(decide(&format!("made-up-key-{index}"))).await });
    }
    for _ in 0..1396 {
        let status = calls.join_next().await.unwrap().unwrap().unwrap_err();
        assert_eq!(limit(&status), "limits.decisions_per_provider");
    }
    assert_eq!(held.asked(), 4);
    // The platform's own model needs no probe, nor does a missing credential.
    let mut other = client.clone();
    assert!(is_allow(&other.decide(about("platform-small", "ACME_API_KEY", "made-up")).await.unwrap().into_inner()));
    assert!(!is_allow(&other.decide(about("acme-large", "OTHER", "made-up")).await.unwrap().into_inner()));
    let of_another = tokio::spawn(async move { other.decide(about("beta-1", "BETA_API_KEY", "made-up")).await });
    until("another vendor is asked", || held.asked() == 5).await;
    held.open();
    assert!(is_allow(&of_another.await.unwrap().unwrap().into_inner()));
    while let Some(call) = calls.join_next().await {
        assert!(is_allow(&call.unwrap().unwrap().into_inner()));
    }
}

/// Batches with unread results end at their deadline, and hold nothing after it.
#[tokio::test]
async fn a_batch_that_nobody_reads_holds_no_place_after_its_deadline() {
    let (registry, catalogue) = case::documents(1);
    let files = Files::new(&registry, &catalogue, None);
    let mut settings = settings();
    settings.deadlines.batch = Duration::from_millis(400);
    settings.deadlines.decide = Duration::from_millis(400);
    let scripted = Scripted::new(Verdict::Valid);
    scripted.set(|script| script.takes = Duration::from_millis(100));
    let shown = Shown::over(settings, &files, scripted.clone(), vec![]).await;
    // A window in which not even one result has room.
    let stream = TcpStream::connect(shown.edge.tcp()).await.unwrap();
    let mut http = hyper::client::conn::http2::Builder::new(hyper_util::rt::TokioExecutor::new());
    http.initial_stream_window_size(1).initial_connection_window_size(65_535);
    let (mut sender, connection) =
        http.handshake::<_, http_body_util::Full<bytes::Bytes>>(hyper_util::rt::TokioIo::new(stream)).await.unwrap();
    tokio::spawn(connection);
    let mut unread = Vec::new();
    for batch in 0..34 {
        let requests = (0..8).map(|item| decide(&format!("made-up-key-{batch}-{item}"))).collect();
        let message = pb::BatchDecideRequest { requests }.encode_to_vec();
        let response = sender.send_request(grpc(BATCH, &[], &message)).await.unwrap();
        unread.push(response.into_body());
    }
    until("they are under way", || scripted.asked() > 0).await;
    let page = timeout(PATIENCE, async {
        loop {
            let page = shown.scrape().await;
            if page.get("byokgate_decisions_in_flight") == Some(0.0) {
                break page;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    });
    page.await.unwrap_or_else(|_| panic!("places are held after the deadline"));
    drop(unread);
    assert!(is_allow(
        &client(shown.edge.plain().await).decide(about("platform-small", "ACME_API_KEY", "made-up")).await.unwrap().into_inner()
    ));
}

/// A client whose calls all reach their deadline at once resets their streams together. That is not an attack.
#[tokio::test]
async fn a_thousand_deadlines_at_once_keep_the_connection() {
    let edge = Edge::start(settings(), Held::new(true).engine()).await;
    let mut stream = TcpStream::connect(edge.tcp()).await.unwrap();
    let mut frames = PREFACE.to_vec();
    for stream in (1_u32..2000).step_by(2) {
        // HEADERS (`:method POST`, `:path /`, `:scheme http`) and RST_STREAM (CANCEL) behind it: read together, none was looked at.
        frames.extend([0, 0, 3, 1, 4]);
        frames.extend(stream.to_be_bytes());
        frames.extend([0x83, 0x84, 0x86, 0, 0, 4, 3, 0]);
        frames.extend(stream.to_be_bytes());
        frames.extend([0, 0, 0, 8]);
    }
    const PING: &[u8] = b"\0\0\x08\x06\0\0\0\0\0made up!";
    frames.extend(PING);
    stream.write_all(&frames).await.unwrap();
    let answered = timeout(PATIENCE, async {
        loop {
            let mut head = [0; 9];
            stream.read_exact(&mut head).await.unwrap();
            let mut payload = vec![0; u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize];
            stream.read_exact(&mut payload).await.unwrap();
            match head[3] {
                6 => break payload,
                7 => panic!("GOAWAY: {}", String::from_utf8_lossy(&payload)),
                _ => {}
            }
        }
    });
    assert_eq!(answered.await.unwrap(), b"made up!");
}

// === peers without a name ===

/// Settings by which the platform has a token, so that others are unknown.
fn with_a_token() -> (TempDir, Settings) {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("tokens");
    fs::write(&file, "made-up-token-of-the-platform\n").unwrap();
    let mut settings = settings();
    settings.callers.token_file = Some(file);
    (folder, settings)
}

/// Health has no token, and so a limit of its own and a deadline as any call.
#[tokio::test]
async fn unfinished_health_checks_are_few_and_end() {
    let (_folder, mut settings) = with_a_token();
    settings.limits.unknown_calls = 4;
    settings.deadlines.decide = Duration::from_millis(500);
    let edge = Edge::start(settings, Held::new(true).engine()).await;
    let mut sender = raw_streaming(&edge).await;
    let mut open = Vec::new();
    for _ in 0..4 {
        open.push(tokio::spawn(sender.send_request(unfinished(CHECK, &[]))));
    }
    // The fifth is refused at once; the known platform is not affected.
    let refused = sender.send_request(unfinished(CHECK, &[])).await.unwrap();
    let refused = Status::from_header_map(refused.headers()).unwrap();
    assert_eq!(limit(&refused), "limits.unknown_calls");
    let mut known = Request::new(decide("made-up-key"));
    known.metadata_mut().insert("authorization", "Bearer made-up-token-of-the-platform".parse().unwrap());
    assert!(is_allow(&client(edge.plain().await).decide(known).await.unwrap().into_inner()));
    for call in open {
        let response = call.await.unwrap().unwrap();
        assert_eq!(Status::from_header_map(response.headers()).unwrap().code(), Code::DeadlineExceeded);
    }
    HealthClient::new(edge.plain().await).check(HealthCheckRequest::default()).await.unwrap();
}

/// A health check whose answer nobody reads keeps its place: otherwise unread answers would fill the memory.
#[tokio::test]
async fn unread_answers_to_unknown_callers_are_few() {
    let (_folder, mut settings) = with_a_token();
    settings.limits.unknown_calls = 2;
    let edge = Edge::start(settings, Held::new(true).engine()).await;
    let stream = TcpStream::connect(edge.tcp()).await.unwrap();
    let mut builder = hyper::client::conn::http2::Builder::new(TokioExecutor::new());
    let (mut deaf, connection) = builder.initial_stream_window_size(0).handshake(TokioIo::new(stream)).await.unwrap();
    tokio::spawn(connection);
    let mut unread = Vec::new();
    for _ in 0..2 {
        let response = deaf.send_request(grpc(CHECK, &[], &[])).await.unwrap();
        assert!(Status::from_header_map(response.headers()).is_none(), "{response:?}");
        unread.push(response);
    }
    let mut other = raw(edge.tcp()).await;
    assert_eq!(code_of(&mut other, grpc(CHECK, &[], &[])).await, Code::ResourceExhausted);
    // Places come back.
    drop(unread);
    while code_of(&mut other, grpc(CHECK, &[], &[])).await != Code::Ok {
        tokio::task::yield_now().await;
    }
}

/// An operator, who may only ask, cannot fill the memory with answers that nobody reads, nor keep a platform from its own.
#[tokio::test]
async fn unread_answers_are_limited_over_all_connections() {
    const TOKENS: [&str; 2] = ["made-up-token-of-the-platform", "made-up-token-of-an-operator"];
    const REFLECTION: &str = "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo";
    const SERVICE: &str = "/byokgate.v1.PolicyDecisionService";
    let (folder, mut settings) = with_a_token();
    settings.limits.answer_bytes = 128 * 1024;
    fs::write(folder.path().join("tokens"), format!("{}\n{} operator\n", TOKENS[0], TOKENS[1])).unwrap();
    let edge = Edge::start(settings, Held::new(true).engine()).await;
    let [platform, operator] = TOKENS.map(|token| format!("Bearer {token}"));
    let question = pb::ListModelsRequest { details: true, ..Default::default() }.encode_to_vec();
    for (path, question) in [
        (format!("{SERVICE}/ListModels"), question),
        (format!("{SERVICE}/GetRegistryStatus"), vec![]),
        // `list_services` with an empty text.
        (REFLECTION.into(), vec![0x3a, 0]),
    ] {
        let ask = |bearer: &str| grpc(&path, &[("authorization", bearer)], &question);
        let stream = TcpStream::connect(edge.tcp()).await.unwrap();
        let mut builder = hyper::client::conn::http2::Builder::new(TokioExecutor::new());
        let (mut deaf, connection) = builder.initial_stream_window_size(0).handshake(TokioIo::new(stream)).await.unwrap();
        tokio::spawn(connection);
        let mut unread = Vec::new();
        let refused = loop {
            assert!(unread.len() < 1_000, "{path}");
            let response = deaf.send_request(ask(&operator)).await.unwrap();
            match Status::from_header_map(response.headers()) {
                None => unread.push(response),
                Some(status) => break status,
            }
        };
        assert_eq!((refused.code(), limit(&refused).as_str()), (Code::ResourceExhausted, "limits.answer_bytes"), "{path}");
        let mut other = raw(edge.tcp()).await;
        assert_eq!(code_of(&mut other, ask(&operator)).await, Code::ResourceExhausted, "{path}");
        assert_eq!(code_of(&mut other, ask(&platform)).await, Code::Ok, "{path}");
        // The places come back.
        drop(unread);
        while code_of(&mut other, ask(&operator)).await != Code::Ok {
            tokio::task::yield_now().await;
        }
    }
}

/// Bytes being read have one limit over all calls, and a far lower one for unknown callers.
#[tokio::test]
async fn bytes_that_are_being_read_are_limited_over_all_connections() {
    let (_folder, mut settings) = with_a_token();
    settings.limits.message_bytes = 64 * 1024;
    settings.limits.batch_message_bytes = 64 * 1024;
    settings.limits.request_bytes = 128 * 1024;
    let edge = Edge::start(settings, Held::new(true).engine()).await;
    const TOKEN: [(&str, &str); 1] = [("authorization", "Bearer made-up-token-of-the-platform")];
    for (path, headers, enough) in [(CHECK, &[][..], 1), (DECIDE, &TOKEN[..], 4)] {
        let mut answers = JoinSet::new();
        for _ in 0..8 {
            let mut sender = raw_streaming(&edge).await;
            answers.spawn(async move { sender.send_request(partly(path, headers, 30_000)).await.unwrap() });
        }
        for _ in 0..8 - enough {
            let refused = answers.join_next().await.unwrap().unwrap();
            let refused = Status::from_header_map(refused.headers()).unwrap();
            assert_eq!(limit(&refused), "limits.request_bytes", "{path}");
        }
    }
    // Bytes of abandoned calls are released.
    let mut known = Request::new(decide("made-up-key"));
    known.metadata_mut().insert("authorization", TOKEN[0].1.parse().unwrap());
    assert!(is_allow(&client(edge.plain().await).decide(known).await.unwrap().into_inner()));
}

#[tokio::test]
async fn health_watches_are_few_and_their_places_come_back() {
    let mut settings = settings();
    settings.limits.watches = 2;
    let edge = Edge::start(settings, Held::new(true).engine()).await;
    let channel = edge.plain().await;
    let watch = || HealthClient::new(channel.clone()).watch_owned();
    let mut first = watch().await.unwrap();
    let second = watch().await.unwrap();
    assert_eq!(limit(&watch().await.unwrap_err()), "limits.watches");
    assert_eq!(first.next().await.unwrap().unwrap().status, 1, "it goes on");
    HealthClient::new(channel.clone()).check(HealthCheckRequest::default()).await.unwrap();
    drop(second);
    let again = timeout(PATIENCE, async {
        loop {
            match watch().await {
                Ok(_) => break,
                Err(status) => assert_eq!(limit(&status), "limits.watches"),
            }
        }
    });
    again.await.unwrap();
}

/// Connections that send nothing, or half a preface, make room for those of callers.
#[tokio::test]
async fn idle_connections_make_room_for_the_platforms() {
    let mut settings = settings();
    settings.limits.connections = 8;
    settings.deadlines.handshake = Duration::from_secs(60);
    let edge = Edge::start(settings, Held::new(true).engine()).await;
    let mut idle = Vec::new();
    for index in 0..30 {
        let mut stream = TcpStream::connect(edge.tcp()).await.unwrap();
        if index % 2 == 0 {
            stream.write_all(&PREFACE[..10]).await.unwrap();
        } else {
            stream.write_all(PREFACE).await.unwrap();
        }
        idle.push(stream);
    }
    let mut platform = client(edge.plain().await);
    assert!(is_allow(&platform.decide(decide("made-up-key")).await.unwrap().into_inner()));
    // More of them do not push out known callers.
    let held = raw(edge.tcp()).await;
    for _ in 0..30 {
        idle.push(TcpStream::connect(edge.tcp()).await.unwrap());
    }
    assert!(is_allow(&platform.decide(decide("made-up-key")).await.unwrap().into_inner()));
    drop(held);
}

/// Idle connections are closed, and so are old ones: both get a GOAWAY, and calls in flight finish.
#[tokio::test]
async fn idle_and_old_connections_end() {
    let mut settings = settings();
    settings.server.max_connection_idle = Duration::from_secs(1);
    let held = Held::new(true);
    let edge = Edge::start(settings.clone(), held.engine()).await;
    let sender = raw(edge.tcp()).await;
    until("an idle connection stays", || sender.is_closed()).await;
    settings.server.max_connection_idle = Duration::from_secs(3600);
    settings.server.max_connection_age = Duration::from_secs(1);
    let held = Held::new(false);
    let edge = Edge::start(settings, held.engine()).await;
    let mut sender = raw(edge.tcp()).await;
    let under_way = tokio::spawn(sender.send_request(grpc(DECIDE, &[], &decide("made-up-key").encode_to_vec())));
    let mut other = client(edge.plain().await);
    assert!(other.get_registry_status(pb::GetRegistryStatusRequest {}).await.is_ok());
    until("an old connection takes further calls", || sender.is_closed() || !sender.is_ready()).await;
    held.open();
    assert_eq!(under_way.await.unwrap().unwrap().status(), 200);
    until("an old connection stays", || sender.is_closed()).await;
    // A client that knows GOAWAY has not noticed.
    assert!(other.get_registry_status(pb::GetRegistryStatusRequest {}).await.is_ok());
}

// === callers that are taken off the list ===

/// The next call of a caller that was removed from the list is refused, on its open connection.
#[tokio::test]
async fn a_standing_connection_outlives_no_caller() {
    let folder = tempfile::tempdir().unwrap();
    let authority = Authority::new();
    let put = |name: &str, text: &str| {
        let path = folder.path().join(name);
        fs::write(&path, text).unwrap();
        path
    };
    // By certificate.
    let server = authority.sign("localhost");
    let mut settings = settings();
    settings.tls.certificate = Some(put("certificate.pem", &server.certificate));
    settings.tls.key = Some(put("key.pem", &server.key));
    settings.tls.client_ca = Some(put("ca.pem", &authority.pem()));
    let of = |text: &str| serde_json::from_value(serde_json::json!([{"san": text}])).unwrap();
    settings.callers.certificates = of("spiffe://example.org/platform");
    let bound = Bound::open(settings.edge()).await.unwrap();
    let replace_callers = bound.replace_callers();
    let edge = Edge::run(bound, Held::new(true).engine());
    let own = authority.sign("spiffe://example.org/platform");
    let connector = tls_client(&authority, Some(&own), &[&rustls::version::TLS13]);
    let mut standing = client(tls_channel(edge.tcp(), &connector).await.unwrap());
    assert!(standing.decide(decide("made-up-key")).await.is_ok());
    settings.callers.certificates = of("spiffe://example.org/other");
    replace_callers(&settings.callers);
    assert_eq!(standing.decide(decide("made-up-key")).await.unwrap_err().code(), Code::PermissionDenied);
    // By its user id, on a socket.
    let mut settings = crate::support::edge::settings();
    settings.server.listen = vec![format!("unix:{}/gate.sock", folder.path().display())];
    let bound = Bound::open(settings.edge()).await.unwrap();
    let replace_callers = bound.replace_callers();
    let edge = Edge::run(bound, Held::new(true).engine());
    let mut standing = client(edge.over_unix().await);
    assert!(standing.decide(decide("made-up-key")).await.is_ok());
    let other = UnixCaller { uid: Some(u32::MAX - 7), gid: None, role: RoleWord::Platform, workspaces: Default::default() };
    settings.callers.unix_peers = CallerList::Only(vec![other]);
    replace_callers(&settings.callers);
    assert_eq!(standing.decide(decide("made-up-key")).await.unwrap_err().code(), Code::PermissionDenied);
}

/// A truncated configuration lets nobody in; only the word `anyone` does, and that is logged.
#[tokio::test]
async fn an_emptied_configuration_opens_nothing() {
    let (registry, catalogue) = case::documents(1);
    let nobody = "callers: {unix_peers: [{uid: 4294967288}]}\noperator_overrides: refuse\n";
    let files = Files::new(&registry, &catalogue, Some(nobody));
    let socket = files.folder().join("gate.sock");
    let address = format!("unix:{}", socket.display());
    let flags = files.flags();
    let arguments: Vec<&str> = ["--listen", &address].into_iter().chain(flags.iter().map(String::as_str)).collect();
    let serving = Serving::start(&arguments).await;
    let config = files.folder().join("config.yaml");
    let standing = tonic::transport::Endpoint::from_shared(address.clone()).unwrap().connect().await.unwrap();
    let ask = async || client(standing.clone()).decide(decide("made-up-key")).await.map_err(|status| status.code());
    assert_eq!(ask().await.unwrap_err(), Code::PermissionDenied);
    fs::write(&config, "").unwrap();
    assert!(serving.until("reload_failed").await["fault"].as_str().unwrap().contains("is empty"), "emptied in place");
    assert_eq!(ask().await.unwrap_err(), Code::PermissionDenied);
    // Truncated after its first line.
    fs::write(&config, "operator_overrides: refuse\n").unwrap();
    let faults = |said: &str| said.contains("callers.unix_peers") && said.contains("anyone");
    serving.until_fits("the list is missed", |event| event["event"] == "reload_failed" && faults(&event.to_string())).await;
    assert_eq!(ask().await.unwrap_err(), Code::PermissionDenied);
    // Intended, and logged.
    fs::write(&config, "callers: {unix_peers: anyone}\n").unwrap();
    let is_loosened = |setting: &'static str| {
        move |event: &serde_json::Value| {
            event["event"] == "configuration_loosened" && event["level"] == "WARN" && event["setting"] == setting
        }
    };
    serving.until_fits("callers", is_loosened("callers.unix_peers")).await;
    serving.until_fits("overrides", is_loosened("operator_overrides")).await;
    serving.until_fits("in force", |event| event["event"] == "reloaded" && event["changed"] == "configuration").await;
    assert!(ask().await.is_ok());
    serving.terminate().await;
    assert!(serving.ended().await.status.success());
}

/// Another caller replaces the only one: the removed one is named. A setting that needs a restart is logged once, and when it is restored.
#[tokio::test]
async fn who_is_taken_off_and_what_waits_for_a_restart_is_named() {
    let (registry, catalogue) = case::documents(1);
    let files = Files::new(&registry, &catalogue, Some("callers: {unix_peers: [{uid: 4294967288}]}\n"));
    let address = format!("unix:{}", files.folder().join("gate.sock").display());
    let flags = files.flags();
    let arguments: Vec<&str> = ["--listen", &address].into_iter().chain(flags.iter().map(String::as_str)).collect();
    let serving = Serving::start(&arguments).await;
    let config = files.folder().join("config.yaml");
    fs::write(&config, "callers: {unix_peers: [{uid: 4000000001}]}\nlimits: {decisions: 7}\n").unwrap();
    let is_gone = |event: &serde_json::Value| {
        event["event"] == "caller_removed" && event["caller"].as_str().is_some_and(|who| who.contains("4294967288"))
    };
    serving.until_fits("who is gone", is_gone).await;
    serving.until_fits("a restart", |event| event["event"] == "restart_needed" && event["settings"] == "limits.decisions").await;
    fs::write(&config, "callers: {unix_peers: [{uid: 4000000001}]}\n").unwrap();
    serving.until("restart_not_needed").await;
    serving.terminate().await;
    assert!(serving.ended().await.status.success());
}

// === files that never end ===

/// Without a descriptor for a connection no probe is sent. That is our own fault: the tenant is told to retry, and it does not count against
/// the provider or the key.
#[cfg(target_os = "linux")]
#[tokio::test]
async fn a_lack_of_descriptors_is_no_fault_of_the_providers() {
    let row = |key, status, body| Row::at("/acme/v1/models", key, status, body);
    let refusal = r#"{"error": {"code": "invalid_api_key"}}"#;
    let vendor = Vendor::start(vec![row(Some("made-up-key"), 200, r#"{"data": []}"#), row(None, 401, refusal)]).await;
    let (registry, catalogue) = case::documents(vendor.address.port());
    let files = Files::new(&registry, &catalogue, None);
    let flags = files.flags();
    let serving = Serving::start(&flags.iter().map(String::as_str).collect::<Vec<_>>()).await;
    let mut client = serving.client().await;
    client.get_registry_status(pb::GetRegistryStatusRequest {}).await.unwrap();
    serving.limit_descriptors(1).await;
    // More than open a breaker.
    for number in 0..8 {
        let mut request = decide(if number == 0 { "made-up-key" } else { "made-up-other-key" });
        request.workspace_spec.as_mut().unwrap().organization_id = format!("org-{number}");
        let response = client.decide(request).await.unwrap().into_inner();
        let Some(pb::decide_response::Decision::Deny(deny)) = &response.decision else { panic!("{response:?}") };
        assert_eq!((deny.code(), deny.retryable), (pb::DenyCode::ByokProbeNotAttempted, true), "{response:?}");
    }
    assert!(vendor.asked().is_empty());
    serving.limit_descriptors(1024).await;
    assert!(is_allow(&client.decide(decide("made-up-key")).await.unwrap().into_inner()));
    serving.terminate().await;
    let ended = serving.ended().await;
    assert!(!ended.stdout.contains("breaker_opened"), "{ended:?}");
}

/// A platform's token, and an operator's.
const TOKENS: [&str; 2] = ["made-up-token-of-the-platform", "made-up-token-of-an-operator"];

/// A process with a file that holds these tokens.
async fn serving_with_tokens() -> (Files, Serving) {
    let (registry, catalogue) = case::documents(1);
    let files = Files::new(&registry, &catalogue, None);
    let tokens = files.folder().join("tokens");
    let [platform, operator] = TOKENS;
    fs::write(&tokens, format!("{platform}\n{operator} operator\n")).unwrap();
    let mut flags = files.flags();
    flags.extend(["--token-file".to_owned(), tokens.to_str().unwrap().to_owned()]);
    let serving = Serving::start(&flags.iter().map(String::as_str).collect::<Vec<_>>()).await;
    (files, serving)
}

/// A token that is removed from its file, or misspelt there, is reported like any other caller, by its line and never by its value.
#[tokio::test]
async fn a_token_that_is_taken_out_is_told() {
    let (files, serving) = serving_with_tokens().await;
    let (tokens, [one, other]) = (files.folder().join("tokens"), TOKENS);
    fs::write(&tokens, format!("# moved\n{one}\n")).unwrap();
    let event = serving.until("caller_removed").await;
    assert_eq!(
        (&event["setting"], &event["caller"]),
        (&"callers.token_file".into(), &"token of line 2 of the old file".into()),
        "{event}"
    );
    serving.terminate().await;
    let ended = serving.ended().await;
    assert_eq!(ended.stdout.matches("caller_removed").count(), 1, "{ended:?}");
    assert!(!ended.stdout.contains(one) && !ended.stdout.contains(other), "{ended:?}");
}

/// A token whose role alone is another one leaves a line with both.
#[tokio::test]
async fn a_token_whose_role_changes_is_told() {
    let (files, serving) = serving_with_tokens().await;
    let (tokens, [one, other]) = (files.folder().join("tokens"), TOKENS);
    fs::write(&tokens, format!("{one}\n{other} workspace ws-1,ws-2\n")).unwrap();
    let event = serving.until("caller_changed").await;
    assert_eq!(
        [&event["level"], &event["setting"], &event["caller"], &event["was"], &event["is"]],
        ["WARN", "callers.token_file", "token of line 2", "operator", "workspace ws-1,ws-2"],
        "{event}"
    );
    serving.terminate().await;
    let ended = serving.ended().await;
    assert_eq!(ended.stdout.matches("caller_changed").count(), 1, "{ended:?}");
    assert!(!ended.stdout.contains("caller_removed") && !ended.stdout.contains(one), "{ended:?}");
}

/// A registry that has become a pipe is a fault like any other, and does not block the reload or the process.
#[tokio::test]
async fn a_pipe_in_a_files_place_holds_nothing_up() {
    let (registry, catalogue) = case::documents(1);
    let files = Files::new(&registry, &catalogue, None);
    let flags = files.flags();
    let flags: Vec<&str> = flags.iter().map(String::as_str).collect();
    let serving = Serving::start(&flags).await;
    let at = files.folder().join("registry.yaml");
    fs::remove_file(&at).unwrap();
    assert!(Command::new("mkfifo").arg(&at).status().unwrap().success());
    let fault = serving.until("reload_failed").await;
    assert!(fault["fault"].as_str().unwrap().contains("not a regular file"), "{fault}");
    for command in [
        &["check"][..],
        &["decide", "--runtime", "agent", "--model", "acme-large"],
        &["exec", "--runtime", "agent", "--model", "acme-large"],
    ] {
        let (behind, flags) = match command[0] {
            "exec" => (&["--", "true"][..], &flags[..]),
            "check" => (&[][..], &flags[..4]),
            _ => (&[][..], &flags[..]),
        };
        let ended = run(&[command, flags, behind].concat(), &[]).await;
        assert_eq!(ended.status.code(), Some(3), "{command:?} {ended:?}");
        assert!((ended.stdout + &ended.stderr).contains("not a regular file"), "{command:?}");
    }
    fs::remove_file(&at).unwrap();
    fs::write(&at, format!("{registry}\n# mended\n")).unwrap();
    serving.until_fits("it is followed again", |event| event["event"] == "reloaded" && event["changed"] == "registry").await;
    serving.terminate().await;
    assert!(serving.ended().await.status.success());
}

// === keys ===

/// A vendor whose front end closes connections with long headers, as common ones do, and which accepts every other key.
struct Front;

impl Prober for Front {
    fn probe(&self, request: ProbeRequest) -> Boxed<'static, Finding> {
        let verdict = if request.secret.expose().len() > 4096 { Verdict::Unreachable } else { Verdict::Valid };
        Box::pin(async move { Finding::bare(verdict) })
    }
}

fn engine(prober: Arc<dyn Prober>, new_keys: NewKeyLimits) -> Arc<Engine> {
    let (registry, catalogue) = case::documents(1);
    let cache = Cache::new(prober, CacheSettings { new_keys, ..CacheSettings::default() });
    Files::new(&registry, &catalogue, None).engine_over(Arc::new(cache))
}

async fn verdict(engine: &Engine, organization: &str, key: &str) -> (bool, Option<Verdict>) {
    let mut message = decide(key);
    message.workspace_spec.as_mut().unwrap().organization_id = organization.into();
    let request = convert::request(message).unwrap();
    let decided = engine.decide(&request, Instant::now() + Duration::from_secs(5)).await;
    (decided.decision.denial().is_none(), decided.decision.liveness.map(|liveness| liveness.verdict))
}

/// Long keys of one organization, which make the vendor's front end close their connections, do not affect other organizations.
#[tokio::test(start_paused = true)]
async fn a_flood_of_long_keys_costs_nobody_else_a_workspace() {
    let many = NonZeroU32::new(1_000_000).unwrap();
    let engine = engine(Arc::new(Front), NewKeyLimits { per_organization: many, per_caller: many, per_platform: many });
    let mut allowed = 0;
    for index in 0..723 {
        if index % 3 != 2 {
            let key = format!("{index}-").repeat(2600)[..5000].to_owned();
            assert!(!verdict(&engine, "attacker", &key).await.0);
        }
        allowed += u32::from(verdict(&engine, &format!("victim-{index}"), &format!("made-up-{index}")).await.0);
    }
    assert_eq!(allowed, 723);
}

/// A vendor that answers quickly, but for models of a tenant's choice that hang.
struct Hanging;

impl Prober for Hanging {
    fn probe(&self, request: ProbeRequest) -> Boxed<'static, Finding> {
        let hangs = request.secret.expose().starts_with("hangs");
        request.started.set();
        Box::pin(async move {
            sleep(Duration::from_millis(if hangs { 3_000 } else { 50 })).await;
            Finding { about_model: hangs, ..Finding::bare(if hangs { Verdict::Timeout } else { Verdict::Valid }) }
        })
    }
}

/// An organization that sends as many keys as it may, all with a model that hangs, does not keep others from the vendor.
#[tokio::test(start_paused = true)]
async fn a_tenants_hanging_models_cost_nobody_else_a_workspace() {
    for attackers in [1, 3] {
        let limiter = ProviderLimiter::new(Arc::new(Hanging), ProviderLimits::default());
        let engine = engine(Arc::new(limiter), NewKeyLimits::default());
        let mut flood = JoinSet::new();
        for attacker in 0..attackers {
            for index in 0..400_u64 {
                let engine = Arc::clone(&engine);
                flood.spawn(async move {
                    // All that a minute allows at once, and then as they come.
                    sleep(Duration::from_millis(250 * index.saturating_sub(239))).await;
                    verdict(&engine, &format!("attacker-{attacker}"), &format!("hangs-{attacker}-{index}")).await.0
                });
            }
        }
        sleep(Duration::from_millis(10)).await;
        let mut longest = Duration::ZERO;
        for index in 0..40 {
            let began = Instant::now();
            let answer = verdict(&engine, &format!("victim-{index}"), &format!("made-up-{attackers}-{index}")).await;
            assert_eq!(answer, (true, Some(Verdict::Valid)), "{attackers}: {index}");
            longest = longest.max(began.elapsed());
            sleep(Duration::from_millis(900)).await;
        }
        // One finds a slot that is left to those who have none. Several take that one too, and so it has to wait for one to end.
        assert!(longest <= Duration::from_millis(if attackers == 1 { 50 } else { 3_050 }), "{attackers}: {longest:?}");
        assert!(flood.join_all().await.iter().all(|allowed| !allowed));
    }
}

/// New keys count as new even while the breaker is open: nobody can try a list of them for free.
#[tokio::test(start_paused = true)]
async fn keys_that_meet_an_open_breaker_are_counted() {
    let scripted = Scripted::new(Verdict::Unreachable);
    let few = NonZeroU32::new(20).unwrap();
    let engine = engine(scripted.clone(), NewKeyLimits { per_organization: few, ..NewKeyLimits::default() });
    for index in 0..6 {
        verdict(&engine, &format!("org-{index}"), &format!("made-up-{index}")).await;
    }
    let before = scripted.asked();
    let mut heard = BTreeMap::new();
    for index in 0..100 {
        let (_, verdict) = verdict(&engine, "org-list", &format!("made-up-of-a-list-{index}")).await;
        *heard.entry(verdict.unwrap().as_str()).or_insert(0) += 1;
    }
    assert_eq!(scripted.asked(), before, "the breaker is open");
    assert_eq!(heard, BTreeMap::from([("UNREACHABLE", 20), ("NOT_ATTEMPTED", 80)]));
}

/// If a trial says nothing about the vendor, because a tenant's model was slow or no probe was sent, the next caller may try.
#[tokio::test(start_paused = true)]
async fn a_trial_that_tells_nothing_is_followed_by_another() {
    for tells_nothing in [Finding { about_model: true, ..Finding::bare(Verdict::Timeout) }, Finding::bare(Verdict::NotAttempted)]
    {
        let scripted = Scripted::new(Verdict::Unreachable);
        let engine = engine(scripted.clone(), NewKeyLimits::default());
        for index in 0..5 {
            verdict(&engine, &format!("org-{index}"), &format!("made-up-{index}")).await;
        }
        advance(Duration::from_secs(6)).await;
        scripted.set(|script| script.finding = tells_nothing.clone());
        verdict(&engine, "org-slow", "made-up-slow").await;
        scripted.verdict(Verdict::Valid);
        let (is_allowed, verdict) = verdict(&engine, "org-next", "made-up-next").await;
        assert_eq!((is_allowed, verdict), (true, Some(Verdict::Valid)), "after {tells_nothing:?}");
    }
}

// === HTTP/2 by hand ===

type Streaming =
    hyper::client::conn::http2::SendRequest<http_body_util::combinators::BoxBody<bytes::Bytes, std::convert::Infallible>>;

async fn raw_streaming(edge: &Edge) -> Streaming {
    raw_connection(edge).await.0
}

/// And its socket, to end the connection as a crashed caller does.
pub(crate) async fn raw_connection(edge: &Edge) -> (Streaming, std::net::TcpStream) {
    let socket = TcpStream::connect(edge.tcp()).await.unwrap().into_std().unwrap();
    let stream = TcpStream::from_std(socket.try_clone().unwrap()).unwrap();
    let (sender, connection) =
        hyper::client::conn::http2::handshake(hyper_util::rt::TokioExecutor::new(), hyper_util::rt::TokioIo::new(stream))
            .await
            .unwrap();
    tokio::spawn(connection);
    (sender, socket)
}

type Unfinished = http::Request<http_body_util::combinators::BoxBody<bytes::Bytes, std::convert::Infallible>>;

/// A call whose message never comes.
fn unfinished(path: &str, headers: &[(&str, &str)]) -> Unfinished {
    partly(path, headers, 1)
}

/// A call that stops after this many bytes.
pub(crate) fn partly(path: &str, headers: &[(&str, &str)], bytes: usize) -> Unfinished {
    let mut part = vec![0, 0, 0, 0xf0, 0];
    part.resize(5 + bytes, b'x');
    let frame = hyper::body::Frame::data(bytes::Bytes::from(part));
    let body = futures_util::stream::iter([Ok(frame)]).chain(futures_util::stream::pending());
    let request = http::Request::post(format!("http://localhost{path}"))
        .header("content-type", "application/grpc")
        .header("te", "trailers");
    let request = headers.iter().fold(request, |request, (name, value)| request.header(*name, *value));
    request.body(http_body_util::combinators::BoxBody::new(http_body_util::StreamBody::new(body))).unwrap()
}

/// A watch that owns its client.
trait WatchOwned {
    fn watch_owned(self) -> impl Future<Output = Result<tonic::Streaming<tonic_health::pb::HealthCheckResponse>, Status>>;
}

impl WatchOwned for HealthClient<Channel> {
    async fn watch_owned(mut self) -> Result<tonic::Streaming<tonic_health::pb::HealthCheckResponse>, Status> {
        self.watch(HealthCheckRequest::default()).await.map(tonic::Response::into_inner)
    }
}
