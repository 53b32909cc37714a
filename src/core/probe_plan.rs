//! Decides which request a probe sends next, and which verdict follows from the answers. Pure, so that tests can take every path without a network.
//!
//! A plan has one step per request, and requests that cost nothing come first. Each step first sends the credential in the header that the
//! workspace's client uses, and after a refusal in the other headers together.
//! A success response counts at once if the catalogue says that the endpoint refuses bad keys. Elsewhere it counts if a made-up key is refused
//! right after it. That refusal must carry a code that is about keys; with any other refusal, the real key must be accepted once more afterwards.
//! A response that says in words that the key is refused counts at once. Any other response counts as a refusal if a made-up key gets the same
//! one. Once refused in the client's own header, a key stays refused unless another header gets a success response.
//! A list of models may refuse every key, good or bad, or fail for every caller. So its refusal is held back until the request that calls a model is
//! answered, unless a key was seen accepted at this list.

use std::time::Duration;

use crate::{
    core::{
        classify::{Body, Calibration, Classification, Finding, ProbeResponse, ReadBy, Reading},
        endpoint::{Call, Preference},
        endpoint_facts::EndpointFacts,
        response_shape::ResponseShape,
    },
    domain::{
        protocol::HeaderFamily,
        verdict::{Cause, MadeUpKey, Verdict, Withheld},
    },
};

/// The next thing that the caller of the plan has to do.
#[derive(Debug)]
pub enum Next<'t> {
    /// Send this request with the credential.
    Ask {
        /// The request.
        call: &'t Call,
        /// The headers that carry the credential.
        families: Vec<HeaderFamily>,
        /// The key was accepted here, and then a made-up key was refused: check whether the key is still accepted.
        is_second: bool,
    },
    /// Find out how this request answers a made-up key.
    Calibrate {
        /// The request.
        call: &'t Call,
        /// The headers that carry the made-up key.
        families: Vec<HeaderFamily>,
        /// What the answer is needed for.
        purpose: Purpose,
    },
    /// Find out how this request answers without any key.
    Keyless {
        /// The request.
        call: &'t Call,
        /// A remembered answer is too old: send the request now.
        now: bool,
    },
    /// The probe has ended with this finding.
    Done(Finding),
}

/// What the answer to a made-up key is needed for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// To decide whether a success response counts.
    Acceptance {
        /// The made-up key must have the form of the credential.
        of_its_form: bool,
    },
    /// To decide whether a response is a refusal.
    Refusal,
    /// To check that the catalogue is still right. What is known already is enough.
    Check,
}

/// What is known about a request with the credential in a given header.
#[derive(Clone, Copy)]
pub struct Requests<'f> {
    /// The response proves nothing: every key is accepted, or the path does not exist.
    pub is_pointless: &'f dyn Fn(&Call, HeaderFamily) -> bool,
    /// A real key was accepted.
    pub has_accepted: &'f dyn Fn(&Call, HeaderFamily) -> bool,
}

impl Requests<'_> {
    /// For when nothing is known.
    pub const UNKNOWN: Requests<'static> = Requests { is_pointless: &|_, _| false, has_accepted: &|_, _| false };
}

/// How the workspace's own client uses the credential.
#[derive(Debug, Clone, Copy, Default)]
pub struct Client {
    /// What is known about this workspace's client.
    pub preference: Preference,
    /// The header that clients of this API use by default. Set where the catalogue has no row for the host.
    pub usual_header: Option<HeaderFamily>,
}

/// Something that the probe has learnt about the endpoint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Lesson {
    /// A key was accepted in one header and refused in others.
    Family {
        /// The header in which it was accepted.
        right: HeaderFamily,
        /// The headers in which it was refused.
        wrong: Vec<HeaderFamily>,
    },
    /// A good key gets "no such path" from this request, or what every key gets.
    Absent([u8; 32]),
    /// Every key gets this response from this request in these headers.
    SameForEveryKey([u8; 32], Vec<HeaderFamily>, ResponseShape),
}

