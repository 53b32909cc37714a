//! The circuit breaker. While a provider is down, callers get the verdict that opened the breaker, at once instead of after seconds.
//!
//! It measures the provider, never one tenant. A failure that a tenant's own model or an unusual value may have caused does not count. A breaker
//! that fewer than three organizations opened is open for these organizations alone. After an inconclusive trial probe, the next caller may
//! run one.
//!
//! Written by hand: libraries' breakers count calls. They do not know which organization made a call, or which results are inconclusive.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, SystemTime},
};

use serde::{Deserialize, Serialize};
use tokio::time::Instant;

use crate::{
    core::classify::Finding,
    domain::verdict::Verdict,
    domain::{duration, problem::Review},
    telemetry::{
        cause,
        metrics::{Collect, PROVIDER, Page},
    },
};

/// When a breaker opens, and for how long.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct BreakerSettings {
    /// This many failures in a row open it. One lost packet must not.
    pub failures: u32,
    /// How long it first stays open. After that, one trial probe may run.
    #[serde(with = "duration")]
    pub cool_down: Duration,
    /// Each failed trial probe doubles the cool-down, up to this. A repaired provider is noticed within this time.
    #[serde(with = "duration")]
    pub max_cool_down: Duration,
    /// A trial probe without a report is given up after this. It must be longer than any probe may take.
    #[serde(with = "duration")]
    pub trial: Duration,
}

/// How many breakers are kept. No registry has nearly as many providers.
const MAX_BREAKERS: usize = 10_000;
/// So many organizations must have seen failures before the breaker opens for all callers.
const MIN_SOURCES: usize = 3;

/// The source of a failure: the hash of an organization, or of the credential if the call names no organization.
pub(crate) type Source = [u8; 32];

/// The breakers, by the identity of the endpoint.
#[derive(Debug)]
pub(crate) struct Breakers {
    settings: BreakerSettings,
    states: Mutex<HashMap<[u8; 32], Breaker>>,
}

#[derive(Debug)]
struct Breaker {
    /// The provider's name. After a reload, one provider may have several breakers. The one that was used last is current.
    provider: String,
    last_used: Instant,
    /// When the provider last gave an answer.
    answered_at: Option<Instant>,
    state: BreakerState,
}

/// The verdict that opened a breaker.
#[derive(Debug, Clone)]
pub(crate) struct Opened {
    pub(crate) finding: Arc<Finding>,
    pub(crate) at: Instant,
    pub(crate) wall: SystemTime,
    /// When a trial probe may run.
    pub(crate) until: Instant,
    /// Another replica's breaker opened.
    pub(crate) shared: bool,
}

/// How a finding changed a breaker for all callers. A breaker that is open for a few organizations is not shared: it concerns no others.
#[derive(Debug)]
pub(crate) enum BreakerChange {
    /// It opened, or stays open for longer.
    Opened(Opened),
    /// The provider answers again.
    Closed,
}

/// An open breaker.
#[derive(Debug)]
struct Open {
    opened: Opened,
    /// How often it opened again without closing. Each time doubles the cool-down.
    reopenings: u32,
    /// A trial probe is running. Other callers still get the verdict.
    trial_running: bool,
}

#[derive(Debug)]
enum BreakerState {
    Closed {
        failures: u32,
        /// The distinct sources of the failures, at most as many as are needed to open it for all callers.
        sources: Vec<Source>,
        /// Set if it is open for these sources alone.
        open_for_sources: Option<Open>,
    },
    Open(Open),
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

// === impl BreakerSettings ===

impl BreakerSettings {
    /// Reports every setting that is out of bounds.
    pub fn review(&self, review: &mut Review<'_>) {
        review.number("failures", self.failures, 1, 1_000_000);
        let least = Duration::from_millis(100);
        for (key, length) in [("cool_down", self.cool_down), ("max_cool_down", self.max_cool_down), ("trial", self.trial)] {
            review.length(key, length, least, duration::MAX);
        }
        if self.cool_down > self.max_cool_down {
            review.error("cool_down", "must not be more than breaker.max_cool_down");
        }
    }
}

// === impl Breakers ===

impl Breakers {
    pub(crate) fn new(settings: BreakerSettings) -> Self {
        Self { settings, states: Mutex::default() }
    }

    /// How long another replica's opening counts here. What it met may be its own network's fault, so it cannot keep this replica from asking: it
    /// counts for the first cool-down, and not at all where this replica had an answer within the longest.
    pub(crate) fn others_count_for(&self, provider: &[u8; 32], now: Instant) -> Duration {
        let answered_at = self.lock().get(provider).and_then(|breaker| breaker.answered_at);
        let has_answered = answered_at.is_some_and(|at| now.saturating_duration_since(at) < self.settings.max_cool_down);
        if has_answered { Duration::ZERO } else { self.settings.cool_down }
    }

