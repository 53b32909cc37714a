//! How many new credentials anybody may have judged, so that nobody uses the service to find out which of many keys are alive.

use std::{num::NonZeroU32, time::Duration};

use governor::{Quota, RateLimiter, clock::Clock, middleware::NoOpMiddleware, state::keyed::HashMapStateStore};
use serde::{Deserialize, Serialize};
use tokio::time::Instant;

use super::clock::TokioClock;
use crate::telemetry::metrics::{Counter, Measured, Page};

/// How many credentials that are not remembered may be judged per minute, with as many at once, so that nobody uses the service
/// to find out which of many keys are alive.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct NewKeyLimits {
    /// For each organization. A large tenant whose workspaces have a key each restarts within minutes; who tries a list of keys
    /// wants thousands.
    pub per_organization: NonZeroU32,
    /// For each caller: a platform that restarts a fleet of three thousand tenants at once.
    pub per_caller: NonZeroU32,
}

/// How many organizations and callers are remembered at a time; beyond it those at rest are forgotten.
const MAX_KEYS: usize = 100_000;

/// How long a credential that was counted, and not asked about, is not counted again.
const COUNTED_FOR: Duration = Duration::from_secs(60);

impl Default for NewKeyLimits {
    fn default() -> Self {
        Self { per_organization: NonZeroU32::MIN.saturating_add(239), per_caller: NonZeroU32::MIN.saturating_add(2_999) }
    }
}

type Keyed = RateLimiter<String, HashMapStateStore<String>, TokioClock, NoOpMiddleware<Duration>>;

/// Counts credentials that are not remembered.
pub(crate) struct NewKeys {
    organizations: Keyed,
    callers: Keyed,
    /// Those that were counted and then not asked about: trying one of them again is not trying another.
    waiting: moka::sync::Cache<[u8; 32], Instant>,
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
            waiting: moka::sync::Cache::builder().max_capacity(MAX_KEYS as u64).time_to_live(COUNTED_FOR).build(),
            clock,
            refused: Default::default(),
        }
    }

    /// Counts one; `Err` is the time after which another may come. Without an organization its caller alone is counted.
    pub(crate) fn count(&self, key: [u8; 32], caller: &str, organization: &str) -> Result<(), Duration> {
        if self.waiting.get(&key).is_some_and(|at| at.elapsed() < COUNTED_FOR) {
            return Ok(());
        }
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

    /// One that was counted is not asked about now.
    pub(crate) fn keep_waiting(&self, key: [u8; 32]) {
        self.waiting.insert(key, Instant::now());
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
