//! What to ask next about a credential, and what is known then: one pure plan, so that every path can be tested without a network.
//!
//! A target's calls are rungs, free ones first. Of each rung the client's own header is asked first, the others together after a refusal.
//! A "yes" counts where a made-up key is refused right after it: by a code that is about keys, or in whatever way if the real key is accepted once
//! more after that. A refusal in words counts at once; any other answer counts as a refusal if a made-up key gets the same one. What was refused in
//! the client's own header stays refused: only a "yes" in another one says otherwise.
//! A list of models may refuse every key, good or bad, or fail for everybody: what it says is held until the request that calls a model was answered,
//! unless a key was seen accepted at this list.

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

/// What to do next.
#[derive(Debug)]
pub enum Next<'t> {
    /// Ask this with the credential in these headers.
    Ask {
        /// What is asked.
        call: &'t Call,
        /// In which headers.
        families: Vec<HeaderFamily>,
        /// It was accepted there right before a made-up key was refused: is it still?
        is_second: bool,
    },
    /// Find out what a made-up key gets there.
    Calibrate {
        /// What is asked.
        call: &'t Call,
        /// In which headers.
        families: Vec<HeaderFamily>,
        /// What for.
        purpose: Purpose,
    },
    /// Find out what a request without any key gets there.
    Keyless {
        /// What is asked.
        call: &'t Call,
        /// What it got an hour ago does not do.
        now: bool,
    },
    /// Done.
    Done(Finding),
}

/// What a made-up key's answer is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// Whether a "yes" counts.
    Acceptance {
        /// Only what a made-up key of the credential's own form gets counts.
        of_its_form: bool,
    },
    /// Whether an answer is a refusal.
    Refusal,
    /// Whether the catalogue still holds: what is known already is enough.
    Check,
}

/// What is known of a request in a header.
#[derive(Clone, Copy)]
pub struct Requests<'f> {
    /// It tells nothing: anybody is accepted there, or it is not there at all.
    pub is_pointless: &'f dyn Fn(&Call, HeaderFamily) -> bool,
    /// A real key was accepted there.
    pub has_accepted: &'f dyn Fn(&Call, HeaderFamily) -> bool,
}

impl Requests<'_> {
    /// Nothing is known.
    pub const UNKNOWN: Requests<'static> = Requests { is_pointless: &|_, _| false, has_accepted: &|_, _| false };
}

/// How the workspace's own client uses the credential.
#[derive(Debug, Clone, Copy, Default)]
pub struct Client {
    /// As far as it is known of this workspace.
    pub preference: Preference,
    /// The header that clients of the API use by default, where nobody wrote a row for the host.
    pub usual_header: Option<HeaderFamily>,
}

/// What an endpoint taught on the way.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Lesson {
    /// A key was accepted in this header, and refused in those.
    Family {
        /// The header.
        right: HeaderFamily,
        /// The others.
        wrong: Vec<HeaderFamily>,
    },
    /// A good key gets nothing but "no such path" there, or what every key gets.
    Absent([u8; 32]),
    /// This came to everybody at that request in this header, or these.
    SameForEveryKey([u8; 32], Vec<HeaderFamily>, ResponseShape),
}

/// The walk through a target's calls.
#[derive(Debug)]
pub struct ProbePlan<'t> {
    rungs: Vec<Rung<'t>>,
    /// The header of the workspace's own client, where it is known.
    client: Option<HeaderFamily>,
    at: usize,
    group: usize,
    state: State<'t>,
    /// What the first header of this rung came to.
    first_header: Option<FirstHeader>,
    made_up: MadeUpKey,
    /// The best that was heard without being conclusive.
    fallback: Option<Finding>,
    /// Another header than the client's own has been accepted at a list: these were refused.
    confirming: Option<Vec<HeaderFamily>>,
    /// What a list said that may refuse every key, heard before the request that calls a model was sent.
    held: Option<Held>,
    /// A list where anybody is accepted, or was.
    open: Option<(&'t Call, HeaderFamily)>,
    /// Answers that come to everybody.
    to_everybody: Vec<ResponseShape>,
    /// The 403 of an earlier rung where a made-up key gets a 401.
    restricted: Option<ResponseShape>,
    /// Rungs that answered "no such path".
    absent: Vec<[u8; 32]>,
    /// Every rung so far had nothing but "no such path", or a page.
    no_api: bool,
    /// A made-up key, or a request without a key, gets the same answer there.
    for_everybody: bool,
    named_model: bool,
    cost_money: bool,
    lessons: Vec<Lesson>,
}

