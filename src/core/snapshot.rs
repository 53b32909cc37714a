//! The inputs of one decision: one version of registry, catalogue and policy, and what can be computed from them in advance.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    sync::Arc,
    time::SystemTime,
};

use foldhash::fast::FixedState;
use url::Url;

use crate::{
    core::{
        catalogue::Catalogue,
        derive::candidate_offers,
        endpoint::{Endpoint, NoSurface, base_url_names},
        oauth_credential::CredentialKind,
        policy::Policy,
        registry::{Offer, Provider, Registry, Runtime},
        runtimes::Delivery,
        workspace_call::CredentialRoute,
    },
    domain::{denial::Place, protocol::Surface},
};

/// One version of registry, catalogue and policy. A call uses the same snapshot from start to end.
#[derive(Debug, Clone)]
pub struct Snapshot {
    /// Which provider owns which model.
    pub registry: Arc<Registry>,
    /// How providers are asked.
    pub catalogue: Arc<Catalogue>,
    /// What the operator has decided.
    pub policy: Arc<Policy>,
    /// The source of the registry.
    pub registry_origin: Origin,
    /// The source of the catalogue.
    pub catalogue_origin: Origin,
    /// Where the configuration came from.
    pub configuration_origin: Origin,
    /// Settings whose values in the configuration are in force after a restart only.
    pub restart_needed: Vec<String>,
    /// Computed once from registry and catalogue. To compute it for every call would cost more than the rest of a decision.
    precomputed: Arc<Precomputed>,
}

/// What is computed from registry and catalogue.
#[derive(Debug)]
struct Precomputed {
    /// How each provider is asked, or why it cannot be asked.
    endpoints: BTreeMap<String, Result<Arc<Endpoint>, NoSurface>>,
    /// How each offer is used, by its index.
    uses: Vec<OfferUse>,
    /// Every credential name that a caller may send.
    credential_names: BTreeSet<String>,
    /// The same, to look one up.
    known_names: HashSet<String, FixedState>,
}

/// How a runtime uses a provider that it offers.
#[derive(Debug)]
pub struct OfferUse {
    /// How the provider's credential leaves a workspace, if that is known.
    pub route: Option<CredentialRoute>,
    /// The credential names that are read, sent or accepted.
    pub names: Arc<[String]>,
    /// The base-URL variables with which a workspace would call another host.
    pub base_url_env: Arc<[String]>,
    /// The endpoints that the runtime calls at other base URLs than the registry's.
    dialled: Vec<Dialled>,
    /// The endpoint at the registry's base URL.
    usual: Result<Arc<Endpoint>, NoSurface>,
}

#[derive(Debug)]
struct Dialled {
    base: Url,
    surface: Option<Surface>,
    endpoint: Result<Arc<Endpoint>, NoSurface>,
}

/// The source of a document.
#[derive(Debug, Clone)]
pub struct Origin {
    /// `embedded`, or the path of a file. For a configuration without a file, the other layers that it is made of.
    pub source: String,
    /// When it was loaded.
    pub loaded_at: SystemTime,
    /// Why a newer version is not in use; empty if there is none.
    pub last_reload_error: String,
    /// Since when that is so.
    pub failed_at: Option<SystemTime>,
}

// === impl Origin ===

impl Origin {
    /// Of a document that was loaded from this source, and that no newer version has failed to replace.
    pub fn new(source: String, loaded_at: SystemTime) -> Self {
        Self { source, loaded_at, last_reload_error: String::new(), failed_at: None }
    }
}

// === impl Snapshot ===

impl Snapshot {
    /// A snapshot of these versions.
    pub fn new(
        registry: Arc<Registry>,
        catalogue: Arc<Catalogue>,
        policy: Arc<Policy>,
        registry_origin: Origin,
        catalogue_origin: Origin,
    ) -> Self {
        let precomputed = Arc::new(Precomputed::from(&registry, &catalogue));
        let configuration_origin = Origin::new("defaults".to_owned(), registry_origin.loaded_at);
        let restart_needed = Vec::new();
        Self { registry, catalogue, policy, registry_origin, catalogue_origin, configuration_origin, restart_needed, precomputed }
    }

    /// All origins.
    pub fn origins(&self) -> [&Origin; 3] {
        [&self.registry_origin, &self.catalogue_origin, &self.configuration_origin]
    }

    /// How a provider of this registry is asked, or why it cannot be asked.
    pub fn endpoint(&self, provider: &Provider) -> Result<&Arc<Endpoint>, &NoSurface> {
        self.precomputed.endpoints.get(&provider.name).map_or(Err(&NoSurface::NoEndpoint), Result::as_ref)
    }

    /// How the runtime uses the provider of this offer.
    pub fn offer_use(&self, offer: &Offer) -> &OfferUse {
        #[expect(clippy::indexing_slicing, reason = "there is one for each offer of this registry, in their order")]
        &self.precomputed.uses[offer.index]
    }

