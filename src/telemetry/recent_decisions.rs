//! What the status page shows of recent calls: the last denials and unverified allows, the last calls that ended without a decision, and why the
//! last probe of each provider was inconclusive. The lists are bounded, and plain allows are not kept.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    num::NonZeroU64,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, SystemTime},
};

use rand::Rng;
use uuid::Uuid;

use super::{cause, cut, events::Undecided};
use crate::{
    core::{classify::Finding, engine::Decided},
    domain::{
        decision::{Decision, Liveness, Outcome, Resolution},
        request::{Credential, CredentialValue, Peer, Request},
        secret::keyed_hash,
        verdict::{ServedFrom, Verdict, Withheld},
    },
};

/// How many entries each list holds. Denials and unverified allows have lists of their own, so that neither pushes out the other.
const MAX_ENTRIES: usize = 100;
/// How many providers are kept: far more than any registry has.
const MAX_PROVIDERS: usize = 1_000;

/// The recent decisions, calls without a decision, and failures.
#[derive(Debug)]
pub struct RecentDecisions {
    /// Whether workspace ids are kept.
    workspace_ids: bool,
    denials: Mutex<VecDeque<Arc<Entry>>>,
    unverified: Mutex<VecDeque<Arc<Entry>>>,
    undecided: Mutex<VecDeque<UndecidedCalls>>,
    failures: Mutex<BTreeMap<String, Failure>>,
    /// Whose keys each provider refused since it accepted one, as keyed hashes.
    refused: Mutex<BTreeMap<String, BTreeSet<[u8; 32]>>>,
    hash_key: [u8; 32],
}

/// A decision in names and codes. It holds no credential's value and no organization.
#[derive(Debug)]
pub struct Entry {
    /// When it was made.
    pub at: SystemTime,
    /// The decision's id.
    pub id: Uuid,
    /// Its checkpoint.
    pub checkpoint: &'static str,
    /// Whether its caller only reports it and does not act on it.
    pub report_only: bool,
    /// The workspace's id; empty unless ids are kept.
    pub workspace_id: String,
    /// The runtime.
    pub runtime: String,
    /// The model.
    pub model: String,
    /// The provider; empty if none was derived.
    pub provider: String,
    /// The deny code; empty for an allow.
    pub code: &'static str,
    /// The verdict; empty if no probe was needed.
    pub verdict: &'static str,
    /// The provider's host; empty if there is none.
    pub host: String,
    /// The peer of its call.
    pub peer: Peer,
    /// The time that the caller gave the call, if that was too little for the provider to answer.
    pub too_little_time: Option<Duration>,
    finding: Option<Arc<Finding>>,
    /// Why it was denied, if no probe was made.
    reason: String,
}

/// Calls of one peer that ended without a decision, for the same reason.
#[derive(Debug, Clone)]
pub struct UndecidedCalls {
    /// When the last one ended.
    pub at: SystemTime,
    /// How many there were since this entry exists.
    pub count: u64,
    /// The method.
    pub method: &'static str,
    /// gRPC's name of the status.
    pub grpc_code: &'static str,
    /// The status's message.
    pub reason: String,
    /// The peer's address.
    pub peer: String,
    /// The caller; empty if it is not known.
    pub caller: String,
    /// Whether they were only to be reported, and no workspace was to start.
    pub report_only: bool,
}

/// Why a provider's last probe was inconclusive.
#[derive(Debug, Clone)]
pub struct Failure {
    /// When a decision last used it.
    pub at: SystemTime,
    /// The verdict.
    pub verdict: Verdict,
    host: String,
    finding: Arc<Finding>,
}

// === impl RecentDecisions ===

impl RecentDecisions {
    /// Empty lists. `workspace_ids`: whether workspace ids are kept.
    pub fn new(workspace_ids: bool) -> Self {
        Self {
            workspace_ids,
            denials: Mutex::default(),
            unverified: Mutex::default(),
            undecided: Mutex::default(),
            failures: Mutex::default(),
            refused: Mutex::default(),
            hash_key: rand::rng().random(),
        }
    }

