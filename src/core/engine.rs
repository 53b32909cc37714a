//! One decision, end to end: assess, ask if need be, rule. The only pipeline; every early exit passes `policy::apply` too.

use std::{
    collections::BTreeSet,
    convert::Infallible,
    future::{Future, ready},
    pin::Pin,
    sync::{
        Arc, OnceLock,
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
        credential::{LivenessQueries, LivenessQuery, QueryContext},
        endpoint::{Endpoint, Target},
        evaluate::{Next, Resolved, Unresolved, alternative_models, evaluate, resolve},
        evaluation_log::Trace,
        policy::{Facts, WrongHeader, apply},
        snapshot::Snapshot,
    },
    domain::{
        decision::{Decision, Liveness, Outcome, Seen, Warning},
        denial::{LivenessEvidence, Refusal, ShadowCause},
        request::Request,
        secret::{Secret, with_stack_wiped},
        verdict::{ServedFrom, Verdict, WarningCode},
    },
};

/// A future on the heap, so that sources can be stacked without naming their types.
pub type Boxed<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// Asks a provider about a credential: one walk up the ladder, within its own time budget.
pub trait Prober: Send + Sync + 'static {
    /// What came of it. Bounds its own time, whoever waits.
    fn probe(&self, request: ProbeRequest) -> Boxed<'static, Finding>;

    /// How long a question to this provider that came now would wait for its turn. Whoever lets nobody wait has nothing to say.
    fn expected_wait(&self, _provider: &str) -> Duration {
        Duration::ZERO
    }

    /// How long a question about this credential that was not taken is to stay away: until its turn behind a full queue.
    fn turn(&self, _provider: &str, _credential: [u8; 32]) -> Duration {
        Duration::ZERO
    }
}

/// What is asked.
#[derive(Debug)]
pub struct ProbeRequest {
    /// Whom and how.
    pub target: Arc<Target>,
    /// About which credential.
    pub secret: Arc<Secret>,
    /// Tells it from others: a hash under a key of this process.
    pub credential: [u8; 32],
    /// To be told when the provider itself is asked, after what waiting there was.
    pub started: ProbeStarted,
}

/// Whether the provider itself is being asked, or the question still waits for its turn.
#[derive(Debug, Clone, Default)]
pub struct ProbeStarted(Arc<Progress>);

#[derive(Debug, Default)]
struct Progress {
    started: AtomicBool,
    answer_at: OnceLock<Instant>,
}

/// What is known of a credential's liveness, remembered or asked.
pub trait LivenessSource: Send + Sync + 'static {
    /// What is remembered, if it is no older than wanted. Most calls end here, without anything to wait for. A source that
    /// remembers nothing has nothing to recall.
    fn recall(&self, _query: &LivenessQuery<'_>, _max_age: Option<Duration>) -> Option<Observed> {
        None
    }

    /// An observation no older than wanted, by the deadline.
    fn observe<'a>(&'a self, query: LivenessQuery<'a>, max_age: Option<Duration>, deadline: Instant) -> Boxed<'a, Observed>;

    /// How long a question to this provider that came now would wait for its turn.
    fn expected_wait(&self, _provider: &str) -> Duration {
        Duration::ZERO
    }
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
    /// Another replica of this service has observed it.
    pub shared: bool,
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
    /// What was heard of the credential, where somebody was asked, now or before: why it is not VALID, for the log. An allow that rests on
    /// an earlier VALID has here what was heard since.
    pub finding: Option<Arc<Finding>>,
}

// === impl ProbeStarted ===

impl ProbeStarted {
    /// From now on the provider is asked.
    pub fn set(&self) {
        self.0.started.store(true, Ordering::Relaxed);
    }

    /// While it waits for its turn: when its answer is expected.
    pub fn expect_answer_at(&self, at: Instant) {
        self.0.answer_at.get_or_init(|| at);
    }

    /// When its answer was expected, as it began to wait.
    pub fn answer_at(&self) -> Option<Instant> {
        self.0.answer_at.get().copied()
    }

