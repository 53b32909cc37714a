//! The cache of observations. A credential is stored as a keyed hash, each verdict has its own maximum age, and one probe at a time runs per
//! key. A probe runs detached from its callers.
//!
//! moka stores and bounds the entries. This module decides freshness itself, with tokio's clock, for two reasons: the age that counts depends
//! on the caller (`max_liveness_age`, the hard maximum at PROVISION), and tests can move that clock instead of waiting.

mod ages;
mod entries;
mod keys;
mod shared_tier;

use std::{
    hash::BuildHasherDefault,
    sync::Arc,
    time::{Duration, SystemTime},
};

use arc_swap::ArcSwap;
use moka::notification::RemovalCause;
use tokio::time::Instant;
use tracing::Instrument;

pub use self::ages::Ages;
use self::{
    entries::{CachedEntries, KeyedFinding, Memory, TimedFinding, intern_valid, remember},
    keys::{HashKeys, Key, Keys},
    shared_tier::{TierLink, TierLookup, to_record},
};
use crate::{
    core::{
        classify::Finding,
        credential::LivenessQuery,
        endpoint::Target,
        engine::{Boxed, EarlierValid, LivenessSource, Observed, ProbeRequest, ProbeStarted, Prober},
    },
    domain::verdict::{ServedFrom, Verdict, Withheld},
    liveness::{
        breaker::{BreakerSettings, Breakers, Opened},
        new_keys::{KeyLimit, NewKeyLimits, NewKeys, OneTooMany},
        retry_schedule::spread,
        single_flight::{FlightEnd, Join, SingleFlight, Start, wait},
        tier::LookupResult,
    },
    telemetry::{
        metrics::{Collect, Counter, Page},
        traces::{self, FlightRole},
    },
};

/// How many entries the cache holds.
const MAX_ENTRIES: u64 = 100_000;
/// How many probes may be in flight at a time, in total and for one provider. The second limit leaves room for the others when one hangs.
const MAX_FLIGHTS: usize = 8192;
const MAX_FLIGHTS_OF_ONE_PROVIDER: usize = 2048;
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
    new_keys: Arc<NewKeys>,
    ages: Ages,
    lookups: Lookups,
    evicted: Arc<Counter>,
    /// The tier that replicas share, if one is configured.
    tier_link: Option<Arc<TierLink>>,
    hash_keys: HashKeys,
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

/// The result of a flight.
#[derive(Debug, Clone)]
enum FlightResult {
    Found(KeyedFinding),
    /// No probe was made: another replica's breaker is open.
    BreakerOpen(Opened),
    /// No probe was made: this limit of new credentials is reached. The next one may come after this time.
    NewKeys(KeyLimit, Duration),
}

// === impl Cache ===

