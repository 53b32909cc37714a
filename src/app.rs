//! Composes the service: prober, limits of each provider, cache, engine. `serve`, `decide`, `exec` and `probe` use it. It also reloads the
//! documents while the service runs.

use std::{path::PathBuf, sync::Arc, time::SystemTime};

use url::Url;

use crate::{
    config::{
        self, ConfigError, Setup,
        changes::{ChangedCaller, Loosened, changed, changed_callers, emptied, loosened, removed_callers, waiting_for_restart},
        settings::Settings,
    },
    core::{
        endpoint::target,
        engine::{Boxed, Engine},
        policy::Enforcement,
        registry::{Provider, is_loopback},
        snapshot::{Origin, Snapshot},
    },
    domain::problem::{Problem, Problems},
    liveness::{
        cache::Cache,
        prober::{HttpProber, ProbeSetupError},
        provider_limits::ProviderLimiter,
        tier::Tier,
    },
    server::settings::CallerSettings,
    telemetry::{
        metrics::Collect,
        recent_changes::RecentChanges,
        status::{DOCUMENTS, ForbiddenProvider},
    },
    watch::{Fault, Reloaded, Source},
};

/// The composed parts.
pub struct App {
    /// Makes the decisions.
    pub engine: Arc<Engine>,
    /// The sources of metrics.
    pub collectors: Vec<Arc<dyn Collect>>,
    /// The task that learns from other replicas which credentials were refused. `None` without a shared tier.
    pub refusal_listener: Option<Boxed<'static, ()>>,
    /// Probes the providers.
    pub prober: Arc<HttpProber>,
}

/// Registry, catalogue and configuration, reloaded while the service runs.
pub struct Documents {
    engine: Arc<Engine>,
    load: Box<Load>,
    replace_callers: Box<ReplaceCallers>,
    /// The settings in force.
    settings: Settings,
    /// The settings at the start. Some settings are only read then.
    started: Settings,
    /// The settings that need a restart, as last logged.
    pending_restart: Vec<String>,
    files: Vec<PathBuf>,
    changes: Arc<RecentChanges>,
    /// The documents that the last reload changed, for the log.
    changed: Vec<&'static str>,
}

/// Reads all documents and settings again.
pub type Load = dyn Fn() -> Result<Setup, ConfigError> + Send;
/// Replaces the lists of callers.
pub type ReplaceCallers = dyn Fn(&CallerSettings) + Send;

// === impl App ===

impl App {
    /// Composes a service of these settings and documents. `tier` is the tier that it shares with other replicas, if there is one.
    pub fn new(setup: &Setup, tier: Option<Arc<Tier>>) -> Result<Self, ProbeSetupError> {
        let Setup { snapshot, fingerprint_key, settings, .. } = setup;
        let prober = Arc::new(prober(setup)?);
        let whole = settings.provider_limits.per_second;
        let limiter = Arc::new(ProviderLimiter::new(prober.clone(), settings.provider_limits()).sharing(whole));
        let cache = Cache::new(limiter.clone(), settings.cache_settings())
            .with_tier(tier)
            .with_fleet_limits(limiter.clone(), settings.new_keys.per_platform);
        let cache = Arc::new(cache);
        let refusal_listener = cache.refusal_listener();
        let engine = Arc::new(Engine::new(snapshot.clone(), cache.clone(), *fingerprint_key));
        Ok(Self { engine, collectors: vec![prober.clone(), limiter, cache], refusal_listener, prober })
    }
}

/// Builds only the prober.
pub fn prober(Setup { settings, probe_ca, proxy, .. }: &Setup) -> Result<HttpProber, ProbeSetupError> {
    HttpProber::new(settings.probe_settings(probe_ca.clone(), proxy.clone()))
}

/// Providers whose address or scheme the configuration does not allow. All their credentials would be denied. No name is resolved for this.
pub fn forbidden_destinations(snapshot: &Snapshot, prober: &HttpProber) -> Vec<Problems> {
    let now = jiff::Timestamp::now().as_second();
    let problem = |provider: &Provider| {
        if snapshot.policy.enforcement(&provider.name, now) != Enforcement::Enforce {
            return None;
        }
        // The registry's own warning covers plain http beyond loopback.
        let url = forbidden_url(provider, snapshot, prober).filter(|url| url.scheme() != "http" || is_loopback(url))?;
        let message = format!(
            "{}: its address or scheme may not be dialled by this configuration, so that every credential of it is denied; use https and a \
             public address, allow it with `egress.allow` and restart byok-gate (a machine's metadata address never is), or switch the provider's probe off with a \
             date",
            url.origin().ascii_serialization()
        );
        Some(Problem::at(format!("providers.{}", provider.name), message))
    };
    let list: Vec<Problem> = snapshot.registry.providers().iter().filter_map(problem).collect();
    if list.is_empty() { Vec::new() } else { vec![Problems { document: snapshot.registry_origin.source.clone(), list }] }
}

