//! `byok-gate copy`: copies this binary into a container whose image does not have it.

use std::{
    fs::{self, Permissions},
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
};

use anyhow::Context;
use clap::Args;

use super::exit::{Exit, UsageError};

/// This process's executable, even if its file was renamed.
const SELF: &str = "/proc/self/exe";

#[derive(Debug, Args)]
pub(super) struct CopyArgs {
    /// The destination: a file in a folder that exists. An existing file is replaced in one step.
    #[arg(value_name = "FILE")]
    to: PathBuf,
}

/// Copies in one step: the destination holds the whole new executable, or still the old file.
pub(super) fn run(args: CopyArgs) -> anyhow::Result<Exit> {
    let CopyArgs { to } = args;
    if to.is_dir() {
        return Err(UsageError(format!("{} is a folder: name the file within it", to.display())).into());
    }
    // The temporary file is in the same folder, so that the rename stays within one file system. Its name is fixed, so that an init container that
    // runs again overwrites its own leftovers.
    let half = to.with_extension("half");
    let copied = copy_and_rename(&half, &to);
    if copied.is_err() {
        drop(fs::remove_file(&half));
    }
    copied.with_context(|| format!("{} could not be written", to.display()))?;
    Ok(Exit::Ok)
}

fn copy_and_rename(half: &Path, to: &Path) -> std::io::Result<()> {
    fs::copy(SELF, half)?;
    // Executable by all users: the other container runs as another user.
    fs::set_permissions(half, Permissions::from_mode(0o755))?;
    fs::rename(half, to)
}
