//! Each limit: refused at once, by name, without effect on others. Deadlines, roles and hostile peers.

use std::{convert::Infallible, net::SocketAddr, num::NonZeroU32, time::Duration};

use byok_gate::grpc::convert::pb::{self, policy_decision_service_client::PolicyDecisionServiceClient};
use bytes::Bytes;
use futures_util::{StreamExt, stream};
use http_body_util::{Full, StreamBody};
use hyper::{body::Frame, client::conn::http2};
use hyper_util::rt::{TokioExecutor, TokioIo};
use prost::Message;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    task::JoinSet,
    time::timeout,
};
use tonic::{Code, Request, Status};
use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};
use tonic_types::StatusExt;

use crate::support::{
    binary::{PATIENCE, Serving, run},
    edge::{Edge, Held, code_of, decide, grpc, is_allow, raw, settings},
};

const DECIDE: &str = "/byokgate.v1.PolicyDecisionService/Decide";
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";

fn fields(status: &Status) -> Vec<String> {
    let details = status.get_error_details();
    details.bad_request().unwrap().field_violations.iter().map(|violation| violation.field.clone()).collect()
}

/// Three times as many calls as slots: the rest is refused by name, health answers, accepted calls are answered, and
/// then all is as before.
#[tokio::test]
async fn past_the_limit_of_decisions_calls_are_refused_and_the_taken_ones_answered() {
    let held = Held::new(false);
    let mut settings = settings();
    settings.limits.decisions = 8;
    settings.limits.decisions_waiting = 2;
    let edge = Edge::start(settings, held.engine()).await;
    let channel = edge.plain().await;
    let client = PolicyDecisionServiceClient::new(channel.clone());
    let mut calls = JoinSet::new();
    for index in 0..24 {
        let mut client = client.clone();
        calls.spawn(async move { client.decide(decide(&format!("made-up-key-{index}"))).await });
    }
    let mut refused = 0;
    // The refusals come while every slot is taken: no probe has ended yet.
    while refused < 16 {
        let status = calls.join_next().await.unwrap().unwrap().unwrap_err();
        assert_eq!(status.code(), Code::ResourceExhausted, "{status:?}");
        let details = status.get_error_details();
        assert!(details.retry_info().unwrap().retry_delay.unwrap() > Duration::ZERO);
        assert_eq!(details.quota_failure().unwrap().violations[0].subject, "limits.decisions");
        refused += 1;
    }
    assert_eq!(held.asked(), 8);
    HealthClient::new(channel).check(HealthCheckRequest::default()).await.unwrap();
    held.open();
    while let Some(call) = calls.join_next().await {
        assert!(is_allow(&call.unwrap().unwrap().into_inner()));
    }
    assert!(is_allow(&client.clone().decide(decide("made-up-later")).await.unwrap().into_inner()));
}

