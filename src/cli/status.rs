//! `byok-gate status`: shows the status of a running server in a terminal.

use std::time::Duration;

use anyhow::Context;
use clap::Args;

use super::{
    client::{ClientArgs, Server, chain, tls_failure},
    exit::{Exit, Format, UsageError, print},
};
use crate::domain::causes::causes;
use crate::telemetry::status::{
    Attention, Certificate, DecisionCount, Document, LastFailure, Provider, Recent, RefusedConnection, Status, UndecidedCall,
    printable,
};

/// How long the command waits: the server's own time limit for a request.
const TIMEOUT: Duration = Duration::from_secs(10);
/// The maximum size of a status: more than one with the largest registry.
const MAX_BYTES: usize = 16 * 1024 * 1024;
/// How many decisions of each list are shown by default.
const DEFAULT_LAST: usize = 10;

#[derive(Debug, Args)]
#[command(
    after_help = "Asks the server's admin listener (`serve --admin-listen`), which also shows the same as a page at /status.\n\
    Exit codes: 0 where nothing needs attention, 1 where something does, or where there was no answer."
)]
pub(super) struct StatusArgs {
    /// The admin listener to ask.
    #[arg(long, value_name = "HOST:PORT|unix:PATH", default_value = "127.0.0.1:9464")]
    server: String,
    /// How many decisions of each list to show.
    #[arg(long, value_name = "COUNT", default_value_t = DEFAULT_LAST)]
    last: usize,
    /// The output format.
    #[arg(long, value_enum, default_value_t = Format::Text)]
    format: Format,
    #[command(flatten)]
    client: ClientArgs,
}

pub(super) async fn run(args: StatusArgs) -> anyhow::Result<Exit> {
    let StatusArgs { server, last, format, client } = args;
    let json = fetch(&client.server(&server)?).await?;
    let status: Status = serde_json::from_slice(&json).with_context(|| format!("{server} did not answer with a status"))?;
    match format {
        Format::Json => print(&format!("{}\n", serde_json::to_string_pretty(&status)?))?,
        Format::Text => print(&text(&status, last))?,
    }
    Ok(if status.attention.is_empty() { Exit::Ok } else { Exit::Fault })
}

async fn fetch(server: &Server) -> anyhow::Result<Vec<u8>> {
    // An error means that the process has a provider already, which is as good.
    drop(rustls::crypto::ring::default_provider().install_default());
    let address = &server.address;
    let mut builder = reqwest::Client::builder().no_proxy().redirect(reqwest::redirect::Policy::none()).timeout(TIMEOUT);
    let mut base = server.uri.trim_end_matches('/').to_owned();
    if let Some(path) = server.uri.strip_prefix("unix:") {
        builder = builder.unix_socket(path);
        base = "http://localhost".to_owned();
    }
    if let Some(tls) = &server.tls {
        if let Some(pem) = &tls.authorities {
            let wrong = |_| UsageError("--server-ca holds no certificate in PEM".into());
            builder = builder.tls_certs_only(reqwest::Certificate::from_pem_bundle(pem).map_err(wrong)?);
        }
        if let Some((certificate, key)) = &tls.identity {
            let both = [certificate.as_slice(), b"\n", key.as_slice()].concat();
            let wrong = |_| UsageError("--client-cert and --client-key hold no certificate and key in PEM".into());
            builder = builder.identity(reqwest::Identity::from_pem(&both).map_err(wrong)?);
        }
        if let Some(name) = &tls.name {
            let uri: http::Uri = base.parse().map_err(|_| UsageError(format!("--server {address} is not an address")))?;
            let authority = uri.authority().map(ToString::to_string).unwrap_or_default();
            let found = tokio::net::lookup_host(&authority).await.with_context(|| format!("{address} could not be resolved"))?;
            builder = builder.resolve_to_addrs(name, &found.collect::<Vec<_>>());
            base = format!("https://{name}:{}", uri.port_u16().unwrap_or(443));
        }
    }
    let url: reqwest::Url = format!("{base}/status.json")
        .parse()
        .map_err(|_| UsageError(format!("--server {address} is not an address: write HOST:PORT or unix:PATH")))?;
    let mut request = builder.build()?.get(url);
    if let Some(bearer) = server.bearer() {
        request = request.header(http::header::AUTHORIZATION, bearer.as_str());
    }
    let mut response = match request.send().await {
        Ok(response) => response,
        Err(fault) => anyhow::bail!("{address}: {}", failure_text(&fault)),
    };
    if !response.status().is_success() {
        anyhow::bail!(
            "{address} answered HTTP {} to /status.json: is that the address of --admin-listen?",
            response.status().as_u16()
        );
    }
    let mut json = Vec::new();
    while let Some(chunk) = response.chunk().await.with_context(|| format!("{address} broke off"))? {
        json.extend_from_slice(&chunk);
        if json.len() > MAX_BYTES {
            anyhow::bail!("{address} answers with more than {MAX_BYTES} bytes: that is no status");
        }
    }
    Ok(json)
}

fn failure_text(fault: &reqwest::Error) -> String {
    let said = chain(fault);
    if let Some(said) = tls_failure(fault) {
        said
    } else if fault.is_timeout() {
        "no answer in time".to_owned()
    } else if fault.is_connect() {
        let cause = causes(fault).last().map_or(said, ToString::to_string);
        format!("nothing answers there; start the server with --admin-listen ({cause})")
    } else {
        "no status page answered; is that the address of --admin-listen, and not of --listen?".to_owned()
    }
}

