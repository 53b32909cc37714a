//! What one decision is made by: one version of registry, catalogue and policy, with what follows from them.

use std::{collections::BTreeMap, sync::Arc, time::SystemTime};

use crate::core::{
    catalogue::Catalogue,
    endpoint::{Endpoint, NoSurface},
    policy::Policy,
    registry::{Provider, Registry},
};

/// What one decision is made by: one version of everything, for the whole call.
#[derive(Debug, Clone)]
pub struct Snapshot {
    /// Who owns what.
    pub registry: Arc<Registry>,
    /// How to ask.
    pub catalogue: Arc<Catalogue>,
    /// What the operator decided.
    pub policy: Arc<Policy>,
    /// Where the registry came from.
    pub registry_origin: Origin,
    /// Where the catalogue came from.
    pub catalogue_origin: Origin,
    /// How each provider is asked, or why not. It follows from registry and catalogue alone; made anew for every call, it cost
    /// more than all the rest of a decision.
    endpoints: Arc<BTreeMap<String, Result<Arc<Endpoint>, NoSurface>>>,
}

/// Where a document came from.
#[derive(Debug, Clone)]
pub struct Origin {
    /// `embedded`, or the file's path.
    pub source: String,
    /// When it was loaded.
    pub loaded_at: SystemTime,
    /// Why the version that should have followed it is not in force; empty if none should.
    pub last_reload_error: String,
}

// === impl Snapshot ===

impl Snapshot {
    /// These versions together.
    pub fn new(
        registry: Arc<Registry>,
        catalogue: Arc<Catalogue>,
        policy: Arc<Policy>,
        registry_origin: Origin,
        catalogue_origin: Origin,
    ) -> Self {
        let asked = |provider: &Provider| (provider.name.clone(), Endpoint::of(provider, &catalogue).map(Arc::new));
        let endpoints = Arc::new(registry.providers().iter().map(asked).collect());
        Self { registry, catalogue, policy, registry_origin, catalogue_origin, endpoints }
    }

    /// How a provider of this registry is asked, or why not.
    pub fn endpoint(&self, provider: &Provider) -> Result<&Arc<Endpoint>, &NoSurface> {
        self.endpoints.get(&provider.name).map_or(Err(&NoSurface::NoEndpoint), Result::as_ref)
    }
}
