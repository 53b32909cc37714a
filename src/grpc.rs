//! The gRPC service: convert, decide, convert, record once.

pub(crate) mod admission;
pub mod caller;
mod codec;
pub mod convert;
pub(crate) mod deadline;
pub(crate) mod errors;

use std::{
    panic::AssertUnwindSafe,
    pin::{Pin, pin},
    sync::Arc,
    time::{Duration, SystemTime},
};

use futures_util::{FutureExt, Stream, StreamExt, stream};
use prost::Message;
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::{Instant, timeout_at};
use tonic::{Code, Request, Response, Status};
use tracing::Instrument;

use self::{
    admission::Admission,
    caller::Caller,
    convert::{
        Violations,
        pb::{self, ErrorReason},
    },
    deadline::Deadline,
    errors::{bad_request, error},
};
use crate::{
    config::settings::{Deadlines, Limits},
    core::engine::{Decided, Engine},
    domain::{denial::Refusal, request},
    telemetry::{
        events::{Journal, Undecided},
        metrics::{
            Measured, Page,
            calls::{BATCH_DECIDE, Calls, DECIDE, word_of},
            decisions::Decisions,
        },
        traces::Traced,
    },
};

/// The service's name on the wire, as health checks name it.
pub const NAME: &str = "byokgate.v1.PolicyDecisionService";

/// The service, waiting for calls.
#[derive(Clone)]
pub struct PolicyDecision(Arc<Shared>);

/// The service for one call. Who makes it, and until when, is part of it, so that nothing is answered without either.
pub(crate) struct Call {
    shared: Arc<Shared>,
    caller: Arc<Caller>,
    deadline: Deadline,
}

struct Shared {
    engine: Arc<Engine>,
    admission: Admission,
    limits: Limits,
    deadlines: Deadlines,
    journal: Arc<Journal>,
    decisions: Decisions,
    calls: Arc<Calls>,
}

/// A decision that is being made. Should it never be, the journal and the trace say so.
struct Pending<'a> {
    shared: &'a Shared,
    request: &'a request::Request,
    method: &'static str,
    traced: &'a Traced,
    ended: bool,
}

// === impl PolicyDecision ===

impl PolicyDecision {
    /// A service over this engine. It tells the journal of each decision, and counts items of batches that fail among the calls.
    pub fn new(engine: Arc<Engine>, limits: Limits, deadlines: Deadlines, (journal, calls): (Arc<Journal>, Arc<Calls>)) -> Self {
        let (admission, decisions) = (Admission::new(&limits), Decisions::default());
        Self(Arc::new(Shared { engine, admission, limits, deadlines, journal, decisions, calls }))
    }

    /// What answers one call of this caller.
    pub(crate) fn to(&self, caller: Arc<Caller>, deadline: Deadline) -> Call {
        Call { shared: Arc::clone(&self.0), caller, deadline }
    }
}

impl Measured for PolicyDecision {
    fn tell(&self, page: &mut Page) {
        let Shared { admission, limits, decisions, .. } = self.0.as_ref();
        decisions.tell(page);
        page.gauge("byokgate_decisions_in_flight", "Decisions under way").add(&[], admission.in_flight(limits));
    }
}

// === impl Shared ===

impl Shared {
    /// One item: bad input and faults of ours are statuses, everything else is a decision. Either leaves its event.
    async fn decide_one(
        &self,
        method: &'static str,
        caller: &Caller,
        message: pb::DecideRequest,
        place: impl Future<Output = Result<OwnedSemaphorePermit, Status>>,
        answer_by: Instant,
        traced: &Traced,
    ) -> Result<pb::DecideResponse, Status> {
        let mut request = self.understood(method, message).map_err(|violations| {
            let status = bad_request(ErrorReason::BadRequest, violations);
            self.not_understood(method, &status, traced);
            status
        })?;
        request.caller.clone_from(&caller.name);
        let pending = Pending { shared: self, request: &request, method, traced, ended: false };
        let began = Instant::now();
        let decided = match self.decided(caller, &request, place, answer_by, traced).await {
            Ok(decided) => decided,
            Err(status) => return Err(pending.without_a_decision(status)),
        };
        pending.decided(&decided, began.elapsed());
        Ok(convert::response(decided))
    }

