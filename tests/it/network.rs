//! Network faults during a probe, each against a real listener: the verdict, the failed step, and the number of tries.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use byok_gate::{
    core::{classify::Finding, engine::Engine},
    domain::{
        secret::Secret,
        verdict::{Unreached, Verdict},
    },
    liveness::{
        egress::{EgressSettings, ProxySettings},
        prober::{HttpProber, ProbeSettings},
    },
};
use rcgen::{CertificateParams, KeyPair};
use rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    task::JoinSet,
    time::timeout,
};
use tokio_rustls::TlsAcceptor;

use crate::support::{case, gate::Files};

/// What a listener does with a connection once it has read something.
#[derive(Debug, Clone)]
enum Play {
    /// Closes it.
    Close,
    /// Writes this and closes.
    Say(Vec<u8>),
    /// Writes this and then nothing.
    Hold(Vec<u8>),
    /// Writes the first, then the second forever.
    Repeat(Vec<u8>, Vec<u8>),
}

struct Listener {
    address: SocketAddr,
    connections: Arc<AtomicUsize>,
    /// Bytes written by plays that repeat.
    written: Arc<AtomicUsize>,
    _task: JoinSet<()>,
}

/// A certificate for `localhost` or another name, signed by itself, with its key; `years` from 1990 or now on.
struct Identity {
    pem: Vec<u8>,
    acceptor: TlsAcceptor,
}

fn identity(expired: bool, protocols: &[&str]) -> Identity {
    identity_of("localhost", expired, protocols)
}

fn identity_of(name: &str, expired: bool, protocols: &[&str]) -> Identity {
    let mut params = CertificateParams::new(vec![name.to_owned()]).unwrap();
    if expired {
        params.not_before = rcgen::date_time_ymd(1990, 1, 1);
        params.not_after = rcgen::date_time_ymd(1991, 1, 1);
    }
    let key = KeyPair::generate().unwrap();
    let certificate = params.self_signed(&key).unwrap();
    let private = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![certificate.der().clone()], private)
        .unwrap();
    config.alpn_protocols = protocols.iter().map(|name| name.as_bytes().to_vec()).collect();
    Identity { pem: certificate.pem().into_bytes(), acceptor: TlsAcceptor::from(Arc::new(config)) }
}

impl Listener {
    /// The first connection gets the first play and so on; the last one is for all the rest.
    async fn start(plays: Vec<Play>, tls: Option<TlsAcceptor>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let connections = Arc::new(AtomicUsize::new(0));
        let (count, written) = (Arc::clone(&connections), Arc::new(AtomicUsize::new(0)));
        let bytes = Arc::clone(&written);
        let mut task = JoinSet::new();
        task.spawn(async move {
            let mut open = JoinSet::new();
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                let index = count.fetch_add(1, Ordering::SeqCst);
                let play = plays[index.min(plays.len() - 1)].clone();
                let (tls, bytes) = (tls.clone(), Arc::clone(&bytes));
                open.spawn(async move {
                    match tls {
                        None => act(stream, play, &bytes).await,
                        Some(acceptor) => {
                            if let Ok(stream) = acceptor.accept(stream).await {
                                act(stream, play, &bytes).await;
                            }
                        }
                    }
                });
            }
        });
        Self { address, connections, written, _task: task }
    }

    fn connections(&self) -> usize {
        self.connections.load(Ordering::SeqCst)
    }
}

async fn act(mut stream: impl AsyncRead + AsyncWrite + Unpin, play: Play, bytes: &AtomicUsize) {
    let mut buffer = [0; 4096];
    if stream.read(&mut buffer).await.unwrap_or(0) == 0 {
        return;
    }
    // Writes fail when the prober has read enough.
    match play {
        Play::Close => {}
        Play::Say(bytes) => drop(stream.write_all(&bytes).await),
        Play::Hold(bytes) => {
            drop(stream.write_all(&bytes).await);
            std::future::pending::<()>().await;
        }
        Play::Repeat(first, again) => {
            let mut written = stream.write_all(&first).await;
            while written.is_ok() {
                written = stream.write_all(&again).await;
                bytes.fetch_add(again.len(), Ordering::SeqCst);
                tokio::task::yield_now().await;
            }
        }
    }
    drop(stream.shutdown().await);
}

