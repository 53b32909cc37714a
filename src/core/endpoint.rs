//! Where and how a provider is asked: the registry's base URL and the catalogue's rows, joined into finished requests.

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

/// How one provider is asked, whatever the model: made once, when registry and catalogue are loaded.
#[derive(Debug)]
pub struct Endpoint {
    /// The provider's name.
    pub provider: String,
    /// The host, with its port if that is not the scheme's own.
    pub host: String,
    /// Whose host it is, where the catalogue knows.
    pub vendor: Option<String>,
    /// Other regions of the vendor.
    pub siblings: Vec<String>,
    /// How a key of this vendor begins, where the catalogue knows.
    pub key_prefix: Option<String>,
    /// Whose keys it takes beside its own vendor's.
    pub accepts_keys_of: AcceptsKeysOf,
    /// In which header the clients of this API send a credential, where nobody wrote a row that says what the vendor takes.
    pub client_header: Option<HeaderFamily>,
    /// Tells the base URL from any other: what it teaches of its headers holds for every provider there.
    pub base_identity: [u8; 32],
    /// The time for the whole ladder, if a row asks for more or less than the service's own.
    pub budget: Option<Duration>,
    /// Tells this endpoint, and every reading of its answers, from any other; the model takes no part.
    pub identity: [u8; 32],
    /// The first probe names the model, so that every finding is about one model.
    pub names_model: bool,
    base: Url,
    /// The ladder, each with its header families in the order in which they are tried. Never empty.
    probes: Vec<Probe>,
    wire_ids: WireIds,
    thinking: bool,
    /// How the ids of models end that vendors serve without a key.
    free_models: Arc<[String]>,
}

/// How the workspace's own client will use a credential, as far as that is known.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Preference {
    /// The header in which it sends it.
    pub family: Option<HeaderFamily>,
    /// The surface that it calls.
    pub surface: Option<Surface>,
}

/// An endpoint, with the requests for one model.
#[derive(Debug, Clone)]
pub struct Target {
    /// Whom to ask.
    pub endpoint: Arc<Endpoint>,
    /// How the workspace's own client will use the credential.
    pub preference: Preference,
    /// The ladder, in order. Never empty.
    pub calls: Vec<Call>,
}

/// How a provider's own ids are made of the workspace's models.
#[derive(Debug)]
struct WireIds {
    /// What is taken off: the first of these that a model begins with.
    strip: Vec<String>,
    /// What is put before the rest.
    prefix: String,
}

/// One finished request, but for the credential.
#[derive(Debug, Clone)]
pub struct Call {
    /// The row that it is made of.
    pub probe: Probe,
    /// Where it goes: always the host of the provider's base URL.
    pub url: Url,
    /// The JSON body.
    pub body: Option<Arc<str>>,
    /// The body or the path holds the model: the answer is about this model alone.
    pub names_model: bool,
    /// The vendor's id of the model, where the request names it; else empty.
    pub model: String,
    /// Tells the request from any other, whatever the model: of models only whether such a one is served without a key takes part.
    pub request: [u8; 32],
}

/// Why there is nothing to call.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NoSurface {
    /// OAuth credentials are never exercised.
    OAuth,
    /// The value has the shape of an OAuth credential, which is never sent.
    OAuthShaped,
    /// The provider authenticates by the machine's own cloud identity.
    Ambient,
    /// The platform's own metered proxy: there is no tenant credential.
    Platform,
    /// Neither the registry nor the catalogue gives an address.
    NoEndpoint,
    /// The catalogue says why not.
    Unprobed(Unprobed),
    /// The workspace dials a host of the tenant's own.
    TenantBaseUrl(Vec<String>),
}

/// How this provider is asked about a credential for this model.
pub fn target(provider: &Provider, catalogue: &Catalogue, model: &str) -> Result<Target, NoSurface> {
    Endpoint::of(provider, catalogue).map(|endpoint| Target::of(&Arc::new(endpoint), model))
}