/// Providers whose address or scheme the configuration does not allow, for the status page.
pub fn forbidden_providers(snapshot: &Snapshot, prober: &HttpProber) -> Vec<ForbiddenProvider> {
    let forbidden = |provider: &Provider| {
        let origin = forbidden_url(provider, snapshot, prober)?.origin().ascii_serialization();
        Some(ForbiddenProvider { provider: provider.name.clone(), origin })
    };
    snapshot.registry.providers().iter().filter_map(forbidden).collect()
}

/// A URL that a check of this provider's credentials would call, and that the configuration does not allow. No name is resolved for this.
fn forbidden_url(provider: &Provider, snapshot: &Snapshot, prober: &HttpProber) -> Option<Url> {
    let target = target(provider, &snapshot.catalogue, "made-up-model").ok()?;
    target.calls.into_iter().find(|call| !prober.may_ask(call)).map(|call| call.url)
}

// === impl Documents ===

impl Documents {
    /// The documents of this engine. A reload calls `replace_callers` right after it gives the engine the new snapshot, and notes what it changed.
    pub fn new(
        engine: Arc<Engine>,
        setup: &Setup,
        load: Box<Load>,
        replace_callers: Box<ReplaceCallers>,
        changes: Arc<RecentChanges>,
    ) -> Self {
        let settings = setup.settings.clone();
        let (started, pending_restart) = (settings.clone(), Vec::new());
        Self {
            engine,
            load,
            replace_callers,
            settings,
            started,
            pending_restart,
            files: setup.documents.clone(),
            changes,
            changed: Vec::new(),
        }
    }

    /// Refuses a reload. The status page shows the faults from now on, and the returned text holds all of them.
    fn refuse(&self, faults: &[Problems]) -> Fault {
        self.engine.swap(marked(&self.engine.snapshot(), faults, SystemTime::now()));
        Fault(faults.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n"))
    }

    /// Whether this setup equals the version in force.
    fn is_in_force(&self, setup: &Setup) -> bool {
        let current = self.engine.snapshot();
        let marked = current.origins().iter().any(|origin| !origin.last_reload_error.is_empty());
        !marked
            && current.registry.revision() == setup.snapshot.registry.revision()
            && current.catalogue.revision() == setup.snapshot.catalogue.revision()
            && self.settings == setup.settings
    }
}

impl Source for Documents {
    fn name(&self) -> &'static str {
        DOCUMENTS
    }

    fn files(&self) -> Vec<PathBuf> {
        self.files.clone()
    }

    fn reload(&mut self) -> Result<Reloaded, Fault> {
        let setup = (self.load)().map_err(|ConfigError(faults)| self.refuse(&faults))?;
        let lost = emptied(&self.settings, &setup.settings);
        if !lost.is_empty() {
            let document = setup.snapshot.configuration_origin.source;
            return Err(self.refuse(&[Problems { document, list: lost }]));
        }
        if let Some(workspaces) = setup.settings.callers.workspaces().filter(|_| self.started.tier.place().is_some()) {
            let message = "names a `workspace` caller, and this process holds the key of the shared tier until it ends; restart it without one";
            let list = vec![Problem::at(workspaces, message)];
            let document = setup.snapshot.configuration_origin.source;
            return Err(self.refuse(&[Problems { document, list }]));
        }
        if self.is_in_force(&setup) {
            self.files = setup.documents;
            return Ok(Reloaded::Unchanged);
        }
        let Setup { mut snapshot, settings, documents, warnings, .. } = setup;
        let current = self.engine.snapshot();
        self.changed.clear();
        for (document, was, is) in [
            ("registry", current.registry.revision(), snapshot.registry.revision()),
            ("catalogue", current.catalogue.revision(), snapshot.catalogue.revision()),
        ] {
            self.changes.document(document, was, is);
            self.changed.extend((was != is).then_some(document));
        }
        self.changed.extend((self.settings != settings).then_some("configuration"));
        self.changes.changed(&changed(&self.settings, &settings));
        for Loosened { setting, was, is } in loosened(&self.settings, &settings) {
            self.changes.loosened(&setting, &was, &is);
        }
        for (setting, caller) in removed_callers(&self.settings, &settings) {
            self.changes.caller_removed(setting, &caller);
        }
        for ChangedCaller { setting, caller, was, is } in changed_callers(&self.settings, &settings) {
            self.changes.caller_changed(setting, &caller, &was, &is);
        }
        let pending_restart = waiting_for_restart(&self.started, &settings);
        if pending_restart != self.pending_restart {
            let settings = pending_restart.join(", ");
            if pending_restart.is_empty() {
                tracing::info!(event = "restart_not_needed", "the settings that are read at the start are again those in force");
            } else {
                tracing::warn!(
                    event = "restart_needed",
                    settings,
                    "these settings are read at the start; the old values stay in force"
                );
            }
            self.pending_restart = pending_restart;
        }
        snapshot.restart_needed.clone_from(&self.pending_restart);
        config::warn(&warnings);
        self.engine.swap(snapshot);
        (self.replace_callers)(&settings.callers);
        self.settings = settings;
        self.files = documents;
        Ok(Reloaded::Taken)
    }

