//! Makes one decision from start to end: evaluate, ask the provider if needed, apply the policy. There is no other pipeline; early ends apply the
//! policy too.

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
        evaluate::{Evaluation, Next, Resolved, Unresolved, alternative_models, evaluate, resolve},
        evaluation_log::{EvaluationLog, Trace},
        policy::{Facts, WrongHeader, apply},
        snapshot::Snapshot,
    },
    domain::{
        decision::{Decision, JudgedCredential, Liveness, Outcome, Seen, Warning},
        denial::{LivenessEvidence, Refusal, ShadowCause},
        protocol::HeaderFamily,
        request::Request,
        secret::{Secret, keyed_hash},
        verdict::{ServedFrom, Verdict, WarningCode},
    },
};

/// A boxed future, so that implementations can be stacked without naming their types.
pub type Boxed<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// Asks a provider about a credential. One probe, within its own time budget.
pub trait Prober: Send + Sync + 'static {
    /// Runs a probe to its end. The time is bounded by the prober itself, even if no caller waits any more.
    fn probe(&self, request: ProbeRequest) -> Boxed<'static, Finding>;

    /// How long a probe of this provider that was started now would wait in the queue. A prober without a queue returns zero.
    fn expected_wait(&self, _provider: &str) -> Duration {
        Duration::ZERO
    }

    /// How long the caller should wait before it asks about this credential again, after the queue was full.
    fn wait_before_retry(&self, _provider: &str, _credential: [u8; 32]) -> Duration {
        Duration::ZERO
    }
}

/// What a prober is asked.
#[derive(Debug)]
pub struct ProbeRequest {
    /// The requests to the provider.
    pub target: Arc<Target>,
    /// The credential's value.
    pub secret: Arc<Secret>,
    /// A keyed hash that tells this credential from others. The key is this process's own.
    pub credential: [u8; 32],
    /// A keyed hash that tells the organization from others; without one, the credential.
    pub source: [u8; 32],
    /// Set by the prober when the provider itself is asked, after any wait in the queue.
    pub started: ProbeStarted,
}

/// Whether the provider is being asked, or the probe still waits in the queue.
#[derive(Debug, Clone, Default)]
pub struct ProbeStarted(Arc<Progress>);

#[derive(Debug, Default)]
struct Progress {
    started: AtomicBool,
    answer_at: OnceLock<Instant>,
}

/// Knows about the liveness of credentials, from memory or by a probe.
pub trait LivenessSource: Send + Sync + 'static {
    /// The remembered observation, if it is not older than `max_age`. Most calls end here, without waiting. A source without a memory returns `None`.
    fn recall(&self, _query: &LivenessQuery<'_>, _max_age: Option<Duration>) -> Option<Observed> {
        None
    }

    /// An observation that is not older than `max_age`, by the deadline.
    fn observe<'a>(&'a self, query: LivenessQuery<'a>, max_age: Option<Duration>, deadline: Instant) -> Boxed<'a, Observed>;

    /// How long a probe of this provider that was started now would wait in the queue.
    fn expected_wait(&self, _provider: &str) -> Duration {
        Duration::ZERO
    }
}

/// An observation of a credential, remembered or new.
#[derive(Debug, Clone)]
pub struct Observed {
    /// The verdict with its evidence.
    pub finding: Arc<Finding>,
    /// When the provider answered.
    pub observed_at: SystemTime,
    /// The age of the observation.
    pub age: Duration,
    /// Where the observation came from.
    pub served_from: ServedFrom,
    /// Another replica of this service made the observation.
    pub shared: bool,
    /// When to ask again, if the verdict calls for it.
    pub retry_after: Duration,
    /// The newest VALID, if it is within the caller's and the hard maximum age and the credential was not refused since.
    pub earlier_valid: Option<EarlierValid>,
}

/// An earlier observation of VALID.
#[derive(Debug, Clone)]
pub struct EarlierValid {
    /// The verdict with its evidence.
    pub finding: Arc<Finding>,
    /// When the provider answered.
    pub observed_at: SystemTime,
    /// The age of the observation.
    pub age: Duration,
}

