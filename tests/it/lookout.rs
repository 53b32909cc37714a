//! Commands that find a wrong base URL, an unused row, and a vendor that has changed: `check`, `check --probe`, `catalogue verify`.

use serde_json::{Value, json};

use crate::support::{
    binary::{Ended, Serving, run},
    case,
    gate::Files,
    vendor::{Row, Vendor},
};

fn row(path: &str, status: u16, body: &str) -> Row {
    Row { path: Some(path.into()), status: Some(status), body: body.into(), ..Row::default() }
}

async fn ask(files: &Files, arguments: &[&str]) -> Ended {
    let flags = files.flags();
    run(&[arguments, &flags.iter().map(String::as_str).collect::<Vec<_>>()].concat(), &[]).await
}

/// Each provider is called once, without a key; a page on every path is a wrong base URL.
#[tokio::test]
async fn check_probe_finds_a_base_url_without_an_api() {
    let refused = r#"{"error": {"code": "missing"}}"#;
    let vendor = Vendor::start(vec![
        row("/acme/v1/models", 401, refused),
        row("/beta/v1/models", 401, refused),
        Row { headers: [("content-type".into(), "text/html".into())].into(), body: "<html>app</html>".into(), ..Row::default() },
    ])
    .await;
    let (registry, catalogue) = case::documents(vendor.address.port());
    let files = Files::new(&registry, &catalogue, None);
    let ended = ask(&files, &["check", "--probe"]).await;
    assert_eq!(ended.status.code(), Some(3), "{ended:?}");
    for words in [
        "asked: provider `acme` at 127.0.0.1",
        "HTTP 401",
        "providers.loose: 127.0.0.1",
        "no API at this base URL",
        "warning: ",
        "providers.gone: 127.0.0.1:1: no connection: nothing is listening there, or a firewall is in the way; look at egress to that host and port",
    ] {
        assert!(ended.stdout.contains(words), "{words} in {}", ended.stdout);
    }
    assert!(vendor.asked().iter().all(|asked| asked.keys().is_empty()), "a key was sent: {:?}", vendor.asked());
    let of = |path: &str| vendor.asked().iter().filter(|asked| asked.path.starts_with(path)).count();
    assert_eq!((of("/acme"), of("/beta"), of("/loose")), (1, 1, 2));
}

#[tokio::test]
async fn check_tells_of_rows_that_nobody_is_asked_by_and_that_have_grown_old() {
    let (registry, catalogue) = case::documents(4343);
    let more = "  - {host: llm.nowhere.example, vendor: nobody}\n  - {host: 127.0.0.1, vendor: portless}\n  - {host: \"127.0.0.1:1\", vendor: gone, since: 2019-01-01}\nkey_shapes:";
    let files = Files::new(&registry, &catalogue.replacen("key_shapes:", more, 1), None);
    let ended = ask(&files, &["check"]).await;
    assert_eq!(ended.status.code(), Some(0), "{ended:?}");
    for words in [
        "hosts.llm.nowhere.example: matches no provider of the registry: this row is unused",
        "is dialled at `127.0.0.1:4343`; write the port with the host",
        "hosts.127.0.0.1:1: its facts are of 2019-01-01",
    ] {
        assert!(ended.stdout.contains(words), "{words} in {}", ended.stdout);
    }
    assert_eq!(ended.stdout.matches("matches no provider").count(), 2, "{}", ended.stdout);
    assert_eq!(ask(&files, &["check", "--strict"]).await.status.code(), Some(3));
    // An old document is not invalid.
    let aged = catalogue.replacen("key_shapes:", "  - {host: \"127.0.0.1:1\", vendor: gone, since: 2019-01-01}\nkey_shapes:", 1);
    let ended = ask(&Files::new(&registry, &aged, None), &["check", "--strict"]).await;
    let line = ended.stdout.lines().find(|line| line.contains("hosts.127.0.0.1:1")).unwrap();
    assert!(line.starts_with("warning: "), "{ended:?}");
}

