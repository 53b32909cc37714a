//! Observations remembered for a short time: keyed hash, age per verdict, one probe per key, detached fill.
//!
//! moka holds and bounds them. Freshness is decided here, by tokio's clock, for two reasons: an age depends on who asks
//! (`max_liveness_age`, the hard maximum at PROVISION), and tests can then move time instead of waiting for it.

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
        new_keys::{NewKeyLimits, NewKeys},
        single_flight::{FlightEnd, Join, SingleFlight, Start, wait},
        tier::{Allowance, Id, Lease, Model, Record, Shared, Sought, Tier, Whose},
        turns::spread,
    },
    telemetry::{
        metrics::{Collect, Counter, Page},
        traces::{self, Part},
    },
};

/// How long observations count, per verdict.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Ages {
    /// VALID: revocation is seen within this time.
    #[serde(with = "duration")]
    pub valid: Duration,
    /// VALID, where a probe costs the tenant money.
    #[serde(with = "duration")]
    pub valid_paid: Duration,
    /// INVALID and FORBIDDEN: a repaired key is seen within this time.
    #[serde(with = "duration")]
    pub refused: Duration,
    /// TIMEOUT, UNREACHABLE.
    #[serde(with = "duration")]
    pub unanswered: Duration,
    /// PROVIDER_ERROR, UNEXPECTED_RESPONSE, QUOTA_EXHAUSTED, and RATE_LIMITED without a Retry-After.
    #[serde(with = "duration")]
    pub inconclusive: Duration,
    /// RATE_LIMITED: the least that the provider's Retry-After counts.
    #[serde(with = "duration")]
    pub rate_limited_min: Duration,
    /// The most.
    #[serde(with = "duration")]
    pub rate_limited_max: Duration,
    /// A VALID past its age still counts at PROVISION, when there is no answer, up to this.
    #[serde(with = "duration")]
    pub hard_maximum: Duration,
    /// A caller's `max_liveness_age` is never taken for less than this.
    #[serde(with = "duration")]
    pub floor: Duration,
    /// The same, where a probe costs the tenant money.
    #[serde(with = "duration")]
    pub floor_paid: Duration,
    /// Each age is cut by up to this many percent, so that entries made together do not end together. Never longer: a configured
    /// age is a maximum.
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

/// How many credentials are remembered.
const MAX_ENTRIES: u64 = 100_000;
/// How many probes may be under way at a time, over all providers and for one: what waits for a provider that hangs leaves room for others.
const MAX_FLIGHTS: usize = 4096;
const MAX_FLIGHTS_OF_ONE_PROVIDER: usize = 1024;
/// The longest value that nobody wonders at: vendors' keys are under 200 bytes, some JWTs over 1 KiB.
const USUAL_KEY_BYTES: usize = 1024;

/// How the memory is kept, and what guards the providers behind it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct CacheSettings {
    /// How long observations count.
    pub ages: Ages,
    /// When a provider's breaker opens.
    pub breaker: BreakerSettings,
    /// How many new credentials may be judged.
    pub new_keys: NewKeyLimits,
}

/// A source that remembers.
pub struct Cache {
    prober: Arc<dyn Prober>,
    memory: Memory,
    flights: Arc<SingleFlight<Key, Landed>>,
    /// The last VALID.
    last_valid: Arc<ArcSwap<Finding>>,
    breakers: Arc<Breakers>,
    new_keys: NewKeys,
    ages: Ages,
    lookups: Lookups,
    evicted: Arc<Counter>,
    /// What replicas share, where they do.
    sharing: Option<Arc<Sharing>>,
    /// One for keys of credentials, one for those of single models. Made anew by every process: a key in a memory image tells
    /// nothing about a credential.
    hash_keys: [[u8; 32]; 2],
}

type Key = [u8; 32];
type Memory = moka::sync::Cache<Key, Remembered, BuildHasherDefault<Hashed>>;

/// The hasher of keys that are hashes, under a key of this process, already.
#[derive(Default)]
struct Hashed(u64);

impl Hasher for Hashed {
    fn write(&mut self, bytes: &[u8]) {
        for (at, byte) in bytes.iter().take(8).enumerate() {
            self.0 ^= u64::from(*byte) << (8 * at);
        }
    }

    /// The length of a key, which is always the same.
    fn write_usize(&mut self, _: usize) {}

