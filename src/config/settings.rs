//! Every setting with its default: the shape of the configuration file, put together from the settings that each part owns.
//! `deploy/byok-gate.yaml` says why each default is what it is.

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
        AdminSettings, CallerSettings, EdgeSettings, ServerSettings, ShutdownSettings, SocketSettings, TlsSettings,
    },
    telemetry::{events::LogSettings, traces::TracingSettings},
};

/// The whole document.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, Default)]
#[serde(default)]
pub struct Settings {
    /// Where it listens and how it runs.
    pub server: ServerSettings,
    /// Where its numbers are shown.
    pub admin: AdminSettings,
    /// Of Unix sockets.
    pub socket: SocketSettings,
    /// Certificates and the key.
    pub tls: TlsSettings,
    /// Who may call.
    pub callers: CallerSettings,
    /// How much.
    pub limits: Limits,
    /// How long.
    pub deadlines: Deadlines,
    /// How it stops.
    pub shutdown: ShutdownSettings,
    /// What is logged.
    pub log: LogSettings,
    /// How long observations count.
    pub cache: Ages,
    /// How providers are asked.
    pub probe: Probe,
    /// Where probes may go beside public addresses.
    pub egress: EgressSettings,
    /// How much is asked of each provider.
    pub provider_limits: ProviderLimits,
    /// How many new credentials may be judged.
    pub new_keys: NewKeyLimits,
    /// When a provider's breaker opens.
    pub breaker: BreakerSettings,
    /// What replicas remember together.
    pub tier: TierSettings,
    /// Who owns what.
    pub registry: Document,
    /// How hosts are asked.
    pub catalogue: Document,
    /// Of credential fingerprints.
    pub fingerprints: Fingerprints,
    /// Of distributed traces.
    pub tracing: TracingSettings,
    /// What a spec that does not say means.
    pub platform_proxy: PlatformProxy,
    /// Whether operator overrides count.
    pub operator_overrides: Overrides,
    /// Runtimes that are allowed without any check.
    pub exempt_runtimes: BTreeSet<String>,
    /// What is done about verdicts that settle nothing.
    pub policy: CheckpointActions,
    /// Providers whose verdicts are taken less seriously for a time.
    pub providers: BTreeMap<String, ProviderException>,
}

/// How providers are asked.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Probe {
    /// Of one walk up the ladder.
    #[serde(with = "duration")]
    pub budget: Duration,
    /// Endpoints are tested with made-up keys.
    pub calibrate: bool,
    /// Loopback may be dialled, over plain http too.
    pub allow_loopback_http: bool,
    /// Further certificate authorities.
    pub ca_file: Option<PathBuf>,
}

/// A document of its own.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, Default)]
#[serde(default)]
pub struct Document {
    /// Where it is; embedded if not set.
    pub file: Option<PathBuf>,
}

/// Of credential fingerprints.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, Default)]
#[serde(default)]
pub struct Fingerprints {
    /// Holds their key; none are made without it.
    pub key_file: Option<PathBuf>,
}

impl Default for Probe {
    fn default() -> Self {
        let ProbeSettings { budget, calibrate, allow_loopback_http, .. } = ProbeSettings::default();
        Self { budget, calibrate, allow_loopback_http, ca_file: None }
    }
}

impl Settings {
    /// What no single value shows: errors, and what is odd.
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

    /// For the server.
    pub fn edge(&self) -> EdgeSettings {
        let Self { server, admin, socket, tls, callers, limits, deadlines, shutdown, .. } = self.clone();
        EdgeSettings { server, admin, socket, tls, callers, limits, deadlines, shutdown }
    }

    /// For the memory of observations, and what guards the providers behind it.
    pub fn cache_settings(&self) -> CacheSettings {
        CacheSettings { ages: self.cache, breaker: self.breaker, new_keys: self.new_keys.of_one(self.server.replicas) }
    }

    /// What this replica may ask of each provider.
    pub fn provider_limits(&self) -> ProviderLimits {
        self.provider_limits.of_one(self.server.replicas)
    }

    /// For the prober.
    pub fn probe_settings(&self, extra_roots: Vec<u8>, proxy: Option<ForwardProxy>) -> ProbeSettings {
        let Probe { budget, calibrate, allow_loopback_http, .. } = self.probe;
        let egress = self.egress.clone();
        ProbeSettings { budget, calibrate, allow_loopback_http, egress, proxy, extra_roots, ..ProbeSettings::default() }
    }
}
