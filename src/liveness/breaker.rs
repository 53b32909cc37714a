//! The circuit breaker: while a provider is down, its callers get the verdict that showed it, at once instead of after seconds.
//!
//! What counts is the provider, never one tenant. An answer that a tenant's own model or an unusual value may have caused does not count. An
//! opening that rests on fewer than three organizations holds for these alone. A trial that tells nothing of the provider leaves the breaker
//! ready for the next one.
//!
//! Written by hand: the breakers of libraries count calls, and know neither whose calls they are nor which answers say nothing.

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

/// When it opens, and for how long.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct BreakerSettings {
    /// This many failures in a row open it: fewer, and one lost packet would.
    pub failures: u32,
    /// How long it stays open at first; then one probe is let through.
    #[serde(with = "duration")]
    pub cool_down: Duration,
    /// Each failed probe doubles that, up to this: a repaired provider is noticed within it.
    #[serde(with = "duration")]
    pub max_cool_down: Duration,
    /// A probe that was let through and never reported is given up after this: longer than any probe may take.
    #[serde(with = "duration")]
    pub trial: Duration,
}

/// How many providers' breakers are kept: far more than any registry has.
const MAX_BREAKERS: usize = 10_000;
/// So many organizations must have seen a provider fail before it is taken to be down for all.
const MIN_SOURCES: usize = 3;

/// Who has seen a provider fail: an organization, or a credential where none is named. A hash.
pub(crate) type Source = [u8; 32];

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
    /// It is another replica's.
    pub(crate) shared: bool,
}

/// What a finding has done to a breaker for everybody. What holds for few is nobody else's.
#[derive(Debug)]
pub(crate) enum Shift {
    /// It is open: anew, or for longer.
    Opened(Opened),
    /// The provider answers again.
    Closed,
}

/// An open breaker.
#[derive(Debug)]
struct Open {
    opened: Opened,
    /// How often it was opened in a row.
    trips: u32,
    /// One probe is on its way; the others still get the verdict.
    trying: bool,
}

