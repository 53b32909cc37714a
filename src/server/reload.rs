//! Files that are read again while the server runs: by content, the last good version kept, every fault logged and counted.

use std::{sync::Arc, time::Duration};

use tokio::time::{MissedTickBehavior, interval};

use super::error::ServerError;
use crate::telemetry::metrics::reloads::Reloads;

/// What comes from files.
pub(super) trait Source: Send + Sync {
    /// For logs and numbers.
    fn name(&self) -> &'static str;

    /// Reads the files, and takes what they hold if it has changed and stands.
    fn refresh(&self) -> Result<Refreshed, ServerError>;
}

/// What came of reading again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Refreshed {
    /// The same content.
    Unchanged,
    /// It is in force.
    Changed,
}

/// Reads again for ever. Content is compared, not times or events: a volume that is swapped by symlink and a file that is
/// written in place then look alike, and nothing is missed.
pub(super) async fn keep_fresh(sources: Vec<(Arc<dyn Source>, Arc<Reloads>)>, every: Duration) {
    let mut ticks = interval(every);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    // The first tick is at once, and the files have just been read.
    ticks.tick().await;
    let mut watched: Vec<_> = sources.into_iter().map(|(source, counts)| (source, counts, Failing::default())).collect();
    loop {
        ticks.tick().await;
        for (source, counts, failing) in &mut watched {
            // Small files on a local volume: not worth a thread.
            let refreshed = source.refresh();
            match &refreshed {
                Ok(Refreshed::Changed) => counts.taken(),
                Ok(Refreshed::Unchanged) => counts.unchanged(),
                Err(_) => counts.failed(),
            }
            failing.heard(source.name(), refreshed);
        }
    }
}

/// How a source has failed so far.
#[derive(Default)]
struct Failing {
    in_a_row: u64,
    last: String,
}

// === impl Failing ===

impl Failing {
    /// Tells what is new: the same fault again is counted, and told at debug level.
    fn heard(&mut self, name: &str, refreshed: Result<Refreshed, ServerError>) {
        match refreshed {
            Ok(Refreshed::Changed) => tracing::info!(event = "reloaded", what = name, failures = self.in_a_row),
            Ok(Refreshed::Unchanged) => {
                if self.in_a_row > 0 {
                    tracing::info!(event = "reload_recovered", what = name, failures = self.in_a_row, "the files are good again");
                }
            }
            Err(fault) => {
                let fault = super::error::chain(&fault);
                self.in_a_row += 1;
                let failures = self.in_a_row;
                if fault == self.last {
                    tracing::debug!(event = "reload_failed", what = name, failures, fault);
                } else {
                    tracing::error!(
                        event = "reload_failed",
                        what = name,
                        failures,
                        fault,
                        "the last good version stays in force"
                    );
                }
                self.last = fault;
                return;
            }
        }
        *self = Self::default();
    }
}
