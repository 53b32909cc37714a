//! Stores what is known of endpoints: how they refuse a made-up key, whether they accept any key, in which headers, and which paths do not
//! exist. All probes share it; it is bounded, and facts expire after hours. Until then a made-up key is sent once per request, header and form
//! of key, one at a time. That request runs detached, so that a caller with little time does not end it.

use std::{
    collections::BTreeMap,
    convert::Infallible,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use rand::Rng;
use tokio::time::Instant;
use tracing::Instrument;

use super::{Exchange, Http};
use crate::{
    core::{
        classify::{Calibration, Finding, calibration_of, read},
        endpoint::{Call, Endpoint, Target},
        endpoint_facts::{CalibrationQuestion, EndpointFacts, KnownRefusals, RequestFacts},
        made_up_key::{KeyForm, made_up_key_like},
        probe_plan::Lesson,
        response_shape::ResponseShape,
    },
    domain::{protocol::HeaderFamily, secret::Secret, verdict::Cause},
    liveness::single_flight::{FlightEnd, InFlight, Join, SingleFlight, Start, wait},
    telemetry::{
        metrics::{Collect, Counter, PROVIDER, Page},
        traces,
    },
};

/// How long facts are used, shortened at random. Endpoints change rarely, and every check causes a refused request at the vendor.
const FACTS_TTL: Duration = Duration::from_secs(6 * 3600);
/// How long a path that does not exist is not requested again. A vendor may add it one day.
const ABSENT_TTL: Duration = Duration::from_secs(3600);
/// The time for one request with a made-up key. A caller waits no longer than its own budget.
pub(super) const BUDGET: Duration = Duration::from_secs(10);
/// How many requests and base URLs are stored: far more than any catalogue has.
const MAX_ENTRIES: u64 = 10_000;
/// How many requests with made-up keys may be in flight at a time.
const MAX_FLIGHTS: usize = 64;

type Key = [u8; 32];

/// What is known of endpoints.
#[derive(Clone)]
pub(super) struct Endpoints {
    http: Arc<Http>,
    since: Instant,
    requests: moka::sync::Cache<Key, Arc<Mutex<RequestFacts>>>,
    bases: moka::sync::Cache<Key, Arc<Mutex<BaseFacts>>>,
    absent: moka::sync::Cache<Key, ()>,
    flights: Arc<SingleFlight<Key, CalibrationResult>>,
    metrics: Arc<Mutex<EndpointMetrics>>,
}

/// The facts about a base URL, and when they expire.
#[derive(Debug, Clone)]
struct BaseFacts {
    facts: EndpointFacts,
    until: Instant,
}

/// What the metrics page shows. Its labels come from the loaded documents, so there are few.
#[derive(Debug, Default)]
struct EndpointMetrics {
    /// The calibration state, by provider, host, probe and header.
    states: BTreeMap<[String; 4], u64>,
    /// Requests with a made-up key, by provider, header and result.
    sent: BTreeMap<[String; 3], Counter>,
    /// Whether there is no API at the base URL, by provider and host.
    no_api: BTreeMap<[String; 2], bool>,
}

/// What a calibration is about: the request, and the credential that the made-up key looks like.
#[derive(Clone, Copy)]
pub(super) struct CalibrationRequest<'a> {
    pub(super) call: &'a Call,
    /// The headers that carry the made-up key. With none, no key is sent.
    pub(super) families: &'a [HeaderFamily],
    pub(super) target: &'a Target,
    pub(super) secret: &'a Secret,
    pub(super) question: CalibrationQuestion,
}

/// The result of one made-up key: the model and form it was sent for, and how the endpoint answered.
#[derive(Debug, Clone)]
pub(super) struct CalibrationResult {
    model: String,
    form: KeyForm,
    calibration: Calibration,
}

/// A calibration that is known, or in flight.
enum CalibrationLookup {
    Known(Calibration),
    Pending(InFlight<CalibrationResult>),
}

// === impl Endpoints ===

