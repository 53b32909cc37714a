//! The shared tier: observations that replicas of equal trust share, in Redis or Valkey. A replica looks there when its own cache has no fresh
//! observation, before it probes.
//!
//! The tier saves probes and decides nothing. After a fault the replica probes at once, as if there were no tier. After a few faults in a row it
//! sends nothing to the store for a time. All stored times are the store's own. A lease lets one replica probe for all. It saves probes, and no
//! result depends on it. So one server is enough, and a lost value only costs another probe.

mod address;
mod background;
mod faults;
mod identity;
mod keys;
mod record;
mod remote;
mod replies;
mod store;

use std::{
    num::NonZeroU32,
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, SystemTime},
};

use futures_util::StreamExt;
use rand::{Rng, SeedableRng, rngs::StdRng};
use serde::{Deserialize, Serialize};
use tokio::time::{Instant, sleep, sleep_until};

use self::{
    address::{SENTINEL_PORT, STORE_PORT, StoreAddress},
    background::Background,
    keys::{Allowance, Name, Names, Notice, Starts},
    record::BreakerRecord,
    remote::Remote,
    store::{LookupState, Question, Store, StoreError, StoreLookup},
};
pub use self::{
    faults::StoreFault,
    identity::{ClientIdentity, IdentityFault},
    keys::TierKeys,
    remote::{Commands, Connect, Listening},
};
pub(crate) use self::{
    keys::{CredentialIdentity, Model, ObservationId},
    record::ObservationRecord,
};
use crate::{
    core::classify::Finding,
    domain::{duration, problem::Review, secret::Secret},
    liveness::{
        breaker::{BreakerChange, Opened},
        new_keys::KeyLimit,
        provider_limits::StartLimit,
    },
    telemetry::metrics::{Collect, Counter, Page},
};

/// How often a lease is renewed. Two renewals in a row may get lost.
const RENEWAL: Duration = Duration::from_millis(300);
/// The longest that a lease is renewed, and that a lookup waits for one. It is longer than any probe with its wait in the queue.
const MAX_LEASE_TIME: Duration = Duration::from_secs(30);
/// The random pause between two lookups while another replica probes: from a tenth of this to all of it.
const PAUSE: Duration = Duration::from_millis(200);
/// Later the pause grows to this part of the time waited so far, so that many waiting replicas do not keep the store busy.
const PART_OF_WAIT: u32 = 4;
/// The upper limit of the pause, so that the end of a lease is noticed soon.
const MAX_PAUSE: Duration = Duration::from_secs(1);
/// How many lookups may find only unsuitable values before this replica probes itself. A newer value may still be too old for this caller.
const MAX_UNSUITABLE: u32 = 3;
/// The longest pause before the listener for refusals connects again.
const RECONNECT: Duration = Duration::from_secs(5);
/// How many results may be on their way to the store. There are more only while the store is slow. Results over the
/// limit are dropped, and cost another replica a probe.
const MAX_STORING: usize = 1024;
/// The most addresses of a list. All are tried at once.
const MAX_ADDRESSES: usize = 16;
/// The bounds of `timeout`. A remote store cannot answer in less, and no caller should wait longer for one.
const TIMEOUTS: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(2));

/// The settings of the shared tier. Without an address, Sentinels or a cluster there is none.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct TierSettings {
    /// `rediss://HOST:PORT`, or `redis://` on loopback.
    pub address: Option<String>,
    /// The Sentinels that name the store's address, in place of it.
    pub sentinel: SentinelSettings,
    /// The cluster that the store is, in place of an address.
    pub cluster: ClusterSettings,
    /// The user of the store's access list. If not set, the store's default user.
    pub user: Option<String>,
    /// The file with the user's password.
    pub password_file: Option<PathBuf>,
    /// A PEM file with the certificate authorities to trust, instead of the system's.
    pub ca_file: Option<PathBuf>,
    /// A PEM file with the certificate of this replica, for a store that asks for one.
    pub client_certificate_file: Option<PathBuf>,
    /// The PEM file with that certificate's private key.
    pub client_key_file: Option<PathBuf>,
    /// The file with the tier keys.
    pub key_file: Option<PathBuf>,
    /// The longest that one command to the store may take.
    #[serde(with = "duration")]
    pub timeout: Duration,
}

