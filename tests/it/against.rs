//! What `check --against` reports about a change: the whole output, for a reviewer and for a program.

use std::{fs, path::PathBuf};

use serde_json::{Value, json};

use crate::support::binary::{Ended, run};

fn fixture(name: &str) -> String {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/against").join(name).to_str().unwrap().to_owned()
}

async fn check(arguments: &[&str]) -> Ended {
    // Whatever listens on this machine is no matter of the documents.
    run(&[&["check", "--listen", "127.0.0.1:0"], arguments].concat(), &[]).await
}

async fn as_json(arguments: &[&str]) -> Value {
    let ended = check(&[&["--format", "json"], arguments].concat()).await;
    serde_json::from_str(&ended.stdout).unwrap_or_else(|_| panic!("{ended:?}"))
}

/// To change it on purpose: `BLESS=1 cargo test --test it against`.
#[tokio::test]
async fn a_change_is_told_whole_and_in_a_fixed_order() {
    let (old, new, expected) = (fixture("old.yaml"), fixture("new.yaml"), fixture("old-new.txt"));
    let ended = check(&["--registry", &new, "--against", &old]).await;
    assert_eq!(ended.status.code(), Some(0), "{ended:?}");
    let changes = ended.stdout.split_once('\n').unwrap().1;
    if std::env::var_os("BLESS").is_some() {
        fs::write(&expected, changes).unwrap();
    }
    assert_eq!(changes, fs::read_to_string(&expected).unwrap());
}

#[tokio::test]
async fn the_same_as_json() {
    let (old, new) = (fixture("old.yaml"), fixture("new.yaml"));
    let changes = as_json(&["--registry", &new, "--against", &old]).await["changes"].take();
    let model = |name: &str| {
        let rows = changes["models"].as_array().unwrap();
        rows.iter().find(|row| row["model"] == name).unwrap_or_else(|| panic!("{name}")).clone()
    };
    let owner = |provider: &str, billing_mode: &str, accepted_env: &[&str], offer: &str| json!({"provider": provider, "billing_mode": billing_mode, "accepted_env": accepted_env, "offer": offer});
    assert_eq!(
        model("acme-1"),
        json!({
            "runtime": "agent", "model": "acme-1", "at_hand": "",
            "before": owner("acme", "BYOK", &["ACME_API_KEY"], "LISTED"),
            "after": owner("platform", "PLATFORM_MANAGED", &[], "LISTED"),
        })
    );
    assert_eq!(model("acme-gone")["after"]["offer"], "UNLISTED");
    assert_eq!(model("platform/one")["after"]["offer"], "WITHDRAWN");
    let expected =
        json!({"env_name": "BETA_API_KEY", "host": "gateway.beta.example", "header": "authorization", "provider": "beta"});
    assert!(changes["credentials_sent"].as_array().unwrap().contains(&expected), "{changes}");
    assert_eq!(changes["credentials_no_longer_sent"].as_array().unwrap().len(), 3);
}

#[tokio::test]
async fn no_change_is_said_so() {
    let old = fixture("old.yaml");
    let ended = check(&["--registry", &old, "--against", &old]).await;
    assert!(ended.stdout.ends_with("\nnothing changes for people\n"), "{ended:?}");
}

/// A row that gives a provider a host sends a credential where none went before.
#[tokio::test]
async fn a_change_of_the_catalogue_alone_is_told() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str, document: &str| {
        let path = folder.path().join(name);
        fs::write(&path, document).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let row = "catalogue_version: 1\nhosts:\n  - host: api.beta.example\n    vendor: beta\n    probes:\n      \
               - {name: models, path: /v1/models, auth: [x-goog-api-key], expect: [data]}\n";
    let (catalogue, empty) = (at("new.yaml", row), at("old.yaml", "catalogue_version: 1\n"));
    let old = fixture("old.yaml");
    let arguments = ["--registry", &old, "--probe-catalog", &catalogue, "--against", &old, "--against-catalog", &empty];
    let changes = as_json(&arguments).await["changes"].take();
    let expected =
        json!([{"env_name": "BETA_API_KEY", "host": "api.beta.example", "header": "x-goog-api-key", "provider": "beta"}]);
    assert_eq!(changes["credentials_sent"], expected);
    assert_eq!(changes["models"], json!([]));
}

