//! The status of a running service. It is built on request from the metrics, the loaded documents and the last decisions. The status page, its
//! JSON and the `status` command show the same.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    sync::{Mutex, PoisonError},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use serde::{Deserialize, Serialize};

use super::{
    cause,
    metrics::{PROVIDER, Page, process, reloads::FollowedFiles},
    recent_changes::Change,
    recent_decisions::{Entry, RecentDecisions, UndecidedCalls},
};
use crate::{
    core::{
        policy::Enforcement,
        snapshot::{Origin, Snapshot},
    },
    domain::{
        duration,
        verdict::{DenyCode, ServedFrom, Unreached, Verdict, Withheld},
    },
};

/// The version of the JSON. It rises when a field is removed or changes its meaning, but not when one is added.
const SCHEMA_VERSION: u32 = 1;
/// The counts that the page calls recent cover this time.
pub const WINDOW: Duration = Duration::from_secs(15 * 60);
/// How often the counts are sampled for that.
pub const SAMPLE_EVERY: Duration = Duration::from_secs(60);
/// A refusal that did not repeat within this time needs no attention any more. A client with a fault repeats sooner.
const ONGOING: Duration = Duration::from_secs(2 * 60);
/// What registry, catalogue and configuration are followed as.
pub const DOCUMENTS: &str = "documents";
/// So many checks without a result, if at least as many as those with one, need attention.
const MANY_FAILED: u64 = 3;
/// So many refused keys need attention, if none was accepted meanwhile.
const MANY_REFUSED: u64 = 5;
/// If they are of so many organizations, or so many keys where none is named.
const SEVERAL: usize = 3;
/// How many reasons of calls without a decision are listed under attention.
const MAX_UNANSWERED: usize = 5;
/// A certificate that expires within this time needs attention. Two weeks leave room for a holiday.
pub const CERTIFICATE_NEAR_END: Duration = Duration::from_secs(14 * 24 * 3600);

/// The whole status.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
#[derive(Default)]
pub struct Status {
    /// The version of this document's schema.
    pub schema_version: u32,
    /// When it was made.
    pub as_of: String,
    /// The version of the service.
    pub version: String,
    /// The commit of a release build; empty in other builds.
    pub revision: String,
    /// When the service started.
    pub started_at: String,
    /// Whether it stops; absent while it serves.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stopping: Option<Stopping>,
    /// What needs attention; empty if all is well.
    pub attention: Vec<Attention>,
    /// Registry, catalogue and configuration; TLS and tokens where they come from files.
    pub documents: Vec<Document>,
    /// Settings whose values in the configuration are in force after a restart only.
    pub restart_needed: Vec<String>,
    /// The certificates of the server and of the client authorities.
    pub certificates: Vec<Certificate>,
    /// Every provider of the registry.
    pub providers: Vec<Provider>,
    /// The time that the recent counts below cover.
    pub window_seconds: u64,
    /// Decisions by outcome and code.
    pub decisions: Vec<DecisionCount>,
    /// Connections that failed before their first call, newest first.
    pub refused_connections: Vec<RefusedConnection>,
    /// Calls that ended without a decision, newest first.
    pub undecided_calls: Vec<UndecidedCall>,
    /// The last changes of configuration, documents and callers, newest first.
    pub changes: Vec<Changed>,
    /// The last denials, newest first.
    pub denials: Vec<Recent>,
    /// The last unverified allows, newest first.
    pub unverified_allows: Vec<Recent>,
}

/// A service that stops.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Stopping {
    /// Since when.
    pub since: String,
    /// The calls that are not answered yet.
    pub calls_in_flight: usize,
}

/// Something that needs attention.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Attention {
    /// What is wrong.
    pub what: String,
    /// What to do.
    pub remedy: String,
}

/// A source that is read from files, and again when they change.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Document {
    /// `registry`, `catalogue`, `configuration`, `tls` or `tokens`.
    pub document: String,
    /// The hash of its content, for registry and catalogue.
    pub revision: String,
    /// `embedded`, or its files.
    pub source: String,
    /// When it was read.
    pub loaded_at: String,
    /// Its age.
    pub age_seconds: u64,
    /// Why a newer version was not taken; empty if there is none.
    pub last_reload_error: String,
    /// Since when; empty if there is none.
    #[serde(default)]
    pub last_reload_failed_at: String,
}

/// A certificate and its expiry.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Certificate {
    /// The setting that names its file.
    pub setting: String,
    /// The file.
    pub file: String,
    /// When it expires.
    pub ends_at: String,
    /// The time left; negative once it has expired.
    pub seconds_left: i64,
}

/// The status of one provider.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, Default)]
#[serde(default)]
pub struct Provider {
    /// Its name in the registry.
    pub provider: String,
    /// `enforce`, `report` or `off`.
    pub enforcement: String,
    /// Until when `report` or `off` holds.
    pub until: String,
    /// The circuit breaker: `closed`, `half-open` or `open`; empty if it was never used.
    pub breaker: String,
    /// The organizations for which alone it is open.
    pub breaker_open_for_organizations: u64,
    /// Probes in flight, including those that wait for the rate limit.
    pub probes_in_flight: u64,
    /// Probes in the queue.
    pub probes_queued: u64,
    /// Recent decisions, by verdict.
    pub recent_verdicts: BTreeMap<String, u64>,
    /// How its endpoints answer made-up keys.
    pub calibration: Vec<Calibration>,
    /// Hosts without an API at the base URL.
    pub no_api_at: Vec<String>,
    /// The last inconclusive probe.
    pub last_failure: Option<LastFailure>,
}

/// How an endpoint answers made-up keys in one header.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Calibration {
    /// The host.
    pub host: String,
    /// The probe.
    pub probe: String,
    /// The header.
    pub header: String,
    /// `refuses`, `untold`, `accepts` or `refuses oddly`.
    pub state: String,
}

impl Calibration {
    /// The state in words, as it follows "made-up keys:".
    pub fn text(&self) -> &str {
        match self.state.as_str() {
            "refuses" => "refused",
            "untold" => "not known",
            "accepts" => "accepted",
            "refuses oddly" => "refused, but not with a 401 or a known code",
            other => other,
        }
    }
}

/// The last inconclusive probe of a provider.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LastFailure {
    /// When a decision last used it.
    pub at: String,
    /// The verdict.
    pub verdict: String,
    /// The cause, in words.
    pub cause: String,
    /// What to do.
    #[serde(default)]
    pub remedy: String,
}

/// Connections of one peer that failed for the same reason before their first call.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RefusedConnection {
    /// When the last one came.
    pub at: String,
    /// The fault, in one word.
    pub fault: String,
    /// The peer's address.
    pub peer: String,
    /// How many there were since this entry exists.
    pub count: u64,
    /// The names in the certificate that the client presented.
    pub names: Vec<String>,
    /// Why, in words.
    pub meaning: String,
}

