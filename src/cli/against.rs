//! `byok-gate check --against`: compares two versions of registry and catalogue. It shows which provider owns and who pays for each model, and
//! where credentials are sent.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Value, json};

use crate::core::{
    catalogue::Catalogue,
    derive::{Underivable, candidate_offers, derive},
    endpoint::target,
    registry::Registry,
};

/// One version of both documents.
#[derive(Clone, Copy)]
pub(super) struct Side<'s> {
    pub(super) registry: &'s Registry,
    pub(super) catalogue: &'s Catalogue,
}

/// All differences between two versions, in a fixed order.
pub(super) struct Changes {
    models: Vec<ModelChange>,
    patterns: Vec<PatternChange>,
    sent: Vec<CredentialRoute>,
    no_longer_sent: Vec<CredentialRoute>,
}

/// The change of one model on one runtime.
struct ModelChange {
    runtime: String,
    model: String,
    /// The only credential name that is available; empty for none.
    available: String,
    before: Owner,
    after: Owner,
}

/// The owner of a model, in the terms that matter to a tenant.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Owner {
    /// The provider, or a word in upper case that says why there is none.
    provider: String,
    billing_mode: &'static str,
    /// Empty for the platform, whose models need no credential of the tenant.
    accepted_env: Vec<String>,
    /// Whether the runtime offers it: `LISTED`, `WITHDRAWN`, or `UNLISTED` where it is owned by pattern, or by no provider.
    offer: &'static str,
}

/// The change of the pattern by which a provider owns unlisted models of a runtime. `None` if the provider is not there.
struct PatternChange {
    runtime: String,
    provider: String,
    before: Option<Unlisted>,
    after: Option<Unlisted>,
}

/// How a provider owns models that no list names.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Unlisted {
    pattern: String,
    accepted_env: Vec<String>,
}

/// A credential of this name may be sent to this host in this header.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct CredentialRoute {
    env_name: String,
    host: String,
    header: &'static str,
    provider: String,
}

// === impl Changes ===

impl Changes {
    /// The changes from `old` to `new`.
    pub(super) fn between(old: Side<'_>, new: Side<'_>) -> Self {
        let (before, after) = (credential_routes(old), credential_routes(new));
        Self {
            models: models(old.registry, new.registry),
            patterns: patterns(old.registry, new.registry),
            sent: after.difference(&before).cloned().collect(),
            no_longer_sent: before.difference(&after).cloned().collect(),
        }
    }

    pub(super) fn json(&self) -> Value {
        let Self { models, patterns, sent, no_longer_sent } = self;
        let owner = |owner: &Owner| {
            let Owner { provider, billing_mode, accepted_env, offer } = owner;
            json!({"provider": provider, "billing_mode": billing_mode, "accepted_env": accepted_env, "offer": offer})
        };
        let model = |change: &ModelChange| {
            let ModelChange { runtime, model, available, before, after } = change;
            json!({"runtime": runtime, "model": model, "at_hand": available, "before": owner(before), "after": owner(after)})
        };
        let pattern = |change: &PatternChange| {
            let PatternChange { runtime, provider, before, after } = change;
            let unlisted = |unlisted: &Option<Unlisted>| {
                unlisted
                    .as_ref()
                    .map(|Unlisted { pattern, accepted_env }| json!({"pattern": pattern, "accepted_env": accepted_env}))
            };
            json!({"runtime": runtime, "provider": provider, "before": unlisted(before), "after": unlisted(after)})
        };
        let route = |sent: &CredentialRoute| {
            let CredentialRoute { env_name, host, header, provider } = sent;
            json!({"env_name": env_name, "host": host, "header": header, "provider": provider})
        };
        json!({
            "models": models.iter().map(model).collect::<Vec<_>>(),
            "patterns": patterns.iter().map(pattern).collect::<Vec<_>>(),
            "credentials_sent": sent.iter().map(route).collect::<Vec<_>>(),
            "credentials_no_longer_sent": no_longer_sent.iter().map(route).collect::<Vec<_>>(),
        })
    }

    pub(super) fn text(&self) -> String {
        let Self { models, patterns, sent, no_longer_sent } = self;
        let mut out = String::new();
        let mut section = |title: &str, lines: Vec<String>| {
            if !lines.is_empty() {
                out.push_str(&format!("\n{title}\n"));
                out.extend(lines.iter().map(|line| format!("  {line}\n")));
            }
        };
        section("models:", models.iter().map(ModelChange::text).collect());
        let pattern = |PatternChange { runtime, provider, before, after }: &PatternChange| {
            format!(
                "{runtime}: `{provider}` owns by pattern {} -> {}",
                pattern_text(before.as_ref()),
                pattern_text(after.as_ref())
            )
        };
        section("unlisted models:", patterns.iter().map(pattern).collect());
        let route = |CredentialRoute { env_name, host, header, provider }: &CredentialRoute| {
            format!("{env_name} -> {host} in `{header}` (provider `{provider}`)")
        };
        section("credentials that may be sent, and could not be before:", sent.iter().map(route).collect());
        section("credentials that are not sent any more:", no_longer_sent.iter().map(route).collect());
        if out.is_empty() { "\nnothing changes for people\n".into() } else { out }
    }
}

