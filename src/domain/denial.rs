//! Every reason for a denial, with its evidence, its sentence and its remedy. One place, so that every checkpoint and every
//! caller reads the same words.

use std::time::Duration;

use crate::domain::{
    protocol::HeaderFamily,
    request::Scope,
    verdict::{Cause, DenyCode, Unreached, Verdict, Withheld},
};

/// When to ask again about a secret store that could not be read: such faults pass quickly.
const UNREADABLE_RETRY_AFTER: Duration = Duration::from_secs(2);

/// A reason for a denial. Names, hosts and statuses only: never a value, never the provider's own text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Refusal {
    /// Configuration refuses overrides.
    OverrideNotAllowed,
    /// The override says BYOK, the model is the platform's.
    OverrideConflictsWithModel {
        /// The model.
        model: String,
    },
    /// No runtime.
    RuntimeRequired,
    /// Unknown runtime.
    RuntimeUnsupported {
        /// The runtime asked for.
        runtime: String,
        /// Those that the registry knows.
        known: Vec<String>,
    },
    /// No model.
    ModelRequired {
        /// The runtime.
        runtime: String,
    },
    /// No owner.
    UnregisteredModel {
        /// The runtime.
        runtime: String,
        /// The model.
        model: String,
        /// The offered model that is written most like it.
        nearest: Option<String>,
        /// Some of what the runtime offers.
        offered: Vec<String>,
    },
    /// Several possible owners.
    AmbiguousProvider {
        /// The runtime.
        runtime: String,
        /// The model.
        model: String,
        /// The possible owners, in declared order.
        candidates: Vec<String>,
    },
    /// Withdrawn model.
    ModelWithdrawn {
        /// The runtime.
        runtime: String,
        /// The model.
        model: String,
        /// Its owner.
        provider: String,
    },
    /// What could not be read could change the answer.
    CredentialsUnreadable {
        /// The names in question.
        names: Vec<String>,
        /// It could change who owns the model, not only which value answers for it.
        changes_owner: bool,
    },
    /// No proxy for a platform model.
    MissingPlatformProxy {
        /// The model.
        model: String,
    },
    /// The provider takes no tenant credential.
    ProviderNotByok {
        /// The provider.
        provider: String,
        /// The model.
        model: String,
    },
    /// No credential.
    MissingCredential {
        /// The provider.
        provider: String,
        /// Its name for people.
        display_name: String,
        /// The model.
        model: String,
        /// The names that it accepts and the runtime reads; all that it accepts where the runtime reads none of them.
        accepted_env: Vec<String>,
        /// The runtime reads none of them.
        unread: bool,
        /// Who else could own the model, with the names that would make it so.
        others: Vec<(String, Vec<String>)>,
        /// Where a key goes whose own name the runtime does not read, with its owner.
        elsewhere: Option<(String, Place)>,
        /// A name that holds a value which would be sent in the credential's place.
        blocking_name: Option<String>,
        /// A name that is set, and the models that it would do for.
        available: Option<(String, ModelChoice)>,
        /// Names whose blank value in the workspace hides one of the organization's.
        hidden: Vec<String>,
        /// All names, for programs.
        missing_env: Vec<String>,
    },
    /// The value cannot be what its variable is for.
    Malformed {
        /// The name.
        env_name: String,
        /// The provider.
        provider: String,
        /// What is wrong with it, and where.
        fault: Malformation,
        /// Where what it should be is saved.
        save_as: Option<Place>,
        /// Where what it is belongs, if there is such a place.
        right_place: Option<Place>,
    },
    /// No key of an LLM provider at all.
    ForeignSecret {
        /// The name.
        env_name: String,
        /// The provider.
        provider: String,
        /// What it is, with its article.
        what: String,
        /// Where a key is saved.
        save_as: Option<Place>,
    },
    /// A key that administers an organization, and calls no model.
    AdministrativeKey {
        /// The name.
        env_name: String,
        /// The provider.
        provider: String,
        /// Whose.
        vendor: String,
        /// Where a key is saved.
        save_as: Option<Place>,
    },
    /// The workspace would send another value than the one that would do.
    Shadowed {
        /// What it sends.
        sent: NameAndScope,
        /// Why that is no use.
        why: ShadowCause,
        /// What would do.
        other: NameAndScope,
        /// The other value would do under the name of this one.
        replaceable: bool,
        /// The provider.
        provider: String,
    },
    /// Good, in a header in which the workspace does not send it.
    WrongName {
        /// The name.
        env_name: String,
        /// The provider.
        provider: String,
        /// Who accepted it.
        host: String,
        /// In which header it is sent.
        sent_in: HeaderFamily,
        /// In which it was accepted.
        accepted_in: HeaderFamily,
        /// The name under which it is sent in that.
        right_name: String,
        /// The provider accepts that name.
        right_is_own: bool,
    },
    /// Another credential would travel along.
    Exposed {
        /// Which.
        env_names: Vec<String>,
        /// Where to.
        host: String,
    },
    /// Another vendor's key.
    ForeignKey {
        /// The name.
        env_name: String,
        /// The provider.
        provider: String,
        /// The host that it would have been sent to.
        host: String,
        /// Whose key it looks like.
        vendor: String,
        /// It is no key but a token that its vendor's programs log in with.
        is_oauth: bool,
        /// Where a key is saved.
        save_as: Option<Place>,
    },
    /// The verdict on the credential.
    Liveness(LivenessEvidence),
}

