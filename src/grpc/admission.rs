//! Limits how many decisions wait for providers at the same time, in total and for one provider. A few more may wait for a permit for a short time;
//! all others are refused at once. A decision that waits for no provider needs no permit. One organization gets three quarters of a provider's
//! permits at most, so that its own model that hangs does not keep the others out.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
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

/// The most providers that are tracked. Their names come from loaded registries, so there are few.
const MAX_PROVIDERS: usize = 10_000;

/// Hands out permits to wait for a provider.
pub(super) struct Admission {
    total_permits: Arc<Semaphore>,
    permits_by_provider: Mutex<HashMap<String, Arc<Semaphore>>>,
    held: Arc<HeldByOrganizations>,
    per_provider: usize,
    waiting: Semaphore,
    wait: Duration,
    limit_text: String,
}

/// How many permits each organization holds, by provider and organization. Those that hold none are not here.
#[derive(Debug, Default)]
struct HeldByOrganizations(Mutex<HashMap<(String, String), usize>>);

/// Counts a permit of an organization until it is dropped.
#[derive(Debug)]
struct HeldPermit {
    held: Arc<HeldByOrganizations>,
    of: (String, String),
}

/// Returns how long a probe of the provider would wait for its turn.
type ExpectedWait<'w> = dyn Fn() -> Duration + Sync + 'w;

/// A permit to wait for one provider. Given back when it is dropped.
#[derive(Debug)]
pub(super) struct WaitPermit {
    _total: OwnedSemaphorePermit,
    _provider: OwnedSemaphorePermit,
    _organization: Option<HeldPermit>,
}

// === impl Admission ===

impl Admission {
    pub(super) fn new(limits: &Limits) -> Self {
        let Limits { decisions, decisions_per_provider, decisions_waiting, decision_wait, .. } = limits;
        Self {
            total_permits: Arc::new(Semaphore::new(*decisions)),
            permits_by_provider: Mutex::default(),
            held: Arc::default(),
            per_provider: *decisions_per_provider,
            waiting: Semaphore::new(*decisions_waiting),
            wait: *decision_wait,
            limit_text: format!(
                "{decisions} decisions wait for providers, {decisions_waiting} more at most {} each",
                text(*decision_wait)
            ),
        }
    }

    /// A permit for one decision of this organization. An error says when to try again, by how long a probe of this provider would wait.
    pub(super) async fn admit(
        &self,
        provider: &str,
        organization: &str,
        expected_wait: &ExpectedWait<'_>,
    ) -> Result<WaitPermit, Status> {
        let provider_permits = self.permits_of(provider);
        let limit = self.per_provider - self.per_provider / 4;
        // Without an organization the platform has one tenant, or does not tell them apart.
        let organization = match organization {
            "" => None,
            _ => {
                let text = || format!("{limit} decisions of this organization wait for provider `{provider}`");
                let refused = || limit_reached("limits.decisions_per_provider", &text(), pause(expected_wait));
                Some(self.held.enter(provider, organization, limit).ok_or_else(refused)?)
            }
        };
        let permit = self.admit_anybody(provider, provider_permits, expected_wait).await?;
        Ok(WaitPermit { _organization: organization, ..permit })
    }

    async fn admit_anybody(
        &self,
        provider: &str,
        provider_permits: Arc<Semaphore>,
        expected_wait: &ExpectedWait<'_>,
    ) -> Result<WaitPermit, Status> {
        if let (Ok(_provider), Ok(_total)) =
            (Arc::clone(&provider_permits).try_acquire_owned(), Arc::clone(&self.total_permits).try_acquire_owned())
        {
            return Ok(WaitPermit { _total, _provider, _organization: None });
        }
        let Ok(_waiting) = self.waiting.try_acquire() else {
            return Err(self.refusal(provider, &provider_permits, expected_wait));
        };
        self.wait_for_permit(provider_permits, provider, Instant::now() + self.wait, expected_wait).await
    }

    /// A permit for one item of a batch. It may wait until the item's deadline, since a batch has limits of its own.
    pub(super) async fn admit_by(
        &self,
        provider: &str,
        deadline: Instant,
        expected_wait: &ExpectedWait<'_>,
    ) -> Result<WaitPermit, Status> {
        self.wait_for_permit(self.permits_of(provider), provider, deadline, expected_wait).await
    }

    /// How many decisions are waiting for a provider.
    pub(super) fn in_flight(&self, limits: &Limits) -> usize {
        limits.decisions.saturating_sub(self.total_permits.available_permits())
    }

    async fn wait_for_permit(
        &self,
        provider_permits: Arc<Semaphore>,
        provider: &str,
        deadline: Instant,
        expected_wait: &ExpectedWait<'_>,
    ) -> Result<WaitPermit, Status> {
        // First the provider's permit: a decision that waits for a busy provider must not hold one of the total.
        let Ok(Ok(_provider)) = timeout_at(deadline, Arc::clone(&provider_permits).acquire_owned()).await else {
            return Err(self.refusal(provider, &provider_permits, expected_wait));
        };
        let Ok(Ok(_total)) = timeout_at(deadline, Arc::clone(&self.total_permits).acquire_owned()).await else {
            return Err(self.refusal(provider, &provider_permits, expected_wait));
        };
        Ok(WaitPermit { _total, _provider, _organization: None })
    }

