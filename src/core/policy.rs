//! Turns facts into a ruling. Total and synchronous, without a clock. No other code can allow a workspace.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use crate::domain::{
    decision::{Allow, Deny, Grounds, Outcome, Warning},
    denial::{LivenessEvidence, Refusal},
    request::{Checkpoint, PlatformProxy},
    verdict::{ServedFrom, Verdict, WarningCode, Withheld},
};

/// Verdicts that one setting rules on, per checkpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Group {
    /// FORBIDDEN.
    Forbidden,
    /// TIMEOUT, UNREACHABLE, NOT_ATTEMPTED.
    Unanswered,
    /// RATE_LIMITED, PROVIDER_ERROR, UNEXPECTED_RESPONSE, QUOTA_EXHAUSTED.
    Inconclusive,
    /// NO_SERVER_SURFACE, NOT_CALIBRATED, PROBE_DISABLED.
    Unverifiable,
    /// NO_SERVER_SURFACE, because the workspace calls a base URL of the tenant's own.
    TenantEndpoint,
    /// A credential that is also sent to a vendor that is not its own.
    Exposure,
}

/// The ruling on a group.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Action {
    /// Allow with a warning.
    Allow,
    /// Allow with a warning if the credential was VALID within the hard maximum age; deny otherwise.
    AllowIfRecentlyValid,
    /// Deny.
    Deny,
}

/// How seriously a provider's verdicts are taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Enforcement {
    /// The policy decides.
    Enforce,
    /// A credential is judged and the verdict is shown, but no workspace is denied for it.
    Report,
    /// The provider is not asked.
    Off,
}

/// Another enforcement for one provider, until a given time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Exception {
    /// The enforcement until then.
    pub enforcement: Enforcement,
    /// The second of Unix time from which `Enforce` holds again.
    pub until: i64,
}

/// The rulings on all groups at one checkpoint, as the settings have them.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Actions {
    /// FORBIDDEN.
    pub forbidden: Action,
    /// TIMEOUT, UNREACHABLE, NOT_ATTEMPTED.
    pub unanswered: Action,
    /// RATE_LIMITED, PROVIDER_ERROR, UNEXPECTED_RESPONSE, QUOTA_EXHAUSTED.
    pub inconclusive: Action,
    /// NO_SERVER_SURFACE, NOT_CALIBRATED, PROBE_DISABLED.
    pub unverifiable: Action,
    /// NO_SERVER_SURFACE, because the workspace calls a base URL of the tenant's own.
    pub tenant_endpoint: Action,
    /// A credential that is also sent to a vendor that is not its own: allow with a warning, or deny.
    pub exposure: Action,
}

/// The rulings at each checkpoint that has its own. AUDIT uses those of PROVISION.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct CheckpointActions {
    /// CREATE.
    pub create: Actions,
    /// PROVISION.
    pub provision: Actions,
    /// UPDATE.
    pub update: Actions,
}

/// Whether an operator's override in a request counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(rename_all = "lowercase")]
pub enum Overrides {
    /// It counts.
    #[default]
    Honour,
    /// A request with an override is denied.
    Refuse,
}

/// Another enforcement for one provider, as the settings have it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ProviderException {
    /// The enforcement.
    pub probe: Enforcement,
    /// The date at which it ends, such as 2026-12-31.
    #[serde(default)]
    pub until: Option<String>,
}

/// What the operator has decided.
#[derive(Debug, Clone)]
pub struct Policy {
    actions: BTreeMap<(Checkpoint, Group), Action>,
    exceptions: BTreeMap<String, Exception>,
    /// Whether an operator's override in a request counts.
    pub honour_overrides: bool,
    /// Runtimes that are allowed without any check.
    pub exempt_runtimes: BTreeSet<String>,
    /// What an unspecified `platform_proxy` means. The default is ABSENT, so that a missing value never allows.
    pub platform_proxy: PlatformProxy,
}

