//! Every reason for a denial, with its evidence, its sentence and its remedy. One place, so that every checkpoint and every
//! caller reads the same words.

use crate::domain::verdict::{DenyCode, Unreached, Verdict, Withheld};
use std::time::Duration;

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
        /// The names that it accepts.
        accepted_env: Vec<String>,
    },
    /// The value cannot be a key.
    Malformed {
        /// The name.
        env_name: String,
        /// The provider.
        provider: String,
        /// What is wrong with it, and where.
        fault: Malformation,
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
    },
    /// The verdict on the credential.
    Liveness(LivenessEvidence),
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
            Self::ForeignKey { .. } => DenyCode::InvalidByokCredential,
            Self::Liveness(evidence) => evidence.code(),
        }
    }

    /// The reason in one or two sentences.
    pub fn message(&self) -> String {
        match self {
            Self::OverrideNotAllowed => "this service is configured to refuse operator overrides".into(),
            Self::OverrideConflictsWithModel { model } => {
                format!("the operator override asks for BYOK, but model `{model}` belongs to the platform")
            }
            Self::RuntimeRequired => "the workspace names no runtime".into(),
            Self::RuntimeUnsupported { runtime, known } => {
                format!("runtime `{runtime}` is not in the registry, which knows {}", listed(known))
            }
            Self::ModelRequired { runtime } => {
                format!("the workspace names no model for runtime `{runtime}`; there are no default models")
            }
            Self::UnregisteredModel { runtime, model } => {
                format!("no provider of runtime `{runtime}` owns model `{model}`")
            }
            Self::AmbiguousProvider { runtime, model, candidates } => format!(
                "model `{model}` on runtime `{runtime}` could belong to {}, and the credentials at hand single none out",
                listed(candidates)
            ),
            Self::ModelWithdrawn { runtime, model, provider } => {
                format!("model `{model}` of provider `{provider}` is withdrawn from runtime `{runtime}`")
            }
            Self::CredentialsUnreadable { names, changes_owner } => format!(
                "{} could not be read, and {} depends on it; unreadable is not taken for absent",
                listed(names),
                if *changes_owner { "who owns the model" } else { "which credential answers for the model" },
            ),
            Self::MissingPlatformProxy { model } => {
                format!("model `{model}` is billed to the platform, and the platform's model proxy is absent")
            }
            Self::ProviderNotByok { provider, model } => format!(
                "model `{model}` belongs to provider `{provider}`, which authenticates by ambient cloud identity; \
                 a tenant cannot bring a credential for it"
            ),
            Self::MissingCredential { provider, display_name, model, accepted_env } => format!(
                "model `{model}` belongs to {display_name} (provider `{provider}`) and needs the tenant's own credential; \
                 none of {} holds a value",
                listed(accepted_env)
            ),
            Self::Malformed { env_name, provider, fault } => {
                format!("the value of {env_name} cannot be a key for provider `{provider}`: {}; it was not sent", fault.text())
            }
            Self::ForeignKey { env_name, provider, host, vendor } => format!(
                "the value of {env_name} has the shape of a key of vendor `{vendor}`, but provider `{provider}` is at {host}; \
                 it was not sent"
            ),
            Self::Liveness(evidence) => evidence.message(),
        }
    }

    /// What to do about it.
    pub fn remedy(&self) -> String {
        match self {
            Self::OverrideNotAllowed => {
                "remove the override, or set `operator_overrides: honour` in the service's configuration".into()
            }
            Self::OverrideConflictsWithModel { .. } => {
                "pick a model of a provider that takes the tenant's own key, or remove the override".into()
            }
            Self::RuntimeRequired => "set the workspace's runtime".into(),
            Self::RuntimeUnsupported { .. } => {
                "use one of the registry's runtimes, or add this one to the registry or to `exempt_runtimes`".into()
            }
            Self::ModelRequired { .. } => "choose a model; ListModels shows what the runtime offers".into(),
            Self::UnregisteredModel { runtime, .. } => format!(
                "choose a model that runtime `{runtime}` offers (ListModels shows them); ids are compared exactly, \
                 so `a/b`, `a:b` and `b` are different models"
            ),
            Self::AmbiguousProvider { .. } => {
                "keep the credential of the one provider that is meant, or make the registry's patterns disjoint".into()
            }
            Self::ModelWithdrawn { .. } => "choose another model; ListModels shows which are withdrawn".into(),
            Self::CredentialsUnreadable { .. } => {
                "try again; if it goes on, repair the platform's secret store or its encryption key".into()
            }
            Self::MissingPlatformProxy { .. } => {
                "choose a model with a key of the tenant's own, or wire the platform's proxy and say that it is AVAILABLE".into()
            }
            Self::ProviderNotByok { .. } => "choose a model of another provider".into(),
            Self::MissingCredential { accepted_env, .. } => {
                format!("set {} as a secret of the workspace or of the organization, then try again", any_of(accepted_env))
            }
            Self::Malformed { env_name, fault, .. } => match fault {
                Malformation::ControlCharacter { trailing: true, .. } => {
                    format!("save {env_name} again without the line break or control character at its end")
                }
                Malformation::BearerInFront | Malformation::NameInFront | Malformation::Quoted => {
                    format!("save {env_name} again with the key alone")
                }
                Malformation::VariableName | Malformation::Template => {
                    format!("save the key itself as {env_name}: it is passed on as it is saved, and nothing in it is expanded")
                }
                Malformation::Masked => {
                    format!("the provider's console does not show this key again: make a new one there and save it as {env_name}")
                }
                Malformation::ControlCharacter { .. }
                | Malformation::NonAscii { .. }
                | Malformation::TooLong { .. }
                | Malformation::Placeholder
                | Malformation::Json
                | Malformation::CutOff => {
                    format!("copy the key from the provider's console again and save it as {env_name}")
                }
            },
            Self::ForeignKey { env_name, provider, vendor, .. } => {
                format!("save a key of provider `{provider}` as {env_name}, or choose a model of vendor `{vendor}`")
            }
            Self::Liveness(evidence) => evidence.remedy(),
        }
    }

    /// The names of which one is needed, where one is missing.
    pub fn missing_env(&self) -> &[String] {
        match self {
            Self::MissingCredential { accepted_env, .. } => accepted_env,
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
            | Self::Liveness(_) => &[],
        }
    }

    /// When to try again: on every retryable refusal, and on no other.
    pub fn retry_after(&self) -> Option<Duration> {
        if !self.code().retryable() {
            return None;
        }
        Some(match self {
            Self::Liveness(evidence) => evidence.retry_after,
            _ => UNREADABLE_RETRY_AFTER,
        })
    }
}

