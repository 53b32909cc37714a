//! The text of every denial: what is wrong and what to do, for the tenant, and a hint for the platform's operator. Holds names, hosts and statuses,
//! but never a credential's value.

use super::{
    denial::{LivenessEvidence, Malformation, ModelChoice, NameAndScope, Place, Refusal, ShadowCause, any_of, listed},
    duration::seconds,
    request::Scope,
    verdict::{Cause, Unreached, Verdict, Withheld},
};

// === impl Refusal ===

impl Refusal {
    /// What is wrong, in one or two sentences.
    pub fn message(&self) -> String {
        match self {
            Self::OverrideNotAllowed => "operator overrides are not allowed on this platform".into(),
            Self::OverrideConflictsWithModel { model } => {
                format!("the override asks for the tenant's own key, but model `{model}` belongs to the platform")
            }
            Self::RuntimeRequired => "the workspace names no runtime".into(),
            Self::RuntimeUnsupported { runtime, known } => {
                format!("runtime `{runtime}` is unknown; the known runtimes are {}", listed(known))
            }
            Self::ModelRequired { runtime } => {
                format!("the workspace names no model for runtime `{runtime}`; there is no default model")
            }
            Self::UnregisteredModel { runtime, model, .. } => format!("runtime `{runtime}` does not offer model `{model}`"),
            Self::AmbiguousProvider { runtime, model, candidates } => format!(
                "model `{model}` on runtime `{runtime}` could belong to {}, and the credentials that are set do not tell which",
                listed(candidates)
            ),
            Self::ModelWithdrawn { runtime, model, provider } => {
                format!("model `{model}` of provider `{provider}` is withdrawn from runtime `{runtime}`")
            }
            Self::CredentialsUnreadable { names, scopes, changes_owner } => format!(
                "{} could not be read from the {} secrets, so it is not known {}",
                listed(names),
                scopes.iter().map(|scope| format!("{}'s", scope_word(*scope))).collect::<Vec<_>>().join(" and the "),
                if *changes_owner { "who owns the model" } else { "which credential the workspace would use" },
            ),
            Self::MissingPlatformProxy { model } => {
                format!("model `{model}` is billed to the platform, whose model proxy is not available")
            }
            Self::ProviderNotByok { provider, model } => format!(
                "model `{model}` belongs to provider `{provider}`, which authenticates by a cloud identity; \
                 a tenant cannot bring a credential for it"
            ),
            Self::MissingCredential { provider, display_name, model, accepted_env, hidden, .. } => {
                let hidden = if hidden.is_empty() {
                    String::new()
                } else {
                    format!("; a blank {} of the workspace hides the organization's", listed(hidden))
                };
                format!(
                    "model `{model}` belongs to {display_name} (provider `{provider}`) and needs the tenant's own credential; \
                     {} {} not set{hidden}",
                    listed(accepted_env),
                    if accepted_env.len() == 1 { "is" } else { "are" },
                )
            }
            Self::Malformed { env_name, provider, fault, .. } => {
                format!("{env_name} cannot be a credential of provider `{provider}`: {}; it was not sent", fault.text())
            }
            Self::ForeignKey { env_name, provider, host, vendor, is_oauth, .. } => format!(
                "{env_name} holds what looks like {} of vendor `{vendor}`, but provider `{provider}` is at {host}; it was not sent",
                if *is_oauth { "an OAuth token" } else { "a key" }
            ),
            Self::ForeignSecret { env_name, provider, what, .. } => format!(
                "{env_name} holds what looks like {what}, which is no key of provider `{provider}` or of any LLM provider; \
                 it was not sent"
            ),
            Self::AdministrativeKey { env_name, vendor, .. } => format!(
                "{env_name} holds what looks like an administrative key of vendor `{vendor}`, which cannot call models; it was not sent"
            ),
            Self::Shadowed { sent, why, other, provider, .. } => format!(
                "the workspace uses {} for provider `{provider}` and not {}: {}",
                stored(sent),
                stored(other),
                match why {
                    ShadowCause::NotOfProvider => format!("{} is no credential of that provider", sent.env_name),
                    ShadowCause::Refused(refusal) => refusal.message(),
                }
            ),
            Self::WrongName { env_name, host, sent_in, accepted_in, .. } => format!(
                "the key in {env_name} is good, but the runtime sends {env_name} in {}, and {host} accepts it only in {}",
                sent_in.text(),
                accepted_in.text()
            ),
            Self::Exposed { env_names, host } => {
                format!("{} would be sent to {host} too, which is not {} own vendor", listed(env_names), their(env_names))
            }
            Self::Liveness(evidence) => evidence.message(),
        }
    }

