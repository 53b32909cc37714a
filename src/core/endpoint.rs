//! Joins the registry's base URL and the catalogue's rows into finished requests to a provider.

use std::{sync::Arc, time::Duration};

use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use url::Url;

use crate::{
    core::{
        catalogue::{AcceptsKeysOf, Catalogue, HostRow, Probe, Unprobed, UnprobedReason, host_of},
        registry::{Auth, Provider},
    },
    domain::{
        denial::listed,
        protocol::{HeaderFamily, Method, PLATFORM, Protocol, Surface},
    },
};

/// How a provider is asked, for any model. Built once when registry and catalogue are loaded.
#[derive(Debug)]
pub struct Endpoint {
    /// The provider's name in the registry.
    pub provider: String,
    /// The host, with its port if that is not the scheme's default.
    pub host: String,
    /// The vendor that the host belongs to, if the catalogue knows it.
    pub vendor: Option<String>,
    /// Hosts of the vendor in other regions.
    pub siblings: Vec<String>,
    /// The prefix of this vendor's keys, if the catalogue knows it.
    pub key_prefix: Option<String>,
    /// Vendors whose keys the host takes, beside its own vendor's.
    pub accepts_keys_of: AcceptsKeysOf,
    /// The header in which clients of this API send a credential. Set where the catalogue has no row that says what the vendor takes.
    pub client_header: Option<HeaderFamily>,
    /// A hash of the base URL. What is learnt about headers holds for every provider with this base URL.
    pub base_identity: [u8; 32],
    /// The time budget of a whole probe, if a row asks for another than the default.
    pub budget: Option<Duration>,
    /// A hash of everything that decides what is sent and how answers are read, without the model.
    pub identity: [u8; 32],
    /// The first probe names the model, so every finding is about one model.
    pub names_model: bool,
    base: Url,
    /// The probes in their order, each with its headers in the order in which they are tried. Never empty.
    probes: Vec<Probe>,
    wire_ids: WireIds,
    thinking: bool,
    /// The endings of model ids that vendors serve without a key.
    free_models: Arc<[String]>,
}

/// How the workspace's own client will send a credential, as far as that is known.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Preference {
    /// The header that it uses.
    pub family: Option<HeaderFamily>,
    /// The surface that it calls.
    pub surface: Option<Surface>,
}

/// An endpoint, and the requests for one model.
#[derive(Debug, Clone)]
pub struct Target {
    /// The endpoint.
    pub endpoint: Arc<Endpoint>,
    /// How the workspace's own client will send the credential.
    pub preference: Preference,
    /// The requests in their order. Never empty.
    pub calls: Vec<Call>,
}

/// How a provider's own model ids are made from the workspace's.
#[derive(Debug)]
struct WireIds {
    /// Prefixes to remove. Only the first one that a model begins with is removed.
    strip: Vec<String>,
    /// The prefix to put before the rest.
    prefix: String,
}

/// A finished request, without the credential.
#[derive(Debug, Clone)]
pub struct Call {
    /// The catalogue's row for this request.
    pub probe: Probe,
    /// The address. Its host is always that of the provider's base URL.
    pub url: Url,
    /// The JSON body.
    pub body: Option<Arc<str>>,
    /// Body or path hold the model, so the answer is about this model only.
    pub names_model: bool,
    /// The provider's own id of the model; empty if the request names none.
    pub model: String,
    /// A hash of the request without its model. Only whether the model is one that is served without a key takes part.
    pub request: [u8; 32],
}

/// Why a provider cannot be asked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NoSurface {
    /// It takes OAuth credentials, which are never sent.
    OAuth,
    /// The value looks like an OAuth credential, which is never sent.
    OAuthShaped,
    /// It authenticates by the machine's own cloud identity.
    Ambient,
    /// It is the platform's metered proxy, which takes no tenant credential.
    Platform,
    /// Neither the registry nor the catalogue has an address.
    NoEndpoint,
    /// The catalogue says that it is not probed, and why.
    Unprobed(Unprobed),
    /// The workspace calls a base URL that the tenant has set in these variables.
    TenantBaseUrl(Vec<String>),
}

/// The requests that check a credential of this provider for this model.
pub fn target(provider: &Provider, catalogue: &Catalogue, model: &str) -> Result<Target, NoSurface> {
    Endpoint::of(provider, catalogue).map(|endpoint| Target::of(&Arc::new(endpoint), model))
}

/// The base-URL variables that concern a provider by its API, for runtimes of which nothing more is known.
pub fn base_url_names(provider: &Provider, catalogue: &Catalogue) -> Vec<String> {
    match provider.auth {
        Auth::Key if !provider.is_platform() => {
            catalogue.base_url_names().filter(|name| concerns(catalogue, name, provider)).map(str::to_owned).collect()
        }
        Auth::Key | Auth::OAuth | Auth::Ambient => Vec::new(),
    }
}

