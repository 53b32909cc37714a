//! The credentials of a request by name. Scopes are merged, and a credential that could not be read is never taken for a missing one.

use std::{collections::BTreeSet, sync::Arc};

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
    /// One for each name. They are few: comparing names one after another, most of them by length alone, is faster than a map.
    rows: Vec<Rows<'s>>,
    workspace_unreadable: bool,
    organization_unreadable: bool,
}

#[derive(Debug)]
struct Rows<'s> {
    name: &'s str,
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
    pub fn of(spec: &'s WorkspaceSpec, is_known: &dyn Fn(&str) -> bool) -> (Self, Vec<String>) {
        let mut rows: Vec<Rows<'_>> = Vec::with_capacity(spec.credentials.len());
        let mut dropped = BTreeSet::new();
        for Credential { env_name, scope, value } in &spec.credentials {
            if !is_known(env_name) {
                dropped.insert(env_name.clone());
                continue;
            }
            let (mut workspace, mut organization) = (None, None);
            match scope {
                Scope::Workspace => workspace = Some(value),
                Scope::Organization => organization = Some(value),
            }
            match rows.iter_mut().find(|row| row.name == env_name) {
                Some(row) => {
                    row.workspace = workspace.or(row.workspace);
                    row.organization = organization.or(row.organization);
                }
                None => rows.push(Rows { name: env_name, workspace, organization }),
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
        let (workspace, organization) = self.row(name);
        match (workspace, organization) {
            (Some(value), hidden) => of_row(value, Scope::Workspace, hidden.is_some_and(|hidden| !is_blank(hidden))),
            // The workspace may have a credential with this name that could not be listed and would hide the organization's.
            (None, _) if self.workspace_unreadable => Lookup::Unknown,
            (None, Some(value)) => of_row(value, Scope::Organization, false),
            (None, None) if self.organization_unreadable => Lookup::Unknown,
            (None, None) => Lookup::Nothing,
        }
    }

    /// The values of this variable in the workspace and in the organization.
    fn row(&self, name: &str) -> (Option<&'s CredentialValue>, Option<&'s CredentialValue>) {
        let row = self.rows.iter().find(|row| row.name == name);
        row.map_or((None, None), |row| (row.workspace, row.organization))
    }

    /// The scopes in which what these variables hold could not be read.
    pub fn unreadable_scopes(&self, names: &[String]) -> Vec<Scope> {
        let is_unreadable = |value: Option<&CredentialValue>, otherwise| {
            value.map_or(otherwise, |value| matches!(value, CredentialValue::Unreadable))
        };
        let scopes_of = |name: &String| {
            let (workspace, organization) = self.row(name);
            // A row of the workspace hides the organization's.
            let hides = workspace.is_some();
            let of_workspace = is_unreadable(workspace, self.workspace_unreadable).then_some(Scope::Workspace);
            let of_organization = !hides && is_unreadable(organization, self.organization_unreadable);
            of_workspace.into_iter().chain(of_organization.then_some(Scope::Organization))
        };
        names.iter().flat_map(scopes_of).collect::<BTreeSet<_>>().into_iter().collect()
    }

    /// Whether a blank value of the workspace hides a value of the organization.
    pub fn is_hidden(&self, name: &str) -> bool {
        let (Some(workspace), Some(organization)) = self.row(name) else { return false };
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
            || self.rows.iter().any(|row| unreadable(row.workspace) || unreadable(row.organization))
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
        let names = self.rows.iter().map(|row| row.name).filter(|name| *name != judged && conflicts(name));
        names.collect::<BTreeSet<_>>().into_iter().map(str::to_owned).collect()
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::request::OperatorOverride;

    #[test]
    fn only_a_blank_value_of_the_workspace_before_a_real_one_hides_it() {
        let credential = |scope, value: &str| Credential {
            env_name: "ACME_API_KEY".into(),
            scope,
            value: CredentialValue::Readable(Arc::new(Secret::new(value.to_owned()))),
        };
        for (workspace, organization, hidden) in [(" ", "made-up", true), (" ", "", false), ("made-up", "made-up", false)] {
            let spec = WorkspaceSpec {
                workspace_id: String::new(),
                organization_id: String::new(),
                runtime: String::new(),
                model: String::new(),
                credentials: vec![credential(Scope::Workspace, workspace), credential(Scope::Organization, organization)],
                unreadable_scopes: Vec::new(),
                operator_override: OperatorOverride::Derive,
                platform_proxy: None,
                tenant_base_url_env: Vec::new(),
            };
            let (credentials, _) = CredentialSet::of(&spec, &|_| true);
            assert_eq!(credentials.is_hidden("ACME_API_KEY"), hidden, "{workspace:?} {organization:?}");
        }
    }
}
