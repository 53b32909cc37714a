//! Counts of reloads.

use std::sync::atomic::{AtomicBool, Ordering};

use super::{Collect, Counter, Page};

/// Counts of the reloads of one source.
#[derive(Debug)]
pub struct Reloads {
    what: &'static str,
    taken: Counter,
    failed: Counter,
    failing: AtomicBool,
}

// === impl Reloads ===

impl Reloads {
    /// Counts for the source of this name.
    pub const fn of(what: &'static str) -> Self {
        Self { what, taken: Counter::new(), failed: Counter::new(), failing: AtomicBool::new(false) }
    }

    /// A reload took a new version.
    pub fn taken(&self) {
        self.taken.inc();
        self.failing.store(false, Ordering::Relaxed);
    }

    /// A reload found valid files with the same content.
    pub fn unchanged(&self) {
        self.failing.store(false, Ordering::Relaxed);
    }

    /// A reload found files that are unreadable or invalid.
    pub fn failed(&self) {
        self.failed.inc();
        self.failing.store(true, Ordering::Relaxed);
    }
}

impl Collect for Reloads {
    fn collect(&self, page: &mut Page) {
        let mut reloads = page.counter("byokgate_reloads", "Files that were read again");
        reloads.add(&[("what", self.what), ("result", "taken")], &self.taken);
        reloads.add(&[("what", self.what), ("result", "failed")], &self.failed);
        let failing = u64::from(self.failing.load(Ordering::Relaxed));
        page.gauge("byokgate_reload_failing", "1 while what is in the files is invalid and the last good version is in force")
            .add(&[("what", self.what)], failing);
    }
}
