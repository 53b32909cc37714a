//! Ends a probe: which of the earlier results counts if no response was conclusive.

use super::{ProbePlan, State, refusals::HeldBecause};
use crate::{
    core::classify::Finding,
    domain::verdict::{Cause, Verdict},
};

impl ProbePlan<'_> {
    /// Ends the probe with this finding. If it says nothing about the key and an earlier refusal is held, the refusal counts instead.
    pub(super) fn finish_unless_refused(&mut self, finding: Finding) {
        let is_inconclusive = matches!(
            finding.verdict,
            Verdict::RateLimited | Verdict::ProviderError | Verdict::UnexpectedResponse | Verdict::Timeout | Verdict::Unreachable
        );
        match self.held.take() {
            // The held refusal was in the client's own header. Only a success response in another header would overrule it.
            Some(held) if self.confirming.is_some() => {
                self.state = State::Done(Finding { cost_money: finding.cost_money, ..held.finding });
            }
            Some(held) if held.because != HeldBecause::Shape && is_inconclusive => self.apply_held_refusal(held),
            Some(_) | None => self.state = State::Done(finding),
        }
    }

    /// Ends the probe: no step is left.
    pub(super) fn conclude(&mut self) {
        let is_inconclusive = self.fallback.as_ref().is_none_or(|earlier| earlier.verdict == Verdict::UnexpectedResponse);
        let was_accepted = self.fallback.as_ref().is_some_and(|earlier| earlier.verdict == Verdict::NotCalibrated);
        match self.held.take() {
            Some(held) if self.confirming.is_some() => {
                self.state = State::Done(Finding { cost_money: self.cost_money, ..held.finding });
                return;
            }
            // A held 401 counts, unless a request that calls a model accepted the key without proof. Then nothing is certain.
            Some(held)
                if held.because == HeldBecause::Status401 && !was_accepted
                    || held.because == HeldBecause::Code && is_inconclusive =>
            {
                return self.apply_held_refusal(held);
            }
            Some(_) | None => {}
        }
        let finding = self.fallback.take().unwrap_or_else(|| Finding::bare(Verdict::UnexpectedResponse));
        let no_api = self.no_api && self.seen_for_every_key && finding.verdict == Verdict::UnexpectedResponse;
        let cause = if no_api { Some(Cause::NoApiAtBaseUrl) } else { finding.cause };
        self.state = State::Done(Finding { cause, about_model: self.named_model, cost_money: self.cost_money, ..finding });
    }

    /// Keeps the more informative of two results. From most to least informative: a failing endpoint, one that accepts every key, a restriction,
    /// anything else.
    pub(super) fn keep_as_fallback(&mut self, finding: Finding) {
        let rank = |finding: &Finding| match (finding.verdict, finding.cause) {
            (Verdict::ProviderError | Verdict::RateLimited, _) => 3,
            (Verdict::NotCalibrated, _) => 2,
            (_, Some(Cause::Restricted)) => 1,
            _ => 0,
        };
        if self.fallback.as_ref().is_none_or(|earlier| rank(&finding) >= rank(earlier)) {
            self.fallback = Some(finding);
        }
    }
}
