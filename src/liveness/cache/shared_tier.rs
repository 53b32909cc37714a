//! The cache and the tier that replicas share: a flight looks there before it probes, and a refusal that another replica saw is forgotten here.

use std::{hash::BuildHasherDefault, sync::Arc, time::Duration};

use tokio::time::Instant;

use super::{
    Cache, MAX_ENTRIES,
    ages::Ages,
    entries::{CacheEntry, CachedEntries, KeyedFinding, Memory, TimedFinding},
    keys::{Key, Keys, PrehashedHasher, client_of},
};
use crate::{
    core::{
        classify::Finding,
        credential::LivenessQuery,
        engine::{Boxed, ProbeRequest},
    },
    domain::verdict::Verdict,
    liveness::tier::{
        Allowance, CredentialIdentity, Lease, LookupResult, Model, ObservationId, ObservationRecord, SharedObservation, Tier,
    },
};

/// The shared tier, and the cache key for each of its ids that this replica has used.
pub(super) struct TierLink {
    pub(super) tier: Arc<Tier>,
    pub(super) key_of: moka::sync::Cache<ObservationId, Key, BuildHasherDefault<PrehashedHasher>>,
}

/// A flight's lookup in the shared tier.
pub(super) struct TierLookup {
    pub(super) tier_link: Arc<TierLink>,
    /// Set for a new credential of an organization: it counts against the limit over all replicas.
    pub(super) allowance: Option<Allowance>,
    pub(super) memory: Memory,
    pub(super) ages: Ages,
    pub(super) first: Key,
    pub(super) second: Option<Key>,
    pub(super) client: [u8; 2],
    pub(super) model: String,
    pub(super) max_age: Option<Duration>,
}

// === impl Cache ===

impl Cache {
    /// Shares observations with other replicas over this tier.
    #[must_use]
    pub fn with_tier(self, tier: Option<Arc<Tier>>) -> Self {
        let tier_link = tier.map(|tier| {
            let key_of = moka::sync::Cache::builder().max_capacity(MAX_ENTRIES).time_to_live(self.ages.hard_maximum);
            Arc::new(TierLink { tier, key_of: key_of.build_with_hasher(BuildHasherDefault::default()) })
        });
        Self { tier_link, ..self }
    }

    /// A task that runs for ever and forgets each observation that another replica saw refused. `None` without a shared tier.
    pub fn refusal_listener(&self) -> Option<Boxed<'static, ()>> {
        let tier_link = Arc::clone(self.tier_link.as_ref()?);
        let (tier, memory) = (Arc::clone(&tier_link.tier), self.memory.clone());
        Some(Box::pin(tier.listen(move |id| {
            if let Some(key) = tier_link.key_of.get(&id) {
                forget_refused(&memory, key, Instant::now());
            }
        })))
    }

    /// Collects what a flight needs for its lookup in the shared tier.
    pub(super) fn tier_lookup(
        &self,
        tier_link: &Arc<TierLink>,
        query: &LivenessQuery<'_>,
        keys: &Keys<'_>,
        max_age: Option<Duration>,
        is_new: bool,
    ) -> TierLookup {
        let is_counted = is_new && !query.organization.is_empty();
        let per_minute = self.new_keys.per_organization();
        TierLookup {
            tier_link: Arc::clone(tier_link),
            allowance: is_counted.then(|| tier_link.tier.allowance(query.organization, per_minute)).flatten(),
            memory: self.memory.clone(),
            ages: self.ages,
            first: keys.first,
            second: self.hash_keys.second(keys),
            client: client_of(query.preference),
            model: query.model.to_owned(),
            max_age,
        }
    }
}

// === impl TierLookup ===

impl TierLookup {
    /// Another replica's open breaker counts for `longest` at most.
    pub(super) async fn run(self, request: &ProbeRequest, longest: Duration) -> LookupResult<KeyedFinding> {
        let Self { tier_link, allowance, memory, ages, first, second, client, model, max_age } = self;
        let endpoint = &request.target.endpoint;
        let model = if second.is_some() { Model::Sometimes(&model) } else { Model::Always(&model) };
        let entry = tier_link.tier.entry(&CredentialIdentity {
            endpoint: &endpoint.identity,
            client,
            value: request.secret.expose(),
            model,
        });
        for (id, of_model) in entry.ids() {
            tier_link.key_of.insert(id, second.filter(|_| of_model).unwrap_or(first));
        }
        let take = |found: Vec<SharedObservation>| {
            for shared in found {
                let key = second.filter(|_| shared.about_model).unwrap_or(first);
                merge_shared(&memory, (first, key), shared, &ages);
            }
            let known = CachedEntries { first: memory.get(&first), second: second.and_then(|key| memory.get(&key)) };
            let (timed, _) = ages.fresh(&known, max_age, Instant::now())?;
            let is_here = |cached: &CacheEntry| cached.latest.as_ref().is_some_and(|latest| Arc::ptr_eq(latest, timed));
            let key = second.filter(|_| known.second.as_ref().is_some_and(is_here)).unwrap_or(first);
            Some(KeyedFinding { timed: Arc::clone(timed), key })
        };
        entry.look_up(longest, allowance.as_ref(), take).await
    }
}

