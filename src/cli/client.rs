//! How commands connect to a server: its address, TLS and the client's identity. A failure is explained in one sentence.

use std::{
    env,
    error::Error,
    io,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use anyhow::Context;
use clap::Args;
use rustls::{CertificateError, ClientConfig, RootCertStore, crypto::ring};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::timeout,
};
use tokio_rustls::TlsConnector;
use tonic::{
    Code, Request, Status,
    metadata::{Ascii, MetadataValue},
    transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity},
};
use zeroize::Zeroizing;

use super::exit::UsageError;
use crate::{domain::causes::causes, server::ADMIN_SAYS, telemetry::status::printable, watch::files};

/// The maximum size of a file with certificates or a token.
const MAX_FILE_BYTES: u64 = 1024 * 1024;
/// The maximum size of an answer. The admin listener's answer to a gRPC client is shorter.
const MAX_ANSWER_BYTES: u64 = 4096;
/// How long it may take to find out which protocol the peer speaks.
const DETECT_TIMEOUT: Duration = Duration::from_secs(1);

/// How to connect to a server, and as which client.
#[derive(Debug, Clone, Default, PartialEq, Args)]
pub(super) struct ClientArgs {
    /// Speak TLS, and trust only these authorities (PEM) for the server's certificate. With `https://HOST:PORT` and without this flag, the
    /// system's authorities are trusted [environment: BYOK_GATE_SERVER_CA].
    #[arg(long, value_name = "FILE")]
    server_ca: Option<PathBuf>,
    /// The name that the server's certificate must have, if it differs from the address's [environment: BYOK_GATE_SERVER_NAME].
    #[arg(long, value_name = "NAME")]
    server_name: Option<String>,
    /// This client's certificate chain (PEM), for a server that requires one [environment: BYOK_GATE_CLIENT_CERT].
    #[arg(long, value_name = "FILE")]
    client_cert: Option<PathBuf>,
    /// Its key, in PEM [environment: BYOK_GATE_CLIENT_KEY].
    #[arg(long, value_name = "FILE")]
    client_key: Option<PathBuf>,
    /// A file whose first line is this client's bearer token. Text after a space is ignored, so that a line of the server's own token file
    /// works too [environment: BYOK_GATE_CLIENT_TOKEN_FILE].
    #[arg(long, value_name = "FILE")]
    client_token_file: Option<PathBuf>,
}

/// A server and how to connect to it.
pub(super) struct Server {
    /// The address as given.
    pub(super) address: String,
    /// The address with its scheme.
    pub(super) uri: String,
    pub(super) tls: Option<Tls>,
    token: Option<Zeroizing<String>>,
}

/// The client's TLS settings.
pub(super) struct Tls {
    /// `None` uses the system's authorities.
    pub(super) authorities: Option<Pem>,
    pub(super) name: Option<String>,
    /// Certificate and key.
    pub(super) identity: Option<(Pem, Pem)>,
}

/// A file's content.
type Pem = Zeroizing<Vec<u8>>;

/// The protocol of a peer, by its answer to an HTTP/2 preface without TLS.
#[derive(Debug, Clone, PartialEq, Eq)]
enum PeerProtocol {
    /// It answered with a TLS alert.
    Tls,
    /// It answered with HTTP/2.
    Plain,
    /// It is byok-gate's admin listener. Holds what it says about where gRPC is.
    Admin(String),
    /// It answered with HTTP/2 and refuses the connection. Holds why.
    GoAway(String),
    /// It answered with HTTP/1.1.
    Http1,
    /// It answered something else, or nothing.
    Other,
}

// === impl ClientArgs ===

