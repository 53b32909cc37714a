//! The floor: a bare tonic server with the same proto, whose answers are made up beforehand. No logic, no limits, no telemetry; the
//! same allocator and profile as ours. Its cost is that of gRPC itself.
//!
//! `floor HOST:PORT|unix:PATH REPLY`, where REPLY is a file with one gRPC frame of `DecideResponse`.

use std::{env, error::Error, fs, pin::Pin};

use byok_gate::grpc::convert::pb::{
    self,
    policy_decision_service_server::{PolicyDecisionService, PolicyDecisionServiceServer},
};
use futures_util::{Stream, stream};
use mimalloc::MiMalloc;
use prost::Message;
use tokio::net::{TcpListener, UnixListener};
use tokio_stream::wrappers::{TcpListenerStream, UnixListenerStream};
use tonic::{Request, Response, Status, transport::Server};

#[global_allocator]
static ALLOCATOR: MiMalloc = MiMalloc;

struct Floor {
    reply: pb::DecideResponse,
}

#[tonic::async_trait]
impl PolicyDecisionService for Floor {
    type BatchDecideStream = Pin<Box<dyn Stream<Item = Result<pb::BatchDecideResponse, Status>> + Send>>;

    async fn decide(&self, _: Request<pb::DecideRequest>) -> Result<Response<pb::DecideResponse>, Status> {
        Ok(Response::new(self.reply.clone()))
    }

    async fn batch_decide(&self, request: Request<pb::BatchDecideRequest>) -> Result<Response<Self::BatchDecideStream>, Status> {
        let reply = self.reply.clone();
        let items = (0..).zip(request.into_inner().requests).map(move |(index, _)| {
            let result = Some(pb::batch_decide_response::Result::Response(Box::new(reply.clone())));
            Ok(pb::BatchDecideResponse { index, result })
        });
        Ok(Response::new(Box::pin(stream::iter(items))))
    }

    async fn resolve_provider(
        &self,
        _: Request<pb::ResolveProviderRequest>,
    ) -> Result<Response<pb::ResolveProviderResponse>, Status> {
        Err(Status::unimplemented("not measured"))
    }

    async fn list_models(&self, _: Request<pb::ListModelsRequest>) -> Result<Response<pb::ListModelsResponse>, Status> {
        Err(Status::unimplemented("not measured"))
    }

    async fn get_registry_status(
        &self,
        _: Request<pb::GetRegistryStatusRequest>,
    ) -> Result<Response<pb::GetRegistryStatusResponse>, Status> {
        Err(Status::unimplemented("not measured"))
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    // `cargo test --benches` runs it with flags of its own.
    let arguments: Vec<String> = env::args().skip(1).filter(|argument| !argument.starts_with("--")).collect();
    let [listen, reply] = arguments.as_slice() else { return Ok(()) };
    let frame = fs::read(reply)?;
    let message = frame.get(5..).ok_or("the reply is no gRPC frame")?;
    let floor = Floor { reply: pb::DecideResponse::decode(message)? };
    // As many threads as ours would have: one for each CPU that this process may use.
    tokio::runtime::Builder::new_multi_thread().enable_all().build()?.block_on(serve(listen, floor))
}

async fn serve(listen: &str, floor: Floor) -> Result<(), Box<dyn Error>> {
    let server = Server::builder().add_service(PolicyDecisionServiceServer::new(floor));
    match listen.strip_prefix("unix:") {
        Some(path) => server.serve_with_incoming(UnixListenerStream::new(UnixListener::bind(path)?)).await?,
        None => {
            let incoming = TcpListenerStream::new(TcpListener::bind(listen).await?);
            // Both answer at once instead of waiting for more to send.
            server
                .serve_with_incoming(futures_util::StreamExt::map(incoming, |stream| {
                    stream.and_then(|stream| stream.set_nodelay(true).map(|()| stream))
                }))
                .await?;
        }
    }
    Ok(())
}
