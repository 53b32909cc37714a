//! `byok-gate copy`: how the binary gets into a container whose image does not have it.

use std::{
    fs::{self, Permissions},
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
};

use anyhow::Context;
use clap::Args;

use super::exit::{Exit, UsageError};

/// This process's own executable, whatever its file is called by now.
const SELF: &str = "/proc/self/exe";

#[derive(Debug, Args)]
pub(super) struct CopyArgs {
    /// Where to: a file in a folder that is there. What it held is replaced in one step.
    #[arg(value_name = "FILE")]
    to: PathBuf,
}

/// Leaves a whole executable at its destination, or what was there before.
pub(super) fn run(args: CopyArgs) -> anyhow::Result<Exit> {
    let CopyArgs { to } = args;
    if to.is_dir() {
        return Err(UsageError(format!("{} is a folder: name the file within it", to.display())).into());
    }
    // Beside it, so that the last step stays within one file system; an init container that is run again finds its own remains.
    let half = to.with_extension("half");
    let copied = leave(&half, &to);
    if copied.is_err() {
        drop(fs::remove_file(&half));
    }
    copied.with_context(|| format!("{} could not be written", to.display()))?;
    Ok(Exit::Ok)
}

fn leave(half: &Path, to: &Path) -> std::io::Result<()> {
    fs::copy(SELF, half)?;
    // For every user: the container that runs it has another one than this.
    fs::set_permissions(half, Permissions::from_mode(0o755))?;
    fs::rename(half, to)
}