/// What the policy rules on. Each variant holds all the evidence that its ruling needs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Facts {
    /// Refused before the credential was looked at, or for its shape.
    Refused(Box<Refusal>),
    /// The operator's override says that no model calls are expected.
    OverrideDisabled,
    /// The runtime is on the list of exemptions.
    ExemptRuntime,
    /// The platform would pay, by the registry or by the operator's override.
    Platform {
        /// By the override and not by the registry.
        by_override: bool,
        /// Whether the platform's proxy is available.
        proxy: PlatformProxy,
        /// The model.
        model: String,
    },
    /// The tenant's own credential is VALID.
    Valid,
    /// The credential is VALID in a header in which the workspace does not send it.
    WrongHeader {
        /// The details.
        evidence: WrongHeader,
        /// How seriously this provider's verdicts are taken.
        enforcement: Enforcement,
    },
    /// The workspace sends a value that is not VALID, instead of one that would do.
    Shadowed {
        /// The denial, if it is one.
        refusal: Box<Refusal>,
        /// The verdict on the value that is sent.
        evidence: Box<LivenessEvidence>,
        /// How seriously this provider's verdicts are taken.
        enforcement: Enforcement,
    },
    /// The tenant's own credential was judged and is not VALID.
    NotValid {
        /// The verdict with its evidence.
        evidence: Box<LivenessEvidence>,
        /// Where the verdict came from, if the provider was asked.
        served_from: Option<ServedFrom>,
        /// It was VALID within the caller's and the hard maximum age.
        recently_valid: bool,
        /// How seriously this provider's verdicts are taken.
        enforcement: Enforcement,
    },
}

/// A good key that the workspace sends in the wrong header.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WrongHeader {
    /// The variable that holds it.
    pub env_name: String,
    /// The warning's text.
    pub message: String,
    /// The denial. Set only if the runtime's facts are certain and there is a variable for the right header.
    pub refusal: Option<Box<Refusal>>,
}

/// The result of the policy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ruling {
    /// Allowed, or the refusal.
    pub outcome: Result<Allow, Box<Refusal>>,
    /// Warnings, whatever the outcome.
    pub warnings: Vec<Warning>,
    /// Allowed because of an earlier VALID, which the answer then shows.
    pub on_earlier_valid: bool,
}

// === ruling ===

/// The ruling on these facts. Every fact has its ruling, and doubt is a denial.
pub fn apply(facts: Facts, checkpoint: Checkpoint, policy: &Policy) -> Ruling {
    match facts {
        Facts::Refused(refusal) => Ruling::deny(refusal),
        Facts::OverrideDisabled => Ruling::allow(Grounds::OverrideDisabled),
        Facts::ExemptRuntime => Ruling::allow(Grounds::ExemptRuntime),
        Facts::Platform { by_override, proxy, model } => match (proxy, by_override) {
            (PlatformProxy::Absent, _) => Ruling::deny(Refusal::MissingPlatformProxy { model }),
            (PlatformProxy::Available, true) => Ruling::allow(Grounds::OverridePlatformManaged),
            (PlatformProxy::Available, false) => Ruling::allow(Grounds::PlatformOwnsModel),
        },
        Facts::Valid => Ruling::allow(Grounds::Credential(Verdict::Valid)),
        Facts::WrongHeader { evidence: WrongHeader { env_name, message, refusal }, enforcement } => {
            match refusal.filter(|_| enforcement == Enforcement::Enforce) {
                Some(refusal) => Ruling::deny(refusal),
                None => {
                    let warning = Warning { code: WarningCode::WrongHeader, message, env_names: vec![env_name] };
                    let ruling = Ruling::allow(Grounds::Credential(Verdict::Valid));
                    Ruling { warnings: vec![warning], ..ruling }
                }
            }
        }
        Facts::Shadowed { refusal, evidence: _, enforcement: Enforcement::Enforce | Enforcement::Off } => Ruling::deny(refusal),
        Facts::Shadowed { refusal: _, evidence, enforcement: Enforcement::Report } => Ruling::allow_reported(*evidence),
        Facts::NotValid { evidence, served_from: _, recently_valid, enforcement } => {
            let action = group_of(&evidence).map_or(Action::Deny, |group| policy.action(checkpoint, group));
            // Deny whatever is configured: the keys of a flood must not pass unchecked because they are too many to check.
            let starts = checkpoint != Checkpoint::Update;
            if starts && evidence.withheld == Some(Withheld::NewKeys) {
                return Ruling::deny(Refusal::Liveness(*evidence));
            }
            let denied = match action {
                Action::Deny => true,
                Action::AllowIfRecentlyValid => !recently_valid,
                Action::Allow => false,
            };
            match (denied, enforcement) {
                // A provider that is off was not asked. Its PROBE_DISABLED is ruled on by its group like any other verdict.
                (true, Enforcement::Enforce | Enforcement::Off) => Ruling::deny(Refusal::Liveness(*evidence)),
                (true, Enforcement::Report) => Ruling::allow_reported(*evidence),
                (false, _) if action == Action::AllowIfRecentlyValid => Ruling::allow_on_earlier_valid(&evidence),
                (false, _) => Ruling::allow_unverified(&evidence),
            }
        }
    }
}