/// The Sentinels that name the primary of several servers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(default)]
pub struct SentinelSettings {
    /// The name that they know the primary by.
    pub service: Option<String>,
    /// Their addresses, as in `address`.
    pub addresses: Vec<String>,
    /// The user of their access list. If not set, their default user.
    pub user: Option<String>,
    /// The file with that user's password.
    pub password_file: Option<PathBuf>,
}

/// A cluster, one node of which has all values.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(default)]
pub struct ClusterSettings {
    /// The addresses of some of its nodes, as in `address`. They name the node that has the values.
    pub addresses: Vec<String>,
}

/// The settings, with the contents of the files.
#[derive(Debug)]
pub struct TierAccess {
    /// Where the store is.
    pub servers: TierServers,
    /// The longest that one command to the store may take.
    pub timeout: Duration,
    /// The user of the store's access list.
    pub user: Option<String>,
    /// The user's password.
    pub password: Option<Secret>,
    /// The certificate authorities to trust, in PEM.
    pub ca: Option<Vec<u8>>,
    /// This replica's certificate.
    pub identity: Option<ClientIdentity>,
    /// The keys for names and encryption.
    pub keys: TierKeys,
}

/// Where the store is.
#[derive(Debug)]
pub enum TierServers {
    /// At this address.
    Address(String),
    /// Where Sentinels say.
    Sentinels {
        /// Their addresses.
        addresses: Vec<String>,
        /// The name that they know the primary by.
        service: String,
        /// The user of their access list.
        user: Option<String>,
        /// That user's password.
        password: Option<Secret>,
    },
    /// In the cluster of these nodes.
    Nodes(Vec<String>),
}

/// The tier could not be set up.
#[derive(Debug, thiserror::Error)]
#[error("the shared tier could not be set up: {0}")]
pub struct TierSetupError(String);

/// The shared tier.
pub struct Tier {
    store: Store,
    keys: TierKeys,
    counts: LookupCounts,
    background: Background,
    leases_lost: Counter,
    damaged: Counter,
    /// For the random pauses.
    random: Mutex<StdRng>,
}

/// Counts of lookups, by result.
#[derive(Debug, Default)]
struct LookupCounts {
    /// A suitable observation was stored, or another replica stored one meanwhile.
    hit: Counter,
    /// Another replica's breaker is open.
    breaker: Counter,
    /// This replica got the lease.
    lease: Counter,
    /// A limit of new credentials is reached.
    new_keys: Counter,
    /// The provider's calls per second are used up.
    per_second: Counter,
    /// Another replica held the lease too long, or every value was unsuitable.
    gave_up: Counter,
    /// The store failed.
    fault: Counter,
    /// Nothing was sent, since the store failed several times in a row.
    left_alone: Counter,
}

/// An observation from the tier, with its times converted to this replica's clocks.
#[derive(Debug, Clone)]
pub(crate) struct SharedObservation {
    pub(crate) finding: Finding,
    pub(crate) at: Instant,
    pub(crate) wall: SystemTime,
    pub(crate) fresh_for: Duration,
    pub(crate) earlier_valid: Option<(Finding, Instant, SystemTime)>,
    pub(crate) refused_at: Option<Instant>,
    /// The observation is about one model: it is stored under the second name.
    pub(crate) about_model: bool,
}

/// The result of a lookup.
pub(crate) enum LookupResult<T> {
    /// A suitable observation.
    Found(T),
    /// Another replica's breaker is open.
    BreakerOpen(Opened),
    /// This limit of new credentials is reached, over all replicas. The next one may come after this time.
    Withheld(KeyLimit, Duration),
    /// The provider's calls per second are used up, over all replicas. This credential's start comes at this time.
    Later(Instant),
    /// This replica must probe. With the lease, it probes for all replicas.
    Probe(Option<Lease>),
}

/// What counts over all replicas when a credential is probed.
#[derive(Debug, Default)]
pub(crate) struct SharedCounts {
    /// The limits that a credential counts for that no replica knows.
    allowances: Vec<Allowance>,
    /// The limit of starts at its provider.
    starts: Option<Starts>,
}

