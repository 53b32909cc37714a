//! The server: bind, then run until told to stop. Health, reflection, limits, and the order of leaving.

use std::{future::Future, net::SocketAddr, sync::Arc, time::Duration};

use tokio::{net::TcpListener, sync::oneshot, time::timeout};
use tokio_stream::wrappers::TcpListenerStream;
use tonic::transport::Server;
use tonic_health::{ServingStatus, pb::FILE_DESCRIPTOR_SET as HEALTH_DESCRIPTORS, server::HealthReporter};

use crate::{
    config::{DRAIN_TIME, MAX_MESSAGE_BYTES, MAX_STREAMS_PER_CONNECTION},
    engine::Engine,
    service::{NAME, PolicyDecision, convert},
};

/// A peer that has gone is noticed within this time and its connection given up.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(30);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(10);

/// A server that has its socket.
pub struct Bound {
    listener: TcpListener,
    local_addr: SocketAddr,
}

/// The server could not start or go on.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// The socket could not be had.
    #[error("could not listen on {address}")]
    Listen {
        /// What was asked for.
        address: String,
        /// The fault.
        #[source]
        source: std::io::Error,
    },
    /// Reflection could not be built from the descriptors.
    #[error("reflection could not be set up")]
    Reflection(#[from] tonic_reflection::server::Error),
    /// The transport failed.
    #[error("the transport failed")]
    Transport(#[from] tonic::transport::Error),
}

/// How a server ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// Every call was answered.
    Drained,
    /// Some calls or connections were still open at the drain deadline.
    CutOff,
}

// === impl Bound ===

impl Bound {
    /// Takes the socket. Nothing is accepted yet.
    pub async fn bind(address: SocketAddr) -> Result<Self, ServerError> {
        let failed = |source| ServerError::Listen { address: address.to_string(), source };
        let listener = TcpListener::bind(address).await.map_err(failed)?;
        let local_addr = listener.local_addr().map_err(failed)?;
        Ok(Self { listener, local_addr })
    }

    /// Where it listens: the port that was given for port 0.
    pub fn local_addr(&self) -> SocketAddr {
        self.local_addr
    }

    /// Serves until `shutdown`, then drains: NOT_SERVING first, no new connections, calls under way to the drain deadline.
    pub async fn run(self, engine: Arc<Engine>, shutdown: impl Future<Output = ()> + Send) -> Result<Ended, ServerError> {
        let Self { listener, local_addr: _ } = self;
        let (health, health_service) = tonic_health::server::health_reporter();
        // The library's reporter says SERVING for "" from birth; nothing is to be said before the engine stands.
        set_health(&health, ServingStatus::NotServing).await;
        let reflection = || {
            tonic_reflection::server::Builder::configure()
                .register_encoded_file_descriptor_set(convert::DESCRIPTORS)
                .register_encoded_file_descriptor_set(HEALTH_DESCRIPTORS)
        };
        let service = convert::pb::policy_decision_service_server::PolicyDecisionServiceServer::new(PolicyDecision::new(engine))
            .max_decoding_message_size(MAX_MESSAGE_BYTES);
        let router = Server::builder()
            .tcp_nodelay(true)
            .max_concurrent_streams(MAX_STREAMS_PER_CONNECTION)
            .http2_keepalive_interval(Some(KEEPALIVE_INTERVAL))
            .http2_keepalive_timeout(Some(KEEPALIVE_TIMEOUT))
            .add_service(health_service)
            .add_service(reflection().build_v1()?)
            .add_service(reflection().build_v1alpha()?)
            .add_service(service);
        let (stop, stopped) = oneshot::channel::<()>();
        // A sender that is gone stops the server as well.
        let serving = router.serve_with_incoming_shutdown(TcpListenerStream::new(listener), async move { drop(stopped.await) });
        tokio::pin!(serving);
        set_health(&health, ServingStatus::Serving).await;
        tokio::select! {
            ended = &mut serving => return ended.map(|()| Ended::Drained).map_err(Into::into),
            () = shutdown => {}
        }
        set_health(&health, ServingStatus::NotServing).await;
        drop(stop);
        match timeout(DRAIN_TIME, serving).await {
            Ok(ended) => ended.map(|()| Ended::Drained).map_err(Into::into),
            Err(_) => Ok(Ended::CutOff),
        }
    }
}

/// Says the same for the server as a whole and for the service by name.
async fn set_health(health: &HealthReporter, status: ServingStatus) {
    for name in ["", NAME] {
        health.set_service_status(name, status).await;
    }
}
