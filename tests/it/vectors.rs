//! Derivation against vectors: our own beside this file, and the platform's where they are there.

use std::{collections::BTreeSet, fs, path::Path};

use byok_gate::core::{
    derive::{Underivable, derive},
    registry::Registry,
};
use serde::Deserialize;
use serde_json::Value;

/// The platform's own registries and expected derivations, beside the repository on the machines that have them.
const PLATFORM: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../shared/data/derive-vectors.json");
const OWN: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/derive.yaml");

#[derive(Debug, Deserialize)]
pub(crate) struct Row {
    pub(crate) registry: String,
    pub(crate) runtime: String,
    pub(crate) model: String,
    #[serde(default)]
    pub(crate) auth_env: Option<Vec<String>>,
    pub(crate) expect_provider: Option<String>,
    pub(crate) expect_error: Option<String>,
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
pub(crate) fn derived(registry: &Registry, runtime: &str, model: &str, names: &[String]) -> (String, String) {
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

pub(crate) fn platform() -> Option<Value> {
    Path::new(PLATFORM).exists().then(|| serde_json::from_slice(&fs::read(PLATFORM).unwrap()).unwrap())
}

/// A registry of the file as a document; the crafted ones lack what a file must have, which derivation does not look at.
pub(crate) fn document(registry: &Value, crafted: bool) -> String {
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
