//! What a network does to a probe, each against a real listener: the verdict, what failed, and how often it was tried.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use byok_gate::{
    core::{classify::Finding, engine::Engine},
    domain::{
        secret::Secret,
        verdict::{Unreached, Verdict},
    },
    liveness::prober::{HttpProber, ProbeSettings},
};
use rcgen::{CertificateParams, KeyPair};
use rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::TcpListener,
    task::JoinSet,
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
    /// Writes this and then holds its tongue.
    Hold(Vec<u8>),
    /// Writes the first, then the second for ever.
    Repeat(Vec<u8>, Vec<u8>),
}

struct Listener {
    address: SocketAddr,
    connections: Arc<AtomicUsize>,
    /// Bytes that repeating plays got rid of.
    written: Arc<AtomicUsize>,
    _task: JoinSet<()>,
}

/// A certificate for `localhost`, signed by itself, with its key; `years` from 1990 or now on.
struct Identity {
    pem: Vec<u8>,
    acceptor: TlsAcceptor,
}

fn identity(expired: bool, http2: bool) -> Identity {
    let mut params = CertificateParams::new(vec!["localhost".to_owned()]).unwrap();
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
    if http2 {
        config.alpn_protocols = vec![b"h2".to_vec()];
    }
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
    // Writes fail when the prober has heard enough.
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

/// Asks the catalogue's Acme row, which has a second, at this base URL.
async fn ask(base: &str, roots: &[u8], resolve: &[(&str, &str)], loopback: bool) -> Finding {
    let (registry, catalogue) = case::documents(1);
    let registry = registry.replace("http://127.0.0.1:1/acme/v1", base);
    let host = base.split("//").nth(1).unwrap().split('/').next().unwrap();
    let catalogue = catalogue.replacen("127.0.0.1:1", host.strip_suffix(":443").unwrap_or(host), 1);
    let engine: Arc<Engine> = Files::new(&registry, &catalogue, None).engine();
    let settings = ProbeSettings {
        allow_loopback_http: loopback,
        calibrate: false,
        extra_roots: roots.to_vec(),
        resolve: resolve.iter().map(|(name, address)| ((*name).to_owned(), address.parse().unwrap())).collect::<BTreeMap<_, _>>(),
        ..ProbeSettings::default()
    };
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
    // A refusal of which only the status came might be anybody's.
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
    // Nothing is unpacked, so a bomb is a few bytes that are no JSON; the next probe gets the same.
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
    let good = identity(false, false);
    let listener = Listener::start(plays.clone(), Some(good.acceptor.clone())).await;
    let url = |listener: &Listener| format!("https://localhost:{}/acme/v1", listener.address.port());
    assert_eq!(why(&url(&listener), &good.pem, &[], true).await, (Verdict::Valid, None));
    // Nobody vouches for it.
    assert_eq!(why(&url(&listener), &[], &[], true).await, unreachable(Unreached::Tls));
    // It is for another name.
    let by_address = url(&listener).replace("localhost", "127.0.0.1");
    assert_eq!(why(&by_address, &good.pem, &[], true).await, unreachable(Unreached::Tls));
    let expired = identity(true, false);
    let listener = Listener::start(plays.clone(), Some(expired.acceptor.clone())).await;
    assert_eq!(why(&url(&listener), &expired.pem, &[], true).await, unreachable(Unreached::Tls));
    // It speaks no TLS at all.
    let listener = Listener::start(plays, None).await;
    assert_eq!(why(&url(&listener), &[], &[], true).await, unreachable(Unreached::Tls));
}

/// A server that goes away gracefully over HTTP/2 is asked again on a new connection.
#[tokio::test]
async fn a_graceful_goaway_is_tried_on_another_connection() {
    let frame = |kind: u8, flags: u8, stream: u8, payload: &[u8]| {
        let length = u8::try_from(payload.len()).unwrap();
        [&[0, 0, length, kind, flags, 0, 0, 0, stream], payload].concat()
    };
    let settings = frame(4, 0, 0, &[]);
    let go_away = [settings.clone(), frame(7, 0, 0, &[0; 8])].concat();
    // HEADERS with `:status: 200` from the static table, then DATA that ends the stream.
    let good = [settings, frame(1, 4, 1, &[0x88]), frame(0, 1, 1, br#"{"data": []}"#)].concat();
    let identity = identity(false, true);
    let listener = Listener::start(vec![Play::Hold(go_away), Play::Hold(good)], Some(identity.acceptor)).await;
    let found = ask(&format!("https://localhost:{}/acme/v1", listener.address.port()), &identity.pem, &[], true).await;
    assert_eq!((found.verdict, found.status, listener.connections()), (Verdict::Valid, Some(200), 2));
}
