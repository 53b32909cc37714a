//! Registry, catalogue and configuration read again while the service runs: content decides, never a file's date or an event.
//!
//! The files are looked at by their content's hash, so that writing in place, truncating, renaming over, a swapped symlink and
//! deleting and making anew all look the same. A version that does not stand changes nothing: the last good one stays in
//! force, and the status says why.

use std::{
    collections::BTreeSet,
    fs,
    io::Read,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use notify::Watcher;
use tokio::{
    sync::mpsc,
    time::{Instant, sleep_until},
};

use crate::{
    core::{
        engine::Engine,
        snapshot::{Origin, Snapshot},
    },
    domain::problem::{Problem, Problems},
    telemetry::metrics::reloads::Reloads,
};

/// How often the files are looked at without any event: network and overlay file systems have none.
const POLL_INTERVAL: Duration = Duration::from_millis(500);
/// How long after an event or an unsettled look the next look comes: a writer that truncates first has written by then.
const SETTLE: Duration = Duration::from_millis(100);
/// How many looks in a row may find the content changing before it is read all the same. A file that is being written is
/// left alone until two looks agree; one that never rests must not hide every change.
const MAX_UNSETTLED: u32 = 4;
/// The most of one file that is looked at: more than any document that is accepted.
const MAX_LOOKED_AT: u64 = 2 * 1024 * 1024;

/// Reads everything anew, and tells which files that were: a configuration may name others than before.
pub type Load = dyn Fn() -> Result<(Vec<PathBuf>, Snapshot), Problems> + Send + Sync;

/// Keeps an engine's snapshot up with its files.
pub struct Reload {
    engine: Arc<Engine>,
    files: Vec<PathBuf>,
    load: Arc<Load>,
    /// The content that was last acted on, whether it stood or not.
    acted_on: Hash,
    /// The content at the last look, and for how many looks it has been another each time.
    last_seen: Hash,
    unsettled: u32,
    failures: u64,
    counts: Arc<Reloads>,
}

/// What a look came to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PollOutcome {
    /// Nothing is new.
    Same,
    /// Something is new, and may be half written.
    Unsettled,
    /// The new version is in force.
    Swapped,
    /// The new version does not stand, and the last good one stays.
    Kept(Problems),
}

type Hash = [u8; 32];

// === impl Reload ===

impl Reload {
    /// For an engine whose snapshot was loaded from these files. The first look reads them again: one of them may have
    /// changed since.
    pub fn new(engine: Arc<Engine>, files: Vec<PathBuf>, load: Arc<Load>) -> Self {
        let last_seen = hash(&files);
        let counts = Arc::new(Reloads::of("documents"));
        Self { engine, files, load, acted_on: [0; 32], last_seen, unsettled: 0, failures: 0, counts }
    }

    /// How it went so far.
    pub fn counts(&self) -> Arc<Reloads> {
        Arc::clone(&self.counts)
    }

    /// Looks again and again, soon after a folder of the files has changed, and at once when `force` says so. Ends when the
    /// sender of `force` is gone.
    pub async fn run(mut self, mut force: mpsc::Receiver<()>) {
        let mut events = Events::of(&self.files);
        let mut next = Instant::now();
        loop {
            let forced = tokio::select! {
                () = sleep_until(next) => false,
                () = events.changed() => {
                    // Not put off by a further event: a file that never rests is looked at all the same.
                    next = next.min(Instant::now() + SETTLE);
                    continue;
                }
                asked = force.recv() => match asked {
                    Some(()) => true,
                    None => return,
                },
            };
            // Reading and checking are work for a thread that may wait.
            let look = tokio::task::spawn_blocking(move || {
                let looked = self.poll(forced);
                (self, looked)
            });
            // `look` does not panic, and the runtime does not cancel what blocks; if it ended all the same, so does this.
            let Ok((reload, looked)) = look.await else { return };
            self = reload;
            next = Instant::now() + if looked == PollOutcome::Unsettled { SETTLE } else { POLL_INTERVAL };
            if events.files != self.files {
                events = Events::of(&self.files);
            }
        }
    }

    /// One look. `forced` reads what is there even if it is the same, or may be half written.
    pub fn poll(&mut self, forced: bool) -> PollOutcome {
        let seen = hash(&self.files);
        let settled = seen == std::mem::replace(&mut self.last_seen, seen);
        if seen == self.acted_on && !forced {
            self.unsettled = 0;
            return PollOutcome::Same;
        }
        if !forced && !settled && self.unsettled < MAX_UNSETTLED {
            self.unsettled += 1;
            return PollOutcome::Unsettled;
        }
        self.unsettled = 0;
        let load = std::panic::AssertUnwindSafe(|| (self.load)());
        // A document must not be able to end the watch, whatever it does to the code that reads it.
        let loaded = std::panic::catch_unwind(load).unwrap_or_else(|_| Err(of_this_service("reading it ended in a panic")));
        // What was read is what was seen, or the next look sees to it.
        if !forced && hash(&self.files) != seen {
            return PollOutcome::Unsettled;
        }
        let told_before = std::mem::replace(&mut self.acted_on, seen) == seen;
        match loaded {
            Ok((files, snapshot)) => {
                if files != self.files {
                    self.files = files;
                    // Read once more: what was hashed is not what was read of files that were not followed yet.
                    self.last_seen = hash(&self.files);
                    self.acted_on = [0; 32];
                }
                tracing::info!(
                    event = "reloaded",
                    registry_revision = snapshot.registry.revision(),
                    catalogue_revision = snapshot.catalogue.revision(),
                );
                self.engine.swap(snapshot);
                self.counts.taken();
                PollOutcome::Swapped
            }
            Err(problems) => {
                self.failures += 1;
                self.counts.failed();
                if !told_before {
                    let (failures, document) = (self.failures, problems.document.as_str());
                    tracing::error!(event = "reload_failed", failures, document, "{problems}");
                }
                self.engine.swap(marked(&self.engine.snapshot(), &problems));
                PollOutcome::Kept(problems)
            }
        }
    }
}

