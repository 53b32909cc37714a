//! The command line. Each command has its own file, and exit codes are an enum. Only this layer uses `anyhow`.

mod against;
mod args;
mod catalogue;
mod check;
mod classify;
mod client;
mod completions;
mod config;
mod copy;
mod decide;
mod exec;
mod exit;
mod health;
mod models;
mod probe;
mod report;
mod serve;
mod status;

use std::io::{self, Write};

use clap::{CommandFactory, Parser, Subcommand};

pub use self::exit::Exit;
use self::exit::{UsageError, exit_of};
use crate::telemetry::{self, LogError, LogTo, log_writer::LogWriter};

/// Decides whether an AI-agent workspace may start, and who pays for its model calls.
#[derive(Debug, Parser)]
#[command(name = "byok-gate", version = env!("BYOK_GATE_VERSION"))]
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
    /// Decide this workspace at its start, then run CMD in place of this process, or say why not.
    Exec(exec::ExecArgs),
    /// List the models of runtimes.
    Models(models::ModelsArgs),
    /// Check configuration, registry and catalogue.
    Check(check::CheckArgs),
    /// Check the probe catalogue against the vendors' endpoints.
    Catalogue(catalogue::CatalogueArgs),
    /// Show which verdict an answer would get and by which row of the catalogue, without any network.
    Classify(classify::ClassifyArgs),
    /// Check one credential at its provider, live.
    Probe(probe::ProbeCommandArgs),
    /// Show every setting of `serve` with the same flags, and where each came from.
    Config(config::ConfigArgs),
    /// Ask a server whether it serves.
    Health(health::HealthArgs),
    /// Show the status of a running server: what needs attention, providers, the last denials.
    Status(status::StatusArgs),
    /// Copy this executable to FILE, for a container whose image does not have it.
    Copy(copy::CopyArgs),
    /// Write the completions of a shell to standard output.
    #[command(hide = true)]
    Completions(completions::CompletionsArgs),
    /// Write the manual's pages.
    #[command(hide = true)]
    Man(completions::ManArgs),
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
            | Command::Catalogue(_)
            | Command::Classify(_)
            | Command::Config(_)
            | Command::Health(_)
            | Command::Status(_)
            | Command::Copy(_)
            | Command::Completions(_)
            | Command::Man(_) => ("error", LogTo::StderrText),
        };
        let log = match telemetry::init(log.as_deref().unwrap_or(default), to) {
            Ok(log) => log,
            Err(fault) => return print_error(&log_error(fault)),
        };
        let ended = command.run(&log);
        // Write the log before the last message. The time limit keeps a log that is not read from delaying the end.
        log.flush(exit::LOG_FLUSH_LIMIT);
        ended.unwrap_or_else(|fault| print_error(&fault))
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
            Self::Check(args) => block_on(check::run(args))?,
            Self::Catalogue(args) => block_on(catalogue::run(args))?,
            Self::Classify(args) => classify::run(args),
            Self::Config(args) => config::run(args),
            Self::Health(args) => block_on(health::run(args))?,
            Self::Status(args) => block_on(status::run(args))?,
            Self::Copy(args) => copy::run(args),
            Self::Completions(args) => completions::completions(args, Cli::command()),
            Self::Man(args) => completions::man(args, Cli::command()),
        }
    }
}

/// Prints why the command failed. If standard error is closed, the message is lost.
fn print_error(fault: &anyhow::Error) -> Exit {
    drop(writeln!(io::stderr(), "byok-gate: {fault:#}"));
    exit_of(fault)
}

fn log_error(fault: LogError) -> anyhow::Error {
    match fault {
        LogError::Filter { .. } => UsageError(fault.to_string()).into(),
        LogError::Open(_) => fault.into(),
    }
}

fn block_on<T>(work: impl Future<Output = T>) -> anyhow::Result<T> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let ended = runtime.block_on(work);
    // Do not wait for name lookups and file reads that are no longer needed.
    runtime.shutdown_background();
    Ok(ended)
}
