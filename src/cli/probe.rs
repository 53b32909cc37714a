//! `byok-gate probe`: probes one credential at its provider, and can show each request.

use clap::Args;
use serde_json::{Value, json};

use super::{
    args::{EngineArgs, ProbeArgs},
    decide::{from_environment, from_stdin},
    exit::{Exit, Format, UsageError, print},
};
use crate::{
    app,
    core::{
        classify::{Classification, Finding, ProbeResponse},
        endpoint::{self, Target},
        key_shape::{Unsendable, why_unsendable},
        probe_plan::outcome_of,
        registry::{Provider, Registry},
    },
    domain::{
        denial::{Refusal, any_of, listed},
        protocol::{HeaderFamily, Method},
        request::{CredentialValue, Scope},
        verdict::{Cause, Unreached, Verdict},
    },
    liveness::prober::Attempt,
};

/// Exits 0 for VALID, 10 for a refused credential, and 11 if the probe was inconclusive.
#[derive(Debug, Args)]
pub(super) struct ProbeCommandArgs {
    /// The provider, by its name in the registry.
    #[arg(long)]
    provider: String,
    /// Take the credential from this environment variable.
    #[arg(long, value_name = "NAME", required_unless_present = "credential", conflicts_with = "credential")]
    env: Option<String>,
    /// Take the credential from standard input: `NAME=@-`. One line break at its end is not part of it.
    #[arg(long, value_name = "NAME=@-")]
    credential: Option<String>,
    /// The model for calls that name one [default: the first that some runtime lists for the provider].
    #[arg(long)]
    model: Option<String>,
    /// Show every request with its status and time.
    #[arg(long)]
    explain: bool,
    /// Also send made-up keys, as a long-running server does, so that a "yes" counts even if the catalogue does not vouch for the endpoint.
    #[arg(long)]
    calibrate: bool,
    /// The output format.
    #[arg(long, value_enum, default_value_t = Format::Text)]
    format: Format,
    #[command(flatten)]
    engine: EngineArgs,
    #[command(flatten)]
    probe: ProbeArgs,
}

pub(super) async fn run(args: ProbeCommandArgs) -> anyhow::Result<Exit> {
    let ProbeCommandArgs { provider, env, credential, model, explain, calibrate, format, engine, probe } = args;
    let credential = match (env, credential) {
        (Some(name), _) => from_environment(&name, Scope::Workspace)?
            .ok_or_else(|| UsageError(format!("{name} is not set in this command's environment")))?,
        (None, argument) => from_stdin(&argument.unwrap_or_default())?,
    };
    let CredentialValue::Readable(secret) = &credential.value else { anyhow::bail!("the credential could not be read") };
    if secret.is_blank() {
        return Err(UsageError(format!("{} is blank: that counts as absent", credential.env_name)).into());
    }
    let mut setup = engine.load(probe)?;
    let snapshot = setup.snapshot.clone();
    let found = find(&snapshot.registry, &provider)?;
    let model = model.or_else(|| first_model(&snapshot.registry, found)).unwrap_or_default();
    let not_probed =
        |reason: &str| answer(format, &provider, None, &Finding::bare(Verdict::NoServerSurface), &[], reason, explain);
    let target = match endpoint::target(found, &snapshot.catalogue, &model) {
        Ok(target) => target,
        Err(reason) => return not_probed(&reason.text()),
    };
    let refusal = match why_unsendable(&snapshot.catalogue, &target.endpoint, &credential.env_name, secret, true) {
        None => None,
        Some(Unsendable::NoSurface(reason)) => return not_probed(&reason.text()),
        Some(Unsendable::Refused(refusal)) => Some(*refusal),
        Some(Unsendable::Malformed(fault)) => {
            let env_name = credential.env_name.clone();
            Some(Refusal::Malformed { env_name, provider: provider.clone(), fault, save_as: None, right_place: None })
        }
    };
    if let Some(refusal) = refusal {
        let finding = Finding::bare(Verdict::Invalid);
        return answer(format, &provider, Some(&target), &finding, &[], &refusal.message(), explain);
    }
    setup.settings.probe.calibrate = calibrate;
    let prober = app::prober(&setup)?;
    let (finding, attempts) = prober.explain(&target, secret).await;
    answer(format, &provider, Some(&target), &finding, &attempts, "", explain)
}

fn find<'r>(registry: &'r Registry, name: &str) -> Result<&'r Provider, UsageError> {
    registry.providers().iter().find(|provider| provider.name == name).ok_or_else(|| {
        let known: Vec<String> = registry.providers().iter().map(|provider| provider.name.clone()).collect();
        UsageError(format!("--provider {name}: the registry has {}", listed(&known)))
    })
}

fn first_model(registry: &Registry, provider: &Provider) -> Option<String> {
    let offers = registry.runtimes().flat_map(|(_, runtime)| &runtime.offers);
    offers.filter(|offer| registry.provider(offer).name == provider.name).find_map(|offer| offer.models.first().cloned())
}

