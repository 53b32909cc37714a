//! How commands reach a server: its address, TLS, who they are, and in one sentence why it did not go.

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

/// The largest file of certificates, and of a token.
const MAX_FILE_BYTES: u64 = 1024 * 1024;
/// More than what a gRPC client is told by the admin listener.
const MAX_ANSWER_BYTES: u64 = 4096;
/// How long a look at what answers there may take.
const LOOK: Duration = Duration::from_secs(1);

/// How a server is reached, and as whom.
#[derive(Debug, Clone, Default, PartialEq, Args)]
pub(super) struct ClientArgs {
    /// Speak TLS, and take the server's certificate only by these authorities, in PEM. With `https://HOST:PORT` and without this, the
    /// system's are taken [environment: BYOK_GATE_SERVER_CA].
    #[arg(long, value_name = "FILE")]
    server_ca: Option<PathBuf>,
    /// The name that the server's certificate is to have, where it is not the address's [environment: BYOK_GATE_SERVER_NAME].
    #[arg(long, value_name = "NAME")]
    server_name: Option<String>,
    /// This client's certificate chain, in PEM, for a server that wants one [environment: BYOK_GATE_CLIENT_CERT].
    #[arg(long, value_name = "FILE")]
    client_cert: Option<PathBuf>,
    /// Its key, in PEM [environment: BYOK_GATE_CLIENT_KEY].
    #[arg(long, value_name = "FILE")]
    client_key: Option<PathBuf>,
    /// A file whose first line is this client's bearer token; what stands behind a space is not part of it, so that a line of the server's
    /// own file serves [environment: BYOK_GATE_CLIENT_TOKEN_FILE].
    #[arg(long, value_name = "FILE")]
    client_token_file: Option<PathBuf>,
}

/// A server, and how it is reached.
pub(super) struct Server {
    /// As it was given.
    pub(super) address: String,
    /// With its scheme.
    pub(super) uri: String,
    pub(super) tls: Option<Tls>,
    token: Option<Zeroizing<String>>,
}

/// What TLS is made with.
pub(super) struct Tls {
    /// None takes the system's.
    pub(super) authorities: Option<Pem>,
    pub(super) name: Option<String>,
    /// Certificate and key.
    pub(super) identity: Option<(Pem, Pem)>,
}

/// A file's content.
type Pem = Zeroizing<Vec<u8>>;

/// What answers an HTTP/2 client that speaks no TLS.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Heard {
    /// An alert of TLS.
    Tls,
    /// HTTP/2.
    Plain,
    /// byok-gate's admin listener, which says where gRPC is.
    Admin(String),
    /// Anything else, or nothing.
    Other,
}

// === impl ClientArgs ===

impl ClientArgs {
    /// The flags, and where there is none, the environment.
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

    /// The server at this address: `HOST:PORT` with a name or an IP address, `http://` or `https://` before it, or `unix:PATH`.
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
    /// A channel; what is wrong with TLS may show with the first call only.
    pub(super) async fn connect(&self, patience: Duration) -> anyhow::Result<Channel> {
        let wrong = || UsageError(format!("--server {} is not an address: write HOST:PORT or unix:PATH", self.address));
        let mut endpoint = Endpoint::from_shared(self.uri.clone()).map_err(|_| wrong())?.connect_timeout(patience);
        if let Some(tls) = &self.tls {
            endpoint = endpoint.tls_config(tls.config()).map_err(|fault| UsageError(format!("TLS: {}", chain(&fault))))?;
        }
        match endpoint.connect().await {
            Ok(channel) => Ok(channel),
            Err(fault) => Err(anyhow::anyhow!(self.sentence(&fault).await)),
        }
    }

    /// A call's message with the token, if there is one.
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

    /// The header's value.
    pub(super) fn bearer(&self) -> Option<Zeroizing<String>> {
        self.token.as_ref().map(|token| Zeroizing::new(format!("Bearer {}", **token)))
    }

