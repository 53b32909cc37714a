//! The binary knows everything in `deploy/`: every flag, key and variable there exists, and every container of ours is locked down.

use std::{
    collections::BTreeSet,
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
};

use serde_json::Value;

use crate::support::binary;

fn deploy() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("deploy")
}

/// Every file below `deploy/` with this end to its name. The chart's templates are no YAML yet: deploy/kubernetes/check fills them in.
fn files(end: &str) -> Vec<PathBuf> {
    fn walk(folder: &Path, end: &str, found: &mut Vec<PathBuf>) {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.ends_with("helm/templates") {
                continue;
            }
            if path.is_dir() {
                walk(&path, end, found);
            } else if path.to_str().unwrap().ends_with(end) {
                found.push(path);
            }
        }
    }
    let mut found = Vec::new();
    walk(&deploy(), end, &mut found);
    found.sort();
    found
}

fn tree(path: &Path) -> Value {
    serde_yaml::from_str(&fs::read_to_string(path).unwrap()).unwrap_or_else(|fault| panic!("{}: {fault}", path.display()))
}

/// Manifests: what is neither a configuration file nor a document of ours.
fn manifests() -> Vec<(PathBuf, Value)> {
    let manifests = files(".yaml").into_iter().map(|path| (path.clone(), tree(&path)));
    manifests.filter(|(_, tree)| tree.get("kind").is_some() || tree.get("services").is_some()).collect()
}

/// Every value in it, with those below.
fn all(value: &Value) -> Vec<&Value> {
    let below: Box<dyn Iterator<Item = &Value>> = match value {
        Value::Array(items) => Box::new(items.iter()),
        Value::Object(fields) => Box::new(fields.values()),
        _ => Box::new(std::iter::empty()),
    };
    std::iter::once(value).chain(below.flat_map(all)).collect()
}

/// Every command line of byok-gate there is: a list that begins with one of its commands, or with the binary and one of them.
fn command_lines() -> Vec<(PathBuf, Vec<String>)> {
    const COMMANDS: [&str; 4] = ["serve", "exec", "health", "copy"];
    let mut found = Vec::new();
    for (path, manifest) in manifests() {
        for list in all(&manifest).into_iter().filter_map(Value::as_array) {
            let words: Vec<String> = list.iter().filter_map(Value::as_str).map(str::to_owned).collect();
            let words = words.into_iter().skip_while(|word| word == "CMD" || word.ends_with("/byok-gate"));
            found.push((path.clone(), words.collect::<Vec<_>>()));
        }
    }
    for (file, before) in [("byok-gate.service", "ExecStart="), ("image/Containerfile", "CMD ")] {
        let text = fs::read_to_string(deploy().join(file)).unwrap();
        for line in text.lines().filter_map(|line| Some(line.split_once(before)?.1)) {
            let words = line.split([' ', ',', '[', ']', '"']).filter(|word| !word.is_empty() && !word.ends_with("/byok-gate"));
            found.push((deploy().join(file), words.map(str::to_owned).collect()));
        }
    }
    found.retain(|(_, words)| words.first().is_some_and(|word| COMMANDS.contains(&word.as_str())));
    found
}

#[tokio::test]
async fn every_flag_of_every_command_line_is_one_of_the_binary() {
    let lines = command_lines();
    let of = |command: &str| lines.iter().filter(|(_, words)| words[0] == command).count();
    assert!(of("serve") >= 5 && of("exec") >= 4 && of("health") >= 6 && of("copy") >= 1, "{lines:?}");
    for (path, words) in &lines {
        let help = binary::run(&[&words[0], "--help"], &[]).await.stdout;
        let known: BTreeSet<&str> = help.split([' ', '\n', ',', '[']).filter(|word| word.starts_with("--")).collect();
        for flag in words.iter().take_while(|word| *word != "--").filter(|word| word.starts_with("--")) {
            assert!(known.contains(flag.as_str()), "{}: {flag} is not a flag of {}", path.display(), words[0]);
        }
    }
}

/// An unknown key ends the start, so every configuration file is loaded.
#[tokio::test]
async fn every_configuration_file_stands() {
    let named = |end: &str| files(end).into_iter().filter(|path| !path.ends_with("compose.yaml"));
    let configurations: Vec<PathBuf> = named("byok-gate.yaml").chain(named("platform.yaml")).collect();
    assert!(configurations.len() >= 5, "{configurations:?}");
    for path in &configurations {
        let ended = binary::run(&["config", "--config", path.to_str().unwrap()], &[]).await;
        assert_eq!(ended.status.code(), Some(0), "{}: {}", path.display(), ended.stderr);
    }
    let ended =
        binary::run(&["config", "--config", deploy().join("platform.yaml").to_str().unwrap(), "--format", "json"], &[]).await;
    let settings: Value = serde_json::from_str(&ended.stdout).unwrap();
    assert_eq!(settings["exempt_runtimes"]["value"], serde_json::json!(["external", "kimi", "kimi-cli", "mock"]));
}

