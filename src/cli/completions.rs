//! `byok-gate completions` and `byok-gate man`: for packaging.

use std::path::PathBuf;

use anyhow::Context;
use clap::{Args, Command};
use clap_complete::Shell;

use super::exit::{Exit, print};

#[derive(Debug, Args)]
pub(super) struct CompletionsArgs {
    /// The shell to complete for.
    shell: Shell,
}

#[derive(Debug, Args)]
pub(super) struct ManArgs {
    /// The folder to write byok-gate.1 and a page for each command to.
    #[arg(value_name = "DIR")]
    to: PathBuf,
}

/// Writes a shell's completions to standard output.
pub(super) fn completions(args: CompletionsArgs, mut command: Command) -> anyhow::Result<Exit> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut command, "byok-gate", &mut script);
    // If a binary's name has a dash, clap_complete 4.6.11 stores its commands under another label than the one it looks up.
    print(&String::from_utf8(script)?.replace("byok__subcmd__gate", "byok__gate"))?;
    Ok(Exit::Ok)
}

/// Writes the manual.
pub(super) fn man(args: ManArgs, command: Command) -> anyhow::Result<Exit> {
    let ManArgs { to } = args;
    clap_mangen::generate_to(command, &to).with_context(|| format!("no page could be written to {}", to.display()))?;
    Ok(Exit::Ok)
}
