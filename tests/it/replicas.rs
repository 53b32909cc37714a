//! Two replicas and their shared store, over random schedules of calls, of providers' answers and of faults on the way to the store.
//! The cache, single flight, the tier's client and its scripts are the real ones. The promises are checked on a log of all events.
//!
//! `BYOK_GATE_FLEET_SCHEDULES=20000 cargo test replicas` runs more; a failure names its seed, and `=634..635` runs that one alone.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    env,
    sync::{Arc, Mutex},
    time::Duration,
};

use byok_gate::{
    core::{
        classify::Finding,
        engine::{Boxed, LivenessSource, Observed, ProbeRequest, Prober},
    },
    domain::verdict::{ServedFrom, Verdict, Withheld},
    liveness::{
        breaker::BreakerSettings,
        cache::{Ages, Cache, CacheSettings},
        new_keys::NewKeyLimits,
        provider_limits::{ProviderLimiter, ProviderLimits},
        tier::{Tier, TierKeys},
    },
    telemetry::metrics::{Collect, Page},
};
use rand::{Rng, SeedableRng, rngs::StdRng, seq::IndexedRandom};
use tokio::{
    sync::watch,
    task::JoinHandle,
    time::{Instant, sleep},
};

use crate::{
    model::Asked,
    support::{
        case,
        gate::Files,
        prober::finding,
        store::{Event, LuaStore, Weather},
        tier::KEY,
    },
};

type Ms = u64;

const SCHEDULES: u64 = 400;
const REPLICAS: usize = 2;
const KEYS: usize = 3;
const FLOOR: Ms = 1_000;
const HARD_MAXIMUM: Ms = 90_000;
const TIMEOUT: Duration = Duration::from_millis(350);
/// So many failures in a row, of as many credentials, open a breaker for everybody; for so long, however often.
const FAILURES: usize = 3;
const COOL_DOWN: Ms = 4_000;
/// A caller that waits this long has time for another replica's answer, for one that dies, and for its own probe.
const PATIENT: Ms = 12_000;
const VERDICTS: [Verdict; 6] =
    [Verdict::Valid, Verdict::Valid, Verdict::Valid, Verdict::Invalid, Verdict::Invalid, Verdict::Timeout];
/// The results of a lookup in the tier, as in the metric.
const LOOKS: [&str; 6] = ["hit", "breaker", "lease", "gave_up", "fault", "left_alone"];

#[derive(Debug, Clone)]
enum Step {
    Wait(Ms),
    /// What the provider says from now on about a key, after how long, or whether the probe panics.
    Provide {
        key: usize,
        verdict: Verdict,
        takes: Ms,
        panics: bool,
    },
    Ask {
        replica: usize,
        key: usize,
        max_age: Option<Ms>,
        deadline: Ms,
    },
    Weather {
        replica: usize,
        weather: Weather,
    },
}

/// A call to the provider.
#[derive(Debug, Clone)]
struct Probe {
    replica: usize,
    key: usize,
    began: Instant,
    ended: Option<Instant>,
    verdict: Verdict,
    panics: bool,
}

/// What a caller got.
#[derive(Debug, Clone)]
struct Answer {
    replica: usize,
    key: usize,
    max_age: Option<Ms>,
    patience: Ms,
    asked: Instant,
    answered: Instant,
    verdict: Verdict,
    served_from: ServedFrom,
    told_age: Duration,
    /// The probes that it rests on.
    probe: Option<usize>,
    earlier_valid: Option<usize>,
}

#[derive(Debug, Default)]
struct Log {
    says: HashMap<usize, (Verdict, Ms, bool)>,
    probes: Vec<Probe>,
    answers: Vec<Answer>,
}

type Logged = Arc<Mutex<Log>>;

/// The provider, as one replica asks it.
struct Provider {
    replica: usize,
    log: Logged,
}

struct Replica {
    cache: Arc<Cache>,
    weather: watch::Sender<Weather>,
    refusal_listener: JoinHandle<()>,
}

fn age_of(verdict: Verdict) -> Ms {
    match verdict {
        Verdict::Valid => 30_000,
        Verdict::Invalid => 10_000,
        _ => 3_000,
    }
}

fn millis(length: Duration) -> Ms {
    length.as_millis().try_into().unwrap()
}

