//! What agent programs, and the launchers before them, do with credentials: which variables they read, in which header they send them, to
//! which host. Facts with their source and version, as data: `runtimes:` in the catalogue.

mod check;
mod file;

use std::collections::{BTreeMap, BTreeSet};

use url::Url;

pub(crate) use self::{check::check, file::RuntimeFile};
use crate::domain::protocol::{HeaderFamily, Surface};

/// The facts, by runtime.
#[derive(Debug, Clone, Default)]
pub struct Runtimes {
    by_name: BTreeMap<String, RuntimeFacts>,
    /// Every variable that some runtime takes a base URL from.
    base_url_names: BTreeSet<String>,
}

/// What is known of one runtime.
#[derive(Debug, Clone)]
pub struct RuntimeFacts {
    /// For which version it was seen or read.
    pub version: String,
    /// Where that is from.
    pub sources: Vec<String>,
    /// How well it is known.
    pub certainty: Certainty,
    /// What becomes of blanks around a value.
    pub trims: Trims,
    /// Names that are taken out of the organization's credentials unless the provider accepts them: the launcher's doing.
    pub organization_loses: BTreeSet<String>,
    /// A refused credential is followed by the next one of the same provider.
    pub falls_back: bool,
    general: Option<General>,
    routes: BTreeMap<String, Route>,
    base_url_env: Option<Vec<String>>,
}

/// Of a runtime that sends variables whatever the provider is.
#[derive(Debug, Clone)]
struct General {
    /// In which header each of them travels.
    headers: BTreeMap<String, HeaderFamily>,
    surface: Surface,
}

/// How a provider's credential leaves a workspace.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Route {
    /// How well it is known.
    pub certainty: Certainty,
    /// The variables that the value is taken from: the first that is set. Empty: the runtime reads none.
    pub reads: Vec<String>,
    /// Variables that are used in its place wherever they are set.
    pub beaten_by: Vec<String>,
    /// How it is sent.
    pub delivery: Delivery,
    /// Values that are sent another way, by how they begin.
    pub by_prefix: Vec<(String, Delivery)>,
    /// Where this variable is set, the value goes to this base URL.
    pub by_env: Vec<(String, Url)>,
    /// What else travels in the same request, and in which header.
    pub also_sends: BTreeMap<String, HeaderFamily>,
    /// The base-URL variables that move the host; `None`: those that the catalogue knows for the protocol.
    pub base_url_env: Option<Vec<String>>,
}

/// In which header, to which surface, to which host. What is not said is as for any other workspace.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Delivery {
    /// The header; several are sent or tried by versions that are in use.
    pub headers: Vec<HeaderFamily>,
    /// The surface.
    pub surface: Option<Surface>,
    /// The base URL, where it is another than the registry's.
    pub base: Option<Url>,
}

/// How well a fact is known.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub enum Certainty {
    /// By report: what rests on it warns and never denies.
    #[default]
    Reported,
    /// The code was read.
    Read,
    /// The program was seen doing it.
    Seen,
}

/// What becomes of blanks and line breaks around a value.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Trims {
    /// Not known, or nothing: such a value is refused.
    #[default]
    Nothing,
    /// They are cut off at its end.
    End,
    /// They are cut off.
    BothEnds,
}

// === impl Runtimes ===

impl Runtimes {
    /// What is known of this runtime.
    pub fn get(&self, runtime: &str) -> Option<&RuntimeFacts> {
        self.by_name.get(runtime)
    }

    /// Some runtime takes a base URL from this variable.
    pub fn reads_base_url(&self, name: &str) -> bool {
        self.base_url_names.contains(name)
    }

    /// These facts laid over the present ones, runtime by runtime.
    pub fn lay_over(&mut self, over: Self) {
        self.by_name.extend(over.by_name);
        self.base_url_names = self.by_name.values().flat_map(RuntimeFacts::base_url_names).collect();
    }

    fn of(by_name: BTreeMap<String, RuntimeFacts>) -> Self {
        let base_url_names = by_name.values().flat_map(RuntimeFacts::base_url_names).collect();
        Self { by_name, base_url_names }
    }
}

// === impl RuntimeFacts ===

impl RuntimeFacts {
    /// How a provider's credential leaves a workspace of the runtime; `None` where nothing is known of that. `auth_env`, `auth_token_env` and
    /// `anthropic_base_url` are what the registry says of the provider.
    pub fn route(
        &self,
        provider: &str,
        auth_env: &[String],
        auth_token_env: Option<&String>,
        anthropic_base_url: Option<&Url>,
    ) -> Option<Route> {
        if let Some(route) = self.routes.get(provider) {
            return Some(Route {
                base_url_env: route.base_url_env.clone().or_else(|| self.base_url_env.clone()),
                ..route.clone()
            });
        }
        let General { headers, surface } = self.general.as_ref()?;
        // The launcher copies the first of the provider's names into this one, unless it is set.
        let token_env = auth_token_env?;
        let header = *headers.get(token_env)?;
        let base = anthropic_base_url?.clone();
        let mut reads = vec![token_env.clone()];
        reads.extend(auth_env.iter().filter(|name| *name != token_env).cloned());
        let also_sends = headers.iter().filter(|(name, _)| *name != token_env).map(|(name, header)| (name.clone(), *header));
        Some(Route {
            certainty: self.certainty,
            reads,
            delivery: Delivery { headers: vec![header], surface: Some(*surface), base: Some(base) },
            also_sends: also_sends.collect(),
            base_url_env: self.base_url_env.clone(),
            ..Route::default()
        })
    }

    /// Under which name a value of this provider travels in that header, if there is one.
    pub fn name_for(&self, header: HeaderFamily) -> Option<&str> {
        let headers = &self.general.as_ref()?.headers;
        headers.iter().find(|(_, family)| **family == header).map(|(name, _)| name.as_str())
    }

    fn base_url_names(&self) -> impl Iterator<Item = String> + '_ {
        let of_routes = self.routes.values().filter_map(|route| route.base_url_env.as_ref());
        self.base_url_env.iter().chain(of_routes).flatten().cloned()
    }
}

// === impl Route ===

impl Route {
    /// How this value is sent.
    pub fn delivery_of(&self, value: &str) -> &Delivery {
        self.by_prefix
            .iter()
            .find(|(prefix, _)| value.starts_with(prefix.as_str()))
            .map_or(&self.delivery, |(_, delivery)| delivery)
    }

    /// It says how values that begin like this one are sent.
    pub fn has_delivery_for(&self, value: &str) -> bool {
        self.by_prefix.iter().any(|(prefix, _)| value.starts_with(prefix.as_str()))
    }

    /// It is known well enough to deny by.
    pub fn is_certain(&self) -> bool {
        self.certainty >= Certainty::Read
    }

    /// Every variable that takes part.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        let Self { reads, beaten_by, also_sends, by_env, .. } = self;
        reads.iter().chain(beaten_by).chain(also_sends.keys()).chain(by_env.iter().map(|(name, _)| name)).map(String::as_str)
    }
}
