//! Files that are read again while the server runs: by content, the last good version kept, every fault logged and counted. One watcher
//! serves all that comes from files: registry, catalogue and configuration, certificates, tokens.
//!
//! The content decides and never an event: a volume that is swapped by symlink, a file that is written in place and one that is renamed over
//! then look alike, and nothing is missed.

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

/// How long after an event or an unsettled look the next look comes: a writer that truncates first has written by then.
const SETTLE: Duration = Duration::from_millis(100);
/// How many looks in a row may find the content changing before it is read all the same. A file that is being written is
/// left alone until two looks agree; one that never rests must not hide every change.
const MAX_UNSETTLED: u32 = 4;
/// The most of one file that is looked at: more than any document that is accepted.
const MAX_LOOKED_AT: u64 = 2 * 1024 * 1024;

/// Something that comes from files.
pub trait Source: Send + 'static {
    /// For logs and numbers.
    fn name(&self) -> &'static str;

    /// The files. They may be others after a reload: a configuration names some.
    fn files(&self) -> Vec<PathBuf>;

    /// Reads the files, and puts in force what they hold if it is good. With a fault nothing changes.
    fn reload(&mut self) -> Result<Reloaded, Fault>;

    /// Logs that a new version is in force, after so many failures.
    fn log_taken(&self, failures: u64) {
        tracing::info!(event = "reloaded", what = self.name(), failures);
    }
}

/// What came of reading again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reloaded {
    /// The files hold what is in force.
    Unchanged,
    /// A new version is in force.
    Taken,
}

/// What is wrong with the files, for the log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fault(pub String);

/// What a look came to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PollOutcome {
    /// Nothing is new.
    Same,
    /// Something is new, and may be half written.
    Unsettled,
    /// The new version is in force.
    Taken,
    /// The new version is bad, and the last good one stays.
    Kept(Fault),
}

/// Follows one source's files.
pub struct Watcher<S> {
    source: S,
    files: Vec<PathBuf>,
    /// Of the hash: the content of a key or of a token must not be guessed from what stays in memory.
    hash_key: [u8; 32],
    /// The content that was last acted on, whether it was good or not.
    acted_on: Hash,
    /// The content at the last look, and for how many looks it has been another each time.
    last_seen: Hash,
    unsettled: u32,
    failures: u64,
    last_fault: Option<Fault>,
    counts: Arc<Reloads>,
}

type Hash = [u8; 32];

// === impl Watcher ===

impl<S: Source> Watcher<S> {
    /// Of a source that has been read. The first looks read it again: a file may have changed since.
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

    /// How it went so far.
    pub fn counts(&self) -> Arc<Reloads> {
        Arc::clone(&self.counts)
    }

    /// Looks this often, soon after a folder of the files has changed, and at once when `forced` says so. Ends when the sender of that is
    /// gone.
    pub async fn run(mut self, every: Duration, mut forced: watch::Receiver<()>) {
        let mut events = Events::of(&self.files);
        let mut next = Instant::now();
        loop {
            let is_forced = tokio::select! {
                () = sleep_until(next) => false,
                () = events.changed() => {
                    // Not put off by a further event: a file that never rests is looked at all the same.
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
            // Reading and checking are work for a thread that may wait.
            let mut polling = tokio::task::spawn_blocking(move || {
                let outcome = self.poll(is_forced);
                (self, outcome)
            });
            let polled = match timeout(files::READ_TIME, &mut polling).await {
                Ok(polled) => polled,
                Err(_) => {
                    let fault = "the files cannot be read: their volume does not answer";
                    counts.failed(fault);
                    tracing::error!(event = "reload_stuck", what = name, "{fault}");
                    // One thread waits for it, and no more than one.
                    polling.await
                }
            };
            // `poll` does not panic, and the runtime does not cancel what blocks; if it ended all the same, so does this.
            let Ok((watcher, outcome)) = polled else { return };
            self = watcher;
            next = Instant::now() + if outcome == PollOutcome::Unsettled { SETTLE } else { every };
            if events.files != self.files {
                events = Events::of(&self.files);
            }
        }
    }

    /// One look. `forced` reads what is there even if it is the same, or may be half written.
    pub fn poll(&mut self, forced: bool) -> PollOutcome {
        let seen = hash(&self.hash_key, &self.files);
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
        // A document must not be able to end the watch, whatever it does to the code that reads it.
        let reloaded = catch_unwind(AssertUnwindSafe(|| self.source.reload()))
            .unwrap_or_else(|_| Err(Fault("reading it ended in a panic of this service".to_owned())));
        self.acted_on = seen;
        let files = self.source.files();
        if files != self.files {
            self.files = files;
            // Read once more: what was hashed is not what was read of files that were not followed yet.
            self.last_seen = hash(&self.hash_key, &self.files);
            self.acted_on = [0; 32];
        } else if !forced && hash(&self.hash_key, &self.files) != seen {
            // What was read is what was seen, or the next look sees to it.
            self.acted_on = [0; 32];
        }
        self.record(reloaded)
    }

    /// Counts it, and logs what is new: the same fault again is told at debug level.
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

/// Changes in the folders of files: a reason to look, never more. Folders, since a file that is renamed over or reached through
/// a swapped symlink is another file.
struct Events {
    files: Vec<PathBuf>,
    changed: mpsc::Receiver<()>,
    /// `None` where the system gives no events: looking again and again is then all there is.
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
            // Looking is an access too: taking it for a change would make each look the reason for the next.
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

/// The content of all files as one hash. A file that cannot be read has a content of its own: its absence.
fn hash(key: &[u8; 32], files: &[PathBuf]) -> Hash {
    // Some of them hold tokens or a TLS key.
    with_stack_wiped(|| {
        let mut hasher = blake3::Hasher::new_keyed(key);
        for file in files {
            match files::read(file, MAX_LOOKED_AT) {
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
