//! How much is asked of each provider: probes in flight, a queue, calls per second. And when a credential's turn is expected, where it has
//! to come later.
//!
//! Written by hand: libraries that limit rates say whether one more may begin now, and what is needed here is when the hundredth will.

use std::{
    collections::{BTreeMap, HashMap},
    num::NonZeroU32,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use serde::{Deserialize, Serialize};
use tokio::{
    sync::{Semaphore, SemaphorePermit},
    time::{Instant, sleep_until, timeout_at},
};

use super::turns::{Turns, spread};
use crate::{
    core::{
        classify::Finding,
        engine::{Boxed, ProbeRequest, Prober},
    },
    domain::verdict::{Verdict, Withheld},
    domain::{duration, problem::Review},
    telemetry::metrics::{Collect, Histogram, PROVIDER, Page},
};

/// What may be asked of each provider.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ProviderLimits {
    /// Probes in flight at a time, at most: with a second's calls at a time a slow vendor is still asked as often as it may be.
    pub in_flight: usize,
    /// A vendor that answers 429 or 5xx, or not in time, is asked fewer at a time, each time half as many, down to this.
    pub in_flight_floor: usize,
    /// Probes that wait for their turn; beyond it the answer is NOT_ATTEMPTED at once.
    pub queue: usize,
    /// The longest that one waits for its turn: no caller waits longer than that either.
    #[serde(with = "duration")]
    pub queue_time: Duration,
    /// Calls begun per second, with as many at once: vendors' own limits are per key, what this spares is our address's name.
    pub per_second: NonZeroU32,
}

/// What a probe is taken to take before any has ended.
const USUAL_LATENCY: Duration = Duration::from_millis(500);
/// So long without a setback, and a vendor is tried with twice as many at a time again, and not with one more.
const CALM: Duration = Duration::from_secs(60);

/// How much of the queue's time may be taken, as estimates go wrong: by those who were told to come, and by others while such are awaited.
const TOLD_TO_COME: f64 = 0.75;
const NEW: f64 = 0.5;

impl Default for ProviderLimits {
    fn default() -> Self {
        Self {
            in_flight: 64,
            in_flight_floor: 8,
            queue: 512,
            queue_time: Duration::from_secs(5),
            per_second: NonZeroU32::MIN.saturating_add(99),
        }
    }
}

impl ProviderLimits {
    /// The part of one of so many replicas, at least one of each.
    #[must_use]
    pub fn of_one(self, replicas: NonZeroU32) -> Self {
        let part = |of: usize| of.div_ceil(usize::try_from(replicas.get()).unwrap_or(usize::MAX));
        Self {
            in_flight: part(self.in_flight),
            in_flight_floor: part(self.in_flight_floor),
            per_second: part_of(self.per_second, replicas),
            ..self
        }
    }

    /// What is wrong with them.
    pub fn review(&self, review: &mut Review<'_>) {
        review.number("in_flight", self.in_flight, 1, 1_000_000);
        review.number("in_flight_floor", self.in_flight_floor, 1, 1_000_000);
        review.number("queue", self.queue, 1, 1_000_000);
        review.length("queue_time", self.queue_time, Duration::from_millis(100), duration::MAX);
    }
}

/// The part of one of so many, at least 1.
pub(super) const fn part_of(whole: NonZeroU32, replicas: NonZeroU32) -> NonZeroU32 {
    NonZeroU32::MIN.saturating_add((whole.get() - 1) / replicas.get())
}

/// An asker that asks no more than it may.
pub struct ProviderLimiter {
    inner: Arc<dyn Prober>,
    limits: ProviderLimits,
    slots: Mutex<HashMap<String, Arc<ProviderSlot>>>,
}

struct ProviderSlot {
    limits: ProviderLimits,
    places: Semaphore,
    /// For a place.
    waiting: AtomicUsize,
    /// With a place and a time to begin at.
    pacing: AtomicUsize,
    state: Mutex<State>,
    /// How long the provider took, without what waiting there was.
    took: Histogram,
}

/// What is known of a provider's pace.
#[derive(Debug)]
struct State {
    in_flight: InFlight,
    pace: Pace,
    turns: Turns<()>,
}