/// Makes decisions.
pub struct Engine {
    snapshot: ArcSwap<Snapshot>,
    liveness: Arc<dyn LivenessSource>,
    fingerprint_key: Option<[u8; 32]>,
}

/// A decision, with the versions of the documents that it was made by.
#[derive(Debug, Clone)]
pub struct Decided {
    /// The decision's id.
    pub id: Uuid,
    /// The decision.
    pub decision: Decision,
    /// The revision of the registry.
    pub registry_revision: Arc<str>,
    /// The revision of the catalogue.
    pub catalogue_revision: Arc<str>,
    /// What is known about the credential, if a provider was asked, now or earlier. The log uses it to say why the credential is not VALID. If the
    /// decision rests on an earlier VALID, this is the newer observation.
    pub finding: Option<Arc<Finding>>,
}

/// A decision for which a provider has to be asked.
struct Asking<'a> {
    log: EvaluationLog,
    query: LivenessQuery<'a>,
    /// Known already, if it is a refusal: the runtime goes on to the next credential.
    remembered: Option<Observed>,
    fallbacks: Vec<(LivenessQuery<'a>, JudgedCredential)>,
}

// === impl ProbeStarted ===

impl ProbeStarted {
    /// Records that the provider is being asked.
    pub fn set(&self) {
        self.0.started.store(true, Ordering::Relaxed);
    }

    /// Records when the answer is expected, while the probe waits in the queue.
    pub fn expect_answer_at(&self, at: Instant) {
        self.0.answer_at.get_or_init(|| at);
    }

    /// The expected time of the answer, as estimated when the wait began.
    pub fn answer_at(&self) -> Option<Instant> {
        self.0.answer_at.get().copied()
    }

    /// Whether the provider is being asked.
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

    /// Replaces the snapshot for the calls to come. Calls in progress keep theirs.
    pub fn swap(&self, snapshot: Snapshot) {
        self.snapshot.store(Arc::new(snapshot));
    }

    /// How long a decision that has to ask this provider would wait in the queue now.
    pub fn expected_wait(&self, provider: &str) -> Duration {
        self.liveness.expected_wait(provider)
    }

    /// Makes a decision by the deadline.
    pub async fn decide(&self, request: &Request, deadline: Instant) -> Box<Decided> {
        match self.decide_admitted(request, deadline, |_| ready(Ok::<_, Infallible>(()))).await {
            Ok(decided) => decided,
            Err(never) => match never {},
        }
    }

    /// Makes a decision by the deadline. A decision that has to wait for a provider acquires a permit first and holds it while it waits. Other
    /// decisions need none, so a provider that hangs does not hold them up.
    /// INVARIANT (one-snapshot): registry, catalogue and policy are taken once, together, for the whole call.
    pub async fn decide_admitted<P, E, F: Future<Output = Result<P, E>>>(
        &self,
        request: &Request,
        deadline: Instant,
        acquire_permit: impl FnOnce(Arc<Endpoint>) -> F,
    ) -> Result<Box<Decided>, E> {
        let (snapshot, now) = (self.snapshot(), SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default());
        match self.decide_from_memory(&snapshot, request, now) {
            Ok(decided) => Ok(decided),
            // On the heap, because most decisions come from memory and would carry the place for it along.
            Err(asking) => Box::pin(self.decide_by_asking(*asking, &snapshot, request, now, deadline, acquire_permit)).await,
        }
    }

