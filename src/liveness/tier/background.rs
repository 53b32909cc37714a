//! Background tasks. No caller waits for them. Their number is bounded, the end of the process waits for them, and dropped ones are counted.

use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio::{
    task::JoinSet,
    time::{Instant, timeout_at},
};

use crate::telemetry::metrics::Counter;

/// The running tasks.
pub(super) struct Background {
    limit: usize,
    /// `None` after `finish`.
    tasks: Mutex<Option<JoinSet<()>>>,
    pub(super) dropped: Counter,
}

// === impl Background ===

impl Background {
    /// Allows `limit` tasks at a time.
    pub(super) fn new(limit: usize) -> Self {
        Self { limit, tasks: Mutex::new(Some(JoinSet::new())), dropped: Counter::new() }
    }

    /// Starts a task. Over the limit and after `finish`, it drops the task.
    pub(super) fn run(&self, work: impl Future<Output = ()> + Send + 'static) {
        if let Some(tasks) = self.tasks().as_mut() {
            while tasks.try_join_next().is_some() {}
            if tasks.len() < self.limit {
                tasks.spawn(work);
                return;
            }
        }
        self.dropped.inc();
    }

    /// Waits until `by` for the running tasks, and drops the rest. Returns how many were dropped in all.
    pub(super) async fn finish(&self, by: Instant) -> u64 {
        let Some(mut tasks) = self.tasks().take() else { return self.dropped.get() };
        let all = async { while tasks.join_next().await.is_some() {} };
        // The timeout does not matter here: the tasks that are left are counted below.
        drop(timeout_at(by, all).await);
        self.dropped.inc_by(tasks.len().try_into().unwrap_or(u64::MAX));
        self.dropped.get()
    }

    fn tasks(&self) -> MutexGuard<'_, Option<JoinSet<()>>> {
        // A panic cannot leave it inconsistent: every change is one call.
        self.tasks.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::{
        sync::{
            Arc,
            atomic::{AtomicU32, Ordering},
        },
        time::Duration,
    };

    use super::*;

    async fn takes(seconds: u64, done: Arc<AtomicU32>) {
        tokio::time::sleep(Duration::from_secs(seconds)).await;
        done.fetch_add(1, Ordering::Relaxed);
    }

    fn after(seconds: u64) -> Instant {
        Instant::now() + Duration::from_secs(seconds)
    }

    #[tokio::test(start_paused = true)]
    async fn finish_waits_for_running_tasks_and_counts_the_rest() {
        let (background, done) = (Background::new(9), Arc::new(AtomicU32::new(0)));
        for seconds in [1, 3, 5, 7] {
            background.run(takes(seconds, Arc::clone(&done)));
        }
        let began = Instant::now();
        assert_eq!(background.finish(after(4)).await, 2);
        assert_eq!((began.elapsed().as_secs(), done.load(Ordering::Relaxed)), (4, 2));
        // A later task does not start, and a dropped one does not go on.
        background.run(takes(0, Arc::clone(&done)));
        tokio::time::sleep(Duration::from_secs(9)).await;
        assert_eq!((background.finish(after(4)).await, done.load(Ordering::Relaxed)), (3, 2));
    }

    #[tokio::test(start_paused = true)]
    async fn the_wait_ends_with_the_last_task() {
        let (background, done) = (Background::new(9), Arc::new(AtomicU32::new(0)));
        background.run(takes(2, Arc::clone(&done)));
        background.run(async { panic!("made to") });
        let began = Instant::now();
        assert_eq!(background.finish(after(60)).await, 0);
        assert_eq!((began.elapsed().as_secs(), done.load(Ordering::Relaxed)), (2, 1));
    }

    #[tokio::test(start_paused = true)]
    async fn no_more_tasks_than_the_limit_run() {
        let (background, done) = (Background::new(2), Arc::new(AtomicU32::new(0)));
        for _ in 0..5 {
            background.run(takes(1, Arc::clone(&done)));
        }
        assert_eq!(background.dropped.get(), 3);
        tokio::time::sleep(Duration::from_secs(2)).await;
        // There is room again.
        background.run(takes(1, Arc::clone(&done)));
        assert_eq!(background.finish(after(4)).await, 3);
        assert_eq!(done.load(Ordering::Relaxed), 3);
    }
}
