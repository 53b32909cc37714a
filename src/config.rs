//! Configuration. Defaults, one YAML file, the environment and flags are merged into settings, which are checked.

pub mod changes;
mod layers;
mod plain_words;
pub mod settings;

use std::{
    collections::BTreeMap,
    env, io,
    path::{Path, PathBuf},
    sync::Arc,
    time::{SystemTime, UNIX_EPOCH},
};

use serde_json::Value;
use zeroize::Zeroizing;

pub use self::layers::{Flag, Origin};
use self::{
    layers::{Layers, MergedSettings},
    settings::Settings,
};
use crate::{
    core::{
        catalogue::Catalogue,
        policy::{Enforcement, Exception, Overrides as OverridesWord, Policy, ProviderException},
        registry::Registry,
        snapshot::{Origin as DocumentOrigin, Snapshot},
        yaml,
    },
    domain::{
        problem::{Loaded, Problem, Problems},
        request::PlatformProxy,
        secret::Secret,
        similar::most_similar,
    },
    liveness::{
        egress::{EgressSettings, ForwardProxy},
        tier::{ClientIdentity, IdentityFault, TierAccess, TierKeys},
    },
    server::{authorities, end_of_own},
    telemetry::status::CertificateEnd,
    watch::files,
};

/// The maximum size of a file with a secret of this service.
const MAX_KEY_FILE_BYTES: u64 = 64 * 1024;
/// The settings of files that are named more than once.
const PROXY_CREDENTIALS: &str = "egress.proxy.credentials_file";
const CLIENT_CERTIFICATE: &str = "tier.client_certificate_file";

/// The paths of files, from the command line.
#[derive(Debug, Clone, Default)]
pub struct Paths {
    /// The registry that replaces the embedded one.
    pub registry: Option<PathBuf>,
    /// The catalogue that is laid over the embedded one.
    pub probe_catalog: Option<PathBuf>,
    /// The configuration file.
    pub config: Option<PathBuf>,
    /// The file with the key of credential fingerprints.
    pub fingerprint_key: Option<PathBuf>,
    /// Further certificate authorities for probes.
    pub probe_ca: Option<PathBuf>,
}

/// Settings from the command line. They override the configuration file.
#[derive(Debug, Clone, Default)]
pub struct Overrides {
    /// What an unspecified `platform_proxy` means.
    pub platform_proxy: Option<PlatformProxy>,
    /// Refuses operator overrides.
    pub refuse_operator_overrides: bool,
    /// Further exempt runtimes.
    pub exempt_runtimes: Vec<String>,
    /// Flags for any other key.
    pub flags: Vec<Flag>,
}

/// Everything that a service is built from, checked.
#[derive(Debug)]
pub struct Setup {
    /// The registry, catalogue and policy of decisions.
    pub snapshot: Snapshot,
    /// The key of credential fingerprints.
    pub fingerprint_key: Option<[u8; 32]>,
    /// Further certificate authorities for probes, in PEM.
    pub probe_ca: Vec<u8>,
    /// The forward proxy for probes.
    pub proxy: Option<ForwardProxy>,
    /// Certificate authorities of the trace collector, in PEM.
    pub tracing_ca: Option<Vec<u8>>,
    /// All other settings.
    pub settings: Settings,
    /// Where each value that is not a default came from, by key.
    pub origins: BTreeMap<String, Origin>,
    /// The files that are watched: registry, catalogue, configuration.
    pub documents: Vec<PathBuf>,
    /// Warnings, document by document.
    pub warnings: Vec<Problems>,
}

/// All problems of the documents, document by document.
#[derive(Debug, thiserror::Error)]
#[error("{}", .0.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n"))]
pub struct ConfigError(pub Vec<Problems>);

/// Reads all documents within the time limit for files. The error holds all problems of all documents.
pub fn load(paths: &Paths, overrides: &Overrides) -> Result<Setup, ConfigError> {
    let (paths, overrides) = (paths.clone(), overrides.clone());
    let document = document_name(&paths);
    files::in_time(move || read_all(&paths, &overrides)).unwrap_or_else(|fault| {
        let list = vec![Problem::at("", fault.to_string())];
        Err(ConfigError(vec![Problems { document, list }]))
    })
}

