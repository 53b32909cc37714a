//! The store itself: one connection that is made anew after a fault, four scripts, and a time for everything.

use std::{
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use futures_util::{Stream, StreamExt};
use redis::{
    AsyncConnectionConfig, Client, Cmd, ConnectionAddr, ErrorKind, FromRedisValue, IntoConnectionInfo, RedisConnectionInfo,
    RedisError, TlsCertificates,
    aio::{MultiplexedConnection, PubSub},
    io::tcp::TcpSettings,
};
use socket2::TcpKeepalive;
use tokio::time::{Instant, timeout_at};

use super::{
    TierAccess,
    faults::{Change, Faults},
    keys::{Allowance, BEGINNING, CHANNEL, SEALED_BYTES},
    place::Place,
};
use crate::{
    core::engine::Boxed,
    telemetry::metrics::{Counter, Histogram},
};

/// How long a lease lasts that nobody renews.
pub(super) const LEASE: Duration = Duration::from_secs(1);
const MINUTE: Duration = Duration::from_secs(60);
/// After which silence the kernel asks whether the store is still there.
const KEEPALIVE: Duration = Duration::from_secs(10);

/// KEYS: the lease, then what would do instead of asking: observations, and verdicts that opened a breaker. ARGV: who asks, the lease's
/// milliseconds, the bytes of a sealed value, then for each of those the beginning of the one that will not do. Gives: the store's time;
/// 0 one of them is there, 1 the lease is the asker's, 2 another has it, 3 it is withheld; how many values cannot be ours; the values; for how
/// many milliseconds it is withheld.
/// A value of another type or length is as none. So is a lease that does not end, or too late: nobody of ours set it.
///
/// With one more of the KEYS, and of ARGV what one costs and the most that may be spent, in microseconds, it counts new credentials: nothing is
/// known of what the lease is for, not even what will not do. The value says until when what was spent is not all regained, as governor counts.
/// One that is more than may be spent is none of ours.
const LOOK: &str = "\
local now = redis.call('TIME')
local ms = now[1] * 1000 + math.floor(now[2] / 1000)
local values, damaged, found, known, named = {}, 0, false, false, tonumber(ARGV[4])
for i = 2, named + 1 do
  local value = ''
  local length = redis.pcall('STRLEN', KEYS[i])
  if type(length) ~= 'number' or length ~= 0 and length ~= tonumber(ARGV[3]) then
    damaged = damaged + 1
  elseif length ~= 0 then
    value = redis.call('GET', KEYS[i])
    known = true
    if string.sub(value, 1, string.len(ARGV[i + 3])) ~= ARGV[i + 3] or ARGV[i + 3] == '' then found = true end
  end
  values[i - 1] = value
end
if found then return {ms, 0, damaged, values, 0} end
local left = redis.call('PTTL', KEYS[1])
if left >= 0 and left <= tonumber(ARGV[2]) then return {ms, 2, damaged, values, 0} end
if KEYS[named + 2] and not known then
  local us, cost, most = now[1] * 1000000 + now[2], tonumber(ARGV[#ARGV - 1]), tonumber(ARGV[#ARGV])
  local spent = tonumber(redis.pcall('GET', KEYS[named + 2])) or 0
  if spent < us or spent > us + most then spent = us end
  spent = spent + cost
  if spent > us + most then return {ms, 3, damaged, values, math.ceil((spent - us - most) / 1000)} end
  redis.call('SET', KEYS[named + 2], string.format('%.0f', spent), 'PX', math.max(1, math.ceil((spent - us) / 1000)))
end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return {ms, 1, damaged, values, 0}";

/// KEYS: the lease, the observation, then names of it that are to go. ARGV: whose lease, the value, its milliseconds, the channel, the news.
/// Only while the lease is the writer's own.
const STORE: &str = "\
if redis.pcall('GET', KEYS[1]) ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[2], ARGV[2], 'PX', ARGV[3])
redis.call('DEL', KEYS[1])
for i = 3, #KEYS do redis.call('DEL', KEYS[i]) end
redis.call('PUBLISH', ARGV[4], ARGV[5])
return 1";

/// KEYS: the lease. ARGV: whose, and its milliseconds from now on.
const RENEW: &str = "\
if redis.pcall('GET', KEYS[1]) ~= ARGV[1] then return 0 end
return redis.call('PEXPIRE', KEYS[1], ARGV[2])";

/// KEYS: the lease. ARGV: whose.
const RELEASE: &str = "\
if redis.pcall('GET', KEYS[1]) ~= ARGV[1] then return 0 end
return redis.call('DEL', KEYS[1])";

/// Makes connections to the store.
pub trait Connect: Send + Sync {
    /// One for questions, side by side.
    fn connect(&self) -> Boxed<'_, Result<MultiplexedConnection, RedisError>>;
    /// One that is told what is published.
    fn listen(&self) -> Boxed<'_, Result<PubSub, RedisError>>;
}

/// Connections to an address.
struct Remote {
    client: Client,
    timeout: Duration,
}

/// The store, as far as it can be reached.
pub(super) struct Store {
    connect: Box<dyn Connect>,
    timeout: Duration,
    /// The connection, and how many there have been: a fault ends the one that it came from.
    connection: Mutex<(u64, Option<MultiplexedConnection>)>,
    /// Held by the one that connects.
    connecting: tokio::sync::Mutex<()>,
    faults: Mutex<Faults>,
    pub(super) took: Histogram,
    pub(super) faulty: Counter,
}

/// No answer from the store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Unheard {
    /// It is left alone for now.
    LeftAlone,
    /// It failed.
    Fault,
}

/// What a look has found.
#[derive(Debug)]
pub(super) struct Looked {
    /// The store's time, in milliseconds.
    pub(super) at: u64,
    pub(super) state: State,
    /// How many values cannot be ours.
    pub(super) damaged: u64,
    /// In the order of their names; an empty one is none.
    pub(super) values: Vec<Vec<u8>>,
}

/// What a look comes to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum State {
    Found,
    Leased,
    Wait,
    /// Too many new credentials of the organization; another may come after this time.
    Withheld(Duration),
}

// === impl Remote ===

impl Remote {
    fn new(place: &Place, access: &TierAccess) -> Result<Self, RedisError> {
        let TierAccess { user, password, ca, .. } = access;
        let mut settings = RedisConnectionInfo::default().set_db(place.database).set_skip_set_lib_name();
        if let Some(user) = user {
            settings = settings.set_username(user);
        }
        if let Some(password) = password {
            settings = settings.set_password(password.expose());
        }
        let (host, port) = (place.host.clone(), place.port);
        let address = if place.tls {
            ConnectionAddr::TcpTls { host, port, insecure: false, tls_params: None }
        } else {
            ConnectionAddr::Tcp(host, port)
        };
        // Who listens for news says nothing: a connection that is lost without a word is found out so.
        let keepalive = TcpKeepalive::new().with_time(KEEPALIVE).with_interval(KEEPALIVE);
        let tcp = TcpSettings::default().set_nodelay(true).set_keepalive(keepalive);
        let info = address.into_connection_info()?.set_redis_settings(settings).set_tcp_settings(tcp);
        let client = match ca {
            Some(ca) if place.tls => {
                Client::build_with_tls(info, TlsCertificates { client_tls: None, root_cert: Some(ca.clone()) })?
            }
            Some(_) | None => Client::open(info)?,
        };
        Ok(Self { client, timeout: access.timeout })
    }
}

impl Connect for Remote {
    fn connect(&self) -> Boxed<'_, Result<MultiplexedConnection, RedisError>> {
        Box::pin(async {
            // Every question has a time of its own.
            let config = AsyncConnectionConfig::new().set_connection_timeout(Some(self.timeout)).set_response_timeout(None);
            self.client.get_multiplexed_async_connection_with_config(&config).await
        })
    }

    fn listen(&self) -> Boxed<'_, Result<PubSub, RedisError>> {
        Box::pin(self.client.get_async_pubsub())
    }
}

