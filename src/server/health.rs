//! Health, as gRPC's own protocol has it: one state for the server as a whole and for the service by name, pushed to watchers.

use std::pin::Pin;

use futures_util::{Stream, stream};
use tokio::sync::watch;
use tonic::{Request, Response, Status};
use tonic_health::pb::{HealthCheckRequest, HealthCheckResponse, health_check_response::ServingStatus, health_server::Health};

use crate::grpc::NAME;

/// Where the server is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Phase {
    /// There is nothing to decide by yet.
    Starting,
    /// It serves.
    Serving,
    /// It serves, and says that it is about to leave.
    Leaving,
    /// Calls under way are finished; nothing new is taken.
    Draining,
    /// What is still open is cut off.
    Cut,
}

/// The service. A library's reporter says SERVING for "" from birth and never ends a watcher's stream, which would hold up
/// every drain; hence this one.
#[derive(Clone)]
pub(super) struct HealthService(pub(super) watch::Receiver<Phase>);

fn response_for(phase: Phase) -> HealthCheckResponse {
    let status = match phase {
        Phase::Serving => ServingStatus::Serving,
        Phase::Starting | Phase::Leaving | Phase::Draining | Phase::Cut => ServingStatus::NotServing,
    };
    HealthCheckResponse { status: status as i32 }
}

fn check_service_name(request: Request<HealthCheckRequest>) -> Result<(), Status> {
    let HealthCheckRequest { service } = request.into_inner();
    if service.is_empty() || service == NAME { Ok(()) } else { Err(Status::not_found("no service of this name is served")) }
}

#[tonic::async_trait]
impl Health for HealthService {
    type WatchStream = Pin<Box<dyn Stream<Item = Result<HealthCheckResponse, Status>> + Send>>;

    async fn check(&self, request: Request<HealthCheckRequest>) -> Result<Response<HealthCheckResponse>, Status> {
        check_service_name(request)?;
        Ok(Response::new(response_for(*self.0.borrow())))
    }

    /// Each change, the present state first; it ends when the server drains.
    async fn watch(&self, request: Request<HealthCheckRequest>) -> Result<Response<Self::WatchStream>, Status> {
        check_service_name(request)?;
        let changes = stream::unfold((self.0.clone(), None::<HealthCheckResponse>), |(mut phase, last)| async move {
            loop {
                let now = *phase.borrow_and_update();
                let response = response_for(now);
                if last != Some(response) {
                    return Some((Ok(response), (phase, Some(response))));
                }
                if now >= Phase::Draining || phase.changed().await.is_err() {
                    return None;
                }
            }
        });
        Ok(Response::new(Box::pin(changes)))
    }
}