impl ClientArgs {
    /// Takes each missing flag from the environment.
    fn or_environment(self) -> Self {
        let path =
            |flag: Option<PathBuf>, name: &str| flag.or_else(|| env::var_os(name).filter(|it| !it.is_empty()).map(Into::into));
        Self {
            server_ca: path(self.server_ca, "BYOK_GATE_SERVER_CA"),
            server_name: self.server_name.or_else(|| env::var("BYOK_GATE_SERVER_NAME").ok().filter(|it| !it.is_empty())),
            client_cert: path(self.client_cert, "BYOK_GATE_CLIENT_CERT"),
            client_key: path(self.client_key, "BYOK_GATE_CLIENT_KEY"),
            client_token_file: path(self.client_token_file, "BYOK_GATE_CLIENT_TOKEN_FILE"),
        }
    }

    /// The server at this address: `HOST:PORT` with a name or an IP address, with or without `http://` or `https://`, or `unix:PATH`.
    pub(super) fn server(self, address: &str) -> anyhow::Result<Server> {
        let Self { server_ca, server_name, client_cert, client_key, client_token_file } = self.or_environment();
        let identity = match (client_cert, client_key) {
            (Some(certificate), Some(key)) => Some((read(&certificate, "--client-cert")?, read(&key, "--client-key")?)),
            (None, None) => None,
            (Some(_), None) => return Err(UsageError("--client-cert needs --client-key".into()).into()),
            (None, Some(_)) => return Err(UsageError("--client-key needs --client-cert".into()).into()),
        };
        let authorities = server_ca.map(|path| read(&path, "--server-ca")).transpose()?;
        let token = client_token_file.map(|path| token(&path)).transpose()?;
        let wants_tls = authorities.is_some() || identity.is_some() || server_name.is_some();
        let uri = match address.split_once("://") {
            Some(("https", _)) => address.to_owned(),
            Some(("http", _)) if wants_tls => {
                let said = format!(
                    "{address} is without TLS, but --server-ca, --server-name or --client-cert ask for it: write https://"
                );
                return Err(UsageError(said).into());
            }
            Some(_) => address.to_owned(),
            None if address.starts_with("unix:") => address.to_owned(),
            None if wants_tls => format!("https://{address}"),
            None => format!("http://{address}"),
        };
        if !uri.starts_with("unix:") {
            let wrong = || UsageError(format!("--server {address} is not an address: write HOST:PORT or unix:PATH"));
            if uri.parse::<http::Uri>().map_err(|_| wrong())?.port().is_none() {
                return Err(UsageError(format!("--server {address}: the port is missing")).into());
            }
        }
        let tls = uri.starts_with("https://").then_some(Tls { authorities, name: server_name, identity });
        Ok(Server { address: address.to_owned(), uri, tls, token })
    }
}

fn read(path: &Path, flag: &str) -> anyhow::Result<Pem> {
    let bytes = files::read(path, MAX_FILE_BYTES).map_err(|fault| UsageError(format!("{flag} {}: {fault}", path.display())))?;
    if bytes.trim_ascii().is_empty() {
        return Err(UsageError(format!("{flag} {} is empty", path.display())).into());
    }
    Ok(bytes)
}

fn token(path: &Path) -> anyhow::Result<Zeroizing<String>> {
    let flag = "--client-token-file";
    let text =
        files::read_text(path, MAX_FILE_BYTES).map_err(|fault| UsageError(format!("{flag} {}: {fault}", path.display())))?;
    let lines = text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
    let token = lines.into_iter().next().and_then(|line| line.split_ascii_whitespace().next());
    Ok(Zeroizing::new(token.ok_or_else(|| UsageError(format!("{flag} {} holds no token", path.display())))?.to_owned()))
}

// === impl Server ===

impl Server {
    /// Connects. Some TLS faults only appear with the first call.
    pub(super) async fn connect(&self, timeout: Duration) -> anyhow::Result<Channel> {
        let wrong = || UsageError(format!("--server {} is not an address: write HOST:PORT or unix:PATH", self.address));
        let mut endpoint = Endpoint::from_shared(self.uri.clone()).map_err(|_| wrong())?.connect_timeout(timeout);
        if let Some(tls) = &self.tls {
            endpoint = endpoint.tls_config(tls.config()).map_err(|fault| UsageError(format!("TLS: {}", chain(&fault))))?;
        }
        match endpoint.connect().await {
            Ok(channel) => Ok(channel),
            Err(fault) => Err(anyhow::anyhow!(self.failure_text(&fault).await)),
        }
    }

