//! Converts between proto messages and domain types.

use super::limits::Limits;
use crate::{
    core::{
        engine::Decided,
        evaluate::{Resolved, Unresolved},
        snapshot::{Origin, Snapshot},
    },
    domain::{
        decision::{Decision, Deny, Liveness, Outcome, Resolution, Seen, Warning},
        request::{
            CalledBy, Checkpoint, Credential, CredentialValue, OperatorOverride, PlatformProxy, Request, Scope, WorkspaceSpec,
            is_plain,
        },
        secret::Secret,
        verdict::{BillingMode, DenyCode, MatchedBy, ServedFrom, Source, Verdict, WarningCode},
    },
};
use std::{
    collections::BTreeSet,
    fmt,
    sync::Arc,
    time::{Duration, SystemTime},
};

/// Generated from `proto/`.
#[expect(clippy::allow_attributes, clippy::allow_attributes_without_reason, reason = "generated code")]
pub mod pb {
    tonic::include_proto!("byokgate.v1");
}

/// The most entries of `unreadable_scopes`. Far more than there are scopes.
const UNREADABLE_SCOPES: usize = 16;

/// The encoded descriptors, for reflection.
pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));

/// What is wrong with a request: each field with what was found and what to do.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Violations(pub Vec<(String, String)>);

impl Violations {
    /// The arguments become text only here, because nearly every request is valid.
    fn add(&mut self, field: impl fmt::Display, description: impl fmt::Display) {
        self.0.push((field.to_string(), description.to_string()));
    }

    fn or<T>(self, value: T) -> Result<T, Self> {
        if self.0.is_empty() { Ok(value) } else { Err(self) }
    }

    /// Checks a name that may appear in logs and messages.
    fn check_name(&mut self, field: impl fmt::Display, name: &str, limit: usize) {
        if name.len() > limit {
            self.add(&field, format_args!("is {} bytes long; the limit is {limit} (limits.name_bytes)", name.len()));
        }
        if !is_plain(name)
            && let Some(at) = name.find(char::is_control)
        {
            self.add(&field, format_args!("holds a control character at byte {at}"));
        }
    }
}

// === in ===

/// Parses a Decide request with the built-in limits, for commands.
pub fn request(message: pb::DecideRequest) -> Result<Request, Violations> {
    request_within(message, &Limits::default()).map_err(|Invalid { violations, .. }| violations)
}

/// A Decide request that is invalid. The log names the workspace all the same.
#[derive(Debug, PartialEq, Eq)]
pub struct Invalid {
    /// What is wrong with it.
    pub violations: Violations,
    /// What it is about.
    pub about: About<String>,
}

/// What a request is about, as the log says it. What is not known, or cannot be logged, is empty.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct About<S> {
    /// The checkpoint's name.
    pub checkpoint: &'static str,
    /// The workspace.
    pub workspace_id: S,
    /// The organization.
    pub organization_id: S,
}

impl About<String> {
    /// What a message is about that was decoded and not parsed.
    pub fn of(message: &pb::DecideRequest, limits: &Limits) -> Self {
        let spec = message.workspace_spec.as_ref();
        let name = |name: Option<&String>| name.filter(|name| is_loggable(name, limits)).cloned().unwrap_or_default();
        let checkpoint = checkpoint(message.checkpoint).map_or("", Checkpoint::as_str);
        let (workspace_id, organization_id) = (spec.map(|spec| &spec.workspace_id), spec.map(|spec| &spec.organization_id));
        Self { checkpoint, workspace_id: name(workspace_id), organization_id: name(organization_id) }
    }

    /// The same, borrowed.
    pub fn as_ref(&self) -> About<&str> {
        let Self { checkpoint, workspace_id, organization_id } = self;
        About { checkpoint, workspace_id, organization_id }
    }
}

impl<'r> From<&'r Request> for About<&'r str> {
    fn from(Request { spec, checkpoint, .. }: &'r Request) -> Self {
        Self { checkpoint: checkpoint.as_str(), workspace_id: &spec.workspace_id, organization_id: &spec.organization_id }
    }
}

fn is_loggable(name: &str, limits: &Limits) -> bool {
    name.len() <= limits.name_bytes && !name.contains(char::is_control)
}

fn checkpoint(number: i32) -> Option<Checkpoint> {
    match pb::Checkpoint::try_from(number) {
        Ok(pb::Checkpoint::Create) => Some(Checkpoint::Create),
        Ok(pb::Checkpoint::Provision) => Some(Checkpoint::Provision),
        Ok(pb::Checkpoint::Update) => Some(Checkpoint::Update),
        Ok(pb::Checkpoint::Audit) => Some(Checkpoint::Audit),
        Ok(pb::Checkpoint::Unspecified) | Err(_) => None,
    }
}

