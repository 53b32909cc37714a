//! Every decision writes one event, with any names and any reader of the log.

use std::{collections::BTreeMap, process::Stdio, time::Duration};
use strum::VariantArray;

use byok_gate::{
    domain::{
        protocol::HeaderFamily,
        verdict::{BillingMode, Cause, DenyCode, MadeUpKey, ServedFrom, Source, Unreached, Verdict, WarningCode, Withheld},
    },
    grpc::convert::pb,
    telemetry::{cause, metrics::calls::CODES},
};
use futures_util::StreamExt;
use prost::Message;
use serde_json::{Value, json};
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, BufReader},
    time::timeout,
};
use tonic::Code;

use crate::support::{
    binary::{self, PATIENCE, Serving},
    case::{self, Answered, Case, Record, Spec},
    edge::{code_of, grpc, raw},
    events::{self, decision_events},
    gate::Files,
    vendor::{Behave, Row, Vendor},
};

const DECIDE: &str = "/byokgate.v1.PolicyDecisionService/Decide";

/// A workspace with a platform-billed model.
fn platform(workspace_id: &str) -> pb::DecideRequest {
    let spec = Spec { model: "platform/acme-large".into(), workspace_id: workspace_id.into(), ..Spec::default() };
    pb::DecideRequest { workspace_spec: Some(spec.message()), checkpoint: pb::Checkpoint::Create as i32, ..Default::default() }
}

/// One without its credential.
fn missing(workspace_id: &str) -> pb::DecideRequest {
    let spec = Spec { model: "acme-large".into(), workspace_id: workspace_id.into(), ..Spec::default() };
    pb::DecideRequest { workspace_spec: Some(spec.message()), checkpoint: pb::Checkpoint::Create as i32, ..Default::default() }
}

async fn files(config: Option<&str>) -> Files {
    let vendor = Vendor::start(Vec::new()).await;
    let (registry, catalogue) = case::documents(vendor.address.port());
    Files::new(&registry, &catalogue, config)
}

async fn serving(files: &Files, more: &[&str]) -> Serving {
    let flags = files.flags();
    Serving::start(&[&flags.iter().map(String::as_str).collect::<Vec<_>>()[..], more].concat()).await
}

/// A create whose key has to be probed.
fn with_key(workspace_id: &str) -> pb::DecideRequest {
    let workspace = BTreeMap::from([("ACME_API_KEY".to_owned(), Some("made-up-key".to_owned()))]);
    let spec = Spec { model: "acme-large".into(), workspace_id: workspace_id.into(), workspace, ..Spec::default() };
    pb::DecideRequest { workspace_spec: Some(spec.message()), checkpoint: pb::Checkpoint::Create as i32, ..Default::default() }
}

async fn until_asked(vendor: &Vendor) {
    timeout(PATIENCE, async {
        while vendor.asked().is_empty() {
            tokio::task::yield_now().await;
        }
    })
    .await
    .unwrap();
}

async fn log_of(serving: Serving) -> String {
    serving.terminate().await;
    let ended = serving.ended().await;
    assert!(ended.status.success(), "{ended:?}");
    ended.stdout
}

