//! What the cache holds: under each key the latest observation and the last VALID.

use std::{
    hash::BuildHasherDefault,
    sync::Arc,
    time::{Duration, SystemTime},
};

use arc_swap::ArcSwap;
use tokio::time::Instant;

use super::keys::{Key, PrehashedHasher};
use crate::{core::classify::Finding, domain::verdict::Verdict};

pub(super) type Memory = moka::sync::Cache<Key, CacheEntry, BuildHasherDefault<PrehashedHasher>>;

/// What the cache holds under one key.
#[derive(Debug, Clone, Default)]
pub(super) struct CacheEntry {
    pub(super) latest: Option<Arc<TimedFinding>>,
    /// The last VALID. It is removed when the credential is refused.
    pub(super) valid: Option<Arc<TimedFinding>>,
    pub(super) refused_at: Option<Instant>,
    /// There are further entries, for this credential with one model.
    pub(super) per_model: bool,
}

/// A finding, and when it was made.
#[derive(Debug)]
pub(super) struct TimedFinding {
    pub(super) finding: Arc<Finding>,
    pub(super) at: Instant,
    pub(super) wall: SystemTime,
    pub(super) fresh_for: Duration,
    /// Another replica made it.
    pub(super) shared: bool,
}

/// A finding, and the key that it is stored under.
#[derive(Debug, Clone)]
pub(super) struct KeyedFinding {
    pub(super) timed: Arc<TimedFinding>,
    pub(super) key: Key,
}

/// The entries under both keys.
#[derive(Debug)]
pub(super) struct CachedEntries {
    pub(super) first: Option<CacheEntry>,
    pub(super) second: Option<CacheEntry>,
}

// === impl CachedEntries ===

impl CachedEntries {
    pub(super) fn entries(&self) -> impl Iterator<Item = &CacheEntry> {
        self.first.iter().chain(&self.second)
    }

    /// Whether the credential was refused then or later, under either key.
    pub(super) fn is_refused_since(&self, at: Instant) -> bool {
        self.entries().filter_map(|entry| entry.refused_at).any(|refused_at| refused_at >= at)
    }

    pub(super) fn is_empty(&self) -> bool {
        self.entries().all(|entry| entry.latest.is_none() && entry.refused_at.is_none())
    }
}

/// Returns the last VALID finding if this one equals it, so that all keys share one copy. Nearly all VALID findings are equal, and a copy
/// would take a fifth of an entry's memory.
pub(super) fn intern_valid(finding: Finding, last_valid: &ArcSwap<Finding>) -> Arc<Finding> {
    let known = last_valid.load_full();
    if *known == finding {
        return known;
    }
    let finding = Arc::new(finding);
    if finding.verdict == Verdict::Valid {
        last_valid.store(Arc::clone(&finding));
    }
    finding
}

/// Stores an observation. Only the flight of the first key writes these entries, so reading one and writing it back is not a race.
pub(super) fn remember(memory: &Memory, first: Key, found: &KeyedFinding) {
    let KeyedFinding { timed, key } = found;
    let mut entry = memory.get(key).unwrap_or_default();
    match timed.finding.verdict {
        Verdict::Valid => entry.valid = Some(timed.clone()),
        Verdict::Invalid | Verdict::Forbidden => {
            entry.valid = None;
            entry.refused_at = Some(timed.at);
        }
        // Not an observation: nothing was sent.
        Verdict::NotAttempted => return,
        Verdict::QuotaExhausted
        | Verdict::RateLimited
        | Verdict::ProviderError
        | Verdict::UnexpectedResponse
        | Verdict::Timeout
        | Verdict::Unreachable
        | Verdict::NoServerSurface
        | Verdict::NotCalibrated
        | Verdict::ProbeDisabled => {}
    }
    entry.latest = Some(timed.clone());
    insert(memory, (first, *key), entry);
}

/// Stores an entry under the second of these keys. If that is not the first one, the first entry is marked.
pub(super) fn insert(memory: &Memory, (first, key): (Key, Key), entry: CacheEntry) {
    memory.insert(key, entry);
    if key != first {
        let entry = memory.get(&first).unwrap_or_default();
        memory.insert(first, CacheEntry { per_model: true, ..entry });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_valid_findings_share_one_copy() {
        let last_valid = ArcSwap::from_pointee(Finding::bare(Verdict::Valid));
        let valid = || Finding { status: Some(200), ..Finding::bare(Verdict::Valid) };
        let (first, refused) = (intern_valid(valid(), &last_valid), intern_valid(Finding::bare(Verdict::Invalid), &last_valid));
        assert_eq!((&*first, refused.verdict), (&valid(), Verdict::Invalid));
        assert!(Arc::ptr_eq(&first, &intern_valid(valid(), &last_valid)), "an INVALID in between changes nothing");
        assert_eq!(intern_valid(Finding::bare(Verdict::Valid), &last_valid).status, None);
    }
}
