//! The parts of an answer: who pays, what was observed, what was refused. The rules are in `policy.rs`.

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use crate::domain::{
    denial::Refusal,
    protocol::HeaderFamily,
    request::Scope,
    verdict::{BillingMode, Cause, MatchedBy, ServedFrom, Source, Verdict, WarningCode},
};

/// Something that did not decide but that a person should know.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Warning {
    /// The machine-readable name.
    pub code: WarningCode,
    /// The text.
    pub message: String,
    /// The variables that it is about.
    pub env_names: Vec<String>,
}

/// One step of the evaluation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TraceStep {
    /// The step's name.
    pub step: &'static str,
    /// What the step found.
    pub detail: String,
}

/// The owner of the model and the credential that is used, as far as they are known.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Resolution {
    /// The owner; empty if none was found.
    pub provider: String,
    /// Who pays, or would pay.
    pub billing_mode: Option<BillingMode>,
    /// What decided about the owner.
    pub source: Source,
    /// How the owner was found.
    pub matched_by: Option<MatchedBy>,
    /// The variables that the owner accepts, in the order in which they are tried.
    pub accepted_env: Arc<[String]>,
    /// The credential that was judged.
    pub credential: Option<JudgedCredential>,
}

/// The credential that was judged.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JudgedCredential {
    /// The variable that holds it.
    pub env_name: String,
    /// Where it is stored.
    pub scope: Scope,
    /// The organization has a credential with the same name, which this one hides.
    pub shadows_organization: bool,
    /// Why this value was judged and no other.
    pub chosen_because: ChosenBecause,
    /// 8 hex digits by which a person recognises the value. Empty if no key for fingerprints is configured.
    pub fingerprint: String,
}

/// Why a value was judged and no other.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ChosenBecause {
    /// The first of the provider's variables that is set. Nothing more is known about the runtime.
    FirstDeclared,
    /// The runtime sends it.
    Sent,
    /// The runtime sends it first, and this other one after a refusal.
    SentBefore(String),
    /// The provider reads it and not this other one, which the runtime may send as well, in another header.
    SentInPlaceOf(String),
    /// The runtime sends it after the first was refused.
    SentAfterARefusal,
    /// The registry accepts it, but the runtime does not read it.
    Unread,
}

/// What is known about the credential, and since when.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Liveness {
    /// The verdict.
    pub verdict: Verdict,
    /// The status of the provider's response, if there was one.
    pub upstream_status: Option<u16>,
    /// The host that was asked; empty if none was.
    pub endpoint_host: String,
    /// The name of the conclusive probe; empty if none was.
    pub probe: String,
    /// The header that carried the credential, if the provider was asked.
    pub header: Option<HeaderFamily>,
    /// The reason for the verdict.
    pub cause: Option<Cause>,
    /// The time and the source of the observation; `None` if the provider was not asked.
    pub seen: Option<Seen>,
}

/// When an observation was made, and where it came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Seen {
    /// When the provider answered.
    pub observed_at: SystemTime,
    /// The age of the observation at the decision.
    pub age: Duration,
    /// Where the observation came from.
    pub served_from: ServedFrom,
}

/// A denial.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Deny {
    /// The reason with its evidence.
    pub refusal: Refusal,
    /// What is wrong.
    pub message: String,
    /// What the tenant can do.
    pub remedy: String,
    /// What the platform's operator can do; may be empty.
    pub operator_hint: String,
    /// Models that the runtime offers without a key.
    pub alternative_models: Vec<String>,
}

/// Why a workspace may start. Every `Allow` has one of these grounds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Grounds {
    /// The operator's override says that no model calls are expected.
    OverrideDisabled,
    /// The runtime is on the list of exemptions.
    ExemptRuntime,
    /// The platform owns the model, and its proxy is available.
    PlatformOwnsModel,
    /// The operator's override says that the platform pays, and its proxy is available.
    OverridePlatformManaged,
    /// A credential of the tenant was judged, and policy accepts the verdict.
    Credential(Verdict),
}

/// The workspace may start.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Allow {
    grounds: Grounds,
}