/// The lease of a credential: its holder probes, and stores the result.
pub(crate) struct Lease {
    tier: Arc<Tier>,
    /// When the probe may start, and the limit that the start counts for. `None` if starts are not counted over all replicas.
    start: Option<(Instant, Starts)>,
    names: Vec<Names>,
    token: String,
    /// The store's time, in milliseconds, and this replica's when it got that time.
    clock: (u64, Instant),
}

/// A credential's entry in the tier: the names of its values.
pub(crate) struct TierEntry {
    tier: Arc<Tier>,
    names: Vec<Names>,
}

// === impl TierSettings ===

impl Default for TierSettings {
    fn default() -> Self {
        let timeout = Duration::from_millis(350);
        Self {
            address: None,
            sentinel: SentinelSettings::default(),
            cluster: ClusterSettings::default(),
            user: None,
            password_file: None,
            ca_file: None,
            client_certificate_file: None,
            client_key_file: None,
            key_file: None,
            timeout,
        }
    }
}

impl TierSettings {
    /// The setting that says where the store is. `None` without a tier.
    pub fn place(&self) -> Option<&'static str> {
        self.places().first().copied()
    }

    fn places(&self) -> Vec<&'static str> {
        let sentinel = !self.sentinel.addresses.is_empty() || self.sentinel.service.is_some();
        let cluster = !self.cluster.addresses.is_empty();
        let set = [("tier.address", self.address.is_some()), ("tier.sentinel", sentinel), ("tier.cluster", cluster)];
        set.into_iter().filter(|(_, is_set)| *is_set).map(|(place, _)| place).collect()
    }

    /// Where the store is, with the password for the Sentinels. `None` without a tier.
    pub fn servers(&self, sentinel_password: Option<Secret>) -> Option<TierServers> {
        if let Some(address) = &self.address {
            return Some(TierServers::Address(address.clone()));
        }
        if !self.cluster.addresses.is_empty() {
            return Some(TierServers::Nodes(self.cluster.addresses.clone()));
        }
        let SentinelSettings { service, addresses, user, .. } = self.sentinel.clone();
        Some(TierServers::Sentinels { addresses, service: service?, user, password: sentinel_password })
    }

    /// Reports every wrong setting. `workspaces`: the setting that lists callers that are workspaces, if there is one.
    pub fn review(&self, workspaces: Option<&str>, review: &mut Review<'_>) {
        let Self { user, password_file, ca_file, client_certificate_file, client_key_file, key_file, timeout, .. } = self;
        review.length("timeout", *timeout, TIMEOUTS.0, TIMEOUTS.1);
        let of_tls =
            [("ca_file", ca_file), ("client_certificate_file", client_certificate_file), ("client_key_file", client_key_file)];
        let places = self.places();
        let Some(place) = places.first() else {
            let sentinel_file = ("sentinel.password_file", &self.sentinel.password_file);
            let files = [("password_file", password_file), ("key_file", key_file), sentinel_file].into_iter().chain(of_tls);
            let users = [("user", user), ("sentinel.user", &self.sentinel.user)];
            let users = users.into_iter().filter(|(_, user)| user.is_some()).map(|(key, _)| key);
            for key in files.filter(|(_, file)| file.is_some()).map(|(key, _)| key).chain(users) {
                let message =
                    "is set, and none of tier.address, tier.sentinel and tier.cluster: without one there is no shared tier";
                review.error(key, message);
            }
            return;
        };
        for other in places.iter().skip(1) {
            let message = format!("is set beside {place}: the store is at one place; leave one of them out");
            review.error(other.trim_start_matches("tier."), message);
        }
        let mut addresses = self.review_address(review);
        addresses.extend(self.sentinel.review(review));
        addresses.extend(review_list("cluster.addresses", &self.cluster.addresses, STORE_PORT, review));
        if key_file.is_none() {
            review.error("key_file", format!("is required with {place}; make one with `openssl rand -hex 32`"));
        }
        if user.is_some() && password_file.is_none() {
            review.error("password_file", "is required with tier.user");
        }
        for (key, user) in [("user", user), ("sentinel.user", &self.sentinel.user)] {
            if user.as_deref().is_some_and(str::is_empty) {
                review.error(key, "is empty: leave it out for the default user, or write a user's name");
            }
        }
        for (key, file) in [("password_file", password_file), ("sentinel.password_file", &self.sentinel.password_file)] {
            if file.is_some() && file == key_file {
                review.error(key, "is the same file as tier.key_file: servers get the password, and must never get the key");
            }
        }
        if addresses.iter().any(|address| !address.tls) {
            for (key, _) in of_tls.into_iter().filter(|(_, file)| file.is_some()) {
                review.error(key, "is for rediss://; redis:// has no certificates");
            }
        }
        match (client_certificate_file, client_key_file) {
            (Some(_), None) => review.error("client_key_file", "is required with tier.client_certificate_file"),
            (None, Some(_)) => review.error("client_certificate_file", "is required with tier.client_key_file"),
            (Some(_), Some(_)) | (None, None) => {}
        }
        if let Some(workspaces) = workspaces {
            let message = format!(
                "is set beside a `workspace` caller ({workspaces}): the tier is for replicas of equal trust, and a workspace's own gate may not \
                 hold its key; leave one of them out"
            );
            review.error(place.trim_start_matches("tier."), message);
        }
    }

    fn review_address(&self, review: &mut Review<'_>) -> Vec<StoreAddress> {
        let parsed = self.address.as_deref().map(|address| StoreAddress::parse(address, STORE_PORT));
        parsed.and_then(|parsed| parsed.inspect_err(|message| review.error("address", message)).ok()).into_iter().collect()
    }
}

