//! The cache of observations. A credential is stored as a keyed hash, each verdict has its own maximum age, and one probe at a time runs per
//! key. A probe runs detached from its callers.
//!
//! moka stores and bounds the entries. This module decides freshness itself, with tokio's clock, for two reasons: the age that counts depends
//! on the caller (`max_liveness_age`, the hard maximum at PROVISION), and tests can move that clock instead of waiting.

use std::{
    hash::{BuildHasherDefault, Hasher},
    sync::Arc,
    time::{Duration, SystemTime},
};

use arc_swap::ArcSwap;
use moka::notification::RemovalCause;
use rand::Rng;
use serde::{Deserialize, Serialize};
use tokio::time::Instant;
use tracing::Instrument;

use crate::{
    core::{
        classify::Finding,
        credential::LivenessQuery,
        endpoint::{Preference, Target},
        engine::{Boxed, EarlierValid, LivenessSource, Observed, ProbeRequest, ProbeStarted, Prober},
    },
    domain::{
        duration,
        problem::Review,
        secret::with_stack_wiped,
        verdict::{ServedFrom, Verdict, Withheld},
    },
    liveness::{
        breaker::{BreakerSettings, Breakers, Opened, Source},
        new_keys::{NewKeyLimits, NewKeys, OneTooMany, PER_ORGANIZATION},
        retry_schedule::spread,
        single_flight::{FlightEnd, Join, SingleFlight, Start, wait},
        tier::{
            Allowance, CredentialIdentity, Lease, LookupResult, Model, ObservationId, ObservationRecord, SharedObservation, Tier,
        },
    },
    telemetry::{
        metrics::{Collect, Counter, Page},
        traces::{self, FlightRole},
    },
};

/// The maximum age of a cached observation, per verdict.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Ages {
    /// VALID. A revoked key is noticed within this time.
    #[serde(with = "duration")]
    pub valid: Duration,
    /// VALID, if a probe costs the tenant money.
    #[serde(with = "duration")]
    pub valid_paid: Duration,
    /// INVALID and FORBIDDEN. A repaired key is noticed within this time.
    #[serde(with = "duration")]
    pub refused: Duration,
    /// TIMEOUT and UNREACHABLE.
    #[serde(with = "duration")]
    pub unanswered: Duration,
    /// PROVIDER_ERROR, UNEXPECTED_RESPONSE, QUOTA_EXHAUSTED, and RATE_LIMITED without a Retry-After.
    #[serde(with = "duration")]
    pub inconclusive: Duration,
    /// RATE_LIMITED: the lower bound of the provider's Retry-After.
    #[serde(with = "duration")]
    pub rate_limited_min: Duration,
    /// RATE_LIMITED: the upper bound of the provider's Retry-After.
    #[serde(with = "duration")]
    pub rate_limited_max: Duration,
    /// At PROVISION, an expired VALID still counts up to this age if the provider does not answer.
    #[serde(with = "duration")]
    pub hard_maximum: Duration,
    /// A smaller `max_liveness_age` of a caller is raised to this.
    #[serde(with = "duration")]
    pub floor: Duration,
    /// The same, if a probe costs the tenant money.
    #[serde(with = "duration")]
    pub floor_paid: Duration,
    /// Each age is shortened by a random share, up to this many percent, so that entries made together do not expire together. It is never
    /// lengthened: a configured age is a maximum.
    pub jitter_percent: u32,
}

impl Default for Ages {
    fn default() -> Self {
        Self {
            valid: Duration::from_secs(30),
            valid_paid: Duration::from_secs(300),
            refused: Duration::from_secs(10),
            unanswered: Duration::from_secs(3),
            inconclusive: Duration::from_secs(5),
            rate_limited_min: Duration::from_secs(1),
            rate_limited_max: Duration::from_secs(60),
            hard_maximum: Duration::from_secs(900),
            floor: Duration::from_secs(1),
            floor_paid: Duration::from_secs(60),
            jitter_percent: 20,
        }
    }
}

/// How many entries the cache holds.
const MAX_ENTRIES: u64 = 100_000;
/// How many probes may be in flight at a time, in total and for one provider. The second limit leaves room for the others when one hangs.
const MAX_FLIGHTS: usize = 4096;
const MAX_FLIGHTS_OF_ONE_PROVIDER: usize = 1024;
/// The longest credential of a usual length. Vendors' keys are under 200 bytes, and some JWTs are over 1 KiB.
const USUAL_KEY_BYTES: usize = 1024;
/// The time that a provider usually has. A decision that ends earlier says nothing about the provider.
const USUAL_BUDGET: Duration = Duration::from_secs(3);

/// The settings of the cache and of what protects the providers behind it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct CacheSettings {
    /// The maximum age of observations.
    pub ages: Ages,
    /// When a provider's circuit breaker opens.
    pub breaker: BreakerSettings,
    /// How many new credentials may be probed.
    pub new_keys: NewKeyLimits,
}

/// A liveness source that caches what its prober finds.
pub struct Cache {
    prober: Arc<dyn Prober>,
    memory: Memory,
    flights: Arc<SingleFlight<Key, FlightResult>>,
    /// The last VALID finding, shared by all entries that equal it.
    last_valid: Arc<ArcSwap<Finding>>,
    breakers: Arc<Breakers>,
    new_keys: NewKeys,
    ages: Ages,
    lookups: Lookups,
    evicted: Arc<Counter>,
    /// The tier that replicas share, if one is configured.
    tier_link: Option<Arc<TierLink>>,
    /// The hash keys: one for credentials, one for a credential with one model. Each process makes new ones, so that a cache key in a memory
    /// image reveals nothing about a credential.
    hash_keys: [[u8; 32]; 2],
}

