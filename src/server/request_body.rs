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

/// Unknown callers get the limit of requests divided by this. Health checks and reflection need only a few bytes.
const UNKNOWN_CALLER_DIVISOR: usize = 32;
/// Callers that are no platform get the limit of unread answers divided by this.
const NO_PLATFORM_DIVISOR: usize = 2;

/// A limit of bytes. Callers that are trusted less have a count of their own, with a part of the limit, so that they use up nobody else's.
pub(super) struct ByteBudget {
    setting: &'static str,
    what: &'static str,
    trusted: Count,
    others: Count,
}

/// How many bytes may be used, and how many are.
struct Count {
    limit: usize,
    used: AtomicUsize,
}

/// The bytes of one call. Dropping it gives them back.
pub(super) struct CallBytes {
    budget: Arc<ByteBudget>,
    trusted: bool,
    taken: AtomicUsize,
}

/// A request body that counts its bytes as they arrive.
pub(super) struct CountedBody {
    body: Incoming,
    bytes: Arc<CallBytes>,
}

// === impl ByteBudget ===

impl ByteBudget {
    /// For requests; known callers are trusted.
    pub(super) fn of_requests(limit: usize) -> Arc<Self> {
        Self::new("limits.request_bytes", "requests", limit, UNKNOWN_CALLER_DIVISOR)
    }

    /// For answers that are not read; platforms are trusted.
    pub(super) fn of_unread_answers(limit: usize) -> Arc<Self> {
        Self::new("limits.answer_bytes", "unread answers", limit, NO_PLATFORM_DIVISOR)
    }

    fn new(setting: &'static str, what: &'static str, limit: usize, divisor: usize) -> Arc<Self> {
        let count = |limit| Count { limit, used: AtomicUsize::new(0) };
        Arc::new(Self { setting, what, trusted: count(limit), others: count(limit / divisor) })
    }

    /// The count for a new call.
    pub(super) fn call(self: &Arc<Self>, trusted: bool) -> Arc<CallBytes> {
        Arc::new(CallBytes { budget: Arc::clone(self), trusted, taken: AtomicUsize::new(0) })
    }

    /// A new call that takes these bytes at once, or is refused.
    pub(super) fn take(self: &Arc<Self>, trusted: bool, bytes: usize) -> Result<Arc<CallBytes>, Status> {
        let call = self.call(trusted);
        call.take(bytes).map(|()| call)
    }

    const fn count(&self, trusted: bool) -> &Count {
        if trusted { &self.trusted } else { &self.others }
    }
}

// === impl CallBytes ===

impl CallBytes {
    fn take(&self, bytes: usize) -> Result<(), Status> {
        let ByteBudget { setting, what, .. } = &*self.budget;
        let Count { limit, used } = self.budget.count(self.trusted);
        self.taken.fetch_add(bytes, Ordering::Relaxed);
        if used.fetch_add(bytes, Ordering::Relaxed).saturating_add(bytes) > *limit {
            return Err(limit_reached(setting, &format!("{limit} bytes of {what} at a time"), RETRY_AFTER));
        }
        Ok(())
    }
}

impl Drop for CallBytes {
    fn drop(&mut self) {
        let taken = *self.taken.get_mut();
        self.budget.count(self.trusted).used.fetch_sub(taken, Ordering::Relaxed);
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
