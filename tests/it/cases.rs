//! Every case of `tests/cases`, by the engine, over gRPC and by the command line, with the same expectations.

use std::{collections::BTreeSet, process::Stdio};
use strum::VariantArray;

use byok_gate::{
    domain::verdict::{DenyCode, Verdict, WarningCode},
    grpc::convert::{
        self,
        pb::{self, policy_decision_service_client::PolicyDecisionServiceClient},
    },
};
use serde_json::Value;
use tokio::time::{Duration, Instant};
use tonic::{Code, Response, Status};
use tonic_types::StatusExt;

use crate::support::{
    case::{self, Answered, Case, Record, Said, Word},
    edge::{self, Authority, Edge},
    gate::{Files, Server},
    vendor::Vendor,
};

/// Long enough for every answer.
const PATIENCE: Duration = Duration::from_secs(5);

/// How a case is run.
#[derive(Debug, Clone, Copy)]
enum By {
    Engine,
    Grpc,
    Socket,
    Tls,
    CommandLine,
}

async fn run(by: By) -> usize {
    let (mut ran, mut faults) = (0, Vec::new());
    let authority = Authority::new();
    for (name, case) in case::all() {
        if matches!(by, By::CommandLine) && !for_the_command_line(&case) {
            continue;
        }
        for expect in &case.expect {
            for at in &expect.at {
                let vendor = Vendor::start(case.vendor.clone()).await;
                let (registry, catalogue) = case::documents(vendor.address.port());
                let config = case.config.as_ref().map(|config| serde_yaml::to_string(config).unwrap());
                let files = Files::new(&registry, &catalogue, config.as_deref());
                let answered = match by {
                    By::Engine => by_engine(&files, case.request(at)).await,
                    By::Grpc => over_grpc(&files, case.request(at)).await,
                    By::Socket => over_a_socket(&files, case.request(at)).await,
                    By::Tls => over_tls(&files, case.request(at), &authority).await,
                    By::CommandLine => by_command_line(&files, &case, at).await,
                };
                let values = case.spec.iter().flat_map(|spec| spec.values()).filter(|value| !value.is_empty());
                let asked = values.collect::<BTreeSet<_>>().into_iter().map(|value| vendor.asked_with(value)).sum();
                faults.extend(expect.fault(&answered, asked).map(|fault| format!("{name}, at {at:?}: {fault}")));
                ran += 1;
            }
        }
    }
    assert!(faults.is_empty(), "{by:?}, {} of {ran}:\n{}", faults.len(), faults.join("\n"));
    ran
}

async fn by_engine(files: &Files, request: pb::DecideRequest) -> Answered {
    match convert::request(request) {
        Err(violations) => Answered::Invalid(violations.0.into_iter().map(|(field, _)| field).collect()),
        Ok(request) => {
            let decided = files.engine().decide(&request, Instant::now() + PATIENCE).await;
            Answered::decision(&convert::response(decided))
        }
    }
}

async fn over_grpc(files: &Files, request: pb::DecideRequest) -> Answered {
    let server = Server::start(files.engine()).await;
    answered(server.client().await.decide(request).await)
}

async fn over_a_socket(files: &Files, request: pb::DecideRequest) -> Answered {
    let mut settings = edge::settings();
    settings.server.listen = vec![format!("unix:{}", files.folder().join("gate.sock").display())];
    let server = Edge::start(settings, files.engine()).await;
    answered(PolicyDecisionServiceClient::new(server.over_unix().await).decide(request).await)
}

/// With a certificate on both sides.
async fn over_tls(files: &Files, request: pb::DecideRequest, authority: &Authority) -> Answered {
    let put = |name: &str, text: &str| {
        let path = files.folder().join(name);
        std::fs::write(&path, text).unwrap();
        Some(path)
    };
    let own = authority.sign("localhost");
    let mut settings = edge::settings();
    settings.tls.certificate = put("cert.pem", &own.certificate);
    settings.tls.key = put("key.pem", &own.key);
    settings.tls.client_ca = put("ca.pem", &authority.pem());
    let server = Edge::start(settings, files.engine()).await;
    let client = edge::tls_client(authority, Some(&own), &[&rustls::version::TLS13]);
    let channel = edge::tls_channel(server.tcp(), &client).await.unwrap();
    answered(PolicyDecisionServiceClient::new(channel).decide(request).await)
}

