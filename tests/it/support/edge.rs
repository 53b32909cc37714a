//! A server with settings of its own, and clients for every way in.

use std::{
    io,
    net::SocketAddr,
    num::NonZeroU32,
    path::PathBuf,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use byok_gate::{
    config::settings::Settings,
    core::{
        classify::Finding,
        engine::{Boxed, Engine, ProbeRequest, Prober},
        snapshot::Snapshot,
    },
    domain::verdict::Verdict,
    grpc::convert::pb::{self, policy_decision_service_client::PolicyDecisionServiceClient},
    liveness::{
        cache::{Cache, CacheSettings},
        new_keys::NewKeyLimits,
    },
    server::{Address, Bound, Ended, ServerError},
};
use bytes::Bytes;
use http::Uri;
use http_body_util::{BodyExt, Full};
use hyper::client::conn::http2::SendRequest;
use hyper_util::rt::{TokioExecutor, TokioIo};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair, SanType, date_time_ymd};
use rustls::{ClientConfig, RootCertStore, pki_types::ServerName};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject};
use tokio::{
    net::TcpStream,
    sync::{oneshot, watch},
    task::JoinHandle,
};
use tokio_rustls::{TlsConnector, client::TlsStream};
use tonic::{
    Code, Request,
    transport::{Channel, Endpoint},
};

use super::{case, gate::Files};

/// A running server.
pub(crate) struct Edge {
    pub(crate) addresses: Vec<Address>,
    stop: Option<oneshot::Sender<()>>,
    pub(crate) running: JoinHandle<Result<Ended, ServerError>>,
}

/// Settings for a free port on loopback.
pub(crate) fn settings() -> Settings {
    let mut settings = Settings::default();
    settings.server.listen = vec!["127.0.0.1:0".to_owned()];
    settings.shutdown.notice = Duration::ZERO;
    settings
}

impl Edge {
    pub(crate) async fn start(settings: Settings, engine: Arc<Engine>) -> Self {
        Self::run(Bound::open(settings.edge()).await.unwrap(), engine)
    }

    pub(crate) fn run(bound: Bound, engine: Arc<Engine>) -> Self {
        let addresses = bound.addresses();
        let (stop, stopped) = oneshot::channel();
        let running = tokio::spawn(bound.run(engine, async move { drop(stopped.await) }));
        Self { addresses, stop: Some(stop), running }
    }

    pub(crate) fn tcp(&self) -> SocketAddr {
        self.addresses.iter().find_map(|address| if let Address::Tcp(address) = address { Some(*address) } else { None }).unwrap()
    }

    pub(crate) fn unix(&self) -> PathBuf {
        let found = self.addresses.iter().find_map(|address| if let Address::Unix(path) = address { Some(path) } else { None });
        found.unwrap().clone()
    }

    pub(crate) async fn plain(&self) -> Channel {
        Endpoint::from_shared(format!("http://{}", self.tcp())).unwrap().connect().await.unwrap()
    }

    pub(crate) async fn over_unix(&self) -> Channel {
        Endpoint::from_shared(format!("unix:{}", self.unix().display())).unwrap().connect().await.unwrap()
    }

    pub(crate) fn stop(&mut self) {
        drop(self.stop.take());
    }

    pub(crate) async fn ended(mut self) -> Result<Ended, ServerError> {
        self.stop();
        (&mut self.running).await.unwrap()
    }
}

impl Drop for Edge {
    fn drop(&mut self) {
        self.running.abort();
    }
}

/// Asks for the status: how it ended.
pub(crate) async fn ask_status(channel: Channel, token: Option<&str>) -> Code {
    let mut request = Request::new(pb::GetRegistryStatusRequest {});
    if let Some(token) = token {
        request.metadata_mut().insert("authorization", token.parse().unwrap());
    }
    let answer = PolicyDecisionServiceClient::new(channel).get_registry_status(request).await;
    answer.map_or_else(|status| status.code(), |_| Code::Ok)
}

// === certificates ===

/// An authority that signs what it is asked to.
pub(crate) struct Authority(CertifiedIssuer<'static, KeyPair>);

/// A certificate and its key, in PEM.
#[derive(Clone)]
pub(crate) struct Pair {
    pub(crate) certificate: String,
    pub(crate) key: String,
}

impl Authority {
    pub(crate) fn new() -> Self {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        // A name of its own: two authorities of one name differ in their signatures only.
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let name = format!("authority {}", COUNT.fetch_add(1, Ordering::Relaxed));
        params.distinguished_name.push(DnType::CommonName, name);
        Self(CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap())
    }

    pub(crate) fn pem(&self) -> String {
        self.0.pem()
    }

    /// For this name: a URI or a host.
    pub(crate) fn sign(&self, name: &str) -> Pair {
        self.sign_until(name, 2060)
    }

    pub(crate) fn sign_until(&self, name: &str, year: i32) -> Pair {
        self.sign_until_day(name, year, 1, 1)
    }

    pub(crate) fn sign_until_day(&self, name: &str, year: i32, month: u8, day: u8) -> Pair {
        let key = KeyPair::generate().unwrap();
        let name = name.to_owned();
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.subject_alt_names = vec![if name.contains(':') {
            SanType::URI(name.try_into().unwrap())
        } else {
            SanType::DnsName(name.try_into().unwrap())
        }];
        params.not_before = date_time_ymd(2001, 1, 1);
        params.not_after = date_time_ymd(year, month, day);
        let certificate = params.signed_by(&key, &self.0).unwrap();
        Pair { certificate: certificate.pem(), key: key.serialize_pem() }
    }
}

/// A TLS client that trusts one authority, with a certificate or without.
pub(crate) fn tls_client(
    authority: &Authority,
    own: Option<&Pair>,
    versions: &[&'static rustls::SupportedProtocolVersion],
) -> TlsConnector {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_slice(authority.pem().as_bytes()).unwrap()).unwrap();
    let builder = ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_protocol_versions(versions)
        .unwrap()
        .with_root_certificates(roots);
    let mut config = match own {
        None => builder.with_no_client_auth(),
        Some(Pair { certificate, key }) => builder
            .with_client_auth_cert(
                vec![CertificateDer::from_pem_slice(certificate.as_bytes()).unwrap()],
                PrivateKeyDer::from_pem_slice(key.as_bytes()).unwrap(),
            )
            .unwrap(),
    };
    config.alpn_protocols = vec![b"h2".to_vec()];
    TlsConnector::from(Arc::new(config))
}

pub(crate) async fn tls_connect(address: SocketAddr, client: &TlsConnector) -> io::Result<TlsStream<TcpStream>> {
    client.connect(ServerName::try_from("localhost").unwrap(), TcpStream::connect(address).await?).await
}

/// A channel over one TLS connection.
pub(crate) async fn tls_channel(address: SocketAddr, client: &TlsConnector) -> Result<Channel, tonic::transport::Error> {
    let connector = Connector { address, client: client.clone() };
    Endpoint::from_static("http://localhost").connect_with_connector(connector).await
}

#[derive(Clone)]
struct Connector {
    address: SocketAddr,
    client: TlsConnector,
}

impl tower_service::Service<Uri> for Connector {
    type Response = TokioIo<TlsStream<TcpStream>>;
    type Error = io::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Self::Error>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, _: Uri) -> Self::Future {
        let Self { address, client } = self.clone();
        Box::pin(async move { tls_connect(address, &client).await.map(TokioIo::new) })
    }
}

