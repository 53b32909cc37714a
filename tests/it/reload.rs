//! Files that change while decisions are made: only content counts, an invalid version changes nothing, no answer mixes two versions.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    os::unix::fs::symlink,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use byok_gate::{
    app::Documents,
    config::{self, ConfigError, Overrides, Paths, Setup, settings::Settings},
    core::{engine::Engine, registry::Registry, snapshot::Snapshot},
    domain::request::{PlatformProxy, Request},
    grpc::convert::{self, pb},
    watch::{PollOutcome, Watcher},
};
use tempfile::TempDir;
use tokio::time::Instant;

use crate::support::{
    binary::{PATIENCE, Serving, run},
    case::Spec,
    gate::Files,
};

const CATALOGUE: &str = "catalogue_version: 1\n";

/// A registry in which this provider owns `shared-1`, and takes a credential of its own name.
fn registry(owner: &str) -> String {
    let env = owner.to_uppercase();
    format!(
        "schema_version: 1\nproviders:\n  - {{name: {owner}, display_name: {owner}, protocol: openai, auth_mode: anthropic_api, auth_env: \
         [{env}_API_KEY], model_prefix_match: '^{owner}-'}}\nruntimes:\n  agent:\n    providers: [{{name: {owner}, models: [shared-1]}}]\n"
    )
}

/// An engine and its watch, over files in a folder.
struct Watched {
    files: Files,
    at: PathBuf,
    engine: Arc<Engine>,
    watcher: Watcher<Documents>,
}

impl Watched {
    fn new() -> Self {
        let files = Files::new(&registry("acme"), CATALOGUE, None);
        let at = files.folder().join("registry.yaml");
        let engine = files.engine();
        let watcher = watch(&engine, files.paths());
        let mut watched = Self { files, at, engine, watcher };
        assert_eq!(watched.settled(), PollOutcome::Same, "the first looks read again, and find what is in force");
        watched
    }

    fn owner(&self) -> String {
        self.engine.snapshot().registry.providers()[0].name.clone()
    }

    fn error(&self) -> String {
        let snapshot = self.engine.snapshot();
        snapshot.origins().map(|origin| origin.last_reload_error.as_str()).concat()
    }

    /// Looks until the content has settled.
    fn settled(&mut self) -> PollOutcome {
        loop {
            match self.watcher.poll(false) {
                PollOutcome::Unsettled => {}
                looked => return looked,
            }
        }
    }

    #[track_caller]
    fn takes_over(&mut self, owner: &str) {
        assert_eq!(self.settled(), PollOutcome::Taken);
        assert_eq!((self.owner().as_str(), self.error().as_str()), (owner, ""));
        assert_eq!(self.watcher.poll(false), PollOutcome::Same);
    }

    #[track_caller]
    fn keeps(&mut self, owner: &str, because: &str) {
        let looked = self.settled();
        assert!(matches!(&looked, PollOutcome::Kept(problems) if problems.to_string().contains(because)), "{looked:?}");
        assert_eq!(self.owner(), owner);
        assert!(self.error().contains(because), "{}", self.error());
        assert_eq!(self.watcher.poll(false), PollOutcome::Same, "the same bad content is not read again");
    }
}

/// The watcher of these files for this engine. There are no lists of callers here.
fn watch(engine: &Arc<Engine>, paths: Paths) -> Watcher<Documents> {
    let load = move || config::load(&paths, &overrides());
    let setup = load().unwrap();
    Watcher::new(Documents::new(Arc::clone(engine), &setup, Box::new(load), Box::new(|_| {}), Arc::default()))
}

/// As the engine of these files has been made.
fn overrides() -> Overrides {
    Overrides { platform_proxy: Some(PlatformProxy::Available), ..Overrides::default() }
}

#[test]
fn every_way_of_changing_a_file_is_seen() {
    let mut watched = Watched::new();
    let at = watched.at.clone();
    let beside = at.with_file_name("beside.yaml");
    fs::write(&at, registry("beta")).unwrap(); // in place
    watched.takes_over("beta");
    fs::write(&beside, registry("gamma")).unwrap(); // renamed over
    fs::rename(&beside, &at).unwrap();
    watched.takes_over("gamma");
    // Touched, with the same content: nothing is new.
    fs::write(&at, registry("gamma")).unwrap();
    assert_eq!(watched.settled(), PollOutcome::Same);
    fs::remove_file(&at).unwrap(); // deleted and made anew
    watched.keeps("gamma", "could not be read");
    fs::write(&at, registry("delta")).unwrap();
    watched.takes_over("delta");
    fs::remove_file(&at).unwrap(); // something that cannot be read
    fs::create_dir(&at).unwrap();
    watched.keeps("delta", "could not be read");
    fs::remove_dir(&at).unwrap();
    // Back to the version in force: it is good again, and the error goes.
    fs::write(&at, registry("delta")).unwrap();
    watched.takes_over("delta");
}

