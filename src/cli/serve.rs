//! `byok-gate serve`

use std::{net::SocketAddr, sync::Arc};

use clap::Args;
use tokio::signal::unix::{Signal, SignalKind, signal};

use super::{EngineArgs, Exit, ProbeArgs, UsageError};
use crate::{
    cache::{Cache, CacheSettings},
    engine::Engine,
    limits::{Limited, ProviderLimits},
    probe::{ProbeSettings, Prober},
    server::Bound,
};

#[derive(Debug, Args)]
pub(super) struct ServeArgs {
    /// Where to listen: an IP address and a port. Port 0 takes a free one, which the log names.
    #[arg(long, value_name = "HOST:PORT", default_value = "127.0.0.1:50051")]
    listen: SocketAddr,
    /// Listen beyond loopback without TLS: credentials then cross the network in the clear.
    #[arg(long)]
    insecure_listen: bool,
    /// Never test an endpoint with a made-up key; a "yes" then counts only where the catalogue vouches for the endpoint.
    #[arg(long)]
    no_calibration: bool,
    #[command(flatten)]
    engine: EngineArgs,
    #[command(flatten)]
    probe: ProbeArgs,
}

pub(super) async fn run(args: ServeArgs) -> anyhow::Result<Exit> {
    let ServeArgs { listen, insecure_listen, no_calibration, engine, probe } = args;
    if !listen.ip().is_loopback() && !insecure_listen {
        return Err(UsageError(format!(
            "--listen {listen} is beyond loopback, where credentials would cross the network in the clear; \
             listen on loopback, or say --insecure-listen where the network is trusted"
        ))
        .into());
    }
    let setup = engine.load(probe.probe_ca_file)?;
    for problem in &setup.warnings {
        tracing::warn!(event = "configuration_warning", place = problem.place, "{}", problem.message);
    }
    let prober = Prober::new(ProbeSettings {
        allow_loopback_http: probe.allow_loopback_http,
        calibrate: !no_calibration,
        extra_roots: setup.probe_ca,
        ..ProbeSettings::default()
    })?;
    // Signals are caught before the socket opens: one that comes at once is not lost.
    let (terminate, interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let bound = Bound::bind(listen).await?;
    let (registry, catalogue) = (setup.snapshot.registry.revision().to_owned(), setup.snapshot.catalogue.revision().to_owned());
    let liveness =
        Arc::new(Cache::new(Arc::new(Limited::new(Arc::new(prober), ProviderLimits::default())), CacheSettings::default()));
    let engine = Arc::new(Engine::new(setup.snapshot, liveness, setup.fingerprint_key));
    tracing::info!(
        event = "listening",
        address = %bound.local_addr(),
        version = env!("CARGO_PKG_VERSION"),
        registry_revision = registry,
        catalogue_revision = catalogue,
    );
    let ended = bound.run(engine, first_of(terminate, interrupt)).await?;
    tracing::info!(event = "stopped", drained = ended == crate::server::Ended::Drained);
    Ok(Exit::Ok)
}

/// The first signal ends the wait; a second one ends the process at once.
async fn first_of(mut terminate: Signal, mut interrupt: Signal) {
    either(&mut terminate, &mut interrupt).await;
    tracing::info!(event = "draining", "stopping; a second signal stops at once");
    tokio::spawn(async move {
        either(&mut terminate, &mut interrupt).await;
        std::process::exit(1);
    });
}

async fn either(terminate: &mut Signal, interrupt: &mut Signal) {
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
}