/// Probes the catalogue's Acme row, with a budget of one second, at this base URL.
async fn ask(base: &str, roots: &[u8], resolve: &[(&str, &str)], loopback: bool) -> Finding {
    let resolve = resolve.iter().map(|(name, address)| ((*name).to_owned(), address.parse().unwrap()));
    let settings = ProbeSettings {
        allow_loopback_http: loopback,
        calibrate: false,
        extra_roots: roots.to_vec(),
        resolve: resolve.collect::<BTreeMap<_, _>>(),
        ..ProbeSettings::default()
    };
    ask_with(base, settings).await
}

async fn ask_with(base: &str, settings: ProbeSettings) -> Finding {
    let (registry, catalogue) = case::documents(1);
    let registry = registry.replace("http://127.0.0.1:1/acme/v1", base);
    let host = base.split("//").nth(1).unwrap().split('/').next().unwrap();
    let catalogue = catalogue.replacen("127.0.0.1:1", host.strip_suffix(":443").unwrap_or(host), 1);
    let engine: Arc<Engine> = Files::new(&registry, &catalogue, None).engine();
    HttpProber::new(settings)
        .unwrap()
        .explain(&crate::model::Asked::about(&engine, 1).target(), &Secret::new("made-up-key".into()))
        .await
        .0
}

async fn over_http(plays: Vec<Play>) -> (Verdict, Option<u16>, Option<Unreached>, usize) {
    let listener = Listener::start(plays, None).await;
    let found = ask(&format!("http://{}/acme/v1", listener.address), &[], &[], true).await;
    (found.verdict, found.status, found.unreached, listener.connections())
}

fn answer(status: &str, headers: &str, body: &str) -> Vec<u8> {
    format!("HTTP/1.1 {status}\r\ncontent-type: application/json\r\n{headers}\r\n{body}").into_bytes()
}

fn whole(status: &str, body: &str) -> Vec<u8> {
    answer(status, &format!("content-length: {}\r\nconnection: close\r\n", body.len()), body)
}

