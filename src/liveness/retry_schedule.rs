//! Retry times for credentials that were not probed because a limit was reached. Each gets a time of its own, one interval after the last, so
//! that callers that were refused at the same moment do not all come back at the same moment.

use std::{collections::HashMap, hash::Hash, time::Duration};

use rand::Rng;
use tokio::time::Instant;

/// How many retry times are stored, and how many queues. Over the limit a caller gets the end of the queue, and is not stored.
const MAX_ENTRIES: usize = 100_000;
/// No wait is longer than this. A caller that comes back then may get a new retry time.
pub(super) const MAX_WAIT: Duration = Duration::from_secs(300);
/// A retry time that was not used may be removed after this.
pub(super) const KEEP_AFTER: Duration = Duration::from_secs(60);
/// `spread` adds up to a tenth of the wait, and never more than this.
const MAX_SPREAD: Duration = Duration::from_secs(1);

/// The retry times of credentials, in queues with an interval each.
#[derive(Debug)]
pub(crate) struct RetrySchedule<Q> {
    /// The first free time of each queue.
    next_free: HashMap<Q, Instant>,
    retry_times: HashMap<[u8; 32], Instant>,
}

// === impl RetrySchedule ===

impl<Q> Default for RetrySchedule<Q> {
    fn default() -> Self {
        Self { next_free: HashMap::new(), retry_times: HashMap::new() }
    }
}

impl<Q: Eq + Hash + Clone> RetrySchedule<Q> {
    /// The credential's retry time: its stored one, or the next free one of the queue, which is not before `first`.
    pub(crate) fn time_for(&mut self, queue: &Q, key: [u8; 32], now: Instant, first: Instant, interval: Duration) -> Instant {
        if let Some(time) = self.retry_times.get(&key).filter(|time| **time > now) {
            return *time;
        }
        if self.retry_times.len() >= MAX_ENTRIES || self.next_free.len() >= MAX_ENTRIES {
            self.retry_times.retain(|_, time| *time + KEEP_AFTER > now);
            self.next_free.retain(|_, next| *next > now);
        }
        let time = self.next_free.get(queue).map_or(first, |next| first.max(*next)).min(now + MAX_WAIT);
        if self.retry_times.len() < MAX_ENTRIES && self.next_free.len() < MAX_ENTRIES {
            self.next_free.insert(queue.clone(), time + interval);
            self.retry_times.insert(key, time);
        }
        time
    }

    /// Removes the retry time of a credential that was admitted.
    pub(crate) fn remove(&mut self, key: &[u8; 32]) {
        self.retry_times.remove(key);
    }

    /// Whether the credential has a retry time that is not after `by`.
    pub(crate) fn is_due(&self, key: &[u8; 32], by: Instant) -> bool {
        self.retry_times.get(key).is_some_and(|time| *time <= by)
    }

    /// Whether a retry time of this queue lies in the future.
    pub(crate) fn has_pending(&self, queue: &Q, now: Instant) -> bool {
        self.next_free.get(queue).is_some_and(|next| *next > now)
    }
}

/// Lengthens the wait a little, at random, so that callers with the same wait do not come back at the same moment.
pub(crate) fn spread(wait: Duration) -> Duration {
    wait + (wait / 10).min(MAX_SPREAD).mul_f64(rand::rng().random_range(0.0..=1.0))
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn key(number: u8) -> [u8; 32] {
        [number; 32]
    }

    const fn secs(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    #[tokio::test(start_paused = true)]
    async fn retry_times_follow_each_other_and_a_credential_keeps_its_own() {
        let (mut schedule, now) = (RetrySchedule::default(), Instant::now());
        let mut time_for = |number, now| schedule.time_for(&"line", key(number), now, now + secs(4), secs(1));
        assert_eq!([1, 2, 3].map(|number| time_for(number, now)), [4, 5, 6].map(|second| now + secs(second)));
        let later = now + secs(1);
        assert_eq!((time_for(2, later), time_for(4, later)), (now + secs(5), now + secs(7)));
        // Its time has passed: it gets the end of the queue.
        assert_eq!(time_for(1, now + secs(5)), now + secs(9));
        assert!(schedule.has_pending(&"line", now) && !schedule.has_pending(&"another", now));
        assert!(schedule.is_due(&key(3), now + secs(6)) && !schedule.is_due(&key(3), now + secs(5)));
        schedule.remove(&key(3));
        assert!(!schedule.is_due(&key(3), now + secs(6)));
        assert_eq!(schedule.time_for(&"another", key(9), now, now, secs(1)), now);
    }

    #[tokio::test(start_paused = true)]
    async fn waits_and_stored_retry_times_are_bounded() {
        let (mut schedule, now) = (RetrySchedule::default(), Instant::now());
        for number in 0..MAX_ENTRIES + 10 {
            let mut key = [0; 32];
            key[..8].copy_from_slice(&number.to_le_bytes());
            assert!(schedule.time_for(&(), key, now, now, secs(1)) <= now + MAX_WAIT);
        }
        assert_eq!(schedule.retry_times.len(), MAX_ENTRIES);
        // Retry times that passed long ago are removed.
        schedule.time_for(&(), key(7), now + MAX_WAIT + secs(62), now, secs(1));
        assert_eq!(schedule.retry_times.len(), 1);
    }

    #[test]
    fn times_are_spread_a_little() {
        for (wait, most) in [(0, 0), (5, 500), (100, 1_000)] {
            let spread = spread(secs(wait)).checked_sub(secs(wait)).unwrap();
            assert!(spread <= Duration::from_millis(most), "{wait}: {spread:?}");
        }
    }
}
