//! Observations remembered for a short time: keyed hash, age per verdict, one probe per key, detached fill.
//!
//! moka holds and bounds them. Freshness is decided here, by tokio's clock, for two reasons: an age depends on who asks
//! (`max_liveness_age`, the hard maximum at PROVISION), and tests can then move time instead of waiting for it.

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use rand::Rng;
use tokio::time::Instant;

use crate::{
    assess::Inquiry,
    breaker::{BreakerSettings, Breakers, Opened},
    decision::{ServedFrom, Verdict, Withheld},
    engine::{Asker, Begun, Boxed, EarlierValid, LivenessSource, Observed, Question},
    flight::{Flights, Joined, Landing, Launch, wait},
    limits::{NewKeyLimits, NewKeys},
    liveness::Finding,
};

/// How long observations count, per verdict.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ages {
    /// VALID: revocation is seen within this time.
    pub valid: Duration,
    /// VALID, where a probe costs the tenant money.
    pub valid_paid: Duration,
    /// INVALID and FORBIDDEN: a repaired key is seen within this time.
    pub refused: Duration,
    /// TIMEOUT, UNREACHABLE.
    pub unanswered: Duration,
    /// PROVIDER_ERROR, UNEXPECTED_RESPONSE, QUOTA_EXHAUSTED, and RATE_LIMITED without a Retry-After.
    pub inconclusive: Duration,
    /// RATE_LIMITED: the provider's Retry-After, within these bounds.
    pub rate_limited: (Duration, Duration),
    /// A VALID past its age still counts at PROVISION, when there is no answer, up to this.
    pub hard_maximum: Duration,
    /// A caller's `max_liveness_age` is never taken for less than this.
    pub floor: Duration,
    /// The same, where a probe costs the tenant money.
    pub floor_paid: Duration,
    /// Each age is cut by up to this many percent, so that entries made together do not end together. Never longer: a configured
    /// age is a maximum.
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
            rate_limited: (Duration::from_secs(1), Duration::from_secs(60)),
            hard_maximum: Duration::from_secs(900),
            floor: Duration::from_secs(1),
            floor_paid: Duration::from_secs(60),
            jitter_percent: 20,
        }
    }
}

/// How many credentials are remembered.
const MAX_ENTRIES: u64 = 100_000;
/// How many probes may be under way at a time, over all providers.
const MAX_FLIGHTS: usize = 1024;

/// How the memory is kept, and what guards the providers behind it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct CacheSettings {
    /// How long observations count.
    pub ages: Ages,
    /// When a provider's breaker opens.
    pub breaker: BreakerSettings,
    /// How many new credentials may be judged.
    pub new_keys: NewKeyLimits,
}

/// A source that remembers.
pub struct Cache {
    asker: Arc<dyn Asker>,
    memory: moka::sync::Cache<Key, Remembered>,
    flights: Arc<Flights<Key, Timed>>,
    breakers: Arc<Breakers>,
    new_keys: NewKeys,
    ages: Ages,
    /// Made anew by every process: a key in a memory image tells nothing about a credential.
    hash_key: [u8; 32],
}

type Key = [u8; 32];

/// What is remembered under a key.
#[derive(Debug, Clone, Default)]
struct Remembered {
    latest: Option<Timed>,
    valid: Option<Timed>,
    refused_at: Option<Instant>,
}

/// A finding and when it was made.
#[derive(Debug, Clone)]
struct Timed {
    finding: Arc<Finding>,
    at: Instant,
    wall: SystemTime,
    fresh_for: Duration,
    /// The key that it stands under.
    key: Key,
}

// === impl Cache ===

