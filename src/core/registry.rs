//! The registry: which providers there are, and which of them each runtime can use for which models. A `Registry` exists only if its document is
//! valid.

mod check;
mod file;
mod overlap;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::Arc,
};

use foldhash::fast::FixedState;
use regex::Regex;

pub(crate) use self::check::is_loopback;

use crate::{
    core::catalogue::Probe,
    domain::{
        problem::{Loaded, Problems},
        protocol::{PLATFORM, Protocol},
        verdict::BillingMode,
    },
};

/// The built-in registry: the platform's facts, in our own words.
const EMBEDDED: &str = include_str!("registry/default.yaml");

/// A map by names that an operator has chosen. Callers only look names up, so the hash need not withstand names that are made to collide.
pub(super) type ByName<T> = HashMap<String, T, FixedState>;

/// Which provider owns which model.
#[derive(Debug)]
pub struct Registry {
    revision: Arc<str>,
    sha256: String,
    providers: Vec<Provider>,
    runtimes: BTreeMap<String, Runtime>,
    credential_names: BTreeSet<String>,
}

/// A provider of models.
#[derive(Debug)]
pub struct Provider {
    /// The unique name.
    pub name: String,
    /// The name that people see.
    pub display_name: String,
    /// The API that it speaks.
    pub protocol: Protocol,
    /// How it authenticates.
    pub auth: Auth,
    /// The base URL, if it is known: with placeholders filled, without a trailing slash.
    pub base_url: Option<url::Url>,
    /// The base URL for Anthropic's API, whatever the provider's protocol.
    pub anthropic_base_url: Option<url::Url>,
    /// The base URL differs from tenant to tenant and is not known here, so the provider cannot be asked.
    pub is_per_tenant: bool,
    /// The variables that may hold its credential, in the order in which they are tried. Never empty.
    pub auth_env: Arc<[String]>,
    /// The variable that passes the credential to the workspace's client. It says which header to try first.
    pub auth_token_env: Option<String>,
    /// A pattern for the models that it owns.
    pub pattern: Regex,
    /// The prefix of its model ids in requests.
    pub wire_model_prefix: String,
    /// Its models refuse a completion that does not enable thinking.
    pub thinking_required: bool,
    /// Probes in the registry itself. They replace those of the catalogue.
    pub probes: Vec<Probe>,
    /// Marked as deprecated. Has no influence on decisions.
    pub deprecated: bool,
}

/// How a provider authenticates.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Auth {
    /// By a key in a header.
    Key,
    /// By a subscription's OAuth credential, which is never sent.
    OAuth,
    /// By the machine's own cloud identity. There is no tenant credential.
    Ambient,
}

/// A runtime, with its providers in the order of the document.
#[derive(Debug, Default)]
pub struct Runtime {
    /// The name that people see; empty if it has none.
    pub display_name: String,
    /// The providers that it can use, and their models.
    pub offers: Vec<Offer>,
    /// The positions of the offers that list a model, by the model's id.
    exact: ByName<Vec<usize>>,
}

/// A provider as one runtime offers it.
#[derive(Debug)]
pub struct Offer {
    provider: usize,
    /// The position among all offers of the registry.
    pub index: usize,
    /// The models that it lists. If there are none, it owns models by the provider's pattern only.
    pub models: Vec<String>,
    /// Models that new workspaces cannot have. The provider still owns them.
    pub withdrawn: Vec<String>,
}

// === impl Registry ===

impl Registry {
    /// Reads a registry. `document` is its name in problems; `env` looks up the variables of `endpoint_vars`.
    pub fn parse(document: &str, bytes: &[u8], env: &dyn Fn(&str) -> Option<String>) -> Result<Loaded<Self>, Problems> {
        check::check(document, bytes, env)
    }

    /// The built-in registry.
    pub fn embedded(env: &dyn Fn(&str) -> Option<String>) -> Result<Loaded<Self>, Problems> {
        Self::parse("embedded registry", EMBEDDED.as_bytes(), env)
    }

    /// A hash of the document.
    pub fn revision(&self) -> &str {
        &self.revision
    }

    /// The same, for an answer to keep.
    pub fn shared_revision(&self) -> Arc<str> {
        Arc::clone(&self.revision)
    }

    /// The document's SHA-256 in hex.
    pub fn sha256(&self) -> &str {
        &self.sha256
    }

    /// All providers, in the order of the document.
    pub fn providers(&self) -> &[Provider] {
        &self.providers
    }

    /// The runtime with this name.
    pub fn runtime(&self, name: &str) -> Option<&Runtime> {
        self.runtimes.get(name)
    }

    /// All runtimes, sorted by name.
    pub fn runtimes(&self) -> impl Iterator<Item = (&str, &Runtime)> {
        self.runtimes.iter().map(|(name, runtime)| (name.as_str(), runtime))
    }

    /// Every variable that may hold a credential of some provider.
    pub fn credential_names(&self) -> &BTreeSet<String> {
        &self.credential_names
    }

    /// The provider of this offer.
    pub fn provider(&self, offer: &Offer) -> &Provider {
        #[expect(clippy::indexing_slicing, reason = "`check` builds offers from positions in `providers`, which never changes")]
        &self.providers[offer.provider]
    }

    /// The models that a runtime offers without a key of the tenant's own.
    pub fn keyless_models(&self, runtime: &Runtime) -> Vec<String> {
        let mut models = Vec::new();
        for offer in runtime.offers.iter().filter(|offer| self.provider(offer).is_platform()) {
            models.extend(offer.models.iter().filter(|model| !offer.withdrawn.contains(model)).cloned());
        }
        models
    }
}

// === impl Runtime ===

impl Runtime {
    fn new(display_name: String, offers: Vec<Offer>) -> Self {
        let mut exact: ByName<Vec<usize>> = ByName::default();
        for (index, offer) in offers.iter().enumerate() {
            for model in offer.models.iter().chain(&offer.withdrawn) {
                let listing = exact.entry(model.clone()).or_default();
                if !listing.contains(&index) {
                    listing.push(index);
                }
            }
        }
        Self { display_name, offers, exact }
    }

    /// The offers that list this model, in the order of the document. Withdrawn models count.
    pub fn listing(&self, model: &str) -> impl Iterator<Item = &Offer> + Clone {
        self.exact.get(model).into_iter().flatten().filter_map(|&index| self.offers.get(index))
    }
}

// === impl Provider ===

impl Provider {
    /// Whether the platform pays for this provider.
    pub fn is_platform(&self) -> bool {
        self.name == PLATFORM
    }

    /// Who pays for the provider's models.
    pub fn billing_mode(&self) -> BillingMode {
        if self.is_platform() { BillingMode::PlatformManaged } else { BillingMode::Byok }
    }

    /// Whether a variable with this name may hold its credential.
    pub fn accepts(&self, name: &str) -> bool {
        self.auth_env.iter().any(|accepted| accepted == name)
    }
}

// === impl Offer ===

impl Offer {
    /// Whether new workspaces cannot have this model.
    pub fn has_withdrawn(&self, model: &str) -> bool {
        self.withdrawn.iter().any(|withdrawn| withdrawn == model)
    }
}