    fn not_understood(&self, method: &str, status: &Status, traced: &Traced) {
        let (grpc_code, reason, trace_id) = (word_of(status.code() as i32), status.message(), traced.trace_id());
        self.journal.undecided(Undecided { method, grpc_code, reason, request: None, trace_id });
        traced.answered(status.code());
    }

    fn understood(&self, method: &str, message: pb::DecideRequest) -> Result<request::Request, Violations> {
        // The library holds single messages to it, but not the items of a batch.
        if method == BATCH_DECIDE {
            let (size, limit) = (message.encoded_len(), self.limits.message_bytes);
            if size > limit {
                let found = format!("the request is {size} bytes long; the limit is {limit}");
                return Err(Violations(vec![("workspace_spec".to_owned(), found)]));
            }
        }
        convert::request_within(message, &self.limits)
    }

    async fn decided(
        &self,
        caller: &Caller,
        request: &request::Request,
        place: impl Future<Output = Result<OwnedSemaphorePermit, Status>>,
        answer_by: Instant,
        traced: &Traced,
    ) -> Result<Decided, Status> {
        caller.may_decide(request)?;
        let _place = place.await?;
        // A panic in one decision is that decision's end, not the connection's.
        let deciding = pin!(self.engine.decide(request, answer_by).instrument(traced.span()));
        AssertUnwindSafe(deciding).catch_unwind().await.map_err(|_| {
            self.decisions.panicked();
            tracing::error!(event = "decision_panicked", "a decision panicked; no decision was made");
            error(ErrorReason::Internal, "no decision was made: an internal error")
        })
    }
}

// === impl Pending ===

impl Pending<'_> {
    fn decided(mut self, decided: &Decided, took: Duration) {
        self.ended = true;
        self.traced.decided(self.request.checkpoint.as_str(), decided);
        self.traced.answered(Code::Ok);
        self.shared.decisions.made(self.request, &decided.decision, took);
        self.shared.journal.decision(self.request, decided, took, self.traced.trace_id());
    }

    fn without_a_decision(mut self, status: Status) -> Status {
        self.ended = true;
        self.tell(status.code(), status.message());
        status
    }

    fn tell(&self, code: Code, reason: &str) {
        let Self { shared, request, method, traced, .. } = *self;
        let (grpc_code, trace_id) = (word_of(code as i32), traced.trace_id());
        shared.journal.undecided(Undecided { method, grpc_code, reason, request: Some(request), trace_id });
        traced.answered(code);
    }
}

impl Drop for Pending<'_> {
    fn drop(&mut self) {
        if !self.ended {
            self.tell(Code::Cancelled, "the caller left, or its deadline passed, before a decision was made");
        }
    }
}

#[tonic::async_trait]
impl pb::policy_decision_service_server::PolicyDecisionService for Call {
    type BatchDecideStream = Pin<Box<dyn Stream<Item = Result<pb::BatchDecideResponse, Status>> + Send>>;

    async fn decide(&self, request: Request<pb::DecideRequest>) -> Result<Response<pb::DecideResponse>, Status> {
        let Self { shared, caller, deadline } = self;
        let (metadata, _, message) = request.into_parts();
        let traced = Traced::begin(&metadata, NAME, DECIDE);
        let place = shared.admission.enter();
        shared.decide_one(DECIDE, caller, message, place, deadline.answer_by, &traced).await.map(Response::new)
    }