// === impl SentinelSettings ===

impl SentinelSettings {
    /// Reports every wrong setting, and returns the addresses that can be used.
    fn review(&self, review: &mut Review<'_>) -> Vec<StoreAddress> {
        let Self { service, addresses, user, password_file } = self;
        if service.is_none() && !addresses.is_empty() {
            review.error("sentinel.service", "is required with tier.sentinel.addresses: NAME of `sentinel monitor NAME`");
        }
        if service.is_some() && addresses.is_empty() {
            review.error("sentinel.addresses", "is required with tier.sentinel.service");
        }
        if service.is_none() && addresses.is_empty() {
            for (key, is_set) in [("sentinel.user", user.is_some()), ("sentinel.password_file", password_file.is_some())] {
                if is_set {
                    review.error(key, "is set without tier.sentinel.addresses");
                }
            }
        }
        if user.is_some() && password_file.is_none() {
            review.error("sentinel.password_file", "is required with tier.sentinel.user");
        }
        review_list("sentinel.addresses", addresses, SENTINEL_PORT, review)
    }
}

/// Reports every address that cannot be used, and returns the others.
fn review_list(key: &str, list: &[String], default_port: u16, review: &mut Review<'_>) -> Vec<StoreAddress> {
    if list.len() > MAX_ADDRESSES {
        review.error(key, format!("holds {} addresses; {MAX_ADDRESSES} are enough", list.len()));
    }
    let mut addresses: Vec<StoreAddress> = Vec::new();
    for (index, text) in list.iter().enumerate() {
        match StoreAddress::parse(text, default_port) {
            Err(message) => review.error(format!("{key}[{index}]"), message),
            Ok(StoreAddress { database: 1.., .. }) => {
                review.error(format!("{key}[{index}]"), "selects a database; here it is 0, so leave the /N out");
            }
            Ok(address) => addresses.push(address),
        }
    }
    if addresses.iter().any(|address| address.tls) && addresses.iter().any(|address| !address.tls) {
        review.error(key, "mixes rediss:// and redis://; the store is spoken to in the same way, so use one of them");
    }
    addresses
}

// === impl Tier ===

impl Tier {
    /// Makes the tier. It does not connect yet.
    pub fn new(access: TierAccess) -> Result<Arc<Self>, TierSetupError> {
        let remote = Remote::new(&access).map_err(TierSetupError)?;
        let keys = if matches!(access.servers, TierServers::Nodes(_)) { access.keys.in_one_slot() } else { access.keys };
        Ok(Self::over(Box::new(remote), access.timeout, keys, rand::random()))
    }

    /// Makes a tier over these connections. The seed determines its pauses.
    pub fn over(connect: Box<dyn Connect>, timeout: Duration, keys: TierKeys, seed: u64) -> Arc<Self> {
        let store = Store::new(connect, timeout);
        let (counts, leases_lost, damaged) = (LookupCounts::default(), Counter::new(), Counter::new());
        let (background, random) = (Background::new(MAX_STORING), Mutex::new(StdRng::seed_from_u64(seed)));
        Arc::new(Self { store, keys, counts, background, leases_lost, damaged, random })
    }