/// As a Kubernetes volume does it: the file is a link through `..data`, which is swapped.
#[test]
fn a_swapped_data_link_is_seen() {
    let folder = TempDir::new().unwrap();
    let path = |name: &str| folder.path().join(name);
    for (name, owner) in [("v1", "beta"), ("v2", "gamma")] {
        fs::create_dir(path(name)).unwrap();
        fs::write(path(name).join("providers.yaml"), registry(owner)).unwrap();
    }
    symlink("v1", path("..data")).unwrap();
    symlink("..data/providers.yaml", path("providers.yaml")).unwrap();
    let mut watched = Watched::new();
    watched.at = path("providers.yaml");
    watched.watcher = watch(&watched.engine, Paths { registry: Some(watched.at.clone()), ..watched.files.paths() });
    watched.takes_over("beta");
    symlink("v2", path("..data_tmp")).unwrap();
    fs::rename(path("..data_tmp"), path("..data")).unwrap();
    watched.takes_over("gamma");
}

#[test]
fn a_bad_version_keeps_the_last_good_one() {
    let mut watched = Watched::new();
    let large = " ".repeat(1024 * 1024 + 1);
    let twice = registry("beta") + "schema_version: 1\n";
    for (bad, because) in [
        ("", "schema_version"),
        ("schema_version: 1\nproviders: [", "parse manifest"),
        (large.as_str(), "limit"),
        (twice.as_str(), "appears twice"),
        (registry("beta").replace("schema_version: 1", "schema_version: 2").as_str(), "must be 1, found 2"),
    ] {
        fs::write(&watched.at, bad).unwrap();
        watched.keeps("acme", because);
    }
    fs::write(&watched.at, format!("\u{feff}{}", registry("beta")).replace('\n', "\r\n")).unwrap();
    watched.takes_over("beta");
}

/// A file that is being written is left alone until it rests; one that never rests is read in the end.
#[test]
fn half_a_file_is_not_taken_for_a_whole_one() {
    let mut watched = Watched::new();
    let whole = registry("beta");
    fs::write(&watched.at, "").unwrap();
    assert_eq!(watched.watcher.poll(false), PollOutcome::Unsettled);
    fs::write(&watched.at, &whole[..40]).unwrap();
    assert_eq!(watched.watcher.poll(false), PollOutcome::Unsettled);
    fs::write(&watched.at, &whole).unwrap();
    assert_eq!(watched.watcher.poll(false), PollOutcome::Unsettled);
    assert_eq!(watched.owner(), "acme");
    watched.takes_over("beta");
    let looks: Vec<PollOutcome> = (0..6)
        .map(|number| {
            fs::write(&watched.at, format!("{}# {number}\n", registry("gamma"))).unwrap();
            watched.watcher.poll(false)
        })
        .collect();
    assert_eq!(looks.iter().filter(|looked| **looked == PollOutcome::Taken).count(), 1, "{looks:?}");
    assert_eq!(watched.owner(), "gamma");
    // A forced reload reads what is there.
    fs::write(&watched.at, registry("delta")).unwrap();
    assert_eq!(watched.watcher.poll(true), PollOutcome::Taken);
    assert_eq!(watched.owner(), "delta");
}

