//! Counts and durations of decisions.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};
use strum::VariantArray;

use arc_swap::ArcSwap;

use super::{Collect, Counter, Histogram, PROVIDER, Page};
use crate::domain::{
    decision::{Decision, Grounds, Outcome},
    request::{Checkpoint, Request},
    verdict::{DenyCode, ServedFrom, Verdict},
};

/// How many providers are kept. Their names come from loaded registries, so there are few. The limit is for endless reloads that rename them.
const MAX_PROVIDERS: usize = 1_000;

/// Counts of decisions.
#[derive(Debug, Default)]
pub struct Decisions {
    by_provider: ArcSwap<ByProvider>,
    adding: Mutex<()>,
    panicked: Counter,
}

type ByProvider = BTreeMap<String, Arc<ProviderCounts>>;

/// The counts of one provider. The empty name stands for decisions made before a provider was known.
#[derive(Debug, Default)]
struct ProviderCounts {
    made: ByOutcome,
    /// Decisions with `report_only`, which their callers do not act on.
    reported: ByOutcome,
    judged: [[Counter; ServedFrom::VARIANTS.len()]; Verdict::VARIANTS.len()],
    /// Verdicts that needed no probe.
    unprobed: [Counter; Verdict::VARIANTS.len()],
    unverified: [Counter; Verdict::VARIANTS.len()],
    took: Histogram,
}

#[derive(Debug, Default)]
struct ByOutcome {
    allowed: [Counter; Checkpoint::VARIANTS.len()],
    denied: [[Counter; DenyCode::VARIANTS.len()]; Checkpoint::VARIANTS.len()],
}

// === impl Decisions ===

impl Decisions {
    /// Counts a decision.
    pub fn made(&self, request: &Request, decision: &Decision, took: Duration) {
        let name = decision.resolution.provider.as_str();
        match self.by_provider.load().get(name) {
            Some(counts) => counts.made(request, decision, took),
            None => self.add_provider(name).made(request, decision, took),
        }
    }

    /// Counts a decision that panicked.
    pub fn panicked(&self) {
        self.panicked.inc();
    }

    #[cold]
    fn add_provider(&self, name: &str) -> Arc<ProviderCounts> {
        // A panic cannot leave the map inconsistent: it is replaced as a whole.
        let _one_at_a_time = self.adding.lock().unwrap_or_else(PoisonError::into_inner);
        let known = self.by_provider.load();
        if let Some(of) = known.get(name) {
            return Arc::clone(of);
        }
        let mut by_provider = if known.len() < MAX_PROVIDERS { ByProvider::clone(&known) } else { ByProvider::new() };
        let of = Arc::new(ProviderCounts::default());
        by_provider.insert(name.to_owned(), Arc::clone(&of));
        self.by_provider.store(Arc::new(by_provider));
        of
    }
}

impl Collect for Decisions {
    fn collect(&self, page: &mut Page) {
        for (provider, of) in self.by_provider.load().iter() {
            of.collect(provider, page);
        }
        page.counter("byokgate_decisions_panicked", "Decisions that ended in a panic; the caller got INTERNAL")
            .add(&[], &self.panicked);
    }
}

// === impl ProviderCounts ===

impl ProviderCounts {
    fn made(&self, request: &Request, decision: &Decision, took: Duration) {
        let Request { checkpoint, report_only, .. } = *request;
        let ByOutcome { allowed, denied } = if report_only { &self.reported } else { &self.made };
        let (of, unverified) = match &decision.outcome {
            Outcome::Allow(allow) => {
                let verdict = if let Grounds::Credential(verdict) = allow.grounds() { Some(verdict) } else { None };
                let unverified = verdict.filter(|_| decision.is_unverified_allow() && !report_only);
                (allowed.get(checkpoint as usize), unverified)
            }
            Outcome::Deny(deny) => {
                let of = denied.get(checkpoint as usize).and_then(|denied| denied.get(deny.refusal.code() as usize));
                (of, None)
            }
        };
        let judged = decision.liveness.as_ref().and_then(|liveness| match liveness.seen {
            Some(seen) => self.judged.get(liveness.verdict as usize).and_then(|judged| judged.get(seen.served_from as usize)),
            None => self.unprobed.get(liveness.verdict as usize),
        });
        let unverified = unverified.and_then(|verdict| self.unverified.get(verdict as usize));
        [of, judged, unverified].into_iter().flatten().for_each(Counter::inc);
        self.took.observe(took);
    }

    fn collect(&self, provider: &str, page: &mut Page) {
        let reported = "Decisions whose callers do not act on them: no workspace was started or refused";
        for (name, help, ByOutcome { allowed, denied }) in
            [("byokgate_decisions", "Decisions made", &self.made), ("byokgate_report_only_decisions", reported, &self.reported)]
        {
            let mut decisions = page.counter(name, help);
            for (checkpoint, (allowed, denied)) in Checkpoint::VARIANTS.iter().zip(allowed.iter().zip(denied)) {
                let of = |outcome, code| {
                    [("checkpoint", checkpoint.as_str()), ("outcome", outcome), ("code", code), (PROVIDER, provider)]
                };
                decisions.add_if_any(&of("ALLOW", ""), allowed);
                for (code, count) in DenyCode::VARIANTS.iter().zip(denied) {
                    decisions.add_if_any(&of("DENY", code.as_str()), count);
                }
            }
        }
        let mut verdicts = page.counter("byokgate_verdicts", "Decisions that rested on a verdict about a credential");
        for (verdict, (judged, unprobed)) in Verdict::VARIANTS.iter().zip(self.judged.iter().zip(&self.unprobed)) {
            let of = |served_from| [(PROVIDER, provider), ("verdict", verdict.as_str()), ("served_from", served_from)];
            for (served_from, count) in ServedFrom::VARIANTS.iter().zip(judged) {
                verdicts.add_if_any(&of(served_from.as_str()), count);
            }
            verdicts.add_if_any(&of(""), unprobed);
        }
        let mut unverified = page.counter("byokgate_unverified_allows", "Allows without proof that the credential is alive");
        for (verdict, count) in Verdict::VARIANTS.iter().zip(&self.unverified) {
            unverified.add_if_any(&[(PROVIDER, provider), ("verdict", verdict.as_str())], count);
        }
        if let Some(took) = self.took.value() {
            page.histogram(
                "byokgate_decide_duration_seconds",
                "From a valid request to its decision, including the wait for a slot",
            )
            .add(&[(PROVIDER, provider)], took);
        }
    }
}
