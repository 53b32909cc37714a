//! Runs a connection's calls. A call is polled once on the connection's own task, and gets a task of its own only if it has to wait. No call runs
//! past its end.
//!
//! Written by hand: hyper's own executor starts a task for each call, which costs more than deciding from memory (docs/performance.md has the
//! numbers). And nothing else in the HTTP library ends a call whose answer is not read.

use std::{
    collections::VecDeque,
    panic::{AssertUnwindSafe, catch_unwind},
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Waker},
};

use hyper::rt::Executor;
use tokio::time::{Instant, timeout_at};

/// The calls of one connection that have not been polled yet. Most need only one poll, since they are answered from memory. They are polled after
/// all requests that arrived together have been read, so that their answers are sent together.
///
/// Their number is limited by the connection's number of streams.
#[derive(Clone, Default)]
pub(super) struct InlineExecutor(Arc<Mutex<State>>);

#[derive(Default)]
struct State {
    calls: VecDeque<Call>,
    /// When the next call that is executed must end, even if its answer has not been read.
    next_end: Option<Instant>,
}

/// A call, including the sending of its answer.
struct Call {
    running: Pin<Box<dyn Future<Output = ()> + Send>>,
    end: Option<Instant>,
}

// === impl InlineExecutor ===

impl InlineExecutor {
    /// Sets the end of the call that the HTTP library executes next. At its end, its stream is reset and its resources are freed.
    pub(super) fn set_next_end(&self, end: Option<Instant>) {
        self.lock().next_end = end;
    }

    /// Polls each waiting call once, on this thread. A call that answers wakes the connection.
    pub(super) fn poll_once(&self) {
        loop {
            let next = self.lock().calls.pop_front();
            let Some(Call { mut running, end }) = next else { return };
            // No waker is needed: a call that is still pending is polled again by its own task. A panic ends only this call, as in a task.
            let mut no_wake = Context::from_waker(Waker::noop());
            let polled = catch_unwind(AssertUnwindSafe(|| running.as_mut().poll(&mut no_wake)));
            if polled.is_ok_and(|polled| polled.is_pending()) {
                tokio::spawn(async move {
                    match end {
                        // Dropping the future resets the stream.
                        Some(end) => drop(timeout_at(end, running).await),
                        None => running.await,
                    }
                });
            }
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        // No code panics while it holds the lock.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<F: Future<Output = ()> + Send + 'static> Executor<F> for InlineExecutor {
    fn execute(&self, call: F) {
        let mut state = self.lock();
        let end = state.next_end.take();
        state.calls.push_back(Call { running: Box::pin(call), end });
    }
}

#[cfg(test)]
mod tests {
    use std::{
        sync::atomic::{AtomicUsize, Ordering},
        time::Duration,
    };

    use tokio::{runtime::Handle, sync::oneshot, task::yield_now};

    use super::*;

    /// How many calls were answered, and how many tasks exist.
    fn seen(answered: &AtomicUsize) -> (usize, usize) {
        (answered.load(Ordering::Relaxed), Handle::current().metrics().num_alive_tasks())
    }

    #[tokio::test]
    async fn a_call_that_is_ready_gets_no_task_and_one_that_waits_gets_one() {
        let (inline, answered) = (InlineExecutor::default(), Arc::new(AtomicUsize::new(0)));
        let (sender, receiver) = oneshot::channel::<()>();
        let (first, second) = (Arc::clone(&answered), Arc::clone(&answered));
        inline.execute(async move {
            receiver.await.unwrap();
            second.fetch_add(10, Ordering::Relaxed);
        });
        inline.execute(async move {
            first.fetch_add(1, Ordering::Relaxed);
        });
        assert_eq!(seen(&answered), (0, 0), "nobody has been polled");
        inline.poll_once();
        assert_eq!(seen(&answered), (1, 1));
        sender.send(()).unwrap();
        while seen(&answered).1 > 0 {
            yield_now().await;
        }
        assert_eq!(seen(&answered), (11, 0));
    }

    #[tokio::test]
    async fn a_panic_ends_its_own_call_alone() {
        let (inline, answered) = (InlineExecutor::default(), Arc::new(AtomicUsize::new(0)));
        inline.execute(async { panic!("a fault of one call") });
        let next = Arc::clone(&answered);
        inline.execute(async move {
            next.fetch_add(1, Ordering::Relaxed);
        });
        inline.poll_once();
        assert_eq!(seen(&answered), (1, 0));
    }

    /// A call whose answer is not read ends too. The end that was set does not apply to the call after it.
    #[tokio::test(start_paused = true)]
    async fn a_call_ends_at_its_end() {
        let (inline, answered) = (InlineExecutor::default(), Arc::new(AtomicUsize::new(0)));
        let began = Instant::now();
        inline.set_next_end(Some(began + Duration::from_secs(1)));
        inline.execute(std::future::pending());
        inline.execute(std::future::pending());
        inline.poll_once();
        assert_eq!(seen(&answered), (0, 2));
        while seen(&answered).1 > 1 {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        assert!((1..2).contains(&began.elapsed().as_secs()), "{:?}", began.elapsed());
    }
}
