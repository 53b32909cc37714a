//! Checks the promises of the proto's comments against the service: limits, reasons of errors, what an allow is.

use std::time::Duration;
use std::{collections::BTreeMap, fs, num::NonZeroU32};

use byok_gate::grpc::{convert::pb, limits::Limits};
use prost::Message;
use tonic::{Code, Status};
use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};
use tonic_types::StatusExt;

use crate::support::{
    case::{self, Spec},
    edge::{Edge, Held, code_of, decide, grpc, raw, settings},
    gate::{Files, Server},
    prober::Scripted,
};

const PROTO: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/proto/byokgate/v1/policy_decision.proto");

/// What the comment above each message and field says, by `Message` and `Message.field`.
fn comments() -> BTreeMap<String, String> {
    let (mut found, mut message, mut comment) = (BTreeMap::new(), String::new(), String::new());
    for line in fs::read_to_string(PROTO).unwrap().lines() {
        let line = line.trim();
        if let Some(text) = line.strip_prefix("//") {
            comment.push_str(text);
            continue;
        }
        if let Some(rest) = line.strip_prefix("message ") {
            message = rest.split([' ', '{']).next().unwrap().to_owned();
            found.insert(message.clone(), std::mem::take(&mut comment));
        } else if let Some((declared, _)) = line.split_once(" = ") {
            let field = declared.split(' ').next_back().unwrap();
            found.insert(format!("{message}.{field}"), std::mem::take(&mut comment));
        }
        comment.clear();
    }
    found
}

/// Every `At most N` of a comment.
fn bounds(comment: &str) -> Vec<usize> {
    let number = |text: &str| text.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok();
    let lower = comment.to_lowercase();
    lower.match_indices("at most ").filter_map(|(at, words)| number(&lower[at + words.len()..])).collect()
}

#[test]
fn every_stated_bound_is_the_services_own() {
    let comments = comments();
    let limits = Limits::default();
    let stated = |place: &str| bounds(&comments[place]);
    let held: [(&str, &[usize]); 18] = [
        ("Credential.env_name", &[limits.name_bytes]),
        ("Credential.value", &[limits.credential_bytes]),
        ("WorkspaceSpec.workspace_id", &[limits.name_bytes]),
        ("WorkspaceSpec.organization_id", &[limits.name_bytes]),
        ("WorkspaceSpec.runtime", &[limits.name_bytes]),
        ("WorkspaceSpec.model", &[limits.model_bytes]),
        ("WorkspaceSpec.credentials", &[limits.credentials, 32]),
        ("WorkspaceSpec.unreadable_scopes", &[16]),
        ("WorkspaceSpec.tenant_base_url_env", &[limits.base_url_names, limits.name_bytes]),
        ("DecideRequest", &[limits.message_bytes]),
        ("BatchDecideRequest", &[limits.batch_message_bytes]),
        ("BatchDecideRequest.requests", &[limits.message_bytes]),
        ("ResolveProviderRequest.runtime", &[limits.name_bytes]),
        ("ResolveProviderRequest.model", &[limits.model_bytes]),
        ("ResolveProviderRequest.credential_names", &[limits.resolve_names, limits.name_bytes]),
        ("ListModelsRequest.runtime", &[limits.name_bytes]),
        ("DecideResponse.relevant_env", &[32]),
        ("ResolveProviderResponse.relevant_env", &[32]),
    ];
    for (place, expect) in held {
        assert_eq!(stated(place), expect, "{place}: {}", comments[place]);
    }
    assert!(comments["BatchDecideRequest.requests"].contains(&format!("1 to {} requests", limits.batch_items)));
    // No other comment states a limit without a check.
    let known = ["ListModelsResponse", "DecideResponse.relevant_base_url_env", "ResolveProviderResponse.relevant_base_url_env"];
    for (place, comment) in &comments {
        let listed = held.iter().any(|(held, _)| held == place) || known.contains(&place.as_str());
        assert!(
            listed || bounds(comment).iter().all(|bound| *bound == 0) || place.contains("max_liveness_age"),
            "{place}: {comment}"
        );
    }
    // A caller that sends all names that matter to a model, in both scopes, is within the limit.
    assert!(limits.credentials >= 2 * 32);
}

fn reason(status: &Status) -> String {
    let info = status.get_details_error_info().unwrap_or_else(|| panic!("no ErrorInfo: {status:?}"));
    assert_eq!(info.domain, "byok-gate");
    let named = format!("ERROR_REASON_{}", info.reason);
    assert!(pb::ErrorReason::from_str_name(&named).is_some(), "{named} is not on the list");
    info.reason
}

