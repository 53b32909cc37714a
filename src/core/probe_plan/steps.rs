//! The steps of a plan: which requests are sent, in which order, and when the next one comes.

use super::{OwnHeaderResult, ProbePlan, Requests, State};
use crate::{
    core::{
        classify::Finding,
        endpoint::{Call, Preference},
        endpoint_facts::EndpointFacts,
        made_up_key::KeyForm,
        response_shape::ResponseShape,
    },
    domain::{protocol::HeaderFamily, verdict::MadeUpKey},
};

/// One request of the plan.
#[derive(Debug)]
pub(super) struct PlanStep<'t> {
    pub(super) call: &'t Call,
    /// The headers in the order of [`EndpointFacts::order`].
    pub(super) order: Vec<Vec<HeaderFamily>>,
    /// A real key was accepted by this request.
    pub(super) has_accepted: bool,
    /// How this request is known to refuse made-up keys in its first header.
    pub(super) usual_refusals: Vec<ResponseShape>,
}

impl PlanStep<'_> {
    /// This request calls a model.
    pub(super) fn is_inference(&self) -> bool {
        self.call.probe.surface.is_inference()
    }

    /// The header that is sent first.
    pub(super) fn first_header(&self) -> Option<HeaderFamily> {
        self.order.first().and_then(|headers| headers.first()).copied()
    }
}

/// The steps of a plan in their order, and a list that accepts every key although a real key was accepted there.
pub(super) fn choose_steps<'t>(
    calls: &'t [Call],
    preference: Preference,
    facts: &EndpointFacts,
    key_form: Option<KeyForm>,
    requests: Requests<'_>,
) -> (Vec<PlanStep<'t>>, Option<(&'t Call, HeaderFamily)>) {
    let wanted = preference.surface.filter(|wanted| calls.iter().any(|call| call.probe.surface == *wanted));
    let mut steps: Vec<PlanStep<'t>> = calls
        .iter()
        // Of the surfaces that call a model, keep the one that the runtime uses.
        .filter(|call| wanted.is_none_or(|wanted| !call.probe.surface.is_inference() || call.probe.surface == wanted))
        .map(|call| {
            let is_known = |family| key_form.is_some_and(|form| (requests.refusals)(call, family).forms.contains(&form));
            let order = facts.order(&call.probe.auth, preference.family, is_known);
            let first = order.first().and_then(|headers| headers.first());
            let usual_refusals = first.map(|first| (requests.refusals)(call, *first).usual).unwrap_or_default();
            let has_accepted = call.probe.auth.iter().any(|family| (requests.has_accepted)(call, *family));
            PlanStep { call, order, has_accepted, usual_refusals }
        })
        .collect();
    let useful = |step: &PlanStep<'_>| step.first_header().is_none_or(|first| !(requests.is_pointless)(step.call, first));
    let open_list = steps.iter().find(|step| step.has_accepted && !step.is_inference() && !useful(step));
    let open_list = open_list.and_then(|step| step.first_header().map(|first| (step.call, first)));
    if steps.iter().any(useful) {
        // A list that was never seen to accept a key may refuse every key. So keep a request that calls a model, even if it accepts every key.
        let is_trusted = steps.iter().any(|step| useful(step) && (step.has_accepted || step.call.probe.refuses_bad_keys));
        steps.retain(|step| useful(step) || !is_trusted && step.is_inference() && step.has_accepted);
    } else {
        // All requests accept every key or do not exist. Asking one of them tells as much as asking all.
        if steps.iter().any(|step| step.has_accepted) {
            steps.retain(|step| step.has_accepted);
        }
        steps.truncate(1);
    }
    (steps, open_list)
}

impl<'t> ProbePlan<'t> {
    /// Sends the client's own header alone, if it was sent together with others.
    pub(super) fn ask_own_header_alone(&mut self) -> bool {
        let families = self.families();
        let Some(step) = self.steps.get_mut(self.current).filter(|_| self.header_group == 0) else { return false };
        let [own, rest @ ..] = families.as_slice() else { return false };
        if rest.is_empty() {
            return false;
        }
        step.order = vec![vec![*own], rest.to_vec()];
        self.state = State::Ask;
        true
    }

    pub(super) fn try_other_headers(&mut self) {
        if !self.goes_on_to_next_headers() {
            self.finish_step();
        }
    }

    /// Goes on to the next headers of this step, if there are some.
    fn goes_on_to_next_headers(&mut self) -> bool {
        self.header_group += 1;
        let goes_on = !self.families().is_empty();
        if goes_on {
            self.state = State::Ask;
        }
        goes_on
    }

    /// Tries the next headers of this step. If there are none, ends the step with the result of its first header.
    pub(super) fn finish_step(&mut self) {
        if self.header_group > 0 && self.goes_on_to_next_headers() {
            return;
        }
        match self.own_header.take() {
            Some(OwnHeaderResult::Refused(finding)) => {
                self.state = State::Done(Finding { cost_money: self.cost_money, ..finding });
            }
            Some(OwnHeaderResult::Unread(finding)) => {
                self.keep_as_fallback(finding);
                self.next_step();
            }
            None => self.next_step(),
        }
    }

    pub(super) fn next_step(&mut self) {
        self.current += 1;
        self.header_group = 0;
        self.own_header = None;
        self.made_up = MadeUpKey::NotAsked;
        self.state = State::Ask;
    }

    /// The steps that are still to come.
    pub(super) fn later(&self) -> impl Iterator<Item = &PlanStep<'t>> {
        self.steps.iter().skip(self.current + 1)
    }

    /// The catalogue does not say that this list refuses bad keys, and a later step calls a model. So a refusal here is not final.
    pub(super) fn is_provisional(&self) -> bool {
        let Some(step) = self.steps.get(self.current) else { return false };
        !step.call.probe.refuses_bad_keys && !step.is_inference() && self.later().any(PlanStep::is_inference)
    }

    /// This step calls a model, and no later step does.
    pub(super) fn is_last_inference(&self) -> bool {
        self.steps.get(self.current).is_some_and(PlanStep::is_inference) && !self.later().any(PlanStep::is_inference)
    }

    pub(super) fn families(&self) -> Vec<HeaderFamily> {
        self.steps.get(self.current).and_then(|step| step.order.get(self.header_group)).cloned().unwrap_or_default()
    }
}
