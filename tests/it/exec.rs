//! `byok-gate exec`: runs in front of a workspace's process, and then becomes it.

use std::{
    fs,
    os::unix::fs::{PermissionsExt, symlink},
    path::PathBuf,
    process::Stdio,
};

use byok_gate::grpc::convert::pb;
use serde_json::Value;
use tokio::{
    io::{AsyncBufReadExt, BufReader},
    process::Command,
    time::timeout,
};

use crate::support::{
    binary::{self, Ended, PATIENCE, Serving},
    case,
    gate::Files,
    vendor::{Row, Vendor},
};

const KEY: &str = "made-up-exec-key";

/// A vendor, the files that lead to it, and a folder for what a test leaves.
struct Stage {
    vendor: Vendor,
    files: Files,
}

impl Stage {
    async fn new() -> Self {
        let row = |key, status, body| Row::at("/acme/v1/models", key, status, body);
        let vendor = Vendor::start(vec![
            row(Some(KEY), 200, r#"{"data": []}"#),
            row(Some("made-up-limited"), 429, "{}"),
            row(None, 401, r#"{"error": {"code": "no"}}"#),
        ])
        .await;
        let (registry, catalogue) = case::documents(vendor.address.port());
        Self { vendor, files: Files::new(&registry, &catalogue, None) }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.files.folder().join(name)
    }

    fn text(&self, name: &str) -> String {
        self.path(name).to_str().unwrap().to_owned()
    }

    /// `exec` with these flags before `--`, in front of a shell that runs this script.
    fn arguments(&self, flags: &[&str], script: &str) -> Vec<String> {
        let log = self.text("termination-log");
        let whole = ["exec", "--runtime", "agent", "--termination-log", &log].into_iter().chain(flags.iter().copied());
        let whole = whole.map(str::to_owned).chain(self.files.flags());
        whole.chain(["--", "/bin/sh", "-c", script].map(str::to_owned)).collect()
    }

    async fn run(&self, flags: &[&str], environment: &[(&str, &str)], script: &str) -> Ended {
        let arguments = self.arguments(flags, script);
        let ended = binary::run(&arguments.iter().map(String::as_str).collect::<Vec<_>>(), environment).await;
        for told in [&ended.stdout, &ended.stderr, &self.left()] {
            assert!(!environment.iter().any(|(_, value)| value.contains("made-up") && told.contains(value)), "{told}");
        }
        ended
    }

    /// The termination log.
    fn left(&self) -> String {
        fs::read_to_string(self.path("termination-log")).unwrap_or_default()
    }
}

#[track_caller]
fn fits_the_schema(body: &str) -> Value {
    let schema = serde_json::from_str(include_str!("../../docs/denial-body.schema.json")).unwrap();
    let body = serde_json::from_str(body).unwrap();
    if let Err(fault) = jsonschema::validate(&schema, &body) {
        panic!("{fault}: {body}");
    }
    body
}

#[tokio::test]
async fn an_allowed_workspace_becomes_its_command() {
    let stage = Stage::new().await;
    let flags = ["--model", "acme-large"];
    let ended = stage.run(&flags, &[("ACME_API_KEY", KEY)], "echo \"key $ACME_API_KEY\" | wc -c; exit 10").await;
    // The command's own exit code, even if it is one of ours; its environment is unchanged; nothing is added to its output.
    assert_eq!(ended.status.code(), Some(10), "{ended:?}");
    assert_eq!(ended.stdout.trim(), (KEY.len() + 5).to_string());
    assert_eq!((ended.stderr.as_str(), stage.left().as_str()), ("", ""));
    assert_eq!(stage.vendor.asked_with(KEY), 1);
    // The variables say what the flags do.
    let environment = [("ACME_API_KEY", KEY), ("BYOK_GATE_MODEL", "acme-large")];
    assert_eq!(stage.run(&[], &environment, "exit 7").await.status.code(), Some(7));
}

/// A name that the runtime reads but no provider of the registry has is read too: it may be the one that is sent.
#[tokio::test]
async fn names_that_the_runtime_alone_reads_are_looked_for() {
    let stage = Stage::new().await;
    let (registry, catalogue) = case::documents(stage.vendor.address.port());
    let facts = "runtimes:\n  agent:\n    version: made-up\n    sources: [made-up]\n    certainty: seen\n    providers:\n      \
                 acme: {reads: [AGENTS_OWN_KEY, ACME_API_KEY], header: bearer, surface: chat-completions}\n";
    let stage = Stage { files: Files::new(&registry, &catalogue.replacen("runtimes:\n", facts, 1), None), ..stage };
    for (environment, exit) in
        [(vec![("AGENTS_OWN_KEY", KEY)], 0), (vec![("AGENTS_OWN_KEY", "made-up-dead-key"), ("ACME_API_KEY", KEY)], 10)]
    {
        let ended = stage.run(&["--model", "acme-large"], &environment, "exit 0").await;
        assert_eq!(ended.status.code(), Some(exit), "{ended:?}");
    }
    // And a server lists them as relevant.
    let flags = stage.files.flags();
    let serving = Serving::start(&flags.iter().map(String::as_str).collect::<Vec<_>>()).await;
    let status = serving.client().await.get_registry_status(pb::GetRegistryStatusRequest {}).await.unwrap().into_inner();
    assert!(status.credential_names.contains(&"AGENTS_OWN_KEY".to_owned()) && status.credential_names.is_sorted());
}

/// The process becomes CMD: same id, and signals reach CMD directly.
#[tokio::test]
async fn signals_reach_the_command_itself() {
    let stage = Stage::new().await;
    let arguments = stage.arguments(&["--model", "acme-large"], "trap 'exit 42' TERM; echo $$; while :; do sleep 0.05; done");
    let mut child = binary::command(&arguments.iter().map(String::as_str).collect::<Vec<_>>(), &[("ACME_API_KEY", KEY)])
        .env("PATH", "/usr/bin:/bin")
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    let mut lines = BufReader::new(child.stdout.take().unwrap());
    timeout(PATIENCE, lines.read_line(&mut line)).await.unwrap().unwrap();
    let id = child.id().unwrap().to_string();
    assert_eq!(line.trim(), id);
    assert!(Command::new("kill").args(["-TERM", &id]).status().await.unwrap().success());
    assert_eq!(timeout(PATIENCE, child.wait()).await.unwrap().unwrap().code(), Some(42));
}

#[tokio::test]
async fn a_denied_workspace_never_runs_and_says_why_twice() {
    let stage = Stage::new().await;
    let script = format!("touch {}", stage.text("ran"));
    for (model, key, exit, code, says) in [
        ("acme-large", "", 10, "MISSING_BYOK_CREDENTIAL", "ACME_API_KEY"),
        ("acme-large", "made-up-dead-key", 10, "INVALID_BYOK_CREDENTIAL", "127.0.0.1"),
        ("gone/one", "", 10, "MISSING_BYOK_CREDENTIAL", "GONE_API_KEY"),
        ("gone/one", "made-up-gone-key", 11, "BYOK_PROVIDER_UNREACHABLE", "could not be reached"),
        ("nobody", "", 10, "UNREGISTERED_MODEL_FOR_RUNTIME", "nobody"),
        ("", "", 10, "MODEL_REQUIRED", "model"),
    ] {
        let environment = [("ACME_API_KEY", key), ("GONE_API_KEY", key)];
        let ended = stage.run(&["--model", model], &environment, &script).await;
        assert_eq!(ended.status.code(), Some(exit), "{model}: {ended:?}");
        assert!(ended.stderr.contains(code) && ended.stderr.contains(says), "{model}: {}", ended.stderr);
        assert_eq!(ended.stdout, "");
        let body = fits_the_schema(&stage.left());
        assert_eq!((body["code"].as_str(), body["model"].as_str()), (Some(code), Some(model)));
        assert_eq!(body["retryable"], exit == 11);
        assert!(ended.stderr.contains(body["decision_id"].as_str().unwrap()), "{}", ended.stderr);
    }
    assert!(!stage.path("ran").exists());
}

/// An unverified key is allowed with a message.
#[tokio::test]
async fn an_unverified_allow_is_not_silent() {
    let stage = Stage::new().await;
    let ended = stage.run(&["--model", "acme-large"], &[("ACME_API_KEY", "made-up-limited")], "exit 0").await;
    assert_eq!(ended.status.code(), Some(0), "{ended:?}");
    assert!(ended.stderr.contains("CREDENTIAL_UNVERIFIED"), "{}", ended.stderr);
    assert_eq!(stage.left(), "");
}

#[tokio::test]
async fn mounted_secrets_are_found_by_the_names_that_the_registry_knows() {
    let stage = Stage::new().await;
    let folder = stage.path("secrets");
    // As Kubernetes mounts them: links over a link, so that all change at once.
    fs::create_dir_all(folder.join("..1")).unwrap();
    symlink("..1", folder.join("..data")).unwrap();
    for (name, value) in [("ACME_API_KEY", "made-up-exec-key\n"), ("DATABASE_PASSWORD", "made-up-password")] {
        fs::write(folder.join("..1").join(name), value).unwrap();
        symlink(format!("..data/{name}"), folder.join(name)).unwrap();
    }
    let secrets = stage.text("secrets");
    let flags = ["--model", "acme-large", "--secrets-dir", &secrets];
    // One line break is not part of the value, and unknown names are not read, sent or warned about.
    let ended = stage.run(&flags, &[], "exit 0").await;
    assert_eq!((ended.status.code(), ended.stderr.as_str()), (Some(0), ""));
    assert_eq!(stage.vendor.asked_with(KEY), 1);
    // The command sees its environment, so that is checked.
    let ended = stage.run(&flags, &[("ACME_API_KEY", "made-up-dead-key")], "exit 0").await;
    assert_eq!(ended.status.code(), Some(10), "{ended:?}");
    assert_eq!(stage.run(&flags, &[("ACME_API_KEY", " ")], "exit 0").await.status.code(), Some(10));
    // A second line break is.
    fs::write(folder.join("..1/ACME_API_KEY"), "made-up-exec-key\n\n").unwrap();
    let ended = stage.run(&flags, &[], "exit 0").await;
    assert!(ended.stderr.contains("MALFORMED_BYOK_CREDENTIAL"), "{}", ended.stderr);
}

/// An unreadable value does not count as absent, and is ignored if nothing depends on it.
#[tokio::test]
async fn unreadable_secrets_deny_what_depends_on_them() {
    let stage = Stage::new().await;
    fs::create_dir(stage.path("secrets")).unwrap();
    fs::write(stage.path("secrets/ACME_API_KEY"), [0xff, 0xfe]).unwrap();
    for (folder, says) in [("secrets", "secrets/ACME_API_KEY could not be read"), ("no-such-folder", "could not be searched")] {
        let folder = stage.text(folder);
        let flags = ["--model", "acme-large", "--secrets-dir", &folder];
        let ended = stage.run(&flags, &[], "exit 0").await;
        assert_eq!(ended.status.code(), Some(11), "{ended:?}");
        assert!(ended.stderr.contains("CREDENTIAL_SCOPE_UNREADABLE") && ended.stderr.contains(says), "{}", ended.stderr);
        let flags = ["--model", "platform-small", "--secrets-dir", &folder];
        assert_eq!(stage.run(&flags, &[], "exit 6").await.status.code(), Some(6));
    }
}

#[tokio::test]
async fn a_server_decides_over_its_socket_and_its_absence_is_no_decision() {
    let stage = Stage::new().await;
    let socket = format!("unix:{}", stage.text("gate.sock"));
    let own = stage.files.flags();
    let serving =
        Serving::start(&["--listen", socket.as_str()].into_iter().chain(own.iter().map(String::as_str)).collect::<Vec<_>>())
            .await;
    let flags = ["--model", "acme-large", "--server", &socket, "--workspace-id", "ws-1"];
    let ended = stage.run(&flags, &[("ACME_API_KEY", KEY)], "exit 5").await;
    assert_eq!(ended.status.code(), Some(5), "{ended:?}");
    let ended = stage.run(&flags, &[], "exit 5").await;
    assert_eq!(ended.status.code(), Some(10), "{ended:?}");
    let id = fits_the_schema(&stage.left())["decision_id"].as_str().unwrap().to_owned();
    serving.terminate().await;
    let served = serving.ended().await;
    assert!(
        served.stdout.contains(&id) && served.stdout.contains("\"ws-1\"") && served.stdout.contains("PROVISION"),
        "{served:?}"
    );

    let ended = stage.run(&flags, &[("ACME_API_KEY", KEY)], "exit 5").await;
    assert_eq!(ended.status.code(), Some(1), "{ended:?}");
    assert!(ended.stderr.contains("no decision: unix:"), "{}", ended.stderr);
    let body = fits_the_schema(&stage.left());
    assert_eq!((body["code"].as_str(), body["retryable"].as_bool()), (Some("DECISION_UNAVAILABLE"), Some(true)));
}

/// On a stop signal during the decision it stops, and CMD is not run: a process with id 1 would not end otherwise.
#[tokio::test]
async fn a_signal_ends_it_before_the_decision() {
    let silent = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let stage = Stage::new().await;
    let server = silent.local_addr().unwrap().to_string();
    let arguments = stage.arguments(&["--model", "acme-large", "--server", &server], "exit 0");
    let mut child = binary::command(&arguments.iter().map(String::as_str).collect::<Vec<_>>(), &[]).spawn().unwrap();
    // It has sent its call, so it already catches signals.
    let (_held, _) = timeout(PATIENCE, silent.accept()).await.unwrap().unwrap();
    let id = child.id().unwrap().to_string();
    assert!(Command::new("kill").args(["-TERM", &id]).status().await.unwrap().success());
    assert_eq!(timeout(PATIENCE, child.wait()).await.unwrap().unwrap().code(), Some(1));
    assert!(stage.left().contains("told to stop"), "{}", stage.left());
}

#[tokio::test]
async fn a_command_that_cannot_be_run_is_a_fault_that_names_it() {
    let stage = Stage::new().await;
    let mut arguments = stage.arguments(&["--model", "acme-large"], "exit 0");
    arguments.truncate(arguments.len() - 3);
    fs::write(stage.path("plain"), "no program").unwrap();
    fs::set_permissions(stage.path("plain"), fs::Permissions::from_mode(0o644)).unwrap();
    for program in ["/no/such/program", &stage.text("plain")] {
        let whole: Vec<&str> = arguments.iter().map(String::as_str).chain([program]).collect();
        let ended = binary::run(&whole, &[("ACME_API_KEY", KEY)]).await;
        assert_eq!(ended.status.code(), Some(1), "{ended:?}");
        assert!(ended.stderr.contains(&format!("allowed, but {program} could not be run")), "{}", ended.stderr);
        assert_eq!(fits_the_schema(&stage.left())["code"], "DECISION_UNAVAILABLE");
    }
}

/// A log collector would truncate a long list of models, and the line would no longer be JSON.
#[tokio::test]
async fn the_termination_log_stays_small_enough_to_be_kept_whole() {
    let stage = Stage::new().await;
    let model = "m".repeat(500);
    let registry = fs::read_to_string(stage.path("registry.yaml")).unwrap();
    let models = (0..400).map(|number| format!("platform-{number:04}")).collect::<Vec<_>>().join(", ");
    let registry = registry.replace("platform-small,", &format!("{models},"));
    fs::write(stage.path("registry.yaml"), registry).unwrap();
    let ended = stage.run(&["--model", &model], &[], "exit 0").await;
    assert_eq!(ended.status.code(), Some(10), "{ended:?}");
    assert!(ended.stderr.contains("platform-0399"), "the person is told all of them");
    assert!(stage.left().len() <= 4096, "{}", stage.left().len());
    assert_eq!(fits_the_schema(&stage.left())["alternative_models"], serde_json::json!([]));
}
