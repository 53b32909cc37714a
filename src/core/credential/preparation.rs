//! Prepares a credential as the runtime would send it, or says why it is not sent.

use std::sync::Arc;

use url::Url;

use super::CredentialStep;
use crate::{
    core::{
        endpoint::{Endpoint, NoSurface},
        evaluation_log::EvaluationLog,
        key_shape::{Mistake, Unsendable, mistake, why_unsendable},
        oauth_credential::OauthCheck,
        registry::Auth,
        runtimes::{Delivery, Trims},
        workspace_call::{FoundCredential, WorkspaceCall},
    },
    domain::{
        denial::{Malformation, Refusal},
        secret::Secret,
        verdict::WarningCode,
    },
};

/// A credential that is ready to be sent, and where it goes.
pub(super) struct OutgoingCredential<'a> {
    pub(super) found: FoundCredential<'a>,
    pub(super) secret: Arc<Secret>,
    pub(super) endpoint: &'a Arc<Endpoint>,
    pub(super) delivery: Option<&'a Delivery>,
}

/// Why a value is not sent.
pub(super) enum NotSent {
    Refused(Box<Refusal>),
    NoSurface(NoSurface),
}

impl<'a> CredentialStep<'a, '_> {
    /// The value and its destination as the runtime would send it, or the reason why it is not sent.
    pub(super) fn prepare(
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

    /// Another of the provider's own values, which is not used but could be sent.
    pub(super) fn usable(&self, call: &WorkspaceCall<'a>) -> Option<FoundCredential<'a>> {
        let mut discarded = EvaluationLog::new(false);
        call.passed_over.iter().find(|other| self.prepare(**other, call.moved_to, &mut discarded).is_ok()).copied()
    }
}
