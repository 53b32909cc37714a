//! How much is asked of each provider, and how many new credentials anybody may have judged.

use std::{
    collections::{BTreeMap, HashMap},
    num::NonZeroU32,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use governor::{
    Quota, RateLimiter,
    clock::Clock,
    middleware::NoOpMiddleware,
    state::{InMemoryState, NotKeyed, keyed::HashMapStateStore},
};
use tokio::{
    sync::Semaphore,
    time::{Instant, sleep_until, timeout_at},
};

use crate::{
    core::{
        classify::Finding,
        engine::{Boxed, ProbeRequest, Prober},
    },
    domain::verdict::Withheld,
    telemetry::metrics::{Counter, Histogram, Measured, PROVIDER, Page},
};

/// What may be asked of each provider.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ProviderLimits {
    /// Probes in flight at a time: enough for a create storm at a vendor's usual 200 ms, few enough not to look like an attack.
    pub in_flight: usize,
    /// Probes that wait for their turn; beyond it the answer is NOT_ATTEMPTED at once.
    pub queue: usize,
    /// The longest that one waits for its turn: no caller waits longer than that either.
    pub queue_time: Duration,
    /// Calls begun per second, with as many at once: vendors' own limits are per key, what this spares is our address's name.
    pub per_second: NonZeroU32,
}

/// How many credentials that are not remembered may be judged per minute, with as many at once, so that nobody uses the service
/// to find out which of many keys are alive.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NewKeyLimits {
    /// For each organization. A large tenant whose workspaces have a key each restarts within minutes; who tries a list of keys
    /// wants thousands.
    pub per_organization: NonZeroU32,
    /// For each caller: a platform that restarts a fleet of three thousand tenants at once.
    pub per_caller: NonZeroU32,
}

/// How many organizations and callers are remembered at a time; beyond it those at rest are forgotten.
const MAX_KEYS: usize = 100_000;

impl Default for ProviderLimits {
    fn default() -> Self {
        Self { in_flight: 16, queue: 512, queue_time: Duration::from_secs(5), per_second: count(100) }
    }
}

impl Default for NewKeyLimits {
    fn default() -> Self {
        Self { per_organization: count(240), per_caller: count(3_000) }
    }
}

const fn count(number: u32) -> NonZeroU32 {
    match NonZeroU32::new(number) {
        Some(number) => number,
        None => NonZeroU32::MIN,
    }
}

/// Tokio's clock, so that tests can move it.
#[derive(Debug, Clone)]
pub(crate) struct TokioClock(Instant);

impl Clock for TokioClock {
    type Instant = Duration;

    fn now(&self) -> Duration {
        self.0.elapsed()
    }
}

impl TokioClock {
    pub(crate) fn new() -> Self {
        Self(Instant::now())
    }
}

// === each provider ===

/// An asker that asks no more than it may.
pub struct ProviderLimiter {
    inner: Arc<dyn Prober>,
    limits: ProviderLimits,
    slots: Mutex<HashMap<String, Arc<ProviderSlot>>>,
}

struct ProviderSlot {
    in_flight: Semaphore,
    waiting: AtomicUsize,
    budget: RateLimiter<NotKeyed, InMemoryState, TokioClock, NoOpMiddleware<Duration>>,
    clock: TokioClock,
    /// How long the provider took, without what waiting there was.
    took: Histogram,
}

/// A place in the queue.
struct Waiting<'g>(&'g AtomicUsize);

// === impl ProviderLimiter ===

impl ProviderLimiter {
    /// Asks through `inner`, within these limits.
    pub fn new(inner: Arc<dyn Prober>, limits: ProviderLimits) -> Self {
        Self { inner, limits, slots: Mutex::default() }
    }

    fn slot(&self, provider: &str) -> Arc<ProviderSlot> {
        let mut slots = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(slot) = slots.get(provider) {
            return Arc::clone(slot);
        }
        // Names come from registries that were loaded, so there are few.
        let slot = Arc::new(ProviderSlot::new(self.limits));
        slots.insert(provider.to_owned(), Arc::clone(&slot));
        slot
    }
}