#[derive(Debug)]
struct Rung<'t> {
    call: &'t Call,
    /// The headers, as [`EndpointFacts::order`] has them.
    order: Vec<Vec<HeaderFamily>>,
    /// A real key was accepted there.
    has_accepted: bool,
}

#[derive(Debug)]
enum State<'t> {
    Ask,
    Calibrate(Heard),
    Keyless(Heard),
    /// Restricted, it seems: does the same come without any key by now?
    KeylessNow(Heard),
    /// Accepted, and a made-up key refused in a way that a limit or a ban may have: it is asked again.
    Second(Heard),
    /// Refused as a made-up key is: does it come at an open list by now, too?
    AtOpenList(Heard, &'t Call, HeaderFamily),
    /// One of several headers of one request was the right one, it seems: each is asked alone.
    Identify(Vec<HeaderFamily>, Heard),
    Done(Finding),
}

/// An answer that waits for what a made-up key gets.
#[derive(Debug, Clone)]
struct Heard {
    reading: Reading,
    shape: ResponseShape,
    retry_after: Option<Duration>,
}

/// What the client's own header came to.
#[derive(Debug)]
enum FirstHeader {
    Refused(Finding),
    Unread(Finding),
}

/// A refusal that counts only if the request that calls a model does not say otherwise.
#[derive(Debug, Clone)]
struct Held {
    finding: Finding,
    shape: ResponseShape,
    /// Where it was heard.
    at: usize,
    by: HeldBy,
}

/// What such a refusal rests on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum HeldBy {
    /// A 401 in words, or as a made-up key gets it: it counts unless the key is accepted later.
    Status401,
    /// A code for "forbidden", which a made-up key gets too: it counts unless a later answer is clear.
    Code,
    /// The look alone: it counts only if a later answer is nearly the same.
    Shape,
}

impl Rung<'_> {
    /// A model is called.
    fn is_inference(&self) -> bool {
        self.call.probe.surface.is_inference()
    }

    /// The header that is asked first.
    fn first(&self) -> Option<HeaderFamily> {
        self.order.first().and_then(|group| group.first()).copied()
    }
}

impl<'t> ProbePlan<'t> {
    /// Begins at the first rung.
    pub fn new(calls: &'t [Call], client: Client, facts: &EndpointFacts, requests: Requests<'_>) -> Self {
        let Client { preference, usual_header } = client;
        let wanted = preference.surface.filter(|wanted| calls.iter().any(|call| call.probe.surface == *wanted));
        let mut rungs: Vec<Rung<'t>> = calls
            .iter()
            // Of the surfaces where models are called, the one that the runtime uses.
            .filter(|call| wanted.is_none_or(|wanted| !call.probe.surface.is_inference() || call.probe.surface == wanted))
            .map(|call| Rung {
                call,
                order: facts.order(&call.probe.auth, preference.family),
                has_accepted: call.probe.auth.iter().any(|family| (requests.has_accepted)(call, *family)),
            })
            .collect();
        let useful = |rung: &Rung<'_>| rung.first().is_none_or(|first| !(requests.is_pointless)(rung.call, first));
        let open = rungs.iter().find(|rung| rung.has_accepted && !rung.is_inference() && !useful(rung));
        let open = open.and_then(|rung| rung.first().map(|first| (rung.call, first)));
        if rungs.iter().any(useful) {
            // A list where no key was seen accepted may refuse every key: what takes anybody is needed beside it.
            let is_trusted = rungs.iter().any(|rung| useful(rung) && (rung.has_accepted || rung.call.probe.refuses_bad_keys));
            rungs.retain(|rung| useful(rung) || !is_trusted && rung.is_inference() && rung.has_accepted);
        } else {
            // Anybody is accepted where something is there at all: the first of these says as much as all of them.
            if rungs.iter().any(|rung| rung.has_accepted) {
                rungs.retain(|rung| rung.has_accepted);
            }
            rungs.truncate(1);
        }
        Self {
            rungs,
            client: preference.family.or(usual_header),
            at: 0,
            group: 0,
            state: State::Ask,
            first_header: None,
            made_up: MadeUpKey::NotAsked,
            fallback: None,
            confirming: None,
            held: None,
            open,
            to_everybody: Vec::new(),
            restricted: None,
            absent: Vec::new(),
            // Where a key was accepted, there is one.
            no_api: !facts.has_accepted(),
            for_everybody: false,
            named_model: false,
            cost_money: false,
            lessons: Vec::new(),
        }
    }