impl Cache {
    /// Remembers what `asker` finds.
    pub fn new(asker: Arc<dyn Asker>, settings: CacheSettings) -> Self {
        let CacheSettings { ages, breaker, new_keys } = settings;
        let mut hash_key = [0; 32];
        rand::rng().fill(&mut hash_key);
        Self {
            asker,
            // LRU: the default policy may refuse a new entry under pressure, and a key that is never stored is probed forever.
            memory: moka::sync::Cache::builder()
                .max_capacity(MAX_ENTRIES)
                .eviction_policy(moka::policy::EvictionPolicy::lru())
                .time_to_live(ages.hard_maximum)
                .build(),
            flights: Flights::new(MAX_FLIGHTS),
            breakers: Arc::new(Breakers::new(breaker)),
            new_keys: NewKeys::new(new_keys),
            ages,
            hash_key,
        }
    }

    async fn observe(&self, inquiry: &Inquiry, max_age: Option<Duration>, deadline: Instant) -> Observed {
        let keys = self.keys(inquiry);
        // A flight for another model may land without an answer that holds for this one; then this one flies next.
        loop {
            if let Some(timed) = self.fresh(&keys, max_age) {
                return self.served(&keys, &timed, ServedFrom::Cache, max_age);
            }
            match self.flights.join(keys.flight(), |begun| self.launch(inquiry, &keys, max_age, begun)) {
                Joined::Already(timed) => return self.served(&keys, &timed, ServedFrom::Cache, max_age),
                Joined::Withheld(Barred::Open(opened)) => return self.by_the_breaker(&keys, &opened, max_age),
                Joined::Withheld(Barred::NewKeys(wait)) => {
                    let retry_after = wait.max(self.ages.floor);
                    return Observed { retry_after, ..self.unasked(&keys, Finding::withheld(Withheld::NewKeys), max_age) };
                }
                Joined::Full => return self.unasked(&keys, Finding::withheld(Withheld::Queue), max_age),
                Joined::Flight(flight) => match wait(flight, deadline).await {
                    Landing::Landed(timed) if keys.holds_for(&timed) => {
                        return self.served(&keys, &timed, ServedFrom::Probe, max_age);
                    }
                    Landing::Landed(_) => {}
                    Landing::TimedOut { begun: true } => return self.unasked(&keys, Finding::bare(Verdict::Timeout), max_age),
                    // It still waited for its turn: that is our doing, not the provider's.
                    Landing::TimedOut { begun: false } => {
                        return self.unasked(&keys, Finding::withheld(Withheld::Queue), max_age);
                    }
                    Landing::Lost => return self.unasked(&keys, Finding::withheld(Withheld::Fault), max_age),
                },
            }
        }
    }

