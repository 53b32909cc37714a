//! Who may call over which transport, with the exact answer to all others; and certificates that change while serving.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use byok_gate::{
    config::settings::Settings,
    core::engine::Engine,
    grpc::convert::pb::{self, policy_decision_service_client::PolicyDecisionServiceClient},
    server::settings::{CallerList, CertificateCaller, RoleWord, UnixCaller},
    server::{Bound, ServerError},
};
use rustls::version::{TLS12, TLS13};
use tempfile::TempDir;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    time::timeout,
};
use tokio_rustls::TlsConnector;
use tonic::Code;
use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};

use crate::support::{
    binary::PATIENCE,
    case,
    edge::{Authority, Edge, Pair, ask_status, settings, tls_channel, tls_client, tls_connect},
    gate::Files,
};

const TOKEN: &str = "made-up-token-0123456789";
const OLD_TOKEN: &str = "made-up-token-of-last-week";
const OPERATOR: &str = "spiffe://example.org/operator";
const PLATFORM: &str = "spiffe://example.org/platform/api";

fn engine() -> Arc<Engine> {
    let (registry, catalogue) = case::documents(1);
    Files::new(&registry, &catalogue, None).engine()
}

fn put(folder: &TempDir, name: &str, text: &str) -> PathBuf {
    let path = folder.path().join(name);
    fs::write(&path, text).unwrap();
    path
}

fn with_tls(folder: &TempDir, server: &Pair) -> Settings {
    let mut settings = settings();
    settings.tls.certificate = Some(put(folder, "cert.pem", &server.certificate));
    settings.tls.key = Some(put(folder, "key.pem", &server.key));
    settings
}

/// The server's answer to this client: `served`, or the alert that ends the handshake.
async fn answer(edge: &Edge, client: &TlsConnector) -> String {
    let mut stream = match tls_connect(edge.tcp(), client).await {
        Ok(stream) => stream,
        Err(fault) => return fault.to_string(),
    };
    // A TLS 1.3 client believes that it is done before the server has looked at its certificate.
    if let Err(fault) = stream.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0").await {
        return fault.to_string();
    }
    match stream.read_u8().await {
        Ok(_) => "served".to_owned(),
        Err(fault) => fault.to_string(),
    }
}

#[tokio::test]
async fn client_certificates_are_judged_in_the_handshake() {
    let folder = tempfile::tempdir().unwrap();
    let (authority, stranger) = (Authority::new(), Authority::new());
    let mut settings = with_tls(&folder, &authority.sign("localhost"));
    settings.tls.client_ca = Some(put(&folder, "ca.pem", &authority.pem()));
    let known = |san: &str, role| CertificateCaller { san: san.to_owned(), role, workspaces: Default::default() };
    settings.callers.certificates =
        CallerList::Only(vec![known("spiffe://example.org/platform/*", RoleWord::Platform), known(OPERATOR, RoleWord::Operator)]);
    let edge = Edge::start(settings, engine()).await;
    for versions in [&[&TLS13][..], &[&TLS12]] {
        for (who, own, expect) in [
            ("good", Some(authority.sign(PLATFORM)), "served"),
            ("good operator", Some(authority.sign(OPERATOR)), "served"),
            ("without", None, "CertificateRequired"),
            ("wrong SAN", Some(authority.sign("spiffe://example.org/other")), "AccessDenied"),
            ("expired", Some(authority.sign_until(PLATFORM, 2002)), "CertificateExpired"),
            ("of a stranger's authority", Some(stranger.sign(PLATFORM)), "UnknownCA"),
        ] {
            let said = answer(&edge, &tls_client(&authority, own.as_ref(), versions)).await;
            assert!(said.contains(expect), "{who}, {versions:?}: {said}");
        }
    }
    // Plain text on a port that speaks TLS gets an alert of TLS, by which gRPC's clients know what is wrong, and nothing else.
    let mut plain = tokio::net::TcpStream::connect(edge.tcp()).await.unwrap();
    plain.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await.unwrap();
    let mut said = Vec::new();
    drop(plain.read_to_end(&mut said).await);
    assert_eq!(said, [21, 3, 3, 0, 2, 2, 10]);
    // And the roles of known callers.
    let operator = tls_channel(edge.tcp(), &tls_client(&authority, Some(&authority.sign(OPERATOR)), &[&TLS13])).await.unwrap();
    assert_eq!(ask_status(operator.clone(), None).await, Code::Ok);
    let refused = PolicyDecisionServiceClient::new(operator).decide(pb::DecideRequest::default()).await.unwrap_err();
    assert_eq!(refused.code(), Code::PermissionDenied);
}