type Key = [u8; 32];
type Memory = moka::sync::Cache<Key, CacheEntry, BuildHasherDefault<PrehashedHasher>>;

/// A hasher that uses a cache key's first bytes as they are. The keys are keyed hashes already.
#[derive(Default)]
struct PrehashedHasher(u64);

impl Hasher for PrehashedHasher {
    fn write(&mut self, bytes: &[u8]) {
        for (at, byte) in bytes.iter().take(8).enumerate() {
            self.0 ^= u64::from(*byte) << (8 * at);
        }
    }

    /// Ignores the length prefix: all keys have the same length.
    fn write_usize(&mut self, _: usize) {}

    fn finish(&self) -> u64 {
        self.0
    }
}

/// Counts of lookups, by result.
#[derive(Debug, Default)]
struct Lookups {
    /// A fresh observation was cached.
    hit: Counter,
    /// The lookup started a probe.
    fill: Counter,
    /// The lookup waited for a probe that another call had started.
    wait: Counter,
    /// The circuit breaker was open, and its verdict was used.
    breaker: Counter,
    /// The limit of new credentials was reached.
    new_keys: Counter,
    /// The limit of probes in flight was reached.
    full: Counter,
}

/// What the cache holds under one key.
#[derive(Debug, Clone, Default)]
struct CacheEntry {
    latest: Option<Arc<TimedFinding>>,
    /// The last VALID. It is removed when the credential is refused.
    valid: Option<Arc<TimedFinding>>,
    refused_at: Option<Instant>,
    /// There are further entries, for this credential with one model.
    per_model: bool,
}

/// A finding, and when it was made.
#[derive(Debug)]
struct TimedFinding {
    finding: Arc<Finding>,
    at: Instant,
    wall: SystemTime,
    fresh_for: Duration,
    /// Another replica made it.
    shared: bool,
}

/// The shared tier, and the cache key for each of its ids that this replica has used.
struct TierLink {
    tier: Arc<Tier>,
    key_of: moka::sync::Cache<ObservationId, Key, BuildHasherDefault<PrehashedHasher>>,
}

/// The result of a flight.
#[derive(Debug, Clone)]
enum FlightResult {
    Found(KeyedFinding),
    /// No probe was made: another replica's breaker is open.
    BreakerOpen(Opened),
    /// No probe was made: the limit of new credentials is reached over all replicas. The next one may come after this time.
    NewKeys(Duration),
}

/// A finding, and the key that it is stored under.
#[derive(Debug, Clone)]
struct KeyedFinding {
    timed: Arc<TimedFinding>,
    key: Key,
}

// === impl Cache ===

impl Cache {
    /// Caches what `prober` finds.
    pub fn new(prober: Arc<dyn Prober>, settings: CacheSettings) -> Self {
        let CacheSettings { ages, breaker, new_keys } = settings;
        let hash_keys = rand::rng().random();
        let evicted = Arc::new(Counter::new());
        let eviction_count = Arc::clone(&evicted);
        Self {
            prober,
            // LRU: under pressure, moka's default policy may refuse a new entry. A key that is never stored would be probed by every call.
            memory: moka::sync::Cache::builder()
                .max_capacity(MAX_ENTRIES)
                .eviction_policy(moka::policy::EvictionPolicy::lru())
                .time_to_live(ages.hard_maximum)
                // Only evictions for want of room count. An entry that expired was of no use any more.
                .eviction_listener(move |_, _, cause| {
                    if cause == RemovalCause::Size {
                        eviction_count.inc();
                    }
                })
                .build_with_hasher(BuildHasherDefault::default()),
            flights: SingleFlight::new(MAX_FLIGHTS, MAX_FLIGHTS_OF_ONE_PROVIDER),
            last_valid: Arc::new(ArcSwap::from_pointee(Finding::bare(Verdict::Valid))),
            breakers: Arc::new(Breakers::new(breaker)),
            new_keys: NewKeys::new(new_keys),
            ages,
            lookups: Lookups::default(),
            evicted,
            tier_link: None,
            hash_keys,
        }
    }

    /// Shares observations with other replicas over this tier.
    #[must_use]
    pub fn with_tier(self, tier: Option<Arc<Tier>>) -> Self {
        let tier_link = tier.map(|tier| {
            let key_of = moka::sync::Cache::builder().max_capacity(MAX_ENTRIES).time_to_live(self.ages.hard_maximum);
            Arc::new(TierLink { tier, key_of: key_of.build_with_hasher(BuildHasherDefault::default()) })
        });
        Self { tier_link, ..self }
    }

