//! Configuration: defaults, one YAML file, the environment and flags, into settings that are valid by construction.

mod layers;
pub mod settings;

use std::{
    collections::BTreeMap,
    env, fs, io,
    path::{Path, PathBuf},
    sync::Arc,
    time::SystemTime,
};

use serde_json::Value;
use url::Url;

pub use self::layers::{Flag, From as Origin};
use self::{
    layers::Layers,
    settings::{OverridesWord, ProbeWord, ProviderException, ProxyWord, RoleWord, Settings, Tracing},
};
use crate::{
    core::{
        catalogue::Catalogue,
        policy::{Enforcement, Exception, Group, Policy},
        registry::Registry,
        snapshot::{Origin as DocumentOrigin, Snapshot},
        yaml,
    },
    domain::{
        problem::{Loaded, Problem, Problems},
        request::{Checkpoint, PlatformProxy},
    },
    liveness::{cache::CacheSettings, prober::ProbeSettings, provider_limits::ProviderLimits},
    telemetry::traces::TraceSettings,
};

/// The largest file that holds a secret of ours.
const MAX_KEY_FILE_BYTES: u64 = 64 * 1024;
/// The largest count or size that a limit may have: far above any use, far below where arithmetic ends.
const MAX_COUNT: usize = 1 << 30;
/// A token of 4 KiB beside the usual headers must pass.
const MIN_HEADER_LIST_BYTES: u32 = 8 * 1024;
/// More threads than that help nobody.
const MAX_WORKER_THREADS: usize = 256;

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
    /// Any other key.
    pub flags: Vec<Flag>,
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
    /// Everything else that is set.
    pub settings: Settings,
    /// Where each value came from that is not a default, by its key.
    pub origins: BTreeMap<String, Origin>,
    /// The files that decisions are made by: registry, catalogue, configuration.
    pub documents: Vec<PathBuf>,
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
    let (settings, origins) = settings_of(paths, overrides, env::vars())?;
    let environment = |name: &str| env::var(name).ok();
    let mut warnings = Vec::new();
    let mut keep = |document: &str, found: Vec<Problem>| {
        warnings.extend(found.into_iter().map(|problem| Problem { place: format!("{document}: {}", problem.place), ..problem }));
    };
    let now = SystemTime::now();
    let origin =
        |path: Option<&PathBuf>| DocumentOrigin { source: source_of(path), loaded_at: now, last_reload_error: String::new() };
    let document = |path: &Path| path.display().to_string();
    let registry_file = settings.registry.file.as_ref();
    let Loaded { value: registry, warnings: found } = match registry_file {
        None => Registry::embedded(&environment)?,
        Some(path) => Registry::parse(&document(path), &read(path, yaml::MAX_DOCUMENT_BYTES as u64)?, &environment)?,
    };
    keep(&origin(registry_file).source, found);
    let catalogue_file = settings.catalogue.file.as_ref();
    let Loaded { value: catalogue, warnings: found } = match catalogue_file {
        None => Catalogue::embedded()?,
        Some(path) => Catalogue::overlaid(&document(path), &read(path, yaml::MAX_DOCUMENT_BYTES as u64)?)?,
    };
    keep(&origin(catalogue_file).source, found);
    let policy = policy_of(&settings, &registry).map_err(|list| Problems { document: named(paths), list })?;
    let fingerprint_key = match &settings.fingerprints.key_file {
        None => None,
        Some(path) => Some(blake3::derive_key("byok-gate credential fingerprint v1", &read(path, MAX_KEY_FILE_BYTES)?)),
    };
    let probe_ca = match &settings.probe.ca_file {
        None => Vec::new(),
        Some(path) => read(path, yaml::MAX_DOCUMENT_BYTES as u64)?,
    };
    let (registry_origin, catalogue_origin) = (origin(registry_file), origin(catalogue_file));
    let documents = [registry_file, catalogue_file, paths.config.as_ref()].into_iter().flatten().cloned().collect();
    Ok(Setup {
        snapshot: Snapshot::new(Arc::new(registry), Arc::new(catalogue), Arc::new(policy), registry_origin, catalogue_origin),
        fingerprint_key,
        probe_ca,
        settings,
        origins,
        documents,
        warnings,
    })
}