fn answer(
    format: Format,
    provider: &str,
    target: Option<&Target>,
    finding: &Finding,
    attempts: &[Attempt],
    why: &str,
    explain: bool,
) -> anyhow::Result<Exit> {
    let host = target.map_or("", |target| target.endpoint.host.as_str());
    let shown: &[Attempt] = if explain { attempts } else { &[] };
    match format {
        Format::Json => {
            let whole = json!({
                "verdict": finding.verdict.as_str(),
                "provider": provider,
                "endpoint_host": host,
                "probe": finding.probe,
                "upstream_status": finding.status,
                "cause": finding.cause.map(Cause::as_str),
                "header": finding.family.map(HeaderFamily::as_str),
                "wrong_header": finding.wrong_header,
                "made_up_keys": finding.made_up.text(),
                "reason": why,
                "calls": shown.iter().map(call_json).collect::<Vec<_>>(),
            });
            print(&format!("{}\n", serde_json::to_string_pretty(&whole)?))?;
        }
        Format::Text => {
            let status = finding.status.map_or_else(String::new, |status| format!(" HTTP {status}"));
            let by = if finding.probe.is_empty() { String::new() } else { format!(" by `{}`", finding.probe) };
            let mut out = format!("{} for provider `{provider}`{by}{status}\n", finding.verdict);
            if !host.is_empty() {
                out.push_str(&format!("  host      {host}\n"));
            }
            if !why.is_empty() {
                out.push_str(&format!("  reason    {why}\n"));
            }
            if let Some(cause) = finding.cause {
                out.push_str(&format!("  cause     {cause}: {}\n", cause.text()));
            }
            if finding.wrong_header {
                let family = finding.family.map_or("another header", HeaderFamily::header);
                out.push_str(&format!(
                    "  header    accepted in {family}, which is not the one that the workspace's client uses\n"
                ));
            }
            if let Some(target) =
                target.filter(|target| finding.verdict == Verdict::Invalid && !target.endpoint.siblings.is_empty())
            {
                out.push_str(&format!("  hint      a key of {} is refused here too\n", any_of(&target.endpoint.siblings)));
            }
            for (index, attempt) in shown.iter().enumerate() {
                out.push_str(&format!("  call {}    {}\n", index + 1, call_text(attempt)));
            }
            print(&out)?;
        }
    }
    Ok(match finding.verdict {
        Verdict::Valid => Exit::Ok,
        Verdict::Invalid | Verdict::Forbidden => Exit::Denied,
        Verdict::QuotaExhausted
        | Verdict::RateLimited
        | Verdict::ProviderError
        | Verdict::UnexpectedResponse
        | Verdict::Timeout
        | Verdict::Unreachable
        | Verdict::NotAttempted
        | Verdict::NoServerSurface
        | Verdict::NotCalibrated
        | Verdict::ProbeDisabled => Exit::DeniedRetryable,
    })
}

fn method(attempt: &Attempt) -> &'static str {
    match attempt.method {
        Method::Get => "GET",
        Method::Post => "POST",
    }
}

fn call_text(attempt: &Attempt) -> String {
    let Attempt { probe, url, header, took, .. } = attempt;
    format!(
        "`{probe}` {} {url} ({header}): {}; made-up keys: {}; {} ms",
        method(attempt),
        response(&attempt.response),
        outcome_of(&attempt.calibration).text(),
        took.as_millis()
    )
}

fn call_json(attempt: &Attempt) -> Value {
    let (status, cause) = match &attempt.response {
        ProbeResponse::Answer { reading, shape, .. } => (Some(shape.status), Some(reading.cause.as_str())),
        ProbeResponse::TimedOut | ProbeResponse::Unreachable(_) | ProbeResponse::Exhausted => (None, None),
    };
    json!({
        "probe": attempt.probe,
        "method": method(attempt),
        "url": attempt.url,
        "header": attempt.header,
        "status": status,
        "cause": cause,
        "heard": response(&attempt.response),
        "made_up_keys": outcome_of(&attempt.calibration).text(),
        "milliseconds": u64::try_from(attempt.took.as_millis()).unwrap_or(u64::MAX),
    })
}

fn response(response: &ProbeResponse) -> String {
    match response {
        ProbeResponse::TimedOut => "no answer in time".into(),
        ProbeResponse::Exhausted => "this machine has no descriptor or memory left for a connection".into(),
        ProbeResponse::Unreachable(why) => match why {
            Unreached::Dns => "the name could not be resolved".into(),
            Unreached::Address => "the address or scheme may not be dialled".into(),
            Unreached::Connect => "no connection".into(),
            Unreached::ConnectTimeout => "no connection in time: packets are dropped, or the host is down".into(),
            Unreached::Tls => "TLS failed".into(),
            Unreached::TlsExpired => "TLS failed: the certificate has expired, or is not valid yet".into(),
            Unreached::TlsName => "TLS failed: the certificate is for another name".into(),
            Unreached::TlsIssuer => "TLS failed: the certificate is not from a trusted authority".into(),
            Unreached::Closed => "closed without an answer".into(),
            Unreached::Protocol => "not HTTP".into(),
            Unreached::Proxy => "the forward proxy could not be reached, or did not let the call through".into(),
        },
        ProbeResponse::Answer { reading, shape, .. } => {
            let says = match &reading.classification {
                Classification::Accepted => "accepted",
                Classification::Restricted => "alive, but not for this endpoint",
                Classification::Forbidden(_) => "forbidden",
                Classification::Unread => reading.cause.text(),
                Classification::Verdict(verdict) => verdict.as_str(),
            };
            format!("HTTP {}, {says}", shape.status)
        }
    }
}
