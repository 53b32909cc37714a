//! Limits per provider: probes in flight, a queue, and a rate limit of probes per second. A probe that is not admitted gets a retry time.
//!
//! With a shared tier, the rate limit holds over all replicas: the request that gives the lease also reserves the probe's start. This replica's
//! own share of the rate then counts only for probes without a reservation, as while the tier fails.
//!
//! Written by hand: libraries' rate limiters say whether one more call may start now. Here a caller must know when the hundredth in the queue
//! will start.

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
use tokio::time::{Instant, sleep_until, timeout_at};

use super::{
    retry_schedule::{RetrySchedule, spread},
    slots::{FairSlots, Slot, Source},
};
use crate::{
    core::{
        classify::Finding,
        engine::{Boxed, ProbeRequest, Prober},
    },
    domain::verdict::{Verdict, Withheld},
    domain::{duration, problem::Review},
    telemetry::metrics::{Collect, Histogram, PROVIDER, Page},
};

/// The limits for each provider.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ProviderLimits {
    /// The maximum of probes in flight, so many that even a slow vendor gets `per_second` probes.
    pub in_flight: usize,
    /// Each 429, 5xx or timeout of a vendor halves its limit of probes in flight, down to this.
    pub in_flight_floor: usize,
    /// How many probes may wait before one for a slot. Over the limit, the verdict is NOT_ATTEMPTED at once.
    pub queue: usize,
    /// The longest wait in the queue. No caller waits longer than that either.
    #[serde(with = "duration")]
    pub queue_time: Duration,
    /// How many probes may start per second; a second's worth may start at once. Vendors limit each key. This limit
    /// protects the reputation of our address.
    pub per_second: NonZeroU32,
}

/// A probe whose reserved start is longer past than this, since no slot was free, does not start at once with others like it. Otherwise all of them
/// could when a slow provider recovers.
const LATE: Duration = Duration::from_millis(100);

/// The assumed latency of a probe until one was measured.
const USUAL_LATENCY: Duration = Duration::from_millis(500);
/// After so long without a setback, the limit doubles with each round again, instead of growing by one.
const CALM: Duration = Duration::from_secs(60);

/// The share of `queue_time` that an expected wait may take, since estimates are inexact and callers wait four seconds: for a credential at its
/// retry time, and for a new one while others have retry times.
const SCHEDULED_SHARE: f64 = 0.6;
const NEW_SHARE: f64 = 0.4;

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
    /// The limits of one of so many replicas. Each is at least 1.
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

    /// Reports every limit that is out of bounds.
    pub fn review(&self, review: &mut Review<'_>) {
        review.number("in_flight", self.in_flight, 1, 1_000_000);
        review.number("in_flight_floor", self.in_flight_floor, 1, 1_000_000);
        review.number("queue", self.queue, 1, 1_000_000);
        review.length("queue_time", self.queue_time, Duration::from_millis(100), duration::MAX);
    }
}

/// The share of one replica, at least 1.
pub(super) const fn part_of(whole: NonZeroU32, replicas: NonZeroU32) -> NonZeroU32 {
    NonZeroU32::MIN.saturating_add((whole.get() - 1) / replicas.get())
}

/// A prober that keeps the limits.
pub struct ProviderLimiter {
    inner: Arc<dyn Prober>,
    limits: ProviderLimits,
    /// The rate limit of all replicas together, if a shared tier counts it.
    shared_per_second: NonZeroU32,
    queues: Mutex<HashMap<String, Arc<ProviderQueue>>>,
}

/// The queue and the slots of one provider.
struct ProviderQueue {
    limits: ProviderLimits,
    slots: FairSlots,
    /// Probes that wait for a slot.
    waiting_for_slot: AtomicUsize,
    /// Probes that have a slot and wait for the rate limit.
    waiting_for_rate: AtomicUsize,
    state: Mutex<QueueState>,
    /// The latency of probes, without the wait in the queue.
    took: Histogram,
}

#[derive(Debug)]
struct QueueState {
    in_flight: InFlight,
    rate_limit: RateLimit,
    schedule: RetrySchedule<()>,
}

