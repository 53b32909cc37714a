//! Finds out whether a credential is alive. It holds everything with an effect: the cache of observations, the tier that replicas share, one
//! probe at a time per credential, the limits of each provider, the circuit breaker, and the probe itself.

pub mod breaker;
pub mod cache;
pub(crate) mod clock;
pub mod egress;
pub mod new_keys;
pub mod prober;
pub mod provider_limits;
mod retry_schedule;
pub(crate) mod single_flight;
mod slots;
pub mod tier;
