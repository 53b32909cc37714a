//! The words of an answer: who pays, what was observed, what was refused. No rule lives here; `policy.rs` has them.

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

/// What a person should know although it did not decide.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Warning {
    /// The machine's name.
    pub code: WarningCode,
    /// One sentence.
    pub message: String,
    /// The names that it is about.
    pub env_names: Vec<String>,
}

/// One step taken, in words.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TraceStep {
    /// The step's name.
    pub step: &'static str,
    /// What was found.
    pub detail: String,
}

/// Who owns the model and which credential answers for it, as far as that was settled.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Resolution {
    /// The provider's name; empty if none was derived.
    pub provider: String,
    /// Who pays, or would have.
    pub billing_mode: Option<BillingMode>,
    /// What settled it.
    pub source: Source,
    /// By which step.
    pub matched_by: Option<MatchedBy>,
    /// The names that the provider accepts, in the order in which they are tried.
    pub accepted_env: Vec<String>,
    /// The name whose value was judged, and where it is stored.
    pub credential: Option<JudgedCredential>,
}

/// Which credential was judged.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JudgedCredential {
    /// Its name.
    pub env_name: String,
    /// Its scope.
    pub scope: Scope,
    /// It hides an organization row of the same name.
    pub shadows_organization: bool,
    /// Why this value and no other.
    pub chosen_because: ChosenBecause,
    /// 8 hex digits under the configured key; empty without one.
    pub fingerprint: String,
}

/// Why one value is judged and no other.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ChosenBecause {
    /// It is the first of the provider's names that holds a value; of the runtime nothing more is known.
    FirstDeclared,
    /// The runtime sends it.
    Sent,
    /// The runtime sends it before this one.
    SentBefore(String),
    /// The runtime sends it and not this one.
    SentInPlaceOf(String),
    /// The runtime goes on to it after a refusal.
    SentAfterARefusal,
    /// The registry accepts it, and the runtime does not read it.
    Unread,
}

/// What is known about the credential, and since when.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Liveness {
    /// The verdict.
    pub verdict: Verdict,
    /// The provider's status, if it answered.
    pub upstream_status: Option<u16>,
    /// The host that was asked; empty if none.
    pub endpoint_host: String,
    /// The conclusive probe's name; empty if none.
    pub probe: String,
    /// In which header the credential was, where the provider was asked.
    pub header: Option<HeaderFamily>,
    /// Why the verdict is what it is.
    pub cause: Option<Cause>,
    /// When the provider answered, and how old that was at the decision; `None` if nothing was asked.
    pub seen: Option<Seen>,
}

/// When and where from an observation was had.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Seen {
    /// When the provider answered.
    pub observed_at: SystemTime,
    /// How old that was at the decision.
    pub age: Duration,
    /// Where it came from.
    pub served_from: ServedFrom,
}

/// A refusal, and what the runtime offers instead.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Deny {
    /// The reason, with its evidence.
    pub refusal: Refusal,
    /// Models that this runtime offers without a key.
    pub alternative_models: Vec<String>,
}

/// On what grounds a workspace may start. There is no other way to an `Allow` than one of these.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Grounds {
    /// The operator's override says that no model calls are expected.
    OverrideDisabled,
    /// The runtime is on the configured list.
    ExemptRuntime,
    /// The registry gives the model to the platform, and the proxy is there.
    PlatformOwnsModel,
    /// The operator's override bills the platform by name, and the proxy is there.
    OverridePlatformManaged,
    /// A credential of the tenant's own was judged, and policy accepts the verdict.
    Credential(Verdict),
}

/// The workspace may start.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Allow {
    grounds: Grounds,
}

/// Allowed or denied.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// It may start.
    Allow(Allow),
    /// It must not. The answer when in doubt.
    Deny(Box<Deny>),
}

/// The names that mattered to a decision: who has sent what there is of them has sent enough.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RelevantNames {
    /// Credentials that could change the owner of the model, or answer for it.
    pub env: Arc<[String]>,
    /// Base-URL variables with which the workspace would dial another host.
    pub base_url_env: Arc<[String]>,
}

/// One decision with its reasons.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Decision {
    /// Allowed or denied.
    pub outcome: Outcome,
    /// Who owns the model.
    pub resolution: Resolution,
    /// What is known about the credential.
    pub liveness: Option<Liveness>,
    /// What did not decide.
    pub warnings: Vec<Warning>,
    /// The steps, if they were asked for.
    pub trace: Vec<TraceStep>,
    /// The names that mattered.
    pub relevant: RelevantNames,
}

// === impl Resolution ===

impl Resolution {
    /// Nothing is settled yet.
    pub const fn empty() -> Self {
        Self {
            provider: String::new(),
            billing_mode: None,
            source: Source::Derived,
            matched_by: None,
            accepted_env: Vec::new(),
            credential: None,
        }
    }
}

// === impl ChosenBecause ===

impl ChosenBecause {
    /// The same for a person.
    pub fn text(&self) -> String {
        match self {
            Self::FirstDeclared => "the first of the provider's names that is set".into(),
            Self::Sent => "the runtime sends it".into(),
            Self::SentBefore(other) => format!("the runtime sends it before {other}"),
            Self::SentInPlaceOf(other) => format!("the runtime sends it and not {other}"),
            Self::SentAfterARefusal => "the runtime goes on to it after a refusal".into(),
            Self::Unread => "the registry accepts it; the runtime does not read it".into(),
        }
    }
}

// === impl Allow ===

impl Allow {
    /// An allow on these grounds.
    pub const fn on(grounds: Grounds) -> Self {
        Self { grounds }
    }

    /// The grounds.
    pub const fn grounds(self) -> Grounds {
        self.grounds
    }

    /// Who pays follows from the grounds alone.
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
    /// The denial, if it is one.
    pub fn denial(&self) -> Option<&Deny> {
        match &self.outcome {
            Outcome::Allow(_) => None,
            Outcome::Deny(deny) => Some(deny),
        }
    }

    /// Allowed although nobody could show that the credential is alive.
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