fn read_all(paths: &Paths, overrides: &Overrides) -> Result<Setup, ConfigError> {
    let mut found = Found::default();
    let MergedSettings { settings, origins, problems } = merge_layers(paths, overrides, env::vars())?;
    let (mut of_settings, settings_warnings) = settings.review();
    of_settings.splice(0..0, problems);
    found.add_warnings(&document_name(paths), settings_warnings);
    let environment = |name: &str| env::var(name).ok();
    let registry_file = settings.registry.file.as_ref();
    let registry = found.document(registry_file, |document, bytes| {
        files::checking(|| match bytes {
            None => Registry::embedded(&environment),
            Some(bytes) => Registry::parse(document, bytes, &environment),
        })
    });
    let catalogue_file = settings.catalogue.file.as_ref();
    let catalogue = found.document(catalogue_file, |document, bytes| {
        files::checking(|| match bytes {
            None => Catalogue::embedded(),
            Some(bytes) => Catalogue::embedded()?.value.overlaid(document, bytes),
        })
    });
    let now = SystemTime::now();
    let seconds = now.duration_since(UNIX_EPOCH).map_or(0, |since| i64::try_from(since.as_secs()).unwrap_or(i64::MAX));
    let (policy, expired_exceptions) = policy_of(&settings, registry.as_ref(), seconds, &mut of_settings);
    found.add_warnings(&document_name(paths), expired_exceptions);
    let fingerprint_key = found.secret("fingerprints.key_file", settings.fingerprints.key_file.as_ref());
    let fingerprint_key = fingerprint_key.map(|bytes| blake3::derive_key("byok-gate credential fingerprint v1", &bytes));
    let probe_ca = found.authorities("probe.ca_file", settings.probe.ca_file.as_ref());
    let proxy_credentials = found.secret(PROXY_CREDENTIALS, settings.egress.proxy.credentials_file.as_ref());
    let proxy = proxy_of(&settings.egress, proxy_credentials.as_ref().map(|bytes| bytes.as_slice()), &mut of_settings);
    let tracing_ca = found.authorities("tracing.ca_file", settings.tracing.ca_file.as_ref());
    found.warn_if_readable("callers.token_file", settings.callers.token_file.as_ref());
    found.warn_if_readable("tls.key", settings.tls.key.as_ref());
    if !of_settings.is_empty() {
        found.faults.insert(0, Problems { document: document_name(paths), list: of_settings });
    }
    let Found { faults, warnings } = found;
    let (Some(registry), Some(catalogue), true) = (registry, catalogue, faults.is_empty()) else {
        return Err(ConfigError(faults));
    };
    let origin = |path: Option<&PathBuf>| DocumentOrigin::new(source_of(path), now);
    let (registry_origin, catalogue_origin) = (origin(registry_file), origin(catalogue_file));
    let without_file = || "defaults, environment and flags".to_owned();
    let configuration_source = paths.config.as_ref().map_or_else(without_file, |path| path.display().to_string());
    let configuration_origin = DocumentOrigin::new(configuration_source, now);
    let documents = [registry_file, catalogue_file, paths.config.as_ref()].into_iter().flatten().cloned().collect();
    let mut snapshot = files::checking(|| {
        Snapshot::new(Arc::new(registry), Arc::new(catalogue), Arc::new(policy), registry_origin, catalogue_origin)
    });
    snapshot.configuration_origin = configuration_origin;
    Ok(Setup {
        snapshot,
        fingerprint_key,
        probe_ca: probe_ca.unwrap_or_default(),
        proxy,
        tracing_ca,
        settings,
        origins,
        documents,
        warnings,
    })
}

/// The name of a document: `embedded`, or its file's path.
pub(crate) fn source_of(path: Option<&PathBuf>) -> String {
    path.map_or_else(|| "embedded".to_owned(), |path| path.display().to_string())
}

/// Reads only the settings. It reads no other file than the configuration file.
pub fn settings_of(
    paths: &Paths,
    overrides: &Overrides,
    environment: impl Iterator<Item = (String, String)>,
) -> Result<(Settings, BTreeMap<String, Origin>), ConfigError> {
    let MergedSettings { settings, origins, mut problems } = merge_layers(paths, overrides, environment)?;
    problems.extend(settings.review().0);
    if problems.is_empty() {
        Ok((settings, origins))
    } else {
        Err(ConfigError(vec![Problems { document: document_name(paths), list: problems }]))
    }
}

/// Reads the settings even if some values are wrong, and returns the problems too. A value of the wrong type is replaced by its default.
pub fn settings_with_problems(paths: &Paths, overrides: &Overrides) -> Result<(Settings, Vec<Problem>), ConfigError> {
    let MergedSettings { settings, mut problems, .. } = merge_layers(paths, overrides, env::vars())?;
    problems.extend(settings.review().0);
    Ok((settings, problems))
}

fn merge_layers(
    paths: &Paths,
    overrides: &Overrides,
    environment: impl Iterator<Item = (String, String)>,
) -> Result<MergedSettings, ConfigError> {
    let mut layers = Layers::new();
    if let Some(path) = &paths.config {
        let document = path.display().to_string();
        let bytes =
            files::read(path, yaml::MAX_DOCUMENT_BYTES as u64).map_err(|fault| ConfigError(vec![unreadable(path, &fault)]))?;
        let tree = yaml::tree(&bytes)
            .map_err(|problem| ConfigError(vec![Problems { document: document.clone(), list: vec![problem] }]))?;
        layers.file(&document, tree);
    }
    // Sorted, so that the result does not depend on the order of the process's environment.
    layers.environment(environment.collect::<BTreeMap<_, _>>().into_iter());
    for flag in flags_of(paths, overrides) {
        layers.flag(flag);
    }
    let mut merged = layers.finish();
    if !overrides.exempt_runtimes.is_empty() {
        // Flags add to this list and do not replace it: only the file can remove an exemption.
        merged.settings.exempt_runtimes.extend(overrides.exempt_runtimes.iter().cloned());
        merged.origins.insert("exempt_runtimes".to_owned(), Origin::Flag("--exempt-runtime"));
    }
    Ok(merged)
}

