//! Every case of `tests/cases` without a network: the plan of a probe takes the answers of the vendor's rows. What `cases.rs` sees of the whole
//! program, this sees of the decision alone, in a fraction of the time.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex},
    time::{Duration, SystemTime},
};

use byok_gate::{
    core::{
        catalogue::Catalogue,
        classify::{Answer, Calibration, ProbeResponse, calibration_of, is_page, read},
        credential::LivenessQuery,
        endpoint::{Call, Target},
        endpoint_facts::{CalibrationQuestion, EndpointFacts},
        engine::{Boxed, Engine, LivenessSource, Observed},
        evaluate::{self, Resolved, Unresolved, evaluate, resolve},
        made_up_key::{KeyForm, can_be_imitated},
        policy::{CheckpointActions, Exception, Facts, Overrides, Policy, ProviderException},
        probe_plan::{Client, Next, ProbePlan, Requests},
        registry::Registry,
        response_shape::ResponseShape,
        snapshot::{Origin, Snapshot},
    },
    domain::{
        denial::Refusal,
        protocol::{HeaderFamily, Method},
        request::PlatformProxy,
        verdict::{ServedFrom, Unreached},
    },
    grpc::convert,
};
use serde::{Deserialize, Serialize};
use serde_yaml::Value;
use tokio::time::Instant;

use crate::support::{
    case::{self, Answered, Case},
    vendor_rows::{Asked, Behave, Row},
};

/// The vendor's port. Nobody listens at any other.
const PORT: u16 = 1234;

/// The settings that cases use. Another one is an error.
#[derive(Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Settings {
    policy: CheckpointActions,
    operator_overrides: Overrides,
    exempt_runtimes: BTreeSet<String>,
    providers: BTreeMap<String, ProviderException>,
}

/// A vendor that answers by rows, and keeps what it was asked.
struct Rows {
    rows: Vec<Row>,
    asked: Arc<Mutex<Vec<Asked>>>,
}

impl Rows {
    fn answer(&self, call: &Call, families: &[HeaderFamily], key: &str) -> ProbeResponse {
        let value = |family: &HeaderFamily| match family {
            HeaderFamily::Bearer => format!("Bearer {key}"),
            _ => key.to_owned(),
        };
        let asked = Asked {
            method: if call.probe.method == Method::Get { "GET" } else { "POST" }.to_owned(),
            path: call.url.path().to_owned(),
            headers: families.iter().map(|family| (family.header().to_owned(), value(family))).collect(),
            body: call.body.as_deref().unwrap_or_default().to_owned(),
        };
        if call.url.port() != Some(PORT) {
            return ProbeResponse::Unreachable(Unreached::Connect);
        }
        let row = self.rows.iter().find(|row| row.fits(&asked)).cloned();
        self.asked.lock().unwrap().push(asked);
        let row = row.unwrap_or_else(Row::no_such_path);
        match row.behave {
            Some(Behave::Silent) => return ProbeResponse::TimedOut,
            Some(Behave::Reset) => return ProbeResponse::Unreachable(Unreached::Closed),
            None => {}
        }
        let mut headers = http::HeaderMap::new();
        for (name, value) in &row.headers {
            headers.insert(http::HeaderName::from_bytes(name.as_bytes()).unwrap(), value.parse().unwrap());
        }
        let retry_after = row.headers.get("retry-after").map(|seconds| Duration::from_secs(seconds.parse().unwrap()));
        let status = row.status.unwrap_or(200);
        let answer = Answer { status, body: row.body.as_bytes(), truncated: false, page: is_page(&headers), retry_after };
        ProbeResponse::Answer { reading: read(answer, &call.probe), shape: ResponseShape::of(answer, key), retry_after }
    }
}

impl LivenessSource for Rows {
    fn observe<'a>(&'a self, query: LivenessQuery<'a>, _: Option<Duration>, _: Instant) -> Boxed<'a, Observed> {
        let target = Target::of(query.endpoint, query.model).preferring(query.preference);
        let client = Client {
            preference: target.preference,
            usual_header: target.endpoint.client_header,
            key_form: can_be_imitated(&query.secret, target.endpoint.key_prefix.as_deref()).then(|| KeyForm::of(&query.secret)),
        };
        let facts = EndpointFacts::default();
        let mut plan = ProbePlan::new(&target.calls, client, &facts, Requests::UNKNOWN);
        let finding = loop {
            match plan.proceed() {
                Next::Done(finding) => break finding,
                Next::Ask { call, families, .. } => plan.take_response(self.answer(call, &families, query.secret.expose())),
                // This checks the documentation for the next probe, and this one does not wait for it.
                Next::Calibrate { question: CalibrationQuestion::Check, .. } => plan.take_calibration(&Calibration::NotWaitedFor),
                Next::Calibrate { call, families, .. } => {
                    plan.take_calibration(&match self.answer(call, &families, "a-key-that-nobody-has") {
                        ProbeResponse::Answer { reading, shape, .. } => calibration_of(&reading, &shape),
                        _ => Calibration::Inconclusive(None),
                    });
                }
                Next::Keyless { call, .. } => match self.answer(call, &[], "") {
                    ProbeResponse::Answer { shape, .. } => plan.take_keyless(Some(&shape)),
                    _ => plan.take_keyless(None),
                },
            }
        };
        let retry_after = finding.retry_after.unwrap_or(Duration::from_secs(1));
        Box::pin(std::future::ready(Observed {
            finding: Arc::new(finding),
            observed_at: SystemTime::UNIX_EPOCH,
            age: Duration::ZERO,
            served_from: ServedFrom::Probe,
            shared: false,
            retry_after,
            earlier_valid: None,
        }))
    }
}

