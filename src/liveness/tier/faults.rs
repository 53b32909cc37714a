//! The pause after faults of the store. After a few faults in a row, nothing is sent to it for a time (in events and metrics: it is left alone).
//! The pause doubles with each failed trial, and one trial runs at a time.

use std::time::Duration;

use tokio::time::Instant;

/// So many faults in a row start a pause. One lost packet must not.
const MAX_FAULTS: u32 = 5;
/// The first pause.
const MIN_PAUSE: Duration = Duration::from_secs(1);
/// The longest pause. A repaired store is noticed within it.
const MAX_PAUSE: Duration = Duration::from_secs(30);

/// The faults in a row, and the pause if there is one.
#[derive(Debug, Default)]
pub(super) struct Faults {
    in_a_row: u32,
    pause: Option<Pause>,
}

#[derive(Debug)]
struct Pause {
    until: Instant,
    length: Duration,
    trial_running: bool,
}

/// A start or an end of a pause.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Change {
    /// A pause began.
    LeftAlone,
    /// The pause ended.
    InUse,
}

// === impl Faults ===

impl Faults {
    /// Whether a command may be sent now. A trial without a result is given up after the length of the pause.
    pub(super) fn may_send(&mut self, now: Instant) -> bool {
        match &mut self.pause {
            None => true,
            Some(pause) if now < pause.until => false,
            Some(pause) => {
                pause.trial_running = true;
                pause.until = now + pause.length;
                true
            }
        }
    }

    pub(super) fn succeeded(&mut self) -> Option<Change> {
        self.in_a_row = 0;
        // A command that was sent before the pause and succeeds in it proves as much as a trial.
        self.pause.take().map(|_| Change::InUse)
    }

    pub(super) fn failed(&mut self, now: Instant) -> Option<Change> {
        self.in_a_row = self.in_a_row.saturating_add(1);
        match &mut self.pause {
            None if self.in_a_row < MAX_FAULTS => None,
            None => {
                self.pause = Some(Pause { until: now + MIN_PAUSE, length: MIN_PAUSE, trial_running: false });
                Some(Change::LeftAlone)
            }
            Some(pause) => {
                // A command that was sent before the pause is no trial.
                if pause.trial_running {
                    let length = (pause.length * 2).min(MAX_PAUSE);
                    *pause = Pause { until: now + length, length, trial_running: false };
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
    fn five_faults_in_a_row_start_a_pause_of_a_second() {
        let (mut faults, start) = (Faults::default(), Instant::now());
        for _ in 0..4 {
            assert_eq!(faults.failed(start), None);
        }
        assert_eq!(faults.succeeded(), None);
        for _ in 0..4 {
            assert_eq!(faults.failed(start), None);
            assert!(faults.may_send(start));
        }
        assert_eq!(faults.failed(start), Some(Change::LeftAlone));
        assert!(!faults.is_in_use() && !faults.may_send(after(start, 999)));
        // One trial, and no second one beside it.
        assert!(faults.may_send(after(start, 1_000)));
        assert!(!faults.may_send(after(start, 1_001)));
        assert_eq!(faults.succeeded(), Some(Change::InUse));
        assert!(faults.is_in_use() && faults.may_send(after(start, 1_002)));
    }

    #[test]
    fn each_failed_trial_doubles_the_pause_up_to_its_limit() {
        let (mut faults, mut now) = (Faults::default(), Instant::now());
        fail(&mut faults, 5, now);
        // Commands that were sent before the pause do not lengthen it.
        fail(&mut faults, 100, now);
        for seconds in [1, 2, 4, 8, 16, 30, 30] {
            let end = now + Duration::from_secs(seconds);
            assert!(!faults.may_send(end - Duration::from_millis(1)), "{seconds}");
            assert!(faults.may_send(end), "{seconds}");
            now = end + Duration::from_millis(350);
            assert_eq!(faults.failed(now), None);
        }
    }

    #[test]
    fn a_trial_without_a_result_is_followed_by_another() {
        let (mut faults, start) = (Faults::default(), Instant::now());
        fail(&mut faults, 5, start);
        assert!(faults.may_send(after(start, 1_000)));
        assert!(!faults.may_send(after(start, 1_999)));
        assert!(faults.may_send(after(start, 2_000)));
    }
}
