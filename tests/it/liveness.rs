//! What is cached of a credential, for how long, and what it costs a provider. Time is paused and moved.

use std::{collections::BTreeMap, future::poll_fn, sync::Arc, task::Poll, time::Duration};

use byok_gate::{
    core::engine::{Decided, Engine},
    domain::{
        request::Checkpoint,
        verdict::{DenyCode, ServedFrom, Verdict, WarningCode},
    },
    grpc::convert::{self, pb},
    liveness::cache::{Cache, CacheSettings},
};
use tokio::time::{Instant, advance};

use crate::support::{
    case::{self, Spec},
    gate::Files,
    prober::Scripted,
};

/// An engine whose provider answers by script.
struct Bench {
    engine: Arc<Engine>,
    prober: Arc<Scripted>,
}

/// The result of one call.
#[derive(Debug, PartialEq)]
struct Told {
    code: Option<DenyCode>,
    verdict: Option<Verdict>,
    served_from: Option<ServedFrom>,
    warnings: Vec<WarningCode>,
}

impl Bench {
    fn new(verdict: Verdict) -> Self {
        let prober = Scripted::new(verdict);
        let (registry, catalogue) = case::documents(1);
        let files = Files::new(&registry, &catalogue, None);
        let engine = files.engine_over(Arc::new(Cache::new(prober.clone(), CacheSettings::default())));
        Self { engine, prober }
    }

    async fn ask(&self, value: &str, checkpoint: Checkpoint, max_age: Option<Duration>, time: Duration) -> Decided {
        let spec = Spec {
            model: "acme-large".into(),
            workspace: BTreeMap::from([("ACME_API_KEY".into(), Some(value.into()))]),
            ..Spec::default()
        };
        let message = pb::DecideRequest { workspace_spec: Some(spec.message()), checkpoint: 1, ..Default::default() };
        let mut request = convert::request(message).unwrap();
        request.checkpoint = checkpoint;
        request.max_liveness_age = max_age;
        *self.engine.decide(&request, Instant::now() + time).await
    }

    async fn at(&self, checkpoint: Checkpoint) -> Told {
        told(&self.ask("made-up-key", checkpoint, None, Duration::from_secs(5)).await)
    }

    async fn fresh(&self) -> Told {
        told(&self.ask("made-up-key", Checkpoint::Provision, Some(Duration::ZERO), Duration::from_secs(5)).await)
    }
}

fn told(decided: &Decided) -> Told {
    let liveness = decided.decision.liveness.as_ref();
    Told {
        code: decided.decision.denial().map(|deny| deny.refusal.code()),
        verdict: liveness.map(|liveness| liveness.verdict),
        served_from: liveness.and_then(|liveness| liveness.seen).map(|seen| seen.served_from),
        warnings: decided.decision.warnings.iter().map(|warning| warning.code).collect(),
    }
}

fn allowed(served_from: ServedFrom) -> Told {
    Told { code: None, verdict: Some(Verdict::Valid), served_from: Some(served_from), warnings: vec![] }
}

fn secs(seconds: f64) -> Duration {
    Duration::from_secs_f64(seconds)
}

