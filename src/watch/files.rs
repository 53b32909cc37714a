//! Reads files: only regular ones, up to a size limit, and within a time limit. All configured files are read here. A pipe or a device may never
//! end and a mount may hang, and none of them may block a start, a reload or a shutdown.

use std::{
    cell::RefCell,
    fs::{File, OpenOptions},
    io::{self, ErrorKind, Read},
    os::unix::fs::{MetadataExt, OpenOptionsExt},
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    thread,
    time::Duration,
};

use zeroize::Zeroizing;

use crate::domain::duration::text;

/// How long reading may take: far longer than a working volume needs.
pub const READ_TIME: Duration = Duration::from_secs(10);
/// The mode bit that lets all users read.
const READABLE_BY_ALL: u32 = 0o004;

/// Reads a file's bytes, up to one more than the limit, so that the caller can report a file that is too long. They are wiped when dropped, since
/// some files are keys.
pub fn read(path: &Path, limit: u64) -> io::Result<Zeroizing<Vec<u8>>> {
    let file = open(path)?;
    // Allocate the whole size at once: a buffer that grows would leave unwiped copies behind. Add some room: with fewer than 32 spare bytes the
    // standard library first reads into a buffer on the stack, where a short token would stay.
    let size = file.metadata()?.len().min(limit);
    let mut bytes = Zeroizing::new(Vec::with_capacity(usize::try_from(size).unwrap_or_default().saturating_add(64)));
    file.take(limit.saturating_add(1)).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// Reads a file's text in the same way.
pub fn read_text(path: &Path, limit: u64) -> io::Result<Zeroizing<String>> {
    let mut bytes = read(path, limit)?;
    String::from_utf8(std::mem::take(&mut *bytes)).map(Zeroizing::new).map_err(|fault| {
        drop(Zeroizing::new(fault.into_bytes()));
        io::Error::new(ErrorKind::InvalidData, "is not UTF-8")
    })
}

/// Whether all users of this machine can read it.
pub fn is_readable_by_all(path: &Path) -> bool {
    std::fs::metadata(path).is_ok_and(|found| found.mode() & READABLE_BY_ALL != 0)
}

/// Runs work that may block on a thread of its own. If it takes too long, the thread is left running and this returns an error.
pub fn in_time<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> io::Result<T> {
    within(READ_TIME, work)
}

fn within<T: Send + 'static>(limit: Duration, work: impl FnOnce() -> T + Send + 'static) -> io::Result<T> {
    let (sender, receiver) = mpsc::sync_channel(1);
    // Whoever waits for this thread asks about the new one too.
    let progress = PROGRESS.with_borrow(Clone::clone);
    let theirs = progress.clone();
    thread::Builder::new().name("files".to_owned()).spawn(move || {
        // An error means that the caller no longer waits.
        drop(sender.send(theirs.of(work)));
    })?;
    receiver.recv_timeout(limit).map_err(|_| io::Error::new(ErrorKind::TimedOut, progress.why_late(limit)))
}

/// What work on files is doing, so that it can be said what takes too long.
#[derive(Debug, Clone, Default)]
pub struct Progress {
    is_checking: Arc<AtomicBool>,
}

thread_local! {
    static PROGRESS: RefCell<Progress> = RefCell::default();
}

impl Progress {
    /// Runs work whose progress this is.
    pub fn of<T>(&self, work: impl FnOnce() -> T) -> T {
        let before = PROGRESS.replace(self.clone());
        let done = work();
        PROGRESS.set(before);
        done
    }

    /// Why the work has not ended after this time.
    pub fn why_late(&self, limit: Duration) -> String {
        let limit = text(limit);
        if self.is_checking.load(Ordering::Relaxed) {
            format!(
                "was read, but could not be checked within {limit}: the document is too large for this machine, or the machine is too busy"
            )
        } else {
            format!("could not be read within {limit}: the volume does not answer")
        }
    }
}

/// Checks what was read. If that takes too long, the message blames the document and not the volume.
pub fn checking<T>(check: impl FnOnce() -> T) -> T {
    let progress = PROGRESS.with_borrow(Clone::clone);
    progress.is_checking.store(true, Ordering::Relaxed);
    let done = check();
    progress.is_checking.store(false, Ordering::Relaxed);
    done
}

fn open(path: &Path) -> io::Result<File> {
    // Non-blocking, since opening a pipe would otherwise wait for a writer.
    let file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path)?;
    let kind = file.metadata()?.file_type();
    if kind.is_file() {
        return Ok(file);
    }
    let what = if kind.is_dir() { "is a folder" } else { "is not a regular file: a pipe or a device may never end" };
    Err(io::Error::new(ErrorKind::InvalidInput, what))
}

#[cfg(test)]
mod tests {
    use std::{fs, process::Command};

    use super::*;

    #[test]
    fn what_takes_too_long_is_said() {
        let moment = Duration::from_millis(50);
        let (release, blocked) = mpsc::channel::<()>();
        let late = |work: Box<dyn FnOnce() + Send>| within(moment, work).unwrap_err().to_string();
        let (began, begins) = mpsc::channel::<()>();
        // An error ends both threads: the sender is dropped with the test.
        let fault = late(Box::new(move || {
            let _ended = blocked.recv();
        }));
        assert_eq!(fault, "could not be read within 50ms: the volume does not answer");
        let (release_too, blocked) = mpsc::channel::<()>();
        let progress = Progress::default();
        let checks = move || {
            checking(|| {
                began.send(()).unwrap();
                let _ended = blocked.recv();
            });
        };
        // Through a second thread, as when a reload loads the configuration.
        let outer = progress.clone();
        let waiting = thread::spawn(move || outer.of(|| within(Duration::from_secs(1), checks)));
        begins.recv().unwrap();
        let expect = "was read, but could not be checked within 50ms: the document is too large for this machine, or the machine is too busy";
        assert_eq!(progress.why_late(moment), expect);
        drop((release, release_too));
        waiting.join().unwrap().unwrap();
        assert!(progress.why_late(moment).contains("volume"), "the check has ended");
    }

    #[test]
    fn regular_files_are_read_up_to_a_limit_and_nothing_else_is() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        fs::write(at("file"), "made-up").unwrap();
        assert_eq!(**read(&at("file"), 100).unwrap(), *b"made-up");
        assert_eq!(read(&at("file"), 3).unwrap().len(), 4, "one more than the limit");
        std::os::unix::fs::symlink(at("file"), at("link")).unwrap();
        assert_eq!(**read(&at("link"), 100).unwrap(), *b"made-up");
        assert!(Command::new("mkfifo").arg(at("pipe")).status().unwrap().success());
        for (path, expect) in [
            (at("pipe"), "not a regular file"),
            (Path::new("/dev/zero").to_owned(), "not a regular file"),
            (folder.path().to_owned(), "a folder"),
            (at("nothing"), "No such file"),
        ] {
            let fault = read(&path, 100).unwrap_err().to_string();
            assert!(fault.contains(expect), "{fault}");
        }
        fs::write(at("bytes"), [0xff]).unwrap();
        assert_eq!(read_text(&at("bytes"), 100).unwrap_err().to_string(), "is not UTF-8");
    }
}
