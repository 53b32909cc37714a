//! The probe catalogue: how each API host is asked whether a credential is alive, and what its answers mean. Data, not code.

mod check;
pub(crate) mod file;

use std::{
    cell::Cell,
    cmp::Reverse,
    collections::{BTreeMap, HashMap},
    sync::Arc,
    time::Duration,
};

pub(crate) use check::check_probe;
use jiff::civil::Date;
use url::Url;

use crate::{
    core::{answer::any_at, foreign_secrets::ForeignSecrets, oauth_credential::CredentialKind, runtimes::Runtimes},
    domain::{
        problem::{Loaded, Problems},
        protocol::{HeaderFamily, Method, Protocol, Surface},
        verdict::Verdict,
    },
};

/// The catalogue that is built in: our own text around what is known of the vendors.
const EMBEDDED: &str = include_str!("catalogue/default.yaml");
/// Further parts of it.
const RUNTIMES: &str = include_str!("runtimes/default.yaml");
const FOREIGN_SECRETS: &str = include_str!("catalogue/foreign-secrets.yaml");

/// How every known host is asked.
#[derive(Debug, Clone)]
pub struct Catalogue {
    revision: String,
    /// Per host (with its port if not the default) or pattern of hosts, rows with the longest path first.
    hosts: BTreeMap<String, Vec<HostRow>>,
    /// Where providers are whose registry entry has no URL: their vendor's one host.
    homes: BTreeMap<String, Url>,
    unprobed: BTreeMap<String, Unprobed>,
    /// As [`KeyShape::sort`] leaves them.
    key_shapes: Vec<KeyShape>,
    base_url_env: BTreeMap<String, Protocol>,
    common_codes: Arc<CommonCodes>,
    free_models: Arc<[String]>,
    openai: Vec<Probe>,
    anthropic: Vec<Probe>,
    /// What agent programs do with credentials.
    pub runtimes: Runtimes,
    /// What is no key of an LLM provider.
    pub foreign_secrets: ForeignSecrets,
    credential_kinds: BTreeMap<String, CredentialKind>,
}

/// How one host is asked.
#[derive(Debug, Clone)]
pub struct HostRow {
    /// The path under which the row holds; empty for the whole host.
    pub path_prefix: String,
    /// The API that it is about, where the host speaks two.
    pub protocol: Option<Protocol>,
    /// Whose host it is. Hosts of one vendor take one another's key shapes.
    pub vendor: String,
    /// Other regions of the vendor, whose keys this host refuses.
    pub siblings: Vec<String>,
    /// Whose keys it takes beside its own vendor's: a gateway's.
    pub accepts_keys_of: AcceptsKeysOf,
    /// What stands before the provider's own model id in a workspace's model, and is not sent.
    pub strip_model_prefixes: Vec<String>,
    /// The ladder: asked in this order until one is conclusive.
    pub probes: Vec<Probe>,
    /// How well what the row says is known.
    pub confidence: Option<Confidence>,
    /// Since when it is known to be so.
    pub since: Option<Date>,
    /// Where it is known from.
    pub sources: Vec<String>,
    /// What a reader of the row should know.
    pub note: Option<String>,
    /// An operator's document has it, not ours.
    pub is_overlaid: bool,
}

/// Whose keys a host takes beside its own vendor's.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum AcceptsKeysOf {
    /// Nobody's.
    #[default]
    Nobody,
    /// These vendors'.
    Vendors(Vec<String>),
    /// Anybody's: a gateway that hands them on.
    Any,
}

/// How well something is known.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Confidence {
    /// The vendor's documentation says so.
    Documented,
    /// Published code relies on it.
    Code,
    /// Somebody reported it from a live call.
    Live,
    /// Inferred.
    Inferred,
}

/// A provider that is not asked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unprobed {
    /// Why.
    pub reason: UnprobedReason,
    /// The same for a person.
    pub note: String,
}

/// Why a provider is not asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum UnprobedReason {
    /// Its server takes no key at all: an answer would prove that it runs, and nothing of a credential.
    Keyless,
    /// Its address is the tenant's own, which this service does not know. Holds only without a URL in the registry.
    TenantEndpoint,
}

