//! What has been learnt about an endpoint: how it treats made-up keys, and which headers it takes. Pure and bounded. The caller gives the time, as
//! the duration since a fixed moment.
//!
//! A made-up key that gets a code about keys has been refused, without doubt. Any other response to it (plain text, a page, a 404, a bare 401) may
//! come from a rate limit, a ban or an outage. Such a response counts as a refusal only if a real key was accepted right before it and again right
//! after it. What every key gets is never a refusal: no real key is accepted there at that time.

use std::time::Duration;

use crate::{
    core::{
        classify::{Body, Calibration},
        made_up_key::KeyForm,
        response_shape::ResponseShape,
    },
    domain::protocol::HeaderFamily,
};

/// The most time between the acceptance of a real key and the refusal of a made-up key, for the two to be compared.
pub const COMPARABLE_WITHIN: Duration = Duration::from_secs(600);
/// The first wait after an inconclusive answer (429, 5xx, none). It doubles each time, up to [`MAX_BACK_OFF`].
pub const BACK_OFF: Duration = Duration::from_secs(60);
/// The longest wait.
pub const MAX_BACK_OFF: Duration = Duration::from_secs(3600);
/// How long the acceptance of a real key, or its refusal with a 401, is remembered.
pub const REMEMBERED_FOR: Duration = Duration::from_secs(6 * 3600);
/// The most answers to made-up keys that are kept for one request, one per model and form of key. An endpoint needs more only if it refuses
/// differently for each model, or if its keys have many forms.
const MAX_ANSWERS: usize = 16;
/// The most usual refusals that are kept for one request.
const MAX_USUAL: usize = 4;

/// What the answer to a made-up key is needed for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CalibrationQuestion {
    /// To decide whether a response is a refusal.
    Refusal,
    /// To decide whether every key gets this refusal by now. Only an answer to this question counts, for a minute.
    RefusalNow,
    /// To decide whether a success response counts. With a form, only made-up keys of this form are considered.
    Acceptance(Option<KeyForm>),
    /// To check that the catalogue is still right. What is known already is enough, and nobody waits for the answer.
    Check,
}

/// Refusals that are known at a request.
#[derive(Debug, Clone, Default)]
pub struct KnownRefusals {
    /// Made-up keys were refused like this, and no limit, ban or outage explains it.
    pub usual: Vec<ResponseShape>,
    /// A key that is accepted otherwise got this within the last minutes.
    pub for_every_key: Option<ResponseShape>,
    /// Made-up keys of these forms were refused.
    pub forms: Vec<KeyForm>,
}

/// What has been learnt about one request with the credential in one header.
#[derive(Debug, Clone, Default)]
pub struct RequestFacts {
    made_up: Vec<MadeUpAnswer>,
    /// The models for which a real key was accepted, and when last.
    accepted: Vec<(String, Duration)>,
    /// The catalogue says that this request refuses bad keys.
    is_documented: bool,
    /// Real keys that were refused with a 401: their form, the kind of the response's body, and when.
    refused: Vec<(KeyForm, Body, Duration)>,
    /// Refusals of made-up keys that no limit, ban or outage explains, and when they were seen last.
    usual: Vec<(ResponseShape, Duration)>,
    /// No made-up key is sent before this time.
    back_off_until: Duration,
    /// How many answers in a row were inconclusive.
    misses: u32,
    /// The last inconclusive answer.
    inconclusive: Option<Calibration>,
    /// It is inconclusive only because a real key of this form was refused otherwise.
    is_doubted: bool,
}

#[derive(Debug, Clone)]
struct MadeUpAnswer {
    /// The model in the request; empty if the request names none.
    model: String,
    form: KeyForm,
    calibration: Calibration,
    /// A real key had been accepted for this model shortly before.
    after_acceptance: bool,
    /// When it was last seen because a key got an unusual refusal.
    checked: Option<Duration>,
    at: Duration,
    until: Duration,
}