/// Every error says its reason, in the details that its code has.
#[tokio::test]
async fn every_error_has_a_reason_of_the_closed_list() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("tokens");
    let token = |name: &str| format!("Bearer made-up-token-of-the-{name}");
    fs::write(
        &file,
        "made-up-token-of-the-platform\nmade-up-token-of-the-operator operator\nmade-up-token-of-the-workspace workspace ws-1\n",
    )
    .unwrap();
    let mut settings = settings();
    settings.callers.token_file = Some(file);
    settings.callers.workspace_calls_per_minute = NonZeroU32::new(2).unwrap();
    settings.limits.message_bytes = 4096;
    settings.limits.decisions = 1;
    settings.limits.decisions_waiting = 0;
    settings.deadlines.decide = Duration::from_millis(300);
    let held = Held::new(false);
    let edge = Edge::start(settings, held.engine()).await;
    let channel = edge.plain().await;
    let client = || pb::policy_decision_service_client::PolicyDecisionServiceClient::new(channel.clone());
    let asked = |message: pb::DecideRequest, authorization: Option<String>| {
        let mut request = tonic::Request::new(message);
        if let Some(value) = authorization {
            request.metadata_mut().insert("authorization", value.parse().unwrap());
        }
        let mut client = client();
        async move { client.decide(request).await.unwrap_err() }
    };
    let mut large = decide("");
    large.workspace_spec.as_mut().unwrap().organization_id = "o".repeat(5000);
    let at_provision = || pb::DecideRequest { checkpoint: pb::Checkpoint::Provision as i32, ..decide("made-up-key") };
    let mut elsewhere = at_provision();
    elsewhere.workspace_spec.as_mut().unwrap().workspace_id = "ws-2".to_owned();
    for (message, authorization, code, expect) in [
        (decide("a"), None, Code::Unauthenticated, "TOKEN_MISSING"),
        (decide("a"), Some("Basic bWFkZS11cA==".to_owned()), Code::Unauthenticated, "TOKEN_MALFORMED"),
        (decide("a"), Some(token("stranger")), Code::Unauthenticated, "TOKEN_UNKNOWN"),
        (decide("a"), Some(token("operator")), Code::PermissionDenied, "METHOD_NOT_ALLOWED"),
        (elsewhere, Some(token("workspace")), Code::PermissionDenied, "REQUEST_NOT_ALLOWED"),
        (pb::DecideRequest::default(), Some(token("platform")), Code::InvalidArgument, "BAD_REQUEST"),
        (large, Some(token("platform")), Code::InvalidArgument, "REQUEST_TOO_LARGE"),
    ] {
        let status = asked(message, authorization).await;
        assert_eq!((status.code(), reason(&status).as_str()), (code, expect), "{status:?}");
        assert_eq!(status.get_details_bad_request().is_some(), code == Code::InvalidArgument, "{status:?}");
    }
    // A taken slot, and the workspace's rate.
    let first = tokio::spawn({
        let (mut client, mut request) = (client(), tonic::Request::new(decide("made-up-first")));
        request.metadata_mut().insert("authorization", token("platform").parse().unwrap());
        async move { client.decide(request).await }
    });
    while held.asked() == 0 {
        tokio::task::yield_now().await;
    }
    let full = asked(decide("made-up-second"), Some(token("platform"))).await;
    assert_eq!((full.code(), reason(&full).as_str()), (Code::ResourceExhausted, "LIMIT_REACHED"));
    assert_eq!(full.get_details_error_info().unwrap().metadata["limit"], "limits.decisions");
    assert!(full.get_details_retry_info().is_some());
    first.await.unwrap().unwrap();
    held.open();
    let mut allowed = client();
    let mut request = tonic::Request::new(at_provision());
    request.metadata_mut().insert("authorization", token("workspace").parse().unwrap());
    allowed.decide(request).await.unwrap();
    let often = asked(at_provision(), Some(token("workspace"))).await;
    assert_eq!(often.get_details_error_info().unwrap().metadata["limit"], "callers.workspace_calls_per_minute");
    assert!(often.get_details_retry_info().unwrap().retry_delay.unwrap().as_secs() > 1, "{often:?}");
    // ListModels for an unknown runtime.
    let mut request = tonic::Request::new(pb::ListModelsRequest { runtime: "nowhere".into(), details: false });
    request.metadata_mut().insert("authorization", token("platform").parse().unwrap());
    let unknown = client().list_models(request).await.unwrap_err();
    assert_eq!((unknown.code(), reason(&unknown).as_str()), (Code::NotFound, "UNKNOWN_RUNTIME"));
}

