//! The cache against a model of it: single flight, lifetimes, the hard maximum, panics and the breaker, over random
//! schedules. The model is sequential and has no lock, no task and no clock but its own.
//!
//! `BYOK_GATE_SCHEDULES=1000000 cargo test --release model` runs more; a failure names its seed.

use std::{collections::BTreeMap, env, sync::Arc, time::Duration};

use byok_gate::{
    core::{
        credential::LivenessQuery,
        endpoint::Target,
        engine::{Engine, LivenessSource, Observed},
        evaluate::{Next, evaluate},
        snapshot::Snapshot,
    },
    domain::{
        request::Request,
        verdict::{ServedFrom, Verdict},
    },
    grpc::convert::{self, pb},
    liveness::{
        breaker::BreakerSettings,
        cache::{Ages, Cache, CacheSettings},
    },
};
use rand::{Rng, SeedableRng, rngs::StdRng, seq::IndexedRandom};
use tokio::time::{Instant, sleep};

use crate::support::{
    case::{self, Spec},
    gate::Files,
    prober::{Scripted, finding},
};

/// Milliseconds. Asks come at multiples of 100, answers take between 1 and 90 more than one, each a different number of them, and
/// deadlines 97 more: no two events fall together, so their order is never left open.
type Ms = u64;

const SCHEDULES: u64 = 20_000;
const FLOOR: Ms = 1_000;
const VALID: Ms = 30_000;
const HARD_MAXIMUM: Ms = 90_000;
const FAILURES: u32 = 3;
const MIN_SOURCES: usize = 3;
const KEYS: usize = 5;
const COOL_DOWN: Ms = 5_000;
const MAX_COOL_DOWN: Ms = 20_000;
const TRIAL: Ms = 20_000;
const VERDICTS: [Verdict; 7] = [
    Verdict::Valid,
    Verdict::Valid,
    Verdict::Invalid,
    Verdict::Timeout,
    Verdict::Unreachable,
    Verdict::ProviderError,
    Verdict::UnexpectedResponse,
];

/// What a caller gets.
#[derive(Debug, Clone, PartialEq)]
struct Got {
    verdict: Verdict,
    served_from: ServedFrom,
    earlier_valid: bool,
}

/// What the provider does from now on.
#[derive(Debug, Clone, Copy)]
struct Script {
    verdict: Verdict,
    takes: Ms,
    panics: bool,
}

#[derive(Debug, Clone)]
enum Step {
    Wait(Ms),
    Provide(Script),
    Ask { key: usize, max_age: Option<Ms>, deadline: Ms },
}

fn settings() -> CacheSettings {
    CacheSettings {
        ages: Ages { jitter_percent: 0, hard_maximum: Duration::from_millis(HARD_MAXIMUM), ..Ages::default() },
        breaker: BreakerSettings {
            failures: FAILURES,
            cool_down: Duration::from_millis(COOL_DOWN),
            max_cool_down: Duration::from_millis(MAX_COOL_DOWN),
            trial: Duration::from_millis(TRIAL),
        },
        ..CacheSettings::default()
    }
}

fn schedule(random: &mut StdRng) -> Vec<Step> {
    let steps = random.random_range(5..40);
    (0..steps)
        .map(|_| match random.random_range(0..10) {
            0..=2 => Step::Wait(100 * *[1, 2, 5, 10, 25, 51, 120, 310, 950].choose(random).unwrap()),
            3..=4 => Step::Provide(Script {
                verdict: *VERDICTS.choose(random).unwrap(),
                takes: 100 * random.random_range(0..40) + 1,
                panics: random.random_range(0..8) == 0,
            }),
            _ => Step::Ask {
                key: random.random_range(0..KEYS),
                max_age: *[None, None, None, Some(0), Some(1_500), Some(20_000)].choose(random).unwrap(),
                deadline: 100 * *[0_u64, 2, 20, 50].choose(random).unwrap() + 97,
            },
        })
        .collect()
}

// === the model ===

