//! The enums of an answer: deny codes, verdicts, warnings, who pays. The names on the wire are those of the variants, in upper case.

use strum::{Display, EnumString, IntoStaticStr, VariantArray};

/// Why a workspace was denied.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Display, EnumString, IntoStaticStr, VariantArray)]
#[strum(serialize_all = "SCREAMING_SNAKE_CASE")]
pub enum DenyCode {
    /// The request names no runtime.
    RuntimeRequired,
    /// The registry does not have the runtime.
    RuntimeUnsupported,
    /// The request names no model.
    ModelRequired,
    /// No provider of the runtime owns the model.
    UnregisteredModelForRuntime,
    /// Several providers could own the model.
    AmbiguousProvider,
    /// Never used: a registry with this fault does not load. Kept for callers that know the code.
    DerivedProviderNotInRegistry,
    /// New workspaces cannot have the model.
    ModelWithdrawn,
    /// A credential that could not be read could change the decision.
    CredentialScopeUnreadable,
    /// The platform owns the model, but its proxy is not available.
    MissingPlatformProxy,
    /// The owner takes no credential of a tenant.
    ProviderNotByok,
    /// The configuration does not allow overrides.
    OverrideNotAllowed,
    /// The override requires the tenant's own credential, but the model belongs to the platform.
    OverrideConflictsWithModel,
    /// No variable of the owner holds a value.
    MissingByokCredential,
    /// The value cannot be a key.
    MalformedByokCredential,
    /// The provider refused the credential, or it is a key of another vendor.
    InvalidByokCredential,
    /// No usable response in time.
    ByokProbeTimeout,
    /// The provider could not be reached.
    ByokProviderUnreachable,
    /// The provider was not asked.
    ByokProbeNotAttempted,
    /// The provider limits the rate.
    ByokProviderRateLimited,
    /// The provider failed.
    ByokProviderError,
    /// The response says nothing about the credential.
    ByokUnexpectedResponse,
    /// The account is out of credit or suspended.
    ByokQuotaExhausted,
    /// The credential cannot be verified.
    ByokNotVerifiable,
    /// The workspace sends another value instead of one that would do.
    ShadowedByokCredential,
    /// The credential is good, but the runtime sends it in the wrong header.
    WrongCredentialName,
    /// Another credential would be sent to a vendor that is not its own, and policy forbids that.
    ExposedCredential,
}

/// Something that did not decide but that a person should know.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Display, EnumString, IntoStaticStr, VariantArray)]
#[strum(serialize_all = "SCREAMING_SNAKE_CASE")]
pub enum WarningCode {
    /// The request has an operator's override.
    OperatorOverride,
    /// The runtime is exempt, so nothing was checked.
    ExemptRuntime,
    /// The model is withdrawn, and the workspace keeps it.
    ModelWithdrawn,
    /// No provider or runtime uses a credential with this name.
    UnknownCredentialName,
    /// The runtime could use another credential instead.
    ConflictingCredential,
    /// Allowed, although the credential could not be verified.
    CredentialUnverified,
    /// Allowed because of an earlier VALID.
    StaleLiveness,
    /// Would have been denied, but the provider is on report only.
    ReportOnly,
    /// Some credentials could not be read, and none of them could change the decision.
    UnreadableCredentials,
    /// Another credential is sent to a vendor that is not its own.
    ExposedCredential,
    /// The runtime does not read the variable of the judged credential.
    UnusedCredential,
    /// The credential is good, but in another header than the workspace uses.
    WrongHeader,
    /// Judged without the blanks around it.
    TrimmedCredential,
    /// No runtime reads a base URL from this variable.
    UnknownBaseUrlName,
}

/// The result of checking a credential.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Display, EnumString, IntoStaticStr, VariantArray)]
#[strum(serialize_all = "SCREAMING_SNAKE_CASE")]
pub enum Verdict {
    /// The provider accepts it and refuses bad ones.
    Valid,
    /// The provider refuses it.
    Invalid,
    /// The provider forbids its use, and it is not known why.
    Forbidden,
    /// Alive, but out of credit or suspended.
    QuotaExhausted,
    /// The provider limits the rate.
    RateLimited,
    /// The provider failed.
    ProviderError,
    /// The response says nothing about the credential.
    UnexpectedResponse,
    /// No usable response within the time budget.
    Timeout,
    /// DNS, connection or TLS failed, or the address may not be called.
    Unreachable,
    /// This service did not ask.
    NotAttempted,
    /// The provider cannot be asked.
    NoServerSurface,
    /// The provider accepts it, but was not seen to refuse bad ones.
    NotCalibrated,
    /// The operator has switched the check off.
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
    /// Nobody: no model calls are expected, or the runtime is exempt.
    None,
}

/// What decided about the owner of a model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Display, EnumString, IntoStaticStr, VariantArray)]
#[strum(serialize_all = "SCREAMING_SNAKE_CASE")]
pub enum Source {
    /// The registry.
    Derived,
    /// An operator's override.
    OperatorOverride,
    /// The list of exempt runtimes.
    ExemptRuntime,
}

/// How the owner of a model was found.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Display, EnumString, IntoStaticStr, VariantArray)]
#[strum(serialize_all = "SCREAMING_SNAKE_CASE")]
pub enum MatchedBy {
    /// It is the only provider that lists the model.
    ExactModel,
    /// Several list it, and only this one accepts an available name.
    ExactModelAndCredential,
    /// Several list it, and this one is the first.
    FirstDeclared,
    /// It is the only provider with a matching pattern.
    Prefix,
    /// Several patterns match, and only this provider accepts an available name.
    PrefixAndCredential,
}