// === impl Store ===

impl Store {
    /// The one at an address.
    pub(super) fn at(place: &Place, access: &TierAccess) -> Result<Self, RedisError> {
        Ok(Self::new(Box::new(Remote::new(place, access)?), access.timeout))
    }

    /// The one that these connections lead to.
    pub(super) fn new(connect: Box<dyn Connect>, timeout: Duration) -> Self {
        Self {
            connect,
            timeout,
            connection: Mutex::default(),
            connecting: tokio::sync::Mutex::default(),
            faults: Mutex::default(),
            took: Histogram::default(),
            faulty: Counter::new(),
        }
    }

    /// Until when an answer to a question of now is waited for.
    pub(super) fn deadline(&self) -> Instant {
        Instant::now() + self.timeout
    }

    /// Whether it is not left alone.
    pub(super) fn is_in_use(&self) -> bool {
        unpoisoned(&self.faults).is_in_use()
    }

    /// Looks for values; without one that will do, takes the lease if nobody has it.
    pub(super) async fn look(
        &self,
        (lease, token): (&str, &str),
        (names, passed_over): (&[&str], &[Vec<u8>]),
        allowance: Option<&Allowance>,
        deadline: Instant,
    ) -> Result<Looked, Unheard> {
        let mut command = script(LOOK, 1 + names.len() + usize::from(allowance.is_some()));
        command.arg(lease).arg(names).arg(allowance.map(|allowance| allowance.name.as_str()));
        command.arg(token).arg(millis(LEASE)).arg(SEALED_BYTES).arg(names.len());
        for index in 0..names.len() {
            let beginning = passed_over.get(index).and_then(|value| value.get(..BEGINNING)).unwrap_or_default();
            command.arg(beginning);
        }
        if let Some(Allowance { per_minute, .. }) = allowance {
            let cost = MINUTE / per_minute.get();
            command.arg(micros(cost)).arg(micros(cost * per_minute.get()));
        }
        let reply: (u64, u64, u64, Vec<Vec<u8>>, u64) = self.ask(&command, deadline).await?;
        let (at, state, damaged, values, withheld_for) = reply;
        let state = match state {
            0 => State::Found,
            1 => State::Leased,
            3 => State::Withheld(Duration::from_millis(withheld_for)),
            _ => State::Wait,
        };
        Ok(Looked { at, state, damaged, values })
    }