/// How a document is called: `embedded`, or its file's path.
pub(crate) fn source_of(path: Option<&PathBuf>) -> String {
    path.map_or_else(|| "embedded".to_owned(), |path| path.display().to_string())
}

/// The settings alone: no other file than the configuration file is read.
pub fn settings_of(
    paths: &Paths,
    overrides: &Overrides,
    environment: impl Iterator<Item = (String, String)>,
) -> Result<(Settings, BTreeMap<String, Origin>), ConfigError> {
    let failed = |list| Problems { document: named(paths), list };
    let mut layers = Layers::new();
    if let Some(path) = &paths.config {
        let tree = yaml::tree(&read(path, yaml::MAX_DOCUMENT_BYTES as u64)?).map_err(|problem| failed(vec![problem]))?;
        layers.file(&path.display().to_string(), tree);
    }
    // In one order, whatever the process's environment has.
    layers.environment(environment.collect::<BTreeMap<_, _>>().into_iter());
    for flag in flags_of(paths, overrides) {
        layers.flag(flag);
    }
    let (mut settings, mut origins) = layers.finish().map_err(failed)?;
    if !overrides.exempt_runtimes.is_empty() {
        // The one list to which a flag adds: taking an exemption away is the file's to do.
        settings.exempt_runtimes.extend(overrides.exempt_runtimes.iter().cloned());
        origins.insert("exempt_runtimes".to_owned(), Origin::Flag("--exempt-runtime"));
    }
    let problems = problems_of(&settings);
    if problems.is_empty() { Ok((settings, origins)) } else { Err(failed(problems).into()) }
}

/// Every setting with its value.
pub fn listed(settings: &Settings) -> Vec<(String, Value)> {
    layers::leaves(settings)
}

