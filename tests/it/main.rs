//! The integration tests: one binary, so that it links once.

#![expect(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::string_slice,
    reason = "a test that meets what it did not expect has failed"
)]

mod against;
mod answers;
mod cases;
mod catalogue;
mod classify;
mod invariants;
mod liveness;
mod model;
mod registries;
mod secrets;
mod support;
mod tidy;
mod vectors;
mod wire;
