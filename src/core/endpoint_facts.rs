//! What an endpoint has taught of its ways: pure, bounded, and only what was seen. Times are since some fixed moment, as the owner has them.
//!
//! A refusal by a code that is about keys needs no more. Whatever else a made-up key gets (plain text, a page, a 404, a bare 401) may be a limit on
//! calls, a ban or an outage: it is a refusal only in contrast, a real key being accepted right before it and right after it again. An answer that
//! everybody gets never is, since no real key is accepted there.

use std::time::Duration;

use crate::{
    core::{
        classify::{Body, Calibration},
        made_up_key::KeyForm,
        response_shape::ResponseShape,
    },
    domain::protocol::HeaderFamily,
};

/// The longest time between the acceptance of a real key and the refusal of a made-up one that is compared with it.
pub const CONTRAST: Duration = Duration::from_secs(600);
/// The wait after an answer that told nothing (429, 5xx, none); doubled each time, up to the maximum.
pub const BACK_OFF: Duration = Duration::from_secs(60);
/// The longest wait.
pub const MAX_BACK_OFF: Duration = Duration::from_secs(3600);
/// How long it is remembered that a real key was accepted there, or refused in words.
pub const SEEN: Duration = Duration::from_secs(6 * 3600);
/// The most answers that are kept for one request, one per model and form of key. A server needs more only if it refuses in another way for each
/// model, or if its keys have many forms.
const MAX_ANSWERS: usize = 16;

/// What is asked of what is known.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CalibrationQuestion {
    /// Is this refusal what a made-up key gets?
    Refusal,
    /// Does a "yes" to a key count? With a form: only what holds for keys of that form tells.
    Acceptance(Option<KeyForm>),
}

/// What one request in one header has taught.
#[derive(Debug, Clone, Default)]
pub struct RequestFacts {
    made_up: Vec<MadeUpAnswer>,
    /// When a real key was last accepted, by model.
    accepted: Vec<(String, Duration)>,
    /// The catalogue knows that it refuses bad keys.
    is_documented: bool,
    /// With which kinds of body real keys were refused with a 401, by their form.
    refused: Vec<(KeyForm, Body, Duration)>,
    /// No made-up key is sent before this.
    back_off_until: Duration,
    /// How often in a row one told nothing.
    misses: u32,
    /// What the last one that told nothing got.
    inconclusive: Option<Calibration>,
}

#[derive(Debug, Clone)]
struct MadeUpAnswer {
    /// The model that the request named; empty where it names none.
    model: String,
    /// The form of the key.
    form: KeyForm,
    calibration: Calibration,
    /// A real key had been accepted there, minutes before.
    after_acceptance: bool,
    at: Duration,
    until: Duration,
}

impl MadeUpAnswer {
    /// It answers this question about a request for this model. A refusal whose status is about the credential does not depend on the model; a 400 or
    /// a 404 may. A "yes" does where some models are served without a key, so there only the model itself tells. And a refusal that came before any
    /// "yes" may not be one any more: a cache holds the first one for everybody.
    fn tells_of(&self, model: &str, question: CalibrationQuestion) -> bool {
        match (question, &self.calibration) {
            (_, Calibration::AcceptsAnyone) => self.model == model,
            (CalibrationQuestion::Refusal, Calibration::Refuses { shape, .. }) => {
                self.model == model || matches!(shape.status, 401 | 403)
            }
            (CalibrationQuestion::Acceptance(form), Calibration::Refuses { by_code, in_contrast, .. }) => {
                self.model == model
                    && form.is_none_or(|form| form == self.form)
                    && (*in_contrast || *by_code && self.after_acceptance)
            }
            (
                _,
                Calibration::Inconclusive(_)
                | Calibration::SameForEveryKey(_)
                | Calibration::NotWaitedFor
                | Calibration::NotAsked,
            ) => false,
        }
    }
}

// === impl RequestFacts ===

impl RequestFacts {
    /// What is known of its way with made-up keys, for a request that names this model.
    pub fn calibration(&self, model: &str, question: CalibrationQuestion, now: Duration) -> Calibration {
        let telling = || self.made_up.iter().filter(|answer| now < answer.until && answer.tells_of(model, question));
        // A "yes" outweighs every refusal, and a refusal that was shown to be one the others.
        let weight = |answer: &&MadeUpAnswer| match answer.calibration {
            Calibration::AcceptsAnyone => 2,
            Calibration::Refuses { in_contrast: true, .. } => 1,
            _ => 0,
        };
        match (telling().max_by_key(weight), &self.inconclusive) {
            (Some(answer), _) => answer.calibration.clone(),
            (None, Some(inconclusive)) if now < self.back_off_until => inconclusive.clone(),
            (None, _) => Calibration::NotAsked,
        }
    }

    /// Whether a made-up key may be sent.
    pub fn is_due(&self, model: &str, question: CalibrationQuestion, now: Duration) -> bool {
        self.calibration(model, question, now) == Calibration::NotAsked && now >= self.back_off_until
    }

    /// Whether a real key was accepted there.
    pub fn has_accepted(&self, now: Duration) -> bool {
        self.accepted.iter().any(|(_, at)| now.saturating_sub(*at) <= SEEN)
    }