impl Endpoints {
    pub(super) fn new(http: Arc<Http>) -> Self {
        let bounded = || moka::sync::Cache::builder().max_capacity(MAX_ENTRIES);
        Self {
            http,
            since: Instant::now(),
            requests: bounded().time_to_idle(2 * FACTS_TTL).build(),
            bases: moka::sync::Cache::builder().max_capacity(MAX_ENTRIES).build(),
            absent: moka::sync::Cache::builder().max_capacity(MAX_ENTRIES).time_to_live(ABSENT_TTL).build(),
            flights: SingleFlight::new(MAX_FLIGHTS, MAX_FLIGHTS),
            metrics: Arc::default(),
        }
    }

    /// In which headers this endpoint takes a credential, as far as that is known.
    pub(super) fn facts_of(&self, endpoint: &Endpoint) -> EndpointFacts {
        let known = self.bases.get(&endpoint.base_identity);
        known
            .map(|known| lock(&known).clone())
            .filter(|known| Instant::now() < known.until)
            .map_or_else(EndpointFacts::default, |known| known.facts)
    }

    /// Whether this request says nothing about a key: the endpoint accepts any key, or the path does not exist.
    pub(super) fn is_uninformative(&self, call: &Call, family: HeaderFamily) -> bool {
        self.absent.contains_key(&call.request)
            || self.known(call, &[family], CalibrationQuestion::Refusal) == Calibration::AcceptsAnyone
    }

    /// Whether the endpoint accepted a real key within the last hours.
    pub(super) fn has_accepted(&self, call: &Call, family: HeaderFamily) -> bool {
        let facts = self.requests.get(&key(call, &[family]));
        facts.is_some_and(|facts| lock(&facts).has_accepted(self.since.elapsed()))
    }

    /// How this request refuses keys, as far as that is known.
    pub(super) fn refusals(&self, call: &Call, family: HeaderFamily) -> KnownRefusals {
        let facts = self.requests.get(&key(call, &[family]));
        facts.map(|facts| lock(&facts).refusals(self.since.elapsed())).unwrap_or_default()
    }

    /// Stores what a probe has learnt.
    pub(super) fn learn(&self, endpoint: &Endpoint, lessons: Vec<Lesson>) {
        for lesson in lessons {
            match lesson {
                Lesson::Absent(request) => self.absent.insert(request, ()),
                Lesson::SameForEveryKey(request, families, shape) => {
                    if let Some(facts) = self.requests.get(&key_of(&request, &families)) {
                        lock(&facts).take_same_for_every_key(&shape, self.since.elapsed(), jitter());
                    }
                }
                Lesson::Family { right, wrong } => {
                    let now = Instant::now();
                    let fresh = || BaseFacts { facts: EndpointFacts::default(), until: now + FACTS_TTL.mul_f64(jitter()) };
                    let known = self.bases.get_with(endpoint.base_identity, || Arc::new(Mutex::new(fresh())));
                    let mut known = lock(&known);
                    if known.until <= now {
                        *known = fresh();
                    }
                    known.facts.take_family(right, &wrong);
                }
            }
        }
    }

    /// Records a probe's finding for the metrics page.
    pub(super) fn record_finding(&self, endpoint: &Endpoint, finding: &Finding) {
        let missing = finding.cause == Some(Cause::NoApiAtBaseUrl);
        let name = [endpoint.provider.clone(), endpoint.host.clone()];
        let mut metrics = lock(&self.metrics);
        // Only endpoints that once had no API have an entry.
        if missing || finding.status.is_some() && metrics.no_api.contains_key(&name) {
            clear_if_full(&mut metrics.no_api);
            metrics.no_api.insert(name, missing);
        }
    }

    /// Records that a real key was accepted.
    pub(super) fn record_acceptance(&self, call: &Call, families: &[HeaderFamily]) {
        let (facts, now) = (self.request(call, families), self.since.elapsed());
        lock(&facts).take_acceptance(&call.model, call.probe.refuses_bad_keys, now);
    }

    /// Records that a real key was refused with this 401.
    pub(super) fn record_refusal(&self, call: &Call, families: &[HeaderFamily], secret: &Secret, shape: &ResponseShape) {
        lock(&self.request(call, families)).take_refusal(KeyForm::of(secret), shape.body, self.since.elapsed());
    }

    /// Records the second answer to an accepted real key, which is sent again after a made-up key was refused. `None`: it was accepted again.
    pub(super) fn record_second_answer(&self, call: &Call, families: &[HeaderFamily], other: Option<ResponseShape>) {
        lock(&self.request(call, families)).take_second_answer(&call.model, other, self.since.elapsed(), jitter());
    }