    fn finish(&self) -> u64 {
        self.0
    }
}

/// How it went with those who looked for an observation.
#[derive(Debug, Default)]
struct Lookups {
    /// It was there, young enough.
    hit: Counter,
    /// A probe was begun for it.
    fill: Counter,
    /// A probe was under way for somebody else.
    wait: Counter,
    /// The breaker's verdict was taken.
    breaker: Counter,
    /// Too many new credentials.
    new_keys: Counter,
    /// Too many probes under way, over all providers.
    full: Counter,
}

/// What is remembered under a key.
#[derive(Debug, Clone, Default)]
struct Remembered {
    latest: Option<Arc<Timed>>,
    /// The same one, as long as nothing else was seen since.
    valid: Option<Arc<Timed>>,
    refused_at: Option<Instant>,
    /// There is more under the keys of single models.
    per_model: bool,
}

/// A finding and when it was made.
#[derive(Debug)]
struct Timed {
    finding: Arc<Finding>,
    at: Instant,
    wall: SystemTime,
    fresh_for: Duration,
    /// Another replica has made it.
    shared: bool,
}

/// The shared tier, and which of its observations this replica remembers.
struct Sharing {
    tier: Arc<Tier>,
    remembered: moka::sync::Cache<Id, Key, BuildHasherDefault<Hashed>>,
}

/// What a flight came to.
#[derive(Debug, Clone)]
enum Landed {
    Found(Fetched),
    /// Nobody was asked: another replica's breaker is open.
    Open(Opened),
    /// Nobody was asked: too many new credentials came over all replicas. Another may come after this time.
    NewKeys(Duration),
}

/// What a flight found, and the key that it stands under.
#[derive(Debug, Clone)]
struct Fetched {
    timed: Arc<Timed>,
    key: Key,
}

// === impl Cache ===

