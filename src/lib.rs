//! byok-gate: may this AI-agent workspace start, and who pays for its model calls?
//!
//! # The map
//!
//! A folder per layer. Imports go down only; `tests/it/tidy.rs` fails when one does not, or when a pure module has an effect.
//!
//! | layer | modules |
//! |---|---|
//! | edge | [`cli`] commands · [`app`] the composition · [`config`] files and flags · [`server`] sockets, health, leaving · [`grpc`] RPCs, proto <-> domain |
//! | effects | [`liveness`] cache, one probe per key, limits, breaker, HTTPS · [`mod@watch`] changed files |
//! | telemetry | [`telemetry`] the log, the events, traces, metrics |
//! | core | [`core`] registry, catalogue, derivation, the order of a decision, policy, the engine |
//! | domain | [`domain`] the words |
//!
//! # Invariants
//!
//! - **never-flip**: a spec whose model derives to a vendor is never billed to the platform, unless the operator's override says so by
//!   name. Billing follows from [`domain::decision::Grounds`] alone, and only [`core::policy::apply`] hands those out.
//! - **one-snapshot**: one decision is made by one version of registry, catalogue and policy.
//! - **no-silent-allow**: an allow that nobody verified carries a warning.
//! - **secrets stay**: a credential's value leaves the process in one header, for the catalogue's host; nothing prints, stores or
//!   compares it in variable time.
//! - **one door per format**: YAML in `core::yaml`, generated proto code in [`grpc`] and [`cli`].
//!
//! # To change X, start in Y
//!
//! `docs/architecture.md` has the way of one call. A reason: [`domain::denial`]; its words: `domain::denial_text`. The order of a decision:
//! [`core::evaluate`], then [`core::credential`]. What a verdict leads to: [`core::policy`]. How a vendor is asked or understood:
//! `core/catalogue/default.yaml`. What a runtime sends: `core/runtimes/default.yaml`. A decision's event: [`telemetry::events`] and its schema in `docs`. A
//! number: the module that it is about, and `docs/metrics.md`. A case: `tests/cases`.

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
