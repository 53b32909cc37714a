//! How many new credentials anybody may have judged, so that nobody uses the service to find out which of many keys are alive.

use std::{
    num::NonZeroU32,
    sync::{Mutex, PoisonError},
    time::Duration,
};

use governor::{Quota, RateLimiter, clock::Clock, middleware::NoOpMiddleware, state::keyed::HashMapStateStore};
use serde::{Deserialize, Serialize};
use tokio::time::Instant;

use super::{clock::TokioClock, provider_limits::part_of, turns::Turns};
use crate::{
    domain::request::CalledBy,
    telemetry::metrics::{Collect, Counter, Page},
};

/// How many credentials that are not remembered may be judged per minute, with as many at once, so that nobody uses the service
/// to find out which of many keys are alive.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct NewKeyLimits {
    /// For each organization. A large tenant whose workspaces have a key each restarts within minutes; who tries a list of keys
    /// wants thousands.
    pub per_organization: NonZeroU32,
    /// For each caller that is a workspace: it has a few keys, and a process that guesses has many.
    pub per_caller: NonZeroU32,
    /// For each caller that is a platform: one that restarts a fleet of thirty thousand tenants, with two keys each.
    pub per_platform: NonZeroU32,
}

/// How many organizations and callers are remembered at a time; beyond it those at rest are forgotten.
const MAX_KEYS: usize = 100_000;

/// How long a credential that was counted, and not asked about, is not counted again.
const COUNTED_FOR: Duration = Duration::from_secs(60);

impl Default for NewKeyLimits {
    fn default() -> Self {
        Self {
            per_organization: NonZeroU32::MIN.saturating_add(239),
            per_caller: NonZeroU32::MIN.saturating_add(29),
            per_platform: NonZeroU32::MIN.saturating_add(59_999),
        }
    }
}

impl NewKeyLimits {
    /// The part of one of so many replicas. An organization and a workspace are told apart from others by these limits, and have them whole:
    /// their questions go to one replica, or an organization's are counted over all of them in the shared tier.
    #[must_use]
    pub fn of_one(self, replicas: NonZeroU32) -> Self {
        Self { per_platform: part_of(self.per_platform, replicas), ..self }
    }
}

type Keyed = RateLimiter<String, HashMapStateStore<String>, TokioClock, NoOpMiddleware<Duration>>;

/// Counts credentials that are not remembered.
pub(crate) struct NewKeys {
    organizations: Limit,
    workspaces: Limit,
    platforms: Limit,
    /// Those that were counted and then not asked about: trying one of them again is not trying another.
    waiting: moka::sync::Cache<[u8; 32], Instant>,
    clock: TokioClock,
}

/// A limit for each of many names.
struct Limit {
    spent: Keyed,
    per_minute: NonZeroU32,
    /// How far apart those are who were refused and come at their times.
    apart: Duration,
    turns: Mutex<Turns<String>>,
    refused: Counter,
}

// === impl NewKeys ===

impl NewKeys {
    pub(crate) fn new(limits: NewKeyLimits) -> Self {
        let clock = TokioClock::new();
        let limit = |per_minute| Limit::new(per_minute, &clock);
        Self {
            organizations: limit(limits.per_organization),
            workspaces: limit(limits.per_caller),
            platforms: limit(limits.per_platform),
            waiting: moka::sync::Cache::builder().max_capacity(MAX_KEYS as u64).time_to_live(COUNTED_FOR).build(),
            clock,
        }
    }

    /// Counts one; `Err` is the time after which this one may come. Without an organization its caller alone is counted.
    pub(crate) fn count(&self, key: [u8; 32], caller: &CalledBy, organization: &str) -> Result<(), Duration> {
        if self.waiting.get(&key).is_some_and(|at| at.elapsed() < COUNTED_FOR) {
            return Ok(());
        }
        if !organization.is_empty() {
            self.organizations.count(key, organization, &self.clock)?;
        }
        let of_caller = if caller.is_workspace { &self.workspaces } else { &self.platforms };
        of_caller.count(key, &caller.name, &self.clock)
    }

    /// What each organization may have judged, over all replicas where they count together.
    pub(crate) const fn per_organization(&self) -> NonZeroU32 {
        self.organizations.per_minute
    }

    /// Counted over all replicas, it is one too many: another may come after this wait. Tells when this one may.
    pub(crate) fn withhold(&self, key: [u8; 32], organization: &str, wait: Duration) -> Duration {
        // It was counted here, and is not asked about.
        self.keep_waiting(key);
        self.organizations.turn(key, organization, Instant::now() + wait)
    }

    /// One that was counted is not asked about now.
    pub(crate) fn keep_waiting(&self, key: [u8; 32]) {
        self.waiting.insert(key, Instant::now());
    }
}

// === impl Limit ===

impl Limit {
    fn new(per_minute: NonZeroU32, clock: &TokioClock) -> Self {
        Self {
            spent: RateLimiter::hashmap_with_clock(Quota::per_minute(per_minute), clock.clone()),
            per_minute,
            apart: Duration::from_secs(60) / per_minute.get(),
            turns: Mutex::default(),
            refused: Counter::new(),
        }
    }

    fn count(&self, key: [u8; 32], name: &str, clock: &TokioClock) -> Result<(), Duration> {
        if self.spent.len() >= MAX_KEYS {
            self.spent.retain_recent();
        }
        // Where even so many are busy, the rest share one count.
        let name = if self.spent.len() < MAX_KEYS { name.to_owned() } else { String::new() };
        let checked = self.spent.check_key(&name);
        checked.map_err(|spent| self.turn(key, &name, Instant::now() + spent.wait_time_from(clock.now())))
    }

    /// Refuses one, and tells how long it has to wait, where the next of this name may come at `first`.
    fn turn(&self, key: [u8; 32], name: &str, first: Instant) -> Duration {
        self.refused.inc();
        let (now, mut turns) = (Instant::now(), self.turns.lock().unwrap_or_else(PoisonError::into_inner));
        turns.give(&name.to_owned(), key, now, first, self.apart).saturating_duration_since(now)
    }
}

impl Collect for NewKeys {
    fn collect(&self, page: &mut Page) {
        let mut refusals =
            page.counter("byokgate_new_key_refusals", "Credentials that were not checked because too many new ones came");
        let Self { organizations, workspaces, platforms, .. } = self;
        for (limit, of) in [("organization", organizations), ("caller", workspaces), ("platform", platforms)] {
            refusals.add(&[("limit", limit)], &of.refused);
        }
    }
}
