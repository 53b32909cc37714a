//! Counts of reloads.

use std::{
    path::PathBuf,
    sync::{Mutex, MutexGuard, PoisonError},
    time::SystemTime,
};

use super::{Collect, Counter, Page};

/// Counts of the reloads of one source, and the state of its files.
#[derive(Debug)]
pub struct Reloads {
    what: &'static str,
    taken: Counter,
    failed: Counter,
    state: Mutex<FollowedFiles>,
}

/// Files that are read again when they change.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FollowedFiles {
    /// What comes from them.
    pub what: &'static str,
    /// Their paths.
    pub files: Vec<PathBuf>,
    /// When the version in force was read.
    pub taken_at: SystemTime,
    /// Why what is there now is not in force; empty while it is.
    pub fault: String,
    /// Since when that is so.
    pub failed_at: Option<SystemTime>,
    /// Those that hold a secret and that every user of this machine can read.
    pub exposed: Vec<PathBuf>,
}

// === impl Reloads ===

impl Reloads {
    /// Counts for the source of this name, which has just been read from these files.
    pub fn of(what: &'static str, files: Vec<PathBuf>) -> Self {
        let state = FollowedFiles {
            what,
            files,
            taken_at: SystemTime::now(),
            fault: String::new(),
            failed_at: None,
            exposed: Vec::new(),
        };
        Self { what, taken: Counter::new(), failed: Counter::new(), state: Mutex::new(state) }
    }

    /// A reload took a new version.
    pub fn taken(&self) {
        self.taken.inc();
        let mut state = self.state();
        (state.taken_at, state.fault, state.failed_at) = (SystemTime::now(), String::new(), None);
    }

    /// A reload found valid files with the same content.
    pub fn unchanged(&self) {
        let mut state = self.state();
        (state.fault, state.failed_at) = (String::new(), None);
    }

    /// A reload found files that are unreadable or invalid, for this reason.
    pub fn failed(&self, fault: &str) {
        self.failed.inc();
        let mut state = self.state();
        if state.fault != fault {
            (state.fault, state.failed_at) = (fault.to_owned(), Some(SystemTime::now()));
        }
    }

    /// Every user of this machine can read these files, which hold secrets.
    pub fn exposed(&self, files: Vec<PathBuf>) {
        self.state().exposed = files;
    }

    /// The state of its files.
    pub fn followed(&self) -> FollowedFiles {
        self.state().clone()
    }

    fn state(&self) -> MutexGuard<'_, FollowedFiles> {
        // A panic cannot leave it inconsistent: its fields do not depend on each other.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Collect for Reloads {
    fn collect(&self, page: &mut Page) {
        let mut reloads = page.counter("byokgate_reloads", "Files read again");
        reloads.add(&[("what", self.what), ("result", "taken")], &self.taken);
        reloads.add(&[("what", self.what), ("result", "failed")], &self.failed);
        let failing = u64::from(!self.state().fault.is_empty());
        page.gauge("byokgate_reload_failing", "1 while the files are invalid and the last good version is in force")
            .add(&[("what", self.what)], failing);
    }
}
