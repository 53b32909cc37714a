//! Prints a decision as text or JSON. Enum values are printed without their enum's prefix, and durations in seconds.

use serde::Serialize;
use serde_json::{Value, json};

use super::exit::Exit;
use crate::grpc::convert::pb;

/// The width of the column of labels.
const COLUMN: usize = 14;

/// A decision, read from its wire form as a careful caller should: anything but a clear allow is not an allow.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    /// The exit code.
    #[serde(skip)]
    pub(super) exit: Exit,
    #[serde(flatten)]
    pub(super) body: Value,
}

impl Report {
    pub(super) fn of(response: &pb::DecideResponse) -> Self {
        let pb::DecideResponse {
            decision_id,
            decision,
            resolution,
            liveness,
            warnings,
            registry_revision,
            catalogue_revision,
            trace,
            relevant_env,
            relevant_base_url_env,
        } = response;
        let says_who_pays = |allow: &pb::Allow| {
            pb::BillingMode::try_from(allow.billing_mode).is_ok_and(|mode| mode != pb::BillingMode::Unspecified)
        };
        let (exit, word, deny) = match decision {
            Some(pb::decide_response::Decision::Allow(allow)) if says_who_pays(allow) => (Exit::Ok, "ALLOW", None),
            Some(pb::decide_response::Decision::Deny(deny)) if deny.retryable => (Exit::DeniedRetryable, "DENY", Some(deny)),
            Some(pb::decide_response::Decision::Deny(deny)) => (Exit::Denied, "DENY", Some(deny)),
            Some(pb::decide_response::Decision::Allow(_)) | None => (Exit::Fault, "UNDECIDED", None),
        };
        let mut body = json!({
            "decision": word,
            "decision_id": decision_id,
            "resolution": resolution.as_ref().map(resolution_of),
            "liveness": liveness.as_ref().map(liveness_of),
            "warnings": warnings.iter().map(warning_of).collect::<Vec<_>>(),
            "registry_revision": registry_revision,
            "catalogue_revision": catalogue_revision,
            "relevant_env": relevant_env,
            "relevant_base_url_env": relevant_base_url_env,
        });
        if let (Some(deny), Some(body)) = (deny, body.as_object_mut()) {
            body.extend([
                ("code".to_owned(), json!(word_of::<pb::DenyCode>(deny.code))),
                ("message".to_owned(), json!(deny.message)),
                ("remedy".to_owned(), json!(deny.remedy)),
                ("missing_env".to_owned(), json!(deny.missing_env)),
                ("alternative_models".to_owned(), json!(deny.alternative_models)),
                ("retryable".to_owned(), json!(deny.retryable)),
                ("retry_after_seconds".to_owned(), json!(deny.retry_after.as_ref().map(seconds))),
            ]);
        }
        if let (false, Some(body)) = (trace.is_empty(), body.as_object_mut()) {
            let steps = trace.iter().map(|step| json!({"step": step.step, "detail": step.detail})).collect::<Vec<_>>();
            body.insert("trace".to_owned(), Value::Array(steps));
        }
        Self { exit, body }
    }

    /// The decision as aligned lines.
    pub(super) fn text(&self) -> String {
        let field = |pointer: &str| match self.body.pointer(pointer) {
            None | Some(Value::Null) => String::new(),
            Some(Value::String(text)) => text.clone(),
            Some(Value::Array(items)) => items.iter().filter_map(Value::as_str).collect::<Vec<_>>().join(", "),
            Some(other) => other.to_string(),
        };
        let mut out = format!("{} {}\n", field("/decision"), field("/code")).replace(" \n", "\n");
        let mut line = |label: &str, value: String| {
            if !value.trim().is_empty() {
                out.push_str(&format!("  {label:COLUMN$}{value}\n"));
            }
        };
        line("reason", field("/message"));
        line("remedy", field("/remedy"));
        line("missing", field("/missing_env"));
        line("without a key", field("/alternative_models"));
        line(
            "retry after",
            self.body.pointer("/retry_after_seconds").and_then(Value::as_f64).map_or_else(String::new, whole_seconds),
        );
        line("provider", field("/resolution/provider"));
        line("billing", field("/resolution/billing_mode"));
        line("source", spaced(&field("/resolution/source"), &field("/resolution/matched_by")));
        line("credential", spaced(&field("/resolution/credential_env"), &field("/resolution/credential_scope")));
        line("fingerprint", field("/resolution/credential_fingerprint"));
        line(
            "liveness",
            spaced(
                &field("/liveness/verdict"),
                &spaced(&field("/liveness/endpoint_host"), &http_status(&field("/liveness/upstream_status"))),
            ),
        );
        line("served from", field("/liveness/served_from"));
        for warning in self.body.pointer("/warnings").and_then(Value::as_array).into_iter().flatten() {
            let of = |name: &str| warning.get(name).and_then(Value::as_str).unwrap_or_default();
            line("warning", format!("{}: {}", of("code"), of("message")));
        }
        line("decision", field("/decision_id"));
        line("registry", field("/registry_revision"));
        for step in self.body.pointer("/trace").and_then(Value::as_array).into_iter().flatten() {
            let of = |name: &str| step.get(name).and_then(Value::as_str).unwrap_or_default();
            line("step", format!("{}: {}", of("step"), of("detail")));
        }
        out
    }
}

