//! The plan of a probe without a network: which requests, in which order and header, and the result.

use std::{
    cell::Cell,
    sync::{Arc, LazyLock},
    time::Duration,
};

use HeaderFamily::{ApiKey, Bearer, XApiKey};
use byok_gate::{
    core::{
        catalogue::Catalogue,
        classify::{Answer, Calibration, Finding, ProbeResponse, calibration_of, read},
        endpoint::{Call, Endpoint, Preference, Target, target},
        endpoint_facts::{CalibrationQuestion, EndpointFacts, KnownRefusals},
        made_up_key::KeyForm,
        probe_plan::{Client, Lesson, Next, ProbePlan, Requests},
        registry::Registry,
        response_shape::ResponseShape,
    },
    domain::{
        protocol::{HeaderFamily, Surface},
        secret::Secret,
        verdict::{Cause, MadeUpKey, Unreached, Verdict, Withheld},
    },
};

const LIST: (u16, &str) = (200, r#"{"data":[{"id":"m"}]}"#);
const CHAT: (u16, &str) = (200, r#"{"choices":[]}"#);
const RESPONSE: (u16, &str) = (200, r#"{"output":[]}"#);
const DEAD: (u16, &str) = (401, r#"{"error":{"code":"invalid_api_key"}}"#);
const SCOPE: (u16, &str) = (403, r#"{"error":{"code":"missing_scope"}}"#);
const SCOPES_IN_WORDS: (u16, &str) = (401, r#"{"error":{"message":"Missing scopes: x"}}"#);
const PAGE: (u16, &str) = (200, "<html>app</html>");
/// Nothing comes.
const SILENCE: (u16, &str) = (0, "");

/// Whose key a request carries.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Key {
    Real,
    MadeUp,
    None,
}
use Key::{MadeUp, Real};

type World<'w> = &'w dyn Fn(Surface, &[HeaderFamily], Key) -> (u16, &'static str);

/// The requests, in order, and the result.
struct Came {
    finding: Finding,
    asked: Vec<String>,
    lessons: Vec<Lesson>,
}

static EMBEDDED: LazyLock<Catalogue> = LazyLock::new(|| Catalogue::embedded().unwrap().value);

fn endpoint(url: &str, protocol: &str) -> Arc<Endpoint> {
    endpoint_by(&EMBEDDED, url, protocol)
}

fn endpoint_by(catalogue: &Catalogue, url: &str, protocol: &str) -> Arc<Endpoint> {
    let registry = format!(
        "schema_version: 1\nproviders:\n  - {{name: house, display_name: x, protocol: {protocol}, auth_mode: x, auth_env: [X], \
         model_prefix_match: x, base_url_template: \"{url}\"}}\nruntimes: {{r: {{providers: [{{name: house}}]}}}}\n"
    );
    let registry = Registry::parse("test", registry.as_bytes(), &|_| None).unwrap().value;
    target(&registry.providers()[0], catalogue, "m").unwrap().endpoint
}

fn response(call: &Call, (status, body): (u16, &str)) -> ProbeResponse {
    if (status, body) == SILENCE {
        return ProbeResponse::TimedOut;
    }
    let answer = Answer { status, body: body.as_bytes(), truncated: false, page: false, retry_after: None };
    ProbeResponse::Answer { reading: read(answer, &call.probe), shape: ResponseShape::of(answer, ""), retry_after: None }
}

fn run(target: &Target, facts: &EndpointFacts, confirmed: bool, world: World<'_>) -> Came {
    run_knowing(target, facts, Requests::UNKNOWN, confirmed, world)
}

/// The same where a key was accepted at the list before. So it does not refuse every key.
fn run_beside_a_good_list(target: &Target, world: World<'_>) -> Came {
    let requests = Requests { has_accepted: &|call, _| call.probe.surface == Surface::Models, ..Requests::UNKNOWN };
    run_knowing(target, &EndpointFacts::default(), requests, false, world)
}

fn run_knowing(target: &Target, facts: &EndpointFacts, requests: Requests<'_>, confirmed: bool, world: World<'_>) -> Came {
    let client = Client { preference: target.preference, usual_header: target.endpoint.client_header, ..Client::default() };
    let mut plan = ProbePlan::new(&target.calls, client, facts, requests);
    let mut asked = Vec::new();
    let finding = loop {
        assert!(asked.len() < 40, "no end: {asked:?}");
        match plan.proceed() {
            Next::Done(finding) => break finding,
            Next::Ask { call, families, .. } => {
                let headers: Vec<&str> = families.iter().map(|family| family.as_str()).collect();
                asked.push(format!("{} {}", call.probe.surface.as_str(), headers.join("+")));
                plan.take_response(response(call, world(call.probe.surface, &families, Real)));
            }
            Next::Calibrate { call, families, .. } => {
                let calibration = match response(call, world(call.probe.surface, &families, MadeUp)) {
                    ProbeResponse::Answer { reading, shape, .. } => calibration_of(&reading, &shape),
                    _ => Calibration::Inconclusive(None),
                };
                plan.take_calibration(&match calibration {
                    Calibration::Refuses { shape, in_words, by_code, .. } => {
                        Calibration::Refuses { shape, in_words, by_code, confirmed }
                    }
                    other => other,
                });
            }
            Next::Keyless { call, .. } => match response(call, world(call.probe.surface, &[], Key::None)) {
                ProbeResponse::Answer { shape, .. } => plan.take_keyless(Some(&shape)),
                _ => plan.take_keyless(None),
            },
        }
    };
    Came { finding, asked, lessons: plan.into_lessons() }
}

#[track_caller]
fn comes_to(world: World<'_>, verdict: Verdict, cause: Option<Cause>, asked: &[&str]) -> Came {
    let target = Target::of(&endpoint("https://llm.acme.example/v1", "openai"), "m");
    let came = run(&target, &EndpointFacts::default(), false, world);
    assert_eq!((came.finding.verdict, came.finding.cause), (verdict, cause), "{:?} {:?}", came.asked, came.finding);
    assert_eq!(came.asked, asked);
    came
}

const OWN: &str = "models bearer";
const OTHERS: &str = "models x-api-key+api-key";
const CALLED: &str = "chat-completions bearer";
/// After a 401 of the list, in all headers at once.
const CALLED_IN_ALL: &str = "chat-completions bearer+x-api-key+api-key";

#[track_caller]
fn comes_to_in_some_way(world: World<'_>, verdict: Verdict) {
    let target = Target::of(&endpoint("https://llm.acme.example/v1", "openai"), "m");
    let came = run(&target, &EndpointFacts::default(), false, world);
    assert_eq!(came.finding.verdict, verdict, "{:?} {:?}", came.asked, came.finding);
}

#[track_caller]
fn comes_to_because(world: World<'_>, verdict: Verdict, cause: Cause) {
    let target = Target::of(&endpoint("https://llm.acme.example/v1", "openai"), "m");
    let came = run(&target, &EndpointFacts::default(), false, world);
    assert_eq!((came.finding.verdict, came.finding.cause), (verdict, Some(cause)), "{:?} {:?}", came.asked, came.finding);
}

#[test]
fn a_refusal_is_never_lost() {
    for later in [
        (429, "slow"),
        (500, "oops"),
        (400, "{}"),
        (404, ""),
        (401, "who"),
        (403, r#"{"error":{"code":"x"}}"#),
        (402, r#"{"error":{}}"#),
        PAGE,
        SILENCE,
    ] {
        let world = |_, families: &[HeaderFamily], _| if families == [Bearer] { DEAD } else { later };
        comes_to_in_some_way(&world, Verdict::Invalid);
        // Nor where the request that calls a model tells nothing: then the other headers are asked at the list.
        let world = |surface, families: &[HeaderFamily], _| match surface {
            Surface::Models if families == [Bearer] => DEAD,
            _ => later,
        };
        let target = Target::of(&endpoint("https://llm.acme.example/v1", "openai"), "m");
        let came = run(&target, &EndpointFacts::default(), false, &world);
        assert_eq!(came.finding.verdict, Verdict::Invalid, "{later:?}");
    }
    // But for a "yes" that counts.
    let yes = |surface| if surface == Surface::Models { LIST } else { CHAT };
    let world = |surface, families: &[HeaderFamily], key| {
        if families.contains(&ApiKey) && key == Real { yes(surface) } else { DEAD }
    };
    let alone = [CALLED, "chat-completions x-api-key", "chat-completions api-key"];
    let came = comes_to(&world, Verdict::Valid, None, &[&[OWN, CALLED_IN_ALL], &alone[..]].concat());
    assert_eq!((came.finding.family, came.finding.wrong_header), (Some(ApiKey), true));
    assert_eq!(came.lessons, [Lesson::Family { right: ApiKey, wrong: vec![Bearer] }]);
    // No client sends all headers together.
    let world = |surface, families: &[HeaderFamily], key| if families.len() > 1 && key == Real { yes(surface) } else { DEAD };
    comes_to_in_some_way(&world, Verdict::Invalid);
    // A list that says yes in another header, and completions that do not: the list looks at the key's form alone.
    for later in [DEAD, (401, "no"), (403, "no"), (400, "{}"), (404, ""), (429, "slow"), (500, "oops"), PAGE, SILENCE] {
        let world = |surface, families: &[HeaderFamily], key| match (surface, key) {
            _ if families == [Bearer] => DEAD,
            (Surface::Models, Real) => LIST,
            (Surface::Models, _) => DEAD,
            _ => later,
        };
        let target = Target::of(&endpoint("https://llm.acme.example/v1", "openai"), "m");
        let came = run(&target, &EndpointFacts::default(), false, &world);
        assert_eq!((came.finding.verdict, came.lessons), (Verdict::Invalid, vec![]), "{later:?} {:?}", came.asked);
    }
    for made_up in [CHAT, (503, "busy"), (429, "slow")] {
        let world = |surface, families: &[HeaderFamily], key| match (surface, key) {
            _ if families == [Bearer] => DEAD,
            (Surface::Models, Real) => LIST,
            (Surface::Models, _) => DEAD,
            (_, Real) => CHAT,
            _ => made_up,
        };
        let came =
            run(&Target::of(&endpoint("https://llm.acme.example/v1", "openai"), "m"), &EndpointFacts::default(), false, &world);
        assert_eq!(came.finding.verdict, Verdict::Invalid, "{made_up:?} {:?}", came.asked);
    }
    // Which one it was may remain unknown: the key is good.
    let world = |surface, families: &[HeaderFamily], key| match (surface, families, key) {
        (_, [Bearer], _) | (_, _, MadeUp | Key::None) => DEAD,
        (_, [_], Real) => SILENCE,
        (surface, ..) => yes(surface),
    };
    comes_to(&world, Verdict::Valid, None, &[OWN, CALLED_IN_ALL, CALLED, "chat-completions x-api-key"]);
    // One that does not count changes nothing.
    let world = |_, families: &[HeaderFamily], _| if families == [Bearer] { DEAD } else { LIST };
    comes_to_in_some_way(&world, Verdict::Invalid);
}

/// A list may look at a key's form alone: what it accepts in another header than the client's counts where a model is called, too.
#[test]
fn an_acceptance_in_another_header_is_confirmed_where_a_model_is_called() {
    let target = Target::of(&endpoint("https://llm.acme.example/v1", "openai"), "m");
    let world = |called: (u16, &'static str)| {
        move |surface, families: &[HeaderFamily], key| match (surface, key) {
            (Surface::Models, Real) if families.contains(&ApiKey) => LIST,
            (Surface::ChatCompletions, Real) if families == [ApiKey] => called,
            _ => DEAD,
        }
    };
    let walk = [OWN, OTHERS, "models x-api-key", "models api-key", "chat-completions api-key"];
    let came = run_beside_a_good_list(&target, &world(CHAT));
    let Finding { verdict, family, wrong_header, .. } = came.finding;
    assert_eq!((verdict, family, wrong_header), (Verdict::Valid, Some(ApiKey), true));
    assert_eq!(came.asked, walk);
    assert_eq!(came.lessons, [Lesson::Family { right: ApiKey, wrong: vec![Bearer] }]);
    for called in [(500, "oops"), (429, "slow"), (404, ""), (400, "{}"), SILENCE] {
        let came = run_beside_a_good_list(&target, &world(called));
        let Finding { verdict, family, cost_money, .. } = came.finding;
        assert_eq!((verdict, family, cost_money), (Verdict::Invalid, Some(Bearer), true), "{called:?}");
        assert_eq!((came.asked, came.lessons), (walk.map(str::to_owned).to_vec(), vec![]), "{called:?}");
    }
    // Where no request that calls a model takes this header, the list's word is all there is.
    let rows = "catalogue_version: 1\nhosts:\n  - host: llm.acme.example\n    vendor: acme\n    probes:\n      \
                - {name: models, path: '{base}/models', auth: [bearer, api-key], expect: {data: list}}\n      \
                - {name: completion, method: POST, path: '{base}/chat/completions', auth: [bearer], body: {model: '{model}'}, \
                expect: {choices: list}}\n";
    let catalogue = EMBEDDED.overlaid("test", rows.as_bytes()).unwrap().value;
    let target = Target::of(&endpoint_by(&catalogue, "https://llm.acme.example/v1", "openai"), "m");
    let came = run_beside_a_good_list(&target, &world(DEAD));
    assert_eq!((came.finding.verdict, came.asked), (Verdict::Valid, vec![OWN.to_owned(), "models api-key".to_owned()]));
    // Two keys in one request may be what is refused: then each header is sent alone.
    let target = Target::of(&endpoint("https://llm.acme.example/v1", "openai"), "m");
    let world = |surface, families: &[HeaderFamily], key| match (surface, families, key) {
        (_, [_, _, ..], _) => (400, "one key only"),
        (Surface::Models, [ApiKey], Real) => LIST,
        (_, [ApiKey], Real) => CHAT,
        _ => DEAD,
    };
    let came = run_beside_a_good_list(&target, &world);
    assert_eq!((came.finding.verdict, came.asked), (Verdict::Valid, walk.map(str::to_owned).to_vec()));
    // A "yes" that the key gets no second time is none.
    let target = Target::of(&endpoint("https://llm.acme.example/v1", "openai"), "m");
    let asked = Cell::new(0);
    let world = |_, families: &[HeaderFamily], key| {
        asked.set(asked.get() + i32::from(key == Real));
        match (families, key) {
            ([Bearer], _) => DEAD,
            (_, Real) if asked.get() == 2 => LIST,
            _ => (400, "busy"),
        }
    };
    let came = run_beside_a_good_list(&target, &world);
    assert_eq!((came.finding.verdict, came.asked), (Verdict::Invalid, [OWN, OTHERS, OTHERS].map(str::to_owned).to_vec()));
}

/// A row may say that an answer tells nothing. Then the next request is sent.
#[test]
fn an_answer_that_tells_nothing_does_not_end_it() {
    let rows = "catalogue_version: 1\nhosts:\n  - host: llm.acme.example\n    vendor: acme\n    probes:\n      \
                - {name: models, path: '{base}/models', auth: [bearer], expect: {data: list}, signals: [{status: [418], \
                verdict: UNEXPECTED_RESPONSE}]}\n      \
                - {name: completion, method: POST, path: '{base}/chat/completions', auth: [bearer], body: {model: '{model}'}, \
                expect: {choices: list}}\n";
    let catalogue = EMBEDDED.overlaid("test", rows.as_bytes()).unwrap().value;
    let target = Target::of(&endpoint_by(&catalogue, "https://llm.acme.example/v1", "openai"), "m");
    let world = |surface, _: &[HeaderFamily], key| match (surface, key) {
        (Surface::Models, _) => (418, "{}"),
        (_, Real) => CHAT,
        _ => DEAD,
    };
    let came = run(&target, &EndpointFacts::default(), false, &world);
    assert_eq!((came.finding.verdict, came.asked.len()), (Verdict::Valid, 2), "{:?}", came.asked);
}

/// Only where a model is called, an open list is asked whether every key is refused by now.
#[test]
fn a_list_is_not_asked_about_another() {
    let rows = "catalogue_version: 1\nhosts:\n  - host: llm.acme.example\n    vendor: acme\n    probes:\n      \
                - {name: models, path: '{base}/models', auth: [bearer], expect: {data: list}}\n      \
                - {name: me, path: '{base}/me', auth: [bearer], expect: {id: text}}\n";
    let catalogue = EMBEDDED.overlaid("test", rows.as_bytes()).unwrap().value;
    let target = Target::of(&endpoint_by(&catalogue, "https://llm.acme.example/v1", "openai"), "m");
    let world = |surface, _: &[HeaderFamily], _| if surface == Surface::Models { LIST } else { (401, "no") };
    let came = run(&target, &EndpointFacts::default(), false, &world);
    assert_eq!((came.finding.verdict, came.asked.len()), (Verdict::Invalid, 2), "{:?}", came.asked);
}

/// What the list refused may be known where a model is called.
#[test]
fn a_refusal_of_the_list_yields_to_a_clear_word_on_the_key() {
    let unpaid = (402, r#"{"error":{"code":"insufficient_credits"}}"#);
    let world = |surface, _: &[HeaderFamily], _| if surface == Surface::Models { DEAD } else { unpaid };
    comes_to(&world, Verdict::QuotaExhausted, Some(Cause::CommonCode), &[OWN, CALLED_IN_ALL, CALLED]);
    let world = |surface, _: &[HeaderFamily], key| match (surface, key) {
        (Surface::Models, _) => DEAD,
        (_, Real) => (403, r#"{"error":{"code":"no"}}"#),
        _ => (403, r#"{"error":{"code":"other"}}"#),
    };
    comes_to_in_some_way(&world, Verdict::Forbidden);
    // One that only looks like that of a made-up key counts by a second one alone.
    let world = |surface, _: &[HeaderFamily], key| match (surface, key) {
        (Surface::Models, Key::None) => (500, "oops"),
        (Surface::Models, _) => (400, r#"{"error":{"code":"x"}}"#),
        _ => (429, "slow"),
    };
    comes_to(&world, Verdict::RateLimited, Some(Cause::Status), &[OWN, CALLED]);
}

/// Where a model is called, a key that gets another answer than a made-up one is known. So the list refuses every key.
#[test]
fn what_the_list_refused_may_be_known_where_a_model_is_called() {
    let session = (401, r#"{"error":"session required"}"#);
    let world = |real, made_up| {
        move |surface, _: &[HeaderFamily], key| match (surface, key) {
            (Surface::Models, _) => session,
            (_, Real) => real,
            (_, MadeUp) => made_up,
            (_, Key::None) => (401, r#"{"error":"no key"}"#),
        }
    };
    let parameter = (400, r#"{"error":{"message":"Unsupported parameter: max_tokens","code":"unsupported_parameter"}}"#);
    let account = (400, r#"{"error":{"message":"this account is closed","code":"closed"}}"#);
    for made_up in [DEAD, (401, "who"), (403, "no")] {
        comes_to_because(&world(parameter, made_up), Verdict::UnexpectedResponse, Cause::RequestRefused);
        comes_to_because(&world(account, made_up), Verdict::UnexpectedResponse, Cause::RequestRefused);
    }
    // What speaks of the account may be one more way to refuse the key.
    for made_up in [(400, r#"{"error":"bad key"}"#), (404, r#"{"error":"no such account"}"#)] {
        comes_to_because(&world(parameter, made_up), Verdict::UnexpectedResponse, Cause::RequestRefused);
        comes_to_because(&world(account, made_up), Verdict::Invalid, Cause::Status);
    }
    // Nothing is known of how made-up keys are answered there.
    for made_up in [(503, "busy"), (429, "slow"), SILENCE] {
        comes_to_because(&world(parameter, made_up), Verdict::Invalid, Cause::Status);
    }
}

/// A finding tells in which header the key was sent, whether the answer depends on the model, and whether it cost money.
#[test]
fn a_finding_tells_what_was_asked() {
    let target = Target::of(&endpoint("https://llm.acme.example/v1", "openai"), "m");
    let result = |finding: Finding| (finding.verdict, finding.family, finding.about_model, finding.cost_money);
    let came = run_beside_a_good_list(&target, &|_, _, _| DEAD);
    assert_eq!(result(came.finding), (Verdict::Invalid, Some(Bearer), false, false));
    let came =
        run(&target, &EndpointFacts::default(), false, &|surface, _, _| if surface == Surface::Models { LIST } else { DEAD });
    assert_eq!(result(came.finding), (Verdict::Invalid, Some(Bearer), true, true));
    // The list's word counts, and the model was asked for nothing.
    let world = |surface, _: &[HeaderFamily], _| if surface == Surface::Models { (500, "oops") } else { (404, "") };
    let came = run(&target, &EndpointFacts::default(), false, &world);
    assert_eq!(result(came.finding), (Verdict::ProviderError, Some(Bearer), true, true));
    for (list, verdict) in [(LIST, Verdict::NotCalibrated), (DEAD, Verdict::Invalid)] {
        let world = |surface, _: &[HeaderFamily], _| if surface == Surface::Models { list } else { SILENCE };
        let finding = run(&target, &EndpointFacts::default(), false, &world).finding;
        assert_eq!((finding.verdict, finding.cost_money), (verdict, true));
    }
    let mut plan = ProbePlan::new(&target.calls, Client::default(), &EndpointFacts::default(), Requests::UNKNOWN);
    plan.take_response(ProbeResponse::Exhausted);
    let Next::Done(finding) = plan.proceed() else { panic!("not the end") };
    assert_eq!((finding.verdict, finding.withheld), (Verdict::NotAttempted, Some(Withheld::Fault)));
}

/// The caller waits as long as the provider asks for.
#[test]
fn a_wait_is_passed_on() {
    let target = Target::of(&endpoint("https://llm.acme.example/v1", "openai"), "m");
    let wait = Some(Duration::from_secs(7));
    for (answer, expected) in [
        ((429, "slow"), Verdict::RateLimited),
        ((503, "busy"), Verdict::ProviderError),
        ((402, r#"{"error":{}}"#), Verdict::QuotaExhausted),
        ((402, r#"{"error":{"code":"insufficient_credits"}}"#), Verdict::QuotaExhausted),
    ] {
        let mut plan = ProbePlan::new(&target.calls, Client::default(), &EndpointFacts::default(), Requests::UNKNOWN);
        let finding = loop {
            match plan.proceed() {
                Next::Done(finding) => break finding,
                Next::Ask { call, .. } => {
                    let ProbeResponse::Answer { reading, shape, .. } = response(call, answer) else { unreachable!() };
                    // The list asks for it, and the request that calls a model gets no answer.
                    plan.take_response(match call.probe.surface {
                        Surface::Models => ProbeResponse::Answer { reading, shape, retry_after: wait },
                        _ => ProbeResponse::TimedOut,
                    });
                }
                Next::Calibrate { .. } => plan.take_calibration(&Calibration::Inconclusive(None)),
                Next::Keyless { .. } => plan.take_keyless(None),
            }
        };
        assert_eq!((finding.verdict, finding.retry_after), (expected, wait), "{answer:?}");
    }
}

/// What a made-up key is sent for decides how old an answer to it may be.
#[test]
fn each_question_is_asked_for_what_it_decides() {
    let target = Target::of(&endpoint("https://llm.acme.example/v1", "openai"), "m");
    let form = Some(KeyForm::of(&Secret::new("made-up-key".to_owned())));
    let questions = |list: (u16, &str), called: (u16, &str)| {
        let client = Client { key_form: form, ..Client::default() };
        let mut plan = ProbePlan::new(&target.calls, client, &EndpointFacts::default(), Requests::UNKNOWN);
        let mut questions = Vec::new();
        loop {
            match plan.proceed() {
                Next::Done(_) => break questions,
                Next::Ask { call, .. } => {
                    plan.take_response(response(call, if call.probe.surface == Surface::Models { list } else { called }));
                }
                Next::Calibrate { question, .. } => {
                    questions.push(question);
                    plan.take_calibration(&Calibration::AcceptsAnyone);
                }
                Next::Keyless { .. } => plan.take_keyless(None),
            }
        }
    };
    let (own_form, any) = (CalibrationQuestion::Acceptance(form), CalibrationQuestion::Acceptance(None));
    assert_eq!(questions(LIST, CHAT), [own_form, any]);
    assert_eq!(questions((400, "{}"), CHAT), [CalibrationQuestion::Refusal, any]);
}

#[test]
fn a_refusal_on_a_later_rung_outranks_a_list_that_accepts_anyone() {
    let world = |surface, _: &[HeaderFamily], _| if surface == Surface::Models { LIST } else { DEAD };
    comes_to(
        &world,
        Verdict::Invalid,
        Some(Cause::CommonCode),
        &[OWN, "chat-completions bearer", "chat-completions x-api-key+api-key"],
    );
    // No answer there takes nothing away from it.
    let world = |surface, _: &[HeaderFamily], _| if surface == Surface::Models { LIST } else { SILENCE };
    let came = comes_to(&world, Verdict::NotCalibrated, Some(Cause::AcceptsAnyone), &[OWN, "chat-completions bearer"]);
    assert_eq!(came.finding.made_up, MadeUpKey::Accepted);
    let world = |_, _: &[HeaderFamily], key| if key == MadeUp { (503, "") } else { LIST };
    comes_to(&world, Verdict::NotCalibrated, Some(Cause::MadeUpKeyUntold), &[OWN, "chat-completions bearer"]);
    // Only a list that is known to accept anyone is asked again, whether every key is refused by now.
    let world = |surface, _: &[HeaderFamily], key| match (surface, key) {
        (Surface::Models, MadeUp) => (503, ""),
        (Surface::Models, _) => LIST,
        _ => (401, "no"),
    };
    comes_to(&world, Verdict::Invalid, Some(Cause::AsAMadeUpKey), &[OWN, CALLED, "chat-completions x-api-key+api-key"]);
}

#[test]
fn a_401_that_is_no_usual_refusal_counts_unless_made_up_keys_get_it_by_now() {
    const BANNED: (u16, &str) = (401, r#"{"error":{"message":"come back tomorrow"}}"#);
    let target = Target::of(&endpoint("https://llm.acme.example/v1", "openai"), "m");
    let shape = |answer: (u16, &str)| match response(&target.calls[0], answer) {
        ProbeResponse::Answer { shape, .. } => shape,
        _ => unreachable!(),
    };
    let unknown = (401, r#"{"error":{"message":"unknown key"}}"#);
    // What the key gets from the list, and where a model is called.
    let come_by = |usual: &[ResponseShape],
                   for_every_key: Option<ResponseShape>,
                   [at_list, at_model]: [(u16, &'static str); 2],
                   made_up: (u16, &'static str)| {
        let refusals = |call: &Call, _| match call.probe.surface {
            Surface::Models => {
                KnownRefusals { usual: usual.to_vec(), for_every_key: for_every_key.clone(), ..KnownRefusals::default() }
            }
            _ => KnownRefusals::default(),
        };
        let requests = Requests { has_accepted: &|_, _| true, refusals: &refusals, ..Requests::UNKNOWN };
        let client = Client { usual_header: target.endpoint.client_header, ..Client::default() };
        let mut plan = ProbePlan::new(&target.calls, client, &EndpointFacts::default(), requests);
        let mut questions = Vec::new();
        loop {
            match plan.proceed() {
                Next::Done(finding) => break (finding.verdict, questions),
                Next::Ask { call, .. } => {
                    let real = if call.probe.surface == Surface::Models { at_list } else { at_model };
                    plan.take_response(response(call, real));
                }
                Next::Calibrate { call, question, .. } => {
                    questions.push(question);
                    let ProbeResponse::Answer { reading, shape, .. } = response(call, made_up) else { unreachable!() };
                    plan.take_calibration(&calibration_of(&reading, &shape));
                }
                Next::Keyless { .. } => plan.take_keyless(None),
            }
        }
    };
    let come = |usual: &[ResponseShape], for_every_key, real, made_up| come_by(usual, for_every_key, [real, real], made_up);
    let usual = [shape(unknown)];
    // Made-up keys get it too by now: it is a ban, or an outage.
    let (verdict, questions) = come(&usual, None, BANNED, BANNED);
    assert_eq!((verdict, questions[0]), (Verdict::UnexpectedResponse, CalibrationQuestion::RefusalNow));
    // In plain text, too.
    let (verdict, questions) = come(&usual, None, (401, "sign-on is down"), (401, "sign-on is down"));
    assert_eq!((verdict, questions[0]), (Verdict::UnexpectedResponse, CalibrationQuestion::RefusalNow));
    // Made-up keys get the usual refusal: the key may only be kept from the list, so the request that calls a model decides.
    let scope = (401, r#"{"error":{"message":"missing scopes: api.model.read","code":null}}"#);
    for (at_model, expected) in [(CHAT, Verdict::Valid), (scope, Verdict::Invalid), ((500, "oops"), Verdict::Invalid)] {
        assert_eq!(come_by(&usual, None, [scope, at_model], unknown).0, expected, "{at_model:?}");
    }
    // Where a model is called, it is about this key, although the list accepts anyone.
    let refusals = |call: &Call, _| match call.probe.surface {
        Surface::ChatCompletions => KnownRefusals { usual: usual.to_vec(), ..KnownRefusals::default() },
        _ => KnownRefusals::default(),
    };
    let world = |surface, _: &[HeaderFamily], key| match (surface, key) {
        (Surface::Models, _) => LIST,
        (_, Real) => BANNED,
        _ => unknown,
    };
    let requests = Requests { refusals: &refusals, ..Requests::UNKNOWN };
    let came = run_knowing(&target, &EndpointFacts::default(), requests, false, &world);
    assert_eq!(came.finding.verdict, Verdict::Invalid);
    // It is about this key, or a limit for the made-up one.
    for made_up in [unknown, (429, "slow"), (503, "busy"), (403, r#"{"error":{"message":"no"}}"#)] {
        let (verdict, questions) = come(&usual, None, BANNED, made_up);
        assert_eq!((verdict, questions), (Verdict::Invalid, vec![CalibrationQuestion::RefusalNow]), "{made_up:?}");
    }
    // The usual refusal, and one that says in a code that the key is dead, cost no made-up key.
    assert_eq!(come(&usual, None, unknown, unknown), (Verdict::Invalid, vec![]));
    assert_eq!(come(&usual, None, DEAD, DEAD), (Verdict::Invalid, vec![]));
    // So does any where nothing is known.
    assert_eq!(come(&[], None, BANNED, BANNED), (Verdict::Invalid, vec![]));
    // What an accepted key got right after says nothing, without any made-up key; a code that says so does.
    let (verdict, questions) = come(&[], Some(shape(BANNED)), BANNED, BANNED);
    assert_eq!((verdict, questions.len()), (Verdict::UnexpectedResponse, 0));
    assert_eq!(come(&[], Some(shape(DEAD)), DEAD, DEAD), (Verdict::Invalid, vec![]));
    // So does any other refusal.
    assert_eq!(come(&[], Some(shape(BANNED)), unknown, unknown), (Verdict::Invalid, vec![]));
    // An accepted key got even the usual refusal.
    assert_eq!(come(&usual, Some(shape(unknown)), unknown, unknown), (Verdict::UnexpectedResponse, vec![]));
    // It got it from the list, and where a model is called made-up keys are refused like this.
    let refusals = |call: &Call, _| match call.probe.surface {
        Surface::Models => KnownRefusals { for_every_key: Some(shape(unknown)), ..KnownRefusals::default() },
        _ => KnownRefusals { usual: usual.to_vec(), ..KnownRefusals::default() },
    };
    let requests = Requests { refusals: &refusals, ..Requests::UNKNOWN };
    let came = run_knowing(&target, &EndpointFacts::default(), requests, false, &|_, _, _| unknown);
    assert_eq!(came.finding.verdict, Verdict::Invalid);
}

#[test]
fn a_dialect_is_a_refusal_only_by_proof() {
    let same =
        |answer: (u16, &'static str)| move |_, _: &[HeaderFamily], key| if key == Key::None { (500, "oops") } else { answer };
    // In words that a machine reads, or not: a 401 is about the credential.
    for body in ["", "no", "{}"] {
        comes_to(
            &|_, _, _| {
                if body.is_empty() {
                    (401, "")
                } else if body == "no" {
                    (401, "no")
                } else {
                    (401, "{}")
                }
            },
            Verdict::Invalid,
            Some(Cause::AsAMadeUpKey),
            &[OWN, CALLED_IN_ALL],
        );
    }
    let completion = ["chat-completions bearer", "chat-completions x-api-key+api-key"];
    let all = [&[OWN, OTHERS][..], &completion].concat();
    let held = [&[OWN][..], &completion].concat();
    comes_to(&same((400, r#"{"error":{"code":"x"}}"#)), Verdict::Invalid, Some(Cause::AsAMadeUpKey), &held);
    // The second time it costs no made-up key.
    let made_up = Cell::new(0);
    let counted = |surface, families: &[HeaderFamily], key| {
        made_up.set(made_up.get() + i32::from(key == MadeUp));
        same((400, r#"{"error":{"code":"x"}}"#))(surface, families, key)
    };
    comes_to_in_some_way(&counted, Verdict::Invalid);
    assert_eq!(made_up.get(), 1);
    // A 404 that speaks of the key, too.
    comes_to_in_some_way(&same((404, r#"{"error":{"message":"unknown api key"}}"#)), Verdict::Invalid);
    // A 401 without a meaning, and a clear one in another header.
    let world = |_, families: &[HeaderFamily], key| match (families, key) {
        ([Bearer], MadeUp) => (503, "busy"),
        ([Bearer], _) => (401, "no"),
        _ => DEAD,
    };
    comes_to(&world, Verdict::Invalid, Some(Cause::CommonCode), &[OWN, OTHERS]);
    // Everybody gets it: nothing is known.
    comes_to(&|_, _, _| (400, r#"{"error":{"code":"x"}}"#), Verdict::UnexpectedResponse, Some(Cause::RequestRefused), &all);
    comes_to(&|_, _, _| PAGE, Verdict::UnexpectedResponse, Some(Cause::NoApiAtBaseUrl), &[OWN, completion[0]]);
    comes_to(&|_, _, _| (404, "{}"), Verdict::UnexpectedResponse, Some(Cause::NoApiAtBaseUrl), &[OWN, completion[0]]);
    let silent = |_, _: &[HeaderFamily], key| if key == Key::None { SILENCE } else { (404, "{}") };
    comes_to(&silent, Verdict::UnexpectedResponse, Some(Cause::NoApiAtBaseUrl), &[OWN, completion[0]]);
    comes_to(&|_, _, _| (302, ""), Verdict::UnexpectedResponse, Some(Cause::Redirect), &[OWN, completion[0]]);
    comes_to(&|_, _, _| (401, "<html>401</html>"), Verdict::UnexpectedResponse, Some(Cause::Page), &all);
    // Once a real key was accepted beside it, a page is a refusal too.
    let target = Target::of(&endpoint("https://llm.acme.example/v1", "openai"), "m");
    for answer in [PAGE, (404, "{}"), (302, ""), (401, "<html>401</html>"), (400, "no")] {
        let came = run(&target, &EndpointFacts::default(), true, &|_, _, _| answer);
        assert_eq!((came.finding.verdict, came.finding.cause), (Verdict::Invalid, Some(Cause::AsAMadeUpKey)), "{answer:?}");
    }
    // Neither does a text that comes with a 200, whatever a request without a key gets.
    let welcome = |_, _: &[HeaderFamily], key| if key == Key::None { (401, "who") } else { (200, "welcome") };
    comes_to_in_some_way(&welcome, Verdict::UnexpectedResponse);
    // A made-up key that got something else proves nothing.
    for made_up in [(503, "busy"), (429, "slow"), (401, "other words of another server"), SILENCE] {
        let world = |_, _: &[HeaderFamily], key| if key == MadeUp { made_up } else { (401, "no such key here") };
        let came = run(&target, &EndpointFacts::default(), true, &world);
        assert_eq!(came.finding.verdict, Verdict::UnexpectedResponse, "{made_up:?} {:?}", came.finding);
    }
}

#[test]
fn a_list_that_refuses_a_made_up_key_for_its_form_proves_nothing() {
    for malformed in
        [(401, r#"{"error":{"code":"malformed_key"}}"#), (400, r#"{"code":"INVALID_KEY_FORMAT"}"#), (401, "Not enough segments")]
    {
        // The key passes the list's check of its form, and was withdrawn.
        let world = |surface, _: &[HeaderFamily], key| match (surface, key) {
            (Surface::Models, Real) => LIST,
            (Surface::Models, _) => malformed,
            _ => DEAD,
        };
        comes_to(&world, Verdict::Invalid, Some(Cause::CommonCode), &[OWN, CALLED, "chat-completions x-api-key+api-key"]);
        let world = |surface, _: &[HeaderFamily], key| match (surface, key) {
            (Surface::Models, Real) => LIST,
            (_, Real) => CHAT,
            (Surface::Models, _) => malformed,
            _ => DEAD,
        };
        comes_to(&world, Verdict::Valid, None, &[OWN, CALLED]);
    }
}

#[test]
fn a_403_in_text_is_a_restricted_keys_where_a_made_up_key_gets_a_401() {
    let world = |restricted: (u16, &'static str), unknown: (u16, &'static str)| {
        move |surface, _: &[HeaderFamily], key| match (surface, key) {
            (Surface::Models, _) => LIST,
            (_, Real) => restricted,
            _ => unknown,
        }
    };
    for restricted in [(403, "RBAC: access denied"), (403, "")] {
        comes_to_in_some_way(&world(restricted, (401, "who")), Verdict::Forbidden);
        comes_to_in_some_way(&world(restricted, DEAD), Verdict::Forbidden);
        // A made-up key's 400 says nothing of a 403, and neither does a page.
        comes_to_in_some_way(&world(restricted, (400, "no")), Verdict::NotCalibrated);
        comes_to_in_some_way(&world(restricted, (401, "<html>401</html>")), Verdict::NotCalibrated);
    }
    comes_to_in_some_way(&world((403, "<html>blocked</html>"), (401, "who")), Verdict::NotCalibrated);
}

#[test]
fn a_403_is_told_apart_by_what_a_made_up_key_gets() {
    let forbidden = (403, r#"{"error":{"code":"no"}}"#);
    let world = |made_up: (u16, &'static str)| {
        move |surface, _: &[HeaderFamily], key| match (surface, key) {
            (Surface::Models, Real) => forbidden,
            (Surface::Models, _) => made_up,
            (_, Real) => CHAT,
            _ => DEAD,
        }
    };
    comes_to(&world(DEAD), Verdict::Valid, None, &[OWN, "chat-completions bearer"]);
    // A made-up key that is refused in words, whatever the status.
    comes_to(&world((400, DEAD.1)), Verdict::Valid, None, &[OWN, "chat-completions bearer"]);
    // The list forbids every key: what the request that calls a model says counts.
    comes_to(&world(forbidden), Verdict::Valid, None, &[OWN, "chat-completions bearer"]);
    comes_to(&world((403, r#"{"error":{"code":"other"}}"#)), Verdict::Forbidden, Some(Cause::Status), &[OWN, OTHERS]);
    comes_to(&world((503, "")), Verdict::Forbidden, Some(Cause::Status), &[OWN, OTHERS]);
    // A real key was accepted beside it: the list forbids only bad keys.
    let target = Target::of(&endpoint("https://llm.acme.example/v1", "openai"), "m");
    let came = run(&target, &EndpointFacts::default(), true, &world(forbidden));
    assert_eq!((came.finding.verdict, came.asked), (Verdict::Invalid, [OWN, OTHERS].map(str::to_owned).to_vec()));
    // Restricted at the list, and forbidden otherwise where a model is called.
    let otherwise = (403, r#"{"error":{"code":"other","message":"closed"}}"#);
    let world = |surface, _: &[HeaderFamily], key| match (surface, key) {
        (Surface::Models, Real) => forbidden,
        (Surface::Models, _) => DEAD,
        _ => otherwise,
    };
    comes_to_in_some_way(&world, Verdict::Forbidden);
    // A restriction says more than a request that is refused.
    let world = |_, _: &[HeaderFamily], key| if key == Real { SCOPE } else { DEAD };
    let refused = |surface, families: &[HeaderFamily], key| match (surface, key) {
        (Surface::ChatCompletions, Real) => (400, "{}"),
        _ => world(surface, families, key),
    };
    comes_to_because(&refused, Verdict::UnexpectedResponse, Cause::Restricted);
    // Restricted where models are called is of no use.
    let everywhere = |_, _: &[HeaderFamily], key| if key == Real { SCOPE } else { DEAD };
    comes_to(&everywhere, Verdict::Forbidden, Some(Cause::Restricted), &[OWN, "chat-completions bearer"]);
    let code_for_all = |_, _: &[HeaderFamily], _| SCOPE;
    let completion = ["chat-completions bearer", "chat-completions x-api-key+api-key"];
    comes_to(&code_for_all, Verdict::Invalid, Some(Cause::AsAMadeUpKey), &[&[OWN][..], &completion].concat());
    // No answer to the second request takes the code away; a row that says that its list tells keys apart needs none.
    for later in [(429, "slow"), (500, "oops"), (400, "{}"), (404, ""), PAGE, SILENCE] {
        let world = |surface, _: &[HeaderFamily], _| if surface == Surface::Models { forbidden } else { later };
        let target = Target::of(&endpoint("https://llm.acme.example/v1", "openai"), "m");
        let came = run(&target, &EndpointFacts::default(), false, &world);
        assert_eq!(came.finding.verdict, Verdict::Invalid, "{later:?} {:?}", came.asked);
    }
}

/// A list that requires a key but answers every key alike says nothing about it: the request that calls a model does.
#[test]
fn a_list_that_answers_every_key_alike_refuses_no_good_key() {
    let missing = (401, r#"{"error":{"message":"missing api key"}}"#);
    let lists = [
        (400, r#"{"error":{"message":"x-org header required"}}"#),
        (404, "404 page not found"),
        (405, "Method Not Allowed"),
        (403, "listing is disabled"),
        (403, r#"{"error":{"code":"listing_disabled"}}"#),
        (402, r#"{"error":{"message":"lists are not in your plan"}}"#),
        (404, r#"{"error":{"message":"no such route"}}"#),
        (200, r#"{"object":"list"}"#),
    ];
    // The answers to a good and a bad key where models are called, and the verdicts.
    let completions = [
        (CHAT, DEAD, Verdict::Valid, Verdict::Invalid),
        (CHAT, (401, "nope"), Verdict::Valid, Verdict::Invalid),
        ((400, r#"{"error":{"message":"unknown model"}}"#), DEAD, Verdict::UnexpectedResponse, Verdict::Invalid),
    ];
    let same = [
        (400, r#"{"error":{"message":"unknown model"}}"#),
        (404, r#"{"error":{"message":"model m not found"}}"#),
        (422, r#"{"detail":[{"loc":["body"],"msg":"x"}]}"#),
        (403, "model not enabled"),
    ];
    let same = same.map(|answer| (answer, answer, Verdict::UnexpectedResponse, Verdict::UnexpectedResponse));
    let target = Target::of(&endpoint("https://llm.acme.example/v1", "openai"), "m");
    for list in lists {
        for (good, bad, for_good, for_bad) in completions.into_iter().chain(same) {
            for (real, expected) in [(good, for_good), (bad, for_bad)] {
                let world = |surface, families: &[HeaderFamily], key| match (surface, key) {
                    (_, Key::None) => missing,
                    _ if families != [Bearer] => missing,
                    (Surface::Models, _) => list,
                    (_, Real) => real,
                    (_, MadeUp) => bad,
                };
                let came = run(&target, &EndpointFacts::default(), false, &world);
                // A code for "forbidden" that every key gets counts where nothing clear follows, and nothing tells this key from a made-up one.
                let by_code = list == lists[4] && bad == good && expected == Verdict::UnexpectedResponse;
                let expected = if by_code { Verdict::Invalid } else { expected };
                assert_eq!(came.finding.verdict, expected, "{list:?} {real:?} {:?}", came.asked);
                if expected == Verdict::Valid {
                    assert!(came.lessons.contains(&Lesson::Absent(target.calls[0].request)), "it is asked again: {list:?}");
                }
                let missing_api = came.finding.cause == Some(Cause::NoApiAtBaseUrl);
                assert!(!missing_api, "something there asks for a key: {list:?} {real:?}");
            }
        }
    }
    // The same "no" to both is about the key.
    let store = (400, r#"{"error":{"message":"no store","type":"no_db","code":"400"}}"#);
    let world = |_, _: &[HeaderFamily], key| if key == Key::None { (500, "Internal Server Error") } else { store };
    assert_eq!(run(&target, &EndpointFacts::default(), false, &world).finding.verdict, Verdict::Invalid);
    // A gateway that wants some key for its lists, and has no such path.
    let world = |surface, _: &[HeaderFamily], key| match (surface, key) {
        (Surface::Models, Key::None) => missing,
        _ => (404, "404"),
    };
    comes_to_because(&world, Verdict::UnexpectedResponse, Cause::NoApiAtBaseUrl);
    // Here only the path is missing, and the completions ask for a key.
    let world = |surface, _: &[HeaderFamily], key| match (surface, key) {
        (Surface::Models, _) => (404, "404"),
        (_, Key::None) => missing,
        _ => (404, r#"{"error":{"message":"model m not found"}}"#),
    };
    let came = run(&target, &EndpointFacts::default(), false, &world);
    assert_eq!((came.finding.verdict, came.finding.cause), (Verdict::UnexpectedResponse, Some(Cause::NotFound)));
}

/// Completions may refuse a request before they look at its key: then the answer is about the request, whatever a request without a key gets.
#[test]
fn a_refusal_of_the_request_is_none_of_the_key() {
    let target = Target::of(&endpoint("https://llm.acme.example/v1", "openai"), "m");
    for answer in [
        (400, r#"{"error":{"message":"max_tokens must be at least 16"}}"#),
        (404, r#"{"error":{"message":"model m not found"}}"#),
        (413, "too large"),
        (414, "too long"),
        (431, "too large"),
        (415, "unsupported"),
        (422, r#"{"detail":[{"msg":"field required"}]}"#),
    ] {
        for keyless in
            [(400, "{}"), (402, "pay"), (302, ""), (405, ""), (407, "proxy"), (422, "no key"), (500, "oops"), (401, "who")]
        {
            let world = |surface, _: &[HeaderFamily], key| match (surface, key) {
                (Surface::Models, _) => LIST,
                (_, Key::None) => keyless,
                _ => answer,
            };
            let came = run(&target, &EndpointFacts::default(), false, &world);
            assert!(!matches!(came.finding.verdict, Verdict::Invalid | Verdict::Forbidden), "{answer:?} {keyless:?}");
        }
    }
    // A 403 is compared by its code.
    let world = |surface, _: &[HeaderFamily], key| match (surface, key) {
        (Surface::Models, _) => LIST,
        (_, Real) => (403, r#"{"error":{"code":"no_access","message":"sign up for this model first"}}"#),
        _ => (403, r#"{"error":{"code":"no_access","message":"who are you"}}"#),
    };
    assert_eq!(run(&target, &EndpointFacts::default(), false, &world).finding.verdict, Verdict::Invalid);
    // Without one, or with one that only repeats the status, by its words.
    let world = |surface, _: &[HeaderFamily], key| match (surface, key) {
        (Surface::Models, _) => LIST,
        (_, Real) => (403, r#"{"error":{"code":403,"message":"your monthly budget is spent"}}"#),
        _ => (403, r#"{"error":{"code":403,"message":"no such key"}}"#),
    };
    assert_eq!(run(&target, &EndpointFacts::default(), false, &world).finding.verdict, Verdict::Forbidden);
    let world = |surface, _: &[HeaderFamily], key| match (surface, key) {
        (Surface::Models, _) => LIST,
        (_, Real) => (403, r#"{"message":"your monthly budget is spent"}"#),
        _ => (403, r#"{"message":"no such key"}"#),
    };
    assert_eq!(run(&target, &EndpointFacts::default(), false, &world).finding.verdict, Verdict::Forbidden);
}

/// There is an API where a key was accepted, and where a model is what is missing; a list that is not implemented is no outage.
#[test]
fn a_missing_list_or_model_is_no_missing_api() {
    let target = Target::of(&endpoint("https://llm.acme.example/v1", "openai"), "m");
    let nothing = |_, _: &[HeaderFamily], _| (404, "{}");
    let mut facts = EndpointFacts::default();
    assert_eq!(run(&target, &facts, false, &nothing).finding.cause, Some(Cause::NoApiAtBaseUrl));
    let no_model = |surface, _: &[HeaderFamily], _| {
        if surface == Surface::Models { (404, "{}") } else { (404, r#"{"error":{"code":"model_not_found"}}"#) }
    };
    assert_ne!(run(&target, &facts, false, &no_model).finding.cause, Some(Cause::NoApiAtBaseUrl));
    facts.take_family(Bearer, &[]);
    assert_eq!(run(&target, &facts, false, &nothing).finding.cause, Some(Cause::NotFound));
    let no_list = |surface, _: &[HeaderFamily], key| match (surface, key) {
        (Surface::Models, _) => (501, "Not Implemented"),
        (_, Real) => CHAT,
        _ => DEAD,
    };
    comes_to(&no_list, Verdict::Valid, None, &[OWN, "chat-completions bearer"]);
}

/// "Payment required" may be what every unknown key gets.
#[test]
fn a_402_that_a_made_up_key_gets_too_says_nothing_of_an_account() {
    let pay = (402, r#"{"error":{"message":"unknown key, pay"}}"#);
    let target = Target::of(&endpoint("https://llm.acme.example/v1", "openai"), "m");
    let judged = |made_up, keyless, confirmed| {
        let world = |_, _: &[HeaderFamily], key| match key {
            Real => pay,
            MadeUp => made_up,
            Key::None => keyless,
        };
        run(&target, &EndpointFacts::default(), confirmed, &world).finding.verdict
    };
    assert_eq!(judged(DEAD, DEAD, false), Verdict::QuotaExhausted);
    assert_eq!(judged((503, ""), DEAD, false), Verdict::QuotaExhausted);
    assert_eq!(judged(LIST, DEAD, false), Verdict::QuotaExhausted);
    assert_eq!(judged(pay, DEAD, false), Verdict::Invalid);
    assert_eq!(judged(pay, pay, false), Verdict::UnexpectedResponse);
    assert_eq!(judged(pay, pay, true), Verdict::Invalid);
}

/// A key that may only do chat completions is checked on the surface that the workspace's runtime uses.
#[test]
fn the_surface_is_the_runtimes() {
    let endpoint = endpoint("https://api.openai.com/v1", "openai");
    let made_up_at_list = Cell::new(0);
    let world = |surface, _: &[HeaderFamily], key| match (surface, key) {
        (Surface::ChatCompletions, Real) => CHAT,
        (_, Real) => SCOPES_IN_WORDS,
        (surface, _) => {
            made_up_at_list.set(made_up_at_list.get() + i32::from(surface == Surface::Models));
            DEAD
        }
    };
    let judged = |surface| {
        let target = Target::of(&endpoint, "m").preferring(Preference { family: None, surface });
        let came = run(&target, &EndpointFacts::default(), false, &world);
        (came.finding.verdict, came.asked)
    };
    let asked = |rungs: &[&str]| rungs.iter().map(|rung| format!("{rung} bearer")).collect::<Vec<_>>();
    assert_eq!(judged(None), (Verdict::Valid, asked(&["models", "responses", "chat-completions"])));
    assert_eq!(judged(Some(Surface::ChatCompletions)), (Verdict::Valid, asked(&["models", "chat-completions"])));
    assert_eq!(judged(Some(Surface::Responses)), (Verdict::Forbidden, asked(&["models", "responses"])));
    assert_eq!(made_up_at_list.get(), 0, "the row knows a restricted key by itself");
    // A surface that the host does not have narrows nothing down.
    assert_eq!(judged(Some(Surface::Messages)).0, Verdict::Valid);
    let good = |surface, _: &[HeaderFamily], key| match (surface, key) {
        (Surface::Responses, Real) => RESPONSE,
        (_, Real) => SCOPES_IN_WORDS,
        _ => DEAD,
    };
    let target = Target::of(&endpoint, "m").preferring(Preference { family: None, surface: Some(Surface::Responses) });
    assert_eq!(run(&target, &EndpointFacts::default(), false, &good).finding.verdict, Verdict::Valid);
}

#[test]
fn the_header_is_the_workspaces_and_one_is_enough_once_it_is_known() {
    let endpoint = endpoint("https://llm.acme.example", "anthropic");
    let world = |surface, families: &[HeaderFamily], key| match surface {
        _ if !families.contains(&Bearer) || key != Real => DEAD,
        Surface::Models => LIST,
        _ => (200, r#"{"type":"message","content":[{"type":"text","text":"."}]}"#),
    };
    let judged = |family, facts: &EndpointFacts| {
        let target = Target::of(&endpoint, "m").preferring(Preference { family, surface: None });
        let came = run(&target, facts, false, &world);
        (came.finding.verdict, came.finding.wrong_header, came.asked)
    };
    let mut facts = EndpointFacts::default();
    assert_eq!(judged(Some(Bearer), &facts), (Verdict::Valid, false, vec![OWN.to_owned()]));
    let walk = ["models x-api-key", "messages x-api-key+bearer+api-key", "messages x-api-key", "messages bearer"];
    let walk = walk.map(str::to_owned).to_vec();
    assert_eq!(judged(Some(XApiKey), &facts), (Verdict::Valid, true, walk.clone()));
    // For an unknown client, no header is wrong.
    assert_eq!(judged(None, &facts), (Verdict::Valid, false, walk));
    facts.take_family(Bearer, &[XApiKey]);
    assert_eq!(judged(Some(XApiKey), &facts), (Verdict::Valid, true, vec![OWN.to_owned()]));
    assert_eq!(judged(None, &facts), (Verdict::Valid, false, vec![OWN.to_owned()]));
}

/// No further probe runs if a row, or a region's code, says that none will tell more; and if the first probe gets no answer, the vendor is silent.
#[test]
fn some_answers_end_it() {
    let region = (403, r#"{"error":{"code":"unsupported_country_region_territory"}}"#);
    comes_to(&|_, _, _| region, Verdict::UnexpectedResponse, Some(Cause::CommonCode), &[OWN]);
    comes_to(&|_, _, _| SILENCE, Verdict::Timeout, None, &[OWN]);
    comes_to(&|_, _, _| (503, ""), Verdict::ProviderError, Some(Cause::Status), &[OWN, CALLED]);
    comes_to(&|_, _, _| (429, ""), Verdict::RateLimited, Some(Cause::Status), &[OWN, CALLED]);
    let target = Target::of(&endpoint("https://api.anthropic.com", "anthropic"), "m");
    let linked =
        (400, r#"{"type":"error","error":{"type":"invalid_request_error","message":"anthropic-workspace-id is required"}}"#);
    let came = run(&target, &EndpointFacts::default(), false, &|_, _, _| linked);
    assert_eq!((came.finding.verdict, came.asked.len()), (Verdict::UnexpectedResponse, 1), "no paid rung");
    let mut plan = ProbePlan::new(&target.calls, Client::default(), &EndpointFacts::default(), Requests::UNKNOWN);
    plan.take_response(ProbeResponse::Unreachable(Unreached::Dns));
    let Next::Done(finding) = plan.proceed() else { panic!("not the end") };
    assert_eq!((finding.verdict, finding.unreached), (Verdict::Unreachable, Some(Unreached::Dns)));
}

/// A list that accepts anybody, or does not exist, is not probed again.
#[test]
fn what_tells_nothing_is_left_out() {
    let target = Target::of(&endpoint("https://llm.acme.example/v1", "openai"), "m");
    let first = |pointless: &dyn Fn(&Call) -> bool| {
        let requests = Requests { is_pointless: &|call, _| pointless(call), ..Requests::UNKNOWN };
        let mut plan = ProbePlan::new(&target.calls, Client::default(), &EndpointFacts::default(), requests);
        let Next::Ask { call, .. } = plan.proceed() else { panic!("nothing is asked") };
        call.probe.name.clone()
    };
    assert_eq!(first(&|_| false), "models");
    assert_eq!(first(&|call| call.probe.name == "models"), "completion");
    assert_eq!(first(&|_| true), "models");
    // A call of a model that accepts anybody is kept beside a list that was never seen to accept a key: it may refuse every key.
    let asked = |pointless: Surface, accepted: &[Surface], world: World<'_>| {
        let requests = Requests {
            is_pointless: &|call, _| call.probe.surface == pointless,
            has_accepted: &|call, _| accepted.contains(&call.probe.surface),
            ..Requests::UNKNOWN
        };
        run_knowing(&target, &EndpointFacts::default(), requests, false, world).asked
    };
    let (list, called) = (Surface::Models, Surface::ChatCompletions);
    let failing = |_, _: &[HeaderFamily], _| (500, "oops");
    assert_eq!(asked(called, &[called], &failing), [OWN, CALLED]);
    assert_eq!(asked(called, &[list, called], &failing), [OWN]);
    assert_eq!(asked(called, &[], &failing), [OWN]);
    // A list that once accepted a key and now accepts anybody is asked again, whether every key is refused by now.
    let refused = |surface, _: &[HeaderFamily], _| if surface == list { LIST } else { (401, "no") };
    let others = "chat-completions x-api-key+api-key";
    assert_eq!(asked(list, &[list], &refused), [CALLED, OWN, others]);
    assert_eq!(asked(list, &[], &refused), [CALLED, others]);
    let failing_list = |surface, _: &[HeaderFamily], _| if surface == list { (500, "oops") } else { (401, "no") };
    assert_eq!(asked(Surface::Messages, &[list], &failing_list), [OWN, CALLED, others]);
    let absent = |surface, _: &[HeaderFamily], key| match (surface, key) {
        (Surface::Models, _) => (404, "{}"),
        (_, Real) => CHAT,
        _ => DEAD,
    };
    let came = run(&target, &EndpointFacts::default(), false, &absent);
    assert_eq!(came.finding.verdict, Verdict::Valid);
    assert!(came.lessons.contains(&Lesson::Absent(target.calls[0].request)), "{:?}", came.lessons);
}

/// What refuses a made-up key may be a limit: by no code, it counts only if the real key is accepted once more.
#[test]
fn a_yes_counts_where_no_limit_can_have_refused_the_made_up_key() {
    let refusals = [
        (401, "no"),
        (401, r#"{"error":{"code":"slow_down"}}"#),
        (403, r#"{"error":{"code":"busy"}}"#),
        (400, "busy"),
        (404, "{}"),
        (302, ""),
        PAGE,
        (200, r#"{"code":1302}"#),
    ];
    for refusal in refusals {
        let world = |_, _: &[HeaderFamily], key| if key == Real { LIST } else { refusal };
        comes_to(&world, Verdict::Valid, None, &[OWN, OWN]);
        // Every call after the first gets it, with any key.
        let asked = Cell::new(0);
        let world = |_, _: &[HeaderFamily], _| {
            asked.set(asked.get() + 1);
            if asked.get() == 1 { LIST } else { refusal }
        };
        comes_to(&world, Verdict::NotCalibrated, Some(Cause::MadeUpKeyUntold), &[OWN, OWN]);
    }
    let world = |_, _: &[HeaderFamily], key| if key == Real { LIST } else { DEAD };
    comes_to(&world, Verdict::Valid, None, &[OWN]);
    // No answer the second time is no "yes".
    let asked = Cell::new(0);
    let world = |_, _: &[HeaderFamily], key| {
        asked.set(asked.get() + i32::from(key == Real));
        match (key, asked.get()) {
            (Real, 1) => LIST,
            (Real, _) => SILENCE,
            _ => (400, "busy"),
        }
    };
    comes_to(&world, Verdict::NotCalibrated, Some(Cause::MadeUpKeyUntold), &[OWN, OWN]);
}

/// A list may fail, or refuse, everybody: the request that calls a model tells.
#[test]
fn a_list_that_fails_or_refuses_everybody_is_no_word_on_a_key() {
    let lists = [(500, "x"), (503, "{}"), (429, "x"), DEAD, (401, r#"{"error":{"code":"login"}}"#), (401, "log in"), (401, "{}")];
    for list in lists {
        for (real, expected) in [(CHAT, Verdict::Valid), (DEAD, Verdict::Invalid), ((401, "no"), Verdict::Invalid)] {
            let bad = if real == CHAT { DEAD } else { real };
            let world = |surface, _: &[HeaderFamily], key| match (surface, key) {
                (Surface::Models, _) => list,
                (_, Real) => real,
                _ => bad,
            };
            comes_to_in_some_way(&world, expected);
        }
        // If anybody is served, nothing is conclusive.
        let world = |surface, _: &[HeaderFamily], _| if surface == Surface::Models { list } else { CHAT };
        let untold = match list.0 {
            429 => Verdict::RateLimited,
            401 => Verdict::NotCalibrated,
            _ => Verdict::ProviderError,
        };
        comes_to_in_some_way(&world, untold);
    }
    // Where a key was seen accepted at this list, its 401 is clear.
    let target = Target::of(&endpoint("https://llm.acme.example/v1", "openai"), "m");
    let requests = Requests { has_accepted: &|_, _| true, ..Requests::UNKNOWN };
    let mut plan = ProbePlan::new(&target.calls, Client::default(), &EndpointFacts::default(), requests);
    plan.take_response(response(&target.calls[0], DEAD));
    let Next::Ask { call, families, .. } = plan.proceed() else { panic!("no other header") };
    assert_eq!((call.probe.surface, families), (Surface::Models, vec![XApiKey, ApiKey]));
}

/// A ban, or a limit, comes to everybody.
#[test]
fn what_comes_to_everybody_by_now_is_no_word_on_a_key() {
    const BAN: (u16, &str) = (403, r#"{"message":"Forbidden"}"#);
    // The real key gets it at the list, where a made-up one was refused with a 401 before; later the made-up one gets it, too, or no key does.
    for (made_up, keyless) in [(BAN, DEAD), (DEAD, BAN)] {
        let world = |surface, _: &[HeaderFamily], key| match (surface, key) {
            (_, Real) => BAN,
            (Surface::Models, _) => DEAD,
            (_, MadeUp) => made_up,
            (_, Key::None) => keyless,
        };
        comes_to(&world, Verdict::UnexpectedResponse, Some(Cause::RequestRefused), &[OWN, CALLED]);
    }
    // A made-up key gets it a moment later.
    let made_up = Cell::new(0);
    let world = |surface, _: &[HeaderFamily], key| match (surface, key) {
        (Surface::Models, _) => (404, "{}"),
        (_, Real) => BAN,
        (_, MadeUp) => {
            made_up.set(made_up.get() + 1);
            if made_up.get() == 1 { DEAD } else { BAN }
        }
        (_, Key::None) => DEAD,
    };
    comes_to_because(&world, Verdict::UnexpectedResponse, Cause::RequestRefused);
    // Other probes have seen it, or something else, come to a key that is accepted otherwise.
    let target = Target::of(&endpoint("https://llm.acme.example/v1", "openai"), "m");
    let other = (403, r#"{"message":"closed for a while"}"#);
    for (known, expected) in [(BAN, Verdict::UnexpectedResponse), (other, Verdict::Forbidden)] {
        let mut plan = ProbePlan::new(&target.calls, Client::default(), &EndpointFacts::default(), Requests::UNKNOWN);
        let finding = loop {
            match plan.proceed() {
                Next::Done(finding) => break finding,
                Next::Ask { call, .. } => plan.take_response(response(call, BAN)),
                Next::Calibrate { call, .. } => {
                    let ProbeResponse::Answer { shape, .. } = response(call, known) else { unreachable!() };
                    plan.take_calibration(&Calibration::SameForEveryKey(shape));
                }
                Next::Keyless { .. } => plan.take_keyless(None),
            }
        };
        assert_eq!(finding.verdict, expected, "{known:?}");
    }
    // A list that is open to everybody gives it after the calls that may have been too many.
    for later in [BAN, SILENCE] {
        let lists = Cell::new(0);
        let world = |surface, _: &[HeaderFamily], _| {
            lists.set(lists.get() + i32::from(surface == Surface::Models));
            match surface {
                Surface::Models if lists.get() <= 2 => LIST,
                Surface::Models => later,
                _ => BAN,
            }
        };
        let came = run(&target, &EndpointFacts::default(), false, &world);
        assert_eq!(came.finding.verdict, Verdict::NotCalibrated, "{later:?}");
        assert!(matches!(*came.lessons, [Lesson::SameForEveryKey(..)]), "{later:?} {:?}", came.lessons);
    }
    let world = |surface, _: &[HeaderFamily], _| if surface == Surface::Models { LIST } else { BAN };
    comes_to_in_some_way(&world, Verdict::Invalid);
}
