//! The bytes of requests that are being read or decided: counted over all connections, so that no number of them fills the memory.

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

/// So much of the budget may callers have that nobody knows: health checks and reflection ask with a few bytes.
const SHARE_OF_UNKNOWN: usize = 32;

/// How many bytes there may be, and how many there are.
pub(super) struct ByteBudget {
    limit: usize,
    used: AtomicUsize,
    used_by_unknown: AtomicUsize,
}

/// The bytes of one call. Dropped with it.
pub(super) struct CallBytes {
    budget: Arc<ByteBudget>,
    known: bool,
    taken: AtomicUsize,
}

/// A request's body, whose bytes are counted while they come.
pub(super) struct CountedBody {
    body: Incoming,
    bytes: Arc<CallBytes>,
}

// === impl ByteBudget ===

impl ByteBudget {
    pub(super) fn new(limit: usize) -> Arc<Self> {
        Arc::new(Self { limit, used: AtomicUsize::new(0), used_by_unknown: AtomicUsize::new(0) })
    }

    /// For a call that begins.
    pub(super) fn call(self: &Arc<Self>, known: bool) -> Arc<CallBytes> {
        Arc::new(CallBytes { budget: Arc::clone(self), known, taken: AtomicUsize::new(0) })
    }
}

// === impl CallBytes ===

impl CallBytes {
    fn take(&self, bytes: usize) -> Result<(), Status> {
        let ByteBudget { limit, used, used_by_unknown } = &*self.budget;
        let (used, limit) = if self.known { (used, *limit) } else { (used_by_unknown, limit / SHARE_OF_UNKNOWN) };
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
            // The caller is gone: no fault of this service is to be looked for. The library would take CANCELLED for the body's end, so it is
            // made of ABORTED later.
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