    /// Copies the facts about a request with several headers to the same request with the right header alone.
    pub(super) fn copy_facts(&self, call: &Call, families: &[HeaderFamily], right: HeaderFamily) {
        let known = lock(&self.request(call, families)).clone();
        self.requests.insert(key(call, &[right]), Arc::new(Mutex::new(known)));
    }

    /// How the endpoint answers a made-up key that looks like this key, waited for until the deadline.
    pub(super) async fn calibrate(&self, request: CalibrationRequest<'_>, deadline: Instant) -> Calibration {
        let answers = |result: &CalibrationResult| match request.question {
            CalibrationQuestion::Refusal | CalibrationQuestion::RefusalNow | CalibrationQuestion::Check => true,
            CalibrationQuestion::Acceptance(_) if result.model != request.call.model => false,
            CalibrationQuestion::Acceptance(form) => {
                form.is_none_or(|form| form == result.form) || result.calibration == Calibration::AcceptsAnyone
            }
        };
        // The flight may be for another form or model. Then the next round starts one for this key.
        for _ in 0..3 {
            match self.start_calibration(request) {
                CalibrationLookup::Known(calibration) => return calibration,
                CalibrationLookup::Pending(flight) => match wait(flight, deadline).await {
                    FlightEnd::Completed(result) if answers(&result) => return result.calibration,
                    FlightEnd::Completed(_) => {}
                    FlightEnd::TimedOut { .. } | FlightEnd::Lost => return Calibration::Inconclusive(None),
                },
            }
        }
        Calibration::Inconclusive(None)
    }

    /// Starts a calibration in the background unless the answer is known. Returns what is known without waiting.
    pub(super) fn calibrate_in_background(&self, request: CalibrationRequest<'_>) -> Calibration {
        match self.start_calibration(request) {
            CalibrationLookup::Known(calibration) => calibration,
            CalibrationLookup::Pending(_) => Calibration::NotWaitedFor,
        }
    }

    /// Sends a made-up key, unless the answer is known or in flight.
    fn start_calibration(&self, request: CalibrationRequest<'_>) -> CalibrationLookup {
        let CalibrationRequest { call, families, target, secret, question } = request;
        let key = key(call, families);
        let facts = self.request(call, families);
        let launch = |_| {
            let (known, due) = {
                let (facts, now) = (lock(&facts), self.since.elapsed());
                (facts.calibration(&call.model, question, now), facts.is_due(&call.model, question, now))
            };
            if due {
                let sending = self.send_made_up_key(request, Arc::clone(&facts));
                Start::Run(sending.instrument(traces::calibration_span(target)))
            } else {
                let form = KeyForm::of(secret);
                Start::<_, Infallible, _>::Known(CalibrationResult { model: call.model.clone(), form, calibration: known })
            }
        };
        match self.flights.join(key, key, launch) {
            Join::Known(known) => CalibrationLookup::Known(known.calibration),
            Join::InFlight(flight) => CalibrationLookup::Pending(flight),
            Join::Full => CalibrationLookup::Known(Calibration::NotAsked),
        }
    }

    /// What is known without a request.
    pub(super) fn known(&self, call: &Call, families: &[HeaderFamily], question: CalibrationQuestion) -> Calibration {
        let facts = self.requests.get(&key(call, families));
        facts.map_or(Calibration::NotAsked, |facts| lock(&facts).calibration(&call.model, question, self.since.elapsed()))
    }

    fn request(&self, call: &Call, families: &[HeaderFamily]) -> Arc<Mutex<RequestFacts>> {
        self.requests.get_with(key(call, families), Arc::default)
    }

