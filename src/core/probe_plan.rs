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

mod acceptance;
mod ending;
mod made_up_answers;
mod refusals;
mod responses;
mod steps;

use std::time::Duration;

pub use self::made_up_answers::outcome_of;
use self::{
    refusals::HeldRefusal,
    steps::{PlanStep, choose_steps},
};
use crate::{
    core::{
        classify::{Classification, Finding, ProbeResponse, Reading},
        endpoint::{Call, Preference},
        endpoint_facts::{CalibrationQuestion, EndpointFacts, KnownRefusals},
        made_up_key::KeyForm,
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
        question: CalibrationQuestion,
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

/// What is known about a request with the credential in a given header.
#[derive(Clone, Copy)]
pub struct Requests<'f> {
    /// The response proves nothing: every key is accepted, or the path does not exist.
    pub is_pointless: &'f dyn Fn(&Call, HeaderFamily) -> bool,
    /// A real key was accepted.
    pub has_accepted: &'f dyn Fn(&Call, HeaderFamily) -> bool,
    /// How keys are refused.
    pub refusals: &'f dyn Fn(&Call, HeaderFamily) -> KnownRefusals,
}

impl Requests<'_> {
    /// For when nothing is known.
    pub const UNKNOWN: Requests<'static> = Requests {
        is_pointless: &|_, _| false,
        has_accepted: &|_, _| false,
        refusals: &|_, _| KnownRefusals { usual: Vec::new(), for_every_key: None, forms: Vec::new() },
    };
}

/// The credential's form, and how the workspace's own client uses it.
#[derive(Debug, Clone, Copy, Default)]
pub struct Client {
    /// What is known about this workspace's client.
    pub preference: Preference,
    /// The header that clients of this API use by default. Set where the catalogue has no row for the host.
    pub usual_header: Option<HeaderFamily>,
    /// The form of the credential. `None` if a made-up key cannot have it.
    pub key_form: Option<KeyForm>,
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
    /// The form of the credential, if a made-up key can have it.
    key_form: Option<KeyForm>,
    /// The position of the current step.
    current: usize,
    /// The position in the step's `order`: the headers that are being tried.
    header_group: usize,
    state: State<'t>,
    /// The result of the client's own header at this step, while the others are tried.
    own_header: Option<OwnHeaderResult>,
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
    /// Responses that every key gets, and the step at which.
    same_for_every_key: Vec<(usize, ResponseShape)>,
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

/// What the current step waits for.
#[derive(Debug)]
enum State<'t> {
    /// Send the request.
    Ask,
    /// Find out how a made-up key is answered.
    Calibrate(ReadAnswer),
    /// The response is that of a made-up key: check whether a request without any key gets another one.
    Keyless(ReadAnswer),
    /// The key seems restricted where a model is called: check whether a made-up key gets the same response by now.
    MadeUpNow(ReadAnswer),
    /// The same, without any key.
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

/// What the client's own header got, while the other headers are tried.
#[derive(Debug)]
enum OwnHeaderResult {
    /// The key was refused.
    Refused(Finding),
    /// The response had no meaning.
    Unread(Finding),
}

impl<'t> ProbePlan<'t> {
    /// A plan for these requests, at its first step.
    pub fn new(calls: &'t [Call], client: Client, facts: &EndpointFacts, requests: Requests<'_>) -> Self {
        let Client { preference, usual_header, key_form } = client;
        let (steps, open_list) = choose_steps(calls, preference, facts, key_form, requests);
        let for_every_key = |step: &PlanStep<'_>| (requests.refusals)(step.call, step.first_header()?).for_every_key;
        let same_for_every_key =
            steps.iter().enumerate().filter_map(|(index, step)| Some((index, for_every_key(step)?))).collect();
        Self {
            steps,
            client: preference.family.or(usual_header),
            key_form,
            current: 0,
            header_group: 0,
            state: State::Ask,
            own_header: None,
            made_up: MadeUpKey::NotAsked,
            fallback: None,
            confirming: None,
            held: None,
            open_list,
            same_for_every_key,
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
                let question = match (&answer.reading.classification, call.probe.refuses_bad_keys) {
                    (Classification::Accepted, true) => CalibrationQuestion::Check,
                    (Classification::Verdict(Verdict::Invalid), _) => CalibrationQuestion::RefusalNow,
                    (Classification::Unread, _) if self.is_unusual_401(answer) => CalibrationQuestion::RefusalNow,
                    (Classification::Accepted, false) => {
                        CalibrationQuestion::Acceptance(self.key_form.filter(|_| self.is_provisional()))
                    }
                    _ => CalibrationQuestion::Refusal,
                };
                Next::Calibrate { call, families, question }
            }
            State::MadeUpNow(_) => Next::Calibrate { call, families, question: CalibrationQuestion::RefusalNow },
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
