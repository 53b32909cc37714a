//! Reads the responses to the credential, in the client's own header and in the others.

use super::{OwnHeaderResult, ProbePlan, ReadAnswer, State, refusals::HeldBecause, steps::PlanStep};
use crate::{
    core::classify::{Classification, Finding, ReadBy, Reading},
    domain::verdict::{Cause, Verdict},
};

impl ProbePlan<'_> {
    /// Takes a response to the client's own header, which was sent first.
    pub(super) fn take_in_own_header(&mut self, answer: ReadAnswer) {
        // Several headers in one request can cause an error by themselves. Only an acceptance or a clear refusal counts then.
        let is_clear =
            matches!(answer.reading.classification, Classification::Accepted | Classification::Verdict(Verdict::Invalid));
        if !is_clear && !self.repeats_what_is_held(&answer) && self.ask_own_header_alone() {
            return;
        }
        let status = Some(answer.shape.status);
        let Reading { classification, by, cause, stop } = &answer.reading;
        let finding = |verdict| self.finding(verdict, Some(*cause), status);
        let is_accepted = *classification == Classification::Accepted;
        // A code or a signal that says the key is dead outweighs that every key got this response before.
        let says_dead = *classification == Classification::Verdict(Verdict::Invalid) && *by != ReadBy::Shape;
        if !is_accepted && !says_dead && self.is_same_for_every_key(&answer) {
            return self.take_same_for_every_key(&answer);
        }
        match classification {
            // Two kinds of request got this refusal, and a made-up key got it from the first of them: it is about the key.
            Classification::Unread if self.repeats_what_is_held(&answer) => self.take_refusal_like_made_up(answer.shape.status),
            Classification::Accepted | Classification::Forbidden(_) | Classification::Unread => {
                self.state = State::Calibrate(answer)
            }
            Classification::Restricted if *by == ReadBy::CommonCode => self.state = State::Calibrate(answer),
            // Only the status or a text says so. Every unknown key may get it.
            Classification::Verdict(Verdict::QuotaExhausted) if matches!(by, ReadBy::Shape | ReadBy::CommonText) => {
                self.state = State::Calibrate(answer);
            }
            Classification::Restricted => self.take_restricted(answer.shape.status),
            // This list may refuse every key with this response.
            Classification::Verdict(Verdict::Invalid)
                if answer.shape.status == 401 && !matches!(by, ReadBy::Signal(_)) && self.may_refuse_every_key() =>
            {
                self.hold_refusal(&answer, HeldBecause::Status401, *cause);
            }
            // Only the status says that the key is dead, and made-up keys are refused otherwise here. Every key may get this by now, as in a ban.
            Classification::Verdict(Verdict::Invalid) if *by == ReadBy::Shape && self.is_unusual_401(&answer) => {
                self.state = State::Calibrate(answer);
            }
            Classification::Verdict(Verdict::Invalid) => self.take_refusal(finding(Verdict::Invalid)),
            Classification::Verdict(Verdict::UnexpectedResponse) if !stop => {
                self.keep_as_fallback(finding(Verdict::UnexpectedResponse));
                self.no_api = false;
                self.next_step();
            }
            // The list may fail for every key, or may not be implemented.
            Classification::Verdict(verdict @ (Verdict::ProviderError | Verdict::RateLimited)) if self.is_provisional() => {
                self.keep_as_fallback(Finding { retry_after: answer.retry_after, ..finding(*verdict) });
                self.no_api = false;
                self.next_step();
            }
            Classification::Verdict(verdict) => {
                self.finish_unless_refused(Finding { retry_after: answer.retry_after, ..finding(*verdict) });
            }
        }
    }

    /// After a refusal in the client's own header, only a success response in another header changes the result. After a response without meaning, a
    /// clear refusal does too.
    pub(super) fn take_in_another_header(&mut self, answer: ReadAnswer) {
        // The number of headers may be what was refused: send each of them alone.
        let families = self.families();
        let own = match &self.own_header {
            Some(OwnHeaderResult::Refused(own) | OwnHeaderResult::Unread(own)) => own.status,
            None => None,
        };
        let several = families.len() > 1
            && answer.reading.classification == Classification::Unread
            && matches!(answer.shape.status, 400 | 409 | 422)
            && own != Some(answer.shape.status);
        if several && let Some(step) = self.steps.get_mut(self.current) {
            step.order.splice(self.header_group..=self.header_group, families.into_iter().map(|family| vec![family]));
            self.state = State::Ask;
            return;
        }
        match (&answer.reading.classification, &self.own_header) {
            (Classification::Accepted, _) => self.state = State::Calibrate(answer),
            // The client's own header got a 401, which is about credentials, so a clear refusal in another header counts. A 400 may be about
            // anything, and a 401 elsewhere then need not be about the key.
            (
                Classification::Verdict(verdict @ (Verdict::Invalid | Verdict::QuotaExhausted)),
                Some(OwnHeaderResult::Unread(own)),
            ) if matches!(own.status, Some(401 | 407)) => {
                self.state = State::Done(self.finding(*verdict, Some(answer.reading.cause), Some(answer.shape.status)));
            }
            _ => self.finish_step(),
        }
    }

    /// No response came. Earlier responses keep their weight.
    pub(super) fn take_no_answer(&mut self, finding: Finding) {
        match std::mem::replace(&mut self.state, State::Ask) {
            // One of these headers was accepted, so the key is good. Which one it was stays unknown.
            State::Identify(families, first) => {
                let one = families.first().copied();
                return one.map_or((), |one| self.accept(one, &first));
            }
            State::AskAgain(first) => return self.take_second_refusal(&first),
            State::AtOpenList(first, ..) => return self.take_same_for_every_key(&first),
            _ => {}
        }
        if self.header_group > 0 {
            return self.finish_step();
        }
        let says_more =
            |finding: &Finding| matches!(finding.verdict, Verdict::NotCalibrated | Verdict::ProviderError | Verdict::RateLimited);
        let finding = match self.fallback.take() {
            Some(earlier) if says_more(&earlier) => Finding { cost_money: finding.cost_money, ..earlier },
            Some(_) | None => finding,
        };
        self.finish_unless_refused(finding);
    }

    /// The key gets a 403 where a made-up key gets a 401: it is alive but may not use this endpoint.
    pub(super) fn take_forbidden(&mut self, answer: ReadAnswer) {
        self.restricted = Some(answer.shape.clone());
        if self.is_last_inference() {
            self.state = State::MadeUpNow(answer);
        } else {
            self.take_restricted(answer.shape.status);
        }
    }

    /// The key is alive but may not use this endpoint. If this was the last request that calls a model, the key is of no use.
    pub(super) fn take_restricted(&mut self, status: u16) {
        self.no_api = false;
        if self.is_last_inference() {
            self.finish_unless_refused(self.finding(Verdict::Forbidden, Some(Cause::Restricted), Some(status)));
        } else {
            self.keep_as_fallback(self.finding(Verdict::UnexpectedResponse, Some(Cause::Restricted), Some(status)));
            self.next_step();
        }
    }

    /// The response has no meaning, or none that counts yet.
    pub(super) fn take_unread(&mut self, answer: &ReadAnswer) {
        let status = answer.shape.status;
        let cause = answer.reading.cause;
        let nothing_there = cause == Cause::NotFound || cause == Cause::Page && !matches!(status, 401 | 403 | 407);
        let is_about_a_model = answer.shape.code.contains("model");
        self.no_api &= nothing_there && !is_about_a_model;
        if cause == Cause::NotFound
            && let Some(PlanStep { call, .. }) = self.steps.get(self.current)
        {
            self.absent.push(call.request);
        }
        if self.repeats_what_is_held(answer) {
            return self.take_refusal_like_made_up(status);
        }
        self.own_header = Some(OwnHeaderResult::Unread(self.finding(Verdict::UnexpectedResponse, Some(cause), Some(status))));
        // A 4xx may be a refusal because the key is missing in the right header.
        if matches!(status, 400..=499) && !nothing_there { self.try_other_headers() } else { self.finish_step() }
    }
}