    fn permits_of(&self, provider: &str) -> Arc<Semaphore> {
        // A panic elsewhere cannot leave the map inconsistent: every change to it is a single call.
        let mut permits_by_provider = self.permits_by_provider.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(provider_permits) = permits_by_provider.get(provider) {
            return Arc::clone(provider_permits);
        }
        if permits_by_provider.len() >= MAX_PROVIDERS {
            // Removes the names of registries that are no longer loaded. Permits that are held stay valid.
            permits_by_provider.clear();
        }
        let provider_permits = Arc::new(Semaphore::new(self.per_provider));
        permits_by_provider.insert(provider.to_owned(), Arc::clone(&provider_permits));
        provider_permits
    }

    fn refusal(&self, provider: &str, provider_permits: &Semaphore, expected_wait: &ExpectedWait<'_>) -> Status {
        let pause = pause(expected_wait);
        if provider_permits.available_permits() == 0 {
            let limit_text = format!("{} decisions wait for provider `{provider}`", self.per_provider);
            return limit_reached("limits.decisions_per_provider", &limit_text, pause);
        }
        limit_reached("limits.decisions", &self.limit_text, pause)
    }
}

/// Permits are given back over all of the expected wait. Refused callers come back spread over its second half.
fn pause(expected_wait: &ExpectedWait<'_>) -> Duration {
    let pause = RETRY_AFTER.max(expected_wait() / 2);
    pause + pause.mul_f64(rand::rng().random_range(0.0..=1.0))
}

// === impl HeldByOrganizations ===

impl HeldByOrganizations {
    /// Counts one more, unless the organization has so many.
    fn enter(self: &Arc<Self>, provider: &str, organization: &str, limit: usize) -> Option<HeldPermit> {
        let of = (provider.to_owned(), organization.to_owned());
        let mut held = self.lock();
        let number = held.entry(of.clone()).or_default();
        if *number >= limit {
            return None;
        }
        *number += 1;
        Some(HeldPermit { held: Arc::clone(self), of })
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<(String, String), usize>> {
        // No code panics while it holds the lock.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for HeldPermit {
    fn drop(&mut self) {
        let mut held = self.held.lock();
        if let Some(number) = held.get_mut(&self.of) {
            *number -= 1;
            if *number == 0 {
                held.remove(&self.of);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use tonic::Code;
    use tonic_types::StatusExt;

    use super::*;

    fn admission_of(decisions: usize, decisions_per_provider: usize) -> Arc<Admission> {
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
        let admission = admission_of(1, 9);
        let first = admission.admit("acme", "", &NO_WAIT).await.unwrap();
        let second = tokio::spawn({
            let admission = Arc::clone(&admission);
            async move { admission.admit("acme", "", &NO_WAIT).await.map(drop) }
        });
        tokio::task::yield_now().await;
        let began = Instant::now();
        let refused = admission.admit("acme", "", &NO_WAIT).await.unwrap_err();
        assert_eq!(began.elapsed(), Duration::ZERO);
        assert_eq!(refused.code(), Code::ResourceExhausted);
        assert!((RETRY_AFTER..=2 * RETRY_AFTER).contains(&retry_delay(&refused)));
        // If probes wait for a long time, permits are given back late, and refused callers must not all come back at once.
        let waits = || Duration::from_secs(20);
        let mut spread = Vec::new();
        for _ in 0..50 {
            spread.push(retry_delay(&admission.admit("acme", "", &waits).await.unwrap_err()).as_secs());
        }
        assert!(spread.iter().all(|seconds| (10..=20).contains(seconds)), "{spread:?}");
        assert!(spread.iter().max() > spread.iter().min().map(|least| least + 3).as_ref(), "{spread:?}");
        assert_eq!(subject(&refused), "limits.decisions");
        drop(first);
        second.await.unwrap().unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn a_wait_has_an_end_and_a_seat_is_given_back() {
        let admission = admission_of(1, 9);
        let _first = admission.admit("acme", "", &NO_WAIT).await.unwrap();
        for _ in 0..2 {
            let began = Instant::now();
            assert_eq!(admission.admit("acme", "", &NO_WAIT).await.unwrap_err().code(), Code::ResourceExhausted);
            assert_eq!(began.elapsed(), Duration::from_millis(20));
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_provider_that_hangs_leaves_places_for_the_others() {
        let admission = admission_of(4, 2);
        let held = [admission.admit("hangs", "", &NO_WAIT).await.unwrap(), admission.admit("hangs", "", &NO_WAIT).await.unwrap()];
        assert_eq!(subject(&admission.admit("hangs", "", &NO_WAIT).await.unwrap_err()), "limits.decisions_per_provider");
        let by = Instant::now() + Duration::from_secs(1);
        assert_eq!(subject(&admission.admit_by("hangs", by, &NO_WAIT).await.unwrap_err()), "limits.decisions_per_provider");
        let _others =
            [admission.admit("acme", "", &NO_WAIT).await.unwrap(), admission.admit("acme", "", &NO_WAIT).await.unwrap()];
        drop(held);
        admission.admit("hangs", "", &NO_WAIT).await.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn one_organization_leaves_a_quarter_to_the_others() {
        let admission = admission_of(100, 8);
        let mut held = Vec::new();
        for _ in 0..6 {
            held.push(admission.admit("hangs", "evil", &NO_WAIT).await.unwrap());
        }
        assert_eq!(subject(&admission.admit("hangs", "evil", &NO_WAIT).await.unwrap_err()), "limits.decisions_per_provider");
        // Another one, and its own calls for another provider, go on.
        let others = [
            admission.admit("hangs", "other", &NO_WAIT).await.unwrap(),
            admission.admit("acme", "evil", &NO_WAIT).await.unwrap(),
        ];
        held.pop();
        held.push(admission.admit("hangs", "evil", &NO_WAIT).await.unwrap());
        drop((held, others));
        assert!(admission.held.lock().is_empty());
    }
}
