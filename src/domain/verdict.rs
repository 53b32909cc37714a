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
    /// Another value is sent in the place of the one that would do.
    ShadowedByokCredential,
    /// Good, in a header in which the runtime does not send it.
    WrongCredentialName,
    /// Another credential would travel to a vendor that is not its own, and policy forbids that.
    ExposedCredential,
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
    /// It travels to a vendor that is not its own.
    ExposedCredential,
    /// The runtime does not read the variable that answers.
    UnusedCredential,
    /// Good, in another header than the one that is tried first.
    WrongHeader,
    /// Judged without the blanks around it.
    TrimmedCredential,
    /// A base-URL variable that nothing reads.
    UnknownBaseUrlName,
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
    /// Several do; one accepts an available name.
    ExactModelAndCredential,
    /// Several do; the first declared.
    FirstDeclared,
    /// One pattern matches.
    Prefix,
    /// Several do; one accepts an available name.
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
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, VariantArray)]
pub enum Withheld {
    /// As many questions wait for this provider as may, or this one waited too long.
    Queue,
    /// The provider's calls per second are spent.
    Budget,
    /// The caller or the organization had too many new credentials judged.
    NewKeys,
    /// An internal fault: the probe ended without an answer.
    Fault,
}

/// What failed on the way to the provider.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, VariantArray)]
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
    /// The forward proxy could not be reached, or did not let the call through.
    Proxy,
}

/// Why a probe ended in its verdict. A VALID needs none.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Display, EnumString, IntoStaticStr, VariantArray)]
#[strum(serialize_all = "SCREAMING_SNAKE_CASE")]
pub enum Cause {
    /// A signal of the host's row says so.
    RowSignal,
    /// A code that many servers share says so.
    CommonCode,
    /// The status of a machine-readable answer says so.
    Status,
    /// The answer is the one that a made-up key gets.
    AsAMadeUpKey,
    /// Alive, and not for this endpoint.
    Restricted,
    /// The endpoint accepts a made-up key too.
    AcceptsAnyone,
    /// No made-up key was asked about there, or its answer told nothing: the endpoint's "yes" is not shown to mean anything.
    MadeUpKeyUntold,
    /// A page for people.
    Page,
    /// Text that no machine reads.
    PlainText,
    /// Nothing but a status.
    EmptyBody,
    /// A 2xx without what a good answer holds.
    WrongShape,
    /// A 2xx that says that something is wrong.
    ErrorBeside,
    /// Elsewhere, says the provider. Nobody follows.
    Redirect,
    /// There is no such path.
    NotFound,
    /// The request is refused for what the credential need not have a part in.
    RequestRefused,
    /// A cache between here and the provider answered, whoever asks.
    FromACache,
    /// Nobody gets anything else there than "no such path", or a page: the base URL leads to no API.
    NoApiAtBaseUrl,
}

/// What a made-up key got where the real one was asked about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum MadeUpKey {
    /// This service has not asked.
    NotAsked,
    /// It is on its way, and what is known without it is enough.
    NotWaitedFor,
    /// No answer in time.
    NoAnswer,
    /// An answer that tells nothing: a limit, a failing server.
    Inconclusive(u16),
    /// A refusal, in whatever words.
    Refused(u16),
    /// A "yes".
    Accepted,
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

as_str!(DenyCode, WarningCode, Verdict, BillingMode, Source, MatchedBy, ServedFrom, Cause);

// === impl Cause, MadeUpKey ===

impl Cause {
    /// The same for a person.
    pub const fn text(self) -> &'static str {
        match self {
            Self::RowSignal => "a signal of the host's row says so",
            Self::CommonCode => "a code that many servers share says so",
            Self::Status => "the status says so",
            Self::AsAMadeUpKey => "a made-up key gets the same answer",
            Self::Restricted => "alive, but not for this endpoint",
            Self::AcceptsAnyone => "a made-up key is accepted too",
            Self::MadeUpKeyUntold => "nothing shows that a made-up key would be refused",
            Self::Page => "a page for people",
            Self::PlainText => "plain text",
            Self::EmptyBody => "an empty body",
            Self::WrongShape => "not what a good answer holds",
            Self::ErrorBeside => "a 2xx with an error in it",
            Self::Redirect => "a redirect, which is not followed",
            Self::NotFound => "no such path",
            Self::RequestRefused => "the request is refused",
            Self::FromACache => "a cache on the way answered, and not the provider",
            Self::NoApiAtBaseUrl => "everybody gets a page or no such path: no API at this base URL",
        }
    }
}

impl MadeUpKey {
    /// The same for a person.
    pub fn text(self) -> String {
        match self {
            Self::NotAsked => "not asked".into(),
            Self::NotWaitedFor => "one is on its way".into(),
            Self::NoAnswer => "no answer in time".into(),
            Self::Inconclusive(status) => format!("HTTP {status}, which tells nothing"),
            Self::Refused(status) => format!("refused with HTTP {status}"),
            Self::Accepted => "accepted".into(),
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
            | Self::ByokNotVerifiable
            | Self::ShadowedByokCredential
            | Self::WrongCredentialName
            | Self::ExposedCredential => false,
        }
    }
}
