//! The steps of a decision inside the process, without gRPC. `inside.rs` runs one many times, for callgrind; `times.rs` measures all.

#![expect(clippy::expect_used, clippy::panic, reason = "a measurement that cannot be made ends with its reason")]

use std::{
    hint::black_box,
    sync::Arc,
    time::{Duration, SystemTime},
};

use byok_gate::{
    core::{
        catalogue::Catalogue,
        classify::{Answer, Finding, classify},
        derive::derive,
        engine::{Boxed, Engine, ProbeRequest, Prober},
        policy::{Enforcement, Facts, Policy, apply},
        registry::Registry,
        snapshot::{Origin, Snapshot},
    },
    domain::{
        decision::Outcome,
        denial::LivenessEvidence,
        protocol::Protocol,
        request::{Checkpoint, Credential, CredentialValue, OperatorOverride, PlatformProxy, Request, Scope, WorkspaceSpec},
        secret::Secret,
        verdict::{ServedFrom, Verdict},
    },
    liveness::{
        cache::{Cache, CacheSettings},
        new_keys::NewKeyLimits,
    },
};
use tokio::{runtime::Runtime, time::Instant};

/// A provider that answers at once: the network is not counted here.
struct Prompt;

impl Prober for Prompt {
    fn probe(&self, _: ProbeRequest) -> Boxed<'static, Finding> {
        Box::pin(async { Finding { status: Some(200), probe: "models".into(), ..Finding::bare(Verdict::Valid) } })
    }
}

/// One step, ready to be run again and again.
pub type Step = Box<dyn FnMut()>;

/// Its name, how it is made, and for which size.
pub type Recipe = (String, fn(usize) -> Step, usize);

/// The recorded steps, in the order of a decision, and then how some grow.
pub fn steps() -> Vec<Recipe> {
    let mut steps: Vec<Recipe> = vec![
        ("derive".into(), deriving, 0),
        ("classify".into(), classifying, 0),
        ("policy".into(), ruling, 0),
        ("decide-platform".into(), |_| deciding("anthropic/claude-sonnet-4-6", 0, 1, registry(0)), 0),
        ("decide-missing".into(), |_| deciding("claude-sonnet-4-6", 0, 1, registry(0)), 0),
        ("decide-cached".into(), |_| deciding("claude-sonnet-4-6", 1, 1, registry(0)), 0),
    ];
    for models in [10, 1_000, 10_000] {
        steps.push((format!("models-{models}"), |models| deciding("claude-sonnet-4-6", 1, 1, registry(models)), models));
    }
    for credentials in [1, 4, 16, 64] {
        let step = |credentials| deciding("claude-sonnet-4-6", credentials, 1, registry(0));
        steps.push((format!("credentials-{credentials}"), step, credentials));
    }
    for keys in [1, 100, 10_000, 100_000] {
        steps.push((format!("keys-{keys}"), |keys| deciding("claude-sonnet-4-6", 1, keys, registry(0)), keys));
    }
    steps
}

// === the pure steps ===

fn deriving(_: usize) -> Step {
    let registry = registry(0);
    Box::new(move || {
        let derived =
            derive(&registry, black_box("claude-code"), black_box("claude-sonnet-4-6"), &|name| name == "ANTHROPIC_API_KEY");
        assert!(black_box(derived).is_ok());
    })
}

fn classifying(_: usize) -> Step {
    let catalogue = Catalogue::embedded().expect("the embedded catalogue stands").value;
    let row = catalogue.row("api.openai.com", "/v1", Protocol::OpenAi).expect("the catalogue knows it");
    let probe = row.probes.first().expect("it is asked").clone();
    // A refusal of the usual size, matched by the fifth signal.
    let body = br#"{"error":{"message":"Incorrect API key provided: made-up.","type":"invalid_request_error","param":null,"code":"invalid_api_key"}}"#;
    Box::new(move || {
        let answer = Answer { status: 401, body: black_box(body), truncated: false, page: false, retry_after: None };
        black_box(classify(answer, &probe));
    })
}

