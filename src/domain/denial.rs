//! Every reason for a denial, with its evidence. All of them are here, so that every checkpoint and every caller gets the same words.

use std::time::Duration;

use crate::domain::{
    protocol::HeaderFamily,
    request::Scope,
    verdict::{Cause, DenyCode, Unreached, Verdict, Withheld},
};

/// The wait after a secret store could not be read. Such faults are usually short.
const UNREADABLE_RETRY_AFTER: Duration = Duration::from_secs(2);

/// A reason for a denial. It holds names, hosts and statuses, but never a credential's value or the provider's own text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Refusal {
    /// The configuration does not allow overrides.
    OverrideNotAllowed,
    /// The override requires the tenant's own credential, but the model belongs to the platform.
    OverrideConflictsWithModel {
        /// The model.
        model: String,
    },
    /// The request names no runtime.
    RuntimeRequired,
    /// The registry does not have the runtime.
    RuntimeUnsupported {
        /// The runtime in the request.
        runtime: String,
        /// The runtimes in the registry.
        known: Vec<String>,
    },
    /// The request names no model.
    ModelRequired {
        /// The runtime.
        runtime: String,
    },
    /// No provider of the runtime owns the model.
    UnregisteredModel {
        /// The runtime.
        runtime: String,
        /// The model.
        model: String,
        /// The offered model with the most similar id.
        nearest: Option<String>,
        /// Some of the models that the runtime offers.
        offered: Vec<String>,
    },
    /// Several providers could own the model.
    AmbiguousProvider {
        /// The runtime.
        runtime: String,
        /// The model.
        model: String,
        /// The possible owners, in the order of the registry.
        candidates: Vec<String>,
    },
    /// New workspaces cannot have the model.
    ModelWithdrawn {
        /// The runtime.
        runtime: String,
        /// The model.
        model: String,
        /// The owner.
        provider: String,
    },
    /// A credential that could not be read could change the decision.
    CredentialsUnreadable {
        /// The variables that could not be read.
        names: Vec<String>,
        /// Where they could not be read.
        scopes: Vec<Scope>,
        /// They could change the owner of the model, and not only the credential that is used.
        changes_owner: bool,
    },
    /// The platform owns the model, but its proxy is not available.
    MissingPlatformProxy {
        /// The model.
        model: String,
    },
    /// The owner takes no credential of a tenant.
    ProviderNotByok {
        /// The provider.
        provider: String,
        /// The model.
        model: String,
    },
    /// The owner needs a credential, and there is none.
    MissingCredential {
        /// The provider.
        provider: String,
        /// The name that people see.
        display_name: String,
        /// The model.
        model: String,
        /// The variables that it accepts and the runtime reads. If the runtime reads none of them, all that it accepts.
        accepted_env: Vec<String>,
        /// The runtime reads none of the variables.
        unread: bool,
        /// Other possible owners, with the variables that would make them the owner.
        others: Vec<(String, Vec<String>)>,
        /// For an owner whose variables the runtime does not read: its name, and where else to save its key.
        elsewhere: Option<(String, Place)>,
        /// A variable that is set and would be sent instead of the credential.
        blocking_name: Option<String>,
        /// A variable of another provider that is set, and the models that it could be used for.
        available: Option<(String, ModelChoice)>,
        /// Variables that are blank in the workspace and so hide the organization's values.
        hidden: Vec<String>,
        /// All variables of which one is needed, for programs.
        missing_env: Vec<String>,
    },
    /// The value cannot be what the variable is for.
    Malformed {
        /// The variable.
        env_name: String,
        /// The provider.
        provider: String,
        /// What is wrong, and where.
        fault: Malformation,
        /// Where to save a right value.
        save_as: Option<Place>,
        /// Where this value would be right, if there is such a place.
        right_place: Option<Place>,
    },
    /// The value is a secret that is not a key of any LLM provider.
    ForeignSecret {
        /// The variable.
        env_name: String,
        /// The provider.
        provider: String,
        /// The kind of secret, with its article.
        what: String,
        /// Where to save a key.
        save_as: Option<Place>,
    },
    /// The key administers an organization and cannot call models.
    AdministrativeKey {
        /// The variable.
        env_name: String,
        /// The provider.
        provider: String,
        /// The vendor whose key it is.
        vendor: String,
        /// Where to save a key.
        save_as: Option<Place>,
    },
    /// The workspace would send another value instead of one that would do.
    Shadowed {
        /// The value that it sends.
        sent: NameAndScope,
        /// Why that value does not do.
        why: ShadowCause,
        /// The value that would do.
        other: NameAndScope,
        /// The other value would also do in the variable of the first.
        replaceable: bool,
        /// The provider.
        provider: String,
    },
    /// The key is good, but the workspace sends it in the wrong header.
    WrongName {
        /// The variable.
        env_name: String,
        /// The provider.
        provider: String,
        /// The host that accepted it.
        host: String,
        /// The header in which the workspace sends it.
        sent_in: HeaderFamily,
        /// The header in which it was accepted.
        accepted_in: HeaderFamily,
        /// The variable whose value is sent in the accepted header.
        right_name: String,
        /// The provider accepts that variable.
        right_is_own: bool,
    },
    /// Another credential would be sent along to a vendor that is not its own.
    Exposed {
        /// The variables that would be sent along.
        env_names: Vec<String>,
        /// The host that they would go to.
        host: String,
    },
    /// The value looks like a key of another vendor.
    ForeignKey {
        /// The variable.
        env_name: String,
        /// The provider.
        provider: String,
        /// The host of the provider.
        host: String,
        /// The vendor whose key it looks like.
        vendor: String,
        /// It is an OAuth token and not a key.
        is_oauth: bool,
        /// Where to save a key.
        save_as: Option<Place>,
    },
    /// The provider was asked, or could not be asked, and the verdict is not VALID.
    Liveness(LivenessEvidence),
}