// === impl Endpoint ===

impl Endpoint {
    /// The endpoint at the provider's own base URL.
    pub fn of(provider: &Provider, catalogue: &Catalogue) -> Result<Self, NoSurface> {
        match provider.auth {
            Auth::OAuth => return Err(NoSurface::OAuth),
            Auth::Ambient => return Err(NoSurface::Ambient),
            Auth::Key if provider.name == PLATFORM => return Err(NoSurface::Platform),
            Auth::Key => {}
        }
        Self::new(provider, base(provider, catalogue)?, provider.protocol, provider.probes.as_slice(), catalogue)
    }

    /// The endpoint that a runtime calls for this provider instead of the registry's base URL. Probes in the registry do not apply to it.
    pub fn dialled(provider: &Provider, base: &Url, surface: Option<Surface>, catalogue: &Catalogue) -> Result<Self, NoSurface> {
        let protocol = match surface {
            Some(Surface::Messages) => Protocol::Anthropic,
            Some(_) => Protocol::OpenAi,
            None => provider.protocol,
        };
        Self::new(provider, base, protocol, &[], catalogue)
    }

    fn new(
        provider: &Provider,
        base: &Url,
        protocol: Protocol,
        inline: &[Probe],
        catalogue: &Catalogue,
    ) -> Result<Self, NoSurface> {
        let host = host_of(base).ok_or(NoSurface::NoEndpoint)?;
        let row = catalogue.row(&host, base.path(), protocol);
        let (probes, is_default) = match (inline, row.map(|row| row.probes.as_slice())) {
            ([], Some(probes)) if !probes.is_empty() => (probes, false),
            ([], _) => (catalogue.default_probes(protocol), true),
            (inline, _) => (inline, false),
        };
        // Try the header that the workspace's own client will use first.
        let first = (provider.auth_token_env.as_deref() == Some("ANTHROPIC_API_KEY")).then_some(HeaderFamily::XApiKey);
        let thinking = provider.thinking_required;
        let calls: Vec<Call> = probes.iter().filter_map(|probe| call(base, probe, MODEL, thinking, first)).collect();
        let names_model = calls.first().is_some_and(|call| call.names_model);
        let with_codes = |probe: Probe| Probe { common: Arc::clone(catalogue.common_codes()), ..probe };
        let probes: Vec<Probe> = calls.into_iter().map(|call| with_codes(call.probe)).collect();
        if probes.is_empty() {
            return Err(NoSurface::NoEndpoint);
        }
        Ok(Self {
            identity: identity(provider, base, row, &probes, &catalogue.common_codes().fingerprint),
            base_identity: *blake3::hash(base.as_str().as_bytes()).as_bytes(),
            accepts_keys_of: row.map(|row| row.accepts_keys_of.clone()).unwrap_or_default(),
            // OpenAI's clients send a bearer token. Anthropic's clients choose the header by the variable.
            client_header: (is_default && protocol == Protocol::OpenAi).then_some(HeaderFamily::Bearer),
            provider: provider.name.clone(),
            host,
            vendor: row.map(|row| row.vendor.clone()),
            siblings: row.map(|row| row.siblings.clone()).unwrap_or_default(),
            key_prefix: row.and_then(|row| catalogue.key_prefix_of(&row.vendor)).map(str::to_owned),
            budget: probes.iter().filter_map(|probe| probe.budget).max(),
            names_model,
            base: base.clone(),
            probes,
            wire_ids: WireIds::of(provider, row),
            thinking,
            free_models: Arc::clone(catalogue.free_models()),
        })
    }
}

// === impl Target ===

impl Target {
    /// The requests of this endpoint for this model.
    pub fn of(endpoint: &Arc<Endpoint>, model: &str) -> Self {
        let Endpoint { base, probes, wire_ids, thinking, free_models, .. } = &**endpoint;
        let model = wire_ids.id_of(model);
        let is_free = free_models.iter().any(|end| model.ends_with(end.as_str()));
        let calls = probes.iter().filter_map(|probe| {
            // The headers are already in their order.
            let call = call(base, probe, &model, *thinking, None)?;
            let request = if call.names_model && is_free { *blake3::hash(&call.request).as_bytes() } else { call.request };
            Some(Call { request, ..call })
        });
        Self { endpoint: Arc::clone(endpoint), preference: Preference::default(), calls: calls.collect() }
    }

