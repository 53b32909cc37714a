//! Decides whether a success response counts, and ends the probe with VALID.

use super::{
    Lesson, OwnHeaderResult, ProbePlan, ReadAnswer, State,
    refusals::{HeldBecause, HeldRefusal},
    steps::PlanStep,
};
use crate::{
    core::classify::{Calibration, Finding},
    domain::{
        protocol::HeaderFamily,
        verdict::{Cause, Verdict},
    },
};

/// Whether a success response proves that the key is good.
pub(super) enum AcceptanceProof {
    Proven,
    /// The refusal of the made-up key may have been a limit on calls.
    NeedsSecondAcceptance,
    Unproven,
}

/// A success response is proof if the endpoint was seen to refuse a made-up key, or is documented to and was not seen to accept one. A list that
/// refuses a made-up key for its form may check nothing else, such as a checksum in the key. Then the request that calls a model decides.
pub(super) fn acceptance_proof(documented: bool, is_provisional: bool, calibration: &Calibration) -> AcceptanceProof {
    match calibration {
        Calibration::AcceptsAnyone => AcceptanceProof::Unproven,
        Calibration::Refuses { shape, .. } if is_provisional && shape.is_about_the_form => AcceptanceProof::Unproven,
        _ if documented => AcceptanceProof::Proven,
        Calibration::Refuses { by_code, confirmed, .. } if *by_code || *confirmed => AcceptanceProof::Proven,
        Calibration::Refuses { .. } => AcceptanceProof::NeedsSecondAcceptance,
        Calibration::Inconclusive(_) | Calibration::SameForEveryKey(_) | Calibration::NotWaitedFor | Calibration::NotAsked => {
            AcceptanceProof::Unproven
        }
    }
}

impl ProbePlan<'_> {
    /// This success response counts.
    pub(super) fn accept_response(&mut self, answer: ReadAnswer) {
        match self.families().as_slice() {
            [one] => self.accept(*one, &answer),
            several => self.state = State::Identify(several.to_vec(), answer),
        }
    }

    /// Ends the probe with VALID, unless a request that calls a model has to confirm it first.
    pub(super) fn accept(&mut self, family: HeaderFamily, answer: &ReadAnswer) {
        let Some(PlanStep { call, order, .. }) = self.steps.get(self.current) else { return };
        let wrong = match &self.confirming {
            Some(wrong) => wrong.clone(),
            None => {
                // The client's own header was sent first, alone or with others, and was refused.
                let own = order.first().and_then(|headers| headers.first()).filter(|own| **own != family);
                own.into_iter().copied().collect()
            }
        };
        // A list may check only the form of a key. So an acceptance in another header than the client's own has to be confirmed by a request that
        // calls a model.
        let confirms = |step: &PlanStep<'_>| step.is_inference() && step.call.probe.auth.contains(&family);
        if let Some(OwnHeaderResult::Refused(refused)) = &self.own_header
            && self.is_provisional()
            && self.later().any(confirms)
        {
            self.held = Some(HeldRefusal {
                finding: refused.clone(),
                shape: answer.shape.clone(),
                step: self.current,
                because: HeldBecause::Status401,
            });
            self.confirming = Some(wrong);
            let later = self.steps.split_off(self.current + 1).into_iter().filter(confirms);
            self.steps.extend(later.map(|step| PlanStep { order: vec![vec![family]], ..step }));
            return self.next_step();
        }
        // Here the list refused a key that is good, so it refuses good keys in this header.
        if let Some(held) = self.held.as_ref().filter(|_| self.confirming.is_none())
            && let Some(list) = self.steps.get(held.step).filter(|list| list.first_header() == Some(family))
        {
            self.absent.push(list.call.request);
        }
        self.lessons.push(Lesson::Family { right: family, wrong });
        self.lessons.extend(self.absent.iter().copied().map(Lesson::Absent));
        // Where the request never takes the client's own header, acceptance in another one is no sign of a mistake.
        let wrong_header = self.client.is_some_and(|client| client != family && call.probe.auth.contains(&client));
        let finding = self.finding(Verdict::Valid, None, Some(answer.shape.status));
        self.state = State::Done(Finding { family: Some(family), wrong_header, ..finding });
    }

    /// The key was not accepted again right afterwards. So the refusal of the made-up key may have been a limit.
    pub(super) fn take_second_refusal(&mut self, answer: &ReadAnswer) {
        if self.header_group > 0 {
            return self.finish_step();
        }
        let finding = self.finding(Verdict::NotCalibrated, Some(Cause::MadeUpKeyUntold), Some(answer.shape.status));
        self.finish_unless_refused(finding);
    }
}
