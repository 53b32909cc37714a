//! All settings with their defaults, in the shape of the configuration file. Each part owns its own settings. `deploy/byok-gate.yaml` explains
//! the defaults.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::PathBuf,
    time::Duration,
};

use serde::{Deserialize, Serialize};

use crate::{
    core::policy::{Action, CheckpointActions, Overrides, ProviderException},
    domain::{
        duration,
        problem::{Problem, Review},
        request::PlatformProxy,
    },
    grpc::limits::{Deadlines, Limits},
    liveness::{
        breaker::BreakerSettings,
        cache::{Ages, CacheSettings},
        egress::{EgressSettings, ForwardProxy},
        new_keys::NewKeyLimits,
        prober::ProbeSettings,
        provider_limits::ProviderLimits,
        tier::TierSettings,
    },
    server::settings::{
        AdminSettings, CallerList, CallerSettings, EdgeSettings, ServerSettings, ShutdownSettings, SocketSettings, TlsSettings,
    },
    telemetry::{events::LogSettings, traces::TracingSettings},
};

/// The whole configuration file.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, Default)]
#[serde(default)]
pub struct Settings {
    /// Where it listens and how it runs.
    pub server: ServerSettings,
    /// The admin listener.
    pub admin: AdminSettings,
    /// The files of Unix sockets.
    pub socket: SocketSettings,
    /// TLS files.
    pub tls: TlsSettings,
    /// Who may call.
    pub callers: CallerSettings,
    /// Limits of calls.
    pub limits: Limits,
    /// Deadlines of calls.
    pub deadlines: Deadlines,
    /// How it stops.
    pub shutdown: ShutdownSettings,
    /// What is logged.
    pub log: LogSettings,
    /// The maximum age of observations.
    pub cache: Ages,
    /// How providers are probed.
    pub probe: Probe,
    /// Where probes may go, besides public addresses.
    pub egress: EgressSettings,
    /// Limits of the requests to each provider.
    pub provider_limits: ProviderLimits,
    /// How many new credentials may be probed.
    pub new_keys: NewKeyLimits,
    /// When a provider's circuit breaker opens.
    pub breaker: BreakerSettings,
    /// The tier of observations that replicas share.
    pub tier: TierSettings,
    /// The registry of providers and runtimes.
    pub registry: Document,
    /// The catalogue of probes.
    pub catalogue: Document,
    /// Credential fingerprints.
    pub fingerprints: Fingerprints,
    /// Distributed traces.
    pub tracing: TracingSettings,
    /// Whether the platform's proxy exists, for a spec that does not say.
    pub platform_proxy: PlatformProxy,
    /// Whether operator overrides are honoured.
    pub operator_overrides: Overrides,
    /// Runtimes that are allowed without any check.
    pub exempt_runtimes: BTreeSet<String>,
    /// The actions for inconclusive verdicts.
    pub policy: CheckpointActions,
    /// Providers whose verdicts are not enforced for a time.
    pub providers: BTreeMap<String, ProviderException>,
}

/// How providers are probed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Probe {
    /// The time for all requests of one probe.
    #[serde(with = "duration")]
    pub budget: Duration,
    /// Whether endpoints are tested with made-up keys.
    pub calibrate: bool,
    /// Whether loopback addresses are allowed, over plain http too.
    pub allow_loopback_http: bool,
    /// Further certificate authorities.
    pub ca_file: Option<PathBuf>,
}

/// A document in a file of its own.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, Default)]
#[serde(default)]
pub struct Document {
    /// Its path. If it is not set, the embedded document is used.
    pub file: Option<PathBuf>,
}

/// The settings of credential fingerprints.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, Default)]
#[serde(default)]
pub struct Fingerprints {
    /// The file with their key. Without it, no fingerprints are made.
    pub key_file: Option<PathBuf>,
}

impl Default for Probe {
    fn default() -> Self {
        let ProbeSettings { budget, calibrate, allow_loopback_http, .. } = ProbeSettings::default();
        Self { budget, calibrate, allow_loopback_http, ca_file: None }
    }
}