/// What a known kind of key begins with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeyShape {
    /// The beginning.
    pub prefix: String,
    /// Whose keys begin so.
    pub vendor: String,
    /// What kind of key it is.
    pub kind: KeyKind,
    /// The plan that it is of, whose keys only the plan's own hosts take.
    pub plan: Option<String>,
    /// The providers that such a key is for, where its vendor has several that refuse one another's.
    pub providers: Vec<String>,
    /// Its place among all that were declared.
    declared: usize,
}

/// What kind of key a shape tells of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KeyKind {
    /// A key for an API's header.
    ApiKey,
    /// An OAuth credential, which is never sent.
    OAuth,
    /// A token that makes OAuth tokens, and calls nothing.
    RefreshToken,
    /// A key that administers an organization and cannot call models. Never sent: whoever gets hold of it can make keys.
    Administrative,
}

/// One authenticated call.
#[derive(Debug, Clone, PartialEq)]
pub struct Probe {
    /// Its name, as answers report it.
    pub name: String,
    /// GET or POST.
    pub method: Method,
    /// Absolute on the host, or beginning with `{base}`.
    pub path: String,
    /// The header families to send the credential in, tried in order until one is not refused.
    pub auth: Vec<HeaderFamily>,
    /// Further headers.
    pub headers: Vec<(String, String)>,
    /// A JSON body; the string `{model}` in it stands for the workspace's model.
    pub body: Option<serde_json::Value>,
    /// Members laid over the body for a provider whose `thinking_policy` is `require_enabled`.
    pub thinking: Option<serde_json::Map<String, serde_json::Value>>,
    /// The time for the whole ladder, if this host needs more than the service's own budget.
    pub budget: Option<Duration>,
    /// It costs the tenant money.
    pub costs_money: bool,
    /// It is documented, or known from those who use it, that this endpoint refuses bad keys.
    pub refuses_bad_keys: bool,
    /// Which of the provider's surfaces it asks.
    pub surface: Surface,
    /// What a good answer's JSON body holds: one of these.
    pub expect: Vec<Expected>,
    /// What answers mean, in order; the first match decides.
    pub signals: Vec<Signal>,
    /// What codes mean that no signal is about.
    pub common: Arc<CommonCodes>,
    /// Tells this probe, and every reading of its answers, from any other.
    pub fingerprint: [u8; 32],
}

/// A value of a good answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Expected {
    /// Where it is.
    pub path: String,
    /// What it is. Null is never one.
    pub kind: Kind,
}

/// What kind a value is of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, strum::EnumString, strum::IntoStaticStr, strum::VariantArray)]
#[strum(serialize_all = "lowercase")]
pub enum Kind {
    /// Any but null.
    Any,
    /// A list.
    List,
    /// An object.
    Object,
    /// A text.
    Text,
    /// A number, or a text that is one: balances come as both.
    Number,
    /// True or false.
    Flag,
}

/// What codes mean that many servers share.
#[derive(Debug, Default, PartialEq)]
pub struct CommonCodes {
    /// Where codes stand in a body.
    paths: Vec<String>,
    /// By the code in lower case: for which statuses (none: any), and what it means.
    codes: HashMap<String, Vec<(Vec<u16>, SignalOutcome)>>,
    /// Tells this list from any other.
    pub fingerprint: [u8; 32],
}

/// One row: when an answer looks like this, it means that.
#[derive(Debug, Clone, PartialEq)]
pub struct Signal {
    /// The statuses that it is about; empty for any.
    pub statuses: Vec<u16>,
    /// What must hold of the body: all of these.
    pub tests: Vec<BodyTest>,
    /// What it means.
    pub outcome: SignalOutcome,
    /// A page for people is met too.
    pub page: bool,
    /// No other endpoint will tell more: nothing further is asked.
    pub stop: bool,
    /// How well it is known.
    pub confidence: Option<Confidence>,
    /// What a reader of the row should know.
    pub note: Option<String>,
}

