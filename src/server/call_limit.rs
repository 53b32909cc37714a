//! A limit on concurrent calls of one kind, over all connections. Calls beyond it are refused, and the log says so once a minute.

use std::{
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::SystemTime,
};

use tokio::time::Instant;
use tonic::Status;

use super::unreported::Unreported;
use crate::{
    domain::request::Peer,
    grpc::errors::{RETRY_AFTER, refused_by},
    telemetry::status::ReachedLimit,
};

/// A limit and the number of calls that count towards it.
#[derive(Default)]
pub(super) struct CallLimit {
    /// The name of the setting, for instance `limits.watches`.
    setting: &'static str,
    limit: usize,
    in_flight: AtomicUsize,
    refused: Mutex<Refused>,
}

/// The calls that were refused.
#[derive(Default)]
struct Refused {
    last: Option<SystemTime>,
    unreported: Unreported,
}

/// Counts a call towards its limit until it is dropped.
pub(super) struct CallPermit(Arc<CallLimit>);

// === impl CallLimit ===

impl CallLimit {
    pub(super) fn new(setting: &'static str, limit: usize) -> Arc<Self> {
        Arc::new(Self { setting, limit, ..Self::default() })
    }

    /// Admits one more call, or refuses it with the limit's name.
    pub(super) fn enter(self: &Arc<Self>, peer: Peer) -> Result<CallPermit, Status> {
        let permit = CallPermit(Arc::clone(self));
        let Self { setting, limit, in_flight, .. } = &**self;
        if in_flight.fetch_add(1, Ordering::Relaxed) < *limit {
            return Ok(permit);
        }
        if let Some(count) = self.refused() {
            tracing::warn!(
                event = "call_limit",
                setting,
                limit,
                count,
                %peer,
                "calls are refused: as many are in flight as {setting} allows; find out who holds so many, or raise it"
            );
        }
        // These calls ask for no decision.
        Err(refused_by(setting, &format!("{limit} at a time"), RETRY_AFTER, ""))
    }

    /// The time of the last refusal, if there was one.
    pub(super) fn reached(&self) -> Option<ReachedLimit> {
        let at = self.lock().last?;
        Some(ReachedLimit { setting: self.setting, limit: self.limit, at })
    }

    /// Counts a refusal. If a line in the log is due, returns the number of refusals that it has to report.
    fn refused(&self) -> Option<u64> {
        let mut refused = self.lock();
        refused.last = Some(SystemTime::now());
        refused.unreported.add(Instant::now(), || true)
    }

    fn lock(&self) -> MutexGuard<'_, Refused> {
        // A panic cannot leave it inconsistent: the code that changes it cannot panic.
        self.refused.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for CallPermit {
    fn drop(&mut self) {
        self.0.in_flight.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::{super::unreported::REPORT_EVERY, *};

    #[tokio::test(start_paused = true)]
    async fn a_reached_limit_is_logged_once_a_minute_with_a_count_and_permits_come_back() {
        let limit = CallLimit::new("limits.watches", 1);
        let peer = Peer::Tcp(([127, 0, 0, 1], 1).into());
        let first = limit.enter(peer).unwrap();
        assert!(limit.reached().is_none());
        assert!(limit.enter(peer).is_err() && limit.enter(peer).is_err());
        assert_eq!(
            (limit.reached().unwrap().setting, limit.lock().unreported.count),
            ("limits.watches", 1),
            "the first was logged"
        );
        tokio::time::advance(REPORT_EVERY).await;
        assert_eq!(limit.refused(), Some(2));
        drop(first);
        assert!(limit.enter(peer).is_ok());
    }
}