    fn send_made_up_key(
        &self,
        request: CalibrationRequest<'_>,
        facts: Arc<Mutex<RequestFacts>>,
    ) -> impl Future<Output = CalibrationResult> + Send + use<> {
        let CalibrationRequest { call, families, target, secret, question } = request;
        let (endpoints, call, families) = (self.clone(), call.clone(), families.to_vec());
        let (provider, host) = (target.endpoint.provider.clone(), target.endpoint.host.clone());
        let (made_up, form) = {
            let mut rng = rand::rng();
            made_up_key_like(secret, target.endpoint.key_prefix.as_deref(), |below| rng.random_range(0..below))
        };
        async move {
            let exchange = endpoints.http.exchange_with_retry(&call, &families, &made_up, Instant::now() + BUDGET).await;
            let calibration = match exchange {
                Exchange::Answered(response) => {
                    let (reading, shape) =
                        (read(response.facts(), &call.probe), ResponseShape::of(response.facts(), made_up.expose()));
                    // The answer to a request without a key is only compared, so its meaning is not read.
                    let seen = |shape| Calibration::Refuses { shape, in_words: false, by_code: false, confirmed: false };
                    if families.is_empty() { seen(shape) } else { calibration_of(&reading, &shape) }
                }
                Exchange::TimedOut | Exchange::Unreachable(_) | Exchange::Exhausted => Calibration::Inconclusive(None),
            };
            traces::record_calibration(&calibration);
            if !families.is_empty() {
                endpoints.count([provider, host, call.probe.name.clone(), header_of(&families)], &calibration);
            }
            let now = endpoints.since.elapsed();
            let calibration = lock(&facts).take_answer((&call.model, form, question), calibration, now, FACTS_TTL, jitter());
            CalibrationResult { model: call.model, form, calibration }
        }
    }

    fn count(&self, name: [String; 4], calibration: &Calibration) {
        let (number, result) = match calibration {
            Calibration::Refuses { in_words: true, .. } => (0, "refused"),
            Calibration::Inconclusive(_)
            | Calibration::SameForEveryKey(_)
            | Calibration::NotWaitedFor
            | Calibration::NotAsked => (1, "untold"),
            Calibration::AcceptsAnyone => (2, "accepted"),
            Calibration::Refuses { in_words: false, .. } => (3, "refused_oddly"),
        };
        let mut metrics = lock(&self.metrics);
        let [provider, _, _, header] = &name;
        clear_if_full(&mut metrics.sent);
        metrics.sent.entry([provider.clone(), header.clone(), result.to_owned()]).or_default().inc();
        clear_if_full(&mut metrics.states);
        metrics.states.insert(name, number);
    }
}

impl Collect for Endpoints {
    fn collect(&self, page: &mut Page) {
        let metrics = lock(&self.metrics);
        let mut states = page.gauge(
            "byokgate_calibration_state",
            "What the last made-up key got: 0 a clear refusal, 1 nothing conclusive, 2 accepted, so a yes proves nothing, 3 an unclear refusal",
        );
        for ([provider, host, probe, header], number) in &metrics.states {
            states.add(&[(PROVIDER, provider), ("host", host), ("probe", probe), ("header", header)], *number);
        }
        let mut sent = page.counter("byokgate_calibration_requests", "Made-up keys that were sent");
        for ([provider, header, result], count) in &metrics.sent {
            sent.add(&[(PROVIDER, provider), ("header", header), ("result", result)], count);
        }
        let mut no_api = page
            .gauge("byokgate_no_api_at_base_url", "1 if every key gets a page or no such path: there is no API at the base URL");
        for ([provider, host], missing) in &metrics.no_api {
            no_api.add(&[(PROVIDER, provider), ("host", host)], u64::from(*missing));
        }
    }
}

/// Clears the map when it is full: most of its labels are then from documents that are no longer loaded.
fn clear_if_full<K: Ord, V>(map: &mut BTreeMap<K, V>) {
    if map.len() as u64 >= MAX_ENTRIES {
        map.clear();
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A panic elsewhere cannot leave the value inconsistent: the code that changes it cannot panic.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn jitter() -> f64 {
    rand::rng().random_range(0.8..=1.0)
}

/// The header or headers of a request, as metrics and traces name them.
pub(super) fn header_of(families: &[HeaderFamily]) -> String {
    if families.is_empty() { "none".into() } else { families.iter().map(|family| family.as_str()).collect::<Vec<_>>().join("+") }
}

fn key(call: &Call, families: &[HeaderFamily]) -> Key {
    key_of(&call.request, families)
}

fn key_of(request: &[u8; 32], families: &[HeaderFamily]) -> Key {
    let mut hasher = blake3::Hasher::new();
    hasher.update(request);
    for family in families {
        hasher.update(family.as_str().as_bytes()).update(b" ");
    }
    *hasher.finalize().as_bytes()
}
