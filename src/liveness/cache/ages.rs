//! How long an observation is used: the maximum age of each verdict, and the rules.

use std::{sync::Arc, time::Duration};

use rand::Rng;
use serde::{Deserialize, Serialize};
use tokio::time::Instant;

use super::entries::{CachedEntries, TimedFinding};
use crate::{
    core::classify::Finding,
    domain::{duration, problem::Review, verdict::Verdict},
};

/// With an age of zero, every decision would probe.
const MIN_AGE: Duration = Duration::from_secs(1);

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

// === impl Ages ===

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

    /// The newest observation and its age, if it is fresh enough.
    pub(super) fn fresh<'k>(
        &self,
        known: &'k CachedEntries,
        max_age: Option<Duration>,
        now: Instant,
    ) -> Option<(&'k Arc<TimedFinding>, Duration)> {
        let latest = known.entries().filter_map(|entry| entry.latest.as_ref()).max_by_key(|timed| timed.at)?;
        // Another replica's refusal leaves only its time here, and may have been found under the other key.
        if latest.finding.verdict == Verdict::Valid && known.is_refused_since(latest.at) {
            return None;
        }
        let age = now - latest.at;
        self.is_fresh(latest, age, max_age).then_some((latest, age))
    }

    fn is_fresh(&self, timed: &TimedFinding, age: Duration, max_age: Option<Duration>) -> bool {
        let wanted = max_age.map_or(Duration::MAX, |max_age| max_age.max(self.floor_of(&timed.finding)));
        age < timed.fresh_for.min(wanted)
    }

    /// Whether a flight's result answers a caller that waited. Another replica's observation may be older than this caller allows.
    pub(super) fn serves(&self, timed: &TimedFinding, max_age: Option<Duration>) -> bool {
        !timed.shared || self.is_fresh(timed, timed.at.elapsed(), max_age)
    }

    pub(super) fn fresh_for(&self, finding: &Finding) -> Duration {
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

    pub(super) fn jittered(&self, age: Duration) -> Duration {
        let cut = f64::from(self.jitter_percent.min(100)) / 100.0;
        age.mul_f64(1.0 - cut * rand::rng().random_range(0.0..=1.0))
    }

    pub(super) fn floor_of(&self, finding: &Finding) -> Duration {
        if finding.cost_money { self.floor_paid } else { self.floor }
    }
}