/// Something that may hold of a body.
#[derive(Debug, Clone, PartialEq)]
pub enum BodyTest {
    /// It contains one of these texts, compared without case.
    Contains(Vec<String>),
    /// It does not contain this text, compared without case.
    Lacks(String),
    /// The JSON value at one of these paths is one of these values; a number and a string of the same digits are the same.
    IsOneOf(Vec<String>, Vec<serde_json::Value>),
    /// The JSON number at one of these paths is at most this one.
    AtMost(Vec<String>, f64),
}

/// What a signal means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SignalOutcome {
    /// The credential was accepted. Counts as VALID once the endpoint is known to refuse bad ones.
    Accepted,
    /// Alive, but restricted from this endpoint: the next probe decides.
    Restricted,
    /// This verdict.
    Verdict(Verdict),
}

// === impl AcceptsKeysOf ===

impl AcceptsKeysOf {
    /// It takes a key of this vendor.
    pub fn takes(&self, vendor: &str) -> bool {
        match self {
            Self::Nobody => false,
            Self::Vendors(vendors) => vendors.iter().any(|known| known == vendor),
            Self::Any => true,
        }
    }
}

// === impl Catalogue ===

impl Catalogue {
    /// The embedded catalogue.
    pub fn embedded() -> Result<Loaded<Self>, Problems> {
        let Loaded { mut value, warnings } = check::check("embedded catalogue", EMBEDDED.as_bytes())?;
        for (document, text) in [("embedded runtimes", RUNTIMES), ("embedded foreign secrets", FOREIGN_SECRETS)] {
            value = value.overlay(check::check(document, text.as_bytes())?.value);
        }
        Ok(Loaded { value, warnings })
    }

    /// The embedded catalogue with an operator's document laid over it: host by host, its rows replace ours.
    pub fn overlaid(document: &str, bytes: &[u8]) -> Result<Loaded<Self>, Problems> {
        let base = Self::embedded()?;
        let over = check::check(document, bytes)?;
        Ok(Loaded { value: base.value.overlay(over.value), warnings: over.warnings })
    }

    fn overlay(mut self, over: Self) -> Self {
        let Self {
            revision,
            mut hosts,
            homes,
            unprobed,
            key_shapes,
            base_url_env,
            common_codes,
            free_models,
            openai,
            anthropic,
            runtimes,
            foreign_secrets,
            credential_kinds,
        } = over;
        self.runtimes.lay_over(runtimes);
        self.foreign_secrets.lay_over(foreign_secrets);
        self.credential_kinds.extend(credential_kinds);
        hosts.values_mut().flatten().for_each(|row| row.is_overlaid = true);
        // A host's rows go whole, and with them the providers that they took in.
        self.homes.retain(|_, home| !host_of(home).is_some_and(|host| hosts.contains_key(&host)));
        self.homes.extend(homes);
        // Whoever says where a provider is says that it is asked, and the other way round.
        self.unprobed.retain(|provider, _| !self.homes.contains_key(provider));
        self.homes.retain(|provider, _| !unprobed.contains_key(provider));
        self.unprobed.extend(unprobed);
        self.hosts.extend(hosts);
        let declared = self.key_shapes.len();
        self.key_shapes.extend(key_shapes.into_iter().map(|shape| KeyShape { declared: declared + shape.declared, ..shape }));
        KeyShape::sort(&mut self.key_shapes);
        self.base_url_env.extend(base_url_env);
        if !openai.is_empty() {
            self.openai = openai;
        }
        if !anthropic.is_empty() {
            self.anthropic = anthropic;
        }
        self.common_codes = Arc::new(self.common_codes.overlaid(&common_codes));
        self.free_models = self.free_models.iter().chain(free_models.iter()).cloned().collect();
        self.share_codes();
        self.revision = blake3::hash(format!("{} {revision}", self.revision).as_bytes()).to_hex().chars().take(16).collect();
        self
    }

    /// Content hash, of the embedded document and the one laid over it.
    pub fn revision(&self) -> &str {
        &self.revision
    }