/// A provider at an address that may not be dialled denies every tenant of it: `check` says so, and so does the log at the start.
#[tokio::test]
async fn a_provider_that_may_not_be_dialled_is_told_before_a_tenant_meets_it() {
    let (registry, catalogue) = case::documents(1);
    let files = Files::new(&registry.replacen("http://127.0.0.1:1/", "https://10.1.2.3/", 1), &catalogue, None);
    let told = "https://10.1.2.3: its address or scheme may not be dialled by this configuration";
    let ended = ask(&files, &["check"]).await;
    assert!(ended.stdout.lines().any(|line| line.starts_with("warning: ") && line.contains(told)), "{ended:?}");
    let flags = files.flags();
    let serving = Serving::start(&flags.iter().map(String::as_str).collect::<Vec<_>>()).await;
    let mut warnings = serving.events("configuration_warning");
    assert!(warnings.any(|event| event["level"] == "WARN" && event["message"].as_str().unwrap().contains(told)));
}

/// A wrong value does not hide a missing file, nor a listener that would be refused.
#[tokio::test]
async fn check_tells_all_of_it_in_one_round() {
    let (registry, catalogue) = case::documents(1);
    let config = "log: {plain_allow_ratio: 2}\ncache: {valid: soon}\nserver: {listen: ['192.0.2.1:50051']}\n\
                  callers: {token_file: /nowhere/tokens}\nproviders: {nobodys: {probe: off, until: 2099-01-01}}\n";
    let files = Files::new(&registry, &catalogue, Some(config));
    let ended = ask(&files, &["check"]).await;
    assert_eq!(ended.status.code(), Some(3), "{ended:?}");
    for words in ["log.plain_allow_ratio", "cache.valid", "192.0.2.1:50051", "/nowhere/tokens", "providers.nobodys"] {
        assert!(ended.stdout.lines().any(|line| line.starts_with("error: ") && line.contains(words)), "{words} in {ended:?}");
    }
    // Nothing is reported that depends on other faults.
    let config = "server: {listen: ['0.0.0.0:0']}\ntls: {certificate: [1], key: /nowhere/server.key}\nadmin: {listen: 'unix:/nowhere/admin.sock'}\n\
                  callers: {token_file: /nowhere/tokens}\nlimits: {decisions: many}\n";
    let ended = ask(&Files::new(&registry, &catalogue, Some(config)), &["check"]).await;
    for words in [
        "tls.certificate: ",
        "/nowhere/server.key",
        "admin.listen: could not listen on unix:/nowhere/admin.sock",
        "/nowhere/tokens",
    ] {
        assert!(ended.stdout.lines().any(|line| line.starts_with("error: ") && line.contains(words)), "{words} in {ended:?}");
    }
    assert!(!ended.stdout.contains("0.0.0.0") && !ended.stdout.contains("server.listen"), "{ended:?}");
}

/// What is valid and probably not meant: a misspelt runtime that exempts nothing, and a listener without TLS that knows no callers.
#[tokio::test]
async fn check_warns_of_what_is_probably_not_meant() {
    let (registry, catalogue) = case::documents(1);
    let near = "exempt_runtimes: `agnet` is no runtime of the registry, and so exempts nothing there; the nearest is `agent`";
    let open = "server.insecure_listen: everybody who reaches 0.0.0.0:0 may call, without TLS and without a token";
    let listens = "server: {listen: ['127.0.0.1:0', '0.0.0.0:0'], insecure_listen: true}";
    for (config, expect) in [
        ("exempt_runtimes: [agnet]".to_owned(), Some(near)),
        ("exempt_runtimes: [agent, mock]".to_owned(), None),
        (listens.to_owned(), Some(open)),
        (format!("{listens}\ncallers: anyone"), None),
        (
            "server: {insecure_listen: true, listen: ['127.0.0.1:0', 'unix:/run/gate.sock', 'localhost:0', '[::1]:0']}"
                .to_owned(),
            None,
        ),
    ] {
        let ended = ask(&Files::new(&registry, &catalogue, Some(&config)), &["check", "--elsewhere"]).await;
        let told: Vec<&str> = ended.stdout.lines().filter(|line| line.starts_with("warning: ")).collect();
        let fits = |line: &&str| expect.is_some_and(|words| line.contains(words));
        assert_eq!(told.iter().filter(|line| fits(line)).count(), usize::from(expect.is_some()), "{config}: {ended:?}");
        assert!(
            told.iter().all(|line| fits(line) || !line.contains("exempt") && !line.contains("insecure")),
            "{config}: {ended:?}"
        );
    }
}