/// The result of a decision.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// The workspace may start.
    Allow(Allow),
    /// The workspace must not start. Also the result of any doubt.
    Deny(Box<Deny>),
}

/// The names that mattered to a decision. A caller that sends all values it has under these names has sent enough.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RelevantNames {
    /// Credentials that could change the owner of the model or be used for it.
    pub env: Arc<[String]>,
    /// Base-URL variables with which the workspace would call another host.
    pub base_url_env: Arc<[String]>,
}

/// A decision with its reasons.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Decision {
    /// Allowed or denied.
    pub outcome: Outcome,
    /// The owner of the model.
    pub resolution: Resolution,
    /// What is known about the credential.
    pub liveness: Option<Liveness>,
    /// Warnings, which did not decide.
    pub warnings: Vec<Warning>,
    /// The steps, if the caller wants them.
    pub trace: Vec<TraceStep>,
    /// The names that mattered.
    pub relevant: RelevantNames,
}

// === impl Resolution ===

impl Resolution {
    /// A resolution in which nothing is known.
    pub fn empty() -> Self {
        Self {
            provider: String::new(),
            billing_mode: None,
            source: Source::Derived,
            matched_by: None,
            accepted_env: Arc::default(),
            credential: None,
        }
    }
}

// === impl ChosenBecause ===

impl ChosenBecause {
    /// The reason in words.
    pub fn text(&self) -> String {
        match self {
            Self::FirstDeclared => "the first of the provider's names that is set".into(),
            Self::Sent => "the runtime sends it".into(),
            Self::SentBefore(other) => format!("the runtime sends it before {other}"),
            Self::SentInPlaceOf(other) => format!("the runtime uses it and not {other}"),
            Self::SentAfterARefusal => "the runtime goes on to it after a refusal".into(),
            Self::Unread => "the registry accepts it; the runtime does not read it".into(),
        }
    }
}

// === impl Deny ===

impl Deny {
    /// A denial with its texts. They are made here, once, for the reply, the log and the status page.
    pub fn new(refusal: Refusal, alternative_models: Vec<String>) -> Self {
        let (message, remedy, operator_hint) = (refusal.message(), refusal.remedy(), refusal.operator_hint());
        Self { refusal, message, remedy, operator_hint, alternative_models }
    }
}

// === impl Allow ===

impl Allow {
    /// An `Allow` on these grounds.
    pub const fn on(grounds: Grounds) -> Self {
        Self { grounds }
    }

    /// The grounds.
    pub const fn grounds(self) -> Grounds {
        self.grounds
    }

    /// Who pays. Follows from the grounds alone.
    /// INVARIANT (never-flip): a judged credential is BYOK; only the two platform grounds bill the platform.
    pub const fn billing_mode(self) -> BillingMode {
        match self.grounds {
            Grounds::OverrideDisabled | Grounds::ExemptRuntime => BillingMode::None,
            Grounds::PlatformOwnsModel | Grounds::OverridePlatformManaged => BillingMode::PlatformManaged,
            Grounds::Credential(_) => BillingMode::Byok,
        }
    }
}

// === impl Decision ===

impl Decision {
    /// The denial, if the decision is one.
    pub fn denial(&self) -> Option<&Deny> {
        match &self.outcome {
            Outcome::Allow(_) => None,
            Outcome::Deny(deny) => Some(deny),
        }
    }

    /// Whether the workspace may start although the credential could not be verified now.
    pub fn is_unverified_allow(&self) -> bool {
        match &self.outcome {
            Outcome::Allow(allow) => match allow.grounds() {
                Grounds::Credential(verdict) => verdict != Verdict::Valid || self.is_stale(),
                Grounds::OverrideDisabled
                | Grounds::ExemptRuntime
                | Grounds::PlatformOwnsModel
                | Grounds::OverridePlatformManaged => false,
            },
            Outcome::Deny(_) => false,
        }
    }

    fn is_stale(&self) -> bool {
        self.liveness.as_ref().and_then(|liveness| liveness.seen).is_some_and(|seen| seen.served_from == ServedFrom::Stale)
    }
}
