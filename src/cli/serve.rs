//! `byok-gate serve`: runs the server until a signal.

use std::{
    io,
    path::PathBuf,
    sync::{Arc, OnceLock},
    time::{Duration, Instant},
};

use clap::Args;
use rustix::process::{DumpableBehavior, set_dumpable_behavior};
use serde_json::{Value, json};
use tokio::signal::unix::{Signal, SignalKind, signal};

use super::{
    args::{EngineArgs, ProbeArgs},
    exit::Exit,
};
use crate::{
    app::{App, Documents, forbidden_destinations, forbidden_providers},
    config::{self, Flag, Overrides, Paths, Setup, TierFiles},
    core::snapshot::Snapshot,
    liveness::tier::Tier,
    server::{Bound, Ended, shutdown::Signals},
    telemetry::{events::Journal, log_writer::LogWriter, traces},
};

/// How long sending the last spans may delay the end. A reachable collector takes them much faster.
const SPAN_FLUSH_LIMIT: Duration = Duration::from_secs(1);

/// How long the last lines may delay the end after a second signal.
const LAST_LINES_LIMIT: Duration = Duration::from_millis(200);

#[derive(Debug, Args)]
pub(super) struct ServeArgs {
    /// Where to listen (repeatable): an IP address and a port, or a socket file. Port 0 takes a free one, which the log names
    /// [default: 127.0.0.1:50051].
    #[arg(long, value_name = "HOST:PORT|unix:PATH")]
    listen: Vec<String>,
    /// Serve the status page at http://HOST:PORT/status and Prometheus metrics at /metrics, or both on a socket file. They hold no secret.
    /// Port 0 takes a free one, which the log names [default: not served].
    #[arg(long, value_name = "HOST:PORT|unix:PATH")]
    admin_listen: Option<String>,
    /// Listen beyond loopback without TLS: credentials then cross the network in the clear.
    #[arg(long)]
    insecure_listen: bool,
    /// The server's certificate chain, in PEM. Read again when it changes.
    #[arg(long, value_name = "FILE")]
    tls_cert: Option<PathBuf>,
    /// Its key, in PEM. Read again when it changes.
    #[arg(long, value_name = "FILE")]
    tls_key: Option<PathBuf>,
    /// Require a client certificate that one of these authorities signed, in PEM. Read again when it changes.
    #[arg(long, value_name = "FILE")]
    tls_client_ca: Option<PathBuf>,
    /// Accept only client certificates with this name, as a platform (repeatable): a URI such as spiffe://domain/path, a URI with
    /// `/*` at its end for everything below it, or a DNS name.
    #[arg(long = "allow-client-san", value_name = "NAME")]
    allow_client_sans: Vec<String>,
    /// Require one of this file's bearer tokens from callers without a client certificate. Read again when it changes.
    #[arg(long, value_name = "FILE")]
    token_file: Option<PathBuf>,
    /// Accept calls from everybody over TLS, without client certificates or tokens.
    #[arg(long)]
    allow_anonymous: bool,
    /// Never test an endpoint with a made-up key. A "yes" then counts only if the catalogue vouches for the endpoint.
    #[arg(long)]
    no_calibration: bool,
    #[command(flatten)]
    engine: EngineArgs,
    #[command(flatten)]
    probe: ProbeArgs,
}

pub(super) fn run(args: ServeArgs, log: LogWriter) -> anyhow::Result<Exit> {
    let (paths, overrides) = args.layers();
    let setup = config::load(&paths, &overrides)?;
    let mut runtime = tokio::runtime::Builder::new_multi_thread();
    // Without a number, tokio starts one thread for each CPU of the container's quota.
    if setup.settings.server.worker_threads > 0 {
        runtime.worker_threads(setup.settings.server.worker_threads);
    }
    let runtime = runtime.enable_all().build()?;
    let ended = runtime.block_on(serve(setup, paths, overrides, log));
    // Do not wait for a thread that is blocked by a volume that does not answer.
    runtime.shutdown_background();
    ended
}

/// Protects the memory, which holds credentials: the process leaves no core file, and other processes of the same user can neither attach to it
/// nor read its memory in `/proc`. Root still can.
fn keep_memory_private() {
    let no_core = rlimit::setrlimit(rlimit::Resource::CORE, 0, 0);
    let not_dumpable = set_dumpable_behavior(DumpableBehavior::NotDumpable).map_err(io::Error::from);
    for fault in [no_core, not_dumpable].into_iter().filter_map(Result::err) {
        tracing::warn!(event = "memory_can_be_read", %fault, "a core file or another process of this user may show credentials");
    }
}