impl MadeUpAnswer {
    /// Whether this answer settles the question for a request with this model. A 401 or 403 is about the credential and holds for every model; a 400
    /// or 404 may depend on the model. An acceptance always may, since some models are served without a key. A refusal that was seen before any
    /// acceptance does not prove an acceptance: a cache may give the first refusal to every key.
    fn settles(&self, model: &str, question: CalibrationQuestion, now: Duration) -> bool {
        match (question, &self.calibration) {
            (CalibrationQuestion::RefusalNow, _) if self.checked.is_none_or(|at| now.abs_diff(at) > BACK_OFF) => false,
            (_, Calibration::AcceptsAnyone) => self.model == model,
            (
                CalibrationQuestion::Refusal | CalibrationQuestion::RefusalNow | CalibrationQuestion::Check,
                Calibration::Refuses { shape, .. },
            ) => self.model == model || matches!(shape.status, 401 | 403),
            (CalibrationQuestion::Acceptance(form), Calibration::Refuses { shape, by_code, confirmed, .. }) => {
                self.model == model
                    && form.is_none_or(|form| form == self.form)
                    // One more made-up key would be refused for its form, too.
                    && (*confirmed || self.after_acceptance && (*by_code || shape.is_about_the_form))
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
    /// How a made-up key is answered, for a request that names this model.
    pub fn calibration(&self, model: &str, question: CalibrationQuestion, now: Duration) -> Calibration {
        let settling = || self.made_up.iter().filter(|answer| now < answer.until && answer.settles(model, question, now));
        // An acceptance outweighs every refusal; a confirmed refusal outweighs the others.
        let weight = |answer: &&MadeUpAnswer| match answer.calibration {
            Calibration::AcceptsAnyone => 2,
            Calibration::Refuses { confirmed: true, .. } => 1,
            _ => 0,
        };
        match (settling().max_by_key(weight), &self.inconclusive) {
            (Some(answer), _) => answer.calibration.clone(),
            (None, Some(inconclusive)) if now < self.back_off_until => inconclusive.clone(),
            (None, _) => Calibration::NotAsked,
        }
    }

    /// Whether a made-up key should be sent now.
    pub fn is_due(&self, model: &str, question: CalibrationQuestion, now: Duration) -> bool {
        self.calibration(model, question, now) == Calibration::NotAsked && now >= self.back_off_until
    }

    /// Whether a real key was accepted recently.
    pub fn has_accepted(&self, now: Duration) -> bool {
        self.accepted.iter().any(|(_, at)| now.saturating_sub(*at) <= REMEMBERED_FOR)
    }

    /// The refusals that are known now.
    pub fn refusals(&self, now: Duration) -> KnownRefusals {
        let usual = self.usual.iter().filter(|(_, at)| now.saturating_sub(*at) <= REMEMBERED_FOR);
        let for_every_key = match &self.inconclusive {
            Some(Calibration::SameForEveryKey(shape)) if now < self.back_off_until => Some(shape.clone()),
            _ => None,
        };
        let is_refusal = |answer: &&MadeUpAnswer| now < answer.until && matches!(answer.calibration, Calibration::Refuses { .. });
        let forms = self.made_up.iter().filter(is_refusal).map(|answer| answer.form).collect();
        KnownRefusals { usual: usual.map(|(shape, _)| shape.clone()).collect(), for_every_key, forms }
    }

    fn remember_usual(&mut self, shape: &ResponseShape, now: Duration) {
        self.usual.retain(|(known, at)| !known.is_like(shape) && now.saturating_sub(*at) <= REMEMBERED_FOR);
        if self.usual.len() >= MAX_USUAL {
            self.usual.remove(0);
        }
        self.usual.push((shape.clone(), now));
    }

    /// Records the answer to a made-up key of this form, valid for `good_for`. `jitter` (0.8 to 1) spreads waits and expiries. Returns what the
    /// answer means in the light of what is known.
    pub fn take_answer(
        &mut self,
        (model, form, question): (&str, KeyForm, CalibrationQuestion),
        calibration: Calibration,
        now: Duration,
        good_for: Duration,
        jitter: f64,
    ) -> Calibration {
        let is_recent = |at: Duration| now.abs_diff(at) <= COMPARABLE_WITHIN;
        let after_acceptance = self.accepted.iter().any(|(accepted, at)| accepted == model && is_recent(*at));
        let calibration = match calibration {
            Calibration::AcceptsAnyone => Calibration::AcceptsAnyone,
            // Real keys of this form are refused with a 401. A made-up key that gets something else got what every key gets now.
            Calibration::Refuses { shape, by_code: false, .. }
                if !after_acceptance && self.refuses_otherwise(form, &shape, now) =>
            {
                let inconclusive = self.record_inconclusive(Calibration::SameForEveryKey(shape), now, jitter);
                self.is_doubted = true;
                return inconclusive;
            }
            Calibration::Refuses { shape, in_words, by_code, .. } => {
                let confirms = |(accepted, at): &(String, Duration)| is_recent(*at) && are_comparable(&shape, accepted, model);
                // What a made-up key gets because a key got something unusual may be what every key gets now.
                let is_usual = question != CalibrationQuestion::RefusalNow;
                let confirmed = is_usual && self.is_documented && self.accepted.iter().any(confirms);
                Calibration::Refuses { shape, in_words, by_code, confirmed }
            }
            Calibration::NotAsked | Calibration::NotWaitedFor => return calibration,
            inconclusive @ (Calibration::Inconclusive(_) | Calibration::SameForEveryKey(_)) => {
                return self.record_inconclusive(inconclusive, now, jitter);
            }
        };
        (self.misses, self.inconclusive, self.is_doubted) = (0, None, false);
        if let Calibration::Refuses { shape, by_code: true, .. } = &calibration
            && after_acceptance
        {
            self.remember_usual(shape, now);
        }
        let checked = (question == CalibrationQuestion::RefusalNow).then_some(now);
        // The same as before: what was learnt about it stays.
        let is_known = |answer: &&mut MadeUpAnswer| {
            let is_alike = match (&answer.calibration, &calibration) {
                (Calibration::Refuses { shape, .. }, Calibration::Refuses { shape: other, .. }) => shape.is_like(other),
                _ => false,
            };
            now < answer.until && answer.model == model && answer.form == form && is_alike
        };
        if let (Some(_), Some(known)) = (checked, self.made_up.iter_mut().find(is_known)) {
            known.checked = checked;
            return known.calibration.clone();
        }
        // A 401 that proves an acceptance stays what it is: the 403 or 404 that comes now may be what every key gets for a while.
        let is_proof = |answer: &&mut MadeUpAnswer| {
            let is_one = match &answer.calibration {
                Calibration::Refuses { shape, by_code, confirmed, .. } => {
                    shape.status == 401 && (*confirmed || *by_code && answer.after_acceptance)
                }
                _ => false,
            };
            now < answer.until && answer.model == model && answer.form == form && is_one
        };
        if let (Some(_), Calibration::Refuses { shape, .. }) = (checked, &calibration)
            && shape.status != 401
            && let Some(known) = self.made_up.iter_mut().find(is_proof)
        {
            known.checked = checked;
            return calibration;
        }
        self.made_up.retain(|answer| now < answer.until && (answer.model != model || answer.form != form));
        if self.made_up.len() >= MAX_ANSWERS {
            self.made_up.remove(0);
        }
        let until = now + good_for.mul_f64(jitter);
        let model = model.to_owned();
        self.made_up.push(MadeUpAnswer {
            model,
            form,
            calibration: calibration.clone(),
            after_acceptance,
            checked,
            at: now,
            until,
        });
        calibration
    }

    /// Records that a real key was accepted. `is_documented`: the catalogue says that this request refuses bad keys.
    pub fn take_acceptance(&mut self, model: &str, is_documented: bool, now: Duration) {
        self.is_documented |= is_documented;
        self.accepted.retain(|(accepted, at)| accepted != model && now.saturating_sub(*at) <= REMEMBERED_FOR);
        if self.accepted.len() >= MAX_ANSWERS {
            self.accepted.remove(0);
        }
        self.accepted.push((model.to_owned(), now));
        // Not every key is refused. So a made-up key is sent once more, between two acceptances.
        if self.is_doubted {
            (self.misses, self.inconclusive, self.back_off_until, self.is_doubted) = (0, None, Duration::ZERO, false);
        }
        if !self.is_documented {
            return;
        }
        for answer in self.made_up.iter_mut().filter(|answer| now.abs_diff(answer.at) <= COMPARABLE_WITHIN) {
            if let Calibration::Refuses { shape, confirmed, .. } = &mut answer.calibration {
                *confirmed |= are_comparable(shape, model, &answer.model);
            }
        }
    }

    /// Records that a real key of this form was refused with a 401 that had this kind of body.
    pub fn take_refusal(&mut self, form: KeyForm, body: Body, now: Duration) {
        let is_same = |refused: KeyForm, known: Body| (refused, known) == (form, body);
        self.refused.retain(|(refused, known, at)| !is_same(*refused, *known) && now.saturating_sub(*at) <= REMEMBERED_FOR);
        if self.refused.len() >= MAX_ANSWERS {
            self.refused.remove(0);
        }
        self.refused.push((form, body, now));
    }

    /// Records how the real key was answered that was sent again after the made-up one: `None` if it was accepted, else the response.
    pub fn take_second_answer(&mut self, model: &str, other: Option<ResponseShape>, now: Duration, jitter: f64) {
        let latest = self.made_up.iter_mut().rev().find(|answer| answer.model == model && answer.after_acceptance);
        let Some(answer) = latest.filter(|answer| now.abs_diff(answer.at) <= COMPARABLE_WITHIN) else { return };
        let Calibration::Refuses { confirmed, shape, .. } = &mut answer.calibration else { return };
        match other {
            None => {
                *confirmed = true;
                let shape = shape.clone();
                self.remember_usual(&shape, now);
            }
            Some(other) => {
                let form = answer.form;
                self.made_up.retain(|answer| answer.model != model || answer.form != form);
                self.record_inconclusive(Calibration::SameForEveryKey(other), now, jitter);
            }
        }
    }

    /// Records that every key gets this response. Earlier refusals of made-up keys that look like it no longer count.
    pub fn take_same_for_every_key(&mut self, shape: &ResponseShape, now: Duration, jitter: f64) {
        self.made_up.retain(|answer| match &answer.calibration {
            Calibration::Refuses { shape: refusal, confirmed: false, .. } => !refusal.is_like(shape),
            _ => true,
        });
        let is_known = matches!(&self.inconclusive, Some(Calibration::SameForEveryKey(known)) if known.is_like(shape));
        let is_doubted = self.is_doubted && is_known;
        self.record_inconclusive(Calibration::SameForEveryKey(shape.clone()), now, jitter);
        self.is_doubted = is_doubted;
    }

    fn record_inconclusive(&mut self, inconclusive: Calibration, now: Duration, jitter: f64) -> Calibration {
        self.misses = self.misses.saturating_add(1);
        let doubled = BACK_OFF.saturating_mul(2_u32.saturating_pow(self.misses - 1)).min(MAX_BACK_OFF);
        self.back_off_until = now + doubled.mul_f64(jitter);
        (self.inconclusive, self.is_doubted) = (Some(inconclusive.clone()), false);
        inconclusive
    }

    /// Whether keys of this form are known to be refused with a 401 of another kind than this response.
    fn refuses_otherwise(&self, form: KeyForm, shape: &ResponseShape, now: Duration) -> bool {
        let is_recent = |at: Duration| now.saturating_sub(at) <= REMEMBERED_FOR;
        let differs = |body: Body| shape.status != 401 || shape.body != body;
        self.refused.iter().any(|(refused, body, at)| *refused == form && is_recent(*at) && differs(*body))
    }
}

/// Whether a refusal and an acceptance can be compared: they are about the same model, or the status is about the credential.
fn are_comparable(shape: &ResponseShape, one: &str, other: &str) -> bool {
    one == other || matches!(shape.status, 401 | 403)
}

/// The headers in which an endpoint takes a credential, and those in which it does not.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct EndpointFacts {
    right: Vec<HeaderFamily>,
    /// Some keys were refused in these. One that is right for other keys counts as right.
    wrong: Vec<HeaderFamily>,
}

// === impl EndpointFacts ===

impl EndpointFacts {
    /// Records that a key was accepted in one header and refused in others.
    pub fn take_family(&mut self, right: HeaderFamily, wrong: &[HeaderFamily]) {
        if !self.right.contains(&right) {
            self.right.push(right);
        }
        for family in wrong {
            if !self.wrong.contains(family) {
                self.wrong.push(*family);
            }
        }
    }

    /// Whether any key was accepted at this endpoint.
    pub fn has_accepted(&self) -> bool {
        !self.right.is_empty()
    }

    /// The headers to send a credential in, of those that a request supports: one alone first, then the others together. Once a header is known to be
    /// right, only that one is used. The client's own header still comes before it, unless it was seen refused.
    ///
    /// An endpoint may take two kinds of keys, each in a header of its own. So if keys like this one were not seen refused in the right header
    /// (`is_known`), a refusal there is not the last word, and the client's own header and others that are right come after it.
    pub fn order(
        &self,
        known: &[HeaderFamily],
        preferred: Option<HeaderFamily>,
        is_known: impl Fn(HeaderFamily) -> bool,
    ) -> Vec<Vec<HeaderFamily>> {
        let own = preferred.filter(|family| known.contains(family));
        let right: Vec<HeaderFamily> = known.iter().copied().filter(|family| self.right.contains(family)).collect();
        let and_then = |first: HeaderFamily| {
            // For an unknown client, the first header of the request is the usual one.
            let usual = own.or(known.first().copied());
            let candidates = usual.iter().chain(&right).copied().filter(|family| *family != first && !is_known(first));
            let mut then: Vec<HeaderFamily> = Vec::new();
            for family in candidates {
                if !then.contains(&family) {
                    then.push(family);
                }
            }
            std::iter::once(vec![first]).chain(Some(then).filter(|then| !then.is_empty())).collect()
        };
        match (own, right.first()) {
            (Some(own), _) if right.contains(&own) => and_then(own),
            (Some(own), Some(right)) if !self.wrong.contains(&own) => vec![vec![own], vec![*right]],
            (_, Some(right)) => and_then(*right),
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
    use crate::{core::classify::Answer, domain::secret::Secret};
    use HeaderFamily::{ApiKey, Bearer, XApiKey};

    const ALL: [HeaderFamily; 3] = [Bearer, XApiKey, ApiKey];
    const GOOD_FOR: Duration = Duration::from_secs(3600);
    const BY_CODE: (u16, bool) = (401, true);
    const UNCLEAR: (u16, bool) = (404, false);

    fn seconds(seconds: usize) -> Duration {
        Duration::from_secs(u64::try_from(seconds).unwrap())
    }

    /// The form of a key of this length.
    fn form(length: usize) -> KeyForm {
        KeyForm::of(&Secret::new("made-up-".to_owned() + &"a1".repeat(length)))
    }

    fn refusal((status, by_code): (u16, bool)) -> Calibration {
        let answer = Answer { status, body: b"no", truncated: false, page: false, retry_after: None };
        Calibration::Refuses { shape: ResponseShape::of(answer, ""), in_words: by_code, by_code, confirmed: false }
    }

    /// A made-up key of this form is refused like this. Returns what that means.
    fn refuse(facts: &mut RequestFacts, model: &str, form: KeyForm, like: (u16, bool), at: Duration) -> Calibration {
        facts.take_answer((model, form, CalibrationQuestion::Refusal), refusal(like), at, GOOD_FOR, 1.0)
    }

    #[test]
    fn what_is_repeated_pushes_out_nothing_else() {
        let mut facts = RequestFacts::default();
        facts.take_acceptance("m", false, seconds(0));
        facts.take_refusal(form(10), Body::Text, seconds(0));
        refuse(&mut facts, "m", form(30), BY_CODE, seconds(0));
        for round in 1..100 {
            facts.take_acceptance("n", false, seconds(round));
            facts.take_refusal(form(11), Body::Text, seconds(round));
            refuse(&mut facts, "n", form(30), BY_CODE, seconds(round));
        }
        let known = facts.calibration("m", CalibrationQuestion::Acceptance(Some(form(30))), seconds(100));
        assert_eq!(known, refusal(BY_CODE), "the answer for m");
        refuse(&mut facts, "m", form(20), BY_CODE, seconds(100));
        let known = facts.calibration("m", CalibrationQuestion::Acceptance(Some(form(20))), seconds(100));
        assert_eq!(known, refusal(BY_CODE), "the acceptance of m");
        let doubted = refuse(&mut facts, "o", form(10), UNCLEAR, seconds(100));
        assert!(matches!(doubted, Calibration::SameForEveryKey(_)), "the refused key: {doubted:?}");
    }

    #[test]
    fn the_oldest_gives_way_at_the_limits() {
        let mut facts = RequestFacts::default();
        let names: Vec<String> = (0..=MAX_ANSWERS).map(|number| format!("m-{number}")).collect();
        for (round, name) in names.iter().enumerate() {
            facts.take_acceptance(name, false, seconds(round));
            facts.take_refusal(form(round), Body::Text, seconds(round));
        }
        let now = seconds(MAX_ANSWERS + 1);
        for (round, name) in names.iter().enumerate() {
            refuse(&mut facts, name, form(99), BY_CODE, now);
            let known = facts.calibration(name, CalibrationQuestion::Acceptance(None), now);
            let expected = if round == 0 { Calibration::NotAsked } else { refusal(BY_CODE) };
            assert_eq!(known, expected, "the acceptance of {name}");
        }
        let answers = names.iter().map(|name| facts.calibration(name, CalibrationQuestion::Acceptance(None), now));
        assert_eq!(answers.filter(|known| *known == refusal(BY_CODE)).count(), MAX_ANSWERS);
        assert_eq!(facts.refusals(now).forms.len(), MAX_ANSWERS);
        for round in 0..=MAX_ANSWERS {
            let meant = refuse(&mut facts, "o", form(round), UNCLEAR, now);
            assert_eq!(meant == refusal(UNCLEAR), round == 0, "the refused key {round}: {meant:?}");
        }
        for status in [401, 403, 404, 410, 422] {
            facts.take_acceptance("m", false, now);
            refuse(&mut facts, "m", form(99), (status, true), now);
        }
        let usual: Vec<u16> = facts.refusals(now).usual.iter().map(|shape| shape.status).collect();
        assert_eq!(usual, [403, 404, 410, 422]);
    }

    #[test]
    fn a_wait_doubles_up_to_its_limit() {
        let mut facts = RequestFacts::default();
        let mut now = Duration::ZERO;
        let question = ("m", form(10), CalibrationQuestion::Refusal);
        for wait in [60, 120, 240, 480, 960, 1920, 3600, 3600] {
            facts.take_answer(question, Calibration::Inconclusive(Some(503)), now, GOOD_FOR, 1.0);
            assert!(!facts.is_due("m", CalibrationQuestion::Refusal, now + seconds(wait - 1)), "{wait}");
            now += seconds(wait);
            assert!(facts.is_due("m", CalibrationQuestion::Refusal, now), "{wait}");
        }
        facts.take_answer(question, Calibration::Inconclusive(Some(503)), now, GOOD_FOR, 0.5);
        assert!(facts.is_due("m", CalibrationQuestion::Refusal, now + MAX_BACK_OFF / 2));
        let shortened = facts.take_answer(question, refusal(BY_CODE), now, GOOD_FOR, 0.5);
        assert_eq!(shortened, refusal(BY_CODE));
        let known = |after| facts.calibration("m", CalibrationQuestion::Refusal, now + after);
        assert_eq!(known(GOOD_FOR / 2 - seconds(1)), refusal(BY_CODE));
        assert_eq!(known(GOOD_FOR / 2), Calibration::NotAsked);
    }

    #[test]
    fn one_header_once_it_is_known() {
        let mut facts = EndpointFacts::default();
        let order = |facts: &EndpointFacts, known: &[HeaderFamily], own| facts.order(known, own, |_| true);
        assert_eq!(order(&facts, &ALL, None), [vec![Bearer], vec![XApiKey, ApiKey]]);
        assert_eq!(order(&facts, &ALL, Some(ApiKey)), [vec![ApiKey], vec![Bearer, XApiKey]]);
        assert_eq!(order(&facts, &[Bearer], Some(ApiKey)), [vec![Bearer]]);
        assert!(!facts.has_accepted());
        facts.take_family(ApiKey, &[Bearer]);
        assert!(facts.has_accepted());
        assert_eq!(order(&facts, &ALL, None), [vec![ApiKey]]);
        assert_eq!(order(&facts, &ALL, Some(Bearer)), [vec![ApiKey]], "it was seen refused");
        assert_eq!(facts.order(&ALL, Some(Bearer), |_| false), [vec![ApiKey], vec![Bearer]], "another kind of key");
        assert_eq!(facts.order(&ALL, None, |_| false), [vec![ApiKey], vec![Bearer]], "an unknown client");
        assert_eq!(order(&facts, &ALL, Some(XApiKey)), [vec![XApiKey], vec![ApiKey]], "nobody has tried it");
        facts.take_family(Bearer, &[]);
        assert_eq!(order(&facts, &ALL, Some(Bearer)), [vec![Bearer]]);
        assert_eq!(order(&facts, &ALL, Some(ApiKey)), [vec![ApiKey]], "both are right");
        assert_eq!(facts.order(&ALL, Some(Bearer), |_| false), [vec![Bearer], vec![ApiKey]], "another kind of key");
        assert_eq!(facts.order(&ALL, Some(Bearer), |family| family == Bearer), [vec![Bearer]]);
        assert_eq!(order(&facts, &[XApiKey], None), [vec![XApiKey]]);
    }
}
