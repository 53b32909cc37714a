//! Finds the owner of a model. A pure function of registry, runtime, model and the credential *names* that are available.

use crate::{
    core::registry::{Offer, Provider, Registry, Runtime},
    domain::verdict::MatchedBy,
};

/// The owner of a model.
#[derive(Debug, Clone, Copy)]
pub struct Derived<'r> {
    /// The owner's entry in the runtime.
    pub offer: &'r Offer,
    /// The owner.
    pub provider: &'r Provider,
    /// How the owner was found.
    pub matched_by: MatchedBy,
}

/// Why a model has no owner.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Underivable {
    /// The model is blank.
    ModelRequired,
    /// The registry does not have the runtime.
    UnknownRuntime,
    /// No provider of the runtime lists the model or has a matching pattern.
    Unregistered,
    /// Several patterns match, and the available names do not single one out.
    Ambiguous {
        /// The possible owners, in the order of the registry.
        candidates: Vec<String>,
    },
}

/// How the candidates for a model were found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum MatchStep {
    Exact,
    Prefix,
}

/// The owner of `model` on `runtime`. The model is trimmed; otherwise ids are compared byte for byte.
///
/// A provider that lists the model comes before all patterns. If several list it, the one that accepts an available name owns it, or else the first
/// in the registry. If several patterns match, only an available name can decide.
pub fn derive<'r>(
    registry: &'r Registry,
    runtime: &str,
    model: &str,
    is_available: &dyn Fn(&str) -> bool,
) -> Result<Derived<'r>, Underivable> {
    let model = model.trim();
    if model.is_empty() {
        return Err(Underivable::ModelRequired);
    }
    derive_on(registry, registry.runtime(runtime).ok_or(Underivable::UnknownRuntime)?, model, is_available)
}

/// The owner of a trimmed model on this runtime of the registry.
pub fn derive_on<'r>(
    registry: &'r Registry,
    runtime: &'r Runtime,
    model: &str,
    is_available: &dyn Fn(&str) -> bool,
) -> Result<Derived<'r>, Underivable> {
    let listed = runtime.listing(model);
    // Most models are listed by one provider only.
    if let (Some(only), None) = (listed.clone().next(), listed.clone().nth(1)) {
        return Ok(Derived { offer: only, provider: registry.provider(only), matched_by: MatchedBy::ExactModel });
    }
    let (step, offers) = candidates(registry, runtime, model);
    let owner = |offer: &'r Offer, matched_by| Ok(Derived { offer, provider: registry.provider(offer), matched_by });
    let (first, others) = match offers.as_slice() {
        [] => return Err(Underivable::Unregistered),
        [only] => return owner(only, if step == MatchStep::Exact { MatchedBy::ExactModel } else { MatchedBy::Prefix }),
        [first, others @ ..] => (*first, others),
    };
    let accepting: Vec<&Offer> = std::iter::once(first)
        .chain(others.iter().copied())
        .filter(|offer| registry.provider(offer).auth_env.iter().any(|name| is_available(name)))
        .collect();
    match (step, accepting.as_slice()) {
        (MatchStep::Exact, [only]) => owner(only, MatchedBy::ExactModelAndCredential),
        (MatchStep::Exact, _) => owner(first, MatchedBy::FirstDeclared),
        (MatchStep::Prefix, [only]) => owner(only, MatchedBy::PrefixAndCredential),
        (MatchStep::Prefix, narrowed) => {
            let named = if narrowed.is_empty() { offers.as_slice() } else { narrowed };
            Err(Underivable::Ambiguous { candidates: named.iter().map(|offer| registry.provider(offer).name.clone()).collect() })
        }
    }
}

/// The offers that could own the model, in the order of the registry: those that list it, or else those whose pattern matches.
pub fn candidate_offers<'r>(registry: &'r Registry, runtime: &'r Runtime, model: &str) -> Vec<&'r Offer> {
    candidates(registry, runtime, model.trim()).1
}

fn candidates<'r>(registry: &'r Registry, runtime: &'r Runtime, model: &str) -> (MatchStep, Vec<&'r Offer>) {
    let listing: Vec<&Offer> = runtime.listing(model).collect();
    if !listing.is_empty() {
        return (MatchStep::Exact, listing);
    }
    (MatchStep::Prefix, runtime.offers.iter().filter(|offer| registry.provider(offer).pattern.is_match(model)).collect())
}
