//! Helpers for the measurements, besides the two servers.
//!
//! - `kit frames FOLDER`: the requests, each as one gRPC frame, for `h2load -d`
//! - `kit provider HOST:PORT`: a fake provider, a real HTTP server; the key's name selects the answer
//! - `kit cold GATE PROVIDER COUNT`: how much longer a cold decision takes than the provider's own round trip
//! - `kit fill GATE FROM TO [KEYS]`: decides for these keys, in batches, so that each is cached; they are of one organization, or of one for
//!   every KEYS of them
//! - `kit specs GATE SEED COUNT`: random specs, in batches, whose answers it checks

#![expect(clippy::print_stdout, reason = "what it measures is read by a script")]

use std::{
    convert::Infallible,
    env,
    error::Error,
    fs,
    path::Path,
    time::{Duration, Instant},
};

use byok_gate::grpc::convert::pb::{self, policy_decision_service_client::PolicyDecisionServiceClient};
use bytes::Bytes;
use http_body_util::{BodyExt, Empty, Full};
use hyper_util::rt::TokioIo;
use prost::Message;
use tokio::net::{TcpListener, TcpStream};
use tonic::transport::Channel;

mod random_specs;

type Failed = Box<dyn Error + Send + Sync>;

/// Items of the batch that is measured: the most that a batch may hold.
const BATCH: u32 = 256;

fn main() -> Result<(), Failed> {
    let arguments: Vec<String> = env::args().skip(1).filter(|argument| !argument.starts_with("--")).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    match arguments.as_slice() {
        ["frames", folder] => frames(Path::new(folder)),
        ["provider", listen] => runtime.block_on(provider(listen)),
        ["cold", gate, provider, count] => runtime.block_on(cold(gate, provider, count.parse()?)),
        ["fill", gate, from, to] => runtime.block_on(fill(gate, from.parse()?, to.parse()?, u32::MAX)),
        ["fill", gate, from, to, keys] => runtime.block_on(fill(gate, from.parse()?, to.parse()?, keys.parse()?)),
        ["specs", gate, seed, count] => runtime.block_on(specs(gate, seed.parse()?, count.parse()?)),
        _ => Ok(()),
    }
}

// === keys ===

/// A key that the provider accepts in some of its seconds.
const FAULTY: &str = "made-up-faulty-key";

/// A key that the provider accepts. It ends with a checksum: what byok-gate makes up keeps the form of a real key, and is refused.
fn live_key(name: &str) -> String {
    let key = format!("made-up-{name}");
    let checksum = checksum(&key);
    format!("{key}-{checksum:016x}")
}

/// Whether the provider accepts this header's value.
fn is_live(value: &str) -> bool {
    let key = value.strip_prefix("Bearer ").unwrap_or(value);
    key.rsplit_once('-').is_some_and(|(key, sum)| u64::from_str_radix(sum, 16) == Ok(checksum(key)))
}

