//! Where a connection's calls run: first on the connection's own task, and on tasks of their own if they have to wait.

use std::{
    collections::VecDeque,
    panic::{AssertUnwindSafe, catch_unwind},
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Waker},
};

use hyper::rt::Executor;

/// The calls of one connection that have not had their first turn. Most need no other: they are answered from memory, and a task for
/// each would cost more than deciding. They have it once all that came together has been read, so that the answers leave together.
///
/// There are no more of them than a connection may have streams.
#[derive(Clone, Default)]
pub(super) struct InlineExecutor(Arc<Mutex<VecDeque<Running>>>);

type Running = Pin<Box<dyn Future<Output = ()> + Send>>;

// === impl InlineExecutor ===

impl InlineExecutor {
    /// Gives each waiting call its first turn, on this thread. Whoever answers wakes the connection.
    pub(super) fn poll_once(&self) {
        while let Some(mut call) = self.next() {
            // Nothing needs waking yet: a call that waits is polled again, by its task. A panic ends the call alone, as in a task.
            let mut unwoken = Context::from_waker(Waker::noop());
            let turn = catch_unwind(AssertUnwindSafe(|| call.as_mut().poll(&mut unwoken)));
            if turn.is_ok_and(|turn| turn.is_pending()) {
                tokio::spawn(call);
            }
        }
    }

    fn next(&self) -> Option<Running> {
        // Nothing panics while it is locked.
        self.0.lock().unwrap_or_else(PoisonError::into_inner).pop_front()
    }
}

impl<F: Future<Output = ()> + Send + 'static> Executor<F> for InlineExecutor {
    fn execute(&self, call: F) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push_back(Box::pin(call));
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use tokio::{runtime::Handle, sync::oneshot, task::yield_now};

    use super::*;

    /// How many have been answered, and how many tasks there are.
    fn seen(answered: &AtomicUsize) -> (usize, usize) {
        (answered.load(Ordering::Relaxed), Handle::current().metrics().num_alive_tasks())
    }

    #[tokio::test]
    async fn who_need_not_wait_gets_no_task_and_who_waits_gets_one() {
        let (inline, answered) = (InlineExecutor::default(), Arc::new(AtomicUsize::new(0)));
        let (tell, told) = oneshot::channel::<()>();
        let (first, second) = (Arc::clone(&answered), Arc::clone(&answered));
        inline.execute(async move {
            told.await.unwrap();
            second.fetch_add(10, Ordering::Relaxed);
        });
        inline.execute(async move {
            first.fetch_add(1, Ordering::Relaxed);
        });
        assert_eq!(seen(&answered), (0, 0), "nobody has had a turn");
        inline.poll_once();
        assert_eq!(seen(&answered), (1, 1));
        tell.send(()).unwrap();
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
}