/// The limit of probes in flight. It doubles with each round of responses until the first setback, grows by one with each round after it, and is
/// halved at each setback. TCP finds the capacity of a path in this way, and Netflix's limiter that of a server.
#[derive(Debug)]
struct InFlight {
    floor: usize,
    ceiling: usize,
    limit: usize,
    /// How many slots exist. After the limit was lowered, there are more than the limit until probes end.
    slots: usize,
    running: usize,
    /// The responses of this round, how many make a round (the limit at its start), and the most probes that ran at a time in it.
    round_answers: usize,
    round_length: usize,
    round_peak: usize,
    /// True before the first setback, and again long after the last one.
    doubling: bool,
    last_setback: Option<Instant>,
    /// The latency of a probe: a moving average.
    latency: Option<Duration>,
    /// How many latencies were measured.
    measured: usize,
}

/// When probes may start: a second's worth at once, then one per interval.
#[derive(Debug)]
struct RateLimit {
    interval: Duration,
    burst: Duration,
    /// When the whole burst is available again.
    full_at: Instant,
    /// The interval between two starts of all replicas together.
    shared_interval: Duration,
    /// When the next probe may start whose reserved start is past.
    next_late: Instant,
}

/// What a shared tier needs to reserve the start of a probe.
#[derive(Debug, Clone, Copy)]
pub(crate) struct StartLimit {
    /// How many probes of all replicas may start per second.
    pub(crate) per_second: NonZeroU32,
    /// The longest wait for a start that is reserved, for a credential at its retry time, and for a new one while others have retry times.
    pub(crate) longest: Duration,
    pub(crate) longest_for_new: Duration,
    /// How long before its start a credential comes back.
    pub(crate) head_start: Duration,
    /// No start is reserved later than this.
    pub(crate) queue_time: Duration,
}

/// How long a probe is expected to wait for a slot, and for the rate limit.
#[derive(Debug, Clone, Copy)]
struct ExpectedWait {
    slot: Duration,
    rate_limit: Duration,
}

/// Counts one until it is dropped.
struct CountGuard<'g>(&'g AtomicUsize);

/// A probe that holds a slot. Without a finding, dropping it only frees the slot.
struct RunningProbe<'s> {
    queue: &'s ProviderQueue,
    slot: Option<Slot<'s>>,
    began: Instant,
    finding: Option<(Verdict, bool)>,
}

// === impl ProviderLimiter ===

impl ProviderLimiter {
    /// Probes with `inner`, within these limits.
    pub fn new(inner: Arc<dyn Prober>, limits: ProviderLimits) -> Self {
        Self { inner, limits, shared_per_second: limits.per_second, queues: Mutex::default() }
    }

    /// Lets so many probes of all replicas start per second, wherever a shared tier reserves their starts.
    #[must_use]
    pub fn sharing(self, shared_per_second: NonZeroU32) -> Self {
        Self { shared_per_second, ..self }
    }

    /// The limit of starts that all replicas share, with the longest waits that this replica accepts now.
    pub(crate) fn start_limit(&self, provider: &str) -> StartLimit {
        let queue = self.queue(provider);
        let state = queue.state();
        StartLimit {
            per_second: self.shared_per_second,
            longest: queue.longest_wait(&state, false),
            longest_for_new: queue.longest_wait(&state, true),
            head_start: queue.head_start(),
            queue_time: queue.limits.queue_time,
        }
    }

