//! Arguments that several commands take.

use std::path::PathBuf;

use clap::{Args, ValueEnum};

use crate::{
    config::{ConfigError, Flag, Overrides, Paths, Setup, load},
    domain::request::PlatformProxy,
};

/// What decisions are made by.
#[derive(Debug, Args)]
pub(super) struct EngineArgs {
    /// The registry to decide by, in place of the embedded one.
    #[arg(long, value_name = "FILE")]
    pub(super) registry: Option<PathBuf>,
    /// A probe catalogue to lay over the embedded one, host by host.
    #[arg(long, value_name = "FILE")]
    pub(super) probe_catalog: Option<PathBuf>,
    /// The configuration file.
    #[arg(long, value_name = "FILE")]
    pub(super) config: Option<PathBuf>,
    /// Whether the platform's metered proxy is available, for a spec that does not say [default: absent].
    #[arg(long, value_name = "available|absent")]
    pub(super) platform_proxy: Option<ProxyArg>,
    /// Refuse operator overrides.
    #[arg(long)]
    pub(super) refuse_operator_overrides: bool,
    /// Allow this runtime without any check (repeatable).
    #[arg(long = "exempt-runtime", value_name = "RUNTIME")]
    pub(super) exempt_runtimes: Vec<String>,
    /// A file with the key of credential fingerprints. Without it there are no fingerprints.
    #[arg(long, value_name = "FILE")]
    pub(super) fingerprint_key_file: Option<PathBuf>,
}

/// How providers are probed.
#[derive(Debug, Clone, Default, Args)]
pub(super) struct ProbeArgs {
    /// Allow loopback addresses, over plain http too: for tests and for providers on the same host.
    #[arg(long)]
    pub(super) allow_loopback_http: bool,
    /// Certificate authorities (PEM) to trust in addition to the system's.
    #[arg(long, value_name = "FILE")]
    pub(super) probe_ca_file: Option<PathBuf>,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
pub(super) enum ProxyArg {
    Available,
    Absent,
}

// === impl EngineArgs ===

impl EngineArgs {
    pub(super) fn load(self, probe: ProbeArgs) -> Result<Setup, ConfigError> {
        let (paths, overrides) = self.layers(probe, Vec::new());
        load(&paths, &overrides)
    }

    /// The settings from the command line, as layers of the configuration.
    pub(super) fn layers(self, probe: ProbeArgs, mut flags: Vec<Flag>) -> (Paths, Overrides) {
        let ProbeArgs { allow_loopback_http, probe_ca_file: probe_ca } = probe;
        if allow_loopback_http {
            flags.push(Flag { name: "--allow-loopback-http", key: "probe.allow_loopback_http", value: true.into() });
        }
        let Self {
            registry,
            probe_catalog,
            config,
            platform_proxy,
            refuse_operator_overrides,
            exempt_runtimes,
            fingerprint_key_file,
        } = self;
        let paths = Paths { registry, probe_catalog, config, fingerprint_key: fingerprint_key_file, probe_ca };
        let platform_proxy = platform_proxy.map(PlatformProxy::from);
        (paths, Overrides { platform_proxy, refuse_operator_overrides, exempt_runtimes, flags })
    }
}

impl From<ProxyArg> for PlatformProxy {
    fn from(arg: ProxyArg) -> Self {
        match arg {
            ProxyArg::Available => Self::Available,
            ProxyArg::Absent => Self::Absent,
        }
    }
}