    /// What the first caller of a key does: it takes what is there by now, is barred, or asks.
    fn launch(
        &self,
        inquiry: &Inquiry,
        keys: &Keys,
        max_age: Option<Duration>,
        begun: Begun,
    ) -> Launch<Timed, Barred, impl Future<Output = Timed> + Send + 'static> {
        if let Some(timed) = self.fresh(keys, max_age) {
            return Launch::Already(timed);
        }
        if let Some(opened) = self.breakers.admit(inquiry.target.identity, Instant::now()) {
            return Launch::Withheld(Barred::Open(opened));
        }
        let known = keys.all().into_iter().any(|key| self.memory.contains_key(&key));
        if let (false, Err(wait)) = (known, self.new_keys.count(&inquiry.caller, &inquiry.organization)) {
            return Launch::Withheld(Barred::NewKeys(wait));
        }
        Launch::Fly(self.fill(inquiry, keys, begun))
    }

    /// Asks, and stores what was found: the work of a flight.
    fn fill(&self, inquiry: &Inquiry, keys: &Keys, begun: Begun) -> impl Future<Output = Timed> + Send + 'static {
        let question = Question { target: Arc::new(inquiry.target.clone()), secret: Arc::clone(&inquiry.secret), begun };
        let (asker, breakers, provider) = (Arc::clone(&self.asker), Arc::clone(&self.breakers), inquiry.target.identity);
        let (memory, ages, keys) = (self.memory.clone(), self.ages, *keys);
        async move {
            let finding = asker.ask(question).await;
            let key = if finding.about_model { keys.with_model } else { keys.credential };
            let age = ages.fresh_for(&finding);
            // What the provider asked for is kept to the second.
            let fresh_for = if finding.retry_after.is_some() { age } else { ages.jittered(age) };
            let timed = Timed { finding: Arc::new(finding), at: Instant::now(), wall: SystemTime::now(), fresh_for, key };
            remember(&memory, &timed);
            breakers.report(provider, &timed.finding, timed.at);
            timed
        }
    }

    /// The newest observation that holds for these keys, if it is young enough.
    fn fresh(&self, keys: &Keys, max_age: Option<Duration>) -> Option<Timed> {
        let latest = keys.all().into_iter().filter_map(|key| self.memory.get(&key)?.latest).max_by_key(|timed| timed.at)?;
        let wanted = max_age.map_or(Duration::MAX, |max_age| max_age.max(self.ages.floor_of(&latest.finding)));
        (latest.at.elapsed() < latest.fresh_for.min(wanted)).then_some(latest)
    }

    /// The newest VALID that a PROVISION may still rest on: within the hard maximum and the caller's age, not refused since.
    fn earlier_valid(&self, keys: &Keys, max_age: Option<Duration>) -> Option<EarlierValid> {
        let entries: Vec<Remembered> = keys.all().into_iter().filter_map(|key| self.memory.get(&key)).collect();
        let refused_at = entries.iter().filter_map(|entry| entry.refused_at).max();
        let valid = entries.into_iter().filter_map(|entry| entry.valid).max_by_key(|timed| timed.at)?;
        let age = valid.at.elapsed();
        let wanted = max_age.map_or(Duration::MAX, |max_age| max_age.max(self.ages.floor_of(&valid.finding)));
        let counts = age <= self.ages.hard_maximum.min(wanted) && refused_at.is_none_or(|refused_at| refused_at < valid.at);
        counts.then(|| EarlierValid { finding: (*valid.finding).clone(), observed_at: valid.wall, age })
    }

    fn served(&self, keys: &Keys, timed: &Timed, served_from: ServedFrom, max_age: Option<Duration>) -> Observed {
        let age = timed.at.elapsed();
        Observed {
            finding: (*timed.finding).clone(),
            observed_at: timed.wall,
            age,
            served_from,
            // Asking again sooner would only be served from here.
            retry_after: timed.fresh_for.saturating_sub(age).max(self.ages.floor),
            earlier_valid: self.earlier_valid(keys, max_age),
        }
    }

    /// The verdict that opened the breaker.
    fn by_the_breaker(&self, keys: &Keys, opened: &Opened, max_age: Option<Duration>) -> Observed {
        Observed {
            finding: (*opened.finding).clone(),
            observed_at: opened.wall,
            age: opened.at.elapsed(),
            served_from: ServedFrom::Breaker,
            retry_after: opened.until.saturating_duration_since(Instant::now()).max(self.ages.floor),
            earlier_valid: self.earlier_valid(keys, max_age),
        }
    }

    /// A verdict of ours about not having an answer. It is never remembered and replaces nothing.
    fn unasked(&self, keys: &Keys, finding: Finding, max_age: Option<Duration>) -> Observed {
        Observed {
            finding,
            observed_at: SystemTime::now(),
            age: Duration::ZERO,
            served_from: ServedFrom::Probe,
            retry_after: self.ages.unanswered,
            earlier_valid: self.earlier_valid(keys, max_age),
        }
    }

    fn keys(&self, inquiry: &Inquiry) -> Keys {
        let hash = |model: Option<&str>| {
            let mut hasher = blake3::Hasher::new_keyed(&self.hash_key);
            hasher.update(&inquiry.target.identity);
            for part in [model.unwrap_or_default().as_bytes(), inquiry.secret.expose().as_bytes()] {
                hasher.update(&part.len().to_le_bytes()).update(part);
            }
            hasher.update(&[u8::from(model.is_some())]);
            *hasher.finalize().as_bytes()
        };
        Keys {
            credential: hash(None),
            with_model: hash(Some(&inquiry.model)),
            always_about_model: inquiry.target.calls.first().is_some_and(|call| call.names_model),
        }
    }
}

