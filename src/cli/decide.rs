//! `byok-gate decide`: makes one decision, in this process or by asking a server.

use std::{
    env,
    io::{self, Read},
    sync::Arc,
    time::Duration,
};

use anyhow::Context;
use clap::{Args, ValueEnum};
use tokio::time::Instant;
use tonic::Code;

use super::{
    args::{EngineArgs, ProbeArgs, ProxyArg},
    client::{ClientArgs, Server},
    exit::{Exit, Format, UsageError, print},
    report::Report,
};
use crate::{
    app::App,
    config::Setup,
    domain::{
        request::{CalledBy, Checkpoint, Credential, CredentialValue, OperatorOverride, Request, Scope, WorkspaceSpec},
        secret::Secret,
    },
    grpc::convert::{self, pb},
    telemetry::{events::Journal, log_writer::LogWriter},
};

/// How long the command waits: the largest budget of a catalogue row, 10 s, and some room.
const TIMEOUT: Duration = Duration::from_secs(12);
/// The maximum size of a credential from standard input or a file. The service's own limit is lower, and has its own error.
pub(super) const MAX_VALUE_BYTES: u64 = 1024 * 1024;

#[derive(Debug, Args)]
pub(super) struct DecideArgs {
    /// The workspace's runtime.
    #[arg(long)]
    runtime: String,
    /// The workspace's model.
    #[arg(long)]
    model: String,
    /// The checkpoint of the workspace's life.
    #[arg(long, value_enum, default_value_t = CheckpointArg::Create)]
    checkpoint: CheckpointArg,
    /// Take the workspace's credential of this name from the environment (repeatable). A variable that is not set counts as absent.
    #[arg(long = "env", value_name = "NAME")]
    envs: Vec<String>,
    /// The same, as the organization's credential (repeatable).
    #[arg(long = "organization-env", value_name = "NAME")]
    organization_envs: Vec<String>,
    /// Take the workspace's credential of this name from standard input: `NAME=@-`. One line break at its end is not part of it.
    #[arg(long, value_name = "NAME=@-")]
    credential: Option<String>,
    /// The workspace's id.
    #[arg(long, default_value = "")]
    workspace_id: String,
    /// The organization's id.
    #[arg(long, default_value = "")]
    organization_id: String,
    /// An operator's override.
    #[arg(long, value_enum)]
    operator_override: Option<OverrideArg>,
    /// A base-URL variable that the tenant set (repeatable).
    #[arg(long = "tenant-base-url-env", value_name = "NAME")]
    tenant_base_url_env: Vec<String>,
    /// How old an observation of the credential may be, in seconds.
    #[arg(long, value_name = "SECONDS")]
    max_liveness_age: Option<u32>,
    /// Show each step of the decision.
    #[arg(long)]
    explain: bool,
    /// Ask this server instead of deciding here.
    #[arg(long, value_name = "HOST:PORT|unix:PATH", conflicts_with_all = [
        "registry", "probe_catalog", "config", "refuse_operator_overrides", "exempt_runtimes", "fingerprint_key_file",
        "allow_loopback_http", "probe_ca_file",
    ])]
    server: Option<String>,
    /// The output format.
    #[arg(long, value_enum, default_value_t = Format::Text)]
    format: Format,
    #[command(flatten)]
    client: ClientArgs,
    #[command(flatten)]
    engine: EngineArgs,
    #[command(flatten)]
    probe: ProbeArgs,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum CheckpointArg {
    Create,
    Provision,
    Update,
    Audit,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum OverrideArg {
    PlatformManaged,
    Byok,
    Disabled,
}

pub(super) async fn run(args: DecideArgs, log: &LogWriter) -> anyhow::Result<Exit> {
    if args.server.is_none() && args.client != ClientArgs::default() {
        return Err(UsageError(
            "--server-ca, --server-name, --client-cert, --client-key and --client-token-file need --server".into(),
        )
        .into());
    }
    let (request, format) = (request(&args)?, args.format);
    let response = match args.server {
        Some(server) => ask(&args.client.server(&server)?, &request).await?,
        None => decide(args.engine.load(args.probe)?, request, log).await?,
    };
    let report = Report::of(&response);
    match format {
        Format::Text => print(&report.text())?,
        Format::Json => print(&format!("{}\n", serde_json::to_string_pretty(&report)?))?,
    }
    Ok(report.exit)
}

/// Decides in this process. No made-up keys are sent: a one-shot command relies on the catalogue.
pub(super) async fn decide(mut setup: Setup, request: Request, log: &LogWriter) -> anyhow::Result<pb::DecideResponse> {
    // Use the service's own validation, so that the same requests are refused with the same messages.
    let request = convert::request(convert::to_request(&request)).map_err(|violations| {
        let said: Vec<String> = violations.0.into_iter().map(|(field, description)| format!("{field}: {description}")).collect();
        UsageError(said.join("; "))
    })?;
    setup.settings.probe.calibrate = false;
    let App { engine, .. } = App::new(&setup, None)?;
    let began = Instant::now();
    let decided = engine.decide(&request, began + TIMEOUT).await;
    Journal::to(log.clone(), setup.settings.log.plain_allow_ratio).decision(&request, &decided, began.elapsed(), None, None);
    Ok(convert::response(decided))
}

/// Asks a server to decide.
pub(super) async fn ask(server: &Server, request: &Request) -> anyhow::Result<pb::DecideResponse> {
    let channel = server.connect(TIMEOUT).await.context("no decision")?;
    let mut message = server.request(convert::to_request(request))?;
    message.set_timeout(TIMEOUT);
    let answer = pb::policy_decision_service_client::PolicyDecisionServiceClient::new(channel).decide(message).await;
    match answer {
        Ok(response) => Ok(response.into_inner()),
        Err(status) if status.code() == Code::InvalidArgument => Err(UsageError(status.message().to_owned()).into()),
        Err(status) => anyhow::bail!("no decision: {}", server.refusal(&status).await),
    }
}

fn request(args: &DecideArgs) -> anyhow::Result<Request> {
    let mut credentials = Vec::new();
    for (names, scope) in [(&args.envs, Scope::Workspace), (&args.organization_envs, Scope::Organization)] {
        for name in names {
            credentials.extend(from_environment(name, scope)?);
        }
    }
    if let Some(argument) = &args.credential {
        credentials.push(from_stdin(argument)?);
    }
    Ok(Request {
        spec: WorkspaceSpec {
            workspace_id: args.workspace_id.clone(),
            organization_id: args.organization_id.clone(),
            runtime: args.runtime.clone(),
            model: args.model.clone(),
            credentials,
            unreadable_scopes: Vec::new(),
            operator_override: match args.operator_override {
                None => OperatorOverride::Derive,
                Some(OverrideArg::PlatformManaged) => OperatorOverride::PlatformManaged,
                Some(OverrideArg::Byok) => OperatorOverride::Byok,
                Some(OverrideArg::Disabled) => OperatorOverride::Disabled,
            },
            platform_proxy: args.engine.platform_proxy.map(ProxyArg::into),
            tenant_base_url_env: args.tenant_base_url_env.clone(),
        },
        checkpoint: match args.checkpoint {
            CheckpointArg::Create => Checkpoint::Create,
            CheckpointArg::Provision => Checkpoint::Provision,
            CheckpointArg::Update => Checkpoint::Update,
            CheckpointArg::Audit => Checkpoint::Audit,
        },
        max_liveness_age: args.max_liveness_age.map(|seconds| Duration::from_secs(u64::from(seconds))),
        explain: args.explain,
        report_only: false,
        caller: CalledBy::default(),
    })
}

pub(super) fn from_environment(name: &str, scope: Scope) -> Result<Option<Credential>, UsageError> {
    if name.contains('=') {
        // The argument may contain the credential's value, so it is not quoted.
        return Err(UsageError("--env takes a variable's name alone; its value is read from the environment".into()));
    }
    match env::var(name) {
        Ok(value) => Ok(Some(credential(name, scope, value))),
        Err(env::VarError::NotPresent) => Ok(None),
        Err(env::VarError::NotUnicode(_)) => Err(UsageError(format!("{name} holds bytes that are not UTF-8: no key does"))),
    }
}

pub(super) fn from_stdin(argument: &str) -> anyhow::Result<Credential> {
    let Some(name) = argument.strip_suffix("=@-") else {
        // The text may be a credential, so it is not quoted.
        return Err(UsageError(
            "--credential takes NAME=@- and reads the value from standard input, never from an argument".into(),
        )
        .into());
    };
    let mut value = String::new();
    io::stdin().take(MAX_VALUE_BYTES).read_to_string(&mut value).context("standard input could not be read")?;
    Ok(credential(name, Scope::Workspace, without_line_break(value)))
}

/// One line break at the end is the terminal's, `echo`'s or an editor's, not the key's.
pub(super) fn without_line_break(mut value: String) -> String {
    let length = value.strip_suffix('\n').map_or(value.len(), |rest| rest.strip_suffix('\r').unwrap_or(rest).len());
    value.truncate(length);
    value
}

fn credential(name: &str, scope: Scope, value: String) -> Credential {
    Credential { env_name: name.to_owned(), scope, value: CredentialValue::Readable(Arc::new(Secret::new(value))) }
}
