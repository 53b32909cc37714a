//! One record of each call, and of each item of a batch: started with it and ended once, with its decision or its code. Out of it the log's
//! event, the numbers and the span are written.

use std::{
    num::NonZeroU64,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use http::HeaderMap;
use tonic::{Code, Status};
use tracing::Span;

use super::NAME;
use crate::{
    core::engine::Decided,
    domain::request::{Peer, Request},
    telemetry::{
        events::{Journal, Undecided},
        lately::Lately,
        metrics::{
            Collect, Page,
            calls::{BATCH_DECIDE, Calls, DECIDE, word_of},
            decisions::Decisions,
        },
        traces::Traced,
    },
};

/// Where records go.
pub(crate) struct Recorder {
    journal: Journal,
    lately: Arc<Lately>,
    calls: Calls,
    decisions: Decisions,
}

/// One call, or one item of a batch. Dropped before it has ended, it was given up by its caller.
pub(crate) struct CallRecord {
    recorder: Arc<Recorder>,
    peer: Peer,
    method: &'static str,
    traced: Traced,
    /// What fails is no workspace that could not start.
    report_only: AtomicBool,
    /// What the caller gave the call, in microseconds; 0 where it gave as much as it may have.
    caller_time: AtomicU64,
    ended: AtomicBool,
}

// === impl Recorder ===

impl Recorder {
    /// Events go to this journal, and what a person may ask about to this list.
    pub(crate) fn new(journal: Journal, lately: Arc<Lately>) -> Self {
        Self { journal, lately, calls: Calls::default(), decisions: Decisions::default() }
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
    /// Of a call that begins now. The method is empty where it is none of the service's.
    pub(crate) fn begin(recorder: &Arc<Recorder>, peer: Peer, method: &'static str, headers: &HeaderMap) -> Self {
        let traced = if decides(method) { Traced::begin(headers, NAME, method) } else { Traced::default() };
        Self {
            recorder: Arc::clone(recorder),
            peer,
            method,
            traced,
            report_only: AtomicBool::new(false),
            caller_time: AtomicU64::new(0),
            ended: AtomicBool::new(false),
        }
    }

    /// Of one item of this batch.
    pub(super) fn item(&self, index: u32) -> Self {
        let Self { peer, method, .. } = *self;
        Self {
            recorder: Arc::clone(&self.recorder),
            peer,
            method,
            traced: self.traced.item(index),
            report_only: AtomicBool::new(false),
            caller_time: AtomicU64::new(self.caller_time.load(Ordering::Relaxed)),
            ended: AtomicBool::new(false),
        }
    }

    /// The span of the work; none if it is not traced.
    pub(super) fn span(&self) -> Span {
        self.traced.span()
    }

    /// The caller only wants to know.
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

    /// A decision was made.
    pub(super) fn decided(&self, request: &Request, decided: &Decided, took: Duration) {
        if self.ended.swap(true, Ordering::Relaxed) {
            return;
        }
        let Recorder { journal, lately, decisions, .. } = &*self.recorder;
        self.traced.decided(request.checkpoint.as_str(), decided);
        self.traced.answered(Code::Ok);
        decisions.made(request, &decided.decision, took);
        lately.decided(request, decided);
        journal.decision(request, decided, took, self.caller_time(), self.traced.trace_id());
    }

    /// Something panicked on the way: a fault of ours, which ends this call alone.
    pub(super) fn panicked(&self) {
        self.recorder.decisions.panicked();
        tracing::error!(event = "decision_panicked", method = self.method, "a panic of this service; no decision was made");
    }

    /// It ended with this status; `request` is what was asked, if that much was understood.
    pub(super) fn failed(&self, status: &Status, request: Option<&Request>) {
        self.end_with(status.code(), status.message(), request);
    }

    /// It was given up before it ended, if it has not ended.
    pub(super) fn left(&self, request: Option<&Request>) {
        self.end_with(Code::Cancelled, "the caller left, or its deadline passed, before a decision was made", request);
    }

    /// It ended so, unless it has ended before.
    pub(crate) fn end(&self, code: Code, reason: &str) {
        self.end_with(code, reason, None);
    }

    fn end_with(&self, code: Code, reason: &str, request: Option<&Request>) {
        if self.ended.swap(true, Ordering::Relaxed) {
            return;
        }
        let Recorder { journal, lately, calls, .. } = &*self.recorder;
        if code != Code::Ok {
            let report_only = self.report_only.load(Ordering::Relaxed);
            calls.failed(self.method, code as i32, report_only);
            if decides(self.method) {
                let Self { peer, method, .. } = *self;
                let (grpc_code, trace_id) = (word_of(code as i32), self.traced.trace_id());
                let caller_time = self.caller_time();
                let undecided = Undecided { method, grpc_code, reason, peer, request, report_only, caller_time, trace_id };
                lately.undecided(&undecided);
                journal.undecided(undecided);
            }
        }
        self.traced.answered(code);
    }
}

impl Drop for CallRecord {
    fn drop(&mut self) {
        self.left(None);
    }
}

/// The journal knows of the calls that ask for a decision.
fn decides(method: &str) -> bool {
    matches!(method, DECIDE | BATCH_DECIDE)
}
