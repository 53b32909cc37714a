//! Writes log lines to a standard stream through a bounded buffer, which a thread empties. Code that logs never waits for the reader of the log.
//!
//! A few lines are written at once. Many lines are collected for a short interval and written together, so that on a busy server a line costs no
//! system call of its own. A killed process loses the lines that are not written yet: on a busy server those of one interval, else hardly any.
//!
//! Written by hand, like the lines of `events`: together they save 21,700 of a call's 107,700 instructions over tracing's formatter
//! (docs/performance.md), and after a pause the reader of the log is told how many lines were lost.

use std::{
    io::{self, Write},
    mem,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread,
    time::{Duration, Instant},
};

use jiff::{Timestamp, fmt::temporal::DateTimePrinter};
use tracing_subscriber::fmt::MakeWriter;

use crate::telemetry::metrics::{Collect, Page};

/// How many bytes may wait to be written: about 6,000 decisions, a fifth of a second at full load. Lines over the limit are dropped and counted.
pub const MAX_PENDING: usize = 4 << 20;
/// How long lines are collected on a busy server.
const BATCH_INTERVAL: Duration = Duration::from_millis(20);
/// After this many writes within one interval, lines are collected. Each write wakes the thread, which is expensive on few cores.
const WRITES_PER_INTERVAL: u32 = 16;
/// Lines are collected up to this size. A larger batch saves few system calls, and would not stay in a core's cache.
const BATCH_BYTES: usize = 128 << 10;
/// The capacity that an empty buffer keeps, so that the memory of a burst is given back.
const RETAINED_CAPACITY: usize = 2 * BATCH_BYTES;

/// Takes log lines. Clones share one buffer. When the last clone is dropped, the thread writes the remaining lines and ends.
#[derive(Clone)]
pub struct LogWriter(Arc<Owner>);

struct Owner(Arc<Shared>);

struct Shared {
    /// How many bytes may wait to be written.
    max_pending: usize,
    state: Mutex<State>,
    /// Signals the idle thread that there are lines to write.
    work: Condvar,
    /// Signals the thread to stop collecting: a flush was requested, or a batch is full.
    flush_now: Condvar,
    /// Signals that everything is written.
    drained: Condvar,
}

#[derive(Default)]
struct State {
    pending: Vec<u8>,
    dropped: u64,
    writing: bool,
    /// Whether the thread waits for `work`. Without this flag, every line would make a system call to wake a thread that runs already.
    idle: bool,
    flush_requested: bool,
    closed: bool,
}

// === impl LogWriter ===

impl LogWriter {
    /// Writes lines to this stream, which may block for ever and may fail.
    pub fn to(stream: impl Write + Send + 'static) -> io::Result<Self> {
        Self::with_room(stream, MAX_PENDING)
    }

