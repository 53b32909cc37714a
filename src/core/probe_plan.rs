//! What to ask next about a credential, and what is known then: one pure plan, so that every path can be tested without a network.
//!
//! A target's calls are rungs, free ones first. Of each rung the client's own header is asked first, the others together after a refusal.
//! A "yes" counts where a made-up key is refused; a refusal in words counts at once; any other answer counts as a refusal if a made-up key gets
//! the same one. What was refused in the client's own header stays refused: only a "yes" in another one says otherwise.
//! A list of models may refuse every key, good or bad: such a refusal is held until the request that calls a model was answered.

use std::time::Duration;

use crate::{
    core::{
        classify::{Body, Calibration, Classification, Finding, ProbeResponse, ReadBy, Reading},
        endpoint::{Call, Preference},
        look::Look,
        taught::EndpointFacts,
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
    },
    /// Find out what a made-up key gets there.
    Calibrate {
        /// What is asked.
        call: &'t Call,
        /// In which headers.
        families: Vec<HeaderFamily>,
        /// The plan needs the answer. Otherwise what is known already is enough.
        needed: bool,
        /// Only what a made-up key of the credential's own form gets counts.
        of_its_form: bool,
    },
    /// Find out what a request without any key gets there.
    Keyless {
        /// What is asked.
        call: &'t Call,
    },
    /// Done.
    Done(Finding),
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
    /// A good key gets nothing but "no such path" there.
    Absent([u8; 32]),
}

/// The walk through a target's calls.
#[derive(Debug)]
pub struct ProbePlan<'t> {
    rungs: Vec<Rung<'t>>,
    /// The header of the workspace's own client, where it is known.
    client: Option<HeaderFamily>,
    at: usize,
    group: usize,
    state: State,
    /// What the first header of this rung came to.
    first_header: Option<FirstHeader>,
    made_up: MadeUpKey,
    /// The best that was heard without being conclusive.
    fallback: Option<Finding>,
    /// Another header than the client's own has been accepted at a list: these were refused.
    confirming: Option<Vec<HeaderFamily>>,
    /// A refusal that is one by comparison alone, heard before the request that calls a model was sent.
    held: Option<Held>,
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
}

#[derive(Debug)]
enum State {
    Ask,
    Calibrate(Heard),
    Keyless(Heard),
    /// One of several headers of one request was the right one: each is asked alone, but for the last.
    Identify(Vec<HeaderFamily>, Heard),
    Done(Finding),
}

/// An answer that waits for what a made-up key gets.
#[derive(Debug, Clone)]
struct Heard {
    reading: Reading,
    look: Look,
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
    look: Look,
    /// It has a code for "forbidden": it counts unless a later answer is clear. Otherwise it counts only if a later answer is nearly the same.
    by_code: bool,
}

impl Rung<'_> {
    /// A model is called.
    fn is_inference(&self) -> bool {
        self.call.probe.surface.is_inference()
    }
}