#[derive(Debug, Default, Clone)]
struct Memory {
    latest: Option<(Verdict, Ms)>,
    valid: Option<Ms>,
    refused: Option<Ms>,
}

#[derive(Debug)]
struct Flight {
    ends: Ms,
    script: Script,
    waiting: Vec<(usize, Option<Ms>, Ms)>,
}

/// The provider's failures, and the verdict that callers get meanwhile: all of them, or those that saw a failure.
#[derive(Debug, Default)]
struct Breaker {
    failures: u32,
    seen_by: Vec<usize>,
    open: Option<Open>,
    for_all: bool,
}

#[derive(Debug, Clone, Copy)]
struct Open {
    verdict: Verdict,
    until: Ms,
    trips: u32,
    trying: bool,
}

struct Model {
    now: Ms,
    script: Script,
    memory: BTreeMap<usize, Memory>,
    flights: BTreeMap<usize, Flight>,
    breaker: Breaker,
    got: BTreeMap<usize, Got>,
    asked: usize,
    /// How often the breaker opened for some, and for all.
    opened: [u32; 2],
}

fn age_of(verdict: Verdict) -> Ms {
    match verdict {
        Verdict::Valid => VALID,
        Verdict::Invalid => 10_000,
        Verdict::Timeout | Verdict::Unreachable => 3_000,
        _ => 5_000,
    }
}

impl Model {
    fn run(steps: &[Step]) -> Self {
        let mut model = Self {
            now: 0,
            script: Script { verdict: Verdict::Valid, takes: 1, panics: false },
            memory: BTreeMap::new(),
            flights: BTreeMap::new(),
            breaker: Breaker::default(),
            got: BTreeMap::new(),
            asked: 0,
            opened: [0; 2],
        };
        let mut callers = 0;
        for step in steps {
            match step {
                Step::Wait(time) => model.pass_to(model.now + time),
                Step::Provide(script) => model.script = *script,
                Step::Ask { key, max_age, deadline } => {
                    model.ask(callers, *key, *max_age, model.now + deadline);
                    callers += 1;
                }
            }
        }
        model.pass_to(model.now + 1_000_000);
        model
    }

    /// Everything that happens until then, in order.
    fn pass_to(&mut self, then: Ms) {
        loop {
            let landing = self.flights.iter().map(|(key, flight)| (flight.ends, *key, None)).min();
            let giving_up = self
                .flights
                .iter()
                .flat_map(|(key, flight)| flight.waiting.iter().map(|waiting| (waiting.2, *key, Some(waiting.0))))
                .min();
            let Some((at, key, caller)) = landing.into_iter().chain(giving_up).min() else { break };
            if at > then {
                break;
            }
            self.now = at;
            match caller {
                Some(caller) => {
                    let waiting = &mut self.flights.get_mut(&key).unwrap().waiting;
                    let place = waiting.iter().position(|waiting| waiting.0 == caller).unwrap();
                    let (_, max_age, _) = waiting.remove(place);
                    self.answer(caller, key, max_age, Verdict::Timeout, ServedFrom::Probe);
                }
                None => self.land(key),
            }
        }
        self.now = then;
    }

    fn land(&mut self, key: usize) {
        let Flight { script, waiting, .. } = self.flights.remove(&key).unwrap();
        let verdict = if script.panics { Verdict::NotAttempted } else { script.verdict };
        if !script.panics {
            let memory = self.memory.entry(key).or_default();
            memory.latest = Some((verdict, self.now));
            match verdict {
                Verdict::Valid => memory.valid = Some(self.now),
                Verdict::Invalid => (memory.valid, memory.refused) = (None, Some(self.now)),
                _ => {}
            }
            self.report(key, verdict);
        } else if let Some(open) = self.breaker.open.as_mut().filter(|open| open.trying) {
            // Nothing was learnt: the next one tries.
            (open.trying, open.until) = (false, self.now);
        }
        for (caller, max_age, _) in waiting {
            self.answer(caller, key, max_age, verdict, ServedFrom::Probe);
        }
    }