#[tokio::test]
async fn messages_and_fields_have_limits_that_are_named() {
    let mut settings = settings();
    settings.limits.message_bytes = 4096;
    settings.limits.batch_message_bytes = 16 * 1024;
    settings.limits.credentials = 2;
    settings.limits.credential_bytes = 64;
    settings.limits.name_bytes = 16;
    settings.limits.model_bytes = 32;
    settings.limits.base_url_names = 1;
    settings.limits.resolve_names = 1;
    settings.limits.batch_items = 2;
    let edge = Edge::start(settings, Held::new(true).engine()).await;
    let mut client = PolicyDecisionServiceClient::new(edge.plain().await);
    let padded = |length: usize| {
        let mut request = decide("");
        let spec = request.workspace_spec.as_mut().unwrap();
        spec.organization_id = "o".repeat(length);
        let more = length.saturating_sub(request.encoded_len() - length);
        request.workspace_spec.as_mut().unwrap().organization_id = "o".repeat(more);
        request
    };
    // One byte decides; the shorter one is then refused for its field.
    assert_eq!(padded(4096).encoded_len(), 4096);
    assert_eq!(fields(&client.decide(padded(4096)).await.unwrap_err()), ["workspace_spec.organization_id"]);
    let over = client.decide(padded(4097)).await.unwrap_err();
    assert_eq!((over.code(), fields(&over)), (Code::InvalidArgument, vec!["request".to_owned()]), "{over:?}");
    assert!(over.message().ends_with("is 4097 bytes long; the limit is 4096 (limits.message_bytes)"), "{over:?}");
    // A batch may be larger than one request, and is limited as well.
    let batch = |count, request: pb::DecideRequest| pb::BatchDecideRequest { requests: vec![request; count] };
    let mut results = client.batch_decide(batch(1, padded(9000))).await.unwrap().into_inner();
    let Some(pb::batch_decide_response::Result::Status(over)) = results.message().await.unwrap().unwrap().result else {
        panic!("an item over the limit was decided")
    };
    assert!(over.message.ends_with("the limit is 4096 (limits.message_bytes)"), "{over:?}");
    let over = client.batch_decide(batch(2, padded(9000))).await.map(drop).unwrap_err();
    assert_eq!((over.code(), fields(&over)), (Code::InvalidArgument, vec!["request".to_owned()]), "{over:?}");
    assert!(over.message().ends_with(" bytes long; the limit is 16384 (limits.batch_message_bytes)"), "{over:?}");
    let over = client.batch_decide(batch(3, decide(""))).await.map(drop).unwrap_err();
    assert_eq!((over.code(), fields(&over)), (Code::InvalidArgument, vec!["requests".to_owned()]), "{over:?}");
    assert!(over.message().ends_with("it must hold 1 to 2 (limits.batch_items)"), "{over:?}");
    type Change = fn(&mut pb::WorkspaceSpec);
    let changes: [(&str, &str, Change); 6] = [
        ("workspace_spec.credentials", "credentials", |spec| spec.credentials = vec![spec.credentials[0].clone(); 3]),
        ("workspace_spec.credentials[0].value", "credential_bytes", |spec| spec.credentials[0].value = "v".repeat(65)),
        ("workspace_spec.credentials[0].env_name", "name_bytes", |spec| spec.credentials[0].env_name = "N".repeat(17)),
        ("workspace_spec.workspace_id", "name_bytes", |spec| spec.workspace_id = "w".repeat(17)),
        ("workspace_spec.model", "model_bytes", |spec| spec.model = "m".repeat(33)),
        ("workspace_spec.tenant_base_url_env", "base_url_names", |spec| spec.tenant_base_url_env = vec!["A".into(), "B".into()]),
    ];
    for (field, setting, change) in changes {
        let mut request = decide("");
        change(request.workspace_spec.as_mut().unwrap());
        let refused = client.decide(request).await.unwrap_err();
        assert_eq!(refused.code(), Code::InvalidArgument, "{field}");
        assert!(fields(&refused).contains(&field.to_owned()), "{field}: {refused:?}");
        assert!(refused.message().contains(&format!("(limits.{setting})")), "{field}: {refused:?}");
    }
    let names = pb::ResolveProviderRequest { credential_names: vec!["A".into(), "B".into()], ..Default::default() };
    let over = client.resolve_provider(names).await.unwrap_err();
    assert_eq!(fields(&over), ["credential_names"]);
    assert!(over.message().ends_with("(limits.resolve_names)"), "{over:?}");
}

/// A malformed or compressed message never gets a decision.
#[tokio::test]
async fn undecodable_and_compressed_requests_are_refused() {
    let edge = Edge::start(settings(), Held::new(true).engine()).await;
    let mut sender = raw(edge.tcp()).await;
    let message = decide("made-up-key").encode_to_vec();
    assert_eq!(code_of(&mut sender, grpc(DECIDE, &[], &message)).await, Code::Ok);
    assert_eq!(code_of(&mut sender, grpc(DECIDE, &[], b"\xff\xff\xff")).await, Code::InvalidArgument);
    // A string that is not UTF-8.
    let mut bad = message.clone();
    let at = bad.windows(4).position(|four| four == b"ws-1").unwrap();
    bad[at] = 0xff;
    assert_eq!(code_of(&mut sender, grpc(DECIDE, &[], &bad)).await, Code::InvalidArgument);
    assert_eq!(code_of(&mut sender, grpc(DECIDE, &[("grpc-encoding", "gzip")], &message)).await, Code::Unimplemented);
    // Wrong framing: truncated, no message at all, an unknown flag. Bad input, not our fault.
    for body in [&b"\0\0\0\0\x09ab"[..], b"", b"\x07\0\0\0\0"] {
        let mut request = grpc(DECIDE, &[], b"");
        *request.body_mut() = Full::from(Bytes::copy_from_slice(body));
        assert_eq!(code_of(&mut sender, request).await, Code::InvalidArgument, "{body:?}");
    }
    // Another content type is not gRPC.
    for (kind, expect) in [
        ("application/grpc", 200),
        ("application/grpc+proto", 200),
        ("Application/gRPC; charset=utf-8", 200),
        ("application/grpc+json", 415),
        ("application/grpc-web", 415),
        ("application/json", 415),
        ("", 415),
    ] {
        let mut request = grpc(DECIDE, &[], &message);
        request.headers_mut().insert("content-type", kind.parse().unwrap());
        let response = sender.send_request(request).await.unwrap();
        assert_eq!(response.status().as_u16(), expect, "{kind}");
    }
    for path in [
        "/byokgate.v1.PolicyDecisionService/Nothing",
        "/nobody/Decide",
        "//Decide",
        "/byokgate.v1.PolicyDecisionService%2FDecide",
    ] {
        assert_eq!(code_of(&mut sender, grpc(path, &[], &message)).await, Code::Unimplemented, "{path}");
    }
}

