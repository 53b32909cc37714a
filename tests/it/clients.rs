//! Commands that call a server: over TLS, with certificates and tokens; and their errors if those do not match.

use std::{fs, path::PathBuf, sync::Arc};

use byok_gate::{
    config::settings::Settings,
    core::engine::Engine,
    server::settings::{CallerList, CertificateCaller, RoleWord},
};
use rustls::version::{TLS12, TLS13};
use serde_json::Value;
use tempfile::TempDir;
use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};

use crate::support::{
    binary::{Serving, run},
    case,
    edge::{Authority, Edge, Pair, settings, tls_client, tls_connect},
    gate::Files,
    page::{Shown, say},
};

const PLATFORM: &str = "spiffe://example.org/platform/api";
const TOKEN: &str = "made-up-token-0123456789";

fn engine() -> Arc<Engine> {
    let (registry, catalogue) = case::documents(1);
    Files::new(&registry, &catalogue, None).engine()
}

/// Certificates in files, as commands take them.
struct Folder(TempDir);

impl Folder {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn put(&self, name: &str, text: &str) -> String {
        let path: PathBuf = self.0.path().join(name);
        fs::write(&path, text).unwrap();
        path.to_str().unwrap().to_owned()
    }

    fn pair(&self, name: &str, pair: &Pair) -> [String; 4] {
        let (certificate, key) =
            (self.put(&format!("{name}.pem"), &pair.certificate), self.put(&format!("{name}.key"), &pair.key));
        ["--client-cert".to_owned(), certificate, "--client-key".to_owned(), key]
    }

    /// A server with this certificate, for every client of the authority.
    fn settings(&self, authority: &Authority, server: &Pair) -> Settings {
        let mut settings = settings();
        settings.tls.certificate = Some(self.put("server.pem", &server.certificate).into());
        settings.tls.key = Some(self.put("server.key", &server.key).into());
        settings.tls.client_ca = Some(self.put("ca.pem", &authority.pem()).into());
        let known = CertificateCaller { san: PLATFORM.to_owned(), role: RoleWord::Platform, workspaces: Default::default() };
        settings.callers.certificates = CallerList::Only(vec![known]);
        settings
    }
}

async fn health(server: &str, arguments: &[&str]) -> (Option<i32>, String) {
    let ended = run(&[&["health", "--server", server], arguments].concat(), &[]).await;
    (ended.status.code(), ended.stdout + &ended.stderr)
}

#[tokio::test]
async fn a_command_speaks_tls_and_says_in_one_sentence_where_that_does_not_fit() {
    let (folder, authority, stranger) = (Folder::new(), Authority::new(), Authority::new());
    let edge = Edge::start(folder.settings(&authority, &authority.sign("localhost")), engine()).await;
    let plain = Edge::start(settings(), engine()).await;
    let by_name = format!("localhost:{}", edge.tcp().port());
    let by_number = edge.tcp().to_string();
    let plain_by_name = format!("localhost:{}", plain.tcp().port());
    let ca = folder.put("ca.pem", &authority.pem());
    let ca = ["--server-ca", ca.as_str()];
    let other_ca = folder.put("other-ca.pem", &stranger.pem());
    let good = folder.pair("good", &authority.sign(PLATFORM));
    let wrong_name = folder.pair("wrong-name", &authority.sign("spiffe://example.org/other"));
    let expired = folder.pair("expired", &authority.sign_until(PLATFORM, 2002));
    let of_a_stranger = folder.pair("stranger", &stranger.sign(PLATFORM));
    let with = |pair: &'static [String; 4]| pair.iter().map(String::as_str).collect::<Vec<_>>();
    let [good, wrong_name, expired, of_a_stranger] =
        [good, wrong_name, expired, of_a_stranger].map(|pair| with(Box::leak(Box::new(pair))));
    for (server, arguments, code, words) in [
        (&by_name, [&ca[..], &good].concat(), 0, "SERVING"),
        (&by_number, [&ca[..], &good, &["--server-name", "localhost"]].concat(), 0, "SERVING"),
        (&by_name, Vec::new(), 1, "speaks TLS: write https:// before the address, or give --server-ca"),
        (&plain_by_name, Vec::new(), 0, "SERVING"),
        (&plain_by_name, ca.to_vec(), 1, "speaks no TLS: leave out https://"),
        (&by_name, ca.to_vec(), 1, "the server wants a client certificate: give --client-cert and --client-key"),
        (&by_name, [&ca[..], &wrong_name].concat(), 1, "takes no client certificate with these names"),
        (&by_name, [&ca[..], &expired].concat(), 1, "this client's certificate has expired"),
        (&by_name, [&ca[..], &of_a_stranger].concat(), 1, "does not know the authority of this client's certificate"),
        (&by_name, [&["--server-ca", &other_ca][..], &good].concat(), 1, "signed by no authority that is trusted here"),
        (&by_number, [&ca[..], &good].concat(), 1, "the server's certificate is for another name"),
        (&by_name, vec!["--client-cert", good[1]], 2, "--client-cert needs --client-key"),
        (&by_name, vec!["--server-ca", "/no/such/file"], 2, "--server-ca /no/such/file"),
    ] {
        let (ended, said) = health(server, &arguments).await;
        assert!(ended == Some(code) && said.contains(words), "{server} {arguments:?}: {ended:?} {said}");
        assert!(said.lines().count() == 1, "one sentence: {said}");
    }
    let (ended, said) = health(&format!("http://{by_name}"), &ca).await;
    assert!(ended == Some(2) && said.contains("write https://"), "{said}");
}