/// How many may be in flight: twice as many with each round of answers until the first setback, one more with each round after it, half as
/// many at each setback. So TCP finds what a path can carry, and Netflix's limiter what a server can.
#[derive(Debug)]
struct InFlight {
    floor: usize,
    ceiling: usize,
    limit: usize,
    /// How many places there are: more than the limit until as many have come back.
    places: usize,
    asking: usize,
    /// Answers of this round, which is as long as the limit was when it began, and how many were asking at a time in it.
    answers: usize,
    round: usize,
    most: usize,
    /// Before the first setback, or long after the last one.
    doubling: bool,
    set_back: Option<Instant>,
    /// How long a probe takes, the last ones counting most.
    latency: Option<Duration>,
    /// How many have told.
    told: usize,
}

/// When calls may begin: as many at once as a second may have, then one after the other.
#[derive(Debug)]
struct Pace {
    apart: Duration,
    burst: Duration,
    /// When the whole of the burst is there again.
    full: Instant,
}

/// How long a probe will wait, for a place and for the budget of calls per second.
#[derive(Debug, Clone, Copy)]
struct Expected {
    place: Duration,
    budget: Duration,
}

/// One of those who are counted.
struct Counted<'g>(&'g AtomicUsize);

/// A probe that asks. Dropped without a finding, nothing was learnt.
struct Asking<'s> {
    slot: &'s ProviderSlot,
    place: Option<SemaphorePermit<'s>>,
    began: Instant,
    finding: Option<(Verdict, bool)>,
}

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
        let inner = Arc::clone(&self.inner);
        Box::pin(async move {
            // Taken before the first await: how many wait is known at once.
            let (waiting, answer_at) = match slot.queue_up(request.credential) {
                Ok(queued) => queued,
                Err(finding) => return finding,
            };
            request.started.expect_answer_at(answer_at);
            let by = Instant::now() + slot.limits.queue_time;
            let Ok(Ok(place)) = timeout_at(by, slot.places.acquire()).await else {
                return withheld(Withheld::Queue, slot.turn(request.credential));
            };
            let begin = slot.state().pace.reserve(Instant::now(), by);
            drop(waiting);
            let Some(begin) = begin else { return withheld(Withheld::Budget, slot.turn(request.credential)) };
            if begin > Instant::now() {
                let _pacing = Counted::one_more(&slot.pacing);
                sleep_until(begin).await;
            }
            let mut asking = Asking::begin(&slot, place);
            let finding = inner.probe(request).await;
            asking.finding = Some((finding.verdict, finding.about_model));
            finding
        })
    }

    fn expected_wait(&self, provider: &str) -> Duration {
        let slot = self.slots.lock().unwrap_or_else(PoisonError::into_inner).get(provider).map(Arc::clone);
        slot.map_or(Duration::ZERO, |slot| slot.expected(slot.waiting.load(Ordering::Relaxed)).longest())
    }

    fn turn(&self, provider: &str, credential: [u8; 32]) -> Duration {
        let slot = self.slot(provider);
        slot.turn_behind(credential, slot.limits.queue)
    }
}

/// Not asked; its turn is then.
fn withheld(why: Withheld, wait: Duration) -> Finding {
    Finding { retry_after: Some(spread(wait)), ..Finding::withheld(why) }
}

impl Collect for ProviderLimiter {
    fn collect(&self, page: &mut Page) {
        let slots: BTreeMap<String, Arc<ProviderSlot>> = {
            let slots = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
            slots.iter().map(|(name, slot)| (name.clone(), Arc::clone(slot))).collect()
        };
        for (provider, slot) in &slots {
            let labels = [(PROVIDER, provider.as_str())];
            let (limit, places) = {
                let in_flight = &slot.state().in_flight;
                (in_flight.limit, in_flight.places)
            };
            page.gauge("byokgate_probes_in_flight", "Probes in a slot, running or waiting for provider_limits.per_second")
                .add(&labels, places.saturating_sub(slot.places.available_permits()));
            page.gauge("byokgate_probes_in_flight_limit", "Slots, as many as the provider's answers allow").add(&labels, limit);
            page.gauge("byokgate_probes_queued", "Probes that wait for a slot or for provider_limits.per_second")
                .add(&labels, slot.waiting.load(Ordering::Relaxed) + slot.pacing.load(Ordering::Relaxed));
            if let Some(took) = slot.took.value() {
                page.histogram(
                    "byokgate_probe_duration_seconds",
                    "All probes of one check of a credential, without the wait for a slot",
                )
                .add(&labels, took);
            }
        }
    }
}

