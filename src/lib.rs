//! byok-gate decides whether an AI-agent workspace may start, and who pays for its model calls.
//!
//! # The map
//!
//! One folder per layer. Imports go down only. `tests/it/tidy.rs` fails on an import upward and on an effect in a pure module.
//!
//! | layer | modules |
//! |---|---|
//! | edge | [`cli`] the commands · [`app`] wires the parts together · [`config`] files and flags · [`server`] sockets, health, draining · [`grpc`] RPCs, proto to domain |
//! | effects | [`liveness`] cache, one probe per key, limits, circuit breaker, HTTPS · [`mod@watch`] changed files |
//! | telemetry | [`telemetry`] log, events, traces, metrics |
//! | core | [`core`] registry, catalogue, derivation, the order of a decision, policy, engine |
//! | domain | [`domain`] the types of requests and answers |
//!
//! # Invariants
//!
//! - **never-flip**: a vendor's model is never billed to the platform, unless the operator's override asks for it by name. Billing follows from
//!   [`domain::decision::Grounds`] alone, and only [`core::policy::apply`] creates those.
//! - **one-snapshot**: a decision uses one version of registry, catalogue and policy.
//! - **no-silent-allow**: an allow without a verified credential carries a warning.
//! - **secrets stay**: a credential's value leaves the process in one header only, to a host of the catalogue. Nothing prints it, stores it or
//!   compares it in variable time.
//! - **one door per format**: only `core::yaml` reads YAML, and only [`grpc`], [`server`] and [`cli`] use generated proto code.
//!
//! # To change X, start in Y
//!
//! `docs/architecture.md` shows the way of a call. The reasons for a denial: [`domain::denial`]; their texts: `domain::denial_text`. The order of a
//! decision: [`core::evaluate`], then [`core::credential`]. What follows from a verdict: [`core::policy`]. How a vendor is asked and its answers are
//! read: `core/catalogue/default.yaml`. What a runtime sends: `core/runtimes/default.yaml`. The event of a decision: [`telemetry::events`] and its
//! schema in `docs`. A metric: the module that counts it, and `docs/metrics.md`. A test case: `tests/cases`.

pub mod app;
pub mod cli;
pub mod config;
pub mod core;
pub mod domain;
pub mod grpc;
pub mod liveness;
pub mod server;
pub mod telemetry;
pub mod watch;