impl Settings {
    /// Checks all settings. Returns errors and warnings.
    pub fn review(&self) -> (Vec<Problem>, Vec<Problem>) {
        let (mut problems, mut warnings) = (Vec::new(), Vec::new());
        let mut of = |section, look: &dyn Fn(&mut Review<'_>)| look(&mut Review::of(section, &mut problems, &mut warnings));
        of("server", &|review| self.server.review(review));
        of("socket", &|review| self.socket.review(review));
        of("tls", &|review| self.tls.review(review));
        of("callers", &|review| self.callers.review(&self.tls, review));
        of("limits", &|review| self.limits.review(review));
        of("deadlines", &|review| self.deadlines.review(review));
        of("shutdown", &|review| self.shutdown.review(review));
        of("log", &|review| self.log.review(review));
        of("cache", &|review| self.cache.review(review));
        of("probe", &|review| self.review_probe(review));
        of("egress", &|review| self.egress.review(review));
        of("provider_limits", &|review| self.provider_limits.review(review));
        of("breaker", &|review| self.breaker.review(review));
        of("tier", &|review| self.tier.review(self.callers.workspaces(), review));
        of("tracing", &|review| self.tracing.review(review));
        for (name, actions) in
            [("create", &self.policy.create), ("provision", &self.policy.provision), ("update", &self.policy.update)]
        {
            if actions.exposure == Action::AllowIfRecentlyValid {
                let message = "must be allow or deny: it is not about whether a key is alive";
                problems.push(Problem::at(format!("policy.{name}.exposure"), message));
            }
        }
        let is_beyond = |listen: &&String| {
            let host = listen.rsplit_once(':').map_or(listen.as_str(), |(host, _)| host).trim_matches(['[', ']']);
            let is_loopback = host.parse::<std::net::IpAddr>().map_or(host == "localhost", |address| address.is_loopback());
            !listen.starts_with("unix:") && !is_loopback
        };
        let knows_nobody = self.tls.certificate.is_none() && self.callers.token_file.is_none();
        if self.server.insecure_listen
            && knows_nobody
            && !matches!(self.callers.certificates, CallerList::Anyone)
            && let Some(listen) = self.server.listen.iter().find(is_beyond)
        {
            let message = format!(
                "everybody who reaches {listen} may call, without TLS and without a token: set callers.token_file or tls; or write \
                 `callers: anyone` if something before it lets only callers through"
            );
            warnings.push(Problem::at("server.insecure_listen", message));
        }
        for name in self.exempt_runtimes.iter().filter(|name| name.trim() != *name || name.is_empty()) {
            let message = format!("{name:?} is empty or padded: write a runtime's name, or leave it out");
            problems.push(Problem::at("exempt_runtimes", message));
        }
        (problems, warnings)
    }

    fn review_probe(&self, review: &mut Review<'_>) {
        let Self { probe, deadlines, .. } = self;
        review.length("budget", probe.budget, Duration::from_millis(100), duration::MAX);
        if probe.budget >= deadlines.decide {
            review.warning("budget", "is not less than deadlines.decide: a slow provider is never heard to the end");
        }
        if probe.budget >= self.breaker.trial {
            review.warning("budget", "is not less than breaker.trial: a trial is given up while it is still under way");
        }
    }

    /// The settings of the server.
    pub fn edge(&self) -> EdgeSettings {
        let Self { server, admin, socket, tls, callers, limits, deadlines, shutdown, .. } = self.clone();
        EdgeSettings { server, admin, socket, tls, callers, limits, deadlines, shutdown, tier: self.tier.place() }
    }

    /// The settings of the cache and of what protects the providers behind it.
    pub fn cache_settings(&self) -> CacheSettings {
        CacheSettings { ages: self.cache, breaker: self.breaker, new_keys: self.new_keys.of_one(self.server.replicas) }
    }

    /// This replica's part of each provider's limits.
    pub fn provider_limits(&self) -> ProviderLimits {
        self.provider_limits.of_one(self.server.replicas)
    }

    /// The settings of the prober.
    pub fn probe_settings(&self, extra_roots: Vec<u8>, proxy: Option<ForwardProxy>) -> ProbeSettings {
        let Probe { budget, calibrate, allow_loopback_http, .. } = self.probe;
        let egress = self.egress.clone();
        ProbeSettings { budget, calibrate, allow_loopback_http, egress, proxy, extra_roots, ..ProbeSettings::default() }
    }
}