/// Logs warnings.
pub fn warn(warnings: &[Problems]) {
    for Problems { document, list } in warnings {
        for Problem { place, line, message } in list {
            tracing::warn!(event = "configuration_warning", document, line, place, "{message}");
        }
    }
}

/// What was read for the shared tier.
#[derive(Debug, Default)]
pub struct TierFiles {
    /// The settings with the contents of the files. `None` without a tier.
    pub access: Option<TierAccess>,
    /// The expiry of the client certificate, if there is one.
    pub certificate: Option<CertificateEnd>,
    /// Warnings, file by file.
    pub warnings: Vec<Problems>,
}

/// Reads the files that `tier` names, within the time limit for files. Only `serve` reads them, so that no other command holds the tier's keys.
pub fn tier_access(settings: &Settings) -> Result<TierFiles, ConfigError> {
    let settings = settings.clone();
    files::in_time(move || read_tier(&settings)).unwrap_or_else(|fault| {
        let list = vec![Problem::at("", fault.to_string())];
        Err(ConfigError(vec![Problems { document: "tier".to_owned(), list }]))
    })
}

fn read_tier(settings: &Settings) -> Result<TierFiles, ConfigError> {
    let tier = &settings.tier;
    if tier.place().is_none() {
        return Ok(TierFiles::default());
    }
    let mut found = Found::default();
    let secret = |text: &str| Ok(Secret::new(text.trim().to_owned()));
    let one_line = |text: &str| match text.trim().lines().count() {
        0 | 1 => secret(text),
        _ => Err("holds more than one line: write the password alone".to_owned()),
    };
    let password = found.secret_text("tier.password_file", tier.password_file.as_ref(), one_line);
    let of_sentinels = found.secret_text("tier.sentinel.password_file", tier.sentinel.password_file.as_ref(), one_line);
    let keys = found.secret_text("tier.key_file", tier.key_file.as_ref(), TierKeys::parse);
    let ca = found.authorities("tier.ca_file", tier.ca_file.as_ref());
    let certificate = found.checked(CLIENT_CERTIFICATE, tier.client_certificate_file.as_ref(), end_of_own);
    let client_key = found.secret_text("tier.client_key_file", tier.client_key_file.as_ref(), secret);
    let (certificate, end) = certificate.unzip();
    let identity = certificate.zip(client_key).and_then(|(certificate, key)| {
        ClientIdentity::new(certificate, key)
            .map_err(|fault| {
                let (setting, path, message) = match fault {
                    IdentityFault::Certificate(message) => (CLIENT_CERTIFICATE, &tier.client_certificate_file, message),
                    IdentityFault::Key(message) => ("tier.client_key_file", &tier.client_key_file, message),
                };
                found.fault_of(setting, path.as_ref(), message);
            })
            .ok()
    });
    let Found { faults, warnings } = found;
    match tier.servers(of_sentinels).zip(keys).filter(|_| faults.is_empty()) {
        Some((servers, keys)) => {
            let access = TierAccess { servers, timeout: tier.timeout, user: tier.user.clone(), password, ca, identity, keys };
            let certificate =
                end.flatten().map(|end| (CLIENT_CERTIFICATE, source_of(tier.client_certificate_file.as_ref()), end));
            Ok(TierFiles { access: Some(access), certificate, warnings })
        }
        None => Err(ConfigError(faults)),
    }
}

/// Warnings about files with a secret of this service that every user of this machine can read.
pub fn readable_secrets(settings: &Settings) -> Vec<Problems> {
    let mut found = Found::default();
    let files = [
        ("callers.token_file", &settings.callers.token_file),
        ("tls.key", &settings.tls.key),
        ("fingerprints.key_file", &settings.fingerprints.key_file),
        (PROXY_CREDENTIALS, &settings.egress.proxy.credentials_file),
        ("tier.password_file", &settings.tier.password_file),
        ("tier.sentinel.password_file", &settings.tier.sentinel.password_file),
        ("tier.client_key_file", &settings.tier.client_key_file),
        ("tier.key_file", &settings.tier.key_file),
    ];
    files.into_iter().for_each(|(setting, file)| found.warn_if_readable(setting, file.as_ref()));
    found.warnings
}

/// Lists every setting with its value.
pub fn list_settings(settings: &Settings) -> Vec<(String, Value)> {
    layers::leaves(settings)
}

