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
mod canaries;
mod cases;
mod catalogue;
mod classify;
mod clients;
mod config;
mod contract;
mod corpus;
mod deploy;
mod dialects;
mod exec;
mod foreign;
mod guards;
mod invariants;
mod isolation;
mod journal;
mod learnt;
mod limits;
mod listen;
mod liveness;
mod lookout;
mod meter;
mod model;
mod models;
mod network;
mod observability;
mod plan;
mod platform_vectors;
mod probe;
mod pure_cases;
mod registries;
mod reload;
mod remedies;
mod replicas;
mod runtimes;
mod secrets;
mod shared_limits;
mod shutdown;
mod status;
mod support;
mod tidy;
mod tier;
mod tls;
mod traces;
mod vectors;
mod wire;
