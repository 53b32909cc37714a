//! `byok-gate health`

use std::time::Duration;

use anyhow::Context;
use clap::Args;
use tonic::transport::Endpoint;
use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};

use super::{
    args::server_uri,
    exit::{Exit, UsageError, print},
};
use crate::grpc::NAME;

/// The longest that the check waits: less than the usual period of a container's check.
const PATIENCE: Duration = Duration::from_secs(3);

#[derive(Debug, Args)]
pub(super) struct HealthArgs {
    /// The server to ask.
    #[arg(long, value_name = "HOST:PORT|unix:PATH", default_value = "127.0.0.1:50051")]
    server: String,
    /// The service to ask about; empty for the server as a whole.
    #[arg(long, default_value = NAME)]
    service: String,
}

/// Exits 0 if the server says SERVING.
pub(super) async fn run(args: HealthArgs) -> anyhow::Result<Exit> {
    let HealthArgs { server, service } = args;
    let endpoint =
        Endpoint::from_shared(server_uri(&server)).map_err(|_| UsageError(format!("--server {server} is not an address")))?;
    let asked = async {
        let channel = endpoint.connect().await.with_context(|| format!("{server} could not be reached"))?;
        let answer = HealthClient::new(channel).check(HealthCheckRequest { service }).await;
        answer.with_context(|| format!("{server} gave no health"))
    };
    let status = tokio::time::timeout(PATIENCE, asked).await.with_context(|| format!("{server} did not answer in time"))??;
    let status = status.into_inner().status();
    print(&format!("{}\n", status.as_str_name()))?;
    Ok(if status.as_str_name() == "SERVING" { Exit::Ok } else { Exit::Fault })
}
