//! Layer 1: the decision itself. All but `engine` is pure: no clock, environment, files, network, log or tasks. `engine` reads the clock, makes
//! ids, and asks for a credential's liveness through a trait.

pub mod answer;
pub mod by_first_byte;
pub mod catalogue;
pub mod classify;
pub mod credential;
pub mod credentials;
pub mod derive;
pub mod endpoint;
pub mod endpoint_facts;
pub mod engine;
pub mod evaluate;
pub mod evaluation_log;
pub mod foreign_secrets;
pub mod key_shape;
pub mod made_up_key;
pub mod oauth_credential;
pub mod policy;
pub mod probe_plan;
pub mod registry;
pub mod response_shape;
pub mod runtimes;
pub mod snapshot;
pub mod workspace_call;
pub(crate) mod yaml;
