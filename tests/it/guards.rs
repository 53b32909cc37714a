//! What a provider is spared: probes in flight, the queue, calls per second, new keys, and an outage's three seconds.

use std::{collections::BTreeMap, num::NonZeroU32, sync::Arc, time::Duration};

use byok_gate::{
    core::{
        engine::{Decided, Engine, ProbeRequest, ProbeStarted, Prober},
        policy::{Action, Enforcement, Exception, Group},
    },
    domain::{
        denial::Refusal,
        request::Checkpoint,
        secret::Secret,
        verdict::{DenyCode, ServedFrom, Verdict, Withheld},
    },
    grpc::convert::{self, pb},
    liveness::{
        breaker::BreakerSettings,
        cache::{Cache, CacheSettings},
        new_keys::NewKeyLimits,
        prober::{HttpProber, ProbeSettings},
        provider_limits::{ProviderLimiter, ProviderLimits},
    },
};
use tokio::{
    task::JoinSet,
    time::{Instant, advance},
};

use crate::support::{
    case::{self, Spec},
    gate::{Files, Server},
    prober::{Scripted, finding},
    vendor::{Row, Vendor},
};

fn files() -> Files {
    let (registry, catalogue) = case::documents(1);
    Files::new(&registry, &catalogue, None)
}

fn spec(model: &str, name: &str, value: &str, organization: &str) -> pb::WorkspaceSpec {
    let workspace = BTreeMap::from([(name.to_owned(), Some(value.to_owned()))]);
    Spec { model: model.into(), workspace, organization_id: organization.into(), ..Spec::default() }.message()
}

async fn ask(engine: &Engine, spec: pb::WorkspaceSpec, checkpoint: Checkpoint) -> Decided {
    let message = pb::DecideRequest { workspace_spec: Some(spec), checkpoint: 1, ..Default::default() };
    let mut request = convert::request(message).unwrap();
    request.checkpoint = checkpoint;
    engine.decide(&request, Instant::now() + Duration::from_secs(20)).await
}

fn code(decided: &Decided) -> Option<DenyCode> {
    decided.decision.denial().map(|deny| deny.refusal.code())
}

fn served_from(decided: &Decided) -> ServedFrom {
    decided.decision.liveness.as_ref().unwrap().seen.unwrap().served_from
}

fn withheld(decided: &Decided) -> Option<Withheld> {
    match &decided.decision.denial()?.refusal {
        Refusal::Liveness(judged) => judged.withheld,
        other => panic!("{other:?}"),
    }
}

const fn count(number: u32) -> NonZeroU32 {
    NonZeroU32::new(number).unwrap()
}

// === in flight and queue ===