impl LivenessSource for Cache {
    fn observe<'a>(&'a self, inquiry: &'a Inquiry, max_age: Option<Duration>, deadline: Instant) -> Boxed<'a, Observed> {
        Box::pin(self.observe(inquiry, max_age, deadline))
    }
}

/// Stores an observation. Only the flight of a key writes under it, so reading and writing back is no race.
fn remember(memory: &moka::sync::Cache<Key, Remembered>, timed: &Timed) {
    let mut entry = memory.get(&timed.key).unwrap_or_default();
    match timed.finding.verdict {
        Verdict::Valid => entry.valid = Some(timed.clone()),
        Verdict::Invalid | Verdict::Forbidden => {
            entry.valid = None;
            entry.refused_at = Some(timed.at);
        }
        // Not ours to remember: nothing was asked.
        Verdict::NotAttempted => return,
        Verdict::QuotaExhausted
        | Verdict::RateLimited
        | Verdict::ProviderError
        | Verdict::UnexpectedResponse
        | Verdict::Timeout
        | Verdict::Unreachable
        | Verdict::NoServerSurface
        | Verdict::NotCalibrated
        | Verdict::ProbeDisabled => {}
    }
    entry.latest = Some(timed.clone());
    memory.insert(timed.key, entry);
}

/// Why a first caller does not ask.
#[derive(Debug)]
enum Barred {
    /// The provider's breaker is open.
    Open(Opened),
    /// Too many new credentials; another may come after this time.
    NewKeys(Duration),
}

/// Under which keys an observation may stand.
#[derive(Debug, Clone, Copy)]
struct Keys {
    /// Of the credential, with any model.
    credential: Key,
    /// Of the credential with this model.
    with_model: Key,
    /// The first probe already names the model.
    always_about_model: bool,
}

// === impl Keys ===

impl Keys {
    /// One probe per credential at a time, whatever the model; where every probe names the model, per model.
    fn flight(&self) -> Key {
        if self.always_about_model { self.with_model } else { self.credential }
    }

    fn all(&self) -> [Key; 2] {
        [self.credential, self.with_model]
    }

    fn holds_for(&self, timed: &Timed) -> bool {
        self.all().contains(&timed.key)
    }
}

// === impl Ages ===

impl Ages {
    fn fresh_for(&self, finding: &Finding) -> Duration {
        match finding.verdict {
            // An endpoint that cannot tell is asked as rarely as one that said yes.
            Verdict::Valid | Verdict::NotCalibrated if finding.cost_money => self.valid_paid,
            Verdict::Valid | Verdict::NotCalibrated => self.valid,
            Verdict::Invalid | Verdict::Forbidden => self.refused,
            Verdict::Timeout | Verdict::Unreachable => self.unanswered,
            Verdict::RateLimited => {
                finding.retry_after.map_or(self.inconclusive, |wanted| wanted.clamp(self.rate_limited.0, self.rate_limited.1))
            }
            Verdict::ProviderError | Verdict::UnexpectedResponse | Verdict::QuotaExhausted => self.inconclusive,
            Verdict::NotAttempted | Verdict::NoServerSurface | Verdict::ProbeDisabled => Duration::ZERO,
        }
    }

    fn jittered(&self, age: Duration) -> Duration {
        let cut = f64::from(self.jitter_percent.min(100)) / 100.0;
        age.mul_f64(1.0 - cut * rand::rng().random_range(0.0..=1.0))
    }

    fn floor_of(&self, finding: &Finding) -> Duration {
        if finding.cost_money { self.floor_paid } else { self.floor }
    }
}