/// The group that rules on a verdict. INVALID has none and is denied. VALID has none either: it is a fact of its own.
fn group_of(evidence: &LivenessEvidence) -> Option<Group> {
    match evidence.verdict {
        Verdict::Valid | Verdict::Invalid => None,
        Verdict::Forbidden => Some(Group::Forbidden),
        Verdict::Timeout | Verdict::Unreachable | Verdict::NotAttempted => Some(Group::Unanswered),
        Verdict::RateLimited | Verdict::ProviderError | Verdict::UnexpectedResponse | Verdict::QuotaExhausted => {
            Some(Group::Inconclusive)
        }
        Verdict::NoServerSurface if evidence.tenant_endpoint => Some(Group::TenantEndpoint),
        Verdict::NoServerSurface | Verdict::NotCalibrated | Verdict::ProbeDisabled => Some(Group::Unverifiable),
    }
}

/// A step of a decision. `Err` ends the evaluation early: the facts are complete.
pub(super) type Flow<T> = Result<T, Facts>;

// === impl Facts ===

impl Facts {
    pub(super) fn refused(refusal: impl Into<Box<Refusal>>) -> Self {
        Self::Refused(refusal.into())
    }
}

// === impl Policy ===

impl Default for Policy {
    fn default() -> Self {
        Self {
            actions: BTreeMap::new(),
            exceptions: BTreeMap::new(),
            honour_overrides: true,
            exempt_runtimes: BTreeSet::new(),
            platform_proxy: PlatformProxy::Absent,
        }
    }
}

impl Actions {
    /// Each group with its ruling.
    pub fn groups(&self) -> [(Group, Action); 6] {
        let Self { forbidden, unanswered, inconclusive, unverifiable, tenant_endpoint, exposure } = *self;
        [
            (Group::Forbidden, forbidden),
            (Group::Unanswered, unanswered),
            (Group::Inconclusive, inconclusive),
            (Group::Unverifiable, unverifiable),
            (Group::TenantEndpoint, tenant_endpoint),
            (Group::Exposure, exposure),
        ]
    }
}

impl CheckpointActions {
    /// Each checkpoint with its rulings.
    pub fn checkpoints(&self) -> [(Checkpoint, &Actions); 3] {
        let Self { create, provision, update } = self;
        [(Checkpoint::Create, create), (Checkpoint::Provision, provision), (Checkpoint::Update, update)]
    }
}

impl Default for CheckpointActions {
    fn default() -> Self {
        let policy = Policy::default();
        let of = |checkpoint| Actions {
            forbidden: policy.action(checkpoint, Group::Forbidden),
            unanswered: policy.action(checkpoint, Group::Unanswered),
            inconclusive: policy.action(checkpoint, Group::Inconclusive),
            unverifiable: policy.action(checkpoint, Group::Unverifiable),
            tenant_endpoint: policy.action(checkpoint, Group::TenantEndpoint),
            exposure: policy.action(checkpoint, Group::Exposure),
        };
        Self { create: of(Checkpoint::Create), provision: of(Checkpoint::Provision), update: of(Checkpoint::Update) }
    }
}