/// A misspelt key hides neither a listener that would be open to everybody nor a token file that everybody can read.
#[tokio::test]
async fn a_misspelt_key_hides_nothing() {
    let (registry, catalogue) = case::documents(1);
    let config = "server: {listen: ['0.0.0.0:0']}\ntls: {certificate: /nowhere/pem, key: /nowhere/key}\ncallers: {token_fil: /nowhere/tokens}\n";
    let ended = ask(&Files::new(&registry, &catalogue, Some(config)), &["check"]).await;
    for words in ["callers.token_fil: is not a key", "listening on 0.0.0.0:0 with TLS would take calls from everybody"] {
        assert!(ended.stdout.lines().any(|line| line.starts_with("error: ") && line.contains(words)), "{words} in {ended:?}");
    }
    // A registry that is refused ignores nothing.
    let ended = ask(&Files::new(&registry.replacen("auth_env", "auth_evn", 1), &catalogue, None), &["check"]).await;
    let told = ended.stdout.lines().find(|line| line.contains("auth_evn")).unwrap_or_else(|| panic!("{ended:?}"));
    assert!(told.ends_with("auth_evn: is not a key that this schema knows; the nearest is `auth_env`"), "{told}");
    let files = Files::new(&registry, &catalogue, Some("limits: {decision: 7}\n"));
    let tokens = files.folder().join("tokens");
    std::fs::write(&tokens, "made-up-token-0123456789\n").unwrap();
    std::fs::set_permissions(&tokens, std::os::unix::fs::PermissionsExt::from_mode(0o644)).unwrap();
    let ended = ask(&files, &["check", "--token-file", tokens.to_str().unwrap()]).await;
    for words in ["limits.decision: is not a key", "every user of this machine can read it"] {
        assert!(ended.stdout.contains(words), "{words} in {ended:?}");
    }
}

/// What is on the way to a provider is told as to a tenant: DNS, connect, TLS, each with its remedy.
#[tokio::test]
async fn check_probe_tells_what_failed_on_the_way_and_what_to_do() {
    // It answers, and speaks no TLS.
    let vendor = Vendor::start(vec![row("/acme/v1/models", 401, "{}")]).await;
    let port = vendor.address.port();
    let (registry, catalogue) = case::documents(port);
    for (base, unreached, words) in [
        (
            "http://127.0.0.1:1/",
            "CONNECT",
            "no connection: nothing is listening there, or a firewall is in the way; look at egress",
        ),
        ("https://no-such-vendor.invalid/", "DNS", "the name could not be resolved (DNS); check the cluster's DNS"),
        (
            &*format!("https://127.0.0.1:{port}/"),
            "TLS",
            "connected, but TLS failed: the port has no TLS, or its certificate cannot be used; correct the base URL",
        ),
    ] {
        let files = Files::new(&registry.replacen("http://127.0.0.1:1/", base, 1), &catalogue, None);
        let ended = ask(&files, &["check", "--probe"]).await;
        let of = |start: &str| {
            ended.stdout.lines().find(|line| line.starts_with(start) && line.contains("gone")).unwrap_or_default().to_owned()
        };
        assert!(of("warning: ").contains(words), "{words} in {}", ended.stdout);
        assert!(of("asked: ").ends_with(&format!("not reachable from here: {unreached}")), "{}", ended.stdout);
    }
}

/// A port that is in use keeps `serve` from starting, unless it is the service itself that has it: told, and no mistake of the document.
#[tokio::test]
async fn check_tells_of_an_address_that_is_in_use() {
    let (registry, catalogue) = case::documents(1);
    let files = Files::new(&registry, &catalogue, None);
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let socket = files.folder().join("admin.sock");
    let _listening = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    let socket = format!("unix:{}", socket.display());
    let arguments = ["check", "--strict", "--listen", &address, "--admin-listen", &socket];
    // By the embedded documents, of which nothing is odd.
    let ended = run(&arguments, &[]).await;
    assert_eq!(ended.status.code(), Some(0), "{ended:?}");
    for words in [format!("server.listen: {address} is in use"), format!("admin.listen: {socket} is in use")] {
        assert!(ended.stdout.lines().any(|line| line.starts_with("warning: ") && line.contains(&words)), "{words} in {ended:?}");
    }
    let elsewhere = ask(&files, &[&arguments[..], &["--elsewhere"]].concat()).await;
    assert!(!elsewhere.stdout.contains("in use"), "{elsewhere:?}");
    drop(taken);
    let free = ask(&files, &["check", "--listen", &address]).await;
    assert!(!free.stdout.contains("in use"), "{free:?}");
    // Twice in the same configuration is a mistake of its own.
    let twice = ask(&files, &["check", "--listen", &address, "--admin-listen", &address]).await;
    assert!(twice.stdout.contains("admin.listen: could not listen on") && twice.status.code() == Some(3), "{twice:?}");
}