async fn serve(setup: Setup, paths: Paths, overrides: Overrides, log: LogWriter) -> anyhow::Result<Exit> {
    keep_memory_private();
    config::warn(&setup.warnings);
    // Catch signals before the sockets open, so that none is lost.
    let signals = Signals::catch()?;
    let hangup = signal(SignalKind::hangup())?;
    let settings = &setup.settings;
    let stop = settings.shutdown.clone();
    let TierFiles { access, certificate, warnings } = config::tier_access(settings)?;
    config::warn(&warnings);
    let tier = access.map(Tier::new).transpose()?;
    let App { engine, collectors, refusal_listener, prober } = App::new(&setup, tier.clone())?;
    config::warn(&forbidden_destinations(&setup.snapshot, &prober));
    let mut bound = Bound::open(settings.edge()).await?;
    bound.set_journal(Journal::to(log.clone(), settings.log.plain_allow_ratio));
    let last_lines = log.clone();
    bound.set_forbidden(Box::new(move |snapshot| forbidden_providers(snapshot, &prober)));
    if let Some(certificate) = certificate {
        bound.show_certificate(certificate);
    }
    bound.register(Arc::new(log));
    bound.register(Arc::new(traces::ExportMetrics));
    collectors.into_iter().for_each(|source| bound.register(source));
    traces::start(&settings.tracing, setup.tracing_ca.as_deref())?;
    let load = Box::new(move || config::load(&paths, &overrides));
    let replace_callers = Box::new(bound.replace_callers());
    bound.follow(Documents::new(Arc::clone(&engine), &setup, load, replace_callers, bound.changes()));
    if let Some(listener) = refusal_listener {
        bound.supervise("tier", listener);
    }
    reload_on_hangup(&mut bound, hangup);
    log_addresses(&bound, &setup.snapshot);
    let stopping = Arc::new(OnceLock::new());
    let calls_in_flight = bound.calls_in_flight();
    let shutdown = {
        let stopping = Arc::clone(&stopping);
        let before_end = move || {
            let cut_off = calls_in_flight();
            tracing::warn!(event = "stopped", drained = false, cut_off, "a second signal: calls in flight were cut off");
            last_lines.flush(LAST_LINES_LIMIT);
        };
        async move {
            signals.first(before_end).await;
            stopping.get_or_init(Instant::now);
        }
    };
    let ended = bound.run(engine, shutdown).await?;
    // The rest uses only what is left of the configured shutdown time, which a supervisor relies on.
    let left = || (stop.notice + stop.drain).saturating_sub(stopping.get().map_or(Duration::ZERO, Instant::elapsed));
    if let Some(tier) = tier {
        let dropped = tier.finish(tokio::time::Instant::now() + left()).await;
        if dropped > 0 {
            tracing::warn!(
                event = "tier_stores_dropped",
                dropped,
                "answers that did not come to the shared tier; another replica asks for them again"
            );
        }
    }
    traces::finish(left().min(SPAN_FLUSH_LIMIT));
    if ended == Ended::Drained {
        tracing::info!(event = "stopped", drained = true);
    } else {
        let message = "calls or connections that had not ended within shutdown.drain were cut off";
        tracing::warn!(event = "stopped", drained = false, "{message}");
    }
    Ok(Exit::Ok)
}

/// SIGHUP makes all watchers check their files.
fn reload_on_hangup(bound: &mut Bound, mut hangup: Signal) {
    let recheck = bound.recheck_files();
    bound.supervise("hangup", async move {
        while hangup.recv().await.is_some() {
            tracing::info!(event = "hangup", "all files are looked at now, changed or not");
            recheck.send_replace(());
        }
    });
}

fn log_addresses(bound: &Bound, snapshot: &Snapshot) {
    if let Some(address) = bound.admin_address() {
        tracing::info!(event = "admin_listening", %address);
    }
    for address in bound.addresses() {
        tracing::info!(
            event = "listening",
            %address,
            version = env!("CARGO_PKG_VERSION"),
            registry_revision = snapshot.registry.revision(),
            catalogue_revision = snapshot.catalogue.revision(),
        );
    }
}

// === impl ServeArgs ===

impl ServeArgs {
    /// The settings from the command line, as layers of the configuration.
    pub(super) fn layers(self) -> (Paths, Overrides) {
        let Self {
            listen,
            admin_listen,
            insecure_listen,
            tls_cert,
            tls_key,
            tls_client_ca,
            allow_client_sans,
            token_file,
            allow_anonymous,
            no_calibration,
            engine,
            probe,
        } = self;
        let path = |path: Option<PathBuf>| path.map(|path| Value::from(path.to_string_lossy()));
        let switch = |on: bool, value: bool| on.then_some(Value::from(value));
        let sans: Vec<Value> = allow_client_sans.iter().map(|san| json!({"san": san})).collect();
        let flags = [
            ("--listen", "server.listen", (!listen.is_empty()).then(|| Value::from(listen))),
            ("--admin-listen", "admin.listen", admin_listen.map(Value::from)),
            ("--insecure-listen", "server.insecure_listen", switch(insecure_listen, true)),
            ("--allow-anonymous", "server.allow_anonymous", switch(allow_anonymous, true)),
            ("--tls-cert", "tls.certificate", path(tls_cert)),
            ("--tls-key", "tls.key", path(tls_key)),
            ("--tls-client-ca", "tls.client_ca", path(tls_client_ca)),
            ("--allow-client-san", "callers.certificates", (!sans.is_empty()).then(|| Value::from(sans))),
            ("--token-file", "callers.token_file", path(token_file)),
            ("--no-calibration", "probe.calibrate", switch(no_calibration, false)),
        ];
        let flags = flags.into_iter().filter_map(|(name, key, value)| Some(Flag { name, key, value: value? })).collect();
        engine.layers(probe, flags)
    }
}
