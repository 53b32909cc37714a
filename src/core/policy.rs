//! From facts to a ruling: total, synchronous, no clock. The only place that allows.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use crate::domain::{
    decision::{Allow, Deny, Grounds, Outcome, Warning},
    denial::{LivenessEvidence, Refusal},
    request::{Checkpoint, PlatformProxy},
    verdict::{ServedFrom, Verdict, WarningCode, Withheld},
};

/// Verdicts that an operator rules on together, per checkpoint.
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
    /// NO_SERVER_SURFACE, because the workspace dials a base URL of the tenant's own.
    TenantEndpoint,
    /// A credential that travels to a vendor that is not its own.
    Exposure,
}

/// What is done about a group.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Action {
    /// Allow, with a warning.
    Allow,
    /// Allow, with a warning, if the credential was seen VALID within the hard maximum age; else deny.
    AllowIfRecentlyValid,
    /// Deny.
    Deny,
}

/// How seriously one provider's verdicts are taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Enforcement {
    /// As the policy says.
    Enforce,
    /// Judged and shown, never denied for it.
    Report,
    /// Not asked.
    Off,
}

/// A provider's enforcement, until its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Exception {
    /// Report or off.
    pub enforcement: Enforcement,
    /// From this second of Unix time on, `Enforce` holds again.
    pub until: i64,
}

/// What is done about each group at one checkpoint, as settings have it.
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
    /// NO_SERVER_SURFACE, because the workspace dials a base URL of the tenant's own.
    pub tenant_endpoint: Action,
    /// A credential that travels to a vendor that is not its own: allow, with a warning, or deny.
    pub exposure: Action,
}

/// The same for each checkpoint that has a policy of its own; AUDIT has PROVISION's.
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

/// Whether operator overrides count.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(rename_all = "lowercase")]
pub enum Overrides {
    /// They do.
    #[default]
    Honour,
    /// They are refused.
    Refuse,
}

/// How seriously one provider's verdicts are taken, and until when, as settings have it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ProviderException {
    /// How.
    pub probe: Enforcement,
    /// Until when: a date such as 2026-12-31.
    #[serde(default)]
    pub until: Option<String>,
}

/// What the operator decided.
#[derive(Debug, Clone)]
pub struct Policy {
    actions: BTreeMap<(Checkpoint, Group), Action>,
    exceptions: BTreeMap<String, Exception>,
    /// Whether operator overrides in a spec are honoured.
    pub honour_overrides: bool,
    /// Runtimes that are allowed without any check.
    pub exempt_runtimes: BTreeSet<String>,
    /// What an unspecified `platform_proxy` means. Built in as ABSENT: no zero value allows.
    pub platform_proxy: PlatformProxy,
}

/// What the policy rules on. Each variant is all the evidence that its ruling needs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Facts {
    /// Refused before a credential was looked at, or for its shape.
    Refused(Refusal),
    /// The operator's override says that no model calls are expected.
    OverrideDisabled,
    /// The runtime is on the configured list.
    ExemptRuntime,
    /// The platform is to pay: by the registry, or by the operator's override.
    Platform {
        /// The operator's override says so, not the registry.
        by_override: bool,
        /// Whether it can.
        proxy: PlatformProxy,
        /// The model.
        model: String,
    },
    /// The tenant's own credential is VALID. Nothing else is needed to say so.
    Valid,
    /// It is VALID, in a header in which the workspace does not send it.
    WrongHeader {
        /// What is said of it.
        evidence: WrongHeader,
        /// How seriously this provider's verdicts are taken.
        enforcement: Enforcement,
    },
    /// The workspace sends another value than the one that would do, and that one is not VALID.
    Shadowed {
        /// What is said of it.
        refusal: Box<Refusal>,
        /// The verdict on what is sent.
        evidence: LivenessEvidence,
        /// How seriously this provider's verdicts are taken.
        enforcement: Enforcement,
    },
    /// The tenant's own credential was judged, and is not VALID.
    NotValid {
        /// The evidence.
        evidence: LivenessEvidence,
        /// Where the verdict came from, if something was asked.
        served_from: Option<ServedFrom>,
        /// It was seen VALID within the hard maximum age and the caller's.
        recently_valid: bool,
        /// How seriously this provider's verdicts are taken.
        enforcement: Enforcement,
    },
}

/// A good key in the wrong header.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WrongHeader {
    /// Its name.
    pub env_name: String,
    /// What is known about it.
    pub message: String,
    /// Where the runtime's facts are sure and there is a right name: the denial.
    pub refusal: Option<Box<Refusal>>,
}

