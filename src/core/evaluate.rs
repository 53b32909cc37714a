//! The order of a decision, up to the point where the provider has to be asked. Pure.

use std::{collections::BTreeSet, sync::Arc};

use crate::{
    core::{
        credential::{CredentialStep, LivenessQueries},
        credentials::{CredentialSet, Lookup},
        derive::{Derived, Underivable, derive, derive_on},
        evaluation_log::EvaluationLog,
        policy::{Facts, Flow},
        registry::{Auth, Provider, Registry, Runtime},
        snapshot::Snapshot,
    },
    domain::{
        decision::{RelevantNames, Resolution},
        denial::{Refusal, listed},
        request::{CalledBy, Checkpoint, OperatorOverride, PlatformProxy, Request, WorkspaceSpec},
        secret::Secret,
        similar::most_similar,
        verdict::{BillingMode, MatchedBy, Source, WarningCode},
    },
};

/// How many of a runtime's models a denial names.
const MAX_OFFERED: usize = 12;
/// A model less similar than this is not suggested as the one that was meant.
const MIN_SIMILARITY: f64 = 0.8;

/// The state of a decision when evaluation ends.
#[derive(Debug)]
pub struct Evaluation<'a> {
    /// What the engine has to do next.
    pub next: Next<'a>,
    /// What was recorded on the way.
    pub log: EvaluationLog,
}

/// What the engine has to do next.
#[derive(Debug)]
pub enum Next<'a> {
    /// Everything is known: apply the policy.
    Rule(Facts),
    /// Ask the provider.
    Ask(Box<LivenessQueries<'a>>),
}

/// Evaluates a request at this second of Unix time. `fingerprint` makes a short name by which a person recognises a key.
pub fn evaluate<'a>(
    snapshot: &'a Snapshot,
    request: &'a Request,
    now: i64,
    fingerprint: &dyn Fn(&Secret) -> String,
) -> Evaluation<'a> {
    let Request { spec, checkpoint, explain, caller, max_liveness_age: _, report_only: _ } = request;
    let mut log = EvaluationLog::new(*explain);
    let proxy = proxy_of(snapshot, spec);
    let evaluator = Evaluator { snapshot, spec, checkpoint: *checkpoint, proxy, caller, now, fingerprint };
    let next = evaluator.run(&mut log).unwrap_or_else(Next::Rule);
    Evaluation { next, log }
}

/// The models that the runtime offers without a key, for a workspace that is denied.
pub fn alternative_models(snapshot: &Snapshot, spec: &WorkspaceSpec) -> Vec<String> {
    match (proxy_of(snapshot, spec), snapshot.registry.runtime(&spec.runtime)) {
        (PlatformProxy::Available, Some(runtime)) => snapshot.registry.keyless_models(runtime),
        (PlatformProxy::Available | PlatformProxy::Absent, _) => Vec::new(),
    }
}

fn proxy_of(snapshot: &Snapshot, spec: &WorkspaceSpec) -> PlatformProxy {
    spec.platform_proxy.unwrap_or(snapshot.policy.platform_proxy)
}

/// The owner of a model by credential names alone, for `ResolveProvider`.
pub fn resolve(snapshot: &Snapshot, runtime: &str, model: &str, available: &BTreeSet<String>) -> Result<Resolved, Unresolved> {
    let mut resolution = Resolution::empty();
    if is_exempt(snapshot, runtime) {
        resolution.billing_mode = Some(BillingMode::None);
        resolution.source = Source::ExemptRuntime;
        return Ok(Resolved { resolution, relevant: RelevantNames::default(), withdrawn: false });
    }
    let registry = &snapshot.registry;
    let found = known_runtime(registry, runtime)?;
    let model = known_model(runtime, model)?;
    // A refusal has these names too: if one of them were available, the model might have an owner, or another owner.
    let relevant_env = snapshot.relevant_names(found, model);
    let derived = match derive(registry, runtime, model, &|name| available.contains(name)) {
        Ok(derived) => derived,
        Err(underivable) => return Err(Unresolved { refusal: refusal_of(underivable, runtime, model, registry), relevant_env }),
    };
    if derived.provider.auth == Auth::Ambient {
        let only = matches!(derived.matched_by, MatchedBy::ExactModel | MatchedBy::Prefix);
        let relevant_env = if only { Arc::default() } else { relevant_env };
        return Err(Unresolved { refusal: Box::new(not_byok(derived.provider, model)), relevant_env });
    }
    record_owner(&mut resolution, derived.provider, derived.matched_by);
    let base_url_env = Arc::clone(&snapshot.offer_use(derived.offer).base_url_env);
    let relevant = RelevantNames { env: relevant_env, base_url_env };
    Ok(Resolved { resolution, relevant, withdrawn: derived.offer.has_withdrawn(model) })
}