    /// At the end of the process: waits until `by` for results that are on their way to the store. Returns how many were dropped.
    pub async fn finish(&self, by: Instant) -> u64 {
        self.background.finish(by).await
    }

    /// The entry of a credential.
    pub(crate) fn entry(self: &Arc<Self>, credential: &CredentialIdentity<'_>) -> TierEntry {
        TierEntry { tier: Arc::clone(self), names: self.keys.names(credential) }
    }

    /// Counts a new credential of this organization or platform, over all replicas.
    pub(crate) fn count_key(&self, counts: &mut SharedCounts, limit: KeyLimit, of: &str, per_minute: NonZeroU32) {
        counts.allowances.extend(self.keys.allowance(limit, of, per_minute));
    }

    /// Counts a start at this provider, over all replicas.
    pub(crate) fn count_start(&self, counts: &mut SharedCounts, provider: &str, limit: StartLimit) {
        counts.starts = self.keys.starts(provider, limit);
    }

    /// Reports refusals that other replicas saw, for ever. A missed one only lets an older observation expire by its age.
    pub(crate) async fn listen(self: Arc<Self>, refused: impl Fn(ObservationId) + Send + Sync) {
        loop {
            // A random pause, so that replicas do not all reconnect at once. It is short if the last connection served.
            let mut pause = (RECONNECT / 2, RECONNECT);
            if let Some(notices) = self.store.subscribe().await {
                pause = (PAUSE / 10, MAX_PAUSE);
                let mut notices = std::pin::pin!(notices);
                while let Some(message) = notices.next().await {
                    match self.keys.open_notice(&message) {
                        Some(Notice { id, refused: true }) => refused(id),
                        Some(_) => {}
                        None => self.damaged.inc(),
                    }
                }
            }
            let pause = self.between(pause.0, pause.1);
            sleep(pause).await;
        }
    }

    /// Opens and parses a value. A value that this service did not write is counted.
    fn read<T>(&self, key: usize, name: &Name, value: &[u8], parse: impl Fn(&[u8]) -> Option<T>) -> Option<T> {
        let read = self.keys.open(key, name, value).and_then(|plain| parse(&plain));
        if read.is_none() {
            self.damaged.inc();
        }
        read
    }

    fn between(&self, least: Duration, most: Duration) -> Duration {
        self.random.lock().unwrap_or_else(PoisonError::into_inner).random_range(least..=most)
    }
}

impl Collect for Tier {
    fn collect(&self, page: &mut Page) {
        let LookupCounts { hit, breaker, lease, new_keys, per_second, gave_up, fault, left_alone } = &self.counts;
        let mut counts = page.counter("byokgate_tier_lookups", "Lookups in the shared tier");
        for (result, count) in [
            ("hit", hit),
            ("breaker", breaker),
            ("lease", lease),
            ("new_keys", new_keys),
            ("per_second", per_second),
            ("gave_up", gave_up),
            ("fault", fault),
            ("left_alone", left_alone),
        ] {
            counts.add(&[("result", result)], count);
        }
        if let Some(took) = self.store.took.value() {
            page.histogram("byokgate_tier_duration_seconds", "One request to the shared tier").add(&[], took);
        }
        page.counter("byokgate_tier_faults", "Requests to the shared tier that failed").add(&[], &self.store.failures);
        page.gauge("byokgate_tier_in_use", "1 while the shared tier is in use, 0 while it is suspended")
            .add(&[], u64::from(self.store.is_in_use()));
        page.gauge("byokgate_tier_listening", "0 since the refusals that other replicas see cannot be heard")
            .add(&[], u64::from(self.store.is_listening()));
        page.gauge("byokgate_tier_storing", "0 since the store refuses this replica the right to store or to announce results")
            .add(&[], u64::from(self.store.is_storing()));
        page.counter(
            "byokgate_tier_stores_dropped",
            "Results that were not sent to the shared tier, since too many were already waiting",
        )
        .add(&[], &self.background.dropped);
        page.counter("byokgate_tier_leases_lost", "Results that were not stored, since the lease had ended")
            .add(&[], &self.leases_lost);
        page.counter("byokgate_tier_damaged", "Values and messages of the shared tier that are not ours").add(&[], &self.damaged);
    }
}