/// Parses and checks a Decide request. Later code relies on the checks.
pub fn request_within(message: pb::DecideRequest, limits: &Limits) -> Result<Request, Invalid> {
    let pb::DecideRequest { workspace_spec, checkpoint, max_liveness_age, explain, report_only } = message;
    let mut violations = Violations::default();
    let checkpoint = self::checkpoint(checkpoint);
    if checkpoint.is_none() {
        violations.add("checkpoint", "is required: CREATE, PROVISION, UPDATE or AUDIT");
    }
    let max_liveness_age = max_liveness_age.and_then(|age| {
        let found = duration_of(age);
        if found.is_none() {
            violations.add("max_liveness_age", "must be a duration of 0 s to 315,576,000,000 s, its nanos 0 to 999,999,999");
        }
        found
    });
    let spec = match workspace_spec {
        Some(message) => Some(spec(message, limits, &mut violations)),
        None => {
            violations.add("workspace_spec", "is required");
            None
        }
    };
    match (spec, checkpoint) {
        (Some(spec), Some(checkpoint)) if violations.0.is_empty() => {
            Ok(Request { spec, checkpoint, max_liveness_age, explain, report_only, caller: CalledBy::default() })
        }
        (spec, checkpoint) => {
            let ids = spec.map(|WorkspaceSpec { workspace_id, organization_id, .. }| (workspace_id, organization_id));
            let (workspace_id, organization_id) = ids.unwrap_or_default();
            let name = |name: String| if is_loggable(&name, limits) { name } else { String::new() };
            let about = About {
                checkpoint: checkpoint.map_or("", Checkpoint::as_str),
                workspace_id: name(workspace_id),
                organization_id: name(organization_id),
            };
            Err(Invalid { violations, about })
        }
    }
}

/// A duration from the wire, if the well-known type allows it. The library's own conversion panics for the smallest number of seconds and accepts
/// parts with different signs.
fn duration_of(wire: prost_types::Duration) -> Option<Duration> {
    const MAX_SECONDS: u64 = 315_576_000_000;
    let (seconds, nanos) = (u64::try_from(wire.seconds).ok()?, u32::try_from(wire.nanos).ok()?);
    (seconds <= MAX_SECONDS && nanos < 1_000_000_000).then(|| Duration::new(seconds, nanos))
}

fn spec(message: pb::WorkspaceSpec, limits: &Limits, violations: &mut Violations) -> WorkspaceSpec {
    let pb::WorkspaceSpec {
        workspace_id,
        organization_id,
        runtime,
        model,
        credentials,
        unreadable_scopes,
        operator_override,
        platform_proxy,
        tenant_base_url_env,
    } = message;
    violations.check_name(format_args!("{SPEC}.workspace_id"), &workspace_id, limits.name_bytes);
    violations.check_name(format_args!("{SPEC}.organization_id"), &organization_id, limits.name_bytes);
    violations.check_name(format_args!("{SPEC}.runtime"), &runtime, limits.name_bytes);
    let model = model_within(model, format_args!("{SPEC}.model"), limits, violations);
    let credentials = credentials_of(credentials, limits, violations);
    let unreadable_scopes = scopes(unreadable_scopes, violations);
    let operator_override = override_of(operator_override, violations);
    let platform_proxy = proxy_of(platform_proxy, violations);
    check_base_url_names(&tenant_base_url_env, limits, violations);
    WorkspaceSpec {
        workspace_id,
        organization_id,
        runtime,
        model,
        credentials,
        unreadable_scopes,
        operator_override,
        platform_proxy,
        tenant_base_url_env,
    }
}

/// The field that holds the spec.
const SPEC: &str = "workspace_spec";

fn credentials_of(credentials: Vec<pb::Credential>, limits: &Limits, violations: &mut Violations) -> Vec<Credential> {
    if credentials.len() > limits.credentials {
        violations.add(
            format_args!("{SPEC}.credentials"),
            format_args!(
                "holds {}; the limit is {} (limits.credentials): send only names that GetRegistryStatus lists",
                credentials.len(),
                limits.credentials
            ),
        );
    }
    let mut parsed: Vec<Credential> = Vec::with_capacity(credentials.len().min(limits.credentials));
    for (index, message) in credentials.into_iter().take(limits.credentials).enumerate() {
        let place = format_args!("{SPEC}.credentials[{index}]");
        if let Some(credential) = credential(message, place, limits, violations) {
            let Credential { env_name, scope, .. } = &credential;
            // A search through the few entries costs less than a set.
            if parsed.iter().any(|other| other.scope == *scope && other.env_name == *env_name) {
                violations.add(format_args!("{place}.env_name"), format_args!("`{env_name}` appears twice in one scope"));
            }
            parsed.push(credential);
        }
    }
    parsed
}

fn scopes(unreadable_scopes: Vec<i32>, violations: &mut Violations) -> Vec<Scope> {
    if unreadable_scopes.len() > UNREADABLE_SCOPES {
        violations.add(
            format_args!("{SPEC}.unreadable_scopes"),
            format_args!("holds {}; the limit is {UNREADABLE_SCOPES}: name each scope once", unreadable_scopes.len()),
        );
    }
    unreadable_scopes
        .into_iter()
        .take(UNREADABLE_SCOPES)
        .enumerate()
        .filter_map(|(index, number)| scope(number, format_args!("{SPEC}.unreadable_scopes[{index}]"), violations))
        .collect()
}

