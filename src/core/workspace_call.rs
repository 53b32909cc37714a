//! The request that a workspace will make: which variable's value the provider will read, in which header, and what travels along. Pure.

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

/// A provider's route in a runtime, and which names are the provider's own there.
#[derive(Debug, Clone)]
pub struct ArmRoute {
    /// What is known.
    pub route: Route,
    /// The registry's names, and those of the runtime's that no other provider has.
    pub own: Vec<String>,
    /// What becomes of blanks around a value.
    pub trims: Trims,
    /// A refused credential is followed by the next one.
    pub falls_back: bool,
    /// Names that the launcher takes out of the organization's credentials.
    stripped: Vec<String>,
}

/// A credential with where it is from.
#[derive(Debug, Clone, Copy)]
pub struct FoundCredential<'a> {
    /// Its name.
    pub env_name: &'a str,
    /// Its value.
    pub secret: &'a Arc<Secret>,
    /// Where it is stored.
    pub scope: Scope,
    /// It hides an organization row of the same name.
    pub shadows_organization: bool,
}

/// What the workspace will send.
#[derive(Debug)]
pub enum Prediction<'a> {
    /// Nothing that the provider accepts is there. This would be sent in its place, if it were.
    Missing(Option<&'a str>),
    /// It depends on these names, which could not be read.
    Unreadable(Vec<String>),
    /// This.
    Sends(WorkspaceCall<'a>),
}

/// The credentials of one request.
#[derive(Debug)]
pub struct WorkspaceCall<'a> {
    /// What the provider will read.
    pub judged: FoundCredential<'a>,
    /// Its name is one of the provider's own.
    pub is_own: bool,
    /// The runtime is known not to read that name.
    pub is_unread: bool,
    /// Different values under the provider's own names that are not used, the next one first.
    pub passed_over: Vec<FoundCredential<'a>>,
    /// Another base URL, where a variable moves it.
    pub moved_to: Option<&'a Url>,
    /// What else goes to the same host.
    pub also_sent: Vec<(FoundCredential<'a>, HeaderFamily)>,
}

// === impl Found ===

impl FoundCredential<'_> {
    /// Its name and its scope, for a denial's words.
    pub fn named(&self) -> NameAndScope {
        NameAndScope { env_name: self.env_name.to_owned(), scope: self.scope }
    }
}

// === impl ArmRoute ===

impl ArmRoute {
    /// Of a runtime of which something is known, for one of its providers. `others_accept`: another provider of the registry has this name.
    pub fn of(facts: &RuntimeFacts, provider: &Provider, others_accept: &dyn Fn(&str) -> bool) -> Option<Self> {
        let Provider { name, auth_env, auth_token_env, anthropic_base_url, .. } = provider;
        let route = facts.route(name, auth_env, auth_token_env.as_ref(), anthropic_base_url.as_ref())?;
        let mut own = provider.auth_env.clone();
        own.extend(route.reads.iter().filter(|name| !own.contains(name) && !others_accept(name)).cloned().collect::<Vec<_>>());
        let stripped = facts.organization_loses.iter().filter(|name| !provider.accepts(name)).cloned().collect();
        Some(Self { route, own, trims: facts.trims, falls_back: facts.falls_back, stripped })
    }

    /// Every name that takes part.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.own.iter().map(String::as_str).chain(self.route.names())
    }

    /// The provider's own names that the runtime reads, or those of which nobody knows that it does not.
    pub fn usable(&self) -> impl Iterator<Item = &String> {
        let reads = |name: &&String| self.route.reads.contains(name);
        let unknown = !self.route.is_certain() && !self.own.iter().any(|name| reads(&name));
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
pub fn predict<'a>(arm: Option<&'a ArmRoute>, provider: &'a Provider, credentials: &CredentialSet<'a>) -> Prediction<'a> {
    match arm {
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
        Some(arm) => predict_by(arm, credentials).unwrap_or_else(Prediction::Unreadable),
    }
}

fn predict_by<'a>(arm: &'a ArmRoute, credentials: &CredentialSet<'a>) -> Result<Prediction<'a>, Vec<String>> {
    let ArmRoute { route, own, .. } = arm;
    let lookup = |name| arm.lookup(credentials, name);
    let is_own = |name: &str| own.iter().any(|own| own == name);
    // An own value has to be there, whatever else is sent.
    let owned = own.iter().filter_map(|name| find(name, &lookup)).collect::<Vec<_>>();
    let beats = first(&route.beaten_by, &lookup)?;
    let read = first(&route.reads, &lookup)?;
    let Some(sent) = beats.or(read) else {
        // Nothing that it reads is there: what the registry accepts is judged, and is of no use to it.
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
    if owned.is_empty() {
        return match own.iter().filter(|name| matches!(lookup(name), Lookup::Unknown)).cloned().collect::<Vec<_>>() {
            unknown if unknown.is_empty() => Ok(Prediction::Missing(blocking_name(arm, sent.env_name))),
            unknown => Err(unknown),
        };
    }
    // The same value under one of the provider's own names is the provider's own, where it is sent as that one would be.
    let judged = if is_own(sent.env_name) || beats.is_some() {
        sent
    } else {
        owned.iter().find(|own| own.secret.same_as(sent.secret)).copied().unwrap_or(sent)
    };
    let mut passed_over: Vec<FoundCredential<'a>> = Vec::new();
    // Most workspaces have one value, and nothing that it could be taken for.
    let is_judged = |found: &FoundCredential<'_>| found.env_name == judged.env_name;
    if !owned.iter().all(is_judged) {
        let differs = |found: &FoundCredential<'_>| !found.secret.same_as(judged.secret) || !is_own(judged.env_name);
        let in_order = route.reads.iter().chain(own).filter(|name| is_own(name)).filter_map(|name| find(name, &lookup));
        for other in in_order.filter(|other| !is_judged(other) && differs(other)) {
            if passed_over.iter().all(|known| known.env_name != other.env_name) {
                passed_over.push(other);
            }
        }
    }
    let also_sent = route.also_sends.iter().filter_map(|(name, header)| Some((find(name, &lookup)?, *header)));
    let moved_to = route.by_env.iter().find(|(name, _)| find(name, &lookup).is_some()).map(|(_, base)| base);
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

/// This name, if it is read before one of the provider's own.
fn blocking_name<'a>(arm: &'a ArmRoute, sent: &'a str) -> Option<&'a str> {
    let mut behind = arm.route.beaten_by.iter().chain(&arm.route.reads).skip_while(|name| *name != sent);
    behind.any(|name| arm.own.contains(name)).then_some(sent)
}

/// The first of these names that holds a value, unless one before it could not be read.
fn first<'a>(names: &'a [String], lookup: &dyn Fn(&'a str) -> Lookup<'a>) -> Result<Option<FoundCredential<'a>>, Vec<String>> {
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

fn find<'a>(name: &'a str, lookup: &dyn Fn(&'a str) -> Lookup<'a>) -> Option<FoundCredential<'a>> {
    match lookup(name) {
        Lookup::Value { secret, scope, shadows_organization } => {
            Some(FoundCredential { env_name: name, secret, scope, shadows_organization })
        }
        Lookup::Nothing | Lookup::Unknown => None,
    }
}
