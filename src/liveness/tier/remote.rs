//! Connections to the store: to the server at one address, to the primary that Sentinels name, or to a cluster's node that has our slot.

use std::{collections::HashMap, time::Duration};

use futures_util::{StreamExt, stream::FuturesUnordered};
use redis::{
    AsyncConnectionConfig, Client, ClientTlsConfig, ConnectionAddr, ErrorKind, IntoConnectionInfo, RedisConnectionInfo,
    RedisError, ServerErrorKind, TlsCertificates, Value,
    aio::{MultiplexedConnection, PubSub},
    io::tcp::TcpSettings,
};
use socket2::TcpKeepalive;
use tokio::{
    sync::watch,
    time::{Instant, timeout_at},
};

use super::{
    TierAccess, TierServers,
    address::{SENTINEL_PORT, STORE_PORT, StoreAddress},
    faults::StoreFault,
    identity::ClientIdentity,
    keys::ONE_SLOT,
};
use crate::{core::engine::Boxed, domain::secret::Secret};

/// After so long without data, the kernel checks the connection.
const KEEPALIVE: Duration = Duration::from_secs(10);

/// Makes connections to the store.
pub trait Connect: Send + Sync {
    /// A connection for commands. It is shared by concurrent ones.
    fn connect(&self) -> Boxed<'_, Result<MultiplexedConnection, StoreFault>>;
    /// A connection that receives notices.
    fn listen(&self) -> Boxed<'_, Result<Listening, StoreFault>>;
    /// A fault of the last connection for commands.
    fn fault(&self, error: RedisError) -> StoreFault {
        error.into()
    }
}

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

/// What a server says of itself.
#[derive(Debug, Default)]
struct Hello {
    mode: String,
    role: String,
}

/// Whether a server that says this will do.
type Fits = fn(&Hello) -> Result<(), RedisError>;

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

    /// Connects to the server that holds the values. Its fault comes before the end of the caller's patience, and so with the server's name.
    async fn find(&self) -> Result<(StoreAddress, MultiplexedConnection), StoreFault> {
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
    ) -> Result<MultiplexedConnection, StoreFault> {
        let connecting = async {
            let mut connection = for_commands(self.client(server, login)?, self.timeout).await?;
            fits(&Hello::of(&mut connection).await?)?;
            Ok(connection)
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
        let mut connection = self.at(sentinel, login, by, |_| Ok(())).await?;
        let asking = async {
            let mut question = redis::cmd("SENTINEL");
            question.arg("GET-MASTER-ADDR-BY-NAME").arg(service);
            let named: Option<(String, u16)> = question.query_async(&mut connection).await?;
            let unknown = (ErrorKind::MasterNameNotFoundBySentinel, "the Sentinel does not know this service");
            let (host, port) = named.ok_or(unknown)?;
            sentinel.named(&host, port)
        };
        self.of(sentinel, by, asking).await
    }

    /// The node that has our slot, by what this node says: it either has it, or names the one that has.
    async fn owner(&self, node: &StoreAddress, by: Instant) -> Result<(StoreAddress, MultiplexedConnection), StoreFault> {
        let mut connection = self.at(node, &self.login, by, Hello::is_node).await?;
        let asking = async {
            // Any name of the slot will do, and any command that needs no further right.
            let mut question = redis::cmd("PTTL");
            question.arg(ONE_SLOT);
            match question.query_async::<i64>(&mut connection).await {
                Ok(_) => Ok(None),
                Err(fault) => match (fault.kind(), fault.redirect_node()) {
                    // While the slot leaves it, it is still the owner, and refers to the next one for what it does not have.
                    (ErrorKind::Server(ServerErrorKind::Ask), _) => Ok(None),
                    (_, Some((address, _))) => node.referred(address).map(Some),
                    _ => Err(fault),
                },
            }
        };
        let Some(owner) = self.of(node, by, asking).await? else { return Ok((node.clone(), connection)) };
        let connection = self.at(&owner, &self.login, by, Hello::is_node).await?;
        Ok((owner, connection))
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
    fn connect(&self) -> Boxed<'_, Result<MultiplexedConnection, StoreFault>> {
        Box::pin(async {
            let (server, connection) = self.find().await?;
            self.in_use.send_replace(Some(server));
            Ok(connection)
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
            let connecting = async { self.client(&server, &self.login)?.get_async_pubsub().await };
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

async fn for_commands(client: Client, timeout: Duration) -> Result<MultiplexedConnection, RedisError> {
    // Every command has a timeout of its own.
    let config = AsyncConnectionConfig::new().set_connection_timeout(Some(timeout)).set_response_timeout(None);
    client.get_multiplexed_async_connection_with_config(&config).await
}

pub(super) fn timed_out() -> RedisError {
    std::io::Error::from(std::io::ErrorKind::TimedOut).into()
}