#[tokio::test]
async fn every_variable_is_one_that_exec_reads() {
    let help = binary::run(&["exec", "--help"], &[]).await.stdout;
    let mut seen = BTreeSet::new();
    for (path, manifest) in manifests() {
        let text = manifest.to_string();
        for (at, _) in text.match_indices("\"BYOK_GATE_") {
            let name = text[at + 1..].split('"').next().unwrap();
            assert!(help.contains(&format!("[environment: {name}]")), "{}: exec reads no {name}", path.display());
            seen.insert(name.to_owned());
        }
    }
    assert!(seen.len() >= 4, "{seen:?}");
}

/// The documents of the base are the built-in ones, so that applying it changes no decision; a site replaces them.
#[tokio::test]
async fn the_documents_of_the_base_are_the_built_in_ones() {
    let base = deploy().join("kubernetes/base");
    assert_eq!(fs::read_to_string(base.join("providers.yaml")).unwrap(), include_str!("../../src/core/registry/default.yaml"));
    let paths = [base.join("providers.yaml"), base.join("probe-catalogue.yaml")];
    let [registry, catalogue] = paths.each_ref().map(|path| path.to_str().unwrap());
    let ended = binary::run(&["check", "--registry", registry, "--probe-catalog", catalogue], &[]).await;
    assert_eq!(ended.status.code(), Some(0), "{ended:?}");
}

/// The schema of the chart refuses a misspelt section, so it has to know them all.
#[test]
fn the_chart_knows_every_section_of_the_settings() {
    let schema: Value = serde_json::from_str(&fs::read_to_string(deploy().join("helm/values.schema.json")).unwrap()).unwrap();
    let names = |value: &Value| value.as_object().unwrap().keys().cloned().collect::<BTreeSet<_>>();
    assert_eq!(names(&schema["properties"]["config"]["properties"]), names(&tree(&deploy().join("byok-gate.yaml"))));
    // And every value of the chart, so that it refuses none of its own.
    let values = tree(&deploy().join("helm/values.yaml"));
    let known = names(&schema["properties"]);
    assert!(names(&values).is_subset(&known), "{:?}", names(&values).difference(&known));
}

/// One name and one version, whoever names the image.
#[test]
fn the_image_is_called_the_same_everywhere() {
    let version = env!("CARGO_PKG_VERSION");
    let image = format!("byok-gate:{version}");
    let mut named = 0;
    for (path, manifest) in manifests() {
        for value in all(&manifest) {
            if let Some(name) = value["newName"].as_str().filter(|name| *name == "byok-gate") {
                assert_eq!((name, value["newTag"].as_str()), ("byok-gate", Some(version)), "{}", path.display());
                named += 1;
            }
            for name in [&value["image"], &value["reference"]].into_iter().filter_map(Value::as_str) {
                // Kustomize gives the tag to the one without.
                if name.split(':').next() == Some("byok-gate") && name != "byok-gate" {
                    assert_eq!(name, image, "{}", path.display());
                    named += 1;
                }
            }
        }
    }
    assert_eq!(named, 5, "base, sidecar, init-gate; exec's volume; compose.yaml");
    let chart = tree(&deploy().join("helm/Chart.yaml"));
    assert_eq!((&chart["version"], &chart["appVersion"]), (&version.into(), &version.into()));
    assert_eq!(tree(&deploy().join("helm/values.yaml"))["image"]["repository"], "byok-gate");
}

#[test]
fn every_container_of_ours_is_locked_down() {
    let mut containers = 0;
    for (path, manifest) in manifests().iter().filter(|(_, manifest)| manifest.get("kind").is_some()) {
        for container in all(manifest).into_iter().filter(|value| value["image"] == "byok-gate" && value.get("args").is_some()) {
            let place = path.display();
            let security = &container["securityContext"];
            assert_eq!(security["readOnlyRootFilesystem"], true, "{place}");
            assert_eq!(security["allowPrivilegeEscalation"], false, "{place}");
            assert_eq!(security["capabilities"]["drop"], serde_json::json!(["ALL"]), "{place}");
            assert!(container["resources"]["limits"]["memory"].is_string(), "{place}");
            containers += 1;
        }
        for pod in all(manifest).into_iter().filter(|value| value["containers"][0]["image"].is_string()) {
            assert_eq!(pod["automountServiceAccountToken"], false, "{}", path.display());
            assert_eq!(pod["securityContext"]["runAsNonRoot"], true, "{}", path.display());
            assert_eq!(pod["securityContext"]["seccompProfile"]["type"], "RuntimeDefault", "{}", path.display());
        }
    }
    assert_eq!(containers, 5);
}