/// Stores another replica's observation. It is dropped if the local entry is newer, or if the credential was refused since.
pub(super) fn merge_shared(memory: &Memory, (first, key): (Key, Key), shared: SharedObservation, ages: &Ages) {
    let SharedObservation { finding, at, wall, fresh_for, earlier_valid, refused_at, about_model: _ } = shared;
    let mut entry = memory.get(&key).unwrap_or_default();
    if entry.latest.as_ref().is_some_and(|latest| latest.at >= at) {
        return;
    }
    entry.refused_at = entry.refused_at.max(refused_at);
    if finding.verdict == Verdict::Valid && entry.refused_at.is_some_and(|refused_at| refused_at >= at) {
        return;
    }
    let timed = |finding: Finding, at, wall, fresh_for| {
        Arc::new(TimedFinding { finding: Arc::new(finding), at, wall, fresh_for, shared: true })
    };
    // Not longer than this replica's own settings allow.
    let fresh_for = fresh_for.min(ages.fresh_for(&finding));
    let latest = timed(finding, at, wall, fresh_for);
    let valid = if latest.finding.verdict == Verdict::Valid {
        Some(Arc::clone(&latest))
    } else {
        let earlier = earlier_valid.map(|(finding, at, wall)| timed(finding, at, wall, Duration::ZERO));
        entry.valid.take().into_iter().chain(earlier).max_by_key(|valid| valid.at)
    };
    entry.valid = valid.filter(|valid| entry.refused_at.is_none_or(|refused_at| refused_at < valid.at));
    entry.latest = Some(latest);
    memory.insert(key, entry);
    if key != first {
        let entry = memory.get(&first).unwrap_or_default();
        memory.insert(first, CacheEntry { per_model: true, ..entry });
    }
}

/// Clears an entry that another replica just saw refused, so that the next call looks it up again. The time of the refusal is stored even
/// without an entry: an older VALID may still be on its way here.
pub(super) fn forget_refused(memory: &Memory, key: Key, now: Instant) {
    let entry = memory.get(&key).unwrap_or_default();
    let is_refused =
        entry.latest.as_ref().is_some_and(|latest| matches!(latest.finding.verdict, Verdict::Invalid | Verdict::Forbidden));
    if !is_refused {
        memory.insert(key, CacheEntry { latest: None, valid: None, refused_at: Some(now), ..entry });
    }
}

/// The entry with this observation, in the form that the tier stores.
pub(super) fn to_record(memory: &Memory, KeyedFinding { timed, key }: &KeyedFinding, lease: &Lease) -> Option<ObservationRecord> {
    let entry = memory.get(key)?;
    let is_valid = timed.finding.verdict == Verdict::Valid;
    let earlier_valid = entry.valid.filter(|_| !is_valid).map(|valid| ((*valid.finding).clone(), lease.time_of(valid.at)));
    Some(ObservationRecord {
        finding: (*timed.finding).clone(),
        at: lease.time_of(timed.at),
        fresh_for: timed.fresh_for,
        earlier_valid,
        refused_at: entry.refused_at.map(|at| lease.time_of(at)),
    })
}

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_refusal_that_arrives_first_wins_over_an_older_valid() {
        let memory: Memory = moka::sync::Cache::builder().max_capacity(9).build_with_hasher(BuildHasherDefault::default());
        let (key, ages) = ([7; 32], Ages::default());
        let valid = |at| SharedObservation {
            finding: Finding::bare(Verdict::Valid),
            at,
            wall: SystemTime::UNIX_EPOCH,
            fresh_for: Duration::from_secs(30),
            earlier_valid: None,
            refused_at: None,
            about_model: false,
        };
        let began = Instant::now();
        tokio::time::advance(Duration::from_secs(1)).await;
        // The store answered before the refusal was stored, and its answer arrives after the message about the refusal.
        forget_refused(&memory, key, Instant::now());
        merge_shared(&memory, (key, key), valid(began), &ages);
        assert!(memory.get(&key).is_none_or(|entry| entry.latest.is_none() && entry.valid.is_none()));
        tokio::time::advance(Duration::from_secs(1)).await;
        merge_shared(&memory, (key, key), valid(Instant::now()), &ages);
        assert!(memory.get(&key).is_some_and(|entry| entry.latest.is_some() && entry.valid.is_some()), "a newer one counts");
    }
}