impl ModelChange {
    fn text(&self) -> String {
        let Self { runtime, model, available, before, after } = self;
        let with = if available.is_empty() { String::new() } else { format!(" with {available} available") };
        let mut parts = Vec::new();
        let mut part = |label: &str, one: String, two: String| {
            if one != two {
                parts.push(format!("{label} {one} -> {two}"));
            }
        };
        part("owner", before.provider.clone(), after.provider.clone());
        part("billing", before.billing_mode.to_owned(), after.billing_mode.to_owned());
        part("accepts", listed(&before.accepted_env), listed(&after.accepted_env));
        part("offer", before.offer.to_owned(), after.offer.to_owned());
        format!("{runtime} {model}{with}: {}", parts.join(", "))
    }
}

fn listed(names: &[String]) -> String {
    if names.is_empty() { "nothing".into() } else { names.join("|") }
}

fn pattern_text(unlisted: Option<&Unlisted>) -> String {
    unlisted.map_or_else(
        || "nothing".into(),
        |Unlisted { pattern, accepted_env }| format!("`{pattern}`, accepting {}", listed(accepted_env)),
    )
}

/// Compares every pair of runtime and model that either version lists: without any credential name, and with each relevant name alone.
fn models(old: &Registry, new: &Registry) -> Vec<ModelChange> {
    let mut pairs: BTreeSet<(&str, &str)> = BTreeSet::new();
    for (name, runtime) in old.runtimes().chain(new.runtimes()) {
        let models = runtime.offers.iter().flat_map(|offer| offer.models.iter().chain(&offer.withdrawn));
        pairs.extend(models.map(|model| (name, model.as_str())));
    }
    let mut changes = Vec::new();
    for (runtime, model) in pairs {
        let names: BTreeSet<String> = [old, new]
            .into_iter()
            .filter_map(|registry| Some((registry, registry.runtime(runtime)?)))
            .flat_map(|(registry, runtime)| {
                candidate_offers(registry, runtime, model).into_iter().map(|offer| registry.provider(offer))
            })
            .flat_map(|provider| provider.auth_env.iter().cloned())
            .collect();
        let change = |available: &str| {
            let (before, after) = (owner(old, runtime, model, available), owner(new, runtime, model, available));
            ModelChange { runtime: runtime.to_owned(), model: model.to_owned(), available: available.to_owned(), before, after }
        };
        let without = change("");
        for with in names.iter().map(|name| change(name)) {
            // A name that makes no difference is covered by the line without it.
            if (&with.before, &with.after) != (&without.before, &without.after) && with.before != with.after {
                changes.push(with);
            }
        }
        if without.before != without.after {
            changes.push(without);
        }
    }
    changes.sort_by(|one, two| (&one.runtime, &one.model, &one.available).cmp(&(&two.runtime, &two.model, &two.available)));
    changes
}

fn owner(registry: &Registry, runtime: &str, model: &str, available: &str) -> Owner {
    let unowned =
        |why: &str| Owner { provider: why.to_owned(), billing_mode: "NONE", accepted_env: Vec::new(), offer: "UNLISTED" };
    match derive(registry, runtime, model, &|name| name == available) {
        Ok(derived) => Owner {
            provider: derived.provider.name.clone(),
            billing_mode: derived.provider.billing_mode().as_str(),
            accepted_env: if derived.provider.is_platform() { Vec::new() } else { derived.provider.auth_env.to_vec() },
            offer: match derived.offer {
                offer if offer.has_withdrawn(model) => "WITHDRAWN",
                offer if offer.models.iter().any(|listed| listed == model) => "LISTED",
                _ => "UNLISTED",
            },
        },
        Err(Underivable::UnknownRuntime) => unowned("RUNTIME_UNSUPPORTED"),
        Err(Underivable::ModelRequired | Underivable::Unregistered) => unowned("UNREGISTERED"),
        Err(Underivable::Ambiguous { .. }) => unowned("AMBIGUOUS"),
    }
}

fn patterns(old: &Registry, new: &Registry) -> Vec<PatternChange> {
    let of = |registry: &Registry| -> BTreeMap<(String, String), Unlisted> {
        let offers = registry.runtimes().flat_map(|(name, runtime)| runtime.offers.iter().map(move |offer| (name, offer)));
        offers
            .map(|(runtime, offer)| {
                let provider = registry.provider(offer);
                let (pattern, accepted_env) = (provider.pattern.as_str().to_owned(), provider.auth_env.to_vec());
                ((runtime.to_owned(), provider.name.clone()), Unlisted { pattern, accepted_env })
            })
            .collect()
    };
    let (before, after) = (of(old), of(new));
    let keys: BTreeSet<_> = before.keys().chain(after.keys()).collect();
    keys.into_iter()
        .map(|key| {
            let (runtime, provider) = key.clone();
            PatternChange { runtime, provider, before: before.get(key).cloned(), after: after.get(key).cloned() }
        })
        .filter(|change| change.before != change.after)
        .collect()
}

/// Where credentials may be sent: the hosts and headers of the providers of all runtimes.
fn credential_routes(Side { registry, catalogue }: Side<'_>) -> BTreeSet<CredentialRoute> {
    let mut routes = BTreeSet::new();
    let offers = registry.runtimes().flat_map(|(_, runtime)| &runtime.offers);
    for provider in offers.map(|offer| registry.provider(offer)) {
        let Ok(target) = target(provider, catalogue, "") else { continue };
        for family in target.calls.iter().flat_map(|call| &call.probe.auth) {
            routes.extend(provider.auth_env.iter().map(|env_name| CredentialRoute {
                env_name: env_name.clone(),
                host: target.endpoint.host.clone(),
                header: family.header(),
                provider: provider.name.clone(),
            }));
        }
    }
    routes
}