impl Prober for Provider {
    fn probe(&self, request: ProbeRequest) -> Boxed<'static, Finding> {
        request.started.set();
        let key = request.secret.expose().strip_prefix("made-up-").unwrap().parse().unwrap();
        let (log, replica) = (Arc::clone(&self.log), self.replica);
        Box::pin(async move {
            let (id, (verdict, takes, panics)) = {
                let mut log = log.lock().unwrap();
                let says = log.says.get(&key).copied().unwrap_or((Verdict::Valid, 50, false));
                log.probes.push(Probe { replica, key, began: Instant::now(), ended: None, verdict: says.0, panics: says.2 });
                (log.probes.len() - 1, says)
            };
            sleep(Duration::from_millis(takes)).await;
            log.lock().unwrap().probes[id].ended = Some(Instant::now());
            assert!(!panics, "made to panic");
            Finding { probe: id.to_string(), ..finding(verdict) }
        })
    }
}

// === impl Replica ===

impl Replica {
    fn new(index: usize, store: &LuaStore, log: &Logged, seed: u64) -> Self {
        Self::with(NewKeyLimits::default(), index, store, log, seed)
    }

    fn with(new_keys: NewKeyLimits, index: usize, store: &LuaStore, log: &Logged, seed: u64) -> Self {
        let (weather, seen) = watch::channel(Weather::Calm);
        let seed = seed * 100 + index as u64;
        let tier = Tier::over(Box::new(store.link(index, seen, seed)), TIMEOUT, TierKeys::parse(KEY).unwrap(), seed);
        let settings = CacheSettings {
            ages: Ages { jitter_percent: 0, hard_maximum: Duration::from_millis(HARD_MAXIMUM), ..Ages::default() },
            breaker: BreakerSettings {
                failures: FAILURES as u32,
                cool_down: Duration::from_millis(COOL_DOWN),
                max_cool_down: Duration::from_millis(COOL_DOWN),
                ..BreakerSettings::default()
            },
            new_keys,
        };
        let provider = Provider { replica: index, log: Arc::clone(log) };
        // Its limits hold nobody back, and all starts are counted over the tier.
        let limiter = Arc::new(ProviderLimiter::new(Arc::new(provider), ProviderLimits::default()));
        let cache = Cache::new(limiter.clone(), settings).with_tier(Some(tier)).with_fleet_limits(limiter, new_keys.per_platform);
        let cache = Arc::new(cache);
        let refusal_listener = tokio::spawn(cache.refusal_listener().unwrap());
        Self { cache, weather, refusal_listener }
    }