#[tokio::test]
async fn a_connection_closed_before_any_byte_is_tried_once_more_and_an_answer_never() {
    let good = Play::Say(whole("200 OK", r#"{"data": []}"#));
    assert_eq!(over_http(vec![good.clone()]).await, (Verdict::Valid, Some(200), None, 1));
    assert_eq!(over_http(vec![Play::Close, good.clone()]).await, (Verdict::Valid, Some(200), None, 2));
    assert_eq!(over_http(vec![Play::Close, Play::Close, good]).await, (Verdict::Unreachable, None, Some(Unreached::Closed), 2));
    let refused = Play::Say(whole("401 Unauthorized", r#"{"error": {"code": "no"}}"#));
    assert_eq!(over_http(vec![refused]).await, (Verdict::Invalid, Some(401), None, 1));
    let failed = Play::Say(whole("503 Service Unavailable", ""));
    assert_eq!(over_http(vec![failed]).await, (Verdict::ProviderError, Some(503), None, 1));
}

#[tokio::test]
async fn slowness_is_a_timeout_unless_status_and_what_there_is_of_the_body_tell() {
    assert_eq!(over_http(vec![Play::Hold(vec![])]).await.0, Verdict::Timeout);
    assert_eq!(over_http(vec![Play::Hold(b"HTTP/1.1 200 OK\r\ncontent-ty".to_vec())]).await.0, Verdict::Timeout);
    // The status and the beginning of a list are enough.
    let beginning = answer("200 OK", "content-length: 100000\r\n", r#"{"object": "list", "data": [{"id": "#);
    assert_eq!(over_http(vec![Play::Hold(beginning)]).await, (Verdict::Valid, Some(200), None, 1));
    // A refusal without a body might come from anything on the way.
    let beginning = answer("401 Unauthorized", "content-length: 100000\r\n", r#"{"error": {"co"#);
    assert_eq!(over_http(vec![Play::Hold(beginning)]).await.0, Verdict::Timeout);
}

#[tokio::test]
async fn bodies_without_end_and_bombs_are_read_no_further_than_the_cap() {
    let chunked = answer("200 OK", "transfer-encoding: chunked\r\n", "");
    let first = [chunked, b"a\r\n{\"data\": [\r\n".to_vec()].concat();
    let chunk = [b"10000\r\n".to_vec(), vec![b' '; 0x10000], b"\r\n".to_vec()].concat();
    let listener = Listener::start(vec![Play::Repeat(first, chunk)], None).await;
    let found = ask(&format!("http://{}/acme/v1", listener.address), &[], &[], true).await;
    assert_eq!((found.verdict, found.status), (Verdict::Valid, Some(200)));
    // What is read, and what the sockets' buffers take; without a cap it would be all that comes within a second.
    let written = listener.written.load(Ordering::SeqCst);
    assert!(written < 16 * 1024 * 1024, "{written} bytes were taken");
    // Nothing is decompressed, so a bomb is a few bytes of invalid JSON; the next probe gets the same.
    let bomb = answer("200 OK", "content-encoding: gzip\r\ncontent-length: 10\r\nconnection: close\r\n", "\u{1f}\u{8b}12345678");
    assert_eq!(over_http(vec![Play::Say(bomb)]).await.0, Verdict::UnexpectedResponse);
    // Broken off within a body that was announced longer.
    let broken = answer("200 OK", "content-length: 100\r\n", r#"{"hello": "#);
    assert_eq!(over_http(vec![Play::Say(broken)]).await.0, Verdict::UnexpectedResponse);
}

#[tokio::test]
async fn noise_is_not_an_answer() {
    let hints = b"HTTP/1.1 103 Early Hints\r\n\r\n".to_vec();
    assert_eq!(over_http(vec![Play::Repeat(vec![], hints)]).await.0, Verdict::Timeout);
    let found = over_http(vec![Play::Say(b"SSH-2.0-OpenSSH_9.2\r\n".to_vec())]).await;
    assert_eq!(found, (Verdict::Unreachable, None, Some(Unreached::Protocol), 1));
}

#[tokio::test]
async fn what_failed_on_the_way_is_told_apart() {
    let why = async |base: &str, roots: &[u8], resolve: &[(&str, &str)], loopback| {
        let found = ask(base, roots, resolve, loopback).await;
        (found.verdict, found.unreached)
    };
    let unreachable = |why| (Verdict::Unreachable, Some(why));
    assert_eq!(why("http://127.0.0.1:1/acme/v1", &[], &[], true).await, unreachable(Unreached::Connect));
    assert_eq!(why("http://127.0.0.1:1/acme/v1", &[], &[], false).await, unreachable(Unreached::Address));
    assert_eq!(why("https://nowhere.invalid/acme/v1", &[], &[], true).await, unreachable(Unreached::Dns));
    for address in ["10.0.0.1:443", "169.254.169.254:443", "100.64.0.1:443", "[fd00::1]:443", "[::ffff:192.168.0.1]:443"] {
        let resolve = [("api.acme.example", address)];
        assert_eq!(
            why("https://api.acme.example/acme/v1", &[], &resolve, true).await,
            unreachable(Unreached::Address),
            "{address}"
        );
    }
    let resolve = [("api.acme.example", "127.0.0.1:443")];
    assert_eq!(why("https://api.acme.example/acme/v1", &[], &resolve, false).await, unreachable(Unreached::Address));

    let plays = vec![Play::Say(whole("200 OK", r#"{"data": []}"#))];
    let good = identity(false, &[]);
    let listener = Listener::start(plays.clone(), Some(good.acceptor.clone())).await;
    let url = |listener: &Listener| format!("https://localhost:{}/acme/v1", listener.address.port());
    assert_eq!(why(&url(&listener), &good.pem, &[], true).await, (Verdict::Valid, None));
    // No trusted authority signed it.
    assert_eq!(why(&url(&listener), &[], &[], true).await, unreachable(Unreached::TlsIssuer));
    // It is for another name.
    let by_address = url(&listener).replace("localhost", "127.0.0.1");
    assert_eq!(why(&by_address, &good.pem, &[], true).await, unreachable(Unreached::TlsName));
    let expired = identity(true, &[]);
    let listener = Listener::start(plays.clone(), Some(expired.acceptor.clone())).await;
    assert_eq!(why(&url(&listener), &expired.pem, &[], true).await, unreachable(Unreached::TlsExpired));
    // It speaks no TLS at all.
    let listener = Listener::start(plays, None).await;
    assert_eq!(why(&url(&listener), &[], &[], true).await, unreachable(Unreached::Tls));
}

/// A firewall that drops packets, as a listener whose queue is full: no connection comes about, which is no slow answer.
#[tokio::test]
async fn a_connection_that_never_comes_about_is_no_slow_answer() {
    let full = tokio::net::TcpSocket::new_v4().unwrap();
    full.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let full = full.listen(0).unwrap();
    let address = full.local_addr().unwrap();
    let mut taken = Vec::new();
    while let Ok(Ok(connection)) = timeout(Duration::from_millis(200), TcpStream::connect(address)).await {
        taken.push(connection);
    }
    let settings = ProbeSettings {
        allow_loopback_http: true,
        calibrate: false,
        budget: Duration::from_millis(400),
        ..ProbeSettings::default()
    };
    let found = ask_with(&format!("http://{address}/acme/v1"), settings).await;
    assert_eq!((found.verdict, found.unreached), (Verdict::Unreachable, Some(Unreached::ConnectTimeout)));
    drop(taken);
}

/// A host that speaks HTTP/2 too, and prefers it, is asked over HTTP/1.1: over HTTP/2 it could fill this service's memory with interim answers.
#[tokio::test]
async fn no_host_is_asked_over_http_2() {
    let identity = identity(false, &["h2", "http/1.1"]);
    let listener = Listener::start(vec![Play::Say(whole("200 OK", r#"{"data": []}"#))], Some(identity.acceptor)).await;
    let url = format!("https://localhost:{}/acme/v1", listener.address.port());
    let found = ask(&url, &identity.pem, &[], true).await;
    assert_eq!((found.verdict, found.status), (Verdict::Valid, Some(200)));
    let alone = self::identity(false, &["h2"]);
    let listener = Listener::start(vec![Play::Close], Some(alone.acceptor)).await;
    let found = ask(&format!("https://localhost:{}/acme/v1", listener.address.port()), &alone.pem, &[], true).await;
    assert_eq!(found.verdict, Verdict::Unreachable);
}

/// Interim answers without end: each is read and forgotten, and the check ends with its time.
#[tokio::test]
async fn interim_answers_without_end_are_not_kept() {
    let flood = b"HTTP/1.1 103 Early Hints\r\nlink: </a>; rel=preload\r\n\r\n".repeat(1000);
    let listener = Listener::start(vec![Play::Repeat(Vec::new(), flood)], None).await;
    let settings = ProbeSettings {
        allow_loopback_http: true,
        calibrate: false,
        budget: Duration::from_millis(400),
        ..ProbeSettings::default()
    };
    let found = ask_with(&format!("http://{}/acme/v1", listener.address), settings).await;
    assert_eq!((found.verdict, found.status), (Verdict::Timeout, None));
}

/// A forward proxy: accepts only CONNECT, requires a password if it has one, and resolves every name to one address.
struct ForwardProxy {
    address: SocketAddr,
    /// The requests, one line each.
    asked: Arc<Mutex<Vec<String>>>,
    _task: JoinSet<()>,
}

impl ForwardProxy {
    async fn start(leads_to: SocketAddr, authorization: Option<&'static str>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let asked = Arc::new(Mutex::new(Vec::new()));
        let log = Arc::clone(&asked);
        let mut task = JoinSet::new();
        task.spawn(async move {
            let mut open = JoinSet::new();
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                open.spawn(through(stream, leads_to, authorization, Arc::clone(&log)));
            }
        });
        Self { address, asked, _task: task }
    }

    fn asked(&self) -> Vec<String> {
        self.asked.lock().unwrap().clone()
    }
}

async fn through(mut stream: TcpStream, leads_to: SocketAddr, authorization: Option<&'static str>, log: Arc<Mutex<Vec<String>>>) {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let Ok(byte) = stream.read_u8().await else { return };
        head.push(byte);
    }
    let head = String::from_utf8(head).unwrap();
    log.lock().unwrap().push(head.lines().next().unwrap().to_owned());
    let is_known = |authorization| {
        let line = format!("proxy-authorization: {authorization}");
        head.lines().any(|header| header.eq_ignore_ascii_case(&line))
    };
    if !head.starts_with("CONNECT ") || authorization.is_some_and(|authorization| !is_known(authorization)) {
        let refusal = "HTTP/1.1 407 Proxy Authentication Required\r\ncontent-length: 0\r\n\r\n";
        drop(stream.write_all(refusal.as_bytes()).await);
        return;
    }
    stream.write_all(b"HTTP/1.1 200 OK\r\n\r\n").await.unwrap();
    let mut vendor = TcpStream::connect(leads_to).await.unwrap();
    // Either side may hang up first.
    drop(tokio::io::copy_bidirectional(&mut stream, &mut vendor).await);
}

/// The settings with this proxy, and with what else is allowed.
fn by_proxy(proxy: &str, credentials: Option<&str>, allow: &[&str], roots: &[u8]) -> ProbeSettings {
    let egress = EgressSettings {
        allow: allow.iter().map(|entry| (*entry).to_owned()).collect(),
        proxy: ProxySettings { url: Some(proxy.to_owned()), credentials_file: None },
        ..EgressSettings::default()
    };
    let proxy = egress.forward_proxy(credentials).unwrap();
    ProbeSettings { calibrate: false, extra_roots: roots.to_vec(), egress, proxy, ..ProbeSettings::default() }
}

#[tokio::test]
async fn a_forward_proxy_is_the_way_out_with_and_without_a_password_and_down() {
    let vendor = identity_of("api.acme.example", false, &[]);
    let good = Play::Say(whole("200 OK", r#"{"data": []}"#));
    let listener = Listener::start(vec![good], Some(vendor.acceptor.clone())).await;
    let base = "https://api.acme.example/acme/v1";
    let found = |finding: Finding| (finding.verdict, finding.unreached);
    let through = (Verdict::Unreachable, Some(Unreached::Proxy));

    // The name is resolved by the proxy, not here.
    let open = ForwardProxy::start(listener.address, None).await;
    let url = format!("http://{}", open.address);
    assert_eq!(found(ask_with(base, by_proxy(&url, None, &[], &vendor.pem)).await), (Verdict::Valid, None));
    assert_eq!(open.asked(), ["CONNECT api.acme.example:443 HTTP/1.1"]);
    // TLS is end to end with the vendor: the proxy cannot vouch for it.
    assert_eq!(found(ask_with(base, by_proxy(&url, None, &[], &[])).await), (Verdict::Unreachable, Some(Unreached::TlsIssuer)));

    let closed = ForwardProxy::start(listener.address, Some("Basic dXNlcjptYWRlLXVw")).await;
    let url = format!("http://{}", closed.address);
    assert_eq!(found(ask_with(base, by_proxy(&url, Some("user:made-up\n"), &[], &vendor.pem)).await), (Verdict::Valid, None));
    assert_eq!(found(ask_with(base, by_proxy(&url, None, &[], &vendor.pem)).await), through);
    assert_eq!(found(ask_with(base, by_proxy(&url, Some("user:wrong"), &[], &vendor.pem)).await), through);

    let down = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", down.local_addr().unwrap());
    drop(down);
    assert_eq!(found(ask_with(base, by_proxy(&url, None, &[], &vendor.pem)).await), through);
}

#[tokio::test]
async fn what_the_operator_names_is_dialled_straight_and_metadata_by_nobody() {
    let vendor = identity_of("llm.corp.example", false, &[]);
    let good = Play::Say(whole("200 OK", r#"{"data": []}"#));
    let listener = Listener::start(vec![good.clone()], Some(vendor.acceptor.clone())).await;
    let proxy = ForwardProxy::start(listener.address, None).await;
    let url = format!("http://{}", proxy.address);
    let base = format!("https://llm.corp.example:{}/acme/v1", listener.address.port());
    let mut settings = by_proxy(&url, None, &["llm.corp.example"], &vendor.pem);
    settings.resolve = BTreeMap::from([("llm.corp.example".to_owned(), listener.address)]);
    assert_eq!(ask_with(&base, settings.clone()).await.verdict, Verdict::Valid);
    assert_eq!(proxy.asked(), [""; 0]);
    // Without its name it is a private address like any other.
    settings.egress.allow.clear();
    settings.proxy = None;
    let found = ask_with(&base, settings).await;
    assert_eq!((found.verdict, found.unreached), (Verdict::Unreachable, Some(Unreached::Address)));

    // Plain http to a network that is listed for it.
    let plain = Listener::start(vec![good], None).await;
    let mut settings = ProbeSettings { calibrate: false, ..ProbeSettings::default() };
    settings.egress.allow_plain_http = vec!["127.0.0.0/8".to_owned()];
    assert_eq!(ask_with(&format!("http://{}/acme/v1", plain.address), settings.clone()).await.verdict, Verdict::Valid);
    settings.egress.allow_plain_http = vec!["0.0.0.0/0".to_owned()];
    for address in ["169.254.169.254", "169.254.170.2", "100.100.100.200"] {
        let found = ask_with(&format!("http://{address}/acme/v1"), settings.clone()).await;
        assert_eq!((found.verdict, found.unreached), (Verdict::Unreachable, Some(Unreached::Address)), "{address}");
        // Nor through a proxy.
        let found = ask_with(&format!("https://{address}/acme/v1"), by_proxy(&url, None, &[], &[])).await;
        assert_eq!((found.verdict, found.unreached), (Verdict::Unreachable, Some(Unreached::Address)), "{address}");
    }
    assert_eq!(proxy.asked(), [""; 0]);
}
