//! Counts the bytes of all requests that are being read or decided, and of answers that are not read, over all connections, so that they cannot
//! exhaust the memory.

use std::{
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Context, Poll},
};

use hyper::body::{Body, Bytes, Frame, Incoming, SizeHint};
use tonic::Status;

use crate::grpc::errors::{RETRY_AFTER, limit_reached};

/// Unknown callers get the budget divided by this. Health checks and reflection need only a few bytes.
const UNKNOWN_CALLER_DIVISOR: usize = 32;

/// The limit of bytes, and how many are used.
pub(super) struct ByteBudget {
    limit: usize,
    used: AtomicUsize,
    used_by_unknown: AtomicUsize,
}

/// The bytes of one call. Dropping it gives them back.
pub(super) struct CallBytes {
    budget: Arc<ByteBudget>,
    known: bool,
    taken: AtomicUsize,
}

/// A request body that counts its bytes as they arrive.
pub(super) struct CountedBody {
    body: Incoming,
    bytes: Arc<CallBytes>,
}

/// The limit of bytes of unread answers, and how many are used.
pub(super) struct AnswerBudget {
    limit: usize,
    used_by_platforms: AtomicUsize,
    used_by_others: AtomicUsize,
}

/// The bytes of one answer. Dropping it gives them back.
pub(super) struct AnswerBytes {
    budget: Arc<AnswerBudget>,
    is_platform: bool,
    taken: usize,
}

// === impl AnswerBudget ===

impl AnswerBudget {
    pub(super) fn new(limit: usize) -> Arc<Self> {
        Arc::new(Self { limit, used_by_platforms: AtomicUsize::new(0), used_by_others: AtomicUsize::new(0) })
    }

    /// Takes the bytes of one answer, or refuses it. Platforms have a count of their own, which nobody else can use up.
    pub(super) fn take(self: &Arc<Self>, is_platform: bool, bytes: usize) -> Result<AnswerBytes, Status> {
        let answer = AnswerBytes { budget: Arc::clone(self), is_platform, taken: bytes };
        let limit = if is_platform { self.limit } else { self.limit / 2 };
        if self.used(is_platform).fetch_add(bytes, Ordering::Relaxed).saturating_add(bytes) > limit {
            return Err(limit_reached("limits.answer_bytes", &format!("{limit} bytes of unread answers at a time"), RETRY_AFTER));
        }
        Ok(answer)
    }

    fn used(&self, is_platform: bool) -> &AtomicUsize {
        if is_platform { &self.used_by_platforms } else { &self.used_by_others }
    }
}

impl Drop for AnswerBytes {
    fn drop(&mut self) {
        self.budget.used(self.is_platform).fetch_sub(self.taken, Ordering::Relaxed);
    }
}

// === impl ByteBudget ===

impl ByteBudget {
    pub(super) fn new(limit: usize) -> Arc<Self> {
        Arc::new(Self { limit, used: AtomicUsize::new(0), used_by_unknown: AtomicUsize::new(0) })
    }

    /// The count for a new call.
    pub(super) fn call(self: &Arc<Self>, known: bool) -> Arc<CallBytes> {
        Arc::new(CallBytes { budget: Arc::clone(self), known, taken: AtomicUsize::new(0) })
    }
}

// === impl CallBytes ===

impl CallBytes {
    fn take(&self, bytes: usize) -> Result<(), Status> {
        let ByteBudget { limit, used, used_by_unknown } = &*self.budget;
        let (used, limit) = if self.known { (used, *limit) } else { (used_by_unknown, limit / UNKNOWN_CALLER_DIVISOR) };
        self.taken.fetch_add(bytes, Ordering::Relaxed);
        if used.fetch_add(bytes, Ordering::Relaxed).saturating_add(bytes) > limit {
            return Err(limit_reached("limits.request_bytes", &format!("{limit} bytes of requests at a time"), RETRY_AFTER));
        }
        Ok(())
    }
}

impl Drop for CallBytes {
    fn drop(&mut self) {
        let used = if self.known { &self.budget.used } else { &self.budget.used_by_unknown };
        used.fetch_sub(*self.taken.get_mut(), Ordering::Relaxed);
    }
}

// === impl CountedBody ===

impl CountedBody {
    pub(super) fn new(body: Incoming, bytes: Arc<CallBytes>) -> Self {
        Self { body, bytes }
    }
}

impl Body for CountedBody {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let frame = match Pin::new(&mut self.body).poll_frame(context) {
            Poll::Ready(Some(Ok(frame))) => frame,
            // The caller left, which is not a fault of this service. The status becomes CANCELLED later: the library would take CANCELLED here for
            // the end of the body, so it is ABORTED.
            Poll::Ready(Some(Err(fault))) => {
                return Poll::Ready(Some(Err(Status::aborted(format!("the caller left while it sent its message: {fault}")))));
            }
            Poll::Ready(None) => return Poll::Ready(None),
            Poll::Pending => return Poll::Pending,
        };
        let length = frame.data_ref().map_or(0, Bytes::len);
        Poll::Ready(Some(self.bytes.take(length).map(|()| frame)))
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
