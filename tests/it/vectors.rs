//! Derivation against vectors: our own beside this file, and the platform's where they are there.

use std::{collections::BTreeSet, fs, path::Path};

use byok_gate::{
    core::{
        derive::{Underivable, derive},
        registry::Registry,
    },
    grpc::convert::pb,
};
use serde::Deserialize;
use serde_json::Value;

use crate::support::{
    case,
    gate::{Files, Server},
};

/// The platform's own registries and expected derivations, beside the repository on the machines that have them.
const PLATFORM: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../shared/data/derive-vectors.json");
const OWN: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/derive.yaml");

#[derive(Debug, Deserialize)]
struct Row {
    registry: String,
    runtime: String,
    model: String,
    #[serde(default)]
    auth_env: Option<Vec<String>>,
    expect_provider: Option<String>,
    expect_error: Option<String>,
}

/// A row of ours, on the embedded registry.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct OwnRow {
    runtime: String,
    model: String,
    #[serde(default)]
    at_hand: Vec<String>,
    expect: String,
    #[serde(default)]
    by: String,
}

fn embedded() -> Registry {
    Registry::embedded(&|_| None).unwrap().value
}

/// The provider's name, or the error's.
fn derived(registry: &Registry, runtime: &str, model: &str, names: &[String]) -> (String, String) {
    match derive(registry, runtime, model, &|name| names.iter().any(|known| known == name)) {
        Ok(derived) => (derived.provider.name.clone(), derived.matched_by.to_string()),
        Err(Underivable::ModelRequired) => ("!model_required".into(), String::new()),
        Err(Underivable::UnknownRuntime) => ("!unknown_runtime".into(), String::new()),
        Err(Underivable::Unregistered) => ("!unregistered_model".into(), String::new()),
        Err(Underivable::Ambiguous { .. }) => ("!ambiguous".into(), String::new()),
    }
}

#[test]
fn ours_on_the_embedded_registry() {
    let rows: Vec<OwnRow> = serde_yaml::from_str(&fs::read_to_string(OWN).unwrap()).unwrap();
    let registry = embedded();
    for row in &rows {
        let (provider, by) = derived(&registry, &row.runtime, &row.model, &row.at_hand);
        assert_eq!((provider.as_str(), by.as_str()), (row.expect.as_str(), row.by.as_str()), "{row:?}");
    }
    // Every offer of every runtime is met by some row.
    let met: BTreeSet<(&str, &str)> = rows.iter().map(|row| (row.runtime.as_str(), row.expect.as_str())).collect();
    for (name, runtime) in registry.runtimes() {
        for offer in &runtime.offers {
            let provider = &registry.provider(offer).name;
            assert!(met.contains(&(name, provider.as_str())), "no row for {provider} on {name}");
        }
    }
}

fn platform() -> Option<Value> {
    Path::new(PLATFORM).exists().then(|| serde_json::from_slice(&fs::read(PLATFORM).unwrap()).unwrap())
}

/// A registry of the file as a document; the crafted ones lack what a file must have, which derivation does not look at.
fn document(registry: &Value, crafted: bool) -> String {
    let mut registry = registry.clone();
    for offers in registry["runtimes"].as_object_mut().unwrap().values_mut() {
        *offers = serde_json::json!({ "providers": offers });
    }
    if crafted {
        registry["schema_version"] = 1.into();
        for provider in registry["providers"].as_array_mut().unwrap() {
            for (key, value) in [("display_name", "x"), ("auth_mode", "x"), ("protocol", "openai")] {
                if provider.get(key).is_none() {
                    provider[key] = value.into();
                }
            }
        }
    }
    serde_json::to_string(&registry).unwrap()
}

/// The two real registries load, and every row of theirs is answered by `ResolveProvider` over gRPC; the crafted ones by the
/// function.
#[tokio::test]
async fn the_platforms() {
    let Some(file) = platform() else { return };
    let rows: Vec<Row> = serde_json::from_value(file["derive"].clone()).unwrap();
    let (mut over_grpc, mut by_function) = (0, 0);
    for (name, value) in file["registries"].as_object().unwrap() {
        let crafted = name.starts_with("crafted");
        let text = document(value, crafted);
        let rows = rows.iter().filter(|row| row.registry == *name);
        if crafted {
            let registry = Registry::parse(name, text.as_bytes(), &|_| None).unwrap().value;
            for row in rows {
                let (provider, _) = derived(&registry, &row.runtime, &row.model, row.auth_env.as_deref().unwrap_or_default());
                let expected = row.expect_provider.clone().or_else(|| row.expect_error.as_ref().map(|error| format!("!{error}")));
                assert_eq!(Some(provider), expected, "{row:?}");
                by_function += 1;
            }
            continue;
        }
        let (_, catalogue) = case::documents(1);
        let server = Server::start(Files::new(&text, &catalogue, None).engine()).await;
        let mut client = server.client().await;
        for row in rows {
            let request = pb::ResolveProviderRequest {
                runtime: row.runtime.clone(),
                model: row.model.clone(),
                credential_names: row.auth_env.clone().unwrap_or_default(),
            };
            let answer = client.resolve_provider(request).await.unwrap().into_inner();
            let (provider, error) = match answer.result.unwrap() {
                pb::resolve_provider_response::Result::Resolution(resolution) => (Some(resolution.provider), None),
                pb::resolve_provider_response::Result::Deny(deny) => (None, Some(deny.code())),
            };
            let expected = row.expect_error.as_deref().map(|error| match error {
                "model_required" => pb::DenyCode::ModelRequired,
                "unknown_runtime" => pb::DenyCode::RuntimeUnsupported,
                "unregistered_model" => pb::DenyCode::UnregisteredModelForRuntime,
                "ambiguous" => pb::DenyCode::AmbiguousProvider,
                other => panic!("{other}"),
            });
            assert_eq!((provider, error), (row.expect_provider.clone(), expected), "{row:?}");
            over_grpc += 1;
        }
    }
    assert_eq!((over_grpc, by_function), (294, 8));
}

/// What the embedded registry offers is what the platform's own offers.
#[test]
fn the_embedded_registry_offers_what_the_platform_does() {
    let Some(file) = platform() else { return };
    let registry = embedded();
    let theirs: Vec<&str> =
        file["registries"]["aug"]["providers"].as_array().unwrap().iter().map(|p| p["name"].as_str().unwrap()).collect();
    let ours: Vec<&str> = registry.providers().iter().map(|provider| provider.name.as_str()).collect();
    assert_eq!(ours, theirs);
    for (name, models) in file["models_for_runtime"]["aug"].as_object().unwrap() {
        let runtime = registry.runtime(name).unwrap();
        let offered: BTreeSet<&str> = runtime.offers.iter().flat_map(|offer| &offer.models).map(String::as_str).collect();
        let models: BTreeSet<&str> = models.as_array().unwrap().iter().map(|model| model.as_str().unwrap()).collect();
        assert_eq!(offered, models, "{name}");
    }
}
