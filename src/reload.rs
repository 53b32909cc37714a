//! Registry, catalogue and configuration read again while the service runs: content decides, never a file's date or an event.
//!
//! The files are looked at by their content's hash, so that writing in place, truncating, renaming over, a swapped symlink and
//! deleting and making anew all look the same. A version that does not stand changes nothing: the last good one stays in
//! force, and the status says why.

use std::{
    fs,
    io::Read,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use tokio::{
    sync::mpsc,
    time::{MissedTickBehavior, interval},
};

use crate::{
    assess::{Origin, Snapshot},
    engine::Engine,
    problem::{Problem, Problems},
};

/// How often the files are looked at. They are small, and an operator who saves one expects it to count at once.
const LOOK_EVERY: Duration = Duration::from_millis(500);
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
}

/// What a look came to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Looked {
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
        Self { engine, files, load, acted_on: [0; 32], last_seen, unsettled: 0, failures: 0 }
    }

    /// Looks again and again, and at once when `hurry` says so. Ends when the sender of `hurry` is gone.
    pub async fn run(mut self, mut hurry: mpsc::Receiver<()>) {
        let mut ticks = interval(LOOK_EVERY);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let hurried = tokio::select! {
                _ = ticks.tick() => false,
                asked = hurry.recv() => match asked {
                    Some(()) => true,
                    None => return,
                },
            };
            // Reading and checking are work for a thread that may wait.
            let look = tokio::task::spawn_blocking(move || {
                self.look(hurried);
                self
            });
            // `look` does not panic, and the runtime does not cancel what blocks; if it ended all the same, so does this.
            let Ok(reload) = look.await else { return };
            self = reload;
        }
    }

    /// One look. `hurried` reads what is there even if it is the same, or may be half written.
    pub fn look(&mut self, hurried: bool) -> Looked {
        let seen = hash(&self.files);
        let settled = seen == std::mem::replace(&mut self.last_seen, seen);
        if seen == self.acted_on && !hurried {
            self.unsettled = 0;
            return Looked::Same;
        }
        if !hurried && !settled && self.unsettled < MAX_UNSETTLED {
            self.unsettled += 1;
            return Looked::Unsettled;
        }
        self.unsettled = 0;
        let load = std::panic::AssertUnwindSafe(|| (self.load)());
        // A document must not be able to end the watch, whatever it does to the code that reads it.
        let loaded = std::panic::catch_unwind(load).unwrap_or_else(|_| Err(of_this_service("reading it ended in a panic")));
        // What was read is what was seen, or the next look sees to it.
        if !hurried && hash(&self.files) != seen {
            return Looked::Unsettled;
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
                Looked::Swapped
            }
            Err(problems) => {
                self.failures += 1;
                if !told_before {
                    let (failures, document) = (self.failures, problems.document.as_str());
                    tracing::error!(event = "reload_failed", failures, document, "{problems}");
                }
                self.engine.swap(marked(&self.engine.snapshot(), &problems));
                Looked::Kept(problems)
            }
        }
    }
}

/// The same version, saying what is wrong with the one that should have followed it.
fn marked(snapshot: &Snapshot, problems: &Problems) -> Snapshot {
    let Snapshot { registry, catalogue, policy, registry_origin, catalogue_origin } = snapshot;
    let mark = |origin: &Origin, faulty: bool| Origin {
        last_reload_error: if faulty { problems.to_string() } else { String::new() },
        ..origin.clone()
    };
    // A fault of the configuration is shown with the registry, whose names it uses.
    let of_catalogue = problems.document == catalogue_origin.source;
    Snapshot {
        registry: Arc::clone(registry),
        catalogue: Arc::clone(catalogue),
        policy: Arc::clone(policy),
        registry_origin: mark(registry_origin, !of_catalogue),
        catalogue_origin: mark(catalogue_origin, of_catalogue),
    }
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
