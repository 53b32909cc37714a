//! Turns of those who came too early: each is told a time of its own, one behind the other, so that a crowd that was refused at one moment
//! does not come back at one.

use std::{collections::HashMap, hash::Hash, time::Duration};

use rand::Rng;
use tokio::time::Instant;

/// How many turns are kept, and how many lines: who comes beyond that is told the end of the line, and counts for nobody behind it.
const MAX_TURNS: usize = 100_000;
/// Nobody is told to wait for longer than this: whoever asks then is told anew.
const MAX_WAIT: Duration = Duration::from_secs(300);
/// A turn that nobody took is given up after this.
const KEPT_FOR: Duration = Duration::from_secs(60);
/// Times are spread by up to a tenth of the wait, and never by more than this.
const MAX_SPREAD: Duration = Duration::from_secs(1);

/// The turns of credentials, in lines of which each has a pace of its own.
#[derive(Debug)]
pub(crate) struct Turns<L> {
    /// When the next one of each line is due.
    next: HashMap<L, Instant>,
    given: HashMap<[u8; 32], Instant>,
}

// === impl Turns ===

impl<L> Default for Turns<L> {
    fn default() -> Self {
        Self { next: HashMap::new(), given: HashMap::new() }
    }
}

impl<L: Eq + Hash + Clone> Turns<L> {
    /// When this credential's turn is: the one that it was told before, or the next of the line, which is not before `first`.
    pub(crate) fn give(&mut self, line: &L, key: [u8; 32], now: Instant, first: Instant, apart: Duration) -> Instant {
        if let Some(turn) = self.given.get(&key).filter(|turn| **turn > now) {
            return *turn;
        }
        if self.given.len() >= MAX_TURNS || self.next.len() >= MAX_TURNS {
            self.given.retain(|_, turn| *turn + KEPT_FOR > now);
            self.next.retain(|_, next| *next > now);
        }
        let turn = self.next.get(line).map_or(first, |next| first.max(*next)).min(now + MAX_WAIT);
        if self.given.len() < MAX_TURNS && self.next.len() < MAX_TURNS {
            self.next.insert(line.clone(), turn + apart);
            self.given.insert(key, turn);
        }
        turn
    }

    /// This credential is served: it needs no turn any more.
    pub(crate) fn done(&mut self, key: &[u8; 32]) {
        self.given.remove(key);
    }

    /// Its turn was given, and is about to come or has come.
    pub(crate) fn is_due(&self, key: &[u8; 32], by: Instant) -> bool {
        self.given.get(key).is_some_and(|turn| *turn <= by)
    }

    /// Somebody in this line still waits for a turn.
    pub(crate) fn are_outstanding(&self, line: &L, now: Instant) -> bool {
        self.next.get(line).is_some_and(|next| *next > now)
    }
}

/// A little later than this wait, at random: whoever was told the same does not come at the same moment.
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
    async fn turns_follow_each_other_and_who_asks_again_keeps_his_own() {
        let (mut turns, now) = (Turns::default(), Instant::now());
        let mut give = |number, now| turns.give(&"line", key(number), now, now + secs(4), secs(1));
        assert_eq!([1, 2, 3].map(|number| give(number, now)), [4, 5, 6].map(|second| now + secs(second)));
        let later = now + secs(1);
        assert_eq!((give(2, later), give(4, later)), (now + secs(5), now + secs(7)));
        // His time is over: he stands at the end.
        assert_eq!(give(1, now + secs(5)), now + secs(9));
        assert!(turns.are_outstanding(&"line", now) && !turns.are_outstanding(&"another", now));
        assert!(turns.is_due(&key(3), now + secs(6)) && !turns.is_due(&key(3), now + secs(5)));
        turns.done(&key(3));
        assert!(!turns.is_due(&key(3), now + secs(6)));
        assert_eq!(turns.give(&"another", key(9), now, now, secs(1)), now);
    }

    #[tokio::test(start_paused = true)]
    async fn no_wait_is_without_end_and_no_crowd_without_bound() {
        let (mut turns, now) = (Turns::default(), Instant::now());
        for number in 0..MAX_TURNS + 10 {
            let mut key = [0; 32];
            key[..8].copy_from_slice(&number.to_le_bytes());
            assert!(turns.give(&(), key, now, now, secs(1)) <= now + MAX_WAIT);
        }
        assert_eq!(turns.given.len(), MAX_TURNS);
        // Whose time is long over makes room.
        turns.give(&(), key(7), now + MAX_WAIT + secs(62), now, secs(1));
        assert_eq!(turns.given.len(), 1);
    }

    #[test]
    fn times_are_spread_a_little() {
        for (wait, most) in [(0, 0), (5, 500), (100, 1_000)] {
            let spread = spread(secs(wait)).checked_sub(secs(wait)).unwrap();
            assert!(spread <= Duration::from_millis(most), "{wait}: {spread:?}");
        }
    }
}
