//! The integration tests: one binary, so that it links once.

#![expect(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::string_slice,
    reason = "a test that meets what it did not expect has failed"
)]

mod answers;
mod cases;
mod catalogue;
mod guards;
mod invariants;
mod liveness;
mod model;
mod network;
mod secrets;
mod support;
mod tidy;
mod tls;
mod vectors;
mod wire;