    /// The decision, if no provider has to be asked for it.
    fn decide_from_memory<'a>(
        &self,
        snapshot: &'a Snapshot,
        request: &'a Request,
        now: Duration,
    ) -> Result<Box<Decided>, Box<Asking<'a>>> {
        let second = i64::try_from(now.as_secs()).unwrap_or(i64::MAX);
        let Evaluation { next, log } = evaluate(snapshot, request, second, &|secret| self.fingerprint(secret));
        match next {
            Next::Rule(facts) => Ok(conclude(snapshot, request, now, log, facts, None)),
            Next::Ask(queries) => {
                let LivenessQueries { first, fallbacks } = *queries;
                let remembered = self.liveness.recall(&first, request.max_liveness_age);
                match remembered.map(|observed| in_own_header(&first, observed)) {
                    // The runtime tries the next credential only after a refusal.
                    Some(observed) if fallbacks.is_empty() || observed.finding.verdict != Verdict::Invalid => {
                        Ok(conclude_on(snapshot, request, now, log, &first, observed))
                    }
                    remembered => Err(Box::new(Asking { log, query: first, remembered, fallbacks })),
                }
            }
        }
    }

    /// The decision after the providers were asked. Before it waits for the first time, it acquires the decision's permit.
    async fn decide_by_asking<P, E, F: Future<Output = Result<P, E>>>(
        &self,
        asking: Asking<'_>,
        snapshot: &Snapshot,
        request: &Request,
        now: Duration,
        deadline: Instant,
        acquire_permit: impl FnOnce(Arc<Endpoint>) -> F,
    ) -> Result<Box<Decided>, E> {
        let Asking { mut log, mut query, mut remembered, fallbacks } = asking;
        let (max_age, mut acquire_permit, mut permit) = (request.max_liveness_age, Some(acquire_permit), None);
        let mut fallbacks = fallbacks.into_iter();
        loop {
            let observed = match remembered {
                Some(observed) => observed,
                None => {
                    if let Some(acquire_permit) = acquire_permit.take() {
                        permit = Some(acquire_permit(Arc::clone(query.endpoint)).await?);
                    }
                    in_own_header(&query, self.liveness.observe(query.clone(), max_age, deadline).await)
                }
            };
            let refused = observed.finding.verdict == Verdict::Invalid;
            let Some((next, judged)) = fallbacks.next().filter(|_| refused) else {
                drop(permit);
                return Ok(conclude_on(snapshot, request, now, log, &query, observed));
            };
            log.trace.step("liveness", || describe(&query, &observed));
            log.warnings.push(refused_first(&query, next.env_name));
            log.resolution.credential = Some(judged);
            query = next;
            remembered = self.liveness.recall(&query, max_age).map(|observed| in_own_header(&query, observed));
        }
    }

    /// The owner of a model, by credential names alone.
    pub fn resolve(
        &self,
        runtime: &str,
        model: &str,
        available: &BTreeSet<String>,
    ) -> (Result<Resolved, Unresolved>, Arc<Snapshot>) {
        let snapshot = self.snapshot();
        (resolve(&snapshot, runtime, model, available), snapshot)
    }

    /// 8 hex digits under the configured key, by which a person recognises a credential. Empty if no key is configured.
    fn fingerprint(&self, secret: &Secret) -> String {
        self.fingerprint_key.map_or_else(String::new, |key| {
            let [one, two, three, four, ..] = keyed_hash(&key, secret.expose().as_bytes());
            format!("{:08x}", u32::from_be_bytes([one, two, three, four]))
        })
    }
}

/// The decision on an observation.
fn conclude_on(
    snapshot: &Snapshot,
    request: &Request,
    now: Duration,
    mut log: EvaluationLog,
    query: &LivenessQuery<'_>,
    observed: Observed,
) -> Box<Decided> {
    log.trace.step("liveness", || describe(query, &observed));
    let facts = to_facts(snapshot, query, &observed);
    conclude(snapshot, request, now, log, facts, Some((query, observed)))
}

