//! A credential leaves the process in one header, for one host, and nowhere else.

use std::{
    collections::BTreeMap,
    fs::{self, Permissions},
    os::unix::fs::{MetadataExt, PermissionsExt},
    process::Stdio,
};

use byok_gate::grpc::convert::pb::DecideRequest;
use tokio::{
    io::{AsyncBufReadExt, BufReader},
    time::timeout,
};

use crate::support::{
    binary::{self, Serving},
    case::{self, Spec, Word},
    edge,
    gate::Files,
    vendor::{Row, Vendor},
};

const CANARY: &str = "made-up-canary-7f3a";

/// The value itself, and the forms in which a log or an error might hold it.
fn forms(value: &str) -> Vec<String> {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let base64 = |bytes: &[u8]| {
        let mut text = String::new();
        for chunk in bytes.chunks_exact(3) {
            let word = u32::from_be_bytes([0, chunk[0], chunk[1], chunk[2]]);
            text.extend([18, 12, 6, 0].map(|shift| char::from(ALPHABET[(word >> shift) as usize & 63])));
        }
        text
    };
    let hex = |separator: &str| value.bytes().map(|byte| format!("{byte:02x}")).collect::<Vec<_>>().join(separator);
    let numbers = value.bytes().map(|byte| byte.to_string()).collect::<Vec<_>>().join(", ");
    let url = value.bytes().map(|byte| format!("%{byte:02X}")).collect();
    // base64 of a text that holds it somewhere: one form for each place within a group of three.
    let bytes = value.as_bytes();
    vec![value.to_owned(), hex(""), hex(", "), numbers, url, base64(bytes), base64(&bytes[1..]), base64(&bytes[2..])]
}

#[track_caller]
pub(crate) fn is_not_in(text: &str, value: &str, place: &str) {
    for form in forms(value) {
        let at = text.find(&form);
        assert!(at.is_none(), "{place}: {form:?} in …{}…", &text[at.unwrap().saturating_sub(200)..at.unwrap() + form.len()]);
    }
}

/// Every case, so every outcome, with a canary for its values where that changes nothing, at the most verbose log level.
#[tokio::test]
async fn no_outcome_tells_a_credential_at_trace() {
    let mut told = 0;
    for (name, mut case) in case::all() {
        let put = |text: &str| text.replace("made-up", CANARY);
        let Some(spec) = &mut case.spec else { continue };
        for value in spec.workspace.values_mut().chain(spec.organization.values_mut()).flatten() {
            *value = put(value);
        }
        spec.credentials.iter_mut().for_each(|credential| credential.value = put(&credential.value));
        case.vendor.iter_mut().for_each(|row| {
            row.key = row.key.as_deref().map(put);
            // A vendor that echoes what it was sent.
            row.headers.insert("x-echo".into(), CANARY.into());
        });
        let vendor = Vendor::start(case.vendor.clone()).await;
        let (registry, catalogue) = case::documents(vendor.address.port());
        let config = case.config.as_ref().map(|config| serde_yaml::to_string(config).unwrap());
        let files = Files::new(&registry, &catalogue, config.as_deref());
        let flags = files.flags();
        let mut arguments = vec!["--log", "trace"];
        arguments.extend(flags.iter().map(String::as_str));
        let serving = Serving::start(&arguments).await;
        let mut client = serving.client().await;
        let checkpoints: Vec<&Word> = case.expect.iter().flat_map(|expect| &expect.at).collect();
        for at in checkpoints {
            let mut request = case.request(at);
            request.explain = true;
            let reply = client.decide(request).await;
            is_not_in(&format!("{reply:?}"), CANARY, &format!("{name}: the reply"));
        }
        drop(client);
        serving.terminate().await;
        let ended = serving.ended().await;
        assert!(ended.status.success(), "{name}: {ended:?}");
        assert!(ended.stdout.contains("TRACE") || ended.stdout.contains("\"decision\""), "{name}: it logged nothing");
        is_not_in(&ended.stdout, CANARY, &format!("{name}: stdout"));
        is_not_in(&ended.stderr, CANARY, &format!("{name}: stderr"));
        told += usize::from(!vendor.asked().is_empty());
    }
    assert!(told > 30, "only {told} cases asked a vendor");
}