    fn with_room(stream: impl Write + Send + 'static, max_pending: usize) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            max_pending,
            state: Mutex::new(State::default()),
            work: Condvar::new(),
            flush_now: Condvar::new(),
            drained: Condvar::new(),
        });
        let writer = Arc::clone(&shared);
        thread::Builder::new().name("log".into()).spawn(move || writer.write_all_to(stream))?;
        Ok(Self(Arc::new(Owner(shared))))
    }

    /// Takes a line with its line break. If it does not fit, it is counted as dropped.
    pub fn push(&self, line: &[u8]) {
        let Shared { max_pending, work, flush_now, .. } = &*self.0.0;
        let mut state = self.0.0.lock();
        let (before, after) = (state.pending.len(), state.pending.len() + line.len());
        if after > *max_pending {
            state.dropped += 1;
            return;
        }
        state.pending.extend_from_slice(line);
        if mem::take(&mut state.idle) {
            drop(state);
            work.notify_one();
        } else if before < BATCH_BYTES && after >= BATCH_BYTES {
            drop(state);
            flush_now.notify_one();
        }
    }

    /// How many lines were dropped because the reader was too slow or gone.
    pub fn dropped(&self) -> u64 {
        self.0.0.lock().dropped
    }

    /// Waits until everything is written, up to the timeout. Returns whether it is.
    pub fn flush(&self, timeout: Duration) -> bool {
        let Shared { work, flush_now, drained, .. } = &*self.0.0;
        let end = Instant::now() + timeout;
        let mut state = self.0.0.lock();
        loop {
            if state.pending.is_empty() && !state.writing {
                return true;
            }
            let Some(left) = end.checked_duration_since(Instant::now()) else { return false };
            state.flush_requested = true;
            work.notify_one();
            flush_now.notify_one();
            state = drained.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

impl Collect for LogWriter {
    fn collect(&self, page: &mut Page) {
        page.counter(
            "byokgate_log_lines_dropped",
            "Log lines that were dropped because stdout was not read in time, or could not be written",
        )
        .add(&[], self.dropped());
    }
}

impl io::Write for LogWriter {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        self.push(line);
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<'a> MakeWriter<'a> for LogWriter {
    type Writer = Self;

    fn make_writer(&'a self) -> Self {
        self.clone()
    }
}

// === impl Shared ===

impl Shared {
    fn write_all_to(&self, mut stream: impl Write) {
        let mut batch = Vec::new();
        let mut reported = 0;
        // Whether what is written ends within a line.
        let mut torn = false;
        let (mut began, mut writes) = (Instant::now(), 0);
        let mut state = self.lock();
        loop {
            while state.pending.is_empty() {
                if state.closed {
                    return;
                }
                state.idle = true;
                state = self.work.wait(state).unwrap_or_else(PoisonError::into_inner);
            }
            state.idle = false;
            state.writing = true;
            mem::swap(&mut state.pending, &mut batch);
            let dropped = state.dropped;
            drop(state);
            let lines = batch.len();
            if dropped > reported {
                put_dropped_line(&mut batch, dropped - reported);
            }
            // A disk that was full has half a line at its end, which must not spoil the next one.
            torn = torn && write(&mut stream, b"\n") == 0;
            let written = if torn { 0 } else { write(&mut stream, &batch) };
            torn |= batch.get(..written).and_then(<[u8]>::last).is_some_and(|&byte| byte != b'\n');
            let lost = batch.get(written..lines).unwrap_or_default().iter().filter(|&&byte| byte == b'\n').count();
            if written == batch.len() {
                reported = dropped;
            }
            batch.clear();
            batch.shrink_to(RETAINED_CAPACITY);
            state = self.lock();
            state.dropped += lost as u64;
            state.writing = false;
            if state.pending.is_empty() {
                state.flush_requested = false;
                self.drained.notify_all();
            }
            let left = BATCH_INTERVAL.saturating_sub(began.elapsed());
            writes += 1;
            if left.is_zero() {
                (began, writes) = (Instant::now(), 0);
            } else if writes >= WRITES_PER_INTERVAL {
                let keep_collecting =
                    |state: &mut State| !state.flush_requested && !state.closed && state.pending.len() < BATCH_BYTES;
                let pause = self.flush_now.wait_timeout_while(state, left, keep_collecting);
                state = pause.unwrap_or_else(PoisonError::into_inner).0;
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // A panic elsewhere cannot leave the state inconsistent: every line is added by one call.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Owner {
    fn drop(&mut self) {
        let Self(shared) = self;
        shared.lock().closed = true;
        shared.work.notify_one();
        shared.flush_now.notify_one();
    }
}

/// Writes as much as the stream takes, and returns how many bytes that is. The stream has no buffer of its own.
fn write(stream: &mut impl Write, bytes: &[u8]) -> usize {
    let mut left = bytes;
    while !left.is_empty() {
        match stream.write(left) {
            Ok(0) => break,
            Ok(count) => left = left.get(count..).unwrap_or_default(),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            // Another process that shares the stream made it so that no write waits. Its reader is only slow.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => thread::sleep(BATCH_INTERVAL),
            Err(_) => break,
        }
    }
    bytes.len() - left.len()
}

fn put_dropped_line(batch: &mut Vec<u8>, count: u64) {
    batch.extend_from_slice(b"{\"timestamp\":\"");
    put_timestamp(batch);
    batch.extend(format!("\",\"level\":\"ERROR\",\"event\":\"log_lines_dropped\",\"count\":{count}}}\n").bytes());
}

/// Appends the present time, in the format of the other log lines.
pub(super) fn put_timestamp(line: &mut Vec<u8>) {
    // Writing to memory cannot fail.
    drop(DateTimePrinter::new().precision(Some(6)).print_timestamp(&Timestamp::now(), line));
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{self, Receiver, SyncSender};

    use super::*;

    /// An interpreter on a busy machine takes minutes.
    const TIMEOUT: Duration = Duration::from_secs(if cfg!(miri) { 1800 } else { 20 });
    /// How much a stream takes at once.
    const WRITE_BYTES: usize = 5000;

    /// A stream that holds nothing: each write waits for its reader. Not a pipe, since Miri never wakes a reader of a pipe that is closed.
    struct Stream(SyncSender<Vec<u8>>);

    impl Write for Stream {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let taken = &bytes[..bytes.len().min(WRITE_BYTES)];
            self.0.send(taken.to_vec()).map_err(|_| io::ErrorKind::BrokenPipe)?;
            Ok(taken.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn stream() -> (Receiver<Vec<u8>>, Stream) {
        let (writer, reader) = mpsc::sync_channel(0);
        (reader, Stream(writer))
    }

    fn lines_of(reader: &Receiver<Vec<u8>>) -> Vec<String> {
        let bytes: Vec<u8> = reader.iter().flatten().collect();
        String::from_utf8(bytes).unwrap().lines().map(str::to_owned).collect()
    }

    #[test]
    fn every_line_arrives_whole_and_in_order() {
        let (reader, writer) = stream();
        let lines = LogWriter::to(writer).unwrap();
        let reading = thread::spawn(move || lines_of(&reader));
        // An interpreter takes seconds for what a processor does in a millisecond.
        let count = if cfg!(miri) { 100 } else { 5000 };
        let expect: Vec<String> = (0..count).map(|number| format!("line {number}")).collect();
        expect.iter().for_each(|line| lines.push(format!("{line}\n").as_bytes()));
        drop(lines);
        assert_eq!(reading.join().unwrap(), expect);
    }

    /// If the log is not read, logging goes on and memory stays bounded. When it is read again, the loss is reported.
    #[test]
    fn a_stream_that_nobody_reads_drops_lines_and_says_how_many() {
        let (reader, writer) = stream();
        // Little room and few lines, because Miri takes minutes for megabytes.
        let room = 2 * BATCH_BYTES;
        let lines = LogWriter::with_room(writer, room).unwrap();
        let line = [&[b'x'; (8 << 10) - 1][..], b"\n"].concat();
        // The thread may hold as much as may wait.
        let pushed = 3 * room / line.len();
        for _ in 0..pushed {
            lines.push(&line);
        }
        let dropped = lines.dropped();
        assert!(dropped > 0 && !lines.flush(Duration::from_millis(1)));
        assert!(lines.0.0.lock().pending.len() <= room);
        let reading = thread::spawn(move || lines_of(&reader));
        assert!(lines.flush(TIMEOUT));
        drop(lines);
        let (reports, whole): (Vec<_>, Vec<_>) = reading.join().unwrap().into_iter().partition(|line| line.starts_with('{'));
        assert!(whole.iter().all(|whole| whole.len() == line.len() - 1));
        assert_eq!(whole.len() as u64 + dropped, pushed as u64);
        let reports: Vec<serde_json::Value> = reports.iter().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert_eq!(reports.iter().map(|line| line["count"].as_u64().unwrap()).sum::<u64>(), dropped, "{reports:?}");
    }

    #[test]
    fn lines_for_a_closed_stream_are_counted_as_dropped() {
        let (reader, writer) = stream();
        drop(reader);
        let lines = LogWriter::to(writer).unwrap();
        for _ in 0..3 {
            lines.push(b"one\n");
            assert!(lines.flush(TIMEOUT));
        }
        assert_eq!(lines.dropped(), 3);
    }

    /// A disk: it takes what it has room for, and refuses the rest.
    #[derive(Clone, Default)]
    struct Disk(Arc<Mutex<(usize, Vec<u8>)>>);

    impl Write for Disk {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let (room, content) = &mut *self.0.lock().unwrap();
            let taken = bytes.len().min(*room);
            if taken == 0 {
                return Err(io::ErrorKind::StorageFull.into());
            }
            *room -= taken;
            content.extend_from_slice(&bytes[..taken]);
            Ok(taken)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    /// A disk that is full in the middle of a line, for a while: no line after it is spoilt, and each lost one is counted once.
    #[test]
    fn a_disk_that_was_full_spoils_no_later_line() {
        for room in (0..=24).step_by(if cfg!(miri) { 7 } else { 1 }) {
            let disk = Disk::default();
            disk.0.lock().unwrap().0 = room;
            let lines = LogWriter::to(disk.clone()).unwrap();
            // One batch, or two.
            lines.push(b"the first\nthe second\n");
            assert!(lines.flush(TIMEOUT));
            lines.push(b"the third\n");
            assert!(lines.flush(TIMEOUT));
            disk.0.lock().unwrap().0 = 1 << 20;
            lines.push(b"the last\n");
            assert!(lines.flush(TIMEOUT));
            let content = disk.0.lock().unwrap().1.clone();
            let content = String::from_utf8(content).unwrap();
            let whole = |name: &&&str| content.lines().any(|line| line == **name);
            let arrived = ["the first", "the second", "the third"].iter().filter(whole).count() as u64;
            assert!(content.lines().any(|line| line == "the last"), "{room}: {content}");
            // A line without its break is counted although it gets one later.
            assert!((3..=4).contains(&(lines.dropped() + arrived)), "{room}: {} dropped: {content}", lines.dropped());
            let told: Vec<_> = content.lines().filter(|line| line.contains("log_lines_dropped")).collect();
            assert_eq!(told.len() as u64, lines.dropped().min(1), "{room}: {content}");
            assert!(told.iter().all(|line| line.contains(&format!("\"count\":{}}}", lines.dropped()))), "{room}: {content}");
        }
    }

    /// A stream that another process made to refuse what would have to wait.
    #[test]
    fn a_stream_that_does_not_wait_loses_nothing() {
        struct Hasty(bool, SyncSender<Vec<u8>>);
        impl Write for Hasty {
            fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
                self.0 = !self.0;
                if self.0 {
                    return Err(io::ErrorKind::WouldBlock.into());
                }
                self.1.send(bytes[..1].to_vec()).map(|()| 1).map_err(|_| io::ErrorKind::BrokenPipe.into())
            }

            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        let (writer, reader) = mpsc::sync_channel(64);
        let lines = LogWriter::to(Hasty(false, writer)).unwrap();
        lines.push(b"one\ntwo\n");
        assert!(lines.flush(TIMEOUT));
        assert_eq!(lines.dropped(), 0);
        drop(lines);
        assert_eq!(lines_of(&reader), ["one", "two"]);
    }

    #[test]
    fn a_line_after_a_silence_wakes_the_writer() {
        let (reader, writer) = stream();
        let lines = LogWriter::to(writer).unwrap();
        for _ in 0..2 * WRITES_PER_INTERVAL {
            while !lines.0.0.lock().idle {
                thread::yield_now();
            }
            lines.push(b"one\n");
            assert_eq!(reader.recv_timeout(TIMEOUT).unwrap(), b"one\n");
        }
    }
}