/// Neither side may be invalid; both documents' problems are reported together.
#[tokio::test]
async fn what_does_not_stand_is_not_compared() {
    let (old, bad) = (fixture("old.yaml"), fixture("../registries/bad/load-no-providers.yaml"));
    let ended = check(&["--registry", &old, "--against", &bad]).await;
    assert_eq!(ended.status.code(), Some(3));
    assert!(ended.stdout.contains("error: ") && ended.stdout.contains("no providers"), "{ended:?}");
    let catalogue = fixture("../catalogues/bad/many-faults.yaml");
    let answer = as_json(&["--registry", &bad, "--probe-catalog", &catalogue]).await;
    let documents: std::collections::BTreeSet<&str> =
        answer["problems"].as_array().unwrap().iter().map(|row| row["document"].as_str().unwrap()).collect();
    assert_eq!(documents.len(), 2);
}

/// `check` uses the registry that the service would use, also if the configuration names it.
#[tokio::test]
async fn a_registry_that_the_configuration_names_is_the_one_that_is_checked() {
    let folder = tempfile::tempdir().unwrap();
    let config = folder.path().join("config.yaml");
    std::fs::write(&config, format!("registry: {{file: {}}}\n", fixture("../registries/good/odd.yaml"))).unwrap();
    let answer = as_json(&["--config", config.to_str().unwrap(), "--against", &fixture("old.yaml")]).await;
    assert_eq!(answer["warnings"].as_array().unwrap().len(), 10);
    assert_eq!(answer["warnings"][0]["place"], "schema_note");
    assert!(answer["warnings"][0]["document"].as_str().unwrap().ends_with("odd.yaml"));
    assert!(answer["changes"].to_string().contains("acme-one"), "{answer}");
    std::fs::write(&config, format!("registry: {{file: {}}}\n", fixture("../registries/bad/seven-faults.yaml"))).unwrap();
    let answer = as_json(&["--config", config.to_str().unwrap()]).await;
    assert_eq!(answer["problems"].as_array().unwrap().len(), 7);
}

/// A missing file is a problem of its own, beside the other documents'.
#[tokio::test]
async fn a_file_that_cannot_be_read_is_told_with_the_rest() {
    let catalogue = fixture("../catalogues/bad/many-faults.yaml");
    let arguments = ["check", "--format", "json", "--registry", "/nowhere/providers.yaml", "--probe-catalog", &catalogue];
    let ended = run(&arguments, &[]).await;
    assert_eq!(ended.status.code(), Some(3));
    let answer: Value = serde_json::from_str(&ended.stdout).unwrap();
    assert_eq!(answer["problems"][0]["document"], "/nowhere/providers.yaml");
    assert!(answer["problems"][0]["message"].as_str().unwrap().starts_with("could not be read: "));
    assert!(answer["problems"].as_array().unwrap().len() > 10);
}

/// What cannot be checked at all is listed, with a reason that a program can read.
#[tokio::test]
async fn check_names_the_providers_that_are_not_asked() {
    let answer = as_json(&[]).await;
    let not_asked: Vec<(&str, &str)> = answer["not_asked"]
        .as_array()
        .unwrap()
        .iter()
        .map(|row| (row["provider"].as_str().unwrap(), row["reason"].as_str().unwrap()))
        .collect();
    let expected = [
        ("anthropic-oauth", "OAUTH_SUBSCRIPTION"),
        ("openai-subscription", "OAUTH_SUBSCRIPTION"),
        ("platform", "PLATFORM"),
        ("vertex", "AMBIENT_IDENTITY"),
        ("ollama", "KEYLESS"),
        ("custom", "TENANT_ENDPOINT"),
    ];
    assert_eq!(not_asked, expected);
}