/// The owner of a model, and the names that a caller should fetch before it asks for a decision.
#[derive(Debug)]
pub struct Resolved {
    /// The owner.
    pub resolution: Resolution,
    /// The names that matter to the decision.
    pub relevant: RelevantNames,
    /// New workspaces cannot have this model.
    pub withdrawn: bool,
}

/// Why a model has no owner, or none that a workspace could start with.
#[derive(Debug)]
pub struct Unresolved {
    /// The reason.
    pub refusal: Box<Refusal>,
    /// Every credential name that could change it.
    pub relevant_env: Arc<[String]>,
}

impl From<Box<Refusal>> for Unresolved {
    /// For a refusal that no credential can change.
    fn from(refusal: Box<Refusal>) -> Self {
        Self { refusal, relevant_env: Arc::default() }
    }
}

// === evaluator ===

struct Evaluator<'a, 'f> {
    snapshot: &'a Snapshot,
    spec: &'a WorkspaceSpec,
    checkpoint: Checkpoint,
    proxy: PlatformProxy,
    caller: &'a CalledBy,
    now: i64,
    fingerprint: &'f dyn Fn(&Secret) -> String,
}

impl<'a> Evaluator<'a, '_> {
    fn run(&self, log: &mut EvaluationLog) -> Flow<Next<'a>> {
        self.check_override(log)?;
        let runtime = self.runtime(log)?;
        let model = known_model(&self.spec.runtime, &self.spec.model).map_err(Facts::Refused)?;
        log.trace.step("model", || format!("`{model}`"));
        if self.spec.operator_override == OperatorOverride::PlatformManaged {
            log.resolution.billing_mode = Some(BillingMode::PlatformManaged);
            return Err(Facts::Platform { by_override: true, proxy: self.proxy, model: model.to_owned() });
        }
        let (credentials, dropped) = CredentialSet::of(self.spec, &|name| self.snapshot.is_credential_name(name));
        if !dropped.is_empty() {
            let message = format!("nothing reads a credential named {}; it was left out", listed(&dropped));
            log.warn(WarningCode::UnknownCredentialName, message, dropped);
        }
        let derived = self.owner(&credentials, runtime, model, log)?;
        self.check_withdrawn(&derived, model, log)?;
        let provider = derived.provider;
        log.relevant.base_url_env = Arc::clone(&self.snapshot.offer_use(derived.offer).base_url_env);
        self.check_base_url_names(log);
        if provider.is_platform() {
            return Err(self.platform(model));
        }
        if provider.auth == Auth::Ambient {
            return Err(Facts::refused(not_byok(provider, model)));
        }
        let step = CredentialStep {
            snapshot: self.snapshot,
            spec: self.spec,
            runtime,
            enforcement: self.snapshot.policy.enforcement(&provider.name, self.now),
            derived,
            model,
            checkpoint: self.checkpoint,
            caller: self.caller,
            fingerprint: self.fingerprint,
        };
        step.run(&credentials, log).map(Next::Ask)
    }

    /// Warns about base-URL variables that no runtime reads. They change nothing.
    fn check_base_url_names(&self, log: &mut EvaluationLog) {
        let is_known = |name: &str| {
            let catalogue = &self.snapshot.catalogue;
            catalogue.concerned_by(name).is_some() || catalogue.runtimes.reads_base_url(name)
        };
        let unknown: Vec<String> = self.spec.tenant_base_url_env.iter().filter(|name| !is_known(name)).cloned().collect();
        if !unknown.is_empty() {
            let message = format!("no runtime reads a base URL from {}; it changes nothing", listed(&unknown));
            log.warn(WarningCode::UnknownBaseUrlName, message, unknown);
        }
    }

    fn check_override(&self, log: &mut EvaluationLog) -> Flow<()> {
        let word = match self.spec.operator_override {
            OperatorOverride::Derive => return Ok(()),
            OperatorOverride::PlatformManaged => "PLATFORM_MANAGED",
            OperatorOverride::Byok => "BYOK",
            OperatorOverride::Disabled => "DISABLED",
        };
        log.resolution.source = Source::OperatorOverride;
        let honoured = self.snapshot.policy.honour_overrides;
        log.trace.step("override", || format!("{word}, {}", if honoured { "honoured" } else { "refused by configuration" }));
        log.warn(WarningCode::OperatorOverride, format!("an operator override of {word} was given"), Vec::new());
        match (honoured, self.spec.operator_override) {
            (false, _) => Err(Facts::refused(Refusal::OverrideNotAllowed)),
            (true, OperatorOverride::Disabled) => {
                log.resolution.billing_mode = Some(BillingMode::None);
                Err(Facts::OverrideDisabled)
            }
            (true, OperatorOverride::Derive | OperatorOverride::PlatformManaged | OperatorOverride::Byok) => Ok(()),
        }
    }

    fn runtime(&self, log: &mut EvaluationLog) -> Flow<&'a Runtime> {
        let name = self.spec.runtime.as_str();
        if is_exempt(self.snapshot, name) {
            log.trace.step("runtime", || format!("`{name}` is exempt by configuration"));
            log.warn(WarningCode::ExemptRuntime, format!("runtime `{name}` is exempt: nothing was checked"), Vec::new());
            log.resolution.billing_mode = Some(BillingMode::None);
            if log.resolution.source == Source::Derived {
                log.resolution.source = Source::ExemptRuntime;
            }
            return Err(Facts::ExemptRuntime);
        }
        let runtime = known_runtime(&self.snapshot.registry, name).map_err(Facts::Refused)?;
        log.trace.step("runtime", || format!("`{name}` has {} providers", runtime.offers.len()));
        Ok(runtime)
    }

    /// The owner by the readable names, if no unreadable name could change it.
    ///
    /// Unreadable names are tried one at a time, and that is enough. More available names can only add candidates that accept one, and any outcome
    /// but the default needs exactly one such candidate. So whatever several names change together, one of them already changes alone.
    fn owner(
        &self,
        credentials: &CredentialSet<'_>,
        runtime: &'a Runtime,
        model: &str,
        log: &mut EvaluationLog,
    ) -> Flow<Derived<'a>> {
        let registry = &*self.snapshot.registry;
        let name = self.spec.runtime.as_str();
        let derived = derive_on(registry, runtime, model, &|name| credentials.has(name));
        log.relevant.env = match &derived {
            // Only this provider lists the model.
            Ok(Derived { offer, matched_by: MatchedBy::ExactModel, .. }) => self.snapshot.names_of(offer),
            Ok(_) | Err(_) => self.snapshot.relevant_names(runtime, model),
        };
        if credentials.has_unreadable() {
            let owner =
                |result: &Result<Derived<'a>, Underivable>| result.as_ref().ok().map(|derived| derived.provider.name.clone());
            let changing: Vec<String> = log
                .relevant
                .env
                .iter()
                .filter(|unknown| matches!(credentials.lookup(unknown), Lookup::Unknown))
                .filter(|unknown| {
                    owner(&derive_on(registry, runtime, model, &|name| name == unknown.as_str() || credentials.has(name)))
                        != owner(&derived)
                })
                .cloned()
                .collect();
            if !changing.is_empty() {
                log.trace.step("derive", || format!("{} could not be read and could change the owner", listed(&changing)));
                let scopes = credentials.unreadable_scopes(&changing);
                return Err(Facts::refused(Refusal::CredentialsUnreadable { names: changing, scopes, changes_owner: true }));
            }
        }
        let derived = derived.map_err(|underivable| Facts::Refused(refusal_of(underivable, name, model, registry)))?;
        record_owner(&mut log.resolution, derived.provider, derived.matched_by);
        log.trace.step("derive", || format!("provider `{}` by {}", derived.provider.name, derived.matched_by));
        Ok(derived)
    }

    fn check_withdrawn(&self, derived: &Derived<'_>, model: &str, log: &mut EvaluationLog) -> Flow<()> {
        if !derived.offer.has_withdrawn(model) {
            return Ok(());
        }
        log.trace.step("model", || "withdrawn".into());
        match self.checkpoint {
            Checkpoint::Create | Checkpoint::Update => Err(Facts::refused(Refusal::ModelWithdrawn {
                runtime: self.spec.runtime.clone(),
                model: model.to_owned(),
                provider: derived.provider.name.clone(),
            })),
            Checkpoint::Provision | Checkpoint::Audit => {
                let message = format!("model `{model}` is withdrawn; this workspace keeps it, new ones cannot have it");
                log.warn(WarningCode::ModelWithdrawn, message, Vec::new());
                Ok(())
            }
        }
    }

    fn platform(&self, model: &str) -> Facts {
        let model = model.to_owned();
        if self.spec.operator_override == OperatorOverride::Byok {
            Facts::refused(Refusal::OverrideConflictsWithModel { model })
        } else {
            Facts::Platform { by_override: false, proxy: self.proxy, model }
        }
    }
}