/// The command line, with the vendor's answer echoing the credential in every place that it has.
#[tokio::test]
async fn the_command_line_tells_none_at_trace() {
    for (status, body) in
        [(200, "{\"data\": [], \"key\": \"KEY\"}"), (401, "{\"error\": {\"code\": \"KEY\", \"message\": \"KEY\"}}"), (500, "KEY")]
    {
        let row = Row {
            status: Some(status),
            headers: BTreeMap::from([("retry-after".into(), CANARY.into())]),
            body: body.replace("KEY", CANARY),
            ..Row::default()
        };
        let vendor = Vendor::start(vec![row]).await;
        let (registry, catalogue) = case::documents(vendor.address.port());
        let files = Files::new(&registry, &catalogue, None);
        let flags = files.flags();
        for format in ["text", "json"] {
            let arguments = [
                "--log",
                "trace",
                "decide",
                "--model",
                "acme-large",
                "--runtime",
                "agent",
                "--env",
                "ACME_API_KEY",
                "--explain",
                "--format",
                format,
            ];
            let arguments: Vec<&str> = arguments.into_iter().chain(flags.iter().map(String::as_str)).collect();
            let ended = binary::run(&arguments, &[("ACME_API_KEY", CANARY)]).await;
            assert!(matches!(ended.status.code(), Some(0 | 10 | 11)), "{ended:?}");
            is_not_in(&ended.stdout, CANARY, "stdout");
            is_not_in(&ended.stderr, CANARY, "stderr");
        }
        assert!(vendor.asked_with(CANARY) > 0);
    }
}

/// A value on the command line is refused, and not repeated by the refusal.
#[tokio::test]
async fn a_value_in_an_argument_is_refused_unrepeated() {
    for argument in [format!("--credential=ACME_API_KEY={CANARY}"), format!("--env=ACME_API_KEY={CANARY}")] {
        let ended = binary::run(&["decide", "--runtime", "agent", "--model", "m", &argument], &[]).await;
        assert_eq!(ended.status.code(), Some(2), "{ended:?}");
        is_not_in(&ended.stderr, CANARY, "stderr");
        assert_eq!(ended.stdout, "");
    }
}

/// A pod-wide proxy would see every probe; none is taken from the environment.
#[tokio::test]
async fn proxies_in_the_environment_are_ignored() {
    let (vendor, proxy) = (Vendor::start(vec![]).await, Vendor::start(vec![]).await);
    let (registry, catalogue) = case::documents(vendor.address.port());
    let files = Files::new(&registry, &catalogue, None);
    let flags = files.flags();
    let arguments = ["decide", "--model", "acme-large", "--runtime", "agent", "--env", "ACME_API_KEY"];
    let arguments: Vec<&str> = arguments.into_iter().chain(flags.iter().map(String::as_str)).collect();
    let url = proxy.url();
    let mut environment = vec![("ACME_API_KEY", CANARY)];
    environment.extend(
        ["HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"].map(|name| (name, url.as_str())),
    );
    binary::run(&arguments, &environment).await;
    assert!(vendor.asked_with(CANARY) > 0);
    assert!(proxy.asked().is_empty(), "{:?}", proxy.asked());
}

/// Without the flag a loopback or plain-http address is refused before anything is sent.
#[tokio::test]
async fn loopback_is_not_asked_unless_it_is_allowed() {
    let vendor = Vendor::start(vec![]).await;
    let (registry, catalogue) = case::documents(vendor.address.port());
    for host in ["http://127.0.0.1", "http://localhost", "https://127.0.0.1", "https://localhost"] {
        let registry = registry.replace("http://127.0.0.1", host);
        let files = Files::new(&registry, &catalogue, None);
        let flags = files.flags();
        let arguments = ["decide", "--model", "acme-large", "--runtime", "agent", "--env", "ACME_API_KEY"];
        let arguments =
            arguments.into_iter().chain(flags.iter().map(String::as_str)).filter(|flag| *flag != "--allow-loopback-http");
        let ended = binary::run(&arguments.collect::<Vec<_>>(), &[("ACME_API_KEY", CANARY)]).await;
        assert!(ended.stdout.contains("BYOK_PROVIDER_UNREACHABLE"), "{host}: {ended:?}");
        assert!(vendor.connections() == 0, "{host}: it connected");
    }
}

