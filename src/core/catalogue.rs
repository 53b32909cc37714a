//! The probe catalogue: how each API host is asked whether a credential is alive, and what its answers mean. The facts are data, not code.

mod check;
pub(crate) mod file;

use std::{
    cell::Cell,
    collections::{BTreeMap, HashMap},
    sync::Arc,
    time::Duration,
};

pub(crate) use check::check_probe;
use jiff::civil::Date;
use url::Url;

use crate::{
    core::{
        answer::{any_at, contains},
        by_first_byte::{ByFirstByte, Prefixed},
        foreign_secrets::ForeignSecrets,
        oauth_credential::CredentialKind,
        runtimes::Runtimes,
        yaml,
    },
    domain::{
        problem::{Loaded, Problems},
        protocol::{HeaderFamily, Method, Protocol, Surface},
        verdict::Verdict,
    },
};

/// The built-in catalogue: what is known about the vendors, in our own words.
const EMBEDDED: &str = include_str!("catalogue/default.yaml");
/// More parts of the built-in catalogue.
const RUNTIMES: &str = include_str!("runtimes/default.yaml");
const FOREIGN_SECRETS: &str = include_str!("catalogue/foreign-secrets.yaml");

/// The longest value that is looked up as a common code, and how much of a text is searched, in bytes.
const MAX_COMMON_CODE: usize = 64;
const MAX_COMMON_TEXT: usize = 512;

/// All that is known about hosts, keys and runtimes.
#[derive(Debug, Clone)]
pub struct Catalogue {
    revision: Arc<str>,
    /// The rows of each host (with its port if not the default) or pattern of hosts. Rows with the longest path come first.
    hosts: BTreeMap<String, Vec<HostRow>>,
    /// The base URLs of providers whose registry entry has none: their vendor's one host.
    homes: BTreeMap<String, Url>,
    unprobed: BTreeMap<String, Unprobed>,
    key_shapes: ByFirstByte<KeyShape>,
    base_url_env: BTreeMap<String, Protocol>,
    common_codes: Arc<CommonCodes>,
    free_models: Arc<[String]>,
    openai: Vec<Probe>,
    anthropic: Vec<Probe>,
    /// How agent programs use credentials.
    pub runtimes: Runtimes,
    /// Secrets that are not keys of an LLM provider.
    pub foreign_secrets: ForeignSecrets,
    credential_kinds: BTreeMap<String, CredentialKind>,
}

/// How one host is asked.
#[derive(Debug, Clone)]
pub struct HostRow {
    /// The path that the row applies to; empty for the whole host.
    pub path_prefix: String,
    /// The API that the row applies to, if the host speaks two.
    pub protocol: Option<Protocol>,
    /// The vendor that the host belongs to. Hosts of one vendor take keys of the same shapes.
    pub vendor: String,
    /// Hosts of the vendor in other regions. This host refuses their keys.
    pub siblings: Vec<String>,
    /// Vendors whose keys the host takes, beside its own vendor's. For gateways.
    pub accepts_keys_of: AcceptsKeysOf,
    /// Prefixes of the workspace's model id that are not part of the provider's own id, and are not sent.
    pub strip_model_prefixes: Vec<String>,
    /// The probes, asked in this order until one is conclusive.
    pub probes: Vec<Probe>,
    /// How certain the row is.
    pub confidence: Option<Confidence>,
    /// The date since when it is known to be so.
    pub since: Option<Date>,
    /// Where the facts are from.
    pub sources: Vec<String>,
    /// A remark for a reader of the row.
    pub note: Option<String>,
    /// The row is from an operator's document and not built in.
    pub is_overlaid: bool,
}

/// Vendors whose keys a host takes, beside its own vendor's.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum AcceptsKeysOf {
    /// None.
    #[default]
    Nobody,
    /// The keys of these vendors.
    Vendors(Vec<String>),
    /// The keys of any vendor: a gateway that passes them on.
    Any,
}