/// Polled twice a second of the runtime's own clock, until the caller leaves.
#[tokio::test(start_paused = true)]
async fn it_looks_by_itself_and_ends_with_its_asker() {
    let watched = Watched::new();
    let (look, looks) = tokio::sync::watch::channel(());
    let Watched { at, engine, watcher, files: _files } = watched;
    let running = tokio::spawn(watcher.run(Duration::from_millis(500), looks));
    fs::write(&at, registry("beta")).unwrap();
    while engine.snapshot().registry.providers()[0].name != "beta" {
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    drop(look);
    running.await.unwrap();
}

/// The policy is part of a version too.
#[test]
fn a_change_of_the_configuration_is_followed() {
    let files = Files::new(&registry("acme"), CATALOGUE, Some("exempt_runtimes: [one]\n"));
    let (engine, config) = (files.engine(), files.folder().join("config.yaml"));
    let paths = Paths { config: Some(config.clone()), ..files.paths() };
    let mut watcher = watch(&engine, paths);
    assert_eq!(watcher.poll(true), PollOutcome::Same);
    fs::write(&config, "exempt_runtimes: [two]\n").unwrap();
    assert_eq!(watcher.poll(true), PollOutcome::Taken);
    assert!(engine.snapshot().policy.exempt_runtimes.contains("two"));
    fs::write(&config, "exempt_runtime: [three]\n").unwrap();
    assert!(matches!(watcher.poll(true), PollOutcome::Kept(_)));
    let snapshot = engine.snapshot();
    assert!(snapshot.policy.exempt_runtimes.contains("two"));
    let [registry, catalogue, configuration] = snapshot.origins().map(|origin| origin.last_reload_error.as_str());
    assert!(configuration.contains("exempt_runtime: is not a key") && registry.is_empty() && catalogue.is_empty());
    // Callers see in the status which settings wait for a restart, also while a later version is invalid.
    fs::write(&config, "limits: {decisions: 7}\n").unwrap();
    assert_eq!(watcher.poll(true), PollOutcome::Taken);
    fs::write(&config, "exempt_runtime: [three]\n").unwrap();
    assert!(matches!(watcher.poll(true), PollOutcome::Kept(_)));
    let status = convert::status(&engine.snapshot(), std::time::SystemTime::now());
    assert_eq!(status.restart_needed, ["limits.decisions"]);
    let configuration = status.configuration.unwrap();
    assert!(configuration.source.ends_with("config.yaml") && configuration.revision.is_empty(), "{configuration:?}");
    assert!(configuration.last_reload_error.contains("exempt_runtime: is not a key"), "{configuration:?}");
    fs::write(&config, "exempt_runtimes: [two]\n").unwrap();
    assert_eq!(watcher.poll(true), PollOutcome::Taken);
    assert!(convert::status(&engine.snapshot(), std::time::SystemTime::now()).restart_needed.is_empty());
}

/// A configuration that names another registry makes that one the file to follow.
#[test]
fn a_file_that_the_configuration_names_later_is_followed() {
    let files = Files::new(&registry("acme"), CATALOGUE, Some("{}"));
    let (engine, config) = (files.engine(), files.folder().join("config.yaml"));
    let other = files.folder().join("other.yaml");
    fs::write(&other, registry("acme")).unwrap();
    let paths = Paths { config: Some(config.clone()), ..Paths::default() };
    let mut watcher = watch(&engine, paths);
    fs::write(&config, format!("registry: {{file: {}}}\n", other.display())).unwrap();
    assert_eq!(watcher.poll(true), PollOutcome::Taken);
    assert_eq!(watcher.poll(false), PollOutcome::Same, "looked at once more, since that file was not followed yet");
    let before = engine.snapshot().registry.revision().to_owned();
    fs::write(&other, registry("beta")).unwrap();
    assert_eq!(watcher.poll(false), PollOutcome::Unsettled);
    assert_eq!(watcher.poll(false), PollOutcome::Taken);
    assert_ne!(engine.snapshot().registry.revision(), before);
}

fn request() -> Request {
    Spec { model: "shared-1".into(), ..Spec::default() }.request()
}

/// A steady stream of decisions under 1,000 reloads of two registries that disagree: each answer is wholly of one of them.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn no_decision_mixes_two_versions() {
    let mut watched = Watched::new();
    // The registry alone is read anew: the catalogue would take most of the time and tell nothing.
    let (engine, at) = (Arc::clone(&watched.engine), watched.at.clone());
    let load = move || {
        let Snapshot { catalogue, policy, registry_origin, catalogue_origin, .. } = &*engine.snapshot();
        let registry = Arc::new(
            Registry::parse("registry", &fs::read(&at).unwrap(), &|_| None)
                .map_err(|problems| ConfigError(vec![problems]))?
                .value,
        );
        let (registry_origin, catalogue_origin) = (registry_origin.clone(), catalogue_origin.clone());
        let (catalogue, policy) = (Arc::clone(catalogue), Arc::clone(policy));
        Ok(Setup {
            snapshot: Snapshot::new(registry, catalogue, policy, registry_origin, catalogue_origin),
            fingerprint_key: None,
            probe_ca: Vec::new(),
            proxy: None,
            tracing_ca: None,
            settings: Settings::default(),
            origins: BTreeMap::new(),
            documents: vec![at.clone()],
            warnings: Vec::new(),
        })
    };
    let documents =
        Documents::new(Arc::clone(&watched.engine), &load().unwrap(), Box::new(load), Box::new(|_| {}), Arc::default());
    watched.watcher = Watcher::new(documents);
    let mut owners = BTreeMap::new();
    for owner in ["beta", "acme"] {
        fs::write(&watched.at, registry(owner)).unwrap();
        watched.watcher.poll(true);
        owners.insert(watched.engine.snapshot().registry.revision().to_owned(), owner.to_owned());
    }
    assert_eq!(owners.len(), 2);
    let done = Arc::new(AtomicBool::new(false));
    let callers: Vec<_> = (0..3)
        .map(|_| {
            let (engine, done, owners) = (Arc::clone(&watched.engine), Arc::clone(&done), owners.clone());
            tokio::spawn(async move {
                let (mut seen, mut decisions) = (BTreeSet::new(), 0_usize);
                while !done.load(Ordering::Relaxed) {
                    let decided = engine.decide(&request(), Instant::now() + Duration::from_secs(5)).await;
                    let owner = &owners[&*decided.registry_revision];
                    let denial = decided.decision.denial().expect("there is no credential");
                    assert_eq!(decided.decision.resolution.provider, *owner);
                    assert_eq!(denial.refusal.missing_env(), [format!("{}_API_KEY", owner.to_uppercase())]);
                    seen.insert(decided.registry_revision);
                    decisions += 1;
                    tokio::task::yield_now().await;
                }
                (seen.len(), decisions)
            })
        })
        .collect();
    let reloading = tokio::task::spawn_blocking(move || {
        for number in 0..1000 {
            fs::write(&watched.at, registry(if number % 2 == 0 { "beta" } else { "acme" })).unwrap();
            assert_eq!(watched.watcher.poll(true), PollOutcome::Taken);
        }
    });
    reloading.await.unwrap();
    done.store(true, Ordering::Relaxed);
    for caller in callers {
        let (seen, decisions) = caller.await.unwrap();
        assert!(seen == 2 && decisions >= 100, "{seen} versions in {decisions} decisions");
    }
}