/// The expected event of an answer.
fn expected(request: &pb::DecideRequest, response: &pb::DecideResponse) -> Value {
    let Answered::Decision(record, _) = Answered::decision(response) else { panic!("{response:?}") };
    let Record { decision, code, provider, billing_mode, source, credential_env, credential_scope, .. } = *record;
    let Record { verdict, upstream_status, served_from, warnings, .. } = *record;
    let spec = request.workspace_spec.as_ref().unwrap();
    const UNVERIFIED: [&str; 3] = ["CREDENTIAL_UNVERIFIED", "STALE_LIVENESS", "REPORT_ONLY"];
    let unverified = warnings.iter().any(|warning| UNVERIFIED.contains(&warning.as_str()));
    let is_loud = decision == "DENY" || (unverified && verdict != "NO_SERVER_SURFACE");
    let mut event = json!({
        "event": "decision", "schema_version": 1, "level": if is_loud { "WARN" } else { "INFO" },
        "decision_id": response.decision_id, "outcome": decision, "code": code, "provider": provider,
        "checkpoint": request.checkpoint().as_str_name().strip_prefix("CHECKPOINT_"),
        "workspace_id": spec.workspace_id, "organization_id": spec.organization_id,
        "caller": "anonymous", "runtime": spec.runtime, "model": spec.model.trim(),
        "billing_mode": billing_mode, "source": source, "credential_env": credential_env,
        "credential_scope": credential_scope, "verdict": verdict, "served_from": served_from, "warnings": warnings,
        "registry_revision": response.registry_revision, "catalogue_revision": response.catalogue_revision,
    });
    let event_map = event.as_object_mut().unwrap();
    if upstream_status > 0 {
        event_map.insert("upstream_status".into(), upstream_status.into());
    }
    if let Some(pb::decide_response::Decision::Deny(deny)) = &response.decision {
        event_map.insert("reason".into(), deny.message.clone().into());
        event_map.insert("operator_hint".into(), deny.operator_hint.clone().into());
    }
    let is_plain = decision == "ALLOW" && warnings.is_empty();
    if let Some(liveness) = response.liveness.as_ref().filter(|_| !is_plain) {
        event_map.insert("endpoint_host".into(), liveness.endpoint_host.clone().into());
        event_map.insert("probe".into(), liveness.probe.clone().into());
    }
    let always = ["runtime", "model"];
    event_map.retain(|name, value| always.contains(&name.as_str()) || !(value == "" || *value == json!([])));
    event
}

#[tokio::test]
async fn every_case_leaves_the_event_of_its_answer() {
    let cases = futures_util::stream::iter(case::all()).map(|(name, case)| compared(name, case));
    let compared: usize = cases.buffer_unordered(8).collect::<Vec<_>>().await.iter().sum();
    assert!(compared > 60, "only {compared} decisions");
}

/// Compares each event of a case with its answer. How many there were.
async fn compared(name: String, case: Case) -> usize {
    let vendor = Vendor::start(case.vendor.clone()).await;
    let (registry, catalogue) = case::documents(vendor.address.port());
    let config = case.config.as_ref().map(|config| serde_yaml::to_string(config).unwrap());
    let serving = serving(&Files::new(&registry, &catalogue, config.as_deref()), &[]).await;
    let mut client = serving.client().await;
    let (mut decided, mut invalid) = (Vec::new(), 0);
    for at in case.expect.iter().flat_map(|expect| &expect.at) {
        let request = case.request(at);
        match client.decide(request.clone()).await {
            Ok(response) => decided.push((request, response.into_inner())),
            Err(status) if status.code() == Code::InvalidArgument => invalid += 1,
            Err(status) => panic!("{name}: {status}"),
        }
    }
    drop(client);
    let events = decision_events(&log_of(serving).await);
    let (decisions, undecided): (Vec<_>, Vec<_>) = events.into_iter().partition(|event| event["event"] == "decision");
    assert_eq!(decisions.len(), decided.len(), "{name}: one event for each decision");
    assert_eq!(undecided.len(), invalid, "{name}: {undecided:?}");
    let as_they_were = |event: &Value| event["grpc_code"] == "INVALID_ARGUMENT" && event["peer"] == "127.0.0.1";
    assert!(undecided.iter().all(as_they_were), "{name}: {undecided:?}");
    for ((request, response), mut event) in decided.iter().zip(decisions) {
        let seen = event.as_object_mut().unwrap();
        seen.remove("timestamp").unwrap();
        seen.remove("duration_us").unwrap();
        assert_eq!(seen.remove("age_ms").is_some(), seen.contains_key("served_from"), "{name}");
        let unreadable = seen.remove("unreadable_scopes");
        // What the answer lacks: the reason.
        let mut take = |field| seen.remove(field).map_or_else(String::new, |word| word.as_str().unwrap().to_owned());
        let [header, cause, unreached, withheld, made_up, now] =
            ["header", "cause", "unreached", "withheld", "made_up_keys", "verdict_now"].map(&mut take);
        let verdict = seen.get("verdict").and_then(Value::as_str).unwrap_or_default();
        let heard = if now.is_empty() { verdict } else { now.as_str() };
        let answered = seen.contains_key("upstream_status") && now.is_empty();
        if seen["outcome"] == "ALLOW" && !seen.contains_key("warnings") {
            assert_eq!([header, cause, made_up], [""; 3], "{name}: there is nothing to say");
        } else if answered && seen["served_from"] != "BREAKER" {
            assert_eq!((header.is_empty(), cause.is_empty(), made_up.is_empty()), (false, verdict == "VALID", false), "{name}");
        }
        assert_eq!(unreadable.is_some(), seen.get("code") == Some(&json!("CREDENTIAL_SCOPE_UNREADABLE")), "{name}");
        let scopes = [json!(["WORKSPACE"]), json!(["ORGANIZATION"]), json!(["WORKSPACE", "ORGANIZATION"])];
        assert!(unreadable.is_none_or(|unreadable| scopes.contains(&unreadable)), "{name}");
        assert_eq!(!unreached.is_empty(), heard == "UNREACHABLE", "{name}");
        assert_eq!(!withheld.is_empty(), heard == "NOT_ATTEMPTED", "{name}");
        assert_eq!(!now.is_empty(), seen.get("served_from") == Some(&json!("STALE")), "{name}");
        assert_eq!(event, expected(request, response), "{name}");
    }
    decided.len()
}

