//! Does this endpoint refuse a made-up credential? Asked once per endpoint in hours, never on a caller's time.

use std::{
    collections::BTreeMap,
    convert::Infallible,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use rand::{Rng, distr::Alphanumeric};
use tokio::time::Instant;
use tracing::Instrument;

use super::{Exchange, Http};
use crate::{
    core::{
        classify::{Calibration, calibrated},
        endpoint::{Call, Target},
    },
    domain::{protocol::HeaderFamily, secret::Secret},
    liveness::single_flight::{FlightEnd, InFlight, Join, SingleFlight, Start, wait},
    telemetry::{
        metrics::{Measured, PROVIDER, Page},
        traces,
    },
};

/// How long a calibration is good for, jittered downwards: endpoints change rarely, and every check is a refused request.
const GOOD_FOR: Duration = Duration::from_secs(6 * 3600);
/// The wait after one that told nothing (429, 5xx, no answer); doubled each time, up to the maximum.
const BACK_OFF: Duration = Duration::from_secs(60);
const MAX_BACK_OFF: Duration = Duration::from_secs(3600);
/// The time for one made-up request. Nobody waits for longer than their own budget.
const BUDGET: Duration = Duration::from_secs(10);
/// How many endpoints are remembered: far more than any catalogue has.
const MAX_ENDPOINTS: u64 = 10_000;
/// How many may be under way at a time.
const MAX_FLIGHTS: usize = 64;
/// The random part of a made-up key.
const RANDOM_CHARACTERS: usize = 48;
/// How a key begins where the catalogue does not know.
const USUAL_PREFIX: &str = "sk-";

type Key = [u8; 32];

/// What is known of endpoints.
#[derive(Clone)]
pub(super) struct Calibrations {
    http: Arc<Http>,
    known: moka::sync::Cache<Key, Known>,
    flights: Arc<SingleFlight<Key, Known>>,
    shown: Arc<Mutex<BTreeMap<Shown, u64>>>,
}

/// What the newest calibration is shown under: names of the loaded documents, so there are few.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Shown {
    provider: String,
    host: String,
    probe: String,
}

#[derive(Debug, Clone)]
pub(super) struct Known {
    calibration: Calibration,
    until: Instant,
    /// How often in a row it told nothing.
    misses: u32,
}

/// The calibration of one endpoint, not begun yet.
pub(super) struct Calibrating<'c> {
    calibrations: &'c Calibrations,
    call: &'c Call,
    family: HeaderFamily,
    target: &'c Target,
}

/// One that is known or under way.
pub(super) enum Asked {
    Known(Calibration),
    UnderWay(InFlight<Known>),
}

// === impl Calibrations ===

impl Calibrations {
    pub(super) fn new(http: Arc<Http>) -> Self {
        let known = moka::sync::Cache::builder().max_capacity(MAX_ENDPOINTS).time_to_live(GOOD_FOR).build();
        Self { http, known, flights: SingleFlight::new(MAX_FLIGHTS, MAX_FLIGHTS), shown: Arc::default() }
    }

    pub(super) fn of<'c>(&'c self, call: &'c Call, family: HeaderFamily, target: &'c Target) -> Calibrating<'c> {
        Calibrating { calibrations: self, call, family, target }
    }

    fn show(&self, shown: Shown, calibration: &Calibration) {
        let number = match calibration {
            Calibration::Refuses { .. } => 0,
            Calibration::Unknown => 1,
            Calibration::AcceptsAnything => 2,
        };
        // A panic elsewhere cannot leave the map half-changed: every change to it is one call.
        let mut all = self.shown.lock().unwrap_or_else(PoisonError::into_inner);
        if all.len() as u64 >= MAX_ENDPOINTS && !all.contains_key(&shown) {
            // Names of documents that are no longer loaded: they are forgotten together.
            all.clear();
        }
        all.insert(shown, number);
    }

    fn current(&self, key: Key) -> Option<Known> {
        self.known.get(&key).filter(|known| Instant::now() < known.until)
    }
}

