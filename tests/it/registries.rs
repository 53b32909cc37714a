//! Valid and invalid registries: what loads, with its warnings, and all problems of what does not load.
//!
//! Beside each document is the expected output: its warnings, or its problems. To change that on purpose, look at the
//! difference and write it anew: `BLESS=1 cargo test --test it registries`.

use std::{
    fs,
    path::{Path, PathBuf},
};

use byok_gate::{
    core::{catalogue::Catalogue, registry::Registry},
    domain::{
        problem::{Loaded, Problem},
        protocol::Protocol,
    },
};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::support::binary::run;

/// The platform's own registries, beside the repository on the machines that have them.
const PLATFORM: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../shared/data/derive-vectors.json");
/// Each case of the platform's loader, and the document here that has its fault.
const LOAD_CASES: [(&str, &str); 11] = [
    ("unknown provider", "load-unknown-provider-ref"),
    ("empty native provider set", "load-empty-native-set"),
    ("twice", "load-duplicate-provider-ref"),
    ("no runtimes", "load-no-runtimes-block"),
    ("schema_version", "load-wrong-schema-version"),
    ("parse manifest", "load-malformed-yaml"),
    ("no providers", "load-no-providers"),
    ("duplicate provider name", "load-duplicate-provider-name"),
    ("model_prefix_match", "load-uncompilable-pattern"),
    ("protocol must be", "load-missing-protocol"),
    ("upstream_vendor|unique", "load-duplicate-upstream-vendor"),
];

fn folder(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/registries").join(name)
}

fn documents(name: &str) -> Vec<PathBuf> {
    let mut files: Vec<_> = fs::read_dir(folder(name)).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.retain(|file| file.extension().is_some_and(|extension| extension == "yaml"));
    files.sort();
    files
}

fn parsed(bytes: &[u8]) -> Result<Loaded<Registry>, Vec<Problem>> {
    Registry::parse("test", bytes, &|_| None).map_err(|problems| problems.list)
}

fn told(list: &[Problem]) -> String {
    list.iter().map(|problem| format!("{problem}\n")).collect()
}

#[track_caller]
fn is_told(document: &Path, found: &str) {
    let expected = document.with_extension("txt");
    if std::env::var_os("BLESS").is_some() {
        fs::write(&expected, found).unwrap();
    }
    assert_eq!(found, fs::read_to_string(&expected).unwrap_or_default(), "{}", document.display());
}

#[test]
fn good_ones_load_and_are_told_what_is_odd() {
    for document in documents("good") {
        let loaded =
            parsed(&fs::read(&document).unwrap()).unwrap_or_else(|list| panic!("{}: {}", document.display(), told(&list)));
        is_told(&document, &told(&loaded.warnings));
    }
}

#[test]
fn bad_ones_are_told_all_their_problems() {
    for document in documents("bad") {
        let Err(list) = parsed(&fs::read(&document).unwrap()) else { panic!("{} loads", document.display()) };
        is_told(&document, &told(&list));
    }
    let seven = fs::read_to_string(folder("bad/seven-faults.txt")).unwrap();
    assert_eq!(seven.lines().count(), 7, "{seven}");
}

/// Many patterns of which each is not too large need much together; the rest is not compiled then.
#[test]
fn the_memory_of_all_patterns_is_limited() {
    let provider = |number: usize| {
        format!(
            "  - name: acme-{number}\n    display_name: Acme\n    protocol: openai\n    auth_mode: anthropic_api\n    \
             auth_env: [ACME_API_KEY]\n    model_prefix_match: '^acme-{number}[:/]\\w{{12}}'\n"
        )
    };
    let registry = |count: usize| {
        let providers: String = (0..count).map(provider).collect();
        format!("schema_version: 1\nproviders:\n{providers}runtimes:\n  agent:\n    providers: [{{name: acme-0, models: [m]}}]\n")
    };
    assert_eq!(parsed(registry(5).as_bytes()).err(), None);
    let found = parsed(registry(300).as_bytes()).unwrap_err();
    let too_many = |problem: &&Problem| problem.message.contains("the compiled patterns need more than 8388608 bytes");
    assert_eq!(found.iter().filter(too_many).count(), 1, "{}", told(&found));
    assert!(found.iter().any(|problem| problem.place.ends_with("].model_prefix_match")), "{}", told(&found));
}

