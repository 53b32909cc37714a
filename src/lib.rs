//! byok-gate: may this AI-agent workspace start, and who pays for its model calls?
//!
//! # The map
//!
//! Imports go down only; `tests/it/tidy.rs` fails when one does not, or when a pure module has an effect.
//!
//! | layer | modules |
//! |---|---|
//! | 4, edge | [`cli`] commands · [`config`] files and flags · [`server`] sockets, health, leaving · [`service`] RPCs, proto <-> domain |
//! | 3, effects | [`probe`] HTTPS, calibration, addresses · [`cache`] observations · `flight` one run per key · [`limits`] · [`breaker`] · [`reload`] changed files · [`telemetry`] the log, the journal of decisions, traces |
//! | 2, order of work | [`engine`]: the only pipeline; declares the traits that effects implement · [`meter`]: the page of numbers, and what modules put on it |
//! | 1, pure core | [`assess`] the order of a decision · [`mod@derive`] · [`presence`] · [`endpoint`] whom to ask · [`liveness`] what an answer means · [`policy`] the ruling · [`registry`] · [`catalogue`] · `yaml` |
//! | 0, words | [`spec`] · [`secret`] · [`decision`] · [`refusal`] every reason with its words · [`problem`] |
//!
//! # Invariants
//!
//! - **never-flip**: a spec whose model derives to a vendor is never billed to the platform, unless the operator's override says so by
//!   name. Billing follows from [`decision::Grounds`] alone, and only [`policy::apply`] hands those out.
//! - **one-snapshot**: one decision is made by one version of registry, catalogue and policy.
//! - **no-silent-allow**: an allow that nobody verified carries a warning.
//! - **secrets stay**: a credential's value leaves the process in one header, for the catalogue's host; nothing prints, stores or
//!   compares it in variable time.
//! - **one door per format**: YAML in `yaml`, generated proto code in [`service`] and [`cli`].
//!
//! # To change X, start in Y
//!
//! A reason or its words: [`refusal`]. The order of a decision: [`assess`]. What a verdict leads to: [`policy`]. How a vendor is asked or
//! understood: `catalogue/default.yaml`. A decision's event: [`telemetry::journal`] and its schema in `docs`. A number: the module
//! that it is about, and `docs/metrics.md`. A case: `tests/cases`.

pub mod assess;
pub mod breaker;
pub mod cache;
pub mod catalogue;
pub mod cli;
pub mod config;
pub mod decision;
pub mod derive;
pub mod endpoint;
pub mod engine;
mod flight;
pub mod limits;
pub mod liveness;
pub mod meter;
pub mod policy;
pub mod presence;
pub mod probe;
pub mod problem;
pub mod refusal;
pub mod registry;
pub mod reload;
pub mod secret;
pub mod server;
pub mod service;
pub mod spec;
pub mod telemetry;
mod yaml;
