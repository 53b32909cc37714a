//! Counts of failed calls, by method and gRPC code.

use super::{Collect, Counter, Page};

/// The names of gRPC's codes, by number.
pub const CODES: [&str; 17] = [
    "OK",
    "CANCELLED",
    "UNKNOWN",
    "INVALID_ARGUMENT",
    "DEADLINE_EXCEEDED",
    "NOT_FOUND",
    "ALREADY_EXISTS",
    "PERMISSION_DENIED",
    "RESOURCE_EXHAUSTED",
    "FAILED_PRECONDITION",
    "ABORTED",
    "OUT_OF_RANGE",
    "UNIMPLEMENTED",
    "INTERNAL",
    "UNAVAILABLE",
    "DATA_LOSS",
    "UNAUTHENTICATED",
];
/// The code for a number that gRPC does not define.
const UNKNOWN: usize = 2;
/// The method that makes one decision.
pub const DECIDE: &str = "Decide";
/// The method that makes many decisions.
pub const BATCH_DECIDE: &str = "BatchDecide";
/// The names of methods in metrics. Any other method is `other`, since its name would be the caller's text.
const METHODS: [&str; 6] = [DECIDE, BATCH_DECIDE, "ResolveProvider", "ListModels", "GetRegistryStatus", "other"];

/// Counts of failed calls.
#[derive(Debug, Default)]
pub struct Calls {
    failed: FailureCounts,
    /// Failed calls with `report_only`.
    reported: FailureCounts,
}

/// Counts by method and code.
type FailureCounts = [[Counter; CODES.len()]; METHODS.len()];

/// The method's name, if it is known; otherwise empty.
pub fn known_method(method: &str) -> &'static str {
    METHODS.into_iter().find(|known| *known == method).unwrap_or_default()
}

/// gRPC's own name of a code.
pub fn word_of(code: i32) -> &'static str {
    CODES.get(index_of(code)).copied().unwrap_or_default()
}

fn index_of(code: i32) -> usize {
    usize::try_from(code).ok().filter(|code| *code < CODES.len()).unwrap_or(UNKNOWN)
}

// === impl Calls ===

impl Calls {
    /// Counts a call of this method that failed with this code.
    pub fn failed(&self, method: &str, code: i32, report_only: bool) {
        let index = METHODS.iter().position(|known| *known == method).unwrap_or(METHODS.len() - 1);
        let counts = if report_only { &self.reported } else { &self.failed };
        counts.get(index).and_then(|counts| counts.get(index_of(code))).into_iter().for_each(Counter::inc);
    }
}

impl Collect for Calls {
    fn collect(&self, page: &mut Page) {
        let reported = "Calls with report_only, and such items of batches, that ended without an answer";
        for (name, help, counted) in [
            ("byokgate_calls_failed", "Calls, and items of batches, that ended without an answer", &self.failed),
            ("byokgate_report_only_calls_failed", reported, &self.reported),
        ] {
            let mut failed = page.counter(name, help);
            for (method, counts) in METHODS.iter().zip(counted) {
                for (code, count) in CODES.iter().zip(counts) {
                    failed.add_if_any(&[("method", method), ("grpc_code", code)], count);
                }
            }
        }
    }
}