    /// Records a decision. `caller_time` is what the caller gave the call, in microseconds, if that is less than it may have.
    pub fn decided(
        &self,
        request: &Request,
        Decided { id, decision, finding, .. }: &Decided,
        peer: Peer,
        caller_time: Option<NonZeroU64>,
    ) {
        let Decision { outcome, resolution, liveness, .. } = decision;
        // Results from the cache say nothing about how the provider answers now.
        let is_new = |liveness: &&Liveness| liveness.seen.is_some_and(|seen| seen.served_from == ServedFrom::Probe);
        if let Some(liveness) = liveness.as_ref().filter(is_new) {
            self.note_whose(liveness.verdict, request, resolution);
        }
        let (list, code) = match outcome {
            Outcome::Deny(deny) => (&self.denials, deny.refusal.code().as_str()),
            Outcome::Allow(_) if decision.is_unverified_allow() => (&self.unverified, ""),
            Outcome::Allow(_) => return,
        };
        let at = SystemTime::now();
        let host = liveness.as_ref().map_or_else(String::new, |liveness| liveness.endpoint_host.clone());
        let too_little_time = finding.as_ref().and_then(|finding| too_little(finding, caller_time));
        // A caller that did not wait says nothing about the provider.
        if let Some(finding) = finding.as_ref().filter(|finding| is_inconclusive(finding.verdict) && too_little_time.is_none()) {
            let failure = Failure { at, verdict: finding.verdict, host: host.clone(), finding: Arc::clone(finding) };
            let mut failures = lock(&self.failures);
            if failures.len() >= MAX_PROVIDERS && !failures.contains_key(&resolution.provider) {
                // Most names are from registries that are no longer loaded.
                failures.clear();
            }
            failures.insert(resolution.provider.clone(), failure);
        }
        let entry = Entry {
            at,
            id: *id,
            checkpoint: request.checkpoint.as_str(),
            report_only: request.report_only,
            workspace_id: if self.workspace_ids { cut(&request.spec.workspace_id) } else { String::new() },
            runtime: cut(&request.spec.runtime),
            model: cut(&request.spec.model),
            provider: resolution.provider.clone(),
            code,
            verdict: liveness.as_ref().map_or("", |liveness| liveness.verdict.as_str()),
            host,
            peer,
            too_little_time,
            finding: finding.clone(),
            reason: match outcome {
                Outcome::Deny(deny) if finding.is_none() => cut(&deny.message),
                Outcome::Deny(_) | Outcome::Allow(_) => String::new(),
            },
        };
        let mut list = lock(list);
        if list.len() >= MAX_ENTRIES {
            list.pop_front();
        }
        list.push_back(Arc::new(entry));
    }

    /// Notes whose key a provider has refused: an organization's, or this key where none is named. An accepted key clears the list.
    fn note_whose(&self, verdict: Verdict, request: &Request, resolution: &Resolution) {
        match verdict {
            Verdict::Valid => drop(lock(&self.refused).remove(&resolution.provider)),
            Verdict::Invalid | Verdict::Forbidden => {
                let organization = request.spec.organization_id.as_str();
                let judged = resolution.credential.as_ref();
                let is_judged = |key: &&Credential| judged.is_some_and(|it| it.env_name == key.env_name && it.scope == key.scope);
                let whose = match request.spec.credentials.iter().find(is_judged).map(|key| &key.value) {
                    Some(CredentialValue::Readable(secret)) if organization.is_empty() => {
                        keyed_hash(&self.hash_key, secret.expose().as_bytes())
                    }
                    _ => keyed_hash(&self.hash_key, format!("organization {organization}").as_bytes()),
                };
                let mut refused = lock(&self.refused);
                if refused.len() >= MAX_PROVIDERS && !refused.contains_key(&resolution.provider) {
                    refused.clear();
                }
                let list = refused.entry(resolution.provider.clone()).or_default();
                if list.len() < MAX_ENTRIES {
                    list.insert(whose);
                }
            }
            _ => {}
        }
    }

