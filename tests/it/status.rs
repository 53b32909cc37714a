//! The status page, its JSON and its command: they show what happened, keep little, and show no value and run no script.

use std::{fs, net::SocketAddr};

use serde_json::Value;

use crate::{
    secrets::is_not_in,
    support::{
        binary::{PATIENCE, Serving, run},
        case,
        edge::{Authority, Edge, Held, decide, is_allow, settings},
        gate::Files,
        page::{Shown, say},
        vendor::{Behave, Row, Vendor},
    },
};
use byok_gate::grpc::convert::pb::{self, policy_decision_service_client::PolicyDecisionServiceClient};
use tokio::time::{Duration, Instant, sleep};

const CANARY: &str = "made-up-canary-7f3a";
const SCRIPT: &str = "\"><script>x</script>\u{202e}";

fn files(port: u16) -> Files {
    let (registry, catalogue) = case::documents(port);
    Files::new(&registry, &catalogue, None)
}

fn set_mode(file: &str, mode: u32) {
    fs::set_permissions(file, std::os::unix::fs::PermissionsExt::from_mode(mode)).unwrap();
}

async fn json(admin: SocketAddr) -> Value {
    let answer = say(admin, "GET /status.json HTTP/1.1\r\nhost: gate\r\n\r\n").await;
    assert!(answer.status == 200 && answer.head.contains("content-type: application/json"), "{answer:?}");
    serde_json::from_str(&answer.body).unwrap()
}

async fn page(admin: SocketAddr) -> String {
    let answer = say(admin, "GET /status HTTP/1.1\r\nhost: gate\r\n\r\n").await;
    assert!(answer.status == 200 && answer.head.contains("content-type: text/html; charset=utf-8"), "{answer:?}");
    assert!(answer.head.contains("content-security-policy: default-src 'none'"), "{}", answer.head);
    answer.body
}

async fn client(edge: &Edge) -> PolicyDecisionServiceClient<tonic::transport::Channel> {
    PolicyDecisionServiceClient::new(edge.plain().await)
}

fn of_model(model: &str, env_name: &str, key: &str) -> pb::DecideRequest {
    let mut request = decide(key);
    let spec = request.workspace_spec.as_mut().unwrap();
    spec.model = model.into();
    spec.credentials[0].env_name = env_name.into();
    request
}