fn override_of(operator_override: i32, violations: &mut Violations) -> OperatorOverride {
    match pb::OperatorOverride::try_from(operator_override) {
        Ok(pb::OperatorOverride::Unspecified) => OperatorOverride::Derive,
        Ok(pb::OperatorOverride::PlatformManaged) => OperatorOverride::PlatformManaged,
        Ok(pb::OperatorOverride::Byok) => OperatorOverride::Byok,
        Ok(pb::OperatorOverride::Disabled) => OperatorOverride::Disabled,
        Err(_) => {
            violations.add(
                format_args!("{SPEC}.operator_override"),
                format_args!("{operator_override} is not a value of OperatorOverride"),
            );
            OperatorOverride::Derive
        }
    }
}

fn proxy_of(platform_proxy: i32, violations: &mut Violations) -> Option<PlatformProxy> {
    match pb::PlatformProxy::try_from(platform_proxy) {
        Ok(pb::PlatformProxy::Unspecified) => None,
        Ok(pb::PlatformProxy::Available) => Some(PlatformProxy::Available),
        Ok(pb::PlatformProxy::Absent) => Some(PlatformProxy::Absent),
        Err(_) => {
            violations
                .add(format_args!("{SPEC}.platform_proxy"), format_args!("{platform_proxy} is not a value of PlatformProxy"));
            None
        }
    }
}

fn check_base_url_names(names: &[String], limits: &Limits, violations: &mut Violations) {
    if names.len() > limits.base_url_names {
        violations.add(
            format_args!("{SPEC}.tenant_base_url_env"),
            format_args!("holds {}; the limit is {} (limits.base_url_names)", names.len(), limits.base_url_names),
        );
    }
    for (index, name) in names.iter().take(limits.base_url_names).enumerate() {
        let field = format_args!("{SPEC}.tenant_base_url_env[{index}]");
        violations.check_name(field, name, limits.name_bytes);
        if name.is_empty() {
            violations.add(field, "is empty: name the variable, or leave it out");
        }
    }
}

/// The model without white space at its ends. The limit applies to the text as sent.
fn model_within(model: String, place: std::fmt::Arguments<'_>, limits: &Limits, violations: &mut Violations) -> String {
    if model.len() > limits.model_bytes {
        violations
            .add(place, format_args!("is {} bytes long; the limit is {} (limits.model_bytes)", model.len(), limits.model_bytes));
        return String::new();
    }
    let model = trimmed(model);
    violations.check_name(place, &model, limits.model_bytes);
    model
}

/// Trims Unicode white space. Copies only if there is some.
fn trimmed(text: String) -> String {
    let kept = text.trim();
    if kept.len() == text.len() { text } else { kept.to_owned() }
}

fn credential(
    message: pb::Credential,
    place: impl fmt::Display,
    limits: &Limits,
    violations: &mut Violations,
) -> Option<Credential> {
    let pb::Credential { env_name, scope: number, value, unreadable } = message;
    let secret = Secret::new(value);
    if env_name.is_empty() {
        violations.add(format_args!("{place}.env_name"), "is required");
    }
    violations.check_name(format_args!("{place}.env_name"), &env_name, limits.name_bytes);
    let (length, limit) = (secret.expose().len(), limits.credential_bytes);
    if length > limit {
        violations.add(
            format_args!("{place}.value"),
            format_args!("is {length} bytes long; the limit is {limit} (limits.credential_bytes)"),
        );
    }
    if unreadable && length > 0 {
        violations.add(format_args!("{place}.value"), "must be empty where `unreadable` is set");
    }
    let value = if unreadable { CredentialValue::Unreadable } else { CredentialValue::Readable(Arc::new(secret)) };
    Some(Credential { env_name, scope: scope(number, format_args!("{place}.scope"), violations)?, value })
}

fn scope(number: i32, field: impl fmt::Display, violations: &mut Violations) -> Option<Scope> {
    match pb::Scope::try_from(number) {
        Ok(pb::Scope::Workspace) => Some(Scope::Workspace),
        Ok(pb::Scope::Organization) => Some(Scope::Organization),
        Ok(pb::Scope::Unspecified) | Err(_) => {
            violations.add(field, "is required: WORKSPACE or ORGANIZATION");
            None
        }
    }
}

/// Parses a ResolveProvider request: runtime, model, names.
pub fn resolve_request(
    message: pb::ResolveProviderRequest,
    limits: &Limits,
) -> Result<(String, String, BTreeSet<String>), Violations> {
    let pb::ResolveProviderRequest { runtime, model, credential_names } = message;
    let mut violations = Violations::default();
    violations.check_name("runtime", &runtime, limits.name_bytes);
    let model = model_within(model, format_args!("model"), limits, &mut violations);
    if credential_names.len() > limits.resolve_names {
        violations.add(
            "credential_names",
            format_args!("holds {}; the limit is {} (limits.resolve_names)", credential_names.len(), limits.resolve_names),
        );
    }
    for (index, name) in credential_names.iter().take(limits.resolve_names).enumerate() {
        violations.check_name(format_args!("credential_names[{index}]"), name, limits.name_bytes);
    }
    violations.or((runtime, model, credential_names.into_iter().collect()))
}

