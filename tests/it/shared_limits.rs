//! The limits that replicas share over the tier, with a store in the test's own process and in paused time: calls per second to a provider, and
//! new keys of a platform. Each replica has its own cache, limiter and connection; the scripts are the real ones.

use std::{
    num::NonZeroU32,
    sync::{Arc, Mutex},
    time::Duration,
};

use byok_gate::{
    core::{
        classify::Finding,
        engine::{Boxed, Engine, LivenessSource, Observed, ProbeRequest, Prober},
    },
    domain::verdict::{Verdict, Withheld},
    liveness::{
        cache::{Ages, Cache, CacheSettings},
        new_keys::NewKeyLimits,
        provider_limits::{ProviderLimiter, ProviderLimits},
        tier::{Tier, TierKeys},
    },
};
use tokio::{
    sync::watch,
    task::JoinSet,
    time::{Instant, sleep},
};

use crate::{
    model::Asked,
    support::{
        case,
        gate::Files,
        prober::finding,
        store::{LuaStore, Weather},
        tier::KEY,
    },
};

const REPLICAS: u32 = 5;
/// What all of them together may start per second, and the share of each.
const PER_SECOND: u32 = 50;
const SHARE: u32 = PER_SECOND / REPLICAS;
/// How long the provider takes.
const TAKES: Duration = Duration::from_millis(50);

const fn count(number: u32) -> NonZeroU32 {
    NonZeroU32::new(number).unwrap()
}

/// When each call to the provider began, and from which replica.
type Calls = Arc<Mutex<Vec<(Instant, usize)>>>;

/// The provider, as one replica calls it.
struct Provider {
    replica: usize,
    calls: Calls,
    takes: Duration,
}

struct Replica {
    cache: Arc<Cache>,
    weather: watch::Sender<Weather>,
}

struct Fleet {
    engine: Arc<Engine>,
    replicas: Vec<Replica>,
    calls: Calls,
}

/// How a fleet of callers fared.
#[derive(Debug)]
struct Storm {
    tries: f64,
    took: Duration,
}

impl Prober for Provider {
    fn probe(&self, request: ProbeRequest) -> Boxed<'static, Finding> {
        request.started.set();
        self.calls.lock().unwrap().push((Instant::now(), self.replica));
        let takes = self.takes;
        Box::pin(async move {
            sleep(takes).await;
            finding(Verdict::Valid)
        })
    }
}

/// A replica's part of limits that leave room for everything but the calls per second.
fn limits() -> ProviderLimits {
    ProviderLimits { in_flight: 10_000, in_flight_floor: 10_000, per_second: count(PER_SECOND), ..ProviderLimits::default() }
}

impl Fleet {
    fn new() -> Self {
        Self::with(limits(), NewKeyLimits::default(), TAKES)
    }

    /// Replicas of these limits, which are those of all of them together.
    fn with(limits: ProviderLimits, new_keys: NewKeyLimits, takes: Duration) -> Self {
        let (registry, catalogue) = case::documents(1);
        let (store, calls) = (LuaStore::new(), Calls::default());
        let replicas = (0..REPLICAS as usize).map(|replica| {
            let (weather, seen) = watch::channel(Weather::Calm);
            let seed = replica as u64;
            let link = Box::new(store.link(replica, seen, seed));
            // This store answers one request after the other.
            let tier = Tier::over(link, Duration::from_secs(3), TierKeys::parse(KEY).unwrap(), seed);
            let provider = Arc::new(Provider { replica, calls: Arc::clone(&calls), takes });
            // As the service composes them.
            let own = limits.of_one(count(REPLICAS));
            let limiter = Arc::new(ProviderLimiter::new(provider, own).sharing(limits.per_second));
            let ages = Ages { valid: Duration::from_secs(600), ..Ages::default() };
            let settings = CacheSettings { ages, new_keys: new_keys.of_one(count(REPLICAS)), ..CacheSettings::default() };
            let cache =
                Cache::new(limiter.clone(), settings).with_tier(Some(tier)).with_fleet_limits(limiter, new_keys.per_platform);
            Replica { cache: Arc::new(cache), weather }
        });
        Self { engine: Files::new(&registry, &catalogue, None).engine(), replicas: replicas.collect(), calls }
    }

