//! Configuration: flags and one YAML file, into settings that are valid by construction. Every limit is named here, with its why.

use std::{
    collections::{BTreeMap, BTreeSet},
    env, fs, io,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, SystemTime},
};

use serde::Deserialize;

use crate::{
    assess::{Origin, Snapshot},
    catalogue::Catalogue,
    policy::{Action, Enforcement, Exception, Group, Policy},
    problem::{Loaded, Problem, Problems},
    registry::Registry,
    spec::{Checkpoint, PlatformProxy},
    yaml,
};

/// The largest Decide request: 64 credentials of a few KiB are far below it.
pub const MAX_DECIDE_BYTES: usize = 256 * 1024;
/// The largest request of any kind: 256 items of a batch at 16 KiB.
pub const MAX_MESSAGE_BYTES: usize = 4 * 1024 * 1024;
/// Items of one batch: a fleet of a thousand restarts in four.
pub const MAX_BATCH_ITEMS: usize = 256;
/// Items of one batch that are decided at a time: enough to fill every provider's answer time, few enough to be fair.
pub const BATCH_CONCURRENCY: usize = 32;
/// The longest that one Decide may take, whatever the caller allows: the longest probe is 10 s detached, no caller waits for it.
pub const MAX_DECIDE_TIME: Duration = Duration::from_secs(5);
/// The longest that one batch may take.
pub const MAX_BATCH_TIME: Duration = Duration::from_secs(60);
/// Streams of one connection: a platform's handlers share one, and a create storm is hundreds.
pub const MAX_STREAMS_PER_CONNECTION: u32 = 1024;
/// How long calls under way may go on after the first signal.
pub const DRAIN_TIME: Duration = Duration::from_secs(10);
/// The largest file that holds a secret of ours.
const MAX_KEY_FILE_BYTES: u64 = 64 * 1024;

/// Where things are, as the command line has it.
#[derive(Debug, Clone, Default)]
pub struct Paths {
    /// Replaces the embedded registry.
    pub registry: Option<PathBuf>,
    /// Laid over the embedded catalogue.
    pub probe_catalog: Option<PathBuf>,
    /// The configuration file.
    pub config: Option<PathBuf>,
    /// Holds the key of credential fingerprints.
    pub fingerprint_key: Option<PathBuf>,
    /// Further certificate authorities for probes.
    pub probe_ca: Option<PathBuf>,
}

/// What the command line sets over the configuration file.
#[derive(Debug, Clone, Default)]
pub struct Overrides {
    /// What an unspecified `platform_proxy` means.
    pub platform_proxy: Option<PlatformProxy>,
    /// Operator overrides are refused.
    pub refuse_operator_overrides: bool,
    /// Further exempt runtimes.
    pub exempt_runtimes: Vec<String>,
}

/// Everything that a service is made of, checked.
#[derive(Debug)]
pub struct Setup {
    /// What decisions are made by.
    pub snapshot: Snapshot,
    /// The key of credential fingerprints.
    pub fingerprint_key: Option<[u8; 32]>,
    /// Further certificate authorities for probes, in PEM.
    pub probe_ca: Vec<u8>,
    /// What is odd about the files.
    pub warnings: Vec<Problem>,
}

/// The configuration does not stand.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// A file could not be read. A configured file that is missing is never taken for one that was not configured.
    #[error("{}: could not be read: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The fault.
        source: io::Error,
    },
    /// A file's content does not stand.
    #[error(transparent)]
    Content(#[from] Problems),
}