    /// What the tenant can do.
    pub fn remedy(&self) -> String {
        match self {
            Self::OverrideNotAllowed => "remove the override".into(),
            Self::OverrideConflictsWithModel { .. } => {
                "choose a model of a provider that takes the tenant's own key, or remove the override".into()
            }
            Self::RuntimeRequired => "choose a runtime".into(),
            Self::RuntimeUnsupported { .. } => "choose one of these runtimes".into(),
            Self::ModelRequired { .. } => "choose a model that the runtime offers".into(),
            Self::UnregisteredModel { runtime, nearest, offered, .. } => {
                let nearest = nearest.as_ref().map_or_else(String::new, |model| format!("the closest model is `{model}`; "));
                let offers = if offered.is_empty() {
                    format!("choose a model that runtime `{runtime}` offers")
                } else {
                    format!("runtime `{runtime}` offers {}", listed(offered))
                };
                format!("{nearest}{offers}; ids are compared exactly: `a/b`, `a:b` and `b` are different models")
            }
            Self::AmbiguousProvider { .. } => "set only the credential of the provider that is meant".into(),
            Self::ModelWithdrawn { .. } => "choose another model".into(),
            Self::CredentialsUnreadable { .. } => "try again".into(),
            Self::MissingPlatformProxy { .. } => "choose a model that takes the tenant's own key, or try again later".into(),
            Self::ProviderNotByok { .. } => "choose a model of another provider".into(),
            Self::MissingCredential { hidden, .. } if !hidden.is_empty() => {
                let them = if hidden.len() == 1 { "it" } else { "them" };
                format!(
                    "give {} a value in the workspace's secrets, or remove {them} there so that the organization's value is used",
                    listed(hidden)
                )
            }
            Self::MissingCredential { accepted_env, unread, others, elsewhere, blocking_name, available, .. } => {
                let blocking_name =
                    blocking_name.iter().map(|name| format!(", and remove {name}, which the runtime sends in its place"));
                let own = format!("set {} as a secret of the workspace or of the organization", any_of(accepted_env));
                let own = (!unread).then(|| own + &blocking_name.collect::<String>());
                let others = others.iter().map(|(owner, names)| format!("{} for {owner}", any_of(names)));
                let elsewhere =
                    elsewhere.iter().map(|(owner, place)| format!("save a key of {owner} as {}{}", place.text(), place.choice()));
                let available =
                    available.iter().map(|(name, models)| format!("choose {}, which uses the {name} that is set", models.text()));
                let ways: Vec<String> = own.into_iter().chain(others).chain(elsewhere).chain(available).collect();
                if ways.is_empty() { READS_NO_KEY.to_owned() } else { ways.join("; or ") }
            }
            Self::Malformed { env_name, fault, save_as, right_place, .. } => {
                fault.remedy(env_name, save_as.as_ref(), right_place.as_ref())
            }
            Self::ForeignKey { provider, vendor, save_as, .. } => {
                let save = saved(save_as.as_ref(), |place| format!("save a key of provider `{provider}` as {place}"));
                if save_as.is_some() { format!("{save}; or choose a model of vendor `{vendor}`") } else { save }
            }
            Self::ForeignSecret { provider, save_as, .. } => {
                let save = saved(save_as.as_ref(), |place| format!("save a key of provider `{provider}` as {place}"));
                format!("{save}; and replace (rotate) the secret that was saved by mistake")
            }
            Self::AdministrativeKey { provider, save_as, .. } => saved(save_as.as_ref(), |place| {
                format!("make a key for the API in the console of provider `{provider}` and save it as {place}")
            }),
            Self::Shadowed { sent, other, replaceable, .. } => format!(
                "remove {} from the {}'s secrets{}",
                sent.env_name,
                scope_word(sent.scope),
                if *replaceable {
                    format!("; or replace the value of {} with that of {}", sent.env_name, other.env_name)
                } else {
                    String::new()
                }
            ),
            Self::WrongName { right_is_own: false, .. } => {
                "the runtime cannot send a key of this provider in that header; choose a model of another provider".into()
            }
            Self::WrongName { env_name, right_name, .. } => format!("save the key as {right_name} and remove {env_name}"),
            Self::Exposed { env_names, .. } => {
                format!(
                    "remove {} from the workspace's and the organization's secrets, or choose another model",
                    listed(env_names)
                )
            }
            Self::Liveness(evidence) => evidence.remedy(),
        }
    }

