//! Metrics of the loaded documents and of exceptions from enforcement.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use super::{PROVIDER, Page};
use crate::core::{
    policy::Enforcement,
    snapshot::{Origin, Snapshot},
};

/// Adds the metrics of this snapshot at this time.
pub fn collect(snapshot: &Snapshot, now: SystemTime, page: &mut Page) {
    let Snapshot { registry, catalogue, policy, registry_origin, catalogue_origin, .. } = snapshot;
    page.gauge("byokgate_documents_info", "The content hashes of the documents in force")
        .add(&[("registry_revision", registry.revision()), ("catalogue_revision", catalogue.revision())], 1_u64);
    let mut ages = page.gauge("byokgate_document_age_seconds", "Since the version in force was read");
    for (document, Origin { loaded_at, .. }) in [("registry", registry_origin), ("catalogue", catalogue_origin)] {
        let age = now.duration_since(*loaded_at).unwrap_or(Duration::ZERO);
        ages.add(&[("document", document)], age.as_secs_f64());
    }
    let seconds = now.duration_since(UNIX_EPOCH).map_or(0, |since| i64::try_from(since.as_secs()).unwrap_or(i64::MAX));
    for (provider, exception) in policy.exceptions() {
        let mode = match policy.enforcement(provider, seconds) {
            // The exception has expired.
            Enforcement::Enforce => continue,
            Enforcement::Report => "report",
            Enforcement::Off => "off",
        };
        let labels = [(PROVIDER, provider), ("mode", mode)];
        page.gauge("byokgate_provider_not_enforced", "Providers whose verdicts are not acted on, or that are not probed")
            .add(&labels, 1_u64);
        page.gauge("byokgate_provider_not_enforced_remaining_seconds", "Until the provider is enforced again")
            .add(&labels, u64::try_from(exception.until.saturating_sub(seconds)).unwrap_or(0));
    }
}