/// Where to save a credential so that the runtime uses it. If a remedy has no such place, the runtime reads no key of the provider.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// The variable.
    pub env_name: String,
    /// The variable holds Codex's auth.json, and the key goes into that file.
    pub in_auth_json: bool,
    /// The model to choose as well, if the place is not for the present model.
    pub with: Option<ModelChoice>,
}

/// Models to choose from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModelChoice {
    /// The provider that owns them.
    pub owner: String,
    /// One of the models.
    pub example: Option<String>,
}

/// A variable, and where its value is stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NameAndScope {
    /// The variable.
    pub env_name: String,
    /// Where its value is stored.
    pub scope: Scope,
}

/// Why the value that is sent does not do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ShadowCause {
    /// The variable is not one of the provider's.
    NotOfProvider,
    /// The value would be refused for this reason.
    Refused(Box<Refusal>),
}

/// Why a value is not sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Malformation {
    /// There is a control character, such as a line break.
    ControlCharacter {
        /// Its offset in bytes, from 0.
        at: usize,
        /// Only control characters and white space follow it.
        trailing: bool,
    },
    /// There is a byte that is not ASCII.
    NonAscii {
        /// Its offset in bytes, from 0.
        at: usize,
    },
    /// The value is too long.
    TooLong {
        /// The length in bytes.
        length: usize,
        /// The limit in bytes.
        limit: usize,
    },
    /// `Bearer ` is in front of it.
    BearerInFront,
    /// The variable's name is in front of it.
    NameInFront,
    /// It is in quotation marks.
    Quoted,
    /// It is a variable's name that was not replaced by its value.
    VariableName,
    /// It is a template that was not expanded.
    Template,
    /// Its middle is hidden by asterisks, as consoles show a key.
    Masked,
    /// It is a placeholder from an example.
    Placeholder,
    /// It is JSON without a token, or a piece of JSON.
    Json,
    /// It is only the beginning of a token.
    CutOff,
    /// A blank or a line break is in front of it and would be sent along.
    BlankInFront,
    /// A blank is behind it and would be sent along.
    BlankBehind,
    /// There is a blank within it.
    BlankWithin,
    /// It is an API key, and the variable is for a subscription's token.
    KeyForToken,
    /// It is a subscription's token, and the variable is for an API key.
    TokenForKey,
    /// It is a refresh token.
    RefreshToken,
    /// It is the code of a login that was not finished.
    AuthorizationCode,
    /// It is a whole credentials file instead of the token in it.
    CredentialsFile,
    /// It is not JSON, or only a part of a file.
    NoJson,
    /// It is JSON without a usable token or key.
    NoToken,
    /// It is a key instead of the file that holds one.
    KeyForFile,
    /// A blank or a line break is around the key in a file and would be sent along.
    BlankInFile,
    /// It is a refresh token instead of an API key.
    RefreshTokenForKey,
    /// A header's name is in front of it.
    HeaderInFront,
    /// It is two values, one after the other.
    TwoValues,
    /// A comma or a semicolon is behind it.
    Punctuation,
    /// It is what a program writes if it has no value.
    NoValue,
    /// It is a reference to a secret and not the secret.
    Reference,
    /// It is the address of a page.
    WebAddress,
    /// It is an e-mail address.
    Email,
}