    /// A task that runs for ever and forgets each observation that another replica saw refused. `None` without a shared tier.
    pub fn refusal_listener(&self) -> Option<Boxed<'static, ()>> {
        let tier_link = Arc::clone(self.tier_link.as_ref()?);
        let (tier, memory) = (Arc::clone(&tier_link.tier), self.memory.clone());
        Some(Box::pin(tier.listen(move |id| {
            if let Some(key) = tier_link.key_of.get(&id) {
                forget_refused(&memory, key, Instant::now());
            }
        })))
    }

    /// Writes to `role` which role the call had in a flight, if there was one.
    async fn observe(
        &self,
        query: LivenessQuery<'_>,
        max_age: Option<Duration>,
        deadline: Instant,
        role: &mut Option<FlightRole>,
    ) -> Observed {
        let keys = self.keys(&query);
        // A flight for another model may end without an answer that is valid for this model. The loop then starts a flight for this one.
        loop {
            if let Some(observed) = self.fresh_entry(&keys, max_age) {
                return observed;
            }
            let mut first = false;
            let launch = |started| {
                first = true;
                self.launch(&query, &keys, max_age, started)
            };
            let joined = self.flights.join(query.endpoint.identity, keys.first, launch);
            self.lookups.of(&joined, first).inc();
            *role = matches!(joined, Join::InFlight(_)).then_some(if first { FlightRole::Fill } else { FlightRole::Wait });
            let began = Instant::now();
            match joined {
                Join::Known(FlightResult::Found(KeyedFinding { timed, .. })) => {
                    return self.served(&self.known(&keys), &timed, ServedFrom::Cache, max_age, Instant::now());
                }
                Join::Known(FlightResult::BreakerOpen(opened)) | Join::Rejected(Rejected::BreakerOpen(opened)) => {
                    return self.breaker_verdict(&keys, &opened, max_age);
                }
                Join::Known(FlightResult::NewKeys(wait)) => {
                    return self.without_answer(&keys, Finding::one_too_many(PER_ORGANIZATION), max_age, wait);
                }
                Join::Rejected(Rejected::NewKeys(OneTooMany { setting, wait })) => {
                    return self.without_answer(&keys, Finding::one_too_many(setting), max_age, wait);
                }
                Join::Full => {
                    let wait = self.prober.wait_before_retry(&query.endpoint.provider, keys.first).max(self.ages.unanswered);
                    return self.without_answer(&keys, Finding::withheld(Withheld::Queue), max_age, wait);
                }
                Join::InFlight(flight) => match wait(flight, deadline).await {
                    FlightEnd::Completed(FlightResult::BreakerOpen(opened)) => {
                        if self.known(&keys).is_empty() {
                            self.new_keys.remember_counted(keys.first);
                        }
                        return self.breaker_verdict(&keys, &opened, max_age);
                    }
                    // Only for the caller that started the flight. One that joined it may belong to another organization: it starts its own.
                    FlightEnd::Completed(FlightResult::NewKeys(wait)) if first => {
                        let wait = self.new_keys.withhold(keys.first, query.organization, wait);
                        return self.without_answer(&keys, Finding::one_too_many(PER_ORGANIZATION), max_age, wait);
                    }
                    FlightEnd::Completed(FlightResult::Found(KeyedFinding { timed, key }))
                        if (key == keys.first || Some(key) == self.second(&keys)) && self.ages.serves(&timed, max_age) =>
                    {
                        let served_from = if timed.shared { ServedFrom::Cache } else { ServedFrom::Probe };
                        return self.served(&self.known(&keys), &timed, served_from, max_age, Instant::now());
                    }
                    FlightEnd::Completed(_) => {}
                    FlightEnd::TimedOut { started: true, .. } => {
                        let had = Some(began.elapsed()).filter(|had| *had < USUAL_BUDGET);
                        let finding = Finding { cut_short: had, ..Finding::bare(Verdict::Timeout) };
                        return self.without_answer(&keys, finding, max_age, self.ages.unanswered);
                    }
                    // The probe was still queued: the cause is this service and not the provider. It stays queued. If its answer was expected
                    // later, that time is the wait. If it was expected by now, the estimate was wrong, and the queue gives a new retry time.
                    FlightEnd::TimedOut { started: false, answer_at } => {
                        let now = Instant::now();
                        let wait = match answer_at {
                            Some(at) if at > now => at - now,
                            Some(_) => self.prober.wait_before_retry(&query.endpoint.provider, keys.first),
                            // Another replica probes, and has its own queue. The next lookup finds the result or waits again.
                            None => self.ages.unanswered,
                        };
                        return self.without_answer(&keys, Finding::withheld(Withheld::Queue), max_age, wait);
                    }
                    FlightEnd::Lost => {
                        return self.without_answer(&keys, Finding::withheld(Withheld::Fault), max_age, self.ages.unanswered);
                    }
                },
            }
        }
    }

    /// The cached observation, if it is fresh enough.
    fn fresh_entry(&self, keys: &Keys<'_>, max_age: Option<Duration>) -> Option<Observed> {
        let (known, now) = (self.known(keys), Instant::now());
        let timed = self.ages.fresh(&known, max_age, now)?;
        self.lookups.hit.inc();
        Some(self.served(&known, timed, ServedFrom::Cache, max_age, now))
    }

    /// Decides what the first caller of a key does: use an observation that is cached by now, be rejected, or probe.
    fn launch(
        &self,
        query: &LivenessQuery<'_>,
        keys: &Keys<'_>,
        max_age: Option<Duration>,
        started: ProbeStarted,
    ) -> Start<FlightResult, Rejected, impl Future<Output = FlightResult> + Send + use<>> {
        let (known, now) = (self.known(keys), Instant::now());
        if let Some(timed) = self.ages.fresh(&known, max_age, now) {
            return Start::Known(FlightResult::Found(KeyedFinding { timed: timed.clone(), key: keys.first }));
        }
        // Checked before the breaker: a key that finds the breaker open is a new key as well.
        let is_new = known.is_empty();
        if is_new && let Err(one_too_many) = self.new_keys.count(keys.first, query.caller, query.organization) {
            return Start::Rejected(Rejected::NewKeys(one_too_many));
        }
        if let Some(opened) = self.breakers.admit(query.endpoint.identity, self.source(query, keys), now) {
            if is_new {
                self.new_keys.remember_counted(keys.first);
            }
            return Start::Rejected(Rejected::BreakerOpen(opened));
        }
        // In a trace, the call that starts the flight is the parent of its span. The traces of the other calls show that they waited.
        let tier_lookup = self.tier_link.as_ref().map(|tier_link| self.tier_lookup(tier_link, query, keys, max_age, is_new));
        Start::Run(self.fill(query, keys, started, tier_lookup).instrument(traces::probe_span(query.endpoint)))
    }

    /// Collects what a flight needs for its lookup in the shared tier.
    fn tier_lookup(
        &self,
        tier_link: &Arc<TierLink>,
        query: &LivenessQuery<'_>,
        keys: &Keys<'_>,
        max_age: Option<Duration>,
        is_new: bool,
    ) -> TierLookup {
        let is_counted = is_new && !query.organization.is_empty();
        let per_minute = self.new_keys.per_organization();
        TierLookup {
            tier_link: Arc::clone(tier_link),
            allowance: is_counted.then(|| tier_link.tier.allowance(query.organization, per_minute)).flatten(),
            memory: self.memory.clone(),
            ages: self.ages,
            first: keys.first,
            second: self.second(keys),
            client: client_of(query.preference),
            model: query.model.to_owned(),
            max_age,
        }
    }

    /// The work of a flight: probes and stores the finding. With a shared tier, it looks there first.
    fn fill(
        &self,
        query: &LivenessQuery<'_>,
        keys: &Keys<'_>,
        started: ProbeStarted,
        tier_lookup: Option<TierLookup>,
    ) -> impl Future<Output = FlightResult> + Send + use<> {
        let target = Arc::new(Target::of(query.endpoint, query.model).preferring(query.preference));
        let request = ProbeRequest { target, secret: Arc::clone(&query.secret), credential: keys.first, started };
        let (prober, breakers, target) = (Arc::clone(&self.prober), Arc::clone(&self.breakers), Arc::clone(&request.target));
        let (memory, last_valid, ages) = (self.memory.clone(), Arc::clone(&self.last_valid), self.ages);
        let (first, second) = (keys.first, self.second(keys));
        let reporter = (self.source(query, keys), query.secret.expose().len() > USUAL_KEY_BYTES);
        async move {
            let mut probe = BreakerReport { breakers: &breakers, provider: target.endpoint.identity, reported: false };
            let mut lease = None;
            if let Some(tier_lookup) = tier_lookup {
                match tier_lookup.run(&request, breakers.max_cool_down()).await {
                    LookupResult::Found(found) => return FlightResult::Found(found),
                    // As by this replica's own breaker, but no trial probe was made for it.
                    LookupResult::BreakerOpen(opened) => return FlightResult::BreakerOpen(opened),
                    LookupResult::Withheld(wait) => return FlightResult::NewKeys(wait),
                    LookupResult::Probe(granted) => lease = granted,
                }
            }
            let finding = match &lease {
                Some(lease) => lease.run_renewed(prober.probe(request)).await,
                None => prober.probe(request).await,
            };
            traces::record_finding(&finding);
            let key = second.filter(|_| finding.about_model).unwrap_or(first);
            let age = ages.fresh_for(&finding);
            // A Retry-After of the provider is kept exactly, without jitter.
            let fresh_for = if finding.retry_after.is_some() { age } else { ages.jittered(age) };
            let (finding, at, wall) = (intern_valid(finding, &last_valid), Instant::now(), SystemTime::now());
            let found = KeyedFinding { timed: Arc::new(TimedFinding { finding, at, wall, fresh_for, shared: false }), key };
            remember(&memory, first, &found);
            let change = breakers.report(target.endpoint.identity, &target.endpoint.provider, reporter, &found.timed.finding, at);
            probe.reported = true;
            if let Some(lease) = lease {
                change.iter().for_each(|change| lease.share_breaker(change));
                let record = to_record(&memory, &found, &lease);
                lease.store_in_background(record, ages.hard_maximum);
            }
            FlightResult::Found(found)
        }
    }

    /// The source of the call, as the circuit breaker distinguishes them: the organization, or else the credential.
    fn source(&self, query: &LivenessQuery<'_>, keys: &Keys<'_>) -> Source {
        if query.organization.is_empty() {
            return keys.first;
        }
        let [of_credential, _] = &self.hash_keys;
        *blake3::keyed_hash(of_credential, query.organization.as_bytes()).as_bytes()
    }

    /// Reads the entries under these keys. Few probes name the model, and the first entry says whether one did. So one read is enough for
    /// nearly all calls.
    fn known(&self, keys: &Keys<'_>) -> CachedEntries {
        let first = self.memory.get(&keys.first);
        let has_more = first.as_ref().is_some_and(|entry| entry.per_model);
        let second = if has_more { self.second(keys).and_then(|key| self.memory.get(&key)) } else { None };
        CachedEntries { first, second }
    }

    /// The newest VALID that a PROVISION may still use: within the hard maximum and the caller's maximum age, and not refused since.
    fn earlier_valid(&self, known: &CachedEntries, max_age: Option<Duration>, now: Instant) -> Option<EarlierValid> {
        let refused_at = known.entries().filter_map(|entry| entry.refused_at).max();
        let valid = known.entries().filter_map(|entry| entry.valid.as_ref()).max_by_key(|timed| timed.at)?;
        let age = now - valid.at;
        let wanted = max_age.map_or(Duration::MAX, |max_age| max_age.max(self.ages.floor_of(&valid.finding)));
        let counts = age <= self.ages.hard_maximum.min(wanted) && refused_at.is_none_or(|refused_at| refused_at < valid.at);
        counts.then(|| EarlierValid { finding: Arc::clone(&valid.finding), observed_at: valid.wall, age })
    }

    fn served(
        &self,
        known: &CachedEntries,
        timed: &TimedFinding,
        served_from: ServedFrom,
        max_age: Option<Duration>,
        now: Instant,
    ) -> Observed {
        let age = now - timed.at;
        Observed {
            finding: Arc::clone(&timed.finding),
            observed_at: timed.wall,
            age,
            served_from,
            shared: timed.shared,
            // A call before that time would only get this entry again.
            retry_after: timed.fresh_for.saturating_sub(age).max(self.ages.floor),
            earlier_valid: if timed.finding.verdict == Verdict::Valid { None } else { self.earlier_valid(known, max_age, now) },
        }
    }

    /// An observation with the verdict that opened the circuit breaker.
    fn breaker_verdict(&self, keys: &Keys<'_>, opened: &Opened, max_age: Option<Duration>) -> Observed {
        Observed {
            finding: Arc::clone(&opened.finding),
            observed_at: opened.wall,
            age: opened.at.elapsed(),
            served_from: ServedFrom::Breaker,
            shared: opened.shared,
            retry_after: spread(opened.until.saturating_duration_since(Instant::now()).max(self.ages.floor)),
            earlier_valid: self.earlier_valid(&self.known(keys), max_age, Instant::now()),
        }
    }

    /// An observation for a call that got no answer. `wait` is when an answer may exist. It is never cached.
    fn without_answer(&self, keys: &Keys<'_>, finding: Finding, max_age: Option<Duration>, wait: Duration) -> Observed {
        Observed {
            finding: Arc::new(finding),
            observed_at: SystemTime::now(),
            age: Duration::ZERO,
            served_from: ServedFrom::Probe,
            shared: false,
            retry_after: spread(wait.max(self.ages.floor)),
            earlier_valid: self.earlier_valid(&self.known(keys), max_age, Instant::now()),
        }
    }

    fn keys<'a>(&self, query: &LivenessQuery<'a>) -> Keys<'a> {
        let LivenessQuery { endpoint, ref secret, model, preference, .. } = *query;
        let [of_credential, of_model] = &self.hash_keys;
        let client = client_of(preference);
        // No other hash reads the secret.
        let credential = with_stack_wiped(|| hash(of_credential, &[&endpoint.identity, &client, secret.expose().as_bytes()]));
        if endpoint.names_model {
            Keys { first: hash(of_model, &[&credential, model.as_bytes()]), model: None }
        } else {
            Keys { first: credential, model: Some(model) }
        }
    }

    /// The key of a finding that is about one model, if it differs from the first key.
    fn second(&self, keys: &Keys<'_>) -> Option<Key> {
        let [_, of_model] = &self.hash_keys;
        keys.model.map(|model| hash(of_model, &[&keys.first, model.as_bytes()]))
    }
}