/// The configuration's lists are reloaded, for new connections.
#[tokio::test]
async fn the_list_of_certificates_turns_over_without_a_restart() {
    let folder = tempfile::tempdir().unwrap();
    let authority = Authority::new();
    let mut settings = with_tls(&folder, &authority.sign("localhost"));
    settings.tls.client_ca = Some(put(&folder, "ca.pem", &authority.pem()));
    let only = |san: &str| CertificateCaller { san: san.to_owned(), role: RoleWord::Platform, workspaces: Default::default() };
    settings.callers.certificates = CallerList::Only(vec![only(PLATFORM)]);
    let bound = Bound::open(settings.edge()).await.unwrap();
    let replace_callers = bound.replace_callers();
    let edge = Edge::run(bound, engine());
    let by = |san: &str| tls_client(&authority, Some(&authority.sign(san)), &[&TLS13]);
    let before = tls_channel(edge.tcp(), &by(PLATFORM)).await.unwrap();
    assert!(answer(&edge, &by(OPERATOR)).await.contains("AccessDenied"));
    settings.callers.certificates = CallerList::Only(vec![only(OPERATOR)]);
    replace_callers(&settings.callers);
    assert!(answer(&edge, &by(OPERATOR)).await.contains("served"));
    assert!(answer(&edge, &by(PLATFORM)).await.contains("AccessDenied"));
    assert_eq!(ask_status(before, None).await, Code::PermissionDenied, "nor does a standing connection keep its caller");
}