impl Cache {
    /// Remembers what `prober` finds.
    pub fn new(prober: Arc<dyn Prober>, settings: CacheSettings) -> Self {
        let CacheSettings { ages, breaker, new_keys } = settings;
        let hash_keys = rand::rng().random();
        let evicted = Arc::new(Counter::new());
        let evicting = Arc::clone(&evicted);
        Self {
            prober,
            // LRU: the default policy may refuse a new entry under pressure, and a key that is never stored is probed forever.
            memory: moka::sync::Cache::builder()
                .max_capacity(MAX_ENTRIES)
                .eviction_policy(moka::policy::EvictionPolicy::lru())
                .time_to_live(ages.hard_maximum)
                // For want of room: whatever ends by its age was of no use any more.
                .eviction_listener(move |_, _, cause| {
                    if cause == RemovalCause::Size {
                        evicting.inc();
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
            sharing: None,
            hash_keys,
        }
    }

    /// The same, with what other replicas have found.
    #[must_use]
    pub fn sharing(self, tier: Option<Arc<Tier>>) -> Self {
        let sharing = tier.map(|tier| {
            let remembered = moka::sync::Cache::builder().max_capacity(MAX_ENTRIES).time_to_live(self.ages.hard_maximum);
            Arc::new(Sharing { tier, remembered: remembered.build_with_hasher(BuildHasherDefault::default()) })
        });
        Self { sharing, ..self }
    }

    /// Forgets what other replicas have seen refused, for ever; nothing where nothing is shared.
    pub fn listen(&self) -> Option<Boxed<'static, ()>> {
        let sharing = Arc::clone(self.sharing.as_ref()?);
        let (tier, memory) = (Arc::clone(&sharing.tier), self.memory.clone());
        Some(Box::pin(tier.listen(move |id| {
            if let Some(key) = sharing.remembered.get(&id) {
                forget_refused(&memory, key, Instant::now());
            }
        })))
    }

    /// `part` is told what part the call had in a flight, if there was one.
    async fn observe(
        &self,
        query: LivenessQuery<'_>,
        max_age: Option<Duration>,
        deadline: Instant,
        part: &mut Option<Part>,
    ) -> Observed {
        let keys = self.keys(&query);
        // A flight for another model may land without an answer that holds for this one; then this one flies next.
        loop {
            if let Some(observed) = self.remembered(&keys, max_age) {
                return observed;
            }
            let mut first = false;
            let launch = |started| {
                first = true;
                self.launch(&query, &keys, max_age, started)
            };
            let joined = self.flights.join(query.endpoint.identity, keys.first, launch);
            self.lookups.of(&joined, first).inc();
            *part = matches!(joined, Join::InFlight(_)).then_some(if first { Part::Fill } else { Part::Wait });
            match joined {
                Join::Known(Landed::Found(Fetched { timed, .. })) => {
                    return self.served(&self.known(&keys), &timed, ServedFrom::Cache, max_age, Instant::now());
                }
                Join::Known(Landed::Open(opened)) | Join::Rejected(Rejected::Open(opened)) => {
                    return self.by_the_breaker(&keys, &opened, max_age);
                }
                Join::Known(Landed::NewKeys(wait)) | Join::Rejected(Rejected::NewKeys(wait)) => {
                    return self.unasked(&keys, Finding::withheld(Withheld::NewKeys), max_age, wait);
                }
                Join::Full => {
                    let wait = self.prober.turn(&query.endpoint.provider, keys.first).max(self.ages.unanswered);
                    return self.unasked(&keys, Finding::withheld(Withheld::Queue), max_age, wait);
                }
                Join::InFlight(flight) => match wait(flight, deadline).await {
                    FlightEnd::Completed(Landed::Open(opened)) => {
                        if self.known(&keys).is_nothing() {
                            self.new_keys.keep_waiting(keys.first);
                        }
                        return self.by_the_breaker(&keys, &opened, max_age);
                    }
                    // Who only waited may be of another organization, and then flies by itself.
                    FlightEnd::Completed(Landed::NewKeys(wait)) if first => {
                        let wait = self.new_keys.withhold(keys.first, query.organization, wait);
                        return self.unasked(&keys, Finding::withheld(Withheld::NewKeys), max_age, wait);
                    }
                    FlightEnd::Completed(Landed::Found(Fetched { timed, key }))
                        if (key == keys.first || Some(key) == self.second(&keys)) && self.ages.serves(&timed, max_age) =>
                    {
                        let served_from = if timed.shared { ServedFrom::Cache } else { ServedFrom::Probe };
                        return self.served(&self.known(&keys), &timed, served_from, max_age, Instant::now());
                    }
                    FlightEnd::Completed(_) => {}
                    FlightEnd::TimedOut { started: true, .. } => {
                        return self.unasked(&keys, Finding::bare(Verdict::Timeout), max_age, self.ages.unanswered);
                    }
                    // It still waited for its turn: that is our doing, not the provider's. It goes on waiting, and will be answered, if it
                    // was not expected to be by now: then it may wait in vain.
                    FlightEnd::TimedOut { started: false, answer_at } => {
                        let now = Instant::now();
                        let wait = match answer_at {
                            Some(at) if at > now => at - now,
                            Some(_) => self.prober.turn(&query.endpoint.provider, keys.first),
                            // It is another replica's to ask, which has a place in its own queue: the next look finds the answer, or waits on.
                            None => self.ages.unanswered,
                        };
                        return self.unasked(&keys, Finding::withheld(Withheld::Queue), max_age, wait);
                    }
                    FlightEnd::Lost => {
                        return self.unasked(&keys, Finding::withheld(Withheld::Fault), max_age, self.ages.unanswered);
                    }
                },
            }
        }
    }

    /// What is remembered, if it is young enough.
    fn remembered(&self, keys: &Keys<'_>, max_age: Option<Duration>) -> Option<Observed> {
        let (known, now) = (self.known(keys), Instant::now());
        let timed = self.ages.fresh(&known, max_age, now)?;
        self.lookups.hit.inc();
        Some(self.served(&known, timed, ServedFrom::Cache, max_age, now))
    }

    /// What the first caller of a key does: it takes what is there by now, is barred, or asks.
    fn launch(
        &self,
        query: &LivenessQuery<'_>,
        keys: &Keys<'_>,
        max_age: Option<Duration>,
        started: ProbeStarted,
    ) -> Start<Landed, Rejected, impl Future<Output = Landed> + Send + use<>> {
        let (known, now) = (self.known(keys), Instant::now());
        if let Some(timed) = self.ages.fresh(&known, max_age, now) {
            return Start::Known(Landed::Found(Fetched { timed: timed.clone(), key: keys.first }));
        }
        // Before the breaker: what meets an open one is a new key as well.
        let is_new = known.is_nothing();
        if is_new && let Err(wait) = self.new_keys.count(keys.first, query.caller, query.organization) {
            return Start::Rejected(Rejected::NewKeys(wait));
        }
        if let Some(opened) = self.breakers.admit(query.endpoint.identity, self.source(query, keys), now) {
            if is_new {
                self.new_keys.keep_waiting(keys.first);
            }
            return Start::Rejected(Rejected::Open(opened));
        }
        // Whoever launches it is its parent in a trace; the others' traces show that they waited.
        let seeking = self.sharing.as_ref().map(|sharing| self.seeking(sharing, query, keys, max_age, is_new));
        Start::Run(self.fill(query, keys, started, seeking).instrument(traces::probe(query.endpoint)))
    }

    /// What a flight needs to look into the shared tier first.
    fn seeking(
        &self,
        sharing: &Arc<Sharing>,
        query: &LivenessQuery<'_>,
        keys: &Keys<'_>,
        max_age: Option<Duration>,
        is_new: bool,
    ) -> Seeking {
        let is_counted = is_new && !query.organization.is_empty();
        let per_minute = self.new_keys.per_organization();
        Seeking {
            sharing: Arc::clone(sharing),
            allowance: is_counted.then(|| sharing.tier.allowance(query.organization, per_minute)).flatten(),
            memory: self.memory.clone(),
            ages: self.ages,
            first: keys.first,
            second: self.second(keys),
            client: client_of(query.preference),
            model: query.model.to_owned(),
            max_age,
        }
    }

    /// Asks, and stores what was found: the work of a flight. Where replicas share what they find, it looks there first.
    fn fill(
        &self,
        query: &LivenessQuery<'_>,
        keys: &Keys<'_>,
        started: ProbeStarted,
        seeking: Option<Seeking>,
    ) -> impl Future<Output = Landed> + Send + use<> {
        let target = Arc::new(Target::of(query.endpoint, query.model).preferring(query.preference));
        let request = ProbeRequest { target, secret: Arc::clone(&query.secret), credential: keys.first, started };
        let (prober, breakers, target) = (Arc::clone(&self.prober), Arc::clone(&self.breakers), Arc::clone(&request.target));
        let (memory, last_valid, ages) = (self.memory.clone(), Arc::clone(&self.last_valid), self.ages);
        let (first, second) = (keys.first, self.second(keys));
        let reporter = (self.source(query, keys), query.secret.expose().len() > USUAL_KEY_BYTES);
        async move {
            let mut probe = Unreported { breakers: &breakers, provider: target.endpoint.identity, reported: false };
            let mut lease = None;
            if let Some(seeking) = seeking {
                match seeking.seek(&request, breakers.longest()).await {
                    Sought::Known(fetched) => return Landed::Found(fetched),
                    // As by this replica's own, which no trial has told anything of.
                    Sought::Open(opened) => return Landed::Open(opened),
                    Sought::Withheld(wait) => return Landed::NewKeys(wait),
                    Sought::Ask(granted) => lease = granted,
                }
            }
            let finding = match &lease {
                Some(lease) => lease.held(prober.probe(request)).await,
                None => prober.probe(request).await,
            };
            traces::found(&finding);
            let key = second.filter(|_| finding.about_model).unwrap_or(first);
            let age = ages.fresh_for(&finding);
            // What the provider asked for is kept to the second.
            let fresh_for = if finding.retry_after.is_some() { age } else { ages.jittered(age) };
            let (finding, at, wall) = (intern_valid(finding, &last_valid), Instant::now(), SystemTime::now());
            let fetched = Fetched { timed: Arc::new(Timed { finding, at, wall, fresh_for, shared: false }), key };
            remember(&memory, first, &fetched);
            let shift =
                breakers.report(target.endpoint.identity, &target.endpoint.provider, reporter, &fetched.timed.finding, at);
            probe.reported = true;
            if let Some(lease) = lease {
                shift.iter().for_each(|shift| lease.tell(shift));
                let record = to_record(&memory, &fetched, &lease);
                lease.leave(record, ages.hard_maximum);
            }
            Landed::Found(fetched)
        }
    }

    /// Whose call it is, as the breaker tells them apart.
    fn source(&self, query: &LivenessQuery<'_>, keys: &Keys<'_>) -> Source {
        if query.organization.is_empty() {
            return keys.first;
        }
        let [of_credential, _] = &self.hash_keys;
        *blake3::keyed_hash(of_credential, query.organization.as_bytes()).as_bytes()
    }

    /// What is remembered under these keys. Hardly any ladder comes to a probe that names the model, and where one did, the first
    /// entry says so: one look is enough for nearly all.
    fn known(&self, keys: &Keys<'_>) -> Known {
        let first = self.memory.get(&keys.first);
        let has_more = first.as_ref().is_some_and(|entry| entry.per_model);
        let second = if has_more { self.second(keys).and_then(|key| self.memory.get(&key)) } else { None };
        Known { first, second }
    }

    /// The newest VALID that a PROVISION may still rest on: within the hard maximum and the caller's age, not refused since.
    fn earlier_valid(&self, known: &Known, max_age: Option<Duration>, now: Instant) -> Option<EarlierValid> {
        let refused_at = known.entries().filter_map(|entry| entry.refused_at).max();
        let valid = known.entries().filter_map(|entry| entry.valid.as_ref()).max_by_key(|timed| timed.at)?;
        let age = now - valid.at;
        let wanted = max_age.map_or(Duration::MAX, |max_age| max_age.max(self.ages.floor_of(&valid.finding)));
        let counts = age <= self.ages.hard_maximum.min(wanted) && refused_at.is_none_or(|refused_at| refused_at < valid.at);
        counts.then(|| EarlierValid { finding: Arc::clone(&valid.finding), observed_at: valid.wall, age })
    }

    fn served(&self, known: &Known, timed: &Timed, served_from: ServedFrom, max_age: Option<Duration>, now: Instant) -> Observed {
        let age = now - timed.at;
        Observed {
            finding: Arc::clone(&timed.finding),
            observed_at: timed.wall,
            age,
            served_from,
            shared: timed.shared,
            // Asking again sooner would only be served from here.
            retry_after: timed.fresh_for.saturating_sub(age).max(self.ages.floor),
            earlier_valid: if timed.finding.verdict == Verdict::Valid { None } else { self.earlier_valid(known, max_age, now) },
        }
    }

    /// The verdict that opened the breaker.
    fn by_the_breaker(&self, keys: &Keys<'_>, opened: &Opened, max_age: Option<Duration>) -> Observed {
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

    /// A verdict of ours about not having an answer, which may be there after this wait. It is never remembered and replaces nothing.
    fn unasked(&self, keys: &Keys<'_>, finding: Finding, max_age: Option<Duration>, wait: Duration) -> Observed {
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
        // The one hash that reads the secret.
        let credential = with_stack_wiped(|| hash(of_credential, &[&endpoint.identity, &client, secret.expose().as_bytes()]));
        if endpoint.names_model {
            Keys { first: hash(of_model, &[&credential, model.as_bytes()]), model: None }
        } else {
            Keys { first: credential, model: Some(model) }
        }
    }

    /// Under which key a finding about the model alone stands, if that is another one.
    fn second(&self, keys: &Keys<'_>) -> Option<Key> {
        let [_, of_model] = &self.hash_keys;
        keys.model.map(|model| hash(of_model, &[&keys.first, model.as_bytes()]))
    }
}

/// Another client may get another verdict.
fn client_of(Preference { family, surface }: Preference) -> [u8; 2] {
    [family.map_or(0, |family| family as u8 + 1), surface.map_or(0, |surface| surface as u8 + 1)]
}

/// A key made of parts, of which all but the last are always of one length.
fn hash(hash_key: &[u8; 32], parts: &[&[u8]]) -> Key {
    let mut hasher = blake3::Hasher::new_keyed(hash_key);
    for part in parts {
        hasher.update(part);
    }
    *hasher.finalize().as_bytes()
}

impl LivenessSource for Cache {
    fn recall(&self, query: &LivenessQuery<'_>, max_age: Option<Duration>) -> Option<Observed> {
        let observed = self.remembered(&self.keys(query), max_age)?;
        if traces::is_traced() {
            // A trace shows the look as a step of its own.
            traces::observed(&traces::cache(), &observed, None);
        }
        Some(observed)
    }

    fn expected_wait(&self, provider: &str) -> Duration {
        self.prober.expected_wait(provider)
    }

    fn observe<'a>(&'a self, query: LivenessQuery<'a>, max_age: Option<Duration>, deadline: Instant) -> Boxed<'a, Observed> {
        let span = traces::cache();
        if span.is_none() {
            return Box::pin(async move { self.observe(query, max_age, deadline, &mut None).await });
        }
        let told = span.clone();
        let observing = async move {
            let mut part = None;
            let observed = self.observe(query, max_age, deadline, &mut part).await;
            traces::observed(&told, &observed, part);
            observed
        };
        Box::pin(observing.instrument(span))
    }
}

impl Collect for Cache {
    fn collect(&self, page: &mut Page) {
        // What moka has put off: its numbers are of what it has settled.
        self.memory.run_pending_tasks();
        let Lookups { hit, fill, wait, breaker, new_keys, full } = &self.lookups;
        let mut lookups = page.counter("byokgate_cache_lookups", "Looks for an observation of a credential, by what came of it");
        for (result, count) in
            [("hit", hit), ("fill", fill), ("wait", wait), ("breaker", breaker), ("new_keys", new_keys), ("full", full)]
        {
            lookups.add(&[("result", result)], count);
        }
        page.counter("byokgate_cache_evictions", "Observations that made room for others").add(&[], &*self.evicted);
        page.gauge("byokgate_cache_entries", "Observations that are remembered").add(&[], self.memory.entry_count());
        page.counter("byokgate_probes_panicked", "Probes that ended in a panic of ours: nothing was found")
            .add(&[], self.flights.lost());
        self.breakers.collect(page);
        self.new_keys.collect(page);
        self.sharing.iter().for_each(|sharing| sharing.tier.collect(page));
    }
}

/// A VALID that is as the last one is kept once for all keys: nearly all are, and each would take a fifth of its key's memory.
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

/// A probe that the breaker has not heard of: one that ends in a panic says nothing of the provider, and holds up no other.
struct Unreported<'b> {
    breakers: &'b Breakers,
    provider: [u8; 32],
    reported: bool,
}

impl Drop for Unreported<'_> {
    fn drop(&mut self) {
        if !self.reported {
            self.breakers.abandon(&self.provider, Instant::now());
        }
    }
}

/// Stores an observation, and marks the first entry if that is another. Only the flight of the first key writes under it and what
/// it leads to, so reading and writing back is no race.
fn remember(memory: &Memory, first: Key, fetched: &Fetched) {
    let Fetched { timed, key } = fetched;
    let mut entry = memory.get(key).unwrap_or_default();
    match timed.finding.verdict {
        Verdict::Valid => entry.valid = Some(timed.clone()),
        Verdict::Invalid | Verdict::Forbidden => {
            entry.valid = None;
            entry.refused_at = Some(timed.at);
        }
        // Not ours to remember: nothing was asked.
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
        memory.insert(first, Remembered { per_model: true, ..entry });
    }
}

// === what replicas share ===

/// A flight's look into the shared tier.
struct Seeking {
    sharing: Arc<Sharing>,
    /// Of a credential that is new here: over all replicas, so many may be.
    allowance: Option<Allowance>,
    memory: Memory,
    ages: Ages,
    first: Key,
    second: Option<Key>,
    client: [u8; 2],
    model: String,
    max_age: Option<Duration>,
}

// === impl Seeking ===

impl Seeking {
    /// Another replica's open breaker counts for `longest` at most.
    async fn seek(self, request: &ProbeRequest, longest: Duration) -> Sought<Fetched> {
        let Self { sharing, allowance, memory, ages, first, second, client, model, max_age } = self;
        let endpoint = &request.target.endpoint;
        let model = if second.is_some() { Model::Sometimes(&model) } else { Model::Always(&model) };
        let seat = sharing.tier.seat(&Whose { endpoint: &endpoint.identity, client, value: request.secret.expose(), model });
        for (id, of_model) in seat.ids() {
            sharing.remembered.insert(id, second.filter(|_| of_model).unwrap_or(first));
        }
        let take = |found: Vec<Shared>| {
            for shared in found {
                let key = second.filter(|_| shared.about_model).unwrap_or(first);
                absorb(&memory, (first, key), shared, &ages);
            }
            let known = Known { first: memory.get(&first), second: second.and_then(|key| memory.get(&key)) };
            let timed = ages.fresh(&known, max_age, Instant::now())?;
            let is_here = |entry: &Remembered| entry.latest.as_ref().is_some_and(|latest| Arc::ptr_eq(latest, timed));
            let key = second.filter(|_| known.second.as_ref().is_some_and(is_here)).unwrap_or(first);
            Some(Fetched { timed: Arc::clone(timed), key })
        };
        seat.seek(longest, allowance.as_ref(), take).await
    }
}

/// Remembers another replica's observation, where it is news: what is known already is newer, or it was refused since.
fn absorb(memory: &Memory, (first, key): (Key, Key), shared: Shared, ages: &Ages) {
    let Shared { finding, at, wall, fresh_for, earlier_valid, refused_at, about_model: _ } = shared;
    let mut entry = memory.get(&key).unwrap_or_default();
    if entry.latest.as_ref().is_some_and(|latest| latest.at >= at) {
        return;
    }
    entry.refused_at = entry.refused_at.max(refused_at);
    if finding.verdict == Verdict::Valid && entry.refused_at.is_some_and(|refused_at| refused_at >= at) {
        return;
    }
    let timed =
        |finding: Finding, at, wall, fresh_for| Arc::new(Timed { finding: Arc::new(finding), at, wall, fresh_for, shared: true });
    // No longer than this replica's own settings have it.
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
        memory.insert(first, Remembered { per_model: true, ..entry });
    }
}