/// Reads everything. All problems of a file are in its error.
pub fn load(paths: &Paths, overrides: &Overrides) -> Result<Setup, ConfigError> {
    let Paths { registry, probe_catalog, config, fingerprint_key, probe_ca } = paths;
    let environment = |name: &str| env::var(name).ok();
    let mut warnings = Vec::new();
    let mut keep = |document: &str, found: Vec<Problem>| {
        warnings.extend(found.into_iter().map(|problem| Problem { place: format!("{document}: {}", problem.place), ..problem }));
    };
    let now = SystemTime::now();
    let origin = |path: Option<&PathBuf>| Origin { source: source_of(path), loaded_at: now };
    let document = |path: &Path| path.display().to_string();
    let Loaded { value: loaded_registry, warnings: found } = match registry {
        None => Registry::embedded(&environment)?,
        Some(path) => Registry::parse(&document(path), &read(path, yaml::MAX_DOCUMENT_BYTES as u64)?, &environment)?,
    };
    keep(&origin(registry.as_ref()).source, found);
    let Loaded { value: loaded_catalogue, warnings: found } = match probe_catalog {
        None => Catalogue::embedded()?,
        Some(path) => Catalogue::overlaid(&document(path), &read(path, yaml::MAX_DOCUMENT_BYTES as u64)?)?,
    };
    keep(&origin(probe_catalog.as_ref()).source, found);
    let mut policy = match config {
        None => Policy::default(),
        Some(path) => policy_of(&document(path), &read(path, yaml::MAX_DOCUMENT_BYTES as u64)?, &loaded_registry)?,
    };
    let Overrides { platform_proxy, refuse_operator_overrides, exempt_runtimes } = overrides;
    policy.platform_proxy = platform_proxy.unwrap_or(policy.platform_proxy);
    policy.honour_overrides &= !refuse_operator_overrides;
    policy.exempt_runtimes.extend(exempt_runtimes.iter().cloned());
    let fingerprint_key = match fingerprint_key {
        None => None,
        Some(path) => Some(blake3::derive_key("byok-gate credential fingerprint v1", &read(path, MAX_KEY_FILE_BYTES)?)),
    };
    Ok(Setup {
        snapshot: Snapshot {
            registry: Arc::new(loaded_registry),
            catalogue: Arc::new(loaded_catalogue),
            policy: Arc::new(policy),
            registry_origin: origin(registry.as_ref()),
            catalogue_origin: origin(probe_catalog.as_ref()),
        },
        fingerprint_key,
        probe_ca: probe_ca.as_ref().map_or(Ok(Vec::new()), |path| read(path, yaml::MAX_DOCUMENT_BYTES as u64))?,
        warnings,
    })
}

/// How a document is called: `embedded`, or its file's path.
pub(crate) fn source_of(path: Option<&PathBuf>) -> String {
    path.map_or_else(|| "embedded".to_owned(), |path| path.display().to_string())
}

/// A file's bytes, one more than the limit at most, so that the door behind it can say that there are too many.
pub(crate) fn read(path: &Path, limit: u64) -> Result<Vec<u8>, ConfigError> {
    use io::Read;
    let mut bytes = Vec::new();
    fs::File::open(path)
        .and_then(|file| file.take(limit + 1).read_to_end(&mut bytes))
        .map_err(|source| ConfigError::Read { path: path.to_owned(), source })?;
    Ok(bytes)
}

// === the configuration file ===

/// The document.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct ConfigFile {
    #[serde(default)]
    platform_proxy: Option<ProxyWord>,
    #[serde(default)]
    operator_overrides: Option<OverridesWord>,
    #[serde(default)]
    exempt_runtimes: Option<BTreeSet<String>>,
    #[serde(default)]
    policy: Option<PolicyFile>,
    #[serde(default)]
    providers: Option<BTreeMap<String, ProviderFile>>,
}

#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(rename_all = "lowercase")]
enum ProxyWord {
    Available,
    Absent,
}