    /// What only the operator can do; empty if the tenant can do everything.
    pub fn operator_hint(&self) -> String {
        match self {
            Self::OverrideNotAllowed => "`operator_overrides: honour` in the service's configuration would allow it".into(),
            Self::RuntimeUnsupported { .. } => {
                "a runtime that calls no models goes into `exempt_runtimes`; any other into the registry".into()
            }
            Self::AmbiguousProvider { .. } => {
                "make the registry's patterns disjoint (`byok-gate check` names the overlaps)".into()
            }
            Self::UnregisteredModel { .. } => "a model that should be offered has to be added to the registry".into(),
            Self::CredentialsUnreadable { .. } => {
                "if this continues, check the platform's secret store and its encryption key".into()
            }
            Self::MissingPlatformProxy { .. } => {
                "wire the platform's model proxy, and say in the spec that it is AVAILABLE, or set `platform_proxy`".into()
            }
            Self::ProviderNotByok { .. } => "the registry offers a provider with `auth_mode: wif_adc` to tenants".into(),
            Self::Exposed { .. } => {
                "policy `exposure` is `deny` at this checkpoint; with `allow` there would be a warning only".into()
            }
            Self::WrongName { right_is_own: false, right_name, provider, .. } => format!(
                "the runtime sends {right_name} in the header that the host accepts: add {right_name} to `auth_env` of provider `{provider}` in the registry"
            ),
            Self::Shadowed { .. } | Self::WrongName { .. } => {
                "the catalogue's `runtimes:` say what the runtime sends; check that they hold for the version in use".into()
            }
            Self::Liveness(evidence) => evidence.operator_hint(),
            Self::OverrideConflictsWithModel { .. }
            | Self::RuntimeRequired
            | Self::ModelRequired { .. }
            | Self::ModelWithdrawn { .. }
            | Self::MissingCredential { .. }
            | Self::Malformed { .. }
            | Self::ForeignKey { .. }
            | Self::ForeignSecret { .. }
            | Self::AdministrativeKey { .. } => String::new(),
        }
    }
}

/// `KEY (of the workspace)`.
fn stored(NameAndScope { env_name, scope }: &NameAndScope) -> String {
    format!("{env_name} (of the {})", scope_word(*scope))
}

fn scope_word(scope: Scope) -> &'static str {
    match scope {
        Scope::Workspace => "workspace",
        Scope::Organization => "organization",
    }
}

/// The remedy if the runtime reads no variable of the provider.
const READS_NO_KEY: &str = "choose a model of another provider: the runtime reads no key of this one";

/// The remedy that names the place to save a key, if there is one. The model to choose as well comes last.
fn saved(place: Option<&Place>, say: impl FnOnce(&str) -> String) -> String {
    place.map_or_else(|| READS_NO_KEY.to_owned(), |place| say(&place.text()) + &place.choice())
}

// === impl Place ===

impl Place {
    /// The place, as it follows "save it as".
    pub fn text(&self) -> String {
        let Self { env_name, in_auth_json, .. } = self;
        if *in_auth_json { format!("{env_name}, in the form {KEY_IN_AUTH_JSON}") } else { env_name.clone() }
    }

    /// The model to choose as well, as it follows the rest of the sentence.
    pub fn choice(&self) -> String {
        self.with.as_ref().map_or_else(String::new, |with| format!(", and choose {}", with.text()))
    }
}

/// The form of a key in Codex's auth.json.
const KEY_IN_AUTH_JSON: &str = "`{\"OPENAI_API_KEY\": \"THE KEY\"}`";

// === impl ModelChoice ===

impl ModelChoice {
    fn text(&self) -> String {
        let example = self.example.as_ref().map_or_else(String::new, |model| format!(", such as `{model}`"));
        format!("a model of {}{example}", self.owner)
    }
}