impl Cache {
    /// Caches what `prober` finds.
    pub fn new(prober: Arc<dyn Prober>, settings: CacheSettings) -> Self {
        let CacheSettings { ages, breaker, new_keys } = settings;
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
            new_keys: Arc::new(NewKeys::new(new_keys)),
            ages,
            lookups: Lookups::default(),
            evicted,
            tier_link: None,
            hash_keys: HashKeys::random(),
        }
    }

    /// Writes to `role` which role the call had in a flight, if there was one.
    async fn observe(
        &self,
        query: LivenessQuery<'_>,
        max_age: Option<Duration>,
        deadline: Instant,
        role: &mut Option<FlightRole>,
    ) -> Observed {
        let keys = self.hash_keys.keys(&query);
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
                    return self.served(&self.known(&keys), &timed, ServedFrom::Cache, max_age);
                }
                Join::Known(FlightResult::BreakerOpen(opened)) | Join::Rejected(Rejected::BreakerOpen(opened)) => {
                    return self.breaker_verdict(&keys, &opened, max_age);
                }
                Join::Known(FlightResult::NewKeys(limit, wait)) => {
                    return self.without_answer(&keys, Finding::one_too_many(limit.setting()), max_age, wait);
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
                    FlightEnd::Completed(FlightResult::NewKeys(limit, wait)) if first => {
                        let wait = self.new_keys.withhold(keys.first, limit, (query.organization, &query.caller.name), wait);
                        return self.without_answer(&keys, Finding::one_too_many(limit.setting()), max_age, wait);
                    }
                    FlightEnd::Completed(FlightResult::Found(KeyedFinding { timed, key }))
                        if (key == keys.first || Some(key) == self.hash_keys.second(&keys))
                            && self.ages.serves(&timed, max_age) =>
                    {
                        let served_from = if timed.shared { ServedFrom::Cache } else { ServedFrom::Probe };
                        return self.served(&self.known(&keys), &timed, served_from, max_age);
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
        let (timed, age) = self.ages.fresh(&known, max_age, now)?;
        self.lookups.hit.inc();
        Some(self.served_at(&known, timed, age, ServedFrom::Cache, max_age, now))
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
        if let Some((timed, _)) = self.ages.fresh(&known, max_age, now) {
            return Start::Known(FlightResult::Found(KeyedFinding { timed: timed.clone(), key: keys.first }));
        }
        // Checked before the breaker: a key that finds the breaker open is a new key as well.
        let is_new = known.is_empty();
        if is_new
            && let Err(one_too_many) = self.new_keys.count(keys.first, query.caller, query.organization, self.counts_over_tier())
        {
            return Start::Rejected(Rejected::NewKeys(one_too_many));
        }
        if let Some(opened) = self.breakers.admit(query.endpoint.identity, self.hash_keys.source(query, keys), now) {
            if is_new {
                self.new_keys.remember_counted(keys.first);
            }
            return Start::Rejected(Rejected::BreakerOpen(opened));
        }
        // In a trace, the call that starts the flight is the parent of its span. The traces of the other calls show that they waited.
        let tier_lookup = self.tier_link.as_ref().map(|tier_link| self.tier_lookup(tier_link, query, keys, max_age, is_new));
        Start::Run(self.fill(query, keys, started, tier_lookup).instrument(traces::probe_span(query.endpoint)))
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
        let source = self.hash_keys.source(query, keys);
        let request = ProbeRequest { target, secret: Arc::clone(&query.secret), credential: keys.first, source, started };
        let (prober, breakers, target) = (Arc::clone(&self.prober), Arc::clone(&self.breakers), Arc::clone(&request.target));
        let (memory, last_valid, ages) = (self.memory.clone(), Arc::clone(&self.last_valid), self.ages);
        let (first, second) = (keys.first, self.hash_keys.second(keys));
        let reporter = (source, query.secret.expose().len() > USUAL_KEY_BYTES);
        async move {
            let mut probe = BreakerReport { breakers: &breakers, provider: target.endpoint.identity, reported: false };
            let mut lease = None;
            let finding = match tier_lookup {
                None => prober.probe(request).await,
                Some(tier_lookup) => {
                    let tier_link = Arc::clone(&tier_lookup.tier_link);
                    let others = breakers.others_count_for(&target.endpoint.identity, Instant::now());
                    match tier_lookup.run(&request, others).await {
                        LookupResult::Found(found) => return FlightResult::Found(found),
                        // As by this replica's own breaker, but no trial probe was made for it.
                        LookupResult::BreakerOpen(opened) => return FlightResult::BreakerOpen(opened),
                        LookupResult::Withheld(limit, wait) => return FlightResult::NewKeys(limit, wait),
                        LookupResult::Later(turn) => tier_link.withheld_until(&request, turn),
                        LookupResult::Probe(None) => prober.probe(request).await,
                        LookupResult::Probe(Some(granted)) => {
                            let finding = tier_link.probe(&granted, request, &*prober).await;
                            lease = Some(granted);
                            finding
                        }
                    }
                }
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
                let started = found.timed.finding.verdict != Verdict::NotAttempted;
                lease.store_in_background(record, ages.hard_maximum, started);
            }
            FlightResult::Found(found)
        }
    }

    /// Reads the entries under these keys. Few probes name the model, and the first entry says whether one did. So one read is enough for
    /// nearly all calls.
    fn known(&self, keys: &Keys<'_>) -> CachedEntries {
        let first = self.memory.get(&keys.first);
        let has_more = first.as_ref().is_some_and(|entry| entry.per_model);
        let second = if has_more { self.hash_keys.second(keys).and_then(|key| self.memory.get(&key)) } else { None };
        CachedEntries { first, second }
    }

    /// The newest VALID that a PROVISION may still use: within the hard maximum and the caller's maximum age, and not refused since.
    fn earlier_valid(&self, known: &CachedEntries, max_age: Option<Duration>, now: Instant) -> Option<EarlierValid> {
        let valid = known.entries().filter_map(|entry| entry.valid.as_ref()).max_by_key(|timed| timed.at)?;
        let age = now - valid.at;
        let wanted = max_age.map_or(Duration::MAX, |max_age| max_age.max(self.ages.floor_of(&valid.finding)));
        let counts = age <= self.ages.hard_maximum.min(wanted) && !known.is_refused_since(valid.at);
        counts.then(|| EarlierValid { finding: Arc::clone(&valid.finding), observed_at: valid.wall, age })
    }

    fn served(
        &self,
        known: &CachedEntries,
        timed: &TimedFinding,
        served_from: ServedFrom,
        max_age: Option<Duration>,
    ) -> Observed {
        let now = Instant::now();
        self.served_at(known, timed, now - timed.at, served_from, max_age, now)
    }

    /// The same, where the time and the observation's age are known already.
    fn served_at(
        &self,
        known: &CachedEntries,
        timed: &TimedFinding,
        age: Duration,
        served_from: ServedFrom,
        max_age: Option<Duration>,
        now: Instant,
    ) -> Observed {
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
}

impl LivenessSource for Cache {
    fn recall(&self, query: &LivenessQuery<'_>, max_age: Option<Duration>) -> Option<Observed> {
        let observed = self.fresh_entry(&self.hash_keys.keys(query), max_age)?;
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

#[cfg(test)]
mod tests {
    use super::*;

    struct PendingProber;

    impl Prober for PendingProber {
        fn probe(&self, _: ProbeRequest) -> Boxed<'static, Finding> {
            Box::pin(std::future::pending())
        }
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