// === a provider that answers when it is told to ===

/// Says VALID to everybody, once the door is open.
pub(crate) struct Held {
    open: watch::Sender<bool>,
    asked: AtomicU32,
}

impl Held {
    pub(crate) fn new(open: bool) -> Arc<Self> {
        Arc::new(Self { open: watch::channel(open).0, asked: AtomicU32::new(0) })
    }

    pub(crate) fn open(&self) {
        self.open.send_replace(true);
    }

    pub(crate) fn asked(&self) -> u32 {
        self.asked.load(Ordering::SeqCst)
    }

    /// An engine that asks here.
    pub(crate) fn engine(self: &Arc<Self>) -> Arc<Engine> {
        let (registry, catalogue) = case::documents(1);
        let known = Files::new(&registry, &catalogue, None).engine().snapshot();
        let snapshot = Snapshot::clone(&known);
        let prober: Arc<dyn Prober> = Arc::clone(self) as Arc<dyn Prober>;
        // Not what is tested here.
        let many = NonZeroU32::new(1_000_000).unwrap();
        let new_keys = NewKeyLimits { per_organization: many, per_caller: many, per_platform: many };
        let cache = Cache::new(prober, CacheSettings { new_keys, ..CacheSettings::default() });
        Arc::new(Engine::new(snapshot, Arc::new(cache), None))
    }
}

impl Prober for Held {
    fn probe(&self, request: ProbeRequest) -> Boxed<'static, Finding> {
        self.asked.fetch_add(1, Ordering::SeqCst);
        let mut open = self.open.subscribe();
        Box::pin(async move {
            drop(request);
            drop(open.wait_for(|open| *open).await);
            Finding::bare(Verdict::Valid)
        })
    }
}

/// Asks about a key at CREATE.
pub(crate) fn decide(key: &str) -> pb::DecideRequest {
    let credential = pb::Credential { env_name: "ACME_API_KEY".into(), scope: 1, value: key.into(), unreadable: false };
    let spec = pb::WorkspaceSpec {
        workspace_id: "ws-1".into(),
        runtime: "agent".into(),
        model: "acme-large".into(),
        credentials: vec![credential],
        ..Default::default()
    };
    pb::DecideRequest { workspace_spec: Some(spec), checkpoint: pb::Checkpoint::Create as i32, ..Default::default() }
}

pub(crate) fn is_allow(response: &pb::DecideResponse) -> bool {
    matches!(response.decision, Some(pb::decide_response::Decision::Allow(_)))
}

// === HTTP/2 by hand: what the gRPC library would not send, or would end by itself ===

pub(crate) type Sender = SendRequest<Full<Bytes>>;

pub(crate) async fn raw(address: SocketAddr) -> Sender {
    let stream = TcpStream::connect(address).await.unwrap();
    let (sender, connection) = hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await.unwrap();
    tokio::spawn(connection);
    sender
}

/// A gRPC request with these headers and this body behind its length.
pub(crate) fn grpc(path: &str, headers: &[(&str, &str)], message: &[u8]) -> http::Request<Full<Bytes>> {
    let mut body = vec![0];
    body.extend(u32::try_from(message.len()).unwrap().to_be_bytes());
    body.extend(message);
    let request = http::Request::post(format!("http://localhost{path}"))
        .header("content-type", "application/grpc")
        .header("te", "trailers");
    headers.iter().fold(request, |request, (name, value)| request.header(*name, *value)).body(Full::from(body)).unwrap()
}

/// How a raw call ended: the code in its headers or trailers.
pub(crate) async fn code_of(sender: &mut Sender, request: http::Request<Full<Bytes>>) -> Code {
    let response = sender.send_request(request).await.unwrap();
    let of = |headers: &http::HeaderMap| headers.get("grpc-status").map(|code| Code::from_bytes(code.as_bytes()));
    let at_once = of(response.headers());
    let body = response.into_body().collect().await.unwrap();
    at_once.or_else(|| of(body.trailers()?)).unwrap()
}