// === text ===

fn text(status: &Status, last: usize) -> String {
    let Status { version, revision, as_of, started_at, attention, documents, certificates, providers, decisions, .. } = status;
    let revision = if revision.is_empty() { String::new() } else { format!(" ({revision})") };
    let mut out = format!("byok-gate {version}{revision}, as of {as_of}, up since {started_at}\n");
    let mut section = |title: &str, lines: Vec<String>| {
        if !lines.is_empty() {
            out.push_str(&format!("\n{title}\n"));
            out.extend(lines.iter().map(|line| format!("  {}\n", printable(line))));
        }
    };
    let wanting = attention.iter().flat_map(|Attention { what, remedy }| {
        what.lines().map(|line| format!("! {line}")).chain([format!("    {remedy}")]).collect::<Vec<_>>()
    });
    let wanting: Vec<String> = wanting.collect();
    section("needs attention", if wanting.is_empty() { vec!["nothing".to_owned()] } else { wanting });
    section("what is in force", documents.iter().map(document).collect());
    section("certificates", certificates.iter().map(certificate).collect());
    section("providers", providers.iter().filter(|provider| !provider.is_quiet()).flat_map(provider).collect());
    section("decisions", decisions.iter().map(|it| count(it, status.window_seconds)).collect());
    section("refused connections", status.refused_connections.iter().take(last).map(refused).collect());
    section("calls without a decision", status.undecided_calls.iter().take(last).map(undecided).collect());
    let changes = status.changes.iter().take(last).map(|change| format!("{} {}", change.at, change.text()));
    section("last changes", changes.collect());
    section("last denials", status.denials.iter().take(last).map(recent).collect());
    section("last unverified allows", status.unverified_allows.iter().take(last).map(recent).collect());
    out
}

fn document(it: &Document) -> String {
    let Document { document, revision, source, loaded_at, age_seconds, last_reload_error, last_reload_failed_at } = it;
    let failed = || format!("failed at {last_reload_failed_at}, see above");
    let reload = if last_reload_error.is_empty() { "good".to_owned() } else { failed() };
    let revision = if revision.is_empty() { String::new() } else { format!("{revision} ") };
    format!("{document:<13} {revision}from {source}, read at {loaded_at} ({age_seconds} s ago); last reload: {reload}")
}

fn certificate(Certificate { setting, file, ends_at, seconds_left }: &Certificate) -> String {
    let left = if *seconds_left <= 0 { "HAS EXPIRED".to_owned() } else { format!("{} days left", seconds_left / 86_400) };
    format!("{setting:<16} {file}: expires at {ends_at}, {left}")
}

fn provider(provider: &Provider) -> Vec<String> {
    let Provider { provider: name, enforcement, until, probes_in_flight, probes_queued, recent_verdicts, .. } = provider;
    let mut parts = Vec::new();
    if enforcement != "enforce" {
        parts.push(format!("{} until {until}", enforcement.to_uppercase()));
    }
    parts.push(format!("breaker {}", provider.breaker_text()));
    if probes_in_flight + probes_queued > 0 {
        parts.push(format!("{probes_in_flight} probes running, {probes_queued} waiting"));
    }
    parts.extend(recent_verdicts.iter().map(|(verdict, count)| format!("{verdict} {count}")));
    let mut lines = vec![format!("{name:<20} {}", parts.join(", "))];
    lines.extend(
        provider
            .calibration
            .iter()
            .map(|it| format!("    made-up keys at {}, `{}` in {}: {}", it.host, it.probe, it.header, it.text())),
    );
    lines.extend(provider.no_api_at.iter().map(|host| format!("    no API at {host}")));
    if let Some(LastFailure { at, verdict, cause, remedy: _ }) = &provider.last_failure {
        lines.push(format!("    last {verdict} at {at}: {cause}"));
    }
    lines
}

fn count(DecisionCount { outcome, code, total, recent }: &DecisionCount, window: u64) -> String {
    let name = if code.is_empty() { outcome.clone() } else { format!("{outcome} {code}") };
    format!("{name:<44} {recent:>8} in {} min {total:>10} in all", window.div_ceil(60).clamp(1, 15))
}

fn refused(RefusedConnection { at, fault, peer, count, names, meaning }: &RefusedConnection) -> String {
    let names = if names.is_empty() { String::new() } else { format!(" [{}]", names.join(", ")) };
    format!("{at} {peer} {count}x {fault}: {meaning}{names}")
}

fn undecided(it: &UndecidedCall) -> String {
    let UndecidedCall { at, method, grpc_code, reason, peer, caller, report_only, count } = it;
    let caller = if caller.is_empty() { String::new() } else { format!(" ({caller})") };
    let report_only = if *report_only { ", report only" } else { "" };
    format!("{at} {peer}{caller} {count}x {method}{report_only}: {grpc_code}, {reason}")
}

fn recent(it: &Recent) -> String {
    let Recent { at, decision_id, checkpoint, report_only, workspace_id, runtime, model, provider, code, verdict, cause, .. } =
        it;
    let report_only = if *report_only { "(report only)" } else { "" };
    let words: Vec<&str> = [code.as_str(), report_only, verdict, checkpoint, workspace_id, runtime, model, provider]
        .into_iter()
        .filter(|word| !word.is_empty())
        .collect();
    let cause = if cause.is_empty() { String::new() } else { format!(": {cause}") };
    format!("{at} {}{cause} [{decision_id}]", words.join(" "))
}
