//! What an endpoint has taught of its ways: pure, bounded, and only what was seen. Times are since some fixed moment, as the owner has them.
//!
//! A refusal that says so in words needs no more. Whatever else a made-up key gets (plain text, a page, a 404) is a refusal only in
//! contrast: a real key was accepted there within minutes of it. An answer that everybody gets never is, since no real key is accepted there.

use std::time::Duration;

use crate::{
    core::{classify::Calibration, look::Look, made_up_key::KeyForm},
    domain::protocol::HeaderFamily,
};

/// The longest time between the refusal of a made-up key and the acceptance of a real one.
pub const CONTRAST: Duration = Duration::from_secs(600);
/// The wait after an answer that told nothing (429, 5xx, none); doubled each time, up to the maximum.
pub const BACK_OFF: Duration = Duration::from_secs(60);
/// The longest wait.
pub const MAX_BACK_OFF: Duration = Duration::from_secs(3600);
/// The most answers that are kept for one request, one per model and form of key. A server needs more only if it refuses in another way for each
/// model, or if its keys have many forms.
const MAX_ANSWERS: usize = 8;

/// What one request in one header has taught.
#[derive(Debug, Clone, Default)]
pub struct RequestFacts {
    made_up: Vec<MadeUpAnswer>,
    /// When a real key was last accepted, by model.
    accepted: Vec<(String, Duration)>,
    /// No made-up key is sent before this.
    back_off_until: Duration,
    /// How often in a row one told nothing.
    misses: u32,
    /// What the last one that told nothing got.
    untold: Option<Option<u16>>,
}

#[derive(Debug, Clone)]
struct MadeUpAnswer {
    /// The model that the request named; empty where it names none.
    model: String,
    /// The form of the key.
    form: KeyForm,
    calibration: Calibration,
    at: Duration,
    until: Duration,
}

impl MadeUpAnswer {
    /// It tells of a request for this model too. A status that is about the credential, and a "yes", do not depend on the model; a 400 or a
    /// 404 may.
    fn tells_of(&self, model: &str) -> bool {
        self.model == model
            || match &self.calibration {
                Calibration::Refuses { look, .. } => matches!(look.status, 401 | 403),
                Calibration::AcceptsAnyone => true,
                Calibration::Untold(_) | Calibration::NotAsked => false,
            }
    }
}

// === impl RequestFacts ===

impl RequestFacts {
    /// What is known of its way with made-up keys, for a request that names this model. With a form: only what holds for keys of that form, as a
    /// "yes" to one needs it.
    pub fn calibration(&self, model: &str, form: Option<KeyForm>, now: Duration) -> Calibration {
        let of_form = |answer: &MadeUpAnswer| {
            answer.calibration == Calibration::AcceptsAnyone || form.is_none_or(|form| answer.form == form)
        };
        let known = self.made_up.iter().find(|answer| now < answer.until && answer.tells_of(model) && of_form(answer));
        match (known, self.untold) {
            (Some(answer), _) => answer.calibration.clone(),
            (None, Some(status)) if now < self.back_off_until => Calibration::Untold(status),
            (None, _) => Calibration::NotAsked,
        }
    }

    /// Whether a made-up key may be sent.
    pub fn is_due(&self, model: &str, form: Option<KeyForm>, now: Duration) -> bool {
        self.calibration(model, form, now) == Calibration::NotAsked && now >= self.back_off_until
    }

    /// A made-up key of this form was answered so. What it tells is good for this long. `jitter`, of 0.8 to 1, spreads waits and ends.
    pub fn take_answer(
        &mut self,
        (model, form): (&str, KeyForm),
        calibration: Calibration,
        now: Duration,
        good_for: Duration,
        jitter: f64,
    ) {
        let calibration = match calibration {
            Calibration::NotAsked => return,
            Calibration::Untold(status) => {
                self.misses = self.misses.saturating_add(1);
                let doubled = BACK_OFF.saturating_mul(2_u32.saturating_pow(self.misses - 1)).min(MAX_BACK_OFF);
                self.back_off_until = now + doubled.mul_f64(jitter);
                self.untold = Some(status);
                return;
            }
            Calibration::AcceptsAnyone => Calibration::AcceptsAnyone,
            Calibration::Refuses { look, in_words, .. } => {
                let contrasts =
                    |(accepted, at): &(String, Duration)| now.abs_diff(*at) <= CONTRAST && are_comparable(&look, accepted, model);
                let in_contrast = self.accepted.iter().any(contrasts);
                Calibration::Refuses { look, in_words, in_contrast }
            }
        };
        (self.misses, self.untold) = (0, None);
        self.made_up.retain(|answer| now < answer.until && (answer.model != model || answer.form != form));
        if self.made_up.len() >= MAX_ANSWERS {
            self.made_up.remove(0);
        }
        let until = now + good_for.mul_f64(jitter);
        self.made_up.push(MadeUpAnswer { model: model.to_owned(), form, calibration, at: now, until });
    }