    /// A request with the token, if there is one.
    pub(super) fn request<T>(&self, message: T) -> anyhow::Result<Request<T>> {
        let mut request = Request::new(message);
        if let Some(header) = self.bearer() {
            let mut value: MetadataValue<Ascii> =
                header.parse().map_err(|_| UsageError("the token holds a character that no header can carry".into()))?;
            value.set_sensitive(true);
            request.metadata_mut().insert("authorization", value);
        }
        Ok(request)
    }

    /// The value of the authorization header.
    pub(super) fn bearer(&self) -> Option<Zeroizing<String>> {
        self.token.as_ref().map(|token| Zeroizing::new(format!("Bearer {}", **token)))
    }

    /// Explains why a call failed.
    pub(super) async fn refusal(&self, status: &Status) -> String {
        let code = status.code();
        // The status says no more than its source, but in the library's notation.
        if let Some(source) = status.source() {
            return self.failure_text(source).await;
        }
        let has_identity = self.tls.as_ref().is_some_and(|tls| tls.identity.is_some());
        let hint = match code {
            Code::Unauthenticated if self.token.is_none() && has_identity => {
                "; this server asks for no client certificate: give --client-token-file"
            }
            Code::Unauthenticated if self.token.is_none() => "; give --client-token-file, or --client-cert and --client-key",
            _ => "",
        };
        format!("{} answered {code:?}: {}{hint}", self.address, status.message())
    }