// === impl TierEntry ===

impl TierEntry {
    /// The ids of the observations, as notices carry them, and whether each is about one model.
    pub(crate) fn ids(&self) -> impl Iterator<Item = (ObservationId, bool)> {
        self.names.iter().flat_map(|names| names.observations.iter().enumerate().map(|(index, name)| (name.id, index > 0)))
    }

    /// Looks for an observation that `take` accepts, or else for another replica's open breaker, which counts for `longest` at most. While
    /// another replica holds the lease, it waits for the result. The request that gives the lease also counts.
    pub(crate) async fn look_up<T>(
        self,
        longest: Duration,
        shared_counts: SharedCounts,
        mut take: impl FnMut(Vec<SharedObservation>) -> Option<T>,
    ) -> LookupResult<T> {
        let Self { tier, names } = self;
        let Some((lease, turn)) = names.first().map(|names| (names.lease.clone(), names.turn.clone())) else {
            return LookupResult::Probe(None);
        };
        let SharedCounts { allowances, starts } = shared_counts;
        let observations: Vec<(usize, bool, &Name)> = names
            .iter()
            .enumerate()
            .flat_map(|(key, names)| names.observations.iter().enumerate().map(move |(index, name)| (key, index > 0, name)))
            .collect();
        let breakers = names.iter().map(|names| &names.breaker).enumerate();
        let texts: Vec<&str> = observations
            .iter()
            .map(|(_, _, name)| *name)
            .chain(breakers.clone().map(|(_, name)| name))
            .map(|name| name.text.as_str())
            .collect();
        let token = token();
        let mut unsuitable_values: Vec<Vec<u8>> = Vec::new();
        let mut unsuitable = 0;
        let counts = &tier.counts;
        // The lookups before the first pause share one timeout, so that no caller waits longer for a slow store.
        let (began, first) = (Instant::now(), tier.store.deadline());
        let mut deadline = first;
        loop {
            let sent_at = Instant::now();
            let question = Question {
                lease: (&lease, &token),
                names: &texts,
                unsuitable_values: &unsuitable_values,
                allowances: &allowances,
                starts: starts.as_ref().map(|starts| (starts, turn.as_str())),
            };
            let lookup = match tier.store.look_up(&question, deadline).await {
                Ok(lookup) => lookup,
                Err(error) => {
                    let count = if error == StoreError::LeftAlone { &counts.left_alone } else { &counts.fault };
                    count.inc();
                    return LookupResult::Probe(None);
                }
            };
            let StoreLookup { at, state, damaged, values } = lookup;
            tier.damaged.inc_by(damaged);
            match state {
                LookupState::Found => {
                    let found = observations.iter().zip(&values).filter(|(_, value)| !value.is_empty());
                    let shared = found.filter_map(|((key, about_model, name), value)| {
                        let record = tier.read(*key, name, value, ObservationRecord::from_bytes);
                        to_local_time(record?, *about_model, at, sent_at)
                    });
                    if let Some(taken) = take(shared.collect()) {
                        counts.hit.inc();
                        return LookupResult::Found(taken);
                    }
                    let of_breakers = values.iter().skip(observations.len());
                    let mut open = breakers.clone().zip(of_breakers).filter(|(_, value)| !value.is_empty());
                    if let Some(opened) = open.find_map(|((key, name), value)| {
                        let breaker = tier.read(key, name, value, BreakerRecord::from_bytes);
                        breaker_to_local_time(breaker?, longest, at, sent_at)
                    }) {
                        counts.breaker.inc();
                        return LookupResult::BreakerOpen(opened);
                    }
                    // The next lookup passes over these values. It finds newer ones, gets the lease, or waits. A store that keeps returning
                    // unsuitable values counts as no store.
                    unsuitable += 1;
                    if unsuitable > MAX_UNSUITABLE {
                        counts.gave_up.inc();
                        return LookupResult::Probe(None);
                    }
                    unsuitable_values = values;
                }
                LookupState::Leased(wait) => {
                    counts.lease.inc();
                    let now = Instant::now();
                    // Counted from when the reply arrived, so that it is never earlier than reserved.
                    let start = starts.map(|starts| (now + wait, starts));
                    return LookupResult::Probe(Some(Lease { tier: Arc::clone(&tier), start, names, token, clock: (at, now) }));
                }
                LookupState::Withheld(limit, wait) => {
                    counts.new_keys.inc();
                    return LookupResult::Withheld(limit, wait);
                }
                LookupState::Later(wait) => {
                    counts.per_second.inc();
                    return LookupResult::Later(Instant::now() + wait);
                }
                LookupState::Wait => {
                    let waited = began.elapsed();
                    if waited >= MAX_LEASE_TIME {
                        counts.gave_up.inc();
                        return LookupResult::Probe(None);
                    }
                    let most = (waited / PART_OF_WAIT).clamp(PAUSE, MAX_PAUSE);
                    let pause = tier.between(most / 10, most);
                    sleep(pause).await;
                    deadline = tier.store.deadline();
                }
            }
        }
    }
}

