//! Calls that ended without an answer, by method and gRPC code.

use super::{Counter, Measured, Page};

/// Every code of gRPC, by its number.
const CODES: [&str; 17] = [
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
/// A caller that went away before its answer.
const CANCELLED: usize = 1;
/// A number that gRPC does not have.
const UNKNOWN: usize = 2;
/// The call of one decision.
pub const DECIDE: &str = "Decide";
/// The call of many decisions.
pub const BATCH_DECIDE: &str = "BatchDecide";
/// What is called. Whatever else somebody asks for has no name of its own: its path is the caller's word.
const METHODS: [&str; 6] = [DECIDE, BATCH_DECIDE, "ResolveProvider", "ListModels", "GetRegistryStatus", "other"];

/// Counts of calls that failed.
#[derive(Debug, Default)]
pub struct Calls {
    failed: [[Counter; CODES.len()]; METHODS.len()],
}

/// A call that is under way. Dropped before it has ended, it was given up by its caller.
#[derive(Debug)]
pub struct UnderWay<'c> {
    of: Option<&'c [Counter; CODES.len()]>,
}

/// The method, if it is one of ours; else empty.
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
    /// One begins, of this method.
    pub fn begin(&self, method: &str) -> UnderWay<'_> {
        let index = METHODS.iter().position(|known| *known == method).unwrap_or(METHODS.len() - 1);
        UnderWay { of: self.failed.get(index) }
    }

    /// One item of a batch ended with this code; the batch itself goes on.
    pub fn item_failed(&self, code: i32) {
        self.begin(BATCH_DECIDE).ended(code);
    }
}

impl Measured for Calls {
    fn tell(&self, page: &mut Page) {
        let mut failed = page.counter("byokgate_calls_failed", "Calls, and items of batches, that ended without an answer");
        for (method, counts) in METHODS.iter().zip(&self.failed) {
            for (code, count) in CODES.iter().zip(counts) {
                failed.happened(&[("method", method), ("grpc_code", code)], count);
            }
        }
    }
}

// === impl UnderWay ===

impl UnderWay<'_> {
    /// It ended with this code.
    pub fn ended(mut self, code: i32) {
        let Some(counts) = self.of.take() else { return };
        if code != 0 {
            counts.get(index_of(code)).into_iter().for_each(Counter::one);
        }
    }
}

impl Drop for UnderWay<'_> {
    fn drop(&mut self) {
        self.of.and_then(|counts| counts.get(CANCELLED)).into_iter().for_each(Counter::one);
    }
}
