//! How many decisions at a time: a few more may wait for a short time, all others are refused at once.

use std::{sync::Arc, time::Duration};

use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    time::{Instant, timeout, timeout_at},
};
use tonic::Status;

use super::errors::{RETRY_AFTER, limit_reached};
use crate::config::settings::Limits;

/// The door to the engine.
pub(super) struct Admission {
    running: Arc<Semaphore>,
    waiting: Semaphore,
    wait: Duration,
    words: String,
}

// === impl Admission ===

impl Admission {
    pub(super) fn new(limits: &Limits) -> Self {
        let Limits { decisions, decisions_waiting, decision_wait, .. } = limits;
        Self {
            running: Arc::new(Semaphore::new(*decisions)),
            waiting: Semaphore::new(*decisions_waiting),
            wait: decision_wait.0,
            words: format!("{decisions} decisions at a time, {decisions_waiting} waiting at most {decision_wait} each"),
        }
    }

    /// A place for one decision.
    pub(super) async fn enter(&self) -> Result<OwnedSemaphorePermit, Status> {
        if let Ok(place) = Arc::clone(&self.running).try_acquire_owned() {
            return Ok(place);
        }
        let Ok(_seat) = self.waiting.try_acquire() else { return Err(self.full()) };
        match timeout(self.wait, Arc::clone(&self.running).acquire_owned()).await {
            Ok(Ok(place)) => Ok(place),
            Ok(Err(_)) | Err(_) => Err(self.full()),
        }
    }

    /// A place for one item of a batch, which is bounded by itself and has a deadline of its own.
    pub(super) async fn enter_by(&self, deadline: Instant) -> Result<OwnedSemaphorePermit, Status> {
        match timeout_at(deadline, Arc::clone(&self.running).acquire_owned()).await {
            Ok(Ok(place)) => Ok(place),
            Ok(Err(_)) | Err(_) => Err(self.full()),
        }
    }

    /// How many are running.
    pub(super) fn in_flight(&self, limits: &Limits) -> usize {
        limits.decisions.saturating_sub(self.running.available_permits())
    }

    fn full(&self) -> Status {
        limit_reached("limits.decisions", &self.words, RETRY_AFTER)
    }
}

#[cfg(test)]
mod tests {
    use tonic::Code;
    use tonic_types::StatusExt;

    use super::*;
    use crate::config::settings::Span;

    fn door() -> Arc<Admission> {
        let limits =
            Limits { decisions: 1, decisions_waiting: 1, decision_wait: Span(Duration::from_millis(20)), ..Limits::default() };
        Arc::new(Admission::new(&limits))
    }

    #[tokio::test(start_paused = true)]
    async fn one_runs_one_waits_and_the_third_is_refused_at_once() {
        let door = door();
        let first = door.enter().await.unwrap();
        let second = tokio::spawn({
            let door = Arc::clone(&door);
            async move { door.enter().await.map(drop) }
        });
        tokio::task::yield_now().await;
        let began = Instant::now();
        let refused = door.enter().await.unwrap_err();
        assert_eq!(began.elapsed(), Duration::ZERO);
        assert_eq!(refused.code(), Code::ResourceExhausted);
        assert_eq!(refused.get_details_retry_info().unwrap().retry_delay, Some(RETRY_AFTER));
        assert_eq!(refused.get_details_quota_failure().unwrap().violations[0].subject, "limits.decisions");
        drop(first);
        second.await.unwrap().unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn a_wait_has_an_end_and_a_seat_is_given_back() {
        let door = door();
        let _first = door.enter().await.unwrap();
        for _ in 0..2 {
            let began = Instant::now();
            assert_eq!(door.enter().await.unwrap_err().code(), Code::ResourceExhausted);
            assert_eq!(began.elapsed(), Duration::from_millis(20));
        }
    }
}
