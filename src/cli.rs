//! The command line: one file a command; exit codes as an enum. The only place with `anyhow`.

mod against;
mod check;
mod classify;
mod config;
mod decide;
mod exec;
mod health;
mod models;
mod probe;
mod report;
mod serve;

use std::{
    io::{self, Write},
    path::PathBuf,
    process::{ExitCode, Termination},
    time::Duration,
};

use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::{
    config::{ConfigError, Flag, Overrides, Paths, Setup, load},
    domain::request::PlatformProxy,
    server::ServerError,
    telemetry::{self, LogError, LogTo, log_writer::LogWriter},
};

/// Decides whether an AI-agent workspace may start, and who pays for its model calls.
#[derive(Debug, Parser)]
#[command(name = "byok-gate", version)]
pub struct Cli {
    /// What is logged: off, error, warn, info, debug, trace, or a filter such as `info,byok_gate=debug`.
    #[arg(long, global = true, value_name = "FILTER")]
    log: Option<String>,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Serve decisions over gRPC.
    Serve(serve::ServeArgs),
    /// Decide one workspace, in this process or by asking a server.
    Decide(decide::DecideArgs),
    /// Decide this workspace at its start, then become CMD, or say why not.
    Exec(exec::ExecArgs),
    /// List what runtimes offer.
    Models(models::ModelsArgs),
    /// Check configuration, registry and catalogue.
    Check(check::CheckArgs),
    /// Tell which verdict an answer would get, by which row of the catalogue, without any network.
    Classify(classify::ClassifyArgs),
    /// Check one credential at its provider, live.
    Probe(probe::ProbeCommandArgs),
    /// Show every setting that `serve` with the same flags would run with, and where each came from.
    Config(config::ConfigArgs),
    /// Ask a server whether it serves.
    Health(health::HealthArgs),
}

/// How long the last lines of the log may take.
const LAST_LINES: Duration = Duration::from_secs(1);

/// How a command ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    /// Allowed, or done.
    Ok,
    /// A fault: nothing was decided.
    Fault,
    /// The command line does not stand.
    Usage,
    /// Configuration, registry or catalogue do not stand.
    Invalid,
    /// Denied.
    Denied,
    /// Denied, and worth trying again with nothing changed.
    DeniedRetryable,
}

/// How an answer is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Format {
    /// For people.
    Text,
    /// For programs.
    Json,
}

/// The command line does not stand, beyond what its grammar says.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct UsageError(String);

/// What decisions are made by.
#[derive(Debug, Args)]
struct EngineArgs {
    /// The registry to decide by, in place of the embedded one.
    #[arg(long, value_name = "FILE")]
    registry: Option<PathBuf>,
    /// A probe catalogue to lay over the embedded one, host by host.
    #[arg(long, value_name = "FILE")]
    probe_catalog: Option<PathBuf>,
    /// The configuration file.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// What a spec that does not say means: whether the platform's metered proxy is there [default: absent].
    #[arg(long, value_name = "available|absent")]
    platform_proxy: Option<ProxyArg>,
    /// Refuse operator overrides.
    #[arg(long)]
    refuse_operator_overrides: bool,
    /// Allow this runtime without any check (repeatable).
    #[arg(long = "exempt-runtime", value_name = "RUNTIME")]
    exempt_runtimes: Vec<String>,
    /// A file whose content is the key of credential fingerprints; no fingerprints without it.
    #[arg(long, value_name = "FILE")]
    fingerprint_key_file: Option<PathBuf>,
}