/// The document to name in problems of the settings.
fn document_name(paths: &Paths) -> String {
    paths.config.as_ref().map_or_else(|| "configuration".to_owned(), |path| path.display().to_string())
}

/// The problem of a file that could not be read.
pub(crate) fn unreadable(path: &Path, fault: &io::Error) -> Problems {
    let list = vec![Problem::at("", format!("could not be read: {fault}"))];
    Problems { document: path.display().to_string(), list }
}

/// The problems and warnings found so far.
#[derive(Default)]
struct Found {
    faults: Vec<Problems>,
    warnings: Vec<Problems>,
}

// === impl Found ===

impl Found {
    fn add_warnings(&mut self, document: &str, list: Vec<Problem>) {
        if !list.is_empty() {
            self.warnings.push(Problems { document: document.to_owned(), list });
        }
    }

    /// Parses a document, embedded or from a file.
    fn document<T>(
        &mut self,
        path: Option<&PathBuf>,
        parse: impl FnOnce(&str, Option<&[u8]>) -> Result<Loaded<T>, Problems>,
    ) -> Option<T> {
        let source = source_of(path);
        let bytes = match path {
            None => None,
            Some(_) => Some(self.bytes(path, yaml::MAX_DOCUMENT_BYTES as u64)?),
        };
        match parse(&source, bytes.as_ref().map(|bytes| bytes.as_slice())) {
            Ok(Loaded { value, warnings }) => {
                self.add_warnings(&source, warnings);
                Some(value)
            }
            Err(problems) => {
                self.faults.push(problems);
                None
            }
        }
    }

    /// Reads a configured file. A missing file is a fault, and not the same as no file configured.
    fn bytes(&mut self, path: Option<&PathBuf>, limit: u64) -> Option<Zeroizing<Vec<u8>>> {
        let path = path?;
        files::read(path, limit)
            .map_err(|fault| {
                self.faults.push(unreadable(path, &fault));
            })
            .ok()
    }

    /// Reads a file with a secret of this service. An empty file is a fault. Faults name the setting too.
    fn secret(&mut self, setting: &str, path: Option<&PathBuf>) -> Option<Zeroizing<Vec<u8>>> {
        self.naming(setting, |found| {
            let bytes = found.bytes(path, MAX_KEY_FILE_BYTES)?;
            found.warn_if_readable(setting, path);
            if bytes.trim_ascii().is_empty() {
                let list = vec![Problem::at("", "is empty, and has to hold a secret")];
                found.faults.push(Problems { document: source_of(path), list });
                return None;
            }
            Some(bytes)
        })
    }

    /// Reads a secret and parses it as text. Its faults name the setting too.
    fn secret_text<T>(
        &mut self,
        setting: &str,
        path: Option<&PathBuf>,
        parse: impl FnOnce(&str) -> Result<T, String>,
    ) -> Option<T> {
        let bytes = self.secret(setting, path)?;
        let parsed = std::str::from_utf8(&bytes).map_err(|_| "is not UTF-8".to_owned()).and_then(parse);
        parsed.map_err(|message| self.fault_of(setting, path, message)).ok()
    }

    /// Reads a configured file and checks its content. Its faults name the setting too.
    fn checked<T>(
        &mut self,
        setting: &str,
        path: Option<&PathBuf>,
        check: impl FnOnce(&[u8]) -> Result<T, String>,
    ) -> Option<(Vec<u8>, T)> {
        let bytes = self.naming(setting, |found| found.bytes(path, yaml::MAX_DOCUMENT_BYTES as u64))?.to_vec();
        match check(&bytes) {
            Ok(found) => Some((bytes, found)),
            Err(message) => {
                self.fault_of(setting, path, message);
                None
            }
        }
    }

    /// Reads a PEM file of certificate authorities.
    fn authorities(&mut self, setting: &str, path: Option<&PathBuf>) -> Option<Vec<u8>> {
        self.checked(setting, path, authorities).map(|(pem, _)| pem)
    }

    fn fault_of(&mut self, setting: &str, path: Option<&PathBuf>, message: String) {
        self.faults.push(Problems { document: source_of(path), list: vec![Problem::at(setting, message)] });
    }

    /// Names the setting in the faults of this work.
    fn naming<T>(&mut self, setting: &str, work: impl FnOnce(&mut Self) -> T) -> T {
        let before = self.faults.len();
        let done = work(self);
        for problem in self.faults.iter_mut().skip(before).flat_map(|problems| &mut problems.list) {
            problem.place = setting.to_owned();
        }
        done
    }

    fn warn_if_readable(&mut self, setting: &str, path: Option<&PathBuf>) {
        if path.is_some_and(|path| files::is_readable_by_all(path)) {
            let problem =
                Problem::at(setting, "holds a secret, and every user of this machine can read it; give it mode 0600 or 0640");
            self.add_warnings(&source_of(path), vec![problem]);
        }
    }
}

