//! What is learnt about a request from its answers to real and made-up keys, against a model that keeps every event and computes
//! everything anew from them, over random schedules.

use std::{collections::BTreeMap, time::Duration};

use byok_gate::{
    core::{
        classify::{Answer, Calibration},
        endpoint_facts::{CalibrationQuestion, RequestFacts},
        made_up_key::KeyForm,
        response_shape::ResponseShape,
    },
    domain::secret::Secret,
};
use rand::{Rng, SeedableRng, rngs::StdRng, seq::IndexedRandom};

const SCHEDULES: u64 = 20_000;

/// Seconds.
type Second = u64;

/// How long an answer, an acceptance or a refusal of a real key counts.
const GOOD_FOR: Second = 6 * 3600;
/// How long an acceptance and a refusal can be compared.
const COMPARABLE: Second = 600;

/// Status and body of a refusal, and whether it is one by code.
type Refusal = (u16, &'static str, bool);
const REFUSALS: [Refusal; 5] =
    [(401, "no", true), (404, "no", false), (400, "malformed", false), (401, "", false), (403, "no", false)];

/// What a made-up key got.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Got {
    Refusal(Refusal),
    Yes,
    /// A quota that all callers share.
    Shared,
    Failure,
    Silence,
}

/// One thing that happens to the facts of one request.
#[derive(Debug, Clone)]
enum Learnt {
    /// A made-up key of this form, for this model, got this. The last: it was sent because a key got an unusual refusal.
    MadeUp(&'static str, KeyForm, Got, bool),
    /// The last: the catalogue says that this request refuses bad keys.
    Accepted(&'static str, bool),
    /// A real key of this form was refused with a 401 that had this body.
    Refused(KeyForm, &'static str),
    /// The key that was accepted was asked again: once more accepted, or given this.
    Second(&'static str, Option<Refusal>),
    /// Every key gets this.
    Every(Refusal),
}

/// A made-up key's answer that stands.
#[derive(Debug, Clone, Copy)]
struct Stands {
    at: Second,
    model: &'static str,
    form: KeyForm,
    /// `None` for a "yes".
    refusal: Option<Refusal>,
    after_acceptance: bool,
    confirmed: bool,
    checked: Option<Second>,
}

/// What is known, computed from all events.
#[derive(Default)]
struct Known {
    standing: Vec<Stands>,
    misses: u32,
    /// The last inconclusive answer, and whether the next key that is accepted shows that it was none.
    inconclusive: Option<(Calibration, bool)>,
    /// No made-up key is sent before, even if another one was answered in the meantime.
    back_off_until: Second,
    accepted: Vec<(&'static str, Second)>,
    /// How made-up keys are refused, the latest last.
    usual: Vec<(Refusal, Second)>,
    /// What the last answer to a made-up key meant.
    meant: Option<Calibration>,
}

fn shape((status, body, _): Refusal) -> ResponseShape {
    ResponseShape::of(Answer { status, body: body.as_bytes(), truncated: false, page: false, retry_after: None }, "")
}

fn shared_quota() -> Calibration {
    Calibration::SameForEveryKey(shape((429, "quota", false)))
}

fn refuses(refusal: Refusal, confirmed: bool) -> Calibration {
    let (_, _, by_code) = refusal;
    Calibration::Refuses { shape: shape(refusal), in_words: by_code, by_code, confirmed }
}

/// The status is about the credential, so the model does not matter.
fn is_about_the_credential((status, ..): Refusal) -> bool {
    status == 401 || status == 403
}

impl Known {
    fn of(log: &[(Second, Learnt)]) -> Self {
        let mut known = Self::default();
        for (position, (at, event)) in log.iter().enumerate() {
            known.learn(&log[..position], *at, event);
        }
        known
    }

    fn learn(&mut self, earlier: &[(Second, Learnt)], at: Second, event: &Learnt) {
        let before =
            |is: &dyn Fn(&Learnt) -> bool, within: Second| earlier.iter().any(|(other, event)| at - other <= within && is(event));
        let documented = |event: &Learnt| matches!(event, Learnt::Accepted(_, true));
        match event {
            Learnt::MadeUp(model, form, Got::Refusal(refusal), is_check) => {
                let after_acceptance = before(&|event| matches!(event, Learnt::Accepted(other, _) if other == model), COMPARABLE);
                let (status, body, by_code) = *refusal;
                let keys_get_another_401 =
                    |event: &Learnt| matches!(event, Learnt::Refused(of, with) if of == form && (status != 401 || *with != body));
                if !by_code && !after_acceptance && before(&keys_get_another_401, GOOD_FOR) {
                    self.miss(at, Calibration::SameForEveryKey(shape(*refusal)));
                    self.inconclusive.as_mut().unwrap().1 = true;
                    return;
                }
                (self.misses, self.inconclusive) = (0, None);
                if by_code && after_acceptance {
                    self.see_usual(*refusal, at);
                }
                let comparable = |event: &Learnt| matches!(event, Learnt::Accepted(other, _) if other == model || is_about_the_credential(*refusal));
                let confirmed = !is_check && before(&documented, Second::MAX) && before(&comparable, COMPARABLE);
                self.meant = Some(refuses(*refusal, confirmed));
                let stood = self.standing.iter_mut().find(|other| (other.model, other.form) == (*model, *form));
                let stood = stood.filter(|other| *is_check && at < other.at + GOOD_FOR);
                if let Some(stood) = stood
                    && let Some(other) = stood.refusal
                {
                    let (was, _, was_by_code) = other;
                    // A 401 that proves an acceptance outlives what may come to every key now.
                    let proves = was == 401 && (stood.confirmed || was_by_code && stood.after_acceptance);
                    if other == *refusal || proves && status != 401 {
                        stood.checked = Some(at);
                        if other == *refusal {
                            self.meant = Some(refuses(other, stood.confirmed));
                        }
                        return;
                    }
                }
                let checked = is_check.then_some(at);
                self.stand(Stands { at, model, form: *form, refusal: Some(*refusal), after_acceptance, confirmed, checked });
            }
            Learnt::MadeUp(model, form, Got::Yes, is_check) => {
                (self.misses, self.inconclusive) = (0, None);
                self.meant = Some(Calibration::AcceptsAnyone);
                let checked = is_check.then_some(at);
                // Nobody asks a second time after a "yes".
                self.stand(Stands { at, model, form: *form, refusal: None, after_acceptance: false, confirmed: false, checked });
            }
            Learnt::MadeUp(_, _, Got::Shared, _) => self.miss(at, shared_quota()),
            Learnt::MadeUp(_, _, Got::Failure, _) => self.miss(at, Calibration::Inconclusive(Some(503))),
            Learnt::MadeUp(_, _, Got::Silence, _) => self.miss(at, Calibration::Inconclusive(None)),
            Learnt::Accepted(model, is_documented) => {
                self.accepted.push((*model, at));
                if matches!(self.inconclusive, Some((_, true))) {
                    (self.misses, self.inconclusive, self.back_off_until) = (0, None, 0);
                }
                if *is_documented || before(&documented, Second::MAX) {
                    for answer in self.standing.iter_mut().filter(|answer| at - answer.at <= COMPARABLE) {
                        let is_compared = |refusal| answer.model == *model || is_about_the_credential(refusal);
                        answer.confirmed |= answer.refusal.is_some_and(is_compared);
                    }
                }
            }
            Learnt::Refused(..) => {}
            Learnt::Second(model, other) => {
                let latest = self.standing.iter().rposition(|answer| answer.model == *model && answer.after_acceptance);
                let Some(latest) = latest else { return };
                let Stands { at: since, refusal: Some(refusal), .. } = self.standing[latest] else { return };
                if at - since > COMPARABLE {
                    return;
                }
                match other {
                    None => {
                        self.standing[latest].confirmed = true;
                        self.see_usual(refusal, at);
                    }
                    Some(other) => {
                        self.standing.remove(latest);
                        self.miss(at, Calibration::SameForEveryKey(shape(*other)));
                    }
                }
            }
            Learnt::Every(refusal) => {
                let is_it = |answer: &Stands| answer.refusal == Some(*refusal) && !answer.confirmed;
                self.standing.retain(|answer| !is_it(answer));
                let every = Calibration::SameForEveryKey(shape(*refusal));
                let was_doubted = self.inconclusive == Some((every.clone(), true));
                self.miss(at, every);
                self.inconclusive.as_mut().unwrap().1 = was_doubted;
            }
        }
    }

    fn miss(&mut self, at: Second, what: Calibration) {
        self.back_off_until = at + (60 << self.misses.min(20)).min(3600);
        self.misses += 1;
        self.meant = Some(what.clone());
        self.inconclusive = Some((what, false));
    }

    fn see_usual(&mut self, refusal: Refusal, at: Second) {
        self.usual.retain(|(known, _)| *known != refusal);
        self.usual.push((refusal, at));
    }

    fn stand(&mut self, answer: Stands) {
        self.standing.retain(|other| (other.model, other.form) != (answer.model, answer.form) && answer.at < other.at + GOOD_FOR);
        self.standing.push(answer);
    }

    fn calibration(&self, model: &str, question: CalibrationQuestion, now: Second) -> Calibration {
        let tells = |answer: &&Stands| {
            let of_model = answer.model == model;
            now < answer.at + GOOD_FOR
                && match (question, answer.refusal) {
                    (CalibrationQuestion::RefusalNow, _) if answer.checked.is_none_or(|at| now > at + 60) => false,
                    (_, None) => of_model,
                    (
                        CalibrationQuestion::Refusal | CalibrationQuestion::RefusalNow | CalibrationQuestion::Check,
                        Some(refusal),
                    ) => of_model || is_about_the_credential(refusal),
                    (CalibrationQuestion::Acceptance(form), Some((_, body, by_code))) => {
                        let proves = answer.after_acceptance && (by_code || body == "malformed");
                        of_model && form.is_none_or(|form| form == answer.form) && (answer.confirmed || proves)
                    }
                }
        };
        let found = self.standing.iter().filter(tells).max_by_key(|answer| (answer.refusal.is_none(), answer.confirmed));
        match (found, &self.inconclusive) {
            (Some(Stands { refusal: None, .. }), _) => Calibration::AcceptsAnyone,
            (Some(Stands { refusal: Some(refusal), confirmed, .. }), _) => refuses(*refusal, *confirmed),
            (None, Some((inconclusive, _))) if now < self.back_off_until => inconclusive.clone(),
            (None, _) => Calibration::NotAsked,
        }
    }
}

/// Something that can happen, at random.
fn event(random: &mut StdRng, forms: [KeyForm; 2]) -> Learnt {
    let model = *["", "m", "n"].choose(random).unwrap();
    let form = *forms.choose(random).unwrap();
    let refusal = *REFUSALS.choose(random).unwrap();
    match random.random_range(0..20) {
        0..6 => Learnt::Accepted(model, random.random_bool(0.1)),
        6..8 => Learnt::Refused(form, ["no", ""].choose(random).unwrap()),
        8..10 => Learnt::Second(model, random.random_bool(0.5).then_some(refusal)),
        10 => Learnt::Every(refusal),
        _ => {
            let got = match random.random_range(0..8) {
                0..4 => Got::Refusal(refusal),
                4 => Got::Yes,
                5 => Got::Shared,
                6 => Got::Failure,
                _ => Got::Silence,
            };
            Learnt::MadeUp(model, form, got, random.random_bool(0.3))
        }
    }
}

/// Tells the facts of this event. Returns what a made-up key's answer means.
fn tell(facts: &mut RequestFacts, event: &Learnt, at: Duration) -> Option<Calibration> {
    match event {
        Learnt::MadeUp(model, form, got, is_check) => {
            let calibration = match got {
                Got::Refusal(refusal) => refuses(*refusal, false),
                Got::Yes => Calibration::AcceptsAnyone,
                Got::Shared => shared_quota(),
                Got::Failure => Calibration::Inconclusive(Some(503)),
                Got::Silence => Calibration::Inconclusive(None),
            };
            let question = if *is_check { CalibrationQuestion::RefusalNow } else { CalibrationQuestion::Refusal };
            return Some(facts.take_answer((model, *form, question), calibration, at, Duration::from_secs(GOOD_FOR), 1.0));
        }
        Learnt::Accepted(model, is_documented) => facts.take_acceptance(model, *is_documented, at),
        Learnt::Refused(form, body) => facts.take_refusal(*form, shape((401, body, true)).body, at),
        Learnt::Second(model, other) => facts.take_second_answer(model, other.map(shape), at, 1.0),
        Learnt::Every(refusal) => facts.take_same_for_every_key(&shape(*refusal), at, 1.0),
    }
    None
}

/// The facts about an endpoint equal those of a model that keeps every event.
#[test]
fn what_was_learnt_of_an_endpoint_is_what_its_model_says() {
    let mut met: BTreeMap<String, u32> = BTreeMap::new();
    let forms = ["acme-0123456789abcdef", "acme-0123456789ABCDEFGH"].map(|key| KeyForm::of(&Secret::new(key.into())));
    for seed in 0..SCHEDULES {
        let random = &mut StdRng::seed_from_u64(seed);
        let (mut facts, mut log, mut now) = (RequestFacts::default(), Vec::new(), 0);
        for _ in 0..random.random_range(1..20) {
            now += *[1, 30, 61, 300, 600, 601, 3_000, 10_000, 21_600].choose(random).unwrap();
            let event = event(random, forms);
            let meant = tell(&mut facts, &event, Duration::from_secs(now));
            log.push((now, event));
            let known = Known::of(&log);
            if meant.is_some() {
                assert_eq!(meant, known.meant, "seed {seed}: {log:#?}");
            }
            let later = now + *[0, 10, 60, 100, 700, 20_000, 21_600].choose(random).unwrap();
            let at = Duration::from_secs(later);
            let questions = [None, Some(forms[0]), Some(forms[1])].map(CalibrationQuestion::Acceptance);
            let questions = questions.into_iter().chain([
                CalibrationQuestion::Refusal,
                CalibrationQuestion::RefusalNow,
                CalibrationQuestion::Check,
            ]);
            for (model, question) in questions.flat_map(|question| ["", "m", "n"].map(|model| (model, question))) {
                let expected = known.calibration(model, question, later);
                let found = facts.calibration(model, question, at);
                assert_eq!(found, expected, "seed {seed}, at {later}, `{model}` {question:?}: {log:#?}");
                let word = format!("{found:?}").chars().take_while(|c| c.is_alphanumeric()).collect::<String>();
                let contrast = matches!(found, Calibration::Refuses { confirmed: true, .. });
                *met.entry(format!("{word} {contrast}")).or_default() += 1;
                // No request for a known fact, nor too soon after an inconclusive one.
                let is_due = found == Calibration::NotAsked && later >= known.back_off_until;
                assert_eq!(facts.is_due(model, question, at), is_due, "seed {seed}, at {later}: {log:#?}");
            }
            let is_recent = |since: Second| later - since <= GOOD_FOR;
            let refusals = facts.refusals(at);
            let usual: Vec<_> =
                known.usual.iter().filter(|(_, since)| is_recent(*since)).map(|(usual, _)| shape(*usual)).collect();
            assert_eq!(refusals.usual, usual, "seed {seed}, at {later}: {log:#?}");
            let for_every_key = match &known.inconclusive {
                Some((Calibration::SameForEveryKey(shape), _)) if later < known.back_off_until => Some(shape.clone()),
                _ => None,
            };
            assert_eq!(refusals.for_every_key, for_every_key, "seed {seed}, at {later}: {log:#?}");
            let stands = |answer: &&Stands| later < answer.at + GOOD_FOR && answer.refusal.is_some();
            let refused: Vec<_> = known.standing.iter().filter(stands).map(|answer| answer.form).collect();
            assert_eq!(refusals.forms, refused, "seed {seed}, at {later}: {log:#?}");
            let has_accepted = known.accepted.iter().any(|(_, since)| is_recent(*since));
            assert_eq!(facts.has_accepted(at), has_accepted, "seed {seed}, at {later}: {log:#?}");
        }
    }
    assert!(met.len() == 6 && met.values().all(|count| *count > 100), "{met:?}");
}
