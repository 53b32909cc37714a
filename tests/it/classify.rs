//! `byok-gate classify` as a person and a script use it.

use std::process::Stdio;

use serde_json::{Value, json};
use tokio::io::AsyncWriteExt;

use crate::support::binary::{command, run};

#[tokio::test]
async fn one_answer_by_its_row() {
    let body = r#"{"error": {"message": "You have insufficient permissions. Missing scopes: api.model.read"}}"#;
    let asked = ["classify", "--host", "API.openai.com", "--request", "GET /v1/models", "--status", "403", "--body", body];
    let ended = run(&asked, &[]).await;
    assert_eq!(ended.status.code(), Some(0), "{ended:?}");
    assert!(ended.stdout.starts_with("UNEXPECTED_RESPONSE\n"), "{}", ended.stdout);
    for words in
        ["signals[0] -> RESTRICTED (confidence L)", "a restricted key", "responses: POST /v1/responses, key in authorization"]
    {
        assert!(ended.stdout.contains(words), "{}", ended.stdout);
    }
    let ended = run(&[&asked[..], &["--format", "json"]].concat(), &[]).await;
    let answer: Value = serde_json::from_str(&ended.stdout).unwrap();
    assert_eq!(answer["next"], json!({"probe": "responses", "request": "POST /v1/responses", "header": "authorization"}));
    assert_eq!((&answer["asked_by"], &answer["confidence"]), (&json!("row"), &json!("D")));
}

