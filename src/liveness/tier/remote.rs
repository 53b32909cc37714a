//! Connections to the store: to the server at one address, to the primary that Sentinels name, or to a cluster's node that has our slot.

use std::{collections::HashMap, io, net::SocketAddr, sync::Arc, time::Duration};

use futures_util::{StreamExt, future::select_ok, stream::FuturesUnordered};
use redis::{
    AsyncConnectionConfig, ErrorKind, RedisConnectionInfo, RedisError, ServerErrorKind, Value,
    aio::{AsyncStream, MultiplexedConnection, PubSub},
};
use rustls::{ClientConfig, RootCertStore, crypto::ring};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject};
use socket2::{SockRef, TcpKeepalive};
use tokio::{
    net::{TcpStream, lookup_host},
    sync::watch,
    task::AbortHandle,
    time::{Instant, timeout_at},
};
use tokio_rustls::TlsConnector;

use super::{
    TierAccess, TierServers,
    address::{SENTINEL_PORT, STORE_PORT, StoreAddress},
    faults::StoreFault,
    identity::ClientIdentity,
    keys::ONE_SLOT,
    replies::LimitedReplies,
};
use crate::{core::engine::Boxed, domain::secret::Secret};

/// After so long without data, the kernel checks the connection.
const KEEPALIVE: Duration = Duration::from_secs(10);

/// Makes connections to the store.
pub trait Connect: Send + Sync {
    /// A connection for commands. It is shared by concurrent ones.
    fn connect(&self) -> Boxed<'_, Result<Commands, StoreFault>>;
    /// A connection that receives notices.
    fn listen(&self) -> Boxed<'_, Result<Listening, StoreFault>>;
    /// A fault of the last connection for commands.
    fn fault(&self, error: RedisError) -> StoreFault {
        error.into()
    }
}

/// A connection for commands.
#[derive(Clone)]
pub struct Commands {
    pub(super) connection: MultiplexedConnection,
    /// Reads its replies, and ends with the last clone.
    _driver: Arc<Driver>,
}

/// Ends a task when it is dropped. By itself it would wait for a server that never replies.
struct Driver(AbortHandle);

/// A connection that receives notices.
pub struct Listening {
    /// The connection.
    pub connection: PubSub,
    /// Ends when commands have got another connection since. The connection to a server that is gone may take minutes to end.
    pub moved: Boxed<'static, ()>,
}

/// Connects to the server that holds the values.
pub(super) struct Remote {
    way: Way,
    login: RedisConnectionInfo,
    tls: Option<TlsConnector>,
    timeout: Duration,
    /// The server of the last connection for commands.
    in_use: watch::Sender<Option<StoreAddress>>,
}

/// How the server is found.
enum Way {
    Address(StoreAddress),
    Sentinels { addresses: Vec<StoreAddress>, service: String, login: RedisConnectionInfo },
    Nodes(Vec<StoreAddress>),
}

/// What a server says of itself.
#[derive(Debug, Default)]
struct Hello {
    mode: String,
    role: String,
}

/// Whether a server that says this will do.
type Fits = fn(&Hello) -> Result<(), RedisError>;

// === impl Commands ===

impl Commands {
    /// A connection, and what reads its replies.
    pub fn new(connection: MultiplexedConnection, driver: impl Future<Output = ()> + Send + 'static) -> Self {
        Self { connection, _driver: Arc::new(Driver(tokio::spawn(driver).abort_handle())) }
    }
}

impl Drop for Driver {
    fn drop(&mut self) {
        self.0.abort();
    }
}

// === impl Way ===

impl Way {
    fn new(servers: &TierServers) -> Result<Self, String> {
        let way = match servers {
            TierServers::Address(address) => Self::Address(StoreAddress::parse(address, STORE_PORT)?),
            TierServers::Sentinels { addresses, service, user, password } => Self::Sentinels {
                addresses: addresses.iter().map(|text| StoreAddress::parse(text, SENTINEL_PORT)).collect::<Result<_, _>>()?,
                service: service.clone(),
                login: login(user.as_deref(), password.as_ref()),
            },
            TierServers::Nodes(addresses) => {
                Self::Nodes(addresses.iter().map(|text| StoreAddress::parse(text, STORE_PORT)).collect::<Result<_, _>>()?)
            }
        };
        if way.addresses().is_empty() { Err("no address is given".to_owned()) } else { Ok(way) }
    }