/// Where a credential is saved so that the runtime uses it. Where a remedy has none, the runtime reads no key of the provider.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// The variable.
    pub env_name: String,
    /// The variable holds Codex's auth.json, and a key goes into that.
    pub in_auth_json: bool,
    /// What has to be chosen with it, where it does not serve the present model.
    pub with: Option<ModelChoice>,
}

/// Models to choose from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModelChoice {
    /// Whose.
    pub owner: String,
    /// One of them.
    pub example: Option<String>,
}

/// A variable, and where its value is stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NameAndScope {
    /// Its name.
    pub env_name: String,
    /// Its scope.
    pub scope: Scope,
}

/// Why a value that wins is no use.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ShadowCause {
    /// Its variable is none of the provider's.
    NotOfProvider,
    /// It would have been refused by itself, for this.
    Refused(Box<Refusal>),
}

/// What makes a value unfit to be sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Malformation {
    /// A control character at this byte, the last one of the value or not.
    ControlCharacter {
        /// Its offset in bytes, from 0.
        at: usize,
        /// Nothing but control characters and white space follows.
        trailing: bool,
    },
    /// A byte that is not ASCII.
    NonAscii {
        /// Its offset in bytes, from 0.
        at: usize,
    },
    /// Too long.
    TooLong {
        /// Its length in bytes.
        length: usize,
        /// The limit in bytes.
        limit: usize,
    },
    /// The header's scheme stands in front of it.
    BearerInFront,
    /// Its variable's name stands in front of it.
    NameInFront,
    /// Quotation marks stand around it.
    Quoted,
    /// It is a variable's name, which nothing has put a value in for.
    VariableName,
    /// It is a template that was not expanded.
    Template,
    /// Its middle is asterisks, as consoles show a key that they no longer tell.
    Masked,
    /// It is an example's placeholder.
    Placeholder,
    /// It is a piece of JSON, or JSON that holds no token.
    Json,
    /// It is the beginning of a token and no more.
    CutOff,
    /// A blank or line break stands in front of it, and is sent along.
    BlankInFront,
    /// The same behind it.
    BlankBehind,
    /// A blank stands within it.
    BlankWithin,
    /// An API key in the place of a subscription's token.
    KeyForToken,
    /// A subscription's token in the place of an API key.
    TokenForKey,
    /// A refresh token.
    RefreshToken,
    /// The code of a login that was not finished.
    AuthorizationCode,
    /// A whole credentials file in the place of its token.
    CredentialsFile,
    /// No JSON, or not all of it.
    NoJson,
    /// JSON without a usable token or key.
    NoToken,
    /// A key alone in the place of the file that it goes into.
    KeyForFile,
    /// A blank or line break stands around the key in a file, and is sent along.
    BlankInFile,
    /// A refresh token in the place of an API key.
    RefreshTokenForKey,
    /// A header's name stands in front of it.
    HeaderInFront,
    /// Two values, one behind the other.
    TwoValues,
    /// A comma or a semicolon stands behind it.
    Punctuation,
    /// What a program writes where it has no value.
    NoValue,
    /// It says where a secret is kept.
    Reference,
    /// The address of a page.
    WebAddress,
    /// An e-mail address.
    Email,
}