    /// Asks about a key of an organization of its own.
    fn ask(&self, replica: usize, key: usize) -> impl Future<Output = Observed> + Send + 'static {
        let asked = Asked::of(&self.engine, &format!("made-up-{key}"), key);
        let cache = Arc::clone(&self.replicas[replica].cache);
        async move {
            let source: &dyn LivenessSource = &*cache;
            // The Go client gives a decision 4 s.
            source.observe(asked.query(), None, Instant::now() + Duration::from_millis(3_900)).await
        }
    }

    /// Callers with a key each that all come at once, and come again when they are told to. `replica` says for a key and a try where they come.
    async fn storm(self: &Arc<Self>, keys: usize, replica: fn(usize, usize) -> usize) -> Storm {
        let (began, mut callers) = (Instant::now(), JoinSet::new());
        for key in 0..keys {
            let fleet = Arc::clone(self);
            callers.spawn(async move {
                for tries in 1.. {
                    let observed = fleet.ask(replica(key, tries) % REPLICAS as usize, key).await;
                    if observed.finding.verdict == Verdict::Valid {
                        return tries;
                    }
                    assert_eq!(observed.finding.withheld, Some(Withheld::Budget), "{observed:?}");
                    // As the Go client does.
                    let pause = observed.retry_after;
                    let later = (pause / 2).min(Duration::from_secs(1)).mul_f64(rand::random_range(0.0..1.0));
                    sleep(pause + later).await;
                }
                unreachable!()
            });
        }
        let tries: usize = callers.join_all().await.iter().sum();
        Storm { tries: tries as f64 / keys as f64, took: began.elapsed() }
    }

    fn loses_the_store(&self) {
        for replica in &self.replicas {
            replica.weather.send_replace(Weather::Down);
        }
    }

    fn calls(&self) -> usize {
        self.calls.lock().unwrap().len()
    }

    /// The most calls within a second, of all replicas or of one.
    fn most_in_a_second(&self, replica: Option<usize>) -> usize {
        let calls = self.calls.lock().unwrap();
        let of_it: Vec<Instant> =
            calls.iter().filter(|(_, by)| replica.is_none_or(|replica| replica == *by)).map(|(at, _)| *at).collect();
        let within = |from: &Instant| of_it.iter().filter(|at| (*from..*from + Duration::from_secs(1)).contains(at)).count();
        of_it.iter().map(within).max().unwrap_or(0)
    }
}

// === calls per second ===

/// Whether callers reach one replica, one for each key, or another with each try: the calls of all replicas are those that one may make, a
/// second's worth at once and then one after the other, and who obeys needs few tries.
#[tokio::test(start_paused = true)]
async fn all_replicas_together_call_no_more_than_one_may_and_no_less() {
    const KEYS: usize = 300;
    type Route = fn(usize, usize) -> usize;
    let routes: [(&str, Route); 3] =
        [("one replica", |_, _| 0), ("one for each key", |key, _| key), ("another each time", |key, tries| key + tries)];
    for (what, route) in routes {
        let fleet = Arc::new(Fleet::new());
        let storm = fleet.storm(KEYS, route).await;
        let bound = (KEYS as f64 - f64::from(PER_SECOND)) / f64::from(PER_SECOND);
        println!("{what}: bound {bound:.1} s, {storm:?}, {} in a second", fleet.most_in_a_second(None));
        assert_eq!(fleet.calls(), KEYS);
        // A second's worth at once, and those of the second after it.
        assert!(fleet.most_in_a_second(None) <= 2 * PER_SECOND as usize, "{what}: {}", fleet.most_in_a_second(None));
        assert!(storm.took.as_secs_f64() <= 1.25 * bound + 1.0, "{what}: {storm:?}");
        assert!(storm.tries <= 2.0, "{what}: {storm:?}");
    }
}

