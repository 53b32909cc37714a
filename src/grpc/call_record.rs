//! One record for each call and for each item of a batch. It begins with the call and ends once, with a decision or a gRPC code. The log event, the
//! metrics and the span are written from it.

use std::{
    num::NonZeroU64,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use http::HeaderMap;
use tokio::time::Instant;
use tonic::{Code, Status};
use tracing::Span;

use super::{NAME, authorize::Caller, convert::About};
use crate::{
    core::engine::Decided,
    domain::request::{Peer, Request},
    telemetry::{
        events::{Journal, Undecided},
        metrics::{
            Collect, Page,
            calls::{BATCH_DECIDE, Calls, DECIDE, word_of},
            decisions::Decisions,
        },
        recent_decisions::RecentDecisions,
        traces::Traced,
    },
};

/// What is said of an item that was not decided in the batch's time.
pub(super) const BATCH_DEADLINE: &str = "no decision was made before the batch's deadline";

/// The destinations of records.
pub(crate) struct Recorder {
    journal: Journal,
    recent_decisions: Arc<RecentDecisions>,
    calls: Calls,
    decisions: Decisions,
    /// The drain is over: calls still in flight are cut off.
    cuts_off: AtomicBool,
}

/// The record of one call or of one item of a batch. If it is dropped before it has ended, the caller has cancelled, or the server stops.
pub(crate) struct CallRecord {
    recorder: Arc<Recorder>,
    peer: Peer,
    method: &'static str,
    traced: Traced,
    caller: OnceLock<Arc<Caller>>,
    /// The caller does not act on the answer, so a failure keeps no workspace from starting.
    report_only: AtomicBool,
    /// What the caller gave the call, in microseconds; 0 where it gave as much as it may have.
    caller_time: AtomicU64,
    ended: AtomicBool,
    /// Only for an item of a batch: when the batch's time for answers ends.
    answer_by: Option<Instant>,
}

// === impl Recorder ===

impl Recorder {
    /// Events go to this journal, and what a person may ask about to this list.
    pub(crate) fn new(journal: Journal, recent_decisions: Arc<RecentDecisions>) -> Self {
        let (calls, decisions) = (Calls::default(), Decisions::default());
        Self { journal, recent_decisions, calls, decisions, cuts_off: AtomicBool::new(false) }
    }

    /// From now on the server ends calls that are in flight, not their callers.
    pub(crate) fn set_cut_off(&self) {
        self.cuts_off.store(true, Ordering::Relaxed);
    }
}

impl Collect for Recorder {
    fn collect(&self, page: &mut Page) {
        self.decisions.collect(page);
        self.calls.collect(page);
    }
}

// === impl CallRecord ===

impl CallRecord {
    /// The record of a call that begins now. `method` is empty for methods of other services.
    pub(crate) fn begin(recorder: &Arc<Recorder>, peer: Peer, method: &'static str, headers: &HeaderMap) -> Self {
        let traced = if asks_for_decision(method) { Traced::begin(headers, NAME, method) } else { Traced::default() };
        Self {
            recorder: Arc::clone(recorder),
            peer,
            method,
            traced,
            caller: OnceLock::new(),
            report_only: AtomicBool::new(false),
            caller_time: AtomicU64::new(0),
            ended: AtomicBool::new(false),
            answer_by: None,
        }
    }

    /// The record of one item of this batch, which has to be answered by then.
    pub(super) fn item(&self, index: u32, answer_by: Instant) -> Self {
        let Self { peer, method, .. } = *self;
        Self {
            recorder: Arc::clone(&self.recorder),
            peer,
            method,
            traced: self.traced.item(index),
            caller: self.caller.clone(),
            report_only: AtomicBool::new(false),
            caller_time: AtomicU64::new(self.caller_time.load(Ordering::Relaxed)),
            ended: AtomicBool::new(false),
            answer_by: Some(answer_by),
        }
    }

    /// The span of the call; disabled if the call is not traced.
    pub(super) fn span(&self) -> Span {
        self.traced.span()
    }

    /// Sets the caller, once it is known.
    pub(crate) fn set_caller(&self, caller: &Arc<Caller>) {
        self.caller.get_or_init(|| Arc::clone(caller));
    }

    /// Sets whether the caller acts on the answer.
    pub(super) fn set_report_only(&self, report_only: bool) {
        self.report_only.store(report_only, Ordering::Relaxed);
    }

    /// The caller gives the call less time than it may have.
    pub(crate) fn set_caller_time(&self, time: Duration) {
        self.caller_time.store(u64::try_from(time.as_micros()).unwrap_or(u64::MAX).max(1), Ordering::Relaxed);
    }

    /// In microseconds.
    fn caller_time(&self) -> Option<NonZeroU64> {
        NonZeroU64::new(self.caller_time.load(Ordering::Relaxed))
    }

    /// Ends the record with a decision.
    pub(super) fn decided(&self, request: &Request, decided: &Decided, took: Duration) {
        if self.ended.swap(true, Ordering::Relaxed) {
            return;
        }
        let Recorder { journal, recent_decisions, decisions, .. } = &*self.recorder;
        self.traced.decided(request.checkpoint.as_str(), decided);
        self.traced.answered(Code::Ok);
        decisions.made(request, &decided.decision, took);
        recent_decisions.decided(request, decided, self.peer, self.caller_time());
        journal.decision(request, decided, took, self.caller_time(), self.traced.trace_id());
    }

    /// Counts and logs a panic. Only this call fails because of it.
    pub(super) fn panicked(&self) {
        self.recorder.decisions.panicked();
        tracing::error!(event = "decision_panicked", method = self.method, "a panic of this service; no decision was made");
    }

    /// Ends the record with an error.
    pub(super) fn failed(&self, status: &Status, about: About<&str>) {
        self.end_with(status.code(), status.message(), about);
    }

    /// Ends the record of a call that was dropped, unless it has ended.
    pub(super) fn cancelled(&self, about: About<&str>) {
        let (code, reason) = if self.recorder.cuts_off.load(Ordering::Relaxed) {
            (Code::Unavailable, "the service stopped before a decision was made: shutdown.drain was over")
        } else if self.answer_by.is_some_and(|end| Instant::now() >= end) {
            (Code::DeadlineExceeded, BATCH_DEADLINE)
        } else {
            (Code::Cancelled, "the caller left, or its deadline passed, before a decision was made")
        };
        self.end_with(code, reason, about);
    }

    /// Ends the record with this code, unless it has ended.
    pub(crate) fn end(&self, code: Code, reason: &str) {
        self.end_with(code, reason, About::default());
    }

    fn end_with(&self, code: Code, reason: &str, about: About<&str>) {
        if self.ended.swap(true, Ordering::Relaxed) {
            return;
        }
        let Recorder { journal, recent_decisions, calls, .. } = &*self.recorder;
        if code != Code::Ok {
            let report_only = self.report_only.load(Ordering::Relaxed);
            calls.failed(self.method, code as i32, report_only);
            if asks_for_decision(self.method) {
                let Self { peer, method, .. } = *self;
                let (grpc_code, trace_id) = (word_of(code as i32), self.traced.trace_id());
                let caller_time = self.caller_time();
                let caller = self.caller.get().map_or("", |caller| caller.name.as_str());
                let About { checkpoint, workspace_id, organization_id } = about;
                let undecided = Undecided {
                    method,
                    grpc_code,
                    reason,
                    peer,
                    caller,
                    checkpoint,
                    workspace_id,
                    organization_id,
                    report_only,
                    caller_time,
                    trace_id,
                };
                recent_decisions.undecided(&undecided);
                journal.undecided(undecided);
            }
        }
        self.traced.answered(code);
    }
}

impl Drop for CallRecord {
    fn drop(&mut self) {
        self.cancelled(About::default());
    }
}

/// Whether the method asks for a decision. The journal has only such calls.
fn asks_for_decision(method: &str) -> bool {
    matches!(method, DECIDE | BATCH_DECIDE)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An item that is left at the batch's deadline was not given up by its caller.
    #[test]
    fn an_item_at_its_batchs_deadline_is_no_cancelled_call() {
        let recent = Arc::new(RecentDecisions::new(false));
        let recorder = Arc::new(Recorder::new(Journal::off(), Arc::clone(&recent)));
        let batch = CallRecord::begin(&recorder, Peer::Unix { uid: 0, gid: 0 }, BATCH_DECIDE, &HeaderMap::new());
        batch.end(Code::Ok, "");
        let now = Instant::now();
        drop(batch.item(0, now + Duration::from_secs(3600)));
        drop(batch.item(1, now));
        let codes: Vec<&str> = recent.undecided_calls().iter().map(|call| call.grpc_code).collect();
        assert_eq!(codes, ["DEADLINE_EXCEEDED", "CANCELLED"], "newest first");
    }
}