/// The schema's lists are the words that the code has.
#[test]
fn the_schema_knows_every_word() {
    let schema: Value = serde_json::from_str(events::SCHEMA).unwrap();
    let fields = &schema["$defs"]["decision"]["properties"];
    let words = |all: Vec<&str>| json!(all);
    assert_eq!(fields["code"]["enum"], words(DenyCode::VARIANTS.iter().map(|word| word.as_str()).collect()));
    assert_eq!(fields["verdict"]["enum"], words(Verdict::VARIANTS.iter().map(|word| word.as_str()).collect()));
    assert_eq!(fields["billing_mode"]["enum"], words(BillingMode::VARIANTS.iter().map(|word| word.as_str()).collect()));
    assert_eq!(fields["source"]["enum"], words(Source::VARIANTS.iter().map(|word| word.as_str()).collect()));
    assert_eq!(fields["served_from"]["enum"], words(ServedFrom::VARIANTS.iter().map(|word| word.as_str()).collect()));
    assert_eq!(fields["warnings"]["items"]["enum"], words(WarningCode::VARIANTS.iter().map(|word| word.as_str()).collect()));
    assert_eq!(fields["cause"]["enum"], words(Cause::VARIANTS.iter().map(|word| word.as_str()).collect()));
    assert_eq!(fields["header"]["enum"], words(HeaderFamily::VARIANTS.iter().map(|word| word.as_str()).collect()));
    assert_eq!(fields["unreached"]["enum"], words(Unreached::VARIANTS.iter().map(|why| cause::unreached(*why)).collect()));
    assert_eq!(fields["withheld"]["enum"], words(Withheld::VARIANTS.iter().map(|why| cause::withheld(*why)).collect()));
    let made_up = [
        MadeUpKey::NotAsked,
        MadeUpKey::NotWaitedFor,
        MadeUpKey::NoAnswer,
        MadeUpKey::Inconclusive(429),
        MadeUpKey::Refused(401),
        MadeUpKey::Accepted,
    ];
    assert_eq!(fields["made_up_keys"]["enum"], words(made_up.map(cause::made_up).to_vec()));
    // A call may end with any code of gRPC's but OK.
    assert_eq!(schema["$defs"]["undecided"]["properties"]["grpc_code"]["enum"], words(CODES[1..].to_vec()));
}

