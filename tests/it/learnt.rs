//! What is learnt about an endpoint from its answers to made-up keys, against a model that keeps every event, over random
//! schedules.

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

/// One thing that happens to the facts of one request, at a second.
#[derive(Debug, Clone)]
enum Learnt {
    /// A made-up key of this form, for this model, got: 0 a 401 by code, 1 a 404, 2 a "yes", 3 a 503, 4 nothing.
    /// The last: it was sent because a key got an unusual refusal.
    MadeUp(&'static str, KeyForm, u8, bool),
    Accepted(&'static str),
    /// A real key of this form was refused as a made-up one is by code.
    Refused(KeyForm),
    /// The key that was accepted was asked again: once more accepted, or given this.
    Second(&'static str, Option<u16>),
}

/// A made-up key's answer that stands.
#[derive(Debug, Clone, Copy)]
struct Stands {
    at: u64,
    model: &'static str,
    form: KeyForm,
    kind: u8,
    after_acceptance: bool,
    confirmed: bool,
    checked: Option<u64>,
}

const GOOD_FOR: u64 = 6 * 3600;

fn learnt_shape(status: u16) -> ResponseShape {
    ResponseShape::of(Answer { status, body: b"no", truncated: false, page: false, retry_after: None }, "")
}

/// What is known of it at that time, computed from all events.
fn learnt_by(log: &[(u64, Learnt)], model: &str, question: CalibrationQuestion, now: u64) -> Calibration {
    let mut standing: Vec<Stands> = Vec::new();
    let (mut misses, mut back_off_until) = (0_u32, 0);
    // The last inconclusive answer, and whether the next key that is accepted shows that it was none.
    let mut inconclusive: Option<(Calibration, bool)> = None;
    let mut miss = |at: u64, misses: &mut u32, inconclusive: &mut Option<(Calibration, bool)>, what| {
        back_off_until = at + (60 << (*misses).min(20)).min(3600);
        *misses += 1;
        *inconclusive = Some((what, false));
    };
    for (position, (at, event)) in log.iter().enumerate() {
        let before = |is: &dyn Fn(&Learnt) -> bool, within: u64| {
            log[..position].iter().any(|(other, event)| at - other <= within && is(event))
        };
        match event {
            Learnt::MadeUp(model, form, kind @ 0..=2, is_check) => {
                let after_acceptance = before(&|event| matches!(event, Learnt::Accepted(other) if other == model), 600);
                let keys_get_a_401 = before(&|event| matches!(event, Learnt::Refused(other) if other == form), GOOD_FOR);
                if *kind == 1 && !after_acceptance && keys_get_a_401 {
                    miss(*at, &mut misses, &mut inconclusive, Calibration::SameForEveryKey(learnt_shape(404)));
                    inconclusive.as_mut().unwrap().1 = true;
                    continue;
                }
                let checked = is_check.then_some(*at);
                let same = |other: &&mut Stands| {
                    (other.model, other.form, other.kind) == (model, *form, *kind) && *kind < 2 && *at < other.at + GOOD_FOR
                };
                if let (Some(_), Some(same)) = (checked, standing.iter_mut().find(same)) {
                    same.checked = checked;
                    (misses, inconclusive) = (0, None);
                    continue;
                }
                // A 401 that proves an acceptance outlives what may come to every key now.
                let proof = |other: &&mut Stands| {
                    (other.model, other.form, other.kind) == (model, *form, 0)
                        && (other.confirmed || other.after_acceptance)
                        && *at < other.at + GOOD_FOR
                };
                if let (Some(_), 1, Some(proof)) = (checked, kind, standing.iter_mut().find(proof)) {
                    proof.checked = checked;
                    (misses, inconclusive) = (0, None);
                    continue;
                }
                standing.retain(|other| (other.model, other.form) != (*model, *form) && *at < other.at + GOOD_FOR);
                standing.push(Stands { at: *at, model, form: *form, kind: *kind, after_acceptance, confirmed: false, checked });
                (misses, inconclusive) = (0, None);
            }
            Learnt::MadeUp(_, _, kind, _) => {
                miss(*at, &mut misses, &mut inconclusive, Calibration::Inconclusive((*kind == 3).then_some(503)));
            }
            Learnt::Second(model, other) => {
                let latest = standing.iter().rposition(|answer| answer.model == *model && answer.after_acceptance);
                if let Some(latest) = latest
                    && standing[latest].kind != 2
                    && at - standing[latest].at <= 600
                {
                    match other {
                        None => standing[latest].confirmed = true,
                        Some(other) => {
                            standing.remove(latest);
                            miss(*at, &mut misses, &mut inconclusive, Calibration::SameForEveryKey(learnt_shape(*other)));
                        }
                    }
                }
            }
            Learnt::Accepted(_) if matches!(inconclusive, Some((_, true))) => (misses, inconclusive) = (0, None),
            Learnt::Accepted(_) | Learnt::Refused(_) => {}
        }
    }
    let tells = |answer: &&Stands| {
        let of_model = answer.model == model;
        now < answer.at + GOOD_FOR
            && match (question, answer.kind) {
                (CalibrationQuestion::RefusalNow, _) if answer.checked.is_none_or(|at| now > at + 60) => false,
                (_, 2) => of_model,
                (CalibrationQuestion::Refusal | CalibrationQuestion::RefusalNow | CalibrationQuestion::Check, kind) => {
                    of_model || kind == 0
                }
                (CalibrationQuestion::Acceptance(form), kind) => {
                    of_model
                        && form.is_none_or(|form| form == answer.form)
                        && (answer.confirmed || kind == 0 && answer.after_acceptance)
                }
            }
    };
    let found = standing.iter().filter(tells).max_by_key(|answer| (answer.kind == 2, answer.confirmed));
    match (found, inconclusive) {
        (Some(Stands { kind: 2, .. }), _) => Calibration::AcceptsAnyone,
        (Some(Stands { kind, confirmed, .. }), _) => {
            let by_code = *kind == 0;
            let shape = learnt_shape(if by_code { 401 } else { 404 });
            Calibration::Refuses { shape, in_words: by_code, by_code, confirmed: *confirmed }
        }
        (None, Some((inconclusive, _))) if now < back_off_until => inconclusive,
        (None, _) => Calibration::NotAsked,
    }
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
            now += *[1, 30, 61, 300, 601, 3_000, 10_000, 22_000].choose(random).unwrap();
            let model = *["", "m", "n"].choose(random).unwrap();
            let form = *forms.choose(random).unwrap();
            let at = Duration::from_secs(now);
            match random.random_range(0..10) {
                0..3 => {
                    facts.take_acceptance(model, false, at);
                    log.push((now, Learnt::Accepted(model)));
                }
                3 => {
                    facts.take_refusal(form, learnt_shape(401).body, at);
                    log.push((now, Learnt::Refused(form)));
                }
                4 => {
                    let other = *[None, None, Some(401), Some(404)].choose(random).unwrap();
                    facts.take_second_answer(model, other.map(learnt_shape), at, 1.0);
                    log.push((now, Learnt::Second(model, other)));
                }
                _ => {
                    let kind = random.random_range(0..5);
                    let refuses = |status, by_code| Calibration::Refuses {
                        shape: learnt_shape(status),
                        in_words: by_code,
                        by_code,
                        confirmed: false,
                    };
                    let calibration = match kind {
                        0 => refuses(401, true),
                        1 => refuses(404, false),
                        2 => Calibration::AcceptsAnyone,
                        3 => Calibration::Inconclusive(Some(503)),
                        _ => Calibration::Inconclusive(None),
                    };
                    let is_check = random.random_bool(0.3);
                    let question = if is_check { CalibrationQuestion::RefusalNow } else { CalibrationQuestion::Refusal };
                    facts.take_answer((model, form, question), calibration, at, Duration::from_secs(GOOD_FOR), 1.0);
                    log.push((now, Learnt::MadeUp(model, form, kind, is_check)));
                }
            }
            let later = now + *[0, 10, 100, 700, 20_000].choose(random).unwrap();
            let questions = [None, Some(forms[0]), Some(forms[1])].map(CalibrationQuestion::Acceptance);
            let questions = questions.into_iter().chain([
                CalibrationQuestion::Refusal,
                CalibrationQuestion::RefusalNow,
                CalibrationQuestion::Check,
            ]);
            for (model, question) in questions.flat_map(|question| ["", "m", "n"].map(|model| (model, question))) {
                let expected = learnt_by(&log, model, question, later);
                let found = facts.calibration(model, question, Duration::from_secs(later));
                assert_eq!(found, expected, "seed {seed}, at {later}, `{model}` {question:?}: {log:#?}");
                let word = format!("{found:?}").chars().take_while(|c| c.is_alphanumeric()).collect::<String>();
                let contrast = matches!(found, Calibration::Refuses { confirmed: true, .. });
                *met.entry(format!("{word} {contrast}")).or_default() += 1;
                // No request for a known fact, nor too soon after an inconclusive one.
                assert!(!facts.is_due(model, question, Duration::from_secs(later)) || found == Calibration::NotAsked);
            }
        }
    }
    assert!(met.len() == 6 && met.values().all(|count| *count > 100), "{met:?}");
}
