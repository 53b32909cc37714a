//! The gRPC health protocol. The server as a whole and the service by name have the same state, and watchers get every change.

use std::pin::Pin;

use futures_util::{Stream, stream};
use tokio::sync::watch;
use tonic::{Request, Response, Status};
use tonic_health::pb::{HealthCheckRequest, HealthCheckResponse, health_check_response::ServingStatus, health_server::Health};

use crate::grpc::NAME;

/// The phases of a server's life, in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Phase {
    /// It does not serve yet.
    Starting,
    /// It serves.
    Serving,
    /// It still serves, but reports NOT_SERVING because it is about to stop.
    Leaving,
    /// It finishes calls in flight and accepts no new ones.
    Draining,
    /// It cuts off the calls that are still open.
    Cut,
}

/// The health service. It is written here because tonic-health's reporter says SERVING for "" from the beginning, and never ends a watcher's
/// stream, which would delay every drain.
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

    /// Sends the present state, then each change. The stream ends when the server drains.
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