/// How certain a fact is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Confidence {
    /// The vendor documents it.
    Documented,
    /// Published code relies on it.
    Code,
    /// Somebody reported it from a live call.
    Live,
    /// It was inferred.
    Inferred,
}

/// A provider that is never asked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unprobed {
    /// The reason.
    pub reason: UnprobedReason,
    /// The reason in words.
    pub note: String,
}

/// Why a provider is never asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum UnprobedReason {
    /// Its server takes no key. A response would prove that it runs, and nothing about a credential.
    Keyless,
    /// Its address is the tenant's own and unknown to this service. Applies only if the registry has no URL.
    TenantEndpoint,
}

/// A known prefix of keys.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeyShape {
    /// The prefix.
    pub prefix: String,
    /// The vendor whose keys begin with it.
    pub vendor: String,
    /// The kind of key.
    pub kind: KeyKind,
    /// The plan that the key is for. Only the plan's own hosts take such keys.
    pub plan: Option<String>,
    /// The providers that such a key is for, if its vendor has several that refuse each other's keys.
    pub providers: Vec<String>,
    /// Its position in the document.
    declared: usize,
}

/// The kind of a key, by its prefix.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KeyKind {
    /// A key for an API's header.
    ApiKey,
    /// An OAuth credential, which is never sent.
    OAuth,
    /// A token that renews OAuth tokens and cannot call an API.
    RefreshToken,
    /// A key that administers an organization and cannot call models. It is never sent: whoever gets it can make keys.
    Administrative,
}

/// One request that checks a credential.
#[derive(Debug, Clone, PartialEq)]
pub struct Probe {
    /// The name by which answers report it.
    pub name: String,
    /// The HTTP method.
    pub method: Method,
    /// The path. It is absolute on the host, or begins with `{base}`.
    pub path: String,
    /// The headers that may carry the credential, tried in order until one is not refused.
    pub auth: Vec<HeaderFamily>,
    /// Further headers.
    pub headers: Vec<(String, String)>,
    /// The JSON body. The string `{model}` stands for the workspace's model.
    pub body: Option<serde_json::Value>,
    /// Members that are added to the body if the provider's `thinking_policy` is `require_enabled`.
    pub thinking: Option<serde_json::Map<String, serde_json::Value>>,
    /// The time budget of a whole probe, if this host needs another than the default.
    pub budget: Option<Duration>,
    /// The request costs the tenant money.
    pub costs_money: bool,
    /// This request is known to refuse bad keys, from documentation or use.
    pub refuses_bad_keys: bool,
    /// The surface of the provider that it calls.
    pub surface: Surface,
    /// Values of which a success response holds at least one.
    pub expect: Vec<Expected>,
    /// What responses mean, in order. The first match decides.
    pub signals: Vec<Signal>,
    /// The meaning of error codes that no signal covers.
    pub common: Arc<CommonCodes>,
    /// A hash of the request and of how its responses are read.
    pub fingerprint: [u8; 32],
}

/// A value that a success response may hold.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Expected {
    /// The path of the value.
    pub path: String,
    /// The kind of the value. Null never matches.
    pub kind: Kind,
}

/// The kind of a JSON value.
#[derive(Debug, Clone, Copy, PartialEq, Eq, strum::EnumString, strum::IntoStaticStr, strum::VariantArray)]
#[strum(serialize_all = "lowercase")]
pub enum Kind {
    /// Any value but null.
    Any,
    /// A list.
    List,
    /// An object.
    Object,
    /// A string.
    Text,
    /// A number, or a string that holds one: vendors write balances both ways.
    Number,
    /// True or false.
    Flag,
}

/// Error codes and texts that many servers share, and what they mean.
#[derive(Debug, Default, PartialEq)]
pub struct CommonCodes {
    /// The paths at which a body may hold a code.
    paths: Vec<String>,
    /// By the code's normal form.
    codes: HashMap<String, Vec<Meaning>>,
    /// The paths at which a body may hold a text for people.
    text_paths: Vec<String>,
    texts: Vec<CommonTexts>,
    /// A hash of this list.
    pub fingerprint: [u8; 32],
}