/// Every bad line of a token file at once, by number and never by content.
#[tokio::test]
async fn check_tells_every_bad_line_of_a_token_file() {
    let (registry, catalogue) = case::documents(1);
    let files = Files::new(&registry, &catalogue, None);
    let tokens = files.folder().join("tokens");
    let text = "made-up-canary-0123456789\nshort\n# good\nmade-up-canary-0123456789\nmade-up-canary-9876543210 root\n";
    std::fs::write(&tokens, text).unwrap();
    let tokens = tokens.to_str().unwrap();
    let ended = ask(&files, &["check", "--token-file", tokens]).await;
    assert_eq!(ended.status.code(), Some(3), "{ended:?}");
    for words in ["2: the token has fewer", "4: the token appears twice", "5: the role must be"] {
        assert!(ended.stdout.contains(&format!("error: {tokens}:{words}")), "{words} in {}", ended.stdout);
    }
    let flags = files.flags();
    let flags = flags.iter().map(String::as_str);
    let ended = run(&["serve", "--token-file", tokens].into_iter().chain(flags).collect::<Vec<_>>(), &[]).await;
    for words in ["line 2: the token has fewer", "line 4: the token appears twice", "line 5: the role must be"] {
        assert!(ended.stderr.contains(words), "{words} in {}", ended.stderr);
    }
    assert!(!ended.stderr.contains("canary"), "{ended:?}");
}

/// One made-up key for each endpoint and header; what is documented to refuse it and does not is drift.
#[tokio::test]
async fn verify_finds_drift_with_made_up_keys_alone() {
    let refused = r#"{"error": {"code": "invalid_api_key"}}"#;
    let good = vec![
        row("/acme/v1/models", 401, refused),
        row("/acme/v1/chat/completions", 401, refused),
        row("/beta/v1/models", 401, refused),
    ];
    let lost = vec![
        row("/acme/v1/models", 200, r#"{"data": []}"#),
        row("/acme/v1/chat/completions", 400, r#"{"error": {"code": "x"}}"#),
    ];
    for (rows, code, results) in [(good, 0, ["REFUSED", "REFUSED"]), (lost, 12, ["ACCEPTED", "REFUSED_ODDLY"])] {
        let vendor = Vendor::start(rows).await;
        let (registry, catalogue) = case::documents(vendor.address.port());
        let files = Files::new(&registry, &catalogue, None);
        let verify = ["catalogue", "verify", "--provider", "acme", "--pause", "0", "--format", "json"];
        let ended = ask(&files, &verify).await;
        assert_eq!(ended.status.code(), Some(code), "{ended:?}");
        let told: Value = serde_json::from_str(&ended.stdout).unwrap();
        let found: Vec<&str> = told["endpoints"].as_array().unwrap().iter().map(|row| row["result"].as_str().unwrap()).collect();
        assert_eq!(found, results);
        assert_eq!(told["drifted"], json!(if code == 0 { 0 } else { 2 }));
        // The acme vendor's own shape.
        assert!(
            vendor.asked().iter().all(|asked| asked.keys().iter().all(|key| key.starts_with("acme-key-"))),
            "{:?}",
            vendor.asked()
        );
        assert_eq!(vendor.asked().len(), 2);
    }
    let (registry, catalogue) = case::documents(1);
    let files = Files::new(&registry, &catalogue, None);
    assert_eq!(ask(&files, &["catalogue", "verify", "--provider", "nobody"]).await.status.code(), Some(2));
    // An unreachable host proves nothing.
    let ended = ask(&files, &["catalogue", "verify", "--provider", "gone", "--pause", "0"]).await;
    assert_eq!(ended.status.code(), Some(0), "{ended:?}");
    assert!(ended.stdout.contains("NO_ANSWER"), "{ended:?}");
}