/// Converts a record to this replica's clocks. `None` if it is of the future, as after a step of the store's clock: its age is unknown.
fn to_local_time(record: ObservationRecord, about_model: bool, store_time: u64, sent_at: Instant) -> Option<SharedObservation> {
    let ObservationRecord { finding, at, fresh_for, earlier_valid, refused_at } = record;
    let (now, wall) = (Instant::now(), SystemTime::now());
    // Counted from when the command was sent, so that it is never taken for younger than it is.
    let since = now - sent_at;
    let ours = |at: u64| {
        let age = Duration::from_millis(store_time.checked_sub(at)?) + since;
        Some((now.checked_sub(age)?, wall.checked_sub(age)?))
    };
    let (at, wall) = ours(at)?;
    let earlier_valid = earlier_valid.and_then(|(finding, at)| ours(at).map(|(at, wall)| (finding, at, wall)));
    // A refusal of the future still counts.
    let refused_at = refused_at.map(|refused_at| ours(refused_at).map_or(now, |(at, _)| at));
    Some(SharedObservation { finding, at, wall, fresh_for, earlier_valid, refused_at, about_model })
}

/// Converts another replica's open breaker to this replica's clocks. `None` if its time is over, or if it is of the future.
fn breaker_to_local_time(breaker: BreakerRecord, longest: Duration, store_time: u64, sent_at: Instant) -> Option<Opened> {
    let BreakerRecord { finding, at, until } = breaker;
    let left = until.min(at.saturating_add(millis(longest))).checked_sub(store_time).filter(|left| *left > 0)?;
    let age = Duration::from_millis(store_time.checked_sub(at)?);
    // Counted from when the command was sent, so that it is never open for longer than it is.
    let (at, until) = (sent_at.checked_sub(age)?, sent_at.checked_add(Duration::from_millis(left))?);
    // Its time may have ended while the reply was on its way.
    if until <= Instant::now() {
        return None;
    }
    Some(Opened { finding: Arc::new(finding), at, wall: SystemTime::now().checked_sub(at.elapsed())?, until, shared: true })
}

fn millis(length: Duration) -> u64 {
    u64::try_from(length.as_millis()).unwrap_or(u64::MAX)
}

fn token() -> String {
    let token: u128 = rand::random();
    format!("{token:032x}")
}

// === impl Lease ===

impl Lease {
    /// When the probe may start, if starts are counted over all replicas.
    pub(crate) fn start(&self) -> Option<Instant> {
        self.start.as_ref().map(|(start, _)| *start)
    }

    /// Does the work, and renews the lease meanwhile, so that other replicas wait for the result.
    pub(crate) async fn run_renewed<T>(&self, work: impl Future<Output = T>) -> T {
        tokio::select! {
            biased;
            done = work => done,
            never = self.renew() => match never {},
        }
    }

    async fn renew(&self) -> std::convert::Infallible {
        let ends = Instant::now() + MAX_LEASE_TIME;
        let mut next = Instant::now() + RENEWAL;
        while next < ends {
            sleep_until(next).await;
            next += RENEWAL;
            match self.tier.store.renew(self.lease_and_token()).await {
                Ok(true) | Err(StoreError::Fault) => {}
                // The lease is lost, or the store fails. Storing the result notices and counts that.
                Ok(false) | Err(StoreError::LeftAlone) => break,
            }
        }
        std::future::pending().await
    }

