//! How many decisions wait for providers at a time, over all and for one: a few more may wait for a place for a short time, all others are
//! refused at once. A decision that waits for nobody takes no place.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use rand::Rng;
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    time::{Instant, timeout_at},
};
use tonic::Status;

use super::{
    errors::{RETRY_AFTER, limit_reached},
    limits::Limits,
};
use crate::domain::duration::text;

/// How many providers are kept. Their names are of registries that were loaded, so there are few.
const MAX_PROVIDERS: usize = 10_000;

/// The door to waiting.
pub(super) struct Admission {
    places: Arc<Semaphore>,
    shares: Mutex<HashMap<String, Arc<Semaphore>>>,
    share: usize,
    waiting: Semaphore,
    wait: Duration,
    words: String,
}

/// How long a question to a provider would wait for its turn.
type ExpectedWait<'w> = dyn Fn() -> Duration + Sync + 'w;

/// One place to wait for one provider.
#[derive(Debug)]
pub(super) struct WaitPermit {
    _of_all: OwnedSemaphorePermit,
    _of_provider: OwnedSemaphorePermit,
}

// === impl Admission ===

impl Admission {
    pub(super) fn new(limits: &Limits) -> Self {
        let Limits { decisions, decisions_per_provider, decisions_waiting, decision_wait, .. } = limits;
        Self {
            places: Arc::new(Semaphore::new(*decisions)),
            shares: Mutex::default(),
            share: *decisions_per_provider,
            waiting: Semaphore::new(*decisions_waiting),
            wait: *decision_wait,
            words: format!(
                "{decisions} decisions wait for providers, {decisions_waiting} more at most {} each",
                text(*decision_wait)
            ),
        }
    }

    /// A place for one decision. Whoever gets none is told when there will be one, by how long a question to this provider waits.
    pub(super) async fn enter(&self, provider: &str, expected_wait: &ExpectedWait<'_>) -> Result<WaitPermit, Status> {
        let share = self.share_of(provider);
        if let (Ok(_of_provider), Ok(_of_all)) =
            (Arc::clone(&share).try_acquire_owned(), Arc::clone(&self.places).try_acquire_owned())
        {
            return Ok(WaitPermit { _of_all, _of_provider });
        }
        let Ok(_seat) = self.waiting.try_acquire() else { return Err(self.full(provider, &share, expected_wait)) };
        self.acquire(share, provider, Instant::now() + self.wait, expected_wait).await
    }

    /// A place for one item of a batch, which is bounded by itself and has a deadline of its own.
    pub(super) async fn enter_by(
        &self,
        provider: &str,
        deadline: Instant,
        expected_wait: &ExpectedWait<'_>,
    ) -> Result<WaitPermit, Status> {
        self.acquire(self.share_of(provider), provider, deadline, expected_wait).await
    }

    /// How many are waiting for a provider.
    pub(super) fn in_flight(&self, limits: &Limits) -> usize {
        limits.decisions.saturating_sub(self.places.available_permits())
    }

    async fn acquire(
        &self,
        share: Arc<Semaphore>,
        provider: &str,
        deadline: Instant,
        expected_wait: &ExpectedWait<'_>,
    ) -> Result<WaitPermit, Status> {
        // Its share first: who waits for a provider that is full holds no place of all.
        let Ok(Ok(_of_provider)) = timeout_at(deadline, Arc::clone(&share).acquire_owned()).await else {
            return Err(self.full(provider, &share, expected_wait));
        };
        let Ok(Ok(_of_all)) = timeout_at(deadline, Arc::clone(&self.places).acquire_owned()).await else {
            return Err(self.full(provider, &share, expected_wait));
        };
        Ok(WaitPermit { _of_all, _of_provider })
    }

    fn share_of(&self, provider: &str) -> Arc<Semaphore> {
        // A panic elsewhere cannot leave the map half-changed: every change to it is one call.
        let mut shares = self.shares.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(share) = shares.get(provider) {
            return Arc::clone(share);
        }
        if shares.len() >= MAX_PROVIDERS {
            // Who holds a place keeps it; the names of registries that are no longer loaded go.
            shares.clear();
        }
        let share = Arc::new(Semaphore::new(self.share));
        shares.insert(provider.to_owned(), Arc::clone(&share));
        share
    }