/// A credential that was judged, and what came of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LivenessEvidence {
    /// The verdict; never VALID.
    pub verdict: Verdict,
    /// The name.
    pub env_name: String,
    /// The provider.
    pub provider: String,
    /// The host asked; empty if none.
    pub host: String,
    /// Its status, if it answered.
    pub upstream_status: Option<u16>,
    /// Other regions of the same vendor, whose keys this host refuses.
    pub siblings: Vec<String>,
    /// When to try again, where that makes sense.
    pub retry_after: Duration,
    /// Why nothing was asked, where nothing was.
    pub withheld: Option<Withheld>,
    /// What failed on the way, where something did.
    pub unreached: Option<Unreached>,
    /// The answer's own reason, where it has one.
    pub cause: Option<Cause>,
    /// The workspace dials a host of the tenant's choosing.
    pub tenant_endpoint: bool,
    /// What plan the key's beginning tells of, and which providers are for it.
    pub plan: Option<(String, Vec<String>)>,
    /// The model.
    pub model: String,
    /// Where a good one is saved.
    pub save_as: Option<Place>,
}

// === impl Place ===

impl Place {
    /// This variable, as it is.
    pub fn of(env_name: &str) -> Self {
        Self { env_name: env_name.to_owned(), in_auth_json: false, with: None }
    }
}

// === impl Refusal ===

impl Refusal {
    /// The machine's reason.
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

    /// The names of which one is needed, where one is missing.
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

    /// The same, with this as the place where a good one is saved.
    #[must_use]
    pub fn saved_as(mut self, place: Option<Place>) -> Self {
        if let Self::ForeignKey { save_as, .. } | Self::ForeignSecret { save_as, .. } | Self::AdministrativeKey { save_as, .. } =
            &mut self
        {
            *save_as = place;
        }
        self
    }

    /// The same request may be allowed later with nothing changed.
    pub fn retryable(&self) -> bool {
        // An address that this service may not dial is no outage.
        let is_address = matches!(self, Self::Liveness(LivenessEvidence { unreached: Some(Unreached::Address), .. }));
        self.code().retryable() && !is_address
    }

    /// When to try again: on every retryable refusal, and on no other.
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
    /// It is about a key, and not about the file or the token that a variable holds.
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
    /// The machine's reason.
    pub const fn code(&self) -> DenyCode {
        match self.verdict {
            // VALID is never refused; if a caller were to build it, the nearest truth is that it could not be verified.
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
                verdict,
                env_name: "ACME_API_KEY".into(),
                provider: "acme".into(),
                host: "api.acme.example".into(),
                upstream_status: None,
                siblings: vec![],
                retry_after: Duration::from_secs(3),
                withheld: None,
                unreached: None,
                cause: None,
                tenant_endpoint: false,
                plan: None,
                model: "acme-large".into(),
                save_as: None,
            });
            assert!(!refusal.message().is_empty() && !refusal.remedy().is_empty());
            assert_eq!(refusal.retry_after().is_some(), refusal.code().retryable(), "{verdict}");
        }
    }
}