    async fn batch_decide(&self, request: Request<pb::BatchDecideRequest>) -> Result<Response<Self::BatchDecideStream>, Status> {
        let (metadata, _, message) = request.into_parts();
        let (requests, limits, deadline) = (message.requests, &self.shared.limits, self.deadline);
        let traced = Traced::begin(&metadata, NAME, BATCH_DECIDE);
        if requests.is_empty() || requests.len() > limits.batch_items {
            let found = format!("holds {}; it must hold 1 to {}", requests.len(), limits.batch_items);
            let status = bad_request(ErrorReason::BadRequest, Violations(vec![("requests".to_owned(), found)]));
            self.shared.not_understood(BATCH_DECIDE, &status, &traced);
            return Err(status);
        }
        // What can still go wrong is an item's.
        traced.answered(Code::Ok);
        let (shared, caller) = (Arc::clone(&self.shared), Arc::clone(&self.caller));
        let decisions = stream::iter((0_u32..).zip(requests))
            .map(move |(index, message)| {
                let (shared, caller, traced) = (Arc::clone(&shared), Arc::clone(&caller), traced.item(index));
                async move {
                    // An item's own time is a Decide's, within the batch's.
                    let own = deadline.answer_by.min(Instant::now() + shared.deadlines.decide.0);
                    let deciding =
                        shared.decide_one(BATCH_DECIDE, &caller, message, shared.admission.enter_by(own), own, &traced);
                    let decided = timeout_at(deadline.answer_by, deciding).await;
                    let late = || error(ErrorReason::Deadline, "no decision was made before the batch's deadline");
                    let decided = decided.unwrap_or_else(|_| Err(late()));
                    if let Err(status) = &decided {
                        shared.calls.item_failed(status.code() as i32);
                    }
                    Ok(item(index, decided))
                }
            })
            .buffer_unordered(limits.batch_concurrency);
        Ok(Response::new(Box::pin(decisions)))
    }

    async fn resolve_provider(
        &self,
        request: Request<pb::ResolveProviderRequest>,
    ) -> Result<Response<pb::ResolveProviderResponse>, Status> {
        let (runtime, model, names) = convert::resolve_request(request.into_inner(), &self.shared.limits)
            .map_err(|violations| bad_request(ErrorReason::BadRequest, violations))?;
        let (result, snapshot) = self.shared.engine.resolve(&runtime, &model, &names);
        Ok(Response::new(convert::resolve_response(result, &model, &snapshot)))
    }

    async fn list_models(&self, request: Request<pb::ListModelsRequest>) -> Result<Response<pb::ListModelsResponse>, Status> {
        let (runtime, details) = convert::list_request(request.into_inner(), &self.shared.limits)
            .map_err(|violations| bad_request(ErrorReason::BadRequest, violations))?;
        let snapshot = self.shared.engine.snapshot();
        if let Some(name) = runtime.as_deref()
            && snapshot.registry.runtime(name).is_none()
        {
            let known = snapshot.registry.runtimes().map(|(name, _)| name.to_owned()).collect();
            let unknown = Refusal::RuntimeUnsupported { runtime: name.to_owned(), known };
            return Err(error(ErrorReason::UnknownRuntime, unknown.message()));
        }
        Ok(Response::new(convert::models(&snapshot, runtime.as_deref(), details)))
    }

    async fn get_registry_status(
        &self,
        _request: Request<pb::GetRegistryStatusRequest>,
    ) -> Result<Response<pb::GetRegistryStatusResponse>, Status> {
        Ok(Response::new(convert::status(&self.shared.engine.snapshot(), SystemTime::now())))
    }
}

fn item(index: u32, decided: Result<pb::DecideResponse, Status>) -> pb::BatchDecideResponse {
    let result = match decided {
        Ok(response) => pb::batch_decide_response::Result::Response(Box::new(response)),
        Err(status) => pb::batch_decide_response::Result::Status(errors::item(&status)),
    };
    pb::BatchDecideResponse { index, result: Some(result) }
}