/// What a common code means.
#[derive(Debug, Clone, PartialEq)]
struct Meaning {
    code: String,
    /// The statuses that it applies to; empty for all.
    statuses: Vec<u16>,
    outcome: SignalOutcome,
}

/// Parts of texts for people, with one meaning.
#[derive(Debug, Clone, PartialEq)]
struct CommonTexts {
    statuses: Vec<u16>,
    texts: Vec<String>,
    outcome: SignalOutcome,
}

/// One rule: a response that matches has this meaning.
#[derive(Debug, Clone, PartialEq)]
pub struct Signal {
    /// The statuses that match; empty for all.
    pub statuses: Vec<u16>,
    /// Tests of the body, all of which must hold.
    pub tests: Vec<BodyTest>,
    /// The meaning.
    pub outcome: SignalOutcome,
    /// A page for people can match too.
    pub page: bool,
    /// No other endpoint will tell more, so the probe ends here.
    pub stop: bool,
    /// How certain the rule is.
    pub confidence: Option<Confidence>,
    /// A remark for a reader of the rule.
    pub note: Option<String>,
}

/// A test of a response's body.
#[derive(Debug, Clone, PartialEq)]
pub enum BodyTest {
    /// It contains one of these texts, compared without case.
    Contains(Vec<String>),
    /// It does not contain this text, compared without case.
    Lacks(String),
    /// The JSON value at one of these paths is one of these values. A number equals a string of the same digits.
    IsOneOf(Vec<String>, Vec<serde_json::Value>),
    /// The JSON number at one of these paths is at most this one.
    AtMost(Vec<String>, f64),
}

/// The meaning of a signal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SignalOutcome {
    /// The credential was accepted. Counts as VALID if the endpoint is known to refuse bad ones.
    Accepted,
    /// The key is alive but may not use this endpoint. The next probe decides.
    Restricted,
    /// This verdict.
    Verdict(Verdict),
}

// === impl AcceptsKeysOf ===

impl AcceptsKeysOf {
    /// Whether keys of this vendor are taken.
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
    /// The built-in catalogue.
    pub fn embedded() -> Result<Loaded<Self>, Problems> {
        let Loaded { mut value, warnings } = check::check("embedded catalogue", EMBEDDED.as_bytes())?;
        for (document, text) in [("embedded runtimes", RUNTIMES), ("embedded foreign secrets", FOREIGN_SECRETS)] {
            value = value.overlay(check::check(document, text.as_bytes())?.value);
        }
        Ok(Loaded { value, warnings })
    }

    /// This catalogue with an operator's document on top. The document replaces all rows of the hosts that it names.
    pub fn overlaid(&self, document: &str, bytes: &[u8]) -> Result<Loaded<Self>, Problems> {
        let Loaded { value, warnings } = check::check(document, bytes)?;
        Ok(Loaded { value: self.clone().overlay(value), warnings })
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
        // The new rows replace all rows of a host, and so also the providers that were placed there.
        self.homes.retain(|_, home| !host_of(home).is_some_and(|host| hosts.contains_key(&host)));
        self.homes.extend(homes);
        // A provider has a host or is never asked. The newer document decides.
        self.unprobed.retain(|provider, _| !self.homes.contains_key(provider));
        self.homes.retain(|provider, _| !unprobed.contains_key(provider));
        self.unprobed.extend(unprobed);
        self.hosts.extend(hosts);
        let declared = self.key_shapes.iter().count();
        self.key_shapes.extend(key_shapes.into_iter().map(|shape| KeyShape { declared: declared + shape.declared, ..shape }));
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
        self.revision = yaml::revision(format!("{} {revision}", self.revision).as_bytes());
        self
    }

    /// A hash of the built-in document and of the one on top.
    pub fn revision(&self) -> &str {
        &self.revision
    }