/// A thousand credentials of a thousand tenants in four batches: never more than eight at the vendor, none lost, each with an
/// answer of its own.
#[tokio::test]
async fn a_thousand_credentials_in_four_batches() {
    let good = |index: usize| !index.is_multiple_of(3);
    let mut rows: Vec<Row> = (0..1_000)
        .filter(|index| good(*index))
        .map(|index| Row { key: Some(format!("made-up-{index}")), body: r#"{"data": []}"#.into(), delay_ms: 5, ..Row::default() })
        .collect();
    rows.push(Row { status: Some(401), body: r#"{"error": {"code": "no"}}"#.into(), delay_ms: 5, ..Row::default() });
    let vendor = Vendor::start(rows).await;
    let (registry, catalogue) = case::documents(vendor.address.port());
    let prober =
        HttpProber::new(ProbeSettings { allow_loopback_http: true, calibrate: false, ..ProbeSettings::default() }).unwrap();
    let limits = ProviderLimits { in_flight: 8, per_second: count(100_000), ..ProviderLimits::default() };
    let cache = Cache::new(Arc::new(ProviderLimiter::new(Arc::new(prober), limits)), CacheSettings::default());
    let server = Server::start(Files::new(&registry, &catalogue, None).engine_over(Arc::new(cache))).await;
    let mut batches = JoinSet::new();
    for batch in 0..4 {
        let mut client = server.client().await;
        batches.spawn(async move {
            let requests = (0..250).map(|index| {
                let index = batch * 250 + index;
                let spec = spec("acme-large", "ACME_API_KEY", &format!("made-up-{index}"), &format!("org-{index}"));
                pb::DecideRequest { workspace_spec: Some(spec), checkpoint: 1, ..Default::default() }
            });
            let mut stream =
                client.batch_decide(pb::BatchDecideRequest { requests: requests.collect() }).await.unwrap().into_inner();
            let mut told = BTreeMap::new();
            while let Some(item) = stream.message().await.unwrap() {
                let pb::batch_decide_response::Result::Response(response) = item.result.unwrap() else { panic!("undecided") };
                let verdict = response.liveness.unwrap().verdict();
                assert_eq!(told.insert(batch * 250 + item.index as usize, verdict), None);
            }
            told
        });
    }
    let mut told = BTreeMap::new();
    while let Some(batch) = batches.join_next().await {
        told.extend(batch.unwrap());
    }
    let expected = (0..1_000).map(|index| (index, if good(index) { pb::Verdict::Valid } else { pb::Verdict::Invalid }));
    assert_eq!(told, expected.collect());
    assert_eq!(vendor.asked().len(), 1_000);
    assert!((2..=8).contains(&vendor.most_at_once()), "{} at once", vendor.most_at_once());
}

/// Asks this often at once, and tells what each was: the verdict, or why it was withheld.
async fn at_once(prober: &ProviderLimiter, times: usize) -> Vec<Result<Verdict, Withheld>> {
    let engine = files().engine();
    let target = Arc::new(crate::model::Asked::about(&engine, 1).target());
    let questions = (0..times).map(|_| {
        let secret = Arc::new(Secret::new("made-up-key".into()));
        let asked = prober.probe(ProbeRequest { target: Arc::clone(&target), secret, started: ProbeStarted::default() });
        async move {
            let finding = asked.await;
            finding.withheld.map_or(Ok(finding.verdict), Err)
        }
    });
    futures_util::future::join_all(questions).await
}

#[tokio::test(start_paused = true)]
async fn the_queue_is_bounded_in_length_and_in_time() {
    // Ten at once: two fly and leave the queue, four wait, four are refused. Of those that wait two fly after 3 s, and the last
    // two after 6, if they may wait for so long.
    for (queue_time, asked) in [(60, 6), (5, 4)] {
        let scripted = Scripted::new(Verdict::Valid);
        scripted.set(|script| script.takes = Duration::from_secs(3));
        let queue_time = Duration::from_secs(queue_time);
        let limits = ProviderLimits { in_flight: 2, queue: 4, queue_time, per_second: count(1_000) };
        let answers = at_once(&ProviderLimiter::new(scripted.clone(), limits), 10).await;
        let of = |what| answers.iter().filter(|answer| **answer == what).count();
        assert_eq!((of(Ok(Verdict::Valid)), of(Err(Withheld::Queue))), (asked, 10 - asked), "{answers:?}");
        assert_eq!(scripted.asked(), asked);
    }
}

#[tokio::test(start_paused = true)]
async fn calls_per_second_are_spread_and_then_withheld() {
    let scripted = Scripted::new(Verdict::Valid);
    let limits = ProviderLimits { in_flight: 100, queue: 100, queue_time: Duration::from_secs(2), per_second: count(10) };
    let began = Instant::now();
    let answers = at_once(&ProviderLimiter::new(scripted.clone(), limits), 50).await;
    // Ten at once, ten in each of two seconds, and the rest would have to wait for longer than it may.
    let of = |what| answers.iter().filter(|answer| **answer == what).count();
    assert_eq!((of(Ok(Verdict::Valid)), of(Err(Withheld::Budget))), (30, 20), "{answers:?}");
    assert_eq!(scripted.asked(), 30);
    assert!(began.elapsed() >= Duration::from_secs(2));
}

/// A caller whose time ends in the queue is told that it was our doing, not the provider's.
#[tokio::test(start_paused = true)]
async fn waiting_for_a_turn_is_not_the_providers_timeout() {
    let scripted = Scripted::new(Verdict::Valid);
    scripted.set(|script| script.takes = Duration::from_secs(3));
    let limits = ProviderLimits { in_flight: 1, ..ProviderLimits::default() };
    let engine =
        files().engine_over(Arc::new(Cache::new(Arc::new(ProviderLimiter::new(scripted, limits)), CacheSettings::default())));
    let decide = |value: &'static str| {
        let engine = Arc::clone(&engine);
        async move {
            let message = pb::DecideRequest {
                workspace_spec: Some(spec("acme-large", "ACME_API_KEY", value, "")),
                checkpoint: 1,
                ..Default::default()
            };
            engine.decide(&convert::request(message).unwrap(), Instant::now() + Duration::from_secs(1)).await
        }
    };
    let (first, second) = tokio::join!(decide("made-up-1"), decide("made-up-2"));
    assert_eq!(code(&first), Some(DenyCode::ByokProbeTimeout));
    assert_eq!((code(&second), withheld(&second)), (Some(DenyCode::ByokProbeNotAttempted), Some(Withheld::Queue)));
}

// === new keys ===

fn with_new_keys(per_organization: u32, per_caller: u32) -> (Arc<Engine>, Arc<Scripted>) {
    let scripted = Scripted::new(Verdict::Valid);
    let new_keys = NewKeyLimits { per_organization: count(per_organization), per_caller: count(per_caller) };
    let settings = CacheSettings { new_keys, ..CacheSettings::default() };
    (files().engine_over(Arc::new(Cache::new(scripted.clone(), settings))), scripted)
}

#[tokio::test(start_paused = true)]
async fn an_organization_may_bring_so_many_new_keys_a_minute() {
    let (engine, scripted) = with_new_keys(3, 1_000);
    let of = |value: &str, organization: &str| spec("acme-large", "ACME_API_KEY", value, organization);
    for index in 0..3 {
        assert_eq!(code(&ask(&engine, of(&format!("made-up-{index}"), "org-1"), Checkpoint::Create).await), None);
    }
    let fourth = ask(&engine, of("made-up-3", "org-1"), Checkpoint::Create).await;
    assert_eq!((code(&fourth), withheld(&fourth)), (Some(DenyCode::ByokProbeNotAttempted), Some(Withheld::NewKeys)));
    let retry_after = fourth.decision.denial().unwrap().refusal.retry_after().unwrap();
    assert!((Duration::from_secs(19)..=Duration::from_secs(20)).contains(&retry_after), "{retry_after:?}");
    // A key that is remembered is not new; another organization has its own count.
    assert_eq!(code(&ask(&engine, of("made-up-0", "org-1"), Checkpoint::Create).await), None);
    assert_eq!(code(&ask(&engine, of("made-up-3", "org-2"), Checkpoint::Create).await), None);
    assert_eq!(scripted.asked(), 4);
    advance(retry_after).await;
    assert_eq!(code(&ask(&engine, of("made-up-4", "org-1"), Checkpoint::Create).await), None);
}

#[tokio::test(start_paused = true)]
async fn a_caller_may_bring_so_many_whatever_the_organizations() {
    let (engine, _) = with_new_keys(1_000, 2);
    let of = |index: u32| spec("acme-large", "ACME_API_KEY", &format!("made-up-{index}"), &format!("org-{index}"));
    assert_eq!(code(&ask(&engine, of(0), Checkpoint::Create).await), None);
    assert_eq!(code(&ask(&engine, of(1), Checkpoint::Create).await), None);
    assert_eq!(withheld(&ask(&engine, of(2), Checkpoint::Create).await), Some(Withheld::NewKeys));
}

/// At CREATE and PROVISION this limit denies, whatever is configured; at UPDATE the policy rules.
#[tokio::test(start_paused = true)]
async fn no_configuration_makes_a_key_checker_of_the_service() {
    let (engine, _) = with_new_keys(1, 1_000);
    let snapshot = engine.snapshot();
    let mut policy = (*snapshot.policy).clone();
    for checkpoint in [Checkpoint::Create, Checkpoint::Provision, Checkpoint::Update] {
        policy.set_action(checkpoint, Group::Unanswered, Action::Allow);
    }
    policy.set_exception("acme".into(), Exception { enforcement: Enforcement::Report, until: i64::MAX });
    let new_keys = NewKeyLimits { per_organization: count(1), per_caller: count(1_000) };
    let cache = Cache::new(Scripted::new(Verdict::Invalid), CacheSettings { new_keys, ..CacheSettings::default() });
    let engine = files().engine_by(policy, Arc::new(cache));
    let of = |value: &str| spec("acme-large", "ACME_API_KEY", value, "org-1");
    assert_eq!(code(&ask(&engine, of("made-up-0"), Checkpoint::Create).await), None, "on report");
    for checkpoint in [Checkpoint::Create, Checkpoint::Provision] {
        assert_eq!(withheld(&ask(&engine, of("made-up-1"), checkpoint).await), Some(Withheld::NewKeys), "{checkpoint:?}");
    }
    assert_eq!(code(&ask(&engine, of("made-up-1"), Checkpoint::Update).await), None);
}

// === the breaker ===

fn with_breaker(verdict: Verdict) -> (Arc<Engine>, Arc<Scripted>) {
    let scripted = Scripted::new(verdict);
    scripted.set(|script| script.takes = Duration::from_secs(3));
    (files().engine_over(Arc::new(Cache::new(scripted.clone(), CacheSettings::default()))), scripted)
}

fn acme(index: u32) -> pb::WorkspaceSpec {
    spec("acme-large", "ACME_API_KEY", &format!("made-up-{index}"), "")
}

#[tokio::test(start_paused = true)]
async fn an_outage_costs_callers_nothing_once_it_is_known_and_others_nothing_at_all() {
    for verdict in [Verdict::Timeout, Verdict::Unreachable, Verdict::ProviderError] {
        let (engine, scripted) = with_breaker(verdict);
        let BreakerSettings { failures, cool_down, .. } = BreakerSettings::default();
        for index in 0..failures {
            assert_eq!(served_from(&ask(&engine, acme(index), Checkpoint::Create).await), ServedFrom::Probe);
        }
        // Open: the verdict that opened it, in no time.
        let (asked, began) = (scripted.asked(), Instant::now());
        for index in 100..200 {
            let decided = ask(&engine, acme(index), Checkpoint::Create).await;
            assert_eq!(served_from(&decided), ServedFrom::Breaker);
            assert_eq!(decided.decision.liveness.as_ref().unwrap().verdict, verdict);
        }
        assert_eq!((scripted.asked(), began.elapsed()), (asked, Duration::ZERO), "{verdict}");
        // Another provider is asked as ever.
        let other = ask(&engine, spec("beta-1", "BETA_API_KEY", "made-up-b", ""), Checkpoint::Create).await;
        assert_eq!(served_from(&other), ServedFrom::Probe);
        // One probe is let through; while it is on its way the others get the verdict; and it doubles the time, or ends it.
        advance(cool_down).await;
        let (trial, beside) =
            tokio::join!(ask(&engine, acme(300), Checkpoint::Create), ask(&engine, acme(301), Checkpoint::Create));
        assert_eq!((served_from(&trial), served_from(&beside)), (ServedFrom::Probe, ServedFrom::Breaker), "{verdict}");
        advance(cool_down).await;
        assert_eq!(served_from(&ask(&engine, acme(302), Checkpoint::Create).await), ServedFrom::Breaker);
        scripted.set(|script| script.finding = finding(Verdict::Valid));
        advance(cool_down).await;
        assert_eq!(code(&ask(&engine, acme(303), Checkpoint::Create).await), None);
        assert_eq!(served_from(&ask(&engine, acme(304), Checkpoint::Create).await), ServedFrom::Probe);
    }
}

/// A tenant's own slow model says nothing of the provider.
#[tokio::test(start_paused = true)]
async fn what_rests_on_a_tenants_model_opens_no_breaker() {
    let (engine, scripted) = with_breaker(Verdict::Timeout);
    scripted.set(|script| script.finding.about_model = true);
    for index in 0..20 {
        assert_eq!(served_from(&ask(&engine, acme(index), Checkpoint::Create).await), ServedFrom::Probe);
    }
}

/// An answer in between starts the count anew.
#[tokio::test(start_paused = true)]
async fn only_failures_in_a_row_count() {
    let (engine, scripted) = with_breaker(Verdict::Timeout);
    for index in 0..20 {
        let verdict = if index % 5 == 4 { Verdict::Invalid } else { Verdict::Timeout };
        scripted.set(|script| script.finding = finding(verdict));
        assert_eq!(served_from(&ask(&engine, acme(index), Checkpoint::Create).await), ServedFrom::Probe);
    }
}