/// The state of one probe.
#[derive(Debug)]
pub struct ProbePlan<'t> {
    steps: Vec<PlanStep<'t>>,
    /// The header of the workspace's own client, if known.
    client: Option<HeaderFamily>,
    /// The position of the current step.
    current: usize,
    /// The position in the step's `order`: the headers that are being tried.
    header_group: usize,
    state: State<'t>,
    /// The result of this step's first header.
    first_header: Option<FirstHeader>,
    made_up: MadeUpKey,
    /// The most informative result so far that is not conclusive.
    fallback: Option<Finding>,
    /// A list accepted the key in another header than the client's own, and a request that calls a model has to confirm it. These headers were
    /// refused.
    confirming: Option<Vec<HeaderFamily>>,
    /// A refusal by a list that may refuse every key. It waits for the answer to the request that calls a model.
    held: Option<HeldRefusal>,
    /// A list that accepts every key, now or in the past.
    open_list: Option<(&'t Call, HeaderFamily)>,
    /// Responses that every key gets.
    same_for_every_key: Vec<ResponseShape>,
    /// The 403 of an earlier step where a made-up key gets a 401.
    restricted: Option<ResponseShape>,
    /// Requests that tell nothing about a good key: "no such path", or a list that refused one.
    absent: Vec<[u8; 32]>,
    /// All steps so far got only "no such path" or a page for people.
    no_api: bool,
    /// A made-up key, or a request without a key, got the same response.
    seen_for_every_key: bool,
    named_model: bool,
    cost_money: bool,
    lessons: Vec<Lesson>,
}

/// One request of the plan.
#[derive(Debug)]
struct PlanStep<'t> {
    call: &'t Call,
    /// The headers in the order of [`EndpointFacts::order`].
    order: Vec<Vec<HeaderFamily>>,
    /// A real key was accepted by this request.
    has_accepted: bool,
}

/// What the current step waits for.
#[derive(Debug)]
enum State<'t> {
    /// Send the request.
    Ask,
    /// Find out how a made-up key is answered.
    Calibrate(ReadAnswer),
    /// The response is that of a made-up key: check whether a request without any key gets another one.
    Keyless(ReadAnswer),
    /// The key seems restricted: check whether a request without any key gets the same response by now.
    KeylessNow(ReadAnswer),
    /// The key was accepted, and the refusal of a made-up key may be a limit or a ban: send the real key again.
    AskAgain(ReadAnswer),
    /// The refusal is what a made-up key gets: check whether an open list gives the same response by now.
    AtOpenList(ReadAnswer, &'t Call, HeaderFamily),
    /// A request with several headers was accepted: send each header alone to find the right one.
    Identify(Vec<HeaderFamily>, ReadAnswer),
    Done(Finding),
}

/// A response whose meaning depends on the answer to a made-up key.
#[derive(Debug, Clone)]
struct ReadAnswer {
    reading: Reading,
    shape: ResponseShape,
    retry_after: Option<Duration>,
}

/// The result of the client's own header.
#[derive(Debug)]
enum FirstHeader {
    /// The key was refused.
    Refused(Finding),
    /// The response had no meaning.
    Unread(Finding),
}

/// A refusal that counts only if the request that calls a model does not contradict it.
#[derive(Debug, Clone)]
struct HeldRefusal {
    finding: Finding,
    shape: ResponseShape,
    /// The step that was refused.
    step: usize,
    because: HeldBecause,
}

/// Why a refusal is held back. The kind decides what can contradict it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum HeldBecause {
    /// A 401 that says in words that the key is refused, or that a made-up key gets too. It counts unless the key is accepted later.
    Status401,
    /// A code for "forbidden" that a made-up key gets too. It counts unless a later answer is clear.
    Code,
    /// Only the shape of the response. It counts only if a later response is nearly the same.
    Shape,
}