/// A provider that cannot be reached: the log says at which step, and names the host.
#[tokio::test]
async fn a_provider_that_is_down_is_told_by_its_cause() {
    let vendor = Vendor::start(Vec::new()).await;
    // Speaks no TLS.
    let plain = format!("https://{}/v1", vendor.address);
    let (registry, catalogue) = case::documents(vendor.address.port());
    for (base, expect) in [
        ("https://no-such-host.invalid/v1", "DNS"),
        ("https://169.254.169.254/v1", "ADDRESS"),
        ("http://api.example.com/v1", "ADDRESS"),
        ("https://127.0.0.1:1/v1", "CONNECT"),
        (plain.as_str(), "TLS"),
    ] {
        let registry = registry.replace("https://127.0.0.1:1/v1", base).replace("http://127.0.0.1:1/v1", base);
        assert!(registry.contains(base), "the provider `gone` has another base URL by now");
        let serving = serving(&Files::new(&registry, &catalogue, None), &[]).await;
        let workspace = [("GONE_API_KEY".to_owned(), Some("made-up-key".to_owned()))].into();
        let spec = Spec { model: "gone/1".into(), workspace, ..Spec::default() };
        let request = pb::DecideRequest {
            workspace_spec: Some(spec.message()),
            checkpoint: pb::Checkpoint::Create as i32,
            ..Default::default()
        };
        serving.client().await.decide(request).await.unwrap();
        let events = decision_events(&log_of(serving).await);
        let [event] = events.as_slice() else { panic!("{events:?}") };
        assert_eq!(event["code"], "BYOK_PROVIDER_UNREACHABLE", "{event}");
        assert_eq!(event["unreached"], expect, "{base}: {event}");
        let host = base.split('/').nth(2).unwrap();
        assert_eq!(event["endpoint_host"], host, "{event}");
    }
}

/// Names that would break a line, or move a terminal's cursor, are refused; and the refusal's own line does not contain them.
#[tokio::test]
async fn no_name_forges_a_line() {
    let files = files(None).await;
    let serving = serving(&files, &[]).await;
    let mut client = serving.client().await;
    let forged = "{\"event\":\"decision\",\"outcome\":\"ALLOW\"}";
    let names = [format!("a\n{forged}\n"), format!("a\r{forged}"), "a\u{1b}[2Jb".into(), "a\u{9b}2J".into(), "a\u{85}b".into()];
    for name in &names {
        for field in 0..5 {
            let mut request = missing("w");
            let spec = request.workspace_spec.as_mut().unwrap();
            let credential = pb::Credential { env_name: name.clone(), scope: 1, value: "made-up".into(), unreadable: false };
            match field {
                0 => spec.workspace_id.clone_from(name),
                1 => spec.organization_id.clone_from(name),
                2 => spec.runtime.clone_from(name),
                3 => spec.model = format!("{name}x"),
                // Twice, so that the refusal repeats it.
                _ => spec.credentials = vec![credential.clone(), credential],
            }
            let status = client.decide(request).await.unwrap_err();
            assert_eq!(status.code(), Code::InvalidArgument, "{name:?} {field}");
        }
    }
    // What JSON has to escape, and no control character: it arrives as it is.
    let odd = "w \"\\ \u{2028} é";
    client.decide(missing(odd)).await.unwrap();
    drop(client);
    let log = log_of(serving).await;
    assert!(!log.chars().any(|letter| letter.is_control() && letter != '\n'), "{log:?}");
    let events = decision_events(&log);
    let decisions: Vec<_> = events.iter().filter(|event| event["event"] == "decision").collect();
    assert_eq!(decisions.len(), 1, "{events:?}");
    assert_eq!(decisions[0]["workspace_id"], odd);
    let refused: u64 = events.iter().map(|event| event["suppressed"].as_u64().unwrap_or(0)).sum();
    assert!(events.len() as u64 - 1 + refused <= 25, "{events:?}");
}