    fn report(&mut self, key: usize, verdict: Verdict) {
        if !matches!(verdict, Verdict::Timeout | Verdict::Unreachable | Verdict::ProviderError) {
            self.breaker = Breaker::default();
            return;
        }
        let Breaker { failures, seen_by, open, for_all } = &mut self.breaker;
        let trying = open.is_some_and(|open| open.trying);
        let again = open.map_or(0, |open| open.trips + 1);
        let trips = if *for_all {
            // Without a trial, the probe started before the breaker opened, and says nothing new.
            if !trying {
                return;
            }
            again
        } else {
            let is_new = !seen_by.contains(&key);
            seen_by.extend(is_new.then_some(key));
            *failures += 1;
            if *failures < FAILURES {
                return;
            }
            *for_all = seen_by.len() >= MIN_SOURCES;
            match open {
                _ if *for_all => 0,
                Some(_) if !trying && !is_new => return,
                _ => again,
            }
        };
        let cool_down = (COOL_DOWN << trips.min(10)).min(MAX_COOL_DOWN);
        *open = Some(Open { verdict, until: self.now + cool_down, trips, trying: false });
        self.opened[usize::from(*for_all)] += 1;
    }

    fn ask(&mut self, caller: usize, key: usize, max_age: Option<Ms>, deadline: Ms) {
        if let Some((verdict, at)) = self.memory.get(&key).and_then(|memory| memory.latest) {
            let wanted = max_age.map_or(Ms::MAX, |age| age.max(FLOOR));
            if self.now - at < age_of(verdict).min(wanted) {
                self.answer(caller, key, max_age, verdict, ServedFrom::Cache);
                return;
            }
        }
        if let Some(flight) = self.flights.get_mut(&key) {
            flight.waiting.push((caller, max_age, deadline));
            return;
        }
        let concerned = self.breaker.for_all || self.breaker.seen_by.contains(&key);
        if let Some(open) = self.breaker.open.as_mut().filter(|_| concerned) {
            if self.now < open.until {
                let verdict = open.verdict;
                self.answer(caller, key, max_age, verdict, ServedFrom::Breaker);
                return;
            }
            (open.until, open.trying) = (self.now + TRIAL, true);
        }
        let ends = self.now + self.script.takes + self.asked as Ms;
        self.asked += 1;
        self.flights.insert(key, Flight { ends, script: self.script, waiting: vec![(caller, max_age, deadline)] });
    }

    fn answer(&mut self, caller: usize, key: usize, max_age: Option<Ms>, verdict: Verdict, served_from: ServedFrom) {
        let memory = self.memory.get(&key).cloned().unwrap_or_default();
        let wanted = max_age.map_or(Ms::MAX, |age| age.max(FLOOR));
        // A VALID does not depend on earlier results.
        let earlier_valid = verdict != Verdict::Valid
            && memory
                .valid
                .is_some_and(|at| self.now - at <= HARD_MAXIMUM.min(wanted) && memory.refused.is_none_or(|refused| refused < at));
        assert_eq!(self.got.insert(caller, Got { verdict, served_from, earlier_valid }), None);
    }
}

// === the real thing ===

struct Real {
    cache: Arc<Cache>,
    prober: Arc<Scripted>,
}

/// A request for the credential with this number.
pub(crate) struct Asked {
    snapshot: Arc<Snapshot>,
    request: Request,
}

impl Asked {
    pub(crate) fn about(engine: &Engine, key: usize) -> Self {
        Self::of(engine, "", key)
    }

    pub(crate) fn of(engine: &Engine, organization: &str, key: usize) -> Self {
        let spec = Spec {
            model: "acme-large".into(),
            organization_id: organization.into(),
            workspace: BTreeMap::from([("ACME_API_KEY".into(), Some(format!("made-up-{key}")))]),
            ..Spec::default()
        };
        let message = pb::DecideRequest { workspace_spec: Some(spec.message()), checkpoint: 1, ..Default::default() };
        Self { snapshot: engine.snapshot(), request: convert::request(message).unwrap() }
    }