    /// Stores while the lease is the writer's own, which ends with it.
    pub(super) async fn store(
        &self,
        (lease, token): (&str, &str),
        (name, value, keep): (&str, &[u8], Duration),
        others: &[&str],
        news: &[u8],
    ) -> Result<bool, Unheard> {
        let mut command = script(STORE, 2 + others.len());
        command.arg(lease).arg(name).arg(others).arg(token).arg(value).arg(millis(keep)).arg(CHANNEL).arg(news);
        self.ask::<u64>(&command, self.deadline()).await.map(|done| done == 1)
    }

    /// Whether the lease is still the asker's; it then lasts anew.
    pub(super) async fn renew(&self, (lease, token): (&str, &str)) -> Result<bool, Unheard> {
        let mut command = script(RENEW, 1);
        command.arg(lease).arg(token).arg(millis(LEASE));
        self.ask::<u64>(&command, self.deadline()).await.map(|done| done == 1)
    }

    /// Ends the lease, so that nobody waits for it.
    pub(super) async fn release(&self, (lease, token): (&str, &str)) -> Result<(), Unheard> {
        let mut command = script(RELEASE, 1);
        command.arg(lease).arg(token);
        self.ask::<u64>(&command, self.deadline()).await.map(drop)
    }

    /// Sets a value for a time, whoever has set it before; if the store hears of it.
    pub(super) async fn set(&self, name: &str, value: &[u8], keep: Duration) {
        let mut command = redis::cmd("SET");
        command.arg(name).arg(value).arg("PX").arg(millis(keep));
        self.ask(&command, self.deadline()).await.unwrap_or_default()
    }

