//! byok-gate as tests use it: the engine alone, a server in this process, or the binary.

use std::{fs, net::SocketAddr, path::Path, sync::Arc};

use byok_gate::{
    config::{self, Overrides, Paths},
    core::{
        engine::{Engine, LivenessSource},
        policy::Policy,
    },
    domain::request::PlatformProxy,
    grpc::convert::pb::policy_decision_service_client::PolicyDecisionServiceClient,
    liveness::{
        cache::{Cache, CacheSettings},
        prober::{HttpProber, ProbeSettings},
        provider_limits::{ProviderLimiter, ProviderLimits},
    },
    server::{Bound, Ended, ServerError},
};
use tempfile::TempDir;
use tokio::{sync::oneshot, task::JoinHandle};
use tonic::transport::Channel;

use super::edge::settings;

/// The files that a gate is started with, in a folder of their own.
pub(crate) struct Files {
    folder: TempDir,
    config: bool,
}

/// A server in this process, on a free port.
pub(crate) struct Server {
    pub(crate) address: SocketAddr,
    stop: Option<oneshot::Sender<()>>,
    running: JoinHandle<Result<Ended, ServerError>>,
}

impl Files {
    pub(crate) fn new(registry: &str, catalogue: &str, config: Option<&str>) -> Self {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("registry.yaml"), registry).unwrap();
        fs::write(folder.path().join("catalogue.yaml"), catalogue).unwrap();
        if let Some(config) = config {
            fs::write(folder.path().join("config.yaml"), config).unwrap();
        }
        Self { folder, config: config.is_some() }
    }

    pub(crate) fn folder(&self) -> &Path {
        self.folder.path()
    }

    pub(crate) fn paths(&self) -> Paths {
        Paths {
            registry: Some(self.folder().join("registry.yaml")),
            probe_catalog: Some(self.folder().join("catalogue.yaml")),
            config: self.config.then(|| self.folder().join("config.yaml")),
            ..Paths::default()
        }
    }

    /// The flags that start the binary with these files.
    pub(crate) fn flags(&self) -> Vec<String> {
        let Paths { registry, probe_catalog, config, .. } = self.paths();
        let files = [("--registry", registry), ("--probe-catalog", probe_catalog), ("--config", config)];
        let files = files.into_iter().filter_map(|(flag, path)| Some([flag.to_owned(), path?.to_str().unwrap().to_owned()]));
        files.flatten().chain(["--allow-loopback-http", "--platform-proxy", "available"].map(str::to_owned)).collect()
    }

    /// An engine as a server has it, over a real prober.
    pub(crate) fn engine(&self) -> Arc<Engine> {
        self.engine_with(ProbeSettings { allow_loopback_http: true, ..ProbeSettings::default() })
    }

    pub(crate) fn engine_with(&self, settings: ProbeSettings) -> Arc<Engine> {
        let prober = Arc::new(HttpProber::new(settings).unwrap());
        self.engine_over(Arc::new(Cache::new(
            Arc::new(ProviderLimiter::new(prober, ProviderLimits::default())),
            CacheSettings::default(),
        )))
    }

    /// The same, by this policy.
    pub(crate) fn engine_by(&self, policy: Policy, liveness: Arc<dyn LivenessSource>) -> Arc<Engine> {
        let overrides = Overrides { platform_proxy: Some(PlatformProxy::Available), ..Overrides::default() };
        let setup = config::load(&self.paths(), &overrides).unwrap();
        let mut snapshot = setup.snapshot;
        snapshot.policy = Arc::new(policy);
        Arc::new(Engine::new(snapshot, liveness, setup.fingerprint_key))
    }

    pub(crate) fn engine_over(&self, liveness: Arc<dyn LivenessSource>) -> Arc<Engine> {
        let overrides = Overrides { platform_proxy: Some(PlatformProxy::Available), ..Overrides::default() };
        let setup = config::load(&self.paths(), &overrides).unwrap();
        Arc::new(Engine::new(setup.snapshot, liveness, setup.fingerprint_key))
    }
}

impl Server {
    pub(crate) async fn start(engine: Arc<Engine>) -> Self {
        let bound = Bound::open(settings().edge()).await.unwrap();
        let address = bound.local_addr().unwrap();
        let (stop, stopped) = oneshot::channel();
        let running = tokio::spawn(bound.run(engine, async move { drop(stopped.await) }));
        Self { address, stop: Some(stop), running }
    }

    pub(crate) async fn channel(&self) -> Channel {
        Channel::from_shared(format!("http://{}", self.address)).unwrap().connect().await.unwrap()
    }

    pub(crate) async fn client(&self) -> PolicyDecisionServiceClient<Channel> {
        PolicyDecisionServiceClient::new(self.channel().await)
    }

    /// Tells it to leave.
    pub(crate) fn stop(&mut self) {
        drop(self.stop.take());
    }

    /// Waits until it has left.
    pub(crate) async fn ended(mut self) -> Ended {
        self.stop();
        (&mut self.running).await.unwrap().unwrap()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.running.abort();
    }
}
