//! How agent programs and their launchers use credentials: which variables they read, in which header they send the value, and to which host. The
//! facts are data with source and version: `runtimes:` in the catalogue.

mod check;
mod file;

use std::collections::{BTreeMap, BTreeSet};

use url::Url;

pub(crate) use self::{check::check, file::RuntimeFile};
use crate::domain::protocol::{HeaderFamily, Surface};

/// The facts about all runtimes, by name.
#[derive(Debug, Clone, Default)]
pub struct Runtimes {
    by_name: BTreeMap<String, RuntimeFacts>,
    /// Every variable from which some runtime takes a base URL.
    base_url_names: BTreeSet<String>,
}

/// The facts about one runtime.
#[derive(Debug, Clone)]
pub struct RuntimeFacts {
    /// The version that was seen or read.
    pub version: String,
    /// Where the facts are from.
    pub sources: Vec<String>,
    /// How certain the facts are.
    pub certainty: Certainty,
    /// Whether the runtime removes blanks around a value.
    pub trims: Trims,
    /// Variables that the launcher removes from the organization's credentials, unless the provider accepts them.
    pub organization_loses: BTreeSet<String>,
    /// After a refusal, the runtime tries the next credential of the same provider.
    pub falls_back: bool,
    general: Option<General>,
    routes: BTreeMap<String, Route>,
    base_url_env: Option<Vec<String>>,
}

/// For a runtime that sends the same variables to every provider.
#[derive(Debug, Clone)]
struct General {
    /// The header in which it sends each of them.
    headers: BTreeMap<String, HeaderFamily>,
    surface: Surface,
}

/// How the credential of one provider leaves a workspace.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Route {
    /// How certain the route is.
    pub certainty: Certainty,
    /// The variables from which the runtime takes the value: the first that is set. If empty, it reads none.
    pub reads: Vec<String>,
    /// Variables that are used instead whenever they are set.
    pub beaten_by: Vec<String>,
    /// How the value is sent.
    pub delivery: Delivery,
    /// Values that are sent differently, by their prefix.
    pub by_prefix: Vec<(String, Delivery)>,
    /// If this variable is set, the value goes to this base URL.
    pub by_env: Vec<(String, Url)>,
    /// Other variables that are sent in the same request, with their headers.
    pub also_sends: BTreeMap<String, HeaderFamily>,
    /// The base-URL variables that change the host. `None`: those that the catalogue knows for the API.
    pub base_url_env: Option<Vec<String>>,
}

/// In which header, to which surface and to which host a value is sent. What is not given is as in any other workspace.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Delivery {
    /// The header. Several if different versions use different ones.
    pub headers: Vec<HeaderFamily>,
    /// The surface that it calls.
    pub surface: Option<Surface>,
    /// The base URL, if it is not the registry's.
    pub base: Option<Url>,
}

/// How certain a fact is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub enum Certainty {
    /// Somebody reported it. It can cause warnings but no denials.
    #[default]
    Reported,
    /// The program's code was read.
    Read,
    /// The program was observed.
    Seen,
}

/// What a runtime does with blanks and line breaks around a value.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Trims {
    /// Nothing, or unknown. Such a value is refused.
    #[default]
    Nothing,
    /// It removes them at the end.
    End,
    /// It removes them at both ends.
    BothEnds,
}

// === impl Runtimes ===

impl Runtimes {
    /// The facts about this runtime, if there are any.
    pub fn get(&self, runtime: &str) -> Option<&RuntimeFacts> {
        self.by_name.get(runtime)
    }

    /// Whether some runtime takes a base URL from this variable.
    pub fn reads_base_url(&self, name: &str) -> bool {
        self.base_url_names.contains(name)
    }

    /// Adds these facts. They replace the present ones of the same runtimes.
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
    /// How this provider's credential leaves a workspace of the runtime; `None` if nothing is known. The last three arguments are what the registry
    /// says about the provider.
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
        // The launcher copies the value of the provider's first variable to this one, unless it is set.
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

    /// The variable whose value the runtime sends in this header, if there is one.
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

    /// Whether there is a rule for values with the prefix of this one.
    pub fn has_delivery_for(&self, value: &str) -> bool {
        self.by_prefix.iter().any(|(prefix, _)| value.starts_with(prefix.as_str()))
    }

    /// Whether a denial may rest on it.
    pub fn is_certain(&self) -> bool {
        self.certainty >= Certainty::Read
    }

    /// Every variable that is read or sent.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        let Self { reads, beaten_by, also_sends, by_env, .. } = self;
        reads.iter().chain(beaten_by).chain(also_sends.keys()).chain(by_env.iter().map(|(name, _)| name)).map(String::as_str)
    }
}