    /// Converts a moment to the store's time, in milliseconds. It is rounded to the past.
    pub(crate) fn time_of(&self, at: Instant) -> u64 {
        let (store_time, when) = self.clock;
        match at.checked_duration_since(when) {
            Some(since) => store_time.saturating_add(millis(since)),
            // One millisecond more, since rounding must not make it younger.
            None => store_time.saturating_sub(millis(when - at).saturating_add(1)),
        }
    }

    /// Stores in the background that this replica's breaker opened or closed. No lease is needed: it only saves probes, and a lost message has
    /// no effect after the cool-down.
    pub(crate) fn share_breaker(&self, change: &BreakerChange) {
        let (tier, names) = (Arc::clone(&self.tier), self.names.clone());
        let breaker = match change {
            BreakerChange::Closed => None,
            BreakerChange::Opened(Opened { finding, at, until, .. }) => {
                let (finding, keep) = ((**finding).clone(), until.saturating_duration_since(*at));
                Some((BreakerRecord { finding, at: self.time_of(*at), until: self.time_of(*until) }, keep))
            }
        };
        self.tier.background.run(async move {
            let Some((breaker, keep)) = breaker else {
                let names: Vec<&str> = names.iter().map(|names| names.breaker.text.as_str()).collect();
                return tier.store.delete(&names).await;
            };
            if let Some(name) = names.first().map(|names| &names.breaker)
                && let Some(value) = breaker.to_bytes().and_then(|plain| tier.keys.seal(name, &plain))
            {
                tier.store.set(&name.text, &value, keep).await;
            }
        });
    }

    /// Stores the result in the background, if this replica still holds the lease. A result that is not shared only releases the lease, and a probe
    /// that did not start gives its start back.
    pub(crate) fn store_in_background(self, record: Option<ObservationRecord>, keep: Duration, started: bool) {
        let tier = Arc::clone(&self.tier);
        tier.background.run(self.store(record, keep, started));
    }

    async fn store(self, record: Option<ObservationRecord>, keep: Duration, started: bool) {
        let Self { tier, start, names, token, .. } = &self;
        let sealed = record.as_ref().and_then(|record| {
            let index = usize::from(record.finding.about_model);
            let first = names.first()?;
            // If every observation is about one model, there is no second name.
            let (index, name) = match first.observations.get(index) {
                Some(name) => (index, name),
                None => (0, first.observations.first()?),
            };
            let value = tier.keys.seal(name, &record.to_bytes()?)?;
            let notice = tier.keys.seal_notice(Notice { id: name.id, refused: record.refused_at == Some(record.at) })?;
            // The observation under the old key is removed, so that it cannot contradict this one.
            let others: Vec<&str> =
                names.iter().skip(1).filter_map(|names| names.observations.get(index)).map(|name| name.text.as_str()).collect();
            Some((name, value, notice, others))
        });
        let stored = match &sealed {
            None => {
                let unused = start.as_ref().filter(|_| !started).map(|(_, starts)| starts);
                tier.store.release(self.lease_and_token(), unused).await.map(|()| true)
            }
            Some((name, value, notice, others)) => {
                tier.store.store((self.lease_and_token().0, token), (&name.text, value, keep), others, notice).await
            }
        };
        if stored == Ok(false) {
            tier.leases_lost.inc();
        }
    }

    fn lease_and_token(&self) -> (&str, &str) {
        (self.names.first().map_or("", |names| names.lease.as_str()), &self.token)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::verdict::Verdict;

    #[tokio::test(start_paused = true)]
    async fn a_breaker_whose_time_ended_on_its_way_is_not_open() {
        let record = || BreakerRecord { finding: Finding::bare(Verdict::Timeout), at: 1_000, until: 5_000 };
        let (longest, sent_at) = (Duration::from_secs(60), Instant::now());
        // It has two milliseconds left when the store reads it.
        let opened = |store_time| breaker_to_local_time(record(), longest, store_time, sent_at);
        tokio::time::advance(Duration::from_millis(1)).await;
        assert!(opened(4_998).is_some_and(|opened| opened.until == sent_at + Duration::from_millis(2)));
        tokio::time::advance(Duration::from_millis(1)).await;
        assert!(opened(4_998).is_none() && opened(4_997).is_some() && opened(5_000).is_none());
        assert!(opened(999).is_none(), "of the future");
    }
}