/// Encodes the client for the cache key: a provider may answer another client differently.
fn client_of(Preference { family, surface }: Preference) -> [u8; 2] {
    [family.map_or(0, |family| family as u8 + 1), surface.map_or(0, |surface| surface as u8 + 1)]
}

/// Hashes the parts to a key. All parts but the last have a fixed length, so no separator is needed.
fn hash(hash_key: &[u8; 32], parts: &[&[u8]]) -> Key {
    let mut hasher = blake3::Hasher::new_keyed(hash_key);
    for part in parts {
        hasher.update(part);
    }
    *hasher.finalize().as_bytes()
}

impl LivenessSource for Cache {
    fn recall(&self, query: &LivenessQuery<'_>, max_age: Option<Duration>) -> Option<Observed> {
        let observed = self.fresh_entry(&self.keys(query), max_age)?;
        if traces::is_traced() {
            // A trace shows the cache lookup as a span of its own.
            traces::record_observation(&traces::cache_span(), &observed, None);
        }
        Some(observed)
    }

    fn expected_wait(&self, provider: &str) -> Duration {
        self.prober.expected_wait(provider)
    }

    fn observe<'a>(&'a self, query: LivenessQuery<'a>, max_age: Option<Duration>, deadline: Instant) -> Boxed<'a, Observed> {
        let span = traces::cache_span();
        if span.is_none() {
            return Box::pin(async move { self.observe(query, max_age, deadline, &mut None).await });
        }
        let cache_span = span.clone();
        let observing = async move {
            let mut role = None;
            let observed = self.observe(query, max_age, deadline, &mut role).await;
            traces::record_observation(&cache_span, &observed, role);
            observed
        };
        Box::pin(observing.instrument(span))
    }
}