#[tokio::test]
async fn every_grpc_timeout_has_a_defined_end_and_it_is_deadline_exceeded() {
    let held = Held::new(false);
    let mut settings = settings();
    settings.deadlines.decide = Duration::from_millis(300);
    let edge = Edge::start(settings, held.engine()).await;
    let mut sender = raw(edge.tcp()).await;
    for (timeout, expect) in [
        // Over before it begins.
        ("1n", Code::DeadlineExceeded),
        ("0S", Code::DeadlineExceeded),
        ("4m", Code::DeadlineExceeded),
        ("0M", Code::DeadlineExceeded),
        // Capped, or no timeout at all: a decision that says TIMEOUT, before the end.
        ("99999999H", Code::Ok),
        ("0", Code::Ok),
        ("soon", Code::Ok),
        ("999999999S", Code::Ok),
        ("100m", Code::Ok),
    ] {
        let message = decide(&format!("made-up-{timeout}")).encode_to_vec();
        assert_eq!(code_of(&mut sender, grpc(DECIDE, &[("grpc-timeout", timeout)], &message)).await, expect, "{timeout}");
    }
    // A missing body cannot keep a call open.
    assert_eq!(code_of_a_body_without_end(edge.tcp()).await, Code::DeadlineExceeded);
}

async fn code_of_a_body_without_end(address: SocketAddr) -> Code {
    let stream = TcpStream::connect(address).await.unwrap();
    let (mut sender, connection) = http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await.unwrap();
    tokio::spawn(connection);
    let part = Frame::data(Bytes::from_static(b"\0\0\0\x01\0only a part"));
    let body = StreamBody::new(stream::iter([Ok::<_, Infallible>(part)]).chain(stream::pending()));
    let request = http::Request::post(format!("http://localhost{DECIDE}")).header("content-type", "application/grpc");
    let response = sender.send_request(request.body(body).unwrap()).await.unwrap();
    Code::from_bytes(response.headers()["grpc-status"].as_bytes())
}

/// A workspace may call for itself, at PROVISION, without an override, and not often.
#[tokio::test]
async fn a_workspace_vouches_for_nobody_but_itself() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("tokens");
    std::fs::write(&file, "made-up-token-of-a-workspace workspace ws-1\n").unwrap();
    let mut settings = settings();
    settings.callers.token_file = Some(file);
    settings.callers.workspace_calls_per_minute = NonZeroU32::new(6).unwrap();
    let edge = Edge::start(settings, Held::new(true).engine()).await;
    let mut client = PolicyDecisionServiceClient::new(edge.plain().await);
    let mut ask = async |change: fn(&mut pb::DecideRequest)| {
        let mut message = decide("made-up-key");
        message.checkpoint = pb::Checkpoint::Provision as i32;
        change(&mut message);
        let mut request = Request::new(message);
        request.metadata_mut().insert("authorization", "Bearer made-up-token-of-a-workspace".parse().unwrap());
        client.decide(request).await.map_or_else(|status| status.code(), |_| Code::Ok)
    };
    assert_eq!(ask(|_| {}).await, Code::Ok);
    assert_eq!(ask(|request| request.checkpoint = 1).await, Code::PermissionDenied);
    assert_eq!(ask(|request| request.checkpoint = 3).await, Code::PermissionDenied);
    assert_eq!(
        ask(|request| request.workspace_spec.as_mut().unwrap().workspace_id = "ws-2".into()).await,
        Code::PermissionDenied
    );
    assert_eq!(
        ask(|request| request.workspace_spec.as_mut().unwrap().workspace_id = String::new()).await,
        Code::PermissionDenied
    );
    assert_eq!(ask(|request| request.workspace_spec.as_mut().unwrap().operator_override = 1).await, Code::PermissionDenied);
    assert_eq!(ask(|_| {}).await, Code::ResourceExhausted);
}