/// The base-URL variables that concern a provider of which nothing more is known, by its API.
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
    /// The endpoint of a provider that has one.
    pub fn of(provider: &Provider, catalogue: &Catalogue) -> Result<Self, NoSurface> {
        match provider.auth {
            Auth::OAuth => return Err(NoSurface::OAuth),
            Auth::Ambient => return Err(NoSurface::Ambient),
            Auth::Key if provider.name == PLATFORM => return Err(NoSurface::Platform),
            Auth::Key => {}
        }
        Self::new(provider, base(provider, catalogue)?, provider.protocol, provider.probes.as_slice(), catalogue)
    }

    /// The endpoint that a runtime dials for this provider, where it is another one. Probes of the registry's own are about the registry's.
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
        // The header that the workspace's own client will use is tried first.
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
            // OpenAI's clients send a bearer token; Anthropic's send either, by the variable.
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
    /// This endpoint's requests for this model.
    pub fn of(endpoint: &Arc<Endpoint>, model: &str) -> Self {
        let Endpoint { base, probes, wire_ids, thinking, free_models, .. } = &**endpoint;
        let model = wire_ids.id_of(model);
        let is_free = free_models.iter().any(|end| model.ends_with(end.as_str()));
        let calls = probes.iter().filter_map(|probe| {
            // The header families stand in their order already.
            let call = call(base, probe, &model, *thinking, None)?;
            let request = if call.names_model && is_free { *blake3::hash(&call.request).as_bytes() } else { call.request };
            Some(Call { request, ..call })
        });
        Self { endpoint: Arc::clone(endpoint), preference: Preference::default(), calls: calls.collect() }
    }

    /// The same for a workspace whose client is known.
    pub fn preferring(self, preference: Preference) -> Self {
        Self { preference, ..self }
    }
}

// === impl WireIds ===

impl WireIds {
    /// Where a row lists what stands before a model, nothing else is taken off: a vendor's ids may begin with the vendor's own
    /// name.
    fn of(provider: &Provider, row: Option<&HostRow>) -> Self {
        let listed = row.map(|row| row.strip_model_prefixes.clone()).unwrap_or_default();
        let own = || [':', '/'].map(|separator| format!("{}{separator}", provider.name)).to_vec();
        Self { strip: if listed.is_empty() { own() } else { listed }, prefix: provider.wire_model_prefix.clone() }
    }

    /// The provider's own id for the workspace's model.
    fn id_of(&self, model: &str) -> String {
        let bare = self.strip.iter().find_map(|prefix| model.strip_prefix(prefix.as_str())).unwrap_or(model);
        format!("{}{bare}", self.prefix)
    }
}

/// Where the provider is: by its registry entry, else its vendor's one host by the catalogue.
fn base<'a>(provider: &'a Provider, catalogue: &'a Catalogue) -> Result<&'a Url, NoSurface> {
    let unprobed = catalogue.unprobed(&provider.name);
    // Its vendor's one host is not the tenant's.
    if provider.is_per_tenant {
        return Err(NoSurface::NoEndpoint);
    }
    match (&provider.base_url, unprobed) {
        // Probes of the registry's own say that there is something to ask.
        (Some(base), _) if !provider.probes.is_empty() => Ok(base),
        (Some(_), Some(unprobed)) if unprobed.reason == UnprobedReason::Keyless => Err(NoSurface::Unprobed(unprobed.clone())),
        (Some(base), _) => Ok(base),
        (None, Some(unprobed)) => Err(NoSurface::Unprobed(unprobed.clone())),
        (None, None) => catalogue.home(&provider.name).ok_or(NoSurface::NoEndpoint),
    }
}

/// Whether a base-URL variable of the tenant's concerns a provider with this API.
fn concerns(catalogue: &Catalogue, name: &str, provider: &Provider) -> bool {
    match catalogue.concerned_by(name) {
        None => false,
        Some(Protocol::Anthropic) => provider.protocol == Protocol::Anthropic || provider.anthropic_base_url.is_some(),
        Some(Protocol::OpenAi) => provider.protocol == Protocol::OpenAi,
    }
}

/// Provider, endpoint, how wire ids are made, and effective rows, as one hash.
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

/// One call to a base URL. `None` if the path leads away from its host, which the catalogue's check rules out.
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

/// What stands for the model in a path or a body.
pub const MODEL: &str = "{model}";

/// The path on the base's own host: nothing in a row or a model can change the host. Exactly one `/v1` where a base ends in
/// it and a row goes on with it.
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

/// What one path segment may hold as it is: RFC 3986's unreserved characters.
const SEGMENT: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'_').remove(b'.').remove(b'~');

/// The body with every string `{model}` replaced by the model; JSON encodes it.
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
    /// The machine's reason.
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

    /// The reason for a person.
    pub fn text(&self) -> String {
        match self {
            Self::OAuth => "an OAuth subscription: its credential is never exercised, presence governs".into(),
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