/// Joins two words; empty if the first one is.
fn spaced(one: &str, two: &str) -> String {
    if one.is_empty() { String::new() } else { format!("{one} {two}").trim_end().to_owned() }
}

/// Rounds up, so that a caller that waits this long has waited long enough.
fn whole_seconds(seconds: f64) -> String {
    format!("{} s", seconds.ceil())
}

/// The HTTP status; empty without an answer.
fn http_status(status: &str) -> String {
    if matches!(status, "" | "0") { String::new() } else { format!("HTTP {status}") }
}

fn resolution_of(resolution: &pb::Resolution) -> Value {
    json!({
        "provider": resolution.provider,
        "billing_mode": word_of::<pb::BillingMode>(resolution.billing_mode),
        "source": word_of::<pb::ResolutionSource>(resolution.source),
        "matched_by": word_of::<pb::MatchedBy>(resolution.matched_by),
        "accepted_env": resolution.accepted_env,
        "credential_env": resolution.credential_env,
        "credential_scope": word_of::<pb::Scope>(resolution.credential_scope),
        "shadows_organization": resolution.shadows_organization,
        "credential_fingerprint": resolution.credential_fingerprint,
    })
}

fn liveness_of(liveness: &pb::Liveness) -> Value {
    json!({
        "verdict": word_of::<pb::Verdict>(liveness.verdict),
        "upstream_status": liveness.upstream_status,
        "endpoint_host": liveness.endpoint_host,
        "probe": liveness.probe,
        "observed_at": liveness.observed_at.as_ref().map(ToString::to_string),
        "age_seconds": liveness.age.as_ref().map(seconds),
        "served_from": word_of::<pb::ServedFrom>(liveness.served_from),
    })
}

fn warning_of(warning: &pb::Warning) -> Value {
    json!({
        "code": word_of::<pb::WarningCode>(warning.code),
        "message": warning.message,
        "env_names": warning.env_names,
    })
}

fn seconds(duration: &prost_types::Duration) -> f64 {
    f64::from(i32::try_from(duration.seconds).unwrap_or(i32::MAX)) + f64::from(duration.nanos) / 1e9
}

/// An enum whose value names begin with its own name.
pub(super) trait Words: TryFrom<i32> {
    const PREFIX: &'static str;
    fn name(&self) -> &'static str;
}

/// The name without the prefix; empty for 0, the number for a value that this build does not know.
pub(super) fn word_of<E: Words>(number: i32) -> String {
    match E::try_from(number) {
        Ok(_) if number == 0 => String::new(),
        Ok(value) => value.name().strip_prefix(E::PREFIX).unwrap_or(value.name()).to_owned(),
        Err(_) => number.to_string(),
    }
}

macro_rules! words {
    ($($name:ident $prefix:literal)+) => { $(
        impl Words for pb::$name {
            const PREFIX: &'static str = $prefix;
            fn name(&self) -> &'static str {
                self.as_str_name()
            }
        }
    )+ };
}

words! {
    DenyCode "DENY_CODE_"
    BillingMode "BILLING_MODE_"
    ResolutionSource "RESOLUTION_SOURCE_"
    MatchedBy "MATCHED_BY_"
    Scope "SCOPE_"
    Verdict "VERDICT_"
    ServedFrom "SERVED_FROM_"
    WarningCode "WARNING_CODE_"
}