/// A vendor that takes one key and refuses every other.
async fn vendor() -> Vendor {
    let answer = |key, status, body| Row::at("/acme/v1/models", key, status, body);
    let refusal = r#"{"error": {"code": "invalid_api_key"}}"#;
    Vendor::start(vec![answer(Some("made-up-key"), 200, r#"{"data": []}"#), answer(None, 401, refusal)]).await
}

#[tokio::test]
async fn what_has_happened_is_on_the_page() {
    let vendor = vendor().await;
    let shown = Shown::start(settings(), &files(vendor.address.port())).await;
    let fresh = json(shown.admin).await;
    assert_eq!(
        (&fresh["attention"], &fresh["decisions"], &fresh["denials"]),
        (&Value::from(Vec::<u8>::new()), &fresh["attention"], &fresh["attention"])
    );
    let mut client = client(&shown.edge).await;
    assert!(is_allow(&client.decide(decide("made-up-key")).await.unwrap().into_inner()));
    let denied = client.decide(decide(CANARY)).await.unwrap().into_inner();
    // Nothing listens there: denied at CREATE, and allowed unverified at UPDATE.
    assert!(!is_allow(&client.decide(of_model("gone/m", "GONE_API_KEY", CANARY)).await.unwrap().into_inner()));
    let update = pb::DecideRequest { checkpoint: pb::Checkpoint::Update as i32, ..of_model("gone/m", "GONE_API_KEY", CANARY) };
    assert!(is_allow(&client.decide(update).await.unwrap().into_inner()));
    let hostile = of_model(&format!("nobodys/{SCRIPT}"), "ACME_API_KEY", CANARY);
    assert!(!is_allow(&client.decide(hostile).await.unwrap().into_inner()));
    // Twice the same, and another: what repeats itself is counted.
    for workspace_id in ["ws-1\n", "ws-1\n", &"w".repeat(4_000)] {
        let mut request = decide("made-up-key");
        request.workspace_spec.as_mut().unwrap().workspace_id = workspace_id.to_owned();
        assert_eq!(client.decide(request).await.unwrap_err().code(), tonic::Code::InvalidArgument);
    }
    let status = json(shown.admin).await;
    let undecided = status["undecided_calls"].as_array().unwrap();
    let counts: Vec<_> = undecided.iter().map(|it| it["count"].as_u64().unwrap()).collect();
    assert_eq!(counts, [1, 2], "{undecided:?}");
    for call in undecided {
        assert_eq!((&call["grpc_code"], &call["peer"]), (&Value::from("INVALID_ARGUMENT"), &Value::from("127.0.0.1")), "{call}");
        assert!(call["reason"].as_str().unwrap().contains("workspace_id"), "{call}");
    }
    let provider = |name: &str| {
        let all = status["providers"].as_array().unwrap();
        all.iter().find(|it| it["provider"] == name).unwrap().clone()
    };
    let acme = provider("acme");
    assert_eq!(acme["recent_verdicts"], serde_json::json!({"INVALID": 1, "VALID": 1}));
    assert_eq!((&acme["breaker"], &acme["enforcement"]), (&Value::from("closed"), &Value::from("enforce")));
    // Its breaker is closed: only one organization has seen it fail.
    let attention = status["attention"].to_string();
    let told =
        "provider `gone`: none of the last 2 checks of a key came to a result: 127.0.0.1:1: no connection: nothing is listening";
    assert!(attention.contains(told) && !attention.contains("provider `acme`"), "{attention}");
    let gone = provider("gone");
    assert_eq!(gone["recent_verdicts"], serde_json::json!({"UNREACHABLE": 2}));
    assert_eq!(gone["last_failure"]["verdict"], "UNREACHABLE");
    assert_eq!(
        gone["last_failure"]["cause"],
        "127.0.0.1:1: no connection: nothing is listening there, or a firewall is in the way"
    );
    let denials = status["denials"].as_array().unwrap();
    let codes: Vec<&str> = denials.iter().map(|it| it["code"].as_str().unwrap()).collect();
    assert_eq!(codes, ["UNREGISTERED_MODEL_FOR_RUNTIME", "BYOK_PROVIDER_UNREACHABLE", "INVALID_BYOK_CREDENTIAL"]);
    let invalid = &denials[2];
    assert_eq!(invalid["decision_id"], denied.decision_id);
    assert_eq!((&invalid["verdict"], &invalid["provider"]), (&Value::from("INVALID"), &Value::from("acme")));
    assert!(invalid["cause"].as_str().unwrap().contains("answered `models` with HTTP 401"), "{invalid}");
    assert!(invalid.get("workspace_id").is_none(), "{invalid}");
    assert_eq!(status["unverified_allows"][0]["verdict"], "UNREACHABLE");
    let count = |outcome: &str, code: &str| {
        let all = status["decisions"].as_array().unwrap();
        all.iter().find(|it| it["outcome"] == outcome && it["code"] == code).map(|it| (it["total"].clone(), it["recent"].clone()))
    };
    assert_eq!(count("ALLOW", ""), Some((2.into(), 2.into())));
    assert_eq!(count("DENY", "INVALID_BYOK_CREDENTIAL"), Some((1.into(), 1.into())));
    // The page says the same; a name is text in it, and turns no line around.
    let page = page(shown.admin).await;
    for words in [
        "INVALID_BYOK_CREDENTIAL",
        &denied.decision_id,
        "no connection: nothing is listening there",
        "nobodys/&quot;&gt;&lt;script&gt;",
        "INVALID_ARGUMENT",
    ] {
        assert!(page.contains(words), "{words} in {page}");
    }
    assert!(!page.contains("<script") && !page.contains('\u{202e}'), "{page}");
    // And the command, which moves no cursor either.
    let told = run(&["status", "--server", &shown.admin.to_string()], &[]).await;
    assert_eq!(told.status.code(), Some(1), "{told:?}");
    for words in [
        "needs attention\n  ! provider `gone`: none of the last 2 checks of a key came to a result",
        "  ! calls from 127.0.0.1 end with INVALID_ARGUMENT",
        "INVALID_BYOK_CREDENTIAL",
        "127.0.0.1:1: no connection",
        "VALID 1",
        "last denials",
        "127.0.0.1 (anonymous) 2x Decide: INVALID_ARGUMENT",
    ] {
        assert!(told.stdout.contains(words), "{words} in {}", told.stdout);
    }
    assert!(!told.stdout.contains('\u{202e}'), "{}", told.stdout);
    for text in [&page, &status.to_string(), &told.stdout] {
        is_not_in(text, CANARY, "the status");
        assert!(!text.contains("ws-1"), "{text}");
    }
}

/// Whose fault it is: a provider that may not be called is named before any call, and a caller that does not wait is not the provider's fault.
#[tokio::test]
async fn the_cause_of_denials_is_named_where_it_is() {
    let vendor = Vendor::start(vec![Row { behave: Some(Behave::Silent), ..Row::default() }]).await;
    let (registry, catalogue) = case::documents(vendor.address.port());
    let files = Files::new(&registry.replacen("http://127.0.0.1:1/", "https://10.1.2.3/", 1), &catalogue, None);
    let mut arguments = vec!["--admin-listen".to_owned(), "127.0.0.1:0".to_owned()];
    arguments.extend(files.flags());
    let serving = Serving::start(&arguments.iter().map(String::as_str).collect::<Vec<_>>()).await;
    let admin: SocketAddr = serving.event("admin_listening")["address"].as_str().unwrap().parse().unwrap();
    let attention = async || json(admin).await["attention"].clone();
    let forbidden = "every key of provider `gone` is denied: this configuration does not allow calls to https://10.1.2.3";
    let before = attention().await;
    assert_eq!((before.as_array().unwrap().len(), before[0]["what"].as_str()), (1, Some(forbidden)), "{before}");
    let mut request = tonic::Request::new(decide("made-up-key"));
    request.set_timeout(Duration::from_secs(1));
    let denied = serving.client().await.decide(request).await.unwrap().into_inner();
    let Some(pb::decide_response::Decision::Deny(deny)) = &denied.decision else { panic!("{denied:?}") };
    assert_eq!(deny.code(), pb::DenyCode::ByokProbeTimeout);
    assert!(deny.message.ends_with(" s to answer, which was too little"), "{}", deny.message);
    assert!(deny.operator_hint.contains("give the caller 4 s"), "{}", deny.operator_hint);
    let after = attention().await;
    assert_eq!(after.as_array().unwrap().len(), 2, "the provider is not blamed: {after}");
    let impatient = "calls from 127.0.0.1 allowed 1000 ms, which is too little for a provider to answer; the last at ";
    assert!(after[1]["what"].as_str().unwrap().starts_with(impatient), "{after}");
    // Nor is it for what the platform cannot read.
    let mut request = decide("");
    request.workspace_spec.as_mut().unwrap().credentials[0].unreadable = true;
    assert!(!is_allow(&serving.client().await.decide(request).await.unwrap().into_inner()));
    let unreadable =
        "one decision was denied, since the platform could not read secrets: ACME_API_KEY could not be read from the workspace's";
    let after = attention().await;
    assert!(after[1]["what"].as_str().unwrap().starts_with(unreadable), "{after}");
}

/// One organization with dead keys is no sign that the provider fails. Three are.
#[tokio::test]
async fn keys_of_one_organization_do_not_blame_the_provider() {
    let vendor = vendor().await;
    let files = files(vendor.address.port());
    let mut arguments = vec!["--admin-listen".to_owned(), "127.0.0.1:0".to_owned()];
    arguments.extend(files.flags());
    let serving = Serving::start(&arguments.iter().map(String::as_str).collect::<Vec<_>>()).await;
    let admin: SocketAddr = serving.event("admin_listening")["address"].as_str().unwrap().parse().unwrap();
    let mut client = serving.client().await;
    for (number, organization) in ["one", "one", "one", "one", "one", "two", "three"].into_iter().enumerate() {
        let attention = json(admin).await["attention"].to_string();
        assert!(!attention.contains("no key of provider"), "{attention}");
        let mut request = decide(&format!("{CANARY}-{number}"));
        request.workspace_spec.as_mut().unwrap().organization_id = organization.into();
        assert!(!is_allow(&client.decide(request).await.unwrap().into_inner()));
    }
    let attention = json(admin).await["attention"].to_string();
    assert!(
        attention.contains("no key of provider `acme` was accepted since 2") && attention.contains(": 7 were refused"),
        "{attention}"
    );
}

/// A vendor that refuses everybody, a provider that seldom answers, and a breaker that is open for one organization: each has a line, though each
/// denial by itself may be its tenant's fault.
#[tokio::test]
async fn a_provider_that_fails_many_is_under_attention() {
    let at = |key: Option<&'static str>, status, body| Row::at("/acme/v1/models", key, status, body);
    let refusal = r#"{"error": {"code": "invalid_api_key"}}"#;
    let failing = [["made-up-0", "made-up-1", "made-up-2", "made-up-3"], ["made-up-4", "made-up-5", "made-up-6", "made-up-7"]];
    let mut rows: Vec<Row> = failing.iter().flatten().map(|key| at(Some(*key), 500, "{}")).collect();
    rows.extend([at(Some("made-up-key"), 200, r#"{"data": []}"#), at(None, 401, refusal)]);
    let vendor = Vendor::start(rows).await;
    let mut arguments = vec!["--admin-listen".to_owned(), "127.0.0.1:0".to_owned()];
    let files = files(vendor.address.port());
    arguments.extend(files.flags());
    // Long enough that the breaker is still open when the page is read.
    let environment = [("BYOK_GATE__BREAKER__COOL_DOWN", "10m"), ("BYOK_GATE__BREAKER__MAX_COOL_DOWN", "10m")];
    let serving = Serving::start_in(&arguments.iter().map(String::as_str).collect::<Vec<_>>(), &environment).await;
    let admin: SocketAddr = serving.event("admin_listening")["address"].as_str().unwrap().parse().unwrap();
    let mut client = serving.client().await;
    for number in 0..5 {
        assert!(!is_allow(&client.decide(decide(&format!("{CANARY}-{number}"))).await.unwrap().into_inner()));
    }
    let whats = async || {
        let attention = json(admin).await["attention"].clone();
        attention.as_array().unwrap().iter().map(|it| it["what"].as_str().unwrap().to_owned()).collect::<Vec<_>>().join("\n")
    };
    let refused = whats().await;
    assert!(refused.starts_with("no key of provider `acme` was accepted since 2"), "{refused}");
    assert!(refused.ends_with(": 5 were refused"), "{refused}");
    // A key that is accepted takes that back. It does not hide that many others come to no result.
    assert!(is_allow(&client.decide(decide("made-up-key")).await.unwrap().into_inner()));
    assert_eq!(whats().await, "");
    for (number, keys) in failing.into_iter().enumerate() {
        for key in keys {
            client.decide(decide(key)).await.unwrap();
        }
        // It answers in between, so that its breaker stays closed.
        client.decide(decide(&format!("{CANARY}-between-{number}"))).await.unwrap();
    }
    let failing = whats().await;
    assert!(failing.starts_with("8 of the last 16 checks of provider `acme` came to no result; the last, at 2"), "{failing}");
    assert!(failing.contains("HTTP 500"), "{failing}");
    for number in 0..5 {
        let mut request = of_model("gone/m", "GONE_API_KEY", &format!("{CANARY}-{number}"));
        request.workspace_spec.as_mut().unwrap().organization_id = "made-up-organization".into();
        assert!(!is_allow(&client.decide(request).await.unwrap().into_inner()));
    }
    let event = serving.until("breaker_opened_for_few").await;
    assert_eq!((&event["level"], &event["provider"]), (&"WARN".into(), &"gone".into()), "{event}");
    let few = whats().await;
    let line = "the breaker of provider `gone` is open for 1 organization: 127.0.0.1:1: no connection";
    assert!(few.contains(line), "{few}");
    let told = run(&["status", "--server", &admin.to_string()], &[]).await;
    assert!(page(admin).await.contains("open for 1 organization") && told.stdout.contains("breaker open for 1 organization"));
    assert_eq!(
        json(admin).await["providers"].as_array().unwrap().iter().filter(|it| it["breaker_open_for_organizations"] == 1).count(),
        1
    );
}

/// A limited number, the newest first; workspaces are named only if configured.
#[tokio::test]
async fn a_hundred_denials_are_kept() {
    let mut settings = settings();
    settings.admin.show_workspace_ids = true;
    let shown = Shown::over(settings, &files(1), Held::new(true), Vec::new()).await;
    let mut client = client(&shown.edge).await;
    for number in 0..130 {
        let mut request = of_model("acme-large", "ACME_API_KEY", "");
        request.workspace_spec.as_mut().unwrap().workspace_id = format!("ws-{number}");
        assert!(!is_allow(&client.decide(request).await.unwrap().into_inner()));
    }
    let status = json(shown.admin).await;
    let ids: Vec<String> =
        status["denials"].as_array().unwrap().iter().map(|it| it["workspace_id"].as_str().unwrap().to_owned()).collect();
    assert_eq!(ids, (30..130).rev().map(|number| format!("ws-{number}")).collect::<Vec<_>>());
    assert!(page(shown.admin).await.contains("ws-129"));
}

/// The real process, called over a socket file; the command exits with 1 if something needs attention; another server's answer is an error.
#[tokio::test]
async fn the_command_reads_a_process_over_a_socket_file() {
    let vendor = vendor().await;
    let (registry, catalogue) = case::documents(vendor.address.port());
    let files = Files::new(&registry, &catalogue, Some("providers: {acme: {probe: report, until: 2099-01-01}}\n"));
    let socket = format!("unix:{}", files.folder().join("admin.sock").display());
    let mut arguments = vec!["--admin-listen".to_owned(), socket.clone()];
    arguments.extend(files.flags());
    let serving = Serving::start(&arguments.iter().map(String::as_str).collect::<Vec<_>>()).await;
    let told = run(&["status", "--server", &socket], &[]).await;
    assert_eq!(told.status.code(), Some(1), "{told:?}");
    assert!(told.stdout.contains("! provider `acme` is set to report until 2099-01-01T00:00:00Z"), "{}", told.stdout);
    let whole = run(&["status", "--server", &socket, "--format", "json"], &[]).await;
    let whole: Value = serde_json::from_str(&whole.stdout).unwrap();
    assert_eq!(whole["version"], env!("CARGO_PKG_VERSION"));
    for (server, words) in [
        (serving.address.as_str(), "is that the address of --admin-listen"),
        ("127.0.0.1:1", "nothing answers there"),
        ("127.0.0.1", "the port is missing"),
    ] {
        let told = run(&["status", "--server", server], &[]).await;
        assert!(told.status.code().is_some_and(|code| code != 0), "{told:?}");
        assert!(told.stderr.contains(words), "{server}: {}", told.stderr);
    }
    // A file that has become invalid is shown, with what is wrong.
    std::fs::write(files.folder().join("registry.yaml"), "schema_version: 1\nproviders: []\n").unwrap();
    serving.until("reload_failed").await;
    let told = run(&["status", "--server", &socket], &[]).await;
    assert!(
        told.stdout.contains("the registry's last change is invalid; the last good version stays in force"),
        "{}",
        told.stdout
    );
}

/// Certificate, key, tokens and configuration: what of them was changed and is not in force is on the page with its cause, in a row of its
/// own, and gone once it is mended.
#[tokio::test]
async fn what_was_changed_and_is_not_in_force_is_told_until_it_is_mended() {
    let (registry, catalogue) = case::documents(1);
    let files = Files::new(&registry, &catalogue, Some("{}"));
    let at = |name: &str| files.folder().join(name).to_str().unwrap().to_owned();
    let authority = Authority::new();
    let (pair, other) = (authority.sign("localhost"), authority.sign("localhost"));
    let good = "made-up-token-0123456789\n";
    for (name, text) in [("server.pem", &pair.certificate), ("server.key", &pair.key), ("tokens", &good.to_owned())] {
        fs::write(at(name), text).unwrap();
        set_mode(&at(name), 0o600);
    }
    let socket = format!("unix:{}", at("gate.sock"));
    let (pem, key, tokens) = (at("server.pem"), at("server.key"), at("tokens"));
    let mut arguments = vec!["--admin-listen", "127.0.0.1:0", "--listen", &socket, "--tls-cert", &pem, "--tls-key", &key];
    arguments.extend(["--token-file", &tokens]);
    let flags = files.flags();
    arguments.extend(flags.iter().map(String::as_str));
    let serving = Serving::start(&arguments).await;
    let admin: SocketAddr = serving.event("admin_listening")["address"].as_str().unwrap().parse().unwrap();
    let until = async |what: &str, fits: &dyn Fn(&str) -> bool| {
        let ends = Instant::now() + PATIENCE;
        loop {
            let status = json(admin).await;
            let attention: Vec<&str> =
                status["attention"].as_array().unwrap().iter().map(|it| it["what"].as_str().unwrap()).collect();
            if fits(&attention.join("\n")) {
                return status;
            }
            assert!(Instant::now() < ends, "{what}: {status:#}");
            sleep(Duration::from_millis(20)).await;
        }
    };
    let error = |status: &Value, document: &str| {
        let all = status["documents"].as_array().unwrap();
        let of = all.iter().find(|it| it["document"] == document).unwrap_or_else(|| panic!("no row of {document}: {all:#?}"));
        of["last_reload_error"].as_str().unwrap().to_owned()
    };
    let fresh = until("nothing at first", &str::is_empty).await;
    assert_eq!((&fresh["restart_needed"], &*error(&fresh, "configuration")), (&serde_json::json!([]), ""));
    // A secret that every user can read, from the start or later.
    for file in [&tokens, &key] {
        set_mode(file, 0o644);
        let words = format!("{file} holds a secret, and every user of this machine can read it");
        until(&words, &|attention| attention == words).await;
        set_mode(file, 0o600);
        until("closed", &str::is_empty).await;
    }
    // Each is broken while the others are well.
    let config = at("config.yaml");
    for (file, bad, document, cause, mended) in [
        (&key, other.key.as_str(), "tls", "does not match the key", pair.key.as_str()),
        (&pem, "", "tls", "server.pem: holds no certificate in PEM", &pair.certificate),
        (&tokens, "short\n", "tokens", "line 1: the token has fewer than 16 characters", good),
        (&config, "limits: {decision: 7}", "configuration", "limits.decision: is not a key", "{}"),
    ] {
        fs::write(file, bad).unwrap();
        let status = until(cause, &|attention| attention.contains(cause)).await;
        assert!(error(&status, document).contains(cause), "{status:#}");
        let row = status["documents"].as_array().unwrap().iter().find(|row| row["document"] == document).unwrap();
        let failed_at = row["last_reload_failed_at"].as_str().unwrap();
        assert!(
            failed_at >= row["loaded_at"].as_str().unwrap() && status["attention"].to_string().contains(failed_at),
            "{status:#}"
        );
        for row in status["documents"].as_array().unwrap().iter().filter(|row| row["document"] != document) {
            assert_eq!(row["last_reload_error"], "", "{status:#}");
        }
        let shown = page(admin).await;
        let told = run(&["status", "--server", &admin.to_string()], &[]).await;
        assert!(shown.contains(cause) && told.stdout.matches(cause).count() == 1, "{cause} in {} {shown}", told.stdout);
        fs::write(file, mended).unwrap();
        until("mended", &str::is_empty).await;
    }
    // What stands, and waits for a restart.
    fs::write(&config, "limits: {decisions: 7}\ncache: {valid: 31s}\n").unwrap();
    let words = "a restart is needed for cache.valid, limits.decisions";
    let status = until(words, &|attention| attention.contains(words)).await;
    assert_eq!(status["restart_needed"], serde_json::json!(["cache.valid", "limits.decisions"]));
    assert!(page(admin).await.contains(words));
    let told = run(&["status", "--server", &admin.to_string()], &[]).await;
    assert!(told.stdout.contains(words), "{}", told.stdout);
    // A further change that is invalid does not hide it.
    fs::write(&config, "limits: {decision: 7}").unwrap();
    until("both", &|attention| attention.contains(words) && attention.contains("limits.decision: is not a key")).await;
    fs::write(&config, "{}").unwrap();
    let status = until("put back", &str::is_empty).await;
    assert_eq!(status["restart_needed"], serde_json::json!([]));
    // What was changed is told with both values, the last one first.
    let changes: Vec<String> = status["changes"]
        .as_array()
        .unwrap()
        .iter()
        .map(|it| format!("{} {} -> {}", it["setting"], it["was"], it["is"]).replace('"', ""))
        .collect();
    assert_eq!(changes[..2], ["limits.decisions 7 -> 8192", "cache.valid 31s -> 30s"], "{changes:?}");
    assert_eq!(changes[2..], ["limits.decisions 8192 -> 7", "cache.valid 30s -> 31s"], "{changes:?}");
    fs::write(&tokens, format!("{good}made-up-token-of-another operator\n")).unwrap();
    let added =
        "callers.token_file: without token of line 2 -> with token of line 2 as operator; more is let through than before";
    let ends = Instant::now() + PATIENCE;
    while !run(&["status", "--server", &admin.to_string()], &[]).await.stdout.contains(added) {
        assert!(Instant::now() < ends, "{:#}", json(admin).await["changes"]);
    }
    assert!(page(admin).await.contains("with token of line 2 as operator"));
}