/// A credential that was judged and is not VALID.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LivenessEvidence {
    /// The verdict, which is never VALID.
    pub verdict: Verdict,
    /// The variable.
    pub env_name: String,
    /// The provider.
    pub provider: String,
    /// The host that was asked; empty if none was.
    pub host: String,
    /// The status of its response, if there was one.
    pub upstream_status: Option<u16>,
    /// Hosts of the vendor in other regions. This host refuses their keys.
    pub siblings: Vec<String>,
    /// When to try again, if that can help.
    pub retry_after: Duration,
    /// Why no request was sent, if none was.
    pub withheld: Option<Withheld>,
    /// The limit of new keys that is used up, if that is why: `new_keys.per_caller`.
    pub used_up: Option<&'static str>,
    /// What kept a request from reaching the provider, if something did.
    pub unreached: Option<Unreached>,
    /// The time that the provider had to answer, if the decision's deadline ended it.
    pub cut_short: Option<Duration>,
    /// The reason that was read from the response, if there is one.
    pub cause: Option<Cause>,
    /// The workspace calls a base URL of the tenant's own.
    pub tenant_endpoint: bool,
    /// The plan that keys with this prefix belong to, and the providers for that plan.
    pub plan: Option<(String, Vec<String>)>,
    /// The model.
    pub model: String,
    /// Where to save a good credential.
    pub save_as: Option<Place>,
}

// === impl Place ===

impl Place {
    /// This variable, without further conditions.
    pub fn of(env_name: &str) -> Self {
        Self { env_name: env_name.to_owned(), in_auth_json: false, with: None }
    }
}

// === impl Refusal ===

impl Refusal {
    /// The machine-readable reason.
    pub const fn code(&self) -> DenyCode {
        match self {
            Self::OverrideNotAllowed => DenyCode::OverrideNotAllowed,
            Self::OverrideConflictsWithModel { .. } => DenyCode::OverrideConflictsWithModel,
            Self::RuntimeRequired => DenyCode::RuntimeRequired,
            Self::RuntimeUnsupported { .. } => DenyCode::RuntimeUnsupported,
            Self::ModelRequired { .. } => DenyCode::ModelRequired,
            Self::UnregisteredModel { .. } => DenyCode::UnregisteredModelForRuntime,
            Self::AmbiguousProvider { .. } => DenyCode::AmbiguousProvider,
            Self::ModelWithdrawn { .. } => DenyCode::ModelWithdrawn,
            Self::CredentialsUnreadable { .. } => DenyCode::CredentialScopeUnreadable,
            Self::MissingPlatformProxy { .. } => DenyCode::MissingPlatformProxy,
            Self::ProviderNotByok { .. } => DenyCode::ProviderNotByok,
            Self::MissingCredential { .. } => DenyCode::MissingByokCredential,
            Self::Malformed { .. } => DenyCode::MalformedByokCredential,
            Self::ForeignKey { .. } | Self::ForeignSecret { .. } | Self::AdministrativeKey { .. } => {
                DenyCode::InvalidByokCredential
            }
            Self::Shadowed { .. } => DenyCode::ShadowedByokCredential,
            Self::WrongName { .. } => DenyCode::WrongCredentialName,
            Self::Exposed { .. } => DenyCode::ExposedCredential,
            Self::Liveness(evidence) => evidence.code(),
        }
    }

    /// The variables of which one is needed, if a credential is missing.
    pub fn missing_env(&self) -> &[String] {
        match self {
            Self::MissingCredential { missing_env, .. } => missing_env,
            Self::OverrideNotAllowed
            | Self::OverrideConflictsWithModel { .. }
            | Self::RuntimeRequired
            | Self::RuntimeUnsupported { .. }
            | Self::ModelRequired { .. }
            | Self::UnregisteredModel { .. }
            | Self::AmbiguousProvider { .. }
            | Self::ModelWithdrawn { .. }
            | Self::CredentialsUnreadable { .. }
            | Self::MissingPlatformProxy { .. }
            | Self::ProviderNotByok { .. }
            | Self::Malformed { .. }
            | Self::ForeignKey { .. }
            | Self::ForeignSecret { .. }
            | Self::AdministrativeKey { .. }
            | Self::Shadowed { .. }
            | Self::WrongName { .. }
            | Self::Exposed { .. }
            | Self::Liveness(_) => &[],
        }
    }

    /// The scopes that could not be read, if that is the reason.
    pub fn unreadable_scopes(&self) -> &[Scope] {
        if let Self::CredentialsUnreadable { scopes, .. } = self { scopes } else { &[] }
    }