/// Calls of one peer that ended without a decision, for the same reason.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct UndecidedCall {
    /// When the last one ended.
    pub at: String,
    /// `Decide` or `BatchDecide`.
    pub method: String,
    /// gRPC's name of the status.
    pub grpc_code: String,
    /// The status's message.
    pub reason: String,
    /// The peer's address.
    pub peer: String,
    /// The caller; empty if it is not known.
    pub caller: String,
    /// Whether they were only to be reported, and no workspace was to start.
    pub report_only: bool,
    /// How many there were since this entry exists.
    pub count: u64,
}

/// Something that was changed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Changed {
    /// When it came into force.
    pub at: String,
    /// The name of its log line: `configuration_changed`.
    pub event: String,
    /// The setting or the document.
    pub setting: String,
    /// The caller, if it is about one; else empty.
    pub caller: String,
    /// The old value.
    pub was: String,
    /// The new value.
    pub is: String,
}

/// Decisions of one code.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct DecisionCount {
    /// `ALLOW` or `DENY`.
    pub outcome: String,
    /// The deny code; empty for an allow.
    pub code: String,
    /// Since the start.
    pub total: u64,
    /// Within the window.
    pub recent: u64,
}

/// One recent decision.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, Default)]
#[serde(default)]
pub struct Recent {
    /// When.
    pub at: String,
    /// Its id.
    pub decision_id: String,
    /// Its checkpoint.
    pub checkpoint: String,
    /// Whether its caller only reports it and does not act on it.
    pub report_only: bool,
    /// The workspace's id; empty unless `admin.show_workspace_ids` is set.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub workspace_id: String,
    /// The runtime.
    pub runtime: String,
    /// The model.
    pub model: String,
    /// The provider.
    pub provider: String,
    /// The deny code.
    pub code: String,
    /// The verdict.
    pub verdict: String,
    /// The host.
    pub host: String,
    /// Why, in words.
    pub cause: String,
}

/// The setting that names a certificate's file, the file, and when the certificate expires in seconds of Unix time.
pub type CertificateEnd = (&'static str, String, i64);

/// The sources of a status.
pub struct Sources<'s> {
    /// The metrics.
    pub page: &'s Page,
    /// The loaded documents and the policy.
    pub snapshot: &'s Snapshot,
    /// The last decisions.
    pub recent_decisions: &'s RecentDecisions,
    /// The earlier counts.
    pub window: &'s Window,
    /// When the service started.
    pub started: SystemTime,
    /// The files that are read again when they change.
    pub followed: Vec<FollowedFiles>,
    /// The expiry of each certificate.
    pub certificates: Vec<CertificateEnd>,
    /// Connections that failed before their first call.
    pub refused_connections: Vec<RefusedConnection>,
    /// Limits over all connections that have refused calls.
    pub reached_limits: Vec<ReachedLimit>,
    /// Providers that the configuration does not allow to be called.
    pub forbidden: Vec<ForbiddenProvider>,
    /// The last changes, newest first.
    pub changes: Vec<Change>,
    /// Since when it stops, and the calls in flight.
    pub stopping: Option<(SystemTime, usize)>,
    /// The peers with the most open connections, and how many those are.
    pub top_peers: Vec<(String, usize)>,
}

/// A provider whose address or scheme the configuration does not allow, so that each of its keys is denied.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ForbiddenProvider {
    /// Its name.
    pub provider: String,
    /// What would be called: `https://10.1.2.3`.
    pub origin: String,
}

/// A limit over all connections that has refused a call.
#[derive(Debug, Clone, Copy)]
pub struct ReachedLimit {
    /// `limits.watches`
    pub setting: &'static str,
    /// What it is.
    pub limit: usize,
    /// When it refused one last.
    pub at: SystemTime,
}

// === earlier counts ===

/// Samples of the counts, one per minute, for a little longer than the window.
#[derive(Debug)]
pub struct Window(Mutex<VecDeque<(SystemTime, Totals)>>);

/// The counts at one moment, by provider and verdict and by outcome and code.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Totals {
    verdicts: BTreeMap<(String, String), u64>,
    /// Checks that called the provider, by provider.
    checks: BTreeMap<String, Checks>,
    decisions: BTreeMap<(String, String), u64>,
    /// Refusals by a limit, by metric family and label.
    limited: BTreeMap<(String, String), u64>,
}

/// Checks of one provider's keys that called it. Results from the cache say nothing about how the provider answers now.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Checks {
    /// The key was found VALID.
    accepted: u64,
    /// The key was refused: INVALID or FORBIDDEN.
    refused: u64,
    /// All that came to a result about the key, those two included.
    answered: u64,
    /// Those that came to none.
    failed: u64,
}

impl Checks {
    /// The checks that came later than these.
    fn since(self, then: Self) -> Self {
        Self {
            accepted: self.accepted.saturating_sub(then.accepted),
            refused: self.refused.saturating_sub(then.refused),
            answered: self.answered.saturating_sub(then.answered),
            failed: self.failed.saturating_sub(then.failed),
        }
    }
}

impl Totals {
    fn checks(&self, provider: &str) -> Checks {
        self.checks.get(provider).copied().unwrap_or_default()
    }

    /// The counts on this metrics page.
    pub fn of(page: &Page) -> Self {
        let mut totals = Self::default();
        let mut add = |family, names: [&str; 2], to: fn(&mut Self) -> &mut BTreeMap<(String, String), u64>| {
            for (labels, count) in page.values(family) {
                let [one, two] = names.map(|name| labels.get(name).unwrap_or_default().to_owned());
                *to(&mut totals).entry((one, two)).or_default() += count as u64;
            }
        };
        add("byokgate_verdicts", [PROVIDER, "verdict"], |totals| &mut totals.verdicts);
        add("byokgate_decisions", ["outcome", "code"], |totals| &mut totals.decisions);
        for (labels, count) in page.values("byokgate_verdicts") {
            let is = |label, word: &str| labels.get(label) == Some(word);
            if !is("served_from", ServedFrom::Probe.as_str()) {
                continue;
            }
            let checks = totals.checks.entry(labels.get(PROVIDER).unwrap_or_default().to_owned()).or_default();
            let is_one_of = |verdicts: &[Verdict]| verdicts.iter().any(|verdict| is("verdict", verdict.as_str()));
            if is_one_of(&FAILURES) {
                checks.failed += count as u64;
                continue;
            }
            checks.answered += count as u64;
            if is_one_of(&[Verdict::Valid]) {
                checks.accepted += count as u64;
            }
            if is_one_of(&[Verdict::Invalid, Verdict::Forbidden]) {
                checks.refused += count as u64;
            }
        }
        for (family, label) in [("byokgate_new_key_refusals", "limit"), ("byokgate_connections_refused", "reason")] {
            for (labels, count) in page.values(family) {
                let of = labels.get(label).unwrap_or_default().to_owned();
                *totals.limited.entry((family.to_owned(), of)).or_default() += count as u64;
            }
        }
        totals
    }
}