    /// The same target for a workspace whose client is known.
    pub fn preferring(self, preference: Preference) -> Self {
        Self { preference, ..self }
    }
}

// === impl WireIds ===

impl WireIds {
    /// If the row lists prefixes, only those are removed: a vendor's own ids may begin with the vendor's name.
    fn of(provider: &Provider, row: Option<&HostRow>) -> Self {
        let listed = row.map(|row| row.strip_model_prefixes.clone()).unwrap_or_default();
        let own = || [':', '/'].map(|separator| format!("{}{separator}", provider.name)).to_vec();
        Self { strip: if listed.is_empty() { own() } else { listed }, prefix: provider.wire_model_prefix.clone() }
    }

    /// The provider's own id of the workspace's model.
    fn id_of(&self, model: &str) -> String {
        let bare = self.strip.iter().find_map(|prefix| model.strip_prefix(prefix.as_str())).unwrap_or(model);
        format!("{}{bare}", self.prefix)
    }
}

/// The base URL from the registry, or else the vendor's one host from the catalogue.
fn base<'a>(provider: &'a Provider, catalogue: &'a Catalogue) -> Result<&'a Url, NoSurface> {
    let unprobed = catalogue.unprobed(&provider.name);
    // The tenant's address is not known, and it is not the vendor's host.
    if provider.is_per_tenant {
        return Err(NoSurface::NoEndpoint);
    }
    match (&provider.base_url, unprobed) {
        // Probes in the registry say that this provider can be asked.
        (Some(base), _) if !provider.probes.is_empty() => Ok(base),
        (Some(_), Some(unprobed)) if unprobed.reason == UnprobedReason::Keyless => Err(NoSurface::Unprobed(unprobed.clone())),
        (Some(base), _) => Ok(base),
        (None, Some(unprobed)) => Err(NoSurface::Unprobed(unprobed.clone())),
        (None, None) => catalogue.home(&provider.name).ok_or(NoSurface::NoEndpoint),
    }
}

/// Whether a base-URL variable that the tenant has set concerns a provider with this API.
fn concerns(catalogue: &Catalogue, name: &str, provider: &Provider) -> bool {
    match catalogue.concerned_by(name) {
        None => false,
        Some(Protocol::Anthropic) => provider.protocol == Protocol::Anthropic || provider.anthropic_base_url.is_some(),
        Some(Protocol::OpenAi) => provider.protocol == Protocol::OpenAi,
    }
}

/// A hash of the provider, its base URL, how model ids are made, and the probes.
fn identity(provider: &Provider, base: &Url, row: Option<&HostRow>, probes: &[Probe], codes: &[u8; 32]) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new();
    hasher.update(codes);
    let wire_ids = row.map(|row| row.strip_model_prefixes.as_slice()).unwrap_or_default();
    let thinking = if provider.thinking_required { "thinking" } else { "" };
    let parts = [provider.name.as_str(), base.as_str(), provider.wire_model_prefix.as_str(), thinking];
    for part in parts.into_iter().chain(wire_ids.iter().map(String::as_str)) {
        hasher.update(&part.len().to_le_bytes()).update(part.as_bytes());
    }
    for probe in probes {
        hasher.update(&probe.fingerprint);
        for family in &probe.auth {
            hasher.update(family.as_str().as_bytes());
        }
    }
    *hasher.finalize().as_bytes()
}

/// One request to a base URL. `None` if the path leads to another host, which the catalogue's check rules out.
pub fn call(base: &Url, probe: &Probe, model: &str, thinking: bool, first: Option<HeaderFamily>) -> Option<Call> {
    let url = join(base, &probe.path, model)?;
    let mut names_model = probe.path.contains(MODEL);
    let body = probe.body.as_ref().map(|body| {
        let mut body = filled(body, model, &mut names_model);
        if let (true, Some(thinking), Some(body)) = (thinking, &probe.thinking, body.as_object_mut()) {
            body.extend(thinking.clone());
        }
        Arc::from(body.to_string())
    });
    let request = {
        let mut hasher = blake3::Hasher::new();
        hasher
            .update(&probe.fingerprint)
            .update(&[u8::from(thinking)])
            .update(join(base, &probe.path, MODEL)?.as_str().as_bytes());
        *hasher.finalize().as_bytes()
    };
    let mut probe = probe.clone();
    probe.auth.sort_by_key(|family| Some(*family) != first);
    debug_assert!(probe.method == Method::Post || body.is_none(), "the catalogue's check rules it out");
    let model = if names_model { model.to_owned() } else { String::new() };
    Some(Call { probe, url, body, names_model, model, request })
}

/// The placeholder for the model in a path or a body.
pub const MODEL: &str = "{model}";