/// An answer that needs a calibration is reported as such, and every header is tried before a key is called dead.
#[tokio::test]
async fn a_host_without_a_row() {
    let classify = async |status: &str, body: &str| -> Value {
        let host = ["classify", "--host", "llm.acme.example", "--request", "GET /gateway/v1/models", "--format", "json"];
        let ended = run(&[&host[..], &["--status", status, "--body", body]].concat(), &[]).await;
        serde_json::from_str(&ended.stdout).unwrap()
    };
    let yes = classify("200", r#"{"data": []}"#).await;
    assert_eq!(
        (&yes["verdict"], &yes["once_calibrated"], &yes["next"]),
        (&json!("NOT_CALIBRATED"), &json!("VALID"), &Value::Null)
    );
    let no = classify("401", r#"{"error": "no"}"#).await;
    assert_eq!((&no["verdict"], &no["once_calibrated"]), (&json!("INVALID"), &Value::Null));
    // A list may refuse every key.
    let called = json!({"probe": "completion", "request": "POST /gateway/v1/chat/completions", "header": "authorization, x-api-key, api-key"});
    assert_eq!(no["next"], called);
    let forbidden = classify("403", r#"{"error": {"code": "no"}}"#).await;
    assert_eq!((&forbidden["verdict"], &forbidden["once_calibrated"]), (&json!("FORBIDDEN"), &json!("INVALID")));
    assert_eq!(forbidden["asked_by"], "default");
}

#[tokio::test]
async fn headers_count() {
    let asked =
        ["classify", "--host", "api.deepseek.com", "--request", "GET /user/balance", "--status", "401", "--body", "go away"];
    assert!(run(&asked, &[]).await.stdout.starts_with("INVALID\n"));
    for header in ["Content-Type: text/html", "CF-Mitigated: challenge"] {
        let ended = run(&[&asked[..], &["--header", header]].concat(), &[]).await;
        assert!(ended.stdout.starts_with("UNEXPECTED_RESPONSE\n"), "{header}: {ended:?}");
    }
}

/// An answer to a request that no probe makes is classified by its surface's shape and the row's signals.
#[tokio::test]
async fn any_answer_of_a_host() {
    let classify = async |request: &str, status: &str, body: &str| -> Value {
        let asked = [
            "classify",
            "--host",
            "api.deepseek.com",
            "--format",
            "json",
            "--request",
            request,
            "--status",
            status,
            "--body",
            body,
        ];
        let ended = run(&asked, &[]).await;
        assert_eq!(ended.status.code(), Some(0), "{ended:?}");
        serde_json::from_str(&ended.stdout).unwrap()
    };
    let word = |told: &Value, name: &str| told[name].as_str().unwrap_or_default().to_owned();
    let told = classify("POST /v1/chat/completions", "401", "{}").await;
    assert_eq!((word(&told, "asked_by"), word(&told, "verdict")), ("nearest".into(), "INVALID".into()));
    let told = classify("POST /v1/chat/completions", "200", r#"{"choices": []}"#).await;
    assert_eq!((word(&told, "reading"), word(&told, "surface")), ("ACCEPTED".into(), "chat-completions".into()));
    let told = classify("POST /v1/chat/completions", "200", r#"{"is_available": true}"#).await;
    assert_eq!((word(&told, "reading"), word(&told, "cause")), ("UNEXPECTED_RESPONSE".into(), "WRONG_SHAPE".into()));
    let told = classify("GET /user/balance", "200", r#"{"is_available": true}"#).await;
    assert_eq!((word(&told, "asked_by"), word(&told, "verdict")), ("row".into(), "VALID".into()));
    for (status, body, cause) in [
        ("404", "{}", "NOT_FOUND"),
        ("200", "<html>", "PAGE"),
        ("403", "no", "PLAIN_TEXT"),
        ("403", "", "EMPTY_BODY"),
        ("302", "", "REDIRECT"),
        ("200", r#"{"error": "x"}"#, "ERROR_BESIDE"),
    ] {
        assert_eq!(word(&classify("GET /user/balance", status, body).await, "cause"), cause, "{status} {body}");
    }
}

/// A new row is tried on an answer before any probe uses it.
#[tokio::test]
async fn a_new_row_is_tried() {
    let folder = tempfile::tempdir().unwrap();
    let catalogue = folder.path().join("rows.yaml");
    let row = "catalogue_version: 1\nhosts:\n  - host: llm.acme.example\n    vendor: acme\n    probes:\n      - name: me\n        path: /me\n        \
               auth: [api-key]\n        expect: [id]\n        signals:\n          - {status: [418], verdict: QUOTA_EXHAUSTED}\n";
    std::fs::write(&catalogue, row).unwrap();
    let rows = ["classify", "--probe-catalog", catalogue.to_str().unwrap(), "--host", "llm.acme.example", "--status", "418"];
    let ended = run(&[&rows[..], &["--request", "GET /me"]].concat(), &[]).await;
    assert!(ended.stdout.starts_with("QUOTA_EXHAUSTED\n"), "{ended:?}");
    let ended = run(&[&rows[..], &["--request", "PATCH /me"]].concat(), &[]).await;
    assert_eq!(ended.status.code(), Some(2));
    assert!(ended.stderr.contains("`PATCH` is no method of a probe"), "{ended:?}");
    // A tenant's own request is classified by the nearest probe's signals, and the output says so.
    let ended = run(&[&rows[..], &["--request", "POST /v1/chat/completions"]].concat(), &[]).await;
    assert!(ended.stdout.starts_with("QUOTA_EXHAUSTED\n"), "{ended:?}");
    assert!(ended.stdout.contains("read by the nearest probe's signals"), "{ended:?}");
}

/// A line that cannot be classified gets an error in its place, and the others are answered.
#[tokio::test]
async fn a_batch_from_standard_input() {
    let lines = [
        r#"{"host": "api.groq.com", "request": "GET /openai/v1/models", "status": 401, "body": {"error": {"code": "invalid_api_key"}}}"#,
        "",
        "not json",
        r#"{"host": "api.groq.com", "request": "models", "status": 401}"#,
        r#"{"host": "api.groq.com", "request": "GET /openai/v1/models", "status": 7}"#,
        r#"{"host": "api.groq.com", "request": "GET /openai/v1/models", "status": 429, "headers": {"Retry-After": "7"}, "body": "slow"}"#,
    ];
    let mut child = command(&["classify", "--batch", "-"], &[]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(lines.join("\n").as_bytes()).await.unwrap();
    let output = child.wait_with_output().await.unwrap();
    assert_eq!(output.status.code(), Some(2));
    let told: Vec<Value> =
        String::from_utf8(output.stdout).unwrap().lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let words: Vec<_> = told.iter().map(|row| row["verdict"].as_str().or(row["error"].as_str()).unwrap()).collect();
    assert_eq!((words[0], words[4]), ("INVALID", "RATE_LIMITED"));
    assert_eq!(told[1]["line"], 3);
    assert!(words[2].contains("not of the form") && words[3].contains("status 7"), "{words:?}");
}