    fn log_taken(&self, failures: u64) {
        let snapshot = self.engine.snapshot();
        tracing::info!(
            event = "reloaded",
            what = self.name(),
            // Empty if the last valid version came back after an invalid one.
            changed = self.changed.join(", "),
            after_failures = (failures > 0).then_some(failures),
            registry_revision = snapshot.registry.revision(),
            catalogue_revision = snapshot.catalogue.revision(),
        );
    }
}

/// The same snapshot, with the faults of the version that was not taken. A fault that was there before keeps its time.
fn marked(snapshot: &Snapshot, faults: &[Problems], now: SystemTime) -> Snapshot {
    let mut marked = snapshot.clone();
    let (mut of_registry, mut of_catalogue, mut of_configuration) = (Vec::new(), Vec::new(), Vec::new());
    for fault in faults {
        // A document that is neither the registry nor the catalogue in force is named by the configuration.
        let of = match &fault.document {
            document if *document == snapshot.registry_origin.source => &mut of_registry,
            document if *document == snapshot.catalogue_origin.source => &mut of_catalogue,
            _ => &mut of_configuration,
        };
        of.push(fault.to_string());
    }
    let mark = |origin: &mut Origin, faults: &[String]| {
        let error = faults.join("\n");
        if origin.last_reload_error != error {
            origin.failed_at = (!error.is_empty()).then_some(now);
            origin.last_reload_error = error;
        }
    };
    mark(&mut marked.registry_origin, &of_registry);
    mark(&mut marked.catalogue_origin, &of_catalogue);
    mark(&mut marked.configuration_origin, &of_configuration);
    marked
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, UNIX_EPOCH};

    use super::*;
    use crate::core::{catalogue::Catalogue, policy::Policy, registry::Registry};

    /// Each document says since when it is that a newer version of it is not taken, for as long as that is for the same reason.
    #[test]
    fn a_fault_keeps_its_time_beside_others() {
        let (registry, catalogue) = (Registry::embedded(&|_| None).unwrap().value, Catalogue::embedded().unwrap().value);
        let [registry_origin, catalogue_origin] = ["r.yaml", "c.yaml"].map(|file| Origin::new(file.to_owned(), UNIX_EPOCH));
        let (registry, catalogue, policy) = (Arc::new(registry), Arc::new(catalogue), Arc::new(Policy::default()));
        let good = Snapshot::new(registry, catalogue, policy, registry_origin, catalogue_origin);
        let at = |seconds| UNIX_EPOCH + Duration::from_secs(seconds);
        let fault = |document: &str, message| Problems { document: document.to_owned(), list: vec![Problem::at("key", message)] };
        let failed = |snapshot: &Snapshot| snapshot.origins().map(|origin| origin.failed_at);
        let first = marked(&good, &[fault("r.yaml", "one")], at(1));
        assert_eq!(failed(&first), [Some(at(1)), None, None]);
        let both = marked(&first, &[fault("r.yaml", "one"), fault("config.yaml", "two")], at(2));
        assert_eq!(failed(&both), [Some(at(1)), None, Some(at(2))]);
        let other = marked(&both, &[fault("r.yaml", "three")], at(3));
        assert_eq!(failed(&other), [Some(at(3)), None, None]);
    }
}