/// Whether the runtime is on the list of exemptions. A workspace without a runtime never is.
fn is_exempt(snapshot: &Snapshot, runtime: &str) -> bool {
    !runtime.is_empty() && snapshot.policy.exempt_runtimes.contains(runtime)
}

fn known_runtime<'r>(registry: &'r Registry, name: &str) -> Result<&'r Runtime, Box<Refusal>> {
    if name.is_empty() {
        return Err(Box::new(Refusal::RuntimeRequired));
    }
    registry.runtime(name).ok_or_else(|| Box::new(unsupported(registry, name)))
}

fn unsupported(registry: &Registry, name: &str) -> Refusal {
    Refusal::RuntimeUnsupported {
        runtime: name.to_owned(),
        known: registry.runtimes().map(|(name, _)| name.to_owned()).collect(),
    }
}

fn known_model<'m>(runtime: &str, model: &'m str) -> Result<&'m str, Box<Refusal>> {
    match model.trim() {
        "" => Err(Box::new(Refusal::ModelRequired { runtime: runtime.to_owned() })),
        model => Ok(model),
    }
}

fn not_byok(provider: &Provider, model: &str) -> Refusal {
    Refusal::ProviderNotByok { provider: provider.name.clone(), model: model.to_owned() }
}

fn refusal_of(underivable: Underivable, runtime: &str, model: &str, registry: &Registry) -> Box<Refusal> {
    let (runtime, model) = (runtime.to_owned(), model.to_owned());
    Box::new(match underivable {
        Underivable::ModelRequired => Refusal::ModelRequired { runtime },
        Underivable::UnknownRuntime => unsupported(registry, &runtime),
        Underivable::Unregistered => {
            let offered = registry.runtime(&runtime).map(|found| offered(registry, found)).unwrap_or_default();
            let nearest = nearest(&model, offered.iter().map(String::as_str)).map(str::to_owned);
            Refusal::UnregisteredModel { runtime, model, nearest, offered: offered.into_iter().take(MAX_OFFERED).collect() }
        }
        Underivable::Ambiguous { candidates } => Refusal::AmbiguousProvider { runtime, model, candidates },
    })
}