/// Likewise where the gRPC library refuses: in trailers, as a client of any language reads them.
#[tokio::test]
async fn what_the_library_refuses_has_a_reason_too() {
    let mut settings = settings();
    settings.deadlines.decide = Duration::from_millis(200);
    let edge = Edge::start(settings, Held::new(false).engine()).await;
    let mut sender = raw(edge.tcp()).await;
    let message = decide("made-up-key").encode_to_vec();
    const DECIDE: &str = "/byokgate.v1.PolicyDecisionService/Decide";
    type Refused<'a> = (&'a str, &'a [(&'a str, &'a str)], &'a [u8], Code, &'a str);
    let requests: [Refused<'_>; 4] = [
        (DECIDE, &[], b"\xff\xff\xff", Code::InvalidArgument, "REQUEST_UNREADABLE"),
        (DECIDE, &[("grpc-encoding", "gzip")], &message, Code::Unimplemented, "UNSUPPORTED"),
        ("/byokgate.v1.PolicyDecisionService/Nothing", &[], &message, Code::Unimplemented, "UNSUPPORTED"),
        (DECIDE, &[("grpc-timeout", "1n")], &message, Code::DeadlineExceeded, "DEADLINE"),
    ];
    for (path, headers, message, code, expect) in requests {
        let response = sender.send_request(grpc(path, headers, message)).await.unwrap();
        let status = Status::from_header_map(response.headers()).unwrap_or_else(|| panic!("{response:?}"));
        assert_eq!((status.code(), reason(&status).as_str()), (code, expect), "{path} {headers:?}");
    }
    assert_eq!(code_of(&mut sender, grpc(DECIDE, &[], &message)).await, Code::Ok, "a TIMEOUT is a decision");
    // The health protocol has a code of its own for a service that is not there.
    let mut health = HealthClient::new(edge.plain().await);
    let status = health.check(HealthCheckRequest { service: "nobody".into() }).await.unwrap_err();
    assert_eq!((status.code(), reason(&status).as_str()), (Code::NotFound, "UNSUPPORTED"));
}

/// An item's status says as much as a call's.
#[tokio::test]
async fn a_batchs_item_has_the_details_of_a_call() {
    let edge = Edge::start(settings(), Held::new(true).engine()).await;
    let mut client = pb::policy_decision_service_client::PolicyDecisionServiceClient::new(edge.plain().await);
    let batch = pb::BatchDecideRequest { requests: vec![decide("made-up-key"), pb::DecideRequest::default()] };
    let mut stream = client.batch_decide(batch).await.unwrap().into_inner();
    let mut statuses = Vec::new();
    while let Some(item) = stream.message().await.unwrap() {
        if let Some(pb::batch_decide_response::Result::Status(status)) = item.result {
            statuses.push((item.index, status));
        }
    }
    let [(1, status)] = statuses.as_slice() else { panic!("{statuses:?}") };
    let types: Vec<&str> = status.details.iter().map(|detail| detail.type_url.rsplit('/').next().unwrap()).collect();
    assert_eq!(types, ["google.rpc.ErrorInfo", "google.rpc.BadRequest"], "{status:?}");
    let info = tonic_types::pb::ErrorInfo::decode(&*status.details[0].value).unwrap();
    assert_eq!((info.reason.as_str(), info.domain.as_str()), ("BAD_REQUEST", "byok-gate"));
}

async fn gate(prober: std::sync::Arc<Scripted>) -> Server {
    let (registry, catalogue) = case::documents(1);
    let cache = byok_gate::liveness::cache::Cache::new(prober, byok_gate::liveness::cache::CacheSettings::default());
    Server::start(Files::new(&registry, &catalogue, None).engine_over(std::sync::Arc::new(cache))).await
}

fn asked(checkpoint: pb::Checkpoint, spec: &Spec) -> pb::DecideRequest {
    pb::DecideRequest { workspace_spec: Some(spec.message()), checkpoint: checkpoint as i32, ..Default::default() }
}