fn answered(result: Result<Response<pb::DecideResponse>, Status>) -> Answered {
    match result {
        Ok(response) => Answered::decision(&response.into_inner()),
        Err(status) => {
            assert_eq!(status.code(), Code::InvalidArgument, "{status:?}");
            let details = status.get_error_details();
            let violations = details.bad_request().unwrap().field_violations.clone();
            Answered::Invalid(violations.into_iter().map(|violation| violation.field).collect())
        }
    }
}

/// The command line cannot express unreadable secrets or bad numbers, and it never calibrates.
fn for_the_command_line(case: &Case) -> bool {
    let Some(spec) = &case.spec else { return false };
    let words =
        [&spec.operator_override, &spec.platform_proxy].into_iter().chain(case.expect.iter().flat_map(|expect| &expect.at));
    let readable = spec.workspace.values().chain(spec.organization.values()).all(Option::is_some);
    let whole_age = case.max_liveness_age.is_none_or(|age| age >= 0.0 && age.fract() == 0.0);
    let plain = spec.credentials.is_empty() && spec.unreadable_scopes.is_empty();
    let numbers = words.into_iter().any(|word| matches!(word, Word::Number(number) if *number != 0));
    // A name cannot be in both scopes of one environment.
    let apart = spec.workspace.keys().all(|name| !spec.organization.contains_key(name));
    readable
        && whole_age
        && plain
        && !numbers
        && apart
        && !case.calibrates
        && case.expect.iter().all(|expect| expect.invalid.is_empty())
}

async fn by_command_line(files: &Files, case: &Case, at: &Word) -> Answered {
    let spec = case.spec.clone().unwrap();
    let word = |word: &Word| match word {
        Word::Name(name) => name.to_lowercase().replace('_', "-"),
        Word::Number(_) => String::new(),
    };
    let mut arguments = vec!["decide".to_owned(), "--format".into(), "json".into()];
    let mut flag = |name: &str, value: String| {
        if !value.is_empty() {
            arguments.extend([format!("--{name}={value}")]);
        }
    };
    flag("checkpoint", word(at));
    flag("operator-override", word(&spec.operator_override));
    flag("workspace-id", spec.workspace_id.clone());
    flag("organization-id", spec.organization_id.clone());
    flag("max-liveness-age", case.max_liveness_age.map_or_else(String::new, |age| age.to_string()));
    for name in &spec.tenant_base_url_env {
        flag("tenant-base-url-env", name.clone());
    }
    for (name, scope) in [("env", &spec.workspace), ("organization-env", &spec.organization)] {
        for env in scope.keys() {
            flag(name, env.clone());
        }
    }
    arguments.push(format!("--runtime={}", spec.runtime.clone().unwrap_or_else(|| "agent".into())));
    arguments.push(format!("--model={}", spec.model));
    arguments.extend(files.flags());
    if let Word::Name(proxy) = &spec.platform_proxy {
        // The last flag wins over the runner's own.
        let place = arguments.iter().position(|argument| argument == "available").unwrap();
        arguments[place] = proxy.to_lowercase();
    }
    let mut command = tokio::process::Command::new(env!("CARGO_BIN_EXE_byok-gate"));
    command.args(&arguments).env_clear().stdin(Stdio::null());
    for (name, value) in spec.workspace.iter().chain(&spec.organization) {
        command.env(name, value.as_deref().unwrap());
    }
    let output = command.output().await.unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    let body: Value = serde_json::from_slice(&output.stdout).unwrap_or_else(|fault| panic!("{fault}: {arguments:?}: {stderr}"));
    let record = record(&body);
    let exit = match (record.decision.as_str(), record.retryable) {
        ("ALLOW", _) => 0,
        (_, false) => 10,
        (_, true) => 11,
    };
    assert_eq!(output.status.code(), Some(exit), "{body}");
    let said = ["message", "remedy"].map(|key| body[key].as_str().unwrap_or_default().to_owned()).join("\n");
    Answered::Decision(Box::new(record), Said(said))
}

