//! The closed vocabularies of an answer: deny codes, verdicts, warnings, who pays. Their wire names are the variants' own, in upper case.

use strum::{Display, EnumString, IntoStaticStr, VariantArray};

/// Why a workspace was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Display, EnumString, IntoStaticStr, VariantArray)]
#[strum(serialize_all = "SCREAMING_SNAKE_CASE")]
pub enum DenyCode {
    /// No runtime.
    RuntimeRequired,
    /// Unknown runtime.
    RuntimeUnsupported,
    /// No model.
    ModelRequired,
    /// No owner.
    UnregisteredModelForRuntime,
    /// Several possible owners.
    AmbiguousProvider,
    /// Kept for callers that know the code: the load guards rule it out, so nothing here ever makes it.
    DerivedProviderNotInRegistry,
    /// Withdrawn, and this is not a workspace that has it already.
    ModelWithdrawn,
    /// What could not be read could change the answer.
    CredentialScopeUnreadable,
    /// Billed to the platform, without a proxy.
    MissingPlatformProxy,
    /// The owner takes no tenant credential.
    ProviderNotByok,
    /// Configuration refuses overrides.
    OverrideNotAllowed,
    /// BYOK asked for by override, platform's model.
    OverrideConflictsWithModel,
    /// No accepted name holds a value.
    MissingByokCredential,
    /// The value cannot be a key.
    MalformedByokCredential,
    /// Refused by the provider, or another vendor's key.
    InvalidByokCredential,
    /// No usable answer in time.
    ByokProbeTimeout,
    /// Not reachable.
    ByokProviderUnreachable,
    /// Not asked.
    ByokProbeNotAttempted,
    /// Rate limited.
    ByokProviderRateLimited,
    /// The provider's fault.
    ByokProviderError,
    /// An answer that says nothing.
    ByokUnexpectedResponse,
    /// Out of credit.
    ByokQuotaExhausted,
    /// Cannot be verified.
    ByokNotVerifiable,
}

/// What a person should know although it did not decide.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Display, EnumString, IntoStaticStr, VariantArray)]
#[strum(serialize_all = "SCREAMING_SNAKE_CASE")]
pub enum WarningCode {
    /// An override took part.
    OperatorOverride,
    /// Nothing was checked.
    ExemptRuntime,
    /// Withdrawn, kept by the workspace that has it.
    ModelWithdrawn,
    /// Dropped at the door.
    UnknownCredentialName,
    /// Another credential could be picked up instead.
    ConflictingCredential,
    /// Allowed unverified.
    CredentialUnverified,
    /// Allowed on an earlier observation.
    StaleLiveness,
    /// Would have been denied.
    ReportOnly,
    /// Not readable, and without influence.
    UnreadableCredentials,
}

/// What is known about a credential.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Display, EnumString, IntoStaticStr, VariantArray)]
#[strum(serialize_all = "SCREAMING_SNAKE_CASE")]
pub enum Verdict {
    /// Accepted where bad ones are refused.
    Valid,
    /// Dead or unknown, says the provider.
    Invalid,
    /// A 403 that nothing tells apart.
    Forbidden,
    /// Alive, out of credit or suspended.
    QuotaExhausted,
    /// 429 that is not about quota.
    RateLimited,
    /// 5xx and the like.
    ProviderError,
    /// Says nothing about the credential.
    UnexpectedResponse,
    /// No usable answer within the budget.
    Timeout,
    /// DNS, connect, TLS, or an address that may not be dialled.
    Unreachable,
    /// We did not ask.
    NotAttempted,
    /// Nothing to call.
    NoServerSurface,
    /// The endpoint's "yes" proves nothing.
    NotCalibrated,
    /// Switched off by the operator.
    ProbeDisabled,
}

/// Who pays for the workspace's model calls.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Display, EnumString, IntoStaticStr, VariantArray)]
#[strum(serialize_all = "SCREAMING_SNAKE_CASE")]
pub enum BillingMode {
    /// The platform, through its proxy.
    PlatformManaged,
    /// The tenant, with a key of its own.
    Byok,
    /// Nobody.
    None,
}

/// What settled a resolution.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Display, EnumString, IntoStaticStr, VariantArray)]
#[strum(serialize_all = "SCREAMING_SNAKE_CASE")]
pub enum Source {
    /// Derivation.
    Derived,
    /// An operator's override.
    OperatorOverride,
    /// The list of exempt runtimes.
    ExemptRuntime,
}

/// By which step of the derivation the provider was found.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Display, EnumString, IntoStaticStr, VariantArray)]
#[strum(serialize_all = "SCREAMING_SNAKE_CASE")]
pub enum MatchedBy {
    /// One provider lists the model.
    ExactModel,
    /// Several do; one accepts a name at hand.
    ExactModelAndCredential,
    /// Several do; the first declared.
    FirstDeclared,
    /// One pattern matches.
    Prefix,
    /// Several do; one accepts a name at hand.
    PrefixAndCredential,
}

/// Where an observation came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Display, EnumString, IntoStaticStr, VariantArray)]
#[strum(serialize_all = "SCREAMING_SNAKE_CASE")]
pub enum ServedFrom {
    /// A call for this decision.
    Probe,
    /// Memory, fresh enough.
    Cache,
    /// Memory, past its age, within the hard maximum.
    Stale,
    /// The open circuit breaker.
    Breaker,
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

/// The wire name, without the enum's own name as a prefix.
macro_rules! as_str {
    ($($name:ty),+ $(,)?) => { $(
        impl $name {
            /// The wire name, without the enum's own name as a prefix.
            pub fn as_str(self) -> &'static str {
                self.into()
            }
        }
    )+ };
}

as_str!(DenyCode, WarningCode, Verdict, BillingMode, Source, MatchedBy, ServedFrom);

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
