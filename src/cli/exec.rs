//! `byok-gate exec`: decides, and if the workspace is allowed, becomes the workspace's process.

use std::{
    collections::{BTreeMap, BTreeSet},
    env,
    ffi::OsString,
    fs::{self, OpenOptions},
    io::{self, Write},
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::Command,
    sync::Arc,
};

use clap::Args;
use serde_json::{Value, json};

use super::{
    args::{EngineArgs, ProbeArgs, ProxyArg},
    client::ClientArgs,
    decide::{MAX_VALUE_BYTES, ask, decide, without_line_break},
    exit::{Exit, LOG_FLUSH_LIMIT, UsageError},
    report::Report,
};
use crate::{
    config::ConfigError,
    domain::{
        problem::{Problem, Problems},
        request::{
            CalledBy, Checkpoint, Credential, CredentialValue, OperatorOverride, PlatformProxy, Request, Scope, WorkspaceSpec,
        },
        secret::Secret,
    },
    server::shutdown::Signals,
    telemetry::log_writer::LogWriter,
    watch::files,
};

/// The file where Kubernetes reads why a container ended.
const TERMINATION_LOG: &str = "/dev/termination-log";
/// Kubernetes cuts a longer text, and the rest would not be valid JSON.
const MAX_TERMINATION_LOG_BYTES: usize = 4096;

#[derive(Debug, Args)]
#[command(
    override_usage = "byok-gate exec [OPTIONS] -- CMD ARGS...",
    after_help = "The workspace's credentials are looked for under the names that the registry and the facts about runtimes\n\
    know, in the environment and then in --secrets-dir; nothing else of either is read. CMD gets the environment as it is.\n\n\
    Exit codes: CMD's own once it runs. Until then: 10 denied, 11 denied but worth a retry, anything else no decision;\n\
    CMD is then never run, and the termination log says why."
)]
pub(super) struct ExecArgs {
    /// The workspace's runtime [environment: BYOK_GATE_RUNTIME].
    #[arg(long)]
    runtime: Option<String>,
    /// The workspace's model [environment: BYOK_GATE_MODEL].
    #[arg(long)]
    model: Option<String>,
    #[command(flatten)]
    workspace: WorkspaceArgs,
    /// Ask this server instead of deciding here. --registry then only says which credential names are read
    /// [environment: BYOK_GATE_SERVER].
    #[arg(long, value_name = "HOST:PORT|unix:PATH")]
    server: Option<String>,
    /// The file for the reason, as JSON, why CMD was not run [default: /dev/termination-log if it exists].
    #[arg(long, value_name = "FILE")]
    termination_log: Option<PathBuf>,
    #[command(flatten)]
    client: ClientArgs,
    #[command(flatten)]
    engine: EngineArgs,
    #[command(flatten)]
    probe: ProbeArgs,
    /// The command to run, by its path or found in PATH, and its arguments.
    #[arg(last = true, required = true, value_name = "CMD")]
    command: Vec<OsString>,
}

/// The workspace that is to start.
#[derive(Debug, Args)]
struct WorkspaceArgs {
    /// The workspace's id [environment: BYOK_GATE_WORKSPACE_ID].
    #[arg(long)]
    workspace_id: Option<String>,
    /// The organization's id [environment: BYOK_GATE_ORGANIZATION_ID].
    #[arg(long)]
    organization_id: Option<String>,
    /// A folder of mounted secrets, one file per name. One line break at a file's end is not part of the value. An environment
    /// variable of the same name wins [environment: BYOK_GATE_SECRETS_DIR].
    #[arg(long, value_name = "DIR")]
    secrets_dir: Option<PathBuf>,
    /// A base-URL variable that the tenant set, and not the platform (repeatable).
    #[arg(long = "tenant-base-url-env", value_name = "NAME")]
    tenant_base_url_env: Vec<String>,
}