impl Collect for Cache {
    fn collect(&self, page: &mut Page) {
        // moka defers its bookkeeping. This brings its entry count up to date.
        self.memory.run_pending_tasks();
        let Lookups { hit, fill, wait, breaker, new_keys, full } = &self.lookups;
        let mut lookups = page.counter("byokgate_cache_lookups", "Lookups of a credential's cached result");
        for (result, count) in
            [("hit", hit), ("fill", fill), ("wait", wait), ("breaker", breaker), ("new_keys", new_keys), ("full", full)]
        {
            lookups.add(&[("result", result)], count);
        }
        page.counter("byokgate_cache_evictions", "Results that were evicted before they expired").add(&[], &*self.evicted);
        page.gauge("byokgate_cache_entries", "Cached results").add(&[], self.memory.entry_count());
        page.counter("byokgate_probes_panicked", "Probes that ended in a panic, without a result").add(&[], self.flights.lost());
        self.breakers.collect(page);
        self.new_keys.collect(page);
        self.tier_link.iter().for_each(|tier_link| tier_link.tier.collect(page));
    }
}

/// Returns the last VALID finding if this one equals it, so that all keys share one copy. Nearly all VALID findings are equal, and a copy
/// would take a fifth of an entry's memory.
fn intern_valid(finding: Finding, last_valid: &ArcSwap<Finding>) -> Arc<Finding> {
    let known = last_valid.load_full();
    if *known == finding {
        return known;
    }
    let finding = Arc::new(finding);
    if finding.verdict == Verdict::Valid {
        last_valid.store(Arc::clone(&finding));
    }
    finding
}