impl Measured for Calibrations {
    fn tell(&self, page: &mut Page) {
        let mut states = page.gauge(
            "byokgate_calibration_state",
            "0 the endpoint refused a made-up key, 1 it could not be told, 2 it accepts anything: its yes proves nothing",
        );
        for (Shown { provider, host, probe }, number) in self.shown.lock().unwrap_or_else(PoisonError::into_inner).iter() {
            states.add(&[(PROVIDER, provider), ("host", host), ("probe", probe)], *number);
        }
    }
}

// === impl Calibrating ===

impl Calibrating<'_> {
    /// Begins it, unless it is known or under way.
    pub(super) fn begin(&self) -> Asked {
        let Calibrations { flights, .. } = self.calibrations;
        let key = self.key();
        let launch = |_| match self.calibrations.current(key) {
            Some(known) => Start::<_, Infallible, _>::Known(known),
            None => Start::Run(self.fly(key).instrument(traces::calibrate(self.target))),
        };
        match flights.join(key, key, launch) {
            Join::Known(known) => Asked::Known(known.calibration),
            Join::InFlight(flight) => Asked::UnderWay(flight),
            Join::Full => Asked::Known(Calibration::Unknown),
        }
    }

    fn fly(&self, key: Key) -> impl Future<Output = Known> + Send + 'static {
        let calibrations = self.calibrations.clone();
        let (call, family) = (self.call.clone(), self.family);
        let target = self.target;
        let (provider, host, probe) = (target.endpoint.provider.clone(), target.endpoint.host.clone(), call.probe.name.clone());
        let made_up = made_up_key(target.endpoint.key_prefix.as_deref().unwrap_or(USUAL_PREFIX));
        async move {
            let Calibrations { http, known, .. } = &calibrations;
            let calibration = match http.exchange(&call, family, &made_up, Instant::now() + BUDGET).await {
                Exchange::Answered(response) => calibrated(response.facts(), &call.probe),
                Exchange::TimedOut | Exchange::Unreachable(_) => Calibration::Unknown,
            };
            traces::calibrated(&calibration);
            let (misses, good_for) = match calibration {
                Calibration::Unknown => {
                    let misses = known.get(&key).map_or(0, |known: Known| known.misses).saturating_add(1);
                    let doubled = BACK_OFF.saturating_mul(2_u32.saturating_pow(misses.saturating_sub(1)));
                    (misses, doubled.min(MAX_BACK_OFF))
                }
                Calibration::Refuses { .. } | Calibration::AcceptsAnything => (0, GOOD_FOR),
            };
            let jittered = good_for.mul_f64(rand::rng().random_range(0.8..=1.0));
            let result = Known { calibration, until: Instant::now() + jittered, misses };
            known.insert(key, result.clone());
            calibrations.show(Shown { provider, host, probe }, &result.calibration);
            result
        }
    }

    /// Endpoint, row and header; the model too where the call names it.
    fn key(&self) -> Key {
        let mut hasher = blake3::Hasher::new();
        hasher.update(&self.call.probe.fingerprint);
        for part in [self.call.url.as_str(), self.family.as_str(), self.call.body.as_deref().unwrap_or_default()] {
            hasher.update(&part.len().to_le_bytes()).update(part.as_bytes());
        }
        *hasher.finalize().as_bytes()
    }
}

// === impl Asked ===

impl Asked {
    /// What it came to by the deadline.
    pub(super) async fn by(self, deadline: Instant) -> Calibration {
        match self {
            Self::Known(calibration) => calibration,
            Self::UnderWay(flight) => match wait(flight, deadline).await {
                FlightEnd::Completed(known) => known.calibration,
                FlightEnd::TimedOut { .. } | FlightEnd::Lost => Calibration::Unknown,
            },
        }
    }

    /// What is known without waiting.
    pub(super) fn so_far(self) -> Calibration {
        match self {
            Self::Known(calibration) => calibration,
            Self::UnderWay(_) => Calibration::Unknown,
        }
    }
}

/// A key of the vendor's shape that nobody issued.
fn made_up_key(prefix: &str) -> Secret {
    let random = rand::rng().sample_iter(Alphanumeric).take(RANDOM_CHARACTERS).map(char::from);
    Secret::new(prefix.chars().chain(random).collect())
}