    /// `None`: the caller may probe, and must then call `report` or `abandon`.
    pub(crate) fn admit(&self, provider: [u8; 32], source: Source, now: Instant) -> Option<Opened> {
        let mut states = self.lock();
        let Breaker { state, last_used, .. } = states.get_mut(&provider)?;
        let open = match state {
            BreakerState::Closed { open_for_sources: None, .. } => return None,
            BreakerState::Closed { sources, open_for_sources: Some(open), .. } if sources.contains(&source) => open,
            BreakerState::Closed { .. } => return None,
            BreakerState::Open(open) => open,
        };
        if now < open.opened.until {
            return Some(open.opened.clone());
        }
        // The trial probe is given up at that time if it has not reported.
        open.opened.until = now + self.settings.trial;
        open.trial_running = true;
        *last_used = now;
        None
    }

    /// Counts the finding of a probe. `unusual`: the credential itself may have caused a failure.
    pub(crate) fn report(
        &self,
        provider: [u8; 32],
        name: &str,
        (source, unusual): (Source, bool),
        finding: &Arc<Finding>,
        now: Instant,
    ) -> Option<BreakerChange> {
        let mut states = self.lock();
        if states.len() >= MAX_BREAKERS && !states.contains_key(&provider) {
            // Most identities come from registries that are no longer loaded.
            states.clear();
        }
        let failure = is_failure(finding).filter(|failure| !(*failure && unusual));
        let breaker = match (states.get_mut(&provider), failure) {
            (Some(breaker), _) => breaker,
            // An inconclusive finding needs no breaker.
            (None, None) => return None,
            (None, Some(_)) => states.entry(provider).or_insert_with(|| Breaker {
                provider: name.to_owned(),
                last_used: now,
                answered_at: None,
                state: BreakerState::closed(),
            }),
        };
        breaker.last_used = now;
        let (was, opened_at) = (breaker.state.open_for(), breaker.state.opened_for_all().map(|opened| opened.at));
        match failure {
            None => breaker.state.end_trial(now),
            Some(false) => (breaker.state, breaker.answered_at) = (BreakerState::closed(), Some(now)),
            Some(true) => breaker.state.count_failure(&self.settings, source, finding, now),
        }
        log_change(name, was, breaker.state.open_for(), finding);
        match breaker.state.opened_for_all() {
            Some(opened) => (opened_at != Some(opened.at)).then(|| BreakerChange::Opened(opened.clone())),
            None => opened_at.map(|_| BreakerChange::Closed),
        }
    }