    /// The same, for an answer to keep.
    pub fn shared_revision(&self) -> Arc<str> {
        Arc::clone(&self.revision)
    }

    /// The kind of login credential that a variable holds, if it holds one. Such credentials are never sent.
    pub fn credential_kind(&self, env_name: &str) -> Option<CredentialKind> {
        self.credential_kinds.get(env_name).copied()
    }

    /// The number of hosts and patterns.
    pub fn host_count(&self) -> usize {
        self.hosts.len()
    }

    /// The row for this host (with its port if not the default), path and API. The longest path wins.
    pub fn row(&self, host: &str, path: &str, protocol: Protocol) -> Option<&HostRow> {
        let below = |row: &HostRow| {
            path.strip_prefix(row.path_prefix.as_str()).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
        };
        self.rows_of(host).iter().find(|row| below(row) && row.protocol.is_none_or(|about| about == protocol))
    }

    /// The rows for this host: its own, or else those of the longest pattern that matches.
    pub fn rows_of(&self, host: &str) -> &[HostRow] {
        let by_pattern = || {
            let patterns = self.hosts.iter().filter(|(pattern, _)| pattern.contains('*') && fits(pattern, host));
            patterns.max_by_key(|(pattern, _)| pattern.len()).map(|(_, rows)| rows)
        };
        self.hosts.get(host).or_else(by_pattern).map(Vec::as_slice).unwrap_or_default()
    }

    /// Error codes that many servers share.
    pub fn common_codes(&self) -> &Arc<CommonCodes> {
        &self.common_codes
    }

    /// The endings of model ids that vendors serve without a key.
    pub fn free_models(&self) -> &Arc<[String]> {
        &self.free_models
    }

    /// Gives every probe the same list of common codes.
    fn share_codes(&mut self) {
        let probes = self.hosts.values_mut().flatten().flat_map(|row| &mut row.probes);
        for probe in probes.chain(&mut self.openai).chain(&mut self.anthropic) {
            probe.common = Arc::clone(&self.common_codes);
        }
    }

    /// Every host or pattern with its rows.
    pub fn hosts(&self) -> impl Iterator<Item = (&str, &[HostRow])> {
        self.hosts.iter().map(|(host, rows)| (host.as_str(), rows.as_slice()))
    }

    /// The base URL of a provider that has none in the registry: its vendor's one host.
    pub fn home(&self, provider: &str) -> Option<&Url> {
        self.homes.get(provider)
    }

    /// Why this provider is never asked, if that is so.
    pub fn unprobed(&self, provider: &str) -> Option<&Unprobed> {
        self.unprobed.get(provider)
    }

    /// The probes for a host without a row.
    pub fn default_probes(&self, protocol: Protocol) -> &[Probe] {
        match protocol {
            Protocol::OpenAi => &self.openai,
            Protocol::Anthropic => &self.anthropic,
        }
    }

    /// The key shapes with the longest prefix that this value begins with.
    pub fn shapes_of(&self, value: &str) -> &[KeyShape] {
        let shapes = self.key_shapes.like(value);
        let longest = shapes.iter().position(|shape| value.starts_with(&shape.prefix));
        let longest = longest.and_then(|longest| shapes.get(longest..)).unwrap_or_default();
        longest.chunk_by(|one, other| one.prefix == other.prefix).next().unwrap_or_default()
    }

    /// The known base-URL variables.
    pub fn base_url_names(&self) -> impl Iterator<Item = &str> {
        self.base_url_env.keys().map(String::as_str)
    }

    /// The API whose providers a base-URL variable concerns. `None` if the variable is not known.
    pub fn concerned_by(&self, base_url_env: &str) -> Option<Protocol> {
        self.base_url_env.get(base_url_env).copied()
    }

    /// The prefix of this vendor's API keys. If there are several, the first in the document.
    pub fn key_prefix_of(&self, vendor: &str) -> Option<&str> {
        self.key_shapes
            .iter()
            .filter(|shape| shape.vendor == vendor && shape.kind == KeyKind::ApiKey)
            .min_by_key(|shape| shape.declared)
            .map(|shape| shape.prefix.as_str())
    }
}

