//! `byok-gate health`: asks a server for its health.

use std::time::Duration;

use clap::Args;
use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};

use super::{
    client::{ClientArgs, in_time},
    exit::{Exit, print},
};
use crate::grpc::NAME;

/// How long the check waits: less than the usual interval of container health checks.
const TIMEOUT: Duration = Duration::from_secs(3);

#[derive(Debug, Args)]
pub(super) struct HealthArgs {
    /// The server to ask.
    #[arg(long, value_name = "HOST:PORT|unix:PATH", default_value = "127.0.0.1:50051")]
    server: String,
    /// The service to ask about; empty for the server as a whole.
    #[arg(long, default_value = NAME)]
    service: String,
    #[command(flatten)]
    client: ClientArgs,
}

/// Exits 0 if the server says SERVING.
pub(super) async fn run(args: HealthArgs) -> anyhow::Result<Exit> {
    let HealthArgs { server, service, client } = args;
    let server = client.server(&server)?;
    let asked = async {
        let channel = server.connect(TIMEOUT).await?;
        match HealthClient::new(channel).check(server.request(HealthCheckRequest { service })?).await {
            Ok(status) => Ok(status),
            Err(status) => Err(anyhow::anyhow!(server.refusal(&status).await)),
        }
    };
    let status = in_time(tokio::time::timeout(TIMEOUT, asked).await, &server)??;
    let status = status.into_inner().status();
    print(&format!("{}\n", status.as_str_name()))?;
    Ok(if status.as_str_name() == "SERVING" { Exit::Ok } else { Exit::Fault })
}