    /// Explains a connection failure.
    async fn failure_text(&self, fault: &(dyn Error + 'static)) -> String {
        let address = &self.address;
        if let Some(said) = tls_failure(fault) {
            return format!("{address}: {said}");
        }
        if let Some(said) = self.handshake_alert().await {
            return format!("{address}: {said}");
        }
        match (self.tls.is_some(), self.peer_protocol().await) {
            (false, PeerProtocol::Tls) => format!("{address} speaks TLS: write https:// before the address, or give --server-ca"),
            (true, PeerProtocol::Plain) => {
                format!("{address} speaks no TLS: leave out https://, --server-ca, --server-name and --client-cert")
            }
            (_, PeerProtocol::Admin(said)) => format!("{address}: {said}"),
            (_, PeerProtocol::GoAway(said)) => format!("{address} refuses connections: {said}"),
            (_, PeerProtocol::Http1) => format!("what answers at {address} speaks HTTP/1.1, and gRPC needs HTTP/2"),
            (false, PeerProtocol::Other) if is_closed_by_peer(fault) => {
                format!(
                    "{address} closed the connection without an answer of gRPC's: is it the port of --admin-listen, or stopping?"
                )
            }
            _ => format!("{address} could not be reached: {}", chain(fault)),
        }
    }

    /// Repeats the handshake to get the server's TLS alert. The HTTP/2 library loses it if it writes to the closed connection before it reads the
    /// alert.
    async fn handshake_alert(&self) -> Option<String> {
        let Tls { authorities, name, identity } = self.tls.as_ref()?;
        let uri: http::Uri = self.uri.parse().ok()?;
        let mut roots = RootCertStore::empty();
        for authority in CertificateDer::pem_slice_iter(authorities.as_ref()?.as_slice()) {
            roots.add(authority.ok()?).ok()?;
        }
        let builder = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_safe_default_protocol_versions()
            .ok()?
            .with_root_certificates(roots);
        let mut config = match identity {
            None => builder.with_no_client_auth(),
            Some((certificate, key)) => {
                let chain = CertificateDer::pem_slice_iter(certificate.as_slice()).collect::<Result<Vec<_>, _>>().ok()?;
                builder.with_client_auth_cert(chain, PrivateKeyDer::from_pem_slice(key.as_slice()).ok()?).ok()?
            }
        };
        config.alpn_protocols = vec![b"h2".to_vec()];
        let host = name.clone().unwrap_or_else(|| uri.host().unwrap_or_default().trim_matches(['[', ']']).to_owned());
        let name = ServerName::try_from(host).ok()?;
        let authority = uri.authority()?.to_string();
        let look = async move {
            let stream = TcpStream::connect(authority).await?;
            let mut stream = TlsConnector::from(Arc::new(config)).connect(name, stream).await?;
            // A server sends nothing first, unless it ends the connection.
            stream.read_u8().await
        };
        match timeout(DETECT_TIMEOUT, look).await {
            Ok(Err(fault)) => tls_failure(&fault),
            Ok(Ok(_)) | Err(_) => None,
        }
    }

    /// Finds out which protocol the peer speaks.
    async fn peer_protocol(&self) -> PeerProtocol {
        let Some((_, rest)) = self.uri.split_once("://") else { return PeerProtocol::Other };
        let authority = rest.split('/').next().unwrap_or_default().to_owned();
        let look = async move {
            let mut stream = TcpStream::connect(authority).await?;
            stream.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0").await?;
            let mut head = [0; 9];
            let mut length = 0;
            while length < head.len() {
                let Some(free) = head.get_mut(length..) else { break };
                match stream.read(free).await? {
                    0 => break,
                    read => length += read,
                }
            }
            let mut rest = Vec::new();
            if head.starts_with(b"HTTP/1.") {
                stream.take(MAX_ANSWER_BYTES).read_to_end(&mut rest).await?;
            } else if head == EMPTY_SETTINGS {
                let mut next = [0; 9];
                stream.read_exact(&mut next).await?;
                rest.extend(next);
                if let [_, high, low, GOAWAY, ..] = next {
                    stream.take(u64::from(u16::from_be_bytes([high, low]))).read_to_end(&mut rest).await?;
                }
            }
            io::Result::Ok((head, rest))
        };
        match timeout(DETECT_TIMEOUT, look).await {
            Ok(Ok(([21, 3, ..], _))) => PeerProtocol::Tls,
            Ok(Ok((EMPTY_SETTINGS, rest))) => go_away(&rest).map_or(PeerProtocol::Plain, PeerProtocol::GoAway),
            Ok(Ok(([0, _, _, 4, ..], _))) => PeerProtocol::Plain,
            Ok(Ok(([b'H', b'T', b'T', b'P', b'/', ..], rest))) => {
                of_admin(&rest).map_or(PeerProtocol::Http1, PeerProtocol::Admin)
            }
            Ok(Ok((_, rest))) => of_admin(&rest).map_or(PeerProtocol::Other, PeerProtocol::Admin),
            Ok(Err(_)) | Err(_) => PeerProtocol::Other,
        }
    }
}

/// An empty SETTINGS frame. byok-gate begins with one only if it refuses the connection.
const EMPTY_SETTINGS: [u8; 9] = [0, 0, 0, 4, 0, 0, 0, 0, 0];
/// The type of a GOAWAY frame.
const GOAWAY: u8 = 7;

/// The text of a GOAWAY frame: why the server refuses the connection.
fn go_away(frame: &[u8]) -> Option<String> {
    let text = frame.get(17..).filter(|text| frame.get(3) == Some(&GOAWAY) && !text.is_empty())?;
    Some(printable(&String::from_utf8_lossy(text)))
}

/// What byok-gate's admin listener says to a gRPC client, of the rest of an answer.
fn of_admin(rest: &[u8]) -> Option<String> {
    let rest = String::from_utf8_lossy(rest);
    let (_, body) = rest.split_once("\r\n\r\n")?;
    body.starts_with(ADMIN_SAYS).then(|| printable(body.trim_end()))
}

impl Tls {
    fn config(&self) -> ClientTlsConfig {
        let Self { authorities, name, identity } = self;
        let mut config = match authorities {
            Some(pem) => ClientTlsConfig::new().ca_certificate(Certificate::from_pem(pem.as_slice())),
            None => ClientTlsConfig::new().with_native_roots(),
        };
        if let Some(name) = name {
            config = config.domain_name(name);
        }
        if let Some((certificate, key)) = identity {
            config = config.identity(Identity::from_pem(certificate.as_slice(), key.as_slice()));
        }
        config
    }
}

// === failures ===

/// Whether the peer closed an open connection.
fn is_closed_by_peer(fault: &(dyn Error + 'static)) -> bool {
    use io::ErrorKind::{BrokenPipe, ConnectionReset, UnexpectedEof};
    let mut kinds = causes(fault).filter_map(|error| error.downcast_ref::<io::Error>()).map(io::Error::kind);
    kinds.any(|kind| matches!(kind, BrokenPipe | ConnectionReset | UnexpectedEof))
}

/// Explains a TLS failure, with what to do.
pub(super) fn tls_failure(fault: &(dyn Error + 'static)) -> Option<String> {
    let Some(found) = rustls_error(fault) else { return alert_in(fault).map(|alert| alert_meaning(&alert)) };
    Some(match found {
        rustls::Error::InvalidCertificate(why) => match why {
            CertificateError::UnknownIssuer => {
                "the server's certificate is signed by no authority that is trusted here: give its authority with --server-ca"
                    .into()
            }
            CertificateError::Expired | CertificateError::ExpiredContext { .. } => "the server's certificate has expired".into(),
            CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => {
                "the server's certificate is not valid yet: compare the clocks".into()
            }
            CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. } => {
                format!("the server's certificate is for another name ({why}): give one that it has with --server-name")
            }
            other => format!("the server's certificate is not taken: {other}"),
        },
        rustls::Error::AlertReceived(alert) => alert_meaning(&format!("{alert:?}")),
        rustls::Error::InvalidMessage(_) => "what answers there speaks no TLS: leave out https:// and --server-ca".into(),
        other => format!("TLS failed: {other}"),
    })
}

/// The meaning of a TLS alert of the server, by its name.
fn alert_meaning(alert: &str) -> String {
    match alert {
        "CertificateRequired" => "the server wants a client certificate: give --client-cert and --client-key".into(),
        "AccessDenied" => {
            "the server takes no client certificate with these names: see callers.certificates of its configuration".into()
        }
        "UnknownCA" => "the server does not know the authority of this client's certificate: see its tls.client_ca".into(),
        "CertificateExpired" => "this client's certificate has expired".into(),
        other => format!("the server ended the TLS handshake: {other}"),
    }
}

/// The alert's name, from the text of the error. The HTTP/2 library keeps only the text of the TLS library's error.
fn alert_in(fault: &(dyn Error + 'static)) -> Option<String> {
    const SAID: &str = "received fatal alert: ";
    causes(fault).find_map(|error| {
        let words = error.to_string();
        let (_, rest) = words.split_once(SAID)?;
        Some(rest.chars().take_while(char::is_ascii_alphanumeric).collect())
    })
}

/// The TLS library's error, anywhere in the chain.
fn rustls_error<'f>(fault: &'f (dyn Error + 'static)) -> Option<&'f rustls::Error> {
    causes(fault).find_map(|error| error.downcast_ref::<rustls::Error>())
}

/// An error with its causes, each once.
pub(super) fn chain(fault: &dyn Error) -> String {
    let mut said: Vec<String> = Vec::new();
    let mut next = Some(fault);
    while let Some(error) = next {
        let words = error.to_string();
        if !said.iter().any(|earlier| earlier.contains(&words)) {
            said.push(words);
        }
        next = error.source();
    }
    // "transport error" adds nothing to a more specific message.
    if said.len() > 1 {
        said.retain(|words| words != "transport error");
    }
    said.join(": ")
}

/// Turns a timeout into an error that names the server.
pub(super) fn in_time<T>(answered: Result<T, tokio::time::error::Elapsed>, server: &Server) -> anyhow::Result<T> {
    answered.with_context(|| format!("{} did not answer in time", server.address))
}