/// The real binary: a change is followed, SIGHUP is no end, and the status says what is wrong with a bad version.
#[tokio::test]
async fn a_server_follows_its_files() {
    let files = Files::new(&registry("acme"), CATALOGUE, None);
    let flags = files.flags();
    let serving = Serving::start(&flags.iter().map(String::as_str).collect::<Vec<_>>()).await;
    let mut client = serving.client().await;
    let mut until = async |wanted: &str, is_set: fn(&pb::SourceStatus) -> bool| {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let status =
                client.get_registry_status(pb::GetRegistryStatusRequest {}).await.unwrap().into_inner().registry.unwrap();
            if is_set(&status) {
                return status;
            }
            assert!(Instant::now() < deadline, "{wanted}: {status:?}");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    let first = until("it serves", |_| true).await.revision;
    fs::write(files.folder().join("registry.yaml"), "schema_version: 3\n").unwrap();
    let kept = until("the fault is shown", |status| !status.last_reload_error.is_empty()).await;
    assert!(kept.revision == first && kept.last_reload_error.contains("must be 1, found 3"), "{kept:?}");
    fs::write(files.folder().join("registry.yaml"), registry("beta")).unwrap();
    let id = serving.child.id().unwrap().to_string();
    assert!(tokio::process::Command::new("kill").args(["-HUP", &id]).status().await.unwrap().success());
    let followed = until("the change is in force", |status| status.last_reload_error.is_empty()).await;
    assert_ne!(followed.revision, first);
    let at = serving.address.clone();
    let asked = ["decide", "--server", &at, "--runtime", "agent", "--model", "shared-1", "--format", "json"];
    assert!(run(&asked, &[]).await.stdout.contains("BETA_API_KEY"));
    serving.terminate().await;
    assert!(serving.ended().await.status.success());
}

/// A process that holds the key of the shared tier takes no `workspace` caller, whatever the new file says of the tier.
#[test]
fn a_workspace_caller_waits_for_a_restart_without_the_tier() {
    let tier = "tier: {address: 'rediss://valkey.example', key_file: /not/read}\n";
    let files = Files::new(&registry("acme"), CATALOGUE, Some(tier));
    let (engine, config) = (files.engine(), files.folder().join("config.yaml"));
    let mut watched = Watched { at: config.clone(), watcher: watch(&engine, files.paths()), files, engine };
    assert_eq!(watched.settled(), PollOutcome::Same);
    fs::write(&config, "callers: {unix_peers: [{uid: 1, role: workspace, workspaces: [w]}]}\n").unwrap();
    watched.keeps("acme", "names a `workspace` caller, and this process holds the key of the shared tier");
    fs::write(&config, "callers: {unix_peers: [{uid: 1}]}\n").unwrap();
    watched.takes_over("acme");
}