    /// Ends a probe that has no finding.
    pub(crate) fn abandon(&self, provider: &[u8; 32], now: Instant) {
        if let Some(breaker) = self.lock().get_mut(provider) {
            breaker.state.end_trial(now);
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<[u8; 32], Breaker>> {
        // A panic cannot leave a breaker inconsistent: every change is one assignment.
        self.states.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

// === impl BreakerState ===

impl BreakerState {
    const fn closed() -> Self {
        Self::Closed { failures: 0, sources: Vec::new(), open_for_sources: None }
    }

    /// For which callers it is open, as the log says it.
    const fn open_for(&self) -> Option<&'static str> {
        match self {
            Self::Open(_) => Some("everybody"),
            Self::Closed { open_for_sources: Some(_), .. } => Some("few"),
            Self::Closed { open_for_sources: None, .. } => None,
        }
    }

    /// The verdict that opened it for all callers.
    const fn opened_for_all(&self) -> Option<&Opened> {
        match self {
            Self::Open(open) => Some(&open.opened),
            Self::Closed { .. } => None,
        }
    }

    /// The trial probe was inconclusive: the next caller may run one.
    fn end_trial(&mut self, now: Instant) {
        if let Self::Open(open) | Self::Closed { open_for_sources: Some(open), .. } = self
            && open.trial_running
        {
            open.trial_running = false;
            open.opened.until = now;
        }
    }

    fn count_failure(&mut self, settings: &BreakerSettings, source: Source, finding: &Arc<Finding>, now: Instant) {
        match self {
            // This probe began before the breaker opened. Its failure is no news.
            Self::Open(open) if !open.trial_running => {}
            Self::Open(open) => *open = Open::new(settings, open.reopenings.saturating_add(1), finding, now),
            Self::Closed { failures, sources, open_for_sources } => {
                *failures = failures.saturating_add(1);
                let is_new = !sources.contains(&source);
                if is_new {
                    sources.push(source);
                }
                if *failures < settings.failures {
                    sources.truncate(MIN_SOURCES);
                    return;
                }
                if sources.len() >= MIN_SOURCES {
                    *self = Self::Open(Open::new(settings, 0, finding, now));
                    return;
                }
                match open_for_sources {
                    Some(open) if !open.trial_running && !is_new => {}
                    Some(open) => *open = Open::new(settings, open.reopenings.saturating_add(1), finding, now),
                    None => *open_for_sources = Some(Open::new(settings, 0, finding, now)),
                }
            }
        }
    }
}

// === impl Open ===

impl Open {
    fn new(settings: &BreakerSettings, reopenings: u32, finding: &Arc<Finding>, now: Instant) -> Self {
        let cool_down = settings.cool_down.saturating_mul(2_u32.saturating_pow(reopenings)).min(settings.max_cool_down);
        let opened =
            Opened { finding: Arc::clone(finding), at: now, wall: SystemTime::now(), until: now + cool_down, shared: false };
        Self { opened, reopenings, trial_running: false }
    }
}

impl Collect for Breakers {
    fn collect(&self, page: &mut Page) {
        let now = Instant::now();
        let states = self.lock();
        let mut newest: BTreeMap<&str, &Breaker> = BTreeMap::new();
        for breaker in states.values() {
            let newest = newest.entry(&breaker.provider).or_insert(breaker);
            if newest.last_used < breaker.last_used {
                *newest = breaker;
            }
        }
        let mut gauge =
            page.gauge("byokgate_breaker_state", "0 closed, 1 half-open: one trial is due or in flight, 2 open for everybody");
        for (provider, Breaker { state, .. }) in &newest {
            let number = match state {
                BreakerState::Closed { .. } => 0,
                BreakerState::Open(Open { opened, trial_running: false, .. }) if now < opened.until => 2_u64,
                BreakerState::Open(_) => 1,
            };
            gauge.add(&[(PROVIDER, provider)], number);
        }
        let mut few = page.gauge(
            "byokgate_breaker_open_for_organizations",
            "Organizations for which alone the breaker is open; 0 while it is closed, half-open, or open for everybody",
        );
        for (provider, Breaker { state, .. }) in &newest {
            let count =
                match state {
                    // As with the state above, one whose trial is due or in flight waits for the next call only.
                    BreakerState::Closed {
                        sources, open_for_sources: Some(Open { opened, trial_running: false, .. }), ..
                    } if now < opened.until => sources.len(),
                    BreakerState::Closed { .. } | BreakerState::Open(_) => 0,
                };
            few.add(&[(PROVIDER, provider)], count as u64);
        }
    }
}

/// Logs that a breaker opened or closed, and why.
fn log_change(provider: &str, was: Option<&str>, is: Option<&str>, finding: &Finding) {
    let Finding { verdict, status, cause: why, unreached, .. } = finding;
    let (verdict, cause) = (verdict.as_str(), why.map_or("", |why| why.as_str()));
    let unreached = unreached.map_or("", cause::unreached);
    match (was, is) {
        (was, Some("everybody")) if was != is => tracing::warn!(
            event = "breaker_opened",
            provider,
            verdict,
            upstream_status = status,
            cause,
            unreached,
            "the provider failed several times in a row; callers get this verdict at once until a trial probe is answered"
        ),
        (None, Some(_)) => tracing::warn!(
            event = "breaker_opened_for_few",
            provider,
            verdict,
            upstream_status = status,
            cause,
            unreached,
            "one or two organizations see the provider fail; the others still ask it"
        ),
        (Some(_), None) => tracing::info!(event = "breaker_closed", provider, verdict, "the provider answers again"),
        _ => {}
    }
}

/// Whether the finding is a failure of the provider. `None` if it is inconclusive.
pub(crate) fn is_failure(finding: &Finding) -> Option<bool> {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn an_own_answer_counts_for_more_than_another_replicas_breaker() {
        let settings = BreakerSettings::default();
        let (breakers, provider, source) = (Breakers::new(settings), [1; 32], [2; 32]);
        let report = |verdict| {
            let finding = Arc::new(Finding::bare(verdict));
            breakers.report(provider, "acme", (source, false), &finding, Instant::now());
        };
        let others = || breakers.others_count_for(&provider, Instant::now());
        assert_eq!(others(), settings.cool_down, "it was never asked");
        report(Verdict::Timeout);
        assert_eq!(others(), settings.cool_down, "it did not answer");
        report(Verdict::Invalid);
        tokio::time::advance(settings.max_cool_down.saturating_sub(Duration::from_millis(1))).await;
        report(Verdict::Timeout);
        report(Verdict::NotAttempted);
        assert_eq!(others(), Duration::ZERO);
        tokio::time::advance(Duration::from_millis(1)).await;
        assert_eq!(others(), settings.cool_down, "its answer is too old");
        assert_eq!(breakers.others_count_for(&[9; 32], Instant::now()), settings.cool_down, "of another provider");
    }
}
