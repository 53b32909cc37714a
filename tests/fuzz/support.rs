//! Shared by the targets: an engine whose provider answers as the input says, and the checks of every decision.

use std::{
    sync::{Arc, LazyLock},
    time::{Duration, SystemTime},
};

use byok_gate::{
    core::{
        catalogue::Catalogue,
        classify::Finding,
        credential::LivenessQuery,
        engine::{Boxed, Engine, LivenessSource, Observed},
        policy::Policy,
        registry::Registry,
        snapshot::{Origin, Snapshot},
    },
    domain::{
        request::{PlatformProxy, Request},
        verdict::{ServedFrom, Verdict},
    },
    grpc::convert::{self, pb},
};
use futures_util::FutureExt;
use prost::Message;
use tokio::time::Instant;

/// The verdicts that a provider's answer, or none, can come to.
pub const VERDICTS: [Verdict; 13] = [
    Verdict::Valid,
    Verdict::Invalid,
    Verdict::Forbidden,
    Verdict::QuotaExhausted,
    Verdict::RateLimited,
    Verdict::ProviderError,
    Verdict::UnexpectedResponse,
    Verdict::Timeout,
    Verdict::Unreachable,
    Verdict::NotAttempted,
    Verdict::NoServerSurface,
    Verdict::NotCalibrated,
    Verdict::ProbeDisabled,
];

/// A provider with this verdict for every credential.
struct Says(Verdict);

impl LivenessSource for Says {
    fn observe<'a>(&'a self, _: LivenessQuery<'a>, _: Option<Duration>, _: Instant) -> Boxed<'a, Observed> {
        let observed = Observed {
            shared: false,
            finding: Arc::new(Finding::bare(self.0)),
            observed_at: SystemTime::UNIX_EPOCH,
            age: Duration::ZERO,
            served_from: ServedFrom::Probe,
            retry_after: Duration::from_secs(1),
            earlier_valid: None,
        };
        Box::pin(async move { observed })
    }
}

/// The registry and catalogue that the cases are about: every kind of provider, runtime and model.
pub static CASES: LazyLock<Snapshot> = LazyLock::new(|| {
    let registry = include_str!("../cases/registry.yaml").replace("__PORT__", "1");
    let catalogue = include_str!("../cases/catalogue.yaml").replace("__PORT__", "1");
    let registry = Registry::parse("registry", registry.as_bytes(), &|_| None).expect("the cases' registry stands").value;
    let catalogue = EMBEDDED.catalogue.overlaid("catalogue", catalogue.as_bytes()).expect("the cases' catalogue stands").value;
    snapshot(Arc::new(registry), Arc::new(catalogue))
});

/// Those that are built in.
pub static EMBEDDED: LazyLock<Snapshot> = LazyLock::new(|| {
    let registry = Registry::embedded(&|_| None).expect("the embedded registry stands").value;
    snapshot(Arc::new(registry), Arc::new(Catalogue::embedded().expect("the embedded catalogue stands").value))
});

/// These, under the default policy.
pub fn snapshot(registry: Arc<Registry>, catalogue: Arc<Catalogue>) -> Snapshot {
    let origin = Origin::new("fuzz".into(), SystemTime::UNIX_EPOCH);
    let mut policy = Policy::default();
    policy.platform_proxy = PlatformProxy::Available;
    policy.exempt_runtimes.insert("exempt".into());
    Snapshot::new(registry, catalogue, Arc::new(policy), origin.clone(), origin)
}

/// Takes a byte off the front; 0 where there is none.
pub fn byte(input: &mut &[u8]) -> u8 {
    let Some((first, rest)) = input.split_first() else { return 0 };
    *input = rest;
    *first
}

/// Decides on a message from the wire, and checks what must always hold.
pub fn decide(snapshot: &Snapshot, verdict: Verdict, message: pb::DecideRequest) {
    let sent = message.encode_to_vec();
    let values: Vec<String> =
        message.workspace_spec.iter().flat_map(|spec| &spec.credentials).map(|it| it.value.clone()).collect();
    let Ok(request) = convert::request(message) else { return };
    // What a caller of ours sends on is what came.
    let again = convert::to_request(&request);
    assert!(convert::request(again).is_ok(), "a request that is taken once is taken twice");
    let response = decided(snapshot, verdict, &request);
    holds(&request, verdict, &response);
    let answer = response.encode_to_vec();
    assert!(answer.len() < 1 << 20, "an answer of {} bytes", answer.len());
    for value in values.iter().filter(|value| value.len() > 15 && value.contains("canary")) {
        let times = |text: &[u8]| text.windows(value.len()).filter(|window| *window == value.as_bytes()).count();
        // Unless the request has it elsewhere too, where it is no secret.
        assert!(times(&sent) > 1 || times(&answer) == 0, "the answer gives a credential away");
    }
}

/// The answer, as it goes onto the wire.
pub fn decided(snapshot: &Snapshot, verdict: Verdict, request: &Request) -> pb::DecideResponse {
    let engine = Engine::new(snapshot.clone(), Arc::new(Says(verdict)), Some([7; 32]));
    let decided = engine.decide(request, Instant::now() + Duration::from_secs(1)).now_or_never();
    convert::response(decided.expect("nothing that it waits for"))
}

/// No allow beyond the contract, and never platform billing for a vendor's model.
pub fn holds(request: &Request, verdict: Verdict, response: &pb::DecideResponse) {
    use pb::decide_response::Decision;
    let resolution = response.resolution.clone().unwrap_or_default();
    let billing = match &response.decision {
        Some(Decision::Allow(allow)) => allow.billing_mode,
        Some(Decision::Deny(deny)) => {
            assert!(deny.code != 0 && !deny.message.is_empty(), "a denial without a reason: {response:?}");
            return;
        }
        None => panic!("no decision: {response:?}"),
    };
    let by_hand = resolution.source() != pb::ResolutionSource::Derived;
    assert!(billing != 0, "an allow that bills nobody knows whom: {response:?}");
    assert!(!by_hand || !response.warnings.is_empty(), "an override without a warning: {response:?}");
    if by_hand {
        return;
    }
    if resolution.provider == "platform" {
        assert_eq!(billing, pb::BillingMode::PlatformManaged as i32);
        return;
    }
    assert_eq!(billing, pb::BillingMode::Byok as i32, "flipped: {response:?}");
    assert!(
        request.spec.credentials.iter().any(|it| format!("{:?}", it.value).contains("Readable")),
        "without a value: {response:?}"
    );
    let found = response.liveness.as_ref().map(pb::Liveness::verdict);
    assert!(found == Some(pb::Verdict::Valid) || !response.warnings.is_empty(), "silent: {response:?}");
    assert!(!matches!(found, Some(pb::Verdict::Invalid | pb::Verdict::Forbidden)), "{response:?}");
    assert!(verdict == Verdict::Valid || found != Some(pb::Verdict::Valid), "{response:?}");
}

/// A request for this model with these credentials.
pub fn question(runtime: &str, model: &str, credentials: Vec<pb::Credential>) -> pb::DecideRequest {
    let spec = pb::WorkspaceSpec { runtime: runtime.into(), model: model.into(), credentials, ..Default::default() };
    pb::DecideRequest {
        workspace_spec: Some(spec),
        checkpoint: pb::Checkpoint::Create as i32,
        explain: true,
        ..Default::default()
    }
}