    /// What kind of credential a variable holds that is never sent.
    pub fn credential_kind(&self, env_name: &str) -> Option<CredentialKind> {
        self.credential_kinds.get(env_name).copied()
    }

    /// How many hosts it knows.
    pub fn host_count(&self) -> usize {
        self.hosts.len()
    }

    /// The row for this host (with its port if not the default), path and API: the longest prefix wins.
    pub fn row(&self, host: &str, path: &str, protocol: Protocol) -> Option<&HostRow> {
        let below = |row: &HostRow| {
            path.strip_prefix(row.path_prefix.as_str()).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
        };
        self.rows_of(host).iter().find(|row| below(row) && row.protocol.is_none_or(|about| about == protocol))
    }

    /// The rows for this host: its own, else those of the pattern that says the most of it.
    pub fn rows_of(&self, host: &str) -> &[HostRow] {
        let by_pattern = || {
            let patterns = self.hosts.iter().filter(|(pattern, _)| pattern.contains('*') && fits(pattern, host));
            patterns.max_by_key(|(pattern, _)| pattern.len()).map(|(_, rows)| rows)
        };
        self.hosts.get(host).or_else(by_pattern).map(Vec::as_slice).unwrap_or_default()
    }

    /// Codes that many servers share.
    pub fn common_codes(&self) -> &Arc<CommonCodes> {
        &self.common_codes
    }

    /// How the ids of models end that vendors serve without a key.
    pub fn free_models(&self) -> &Arc<[String]> {
        &self.free_models
    }

    /// Every probe reads by the same list.
    fn share_codes(&mut self) {
        let probes = self.hosts.values_mut().flatten().flat_map(|row| &mut row.probes);
        for probe in probes.chain(&mut self.openai).chain(&mut self.anthropic) {
            probe.common = Arc::clone(&self.common_codes);
        }
    }

    /// Every host that has a row, with its rows.
    pub fn hosts(&self) -> impl Iterator<Item = (&str, &[HostRow])> {
        self.hosts.iter().map(|(host, rows)| (host.as_str(), rows.as_slice()))
    }

    /// Where a provider is that the registry gives no URL: its vendor's one host.
    pub fn home(&self, provider: &str) -> Option<&Url> {
        self.homes.get(provider)
    }

    /// Why this provider is not asked, if it is not.
    pub fn unprobed(&self, provider: &str) -> Option<&Unprobed> {
        self.unprobed.get(provider)
    }

    /// The ladder for a host without a row.
    pub fn default_probes(&self, protocol: Protocol) -> &[Probe] {
        match protocol {
            Protocol::OpenAi => &self.openai,
            Protocol::Anthropic => &self.anthropic,
        }
    }

    /// The longest known beginning of this value: every shape that has it.
    pub fn shapes_of(&self, value: &str) -> &[KeyShape] {
        let first = value.as_bytes().first().copied();
        let from = self.key_shapes.partition_point(|shape| shape.first() < first);
        let to = self.key_shapes.partition_point(|shape| shape.first() <= first);
        let shapes = self.key_shapes.get(from..to).unwrap_or_default();
        let longest = shapes.iter().position(|shape| value.starts_with(&shape.prefix));
        let longest = longest.and_then(|longest| shapes.get(longest..)).unwrap_or_default();
        longest.chunk_by(|one, other| one.prefix == other.prefix).next().unwrap_or_default()
    }

    /// The base-URL variables that it knows.
    pub fn base_url_names(&self) -> impl Iterator<Item = &str> {
        self.base_url_env.keys().map(String::as_str)
    }

    /// Which providers a base-URL variable concerns: those of a protocol, or all (`None`).
    pub fn concerned_by(&self, base_url_env: &str) -> Option<Protocol> {
        self.base_url_env.get(base_url_env).copied()
    }

    /// A key of this vendor's shape begins so: its first that was declared.
    pub fn key_prefix_of(&self, vendor: &str) -> Option<&str> {
        self.key_shapes
            .iter()
            .filter(|shape| shape.vendor == vendor && shape.kind == KeyKind::ApiKey)
            .min_by_key(|shape| shape.declared)
            .map(|shape| shape.prefix.as_str())
    }
}