impl PlanStep<'_> {
    /// This request calls a model.
    fn is_inference(&self) -> bool {
        self.call.probe.surface.is_inference()
    }

    /// The header that is sent first.
    fn first_header(&self) -> Option<HeaderFamily> {
        self.order.first().and_then(|headers| headers.first()).copied()
    }
}

impl<'t> ProbePlan<'t> {
    /// A plan for these requests, at its first step.
    pub fn new(calls: &'t [Call], client: Client, facts: &EndpointFacts, requests: Requests<'_>) -> Self {
        let Client { preference, usual_header } = client;
        let wanted = preference.surface.filter(|wanted| calls.iter().any(|call| call.probe.surface == *wanted));
        let mut steps: Vec<PlanStep<'t>> = calls
            .iter()
            // Of the surfaces that call a model, keep the one that the runtime uses.
            .filter(|call| wanted.is_none_or(|wanted| !call.probe.surface.is_inference() || call.probe.surface == wanted))
            .map(|call| PlanStep {
                call,
                order: facts.order(&call.probe.auth, preference.family),
                has_accepted: call.probe.auth.iter().any(|family| (requests.has_accepted)(call, *family)),
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
        Self {
            steps,
            client: preference.family.or(usual_header),
            current: 0,
            header_group: 0,
            state: State::Ask,
            first_header: None,
            made_up: MadeUpKey::NotAsked,
            fallback: None,
            confirming: None,
            held: None,
            open_list,
            same_for_every_key: Vec::new(),
            restricted: None,
            absent: Vec::new(),
            // An API that accepted a key exists.
            no_api: !facts.has_accepted(),
            seen_for_every_key: false,
            named_model: false,
            cost_money: false,
            lessons: Vec::new(),
        }
    }

    /// The next thing to do. Call it again after each `take_*`.
    pub fn proceed(&mut self) -> Next<'t> {
        let Some(PlanStep { call, order, .. }) = self.steps.get(self.current) else {
            self.conclude();
            return match &self.state {
                State::Done(finding) => Next::Done(finding.clone()),
                _ => self.proceed(),
            };
        };
        let families = order.get(self.header_group).cloned().unwrap_or_default();
        match &self.state {
            State::Ask => Next::Ask { call, families, is_second: false },
            State::AskAgain(_) => Next::Ask { call, families, is_second: true },
            State::Calibrate(answer) => {
                let accepted = answer.reading.classification == Classification::Accepted;
                let purpose = match (accepted, call.probe.refuses_bad_keys) {
                    (true, true) => Purpose::Check,
                    (true, false) => Purpose::Acceptance { of_its_form: self.is_provisional() },
                    (false, _) => Purpose::Refusal,
                };
                Next::Calibrate { call, families, purpose }
            }
            State::Keyless(_) => Next::Keyless { call, now: false },
            State::KeylessNow(_) => Next::Keyless { call, now: true },
            State::AtOpenList(_, list, family) => Next::Ask { call: list, families: vec![*family], is_second: false },
            State::Identify(families, _) => {
                Next::Ask { call, families: families.iter().copied().take(1).collect(), is_second: false }
            }
            State::Done(finding) => Next::Done(finding.clone()),
        }
    }

    /// What the probe has learnt about the endpoint.
    pub fn into_lessons(self) -> Vec<Lesson> {
        self.lessons
    }

    /// Takes the result of a [`Next::Ask`].
    pub fn take_response(&mut self, response: ProbeResponse) {
        let Some(PlanStep { call, .. }) = self.steps.get(self.current) else { return };
        self.named_model |= call.names_model;
        self.cost_money |= call.probe.costs_money;
        let (reading, shape, retry_after) = match response {
            ProbeResponse::Answer { reading, shape, retry_after } => (reading, shape, retry_after),
            ProbeResponse::TimedOut => return self.take_no_answer(self.finding(Verdict::Timeout, None, None)),
            ProbeResponse::Unreachable(why) => {
                let finding = Finding { unreached: Some(why), ..self.finding(Verdict::Unreachable, None, None) };
                return self.take_no_answer(finding);
            }
            ProbeResponse::Exhausted => {
                let finding = Finding { withheld: Some(Withheld::Fault), ..self.finding(Verdict::NotAttempted, None, None) };
                return self.take_no_answer(finding);
            }
        };
        let answer = ReadAnswer { reading, shape, retry_after };
        if let State::Identify(families, first) = &mut self.state {
            let (asked, first) = (families.remove(0), first.clone());
            let accepted = answer.reading.classification == Classification::Accepted;
            return match (accepted, families.is_empty()) {
                (true, _) => self.accept(asked, &first),
                // Accepted with all headers together, and with none alone: no client sends such a request.
                (false, true) => {
                    self.state = State::Ask;
                    self.finish_step();
                }
                (false, false) => {}
            };
        }
        match std::mem::replace(&mut self.state, State::Ask) {
            State::AskAgain(first) if answer.reading.classification == Classification::Accepted => self.accept_response(first),
            State::AskAgain(first) => self.take_second_refusal(&first),
            State::AtOpenList(first, ..) if answer.shape.is_like(&first.shape) => self.take_same_for_every_key(&first),
            State::AtOpenList(first, ..) => self.take_refusal_like_made_up(first.shape.status),
            _ if self.header_group > 0 => self.take_in_another_header(answer),
            _ => self.take_in_own_header(answer),
        }
    }

    /// Takes the result of a [`Next::Calibrate`].
    pub fn take_calibration(&mut self, calibration: &Calibration) {
        self.made_up = outcome_of(calibration);
        let State::Calibrate(answer) = std::mem::replace(&mut self.state, State::Ask) else { return };
        let Some(call) = self.steps.get(self.current).map(|step| step.call) else { return };
        let status = answer.shape.status;
        if let Calibration::SameForEveryKey(shape) = calibration {
            self.same_for_every_key.push(shape.clone());
        }
        match (&answer.reading.classification, calibration) {
            (Classification::Accepted, _) => match acceptance_proof(call.probe.refuses_bad_keys, calibration) {
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
            },
            (_, Calibration::SameForEveryKey(shape)) if shape.is_like(&answer.shape) => self.take_same_for_every_key(&answer),
            // Status and code are the same; the words do not matter.
            (Classification::Forbidden(code), Calibration::Refuses { shape, confirmed, .. })
                if shape.status == 403 && shape.code == *code && (!code.is_empty() || shape.is_like(&answer.shape)) =>
            {
                match &self.restricted {
                    _ if *confirmed => self.take_refusal_like_made_up(status),
                    // At the earlier step the key got this 403 and a made-up key a 401, so the key is not dead. Now both get the 403.
                    Some(earlier) if earlier.is_like(&answer.shape) => self.take_same_for_every_key(&answer),
                    Some(_) => self.take_refusal(self.finding(Verdict::Forbidden, Some(answer.reading.cause), Some(status))),
                    None => self.take_refusal_by_code(answer, false),
                }
            }
            (Classification::Forbidden(_), Calibration::Refuses { shape, in_words, .. }) if *in_words || shape.status == 401 => {
                self.restricted = Some(answer.shape.clone());
                if self.is_last_inference() { self.state = State::KeylessNow(answer) } else { self.take_restricted(status) }
            }
            (Classification::Forbidden(_), _) => {
                self.take_refusal(self.finding(Verdict::Forbidden, Some(answer.reading.cause), Some(status)))
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
            (Classification::Unread | Classification::Verdict(_), _) => self.take_unread(&answer),
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
        match is_alike {
            Some(true) => self.seen_for_every_key = true,
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

    // --- responses ---

    /// Takes a response to the client's own header, which was sent first.
    fn take_in_own_header(&mut self, answer: ReadAnswer) {
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
        if !is_accepted && self.same_for_every_key.iter().any(|shape| shape.is_like(&answer.shape)) {
            return self.take_same_for_every_key(&answer);
        }
        match classification {
            // Two kinds of request got this refusal, and a made-up key got it from the first of them: it is about the key.
            Classification::Unread if self.repeats_what_is_held(&answer) => self.take_refusal_like_made_up(answer.shape.status),
            Classification::Accepted | Classification::Forbidden(_) | Classification::Unread => {
                self.state = State::Calibrate(answer)
            }
            Classification::Restricted if *by == ReadBy::CommonCode => self.state = State::Calibrate(answer),
            // Only the status says so. Every unknown key may get it.
            Classification::Verdict(Verdict::QuotaExhausted) if *by == ReadBy::Shape => self.state = State::Calibrate(answer),
            Classification::Restricted => self.take_restricted(answer.shape.status),
            // This list may refuse every key with this response.
            Classification::Verdict(Verdict::Invalid)
                if answer.shape.status == 401 && !matches!(by, ReadBy::Signal(_)) && self.may_refuse_every_key() =>
            {
                self.hold_refusal(&answer, HeldBecause::Status401, *cause);
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
    fn take_in_another_header(&mut self, answer: ReadAnswer) {
        // The number of headers may be what was refused: send each of them alone.
        let families = self.families();
        let own = match &self.first_header {
            Some(FirstHeader::Refused(own) | FirstHeader::Unread(own)) => own.status,
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
        match (&answer.reading.classification, &self.first_header) {
            (Classification::Accepted, _) => self.state = State::Calibrate(answer),
            // The client's own header got a 401, which is about credentials, so a clear refusal in another header counts. A 400 may be about
            // anything, and a 401 elsewhere then need not be about the key.
            (Classification::Verdict(verdict @ (Verdict::Invalid | Verdict::QuotaExhausted)), Some(FirstHeader::Unread(own)))
                if matches!(own.status, Some(401 | 407)) =>
            {
                self.state = State::Done(self.finding(*verdict, Some(answer.reading.cause), Some(answer.shape.status)));
            }
            _ => self.finish_step(),
        }
    }

    /// No response came. Earlier responses keep their weight.
    fn take_no_answer(&mut self, finding: Finding) {
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

    /// Ends the probe with this finding. If it says nothing about the key and an earlier refusal is held, the refusal counts instead.
    fn finish_unless_refused(&mut self, finding: Finding) {
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

    /// The held refusal counts. Goes back to its step to try the other headers there.
    fn apply_held_refusal(&mut self, held: HeldRefusal) {
        (self.current, self.header_group) = (held.step, 0);
        self.take_refusal(held.finding);
    }

    /// This success response counts.
    fn accept_response(&mut self, answer: ReadAnswer) {
        match self.families().as_slice() {
            [one] => self.accept(*one, &answer),
            several => self.state = State::Identify(several.to_vec(), answer),
        }
    }

    /// The key was not accepted again right afterwards. So the refusal of the made-up key may have been a limit.
    fn take_second_refusal(&mut self, answer: &ReadAnswer) {
        if self.header_group > 0 {
            return self.finish_step();
        }
        let finding = self.finding(Verdict::NotCalibrated, Some(Cause::MadeUpKeyUntold), Some(answer.shape.status));
        self.finish_unless_refused(finding);
    }

    /// Every key gets this response by now. It says nothing about this key, and no further header is tried.
    fn take_same_for_every_key(&mut self, answer: &ReadAnswer) {
        self.seen_for_every_key = true;
        self.no_api = false;
        self.same_for_every_key.push(answer.shape.clone());
        if let Some(step) = self.steps.get(self.current) {
            self.lessons.push(Lesson::SameForEveryKey(step.call.request, self.families(), answer.shape.clone()));
        }
        // An earlier restriction was not about this key either.
        self.fallback.take_if(|earlier| earlier.cause == Some(Cause::Restricted));
        self.keep_as_fallback(self.finding(Verdict::UnexpectedResponse, Some(Cause::RequestRefused), Some(answer.shape.status)));
        self.finish_step();
    }

    /// Ends the probe with VALID, unless a request that calls a model has to confirm it first.
    fn accept(&mut self, family: HeaderFamily, answer: &ReadAnswer) {
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
        if let Some(FirstHeader::Refused(refused)) = &self.first_header
            && self.header_group > 0
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

    /// The key is alive but may not use this endpoint. If this was the last request that calls a model, the key is of no use.
    fn take_restricted(&mut self, status: u16) {
        self.no_api = false;
        if self.is_last_inference() {
            self.finish_unless_refused(self.finding(Verdict::Forbidden, Some(Cause::Restricted), Some(status)));
        } else {
            self.keep_as_fallback(self.finding(Verdict::UnexpectedResponse, Some(Cause::Restricted), Some(status)));
            self.next_step();
        }
    }

    /// This step calls a model, and no later step does.
    fn is_last_inference(&self) -> bool {
        self.steps.get(self.current).is_some_and(PlanStep::is_inference) && !self.later().any(PlanStep::is_inference)
    }

    /// The key was refused in the same way as a made-up key.
    fn take_refusal_like_made_up(&mut self, status: u16) {
        self.take_refusal(self.finding(Verdict::Invalid, Some(Cause::AsAMadeUpKey), Some(status)));
    }

    /// The key was refused in the client's own header. Tries the other headers, which change the result only by a success response.
    fn take_refusal(&mut self, finding: Finding) {
        self.no_api = false;
        // The list refused it first; its finding has the first evidence.
        let is_same = |held: &HeldRefusal| held.because == HeldBecause::Status401 && finding.verdict == Verdict::Invalid;
        let finding = match self.held.take_if(|held| self.confirming.is_none() && is_same(held)) {
            Some(held) => held.finding,
            None => finding,
        };
        self.first_header = Some(FirstHeader::Refused(finding));
        self.try_other_headers();
    }

    /// A made-up key gets the same code for "forbidden".
    fn take_refusal_by_code(&mut self, answer: ReadAnswer, confirmed: bool) {
        match (confirmed, self.is_provisional()) {
            (true, _) => self.take_refusal_like_made_up(answer.shape.status),
            (false, true) => self.hold_refusal(&answer, HeldBecause::Code, Cause::AsAMadeUpKey),
            (false, false) => self.take_refusal_after_list_check(answer),
        }
    }

    /// A made-up key is refused in the same way, but every key may be by now. So a list that accepted every key before is asked once more.
    fn take_refusal_after_list_check(&mut self, answer: ReadAnswer) {
        match self.open_list {
            Some((list, family)) if self.steps.get(self.current).is_some_and(PlanStep::is_inference) => {
                self.state = State::AtOpenList(answer, list, family);
            }
            _ => self.take_refusal_like_made_up(answer.shape.status),
        }
    }

    /// The catalogue does not say that this list refuses bad keys, and a later step calls a model. So a refusal here is not final.
    fn is_provisional(&self) -> bool {
        let Some(step) = self.steps.get(self.current) else { return false };
        !step.call.probe.refuses_bad_keys && !step.is_inference() && self.later().any(PlanStep::is_inference)
    }

    /// The steps that are still to come.
    fn later(&self) -> impl Iterator<Item = &PlanStep<'t>> {
        self.steps.iter().skip(self.current + 1)
    }

    /// No key was ever seen accepted at this list. It may want another kind of login than a key.
    fn may_refuse_every_key(&self) -> bool {
        self.is_provisional() && self.steps.get(self.current).is_some_and(|step| !step.has_accepted)
    }

    /// Holds the refusal back until a request that calls a model is answered, and goes on to the next step.
    fn hold_refusal(&mut self, answer: &ReadAnswer, because: HeldBecause, cause: Cause) {
        let finding = self.finding(Verdict::Invalid, Some(cause), Some(answer.shape.status));
        self.no_api = false;
        self.keep_as_fallback(Finding { verdict: Verdict::UnexpectedResponse, ..finding.clone() });
        self.held = Some(HeldRefusal { finding, shape: answer.shape.clone(), step: self.current, because });
        // After a 401, later steps send all headers in one request.
        if because == HeldBecause::Status401 {
            for step in self.steps.iter_mut().skip(self.current + 1).filter(|step| step.is_inference()) {
                step.order = vec![step.order.concat()];
            }
        }
        self.next_step();
    }

    /// The held refusal and this response are the same. A "no such path" without a JSON body does not count: it may be about the path.
    fn repeats_what_is_held(&self, answer: &ReadAnswer) -> bool {
        let may_be_about_the_path = answer.reading.cause == Cause::NotFound && answer.shape.body != Body::Json;
        !may_be_about_the_path && self.held.as_ref().is_some_and(|held| held.shape.matches_across_requests(&answer.shape))
    }

    /// The response has no meaning, or none that counts yet.
    fn take_unread(&mut self, answer: &ReadAnswer) {
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
        self.first_header = Some(FirstHeader::Unread(self.finding(Verdict::UnexpectedResponse, Some(cause), Some(status))));
        // A 4xx may be a refusal because the key is missing in the right header.
        if matches!(status, 400..=499) && !nothing_there { self.try_other_headers() } else { self.finish_step() }
    }

    /// Sends the client's own header alone, if it was sent together with others.
    fn ask_own_header_alone(&mut self) -> bool {
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

    fn try_other_headers(&mut self) {
        self.header_group += 1;
        self.state = State::Ask;
        if self.families().is_empty() {
            self.finish_step();
        }
    }

    /// Tries the next headers of this step. If there are none, ends the step with the result of its first header.
    fn finish_step(&mut self) {
        if self.header_group > 0 && self.steps.get(self.current).is_some_and(|step| self.header_group + 1 < step.order.len()) {
            return self.try_other_headers();
        }
        match self.first_header.take() {
            Some(FirstHeader::Refused(finding)) => {
                self.state = State::Done(Finding { cost_money: self.cost_money, ..finding });
            }
            Some(FirstHeader::Unread(finding)) => {
                self.keep_as_fallback(finding);
                self.next_step();
            }
            None => self.next_step(),
        }
    }

    fn next_step(&mut self) {
        self.current += 1;
        self.header_group = 0;
        self.first_header = None;
        self.made_up = MadeUpKey::NotAsked;
        self.state = State::Ask;
    }

    /// Ends the probe: no step is left.
    fn conclude(&mut self) {
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
    fn keep_as_fallback(&mut self, finding: Finding) {
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

    fn families(&self) -> Vec<HeaderFamily> {
        self.steps.get(self.current).and_then(|step| step.order.get(self.header_group)).cloned().unwrap_or_default()
    }

    fn finding(&self, verdict: Verdict, cause: Option<Cause>, status: Option<u16>) -> Finding {
        Finding {
            cause,
            status,
            probe: self.steps.get(self.current).map(|step| step.call.probe.name.clone()).unwrap_or_default(),
            family: self.families().first().copied(),
            made_up: self.made_up,
            about_model: self.named_model,
            cost_money: self.cost_money,
            ..Finding::bare(verdict)
        }
    }
}

/// Whether a success response proves that the key is good.
enum AcceptanceProof {
    Proven,
    /// The refusal of the made-up key may have been a limit on calls.
    NeedsSecondAcceptance,
    Unproven,
}

/// A success response is proof if the endpoint was seen to refuse a made-up key, or is documented to and was not seen to accept one.
fn acceptance_proof(documented: bool, calibration: &Calibration) -> AcceptanceProof {
    match calibration {
        Calibration::AcceptsAnyone => AcceptanceProof::Unproven,
        _ if documented => AcceptanceProof::Proven,
        Calibration::Refuses { by_code, confirmed, .. } if *by_code || *confirmed => AcceptanceProof::Proven,
        Calibration::Refuses { .. } => AcceptanceProof::NeedsSecondAcceptance,
        Calibration::Inconclusive(_) | Calibration::SameForEveryKey(_) | Calibration::NotWaitedFor | Calibration::NotAsked => {
            AcceptanceProof::Unproven
        }
    }
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