fn their(names: &[String]) -> &'static str {
    if names.len() == 1 { "its" } else { "their" }
}

// === impl LivenessEvidence ===

impl LivenessEvidence {
    fn message(&self) -> String {
        let Self {
            verdict,
            env_name,
            provider,
            host,
            upstream_status,
            unreached,
            withheld,
            used_up,
            cut_short,
            cause,
            model,
            ..
        } = self;
        let status = upstream_status.map_or_else(String::new, |status| format!(" with HTTP {status}"));
        let why = cause.map_or_else(String::new, |cause| format!(" ({})", cause.text()));
        match verdict {
            Verdict::Invalid => format!("{host} refused {env_name} of provider `{provider}`{status}"),
            Verdict::Forbidden if *cause == Some(Cause::Restricted) => {
                format!("{env_name} is alive, but {host} does not let it call model `{model}`{status}")
            }
            Verdict::Forbidden => format!(
                "{host} forbids {env_name} of provider `{provider}`{status}: the key is dead, lacks the permission, or may not be \
                 used from this network"
            ),
            Verdict::QuotaExhausted => {
                format!("{host} says{status} that the account of {env_name} is out of credit or suspended")
            }
            Verdict::RateLimited => format!("{host} limits the rate{status}, so {env_name} could not be verified"),
            Verdict::ProviderError => format!("{host} failed{status}, so {env_name} could not be verified"),
            Verdict::UnexpectedResponse => {
                let answered =
                    upstream_status.map_or_else(|| "gave an answer".to_owned(), |status| format!("answered HTTP {status}"));
                format!("{env_name} could not be verified: {host} {answered}{why}, which does not show whether the key is good")
            }
            Verdict::Timeout => match cut_short {
                Some(time) => format!(
                    "{env_name} could not be verified: the call left {host} {} to answer, which was too little",
                    seconds(*time)
                ),
                None => format!("{host} gave no usable answer in time, so {env_name} could not be verified"),
            },
            Verdict::Unreachable => {
                let why = match unreached {
                    Some(Unreached::Address) => {
                        return format!(
                            "{env_name} could not be verified: this platform does not allow calls to the address or URL scheme of {host}"
                        );
                    }
                    Some(Unreached::Dns) => "could not be resolved",
                    Some(Unreached::ConnectTimeout) => "accepted no connection in time",
                    Some(Unreached::Tls) => "could not be reached securely (TLS failed)",
                    Some(Unreached::TlsExpired) => {
                        "could not be reached securely (its certificate has expired, or is not valid yet)"
                    }
                    Some(Unreached::TlsName) => "could not be reached securely (its certificate is for another name)",
                    Some(Unreached::TlsIssuer) => {
                        "could not be reached securely (its certificate is not from an authority that this platform trusts)"
                    }
                    Some(Unreached::Closed) => "closed the connection without an answer",
                    Some(Unreached::Protocol) => "answers with something that is not HTTP",
                    Some(Unreached::Proxy) => "could not be reached through this platform's proxy",
                    Some(Unreached::Connect) | None => "could not be reached",
                };
                format!("{host} {why}, so {env_name} could not be verified")
            }
            Verdict::NotAttempted => {
                let why = match withheld {
                    Some(Withheld::Queue) => "too many checks are waiting for this provider",
                    Some(Withheld::Budget) => "the limit of calls to this provider per second is reached",
                    Some(Withheld::NewKeys) => match used_up {
                        Some("new_keys.per_organization") => {
                            "too many new keys of this organization were checked within a minute"
                        }
                        Some("new_keys.per_caller") => "too many new keys of this workspace were checked within a minute",
                        _ => "too many new keys of this platform were checked within a minute",
                    },
                    Some(Withheld::Fault) | None => "the service that checks keys failed",
                };
                format!("{env_name} was not checked at {host}: {why}")
            }
            Verdict::NoServerSurface if self.tenant_endpoint => {
                format!("{env_name} of provider `{provider}` cannot be checked: the workspace dials a base URL of its own")
            }
            Verdict::Valid | Verdict::NoServerSurface | Verdict::NotCalibrated | Verdict::ProbeDisabled => {
                format!("{env_name} of provider `{provider}` cannot be checked ({verdict})")
            }
        }
    }

