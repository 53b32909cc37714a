//! Signals: the first one drains, the second one ends the process at once.

use std::{io, process};

use tokio::signal::unix::{Signal, SignalKind, signal};

/// How a process ends that was told twice: as one that a signal killed, and not 0.
const EXIT_AT_ONCE: i32 = 130;

/// SIGTERM and SIGINT, caught from now on.
pub struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

// === impl Signals ===

impl Signals {
    /// Catches them: one that comes before the server runs is not lost.
    pub fn catch() -> io::Result<Self> {
        Ok(Self { terminate: signal(SignalKind::terminate())?, interrupt: signal(SignalKind::interrupt())? })
    }

    /// Ends with the first one; a second one ends the process.
    pub async fn first(mut self) {
        self.next().await;
        tracing::info!(event = "draining", "stopping; a second signal stops at once");
        tokio::spawn(async move {
            self.next().await;
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