    /// The addresses of the settings.
    fn addresses(&self) -> &[StoreAddress] {
        match self {
            Self::Address(address) => std::slice::from_ref(address),
            Self::Sentinels { addresses, .. } | Self::Nodes(addresses) => addresses,
        }
    }
}

// === impl Remote ===

impl Remote {
    pub(super) fn new(access: &TierAccess) -> Result<Self, String> {
        let TierAccess { servers, timeout, user, password, ca, identity, .. } = access;
        let way = Way::new(servers)?;
        let has_tls = way.addresses().iter().any(|address| address.tls);
        let tls = has_tls.then(|| connector(ca.as_deref(), identity.as_ref())).transpose()?;
        let login = login(user.as_deref(), password.as_ref());
        Ok(Self { way, login, tls, timeout: *timeout, in_use: watch::Sender::new(None) })
    }

    /// Connects to the first of the server's addresses that takes the connection.
    async fn stream(&self, server: &StoreAddress) -> Result<LimitedReplies<Box<dyn AsyncStream + Send + Unpin>>, RedisError> {
        let addresses: Vec<SocketAddr> = lookup_host((server.host.as_str(), server.port)).await?.collect();
        if addresses.is_empty() {
            return Err(io::Error::from(io::ErrorKind::NotFound).into());
        }
        let tls = self.tls.as_ref().filter(|_| server.tls);
        let (stream, _) = select_ok(addresses.into_iter().map(|address| Box::pin(dial(address, &server.host, tls)))).await?;
        Ok(LimitedReplies::new(stream))
    }

    async fn for_commands(&self, server: &StoreAddress, login: &RedisConnectionInfo) -> Result<Commands, RedisError> {
        // Every command has a timeout of its own.
        let config = AsyncConnectionConfig::new().set_response_timeout(None);
        let login = login.clone().set_db(server.database);
        let (connection, driver) = MultiplexedConnection::new_with_config(&login, self.stream(server).await?, config).await?;
        Ok(Commands::new(connection, driver))
    }

    /// Connects to the server that holds the values. Its fault comes before the end of the caller's patience, and so with the server's name.
    async fn find(&self) -> Result<(StoreAddress, Commands), StoreFault> {
        let by = Instant::now() + self.timeout * 9 / 10;
        match &self.way {
            Way::Address(address) => Ok((address.clone(), self.at(address, &self.login, by, Hello::is_store).await?)),
            // All are asked at once and the first connection that comes about counts, so that no server that is away holds it up.
            Way::Sentinels { addresses, service, login } => {
                first(addresses.iter().map(|sentinel| async move {
                    let primary = self.primary(sentinel, service, login, by).await?;
                    let connection = self.at(&primary, &self.login, by, Hello::is_primary).await?;
                    Ok((primary, connection))
                }))
                .await
            }
            Way::Nodes(addresses) => first(addresses.iter().map(|node| self.owner(node, by))).await,
        }
    }

    /// Connects to this server, if what it says of itself fits.
    async fn at(
        &self,
        server: &StoreAddress,
        login: &RedisConnectionInfo,
        by: Instant,
        fits: Fits,
    ) -> Result<Commands, StoreFault> {
        let connecting = async {
            let mut commands = self.for_commands(server, login).await?;
            fits(&Hello::of(&mut commands.connection).await?)?;
            Ok(commands)
        };
        self.of(server, by, connecting).await
    }

    /// The result, or this server's fault.
    async fn of<T>(
        &self,
        server: &StoreAddress,
        by: Instant,
        work: impl Future<Output = Result<T, RedisError>>,
    ) -> Result<T, StoreFault> {
        let done = timeout_at(by, work).await.unwrap_or_else(|_| Err(timed_out()));
        done.map_err(|error| self.fault_of(server.to_string(), error))
    }

    fn fault_of(&self, server: String, error: RedisError) -> StoreFault {
        let of_sentinels = if let Way::Sentinels { login, .. } = &self.way { login.password() } else { None };
        let passwords = self.login.password().into_iter().chain(of_sentinels).map(|it| Secret::new(it.to_owned())).collect();
        StoreFault { server, error, passwords }
    }

