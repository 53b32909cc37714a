//! The shared tier against a real server of Redis or Valkey, which `tests/tier/run` names.

#![expect(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test that meets what it did not expect has failed"
)]

#[path = "../it/support/mod.rs"]
#[expect(dead_code, reason = "most of it is of the other tests")]
mod support;

mod cluster;
mod sentinel;

use std::{
    env, fs,
    net::{Ipv4Addr, SocketAddr},
    num::NonZeroU32,
    path::Path,
    process::{Child, Command, Stdio},
    sync::{Arc, Mutex},
    time::Duration,
};

use byok_gate::{
    domain::verdict::{DenyCode, ServedFrom, Verdict},
    liveness::{
        breaker::BreakerSettings,
        cache::{Ages, Cache, CacheSettings},
        new_keys::NewKeyLimits,
        provider_limits::{ProviderLimiter, ProviderLimits},
    },
};
use futures_util::{StreamExt, future::join_all};
use redis::AsyncConnectionConfig;
use serde_json::Value;
use tempfile::TempDir;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{
        TcpListener, TcpStream,
        tcp::{OwnedReadHalf, OwnedWriteHalf},
    },
    time::{Instant, sleep},
};
use tracing::subscriber::DefaultGuard;

use support::{
    binary::{PATIENCE, Serving},
    case,
    edge::{decide, is_allow},
    gate::Files,
    prober::Scripted,
    tier::{KEY, Replica, Way},
    vendor::{Row, Vendor},
};

/// The rights that docs/scale.md gives to byok-gate's user: it uses no other command.
const RIGHTS: &str = "~bg1:* &bg1:* -@all +eval +time +strlen +get +set +del +pttl +pexpire +publish +subscribe +select";
const USER: &str = "gate";
const PASSWORD: &str = "made-up-password-0f3c";
const ADMIN: &str = "made-up-admin-77d1";

/// A server of its own, on a free port. Killed when it is dropped.
struct Store {
    child: Child,
    port: u16,
    folder: TempDir,
}

impl Store {
    async fn start() -> Self {
        Self::start_at(free_port(), &[]).await
    }

    async fn start_at(port: u16, more: &[String]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let rights = format!("user {USER} on >{PASSWORD} {RIGHTS}\nuser default on >{ADMIN} ~* &* +@all\n");
        fs::write(folder.path().join("users"), rights).unwrap();
        let port_text = port.to_string();
        let options = ["--port", &port_text, "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"];
        let options = options.into_iter().chain(["--daemonize", "no", "--aclfile", "users"]).map(str::to_owned);
        let options: Vec<String> = options.chain(more.iter().cloned()).collect();
        Self::spawn(port, folder, &options).await
    }

    /// With these options, until its owner gets answers.
    async fn spawn(port: u16, folder: TempDir, options: &[String]) -> Self {
        let server = env::var_os("BYOK_GATE_STORE").unwrap_or_else(|| panic!("BYOK_GATE_STORE is not set: run tests/tier/run"));
        let child = Command::new(server).args(options).current_dir(folder.path()).stdout(Stdio::null()).spawn().unwrap();
        let store = Self { child, port, folder };
        until("the store answers", async || store.admin().await.is_ok()).await;
        store
    }

    async fn admin(&self) -> redis::RedisResult<redis::aio::MultiplexedConnection> {
        let client = redis::Client::open(format!("redis://default:{ADMIN}@127.0.0.1:{}", self.port))?;
        let patient = AsyncConnectionConfig::new().set_connection_timeout(Some(PATIENCE)).set_response_timeout(Some(PATIENCE));
        client.get_multiplexed_async_connection_with_config(&patient).await
    }

    /// A command of the store's owner.
    async fn does<T: redis::FromRedisValue>(&self, words: &[&[u8]]) -> T {
        self.tries(words).await.unwrap()
    }

    /// The same of a server that may be gone, or about to end its connections.
    async fn tries<T: redis::FromRedisValue>(&self, words: &[&[u8]]) -> redis::RedisResult<T> {
        let mut command = redis::Cmd::new();
        for word in words {
            command.arg(*word);
        }
        command.query_async(&mut self.admin().await?).await
    }

    /// How many replicas listen for notices.
    async fn listeners(&self) -> u64 {
        let subscribed: redis::RedisResult<(String, u64)> = self.tries(&[b"PUBSUB", b"NUMSUB", b"bg1:news"]).await;
        subscribed.map_or(0, |(_, listeners)| listeners)
    }

    async fn keys(&self) -> Vec<String> {
        self.does(&[b"KEYS", b"*"]).await
    }

    /// The names of observations, which end with nothing but their hash.
    async fn observations(&self) -> Vec<String> {
        self.keys().await.into_iter().filter(|key| key.matches(':').count() == 1).collect()
    }

    /// The name of the one open breaker.
    async fn breaker(&self) -> Option<String> {
        self.keys().await.into_iter().find(|key| key.ends_with(":breaker"))
    }

    fn way(&self) -> Way {
        Way { login: Some((USER.into(), PASSWORD.into())), timeout: Duration::from_secs(2), ..Way::to(self.port) }
    }