    /// How many organizations, or keys where none is named, this provider has refused since it accepted a key; a hundred at most.
    pub fn refused_of(&self, provider: &str) -> usize {
        lock(&self.refused).get(provider).map_or(0, BTreeSet::len)
    }

    /// Records a call that ended without a decision. A repeated one is counted and not listed again, so that it does not push out the others.
    pub fn undecided(&self, call: &Undecided<'_>) {
        let Undecided { method, grpc_code, reason, peer, caller, report_only, .. } = *call;
        let new = UndecidedCalls {
            at: SystemTime::now(),
            count: 1,
            method,
            grpc_code,
            reason: cut(reason),
            peer: peer.to_string(),
            caller: cut(caller),
            report_only,
        };
        let mut list = lock(&self.undecided);
        let known = list.iter().rposition(|known| known.is_like(&new)).and_then(|at| list.remove(at));
        if list.len() >= MAX_ENTRIES {
            list.pop_front();
        }
        list.push_back(UndecidedCalls { count: 1 + known.map_or(0, |known| known.count), ..new });
    }

    /// The last calls without a decision, newest first.
    pub fn undecided_calls(&self) -> Vec<UndecidedCalls> {
        lock(&self.undecided).iter().rev().cloned().collect()
    }

    /// The last denials, newest first.
    pub fn denials(&self) -> Vec<Arc<Entry>> {
        lock(&self.denials).iter().rev().cloned().collect()
    }

    /// The last unverified allows, newest first.
    pub fn unverified_allows(&self) -> Vec<Arc<Entry>> {
        lock(&self.unverified).iter().rev().cloned().collect()
    }

    /// Why this provider's last probe was inconclusive.
    pub fn failure(&self, provider: &str) -> Option<Failure> {
        lock(&self.failures).get(provider).cloned()
    }
}

// === impl UndecidedCalls, Entry, Failure ===

impl UndecidedCalls {
    /// Whether both are of the same peer and caller, and for the same reason.
    fn is_like(&self, other: &Self) -> bool {
        let key = |it: &Self| (it.method, it.grpc_code, it.report_only);
        key(self) == key(other) && self.peer == other.peer && self.caller == other.caller && self.reason == other.reason
    }
}

impl Entry {
    /// Why no probe was sent, and what to do; `None` if one was, or if none was needed.
    pub fn withheld(&self) -> Option<(Withheld, &'static str)> {
        let finding = self.finding.as_ref()?;
        Some((finding.withheld?, cause::remedy(finding)))
    }

    /// The cause, in one sentence.
    pub fn cause(&self) -> String {
        self.finding.as_ref().map_or_else(|| self.reason.clone(), |finding| cause::sentence(&self.host, finding))
    }
}

impl Failure {
    /// The cause, in one sentence.
    pub fn cause(&self) -> String {
        cause::sentence(&self.host, &self.finding)
    }

    /// What to do.
    pub fn remedy(&self) -> &'static str {
        cause::remedy(&self.finding)
    }
}

/// Whether the verdict says nothing about the credential: the fault is the provider's, the network's or this service's.
const fn is_inconclusive(verdict: Verdict) -> bool {
    match verdict {
        Verdict::RateLimited
        | Verdict::ProviderError
        | Verdict::UnexpectedResponse
        | Verdict::Timeout
        | Verdict::Unreachable
        | Verdict::NotAttempted
        | Verdict::NotCalibrated => true,
        Verdict::Valid
        | Verdict::Invalid
        | Verdict::Forbidden
        | Verdict::QuotaExhausted
        | Verdict::NoServerSurface
        | Verdict::ProbeDisabled => false,
    }
}

/// The time that the caller gave the call, if the provider had most of it and needed more. Otherwise a queue or the like took the time.
fn too_little(finding: &Finding, caller_time: Option<NonZeroU64>) -> Option<Duration> {
    let given = Duration::from_micros(caller_time?.get());
    finding.cut_short.filter(|had| *had * 2 >= given).map(|_| given)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A panic cannot leave a list inconsistent: the code that changes it cannot panic.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
