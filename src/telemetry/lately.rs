//! The last decisions that a person may ask about, the last calls that ended without one, and why each provider last left one open: for the
//! status page. So many and no more; of a plain allow, nothing.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::SystemTime,
};

use uuid::Uuid;

use super::{cause, events::Undecided};
use crate::{
    core::{classify::Finding, engine::Decided},
    domain::{
        decision::{Decision, Outcome},
        request::Request,
        verdict::Verdict,
    },
};

/// So many denials are kept, and so many unverified allows: either would push out the other in one list.
const MAX_ENTRIES: usize = 100;
/// Far more providers than any registry has.
const MAX_PROVIDERS: usize = 1_000;
/// A model or a runtime that is longer is cut: what an agent is called is under a hundred characters.
const MAX_CHARS: usize = 200;

/// What was decided lately.
#[derive(Debug)]
pub struct Lately {
    /// Whether a workspace's id is kept.
    workspace_ids: bool,
    denials: Mutex<VecDeque<Arc<Entry>>>,
    unverified: Mutex<VecDeque<Arc<Entry>>>,
    undecided: Mutex<VecDeque<UndecidedCalls>>,
    failures: Mutex<BTreeMap<String, Failure>>,
}

/// A decision, in names and codes. No value of a credential, no organization.
#[derive(Debug)]
pub struct Entry {
    /// When.
    pub at: SystemTime,
    /// The decision's id.
    pub id: Uuid,
    /// At which checkpoint.
    pub checkpoint: &'static str,
    /// Its caller does not act on it.
    pub report_only: bool,
    /// Empty unless it is kept.
    pub workspace_id: String,
    /// The runtime.
    pub runtime: String,
    /// The model.
    pub model: String,
    /// The provider; empty if none was derived.
    pub provider: String,
    /// The deny code; empty for an allow.
    pub code: &'static str,
    /// The verdict; empty where nobody had to be asked.
    pub verdict: &'static str,
    /// The provider's host; empty where there is none.
    pub host: String,
    finding: Option<Arc<Finding>>,
    /// Why it was denied without asking anybody.
    reason: String,
}

/// Calls of one peer that ended without a decision, in one way.
#[derive(Debug, Clone)]
pub struct UndecidedCalls {
    /// When the last one ended.
    pub at: SystemTime,
    /// How many there were, as long as they are kept.
    pub count: u64,
    /// The method.
    pub method: &'static str,
    /// gRPC's name of the status.
    pub grpc_code: &'static str,
    /// The status's message.
    pub reason: String,
    /// Where they came from.
    pub peer: String,
    /// Who it was; empty where that is not known.
    pub caller: String,
    /// Nothing was to start.
    pub report_only: bool,
}

/// Why a provider last left a credential's state open.
#[derive(Debug, Clone)]
pub struct Failure {
    /// When a decision met it last.
    pub at: SystemTime,
    /// The verdict.
    pub verdict: Verdict,
    host: String,
    finding: Arc<Finding>,
}

// === impl Lately ===

impl Lately {
    /// Nothing yet.
    pub fn new(workspace_ids: bool) -> Self {
        Self {
            workspace_ids,
            denials: Mutex::default(),
            unverified: Mutex::default(),
            undecided: Mutex::default(),
            failures: Mutex::default(),
        }
    }

    /// A decision was made.
    pub fn decided(&self, request: &Request, Decided { id, decision, finding, .. }: &Decided) {
        let Decision { outcome, resolution, liveness, .. } = decision;
        let (list, code) = match outcome {
            Outcome::Deny(deny) => (&self.denials, deny.refusal.code().as_str()),
            Outcome::Allow(_) if decision.is_unverified_allow() => (&self.unverified, ""),
            Outcome::Allow(_) => return,
        };
        let at = SystemTime::now();
        let host = liveness.as_ref().map_or_else(String::new, |liveness| liveness.endpoint_host.clone());
        if let Some(finding) = finding.as_ref().filter(|finding| leaves_open(finding.verdict)) {
            let failure = Failure { at, verdict: finding.verdict, host: host.clone(), finding: Arc::clone(finding) };
            let mut failures = lock(&self.failures);
            if failures.len() >= MAX_PROVIDERS && !failures.contains_key(&resolution.provider) {
                // Names of registries that are no longer loaded.
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
            finding: finding.clone(),
            reason: match outcome {
                Outcome::Deny(deny) if finding.is_none() => cut(&deny.refusal.message()),
                Outcome::Deny(_) | Outcome::Allow(_) => String::new(),
            },
        };
        let mut list = lock(list);
        if list.len() >= MAX_ENTRIES {
            list.pop_front();
        }
        list.push_back(Arc::new(entry));
    }

    /// A call ended without a decision. What repeats itself is counted and not listed again, so that it does not push out the rest.
    pub fn undecided(&self, call: &Undecided<'_>) {
        let Undecided { method, grpc_code, reason, peer, request, report_only, caller_time: _, trace_id: _ } = *call;
        let new = UndecidedCalls {
            at: SystemTime::now(),
            count: 1,
            method,
            grpc_code,
            reason: cut(reason),
            peer: peer.to_string(),
            caller: request.map_or_else(String::new, |request| cut(&request.caller.name)),
            report_only,
        };
        let mut list = lock(&self.undecided);
        let known = list.iter().rposition(|known| known.is_like(&new)).and_then(|at| list.remove(at));
        if list.len() >= MAX_ENTRIES {
            list.pop_front();
        }
        list.push_back(UndecidedCalls { count: 1 + known.map_or(0, |known| known.count), ..new });
    }

    /// The last calls without a decision, the newest first.
    pub fn undecided_calls(&self) -> Vec<UndecidedCalls> {
        lock(&self.undecided).iter().rev().cloned().collect()
    }

    /// The last denials, the newest first.
    pub fn denials(&self) -> Vec<Arc<Entry>> {
        lock(&self.denials).iter().rev().cloned().collect()
    }

    /// The last allows that nobody could verify, the newest first.
    pub fn unverified_allows(&self) -> Vec<Arc<Entry>> {
        lock(&self.unverified).iter().rev().cloned().collect()
    }

    /// Why this provider last left one open.
    pub fn failure(&self, provider: &str) -> Option<Failure> {
        lock(&self.failures).get(provider).cloned()
    }
}

// === impl UndecidedCalls, Entry, Failure ===

impl UndecidedCalls {
    /// Of the same peer and caller, in the same way.
    fn is_like(&self, other: &Self) -> bool {
        let key = |it: &Self| (it.method, it.grpc_code, it.report_only);
        key(self) == key(other) && self.peer == other.peer && self.caller == other.caller && self.reason == other.reason
    }
}

impl Entry {
    /// Why, in one sentence.
    pub fn cause(&self) -> String {
        self.finding.as_ref().map_or_else(|| self.reason.clone(), |finding| cause::sentence(&self.host, finding))
    }
}

impl Failure {
    /// The same.
    pub fn cause(&self) -> String {
        cause::sentence(&self.host, &self.finding)
    }

    /// What to do.
    pub fn remedy(&self) -> &'static str {
        cause::remedy(&self.finding)
    }
}

/// It says nothing of the credential: the provider, the way there, or we are at fault.
const fn leaves_open(verdict: Verdict) -> bool {
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

fn cut(text: &str) -> String {
    let mut left = text.chars();
    let mut cut: String = left.by_ref().take(MAX_CHARS).collect();
    if left.next().is_some() {
        cut.push('…');
    }
    cut
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A panic cannot leave a list half-changed: what changes it cannot panic.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