/// Where an observation came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Display, EnumString, IntoStaticStr, VariantArray)]
#[strum(serialize_all = "SCREAMING_SNAKE_CASE")]
pub enum ServedFrom {
    /// A probe for this decision.
    Probe,
    /// The cache, within its age.
    Cache,
    /// The cache, beyond its age but within the hard maximum age.
    Stale,
    /// The open circuit breaker.
    Breaker,
}

/// Why this service did not ask the provider.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, VariantArray)]
pub enum Withheld {
    /// The queue for this provider is full, or the wait was too long.
    Queue,
    /// The provider's calls per second are used up.
    Budget,
    /// The caller or the organization has had too many new credentials checked.
    NewKeys,
    /// An internal fault: the probe ended without a result.
    Fault,
}

/// What kept a request from reaching the provider.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, VariantArray)]
pub enum Unreached {
    /// The host's name could not be resolved.
    Dns,
    /// The address, or the scheme, may not be used.
    Address,
    /// No connection could be made.
    Connect,
    /// No connection came about in time. Nothing refused it either, as when a firewall drops packets.
    ConnectTimeout,
    /// The TLS handshake failed, in another way than the next three.
    Tls,
    /// The certificate has expired or is not valid yet.
    TlsExpired,
    /// The certificate is for other names.
    TlsName,
    /// The certificate is not from an authority that is trusted here.
    TlsIssuer,
    /// The connection was closed before a response.
    Closed,
    /// The response is not HTTP.
    Protocol,
    /// The forward proxy could not be reached or refused the request.
    Proxy,
}

/// The reason for a verdict. VALID has none.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Display, EnumString, IntoStaticStr, VariantArray)]
#[strum(serialize_all = "SCREAMING_SNAKE_CASE")]
pub enum Cause {
    /// A signal of the catalogue's row.
    RowSignal,
    /// An error code that many servers share.
    CommonCode,
    /// The status of a machine-readable response.
    Status,
    /// A made-up key gets the same response.
    AsAMadeUpKey,
    /// The key is alive but may not use this endpoint.
    Restricted,
    /// The endpoint accepts made-up keys too.
    AcceptsAnyone,
    /// It is not known that the endpoint refuses made-up keys: none was sent, or the response was inconclusive.
    MadeUpKeyUntold,
    /// The response is a page for people.
    Page,
    /// The response is plain text.
    PlainText,
    /// The response has no body.
    EmptyBody,
    /// A 2xx without the content of a success response.
    WrongShape,
    /// A 2xx with an error in it.
    ErrorBeside,
    /// A redirect, which is not followed.
    Redirect,
    /// The path does not exist.
    NotFound,
    /// The request was refused, and not necessarily because of the credential.
    RequestRefused,
    /// A cache answered instead of the provider.
    FromACache,
    /// Every key gets a page or "no such path", so the base URL has no API.
    NoApiAtBaseUrl,
}

/// How a made-up key was answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum MadeUpKey {
    /// None was sent.
    NotAsked,
    /// One was sent, but the probe did not wait for the response.
    NotWaitedFor,
    /// No response in time.
    NoAnswer,
    /// A response with this status that proves nothing, such as a rate limit or a failing server.
    Inconclusive(u16),
    /// Refused with this status.
    Refused(u16),
    /// Accepted.
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
    /// The cause in words.
    pub const fn text(self) -> &'static str {
        match self {
            Self::RowSignal => "a signal of the host's row decides",
            Self::CommonCode => "a well-known error code or text decides",
            Self::Status => "the HTTP status decides",
            Self::AsAMadeUpKey => "a made-up key gets the same answer",
            Self::Restricted => "alive, but not for this endpoint",
            Self::AcceptsAnyone => "a made-up key is accepted too",
            Self::MadeUpKeyUntold => "nothing shows that a made-up key would be refused",
            Self::Page => "a web page",
            Self::PlainText => "plain text",
            Self::EmptyBody => "an empty body",
            Self::WrongShape => "the answer lacks what a successful one has",
            Self::ErrorBeside => "a 2xx with an error in it",
            Self::Redirect => "a redirect, which is not followed",
            Self::NotFound => "no such path",
            Self::RequestRefused => "the request was refused",
            Self::FromACache => "a cache on the way answered, and not the provider",
            Self::NoApiAtBaseUrl => "every key gets a web page or \"no such path\": there is no API at this base URL",
        }
    }
}

impl MadeUpKey {
    /// The response in words.
    pub fn text(self) -> String {
        match self {
            Self::NotAsked => "not asked".into(),
            Self::NotWaitedFor => "one is in flight".into(),
            Self::NoAnswer => "no answer in time".into(),
            Self::Inconclusive(status) => format!("HTTP {status}, which shows nothing"),
            // A page, or a "yes" that lacks what a successful answer has.
            Self::Refused(status @ 200..=399) => format!("HTTP {status} too, and not accepted"),
            Self::Refused(status) => format!("refused with HTTP {status}"),
            Self::Accepted => "accepted".into(),
        }
    }
}

// === impl DenyCode ===

impl DenyCode {
    /// Whether the same request may be allowed later without any change.
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
