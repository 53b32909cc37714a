//! The words of an answer: who pays, what was observed, what was refused. No rule lives here; `policy.rs` has them.

use std::{fmt, time::Duration, time::SystemTime};

use crate::domain::{denial::Refusal, request::Scope};

/// An enum of wire names, with the list of all of them, so that no list is ever typed twice.
macro_rules! words {
    ($(#[$doc:meta])* $vis:vis enum $name:ident { $($(#[$vdoc:meta])* $variant:ident = $word:literal,)+ }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        $vis enum $name { $($(#[$vdoc])* $variant,)+ }

        impl $name {
            /// Every value, in the order of the declaration.
            pub const ALL: &'static [Self] = &[$(Self::$variant,)+];

            /// The wire name, without the enum's own name as a prefix.
            pub const fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $word,)+ }
            }

            /// The value with this wire name.
            pub fn from_word(word: &str) -> Option<Self> {
                Self::ALL.iter().copied().find(|value| value.as_str() == word)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(self.as_str())
            }
        }
    };
}

words! {
    /// Why a workspace was refused.
    pub enum DenyCode {
        /// No runtime.
        RuntimeRequired = "RUNTIME_REQUIRED",
        /// Unknown runtime.
        RuntimeUnsupported = "RUNTIME_UNSUPPORTED",
        /// No model.
        ModelRequired = "MODEL_REQUIRED",
        /// No owner.
        UnregisteredModelForRuntime = "UNREGISTERED_MODEL_FOR_RUNTIME",
        /// Several possible owners.
        AmbiguousProvider = "AMBIGUOUS_PROVIDER",
        /// Kept for callers that know the code: the load guards rule it out, so nothing here ever makes it.
        DerivedProviderNotInRegistry = "DERIVED_PROVIDER_NOT_IN_REGISTRY",
        /// Withdrawn, and this is not a workspace that has it already.
        ModelWithdrawn = "MODEL_WITHDRAWN",
        /// What could not be read could change the answer.
        CredentialScopeUnreadable = "CREDENTIAL_SCOPE_UNREADABLE",
        /// Billed to the platform, without a proxy.
        MissingPlatformProxy = "MISSING_PLATFORM_PROXY",
        /// The owner takes no tenant credential.
        ProviderNotByok = "PROVIDER_NOT_BYOK",
        /// Configuration refuses overrides.
        OverrideNotAllowed = "OVERRIDE_NOT_ALLOWED",
        /// BYOK asked for by override, platform's model.
        OverrideConflictsWithModel = "OVERRIDE_CONFLICTS_WITH_MODEL",
        /// No accepted name holds a value.
        MissingByokCredential = "MISSING_BYOK_CREDENTIAL",
        /// The value cannot be a key.
        MalformedByokCredential = "MALFORMED_BYOK_CREDENTIAL",
        /// Refused by the provider, or another vendor's key.
        InvalidByokCredential = "INVALID_BYOK_CREDENTIAL",
        /// No usable answer in time.
        ByokProbeTimeout = "BYOK_PROBE_TIMEOUT",
        /// Not reachable.
        ByokProviderUnreachable = "BYOK_PROVIDER_UNREACHABLE",
        /// Not asked.
        ByokProbeNotAttempted = "BYOK_PROBE_NOT_ATTEMPTED",
        /// Rate limited.
        ByokProviderRateLimited = "BYOK_PROVIDER_RATE_LIMITED",
        /// The provider's fault.
        ByokProviderError = "BYOK_PROVIDER_ERROR",
        /// An answer that says nothing.
        ByokUnexpectedResponse = "BYOK_UNEXPECTED_RESPONSE",
        /// Out of credit.
        ByokQuotaExhausted = "BYOK_QUOTA_EXHAUSTED",
        /// Cannot be verified.
        ByokNotVerifiable = "BYOK_NOT_VERIFIABLE",
    }
}

words! {
    /// What a person should know although it did not decide.
    pub enum WarningCode {
        /// An override took part.
        OperatorOverride = "OPERATOR_OVERRIDE",
        /// Nothing was checked.
        ExemptRuntime = "EXEMPT_RUNTIME",
        /// Withdrawn, kept by the workspace that has it.
        ModelWithdrawn = "MODEL_WITHDRAWN",
        /// Dropped at the door.
        UnknownCredentialName = "UNKNOWN_CREDENTIAL_NAME",
        /// Another credential could be picked up instead.
        ConflictingCredential = "CONFLICTING_CREDENTIAL",
        /// Allowed unverified.
        CredentialUnverified = "CREDENTIAL_UNVERIFIED",
        /// Allowed on an earlier observation.
        StaleLiveness = "STALE_LIVENESS",
        /// Would have been denied.
        ReportOnly = "REPORT_ONLY",
        /// Not readable, and without influence.
        UnreadableCredentials = "UNREADABLE_CREDENTIALS",
    }
}