/// A call without a decision writes an event too, with its workspace as far as it was decoded.
#[tokio::test]
async fn a_call_that_ends_without_a_decision_leaves_an_event() {
    let config = "limits: {decisions: 1, decisions_waiting: 0}\nprobe: {budget: 10s}\n";
    let vendor = Vendor::start(vec![Row { behave: Some(Behave::Silent), ..Row::default() }]).await;
    let (registry, catalogue) = case::documents(vendor.address.port());
    let files = Files::new(&registry, &catalogue, Some(config));
    let serving = serving(&files, &[]).await;
    let mut client = serving.client().await;
    // A caller that hangs up.
    let held = with_key("left");
    let mut leaver = client.clone();
    let leaving = tokio::spawn({
        let held = held.clone();
        async move { leaver.decide(held).await }
    });
    until_asked(&vendor).await;
    // One call too many.
    let mut late = held.clone();
    late.workspace_spec.as_mut().unwrap().workspace_id = "late".into();
    assert_eq!(client.decide(late).await.unwrap_err().code(), Code::ResourceExhausted);
    // A call without a probe needs no slot.
    assert!(client.decide(missing("at once")).await.is_ok());
    leaving.abort();
    assert!(leaving.await.unwrap_err().is_cancelled());
    // Bad input, an undecodable message, and an expired deadline.
    assert_eq!(client.decide(pb::DecideRequest::default()).await.unwrap_err().code(), Code::InvalidArgument);
    let only_asked = pb::DecideRequest { report_only: true, checkpoint: 77, ..Default::default() };
    assert_eq!(client.decide(only_asked).await.unwrap_err().code(), Code::InvalidArgument);
    let empty = pb::BatchDecideRequest::default();
    assert_eq!(client.batch_decide(empty).await.unwrap_err().code(), Code::InvalidArgument);
    let mut sender = raw(serving.address.parse().unwrap()).await;
    let over = grpc(DECIDE, &[("grpc-timeout", "1n")], &missing("late").encode_to_vec());
    assert_eq!(code_of(&mut sender, over).await, Code::DeadlineExceeded);
    drop(sender);
    drop(client);
    let events = decision_events(&log_of(serving).await);
    let seen =
        |code: &str| events.iter().find(|event| event["grpc_code"] == code).unwrap_or_else(|| panic!("{code}: {events:?}"));
    assert_eq!(seen("CANCELLED")["workspace_id"], "left");
    assert_eq!(seen("CANCELLED")["checkpoint"], "CREATE");
    assert_eq!(seen("RESOURCE_EXHAUSTED")["workspace_id"], "late");
    assert!(seen("RESOURCE_EXHAUSTED")["reason"].as_str().unwrap().contains("limits.decisions"));
    assert!(seen("INVALID_ARGUMENT")["reason"].as_str().unwrap().starts_with("checkpoint: "));
    assert_eq!(seen("DEADLINE_EXCEEDED")["method"], "Decide");
    let reported: Vec<_> = events.iter().filter(|event| event["report_only"] == true).collect();
    assert!(matches!(reported[..], [one] if one["grpc_code"] == "INVALID_ARGUMENT"), "{events:?}");
    let batch: Vec<_> = events.iter().filter(|event| event["method"] == "BatchDecide").collect();
    assert!(matches!(batch[..], [one] if one["reason"].as_str().unwrap().starts_with("requests: ")), "{events:?}");
    assert_eq!(events.len(), 7, "{events:?}");
}

/// Who called, and about what, is in the event as far as it is known, whatever ended the call.
#[tokio::test]
async fn a_call_without_a_decision_names_its_caller_and_workspace() {
    let files = files(None).await;
    let tokens = files.folder().join("tokens");
    let lines = "made-up-token-platform\nmade-up-token-operator operator\nmade-up-token-workspace workspace ws-1\n";
    std::fs::write(&tokens, lines).unwrap();
    let config = files.folder().join("more.yaml");
    std::fs::write(&config, "callers: {workspace_calls_per_minute: 1}\nlimits: {message_bytes: 4096}\n").unwrap();
    let (tokens, config) = (tokens.to_str().unwrap(), config.to_str().unwrap());
    let serving = serving(&files, &["--token-file", tokens, "--config", config]).await;
    let mut client = serving.client().await;
    let mut refused = async |token: &str, message: pb::DecideRequest| {
        let mut request = tonic::Request::new(message);
        request.metadata_mut().insert("authorization", format!("Bearer made-up-token-{token}").parse().unwrap());
        client.decide(request).await.unwrap_err().code()
    };
    let invalid = || {
        let mut request = missing("ws-1");
        request.workspace_spec.as_mut().unwrap().organization_id = "org-1".into();
        request.workspace_spec.as_mut().unwrap().runtime = "r".repeat(1_000);
        request
    };
    let mut long = missing("ws-1");
    long.workspace_spec.as_mut().unwrap().model = "m".repeat(5_000);
    assert_eq!(refused("operator", missing("ws-1")).await, Code::PermissionDenied);
    assert_eq!(refused("platform", invalid()).await, Code::InvalidArgument);
    assert_eq!(refused("platform", long).await, Code::InvalidArgument);
    assert_eq!(refused("workspace", missing("ws-2")).await, Code::PermissionDenied);
    assert_eq!(refused("workspace", missing("ws-1")).await, Code::ResourceExhausted);
    assert_eq!(refused("unknown", missing("ws-1")).await, Code::Unauthenticated);
    drop(client);
    let events = decision_events(&log_of(serving).await);
    let of =
        |event: &Value| ["caller", "workspace_id", "organization_id"].map(|name| event[name].as_str().unwrap_or("").to_owned());
    let seen: Vec<[String; 3]> = events.iter().map(of).collect();
    let expect = [
        ["token of line 2", "", ""],
        ["token of line 1", "ws-1", "org-1"],
        ["token of line 1", "", ""],
        ["token of line 3", "ws-2", ""],
        ["token of line 3", "", ""],
        ["", "", ""],
    ];
    assert_eq!(seen, expect, "{events:?}");
}

