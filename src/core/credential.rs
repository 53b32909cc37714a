//! Decides which credential is judged and whether it may be sent. These steps come after the owner of the model is known and before the provider is
//! asked.

use std::{sync::Arc, time::Duration};

use url::Url;

use crate::{
    core::{
        credentials::CredentialSet,
        derive::{Derived, candidate_offers},
        endpoint::{Endpoint, NoSurface, Preference},
        evaluation_log::EvaluationLog,
        key_shape::{Mistake, Unsendable, mistake, why_unsendable},
        oauth_credential::{CredentialKind, OauthCheck},
        policy::{Action, Enforcement, Facts, Group},
        registry::{Auth, Offer, Provider, Runtime},
        runtimes::{Delivery, RuntimeFacts, Trims},
        snapshot::{OfferUse, Snapshot},
        workspace_call::{FoundCredential, Prediction, WorkspaceCall, predict},
    },
    domain::{
        decision::{ChosenBecause, JudgedCredential},
        denial::{LivenessEvidence, Malformation, ModelChoice, NameAndScope, Place, Refusal, ShadowCause, listed},
        protocol::HeaderFamily,
        request::{CalledBy, Checkpoint, WorkspaceSpec},
        secret::Secret,
        verdict::{Verdict, WarningCode},
    },
};

/// A credential, and the provider that has to be asked about it.
#[derive(Debug, Clone)]
pub struct LivenessQuery<'a> {
    /// The provider's endpoint.
    pub endpoint: &'a Arc<Endpoint>,
    /// The credential's value.
    pub secret: Arc<Secret>,
    /// The variable that holds it.
    pub env_name: &'a str,
    /// The model that the workspace has chosen.
    pub model: &'a str,
    /// How the workspace's own client will send the credential.
    pub preference: Preference,
    /// How seriously the verdict is taken.
    pub enforcement: Enforcement,
    /// The tenant; empty if the platform has only one.
    pub organization: &'a str,
    /// The caller of this service.
    pub caller: &'a CalledBy,
    /// What turns the verdict into an answer for this workspace.
    pub context: QueryContext<'a>,
}

/// What a verdict means for this workspace. It has no influence on the verdict.
#[derive(Debug, Clone, Default)]
pub struct QueryContext<'a> {
    /// The value that is sent, and a value of the provider that is not sent instead of it. Set only if the runtime's facts are certain.
    pub passed_over: Option<(NameAndScope, NameAndScope)>,
    /// The headers in which the workspace itself sends this credential, the preferred one first.
    pub own_headers: &'a [HeaderFamily],
    /// The variables that hold the provider's own credentials, if the runtime is known.
    pub own_names: &'a [String],
    /// Set if the runtime does not read this variable: where to save a good credential, or `None` if the runtime reads none of this provider.
    pub place_of_unread: Option<Option<Place>>,
    /// The facts about the runtime, if they are certain.
    pub facts: Option<&'a RuntimeFacts>,
}

/// The questions to a provider, in the order in which the runtime would try the credentials.
#[derive(Debug)]
pub struct LivenessQueries<'a> {
    /// About the credential that the workspace sends first.
    pub first: LivenessQuery<'a>,
    /// About the credentials that the runtime tries after a refusal.
    pub fallbacks: Vec<(LivenessQuery<'a>, JudgedCredential)>,
}

/// The inputs of this step.
pub(super) struct CredentialStep<'a, 'f> {
    pub(super) snapshot: &'a Snapshot,
    pub(super) spec: &'a WorkspaceSpec,
    pub(super) runtime: &'a Runtime,
    pub(super) derived: Derived<'a>,
    pub(super) model: &'a str,
    pub(super) checkpoint: Checkpoint,
    pub(super) enforcement: Enforcement,
    pub(super) caller: &'a CalledBy,
    pub(super) fingerprint: &'f dyn Fn(&Secret) -> String,
}