impl Window {
    /// A window that starts now with counts of 0.
    pub fn since(now: SystemTime) -> Self {
        Self(Mutex::new([(now, Totals::default())].into()))
    }

    /// Adds a sample.
    pub fn note(&self, now: SystemTime, totals: Totals) {
        let mut samples = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        samples.push_back((now, totals));
        // Keep one sample that is old enough to compare with. The limit by number holds even if the clock is set back.
        let most = 1 + WINDOW.as_secs().div_ceil(SAMPLE_EVERY.as_secs()) as usize;
        while samples.len() > most || samples.get(1).is_some_and(|(at, _)| since(*at, now) >= WINDOW) {
            samples.pop_front();
        }
    }

    /// The youngest sample that is at least as old as what goes on. If there is none, the oldest sample.
    fn lately(&self, now: SystemTime) -> Totals {
        let samples = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let old_enough = samples.iter().rev().find(|(at, _)| since(*at, now) >= ONGOING);
        old_enough.or(samples.front()).map_or_else(Totals::default, |(_, totals)| totals.clone())
    }

    /// The checks of this provider's keys since the last one that found a key VALID, and since when. That time is exact to a sample: it may be a
    /// little later. `None` if a key was found VALID after the last sample.
    fn since_accepted(&self, provider: &str, now: Checks) -> Option<(SystemTime, Checks)> {
        let samples = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mut checks = samples.iter().map(|(at, totals)| (*at, totals.checks(provider)));
        checks.find(|(_, then)| then.accepted == now.accepted).map(|(at, then)| (at, now.since(then)))
    }

    /// The oldest sample, and its age.
    fn then(&self, now: SystemTime) -> (Totals, Duration) {
        let samples = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        samples.front().map_or_else(Default::default, |(at, totals)| (totals.clone(), since(*at, now)))
    }
}

fn since(then: SystemTime, now: SystemTime) -> Duration {
    now.duration_since(then).unwrap_or_default()
}

// === building the status ===

/// Builds the status as of now.
pub fn status(sources: &Sources<'_>, now: SystemTime) -> Status {
    let Sources {
        page,
        snapshot,
        recent_decisions,
        window,
        started,
        followed,
        certificates,
        refused_connections,
        reached_limits,
        forbidden,
        changes,
        stopping,
        top_peers,
    } = sources;
    let (then, length) = window.then(now);
    let lately = window.lately(now);
    let totals = Totals::of(page);
    let documents = documents(snapshot, followed, now);
    let certificates: Vec<Certificate> = certificates
        .iter()
        .map(|(setting, file, end)| Certificate {
            setting: (*setting).to_owned(),
            file: file.clone(),
            ends_at: jiff::Timestamp::from_second(*end).map_or_else(|_| end.to_string(), |at| at.to_string()),
            seconds_left: end.saturating_sub(seconds(now)),
        })
        .collect();
    let providers = providers(sources, &totals, &then, now);
    let restart_needed = snapshot.restart_needed.clone();
    let mut attention = Vec::new();
    let mut add = |what: String, remedy: &str| attention.push(Attention { what, remedy: remedy.to_owned() });
    let stopping = stopping.map(|(since, calls_in_flight)| Stopping { since: text_of(since), calls_in_flight });
    if let Some(Stopping { since, calls_in_flight }) = &stopping {
        let calls = if *calls_in_flight == 1 { "1 call".to_owned() } else { format!("{calls_in_flight} calls") };
        add(
            format!("the service stops since {since}; {calls} in flight"),
            "nothing, if it was told to: it answers them until shutdown.drain is over; otherwise the log says why it stops",
        );
    }
    near_ends(&certificates, &mut add);
    not_taken(&documents, followed, &mut add);
    exposed(followed, &mut add);
    waits_for_restart(&restart_needed, &mut add);
    own_faults(page, &mut add);
    tier_left_alone(page, &mut add);
    for provider in &providers {
        match forbidden.iter().find(|it| it.provider == provider.provider) {
            Some(forbidden) if provider.enforcement == "enforce" => not_allowed(forbidden, &mut add),
            _ => {
                let checks = totals.checks(&provider.provider);
                let since_accepted = window.since_accepted(&provider.provider, checks);
                if !failing(provider, failed_since(provider, &totals, &lately), now, &mut add) {
                    let in_window = checks.since(then.checks(&provider.provider));
                    unreliable(provider, [since_accepted.map(|(_, checks)| checks), Some(in_window)], now, &mut add);
                }
                refuses_all(provider, since_accepted, recent_decisions.refused_of(&provider.provider), &mut add);
            }
        }
        wants_of(provider, &mut add);
    }
    let (denials, unverified) = (recent_decisions.denials(), recent_decisions.unverified_allows());
    unreadable(&denials, now, &mut add);
    withheld(&denials, now, &mut add);
    impatient(denials.iter().chain(&unverified), now, &mut add);
    lost_lines(page, &mut add);
    attention.extend(refused(refused_connections, now));
    let undecided = recent_decisions.undecided_calls();
    attention.extend(unanswered(&undecided, now));
    attention.extend(limited(&totals, &then, top_peers));
    attention.extend(reached(reached_limits, now));
    let decisions = totals.decisions.iter().map(|((outcome, code), total)| DecisionCount {
        outcome: outcome.clone(),
        code: code.clone(),
        total: *total,
        recent: total.saturating_sub(then.decisions.get(&(outcome.clone(), code.clone())).copied().unwrap_or_default()),
    });
    let recent = |entries: Vec<std::sync::Arc<Entry>>| entries.iter().map(|entry| Recent::of(entry)).collect();
    Status {
        schema_version: SCHEMA_VERSION,
        as_of: text_of(now),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        revision: process::REVISION.to_owned(),
        started_at: text_of(*started),
        stopping,
        attention,
        documents,
        restart_needed,
        certificates,
        providers,
        window_seconds: length.as_secs(),
        decisions: decisions.collect(),
        refused_connections: refused_connections.clone(),
        undecided_calls: undecided.into_iter().map(UndecidedCall::from).collect(),
        changes: changes.iter().map(Changed::of).collect(),
        denials: recent(denials),
        unverified_allows: recent(unverified),
    }
}

impl From<UndecidedCalls> for UndecidedCall {
    fn from(calls: UndecidedCalls) -> Self {
        let UndecidedCalls { at, count, method, grpc_code, reason, peer, caller, report_only } = calls;
        let (method, grpc_code) = (method.to_owned(), grpc_code.to_owned());
        Self { at: text_of(at), method, grpc_code, reason, peer, caller, report_only, count }
    }
}

