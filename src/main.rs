//! The `byok-gate` command.

use byok_gate::cli::{Cli, Exit};
use clap::Parser;
use mimalloc::MiMalloc;

/// Only the static binary needs it, but all builds use it, so that tests run with the allocator that is shipped.
#[global_allocator]
static ALLOCATOR: MiMalloc = MiMalloc;

fn main() -> Exit {
    Cli::parse().run()
}