/// FNV-1a, which spreads keys that differ in one digit.
fn checksum(key: &str) -> u64 {
    key.bytes().fold(0xcbf2_9ce4_8422_2325, |sum, byte| (sum ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
}

// === requests ===

fn request(model: &str, key: Option<&str>) -> pb::DecideRequest {
    let credential = key.map(|key| pb::Credential {
        env_name: "ANTHROPIC_API_KEY".into(),
        scope: pb::Scope::Workspace as i32,
        value: key.into(),
        unreadable: false,
    });
    pb::DecideRequest {
        workspace_spec: Some(pb::WorkspaceSpec {
            workspace_id: "6f1c2a54-7f0e-4c8e-9a51-d2f3a9c4b7e0".into(),
            organization_id: "0b9d3c1e-52aa-4f5b-8a77-31c6f1f0a9d2".into(),
            runtime: "claude-code".into(),
            model: model.into(),
            credentials: credential.into_iter().collect(),
            platform_proxy: pb::PlatformProxy::Available as i32,
            ..pb::WorkspaceSpec::default()
        }),
        checkpoint: pb::Checkpoint::Create as i32,
        ..pb::DecideRequest::default()
    }
}

fn frames(folder: &Path) -> Result<(), Failed> {
    let hit = || request("claude-sonnet-4-6", Some(&live_key("bench")));
    write(&folder.join("platform.frame"), &request("anthropic/claude-sonnet-4-6", None))?;
    write(&folder.join("hit.frame"), &hit())?;
    write(&folder.join("missing.frame"), &request("claude-sonnet-4-6", None))?;
    let dead = request("claude-sonnet-4-6", Some("made-up-dead-key"));
    write(&folder.join("dead.frame"), &dead)?;
    write(&folder.join("faulty.frame"), &request("claude-sonnet-4-6", Some(FAULTY)))?;
    // Each item is another workspace's, so that each is decided.
    let requests = (0..BATCH).map(|index| {
        let mut item = hit();
        if let Some(spec) = &mut item.workspace_spec {
            spec.workspace_id = format!("6f1c2a54-7f0e-4c8e-9a51-{index:012}");
        }
        item
    });
    write(&folder.join("batch.frame"), &pb::BatchDecideRequest { requests: requests.collect() })
}

/// A gRPC frame: no compression, the length, the message.
fn write(path: &Path, message: &impl Message) -> Result<(), Failed> {
    let mut frame = vec![0];
    frame.extend(u32::try_from(message.encoded_len())?.to_be_bytes());
    message.encode(&mut frame)?;
    Ok(fs::write(path, frame)?)
}

// === the provider ===

async fn provider(listen: &str) -> Result<(), Failed> {
    let listener = TcpListener::bind(listen).await?;
    loop {
        let (stream, _) = listener.accept().await?;
        stream.set_nodelay(true)?;
        tokio::spawn(async move {
            let service = hyper::service::service_fn(answer);
            // An error is the client's hanging up.
            drop(hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service).await);
        });
    }
}

async fn answer(request: http::Request<hyper::body::Incoming>) -> Result<http::Response<Full<Bytes>>, Infallible> {
    let given = |matches: fn(&str) -> bool| request.headers().values().any(|value| value.to_str().is_ok_and(matches));
    // A model's answer, or a list.
    let yes = if request.method() == http::Method::POST {
        r#"{"type":"message","content":[{"type":"text","text":"."}],"choices":[{"index":0}]}"#
    } else {
        r#"{"data":[{"type":"model","id":"claude-sonnet-4-6"}],"has_more":false}"#
    };
    let (status, body) = if given(is_live) {
        (200, yes)
    } else if given(|value| value == FAULTY) {
        // Every few seconds is a bad one.
        let second = std::time::SystemTime::UNIX_EPOCH.elapsed().map_or(0, |since| since.as_secs());
        match second % 4 {
            0 => (503, "upstream connect error"),
            1 => {
                tokio::time::sleep(Duration::from_secs(4)).await;
                (200, yes)
            }
            2 => (429, r#"{"type":"error","error":{"type":"rate_limit_error","message":"slow down"}}"#),
            _ => (200, yes),
        }
    } else {
        (401, r#"{"type":"error","error":{"type":"authentication_error","message":"invalid x-api-key"}}"#)
    };
    let mut response = http::Response::new(Full::from(body));
    *response.status_mut() = http::StatusCode::from_u16(status).unwrap_or_default();
    response.headers_mut().insert("content-type", http::HeaderValue::from_static("application/json"));
    Ok(response)
}

// === clients ===

async fn client(gate: &str) -> Result<PolicyDecisionServiceClient<Channel>, Failed> {
    let channel = Channel::from_shared(format!("http://{gate}"))?.tcp_nodelay(true).connect().await?;
    Ok(PolicyDecisionServiceClient::new(channel))
}

/// Decisions about new keys, each beside one direct call to the provider and one decision from the cache, so that
/// a busy machine slows all three alike.
async fn cold(gate: &str, provider: &str, count: usize) -> Result<(), Failed> {
    let mut gate = client(gate).await?;
    let stream = TcpStream::connect(provider).await?;
    stream.set_nodelay(true)?;
    let (mut direct, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    tokio::spawn(connection);
    let run = std::process::id();
    let known = request("claude-sonnet-4-6", Some(&live_key("warm")));
    allowed(&gate.decide(known.clone()).await?.into_inner())?;
    let (mut trips, mut warm, mut cold) = (Vec::new(), Vec::new(), Vec::new());
    for index in 0..count {
        let asked = http::Request::get("/v1/models?limit=1")
            .header("host", provider)
            .header("x-api-key", live_key("direct"))
            .body(Empty::<Bytes>::new())?;
        let began = Instant::now();
        direct.ready().await?;
        direct.send_request(asked).await?.into_body().collect().await?;
        trips.push(began.elapsed());
        let began = Instant::now();
        gate.decide(known.clone()).await?;
        warm.push(began.elapsed());
        let began = Instant::now();
        let answer = gate.decide(request("claude-sonnet-4-6", Some(&live_key(&format!("cold-{run}-{index}"))))).await?;
        cold.push(began.elapsed());
        allowed(&answer.into_inner())?;
    }
    let [trip, warm, cold] = [trips, warm, cold].map(median);
    println!(
        "{{\"provider_us\":{},\"warm_us\":{},\"cold_us\":{},\"decisions\":{count}}}",
        trip.as_micros(),
        warm.as_micros(),
        cold.as_micros()
    );
    Ok(())
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort_unstable();
    times.get(times.len() / 2).copied().unwrap_or_default()
}

fn allowed(answer: &pb::DecideResponse) -> Result<(), Failed> {
    match &answer.decision {
        Some(pb::decide_response::Decision::Allow(_)) => Ok(()),
        other => Err(format!("not allowed: {other:?}").into()),
    }
}

async fn fill(gate: &str, from: u32, to: u32, keys_of_one: u32) -> Result<(), Failed> {
    let mut gate = client(gate).await?;
    let mut verified = 0;
    for first in (from..to).step_by(BATCH as usize) {
        let keys = first..to.min(first + BATCH);
        let requests = keys.map(|index| fill_request(index, keys_of_one)).collect();
        let mut results = gate.batch_decide(pb::BatchDecideRequest { requests }).await?.into_inner();
        while let Some(pb::BatchDecideResponse { result, .. }) = results.message().await? {
            if let Some(pb::batch_decide_response::Result::Response(response)) = result {
                verified += u32::from(response.liveness.is_some_and(|seen| seen.verdict == pb::Verdict::Valid as i32));
            }
        }
    }
    println!("{{\"asked\":{},\"valid\":{verified}}}", to - from);
    Ok(())
}

fn fill_request(index: u32, keys_of_one: u32) -> pb::DecideRequest {
    let mut request = request("claude-sonnet-4-6", Some(&live_key(&format!("fill-{index}"))));
    if let Some(spec) = &mut request.workspace_spec {
        spec.organization_id = format!("organization-{}", index / keys_of_one);
    }
    request
}

async fn specs(gate: &str, seed: u64, count: u32) -> Result<(), Failed> {
    let outcomes = random_specs::run(&mut client(gate).await?, seed, count).await?;
    let outcomes: Vec<String> = outcomes.iter().map(|(name, count)| format!("\"{name}\":{count}")).collect();
    println!("{{{}}}", outcomes.join(","));
    Ok(())
}
