//! `byok-gate probe`: its output, its exit codes, and what it never sends.

use serde_json::{Value, json};

use crate::support::{
    binary::{self, Ended},
    case,
    gate::Files,
    vendor::{Row, Vendor},
};

const KEY: &str = "made-up-probe-key";

async fn vendor() -> Vendor {
    let row = |path: &str, key: Option<&str>, status, body: &str| Row {
        path: Some(path.into()),
        key: key.map(str::to_owned),
        status: Some(status),
        body: body.into(),
        ..Row::default()
    };
    Vendor::start(vec![
        row("/acme/v1/models", Some(KEY), 403, r#"{"error": {"code": "missing_scope"}}"#),
        row("/acme/v1/chat/completions", Some(KEY), 200, r#"{"choices": []}"#),
        row("/loose/v1/models", None, 200, r#"{"data": []}"#),
        row("/loose/v1/chat/completions", None, 200, r#"{"choices": []}"#),
        row("/acme/v1/models", None, 401, r#"{"error": {"code": "no"}}"#),
    ])
    .await
}

async fn probe(vendor: &Vendor, arguments: &[&str], value: &str) -> Ended {
    let (registry, catalogue) = case::documents(vendor.address.port());
    let files = Files::new(&registry, &catalogue, None);
    let flags: Vec<String> =
        files.flags().into_iter().filter(|flag| !["--platform-proxy", "available"].contains(&flag.as_str())).collect();
    let whole: Vec<&str> = ["probe", "--env", "THE_KEY"]
        .into_iter()
        .chain(arguments.iter().copied())
        .chain(flags.iter().map(String::as_str))
        .collect();
    let ended = binary::run(&whole, &[("THE_KEY", value)]).await;
    let told = ended.stdout.contains(value) || ended.stderr.contains(value);
    assert!(!told || value.trim().is_empty(), "{ended:?}");
    ended
}

/// The text without what differs from run to run.
fn steady(vendor: &Vendor, text: &str) -> String {
    let text = text.replace(&vendor.address.to_string(), "HOST");
    let lines = text.lines().map(|line| match line.rsplit_once("; ") {
        Some((before, time)) if time.ends_with(" ms") => before.to_owned(),
        _ => line.to_owned(),
    });
    lines.collect::<Vec<_>>().join("\n")
}

#[tokio::test]
async fn it_tells_every_call_of_the_ladder() {
    let vendor = vendor().await;
    let ended = probe(&vendor, &["--provider", "acme", "--explain"], KEY).await;
    assert_eq!(
        steady(&vendor, &ended.stdout),
        "VALID for provider `acme` by `completion` HTTP 200\n\
         \u{20} host      HOST\n\
         \u{20} call 1    `models` GET http://HOST/acme/v1/models (bearer): HTTP 403, alive, but not for this endpoint; made-up keys: not asked\n\
         \u{20} call 2    `completion` POST http://HOST/acme/v1/chat/completions (bearer): HTTP 200, accepted; made-up keys: not asked"
    );
    assert_eq!(ended.status.code(), Some(0));
    // The first model that some runtime lists.
    assert!(vendor.asked()[1].body.contains("acme-large"), "{:?}", vendor.asked());
    let ended = probe(&vendor, &["--provider", "acme", "--explain", "--format", "json"], KEY).await;
    let whole: Value = serde_json::from_str(&ended.stdout).unwrap();
    assert_eq!(
        (&whole["verdict"], &whole["probe"], &whole["upstream_status"]),
        (&json!("VALID"), &json!("completion"), &json!(200))
    );
    let calls = whole["calls"].as_array().unwrap();
    let statuses: Vec<_> = calls.iter().map(|call| (call["probe"].clone(), call["status"].clone())).collect();
    assert_eq!(statuses, [(json!("models"), json!(403)), (json!("completion"), json!(200))]);
}

#[tokio::test]
async fn it_exits_by_what_is_known() {
    let vendor = vendor().await;
    let code = async |arguments: &[&str], value| {
        let ended = probe(&vendor, arguments, value).await;
        (ended.status.code().unwrap(), ended.stdout.lines().next().unwrap_or_default().to_owned())
    };
    assert_eq!(
        code(&["--provider", "acme"], "made-up-dead").await,
        (10, "INVALID for provider `acme` by `models` HTTP 401".to_owned())
    );
    let public = ["--provider", "loose", "--model", "loose/m"];
    let unproven = (11, "NOT_CALIBRATED for provider `loose` by `completion` HTTP 200".to_owned());
    assert_eq!(code(&public, KEY).await, unproven);
    assert_eq!(code(&[&public[..], &["--calibrate"]].concat(), KEY).await, unproven);
    assert_eq!(code(&["--provider", "gone"], KEY).await.0, 11);
    assert_eq!(
        code(&["--provider", "subscription"], KEY).await,
        (11, "NO_SERVER_SURFACE for provider `subscription`".to_owned())
    );
    assert_eq!(code(&["--provider", "nobody"], KEY).await.0, 2);
    assert_eq!(code(&["--provider", "acme"], " ").await.0, 2);
}

#[tokio::test]
async fn it_never_sends_what_a_decision_would_not() {
    let vendor = vendor().await;
    for (value, code, says) in [
        ("beta-key-made-up", 10, "vendor `beta`"),
        ("acme-oauth-made-up-and-as-long-as-a-real-one-is", 11, "never sent"),
        ("acme-oauth-made-up", 10, "only the beginning"),
        ("made-up\nsecond-line", 10, "control character"),
    ] {
        let ended = probe(&vendor, &["--provider", "acme"], value).await;
        assert_eq!(ended.status.code(), Some(code), "{ended:?}");
        assert!(ended.stdout.contains(says), "{ended:?}");
    }
    assert!(vendor.asked().is_empty(), "{:?}", vendor.asked());
}
