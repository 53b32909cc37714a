//! How much is asked of each provider: probes in flight, a queue, calls per second.

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
    state::{InMemoryState, NotKeyed},
};
use serde::{Deserialize, Serialize};
use tokio::{
    sync::Semaphore,
    time::{Instant, sleep_until, timeout_at},
};

use super::clock::TokioClock;
use crate::{
    core::{
        classify::Finding,
        engine::{Boxed, ProbeRequest, Prober},
    },
    domain::verdict::Withheld,
    domain::{duration, problem::Review},
    telemetry::metrics::{Histogram, Measured, PROVIDER, Page},
};

/// What may be asked of each provider.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ProviderLimits {
    /// Probes in flight at a time: enough for a create storm at a vendor's usual 200 ms, few enough not to look like an attack.
    pub in_flight: usize,
    /// Probes that wait for their turn; beyond it the answer is NOT_ATTEMPTED at once.
    pub queue: usize,
    /// The longest that one waits for its turn: no caller waits longer than that either.
    #[serde(with = "duration")]
    pub queue_time: Duration,
    /// Calls begun per second, with as many at once: vendors' own limits are per key, what this spares is our address's name.
    pub per_second: NonZeroU32,
}

impl Default for ProviderLimits {
    fn default() -> Self {
        Self { in_flight: 16, queue: 512, queue_time: Duration::from_secs(5), per_second: NonZeroU32::MIN.saturating_add(99) }
    }
}

impl ProviderLimits {
    /// What is wrong with them.
    pub fn review(&self, review: &mut Review<'_>) {
        review.number("in_flight", self.in_flight, 1, 1_000_000);
        review.number("queue", self.queue, 1, 1_000_000);
        review.length("queue_time", self.queue_time, Duration::from_millis(100), duration::MAX);
    }
}

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