/// Puts what a case sets over the defaults.
fn overlay(base: &mut Value, over: &Value) {
    match (base, over) {
        (Value::Mapping(base), Value::Mapping(over)) => {
            for (key, over) in over {
                overlay(base.entry(key.clone()).or_insert(Value::Null), over);
            }
        }
        (base, over) => *base = over.clone(),
    }
}

fn policy(config: Option<&Value>) -> Policy {
    let mut settings = serde_yaml::to_value(Settings::default()).unwrap();
    config.into_iter().for_each(|config| overlay(&mut settings, config));
    let settings: Settings = serde_yaml::from_value(settings).unwrap();
    let mut policy = Policy::default();
    policy.platform_proxy = PlatformProxy::Available;
    policy.honour_overrides = settings.operator_overrides == Overrides::Honour;
    policy.exempt_runtimes = settings.exempt_runtimes;
    for (checkpoint, actions) in settings.policy.checkpoints() {
        actions.groups().into_iter().for_each(|(group, action)| policy.set_action(checkpoint, group, action));
    }
    for (name, ProviderException { probe: enforcement, until }) in settings.providers {
        let day: jiff::civil::Date = until.unwrap().parse().unwrap();
        let until = day.to_zoned(jiff::tz::TimeZone::UTC).unwrap().timestamp().as_second();
        policy.set_exception(name, Exception { enforcement, until });
    }
    policy
}

/// The decision on a case's request, and how many requests carried one of its values.
async fn decided(case: &Case, at: &case::Word, documents: &(Arc<Registry>, Arc<Catalogue>)) -> (Answered, usize) {
    let request = match convert::request(case.request(at)) {
        Err(violations) => return (Answered::Invalid(violations.0.into_iter().map(|(field, _)| field).collect()), 0),
        Ok(request) => request,
    };
    let asked = Arc::default();
    let vendor = Rows { rows: case.vendor.clone(), asked: Arc::clone(&asked) };
    let origin = Origin::new("test".into(), SystemTime::UNIX_EPOCH);
    let (registry, catalogue) = documents.clone();
    let snapshot = Snapshot::new(registry, catalogue, Arc::new(policy(case.config.as_ref())), origin.clone(), origin);
    let engine = Engine::new(snapshot, Arc::new(vendor), None);
    let answered = Answered::decision(&convert::response(engine.decide(&request, Instant::now()).await));
    let values: BTreeSet<&str> = case.spec.iter().flat_map(|spec| spec.values()).filter(|value| !value.is_empty()).collect();
    let asked = asked.lock().unwrap();
    let with = |value: &&str| asked.iter().filter(|asked: &&Asked| asked.keys().contains(value)).count();
    (answered, values.iter().map(with).sum())
}

#[tokio::test]
async fn by_the_core_alone() {
    let (registry, catalogue) = case::documents(PORT);
    let documents = (
        Arc::new(Registry::parse("registry", registry.as_bytes(), &|_| None).unwrap().value),
        Arc::new(Catalogue::embedded().unwrap().value.overlaid("catalogue", catalogue.as_bytes()).unwrap().value),
    );
    let (mut ran, mut faults) = (0, Vec::new());
    for (name, case) in case::all() {
        for expect in &case.expect {
            for at in &expect.at {
                let (answered, asked) = decided(&case, at, &documents).await;
                faults.extend(expect.fault(&answered, asked).map(|fault| format!("{name}, at {at:?}: {fault}")));
                ran += 1;
            }
        }
    }
    assert!(ran > 300, "{ran}");
    assert!(faults.is_empty(), "{} of {ran}:\n{}", faults.len(), faults.join("\n"));
}