    /// How often each occurred: lookups in the tier by result, and lost leases.
    fn counts(&self) -> BTreeMap<&'static str, u64> {
        let looks = LOOKS.map(|result| (result, self.looks(result)));
        let lost = ("leases_lost", self.number("byokgate_tier_leases_lost_total"));
        let in_use = ("in_use", self.number("byokgate_tier_in_use"));
        looks.into_iter().chain([lost, in_use]).collect()
    }

    fn looks(&self, result: &str) -> u64 {
        self.number(&format!(r#"byokgate_tier_lookups_total{{result="{result}"}}"#))
    }

    fn number(&self, name: &str) -> u64 {
        let mut page = Page::about(std::iter::empty());
        self.cache.collect(&mut page);
        let text = page.text().unwrap();
        let line = text.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_else(|| panic!("{name} in {text}"));
        line.trim().parse().unwrap()
    }
}

impl Drop for Replica {
    fn drop(&mut self) {
        self.refusal_listener.abort();
    }
}

/// A third of the schedules are calm.
fn schedule(random: &mut StdRng) -> (bool, Vec<Step>) {
    let (calm, many) = (random.random_range(0..3) == 0, random.random_range(10..50));
    let mut steps = Vec::new();
    for _ in 0..many {
        let step = one_step(random, calm);
        steps.extend(step);
    }
    (calm, steps)
}

fn one_step(random: &mut StdRng, calm: bool) -> Vec<Step> {
    let (replica, key) = (random.random_range(0..REPLICAS), random.random_range(0..KEYS));
    vec![match random.random_range(0..22) {
        // The provider fails, one replica finds out, and the other is asked.
        21 => {
            let takes = *[5, 300].choose(random).unwrap();
            let fails = (0..KEYS).map(|key| Step::Provide { key, verdict: Verdict::Timeout, takes, panics: false });
            let finds_out = (0..KEYS).map(|key| Step::Ask { replica, key, max_age: Some(0), deadline: PATIENT });
            let asks = (0..KEYS).map(|key| Step::Ask { replica: 1 - replica, key, max_age: Some(0), deadline: PATIENT });
            let later = [Step::Wait(*[400, 1_100, 2_500].choose(random).unwrap())];
            return fails.chain([Step::Wait(1_100)]).chain(finds_out).chain(later).chain(asks).collect();
        }
        // The lease's holder has no connection to the store until another has the lease.
        0 if !calm => {
            return vec![
                Step::Provide { key, verdict: *VERDICTS.choose(random).unwrap(), takes: 1_900, panics: false },
                Step::Weather { replica, weather: Weather::Calm },
                Step::Ask { replica, key, max_age: Some(0), deadline: PATIENT },
                Step::Wait(100),
                Step::Weather { replica, weather: Weather::Frozen },
                Step::Ask { replica: 1 - replica, key, max_age: None, deadline: PATIENT },
                Step::Wait(1_500),
                Step::Weather { replica, weather: Weather::Calm },
                Step::Wait(1_500),
            ];
        }
        1..5 => Step::Wait(*[7, 90, 400, 1_100, 2_500, 5_000, 11_000, 31_000].choose(random).unwrap()),
        5..8 => Step::Provide {
            key,
            verdict: *VERDICTS.choose(random).unwrap(),
            takes: *[5, 50, 300, 900, 1_900].choose(random).unwrap(),
            panics: !calm && random.random_range(0..10) == 0,
        },
        8..10 if !calm => Step::Weather {
            replica,
            weather: *[Weather::Calm, Weather::Stormy, Weather::Stormy, Weather::Frozen, Weather::Down].choose(random).unwrap(),
        },
        _ => Step::Ask {
            replica,
            key,
            max_age: *[None, None, None, Some(0), Some(2_000), Some(20_000)].choose(random).unwrap(),
            deadline: if calm { PATIENT } else { *[60, 500, 3_000, PATIENT, PATIENT].choose(random).unwrap() },
        },
    }]
}

async fn ask(replica: usize, cache: Arc<Cache>, asked: Arc<Asked>, key: usize, max_age: Option<Ms>, patience: Ms, log: Logged) {
    let began = Instant::now();
    let source: &dyn LivenessSource = &*cache;
    let deadline = began + Duration::from_millis(patience);
    let observed = source.observe(asked.query(), max_age.map(Duration::from_millis), deadline).await;
    // In the same poll as the answer was made: the log's order is theirs.
    let Observed { finding, served_from, earlier_valid, age, .. } = observed;
    log.lock().unwrap().answers.push(Answer {
        replica,
        key,
        max_age,
        patience,
        asked: began,
        answered: Instant::now(),
        verdict: finding.verdict,
        served_from,
        told_age: age,
        probe: finding.probe.parse().ok(),
        earlier_valid: earlier_valid.map(|earlier| earlier.finding.probe.parse().unwrap()),
    });
}

/// Everything that happened, and how often what.
struct Run {
    log: Log,
    events: Vec<Event>,
    counts: BTreeMap<&'static str, u64>,
}

async fn run(seed: u64, steps: &[Step], questions: &[Arc<Asked>]) -> Run {
    let (store, log) = (LuaStore::new(), Logged::default());
    let replicas: Vec<_> = (0..REPLICAS).map(|index| Replica::new(index, &store, &log, seed)).collect();
    // They listen before the first question.
    sleep(Duration::from_millis(50)).await;
    let mut callers = Vec::new();
    for step in steps {
        match step {
            Step::Wait(time) => sleep(Duration::from_millis(*time)).await,
            Step::Provide { key, verdict, takes, panics } => {
                log.lock().unwrap().says.insert(*key, (*verdict, *takes, *panics));
            }
            Step::Weather { replica, weather } => drop(replicas[*replica].weather.send_replace(*weather)),
            Step::Ask { replica, key, max_age, deadline } => {
                let (cache, asked) = (Arc::clone(&replicas[*replica].cache), Arc::clone(&questions[*key]));
                callers.push(tokio::spawn(ask(*replica, cache, asked, *key, *max_age, *deadline, Arc::clone(&log))));
                for _ in 0..3 {
                    tokio::task::yield_now().await;
                }
            }
        }
    }
    for caller in callers {
        caller.await.unwrap();
    }
    // Flights whose callers have gone.
    sleep(Duration::from_secs(20)).await;
    let mut counts = BTreeMap::new();
    for replica in &replicas {
        for (name, count) in replica.counts() {
            *counts.entry(name).or_default() += count;
        }
    }
    let events = store.events();
    let before = std::mem::take(&mut log.lock().unwrap().answers);
    let probes = log.lock().unwrap().probes.clone();
    // Whatever it was, it ends: then they share again.
    for replica in &replicas {
        replica.weather.send_replace(Weather::Calm);
    }
    sleep(Duration::from_secs(60)).await;
    log.lock().unwrap().says.clear();
    for (index, replica) in replicas.iter().enumerate() {
        // Another first: it may be the trial, which has to fail if the connection of before is gone.
        for key in [KEYS + index, KEYS + REPLICAS, KEYS + REPLICAS + 1] {
            let asked = Arc::clone(&questions[key]);
            ask(index, Arc::clone(&replica.cache), asked, key, None, PATIENT, Arc::clone(&log)).await;
            sleep(Duration::from_millis(500)).await;
        }
        assert_eq!(replica.counts()["in_use"], 1, "seed {seed}");
    }
    let last = log.lock().unwrap().answers.pop().unwrap();
    assert_eq!((last.verdict, last.served_from), (Verdict::Valid, ServedFrom::Cache), "seed {seed}: {last:?}");
    Run { log: Log { answers: before, probes, ..Log::default() }, events, counts }
}

/// An organization that goes round the replicas has one limit and not one at each; while the store is away, one at each and no more.
#[tokio::test(start_paused = true)]
async fn an_organization_has_one_limit_for_new_keys_over_all_replicas() {
    const LIMIT: u32 = 6;
    let limits = NewKeyLimits { per_organization: LIMIT.try_into().unwrap(), ..NewKeyLimits::default() };
    let (registry, catalogue) = case::documents(1);
    let engine = Files::new(&registry, &catalogue, None).engine();
    let (store, log) = (LuaStore::new(), Logged::default());
    let replicas: Vec<_> = (0..REPLICAS).map(|index| Replica::with(limits, index, &store, &log, 7)).collect();
    let ask = async |replica: &Replica, organization: &str, key: usize| {
        let asked = Asked::of(&engine, organization, key);
        let source: &dyn LivenessSource = &*replica.cache;
        let Observed { finding, retry_after, served_from, .. } =
            source.observe(asked.query(), None, Instant::now() + Duration::from_millis(PATIENT)).await;
        let is_refused = finding.withheld == Some(Withheld::NewKeys);
        assert_eq!(finding.verdict, if is_refused { Verdict::NotAttempted } else { Verdict::Valid }, "{finding:?}");
        // One may come each ten seconds; those who were refused here are told one time each.
        assert!(!is_refused || (1..=70).contains(&retry_after.as_secs()), "{retry_after:?}");
        sleep(Duration::from_millis(20)).await;
        (!is_refused).then_some(served_from)
    };
    let among = async |organization: &str, keys: std::ops::Range<usize>| {
        let mut served = Vec::new();
        for key in keys {
            served.extend(ask(&replicas[key % REPLICAS], organization, key).await);
        }
        served
    };
    assert_eq!(among("made-up-1", 0..12).await, vec![ServedFrom::Probe; LIMIT as usize]);
    // What one of them knows is new to none of them.
    for key in 0..LIMIT as usize {
        assert_eq!(ask(&replicas[(key + 1) % REPLICAS], "made-up-2", key).await, Some(ServedFrom::Cache));
    }
    assert_eq!(among("made-up-2", 100..112).await, vec![ServedFrom::Probe; LIMIT as usize], "another organization has its own");
    // What was spent comes back, one in ten seconds.
    sleep(Duration::from_secs(31)).await;
    assert_eq!(among("made-up-1", 200..206).await.len(), 3);
    // What was known and is too old is not new, whoever asks.
    let late = Replica::with(limits, REPLICAS, &store, &log, 7);
    for key in 0..3 {
        assert_eq!(ask(&late, "made-up-1", key).await, Some(ServedFrom::Probe));
    }
    assert_eq!(ask(&late, "made-up-1", 206).await, None);
    // Another organization that comes with the same key at the same moment has its own.
    for key in 0..LIMIT as usize {
        ask(&replicas[1], "made-up-3", 240 + key).await;
    }
    let (spent, own) = tokio::join!(ask(&replicas[0], "made-up-3", 250), ask(&replicas[0], "made-up-4", 250));
    assert_eq!((spent, own), (None, Some(ServedFrom::Probe)));
    for replica in &replicas {
        assert!(replica.looks("new_keys") >= 2, "{}", replica.looks("new_keys"));
        replica.weather.send_replace(Weather::Down);
    }
    sleep(Duration::from_secs(120)).await;
    assert_eq!(among("made-up-1", 300..320).await, vec![ServedFrom::Probe; LIMIT as usize * REPLICAS]);
}

/// The names of the keys' leases, which are the same in every schedule.
async fn leases(questions: &[Arc<Asked>]) -> HashMap<String, usize> {
    let (store, log) = (LuaStore::new(), Logged::default());
    let replica = Replica::new(0, &store, &log, 0);
    for (key, asked) in questions.iter().enumerate() {
        ask(0, Arc::clone(&replica.cache), Arc::clone(asked), key, None, PATIENT, Arc::clone(&log)).await;
    }
    let names = store.events().into_iter().filter_map(|event| match event {
        Event::Leased { lease, .. } => Some(lease),
        _ => None,
    });
    names.zip(0..).collect()
}

// === what must hold ===

/// What the store was given: which probe's finding, and when.
struct Stored {
    at: Instant,
    probe: usize,
}

#[derive(Default)]
struct Leased {
    /// Those of holders.
    probes: HashSet<usize>,
    /// What was stored, in order.
    stored: Vec<Stored>,
    /// How many nothing came of.
    lost: u64,
}

impl Run {
    /// What became of leases.
    fn leased(&self, leases: &HashMap<String, usize>) -> Leased {
        let mut leased = Leased::default();
        let mut taken = HashMap::new();
        for event in &self.events {
            match event {
                Event::Leased { at, by, lease, token } => {
                    // A replica asks once at a time about a key: its first probe since then is the lease's.
                    let fits = |probe: &Probe| (probe.replica, probe.key) == (*by, leases[lease]) && probe.began >= *at;
                    let probe = self.log.probes.iter().position(fits);
                    leased.probes.extend(probe);
                    taken.insert(token, probe);
                }
                Event::Stored { at, token } => {
                    leased.stored.push(Stored { at: *at, probe: taken.remove(token).unwrap().unwrap() });
                }
                Event::Released { token } => drop(taken.remove(token)),
                Event::Refused | Event::Delivered { .. } => {}
            }
        }
        leased.lost = taken.len() as u64;
        leased
    }

    /// Every answer comes from a probe of this very key, no older than allowed; or the caller's time was over.
    fn answers_are_a_providers_and_young(&self, seed: u64) {
        let Log { probes, answers, .. } = &self.log;
        for answer in answers {
            let wanted = answer.max_age.map_or(Ms::MAX, |age| age.max(FLOOR));
            let age_of_probe = |id: usize| {
                let probe = &probes[id];
                assert_eq!(probe.key, answer.key, "seed {seed}: {answer:?}");
                millis(answer.answered - probe.ended.unwrap())
            };
            match answer.probe {
                Some(id) if answer.served_from == ServedFrom::Breaker => self.a_breaker_was_open(seed, answer, id),
                Some(id) => {
                    let (probe, age) = (&probes[id], age_of_probe(id));
                    assert_eq!(probe.verdict, answer.verdict, "seed {seed}: {answer:?}");
                    assert!(millis(answer.told_age) + 1 >= age, "seed {seed}, {age} ms old: {answer:?}");
                    if answer.served_from == ServedFrom::Cache {
                        assert!(age < age_of(answer.verdict).min(wanted), "seed {seed}, {age} ms old: {answer:?}");
                    } else {
                        assert_eq!((age, probe.replica), (0, answer.replica), "seed {seed}: {answer:?}");
                    }
                }
                None => {
                    let is_late = millis(answer.answered - answer.asked) >= answer.patience;
                    let fits = |probe: &Probe| (probe.replica, probe.key) == (answer.replica, answer.key) && probe.panics;
                    let has_panicked = probes.iter().any(|probe| fits(probe) && probe.ended == Some(answer.answered));
                    assert!(is_late || has_panicked, "seed {seed}: nobody said so: {answer:?}");
                    // Whatever happens to the tier, there is time for a probe.
                    let is_patient = answer.patience == PATIENT && answer.max_age.is_none();
                    assert!(!is_patient || has_panicked, "seed {seed}: it cost an answer: {answer:?}");
                    assert!(matches!(answer.verdict, Verdict::Timeout | Verdict::NotAttempted), "seed {seed}: {answer:?}");
                }
            }
            if let Some(id) = answer.earlier_valid {
                assert_eq!(probes[id].verdict, Verdict::Valid, "seed {seed}: {answer:?}");
                assert!(age_of_probe(id) <= HARD_MAXIMUM.min(wanted), "seed {seed}: {answer:?}");
            }
        }
    }

    /// The verdict is the one that opened a breaker: this replica's own, or another's, for everybody, and not for longer than that was open.
    fn a_breaker_was_open(&self, seed: u64, answer: &Answer, id: usize) {
        let (Log { probes, .. }, opener) = (&self.log, &self.log.probes[id]);
        assert_eq!((answer.verdict, opener.verdict), (Verdict::Timeout, Verdict::Timeout), "seed {seed}: {answer:?}");
        let age = millis(answer.answered - opener.ended.unwrap());
        assert!(millis(answer.told_age) + 1 >= age, "seed {seed}, {age} ms old: {answer:?}");
        if opener.replica == answer.replica {
            return;
        }
        assert!(age < COOL_DOWN, "seed {seed}, {age} ms old: {answer:?}");
        let mut seen: Vec<&Probe> = probes
            .iter()
            .filter(|probe| {
                probe.replica == opener.replica
                    && !probe.panics
                    && probe.ended.is_some_and(|ended| ended <= opener.ended.unwrap())
            })
            .collect();
        seen.sort_by_key(|probe| probe.ended);
        let failing: HashSet<usize> =
            seen.iter().rev().take_while(|probe| probe.verdict == Verdict::Timeout).map(|probe| probe.key).collect();
        assert!(failing.len() >= FAILURES, "seed {seed}: fewer saw it fail: {answer:?}");
    }

    /// Once a replica knows of a refusal, by its own probe or by a message, none of its answers uses an older VALID.
    fn no_refusal_is_followed_by_an_older_valid(&self, seed: u64, stored: &[Stored]) -> u32 {
        let Log { probes, answers, .. } = &self.log;
        let ended = |id: usize| probes[id].ended.unwrap();
        let mut heard = 0;
        // When it was known, where, and which refusal.
        let mut known: Vec<(Instant, usize, usize)> = Vec::new();
        for event in &self.events {
            if let Event::Delivered { at, to, message } = event
                && let Some(Stored { probe, .. }) = stored.get(*message)
                && probes[*probe].verdict == Verdict::Invalid
            {
                known.push((*at, *to, *probe));
                heard += u32::from(probes[*probe].replica != *to);
            }
        }
        for (index, answer) in answers.iter().enumerate() {
            let valid = match (answer.verdict, answer.probe) {
                (Verdict::Valid, probe) => probe,
                _ => answer.earlier_valid,
            };
            let Some(valid) = valid else { continue };
            let concerns = |refusal: usize| probes[refusal].key == answer.key && ended(refusal) > ended(valid);
            let said = answers[..index].iter().chain(std::slice::from_ref(answer)).any(|before| {
                before.replica == answer.replica && before.verdict == Verdict::Invalid && before.probe.is_some_and(concerns)
            });
            assert!(!said, "seed {seed}: it had said that it is refused: {answer:?}");
            let told =
                known.iter().find(|(at, to, refusal)| *at < answer.answered && *to == answer.replica && concerns(*refusal));
            assert!(told.is_none(), "seed {seed}: it was told that it is refused, {told:?}: {answer:?}");
        }
        heard
    }

    /// The stored results of a key only get newer: a replica that lost the lease stores nothing.
    fn the_fence_holds(&self, seed: u64, stored: &[Stored]) {
        let mut last: HashMap<usize, Instant> = HashMap::new();
        for Stored { probe, .. } in stored {
            let Probe { key, ended, .. } = self.log.probes[*probe];
            let before = last.insert(key, ended.unwrap());
            assert!(before.is_none_or(|before| before < ended.unwrap()), "seed {seed}: {:?}", self.log.probes[*probe]);
        }
    }

    /// How often a replica probed although a usable result was known to it or in the store, or was being fetched under a lease.
    fn needless(&self, calm: bool, Leased { probes: held, stored, .. }: &Leased) -> u64 {
        let Log { probes, answers, .. } = &self.log;
        // What times lose on the way to the store and back counts as age.
        let slack = Duration::from_millis(if calm { 100 } else { 1_500 });
        let is_needless = |(id, probe): (usize, &Probe)| {
            // Who waits for it, or has launched it and left since.
            let is_waiting = |answer: &&Answer| {
                let waited = millis(answer.answered - answer.asked);
                let ends =
                    if waited >= answer.patience { answer.asked + Duration::from_millis(PATIENT) } else { answer.answered };
                (answer.replica, answer.key) == (probe.replica, probe.key) && (answer.asked..=ends).contains(&probe.began)
            };
            let wanted = answers.iter().filter(is_waiting).filter_map(|answer| answer.max_age).min();
            let wanted = wanted.map_or(Ms::MAX, |age| age.max(FLOOR));
            let of_key = probes.iter().take(id).enumerate().filter(|(_, other)| other.key == probe.key && !other.panics);
            let under_way =
                of_key.clone().any(|(id, other)| held.contains(&id) && other.ended.is_none_or(|ended| ended > probe.began));
            let is_known = |other: usize| {
                probes[other].replica == probe.replica
                    || stored.iter().any(|stored| stored.probe == other && stored.at + slack / 2 < probe.began)
            };
            let newest = of_key.filter(|(other, _)| is_known(*other)).max_by_key(|(_, other)| other.ended);
            let does = newest.is_some_and(|(_, other)| {
                let age = probe.began - other.ended.unwrap();
                age + slack < Duration::from_millis(age_of(other.verdict).min(wanted))
            });
            under_way || does
        };
        probes.iter().enumerate().filter(|probe| is_needless(*probe)).count() as u64
    }
}

#[tokio::test(start_paused = true)]
async fn replicas_that_share_keep_their_word_whatever_happens_to_the_store() {
    let (registry, catalogue) = case::documents(1);
    let engine = Files::new(&registry, &catalogue, None).engine();
    let questions: Vec<_> = (0..KEYS + REPLICAS + 2).map(|key| Arc::new(Asked::about(&engine, key))).collect();
    let leases = leases(&questions).await;
    assert_eq!(leases.len(), questions.len());
    let seeds = env::var("BYOK_GATE_FLEET_SCHEDULES").map_or(0..SCHEDULES, |text| match text.split_once("..") {
        Some((first, end)) => first.parse().unwrap()..end.parse().unwrap(),
        None => 0..text.parse().unwrap(),
    });
    let schedules = seeds.end - seeds.start;
    let mut met: BTreeMap<&str, u64> = BTreeMap::new();
    let mut more = |what, count| *met.entry(what).or_default() += count;
    for seed in seeds {
        let (calm, steps) = schedule(&mut StdRng::seed_from_u64(seed));
        let mut run = run(seed, &steps, &questions).await;
        // No holder asks for so long that another has to ask as well.
        assert_eq!(run.counts.remove("gave_up"), Some(0), "seed {seed}");
        run.answers_are_a_providers_and_young(seed);
        let leased = run.leased(&leases);
        let (stored, lost) = (&leased.stored, leased.lost);
        run.the_fence_holds(seed, stored);
        more("refusals heard of", run.no_refusal_is_followed_by_an_older_valid(seed, stored).into());
        let needless = run.needless(calm, &leased);
        let faults = run.counts["fault"] + run.counts["left_alone"];
        assert!(!calm || needless + faults + lost == 0, "seed {seed}: {needless}, {:?}: {steps:#?}", run.counts);
        let excused = faults + lost;
        assert!(needless <= excused, "seed {seed}: {needless} needless, {excused} excused, {:?}: {steps:#?}", run.counts);
        for (name, count) in &run.counts {
            more(name, *count);
        }
        more("needless", needless);
        more("fenced off", run.events.iter().filter(|event| **event == Event::Refused).count() as u64);
        more("holders lost", lost);
        let shared = |answer: &&Answer| answer.probe.is_some_and(|id| run.log.probes[id].replica != answer.replica);
        more("answers", run.log.answers.len() as u64);
        more("of another replica", run.log.answers.iter().filter(shared).count() as u64);
    }
    println!("{schedules} schedules: {met:?}");
    // The schedules reach all states.
    for (what, count) in met.iter().filter(|_| schedules >= SCHEDULES) {
        assert!(*count * 200 >= schedules, "{what} came up {count} times only: {met:?}");
    }
}
