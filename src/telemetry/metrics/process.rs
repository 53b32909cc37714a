//! Metrics of the process: its version, start time, memory, descriptors and CPU time. They are read from `/proc` when the page is requested.

use std::{
    fs,
    time::{SystemTime, UNIX_EPOCH},
};

use super::{Collect, Page};

/// The unit of CPU time in `/proc`. It is the same on every Linux.
const TICKS_PER_SECOND: f64 = 100.0;
/// The commit of a release build; empty in other builds.
pub const REVISION: &str = match option_env!("BYOK_GATE_REVISION") {
    Some(revision) => revision,
    None => "",
};

/// This process.
#[derive(Debug)]
pub struct Process {
    started: SystemTime,
}

// === impl Process ===

impl Process {
    /// A process that starts now.
    pub fn started() -> Self {
        Self { started: SystemTime::now() }
    }
}

impl Collect for Process {
    fn collect(&self, page: &mut Page) {
        page.gauge("byokgate_build_info", "What is running")
            .add(&[("version", env!("CARGO_PKG_VERSION")), ("revision", REVISION)], 1_u64);
        let started = self.started.duration_since(UNIX_EPOCH).unwrap_or_default();
        page.gauge("process_start_time_seconds", "When the server started").add(&[], started.as_secs_f64());
        // Without /proc, the following are absent.
        if let Some(bytes) = resident_bytes() {
            page.gauge("process_resident_memory_bytes", "Resident memory").add(&[], bytes);
        }
        if let Ok(open) = fs::read_dir("/proc/self/fd") {
            page.gauge("process_open_fds", "Open file descriptors").add(&[], open.count());
        }
        if let Some(limit) = descriptor_limit() {
            page.gauge("process_max_fds", "The limit of open file descriptors").add(&[], limit);
        }
        if let Some(seconds) = cpu_seconds() {
            page.counter("process_cpu_seconds", "CPU time, user and system").add(&[], seconds);
        }
    }
}

fn resident_bytes() -> Option<u64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let kilobytes = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    kilobytes.split_whitespace().next()?.parse::<u64>().ok()?.checked_mul(1024)
}

fn descriptor_limit() -> Option<u64> {
    let limits = fs::read_to_string("/proc/self/limits").ok()?;
    let soft = limits.lines().find_map(|line| line.strip_prefix("Max open files"))?;
    soft.split_whitespace().next()?.parse().ok()
}

fn cpu_seconds() -> Option<f64> {
    let stat = fs::read_to_string("/proc/self/stat").ok()?;
    // Skip the process's name, which may contain anything. Then state is the first field, and user and system time are the 12th and 13th.
    let (_, fields) = stat.rsplit_once(')')?;
    let ticks = fields.split_whitespace().skip(11).take(2).map(str::parse::<u64>).sum::<Result<u64, _>>().ok()?;
    Some(ticks as f64 / TICKS_PER_SECOND)
}
