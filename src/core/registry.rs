//! The registry: providers, and which of them each runtime can use for which models. Valid by construction.

mod check;
mod file;
mod overlap;

use std::collections::{BTreeMap, BTreeSet, HashMap};

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

/// The registry that is built in: our own text around the platform's facts.
const EMBEDDED: &str = include_str!("registry/default.yaml");

/// All that is known about who owns which model.
#[derive(Debug)]
pub struct Registry {
    revision: String,
    sha256: String,
    providers: Vec<Provider>,
    runtimes: BTreeMap<String, Runtime>,
    credential_names: BTreeSet<String>,
}

/// One provider.
#[derive(Debug)]
pub struct Provider {
    /// Its unique name.
    pub name: String,
    /// Its name for people.
    pub display_name: String,
    /// The API it speaks.
    pub protocol: Protocol,
    /// How it authenticates.
    pub auth: Auth,
    /// Where it is, if it can be called at all: placeholders resolved, no trailing slash.
    pub base_url: Option<url::Url>,
    /// Where it can be called by Anthropic's API, whatever its protocol.
    pub anthropic_base_url: Option<url::Url>,
    /// Its base URL differs from tenant to tenant and is not known here: nothing can be asked.
    pub is_per_tenant: bool,
    /// The credential names that it accepts, in the order in which they are tried. Never empty.
    pub auth_env: Vec<String>,
    /// The variable through which a workspace hands the credential to its client; tells the header family to try first.
    pub auth_token_env: Option<String>,
    /// Models that it owns by pattern.
    pub pattern: Regex,
    /// What it puts before a model id on the wire.
    pub wire_model_prefix: String,
    /// Its models refuse a completion that does not ask for thinking.
    pub thinking_required: bool,
    /// Probes written into the registry itself; they win over the catalogue.
    pub probes: Vec<Probe>,
    /// The registry marks it so; it decides nothing.
    pub deprecated: bool,
}

/// How a provider authenticates.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Auth {
    /// A key in a header.
    Key,
    /// A subscription's OAuth credential, which is never exercised.
    OAuth,
    /// The machine's own cloud identity: there is no tenant credential.
    Ambient,
}

/// One runtime: its providers in declared order.
#[derive(Debug, Default)]
pub struct Runtime {
    /// Its name for people; empty if it has none.
    pub display_name: String,
    /// The providers that it can use.
    pub arms: Vec<Arm>,
    /// Arms that list a model id, by the id.
    exact: HashMap<String, Vec<usize>>,
}

/// One provider of a runtime.
#[derive(Debug)]
pub struct Arm {
    provider: usize,
    /// Its place among all arms of the registry.
    pub index: usize,
    /// The models that it lists; none for a name-only arm, which owns by pattern alone.
    pub models: Vec<String>,
    /// Models that new workspaces cannot have; it still owns them.
    pub withdrawn: Vec<String>,
}

// === impl Registry ===

impl Registry {
    /// Reads a registry. `document` names it in problems; `env` answers for `endpoint_vars`.
    pub fn parse(document: &str, bytes: &[u8], env: &dyn Fn(&str) -> Option<String>) -> Result<Loaded<Self>, Problems> {
        check::check(document, bytes, env)
    }

    /// The embedded registry.
    pub fn embedded(env: &dyn Fn(&str) -> Option<String>) -> Result<Loaded<Self>, Problems> {
        Self::parse("embedded registry", EMBEDDED.as_bytes(), env)
    }

    /// Content hash.
    pub fn revision(&self) -> &str {
        &self.revision
    }

    /// SHA-256 of the file, in hex.
    pub fn sha256(&self) -> &str {
        &self.sha256
    }

    /// All providers, in declared order.
    pub fn providers(&self) -> &[Provider] {
        &self.providers
    }

    /// A runtime, by its name as given.
    pub fn runtime(&self, name: &str) -> Option<&Runtime> {
        self.runtimes.get(name)
    }

    /// All runtimes, by name.
    pub fn runtimes(&self) -> impl Iterator<Item = (&str, &Runtime)> {
        self.runtimes.iter().map(|(name, runtime)| (name.as_str(), runtime))
    }

    /// Every credential name that some provider accepts.
    pub fn credential_names(&self) -> &BTreeSet<String> {
        &self.credential_names
    }

    /// The provider of an arm.
    pub fn provider(&self, arm: &Arm) -> &Provider {
        #[expect(clippy::indexing_slicing, reason = "`check` builds arms from positions in `providers`, which never changes")]
        &self.providers[arm.provider]
    }

    /// What a runtime offers without a key of the tenant's own.
    pub fn keyless_models(&self, runtime: &Runtime) -> Vec<String> {
        let mut models = Vec::new();
        for arm in runtime.arms.iter().filter(|arm| self.provider(arm).is_platform()) {
            models.extend(arm.models.iter().filter(|model| !arm.withdrawn.contains(model)).cloned());
        }
        models
    }
}

// === impl Runtime ===

impl Runtime {
    fn new(display_name: String, arms: Vec<Arm>) -> Self {
        let mut exact: HashMap<String, Vec<usize>> = HashMap::new();
        for (index, arm) in arms.iter().enumerate() {
            for model in arm.models.iter().chain(&arm.withdrawn) {
                let listing = exact.entry(model.clone()).or_default();
                if !listing.contains(&index) {
                    listing.push(index);
                }
            }
        }
        Self { display_name, arms, exact }
    }

    /// The arms that list this model id, in declared order; a withdrawn id counts.
    pub fn listing(&self, model: &str) -> impl Iterator<Item = &Arm> + Clone {
        self.exact.get(model).into_iter().flatten().filter_map(|&index| self.arms.get(index))
    }
}

// === impl Provider ===

impl Provider {
    /// The platform pays for this one.
    pub fn is_platform(&self) -> bool {
        self.name == PLATFORM
    }

    /// Who pays for its models.
    pub fn billing_mode(&self) -> BillingMode {
        if self.is_platform() { BillingMode::PlatformManaged } else { BillingMode::Byok }
    }

    /// It accepts a credential of this name.
    pub fn accepts(&self, name: &str) -> bool {
        self.auth_env.iter().any(|accepted| accepted == name)
    }
}

// === impl Arm ===

impl Arm {
    /// The model is withdrawn here.
    pub fn has_withdrawn(&self, model: &str) -> bool {
        self.withdrawn.iter().any(|withdrawn| withdrawn == model)
    }
}