#[test]
fn what_cannot_be_text_has_an_answer_too() {
    let found = |bytes: &[u8]| told(&parsed(bytes).unwrap_err());
    assert_eq!(found(b"schema_version: 1\nx: \xc3\x28"), "is not UTF-8 (byte 21); save it as UTF-8\n");
    assert_eq!(
        found("schema_version: 1".encode_utf16().flat_map(u16::to_le_bytes).collect::<Vec<_>>().as_slice()).lines().count(),
        1
    );
    let minimal = fs::read(folder("good/minimal.yaml")).unwrap();
    let mut large = minimal.clone();
    large.resize(1024 * 1024, b'\n');
    assert!(parsed(&large).is_ok(), "exactly the limit");
    large.push(b'\n');
    assert_eq!(found(&large), "is 1048577 bytes long; the limit is 1048576\n");
}

/// The environment wins over the default, and cannot change the host.
#[test]
fn endpoint_variables_take_labels_only() {
    let document = fs::read(folder("good/everything.yaml")).unwrap();
    let url_of = |name: &str, variable: &str, value: &str| {
        let env = |asked: &str| (asked == variable).then(|| value.to_owned());
        let loaded = Registry::parse("test", &document, &env).map_err(|problems| told(&problems.list))?;
        let provider = loaded.value.providers().iter().find(|provider| provider.name == name).unwrap();
        Ok::<_, String>(provider.base_url.as_ref().unwrap().to_string())
    };
    let project = |region: &str| format!("https://{region}-cloud.example/v1/projects/made-up/endpoints/openapi");
    assert_eq!(url_of("cloud", "NOTHING", "").unwrap(), project("us-central1"));
    assert_eq!(url_of("cloud", "CLOUD_LOCATION", "eu-west4").unwrap(), project("eu-west4"));
    assert_eq!(url_of("cloud", "CLOUD_LOCATION", "  ").unwrap(), project("us-central1"), "blank is not set");
    for evil in ["evil.example/", "evil.example#", "a@evil.example", "evil.example?", "a.b", "a/b", "a:b", "%2e", "a b", "é"] {
        let fault = url_of("cloud", "CLOUD_LOCATION", evil).unwrap_err();
        assert!(fault.contains("the value of CLOUD_LOCATION for `{location}` could change the host"), "{evil}: {fault}");
    }
    assert_eq!(url_of("platform", "CP_BASE_URL", "https://cp.example/").unwrap(), "https://cp.example/llm/anthropic/v1");
    for bad in ["https://user@cp.example", "ftp://cp.example", "https://cp.example?x=", "cp.example"] {
        assert!(url_of("platform", "CP_BASE_URL", bad).is_err(), "{bad}");
    }
}

/// `check` on the document: its exit code, and what it wrote as JSON.
async fn checked(document: &Path, more: &[&str]) -> (Option<i32>, Value) {
    let arguments = [&["check", "--format", "json", "--registry", document.to_str().unwrap()], more].concat();
    let ended = run(&arguments, &[]).await;
    (ended.status.code(), serde_json::from_str(&ended.stdout).unwrap_or_else(|_| panic!("{ended:?}")))
}

#[tokio::test]
async fn check_refuses_each_of_the_loaders_cases() {
    let cases: Vec<String> = match fs::read(PLATFORM) {
        Ok(bytes) => {
            let file: Value = serde_json::from_slice(&bytes).unwrap();
            let cases = file["manifest_load_errors"].as_array().unwrap();
            cases.iter().map(|case| case["error_contains"].as_str().unwrap().to_owned()).collect()
        }
        Err(_) => LOAD_CASES.iter().map(|(fault, _)| (*fault).to_owned()).collect(),
    };
    assert_eq!(cases.len(), LOAD_CASES.len());
    for fault in cases {
        let (_, document) =
            LOAD_CASES.iter().find(|(known, _)| *known == fault).unwrap_or_else(|| panic!("no document for {fault}"));
        let (code, answer) = checked(&folder("bad").join(document).with_extension("yaml"), &[]).await;
        assert_eq!(code, Some(3), "{document}");
        let problems = answer["problems"].to_string();
        assert!(fault.split('|').any(|words| problems.contains(words)), "{document}: {problems}");
    }
}