/// A call that the drain cuts off ends by the service, not by its caller.
#[tokio::test]
async fn a_call_that_the_drain_cuts_off_is_not_its_callers_fault() {
    let vendor = Vendor::start(vec![Row { behave: Some(Behave::Silent), ..Row::default() }]).await;
    let (registry, catalogue) = case::documents(vendor.address.port());
    let files = Files::new(&registry, &catalogue, Some("shutdown: {notice: 0s, drain: 50ms}\nprobe: {budget: 60s}\n"));
    let serving = serving(&files, &[]).await;
    let mut client = serving.client().await;
    let held = with_key("cut");
    let call = tokio::spawn(async move { client.decide(held).await });
    until_asked(&vendor).await;
    let log = log_of(serving).await;
    assert_eq!(call.await.unwrap().unwrap_err().code(), Code::Unavailable);
    let events = decision_events(&log);
    let [event] = &events[..] else { panic!("{events:?}") };
    assert_eq!(
        (&event["event"], &event["workspace_id"], &event["grpc_code"]),
        (&json!("undecided"), &json!("cut"), &json!("UNAVAILABLE"))
    );
    assert!(event["reason"].as_str().unwrap().contains("shutdown.drain"), "{event}");
}

/// A caller that gives a call less time than it may have is told by it, also where no decision came of it.
#[tokio::test]
async fn the_time_of_a_caller_that_gives_little_is_in_the_event() {
    let serving = serving(&files(None).await, &[]).await;
    let mut client = serving.client().await;
    for (workspace, seconds) in [("short", Some(2)), ("long", Some(60)), ("open", None)] {
        let mut request = tonic::Request::new(missing(workspace));
        seconds.into_iter().for_each(|seconds| request.set_timeout(Duration::from_secs(seconds)));
        client.decide(request).await.unwrap();
    }
    let mut sender = raw(serving.address.parse().unwrap()).await;
    let over = grpc(DECIDE, &[("grpc-timeout", "3000u")], &missing("late").encode_to_vec());
    assert_eq!(code_of(&mut sender, over).await, Code::DeadlineExceeded);
    drop((sender, client));
    let events = decision_events(&log_of(serving).await);
    let of = |fits: &dyn Fn(&Value) -> bool| events.iter().find(|event| fits(event)).unwrap_or_else(|| panic!("{events:?}"));
    for (workspace, expect) in [("short", json!(2_000_000)), ("long", Value::Null), ("open", Value::Null)] {
        assert_eq!(of(&|event| event["workspace_id"] == workspace)["caller_time_us"], expect, "{workspace}");
    }
    assert_eq!(of(&|event| event["grpc_code"] == "DEADLINE_EXCEEDED")["caller_time_us"], 3000);
}