// === impl LivenessEvidence ===

impl LivenessEvidence {
    const fn code(&self) -> DenyCode {
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

    fn message(&self) -> String {
        let Self { verdict, env_name, provider, host, upstream_status, siblings: _, retry_after: _, withheld, unreached } = self;
        let status = upstream_status.map_or_else(String::new, |status| format!(" with HTTP {status}"));
        match verdict {
            Verdict::Invalid => {
                format!("{env_name} was found for provider `{provider}` but refused by {host}{status}")
            }
            Verdict::Forbidden => format!(
                "{env_name} was found for provider `{provider}` but {host} forbids it{status}: a dead key, one without the \
                 permission, or one that may not be used from this network"
            ),
            Verdict::QuotaExhausted => {
                format!("{host} says that the account behind {env_name} is out of credit or suspended{status}")
            }
            Verdict::RateLimited => format!("{host} limits the rate{status}, so {env_name} could not be verified"),
            Verdict::ProviderError => format!("{host} failed{status}, so {env_name} could not be verified"),
            Verdict::UnexpectedResponse => {
                format!("the answer of {host}{status} says nothing about {env_name}, which could not be verified")
            }
            Verdict::Timeout => format!("{host} gave no usable answer in time, so {env_name} could not be verified"),
            Verdict::Unreachable => {
                let why = match unreached {
                    Some(Unreached::Dns) => "could not be resolved",
                    Some(Unreached::Address) => "is at an address or in a scheme that this service may not dial",
                    Some(Unreached::Tls) => "could not be reached securely (TLS failed)",
                    Some(Unreached::Closed) => "closed the connection without an answer",
                    Some(Unreached::Protocol) => "answers with something that is not HTTP",
                    Some(Unreached::Connect) | None => "could not be reached",
                };
                format!("{host} {why}, so {env_name} could not be verified")
            }
            Verdict::NotAttempted => {
                let why = match withheld {
                    Some(Withheld::Queue) => "too many questions to this provider wait already",
                    Some(Withheld::Budget) => "its calls per second to this provider are spent",
                    Some(Withheld::NewKeys) => {
                        "too many new credentials were judged for this organization or caller within a minute"
                    }
                    Some(Withheld::Fault) | None => "a fault of its own",
                };
                format!("this service did not ask {host} about {env_name}: {why}")
            }
            Verdict::Valid | Verdict::NoServerSurface | Verdict::NotCalibrated | Verdict::ProbeDisabled => {
                format!("{env_name} for provider `{provider}` cannot be verified ({verdict})")
            }
        }
    }

    fn remedy(&self) -> String {
        let env_name = &self.env_name;
        match self.verdict {
            Verdict::Invalid | Verdict::Forbidden => {
                let sibling = if self.siblings.is_empty() {
                    String::new()
                } else {
                    format!("; a key of the same vendor's {} is refused here too", any_of(&self.siblings))
                };
                format!("check that the key is active, rotate it with the provider and save it as {env_name}{sibling}")
            }
            Verdict::QuotaExhausted => "add credit to the account with the provider, or use another key".into(),
            Verdict::RateLimited | Verdict::ProviderError | Verdict::Timeout => {
                "try again later; if it goes on, look at the provider's status page".into()
            }
            Verdict::UnexpectedResponse => {
                "try again later; if it goes on, check the provider's base URL in the registry and its row in the probe \
                 catalogue"
                    .into()
            }
            Verdict::Unreachable => {
                "try again later; if it goes on, check DNS, the service's way out to port 443 and the provider's base URL".into()
            }
            Verdict::NotAttempted => "try again later; if it goes on, look at this service's log".into(),
            Verdict::Valid | Verdict::NoServerSurface | Verdict::NotCalibrated | Verdict::ProbeDisabled => {
                "choose a provider whose keys can be verified, or let the policy group `unverifiable` allow".into()
            }
        }
    }
}

// === impl Malformation ===

impl Malformation {
    fn text(self) -> String {
        match self {
            Self::ControlCharacter { at, trailing: true } => {
                format!("it ends in a line break or another control character (byte {at})")
            }
            Self::ControlCharacter { at, trailing: false } => format!("it holds a control character at byte {at}"),
            Self::NonAscii { at } => format!("it holds a character that is not ASCII at byte {at}"),
            Self::TooLong { length, limit } => format!("it is {length} bytes long, and the limit is {limit}"),
            Self::BearerInFront => "`Bearer ` stands in front of it".into(),
            Self::NameInFront => "a variable's name and `=` stand in front of it".into(),
            Self::Quoted => "it stands in quotation marks".into(),
            Self::VariableName => "it is the name of a variable and not its value".into(),
            Self::Template => "it is a template that was not expanded".into(),
            Self::Masked => "part of it is hidden by asterisks".into(),
            Self::Placeholder => "it is a placeholder out of an example".into(),
            Self::Json => "it is JSON, or a piece of it, and holds no token".into(),
            Self::CutOff => "it is only the beginning of a token".into(),
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
            });
            assert!(!refusal.message().is_empty() && !refusal.remedy().is_empty());
            assert_eq!(refusal.retry_after().is_some(), refusal.code().retryable(), "{verdict}");
        }
    }
}
