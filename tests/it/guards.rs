//! What protects a provider: probes in flight, the queue, calls per second, new keys, and the breaker.

use std::{collections::BTreeMap, num::NonZeroU32, sync::Arc, time::Duration};

use byok_gate::{
    config::settings::Settings,
    core::{
        engine::{Decided, Engine, ProbeRequest, ProbeStarted, Prober},
        policy::{Action, Enforcement, Exception, Group},
    },
    domain::{
        denial::Refusal,
        request::{CalledBy, Checkpoint},
        secret::Secret,
        verdict::{DenyCode, ServedFrom, Verdict, Withheld},
    },
    grpc::convert::{self, pb},
    liveness::{
        breaker::BreakerSettings,
        cache::{Ages, Cache, CacheSettings},
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
    *engine.decide(&request, Instant::now() + Duration::from_secs(20)).await
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

fn hint(decided: &Decided) -> String {
    decided.decision.denial().unwrap().refusal.operator_hint()
}

const fn count(number: u32) -> NonZeroU32 {
    NonZeroU32::new(number).unwrap()
}

// === in flight and queue ===

/// A thousand credentials of a thousand tenants in four batches: never more than eight at the vendor, none lost, each with an
/// own answer.
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
    // None is refused, however busy the machine is.
    let queue_time = Duration::from_secs(600);
    let limits = ProviderLimits { in_flight: 8, queue_time, per_second: count(100_000), ..ProviderLimits::default() };
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

/// Makes this many calls at once, and returns for each the verdict, or why it was withheld.
async fn at_once(prober: &ProviderLimiter, times: usize) -> Vec<Result<Verdict, Withheld>> {
    let engine = files().engine();
    let target = Arc::new(crate::model::Asked::about(&engine, 1).target());
    let questions = (0..times).map(|_| {
        let secret = Arc::new(Secret::new("made-up-key".into()));
        let (target, started) = (Arc::clone(&target), ProbeStarted::default());
        let credential = rand::random();
        let asked = prober.probe(ProbeRequest { target, secret, credential, source: credential, started });
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
        let limits = ProviderLimits { in_flight: 2, queue: 4, queue_time, per_second: count(1_000), ..ProviderLimits::default() };
        let answers = at_once(&ProviderLimiter::new(scripted.clone(), limits), 10).await;
        let of = |what| answers.iter().filter(|answer| **answer == what).count();
        assert_eq!((of(Ok(Verdict::Valid)), of(Err(Withheld::Queue))), (asked, 10 - asked), "{answers:?}");
        assert_eq!(scripted.asked(), asked);
    }
}

#[tokio::test(start_paused = true)]
async fn calls_per_second_are_spread_and_then_withheld() {
    let scripted = Scripted::new(Verdict::Valid);
    let queue_time = Duration::from_secs(2);
    let limits = ProviderLimits { queue: 100, queue_time, per_second: count(10), ..ProviderLimits::default() };
    let began = Instant::now();
    let answers = at_once(&ProviderLimiter::new(scripted.clone(), limits), 50).await;
    // Ten at once, then one every tenth of a second for as long as three fifths of the time that they may wait.
    let of = |what| answers.iter().filter(|answer| **answer == what).count();
    assert_eq!((of(Ok(Verdict::Valid)), of(Err(Withheld::Budget))), (22, 28), "{answers:?}");
    assert_eq!((scripted.asked(), began.elapsed().as_millis().div_ceil(100)), (22, 12));
}

// === how many at a time ===

/// A limiter and what answers behind it.
fn limited(limits: ProviderLimits) -> (ProviderLimiter, Arc<Scripted>) {
    let scripted = Scripted::new(Verdict::Valid);
    scripted.set(|script| script.takes = Duration::from_secs(1));
    let limits = ProviderLimits { per_second: count(10_000), queue_time: Duration::from_secs(600), ..limits };
    (ProviderLimiter::new(scripted.clone(), limits), scripted)
}

#[tokio::test(start_paused = true)]
async fn a_provider_that_answers_is_asked_more_at_a_time_up_to_the_ceiling() {
    let (limiter, scripted) = limited(ProviderLimits::default());
    // 8, 16, 32 and 64 in a second each.
    for (questions, most) in [(8, 8), (16, 16), (32, 32), (64, 64), (500, 64)] {
        at_once(&limiter, questions).await;
        assert_eq!(scripted.most_at_once(), most, "of {questions}");
    }
    // Few at a time do not show how many are possible.
    let (limiter, scripted) = limited(ProviderLimits::default());
    for _ in 0..100 {
        at_once(&limiter, 3).await;
    }
    scripted.most_at_once();
    at_once(&limiter, 50).await;
    assert!(scripted.most_at_once() < 50);
    // A ceiling below the floor is the limit.
    let (limiter, scripted) = limited(ProviderLimits { in_flight: 4, ..ProviderLimits::default() });
    at_once(&limiter, 50).await;
    assert_eq!(scripted.most_at_once(), 4);
}

#[tokio::test(start_paused = true)]
async fn each_setback_halves_how_many_are_asked_at_a_time_down_to_the_floor_and_answers_raise_it_one_by_one() {
    for setback in [Verdict::RateLimited, Verdict::ProviderError, Verdict::Timeout] {
        let (limiter, scripted) = limited(ProviderLimits::default());
        at_once(&limiter, 200).await;
        // Many of them at one moment count as one.
        for most in [64, 32, 16, 8, 8] {
            scripted.most_at_once();
            scripted.verdict(setback);
            at_once(&limiter, most).await;
            assert_eq!(scripted.most_at_once(), most, "{setback}");
        }
        scripted.verdict(Verdict::Valid);
        // A failure of a tenant's own model does not count, nor does an unreachable host: the breaker handles that.
        at_once(&limiter, 8).await;
        for (verdict, about_model) in [(setback, true), (Verdict::Unreachable, false)] {
            scripted.verdict(verdict);
            scripted.set(|script| script.finding.about_model = about_model);
            at_once(&limiter, 9).await;
        }
        scripted.verdict(Verdict::Valid);
        for most in [9, 10, 11] {
            scripted.most_at_once();
            at_once(&limiter, most).await;
            assert_eq!(scripted.most_at_once(), most, "{setback}");
        }
        // After a minute without one it goes fast again.
        advance(Duration::from_secs(61)).await;
        at_once(&limiter, 200).await;
        assert_eq!(scripted.most_at_once(), 64, "{setback}");
    }
}

// === a storm ===

/// The result of a storm.
#[derive(Debug)]
struct Storm {
    tries: f64,
    took: Duration,
    asked: usize,
}

/// A fleet whose workspaces all start at once, and retry when they are told to.
async fn storm(workspaces: usize, credentials: usize, takes: Duration) -> Storm {
    let scripted = Scripted::new(Verdict::Valid);
    scripted.set(|script| script.takes = takes);
    let limiter = ProviderLimiter::new(scripted.clone(), ProviderLimits::default());
    // As after the fleet's last restart, or as after a minute of quiet.
    let ages = Ages { valid: Duration::from_secs(600), ..Ages::default() };
    let cache = Cache::new(Arc::new(limiter), CacheSettings { ages, ..CacheSettings::default() });
    let engine = files().engine_over(Arc::new(cache));
    let began = Instant::now();
    let mut fleet = JoinSet::new();
    for workspace in 0..workspaces {
        let (engine, index) = (Arc::clone(&engine), workspace % credentials);
        fleet.spawn(async move {
            let spec = spec("acme-large", "ACME_API_KEY", &format!("made-up-{index}"), &format!("org-{index}"));
            let message = pb::DecideRequest { workspace_spec: Some(spec), checkpoint: 2, ..Default::default() };
            let request = convert::request(message).unwrap();
            for tries in 1.. {
                // The Go client gives a decision 4 s.
                let decided = engine.decide(&request, Instant::now() + Duration::from_millis(3_900)).await;
                let Some(denial) = decided.decision.denial() else { return tries };
                // Or its probe was still running at its deadline, and has a result at its retry.
                let slow = decided.decision.liveness.as_ref().is_some_and(|liveness| liveness.verdict == Verdict::Timeout);
                let came_too_early = matches!(withheld(&decided), Some(Withheld::Queue | Withheld::Budget));
                assert!((came_too_early || slow && takes > Duration::from_secs(1)) && tries < 20, "{decided:?}");
                // As the Go client does.
                let pause = denial.refusal.retry_after().unwrap();
                let later = (pause / 2).min(Duration::from_secs(1)).mul_f64(rand::random_range(0.0..1.0));
                tokio::time::sleep(pause + later).await;
            }
            unreachable!()
        });
    }
    let tries: i32 = fleet.join_all().await.iter().sum();
    Storm { tries: f64::from(tries) / workspaces as f64, took: began.elapsed(), asked: scripted.asked() }
}

/// A fleet that obeys `retry_after` is decided in little more time than the limits and the vendor's latency need, within two tries on
/// average, and each credential is probed once.
#[tokio::test(start_paused = true)]
async fn a_fleet_that_obeys_is_decided_within_two_tries_and_near_the_bound() {
    let ms = Duration::from_millis;
    for (workspaces, credentials, takes, tries, over_bound) in [
        (3_000, 2_000, ms(300), 2.0, 1.25),
        (1_000, 1_000, ms(50), 2.0, 1.25),
        // First it must find out that the vendor is slow; the number in flight grows with each round of its answers.
        (1_500, 1_000, ms(2_000), 4.0, 1.5),
    ] {
        let ProviderLimits { in_flight, per_second, .. } = ProviderLimits::default();
        let by_the_budget = (credentials as f64 - f64::from(per_second.get())).max(0.0) / f64::from(per_second.get());
        let by_latency = (credentials as f64 / in_flight as f64 - 1.0) * takes.as_secs_f64();
        let bound = by_the_budget.max(by_latency) + takes.as_secs_f64();
        let storm = storm(workspaces, credentials, takes).await;
        println!("{workspaces} x {credentials} at {takes:?}: bound {bound:.1} s, {storm:?}");
        assert_eq!(storm.asked, credentials);
        assert!(storm.tries <= tries, "{storm:?}");
        assert!(storm.took.as_secs_f64() <= over_bound * bound, "bound {bound:.1} s, {storm:?}");
    }
}

/// All replicas together call no more than one would; an organization's calls go to one of them.
#[test]
fn replicas_share_the_limits() {
    let mut settings = Settings::default();
    let (whole, new_keys) = (settings.provider_limits(), settings.cache_settings().new_keys);
    assert_eq!((whole, new_keys), (ProviderLimits::default(), NewKeyLimits::default()));
    settings.server.replicas = count(5);
    let limits = settings.provider_limits();
    assert_eq!((limits.in_flight, limits.in_flight_floor, limits.per_second.get()), (13, 2, 20));
    assert_eq!((limits.queue, limits.queue_time), (whole.queue, whole.queue_time));
    assert_eq!(settings.cache_settings().new_keys, NewKeyLimits { per_platform: count(12_000), ..new_keys });
    // More replicas than shares: each gets at least one.
    settings.server.replicas = count(1_000_000);
    let limits = settings.provider_limits();
    assert_eq!((limits.in_flight, limits.in_flight_floor, limits.per_second.get()), (1, 1, 1));
}

/// A caller whose time ends in the queue learns that the gate caused it, not the provider.
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
    assert!(second.decision.liveness.as_ref().unwrap().seen.is_none(), "nothing was asked");
}

// === new keys ===

fn with_new_keys(per_organization: u32, per_caller: u32, per_platform: u32) -> (Arc<Engine>, Arc<Scripted>) {
    let scripted = Scripted::new(Verdict::Valid);
    let new_keys = NewKeyLimits {
        per_organization: count(per_organization),
        per_caller: count(per_caller),
        per_platform: count(per_platform),
    };
    let settings = CacheSettings { new_keys, ..CacheSettings::default() };
    (files().engine_over(Arc::new(Cache::new(scripted.clone(), settings))), scripted)
}

#[tokio::test(start_paused = true)]
async fn an_organization_may_bring_so_many_new_keys_a_minute() {
    let (engine, scripted) = with_new_keys(3, 1_000, 1_000);
    let of = |value: &str, organization: &str| spec("acme-large", "ACME_API_KEY", value, organization);
    for index in 0..3 {
        assert_eq!(code(&ask(&engine, of(&format!("made-up-{index}"), "org-1"), Checkpoint::Create).await), None);
    }
    let fourth = ask(&engine, of("made-up-3", "org-1"), Checkpoint::Create).await;
    assert_eq!((code(&fourth), withheld(&fourth)), (Some(DenyCode::ByokProbeNotAttempted), Some(Withheld::NewKeys)));
    assert!(fourth.decision.liveness.as_ref().unwrap().seen.is_none(), "nothing was asked");
    assert!(hint(&fourth).starts_with("`new_keys.per_organization` is used up"), "{}", hint(&fourth));
    let retry_after = fourth.decision.denial().unwrap().refusal.retry_after().unwrap();
    assert!((Duration::from_secs(19)..=Duration::from_secs(21)).contains(&retry_after), "{retry_after:?}");
    // Each has a time of its own.
    for (value, seconds) in [("made-up-5", 40), ("made-up-6", 60), ("made-up-5", 40)] {
        let refused = ask(&engine, of(value, "org-1"), Checkpoint::Create).await;
        let retry_after = refused.decision.denial().unwrap().refusal.retry_after().unwrap().as_secs();
        assert!((seconds - 1..=seconds + 1).contains(&retry_after), "{value}: {retry_after}");
    }
    // A cached key is not new; another organization has its own count.
    assert_eq!(code(&ask(&engine, of("made-up-0", "org-1"), Checkpoint::Create).await), None);
    assert_eq!(code(&ask(&engine, of("made-up-3", "org-2"), Checkpoint::Create).await), None);
    assert_eq!(scripted.asked(), 4);
    advance(retry_after).await;
    assert_eq!(code(&ask(&engine, of("made-up-4", "org-1"), Checkpoint::Create).await), None);
}

/// A workspace has a few keys; a platform brings a fleet's.
#[tokio::test(start_paused = true)]
async fn a_caller_may_bring_so_many_whatever_the_organizations() {
    for (is_workspace, many) in [(true, 2), (false, 5)] {
        let (engine, _) = with_new_keys(1_000, 2, 5);
        let ask = async |caller: &str, index: u32| {
            let spec = spec("acme-large", "ACME_API_KEY", &format!("made-up-{caller}-{index}"), &format!("org-{index}"));
            let message = pb::DecideRequest { workspace_spec: Some(spec), checkpoint: 1, ..Default::default() };
            let mut request = convert::request(message).unwrap();
            request.caller = CalledBy { name: caller.to_owned(), is_workspace };
            *engine.decide(&request, Instant::now() + Duration::from_secs(20)).await
        };
        for index in 0..many {
            assert_eq!(code(&ask("one", index).await), None, "{index} of {many}");
        }
        let refused = ask("one", many).await;
        assert_eq!(withheld(&refused), Some(Withheld::NewKeys));
        let setting = if is_workspace { "`new_keys.per_caller` is used up" } else { "`new_keys.per_platform` is used up" };
        assert!(hint(&refused).starts_with(setting), "{}", hint(&refused));
        assert_eq!(code(&ask("another", many).await), None);
    }
    // Thirty thousand tenants that start within a minute are one platform's.
    assert!(NewKeyLimits::default().per_platform.get() >= 30_000);
}

/// A workspace may name any organization, and uses up none's keys by it. Nor do its failures count as those of several organizations.
#[tokio::test(start_paused = true)]
async fn what_a_workspace_says_of_its_organization_costs_no_other() {
    let by_a_workspace = async |engine: &Engine, index: u32, organization: &str| {
        let spec = spec("acme-large", "ACME_API_KEY", &format!("made-up-{index}"), organization);
        let message = pb::DecideRequest { workspace_spec: Some(spec), checkpoint: 2, ..Default::default() };
        let mut request = convert::request(message).unwrap();
        request.caller = CalledBy { name: "token of line 2".into(), is_workspace: true };
        *engine.decide(&request, Instant::now() + Duration::from_secs(20)).await
    };
    let (engine, _) = with_new_keys(3, 1_000, 1_000);
    for index in 0..3 {
        assert_eq!(code(&by_a_workspace(&engine, index, "org-1").await), None);
    }
    let of_the_tenant = spec("acme-large", "ACME_API_KEY", "made-up-own", "org-1");
    assert_eq!(code(&ask(&engine, of_the_tenant, Checkpoint::Create).await), None);
    let (engine, _) = with_breaker(Verdict::Timeout);
    for index in 0..5 {
        assert_eq!(served_from(&by_a_workspace(&engine, index, &format!("org-{index}")).await), ServedFrom::Probe);
    }
    assert_eq!(served_from(&by_a_workspace(&engine, 5, "org-5").await), ServedFrom::Breaker, "it is open for this one");
    let of_another = spec("acme-large", "ACME_API_KEY", "made-up-other", "org-other");
    assert_eq!(served_from(&ask(&engine, of_another, Checkpoint::Create).await), ServedFrom::Probe);
}

/// At CREATE and PROVISION this limit denies under any configuration; at UPDATE the policy decides.
#[tokio::test(start_paused = true)]
async fn no_configuration_makes_a_key_checker_of_the_service() {
    let (engine, _) = with_new_keys(1, 1_000, 1_000);
    let snapshot = engine.snapshot();
    let mut policy = (*snapshot.policy).clone();
    for checkpoint in [Checkpoint::Create, Checkpoint::Provision, Checkpoint::Update] {
        policy.set_action(checkpoint, Group::Unanswered, Action::Allow);
    }
    policy.set_exception("acme".into(), Exception { enforcement: Enforcement::Report, until: i64::MAX });
    let new_keys = NewKeyLimits { per_organization: count(1), ..NewKeyLimits::default() };
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
        // Open: the verdict that opened it, at once.
        let (asked, began) = (scripted.asked(), Instant::now());
        for index in 100..200 {
            let decided = ask(&engine, acme(index), Checkpoint::Create).await;
            assert_eq!(served_from(&decided), ServedFrom::Breaker);
            assert_eq!(decided.decision.liveness.as_ref().unwrap().verdict, verdict);
        }
        assert_eq!((scripted.asked(), began.elapsed()), (asked, Duration::ZERO), "{verdict}");
        // Another provider is probed as usual.
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

/// A tenant's own slow model says nothing about the provider.
#[tokio::test(start_paused = true)]
async fn what_rests_on_a_tenants_model_opens_no_breaker() {
    let (engine, scripted) = with_breaker(Verdict::Timeout);
    scripted.set(|script| script.finding.about_model = true);
    for index in 0..20 {
        assert_eq!(served_from(&ask(&engine, acme(index), Checkpoint::Create).await), ServedFrom::Probe);
    }
}

/// An answer in between resets the count.
#[tokio::test(start_paused = true)]
async fn only_failures_in_a_row_count() {
    let (engine, scripted) = with_breaker(Verdict::Timeout);
    for index in 0..20 {
        let verdict = if index % 5 == 4 { Verdict::Invalid } else { Verdict::Timeout };
        scripted.set(|script| script.finding = finding(verdict));
        assert_eq!(served_from(&ask(&engine, acme(index), Checkpoint::Create).await), ServedFrom::Probe);
    }
}