    fn full(&self, provider: &str, share: &Semaphore, expected_wait: &ExpectedWait<'_>) -> Status {
        // Those who have a place leave it over all of that time, and a crowd that was refused at one moment comes back over the half of it.
        let pause = RETRY_AFTER.max(expected_wait() / 2);
        let pause = pause + pause.mul_f64(rand::rng().random_range(0.0..=1.0));
        if share.available_permits() == 0 {
            let words = format!("{} decisions wait for provider `{provider}`", self.share);
            return limit_reached("limits.decisions_per_provider", &words, pause);
        }
        limit_reached("limits.decisions", &self.words, pause)
    }
}

#[cfg(test)]
mod tests {
    use tonic::Code;
    use tonic_types::StatusExt;

    use super::*;

    fn door(decisions: usize, decisions_per_provider: usize) -> Arc<Admission> {
        let decision_wait = Duration::from_millis(20);
        let limits = Limits { decisions, decisions_per_provider, decisions_waiting: 1, decision_wait, ..Limits::default() };
        Arc::new(Admission::new(&limits))
    }

    const NO_WAIT: fn() -> Duration = || Duration::ZERO;

    fn retry_delay(status: &Status) -> Duration {
        status.get_details_retry_info().unwrap().retry_delay.unwrap()
    }

    fn subject(status: &Status) -> String {
        status.get_details_quota_failure().unwrap().violations.remove(0).subject
    }

    #[tokio::test(start_paused = true)]
    async fn one_runs_one_waits_and_the_third_is_refused_at_once() {
        let door = door(1, 9);
        let first = door.enter("acme", &NO_WAIT).await.unwrap();
        let second = tokio::spawn({
            let door = Arc::clone(&door);
            async move { door.enter("acme", &NO_WAIT).await.map(drop) }
        });
        tokio::task::yield_now().await;
        let began = Instant::now();
        let refused = door.enter("acme", &NO_WAIT).await.unwrap_err();
        assert_eq!(began.elapsed(), Duration::ZERO);
        assert_eq!(refused.code(), Code::ResourceExhausted);
        assert!((RETRY_AFTER..=2 * RETRY_AFTER).contains(&retry_delay(&refused)));
        // Where a question waits for a long time there will be no place sooner, and not one for all of them at once.
        let waits = || Duration::from_secs(20);
        let mut spread = Vec::new();
        for _ in 0..50 {
            spread.push(retry_delay(&door.enter("acme", &waits).await.unwrap_err()).as_secs());
        }
        assert!(spread.iter().all(|seconds| (10..=20).contains(seconds)), "{spread:?}");
        assert!(spread.iter().max() > spread.iter().min().map(|least| least + 3).as_ref(), "{spread:?}");
        assert_eq!(subject(&refused), "limits.decisions");
        drop(first);
        second.await.unwrap().unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn a_wait_has_an_end_and_a_seat_is_given_back() {
        let door = door(1, 9);
        let _first = door.enter("acme", &NO_WAIT).await.unwrap();
        for _ in 0..2 {
            let began = Instant::now();
            assert_eq!(door.enter("acme", &NO_WAIT).await.unwrap_err().code(), Code::ResourceExhausted);
            assert_eq!(began.elapsed(), Duration::from_millis(20));
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_provider_that_hangs_leaves_places_for_the_others() {
        let door = door(4, 2);
        let held = [door.enter("hangs", &NO_WAIT).await.unwrap(), door.enter("hangs", &NO_WAIT).await.unwrap()];
        assert_eq!(subject(&door.enter("hangs", &NO_WAIT).await.unwrap_err()), "limits.decisions_per_provider");
        let by = Instant::now() + Duration::from_secs(1);
        assert_eq!(subject(&door.enter_by("hangs", by, &NO_WAIT).await.unwrap_err()), "limits.decisions_per_provider");
        let _others = [door.enter("acme", &NO_WAIT).await.unwrap(), door.enter("acme", &NO_WAIT).await.unwrap()];
        drop(held);
        door.enter("hangs", &NO_WAIT).await.unwrap();
    }
}