/// Changes in the folders of files: a reason to look, never more. Folders, since a file that is renamed over or reached through
/// a swapped symlink is another file.
struct Events {
    files: Vec<PathBuf>,
    changed: mpsc::Receiver<()>,
    /// `None` where the system gives no events: looking every half second is then all there is.
    watcher: Option<notify::RecommendedWatcher>,
}

// === impl Events ===

impl Events {
    fn of(files: &[PathBuf]) -> Self {
        let (tell, changed) = mpsc::channel(1);
        let watcher = Self::watch(files, tell)
            .inspect_err(|fault| {
                let fault = fault.to_string();
                tracing::warn!(event = "no_file_events", fault, "changes of the files are seen by looking alone");
            })
            .ok();
        Self { files: files.to_owned(), changed, watcher }
    }

    fn watch(files: &[PathBuf], tell: mpsc::Sender<()>) -> notify::Result<notify::RecommendedWatcher> {
        let mut watcher = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
            // Looking is an access too: heeding it would make each look the reason for the next.
            if !event.is_ok_and(|event| event.kind.is_access()) {
                // Full means that it is known already.
                let _full = tell.try_send(());
            }
        })?;
        let folder = |file: &PathBuf| match file.parent() {
            Some(folder) if folder != Path::new("") => folder.to_owned(),
            Some(_) | None => PathBuf::from("."),
        };
        for folder in files.iter().map(folder).collect::<BTreeSet<_>>() {
            watcher.watch(&folder, notify::RecursiveMode::NonRecursive)?;
        }
        Ok(watcher)
    }

    /// Waits for a change; for ever where there are no events.
    async fn changed(&mut self) {
        if self.watcher.is_none() || self.changed.recv().await.is_none() {
            std::future::pending().await
        }
    }
}

/// The same version, saying what is wrong with the one that should have followed it.
fn marked(snapshot: &Snapshot, problems: &Problems) -> Snapshot {
    let mark = |origin: &mut Origin, faulty: bool| {
        origin.last_reload_error = if faulty { problems.to_string() } else { String::new() };
    };
    // A fault of the configuration is shown with the registry, whose names it uses.
    let of_catalogue = problems.document == snapshot.catalogue_origin.source;
    let mut marked = snapshot.clone();
    mark(&mut marked.registry_origin, !of_catalogue);
    mark(&mut marked.catalogue_origin, of_catalogue);
    marked
}

/// The content of all files as one hash. A file that cannot be read has a content of its own: its absence.
fn hash(files: &[PathBuf]) -> Hash {
    let mut hasher = blake3::Hasher::new();
    for file in files {
        match bytes(file) {
            Ok(bytes) => hasher.update(&bytes.len().to_le_bytes()).update(&bytes),
            Err(fault) => hasher.update(&[0xff; 9]).update(format!("{:?}", fault.kind()).as_bytes()),
        };
    }
    *hasher.finalize().as_bytes()
}

fn bytes(file: &Path) -> std::io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    fs::File::open(file)?.take(MAX_LOOKED_AT).read_to_end(&mut bytes)?;
    Ok(bytes)
}

fn of_this_service(fault: &str) -> Problems {
    Problems { document: "configuration".into(), list: vec![Problem::at("", fault)] }
}

/// A file that cannot be read, as a problem of it.
pub fn unreadable(file: &Path, fault: &std::io::Error) -> Problems {
    Problems { document: file.display().to_string(), list: vec![Problem::at("", format!("could not be read: {fault}"))] }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    /// Every way in which editors, deployments and Kubernetes change a file.
    #[tokio::test]
    async fn each_change_is_an_event() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        fs::create_dir(at("one")).unwrap();
        fs::create_dir(at("two")).unwrap();
        for version in ["one", "two"] {
            fs::write(at(version).join("registry.yaml"), version).unwrap();
        }
        symlink("one", at("..data")).unwrap();
        symlink("..data/registry.yaml", at("registry.yaml")).unwrap();
        fs::write(at("plain.yaml"), "a").unwrap();
        let mut events = Events::of(&[at("registry.yaml"), at("plain.yaml")]);
        let changes: [(&str, &dyn Fn()); 4] = [
            ("written in place", &|| fs::write(at("plain.yaml"), "b").unwrap()),
            ("renamed over", &|| {
                fs::write(at("new"), "c").unwrap();
                fs::rename(at("new"), at("plain.yaml")).unwrap();
            }),
            ("deleted", &|| fs::remove_file(at("plain.yaml")).unwrap()),
            ("swapped by symlink", &|| {
                symlink("two", at("..tmp")).unwrap();
                fs::rename(at("..tmp"), at("..data")).unwrap();
            }),
        ];
        for (what, change) in changes {
            change();
            let seen = tokio::time::timeout(Duration::from_secs(10), events.changed()).await;
            assert!(seen.is_ok(), "{what}: no event");
            // What else this change told.
            while tokio::time::timeout(Duration::from_millis(50), events.changed()).await.is_ok() {}
        }
        fs::read(at("registry.yaml")).unwrap();
        let seen = tokio::time::timeout(Duration::from_millis(200), events.changed()).await;
        assert!(seen.is_err(), "reading is no change");
    }
}