#[tokio::test]
async fn check_tells_all_seven_faults() {
    let document = folder("bad/seven-faults.yaml");
    let (code, answer) = checked(&document, &[]).await;
    assert_eq!((code, answer["valid"].as_bool()), (Some(3), Some(false)));
    let problems = answer["problems"].as_array().unwrap();
    assert_eq!(problems.len(), 7);
    for problem in problems {
        assert_eq!(problem["document"], document.to_str().unwrap());
        assert!(problem["line"].is_u64() && problem["place"].is_string() && problem["message"].is_string(), "{problem}");
    }
    let ended = run(&["check", "--registry", document.to_str().unwrap()], &[]).await;
    assert_eq!(ended.stdout.lines().filter(|line| line.starts_with(&format!("error: {}:", document.display()))).count(), 7);
}

#[tokio::test]
async fn oddities_are_warnings_and_errors_under_strict() {
    let document = folder("good/odd.yaml");
    let (code, answer) = checked(&document, &[]).await;
    assert_eq!((code, answer["valid"].as_bool()), (Some(0), Some(true)));
    assert_eq!(
        answer["warnings"].as_array().unwrap().len(),
        fs::read_to_string(document.with_extension("txt")).unwrap().lines().count()
    );
    let (code, answer) = checked(&document, &["--strict"]).await;
    assert_eq!((code, answer["valid"].as_bool()), (Some(3), Some(false)));
    assert_eq!(checked(&folder("good/everything.yaml"), &["--strict"]).await.0, Some(0));
}

/// The platform's real registries, each in its own state.
/// `check` gives up after ten seconds. Compared pair by pair, so many patterns would take longer.
#[tokio::test]
async fn a_registry_with_many_providers_loads() {
    let mut text = "schema_version: 1\nproviders:\n".to_owned();
    for number in 100..500 {
        text.push_str(&format!(
            "  - {{name: p{number}, display_name: P, protocol: openai, auth_mode: third_party_anthropic_compat, auth_env: [KEY_{number}], \
             model_prefix_match: '(?i)^vendor-{number}[:/-]'}}\n"
        ));
    }
    text.push_str("runtimes:\n  agent:\n    providers:\n");
    for number in 100..500 {
        text.push_str(&format!("      - {{name: p{number}, models: [vendor-{number}/large]}}\n"));
    }
    let folder = TempDir::new().unwrap();
    let file = folder.path().join("registry.yaml");
    fs::write(&file, &text).unwrap();
    let (exit, report) = checked(&file, &[]).await;
    assert_eq!(exit, Some(0), "{report}");
    // All patterns match the same ids: what is said of it has an end.
    let same = regex::Regex::new("'[^']+'").unwrap().replace_all(&text, "'^a'").into_owned();
    let fault = parsed(same.as_bytes()).unwrap_err();
    assert!(fault.iter().any(|problem| problem.message.contains("credential names matter to")), "{}", told(&fault));
}

#[tokio::test]
async fn check_accepts_the_platforms_registries() {
    let Ok(bytes) = fs::read(PLATFORM) else { return };
    let file: Value = serde_json::from_slice(&bytes).unwrap();
    let folder = TempDir::new().unwrap();
    for name in ["june", "aug"] {
        let mut registry = file["registries"][name].clone();
        for offers in registry["runtimes"].as_object_mut().unwrap().values_mut() {
            *offers = json!({ "providers": offers });
        }
        let document = folder.path().join(name).with_extension("yaml");
        fs::write(&document, registry.to_string()).unwrap();
        let (code, answer) = checked(&document, &[]).await;
        assert_eq!(code, Some(0), "{name}: {answer}");
        let odd: Vec<&str> = answer["warnings"].as_array().unwrap().iter().filter_map(|row| row["message"].as_str()).collect();
        assert!(odd.iter().all(|message| message.contains("not a key that this schema knows")), "{name}: {odd:?}");
    }
}