    /// It is.
    pub fn is_set(&self) -> bool {
        self.0.started.load(Ordering::Relaxed)
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

    /// How long a decision that has to ask this provider would wait for its turn now.
    pub fn expected_wait(&self, provider: &str) -> Duration {
        self.liveness.expected_wait(provider)
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
        acquire_permit: impl FnOnce(Arc<Endpoint>) -> F,
    ) -> Result<Decided, E> {
        let snapshot = self.snapshot();
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        let evaluation = evaluate(&snapshot, request, i64::try_from(now).unwrap_or(i64::MAX), &|secret| self.fingerprint(secret));
        let (mut trace, mut resolution, mut warnings) = (evaluation.trace, evaluation.resolution, evaluation.warnings);
        let (facts, seen) = match evaluation.next {
            Next::Rule(facts) => (facts, None),
            Next::Ask(LivenessQueries { first, fallbacks }) => {
                let mut acquire_permit = Some(acquire_permit);
                let mut permit = None;
                let mut query = first;
                let mut observed = self.ask(&query, request.max_liveness_age, deadline, &mut acquire_permit, &mut permit).await?;
                for (next, judged) in fallbacks {
                    // The runtime goes on to the next credential where one is refused, and there alone.
                    if observed.finding.verdict != Verdict::Invalid {
                        break;
                    }
                    trace.step("liveness", || describe(&query, &observed));
                    warnings.push(refused_first(&query, next.env_name));
                    observed = self.ask(&next, request.max_liveness_age, deadline, &mut acquire_permit, &mut permit).await?;
                    resolution.credential = Some(judged);
                    query = next;
                }
                trace.step("liveness", || describe(&query, &observed));
                (to_facts(&snapshot, &query, &observed), Some((query, observed)))
            }
        };
        let finding = seen.as_ref().map(|(_, observed)| Arc::clone(&observed.finding));
        let static_liveness = static_liveness(&facts);
        let ruling = apply(facts, request.checkpoint, &snapshot.policy);
        let liveness = seen.map(|(query, observed)| to_liveness(&query, observed, ruling.on_earlier_valid)).or(static_liveness);
        warnings.extend(ruling.warnings.iter().cloned());
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
            finding,
        })
    }

    /// What is remembered, or observed now: with a place for the waiting, which is taken once for a decision.
    async fn ask<P, E, F: Future<Output = Result<P, E>>>(
        &self,
        query: &LivenessQuery<'_>,
        max_age: Option<Duration>,
        deadline: Instant,
        acquire_permit: &mut Option<impl FnOnce(Arc<Endpoint>) -> F>,
        permit: &mut Option<P>,
    ) -> Result<Observed, E> {
        if let Some(observed) = self.liveness.recall(query, max_age) {
            return Ok(in_own_header(query, observed));
        }
        if let Some(acquire_permit) = acquire_permit.take() {
            *permit = Some(acquire_permit(Arc::clone(query.endpoint)).await?);
        }
        Ok(in_own_header(query, self.liveness.observe(query.clone(), max_age, deadline).await))
    }

    /// Who owns a model, by names alone.
    pub fn resolve(
        &self,
        runtime: &str,
        model: &str,
        available: &BTreeSet<String>,
    ) -> (Result<Resolved, Unresolved>, Arc<Snapshot>) {
        let snapshot = self.snapshot();
        (resolve(&snapshot, runtime, model, available), snapshot)
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

fn to_facts(snapshot: &Snapshot, query: &LivenessQuery<'_>, observed: &Observed) -> Facts {
    let Observed { finding, .. } = observed;
    if finding.verdict == Verdict::Valid {
        return wrong_header(query, finding).unwrap_or(Facts::Valid);
    }
    let evidence = LivenessEvidence {
        verdict: finding.verdict,
        env_name: query.env_name.to_owned(),
        provider: query.endpoint.provider.clone(),
        host: query.endpoint.host.clone(),
        upstream_status: finding.status,
        siblings: query.endpoint.siblings.clone(),
        withheld: finding.withheld,
        unreached: finding.unreached,
        retry_after: observed.retry_after,
        cause: finding.cause,
        tenant_endpoint: false,
        plan: plan_of(snapshot, query),
        model: query.model.to_owned(),
        save_as: query.context.place_of_unread.clone().unwrap_or_else(|| Some(snapshot.place(query.env_name))),
    };
    let enforcement = query.enforcement;
    match (&query.context.passed_over, finding.verdict) {
        (Some((sent, other)), Verdict::Invalid | Verdict::Forbidden) => {
            let why = ShadowCause::Refused(Box::new(Refusal::Liveness(evidence.clone())));
            let (sent, other, provider) = (sent.clone(), other.clone(), evidence.provider.clone());
            Facts::Shadowed {
                refusal: Box::new(Refusal::Shadowed { sent, why, other, replaceable: true, provider }),
                evidence,
                enforcement,
            }
        }
        _ => Facts::NotValid {
            evidence,
            served_from: Some(observed.served_from),
            recently_valid: observed.earlier_valid.is_some(),
            enforcement,
        },
    }
}

/// Versions of one program send the same variable in different headers: each of them is the workspace's own.
fn in_own_header(query: &LivenessQuery<'_>, observed: Observed) -> Observed {
    let finding = &observed.finding;
    if !finding.wrong_header || !finding.family.is_some_and(|family| query.context.own_headers.contains(&family)) {
        return observed;
    }
    let finding = Arc::new(Finding { wrong_header: false, ..Finding::clone(finding) });
    Observed { finding, ..observed }
}

/// A good key that was accepted in another header than the workspace's own.
fn wrong_header(query: &LivenessQuery<'_>, finding: &Finding) -> Option<Facts> {
    let accepted_in = finding.family.filter(|_| finding.wrong_header)?;
    let QueryContext { own_headers, own_names, facts, .. } = &query.context;
    let (env_name, host) = (query.env_name.to_owned(), query.endpoint.host.clone());
    let sent_in = own_headers.first().copied();
    let right_name = facts.and_then(|facts| facts.name_for(accepted_in)).filter(|name| *name != env_name);
    let refusal = sent_in.zip(right_name).map(|(sent_in, right_name)| {
        Box::new(Refusal::WrongName {
            env_name: env_name.clone(),
            provider: query.endpoint.provider.clone(),
            host: host.clone(),
            sent_in,
            accepted_in,
            right_name: right_name.to_owned(),
            // A name of somebody else's would leave the workspace without a credential.
            right_is_own: own_names.iter().any(|own| own == right_name),
        })
    });
    let usual = sent_in
        .map_or_else(|| "its clients use by default".to_owned(), |family| format!("the runtime uses (`{}`)", family.as_str()));
    let message = format!("{host} accepts {env_name} as `{}`, and not in the header that {usual}", accepted_in.as_str());
    Some(Facts::WrongHeader { evidence: WrongHeader { env_name, message, refusal }, enforcement: query.enforcement })
}

/// The plan whose keys begin so, if this provider is none of those that are for it.
fn plan_of(snapshot: &Snapshot, query: &LivenessQuery<'_>) -> Option<(String, Vec<String>)> {
    let shape = snapshot.catalogue.shapes_of(query.secret.expose()).first()?;
    let plan = shape.plan.clone()?;
    (!shape.providers.contains(&query.endpoint.provider)).then(|| (plan, shape.providers.clone()))
}

fn refused_first(query: &LivenessQuery<'_>, next: &str) -> Warning {
    Warning {
        code: WarningCode::ConflictingCredential,
        message: format!(
            "{} refused {}; the runtime goes on to {next}: remove {}",
            query.endpoint.host, query.env_name, query.env_name
        ),
        env_names: vec![query.env_name.to_owned()],
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
            header: None,
            cause: None,
            seen: None,
        }),
        Facts::Valid
        | Facts::WrongHeader { .. }
        | Facts::Shadowed { .. }
        | Facts::NotValid { .. }
        | Facts::Refused(_)
        | Facts::OverrideDisabled
        | Facts::ExemptRuntime
        | Facts::Platform { .. } => None,
    }
}

/// What is shown: what was observed, or the earlier VALID that the ruling rests on.
fn to_liveness(query: &LivenessQuery<'_>, observed: Observed, on_earlier_valid: bool) -> Liveness {
    let Observed { finding, observed_at, age, served_from, earlier_valid, shared: _, retry_after: _ } = observed;
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
        header: finding.family,
        cause: finding.cause,
        seen: Some(seen),
    }
}

fn describe(query: &LivenessQuery<'_>, observed: &Observed) -> String {
    let Finding { verdict, status, probe, .. } = &*observed.finding;
    let status = status.map_or_else(|| "no status".to_owned(), |status| format!("HTTP {status}"));
    format!(
        "{verdict} from {} (probe `{probe}`, {status}, served from {}{}, {} ms old{})",
        query.endpoint.host,
        observed.served_from,
        if observed.shared { ", shared" } else { "" },
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