impl Changed {
    fn of(Change { at, event, setting, caller, was, is }: &Change) -> Self {
        let [setting, caller, was, is] = [setting, caller, was, is].map(Clone::clone);
        Self { at: text_of(*at), event: (*event).to_owned(), setting, caller, was, is }
    }

    /// What was changed, in one sentence.
    pub fn text(&self) -> String {
        let Self { event, setting, caller, was, is, .. } = self;
        match event.as_str() {
            "caller_removed" => format!("{setting}: {caller} was removed"),
            "caller_changed" => format!("{setting}: {caller} was {was}, is {is}"),
            "configuration_loosened" => format!("{setting}: {was} -> {is}; more is let through than before"),
            _ => format!("{setting}: {was} -> {is}"),
        }
    }
}

impl Recent {
    fn of(entry: &Entry) -> Self {
        Self {
            at: text_of(entry.at),
            decision_id: entry.id.to_string(),
            checkpoint: entry.checkpoint.to_owned(),
            report_only: entry.report_only,
            workspace_id: entry.workspace_id.clone(),
            runtime: entry.runtime.clone(),
            model: entry.model.clone(),
            provider: entry.provider.clone(),
            code: entry.code.to_owned(),
            verdict: entry.verdict.to_owned(),
            host: entry.host.clone(),
            cause: entry.cause(),
        }
    }
}

fn documents(snapshot: &Snapshot, followed: &[FollowedFiles], now: SystemTime) -> Vec<Document> {
    let document =
        |document: &str, revision: &str, Origin { source, loaded_at, last_reload_error, failed_at }: &Origin| Document {
            document: document.to_owned(),
            revision: revision.to_owned(),
            source: source.clone(),
            loaded_at: text_of(*loaded_at),
            age_seconds: since(*loaded_at, now).as_secs(),
            last_reload_error: last_reload_error.clone(),
            last_reload_failed_at: failed_at.map_or_else(String::new, text_of),
        };
    let mut documents = vec![
        document("registry", snapshot.registry.revision(), &snapshot.registry_origin),
        document("catalogue", snapshot.catalogue.revision(), &snapshot.catalogue_origin),
        document("configuration", "", &snapshot.configuration_origin),
    ];
    for FollowedFiles { what, files, taken_at, fault, failed_at, .. } in followed.iter().filter(|it| it.what != DOCUMENTS) {
        let source = files.iter().map(|file| file.display().to_string()).collect::<Vec<_>>().join(", ");
        let origin = Origin { last_reload_error: fault.clone(), failed_at: *failed_at, ..Origin::new(source, *taken_at) };
        documents.push(document(what, "", &origin));
    }
    documents
}

fn providers(sources: &Sources<'_>, totals: &Totals, then: &Totals, now: SystemTime) -> Vec<Provider> {
    let Sources { page, snapshot, recent_decisions, .. } = sources;
    let exceptions: BTreeMap<&str, i64> =
        snapshot.policy.exceptions().map(|(provider, exception)| (provider, exception.until)).collect();
    let one = |family: &str, provider: &str| {
        page.values(family).find(|(labels, _)| labels.get(PROVIDER) == Some(provider)).map(|(_, value)| value)
    };
    let of = |name: &str| {
        let (enforcement, is_exempt) = match snapshot.policy.enforcement(name, seconds(now)) {
            Enforcement::Enforce => ("enforce", false),
            Enforcement::Report => ("report", true),
            Enforcement::Off => ("off", true),
        };
        let until = exceptions.get(name).filter(|_| is_exempt).and_then(|until| jiff::Timestamp::from_second(*until).ok());
        let verdicts = totals.verdicts.iter().filter(|((provider, _), _)| provider == name);
        let recent = verdicts.filter_map(|(key @ (_, verdict), count)| {
            let recent = count.saturating_sub(then.verdicts.get(key).copied().unwrap_or_default());
            (recent > 0).then(|| (verdict.clone(), recent))
        });
        let calibration = page.values("byokgate_calibration_state").filter(|(labels, _)| labels.get(PROVIDER) == Some(name));
        let no_api = page
            .values("byokgate_no_api_at_base_url")
            .filter(|(labels, value)| labels.get(PROVIDER) == Some(name) && *value > 0.0);
        Provider {
            provider: name.to_owned(),
            enforcement: enforcement.to_owned(),
            until: until.map_or_else(String::new, |until| until.to_string()),
            breaker: one("byokgate_breaker_state", name).map_or("", breaker).to_owned(),
            breaker_open_for_organizations: one("byokgate_breaker_open_for_organizations", name).unwrap_or_default() as u64,
            probes_in_flight: one("byokgate_probes_in_flight", name).unwrap_or_default() as u64,
            probes_queued: one("byokgate_probes_queued", name).unwrap_or_default() as u64,
            recent_verdicts: recent.collect(),
            calibration: calibration
                .map(|(labels, value)| {
                    let of = |name: &str| labels.get(name).unwrap_or_default().to_owned();
                    Calibration {
                        host: of("host"),
                        probe: of("probe"),
                        header: of("header"),
                        state: made_up_keys(value).to_owned(),
                    }
                })
                .collect(),
            no_api_at: no_api.map(|(labels, _)| labels.get("host").unwrap_or_default().to_owned()).collect(),
            last_failure: recent_decisions.failure(name).map(|failure| LastFailure {
                at: text_of(failure.at),
                verdict: failure.verdict.as_str().to_owned(),
                cause: failure.cause(),
                remedy: failure.remedy().to_owned(),
            }),
        }
    };
    snapshot.registry.providers().iter().map(|provider| of(&provider.name)).collect()
}

impl Provider {
    /// The circuit breaker in words.
    pub fn breaker_text(&self) -> String {
        match (self.breaker_open_for_organizations, self.breaker.as_str()) {
            (0, "") => "closed".to_owned(),
            (0, breaker) => breaker.to_owned(),
            (1, _) => "open for 1 organization".to_owned(),
            (count, _) => format!("open for {count} organizations"),
        }
    }

    /// Whether there is nothing to show of this provider.
    pub fn is_quiet(&self) -> bool {
        let Self { provider, .. } = self;
        *self == Self { provider: provider.clone(), enforcement: "enforce".to_owned(), ..Self::default() }
    }
}

/// The word for a value of the breaker gauge.
fn breaker(state: f64) -> &'static str {
    match state as u64 {
        0 => "closed",
        1 => "half-open",
        _ => "open",
    }
}

/// The word for a value of the calibration gauge.
fn made_up_keys(state: f64) -> &'static str {
    match state as u64 {
        0 => "refuses",
        1 => "untold",
        2 => "accepts",
        _ => "refuses oddly",
    }
}