    pub(crate) fn query(&self) -> LivenessQuery<'_> {
        match evaluate(&self.snapshot, &self.request, 0, &|_| String::new()).next {
            Next::Ask(questions) => questions.first,
            Next::Rule(facts) => panic!("{facts:?}"),
        }
    }

    pub(crate) fn target(&self) -> Target {
        let LivenessQuery { endpoint, model, .. } = self.query();
        Target::of(endpoint, model)
    }
}

async fn run(steps: &[Step], questions: &[Arc<Asked>]) -> (BTreeMap<usize, Got>, usize) {
    let prober = Scripted::new(Verdict::Valid);
    prober.set(|script| {
        script.takes = Duration::from_millis(1);
        script.staggered = true;
    });
    let real = Real { cache: Arc::new(Cache::new(prober.clone(), settings())), prober };
    let mut callers = Vec::new();
    for step in steps {
        match step {
            // Not `advance`: it jumps over what should happen in between.
            Step::Wait(time) => sleep(Duration::from_millis(*time)).await,
            Step::Provide(Script { verdict, takes, panics }) => real.prober.set(|script| {
                script.finding = finding(*verdict);
                script.takes = Duration::from_millis(*takes);
                script.panics = *panics;
            }),
            Step::Ask { key, max_age, deadline } => {
                let (cache, asked) = (Arc::clone(&real.cache), Arc::clone(&questions[*key]));
                let (max_age, deadline) = (max_age.map(Duration::from_millis), Instant::now() + Duration::from_millis(*deadline));
                callers.push(tokio::spawn(async move {
                    // By the trait, as the engine calls it.
                    let source: &dyn LivenessSource = &*cache;
                    let observed = source.observe(asked.query(), max_age, deadline).await;
                    let Observed { finding, served_from, earlier_valid, .. } = observed;
                    Got { verdict: finding.verdict, served_from, earlier_valid: earlier_valid.is_some() }
                }));
                // So that it has asked before the next step.
                for _ in 0..3 {
                    tokio::task::yield_now().await;
                }
            }
        }
    }
    let mut got = BTreeMap::new();
    for (index, caller) in callers.into_iter().enumerate() {
        got.insert(index, caller.await.unwrap());
    }
    (got, real.prober.asked())
}

#[tokio::test(start_paused = true)]
async fn the_memory_does_what_its_model_does() {
    let (registry, catalogue) = case::documents(1);
    let engine = Files::new(&registry, &catalogue, None).engine();
    let questions: Vec<_> = (0..KEYS).map(|key| Arc::new(Asked::about(&engine, key))).collect();
    let schedules = env::var("BYOK_GATE_SCHEDULES").map_or(SCHEDULES, |text| text.parse().unwrap());
    let mut met: BTreeMap<(ServedFrom, Verdict), u32> = BTreeMap::new();
    let mut opened = [0; 2];
    for seed in 0..schedules {
        let steps = schedule(&mut StdRng::seed_from_u64(seed));
        let model = Model::run(&steps);
        let (got, asked) = run(&steps, &questions).await;
        assert_eq!((&got, asked), (&model.got, model.asked), "seed {seed}: {steps:#?}");
        for (count, more) in opened.iter_mut().zip(model.opened) {
            *count += more;
        }
        for got in got.into_values() {
            *met.entry((got.served_from, got.verdict)).or_default() += 1;
        }
    }
    // The schedules reach all states.
    for served_from in [ServedFrom::Probe, ServedFrom::Cache] {
        for verdict in VERDICTS {
            assert!(met.get(&(served_from, verdict)).is_some_and(|count| *count > 100), "{served_from} {verdict}: {met:?}");
        }
    }
    assert!(opened.iter().all(|count| *count > 100), "for all, and for some: {opened:?}");
    assert!(met.get(&(ServedFrom::Breaker, Verdict::Unreachable)).is_some_and(|count| *count > 100), "{met:?}");
    assert!(met.get(&(ServedFrom::Probe, Verdict::NotAttempted)).is_some_and(|count| *count > 100), "{met:?}");
}