    /// Probes at a start that was reserved over all replicas.
    pub(crate) fn probe_at(&self, request: ProbeRequest, start: Instant) -> Boxed<'static, Finding> {
        self.admit(request, Some(start))
    }

    /// The finding for a credential whose start may be reserved at `turn` at the earliest, over all replicas. It comes back later if this replica's
    /// slots are expected to be in use then.
    pub(crate) fn withheld_until(&self, provider: &str, credential: [u8; 32], turn: Instant) -> Finding {
        withheld(Withheld::Budget, self.queue(provider).retry_wait_until(credential, turn))
    }

    fn admit(&self, request: ProbeRequest, reserved: Option<Instant>) -> Boxed<'static, Finding> {
        let queue = self.queue(&request.target.endpoint.provider);
        let inner = Arc::clone(&self.inner);
        Box::pin(async move {
            let retry_wait = |queue: &ProviderQueue| match reserved {
                None => queue.retry_wait(request.credential),
                Some(_) => queue.retry_wait_for_slot(request.credential),
            };
            // Counted before the first await, so that the next caller sees it.
            let (waiting, answer_at) = match queue.enter_queue(request.credential, request.source, reserved) {
                Ok(queued) => queued,
                Err(why) => return withheld(why, retry_wait(&queue)),
            };
            request.started.expect_answer_at(answer_at);
            let by = Instant::now() + queue.limits.queue_time;
            let Ok(slot) = timeout_at(by, queue.slots.acquire(request.source)).await else {
                return withheld(Withheld::Queue, retry_wait(&queue));
            };
            let begin = queue.state().rate_limit.start(Instant::now(), by, reserved);
            drop(waiting);
            let Some(begin) = begin else { return withheld(Withheld::Budget, retry_wait(&queue)) };
            if begin > Instant::now() {
                let _waiting = CountGuard::new(&queue.waiting_for_rate);
                sleep_until(begin).await;
            }
            let mut probe = RunningProbe::begin(&queue, slot);
            let finding = inner.probe(request).await;
            probe.finding = Some((finding.verdict, finding.about_model));
            finding
        })
    }

    fn queue(&self, provider: &str) -> Arc<ProviderQueue> {
        let mut queues = self.queues.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(queue) = queues.get(provider) {
            return Arc::clone(queue);
        }
        // There are few names: they come from loaded registries.
        let queue = Arc::new(ProviderQueue::new(self.limits, self.shared_per_second));
        queues.insert(provider.to_owned(), Arc::clone(&queue));
        queue
    }
}

impl Prober for ProviderLimiter {
    fn probe(&self, request: ProbeRequest) -> Boxed<'static, Finding> {
        self.admit(request, None)
    }

    fn expected_wait(&self, provider: &str) -> Duration {
        let queue = self.queues.lock().unwrap_or_else(PoisonError::into_inner).get(provider).map(Arc::clone);
        queue.map_or(Duration::ZERO, |queue| {
            queue.expected(queue.waiting_for_slot.load(Ordering::Relaxed), queue.slots.free()).longest()
        })
    }

    fn wait_before_retry(&self, provider: &str, credential: [u8; 32]) -> Duration {
        let queue = self.queue(provider);
        queue.retry_wait_behind(credential, queue.limits.queue)
    }
}

/// The finding for a probe that was not admitted, with its retry time.
fn withheld(why: Withheld, wait: Duration) -> Finding {
    Finding { retry_after: Some(spread(wait)), ..Finding::withheld(why) }
}

impl Collect for ProviderLimiter {
    fn collect(&self, page: &mut Page) {
        let queues: BTreeMap<String, Arc<ProviderQueue>> = {
            let queues = self.queues.lock().unwrap_or_else(PoisonError::into_inner);
            queues.iter().map(|(name, queue)| (name.clone(), Arc::clone(queue))).collect()
        };
        for (provider, queue) in &queues {
            let labels = [(PROVIDER, provider.as_str())];
            let (limit, slots) = {
                let in_flight = &queue.state().in_flight;
                (in_flight.limit, in_flight.slots)
            };
            page.gauge("byokgate_probes_in_flight", "Probes in a slot, running or waiting for provider_limits.per_second")
                .add(&labels, slots.saturating_sub(queue.slots.free()));
            page.gauge("byokgate_probes_in_flight_limit", "Slots, as many as the provider's answers allow").add(&labels, limit);
            page.gauge("byokgate_probes_queued", "Probes that wait for a slot or for provider_limits.per_second")
                .add(&labels, queue.waiting_for_slot.load(Ordering::Relaxed) + queue.waiting_for_rate.load(Ordering::Relaxed));
            if let Some(took) = queue.took.value() {
                page.histogram(
                    "byokgate_probe_duration_seconds",
                    "All probes of one check of a credential, without the wait for a slot",
                )
                .add(&labels, took);
            }
        }
    }
}

// === impl ProviderQueue ===