#[tokio::test]
async fn tokens_are_required_over_tcp_and_turn_over_without_a_restart() {
    let folder = tempfile::tempdir().unwrap();
    let mut settings = settings();
    settings.server.reload_interval = Duration::from_millis(10);
    let file = put(&folder, "tokens", &format!("{OLD_TOKEN}\n"));
    settings.callers.token_file = Some(file.clone());
    let edge = Edge::start(settings, engine()).await;
    let channel = edge.plain().await;
    let bearer = |token: &str| format!("Bearer {token}");
    for (token, expect) in [
        (None, Code::Unauthenticated),
        (Some(bearer(TOKEN)), Code::Unauthenticated),
        (Some(bearer("")), Code::Unauthenticated),
        (Some(bearer(&OLD_TOKEN[..20])), Code::Unauthenticated),
        (Some(format!("Basic {OLD_TOKEN}")), Code::Unauthenticated),
        (Some(OLD_TOKEN.to_owned()), Code::Unauthenticated),
        (Some(bearer(OLD_TOKEN)), Code::Ok),
        (Some(format!("bearer {OLD_TOKEN}")), Code::Ok),
    ] {
        assert_eq!(ask_status(channel.clone(), token.as_deref()).await, expect, "{token:?}");
    }
    // Health is for everybody.
    assert!(HealthClient::new(channel.clone()).check(HealthCheckRequest::default()).await.is_ok());
    let becomes = async |token: &str, expect: Code| {
        let asking = async {
            while ask_status(channel.clone(), Some(&bearer(token))).await != expect {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        timeout(PATIENCE, asking).await.unwrap();
    };
    // Both, then an invalid file, then the new one alone.
    fs::write(&file, format!("{OLD_TOKEN}\n{TOKEN}\n")).unwrap();
    becomes(TOKEN, Code::Ok).await;
    assert_eq!(ask_status(channel.clone(), Some(&bearer(OLD_TOKEN))).await, Code::Ok);
    fs::write(&file, "short\n").unwrap();
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert_eq!(ask_status(channel.clone(), Some(&bearer(TOKEN))).await, Code::Ok);
    fs::write(&file, format!("{TOKEN}\n")).unwrap();
    becomes(OLD_TOKEN, Code::Unauthenticated).await;
    assert_eq!(ask_status(channel, Some(&bearer(TOKEN))).await, Code::Ok);
}

#[tokio::test]
async fn tls_without_a_client_certificate_takes_tokens_or_everybody_if_it_is_told_to() {
    let folder = tempfile::tempdir().unwrap();
    let authority = Authority::new();
    let anonymous = with_tls(&folder, &authority.sign("localhost"));
    let refused = Bound::open(anonymous.edge()).await.map(drop).unwrap_err();
    assert!(matches!(refused, ServerError::Anonymous(_)), "{refused}");
    let client = tls_client(&authority, None, &[&TLS13]);
    let mut open = anonymous.clone();
    open.server.allow_anonymous = true;
    let edge = Edge::start(open, engine()).await;
    assert_eq!(ask_status(tls_channel(edge.tcp(), &client).await.unwrap(), None).await, Code::Ok);
    let mut known = anonymous;
    known.callers.token_file = Some(put(&folder, "tokens", TOKEN));
    let edge = Edge::start(known, engine()).await;
    let channel = tls_channel(edge.tcp(), &client).await.unwrap();
    assert_eq!(ask_status(channel.clone(), None).await, Code::Unauthenticated);
    assert_eq!(ask_status(channel, Some(&format!("Bearer {TOKEN}"))).await, Code::Ok);
}

#[tokio::test]
async fn a_unix_peer_is_known_by_its_ids() {
    let folder = tempfile::tempdir().unwrap();
    let own = fs::metadata(folder.path()).map(|found| std::os::unix::fs::MetadataExt::uid(&found)).unwrap();
    for (uid, expect) in [(own, Code::Ok), (own + 1, Code::PermissionDenied)] {
        let mut settings = settings();
        settings.server.listen = vec![format!("unix:{}/gate.sock", folder.path().display())];
        let peer = UnixCaller { uid: Some(uid), gid: None, role: RoleWord::Operator, workspaces: Default::default() };
        settings.callers.unix_peers = CallerList::Only(vec![peer]);
        let edge = Edge::start(settings, engine()).await;
        assert_eq!(ask_status(edge.over_unix().await, None).await, expect, "{uid}");
        edge.ended().await.unwrap();
    }
}

/// New connections get the new certificate, whichever file comes first; old ones live on; an invalid one changes nothing.
#[tokio::test]
async fn certificates_turn_over_without_a_restart() {
    let folder = tempfile::tempdir().unwrap();
    let (old, new) = (Authority::new(), Authority::new());
    let mut settings = with_tls(&folder, &old.sign("localhost"));
    settings.server.allow_anonymous = true;
    settings.server.reload_interval = Duration::from_millis(10);
    let edge = Edge::start(settings, engine()).await;
    let (by_old, by_new) = (tls_client(&old, None, &[&TLS13]), tls_client(&new, None, &[&TLS13]));
    let before = tls_channel(edge.tcp(), &by_old).await.unwrap();
    let next = new.sign("localhost");
    put(&folder, "cert.pem", &next.certificate);
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert!(tls_connect(edge.tcp(), &by_old).await.is_ok(), "half of a pair was taken");
    put(&folder, "key.pem", &next.key);
    let turning_over = async {
        while tls_connect(edge.tcp(), &by_new).await.is_err() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    timeout(PATIENCE, turning_over).await.unwrap();
    assert!(tls_connect(edge.tcp(), &by_old).await.is_err());
    assert_eq!(ask_status(before, None).await, Code::Ok);
    fs::remove_file(folder.path().join("key.pem")).unwrap();
    put(&folder, "cert.pem", "-----BEGIN CERTIFICATE-----");
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert!(tls_connect(edge.tcp(), &by_new).await.is_ok(), "the last good pair was given up");
}

#[tokio::test]
async fn a_configured_file_that_does_not_stand_is_fatal_at_the_start() {
    let folder = tempfile::tempdir().unwrap();
    let authority = Authority::new();
    let good = || {
        let mut settings = with_tls(&folder, &authority.sign("localhost"));
        settings.tls.client_ca = Some(put(&folder, "ca.pem", &authority.pem()));
        settings.callers.token_file = Some(put(&folder, "tokens", TOKEN));
        settings
    };
    assert!(Bound::open(good().edge()).await.is_ok());
    let absent = || Some(Path::new("/nowhere/at/all").to_owned());
    type File = fn(&mut Settings) -> &mut Option<PathBuf>;
    let broken: [(&str, File); 4] = [
        ("certificate", |settings| &mut settings.tls.certificate),
        ("key", |settings| &mut settings.tls.key),
        ("client CA", |settings| &mut settings.tls.client_ca),
        ("tokens", |settings| &mut settings.callers.token_file),
    ];
    for (what, file) in broken {
        let mut settings = good();
        *file(&mut settings) = absent();
        let fault = Bound::open(settings.edge()).await.map(drop).unwrap_err();
        assert!(matches!(fault, ServerError::File { .. }), "{what}: {fault}");
        let mut settings = good();
        *file(&mut settings) = Some(put(&folder, "empty", ""));
        let fault = Bound::open(settings.edge()).await.map(drop).unwrap_err();
        assert!(matches!(fault, ServerError::Content { .. }), "{what}: {fault}");
    }
}