words! {
    /// What is known about a credential.
    pub enum Verdict {
        /// Accepted where bad ones are refused.
        Valid = "VALID",
        /// Dead or unknown, says the provider.
        Invalid = "INVALID",
        /// A 403 that nothing tells apart.
        Forbidden = "FORBIDDEN",
        /// Alive, out of credit or suspended.
        QuotaExhausted = "QUOTA_EXHAUSTED",
        /// 429 that is not about quota.
        RateLimited = "RATE_LIMITED",
        /// 5xx and the like.
        ProviderError = "PROVIDER_ERROR",
        /// Says nothing about the credential.
        UnexpectedResponse = "UNEXPECTED_RESPONSE",
        /// No usable answer within the budget.
        Timeout = "TIMEOUT",
        /// DNS, connect, TLS, or an address that may not be dialled.
        Unreachable = "UNREACHABLE",
        /// We did not ask.
        NotAttempted = "NOT_ATTEMPTED",
        /// Nothing to call.
        NoServerSurface = "NO_SERVER_SURFACE",
        /// The endpoint's "yes" proves nothing.
        NotCalibrated = "NOT_CALIBRATED",
        /// Switched off by the operator.
        ProbeDisabled = "PROBE_DISABLED",
    }
}

words! {
    /// Who pays for the workspace's model calls.
    pub enum BillingMode {
        /// The platform, through its proxy.
        PlatformManaged = "PLATFORM_MANAGED",
        /// The tenant, with a key of its own.
        Byok = "BYOK",
        /// Nobody.
        None = "NONE",
    }
}

words! {
    /// What settled a resolution.
    pub enum Source {
        /// Derivation.
        Derived = "DERIVED",
        /// An operator's override.
        OperatorOverride = "OPERATOR_OVERRIDE",
        /// The list of exempt runtimes.
        ExemptRuntime = "EXEMPT_RUNTIME",
    }
}

words! {
    /// By which step of the derivation the provider was found.
    pub enum MatchedBy {
        /// One provider lists the model.
        ExactModel = "EXACT_MODEL",
        /// Several do; one accepts a name at hand.
        ExactModelAndCredential = "EXACT_MODEL_AND_CREDENTIAL",
        /// Several do; the first declared.
        FirstDeclared = "FIRST_DECLARED",
        /// One pattern matches.
        Prefix = "PREFIX",
        /// Several do; one accepts a name at hand.
        PrefixAndCredential = "PREFIX_AND_CREDENTIAL",
    }
}

words! {
    /// Where an observation came from.
    pub enum ServedFrom {
        /// A call for this decision.
        Probe = "PROBE",
        /// Memory, fresh enough.
        Cache = "CACHE",
        /// Memory, past its age, within the hard maximum.
        Stale = "STALE",
        /// The open circuit breaker.
        Breaker = "BREAKER",
    }
}

/// Why the provider was not asked: our doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Withheld {
    /// As many questions wait for this provider as may, or this one waited too long.
    Queue,
    /// The provider's calls per second are spent.
    Budget,
    /// The caller or the organization had too many new credentials judged.
    NewKeys,
    /// A fault of ours: the probe ended without an answer.
    Fault,
}

/// What failed on the way to the provider.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Unreached {
    /// The host's name could not be resolved.
    Dns,
    /// The address may not be dialled, or not in this scheme.
    Address,
    /// No connection.
    Connect,
    /// The connection stands, but not its TLS.
    Tls,
    /// It was closed before any answer.
    Closed,
    /// What came is not HTTP.
    Protocol,
}

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
    /// 8 hex digits under the configured key; empty without one.
    pub fingerprint: String,
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
}

// === impl Resolution ===

impl Resolution {
    /// Nothing is settled yet.
    pub const fn unsettled() -> Self {
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

// === impl DenyCode ===

impl DenyCode {
    /// The same request may be allowed later with nothing changed.
    pub const fn retryable(self) -> bool {
        match self {
            Self::CredentialScopeUnreadable
            | Self::ByokProbeTimeout
            | Self::ByokProviderUnreachable
            | Self::ByokProbeNotAttempted
            | Self::ByokProviderRateLimited
            | Self::ByokProviderError
            | Self::ByokUnexpectedResponse => true,
            Self::RuntimeRequired
            | Self::RuntimeUnsupported
            | Self::ModelRequired
            | Self::UnregisteredModelForRuntime
            | Self::AmbiguousProvider
            | Self::DerivedProviderNotInRegistry
            | Self::ModelWithdrawn
            | Self::MissingPlatformProxy
            | Self::ProviderNotByok
            | Self::OverrideNotAllowed
            | Self::OverrideConflictsWithModel
            | Self::MissingByokCredential
            | Self::MalformedByokCredential
            | Self::InvalidByokCredential
            | Self::ByokQuotaExhausted
            | Self::ByokNotVerifiable => false,
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