/// What to do about a certificate that expires.
pub fn certificate_remedy(setting: &str) -> &'static str {
    if setting == "tls.client_ca" {
        "add the new authority beside the old one in the same file, renew the clients' certificates, then take the old one out; each is reloaded \
         without a restart"
    } else if setting == "tier.client_certificate_file" {
        "write a new one with its key to the same files, and restart: they are read at the start"
    } else {
        "write a new one to the same file; it is reloaded without a restart"
    }
}

/// Adds what is wrong, and what to do.
type Add<'a> = &'a mut dyn FnMut(String, &str);

fn near_ends(certificates: &[Certificate], add: Add<'_>) {
    for Certificate { setting, file, ends_at, seconds_left } in certificates {
        let remedy = certificate_remedy(setting);
        if *seconds_left <= 0 {
            add(format!("{setting} ({file}) expired at {ends_at}"), remedy);
        } else if *seconds_left < CERTIFICATE_NEAR_END.as_secs() as i64 {
            let left = duration::text(Duration::from_secs(seconds_left.unsigned_abs() / 3600 * 3600));
            add(format!("{setting} ({file}) expires in {left}, at {ends_at}"), remedy);
        }
    }
}

/// Files with secrets that every user of this machine can read.
fn exposed(followed: &[FollowedFiles], add: Add<'_>) {
    for file in followed.iter().flat_map(|it| &it.exposed) {
        add(
            format!("{} holds a secret, and every user of this machine can read it", file.display()),
            "give it mode 0600 or 0640, and renew the secret if somebody may have read it",
        );
    }
}

/// Changes of files that were not taken, because the files are invalid.
fn not_taken(documents: &[Document], followed: &[FollowedFiles], add: Add<'_>) {
    let failing = || documents.iter().filter(|it| !it.last_reload_error.is_empty());
    for Document { document, last_reload_error, last_reload_failed_at, .. } in failing() {
        let is_of_decisions = matches!(document.as_str(), "registry" | "catalogue" | "configuration");
        let since = format!("since {last_reload_failed_at}");
        if is_of_decisions {
            add(
                format!(
                    "the {document}'s last change is invalid; the last good version stays in force ({since}): {last_reload_error}"
                ),
                "correct the file, or restore the old one; `byok-gate check` with the same flags shows all that is wrong",
            );
        } else {
            add(
                format!(
                    "the last change of {document} is invalid; the last good files stay in force ({since}): {last_reload_error}"
                ),
                "write the files again, no restart is needed; `byok-gate check` with the same flags shows all that is wrong",
            );
        }
    }
    // A fault that belongs to no single document.
    for FollowedFiles { fault, .. } in followed.iter().filter(|it| it.what == DOCUMENTS && !it.fault.is_empty()) {
        if failing().all(|it| !matches!(it.document.as_str(), "registry" | "catalogue" | "configuration")) {
            add(
                format!("the last change is not in force; the last good version stays in force: {fault}"),
                "look at the volume with the files, and for `reload_failed` and `reload_stuck` in the log",
            );
        }
    }
}

/// Changes that take effect after a restart.
fn waits_for_restart(settings: &[String], add: Add<'_>) {
    if !settings.is_empty() {
        add(
            format!("a restart is needed for {}: the configuration has other values than those in force", settings.join(", ")),
            "restart, or put the old values back",
        );
    }
}

fn own_faults(page: &Page, add: Add<'_>) {
    if sum(page, "byokgate_decisions_panicked") + sum(page, "byokgate_probes_panicked") > 0 {
        add("a fault of byok-gate's own ended a decision or a probe".to_owned(), "look for `panicked` in the log, and report it");
    }
}

fn lost_lines(page: &Page, add: Add<'_>) {
    let dropped = sum(page, "byokgate_log_lines_dropped");
    if dropped > 0 {
        add(
            format!("{dropped} log lines were dropped since the start"),
            "the log is read too slowly, or cannot be written (a closed pipe, a full disk): look at standard output and its agent",
        );
    }
}

fn sum(page: &Page, family: &str) -> u64 {
    page.values(family).map(|(_, value)| value).sum::<f64>() as u64
}

/// Verdicts by which no key of a provider is found good or bad, whoever's it is.
const FAILURES: [Verdict; 5] =
    [Verdict::Timeout, Verdict::Unreachable, Verdict::ProviderError, Verdict::RateLimited, Verdict::UnexpectedResponse];

/// How many checks have failed, if none has come to a result since then.
fn failed_since(Provider { provider, .. }: &Provider, totals: &Totals, then: &Totals) -> u64 {
    let answers = |totals: &Totals| totals.checks(provider).answered;
    let failures = |totals: &Totals| {
        let of = FAILURES.iter().filter_map(|verdict| totals.verdicts.get(&(provider.clone(), verdict.as_str().to_owned())));
        of.sum::<u64>()
    };
    if answers(totals) > answers(then) { 0 } else { failures(totals).saturating_sub(failures(then)) }
}

/// A provider of which no check comes to a result. Its breaker opens later, and only once several organizations have seen it. Returns whether it
/// was added.
fn failing(
    Provider { provider, breaker, no_api_at, last_failure, .. }: &Provider,
    failed: u64,
    now: SystemTime,
    add: Add<'_>,
) -> bool {
    let Some(LastFailure { at, cause, remedy, .. }) = last_failure else { return false };
    let is_failing = failed > 0 && breaker != "open" && no_api_at.is_empty() && is_ongoing(at, now);
    if is_failing {
        let checks = if failed == 1 { "the last check".to_owned() } else { format!("none of the last {failed} checks") };
        let came = if failed == 1 { "came to no result" } else { "came to a result" };
        add(format!("provider `{provider}`: {checks} of a key {came}: {cause}"), remedy);
    }
    is_failing
}

/// A provider of which many checks come to no result, though some do. One good answer must not hide the others.
fn unreliable(
    Provider { provider, breaker, no_api_at, last_failure, .. }: &Provider,
    spans: [Option<Checks>; 2],
    now: SystemTime,
    add: Add<'_>,
) {
    let Some(LastFailure { at, cause, remedy, .. }) = last_failure else { return };
    let is_many = |checks: &Checks| checks.failed >= MANY_FAILED && checks.failed >= checks.answered;
    // An older failure is not the cause: callers that did not wait are, and they have a line of their own.
    if breaker != "open"
        && no_api_at.is_empty()
        && is_within(WINDOW, at, now)
        && let Some(Checks { failed, answered, .. }) = spans.into_iter().flatten().find(is_many)
    {
        let all = failed + answered;
        add(
            format!("{failed} of the last {all} checks of provider `{provider}` came to no result; the last, at {at}: {cause}"),
            remedy,
        );
    }
}

