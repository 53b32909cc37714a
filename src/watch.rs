//! Reloads files while the server runs. The last valid version stays in force, and every fault is logged and counted. One watcher is used for all
//! files: registry, catalogue and configuration, certificates, tokens.
//!
//! The watcher compares content and does not rely on events. So it notices a volume that is swapped by symlink, a file that is written in place
//! and one that is renamed over another, all in the same way.

pub mod files;

use std::{
    collections::BTreeSet,
    fmt,
    panic::{AssertUnwindSafe, catch_unwind},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use notify::Watcher as _;
use rand::Rng;
use tokio::{
    sync::{mpsc, watch},
    time::{Instant, sleep_until, timeout},
};

use crate::{domain::secret::with_stack_wiped, telemetry::metrics::reloads::Reloads};

/// The delay of the next check after an event, or after content that is still changing. A writer that truncates first has then written.
const SETTLE: Duration = Duration::from_millis(100);
/// How many checks in a row may find changed content before it is read anyway. A file that is being written is not read until two checks agree,
/// but one that changes all the time must not block every reload.
const MAX_UNSETTLED: u32 = 4;
/// How many bytes of a file are hashed: more than any accepted document has.
const MAX_HASHED_BYTES: u64 = 2 * 1024 * 1024;

/// Something that is loaded from files.
pub trait Source: Send + 'static {
    /// Its name in logs and metrics.
    fn name(&self) -> &'static str;

    /// Its files. They may change with a reload, since the configuration names some of them.
    fn files(&self) -> Vec<PathBuf>;

    /// Those of its files that hold secrets.
    fn secrets(&self) -> Vec<PathBuf> {
        Vec::new()
    }

    /// Reads the files and puts valid content in force. With a fault, nothing changes.
    fn reload(&mut self) -> Result<Reloaded, Fault>;

    /// Logs that a new version is in force, after this many failures.
    fn log_taken(&self, failures: u64) {
        tracing::info!(event = "reloaded", what = self.name(), failures);
    }
}

/// The result of a reload.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reloaded {
    /// The files hold the version in force.
    Unchanged,
    /// A new version is in force.
    Taken,
}

/// What is wrong with the files, for the log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fault(pub String);

/// The result of a check.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PollOutcome {
    /// Nothing changed.
    Same,
    /// The content changed, and may be half written.
    Unsettled,
    /// The new version is in force.
    Taken,
    /// The new version is invalid, and the last valid one stays in force.
    Kept(Fault),
}

/// Watches the files of one source.
pub struct Watcher<S> {
    source: S,
    files: Vec<PathBuf>,
    /// The key of the hashes, so that a TLS key or token cannot be guessed from a hash in memory.
    hash_key: [u8; 32],
    /// The content that was last reloaded, valid or not.
    acted_on: Hash,
    /// The content at the last check.
    last_seen: Hash,
    /// For how many checks in a row the content has been changing.
    unsettled: u32,
    failures: u64,
    last_fault: Option<Fault>,
    counts: Arc<Reloads>,
}

type Hash = [u8; 32];

// === impl Watcher ===

impl<S: Source> Watcher<S> {
    /// Watches a source that has been read. The first checks read it again, since a file may have changed meanwhile.
    pub fn new(source: S) -> Self {
        let (files, hash_key) = (source.files(), rand::rng().random());
        let counts = Arc::new(Reloads::of(source.name(), files.clone()));
        let nothing = [0; 32];
        Self {
            source,
            files,
            hash_key,
            acted_on: nothing,
            last_seen: nothing,
            unsettled: 0,
            failures: 0,
            last_fault: None,
            counts,
        }
    }

    /// The counts of its reloads.
    pub fn counts(&self) -> Arc<Reloads> {
        Arc::clone(&self.counts)
    }

    /// Checks the files at this interval, soon after their folder changed, and at once when `forced` is signalled. Ends when the sender of `forced`
    /// is dropped.
    pub async fn run(mut self, every: Duration, mut forced: watch::Receiver<()>) {
        let mut events = Events::of(&self.files);
        let mut next = Instant::now();
        loop {
            let is_forced = tokio::select! {
                () = sleep_until(next) => false,
                () = events.changed() => {
                    // A further event does not delay the check, so a file that changes all the time is checked too.
                    next = next.min(Instant::now() + SETTLE);
                    continue;
                }
                asked = forced.changed() => match asked {
                    Ok(()) => true,
                    Err(_) => return,
                },
            };
            let name = self.source.name();
            let counts = self.counts();
            // Reading and checking may block, so they run on a blocking thread.
            let progress = files::Progress::default();
            let theirs = progress.clone();
            let mut polling = tokio::task::spawn_blocking(move || {
                let outcome = theirs.of(|| self.poll(is_forced));
                (self, outcome)
            });
            let polled = match timeout(files::READ_TIME, &mut polling).await {
                Ok(polled) => polled,
                Err(_) => {
                    let fault = format!("a new version {}", progress.why_late(files::READ_TIME));
                    counts.failed(&fault);
                    tracing::error!(event = "reload_stuck", what = name, "{fault}");
                    // Wait for it, so that at most one thread is blocked.
                    polling.await
                }
            };
            // `poll` does not panic, and the runtime does not cancel blocking work. If it ended anyway, so does the watcher.
            let Ok((watcher, outcome)) = polled else { return };
            self = watcher;
            next = Instant::now() + if outcome == PollOutcome::Unsettled { SETTLE } else { every };
            if events.files != self.files {
                events = Events::of(&self.files);
            }
        }
    }