    fn remedy(&self) -> String {
        let Self { verdict, save_as, plan, siblings, cause, unreached, cut_short, .. } = self;
        match verdict {
            Verdict::Invalid | Verdict::Forbidden if plan.is_some() => {
                let (plan, providers) = plan.clone().unwrap_or_default();
                let choose = if providers.is_empty() {
                    "only the hosts of that plan accept it; use another key, or a model of a provider for that plan".to_owned()
                } else {
                    format!("choose a model of provider {}", any_of(&quoted(&providers)))
                };
                format!("this is a key of {plan}: {choose}")
            }
            Verdict::Forbidden if *cause == Some(Cause::Restricted) => {
                "give the key the permission for this model in the provider's console, or choose another model".into()
            }
            Verdict::Forbidden => saved(save_as.as_ref(), |place| {
                format!(
                    "check the key's permissions and allowed addresses in the provider's console; if a new key is needed, save it as \
                     {place}"
                )
            }),
            Verdict::Invalid => {
                let sibling = if siblings.is_empty() {
                    String::new()
                } else {
                    format!("; a key for {} is refused here too", any_of(siblings))
                };
                let save = saved(save_as.as_ref(), |place| {
                    format!("check that the key is active; make a new one if it is not, and save it as {place}")
                });
                if save_as.is_some() { save + &sibling } else { save }
            }
            Verdict::QuotaExhausted => "add credit to the account with the provider, or use another key".into(),
            Verdict::Timeout if cut_short.is_some() => "try again; if this continues, contact the platform's operator".into(),
            Verdict::RateLimited | Verdict::ProviderError | Verdict::Timeout => {
                "try again later; if this continues, check the provider's status page".into()
            }
            Verdict::Unreachable if *unreached == Some(Unreached::Address) => {
                "retrying will not help: contact the platform's operator, or choose a model of another provider".into()
            }
            Verdict::UnexpectedResponse | Verdict::Unreachable | Verdict::NotAttempted => {
                "try again later; if this continues, contact the platform's operator".into()
            }
            Verdict::NoServerSurface if self.tenant_endpoint => {
                "remove the base URL from the workspace's settings, so that the provider itself is used".into()
            }
            Verdict::Valid | Verdict::NoServerSurface | Verdict::NotCalibrated | Verdict::ProbeDisabled => {
                "choose a model of a provider whose keys can be checked".into()
            }
        }
    }

    fn operator_hint(&self) -> String {
        let Self { verdict, unreached, withheld, used_up, cut_short, host, tenant_endpoint, .. } = self;
        match verdict {
            Verdict::Unreachable => match unreached {
                Some(Unreached::Address) => format!(
                    "the address of {host} may not be dialled, or the base URL is plain http: name it in `egress.allow` or \
                     `egress.allow_plain_http` and restart byok-gate; a machine's metadata address is never dialled"
                ),
                Some(Unreached::Dns) => format!("look up {host} from the service's pod; its DNS may not know it"),
                Some(Unreached::Tls) => "the port may have no TLS: check the provider's base URL in the registry".into(),
                Some(Unreached::TlsExpired) => {
                    format!("the certificate of {host} has expired or is not valid yet; check the clock of the service's machine, too")
                }
                Some(Unreached::TlsName) => format!(
                    "what answers for {host} has a certificate for another name: check the base URL in the registry, the DNS entry and proxies"
                ),
                Some(Unreached::TlsIssuer) => format!(
                    "the certificate of {host} is not from an authority that the service trusts: `probe.ca_file` adds one; a proxy may break \
                     TLS open"
                ),
                Some(Unreached::ConnectTimeout) => format!(
                    "a firewall or NetworkPolicy may drop the packets from the service's pod to {host}: check egress to it, and whether \
                     the host is up"
                ),
                Some(Unreached::Proxy) => {
                    format!(
                        "`egress.proxy` could not be reached, or refuses connections to {host}: check its log and its credentials"
                    )
                }
                Some(Unreached::Connect | Unreached::Closed | Unreached::Protocol) | None => {
                    format!("check the service's network access to {host}, and the provider's base URL in the registry")
                }
            },
            Verdict::UnexpectedResponse => {
                "check the provider's base URL in the registry and its row in the probe catalogue".into()
            }
            Verdict::NotAttempted => match withheld {
                Some(Withheld::Queue) => {
                    "the provider is slow, or `provider_limits.in_flight` or `provider_limits.queue_time` is low for so many checks"
                        .into()
                }
                Some(Withheld::Budget) => "`provider_limits.per_second` limits the calls to a provider".into(),
                Some(Withheld::NewKeys) => format!(
                    "`{}` is used up: find out who tries so many keys, or raise it",
                    used_up.unwrap_or("new_keys.per_platform")
                ),
                Some(Withheld::Fault) | None => "the service's log says which fault".into(),
            },
            Verdict::Timeout if cut_short.is_some() => {
                "the call's deadline came before the provider's time was over (`probe.budget`, 3 s by default): give the caller 4 s; \
                 `caller_time_us` in the log shows what it gave, and `deadlines.decide` is the most that it may have"
                    .into()
            }
            Verdict::Timeout => format!(
                "{host} gave no answer within its time (`probe.budget`, 3 s by default): check the vendor's status page, and any proxy in \
                 between"
            ),
            Verdict::NoServerSurface if *tenant_endpoint => "policy `tenant_endpoint` is `deny` at this checkpoint".into(),
            Verdict::NoServerSurface | Verdict::NotCalibrated | Verdict::ProbeDisabled => {
                "policy `unverifiable` is `deny` at this checkpoint".into()
            }
            Verdict::Valid
            | Verdict::Invalid
            | Verdict::Forbidden
            | Verdict::QuotaExhausted
            | Verdict::RateLimited
            | Verdict::ProviderError => String::new(),
        }
    }
}

