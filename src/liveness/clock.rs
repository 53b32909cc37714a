//! Tokio's clock for the library that limits rates, so that tests can move it.

use std::time::Duration;

use governor::clock::Clock;
use tokio::time::Instant;

/// Tokio's clock, so that tests can move it.
#[derive(Debug, Clone)]
pub(crate) struct TokioClock(Instant);

impl Clock for TokioClock {
    type Instant = Duration;

    fn now(&self) -> Duration {
        self.0.elapsed()
    }
}

impl TokioClock {
    pub(crate) fn new() -> Self {
        Self(Instant::now())
    }
}
