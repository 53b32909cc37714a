//! Predicts the request that a workspace will make: which variable's value the provider will read, in which header, and what else is sent along.
//! Pure.

use std::sync::Arc;

use url::Url;

use crate::{
    core::{
        credentials::{CredentialSet, Lookup},
        registry::Provider,
        runtimes::{Route, RuntimeFacts, Trims},
    },
    domain::{denial::NameAndScope, protocol::HeaderFamily, request::Scope, secret::Secret},
};

/// How a runtime sends the credentials of one of its providers.
#[derive(Debug, Clone)]
pub struct CredentialRoute {
    /// The known facts.
    pub facts: Route,
    /// The provider's own variables: those in the registry, and those that its route reads and no other provider accepts.
    pub own: Vec<String>,
    /// Whether the runtime removes blanks around a value.
    pub trims: Trims,
    /// After a refusal, the runtime tries the next credential.
    pub falls_back: bool,
    /// Variables that the launcher removes from the organization's credentials.
    stripped: Vec<String>,
}

/// A credential with its origin.
#[derive(Debug, Clone, Copy)]
pub struct FoundCredential<'a> {
    /// The variable that holds it.
    pub env_name: &'a str,
    /// The value.
    pub secret: &'a Arc<Secret>,
    /// Where it is stored.
    pub scope: Scope,
    /// The organization has a credential with the same name, which this one hides.
    pub shadows_organization: bool,
}

/// What the workspace will send.
#[derive(Debug)]
pub enum Prediction<'a> {
    /// No value that the provider accepts. Holds the variable that would be sent instead of one, if any.
    Missing(Option<&'a str>),
    /// It depends on these variables, which could not be read.
    Unreadable(Vec<String>),
    /// These credentials.
    Sends(WorkspaceCall<'a>),
}

/// The credentials in one request.
#[derive(Debug)]
pub struct WorkspaceCall<'a> {
    /// The credential that the provider will read.
    pub judged: FoundCredential<'a>,
    /// Its variable is one of the provider's own.
    pub is_own: bool,
    /// The runtime is known not to read that variable.
    pub is_unread: bool,
    /// Other values in the provider's own variables, which the provider does not read. The one that comes next is first. Some may be sent as well
    /// (`also_sent`).
    pub passed_over: Vec<FoundCredential<'a>>,
    /// The base URL that the request goes to, if a variable changes it.
    pub moved_to: Option<&'a Url>,
    /// Other credentials that are sent to the same host.
    pub also_sent: Vec<(FoundCredential<'a>, HeaderFamily)>,
}

// === impl FoundCredential ===

impl FoundCredential<'_> {
    /// Its variable and scope, for the text of a denial.
    pub fn named(&self) -> NameAndScope {
        NameAndScope { env_name: self.env_name.to_owned(), scope: self.scope }
    }
}

// === impl CredentialRoute ===

impl CredentialRoute {
    /// The route of a provider in a runtime, if facts are known. `others_accept` says whether another provider of the registry accepts a variable.
    pub fn of(facts: &RuntimeFacts, provider: &Provider, others_accept: &dyn Fn(&str) -> bool) -> Option<Self> {
        let Provider { name, auth_env, auth_token_env, anthropic_base_url, .. } = provider;
        let route = facts.route(name, auth_env, auth_token_env.as_ref(), anthropic_base_url.as_ref())?;
        let mut own = provider.auth_env.to_vec();
        own.extend(route.reads.iter().filter(|name| !own.contains(name) && !others_accept(name)).cloned().collect::<Vec<_>>());
        let stripped = facts.organization_loses.iter().filter(|name| !provider.accepts(name)).cloned().collect();
        Some(Self { facts: route, own, trims: facts.trims, falls_back: facts.falls_back, stripped })
    }

    /// Every variable that is read, sent or accepted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.own.iter().map(String::as_str).chain(self.facts.names())
    }

    /// The provider's own variables that the runtime reads. If the route is not certain and reads none of them, all of them.
    pub fn usable(&self) -> impl Iterator<Item = &String> {
        let reads = |name: &&String| self.facts.reads.contains(name);
        let unknown = !self.facts.is_certain() && !self.own.iter().any(|name| reads(&name));
        self.own.iter().filter(move |name| unknown || reads(name))
    }

    fn lookup<'a>(&'a self, credentials: &CredentialSet<'a>, name: &'a str) -> Lookup<'a> {
        match credentials.lookup(name) {
            Lookup::Value { scope: Scope::Organization, .. } if self.stripped.iter().any(|stripped| stripped == name) => {
                Lookup::Nothing
            }
            found => found,
        }
    }
}