/// What another replica has just seen refused is looked up again. Nothing may be known of it yet: an older VALID can still be on its way here.
fn forget_refused(memory: &Memory, key: Key, now: Instant) {
    let entry = memory.get(&key).unwrap_or_default();
    let is_refused =
        entry.latest.as_ref().is_some_and(|latest| matches!(latest.finding.verdict, Verdict::Invalid | Verdict::Forbidden));
    if !is_refused {
        memory.insert(key, Remembered { latest: None, valid: None, refused_at: Some(now), ..entry });
    }
}

/// What is remembered with this observation, as the tier has it.
fn to_record(memory: &Memory, Fetched { timed, key }: &Fetched, lease: &Lease) -> Option<Record> {
    let entry = memory.get(key)?;
    let is_valid = timed.finding.verdict == Verdict::Valid;
    let earlier_valid = entry.valid.filter(|_| !is_valid).map(|valid| ((*valid.finding).clone(), lease.time_of(valid.at)));
    Some(Record {
        finding: (*timed.finding).clone(),
        at: lease.time_of(timed.at),
        fresh_for: timed.fresh_for,
        earlier_valid,
        refused_at: entry.refused_at.map(|at| lease.time_of(at)),
    })
}

// === impl Lookups ===

impl Lookups {
    fn of(&self, joined: &Join<Landed, Rejected>, first: bool) -> &Counter {
        match joined {
            Join::Known(_) => &self.hit,
            Join::InFlight(_) if first => &self.fill,
            Join::InFlight(_) => &self.wait,
            Join::Rejected(Rejected::Open(_)) => &self.breaker,
            Join::Rejected(Rejected::NewKeys(_)) => &self.new_keys,
            Join::Full => &self.full,
        }
    }
}