/// The ruling.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ruling {
    /// Allowed, or the refusal.
    pub outcome: Result<Allow, Refusal>,
    /// What a person should know all the same.
    pub warnings: Vec<Warning>,
    /// Allowed on an earlier VALID, which the answer then shows.
    pub on_earlier_valid: bool,
}

// === ruling ===

/// The ruling on these facts. Total: every fact has its arm, and doubt is a denial.
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
                Some(refusal) => Ruling::deny(*refusal),
                None => {
                    let warning = Warning { code: WarningCode::WrongHeader, message, env_names: vec![env_name] };
                    let ruling = Ruling::allow(Grounds::Credential(Verdict::Valid));
                    Ruling { warnings: vec![warning], ..ruling }
                }
            }
        }
        Facts::Shadowed { refusal, evidence: _, enforcement: Enforcement::Enforce | Enforcement::Off } => Ruling::deny(*refusal),
        Facts::Shadowed { refusal: _, evidence, enforcement: Enforcement::Report } => Ruling::allow_reported(evidence),
        Facts::NotValid { evidence, served_from: _, recently_valid, enforcement } => {
            let action = group_of(&evidence).map_or(Action::Deny, |group| policy.action(checkpoint, group));
            // Whatever is configured: the service is no key checker, and a flood of keys does not get past it by being one.
            let starts = checkpoint != Checkpoint::Update;
            if starts && evidence.withheld == Some(Withheld::NewKeys) {
                return Ruling::deny(Refusal::Liveness(evidence));
            }
            let denied = match action {
                Action::Deny => true,
                Action::AllowIfRecentlyValid => !recently_valid,
                Action::Allow => false,
            };
            match (denied, enforcement) {
                // A provider that is off was not asked: its PROBE_DISABLED is ruled on by the group, as any other verdict.
                (true, Enforcement::Enforce | Enforcement::Off) => Ruling::deny(Refusal::Liveness(evidence)),
                (true, Enforcement::Report) => Ruling::allow_reported(evidence),
                (false, _) if action == Action::AllowIfRecentlyValid => Ruling::allow_on_earlier_valid(&evidence),
                (false, _) => Ruling::allow_unverified(&evidence),
            }
        }
    }
}

/// By which group a verdict is ruled on. INVALID is by none: it is denied. So would VALID be, which is a fact of its own.
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
    /// Each group with what is done about it.
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
    /// Each checkpoint with its actions.
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
    /// What is done about a group at a checkpoint.
    pub fn action(&self, checkpoint: Checkpoint, group: Group) -> Action {
        // A running workspace is judged as it would be at its next start.
        let checkpoint = if checkpoint == Checkpoint::Audit { Checkpoint::Provision } else { checkpoint };
        self.actions.get(&(checkpoint, group)).copied().unwrap_or(match (group, checkpoint) {
            (Group::Forbidden, _) => Action::Deny,
            (Group::Unanswered, Checkpoint::Create) => Action::Deny,
            (Group::Unanswered, Checkpoint::Provision | Checkpoint::Audit) => Action::AllowIfRecentlyValid,
            // A leaked key must be replaceable while its vendor is down; PROVISION decides.
            (Group::Unanswered, Checkpoint::Update) => Action::Allow,
            (Group::Inconclusive | Group::Unverifiable | Group::TenantEndpoint | Group::Exposure, _) => Action::Allow,
        })
    }

    /// Rules differently on a group at a checkpoint.
    pub fn set_action(&mut self, checkpoint: Checkpoint, group: Group, action: Action) {
        self.actions.insert((checkpoint, group), action);
    }

    /// Takes a provider's verdicts less seriously for a time.
    pub fn set_exception(&mut self, provider: String, exception: Exception) {
        self.exceptions.insert(provider, exception);
    }

    /// The providers with an exception.
    pub fn exceptions(&self) -> impl Iterator<Item = (&str, Exception)> {
        self.exceptions.iter().map(|(name, exception)| (name.as_str(), *exception))
    }

    /// How seriously a provider's verdicts are taken at this second of Unix time.
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

    fn deny(refusal: Refusal) -> Self {
        Self { outcome: Err(refusal), warnings: Vec::new(), on_earlier_valid: false }
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

    /// The ruling as an outcome, with what the runtime offers instead of a refusal.
    pub fn into_outcome(self, alternative_models: impl FnOnce() -> Vec<String>) -> Outcome {
        match self.outcome {
            Ok(allow) => Outcome::Allow(allow),
            Err(refusal) => Outcome::Deny(Box::new(Deny { refusal, alternative_models: alternative_models() })),
        }
    }
}