// === connections ===

/// The frames that a server sends first: type and payload.
async fn frames(stream: &mut TcpStream, count: usize) -> Vec<(u8, Vec<u8>)> {
    let mut found = Vec::new();
    for _ in 0..count {
        let mut head = [0; 9];
        stream.read_exact(&mut head).await.unwrap();
        let mut payload = vec![0; u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize];
        stream.read_exact(&mut payload).await.unwrap();
        found.push((head[3], payload));
    }
    found
}

#[tokio::test]
async fn a_connection_past_the_limit_is_told_so_and_another_listener_has_places_of_its_own() {
    let folder = tempfile::tempdir().unwrap();
    let mut settings = settings();
    settings.server.listen.push(format!("unix:{}/gate.sock", folder.path().display()));
    settings.limits.connections = 1;
    let held = Held::new(false);
    let edge = Edge::start(settings, held.engine()).await;
    let first = edge.plain().await;
    let mut client = PolicyDecisionServiceClient::new(first.clone());
    let working = tokio::spawn(async move { client.decide(decide("made-up-key")).await });
    while held.asked() == 0 {
        tokio::task::yield_now().await;
    }
    let mut second = TcpStream::connect(edge.tcp()).await.unwrap();
    let told = frames(&mut second, 2).await;
    const GOAWAY: u8 = 7;
    assert_eq!((told[0].0, told[1].0), (4, GOAWAY));
    assert!(String::from_utf8_lossy(&told[1].1).contains("limits.connections (1) is reached"), "{told:?}");
    assert_eq!(second.read(&mut [0]).await.unwrap(), 0);
    // Our own client says the same in its words.
    let address = edge.tcp().to_string();
    let told = run(&["health", "--server", &address], &[]).await;
    assert!(told.stderr.contains(&format!("{address} refuses connections: limits.connections (1) is reached")), "{told:?}");
    for channel in [first, edge.over_unix().await] {
        HealthClient::new(channel).check(HealthCheckRequest::default()).await.unwrap();
    }
    held.open();
    assert!(is_allow(&working.await.unwrap().unwrap().into_inner()));
}

#[tokio::test]
async fn streams_and_headers_are_limited_by_what_the_server_announces() {
    let mut settings = settings();
    settings.limits.streams_per_connection = 7;
    settings.limits.header_list_bytes = 9000;
    let edge = Edge::start(settings, Held::new(true).engine()).await;
    let mut stream = TcpStream::connect(edge.tcp()).await.unwrap();
    stream.write_all(PREFACE).await.unwrap();
    let announced = frames(&mut stream, 1).await.remove(0).1;
    let value = |id: u16| {
        let row = announced.chunks(6).find(|row| row[..2] == id.to_be_bytes()).unwrap();
        u32::from_be_bytes([row[2], row[3], row[4], row[5]])
    };
    const MAX_CONCURRENT_STREAMS: u16 = 3;
    const MAX_HEADER_LIST_SIZE: u16 = 6;
    assert_eq!((value(MAX_CONCURRENT_STREAMS), value(MAX_HEADER_LIST_SIZE)), (7, 9000));
    // And it enforces it.
    let mut sender = raw(edge.tcp()).await;
    let long = "x".repeat(10_000);
    let refused = sender.send_request(grpc(DECIDE, &[("x-long", &long)], &[])).await.unwrap();
    assert_eq!(refused.status(), http::StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE);
    assert_eq!(code_of(&mut sender, grpc(DECIDE, &[], &decide("made-up-key").encode_to_vec())).await, Code::Ok);
}

