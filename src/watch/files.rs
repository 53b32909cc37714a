//! The one door to files: regular ones alone, up to a limit, and in time. A pipe may never end, a device gives for ever, and a mount that
//! hangs answers nobody; none of them may hold up a start, a reload or an end.

use std::{
    fs::{File, OpenOptions},
    io::{self, ErrorKind, Read},
    os::unix::fs::{MetadataExt, OpenOptionsExt},
    path::Path,
    sync::mpsc,
    thread,
    time::Duration,
};

use zeroize::Zeroizing;

use crate::domain::duration::text;

/// How long reading may take: far more than a file on a volume that answers needs.
pub const READ_TIME: Duration = Duration::from_secs(10);
/// The mode's bit for reading by everybody.
const READABLE_BY_ALL: u32 = 0o004;

/// A file's bytes, one more than the limit at most, so that whoever takes them can say that there are too many. They are wiped when they are
/// dropped: some files are keys.
pub fn read(path: &Path, limit: u64) -> io::Result<Zeroizing<Vec<u8>>> {
    let file = open(path)?;
    // The whole size at once: a buffer that grows leaves its smaller selves behind. And room to spare: with less than 32 bytes of it the
    // standard library reads into a buffer on the stack first, where a short token would stay.
    let size = file.metadata()?.len().min(limit);
    let mut bytes = Zeroizing::new(Vec::with_capacity(usize::try_from(size).unwrap_or_default().saturating_add(64)));
    file.take(limit.saturating_add(1)).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// A file's text, likewise.
pub fn read_text(path: &Path, limit: u64) -> io::Result<Zeroizing<String>> {
    let mut bytes = read(path, limit)?;
    String::from_utf8(std::mem::take(&mut *bytes)).map(Zeroizing::new).map_err(|fault| {
        drop(Zeroizing::new(fault.into_bytes()));
        io::Error::new(ErrorKind::InvalidData, "is not UTF-8")
    })
}

/// Everybody on this machine can read it.
pub fn is_readable_by_all(path: &Path) -> bool {
    std::fs::metadata(path).is_ok_and(|found| found.mode() & READABLE_BY_ALL != 0)
}

/// Does what may block on a thread of its own, which is left behind when it takes too long.
pub fn in_time<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> io::Result<T> {
    let (sender, receiver) = mpsc::sync_channel(1);
    thread::Builder::new().name("files".to_owned()).spawn(move || {
        // Nobody waits for it any more.
        drop(sender.send(work()));
    })?;
    receiver.recv_timeout(READ_TIME).map_err(|_| {
        io::Error::new(ErrorKind::TimedOut, format!("could not be read within {}: the volume does not answer", text(READ_TIME)))
    })
}

fn open(path: &Path) -> io::Result<File> {
    // Without waiting: opening a pipe would wait for a writer.
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