/// A provider that refuses so many keys and accepts none that the keys may not be at fault.
fn refuses_all(Provider { provider, .. }: &Provider, since_accepted: Option<(SystemTime, Checks)>, whose: usize, add: Add<'_>) {
    // One tenant may ask again and again about one dead key.
    if let Some((at, Checks { refused, .. })) = since_accepted
        && refused >= MANY_REFUSED
        && whose >= SEVERAL
    {
        add(
            format!("no key of provider `{provider}` was accepted since {}: {refused} were refused", text_of(at)),
            "the vendor may be failing, or refuse this service's address: ask with a key that is known to be good, \
             `byok-gate probe --provider P --env NAME --explain`, before tenants make new keys",
        );
    }
}

/// The shared tier is configured and not used, or only in part.
fn tier_left_alone(page: &Page, add: Add<'_>) {
    let is_off = |gauge: &str| page.values(gauge).any(|(_, value)| value < 1.0);
    if is_off("byokgate_tier_in_use") {
        add(
            "the shared tier is left alone, since requests to it fail; every replica decides by itself".to_owned(),
            "the log's last `tier_left_alone` says why: check the store, its address, its user's rights and the network to it; byok-gate \
             tries again by itself",
        );
        // The rest is not known meanwhile.
        return;
    }
    if is_off("byokgate_tier_listening") {
        add(
            "the refusals that other replicas see are not heard: a key that died may count as valid here until its result is old"
                .to_owned(),
            "the log's last `tier_not_listening` says why: the store's user needs `+subscribe` and the channels `&bg1:*`",
        );
    }
    if is_off("byokgate_tier_storing") {
        add(
            "the shared tier refuses this replica's results, or their announcement: others may not hear that a key died"
                .to_owned(),
            "the log's last `tier_not_storing` says why: the store's user needs `+publish`, the channels `&bg1:*`, and the other rights of \
             docs/scale.md",
        );
    }
}

fn not_allowed(ForbiddenProvider { provider, origin }: &ForbiddenProvider, add: Add<'_>) {
    add(
        format!("every key of provider `{provider}` is denied: this configuration does not allow calls to {origin}"),
        cause::unreached_remedy(Unreached::Address),
    );
}

/// Secrets that the platform could not read.
fn unreadable(denials: &[std::sync::Arc<Entry>], now: SystemTime, add: Add<'_>) {
    let is_one = |entry: &&std::sync::Arc<Entry>| {
        entry.code == DenyCode::CredentialScopeUnreadable.as_str() && since(entry.at, now) < ONGOING
    };
    let (count, last) = (denials.iter().filter(is_one).count(), denials.iter().find(is_one));
    if let Some(last) = last {
        let times = if count == 1 { "one decision was denied".to_owned() } else { format!("{count} decisions were denied") };
        add(
            format!("{times}, since the platform could not read secrets: {}", last.cause()),
            "check the platform's secret store and its encryption key",
        );
    }
}

/// Providers for which checks waited in vain.
fn withheld(denials: &[std::sync::Arc<Entry>], now: SystemTime, add: Add<'_>) {
    let mut by_provider: BTreeMap<&str, (&Entry, &str, usize)> = BTreeMap::new();
    for entry in denials.iter().filter(|entry| since(entry.at, now) < ONGOING) {
        if let Some((Withheld::Queue | Withheld::Budget, remedy)) = entry.withheld() {
            by_provider.entry(&entry.provider).or_insert((entry, remedy, 0)).2 += 1;
        }
    }
    for (provider, (last, remedy, count)) in by_provider {
        let were = if count == 1 { "1 decision was".to_owned() } else { format!("{count} decisions were") };
        add(
            format!("{were} denied without a check at provider `{provider}`, the last at {}: {}", text_of(last.at), last.cause()),
            remedy,
        );
    }
}

/// Callers that left a provider too little time.
fn impatient<'e>(entries: impl Iterator<Item = &'e std::sync::Arc<Entry>>, now: SystemTime, add: Add<'_>) {
    let mut by_peer: BTreeMap<String, (Duration, SystemTime)> = BTreeMap::new();
    for entry in entries.filter(|entry| since(entry.at, now) < ONGOING) {
        if let Some(given) = entry.too_little_time {
            let (least, last) = by_peer.entry(entry.peer.to_string()).or_insert((given, entry.at));
            (*least, *last) = (given.min(*least), entry.at.max(*last));
        }
    }
    if let Some((peer, (given, last))) = by_peer.first_key_value() {
        let what = format!(
            "calls from {peer}{} allowed {} ms, which is too little for a provider to answer; the last at {}",
            and_more(by_peer.len()),
            given.as_millis(),
            text_of(*last)
        );
        add(what, cause::GIVE_TIME);
    }
}

fn wants_of(provider: &Provider, add: Add<'_>) {
    let text = provider.breaker_text();
    let Provider {
        provider,
        breaker_open_for_organizations,
        breaker,
        enforcement,
        until,
        calibration,
        no_api_at,
        last_failure,
        ..
    } = provider;
    // A half-open breaker needs no attention: it only waits for the next call.
    if breaker == "open" || *breaker_open_for_organizations > 0 {
        let why = last_failure.as_ref().map_or_else(String::new, |failure| format!(": {}", failure.cause));
        let remedy = last_failure.as_ref().map_or(cause::LOOK_OUTSIDE, |failure| failure.remedy.as_str());
        let remedy = format!("{remedy}; it closes by itself once the provider answers");
        add(format!("the breaker of provider `{provider}` is {text}{why}"), &remedy);
    }
    for host in no_api_at {
        add(
            format!("there is no API at the base URL of provider `{provider}` ({host})"),
            "correct the base URL in the registry; `byok-gate check --probe` finds them all",
        );
    }
    // Another probe of the provider may still tell keys apart. Then nothing is wrong.
    let accepts = |it: &&Calibration| it.state == "accepts";
    if let Some(Calibration { host, .. }) = calibration.iter().find(accepts)
        && calibration.iter().all(|it| accepts(&it))
    {
        add(
            format!("{host} takes made-up keys of provider `{provider}`: its \"yes\" proves nothing"),
            "`byok-gate probe --provider P --env NAME --calibrate --explain` shows each call; correct the host's row",
        );
    }
    if enforcement != "enforce" {
        add(
            format!("provider `{provider}` is set to {enforcement} until {until}: dead keys start workspaces"),
            "nothing, if it is meant; else take the entry out of `providers`",
        );
    }
}