/// The binary copies itself into a tenant's container, since its image has no `cp`.
#[tokio::test]
async fn a_copy_of_the_binary_is_the_binary() {
    let folder = tempfile::tempdir().unwrap();
    let to = folder.path().join("byok-gate");
    let to = to.to_str().unwrap();
    // An init container may run again, and finds its own file, whole or half written.
    fs::write(folder.path().join("byok-gate.half"), "half").unwrap();
    for _ in 0..2 {
        let ended = binary::run(&["copy", to], &[]).await;
        assert_eq!(ended.status.code(), Some(0), "{ended:?}");
    }
    let version = tokio::process::Command::new(to).arg("--version").output().await.unwrap();
    assert_eq!(String::from_utf8(version.stdout).unwrap(), binary::run(&["--version"], &[]).await.stdout);
    assert_eq!(fs::metadata(to).unwrap().permissions().mode() & 0o777, 0o755, "the agent is another user");
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1, "nothing else is left");

    let within = binary::run(&["copy", folder.path().to_str().unwrap()], &[]).await;
    assert!(within.status.code() == Some(2) && within.stderr.contains("name the file within it"), "{within:?}");
    let nowhere = binary::run(&["copy", "/nowhere/byok-gate"], &[]).await;
    assert!(
        nowhere.status.code() == Some(1) && nowhere.stderr.contains("/nowhere/byok-gate could not be written"),
        "{nowhere:?}"
    );
}

/// A registry in a page that people copy from.
#[tokio::test]
async fn the_registry_of_the_page_about_self_hosted_servers_stands() {
    let page = fs::read_to_string(deploy().join("../docs/self-hosted.md")).unwrap();
    let registry = page.split("```yaml\n").nth(1).unwrap().split("```").next().unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("providers.yaml");
    fs::write(&path, registry).unwrap();
    let ended = binary::run(&["check", "--strict", "--registry", path.to_str().unwrap()], &[]).await;
    assert_eq!(ended.status.code(), Some(0), "{ended:?}");
}

/// The package's other files: the flags and the manual page of every visible command.
#[tokio::test]
async fn completions_and_manual_are_what_the_commands_are() {
    let help = binary::run(&["--help"], &[]).await.stdout;
    let commands = help.split("Commands:\n").nth(1).unwrap().split("\n\n").next().unwrap();
    let commands: Vec<&str> = commands.lines().map(|line| line.split_whitespace().next().unwrap()).collect();
    assert!(commands.contains(&"serve") && commands.contains(&"copy") && !commands.contains(&"man"), "{commands:?}");
    for shell in ["bash", "zsh", "fish"] {
        let script = binary::run(&["completions", shell], &[]).await.stdout;
        let missing: Vec<_> = commands.iter().filter(|command| !script.contains(**command)).collect();
        assert!(missing.is_empty() && script.contains("probe-catalog"), "{shell}: {missing:?}");
    }
    let folder = tempfile::tempdir().unwrap();
    let ended = binary::run(&["man", folder.path().to_str().unwrap()], &[]).await;
    assert_eq!(ended.status.code(), Some(0), "{ended:?}");
    for command in commands.into_iter().filter(|command| *command != "help") {
        let page = fs::read_to_string(folder.path().join(format!("byok-gate-{command}.1"))).unwrap();
        assert!(page.contains(".TH") && page.contains(".SH"), "{command}: {page}");
    }
    assert!(fs::read_to_string(folder.path().join("byok-gate.1")).unwrap().contains("byok\\-gate\\-serve(1)"));
}

/// Where metrics are served, they can be reached and found: settings, port, policy and annotation agree.
#[test]
fn a_service_shows_its_numbers_where_prometheus_may_look() {
    let base = deploy().join("kubernetes");
    for (settings, policy) in [
        ("base/byok-gate.yaml", "base/networkpolicy.yaml"),
        ("overlays/central/byok-gate.yaml", "overlays/central/from-namespace.yaml"),
    ] {
        assert_eq!(tree(&base.join(settings))["admin"]["listen"], "0.0.0.0:9464", "{settings}");
        let ingress = tree(&base.join(policy))["spec"]["ingress"].clone();
        let to_numbers: Vec<&Value> =
            ingress.as_array().unwrap().iter().filter(|rule| rule["ports"][0]["port"] == "metrics").collect();
        assert_eq!(to_numbers.len(), 1, "{policy}");
        assert!(to_numbers[0]["from"][0]["podSelector"].is_object(), "{policy}: anybody may look");
    }
    let template = tree(&base.join("base/deployment.yaml"))["spec"]["template"].clone();
    assert_eq!(template["metadata"]["annotations"]["prometheus.io/port"], "9464");
    let ports = template["spec"]["containers"][0]["ports"].as_array().unwrap();
    assert!(ports.contains(&serde_json::json!({"name": "metrics", "containerPort": 9464})), "{ports:?}");
}

/// Next to a tenant's code: no port, no made-up keys, no override, and no other caller.
#[test]
fn a_sidecar_vouches_for_its_own_workspace_alone() {
    let settings = tree(&deploy().join("kubernetes/overlays/sidecar/byok-gate.yaml"));
    for address in settings["server"]["listen"].as_array().unwrap() {
        assert!(address.as_str().unwrap().starts_with("unix:"), "{address}");
    }
    assert_eq!(settings["admin"], Value::Null, "it shows no numbers");
    assert_eq!((&settings["probe"]["calibrate"], &settings["operator_overrides"]), (&Value::Bool(false), &"refuse".into()));
    for peer in settings["callers"]["unix_peers"].as_array().unwrap() {
        assert_ne!(peer["role"], "platform");
        assert!(peer["role"].is_string(), "{peer}: a peer without a role is a platform");
    }
}
