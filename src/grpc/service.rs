//! The gRPC service: maps each method to the code that answers it.

use std::{pin::Pin, sync::Arc};

use futures_util::Stream;
use prost::Message;
use tonic::{Request, Response, Status};

use super::{
    admission::Admission,
    authorize::{Authorizer, Caller},
    batch,
    call_record::CallRecord,
    convert::pb,
    deadline::Deadline,
    decide::{Decider, Shared},
    limits::{Deadlines, Limits},
    queries,
};
use crate::{
    core::engine::Engine,
    telemetry::metrics::{Collect, Page},
};

/// The service.
#[derive(Clone)]
pub(crate) struct PolicyDecision(Arc<Shared>);

/// The service for one call, with its caller, deadline and record. So no call can be answered without them.
pub(crate) struct Call {
    shared: Arc<Shared>,
    caller: Arc<Caller>,
    deadline: Deadline,
    record: Arc<CallRecord>,
}

/// The bytes of an answer, for the limit of those that are not read.
#[derive(Debug, Clone, Copy)]
pub(crate) struct AnswerLength(pub(crate) usize);

// === impl PolicyDecision ===

impl PolicyDecision {
    /// A service that decides with this engine.
    pub(crate) fn new(engine: Arc<Engine>, authorizer: Arc<Authorizer>, limits: Limits, deadlines: Deadlines) -> Self {
        let admission = Admission::new(&limits);
        Self(Arc::new(Shared { engine, admission, authorizer, limits, deadlines }))
    }

    /// The service for one call of this caller.
    pub(crate) fn to(&self, caller: Arc<Caller>, deadline: Deadline, record: Arc<CallRecord>) -> Call {
        Call { shared: Arc::clone(&self.0), caller, deadline, record }
    }
}

impl Collect for PolicyDecision {
    fn collect(&self, page: &mut Page) {
        let Shared { admission, limits, .. } = self.0.as_ref();
        page.gauge("byokgate_decisions_in_flight", "Decisions that wait for a provider").add(&[], admission.in_flight(limits));
    }
}

// === impl Call ===

impl Call {
    fn decider(&self) -> Decider {
        Decider { shared: Arc::clone(&self.shared), caller: Arc::clone(&self.caller) }
    }
}

#[tonic::async_trait]
impl pb::policy_decision_service_server::PolicyDecisionService for Call {
    type BatchDecideStream = Pin<Box<dyn Stream<Item = Result<pb::BatchDecideResponse, Status>> + Send>>;

    async fn decide(&self, request: Request<pb::DecideRequest>) -> Result<Response<pb::DecideResponse>, Status> {
        self.decider().call(request.into_inner(), self.deadline.answer_by, &self.record).await.map(Response::new)
    }

    async fn batch_decide(&self, request: Request<pb::BatchDecideRequest>) -> Result<Response<Self::BatchDecideStream>, Status> {
        let results = batch::run(self.decider(), request.into_inner(), self.deadline, &self.record)?;
        Ok(Response::new(Box::pin(results)))
    }

    async fn resolve_provider(
        &self,
        request: Request<pb::ResolveProviderRequest>,
    ) -> Result<Response<pb::ResolveProviderResponse>, Status> {
        queries::resolve_provider(&self.shared, request.into_inner()).map(with_length)
    }

    async fn list_models(&self, request: Request<pb::ListModelsRequest>) -> Result<Response<pb::ListModelsResponse>, Status> {
        queries::list_models(&self.shared, request.into_inner()).map(with_length)
    }

    async fn get_registry_status(
        &self,
        _request: Request<pb::GetRegistryStatusRequest>,
    ) -> Result<Response<pb::GetRegistryStatusResponse>, Status> {
        Ok(with_length(queries::registry_status(&self.shared)))
    }
}

fn with_length<M: Message>(answer: M) -> Response<M> {
    let length = AnswerLength(answer.encoded_len());
    let mut response = Response::new(answer);
    response.extensions_mut().insert(length);
    response
}