/// What a workspace with these credentials will send to this provider.
pub fn predict<'a>(
    route: Option<&'a CredentialRoute>,
    provider: &'a Provider,
    credentials: &CredentialSet<'a>,
) -> Prediction<'a> {
    match route {
        None => {
            let lookup = |name| credentials.lookup(name);
            match first(&provider.auth_env, &lookup) {
                Ok(None) => Prediction::Missing(None),
                Err(unknown) => Prediction::Unreadable(unknown),
                Ok(Some(judged)) => {
                    let call = WorkspaceCall {
                        judged,
                        is_own: true,
                        is_unread: false,
                        passed_over: Vec::new(),
                        moved_to: None,
                        also_sent: Vec::new(),
                    };
                    Prediction::Sends(call)
                }
            }
        }
        Some(route) => predict_by(route, credentials).unwrap_or_else(Prediction::Unreadable),
    }
}

fn predict_by<'a>(route: &'a CredentialRoute, credentials: &CredentialSet<'a>) -> Result<Prediction<'a>, Vec<String>> {
    let CredentialRoute { facts, own, .. } = route;
    let lookup = |name| route.lookup(credentials, name);
    let is_own = |name: &str| own.iter().any(|own| own == name);
    // The provider needs a value of its own, whatever else is sent.
    let owned = || own.iter().filter_map(|name| find(name, &lookup));
    let overriding = first(&facts.beaten_by, &lookup)?;
    let read = first(&facts.reads, &lookup)?;
    let Some(sent) = overriding.or(read) else {
        // The runtime reads none of the variables that are set. Judge what the registry accepts, although the runtime does not use it.
        let Some(judged) = first(own, &lookup)? else { return Ok(Prediction::Missing(None)) };
        let call = WorkspaceCall {
            judged,
            is_own: true,
            is_unread: true,
            passed_over: Vec::new(),
            moved_to: None,
            also_sent: Vec::new(),
        };
        return Ok(Prediction::Sends(call));
    };
    if owned().next().is_none() {
        return match own.iter().filter(|name| matches!(lookup(name), Lookup::Unknown)).cloned().collect::<Vec<_>>() {
            unknown if unknown.is_empty() => Ok(Prediction::Missing(blocking_name(route, sent.env_name))),
            unknown => Err(unknown),
        };
    }
    // A foreign variable may hold the same value as one of the provider's own. Then judge the provider's own, because it is sent in the same way.
    let judged = if is_own(sent.env_name) || overriding.is_some() {
        sent
    } else {
        owned().find(|own| own.secret.same_as(sent.secret)).unwrap_or(sent)
    };
    let mut passed_over: Vec<FoundCredential<'a>> = Vec::new();
    // Most workspaces have only one value.
    let is_judged = |found: &FoundCredential<'_>| found.env_name == judged.env_name;
    if !owned().all(|found| is_judged(&found)) {
        let differs = |found: &FoundCredential<'_>| !found.secret.same_as(judged.secret) || !is_own(judged.env_name);
        let in_order = facts.reads.iter().chain(own).filter(|name| is_own(name)).filter_map(|name| find(name, &lookup));
        for other in in_order.filter(|other| !is_judged(other) && differs(other)) {
            if passed_over.iter().all(|known| known.env_name != other.env_name) {
                passed_over.push(other);
            }
        }
    }
    let also_sent = facts.also_sends.iter().filter_map(|(name, header)| Some((find(name, &lookup)?, *header)));
    let moved_to = facts.by_env.iter().find(|(name, _)| find(name, &lookup).is_some()).map(|(_, base)| base);
    let also_sent = also_sent.filter(|(found, _)| !found.secret.same_as(judged.secret)).collect();
    Ok(Prediction::Sends(WorkspaceCall {
        judged,
        is_own: is_own(judged.env_name),
        is_unread: false,
        passed_over,
        moved_to,
        also_sent,
    }))
}

/// The variable that is sent, if the runtime reads it before one of the provider's own.
fn blocking_name<'a>(route: &'a CredentialRoute, sent: &'a str) -> Option<&'a str> {
    let mut behind = route.facts.beaten_by.iter().chain(&route.facts.reads).skip_while(|name| *name != sent);
    behind.any(|name| route.own.contains(name)).then_some(sent)
}

/// The first of these variables that holds a value. `Err` names those before it that could not be read.
fn first<'a>(names: &'a [String], lookup: &impl Fn(&'a str) -> Lookup<'a>) -> Result<Option<FoundCredential<'a>>, Vec<String>> {
    let mut unknown = Vec::new();
    for name in names {
        match lookup(name) {
            Lookup::Value { secret, scope, shadows_organization } if unknown.is_empty() => {
                return Ok(Some(FoundCredential { env_name: name, secret, scope, shadows_organization }));
            }
            Lookup::Value { .. } => break,
            Lookup::Nothing => {}
            Lookup::Unknown => unknown.push(name.clone()),
        }
    }
    if unknown.is_empty() { Ok(None) } else { Err(unknown) }
}

fn find<'a>(name: &'a str, lookup: &impl Fn(&'a str) -> Lookup<'a>) -> Option<FoundCredential<'a>> {
    match lookup(name) {
        Lookup::Value { secret, scope, shadows_organization } => {
            Some(FoundCredential { env_name: name, secret, scope, shadows_organization })
        }
        Lookup::Nothing | Lookup::Unknown => None,
    }
}