/// How providers are asked.
#[derive(Debug, Args)]
struct ProbeArgs {
    /// Allow loopback addresses, and plain http there: for tests and for providers on the same host.
    #[arg(long)]
    allow_loopback_http: bool,
    /// Certificate authorities (PEM) to trust beside the system's.
    #[arg(long, value_name = "FILE")]
    probe_ca_file: Option<PathBuf>,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum ProxyArg {
    Available,
    Absent,
}

// === running ===

impl Cli {
    /// Runs the command to its end.
    pub fn run(self) -> Exit {
        let Self { log, command } = self;
        let (default, to) = match command {
            Command::Serve(_) => ("info", LogTo::StdoutJson),
            Command::Decide(_)
            | Command::Exec(_)
            | Command::Models(_)
            | Command::Probe(_)
            | Command::Check(_)
            | Command::Classify(_)
            | Command::Config(_)
            | Command::Health(_) => ("error", LogTo::StderrText),
        };
        let log = match telemetry::init(log.as_deref().unwrap_or(default), to) {
            Ok(log) => log,
            Err(fault) => return complain(&of_log(fault)),
        };
        let ended = command.run(&log);
        // Before what is said last; and whoever does not read what is logged does not hold up the end.
        log.flush(LAST_LINES);
        ended.unwrap_or_else(|fault| complain(&fault))
    }
}

// === impl Command ===

impl Command {
    fn run(self, log: &LogWriter) -> anyhow::Result<Exit> {
        match self {
            Self::Serve(args) => serve::run(args, log.clone()),
            Self::Decide(args) => block_on(decide::run(args, log))?,
            Self::Exec(args) => block_on(exec::run(args, log))?,
            Self::Models(args) => models::run(args),
            Self::Probe(args) => block_on(probe::run(args))?,
            Self::Check(args) => check::run(args),
            Self::Classify(args) => classify::run(args),
            Self::Config(args) => config::run(args),
            Self::Health(args) => block_on(health::run(args))?,
        }
    }
}

/// Says why nothing came of it. Standard error may be closed; there is nobody else to tell.
fn complain(fault: &anyhow::Error) -> Exit {
    drop(writeln!(io::stderr(), "byok-gate: {fault:#}"));
    exit_of(fault)
}

fn of_log(fault: LogError) -> anyhow::Error {
    match fault {
        LogError::Filter { .. } => UsageError(fault.to_string()).into(),
        LogError::Open(_) => fault.into(),
    }
}

fn exit_of(fault: &anyhow::Error) -> Exit {
    if fault.is::<UsageError>() {
        Exit::Usage
    } else if fault.is::<ConfigError>() {
        Exit::Invalid
    } else {
        match fault.downcast_ref::<ServerError>() {
            Some(ServerError::Address { .. } | ServerError::Exposed(_) | ServerError::Anonymous(_)) => Exit::Usage,
            Some(ServerError::File { .. } | ServerError::Content { .. }) => Exit::Invalid,
            Some(ServerError::Listen { .. } | ServerError::Reflection(_) | ServerError::TaskEnded(_)) | None => Exit::Fault,
        }
    }
}

fn block_on<T>(work: impl Future<Output = T>) -> anyhow::Result<T> {
    Ok(tokio::runtime::Builder::new_multi_thread().enable_all().build()?.block_on(work))
}

impl Termination for Exit {
    fn report(self) -> ExitCode {
        ExitCode::from(match self {
            Self::Ok => 0,
            Self::Fault => 1,
            Self::Usage => 2,
            Self::Invalid => 3,
            Self::Denied => 10,
            Self::DeniedRetryable => 11,
        })
    }
}

// === impl EngineArgs ===

impl EngineArgs {
    fn load(self, probe_ca: Option<PathBuf>) -> Result<Setup, ConfigError> {
        let (paths, overrides) = self.layers(probe_ca, Vec::new());
        load(&paths, &overrides)
    }

    fn layers(self, probe_ca: Option<PathBuf>, flags: Vec<Flag>) -> (Paths, Overrides) {
        let Self {
            registry,
            probe_catalog,
            config,
            platform_proxy,
            refuse_operator_overrides,
            exempt_runtimes,
            fingerprint_key_file,
        } = self;
        let paths = Paths { registry, probe_catalog, config, fingerprint_key: fingerprint_key_file, probe_ca };
        let platform_proxy = platform_proxy.map(PlatformProxy::from);
        (paths, Overrides { platform_proxy, refuse_operator_overrides, exempt_runtimes, flags })
    }
}

impl From<ProxyArg> for PlatformProxy {
    fn from(arg: ProxyArg) -> Self {
        match arg {
            ProxyArg::Available => Self::Available,
            ProxyArg::Absent => Self::Absent,
        }
    }
}

/// Writes to standard output. A reader that has gone is no fault of ours.
fn print(text: &str) -> anyhow::Result<()> {
    match io::stdout().write_all(text.as_bytes()).and_then(|()| io::stdout().flush()) {
        Err(fault) if fault.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        ended => Ok(ended?),
    }
}

/// A server's address as a URI: `HOST:PORT`, with `http://` before it, or `unix:PATH`.
fn server_uri(address: &str) -> String {
    if address.contains("://") || address.starts_with("unix:") { address.to_owned() } else { format!("http://{address}") }
}