impl Policy {
    /// The ruling on a group at a checkpoint.
    pub fn action(&self, checkpoint: Checkpoint, group: Group) -> Action {
        // A running workspace is judged as at its next start.
        let checkpoint = if checkpoint == Checkpoint::Audit { Checkpoint::Provision } else { checkpoint };
        self.actions.get(&(checkpoint, group)).copied().unwrap_or(match (group, checkpoint) {
            (Group::Forbidden, _) => Action::Deny,
            (Group::Unanswered, Checkpoint::Create) => Action::Deny,
            (Group::Unanswered, Checkpoint::Provision | Checkpoint::Audit) => Action::AllowIfRecentlyValid,
            // A leaked key must be replaceable while its vendor is down. PROVISION decides about the start.
            (Group::Unanswered, Checkpoint::Update) => Action::Allow,
            (Group::Inconclusive | Group::Unverifiable | Group::TenantEndpoint | Group::Exposure, _) => Action::Allow,
        })
    }

    /// Replaces the ruling on a group at a checkpoint.
    pub fn set_action(&mut self, checkpoint: Checkpoint, group: Group, action: Action) {
        self.actions.insert((checkpoint, group), action);
    }

    /// Sets another enforcement for a provider until a given time.
    pub fn set_exception(&mut self, provider: String, exception: Exception) {
        self.exceptions.insert(provider, exception);
    }

    /// The providers with another enforcement.
    pub fn exceptions(&self) -> impl Iterator<Item = (&str, Exception)> {
        self.exceptions.iter().map(|(name, exception)| (name.as_str(), *exception))
    }

    /// The enforcement for a provider at this second of Unix time.
    pub fn enforcement(&self, provider: &str, now: i64) -> Enforcement {
        match self.exceptions.get(provider) {
            Some(exception) if now < exception.until => exception.enforcement,
            Some(_) | None => Enforcement::Enforce,
        }
    }
}

// === impl Ruling ===

impl Ruling {
    fn allow(grounds: Grounds) -> Self {
        Self { outcome: Ok(Allow::on(grounds)), warnings: Vec::new(), on_earlier_valid: false }
    }

    fn deny(refusal: impl Into<Box<Refusal>>) -> Self {
        Self { outcome: Err(refusal.into()), warnings: Vec::new(), on_earlier_valid: false }
    }

    fn warned(mut self, code: WarningCode, evidence: &LivenessEvidence, message: String) -> Self {
        self.warnings.push(Warning { code, message, env_names: vec![evidence.env_name.clone()] });
        self
    }

    fn allow_unverified(evidence: &LivenessEvidence) -> Self {
        let LivenessEvidence { verdict, env_name, provider, .. } = evidence;
        let message = format!("{env_name} of provider `{provider}` is present but was not verified ({verdict})");
        Self::allow(Grounds::Credential(*verdict)).warned(WarningCode::CredentialUnverified, evidence, message)
    }

    fn allow_on_earlier_valid(evidence: &LivenessEvidence) -> Self {
        let LivenessEvidence { verdict, env_name, provider, .. } = evidence;
        let message =
            format!("{env_name} of provider `{provider}` could not be verified now ({verdict}); it was seen VALID not long ago");
        let ruling = Self::allow(Grounds::Credential(*verdict)).warned(WarningCode::StaleLiveness, evidence, message);
        Self { on_earlier_valid: true, ..ruling }
    }

    fn allow_reported(evidence: LivenessEvidence) -> Self {
        let refusal = Refusal::Liveness(evidence.clone());
        let message = format!(
            "would have been denied with {} ({}); provider `{}` is on report only",
            refusal.code(),
            evidence.verdict,
            evidence.provider
        );
        Self::allow(Grounds::Credential(evidence.verdict)).warned(WarningCode::ReportOnly, &evidence, message)
    }

    /// The outcome of the decision. A denial also names models that the runtime offers without a key.
    pub fn into_outcome(self, alternative_models: impl FnOnce() -> Vec<String>) -> Outcome {
        match self.outcome {
            Ok(allow) => Outcome::Allow(allow),
            Err(refusal) => Outcome::Deny(Box::new(Deny::new(*refusal, alternative_models()))),
        }
    }
}