impl<'t> ProbePlan<'t> {
    /// Begins at the first rung. `is_pointless`: a request in a header is known to tell nothing, since anybody is accepted there or it is not there at all.
    pub fn new(
        calls: &'t [Call],
        client: Client,
        facts: &EndpointFacts,
        is_pointless: &dyn Fn(&Call, HeaderFamily) -> bool,
    ) -> Self {
        let Client { preference, usual_header } = client;
        let wanted = preference.surface.filter(|wanted| calls.iter().any(|call| call.probe.surface == *wanted));
        let rungs: Vec<Rung<'t>> = calls
            .iter()
            // Of the surfaces where models are called, the one that the runtime uses.
            .filter(|call| wanted.is_none_or(|wanted| !call.probe.surface.is_inference() || call.probe.surface == wanted))
            .map(|call| Rung { call, order: facts.order(&call.probe.auth, preference.family) })
            .collect();
        let useful = |rung: &Rung<'_>| {
            rung.order.first().and_then(|group| group.first()).is_none_or(|first| !is_pointless(rung.call, *first))
        };
        let any_useful = rungs.iter().any(useful);
        let mut rungs = rungs;
        if any_useful {
            rungs.retain(useful);
        } else {
            // Anybody is accepted everywhere: the first says as much as all of them.
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
        let Some(Rung { call, order }) = self.rungs.get(self.at) else { return Next::Done(self.end()) };
        let families = order.get(self.group).cloned().unwrap_or_default();
        match &self.state {
            State::Ask => Next::Ask { call, families },
            State::Calibrate(heard) => {
                let (accepted, documented) =
                    (heard.reading.classification == Classification::Accepted, call.probe.refuses_bad_keys);
                Next::Calibrate {
                    call,
                    families,
                    needed: !(accepted && documented),
                    of_its_form: accepted && self.is_held_back(),
                }
            }
            State::Keyless(_) => Next::Keyless { call },
            State::Identify(families, _) => Next::Ask { call, families: families.iter().copied().take(1).collect() },
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
        let (reading, look, retry_after) = match response {
            ProbeResponse::Answer { reading, look, retry_after } => (reading, look, retry_after),
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
        let heard = Heard { reading, look, retry_after };
        if let State::Identify(families, first) = &mut self.state {
            let (asked, first) = (families.remove(0), first.clone());
            let accepted = heard.reading.classification == Classification::Accepted;
            return match (accepted, families.as_slice()) {
                (true, _) => self.accept(asked, &first),
                (false, [last]) => {
                    let last = *last;
                    self.accept(last, &first);
                }
                (false, _) => {}
            };
        }
        if self.group > 0 { self.take_in_another_header(heard) } else { self.take_in_own_header(heard) }
    }

    /// What a made-up key gets there.
    pub fn take_calibration(&mut self, calibration: &Calibration) {
        self.made_up = outcome_of(calibration);
        let State::Calibrate(heard) = std::mem::replace(&mut self.state, State::Ask) else { return };
        let Some(Rung { call, .. }) = self.rungs.get(self.at) else { return };
        let status = heard.look.status;
        match (&heard.reading.classification, calibration) {
            (Classification::Accepted, _) => {
                match (is_believed(call.probe.refuses_bad_keys, calibration), self.families().as_slice()) {
                    (true, [one]) => self.accept(*one, &heard),
                    (true, several) => self.state = State::Identify(several.to_vec(), heard),
                    (false, _) if self.group > 0 => self.finish_rung(),
                    (false, _) => {
                        let cause = if *calibration == Calibration::AcceptsAnyone {
                            Cause::AcceptsAnyone
                        } else {
                            Cause::MadeUpKeyUntold
                        };
                        self.fall_back_on(self.finding(Verdict::NotCalibrated, Some(cause), Some(status)));
                        self.no_api = false;
                        self.step();
                    }
                }
            }
            // The same status and code, whatever the words.
            (Classification::Forbidden(code), Calibration::Refuses { look, in_contrast, .. })
                if look.status == 403 && look.code == *code && (!code.is_empty() || look.is_like(&heard.look)) =>
            {
                self.refuse_by_code(&heard, *in_contrast);
            }
            (Classification::Forbidden(_), Calibration::Refuses { in_words: true, .. }) => self.restrict(status),
            (Classification::Forbidden(_), _) => {
                self.refuse(self.finding(Verdict::Forbidden, Some(heard.reading.cause), Some(status)))
            }
            (Classification::Restricted, Calibration::Refuses { look, in_contrast, .. }) if look.is_like(&heard.look) => {
                self.refuse_by_code(&heard, *in_contrast);
            }
            (Classification::Restricted, _) => self.restrict(status),
            (Classification::Unread | Classification::Verdict(_), Calibration::Refuses { look, in_contrast, .. })
                if look.is_like(&heard.look) =>
            {
                let page = look.body == Body::Page;
                self.for_everybody |= page || heard.reading.cause == Cause::NotFound;
                match status {
                    _ if *in_contrast => self.refuse_as_made_up(status),
                    // A page may greet everybody; so may whatever is no 4xx and no JSON.
                    _ if page => self.leave_unread(&heard),
                    401 => self.refuse_as_made_up(status),
                    400..=499 => self.state = State::Keyless(heard),
                    200..=299 if look.body == Body::Json => self.state = State::Keyless(heard),
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
    pub fn take_keyless(&mut self, keyless: Option<&Look>) {
        let State::Keyless(heard) = std::mem::replace(&mut self.state, State::Ask) else { return };
        let Some(Rung { call, .. }) = self.rungs.get(self.at) else { return };
        let is_alike = keyless.map(|keyless| keyless.is_like(&heard.look));
        // A key makes a difference there, and this one makes the one that a made-up key makes.
        let differs = keyless.is_some_and(|keyless| {
            let told = !matches!(keyless.status, 408 | 425 | 429 | 501..=599);
            // Where models are called, such an answer may mean the request, or the model in it, and not the key.
            let of_the_request = call.probe.surface.is_inference()
                && (matches!(keyless.status, 401 | 403) || matches!(heard.look.status, 400 | 404 | 405 | 411 | 413 | 415 | 422));
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
            (true, true) => self.hold(&heard, false),
            (true, false) => self.refuse_as_made_up(heard.look.status),
        }
    }

    // --- one rung ---

    fn take_in_own_header(&mut self, heard: Heard) {
        let status = Some(heard.look.status);
        let Reading { classification, by, cause, stop } = &heard.reading;
        let finding = |verdict| self.finding(verdict, Some(*cause), status);
        match classification {
            Classification::Accepted | Classification::Forbidden(_) | Classification::Unread => {
                self.state = State::Calibrate(heard)
            }
            Classification::Restricted if *by == ReadBy::CommonCode => self.state = State::Calibrate(heard),
            // The status alone says so: it may be what every unknown key gets.
            Classification::Verdict(Verdict::QuotaExhausted) if *by == ReadBy::Shape => self.state = State::Calibrate(heard),
            Classification::Restricted => self.restrict(heard.look.status),
            Classification::Verdict(Verdict::Invalid) => self.refuse(finding(Verdict::Invalid)),
            Classification::Verdict(Verdict::UnexpectedResponse) if !stop => {
                self.fall_back_on(finding(Verdict::UnexpectedResponse));
                self.no_api = false;
                self.step();
            }
            // "Not implemented" is no outage: the list is missing.
            Classification::Verdict(verdict @ Verdict::ProviderError) if heard.look.status == 501 && self.is_held_back() => {
                self.fall_back_on(finding(*verdict));
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
        match (&heard.reading.classification, &self.first_header) {
            (Classification::Accepted, _) => self.state = State::Calibrate(heard),
            // A 401 is about a credential: in words elsewhere, it is one. A 400 may be about anything, and the 401 elsewhere about no key.
            (Classification::Verdict(verdict @ (Verdict::Invalid | Verdict::QuotaExhausted)), Some(FirstHeader::Unread(own)))
                if matches!(own.status, Some(401 | 407)) =>
            {
                self.state = State::Done(self.finding(*verdict, Some(heard.reading.cause), Some(heard.look.status)));
            }
            _ => self.finish_rung(),
        }
    }

    /// Silence cancels neither a refusal nor an earlier "yes" that was not shown to prove anything.
    fn take_silence(&mut self, finding: Finding) {
        if let State::Identify(families, first) = &self.state {
            // One of them was the right one: the key is good, whatever comes of the search for which.
            let (one, first) = (families.first().copied(), first.clone());
            return one.map_or((), |one| self.accept(one, &first));
        }
        if self.group > 0 {
            return self.finish_rung();
        }
        let finding = match self.fallback.take() {
            Some(earlier) if earlier.verdict == Verdict::NotCalibrated => Finding { cost_money: finding.cost_money, ..earlier },
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
        let finding = match self.held.take() {
            // In another header than the client's own, nothing but a "yes" says otherwise.
            Some(held) if held.by_code && (untold || self.confirming.is_some()) => {
                Finding { cost_money: finding.cost_money, ..held.finding }
            }
            Some(_) | None => finding,
        };
        self.state = State::Done(finding);
    }

    fn accept(&mut self, family: HeaderFamily, heard: &Heard) {
        let Some(Rung { call, order }) = self.rungs.get(self.at) else { return };
        let wrong = match &self.confirming {
            Some(wrong) => wrong.clone(),
            None if self.group > 0 => order.first().cloned().unwrap_or_default(),
            None => Vec::new(),
        };
        // A list may look at no more than a key's form. What was refused in the client's own header is accepted in another one only if the
        // request that calls a model is, too.
        let confirms = |rung: &Rung<'_>| rung.is_inference() && rung.call.probe.auth.contains(&family);
        if let Some(FirstHeader::Refused(refused)) = &self.first_header
            && self.group > 0
            && self.is_held_back()
            && self.later().any(confirms)
        {
            self.held = Some(Held { finding: refused.clone(), look: heard.look.clone(), by_code: true });
            self.confirming = Some(wrong);
            let later = self.rungs.split_off(self.at + 1).into_iter().filter(confirms);
            self.rungs.extend(later.map(|rung| Rung { order: vec![vec![family]], ..rung }));
            return self.step();
        }
        self.lessons.push(Lesson::Family { right: family, wrong });
        self.lessons.extend(self.absent.iter().copied().map(Lesson::Absent));
        // In a request that never takes the client's header, another one is no sign.
        let wrong_header = self.client.is_some_and(|client| client != family && call.probe.auth.contains(&client));
        let finding = self.finding(Verdict::Valid, None, Some(heard.look.status));
        self.state = State::Done(Finding { family: Some(family), wrong_header, ..finding });
    }

    /// Alive, but not for this. Where models are called, and no other way to call them is left, such a key is of no use.
    fn restrict(&mut self, status: u16) {
        let here = self.rungs.get(self.at).is_some_and(Rung::is_inference);
        let later = self.later().any(Rung::is_inference);
        self.no_api = false;
        if here && !later {
            self.close(self.finding(Verdict::Forbidden, Some(Cause::Restricted), Some(status)));
        } else {
            self.fall_back_on(self.finding(Verdict::UnexpectedResponse, Some(Cause::Restricted), Some(status)));
            self.step();
        }
    }

    fn refuse_as_made_up(&mut self, status: u16) {
        self.refuse(self.finding(Verdict::Invalid, Some(Cause::AsAMadeUpKey), Some(status)));
    }

    /// Refused in the client's own header: the others are tried, and change it only by a "yes".
    fn refuse(&mut self, finding: Finding) {
        self.no_api = false;
        self.first_header = Some(FirstHeader::Refused(finding));
        self.try_other_headers();
    }

    /// Forbidden by its code, as a made-up key is.
    fn refuse_by_code(&mut self, heard: &Heard, in_contrast: bool) {
        if in_contrast || !self.is_held_back() { self.refuse_as_made_up(heard.look.status) } else { self.hold(heard, true) }
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

    fn hold(&mut self, heard: &Heard, by_code: bool) {
        let finding = self.finding(Verdict::Invalid, Some(Cause::AsAMadeUpKey), Some(heard.look.status));
        self.no_api = false;
        if let Some(Rung { call, .. }) = self.rungs.get(self.at) {
            // Should this key be accepted later, that request tells nothing of a key.
            self.absent.push(call.request);
        }
        self.fall_back_on(Finding { verdict: Verdict::UnexpectedResponse, ..finding.clone() });
        self.held = Some(Held { finding, look: heard.look.clone(), by_code });
        // The other headers are tried where the answer counts.
        self.step();
    }

    fn leave_unread(&mut self, heard: &Heard) {
        let status = heard.look.status;
        let cause = heard.reading.cause;
        let nothing_there = cause == Cause::NotFound || cause == Cause::Page && !matches!(status, 401 | 403 | 407);
        let of_a_model = heard.look.code.contains("model");
        self.no_api &= nothing_there && !of_a_model;
        if cause == Cause::NotFound
            && let Some(Rung { call, .. }) = self.rungs.get(self.at)
        {
            self.absent.push(call.request);
        }
        // The same "no" to two kinds of request is about the key; without words it may be about the path.
        let of_the_path = cause == Cause::NotFound && heard.look.body != Body::Json;
        if !of_the_path && self.held.as_ref().is_some_and(|held| held.look.says_the_same(&heard.look)) {
            return self.refuse_as_made_up(status);
        }
        self.first_header = Some(FirstHeader::Unread(self.finding(Verdict::UnexpectedResponse, Some(cause), Some(status))));
        // A refusal it may be: for want of the key in the right header.
        if matches!(status, 400..=499) && !nothing_there { self.try_other_headers() } else { self.finish_rung() }
    }

    fn try_other_headers(&mut self) {
        self.group += 1;
        self.state = State::Ask;
        if self.families().is_empty() {
            self.finish_rung();
        }
    }

    fn finish_rung(&mut self) {
        match self.first_header.take() {
            Some(FirstHeader::Refused(finding)) => self.state = State::Done(finding),
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

    fn end(&mut self) -> Finding {
        if let Some(Held { finding, by_code: true, .. }) = self.held.take()
            && (self.confirming.is_some()
                || self.fallback.as_ref().is_none_or(|earlier| earlier.verdict == Verdict::UnexpectedResponse))
        {
            return Finding { cost_money: self.cost_money, ..finding };
        }
        let finding = self.fallback.take().unwrap_or_else(|| Finding::bare(Verdict::UnexpectedResponse));
        let no_api = self.no_api && self.for_everybody && finding.verdict == Verdict::UnexpectedResponse;
        let cause = if no_api { Some(Cause::NoApiAtBaseUrl) } else { finding.cause };
        Finding { cause, about_model: self.named_model, cost_money: self.cost_money, ..finding }
    }

    /// The most telling one is kept: accepts anybody, then restricted, then anything that tells nothing.
    fn fall_back_on(&mut self, finding: Finding) {
        let rank = |finding: &Finding| match (finding.verdict, finding.cause) {
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

/// A "yes" counts: the endpoint was seen to refuse a made-up key, or is documented to and was not seen to accept one.
fn is_believed(documented: bool, calibration: &Calibration) -> bool {
    match calibration {
        Calibration::Refuses { .. } => true,
        Calibration::AcceptsAnyone => false,
        Calibration::Untold(_) | Calibration::NotAsked => documented,
    }
}

/// What a made-up key got.
pub fn outcome_of(calibration: &Calibration) -> MadeUpKey {
    match calibration {
        Calibration::Refuses { look, .. } => MadeUpKey::Refused(look.status),
        Calibration::AcceptsAnyone => MadeUpKey::Accepted,
        Calibration::Untold(Some(status)) => MadeUpKey::Inconclusive(*status),
        Calibration::Untold(None) => MadeUpKey::NoAnswer,
        Calibration::NotAsked => MadeUpKey::NotAsked,
    }
}