impl Prober for ProviderLimiter {
    fn probe(&self, request: ProbeRequest) -> Boxed<'static, Finding> {
        let slot = self.slot(&request.target.endpoint.provider);
        let (inner, limits) = (Arc::clone(&self.inner), self.limits);
        Box::pin(async move {
            let by = Instant::now() + limits.queue_time;
            // Taken before the first await: how many wait is known at once.
            let Some(waiting) = slot.queue_up(limits.queue) else { return Finding::withheld(Withheld::Queue) };
            let Ok(Ok(_permit)) = timeout_at(by, slot.in_flight.acquire()).await else {
                return Finding::withheld(Withheld::Queue);
            };
            loop {
                match slot.budget.check() {
                    Ok(()) => break,
                    Err(spent) => {
                        let next = Instant::now() + spent.wait_time_from(slot.clock.now());
                        if next > by {
                            return Finding::withheld(Withheld::Budget);
                        }
                        sleep_until(next).await;
                    }
                }
            }
            drop(waiting);
            let began = Instant::now();
            let finding = inner.probe(request).await;
            slot.took.observe(began.elapsed());
            finding
        })
    }
}

impl Measured for ProviderLimiter {
    fn tell(&self, page: &mut Page) {
        let slots: BTreeMap<String, Arc<ProviderSlot>> = {
            let slots = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
            slots.iter().map(|(name, slot)| (name.clone(), Arc::clone(slot))).collect()
        };
        for (provider, slot) in &slots {
            let labels = [(PROVIDER, provider.as_str())];
            let in_flight = self.limits.in_flight.saturating_sub(slot.in_flight.available_permits());
            page.gauge(
                "byokgate_probes_in_flight",
                "Probes that have a place, asking or waiting for the budget of calls per second",
            )
            .add(&labels, in_flight);
            page.gauge("byokgate_probes_queued", "Probes that wait for a place or for the budget of calls per second")
                .add(&labels, slot.waiting.load(Ordering::Relaxed));
            if let Some(took) = slot.took.value() {
                page.histogram("byokgate_probe_duration_seconds", "One walk up a provider's ladder of probes").add(&labels, took);
            }
        }
    }
}

// === impl ProviderSlot ===

impl ProviderSlot {
    fn new(limits: ProviderLimits) -> Self {
        let clock = TokioClock::new();
        Self {
            in_flight: Semaphore::new(limits.in_flight),
            waiting: AtomicUsize::new(0),
            budget: RateLimiter::direct_with_clock(Quota::per_second(limits.per_second), clock.clone()),
            clock,
            took: Histogram::default(),
        }
    }

    fn queue_up(&self, limit: usize) -> Option<Waiting<'_>> {
        let place = Waiting(&self.waiting);
        // A probe that need not wait passes through the queue as well, so that a limit of 0 would stop everything.
        (self.waiting.fetch_add(1, Ordering::Relaxed) < limit).then_some(place)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

// === new keys ===

type Keyed = RateLimiter<String, HashMapStateStore<String>, TokioClock, NoOpMiddleware<Duration>>;

/// Counts credentials that are not remembered.
pub(crate) struct NewKeys {
    organizations: Keyed,
    callers: Keyed,
    clock: TokioClock,
    refused: [Counter; 2],
}

/// By which limit a new credential was refused, in the order of `refused`.
const REFUSED_BY: [&str; 2] = ["organization", "caller"];

// === impl NewKeys ===

impl NewKeys {
    pub(crate) fn new(limits: NewKeyLimits) -> Self {
        let clock = TokioClock::new();
        let keyed = |per_minute| RateLimiter::hashmap_with_clock(Quota::per_minute(per_minute), clock.clone());
        Self {
            organizations: keyed(limits.per_organization),
            callers: keyed(limits.per_caller),
            clock,
            refused: Default::default(),
        }
    }

    /// Counts one; `Err` is the time after which another may come. Without an organization its caller alone is counted.
    pub(crate) fn count(&self, caller: &str, organization: &str) -> Result<(), Duration> {
        let [by_organization, by_caller] = &self.refused;
        let named = [(&self.organizations, organization, by_organization)].into_iter().filter(|(_, name, _)| !name.is_empty());
        for (limiter, name, refused) in named.chain([(&self.callers, caller, by_caller)]) {
            if limiter.len() >= MAX_KEYS {
                limiter.retain_recent();
            }
            // Where even so many are busy, the rest share one count.
            let name = if limiter.len() < MAX_KEYS { name } else { "" };
            limiter.check_key(&name.to_owned()).map_err(|spent| {
                refused.one();
                spent.wait_time_from(self.clock.now())
            })?;
        }
        Ok(())
    }
}

impl Measured for NewKeys {
    fn tell(&self, page: &mut Page) {
        let mut refusals = page.counter("byokgate_new_key_refusals", "Credentials not judged, since too many new ones came");
        for (limit, count) in REFUSED_BY.iter().zip(&self.refused) {
            refusals.add(&[("limit", limit)], count);
        }
    }
}