/// `Err` ends the evaluation early: the facts are complete.
type Flow<T> = Result<T, Box<Facts>>;

/// A credential that is ready to be sent, and where it goes.
struct OutgoingCredential<'a> {
    found: FoundCredential<'a>,
    secret: Arc<Secret>,
    endpoint: &'a Arc<Endpoint>,
    delivery: Option<&'a Delivery>,
}

impl<'a> CredentialStep<'a, '_> {
    pub(super) fn run(&self, credentials: &CredentialSet<'a>, log: &mut EvaluationLog) -> Flow<LivenessQueries<'a>> {
        let (provider, offer_use) = (self.derived.provider, self.offer_use());
        let call = match predict(offer_use.route.as_ref(), provider, credentials) {
            Prediction::Sends(call) => call,
            Prediction::Missing(blocking_name) => {
                log.trace.step("presence", || format!("none of {} is set", listed(&provider.auth_env)));
                return Err(refused(self.missing(credentials, blocking_name)));
            }
            Prediction::Unreadable(names) => {
                log.trace.step("presence", || format!("{} could not be read", listed(&names)));
                let scopes = credentials.unreadable_scopes(&names);
                return Err(refused(Refusal::CredentialsUnreadable { names, scopes, changes_owner: false }));
            }
        };
        self.note_choice(&call, credentials, log);
        if !call.is_own {
            // The runtime sends a value that is not this provider's own.
            return Err(match call.passed_over.first() {
                Some(other) => refused(self.shadowed(&call.judged, ShadowCause::NotOfProvider, other)),
                None => refused(self.missing(credentials, Some(call.judged.env_name))),
            });
        }
        if self.enforcement == Enforcement::Off {
            log.trace.step("liveness", || "switched off for this provider".into());
            return Err(self.not_asked(&call, Verdict::ProbeDisabled, None));
        }
        let outgoing = match self.prepare(call.judged, call.moved_to, log) {
            Ok(outgoing) => outgoing,
            Err(reason) => return Err(self.facts_of_not_sent(reason, &call, log)),
        };
        self.check_exposure(&call, outgoing.endpoint, log)?;
        let fallbacks = self.fallbacks(&call, log);
        let mut first = self.query(&outgoing, if fallbacks.is_empty() { call.passed_over.first() } else { None });
        if call.is_unread {
            first.context.place_of_unread = Some(self.place_for(call.judged.env_name));
        }
        Ok(LivenessQueries { first, fallbacks })
    }

    fn offer_use(&self) -> &'a OfferUse {
        self.snapshot.offer_use(self.derived.offer)
    }

    fn is_certain(&self) -> bool {
        self.offer_use().route.as_ref().is_some_and(|route| route.facts.is_certain())
    }

    /// Records which value is judged and why, and warns about values that the runtime could use instead.
    fn note_choice(&self, call: &WorkspaceCall<'a>, credentials: &CredentialSet<'a>, log: &mut EvaluationLog) {
        let (provider, judged) = (self.derived.provider, &call.judged);
        let chosen_because = self.chosen_because(call);
        log.trace.step("presence", || {
            format!("{} of scope {} is judged: {}", judged.env_name, judged.scope.as_str(), chosen_because.text())
        });
        log.resolution.credential = Some(self.judged(judged, chosen_because));
        if call.is_unread {
            let (runtime, name) = (&self.spec.runtime, judged.env_name);
            let message = match self.place_for(name) {
                Some(place) => {
                    format!("runtime `{runtime}` does not read {name}; save the key as {}{}", place.text(), place.choice())
                }
                None => {
                    format!(
                        "runtime `{runtime}` reads neither {name} nor any other key of this provider: choose a model of another provider"
                    )
                }
            };
            log.warn(WarningCode::UnusedCredential, message, vec![judged.env_name.to_owned()]);
        }
        let conflicts = match &self.offer_use().route {
            // If the runtime's facts are certain, they say which value it takes. Otherwise the others are named as a possibility.
            Some(route) if route.facts.is_certain() => Vec::new(),
            _ => credentials.conflicts(&self.snapshot.registry, self.runtime, provider, judged.env_name),
        };
        if !conflicts.is_empty() {
            let message = format!(
                "{} was judged for provider `{}`; the runtime could take {} instead",
                judged.env_name,
                provider.name,
                listed(&conflicts)
            );
            log.warn(WarningCode::ConflictingCredential, message, conflicts);
        }
        if credentials.has_unreadable() {
            let message = "some credentials could not be read; none of them could change this decision".to_owned();
            log.warn(WarningCode::UnreadableCredentials, message, Vec::new());
        }
    }

    /// Why this value is judged and no other.
    fn chosen_because(&self, call: &WorkspaceCall<'_>) -> ChosenBecause {
        let Some(route) = &self.offer_use().route else { return ChosenBecause::FirstDeclared };
        match call.passed_over.first() {
            _ if call.is_unread => ChosenBecause::Unread,
            None => ChosenBecause::Sent,
            Some(other) if route.falls_back => ChosenBecause::SentBefore(other.env_name.to_owned()),
            Some(other) => ChosenBecause::SentInPlaceOf(other.env_name.to_owned()),
        }
    }

    fn judged(&self, found: &FoundCredential<'_>, chosen_because: ChosenBecause) -> JudgedCredential {
        JudgedCredential {
            env_name: found.env_name.to_owned(),
            scope: found.scope,
            shadows_organization: found.shadows_organization,
            chosen_because,
            fingerprint: (self.fingerprint)(found.secret),
        }
    }

    /// The value and its destination as the runtime would send it, or the reason why it is not sent.
    fn prepare(
        &self,
        found: FoundCredential<'a>,
        moved_to: Option<&'a Url>,
        log: &mut EvaluationLog,
    ) -> Result<OutgoingCredential<'a>, NotSent> {
        let offer_use = self.offer_use();
        let secret = self.trimmed(&found, log)?;
        let kind = self.snapshot.catalogue.credential_kind(found.env_name);
        let secret = match kind.map(|kind| kind.check(secret.expose())) {
            Some(OauthCheck::Malformed(fault)) => {
                let value = secret.expose();
                // Say what the value is, if that is known: it helps more than "not JSON".
                let is_file = fault != Malformation::NoJson || value.trim_ascii_start().starts_with('{');
                let mistaken = if is_file { None } else { mistake(&self.snapshot.catalogue, None, found.env_name, value) };
                return Err(self.mistaken(&found, mistaken.unwrap_or(Mistake::Malformed(fault))));
            }
            // The runtime would send the key with the blanks around it.
            Some(OauthCheck::Key(key)) if key.expose().trim_ascii().len() < key.expose().len() => {
                return Err(NotSent::Refused(Box::new(self.malformed(&found, Malformation::BlankInFile))));
            }
            Some(OauthCheck::Key(key)) => Arc::new(key),
            Some(OauthCheck::Plausible) => {
                let value = secret.expose().trim_ascii();
                let mistaken =
                    if value.starts_with('{') { None } else { mistake(&self.snapshot.catalogue, None, found.env_name, value) };
                return Err(match mistaken {
                    Some(mistaken) => self.mistaken(&found, mistaken),
                    None => NotSent::NoSurface(NoSurface::OAuth),
                });
            }
            None => secret,
        };
        let route = offer_use.route.as_ref().map(|route| &route.facts);
        let delivery = route.map(|route| route.delivery_of(secret.expose()));
        let endpoint = self.endpoint(delivery, moved_to).map_err(NotSent::NoSurface)?;
        let takes_oauth = route.is_none_or(|route| !route.is_certain() || route.has_delivery_for(secret.expose()));
        match why_unsendable(&self.snapshot.catalogue, endpoint, found.env_name, &secret, takes_oauth) {
            None => Ok(OutgoingCredential { found, secret, endpoint, delivery }),
            Some(Unsendable::NoSurface(reason)) => Err(NotSent::NoSurface(reason)),
            Some(Unsendable::Malformed(fault)) => Err(NotSent::Refused(Box::new(self.malformed(&found, fault)))),
            Some(Unsendable::Refused(refusal)) => {
                Err(NotSent::Refused(Box::new(refusal.saved_as(self.place_for(found.env_name)))))
            }
        }
    }

    fn mistaken(&self, found: &FoundCredential<'_>, mistake: Mistake<'_>) -> NotSent {
        NotSent::Refused(Box::new(match mistake {
            Mistake::Malformed(fault) => self.malformed(found, fault),
            Mistake::Foreign(what) => Refusal::ForeignSecret {
                env_name: found.env_name.to_owned(),
                provider: self.derived.provider.name.clone(),
                what: what.to_owned(),
                save_as: self.place_for(found.env_name),
            },
        }))
    }

    /// The value without the blanks around it, if the runtime removes them. If it does not, such a value is refused.
    fn trimmed(&self, found: &FoundCredential<'a>, log: &mut EvaluationLog) -> Result<Arc<Secret>, NotSent> {
        let value = found.secret.expose();
        let is_blank = |byte: Option<u8>| byte.is_some_and(|byte| matches!(byte, b' ' | b'\t' | b'\r' | b'\n'));
        let (in_front, behind) = (is_blank(value.bytes().next()), is_blank(value.bytes().next_back()));
        if !in_front && !behind {
            return Ok(Arc::clone(found.secret));
        }
        let trims =
            self.offer_use().route.as_ref().filter(|route| route.facts.is_certain()).map_or(Trims::Nothing, |route| route.trims);
        // A login file or token is never sent itself, so blanks around it do no harm.
        let is_login =
            self.derived.provider.auth == Auth::OAuth || self.snapshot.catalogue.credential_kind(found.env_name).is_some();
        let fault = match trims {
            _ if is_login => return Ok(Arc::clone(found.secret)),
            Trims::BothEnds => None,
            Trims::End => in_front.then_some(Malformation::BlankInFront),
            Trims::Nothing if in_front => Some(Malformation::BlankInFront),
            Trims::Nothing => {
                let at = value.trim_end().len();
                let is_line = value.bytes().skip(at).any(|byte| byte != b' ');
                Some(if is_line { Malformation::ControlCharacter { at, trailing: true } } else { Malformation::BlankBehind })
            }
        };
        if let Some(fault) = fault {
            let vendor = self.snapshot.endpoint(self.derived.provider).ok().and_then(|endpoint| endpoint.vendor.as_deref());
            // Say what the value is without the blanks, if that is known: it helps more.
            let mistaken = mistake(&self.snapshot.catalogue, vendor, found.env_name, value.trim_ascii());
            return Err(self.mistaken(found, mistaken.unwrap_or(Mistake::Malformed(fault))));
        }
        let message = format!(
            "blanks or line breaks around {} were left out, as runtime `{}` does; save it again without them",
            found.env_name, self.spec.runtime
        );
        log.warn(WarningCode::TrimmedCredential, message, vec![found.env_name.to_owned()]);
        Ok(Arc::new(Secret::new(value.trim_matches([' ', '\t', '\r', '\n']).to_owned())))
    }

    /// The endpoint that the workspace would call, unless the tenant has set a base URL of its own.
    fn endpoint(&self, delivery: Option<&Delivery>, moved_to: Option<&Url>) -> Result<&'a Arc<Endpoint>, NoSurface> {
        let found = self.snapshot.dialled(self.derived.provider, self.offer_use(), delivery, moved_to);
        // Providers without an address keep their own reason, whatever base URL the tenant has set.
        if !matches!(found, Err(NoSurface::OAuth | NoSurface::Ambient | NoSurface::Platform)) {
            let concerns = |name: &&String| self.offer_use().base_url_env.contains(name);
            let own: Vec<String> = self.spec.tenant_base_url_env.iter().filter(concerns).cloned().collect();
            if !own.is_empty() {
                return Err(NoSurface::TenantBaseUrl(own));
            }
        }
        found.map_err(NoSurface::clone)
    }

    /// The facts for a value that is not sent.
    fn facts_of_not_sent(&self, reason: NotSent, call: &WorkspaceCall<'a>, log: &mut EvaluationLog) -> Box<Facts> {
        match reason {
            NotSent::NoSurface(surface) => {
                log.trace.step("liveness", || surface.text());
                self.not_asked(call, Verdict::NoServerSurface, Some(&surface))
            }
            NotSent::Refused(refusal) => {
                log.trace.step("shape", || format!("{} is not sent: {}", call.judged.env_name, refusal.code()));
                let usable = self.usable(call);
                refused(match usable {
                    Some(other) if self.is_certain() => self.shadowed(&call.judged, ShadowCause::Refused(refusal), &other),
                    _ => *refusal,
                })
            }
        }
    }

    /// Another of the provider's own values, which is not used but could be sent.
    fn usable(&self, call: &WorkspaceCall<'a>) -> Option<FoundCredential<'a>> {
        let mut discarded = EvaluationLog::new(false);
        call.passed_over.iter().find(|other| self.prepare(**other, call.moved_to, &mut discarded).is_ok()).copied()
    }

    /// Refuses or warns if the request also carries a credential that does not belong to this vendor.
    fn check_exposure(&self, call: &WorkspaceCall<'a>, endpoint: &Endpoint, log: &mut EvaluationLog) -> Flow<()> {
        let route = self.offer_use().route.as_ref();
        let is_own = |name: &str| route.is_some_and(|route| route.own.iter().any(|own| own == name));
        let is_of_another = |found: &FoundCredential<'_>| {
            let shapes = self.snapshot.catalogue.shapes_of(found.secret.expose().trim_ascii_start());
            let vendor = endpoint.vendor.as_deref();
            let is_no_key = self.snapshot.catalogue.foreign_secrets.what(found.secret.expose(), vendor).is_some();
            is_no_key || !shapes.is_empty() && vendor.is_some_and(|vendor| shapes.iter().all(|shape| shape.vendor != vendor))
        };
        let exposed = call.also_sent.iter().filter(|(found, _)| !is_own(found.env_name) || is_of_another(found));
        let env_names: Vec<String> = exposed.map(|(found, _)| found.env_name.to_owned()).collect();
        if env_names.is_empty() {
            return Ok(());
        }
        let exposed = Refusal::Exposed { env_names: env_names.clone(), host: endpoint.host.clone() };
        log.trace.step("exposure", || exposed.message());
        if self.is_certain() && self.snapshot.policy.action(self.checkpoint, Group::Exposure) == Action::Deny {
            return Err(refused(exposed));
        }
        log.warn(WarningCode::ExposedCredential, exposed.message(), env_names);
        Ok(())
    }

    /// The credentials that the runtime tries after a refusal.
    fn fallbacks(&self, call: &WorkspaceCall<'a>, log: &mut EvaluationLog) -> Vec<(LivenessQuery<'a>, JudgedCredential)> {
        let Some(route) = self.offer_use().route.as_ref().filter(|route| route.falls_back) else { return Vec::new() };
        let read = |found: &&FoundCredential<'_>| route.facts.reads.iter().any(|name| name == found.env_name);
        let others = call.passed_over.iter().filter(read).filter_map(|found| {
            let outgoing = self.prepare(*found, call.moved_to, log).ok()?;
            Some((self.query(&outgoing, None), self.judged(found, ChosenBecause::SentAfterARefusal)))
        });
        others.collect()
    }

    fn query(&self, outgoing: &OutgoingCredential<'a>, passed_over: Option<&FoundCredential<'a>>) -> LivenessQuery<'a> {
        let OutgoingCredential { found, secret, endpoint, delivery } = outgoing;
        let (headers, surface) = delivery.map_or((&[][..], None), |delivery| (delivery.headers.as_slice(), delivery.surface));
        let certain = self.is_certain();
        LivenessQuery {
            endpoint,
            secret: Arc::clone(secret),
            env_name: found.env_name,
            model: self.model,
            preference: Preference { family: headers.first().copied(), surface },
            enforcement: self.enforcement,
            organization: &self.spec.organization_id,
            caller: self.caller,
            context: QueryContext {
                passed_over: passed_over.filter(|_| certain).map(|other| (found.named(), other.named())),
                own_headers: headers,
                own_names: self.offer_use().route.as_ref().map(|route| route.own.as_slice()).unwrap_or_default(),
                place_of_unread: None,
                facts: self.snapshot.catalogue.runtimes.get(&self.spec.runtime).filter(|_| certain),
            },
        }
    }

    fn missing(&self, credentials: &CredentialSet<'_>, blocking_name: Option<&str>) -> Refusal {
        let Provider { name, display_name, auth_env, .. } = self.derived.provider;
        let registry = &self.snapshot.registry;
        let usable = self.offer_use().usable(self.derived.provider);
        let unread = usable.is_empty();
        let accepted_env = if unread { auth_env.clone() } else { usable };
        let mut elsewhere = unread.then(|| self.place_in_auth_json(self.derived.provider)).flatten();
        let mut elsewhere = elsewhere.take().map(|place| (display_name.clone(), place));
        let mut missing_env = accepted_env.clone();
        missing_env.extend(auth_env.iter().filter(|name| !accepted_env.contains(name)).cloned());
        let mut offered = if unread { Vec::new() } else { accepted_env.clone() };
        let mut others = Vec::new();
        let candidates = candidate_offers(registry, self.runtime, self.model);
        for offer in &candidates {
            let other = registry.provider(offer);
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
    fn place_for(&self, env_name: &str) -> Option<Place> {
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

    fn shadowed(&self, sent: &FoundCredential<'_>, why: ShadowCause, other: &FoundCredential<'_>) -> Refusal {
        let beats =
            self.offer_use().route.as_ref().is_some_and(|route| route.facts.beaten_by.iter().any(|name| name == sent.env_name));
        let provider = self.derived.provider.name.clone();
        Refusal::Shadowed { sent: sent.named(), why, other: other.named(), replaceable: !beats, provider }
    }

    fn malformed(&self, found: &FoundCredential<'_>, fault: Malformation) -> Refusal {
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

    fn not_asked(&self, call: &WorkspaceCall<'_>, verdict: Verdict, reason: Option<&NoSurface>) -> Box<Facts> {
        Box::new(Facts::NotValid {
            evidence: LivenessEvidence {
                verdict,
                env_name: call.judged.env_name.to_owned(),
                provider: self.derived.provider.name.clone(),
                host: String::new(),
                upstream_status: None,
                siblings: Vec::new(),
                retry_after: Duration::ZERO,
                withheld: None,
                unreached: None,
                used_up: None,
                cut_short: None,
                cause: None,
                tenant_endpoint: matches!(reason, Some(NoSurface::TenantBaseUrl(_))),
                plan: None,
                model: self.model.to_owned(),
                save_as: None,
            },
            served_from: None,
            recently_valid: false,
            enforcement: self.enforcement,
        })
    }
}

/// Why a value is not sent.
enum NotSent {
    Refused(Box<Refusal>),
    NoSurface(NoSurface),
}

fn refused(refusal: Refusal) -> Box<Facts> {
    Box::new(Facts::Refused(refusal))
}
