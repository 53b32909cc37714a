//! One decision, end to end: assess, ask if need be, rule. The only pipeline; every early exit passes `policy::apply` too.

use std::{
    collections::BTreeSet,
    convert::Infallible,
    future::{Future, ready},
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use arc_swap::ArcSwap;
use tokio::time::Instant;
use uuid::Uuid;

use crate::{
    core::{
        classify::Finding,
        endpoint::{Endpoint, Target},
        evaluate::{LivenessQuery, Next, Resolved, Trace, Unresolved, alternative_models, evaluate, resolve},
        policy::{Facts, apply},
        snapshot::Snapshot,
    },
    domain::{
        decision::{Decision, Liveness, Outcome, Seen},
        denial::LivenessEvidence,
        request::Request,
        secret::{Secret, with_stack_wiped},
        verdict::{ServedFrom, Verdict},
    },
};

/// A future on the heap, so that sources can be stacked without naming their types.
pub type Boxed<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// Asks a provider about a credential: one walk up the ladder, within its own time budget.
pub trait Prober: Send + Sync + 'static {
    /// What came of it. Bounds its own time, whoever waits.
    fn probe(&self, request: ProbeRequest) -> Boxed<'static, Finding>;
}

/// What is asked.
#[derive(Debug)]
pub struct ProbeRequest {
    /// Whom and how.
    pub target: Arc<Target>,
    /// About which credential.
    pub secret: Arc<Secret>,
    /// To be told when the provider itself is asked, after what waiting there was.
    pub started: ProbeStarted,
}

/// Whether the provider itself is being asked, or the question still waits for its turn.
#[derive(Debug, Clone, Default)]
pub struct ProbeStarted(Arc<AtomicBool>);

/// What is known of a credential's liveness, remembered or asked.
pub trait LivenessSource: Send + Sync + 'static {
    /// What is remembered, if it is no older than wanted. Most calls end here, without anything to wait for. A source that
    /// remembers nothing has nothing to recall.
    fn recall(&self, _inquiry: &LivenessQuery<'_>, _max_age: Option<Duration>) -> Option<Observed> {
        None
    }

    /// An observation no older than wanted, by the deadline.
    fn observe<'a>(&'a self, query: LivenessQuery<'a>, max_age: Option<Duration>, deadline: Instant) -> Boxed<'a, Observed>;
}

/// What was observed, or remembered.
#[derive(Debug, Clone)]
pub struct Observed {
    /// The verdict and its evidence.
    pub finding: Arc<Finding>,
    /// When the provider answered.
    pub observed_at: SystemTime,
    /// How old that is.
    pub age: Duration,
    /// Where it came from.
    pub served_from: ServedFrom,
    /// When to ask again, if the verdict calls for it.
    pub retry_after: Duration,
    /// The newest VALID within the hard maximum age and the caller's, unless it was refused since.
    pub earlier_valid: Option<EarlierValid>,
}

/// An earlier VALID observation.
#[derive(Debug, Clone)]
pub struct EarlierValid {
    /// Its evidence.
    pub finding: Arc<Finding>,
    /// When the provider answered.
    pub observed_at: SystemTime,
    /// How old that is.
    pub age: Duration,
}

/// The service's core.
pub struct Engine {
    snapshot: ArcSwap<Snapshot>,
    liveness: Arc<dyn LivenessSource>,
    fingerprint_key: Option<[u8; 32]>,
}

/// A decision, and which versions made it.
#[derive(Debug, Clone)]
pub struct Decided {
    /// The decision's id.
    pub id: Uuid,
    /// The decision.
    pub decision: Decision,
    /// The registry that decided.
    pub registry_revision: String,
    /// The catalogue that decided.
    pub catalogue_revision: String,
}

// === impl ProbeStarted ===