/// The decision on these facts.
fn conclude(
    snapshot: &Snapshot,
    request: &Request,
    now: Duration,
    log: EvaluationLog,
    facts: Facts,
    seen: Option<(&LivenessQuery<'_>, Observed)>,
) -> Box<Decided> {
    let EvaluationLog { mut resolution, mut warnings, mut trace, relevant } = log;
    let finding = seen.as_ref().map(|(_, observed)| Arc::clone(&observed.finding));
    let unasked = if seen.is_none() { static_liveness(&facts) } else { None };
    let mut ruling = apply(facts, request.checkpoint, &snapshot.policy);
    let liveness = match seen {
        Some((query, observed)) => Some(to_liveness(query, observed, ruling.on_earlier_valid)),
        None => unasked,
    };
    warnings.append(&mut ruling.warnings);
    let outcome = ruling.into_outcome(|| alternative_models(snapshot, &request.spec));
    if let Outcome::Allow(allow) = &outcome {
        resolution.billing_mode = Some(allow.billing_mode());
    }
    trace_ruling(&mut trace, &outcome);
    // Boxed, because it passes through several futures and each would move all of it.
    Box::new(Decided {
        id: new_id(now),
        decision: Decision { outcome, resolution, liveness, warnings, trace: trace.into_steps(), relevant },
        registry_revision: snapshot.registry.shared_revision(),
        catalogue_revision: snapshot.catalogue.shared_revision(),
        finding,
    })
}

/// An id for a new decision at this Unix time, a UUID of version 7. Its random bits come from the thread's generator: the library would make a system
/// call for each decision.
fn new_id(now: Duration) -> Uuid {
    let millis = u64::try_from(now.as_millis()).unwrap_or(u64::MAX);
    uuid::Builder::from_unix_timestamp_millis(millis, &rand::random()).into_uuid()
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
        used_up: finding.used_up,
        unreached: finding.unreached,
        cut_short: finding.cut_short,
        retry_after: observed.retry_after,
        cause: finding.cause,
        tenant_endpoint: false,
        plan: plan_of(snapshot, query),
        model: query.model.to_owned(),
        save_as: query
            .context
            .place_of_unread
            .clone()
            .map_or_else(|| Some(snapshot.place(query.env_name)), |place| place.map(|place| *place)),
    };
    let enforcement = query.enforcement;
    match (&query.context.passed_over, finding.verdict) {
        (Some(passed_over), Verdict::Invalid | Verdict::Forbidden) => {
            let (sent, other) = (**passed_over).clone();
            let why = ShadowCause::Refused(Box::new(Refusal::Liveness(evidence.clone())));
            let provider = evidence.provider.clone();
            Facts::Shadowed {
                refusal: Box::new(Refusal::Shadowed { sent, why, other, replaceable: true, provider }),
                evidence: Box::new(evidence),
                enforcement,
            }
        }
        _ => Facts::NotValid {
            evidence: Box::new(evidence),
            served_from: Some(observed.served_from),
            recently_valid: observed.earlier_valid.is_some(),
            enforcement,
        },
    }
}

/// Versions of one program may send the same variable in different headers. Each of them counts as the workspace's own.
fn in_own_header(query: &LivenessQuery<'_>, observed: Observed) -> Observed {
    let finding = &observed.finding;
    if !finding.wrong_header || !finding.family.is_some_and(|family| query.context.own_headers.contains(&family)) {
        return observed;
    }
    let finding = Arc::new(Finding { wrong_header: false, ..Finding::clone(finding) });
    Observed { finding, ..observed }
}

/// The facts about a good key that was accepted in another header than the workspace uses. `None` if the header is right.
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
            // Under a name that belongs to another provider, the key would not reach this one.
            right_is_own: own_names.iter().any(|own| own == right_name),
        })
    });
    let usual = sent_in.map_or_else(|| "the header that its clients use by default".to_owned(), HeaderFamily::text);
    let message = format!("{host} accepts {env_name} in {}, and not in {usual}", accepted_in.text());
    Some(Facts::WrongHeader { evidence: WrongHeader { env_name, message, refusal }, enforcement: query.enforcement })
}

/// The plan that keys with this prefix belong to, if this provider is not for that plan.
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

/// The liveness to show if no provider was asked.
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

/// The liveness to show: the observation, or the earlier VALID that the ruling rests on. If the provider was not asked, nothing was observed.
fn to_liveness(query: &LivenessQuery<'_>, observed: Observed, on_earlier_valid: bool) -> Liveness {
    let Observed { finding, observed_at, age, served_from, earlier_valid, shared: _, retry_after: _ } = observed;
    let (finding, seen) = match earlier_valid {
        Some(earlier) if on_earlier_valid => {
            let seen = Seen { observed_at: earlier.observed_at, age: earlier.age, served_from: ServedFrom::Stale };
            (earlier.finding, Some(seen))
        }
        Some(_) | None => {
            let seen = finding.withheld.is_none().then_some(Seen { observed_at, age, served_from });
            (finding, seen)
        }
    };
    Liveness {
        verdict: finding.verdict,
        upstream_status: finding.status,
        endpoint_host: query.endpoint.host.clone(),
        probe: finding.probe.clone(),
        header: finding.family,
        cause: finding.cause,
        seen,
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