/// Each verdict is probed again after its lifetime, and not more than a fifth before it.
#[tokio::test(start_paused = true)]
async fn every_verdict_has_its_age() {
    for (verdict, age) in [
        (Verdict::Valid, 30.0),
        (Verdict::Invalid, 10.0),
        (Verdict::Forbidden, 10.0),
        (Verdict::Timeout, 3.0),
        (Verdict::Unreachable, 3.0),
        (Verdict::ProviderError, 5.0),
        (Verdict::UnexpectedResponse, 5.0),
        (Verdict::QuotaExhausted, 5.0),
        (Verdict::RateLimited, 5.0),
        (Verdict::NotCalibrated, 30.0),
    ] {
        let bench = Bench::new(verdict);
        bench.at(Checkpoint::Create).await;
        advance(secs(age * 0.79)).await;
        assert_eq!(bench.at(Checkpoint::Create).await.served_from, Some(ServedFrom::Cache), "{verdict}");
        advance(secs(age * 0.22)).await;
        assert_eq!(bench.at(Checkpoint::Create).await.served_from, Some(ServedFrom::Probe), "{verdict}");
        assert_eq!(bench.prober.asked(), 2, "{verdict}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_valid_that_cost_money_is_asked_for_rarely() {
    let bench = Bench::new(Verdict::Valid);
    bench.prober.set(|script| script.finding.cost_money = true);
    bench.at(Checkpoint::Create).await;
    advance(secs(239.0)).await;
    assert_eq!(bench.at(Checkpoint::Create).await, allowed(ServedFrom::Cache));
    advance(secs(62.0)).await;
    assert_eq!(bench.at(Checkpoint::Create).await, allowed(ServedFrom::Probe));
    // A caller's own age counts as a minute at least.
    advance(secs(59.0)).await;
    assert_eq!(bench.fresh().await, allowed(ServedFrom::Cache));
    advance(secs(2.0)).await;
    assert_eq!(bench.fresh().await, allowed(ServedFrom::Probe));
    assert_eq!(bench.prober.asked(), 3);
}

/// The provider's Retry-After, to the second, within 1 to 60.
#[tokio::test(start_paused = true)]
async fn retry_after_is_kept_within_bounds() {
    for (wanted, kept) in [(0.0, 1.0), (7.0, 7.0), (3600.0, 60.0)] {
        let bench = Bench::new(Verdict::RateLimited);
        bench.prober.set(|script| script.finding.retry_after = Some(secs(wanted)));
        bench.at(Checkpoint::Create).await;
        advance(secs(kept - 0.1)).await;
        assert_eq!(bench.at(Checkpoint::Create).await.served_from, Some(ServedFrom::Cache), "{wanted}");
        advance(secs(0.2)).await;
        assert_eq!(bench.at(Checkpoint::Create).await.served_from, Some(ServedFrom::Probe), "{wanted}");
    }
}

/// A caller that wants a fresh result gets one, at most once a second.
#[tokio::test(start_paused = true)]
async fn a_callers_age_is_honoured_down_to_a_second() {
    let bench = Bench::new(Verdict::Valid);
    bench.at(Checkpoint::Create).await;
    advance(secs(0.9)).await;
    assert_eq!(bench.fresh().await, allowed(ServedFrom::Cache));
    advance(secs(0.2)).await;
    bench.prober.verdict(Verdict::Invalid);
    assert_eq!(bench.fresh().await.code, Some(DenyCode::InvalidByokCredential));
    assert_eq!(bench.prober.asked(), 2);
}

/// Revoked: denied within the VALID age while the provider answers.
#[tokio::test(start_paused = true)]
async fn a_revoked_key_is_denied_within_the_valid_age() {
    let bench = Bench::new(Verdict::Valid);
    assert_eq!(bench.at(Checkpoint::Create).await, allowed(ServedFrom::Probe));
    bench.prober.verdict(Verdict::Invalid);
    advance(secs(30.1)).await;
    assert_eq!(bench.at(Checkpoint::Provision).await.code, Some(DenyCode::InvalidByokCredential));
    // Repaired: allowed within the INVALID age.
    bench.prober.verdict(Verdict::Valid);
    advance(secs(10.1)).await;
    assert_eq!(bench.at(Checkpoint::Provision).await, allowed(ServedFrom::Probe));
}

/// While the provider cannot be reached, PROVISION rests on an earlier VALID up to the hard maximum, and says so; CREATE never.
#[tokio::test(start_paused = true)]
async fn an_outage_is_bridged_at_provision_up_to_the_hard_maximum() {
    let bench = Bench::new(Verdict::Valid);
    bench.at(Checkpoint::Create).await;
    bench.prober.verdict(Verdict::Unreachable);
    advance(secs(60.0)).await;
    let stale = Told {
        code: None,
        verdict: Some(Verdict::Valid),
        served_from: Some(ServedFrom::Stale),
        warnings: vec![WarningCode::StaleLiveness],
    };
    assert_eq!(bench.at(Checkpoint::Provision).await, stale);
    assert_eq!(bench.at(Checkpoint::Create).await.code, Some(DenyCode::ByokProviderUnreachable));
    // A caller's own age binds it too.
    assert_eq!(bench.fresh().await.code, Some(DenyCode::ByokProviderUnreachable));
    advance(secs(839.0)).await;
    assert_eq!(bench.at(Checkpoint::Provision).await, stale);
    advance(secs(2.0)).await;
    assert_eq!(bench.at(Checkpoint::Provision).await.code, Some(DenyCode::ByokProviderUnreachable));
}

/// A refusal since wipes the earlier VALID.
#[tokio::test(start_paused = true)]
async fn a_refusal_since_ends_the_bridge() {
    for refused in [Verdict::Invalid, Verdict::Forbidden] {
        let bench = Bench::new(Verdict::Valid);
        bench.at(Checkpoint::Create).await;
        advance(secs(31.0)).await;
        bench.prober.verdict(refused);
        bench.at(Checkpoint::Create).await;
        bench.prober.verdict(Verdict::Unreachable);
        advance(secs(11.0)).await;
        assert_eq!(bench.at(Checkpoint::Provision).await.code, Some(DenyCode::ByokProviderUnreachable), "{refused}");
    }
}

/// So does one that rests on the workspace's model, which is kept apart.
#[tokio::test(start_paused = true)]
async fn a_refusal_by_a_completion_ends_the_bridge_too() {
    let bench = Bench::new(Verdict::Valid);
    bench.at(Checkpoint::Create).await;
    advance(secs(31.0)).await;
    bench.prober.verdict(Verdict::Invalid);
    bench.prober.set(|script| script.finding.about_model = true);
    assert_eq!(bench.at(Checkpoint::Create).await.code, Some(DenyCode::InvalidByokCredential));
    bench.prober.verdict(Verdict::Unreachable);
    advance(secs(11.0)).await;
    assert_eq!(bench.at(Checkpoint::Provision).await.code, Some(DenyCode::ByokProviderUnreachable));
}

/// A "yes" that depends on the model is cached for that model, and bridges an outage like any other.
#[tokio::test(start_paused = true)]
async fn a_completions_yes_is_remembered_and_bridges_an_outage() {
    let bench = Bench::new(Verdict::Valid);
    bench.prober.set(|script| script.finding.about_model = true);
    assert_eq!(bench.at(Checkpoint::Create).await, allowed(ServedFrom::Probe));
    assert_eq!(bench.at(Checkpoint::Create).await, allowed(ServedFrom::Cache));
    advance(secs(31.0)).await;
    bench.prober.verdict(Verdict::Unreachable);
    assert_eq!(bench.at(Checkpoint::Create).await.code, Some(DenyCode::ByokProviderUnreachable));
    assert_eq!(bench.at(Checkpoint::Provision).await.served_from, Some(ServedFrom::Stale));
}

/// A new value is a new entry; it never sees the old one's observation.
#[tokio::test(start_paused = true)]
async fn a_rotated_value_is_asked_about_itself() {
    let bench = Bench::new(Verdict::Valid);
    bench.at(Checkpoint::Create).await;
    bench.prober.verdict(Verdict::Invalid);
    let rotated = told(&bench.ask("made-up-key-2", Checkpoint::Provision, None, secs(5.0)).await);
    assert_eq!(rotated.code, Some(DenyCode::InvalidByokCredential));
    assert_eq!(bench.at(Checkpoint::Create).await, allowed(ServedFrom::Cache));
}

/// A caller whose deadline is shorter than the provider's answer gets TIMEOUT; the answer is still cached.
#[tokio::test(start_paused = true)]
async fn short_deadlines_do_not_starve_the_memory() {
    let bench = Bench::new(Verdict::Valid);
    bench.prober.set(|script| script.takes = secs(2.0));
    for _ in 0..10 {
        let early = told(&bench.ask("made-up-key", Checkpoint::Create, None, secs(0.05)).await);
        assert_eq!(early.code, Some(DenyCode::ByokProbeTimeout));
    }
    advance(secs(1.6)).await;
    tokio::task::yield_now().await;
    assert_eq!(bench.at(Checkpoint::Create).await, allowed(ServedFrom::Cache));
    assert_eq!(bench.prober.asked(), 1);
}

/// A caller that hangs up does not end the probe, at any point.
#[tokio::test(start_paused = true)]
async fn a_caller_that_hangs_up_does_not_end_the_probe() {
    for polls in 0..4 {
        let bench = Bench::new(Verdict::Valid);
        bench.prober.set(|script| script.takes = secs(1.0));
        {
            let mut first = Box::pin(bench.at(Checkpoint::Create));
            for _ in 0..polls {
                let polled = poll_fn(|context| Poll::Ready(first.as_mut().poll(context))).await;
                assert!(polled.is_pending());
                tokio::task::yield_now().await;
            }
        }
        let second = bench.at(Checkpoint::Create).await;
        assert_eq!((second.code, second.verdict), (None, Some(Verdict::Valid)), "dropped after {polls} polls");
        assert_eq!(bench.prober.asked(), 1, "dropped after {polls} polls");
    }
}

/// A probe that panics releases every waiter, writes nothing and wipes nothing.
#[tokio::test(start_paused = true)]
async fn a_panicking_probe_is_not_remembered() {
    let bench = Bench::new(Verdict::Valid);
    bench.at(Checkpoint::Create).await;
    advance(secs(31.0)).await;
    bench.prober.set(|script| script.panics = true);
    assert_eq!(bench.at(Checkpoint::Create).await.code, Some(DenyCode::ByokProbeNotAttempted));
    assert_eq!(bench.at(Checkpoint::Provision).await.served_from, Some(ServedFrom::Stale));
    bench.prober.set(|script| script.panics = false);
    assert_eq!(bench.at(Checkpoint::Create).await, allowed(ServedFrom::Probe));
}

/// Entries that were made together do not expire together.
#[tokio::test(start_paused = true)]
async fn ages_are_spread() {
    let bench = Bench::new(Verdict::Valid);
    for index in 0..1_000 {
        bench.ask(&format!("made-up-key-{index}"), Checkpoint::Create, None, secs(5.0)).await;
    }
    let mut expired_by = Vec::new();
    for _ in 0..4 {
        // From 24 s on, in quarters of what is left to 30 s.
        advance(if expired_by.is_empty() { secs(25.5) } else { secs(1.5) }).await;
        let before = bench.prober.asked();
        for index in 0..1_000 {
            bench.ask(&format!("made-up-key-{index}"), Checkpoint::Create, None, secs(5.0)).await;
        }
        expired_by.push(bench.prober.asked() - before);
    }
    assert_eq!(expired_by.iter().sum::<usize>(), 1_000, "{expired_by:?}");
    // A quarter each, within five standard deviations (sqrt(1000 * 1/4 * 3/4) = 13.7).
    assert!(expired_by.iter().all(|count| (180..=320).contains(count)), "{expired_by:?}");
}