/// The forward proxy with its credentials. A fault in them is a problem of the settings.
fn proxy_of(egress: &EgressSettings, credentials: Option<&[u8]>, problems: &mut Vec<Problem>) -> Option<ForwardProxy> {
    let place = PROXY_CREDENTIALS;
    let text = match credentials.map(std::str::from_utf8).transpose() {
        Ok(text) => text,
        Err(_) => {
            problems.push(Problem::at(place, "is not UTF-8"));
            return None;
        }
    };
    // The review has checked the URL.
    egress.proxy.url.as_ref()?;
    match egress.forward_proxy(text) {
        Ok(proxy) => proxy,
        Err(message) if text.is_some() => {
            problems.push(Problem::at(place, message));
            None
        }
        Err(_) => None,
    }
}

fn flags_of(paths: &Paths, overrides: &Overrides) -> Vec<Flag> {
    let Paths { registry, probe_catalog, config: _, fingerprint_key, probe_ca } = paths;
    let Overrides { platform_proxy, refuse_operator_overrides, exempt_runtimes: _, flags } = overrides;
    let files = [
        ("--registry", "registry.file", registry),
        ("--probe-catalog", "catalogue.file", probe_catalog),
        ("--fingerprint-key-file", "fingerprints.key_file", fingerprint_key),
        ("--probe-ca-file", "probe.ca_file", probe_ca),
    ];
    let files = files.into_iter().filter_map(|(name, key, path)| {
        Some(Flag { name, key, value: Value::String(path.as_ref()?.to_string_lossy().into_owned()) })
    });
    let proxy = platform_proxy.map(|proxy| Flag {
        name: "--platform-proxy",
        key: "platform_proxy",
        value: Value::from(match proxy {
            PlatformProxy::Available => "available",
            PlatformProxy::Absent => "absent",
        }),
    });
    let refuse = refuse_operator_overrides.then(|| Flag {
        name: "--refuse-operator-overrides",
        key: "operator_overrides",
        value: Value::from("refuse"),
    });
    files.chain(proxy).chain(refuse).chain(flags.iter().cloned()).collect()
}

/// A runtime's name that is so near to one of the registry is taken for a misspelt one.
const NEARLY: f64 = 0.88;

/// Builds the policy from the settings. Also returns warnings about exceptions that have expired.
fn policy_of(settings: &Settings, registry: Option<&Registry>, now: i64, problems: &mut Vec<Problem>) -> (Policy, Vec<Problem>) {
    let mut policy = Policy::default();
    policy.platform_proxy = settings.platform_proxy;
    policy.honour_overrides = settings.operator_overrides == OverridesWord::Honour;
    policy.exempt_runtimes = settings.exempt_runtimes.clone();
    for (checkpoint, actions) in settings.policy.checkpoints() {
        actions.groups().into_iter().for_each(|(group, action)| policy.set_action(checkpoint, group, action));
    }
    let mut warnings = Vec::new();
    // An exempt runtime need not be in the registry. One that is nearly there is misspelt.
    for name in settings.exempt_runtimes.iter().filter(|name| registry.is_some_and(|registry| registry.runtime(name).is_none())) {
        let known = registry.into_iter().flat_map(Registry::runtimes).map(|(other, _)| other);
        let nearest = most_similar(known, |other| strsim::jaro_winkler(&name.to_lowercase(), &other.to_lowercase()));
        if let Some((nearest, _)) = nearest.filter(|(_, likeness)| *likeness >= NEARLY) {
            let message =
                format!("`{name}` is no runtime of the registry, and so exempts nothing there; the nearest is `{nearest}`");
            warnings.push(Problem::at("exempt_runtimes", message));
        }
    }
    for (name, ProviderException { probe: enforcement, until }) in &settings.providers {
        let place = format!("providers.{name}");
        if let Some(registry) = registry
            && !registry.providers().iter().any(|provider| provider.name == *name)
        {
            problems.push(Problem::at(&place, unknown_provider(name, registry)));
        }
        if *enforcement == Enforcement::Enforce {
            continue;
        }
        let Some(until) = until else {
            problems
                .push(Problem::at(format!("{place}.until"), "is required with `report` and `off`: a date such as 2026-12-31"));
            continue;
        };
        match until.parse::<jiff::civil::Date>().ok().and_then(|date| date.to_zoned(jiff::tz::TimeZone::UTC).ok()) {
            Some(midnight) => {
                let until = midnight.timestamp().as_second();
                if until <= now {
                    warnings
                        .push(Problem::at(format!("{place}.until"), "has passed: the provider is enforced; take the entry out"));
                }
                policy.set_exception(name.clone(), Exception { enforcement: *enforcement, until });
            }
            None => problems.push(Problem::at(format!("{place}.until"), format!("`{until}` is not a date such as 2026-12-31"))),
        }
    }
    (policy, warnings)
}