    /// A real key was accepted.
    pub fn take_acceptance(&mut self, model: &str, now: Duration) {
        self.accepted.retain(|(accepted, at)| accepted != model && now.abs_diff(*at) <= CONTRAST);
        if self.accepted.len() >= MAX_ANSWERS {
            self.accepted.remove(0);
        }
        self.accepted.push((model.to_owned(), now));
        for answer in self.made_up.iter_mut().filter(|answer| now.abs_diff(answer.at) <= CONTRAST) {
            if let Calibration::Refuses { look, in_contrast, .. } = &mut answer.calibration {
                *in_contrast |= are_comparable(look, model, &answer.model);
            }
        }
    }
}

/// A refusal and an acceptance that tell of one another: of one model, or a refusal whose status is about the credential.
fn are_comparable(look: &Look, one: &str, other: &str) -> bool {
    one == other || matches!(look.status, 401 | 403)
}

/// Which headers an endpoint takes a credential in, and which it does not.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct EndpointFacts {
    right: Vec<HeaderFamily>,
    wrong: Vec<HeaderFamily>,
}

// === impl EndpointFacts ===

impl EndpointFacts {
    /// A key was accepted in this header, and refused in those.
    pub fn take_family(&mut self, right: HeaderFamily, wrong: &[HeaderFamily]) {
        self.wrong.retain(|family| *family != right);
        if !self.right.contains(&right) {
            self.right.push(right);
        }
        for family in wrong {
            if !self.wrong.contains(family) && !self.right.contains(family) {
                self.wrong.push(*family);
            }
        }
    }

    /// The headers to ask in, of those that a request knows, in order: first alone, then the rest together. Once one is known to be right,
    /// it alone is asked, and the client's own before it as long as that was not seen refused.
    pub fn order(&self, known: &[HeaderFamily], preferred: Option<HeaderFamily>) -> Vec<Vec<HeaderFamily>> {
        let own = preferred.filter(|family| known.contains(family));
        let right: Vec<HeaderFamily> = known.iter().copied().filter(|family| self.right.contains(family)).collect();
        match (own, right.first()) {
            (Some(own), _) if right.contains(&own) => vec![vec![own]],
            (Some(own), Some(right)) if !self.wrong.contains(&own) => vec![vec![own], vec![*right]],
            (_, Some(right)) => vec![vec![*right]],
            (own, None) => {
                let first = own.or(known.first().copied());
                let rest: Vec<HeaderFamily> = known.iter().copied().filter(|family| Some(*family) != first).collect();
                first.into_iter().map(|first| vec![first]).chain(Some(rest).filter(|rest| !rest.is_empty())).collect()
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use HeaderFamily::{ApiKey, Bearer, XApiKey};

    const ALL: [HeaderFamily; 3] = [Bearer, XApiKey, ApiKey];

    #[test]
    fn one_header_once_it_is_known() {
        let mut facts = EndpointFacts::default();
        assert_eq!(facts.order(&ALL, None), [vec![Bearer], vec![XApiKey, ApiKey]]);
        assert_eq!(facts.order(&ALL, Some(ApiKey)), [vec![ApiKey], vec![Bearer, XApiKey]]);
        assert_eq!(facts.order(&[Bearer], Some(ApiKey)), [vec![Bearer]]);
        facts.take_family(ApiKey, &[Bearer]);
        assert_eq!(facts.order(&ALL, None), [vec![ApiKey]]);
        assert_eq!(facts.order(&ALL, Some(Bearer)), [vec![ApiKey]], "it was seen refused");
        assert_eq!(facts.order(&ALL, Some(XApiKey)), [vec![XApiKey], vec![ApiKey]], "nobody has tried it");
        facts.take_family(Bearer, &[]);
        assert_eq!(facts.order(&ALL, Some(Bearer)), [vec![Bearer]]);
        assert_eq!(facts.order(&[XApiKey], None), [vec![XApiKey]]);
    }
}
