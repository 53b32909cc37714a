//! The cache and the tier that replicas share: a flight looks there before it probes, and a refusal that another replica saw is forgotten here.

use std::{hash::BuildHasherDefault, num::NonZeroU32, sync::Arc, time::Duration};

use tokio::time::Instant;

use super::{
    Cache, MAX_ENTRIES,
    ages::Ages,
    entries::{CacheEntry, CachedEntries, KeyedFinding, Memory, TimedFinding, insert},
    keys::{Key, Keys, PrehashedHasher, client_of},
};
use crate::{
    core::{
        classify::Finding,
        credential::LivenessQuery,
        engine::{Boxed, ProbeRequest, Prober},
    },
    domain::verdict::{Verdict, Withheld},
    liveness::{
        new_keys::{KeyLimit, NewKeys},
        provider_limits::ProviderLimiter,
        tier::{
            CredentialIdentity, Lease, LookupResult, Model, ObservationId, ObservationRecord, SharedCounts, SharedObservation,
            Tier,
        },
    },
};

/// The shared tier, and for each of its ids that this replica has used the credential's first cache key and the observation's.
pub(super) struct TierLink {
    pub(super) tier: Arc<Tier>,
    pub(super) keys_of: moka::sync::Cache<ObservationId, (Key, Key), BuildHasherDefault<PrehashedHasher>>,
    pub(super) limits: Option<FleetLimits>,
}

/// The limits of all replicas together, which the tier counts.
pub(super) struct FleetLimits {
    limiter: Arc<ProviderLimiter>,
    per_platform: NonZeroU32,
}

