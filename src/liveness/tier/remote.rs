//! Connections to the store: to the server at one address, to the primary that Sentinels name, or to a cluster's node that has our slot.

use std::time::Duration;

use futures_util::future::select_ok;
use redis::{
    AsyncConnectionConfig, Client, ClientTlsConfig, ConnectionAddr, ErrorKind, IntoConnectionInfo, RedisConnectionInfo,
    RedisError, ServerErrorKind, TlsCertificates,
    aio::{MultiplexedConnection, PubSub},
    io::tcp::TcpSettings,
};
use socket2::TcpKeepalive;
use tokio::sync::watch;

use super::{
    TierAccess, TierServers,
    address::{SENTINEL_PORT, STORE_PORT, StoreAddress},
    identity::ClientIdentity,
    keys::ONE_SLOT,
};
use crate::{core::engine::Boxed, domain::secret::Secret};

/// After so long without data, the kernel checks the connection.
const KEEPALIVE: Duration = Duration::from_secs(10);

/// Makes connections to the store.
pub trait Connect: Send + Sync {
    /// A connection for commands. It is shared by concurrent ones.
    fn connect(&self) -> Boxed<'_, Result<MultiplexedConnection, RedisError>>;
    /// A connection that receives notices.
    fn listen(&self) -> Boxed<'_, Result<Listening, RedisError>>;
}

/// A connection that receives notices.
pub struct Listening {
    /// The connection.
    pub connection: PubSub,
    /// Ends when commands have gone to another server since. The connection to one that is gone may take minutes to end.
    pub moved: Boxed<'static, ()>,
}

/// Connects to the server that holds the values.
pub(super) struct Remote {
    way: Way,
    login: RedisConnectionInfo,
    tls: Option<TlsCertificates>,
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

/// Opens a connection of one kind.
type Open<T> = fn(Client, Duration) -> Boxed<'static, Result<T, RedisError>>;

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
        // `select_ok` takes no empty list.
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
        let client_tls = identity.as_ref().map(|ClientIdentity { certificate, key }| ClientTlsConfig {
            client_cert: certificate.clone(),
            client_key: key.expose().as_bytes().to_vec(),
        });
        let has_tls = way.addresses().iter().any(|address| address.tls);
        let tls = has_tls.then(|| TlsCertificates { client_tls, root_cert: ca.clone() });
        let login = login(user.as_deref(), password.as_ref());
        let remote = Self { way, login, tls, timeout: *timeout, in_use: watch::Sender::new(None) };
        // A wrong authority's file is found now, and not with the first connection.
        for address in remote.way.addresses() {
            remote.client(address, &remote.login).map_err(|fault| fault.to_string())?;
        }
        Ok(remote)
    }

    fn client(&self, server: &StoreAddress, login: &RedisConnectionInfo) -> Result<Client, RedisError> {
        let StoreAddress { host, port, tls, database } = server.clone();
        let remote = if tls {
            ConnectionAddr::TcpTls { host, port, insecure: false, tls_params: None }
        } else {
            ConnectionAddr::Tcp(host, port)
        };
        // The listener sends nothing, so only keepalive notices that its connection is lost.
        let keepalive = TcpKeepalive::new().with_time(KEEPALIVE).with_interval(KEEPALIVE);
        let tcp = TcpSettings::default().set_nodelay(true).set_keepalive(keepalive);
        let info = remote.into_connection_info()?.set_redis_settings(login.clone().set_db(database)).set_tcp_settings(tcp);
        match self.tls.clone().filter(|_| tls) {
            Some(certificates) => Client::build_with_tls(info, certificates),
            None => Client::open(info),
        }
    }

    /// Opens a connection to the server that holds the values.
    async fn open<T>(&self, open: Open<T>) -> Result<(StoreAddress, T), RedisError> {
        match &self.way {
            Way::Address(address) => self.open_at(address.clone(), open).await,
            // All are asked at once and the first connection that comes about counts, so that no server that is away holds it up.
            Way::Sentinels { addresses, service, login } => {
                let ways = addresses.iter().map(|sentinel| {
                    Box::pin(async move { self.open_at(self.primary(sentinel, service, login).await?, open).await })
                });
                select_ok(ways).await.map(|(opened, _)| opened)
            }
            Way::Nodes(addresses) => {
                let ways =
                    addresses.iter().map(|node| Box::pin(async move { self.open_at(self.owner(node).await?, open).await }));
                select_ok(ways).await.map(|(opened, _)| opened)
            }
        }
    }

    async fn open_at<T>(&self, server: StoreAddress, open: Open<T>) -> Result<(StoreAddress, T), RedisError> {
        let opened = open(self.client(&server, &self.login)?, self.timeout).await?;
        Ok((server, opened))
    }

    /// The primary that this Sentinel names.
    async fn primary(
        &self,
        sentinel: &StoreAddress,
        service: &str,
        login: &RedisConnectionInfo,
    ) -> Result<StoreAddress, RedisError> {
        let mut connection = for_commands(self.client(sentinel, login)?, self.timeout).await?;
        let mut question = redis::cmd("SENTINEL");
        question.arg("GET-MASTER-ADDR-BY-NAME").arg(service);
        let named: Option<(String, u16)> = question.query_async(&mut connection).await?;
        let (host, port) = named.ok_or((ErrorKind::MasterNameNotFoundBySentinel, "the Sentinel does not know this service"))?;
        sentinel.named(&host, port)
    }

    /// The node that has our slot, by what this node says: it either has it, or names the one that has.
    async fn owner(&self, node: &StoreAddress) -> Result<StoreAddress, RedisError> {
        let mut connection = for_commands(self.client(node, &self.login)?, self.timeout).await?;
        // Any name of the slot will do, and any command that needs no further right.
        let mut question = redis::cmd("PTTL");
        question.arg(ONE_SLOT);
        match question.query_async::<i64>(&mut connection).await {
            Ok(_) => Ok(node.clone()),
            Err(fault) => match (fault.kind(), fault.redirect_node()) {
                // While the slot leaves it, it is still the owner, and refers to the next one for what it does not have.
                (ErrorKind::Server(ServerErrorKind::Ask), _) => Ok(node.clone()),
                (_, Some((address, _))) => node.referred(address),
                _ => Err(fault),
            },
        }
    }
}

impl Connect for Remote {
    fn connect(&self) -> Boxed<'_, Result<MultiplexedConnection, RedisError>> {
        Box::pin(async {
            let (server, connection) = self.open(for_commands).await?;
            self.in_use.send_replace(Some(server));
            Ok(connection)
        })
    }

    fn listen(&self) -> Boxed<'_, Result<Listening, RedisError>> {
        Box::pin(async {
            let mut in_use = self.in_use.subscribe();
            let (server, connection) = self.open(for_notices).await?;
            let moved = Box::pin(async move {
                while in_use.changed().await.is_ok() && in_use.borrow_and_update().as_ref() == Some(&server) {}
            });
            Ok(Listening { connection, moved })
        })
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

fn for_commands(client: Client, timeout: Duration) -> Boxed<'static, Result<MultiplexedConnection, RedisError>> {
    Box::pin(async move {
        // Every command has a timeout of its own.
        let config = AsyncConnectionConfig::new().set_connection_timeout(Some(timeout)).set_response_timeout(None);
        client.get_multiplexed_async_connection_with_config(&config).await
    })
}

fn for_notices(client: Client, _: Duration) -> Boxed<'static, Result<PubSub, RedisError>> {
    Box::pin(async move { client.get_async_pubsub().await })
}