    fn signal(&self, signal: &str) {
        assert!(Command::new("kill").args([signal, &self.child.id().to_string()]).status().unwrap().success());
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

/// What the tasks of this thread log while it lives.
struct Log {
    lines: Lines,
    _guard: DefaultGuard,
}

#[derive(Clone, Default)]
struct Lines(Arc<Mutex<Vec<u8>>>);

impl std::io::Write for Lines {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl Log {
    fn start() -> Self {
        let lines = Lines::default();
        let writer = lines.clone();
        let log = tracing_subscriber::fmt().json().with_writer(move || writer.clone()).finish();
        Self { lines, _guard: tracing::subscriber::set_default(log) }
    }

    fn text(&self) -> String {
        String::from_utf8(self.lines.0.lock().unwrap().clone()).unwrap()
    }

    /// The fields of every event of this name.
    fn events(&self, name: &str) -> Vec<Value> {
        let lines = self.text();
        let fields = lines.lines().map(|line| serde_json::from_str::<Value>(line).unwrap()["fields"].take());
        fields.filter(|fields| fields["event"] == name).collect()
    }
}

fn free_port() -> u16 {
    std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap().port()
}

async fn until(what: &str, mut fits: impl AsyncFnMut() -> bool) {
    let ends = Instant::now() + PATIENCE;
    while !fits().await {
        assert!(Instant::now() < ends, "it never came to that: {what}");
        sleep(Duration::from_millis(10)).await;
    }
}

fn slow(verdict: Verdict, millis: u64) -> Arc<Scripted> {
    let prober = Scripted::new(verdict);
    prober.set(|script| script.takes = Duration::from_millis(millis));
    prober
}

/// Short ages, so that an observation can be old within a test.
fn short() -> Ages {
    let second = Duration::from_secs(1);
    Ages { valid: second, refused: second, ..Ages::default() }
}

/// Both share again: what one asks for, the other finds. All that they say meanwhile is the provider's answer.
async fn until_they_share(what: &str, one: &Replica, other: &Replica, prober: &Arc<Scripted>) {
    let mut round = 0;
    until("they share", async || {
        round += 1;
        prober.verdict(Verdict::Invalid);
        for replica in [one, other] {
            assert_eq!(replica.ask(&format!("made-up-{what}-dead-{round}")).await.0, Verdict::Invalid);
        }
        prober.verdict(Verdict::Valid);
        let value = format!("made-up-{what}-{round}");
        assert_eq!(one.ask(&value).await.0, Verdict::Valid);
        sleep(Duration::from_millis(20)).await;
        let found = other.ask(&value).await;
        assert_eq!(found.0, Verdict::Valid);
        found == SHARED
    })
    .await;
}

const SHARED: (Verdict, ServedFrom) = (Verdict::Valid, ServedFrom::Cache);
const ASKED: (Verdict, ServedFrom) = (Verdict::Valid, ServedFrom::Probe);

/// An operator gives these rights and no others, so the tests must too.
#[test]
fn the_rights_are_those_of_the_docs() {
    let docs = fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/docs/scale.md")).unwrap();
    for rights in [RIGHTS, sentinel::SENTINEL_RIGHTS] {
        assert!(docs.contains(&format!("\nACL SETUSER byok-gate on >PASSWORD {rights}\n")), "{rights}");
    }
}

/// Twenty replicas get calls for the same credentials at once, and then one after the other.
#[tokio::test(flavor = "multi_thread")]
async fn a_fleet_asks_once() {
    let (store, prober) = (Store::start().await, slow(Verdict::Valid, 100));
    let fleet: Vec<Replica> = (0..20).map(|_| Replica::new(&store.way(), &prober)).collect();
    let values: Vec<String> = (0..100).map(|index| format!("made-up-{index}")).collect();
    let (one_moment, later) = values.split_at(50);
    for replica in join_all(one_moment.iter().flat_map(|value| fleet.iter().map(move |replica| replica.ask(value)))).await {
        assert_eq!(replica.0, Verdict::Valid);
    }
    println!("stampede: {} calls for {} credentials at {} replicas", prober.asked(), one_moment.len(), fleet.len());
    assert!(prober.asked() * 100 <= one_moment.len() * 102, "{}", prober.asked());
    prober.set(|script| script.takes = Duration::ZERO);
    let before = prober.asked();
    join_all(later.iter().map(|value| fleet[0].ask(value))).await;
    until("all is stored", async || store.observations().await.len() == values.len()).await;
    for replica in &fleet[1..] {
        assert_eq!(join_all(later.iter().map(|value| replica.ask(value))).await, vec![SHARED; later.len()]);
    }
    assert_eq!(prober.asked() - before, later.len());
    assert!(fleet.iter().all(|replica| replica.page().get("byokgate_tier_damaged_total") == Some(0.0)));
}

#[tokio::test]
async fn explain_says_shared_and_a_callers_age_holds() {
    let (store, prober) = (Store::start().await, Scripted::new(Verdict::Valid));
    let (one, other) = (Replica::new(&store.way(), &prober), Replica::new(&store.way(), &prober));
    assert_eq!(one.ask("made-up").await, ASKED);
    until("it is stored", async || store.observations().await.len() == 1).await;
    assert_eq!(other.ask("made-up").await, SHARED);
    assert_eq!(prober.asked(), 1);
    // Older than a second, which no caller's age is below: it is asked for again, by one of them for both.
    let age = Some(Duration::from_secs(1));
    until("it is older", async || {
        other.ask_no_older("made-up", age).await;
        prober.asked() == 2
    })
    .await;
    until("one looks it up", async || one.ask_no_older("made-up", age).await.1 == ServedFrom::Cache).await;
    assert!(one.looks("hit") + other.looks("hit") >= 2.0 && prober.asked() <= 4, "{}", prober.asked());
    assert!(one.explained("made-up").await.contains("shared"), "{}", one.explained("made-up").await);
}

/// Callers with and without a maximum age share one lookup: its result goes to none that wants a fresher one.
#[tokio::test]
async fn who_waits_for_a_look_gets_nothing_older_than_wanted() {
    let (store, prober) = (Store::start().await, Scripted::new(Verdict::Valid));
    let first = Replica::new(&store.way(), &prober);
    first.ask("made-up").await;
    until("it is stored", async || store.observations().await.len() == 1).await;
    let age = Some(Duration::from_secs(1));
    until("it is older than a second", async || first.ask_no_older("made-up", age).await.1 == ServedFrom::Probe).await;
    until("and again", async || first.ask_no_older("made-up", age).await.1 == ServedFrom::Probe).await;
    until("it is stored again", async || !store.keys().await.iter().any(|key| key.ends_with(":lease"))).await;
    let stored = Instant::now();
    let slow = slowed(store.port, [0, 300]).await;
    let second = Replica::new(&Way { port: slow, ..store.way() }, &prober);
    until("that is older than a second too", async || stored.elapsed() > Duration::from_millis(1_200)).await;
    let asked = prober.asked();
    let (any, young) = tokio::join!(second.ask("made-up"), second.ask_no_older("made-up", age));
    assert_eq!((any, young, prober.asked()), (SHARED, ASKED, asked + 1));
}

#[tokio::test]
async fn an_invalid_ends_the_valid_everywhere() {
    let (store, prober) = (Store::start().await, Scripted::new(Verdict::Valid));
    let (one, other) = (Replica::new(&store.way(), &prober), Replica::new(&store.way(), &prober));
    until("both listen", async || store.listeners().await == 2).await;
    one.ask("made-up").await;
    until("the other has it", async || other.ask("made-up").await == SHARED).await;
    prober.verdict(Verdict::Invalid);
    until("one sees it refused", async || one.ask_no_older("made-up", Some(Duration::ZERO)).await.0 == Verdict::Invalid).await;
    let asked = prober.asked();
    // Its VALID would count for 30 seconds.
    until("the other hears of it", async || other.ask("made-up").await == (Verdict::Invalid, ServedFrom::Cache)).await;
    assert_eq!(prober.asked(), asked, "and asks nobody");
}

/// An organization that reaches many replicas one after the other has one limit; while there is no store, one at each.
#[tokio::test]
async fn new_keys_of_an_organization_are_counted_over_all_replicas() {
    const LIMIT: usize = 10;
    let (store, prober) = (Store::start().await, Scripted::new(Verdict::Valid));
    let new_keys = NewKeyLimits { per_organization: 10.try_into().unwrap(), ..NewKeyLimits::default() };
    let settings = CacheSettings { new_keys, ..CacheSettings::default() };
    let fleet: Vec<Replica> = (0..20).map(|_| Replica::with(&store.way(), &prober, settings)).collect();
    let refusals = async |what: &str| {
        let mut refusals = 0;
        for index in 0..60 {
            let decision =
                fleet[index % fleet.len()].decide("made-up-canary-org", &format!("made-up-{what}-{index}"), None).await;
            if let Some(deny) = decision.denial() {
                assert_eq!(deny.refusal.code(), DenyCode::ByokProbeNotAttempted);
                assert!(deny.refusal.message().contains("too many new keys"), "{}", deny.refusal.message());
                let wait = deny.refusal.retry_after().unwrap().as_secs();
                assert!((1..=60).contains(&wait), "{wait} s");
                refusals += 1;
            }
        }
        refusals
    };
    let began = Instant::now();
    let refused = refusals("a").await;
    // What was spent comes back, one in six seconds.
    let most = LIMIT + began.elapsed().as_secs() as usize / 6;
    assert!((LIMIT..=most).contains(&prober.asked()) && refused == 60 - prober.asked(), "{refused} of 60, {most}");
    // A count of another type, or that nobody of ours can have made, is none.
    let name = store.keys().await.into_iter().find(|key| key.ends_with(":new-keys")).unwrap();
    for words in [[b"LPUSH".as_slice(), name.as_bytes(), b"x"], [b"SET", name.as_bytes(), b"9000000000000000"]] {
        store.does::<()>(&[b"DEL", name.as_bytes()]).await;
        store.does::<redis::Value>(&words).await;
        let asked = prober.asked();
        fleet[0].decide("made-up-canary-org", &format!("made-up-{asked}-b"), None).await;
        assert_eq!(prober.asked(), asked + 1);
    }
    store.signal("-KILL");
    // Each has three of them, which is within its own limit.
    let asked = prober.asked();
    assert_eq!((refusals("c").await, prober.asked()), (0, asked + 60));
}

// === limits of all replicas together ===

/// Twenty calls a second, of which each of four replicas has five while there is no store.
const FOUR: NonZeroU32 = NonZeroU32::new(4).unwrap();
const PER_SECOND: usize = 20;

fn calls_per_second() -> ProviderLimits {
    let per_second = NonZeroU32::new(PER_SECOND as u32).unwrap();
    ProviderLimits { in_flight: 10_000, in_flight_floor: 10_000, per_second, ..ProviderLimits::default() }
}

/// One of so many, with the limits of all of them together, as the service composes it.
fn limited(
    way: &Way,
    prober: &Arc<Scripted>,
    replicas: NonZeroU32,
    (limits, new_keys): (ProviderLimits, NewKeyLimits),
) -> Replica {
    let limiter = Arc::new(ProviderLimiter::new(prober.clone(), limits.of_one(replicas)).sharing(limits.per_second));
    let settings = CacheSettings { new_keys: new_keys.of_one(replicas), ..CacheSettings::default() };
    let cache = Cache::new(limiter.clone(), settings).with_tier(Some(way.tier()));
    Replica::over(cache.with_fleet_limits(limiter, new_keys.per_platform))
}

fn four(store: &Store, prober: &Arc<Scripted>, new_keys: NewKeyLimits) -> Vec<Replica> {
    (0..4).map(|_| limited(&store.way(), prober, FOUR, (calls_per_second(), new_keys))).collect()
}

/// Asks about so many keys at once, one for each organization. Returns how many were refused for the provider's calls per second.
async fn refused(fleet: &[Replica], what: &str, keys: usize) -> usize {
    let asked = (0..keys).map(|index| async move {
        let name = format!("made-up-{what}-{index}");
        let decision = fleet[index % fleet.len()].decide_within(PATIENCE, &name, &name, None).await;
        let Some(deny) = decision.denial() else { return 0 };
        assert_eq!(deny.refusal.code(), DenyCode::ByokProbeNotAttempted, "{}", deny.refusal.message());
        assert!(deny.refusal.operator_hint().contains("provider_limits.per_second"), "{}", deny.refusal.operator_hint());
        let wait = deny.refusal.retry_after().unwrap().as_secs();
        assert!((1..=60).contains(&wait), "{wait} s");
        1
    });
    join_all(asked).await.iter().sum()
}

/// All replicas call a provider no more often than one may, and one of them may call it as often as all. Without the store each has its share.
#[tokio::test(flavor = "multi_thread")]
async fn calls_per_second_are_counted_over_all_replicas() {
    const KEYS: usize = 200;
    for (what, replicas) in [("all of them", 4), ("one of them", 1)] {
        let (store, prober) = (Store::start().await, Scripted::new(Verdict::Valid));
        let fleet = four(&store, &prober, NewKeyLimits::default());
        let began = Instant::now();
        let refused = refused(&fleet[..replicas], "a", KEYS).await;
        let most = PER_SECOND as f64 * (1.0 + began.elapsed().as_secs_f64());
        println!("{what}: {} calls in {:?}, {refused} refused", prober.asked(), began.elapsed());
        assert!(prober.asked() as f64 <= most, "{what}: {} calls, {most}", prober.asked());
        assert_eq!((prober.asked() + refused, refused > 0), (KEYS, true), "{what}");
        // A second's worth, and what may start within the longest wait. The share of one would be a quarter of it.
        assert!(prober.asked() > PER_SECOND * 3, "{what}: {}", prober.asked());
    }
    let (store, prober) = (Store::start().await, Scripted::new(Verdict::Valid));
    let fleet = four(&store, &prober, NewKeyLimits::default());
    store.signal("-KILL");
    let began = Instant::now();
    // Five at once, and five in each of four seconds.
    assert!(refused(&fleet[..1], "b", 60).await >= 60 - 25);
    let most = (PER_SECOND / 4) as f64 * (1.0 + began.elapsed().as_secs_f64());
    assert!(prober.asked() as f64 <= most, "{} calls, {most}", prober.asked());
}

/// A count that is none of ours delays nobody, and everything that is counted expires.
#[tokio::test]
async fn counts_that_are_not_ours_are_as_none_and_all_of_them_expire() {
    let (store, prober) = (Store::start().await, Scripted::new(Verdict::Valid));
    let fleet = four(&store, &prober, NewKeyLimits::default());
    assert!(refused(&fleet, "a", 150).await > 0);
    let names = async |end: &str| {
        let names: Vec<String> = store.keys().await.into_iter().filter(|key| key.ends_with(end)).collect();
        for name in &names {
            let left: i64 = store.does(&[b"PTTL", name.as_bytes()]).await;
            // The longest that a retry time is kept.
            assert!(left > 0 && left <= 360_000, "{name}: {left} ms");
        }
        names
    };
    let (starts, turns) = (names(":starts").await, names(":turn").await);
    assert!(starts.len() == 1 && !turns.is_empty());
    let starts = starts[0].as_bytes();
    let future = b"9000000000000000 9000000000000000".as_slice();
    for (index, words) in [
        [b"SET".as_slice(), starts, future],
        [b"SET", starts, b"garbage"],
        [b"SET", starts, b"-1 1e300"],
        [b"LPUSH", starts, b"x"],
    ]
    .into_iter()
    .enumerate()
    {
        store.does::<()>(&[b"DEL", starts]).await;
        store.does::<redis::Value>(&words).await;
        assert_eq!(refused(&fleet, &format!("b{index}"), 4).await, 0, "{words:?}");
    }
    // The same for the retry times of those that were refused: there is room for all of them by now.
    for (index, turn) in turns.iter().enumerate() {
        store.does::<()>(&[b"SET", turn.as_bytes(), [b"garbage".as_slice(), b"9000000000000000"][index % 2]]).await;
    }
    store.does::<()>(&[b"DEL", starts]).await;
    assert_eq!((refused(&fleet, "a", 150).await, prober.asked()), (0, 150 + 4 * 4));
    assert!(fleet.iter().all(|replica| replica.page().get("byokgate_tier_faults_total") == Some(0.0)));
}

/// A platform that reaches many replicas has one limit for new keys; without the store each replica has its share.
#[tokio::test]
async fn new_keys_of_a_platform_are_counted_over_all_replicas() {
    const LIMIT: usize = 12;
    let new_keys = NewKeyLimits { per_platform: NonZeroU32::new(LIMIT as u32).unwrap(), ..NewKeyLimits::default() };
    let limits = ProviderLimits { per_second: NonZeroU32::new(10_000).unwrap(), ..calls_per_second() };
    for (what, replicas) in [("all of them", 4), ("one of them", 1)] {
        let (store, prober) = (Store::start().await, Scripted::new(Verdict::Valid));
        let fleet: Vec<Replica> = (0..4).map(|_| limited(&store.way(), &prober, FOUR, (limits, new_keys))).collect();
        let refusals = async |from: &str| {
            let mut refusals = 0;
            for index in 0..40 {
                let name = format!("made-up-{from}-{index}");
                let decision = fleet[index % replicas].decide(&name, &name, None).await;
                if let Some(deny) = decision.denial() {
                    let hint = deny.refusal.operator_hint();
                    assert!(hint.contains("`new_keys.per_platform` is used up"), "{hint}");
                    refusals += 1;
                }
            }
            refusals
        };
        let began = Instant::now();
        let refused = refusals("a").await;
        let most = LIMIT + began.elapsed().as_secs() as usize / 5;
        assert!((LIMIT..=most).contains(&prober.asked()), "{what}: {} of {most}", prober.asked());
        assert_eq!(refused, 40 - prober.asked(), "{what}");
        // Each has called as often as its share allows by now, or more.
        store.signal("-KILL");
        let (asked, began) = (prober.asked(), Instant::now());
        refusals("b").await;
        let most = 4 * (1 + began.elapsed().as_secs() as usize / 20);
        assert!(prober.asked() - asked <= most, "{what}: {} of {most}", prober.asked() - asked);
    }
}

/// The same with processes, which know how many they are by `server.replicas`.
#[tokio::test(flavor = "multi_thread")]
async fn a_process_has_the_limits_of_all_while_it_has_the_store() {
    let (store, row) = (Store::start().await, Row { body: r#"{"data": []}"#.into(), ..Row::default() });
    let vendor = Vendor::start(vec![row]).await;
    let (registry, catalogue) = case::documents(vendor.address.port());
    let secrets = tempfile::tempdir().unwrap();
    let tier = config(secrets.path(), store.port);
    let allowed = async |limits: &str| {
        let config = format!("{tier}deadlines: {{decide: 60s}}\nserver: {{replicas: 10}}\n{limits}\n");
        let files = Files::new(&registry, &catalogue, Some(&config));
        let replica = serve(&files).await;
        let client = replica.client().await;
        let calls = (0..30).map(|index| {
            let mut client = client.clone();
            let key = format!("made-up-{}-{index}", limits.len());
            async move { is_allow(client.decide(decide(&key)).await.unwrap().get_ref()) }
        });
        join_all(calls).await.into_iter().filter(|is_allow| *is_allow).count()
    };
    // Its share is one call at once and four more within the longest wait.
    assert_eq!(allowed("provider_limits: {per_second: 10, in_flight: 10000, in_flight_floor: 10000}").await, 30);
    // Its share is two.
    let allowed = allowed("new_keys: {per_platform: 20}\nprovider_limits: {in_flight: 10000, in_flight_floor: 10000}").await;
    // One comes back in three seconds.
    assert!((20..25).contains(&allowed), "{allowed}");
}

// === breakers ===

fn breaker(cool_down: Duration) -> CacheSettings {
    CacheSettings { breaker: BreakerSettings { cool_down, ..BreakerSettings::default() }, ..CacheSettings::default() }
}

/// So many credentials fail that this replica's breaker opens, and the others are told.
async fn opens(replica: &Replica, prober: &Arc<Scripted>, store: &Store, verdict: Verdict) {
    prober.verdict(verdict);
    for index in 0..BreakerSettings::default().failures {
        assert_eq!(replica.ask(&format!("made-up-failing-{index}")).await, (verdict, ServedFrom::Probe));
    }
    until("the others are told", async || store.breaker().await.is_some()).await;
}

/// What one replica has found out about a provider spares the others their own calls: they say the same, and not for longer.
#[tokio::test]
async fn an_open_breaker_of_one_replica_spares_the_others_calls() {
    const COOL_DOWN: Duration = Duration::from_secs(6);
    for verdict in [Verdict::Timeout, Verdict::Unreachable] {
        let (store, prober) = (Store::start().await, Scripted::new(verdict));
        let [one, other] = [(), ()].map(|()| Replica::with(&store.way(), &prober, breaker(COOL_DOWN)));
        opens(&one, &prober, &store, verdict).await;
        let left: u64 = store.does(&[b"PTTL", store.breaker().await.unwrap().as_bytes()]).await;
        assert!(left <= COOL_DOWN.as_millis() as u64, "{left} ms");
        let asked = prober.asked();
        for index in 0..5 {
            assert_eq!(other.ask(&format!("made-up-{index}")).await, (verdict, ServedFrom::Breaker));
        }
        // A caller's age holds for observations: an open breaker of this replica's own does not ask for it either.
        assert_eq!(other.ask_no_older("made-up-0", Some(Duration::ZERO)).await, (verdict, ServedFrom::Breaker));
        assert_eq!((prober.asked(), other.looks("breaker")), (asked, 6.0));
        let said = async |replica: &Replica| {
            let decision = replica.decide("", "made-up-0", None).await;
            let refusal = &decision.denial().unwrap().refusal;
            let wait = refusal.retry_after().unwrap();
            assert!(wait <= COOL_DOWN.mul_f64(1.1), "{wait:?}");
            (refusal.code(), refusal.message(), refusal.remedy())
        };
        assert_eq!(said(&one).await, said(&other).await);
        assert!(other.explained("made-up-1").await.contains("served from BREAKER, shared"));
        // What is known is known, and a provider that answers again is asked again.
        prober.verdict(Verdict::Valid);
        until("it ends", async || other.ask("made-up-2").await == ASKED).await;
        assert_eq!(store.breaker().await, None);
    }
}

/// The first answer that a replica's breaker closes for ends it for all, long before its time.
#[tokio::test]
async fn a_breaker_that_closes_closes_for_all() {
    let (store, prober) = (Store::start().await, slow(Verdict::Valid, 4_000));
    let [one, other] = [(), ()].map(|()| Arc::new(Replica::with(&store.way(), &prober, breaker(PATIENCE * 2))));
    let answered_late = {
        let one = Arc::clone(&one);
        tokio::spawn(async move { one.ask("made-up-late").await })
    };
    until("it is asked", async || prober.asked() == 1).await;
    prober.set(|script| script.takes = Duration::ZERO);
    opens(&one, &prober, &store, Verdict::Timeout).await;
    assert_eq!(other.ask("made-up").await, (Verdict::Timeout, ServedFrom::Breaker));
    prober.verdict(Verdict::Valid);
    assert_eq!(answered_late.await.unwrap(), ASKED);
    until("the other asks", async || other.ask("made-up").await == ASKED).await;
    assert_eq!((store.breaker().await, other.looks("breaker") >= 1.0), (None, true));
}

/// A replica's bad network is no other's: one that had the provider's answer goes on asking, whatever another's breaker says.
#[tokio::test]
async fn an_open_breaker_holds_back_no_replica_that_is_answered() {
    let (store, failing, answered) = (Store::start().await, Scripted::new(Verdict::Valid), Scripted::new(Verdict::Valid));
    let [one, other] = [&failing, &answered].map(|prober| Replica::with(&store.way(), prober, breaker(PATIENCE)));
    assert_eq!(other.ask("made-up").await, ASKED);
    opens(&one, &failing, &store, Verdict::Timeout).await;
    for index in 0..5 {
        assert_eq!(other.ask(&format!("made-up-{index}")).await, ASKED);
    }
    assert_eq!(other.looks("breaker"), 0.0);
    let idle = Replica::with(&store.way(), &answered, breaker(PATIENCE));
    assert_eq!(idle.ask("made-up-at-last").await, (Verdict::Timeout, ServedFrom::Breaker));
}

/// Two organizations see a provider fail: that holds for them, and is nobody else's. The third makes it everybody's.
#[tokio::test]
async fn what_few_see_is_not_shared() {
    let (store, prober) = (Store::start().await, Scripted::new(Verdict::Timeout));
    let [one, other] = [(), ()].map(|()| Replica::with(&store.way(), &prober, breaker(PATIENCE)));
    let seen = async |replica: &Replica, organization: &str, index: u32| {
        let decision = replica.decide(organization, &format!("made-up-{organization}-{index}"), None).await;
        decision.liveness.unwrap().seen.unwrap().served_from
    };
    for index in 0..5 {
        seen(&one, ["org-1", "org-2"][index as usize % 2], index).await;
    }
    assert_eq!(seen(&one, "org-1", 9).await, ServedFrom::Breaker);
    assert_eq!(seen(&other, "org-1", 9).await, ServedFrom::Probe);
    until("all is stored", async || store.observations().await.len() == 6).await;
    assert_eq!(store.breaker().await, None);
    assert_eq!(seen(&one, "org-3", 0).await, ServedFrom::Probe);
    until("the others are told", async || store.breaker().await.is_some()).await;
    assert_eq!(seen(&other, "org-4", 0).await, ServedFrom::Breaker);
}

/// A breaker's entry that is none of ours, or whose time is over, holds nobody back. It is read under both keys while one follows the other.
#[tokio::test]
async fn a_breaker_that_is_not_ours_or_over_is_as_none() {
    let (store, prober) = (Store::start().await, Scripted::new(Verdict::Timeout));
    let settings = breaker(Duration::from_secs(6));
    let one = Replica::with(&store.way(), &prober, settings);
    opens(&one, &prober, &store, Verdict::Timeout).await;
    let name = store.breaker().await.unwrap();
    let value: Vec<u8> = store.does(&[b"GET", name.as_bytes()]).await;
    let keys = format!("made-up-next-key-fedcba9876543210fedcba98\n{KEY}");
    let followed = Replica::with(&Way { keys, ..store.way() }, &prober, settings);
    assert_eq!(followed.ask("made-up").await, (Verdict::Timeout, ServedFrom::Breaker));
    let of_a_credential: Vec<u8> = store.does(&[b"GET", store.observations().await.remove(0).as_bytes()]).await;
    let mut bent = value.clone();
    bent[500] ^= 1;
    prober.verdict(Verdict::Valid);
    let asks = async |what: &str, damaged: f64| {
        let replica = Replica::with(&store.way(), &prober, settings);
        assert_eq!(replica.ask(&format!("made-up-{}", what.replace(' ', "-"))).await, ASKED, "{what}");
        assert_eq!(replica.page().get("byokgate_tier_damaged_total"), Some(damaged), "{what}");
    };
    for (what, set) in [("garbage", b"garbage".to_vec()), ("one bit", bent), ("an observation", of_a_credential)] {
        store.does::<()>(&[b"SET", name.as_bytes(), &set]).await;
        asks(what, 1.0).await;
    }
    store.does::<()>(&[b"DEL", name.as_bytes()]).await;
    store.does::<()>(&[b"LPUSH", name.as_bytes(), b"x"]).await;
    asks("another type", 1.0).await;
    // Put back, it counts until its time is over, and then no more.
    store.does::<()>(&[b"DEL", name.as_bytes()]).await;
    store.does::<()>(&[b"SET", name.as_bytes(), &value]).await;
    let mut index = 0;
    until("it is over", async || {
        index += 1;
        one.decide("", &format!("made-up-waiting-{index}"), None).await.liveness.unwrap().verdict == Verdict::Valid
    })
    .await;
    store.does::<()>(&[b"SET", name.as_bytes(), &value]).await;
    asks("over", 0.0).await;
}

/// With any fault of the store: only the provider's answers, with at most one call per replica, and the replica's cache still works.
#[tokio::test(flavor = "multi_thread")]
async fn no_fault_of_the_store_allows_denies_or_costs_more_than_none() {
    let faults: [(&str, AsyncFault); 7] = [
        ("killed", |store| Box::pin(async { store.signal("-KILL") })),
        ("frozen", |store| Box::pin(async { store.signal("-STOP") })),
        ("read-only", |store| Box::pin(async { store.does(&[b"REPLICAOF", b"127.0.0.1", b"1"]).await })),
        ("full", |store| Box::pin(async { store.does(&[b"CONFIG", b"SET", b"maxmemory", b"1"]).await })),
        ("no rights", |store| Box::pin(async { store.does(&[b"ACL", b"SETUSER", USER.as_bytes(), b"-eval"]).await })),
        ("the user is gone", |store| Box::pin(async { store.does(&[b"ACL", b"DELUSER", USER.as_bytes()]).await })),
        ("loading its script for ever", |store| {
            Box::pin(async {
                // Nobody's EVAL is answered meanwhile.
                let mut admin = store.admin().await.unwrap();
                tokio::spawn(async move {
                    let mut busy = redis::cmd("EVAL");
                    busy.arg("while true do end").arg(0);
                    drop(busy.query_async::<()>(&mut admin).await);
                });
                // Until then a lookup is answered, and is no fault.
                let busy = async { while tokio::time::timeout(Duration::from_millis(50), store.admin()).await.is_ok() {} };
                tokio::time::timeout(PATIENCE, busy).await.unwrap();
            })
        }),
    ];
    for (what, fault) in faults {
        let (store, prober) = (Store::start().await, Scripted::new(Verdict::Valid));
        let way = Way { timeout: Duration::from_millis(350), ..store.way() };
        let (one, other) = (Replica::new(&way, &prober), Replica::new(&way, &prober));
        assert_eq!(one.ask("made-up-known").await, ASKED);
        until("it is shared", async || other.ask("made-up-known").await == SHARED).await;
        fault(&store).await;
        for replica in [&one, &other] {
            assert_eq!(replica.ask("made-up-known").await, SHARED, "{what}: memory");
        }
        prober.verdict(Verdict::Invalid);
        let before = prober.asked();
        for index in 0..10 {
            let value = format!("made-up-dead-{index}");
            for replica in [&one, &other] {
                assert_eq!(replica.ask(&value).await.0, Verdict::Invalid, "{what}");
            }
        }
        assert!(prober.asked() - before <= 20, "{what}: {}", prober.asked());
        assert!(one.looks("fault") >= 5.0, "{what}: {}", one.page().text);
        one.page().is("byokgate_tier_in_use", 0.0);
    }
}

type AsyncFault = for<'s> fn(&'s Store) -> std::pin::Pin<Box<dyn Future<Output = ()> + Send + 's>>;

#[tokio::test]
async fn a_wrong_password_is_as_no_store() {
    let (store, prober) = (Store::start().await, Scripted::new(Verdict::Valid));
    let wrong = Way { login: Some((USER.into(), "made-up-wrong".into())), ..store.way() };
    let replica = Replica::new(&wrong, &prober);
    for index in 0..6 {
        assert_eq!(replica.ask(&format!("made-up-{index}")).await, ASKED);
    }
    assert_eq!((replica.looks("fault"), replica.looks("left_alone"), prober.asked()), (5.0, 1.0, 6));
    assert!(store.keys().await.is_empty());
}

/// A right that is missing while lookups work is logged once and shown, until it is given.
#[tokio::test]
async fn a_missing_right_is_said_once() {
    let news = ["resetchannels", "&bg1:*"];
    for ([without, with], what) in [
        (news, "listening"),
        (["-subscribe", "+subscribe"], "listening"),
        (news, "storing"),
        (["-publish", "+publish"], "storing"),
    ] {
        let (log, store, prober) = (Log::start(), Store::start().await, Scripted::new(Verdict::Valid));
        store.does::<()>(&[b"ACL", b"SETUSER", USER.as_bytes(), without.as_bytes()]).await;
        let replica = Replica::new(&store.way(), &prober);
        let (gauge, mut index) = (format!("byokgate_tier_{what}"), 0);
        for (right, value, event) in [(without, 0.0, format!("tier_not_{what}")), (with, 1.0, format!("tier_{what}"))] {
            store.does::<()>(&[b"ACL", b"SETUSER", USER.as_bytes(), right.as_bytes()]).await;
            until(&event, async || {
                index += 1;
                assert_eq!(replica.ask(&format!("made-up-{index}")).await, ASKED);
                index > 10 && replica.page().get(&gauge) == Some(value)
            })
            .await;
            replica.page().is("byokgate_tier_in_use", 1.0);
            let events = log.events(&event);
            assert_eq!(events.len(), 1, "{without}: {}", log.text());
            if value == 0.0 {
                let event = &events[0];
                assert!(event["code"] == "NOPERM" && !event["error"].as_str().unwrap().is_empty(), "{without}: {event}");
                assert_eq!(event["server"], format!("127.0.0.1:{}", store.port), "{event}");
            }
        }
    }
}

/// The first fault is logged with its cause and its server, before anything has worked; then the first success.
#[tokio::test]
async fn the_first_fault_says_what_it_is() {
    let folder = tempfile::tempdir().unwrap();
    let (trusted, _) = certificate(folder.path());
    let tls = free_port();
    let store = Store::start_at(free_port(), &tls_options(folder.path(), tls, None)).await;
    let prober = Scripted::new(Verdict::Valid);
    let closed = free_port();
    let wrong = Some((USER.to_owned(), "made-up-canary".to_owned()));
    let over_tls =
        |port: u16, ca: &str| Way { port, ca: Some(ca.to_owned()), timeout: Duration::from_millis(350), ..store.way() };
    let other = rcgen::generate_simple_self_signed(vec!["localhost".to_owned()]).unwrap().cert.pem();
    for (way, kind, error, server) in [
        (Way { port: closed, ..store.way() }, "I/O error", "refused", format!("127.0.0.1:{closed}")),
        (Way { login: wrong, ..store.way() }, "authentication failed", "", format!("127.0.0.1:{}", store.port)),
        (Way { login: None, ..store.way() }, "extension error", "NOAUTH", format!("127.0.0.1:{}", store.port)),
        // It waits for the end of a line.
        (over_tls(store.port, &trusted), "I/O error", "timed out", format!("localhost:{}", store.port)),
        (over_tls(tls, &other), "I/O error", "invalid peer certificate", format!("localhost:{tls}")),
    ] {
        let log = Log::start();
        let replica = Replica::new(&way, &prober);
        for index in 0..6 {
            replica.ask(&format!("made-up-{index}")).await;
        }
        for event in ["tier_fault", "tier_left_alone"] {
            let events = log.events(event);
            assert_eq!(events.len(), 1, "{event}: {}", log.text());
            assert!(events[0]["kind"] == kind && events[0]["server"] == server, "{}", events[0]);
            assert!(events[0]["error"].as_str().unwrap().contains(error), "{}", events[0]);
        }
        assert!(!log.text().contains("canary") && !log.text().contains(PASSWORD), "{}", log.text());
    }
    let log = Log::start();
    let replica = Replica::new(&store.way(), &prober);
    for index in 0..3 {
        replica.ask(&format!("made-up-{index}")).await;
    }
    assert_eq!((log.events("tier_in_use").len(), log.events("tier_fault").len()), (1, 0), "{}", log.text());
}

/// Another instance at the same place: it is in use again, without a restart of anybody.
#[tokio::test]
async fn a_store_that_comes_back_is_in_use_again() {
    let (store, prober) = (Store::start().await, Scripted::new(Verdict::Valid));
    let (port, replica) = (store.port, Replica::new(&store.way(), &prober));
    assert_eq!(replica.ask("made-up-0").await, ASKED);
    drop(store);
    for index in 1..7 {
        assert_eq!(replica.ask(&format!("made-up-{index}")).await, ASKED);
    }
    replica.page().is("byokgate_tier_in_use", 0.0);
    let store = Store::start_at(port, &[]).await;
    let mut index = 100;
    until("it is tried again", async || {
        index += 1;
        replica.ask(&format!("made-up-{index}")).await;
        replica.page().get("byokgate_tier_in_use") == Some(1.0)
    })
    .await;
    until("and holds what is found", async || !store.observations().await.is_empty()).await;
}

/// Garbage, other types and other credentials' values in place of results and leases: each is ignored and overwritten.
#[tokio::test]
async fn what_is_not_ours_is_as_none() {
    let (store, prober) = (Store::start().await, Scripted::new(Verdict::Valid));
    let first = Replica::new(&store.way(), &prober);
    first.ask("made-up").await;
    first.ask("made-up-other").await;
    until("they are stored", async || store.observations().await.len() == 2).await;
    let names = store.observations().await;
    let mut values: Vec<Vec<u8>> = Vec::new();
    for name in &names {
        values.push(store.does(&[b"GET", name.as_bytes()]).await);
    }
    prober.verdict(Verdict::Invalid);
    let mut bent = values[0].clone();
    bent[500] ^= 1;
    let moved = [(&names[0], &values[1]), (&names[1], &values[0])];
    for (what, set) in [
        ("garbage", [(&names[0], &b"garbage".to_vec()), (&names[1], &vec![b'x'; values[0].len()])]),
        ("one bit", [(&names[0], &bent), (&names[1], &bent)]),
        ("each other's", moved),
    ] {
        for (name, value) in set {
            store.does::<()>(&[b"SET", name.as_bytes(), value]).await;
        }
        fresh_replica_sees_it_refused(&store, &prober, what).await;
    }
    for name in &names {
        store.does::<()>(&[b"DEL", name.as_bytes()]).await;
        store.does::<()>(&[b"LPUSH", name.as_bytes(), b"x"]).await;
        store.does::<()>(&[b"LPUSH", format!("{name}:lease").as_bytes(), b"x"]).await;
    }
    fresh_replica_sees_it_refused(&store, &prober, "another type").await;
    // A lease that does not end is nobody's.
    for name in &names {
        store.does::<()>(&[b"DEL", name.as_bytes()]).await;
        store.does::<()>(&[b"SET", format!("{name}:lease").as_bytes(), b"x"]).await;
    }
    fresh_replica_sees_it_refused(&store, &prober, "a lease for ever").await;
}

async fn fresh_replica_sees_it_refused(store: &Store, prober: &Arc<Scripted>, what: &str) {
    let (replica, asked) = (Replica::new(&store.way(), prober), prober.asked());
    for value in ["made-up", "made-up-other"] {
        assert_eq!(replica.ask(value).await, (Verdict::Invalid, ServedFrom::Probe), "{what}");
    }
    assert_eq!(prober.asked() - asked, 2, "{what}");
    assert_eq!(replica.looks("lease"), 2.0, "{what}: {}", replica.page().text);
    until("it is written over", async || {
        let other = Replica::new(&store.way(), prober);
        let before = prober.asked();
        other.ask("made-up").await == (Verdict::Invalid, ServedFrom::Cache) && prober.asked() == before
    })
    .await;
}

/// Somebody who can write puts an old value back: it keeps its age.
#[tokio::test]
async fn an_old_valid_that_is_put_back_is_old() {
    let (store, prober) = (Store::start().await, Scripted::new(Verdict::Valid));
    let replica = || Replica::with_ages(&store.way(), &prober, short());
    let first = replica();
    first.ask("made-up").await;
    until("it is stored", async || store.observations().await.len() == 1).await;
    let name = store.observations().await.remove(0);
    let old: Vec<u8> = store.does(&[b"GET", name.as_bytes()]).await;
    prober.verdict(Verdict::Invalid);
    until("it is refused", async || first.ask("made-up").await.0 == Verdict::Invalid).await;
    store.does::<()>(&[b"SET", name.as_bytes(), &old]).await;
    let second = replica();
    assert_eq!(second.ask("made-up").await, (Verdict::Invalid, ServedFrom::Probe));
    assert_eq!(first.ask_no_older("made-up", Some(Duration::ZERO)).await.0, Verdict::Invalid);
}

/// A replica that lost its lease stores nothing.
#[tokio::test]
async fn a_late_holder_stores_nothing() {
    let (store, prober) = (Store::start().await, slow(Verdict::Valid, 1_500));
    let replica = Arc::new(Replica::new(&store.way(), &prober));
    let asking = {
        let replica = Arc::clone(&replica);
        tokio::spawn(async move { replica.ask("made-up").await })
    };
    until("it has the lease", async || store.keys().await.len() == 1).await;
    let lease = store.keys().await.remove(0);
    // Another has it by now, as after a pause of this one.
    store.does::<()>(&[b"SET", lease.as_bytes(), b"another", b"PX", b"900"]).await;
    assert_eq!(asking.await.unwrap(), ASKED);
    until("it finds out", async || replica.page().get("byokgate_tier_leases_lost_total") == Some(1.0)).await;
    assert!(store.observations().await.is_empty());
}

/// A caller who cannot wait for another replica's answer is told when to come again, as one who cannot wait for this replica's own.
#[tokio::test]
async fn who_cannot_wait_for_another_replica_comes_again_and_it_asks_once() {
    let (store, prober) = (Store::start().await, slow(Verdict::Valid, 2_500));
    let [one, other] = [(), ()].map(|()| Arc::new(Replica::new(&store.way(), &prober)));
    let asking = {
        let one = Arc::clone(&one);
        tokio::spawn(async move { one.ask("made-up").await })
    };
    until("it is asked about", async || prober.asked() == 1).await;
    let decision = other.decide_within(Duration::from_millis(800), "", "made-up", None).await;
    let refusal = &decision.denial().unwrap().refusal;
    assert_eq!(refusal.code(), DenyCode::ByokProbeNotAttempted);
    // Within the age of a question that nobody answered, and its spread.
    let wait = refusal.retry_after().unwrap();
    assert!(wait >= Duration::from_secs(1) && wait <= Ages::default().unanswered.mul_f64(1.1), "{wait:?}");
    until("it has the answer", async || other.ask("made-up").await == SHARED).await;
    assert_eq!((asking.await.unwrap(), prober.asked()), (ASKED, 1));
    assert_eq!((other.looks("hit"), other.looks("gave_up")), (1.0, 0.0));
}

/// A holder that dies is followed by another, which stores.
#[tokio::test]
async fn a_holder_that_dies_holds_nobody_up() {
    let (store, prober) = (Store::start().await, slow(Verdict::Valid, 60_000));
    let dying = Replica::new(&store.way(), &prober);
    // Its lease is as one that is not renewed any more.
    store.does::<()>(&[b"SET", b"bg1:none:lease", b"x", b"PX", b"1"]).await;
    {
        let runtime = std::thread::spawn({
            let way = store.way();
            let prober = Arc::clone(&prober);
            move || {
                let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
                runtime.block_on(async {
                    let replica = Replica::new(&way, &prober);
                    drop(tokio::time::timeout(Duration::from_millis(500), replica.ask("made-up")).await);
                });
                // All that it did ends here, the renewals of its lease too.
                drop(runtime);
            }
        });
        tokio::task::spawn_blocking(move || runtime.join().unwrap()).await.unwrap();
    }
    assert_eq!(prober.asked(), 1);
    prober.set(|script| script.takes = Duration::ZERO);
    assert_eq!(dying.ask("made-up").await, ASKED);
    assert_eq!((dying.looks("lease"), prober.asked()), (1.0, 2));
}

/// The store's answers are 300 ms late, with the usual timeout of a request.
#[tokio::test(flavor = "multi_thread")]
async fn a_slow_store_is_waited_for_and_no_longer() {
    let (store, prober) = (Store::start().await, Scripted::new(Verdict::Valid));
    let port = slowed(store.port, [0, 300]).await;
    let way = Way { port, timeout: Duration::from_millis(350), ..store.way() };
    let fleet = [Replica::new(&way, &prober), Replica::new(&way, &prober)];
    for index in 0..10 {
        for replica in &fleet {
            assert_eq!(replica.ask(&format!("made-up-{index}")).await.0, Verdict::Valid);
        }
    }
    assert!(prober.asked() <= 20, "{}", prober.asked());
}

/// The way there, with so many milliseconds before each part of questions and of answers.
async fn slowed(to: u16, [questions, answers]: [u64; 2]) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        while let Ok((client, _)) = listener.accept().await {
            tokio::spawn(async move {
                let server = TcpStream::connect(SocketAddr::from((Ipv4Addr::LOCALHOST, to))).await.unwrap();
                let (from_client, to_client) = client.into_split();
                let (from_server, to_server) = server.into_split();
                tokio::spawn(pass_on(from_client, to_server, questions));
                pass_on(from_server, to_client, answers).await;
            });
        }
    });
    port
}

async fn pass_on(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, millis: u64) {
    let mut bytes = vec![0; 64 * 1024];
    while let Ok(read @ 1..) = from.read(&mut bytes).await {
        sleep(Duration::from_millis(millis)).await;
        if to.write_all(&bytes[..read]).await.is_err() {
            break;
        }
    }
}

/// Two keys: values of the previous one are read, the first one writes, and a single key cannot read another's values.
#[tokio::test]
async fn a_key_follows_another() {
    let (store, prober) = (Store::start().await, Scripted::new(Verdict::Valid));
    let with = |keys: String| Replica::new(&Way { keys, ..store.way() }, &prober);
    let next = "made-up-next-key-fedcba9876543210fedcba98";
    with(KEY.to_owned()).ask("made-up").await;
    until("it is stored", async || store.observations().await.len() == 1).await;
    assert_eq!(with(format!("{next}\n{KEY}")).ask("made-up").await, SHARED);
    assert_eq!(with(format!("{KEY}\n{next}")).ask("made-up").await, SHARED);
    assert_eq!(prober.asked(), 1);
    assert_eq!(with(next.to_owned()).ask("made-up").await, ASKED);
    until("both are stored", async || store.observations().await.len() == 2).await;
}

/// A self-signed certificate for localhost and its key, also as files in this folder.
fn certificate(folder: &Path) -> (String, String) {
    let signed = rcgen::generate_simple_self_signed(vec!["localhost".to_owned()]).unwrap();
    let pair = (signed.cert.pem(), signed.signing_key.serialize_pem());
    fs::write(folder.join("cert.pem"), &pair.0).unwrap();
    fs::write(folder.join("key.pem"), &pair.1).unwrap();
    pair
}

/// The options of a server with the certificate of this folder, which asks clients for theirs or not: it trusts the authority of `client_ca`.
fn tls_options(folder: &Path, port: u16, client_ca: Option<&Path>) -> Vec<String> {
    let path = |folder: &Path, name: &str| folder.join(name).to_str().unwrap().to_owned();
    let mut options = vec!["--tls-port".to_owned(), port.to_string()];
    options.extend(["--tls-cert-file".to_owned(), path(folder, "cert.pem")]);
    options.extend(["--tls-key-file".to_owned(), path(folder, "key.pem"), "--tls-auth-clients".to_owned()]);
    match client_ca {
        Some(client_ca) => options.extend(["yes".to_owned(), "--tls-ca-cert-file".to_owned(), path(client_ca, "cert.pem")]),
        None => options.push("no".to_owned()),
    }
    options
}

/// An encrypted connection, to a store whose certificate a trusted authority signed, and to no other.
#[tokio::test]
async fn tls_is_checked() {
    let (folder, elsewhere) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let ((trusted, _), (other, _)) = (certificate(folder.path()), certificate(elsewhere.path()));
    let tls = free_port();
    let store = Store::start_at(free_port(), &tls_options(folder.path(), tls, None)).await;
    let prober = Scripted::new(Verdict::Valid);
    let over = |ca: &str| Replica::new(&Way { port: tls, ca: Some(ca.to_owned()), ..store.way() }, &prober);
    assert_eq!(over(&trusted).ask("made-up").await, ASKED);
    until("it is stored", async || store.observations().await.len() == 1).await;
    assert_eq!(over(&trusted).ask("made-up").await, SHARED);
    let stranger = over(&other);
    assert_eq!(stranger.ask("made-up").await, ASKED);
    assert_eq!(stranger.looks("fault"), 1.0);
}

/// A store that asks for a certificate takes the one of its authority; without it the store is left alone, and decisions go on.
#[tokio::test]
async fn tls_is_checked_by_the_store_too() {
    let [folder, clients, elsewhere] = [(), (), ()].map(|()| tempfile::tempdir().unwrap());
    let (trusted, _) = certificate(folder.path());
    let (known, unknown) = (certificate(clients.path()), certificate(elsewhere.path()));
    let tls = free_port();
    let store = Store::start_at(free_port(), &tls_options(folder.path(), tls, Some(clients.path()))).await;
    let prober = Scripted::new(Verdict::Valid);
    let with = |identity| {
        let way = Way { port: tls, ca: Some(trusted.clone()), identity, ..store.way() };
        Replica::new(&way, &prober)
    };
    assert_eq!(with(Some(known.clone())).ask("made-up").await, ASKED);
    until("it is stored", async || store.observations().await.len() == 1).await;
    assert_eq!(with(Some(known)).ask("made-up").await, SHARED);
    for stranger in [with(None), with(Some(unknown))] {
        for index in 0..6 {
            assert_eq!(stranger.ask(&format!("made-up-{index}")).await, ASKED);
        }
        assert_eq!((stranger.looks("fault"), stranger.looks("left_alone")), (5.0, 1.0));
        stranger.page().is("byokgate_tier_in_use", 0.0);
    }
}

/// A reader of the store, or of its MONITOR, learns no credential, no hash of one, and no verdict.
#[tokio::test]
async fn the_store_shows_nothing() {
    let store = Store::start().await;
    let client = redis::Client::open(format!("redis://default:{ADMIN}@127.0.0.1:{}", store.port)).unwrap();
    let monitor = client.get_async_monitor().await.unwrap();
    let seen = Arc::new(Mutex::new(String::new()));
    let collecting = {
        let (seen, mut stream) = (Arc::clone(&seen), monitor.into_on_message::<String>());
        tokio::spawn(async move {
            while let Some(line) = stream.next().await {
                seen.lock().unwrap().push_str(&line);
            }
        })
    };
    let values = ["made-up-canary-good-5b1e", "made-up-canary-dead-9a20", "made-up-canary-mute-c3f7"];
    for (value, verdict) in values.iter().zip([Verdict::Valid, Verdict::Invalid, Verdict::Timeout]) {
        let prober = Scripted::new(verdict);
        let (one, other) = (Replica::new(&store.way(), &prober), Replica::new(&store.way(), &prober));
        assert_eq!(one.ask(value).await, (verdict, ServedFrom::Probe));
        until("it is shared", async || other.ask(value).await == (verdict, ServedFrom::Cache)).await;
    }
    let prober = Scripted::new(Verdict::Valid);
    Replica::new(&store.way(), &prober).decide("made-up-canary-org", "made-up-canary-of-org", None).await;
    assert!(store.keys().await.iter().any(|key| key.ends_with(":new-keys")));
    let limits = (ProviderLimits { per_second: NonZeroU32::MIN, ..ProviderLimits::default() }, NewKeyLimits::default());
    let replica = limited(&store.way(), &prober, NonZeroU32::MIN, limits);
    until("a retry time is stored", async || {
        let values: Vec<String> = (0..9).map(|index| format!("made-up-canary-{index}")).collect();
        join_all(values.iter().map(|value| replica.decide("made-up-canary-org", value, None))).await;
        let names = store.keys().await;
        [":starts", ":turn"].iter().all(|end| names.iter().any(|name| name.ends_with(end)))
    })
    .await;
    opens(&Replica::with(&store.way(), &prober, breaker(PATIENCE)), &prober, &store, Verdict::Timeout).await;
    until("the monitor has seen all", async || seen.lock().unwrap().matches("PUBLISH").count() >= values.len() + prober.asked())
        .await;
    store.does::<()>(&[b"SAVE"]).await;
    collecting.abort();
    let dump = fs::read(store.folder.path().join("dump.rdb")).unwrap();
    let seen = seen.lock().unwrap().clone();
    // This is the intended state.
    assert!(dump.windows(4).any(|part| part == b"bg1:") && seen.contains("bg1:news"), "{seen}");
    let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    let mut words: Vec<Vec<u8>> = ["canary", "VALID", "TIMEOUT", "verdict", "models", "acme", "fresh_ms", KEY, PASSWORD]
        .into_iter()
        .map(|word| word.as_bytes().to_vec())
        .collect();
    for value in values {
        for hash in [blake3::hash(value.as_bytes()).as_bytes().to_vec(), sha256(value)] {
            words.extend([hex(&hash).into_bytes(), hash]);
        }
    }
    for word in words {
        let shown = String::from_utf8_lossy(&word).into_owned();
        assert!(!dump.windows(word.len()).any(|part| part == word), "the dump holds {shown}");
        assert!(!seen.as_bytes().windows(word.len()).any(|part| part == word), "the monitor shows {shown}");
    }
    // Neither lengths nor lifetimes tell a verdict: a TIMEOUT counts for 3 seconds, and lies there as long as a VALID.
    let mut lengths = Vec::new();
    for name in store.observations().await {
        let left: u64 = store.does(&[b"TTL", name.as_bytes()]).await;
        assert!((800..=900).contains(&left), "{left} s");
        lengths.push(store.does::<u64>(&[b"STRLEN", name.as_bytes()]).await);
    }
    assert_eq!(lengths, vec![lengths[0]; values.len() + prober.asked()]);
}

fn sha256(value: &str) -> Vec<u8> {
    ring::digest::digest(&ring::digest::SHA256, value.as_bytes()).as_ref().to_vec()
}

/// A process's settings of the tier at this port, with the files that they name in this folder.
fn config(folder: &std::path::Path, port: u16) -> String {
    let [key, password] = [("key", KEY), ("password", PASSWORD)].map(|(name, text)| {
        let path = folder.join(name);
        fs::write(&path, text).unwrap();
        path.display().to_string()
    });
    format!(
        "tier: {{address: 'redis://127.0.0.1:{port}', user: {USER}, password_file: '{password}', key_file: '{key}', timeout: 2s}}\n"
    )
}

/// A process with these files. It sends no made-up keys, which would count as calls.
async fn serve(files: &Files) -> Serving {
    let flags = files.flags();
    let flags: Vec<&str> = flags.iter().map(String::as_str).chain(["--no-calibration"]).collect();
    Serving::start(&flags).await
}

/// A process that stops waits for results on their way to the store: another replica then has them.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_being_stored_at_the_end_is_stored() {
    let (store, row) = (Store::start().await, Row { body: r#"{"data": []}"#.into(), ..Row::default() });
    let vendor = Vendor::start(vec![row]).await;
    let (registry, catalogue) = case::documents(vendor.address.port());
    let secrets = tempfile::tempdir().unwrap();
    // Far from it: the process is told to stop long before the store has the answer.
    let config = config(secrets.path(), slowed(store.port, [400, 0]).await) + "shutdown: {notice: 1ms, drain: 10s}\n";
    let files = Files::new(&registry, &catalogue, Some(&config));
    let replica = serve(&files).await;
    let mut client = replica.client().await;
    assert!(is_allow(client.decide(decide("made-up-last")).await.unwrap().get_ref()));
    assert_eq!(store.observations().await.len(), 0, "nobody waits for the store");
    drop(client);
    replica.terminate().await;
    let ended = replica.ended().await;
    assert!(ended.status.success() && !ended.stdout.contains("tier_stores_dropped"), "{ended:?}");
    assert_eq!(store.observations().await.len(), 1, "{ended:?}");
}

/// Processes, as deployed: a fleet of them, called for each credential round robin, one of them killed midway.
#[tokio::test(flavor = "multi_thread")]
async fn processes_share_and_one_of_them_dies() {
    const FLEET: usize = 20;
    const CREDENTIALS: usize = 500;
    let (store, row) = (Store::start().await, Row { body: r#"{"data": []}"#.into(), delay_ms: 50, ..Row::default() });
    let vendor = Vendor::start(vec![row]).await;
    let (registry, catalogue) = case::documents(vendor.address.port());
    let secrets = tempfile::tempdir().unwrap();
    let config = config(secrets.path(), store.port)
        + "deadlines: {decide: 60s}\nserver: {worker_threads: 1}\n\
           provider_limits: {per_second: 10000, in_flight: 1000, in_flight_floor: 1000}\n";
    let files = Files::new(&registry, &catalogue, Some(&config));
    let mut fleet: Vec<Serving> = join_all((0..FLEET).map(|_| serve(&files))).await;
    let channels = join_all(fleet.iter().map(Serving::channel)).await;
    let keys: Vec<String> = (0..CREDENTIALS).map(|index| format!("made-up-tenant-{index}")).collect();
    let ask = |(replica, key): (usize, String)| {
        let channel = channels[replica].clone();
        async move {
            let mut client =
                byok_gate::grpc::convert::pb::policy_decision_service_client::PolicyDecisionServiceClient::new(channel);
            let answer = client.decide(decide(&key)).await;
            let is_good = answer.as_ref().is_ok_and(|answer| is_allow(answer.get_ref()));
            (replica, if is_good { Ok(()) } else { Err(format!("{answer:?}")) })
        }
    };
    let began = Instant::now();
    // Every replica meets every credential. A tenth of the way one of them is killed while it asks.
    let dying = FLEET - 1;
    let mut answers = Vec::new();
    for (round, keys) in keys.chunks(10).enumerate() {
        let asking = if round <= 5 { FLEET } else { dying };
        let calls = join_all((0..asking).flat_map(|replica| keys.iter().map(move |key| (replica, key.clone()))).map(ask));
        if round == 5 {
            let killing = async {
                let before = vendor.asked().len();
                until("the vendor is asked", async || vendor.asked().len() > before).await;
                fleet[dying].child.kill().await.unwrap();
            };
            answers.extend(tokio::join!(calls, killing).0);
        } else {
            answers.extend(calls.await);
        }
    }
    answers.retain(|(replica, _)| *replica != dying);
    let asked = vendor.asked().len();
    println!(
        "{FLEET} processes x {CREDENTIALS} credentials: {asked} calls, {} decisions in {:?}",
        answers.len(),
        began.elapsed()
    );
    let denied: Vec<&String> = answers.iter().filter_map(|(_, answer)| answer.as_ref().err()).collect();
    assert!(denied.is_empty(), "{} denied, as {}", denied.len(), denied[0]);
    assert!(asked * 100 <= CREDENTIALS * 110, "{asked}");
}