/// The examples of the documentation are valid.
#[test]
fn the_documentations_examples_load() {
    let block = |page: &str, indent: &str| {
        let text = fs::read_to_string(PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("docs").join(page)).unwrap();
        let (_, rest) = text.split_once(&format!("{indent}```yaml\n")).unwrap();
        rest.split_once(&format!("{indent}```")).unwrap().0.replace(&format!("\n{indent}"), "\n")
    };
    let loaded = parsed(block("registry.md", "").as_bytes()).unwrap_or_else(|list| panic!("{}", told(&list)));
    assert_eq!(told(&loaded.warnings), "line 3: providers: none is named `platform`: nothing can be billed to the platform\n");
    let row = block("liveness.md", "   ");
    let loaded = Catalogue::embedded().unwrap().value.overlaid("test", row.trim_start().as_bytes()).unwrap();
    assert!(loaded.value.row("api.acme.example", "/v1", Protocol::OpenAi).is_some() && loaded.warnings.is_empty());
}

mod any_bytes {
    use byok_gate::core::{catalogue::Catalogue, registry::Registry};
    use proptest::prelude::*;

    /// Documents with the schemas' own words in them get further than random bytes do.
    fn documents() -> impl Strategy<Value = String> {
        const WORDS: [&str; 44] = [
            "schema_version: 1",
            "catalogue_version: 1",
            "providers:",
            "runtimes:",
            "hosts:",
            "probes:",
            "signals:",
            "- name: a",
            "- name: b",
            "name: platform",
            "display_name: x",
            "protocol: openai",
            "auth_mode: oauth",
            "auth_env: [A]",
            "model_prefix_match: '^a'",
            "model_prefix_match: '('",
            "base_url_template: '{x}/y'",
            "base_url_template: 'https://{x}'",
            "endpoint_vars: {x: {env: X, default: '/'}}",
            "models: [a, a]",
            "withdrawn_models: ['']",
            "agent:",
            "- host: h",
            "host: 'h:1'",
            "vendor: v",
            "path: '{base}/v1'",
            "path: //",
            "auth: [bearer]",
            "expect: [a]",
            "- {status: [200], verdict: ACCEPTED}",
            "- {status: [9999999999], verdict: x}",
            "contains: ''",
            "at_most: 1e400",
            "at_most: .nan",
            "body: {a: '{model}'}",
            "thinking: {}",
            "budget_ms: -1",
            "key_shapes: [{prefix: '', vendor: v}]",
            "unprobed: {a: {reason: KEYLESS, note: n}}",
            "x: &a [*a]",
            "<<: {a: b}",
            "? [a]\n: b",
            "!!binary x",
            "%YAML 9",
        ];
        let line = (0_usize..5, prop::sample::select(WORDS.as_slice()))
            .prop_map(|(depth, word)| format!("{}{word}\n", "  ".repeat(depth)));
        prop::collection::vec(line, 0..40).prop_map(|lines| lines.concat())
    }

    fn read(bytes: &[u8]) {
        drop(Registry::parse("test", bytes, &|_| None));
        drop(Catalogue::embedded().unwrap().value.overlaid("test", bytes));
    }

    proptest! {
        #[test]
        fn never_panic(bytes in prop::collection::vec(any::<u8>(), 0..512)) {
            read(&bytes);
        }

        #[test]
        fn of_text_never_panic(text in "[ -~\n\t\u{e9}]{0,400}") {
            read(text.as_bytes());
        }

        #[test]
        fn of_the_schemas_words_never_panic(document in documents()) {
            read(document.as_bytes());
        }
    }
}