/// A running workspace is decided as at its next start, and a caller that does not act on an answer gets the same answer.
#[tokio::test]
async fn audit_and_report_only_are_answered_as_provision_is() {
    use byok_gate::domain::verdict::Verdict;
    for verdict in [Verdict::Valid, Verdict::Invalid, Verdict::Timeout, Verdict::RateLimited] {
        let server = gate(Scripted::new(verdict)).await;
        let mut client = server.client().await;
        let spec =
            Spec { model: "acme-large".into(), workspace: [("ACME_API_KEY".into(), Some("k".into()))].into(), ..Spec::default() };
        let mut decisions = Vec::new();
        for (checkpoint, report_only) in
            [(pb::Checkpoint::Provision, false), (pb::Checkpoint::Audit, false), (pb::Checkpoint::Provision, true)]
        {
            let request = pb::DecideRequest { report_only, ..asked(checkpoint, &spec) };
            let response = client.decide(request).await.unwrap().into_inner();
            let case::Answered::Decision(mut record, _) = case::Answered::decision(&response) else { panic!("{response:?}") };
            record.served_from.clear();
            decisions.push(record);
        }
        assert_eq!(decisions[0], decisions[1], "{verdict}");
        assert_eq!(decisions[0], decisions[2], "{verdict}");
    }
}

/// The names that mattered are those that ResolveProvider names, on an allow and on a denial.
#[tokio::test]
async fn a_decision_names_what_mattered_as_resolve_provider_does() {
    let server = gate(Scripted::new(byok_gate::domain::verdict::Verdict::Valid)).await;
    let mut client = server.client().await;
    for (model, value) in
        [("acme-large", "made-up-key"), ("acme-large", ""), ("twin-1", ""), ("over-1", ""), ("platform-small", "")]
    {
        let workspace = if value.is_empty() { BTreeMap::new() } else { [("ACME_API_KEY".into(), Some(value.into()))].into() };
        let spec = Spec { model: model.into(), workspace, ..Spec::default() };
        let resolve = pb::ResolveProviderRequest { runtime: "agent".into(), model: model.into(), ..Default::default() };
        let resolved = client.resolve_provider(resolve).await.unwrap().into_inner();
        let decided = client.decide(asked(pb::Checkpoint::Create, &spec)).await.unwrap().into_inner();
        assert_eq!(decided.relevant_env, resolved.relevant_env, "{model}");
        assert_eq!(decided.relevant_base_url_env, resolved.relevant_base_url_env, "{model}");
        assert_eq!(decided.relevant_env.is_empty(), model == "platform-small", "{model}");
    }
    // With the names that it lists, the answer is the same with any others.
    let spec = Spec { model: "acme-large".into(), ..Spec::default() };
    let nothing = client.decide(asked(pb::Checkpoint::Create, &spec)).await.unwrap().into_inner();
    assert!(nothing.relevant_base_url_env.contains(&"OPENAI_BASE_URL".to_owned()), "{nothing:?}");
}

/// A credential that could be read counts, even if its scope could not be listed; the rest of the scope is unknown.
#[tokio::test]
async fn a_credential_of_an_unreadable_scope_still_counts() {
    let server = gate(Scripted::new(byok_gate::domain::verdict::Verdict::Valid)).await;
    let mut client = server.client().await;
    let mut ask = async |scope: pb::Scope, unreadable: &[&str]| {
        let names = unreadable.iter().map(|name| serde_json::from_value((*name).into()).unwrap()).collect();
        let mut spec = Spec { model: "acme-large".into(), unreadable_scopes: names, ..Spec::default() };
        let rows = if scope == pb::Scope::Workspace { &mut spec.workspace } else { &mut spec.organization };
        rows.insert("ACME_API_KEY".into(), Some("made-up-key".into()));
        let response = client.decide(asked(pb::Checkpoint::Create, &spec)).await.unwrap().into_inner();
        match response.decision.unwrap() {
            pb::decide_response::Decision::Allow(_) => "ALLOW",
            pb::decide_response::Decision::Deny(deny) => deny.code().as_str_name(),
        }
    };
    assert_eq!(ask(pb::Scope::Workspace, &["WORKSPACE"]).await, "ALLOW");
    assert_eq!(ask(pb::Scope::Workspace, &["ORGANIZATION"]).await, "ALLOW");
    assert_eq!(ask(pb::Scope::Organization, &["ORGANIZATION"]).await, "ALLOW");
    // A workspace's row of that name, which nobody could see, would hide it.
    assert_eq!(ask(pb::Scope::Organization, &["WORKSPACE"]).await, "DENY_CODE_CREDENTIAL_SCOPE_UNREADABLE");
}
