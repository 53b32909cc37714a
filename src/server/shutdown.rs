//! Signals: the first one drains, the second one ends the process at once.

use std::{io, process};

use tokio::signal::unix::{Signal, SignalKind, signal};

/// The exit code after a second signal: the one of a process that SIGINT ended.
const EXIT_AT_ONCE: i32 = 130;

/// Catches SIGTERM and SIGINT.
pub struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

// === impl Signals ===

impl Signals {
    /// Starts catching them, so that a signal that arrives before the server runs is not lost.
    pub fn catch() -> io::Result<Self> {
        Ok(Self { terminate: signal(SignalKind::terminate())?, interrupt: signal(SignalKind::interrupt())? })
    }

    /// Waits for the first signal. A second one ends the process, after `before_end`.
    pub async fn first(mut self, before_end: impl FnOnce() + Send + 'static) {
        self.next().await;
        tracing::info!(event = "draining", "stopping; a second signal stops at once");
        tokio::spawn(async move {
            self.next().await;
            before_end();
            process::exit(EXIT_AT_ONCE);
        });
    }

    async fn next(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}