    /// Checks once. `forced` reloads even if the content is the same or may be half written.
    pub fn poll(&mut self, forced: bool) -> PollOutcome {
        let seen = hash(&self.hash_key, &self.files);
        let settled = seen == std::mem::replace(&mut self.last_seen, seen);
        self.counts.exposed(self.source.secrets().into_iter().filter(|file| files::is_readable_by_all(file)).collect());
        if seen == self.acted_on && !forced {
            self.unsettled = 0;
            return PollOutcome::Same;
        }
        if !forced && !settled && self.unsettled < MAX_UNSETTLED {
            self.unsettled += 1;
            return PollOutcome::Unsettled;
        }
        self.unsettled = 0;
        // A document that makes its parser panic must not end the watcher.
        let reloaded = catch_unwind(AssertUnwindSafe(|| self.source.reload()))
            .unwrap_or_else(|_| Err(Fault("reading it ended in a panic of this service".to_owned())));
        self.acted_on = seen;
        let files = self.source.files();
        if files != self.files {
            self.files = files;
            // Reload once more: the files that are new were read but not hashed before.
            self.last_seen = hash(&self.hash_key, &self.files);
            self.acted_on = [0; 32];
        } else if !forced && hash(&self.hash_key, &self.files) != seen {
            // The content changed while it was read, so the next check reloads it.
            self.acted_on = [0; 32];
        }
        self.record(reloaded)
    }

    /// Counts and logs the result. A fault that repeats is logged at debug level.
    fn record(&mut self, reloaded: Result<Reloaded, Fault>) -> PollOutcome {
        let (what, failures) = (self.source.name(), self.failures);
        match reloaded {
            Ok(reloaded) => {
                self.last_fault = None;
                self.failures = 0;
                if reloaded == Reloaded::Taken {
                    self.source.log_taken(failures);
                    self.counts.taken();
                    return PollOutcome::Taken;
                }
                self.counts.unchanged();
                if failures > 0 {
                    tracing::info!(event = "reload_recovered", what, failures, "the files are good again");
                }
                PollOutcome::Same
            }
            Err(fault) => {
                self.failures += 1;
                self.counts.failed(&fault.0);
                let failures = self.failures;
                if self.last_fault.as_ref() == Some(&fault) {
                    tracing::debug!(event = "reload_failed", what, failures, %fault);
                } else {
                    tracing::error!(event = "reload_failed", what, failures, %fault, "the last good version stays in force");
                }
                self.last_fault = Some(fault.clone());
                PollOutcome::Kept(fault)
            }
        }
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Change events in the folders of the files. An event only causes a check. Folders are watched, since a file that is renamed over or reached
/// through a swapped symlink is a new file.
struct Events {
    files: Vec<PathBuf>,
    changed: mpsc::Receiver<()>,
    /// `None` if the system gives no events. Then only the interval causes checks.
    watcher: Option<notify::RecommendedWatcher>,
}

// === impl Events ===

impl Events {
    fn of(files: &[PathBuf]) -> Self {
        let (sender, changed) = mpsc::channel(1);
        let watcher = Self::watch(files, sender)
            .inspect_err(|fault| {
                let fault = fault.to_string();
                tracing::warn!(event = "no_file_events", fault, "changes of the files are seen by looking alone");
            })
            .ok();
        Self { files: files.to_owned(), changed, watcher }
    }

    fn watch(files: &[PathBuf], sender: mpsc::Sender<()>) -> notify::Result<notify::RecommendedWatcher> {
        let mut watcher = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
            // A check reads the files, which is an access event. It must not cause the next check.
            if !event.is_ok_and(|event| event.kind.is_access()) {
                // A full channel means that a change is signalled already.
                let _full = sender.try_send(());
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

    /// Waits for a change event, or for ever if there are no events.
    async fn changed(&mut self) {
        if self.watcher.is_none() || self.changed.recv().await.is_none() {
            std::future::pending().await
        }
    }
}

/// Hashes the content of all files. For a file that cannot be read, the error is hashed.
fn hash(key: &[u8; 32], files: &[PathBuf]) -> Hash {
    // Some files hold tokens or a TLS key.
    with_stack_wiped(|| {
        let mut hasher = blake3::Hasher::new_keyed(key);
        for file in files {
            match files::read(file, MAX_HASHED_BYTES) {
                Ok(bytes) => hasher.update(&bytes.len().to_le_bytes()).update(&bytes),
                Err(fault) => hasher.update(&[0xff; 9]).update(format!("{:?}", fault.kind()).as_bytes()),
            };
        }
        *hasher.finalize().as_bytes()
    })
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::symlink};

    use super::*;

    /// The ways in which editors, deployments and Kubernetes change a file.
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
            // Drain further events of this change.
            while tokio::time::timeout(Duration::from_millis(50), events.changed()).await.is_ok() {}
        }
        fs::read(at("registry.yaml")).unwrap();
        let seen = tokio::time::timeout(Duration::from_millis(200), events.changed()).await;
        assert!(seen.is_err(), "reading is no change");
    }
}