impl ProviderQueue {
    fn new(limits: ProviderLimits, shared_per_second: NonZeroU32) -> Self {
        let in_flight = InFlight::new(limits);
        Self {
            limits,
            slots: FairSlots::new(in_flight.slots),
            waiting_for_slot: AtomicUsize::new(0),
            waiting_for_rate: AtomicUsize::new(0),
            state: Mutex::new(QueueState {
                in_flight,
                rate_limit: RateLimit::new(limits.per_second, shared_per_second),
                schedule: RetrySchedule::default(),
            }),
            took: Histogram::default(),
        }
    }

    /// Enters the queue. Returns the time when the response is expected. A probe that would not start in time is refused at once. A reserved start
    /// has passed the rate limit already.
    fn enter_queue(
        &self,
        credential: [u8; 32],
        source: Source,
        reserved: Option<Instant>,
    ) -> Result<(CountGuard<'_>, Instant), Withheld> {
        let ahead = self.slots.ahead_of(&source);
        // A probe that need not wait passes through the queue as well, so a queue limit of 0 would stop all probes.
        let counted = CountGuard::new(&self.waiting_for_slot);
        let (expected, now) = (self.expected(ahead, self.slots.free_for(&source)), Instant::now());
        let mut state = self.state();
        // A credential at its retry time goes before a new one.
        let is_new = state.schedule.has_pending(&(), now) && !state.schedule.is_due(&credential, now + self.head_start());
        let limited = if reserved.is_some() { expected.slot } else { expected.longest() };
        if ahead < self.limits.queue && limited <= self.longest_wait(&state, is_new) {
            state.schedule.remove(&credential);
            let wait = reserved.map_or(limited, |start| limited.max(start.saturating_duration_since(now)));
            return Ok((counted, now + wait + state.in_flight.latency()));
        }
        let is_for_rate = ahead < self.limits.queue && reserved.is_none() && expected.rate_limit > expected.slot;
        Err(if is_for_rate { Withheld::Budget } else { Withheld::Queue })
    }

    /// The longest expected wait with which a probe is admitted.
    fn longest_wait(&self, state: &QueueState, is_new: bool) -> Duration {
        let longest = self.limits.queue_time.mul_f64(if is_new { NEW_SHARE } else { SCHEDULED_SHARE });
        // The response should come while the caller still waits. The latency takes at most half of the time, so that slow vendors are probed too.
        longest - state.in_flight.latency().min(longest / 2)
    }

    /// How long a probe waits with so many ahead of it, and so many free slots.
    fn expected(&self, ahead: usize, free: usize) -> ExpectedWait {
        let state = self.state();
        let behind = (ahead + 1).saturating_sub(free);
        // Until enough latencies were measured, no probe is refused for them: the first probes also open connections, and take longer.
        let behind = if state.in_flight.latency_is_known() { behind } else { 0 };
        ExpectedWait {
            slot: state.in_flight.interval().saturating_mul(u32::try_from(behind).unwrap_or(u32::MAX)),
            rate_limit: state.rate_limit.wait(Instant::now(), ahead),
        }
    }

    /// How long the caller should wait before it retries. It ends half a `queue_time` before the expected start, so that the queue never runs
    /// empty.
    fn retry_wait(&self, credential: [u8; 32]) -> Duration {
        self.retry_wait_behind(credential, self.waiting_for_slot.load(Ordering::Relaxed))
    }

    /// The same, with so many ahead of it.
    fn retry_wait_behind(&self, credential: [u8; 32], ahead: usize) -> Duration {
        let begin = Instant::now() + self.expected(ahead, self.slots.free()).longest();
        self.schedule_retry(credential, begin, |state| state.in_flight.interval().max(state.rate_limit.interval))
    }

    /// The same for a probe whose start was reserved over all replicas, and for which no slot was free in time.
    fn retry_wait_for_slot(&self, credential: [u8; 32]) -> Duration {
        let spacing = |state: &QueueState| state.in_flight.interval().max(state.rate_limit.shared_interval);
        self.schedule_retry(credential, self.next_slot(), spacing)
    }

    /// The same for a credential that the rate limit of all replicas admits at `turn` at the earliest. Turns are spaced already, so that this
    /// replica's own retry times are spaced by its slots alone.
    fn retry_wait_until(&self, credential: [u8; 32], turn: Instant) -> Duration {
        let wait = self.schedule_retry(credential, turn.max(self.next_slot()), |state| state.in_flight.interval());
        wait.max(turn.saturating_duration_since(Instant::now() + self.head_start()))
    }