    /// What to ask, or the end.
    pub fn proceed(&mut self) -> Next<'t> {
        let Some(Rung { call, order, .. }) = self.rungs.get(self.at) else {
            self.end();
            return match &self.state {
                State::Done(finding) => Next::Done(finding.clone()),
                _ => self.proceed(),
            };
        };
        let families = order.get(self.group).cloned().unwrap_or_default();
        match &self.state {
            State::Ask => Next::Ask { call, families, is_second: false },
            State::Second(_) => Next::Ask { call, families, is_second: true },
            State::Calibrate(heard) => {
                let accepted = heard.reading.classification == Classification::Accepted;
                let purpose = match (accepted, call.probe.refuses_bad_keys) {
                    (true, true) => Purpose::Check,
                    (true, false) => Purpose::Acceptance { of_its_form: self.is_held_back() },
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

    /// What was learnt of the endpoint.
    pub fn into_lessons(self) -> Vec<Lesson> {
        self.lessons
    }

    /// What came of an `Ask`.
    pub fn take_response(&mut self, response: ProbeResponse) {
        let Some(Rung { call, .. }) = self.rungs.get(self.at) else { return };
        self.named_model |= call.names_model;
        self.cost_money |= call.probe.costs_money;
        let (reading, shape, retry_after) = match response {
            ProbeResponse::Answer { reading, shape, retry_after } => (reading, shape, retry_after),
            ProbeResponse::TimedOut => return self.take_silence(self.finding(Verdict::Timeout, None, None)),
            ProbeResponse::Unreachable(why) => {
                let finding = Finding { unreached: Some(why), ..self.finding(Verdict::Unreachable, None, None) };
                return self.take_silence(finding);
            }
            ProbeResponse::Exhausted => {
                let finding = Finding { withheld: Some(Withheld::Fault), ..self.finding(Verdict::NotAttempted, None, None) };
                return self.take_silence(finding);
            }
        };
        let heard = Heard { reading, shape, retry_after };
        if let State::Identify(families, first) = &mut self.state {
            let (asked, first) = (families.remove(0), first.clone());
            let accepted = heard.reading.classification == Classification::Accepted;
            return match (accepted, families.is_empty()) {
                (true, _) => self.accept(asked, &first),
                // All of them together, and none alone: no client asks so.
                (false, true) => {
                    self.state = State::Ask;
                    self.finish_rung();
                }
                (false, false) => {}
            };
        }
        match std::mem::replace(&mut self.state, State::Ask) {
            State::Second(first) if heard.reading.classification == Classification::Accepted => self.believe(first),
            State::Second(first) => self.take_limit(&first),
            State::AtOpenList(first, ..) if heard.shape.is_like(&first.shape) => self.leave_to_everybody(&first),
            State::AtOpenList(first, ..) => self.refuse_as_made_up(first.shape.status),
            _ if self.group > 0 => self.take_in_another_header(heard),
            _ => self.take_in_own_header(heard),
        }
    }

    /// What a made-up key gets there.
    pub fn take_calibration(&mut self, calibration: &Calibration) {
        self.made_up = outcome_of(calibration);
        let State::Calibrate(heard) = std::mem::replace(&mut self.state, State::Ask) else { return };
        let Some(call) = self.rungs.get(self.at).map(|rung| rung.call) else { return };
        let status = heard.shape.status;
        if let Calibration::SameForEveryKey(shape) = calibration {
            self.to_everybody.push(shape.clone());
        }
        match (&heard.reading.classification, calibration) {
            (Classification::Accepted, _) => match worth(call.probe.refuses_bad_keys, calibration) {
                Worth::Yes => self.believe(heard),
                Worth::IfAcceptedAgain => self.state = State::Second(heard),
                Worth::Nothing if self.group > 0 => self.finish_rung(),
                Worth::Nothing if self.ask_own_header_alone() => {}
                Worth::Nothing => {
                    let anyone = *calibration == Calibration::AcceptsAnyone;
                    if anyone && !call.probe.surface.is_inference() {
                        self.open = self.families().first().map(|family| (call, *family));
                    }
                    let cause = if anyone { Cause::AcceptsAnyone } else { Cause::MadeUpKeyUntold };
                    self.fall_back_on(self.finding(Verdict::NotCalibrated, Some(cause), Some(status)));
                    self.no_api = false;
                    self.step();
                }
            },
            (_, Calibration::SameForEveryKey(shape)) if shape.is_like(&heard.shape) => self.leave_to_everybody(&heard),
            // The same status and code, whatever the words.
            (Classification::Forbidden(code), Calibration::Refuses { shape, in_contrast, .. })
                if shape.status == 403 && shape.code == *code && (!code.is_empty() || shape.is_like(&heard.shape)) =>
            {
                match &self.restricted {
                    _ if *in_contrast => self.refuse_as_made_up(status),
                    // There it got a 403 and a made-up key a 401: it is no dead key. Now both get what it got there.
                    Some(earlier) if earlier.is_like(&heard.shape) => self.leave_to_everybody(&heard),
                    Some(_) => self.refuse(self.finding(Verdict::Forbidden, Some(heard.reading.cause), Some(status))),
                    None => self.refuse_by_code(heard, false),
                }
            }
            (Classification::Forbidden(_), Calibration::Refuses { shape, in_words, .. }) if *in_words || shape.status == 401 => {
                self.restricted = Some(heard.shape.clone());
                if self.is_last_call() { self.state = State::KeylessNow(heard) } else { self.restrict(status) }
            }
            (Classification::Forbidden(_), _) => {
                self.refuse(self.finding(Verdict::Forbidden, Some(heard.reading.cause), Some(status)))
            }
            (Classification::Restricted, Calibration::Refuses { shape, in_contrast, .. }) if shape.is_like(&heard.shape) => {
                self.refuse_by_code(heard, *in_contrast);
            }
            (Classification::Restricted, _) => self.restrict(status),
            (Classification::Unread | Classification::Verdict(_), Calibration::Refuses { shape, in_contrast, .. })
                if shape.is_like(&heard.shape) =>
            {
                let page = shape.body == Body::Page;
                self.for_everybody |= page || heard.reading.cause == Cause::NotFound;
                match status {
                    _ if *in_contrast => self.refuse_as_made_up(status),
                    // A page may greet everybody; so may whatever is no 4xx and no JSON.
                    _ if page => self.leave_unread(&heard),
                    401 if self.may_refuse_everybody() => self.hold(&heard, HeldBy::Status401, Cause::AsAMadeUpKey),
                    401 => self.refuse_unless_limited(heard),
                    // Too long, whosever it is.
                    413 | 414 | 431 => self.leave_unread(&heard),
                    400..=499 => self.state = State::Keyless(heard),
                    200..=299 if shape.body == Body::Json => self.state = State::Keyless(heard),
                    _ => self.leave_unread(&heard),
                }
            }
            // A made-up key does not get this: it is about this key's account.
            (Classification::Verdict(verdict @ Verdict::QuotaExhausted), _) => {
                let finding = self.finding(*verdict, Some(heard.reading.cause), Some(status));
                self.close(Finding { retry_after: heard.retry_after, ..finding });
            }
            (Classification::Unread | Classification::Verdict(_), _) => self.leave_unread(&heard),
        }
    }

    /// What a request without any key gets there, if that could be found out.
    pub fn take_keyless(&mut self, keyless: Option<&ResponseShape>) {
        let heard = match std::mem::replace(&mut self.state, State::Ask) {
            State::Keyless(heard) => heard,
            // A ban or a limit since then: it is not about this key.
            State::KeylessNow(heard) if keyless.is_some_and(|keyless| keyless.is_like(&heard.shape)) => {
                return self.leave_to_everybody(&heard);
            }
            State::KeylessNow(heard) => return self.restrict(heard.shape.status),
            state => {
                self.state = state;
                return;
            }
        };
        let Some(Rung { call, .. }) = self.rungs.get(self.at) else { return };
        let is_alike = keyless.map(|keyless| keyless.is_like(&heard.shape));
        // A key makes a difference there, and this one makes the one that a made-up key makes.
        let differs = keyless.is_some_and(|keyless| {
            let told = !matches!(keyless.status, 408 | 425 | 429 | 501..=599);
            // Where models are called, such an answer may mean the request, or the model in it, and not the key.
            let of_the_request = call.probe.surface.is_inference()
                && (matches!(keyless.status, 401 | 403) || matches!(heard.shape.status, 400 | 404 | 405 | 411 | 413 | 415 | 422));
            told && !of_the_request && is_alike == Some(false)
        });
        match is_alike {
            Some(true) => self.for_everybody = true,
            // Something there asks for a key.
            Some(false) => self.no_api = false,
            None => {}
        }
        match (differs, self.is_held_back()) {
            (false, _) => self.leave_unread(&heard),
            (true, true) => self.hold(&heard, HeldBy::Shape, Cause::AsAMadeUpKey),
            (true, false) => self.refuse_as_made_up(heard.shape.status),
        }
    }

    // --- one rung ---

    fn take_in_own_header(&mut self, heard: Heard) {
        // Of all headers at once, a clear "yes" or "no" does; anything else may be for their number.
        let is_clear =
            matches!(heard.reading.classification, Classification::Accepted | Classification::Verdict(Verdict::Invalid));
        if !is_clear && !self.repeats_what_is_held(&heard) && self.ask_own_header_alone() {
            return;
        }
        let status = Some(heard.shape.status);
        let Reading { classification, by, cause, stop } = &heard.reading;
        let finding = |verdict| self.finding(verdict, Some(*cause), status);
        let is_yes = *classification == Classification::Accepted;
        if !is_yes && self.to_everybody.iter().any(|shape| shape.is_like(&heard.shape)) {
            return self.leave_to_everybody(&heard);
        }
        match classification {
            // The same "no" to two kinds of request, and to a made-up key at the first of them, is about the key.
            Classification::Unread if self.repeats_what_is_held(&heard) => self.refuse_as_made_up(heard.shape.status),
            Classification::Accepted | Classification::Forbidden(_) | Classification::Unread => {
                self.state = State::Calibrate(heard)
            }
            Classification::Restricted if *by == ReadBy::CommonCode => self.state = State::Calibrate(heard),
            // The status alone says so: it may be what every unknown key gets.
            Classification::Verdict(Verdict::QuotaExhausted) if *by == ReadBy::Shape => self.state = State::Calibrate(heard),
            Classification::Restricted => self.restrict(heard.shape.status),
            // This list may say so to every key.
            Classification::Verdict(Verdict::Invalid)
                if heard.shape.status == 401 && !matches!(by, ReadBy::Signal(_)) && self.may_refuse_everybody() =>
            {
                self.hold(&heard, HeldBy::Status401, *cause);
            }
            Classification::Verdict(Verdict::Invalid) => self.refuse(finding(Verdict::Invalid)),
            Classification::Verdict(Verdict::UnexpectedResponse) if !stop => {
                self.fall_back_on(finding(Verdict::UnexpectedResponse));
                self.no_api = false;
                self.step();
            }
            // The list may fail for everybody, or be missing ("not implemented").
            Classification::Verdict(verdict @ (Verdict::ProviderError | Verdict::RateLimited)) if self.is_held_back() => {
                self.fall_back_on(Finding { retry_after: heard.retry_after, ..finding(*verdict) });
                self.no_api = false;
                self.step();
            }
            Classification::Verdict(verdict) => {
                self.close(Finding { retry_after: heard.retry_after, ..finding(*verdict) });
            }
        }
    }

    /// Only a "yes" there changes what the client's own header came to; and where that told nothing, a clear word does.
    fn take_in_another_header(&mut self, heard: Heard) {
        // Several headers in one request may be what is refused: then each is asked alone.
        let families = self.families();
        let own = match &self.first_header {
            Some(FirstHeader::Refused(own) | FirstHeader::Unread(own)) => own.status,
            None => None,
        };
        let several = families.len() > 1
            && heard.reading.classification == Classification::Unread
            && matches!(heard.shape.status, 400 | 409 | 422)
            && own != Some(heard.shape.status);
        if several && let Some(rung) = self.rungs.get_mut(self.at) {
            rung.order.splice(self.group..=self.group, families.into_iter().map(|family| vec![family]));
            self.state = State::Ask;
            return;
        }
        match (&heard.reading.classification, &self.first_header) {
            (Classification::Accepted, _) => self.state = State::Calibrate(heard),
            // A 401 is about a credential: in words elsewhere, it is one. A 400 may be about anything, and the 401 elsewhere about no key.
            (Classification::Verdict(verdict @ (Verdict::Invalid | Verdict::QuotaExhausted)), Some(FirstHeader::Unread(own)))
                if matches!(own.status, Some(401 | 407)) =>
            {
                self.state = State::Done(self.finding(*verdict, Some(heard.reading.cause), Some(heard.shape.status)));
            }
            _ => self.finish_rung(),
        }
    }

    /// Silence cancels neither a refusal nor an earlier answer.
    fn take_silence(&mut self, finding: Finding) {
        match std::mem::replace(&mut self.state, State::Ask) {
            // One of them was the right one: the key is good, whatever comes of the search for which.
            State::Identify(families, first) => {
                let one = families.first().copied();
                return one.map_or((), |one| self.accept(one, &first));
            }
            State::Second(first) => return self.take_limit(&first),
            State::AtOpenList(first, ..) => return self.leave_to_everybody(&first),
            _ => {}
        }
        if self.group > 0 {
            return self.finish_rung();
        }
        let says_more =
            |finding: &Finding| matches!(finding.verdict, Verdict::NotCalibrated | Verdict::ProviderError | Verdict::RateLimited);
        let finding = match self.fallback.take() {
            Some(earlier) if says_more(&earlier) => Finding { cost_money: finding.cost_money, ..earlier },
            Some(_) | None => finding,
        };
        self.close(finding);
    }

    /// The end, unless an earlier refusal counts against an answer that tells nothing.
    fn close(&mut self, finding: Finding) {
        let untold = matches!(
            finding.verdict,
            Verdict::RateLimited | Verdict::ProviderError | Verdict::UnexpectedResponse | Verdict::Timeout | Verdict::Unreachable
        );
        match self.held.take() {
            // In another header than the client's own, nothing but a "yes" says otherwise.
            Some(held) if self.confirming.is_some() => {
                self.state = State::Done(Finding { cost_money: finding.cost_money, ..held.finding });
            }
            Some(held) if held.by != HeldBy::Shape && untold => self.settle(held),
            Some(_) | None => self.state = State::Done(finding),
        }
    }

    /// What was held counts: the other headers are asked where it was heard.
    fn settle(&mut self, held: Held) {
        (self.at, self.group) = (held.at, 0);
        self.refuse(held.finding);
    }

    /// This "yes" counts.
    fn believe(&mut self, heard: Heard) {
        match self.families().as_slice() {
            [one] => self.accept(*one, &heard),
            several => self.state = State::Identify(several.to_vec(), heard),
        }
    }

    /// The same key is not accepted again at once: what refused the made-up key may be a limit.
    fn take_limit(&mut self, heard: &Heard) {
        if self.group > 0 {
            return self.finish_rung();
        }
        let finding = self.finding(Verdict::NotCalibrated, Some(Cause::MadeUpKeyUntold), Some(heard.shape.status));
        self.close(finding);
    }

    /// This comes to everybody by now: it says nothing of the key, and no further header is tried.
    fn leave_to_everybody(&mut self, heard: &Heard) {
        self.for_everybody = true;
        self.no_api = false;
        self.to_everybody.push(heard.shape.clone());
        if let Some(rung) = self.rungs.get(self.at) {
            self.lessons.push(Lesson::SameForEveryKey(rung.call.request, self.families(), heard.shape.clone()));
        }
        // What seemed a restriction of this key is none.
        self.fallback.take_if(|earlier| earlier.cause == Some(Cause::Restricted));
        self.fall_back_on(self.finding(Verdict::UnexpectedResponse, Some(Cause::RequestRefused), Some(heard.shape.status)));
        self.finish_rung();
    }

    fn accept(&mut self, family: HeaderFamily, heard: &Heard) {
        let Some(Rung { call, order, .. }) = self.rungs.get(self.at) else { return };
        let wrong = match &self.confirming {
            Some(wrong) => wrong.clone(),
            None => {
                // The client's own header, alone or first of several, was refused.
                let own = order.first().and_then(|group| group.first()).filter(|own| **own != family);
                own.into_iter().copied().collect()
            }
        };
        // A list may look at no more than a key's form. What was refused in the client's own header is accepted in another one only if the
        // request that calls a model is, too.
        let confirms = |rung: &Rung<'_>| rung.is_inference() && rung.call.probe.auth.contains(&family);
        if let Some(FirstHeader::Refused(refused)) = &self.first_header
            && self.group > 0
            && self.is_held_back()
            && self.later().any(confirms)
        {
            self.held = Some(Held { finding: refused.clone(), shape: heard.shape.clone(), at: self.at, by: HeldBy::Status401 });
            self.confirming = Some(wrong);
            let later = self.rungs.split_off(self.at + 1).into_iter().filter(confirms);
            self.rungs.extend(later.map(|rung| Rung { order: vec![vec![family]], ..rung }));
            return self.step();
        }
        // What the list said in this header it says to good keys too.
        if let Some(held) = self.held.as_ref().filter(|_| self.confirming.is_none())
            && let Some(list) = self.rungs.get(held.at).filter(|list| list.first() == Some(family))
        {
            self.absent.push(list.call.request);
        }
        self.lessons.push(Lesson::Family { right: family, wrong });
        self.lessons.extend(self.absent.iter().copied().map(Lesson::Absent));
        // In a request that never takes the client's header, another one is no sign.
        let wrong_header = self.client.is_some_and(|client| client != family && call.probe.auth.contains(&client));
        let finding = self.finding(Verdict::Valid, None, Some(heard.shape.status));
        self.state = State::Done(Finding { family: Some(family), wrong_header, ..finding });
    }

    /// Alive, but not for this. Where models are called, and no other way to call them is left, such a key is of no use.
    fn restrict(&mut self, status: u16) {
        self.no_api = false;
        if self.is_last_call() {
            self.close(self.finding(Verdict::Forbidden, Some(Cause::Restricted), Some(status)));
        } else {
            self.fall_back_on(self.finding(Verdict::UnexpectedResponse, Some(Cause::Restricted), Some(status)));
            self.step();
        }
    }

    /// A model is called here, and no other way to call one is left.
    fn is_last_call(&self) -> bool {
        self.rungs.get(self.at).is_some_and(Rung::is_inference) && !self.later().any(Rung::is_inference)
    }

    fn refuse_as_made_up(&mut self, status: u16) {
        self.refuse(self.finding(Verdict::Invalid, Some(Cause::AsAMadeUpKey), Some(status)));
    }

    /// Refused in the client's own header: the others are tried, and change it only by a "yes".
    fn refuse(&mut self, finding: Finding) {
        self.no_api = false;
        // The list said so first.
        let is_same = |held: &Held| held.by == HeldBy::Status401 && finding.verdict == Verdict::Invalid;
        let finding = match self.held.take_if(|held| self.confirming.is_none() && is_same(held)) {
            Some(held) => held.finding,
            None => finding,
        };
        self.first_header = Some(FirstHeader::Refused(finding));
        self.try_other_headers();
    }

    /// Forbidden by its code, as a made-up key is.
    fn refuse_by_code(&mut self, heard: Heard, in_contrast: bool) {
        match (in_contrast, self.is_held_back()) {
            (true, _) => self.refuse_as_made_up(heard.shape.status),
            (false, true) => self.hold(&heard, HeldBy::Code, Cause::AsAMadeUpKey),
            (false, false) => self.refuse_unless_limited(heard),
        }
    }

    /// A made-up key gets the same, and so may everybody by now: where anybody was accepted before, that is asked once more.
    fn refuse_unless_limited(&mut self, heard: Heard) {
        match self.open {
            Some((list, family)) if self.rungs.get(self.at).is_some_and(Rung::is_inference) => {
                self.state = State::AtOpenList(heard, list, family);
            }
            _ => self.refuse_as_made_up(heard.shape.status),
        }
    }

    /// Nobody says of this list that it tells keys apart, and a request that calls a model comes after it.
    fn is_held_back(&self) -> bool {
        let Some(rung) = self.rungs.get(self.at) else { return false };
        !rung.call.probe.refuses_bad_keys && !rung.is_inference() && self.later().any(Rung::is_inference)
    }

    /// What has not been asked yet.
    fn later(&self) -> impl Iterator<Item = &Rung<'t>> {
        self.rungs.iter().skip(self.at + 1)
    }

    /// No key was seen accepted at this list: it may want another kind of login than a key.
    fn may_refuse_everybody(&self) -> bool {
        self.is_held_back() && self.rungs.get(self.at).is_some_and(|rung| !rung.has_accepted)
    }

    fn hold(&mut self, heard: &Heard, by: HeldBy, cause: Cause) {
        let finding = self.finding(Verdict::Invalid, Some(cause), Some(heard.shape.status));
        self.no_api = false;
        self.fall_back_on(Finding { verdict: Verdict::UnexpectedResponse, ..finding.clone() });
        self.held = Some(Held { finding, shape: heard.shape.clone(), at: self.at, by });
        // The other headers are tried where the answer counts: after a 401, all in one request.
        if by == HeldBy::Status401 {
            for rung in self.rungs.iter_mut().skip(self.at + 1).filter(|rung| rung.is_inference()) {
                rung.order = vec![rung.order.concat()];
            }
        }
        self.step();
    }

    /// Without words, the same answer may be about the path.
    fn repeats_what_is_held(&self, heard: &Heard) -> bool {
        let of_the_path = heard.reading.cause == Cause::NotFound && heard.shape.body != Body::Json;
        !of_the_path && self.held.as_ref().is_some_and(|held| held.shape.matches_across_requests(&heard.shape))
    }

    fn leave_unread(&mut self, heard: &Heard) {
        let status = heard.shape.status;
        let cause = heard.reading.cause;
        let nothing_there = cause == Cause::NotFound || cause == Cause::Page && !matches!(status, 401 | 403 | 407);
        let of_a_model = heard.shape.code.contains("model");
        self.no_api &= nothing_there && !of_a_model;
        if cause == Cause::NotFound
            && let Some(Rung { call, .. }) = self.rungs.get(self.at)
        {
            self.absent.push(call.request);
        }
        if self.repeats_what_is_held(heard) {
            return self.refuse_as_made_up(status);
        }
        self.first_header = Some(FirstHeader::Unread(self.finding(Verdict::UnexpectedResponse, Some(cause), Some(status))));
        // A refusal it may be: for want of the key in the right header.
        if matches!(status, 400..=499) && !nothing_there { self.try_other_headers() } else { self.finish_rung() }
    }

    /// The client's own header was asked together with the others: it is asked alone.
    fn ask_own_header_alone(&mut self) -> bool {
        let families = self.families();
        let Some(rung) = self.rungs.get_mut(self.at).filter(|_| self.group == 0) else { return false };
        let [own, rest @ ..] = families.as_slice() else { return false };
        if rest.is_empty() {
            return false;
        }
        rung.order = vec![vec![*own], rest.to_vec()];
        self.state = State::Ask;
        true
    }

    fn try_other_headers(&mut self) {
        self.group += 1;
        self.state = State::Ask;
        if self.families().is_empty() {
            self.finish_rung();
        }
    }

    fn finish_rung(&mut self) {
        if self.group > 0 && self.rungs.get(self.at).is_some_and(|rung| self.group + 1 < rung.order.len()) {
            return self.try_other_headers();
        }
        match self.first_header.take() {
            Some(FirstHeader::Refused(finding)) => {
                self.state = State::Done(Finding { cost_money: self.cost_money, ..finding });
            }
            Some(FirstHeader::Unread(finding)) => {
                self.fall_back_on(finding);
                self.step();
            }
            None => self.step(),
        }
    }

    fn step(&mut self) {
        self.at += 1;
        self.group = 0;
        self.first_header = None;
        self.made_up = MadeUpKey::NotAsked;
        self.state = State::Ask;
    }

    /// No rung is left.
    fn end(&mut self) {
        let untold = self.fallback.as_ref().is_none_or(|earlier| earlier.verdict == Verdict::UnexpectedResponse);
        let was_accepted = self.fallback.as_ref().is_some_and(|earlier| earlier.verdict == Verdict::NotCalibrated);
        match self.held.take() {
            Some(held) if self.confirming.is_some() => {
                self.state = State::Done(Finding { cost_money: self.cost_money, ..held.finding });
                return;
            }
            // But for a "yes" where models are called, though nothing shows what it is worth: then nothing tells.
            Some(held) if held.by == HeldBy::Status401 && !was_accepted || held.by == HeldBy::Code && untold => {
                return self.settle(held);
            }
            Some(_) | None => {}
        }
        let finding = self.fallback.take().unwrap_or_else(|| Finding::bare(Verdict::UnexpectedResponse));
        let no_api = self.no_api && self.for_everybody && finding.verdict == Verdict::UnexpectedResponse;
        let cause = if no_api { Some(Cause::NoApiAtBaseUrl) } else { finding.cause };
        self.state = State::Done(Finding { cause, about_model: self.named_model, cost_money: self.cost_money, ..finding });
    }

    /// The most telling one is kept: a list that fails, accepts anybody, then restricted, then anything that tells nothing.
    fn fall_back_on(&mut self, finding: Finding) {
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
        self.rungs.get(self.at).and_then(|rung| rung.order.get(self.group)).cloned().unwrap_or_default()
    }

    fn finding(&self, verdict: Verdict, cause: Option<Cause>, status: Option<u16>) -> Finding {
        Finding {
            cause,
            status,
            probe: self.rungs.get(self.at).map(|rung| rung.call.probe.name.clone()).unwrap_or_default(),
            family: self.families().first().copied(),
            made_up: self.made_up,
            about_model: self.named_model,
            cost_money: self.cost_money,
            ..Finding::bare(verdict)
        }
    }
}

/// What a "yes" is worth.
enum Worth {
    Yes,
    /// What refused the made-up key may be a limit on calls.
    IfAcceptedAgain,
    Nothing,
}

/// A "yes" counts where the endpoint was seen to refuse a made-up key, or is documented to and was not seen to accept one.
fn worth(documented: bool, calibration: &Calibration) -> Worth {
    match calibration {
        Calibration::AcceptsAnyone => Worth::Nothing,
        _ if documented => Worth::Yes,
        Calibration::Refuses { by_code, in_contrast, .. } if *by_code || *in_contrast => Worth::Yes,
        Calibration::Refuses { .. } => Worth::IfAcceptedAgain,
        Calibration::Inconclusive(_) | Calibration::SameForEveryKey(_) | Calibration::NotWaitedFor | Calibration::NotAsked => {
            Worth::Nothing
        }
    }
}

/// What a made-up key got.
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