fn unknown_provider(name: &str, registry: &Registry) -> String {
    let known = registry.providers().iter().map(|provider| provider.name.as_str());
    let nearest = most_similar(known, |other| strsim::jaro_winkler(name, other));
    nearest
        .map_or_else(String::new, |(nearest, _)| format!("the registry has no provider of this name; the nearest is `{nearest}`"))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::{
        core::policy::{Action, Group},
        domain::request::Checkpoint,
        server::settings::{CallerList, RoleWord},
    };

    fn parsed(text: &str) -> Result<Policy, String> {
        let registry = Registry::embedded(&|_| None).unwrap().value;
        let mut layers = Layers::new();
        layers.file("test", yaml::tree(text.as_bytes()).map_err(|problem| problem.to_string())?);
        let MergedSettings { settings, mut problems, .. } = layers.finish();
        let (policy, _) = policy_of(&settings, Some(&registry), 0, &mut problems);
        if problems.is_empty() { Ok(policy) } else { Err(format!("{problems:?}")) }
    }

    #[test]
    fn an_empty_mapping_is_the_default_policy_and_an_empty_file_is_none() {
        for text in ["", "# nothing\n", "---\n"] {
            assert!(parsed(text).unwrap_err().contains("is empty; write `{}`"), "{text:?}");
        }
        let policy = parsed("{}").unwrap();
        assert_eq!(policy.action(Checkpoint::Provision, Group::Unanswered), Action::AllowIfRecentlyValid);
        assert_eq!(policy.platform_proxy, PlatformProxy::Absent);
        assert!(policy.honour_overrides);
    }

    #[test]
    fn groups_and_providers_are_set() {
        let policy = parsed(
            "platform_proxy: available\noperator_overrides: refuse\nexempt_runtimes: [mock]\n\
             policy: {create: {inconclusive: deny}}\nproviders: {deepseek: {probe: off, until: 2026-12-01}}\n",
        )
        .unwrap();
        assert_eq!(policy.action(Checkpoint::Create, Group::Inconclusive), Action::Deny);
        assert_eq!(policy.action(Checkpoint::Update, Group::Inconclusive), Action::Allow);
        let midnight = 1_796_083_200; // 2026-12-01T00:00:00Z
        assert_eq!(policy.enforcement("deepseek", midnight - 1), Enforcement::Off);
        assert_eq!(policy.enforcement("deepseek", midnight), Enforcement::Enforce);
        assert_eq!(policy.enforcement("openai-api", 0), Enforcement::Enforce);
        assert!(policy.exempt_runtimes.contains("mock") && !policy.honour_overrides);
    }

    #[test]
    fn nothing_can_allow_an_invalid_key_and_typing_errors_are_refused() {
        for text in [
            "policy: {create: {invalid: allow}}",
            "policy: {create: {unanswered: maybe}}",
            "platfrom_proxy: available",
            "providers: {deepseek: {probe: off}}",
            "providers: {deepseek: {probe: report, until: soon}}",
            "providers: {nobody: {probe: report, until: 2026-12-01}}",
        ] {
            assert!(parsed(text).is_err(), "{text}");
        }
    }

    fn merged(
        text: &str,
        environment: &[(&str, &str)],
        flags: Vec<Flag>,
    ) -> Result<(Settings, BTreeMap<String, Origin>), String> {
        let folder = tempfile::tempdir().unwrap();
        let config = folder.path().join("byok-gate.yaml");
        fs::write(&config, text).unwrap();
        let paths = Paths { config: Some(config), ..Paths::default() };
        let environment = environment.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
        settings_of(&paths, &Overrides { flags, ..Overrides::default() }, environment).map_err(|fault| fault.to_string())
    }

    #[test]
    fn a_later_layer_wins_and_every_value_knows_where_it_came_from() {
        let text = "limits: {decisions: 1, connections: 1, batch_items: 1}\n";
        let environment = [("BYOK_GATE__LIMITS__CONNECTIONS", "2"), ("BYOK_GATE__LIMITS__BATCH_ITEMS", "2"), ("PATH", "/bin")];
        let flag = Flag { name: "--test", key: "limits.batch_items", value: Value::from(3) };
        let (settings, origins) = merged(text, &environment, vec![flag]).unwrap();
        let limits = &settings.limits;
        assert_eq!((limits.decisions, limits.connections, limits.batch_items), (1, 2, 3));
        assert_eq!(limits.credentials, Settings::default().limits.credentials);
        let from = |key: &str| origins.get(key).map(ToString::to_string);
        assert!(from("limits.decisions").unwrap().starts_with("file "));
        assert_eq!(from("limits.connections").unwrap(), "environment BYOK_GATE__LIMITS__CONNECTIONS");
        assert_eq!(from("limits.batch_items").unwrap(), "flag --test");
        assert_eq!(from("limits.credentials"), None);
    }

    #[test]
    fn the_environment_can_set_every_type() {
        let environment = [
            ("BYOK_GATE__SERVER__LISTEN", "127.0.0.1:1, unix:/run/x.sock"),
            ("BYOK_GATE__SERVER__INSECURE_LISTEN", "true"),
            ("BYOK_GATE__SOCKET__MODE", "0600"),
            ("BYOK_GATE__SOCKET__GROUP", "1000"),
            ("BYOK_GATE__TLS__KEY", "/k"),
            ("BYOK_GATE__TLS__CERTIFICATE", "7"),
            ("BYOK_GATE__DEADLINES__DECIDE", "250ms"),
            ("BYOK_GATE__LOG__PLAIN_ALLOW_RATIO", "0.25"),
            ("BYOK_GATE__CALLERS__UNIX_PEERS", "[{uid: 7, role: operator}]"),
            ("BYOK_GATE__POLICY__CREATE__INCONCLUSIVE", "deny"),
            ("BYOK_GATE__EXEMPT_RUNTIMES", "mock"),
        ];
        let settings = merged("{}", &environment, Vec::new()).unwrap().0;
        assert_eq!(settings.server.listen, ["127.0.0.1:1", "unix:/run/x.sock"]);
        assert!(settings.server.insecure_listen);
        assert_eq!((settings.socket.mode.as_str(), settings.socket.group), ("0600", Some(1000)));
        assert_eq!(settings.tls.certificate.as_deref(), Some(Path::new("7")));
        assert_eq!(settings.deadlines.decide.as_millis(), 250);
        assert!((settings.log.plain_allow_ratio - 0.25).abs() < f64::EPSILON);
        assert_eq!(settings.callers.unix_peers.entries()[0].role, RoleWord::Operator);
        assert!(settings.exempt_runtimes.contains("mock"));
    }

    #[test]
    fn an_invalid_setting_is_named_with_its_place_and_the_nearest_key() {
        for (text, environment, expect) in [
            ("limits: {decision: 1}", None, "limits.decision: is not a key (from file"),
            ("limits: {decision: 1}", None, "the nearest is `limits.decisions`"),
            ("limit: {decisions: 1}", None, "the nearest is `limits`"),
            ("{}", Some(("BYOK_GATE__LIMITS__CONECTIONS", "1")), "the nearest is `limits.connections`"),
            ("{}", Some(("BYOK_GATE__SHUTDOWN", "1")), "shutdown: is a section of keys"),
            ("{}", Some(("BYOK_GATE__LIMITS__DECISIONS", "many")), "(from environment BYOK_GATE__LIMITS__DECISIONS)"),
            ("limits: {decisions: 0}", None, "limits.decisions: is 0; it must be 1 to"),
            ("limits: {decisions: -1}", None, "limits.decisions: is `-1`; it must be a whole number of 0 or more"),
            ("deadlines: {decide: 5}", None, "deadlines.decide: "),
            ("deadlines: {decide: 0s}", None, "deadlines.decide: is 0s; it must be 100ms to"),
            ("deadlines: {decide: 5ms}", None, "deadlines.decide: is 5ms; it must be 100ms to"),
            ("limits: {message_bytes: 1}", None, "limits.message_bytes: is 1; it must be 4096 to"),
            ("cache: {valid: 0s}", None, "cache.valid: is 0s; it must be 1s to"),
            ("limits: {request_bytes: 1048576}", None, "limits.request_bytes: must not be less than"),
            ("server: {keepalive_interval: 500ms}", None, "server.keepalive_interval: is 500ms; it must be 1s to 9h"),
            ("server: {keepalive_timeout: 10h}", None, "server.keepalive_timeout: is 10h; it must be 1s to 9h"),
            ("server: {listen: []}", None, "server.listen: names no address"),
            ("server: {worker_threads: 100000}", None, "server.worker_threads: must be at most"),
            ("log: {plain_allow_ratio: 1.5}", None, "log.plain_allow_ratio: is 1.5; it must be 0 to 1"),
            ("log: {plain_allow_ratio: .nan}", None, "log.plain_allow_ratio: "),
            ("socket: {mode: '0990'}", None, "socket.mode: `0990` is not"),
            ("tls: {certificate: /c}", None, "tls.key: is required"),
            ("tls: {client_ca: /c}", None, "tls.certificate: is required"),
            ("exempt_runtimes: ['']", None, "exempt_runtimes: \"\" is empty or padded"),
            ("exempt_runtimes: [' a']", None, "exempt_runtimes: \" a\" is empty or padded"),
            ("{}", Some(("BYOK_GATE__EXEMPT_RUNTIMES", "a,,b")), "exempt_runtimes: \"\" is empty or padded"),
            ("{}", Some(("BYOK_GATE__EXEMPT_RUNTIMES", ",")), "exempt_runtimes: \"\" is empty or padded"),
            ("{}", Some(("BYOK_GATE__EXEMPT_RUNTIMES", "[\"\"]")), "exempt_runtimes: \"\" is empty or padded"),
            ("server: {listen: ['']}", None, "server.listen[0]: is empty or padded"),
            ("{}", Some(("BYOK_GATE__SERVER__LISTEN", "")), "server.listen: names no address"),
            ("{}", Some(("BYOK_GATE__SERVER__LISTEN", ",")), "server.listen[0]: is empty or padded"),
            (
                "callers: {unix_peers: [{uid: 1, role: workspace, workspaces: ['']}]}",
                None,
                "callers.unix_peers[0].workspaces: holds an id that is empty",
            ),
            (
                "callers: {unix_peers: everyone}",
                None,
                "callers.unix_peers: is the text `everyone`; it must be a list of callers, or the word `anyone`",
            ),
            ("", None, "is empty; write `{}`"),
            ("callers: {certificates: [{san: a}]}", None, "callers.certificates: needs tls.client_ca"),
            ("callers: {unix_peers: [{}]}", None, "callers.unix_peers[0]: needs a uid"),
            ("callers: {unix_peers: [{uid: 1, role: workspace}]}", None, "callers.unix_peers[0]: names no workspaces"),
            (
                "callers: {unix_peers: [{uid: 1, rule: workspace}]}",
                None,
                "callers.unix_peers: holds the key `rule`, which is not known there",
            ),
            ("cache: {hard_maximum: 10s}", None, "cache.hard_maximum: must not be less"),
            ("limits: {decisions: 1}\nlimits: {decisions: 2}", None, "limits: this key appears twice"),
            ("- a", None, "must be a mapping"),
        ] {
            let fault = merged(text, environment.as_slice(), Vec::new()).unwrap_err();
            assert!(fault.contains(expect), "{text} {environment:?}: {fault}");
        }
    }

    #[test]
    fn an_empty_variable_means_none() {
        let environment = [
            ("BYOK_GATE__EXEMPT_RUNTIMES", ""),
            ("BYOK_GATE__CALLERS__UNIX_PEERS", " "),
            ("BYOK_GATE__TLS__KEY", ""),
            ("BYOK_GATE__ADMIN__LISTEN", ""),
            ("BYOK_GATE__CALLERS__CERTIFICATES", "anyone"),
        ];
        let text = "exempt_runtimes: [mock]\ncallers: {unix_peers: [{uid: 1}]}\nadmin: {listen: '127.0.0.1:1'}\n";
        let settings = merged(text, &environment, Vec::new()).unwrap().0;
        assert!(settings.exempt_runtimes.is_empty() && settings.callers.unix_peers.entries().is_empty());
        assert_eq!((settings.tls.key, settings.admin.listen, settings.callers.certificates), (None, None, CallerList::Anyone));
    }

    /// An unknown key, a value of the wrong type, one out of bounds and an unknown provider are all reported together.
    #[test]
    fn all_problems_are_reported_at_once() {
        let folder = tempfile::tempdir().unwrap();
        let config = folder.path().join("byok-gate.yaml");
        let text = "limit: {}\nlimits: {decisions: many, batch_items: 0}\nproviders: {deepsek: {probe: report, until: 2026-12-01}}\n\
                    registry: {file: /no/such/registry.yaml}\n";
        fs::write(&config, text).unwrap();
        let fault =
            load(&Paths { config: Some(config.clone()), ..Paths::default() }, &Overrides::default()).unwrap_err().to_string();
        for expect in
            ["limit: is not a key", "limits.decisions: is the text `many`", "limits.batch_items: is 0", "/no/such/registry.yaml"]
        {
            assert!(fault.contains(expect), "{expect} in {fault}");
        }
        fs::write(&config, text.replace("registry: {file: /no/such/registry.yaml}\n", "")).unwrap();
        let fault = load(&Paths { config: Some(config), ..Paths::default() }, &Overrides::default()).unwrap_err().to_string();
        for expect in
            ["limit: is not a key", "providers.deepsek: the registry has no provider of this name; the nearest is `deepseek`"]
        {
            assert!(fault.contains(expect), "{expect} in {fault}");
        }
    }

    #[test]
    fn the_reference_file_says_every_default_and_nothing_else() {
        let tree = yaml::tree(include_bytes!("../deploy/byok-gate.yaml")).unwrap();
        let said: Settings = serde_json::from_value(tree.clone()).unwrap();
        assert_eq!(said, Settings::default());
        let keys = |value: &Value| leaves("", value);
        assert_eq!(keys(&tree), keys(&serde_json::to_value(Settings::default()).unwrap()));
    }

    fn leaves(at: &str, value: &Value) -> Vec<String> {
        match value.as_object().filter(|members| !members.is_empty()) {
            Some(members) => members.iter().flat_map(|(name, value)| leaves(&format!("{at}.{name}"), value)).collect(),
            None => vec![at.to_owned()],
        }
    }
}