/// A flight's lookup in the shared tier.
pub(super) struct TierLookup {
    pub(super) tier_link: Arc<TierLink>,
    /// Set for a new credential: the organization that it counts for, which may be empty, and the platform if the tier counts platforms.
    pub(super) new_key_of: Option<(String, Option<String>)>,
    pub(super) new_keys: Arc<NewKeys>,
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
            let keys_of = moka::sync::Cache::builder().max_capacity(MAX_ENTRIES).time_to_live(self.ages.hard_maximum);
            Arc::new(TierLink { tier, keys_of: keys_of.build_with_hasher(BuildHasherDefault::default()), limits: None })
        });
        Self { tier_link, ..self }
    }

    /// Counts the starts of `limiter`, and the new credentials of a platform, over all replicas: with the tier, this replica's own share holds only
    /// while the tier fails. Without a tier it changes nothing.
    #[must_use]
    pub fn with_fleet_limits(self, limiter: Arc<ProviderLimiter>, per_platform: NonZeroU32) -> Self {
        let limits = Some(FleetLimits { limiter, per_platform });
        let tier_link = self.tier_link.map(|link| {
            let TierLink { tier, keys_of, .. } = &*link;
            Arc::new(TierLink { tier: Arc::clone(tier), keys_of: keys_of.clone(), limits })
        });
        Self { tier_link, ..self }
    }

    /// Whether the tier counts the new credentials of platforms.
    pub(super) fn counts_over_tier(&self) -> bool {
        self.tier_link.as_ref().is_some_and(|link| link.limits.is_some())
    }

    /// A task that runs for ever and forgets each observation that another replica saw refused. `None` without a shared tier.
    pub fn refusal_listener(&self) -> Option<Boxed<'static, ()>> {
        let tier_link = Arc::clone(self.tier_link.as_ref()?);
        let (tier, memory) = (Arc::clone(&tier_link.tier), self.memory.clone());
        Some(Box::pin(tier.listen(move |id| {
            if let Some(keys) = tier_link.keys_of.get(&id) {
                forget_refused(&memory, keys, Instant::now());
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
        let platform = Some(query.caller).filter(|caller| tier_link.limits.is_some() && !caller.is_workspace);
        let new_key_of = is_new.then(|| (query.organization.to_owned(), platform.map(|caller| caller.name.clone())));
        TierLookup {
            tier_link: Arc::clone(tier_link),
            new_key_of,
            new_keys: Arc::clone(&self.new_keys),
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
        let shared_counts = self.shared_counts(&request.target.endpoint.provider);
        let Self { tier_link, new_key_of, new_keys, memory, ages, first, second, client, model, max_age } = self;
        let endpoint = &request.target.endpoint;
        let model = if second.is_some() { Model::Sometimes(&model) } else { Model::Always(&model) };
        let entry = tier_link.tier.entry(&CredentialIdentity {
            endpoint: &endpoint.identity,
            client,
            value: request.secret.expose(),
            model,
        });
        for (id, of_model) in entry.ids() {
            tier_link.keys_of.insert(id, (first, second.filter(|_| of_model).unwrap_or(first)));
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
        let result = entry.look_up(longest, shared_counts, take).await;
        if let (LookupResult::Probe(lease), Some((_, Some(platform)))) = (&result, &new_key_of) {
            // Counted here too, so that nothing of this replica's share is left over when the tier fails. While it fails, that share holds.
            let counted = new_keys.count_for_platform(platform);
            if let (None, Err(wait)) = (lease, counted) {
                return LookupResult::Withheld(KeyLimit::Platform, wait);
            }
        }
        if let LookupResult::Later(_) = &result {
            // Its organization's count at this replica includes it already. The tier counts it with the lease.
            new_keys.remember_counted(first);
        }
        result
    }

    /// What counts over all replicas if this one probes.
    fn shared_counts(&self, provider: &str) -> SharedCounts {
        let (tier, mut counts) = (&self.tier_link.tier, SharedCounts::default());
        let limits = self.tier_link.limits.as_ref();
        if let Some((organization, platform)) = &self.new_key_of {
            if !organization.is_empty() {
                tier.count_key(&mut counts, KeyLimit::Organization, organization, self.new_keys.per_organization());
            }
            if let (Some(platform), Some(limits)) = (platform, limits) {
                tier.count_key(&mut counts, KeyLimit::Platform, platform, limits.per_platform);
            }
        }
        if let Some(FleetLimits { limiter, .. }) = limits {
            tier.count_start(&mut counts, provider, limiter.start_limit(provider));
        }
        counts
    }
}

// === impl TierLink ===

impl TierLink {
    /// Probes with the lease, at the start that came with it.
    pub(super) async fn probe(&self, lease: &Lease, request: ProbeRequest, prober: &dyn Prober) -> Finding {
        let probe = match (&self.limits, lease.start()) {
            (Some(FleetLimits { limiter, .. }), Some(start)) => limiter.probe_at(request, start),
            _ => prober.probe(request),
        };
        lease.run_renewed(probe).await
    }

    /// The finding for a credential whose start comes at `turn`.
    pub(super) fn withheld_until(&self, request: &ProbeRequest, turn: Instant) -> Finding {
        let limiter = self.limits.as_ref().map(|limits| &limits.limiter);
        let finding = limiter.map(|limiter| limiter.withheld_until(&request.target.endpoint.provider, request.credential, turn));
        // Starts are counted only with a limiter.
        finding.unwrap_or_else(|| Finding::withheld(Withheld::Budget))
    }
}

/// Stores another replica's observation. It is dropped if the local entry is newer, or if the credential was refused since. A refusal that it knows
/// of counts all the same: a newer result without one, such as a timeout, says nothing about the credential.
pub(super) fn merge_shared(memory: &Memory, (first, key): (Key, Key), shared: SharedObservation, ages: &Ages) {
    let SharedObservation { finding, at, wall, fresh_for, earlier_valid, refused_at, about_model: _ } = shared;
    let mut entry = memory.get(&key).unwrap_or_default();
    let refused_at = entry.refused_at.max(refused_at);
    let is_refused_since = |at| refused_at.is_some_and(|refused_at| refused_at >= at);
    let is_newer = entry.latest.as_ref().is_none_or(|latest| latest.at < at);
    if !is_newer || finding.verdict == Verdict::Valid && is_refused_since(at) {
        if entry.refused_at != refused_at {
            let valid = entry.valid.filter(|valid| !is_refused_since(valid.at));
            insert(memory, (first, key), CacheEntry { valid, refused_at, ..entry });
        }
        return;
    }
    entry.refused_at = refused_at;
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
    entry.valid = valid.filter(|valid| !is_refused_since(valid.at));
    entry.latest = Some(latest);
    insert(memory, (first, key), entry);
}

/// Clears an entry that another replica just saw refused, so that the next call looks it up again. The time of the refusal is stored even
/// without an entry: an older VALID may still be on its way here, or stand under the credential's other key.
pub(super) fn forget_refused(memory: &Memory, keys: (Key, Key), now: Instant) {
    let entry = memory.get(&keys.1).unwrap_or_default();
    let is_refused = |timed: &Arc<TimedFinding>| matches!(timed.finding.verdict, Verdict::Invalid | Verdict::Forbidden);
    let latest = entry.latest.filter(is_refused);
    insert(memory, keys, CacheEntry { latest, valid: None, refused_at: Some(now), per_model: entry.per_model });
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

    use super::{super::entries::remember, *};

    fn memory() -> Memory {
        moka::sync::Cache::builder().max_capacity(9).build_with_hasher(BuildHasherDefault::default())
    }

    fn shared(verdict: Verdict, at: Instant) -> SharedObservation {
        SharedObservation {
            finding: Finding::bare(verdict),
            at,
            wall: SystemTime::UNIX_EPOCH,
            fresh_for: Duration::from_secs(30),
            earlier_valid: None,
            refused_at: (verdict == Verdict::Invalid).then_some(at),
            about_model: false,
        }
    }

    fn own(verdict: Verdict, key: Key, fresh_for: u64) -> KeyedFinding {
        let (at, wall, fresh_for) = (Instant::now(), SystemTime::UNIX_EPOCH, Duration::from_secs(fresh_for));
        KeyedFinding {
            timed: Arc::new(TimedFinding { finding: Arc::new(Finding::bare(verdict)), at, wall, fresh_for, shared: false }),
            key,
        }
    }

    /// A TIMEOUT says nothing about the key, and so takes nothing back that another replica found before it.
    #[tokio::test(start_paused = true)]
    async fn a_refusal_counts_though_the_own_result_is_newer() {
        let (memory, key, ages) = (memory(), [7; 32], Ages::default());
        remember(&memory, key, &own(Verdict::Valid, key, 30));
        tokio::time::advance(Duration::from_secs(1)).await;
        let refused_at = Instant::now();
        tokio::time::advance(Duration::from_secs(1)).await;
        remember(&memory, key, &own(Verdict::Timeout, key, 3));
        merge_shared(&memory, (key, key), shared(Verdict::Invalid, refused_at), &ages);
        let entry = memory.get(&key).unwrap();
        assert_eq!((entry.latest.unwrap().finding.verdict, entry.valid.is_none()), (Verdict::Timeout, true));
        assert_eq!(entry.refused_at, Some(refused_at));
    }

    /// A credential has two keys: one for all models, one for a single model. A refusal under either ends a VALID under the other.
    #[tokio::test(start_paused = true)]
    async fn a_refusal_under_one_key_ends_the_valid_under_the_other() {
        let (first, second, ages) = ([7; 32], [8; 32], Ages::default());
        for (valid, refused) in [(first, second), (second, first)] {
            let memory = memory();
            let fresh = || {
                let entry = memory.get(&first).unwrap();
                let second = if entry.per_model { memory.get(&second) } else { None };
                let known = CachedEntries { first: Some(entry), second };
                ages.fresh(&known, None, Instant::now()).map(|(timed, _)| timed.finding.verdict)
            };
            // Refused before, so that the other key has a result of its own.
            remember(&memory, first, &own(Verdict::Invalid, refused, 10));
            tokio::time::advance(Duration::from_secs(11)).await;
            remember(&memory, first, &own(Verdict::Valid, valid, 300));
            assert_eq!(fresh(), Some(Verdict::Valid));
            tokio::time::advance(Duration::from_secs(1)).await;
            forget_refused(&memory, (first, refused), Instant::now());
            assert_eq!(fresh(), None);
            tokio::time::advance(Duration::from_secs(1)).await;
            remember(&memory, first, &own(Verdict::Valid, valid, 300));
            assert_eq!(fresh(), Some(Verdict::Valid), "repaired since");
        }
        let memory = memory();
        remember(&memory, first, &own(Verdict::Valid, first, 30));
        forget_refused(&memory, (first, second), Instant::now());
        assert!(memory.get(&first).unwrap().per_model, "the other key is read");
    }

    #[tokio::test(start_paused = true)]
    async fn a_refusal_that_arrives_first_wins_over_an_older_valid() {
        let (memory, key, ages) = (memory(), [7; 32], Ages::default());
        let valid = |at| shared(Verdict::Valid, at);
        let began = Instant::now();
        tokio::time::advance(Duration::from_secs(1)).await;
        // The store answered before the refusal was stored, and its answer arrives after the message about the refusal.
        forget_refused(&memory, (key, key), Instant::now());
        merge_shared(&memory, (key, key), valid(began), &ages);
        assert!(memory.get(&key).is_none_or(|entry| entry.latest.is_none() && entry.valid.is_none()));
        tokio::time::advance(Duration::from_secs(1)).await;
        merge_shared(&memory, (key, key), valid(Instant::now()), &ages);
        assert!(memory.get(&key).is_some_and(|entry| entry.latest.is_some() && entry.valid.is_some()), "a newer one counts");
    }
}