/// Tells the breaker when a probe ends without a report, as after a panic. Such a probe says nothing about the provider, and must not block
/// the next trial.
struct BreakerReport<'b> {
    breakers: &'b Breakers,
    provider: [u8; 32],
    reported: bool,
}

impl Drop for BreakerReport<'_> {
    fn drop(&mut self) {
        if !self.reported {
            self.breakers.abandon(&self.provider, Instant::now());
        }
    }
}

/// Stores an observation. If its key is not the first one, the first entry is marked. Only the flight of the first key writes these entries,
/// so reading one and writing it back is not a race.
fn remember(memory: &Memory, first: Key, found: &KeyedFinding) {
    let KeyedFinding { timed, key } = found;
    let mut entry = memory.get(key).unwrap_or_default();
    match timed.finding.verdict {
        Verdict::Valid => entry.valid = Some(timed.clone()),
        Verdict::Invalid | Verdict::Forbidden => {
            entry.valid = None;
            entry.refused_at = Some(timed.at);
        }
        // Not an observation: nothing was sent.
        Verdict::NotAttempted => return,
        Verdict::QuotaExhausted
        | Verdict::RateLimited
        | Verdict::ProviderError
        | Verdict::UnexpectedResponse
        | Verdict::Timeout
        | Verdict::Unreachable
        | Verdict::NoServerSurface
        | Verdict::NotCalibrated
        | Verdict::ProbeDisabled => {}
    }
    entry.latest = Some(timed.clone());
    memory.insert(*key, entry);
    if *key != first {
        let entry = memory.get(&first).unwrap_or_default();
        memory.insert(first, CacheEntry { per_model: true, ..entry });
    }
}

// === the shared tier ===

/// A flight's lookup in the shared tier.
struct TierLookup {
    tier_link: Arc<TierLink>,
    /// Set for a new credential of an organization: it counts against the limit over all replicas.
    allowance: Option<Allowance>,
    memory: Memory,
    ages: Ages,
    first: Key,
    second: Option<Key>,
    client: [u8; 2],
    model: String,
    max_age: Option<Duration>,
}

// === impl TierLookup ===

impl TierLookup {
    /// Another replica's open breaker counts for `longest` at most.
    async fn run(self, request: &ProbeRequest, longest: Duration) -> LookupResult<KeyedFinding> {
        let Self { tier_link, allowance, memory, ages, first, second, client, model, max_age } = self;
        let endpoint = &request.target.endpoint;
        let model = if second.is_some() { Model::Sometimes(&model) } else { Model::Always(&model) };
        let entry = tier_link.tier.entry(&CredentialIdentity {
            endpoint: &endpoint.identity,
            client,
            value: request.secret.expose(),
            model,
        });
        for (id, of_model) in entry.ids() {
            tier_link.key_of.insert(id, second.filter(|_| of_model).unwrap_or(first));
        }
        let take = |found: Vec<SharedObservation>| {
            for shared in found {
                let key = second.filter(|_| shared.about_model).unwrap_or(first);
                merge_shared(&memory, (first, key), shared, &ages);
            }
            let known = CachedEntries { first: memory.get(&first), second: second.and_then(|key| memory.get(&key)) };
            let timed = ages.fresh(&known, max_age, Instant::now())?;
            let is_here = |cached: &CacheEntry| cached.latest.as_ref().is_some_and(|latest| Arc::ptr_eq(latest, timed));
            let key = second.filter(|_| known.second.as_ref().is_some_and(is_here)).unwrap_or(first);
            Some(KeyedFinding { timed: Arc::clone(timed), key })
        };
        entry.look_up(longest, allowance.as_ref(), take).await
    }
}