/// The base URL with this path. Neither a row nor a model can change the host. If the base ends in `/v1` and the path begins with it, it appears
/// once.
fn join(base: &Url, path: &str, model: &str) -> Option<Url> {
    let path = path.replace(MODEL, &utf8_percent_encode(model, SEGMENT).to_string());
    let (path, query) = path.split_once('?').map_or((path.as_str(), None), |(path, query)| (path, Some(query)));
    let mut url = base.clone();
    if let Some(tail) = path.strip_prefix("{base}") {
        let base_path = base.path().trim_end_matches('/');
        let base_path = if tail.starts_with("/v1/") { base_path.strip_suffix("/v1").unwrap_or(base_path) } else { base_path };
        url.set_path(&format!("{base_path}{tail}"));
    } else {
        url.set_path(path);
    }
    url.set_query(query);
    (url.host() == base.host() && url.port() == base.port()).then_some(url)
}

/// The characters that need no encoding in a path segment: RFC 3986's unreserved ones.
const SEGMENT: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'_').remove(b'.').remove(b'~');

/// The body with each string `{model}` replaced by the model.
fn filled(body: &serde_json::Value, model: &str, names_model: &mut bool) -> serde_json::Value {
    use serde_json::Value;
    match body {
        Value::String(text) if text == MODEL => {
            *names_model = true;
            Value::String(model.to_owned())
        }
        Value::Array(items) => Value::Array(items.iter().map(|item| filled(item, model, names_model)).collect()),
        Value::Object(fields) => {
            Value::Object(fields.iter().map(|(name, value)| (name.clone(), filled(value, model, names_model))).collect())
        }
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => body.clone(),
    }
}

// === impl NoSurface ===

impl NoSurface {
    /// The machine-readable reason.
    pub const fn reason(&self) -> &'static str {
        match self {
            Self::OAuth => "OAUTH_SUBSCRIPTION",
            Self::OAuthShaped => "OAUTH_SHAPED_VALUE",
            Self::Ambient => "AMBIENT_IDENTITY",
            Self::Platform => "PLATFORM",
            Self::NoEndpoint => "NO_ENDPOINT",
            Self::Unprobed(unprobed) => unprobed.reason.as_str(),
            Self::TenantBaseUrl(_) => "TENANT_BASE_URL",
        }
    }

    /// The reason in words.
    pub fn text(&self) -> String {
        match self {
            Self::OAuth => "an OAuth subscription: its credential is never sent: only its presence counts".into(),
            Self::OAuthShaped => "the value has the shape of an OAuth credential, which is never sent".into(),
            Self::Ambient => "it authenticates by the machine's own cloud identity: a tenant has no credential for it".into(),
            Self::Platform => "the platform pays: there is no tenant credential".into(),
            Self::NoEndpoint => "neither the registry nor the probe catalogue gives an address to ask".into(),
            Self::Unprobed(unprobed) => unprobed.note.clone(),
            Self::TenantBaseUrl(names) => format!("the tenant set {}, so the workspace dials a host of its own", listed(names)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn joined(base: &str, path: &str, expect: &str) {
        let url = join(&Url::parse(base).unwrap(), path, "a/b c").unwrap();
        assert_eq!(url.as_str(), expect, "{base} + {path}");
    }

    #[test]
    fn exactly_one_version_segment() {
        joined("https://h.example/v1", "{base}/v1/messages", "https://h.example/v1/messages");
        joined("https://h.example/v1/", "{base}/models", "https://h.example/v1/models");
        joined("https://h.example", "{base}/v1/models", "https://h.example/v1/models");
        joined("https://h.example/anthropic", "{base}/v1/messages", "https://h.example/anthropic/v1/messages");
        joined("https://h.example/anthropic/v1", "{base}/v1/messages", "https://h.example/anthropic/v1/messages");
        joined("https://h.example/v1beta/openai", "{base}/models", "https://h.example/v1beta/openai/models");
        joined("https://h.example:8443/x", "/user/balance", "https://h.example:8443/user/balance");
    }

    #[test]
    fn a_model_stays_one_segment_and_the_query_stays_a_query() {
        joined("https://h.example", "/m/{model}?a=1", "https://h.example/m/a%2Fb%20c?a=1");
        joined("https://h.example", "/v1/models?limit=1", "https://h.example/v1/models?limit=1");
    }

    #[test]
    fn the_model_is_json_encoded_in_the_body() {
        let mut named = false;
        let body = filled(&serde_json::json!({"model": "{model}", "n": [1, "{model} "]}), "a\"b", &mut named);
        assert_eq!(body, serde_json::json!({"model": "a\"b", "n": [1, "{model} "]}));
        assert!(named);
    }
}