    /// When a slot is expected to be free for a probe that comes now.
    fn next_slot(&self) -> Instant {
        Instant::now() + self.expected(self.waiting_for_slot.load(Ordering::Relaxed), self.slots.free()).slot
    }

    /// Gives this credential a retry time, at `begin` at the earliest and with this much time between two. Returns how long the caller should wait.
    fn schedule_retry(&self, credential: [u8; 32], begin: Instant, spacing: impl FnOnce(&QueueState) -> Duration) -> Duration {
        let (now, mut state) = (Instant::now(), self.state());
        let interval = spacing(&state);
        let retry_at = state.schedule.time_for(&(), credential, now, begin, interval);
        retry_at.saturating_duration_since(now + self.head_start())
    }

    fn head_start(&self) -> Duration {
        self.limits.queue_time / 2
    }

    fn state(&self) -> MutexGuard<'_, QueueState> {
        // A panic cannot leave it inconsistent: its parts do not depend on each other.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl ExpectedWait {
    fn longest(self) -> Duration {
        self.slot.max(self.rate_limit)
    }
}

impl<'g> CountGuard<'g> {
    fn new(count: &'g AtomicUsize) -> Self {
        count.fetch_add(1, Ordering::Relaxed);
        Self(count)
    }
}

impl Drop for CountGuard<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl<'s> RunningProbe<'s> {
    fn begin(queue: &'s ProviderQueue, slot: Slot<'s>) -> Self {
        queue.state().in_flight.begin();
        Self { queue, slot: Some(slot), began: Instant::now(), finding: None }
    }
}

impl Drop for RunningProbe<'_> {
    fn drop(&mut self) {
        let (queue, now) = (self.queue, Instant::now());
        let mut state = queue.state();
        let in_flight = &mut state.in_flight;
        if let Some((verdict, about_model)) = self.finding {
            queue.took.observe(now - self.began);
            // A failure of a tenant's own model is not a setback of the provider.
            in_flight.learn(self.began, now, is_setback(verdict).filter(|_| !about_model));
        }
        in_flight.running = in_flight.running.saturating_sub(1);
        // Under the lock, so that the limit and the slots change together.
        if in_flight.slots > in_flight.limit {
            if let Some(slot) = self.slot.take() {
                slot.forget();
            }
            in_flight.slots -= 1;
        } else {
            queue.slots.add(in_flight.limit - in_flight.slots);
            in_flight.slots = in_flight.limit;
        }
    }
}

/// The interval between two starts.
fn interval_of(per_second: NonZeroU32) -> Duration {
    Duration::from_secs(1) / per_second.get()
}

/// Whether the verdict is a setback: the provider is overloaded. `None` if it is inconclusive.
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
            slots: floor,
            running: 0,
            round_answers: 0,
            round_length: floor,
            round_peak: 0,
            doubling: true,
            last_setback: None,
            latency: None,
            measured: 0,
        }
    }

    fn begin(&mut self) {
        self.running += 1;
        self.round_peak = self.round_peak.max(self.running);
    }

    /// Updates latency and limit with the result of a probe.
    fn learn(&mut self, began: Instant, now: Instant, setback: Option<bool>) {
        let Some(setback) = setback else { return };
        let took = now - began;
        self.latency = Some(self.latency.map_or(took, |known| (known * 7 + took) / 8));
        self.measured = self.measured.saturating_add(1);
        if setback {
            // Probes that ran at the last setback belong to it.
            if self.last_setback.is_none_or(|last| began >= last) {
                self.limit = (self.limit / 2).max(self.floor);
                (self.doubling, self.last_setback) = (false, Some(now));
                self.begin_round();
            }
            return;
        }
        self.doubling |= self.last_setback.is_some_and(|last| now - last > CALM);
        self.round_answers += 1;
        let ends = self.round_answers >= self.round_length;
        // The limit grows only if at least half of it was used.
        if self.round_peak * 2 >= self.limit && (self.doubling || ends) {
            self.limit = (self.limit + 1).min(self.ceiling);
        }
        if ends {
            self.begin_round();
        }
    }

    fn begin_round(&mut self) {
        (self.round_answers, self.round_length, self.round_peak) = (0, self.limit, self.running);
    }

    /// Whether two rounds of the smallest limit were measured.
    const fn latency_is_known(&self) -> bool {
        self.measured >= 2 * self.floor
    }

    fn latency(&self) -> Duration {
        self.latency.unwrap_or(USUAL_LATENCY)
    }

    /// The expected interval between two responses while all slots are in use. While the limit still doubles, it counts as at its ceiling.
    fn interval(&self) -> Duration {
        let slots = if self.doubling { self.ceiling } else { self.limit };
        self.latency() / u32::try_from(slots).unwrap_or(u32::MAX).max(1)
    }
}