/// While the store is away, each replica has its own share, and one that was busy before has no second's worth left.
#[tokio::test(start_paused = true)]
async fn without_the_store_each_replica_has_its_own_share() {
    let fleet = Arc::new(Fleet::new());
    for key in 0..PER_SECOND as usize {
        assert_eq!(fleet.ask(0, key).await.finding.verdict, Verdict::Valid);
    }
    // The calls came one after the other, so that there are some left. Now the store goes.
    fleet.loses_the_store();
    let at_once = async |replica: usize, from: usize| {
        let before = fleet.calls();
        let many = (from..from + 3 * SHARE as usize).map(|key| tokio::spawn(fleet.ask(replica, key)));
        let many: Vec<_> = many.collect();
        sleep(Duration::from_millis(20)).await;
        let begun = fleet.calls() - before;
        for asked in many {
            asked.await.unwrap();
        }
        begun
    };
    assert!(at_once(0, 1_000).await <= 1, "the share of one that was busy is used up");
    assert_eq!(at_once(1, 2_000).await, SHARE as usize, "another has a second's worth of its share");
    for replica in 0..2 {
        assert!(fleet.most_in_a_second(Some(replica)) <= PER_SECOND as usize);
    }
    let storm = fleet.storm(100, |key, _| key).await;
    // Of 100 keys that 5 replicas got in equal parts, each may call 10 in a second.
    assert!(storm.took >= Duration::from_millis(500), "{storm:?}");
}

/// A probe for which no slot is free gives its start back: others use it.
#[tokio::test(start_paused = true)]
async fn a_start_that_is_not_used_is_given_back() {
    let limits = ProviderLimits { in_flight: 1, queue: 1, per_second: count(10), ..ProviderLimits::default() };
    let fleet = Fleet::with(limits, NewKeyLimits::default(), Duration::from_secs(60));
    let refused: Vec<_> = (0..30).map(|key| tokio::spawn(fleet.ask(0, key))).collect();
    sleep(Duration::from_millis(100)).await;
    assert_eq!(fleet.calls(), 1, "one slot");
    let others: Vec<_> = (1..REPLICAS as usize).map(|replica| tokio::spawn(fleet.ask(replica, 100 + replica))).collect();
    sleep(Duration::from_millis(50)).await;
    assert_eq!(fleet.calls(), REPLICAS as usize, "the others have slots, and starts");
    for asked in refused.into_iter().chain(others) {
        asked.abort();
    }
}

/// A slow provider: probes wait for slots until their starts are long past. They begin one after the other, and not all at once.
#[tokio::test(start_paused = true)]
async fn starts_that_are_long_past_do_not_begin_at_once() {
    let limits = ProviderLimits { in_flight: 1000, in_flight_floor: 40, queue_time: Duration::from_secs(60), ..limits() };
    let fleet = Fleet::with(limits, NewKeyLimits::default(), Duration::from_secs(10));
    // Eight slots, which are all free again in one moment, and then twice as many.
    let asked: Vec<_> = (0..40).map(|key| tokio::spawn(fleet.ask(0, key))).collect();
    sleep(Duration::from_secs(50)).await;
    asked.iter().for_each(tokio::task::JoinHandle::abort);
    let calls: Vec<Instant> = fleet.calls.lock().unwrap().iter().map(|(at, _)| *at).collect();
    assert_eq!(calls.len(), 40);
    let (first, late) = calls.split_at(8);
    assert!(first[7] - first[0] < Duration::from_millis(200) && late[0] - first[0] > Duration::from_secs(9), "{calls:?}");
    let closest = late.windows(2).map(|pair| pair[1] - pair[0]).min().unwrap();
    assert!(closest >= Duration::from_secs(1) / PER_SECOND, "{closest:?}");
}