/// Why a first caller does not ask.
#[derive(Debug)]
enum Rejected {
    /// The provider's breaker is open.
    Open(Opened),
    /// Too many new credentials; another may come after this time.
    NewKeys(Duration),
}

/// Under which keys an observation may stand.
#[derive(Debug, Clone, Copy)]
struct Keys<'a> {
    /// Of the credential with any model; with its model, where every probe names that. One probe at a time per this key.
    first: Key,
    /// The model, where only some probes name it: what they find stands under a second key.
    model: Option<&'a str>,
}

/// What is remembered under both keys.
#[derive(Debug)]
struct Known {
    first: Option<Remembered>,
    second: Option<Remembered>,
}

// === impl Known ===

impl Known {
    fn entries(&self) -> impl Iterator<Item = &Remembered> {
        self.first.iter().chain(&self.second)
    }

    fn is_nothing(&self) -> bool {
        self.entries().all(|entry| entry.latest.is_none() && entry.refused_at.is_none())
    }
}

// === impl Ages ===

/// An age of nothing would have every decision ask its provider.
const MIN_AGE: Duration = Duration::from_secs(1);

impl Ages {
    /// What is wrong with them.
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

    /// The newest observation, if it is young enough.
    fn fresh<'k>(&self, known: &'k Known, max_age: Option<Duration>, now: Instant) -> Option<&'k Arc<Timed>> {
        let latest = known.entries().filter_map(|entry| entry.latest.as_ref()).max_by_key(|timed| timed.at)?;
        self.is_fresh(latest, max_age, now).then_some(latest)
    }

    fn is_fresh(&self, timed: &Timed, max_age: Option<Duration>, now: Instant) -> bool {
        let wanted = max_age.map_or(Duration::MAX, |max_age| max_age.max(self.floor_of(&timed.finding)));
        now - timed.at < timed.fresh_for.min(wanted)
    }

    /// Whether it answers those who waited for it: another replica's may be older than this caller wants.
    fn serves(&self, timed: &Timed, max_age: Option<Duration>) -> bool {
        !timed.shared || self.is_fresh(timed, max_age, Instant::now())
    }

    fn fresh_for(&self, finding: &Finding) -> Duration {
        match finding.verdict {
            // An endpoint that cannot tell is asked as rarely as one that said yes.
            Verdict::Valid | Verdict::NotCalibrated if finding.cost_money => self.valid_paid,
            Verdict::Valid | Verdict::NotCalibrated => self.valid,
            Verdict::Invalid | Verdict::Forbidden => self.refused,
            Verdict::Timeout | Verdict::Unreachable => self.unanswered,
            Verdict::RateLimited => {
                finding.retry_after.map_or(self.inconclusive, |wanted| wanted.clamp(self.rate_limited_min, self.rate_limited_max))
            }
            Verdict::ProviderError | Verdict::UnexpectedResponse | Verdict::QuotaExhausted => self.inconclusive,
            // Whoever did not ask says when it will.
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

    struct Nobody;

    impl Prober for Nobody {
        fn probe(&self, _: ProbeRequest) -> Boxed<'static, Finding> {
            Box::pin(std::future::pending())
        }
    }

    #[test]
    fn a_usual_finding_is_kept_once() {
        let last_valid = ArcSwap::from_pointee(Finding::bare(Verdict::Valid));
        let valid = || Finding { status: Some(200), ..Finding::bare(Verdict::Valid) };
        let (first, refused) = (intern_valid(valid(), &last_valid), intern_valid(Finding::bare(Verdict::Invalid), &last_valid));
        assert_eq!((&*first, refused.verdict), (&valid(), Verdict::Invalid));
        assert!(Arc::ptr_eq(&first, &intern_valid(valid(), &last_valid)), "an INVALID in between changes nothing");
        assert_eq!(intern_valid(Finding::bare(Verdict::Valid), &last_valid).status, None);
    }

    #[tokio::test(start_paused = true)]
    async fn a_refusal_that_is_heard_of_first_holds_against_an_older_valid() {
        let memory: Memory = moka::sync::Cache::builder().max_capacity(9).build_with_hasher(BuildHasherDefault::default());
        let (key, ages) = ([7; 32], Ages::default());
        let valid = |at| Shared {
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
        // The store's answer, given before the refusal was stored, comes after the message about that.
        forget_refused(&memory, key, Instant::now());
        absorb(&memory, (key, key), valid(began), &ages);
        assert!(memory.get(&key).is_none_or(|entry| entry.latest.is_none() && entry.valid.is_none()));
        tokio::time::advance(Duration::from_secs(1)).await;
        absorb(&memory, (key, key), valid(Instant::now()), &ages);
        assert!(memory.get(&key).is_some_and(|entry| entry.latest.is_some() && entry.valid.is_some()), "a newer one counts");
    }

    #[tokio::test]
    async fn what_makes_room_is_counted() {
        let cache = Cache::new(Arc::new(Nobody), CacheSettings::default());
        for index in 0..MAX_ENTRIES + 3 {
            let mut key = [0; 32];
            key[..8].copy_from_slice(&index.to_le_bytes());
            let (finding, fresh_for) = (Arc::new(Finding::bare(Verdict::Valid)), Duration::from_secs(30));
            let (at, wall) = (Instant::now(), SystemTime::UNIX_EPOCH);
            remember(
                &cache.memory,
                key,
                &Fetched { timed: Arc::new(Timed { finding, at, wall, fresh_for, shared: false }), key },
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