fn quoted(words: &[String]) -> Vec<String> {
    words.iter().map(|word| format!("`{word}`")).collect()
}

// === impl Malformation ===

impl Malformation {
    /// What is wrong, as it follows "cannot be a credential:". Characters are counted from 1.
    fn text(self) -> String {
        match self {
            Self::ControlCharacter { at: 0, .. } => "it begins with a line break or another control character".into(),
            Self::ControlCharacter { at, trailing: true } => {
                format!("it ends with a line break or another control character (after character {at})")
            }
            Self::ControlCharacter { at, trailing: false } => {
                format!("a line break or another control character follows character {at}")
            }
            Self::NonAscii { at } => format!("character {} is not ASCII", at + 1),
            Self::TooLong { length, limit } => format!("it is {length} bytes long, and the limit is {limit}"),
            Self::BearerInFront => "it begins with `Bearer `".into(),
            Self::NameInFront => "it begins with a variable's name and `=`".into(),
            Self::Quoted => "it is in quotation marks".into(),
            Self::VariableName => "it is the name of a variable and not its value".into(),
            Self::Template => "it is a template that was not expanded".into(),
            Self::Masked => "part of it is hidden by asterisks or dots".into(),
            Self::Placeholder => "it is a placeholder from an example".into(),
            Self::Json => "it is JSON, or part of it, without a token".into(),
            Self::CutOff => "it is only the beginning of a token".into(),
            Self::BlankInFront => "it begins with a blank, which the runtime is not known to remove".into(),
            Self::BlankBehind => "it ends with a blank, which the runtime is not known to remove".into(),
            Self::BlankWithin => "there is a blank in it".into(),
            Self::KeyForToken => "it is an API key, and this variable is for a subscription's token".into(),
            Self::TokenForKey => "it is a subscription's token, and the runtime sends this variable as an API key".into(),
            Self::RefreshToken => "it is a refresh token, which model calls do not accept".into(),
            Self::AuthorizationCode => "it is the code of a login that was not finished (`code#state`), not a token".into(),
            Self::CredentialsFile => "it is a whole credentials file, and this variable is for the token in it".into(),
            Self::NoJson => "it is not JSON, or only part of a file".into(),
            Self::NoToken => "it contains neither a usable token nor a key".into(),
            Self::KeyForFile => "it is a key alone, and this variable is for the file auth.json".into(),
            Self::BlankInFile => "the key in it begins or ends with a blank or line break, and codex does not remove it".into(),
            Self::RefreshTokenForKey => "it is a refresh token, not an API key".into(),
            Self::HeaderInFront => "it begins with a header's name".into(),
            Self::TwoValues => "it contains two values, one after the other".into(),
            Self::Punctuation => "it ends with a comma or a semicolon".into(),
            Self::NoValue => "it is what a program writes for a missing value, such as `undefined` or `null`".into(),
            Self::Reference => "it says where a secret is kept, and is not the secret".into(),
            Self::WebAddress => "it is the address of a page".into(),
            Self::Email => "it is an e-mail address".into(),
        }
    }

