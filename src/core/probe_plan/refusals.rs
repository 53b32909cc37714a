//! Decides when a refusal counts. A refusal by a list that may refuse every key is held back until the request that calls a model is answered.

use super::{OwnHeaderResult, ProbePlan, ReadAnswer, State, steps::PlanStep};
use crate::{
    core::{
        classify::{Body, Finding},
        response_shape::ResponseShape,
    },
    domain::verdict::{Cause, Verdict},
};

#[derive(Debug, Clone)]
pub(super) struct HeldRefusal {
    pub(super) finding: Finding,
    pub(super) shape: ResponseShape,
    /// The step that was refused.
    pub(super) step: usize,
    pub(super) because: HeldBecause,
}

/// Why a refusal is held back. The kind decides what can contradict it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum HeldBecause {
    /// A 401 that says in words that the key is refused, or that a made-up key gets too. It counts unless the key is accepted later.
    Status401,
    /// A code for "forbidden" that a made-up key gets too. It counts unless a later answer is clear.
    Code,
    /// Only the shape of the response. It counts only if a later response is nearly the same.
    Shape,
}

impl ProbePlan<'_> {
    /// The key was refused in the client's own header. Tries the other headers, which change the result only by a success response.
    pub(super) fn take_refusal(&mut self, finding: Finding) {
        self.no_api = false;
        // The list refused it first; its finding has the first evidence.
        let is_same = |held: &HeldRefusal| held.because == HeldBecause::Status401 && finding.verdict == Verdict::Invalid;
        let finding = match self.held.take_if(|held| self.confirming.is_none() && is_same(held)) {
            Some(held) => held.finding,
            None => finding,
        };
        self.own_header = Some(OwnHeaderResult::Refused(finding));
        self.try_other_headers();
    }

    /// The key was refused in the same way as a made-up key.
    pub(super) fn take_refusal_like_made_up(&mut self, status: u16) {
        self.take_refusal(self.finding(Verdict::Invalid, Some(Cause::AsAMadeUpKey), Some(status)));
    }

    /// A made-up key gets the same code for "forbidden".
    pub(super) fn take_refusal_by_code(&mut self, answer: ReadAnswer, confirmed: bool) {
        match (confirmed, self.is_provisional()) {
            (true, _) => self.take_refusal_like_made_up(answer.shape.status),
            (false, true) => self.hold_refusal(&answer, HeldBecause::Code, Cause::AsAMadeUpKey),
            (false, false) => self.take_refusal_after_list_check(answer),
        }
    }

    /// A made-up key is refused in the same way, but every key may be by now. So a list that accepted every key before is asked once more.
    pub(super) fn take_refusal_after_list_check(&mut self, answer: ReadAnswer) {
        match self.open_list {
            Some((list, family)) if self.steps.get(self.current).is_some_and(PlanStep::is_inference) => {
                self.state = State::AtOpenList(answer, list, family);
            }
            _ => self.take_refusal_like_made_up(answer.shape.status),
        }
    }

    /// It is known how this request refuses made-up keys, and this 401 looks otherwise.
    pub(super) fn is_unusual_401(&self, answer: &ReadAnswer) -> bool {
        let Some(step) = self.steps.get(self.current).filter(|step| !step.call.probe.refuses_bad_keys) else { return false };
        answer.shape.status == 401
            && !step.usual_refusals.is_empty()
            && !step.usual_refusals.iter().any(|usual| usual.is_like(&answer.shape))
    }

    /// Holds the refusal back until a request that calls a model is answered, and goes on to the next step.
    pub(super) fn hold_refusal(&mut self, answer: &ReadAnswer, because: HeldBecause, cause: Cause) {
        let finding = self.finding(Verdict::Invalid, Some(cause), Some(answer.shape.status));
        self.no_api = false;
        self.held = Some(HeldRefusal { finding, shape: answer.shape.clone(), step: self.current, because });
        // After a list's 401, the steps that call a model send all headers in one request.
        if because == HeldBecause::Status401 {
            for step in self.steps.iter_mut().filter(|step| step.is_inference()) {
                step.order = vec![step.order.concat()];
            }
        }
        self.next_step();
    }

    /// The held refusal counts. Goes back to its step to try the other headers there.
    pub(super) fn apply_held_refusal(&mut self, held: HeldRefusal) {
        (self.current, self.header_group) = (held.step, 0);
        self.take_refusal(held.finding);
    }

    /// The held refusal and this response are the same. A "no such path" without a JSON body does not count: it may be about the path.
    pub(super) fn repeats_what_is_held(&self, answer: &ReadAnswer) -> bool {
        let may_be_about_the_path = answer.reading.cause == Cause::NotFound && answer.shape.body != Body::Json;
        !may_be_about_the_path && self.held.as_ref().is_some_and(|held| held.shape.matches_across_requests(&answer.shape))
    }

    /// No key was ever seen accepted at this list. It may want another kind of login than a key.
    pub(super) fn may_refuse_every_key(&self) -> bool {
        self.is_provisional() && self.steps.get(self.current).is_some_and(|step| !step.has_accepted)
    }
}
