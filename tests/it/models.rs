//! `byok-gate models`: what each runtime offers, and whose credential it takes.

use serde_json::{Value, json};

use crate::support::{binary, case, gate::Files};

#[tokio::test]
async fn models_tells_what_a_runtime_offers() {
    let (registry, catalogue) = case::documents(1);
    let files = Files::new(&registry, &catalogue, None);
    let path = files.flags().into_iter().skip_while(|flag| flag != "--registry").nth(1).unwrap();
    let models = async |arguments: &[&str]| binary::run(&[&["models", "--registry", &path], arguments].concat(), &[]).await;
    let ended = models(&["--runtime", "agent", "--format", "json"]).await;
    let whole: Value = serde_json::from_str(&ended.stdout).unwrap();
    let rows = whole["models"].as_array().unwrap();
    assert!(rows.iter().all(|row| row["runtime"] == "agent"), "{whole}");
    let row = rows.iter().find(|row| row["model"] == "acme-large").unwrap();
    let expect = (json!("acme"), json!("BYOK"), json!(["ACME_API_KEY", "ACME_TOKEN"]));
    assert_eq!((row["provider"].clone(), row["billing_mode"].clone(), row["accepted_env"].clone()), expect);
    let text = models(&["--runtime", "agent"]).await.stdout;
    assert_eq!(text.lines().count(), rows.len());
    let line: Vec<&str> = text.lines().find(|line| line.contains(" acme-large ")).unwrap().split_whitespace().collect();
    assert_eq!(line, ["agent", "acme-large", "acme", "BYOK", "ACME_API_KEY", "or", "ACME_TOKEN"]);
    let unknown = models(&["--runtime", "agnet"]).await;
    assert_eq!((unknown.status.code(), unknown.stdout.as_str()), (Some(2), ""), "{unknown:?}");
    assert!(unknown.stderr.contains("agent"), "{unknown:?}");
}
