//! The service on the wire: each RPC, health, reflection, deadlines, load, and shutdown.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use byok_gate::{
    domain::verdict::Verdict,
    grpc::{
        NAME,
        convert::pb::{self, policy_decision_service_client::PolicyDecisionServiceClient},
    },
    liveness::cache::{Cache, CacheSettings},
    server::Ended,
};
use tokio::task::JoinSet;
use tonic::{Code, Request, transport::Channel};
use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};
use tonic_reflection::pb::v1::{
    ServerReflectionRequest, server_reflection_client::ServerReflectionClient, server_reflection_request::MessageRequest,
    server_reflection_response::MessageResponse,
};

use crate::support::{
    binary::Serving,
    case::{self, Spec},
    gate::{Files, Server},
    prober::Scripted,
    vendor::{Behave, Row, Vendor},
};

const KEY: &str = "made-up-key";

fn row(path: &str, key: Option<&str>, status: u16, body: &str) -> Row {
    Row { path: Some(path.into()), key: key.map(str::to_owned), status: Some(status), body: body.into(), ..Row::default() }
}

/// A vendor whose list takes this one key.
async fn vendor() -> Vendor {
    Vendor::start(vec![
        row("/acme/v1/models", Some(KEY), 200, r#"{"data": []}"#),
        row("/acme/v1/models", None, 401, r#"{"error": {"code": "invalid_api_key"}}"#),
    ])
    .await
}

fn files(vendor: &Vendor) -> Files {
    let (registry, catalogue) = case::documents(vendor.address.port());
    Files::new(&registry, &catalogue, None)
}

fn request(model: &str, value: &str) -> pb::DecideRequest {
    let workspace =
        if value.is_empty() { BTreeMap::new() } else { BTreeMap::from([("ACME_API_KEY".into(), Some(value.into()))]) };
    let spec = Spec { model: model.into(), workspace, ..Spec::default() };
    pb::DecideRequest { workspace_spec: Some(spec.message()), checkpoint: pb::Checkpoint::Create as i32, ..Default::default() }
}

fn code(response: &pb::DecideResponse) -> Option<pb::DenyCode> {
    match response.decision.as_ref().unwrap() {
        pb::decide_response::Decision::Allow(_) => None,
        pb::decide_response::Decision::Deny(deny) => Some(deny.code()),
    }
}

// === the other RPCs ===

#[tokio::test]
async fn resolve_provider_names_the_owner_and_what_to_fetch() {
    let server = Server::start(files(&vendor().await).engine()).await;
    let mut client = server.client().await;
    let mut ask = async |runtime: &str, model: &str, names: &[&str]| {
        let request = pb::ResolveProviderRequest {
            runtime: runtime.into(),
            model: model.into(),
            credential_names: names.iter().map(ToString::to_string).collect(),
        };
        let answer = client.resolve_provider(request).await.unwrap().into_inner();
        let result = match answer.result.unwrap() {
            pb::resolve_provider_response::Result::Resolution(resolution) => {
                format!(
                    "{} {} {}",
                    resolution.provider,
                    resolution.billing_mode().as_str_name(),
                    resolution.accepted_env.join(",")
                )
            }
            pb::resolve_provider_response::Result::Deny(deny) => deny.code().as_str_name().to_owned(),
        };
        (result, answer.relevant_env.join(","), answer.warnings.len())
    };
    let expect = |result: &str, relevant: &str, warnings| (result.to_owned(), relevant.to_owned(), warnings);
    assert_eq!(
        ask("agent", " acme-large ", &[]).await,
        expect("acme BILLING_MODE_BYOK ACME_API_KEY,ACME_TOKEN", "ACME_API_KEY,ACME_TOKEN", 0)
    );
    assert_eq!(
        ask("agent", "twin-1", &["TWIN_B_KEY"]).await,
        expect("twin-b BILLING_MODE_BYOK TWIN_B_KEY,TWIN_SHARED_KEY", "TWIN_A_KEY,TWIN_SHARED_KEY,TWIN_B_KEY", 0)
    );
    assert_eq!(ask("agent", "platform-small", &[]).await, expect("platform BILLING_MODE_PLATFORM_MANAGED ", "", 0));
    assert_eq!(
        ask("agent", "acme-old", &[]).await,
        expect("acme BILLING_MODE_BYOK ACME_API_KEY,ACME_TOKEN", "ACME_API_KEY,ACME_TOKEN", 1)
    );
    assert_eq!(ask("agent", "over-1", &[]).await.0, "DENY_CODE_AMBIGUOUS_PROVIDER");
    assert_eq!(ask("agent", "ambient:x", &[]).await.0, "DENY_CODE_PROVIDER_NOT_BYOK");
    assert_eq!(ask("nowhere", "x", &[]).await.0, "DENY_CODE_RUNTIME_UNSUPPORTED");
    assert_eq!(ask("", "x", &[]).await.0, "DENY_CODE_RUNTIME_REQUIRED");
    assert_eq!(ask("agent", "", &[]).await.0, "DENY_CODE_MODEL_REQUIRED");
}

#[tokio::test]
async fn list_models_and_status_tell_what_is_loaded() {
    let files = files(&vendor().await);
    let server = Server::start(files.engine()).await;
    let mut client = server.client().await;
    let menu = client.list_models(pb::ListModelsRequest { runtime: "agent".into(), details: false }).await.unwrap().into_inner();
    let rows: Vec<String> = menu
        .models
        .iter()
        .map(|row| {
            let withdrawn = if row.withdrawn { " withdrawn" } else { "" };
            format!("{} {} {}{withdrawn}", row.model, row.provider, row.billing_mode().as_str_name())
        })
        .collect();
    assert_eq!(
        rows,
        [
            "acme-large acme BILLING_MODE_BYOK",
            "a/b acme BILLING_MODE_BYOK",
            "acme-old acme BILLING_MODE_BYOK withdrawn",
            "sub-1 subscription BILLING_MODE_BYOK",
            "twin-1 twin-a BILLING_MODE_BYOK",
            "twin-1 twin-b BILLING_MODE_BYOK",
            "platform-small platform BILLING_MODE_PLATFORM_MANAGED",
            "platform-large platform BILLING_MODE_PLATFORM_MANAGED",
            "platform-old platform BILLING_MODE_PLATFORM_MANAGED withdrawn",
        ]
    );
    let all = client.list_models(pb::ListModelsRequest::default()).await.unwrap().into_inner();
    // Beside that runtime's, those of one that has one model and of three that have five each.
    assert_eq!(all.models.len(), rows.len() + 1 + 3 * 5);
    // More for a menu, on request: providers that list nothing, names and what is deprecated.
    assert!(menu.open_providers.is_empty() && menu.models.iter().all(|row| !row.deprecated));
    let full = client.list_models(pb::ListModelsRequest { runtime: "agent".into(), details: true }).await.unwrap().into_inner();
    assert_eq!(full.models.len(), menu.models.len());
    let open: Vec<_> = full.open_providers.iter().map(|open| (open.provider.as_str(), open.model_pattern.as_str())).collect();
    assert!(open.contains(&("ambient", "^ambient:")), "{open:?}");
    assert!(full.open_providers.iter().all(|open| open.runtime == "agent" && !open.accepted_env.is_empty()));
    let unknown = client.list_models(pb::ListModelsRequest { runtime: "nowhere".into(), details: false }).await.unwrap_err();
    assert_eq!(unknown.code(), Code::NotFound);
    let status = client.get_registry_status(pb::GetRegistryStatusRequest {}).await.unwrap().into_inner();
    let registry = status.registry.unwrap();
    assert_eq!(registry.revision, menu.registry_revision);
    assert!(registry.source.ends_with("registry.yaml") && registry.last_reload_error.is_empty());
    let digest = ring::digest::digest(&ring::digest::SHA256, &std::fs::read(&registry.source).unwrap());
    let hex: String = digest.as_ref().iter().map(|byte| format!("{byte:02x}")).collect();
    assert_eq!(registry.sha256, hex);
    assert!(status.catalogue.unwrap().sha256.is_empty());
    assert_eq!((status.provider_count, status.runtime_count, status.model_count), (13, 5, 23));
    assert!(status.credential_names.contains(&"ACME_TOKEN".to_owned()) && status.credential_names.is_sorted());
}

#[tokio::test]
async fn a_batch_answers_every_item_by_its_index() {
    let vendor = vendor().await;
    let server = Server::start(files(&vendor).engine()).await;
    let mut client = server.client().await;
    let mut bad = request("acme-large", KEY);
    bad.checkpoint = 9;
    let mut organizations = request("acme-large", "");
    organizations.workspace_spec.as_mut().unwrap().credentials.push(pb::Credential {
        env_name: "ACME_API_KEY".into(),
        scope: 2,
        value: KEY.into(),
        unreadable: false,
    });
    let mut provision = request("acme-old", KEY);
    provision.checkpoint = pb::Checkpoint::Provision as i32;
    // Items that differ in one field each.
    let requests = vec![
        request("acme-large", KEY),
        request("acme-large", ""),
        request("acme-large", "made-up-dead"),
        bad,
        organizations,
        request("platform-small", KEY),
        request("acme-old", KEY),
        provision,
    ];
    let mut stream = client.batch_decide(pb::BatchDecideRequest { requests }).await.unwrap().into_inner();
    let mut results = BTreeMap::new();
    while let Some(item) = stream.message().await.unwrap() {
        let told = match item.result.unwrap() {
            pb::batch_decide_response::Result::Response(response) => {
                code(&response).map_or("ALLOW", |code| code.as_str_name()).to_owned()
            }
            pb::batch_decide_response::Result::Status(status) => format!("{:?} {}", Code::from_i32(status.code), status.message),
        };
        assert_eq!(results.insert(item.index, told), None, "index {} twice", item.index);
    }
    let expected = [
        "ALLOW",
        "DENY_CODE_MISSING_BYOK_CREDENTIAL",
        "DENY_CODE_INVALID_BYOK_CREDENTIAL",
        "InvalidArgument checkpoint: is required: CREATE, PROVISION, UPDATE or AUDIT",
        "ALLOW",
        "ALLOW",
        "DENY_CODE_MODEL_WITHDRAWN",
        "ALLOW",
    ];
    assert_eq!(results, (0..).zip(expected.map(str::to_owned)).collect());
    for count in [0, 257] {
        let requests = vec![request("acme-large", ""); count];
        let refused = client.batch_decide(pb::BatchDecideRequest { requests }).await.unwrap_err();
        assert_eq!(refused.code(), Code::InvalidArgument, "{count}");
    }
}

/// Items that are undecided at the batch's deadline say so; decided ones are returned.
#[tokio::test]
async fn a_batch_ends_at_its_deadline() {
    let silent = Row {
        path: Some("/acme/v1/models".into()),
        key: Some("made-up-slow".into()),
        behave: Some(Behave::Silent),
        ..Row::default()
    };
    let vendor = Vendor::start(vec![silent, row("/acme/v1/models", None, 200, r#"{"data": []}"#)]).await;
    let server = Server::start(files(&vendor).engine()).await;
    let mut message = Request::new(pb::BatchDecideRequest {
        requests: vec![request("acme-large", "made-up-slow"), request("acme-large", KEY)],
    });
    message.set_timeout(Duration::from_secs(2));
    let mut stream = server.client().await.batch_decide(message).await.unwrap().into_inner();
    let mut codes = BTreeMap::new();
    while let Some(item) = stream.message().await.unwrap() {
        let pb::batch_decide_response::Result::Response(response) = item.result.unwrap() else { panic!("undecided") };
        codes.insert(item.index, code(&response));
    }
    // The vendor's silence is an answer too, when the deadline leaves time to say so.
    assert_eq!(codes, BTreeMap::from([(0, Some(pb::DenyCode::ByokProbeTimeout)), (1, None)]));
}

// === what the provider sees ===

#[tokio::test]
async fn a_provider_sees_an_honest_request_and_nothing_more() {
    let vendor = Vendor::start(vec![
        row("/loose/v1/models", Some(KEY), 404, "{}"),
        row("/loose/v1/chat/completions", Some(KEY), 200, r#"{"choices": []}"#),
        row("/loose/v1/chat/completions", None, 401, r#"{"error": {"code": "invalid_api_key"}}"#),
    ])
    .await;
    let server = Server::start(files(&vendor).engine()).await;
    let mut message = request("loose/a \"model\"", "");
    let credentials = &mut message.workspace_spec.as_mut().unwrap().credentials;
    credentials.push(pb::Credential { env_name: "LOOSE_API_KEY".into(), scope: 1, value: KEY.into(), unreadable: false });
    assert_eq!(code(&server.client().await.decide(message).await.unwrap().into_inner()), None);
    let asked: Vec<_> = vendor.asked().into_iter().filter(|asked| asked.keys().contains(&KEY)).collect();
    let seen: Vec<(&str, &str)> = asked.iter().map(|asked| (asked.method.as_str(), asked.path.as_str())).collect();
    assert_eq!(seen, [("GET", "/loose/v1/models"), ("POST", "/loose/v1/chat/completions")]);
    let names: Vec<&str> = asked[1].headers.keys().map(String::as_str).collect();
    assert_eq!(names, ["accept", "accept-encoding", "authorization", "content-length", "content-type", "host", "user-agent"]);
    // No body is decompressed, so none may come compressed.
    assert!(asked.iter().all(|asked| asked.headers["accept-encoding"] == "identity"), "{asked:?}");
    assert!(asked[1].headers["user-agent"].starts_with("byok-gate/"), "{:?}", asked[1].headers);
    let body: serde_json::Value = serde_json::from_str(&asked[1].body).unwrap();
    assert_eq!(
        body,
        serde_json::json!({"model": "a \"model\"", "max_tokens": 1, "messages": [{"role": "user", "content": "."}]})
    );
}

/// Trusted by its documentation at first, without a delay for the caller; checked in the background, and refuted.
#[tokio::test]
async fn a_documented_endpoint_that_takes_anything_is_found_out() {
    let vendor = Vendor::start(vec![
        row("/acme/v1/models", None, 200, r#"{"data": []}"#),
        row("/acme/v1/chat/completions", None, 200, r#"{"choices": []}"#),
    ])
    .await;
    let server = Server::start(files(&vendor).engine()).await;
    let mut client = server.client().await;
    let mut verdict =
        async |key: &str| client.decide(request("acme-large", key)).await.unwrap().into_inner().liveness.unwrap().verdict();
    assert_eq!(verdict(KEY).await, pb::Verdict::Valid);
    // The made-up key goes out by itself; then a "yes" is worth nothing, on the list first and on the completion next.
    let mut found = pb::Verdict::Valid;
    for index in 0..200 {
        found = verdict(&format!("made-up-key-{index}")).await;
        if found != pb::Verdict::Valid {
            break;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert_eq!(found, pb::Verdict::NotCalibrated);
}

// === deadlines, size, panic ===

#[tokio::test]
async fn a_short_deadline_gets_a_timeouts_decision_before_it_ends() {
    let silent = Row { behave: Some(Behave::Silent), ..Row::default() };
    let vendor = Vendor::start(vec![silent]).await;
    let server = Server::start(files(&vendor).engine()).await;
    let mut message = Request::new(request("acme-large", KEY));
    message.set_timeout(Duration::from_secs(1));
    let response = server.client().await.decide(message).await.unwrap().into_inner();
    assert_eq!(code(&response), Some(pb::DenyCode::ByokProbeTimeout));
}

#[tokio::test]
async fn a_request_over_the_limit_is_refused_with_the_limit() {
    let server = Server::start(files(&vendor().await).engine()).await;
    let mut message = request("acme-large", "");
    let long = |name: &str| pb::Credential { env_name: name.into(), scope: 1, value: "v".repeat(60 * 1024), unreadable: false };
    message.workspace_spec.as_mut().unwrap().credentials.extend(["A", "B", "C", "D", "E"].map(long));
    let refused = server.client().await.decide(message).await.unwrap_err();
    assert_eq!(refused.code(), Code::InvalidArgument);
    assert!(refused.message().contains("262144"), "{refused:?}");
}

#[tokio::test]
async fn a_panic_in_the_probe_is_a_retryable_denial_and_the_server_goes_on() {
    let prober = Scripted::new(Verdict::Valid);
    prober.set(|script| script.panics = true);
    let cache = Arc::new(Cache::new(prober, CacheSettings::default()));
    let server = Server::start(files(&vendor().await).engine_over(cache)).await;
    let mut client = server.client().await;
    for _ in 0..3 {
        let response = client.decide(request("acme-large", KEY)).await.unwrap().into_inner();
        assert_eq!(code(&response), Some(pb::DenyCode::ByokProbeNotAttempted));
        assert_eq!(response.liveness.unwrap().verdict(), pb::Verdict::NotAttempted);
    }
    let response = client.decide(request("platform-small", "")).await.unwrap().into_inner();
    assert_eq!(code(&response), None);
}

// === load ===

#[tokio::test]
async fn a_thousand_callers_with_one_credential_reach_the_provider_once() {
    let vendor = vendor().await;
    let server = Server::start(files(&vendor).engine()).await;
    let client = server.client().await;
    let mut callers = JoinSet::new();
    for _ in 0..1_000 {
        let mut client = client.clone();
        callers.spawn(async move { client.decide(request("acme-large", KEY)).await.unwrap().into_inner() });
    }
    let mut ids = std::collections::BTreeSet::new();
    while let Some(response) = callers.join_next().await {
        let response = response.unwrap();
        assert_eq!(code(&response), None);
        ids.insert(response.decision_id);
    }
    assert_eq!(ids.len(), 1_000);
    assert_eq!(vendor.asked_with(KEY), 1);
    // And at most one calibration, in the background.
    assert!(vendor.asked().len() <= 2, "{:?}", vendor.asked());
}

// === health and reflection ===

async fn health(channel: &Channel, service: &str) -> Result<String, Code> {
    let request = HealthCheckRequest { service: service.into() };
    let answer = HealthClient::new(channel.clone()).check(request).await.map_err(|status| status.code())?;
    Ok(answer.into_inner().status().as_str_name().to_owned())
}

#[tokio::test]
async fn health_agrees_for_the_server_and_the_service_and_knows_no_other() {
    let server = Server::start(files(&vendor().await).engine()).await;
    let channel = server.channel().await;
    assert_eq!(health(&channel, "").await, Ok("SERVING".into()));
    assert_eq!(health(&channel, NAME).await, Ok("SERVING".into()));
    assert_eq!(health(&channel, "nobody").await, Err(Code::NotFound));
}

#[tokio::test]
async fn reflection_lists_and_describes_the_service() {
    let server = Server::start(files(&vendor().await).engine()).await;
    let channel = server.channel().await;
    let ask = |request| {
        let mut client = ServerReflectionClient::new(channel.clone());
        let request = ServerReflectionRequest { host: String::new(), message_request: Some(request) };
        async move {
            let mut answers = client.server_reflection_info(futures_util::stream::iter([request])).await.unwrap().into_inner();
            answers.message().await.unwrap().unwrap().message_response.unwrap()
        }
    };
    let MessageResponse::ListServicesResponse(list) = ask(MessageRequest::ListServices(String::new())).await else {
        panic!("no list")
    };
    let names: Vec<String> = list.service.into_iter().map(|service| service.name).collect();
    assert!(names.contains(&NAME.to_owned()) && names.contains(&"grpc.health.v1.Health".to_owned()), "{names:?}");
    let described = ask(MessageRequest::FileContainingSymbol(NAME.into())).await;
    assert!(matches!(described, MessageResponse::FileDescriptorResponse(_)), "{described:?}");
}

// === shutdown ===

/// A call in flight at the signal is answered; health turns; no new connection is accepted; the exit code is 0.
#[tokio::test]
async fn a_signal_drains_and_exits_0() {
    let silent = Row { path: Some("/acme/v1/models".into()), behave: Some(Behave::Silent), ..Row::default() };
    let vendor = Vendor::start(vec![silent]).await;
    let files = files(&vendor);
    let flags = files.flags();
    let serving = Serving::start(&flags.iter().map(String::as_str).collect::<Vec<_>>()).await;
    let mut client = serving.client().await;
    let waiting = tokio::spawn(async move { client.decide(request("acme-large", KEY)).await.unwrap().into_inner() });
    while vendor.asked().is_empty() {
        tokio::task::yield_now().await;
    }
    serving.terminate().await;
    assert_eq!(code(&waiting.await.unwrap()), Some(pb::DenyCode::ByokProbeTimeout));
    let address = serving.address.clone();
    let ended = serving.ended().await;
    assert_eq!(ended.status.code(), Some(0), "{ended:?}");
    assert!(ended.stdout.contains("\"event\":\"stopped\""), "{}", ended.stdout);
    assert!(tokio::net::TcpStream::connect(address).await.is_err());
}

#[tokio::test]
async fn a_server_without_calls_is_drained_at_once() {
    let mut server = Server::start(files(&vendor().await).engine()).await;
    server.stop();
    assert_eq!(server.ended().await, Ended::Drained);
}

/// The service as it is started without any file.
#[tokio::test]
async fn it_serves_the_embedded_registry_without_any_file() {
    let serving = Serving::start(&[]).await;
    let mut client: PolicyDecisionServiceClient<Channel> = serving.client().await;
    let status = client.get_registry_status(pb::GetRegistryStatusRequest {}).await.unwrap().into_inner();
    assert_eq!((status.registry.unwrap().source.as_str(), status.provider_count, status.runtime_count), ("embedded", 32, 4));
    let spec = pb::WorkspaceSpec { runtime: "claude-code".into(), model: "claude-opus-4-8".into(), ..Default::default() };
    let request = pb::DecideRequest { workspace_spec: Some(spec), checkpoint: 1, ..Default::default() };
    let response = client.decide(request).await.unwrap().into_inner();
    assert_eq!(code(&response), Some(pb::DenyCode::MissingByokCredential));
    drop(client);
    serving.terminate().await;
    assert_eq!(serving.ended().await.status.code(), Some(0));
}