#[tokio::test]
async fn a_decision_is_asked_for_with_a_token() {
    let folder = Folder::new();
    let mut settings = settings();
    settings.callers.token_file = Some(folder.put("tokens", &format!("# ours\n{TOKEN} platform\n")).into());
    let edge = Edge::start(settings, engine()).await;
    let server = edge.tcp().to_string();
    let asked = ["decide", "--server", &server, "--runtime", "agent", "--model", "acme-large"];
    let own = folder.put("own", &format!("{TOKEN}\n"));
    let same = folder.put("same", &format!("# ours\n{TOKEN} platform\n"));
    let wrong = folder.put("wrong", "made-up-other-0123456789\n");
    let empty = folder.put("empty", "# nothing\n");
    for (file, code, words) in [
        (None, 1, "no decision: 127.0.0.1"),
        (None, 1, "give --client-token-file"),
        (Some(&own), 10, "MISSING_BYOK_CREDENTIAL"),
        (Some(&same), 10, "MISSING_BYOK_CREDENTIAL"),
        (Some(&wrong), 1, "the bearer token is not known"),
        (Some(&empty), 2, "holds no token"),
    ] {
        let more: Vec<&str> = file.iter().flat_map(|file| ["--client-token-file", file.as_str()]).collect();
        let ended = run(&[&asked[..], &more].concat(), &[]).await;
        let said = ended.stdout + &ended.stderr;
        assert!(ended.status.code() == Some(code) && said.contains(words), "{file:?}: {:?} {said}", ended.status);
        assert!(!said.contains("made-up-"), "{said}");
    }
    // And by the environment, as a pod has it.
    let command = ["exec", "--runtime", "agent", "--model", "acme-large", "--", "true"];
    let environment = [("BYOK_GATE_SERVER", server.as_str()), ("BYOK_GATE_CLIENT_TOKEN_FILE", own.as_str())];
    let ended = run(&command, &environment).await;
    assert!(ended.status.code() == Some(10) && ended.stderr.contains("MISSING_BYOK_CREDENTIAL"), "{ended:?}");
    let ended = run(&["decide", "--runtime", "agent", "--model", "m", "--client-token-file", &own], &[]).await;
    assert!(ended.status.code() == Some(2) && ended.stderr.contains("need --server"), "{ended:?}");
}

