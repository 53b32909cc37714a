//! Events that are logged once a minute, with the number of those since the last line.

use std::time::Duration;

use tokio::time::Instant;

/// The log mentions the same thing at most once in this time.
pub(super) const REPORT_EVERY: Duration = Duration::from_secs(60);

/// Events of one kind that were not logged yet.
#[derive(Debug, Default)]
pub(super) struct Unreported {
    pub(super) count: u64,
    pub(super) reported_at: Option<Instant>,
}

// === impl Unreported ===

impl Unreported {
    /// Counts one more. If a line is due, and `may_log` allows one, returns the number that the line has to report.
    pub(super) fn add(&mut self, now: Instant, may_log: impl FnOnce() -> bool) -> Option<u64> {
        self.count += 1;
        let is_due = self.reported_at.is_none_or(|at| now.duration_since(at) >= REPORT_EVERY);
        (is_due && may_log()).then(|| {
            self.reported_at = Some(now);
            std::mem::take(&mut self.count)
        })
    }
}