// === impl RateLimit ===

impl RateLimit {
    fn new(per_second: NonZeroU32, shared_per_second: NonZeroU32) -> Self {
        let (interval, now) = (interval_of(per_second), Instant::now());
        let (burst, shared_interval) = (Duration::from_secs(1).saturating_sub(interval), interval_of(shared_per_second));
        Self { interval, burst, full_at: now, shared_interval, next_late: now }
    }

    /// How long a probe with so many ahead of it waits for the rate limit.
    fn wait(&self, now: Instant, ahead: usize) -> Duration {
        let ahead = self.interval.saturating_mul(u32::try_from(ahead).unwrap_or(u32::MAX));
        (self.full_at.saturating_duration_since(now) + ahead).saturating_sub(self.burst)
    }

    /// When the probe may start: at the start that was reserved for it over all replicas, or at the next one of this replica's own share, if it is
    /// not after `by`.
    fn start(&mut self, now: Instant, by: Instant, reserved: Option<Instant>) -> Option<Instant> {
        let Some(start) = reserved else { return self.reserve(now, by) };
        let begin = if now <= start + LATE { start.max(now) } else { self.next_late.max(now) };
        if begin > by {
            return None;
        }
        if begin > start + LATE {
            self.next_late = begin + self.shared_interval;
        }
        // It counts for this replica's own share too, but never for more than all of it: when the tier fails, a busy replica has no second's worth
        // left to start at once.
        let charged = self.full_at.max(now) + self.interval;
        self.full_at = self.full_at.max(charged.min(now + self.burst + self.interval));
        Some(begin)
    }

    /// Reserves the next start, if it is not after `by`.
    fn reserve(&mut self, now: Instant, by: Instant) -> Option<Instant> {
        let begin = now + self.wait(now, 0);
        if begin > by {
            return None;
        }
        self.full_at = self.full_at.max(now) + self.interval;
        Some(begin)
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::advance;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_reserved_start_is_kept_and_one_that_is_past_follows_the_last() {
        let rate = |number| NonZeroU32::new(number).unwrap();
        let (millis, now) = (Duration::from_millis, Instant::now());
        let (by, mut limit) = (now + millis(5_000), RateLimit::new(rate(10), rate(100)));
        // However many start now, and whatever this replica's share is.
        for after in [0, 0, 700, 3_000] {
            assert_eq!(limit.start(now, by, Some(now + millis(after))), Some(now + millis(after)));
        }
        assert_eq!(limit.start(now, by, Some(by + millis(1))), None);
        advance(millis(1_000)).await;
        let now = Instant::now();
        // A little late is in time.
        assert_eq!(limit.start(now, by, Some(now - millis(100))), Some(now));
        for after in [0, 10, 20] {
            assert_eq!(limit.start(now, by, Some(now - millis(101))), Some(now + millis(after)));
        }
        assert_eq!(limit.start(now, now + millis(20), Some(now - millis(101))), None);
    }

    #[tokio::test(start_paused = true)]
    async fn reserved_starts_use_up_this_replicas_share_and_no_more() {
        let rate = |number| NonZeroU32::new(number).unwrap();
        let (now, mut limit) = (Instant::now(), RateLimit::new(rate(10), rate(100)));
        let by = now + Duration::from_secs(5);
        for _ in 0..100 {
            limit.start(now, by, Some(now));
        }
        let own: Vec<_> = (0..3).map(|_| limit.start(now, by, None).map(|begin| (begin - now).as_millis())).collect();
        assert_eq!(own, [Some(100), Some(200), Some(300)]);
    }
}