fn ruling(_: usize) -> Step {
    let policy = Policy::default();
    Box::new(move || {
        let evidence = Box::new(LivenessEvidence {
            host: "api.anthropic.com".into(),
            upstream_status: Some(401),
            retry_after: Duration::from_secs(10),
            ..LivenessEvidence::of(black_box(Verdict::Invalid), "anthropic-api", "ANTHROPIC_API_KEY")
        });
        let facts = Facts::NotValid {
            evidence,
            served_from: Some(ServedFrom::Cache),
            recently_valid: false,
            enforcement: Enforcement::Enforce,
        };
        black_box(apply(facts, Checkpoint::Create, &policy));
    })
}

// === whole decisions ===

/// The embedded registry, with this many further models on the runtime.
fn registry(further: usize) -> Arc<Registry> {
    let text = include_str!("../src/core/registry/default.yaml");
    let first = "          - \"claude-sonnet-4-6\"\n";
    let models: String = (0..further).map(|index| format!("          - \"made-up-model-{index}\"\n")).collect();
    let text = text.replacen(first, &format!("{models}{first}"), 1);
    let loaded = Registry::parse("registry", text.as_bytes(), &|_| None);
    Arc::new(loaded.unwrap_or_else(|problems| panic!("{problems:?}")).value)
}

/// A decision with this many credentials in the spec and this many cached keys. The answer is checked once.
fn deciding(model: &str, credentials: usize, keys: usize, registry: Arc<Registry>) -> Step {
    let origin = || Origin::new("bench".into(), SystemTime::now());
    let catalogue = Arc::new(Catalogue::embedded().expect("the embedded catalogue stands").value);
    let snapshot = Snapshot::new(Arc::clone(&registry), catalogue, Arc::new(Policy::default()), origin(), origin());
    let many = u32::MAX.try_into().expect("not zero");
    let mut settings = CacheSettings {
        new_keys: NewKeyLimits { per_organization: many, per_caller: many, per_platform: many },
        ..CacheSettings::default()
    };
    // Nothing expires while it is measured.
    settings.ages.valid = Duration::from_secs(24 * 3600);
    let engine = Engine::new(snapshot, Arc::new(Cache::new(Arc::new(Prompt), settings)), None);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    if credentials > 0 {
        for index in 1..keys {
            decide(&runtime, &engine, &request(&registry, model, credentials, &format!("made-up-key-{index}")));
        }
    }
    let request = request(&registry, model, credentials, "made-up-key-0");
    assert_eq!(decide(&runtime, &engine, &request), credentials > 0 || model.contains('/'));
    Box::new(move || {
        black_box(decide(&runtime, &engine, black_box(&request)));
    })
}

fn decide(runtime: &Runtime, engine: &Engine, request: &Request) -> bool {
    let deadline = Instant::now() + Duration::from_secs(5);
    let decided = runtime.block_on(engine.decide(request, deadline));
    matches!(decided.decision.outcome, Outcome::Allow(_))
}

/// The first usable name of the registry.
fn request(registry: &Registry, model: &str, credentials: usize, key: &str) -> Request {
    let names = registry.credential_names().iter().filter(|name| *name != "ANTHROPIC_API_KEY");
    let both = [Scope::Workspace, Scope::Organization];
    let rows = std::iter::once("ANTHROPIC_API_KEY").chain(names.map(String::as_str));
    let rows = rows.flat_map(|name| both.map(|scope| (name, scope)));
    let credential = |(name, scope): (&str, Scope)| Credential {
        env_name: name.to_owned(),
        scope,
        value: CredentialValue::Readable(Arc::new(Secret::new(key.to_owned()))),
    };
    Request {
        spec: WorkspaceSpec {
            workspace_id: "6f1c2a54-7f0e-4c8e-9a51-d2f3a9c4b7e0".into(),
            organization_id: "0b9d3c1e-52aa-4f5b-8a77-31c6f1f0a9d2".into(),
            runtime: "claude-code".into(),
            model: model.to_owned(),
            credentials: rows.take(credentials).map(credential).collect(),
            unreadable_scopes: Vec::new(),
            operator_override: OperatorOverride::Derive,
            platform_proxy: Some(PlatformProxy::Available),
            tenant_base_url_env: Vec::new(),
        },
        checkpoint: Checkpoint::Create,
        max_liveness_age: None,
        explain: false,
        report_only: false,
        caller: Default::default(),
    }
}