    /// The endpoint that a workspace calls for this provider, with a value that is sent in this way.
    pub fn dialled<'s>(
        &'s self,
        provider: &Provider,
        offer_use: &'s OfferUse,
        delivery: Option<&Delivery>,
        moved_to: Option<&Url>,
    ) -> Result<&'s Arc<Endpoint>, &'s NoSurface> {
        let base = moved_to.or_else(|| delivery?.base.as_ref());
        // Probes in the registry are for the registry's base URL only.
        let Some(base) = base.filter(|_| provider.probes.is_empty()) else { return offer_use.usual.as_ref() };
        let surface = delivery.and_then(|delivery| delivery.surface);
        let dialled = offer_use.dialled.iter().find(|dialled| dialled.base == *base && dialled.surface == surface);
        dialled.map_or(Err(&NoSurface::NoEndpoint), |dialled| dialled.endpoint.as_ref())
    }

    /// Every credential name that could change the owner of this model or be used for it. Empty if the platform is the only possible owner, or if
    /// there is none.
    pub fn relevant_names(&self, runtime: &Runtime, model: &str) -> Arc<[String]> {
        let offers = candidate_offers(&self.registry, runtime, model);
        let providers = || offers.iter().map(|offer| self.registry.provider(offer));
        if providers().all(Provider::is_platform) {
            return Arc::default();
        }
        if let [only] = offers.as_slice() {
            return self.names_of(only);
        }
        let mut names: Vec<String> = Vec::new();
        for name in offers.iter().flat_map(|offer| self.offer_use(offer).names.iter()) {
            if !names.contains(name) {
                names.push(name.clone());
            }
        }
        names.into()
    }

    /// The same, if this offer is the only possible owner.
    pub fn names_of(&self, offer: &Offer) -> Arc<[String]> {
        if self.registry.provider(offer).is_platform() { Arc::default() } else { Arc::clone(&self.offer_use(offer).names) }
    }

    /// This variable as a place to save a key.
    pub fn place(&self, env_name: &str) -> Place {
        let in_auth_json = self.catalogue.credential_kind(env_name) == Some(CredentialKind::CodexAuthJson);
        Place { in_auth_json, ..Place::of(env_name) }
    }

    /// Every credential name that a caller may send: those in the registry and those that runtimes read.
    pub fn credential_names(&self) -> &BTreeSet<String> {
        &self.precomputed.credential_names
    }

    /// Whether a caller may send a credential with this name.
    pub fn is_credential_name(&self, name: &str) -> bool {
        self.precomputed.known_names.contains(name)
    }
}

// === impl Precomputed ===

impl Precomputed {
    fn from(registry: &Registry, catalogue: &Catalogue) -> Self {
        let endpoint_of = |provider: &Provider| (provider.name.clone(), Endpoint::of(provider, catalogue).map(Arc::new));
        let endpoints: BTreeMap<_, _> = registry.providers().iter().map(endpoint_of).collect();
        let mut uses: Vec<(usize, OfferUse)> = Vec::new();
        let mut credential_names = registry.credential_names().clone();
        let mut accepting: HashMap<&str, Vec<&str>> = HashMap::new();
        for provider in registry.providers() {
            for name in provider.auth_env.iter() {
                accepting.entry(name).or_default().push(&provider.name);
            }
        }
        for (runtime, found) in registry.runtimes() {
            let facts = catalogue.runtimes.get(runtime);
            for offer in &found.offers {
                let provider = registry.provider(offer);
                let others_accept =
                    |name: &str| accepting.get(name).is_some_and(|others| others.iter().any(|other| *other != provider.name));
                let route = facts
                    .filter(|_| !provider.is_platform())
                    .and_then(|facts| CredentialRoute::of(facts, provider, &others_accept));
                let usual = endpoints.get(&provider.name).cloned().unwrap_or(Err(NoSurface::NoEndpoint));
                let offer_use = OfferUse::of(route, provider, usual, catalogue);
                credential_names.extend(offer_use.names.iter().cloned());
                uses.push((offer.index, offer_use));
            }
        }
        uses.sort_by_key(|(index, _)| *index);
        let uses = uses.into_iter().map(|(_, offer_use)| offer_use).collect();
        let known_names = credential_names.iter().cloned().collect();
        Self { endpoints, uses, credential_names, known_names }
    }
}

// === impl OfferUse ===

impl OfferUse {
    /// The provider's variables that the runtime reads, as far as that is known.
    pub fn usable<'a>(&'a self, provider: &'a Provider) -> Vec<String> {
        self.route.as_ref().map_or_else(|| provider.auth_env.to_vec(), |route| route.usable().cloned().collect())
    }

    fn of(
        route: Option<CredentialRoute>,
        provider: &Provider,
        usual: Result<Arc<Endpoint>, NoSurface>,
        catalogue: &Catalogue,
    ) -> Self {
        let mut names: Vec<String> = Vec::new();
        let of_route = route.iter().flat_map(CredentialRoute::names);
        for name in provider.auth_env.iter().map(String::as_str).chain(of_route) {
            if !names.iter().any(|known| known == name) {
                names.push(name.to_owned());
            }
        }
        let mut dialled: Vec<Dialled> = Vec::new();
        if let Some(CredentialRoute { facts: route, .. }) = &route {
            let deliveries = std::iter::once(&route.delivery).chain(route.by_prefix.iter().map(|(_, delivery)| delivery));
            let moved = route.by_env.iter().map(|(_, base)| (base, route.delivery.surface));
            for (base, surface) in
                deliveries.filter_map(|delivery| Some((delivery.base.as_ref()?, delivery.surface))).chain(moved)
            {
                if !dialled.iter().any(|known| known.base == *base && known.surface == surface) {
                    let endpoint = Endpoint::dialled(provider, base, surface, catalogue).map(Arc::new);
                    dialled.push(Dialled { base: base.clone(), surface, endpoint });
                }
            }
        }
        let base_url_env = match route.as_ref().and_then(|route| route.facts.base_url_env.clone()) {
            Some(names) => names,
            None => base_url_names(provider, catalogue),
        };
        Self { route, names: names.into(), base_url_env: base_url_env.into(), dialled, usual }
    }
}