/// Does not return if CMD is run: CMD then replaces this process and keeps its process id.
pub(super) async fn run(args: ExecArgs, log: &LogWriter) -> anyhow::Result<Exit> {
    let ExecArgs { runtime, model, workspace, server, termination_log, client, engine, probe, command } = args;
    let termination_log = termination_log.or_else(|| Path::new(TERMINATION_LOG).exists().then(|| TERMINATION_LOG.into()));
    let workload =
        Workload { runtime: flag_or_env(runtime, "BYOK_GATE_RUNTIME")?, model: flag_or_env(model, "BYOK_GATE_MODEL")? };
    let deciding = async {
        let server = Some(flag_or_env(server, "BYOK_GATE_SERVER")?).filter(|server| !server.is_empty());
        let platform_proxy = engine.platform_proxy.map(ProxyArg::into);
        let setup = engine.load(probe)?;
        if let Some(place) = setup.settings.tier.place() {
            let message = "is set: the shared tier is for `serve`, and its key is no workspace's to hold; leave `tier` out";
            let list = vec![Problem::at(place, message)];
            return Err(ConfigError(vec![Problems { document: "configuration".to_owned(), list }]).into());
        }
        let request = workspace.request(&workload, setup.snapshot.credential_names(), platform_proxy)?;
        match server {
            Some(server) => ask(&client.server(&server)?, &request).await,
            None => decide(setup, request, log).await,
        }
    };
    // Catch signals: a process with id 1 is not ended by signals that it does not catch. CMD starts with the default handlers again.
    let signals = Signals::catch()?;
    let decided = tokio::select! {
        biased;
        () = signals.first(|| {}) => Err(anyhow::anyhow!("no decision: told to stop")),
        decided = deciding => decided,
    };
    let ended = match decided {
        Ok(response) => {
            let report = Report::of(&response);
            print_outcome(&report);
            if report.exit == Exit::Ok { replace_process(&command, log) } else { Ok((report.exit, workload.denial(&report))) }
        }
        Err(fault) => Err(fault),
    };
    let (exit, body) = match ended {
        Ok((exit, body)) => (Ok(exit), body),
        Err(fault) => {
            let body = workload.unavailable(&format!("{fault:#}"));
            (Err(fault), body)
        }
    };
    if let Some(path) = &termination_log {
        write_termination_log(path, body);
    }
    exit
}

// === impl WorkspaceArgs ===

impl WorkspaceArgs {
    /// The request, with the credentials found under these names.
    fn request(
        self,
        Workload { runtime, model }: &Workload,
        names: &BTreeSet<String>,
        platform_proxy: Option<PlatformProxy>,
    ) -> anyhow::Result<Request> {
        let Self { workspace_id, organization_id, secrets_dir, tenant_base_url_env } = self;
        let secrets_dir = secrets_dir.or_else(|| env::var_os("BYOK_GATE_SECRETS_DIR").map(PathBuf::from));
        let workspace_id = flag_or_env(workspace_id, "BYOK_GATE_WORKSPACE_ID")?;
        let organization_id = flag_or_env(organization_id, "BYOK_GATE_ORGANIZATION_ID")?;
        let (credentials, unreadable_scopes) = collect_credentials(names, secrets_dir.as_deref(), &|name| env::var_os(name));
        Ok(Request {
            spec: WorkspaceSpec {
                workspace_id,
                organization_id,
                runtime: runtime.clone(),
                model: model.clone(),
                credentials,
                unreadable_scopes,
                operator_override: OperatorOverride::Derive,
                platform_proxy,
                tenant_base_url_env,
            },
            // The workspace was created before; now its pod starts.
            checkpoint: Checkpoint::Provision,
            max_liveness_age: None,
            explain: false,
            report_only: false,
            caller: CalledBy::default(),
        })
    }
}

/// Replaces this process by CMD. Returns only if that failed.
fn replace_process(command: &[OsString], log: &LogWriter) -> anyhow::Result<(Exit, Value)> {
    let (program, arguments) = command.split_first().ok_or_else(|| UsageError("exec needs a CMD behind `--`".into()))?;
    // Replace the process before the runtime ends, since its end would wait for name lookups that are no longer needed.
    log.flush(LOG_FLUSH_LIMIT);
    let fault = Command::new(program).args(arguments).exec();
    Err(anyhow::Error::new(fault).context(format!("allowed, but {} could not be run", program.display())))
}

/// The value of a flag, or else of its environment variable. If both are missing it is empty, and the decision says what is missing.
fn flag_or_env(flag: Option<String>, variable: &str) -> anyhow::Result<String> {
    match (flag, env::var(variable)) {
        (Some(value), _) | (None, Ok(value)) => Ok(value),
        (None, Err(env::VarError::NotPresent)) => Ok(String::new()),
        (None, Err(env::VarError::NotUnicode(_))) => Err(UsageError(format!("{variable} is not UTF-8")).into()),
    }
}

/// The credentials of these names, and the workspace scope if its folder could not be read. An environment variable wins over a file, even if it
/// is blank, since CMD sees the variable.
fn collect_credentials(
    names: &BTreeSet<String>,
    secrets_dir: Option<&Path>,
    environment: &dyn Fn(&str) -> Option<OsString>,
) -> (Vec<Credential>, Vec<Scope>) {
    let (mut files, mut unreadable) = (Files::new(), Vec::new());
    if let Some(folder) = secrets_dir {
        match from_folder(folder, names) {
            Ok(found) => files = found,
            Err(fault) => {
                // Not the same as a folder without secrets. A decision that does not depend on the folder is still made.
                print_line(&format!("{} could not be searched: {fault}", folder.display()));
                unreadable.push(Scope::Workspace);
            }
        }
    }
    let mut value = |name: &str| match environment(name) {
        Some(value) => Some(value.into_string().map_err(|_| format!("{name} in the environment is not UTF-8"))),
        None => files.remove(name),
    };
    let credentials = names.iter().filter_map(|name| {
        let value = value(name)?.map_or_else(
            |fault| {
                print_line(&fault);
                CredentialValue::Unreadable
            },
            |value| CredentialValue::Readable(Arc::new(Secret::new(value))),
        );
        Some(Credential { env_name: name.clone(), scope: Scope::Workspace, value })
    });
    (credentials.collect(), unreadable)
}