/// A refused client is in the log of the real process, by name, once a minute, and on its page; so is a certificate that is about to expire.
#[tokio::test]
async fn the_log_names_who_was_refused_and_why() {
    let (folder, authority, stranger) = (Folder::new(), Authority::new(), Authority::new());
    let soon = jiff::Zoned::now().checked_add(jiff::Span::new().days(10)).unwrap();
    let server = authority.sign_until_day("localhost", i32::from(soon.year()), soon.month() as u8, soon.day() as u8);
    let certificate = folder.put("server.pem", &server.certificate);
    let (key, ca) = (folder.put("server.key", &server.key), folder.put("ca.pem", &authority.pem()));
    let flags = ["--tls-cert", &certificate, "--tls-key", &key, "--tls-client-ca", &ca, "--allow-client-san", PLATFORM];
    let checked = run(&[&["check", "--listen", "127.0.0.1:0"], &flags[..]].concat(), &[]).await;
    assert!(checked.stdout.contains(&format!("tls.certificate: {certificate} expires at")), "{checked:?}");
    // Without a list, every certificate of the authority may call.
    let unlisted = run(&[&["check", "--listen", "127.0.0.1:0"], &flags[..6]].concat(), &[]).await;
    assert!(unlisted.stdout.contains("certificates: is not set: every certificate of tls.client_ca"), "{unlisted:?}");
    let serving = Serving::start(&[&flags[..], &["--admin-listen", "127.0.0.1:0"]].concat()).await;
    let admin = serving.event("admin_listening")["address"].as_str().unwrap().parse().unwrap();
    let near = serving.until("certificate_near_end").await;
    assert_eq!(
        (&near["level"], &near["setting"], &near["file"]),
        (&"WARN".into(), &"tls.certificate".into(), &certificate.as_str().into())
    );
    let address = serving.address.parse().unwrap();
    let refused = async |fault: &str| {
        serving.until_fits(fault, |event| event["event"] == "connection_refused" && event["fault"] == fault).await
    };
    let other = "spiffe://example.org/other";
    for (version, fault, own, trusted, names) in [
        (&TLS13, "CERTIFICATE_NAME", Some(authority.sign(other)), &authority, other),
        (&TLS12, "CERTIFICATE_EXPIRED", Some(authority.sign_until(PLATFORM, 2002)), &authority, PLATFORM),
        (&TLS13, "CERTIFICATE_AUTHORITY", Some(stranger.sign(other)), &authority, other),
        (&TLS13, "CERTIFICATE_MISSING", None, &authority, ""),
        (&TLS13, "SERVER_CERTIFICATE_REFUSED", Some(authority.sign(PLATFORM)), &stranger, ""),
    ] {
        drop(tls_connect(address, &tls_client(trusted, own.as_ref(), &[version])).await);
        let event = refused(fault).await;
        assert_eq!(
            (&event["level"], &event["peer"], &event["names"], &event["count"]),
            (&"WARN".into(), &"127.0.0.1".into(), &names.into(), &1.into()),
            "{event}"
        );
        assert!(event["message"].as_str().unwrap().len() > 20, "{event}");
        let has_dates =
            event["detail"].as_str().unwrap().starts_with("the certificate ended at 2002-01-01T00:00:00Z, and it is 2");
        assert_eq!(has_dates, fault == "CERTIFICATE_EXPIRED", "{event}");
    }
    // A browser, or a check of a load balancer's, offers HTTP/1.1 alone.
    let mut config = (**tls_client(&authority, Some(&authority.sign(PLATFORM)), &[&TLS13]).config()).clone();
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    drop(tls_connect(address, &tokio_rustls::TlsConnector::from(std::sync::Arc::new(config))).await);
    refused("NO_HTTP2").await;
    // Again within the minute: counted, not logged.
    drop(tls_connect(address, &tls_client(&authority, None, &[&TLS13])).await);
    let mut plain = tokio::net::TcpStream::connect(address).await.unwrap();
    tokio::io::AsyncWriteExt::write_all(&mut plain, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await.unwrap();
    let mut heard = Vec::new();
    tokio::io::AsyncReadExt::read_to_end(&mut plain, &mut heard).await.unwrap();
    assert_eq!(heard, [21, 3, 3, 0, 2, 2, 10], "an alert of TLS");
    refused("NO_TLS").await;
    let answer = say(admin, "GET /status.json HTTP/1.1\r\nhost: gate\r\n\r\n").await;
    let status: Value = serde_json::from_str(&answer.body).unwrap();
    let listed = status["refused_connections"].as_array().unwrap();
    let of = |fault: &str| listed.iter().find(|it| it["fault"] == fault).unwrap_or_else(|| panic!("{fault}: {listed:?}")).clone();
    assert_eq!(of("CERTIFICATE_MISSING")["count"], 2);
    assert_eq!(of("CERTIFICATE_NAME")["names"], serde_json::json!([other]));
    assert_eq!(listed.len(), 7, "{listed:?}");
    let attention = status["attention"].to_string();
    assert!(attention.contains("tls.certificate") && attention.contains("CERTIFICATE_NAME"), "{attention}");
    let metrics = say(admin, "GET /metrics HTTP/1.1\r\nhost: gate\r\n\r\n").await.body;
    assert!(metrics.contains("byokgate_handshakes_refused_total{fault=\"CERTIFICATE_MISSING\"} 2"), "{metrics}");
    assert!(metrics.contains("byokgate_tls_certificate_expires_seconds{setting=\"tls.certificate\"} "), "{metrics}");
    serving.terminate().await;
    let told = serving.ended().await.stdout;
    let missing = told.lines().filter(|line| line.contains("\"CERTIFICATE_MISSING\"")).count();
    assert_eq!(missing, 1, "once a minute: {told}");
}

/// A TLS client at a plain port is told what the port is, and the log says it too.
#[tokio::test]
async fn tls_and_http_1_on_a_plain_port_are_told_what_it_is() {
    let (registry, catalogue) = case::documents(1);
    let shown = Shown::start(settings(), &Files::new(&registry, &catalogue, None)).await;
    let answer = say(shown.edge.tcp(), "GET /healthz HTTP/1.1\r\nhost: gate\r\nuser-agent: x\r\n\r\n").await;
    assert_eq!(answer.status, 400);
    assert!(answer.body.contains("gRPC over HTTP/2, without TLS"), "{answer:?}");
    let fault = tls_connect(shown.edge.tcp(), &tls_client(&Authority::new(), None, &[&TLS13])).await.unwrap_err();
    assert!(fault.to_string().contains("InvalidContentType"), "{fault}");
    let page =
        shown.scrape_until(|page| page.get(r#"byokgate_handshakes_refused_total{fault="TLS_UNEXPECTED"}"#) == Some(1.0)).await;
    page.is(r#"byokgate_handshakes_refused_total{fault="NO_HTTP2"}"#, 1.0);
    page.is(r#"byokgate_connections_refused_total{reason="handshake"}"#, 2.0);
    // Noise before a preface, as from a bad network, gets no answer that a client could take for another server's.
    let mut noisy = tokio::net::TcpStream::connect(shown.edge.tcp()).await.unwrap();
    tokio::io::AsyncWriteExt::write_all(&mut noisy, b"\x07\xf3PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await.unwrap();
    let mut heard = Vec::new();
    // Unread bytes may end the connection with a reset.
    drop(tokio::io::AsyncReadExt::read_to_end(&mut noisy, &mut heard).await);
    assert_eq!(heard, b"");
}

/// A client that speaks gRPC to the admin listener is told so in one sentence that names the right port; log and page say who it is.
#[tokio::test]
async fn who_speaks_grpc_to_the_admin_listener_is_told_where_grpc_is() {
    let serving = Serving::start(&["--admin-listen", "127.0.0.1:0"]).await;
    let admin = serving.event("admin_listening")["address"].as_str().unwrap().to_owned();
    let sentence =
        format!("{admin}: this is byok-gate's admin listener, for pages and numbers: gRPC is on {}\n", serving.address);
    let (code, said) = health(&admin, &[]).await;
    assert_eq!((code, said.trim_start_matches("byok-gate: ")), (Some(1), &*sentence));
    let asked = ["decide", "--server", &admin, "--runtime", "claude-code", "--model", "claude-opus-4-8"];
    let ended = run(&asked, &[]).await;
    assert!(ended.stderr.contains(sentence.trim_end()), "{ended:?}");
    let event = serving.until("connection_refused").await;
    assert_eq!(
        (&event["level"], &event["fault"], &event["peer"]),
        (&"WARN".into(), &"GRPC_ON_ADMIN".into(), &"127.0.0.1".into()),
        "{event}"
    );
    assert!(event["message"].as_str().unwrap().contains("this is the admin listener"), "{event}");
    // A person's request comes as it came before, also one that is shorter than gRPC's first bytes.
    let admin = admin.parse().unwrap();
    let status: Value = serde_json::from_str(&say(admin, "GET /status.json HTTP/1.1\r\nhost: gate\r\n\r\n").await.body).unwrap();
    assert_eq!(status["refused_connections"][0]["fault"], "GRPC_ON_ADMIN", "{status:#}");
    assert!(status["attention"][0]["what"].as_str().unwrap().contains("GRPC_ON_ADMIN"), "{status:#}");
    assert_eq!(say(admin, "GET / HTTP/1.0\r\n\r\n").await.status, 302);
}

/// Health watches beyond their number leave a line with the setting, and are under attention.
#[tokio::test]
async fn a_limit_of_calls_that_is_reached_is_in_the_log_and_under_attention() {
    let serving = Serving::start_in(&["--admin-listen", "127.0.0.1:0"], &[("BYOK_GATE__LIMITS__WATCHES", "1")]).await;
    let admin = serving.event("admin_listening")["address"].as_str().unwrap().parse().unwrap();
    let channel = serving.channel().await;
    let watch = async || HealthClient::new(channel.clone()).watch(HealthCheckRequest::default()).await;
    let _first = watch().await.unwrap();
    for _ in 0..3 {
        assert_eq!(watch().await.unwrap_err().code(), tonic::Code::ResourceExhausted);
    }
    let event = serving.until("call_limit").await;
    assert_eq!(
        (&event["level"], &event["setting"], &event["limit"], &event["count"], &event["peer"]),
        (&"WARN".into(), &"limits.watches".into(), &1.into(), &1.into(), &"127.0.0.1".into()),
        "{event}"
    );
    let status: Value = serde_json::from_str(&say(admin, "GET /status.json HTTP/1.1\r\nhost: gate\r\n\r\n").await.body).unwrap();
    let what = status["attention"][0]["what"].as_str().unwrap();
    assert!(what.starts_with("calls were refused, the last at 2"), "{status:#}");
    assert!(what.ends_with("Z: limits.watches (1) is reached"), "{status:#}");
    serving.terminate().await;
    assert_eq!(serving.ended().await.stdout.matches(r#""event":"call_limit""#).count(), 1, "told once a minute");
}
