//! Tokio's clock for governor, the rate limiter, so that tests can move time.

use std::time::Duration;

use governor::clock::Clock;
use tokio::time::Instant;

/// Measures from the time it was made.
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