    /// Why a call came to nothing.
    pub(super) async fn refusal(&self, status: &Status) -> String {
        let code = status.code();
        // The status itself says no more than its source, and that in the library's own notation.
        if let Some(source) = status.source() {
            return self.sentence(source).await;
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

    /// The same of what the connection failed of.
    async fn sentence(&self, fault: &(dyn Error + 'static)) -> String {
        let address = &self.address;
        if let Some(said) = of_tls(fault) {
            return format!("{address}: {said}");
        }
        if let Some(said) = self.alert().await {
            return format!("{address}: {said}");
        }
        match (self.tls.is_some(), self.heard().await) {
            (false, Heard::Tls) => format!("{address} speaks TLS: write https:// before the address, or give --server-ca"),
            (true, Heard::Plain) => {
                format!("{address} speaks no TLS: leave out https://, --server-ca, --server-name and --client-cert")
            }
            (_, Heard::Admin(said)) => format!("{address}: {said}"),
            (false, Heard::Other) if is_cut_off(fault) => {
                format!(
                    "{address} closed the connection without an answer of gRPC's: is it the port of --admin-listen, or stopping?"
                )
            }
            _ => format!("{address} could not be reached: {}", chain(fault)),
        }
    }

    /// What the server ends the handshake with, where the HTTP/2 library has not kept it: a write to a connection that is closed already may
    /// come before the read of why.
    async fn alert(&self) -> Option<String> {
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
            // It says nothing before we do, unless it ends the connection.
            stream.read_u8().await
        };
        match timeout(LOOK, look).await {
            Ok(Err(fault)) => of_tls(&fault),
            Ok(Ok(_)) | Err(_) => None,
        }
    }

    /// What answers there.
    async fn heard(&self) -> Heard {
        let Some((_, rest)) = self.uri.split_once("://") else { return Heard::Other };
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
            }
            io::Result::Ok((head, rest))
        };
        match timeout(LOOK, look).await {
            Ok(Ok(([21, 3, ..], _))) => Heard::Tls,
            Ok(Ok(([0, _, _, 4, ..], _))) => Heard::Plain,
            Ok(Ok((_, rest))) => of_admin(&rest).map_or(Heard::Other, Heard::Admin),
            Ok(Err(_)) | Err(_) => Heard::Other,
        }
    }
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

// === why ===

/// Whether a connection that was there has been ended from the other side.
fn is_cut_off(fault: &(dyn Error + 'static)) -> bool {
    use io::ErrorKind::{BrokenPipe, ConnectionReset, UnexpectedEof};
    let mut kinds = causes(fault).filter_map(|error| error.downcast_ref::<io::Error>()).map(io::Error::kind);
    kinds.any(|kind| matches!(kind, BrokenPipe | ConnectionReset | UnexpectedEof))
}

/// What TLS fell over, with what to do.
pub(super) fn of_tls(fault: &(dyn Error + 'static)) -> Option<String> {
    let Some(found) = rustls_error(fault) else { return alert_in(fault).map(|alert| of_alert(&alert)) };
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
        rustls::Error::AlertReceived(alert) => of_alert(&format!("{alert:?}")),
        rustls::Error::InvalidMessage(_) => "what answers there speaks no TLS: leave out https:// and --server-ca".into(),
        other => format!("TLS failed: {other}"),
    })
}

/// What the server's alert means, by its name.
fn of_alert(alert: &str) -> String {
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

/// The alert's name, where the HTTP/2 library has kept no more of the TLS library's error than its words.
fn alert_in(fault: &(dyn Error + 'static)) -> Option<String> {
    const SAID: &str = "received fatal alert: ";
    causes(fault).find_map(|error| {
        let words = error.to_string();
        let (_, rest) = words.split_once(SAID)?;
        Some(rest.chars().take_while(char::is_ascii_alphanumeric).collect())
    })
}

/// The TLS library's own error, wherever in the chain it is.
fn rustls_error<'f>(fault: &'f (dyn Error + 'static)) -> Option<&'f rustls::Error> {
    causes(fault).find_map(|error| error.downcast_ref::<rustls::Error>())
}

/// A fault with its causes, each once.
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
    // "transport error" tells nobody anything where there is more to say.
    if said.len() > 1 {
        said.retain(|words| words != "transport error");
    }
    said.join(": ")
}

/// How long a command waits for a server, in words, for one that did not answer.
pub(super) fn in_time<T>(answered: Result<T, tokio::time::error::Elapsed>, server: &Server) -> anyhow::Result<T> {
    answered.with_context(|| format!("{} did not answer in time", server.address))
}