/// The command line's JSON in the form of the cases.
fn record(body: &Value) -> Record {
    let text = |pointer: &str| body.pointer(pointer).and_then(Value::as_str).unwrap_or_default().to_owned();
    let list = |value: Option<&Value>| {
        value.and_then(Value::as_array).into_iter().flatten().map(|item| item.as_str().unwrap().to_owned()).collect::<Vec<_>>()
    };
    let warnings = body["warnings"].as_array().unwrap();
    Record {
        decision: text("/decision"),
        code: text("/code"),
        provider: text("/resolution/provider"),
        billing_mode: text("/resolution/billing_mode"),
        source: text("/resolution/source"),
        matched_by: text("/resolution/matched_by"),
        credential_env: text("/resolution/credential_env"),
        credential_scope: text("/resolution/credential_scope"),
        shadows_organization: body["resolution"]["shadows_organization"].as_bool().unwrap(),
        verdict: text("/liveness/verdict"),
        upstream_status: body.pointer("/liveness/upstream_status").and_then(Value::as_u64).unwrap_or(0) as u32,
        probe: text("/liveness/probe"),
        served_from: text("/liveness/served_from"),
        warnings: warnings.iter().map(|warning| warning["code"].as_str().unwrap().to_owned()).collect(),
        warned_env: warnings.iter().flat_map(|warning| list(warning.get("env_names"))).collect(),
        missing_env: list(body.get("missing_env")),
        alternative_models: list(body.get("alternative_models")),
        retryable: body["retryable"].as_bool().unwrap_or(false),
    }
}

#[tokio::test]
async fn by_the_engine() {
    run(By::Engine).await;
}

#[tokio::test]
async fn over_the_wire() {
    run(By::Grpc).await;
}

#[tokio::test]
async fn over_a_unix_socket() {
    run(By::Socket).await;
}

#[tokio::test]
async fn over_mutual_tls() {
    run(By::Tls).await;
}

#[tokio::test]
async fn by_the_command_line() {
    let ran = run(By::CommandLine).await;
    assert!(ran > 100, "only {ran} were fit for the command line");
}

/// The cases leave nothing out: every code, every warning, every verdict at every checkpoint.
#[test]
fn cover_every_word() {
    let cases = case::all();
    let expects: Vec<_> = cases.iter().flat_map(|(_, case)| &case.expect).collect();
    for &code in DenyCode::VARIANTS {
        let met = expects.iter().any(|expect| expect.record.code == code.as_str());
        // The checks at load rule out the one; the other needs an internal fault, which `liveness.rs` makes.
        let elsewhere = matches!(code, DenyCode::DerivedProviderNotInRegistry | DenyCode::ByokProbeNotAttempted);
        assert_eq!(met, !elsewhere, "{code}");
    }
    for &code in WarningCode::VARIANTS {
        // Needs time to pass: `liveness.rs` has it.
        let here = code != WarningCode::StaleLiveness;
        assert_eq!(expects.iter().any(|expect| expect.record.warnings.contains(&code.as_str().to_owned())), here, "{code}");
    }
    for &verdict in Verdict::VARIANTS.iter().filter(|&&verdict| verdict != Verdict::NotAttempted) {
        for checkpoint in ["CREATE", "PROVISION", "UPDATE"] {
            let at =
                |expect: &&&case::Expect| expect.at.iter().any(|word| matches!(word, Word::Name(name) if name == checkpoint));
            let met = expects.iter().filter(at).any(|expect| expect.record.verdict == verdict.as_str());
            assert!(met, "no case for {verdict} at {checkpoint}");
        }
    }
}