/// No redirect is followed, so that no header arrives at a second host, in any header family.
#[tokio::test]
async fn a_redirect_takes_no_credential_along() {
    let second = Vendor::start(vec![]).await;
    for family in ["bearer", "x-api-key", "x-goog-api-key", "api-key"] {
        for status in [301, 302, 303, 307, 308] {
            let row = Row {
                status: Some(status),
                headers: BTreeMap::from([("location".into(), format!("{}/stolen", second.url()))]),
                ..Row::default()
            };
            let vendor = Vendor::start(vec![row]).await;
            let (registry, catalogue) = case::documents(vendor.address.port());
            let catalogue = catalogue.replace("auth: [bearer]", &format!("auth: [{family}]"));
            let engine = Files::new(&registry, &catalogue, None).engine();
            let spec = Spec {
                model: "acme-large".into(),
                workspace: BTreeMap::from([("ACME_API_KEY".into(), Some(CANARY.into()))]),
                ..Spec::default()
            };
            let request = byok_gate::grpc::convert::pb::DecideRequest {
                workspace_spec: Some(spec.message()),
                checkpoint: 1,
                ..Default::default()
            };
            let request = byok_gate::grpc::convert::request(request).unwrap();
            engine.decide(&request, tokio::time::Instant::now() + binary::PATIENCE).await;
            assert!(vendor.asked_with(CANARY) > 0, "{family} {status}: the vendor was not asked");
        }
    }
    assert!(second.asked().is_empty(), "{:?}", second.asked());
}