/// A host of this pattern: a `*` stands for letters, digits and dashes, within one label.
fn fits(pattern: &str, host: &str) -> bool {
    let (mut wanted, mut labels) = (pattern.split('.'), host.split('.'));
    loop {
        match (wanted.next(), labels.next()) {
            (None, None) => return true,
            (Some(wanted), Some(label)) => {
                let fits = match wanted.split_once('*') {
                    None => wanted == label,
                    Some((begin, end)) => {
                        let middle = label.strip_prefix(begin).and_then(|rest| rest.strip_suffix(end));
                        middle.is_some_and(|middle| !middle.is_empty() && !middle.contains(':'))
                    }
                };
                if !fits {
                    return false;
                }
            }
            _ => return false,
        }
    }
}

/// The host as the catalogue writes it: lower case, with the port only where it is not the scheme's own.
pub fn host_of(url: &Url) -> Option<String> {
    let host = url.host_str()?.to_ascii_lowercase();
    Some(url.port().map_or_else(|| host.clone(), |port| format!("{host}:{port}")))
}

// === impl CommonCodes ===

impl CommonCodes {
    /// What the first code in this body means, for an answer of this status.
    pub fn outcome(&self, status: u16, json: &serde_json::Value) -> Option<SignalOutcome> {
        let found = Cell::new(None);
        let is_known = |value: &serde_json::Value| {
            let code = value.as_str().unwrap_or_default().to_ascii_lowercase();
            let meanings = self.codes.get(&code).map(Vec::as_slice).unwrap_or_default();
            let meaning = meanings.iter().find(|(statuses, _)| statuses.is_empty() || statuses.contains(&status));
            found.set(meaning.map(|(_, outcome)| *outcome));
            meaning.is_some()
        };
        self.paths.iter().any(|path| any_at(json, path, &is_known));
        found.get()
    }

    fn overlaid(&self, over: &Self) -> Self {
        let mut paths = self.paths.clone();
        paths.extend(over.paths.iter().filter(|path| !self.paths.contains(path)).cloned());
        let mut codes = self.codes.clone();
        codes.extend(over.codes.iter().map(|(code, meanings)| (code.clone(), meanings.clone())));
        let fingerprint = *blake3::hash(&[self.fingerprint, over.fingerprint].concat()).as_bytes();
        Self { paths, codes, fingerprint }
    }
}

// === impl KeyShape ===

impl KeyShape {
    /// By the first byte, and within it the longest beginning first, so that the first that fits is the one; those of one beginning side by
    /// side.
    fn sort(shapes: &mut [Self]) {
        let key = |shape: &Self| (shape.first(), Reverse(shape.prefix.len()));
        shapes.sort_by(|one, other| key(one).cmp(&key(other)).then_with(|| one.prefix.cmp(&other.prefix)));
    }

    fn first(&self) -> Option<u8> {
        self.prefix.as_bytes().first().copied()
    }
}

// === impl Confidence ===

impl Confidence {
    /// Every value.
    pub const ALL: [Self; 4] = [Self::Documented, Self::Code, Self::Live, Self::Inferred];

    /// Its letter in the catalogue.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Documented => "D",
            Self::Code => "C",
            Self::Live => "L",
            Self::Inferred => "I",
        }
    }
}

// === impl UnprobedReason ===

impl UnprobedReason {
    /// Every value.
    pub const ALL: [Self; 2] = [Self::Keyless, Self::TenantEndpoint];

    /// Its word in the catalogue and in answers.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Keyless => "KEYLESS",
            Self::TenantEndpoint => "TENANT_ENDPOINT",
        }
    }
}

// === impl SignalOutcome ===

impl SignalOutcome {
    /// Its word in the catalogue.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Accepted => "ACCEPTED",
            Self::Restricted => "RESTRICTED",
            Self::Verdict(verdict) => verdict.as_str(),
        }
    }
}
