//! The one composition of the service: prober, limits of each provider, cache, engine. `serve`, `decide`, `exec` and `probe` are made of it.

use std::sync::Arc;

use crate::{
    config::{Setup, settings::Settings},
    core::engine::Engine,
    liveness::{
        cache::Cache,
        prober::{HttpProber, ProbeSetupError},
        provider_limits::ProviderLimiter,
    },
    telemetry::metrics::Measured,
};

/// The parts, put together.
pub struct App {
    /// What decides.
    pub engine: Arc<Engine>,
    /// Whatever has numbers to show.
    pub measured: Vec<Arc<dyn Measured>>,
    /// Everything else that is set.
    pub settings: Settings,
}

// === impl App ===

impl App {
    /// A service of these settings and documents.
    pub fn new(setup: Setup) -> Result<Self, ProbeSetupError> {
        let Setup { snapshot, fingerprint_key, probe_ca, settings, .. } = setup;
        let prober = Arc::new(prober(&settings, probe_ca)?);
        let limiter = Arc::new(ProviderLimiter::new(prober.clone(), settings.provider_limits()));
        let cache = Arc::new(Cache::new(limiter.clone(), settings.cache_settings()));
        let engine = Arc::new(Engine::new(snapshot, cache.clone(), fingerprint_key));
        Ok(Self { engine, measured: vec![prober, limiter, cache], settings })
    }
}

/// The prober alone.
pub fn prober(settings: &Settings, probe_ca: Vec<u8>) -> Result<HttpProber, ProbeSetupError> {
    HttpProber::new(settings.probe_settings(probe_ca))
}