/// A peer that does not speak HTTP/2, or not in time, is disconnected; so is one that opens and resets streams forever.
#[tokio::test]
async fn hostile_connections_end_and_the_server_goes_on() {
    let mut settings = settings();
    settings.deadlines.handshake = Duration::from_millis(100);
    let edge = Edge::start(settings, Held::new(true).engine()).await;
    for (words, answer) in [
        (&b"GET / HTTP/1.1\r\nhost: localhost\r\n\r\n"[..], &b"HTTP/1.1 400 Bad Request\r\n"[..]),
        (b"PRI * HTTP/2.0\r\n", b""),
        (b"", b""),
    ] {
        let mut stream = TcpStream::connect(edge.tcp()).await.unwrap();
        stream.write_all(words).await.unwrap();
        let mut said = Vec::new();
        // The end, or a reset where words were left unread.
        drop(stream.read_to_end(&mut said).await);
        // At most a message about the port.
        assert!(said.starts_with(answer) && said.is_empty() == answer.is_empty() && said.len() < 200, "{words:?}: {said:?}");
    }
    let mut rapid = TcpStream::connect(edge.tcp()).await.unwrap();
    rapid.write_all(PREFACE).await.unwrap();
    let mut flood = Vec::new();
    for stream in (1_u32..=4001).step_by(2) {
        // HEADERS (`:method GET`, `:path /`, `:scheme http`, all indexed) and RST_STREAM behind it.
        flood.extend([0, 0, 3, 1, 4]);
        flood.extend(stream.to_be_bytes());
        flood.extend([0x82, 0x84, 0x86, 0, 0, 4, 3, 0]);
        flood.extend(stream.to_be_bytes());
        flood.extend([0, 0, 0, 8]);
    }
    let (mut reading, mut writing) = rapid.split();
    let (_, ended) = tokio::join!(writing.write_all(&flood), async {
        let mut said = Vec::new();
        drop(reading.read_to_end(&mut said).await);
        said
    });
    let goaway = ended.windows(9).any(|frame| frame[3] == 7 && frame[5..9] == [0; 4]);
    assert!(goaway, "no GOAWAY in {} bytes", ended.len());
    let mut client = PolicyDecisionServiceClient::new(edge.plain().await);
    assert!(is_allow(&client.decide(decide("made-up-key")).await.unwrap().into_inner()));
}

/// A peer that requests answers and reads none is no longer read from, and one that never ends its headers is disconnected: neither makes
/// the server buffer more than the sockets do.
#[tokio::test]
async fn floods_of_frames_are_not_taken_in() {
    /// More than the sockets of both ends hold.
    const FLOOD: usize = 256 << 20;
    const PING: &[u8] = b"\0\0\x08\x06\0\0\0\0\0made up!";
    const SETTINGS: &[u8] = b"\0\0\0\x04\0\0\0\0\0";
    /// `:method GET`, `:path /`, `:scheme http`, and more to follow.
    const HEADERS: &[u8] = b"\0\0\x03\x01\0\0\0\0\x01\x82\x84\x86";
    // `x: y`, a hundred times, and more to follow.
    let continuation = [b"\0\x01\xf4\x09\0\0\0\0\x01".to_vec(), b"\0\x01x\x01y".repeat(100)].concat();
    let edge = Edge::start(settings(), Held::new(true).engine()).await;
    for (opening, frame, is_cut) in [(&b""[..], PING, false), (b"", SETTINGS, false), (HEADERS, &continuation, true)] {
        let mut stream = TcpStream::connect(edge.tcp()).await.unwrap();
        stream.write_all(&[PREFACE, opening].concat()).await.unwrap();
        let chunk = frame.repeat(1000);
        let mut taken = 0;
        let ended = loop {
            // So long nothing at all is read: a busy machine is slower, not that slow.
            match timeout(Duration::from_secs(2), stream.write_all(&chunk)).await {
                Ok(Ok(())) => taken += chunk.len(),
                Ok(Err(_)) => break "cut",
                Err(_) => break "not read",
            }
            assert!(taken < FLOOD, "the server took {taken} bytes of frames of type {}", frame[3]);
        };
        assert_eq!(ended, if is_cut { "cut" } else { "not read" }, "after {taken} bytes of frames of type {}", frame[3]);
        let mut client = PolicyDecisionServiceClient::new(edge.plain().await);
        assert!(is_allow(&client.decide(decide("made-up-key")).await.unwrap().into_inner()));
    }
}

/// A process with few descriptors accepts fewer connections, and logs it: idle ones make room, and the rest of the work has what it needs.
#[tokio::test]
async fn connections_leave_descriptors_for_the_rest_of_the_work() {
    const DESCRIPTORS: usize = 48;
    let server = Serving::start_with_descriptors(DESCRIPTORS).await;
    let mut others = Vec::new();
    for _ in 0..2 * DESCRIPTORS {
        others.push(TcpStream::connect(&server.address).await.unwrap());
    }
    for _ in 0..3 {
        let mut late = server.client().await;
        // A connection that is not accepted waits forever.
        timeout(PATIENCE, late.get_registry_status(pb::GetRegistryStatusRequest {})).await.unwrap().unwrap();
    }
    server.terminate().await;
    let ended = server.ended().await;
    assert!(ended.status.success() && ended.stdout.contains("\"event\":\"descriptor_limit\""), "{ended:?}");
    assert!(!ended.stdout.contains("\"event\":\"accept_failed\""), "{ended:?}");
}