/// The document that a fault of the settings is told of.
fn named(paths: &Paths) -> String {
    paths.config.as_ref().map_or_else(|| "configuration".to_owned(), |path| path.display().to_string())
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

/// A file's bytes, one more than the limit at most, so that the door behind it can say that there are too many.
pub(crate) fn read(path: &Path, limit: u64) -> Result<Vec<u8>, ConfigError> {
    use io::Read;
    let mut bytes = Vec::new();
    fs::File::open(path)
        .and_then(|file| file.take(limit + 1).read_to_end(&mut bytes))
        .map_err(|source| ConfigError::Read { path: path.to_owned(), source })?;
    Ok(bytes)
}

// === from settings ===

impl Settings {
    /// For the memory of observations, and what guards the providers behind it.
    pub fn cache_settings(&self) -> CacheSettings {
        CacheSettings { ages: (&self.cache).into(), breaker: (&self.breaker).into(), new_keys: (&self.new_keys).into() }
    }

    /// For what is asked of each provider.
    pub fn provider_limits(&self) -> ProviderLimits {
        (&self.provider_limits).into()
    }

    /// For the prober.
    pub fn probe_settings(&self, extra_roots: Vec<u8>) -> ProbeSettings {
        ProbeSettings {
            budget: self.probe.budget.0,
            allow_loopback_http: self.probe.allow_loopback_http,
            calibrate: self.probe.calibrate,
            extra_roots,
            ..ProbeSettings::default()
        }
    }

    /// For traces, if there are any.
    pub fn trace_settings(&self) -> Result<Option<TraceSettings>, ConfigError> {
        let Tracing { otlp_endpoint, ca_file, sample_ratio, export_timeout, export_interval, queue_spans } = &self.tracing;
        let Some(endpoint) = otlp_endpoint.clone() else { return Ok(None) };
        let roots = ca_file.as_ref().map(|path| read(path, yaml::MAX_DOCUMENT_BYTES as u64)).transpose()?;
        Ok(Some(TraceSettings {
            endpoint,
            roots,
            sample_ratio: *sample_ratio,
            timeout: export_timeout.0,
            interval: export_interval.0,
            queue: *queue_spans,
        }))
    }
}

/// What no single value shows.
fn problems_of(settings: &Settings) -> Vec<Problem> {
    let mut problems = Vec::new();
    let mut add = |place: &str, message: String| problems.push(Problem::at(place, message));
    let Settings { server, socket, tls, callers, limits, deadlines, cache, probe, provider_limits, breaker, tracing, .. } =
        settings;
    if server.listen.is_empty() {
        add("server.listen", "names no address: give at least one HOST:PORT or unix:PATH".to_owned());
    }
    for (place, span) in [
        ("server.reload_interval", server.reload_interval),
        ("deadlines.decide", deadlines.decide),
        ("deadlines.batch", deadlines.batch),
        ("deadlines.handshake", deadlines.handshake),
        ("probe.budget", probe.budget),
        ("cache.hard_maximum", cache.hard_maximum),
        ("provider_limits.queue_time", provider_limits.queue_time),
        ("breaker.cool_down", breaker.cool_down),
        ("breaker.trial", breaker.trial),
        ("tracing.export_timeout", tracing.export_timeout),
        ("tracing.export_interval", tracing.export_interval),
    ] {
        if span.0.is_zero() {
            add(place, "must be more than 0".to_owned());
        }
    }
    for (place, span) in
        [("server.keepalive_interval", server.keepalive_interval), ("server.keepalive_timeout", server.keepalive_timeout)]
    {
        // The kernel's own bounds: whole seconds, in 15 bits.
        if !(1..=32_400).contains(&span.0.as_secs()) {
            add(place, format!("is {span}; it must be 1s to 9h"));
        }
    }
    if !(0.0..=1.0).contains(&settings.log.plain_allow_ratio) {
        add("log.plain_allow_ratio", format!("is {}; it must be 0 to 1", settings.log.plain_allow_ratio));
    }
    if cache.jitter_percent > 100 {
        add("cache.jitter_percent", "must be 0 to 100".to_owned());
    }
    if breaker.cool_down > breaker.max_cool_down {
        add("breaker.cool_down", "must not be more than breaker.max_cool_down".to_owned());
    }
    if cache.rate_limited_min > cache.rate_limited_max {
        add("cache.rate_limited_min", "must not be more than cache.rate_limited_max".to_owned());
    }
    if cache.valid.0.max(cache.valid_paid.0) > cache.hard_maximum.0 {
        add("cache.hard_maximum", "must not be less than cache.valid and cache.valid_paid".to_owned());
    }
    for (place, count) in [
        ("limits.message_bytes", limits.message_bytes),
        ("limits.batch_message_bytes", limits.batch_message_bytes),
        ("limits.connections", limits.connections),
        ("limits.streams_per_connection", limits.streams_per_connection as usize),
        ("limits.decisions", limits.decisions),
        ("limits.batch_items", limits.batch_items),
        ("limits.batch_concurrency", limits.batch_concurrency),
        ("limits.credentials", limits.credentials),
        ("limits.credential_bytes", limits.credential_bytes),
        ("limits.name_bytes", limits.name_bytes),
        ("limits.model_bytes", limits.model_bytes),
        ("limits.resolve_names", limits.resolve_names),
        ("provider_limits.in_flight", provider_limits.in_flight),
        ("breaker.failures", breaker.failures as usize),
        ("tracing.queue_spans", tracing.queue_spans),
        ("callers.workspace_calls_per_minute", callers.workspace_calls_per_minute as usize),
    ] {
        if count == 0 || count > MAX_COUNT {
            add(place, format!("is {count}; it must be 1 to {MAX_COUNT}"));
        }
    }
    if limits.header_list_bytes < MIN_HEADER_LIST_BYTES {
        add("limits.header_list_bytes", format!("must be at least {MIN_HEADER_LIST_BYTES}: a token and a trace need that much"));
    }
    if server.worker_threads > MAX_WORKER_THREADS {
        add("server.worker_threads", format!("must be at most {MAX_WORKER_THREADS}; 0 takes what the CPU quota gives"));
    }
    if u32::from_str_radix(&socket.mode, 8).is_err() || !(3..=4).contains(&socket.mode.len()) {
        add("socket.mode", format!("`{}` is not a file mode in octal digits, such as \"0660\"", socket.mode));
    }
    if !(0.0..=1.0).contains(&tracing.sample_ratio) {
        add("tracing.sample_ratio", format!("is {}; it must be 0 to 1", tracing.sample_ratio));
    }
    if let Some(endpoint) = &tracing.otlp_endpoint
        && !is_collector(endpoint)
    {
        // What was given is not repeated: it may hold a password.
        add("tracing.otlp_endpoint", "is not the address of a collector: http://HOST:PORT or https://HOST:PORT".to_owned());
    }
    match (&tls.certificate, &tls.key) {
        (Some(_), None) => add("tls.key", "is required with tls.certificate".to_owned()),
        (None, Some(_)) => add("tls.certificate", "is required with tls.key".to_owned()),
        (None, None) if tls.client_ca.is_some() => add("tls.certificate", "is required with tls.client_ca".to_owned()),
        _ => {}
    }
    if !callers.certificates.is_empty() && tls.client_ca.is_none() {
        add("tls.client_ca", "is required with callers.certificates: nobody else's word makes a name true".to_owned());
    }
    let of_workspaces = |role, workspaces: usize| match role {
        RoleWord::Workspace if workspaces == 0 => Some("names no workspaces: a `workspace` caller needs its ids"),
        RoleWord::Platform | RoleWord::Operator if workspaces > 0 => Some("names workspaces: only a `workspace` caller has them"),
        RoleWord::Workspace | RoleWord::Platform | RoleWord::Operator => None,
    };
    for (index, caller) in callers.certificates.iter().enumerate() {
        if let Some(fault) = of_workspaces(caller.role, caller.workspaces.len()) {
            add(&format!("callers.certificates[{index}]"), fault.to_owned());
        }
        if caller.san.trim().is_empty() {
            add(&format!("callers.certificates[{index}].san"), "is empty".to_owned());
        }
    }
    for (index, caller) in callers.unix_peers.iter().enumerate() {
        if let Some(fault) = of_workspaces(caller.role, caller.workspaces.len()) {
            add(&format!("callers.unix_peers[{index}]"), fault.to_owned());
        }
        if caller.uid.is_none() && caller.gid.is_none() {
            add(&format!("callers.unix_peers[{index}]"), "needs a uid, a gid or both".to_owned());
        }
    }
    problems
}

/// An address for OTLP over gRPC, which has neither path nor user.
fn is_collector(endpoint: &str) -> bool {
    let Ok(url) = Url::parse(endpoint) else { return false };
    let is_bare = url.username().is_empty() && url.password().is_none() && url.query().is_none() && url.fragment().is_none();
    matches!(url.scheme(), "http" | "https") && url.has_host() && is_bare && url.path() == "/"
}

/// The policy that the settings make.
fn policy_of(settings: &Settings, registry: &Registry) -> Result<Policy, Vec<Problem>> {
    let mut policy = Policy::default();
    let mut problems = Vec::new();
    policy.platform_proxy = match settings.platform_proxy {
        ProxyWord::Available => PlatformProxy::Available,
        ProxyWord::Absent => PlatformProxy::Absent,
    };
    policy.honour_overrides = settings.operator_overrides == OverridesWord::Honour;
    policy.exempt_runtimes = settings.exempt_runtimes.clone();
    let groups = &settings.policy;
    for (checkpoint, groups) in
        [(Checkpoint::Create, &groups.create), (Checkpoint::Provision, &groups.provision), (Checkpoint::Update, &groups.update)]
    {
        policy.set_action(checkpoint, Group::Forbidden, groups.forbidden.into());
        policy.set_action(checkpoint, Group::Unanswered, groups.unanswered.into());
        policy.set_action(checkpoint, Group::Inconclusive, groups.inconclusive.into());
        policy.set_action(checkpoint, Group::Unverifiable, groups.unverifiable.into());
    }
    for (name, ProviderException { probe, until }) in &settings.providers {
        let place = format!("providers.{name}");
        if !registry.providers().iter().any(|provider| provider.name == *name) {
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
                policy.set_exception(name.clone(), Exception { enforcement, until: midnight.timestamp().as_second() });
            }
            None => problems.push(Problem::at(format!("{place}.until"), format!("`{until}` is not a date such as 2026-12-31"))),
        }
    }
    if problems.is_empty() { Ok(policy) } else { Err(problems) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::policy::Action;

    fn parsed(text: &str) -> Result<Policy, String> {
        let registry = Registry::embedded(&|_| None).unwrap().value;
        let mut layers = Layers::new();
        layers.file("test", yaml::tree(text.as_bytes()).map_err(|problem| problem.to_string())?);
        let settings = layers.finish().map_err(|problems| format!("{problems:?}"))?.0;
        policy_of(&settings, &registry).map_err(|problems| format!("{problems:?}"))
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

    fn settled(
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
        let (settings, origins) = settled(text, &environment, vec![flag]).unwrap();
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
    fn the_environment_speaks_every_type() {
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
        let settings = settled("", &environment, Vec::new()).unwrap().0;
        assert_eq!(settings.server.listen, ["127.0.0.1:1", "unix:/run/x.sock"]);
        assert!(settings.server.insecure_listen);
        assert_eq!((settings.socket.mode.as_str(), settings.socket.group), ("0600", Some(1000)));
        assert_eq!(settings.tls.certificate.as_deref(), Some(Path::new("7")));
        assert_eq!(settings.deadlines.decide.0.as_millis(), 250);
        assert!((settings.log.plain_allow_ratio - 0.25).abs() < f64::EPSILON);
        assert_eq!(settings.callers.unix_peers[0].role, RoleWord::Operator);
        assert!(settings.exempt_runtimes.contains("mock"));
    }

    #[test]
    fn what_does_not_stand_is_named_with_its_place_and_the_nearest_key() {
        for (text, environment, expect) in [
            ("limits: {decision: 1}", None, "limits.decision: is not a key (from file"),
            ("limits: {decision: 1}", None, "the nearest is `limits.decisions`"),
            ("limit: {decisions: 1}", None, "the nearest is `limits`"),
            ("", Some(("BYOK_GATE__LIMITS__CONECTIONS", "1")), "the nearest is `limits.connections`"),
            ("", Some(("BYOK_GATE__SHUTDOWN", "1")), "shutdown: is a section of keys"),
            ("", Some(("BYOK_GATE__LIMITS__DECISIONS", "many")), "(from environment BYOK_GATE__LIMITS__DECISIONS)"),
            ("limits: {decisions: 0}", None, "limits.decisions: is 0; it must be 1 to"),
            ("limits: {decisions: -1}", None, "limits.decisions: invalid value"),
            ("deadlines: {decide: 5}", None, "deadlines.decide: "),
            ("deadlines: {decide: 0s}", None, "deadlines.decide: must be more than 0"),
            ("server: {keepalive_interval: 500ms}", None, "server.keepalive_interval: is 500ms; it must be 1s to 9h"),
            ("server: {keepalive_timeout: 10h}", None, "server.keepalive_timeout: is 36000s; it must be 1s to 9h"),
            ("server: {listen: []}", None, "server.listen: names no address"),
            ("server: {worker_threads: 100000}", None, "server.worker_threads: must be at most"),
            ("log: {plain_allow_ratio: 1.5}", None, "log.plain_allow_ratio: is 1.5; it must be 0 to 1"),
            ("log: {plain_allow_ratio: .nan}", None, "log.plain_allow_ratio: "),
            ("socket: {mode: '0990'}", None, "socket.mode: `0990` is not"),
            ("tls: {certificate: /c}", None, "tls.key: is required"),
            ("tls: {client_ca: /c}", None, "tls.certificate: is required"),
            ("callers: {certificates: [{san: a}]}", None, "tls.client_ca: is required"),
            ("callers: {unix_peers: [{}]}", None, "callers.unix_peers[0]: needs a uid"),
            ("callers: {unix_peers: [{uid: 1, role: workspace}]}", None, "callers.unix_peers[0]: names no workspaces"),
            ("callers: {unix_peers: [{uid: 1, rule: workspace}]}", None, "unknown field `rule`"),
            ("cache: {hard_maximum: 10s}", None, "cache.hard_maximum: must not be less"),
            ("limits: {decisions: 1}\nlimits: {decisions: 2}", None, "duplicate"),
            ("- a", None, "must be a mapping"),
        ] {
            let fault = settled(text, environment.as_slice(), Vec::new()).unwrap_err();
            assert!(fault.contains(expect), "{text} {environment:?}: {fault}");
        }
    }

    #[test]
    fn the_reference_file_says_every_default_and_nothing_else() {
        let text = include_str!("../deploy/byok-gate.yaml");
        let tree = yaml::tree(text.as_bytes()).unwrap();
        assert_eq!(tree, serde_json::to_value(Settings::default()).unwrap());
    }
}