/// Connections that are being refused now.
fn refused(connections: &[RefusedConnection], now: SystemTime) -> impl Iterator<Item = Attention> {
    // One line for each fault. The page lists the peers separately.
    let mut by_fault: BTreeMap<&str, (&RefusedConnection, usize)> = BTreeMap::new();
    for it in connections.iter().filter(|it| is_ongoing(&it.at, now)) {
        by_fault.entry(&it.fault).or_insert((it, 0)).1 += 1;
    }
    let lines: Vec<_> = by_fault
        .into_values()
        .map(|(RefusedConnection { fault, peer, names, meaning, .. }, peers)| Attention {
            what: format!("connections from {peer}{} were refused: {fault}{}", and_more(peers), in_brackets(&names.join(", "))),
            remedy: meaning.clone(),
        })
        .collect();
    lines.into_iter()
}

/// Calls that are being refused now. For their callers the service is not available.
fn unanswered(calls: &[UndecidedCalls], now: SystemTime) -> impl Iterator<Item = Attention> {
    let remedy = |code: &str, reason: &str| {
        Some(match code {
            "UNAUTHENTICATED" => {
                "give the caller a token that is a line of callers.token_file, or a certificate that `callers` lists"
            }
            "PERMISSION_DENIED" => {
                "in `callers` or the token file, give the caller the role that it needs, or list the workspace's id for it"
            }
            "RESOURCE_EXHAUSTED" => {
                "the reason names the setting: raise it, or find out which caller calls so often; if decisions wait for one provider, that \
                 provider hangs: see its row"
            }
            "INVALID_ARGUMENT" if reason.contains("(limits.") => {
                "raise the setting that the reason names, or let the caller send less"
            }
            "INVALID_ARGUMENT" => "the caller sends invalid requests: the reason names the field",
            _ => return None,
        })
    };
    // One line for each reason. The page lists the peers separately.
    let mut by_reason: BTreeMap<(&str, &str), (&UndecidedCalls, &str, BTreeSet<&str>)> = BTreeMap::new();
    for it in calls.iter().filter(|it| since(it.at, now) < ONGOING) {
        if let Some(remedy) = remedy(it.grpc_code, &it.reason) {
            by_reason.entry((it.grpc_code, &it.reason)).or_insert_with(|| (it, remedy, BTreeSet::new())).2.insert(&it.peer);
        }
    }
    let lines: Vec<_> = by_reason
        .into_values()
        .take(MAX_UNANSWERED)
        .map(|(UndecidedCalls { grpc_code, peer, caller, reason, .. }, remedy, peers)| Attention {
            what: format!("calls from {peer}{}{} end with {grpc_code}: {reason}", in_brackets(caller), and_more(peers.len())),
            remedy: remedy.to_owned(),
        })
        .collect();
    lines.into_iter()
}

/// Limits that were reached within the window.
fn limited(totals: &Totals, then: &Totals, top_peers: &[(String, usize)]) -> Vec<Attention> {
    let recent = |family: &str, label: &str| {
        let key = (family.to_owned(), label.to_owned());
        let count = |totals: &Totals| totals.limited.get(&key).copied().unwrap_or_default();
        count(totals).saturating_sub(count(then))
    };
    let mut found = Vec::new();
    let refused = recent("byokgate_connections_refused", "limit");
    if refused > 0 {
        let top = top_peers.iter().map(|(peer, count)| format!("{peer} ({count})")).collect::<Vec<_>>().join(", ");
        let top = if top.is_empty() { top } else { format!("; most of the open ones are of {top}") };
        let were = if refused == 1 { "1 connection was".to_owned() } else { format!("{refused} connections were") };
        found.push(Attention {
            what: format!("{were} refused: limits.connections is reached{top}"),
            remedy: "let that client open fewer; or raise the limit, and the process's limit of open files with it".to_owned(),
        });
    }
    for label in ["organization", "caller", "platform"] {
        let refused = recent("byokgate_new_key_refusals", label);
        if refused > 0 {
            let were = if refused == 1 { "1 credential was".to_owned() } else { format!("{refused} credentials were") };
            found.push(Attention {
                what: format!("{were} not checked, and denied: new_keys.per_{label} is used up"),
                remedy: "find out who tries so many keys; raise the limit, if a fleet that starts needs it".to_owned(),
            });
        }
    }
    found
}

/// Limits that refuse calls that ask for no decision, which are in no list below.
fn reached(limits: &[ReachedLimit], now: SystemTime) -> impl Iterator<Item = Attention> {
    limits.iter().filter(move |it| since(it.at, now) < ONGOING).map(|ReachedLimit { setting, limit, at }| Attention {
        what: format!("calls were refused, the last at {}: {setting} ({limit}) is reached", text_of(*at)),
        remedy: "find out who holds so many (`call_limit` in the log has a peer), or raise it".to_owned(),
    })
}

/// Whether this time, as the status has it, is so short ago that the fault may go on.
fn is_ongoing(at: &str, now: SystemTime) -> bool {
    is_within(ONGOING, at, now)
}

/// Whether this time, as the status has it, is less than this long ago.
fn is_within(length: Duration, at: &str, now: SystemTime) -> bool {
    at.parse::<jiff::Timestamp>().is_ok_and(|at| seconds(now) - at.as_second() < length.as_secs() as i64)
}

/// ` (token of line 2)`, or nothing.
fn in_brackets(caller: &str) -> String {
    if caller.is_empty() || caller == "anonymous" { String::new() } else { format!(" ({caller})") }
}

fn and_more(all: usize) -> String {
    if all > 1 { format!(" and {} more", all - 1) } else { String::new() }
}

// === words ===

fn seconds(now: SystemTime) -> i64 {
    now.duration_since(UNIX_EPOCH).map_or(0, |since| i64::try_from(since.as_secs()).unwrap_or(i64::MAX))
}

/// The time in RFC 3339, in whole seconds.
pub fn text_of(at: SystemTime) -> String {
    jiff::Timestamp::from_second(seconds(at)).map_or_else(|_| String::new(), |at| at.to_string())
}