/// Parses a ListModels request: the runtime, or `None` for all, and whether details are wanted.
pub fn list_request(message: pb::ListModelsRequest, limits: &Limits) -> Result<(Option<String>, bool), Violations> {
    let pb::ListModelsRequest { runtime, details } = message;
    let mut violations = Violations::default();
    violations.check_name("runtime", &runtime, limits.name_bytes);
    violations.or((Some(runtime).filter(|runtime| !runtime.is_empty()), details))
}

/// A Decide request as a client sends it.
pub fn to_request(request: &Request) -> pb::DecideRequest {
    let Request { spec, checkpoint, max_liveness_age, explain, report_only, caller: _ } = request;
    let scope = |scope: Scope| match scope {
        Scope::Workspace => pb::Scope::Workspace as i32,
        Scope::Organization => pb::Scope::Organization as i32,
    };
    let credential = |credential: &Credential| {
        let (value, unreadable) = match &credential.value {
            CredentialValue::Readable(secret) => (secret.expose().to_owned(), false),
            CredentialValue::Unreadable => (String::new(), true),
        };
        pb::Credential { env_name: credential.env_name.clone(), scope: scope(credential.scope), value, unreadable }
    };
    let spec = pb::WorkspaceSpec {
        workspace_id: spec.workspace_id.clone(),
        organization_id: spec.organization_id.clone(),
        runtime: spec.runtime.clone(),
        model: spec.model.clone(),
        credentials: spec.credentials.iter().map(credential).collect(),
        unreadable_scopes: spec.unreadable_scopes.iter().map(|unreadable| scope(*unreadable)).collect(),
        operator_override: match spec.operator_override {
            OperatorOverride::Derive => pb::OperatorOverride::Unspecified,
            OperatorOverride::PlatformManaged => pb::OperatorOverride::PlatformManaged,
            OperatorOverride::Byok => pb::OperatorOverride::Byok,
            OperatorOverride::Disabled => pb::OperatorOverride::Disabled,
        } as i32,
        platform_proxy: match spec.platform_proxy {
            None => pb::PlatformProxy::Unspecified,
            Some(PlatformProxy::Available) => pb::PlatformProxy::Available,
            Some(PlatformProxy::Absent) => pb::PlatformProxy::Absent,
        } as i32,
        tenant_base_url_env: spec.tenant_base_url_env.clone(),
    };
    pb::DecideRequest {
        workspace_spec: Some(spec),
        checkpoint: match checkpoint {
            Checkpoint::Create => pb::Checkpoint::Create,
            Checkpoint::Provision => pb::Checkpoint::Provision,
            Checkpoint::Update => pb::Checkpoint::Update,
            Checkpoint::Audit => pb::Checkpoint::Audit,
        } as i32,
        max_liveness_age: max_liveness_age.map(duration),
        explain: *explain,
        report_only: *report_only,
    }
}

// === out ===

/// The answer to Decide.
pub fn response(decided: Box<Decided>) -> pb::DecideResponse {
    let Decided { id, decision, registry_revision, catalogue_revision, finding: _ } = *decided;
    let Decision { outcome, resolution, liveness, warnings, trace, relevant } = decision;
    pb::DecideResponse {
        decision_id: id.to_string(),
        decision: Some(match outcome {
            Outcome::Allow(allow) => {
                pb::decide_response::Decision::Allow(pb::Allow { billing_mode: billing_mode(Some(allow.billing_mode())) })
            }
            Outcome::Deny(refused) => pb::decide_response::Decision::Deny(deny(*refused)),
        }),
        resolution: Some(self::resolution(resolution)),
        liveness: liveness.map(self::liveness),
        warnings: warnings.into_iter().map(warning).collect(),
        registry_revision: registry_revision.as_ref().into(),
        catalogue_revision: catalogue_revision.as_ref().into(),
        trace: trace.into_iter().map(|step| pb::TraceStep { step: step.step.to_owned(), detail: step.detail }).collect(),
        relevant_env: relevant.env.to_vec(),
        relevant_base_url_env: relevant.base_url_env.to_vec(),
    }
}

/// The answer to ResolveProvider.
pub fn resolve_response(result: Result<Resolved, Unresolved>, model: &str, snapshot: &Snapshot) -> pb::ResolveProviderResponse {
    let registry_revision = snapshot.registry.revision().to_owned();
    match result {
        Ok(Resolved { resolution, relevant, withdrawn }) => pb::ResolveProviderResponse {
            result: Some(pb::resolve_provider_response::Result::Resolution(self::resolution(resolution))),
            relevant_env: relevant.env.to_vec(),
            relevant_base_url_env: relevant.base_url_env.to_vec(),
            warnings: if withdrawn { vec![warning(withdrawal(model))] } else { Vec::new() },
            registry_revision,
        },
        Err(Unresolved { refusal, relevant_env }) => pb::ResolveProviderResponse {
            result: Some(pb::resolve_provider_response::Result::Deny(deny(Deny::new(*refusal, Vec::new())))),
            relevant_env: relevant_env.to_vec(),
            relevant_base_url_env: Vec::new(),
            warnings: Vec::new(),
            registry_revision,
        },
    }
}