/// Where a key is missing, no name is asked for that takes no tenant's credential, although its provider serves the model, too.
#[test]
fn only_names_that_help_are_missing() {
    let (registry, catalogue) = case::documents(PORT);
    let registry = registry.replace("- {name: ambient}", "- {name: ambient, models: [acme-large]}");
    let registry = registry.replace("models: [platform-small, platform-large]", "models: [platform-small, acme-large]");
    let registry = registry.replace("{name: acme, models: [acme-large]}", "{name: acme, models: [acme-large, gamma-1]}");
    let origin = Origin::new("test".into(), SystemTime::UNIX_EPOCH);
    let snapshot = Snapshot::new(
        Arc::new(Registry::parse("registry", registry.as_bytes(), &|_| None).unwrap().value),
        Arc::new(Catalogue::embedded().unwrap().value.overlaid("catalogue", catalogue.as_bytes()).unwrap().value),
        Arc::new(Policy::default()),
        origin.clone(),
        origin,
    );
    for (runtime, model, expected) in [
        ("agent", "acme-large", "ACME_API_KEY ACME_TOKEN, others [], elsewhere None"),
        // What the runtime reads of another provider is enough: no file needs to be written.
        (
            "seen",
            "gamma-1",
            "GAMMA_API_KEY GAMMA_TOKEN ACME_API_KEY ACME_TOKEN, others [(\"Acme AI\", [\"OTHER_ACME_KEY\"])], elsewhere None",
        ),
    ] {
        let request = case::Spec { runtime: Some(runtime.into()), model: model.into(), ..case::Spec::default() }.request();
        let missing = match evaluate(&snapshot, &request, 0, &|_| String::new()).next {
            evaluate::Next::Rule(Facts::Refused(refusal)) => *refusal,
            other => panic!("{other:?}"),
        };
        let Refusal::MissingCredential { missing_env, others, elsewhere, .. } = missing else { panic!("{missing:?}") };
        let told = format!("{}, others {others:?}, elsewhere {elsewhere:?}", missing_env.join(" "));
        assert_eq!(told, expected, "{runtime} {model}");
    }
}

/// The owner by names alone, and the names that could change it. None can where the one owner takes no tenant's credential.
#[test]
fn an_owner_by_names_alone() {
    let mut policy = Policy::default();
    policy.exempt_runtimes.insert("mock".to_owned());
    let (registry, catalogue) = case::documents(PORT);
    let origin = Origin::new("test".into(), SystemTime::UNIX_EPOCH);
    let snapshot = Snapshot::new(
        Arc::new(Registry::parse("registry", registry.as_bytes(), &|_| None).unwrap().value),
        Arc::new(Catalogue::embedded().unwrap().value.overlaid("catalogue", catalogue.as_bytes()).unwrap().value),
        Arc::new(policy),
        origin.clone(),
        origin,
    );
    let twins = ["TWIN_A_KEY", "TWIN_SHARED_KEY", "TWIN_B_KEY"];
    let acme = ["ACME_API_KEY", "ACME_TOKEN"];
    for (runtime, model, at_hand, expected, names) in [
        ("agent", "acme-large", "", "acme, accepts ACME_API_KEY ACME_TOKEN", &acme[..]),
        ("agent", "acme-old", "", "acme, accepts ACME_API_KEY ACME_TOKEN, withdrawn", &acme),
        ("agent", "twin-1", "TWIN_B_KEY", "twin-b, accepts TWIN_B_KEY TWIN_SHARED_KEY", &twins),
        ("agent", "twin-1", "", "twin-a, accepts TWIN_A_KEY TWIN_SHARED_KEY", &twins),
        ("agent", "over-1", "", "AMBIGUOUS_PROVIDER", &twins),
        ("agent", "platform-small", "", "platform", &[]),
        ("agent", "ambient:x", "", "PROVIDER_NOT_BYOK", &[]),
        ("agent", "nobody", "", "UNREGISTERED_MODEL_FOR_RUNTIME", &[]),
        ("agent", "", "", "MODEL_REQUIRED", &[]),
        ("nowhere", "acme-large", "", "RUNTIME_UNSUPPORTED", &[]),
        ("", "acme-large", "", "RUNTIME_REQUIRED", &[]),
        ("mock", "acme-large", "", "", &[]),
    ] {
        let (found, relevant) = match resolve(&snapshot, runtime, model, &[at_hand.to_owned()].into()) {
            Ok(Resolved { resolution, relevant, withdrawn }) => {
                let accepted = resolution.accepted_env.join(" ");
                let accepts = if accepted.is_empty() { String::new() } else { format!(", accepts {accepted}") };
                (format!("{}{accepts}{}", resolution.provider, if withdrawn { ", withdrawn" } else { "" }), relevant.env)
            }
            Err(Unresolved { refusal, relevant_env }) => (refusal.code().to_string(), relevant_env),
        };
        assert_eq!(found, expected, "{runtime} {model}");
        assert_eq!(*relevant, *names, "{runtime} {model}");
    }
}