/// Stores another replica's observation. It is dropped if the local entry is newer, or if the credential was refused since.
fn merge_shared(memory: &Memory, (first, key): (Key, Key), shared: SharedObservation, ages: &Ages) {
    let SharedObservation { finding, at, wall, fresh_for, earlier_valid, refused_at, about_model: _ } = shared;
    let mut entry = memory.get(&key).unwrap_or_default();
    if entry.latest.as_ref().is_some_and(|latest| latest.at >= at) {
        return;
    }
    entry.refused_at = entry.refused_at.max(refused_at);
    if finding.verdict == Verdict::Valid && entry.refused_at.is_some_and(|refused_at| refused_at >= at) {
        return;
    }
    let timed = |finding: Finding, at, wall, fresh_for| {
        Arc::new(TimedFinding { finding: Arc::new(finding), at, wall, fresh_for, shared: true })
    };
    // Not longer than this replica's own settings allow.
    let fresh_for = fresh_for.min(ages.fresh_for(&finding));
    let latest = timed(finding, at, wall, fresh_for);
    let valid = if latest.finding.verdict == Verdict::Valid {
        Some(Arc::clone(&latest))
    } else {
        let earlier = earlier_valid.map(|(finding, at, wall)| timed(finding, at, wall, Duration::ZERO));
        entry.valid.take().into_iter().chain(earlier).max_by_key(|valid| valid.at)
    };
    entry.valid = valid.filter(|valid| entry.refused_at.is_none_or(|refused_at| refused_at < valid.at));
    entry.latest = Some(latest);
    memory.insert(key, entry);
    if key != first {
        let entry = memory.get(&first).unwrap_or_default();
        memory.insert(first, CacheEntry { per_model: true, ..entry });
    }
}

/// Clears an entry that another replica just saw refused, so that the next call looks it up again. The time of the refusal is stored even
/// without an entry: an older VALID may still be on its way here.
fn forget_refused(memory: &Memory, key: Key, now: Instant) {
    let entry = memory.get(&key).unwrap_or_default();
    let is_refused =
        entry.latest.as_ref().is_some_and(|latest| matches!(latest.finding.verdict, Verdict::Invalid | Verdict::Forbidden));
    if !is_refused {
        memory.insert(key, CacheEntry { latest: None, valid: None, refused_at: Some(now), ..entry });
    }
}

/// The entry with this observation, in the form that the tier stores.
fn to_record(memory: &Memory, KeyedFinding { timed, key }: &KeyedFinding, lease: &Lease) -> Option<ObservationRecord> {
    let entry = memory.get(key)?;
    let is_valid = timed.finding.verdict == Verdict::Valid;
    let earlier_valid = entry.valid.filter(|_| !is_valid).map(|valid| ((*valid.finding).clone(), lease.time_of(valid.at)));
    Some(ObservationRecord {
        finding: (*timed.finding).clone(),
        at: lease.time_of(timed.at),
        fresh_for: timed.fresh_for,
        earlier_valid,
        refused_at: entry.refused_at.map(|at| lease.time_of(at)),
    })
}

// === impl Lookups ===

impl Lookups {
    fn of(&self, joined: &Join<FlightResult, Rejected>, first: bool) -> &Counter {
        match joined {
            Join::Known(_) => &self.hit,
            Join::InFlight(_) if first => &self.fill,
            Join::InFlight(_) => &self.wait,
            Join::Rejected(Rejected::BreakerOpen(_)) => &self.breaker,
            Join::Rejected(Rejected::NewKeys(_)) => &self.new_keys,
            Join::Full => &self.full,
        }
    }
}

/// Why a first caller may not probe.
#[derive(Debug)]
enum Rejected {
    /// The provider's circuit breaker is open.
    BreakerOpen(Opened),
    /// A limit of new credentials is reached.
    NewKeys(OneTooMany),
}

/// The keys that an observation may be stored under.
#[derive(Debug, Clone, Copy)]
struct Keys<'a> {
    /// The credential with any model, or with its model if every probe names it. One probe at a time runs per this key.
    first: Key,
    /// The model, if only some probes name it. Their findings are stored under a second key.
    model: Option<&'a str>,
}

/// The entries under both keys.
#[derive(Debug)]
struct CachedEntries {
    first: Option<CacheEntry>,
    second: Option<CacheEntry>,
}

// === impl CachedEntries ===

impl CachedEntries {
    fn entries(&self) -> impl Iterator<Item = &CacheEntry> {
        self.first.iter().chain(&self.second)
    }

    fn is_empty(&self) -> bool {
        self.entries().all(|entry| entry.latest.is_none() && entry.refused_at.is_none())
    }
}

// === impl Ages ===

/// With an age of zero, every decision would probe.
const MIN_AGE: Duration = Duration::from_secs(1);

impl Ages {
    /// Reports every age that is out of bounds.
    pub fn review(&self, review: &mut Review<'_>) {
        for (key, age) in [
            ("valid", self.valid),
            ("valid_paid", self.valid_paid),
            ("refused", self.refused),
            ("unanswered", self.unanswered),
            ("inconclusive", self.inconclusive),
            ("rate_limited_min", self.rate_limited_min),
            ("rate_limited_max", self.rate_limited_max),
            ("hard_maximum", self.hard_maximum),
            ("floor", self.floor),
            ("floor_paid", self.floor_paid),
        ] {
            review.length(key, age, MIN_AGE, duration::MAX);
        }
        review.number("jitter_percent", self.jitter_percent, 0, 100);
        if self.rate_limited_min > self.rate_limited_max {
            review.error("rate_limited_min", "must not be more than cache.rate_limited_max");
        }
        if self.valid.max(self.valid_paid) > self.hard_maximum {
            review.error("hard_maximum", "must not be less than cache.valid and cache.valid_paid");
        }
    }

