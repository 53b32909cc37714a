//! The `byok-gate` command.

use byok_gate::cli::{Cli, Exit};
use clap::Parser;
use mimalloc::MiMalloc;

/// Everywhere, not only in the static binary that needs it: what is tested is what is shipped.
#[global_allocator]
static ALLOCATOR: MiMalloc = MiMalloc;

fn main() -> Exit {
    Cli::parse().run()
}