    /// A made-up key of this form was answered so. What it tells is good for this long. `jitter`, of 0.8 to 1, spreads waits and ends. Gives what it
    /// comes to.
    pub fn take_answer(
        &mut self,
        (model, form): (&str, KeyForm),
        calibration: Calibration,
        now: Duration,
        good_for: Duration,
        jitter: f64,
    ) -> Calibration {
        let is_recent = |at: Duration| now.abs_diff(at) <= CONTRAST;
        let after_acceptance = self.accepted.iter().any(|(accepted, at)| accepted == model && is_recent(*at));
        let calibration = match calibration {
            Calibration::AcceptsAnyone => Calibration::AcceptsAnyone,
            // Keys of this form are refused with a 401 there. Whatever else comes now, and comes to a made-up key too, comes to everybody.
            Calibration::Refuses { shape, by_code: false, .. }
                if !after_acceptance && self.refuses_otherwise(form, &shape, now) =>
            {
                return self.miss(Calibration::SameForEveryKey(shape), now, jitter);
            }
            Calibration::Refuses { shape, in_words, by_code, .. } => {
                let contrasts = |(accepted, at): &(String, Duration)| is_recent(*at) && are_comparable(&shape, accepted, model);
                let in_contrast = self.is_documented && self.accepted.iter().any(contrasts);
                Calibration::Refuses { shape, in_words, by_code, in_contrast }
            }
            Calibration::NotAsked | Calibration::NotWaitedFor => return calibration,
            inconclusive @ (Calibration::Inconclusive(_) | Calibration::SameForEveryKey(_)) => {
                return self.miss(inconclusive, now, jitter);
            }
        };
        (self.misses, self.inconclusive) = (0, None);
        self.made_up.retain(|answer| now < answer.until && (answer.model != model || answer.form != form));
        if self.made_up.len() >= MAX_ANSWERS {
            self.made_up.remove(0);
        }
        let until = now + good_for.mul_f64(jitter);
        let model = model.to_owned();
        self.made_up.push(MadeUpAnswer { model, form, calibration: calibration.clone(), after_acceptance, at: now, until });
        calibration
    }

    /// A real key was accepted. `is_documented`: the catalogue knows that bad ones are refused.
    pub fn take_acceptance(&mut self, model: &str, is_documented: bool, now: Duration) {
        self.is_documented |= is_documented;
        self.accepted.retain(|(accepted, at)| accepted != model && now.saturating_sub(*at) <= SEEN);
        if self.accepted.len() >= MAX_ANSWERS {
            self.accepted.remove(0);
        }
        self.accepted.push((model.to_owned(), now));
        if !self.is_documented {
            return;
        }
        for answer in self.made_up.iter_mut().filter(|answer| now.abs_diff(answer.at) <= CONTRAST) {
            if let Calibration::Refuses { shape, in_contrast, .. } = &mut answer.calibration {
                *in_contrast |= are_comparable(shape, model, &answer.model);
            }
        }
    }

    /// A real key of this form was refused with a 401 that has this kind of body.
    pub fn take_refusal(&mut self, form: KeyForm, body: Body, now: Duration) {
        let is_same = |refused: KeyForm, known: Body| (refused, known) == (form, body);
        self.refused.retain(|(refused, known, at)| !is_same(*refused, *known) && now.saturating_sub(*at) <= SEEN);
        if self.refused.len() >= MAX_ANSWERS {
            self.refused.remove(0);
        }
        self.refused.push((form, body, now));
    }

    /// The real key that was accepted right before the made-up one was asked again: accepted once more, or given this.
    pub fn take_second_answer(&mut self, model: &str, other: Option<ResponseShape>, now: Duration, jitter: f64) {
        let latest = self.made_up.iter_mut().rev().find(|answer| answer.model == model && answer.after_acceptance);
        let Some(answer) = latest.filter(|answer| now.abs_diff(answer.at) <= CONTRAST) else { return };
        let Calibration::Refuses { in_contrast, .. } = &mut answer.calibration else { return };
        match other {
            None => *in_contrast = true,
            Some(other) => {
                let form = answer.form;
                self.made_up.retain(|answer| answer.model != model || answer.form != form);
                self.miss(Calibration::SameForEveryKey(other), now, jitter);
            }
        }
    }

    /// This was seen to come to everybody: what a made-up key got is no refusal if it was that.
    pub fn take_same_for_every_key(&mut self, shape: &ResponseShape, now: Duration, jitter: f64) {
        self.made_up.retain(|answer| match &answer.calibration {
            Calibration::Refuses { shape: refusal, in_contrast: false, .. } => !refusal.is_like(shape),
            _ => true,
        });
        self.miss(Calibration::SameForEveryKey(shape.clone()), now, jitter);
    }

    fn miss(&mut self, inconclusive: Calibration, now: Duration, jitter: f64) -> Calibration {
        self.misses = self.misses.saturating_add(1);
        let doubled = BACK_OFF.saturating_mul(2_u32.saturating_pow(self.misses - 1)).min(MAX_BACK_OFF);
        self.back_off_until = now + doubled.mul_f64(jitter);
        self.inconclusive = Some(inconclusive.clone());
        inconclusive
    }

    /// Keys of this form are refused with a 401 that is another kind of answer than this.
    fn refuses_otherwise(&self, form: KeyForm, shape: &ResponseShape, now: Duration) -> bool {
        let is_recent = |at: Duration| now.saturating_sub(at) <= SEEN;
        let differs = |body: Body| shape.status != 401 || shape.body != body;
        self.refused.iter().any(|(refused, body, at)| *refused == form && is_recent(*at) && differs(*body))
    }
}

/// A refusal and an acceptance that tell of one another: of one model, or a refusal whose status is about the credential.
fn are_comparable(shape: &ResponseShape, one: &str, other: &str) -> bool {
    one == other || matches!(shape.status, 401 | 403)
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

    /// Whether a key was accepted there.
    pub fn has_accepted(&self) -> bool {
        !self.right.is_empty()
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
