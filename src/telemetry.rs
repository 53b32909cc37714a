//! Logs, and the one event that every decision leaves.

use std::{io, time::Duration};

use tracing_subscriber::{EnvFilter, layer::SubscriberExt, util::SubscriberInitExt};

use crate::{
    decision::{Decision, Outcome, Verdict},
    engine::Decided,
    spec::Request,
};

/// Where and how logs are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogTo {
    /// JSON lines on standard output: a server's.
    StdoutJson,
    /// Text on standard error: a command's, whose standard output is its answer.
    StderrText,
}

/// The filter does not parse.
#[derive(Debug, thiserror::Error)]
#[error("log filter `{filter}`: {fault}")]
pub struct LogFilterError {
    filter: String,
    fault: String,
}

/// Starts logging. The filter is the first layer, so that spans and events below it are never built.
pub fn init(filter: &str, to: LogTo) -> Result<(), LogFilterError> {
    let failed = |fault: String| LogFilterError { filter: filter.to_owned(), fault };
    let filter = EnvFilter::try_new(filter).map_err(|fault| failed(fault.to_string()))?;
    let registry = tracing_subscriber::registry().with(filter);
    match to {
        LogTo::StdoutJson => {
            let lines =
                tracing_subscriber::fmt::layer().json().flatten_event(true).with_current_span(false).with_span_list(false);
            registry.with(lines.with_writer(io::stdout)).try_init()
        }
        LogTo::StderrText => registry.with(tracing_subscriber::fmt::layer().with_ansi(false).with_writer(io::stderr)).try_init(),
    }
    .map_err(|fault| failed(fault.to_string()))
}

/// Leaves the decision's event: names, codes and numbers; no value, no body, no header.
/// A denial is at WARN, and so is an allow that was not verified, but at INFO where there is nothing to call by design.
pub fn record(request: &Request, decided: &Decided, took: Duration) {
    let Decided { id, decision, registry_revision, catalogue_revision } = decided;
    let Decision { outcome, resolution, liveness, warnings, trace: _ } = decision;
    let spec = &request.spec;
    let (word, code) = match outcome {
        Outcome::Allow(_) => ("ALLOW", ""),
        Outcome::Deny(deny) => ("DENY", deny.refusal.code().as_str()),
    };
    let credential = resolution.credential.as_ref();
    let seen = liveness.as_ref().and_then(|liveness| liveness.seen);
    let codes = warnings.iter().map(|warning| warning.code.as_str()).collect::<Vec<_>>().join(",");
    macro_rules! event {
        ($level:expr) => {
            tracing::event!(
                name: "decision",
                target: "byok_gate::decision",
                $level,
                event = "decision",
                decision_id = %id,
                checkpoint = request.checkpoint.as_str(),
                workspace_id = spec.workspace_id,
                organization_id = spec.organization_id,
                runtime = spec.runtime,
                model = spec.model,
                outcome = word,
                code,
                provider = resolution.provider,
                billing_mode = resolution.billing_mode.map_or("", |mode| mode.as_str()),
                source = resolution.source.as_str(),
                credential_env = credential.map_or("", |credential| &credential.env_name),
                credential_scope = credential.map_or("", |credential| credential.scope.as_str()),
                credential_fingerprint = credential.map_or("", |credential| &credential.fingerprint),
                verdict = liveness.as_ref().map_or("", |liveness| liveness.verdict.as_str()),
                upstream_status = liveness.as_ref().and_then(|liveness| liveness.upstream_status),
                served_from = seen.map_or("", |seen| seen.served_from.as_str()),
                age_ms = seen.map(|seen| u64::try_from(seen.age.as_millis()).unwrap_or(u64::MAX)),
                duration_us = u64::try_from(took.as_micros()).unwrap_or(u64::MAX),
                warnings = codes,
                registry_revision = registry_revision.as_str(),
                catalogue_revision = catalogue_revision.as_str(),
            )
        };
    }
    let by_design = liveness.as_ref().is_some_and(|liveness| liveness.verdict == Verdict::NoServerSurface);
    let warn = match outcome {
        Outcome::Deny(_) => true,
        Outcome::Allow(_) => decision.is_unverified_allow() && !by_design,
    };
    if warn { event!(tracing::Level::WARN) } else { event!(tracing::Level::INFO) }
}