/// The model whose id is most similar to this one, if any is similar enough.
fn nearest<'m>(model: &str, models: impl Iterator<Item = &'m str>) -> Option<&'m str> {
    let nearest = most_similar(models, |known| strsim::jaro_winkler(model, known));
    nearest.filter(|(_, likeness)| *likeness >= MIN_SIMILARITY).map(|(known, _)| known)
}

/// The models that a runtime offers to new workspaces.
fn offered(registry: &Registry, runtime: &Runtime) -> Vec<String> {
    let mut models: Vec<String> = Vec::new();
    for offer in runtime.offers.iter().filter(|offer| registry.provider(offer).auth != Auth::Ambient) {
        for model in offer.models.iter().filter(|model| !offer.has_withdrawn(model)) {
            if !models.contains(model) {
                models.push(model.clone());
            }
        }
    }
    models
}

fn record_owner(resolution: &mut Resolution, provider: &Provider, matched_by: MatchedBy) {
    resolution.provider = provider.name.as_str().into();
    resolution.matched_by = Some(matched_by);
    // A provider with ambient identity takes no tenant credential, so no name is accepted and there is nobody to bill.
    if provider.auth != Auth::Ambient {
        resolution.billing_mode = Some(provider.billing_mode());
    }
    if provider.auth != Auth::Ambient && !provider.is_platform() {
        resolution.accepted_env = Arc::clone(&provider.auth_env);
    }
}