impl ProbeStarted {
    /// From now on the provider is asked.
    pub fn set(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    /// It is.
    pub fn is_set(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

// === impl Engine ===

impl Engine {
    /// An engine that decides by this snapshot.
    pub fn new(snapshot: Snapshot, liveness: Arc<dyn LivenessSource>, fingerprint_key: Option<[u8; 32]>) -> Self {
        Self { snapshot: ArcSwap::from_pointee(snapshot), liveness, fingerprint_key }
    }

    /// The snapshot that the next call will use.
    pub fn snapshot(&self) -> Arc<Snapshot> {
        self.snapshot.load_full()
    }

    /// Decides by this snapshot from the next call on. Calls under way keep theirs.
    pub fn swap(&self, snapshot: Snapshot) {
        self.snapshot.store(Arc::new(snapshot));
    }

    /// Decides, by the deadline.
    pub async fn decide(&self, request: &Request, deadline: Instant) -> Decided {
        match self.decide_admitted(request, deadline, |_| ready(Ok::<_, Infallible>(()))).await {
            Ok(decided) => decided,
            Err(never) => match never {},
        }
    }

    /// Decides, by the deadline. A decision that has to wait for a provider takes a place for that first, and for as long as it waits; all
    /// others take none, so that a provider that hangs costs them nothing.
    /// INVARIANT (one-snapshot): registry, catalogue and policy are taken once, together, for the whole call.
    pub async fn decide_admitted<P, E, F: Future<Output = Result<P, E>>>(
        &self,
        request: &Request,
        deadline: Instant,
        place: impl FnOnce(Arc<Endpoint>) -> F,
    ) -> Result<Decided, E> {
        let snapshot = self.snapshot();
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        let evaluation = evaluate(&snapshot, request, i64::try_from(now).unwrap_or(i64::MAX), &|secret| self.fingerprint(secret));
        let mut trace = evaluation.trace;
        let (facts, seen) = match evaluation.next {
            Next::Rule(facts) => (facts, None),
            Next::Ask(query) => {
                let observed = match self.liveness.recall(&query, request.max_liveness_age) {
                    Some(observed) => observed,
                    None => {
                        let _place = place(Arc::clone(query.endpoint)).await?;
                        self.liveness.observe(query, request.max_liveness_age, deadline).await
                    }
                };
                trace.step("liveness", || describe(&query, &observed));
                (to_facts(&query, &observed), Some((query, observed)))
            }
        };
        let static_liveness = static_liveness(&facts);
        let ruling = apply(facts, request.checkpoint, &snapshot.policy);
        let liveness = seen.map(|(query, observed)| to_liveness(&query, observed, ruling.on_earlier_valid)).or(static_liveness);
        let mut warnings = evaluation.warnings;
        warnings.extend(ruling.warnings.iter().cloned());
        let mut resolution = evaluation.resolution;
        let outcome = ruling.into_outcome(|| alternative_models(&snapshot, &request.spec));
        if let Outcome::Allow(allow) = &outcome {
            resolution.billing_mode = Some(allow.billing_mode());
        }
        trace_ruling(&mut trace, &outcome);
        Ok(Decided {
            id: new_id(),
            decision: Decision {
                outcome,
                resolution,
                liveness,
                warnings,
                trace: trace.into_steps(),
                relevant: evaluation.relevant,
            },
            registry_revision: snapshot.registry.revision().to_owned(),
            catalogue_revision: snapshot.catalogue.revision().to_owned(),
        })
    }

    /// Who owns a model, by names alone.
    pub fn resolve(
        &self,
        runtime: &str,
        model: &str,
        at_hand: &BTreeSet<String>,
    ) -> (Result<Resolved, Unresolved>, Arc<Snapshot>) {
        let snapshot = self.snapshot();
        (resolve(&snapshot, runtime, model, at_hand), snapshot)
    }

    /// 8 hex digits under the configured key, so that a person can tell which key was judged; nothing without one.
    fn fingerprint(&self, secret: &Secret) -> String {
        self.fingerprint_key.map_or_else(String::new, |key| {
            with_stack_wiped(|| blake3::keyed_hash(&key, secret.expose().as_bytes())).to_hex().chars().take(8).collect()
        })
    }
}

/// A new decision's id, of UUID's version 7. Its random bits come from the thread's generator: the library would ask the kernel for
/// them, a system call for each decision.
fn new_id() -> Uuid {
    let millis = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis());
    uuid::Builder::from_unix_timestamp_millis(u64::try_from(millis).unwrap_or(u64::MAX), &rand::random()).into_uuid()
}

fn to_facts(query: &LivenessQuery<'_>, observed: &Observed) -> Facts {
    if observed.finding.verdict == Verdict::Valid {
        return Facts::Valid;
    }
    Facts::NotValid {
        evidence: LivenessEvidence {
            verdict: observed.finding.verdict,
            env_name: query.env_name.to_owned(),
            provider: query.endpoint.provider.clone(),
            host: query.endpoint.host.clone(),
            upstream_status: observed.finding.status,
            siblings: query.endpoint.siblings.clone(),
            withheld: observed.finding.withheld,
            unreached: observed.finding.unreached,
            retry_after: observed.retry_after,
        },
        served_from: Some(observed.served_from),
        recently_valid: observed.earlier_valid.is_some(),
        enforcement: query.enforcement,
    }
}

/// What is shown where nothing was asked.
fn static_liveness(facts: &Facts) -> Option<Liveness> {
    match facts {
        Facts::NotValid { evidence, served_from: None, .. } => Some(Liveness {
            verdict: evidence.verdict,
            upstream_status: None,
            endpoint_host: evidence.host.clone(),
            probe: String::new(),
            seen: None,
        }),
        Facts::Valid
        | Facts::NotValid { .. }
        | Facts::Refused(_)
        | Facts::OverrideDisabled
        | Facts::ExemptRuntime
        | Facts::Platform { .. } => None,
    }
}

/// What is shown: what was observed, or the earlier VALID that the ruling rests on.
fn to_liveness(query: &LivenessQuery<'_>, observed: Observed, on_earlier_valid: bool) -> Liveness {
    let Observed { finding, observed_at, age, served_from, earlier_valid, retry_after: _ } = observed;
    let (finding, seen) = match earlier_valid {
        Some(earlier) if on_earlier_valid => {
            (earlier.finding, Seen { observed_at: earlier.observed_at, age: earlier.age, served_from: ServedFrom::Stale })
        }
        Some(_) | None => (finding, Seen { observed_at, age, served_from }),
    };
    Liveness {
        verdict: finding.verdict,
        upstream_status: finding.status,
        endpoint_host: query.endpoint.host.clone(),
        probe: finding.probe.clone(),
        seen: Some(seen),
    }
}

fn describe(query: &LivenessQuery<'_>, observed: &Observed) -> String {
    let Finding { verdict, status, probe, .. } = &*observed.finding;
    let status = status.map_or_else(|| "no status".to_owned(), |status| format!("HTTP {status}"));
    format!(
        "{verdict} from {} (probe `{probe}`, {status}, served from {}, {} ms old{})",
        query.endpoint.host,
        observed.served_from,
        observed.age.as_millis(),
        observed.finding.why()
    )
}

fn trace_ruling(trace: &mut Trace, outcome: &Outcome) {
    trace.step("policy", || match outcome {
        Outcome::Allow(allow) => format!("allow, billing {}", allow.billing_mode()),
        Outcome::Deny(deny) => format!("deny, {}", deny.refusal.code()),
    });
}