/// Whether the host matches the pattern. A `*` stands for letters, digits and dashes within one label.
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

/// The host as the catalogue writes it: in lower case, with the port if that is not the scheme's default.
pub fn host_of(url: &Url) -> Option<String> {
    let host = url.host_str()?.to_ascii_lowercase();
    Some(url.port().map_or_else(|| host.clone(), |port| format!("{host}:{port}")))
}

// === impl CommonCodes ===

impl CommonCodes {
    /// The meaning of the first known code in this body, for a response with this status.
    pub fn outcome(&self, status: u16, json: &serde_json::Value) -> Option<SignalOutcome> {
        let found = Cell::new(None);
        let is_known = |value: &serde_json::Value| {
            let Some(code) = value.as_str().filter(|code| code.len() <= MAX_COMMON_CODE) else { return false };
            let meanings = self.codes.get(&Self::normal_form(code)).map(Vec::as_slice).unwrap_or_default();
            let meaning = meanings.iter().find(|meaning| {
                let applies = meaning.statuses.is_empty() || meaning.statuses.contains(&status);
                // A sentence such as "Invalid token" is no code that proves a key dead. One such as "Quota exceeded" says what it means.
                let is_exact = || code.eq_ignore_ascii_case(&meaning.code);
                applies && (meaning.outcome != SignalOutcome::Verdict(Verdict::Invalid) || is_exact())
            });
            found.set(meaning.map(|meaning| meaning.outcome));
            meaning.is_some()
        };
        self.paths.iter().any(|path| any_at(json, path, &is_known));
        found.get()
    }

    /// The meaning of the first known text at the usual places of this body, for a response with this status.
    pub fn outcome_of_text(&self, status: u16, json: &serde_json::Value) -> Option<SignalOutcome> {
        let found = Cell::new(None);
        let is_known = |value: &serde_json::Value| {
            found.set(value.as_str().and_then(|text| self.outcome_of_plain_text(status, text.as_bytes())));
            found.get().is_some()
        };
        self.text_paths.iter().any(|path| any_at(json, path, &is_known));
        found.get()
    }

    /// What is known of the beginning of this text, for a response with this status.
    pub fn outcome_of_plain_text(&self, status: u16, text: &[u8]) -> Option<SignalOutcome> {
        let text = text.get(..MAX_COMMON_TEXT).unwrap_or(text);
        let mut listed = self.texts.iter().filter(|listed| listed.statuses.contains(&status));
        listed.find(|listed| listed.texts.iter().any(|part| contains(text, part))).map(|listed| listed.outcome)
    }

    /// A code in lower case and without marks: servers write `insufficient_quota`, `InsufficientQuota` and `insufficient quota`.
    fn normal_form(code: &str) -> String {
        code.chars().filter(|c| !matches!(c, '_' | '-' | ' ' | '.')).map(|c| c.to_ascii_lowercase()).collect()
    }

    fn overlaid(&self, over: &Self) -> Self {
        let mut paths = self.paths.clone();
        paths.extend(over.paths.iter().filter(|path| !self.paths.contains(path)).cloned());
        let mut codes = self.codes.clone();
        codes.extend(over.codes.iter().map(|(code, meanings)| (code.clone(), meanings.clone())));
        let mut text_paths = self.text_paths.clone();
        text_paths.extend(over.text_paths.iter().filter(|path| !self.text_paths.contains(path)).cloned());
        // The first text that matches decides, so an operator's come first.
        let texts = over.texts.iter().chain(&self.texts).cloned().collect();
        let fingerprint = *blake3::hash(&[self.fingerprint, over.fingerprint].concat()).as_bytes();
        Self { paths, codes, text_paths, texts, fingerprint }
    }
}

// === impl KeyShape ===

impl Prefixed for KeyShape {
    fn prefix(&self) -> &str {
        &self.prefix
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