    /// The newest observation, if it is fresh enough.
    fn fresh<'k>(&self, known: &'k CachedEntries, max_age: Option<Duration>, now: Instant) -> Option<&'k Arc<TimedFinding>> {
        let latest = known.entries().filter_map(|entry| entry.latest.as_ref()).max_by_key(|timed| timed.at)?;
        self.is_fresh(latest, max_age, now).then_some(latest)
    }

    fn is_fresh(&self, timed: &TimedFinding, max_age: Option<Duration>, now: Instant) -> bool {
        let wanted = max_age.map_or(Duration::MAX, |max_age| max_age.max(self.floor_of(&timed.finding)));
        now - timed.at < timed.fresh_for.min(wanted)
    }

    /// Whether a flight's result answers a caller that waited. Another replica's observation may be older than this caller allows.
    fn serves(&self, timed: &TimedFinding, max_age: Option<Duration>) -> bool {
        !timed.shared || self.is_fresh(timed, max_age, Instant::now())
    }

    fn fresh_for(&self, finding: &Finding) -> Duration {
        match finding.verdict {
            // An endpoint whose "yes" proves nothing is probed as rarely as one whose "yes" counts.
            Verdict::Valid | Verdict::NotCalibrated if finding.cost_money => self.valid_paid,
            Verdict::Valid | Verdict::NotCalibrated => self.valid,
            Verdict::Invalid | Verdict::Forbidden => self.refused,
            Verdict::Timeout | Verdict::Unreachable => self.unanswered,
            Verdict::RateLimited => {
                finding.retry_after.map_or(self.inconclusive, |wanted| wanted.clamp(self.rate_limited_min, self.rate_limited_max))
            }
            Verdict::ProviderError | Verdict::UnexpectedResponse | Verdict::QuotaExhausted => self.inconclusive,
            // The limiter that withheld the probe also says when it will allow one.
            Verdict::NotAttempted => finding.retry_after.unwrap_or(self.unanswered),
            Verdict::NoServerSurface | Verdict::ProbeDisabled => Duration::ZERO,
        }
    }

    fn jittered(&self, age: Duration) -> Duration {
        let cut = f64::from(self.jitter_percent.min(100)) / 100.0;
        age.mul_f64(1.0 - cut * rand::rng().random_range(0.0..=1.0))
    }

    fn floor_of(&self, finding: &Finding) -> Duration {
        if finding.cost_money { self.floor_paid } else { self.floor }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct PendingProber;

    impl Prober for PendingProber {
        fn probe(&self, _: ProbeRequest) -> Boxed<'static, Finding> {
            Box::pin(std::future::pending())
        }
    }

    #[test]
    fn equal_valid_findings_share_one_copy() {
        let last_valid = ArcSwap::from_pointee(Finding::bare(Verdict::Valid));
        let valid = || Finding { status: Some(200), ..Finding::bare(Verdict::Valid) };
        let (first, refused) = (intern_valid(valid(), &last_valid), intern_valid(Finding::bare(Verdict::Invalid), &last_valid));
        assert_eq!((&*first, refused.verdict), (&valid(), Verdict::Invalid));
        assert!(Arc::ptr_eq(&first, &intern_valid(valid(), &last_valid)), "an INVALID in between changes nothing");
        assert_eq!(intern_valid(Finding::bare(Verdict::Valid), &last_valid).status, None);
    }

    #[tokio::test(start_paused = true)]
    async fn a_refusal_that_arrives_first_wins_over_an_older_valid() {
        let memory: Memory = moka::sync::Cache::builder().max_capacity(9).build_with_hasher(BuildHasherDefault::default());
        let (key, ages) = ([7; 32], Ages::default());
        let valid = |at| SharedObservation {
            finding: Finding::bare(Verdict::Valid),
            at,
            wall: SystemTime::UNIX_EPOCH,
            fresh_for: Duration::from_secs(30),
            earlier_valid: None,
            refused_at: None,
            about_model: false,
        };
        let began = Instant::now();
        tokio::time::advance(Duration::from_secs(1)).await;
        // The store answered before the refusal was stored, and its answer arrives after the message about the refusal.
        forget_refused(&memory, key, Instant::now());
        merge_shared(&memory, (key, key), valid(began), &ages);
        assert!(memory.get(&key).is_none_or(|entry| entry.latest.is_none() && entry.valid.is_none()));
        tokio::time::advance(Duration::from_secs(1)).await;
        merge_shared(&memory, (key, key), valid(Instant::now()), &ages);
        assert!(memory.get(&key).is_some_and(|entry| entry.latest.is_some() && entry.valid.is_some()), "a newer one counts");
    }

    #[tokio::test]
    async fn evictions_are_counted() {
        let cache = Cache::new(Arc::new(PendingProber), CacheSettings::default());
        for index in 0..MAX_ENTRIES + 3 {
            let mut key = [0; 32];
            key[..8].copy_from_slice(&index.to_le_bytes());
            let (finding, fresh_for) = (Arc::new(Finding::bare(Verdict::Valid)), Duration::from_secs(30));
            let (at, wall) = (Instant::now(), SystemTime::UNIX_EPOCH);
            remember(
                &cache.memory,
                key,
                &KeyedFinding { timed: Arc::new(TimedFinding { finding, at, wall, fresh_for, shared: false }), key },
            );
        }
        let mut page = Page::about(std::iter::empty());
        cache.collect(&mut page);
        let text = page.text().unwrap();
        for line in ["byokgate_cache_evictions_total 3\n", &format!("byokgate_cache_entries {MAX_ENTRIES}\n")] {
            assert!(text.contains(line), "{line} in {text}");
        }
    }
}