/// Who comes at its retry time goes before who comes for the first time, at whichever replica.
#[tokio::test(start_paused = true)]
async fn a_credential_at_its_retry_time_goes_before_new_ones() {
    let fleet = Fleet::new();
    // They use up what may start within the longest wait, and more.
    let at_once = async |replica: usize, keys: std::ops::Range<usize>, millis: u64| {
        keys.for_each(|key| drop(tokio::spawn(fleet.ask(replica, key))));
        sleep(Duration::from_millis(millis)).await;
    };
    at_once(0, 0..400, 1_000).await;
    let refused = fleet.ask(1, 399).await;
    assert_eq!(refused.finding.withheld, Some(Withheld::Budget), "{refused:?}");
    // It keeps its time, wherever it asks, whoever came since.
    at_once(0, 500..600, 300).await;
    let again = fleet.ask(2, 399).await;
    assert_eq!(again.finding.withheld, Some(Withheld::Budget));
    // Up to a tenth is added to each.
    let most = refused.retry_after + Duration::from_millis(300);
    assert!(again.retry_after < most, "{:?} and then {:?}", refused.retry_after, again.retry_after);
    sleep(again.retry_after).await;
    at_once(3, 1_000..2_000, 1_500).await;
    assert_eq!(fleet.ask(1, 2_000).await.finding.withheld, Some(Withheld::Budget));
    assert_eq!(fleet.ask(4, 399).await.finding.verdict, Verdict::Valid);
}

// === new keys ===

/// A platform has one limit over all replicas, however its calls are spread; while the store is away, each replica has its share.
#[tokio::test(start_paused = true)]
async fn a_platform_has_one_limit_for_new_keys_over_all_replicas() {
    const LIMIT: usize = 20;
    let new_keys = NewKeyLimits { per_platform: count(LIMIT as u32), ..NewKeyLimits::default() };
    let valid = async |fleet: &Fleet, keys: std::ops::Range<usize>, replica: fn(usize) -> usize| {
        let mut valid = 0;
        for key in keys {
            let observed = fleet.ask(replica(key), key).await;
            match observed.finding.withheld {
                None => valid += 1,
                Some(why) => {
                    assert_eq!((why, observed.finding.used_up), (Withheld::NewKeys, Some("new_keys.per_platform")));
                    assert!((1..=301).contains(&observed.retry_after.as_secs()), "{observed:?}");
                }
            }
        }
        valid
    };
    for (what, route) in [("one replica", (|_| 1) as fn(usize) -> usize), ("all of them", |key| key % REPLICAS as usize)] {
        let fleet = Fleet::with(limits(), new_keys, Duration::ZERO);
        assert_eq!(valid(&fleet, 0..40, route).await, LIMIT, "{what}");
        // What one of them knows is new to none of them.
        assert_eq!(valid(&fleet, 0..LIMIT, |key| (key + 1) % REPLICAS as usize).await, LIMIT, "{what}");
        // What was spent comes back, one in three seconds.
        sleep(Duration::from_secs(31)).await;
        assert_eq!(valid(&fleet, 100..140, route).await, 10, "{what}");
    }
    let fleet = Fleet::with(limits(), new_keys, Duration::ZERO);
    fleet.loses_the_store();
    assert_eq!(valid(&fleet, 0..100, |key| key % REPLICAS as usize).await, LIMIT, "a share each");
    assert_eq!(valid(&fleet, 200..240, |_| 1).await, 0);
    // One that has used the limit up has no share left when the store goes.
    let fleet = Fleet::with(limits(), new_keys, Duration::ZERO);
    assert_eq!(valid(&fleet, 0..40, |_| 0).await, LIMIT);
    fleet.loses_the_store();
    assert_eq!(valid(&fleet, 100..140, |_| 0).await, 0);
}