    /// Ends values, if the store hears of it.
    pub(super) async fn delete(&self, names: &[&str]) {
        let mut command = redis::cmd("DEL");
        command.arg(names);
        self.ask(&command, self.deadline()).await.map_or((), |_: u64| ())
    }

    /// What is published from now on, until the connection ends.
    pub(super) async fn news(&self) -> Result<impl Stream<Item = Vec<u8>> + use<>, RedisError> {
        let connecting = async {
            let mut listener = self.connect.listen().await?;
            listener.subscribe(CHANNEL).await?;
            Ok::<_, RedisError>(listener)
        };
        let listener = timeout_at(self.deadline(), connecting).await.map_err(|_| timed_out())??;
        Ok(listener.into_on_message().map(|message| message.get_payload_bytes().to_vec()))
    }

    /// One question, with everything that it takes.
    async fn ask<T: FromRedisValue>(&self, command: &Cmd, deadline: Instant) -> Result<T, Unheard> {
        if !unpoisoned(&self.faults).may_ask(Instant::now()) {
            return Err(Unheard::LeftAlone);
        }
        let began = Instant::now();
        let mut used = None;
        let asked = in_time(deadline, async {
            let (number, mut connection) = self.connected().await?;
            used = Some(number);
            command.query_async::<T>(&mut connection).await
        });
        let answer = asked.await;
        self.took.observe(began.elapsed());
        match answer {
            Ok(answer) => {
                if unpoisoned(&self.faults).worked() == Some(Change::InUse) {
                    tracing::info!(event = "tier_in_use", "the shared tier answers again");
                }
                Ok(answer)
            }
            Err(fault) => {
                self.faulty.inc();
                let change = unpoisoned(&self.faults).failed(Instant::now());
                // It may be of no use any more; what a server says in its own words is.
                if !matches!(fault.kind(), ErrorKind::Server(_) | ErrorKind::Extension) {
                    self.disconnect(used);
                }
                if change == Some(Change::LeftAlone) {
                    let (kind, code) = (fault.category(), fault.code().unwrap_or_default());
                    tracing::warn!(
                        event = "tier_left_alone",
                        kind,
                        code,
                        "the shared tier failed several times in a row; until it answers again, this replica decides without it"
                    );
                }
                Err(Unheard::Fault)
            }
        }
    }

    /// The connection; made if there is none.
    async fn connected(&self) -> Result<(u64, MultiplexedConnection), RedisError> {
        if let Some(connected) = self.open_connection() {
            return Ok(connected);
        }
        let _connecting = self.connecting.lock().await;
        if let Some(connected) = self.open_connection() {
            return Ok(connected);
        }
        let made = self.connect.connect().await?;
        let mut slot = unpoisoned(&self.connection);
        slot.0 += 1;
        slot.1 = Some(made.clone());
        Ok((slot.0, made))
    }

    fn open_connection(&self) -> Option<(u64, MultiplexedConnection)> {
        let slot = unpoisoned(&self.connection);
        Some((slot.0, slot.1.clone()?))
    }

    fn disconnect(&self, used: Option<u64>) {
        let mut slot = unpoisoned(&self.connection);
        if used == Some(slot.0) {
            slot.1 = None;
        }
    }
}

fn script(text: &str, keys: usize) -> Cmd {
    // By its text and not by its hash: a server that has started anew knows no hash, and the text is shorter than a value.
    let mut command = redis::cmd("EVAL");
    command.arg(text).arg(keys);
    command
}

fn micros(length: Duration) -> u64 {
    u64::try_from(length.as_micros()).unwrap_or(u64::MAX)
}

fn millis(length: Duration) -> u64 {
    u64::try_from(length.as_millis()).unwrap_or(u64::MAX)
}

/// Every change to what is behind these locks is whole, whatever panics.
fn unpoisoned<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

async fn in_time<T>(deadline: Instant, work: impl Future<Output = Result<T, RedisError>>) -> Result<T, RedisError> {
    timeout_at(deadline, work).await.unwrap_or_else(|_| Err(timed_out()))
}

fn timed_out() -> RedisError {
    std::io::Error::from(std::io::ErrorKind::TimedOut).into()
}
