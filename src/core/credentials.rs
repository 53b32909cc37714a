//! The credentials of a request by name. Scopes are merged, and a credential that could not be read is never taken for a missing one.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use crate::{
    core::registry::{Provider, Registry, Runtime},
    domain::{
        request::{Credential, CredentialValue, Scope, WorkspaceSpec},
        secret::Secret,
    },
};

/// The credentials of one spec, merged by name in the way of the workspace's own environment.
#[derive(Debug)]
pub struct CredentialSet<'s> {
    rows: BTreeMap<&'s str, Rows<'s>>,
    workspace_unreadable: bool,
    organization_unreadable: bool,
}

#[derive(Debug, Default)]
struct Rows<'s> {
    workspace: Option<&'s CredentialValue>,
    organization: Option<&'s CredentialValue>,
}

/// What a variable holds.
#[derive(Debug, Clone, Copy)]
pub enum Lookup<'s> {
    /// A value that is not blank.
    Value {
        /// The value.
        secret: &'s Arc<Secret>,
        /// Where it is stored.
        scope: Scope,
        /// The organization has a credential with the same name, which this one hides.
        shadows_organization: bool,
    },
    /// No value, or a blank one.
    Nothing,
    /// It could not be read.
    Unknown,
}

// === impl CredentialSet ===

impl<'s> CredentialSet<'s> {
    /// The credentials of a spec, and the names that were left out because nothing uses them.
    pub fn of(spec: &'s WorkspaceSpec, known: &BTreeSet<String>) -> (Self, Vec<String>) {
        let mut rows: BTreeMap<&str, Rows<'_>> = BTreeMap::new();
        let mut dropped = BTreeSet::new();
        for Credential { env_name, scope, value } in &spec.credentials {
            if !known.contains(env_name) {
                dropped.insert(env_name.clone());
                continue;
            }
            let row = rows.entry(env_name).or_default();
            match scope {
                Scope::Workspace => row.workspace = Some(value),
                Scope::Organization => row.organization = Some(value),
            }
        }
        let unreadable = |scope| spec.unreadable_scopes.contains(&scope);
        let credentials = Self {
            rows,
            workspace_unreadable: unreadable(Scope::Workspace),
            organization_unreadable: unreadable(Scope::Organization),
        };
        (credentials, dropped.into_iter().collect())
    }

    /// What this variable holds. A credential of the workspace hides the organization's, even if it is blank or unreadable.
    pub fn lookup(&self, name: &str) -> Lookup<'s> {
        let row = self.rows.get(name);
        let (workspace, organization) = row.map_or((None, None), |row| (row.workspace, row.organization));
        match (workspace, organization) {
            (Some(value), hidden) => of_row(value, Scope::Workspace, hidden.is_some_and(|hidden| !is_blank(hidden))),
            // The workspace may have a credential with this name that could not be listed and would hide the organization's.
            (None, _) if self.workspace_unreadable => Lookup::Unknown,
            (None, Some(value)) => of_row(value, Scope::Organization, false),
            (None, None) if self.organization_unreadable => Lookup::Unknown,
            (None, None) => Lookup::Nothing,
        }
    }

    /// The scopes in which what these variables hold could not be read.
    pub fn unreadable_scopes(&self, names: &[String]) -> Vec<Scope> {
        let scope_of = |name: &String| {
            let row = self.rows.get(name.as_str());
            let of_workspace = row.and_then(|row| row.workspace);
            let is_workspace =
                of_workspace.map_or(self.workspace_unreadable, |value| matches!(value, CredentialValue::Unreadable));
            if is_workspace { Scope::Workspace } else { Scope::Organization }
        };
        names.iter().map(scope_of).collect::<BTreeSet<_>>().into_iter().collect()
    }

    /// Whether a blank value of the workspace hides a value of the organization.
    pub fn is_hidden(&self, name: &str) -> bool {
        let Some(Rows { workspace: Some(workspace), organization: Some(organization) }) = self.rows.get(name) else {
            return false;
        };
        is_blank(workspace) && !is_blank(organization)
    }

    /// Whether the variable holds a readable value that is not blank.
    pub fn has(&self, name: &str) -> bool {
        matches!(self.lookup(name), Lookup::Value { .. })
    }

    /// Whether anything could not be read, even if it does not matter.
    pub fn has_unreadable(&self) -> bool {
        let unreadable = |value: Option<&CredentialValue>| matches!(value, Some(CredentialValue::Unreadable));
        self.workspace_unreadable
            || self.organization_unreadable
            || self.rows.values().any(|row| unreadable(row.workspace) || unreadable(row.organization))
    }

    /// The variables that the runtime could use instead of the judged one: those that its other providers accept, and those that this provider
    /// accepts and that hold another value.
    pub fn conflicts(&self, registry: &Registry, runtime: &Runtime, provider: &Provider, judged: &str) -> Vec<String> {
        let Lookup::Value { secret: chosen, .. } = self.lookup(judged) else { return Vec::new() };
        let others = || runtime.offers.iter().map(|offer| registry.provider(offer)).filter(|other| other.name != provider.name);
        let conflicts = |name: &str| match self.lookup(name) {
            Lookup::Value { secret, .. } if provider.accepts(name) => !secret.same_as(chosen),
            Lookup::Value { .. } => others().any(|other| other.accepts(name)),
            Lookup::Nothing | Lookup::Unknown => false,
        };
        // Iterate over the spec's names: they are few, while a runtime's providers accept many.
        self.rows.keys().filter(|name| **name != judged && conflicts(name)).map(|name| (*name).to_owned()).collect()
    }
}

fn of_row(value: &CredentialValue, scope: Scope, shadows_organization: bool) -> Lookup<'_> {
    match value {
        CredentialValue::Unreadable => Lookup::Unknown,
        CredentialValue::Readable(secret) if secret.is_blank() => Lookup::Nothing,
        CredentialValue::Readable(secret) => Lookup::Value { secret, scope, shadows_organization },
    }
}

fn is_blank(value: &CredentialValue) -> bool {
    matches!(value, CredentialValue::Readable(secret) if secret.is_blank())
}