fn withdrawal(model: &str) -> Warning {
    Warning {
        code: WarningCode::ModelWithdrawn,
        message: format!("model `{model}` is withdrawn: new workspaces cannot have it"),
        env_names: Vec::new(),
    }
}

/// The answer to ListModels for one runtime or all. Details are what a menu for people shows in addition.
pub fn models(snapshot: &Snapshot, runtime: Option<&str>, details: bool) -> pb::ListModelsResponse {
    let registry = &snapshot.registry;
    let (mut models, mut open_providers) = (Vec::new(), Vec::new());
    for (name, found) in registry.runtimes().filter(|(name, _)| runtime.is_none_or(|runtime| runtime == *name)) {
        for offer in &found.offers {
            let provider = registry.provider(offer);
            let accepted_env = || if provider.is_platform() { Vec::new() } else { provider.auth_env.to_vec() };
            let runtime_display_name = || if details { found.display_name.clone() } else { String::new() };
            if details && offer.models.is_empty() && offer.withdrawn.is_empty() {
                open_providers.push(pb::OpenProvider {
                    runtime: name.to_owned(),
                    runtime_display_name: runtime_display_name(),
                    provider: provider.name.clone(),
                    provider_display_name: provider.display_name.clone(),
                    billing_mode: billing_mode(Some(provider.billing_mode())),
                    accepted_env: accepted_env(),
                    model_pattern: provider.pattern.as_str().to_owned(),
                    deprecated: provider.deprecated,
                });
            }
            let withdrawn_only = offer.withdrawn.iter().filter(|model| !offer.models.contains(model));
            for model in offer.models.iter().chain(withdrawn_only) {
                models.push(pb::OfferedModel {
                    runtime: name.to_owned(),
                    model: model.clone(),
                    provider: provider.name.clone(),
                    provider_display_name: provider.display_name.clone(),
                    billing_mode: billing_mode(Some(provider.billing_mode())),
                    accepted_env: accepted_env(),
                    withdrawn: offer.has_withdrawn(model),
                    runtime_display_name: runtime_display_name(),
                    deprecated: details && provider.deprecated,
                });
            }
        }
    }
    pb::ListModelsResponse { models, registry_revision: registry.revision().to_owned(), open_providers }
}

/// The answer to GetRegistryStatus.
pub fn status(snapshot: &Snapshot, now: SystemTime) -> pb::GetRegistryStatusResponse {
    let Snapshot { registry, catalogue, registry_origin, catalogue_origin, configuration_origin, .. } = snapshot;
    let source = |revision: &str, origin: &Origin| pb::SourceStatus {
        revision: revision.to_owned(),
        source: origin.source.clone(),
        loaded_at: Some(origin.loaded_at.into()),
        age: Some(duration(now.duration_since(origin.loaded_at).unwrap_or_default())),
        last_reload_error: origin.last_reload_error.clone(),
        sha256: String::new(),
    };
    let count = |number: usize| u32::try_from(number).unwrap_or(u32::MAX);
    pb::GetRegistryStatusResponse {
        registry: Some(pb::SourceStatus { sha256: registry.sha256().to_owned(), ..source(registry.revision(), registry_origin) }),
        catalogue: Some(source(catalogue.revision(), catalogue_origin)),
        provider_count: count(registry.providers().len()),
        runtime_count: count(registry.runtimes().count()),
        model_count: count(registry.runtimes().flat_map(|(_, runtime)| &runtime.offers).map(|offer| offer.models.len()).sum()),
        host_count: count(catalogue.host_count()),
        credential_names: snapshot.credential_names().iter().cloned().collect(),
        configuration: Some(source("", configuration_origin)),
        restart_needed: snapshot.restart_needed.clone(),
    }
}

fn deny(deny: Deny) -> pb::Deny {
    let Deny { refusal, message, remedy, operator_hint, alternative_models } = deny;
    pb::Deny {
        code: deny_code(refusal.code()),
        message,
        remedy,
        missing_env: refusal.missing_env().to_vec(),
        alternative_models,
        retryable: refusal.retryable(),
        retry_after: refusal.retry_after().map(duration),
        operator_hint,
    }
}