    /// The primary that this Sentinel names.
    async fn primary(
        &self,
        sentinel: &StoreAddress,
        service: &str,
        login: &RedisConnectionInfo,
        by: Instant,
    ) -> Result<StoreAddress, StoreFault> {
        let mut commands = self.at(sentinel, login, by, |_| Ok(())).await?;
        let asking = async {
            let mut question = redis::cmd("SENTINEL");
            question.arg("GET-MASTER-ADDR-BY-NAME").arg(service);
            let named: Option<(String, u16)> = question.query_async(&mut commands.connection).await?;
            let unknown = (ErrorKind::MasterNameNotFoundBySentinel, "the Sentinel does not know this service");
            let (host, port) = named.ok_or(unknown)?;
            sentinel.named(&host, port)
        };
        self.of(sentinel, by, asking).await
    }

    /// The node that has our slot, by what this node says: it either has it, or names the one that has.
    async fn owner(&self, node: &StoreAddress, by: Instant) -> Result<(StoreAddress, Commands), StoreFault> {
        let mut commands = self.at(node, &self.login, by, Hello::is_node).await?;
        let asking = async {
            // Any name of the slot will do, and any command that needs no further right.
            let mut question = redis::cmd("PTTL");
            question.arg(ONE_SLOT);
            match question.query_async::<i64>(&mut commands.connection).await {
                Ok(_) => Ok(None),
                Err(fault) => match (fault.kind(), fault.redirect_node()) {
                    // While the slot leaves it, it is still the owner, and refers to the next one for what it does not have.
                    (ErrorKind::Server(ServerErrorKind::Ask), _) => Ok(None),
                    (_, Some((address, _))) => node.referred(address).map(Some),
                    _ => Err(fault),
                },
            }
        };
        let Some(owner) = self.of(node, by, asking).await? else { return Ok((node.clone(), commands)) };
        let commands = self.at(&owner, &self.login, by, Hello::is_node).await?;
        Ok((owner, commands))
    }
}

/// The first that works, or the fault that says most.
async fn first<T>(ways: impl Iterator<Item = impl Future<Output = Result<T, StoreFault>>>) -> Result<T, StoreFault> {
    let mut ways: FuturesUnordered<_> = ways.collect();
    let mut most: Option<StoreFault> = None;
    while let Some(tried) = ways.next().await {
        let fault = match tried {
            Ok(found) => return Ok(found),
            Err(fault) => fault,
        };
        if most.as_ref().is_none_or(|most| fault.says() > most.says()) {
            most = Some(fault);
        }
    }
    // There is a way: the settings are checked.
    Err(most.unwrap_or_else(|| timed_out().into()))
}

// === impl Hello ===

impl Hello {
    /// Asks the server, which needs no right for the answer. One that does not know the question is taken as it is.
    async fn of(connection: &mut MultiplexedConnection) -> Result<Self, RedisError> {
        let mut question = redis::cmd("HELLO");
        question.arg(2);
        let reply: Value = match question.query_async(connection).await {
            // It asks for a password.
            Err(fault) if fault.code() == Some("NOAUTH") => return Err(fault),
            Err(fault) if matches!(fault.kind(), ErrorKind::Server(_) | ErrorKind::Extension) => Value::Nil,
            reply => reply?,
        };
        let mut words: HashMap<String, Value> = redis::from_redis_value(reply).unwrap_or_default();
        let mut word = |name: &str| words.remove(name).and_then(|word| redis::from_redis_value(word).ok()).unwrap_or_default();
        Ok(Self { mode: word("mode"), role: word("role") })
    }

    fn is_store(&self) -> Result<(), RedisError> {
        if self.mode == "sentinel" {
            let what = "this is a Sentinel and no store: name it in tier.sentinel.addresses";
            return Err((ErrorKind::InvalidClientConfig, what).into());
        }
        Ok(())
    }

    fn is_primary(&self) -> Result<(), RedisError> {
        if !matches!(self.role.as_str(), "" | "master") {
            return Err((ErrorKind::InvalidClientConfig, "the Sentinel names a server that is no primary").into());
        }
        self.is_store()
    }

