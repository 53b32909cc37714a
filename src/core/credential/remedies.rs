//! The evidence of a denial from which its remedy is written: which names are missing, where a value belongs, which model would use it.

use url::Url;

use super::CredentialStep;
use crate::{
    core::{
        credentials::CredentialSet,
        derive::candidate_offers,
        oauth_credential::CredentialKind,
        registry::{Auth, Offer, Provider},
        workspace_call::FoundCredential,
    },
    domain::denial::{Malformation, ModelChoice, Place, Refusal, ShadowCause},
};

impl CredentialStep<'_, '_> {
    pub(super) fn missing(&self, credentials: &CredentialSet<'_>, blocking_name: Option<&str>) -> Refusal {
        let Provider { name, display_name, auth_env, .. } = self.derived.provider;
        let registry = &self.snapshot.registry;
        let usable = self.offer_use().usable(self.derived.provider);
        let unread = usable.is_empty();
        let accepted_env = if unread { auth_env.to_vec() } else { usable };
        let mut elsewhere = unread.then(|| self.place_in_auth_json(self.derived.provider)).flatten();
        let mut elsewhere = elsewhere.take().map(|place| (display_name.clone(), place));
        let mut missing_env = accepted_env.clone();
        missing_env.extend(auth_env.iter().filter(|name| !accepted_env.contains(name)).cloned());
        let mut offered = if unread { Vec::new() } else { accepted_env.clone() };
        let mut others = Vec::new();
        let candidates = candidate_offers(registry, self.runtime, self.model);
        for offer in &candidates {
            let other = registry.provider(offer);
            // The owner's own offer adds nothing to what is said of it above; passing over it saves time.
            if other.name == *name || other.auth == Auth::Ambient || other.is_platform() {
                continue;
            }
            let usable = self.snapshot.offer_use(offer).usable(other);
            let further = usable.iter().filter(|name| !offered.contains(name)).cloned().collect::<Vec<_>>();
            offered.extend(further.iter().cloned());
            if usable.is_empty() && elsewhere.is_none() {
                elsewhere = self.place_in_auth_json(other).map(|place| (other.display_name.clone(), place));
            }
            if !further.is_empty() {
                others.push((other.display_name.clone(), further));
            }
            missing_env.extend(other.auth_env.iter().filter(|name| !missing_env.contains(name)).cloned().collect::<Vec<_>>());
        }
        Refusal::MissingCredential {
            provider: name.clone(),
            display_name: display_name.clone(),
            model: self.model.to_owned(),
            hidden: offered.iter().filter(|name| credentials.is_hidden(name)).cloned().collect(),
            accepted_env,
            unread,
            others,
            elsewhere,
            blocking_name: blocking_name.map(str::to_owned),
            available: self.available_elsewhere(credentials, &candidates),
            missing_env,
        }
    }

    /// A credential of another provider that is set, and the models that it could be used for.
    fn available_elsewhere(&self, credentials: &CredentialSet<'_>, candidates: &[&Offer]) -> Option<(String, ModelChoice)> {
        if self.spec.credentials.is_empty() {
            return None;
        }
        let others = self.runtime.offers.iter().filter(|offer| {
            let provider = self.snapshot.registry.provider(offer);
            candidates.iter().all(|candidate| candidate.index != offer.index) && !provider.is_platform()
        });
        let usable = |offer: &Offer| self.snapshot.offer_use(offer).usable(self.snapshot.registry.provider(offer));
        // First look at the variable that each provider prefers.
        let first = others.clone().filter_map(|offer| Some((usable(offer).into_iter().next()?, offer)));
        let any = others.flat_map(|offer| usable(offer).into_iter().map(move |name| (name, offer)));
        let (name, offer) = first.chain(any).find(|(name, _)| credentials.has(name))?;
        Some((name, self.choice(offer)))
    }

    /// Where to save a value of this variable so that the runtime reads it. `None` if the runtime reads no variable of the provider.
    pub(super) fn place_for(&self, env_name: &str) -> Option<Place> {
        let unread = self.offer_use().route.as_ref().filter(|route| route.usable().all(|name| name != env_name));
        match unread.map(|route| route.usable().next()) {
            None => Some(self.snapshot.place(env_name)),
            Some(Some(name)) => Some(self.snapshot.place(name)),
            Some(None) => self.place_in_auth_json(self.derived.provider),
        }
    }

    /// Where to save a key of a provider for which the runtime reads no variable: in the auth.json of another provider that is sent to the same host.
    fn place_in_auth_json(&self, provider: &Provider) -> Option<Place> {
        let host = provider.base_url.as_ref()?.host_str()?;
        self.runtime.offers.iter().find_map(|offer| {
            let route = self.snapshot.offer_use(offer).route.as_ref()?;
            let is_there = route.facts.delivery.base.as_ref().and_then(Url::host_str) == Some(host);
            let is_file = |name: &&String| self.snapshot.catalogue.credential_kind(name) == Some(CredentialKind::CodexAuthJson);
            let name = route.usable().find(is_file).filter(|_| is_there)?;
            Some(Place { with: self.choice_for(offer), ..self.snapshot.place(name) })
        })
    }

    /// The model to choose so that this provider is used. `None` if the present model already belongs to it.
    fn choice_for(&self, offer: &Offer) -> Option<ModelChoice> {
        let candidates = candidate_offers(&self.snapshot.registry, self.runtime, self.model);
        candidates.iter().all(|candidate| candidate.index != offer.index).then(|| self.choice(offer))
    }

    fn choice(&self, offer: &Offer) -> ModelChoice {
        let example = offer.models.iter().find(|model| !offer.has_withdrawn(model)).cloned();
        ModelChoice { owner: self.snapshot.registry.provider(offer).display_name.clone(), example }
    }

    pub(super) fn shadowed(&self, sent: &FoundCredential<'_>, why: ShadowCause, other: &FoundCredential<'_>) -> Refusal {
        let beats =
            self.offer_use().route.as_ref().is_some_and(|route| route.facts.beaten_by.iter().any(|name| name == sent.env_name));
        let provider = self.derived.provider.name.clone();
        Refusal::Shadowed { sent: sent.named(), why, other: other.named(), replaceable: !beats, provider }
    }

    pub(super) fn malformed(&self, found: &FoundCredential<'_>, fault: Malformation) -> Refusal {
        Refusal::Malformed {
            env_name: found.env_name.to_owned(),
            provider: self.derived.provider.name.clone(),
            fault,
            save_as: self
                .place_for(found.env_name)
                .map(|place| Place { in_auth_json: place.in_auth_json && fault.is_of_a_key(), ..place }),
            right_place: self.right_place(found.env_name, fault),
        }
    }

    /// The variable in which such a value is right: a token in the variable of the subscription, a key in that of a provider with the same API.
    fn right_place(&self, env_name: &str, fault: Malformation) -> Option<Place> {
        let wanted = match fault {
            Malformation::TokenForKey => Auth::OAuth,
            Malformation::KeyForToken => Auth::Key,
            _ => return None,
        };
        let registry = &self.snapshot.registry;
        self.runtime.offers.iter().find_map(|offer| {
            let other = registry.provider(offer);
            let fits = other.auth == wanted && other.protocol == self.derived.provider.protocol && !other.is_platform();
            let name = self.snapshot.offer_use(offer).usable(other).into_iter().find(|name| name != env_name).filter(|_| fits)?;
            Some(Place { with: self.choice_for(offer), ..self.snapshot.place(&name) })
        })
    }
}