/// Makes a text safe to show: replaces characters that move a cursor or change the writing direction.
pub fn printable(text: &str) -> String {
    let turns = |c: char| matches!(c, '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
    text.chars().map(|c| if c.is_control() || turns(c) { '\u{fffd}' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn totals(valid: u64) -> Totals {
        Totals { verdicts: [(("acme".to_owned(), "VALID".to_owned()), valid)].into(), ..Totals::default() }
    }

    /// Once the window has passed, the oldest sample is as old as the window or a little older, and there are few samples.
    #[test]
    fn the_window_moves_on_and_stays_small() {
        let start = UNIX_EPOCH + Duration::from_secs(1_000_000);
        let window = Window::since(start);
        for minute in 1..=100 {
            let now = start + SAMPLE_EVERY * minute;
            window.note(now, totals(u64::from(minute)));
            let (then, length) = window.then(now);
            assert_eq!(length, SAMPLE_EVERY * minute.min(15), "minute {minute}");
            let expect = if minute <= 15 { Totals::default() } else { totals(u64::from(minute) - 15) };
            assert_eq!(then, expect, "minute {minute}");
            assert!(window.0.lock().unwrap().len() <= 17);
        }
        // The clock is set back.
        for _ in 0..100 {
            window.note(start, totals(1));
        }
        assert!(window.0.lock().unwrap().len() <= 17);
    }

    /// A refusal that did not repeat must not ask for attention until the window ends.
    #[test]
    fn what_was_refused_needs_somebody_for_as_long_as_it_goes_on() {
        let now = UNIX_EPOCH + Duration::from_secs(1_000_000);
        let connection = |ago: u64| RefusedConnection {
            at: text_of(now - Duration::from_secs(ago)),
            fault: "NO_TLS".into(),
            peer: "192.0.2.7".into(),
            count: 1,
            names: Vec::new(),
            meaning: "give it TLS".into(),
        };
        let call = |ago: u64, grpc_code| UndecidedCalls {
            at: now - Duration::from_secs(ago),
            count: 1,
            method: "Decide",
            grpc_code,
            reason: "the bearer token is not known".into(),
            peer: "192.0.2.7".into(),
            caller: String::new(),
            report_only: false,
        };
        let whats = |lines: Vec<Attention>| lines.into_iter().map(|line| line.what).collect::<Vec<_>>();
        let connections = [connection(119), connection(121), connection(30)];
        assert_eq!(whats(refused(&connections, now).collect()), ["connections from 192.0.2.7 and 1 more were refused: NO_TLS"]);
        assert!(refused(&connections[1..2], now).next().is_none());
        let calls = [call(119, "UNAUTHENTICATED"), call(121, "UNAUTHENTICATED"), call(1, "CANCELLED")];
        let expect = ["calls from 192.0.2.7 end with UNAUTHENTICATED: the bearer token is not known"];
        assert_eq!(whats(unanswered(&calls, now).collect()), expect);
        assert!(unanswered(&calls[1..], now).next().is_none(), "nobody needs to act on a caller that left");
    }

    /// It is named by its setting if it was reached within the window.
    #[test]
    fn a_limit_that_is_reached_is_named() {
        let totals = |refusals: u64, connections: u64| Totals {
            limited: [
                (("byokgate_new_key_refusals".to_owned(), "platform".to_owned()), refusals),
                (("byokgate_connections_refused".to_owned(), "limit".to_owned()), connections),
            ]
            .into(),
            ..Totals::default()
        };
        let whats: Vec<String> = limited(&totals(12, 3), &totals(2, 3), &[]).into_iter().map(|line| line.what).collect();
        assert_eq!(whats, ["10 credentials were not checked, and denied: new_keys.per_platform is used up"]);
        let top = [("192.0.2.7".to_owned(), 812), ("192.0.2.8".to_owned(), 3)];
        let whats: Vec<String> = limited(&totals(2, 5), &totals(2, 3), &top).into_iter().map(|line| line.what).collect();
        let expect = "2 connections were refused: limits.connections is reached; most of the open ones are of 192.0.2.7 (812), 192.0.2.8 (3)";
        assert_eq!(whats, [expect]);
    }

    fn checks(accepted: u64, refused: u64, failed: u64) -> Checks {
        Checks { accepted, refused, answered: accepted + refused, failed }
    }

    fn of_acme(checks: Checks) -> Totals {
        Totals { checks: [("acme".to_owned(), checks)].into(), ..Totals::default() }
    }

    /// The counts come from the metrics page; results from the cache say nothing about how the provider answers now.
    #[test]
    fn a_provider_that_accepts_no_key_is_named_with_the_time_since_when() {
        let start = UNIX_EPOCH + Duration::from_secs(1_000_000);
        let window = Window::since(start);
        window.note(start + SAMPLE_EVERY, of_acme(checks(3, 1, 0)));
        window.note(start + SAMPLE_EVERY * 2, of_acme(checks(3, 2, 0)));
        let of = |whose: usize, now: Checks| {
            let mut lines = Vec::new();
            let acme = Provider { provider: "acme".into(), ..Provider::default() };
            refuses_all(&acme, window.since_accepted("acme", now), whose, &mut |what, _| lines.push(what));
            lines
        };
        let reported = |now: Checks| of(3, now);
        assert!(of(2, checks(3, 90, 0)).is_empty(), "two tenants with dead keys");
        let since = text_of(start + SAMPLE_EVERY);
        assert_eq!(reported(checks(3, 6, 0)), [format!("no key of provider `acme` was accepted since {since}: 5 were refused")]);
        assert!(reported(checks(3, 5, 0)).is_empty(), "few refused keys need no attention");
        assert!(reported(checks(4, 90, 0)).is_empty(), "a key was just accepted");
        assert_eq!(
            reported(checks(0, 5, 0)),
            [format!("no key of provider `acme` was accepted since {}: 5 were refused", text_of(start))]
        );
    }

    #[test]
    fn one_good_answer_does_not_hide_an_outage() {
        let acme = Provider {
            provider: "acme".into(),
            last_failure: Some(LastFailure {
                at: "1970-01-12T13:46:40Z".into(),
                verdict: "PROVIDER_ERROR".into(),
                cause: "HTTP 500".into(),
                remedy: "look".into(),
            }),
            ..Provider::default()
        };
        let failed_at = UNIX_EPOCH + Duration::from_secs(1_000_000);
        let later = |spans, time| {
            let mut lines = Vec::new();
            unreliable(&acme, spans, failed_at + time, &mut |what, _| lines.push(what));
            lines
        };
        let reported = |spans| later(spans, Duration::from_secs(1));
        let line = |counts: &str| {
            [format!("{counts} checks of provider `acme` came to no result; the last, at 1970-01-12T13:46:40Z: HTTP 500")]
        };
        assert_eq!(reported([None, Some(checks(1, 0, 7))]), line("7 of the last 8"));
        assert_eq!(reported([Some(checks(0, 0, 3)), Some(checks(90, 0, 3))]), line("3 of the last 3"), "since the last VALID");
        assert_eq!(reported([None, Some(checks(3, 1, 4))]), line("4 of the last 8"), "half of them");
        assert!(reported([None, Some(checks(4, 1, 4))]).is_empty(), "less than half");
        assert!(later([None, Some(checks(1, 0, 7))], WINDOW).is_empty(), "an older fault is not theirs");
        assert!(reported([Some(checks(0, 0, 2)), Some(checks(1, 0, 2))]).is_empty(), "a hiccup");
    }

    #[test]
    fn what_is_shown_moves_no_cursor_and_turns_no_line() {
        assert_eq!(printable("a\u{1b}[2J\u{202e}b\n"), "a\u{fffd}[2J\u{fffd}b\u{fffd}");
    }
}