    fn is_node(&self) -> Result<(), RedisError> {
        if !matches!(self.mode.as_str(), "" | "cluster") {
            return Err((ErrorKind::InvalidClientConfig, "the server is not in cluster mode, and tier.cluster names it").into());
        }
        Ok(())
    }
}

impl Connect for Remote {
    fn connect(&self) -> Boxed<'_, Result<Commands, StoreFault>> {
        Box::pin(async {
            let (server, commands) = self.find().await?;
            self.in_use.send_replace(Some(server));
            Ok(commands)
        })
    }

    fn listen(&self) -> Boxed<'_, Result<Listening, StoreFault>> {
        Box::pin(async {
            let mut in_use = self.in_use.subscribe();
            let mut is_first = in_use.borrow_and_update().is_none();
            let server = match &self.way {
                Way::Address(address) => address.clone(),
                Way::Sentinels { .. } | Way::Nodes(_) => self.find().await?.0,
            };
            let connecting = async { PubSub::new(&self.login, self.stream(&server).await?).await };
            let connection = self.of(&server, Instant::now() + self.timeout, connecting).await?;
            let moved = Box::pin(async move {
                // Another server may be behind the same address by now. The first connection of all is as young as this one.
                while in_use.changed().await.is_ok() && is_first && in_use.borrow_and_update().as_ref() == Some(&server) {
                    is_first = false;
                }
            });
            Ok(Listening { connection, moved })
        })
    }

    fn fault(&self, error: RedisError) -> StoreFault {
        let server = self.in_use.borrow().as_ref().map(ToString::to_string);
        let all = || self.way.addresses().iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
        self.fault_of(server.unwrap_or_else(all), error)
    }
}

fn login(user: Option<&str>, password: Option<&Secret>) -> RedisConnectionInfo {
    let mut login = RedisConnectionInfo::default().set_skip_set_lib_name();
    if let Some(user) = user {
        login = login.set_username(user);
    }
    if let Some(password) = password {
        login = login.set_password(password.expose());
    }
    login
}

/// Connects to one address.
async fn dial(
    address: SocketAddr,
    host: &str,
    tls: Option<&TlsConnector>,
) -> Result<Box<dyn AsyncStream + Send + Unpin>, RedisError> {
    let stream = TcpStream::connect(address).await?;
    stream.set_nodelay(true)?;
    // The listener sends nothing, so only keepalive notices that its connection is lost.
    let keepalive = TcpKeepalive::new().with_time(KEEPALIVE).with_interval(KEEPALIVE);
    SockRef::from(&stream).set_tcp_keepalive(&keepalive)?;
    let Some(tls) = tls else { return Ok(Box::new(stream)) };
    let name = ServerName::try_from(host.to_owned()).map_err(|fault| io::Error::new(io::ErrorKind::InvalidInput, fault))?;
    Ok(Box::new(tls.connect(name, stream).await?))
}

/// TLS with these authorities, or with the system's.
fn connector(ca: Option<&[u8]>, identity: Option<&ClientIdentity>) -> Result<TlsConnector, String> {
    let mut roots = RootCertStore::empty();
    match ca {
        Some(ca) => {
            for certificate in CertificateDer::pem_slice_iter(ca) {
                let certificate = certificate.map_err(|fault| format!("an authority cannot be read: {fault}"))?;
                roots.add(certificate).map_err(|fault| format!("an authority cannot be read: {fault}"))?;
            }
        }
        None => {
            roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
        }
    }
    let config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .map_err(|fault| fault.to_string())?
        .with_root_certificates(roots);
    let config = match identity {
        None => config.with_no_client_auth(),
        Some(ClientIdentity { certificate, key }) => {
            let unread = |fault| format!("the client certificate cannot be read: {fault}");
            let chain = CertificateDer::pem_slice_iter(certificate).collect::<Result<_, _>>().map_err(unread)?;
            let key = PrivateKeyDer::from_pem_slice(key.expose().as_bytes()).map_err(unread)?;
            config.with_client_auth_cert(chain, key).map_err(|fault| fault.to_string())?
        }
    };
    Ok(TlsConnector::from(Arc::new(config)))
}

pub(super) fn timed_out() -> RedisError {
    std::io::Error::from(std::io::ErrorKind::TimedOut).into()
}