#[derive(Debug, Clone, Copy, Deserialize, PartialEq)]
#[serde(rename_all = "lowercase")]
enum OverridesWord {
    Honour,
    Refuse,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct PolicyFile {
    #[serde(default)]
    create: GroupsFile,
    #[serde(default)]
    provision: GroupsFile,
    #[serde(default)]
    update: GroupsFile,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct GroupsFile {
    #[serde(default)]
    forbidden: Option<ActionWord>,
    #[serde(default)]
    unanswered: Option<ActionWord>,
    #[serde(default)]
    inconclusive: Option<ActionWord>,
    #[serde(default)]
    unverifiable: Option<ActionWord>,
}

#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum ActionWord {
    Allow,
    AllowIfRecentlyValid,
    Deny,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct ProviderFile {
    probe: ProbeWord,
    #[serde(default)]
    until: Option<String>,
}

#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(rename_all = "lowercase")]
enum ProbeWord {
    Enforce,
    Report,
    Off,
}

/// The policy that a configuration file sets. A key that is not known is an error: a typing error must not leave a default
/// in force that the operator thinks is gone.
fn policy_of(document: &str, bytes: &[u8], registry: &Registry) -> Result<Policy, Problems> {
    let failed = |list| Problems { document: document.to_owned(), list };
    let file = yaml::parse::<Option<ConfigFile>>(bytes).map_err(|problem| failed(vec![problem]))?.value.unwrap_or_default();
    let ConfigFile { platform_proxy, operator_overrides, exempt_runtimes, policy: groups, providers } = file;
    let mut policy = Policy::default();
    let mut problems = Vec::new();
    policy.platform_proxy = match platform_proxy {
        Some(ProxyWord::Available) => PlatformProxy::Available,
        Some(ProxyWord::Absent) | None => PlatformProxy::Absent,
    };
    policy.honour_overrides = operator_overrides != Some(OverridesWord::Refuse);
    policy.exempt_runtimes = exempt_runtimes.unwrap_or_default();
    let PolicyFile { create, provision, update } = groups.unwrap_or_default();
    for (checkpoint, groups) in [(Checkpoint::Create, create), (Checkpoint::Provision, provision), (Checkpoint::Update, update)] {
        let GroupsFile { forbidden, unanswered, inconclusive, unverifiable } = groups;
        let ruled = [
            (Group::Forbidden, forbidden),
            (Group::Unanswered, unanswered),
            (Group::Inconclusive, inconclusive),
            (Group::Unverifiable, unverifiable),
        ];
        for (group, word) in ruled {
            let action = match word {
                None => continue,
                Some(ActionWord::Allow) => Action::Allow,
                Some(ActionWord::AllowIfRecentlyValid) => Action::AllowIfRecentlyValid,
                Some(ActionWord::Deny) => Action::Deny,
            };
            policy.set_action(checkpoint, group, action);
        }
    }
    for (name, ProviderFile { probe, until }) in providers.unwrap_or_default() {
        let place = format!("providers.{name}");
        if !registry.providers().iter().any(|provider| provider.name == name) {
            problems.push(Problem::at(&place, "the registry has no provider of this name"));
        }
        let enforcement = match probe {
            ProbeWord::Enforce => continue,
            ProbeWord::Report => Enforcement::Report,
            ProbeWord::Off => Enforcement::Off,
        };
        let Some(until) = until else {
            problems
                .push(Problem::at(format!("{place}.until"), "is required with `report` and `off`: a date such as 2026-12-31"));
            continue;
        };
        match until.parse::<jiff::civil::Date>().ok().and_then(|date| date.to_zoned(jiff::tz::TimeZone::UTC).ok()) {
            Some(midnight) => {
                policy.set_exception(name, Exception { enforcement, until: midnight.timestamp().as_second() });
            }
            None => problems.push(Problem::at(format!("{place}.until"), format!("`{until}` is not a date such as 2026-12-31"))),
        }
    }
    if problems.is_empty() { Ok(policy) } else { Err(failed(problems)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(text: &str) -> Result<Policy, String> {
        let registry = Registry::embedded(&|_| None).unwrap().value;
        policy_of("test", text.as_bytes(), &registry).map_err(|problems| problems.to_string())
    }

    #[test]
    fn an_empty_file_is_the_default_policy() {
        let policy = parsed("# nothing\n").unwrap();
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
}