// === impl ProviderSlot ===

impl ProviderSlot {
    fn new(limits: ProviderLimits) -> Self {
        let in_flight = InFlight::new(limits);
        Self {
            limits,
            places: Semaphore::new(in_flight.places),
            waiting: AtomicUsize::new(0),
            pacing: AtomicUsize::new(0),
            state: Mutex::new(State { in_flight, pace: Pace::new(limits.per_second), turns: Turns::default() }),
            took: Histogram::default(),
        }
    }

    /// A place in the queue, and when its answer is expected. One that would not come to its turn in time does not wait for it in vain.
    fn queue_up(&self, credential: [u8; 32]) -> Result<(Counted<'_>, Instant), Finding> {
        let ahead = self.waiting.load(Ordering::Relaxed);
        // A probe that need not wait passes through the queue as well, so that a limit of 0 would stop everything.
        let place = Counted::one_more(&self.waiting);
        let (expected, now) = (self.expected(ahead), Instant::now());
        let mut state = self.state();
        // Who was told to come now goes before who has just come.
        let is_new = state.turns.are_outstanding(&(), now) && !state.turns.is_due(&credential, now + self.head_start());
        let longest = self.limits.queue_time.mul_f64(if is_new { NEW } else { TOLD_TO_COME });
        // Its answer has to come while somebody waits for it; a vendor that takes half of that time or longer is waited for all the same.
        let longest = longest - state.in_flight.latency().min(longest / 2);
        if ahead < self.limits.queue && expected.longest() <= longest {
            state.turns.done(&credential);
            return Ok((place, now + expected.longest() + state.in_flight.latency()));
        }
        drop((state, place));
        let why = if ahead < self.limits.queue && expected.budget > expected.place { Withheld::Budget } else { Withheld::Queue };
        Err(withheld(why, self.turn(credential)))
    }

    /// How long one waits with so many ahead of it.
    fn expected(&self, ahead: usize) -> Expected {
        let state = self.state();
        let behind = (ahead + 1).saturating_sub(self.places.available_permits());
        // As long as little is known of its latency nobody is turned away for it: the first probes make connections, and take longer.
        let behind = if state.in_flight.is_known() { behind } else { 0 };
        Expected {
            place: state.in_flight.apart().saturating_mul(u32::try_from(behind).unwrap_or(u32::MAX)),
            budget: state.pace.due(Instant::now(), ahead),
        }
    }

    /// How long this credential should stay away: until its turn, less the half of what it may wait here, so that there is always somebody
    /// in the queue.
    fn turn(&self, credential: [u8; 32]) -> Duration {
        self.turn_behind(credential, self.waiting.load(Ordering::Relaxed))
    }

    /// The same, with so many ahead of it.
    fn turn_behind(&self, credential: [u8; 32], ahead: usize) -> Duration {
        let (now, end) = (Instant::now(), self.expected(ahead).longest());
        let mut state = self.state();
        let apart = state.in_flight.apart().max(state.pace.apart);
        let turn = state.turns.give(&(), credential, now, now + end, apart);
        turn.saturating_duration_since(now + self.head_start())
    }

    fn head_start(&self) -> Duration {
        self.limits.queue_time / 2
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // No panic can leave it half-changed: each part of it stands by itself.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Expected {
    fn longest(self) -> Duration {
        self.place.max(self.budget)
    }
}

impl<'g> Counted<'g> {
    fn one_more(count: &'g AtomicUsize) -> Self {
        count.fetch_add(1, Ordering::Relaxed);
        Self(count)
    }
}

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl<'s> Asking<'s> {
    fn begin(slot: &'s ProviderSlot, place: SemaphorePermit<'s>) -> Self {
        slot.state().in_flight.begin();
        Self { slot, place: Some(place), began: Instant::now(), finding: None }
    }
}

impl Drop for Asking<'_> {
    fn drop(&mut self) {
        let (slot, now) = (self.slot, Instant::now());
        let mut state = slot.state();
        let in_flight = &mut state.in_flight;
        if let Some((verdict, about_model)) = self.finding {
            slot.took.observe(now - self.began);
            // What a tenant's own model did says nothing of the provider.
            in_flight.learn(self.began, now, is_setback(verdict).filter(|_| !about_model));
        }
        in_flight.asking = in_flight.asking.saturating_sub(1);
        // Under the lock, so that limit and places change together.
        if in_flight.places > in_flight.limit {
            if let Some(place) = self.place.take() {
                place.forget();
            }
            in_flight.places -= 1;
        } else {
            slot.places.add_permits(in_flight.limit - in_flight.places);
            in_flight.places = in_flight.limit;
        }
    }
}