#[derive(Debug)]
enum State {
    Closed {
        failures: u32,
        /// Who saw them, as far as it matters: fewer than are needed to open it for all.
        sources: Vec<Source>,
        /// Open for these alone.
        held: Option<Open>,
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
    /// What is wrong with them.
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

    /// The longest that one stays open without a trial.
    pub(crate) const fn longest(&self) -> Duration {
        self.settings.max_cool_down
    }

    /// `None` lets a probe through, which must be reported.
    pub(crate) fn admit(&self, provider: [u8; 32], source: Source, now: Instant) -> Option<Opened> {
        let mut states = self.lock();
        let Breaker { state, touched, .. } = states.get_mut(&provider)?;
        let open = match state {
            State::Closed { held: None, .. } => return None,
            State::Closed { sources, held: Some(held), .. } if sources.contains(&source) => held,
            State::Closed { .. } => return None,
            State::Open(open) => open,
        };
        if now < open.opened.until {
            return Some(open.opened.clone());
        }
        // Until it reports, or is given up.
        open.opened.until = now + self.settings.trial;
        open.trying = true;
        *touched = now;
        None
    }

    /// What a probe of the provider with this name found. `unusual`: the value may have been the cause.
    pub(crate) fn report(
        &self,
        provider: [u8; 32],
        name: &str,
        (source, unusual): (Source, bool),
        finding: &Arc<Finding>,
        now: Instant,
    ) -> Option<Shift> {
        let mut states = self.lock();
        if states.len() >= MAX_BREAKERS && !states.contains_key(&provider) {
            // Identities of registries that are no longer loaded: they are forgotten together.
            states.clear();
        }
        let failed = failed(finding).filter(|failed| !(*failed && unusual));
        let breaker = match (states.get_mut(&provider), failed) {
            (Some(breaker), _) => breaker,
            // Nothing is known of it, and nothing was learnt.
            (None, None) => return None,
            (None, Some(_)) => states.entry(provider).or_insert_with(|| Breaker {
                provider: name.to_owned(),
                touched: now,
                state: State::closed(),
            }),
        };
        breaker.touched = now;
        let (was, opened_at) = (breaker.state.open_for(), breaker.state.open().map(|opened| opened.at));
        match failed {
            None => breaker.state.end_trial(now),
            Some(false) => breaker.state = State::closed(),
            Some(true) => breaker.state.count(&self.settings, source, finding, now),
        }
        tell(name, was, breaker.state.open_for(), finding);
        match breaker.state.open() {
            Some(opened) => (opened_at != Some(opened.at)).then(|| Shift::Opened(opened.clone())),
            None => opened_at.map(|_| Shift::Closed),
        }
    }

    /// A probe of the provider ended without a finding.
    pub(crate) fn abandon(&self, provider: &[u8; 32], now: Instant) {
        if let Some(breaker) = self.lock().get_mut(provider) {
            breaker.state.end_trial(now);
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<[u8; 32], Breaker>> {
        // No panic can leave a state half-changed: each change is one assignment.
        self.states.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

// === impl State ===

impl State {
    const fn closed() -> Self {
        Self::Closed { failures: 0, sources: Vec::new(), held: None }
    }

    /// For whom it is open.
    const fn open_for(&self) -> Option<&'static str> {
        match self {
            Self::Open(_) => Some("everybody"),
            Self::Closed { held: Some(_), .. } => Some("few"),
            Self::Closed { held: None, .. } => None,
        }
    }

    /// What opened it for everybody.
    const fn open(&self) -> Option<&Opened> {
        match self {
            Self::Open(open) => Some(&open.opened),
            Self::Closed { .. } => None,
        }
    }

    /// A trial told nothing: the next caller is the next one.
    fn end_trial(&mut self, now: Instant) {
        if let Self::Open(open) | Self::Closed { held: Some(open), .. } = self
            && open.trying
        {
            open.trying = false;
            open.opened.until = now;
        }
    }

    /// One more failure.
    fn count(&mut self, settings: &BreakerSettings, source: Source, finding: &Arc<Finding>, now: Instant) {
        match self {
            // A probe that began before it opened tells nothing new.
            Self::Open(open) if !open.trying => {}
            Self::Open(open) => *open = Open::again(settings, open.trips.saturating_add(1), finding, now),
            Self::Closed { failures, sources, held } => {
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
                    *self = Self::Open(Open::again(settings, 0, finding, now));
                    return;
                }
                match held {
                    Some(open) if !open.trying && !is_new => {}
                    Some(open) => *open = Open::again(settings, open.trips.saturating_add(1), finding, now),
                    None => *held = Some(Open::again(settings, 0, finding, now)),
                }
            }
        }
    }
}

// === impl Open ===

impl Open {
    fn again(settings: &BreakerSettings, trips: u32, finding: &Arc<Finding>, now: Instant) -> Self {
        let cool_down = settings.cool_down.saturating_mul(2_u32.saturating_pow(trips)).min(settings.max_cool_down);
        let opened =
            Opened { finding: Arc::clone(finding), at: now, wall: SystemTime::now(), until: now + cool_down, shared: false };
        Self { opened, trips, trying: false }
    }
}

impl Collect for Breakers {
    fn collect(&self, page: &mut Page) {
        let now = Instant::now();
        let states = self.lock();
        let mut newest: BTreeMap<&str, &Breaker> = BTreeMap::new();
        for breaker in states.values() {
            let newest = newest.entry(&breaker.provider).or_insert(breaker);
            if newest.touched < breaker.touched {
                *newest = breaker;
            }
        }
        let mut gauge =
            page.gauge("byokgate_breaker_state", "0 closed, 1 half-open: one trial is due or in flight, 2 open for everybody");
        for (provider, Breaker { state, .. }) in newest {
            let number = match state {
                State::Closed { .. } => 0,
                State::Open(Open { opened, trying: false, .. }) if now < opened.until => 2_u64,
                State::Open(_) => 1,
            };
            gauge.add(&[(PROVIDER, provider)], number);
        }
    }
}

/// Logs that a breaker has opened or closed, and why.
fn tell(provider: &str, was: Option<&str>, is: Option<&str>, finding: &Finding) {
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
        (None, Some(_)) => tracing::info!(
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

/// Whether this finding is the provider's failure; `None` if it says nothing of the provider.
pub(crate) fn failed(finding: &Finding) -> Option<bool> {
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
