//! Reads what a made-up key, or no key, got from the same request.

use super::{
    Lesson, ProbePlan, ReadAnswer, State,
    acceptance::{AcceptanceProof, acceptance_proof},
    refusals::HeldBecause,
    steps::PlanStep,
};
use crate::{
    core::{
        classify::{Body, Calibration, Classification, Finding},
        response_shape::ResponseShape,
    },
    domain::verdict::{Cause, MadeUpKey, Verdict},
};

impl ProbePlan<'_> {
    /// Takes the result of a [`Next::Calibrate`].
    pub fn take_calibration(&mut self, calibration: &Calibration) {
        self.made_up = outcome_of(calibration);
        let answer = match std::mem::replace(&mut self.state, State::Ask) {
            State::Calibrate(answer) => answer,
            State::MadeUpNow(answer) => return self.take_made_up_now(answer, calibration),
            _ => return,
        };
        let Some(call) = self.steps.get(self.current).map(|step| step.call) else { return };
        let status = answer.shape.status;
        if let Calibration::SameForEveryKey(shape) = calibration {
            self.same_for_every_key.push((self.current, shape.clone()));
        }
        match (&answer.reading.classification, calibration) {
            (Classification::Accepted, _) => {
                match acceptance_proof(call.probe.refuses_bad_keys, self.is_provisional(), calibration) {
                    AcceptanceProof::Proven => self.accept_response(answer),
                    AcceptanceProof::NeedsSecondAcceptance => self.state = State::AskAgain(answer),
                    AcceptanceProof::Unproven if self.header_group > 0 => self.finish_step(),
                    AcceptanceProof::Unproven if self.ask_own_header_alone() => {}
                    AcceptanceProof::Unproven => {
                        let anyone = *calibration == Calibration::AcceptsAnyone;
                        if anyone && !call.probe.surface.is_inference() {
                            self.open_list = self.families().first().map(|family| (call, *family));
                        }
                        let cause = if anyone { Cause::AcceptsAnyone } else { Cause::MadeUpKeyUntold };
                        self.keep_as_fallback(self.finding(Verdict::NotCalibrated, Some(cause), Some(status)));
                        self.no_api = false;
                        self.next_step();
                    }
                }
            }
            (_, Calibration::SameForEveryKey(shape)) if shape.is_like(&answer.shape) => self.take_same_for_every_key(&answer),
            // Made-up keys were refused otherwise before, and now they get the same response as this key.
            (Classification::Verdict(Verdict::Invalid), Calibration::Refuses { shape, .. }) if shape.is_like(&answer.shape) => {
                self.take_same_for_every_key(&answer);
            }
            // The same without JSON.
            (Classification::Unread, Calibration::Refuses { shape, .. })
                if self.is_unusual_401(&answer) && shape.is_like(&answer.shape) =>
            {
                self.take_same_for_every_key(&answer);
            }
            // Made-up keys are refused otherwise here: this key may only be kept from the list.
            (Classification::Verdict(Verdict::Invalid), Calibration::Refuses { .. }) if self.is_provisional() => {
                self.hold_refusal(&answer, HeldBecause::Status401, answer.reading.cause);
            }
            (Classification::Verdict(Verdict::Invalid), _) => {
                self.take_refusal(self.finding(Verdict::Invalid, Some(answer.reading.cause), Some(status)));
            }
            // Status and code are the same; the words do not matter, unless the code only repeats the status.
            (Classification::Forbidden(code), Calibration::Refuses { shape, confirmed, .. })
                if shape.status == 403 && shape.code == *code && (!is_bare(code) || shape.is_like(&answer.shape)) =>
            {
                match &self.restricted {
                    _ if *confirmed => self.take_refusal_like_made_up(status),
                    // At the earlier step the key got this 403 and a made-up key a 401, so the key is not dead. Now both get the 403.
                    Some(earlier) if earlier.is_like(&answer.shape) => self.take_same_for_every_key(&answer),
                    Some(_) => self.take_refusal(self.finding(Verdict::Forbidden, Some(answer.reading.cause), Some(status))),
                    None => self.take_refusal_by_code(answer, false),
                }
            }
            (Classification::Forbidden(_), Calibration::Refuses { in_words: true, .. }) => self.take_forbidden(answer),
            (Classification::Forbidden(_), _) => {
                self.take_refusal(self.finding(Verdict::Forbidden, Some(answer.reading.cause), Some(status)))
            }
            // The same in a text, or without a body. A page may come from a network in between.
            (Classification::Unread, Calibration::Refuses { shape, .. })
                if status == 403 && shape.status == 401 && answer.shape.body != Body::Page && shape.body != Body::Page =>
            {
                self.take_forbidden(answer);
            }
            (Classification::Restricted, Calibration::Refuses { shape, confirmed, .. }) if shape.is_like(&answer.shape) => {
                self.take_refusal_by_code(answer, *confirmed);
            }
            (Classification::Restricted, _) => self.take_restricted(status),
            (Classification::Unread | Classification::Verdict(_), Calibration::Refuses { shape, confirmed, .. })
                if shape.is_like(&answer.shape) =>
            {
                let page = shape.body == Body::Page;
                self.seen_for_every_key |= page || answer.reading.cause == Cause::NotFound;
                match status {
                    _ if *confirmed => self.take_refusal_like_made_up(status),
                    // A page may be shown to every visitor. So may any response that is neither a 4xx nor JSON.
                    _ if page => self.take_unread(&answer),
                    401 if self.may_refuse_every_key() => self.hold_refusal(&answer, HeldBecause::Status401, Cause::AsAMadeUpKey),
                    401 => self.take_refusal_after_list_check(answer),
                    // The request is too long with any key.
                    413 | 414 | 431 => self.take_unread(&answer),
                    400..=499 => self.state = State::Keyless(answer),
                    200..=299 if shape.body == Body::Json => self.state = State::Keyless(answer),
                    _ => self.take_unread(&answer),
                }
            }
            // A made-up key does not get this response, so it is about this key's account.
            (Classification::Verdict(verdict @ Verdict::QuotaExhausted), _) => {
                let finding = self.finding(*verdict, Some(answer.reading.cause), Some(status));
                self.finish_unless_refused(Finding { retry_after: answer.retry_after, ..finding });
            }
            (Classification::Unread | Classification::Verdict(_), calibration) => {
                self.drop_refusal_of_a_known_key(calibration, &answer);
                self.take_unread(&answer);
            }
        }
    }

    /// The key got a 403 where made-up keys got a 401. If they get the 403 too by now, as in an outage of a front, it is not about this key.
    fn take_made_up_now(&mut self, answer: ReadAnswer, calibration: &Calibration) {
        match calibration {
            Calibration::Refuses { shape, .. } | Calibration::SameForEveryKey(shape) if shape.is_like(&answer.shape) => {
                self.take_same_for_every_key(&answer);
            }
            // That may have been a minute ago, so a request without a key is sent too.
            _ => self.state = State::KeylessNow(answer),
        }
    }

    /// Where a model is called, a made-up key is refused and this one gets something else that does not speak of keys. So it is known there, a
    /// list that refused it refuses every key, and there is an API.
    fn drop_refusal_of_a_known_key(&mut self, calibration: &Calibration, answer: &ReadAnswer) {
        let is_inference = self.steps.get(self.current).is_some_and(PlanStep::is_inference);
        let is_known = match calibration {
            Calibration::Refuses { shape, .. } => matches!(shape.status, 401 | 403) || !answer.shape.is_about_credentials,
            _ => false,
        };
        if is_inference && is_known {
            self.no_api = false;
            self.held.take_if(|_| self.confirming.is_none());
        }
    }

    /// Takes the result of a [`Next::Keyless`]; `None` if no answer could be had.
    pub fn take_keyless(&mut self, keyless: Option<&ResponseShape>) {
        let answer = match std::mem::replace(&mut self.state, State::Ask) {
            State::Keyless(answer) => answer,
            // A ban or a limit has begun since the restricted response. It is not about this key.
            State::KeylessNow(answer) if keyless.is_some_and(|keyless| keyless.is_like(&answer.shape)) => {
                return self.take_same_for_every_key(&answer);
            }
            State::KeylessNow(answer) => return self.take_restricted(answer.shape.status),
            state => {
                self.state = state;
                return;
            }
        };
        let Some(PlanStep { call, .. }) = self.steps.get(self.current) else { return };
        let is_alike = keyless.map(|keyless| keyless.is_like(&answer.shape));
        // With a key the response is another one than without, and this key gets the response of a made-up key.
        let differs = keyless.is_some_and(|keyless| {
            let is_conclusive = !matches!(keyless.status, 408 | 425 | 429 | 501..=599);
            // Where a model is called, such a response may be about the request or its model instead of the key.
            let may_be_about_the_request = call.probe.surface.is_inference()
                && (matches!(keyless.status, 401 | 403)
                    || matches!(answer.shape.status, 400 | 404 | 405 | 411 | 413 | 415 | 422));
            is_conclusive && !may_be_about_the_request && is_alike == Some(false)
        });
        // A gateway that only wants some key says "no such path" to all of them. That is about the base URL.
        let is_about_the_path = answer.reading.cause == Cause::NotFound && !answer.shape.is_about_credentials;
        let differs = differs && !is_about_the_path;
        match is_alike {
            Some(true) => self.seen_for_every_key = true,
            // Where a model is called, it may be about the model.
            Some(false) if is_about_the_path && !call.probe.surface.is_inference() => {}
            // The endpoint distinguishes keys from no key, so there is an API.
            Some(false) => self.no_api = false,
            None => {}
        }
        match (differs, self.is_provisional()) {
            (false, _) => self.take_unread(&answer),
            (true, true) => self.hold_refusal(&answer, HeldBecause::Shape, Cause::AsAMadeUpKey),
            (true, false) => self.take_refusal_like_made_up(answer.shape.status),
        }
    }

    /// Every key gets this response by now. What another kind of request showed does not count against how this one is known to refuse keys:
    /// one tenant's unusual key may have led to it.
    pub(super) fn is_same_for_every_key(&self, answer: &ReadAnswer) -> bool {
        let is_like = |shape: &ResponseShape| shape.is_like(&answer.shape);
        let is_usual = self.steps.get(self.current).is_some_and(|step| step.usual_refusals.iter().any(is_like));
        self.same_for_every_key.iter().any(|(step, shape)| is_like(shape) && (*step == self.current || !is_usual))
    }

    /// Every key gets this response by now. It says nothing about this key, and no further header is tried.
    pub(super) fn take_same_for_every_key(&mut self, answer: &ReadAnswer) {
        self.seen_for_every_key = true;
        self.no_api = false;
        self.same_for_every_key.push((self.current, answer.shape.clone()));
        if let Some(step) = self.steps.get(self.current) {
            self.lessons.push(Lesson::SameForEveryKey(step.call.request, self.families(), answer.shape.clone()));
        }
        // An earlier restriction was not about this key either.
        self.fallback.take_if(|earlier| earlier.cause == Some(Cause::Restricted));
        self.keep_as_fallback(self.finding(Verdict::UnexpectedResponse, Some(Cause::RequestRefused), Some(answer.shape.status)));
        self.finish_step();
    }
}

/// Whether the code of a 403 is missing, or only repeats the status.
fn is_bare(code: &str) -> bool {
    code.is_empty() || code == "403"
}

/// How the endpoint answered a made-up key.
pub fn outcome_of(calibration: &Calibration) -> MadeUpKey {
    match calibration {
        Calibration::Refuses { shape, .. } => MadeUpKey::Refused(shape.status),
        Calibration::AcceptsAnyone => MadeUpKey::Accepted,
        Calibration::Inconclusive(Some(status)) => MadeUpKey::Inconclusive(*status),
        Calibration::SameForEveryKey(shape) => MadeUpKey::Inconclusive(shape.status),
        Calibration::Inconclusive(None) => MadeUpKey::NoAnswer,
        Calibration::NotWaitedFor => MadeUpKey::NotWaitedFor,
        Calibration::NotAsked => MadeUpKey::NotAsked,
    }
}