/// Whether the provider has too much to do; `None` if this says nothing of it.
const fn is_setback(verdict: Verdict) -> Option<bool> {
    match verdict {
        Verdict::RateLimited | Verdict::ProviderError | Verdict::Timeout => Some(true),
        Verdict::NotAttempted | Verdict::Unreachable | Verdict::NoServerSurface | Verdict::ProbeDisabled => None,
        Verdict::Valid
        | Verdict::Invalid
        | Verdict::Forbidden
        | Verdict::QuotaExhausted
        | Verdict::UnexpectedResponse
        | Verdict::NotCalibrated => Some(false),
    }
}

// === impl InFlight ===

impl InFlight {
    fn new(limits: ProviderLimits) -> Self {
        let ceiling = limits.in_flight;
        let floor = limits.in_flight_floor.min(ceiling);
        Self {
            floor,
            ceiling,
            limit: floor,
            places: floor,
            asking: 0,
            answers: 0,
            round: floor,
            most: 0,
            doubling: true,
            set_back: None,
            latency: None,
            told: 0,
        }
    }

    fn begin(&mut self) {
        self.asking += 1;
        self.most = self.most.max(self.asking);
    }

    /// What one probe showed.
    fn learn(&mut self, began: Instant, now: Instant, setback: Option<bool>) {
        let Some(setback) = setback else { return };
        let took = now - began;
        self.latency = Some(self.latency.map_or(took, |known| (known * 7 + took) / 8));
        self.told = self.told.saturating_add(1);
        if setback {
            // Those that were under way at the last one belong to it.
            if self.set_back.is_none_or(|last| began >= last) {
                self.limit = (self.limit / 2).max(self.floor);
                (self.doubling, self.set_back) = (false, Some(now));
                self.begin_round();
            }
            return;
        }
        self.doubling |= self.set_back.is_some_and(|last| now - last > CALM);
        self.answers += 1;
        let ends = self.answers >= self.round;
        // Far fewer than may be say nothing of how many could be.
        if self.most * 2 >= self.limit && (self.doubling || ends) {
            self.limit = (self.limit + 1).min(self.ceiling);
        }
        if ends {
            self.begin_round();
        }
    }

    fn begin_round(&mut self) {
        (self.answers, self.round, self.most) = (0, self.limit, self.asking);
    }

    /// More than two rounds of the fewest have told how long it takes.
    const fn is_known(&self) -> bool {
        self.told >= 2 * self.floor
    }

    fn latency(&self) -> Duration {
        self.latency.unwrap_or(USUAL_LATENCY)
    }

    /// How far apart answers come while all places are taken: as many as there will be soon.
    fn apart(&self) -> Duration {
        let places = if self.doubling { self.ceiling } else { self.limit };
        self.latency() / u32::try_from(places).unwrap_or(u32::MAX).max(1)
    }
}

// === impl Pace ===

impl Pace {
    fn new(per_second: NonZeroU32) -> Self {
        let apart = Duration::from_secs(1) / per_second.get();
        Self { apart, burst: Duration::from_secs(1).saturating_sub(apart), full: Instant::now() }
    }

    /// How long until a call may begin that has so many ahead of it.
    fn due(&self, now: Instant, ahead: usize) -> Duration {
        let ahead = self.apart.saturating_mul(u32::try_from(ahead).unwrap_or(u32::MAX));
        (self.full.saturating_duration_since(now) + ahead).saturating_sub(self.burst)
    }

    /// When the next call may begin, if that is by then. It is taken to do so.
    fn reserve(&mut self, now: Instant, by: Instant) -> Option<Instant> {
        let begin = now + self.due(now, 0);
        if begin > by {
            return None;
        }
        self.full = self.full.max(now) + self.apart;
        Some(begin)
    }
}