/// Every refusal of the edge, with canaries for tokens, keys and credentials, at the most verbose log level.
#[tokio::test]
async fn no_refusal_of_the_edge_tells_a_secret_at_trace() {
    let folder = tempfile::tempdir().unwrap();
    let put = |name: &str, text: &str| {
        let path = folder.path().join(name);
        std::fs::write(&path, text).unwrap();
        path.to_str().unwrap().to_owned()
    };
    // Invalid files: the start fails, and says why without their content.
    let broken = put("broken", CANARY);
    let short = put("short", "made-up-7f3a");
    for (arguments, said) in [
        (vec!["--token-file", &broken], "line 1"),
        (vec!["--token-file", &short], "line 1"),
        (vec!["--allow-anonymous", "--tls-cert", &broken, "--tls-key", &broken], "holds no certificate"),
    ] {
        let whole = [&["--log", "trace", "serve", "--listen", "127.0.0.1:0"], &arguments[..]].concat();
        let broken = put("broken", &format!("{CANARY} nobody"));
        let ended = binary::run(&whole, &[]).await;
        assert_eq!(ended.status.code(), Some(3), "{broken}: {ended:?}");
        assert!(ended.stderr.contains(said), "{ended:?}");
        for place in [&ended.stdout, &ended.stderr] {
            is_not_in(place, CANARY, "a start that failed");
            is_not_in(place, "made-up-7f3a", "a start that failed");
        }
    }
    let token = format!("{CANARY}-token");
    let tokens = put("tokens", &format!("{token}\n{token}-2 workspace ws-1\n"));
    let config = put("config.yaml", "server: {reload_interval: 100ms}\nlimits: {message_bytes: 4096}\n");
    let serving = Serving::start(&["--log", "trace", "--token-file", &tokens, "--config", &config]).await;
    let mut client = serving.client().await;
    let mut said = String::new();
    let request = |value: &str| {
        let workspace = BTreeMap::from([("ANTHROPIC_API_KEY".to_owned(), Some(value.to_owned()))]);
        let spec = Spec { model: "no-such-model".into(), runtime: Some("claude-code".into()), workspace, ..Spec::default() };
        DecideRequest { workspace_spec: Some(spec.message()), checkpoint: 1, ..Default::default() }
    };
    let bad = DecideRequest { checkpoint: 77, ..request(CANARY) };
    let long = request(&CANARY.repeat(200));
    for (bearer, message, timeout) in [
        (format!("Bearer {CANARY}"), request(CANARY), None),
        (format!("Basic {CANARY}"), request(CANARY), None),
        (CANARY.to_owned(), request(CANARY), None),
        (format!("Bearer {token}"), request(CANARY), None),
        (format!("Bearer {token}"), bad, None),
        (format!("Bearer {token}"), long, None),
        (format!("Bearer {token}"), request(CANARY), Some(std::time::Duration::from_nanos(1))),
        (format!("Bearer {token}-2"), request(CANARY), None),
    ] {
        let mut call = tonic::Request::new(message);
        call.metadata_mut().insert("authorization", bearer.parse().unwrap());
        if let Some(timeout) = timeout {
            call.set_timeout(timeout);
        }
        said.push_str(&format!("{:?}", client.decide(call).await));
    }
    // A reload that fails.
    put("tokens", &format!("{CANARY} nobody\n"));
    serving.until("reload_failed").await;
    drop(client);
    // Invalid HTTP/2, and invalid messages.
    let mut plain = tokio::net::TcpStream::connect(&serving.address).await.unwrap();
    let words = format!("POST /{CANARY} HTTP/1.1\r\nauthorization: Bearer {CANARY}\r\n\r\n");
    tokio::io::AsyncWriteExt::write_all(&mut plain, words.as_bytes()).await.unwrap();
    drop(plain);
    let mut sender = edge::raw(serving.address.parse().unwrap()).await;
    let bearer = format!("Bearer {token}");
    let undecodable = edge::grpc(
        "/byokgate.v1.PolicyDecisionService/Decide",
        &[("authorization", &bearer)],
        &[&b"\xff\xff"[..], CANARY.as_bytes()].concat(),
    );
    assert_eq!(edge::code_of(&mut sender, undecodable).await, tonic::Code::InvalidArgument);
    drop(sender);
    serving.terminate().await;
    let ended = serving.ended().await;
    assert!(ended.status.success(), "{ended:?}");
    for (text, place) in [(&said, "the statuses"), (&ended.stdout, "stdout"), (&ended.stderr, "stderr")] {
        is_not_in(text, CANARY, place);
    }
}

/// No other process of its user can read the memory of `serve`, and no core file shows it: the kernel gives such a process's `/proc` to root.
#[tokio::test]
async fn memory_is_nobodys_to_read() {
    let mut serving = Serving::start(&[]).await;
    let process = format!("/proc/{}", serving.child.id().unwrap());
    let limits = fs::read_to_string(format!("{process}/limits")).unwrap();
    let core = limits.lines().find(|line| line.starts_with("Max core file size")).unwrap();
    assert_eq!(core.split_whitespace().skip(4).collect::<Vec<_>>(), ["0", "0", "bytes"]);
    serving.child.kill().await.unwrap();
    // To tell by its owner, it must not be root's own.
    let folder = tempfile::tempdir().unwrap();
    let binary = folder.path().join("byok-gate");
    fs::copy(env!("CARGO_BIN_EXE_byok-gate"), &binary).unwrap();
    fs::set_permissions(folder.path(), Permissions::from_mode(0o755)).unwrap();
    let mut command = tokio::process::Command::new(&binary);
    if fs::metadata("/proc/self").unwrap().uid() == 0 {
        command.uid(65_534);
    }
    let mut child = command
        .args(["serve", "--listen", "127.0.0.1:0"])
        .env_clear()
        .current_dir("/")
        .stdout(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let listening = async { while !lines.next_line().await.unwrap().unwrap().contains("listening") {} };
    timeout(binary::PATIENCE, listening).await.unwrap();
    let id = child.id().unwrap();
    let owners = [format!("/proc/{id}/mem"), format!("/proc/{id}/maps")].map(|path| fs::metadata(path).unwrap().uid());
    assert_eq!(owners, [0, 0], "a process of its user could attach");
}
