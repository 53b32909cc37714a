//! When the shared tier is left alone: after a few faults in a row, for a time that doubles, with one trial at a time.

use std::time::Duration;

use tokio::time::Instant;

/// So many faults in a row: fewer, and one lost packet would.
const MAX_FAULTS: u32 = 5;
/// How long it is left alone at first.
const MIN_PAUSE: Duration = Duration::from_secs(1);
/// The longest: a repaired store is noticed within it.
const MAX_PAUSE: Duration = Duration::from_secs(30);

/// How it has gone lately.
#[derive(Debug, Default)]
pub(super) struct Faults {
    in_a_row: u32,
    pause: Option<Pause>,
}

#[derive(Debug)]
struct Pause {
    until: Instant,
    length: Duration,
    trying: bool,
}

/// What has changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Change {
    /// It is left alone from now on.
    LeftAlone,
    /// It is in use again.
    InUse,
}

// === impl Faults ===

impl Faults {
    /// Whether it may be asked now. A trial that tells nothing is given up after the time of a pause.
    pub(super) fn may_ask(&mut self, now: Instant) -> bool {
        match &mut self.pause {
            None => true,
            Some(pause) if now < pause.until => false,
            Some(pause) => {
                pause.trying = true;
                pause.until = now + pause.length;
                true
            }
        }
    }

    pub(super) fn worked(&mut self) -> Option<Change> {
        self.in_a_row = 0;
        // What was asked before the pause and answered in it tells as much as a trial.
        self.pause.take().map(|_| Change::InUse)
    }

    pub(super) fn failed(&mut self, now: Instant) -> Option<Change> {
        self.in_a_row = self.in_a_row.saturating_add(1);
        match &mut self.pause {
            None if self.in_a_row < MAX_FAULTS => None,
            None => {
                self.pause = Some(Pause { until: now + MIN_PAUSE, length: MIN_PAUSE, trying: false });
                Some(Change::LeftAlone)
            }
            Some(pause) => {
                // One that was asked before the pause tells nothing new.
                if pause.trying {
                    let length = (pause.length * 2).min(MAX_PAUSE);
                    *pause = Pause { until: now + length, length, trying: false };
                }
                None
            }
        }
    }

    pub(super) const fn is_in_use(&self) -> bool {
        self.pause.is_none()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn after(start: Instant, millis: u64) -> Instant {
        start + Duration::from_millis(millis)
    }

    fn fail(faults: &mut Faults, times: u32, now: Instant) {
        for _ in 0..times {
            faults.failed(now);
        }
    }

    #[test]
    fn five_in_a_row_and_it_is_left_alone_for_a_second() {
        let (mut faults, start) = (Faults::default(), Instant::now());
        for _ in 0..4 {
            assert_eq!(faults.failed(start), None);
        }
        assert_eq!(faults.worked(), None);
        for _ in 0..4 {
            assert_eq!(faults.failed(start), None);
            assert!(faults.may_ask(start));
        }
        assert_eq!(faults.failed(start), Some(Change::LeftAlone));
        assert!(!faults.is_in_use() && !faults.may_ask(after(start, 999)));
        // One trial, and no second one beside it.
        assert!(faults.may_ask(after(start, 1_000)));
        assert!(!faults.may_ask(after(start, 1_001)));
        assert_eq!(faults.worked(), Some(Change::InUse));
        assert!(faults.is_in_use() && faults.may_ask(after(start, 1_002)));
    }

    #[test]
    fn each_failed_trial_doubles_the_pause_up_to_its_limit() {
        let (mut faults, mut now) = (Faults::default(), Instant::now());
        fail(&mut faults, 5, now);
        // What was under way as it began adds nothing.
        fail(&mut faults, 100, now);
        for seconds in [1, 2, 4, 8, 16, 30, 30] {
            let end = now + Duration::from_secs(seconds);
            assert!(!faults.may_ask(end - Duration::from_millis(1)), "{seconds}");
            assert!(faults.may_ask(end), "{seconds}");
            now = end + Duration::from_millis(350);
            assert_eq!(faults.failed(now), None);
        }
    }

    #[test]
    fn a_trial_that_tells_nothing_is_followed_by_another() {
        let (mut faults, start) = (Faults::default(), Instant::now());
        fail(&mut faults, 5, start);
        assert!(faults.may_ask(after(start, 1_000)));
        assert!(!faults.may_ask(after(start, 1_999)));
        assert!(faults.may_ask(after(start, 2_000)));
    }
}