fn resolution(resolution: Resolution) -> pb::Resolution {
    let Resolution { provider, billing_mode, source, matched_by, accepted_env, credential } = resolution;
    let credential_reason = credential.as_ref().map_or_else(String::new, |judged| judged.chosen_because.text());
    let (credential_env, scope, shadows_organization, credential_fingerprint) = match credential {
        Some(judged) => (judged.env_name, Some(judged.scope), judged.shadows_organization, judged.fingerprint),
        None => (String::new(), None, false, String::new()),
    };
    pb::Resolution {
        provider,
        billing_mode: self::billing_mode(billing_mode),
        source: match source {
            Source::Derived => pb::ResolutionSource::Derived,
            Source::OperatorOverride => pb::ResolutionSource::OperatorOverride,
            Source::ExemptRuntime => pb::ResolutionSource::ExemptRuntime,
        } as i32,
        matched_by: match matched_by {
            None => pb::MatchedBy::Unspecified,
            Some(MatchedBy::ExactModel) => pb::MatchedBy::ExactModel,
            Some(MatchedBy::ExactModelAndCredential) => pb::MatchedBy::ExactModelAndCredential,
            Some(MatchedBy::FirstDeclared) => pb::MatchedBy::FirstDeclared,
            Some(MatchedBy::Prefix) => pb::MatchedBy::Prefix,
            Some(MatchedBy::PrefixAndCredential) => pb::MatchedBy::PrefixAndCredential,
        } as i32,
        accepted_env: accepted_env.to_vec(),
        credential_env,
        credential_scope: match scope {
            None => pb::Scope::Unspecified,
            Some(Scope::Workspace) => pb::Scope::Workspace,
            Some(Scope::Organization) => pb::Scope::Organization,
        } as i32,
        shadows_organization,
        credential_fingerprint,
        credential_reason,
    }
}

fn liveness(liveness: Liveness) -> pb::Liveness {
    let Liveness { verdict, upstream_status, endpoint_host, probe, header, cause, seen } = liveness;
    pb::Liveness {
        verdict: self::verdict(verdict),
        upstream_status: upstream_status.map_or(0, u32::from),
        endpoint_host,
        probe,
        observed_at: seen.map(|seen| seen.observed_at.into()),
        age: seen.map(|seen| duration(seen.age)),
        served_from: match seen {
            None => pb::ServedFrom::Unspecified,
            Some(Seen { served_from: ServedFrom::Probe, .. }) => pb::ServedFrom::Probe,
            Some(Seen { served_from: ServedFrom::Cache, .. }) => pb::ServedFrom::Cache,
            Some(Seen { served_from: ServedFrom::Stale, .. }) => pb::ServedFrom::Stale,
            Some(Seen { served_from: ServedFrom::Breaker, .. }) => pb::ServedFrom::Breaker,
        } as i32,
        header: header.map_or_else(String::new, |header| header.as_str().to_owned()),
        cause: cause.map_or_else(String::new, |cause| cause.as_str().to_owned()),
    }
}

fn warning(warning: Warning) -> pb::Warning {
    let Warning { code, message, env_names } = warning;
    let code = match code {
        WarningCode::OperatorOverride => pb::WarningCode::OperatorOverride,
        WarningCode::ExemptRuntime => pb::WarningCode::ExemptRuntime,
        WarningCode::ModelWithdrawn => pb::WarningCode::ModelWithdrawn,
        WarningCode::UnknownCredentialName => pb::WarningCode::UnknownCredentialName,
        WarningCode::ConflictingCredential => pb::WarningCode::ConflictingCredential,
        WarningCode::CredentialUnverified => pb::WarningCode::CredentialUnverified,
        WarningCode::StaleLiveness => pb::WarningCode::StaleLiveness,
        WarningCode::ReportOnly => pb::WarningCode::ReportOnly,
        WarningCode::UnreadableCredentials => pb::WarningCode::UnreadableCredentials,
        WarningCode::ExposedCredential => pb::WarningCode::ExposedCredential,
        WarningCode::UnusedCredential => pb::WarningCode::UnusedCredential,
        WarningCode::WrongHeader => pb::WarningCode::WrongHeader,
        WarningCode::TrimmedCredential => pb::WarningCode::TrimmedCredential,
        WarningCode::UnknownBaseUrlName => pb::WarningCode::UnknownBaseUrlName,
    };
    pb::Warning { code: code as i32, message, env_names }
}

fn billing_mode(mode: Option<BillingMode>) -> i32 {
    match mode {
        None => pb::BillingMode::Unspecified as i32,
        Some(BillingMode::PlatformManaged) => pb::BillingMode::PlatformManaged as i32,
        Some(BillingMode::Byok) => pb::BillingMode::Byok as i32,
        Some(BillingMode::None) => pb::BillingMode::None as i32,
    }
}

fn verdict(verdict: Verdict) -> i32 {
    (match verdict {
        Verdict::Valid => pb::Verdict::Valid,
        Verdict::Invalid => pb::Verdict::Invalid,
        Verdict::Forbidden => pb::Verdict::Forbidden,
        Verdict::QuotaExhausted => pb::Verdict::QuotaExhausted,
        Verdict::RateLimited => pb::Verdict::RateLimited,
        Verdict::ProviderError => pb::Verdict::ProviderError,
        Verdict::UnexpectedResponse => pb::Verdict::UnexpectedResponse,
        Verdict::Timeout => pb::Verdict::Timeout,
        Verdict::Unreachable => pb::Verdict::Unreachable,
        Verdict::NotAttempted => pb::Verdict::NotAttempted,
        Verdict::NoServerSurface => pb::Verdict::NoServerSurface,
        Verdict::NotCalibrated => pb::Verdict::NotCalibrated,
        Verdict::ProbeDisabled => pb::Verdict::ProbeDisabled,
    }) as i32
}

