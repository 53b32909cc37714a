//! `byok-gate config`: what is in force and where it came from, without the content of any file that holds a secret.

use std::fs;

use serde_json::Value;

use crate::support::binary;

#[tokio::test]
async fn config_tells_every_value_with_its_origin_and_no_secret() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    fs::write(path("config.yaml"), "limits: {decisions: 7, connections: 7}\n").unwrap();
    for secret in ["tokens", "key"] {
        fs::write(path(secret), "made-up-canary-0123456789").unwrap();
    }
    let (config, tokens, key) = (path("config.yaml"), path("tokens"), path("key"));
    let environment = [("BYOK_GATE__LIMITS__CONNECTIONS", "8"), ("BYOK_GATE__FINGERPRINTS__KEY_FILE", key.as_str())];
    let arguments = ["config", "--config", &config, "--token-file", &tokens, "--listen", "unix:/run/x.sock", "--format"];
    let ended = binary::run(&[&arguments[..], &["json"]].concat(), &environment).await;
    assert_eq!(ended.status.code(), Some(0), "{ended:?}");
    let body: Value = serde_json::from_str(&ended.stdout).unwrap();
    for (key, value, from) in [
        ("limits.decisions", Value::from(7), format!("file {config}")),
        ("limits.connections", Value::from(8), "environment BYOK_GATE__LIMITS__CONNECTIONS".into()),
        ("server.listen", Value::from(vec!["unix:/run/x.sock"]), "flag --listen".into()),
        ("callers.token_file", Value::from(tokens.as_str()), "flag --token-file".into()),
        ("cache.valid", Value::from("30s"), "default".into()),
    ] {
        assert_eq!((&body[key]["value"], body[key]["from"].as_str().unwrap()), (&value, from.as_str()), "{key}");
    }
    let text = binary::run(&[&arguments[..], &["text"]].concat(), &environment).await;
    assert!(text.stdout.lines().any(|line| line.starts_with("limits.decisions ") && line.ends_with(&format!("file {config}"))));
    for told in [ended.stdout, ended.stderr, text.stdout, text.stderr] {
        assert!(!told.contains("canary"), "{told}");
    }
}

/// A typing error ends the start with the exit code of an invalid configuration, and names the nearest key.
#[tokio::test]
async fn a_key_that_is_not_known_ends_the_start() {
    for command in ["serve", "config"] {
        let ended = binary::run(&[command], &[("BYOK_GATE__LIMITS__DECISION", "made-up-canary")]).await;
        assert_eq!(ended.status.code(), Some(3), "{ended:?}");
        assert!(ended.stderr.contains("the nearest is `limits.decisions`"), "{}", ended.stderr);
        assert!(!ended.stderr.contains("canary"), "{}", ended.stderr);
    }
}

/// What does not fit is told in the words of whoever wrote it.
#[tokio::test]
async fn a_log_filter_and_a_value_that_do_not_fit_are_told_plainly() {
    for (filter, words) in [
        ("info,byok_gate=loud", "`byok_gate=loud` is no directive: write LEVEL or MODULE=LEVEL"),
        ("loud", "`loud` is no level: write one of off, error, warn, info, debug, trace"),
    ] {
        let ended = binary::run(&["serve", "--listen", "127.0.0.1:0", "--log", filter], &[]).await;
        assert!(!ended.status.success() && ended.stderr.contains(words), "{filter}: {ended:?}");
    }
    let ended = binary::run(&["config"], &[("BYOK_GATE__LIMITS__DECISIONS", "many")]).await;
    let words = "limits.decisions: is the text `many`; it must be a whole number of 0 or more (from environment BYOK_GATE__LIMITS__DECISIONS)";
    assert!(ended.stderr.contains(words), "{ended:?}");
}
