//! The circuit breaker: while a provider is down, its callers get the verdict that showed it, at once instead of after seconds.
//!
//! What counts is the provider, never one tenant: an answer that rests on the tenant's own model says nothing of the provider, so
//! a single slow model opens no breaker for everybody.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, SystemTime},
};

use tokio::time::Instant;

use crate::{
    core::classify::Finding,
    domain::verdict::Verdict,
    telemetry::metrics::{Measured, PROVIDER, Page},
};

/// When it opens, and for how long.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BreakerSettings {
    /// This many failures in a row open it: fewer, and one lost packet would.
    pub failures: u32,
    /// How long it stays open at first; then one probe is let through.
    pub cool_down: Duration,
    /// Each failed probe doubles that, up to this: a repaired provider is noticed within it.
    pub max_cool_down: Duration,
    /// A probe that was let through and never reported is given up after this: longer than any probe may take.
    pub trial: Duration,
}

/// How many providers' breakers are kept: far more than any registry has.
const MAX_BREAKERS: usize = 10_000;

/// Every provider's breaker, by the identity of what is asked.
#[derive(Debug)]
pub(crate) struct Breakers {
    settings: BreakerSettings,
    states: Mutex<HashMap<[u8; 32], Breaker>>,
}

#[derive(Debug)]
struct Breaker {
    /// Whose it is. After a reload there may be several of one provider: the one that was touched last is in use.
    provider: String,
    touched: Instant,
    state: State,
}

/// The verdict that opened a breaker.
#[derive(Debug, Clone)]
pub(crate) struct Opened {
    pub(crate) finding: Arc<Finding>,
    pub(crate) at: Instant,
    pub(crate) wall: SystemTime,
    /// When a probe is let through again.
    pub(crate) until: Instant,
}

#[derive(Debug)]
enum State {
    Closed {
        failures: u32,
    },
    Open {
        opened: Opened,
        trips: u32,
    },
    /// One probe is on its way; the others still get the verdict.
    Trying {
        opened: Opened,
        trips: u32,
    },
}

impl Default for BreakerSettings {
    fn default() -> Self {
        Self {
            failures: 5,
            cool_down: Duration::from_secs(5),
            max_cool_down: Duration::from_secs(60),
            trial: Duration::from_secs(20),
        }
    }
}

// === impl Breakers ===

impl Breakers {
    pub(crate) fn new(settings: BreakerSettings) -> Self {
        Self { settings, states: Mutex::default() }
    }

    /// `None` lets a probe through, which must be reported.
    pub(crate) fn admit(&self, provider: [u8; 32], now: Instant) -> Option<Opened> {
        let mut states = self.lock();
        let Breaker { state, touched, .. } = states.get_mut(&provider)?;
        match state {
            State::Closed { .. } => None,
            State::Open { opened, .. } | State::Trying { opened, .. } if now < opened.until => Some(opened.clone()),
            State::Open { opened, trips } | State::Trying { opened, trips } => {
                // Until it reports, or is given up.
                let opened = Opened { until: now + self.settings.trial, ..opened.clone() };
                *touched = now;
                *state = State::Trying { opened, trips: *trips };
                None
            }
        }
    }

    /// What a probe of the provider with this name found.
    pub(crate) fn report(&self, provider: [u8; 32], name: &str, finding: &Arc<Finding>, now: Instant) {
        let mut states = self.lock();
        let Some(failed) = failed(finding) else { return };
        if states.len() >= MAX_BREAKERS && !states.contains_key(&provider) {
            // Identities of registries that are no longer loaded: they are forgotten together.
            states.clear();
        }
        let breaker = states.entry(provider).or_insert_with(|| Breaker {
            provider: name.to_owned(),
            touched: now,
            state: State::Closed { failures: 0 },
        });
        breaker.touched = now;
        let state = &mut breaker.state;
        if !failed {
            *state = State::Closed { failures: 0 };
            return;
        }
        let trips = match state {
            State::Closed { failures } => {
                *failures += 1;
                if *failures < self.settings.failures {
                    return;
                }
                0
            }
            // A probe that began before it opened tells nothing new.
            State::Open { .. } => return,
            State::Trying { trips, .. } => trips.saturating_add(1),
        };
        let cool_down = self.settings.cool_down.saturating_mul(2_u32.saturating_pow(trips)).min(self.settings.max_cool_down);
        let opened = Opened { finding: Arc::clone(finding), at: now, wall: SystemTime::now(), until: now + cool_down };
        *state = State::Open { opened, trips };
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<[u8; 32], Breaker>> {
        // No panic can leave a state half-changed: each change is one assignment.
        self.states.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Measured for Breakers {
    fn tell(&self, page: &mut Page) {
        let now = Instant::now();
        let states = self.lock();
        let mut newest: BTreeMap<&str, &Breaker> = BTreeMap::new();
        for breaker in states.values() {
            let newest = newest.entry(&breaker.provider).or_insert(breaker);
            if newest.touched < breaker.touched {
                *newest = breaker;
            }
        }
        let mut gauge = page.gauge("byokgate_breaker_state", "0 closed, 1 half-open: one trial is due or under way, 2 open");
        for (provider, Breaker { state, .. }) in newest {
            let number = match state {
                State::Closed { .. } => 0,
                State::Open { opened, .. } if now < opened.until => 2_u64,
                State::Open { .. } | State::Trying { .. } => 1,
            };
            gauge.add(&[(PROVIDER, provider)], number);
        }
    }
}

/// Whether this finding is the provider's failure; `None` if it says nothing of the provider.
fn failed(finding: &Finding) -> Option<bool> {
    match finding.verdict {
        Verdict::Timeout | Verdict::Unreachable | Verdict::ProviderError => (!finding.about_model).then_some(true),
        Verdict::NotAttempted => None,
        Verdict::Valid
        | Verdict::Invalid
        | Verdict::Forbidden
        | Verdict::QuotaExhausted
        | Verdict::RateLimited
        | Verdict::UnexpectedResponse
        | Verdict::NoServerSurface
        | Verdict::NotCalibrated
        | Verdict::ProbeDisabled => Some(false),
    }
}