fn deny_code(code: DenyCode) -> i32 {
    (match code {
        DenyCode::RuntimeRequired => pb::DenyCode::RuntimeRequired,
        DenyCode::RuntimeUnsupported => pb::DenyCode::RuntimeUnsupported,
        DenyCode::ModelRequired => pb::DenyCode::ModelRequired,
        DenyCode::UnregisteredModelForRuntime => pb::DenyCode::UnregisteredModelForRuntime,
        DenyCode::AmbiguousProvider => pb::DenyCode::AmbiguousProvider,
        DenyCode::DerivedProviderNotInRegistry => pb::DenyCode::DerivedProviderNotInRegistry,
        DenyCode::ModelWithdrawn => pb::DenyCode::ModelWithdrawn,
        DenyCode::CredentialScopeUnreadable => pb::DenyCode::CredentialScopeUnreadable,
        DenyCode::MissingPlatformProxy => pb::DenyCode::MissingPlatformProxy,
        DenyCode::ProviderNotByok => pb::DenyCode::ProviderNotByok,
        DenyCode::OverrideNotAllowed => pb::DenyCode::OverrideNotAllowed,
        DenyCode::OverrideConflictsWithModel => pb::DenyCode::OverrideConflictsWithModel,
        DenyCode::MissingByokCredential => pb::DenyCode::MissingByokCredential,
        DenyCode::MalformedByokCredential => pb::DenyCode::MalformedByokCredential,
        DenyCode::InvalidByokCredential => pb::DenyCode::InvalidByokCredential,
        DenyCode::ByokProbeTimeout => pb::DenyCode::ByokProbeTimeout,
        DenyCode::ByokProviderUnreachable => pb::DenyCode::ByokProviderUnreachable,
        DenyCode::ByokProbeNotAttempted => pb::DenyCode::ByokProbeNotAttempted,
        DenyCode::ByokProviderRateLimited => pb::DenyCode::ByokProviderRateLimited,
        DenyCode::ByokProviderError => pb::DenyCode::ByokProviderError,
        DenyCode::ByokUnexpectedResponse => pb::DenyCode::ByokUnexpectedResponse,
        DenyCode::ByokQuotaExhausted => pb::DenyCode::ByokQuotaExhausted,
        DenyCode::ByokNotVerifiable => pb::DenyCode::ByokNotVerifiable,
        DenyCode::ShadowedByokCredential => pb::DenyCode::ShadowedByokCredential,
        DenyCode::WrongCredentialName => pb::DenyCode::WrongCredentialName,
        DenyCode::ExposedCredential => pb::DenyCode::ExposedCredential,
    }) as i32
}

fn duration(duration: Duration) -> prost_types::Duration {
    // A longer duration becomes the message's maximum of 10,000 years.
    duration.try_into().unwrap_or(prost_types::Duration { seconds: 315_576_000_000, nanos: 0 })
}

// === printing without the value ===

impl fmt::Debug for pb::Credential {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { env_name, scope, value: _, unreadable } = self;
        f.debug_struct("Credential")
            .field("env_name", env_name)
            .field("scope", scope)
            .field("value", &format_args!(".."))
            .field("unreadable", unreadable)
            .finish()
    }
}

impl fmt::Debug for pb::WorkspaceSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { workspace_id, runtime, model, credentials, .. } = self;
        f.debug_struct("WorkspaceSpec")
            .field("workspace_id", workspace_id)
            .field("runtime", runtime)
            .field("model", model)
            .field("credentials", credentials)
            .finish_non_exhaustive()
    }
}

impl fmt::Debug for pb::DecideRequest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { workspace_spec, checkpoint, .. } = self;
        f.debug_struct("DecideRequest")
            .field("workspace_spec", workspace_spec)
            .field("checkpoint", checkpoint)
            .finish_non_exhaustive()
    }
}

impl fmt::Debug for pb::BatchDecideRequest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BatchDecideRequest").field("requests", &self.requests.len()).finish()
    }
}

#[cfg(test)]
mod tests {
    use strum::VariantArray;

    use super::*;

    const CANARY: &str = "made-up-canary-value";

    fn message() -> pb::DecideRequest {
        pb::DecideRequest {
            workspace_spec: Some(pb::WorkspaceSpec {
                workspace_id: "ws-1".into(),
                organization_id: "org-1".into(),
                runtime: "claude-code".into(),
                model: "sonnet".into(),
                credentials: vec![pb::Credential {
                    env_name: "ANTHROPIC_API_KEY".into(),
                    scope: pb::Scope::Organization as i32,
                    value: CANARY.into(),
                    unreadable: false,
                }],
                unreadable_scopes: vec![pb::Scope::Workspace as i32],
                operator_override: pb::OperatorOverride::Byok as i32,
                platform_proxy: pb::PlatformProxy::Absent as i32,
                tenant_base_url_env: vec!["OPENAI_BASE_URL".into()],
            }),
            checkpoint: pb::Checkpoint::Update as i32,
            max_liveness_age: Some(prost_types::Duration { seconds: 1, nanos: 5 }),
            explain: true,
            report_only: true,
        }
    }

