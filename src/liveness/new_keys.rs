//! Limits on new credentials per organization and per caller, so that the service cannot be used to find out which of many keys work.

use std::{
    num::NonZeroU32,
    sync::{Mutex, PoisonError},
    time::Duration,
};

use governor::{Quota, RateLimiter, clock::Clock, middleware::NoOpMiddleware, state::keyed::HashMapStateStore};
use serde::{Deserialize, Serialize};
use tokio::time::Instant;

use super::{clock::TokioClock, provider_limits::part_of, retry_schedule::RetrySchedule};
use crate::{
    domain::request::CalledBy,
    telemetry::metrics::{Collect, Counter, Page},
};

/// How many credentials that are not cached may be probed per minute. A minute's worth may come at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct NewKeyLimits {
    /// For each organization. A large tenant with a key for each workspace restarts within minutes. An attacker with a list of keys
    /// needs thousands.
    pub per_organization: NonZeroU32,
    /// For each caller that is a workspace. A workspace has a few keys, and an attacker tries many.
    pub per_caller: NonZeroU32,
    /// For each caller that is a platform. It may restart a fleet of thirty thousand tenants with two keys each.
    pub per_platform: NonZeroU32,
}

/// How many organizations and callers are stored. Over the limit, the inactive ones are removed.
const MAX_KEYS: usize = 100_000;

/// How long a credential that was counted but not probed is not counted again.
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
    /// The limits of one of so many replicas. Only the platform's limit is divided. The calls of one organization or workspace go to one
    /// replica, or the shared tier counts an organization's calls over all replicas. It counts a platform's too: then this is what one replica
    /// counts while the tier fails.
    #[must_use]
    pub fn of_one(self, replicas: NonZeroU32) -> Self {
        Self { per_platform: part_of(self.per_platform, replicas), ..self }
    }
}

type KeyedLimiter = RateLimiter<String, HashMapStateStore<String>, TokioClock, NoOpMiddleware<Duration>>;

/// One new credential too many.
#[derive(Debug)]
pub(crate) struct OneTooMany {
    /// The setting that is used up.
    pub(crate) setting: &'static str,
    /// When the next one may come.
    pub(crate) wait: Duration,
}

/// A limit that a shared tier counts over all replicas.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum KeyLimit {
    Organization,
    Platform,
}

/// Counts credentials that are not cached.
pub(crate) struct NewKeys {
    organizations: Limit,
    workspaces: Limit,
    platforms: Limit,
    /// Credentials that were counted but not probed. A retry of one of them does not count again.
    counted: moka::sync::Cache<[u8; 32], Instant>,
    clock: TokioClock,
}

/// One limit, applied to each of many names.
struct Limit {
    limiter: KeyedLimiter,
    per_minute: NonZeroU32,
    /// The interval between two retry times.
    interval: Duration,
    schedule: Mutex<RetrySchedule<String>>,
    refused: Counter,
}

// === impl KeyLimit ===

impl KeyLimit {
    /// Its setting.
    pub(crate) const fn setting(self) -> &'static str {
        match self {
            Self::Organization => "new_keys.per_organization",
            Self::Platform => "new_keys.per_platform",
        }
    }
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
            counted: moka::sync::Cache::builder().max_capacity(MAX_KEYS as u64).time_to_live(COUNTED_FOR).build(),
            clock,
        }
    }

    /// Counts a credential. `Err` is how long it has to wait, and why. Without an organization, it counts for the caller alone. If the shared tier
    /// counts the keys of platforms, this does not: `count_for_platform` follows if the tier fails.
    pub(crate) fn count(
        &self,
        key: [u8; 32],
        caller: &CalledBy,
        organization: &str,
        tier_counts_platforms: bool,
    ) -> Result<(), OneTooMany> {
        let of = |setting| move |wait| OneTooMany { setting, wait };
        if self.counted.get(&key).is_some_and(|at| at.elapsed() < COUNTED_FOR) {
            return Ok(());
        }
        if !organization.is_empty() {
            let setting = KeyLimit::Organization.setting();
            self.organizations.count(key, organization, &self.clock).map_err(of(setting))?;
        }
        if caller.is_workspace {
            return self.workspaces.count(key, &caller.name, &self.clock).map_err(of("new_keys.per_caller"));
        }
        if tier_counts_platforms {
            return Ok(());
        }
        self.platforms.count(key, &caller.name, &self.clock).map_err(of(KeyLimit::Platform.setting()))
    }

    /// Counts a credential for a platform's limit at this replica. `Err` is when the next one may come.
    pub(crate) fn count_for_platform(&self, platform: &str) -> Result<(), Duration> {
        self.platforms.check(platform, &self.clock).map_err(|(_, wait)| wait)
    }

    /// An organization's limit. With a shared tier it holds over all replicas.
    pub(crate) const fn per_organization(&self) -> NonZeroU32 {
        self.organizations.per_minute
    }

    /// Refuses a credential that was over the limit after its lookup in the shared tier. `wait`: when another one is allowed. Returns how long this
    /// one has to wait.
    pub(crate) fn withhold(
        &self,
        key: [u8; 32],
        limit: KeyLimit,
        (organization, platform): (&str, &str),
        wait: Duration,
    ) -> Duration {
        self.remember_counted(key);
        let (limit, name) = match limit {
            KeyLimit::Organization => (&self.organizations, organization),
            KeyLimit::Platform => (&self.platforms, platform),
        };
        limit.refuse(key, name, Instant::now() + wait)
    }

    /// The credential was counted but is not probed now.
    pub(crate) fn remember_counted(&self, key: [u8; 32]) {
        self.counted.insert(key, Instant::now());
    }
}

// === impl Limit ===

impl Limit {
    fn new(per_minute: NonZeroU32, clock: &TokioClock) -> Self {
        Self {
            limiter: RateLimiter::hashmap_with_clock(Quota::per_minute(per_minute), clock.clone()),
            per_minute,
            interval: Duration::from_secs(60) / per_minute.get(),
            schedule: Mutex::default(),
            refused: Counter::new(),
        }
    }

    fn count(&self, key: [u8; 32], name: &str, clock: &TokioClock) -> Result<(), Duration> {
        self.check(name, clock).map_err(|(name, wait)| self.refuse(key, &name, Instant::now() + wait))
    }

    /// Counts one. `Err` is the name that it counts for, and when the next one may come.
    fn check(&self, name: &str, clock: &TokioClock) -> Result<(), (String, Duration)> {
        if self.limiter.len() >= MAX_KEYS {
            self.limiter.retain_recent();
        }
        // If that many are active, all further names share one count.
        let name = if self.limiter.len() < MAX_KEYS { name.to_owned() } else { String::new() };
        let checked = self.limiter.check_key(&name);
        checked.map_err(|early| (name, early.wait_time_from(clock.now())))
    }

    /// Counts a refusal, and returns how long the credential has to wait. The next one of this name may come at `first`.
    fn refuse(&self, key: [u8; 32], name: &str, first: Instant) -> Duration {
        self.refused.inc();
        let (now, mut schedule) = (Instant::now(), self.schedule.lock().unwrap_or_else(PoisonError::into_inner));
        schedule.time_for(&name.to_owned(), key, now, first, self.interval).saturating_duration_since(now)
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
