//! Makes one decision for a call. Invalid input and internal errors become gRPC statuses, everything else becomes a decision. Both are recorded.

use std::{panic::AssertUnwindSafe, sync::Arc};

use futures_util::FutureExt;
use prost::Message;
use tokio::time::Instant;
use tonic::Status;
use tracing::Instrument;

use super::{
    admission::Admission,
    authorize::{Authorizer, Caller, Role},
    call_record::CallRecord,
    convert::{
        self, About, Invalid, Violations,
        pb::{self, ErrorReason},
    },
    errors::{bad_request, error, invalid},
    limits::{Deadlines, Limits},
};
use crate::{
    core::engine::{Decided, Engine},
    domain::request::{CalledBy, Request},
};

/// The state that all calls share.
pub(super) struct Shared {
    pub(super) engine: Arc<Engine>,
    pub(super) admission: Admission,
    pub(super) authorizer: Arc<Authorizer>,
    pub(super) limits: Limits,
    pub(super) deadlines: Deadlines,
}

/// Makes decisions for one caller.
#[derive(Clone)]
pub(super) struct Decider {
    pub(super) shared: Arc<Shared>,
    pub(super) caller: Arc<Caller>,
}

// === impl Decider ===

impl Decider {
    /// Answers a Decide call.
    pub(super) async fn call(
        &self,
        message: pb::DecideRequest,
        answer_by: Instant,
        record: &CallRecord,
    ) -> Result<pb::DecideResponse, Status> {
        record.set_report_only(message.report_only);
        self.catch_panics(self.parsed(message, record), answer_by, false, record).await
    }

    /// Decides an item of a batch. The gRPC library limits the size of a whole message, but not of an item.
    pub(super) async fn item(
        &self,
        message: pb::DecideRequest,
        answer_by: Instant,
        record: &CallRecord,
    ) -> Result<pb::DecideResponse, Status> {
        record.set_report_only(message.report_only);
        let (length, limit) = (message.encoded_len(), self.shared.limits.message_bytes);
        let request = if length > limit {
            let found = format!("the request is {length} bytes long; the limit is {limit} (limits.message_bytes)");
            let status = bad_request(ErrorReason::RequestTooLarge, Violations(vec![("workspace_spec".to_owned(), found)]));
            record.failed(&status, About::of(&message, &self.shared.limits).as_ref());
            Err(status)
        } else {
            self.parsed(message, record)
        };
        self.catch_panics(request, answer_by, true, record).await
    }

    /// The request that the message holds. If it is invalid, the record ends with what is wrong.
    fn parsed(&self, message: pb::DecideRequest, record: &CallRecord) -> Result<Request, Status> {
        convert::request_within(message, &self.shared.limits).map_err(|Invalid { violations, about }| {
            let status = invalid(violations);
            record.failed(&status, about.as_ref());
            status
        })
    }

    /// A panic ends only this call, and not the connection or other items of a batch.
    async fn catch_panics(
        &self,
        request: Result<Request, Status>,
        answer_by: Instant,
        waits_until_deadline: bool,
        record: &CallRecord,
    ) -> Result<pb::DecideResponse, Status> {
        let deciding = AssertUnwindSafe(self.decide(request, answer_by, waits_until_deadline, record)).catch_unwind().await;
        deciding.unwrap_or_else(|_| {
            record.panicked();
            let status = internal();
            record.failed(&status, About::default());
            Err(status)
        })
    }

    async fn decide(
        &self,
        request: Result<Request, Status>,
        answer_by: Instant,
        waits_until_deadline: bool,
        record: &CallRecord,
    ) -> Result<pb::DecideResponse, Status> {
        let mut request = request?;
        request.caller =
            CalledBy { name: self.caller.name.clone(), is_workspace: matches!(self.caller.role, Role::Workspace(_)) };
        let began = Instant::now();
        let _unfinished = Unfinished { record, request: &request };
        let decided = self.decided(&request, answer_by, waits_until_deadline).instrument(record.span()).await;
        let decided = decided.inspect_err(|status| record.failed(status, (&request).into()))?;
        record.decided(&request, &decided, began.elapsed());
        Ok(convert::response(decided))
    }

    /// An item of a batch waits for a permit until its deadline. A call is refused soon, so that it can try another replica.
    async fn decided(&self, request: &Request, answer_by: Instant, waits_until_deadline: bool) -> Result<Box<Decided>, Status> {
        let Shared { engine, admission, authorizer, .. } = &*self.shared;
        authorizer.request(&self.caller, request)?;
        let organization = request.caller.organization(&request.spec.organization_id);
        engine
            .decide_admitted(request, answer_by, |endpoint| async move {
                let expected_wait = || engine.expected_wait(&endpoint.provider);
                if waits_until_deadline {
                    admission.admit_by(&endpoint.provider, answer_by, &expected_wait).await
                } else {
                    admission.admit(&endpoint.provider, organization, &expected_wait).await
                }
            })
            .await
    }
}

/// A decision in progress. If it is dropped before it is recorded, the caller has cancelled or the code has panicked. The record then has the
/// request.
struct Unfinished<'d> {
    record: &'d CallRecord,
    request: &'d Request,
}

impl Drop for Unfinished<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.record.failed(&internal(), self.request.into());
        } else {
            self.record.cancelled(self.request.into());
        }
    }
}

fn internal() -> Status {
    error(ErrorReason::Internal, "no decision was made: an internal error")
}