    #[test]
    fn no_message_prints_a_credential() {
        let message = message();
        let spec = message.workspace_spec.clone().unwrap();
        let batch = pb::BatchDecideRequest { requests: vec![message.clone()] };
        let printed = format!("{:?} {:#?} {spec:?} {message:?} {batch:?}", spec.credentials, spec.credentials);
        assert!(printed.contains("ANTHROPIC_API_KEY") && !printed.contains("canary"), "{printed}");
        assert!(!format!("{:?}", request(message)).contains("canary"));
    }

    #[test]
    fn a_request_survives_the_way_there_and_back() {
        let parsed = request(message()).unwrap();
        assert_eq!(to_request(&parsed), message());
    }

    #[track_caller]
    fn violates(change: impl FnOnce(&mut pb::DecideRequest), expect: &[&str]) {
        let mut message = message();
        change(&mut message);
        let fields: Vec<String> = request(message).unwrap_err().0.into_iter().map(|(field, _)| field).collect();
        assert_eq!(fields, expect);
    }

    fn with_spec(change: impl FnOnce(&mut pb::WorkspaceSpec)) -> impl FnOnce(&mut pb::DecideRequest) {
        move |message| change(message.workspace_spec.as_mut().unwrap())
    }

    #[test]
    fn bad_input_names_its_field() {
        violates(|message| *message = pb::DecideRequest::default(), &["checkpoint", "workspace_spec"]);
        violates(|message| message.checkpoint = 7, &["checkpoint"]);
        for (seconds, nanos) in [
            (-1, 0),
            (0, -1),
            (1, -1),
            (-1, 1),
            (0, 1_000_000_000),
            (315_576_000_001, 0),
            (i64::MIN, 0),
            (i64::MIN, i32::MIN),
            (i64::MAX, 0),
        ] {
            violates(|message| message.max_liveness_age = Some(prost_types::Duration { seconds, nanos }), &["max_liveness_age"]);
        }
        violates(with_spec(|spec| spec.runtime = "a\nb".into()), &["workspace_spec.runtime"]);
        violates(with_spec(|spec| spec.workspace_id = "w".repeat(129)), &["workspace_spec.workspace_id"]);
        violates(with_spec(|spec| spec.model = "m".repeat(513)), &["workspace_spec.model"]);
        violates(with_spec(|spec| spec.operator_override = 9), &["workspace_spec.operator_override"]);
        violates(with_spec(|spec| spec.platform_proxy = 9), &["workspace_spec.platform_proxy"]);
        violates(
            with_spec(|spec| spec.unreadable_scopes = vec![0, 3]),
            &["workspace_spec.unreadable_scopes[0]", "workspace_spec.unreadable_scopes[1]"],
        );
        violates(with_spec(|spec| spec.unreadable_scopes = vec![1; 17]), &["workspace_spec.unreadable_scopes"]);
        violates(with_spec(|spec| spec.model = format!("m{}", " ".repeat(512))), &["workspace_spec.model"]);
        violates(with_spec(|spec| spec.credentials[0].scope = 0), &["workspace_spec.credentials[0].scope"]);
        violates(with_spec(|spec| spec.credentials[0].unreadable = true), &["workspace_spec.credentials[0].value"]);
        violates(with_spec(|spec| spec.credentials[0].value = "v".repeat(65 * 1024)), &["workspace_spec.credentials[0].value"]);
        violates(
            with_spec(|spec| spec.credentials.push(spec.credentials[0].clone())),
            &["workspace_spec.credentials[1].env_name"],
        );
        violates(with_spec(|spec| spec.tenant_base_url_env = vec![String::new()]), &["workspace_spec.tenant_base_url_env[0]"]);
        violates(
            with_spec(|spec| spec.credentials = vec![spec.credentials[0].clone(); 65]),
            &std::iter::once("workspace_spec.credentials".to_owned())
                .chain((1..64).map(|index| format!("workspace_spec.credentials[{index}].env_name")))
                .collect::<Vec<_>>()
                .iter()
                .map(String::as_str)
                .collect::<Vec<_>>(),
        );
    }

    #[test]
    fn every_code_verdict_and_warning_keeps_its_name_on_the_wire() {
        for &code in DenyCode::VARIANTS {
            assert_eq!(pb::DenyCode::try_from(deny_code(code)).unwrap().as_str_name(), format!("DENY_CODE_{code}"));
        }
        for &found in Verdict::VARIANTS {
            assert_eq!(pb::Verdict::try_from(verdict(found)).unwrap().as_str_name(), format!("VERDICT_{found}"));
        }
        for &code in WarningCode::VARIANTS {
            let message = warning(Warning { code, message: String::new(), env_names: vec![] });
            assert_eq!(pb::WarningCode::try_from(message.code).unwrap().as_str_name(), format!("WARNING_CODE_{code}"));
        }
        for &mode in BillingMode::VARIANTS {
            assert_eq!(
                pb::BillingMode::try_from(billing_mode(Some(mode))).unwrap().as_str_name(),
                format!("BILLING_MODE_{mode}")
            );
        }
    }
}