    /// The same refusal, with another place to save a credential.
    #[must_use]
    pub fn saved_as(mut self, place: Option<Place>) -> Self {
        if let Self::ForeignKey { save_as, .. } | Self::ForeignSecret { save_as, .. } | Self::AdministrativeKey { save_as, .. } =
            &mut self
        {
            *save_as = place;
        }
        self
    }

    /// Whether the same request may be allowed later without any change.
    pub fn retryable(&self) -> bool {
        // An address that this service may not call is not an outage.
        let is_address = matches!(self, Self::Liveness(LivenessEvidence { unreached: Some(Unreached::Address), .. }));
        self.code().retryable() && !is_address
    }

    /// When to try again. Set for every retryable refusal and for no other.
    pub fn retry_after(&self) -> Option<Duration> {
        let wait = match self {
            Self::Liveness(evidence) => evidence.retry_after,
            _ => UNREADABLE_RETRY_AFTER,
        };
        self.retryable().then_some(wait)
    }
}

// === impl Malformation ===

impl Malformation {
    /// Whether it is about a key, and not about a file or a token.
    pub const fn is_of_a_key(self) -> bool {
        !matches!(
            self,
            Self::NoJson
                | Self::NoToken
                | Self::RefreshToken
                | Self::AuthorizationCode
                | Self::CredentialsFile
                | Self::KeyForToken
        )
    }
}

// === impl LivenessEvidence ===

impl LivenessEvidence {
    /// A verdict on the credential in this variable, without further details.
    pub fn of(verdict: Verdict, provider: &str, env_name: &str) -> Self {
        Self {
            verdict,
            env_name: env_name.to_owned(),
            provider: provider.to_owned(),
            host: String::new(),
            upstream_status: None,
            siblings: Vec::new(),
            retry_after: Duration::ZERO,
            withheld: None,
            used_up: None,
            unreached: None,
            cut_short: None,
            cause: None,
            tenant_endpoint: false,
            plan: None,
            model: String::new(),
            save_as: None,
        }
    }

    /// The machine-readable reason.
    pub const fn code(&self) -> DenyCode {
        match self.verdict {
            // VALID is never refused. If it were, "not verifiable" would be the closest reason.
            Verdict::Valid | Verdict::NoServerSurface | Verdict::NotCalibrated | Verdict::ProbeDisabled => {
                DenyCode::ByokNotVerifiable
            }
            Verdict::Invalid | Verdict::Forbidden => DenyCode::InvalidByokCredential,
            Verdict::QuotaExhausted => DenyCode::ByokQuotaExhausted,
            Verdict::RateLimited => DenyCode::ByokProviderRateLimited,
            Verdict::ProviderError => DenyCode::ByokProviderError,
            Verdict::UnexpectedResponse => DenyCode::ByokUnexpectedResponse,
            Verdict::Timeout => DenyCode::ByokProbeTimeout,
            Verdict::Unreachable => DenyCode::ByokProviderUnreachable,
            Verdict::NotAttempted => DenyCode::ByokProbeNotAttempted,
        }
    }
}

/// `A, B and C`, or `nothing`.
pub fn listed(words: &[String]) -> String {
    joined(words, "and")
}

/// `A, B or C`, or `nothing`.
pub fn any_of(words: &[String]) -> String {
    joined(words, "or")
}

fn joined(words: &[String], last: &str) -> String {
    match words {
        [] => "nothing".into(),
        [one] => one.clone(),
        [most @ .., end] => format!("{} {last} {end}", most.join(", ")),
    }
}

#[cfg(test)]
mod tests {
    use strum::VariantArray;

    use super::*;

    #[test]
    fn lists_read_like_a_sentence() {
        let words = |n: usize| ["A", "B", "C"].iter().take(n).map(ToString::to_string).collect::<Vec<_>>();
        assert_eq!(listed(&words(0)), "nothing");
        assert_eq!(listed(&words(1)), "A");
        assert_eq!(any_of(&words(2)), "A or B");
        assert_eq!(listed(&words(3)), "A, B and C");
    }

    #[test]
    fn every_verdict_but_valid_has_its_code() {
        for &verdict in Verdict::VARIANTS {
            let refusal = Refusal::Liveness(LivenessEvidence {
                host: "api.acme.example".into(),
                retry_after: Duration::from_secs(3),
                model: "acme-large".into(),
                ..LivenessEvidence::of(verdict, "acme", "ACME_API_KEY")
            });
            assert!(!refusal.message().is_empty() && !refusal.remedy().is_empty());
            assert_eq!(refusal.retry_after().is_some(), refusal.code().retryable(), "{verdict}");
        }
    }
}
