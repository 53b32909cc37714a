//! Decides which credential is judged and whether it may be sent. These steps come after the owner of the model is known and before the provider is
//! asked.

mod preparation;
mod remedies;

use std::sync::Arc;

use self::preparation::{NotSent, OutgoingCredential};
use crate::{
    core::{
        credentials::CredentialSet,
        derive::Derived,
        endpoint::{Endpoint, NoSurface, Preference},
        evaluation_log::EvaluationLog,
        policy::{Action, Enforcement, Facts, Flow, Group},
        registry::Runtime,
        runtimes::RuntimeFacts,
        snapshot::{OfferUse, Snapshot},
        workspace_call::{FoundCredential, Prediction, WorkspaceCall, predict},
    },
    domain::{
        decision::{ChosenBecause, JudgedCredential},
        denial::{LivenessEvidence, NameAndScope, Place, Refusal, ShadowCause, listed},
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
    /// The tenant, for limits; empty if the platform has only one. A caller that is a workspace is one of its own.
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
    pub passed_over: Option<Box<(NameAndScope, NameAndScope)>>,
    /// The headers in which the workspace itself sends this credential, the preferred one first.
    pub own_headers: &'a [HeaderFamily],
    /// The variables that hold the provider's own credentials, if the runtime is known.
    pub own_names: &'a [String],
    /// Set if the runtime does not read this variable: where to save a good credential, or `None` if the runtime reads none of this provider.
    pub place_of_unread: Option<Option<Box<Place>>>,
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

impl<'a> CredentialStep<'a, '_> {
    pub(super) fn run(&self, credentials: &CredentialSet<'a>, log: &mut EvaluationLog) -> Flow<Box<LivenessQueries<'a>>> {
        let (provider, offer_use) = (self.derived.provider, self.offer_use());
        let call = match predict(offer_use.route.as_ref(), provider, credentials) {
            Prediction::Sends(call) => call,
            Prediction::Missing(blocking_name) => {
                log.trace.step("presence", || format!("none of {} is set", listed(&provider.auth_env)));
                return Err(Facts::refused(self.missing(credentials, blocking_name)));
            }
            Prediction::Unreadable(names) => {
                log.trace.step("presence", || format!("{} could not be read", listed(&names)));
                let scopes = credentials.unreadable_scopes(&names);
                return Err(Facts::refused(Refusal::CredentialsUnreadable { names, scopes, changes_owner: false }));
            }
        };
        self.note_choice(&call, credentials, log);
        if !call.is_own {
            // The runtime sends a value that is not this provider's own.
            return Err(match call.passed_over.first() {
                Some(other) => Facts::refused(self.shadowed(&call.judged, ShadowCause::NotOfProvider, other)),
                None => Facts::refused(self.missing(credentials, Some(call.judged.env_name))),
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
            first.context.place_of_unread = Some(self.place_for(call.judged.env_name).map(Box::new));
        }
        Ok(Box::new(LivenessQueries { first, fallbacks }))
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

    /// The facts for a value that is not sent.
    fn facts_of_not_sent(&self, reason: NotSent, call: &WorkspaceCall<'a>, log: &mut EvaluationLog) -> Facts {
        match reason {
            NotSent::NoSurface(surface) => {
                log.trace.step("liveness", || surface.text());
                self.not_asked(call, Verdict::NoServerSurface, Some(&surface))
            }
            NotSent::Refused(refusal) => {
                log.trace.step("shape", || format!("{} is not sent: {}", call.judged.env_name, refusal.code()));
                let usable = self.usable(call);
                match usable {
                    Some(other) if self.is_certain() => {
                        Facts::refused(self.shadowed(&call.judged, ShadowCause::Refused(refusal), &other))
                    }
                    _ => Facts::Refused(refusal),
                }
            }
        }
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
            return Err(Facts::refused(exposed));
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
            organization: self.caller.organization(&self.spec.organization_id),
            caller: self.caller,
            context: QueryContext {
                passed_over: passed_over.filter(|_| certain).map(|other| Box::new((found.named(), other.named()))),
                own_headers: headers,
                own_names: self.offer_use().route.as_ref().map(|route| route.own.as_slice()).unwrap_or_default(),
                place_of_unread: None,
                facts: self.snapshot.catalogue.runtimes.get(&self.spec.runtime).filter(|_| certain),
            },
        }
    }

    fn not_asked(&self, call: &WorkspaceCall<'_>, verdict: Verdict, reason: Option<&NoSurface>) -> Facts {
        Facts::NotValid {
            evidence: Box::new(LivenessEvidence {
                tenant_endpoint: matches!(reason, Some(NoSurface::TenantBaseUrl(_))),
                model: self.model.to_owned(),
                ..LivenessEvidence::of(verdict, &self.derived.provider.name, call.judged.env_name)
            }),
            served_from: None,
            recently_valid: false,
            enforcement: self.enforcement,
        }
    }
}
