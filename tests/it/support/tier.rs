//! Replicas in one process that share a tier.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use byok_gate::{
    core::engine::Engine,
    domain::{
        decision::Decision,
        request::Checkpoint,
        secret::Secret,
        verdict::{ServedFrom, Verdict},
    },
    grpc::convert::{self, pb},
    liveness::{
        cache::{Ages, Cache, CacheSettings},
        tier::{ClientIdentity, Tier, TierAccess, TierKeys, TierServers},
    },
};
use tokio::{task::JoinHandle, time::Instant};

use super::{
    case::{self, Spec},
    gate::Files,
    page::Scraped,
    prober::Scripted,
};

/// The key of all replicas.
pub(crate) const KEY: &str = "made-up-tier-key-0123456789abcdef0123456789abcdef";

/// How a replica comes to the store on loopback.
#[derive(Clone)]
pub(crate) struct Way {
    pub(crate) port: u16,
    /// The Sentinels that name the store, in place of the port: their ports, the name, and the login.
    pub(crate) sentinels: Option<(Vec<u16>, String, (String, String))>,
    /// The ports of nodes of the cluster that the store is, in place of the port.
    pub(crate) nodes: Vec<u16>,
    pub(crate) keys: String,
    pub(crate) login: Option<(String, String)>,
    /// Over TLS, trusting this authority.
    pub(crate) ca: Option<String>,
    /// With this certificate and key.
    pub(crate) identity: Option<(String, String)>,
    pub(crate) timeout: Duration,
}

/// An engine with a memory of its own.
pub(crate) struct Replica {
    pub(crate) engine: Arc<Engine>,
    cache: Arc<Cache>,
    refusal_listener: JoinHandle<()>,
}

impl Way {
    pub(crate) fn to(port: u16) -> Self {
        Self {
            port,
            sentinels: None,
            nodes: Vec::new(),
            keys: KEY.to_owned(),
            login: None,
            ca: None,
            identity: None,
            timeout: Duration::from_millis(350),
        }
    }

    pub(crate) fn tier(&self) -> Arc<Tier> {
        let Self { port, sentinels, nodes, keys, login, ca, identity, timeout } = self.clone();
        let scheme = if ca.is_some() { "rediss://localhost" } else { "redis://127.0.0.1" };
        let (user, password) = login.unzip();
        let at = |port: u16| format!("{scheme}:{port}");
        let servers = match sentinels {
            None if !nodes.is_empty() => TierServers::Nodes(nodes.into_iter().map(at).collect()),
            None => TierServers::Address(at(port)),
            Some((ports, service, (user, password))) => TierServers::Sentinels {
                addresses: ports.into_iter().map(at).collect(),
                service,
                user: Some(user),
                password: Some(Secret::new(password)),
            },
        };
        let access = TierAccess {
            servers,
            timeout,
            user,
            password: password.map(Secret::new),
            ca: ca.map(String::into_bytes),
            identity: identity.map(|(certificate, key)| ClientIdentity::new(certificate.into_bytes(), Secret::new(key)).unwrap()),
            keys: TierKeys::parse(&keys).unwrap(),
        };
        Tier::new(access).unwrap()
    }
}

impl Replica {
    pub(crate) fn new(way: &Way, prober: &Arc<Scripted>) -> Self {
        Self::with_ages(way, prober, Ages::default())
    }

    pub(crate) fn with_ages(way: &Way, prober: &Arc<Scripted>, ages: Ages) -> Self {
        Self::with(way, prober, CacheSettings { ages, ..CacheSettings::default() })
    }

    pub(crate) fn with(way: &Way, prober: &Arc<Scripted>, settings: CacheSettings) -> Self {
        Self::over(Cache::new(prober.clone(), settings).with_tier(Some(way.tier())))
    }

    /// Over a cache that has the tier already.
    pub(crate) fn over(cache: Cache) -> Self {
        let (registry, catalogue) = case::documents(1);
        let cache = Arc::new(cache);
        let refusal_listener = tokio::spawn(cache.refusal_listener().unwrap());
        Self { engine: Files::new(&registry, &catalogue, None).engine_over(cache.clone()), cache, refusal_listener }
    }

    /// The verdict, and where it came from.
    pub(crate) async fn ask(&self, value: &str) -> (Verdict, ServedFrom) {
        self.ask_no_older(value, None).await
    }

    pub(crate) async fn ask_no_older(&self, value: &str, max_age: Option<Duration>) -> (Verdict, ServedFrom) {
        let decision = self.decide("", value, max_age).await;
        let is_allow = decision.denial().is_none();
        let liveness = decision.liveness.unwrap();
        // At CREATE none of these tests' verdicts allows but VALID.
        assert_eq!(is_allow, liveness.verdict == Verdict::Valid, "{liveness:?}");
        (liveness.verdict, liveness.seen.unwrap().served_from)
    }

    /// What the explanation says.
    pub(crate) async fn explained(&self, value: &str) -> String {
        let steps = self.decide("", value, None).await.trace;
        steps.iter().map(|step| format!("{step:?}\n")).collect()
    }

    pub(crate) async fn decide(&self, organization: &str, value: &str, max_age: Option<Duration>) -> Decision {
        self.decide_within(Duration::from_secs(5), organization, value, max_age).await
    }

    pub(crate) async fn decide_within(
        &self,
        patience: Duration,
        organization: &str,
        value: &str,
        max_age: Option<Duration>,
    ) -> Decision {
        let spec = Spec {
            model: "acme-large".into(),
            organization_id: organization.into(),
            workspace: BTreeMap::from([("ACME_API_KEY".into(), Some(value.into()))]),
            ..Spec::default()
        };
        let message =
            pb::DecideRequest { workspace_spec: Some(spec.message()), checkpoint: 1, explain: true, ..Default::default() };
        let mut request = convert::request(message).unwrap();
        request.checkpoint = Checkpoint::Create;
        request.max_liveness_age = max_age;
        self.engine.decide(&request, Instant::now() + patience).await.decision
    }

    pub(crate) fn page(&self) -> Scraped {
        Scraped::in_process(&self.engine, &[&*self.cache])
    }

    /// How many looks into the tier came to this.
    pub(crate) fn looks(&self, result: &str) -> f64 {
        self.page().get(&format!(r#"byokgate_tier_lookups_total{{result="{result}"}}"#)).unwrap()
    }
}

impl Drop for Replica {
    fn drop(&mut self) {
        self.refusal_listener.abort();
    }
}