/// Plain allows may be left out; nothing else is.
#[tokio::test]
async fn sampling_leaves_out_plain_allows_alone() {
    let files = files(Some("log: {plain_allow_ratio: 0.0}\nexempt_runtimes: [bare]\n")).await;
    let serving = serving(&files, &[]).await;
    let mut client = serving.client().await;
    let mut exempt = platform("exempt");
    exempt.workspace_spec.as_mut().unwrap().runtime = "bare".into();
    for request in [platform("plain"), missing("denied"), exempt] {
        client.decide(request).await.unwrap();
    }
    drop(client);
    let events = decision_events(&log_of(serving).await);
    let mut ids: Vec<_> = events.iter().map(|event| event["workspace_id"].as_str().unwrap()).collect();
    ids.sort_unstable();
    assert_eq!(ids, ["denied", "exempt"]);
}

/// Nobody reads standard output: the pipe is full, then the buffer. Decisions go on, and so does the shutdown; the number of lost lines is
/// logged for the next reader.
#[tokio::test]
async fn a_blocked_stdout_stops_nothing() {
    let files = files(None).await;
    let flags = files.flags();
    let arguments = [&["serve", "--listen", "127.0.0.1:0"][..], &flags.iter().map(String::as_str).collect::<Vec<_>>()].concat();
    let mut child = binary::command(&arguments, &[]).stdout(Stdio::piped()).spawn().unwrap();
    let mut stdout = BufReader::new(child.stdout.take().unwrap());
    let mut line = String::new();
    let address = loop {
        line.clear();
        timeout(PATIENCE, stdout.read_line(&mut line)).await.unwrap().unwrap();
        let event: Value = serde_json::from_str(&line).unwrap();
        if event["event"] == "listening" {
            break format!("http://{}", event["address"].as_str().unwrap());
        }
    };
    let mut client = pb::policy_decision_service_client::PolicyDecisionServiceClient::connect(address).await.unwrap();
    let mut answered = 0;
    for _ in 0..40 {
        let requests = vec![missing("blocked"); 256];
        let mut answers = client.batch_decide(pb::BatchDecideRequest { requests }).await.unwrap().into_inner();
        while let Some(answer) = timeout(PATIENCE, answers.next()).await.unwrap() {
            assert!(matches!(answer.unwrap().result, Some(pb::batch_decide_response::Result::Response(_))));
            answered += 1;
        }
    }
    assert_eq!(answered, 40 * 256);
    // The reader is back.
    let mut log = String::new();
    let reading = async {
        loop {
            line.clear();
            stdout.read_line(&mut line).await.unwrap();
            log.push_str(&line);
            if line.contains("\"log_lines_dropped\"") {
                break serde_json::from_str::<Value>(&line).unwrap()["count"].as_u64().unwrap();
            }
        }
    };
    let lost = timeout(PATIENCE, reading).await.unwrap();
    assert_eq!(decision_events(&log).len() as u64 + lost, answered);
    // And gone for good: the process still stops.
    for _ in 0..2 {
        let requests = vec![missing("blocked"); 256];
        let mut answers = client.batch_decide(pb::BatchDecideRequest { requests }).await.unwrap().into_inner();
        while timeout(PATIENCE, answers.next()).await.unwrap().is_some() {}
    }
    drop(client);
    let id = child.id().unwrap().to_string();
    assert!(tokio::process::Command::new("kill").args(["-TERM", &id]).status().await.unwrap().success());
    assert!(timeout(PATIENCE, child.wait()).await.unwrap().unwrap().success());
    let mut rest = Vec::new();
    stdout.read_to_end(&mut rest).await.unwrap();
}

/// A command's decision is in its log as well, if requested.
#[tokio::test]
async fn a_command_leaves_the_event_too() {
    let files = files(None).await;
    let flags = files.flags();
    let decide = ["decide", "--runtime", "agent", "--model", "acme-large", "--workspace-id", "one"];
    for (level, expect) in [("info", 1), ("error", 0)] {
        let arguments = [&["--log", level][..], &decide, &flags.iter().map(String::as_str).collect::<Vec<_>>()].concat();
        let ended = binary::run(&arguments, &[]).await;
        assert_eq!(ended.status.code(), Some(10), "{ended:?}");
        let lines: Vec<_> = ended.stderr.lines().filter(|line| line.starts_with('{')).collect();
        assert_eq!(decision_events(&lines.join("\n")).len(), expect, "{}", ended.stderr);
    }
}