    /// What to do. `right` is the place where this value would be right.
    fn remedy(self, env_name: &str, save_as: Option<&Place>, right: Option<&Place>) -> String {
        let at_place = saved(save_as, |place| self.remedy_at(place));
        let Some(right) = right else { return at_place };
        let it = if self == Self::TokenForKey { "the token" } else { "the key" };
        let (place, choice) = (right.text(), right.choice());
        let instead = if choice.is_empty() {
            format!("save {it} as {place}, and remove {env_name}")
        } else {
            format!("save {it} as {place}, remove {env_name}{choice}")
        };
        if save_as.is_some() { format!("{at_place}; or {instead}") } else { instead }
    }

    /// What to do to save a right value at this place.
    fn remedy_at(self, place: &str) -> String {
        match self {
            Self::ControlCharacter { trailing: true, .. } | Self::BlankInFront | Self::BlankBehind => {
                format!("save {place} again without blanks or line breaks around it")
            }
            Self::BearerInFront | Self::HeaderInFront | Self::NameInFront | Self::Quoted | Self::Punctuation => {
                format!("save {place} again with the key alone")
            }
            Self::TwoValues => format!("save one of them alone as {place}"),
            Self::VariableName | Self::Template | Self::Reference => {
                format!("nothing in a saved value is expanded: save the key itself as {place}")
            }
            Self::Masked => {
                format!("the provider's console does not show this key again: make a new one there and save it as {place}")
            }
            Self::KeyForToken => format!("save the token that `claude setup-token` prints as {place}"),
            Self::TokenForKey | Self::RefreshTokenForKey => {
                format!("make an API key in the provider's console and save it as {place}")
            }
            Self::RefreshToken | Self::AuthorizationCode | Self::CredentialsFile => {
                format!("finish the login and save the token that it ends with as {place}")
            }
            Self::NoJson | Self::NoToken => {
                format!("log in once more and save the whole file that the login writes as {place}")
            }
            Self::KeyForFile => {
                format!("save it as {place}, or save there the whole file auth.json that a login writes")
            }
            Self::BlankInFile => format!("save the key as {place}, without blanks or line breaks around it"),
            Self::ControlCharacter { .. }
            | Self::NonAscii { .. }
            | Self::TooLong { .. }
            | Self::Placeholder
            | Self::NoValue
            | Self::WebAddress
            | Self::Email
            | Self::Json
            | Self::CutOff
            | Self::BlankWithin => format!("copy the key from the provider's console again and save it as {place}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_model_to_choose_comes_last() {
        let with = ModelChoice { owner: "Acme AI".into(), example: Some("acme-large".into()) };
        let elsewhere = Place { env_name: "ACME_API_KEY".into(), in_auth_json: false, with: Some(with) };
        let choice = ", and choose a model of Acme AI, such as `acme-large`";
        for (fault, sentence) in [
            (Malformation::BlankBehind, "save ACME_API_KEY again without blanks or line breaks around it"),
            (Malformation::Quoted, "save ACME_API_KEY again with the key alone"),
            (Malformation::Reference, "nothing in a saved value is expanded: save the key itself as ACME_API_KEY"),
        ] {
            assert_eq!(fault.remedy("OTHER_KEY", Some(&elsewhere), None), format!("{sentence}{choice}"));
        }
        let remedy = remedy_elsewhere(&elsewhere);
        assert_eq!(remedy, format!("save the key as ACME_API_KEY, remove OTHER_KEY{choice}"));
        let here = Place { with: None, ..elsewhere };
        assert_eq!(remedy_elsewhere(&here), "save the key as ACME_API_KEY, and remove OTHER_KEY");
    }

    /// The remedy for an API key that is right only at this place.
    fn remedy_elsewhere(place: &Place) -> String {
        Malformation::KeyForToken.remedy("OTHER_KEY", None, Some(place))
    }
}
