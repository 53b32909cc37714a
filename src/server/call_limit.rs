//! So many calls of a kind at a time, over all connections. Who comes beyond that is refused, and the log says so once a minute.

use std::{
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, SystemTime},
};

use tokio::time::Instant;
use tonic::Status;

use crate::{
    domain::request::Peer,
    grpc::errors::{RETRY_AFTER, limit_reached},
    telemetry::status::ReachedLimit,
};

/// A limit that is reached is told again after this.
const TELL_EVERY: Duration = Duration::from_secs(60);

/// A limit, and how many calls are within it.
#[derive(Default)]
pub(super) struct CallLimit {
    /// `limits.watches`
    setting: &'static str,
    limit: usize,
    under_way: AtomicUsize,
    refused: Mutex<Refused>,
}

/// The calls that were refused.
#[derive(Default)]
struct Refused {
    last: Option<SystemTime>,
    /// How many of them no line has told of.
    untold: u64,
    told: Option<Instant>,
}

/// A call's place. Dropped with the call.
pub(super) struct Counted(Arc<CallLimit>);

// === impl CallLimit ===

impl CallLimit {
    pub(super) fn new(setting: &'static str, limit: usize) -> Arc<Self> {
        Arc::new(Self { setting, limit, ..Self::default() })
    }

    /// A place for one more call.
    pub(super) fn enter(self: &Arc<Self>, peer: Peer) -> Result<Counted, Status> {
        let counted = Counted(Arc::clone(self));
        let Self { setting, limit, under_way, .. } = &**self;
        if under_way.fetch_add(1, Ordering::Relaxed) < *limit {
            return Ok(counted);
        }
        if let Some(count) = self.refused() {
            tracing::warn!(
                event = "call_limit",
                setting,
                limit,
                count,
                %peer,
                "calls are refused, since there are as many as {setting} allows; raise it, or find out who holds so many"
            );
        }
        Err(limit_reached(setting, &format!("{limit} at a time"), RETRY_AFTER))
    }

    /// When a call was refused last, if one was.
    pub(super) fn reached(&self) -> Option<ReachedLimit> {
        let at = self.lock().last?;
        Some(ReachedLimit { setting: self.setting, limit: self.limit, at })
    }

    /// Counts one, and says how many a line is to tell of, if one is due.
    fn refused(&self) -> Option<u64> {
        let now = Instant::now();
        let mut refused = self.lock();
        refused.last = Some(SystemTime::now());
        refused.untold += 1;
        let is_due = refused.told.is_none_or(|told| now.duration_since(told) >= TELL_EVERY);
        is_due.then(|| {
            refused.told = Some(now);
            std::mem::take(&mut refused.untold)
        })
    }

    fn lock(&self) -> MutexGuard<'_, Refused> {
        // A panic cannot leave it half-changed: what changes it cannot panic.
        self.refused.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.under_way.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_limit_is_told_once_a_minute_with_a_count_and_places_come_back() {
        let limit = CallLimit::new("limits.watches", 1);
        let peer = Peer::Tcp(([127, 0, 0, 1], 1).into());
        let first = limit.enter(peer).unwrap();
        assert!(limit.reached().is_none());
        assert!(limit.enter(peer).is_err() && limit.enter(peer).is_err());
        assert_eq!((limit.reached().unwrap().setting, limit.lock().untold), ("limits.watches", 1), "the first was told");
        tokio::time::advance(TELL_EVERY).await;
        assert_eq!(limit.refused(), Some(2));
        drop(first);
        assert!(limit.enter(peer).is_ok());
    }
}