/// The content of mounted secrets, or why it could not be read, by name.
type Files = BTreeMap<String, Result<String, String>>;

/// Reads the mounted secrets of these names under one time limit, so that a volume that does not answer costs one wait.
fn from_folder(folder: &Path, names: &BTreeSet<String>) -> io::Result<Files> {
    let (folder, names) = (folder.to_owned(), names.clone());
    files::in_time(move || {
        fs::read_dir(&folder)?;
        let found = |name: String| {
            let value = from_file(&folder.join(&name)).transpose()?;
            Some((name, value))
        };
        Ok(names.into_iter().filter_map(found).collect())
    })
    .and_then(|found| found)
}

/// Reads a mounted secret. `None` if there is no such file.
fn from_file(path: &Path) -> Result<Option<String>, String> {
    match files::read_text(path, MAX_VALUE_BYTES) {
        Ok(mut value) => Ok(Some(without_line_break(std::mem::take(&mut *value)))),
        Err(fault) if fault.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(fault) => Err(format!("{} could not be read: {fault}", path.display())),
    }
}

/// Prints a denial, or the warnings of an allow: an unverified allow is never silent.
fn print_outcome(report: &Report) {
    let text = report.text();
    match report.exit {
        Exit::Ok => text.lines().filter(|line| line.starts_with("  warning ")).for_each(|line| print_line(line.trim())),
        _ => print_line(&format!("{text}CMD was not run")),
    }
}

fn print_line(text: &str) {
    // If standard error is closed, the message is lost.
    drop(writeln!(io::stderr(), "byok-gate: {text}"));
}

/// Writes the termination log. A failure to write it does not change the decision.
fn write_termination_log(path: &Path, mut body: Value) {
    // If it is too long, drop the least important fields first.
    for field in ["warnings", "alternative_models"] {
        if body.to_string().len() > MAX_TERMINATION_LOG_BYTES
            && let Some(fields) = body.as_object_mut()
        {
            match field {
                "warnings" => drop(fields.remove(field)),
                _ => drop(fields.insert(field.to_owned(), json!([]))),
            }
        }
    }
    let written = OpenOptions::new().write(true).create(true).truncate(true).open(path);
    if let Err(fault) = written.and_then(|mut file| file.write_all(body.to_string().as_bytes())) {
        print_line(&format!("the termination log {} could not be written: {fault}", path.display()));
    }
}

/// The parts of the request that a denial's body repeats.
struct Workload {
    runtime: String,
    model: String,
}

// === impl Workload ===

impl Workload {
    /// The body of a denial, by `docs/denial-body.schema.json`.
    fn denial(&self, report: &Report) -> Value {
        let of = |pointer: &str| report.body.pointer(pointer).cloned().filter(|value| !value.is_null());
        let text = |pointer: &str| of(pointer).unwrap_or_else(|| json!(""));
        let list = |pointer: &str| of(pointer).unwrap_or_else(|| json!([]));
        if report.exit == Exit::Fault {
            return self.unavailable("the answer is neither an allow nor a denial");
        }
        let billing = text("/resolution/billing_mode");
        let mut body = json!({
            "error": text("/message"),
            "code": text("/code"),
            "runtime": self.runtime,
            "model": self.model,
            "provider": text("/resolution/provider"),
            "missing_env": list("/missing_env"),
            "billing_mode": if billing == "" { json!("UNSPECIFIED") } else { billing },
            "remedy": text("/remedy"),
            "retryable": of("/retryable").unwrap_or(Value::Bool(false)),
            "decision_id": text("/decision_id"),
            "alternative_models": list("/alternative_models"),
        });
        let warnings = list("/warnings");
        if let (false, Some(body)) = (warnings == json!([]), body.as_object_mut()) {
            body.insert("warnings".to_owned(), warnings);
        }
        body
    }

    /// The body when there is no decision.
    fn unavailable(&self, error: &str) -> Value {
        json!({
            "error": error,
            "code": "DECISION_UNAVAILABLE",
            "runtime": self.runtime,
            "model": self.model,
            "provider": "",
            "missing_env": [],
            "billing_mode": "UNSPECIFIED",
            "remedy": "repair what the error names, then start the workspace again",
            "retryable": true,
            "decision_id": "",
            "alternative_models": [],
        })
    }
}
